//! The exit report of `-d exits`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use keel_device_model::{Access, Direction, Space, Spent, Tally};

use crate::cpu;
use crate::machine::Machine;

/// What the CPUs left the guest for, how often and for how long. The machine must be stopped.
pub fn text(machine: &Machine) -> String {
    let (mut tally, mut exits, mut busy) = (Tally::default(), BTreeMap::new(), Duration::ZERO);
    for cpu in &machine.cpus {
        let mut cpu = cpu::lock(cpu);
        tally.merge(cpu.take_tally());
        busy += cpu.busy;
        for (name, count) in &cpu.exits {
            *exits.entry(*name).or_default() += count;
        }
    }
    let mut text =
        format!("exit report: {} CPUs, {:.3} s running\n", machine.cpus.len(), busy.as_secs_f64());
    table(&mut text, &tally, busy);
    kinds(&mut text, &exits);
    in_kernel(&mut text, machine);
    unclaimed(&mut text, &tally);
    text
}

fn table(text: &mut String, tally: &Tally, busy: Duration) {
    let all = tally.devices.values().fold(Spent::default(), |mut all, spent| {
        all += *spent;
        all
    });
    let share =
        |time: Duration| 100.0 * time.as_secs_f64() / busy.as_secs_f64().max(f64::MIN_POSITIVE);
    _ = writeln!(
        text,
        "  {:<16} {:<11} {:>10} {:>12} {:>8}",
        "device", "access", "exits", "time", "share"
    );
    for ((device, access), spent) in &tally.devices {
        _ = writeln!(
            text,
            "  {device:<16} {:<11} {:>10} {:>9} us {:>7.3}%",
            name(*access),
            spent.count,
            spent.time.as_micros(),
            share(spent.time)
        );
    }
    _ = writeln!(
        text,
        "  {:<16} {:<11} {:>10} {:>9} us {:>7.3}%",
        "all devices",
        "",
        all.count,
        all.time.as_micros(),
        share(all.time)
    );
    let rest = busy.saturating_sub(all.time);
    _ = writeln!(
        text,
        "  {:<16} {:<11} {:>10} {:>9} us {:>7.3}%",
        "guest and kernel",
        "",
        "",
        rest.as_micros(),
        share(rest)
    );
}

fn kinds(text: &mut String, exits: &BTreeMap<&'static str, u64>) {
    let list: Vec<_> = exits.iter().map(|(name, count)| format!("{name} {count}")).collect();
    if !list.is_empty() {
        _ = writeln!(text, "  other exits: {}", list.join(", "));
    }
}

/// The kernel's own counters of exits, those it handled by itself included; added up over the CPUs.
fn in_kernel(text: &mut String, machine: &Machine) {
    let Ok(statistics) = machine.vm.statistics() else { return };
    let mut sums = BTreeMap::<String, u64>::new();
    for one in statistics {
        if let (Some((_, name)), [value]) = (one.name.split_once('.'), one.values.as_slice())
            && name.ends_with("exits")
        {
            *sums.entry(name.to_owned()).or_default() += value;
        }
    }
    let list: Vec<_> = sums
        .iter()
        .filter(|(_, sum)| **sum > 0)
        .map(|(name, sum)| format!("{name} {sum}"))
        .collect();
    if !list.is_empty() {
        _ = writeln!(text, "  counted by the kernel: {}", list.join(", "));
    }
}

fn unclaimed(text: &mut String, tally: &Tally) {
    for (((space, direction), address), count) in &tally.unclaimed {
        let place = match space {
            Space::Pio => format!("port {address:#06x}"),
            Space::Mmio => format!("address {address:#x}"),
        };
        let how = if *direction == Direction::Read { "read" } else { "written" };
        let times = if *count == 1 { "once".into() } else { format!("{count} times") };
        _ = writeln!(text, "  unclaimed {place} {how} {times}");
    }
    if tally.unclaimed_elsewhere > 0 {
        _ = writeln!(
            text,
            "  unclaimed at still other places: {} times",
            tally.unclaimed_elsewhere
        );
    }
}

fn name((space, direction): Access) -> &'static str {
    match (space, direction) {
        (Space::Pio, Direction::Read) => "port read",
        (Space::Pio, Direction::Write) => "port write",
        (Space::Mmio, Direction::Read) => "MMIO read",
        (Space::Mmio, Direction::Write) => "MMIO write",
    }
}
