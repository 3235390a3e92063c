//! The whole state of a running Linux: saved, killed and restored in new processes, and paged out under it.

use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::machine::{Machine, STEP};
use super::{Lab, Scenario};
use crate::lab::host::Session;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "save-kill-restore",
        shows: "20 times at random points: saved to a file, the process ended, restored in a new one; the guest's checksums hold",
        ours_only: true,
        run: save_kill_restore,
    },
    Scenario {
        name: "paged-out",
        shows: "the guest's RAM goes to swap in mid-run and the guest goes on; nothing is locked (VmLck 0)",
        ours_only: true,
        run: paged_out,
    },
];

/// Waits for the next heartbeat and gives its number.
fn heartbeat(guest: &mut Session) -> Result<u64> {
    let line = guest.expect("keel: heartbeat", STEP)?;
    ensure!(
        !guest.text().contains("CORRUPT"),
        "the guest found its memory wrong; {}",
        guest.tail()
    );
    let number = line.split_whitespace().find_map(|word| word.parse().ok());
    number.with_context(|| format!("no number in {line:?}"))
}

fn save_kill_restore(lab: &mut Lab) -> Result<String> {
    const FILE: &str = "/tmp/saved";
    let mut machine = Machine::small("keel.do=checksum-loop keel.memory=1M");
    machine.cpus = 2;
    machine.options = format!("-save {FILE}");
    let mut guest = lab.boot(&machine)?;
    // Printed, so that a failure can be looked at again with the same points.
    let mut random =
        SystemTime::now().duration_since(UNIX_EPOCH).context("read the time")?.as_nanos() as u64;
    let seed = random;
    let rounds = if lab.long { 100 } else { 20 };
    let (mut last, mut slowest) = (0, Duration::ZERO);
    for round in 1..=rounds {
        let beat = heartbeat(&mut guest)?;
        ensure!(beat > last, "round {round} (seed {seed}): heartbeat {beat} after {last}");
        last = beat;
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        sleep(Duration::from_millis((random >> 33) % 700));
        let begun = Instant::now();
        guest.signal(Signal::USR1)?;
        let status =
            guest.wait(STEP).with_context(|| format!("round {round} (seed {seed}): save"))?;
        ensure!(
            status == 0,
            "round {round} (seed {seed}): saving ended with status {status}; {}",
            guest.tail()
        );
        // What the guest said last was on its way while it was saved.
        let said = guest.text().lines().rfind(|line| line.starts_with("keel: heartbeat"));
        last = said.and_then(|line| line.split_whitespace().nth(2)?.parse().ok()).unwrap_or(last);
        let mut restored = machine.clone();
        restored.options += &format!(" -restore {FILE}");
        guest = lab.host.start(&restored.command(lab.vmm, &lab.files), None)?;
        heartbeat(&mut guest)
            .with_context(|| format!("round {round} (seed {seed}): after the restore"))?;
        slowest = slowest.max(begun.elapsed());
    }
    guest.signal(Signal::TERM)?;
    let status = guest.wait(STEP)?;
    ensure!(status == 0, "SIGTERM ended with status {status}");
    lab.shell(&format!("rm -f {FILE}"))?;
    Ok(format!(
        "{rounds} rounds, seed {seed}, slowest from signal to the next heartbeat {:.1} s",
        slowest.as_secs_f64()
    ))
}

fn paged_out(lab: &mut Lab) -> Result<String> {
    const GROUP: &str = "/sys/fs/cgroup/paged";
    lab.shell(
        "[ -e /swap-is-on ] || { echo 1G > /sys/block/zram0/disksize && mkswap /dev/zram0 && swapon /dev/zram0 && \
         touch /swap-is-on; }; echo +memory > /sys/fs/cgroup/cgroup.subtree_control",
    )?;
    let mut machine = Machine::small("keel.do=checksum-loop keel.memory=96M");
    machine.memory = "512";
    let command = machine.command(lab.vmm, &lab.files);
    let command = format!("mkdir -p {GROUP} && echo $$ > {GROUP}/cgroup.procs && {command}");
    let mut guest = lab.host.start(&command, None)?;
    heartbeat(&mut guest)?;
    let pid = lab.vmm_pid()?;
    // What can be reclaimed is less than asked for, and the kernel then says EAGAIN: the swap in use is what is judged.
    lab.shell(&format!("echo 150M > {GROUP}/memory.reclaim || true"))?;
    let field = |lab: &mut Lab, name: &str| -> Result<u64> {
        let line = lab.shell(&format!("grep ^{name}: /proc/{pid}/status"))?;
        line.split_whitespace()
            .nth(1)
            .and_then(|word| word.parse().ok())
            .with_context(|| format!("{name}: {line:?}"))
    };
    // The guest fetches what it works on back at once, so that what is in swap now is only a part of what went there.
    let pages = |lab: &mut Lab, name: &str| -> Result<u64> {
        let line = lab.shell(&format!("grep '^{name} ' /proc/vmstat"))?;
        line.split_whitespace()
            .nth(1)
            .and_then(|word| word.parse().ok())
            .with_context(|| format!("{name}: {line:?}"))
    };
    let locked = field(lab, "VmLck")?;
    ensure!(locked == 0, "{locked} KiB are locked");
    for _ in 0..3 {
        heartbeat(&mut guest)?;
    }
    let (out, back) = (pages(lab, "pswpout")? >> 8, pages(lab, "pswpin")? >> 8);
    ensure!(out >= 64, "only {out} MiB went to swap");
    ensure!(back >= 16, "only {back} MiB came back: the guest's working memory was not paged out");
    guest.signal(Signal::TERM)?;
    let status = guest.wait(STEP)?;
    lab.shell(&format!("rmdir {GROUP}"))?;
    ensure!(status == 0, "SIGTERM ended with status {status}");
    Ok(format!("{out} MiB went to swap, {back} MiB came back to the running guest, VmLck 0"))
}
