//! vCPU threads that make accesses while another thread changes the map: each access goes by one map, and by the newest that its thread can know of.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use keel_device_model::{Board, SharedMmio, SharedPio};
use keel_hypervisor::{Bus, Width};

/// Answers with the number of the map it belongs to.
struct Version(u64);

impl SharedPio for Version {
    fn read(&self, offset: u16, width: Width) -> u32 {
        assert_eq!((offset, width), (0, Width::Dword));
        self.0 as u32
    }
    fn write(&self, _offset: u16, _width: Width, _value: u32) {}
}

impl SharedMmio for Version {
    fn read(&self, offset: u64, width: Width) -> u64 {
        // The range begins at another place each time: the offset is of the same map as the device, or the table is torn.
        assert_eq!((offset, width), (shift(self.0), Width::Qword));
        self.0
    }
    fn write(&self, _offset: u64, _width: Width, _value: u64) {}
}

const AT: u64 = 0x10_0000;

/// How far below [`AT`] the range of this map begins.
fn shift(version: u64) -> u64 {
    version % 64 * 8
}

#[test]
fn accesses_go_by_the_newest_map_while_it_changes() {
    let board = Board::new();
    let fixed = Arc::new(Version(u64::from(u32::MAX - 1)));
    board.map_pio("fixed", 0x80..=0x83, Width::Dword, fixed).unwrap();
    // The oldest map that a reader may still see, and the newest.
    let (announced, begun) = (AtomicU64::new(0), AtomicU64::new(0));
    let done = AtomicBool::new(false);
    let reads = thread::scope(|scope| {
        let reader = |which: u64| {
            let (board, announced, begun, done) = (&board, &announced, &begun, &done);
            move || {
                let mut bus = board.bus();
                let (mut reads, mut found) = (0_u64, 0_u64);
                while !done.load(Ordering::Acquire) {
                    let oldest = announced.load(Ordering::Acquire);
                    let (seen, nothing) = if which == 0 {
                        (u64::from(bus.pio_read(0x40, Width::Dword)), u64::from(u32::MAX))
                    } else {
                        (bus.mmio_read(AT, Width::Qword), u64::MAX)
                    };
                    let newest = begun.load(Ordering::Acquire);
                    if seen != nothing {
                        assert!(
                            (oldest..=newest).contains(&seen),
                            "saw map {seen} of {oldest} to {newest}"
                        );
                        found += 1;
                    }
                    assert_eq!(
                        bus.pio_read(0x80, Width::Dword),
                        u32::MAX - 1,
                        "others stay where they are"
                    );
                    reads += 1;
                }
                assert!(found > 0);
                reads
            }
        };
        let readers = [scope.spawn(reader(0)), scope.spawn(reader(1))];
        let begin = Instant::now();
        let mut version = 0;
        while begin.elapsed() < Duration::from_secs(1) {
            version += 1;
            begun.store(version, Ordering::Release);
            let device = Arc::new(Version(version));
            board.map_pio("moving", 0x40..=0x43, Width::Dword, device.clone()).unwrap();
            let first = AT - shift(version);
            board.map_mmio("moving", first..=AT + 7, Width::Qword, device).unwrap();
            announced.store(version, Ordering::Release);
            if version % 16 == 0 {
                thread::yield_now();
            }
            board.unmap_pio(0x40).unwrap();
            board.unmap_mmio(first).unwrap();
        }
        done.store(true, Ordering::Release);
        println!("map_changes {} changes", 4 * version);
        readers.map(|reader| reader.join().unwrap())
    });
    println!("reads {} reads", reads.iter().sum::<u64>());
    assert_eq!(board.bus().mmio_read(AT, Width::Qword), u64::MAX, "all gone in the end");
}
