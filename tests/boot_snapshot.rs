//! Save, kill, restore in a new process: the guest goes on where it was, and damaged files are refused.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Boot, Files, Random, Running, boot, need_kvm, wait_until};
use nix::sys::signal::Signal;

/// What every check that fails ends in: the guest writes 42 to isa-debug-exit.
const CHECK_FAILED: i32 = 85;

/// A checksum guest that saves to `snapshot` and counts its iterations in `progress`.
fn checksum(files: &Files, machine: &str, append: &str) -> Boot {
    // What an earlier run has counted is not this one's.
    let _ = fs::remove_file(files.path("progress"));
    let console = format!("file,id=p,path={}", files.path("progress").display());
    boot(machine)
        .with("-kernel", files.path("checksum"))
        .with("-append", append)
        .with("-chardev", console)
        .with("-device", "isa-debugcon,iobase=0x5ec,chardev=p")
        .with("-device", "isa-debug-exit")
        .with("-save", files.path("snapshot"))
}

fn progress(files: &Files) -> Vec<u8> {
    fs::read(files.path("progress")).unwrap_or_default()
}

/// Waits until `save` has been asked for and done.
#[track_caller]
fn save(running: Running) {
    running.signal(Signal::SIGUSR1);
    let ended = running.end();
    assert_ne!(ended.status.code(), Some(CHECK_FAILED), "a check of the guest's failed");
    ended.with_status(0).saying("the guest is saved in");
}

/// Saves and restores a guest at random points. Returns how many iterations it came to.
fn at_random_points(points: usize, machine: &str, append: &str, random: &mut Random) -> u64 {
    let files = Files::new();
    files.guest("checksum");
    // One CPU's iterations follow each other from process to process, byte by byte.
    let one = !append.contains("cpus=2");
    let (mut iterations, mut last) = (0, 0u8);
    let mut restore = false;
    for point in 0..points {
        let mut line = checksum(&files, machine, append);
        if restore {
            line = line.with("-restore", files.path("snapshot"));
        }
        let running = line.start();
        wait_until("the guest is ready", || files.path("progress").exists().then_some(()));
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        save(running);
        restore = true;
        let seen = progress(&files);
        iterations += seen.len() as u64;
        if one {
            for byte in seen {
                last = last.wrapping_add(1);
                assert_eq!(byte, last, "an iteration is lost or done twice at point {point}");
            }
        }
    }
    // After the last one it still runs.
    let running =
        checksum(&files, machine, append).with("-restore", files.path("snapshot")).start();
    let before = Instant::now();
    wait_until("the guest goes on", || (progress(&files).len() > 20).then_some(()));
    println!(
        "{points} points ({machine} {append}): {iterations} iterations, then 20 in {:?}",
        before.elapsed()
    );
    running.signal(Signal::SIGTERM);
    running.end().with_status(0);
    // A busy machine may leave a process no time for one.
    assert!(iterations * 10 >= points as u64, "no progress: {iterations} iterations");
    iterations
}

#[test]
fn a_guest_goes_on_from_200_random_points() {
    need_kvm();
    let mut random = Random::seeded();
    let begin = Instant::now();
    let plain = "-m 16";
    let split = "-m 16 -machine kernel-irqchip=split";
    let (one, two) = ("pages=2 ports=0 mmio=0", "pages=2 ports=0 mmio=0 cpus=2");
    let mut iterations = at_random_points(130, plain, one, &mut random);
    iterations += at_random_points(50, "-m 16 -smp 2", two, &mut random);
    iterations += at_random_points(15, split, one, &mut random);
    iterations +=
        at_random_points(5, "-m 16 -smp 2 -machine kernel-irqchip=split", two, &mut random);
    println!("200 points, {iterations} iterations, {:?}", begin.elapsed());
}

/// A snapshot of a checksum guest that has run a little.
fn snapshot(files: &Files) -> Vec<u8> {
    files.guest("checksum");
    let running = checksum(files, "-m 16", "pages=1 ports=0 mmio=0").start();
    wait_until("the guest computes", || (!progress(files).is_empty()).then_some(()));
    save(running);
    fs::read(files.path("snapshot")).unwrap()
}

/// A start from these bytes, without running the guest.
fn restore(files: &Files, bytes: &[u8], machine: &str) -> Boot {
    fs::write(files.path("snapshot"), bytes).unwrap();
    checksum(files, machine, "").with("-restore", files.path("snapshot"))
}

#[test]
fn damaged_files_are_refused() {
    need_kvm();
    let files = Files::new();
    let good = snapshot(&files);
    let json = usize::try_from(u64::from_le_bytes(good[16..24].try_into().unwrap())).unwrap();
    let (end, pages) = (good.len(), 24 + json);
    println!("a snapshot of {end} bytes, {json} of them JSON");

    // Cut within and between all its parts.
    let mut cuts = vec![0, 1, 15, 16, 17, 23, 24, 25, 24 + json / 2, pages - 1, pages, pages + 7];
    cuts.extend([pages + 8, pages + 9, pages + 8 + 4095, pages + 8 + 4096, pages + 8 + 4096 + 3]);
    cuts.extend([
        end - 4104 - 12,
        end - 13,
        end - 12,
        end - 11,
        end - 5,
        end - 4,
        end - 3,
        end - 1,
    ]);
    for cut in &cuts {
        restore(&files, &good[..*cut], "-m 16")
            .run()
            .with_status(1)
            .saying("snapshot is cut short: it is no whole snapshot");
    }

    // Every kind of byte flipped.
    let mut random = Random::seeded();
    let mut flips = vec![0, 3, 15, 16, 18, 19, 22, 23, 24, 25, pages - 1, pages, pages + 3];
    flips.extend([pages + 7, pages + 8, pages + 9, end - 12, end - 9, end - 5, end - 4, end - 1]);
    flips.extend((0..100).map(|_| random.below(end as u64) as usize));
    flips.extend((0..60).map(|_| 24 + random.below(json as u64) as usize));
    for flip in &flips {
        let mut bad = good.clone();
        bad[*flip] ^= 1 << random.below(8);
        let ended = restore(&files, &bad, "-m 16").run().with_status(1);
        let named = ["is damaged", "is cut short", "is no snapshot"];
        assert!(
            named.iter().any(|words| ended.stderr.contains(words)),
            "byte {flip}: {}",
            ended.stderr
        );
    }
    println!("{} cuts and {} flips refused", cuts.len(), flips.len());
    restore(&files, b"Dear diary", "-m 16").run().with_status(1);
    restore(&files, &fs::read(files.path("checksum")).unwrap(), "-m 16")
        .run()
        .with_status(1)
        .saying("is no snapshot");

    // The whole one still is one.
    let running = restore(&files, &good, "-m 16").start();
    wait_until("the guest goes on", || (progress(&files).len() > 3).then_some(()));
    running.signal(Signal::SIGTERM);
    running.end().with_status(0);
}

#[test]
fn another_machine_is_refused() {
    need_kvm();
    let files = Files::new();
    let good = snapshot(&files);
    for machine in ["-m 32", "-m 8", "-m 16 -smp 2"] {
        restore(&files, &good, machine)
            .run()
            .with_status(1)
            .saying("a machine with 16 MiB of RAM and 1 CPUs")
            .saying("the same -m and -smp");
    }
    for (machine, words) in [
        ("-m 16 -machine kernel-irqchip=split", ""),
        ("-m 16 -serial none", "serial0"),
        ("-m 16 -serial null -serial null", "serial1"),
        ("-m 16 -device keel-msi-test", "keel-msi-test"),
    ] {
        restore(&files, &good, machine).run().with_status(1).saying(words);
    }
}

/// Puts another state, with its length and checksum, into a snapshot.
fn forge(good: &[u8], state: &serde_json::Value) -> Vec<u8> {
    let json = usize::try_from(u64::from_le_bytes(good[16..24].try_into().unwrap())).unwrap();
    let forged = serde_json::to_vec(state).unwrap();
    let mut bytes = good[..16].to_vec();
    bytes.extend((forged.len() as u64).to_le_bytes());
    bytes.extend(forged);
    bytes.extend(&good[24 + json..good.len() - 4]);
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// Visits the values of a document, and gives how many there are; the one with number `wanted` is changed.
fn change(value: &mut serde_json::Value, seen: &mut u64, wanted: u64, random: u64) {
    use serde_json::Value;
    let here = *seen == wanted;
    *seen += 1;
    if here {
        let numbers = [0, 1, u64::from(u32::MAX), u64::MAX, 1 << 63, random];
        *value = match value {
            Value::Number(_) => numbers[(random % 6) as usize].into(),
            Value::Bool(is) => Value::Bool(!*is),
            Value::Array(all) if !random.is_multiple_of(3) => {
                if random % 3 == 1 { all.pop() } else { all.first().cloned() }.into_iter().collect()
            }
            Value::String(_) if random.is_multiple_of(2) => Value::String("\u{0}".repeat(70_000)),
            _ => Value::Null,
        };
        return;
    }
    match value {
        Value::Array(all) => all.iter_mut().for_each(|value| change(value, seen, wanted, random)),
        Value::Object(all) => {
            all.values_mut().for_each(|value| change(value, seen, wanted, random));
        }
        _ => {}
    }
}

#[test]
fn forged_states_are_refused_or_harmless() {
    need_kvm();
    let files = Files::new();
    let good = snapshot(&files);
    let json = usize::try_from(u64::from_le_bytes(good[16..24].try_into().unwrap())).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&good[24..24 + json]).unwrap();
    let mut values = 0;
    change(&mut state.clone(), &mut values, u64::MAX, 0);
    let mut random = Random::seeded();
    let (mut refused, mut taken) = (0, 0);
    for _ in 0..150 {
        let mut forged = state.clone();
        let wanted = random.below(values);
        change(&mut forged, &mut 0, wanted, random.next());
        let running = restore(&files, &forge(&good, &forged), "-m 16 -S -no-reboot").start();
        // Either it is refused, or it is a state that can be.
        let mut process = running.process;
        wait_until("it is refused or ready", || {
            (!process.is_running() || process.threads().iter().any(|name| name == "IO main"))
                .then_some(())
        });
        if process.is_running() {
            process.signal(Signal::SIGCONT);
            std::thread::sleep(Duration::from_millis(5));
            let _ = nix::sys::signal::kill(process.pid(), Signal::SIGTERM);
        }
        let status = process.wait();
        let mut stderr = running.stderr;
        let words = stderr.end();
        assert!(!words.contains("panicked"), "value {wanted}: {words}");
        match status.code() {
            Some(1) => refused += 1,
            // It ran, well or badly.
            Some(0 | 3..=6 | CHECK_FAILED) => taken += 1,
            _ => panic!("value {wanted}: {status}: {words}"),
        }
    }
    println!("150 forged states of {values} values: {refused} refused, {taken} taken");
}

#[test]
fn a_failed_save_loses_nothing() {
    need_kvm();
    let files = Files::new();
    files.guest("checksum");
    let old = files.path("old-is-a-directory");
    fs::create_dir(&old).unwrap();
    for target in [Path::new("/no/such/directory/snapshot"), Path::new("/dev/null"), &old] {
        let running =
            checksum(&files, "-m 16", "pages=1 ports=0 mmio=0").with("-save", target).start();
        wait_until("the guest computes", || (!progress(&files).is_empty()).then_some(()));
        for _ in 0..2 {
            let before = progress(&files).len();
            running.signal(Signal::SIGUSR1);
            running.stderr.wait_for("the guest is not saved: cannot write");
            wait_until("the guest goes on", || (progress(&files).len() > before + 3).then_some(()));
        }
        running.signal(Signal::SIGTERM);
        let ended = running.end().with_status(0).saying(&target.display().to_string());
        assert_eq!(ended.stderr.matches("is not saved").count(), 2, "{}", ended.stderr);
        let mut expected = 1u8;
        for byte in progress(&files) {
            assert_eq!(byte, expected);
            expected = expected.wrapping_add(1);
        }
    }
    assert!(!Path::new("/dev/null").is_file(), "a device must not be replaced");
    // Without -save there is nowhere to save to.
    let running =
        boot("").with("-kernel", files.path("checksum")).with("-append", "ports=0 mmio=0").start();
    running.process.wait_until_ready();
    running.signal(Signal::SIGUSR1);
    running.stderr.wait_for("no -save FILE was given");
    running.signal(Signal::SIGTERM);
    running.end().with_status(0);
}

/// A mount that a test takes away again.
struct Mount<'a>(&'a Path);

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_loses_nothing() {
    need_kvm();
    let files = Files::new();
    files.guest("checksum");
    let disk = files.path("disk");
    fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=128k", "none"])
        .arg(&disk)
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        // Only who may mount a small disk can fill it. Elsewhere the same path of the code is tried by `a_failed_save_loses_nothing`.
        assert!(std::env::var_os("CI").is_none(), "in CI it must be possible to mount a tmpfs");
        println!("not tried: no small file system could be mounted");
        return;
    }
    let _mount = Mount(&disk);
    let target = disk.join("snapshot");
    fs::write(&target, "the old one").unwrap();
    let running =
        checksum(&files, "-m 16", "pages=100 ports=0 mmio=0").with("-save", &target).start();
    wait_until("the guest computes", || (progress(&files).len() > 2).then_some(()));
    running.signal(Signal::SIGUSR1);
    running.stderr.wait_for("the guest is not saved: cannot write");
    let before = progress(&files).len();
    wait_until("the guest goes on", || (progress(&files).len() > before + 3).then_some(()));
    running.signal(Signal::SIGTERM);
    running.end().with_status(0).saying("No space left");
    assert_eq!(fs::read(&target).unwrap(), b"the old one");
    assert_eq!(fs::read_dir(&disk).unwrap().count(), 1, "nothing half-written is left");
}

#[test]
fn a_guest_that_never_ran_can_be_saved() {
    need_kvm();
    let files = Files::new();
    let snapshot = files.path("snapshot");
    let running = boot("-S").with("-save", &snapshot).start();
    running.process.wait_until_ready();
    running.signal(Signal::SIGUSR1);
    running.end().with_status(0).saying("the guest is saved");
    let ended = boot("").with("-restore", &snapshot).run().with_status(0);
    assert!(ended.stdout.contains("All is well"), "{}", ended.stdout);
    assert!(ended.stdout.contains("5 ticks of the x2APIC timer, 3 of the PIT"), "{}", ended.stdout);
    assert_eq!(files.names(), ["snapshot"]);
}
