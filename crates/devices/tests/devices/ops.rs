//! What can be done to a device, and what can be seen of it.

use keel_device_model::testing::Workbench;
use keel_device_model::{Device, Lent, Request};
use keel_hypervisor::Width;
use proptest::prelude::*;
use serde_json::Value;

use crate::cases::{Case, Log};

/// One thing done to a device.
#[derive(Clone, Debug)]
pub enum Op {
    Read(u64, Width),
    Write(u64, Width, u64),
    /// Lets time pass, in nanoseconds.
    Advance(u64),
    /// Lets the device expire if it wants to.
    Expire,
    /// Something from the host's side.
    Host(u32),
}

/// A device on its bench.
pub struct Rig<C: Case> {
    pub bench: Workbench,
    pub device: C::Device,
    log: Log,
}

/// All that can be seen of what a device did.
#[derive(Debug, Default, PartialEq)]
pub struct Seen {
    reads: Vec<u64>,
    levels: Vec<bool>,
    requests: Vec<Request>,
    log: Vec<String>,
    deadlines: Vec<Option<u64>>,
}

impl<C: Case> Rig<C> {
    pub fn new() -> Self {
        let log = Log::default();
        Rig { bench: Workbench::new(), device: C::make(&log), log }
    }

    /// One at the same time as `other`.
    pub fn beside(other: &Self) -> Self {
        let rig = Self::new();
        let Lent { clock, .. } = other.bench.lent();
        rig.bench.advance(clock.now());
        rig.bench.set_wall(clock.wall());
        rig
    }

    pub fn run(&mut self, ops: &[Op]) -> Seen {
        let mut seen = Seen::default();
        let lent = self.bench.lent();
        for op in ops {
            match *op {
                Op::Read(offset, width) => {
                    let value = C::read(&mut self.device, offset, width, &lent);
                    assert_eq!(value & !width.mask(), 0, "zero-extended");
                    seen.reads.push(value);
                }
                Op::Write(offset, width, value) => {
                    C::write(&mut self.device, offset, width, value, &lent)
                }
                Op::Advance(ns) => self.bench.advance(ns),
                Op::Expire => {
                    if self.device.deadline().is_some_and(|at| at <= lent.clock.now()) {
                        self.device.expire(&lent);
                        let later = self.device.deadline();
                        assert!(
                            later.is_none_or(|at| at > lent.clock.now()),
                            "would expire for ever"
                        );
                    }
                }
                Op::Host(value) => C::host(&mut self.device, value, &lent),
            }
            seen.deadlines.push(self.device.deadline());
        }
        seen.levels = self.bench.levels();
        seen.requests = self.bench.requests();
        seen.log = self.log.take();
        seen
    }

    pub fn line(&self) -> bool {
        self.bench.lent().line.is_high()
    }

    pub fn save(&self) -> Value {
        serde_json::to_value(self.device.save()).unwrap()
    }

    pub fn restore(&mut self, state: &Value) -> Result<(), String> {
        let state = serde_json::from_value(state.clone()).map_err(|error| error.to_string())?;
        self.device.restore(state, &self.bench.lent()).map_err(|error| error.to_string())
    }
}

/// Random things to do, with a liking for the places where the device has something.
pub fn ops<C: Case>() -> impl Strategy<Value = Vec<Op>> {
    let widths: Vec<Width> = [Width::Byte, Width::Word, Width::Dword, Width::Qword]
        .into_iter()
        .filter(|width| *width <= C::WIDEST)
        .collect();
    let place =
        (prop_oneof![0..C::SPAN, prop::sample::select(C::PLACES)], prop::sample::select(widths))
            .prop_map(|(offset, width)| (offset.min(C::SPAN - width.bytes()), width));
    let value = prop_oneof![any::<u64>(), 0u64..256, (0u32..32).prop_map(|bit| 1 << bit)];
    let time = (0u32..50, any::<u64>()).prop_map(|(bits, ns)| ns & ((1 << bits) - 1));
    let op = prop_oneof![
        4 => place.clone().prop_map(|(offset, width)| Op::Read(offset, width)),
        8 => (place, value).prop_map(|((offset, width), value)| Op::Write(offset, width, value & width.mask())),
        2 => time.prop_map(Op::Advance),
        2 => Just(Op::Expire),
        1 => any::<u32>().prop_map(Op::Host),
    ];
    prop::collection::vec(op, 0..150)
}
