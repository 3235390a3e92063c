//! A workbench for devices: all that a device is lent, with no machine around it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Clock, Lent, Line, LineSink, Machine, Nanos, Request};

/// Lends a device a line, a clock and a machine that only remember.
///
/// ```
/// use keel_device_model::testing::Workbench;
///
/// let bench = Workbench::new();
/// bench.advance(1_000);
/// bench.lent().line.pulse();
/// assert_eq!(bench.levels(), [true, false]);
/// assert!(bench.requests().is_empty());
/// ```
#[derive(Default)]
pub struct Workbench {
    line: Option<Line>,
    levels: Arc<Mutex<Vec<bool>>>,
    clock: ManualClock,
    requests: Requests,
}

impl Workbench {
    /// A workbench at time 0, on 1970-01-01.
    pub fn new() -> Self {
        let levels = Arc::<Mutex<Vec<bool>>>::default();
        Workbench { line: Some(Line::new(Levels(levels.clone()))), levels, ..Workbench::default() }
    }

    /// What a device is lent.
    pub fn lent(&self) -> Lent<'_> {
        const NOWHERE: &Line = &Line::unconnected();
        Lent {
            line: self.line.as_ref().unwrap_or(NOWHERE),
            clock: &self.clock,
            machine: &self.requests,
        }
    }

    /// Lets time pass, virtual and real.
    pub fn advance(&self, ns: Nanos) {
        self.clock.advance(ns);
    }

    /// Sets the real time.
    pub fn set_wall(&self, ns: Nanos) {
        self.clock.wall.store(ns, Ordering::Relaxed);
    }

    /// The changes of the line's level since the last call, oldest first.
    pub fn levels(&self) -> Vec<bool> {
        std::mem::take(&mut lock(&self.levels))
    }

    /// What was asked of the machine since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut lock(&self.requests.0))
    }
}

/// A clock that a test moves by hand.
#[derive(Debug, Default)]
pub struct ManualClock {
    now: AtomicU64,
    wall: AtomicU64,
}

impl ManualClock {
    /// Lets time pass, virtual and real.
    pub fn advance(&self, ns: Nanos) {
        self.now.fetch_add(ns, Ordering::Relaxed);
        self.wall.fetch_add(ns, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Nanos {
        self.now.load(Ordering::Relaxed)
    }

    fn wall(&self) -> Nanos {
        self.wall.load(Ordering::Relaxed)
    }
}

/// A machine that only remembers what was asked of it.
#[derive(Debug, Default)]
pub struct Requests(Mutex<Vec<Request>>);

impl Machine for Requests {
    fn request(&self, request: Request) {
        lock(&self.0).push(request);
    }
}

struct Levels(Arc<Mutex<Vec<bool>>>);

impl LineSink for Levels {
    fn set(&self, high: bool) {
        lock(&self.0).push(high);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
