//! `boot` on a terminal: keys, signals, and the mode it leaves behind.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod common;

use std::time::{Duration, Instant};

use common::code::{ECHO, FLOOD, HALT, power_off, say};
use common::pty::Terminal;
use common::{Files, boot, need_kvm, send, wait_until};
use nix::sys::signal::Signal;
use nix::sys::termios::LocalFlags;

/// Ending is a matter of milliseconds; this much is for a busy machine.
const SOON: Duration = Duration::from_secs(5);

#[test]
fn signals_end_the_guest_and_give_the_terminal_back() {
    need_kvm();
    let files = Files::new();
    let kernel = files.code("kernel", &say("ready\n", HALT));
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let terminal = Terminal::new();
        let before = terminal.mode();
        let output = terminal.output();
        let mut process = terminal.start(boot("-smp 2").with("-kernel", &kernel));
        output.wait_for("ready");
        assert!(!terminal.mode().local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO));
        let begin = Instant::now();
        process.signal(signal);
        assert_eq!(process.wait().code(), Some(0), "{}", output.text());
        assert!(begin.elapsed() < SOON);
        assert_eq!(terminal.mode(), before, "{signal}");
        output.wait_for(&format!("boot: ended by {signal}"));
    }
}

#[test]
fn every_way_to_end_gives_the_terminal_back() {
    need_kvm();
    let files = Files::new();
    let panic = common::code::out_byte(0x505, 1);
    for (code, status) in [
        (power_off(), 0),
        (common::code::reset(), 3),
        (common::code::TRIPLE_FAULT.to_vec(), 5),
        ([&panic[..], HALT].concat(), 4),
    ] {
        let terminal = Terminal::new();
        let before = terminal.mode();
        let output = terminal.output();
        let mut process =
            terminal.start(boot("-no-reboot").with("-kernel", files.code("kernel", &code)));
        assert_eq!(process.wait().code(), Some(status), "{}", output.text());
        assert_eq!(terminal.mode(), before);
    }
    // Mistakes that are found once the terminal is in use.
    let terminal = Terminal::new();
    let before = terminal.mode();
    let mut process = terminal.start(boot("-serial mon:stdio -restore /no/such/snapshot"));
    assert_eq!(process.wait().code(), Some(1));
    assert_eq!(terminal.mode(), before);
}

#[test]
fn keys_after_ctrl_a_are_the_programs() {
    need_kvm();
    let files = Files::new();
    let terminal = Terminal::new();
    let before = terminal.mode();
    let output = terminal.output();
    let mut process = terminal.start(boot("-kernel").arg(files.code("kernel", ECHO)));
    output.wait_for(">");
    terminal.send(b"tea");
    output.wait_for(">tea");
    terminal.send(b"\x01h");
    for line in ["Ctrl-A h", "Ctrl-A x    end the guest"] {
        output.wait_for(line);
    }
    // Ctrl-C is the guest's, and a doubled Ctrl-A one Ctrl-A.
    terminal.send(b"(\x03\x01\x01\r)");
    output.wait_for("(\x03\x01\r)");
    assert!(process.is_running());
    terminal.send(b"\x01");
    terminal.send(b"x");
    assert_eq!(process.wait().code(), Some(0));
    assert_eq!(terminal.mode(), before);
    output.wait_for("boot: ended by Ctrl-A x");
}

#[test]
fn without_mon_keys_are_the_guests() {
    need_kvm();
    let files = Files::new();
    let kernel = files.code("kernel", ECHO);
    let terminal = Terminal::new();
    let output = terminal.output();
    let mut process = terminal.start(boot("-serial stdio").with("-kernel", kernel));
    output.wait_for(">");
    terminal.send(b"\x01x.");
    output.wait_for("\x01x.");
    assert!(process.is_running());
    // Signal keys are the terminal's, as in QEMU.
    assert!(terminal.mode().local_flags.contains(LocalFlags::ISIG));
    process.signal(Signal::SIGTERM);
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn a_terminal_that_a_kill_left_raw_is_usable_after_the_next_run() {
    need_kvm();
    let files = Files::new();
    let terminal = Terminal::new();
    let output = terminal.output();
    assert!(terminal.is_sane());
    let waiting = boot("").with("-kernel", files.code("waiting", &say("ready\n", HALT)));
    let mut process = terminal.start(waiting);
    output.wait_for("ready");
    process.signal(Signal::SIGKILL);
    process.wait();
    assert!(!terminal.is_sane(), "nothing can give it back after SIGKILL");
    let mut process = terminal.start(boot("").with("-kernel", files.code("ending", &power_off())));
    assert_eq!(process.wait().code(), Some(0));
    assert!(terminal.is_sane());
}

#[test]
fn a_terminal_that_is_gone_is_a_clean_end() {
    need_kvm();
    let files = Files::new();
    let terminal = Terminal::new();
    let kernel = files.code("kernel", FLOOD);
    let mut process = terminal.start(boot("").with("-kernel", kernel));
    wait_until("the terminal is raw", || (!terminal.is_sane()).then_some(()));
    // The guest floods a terminal that no longer is there; then whoever hung up says so.
    drop(terminal);
    process.signal(Signal::SIGHUP);
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn signals_end_a_guest_whose_output_nobody_reads() {
    need_kvm();
    let files = Files::new();
    let kernel = files.code("kernel", FLOOD);
    for before in [&[][..], &[Signal::SIGCONT], &[Signal::SIGUSR1, Signal::SIGCONT]] {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut command = boot("").with("-kernel", &kernel).command();
        command.stdout(writer).stderr(std::process::Stdio::null());
        let mut process = common::Process(command.spawn().unwrap());
        drop(command);
        wait_until_idle(&process);
        for signal in before {
            process.signal(*signal);
            std::thread::sleep(Duration::from_millis(50));
            assert!(process.is_running());
        }
        let begin = Instant::now();
        process.signal(Signal::SIGTERM);
        let status = process.wait();
        assert_eq!(status.code(), Some(0), "after {before:?}");
        assert!(begin.elapsed() < SOON, "after {before:?}: {:?}", begin.elapsed());
        drop(reader);
    }
}

#[test]
fn signals_end_a_guest_on_a_terminal_nobody_reads() {
    need_kvm();
    let files = Files::new();
    let terminal = Terminal::new();
    let before = terminal.mode();
    let kernel = files.code("kernel", FLOOD);
    let mut process = terminal.start(boot("").with("-kernel", kernel));
    wait_until_idle(&process);
    process.signal(Signal::SIGTERM);
    assert_eq!(process.wait().code(), Some(0));
    assert_eq!(terminal.mode(), before);
}

#[test]
fn a_save_waits_for_no_reader() {
    need_kvm();
    let files = Files::new();
    let kernel = files.code("kernel", FLOOD);
    let (_reader, writer) = std::io::pipe().unwrap();
    let snapshot = files.path("snapshot");
    let mut command = boot("").with("-kernel", &kernel).with("-save", &snapshot).command();
    command.stdout(writer).stderr(std::process::Stdio::null());
    let mut process = common::Process(command.spawn().unwrap());
    wait_until_idle(&process);
    process.signal(Signal::SIGUSR1);
    assert_eq!(process.wait().code(), Some(0));
    assert!(snapshot.exists());
}

#[test]
fn a_pipe_is_input_too() {
    need_kvm();
    let files = Files::new();
    let mut command = boot("").with("-kernel", files.code("kernel", ECHO)).command();
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    command.stderr(std::process::Stdio::piped());
    let mut process = common::Process(command.spawn().unwrap());
    let mut input = process.0.stdin.take().unwrap();
    let mut output = common::Stream::of(process.0.stdout.take().unwrap());
    output.wait_for(">");
    // More than the port's FIFO holds, in order and whole.
    let line: String = (0..500).map(|number| format!("{number} ")).collect();
    send(&mut input, line.as_bytes());
    output.wait_for(&line);
    drop(input);
    std::thread::sleep(Duration::from_millis(50));
    assert!(process.is_running(), "the end of the input is not the guest's");
    process.signal(Signal::SIGTERM);
    assert_eq!(process.wait().code(), Some(0));
    output.end();
}

/// Waits until a guest that floods its output has filled what takes it: its CPU waits, and uses no time.
fn wait_until_idle(process: &common::Process) {
    let mut last = u64::MAX;
    wait_until("the output is full", || {
        std::thread::sleep(Duration::from_millis(60));
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        (ticks > 0 && std::mem::replace(&mut last, ticks) == ticks).then_some(())
    });
}
