//! The CPUs and their threads.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use keel_device_model::{BoardBus, Tally};
use keel_hypervisor::{CpuState, Exit, Result, Vcpu};

use crate::control::{Control, Event};

/// A CPU and its way to the devices. Whoever holds the lock has it between two instructions or is its thread.
pub struct Cpu {
    vcpu: Box<dyn Vcpu>,
    bus: BoardBus,
    /// Its state after power-on, for resets.
    power_on: CpuState,
    /// Exits that reached the machine, by name, and the time spent in the guest and the kernel and with the devices, if that is kept.
    pub exits: BTreeMap<&'static str, u64>,
    pub busy: Duration,
    timed: bool,
}

impl Cpu {
    pub fn new(mut vcpu: Box<dyn Vcpu>, mut bus: BoardBus, timed: bool) -> Result<Self> {
        let mut power_on = vcpu.settle(&mut bus)?.save()?;
        // A reset starts the time-stamp counters of all CPUs anew; the same value for all keeps them in step.
        power_on.msrs.insert(IA32_TIME_STAMP_COUNTER, 0);
        if timed {
            bus.keep_times();
        }
        Ok(Cpu { vcpu, bus, power_on, exits: BTreeMap::new(), busy: Duration::ZERO, timed })
    }

    /// The state after power-on.
    pub fn power_on(&self) -> &CpuState {
        &self.power_on
    }

    pub fn save(&mut self) -> Result<CpuState> {
        self.vcpu.settle(&mut self.bus)?.save()
    }

    pub fn load(&mut self, state: &CpuState) -> Result<()> {
        self.vcpu.settle(&mut self.bus)?.load(state)
    }

    /// The guest physical address behind a linear one.
    pub fn translate(&mut self, linear: u64) -> Result<Option<u64>> {
        self.vcpu.settle(&mut self.bus)?.translate(linear)
    }

    /// Tells the guest's kernel that it was stopped for a while.
    pub fn notify_paused(&mut self) -> Result<()> {
        self.vcpu.notify_paused()
    }

    pub fn take_tally(&mut self) -> Tally {
        self.bus.take_tally()
    }

    pub fn kicker(&self) -> Arc<dyn keel_hypervisor::Kick> {
        self.vcpu.kicker()
    }

    fn run(&mut self) -> Result<Exit> {
        let begin = self.timed.then(Instant::now);
        let exit = self.vcpu.run(&mut self.bus);
        if let (Some(begin), Ok(exit)) = (begin, &exit) {
            self.busy += begin.elapsed();
            *self.exits.entry(name(exit)).or_default() += 1;
        }
        exit
    }
}

const IA32_TIME_STAMP_COUNTER: u32 = 0x10;

fn name(exit: &Exit) -> &'static str {
    match exit {
        Exit::Kicked => "kicked",
        Exit::Halted => "halted",
        Exit::TripleFault => "triple fault",
        Exit::SystemEvent(_) => "system event",
        Exit::Debug(_) => "debug",
        Exit::InterruptWindow => "interrupt window",
        Exit::DirtyRingFull => "dirty ring full",
        _ => "failed",
    }
}

/// Starts a CPU's thread, which runs it whenever the machine does.
pub fn spawn(
    index: usize,
    cpu: Arc<Mutex<Cpu>>,
    control: Arc<Control>,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(format!("CPU {index}/KVM")).spawn(move || {
        while control.wait_until_running() {
            let mut cpu = lock(&cpu);
            while control.running() {
                match cpu.run() {
                    Ok(Exit::Kicked) => {}
                    Ok(exit) => control.post(Event::Cpu(index, exit)),
                    Err(error) => control.post(Event::CpuFailed(index, error)),
                }
            }
        }
    })
}

/// Takes a CPU: waits until its thread has left the guest, if the machine is stopped.
pub fn lock(cpu: &Mutex<Cpu>) -> MutexGuard<'_, Cpu> {
    cpu.lock().unwrap_or_else(PoisonError::into_inner)
}
