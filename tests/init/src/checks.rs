//! The guest's checks that end: CPUs, memory, clock, timers, kernel messages.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::checksum::{fill, on_every_cpu, verify};
use crate::system::{self, Result};

/// How many CPUs the kernel brought up.
pub fn cpus() -> Result<usize> {
    Ok(system::read("/proc/cpuinfo")?.lines().filter(|line| line.starts_with("processor")).count())
}

/// The clock source the kernel chose.
pub fn clocksource() -> Result<String> {
    system::read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
}

/// The system's time in seconds since the epoch.
pub fn wall() -> Result<u64> {
    Ok(SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|error| format!("read the time: {error}"))?
        .as_secs())
}

/// Fills `bytes` of memory with a pattern that differs in every word, and only then reads it back.
pub fn memory(bytes: usize) -> Result<()> {
    let mut words = Vec::new();
    words
        .try_reserve_exact(bytes / 8)
        .map_err(|error| format!("allocate {bytes} bytes: {error}"))?;
    words.resize(bytes / 8, 0);
    let expected = fill(&mut words, 0x6b65_656c);
    match verify(&words, 0x6b65_656c, expected) {
        Ok(()) => println!("keel: memory {bytes} ok"),
        Err(what) => println!("keel: CORRUPT memory {what}"),
    }
    Ok(())
}

/// On every CPU, 20 sleeps of 1 to 20 ms: none may end early, and the clock may not go backwards.
pub fn timers() -> Result<()> {
    let mut worst = Duration::ZERO;
    for lateness in on_every_cpu(|_| {
        (1..=20)
            .map(|milliseconds| {
                let (wanted, begun) = (Duration::from_millis(milliseconds), Instant::now());
                std::thread::sleep(wanted);
                begun.elapsed().checked_sub(wanted).ok_or(milliseconds)
            })
            .collect::<std::result::Result<Vec<_>, _>>()
    })? {
        match lateness {
            Ok(all) => worst = all.into_iter().chain([worst]).max().unwrap_or_default(),
            Err(milliseconds) => {
                println!("keel: timers FAILED a sleep of {milliseconds} ms ended early");
                return Ok(());
            }
        }
    }
    println!("keel: timers ok late {} us", worst.as_micros());
    Ok(())
}

/// Prints every kernel message so far of level error (3) or worse, then their number.
pub fn dmesg() -> Result<()> {
    let said = |error: &dyn std::fmt::Display| format!("read /dev/kmsg: {error}");
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let mut log = std::fs::File::options()
        .read(true)
        .custom_flags(nonblocking)
        .open("/dev/kmsg")
        .map_err(|error| said(&error))?;
    let (mut record, mut errors) = ([0; 8192], 0);
    loop {
        // One read is one record, `priority,sequence,time,flags;text`.
        let length = match log.read(&mut record) {
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            // Records overwritten before they were read: the next read goes on after them.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => {
                continue;
            }
            Err(error) => return Err(said(&error)),
        };
        let text = String::from_utf8_lossy(&record[..length]);
        let Some((prefix, message)) = text.split_once(';') else { continue };
        // The low three bits are the level, the others the facility; 0 is the kernel's own.
        let priority: u32 =
            prefix.split(',').next().and_then(|number| number.parse().ok()).unwrap_or(7);
        if priority <= 3 {
            errors += 1;
            println!("keel: dmesg: {}", message.lines().next().unwrap_or_default());
        }
    }
    println!("keel: dmesg-errors {errors}");
    Ok(())
}
