//! What the options mean: checked and complete, before anything is made.

use std::path::PathBuf;

use keel_devices::{debug_console, debug_exit};
use keel_hypervisor::Interrupts;
use keel_hypervisor::cpu_model::{CpuModel, Topology};
use keel_memory::{Backing, RamConfig};

use crate::chardev::{self, Kind};
use crate::options::Options;
use crate::words::{self, Words, nearest};

/// A machine and its surroundings, as the options have it.
pub struct Config {
    pub interrupts: Interrupts,
    pub topology: Topology,
    pub cpu: CpuModel,
    pub ram: RamConfig,
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub command_line: String,
    /// For each of the four serial ports what it is connected to, if it is there.
    pub serials: Vec<Option<Kind>>,
    pub devices: Vec<DeviceConfig>,
    pub report_exits: bool,
    pub restore: Option<PathBuf>,
}

/// A device that is there only if asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceConfig {
    Pvpanic,
    DebugExit { port: u16, ports: u16 },
    DebugConsole { port: u16, kind: Kind },
    MsiTest,
}

/// The options' meaning, or a text that was asked for by `help`.
pub enum Meaning {
    Run(Box<Config>),
    Text(String),
}

impl Config {
    /// Checks the options. An error names the option.
    pub fn from_options(options: &Options) -> Result<Meaning, String> {
        if let Some(text) = help(options) {
            return Ok(Meaning::Text(text));
        }
        let on = |option: &'static str| move |error: String| format!("option -{option}: {error}");
        let mut defined = Vec::new();
        for words in &options.chardevs {
            let (id, kind) = chardev::parse_chardev(words).map_err(on("chardev"))?;
            if defined.iter().any(|(known, _)| *known == id) {
                return Err(format!("option -chardev: id={id} is there twice"));
            }
            defined.push((id, kind));
        }
        let mut devices = Vec::new();
        for words in &options.devices {
            devices.push(device(words, &defined).map_err(on("device"))?);
        }
        // A kernel that panics is always told apart; -device pvpanic, as QEMU has it, changes nothing.
        if !devices.contains(&DeviceConfig::Pvpanic) {
            devices.push(DeviceConfig::Pvpanic);
        }
        if options.kernel.is_none() {
            for own in [
                DeviceConfig::MsiTest,
                DeviceConfig::DebugExit { port: debug_exit::PORT, ports: debug_exit::PORTS },
            ] {
                if !devices.contains(&own) {
                    devices.push(own);
                }
            }
        }
        for item in &options.log {
            if item != "exits" {
                return Err(format!("option -d: there is no item '{item}' (see -d help)"));
            }
        }
        Ok(Meaning::Run(Box::new(Config {
            interrupts: interrupts(options)?,
            topology: topology(&options.smp).map_err(on("smp"))?,
            cpu: options
                .cpu
                .parse()
                .map_err(|error: keel_hypervisor::Error| format!("option -cpu: {error}"))?,
            ram: ram(options)?,
            kernel: options.kernel.clone(),
            initrd: options.initrd.clone(),
            command_line: options.append.clone(),
            serials: serials(options, &defined).map_err(on("serial"))?,
            devices,
            // The built-in guest is there to show what goes on.
            report_exits: options.kernel.is_none()
                || options.log.iter().any(|item| item == "exits"),
            restore: options.restore.clone(),
        })))
    }
}

/// The text asked for by a `help` among the options.
fn help(options: &Options) -> Option<String> {
    if options.cpu == "help" || options.cpu == "?" {
        return Some(CpuModel::help());
    }
    if options.machine.wants_help() {
        return Some(
            "Machines:\n  pc    a PC without firmware: ACPI, serial ports, RTC (default)\n".into(),
        );
    }
    if options.accel.wants_help() {
        let report = keel_kvm::probe::Report::probe();
        let state =
            report.why_not().or_else(|| report.caution()).unwrap_or_else(|| "ready to use".into());
        return Some(format!("Accelerators:\n  kvm   {state}\n\nboot -doctor tells more.\n"));
    }
    if options.log.iter().any(|item| item == "help" || item == "?") {
        return Some("Log items:\n  exits  exits by kind and device, and what the guest touched that is not there\n".into());
    }
    let wanting = options.devices.iter().find(|words| words.wants_help())?;
    match wanting.get("driver") {
        None | Some("help" | "?") => {
            let lines = DEVICES.iter().map(|(name, _, text)| format!("  {name:<16}{text}\n"));
            Some(std::iter::once("Devices:\n".to_owned()).chain(lines).collect())
        }
        Some(name) => {
            let (_, properties, _) = DEVICES.iter().find(|(known, ..)| *known == name)?;
            let lines = properties.iter().map(|(property, text)| format!("  {property}={text}\n"));
            Some(std::iter::once(format!("Properties of {name}:\n")).chain(lines).collect())
        }
    }
}

type Property = (&'static str, &'static str);

/// Devices by name, with their properties and what they are.
const DEVICES: &[(&str, &[Property], &str)] = &[
    (
        "isa-debug-exit",
        &[("iobase", "PORT (default 0x501)"), ("iosize", "1, 2 or 4 (default 2)")],
        "a port that ends the program with status 2N+1",
    ),
    (
        "isa-debugcon",
        &[("iobase", "PORT (default 0xe9)"), ("chardev", "ID of a -chardev")],
        "a port that prints what is written to it",
    ),
    ("pvpanic", &[], "tells of a kernel's panic (always there)"),
    ("keel-msi-test", &[], "a doorbell that raises an MSI, for test guests"),
];

fn device(words: &Words, defined: &[(String, Kind)]) -> Result<DeviceConfig, String> {
    let name = words.get("driver").unwrap_or_default();
    let Some((_, properties, _)) = DEVICES.iter().find(|(known, ..)| *known == name) else {
        return Err(match nearest(name, DEVICES.iter().map(|(known, ..)| *known)) {
            Some(near) => format!("there is no device '{name}'. Did you mean '{near}'?"),
            None => format!("there is no device '{name}' (-device help lists them)"),
        });
    };
    let known: Vec<_> = ["driver", "id"]
        .into_iter()
        .chain(properties.iter().map(|(property, _)| *property))
        .collect();
    words.only(&known).map_err(|error| format!("{name}: {error}"))?;
    let port = |default: u16| {
        let port = words.number("iobase", default.into())?;
        u16::try_from(port).map_err(|_| format!("{name}: iobase={port:#x}: ports end at 0xffff"))
    };
    match name {
        "isa-debug-exit" => {
            let (port, ports) =
                (port(debug_exit::PORT)?, words.number("iosize", debug_exit::PORTS.into())?);
            match ports {
                1 | 2 | 4 if port.checked_add(ports as u16 - 1).is_some() => {
                    Ok(DeviceConfig::DebugExit { port, ports: ports as u16 })
                }
                _ => Err(format!("{name}: iosize={ports}: expected 1, 2 or 4")),
            }
        }
        "isa-debugcon" => {
            let kind = match words.get("chardev") {
                Some(id) => chardev::find(id, defined)?,
                None => return Err(format!("{name}: chardev=ID is missing")),
            };
            Ok(DeviceConfig::DebugConsole { port: port(debug_console::PORT)?, kind })
        }
        "keel-msi-test" => Ok(DeviceConfig::MsiTest),
        _ => Ok(DeviceConfig::Pvpanic),
    }
}

fn interrupts(options: &Options) -> Result<Interrupts, String> {
    options
        .machine
        .only(&["type", "kernel-irqchip", "kernel_irqchip", "mem-merge", "accel"])
        .map_err(|error| format!("option -machine: {error}"))?;
    options
        .accel
        .only(&["accel", "kernel-irqchip"])
        .map_err(|error| format!("option -accel: {error}"))?;
    match options.machine.get("type") {
        None | Some("pc") => {}
        Some(other) => {
            return Err(format!("option -machine: there is no machine '{other}'; there is: pc"));
        }
    }
    for accel in options.accel.get("accel").into_iter().chain(options.machine.get("accel")) {
        match accel {
            "kvm" => {}
            "tcg" => {
                return Err(
                    "option -accel: a CPU in software (tcg) is not in this version of Keel".into(),
                );
            }
            other => {
                return Err(format!(
                    "option -accel: there is no accelerator '{other}'; there is: kvm"
                ));
            }
        }
    }
    let words = [
        options.accel.get("kernel-irqchip"),
        options.machine.get("kernel-irqchip"),
        options.machine.get("kernel_irqchip"),
    ];
    match words.into_iter().flatten().next() {
        None | Some("on") => Ok(Interrupts::Kernel),
        Some("split") => Ok(Interrupts::Split),
        Some("off") => Err("kernel-irqchip=off: local APICs in user space are not in this version of Keel; there is: on, split".into()),
        Some(other) => Err(format!("kernel-irqchip={other}: expected on or split")),
    }
}

fn topology(words: &Words) -> Result<Topology, String> {
    words.only(&["cpus", "sockets", "dies", "cores", "threads"])?;
    let number = |key| -> Result<Option<u32>, String> {
        if words.get(key).is_none() {
            return Ok(None);
        }
        let value = words.number(key, 0)?;
        u32::try_from(value).map(Some).map_err(|_| format!("{key}={value} is too many"))
    };
    let (sockets, dies, cores, threads) =
        (number("sockets")?, number("dies")?, number("cores")?, number("threads")?);
    let product = |of: &[Option<u32>]| {
        of.iter()
            .flatten()
            .try_fold(1u32, |all, one| all.checked_mul(*one))
            .ok_or("there are too many CPUs")
    };
    let cpus = match number("cpus")? {
        Some(cpus) => cpus,
        None => product(&[sockets, dies, cores, threads])?,
    };
    // What is not said is one, but for the cores: they make up what is missing, as in QEMU since 6.2.
    let (sockets, dies, threads) = (sockets.unwrap_or(1), dies.unwrap_or(1), threads.unwrap_or(1));
    let others = product(&[Some(sockets), Some(dies), Some(threads)])?;
    let cores = cores.unwrap_or_else(|| cpus.div_ceil(others.max(1)).max(1));
    let topology = Topology { cpus, sockets, dies, cores, threads };
    topology.check().map_err(|error| error.to_string())?;
    if u64::from(others) * u64::from(cores) != u64::from(cpus) {
        return Err(format!(
            "{sockets} sockets of {dies} dies of {cores} cores of {threads} threads are {} CPUs, not {cpus}",
            u64::from(others) * u64::from(cores)
        ));
    }
    Ok(topology)
}

fn ram(options: &Options) -> Result<RamConfig, String> {
    let on_m = |error: String| format!("option -m: {error}");
    options.memory.only(&["size"]).map_err(on_m)?;
    let size = words::size(options.memory.get("size").unwrap_or("128M"), 1 << 20).map_err(on_m)?;
    keel_memory::layout::ranges(size).map_err(|error| on_m(error.to_string()))?;
    Ok(RamConfig {
        backing: options.mem_path.clone().map_or(Backing::Anonymous, Backing::Path),
        prealloc: options.mem_prealloc,
        // A kernel without KSM refuses the advice.
        merge: options.machine.switch("mem-merge", true)?
            && std::path::Path::new("/sys/kernel/mm/ksm").exists(),
        ..RamConfig::new(size)
    })
}

fn serials(options: &Options, defined: &[(String, Kind)]) -> Result<Vec<Option<Kind>>, String> {
    const MOST: usize = 4;
    if options.serials.len() > MOST {
        return Err(format!("a PC has {MOST} serial ports"));
    }
    if options.serials.is_empty() {
        return Ok(vec![Some(Kind::Stdio { keys: true, signals: false })]);
    }
    let serials: Vec<_> = options
        .serials
        .iter()
        .map(|text| chardev::parse_serial(text, defined))
        .collect::<Result<_, _>>()?;
    let on_terminal =
        serials.iter().flatten().filter(|kind| matches!(kind, Kind::Stdio { .. })).count();
    if on_terminal > 1 {
        return Err("only one serial port can be on the terminal".into());
    }
    Ok(serials)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smp(text: &str) -> Result<Topology, String> {
        topology(&Words::parse_type(text, "cpus").unwrap())
    }

    #[test]
    fn smp_words() {
        assert_eq!(
            smp("2").unwrap(),
            Topology { cpus: 2, sockets: 1, dies: 1, cores: 2, threads: 1 }
        );
        assert_eq!(
            smp("4,sockets=1,cores=2,threads=2").unwrap(),
            Topology { cpus: 4, sockets: 1, dies: 1, cores: 2, threads: 2 }
        );
        assert_eq!(smp("cores=2,threads=2").unwrap().cpus, 4);
        assert!(smp("0").is_err());
        assert!(smp("256").is_err());
        assert!(smp("4,cores=1,threads=1").is_err());
        assert!(smp("4,sockets=3").unwrap_err().contains("not 4"));
        assert!(smp("4,coers=2").unwrap_err().contains("cores"));
        assert!(smp("99999999999").is_err());
    }

    #[test]
    fn device_words() {
        let parse = |text| device(&Words::parse_type(text, "driver").unwrap(), &[]);
        assert_eq!(
            parse("isa-debug-exit,iobase=0xf4,iosize=0x04"),
            Ok(DeviceConfig::DebugExit { port: 0xf4, ports: 4 })
        );
        assert!(parse("isa-debug-exit,iosize=3").is_err());
        assert!(parse("isa-debug-exit,iobase=0xffff,iosize=4").is_err());
        assert!(parse("isa-debug-exti").unwrap_err().contains("isa-debug-exit"));
        assert!(parse("isa-debugcon").unwrap_err().contains("chardev"));
    }
}
