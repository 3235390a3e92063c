//! A kick is never lost and never late, whichever moment it comes at.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::Guest;
use keel_hypervisor::Exit;

/// How many kicks: the million where time is given, and a tenth otherwise.
fn kicks() -> u64 {
    if std::env::var_os("KEEL_LONG").is_some() { 1_000_000 } else { 100_000 }
}

/// How long this process's threads have waited for a processor so far: other programs' doing, not ours.
fn waited(thread: u64) -> Duration {
    let path = format!("/proc/self/task/{thread}/schedstat");
    let text = std::fs::read_to_string(path).unwrap();
    Duration::from_nanos(text.split_whitespace().nth(1).unwrap().parse().unwrap())
}

fn thread_id() -> u64 {
    let link = std::fs::read_link("/proc/thread-self").unwrap();
    link.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

#[test]
fn none_is_lost_and_none_is_late() {
    let count = kicks();
    // pause; jmp: never leaves the guest by itself.
    let mut guest = Guest::new(&[0xf3, 0x90, 0xeb, 0xfc]);
    let kicker = guest.vcpu.kicker();
    let asked = Arc::new(AtomicU64::new(0));
    let answered = Arc::new(AtomicU64::new(0));
    let tid = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let vcpu_thread = thread::spawn({
        let (asked, answered, tid, done) =
            (asked.clone(), answered.clone(), tid.clone(), done.clone());
        move || {
            tid.store(thread_id(), Ordering::SeqCst);
            while !done.load(Ordering::SeqCst) {
                assert_eq!(guest.run(), Exit::Kicked);
                answered.store(asked.load(Ordering::SeqCst), Ordering::SeqCst);
            }
        }
    });
    while tid.load(Ordering::SeqCst) == 0 {
        thread::yield_now();
    }
    let (mine, theirs) = (thread_id(), tid.load(Ordering::SeqCst));
    let mut latest = Duration::ZERO;
    for kick in 1..=count {
        asked.store(kick, Ordering::SeqCst);
        let begin = Instant::now();
        kicker.kick();
        let mut looks = 0;
        while answered.load(Ordering::SeqCst) != kick {
            thread::yield_now();
            looks += 1;
            assert!(
                looks % 1024 != 0 || begin.elapsed() < Duration::from_secs(20),
                "kick {kick} was lost"
            );
        }
        let took = begin.elapsed();
        if took > latest {
            latest = took;
        }
        if took > Duration::from_millis(10) {
            // Late, or only kept from running by other programs on this machine?
            let before = waited(mine) + waited(theirs);
            eprintln!(
                "kick {kick} took {took:?}; the two threads have waited {before:?} for a processor in all"
            );
        }
        // Another moment each time, over some 100 µs.
        for _ in 0..kick * 7919 % 4096 {
            std::hint::spin_loop();
        }
    }
    done.store(true, Ordering::SeqCst);
    kicker.kick();
    vcpu_thread.join().unwrap();
    println!("kicks {count} kicks");
    println!("kick_latest {} us", latest.as_micros());
    let stalls = waited(mine);
    assert!(latest < Duration::from_millis(10) + stalls, "a kick took {latest:?}");
}

#[test]
fn one_that_comes_before_run_counts() {
    let mut guest = Guest::new(&[0xf3, 0x90, 0xeb, 0xfc]);
    guest.vcpu.kicker().kick();
    assert_eq!(guest.run(), Exit::Kicked);
    // And only once: the next run needs another.
    let kicker = guest.vcpu.kicker();
    let later = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        kicker.kick();
    });
    let begin = Instant::now();
    assert_eq!(guest.run(), Exit::Kicked);
    assert!(begin.elapsed() >= Duration::from_millis(40), "the first kick must not count twice");
    later.join().unwrap();
}

#[test]
fn a_kicker_may_outlive_its_vcpu() {
    let guest = Guest::new(&[0xf4]);
    let kicker = guest.vcpu.kicker();
    drop(guest);
    kicker.kick();
}
