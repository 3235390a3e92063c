//! Memory slots: read-only, replaced, taken away.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::sync::Arc;

use common::{Access, CODE, Guest};
use keel_hypervisor::{Exit, MemorySlot, Vm, Width};
use keel_memory::Region;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

const AT: u64 = 0xd0000;

fn region(value: u8) -> Arc<Region> {
    let region = Region::from_range(GuestAddress(AT), 0x1000, None).unwrap();
    region.write_slice(&[value; 0x1000], MemoryRegionAddress(0)).unwrap();
    Arc::new(region)
}

fn slot(region: &Arc<Region>, read_only: bool) -> MemorySlot {
    MemorySlot { index: 1, region: region.clone(), read_only, log_dirty: false }
}

fn byte(region: &Region, at: u64) -> u8 {
    region.read_obj(MemoryRegionAddress(at)).unwrap()
}

/// Reads a byte of the slot to BL and writes the next one.
fn guest() -> Guest {
    Guest::new(&[
        0xb8, 0x00, 0xd0, // mov ax, 0xd000
        0x8e, 0xd8, // mov ds, ax
        0xb0, 0x77, // mov al, 0x77
        0x8a, 0x1e, 0x00, 0x00, // mov bl, [0]
        0xa2, 0x01, 0x00, // mov [1], al
        0xf4, // hlt
    ])
}

fn go(guest: &mut Guest) -> (u8, Vec<Access>) {
    guest.jump(CODE);
    assert_eq!(guest.run(), Exit::Halted);
    (guest.state().registers.rbx as u8, std::mem::take(&mut guest.bus.log))
}

#[test]
fn read_only_slots_are_read_in_place_and_written_through_the_bus() {
    let mut guest = guest();
    let rom = region(0x11);
    guest.vm.map(slot(&rom, true)).unwrap();
    assert_eq!(go(&mut guest), (0x11, vec![Access::Store(AT + 1, Width::Byte, 0x77)]));
    assert_eq!(byte(&rom, 1), 0x11);
}

#[test]
fn slots_are_replaced_and_unmapped() {
    let mut guest = guest();
    let nothing =
        (0xff, vec![Access::Load(AT, Width::Byte), Access::Store(AT + 1, Width::Byte, 0x77)]);
    assert_eq!(go(&mut guest), nothing);

    let (first, second) = (region(0x11), region(0x22));
    guest.vm.map(slot(&first, false)).unwrap();
    assert_eq!(go(&mut guest), (0x11, vec![]));
    guest.vm.map(slot(&second, false)).unwrap();
    assert_eq!(go(&mut guest), (0x22, vec![]));
    assert_eq!((byte(&first, 1), byte(&second, 1)), (0x77, 0x77));
    assert_eq!(Arc::strong_count(&first), 1, "the VM has let go of what it does not use any more");
    assert_eq!(Arc::strong_count(&second), 2);

    guest.vm.unmap(1).unwrap();
    assert_eq!(Arc::strong_count(&second), 1);
    assert_eq!(go(&mut guest), nothing);
    assert_eq!(guest.vm.unmap(1).unwrap_err().to_string(), "there is no memory slot 1");
}

#[test]
fn a_slot_that_can_not_be_mapped_leaves_what_was_there() {
    let mut guest = guest();
    let good = region(0x11);
    guest.vm.map(slot(&good, false)).unwrap();
    // Over slot 0.
    let bad = Arc::new(Region::from_range(GuestAddress(0x8000), 0x1000, None).unwrap());
    let error = guest.vm.map(slot(&bad, false)).unwrap_err();
    assert!(error.to_string().contains("memory slot 1 (4 KiB at 0x8000)"), "{error}");
    assert_eq!(Arc::strong_count(&bad), 1);
    assert_eq!(go(&mut guest), (0x11, vec![]));
}

#[test]
fn a_vcpu_keeps_the_guests_memory_alive() {
    let Guest { vm, ram, mut vcpu, mut bus, watchdog, .. } = guest();
    drop((vm, ram));
    assert_eq!(vcpu.run(&mut bus).unwrap(), Exit::Halted);
    watchdog.check();
}
