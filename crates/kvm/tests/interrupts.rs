//! Interrupts of every kind reach a guest, with the controllers in the kernel, half in it, and outside.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{Access, CODE, Guest, STOP, USER};
use keel_hypervisor::{Exit, Interrupts, Msi, Route, Target, Vm, Width};
use keel_kvm::VmConfig;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A handler writes its vector to this port.
const SEEN: u8 = 0x99;
const VECTORS: std::ops::Range<u8> = 0x20..0x60;

/// How a handler ends its interrupt.
#[derive(Clone, Copy)]
enum End {
    Nothing,
    Pic,
    Apic,
}

/// A guest with a handler for each vector that tells its vector and stops, and a main program that waits in `HLT` for more.
fn guest(interrupts: Interrupts, end: End) -> Guest {
    // sti; hlt; jmp to hlt
    let mut guest = Guest::with(&[0xfb, 0xf4, 0xeb, 0xfd], VmConfig { interrupts, ..USER }, false);
    for vector in VECTORS.chain([2]) {
        let handler = 0x9000 + 0x20 * u16::from(vector);
        guest.write(4 * u64::from(vector), &handler.to_le_bytes());
        let mut code = vec![0xb0, vector, 0xe6, SEEN]; // mov al, vector; out SEEN, al
        match end {
            End::Nothing => {}
            End::Pic => code.extend([0xb0, 0x20, 0xe6, 0x20]), // mov al, 0x20; out 0x20, al
            End::Apic => code.extend([
                0x66, 0xb9, 0x0b, 0x08, 0x00,
                0x00, // mov ecx, 0x80b: the x2APIC's EOI register
                0x66, 0x31, 0xc0, // xor eax, eax
                0x66, 0x31, 0xd2, // xor edx, edx
                0x0f, 0x30, // wrmsr
            ]),
        }
        code.extend([0xe6, STOP as u8, 0xcf]); // out STOP, al; iret
        guest.write(handler.into(), &code);
    }
    if interrupts != Interrupts::User {
        guest.change(|state| {
            state.control.apic_base |= 0xc00; // x2APIC mode
            if let Some(lapic) = &mut state.lapic {
                lapic.registers[15] = 0x1ff; // enabled by software
            }
        });
    }
    guest
}

/// The vectors that the guest has seen.
fn seen(guest: &mut Guest) -> Vec<u32> {
    guest.run_to_stop();
    let log = std::mem::take(&mut guest.bus.log);
    log.iter()
        .filter_map(|access| match access {
            Access::Out(port, Width::Byte, value) if *port == u16::from(SEEN) => Some(*value),
            _ => None,
        })
        .collect()
}

fn message(vector: u8) -> Msi {
    Msi { address: 0xfee0_0000, data: vector.into() }
}

/// A guest whose master PIC begins at vector 0x20, as after its initialization.
fn with_pic() -> Guest {
    let guest = guest(Interrupts::Kernel, End::Pic);
    let mut state = guest.vm.save().unwrap();
    let pics = state.pics.as_mut().unwrap();
    (pics[0].irq_base, pics[0].imr) = (0x20, 0);
    guest.vm.load(&state).unwrap();
    guest
}

#[test]
fn lines_and_irqfds_reach_the_kernels_pic() {
    let mut guest = with_pic();
    guest.vm.set_routes(&Route::pc()).unwrap();
    guest.vm.set_line(5, true).unwrap();
    guest.vm.set_line(5, false).unwrap();
    assert_eq!(seen(&mut guest), [0x25]);

    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.vm.attach_irqfd(&event, 4, None).unwrap();
    for _ in 0..3 {
        event.write(1).unwrap();
        assert_eq!(seen(&mut guest), [0x24]);
    }
    guest.vm.detach_irqfd(&event, 4).unwrap();
    event.write(1).unwrap();
    guest.vm.set_line(3, true).unwrap();
    guest.vm.set_line(3, false).unwrap();
    assert_eq!(seen(&mut guest), [0x23], "a detached one is not heard");
}

#[test]
fn a_resampled_irqfd_is_a_level() {
    let mut guest = guest(Interrupts::Kernel, End::Apic);
    guest.vm.set_routes(&Route::pc()).unwrap();
    let mut state = guest.vm.save().unwrap();
    state.pics.as_mut().unwrap().iter_mut().for_each(|pic| pic.imr = 0xff); // or it would come twice
    state.ioapic.as_mut().unwrap().redirection[10] = 0x8040; // level, vector 0x40, to APIC 0
    guest.vm.load(&state).unwrap();
    let [event, resample] = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
    guest.vm.attach_irqfd(&event, 10, Some(&resample)).unwrap();
    for _ in 0..3 {
        resample.read().unwrap_err();
        event.write(1).unwrap();
        assert_eq!(seen(&mut guest), [0x40]);
        assert_eq!(resample.read().unwrap(), 1, "the guest has ended it");
    }
    guest.vm.detach_irqfd(&event, 10).unwrap();
}

#[test]
fn messages_and_routes_to_messages_are_delivered() {
    for interrupts in [Interrupts::Kernel, Interrupts::Split] {
        let mut guest = guest(interrupts, End::Apic);
        guest.vm.signal_msi(message(0x41)).unwrap();
        assert_eq!(seen(&mut guest), [0x41]);

        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let to = |vector| Route { gsi: 30, target: Target::Msi(message(vector)) };
        guest.vm.set_routes(&[to(0x42)]).unwrap();
        guest.vm.attach_irqfd(&event, 30, None).unwrap();
        event.write(1).unwrap();
        assert_eq!(seen(&mut guest), [0x42]);
        guest.vm.set_line(30, true).unwrap();
        assert_eq!(seen(&mut guest), [0x42], "a line goes there too");

        guest.vm.set_routes(&[to(0x43)]).unwrap();
        event.write(1).unwrap();
        assert_eq!(seen(&mut guest), [0x43], "an attached irqfd follows the routes");
        guest.vm.set_routes(&[]).unwrap();
        event.write(1).unwrap();
        guest.vm.signal_msi(message(0x44)).unwrap();
        assert_eq!(seen(&mut guest), [0x44], "and leads nowhere without one");
    }
}

#[test]
fn the_end_of_a_level_interrupt_reaches_the_bus_of_a_split_machine() {
    let mut guest = guest(Interrupts::Split, End::Apic);
    let level = |vector| Msi { data: 0xc000 | u32::from(vector), ..message(vector) };
    guest.vm.set_routes(&[Route { gsi: 4, target: Target::Msi(level(0x45)) }]).unwrap();
    guest.vm.signal_msi(level(0x45)).unwrap();
    guest.run_to_stop();
    assert_eq!(guest.bus.log, [Access::Out(SEEN.into(), Width::Byte, 0x45), Access::End(0x45)]);
    guest.bus.log.clear();
    guest.vm.signal_msi(message(0x46)).unwrap();
    guest.run_to_stop();
    assert_eq!(
        guest.bus.log,
        [Access::Out(SEEN.into(), Width::Byte, 0x46)],
        "an edge has no end to tell"
    );
}

#[test]
fn interrupts_are_injected_when_the_guest_takes_them() {
    let mut guest = guest(Interrupts::User, End::Nothing);
    guest.write(
        CODE,
        &[
            0xfa, // cli
            0xe6, STOP as u8, // out STOP, al
            0xe6, 0x11, // out 0x11, al
            0xfb, // sti
            0x90, // nop
            0xeb, 0xfd, // jmp to nop
        ],
    );
    guest.run_to_stop();
    assert!(!guest.vcpu.inject(0x50).unwrap(), "interrupts are off");
    assert_eq!(guest.run(), Exit::InterruptWindow);
    assert_eq!(guest.bus.log, [Access::Out(0x11, Width::Byte, 0)]);
    assert!(guest.vcpu.inject(0x50).unwrap());
    guest.bus.log.clear();
    assert_eq!(seen(&mut guest), [0x50]);
    // The handler stopped with interrupts off; after its IRET they are on.
    assert!(!guest.vcpu.inject(0x51).unwrap());
    assert_eq!(guest.run(), Exit::InterruptWindow);
    assert!(guest.vcpu.inject(0x51).unwrap());
    assert_eq!(seen(&mut guest), [0x51]);
}

#[test]
fn an_interrupt_wakes_a_halted_vcpu_without_a_local_apic() {
    let mut guest = guest(Interrupts::User, End::Nothing);
    for vector in [0x20, 0x21, 0x5f] {
        assert_eq!(guest.run(), Exit::Halted);
        assert!(guest.vcpu.inject(vector).unwrap());
        assert_eq!(seen(&mut guest), [u32::from(vector)]);
    }
}

#[test]
fn nmis_come_with_interrupts_off() {
    for interrupts in [Interrupts::Kernel, Interrupts::User] {
        let mut guest = guest(interrupts, End::Nothing);
        guest.write(CODE, &[0xfa, 0xe6, STOP as u8, 0x90, 0xeb, 0xfd]); // cli; out STOP, al; nop; jmp to nop
        guest.run_to_stop();
        guest.vcpu.inject_nmi().unwrap();
        assert_eq!(seen(&mut guest), [2]);
    }
}
