//! The guest's role: does, in order, each word of the kernel command line's `keel.do=word,word,…`.
//!
//! Every result is one line, `keel: WHAT VALUE`, on the console. Words:
//!
//! | word | what it does |
//! |---|---|
//! | `cpus` | counts the online CPUs |
//! | `memory` | fills `keel.memory=` bytes (K, M, G; 16M without it) with a pattern, reads it back and compares |
//! | `clock` | names the clock source |
//! | `timers` | 20 sleeps on every CPU: never early, the clock never backwards; says the worst lateness |
//! | `rtc`, `wall` | the RTC's and the system's time, in seconds since the epoch |
//! | `dmesg` | every kernel message of level error or worse, and their number |
//! | `checksum-loop` | for ever: one thread a CPU rewrites and verifies memory; heartbeats; `CORRUPT` if ever wrong |
//! | `ask` | does the words read from the console, one a line, until one of them ends the machine |
//! | `shell` | an interactive `sh`, if the initrd has busybox; power-off after it |
//! | `reboot`, `poweroff`, `halt` | that |
//! | `panic` | a kernel panic by SysRq |
//! | `triple-fault` | a reboot by triple fault |
//!
//! Without `keel.do=` it is `shell` where there is busybox, else `cpus,memory,clock,timers,dmesg,poweroff`.

use std::io::BufRead;
use std::path::Path;
use std::process::Command;

use rustix::system::RebootCommand;

use crate::system::{self, CommandLine, Result};
use crate::{checks, checksum};

const BUSYBOX: &str = "/bin/busybox";
const CONSOLE_LEVELS: &str = "/proc/sys/kernel/printk";

/// Runs the guest's role: PID 1 of a machine under test.
pub fn run() -> Result<()> {
    let command_line = CommandLine::read();
    system::mount_at("sysfs", "/sys", "sysfs", "")?;
    system::mount_at("devtmpfs", "/dev", "devtmpfs", "")?;
    let uptime = system::read("/proc/uptime")?;
    // The kernel writes its messages to the UART itself, in the midst of a line of ours: it is silenced until the end.
    let levels = system::read(CONSOLE_LEVELS)?;
    system::write(CONSOLE_LEVELS, "1")?;
    println!("keel: init {}", uptime.split(' ').next().unwrap_or_default());
    system::load_modules()?;

    let default = if Path::new(BUSYBOX).exists() {
        "shell"
    } else {
        "cpus,memory,clock,timers,dmesg,poweroff"
    };
    for word in command_line.get("keel.do").unwrap_or(default).split(',') {
        act(word, &command_line, &levels)?;
    }
    println!("keel: done");
    end(RebootCommand::PowerOff, &levels);
    Ok(())
}

fn act(word: &str, command_line: &CommandLine, levels: &str) -> Result<()> {
    match word {
        "cpus" => println!("keel: cpus {}", checks::cpus()?),
        "memory" => checks::memory(size(command_line, 16 << 20)?)?,
        "clock" => println!("keel: clocksource {}", checks::clocksource()?),
        "timers" => checks::timers()?,
        "rtc" => println!("keel: rtc {}", system::read("/sys/class/rtc/rtc0/since_epoch")?),
        "wall" => println!("keel: wall {}", checks::wall()?),
        "dmesg" => checks::dmesg()?,
        "checksum-loop" => checksum::run(size(command_line, 2 << 20)?)?,
        "ask" => ask(command_line, levels)?,
        "shell" => shell(levels)?,
        "reboot" => end(RebootCommand::Restart, levels),
        "poweroff" => end(RebootCommand::PowerOff, levels),
        "halt" => end(RebootCommand::Halt, levels),
        "panic" => {
            system::write(CONSOLE_LEVELS, levels)?;
            system::drain();
            system::write("/proc/sysrq-trigger", "c")?;
        }
        "triple-fault" => {
            system::write("/sys/kernel/reboot/type", "triple")?;
            end(RebootCommand::Restart, levels);
        }
        other => return Err(format!("keel.do= has no word {other:?}")),
    }
    Ok(())
}

fn ask(command_line: &CommandLine, levels: &str) -> Result<()> {
    println!("keel: ask");
    for line in std::io::stdin().lock().lines() {
        act(
            line.map_err(|error| format!("read the console: {error}"))?.trim(),
            command_line,
            levels,
        )?;
        println!("keel: ask");
    }
    Err("the console gave end of file".into())
}

/// A shell as a child and not in place of PID 1, so that its exit is a power-off and not a kernel panic.
fn shell(levels: &str) -> Result<()> {
    let said = |error: &dyn std::fmt::Display| format!("run {BUSYBOX}: {error}");
    Command::new(BUSYBOX)
        .args(["--install", "-s", "/bin"])
        .status()
        .map_err(|error| said(&error))?;
    system::write(CONSOLE_LEVELS, levels)?;
    println!("keel: shell");
    // /dev/console cannot be a controlling terminal, so that Ctrl-C needs the tty behind it by its own name.
    let active = system::read("/sys/class/tty/console/active")?;
    let console = format!("/dev/{}", active.split(' ').next_back().unwrap_or("console"));
    let open = || {
        std::fs::File::options().read(true).write(true).open(&console).map_err(|error| said(&error))
    };
    Command::new(BUSYBOX)
        .args(["setsid", "-c", "sh", "-i"])
        .env("PATH", "/bin:/sbin:/usr/bin")
        .env("HOME", "/")
        .env("TERM", "linux")
        .stdin(open()?)
        .stdout(open()?)
        .stderr(open()?)
        .status()
        .map_err(|error| said(&error))?;
    end(RebootCommand::PowerOff, levels);
    Ok(())
}

fn end(how: RebootCommand, levels: &str) {
    system::drain();
    // The kernel's last words belong on the console again.
    let _ = system::write(CONSOLE_LEVELS, levels);
    system::end(how);
}

/// `keel.memory=` in bytes.
fn size(command_line: &CommandLine, default: usize) -> Result<usize> {
    let Some(text) = command_line.get("keel.memory") else { return Ok(default) };
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits
        .parse::<usize>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| format!("keel.memory={text} is not a size such as 64M"))
}
