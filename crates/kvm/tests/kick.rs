//! A kick is never lost and never late, whichever moment it comes at.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::Guest;
use keel_hypervisor::Exit;

/// How many kicks, and for how long at most: the million where time is given, and otherwise what a few seconds have room for, which on a
/// busy machine is less.
fn kicks() -> (u64, Duration) {
    if std::env::var_os("KEEL_LONG").is_some() {
        (1_000_000, Duration::MAX)
    } else {
        (100_000, Duration::from_secs(8))
    }
}

/// How long the two threads of the test were kept from running so far by whoever else uses this machine: by its other threads (the run-queue wait
/// of `schedstat`, Linux `Documentation/scheduler/sched-stats.rst`), and by its host (the steal time of `/proc/stat`, in ticks of 10 ms).
struct Waits {
    threads: [File; 2],
    stat: File,
}

impl Waits {
    fn of(threads: [u64; 2]) -> Self {
        let open = |path: String| File::open(path).unwrap();
        Waits {
            threads: threads.map(|thread| open(format!("/proc/self/task/{thread}/schedstat"))),
            stat: open("/proc/stat".into()),
        }
    }

    fn queued(&self) -> Duration {
        let wait = |file: &File| {
            let mut text = [0; 128];
            let len = file.read_at(&mut text, 0).unwrap();
            let text = std::str::from_utf8(&text[..len]).unwrap();
            Duration::from_nanos(text.split_whitespace().nth(1).unwrap().parse().unwrap())
        };
        self.threads.iter().map(wait).sum()
    }

    fn stolen(&self) -> Duration {
        let mut text = [0; 256];
        let len = self.stat.read_at(&mut text, 0).unwrap();
        let text = std::str::from_utf8(&text[..len]).unwrap();
        let ticks: u64 = text.split_whitespace().nth(8).unwrap().parse().unwrap();
        Duration::from_millis(10 * ticks)
    }
}

fn thread_id() -> u64 {
    let link = std::fs::read_link("/proc/thread-self").unwrap();
    link.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// What a kick may take.
const LATE: Duration = Duration::from_millis(10);

#[test]
fn none_is_lost_and_none_is_late() {
    let (most, patience) = kicks();
    // pause; jmp: never leaves the guest by itself.
    let Guest { mut vcpu, mut bus, vm: _vm, ram: _ram, watchdog } =
        Guest::new(&[0xf3, 0x90, 0xeb, 0xfc]);
    drop(watchdog); // A kick of its own would hide a lost one.
    let kicker = vcpu.kicker();
    let asked = Arc::new(AtomicU64::new(0));
    let answered = Arc::new(AtomicU64::new(0));
    let tid = Arc::new(AtomicU64::new(0));
    let vcpu_thread = thread::spawn({
        let (asked, answered, tid) = (asked.clone(), answered.clone(), tid.clone());
        move || {
            tid.store(thread_id(), Ordering::SeqCst);
            loop {
                assert_eq!(vcpu.run(&mut bus).unwrap(), Exit::Kicked);
                let kick = asked.load(Ordering::SeqCst);
                answered.store(kick, Ordering::SeqCst);
                if kick == END {
                    return;
                }
            }
        }
    });
    while tid.load(Ordering::SeqCst) == 0 {
        thread::yield_now();
    }
    let waits = Waits::of([thread_id(), tid.load(Ordering::SeqCst)]);
    let (mut latest, mut latest_ours, mut excused) = (Duration::ZERO, Duration::ZERO, 0);
    let mut stolen = waits.stolen();
    let all = Instant::now();
    let mut count = 0;
    while count < most && all.elapsed() < patience {
        count += 1;
        let kick = count;
        let queued = waits.queued();
        asked.store(kick, Ordering::SeqCst);
        let begin = Instant::now();
        kicker.kick();
        let mut looks = 0_u64;
        while answered.load(Ordering::SeqCst) != kick {
            thread::yield_now();
            looks += 1;
            assert!(
                !looks.is_multiple_of(1024) || begin.elapsed() < Duration::from_secs(20),
                "kick {kick} was lost"
            );
        }
        let took = begin.elapsed();
        latest = latest.max(took);
        let mut ours = took;
        if took > LATE / 10 {
            // Late, or only kept from running during this very kick?
            let (queue, host) = (waits.queued() - queued, waits.stolen() - stolen);
            ours = took.saturating_sub(queue + host);
            if took > LATE {
                excused += 1;
                eprintln!(
                    "kick {kick} took {took:?}, {queue:?} of it in run queues and up to {host:?} in the host's"
                );
            }
            stolen = waits.stolen();
        }
        latest_ours = latest_ours.max(ours);
        assert!(ours <= LATE, "kick {kick} took {ours:?} of our own");
        if kick.is_multiple_of(64) {
            stolen = waits.stolen();
        }
        // Another moment each time, over some 30 µs.
        for _ in 0..kick * 7919 % 512 {
            std::hint::spin_loop();
        }
    }
    asked.store(END, Ordering::SeqCst);
    kicker.kick();
    vcpu_thread.join().unwrap();
    println!("kicks {count} kicks");
    println!("kick_mean {} us", all.elapsed().as_micros() / u128::from(count));
    println!("kick_latest {} us", latest.as_micros());
    println!("kick_latest_ours {} us", latest_ours.as_micros());
    println!("kicks_kept_from_running {excused} kicks");
}

/// The last kick's number.
const END: u64 = u64::MAX;

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
