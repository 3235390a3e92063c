//! Starting, stopping and ending: what devices, CPUs, signals and keys ask for, in one queue that one thread works off.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use keel_device_model::{Machine, Request};
use keel_hypervisor::{Exit, Kick};
use nix::sys::eventfd::{self, EfdFlags};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Something the machine as a whole must act on.
#[derive(Debug)]
pub enum Event {
    /// A device passes on a guest's wish.
    Guest(Request),
    /// A CPU stopped for something it can not decide itself.
    Cpu(usize, Exit),
    /// A CPU could not be run.
    CpuFailed(usize, keel_hypervisor::Error),
    /// Somebody wants the guest ended: a key or a signal, by name.
    Quit(&'static str),
    /// Somebody wants the guest saved.
    Save,
    /// Somebody wants a guest that was never started to start.
    Start,
}

/// What the CPUs' threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Stopped,
    Running,
    Ending,
}

/// The hub. Devices see it as their [`Machine`].
pub struct Control {
    phase: Mutex<Phase>,
    changed: Condvar,
    /// Whether the phase is `Running`: read before every entry into the guest.
    running: AtomicBool,
    kickers: OnceLock<Vec<Arc<dyn Kick>>>,
    events: Mutex<VecDeque<Event>>,
    wake: EventFd,
    /// Readable while the phase is not `Running`: wakes a CPU's thread that waits for something else than the machine.
    halted: eventfd::EventFd,
}

impl Control {
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Control {
            phase: Mutex::new(Phase::Stopped),
            changed: Condvar::new(),
            running: AtomicBool::new(false),
            kickers: OnceLock::new(),
            events: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            halted: eventfd::EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        }))
    }

    /// Tells the hub how to stop the CPUs. Once, before they start.
    pub fn set_kickers(&self, kickers: Vec<Arc<dyn Kick>>) {
        let _ = self.kickers.set(kickers);
    }

    /// Readable when there are events.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Puts an event in the queue. Events that concern a running guest stop its CPUs at once.
    pub fn post(&self, event: Event) {
        if !matches!(event, Event::Start) {
            self.stop();
        }
        lock(&self.events).push_back(event);
        // Fails only if 2^64 - 2 events wait.
        let _ = self.wake.write(1);
    }

    /// Takes the next event.
    pub fn next(&self) -> Option<Event> {
        let event = lock(&self.events).pop_front();
        if event.is_none() {
            let _ = self.wake.read();
        }
        event.or_else(|| lock(&self.events).pop_front())
    }

    /// Lets the CPUs run.
    pub fn start(&self) {
        self.set_phase(Phase::Running);
    }

    /// Keeps the CPUs from running.
    pub fn stop(&self) {
        self.set_phase(Phase::Stopped);
    }

    /// Makes the CPUs' threads end, for good.
    pub fn end(&self) {
        self.set_phase(Phase::Ending);
    }

    /// Readable once the CPUs are to stop or to end, until they may run again.
    pub fn halted(&self) -> &impl AsFd {
        &self.halted
    }

    /// Whether the CPUs may enter the guest.
    pub fn running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    /// Whether all is over.
    pub fn ending(&self) -> bool {
        *lock(&self.phase) == Phase::Ending
    }

    /// Waits until the CPUs may run; false if they are to end.
    pub fn wait_until_running(&self) -> bool {
        let stopped = |phase: &mut Phase| *phase == Phase::Stopped;
        let phase = self
            .changed
            .wait_while(lock(&self.phase), stopped)
            .unwrap_or_else(PoisonError::into_inner);
        *phase == Phase::Running
    }

    fn set_phase(&self, new: Phase) {
        {
            let mut phase = lock(&self.phase);
            if *phase == Phase::Ending {
                return;
            }
            *phase = new;
            self.running.store(new == Phase::Running, Ordering::SeqCst);
            // Neither can fail but for having been done before.
            let _ = match new {
                Phase::Running => self.halted.read().map(drop),
                Phase::Stopped | Phase::Ending => self.halted.write(1).map(drop),
            };
            self.changed.notify_all();
        }
        if new != Phase::Running {
            self.kickers.get().into_iter().flatten().for_each(|kicker| kicker.kick());
        }
    }
}

impl Machine for Control {
    fn request(&self, request: Request) {
        self.post(Event::Guest(request));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
