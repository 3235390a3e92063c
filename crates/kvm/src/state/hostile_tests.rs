//! Damaged and hostile states: refused or taken, never a panic, and the vCPU can be loaded anew afterwards.

use keel_hypervisor::state::{Activity, Bytes, Exception, Private};
use keel_hypervisor::{CpuState, Error, Interrupts, Vm, VmState};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::Value;

use super::tests::Machine;

/// Loads a state that one change has made impossible, and gives the part that is blamed.
#[track_caller]
fn blamed(interrupts: Interrupts, change: impl FnOnce(&mut CpuState)) -> &'static str {
    let mut machine = Machine::new(interrupts);
    let good = machine.save();
    let mut state = good.clone();
    change(&mut state);
    let error = machine.load(&state).unwrap_err();
    machine.load(&good).unwrap();
    match error {
        Error::BadState { what, .. } | Error::Unsupported(what) => what,
        other => panic!("refused by the kernel only: {other:?}"),
    }
}

#[test]
fn every_impossible_part_is_named() {
    let kernel = |change: fn(&mut CpuState)| blamed(Interrupts::Kernel, change);
    assert_eq!(kernel(|state| state.registers.rflags |= 1 << 3), "RFLAGS");
    assert_eq!(kernel(|state| state.segments.cs.kind = 16), "CS");
    assert_eq!(kernel(|state| state.segments.ldt.dpl = 4), "LDTR");
    assert_eq!(kernel(|state| state.control.efer = 1 << 63), "EFER");
    assert_eq!(kernel(|state| state.control.cr8 = 16), "CR8");
    assert_eq!(kernel(|state| state.control.pdptrs = Some([0; 4])), "PDPTEs");
    assert_eq!(kernel(|state| state.debug.dr6 = 1 << 32), "DR6");
    assert_eq!(kernel(|state| state.debug.dr7 = 1 << 32), "DR7");
    assert_eq!(kernel(|state| state.xcrs.extend([(1, 0)])), "XCRs");
    assert_eq!(kernel(|state| state.xsave.0.0.truncate(100)), "XSAVE area");
    assert_eq!(kernel(|state| state.msrs.extend([(0x277, 2)])), "MSR");
    assert_eq!(kernel(|state| state.lapic = None), "local APIC");
    assert_eq!(kernel(|state| state.lapic.as_mut().unwrap().registers.truncate(63)), "local APIC");
    assert_eq!(kernel(|state| state.tsc_khz = Some(0)), "TSC frequency");
    assert_eq!(blamed(Interrupts::User, |state| state.activity = Activity::Halted), "activity");
    assert_eq!(blamed(Interrupts::User, |state| state.lapic = Some(lapic())), "local APIC");
}

fn lapic() -> keel_hypervisor::state::LapicState {
    keel_hypervisor::state::LapicState { registers: vec![0; 64] }
}

#[test]
fn impossible_events_are_named() {
    let events = |change: fn(&mut CpuState)| {
        assert_eq!(blamed(Interrupts::Kernel, change), "events");
    };
    for_each_vector(&[2, 32, 255]);
    events(|state| {
        state.events.exception = Some(Exception { payload: Some(1), ..Exception::default() })
    });
    events(|state| state.events.shadow = 4);
    events(|state| state.events.sipi_vector = 256);
    events(|state| state.events.smm_inside_nmi = true);
    events(|state| {
        state.activity = Activity::InitReceived;
        state.events.latched_init = true;
    });
}

fn for_each_vector(vectors: &[u8]) {
    for vector in vectors {
        let what = blamed(Interrupts::Kernel, |state| {
            state.events.exception = Some(Exception { vector: *vector, ..Exception::default() });
        });
        assert_eq!(what, "events", "exception {vector}");
    }
}

#[test]
fn nonsense_in_kvms_own_section_is_named() {
    let private = |change: fn(&mut Private)| {
        blamed(Interrupts::Kernel, |state| change(state.private.get_mut("kvm").unwrap()))
    };
    assert_eq!(
        private(|kvm| drop(kvm.blocks.insert("surprise".into(), Bytes::default()))),
        "KVM's own state"
    );
    assert_eq!(private(|kvm| kvm.msrs.extend([(0x10, 0)])), "KVM's own state");
    for length in [0, 127, 128, 5000, 20_000] {
        let what = blamed(Interrupts::Kernel, |state| {
            let block = Bytes(vec![0xff; length]);
            state.private.get_mut("kvm").unwrap().blocks.insert("nested".into(), block);
        });
        assert_eq!(what, "nested virtualization", "{length} bytes");
    }
}

#[test]
fn impossible_devices_are_named() {
    let machine = Machine::new(Interrupts::Kernel);
    let good = machine.vm.save().unwrap();
    let blamed = |change: fn(&mut VmState)| {
        let mut state = good.clone();
        change(&mut state);
        match machine.vm.load(&state).unwrap_err() {
            Error::BadState { what, .. } => what,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(blamed(|state| state.clock_ns = Some(u64::MAX)), "clock");
    assert_eq!(blamed(|state| state.pics = None), "PICs");
    assert_eq!(blamed(|state| state.ioapic = None), "I/O APIC");
    assert_eq!(blamed(|state| state.pics.as_mut().unwrap()[1].priority_add = 8), "PIC");
    assert_eq!(blamed(|state| state.pics.as_mut().unwrap()[0].elcr = 1), "PIC");
    assert_eq!(blamed(|state| state.pics.as_mut().unwrap()[0].elcr_mask = 0xff), "PIC");
    assert_eq!(blamed(|state| state.ioapic.as_mut().unwrap().base = 0), "I/O APIC");
    assert_eq!(blamed(|state| state.ioapic.as_mut().unwrap().irr = 1 << 24), "I/O APIC");
    assert_eq!(blamed(|state| state.pit.as_mut().unwrap().channels[2].count = 65537), "PIT");
    assert_eq!(blamed(|state| state.pit.as_mut().unwrap().channels[0].mode = 8), "PIT");
    assert_eq!(blamed(|state| state.pit.as_mut().unwrap().flags = 4), "PIT");
    machine.vm.load(&good).unwrap();
    for interrupts in [Interrupts::Split, Interrupts::User] {
        let other = Machine::new(interrupts);
        assert!(matches!(other.vm.load(&good), Err(Error::BadState { .. })));
    }
}

/// Every leaf of a JSON tree.
fn leaves<'a>(value: &'a mut Value, into: &mut Vec<&'a mut Value>) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| leaves(item, into)),
        Value::Object(fields) => fields.values_mut().for_each(|field| leaves(field, into)),
        leaf => into.push(leaf),
    }
}

/// Something else of the same type, so that serde takes it more often than not.
fn mutate(leaf: &mut Value, with: u64) {
    *leaf = match leaf {
        Value::Bool(bit) => Value::from(!*bit),
        // All lengths: a field of 8 bits should be hit as well as one of 64.
        Value::Number(_) => Value::from(with >> (8 * (with % 8))),
        Value::String(digits) => {
            let mut bytes = std::mem::take(digits).into_bytes();
            let len = bytes.len() as u64;
            if let Some(byte) = bytes.get_mut((with % len.max(1)) as usize) {
                *byte = b"0123456789abcdef"[(with >> 32) as usize % 16];
            }
            Value::from(String::from_utf8(bytes).unwrap_or_default())
        }
        _ => Value::from(with),
    };
}

fn mutated<T: serde::Serialize + serde::de::DeserializeOwned>(
    good: &T,
    changes: &[(Index, u64)],
) -> Option<T> {
    let mut tree = serde_json::to_value(good).unwrap();
    for (which, with) in changes {
        let mut all = Vec::new();
        leaves(&mut tree, &mut all);
        let number = which.index(all.len());
        mutate(all.swap_remove(number), *with);
    }
    serde_json::from_value(tree).ok()
}

fn changes() -> impl Strategy<Value = Vec<(Index, u64)>> {
    proptest::collection::vec((any::<Index>(), any::<u64>()), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 20, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a damaged state did to a vCPU, it can be saved and a good one still be loaded.
    #[test]
    fn no_mutation_of_a_vcpu_breaks_the_backend(all in proptest::collection::vec(changes(), 64)) {
        for interrupts in [Interrupts::Kernel, Interrupts::Split] {
            let mut machine = Machine::new(interrupts);
            let good = machine.save();
            for changes in &all {
                if let Some(state) = mutated(&good, changes) {
                    // Either answer is right; what must not be is a panic or a vCPU that is lost.
                    let _ = machine.load(&state);
                    machine.save();
                }
                machine.load(&good).unwrap();
            }
        }
    }

    #[test]
    fn no_mutation_of_a_vm_breaks_the_backend(all in proptest::collection::vec(changes(), 64)) {
        let machine = Machine::new(Interrupts::Kernel);
        let good = machine.vm.save().unwrap();
        for changes in &all {
            if let Some(state) = mutated(&good, changes) {
                let _ = machine.vm.load(&state);
                machine.vm.save().unwrap();
            }
            machine.vm.load(&good).unwrap();
        }
    }
}
