//! What `boot` makes of its command line: every mistake is named, and status 1.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod common;

use common::{Files, boot, need_kvm};

#[test]
fn the_manual_is_complete() {
    let manual = boot("--help").run().with_status(0);
    assert_eq!(manual.stderr, "");
    for part in [
        "Usage: boot",
        "Standard options:",
        "Linux boot:",
        "Devices:",
        "Keys in the terminal",
        "Signals:",
        "Exit status:",
        "Examples:",
    ] {
        assert!(manual.stdout.contains(part), "{part}\n{}", manual.stdout);
    }
    for option in [
        "m",
        "smp",
        "cpu",
        "kernel",
        "initrd",
        "append",
        "serial",
        "chardev",
        "nographic",
        "device",
        "no-reboot",
        "no-shutdown",
        "S",
        "name",
        "pidfile",
        "daemonize",
        "D",
        "d",
        "accel",
        "enable-kvm",
        "machine",
        "doctor",
        "mem-path",
        "mem-prealloc",
        "save",
        "restore",
        "version",
        "help",
    ] {
        let entry = manual.stdout.lines().any(|line| {
            line.starts_with("  -")
                && line.split([' ', ',']).any(|word| word.strip_prefix('-') == Some(option))
        });
        assert!(entry, "-{option} is not in the manual");
    }
    assert_eq!(boot("-h").run().stdout, manual.stdout);
    boot("-version").run().with_status(0).printing(env!("CARGO_PKG_VERSION"));
}

#[test]
fn what_is_asked_for_by_help_is_printed() {
    for (line, words) in [
        ("-cpu help", &["host", "x86-64-v1", "x86-64-v4", "avx2", "smep"][..]),
        ("-cpu ?", &["x86-64-v2"]),
        ("-device help", &["isa-debug-exit", "isa-debugcon", "pvpanic"]),
        ("-device isa-debug-exit,help", &["iobase", "iosize"]),
        ("-machine help", &["pc"]),
        ("-accel help", &["kvm"]),
        ("-d help", &["exits"]),
    ] {
        let ended = boot(line).run().with_status(0);
        assert_eq!(ended.stderr, "", "{line}");
        for word in words {
            assert!(ended.stdout.contains(word), "{line}: no {word} in\n{}", ended.stdout);
        }
    }
}

#[test]
fn the_doctor_examines_the_host() {
    need_kvm();
    let report = boot("-doctor").run().with_status(0);
    for word in ["/dev/kvm", "API version 12", "KVM_CAP_IMMEDIATE_EXIT", "KVM_CAP_IRQCHIP"] {
        assert!(report.stdout.contains(word), "{word}\n{}", report.stdout);
    }
}

#[test]
fn mistakes_are_named() {
    let files = Files::new();
    let text = files.file("notes.txt", b"Dear diary,\ntoday I booted a text file.\n");
    let empty = files.file("empty", b"");
    let zeroes = files.file("zeroes", &[0; 100_000]);
    let huge = files.file("huge", &[0x5a; 3 << 20]);
    let demo = files.guest("demo");
    let image = keel_guests::demo();
    let truncated = files.file("truncated", &image[..image.len() / 2]);
    let header_only = files.file("header", &image[..0x210]);
    let path = |path: &std::path::Path| path.display().to_string();
    let lines = [
        ("-kernal x".into(), vec!["-kernal", "Did you mean -kernel?"]),
        ("-no-rebot".into(), vec!["Did you mean -no-reboot?"]),
        ("--apend x".into(), vec!["Did you mean -append?"]),
        ("-xyzzy".into(), vec!["-xyzzy", "--help"]),
        ("disk.img".into(), vec!["disk.img", "-kernel"]),
        ("-drive file=x".into(), vec!["-drive", "not in this version"]),
        ("-monitor stdio".into(), vec!["-monitor", "not in this version"]),
        ("-kernel".into(), vec!["-kernel needs an argument"]),
        ("-smp 0".into(), vec!["-smp", "at least 1"]),
        ("-smp 256".into(), vec!["-smp", "256"]),
        ("-smp many".into(), vec!["-smp", "many"]),
        ("-smp 4,cores=3".into(), vec!["-smp"]),
        ("-smp 2,coers=2".into(), vec!["-smp", "Did you mean 'cores'?"]),
        ("-m 3K".into(), vec!["-m", "3 KiB", "multiple of 4 KiB"]),
        ("-m 0".into(), vec!["-m", "0 bytes"]),
        ("-m lots".into(), vec!["-m", "'lots'"]),
        ("-m 99999T".into(), vec!["-m", "99999 TiB"]),
        ("-m 99999999999999T".into(), vec!["-m"]),
        ("-cpu nosuch".into(), vec!["-cpu", "nosuch", "-cpu help"]),
        ("-cpu host,+nosuch".into(), vec!["-cpu", "nosuch"]),
        ("-machine q35".into(), vec!["-machine", "q35", "pc"]),
        ("-machine pc,kernel-irqchip=maybe".into(), vec!["kernel-irqchip=maybe"]),
        ("-accel xen".into(), vec!["-accel", "xen", "kvm"]),
        ("-accel tcg".into(), vec!["-accel", "not in this version"]),
        ("-device isa-debug-exti".into(), vec!["-device", "Did you mean 'isa-debug-exit'?"]),
        ("-device isa-debug-exit,iosize=3".into(), vec!["iosize=3"]),
        ("-device isa-debug-exit,iobase=0x10000".into(), vec!["iobase=0x10000"]),
        ("-device isa-debugcon".into(), vec!["isa-debugcon", "chardev=ID"]),
        ("-device isa-debugcon,chardev=a".into(), vec!["id=a"]),
        ("-device isa-debug-exit,iobase=0x3f8".into(), vec!["isa-debug-exit", "serial0"]),
        ("-serial stdio -serial mon:stdio".into(), vec!["-serial", "only one", "terminal"]),
        ("-serial stdoi".into(), vec!["-serial", "stdoi", "mon:stdio"]),
        ("-serial file:/no/such/directory/x".into(), vec!["serial0", "/no/such/directory/x"]),
        ("-serial unix:/no/such/socket".into(), vec!["/no/such/socket"]),
        (
            "-serial null -serial null -serial null -serial null -serial null".into(),
            vec!["4 serial ports"],
        ),
        ("-chardev null,id=a -chardev null,id=a".into(), vec!["-chardev", "id=a", "twice"]),
        ("-chardev file,id=a".into(), vec!["-chardev", "path=PATH"]),
        ("-d nosuch".into(), vec!["-d", "nosuch", "-d help"]),
        ("-D /no/such/directory/log".into(), vec!["/no/such/directory/log"]),
        ("-pidfile /no/such/directory/pid".into(), vec!["/no/such/directory/pid"]),
        ("-restore /no/such/snapshot".into(), vec!["/no/such/snapshot"]),
        ("-initrd x".into(), vec!["-initrd", "-kernel FILE"]),
        ("-kernel /no/such/vmlinuz".into(), vec!["/no/such/vmlinuz", "No such file"]),
        ("-kernel /".into(), vec!["directory"]),
        (format!("-kernel {}", path(&text)), vec!["notes.txt", "looks like text"]),
        (format!("-kernel {}", path(&empty)), vec!["empty"]),
        (format!("-kernel {}", path(&zeroes)), vec!["zeroes", "no Linux or PVH kernel"]),
        (format!("-kernel {}", path(&truncated)), vec!["truncated"]),
        (format!("-kernel {}", path(&header_only)), vec!["header"]),
        (format!("-kernel {} -initrd /no/such/initrd", path(&demo)), vec!["/no/such/initrd"]),
        (format!("-kernel {} -initrd {} -m 2M", path(&demo), path(&huge)), vec!["huge", "-m"]),
        (format!("-kernel {} -m 4K", path(&demo)), vec!["-m"]),
    ];
    need_kvm();
    for (line, words) in &lines {
        let ended = boot(line).run().with_status(1);
        assert!(ended.stderr.starts_with("boot: "), "{line}: {}", ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "{line}: no {word:?} in {}", ended.stderr);
        }
    }
    println!("{} mistakes named", lines.len());
}

#[test]
fn a_truncated_kernel_is_named_wherever_it_is_cut() {
    need_kvm();
    let files = Files::new();
    let image = keel_guests::demo();
    let cuts = [0x1f1, 0x1fe, 0x206, 0x211, 0x264, 0x400, 0x5ff, 0x600, 0x7ff, image.len() - 1];
    for cut in cuts {
        let kernel = files.file("kernel", &image[..cut]);
        boot("").with("-kernel", kernel).run().with_status(1).saying("kernel");
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    need_kvm();
    // Neither output nor messages have a reader: nothing to tell, but no panic.
    for line in ["--help", "-cpu help", "-cpu nosuch", ""] {
        let mut command = boot(line).command();
        let (gone, pipe) = std::io::pipe().unwrap();
        drop(gone);
        command.stdout(pipe.try_clone().unwrap()).stderr(pipe);
        let status = command.status().unwrap();
        let expected = i32::from(line == "-cpu nosuch");
        assert_eq!(status.code(), Some(expected), "boot {line}");
    }
}
