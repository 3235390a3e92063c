//! Stock kernels come up on every shape of machine, with what they were given, and come up again after a reboot.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use super::machine::{BOOT, Machine, STEP, Vmm, said};
use super::{Lab, Scenario};
use crate::lab::host::Session;
use crate::lab::packages::Package;

macro_rules! boots {
    ($($name:literal: $kernel:ident, $cpus:literal CPUs, $memory:literal;)*) => {
        &[
            $(Scenario {
                name: $name,
                shows: concat!("boots to the init with -smp ", $cpus, " and -m ", $memory, "; clock, timers, memory, messages; power-off is status 0"),
                ours_only: false,
                run: |lab| boots(lab, Package::$kernel, $cpus, $memory),
            },)*
            Scenario {
                name: "reboot",
                shows: "a reboot resets the machine and the kernel comes up again, twice; then power-off",
                ours_only: true,
                run: reboot,
            },
        ]
    };
}

/// Both kernels with each number of CPUs, each number with two sizes, each size with two numbers.
pub const SCENARIOS: &[Scenario] = boots! {
    "boot-generic-1cpu-128m": Generic, 1 CPUs, "128";
    "boot-generic-2cpu-512m": Generic, 2 CPUs, "512";
    "boot-generic-4cpu-4g": Generic, 4 CPUs, "4G";
    "boot-generic-1cpu-512m": Generic, 1 CPUs, "512";
    "boot-cloud-1cpu-4g": Cloud, 1 CPUs, "4G";
    "boot-cloud-2cpu-128m": Cloud, 2 CPUs, "128";
    "boot-cloud-4cpu-512m": Cloud, 4 CPUs, "512";
    "boot-cloud-1cpu-128m": Cloud, 1 CPUs, "128";
};

fn boots(lab: &mut Lab, kernel: Package, cpus: u32, memory: &'static str) -> Result<String> {
    // In the 4 GiB machine the kernel gives out memory from the highest addresses first: the pattern is above the hole.
    let pattern = if memory == "128" { "32M" } else { "96M" };
    let append =
        format!("keel.do=cpus,memory,clock,timers,rtc,wall,dmesg,poweroff keel.memory={pattern}");
    let begun = Instant::now();
    let mut guest = lab.boot(&Machine { kernel, cpus, memory, append, options: String::new() })?;
    let booted = begun.elapsed();
    let found = said(&mut guest, "cpus")?;
    ensure!(found == cpus.to_string(), "the kernel brought up {found} of {cpus} CPUs");
    let found = said(&mut guest, "memory")?;
    ensure!(found.ends_with("ok"), "memory: {found}");
    let found = said(&mut guest, "clocksource")?;
    ensure!(found == "kvm-clock", "the clock source is {found} and not kvm-clock");
    let timers = said(&mut guest, "timers")?;
    ensure!(timers.starts_with("ok"), "timers: {timers}");
    if lab.vmm != Vmm::Microvm {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("read the time")?.as_secs();
        for clock in ["rtc", "wall"] {
            let found: u64 =
                said(&mut guest, clock)?.parse().with_context(|| format!("{clock} is no time"))?;
            ensure!(found.abs_diff(now) < 60, "{clock} is {found} where it is {now}");
        }
    }
    let errors = said(&mut guest, "dmesg-errors")?;
    let status = guest.wait(STEP)?;
    let ours = messages(&guest);
    ensure!(
        ours.len().to_string() == errors,
        "{errors} errors were counted and {} printed",
        ours.len()
    );
    if !ours.is_empty() && lab.vmm == Vmm::Boot {
        let known = usual_errors(lab, kernel)?;
        let new: Vec<_> = ours.into_iter().filter(|message| !known.contains(message)).collect();
        ensure!(
            new.is_empty(),
            "the kernel reported errors that it does not under QEMU:\n{}",
            new.join("\n")
        );
    }
    ensure!(status == 0, "power-off ended with status {status}; {}", guest.tail());
    Ok(format!("init after {:.1} s, timers {timers}", booted.as_secs_f64()))
}

/// What the kernel reported as errors.
fn messages(guest: &Session) -> Vec<String> {
    guest
        .text()
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("keel: dmesg: "))
        .map(str::to_owned)
        .collect()
}

/// What the same kernel reports as errors on QEMU's two machines, asked once a run.
fn usual_errors(lab: &mut Lab, kernel: Package) -> Result<Vec<String>> {
    if let Some(known) = lab.usual_errors.get(&kernel) {
        return Ok(known.clone());
    }
    let mut known = Vec::new();
    for vmm in [Vmm::Pc, Vmm::Microvm] {
        let machine = Machine { kernel, ..Machine::small("keel.do=dmesg,poweroff") };
        let mut guest = lab.host.start(&machine.command(vmm, &lab.files), None)?;
        guest
            .expect("keel: dmesg-errors", BOOT + STEP)
            .with_context(|| format!("under {}", vmm.name()))?;
        guest.wait(STEP)?;
        let messages = messages(&guest);
        println!("lab: {} reports {}: {messages:?}", vmm.name(), messages.len());
        known.extend(messages);
    }
    lab.usual_errors.insert(kernel, known.clone());
    Ok(known)
}

fn reboot(lab: &mut Lab) -> Result<String> {
    let mut machine = Machine::small("keel.do=cpus,ask");
    machine.cpus = 2;
    let mut guest = lab.boot(&machine)?;
    let mut again = Vec::new();
    for _ in 0..2 {
        guest.expect("keel: ask", STEP)?;
        let begun = Instant::now();
        guest.input(b"reboot\n")?;
        guest.expect("keel: init", BOOT)?;
        again.push(format!("{:.1}", begun.elapsed().as_secs_f64()));
        let cpus = said(&mut guest, "cpus")?;
        ensure!(cpus == "2", "after a reboot the kernel brought up {cpus} of 2 CPUs");
    }
    guest.expect("keel: ask", STEP)?;
    guest.input(b"poweroff\n")?;
    let status = guest.wait(STEP)?;
    ensure!(status == 0, "power-off ended with status {status}; {}", guest.tail());
    Ok(format!("reboot to init in {} s", again.join(" and ")))
}
