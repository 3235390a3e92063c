//! The machine's time.

use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Nanoseconds.
pub type Nanos = u64;

/// The two times a device can need.
pub trait Clock: Send + Sync {
    /// Virtual time in nanoseconds since the machine was made: it does not run while the machine is stopped.
    fn now(&self) -> Nanos;

    /// The host's real time in nanoseconds since 1970-01-01 00:00 UTC.
    fn wall(&self) -> Nanos;
}

/// Virtual time made from the host's monotonic clock. It stands still until it is [started](HostClock::start).
#[derive(Debug)]
pub struct HostClock(Mutex<Running>);

#[derive(Clone, Copy, Debug)]
struct Running {
    /// Virtual time when the clock was last stopped.
    before: Nanos,
    /// When it was last started, if it runs.
    since: Option<Instant>,
}

impl Running {
    fn now(self) -> Nanos {
        let run = self.since.map_or(0, |since| since.elapsed().as_nanos());
        self.before.saturating_add(u64::try_from(run).unwrap_or(u64::MAX))
    }
}

impl HostClock {
    /// A clock that stands at `now`.
    pub fn stopped_at(now: Nanos) -> Self {
        HostClock(Mutex::new(Running { before: now, since: None }))
    }

    /// Lets it run. Nothing changes if it does already.
    pub fn start(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .since
            .get_or_insert_with(Instant::now);
    }

    /// Stops it.
    pub fn stop(&self) {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *running = Running { before: running.now(), since: None };
    }

    /// Sets it, whether it runs or not.
    pub fn set(&self, now: Nanos) {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *running = Running { before: now, since: running.since.map(|_| Instant::now()) };
    }
}

impl Clock for HostClock {
    fn now(&self) -> Nanos {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).now()
    }

    fn wall(&self) -> Nanos {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn runs_only_between_start_and_stop() {
        let clock = HostClock::stopped_at(5);
        assert_eq!(clock.now(), 5);
        clock.start();
        std::thread::sleep(Duration::from_millis(2));
        clock.stop();
        let stopped = clock.now();
        assert!(stopped >= 2_000_005);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(clock.now(), stopped);
        clock.set(7);
        assert_eq!(clock.now(), 7);
    }
}
