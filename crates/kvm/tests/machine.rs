//! What else a VM and its vCPUs have: the clock, statistics, translation, breakpoints, signal masks, and many vCPUs.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{CODE, Guest, PATIENCE, RAM, USER, Watchdog};
use keel_hypervisor::state::Activity;
use keel_hypervisor::{Exit, Interrupts, MemorySlot, Vcpu, Vm};
use keel_kvm::{Kvm, VmConfig};
use keel_memory::{GuestRam, RamConfig};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

const SPIN: [u8; 4] = [0xf3, 0x90, 0xeb, 0xfc]; // pause; jmp to pause

#[test]
fn the_clock_is_set_and_goes_on() {
    let guest = Guest::new(&SPIN);
    guest.vm.set_clock(5_000_000_000).unwrap();
    let begin = Instant::now();
    let first = guest.vm.clock().unwrap();
    thread::sleep(Duration::from_millis(20));
    let second = guest.vm.clock().unwrap();
    let slack = Duration::from_secs(5).as_nanos() as u64;
    assert!((5_000_000_000..5_000_000_000 + slack).contains(&first), "{first}");
    assert!(second - first >= 20_000_000, "{first} {second}");
    assert!(
        u128::from(second - first) <= begin.elapsed().as_nanos() + 1_000_000,
        "{first} {second}"
    );
    guest.vm.set_clock(1_000).unwrap();
    assert!(guest.vm.clock().unwrap() < 5_000_000_000, "back, too");
}

#[test]
fn statistics_count_exits() {
    // mov cx, 100; out 0x10, al; loop; hlt
    let mut guest = Guest::new(&[0xb9, 100, 0, 0xe6, 0x10, 0xe2, 0xfc, 0xf4]);
    let exits = |guest: &Guest| {
        let all = guest.vm.statistics().unwrap();
        let one = all.iter().find(|one| one.name == "cpu0.exits").unwrap();
        assert_eq!(one.values.len(), 1);
        one.values[0]
    };
    let before = exits(&guest);
    assert_eq!(guest.run(), Exit::Halted);
    let after = exits(&guest);
    assert!(after >= before + 100, "{before} {after}");
    assert_eq!(guest.bus.log.len(), 100);
    assert!(
        guest.vm.statistics().unwrap().iter().any(|one| !one.name.starts_with("cpu")),
        "the VM has some, too"
    );
}

#[test]
fn linear_addresses_are_translated() {
    let mut guest = Guest::new(&SPIN);
    let translate =
        |guest: &mut Guest, at| guest.vcpu.settle(&mut guest.bus).unwrap().translate(at).unwrap();
    assert_eq!(translate(&mut guest, 0x1234), Some(0x1234), "without paging");
    common::write_page_tables(guest.ram.memory(), 0x20000);
    let entry = 0x22000 + 8 * 3;
    guest.write(entry, &(0x0020_0000_u64 | 0x83).to_le_bytes()); // 6 MiB leads to 2 MiB
    guest.change(|state| common::long_mode(state, 0x20000));
    assert_eq!(translate(&mut guest, 0x1234), Some(0x1234));
    assert_eq!(translate(&mut guest, 0x61_2345), Some(0x21_2345));
    assert_eq!(translate(&mut guest, 0x4000_0000), None, "not mapped");
    assert_eq!(translate(&mut guest, 0xffff_8000_0000_0000), None);
}

#[test]
fn hardware_breakpoints_stop_where_they_should() {
    use keel_hypervisor::Debug;
    let mut guest = Guest::new(&[0x90, 0x90, 0x90, 0xf4]); // nop; nop; nop; hlt
    let debug =
        Debug { hardware_breakpoints: [None, Some(CODE + 2), None, None], ..Debug::default() };
    guest.vcpu.set_debug(&debug).unwrap();
    match guest.run() {
        Exit::Debug(stop) => assert_eq!((stop.pc, stop.exception), (CODE + 2, 1)),
        other => panic!("{other:?}"),
    }
    guest.vcpu.set_debug(&Debug::default()).unwrap();
    assert_eq!(guest.run(), Exit::Halted);
}

#[test]
fn masked_signals_do_not_disturb_a_vcpu_and_kicks_still_do() {
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    let signal = SIGRTMIN() + 1;
    register_signal_handler(signal, nothing).unwrap();
    for masked in [false, true] {
        let vm = Kvm::open().unwrap().create_vm(USER).unwrap();
        let ram = GuestRam::new(&RamConfig::new(RAM)).unwrap();
        vm.map(MemorySlot {
            index: 0,
            region: ram.regions()[0].clone(),
            read_only: false,
            log_dirty: false,
        })
        .unwrap();
        ram.memory().write_slice(&SPIN, GuestAddress(CODE)).unwrap();
        let mut vcpu = vm.create_kvm_vcpu(0).unwrap();
        common::real_mode(&mut vcpu, &mut common::Recorder::default());
        if masked {
            vcpu.set_signal_mask(1 << (signal - 1)).unwrap();
        }
        let kick = vcpu.kicker();
        let watchdog = Watchdog::new(vcpu.kicker(), PATIENCE);
        let returned = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let returned = returned.clone();
            move || {
                assert_eq!(vcpu.run(&mut common::Recorder::default()).unwrap(), Exit::Kicked);
                returned.store(true, Ordering::SeqCst);
                // Outside of the guest it is let through: give it the time to.
                thread::sleep(Duration::from_millis(1));
            }
        });
        // However early the first one comes, one of them meets the vCPU in the guest.
        for _ in 0..20 {
            if thread.is_finished() || thread.kill(signal).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(returned.load(Ordering::SeqCst), !masked);
        kick.kick();
        thread.join().unwrap();
        watchdog.check();
    }
}

#[test]
fn there_can_be_255_vcpus() {
    let kvm = Kvm::open().unwrap();
    let cpuid = kvm.supported_cpuid().unwrap();
    for interrupts in [Interrupts::Kernel, Interrupts::Split, Interrupts::User] {
        let begin = Instant::now();
        let vm = kvm.create_vm(VmConfig { interrupts, ..USER }).unwrap();
        let mut vcpus: Vec<_> = (0..255).map(|id| vm.create_vcpu(id).unwrap()).collect();
        let took = begin.elapsed();
        println!("create_255_vcpus_{interrupts:?} {} ms", took.as_millis());
        for (id, vcpu) in (0..).zip(&mut vcpus) {
            vcpu.set_cpuid(&cpuid).unwrap();
            let state = vcpu.settle(&mut common::Recorder::default()).unwrap().save().unwrap();
            let lapic_id = state.lapic.map(|lapic| lapic.registers[2] >> 24);
            assert_eq!(lapic_id, (interrupts != Interrupts::User).then_some(id));
            let waits = id != 0 && interrupts != Interrupts::User;
            assert_eq!(
                state.activity,
                if waits { Activity::Uninitialized } else { Activity::Runnable }
            );
        }
        let error = vm.create_vcpu(7).err().unwrap();
        assert_eq!(error.to_string(), "KVM_CREATE_VCPU on vCPU 7 failed");
        assert!(took < Duration::from_secs(20), "{took:?}");
    }
}
