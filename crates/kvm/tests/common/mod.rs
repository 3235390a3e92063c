//! Guests of a few instructions in real mode, and a bus that writes down what they do.
#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use keel_hypervisor::state::Segment;
use keel_hypervisor::{Bus, CpuState, Exit, Interrupts, Kick, MemorySlot, Vcpu, Vm, Width};
use keel_kvm::{Kvm, KvmVm, VmConfig};
use keel_memory::{GuestRam, Memory, RamConfig};
use vm_memory::{Bytes, GuestAddress};

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    In(u16, Width),
    Out(u16, Width, u32),
    Load(u64, Width),
    Store(u64, Width, u64),
    End(u8),
}

/// A write to this port ends the run of the recorder's vCPU: the way out of a guest whose `HLT` stays in the kernel.
pub const STOP: u16 = 0xf8;

/// Writes down every access. Ports and addresses answer with what was set, or else with all ones.
#[derive(Default)]
pub struct Recorder {
    pub log: Vec<Access>,
    pub ports: HashMap<u16, Vec<u32>>,
    pub memory: HashMap<u64, u64>,
    /// The vCPU that [`STOP`] stops.
    pub kick: Option<Arc<dyn Kick>>,
    /// It has been written.
    pub stopped: bool,
}

impl Bus for Recorder {
    fn pio_read(&mut self, port: u16, width: Width) -> u32 {
        self.log.push(Access::In(port, width));
        match self.ports.get_mut(&port) {
            Some(values) if !values.is_empty() => values.remove(0),
            _ => width.mask() as u32,
        }
    }
    fn pio_write(&mut self, port: u16, width: Width, value: u32) {
        if port == STOP {
            self.stopped = true;
            self.kick.iter().for_each(|kick| kick.kick());
        } else {
            self.log.push(Access::Out(port, width, value));
        }
    }
    fn mmio_read(&mut self, gpa: u64, width: Width) -> u64 {
        self.log.push(Access::Load(gpa, width));
        self.memory.get(&gpa).copied().unwrap_or(width.mask())
    }
    fn mmio_write(&mut self, gpa: u64, width: Width, value: u64) {
        self.log.push(Access::Store(gpa, width, value));
    }
    fn end_of_interrupt(&mut self, vector: u8) {
        self.log.push(Access::End(vector));
    }
}

/// Kicks a vCPU that is still there after a while, again and again, and ends the test if that does not help: no guest can
/// hang a test.
pub struct Watchdog {
    _alive: Sender<()>,
    bitten: Arc<AtomicBool>,
}

impl Watchdog {
    pub fn new(kick: Arc<dyn Kick>, patience: Duration) -> Self {
        let (alive, gone) = mpsc::channel::<()>();
        let bitten = Arc::new(AtomicBool::new(false));
        let flag = bitten.clone();
        thread::spawn(move || {
            let mut wait = patience;
            let mut kicks = 0;
            while gone.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                kicks += 1;
                if kicks > 50 {
                    eprintln!("the guest did not stop by itself, nor for {kicks} kicks");
                    std::process::abort();
                }
                flag.store(true, Ordering::SeqCst);
                kick.kick();
                wait = Duration::from_millis(100);
            }
        });
        Watchdog { _alive: alive, bitten }
    }

    /// Fails if the time has run out.
    pub fn check(&self) {
        assert!(!self.bitten.load(Ordering::SeqCst), "the guest did not stop by itself");
    }
}

/// A guest with RAM up to 0xc0000, whose code is at 0x1000.
pub struct Guest {
    pub vm: Arc<KvmVm>,
    pub ram: GuestRam,
    pub vcpu: Box<dyn Vcpu>,
    pub bus: Recorder,
    pub watchdog: Watchdog,
}

pub const CODE: u64 = 0x1000;
/// RAM ends here; what lies above reaches the bus.
pub const RAM: u64 = 0xc0000;
/// How long a guest of these tests can take, on a busy machine that emulates each of its instructions.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Interrupt controllers in user space: `HLT` comes out.
pub const USER: VmConfig =
    VmConfig { interrupts: Interrupts::User, dirty_tracking: keel_kvm::DirtyTracking::Log };

impl Guest {
    /// Interrupt controllers in user space: `HLT` comes out.
    pub fn new(code: &[u8]) -> Self {
        Self::with(code, USER, false)
    }

    pub fn with(code: &[u8], config: VmConfig, log_dirty: bool) -> Self {
        let ram = GuestRam::new(&RamConfig::new(RAM)).unwrap();
        ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
        let mut guest = Self::around(ram, config, log_dirty);
        real_mode(&mut *guest.vcpu, &mut guest.bus);
        guest
    }

    /// A VM with this RAM and a vCPU fresh from reset.
    pub fn around(ram: GuestRam, config: VmConfig, log_dirty: bool) -> Self {
        let kvm = Kvm::open().unwrap();
        let vm = Arc::new(kvm.create_vm(config).unwrap());
        for (index, region) in (0..).zip(ram.regions()) {
            vm.map(MemorySlot { index, region: region.clone(), read_only: false, log_dirty })
                .unwrap();
        }
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
        let bus = Recorder { kick: Some(vcpu.kicker()), ..Recorder::default() };
        let watchdog = Watchdog::new(vcpu.kicker(), PATIENCE);
        Guest { vm, ram, vcpu, bus, watchdog }
    }

    /// Runs to the next exit.
    pub fn run(&mut self) -> Exit {
        let exit = self.vcpu.run(&mut self.bus).unwrap();
        self.watchdog.check();
        exit
    }

    /// Runs until the guest writes [`STOP`].
    pub fn run_to_stop(&mut self) {
        self.bus.stopped = false;
        while !self.bus.stopped {
            let exit = self.run();
            assert_eq!(exit, Exit::Kicked, "{:?}", self.bus.log);
        }
    }

    /// Goes on at another instruction.
    pub fn jump(&mut self, rip: u64) {
        self.change(|state| state.registers.rip = rip);
    }

    /// Changes the vCPU's state.
    pub fn change(&mut self, change: impl FnOnce(&mut CpuState)) {
        let mut settled = self.vcpu.settle(&mut self.bus).unwrap();
        let mut state = settled.save().unwrap();
        change(&mut state);
        settled.load(&state).unwrap();
    }

    pub fn state(&mut self) -> CpuState {
        self.vcpu.settle(&mut self.bus).unwrap().save().unwrap()
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn word(&self, at: u64) -> u16 {
        self.ram.memory().read_obj(GuestAddress(at)).unwrap()
    }
}

/// Puts a vCPU at the code, with a stack at 0x8000 and all segments at 0.
pub fn real_mode(vcpu: &mut dyn Vcpu, bus: &mut Recorder) {
    let mut settled = vcpu.settle(bus).unwrap();
    let mut state = settled.save().unwrap();
    state.segments.cs.base = 0;
    state.segments.cs.selector = 0;
    state.registers.rip = CODE;
    state.registers.rsp = 0x8000;
    state.registers.rflags = 2;
    settled.load(&state).unwrap();
}

/// A flat 32-bit segment, or with `long` one of 64-bit mode.
pub fn flat(code: bool, long: bool) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector: if code { 0x10 } else { 0x18 },
        kind: if code { 11 } else { 3 },
        dpl: 0,
        code_or_data: true,
        present: true,
        default_32: !(long && code),
        long: long && code,
        granular: true,
        available: false,
        unusable: false,
    }
}

/// Sets all segments flat.
pub fn set_flat(state: &mut CpuState, long: bool) {
    state.segments.cs = flat(true, long);
    let data = flat(false, long);
    for segment in [
        &mut state.segments.ds,
        &mut state.segments.es,
        &mut state.segments.fs,
        &mut state.segments.gs,
        &mut state.segments.ss,
    ] {
        *segment = data;
    }
    state.segments.tr =
        Segment { limit: 0x67, selector: 0x20, kind: 11, present: true, ..Segment::default() };
    state.segments.ldt = Segment { unusable: true, ..Segment::default() };
    state.control.cr0 = 0x11;
}

/// Maps the first GiB to itself in pages of 2 MiB, with tables in three pages from here on.
pub fn write_page_tables(memory: &Memory, at: u64) {
    let entry = |table: u64, index: u64, value: u64| {
        memory.write_obj(value, GuestAddress(at + table * 0x1000 + 8 * index)).unwrap();
    };
    entry(0, 0, (at + 0x1000) | 3);
    entry(1, 0, (at + 0x2000) | 3);
    (0..512).for_each(|page| entry(2, page, page << 21 | 0x83));
}

/// 64-bit mode with these page tables.
pub fn long_mode(state: &mut CpuState, tables: u64) {
    set_flat(state, true);
    state.control.cr3 = tables;
    state.control.cr4 = 0x20;
    state.control.efer = 0x500;
    state.control.cr0 |= 1 << 31;
}
