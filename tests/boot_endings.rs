//! How guests end, and that `boot` tells it apart in words and status.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod common;

use common::code::{HALT, TRIPLE_FAULT, out_byte, out_word, power_off, reset, say};
use common::{Boot, Files, boot, need_kvm};
use nix::sys::signal::Signal;

/// A kernel of a few instructions under `boot`.
fn run(files: &Files, code: &[u8], arguments: &str) -> Boot {
    need_kvm();
    boot(arguments).with("-kernel", files.code("kernel", code))
}

#[test]
fn power_off_is_status_0() {
    let files = Files::new();
    let ended = run(&files, &power_off(), "").run().with_status(0);
    assert_eq!(ended.stderr, "boot: the guest powered off\n");
}

#[test]
fn isa_debug_exit_gives_the_status() {
    let files = Files::new();
    for (value, status) in [(0u16, 1), (1, 3), (42, 85), (127, 255)] {
        let code = [&out_word(0xf4, value)[..], HALT].concat();
        run(&files, &code, "-device isa-debug-exit,iobase=0xf4,iosize=4")
            .run()
            .with_status(status)
            .saying(&format!("wrote {value:#x} to isa-debug-exit"));
    }
    // Where it is not asked for, it is not there.
    let code = [out_word(0x501, 42), power_off()].concat();
    run(&files, &code, "").run().with_status(0);
}

#[test]
fn a_reset_starts_the_guest_again() {
    let files = Files::new();
    let keyboard = [&out_byte(0x64, 0xfe)[..], HALT].concat();
    for code in [reset(), keyboard] {
        run(&files, &code, "-no-reboot").run().with_status(3).saying("reset itself (-no-reboot)");
    }
    let running = run(&files, &say("again\n", &reset()), "").start();
    running.stdout.wait_for("again\nagain\nagain\nagain\nagain\nagain\n");
    running.signal(Signal::SIGTERM);
    running.end().with_status(0).saying("ended by SIGTERM");
}

#[test]
fn a_triple_fault_resets_or_is_shown() {
    let files = Files::new();
    let ended = run(&files, TRIPLE_FAULT, "-no-reboot").run().with_status(5);
    for words in ["triple fault (-no-reboot)", "RIP=", "CR0=", "CODE at", " 0f 0b"] {
        assert!(ended.stderr.contains(words), "no {words:?} in\n{}", ended.stderr);
    }
    for machine in ["", "-machine kernel-irqchip=split"] {
        let running = run(&files, &say("once more\n", TRIPLE_FAULT), machine).start();
        running.stdout.wait_for("once more\nonce more\nonce more\n");
        running.signal(Signal::SIGINT);
        running.end().with_status(0).saying("ended by SIGINT");
    }
}

#[test]
fn a_panic_is_status_4() {
    let files = Files::new();
    let panicked = 1;
    let code = [&out_byte(0x505, panicked)[..], HALT].concat();
    run(&files, &code, "").run().with_status(4).saying("kernel panicked");
    run(&files, &code, "-device pvpanic").run().with_status(4);
    // A crash kernel deals with it and powers off.
    let crash_loaded = 2;
    let code = [out_byte(0x505, crash_loaded), power_off()].concat();
    run(&files, &code, "").run().with_status(0).saying("powered off");
}

#[test]
fn no_shutdown_keeps_the_program() {
    let files = Files::new();
    let mut running = run(&files, &say("off\n", &power_off()), "-no-shutdown").start();
    running.stderr.wait_for("the guest powered off (-no-shutdown)");
    assert!(running.process.is_running());
    running.signal(Signal::SIGTERM);
    let ended = running.end().with_status(0).saying("ended by SIGTERM");
    assert_eq!(ended.stdout, "off\n", "the guest ran once");
}

#[test]
fn guests_that_ask_for_much_at_once_end_once() {
    let files = Files::new();
    // Power off, reset and exit right after each other: the first counts.
    let code = [power_off(), reset(), out_word(0x501, 3)].concat();
    run(&files, &code, "-no-reboot -device isa-debug-exit").run().with_status(0);
    let exit = [&out_word(0x501, 3)[..], HALT].concat();
    for _ in 0..20 {
        run(&files, &exit, "-device isa-debug-exit -smp 4").run().with_status(7);
    }
}
