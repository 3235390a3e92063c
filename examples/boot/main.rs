//! A VMM made of Keel's crates, with QEMU's command line. `boot --help` is its manual.
//!
//! It reads as the list of what a VMM is:
//!
//! - `options`, `words`, `config`: the command line, and what it means
//! - `machine`: RAM, a VM, CPUs and devices, put together
//! - `software`: the kernel, or the built-in guest
//! - `cpu`: the CPUs and their threads
//! - `io_thread`, `chardev`, `keys`, `terminal`: the host's side: keys, sockets, signals, timers
//! - `control`, `run`: what is asked for, and what becomes of the guest
//! - `snapshot`: saving and restoring
//! - `report`, `diagnosis`, `log`: what is said about it
//! - `process`: PID file, background
#![forbid(unsafe_code)]
// A program's modules are its own: `pub` in them is for each other.
#![allow(missing_docs)]

mod chardev;
mod config;
mod control;
mod cpu;
mod diagnosis;
mod failure;
mod io_thread;
mod keys;
mod log;
mod machine;
mod options;
mod process;
mod report;
mod run;
mod snapshot;
mod software;
mod terminal;
mod words;

use std::process::ExitCode;
use std::sync::{Arc, PoisonError};
use std::thread;

use config::{Config, Meaning};
use control::Control;
use failure::Failure;
use io_thread::IoThread;
use keel_kvm::probe::Report;
use machine::Machine;
use options::{Command, Options};
use run::{Ending, Outcome, Policy, Supervisor};

fn main() -> ExitCode {
    match options::parse(std::env::args().skip(1)) {
        Ok(Command::Help) => say(&options::manual()),
        Ok(Command::Version) => say(&format!("boot, Keel {}\n", env!("CARGO_PKG_VERSION"))),
        Ok(Command::Doctor) => {
            let report = Report::probe();
            let status = u8::from(report.usable().is_err());
            say(&report.to_string());
            ExitCode::from(status)
        }
        Ok(Command::Run(options)) => match Config::from_options(&options).map_err(Failure::message)
        {
            Ok(Meaning::Text(text)) => say(&text),
            Ok(Meaning::Run(config)) => {
                end(boot(&options, &config).unwrap_or_else(Outcome::Failed))
            }
            Err(failure) => end(Outcome::Failed(failure)),
        },
        Err(error) => {
            log::say(&error);
            ExitCode::FAILURE
        }
    }
}

/// Runs a guest to its end.
fn boot(options: &Options, config: &Config) -> Result<Outcome, Failure> {
    if options.daemonize && !process::is_background() {
        return process::to_background();
    }
    if let Some(path) = &options.log_file {
        log::to(
            chardev::create(path)
                .map_err(|error| Failure::io(&format!("write {}", path.display()), error))?,
        );
    }
    let _pidfile = options.pidfile.as_deref().map(process::PidFile::write).transpose()?;
    let report = || Report::probe().why_not();
    let control = Control::new()?;
    let mut io = IoThread::new()?;
    io.watch_signals(&control)?;
    let machine = Machine::build(config, &control, &mut io).map_err(|failure| match report() {
        Some(why) => Failure::message(format!("{failure}\n{why}")),
        None => failure,
    })?;
    if let Some(path) = &config.restore {
        snapshot::restore(&machine, path)?;
    }
    let mut threads = Vec::new();
    for (index, cpu) in machine.cpus.iter().enumerate() {
        let spawned = cpu::spawn(index, cpu.clone(), control.clone());
        threads.push(spawned.map_err(|error| Failure::io("start a thread", error))?);
    }
    let policy = Policy {
        no_reboot: options.no_reboot,
        no_shutdown: options.no_shutdown,
        save: options.save.clone(),
        report_exits: config.report_exits,
        start: !options.stopped,
    };
    if options.daemonize {
        process::ready()?;
    }
    let ending = Ending::default();
    io.watch_machine(Supervisor::new(machine, policy, ending.clone()));
    let thread = thread::Builder::new().name("IO main".into()).spawn({
        let control: Arc<Control> = control.clone();
        move || {
            let result = io.run(&control);
            control.end();
            result
        }
    });
    let thread = thread.map_err(|error| Failure::io("start a thread", error))?;
    let waited = thread.join().map_err(|_| Failure::message("the I/O thread panicked"))?;
    control.end();
    for thread in threads {
        thread.join().map_err(|_| Failure::message("a CPU's thread panicked"))?;
    }
    let outcome = ending.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (outcome, waited) {
        (Some(outcome), _) => Ok(outcome),
        (None, Err(error)) => Err(Failure::io("wait for events", error)),
        (None, Ok(())) => Err(Failure::message("the guest ended without a word")),
    }
}

/// Says how it ended and gives the status for it.
fn end(outcome: Outcome) -> ExitCode {
    terminal::give_back();
    log::say(&outcome.words());
    ExitCode::from(outcome.status())
}

/// Prints a text that was asked for. A reader that has seen enough is no error.
fn say(text: &str) -> ExitCode {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}
