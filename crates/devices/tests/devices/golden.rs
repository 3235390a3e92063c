//! The files in `tests/golden/`: a state of every kind of device in every version ever released.
//!
//! With `KEEL_WRITE_GOLDEN` in the environment those that do not exist are written. One that exists is never changed.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use keel_device_model::testing::Requests;
use keel_device_model::{Device, HostClock, Line, Seat, Section, Stateful, Surroundings};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::cases::{Case, Log};
use crate::mutate::mutations;
use crate::ops::{Rig, ops};

fn path<C: Case>(version: u32) -> PathBuf {
    let kind = C::Device::KIND;
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{kind}-v{version}.json"))
}

/// The saved state of a device after its golden sequence.
fn present<C: Case>() -> Section {
    let mut rig = Rig::<C>::new();
    rig.run(&C::golden());
    let (kind, version) = (C::Device::KIND, C::Device::VERSION);
    Section { name: kind.to_owned(), kind: kind.to_owned(), version, data: rig.save() }
}

fn seat<C: Case>() -> Arc<Seat<C::Device>> {
    let surroundings = Surroundings {
        clock: Arc::new(HostClock::stopped_at(0)),
        machine: Arc::new(Requests::default()),
    };
    Seat::new(C::make(&Log::default()), Line::unconnected(), &surroundings)
}

pub fn states_ever_saved_can_be_restored<C: Case>() {
    let newest = path::<C>(C::Device::VERSION);
    if std::env::var_os("KEEL_WRITE_GOLDEN").is_some() && !newest.exists() {
        let text = serde_json::to_string_pretty(&present::<C>()).unwrap();
        fs::write(&newest, text + "\n").unwrap();
    }
    for version in 1..=C::Device::VERSION {
        let path = path::<C>(version);
        let text =
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let golden: Section = serde_json::from_str(&text).unwrap();
        let seat = seat::<C>();
        seat.restore(&golden).unwrap();
        if version == C::Device::VERSION {
            assert_eq!(seat.save(&golden.name).unwrap(), golden);
            assert_eq!(golden, present::<C>(), "the state has changed its form: raise the version");
        }
    }
}

/// A damaged state is refused, or is that of some device, which then works.
pub fn damaged_states_do_no_damage<C: Case>() {
    let golden = present::<C>().data;
    let strategy = (mutations(golden), ops::<C>());
    let test = |(state, after): (_, Vec<_>)| {
        let mut rig = Rig::<C>::new();
        let new = rig.save();
        match rig.restore(&state) {
            Err(_) => prop_assert_eq!(rig.save(), new),
            Ok(()) => {
                let mut again = Rig::<C>::beside(&rig);
                again.restore(&rig.save()).map_err(TestCaseError::fail)?;
                prop_assert_eq!(again.save(), rig.save());
                rig.run(&after);
                prop_assert!(again.restore(&rig.save()).is_ok());
            }
        }
        Ok(())
    };
    TestRunner::new(Config::with_cases(256)).run(&strategy, test).unwrap();
}
