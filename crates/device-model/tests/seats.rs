//! Devices in their seats: when alarms are armed, and what states a roster refuses.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::sync::{Arc, Mutex};

use keel_device_model::testing::{ManualClock, Requests};
use keel_device_model::{
    Alarm, Clock, Device, Lent, Line, Nanos, PortIo, Roster, Seat, Section, SharedPio, StateError,
    Stateful, Surroundings,
};
use keel_hypervisor::Width;
use serde::{Deserialize, Serialize};

/// Rings at the time written to it, every `period` from then on if that is not zero, and counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    deadline: Option<Nanos>,
    period: Nanos,
    rung: u32,
}

struct Timer(Registers);

impl PortIo for Timer {
    fn pio_read(&mut self, _offset: u16, _width: Width, _lent: &Lent<'_>) -> u32 {
        self.0.rung
    }
    fn pio_write(&mut self, offset: u16, _width: Width, value: u32, _lent: &Lent<'_>) {
        match (offset, value) {
            (0, 0) => self.0.deadline = None,
            (0, value) => self.0.deadline = Some(value.into()),
            (_, value) => self.0.period = value.into(),
        }
    }
}

impl Device for Timer {
    type State = Registers;
    const KIND: &'static str = "timer";
    const VERSION: u32 = 2;
    fn reset(&mut self, _lent: &Lent<'_>) {
        self.0 = Registers::default();
    }
    fn save(&self) -> Registers {
        self.0.clone()
    }
    fn restore(&mut self, state: Registers, _lent: &Lent<'_>) -> Result<(), StateError> {
        if state.rung > 1000 {
            return Err(StateError::Impossible {
                kind: Self::KIND,
                why: format!("rung {} times", state.rung),
            });
        }
        self.0 = state;
        Ok(())
    }
    fn upgrade(version: u32, data: serde_json::Value) -> Result<Registers, StateError> {
        match version {
            // The first version had nothing but the count.
            1 => serde_json::from_value(data)
                .map(|rung| Registers { rung, ..Registers::default() })
                .map_err(|source| StateError::Malformed { kind: Self::KIND, source }),
            found => Err(StateError::Version { kind: Self::KIND, found, newest: Self::VERSION }),
        }
    }
    fn deadline(&self) -> Option<Nanos> {
        self.0.deadline
    }
    fn expire(&mut self, lent: &Lent<'_>) {
        self.0.rung += 1;
        let period = self.0.period;
        self.0.deadline = self.0.deadline.filter(|_| period > 0).map(|_| lent.clock.now() + period);
    }
}

#[derive(Default)]
struct Armed(Mutex<Vec<Option<Nanos>>>);

impl Alarm for Armed {
    fn arm(&self, deadline: Option<Nanos>) {
        self.0.lock().unwrap().push(deadline);
    }
}

impl Armed {
    fn take(&self) -> Vec<Option<Nanos>> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

struct Bench {
    clock: Arc<ManualClock>,
    armed: Arc<Armed>,
    seat: Arc<Seat<Timer>>,
}

impl Bench {
    fn new() -> Self {
        let clock = Arc::new(ManualClock::default());
        let armed = Arc::new(Armed::default());
        let surroundings =
            Surroundings { clock: clock.clone(), machine: Arc::new(Requests::default()) };
        let timer = Timer(Registers::default());
        let seat = Seat::with_alarm(timer, Line::unconnected(), &surroundings, Some(armed.clone()));
        Bench { clock, armed, seat }
    }

    fn set(&self, offset: u16, value: u32) -> Vec<Option<Nanos>> {
        SharedPio::write(&*self.seat, offset, Width::Dword, value);
        self.armed.take()
    }

    fn rung(&self) -> u32 {
        SharedPio::read(&*self.seat, 0, Width::Dword)
    }
}

#[test]
fn an_alarm_is_armed_when_the_deadline_changes_and_only_then() {
    let bench = Bench::new();
    assert_eq!(bench.rung(), 0);
    assert_eq!(bench.armed.take(), [], "no deadline, no alarm");
    assert_eq!(bench.set(0, 100), [Some(100)]);
    assert_eq!(bench.set(0, 100), []);
    assert_eq!(bench.set(4, 7), []);
    assert_eq!(bench.rung(), 0);
    assert_eq!(bench.set(0, 50), [Some(50)], "earlier");
    assert_eq!(bench.set(0, 0), [None], "switched off");
    assert_eq!(bench.set(0, 0), []);
    assert_eq!(bench.set(0, 60), [Some(60)]);
    bench.seat.reset();
    assert_eq!(bench.armed.take(), [None], "a reset switches it off");
    bench.seat.with(|timer, _| timer.0.deadline = Some(9));
    assert_eq!(bench.armed.take(), [Some(9)], "from the host's side, too");
}

#[test]
fn an_alarm_that_rings_early_is_armed_again() {
    let bench = Bench::new();
    bench.set(4, 30);
    assert_eq!(bench.set(0, 100), [Some(100)]);
    bench.clock.advance(99);
    bench.seat.expire();
    assert_eq!((bench.armed.take(), bench.rung()), (vec![Some(100)], 0), "it was too early");
    bench.clock.advance(1);
    bench.seat.expire();
    assert_eq!((bench.armed.take(), bench.rung()), (vec![Some(130)], 1));
    bench.clock.advance(1000);
    bench.seat.expire();
    assert_eq!(
        (bench.armed.take(), bench.rung()),
        (vec![Some(bench.clock.now() + 30)], 2),
        "one ring for all missed"
    );
    bench.set(4, 0);
    bench.clock.advance(30);
    bench.seat.expire();
    assert_eq!(
        (bench.armed.take(), bench.rung()),
        (vec![], 3),
        "the last: it has rung, nothing to switch off"
    );
    bench.seat.expire();
    assert_eq!(
        (bench.armed.take(), bench.rung()),
        (vec![], 3),
        "an alarm that comes too late for a deadline taken back"
    );
    let next = bench.clock.now() as u32 + 5;
    assert_eq!(bench.set(0, next), [Some(next.into())]);
}

#[test]
fn a_restored_device_has_its_alarm() {
    let bench = Bench::new();
    bench.set(0, 77);
    let section = bench.seat.save("timer").unwrap();
    let other = Bench::new();
    other.seat.restore(&section).unwrap();
    assert_eq!(other.armed.take(), [Some(77)]);
    other.seat.restore(&section).unwrap();
    assert_eq!(other.armed.take(), []);
}

fn roster(names: &[&str]) -> (Roster, Vec<Arc<Seat<Timer>>>) {
    let mut roster = Roster::new();
    let seats = names.iter().map(|name| {
        let Bench { seat, .. } = Bench::new();
        roster.add(name, seat.clone());
        seat
    });
    let seats = seats.collect();
    (roster, seats)
}

fn refused(sections: &[Section]) -> StateError {
    roster(&["a", "b"]).0.restore(sections).unwrap_err()
}

#[test]
fn a_roster_restores_what_it_saved_and_nothing_else() {
    let (first, seats) = roster(&["a", "b"]);
    for (n, seat) in (1..).zip(&seats) {
        seat.with(|timer, _| timer.0.rung = n);
    }
    let good = first.save().unwrap();
    let (second, seats) = roster(&["a", "b"]);
    let text = serde_json::to_string(&good).unwrap();
    second.restore(&serde_json::from_str::<Vec<Section>>(&text).unwrap()).unwrap();
    assert_eq!(
        seats.iter().map(|seat| seat.with(|timer, _| timer.0.rung)).collect::<Vec<_>>(),
        [1, 2]
    );
    let swapped = [good[1].clone(), good[0].clone()];
    second.restore(&swapped).unwrap();
    assert_eq!(second.save().unwrap(), good, "the order of sections does not matter");

    let changed = |change: &dyn Fn(&mut Section)| {
        let mut sections = good.clone();
        change(&mut sections[1]);
        refused(&sections)
    };
    assert!(matches!(refused(&good[..1]), StateError::Missing(name) if name == "b"));
    assert!(matches!(refused(&[]), StateError::Missing(name) if name == "a"));
    let thrice = [&good[..], &good[1..]].concat();
    assert!(matches!(refused(&thrice), StateError::Twice(name) if name == "b"));
    let mut more = good.clone();
    more.push(Section { name: "c".into(), ..good[0].clone() });
    assert!(matches!(refused(&more), StateError::Unknown(name) if name == "c"));
    assert!(matches!(
        changed(&|section| section.kind = "clock".into()),
        StateError::Kind { name, expected: "timer", found } if name == "b" && found == "clock"
    ));
    for version in [0, 3, u32::MAX] {
        assert!(matches!(
            changed(&|section| section.version = version),
            StateError::Version { kind: "timer", found, newest: 2 } if found == version
        ));
    }
    assert!(matches!(
        changed(&|section| section.data = 5.into()),
        StateError::Malformed { kind: "timer", .. }
    ));
    assert!(matches!(
        changed(&|section| section.data["more"] = 1.into()),
        StateError::Malformed { kind: "timer", .. }
    ));
    assert!(matches!(
        changed(&|section| section.data["rung"] = 1001.into()),
        StateError::Impossible { .. }
    ));
}

#[test]
fn an_older_version_is_upgraded() {
    let Bench { seat, .. } = Bench::new();
    let old = Section { name: "t".into(), kind: "timer".into(), version: 1, data: 12.into() };
    seat.restore(&old).unwrap();
    assert_eq!(
        seat.with(|timer, _| timer.0.clone()),
        Registers { rung: 12, ..Registers::default() }
    );
    let bad = Section { data: "twelve".into(), ..old };
    assert!(matches!(seat.restore(&bad), Err(StateError::Malformed { .. })));
}

#[test]
fn names_on_a_roster_are_made_unique() {
    let (roster, _) = roster(&["serial", "serial", "serial.1", "serial"]);
    let names: Vec<_> = roster.save().unwrap().into_iter().map(|section| section.name).collect();
    assert_eq!(names, ["serial", "serial.1", "serial.1.1", "serial.2"]);
}
