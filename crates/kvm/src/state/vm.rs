//! What a VM is besides its vCPUs: the clock, and the interrupt controllers and timer of a PC where the kernel has them.
#![allow(unsafe_code, reason = "the kernel's interrupt controllers are members of a union")]

use keel_hypervisor::state::{IoApicState, PicState, PitChannel, PitState};
use keel_hypervisor::{Interrupts, Result, VmState};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_ioapic_state, kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use super::{Context, bad, check};
use crate::error::Tried;

const VM: fn() -> String = || "the VM".into();
const PICS: [u32; 2] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];
/// Which inputs can be level: not the timer's, the keyboard's, the cascade's, the clock's and the coprocessor's.
const ELCR_MASKS: [u8; 2] = [0xf8, 0xde];
/// Where the kernel's I/O APIC is; it does not move.
const IOAPIC_BASE: u64 = 0xfec0_0000;

pub(crate) fn save_vm(fd: &VmFd, cx: &Context) -> Result<VmState> {
    let clock_ns = Some(fd.get_clock().tried("KVM_GET_CLOCK", VM)?.clock);
    let mut state = VmState { clock_ns, ..VmState::default() };
    if cx.interrupts == Interrupts::Kernel {
        let [master, slave, ioapic] =
            [chip(fd, PICS[0])?, chip(fd, PICS[1])?, chip(fd, KVM_IRQCHIP_IOAPIC)?];
        // SAFETY: the kernel has filled in the union's member that the number names; any bit pattern is valid in each.
        state.pics = Some(unsafe { [pic_from(&master.pic), pic_from(&slave.pic)] });
        // SAFETY: as above.
        state.ioapic = Some(ioapic_from(unsafe { &ioapic.ioapic }));
        state.pit = match fd.get_pit2() {
            // None was made for this VM.
            Err(error) if error.errno() == libc::ENXIO => None,
            result => Some(pit_from(&result.tried("KVM_GET_PIT2", VM)?)),
        };
    }
    Ok(state)
}

/// Gives a VM its state.
///
/// It must come before the vCPUs' own: loading the paravirtual clock's MSRs has the kernel write the wall clock of the guest's start,
/// which it gets from the clock, and the I/O APIC hands what it has pending to the local APICs, which must not get it a second time.
pub(crate) fn load_vm(fd: &VmFd, cx: &Context, state: &VmState) -> Result<()> {
    check_vm(cx, state)?;
    if let Some(clock) = state.clock_ns {
        fd.set_clock(&kvm_clock_data { clock, ..Default::default() }).tried("KVM_SET_CLOCK", VM)?;
    }
    // The slave before the master, or an old request of the slave's would set the master's cascade input again.
    // The PICs and the timer before the I/O APIC: loading it raises at once what it has pending, and it has the last word on the inputs they share.
    for (chip_id, pic) in state.pics.iter().flat_map(|pics| PICS.into_iter().zip(pics).rev()) {
        let mut to = kvm_irqchip { chip_id, ..Default::default() };
        to.chip.pic = pic_to(pic);
        fd.set_irqchip(&to).tried("KVM_SET_IRQCHIP", || "the VM (PIC)".into())?;
    }
    if let Some(pit) = &state.pit {
        fd.set_pit2(&pit_to(pit)).tried("KVM_SET_PIT2", VM)?;
    }
    if let Some(ioapic) = &state.ioapic {
        let mut to = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        to.chip.ioapic = ioapic_to(ioapic);
        fd.set_irqchip(&to).tried("KVM_SET_IRQCHIP", || "the VM (I/O APIC)".into())?;
    }
    Ok(())
}

fn chip(fd: &VmFd, chip_id: u32) -> Result<kvm_bindings::kvm_irqchip__bindgen_ty_1> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    fd.get_irqchip(&mut chip).tried("KVM_GET_IRQCHIP", || format!("the VM (chip {chip_id})"))?;
    Ok(chip.chip)
}

/// The kernel copies these structures as they are.
fn check_vm(cx: &Context, state: &VmState) -> Result<()> {
    if let Some(clock) = state.clock_ns {
        check(i64::try_from(clock).is_ok(), "clock", || {
            format!("{clock} ns is longer than 292 years")
        })?;
    }
    let kernel = cx.interrupts == Interrupts::Kernel;
    for (what, there) in [("PICs", state.pics.is_some()), ("I/O APIC", state.ioapic.is_some())] {
        check(there == kernel, what, || {
            if kernel {
                "the state has none, this VM has it in the kernel"
            } else {
                "this VM does not have it in the kernel"
            }
            .into()
        })?;
    }
    check(kernel || state.pit.is_none(), "PIT", || {
        "this VM does not have it in the kernel".into()
    })?;
    for (pic, elcr_mask) in state.pics.iter().flatten().zip(ELCR_MASKS) {
        check_pic(pic, elcr_mask)?;
    }
    state.ioapic.iter().try_for_each(check_ioapic)?;
    state.pit.iter().flat_map(|pit| &pit.channels).try_for_each(check_pit)?;
    state.pit.iter().try_for_each(|pit| {
        check(pit.flags < 4, "PIT", || format!("unknown flags {:#x}", pit.flags))
    })
}

fn check_pic(pic: &PicState, elcr_mask: u8) -> Result<()> {
    const WHAT: &str = "PIC";
    check(pic.priority_add < 8, WHAT, || format!("there is no input {}", pic.priority_add))?;
    check(pic.irq_base.is_multiple_of(8), WHAT, || {
        format!("vector {:#x} is no multiple of 8", pic.irq_base)
    })?;
    check(pic.init_state < 4, WHAT, || {
        format!("there is no initialization word {}", pic.init_state)
    })?;
    check(pic.elcr_mask == elcr_mask && pic.elcr & !elcr_mask == 0, WHAT, || {
        format!(
            "inputs {:#x} of {:#x} can not be level, only those of {elcr_mask:#x}",
            pic.elcr, pic.elcr_mask
        )
    })
}

fn check_ioapic(ioapic: &IoApicState) -> Result<()> {
    const WHAT: &str = "I/O APIC";
    check(ioapic.base == IOAPIC_BASE, WHAT, || {
        format!("it is at {IOAPIC_BASE:#x}, not {:#x}", ioapic.base)
    })?;
    check(ioapic.select < 256, WHAT, || format!("there is no register {:#x}", ioapic.select))?;
    check(ioapic.id < 16, WHAT, || format!("ID {:#x} does not fit 4 bits", ioapic.id))?;
    check(ioapic.irr < 1 << 24, WHAT, || format!("requests {:#x} of more than 24 pins", ioapic.irr))
}

fn check_pit(channel: &PitChannel) -> Result<()> {
    let fields = [
        ("count", channel.count, 65536),
        // 255: not set yet.
        ("mode", if channel.mode == 255 { 0 } else { channel.mode.into() }, 7),
        ("access mode", channel.rw_mode.into(), 3),
        ("read state", channel.read_state.into(), 4),
        ("write state", channel.write_state.into(), 4),
        ("latch state", channel.count_latched.into(), 4),
    ];
    match fields.into_iter().find(|(_, value, most)| value > most) {
        Some((field, value, most)) => {
            Err(bad("PIT", format!("{field} {value} of a channel is more than {most}")))
        }
        None => Ok(()),
    }
}

fn pic_from(from: &kvm_pic_state) -> PicState {
    PicState {
        last_irr: from.last_irr,
        irr: from.irr,
        imr: from.imr,
        isr: from.isr,
        priority_add: from.priority_add,
        irq_base: from.irq_base,
        read_isr: from.read_reg_select != 0,
        poll: from.poll != 0,
        special_mask: from.special_mask != 0,
        init_state: from.init_state,
        auto_eoi: from.auto_eoi != 0,
        rotate_on_auto_eoi: from.rotate_on_auto_eoi != 0,
        special_fully_nested_mode: from.special_fully_nested_mode != 0,
        init4: from.init4 != 0,
        elcr: from.elcr,
        elcr_mask: from.elcr_mask,
    }
}

fn pic_to(from: &PicState) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: from.last_irr,
        irr: from.irr,
        imr: from.imr,
        isr: from.isr,
        priority_add: from.priority_add,
        irq_base: from.irq_base,
        read_reg_select: from.read_isr.into(),
        poll: from.poll.into(),
        special_mask: from.special_mask.into(),
        init_state: from.init_state,
        auto_eoi: from.auto_eoi.into(),
        rotate_on_auto_eoi: from.rotate_on_auto_eoi.into(),
        special_fully_nested_mode: from.special_fully_nested_mode.into(),
        init4: from.init4.into(),
        elcr: from.elcr,
        elcr_mask: from.elcr_mask,
    }
}

fn ioapic_from(from: &kvm_ioapic_state) -> IoApicState {
    IoApicState {
        base: from.base_address,
        select: from.ioregsel,
        id: from.id,
        irr: from.irr,
        // SAFETY: both members of the union are the same 64 bits.
        redirection: from.redirtbl.map(|entry| unsafe { entry.bits }),
    }
}

fn ioapic_to(from: &IoApicState) -> kvm_ioapic_state {
    let mut to = kvm_ioapic_state {
        base_address: from.base,
        ioregsel: from.select,
        id: from.id,
        irr: from.irr,
        ..Default::default()
    };
    to.redirtbl.iter_mut().zip(from.redirection).for_each(|(to, bits)| to.bits = bits);
    to
}

fn pit_from(from: &kvm_pit_state2) -> PitState {
    let channels = from.channels.map(|from| PitChannel {
        count: from.count,
        latched_count: from.latched_count,
        count_latched: from.count_latched,
        status_latched: from.status_latched != 0,
        status: from.status,
        read_state: from.read_state,
        write_state: from.write_state,
        write_latch: from.write_latch,
        rw_mode: from.rw_mode,
        mode: from.mode,
        bcd: from.bcd != 0,
        gate: from.gate != 0,
        loaded_at_ns: from.count_load_time,
    });
    PitState { channels, flags: from.flags }
}

fn pit_to(from: &PitState) -> kvm_pit_state2 {
    let channels = from.channels.map(|from| kvm_pit_channel_state {
        count: from.count,
        latched_count: from.latched_count,
        count_latched: from.count_latched,
        status_latched: from.status_latched.into(),
        status: from.status,
        read_state: from.read_state,
        write_state: from.write_state,
        write_latch: from.write_latch,
        rw_mode: from.rw_mode,
        mode: from.mode,
        bcd: from.bcd.into(),
        gate: from.gate.into(),
        count_load_time: from.loaded_at_ns,
    });
    kvm_pit_state2 { channels, flags: from.flags, ..Default::default() }
}
