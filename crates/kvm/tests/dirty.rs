//! The contract of dirty tracking, held by each way KVM has of it.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::{CODE, Guest};
use keel_hypervisor::{Error, Exit, Interrupts, MemorySlot, Vm};
use keel_kvm::{DirtyTracking, VmConfig};
use keel_memory::{DirtyTracker, PageSet, Region};
use vm_memory::GuestAddress;

/// Where the guest finds the segments to write to.
const LIST: u64 = 0x3000;

/// A guest that increments the first byte of each page on a list.
fn guest(dirty_tracking: DirtyTracking, log_dirty: bool) -> Guest {
    let code = [
        0xbe, 0x00, 0x30, // mov si, 0x3000
        0xad, // lodsw
        0x85, 0xc0, // test ax, ax
        0x74, 0x09, // jz to the end
        0x8e, 0xc0, // mov es, ax
        0x26, 0xfe, 0x06, 0x00, 0x00, // inc byte es:[0]
        0xeb, 0xf2, // jmp to lodsw
        0xf4, // hlt
    ];
    Guest::with(&code, VmConfig { interrupts: Interrupts::User, dirty_tracking }, log_dirty)
}

/// Lets the guest write these pages. Returns what came with full rings on the way.
fn write_pages(guest: &mut Guest, pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut list: Vec<u8> =
        pages.into_iter().flat_map(|gfn| (gfn as u16 * 0x100).to_le_bytes()).collect();
    list.extend([0, 0]);
    assert!(list.len() < 0x4000);
    guest.write(LIST, &list);
    guest.jump(CODE);
    let mut early = PageSet::new();
    loop {
        match guest.run() {
            Exit::Halted => return early,
            Exit::DirtyRingFull => guest.vm.collect_dirty(0, &mut early).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

fn collect(guest: &Guest) -> BTreeSet<u64> {
    let mut pages = PageSet::new();
    guest.vm.collect_dirty(0, &mut pages).unwrap();
    pages.iter().collect()
}

fn contract(tracking: DirtyTracking) {
    let mut guest = guest(tracking, true);
    collect(&guest);

    // Exactly what was written, in the first and last word of the bitmap and between, and only once.
    let pages = [0x10, 0x3f, 0x40, 0x7f, 0x80, 0xbf];
    assert!(write_pages(&mut guest, pages).is_empty());
    assert_eq!(collect(&guest), pages.into());
    assert_eq!(collect(&guest), [].into(), "collecting starts over");

    // Written again is seen again, and repetition is none.
    write_pages(&mut guest, [0x40, 0x40, 0x11, 0x40]);
    assert_eq!(collect(&guest), [0x11, 0x40].into());

    // Every page between the list and the end, one by one and all at once.
    let all: BTreeSet<u64> = (0x10..0xc0).collect();
    for gfn in all.iter().step_by(7) {
        write_pages(&mut guest, [*gfn]);
        assert_eq!(collect(&guest), [*gfn].into());
    }
    write_pages(&mut guest, all.clone());
    assert_eq!(collect(&guest), all);

    // Off and on again.
    guest.vm.set_dirty_log(0, false).unwrap();
    write_pages(&mut guest, [0x20, 0x21]);
    guest.vm.set_dirty_log(0, true).unwrap();
    assert_eq!(collect(&guest), [].into(), "what was written while it was off is not reported");
    write_pages(&mut guest, [0x21, 0x22]);
    assert_eq!(collect(&guest), [0x21, 0x22].into());

    // What a reset must not lose: more writes than a ring of 1024 has room for.
    let mut seen = write_pages(&mut guest, std::iter::repeat_n(0x10..0xc0, 8).flatten());
    guest.vm.collect_dirty(0, &mut seen).unwrap();
    // A ring that has run over reports everything, so as to lose nothing.
    let seen = seen.iter().collect::<BTreeSet<_>>();
    assert!(seen.is_superset(&all));
    assert!(seen == all || matches!(tracking, DirtyTracking::Ring { .. }));

    // Together with our own writes.
    let mut own = guest.ram.own_writes();
    let mut tracker = DirtyTracker::<Error>::new();
    tracker.add(move |into: &mut PageSet| {
        own.collect(into);
        Ok(())
    });
    let vm = guest.vm.clone();
    tracker.add(move |into: &mut PageSet| vm.collect_dirty(0, into));
    tracker.take().unwrap();
    guest.write(0x50ff8, &[1; 16]);
    write_pages(&mut guest, [0x51, 0x60]);
    let list = LIST >> 12;
    assert_eq!(tracker.take().unwrap().iter().collect::<Vec<_>>(), [list, 0x50, 0x51, 0x60]);
    assert!(tracker.take().unwrap().is_empty());
}

#[test]
fn a_log_keeps_the_contract() {
    contract(DirtyTracking::Log);
}

#[test]
fn a_log_cleared_by_hand_keeps_the_contract() {
    contract(DirtyTracking::ManualLog);
}

#[test]
fn a_ring_keeps_the_contract() {
    contract(DirtyTracking::Ring { entries: 1024 });
}

#[test]
fn a_log_cleared_by_hand_can_be_looked_at_and_cleared_in_part() {
    let mut guest = guest(DirtyTracking::ManualLog, true);
    collect(&guest);
    write_pages(&mut guest, [0x10, 0x45, 0x46, 0x90]);
    let expected = vec![1 << 0x10, 1 << 5 | 1 << 6, 1 << 0x10];
    assert_eq!(guest.vm.peek_dirty(0).unwrap(), expected);
    assert_eq!(guest.vm.peek_dirty(0).unwrap(), expected, "looking clears nothing");
    guest.vm.clear_dirty(0, 64, 64, &[1 << 5]).unwrap();
    assert_eq!(guest.vm.peek_dirty(0).unwrap(), [1 << 0x10, 1 << 6, 1 << 0x10]);
    write_pages(&mut guest, [0x45]);
    assert_eq!(guest.vm.peek_dirty(0).unwrap(), expected, "a page that was cleared is seen again");
    assert_eq!(collect(&guest), [0x10, 0x45, 0x46, 0x90].into());
    assert_eq!(guest.vm.peek_dirty(0).unwrap(), [0, 0, 0]);

    guest.vm.clear_dirty(0, 1, 64, &[0]).unwrap_err();
    guest.vm.clear_dirty(0, 0, 64, &[]).unwrap_err();
    guest.vm.peek_dirty(7).unwrap_err();
}

#[test]
fn a_slot_that_is_not_logged_or_not_there_says_so() {
    let guest = guest(DirtyTracking::Log, false);
    let error = guest.vm.collect_dirty(0, &mut PageSet::new()).unwrap_err();
    assert!(error.to_string().contains("memory slot 0 (768 KiB at 0x0)"), "{error}");
    let error = guest.vm.collect_dirty(3, &mut PageSet::new()).unwrap_err();
    assert_eq!(error.to_string(), "there is no memory slot 3");
    guest.vm.set_dirty_log(3, true).unwrap_err();
}

#[test]
fn a_ring_keeps_pages_of_slots_that_were_not_asked_for_and_forgets_those_of_slots_that_are_gone() {
    let mut guest = guest(DirtyTracking::Ring { entries: 1024 }, true);
    let region = |at| Arc::new(Region::from_range(GuestAddress(at), 0x4000, None).unwrap());
    let slot = |region| MemorySlot { index: 1, region, read_only: false, log_dirty: true };
    guest.vm.map(slot(region(0xd0000))).unwrap();
    write_pages(&mut guest, [0x20, 0xd1]);
    assert_eq!(collect(&guest), [0x20].into());
    let mut second = PageSet::new();
    guest.vm.collect_dirty(1, &mut second).unwrap();
    assert_eq!(second.iter().collect::<Vec<_>>(), [0xd1]);

    for gone in [false, true] {
        write_pages(&mut guest, [0x21, 0xd2]);
        assert_eq!(collect(&guest), [0x21].into());
        if gone {
            guest.vm.unmap(1).unwrap();
        }
        guest.vm.map(slot(region(0xd0000))).unwrap();
        let mut second = PageSet::new();
        guest.vm.collect_dirty(1, &mut second).unwrap();
        assert!(second.is_empty());
    }
}
