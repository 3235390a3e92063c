//! Interrupt lines.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What a line leads to: an interrupt controller, wherever it is.
pub trait LineSink: Send + Sync {
    /// The line is now high or low.
    fn set(&self, high: bool);
}

/// One interrupt line of a device. It knows its level, so that only changes go any further.
///
/// A level-triggered device calls [`set`](Line::set) with its interrupt condition after every access; an edge-triggered one calls
/// [`pulse`](Line::pulse).
#[derive(Clone)]
pub struct Line(Option<Arc<Wire>>);

struct Wire {
    high: AtomicBool,
    sink: Box<dyn LineSink>,
}

impl Line {
    /// A line that leads to `sink`. It is low.
    pub fn new(sink: impl LineSink + 'static) -> Self {
        Line(Some(Arc::new(Wire { high: AtomicBool::new(false), sink: Box::new(sink) })))
    }

    /// A line that leads nowhere.
    pub const fn unconnected() -> Self {
        Line(None)
    }

    /// Makes `N` lines of this one, which is high while any of them is: what an interrupt shared by several devices is.
    pub fn share<const N: usize>(self) -> [Line; N] {
        let joint = Arc::new(Joint { high: Mutex::new(0), line: self });
        std::array::from_fn(|_| Line::new(joint.clone()))
    }

    /// Sets the level.
    pub fn set(&self, high: bool) {
        if let Some(wire) = &self.0
            && wire.high.swap(high, Ordering::AcqRel) != high
        {
            wire.sink.set(high);
        }
    }

    /// One edge: up and down again.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The level.
    pub fn is_high(&self) -> bool {
        self.0.as_ref().is_some_and(|wire| wire.high.load(Ordering::Acquire))
    }
}

/// Several lines joined into one.
struct Joint {
    /// How many of them are high. The lock is held until the one line has followed, so that it never follows in the wrong order.
    high: Mutex<usize>,
    line: Line,
}

impl LineSink for Arc<Joint> {
    fn set(&self, high: bool) {
        let mut count = self.high.lock().unwrap_or_else(PoisonError::into_inner);
        *count = if high { *count + 1 } else { count.saturating_sub(1) };
        self.line.set(*count > 0);
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            None => f.write_str("Line(unconnected)"),
            Some(_) => write!(f, "Line({})", if self.is_high() { "high" } else { "low" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Log(Arc<Mutex<Vec<bool>>>);

    impl LineSink for Log {
        fn set(&self, high: bool) {
            self.0.lock().unwrap().push(high);
        }
    }

    #[test]
    fn only_changes_reach_the_sink() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let line = Line::new(Log(log.clone()));
        line.set(false);
        line.set(true);
        line.set(true);
        line.set(false);
        line.pulse();
        assert_eq!(*log.lock().unwrap(), [true, false, true, false]);
        assert!(!line.is_high());
    }

    #[test]
    fn shared_lines_are_joined() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let [one, other] = Line::new(Log(log.clone())).share();
        one.set(true);
        other.set(true);
        one.set(false);
        assert_eq!(*log.lock().unwrap(), [true]);
        other.set(false);
        assert_eq!(*log.lock().unwrap(), [true, false]);
    }
}
