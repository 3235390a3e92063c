//! The lab host's role: prepares the machine in which VMMs are tested, then keeps the agent running and reaps orphans.

use std::fs;
use std::process::Command;

use rustix::process::{WaitOptions, wait};
use rustix::system::RebootCommand;

use crate::system::{self, Result};

/// Runs the lab host's role: PID 1.
pub fn run() -> Result<()> {
    system::mount_at("sysfs", "/sys", "sysfs", "")?;
    system::mount_at("devtmpfs", "/dev", "devtmpfs", "")?;
    system::mount_at("devpts", "/dev/pts", "devpts", "")?;
    system::mount_at("tmpfs", "/dev/shm", "tmpfs", "")?;
    system::mount_at("tmpfs", "/tmp", "tmpfs", "size=90%")?;
    system::mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", "")?;
    system::load_modules()?;
    // A guest may be given more memory than this host has, as long as it does not touch it all.
    system::write("/proc/sys/vm/overcommit_memory", "1")?;
    system::mount_at(
        "share",
        "/share",
        "9p",
        "trans=virtio,version=9p2000.L,msize=512000,cache=none,uname=root",
    )?;
    for path in ["/sbin", "/usr/bin", "/usr/sbin", "/root", "/etc"] {
        fs::create_dir_all(path).map_err(|error| format!("make {path}: {error}"))?;
    }
    let busybox = |args: &[&str]| {
        let said = |error: &dyn std::fmt::Display| format!("busybox {}: {error}", args.join(" "));
        let status =
            Command::new("/bin/busybox").args(args).status().map_err(|error| said(&error))?;
        if status.success() { Ok(()) } else { Err(said(&status)) }
    };
    busybox(&["--install", "-s", "/bin"])?;
    busybox(&["ifconfig", "lo", "up"])?;

    let agent = Command::new("/init")
        .arg("agent")
        .spawn()
        .map_err(|error| format!("start the agent: {error}"))?;
    println!("keel: host up");
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid.as_raw_nonzero().get() == agent.id() as i32 => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("wait for the agent: {error}")),
        }
    }
    system::end(RebootCommand::PowerOff);
    Ok(())
}
