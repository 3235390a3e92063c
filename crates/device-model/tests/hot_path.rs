//! From the bus to the device's first line: no allocation. (That there is no lock either is tested in the board itself, where it can be held.)
#![allow(unsafe_code, reason = "a global allocator that counts")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use keel_device_model::{Board, EndOfInterrupt, SharedMmio, SharedPio, Tally};
use keel_hypervisor::{Bus, Width};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is handed on as it is to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the promises of `dealloc`, and `at` came from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Counts this thread's allocations in `body`.
fn allocations(body: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    body();
    ALLOCATIONS.with(Cell::get) - before
}

#[derive(Default)]
struct Counter(AtomicU64);

impl Counter {
    fn count(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

impl SharedPio for Counter {
    fn read(&self, _offset: u16, _width: Width) -> u32 {
        self.count() as u32
    }
    fn write(&self, _offset: u16, _width: Width, _value: u32) {
        self.count();
    }
}

impl SharedMmio for Counter {
    fn read(&self, _offset: u64, _width: Width) -> u64 {
        self.count()
    }
    fn write(&self, _offset: u64, _width: Width, _value: u64) {
        self.count();
    }
}

impl EndOfInterrupt for Counter {
    fn end_of_interrupt(&self, _vector: u8) {
        self.count();
    }
}

#[test]
fn the_allocator_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(7)))), 1);
}

#[test]
fn accesses_allocate_nothing() {
    let counter = Arc::new(Counter::default());
    let board = Board::new();
    for n in 0..16 {
        board.map_pio("pio", 0x100 + 8 * n..=0x107 + 8 * n, Width::Dword, counter.clone()).unwrap();
        let first = u64::from(n) << 20;
        board.map_mmio("mmio", first..=first + 0xfff, Width::Qword, counter.clone()).unwrap();
    }
    board.listen_end_of_interrupt(counter.clone());
    for timed in [false, true] {
        let mut bus = board.bus();
        if timed {
            bus.keep_times();
        }
        let go = |bus: &mut keel_device_model::BoardBus| {
            for n in 0..1000_u16 {
                let (port, gpa) = (0x100 + n % 128, u64::from(n % 16) << 20 | 8);
                bus.pio_write(port, Width::Byte, n.into());
                bus.pio_read(port & !3, Width::Dword);
                bus.pio_read(port, Width::Dword); // split, where it runs over an end
                bus.mmio_write(gpa, Width::Qword, 1);
                bus.mmio_read(gpa, Width::Byte);
                bus.end_of_interrupt(n as u8);
                // Nobody's, at fewer addresses than are told apart.
                bus.pio_write(0x80 + n % 8, Width::Byte, 0);
                bus.mmio_read(0xd000_0000 + u64::from(n % 8), Width::Dword);
            }
        };
        // The first time addresses and devices are entered in the tally.
        let first = allocations(|| go(&mut bus));
        assert!(first < 64, "{first} allocations");
        assert_eq!(allocations(|| go(&mut bus)), 0, "timed: {timed}");
    }
    assert!(counter.count() > 20_000, "the devices were reached");
}

#[test]
fn unclaimed_accesses_allocate_up_to_a_bound_only() {
    let mut bus = Board::new().bus();
    let mut gpa = 0_u64;
    let mut scan = || {
        for _ in 0..10_000 {
            gpa = gpa.wrapping_add(0x9e37_79b9_7f4a_7c15);
            bus.mmio_write(gpa, Width::Qword, gpa);
        }
    };
    let first = allocations(&mut scan);
    assert!(first <= Tally::MOST_ADDRESSES as u64, "{first} allocations");
    assert_eq!(allocations(&mut scan), 0);
}
