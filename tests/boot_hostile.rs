//! A guest that does what no driver would: `boot` neither panics nor hangs nor grows.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{Files, Random, boot, need_kvm, wait_until};
use nix::sys::signal::Signal;

/// How long each machine is under attack.
const ATTACK: Duration = Duration::from_secs(2);
/// Buffers that fill once. What a leak of a byte an access would come to is more.
const GROWTH_KIB: u64 = 256;

/// Attacks a machine from a random seed. Returns the number of operations.
fn attack(machine: &str, random: &mut Random) -> u64 {
    let files = Files::new();
    let seed = random.below(u64::MAX >> 1);
    let progress = files.path("progress");
    let running = boot(machine)
        .with("-kernel", files.guest("hostile"))
        .with("-append", format!("seed={seed} count=1000000000000"))
        .with("-chardev", format!("file,id=p,path={}", progress.display()))
        .with("-device", "isa-debugcon,iobase=0x5ec,chardev=p")
        .with("-device", "isa-debug-exit")
        .with("-d", "exits")
        .with("-serial", format!("file:{}", files.path("serial").display()))
        .start();
    let operations = || fs::metadata(&progress).map_or(0, |file| file.len()) * 256;
    // Every page of the guest's and every device's buffer has been touched by then.
    wait_until("the guest attacks", || (operations() >= 20_000).then_some(()));
    // The guest's RAM counts too, but this guest touches no more of it.
    let before = running.process.status_kib("VmRSS");
    let begin = Instant::now();
    wait_until("the time is over", || (begin.elapsed() >= ATTACK).then_some(()));
    let after = running.process.status_kib("VmRSS");
    let done = operations();
    assert!(after <= before + GROWTH_KIB, "seed {seed}: from {before} to {after} KiB");
    running.signal(Signal::SIGTERM);
    let ended = running.end();
    assert_eq!(ended.status.code(), Some(0), "seed {seed} {machine}: {}", ended.stderr);
    assert!(ended.stderr.contains("unclaimed at still other places"), "{}", ended.stderr);
    assert!(ended.stderr.len() < 64 << 10, "the report is bounded: {} bytes", ended.stderr.len());
    println!("seed {seed} ({machine}): {done} operations, {before} KiB before, {after} KiB after");
    done
}

#[test]
fn a_hostile_guest_harms_nobody() {
    need_kvm();
    let mut random = Random::seeded();
    let mut operations = 0;
    for machine in ["-m 16", "-m 16 -machine kernel-irqchip=split", "-m 16 -device keel-msi-test"] {
        operations += attack(machine, &mut random);
    }
    println!("{operations} operations");
}

#[test]
fn it_comes_to_its_end() {
    need_kvm();
    let files = Files::new();
    let verdict = files.path("verdict");
    let mut random = Random::seeded();
    for _ in 0..5 {
        let seed = random.below(u64::MAX >> 1);
        let mut running = boot("-m 16 -device isa-debug-exit -serial null")
            .with("-kernel", files.guest("hostile"))
            .with("-append", format!("seed={seed} count=2000"))
            .with("-chardev", format!("file,id=v,path={}", verdict.display()))
            .with("-device", "isa-debugcon,iobase=0x5e8,chardev=v")
            .start();
        // The lowest byte of 0x600d_0000; a failed check ends in isa-debug-exit too.
        wait_until("the guest is done", || {
            assert!(running.process.is_running(), "seed {seed}: {}", running.stderr.text());
            (fs::read(&verdict).unwrap_or_default() == [0]).then_some(())
        });
        running.signal(Signal::SIGTERM);
        running.end().with_status(0);
        fs::remove_file(&verdict).unwrap();
    }
}
