//! The built-in guest, on each kind of machine, and the exit report.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod common;

use common::{Ended, Files, boot, need_kvm};

/// What the guest prints, in this order, on any machine.
const SECTIONS: [&str; 12] = [
    "Hello from the Keel demo guest",
    "Command line",
    "Memory map",
    "Processor",
    "Hypervisor     KVMKVMKVM",
    "Date and time  20",
    "kvmclock",
    "ACPI tables    FACP APIC DSDT",
    "PM timer",
    "Port I/O       bytes strings words doublewords",
    "Memory-mapped",
    "Interrupts     5 ticks of the xAPIC timer, 5 ticks of the x2APIC timer",
];

/// Runs the built-in guest and checks what any machine has in common.
fn demo(arguments: &str) -> Ended {
    need_kvm();
    let ended = boot(arguments).run().with_status(0).saying("boot: the guest powered off");
    let mut rest = ended.stdout.as_str();
    for section in SECTIONS {
        let at = rest.find(section).unwrap_or_else(|| panic!("no {section} in\n{}", ended.stdout));
        rest = &rest[at + section.len()..];
    }
    assert!(rest.contains("All is well. Powering off through ACPI S5."), "{}", ended.stdout);
    assert!(!ended.stdout.contains("FAILED"), "{}", ended.stdout);
    ended
}

#[test]
fn without_an_option() {
    let ended = demo("")
        .printing("127 MiB of RAM")
        .printing("I/O APIC version 0x11 with 24 pins")
        .printing("of the PIT, an MSI");
    for (device, access) in [
        ("acpi-pm", "port read"),
        ("acpi-pm", "port write"),
        ("keel-msi-test", "port write"),
        ("reset-register", "port read"),
        ("rtc", "port read"),
        ("serial0", "port write"),
    ] {
        let row = ended
            .stderr
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .find(|row| row.starts_with(&format!("{device} {access} ")))
            .unwrap_or_else(|| panic!("no {device}, {access} in\n{}", ended.stderr));
        let count: u64 = row.split(' ').nth(3).unwrap().parse().unwrap();
        assert!(count > 0, "{row}");
        assert!(row.ends_with('%'), "{row}");
    }
    for place in
        ["port 0x0cf8 read once", "port 0x05d8 written once", "address 0xfed00000 read once"]
    {
        assert!(ended.stderr.contains(&format!("unclaimed {place}")), "{place}\n{}", ended.stderr);
    }
}

#[test]
fn with_only_the_local_apics_in_the_kernel() {
    for arguments in ["-machine kernel-irqchip=split", "-accel kvm,kernel-irqchip=split -smp 2"] {
        demo(arguments).printing("no PIT, an MSI").printing("I/O APIC version 0x20 with 24 pins");
    }
}

#[test]
fn on_other_machines() {
    demo("-smp 2").saying("exit report: 2 CPUs");
    demo("-smp 4,sockets=1,cores=2,threads=2").saying("exit report: 4 CPUs");
    // Over the hole under 4 GiB.
    demo("-m 4G").printing("0x000100000000 - 0x00013fffffff RAM").printing("4095 MiB of RAM");
    demo("-m 16 -mem-prealloc").printing("15 MiB of RAM");
    demo("-cpu x86-64-v2");
    demo("-cpu x86-64-v1,vendor=AuthenticAMD").printing("Processor      AuthenticAMD");
    demo("-enable-kvm -nographic -no-reboot -name demo");
}

#[test]
fn the_command_line_reaches_the_guest() {
    let ended = boot("").with("-append", "tea and  \"biscuits\"").run().with_status(0);
    assert!(ended.stdout.contains("Command line   tea and  \"biscuits\""), "{}", ended.stdout);
}

#[test]
fn ram_in_files() {
    let files = Files::new();
    demo(&format!("-mem-path {}", files.path("").display()));
    assert_eq!(files.names(), [""; 0], "a temporary file is left");
    let file = files.path("ram");
    demo(&format!("-m 64 -mem-path {}", file.display())).printing("63 MiB of RAM");
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 64 << 20);
}

#[test]
fn as_a_kernel_it_reports_only_if_asked() {
    let files = Files::new();
    let kernel = files.guest("demo");
    let quiet = boot("-device keel-msi-test").with("-kernel", &kernel).run().with_status(0);
    assert_eq!(quiet.stderr, "boot: the guest powered off\n");
    assert!(quiet.stdout.contains("All is well"), "{}", quiet.stdout);

    let log = files.path("log");
    let logged = boot("-device keel-msi-test -d exits")
        .with("-kernel", &kernel)
        .with("-D", &log)
        .run()
        .with_status(0);
    assert_eq!(logged.stderr, quiet.stderr, "the log is elsewhere");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.starts_with("exit report: 1 CPUs"), "{log}");
    assert!(log.contains("serial0") && log.contains("unclaimed port 0x0cf8 read once"), "{log}");
}

#[test]
fn a_doorbell_that_is_not_there_is_said_to_be_missing() {
    let files = Files::new();
    let ended = boot("").with("-kernel", files.guest("demo")).run();
    assert!(ended.stdout.contains("of the PIT, no MSI test device"), "{}", ended.stdout);
}
