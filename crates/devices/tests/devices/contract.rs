//! What holds for every device whatever the guest does.

use keel_device_model::Device;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::cases::{self, Case};
use crate::ops::{Rig, ops};

/// A device made anew from the state of one to which anything has been done is from then on the same as that one.
fn a_restored_device_goes_on_as_the_saved_one_would<C: Case>() {
    let strategy = (ops::<C>(), ops::<C>());
    let test = |(before, after): (Vec<_>, Vec<_>)| {
        let mut saved = Rig::<C>::new();
        saved.run(&before);
        let state = saved.save();
        let mut restored = Rig::<C>::beside(&saved);
        restored.restore(&state).map_err(TestCaseError::fail)?;
        prop_assert_eq!(restored.save(), state);
        prop_assert_eq!(restored.line(), saved.line());
        restored.run(&[]);
        prop_assert_eq!(restored.run(&after), saved.run(&after));
        prop_assert_eq!(restored.save(), saved.save());
        prop_assert_eq!(restored.line(), saved.line());
        Ok(())
    };
    TestRunner::new(Config::with_cases(128)).run(&strategy, test).unwrap();
}

/// A reset leaves nothing of what was done before, but for what has a battery.
fn a_reset_device_is_as_new<C: Case>() {
    let test = |before: Vec<_>| {
        let mut rig = Rig::<C>::new();
        rig.run(&before);
        rig.device.reset(&rig.bench.lent());
        C::quiet(&mut rig.device);
        prop_assert!(!rig.line());
        prop_assert_eq!(rig.device.deadline(), None);
        let once = rig.save();
        rig.device.reset(&rig.bench.lent());
        prop_assert_eq!(rig.save(), once.clone());
        if !C::BATTERY {
            prop_assert_eq!(once, Rig::<C>::new().save());
        }
        Ok(())
    };
    TestRunner::new(Config::with_cases(128)).run(&ops::<C>(), test).unwrap();
}

/// The golden file's sequence leaves something in every register: otherwise that file would prove little.
fn the_golden_state_is_not_that_of_a_new_device<C: Case>() {
    let mut rig = Rig::<C>::new();
    let new = rig.save();
    rig.run(&C::golden());
    assert!(new.is_null() || rig.save() != new);
}

macro_rules! contract {
    ($($module:ident: $case:ident),* $(,)?) => {$(
        mod $module {
            use super::*;

            #[test]
            fn a_restored_device_goes_on_as_the_saved_one_would() {
                super::a_restored_device_goes_on_as_the_saved_one_would::<cases::$case>();
            }
            #[test]
            fn a_reset_device_is_as_new() {
                super::a_reset_device_is_as_new::<cases::$case>();
            }
            #[test]
            fn the_golden_state_is_not_that_of_a_new_device() {
                super::the_golden_state_is_not_that_of_a_new_device::<cases::$case>();
            }
            #[test]
            fn states_ever_saved_can_be_restored() {
                crate::golden::states_ever_saved_can_be_restored::<cases::$case>();
            }
            #[test]
            fn damaged_states_do_no_damage() {
                crate::golden::damaged_states_do_no_damage::<cases::$case>();
            }
        }
    )*};
}

contract! {
    serial: Serial,
    i8042: I8042,
    rtc: Rtc,
    port61: Port61,
    debug_console: DebugConsole,
    debug_exit: DebugExit,
    reset_register: ResetRegister,
    pvpanic: Pvpanic,
    msi_test: MsiTest,
    acpi_pm: AcpiPm,
    ioapic: IoApic,
}
