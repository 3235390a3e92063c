//! A device's place in a machine: where it is wrapped for the threads that reach it, and wired.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use keel_hypervisor::Width;

use crate::state::Stateful;
use crate::{
    Clock, Device, Lent, Line, Machine, MmioIo, Nanos, PortIo, Section, SharedMmio, SharedPio,
    StateError,
};

/// What all devices of a machine have around them.
#[derive(Clone)]
pub struct Surroundings {
    /// The machine's time.
    pub clock: Arc<dyn Clock>,
    /// Who takes the guest's wishes.
    pub machine: Arc<dyn Machine>,
}

/// Wakes a device at its [deadline](Device::deadline), by [`Seat::expire`].
pub trait Alarm: Send + Sync {
    /// From now on the deadline is this (virtual time), or there is none. Called only when it has changed.
    fn arm(&self, deadline: Option<Nanos>);
}

/// A device, the lock that lets several threads reach it, its line and its surroundings.
///
/// Aligned so that two devices never share a cache line: two vCPUs on two devices do not slow each other down.
#[repr(align(128))]
pub struct Seat<D> {
    seated: Mutex<Seated<D>>,
    line: Line,
    surroundings: Surroundings,
    alarm: Option<Arc<dyn Alarm>>,
}

struct Seated<D> {
    device: D,
    armed: Option<Nanos>,
}

impl<D: Device> Seat<D> {
    /// Seats a device.
    pub fn new(device: D, line: Line, surroundings: &Surroundings) -> Arc<Self> {
        Self::with_alarm(device, line, surroundings, None)
    }

    /// Seats a device that has deadlines.
    pub fn with_alarm(
        device: D,
        line: Line,
        surroundings: &Surroundings,
        alarm: Option<Arc<dyn Alarm>>,
    ) -> Arc<Self> {
        let seated = Mutex::new(Seated { device, armed: None });
        Arc::new(Seat { seated, line, surroundings: surroundings.clone(), alarm })
    }

    /// Calls `body` with the device and what it is lent: the way in for the host's side (input that has arrived, …).
    pub fn with<R>(&self, body: impl FnOnce(&mut D, &Lent<'_>) -> R) -> R {
        let mut seated = self.lock();
        let lent = Lent {
            line: &self.line,
            clock: &*self.surroundings.clock,
            machine: &*self.surroundings.machine,
        };
        let result = body(&mut seated.device, &lent);
        if let Some(alarm) = &self.alarm {
            let deadline = seated.device.deadline();
            if deadline != seated.armed {
                seated.armed = deadline;
                alarm.arm(deadline);
            }
        }
        result
    }

    /// The alarm's way in: calls the device if its deadline has passed, and arms the alarm again in any case, so that one that rang
    /// early or was set before the machine stopped rings again.
    pub fn expire(&self) {
        self.lock().armed = None;
        self.with(|device, lent| {
            if device.deadline().is_some_and(|deadline| deadline <= lent.clock.now()) {
                device.expire(lent);
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Seated<D>> {
        self.seated.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Device + PortIo> SharedPio for Seat<D> {
    fn read(&self, offset: u16, width: Width) -> u32 {
        self.with(|device, lent| device.pio_read(offset, width, lent))
    }

    fn write(&self, offset: u16, width: Width, value: u32) {
        self.with(|device, lent| device.pio_write(offset, width, value, lent));
    }
}

impl<D: Device + MmioIo> SharedMmio for Seat<D> {
    fn read(&self, offset: u64, width: Width) -> u64 {
        self.with(|device, lent| device.mmio_read(offset, width, lent))
    }

    fn write(&self, offset: u64, width: Width, value: u64) {
        self.with(|device, lent| device.mmio_write(offset, width, value, lent));
    }
}

impl<D: Device> Stateful for Seat<D> {
    fn reset(&self) {
        self.with(|device, lent| device.reset(lent));
    }

    fn save(&self, name: &str) -> Result<Section, StateError> {
        let data = serde_json::to_value(self.with(|device, _| device.save()))
            .map_err(|source| StateError::Malformed { kind: D::KIND, source })?;
        Ok(Section { name: name.to_owned(), kind: D::KIND.to_owned(), version: D::VERSION, data })
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        if section.kind != D::KIND {
            return Err(StateError::Kind {
                name: section.name.clone(),
                expected: D::KIND,
                found: section.kind.clone(),
            });
        }
        let state = if section.version == D::VERSION {
            serde_json::from_value(section.data.clone())
                .map_err(|source| StateError::Malformed { kind: D::KIND, source })?
        } else {
            D::upgrade(section.version, section.data.clone())?
        };
        self.with(|device, lent| device.restore(state, lent))
    }
}
