//! What is saved is what was loaded, on this machine's `/dev/kvm`.

use keel_hypervisor::state::{
    Activity, Bytes, DescriptorTable, Events, Exception, Interrupt, IoApicState, LapicState,
    PicState, PitChannel, PitState, Registers, Segment, XsaveArea,
};
use keel_hypervisor::{Bus, CpuState, Error, Interrupts, Result, Vcpu, Vm, VmState, Width};
use proptest::prelude::*;

use super::msrs::TSC_DEADLINE;
use super::registers::RFLAGS;
use crate::{Kvm, KvmVm, VmConfig};

const TSC: u32 = 0x10;
/// Clocks that run by themselves: the TSC, and Hyper-V's run time and reference time.
const RUNNING: [u32; 3] = [TSC, 0x4000_0010, 0x4000_0020];
const KERNELS: [Interrupts; 3] = [Interrupts::Kernel, Interrupts::Split, Interrupts::User];

struct Nothing;

impl Bus for Nothing {
    fn pio_read(&mut self, _: u16, width: Width) -> u32 {
        width.mask() as u32
    }
    fn pio_write(&mut self, _: u16, _: Width, _: u32) {}
    fn mmio_read(&mut self, _: u64, width: Width) -> u64 {
        width.mask()
    }
    fn mmio_write(&mut self, _: u64, _: Width, _: u64) {}
    fn end_of_interrupt(&mut self, _: u8) {}
}

/// A fresh VM with one vCPU that has all the features there are.
pub(super) struct Machine {
    pub(super) vm: KvmVm,
    vcpu: Box<dyn Vcpu>,
}

impl Machine {
    pub(super) fn new(interrupts: Interrupts) -> Self {
        let kvm = Kvm::open().unwrap();
        let vm = kvm.create_vm(VmConfig { interrupts, ..VmConfig::default() }).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
        Machine { vm, vcpu }
    }

    pub(super) fn save(&mut self) -> CpuState {
        self.vcpu.settle(&mut Nothing).unwrap().save().unwrap()
    }

    pub(super) fn load(&mut self, state: &CpuState) -> Result<()> {
        self.vcpu.settle(&mut Nothing).unwrap().load(state)
    }
}

/// Through JSON and back, as a snapshot goes.
fn through_json<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T) -> T {
    serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap()
}

/// Takes the clocks out, which run on.
fn take_running(state: &mut CpuState) -> Option<u64> {
    let tsc = state.msrs.get(&TSC).copied();
    let private = state.private.get_mut("kvm").map(|private| &mut private.msrs);
    for msrs in [Some(&mut state.msrs), private].into_iter().flatten() {
        msrs.retain(|index, _| !RUNNING.contains(index));
    }
    tsc
}

/// Asserts that two states taken one after the other are the same, but for the clocks, which have run on by at most 10 seconds.
#[track_caller]
fn assert_same(mut before: CpuState, mut after: CpuState) {
    let khz = u64::from(before.tsc_khz.unwrap());
    let (early, late) = (take_running(&mut before).unwrap(), take_running(&mut after).unwrap());
    assert!(
        late.wrapping_sub(early) < khz * 10_000,
        "TSC {early:#x} became {late:#x} at {khz} kHz"
    );
    assert_eq!(before.xsave.0.0, after.xsave.0.0, "XSAVE area");
    assert_eq!(before, after);
}

#[test]
fn a_fresh_vcpu_survives_every_irqchip() {
    for interrupts in KERNELS {
        let state = Machine::new(interrupts).save();
        let mut other = Machine::new(interrupts);
        other.load(&through_json(&state)).unwrap();
        assert_eq!(state.lapic.is_some(), interrupts != Interrupts::User);
        assert!(state.msrs.len() > 20, "{:?}", state.msrs);
        assert!(!state.private["kvm"].msrs.is_empty());
        assert_same(state, other.save());
    }
}

/// A flat segment of privilege level 0.
fn flat(selector: u16, base: u64, code: bool, long: bool) -> Segment {
    Segment {
        base,
        limit: u32::MAX,
        selector,
        kind: if code { 11 } else { 3 },
        dpl: 0,
        code_or_data: true,
        present: true,
        default_32: !(code && long),
        long: code && long,
        granular: true,
        available: false,
        unusable: false,
    }
}

/// The modes of a CPU, as far as its registers tell.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Real,
    Protected,
    Pae,
    Long,
}

fn set_mode(state: &mut CpuState, mode: Mode, selectors: [u16; 6], bases: [u64; 2], cr3: u64) {
    let control = &mut state.control;
    control.cr3 = cr3;
    if let Mode::Real = mode {
        for (segment, selector) in
            [&mut state.segments.ds, &mut state.segments.es].into_iter().zip(selectors)
        {
            segment.selector = selector;
            segment.base = u64::from(selector) << 4;
        }
        return;
    }
    let long = matches!(mode, Mode::Long);
    control.cr0 |= 1;
    if long || matches!(mode, Mode::Pae) {
        control.cr0 |= 1 << 31;
        control.cr4 |= 1 << 5;
    }
    if long {
        control.efer |= 0x500;
    }
    if let Mode::Pae = mode {
        control.pdptrs = Some([0x1001, 0, 0x3000_2001, 0x4019]);
    }
    let segments = &mut state.segments;
    let all = [
        &mut segments.cs,
        &mut segments.ds,
        &mut segments.es,
        &mut segments.fs,
        &mut segments.gs,
        &mut segments.ss,
    ];
    for (number, (segment, selector)) in all.into_iter().zip(selectors).enumerate() {
        let mut base = if (3..5).contains(&number) { bases[number - 3] } else { 0 };
        if !long {
            base &= 0xffff_ffff;
        }
        *segment = flat(selector & !7 | 8, base, number == 0, long);
    }
}

prop_compose! {
    fn canonical()(value: u64) -> u64 {
        ((value << 16) as i64 >> 16) as u64
    }
}

prop_compose! {
    fn registers()(r in any::<[u64; 16]>(), flags: u64, rip in canonical()) -> Registers {
        let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15] = r;
        // Bit 1 is always set. Not TF, VM, VIF and VIP: the kernel keeps the first for itself, the others belong to modes this is not in.
        let rflags = flags & RFLAGS & !0x1a_0100 | 2;
        Registers { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
    }
}

fn events() -> impl Strategy<Value = Events> {
    let exception = prop_oneof![
        Just(None),
        // #GP being delivered, #PF and #DB pending with what they will write to CR2 and DR6.
        any::<u32>().prop_map(|code| Some(Exception {
            vector: 13,
            error_code: Some(code),
            ..Exception::default()
        })),
        any::<u64>().prop_map(|cr2| Some(Exception {
            vector: 14,
            error_code: Some(2),
            pending: true,
            payload: Some(cr2)
        })),
        Just(Some(Exception { vector: 1, error_code: None, pending: true, payload: Some(0x4000) })),
    ];
    // From outside: one of a software interrupt the kernel does not tell, for the instruction has not been left and comes again.
    let interrupt = proptest::option::of(any::<u8>())
        .prop_map(|vector| vector.map(|vector| Interrupt { vector, software: false }));
    (exception, interrupt, 0..3u8, any::<[bool; 3]>()).prop_map(
        |(exception, interrupt, shadow, bits)| {
            let [nmi_injected, nmi_masked, triple_fault] = bits;
            Events {
                exception,
                interrupt,
                shadow,
                nmi_injected,
                nmi_masked,
                triple_fault,
                ..Events::default()
            }
        },
    )
}

/// Registers the guest can set to anything (or, where marked, to any canonical address).
const FREE_MSRS: [(u32, bool); 8] = [
    (0xc000_0081, false),
    (0xc000_0082, true),
    (0xc000_0083, true),
    (0xc000_0102, true),
    (0x174, false),
    (0x175, true),
    (0x176, true),
    (0x3b, false),
];

#[derive(Clone, Debug)]
struct Draw {
    registers: Registers,
    mode: Mode,
    selectors: [u16; 6],
    bases: [u64; 2],
    cr2: u64,
    page: u32,
    gdt: (u64, u16),
    debug: [u64; 4],
    debug_bits: u8,
    msrs: [u64; 8],
    mtrr: u8,
    extended: Vec<u8>,
    tpr: u8,
    lapic_bits: [u32; 21],
    lvt: [u8; 3],
    activity: Activity,
    events: Events,
}

fn draw(in_kernel: bool) -> impl Strategy<Value = Draw> {
    let mode =
        prop_oneof![Just(Mode::Real), Just(Mode::Protected), Just(Mode::Pae), Just(Mode::Long)];
    let activity = if in_kernel {
        prop_oneof![
            Just(Activity::Runnable),
            Just(Activity::Halted),
            Just(Activity::Uninitialized),
            Just(Activity::InitReceived)
        ]
        .boxed()
    } else {
        Just(Activity::Runnable).boxed()
    };
    let control =
        (mode, any::<[u16; 6]>(), [canonical(), canonical()], any::<u64>(), 0..1u32 << 20);
    let debug = ([canonical(), canonical(), canonical(), canonical()], any::<u8>());
    let msrs = (any::<[u64; 8]>(), 0..7u8, proptest::collection::vec(any::<u8>(), 576 + 256));
    let lapic = (any::<u8>(), any::<[u32; 21]>(), any::<[u8; 3]>());
    (registers(), control, (canonical(), any::<u16>()), debug, msrs, lapic, activity, events())
        .prop_map(
            |(
                registers,
                (mode, selectors, bases, cr2, page),
                gdt,
                (debug, debug_bits),
                (msrs, mtrr, extended),
                (tpr, lapic_bits, lvt),
                activity,
                events,
            )| {
                Draw {
                    registers,
                    mode,
                    selectors,
                    bases,
                    cr2,
                    page,
                    gdt,
                    debug,
                    debug_bits,
                    msrs,
                    mtrr,
                    extended,
                    tpr,
                    lapic_bits,
                    lvt,
                    activity,
                    events,
                }
            },
        )
}

fn apply(state: &mut CpuState, draw: &Draw) {
    state.registers = draw.registers;
    set_mode(state, draw.mode, draw.selectors, draw.bases, u64::from(draw.page) << 12);
    state.control.cr2 = draw.cr2;
    state.control.cr8 = (draw.tpr >> 4).into();
    state.segments.gdt = DescriptorTable { base: draw.gdt.0, limit: draw.gdt.1 };
    state.segments.idt = DescriptorTable { base: !draw.gdt.0, limit: !draw.gdt.1 };
    [state.debug.dr0, state.debug.dr1, state.debug.dr2, state.debug.dr3] = draw.debug;
    state.debug.dr6 = 0xffff_0ff0 | u64::from(draw.debug_bits & 15);
    state.debug.dr7 = 0x400 | u64::from(draw.debug_bits);
    for ((index, canonical), value) in FREE_MSRS.into_iter().zip(draw.msrs) {
        state
            .msrs
            .insert(index, if canonical { ((value << 16) as i64 >> 16) as u64 } else { value });
    }
    // Fixed-range memory types: 0, 1, 4, 5 and 6 exist.
    state
        .msrs
        .insert(0x250, [0, 1, 4, 5, 6, 6, 0u64][usize::from(draw.mtrr)] * 0x0101_0101_0101_0101);
    apply_extended(state, &draw.extended);
    if let Some(lapic) = &mut state.lapic {
        apply_lapic(lapic, draw);
    }
    state.activity = draw.activity;
    state.events = draw.events;
}

/// Puts contents into x87, SSE and AVX registers, as far as they are there.
fn apply_extended(state: &mut CpuState, draw: &[u8]) {
    let offered = state.xcrs.contains_key(&0);
    let Bytes(area) = &mut state.xsave.0;
    // x87 control and status, abridged tag, opcode.
    area[..8].copy_from_slice(&[
        0x7f,
        0x03,
        draw[1],
        draw[2] & 0x3f,
        draw[0],
        0,
        draw[3],
        draw[4] & 7,
    ]);
    // The instruction and operand pointers are not kept on every processor. MXCSR: all exceptions masked, some rounding mode, some flags.
    area[24..28].copy_from_slice(&[0x80 | draw[5] & 0x3f, 0x1f | draw[6] & 0x60, 0, 0]);
    for register in 0..8 {
        area[32 + 16 * register..][..10].copy_from_slice(&draw[40 + 10 * register..][..10]);
    }
    area[160..416].copy_from_slice(&draw[160..416]);
    if offered {
        // The AVX halves stand at 576 in every standard area (SDM volume 1, 13.5.2); present if XCR0 may have bit 2.
        let avx = area.len() >= 832 && std::arch::is_x86_feature_detected!("avx");
        if avx {
            area[576..832].copy_from_slice(&draw[576..832]);
        }
        let features = if avx { 7 } else { 3 };
        state.xcrs.insert(0, features);
        area[512] = features as u8;
    }
}

fn apply_lapic(lapic: &mut LapicState, draw: &Draw) {
    let LapicState { registers } = lapic;
    registers[0x8] = draw.tpr.into();
    // Software enabled.
    registers[0xf] = 0x1ff;
    // ISR, TMR and IRR: no vectors below 16.
    for (number, bits) in draw.lapic_bits.into_iter().enumerate() {
        registers[0x11 + number + number / 7] = bits;
    }
    // Timer (one shot), performance counter and error, all masked.
    for (register, vector) in [0x32, 0x34, 0x37].into_iter().zip(draw.lvt) {
        registers[register] = 0x1_0000 | u32::from(vector);
    }
}

/// The parts the kernel makes up itself: PPR, and the timer's current count.
fn without_derived(mut state: LapicState) -> LapicState {
    state.registers[0xa] = 0;
    state.registers[0x39] = 0;
    state
}

/// Whether there is VT-x or AMD-V here. A kernel that does without emulates some modes only, and says so.
fn hardware() -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    text.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
}

fn round_trip(interrupts: Interrupts, draw: &Draw) {
    let mut one = Machine::new(interrupts);
    let mut drawn = one.save();
    apply(&mut drawn, draw);
    match one.load(&drawn) {
        Err(Error::BadState { what: "CPU mode", .. })
            if matches!(draw.mode, Mode::Pae) && !hardware() =>
        {
            return;
        }
        result => result.unwrap(),
    }
    let saved = one.save();

    assert_eq!(saved.registers, drawn.registers);
    assert_eq!(saved.control.cr2, drawn.control.cr2);
    assert_eq!(saved.control.cr3, drawn.control.cr3);
    assert_eq!(saved.control.cr8, drawn.control.cr8);
    assert_eq!(saved.control.pdptrs, drawn.control.pdptrs);
    assert_eq!(saved.segments, drawn.segments);
    assert_eq!(saved.debug, drawn.debug);
    assert_eq!(saved.xcrs, drawn.xcrs);
    assert_eq!(saved.xsave.0.0[..832], drawn.xsave.0.0[..832]);
    for index in FREE_MSRS.map(|(index, _)| index).into_iter().chain([0x250]) {
        assert_eq!(saved.msrs.get(&index), drawn.msrs.get(&index), "MSR {index:#x}");
    }
    assert_eq!(saved.lapic.clone().map(without_derived), drawn.lapic.map(without_derived));
    assert_eq!(saved.activity, drawn.activity);
    assert_eq!(saved.events, drawn.events);

    let mut two = Machine::new(interrupts);
    two.load(&through_json(&saved)).unwrap();
    assert_same(saved, two.save());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_vcpu_survives_with_a_kernel_irqchip(draw in draw(true)) {
        round_trip(Interrupts::Kernel, &draw);
    }

    #[test]
    fn any_vcpu_survives_with_a_split_irqchip(draw in draw(true)) {
        round_trip(Interrupts::Split, &draw);
    }

    #[test]
    fn any_vcpu_survives_without_an_irqchip(draw in draw(false)) {
        round_trip(Interrupts::User, &draw);
    }

    #[test]
    fn any_machine_survives(
        (irr, imr, isr) in any::<(u8, u8, u8)>(),
        (base, priority, init_state, flags) in (0..32u8, 0..8u8, 0..4u8, any::<[bool; 6]>()),
        redirection in any::<[u64; 24]>(),
        (id, select) in (0..16u32, 0..256u32),
        channels in any::<[(u16, u8, u8, bool); 3]>(),
        clock in 0..1u64 << 60,
    ) {
        // The second PIC is masked, or the kernel works out its line into the first. The PIT's interrupt does not count (mode 5), or it would come.
        let [read_isr, poll, special_mask, auto_eoi, rotate_on_auto_eoi, init4] = flags;
        let pic = |imr, elcr_mask| PicState {
            last_irr: irr, irr, imr, isr, priority_add: priority, irq_base: base * 8, read_isr, poll, special_mask, init_state,
            auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode: init4, init4, elcr: imr & elcr_mask, elcr_mask,
        };
        let ioapic = IoApicState {
            base: 0xfec0_0000, select, id, irr: 0,
            // Masked, edge, neither being delivered nor in service: nothing the kernel acts on.
            redirection: redirection.map(|bits| bits & 0xff00_0000_0000_2fff & !0x1000 | 0x1_0000),
        };
        let mut channels = channels.map(|(count, latch, kind, bit)| PitChannel {
            count: u32::from(count) + 1, latched_count: count, count_latched: latch % 5, status_latched: bit, status: latch,
            read_state: kind % 5, write_state: latch % 5, write_latch: kind, rw_mode: kind % 4, mode: kind % 6, bcd: bit, gate: !bit,
            loaded_at_ns: 0,
        });
        channels[0].mode = 5;
        let state = VmState {
            clock_ns: Some(clock), pics: Some([pic(imr, 0xf8), pic(0xff, 0xde)]), ioapic: Some(ioapic),
            pit: Some(PitState { channels, flags: 0 }),
        };
        let one = Machine::new(Interrupts::Kernel);
        one.vm.load(&state).unwrap();
        let saved = one.vm.save().unwrap();
        let two = Machine::new(Interrupts::Kernel);
        two.vm.load(&through_json(&saved)).unwrap();
        let again = two.vm.save().unwrap();
        for (before, after) in [(&state, &saved), (&saved, &again)] {
            let ran = after.clock_ns.unwrap().checked_sub(before.clock_ns.unwrap());
            prop_assert!(ran.is_some_and(|ns| ns < 10_000_000_000), "the clock went from {before:?} to {after:?}");
            prop_assert_eq!(before.pics, after.pics);
            prop_assert_eq!(before.ioapic, after.ioapic);
            let channels = |state: &VmState| state.pit.unwrap().channels.map(|channel| PitChannel { loaded_at_ns: 0, ..channel });
            prop_assert_eq!(channels(before), channels(after));
        }
    }
}

#[test]
fn a_vm_without_kernel_devices_saves_its_clock_alone() {
    for interrupts in [Interrupts::Split, Interrupts::User] {
        let machine = Machine::new(interrupts);
        let state = machine.vm.save().unwrap();
        assert_eq!(state, VmState { clock_ns: state.clock_ns, ..VmState::default() });
        machine.vm.load(&state).unwrap();
    }
}

#[test]
fn a_deadline_survives_because_it_comes_after_the_local_apic() {
    let mut one = Machine::new(Interrupts::Kernel);
    let mut state = one.save();
    // The timer in deadline mode; an hour to go.
    state.lapic.as_mut().unwrap().registers[0xf] = 0x1ff;
    state.lapic.as_mut().unwrap().registers[0x32] = 0x4_00ec;
    let deadline = state.msrs[&TSC] + u64::from(state.tsc_khz.unwrap()) * 3_600_000;
    state.msrs.insert(TSC_DEADLINE, deadline);
    one.load(&state).unwrap();
    let saved = one.save();
    assert_eq!(saved.msrs.get(&TSC_DEADLINE), Some(&deadline));
    let mut two = Machine::new(Interrupts::Split);
    two.load(&saved).unwrap();
    assert_eq!(two.save().msrs.get(&TSC_DEADLINE), Some(&deadline));
}

#[test]
fn a_sipi_received_starts_the_vcpu_at_its_vector() {
    let mut machine = Machine::new(Interrupts::Kernel);
    let mut state = machine.save();
    state.activity = Activity::SipiReceived;
    state.events.sipi_vector = 0x9f;
    machine.load(&state).unwrap();
    let saved = machine.save();
    assert_eq!(saved.activity, Activity::Runnable);
    assert_eq!(
        (saved.segments.cs.selector, saved.segments.cs.base, saved.registers.rip),
        (0x9f00, 0x9_f000, 0)
    );
}

#[test]
fn an_area_of_another_size_is_taken_if_nothing_is_lost() {
    let mut machine = Machine::new(Interrupts::User);
    let state = machine.save();
    let Bytes(area) = &state.xsave.0;
    let with = |area: Vec<u8>| CpuState { xsave: XsaveArea(Bytes(area)), ..state.clone() };
    machine.load(&with([area.clone(), vec![0; 5000]].concat())).unwrap();
    machine.load(&with(area[..576].to_vec())).unwrap();
    assert_same(state.clone(), machine.save());
    for wrong in [[area.clone(), vec![1]].concat(), area[..575].to_vec(), Vec::new()] {
        let error = machine.load(&with(wrong)).unwrap_err().to_string();
        assert!(error.starts_with("XSAVE area can not be restored"), "{error}");
    }
}

#[test]
fn a_refused_msr_is_named() {
    let mut machine = Machine::new(Interrupts::Kernel);
    let mut state = machine.save();
    // Memory type 2 does not exist.
    state.msrs.insert(0x250, 2);
    let error = machine.load(&state).unwrap_err().to_string();
    assert!(error.contains("refused 0x2 for MSR 0x250"), "{error}");
    let mut state = machine.save();
    state.private.entry("kvm".into()).or_default().msrs.insert(0x4b56_4dff, 1);
    let error = machine.load(&state).unwrap_err().to_string();
    assert!(error.contains("MSR 0x4b564dff was 0x1"), "{error}");
    // One that was never used is nothing to lose.
    state.private.get_mut("kvm").unwrap().msrs.insert(0x4b56_4dff, 0);
    machine.load(&state).unwrap();
}

#[test]
fn the_tsc_frequency_is_matched_or_refused() {
    let mut machine = Machine::new(Interrupts::User);
    let mut state = machine.save();
    let khz = state.tsc_khz.unwrap();
    state.tsc_khz = Some(khz + khz / 5000);
    machine.load(&state).unwrap();
    state.tsc_khz = Some(0);
    assert!(machine.load(&state).is_err());
    state.tsc_khz = Some(khz / 2);
    // With a scalable counter (as in the lab) it is taken, without it is refused by name.
    match machine.load(&state) {
        Ok(()) => assert_eq!(machine.save().tsc_khz, Some(khz / 2)),
        Err(error) => {
            assert!(error.to_string().starts_with("TSC frequency can not be restored"), "{error}")
        }
    }
}
