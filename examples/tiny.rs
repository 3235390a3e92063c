//! A whole VMM, for a guest of five instructions that says hello on its serial port.
#![forbid(unsafe_code)]

use std::{error::Error, io, sync::Arc};

use keel_device_model::{Board, HostClock, Line, Seat, Surroundings, testing::Requests};
use keel_devices::serial::{COM1, PORTS, Serial, WIDEST};
use keel_hypervisor::{Exit, Interrupts, MemorySlot, Vm};
use keel_kvm::{Kvm, VmConfig};
use keel_memory::{GuestRam, RamConfig};
use vm_memory::{Bytes, GuestAddress};

fn main() -> Result<(), Box<dyn Error>> {
    let config = VmConfig { interrupts: Interrupts::User, ..VmConfig::default() };
    let vm = Kvm::open()?.create_vm(config)?;
    let ram = GuestRam::new(&RamConfig::new(1 << 20))?;
    vm.map(MemorySlot {
        index: 0,
        region: ram.regions()[0].clone(),
        read_only: false,
        log_dirty: false,
    })?;
    // mov dx, 0x3f8; mov si, 0x100c; mov cx, 6; rep outsb; hlt
    let code = b"\xba\xf8\x03\xbe\x0c\x10\xb9\x06\x00\xf3\x6e\xf4Hello\n";
    ram.memory().write_slice(code, GuestAddress(0x1000))?;

    let surroundings = Surroundings {
        clock: Arc::new(HostClock::stopped_at(0)),
        machine: Arc::new(Requests::default()),
    };
    let serial = Seat::new(Serial::new(Box::new(io::stdout())), Line::unconnected(), &surroundings);
    let board = Board::new();
    board.map_pio("serial", COM1.port..=COM1.port + (PORTS - 1), WIDEST, serial)?;

    let (mut vcpu, mut bus) = (vm.create_vcpu(0)?, board.bus());
    let mut settled = vcpu.settle(&mut bus)?;
    let mut state = settled.save()?;
    (state.segments.cs.selector, state.segments.cs.base) = (0, 0);
    state.registers.rip = 0x1000;
    settled.load(&state)?;
    assert_eq!(vcpu.run(&mut bus)?, Exit::Halted);
    Ok(())
}
