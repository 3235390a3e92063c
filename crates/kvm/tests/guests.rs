//! The guests of `keel-guests` on a VM without devices: two CPUs at once, and a hostile one.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, Recorder, USER, Watchdog};
use keel_guests::ports;
use keel_hypervisor::{Bus, Exit, Interrupts, Kick, MemorySlot, Vcpu, Vm, Width};
use keel_kvm::{Kvm, VmConfig};
use keel_memory::{GuestRam, RamConfig};
use vm_memory::{Bytes, GuestAddress};

/// The guests' test device, as far as they need it here; its verdict stops all vCPUs.
#[derive(Clone)]
struct Judge {
    verdict: Arc<Mutex<Option<u32>>>,
    accesses: Arc<AtomicU64>,
    kicks: Vec<Arc<dyn Kick>>,
}

impl Judge {
    /// Every access is as narrow as promised, and zero-extended.
    fn note(&self, width: Width, widest: Width, value: u64) {
        assert!(width <= widest && value & !width.mask() == 0);
        self.accesses.fetch_add(1, Ordering::Relaxed);
    }
}

impl Bus for Judge {
    fn pio_read(&mut self, _port: u16, width: Width) -> u32 {
        self.note(width, Width::Dword, 0);
        u32::MAX // more than was asked for
    }
    fn pio_write(&mut self, port: u16, width: Width, value: u32) {
        self.note(width, Width::Dword, value.into());
        if port == ports::VERDICT {
            *self.verdict.lock().unwrap() = Some(value);
            self.kicks.iter().for_each(|kick| kick.kick());
        }
    }
    fn mmio_read(&mut self, _gpa: u64, width: Width) -> u64 {
        self.note(width, Width::Qword, 0);
        u64::MAX
    }
    fn mmio_write(&mut self, _gpa: u64, width: Width, value: u64) {
        self.note(width, Width::Qword, value);
    }
    fn end_of_interrupt(&mut self, _vector: u8) {}
}

/// Runs a guest to its verdict, which must be good. Returns how many accesses reached the bus and the time.
fn run(name: &str, command_line: &str, interrupts: Interrupts, cpus: u32) -> (u64, Duration) {
    const LOAD: u64 = 0x10_0000;
    const TABLES: u64 = 0x2_0000;
    const BOOT_PARAMS: u64 = 0x1_0000;
    const COMMAND_LINE: u64 = 0x1_1000;
    let kvm = Kvm::open().unwrap();
    let vm = kvm.create_vm(VmConfig { interrupts, ..USER }).unwrap();
    let ram = GuestRam::new(&RamConfig::new(4 << 20)).unwrap();
    vm.map(MemorySlot {
        index: 0,
        region: ram.regions()[0].clone(),
        read_only: false,
        log_dirty: false,
    })
    .unwrap();
    let memory = ram.memory();
    memory.write_slice(keel_guests::find(name).unwrap().payload(), GuestAddress(LOAD)).unwrap();
    memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE)).unwrap();
    memory.write_obj(COMMAND_LINE as u32, GuestAddress(BOOT_PARAMS + 0x228)).unwrap(); // cmd_line_ptr
    common::write_page_tables(memory, TABLES);

    let mut vcpus: Vec<Box<dyn Vcpu>> = (0..cpus).map(|id| vm.create_vcpu(id).unwrap()).collect();
    let kicks: Vec<_> = vcpus.iter().map(|vcpu| vcpu.kicker()).collect();
    let watchdogs: Vec<_> =
        kicks.iter().map(|kick| Watchdog::new(kick.clone(), PATIENCE)).collect();
    for vcpu in &mut vcpus {
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    }
    let mut bus = Recorder::default();
    let mut settled = vcpus[0].settle(&mut bus).unwrap();
    let mut state = settled.save().unwrap();
    common::long_mode(&mut state, TABLES);
    state.registers.rip = LOAD + keel_guests::ENTRY as u64;
    state.registers.rsi = BOOT_PARAMS;
    state.registers.rflags = 2;
    settled.load(&state).unwrap();

    let judge = Judge { verdict: Arc::default(), accesses: Arc::default(), kicks };
    let begin = Instant::now();
    thread::scope(|scope| {
        for mut vcpu in vcpus {
            let mut bus = judge.clone();
            scope.spawn(move || assert_eq!(vcpu.run(&mut bus).unwrap(), Exit::Kicked));
        }
    });
    let took = begin.elapsed();
    watchdogs.iter().for_each(Watchdog::check);
    assert_eq!(
        *judge.verdict.lock().unwrap(),
        Some(keel_guests::VERDICT_GOOD),
        "{name} {interrupts:?}"
    );
    (judge.accesses.load(Ordering::Relaxed), took)
}

#[test]
fn a_second_cpu_is_started_and_no_interrupt_between_the_two_is_lost() {
    for interrupts in [Interrupts::Kernel, Interrupts::Split] {
        let (_, took) = run("smp_ipi", "count=1000", interrupts, 2);
        println!("smp_ipi_{interrupts:?} {} us/round", took.as_micros() / 1000);
    }
}

#[test]
fn a_hostile_guest_gets_nowhere() {
    let count = if std::env::var_os("KEEL_LONG").is_some() { 100_000 } else { 10_000 };
    for (seed, interrupts) in [(1, Interrupts::Kernel), (2, Interrupts::Split)] {
        let (accesses, took) = run("hostile", &format!("seed={seed} count={count}"), interrupts, 1);
        println!(
            "hostile_{interrupts:?} {count} operations, {accesses} accesses, {} ms",
            took.as_millis()
        );
        assert!(accesses > count, "strings have several units");
    }
}
