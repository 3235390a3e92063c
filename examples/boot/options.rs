//! The command line: QEMU's words, one table for parsing and for the manual.

use std::path::PathBuf;

use crate::words::{self, Words, nearest};

/// What a parsed command line asks for.
#[derive(Clone, Debug)]
pub struct Options {
    pub accel: Words,
    pub machine: Words,
    pub cpu: String,
    pub smp: Words,
    pub memory: Words,
    pub mem_path: Option<PathBuf>,
    pub mem_prealloc: bool,
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub append: String,
    pub serials: Vec<String>,
    pub chardevs: Vec<Words>,
    pub devices: Vec<Words>,
    pub nographic: bool,
    pub no_reboot: bool,
    pub no_shutdown: bool,
    pub stopped: bool,
    pub name: String,
    pub pidfile: Option<PathBuf>,
    pub daemonize: bool,
    pub log_file: Option<PathBuf>,
    pub log: Vec<String>,
    pub save: Option<PathBuf>,
    pub restore: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            accel: Words::default(),
            machine: Words::default(),
            cpu: "host".into(),
            smp: Words::default(),
            memory: Words::default(),
            mem_path: None,
            mem_prealloc: false,
            kernel: None,
            initrd: None,
            append: String::new(),
            serials: Vec::new(),
            chardevs: Vec::new(),
            devices: Vec::new(),
            nographic: false,
            no_reboot: false,
            no_shutdown: false,
            stopped: false,
            name: "keel".into(),
            pidfile: None,
            daemonize: false,
            log_file: None,
            log: Vec::new(),
            save: None,
            restore: None,
        }
    }
}

/// What the command line comes to.
pub enum Command {
    /// Run a guest.
    Run(Box<Options>),
    /// Print the manual.
    Help,
    /// Print the version.
    Version,
    /// Examine the host.
    Doctor,
}

/// One option: its names without dashes, its argument, its place and text in the manual, and what it does.
struct Entry {
    names: &'static [&'static str],
    argument: Option<&'static str>,
    group: &'static str,
    text: &'static str,
    apply: fn(&mut Options, String) -> Result<(), String>,
}

const fn flag(
    names: &'static [&'static str],
    group: &'static str,
    text: &'static str,
    apply: fn(&mut Options, String) -> Result<(), String>,
) -> Entry {
    Entry { names, argument: None, group, text, apply }
}

const fn with(
    names: &'static [&'static str],
    argument: &'static str,
    group: &'static str,
    text: &'static str,
    apply: fn(&mut Options, String) -> Result<(), String>,
) -> Entry {
    Entry { names, argument: Some(argument), group, text, apply }
}

const STANDARD: &str = "Standard options";
const GUEST: &str = "Linux boot";
const CHARACTER: &str = "Character devices and serial ports";
const DEVICES: &str = "Devices";
const RUNNING: &str = "How the guest runs and ends";
const PROCESS: &str = "The process";
const DEBUG: &str = "Debugging";

const TABLE: &[Entry] = &[
    flag(&["help", "h"], STANDARD, "print this manual", |_, _| Ok(())),
    flag(&["version"], STANDARD, "print the version", |_, _| Ok(())),
    flag(
        &["doctor"],
        STANDARD,
        "examine this host: processor, modules, /dev/kvm, every capability used; say what to do",
        |_, _| Ok(()),
    ),
    with(
        &["machine", "M"],
        "[type=]pc[,kernel-irqchip=on|split][,mem-merge=on|off]",
        STANDARD,
        "the machine. kernel-irqchip=split keeps only the local APICs in the kernel; mem-merge (default on) lets the host share equal pages (KSM). 'help' lists machines",
        |options, value| Words::parse_type(&value, "type").map(|words| options.machine = words),
    ),
    with(
        &["accel"],
        "kvm[,kernel-irqchip=on|split]",
        STANDARD,
        "what runs the CPUs. 'help' lists what there is and whether this host can do it",
        |options, value| Words::parse_type(&value, "accel").map(|words| options.accel = words),
    ),
    flag(&["enable-kvm"], STANDARD, "the same as -accel kvm, which is the default", |_, _| Ok(())),
    with(
        &["cpu"],
        "MODEL[,+FEATURE][,-FEATURE]",
        STANDARD,
        "the CPU: host (default), x86-64-v1 to x86-64-v4, and features to add or take away. 'help' lists all",
        |options, value| {
            options.cpu = value;
            Ok(())
        },
    ),
    with(
        &["smp"],
        "[cpus=]N[,sockets=S][,cores=C][,threads=T]",
        STANDARD,
        "number of CPUs, 1 to 255 (default 1), and how they are arranged",
        |options, value| Words::parse_type(&value, "cpus").map(|words| options.smp = words),
    ),
    with(
        &["m", "memory"],
        "[size=]SIZE",
        STANDARD,
        "RAM: in MiB, or with a suffix K, M, G or T (default 128M)",
        |options, value| Words::parse_type(&value, "size").map(|words| options.memory = words),
    ),
    with(
        &["mem-path"],
        "PATH",
        STANDARD,
        "back RAM by a file, or by a temporary one in a directory (a hugetlbfs mount for huge pages)",
        |options, value| {
            options.mem_path = Some(value.into());
            Ok(())
        },
    ),
    flag(&["mem-prealloc"], STANDARD, "allocate all RAM at the start", |options, _| {
        options.mem_prealloc = true;
        Ok(())
    }),
    with(&["name"], "NAME", STANDARD, "the guest's name (default keel)", |options, value| {
        options.name =
            value.split(',').next().unwrap_or_default().trim_start_matches("guest=").into();
        Ok(())
    }),
    with(
        &["kernel"],
        "FILE",
        GUEST,
        "the kernel: a bzImage (vmlinuz) or an ELF file (vmlinux, PVH). Without it a small built-in guest runs, which shows the machine it finds",
        |options, value| {
            options.kernel = Some(value.into());
            Ok(())
        },
    ),
    with(&["initrd"], "FILE", GUEST, "the initial RAM disk", |options, value| {
        options.initrd = Some(value.into());
        Ok(())
    }),
    with(&["append"], "TEXT", GUEST, "the kernel's command line", |options, value| {
        options.append = value;
        Ok(())
    }),
    with(
        &["serial"],
        "DEV",
        CHARACTER,
        "a serial port, up to four: stdio, mon:stdio, file:PATH, pty, unix:PATH[,server=on][,wait=off], null, none, chardev:ID. Without one the first is mon:stdio",
        |options, value| {
            options.serials.push(value);
            Ok(())
        },
    ),
    with(
        &["chardev"],
        "stdio|file|pty|socket|null,id=ID[,mux=on][,signal=off][,path=PATH][,server=on][,wait=off]",
        CHARACTER,
        "a character device, for -serial chardev:ID and -device isa-debugcon,chardev=ID",
        |options, value| {
            Words::parse_type(&value, "backend").map(|words| options.chardevs.push(words))
        },
    ),
    flag(
        &["nographic"],
        CHARACTER,
        "the first serial port on the terminal, where Ctrl-A x ends the guest and Ctrl-A h lists the other keys. There is no screen, so this is the default",
        |options, _| {
            options.nographic = true;
            Ok(())
        },
    ),
    with(
        &["device"],
        "NAME[,PROPERTY=VALUE...]",
        DEVICES,
        "a device. 'help' lists them, 'NAME,help' a device's properties",
        |options, value| {
            Words::parse_type(&value, "driver").map(|words| options.devices.push(words))
        },
    ),
    flag(&["no-reboot"], RUNNING, "end when the guest resets", |options, _| {
        options.no_reboot = true;
        Ok(())
    }),
    flag(
        &["no-shutdown"],
        RUNNING,
        "stop, and do not end, when the guest powers off",
        |options, _| {
            options.no_shutdown = true;
            Ok(())
        },
    ),
    flag(&["S"], RUNNING, "do not start the CPUs; SIGCONT starts them", |options, _| {
        options.stopped = true;
        Ok(())
    }),
    with(
        &["save"],
        "FILE",
        RUNNING,
        "on SIGUSR1 stop the guest, write all its state to FILE and end with status 0 (Keel's own, until the monitor has migrate)",
        |options, value| {
            options.save = Some(value.into());
            Ok(())
        },
    ),
    with(
        &["restore"],
        "FILE",
        RUNNING,
        "start from the state in FILE, with the same options as then",
        |options, value| {
            options.restore = Some(value.into());
            Ok(())
        },
    ),
    with(
        &["pidfile"],
        "FILE",
        PROCESS,
        "write the process number to FILE, and remove it at the end",
        |options, value| {
            options.pidfile = Some(value.into());
            Ok(())
        },
    ),
    flag(
        &["daemonize"],
        PROCESS,
        "go to the background once the guest is ready to run",
        |options, _| {
            options.daemonize = true;
            Ok(())
        },
    ),
    with(
        &["D"],
        "FILE",
        DEBUG,
        "write the log to FILE instead of standard error",
        |options, value| {
            options.log_file = Some(value.into());
            Ok(())
        },
    ),
    with(
        &["d"],
        "ITEM[,ITEM...]",
        DEBUG,
        "what to log. exits: at the end, how many exits there were of each kind and device and their share of the time, and what the guest touched that is not there. 'help' lists items",
        |options, value| {
            options.log.extend(value.split(',').map(str::to_owned));
            Ok(())
        },
    ),
];

/// Options of QEMU that there may be some day; asking for one says so instead of guessing at a typing error.
const NOT_YET: &[(&str, &str)] = &[
    ("boot", "firmware is"),
    ("cdrom", "disks are"),
    ("drive", "disks are"),
    ("blockdev", "disks are"),
    ("hda", "disks are"),
    ("hdb", "disks are"),
    ("hdc", "disks are"),
    ("hdd", "disks are"),
    ("netdev", "networks are"),
    ("nic", "networks are"),
    ("net", "networks are"),
    ("monitor", "the monitor is"),
    ("qmp", "the monitor is"),
    ("mon", "the monitor is"),
    ("incoming", "migration is"),
    ("loadvm", "migration is"),
    ("bios", "firmware is"),
    ("no-kvm", "a CPU in software is"),
    ("display", "a screen is"),
    ("vnc", "a screen is"),
    ("usb", "USB is"),
    ("gdb", "a debugger's port is"),
    ("s", "a debugger's port is"),
    ("object", "objects are"),
];

/// Parses the arguments after the program's name.
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Command, String> {
    let mut options = Options::default();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let Some(name) =
            argument.strip_prefix('-').map(|name| name.strip_prefix('-').unwrap_or(name))
        else {
            return Err(format!(
                "'{argument}' is no option. Disk images are not there yet; a kernel is given by -kernel FILE (see --help)"
            ));
        };
        match name {
            "help" | "h" => return Ok(Command::Help),
            "version" => return Ok(Command::Version),
            "doctor" => return Ok(Command::Doctor),
            _ => {}
        }
        let Some(entry) = TABLE.iter().find(|entry| entry.names.contains(&name)) else {
            if let Some((_, what)) = NOT_YET.iter().find(|(known, _)| *known == name) {
                return Err(format!("option -{name}: {what} not in this version of Keel"));
            }
            let names = TABLE.iter().flat_map(|entry| entry.names.iter().copied());
            return Err(match nearest(name, names) {
                Some(near) => {
                    format!("there is no option -{name}. Did you mean -{near}? (see --help)")
                }
                None => format!("there is no option -{name} (see --help)"),
            });
        };
        let value = match entry.argument {
            None => String::new(),
            Some(what) => arguments
                .next()
                .ok_or_else(|| format!("option -{name} needs an argument: {what}"))?,
        };
        (entry.apply)(&mut options, value).map_err(|error| format!("option -{name}: {error}"))?;
    }
    if options.initrd.is_some() && options.kernel.is_none() {
        return Err("option -initrd is for a kernel: give one by -kernel FILE".into());
    }
    Ok(Command::Run(Box::new(options)))
}

/// The manual.
pub fn manual() -> String {
    let mut text = String::from(
        "boot - run a virtual machine\n\nUsage: boot [OPTION...]\n\n\
         Runs a guest under KVM in this terminal. With no option a small built-in guest shows the machine it\n\
         finds and powers off. The options are QEMU's; one dash or two.\n",
    );
    let mut group = "";
    for entry in TABLE {
        if entry.group != group {
            group = entry.group;
            text.push_str(&format!("\n{group}:\n"));
        }
        let names: Vec<_> = entry.names.iter().map(|name| format!("-{name}")).collect();
        text.push_str(
            format!("  {} {}", names.join(", "), entry.argument.unwrap_or("")).trim_end(),
        );
        text.push('\n');
        text.push_str(&words::wrap(entry.text, 10, 92));
    }
    text.push_str(EPILOGUE);
    text
}

const EPILOGUE: &str = "
Keys in the terminal (Ctrl-A first, then):
  h   list these keys
  x   end the guest
  b   send a break
  Ctrl-A
      send Ctrl-A

Signals:
  SIGTERM, SIGINT, SIGHUP   end the guest, status 0
  SIGUSR1                   save the guest (see -save)
  SIGCONT                   start a guest that -S kept from starting

Exit status:
  0   the guest powered off, was saved, or was ended by a key or a signal
  1   boot could not do what was asked
  3   the guest reset itself, and -no-reboot was given
  4   the guest's kernel panicked (told by the pvpanic device)
  5   the guest's CPU met a triple fault, and -no-reboot was given
  6   the hypervisor could not go on
  2N+1  the guest wrote N to isa-debug-exit

Examples:
  boot
  boot -kernel vmlinuz -initrd initrd.img -append \"console=ttyS0\" -m 512 -smp 2 -nographic
  boot -doctor
";

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Options, String> {
        match parse(line.split_whitespace().map(str::to_owned))? {
            Command::Run(options) => Ok(*options),
            _ => Err("not a run".into()),
        }
    }

    #[test]
    fn qemus_words() {
        let options =
            run("-kernel k -initrd i -append console=ttyS0 -m 512 -smp 2 -nographic --no-reboot -d exits").unwrap();
        assert_eq!(options.kernel, Some("k".into()));
        assert_eq!(options.memory.get("size"), Some("512"));
        assert_eq!(options.smp.get("cpus"), Some("2"));
        assert!(options.nographic && options.no_reboot);
        assert_eq!(options.log, ["exits"]);
    }

    #[test]
    fn unknown_options_are_named_with_the_nearest() {
        assert!(run("-kernal k").unwrap_err().contains("Did you mean -kernel?"));
        assert!(run("-cdrom x.iso").unwrap_err().contains("disks are not in this version"));
        assert!(run("-kernel").unwrap_err().contains("needs an argument"));
        assert!(run("disk.img").unwrap_err().contains("-kernel FILE"));
        assert!(run("-initrd x").unwrap_err().contains("-kernel FILE"));
    }

    #[test]
    fn the_manual_names_every_option_once() {
        let manual = manual();
        for entry in TABLE {
            for name in entry.names {
                assert!(manual.contains(&format!("-{name}")), "{name}");
            }
        }
        assert!(manual.lines().all(|line| line.chars().count() <= 120), "fits a terminal");
    }
}
