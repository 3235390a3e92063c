//! Patterns in memory that verify themselves, and the endless loop that tells whether a machine was saved and restored
//! to the last bit: memory, general registers, vector registers and the clock are all in it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::system::Result;

/// The word at `index` of the pattern `seed`: SplitMix64's mixing, so that every word differs.
fn word(seed: u64, index: usize) -> u64 {
    let mut x = seed.wrapping_add((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A checksum that depends on the order of the words, with half of it in a floating-point register.
#[derive(Clone, Copy, Default, PartialEq)]
pub struct Sum {
    integer: u64,
    float: f64,
}

impl Sum {
    fn add(&mut self, word: u64) {
        self.integer = self.integer.rotate_left(7) ^ word;
        // Always summed in the same order, so that even what is rounded away is the same.
        self.float += (word >> 32) as f64;
    }
}

/// Fills `words` with the pattern `seed` and gives the checksum that reading them back must give. It is computed from
/// the pattern and not from the memory.
pub fn fill(words: &mut [u64], seed: u64) -> Sum {
    let mut sum = Sum::default();
    for (index, place) in words.iter_mut().enumerate() {
        *place = word(seed, index);
        sum.add(word(seed, index));
    }
    sum
}

/// Reads `words` back.
///
/// # Errors
/// The first word that is wrong, or the checksum's difference.
pub fn verify(words: &[u64], seed: u64, expected: Sum) -> std::result::Result<(), String> {
    let mut sum = Sum::default();
    words.iter().for_each(|word| sum.add(*word));
    if sum == expected {
        return Ok(());
    }
    Err(match words.iter().enumerate().find(|(index, found)| **found != word(seed, *index)) {
        Some((index, found)) => {
            format!("word {index} is {found:#x}, was written as {:#x}", word(seed, index))
        }
        None => "the checksum is wrong though every word is right".into(),
    })
}

/// Runs `work` on every CPU at once, each in a thread that cannot leave its CPU, and gives the results in order.
pub fn on_every_cpu<T: Send>(work: impl Fn(usize) -> T + Sync) -> Result<Vec<T>> {
    let cpus = crate::checks::cpus()?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cpus)
            .map(|cpu| {
                let work = &work;
                scope.spawn(move || {
                    let mut only = CpuSet::new();
                    only.set(cpu);
                    sched_setaffinity(None, &only)
                        .map_err(|error| format!("bind a thread to CPU {cpu}: {error}"))?;
                    Ok(work(cpu))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?)
            .collect()
    })
}

/// Never ends: every CPU rewrites `bytes` of its own with a new pattern, verifies what the round before left, and counts
/// the round. A heartbeat is printed at most twice a second, and only when every CPU has got further since the last one.
pub fn run(bytes: usize) -> Result<()> {
    let cpus = crate::checks::cpus()?;
    let rounds: Vec<AtomicU64> = (0..cpus).map(|_| AtomicU64::new(0)).collect();
    let corrupt = AtomicBool::new(false);
    let report = |what: String| {
        corrupt.store(true, Ordering::Relaxed);
        println!("keel: CORRUPT {what}");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| heartbeats(&rounds, &corrupt));
        on_every_cpu(|cpu| {
            let mut words = vec![0; bytes / 8];
            let (mut seed, mut last) = (cpu as u64, Instant::now());
            let mut expected = fill(&mut words, seed);
            loop {
                if let Err(what) = verify(&words, seed, expected) {
                    report(format!("cpu {cpu} {what}"));
                }
                let now = Instant::now();
                if now < last {
                    report(format!("cpu {cpu} the clock went back"));
                }
                last = now;
                seed = seed.wrapping_add(cpus as u64);
                expected = fill(&mut words, seed);
                rounds[cpu].fetch_add(1, Ordering::Relaxed);
            }
        })
    })
    .map(|_: Vec<()>| ())
}

fn heartbeats(rounds: &[AtomicU64], corrupt: &AtomicBool) {
    let mut before = vec![0; rounds.len()];
    let mut count = 0;
    while !corrupt.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(500));
        let now: Vec<u64> = rounds.iter().map(|round| round.load(Ordering::Relaxed)).collect();
        if now.iter().zip(&before).all(|(now, before)| now > before) {
            count += 1;
            println!("keel: heartbeat {count} ok");
            before = now;
        }
    }
}
