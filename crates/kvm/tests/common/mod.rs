//! Guests of a few instructions in real mode, and a bus that writes down what they do.
#![allow(dead_code, reason = "each test uses a part")]

use std::collections::HashMap;

use keel_hypervisor::{Bus, Interrupts, MemorySlot, Vcpu, Vm, Width};
use keel_kvm::{Kvm, KvmVm, VmConfig};
use keel_memory::{GuestRam, RamConfig};
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

/// Writes down every access. Ports and addresses answer with what was set, or else with all ones.
#[derive(Default)]
pub struct Recorder {
    pub log: Vec<Access>,
    pub ports: HashMap<u16, Vec<u32>>,
    pub memory: HashMap<u64, u64>,
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
        self.log.push(Access::Out(port, width, value));
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

/// A guest with 1 MiB of RAM up to 0xc0000, whose code is at 0x1000.
pub struct Guest {
    pub vm: KvmVm,
    pub ram: GuestRam,
    pub vcpu: Box<dyn Vcpu>,
    pub bus: Recorder,
}

pub const CODE: u64 = 0x1000;
/// RAM ends here; what lies above reaches the bus.
pub const RAM: u64 = 0xc0000;

impl Guest {
    /// Interrupt controllers in user space: `HLT` comes out.
    pub fn new(code: &[u8]) -> Self {
        Self::with(code, VmConfig { interrupts: Interrupts::User, ..VmConfig::default() }, false)
    }

    pub fn with(code: &[u8], config: VmConfig, log_dirty: bool) -> Self {
        let vm = Kvm::open().unwrap().create_vm(config).unwrap();
        let ram = GuestRam::new(&RamConfig::new(RAM)).unwrap();
        for (index, region) in (0..).zip(ram.regions()) {
            vm.map(MemorySlot { index, region: region.clone(), read_only: false, log_dirty }).unwrap();
        }
        ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut guest = Guest { vm, ram, vcpu, bus: Recorder::default() };
        real_mode(&mut *guest.vcpu, &mut guest.bus);
        guest
    }

    /// Runs to the next exit.
    pub fn run(&mut self) -> keel_hypervisor::Exit {
        self.vcpu.run(&mut self.bus).unwrap()
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

