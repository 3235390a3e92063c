//! What becomes of a guest: resets, ends, saves. One thread decides, on the events in the hub's queue.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use keel_device_model::Request;
use keel_hypervisor::{Exit, Failure as CpuFailure};
use vmm_sys_util::epoll::EventSet;

use crate::control::{Control, Event};
use crate::failure::Failure;
use crate::io_thread::watch;
use crate::machine::Machine;
use crate::{diagnosis, log, report, snapshot};

/// How the guest ended.
#[derive(Debug)]
pub enum Outcome {
    PoweredOff,
    /// By a key or a signal, by name.
    Quit(&'static str),
    Saved(PathBuf),
    Reset,
    Panicked,
    TripleFault(String),
    HypervisorFailed(String),
    /// By isa-debug-exit, with this status.
    Exit(u8),
    /// The program itself could not go on.
    Failed(Failure),
}

impl Outcome {
    /// The status of the process, as the manual lists them.
    pub fn status(&self) -> u8 {
        match self {
            Outcome::PoweredOff | Outcome::Quit(_) | Outcome::Saved(_) => 0,
            Outcome::Failed(_) => 1,
            Outcome::Reset => 3,
            Outcome::Panicked => 4,
            Outcome::TripleFault(_) => 5,
            Outcome::HypervisorFailed(_) => 6,
            Outcome::Exit(status) => *status,
        }
    }

    /// It in words.
    pub fn words(&self) -> String {
        match self {
            Outcome::PoweredOff => "the guest powered off".into(),
            Outcome::Quit(by) => format!("ended by {by}"),
            Outcome::Saved(path) => format!("the guest is saved in {}", path.display()),
            Outcome::Reset => "the guest reset itself (-no-reboot)".into(),
            Outcome::Panicked => "the guest's kernel panicked".into(),
            Outcome::TripleFault(details) => {
                format!("the guest's CPU met a triple fault (-no-reboot)\n{details}")
            }
            Outcome::HypervisorFailed(details) => format!("the guest can not go on: {details}"),
            Outcome::Exit(status) => {
                format!("the guest wrote {:#x} to isa-debug-exit", status >> 1)
            }
            Outcome::Failed(failure) => failure.to_string(),
        }
    }
}

/// What the options say about resets and ends.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    pub no_reboot: bool,
    pub no_shutdown: bool,
    pub save: Option<PathBuf>,
    /// Print how many exits there were.
    pub report_exits: bool,
    /// Start at once.
    pub start: bool,
}

/// Where the outcome is left for the program's end.
pub type Ending = Arc<Mutex<Option<Outcome>>>;

/// Owns the machine and decides what becomes of it.
pub struct Supervisor {
    machine: Machine,
    policy: Policy,
    control: Arc<Control>,
    ending: Ending,
    /// The guest is meant to run.
    running: bool,
    /// It has been started.
    started: bool,
}

impl Supervisor {
    pub fn new(machine: Machine, policy: Policy, ending: Ending) -> Self {
        let control = machine.control.clone();
        let running = policy.start;
        if running {
            machine.start(false);
        }
        Supervisor { machine, policy, control, ending, running, started: running }
    }

    fn handle(&mut self, event: Event) {
        self.control.stop();
        self.machine.wait_until_stopped();
        match self.decide(event) {
            Ok(None) if self.running => self.machine.start(true),
            Ok(None) => {}
            Ok(Some(outcome)) => self.finish(outcome),
            Err(failure) => self.finish(Outcome::Failed(failure)),
        }
    }

    /// The outcome, if the event is the end.
    fn decide(&mut self, event: Event) -> Result<Option<Outcome>, Failure> {
        Ok(match event {
            Event::Quit(by) => Some(Outcome::Quit(by)),
            // Only a guest that was never started: one that has powered off stays off.
            Event::Start => {
                self.running |= !std::mem::replace(&mut self.started, true);
                None
            }
            Event::Save => match &self.policy.save {
                None => {
                    log::say("SIGUSR1: no -save FILE was given");
                    None
                }
                Some(path) => {
                    // The guest is as it was before: it goes on.
                    let failed = |failure| log::say(&format!("the guest is not saved: {failure}"));
                    snapshot::save(&self.machine, path)
                        .map_err(failed)
                        .ok()
                        .map(|()| Outcome::Saved(path.clone()))
                }
            },
            Event::Guest(Request::PowerOff) if self.policy.no_shutdown => {
                log::say("the guest powered off (-no-shutdown)");
                self.running = false;
                None
            }
            Event::Guest(Request::PowerOff) => Some(Outcome::PoweredOff),
            Event::Guest(Request::Reset) if self.policy.no_reboot => Some(Outcome::Reset),
            Event::Guest(Request::Reset) => {
                self.machine.reset()?;
                None
            }
            // Its crash kernel will deal with it.
            Event::Guest(Request::Panicked { crash_loaded: true }) => None,
            Event::Guest(Request::Panicked { crash_loaded: false }) => Some(Outcome::Panicked),
            Event::Guest(Request::Exit(status)) => Some(Outcome::Exit(status)),
            Event::Guest(other) => {
                return Err(Failure::message(format!("a device asked for {other:?}")));
            }
            Event::Cpu(index, Exit::TripleFault) if self.policy.no_reboot => {
                Some(Outcome::TripleFault(diagnosis::cpu(&self.machine, index)))
            }
            Event::Cpu(_, Exit::TripleFault) => {
                self.machine.reset()?;
                None
            }
            Event::Cpu(index, exit) => {
                let what = match exit {
                    Exit::Failed(failure @ CpuFailure::Emulation) => {
                        format!("CPU {index}: {failure}")
                    }
                    Exit::Failed(failure) => format!("CPU {index}: {failure}"),
                    other => {
                        format!("CPU {index} stopped for {other:?}, which nothing here waits for")
                    }
                };
                Some(Outcome::HypervisorFailed(format!(
                    "{what}\n{}",
                    diagnosis::cpu(&self.machine, index)
                )))
            }
            Event::CpuFailed(index, error) => {
                let failure = Failure::from(error);
                let details = diagnosis::cpu(&self.machine, index);
                Some(Outcome::HypervisorFailed(format!("CPU {index}: {failure}\n{details}")))
            }
        })
    }

    fn finish(&mut self, outcome: Outcome) {
        if self.policy.report_exits {
            log::write(&report::text(&self.machine));
        }
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(outcome);
        self.control.end();
    }
}

impl MutEventSubscriber for Supervisor {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.control.wake(), EventSet::IN);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        while !self.has_ended() {
            let Some(event) = self.control.next() else { return };
            self.handle(event);
        }
    }
}

impl Supervisor {
    fn has_ended(&self) -> bool {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}
