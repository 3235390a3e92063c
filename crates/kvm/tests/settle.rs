//! A guest is taken out of one VM and put into another in the middle of any access, and notices nothing.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::sync::Arc;

use common::{Access, CODE, Guest, RAM, USER};
use keel_hypervisor::{Bus, Exit, Kick, Width};
use keel_memory::{GuestRam, RamConfig};
use vm_memory::{Bytes, GuestAddress};

/// Ports, strings both ways in all widths, memory-mapped accesses, strings to and from such memory, and both over a page's end.
const GUEST: &[u8] = &[
    0xb8, 0x00, 0xd0, // mov ax, 0xd000
    0x8e, 0xd8, // mov ds, ax: where no RAM is
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xc0, // mov es, ax
    0xba, 0xf0, 0x01, // mov dx, 0x1f0
    0xec, // in al, dx
    0xed, // in ax, dx
    0x66, 0xed, // in eax, dx
    0xee, // out dx, al
    0xef, // out dx, ax
    0x66, 0xef, // out dx, eax
    0xbf, 0xfb, 0x1f, // mov di, 0x1ffb
    0xb9, 0x07, 0x00, // mov cx, 7
    0xf3, 0x6c, // rep insb, over a page's end
    0xb9, 0x05, 0x00, // mov cx, 5
    0xf3, 0x6d, // rep insw
    0xb9, 0x03, 0x00, // mov cx, 3
    0x66, 0xf3, 0x6d, // rep insd
    0xbe, 0xfb, 0x1f, // mov si, 0x1ffb
    0xb9, 0x07, 0x00, // mov cx, 7
    0x26, 0xf3, 0x6e, // rep outsb from es
    0xb9, 0x05, 0x00, // mov cx, 5
    0x26, 0xf3, 0x6f, // rep outsw
    0xb9, 0x03, 0x00, // mov cx, 3
    0x66, 0x26, 0xf3, 0x6f, // rep outsd
    0xa0, 0x10, 0x00, // mov al, [0x10]
    0xa1, 0x12, 0x00, // mov ax, [0x12]
    0x66, 0xa1, 0x14, 0x00, // mov eax, [0x14]
    0x66, 0xa3, 0xfd, 0x0f, // mov [0xffd], eax, over a page's end
    0x66, 0xa1, 0xfe, 0x0f, // mov eax, [0xffe], over a page's end
    0x66, 0xa3, 0x30, 0x00, // mov [0x30], eax
    0xfe, 0x06, 0x40, 0x00, // inc byte [0x40]: a load and a store
    0xb9, 0x03, 0x00, // mov cx, 3
    0xbe, 0x50, 0x00, // mov si, 0x50
    0xf3, 0xa5, // rep movsw from there to RAM
    0x06, // push es
    0x1e, // push ds
    0x07, // pop es
    0x1f, // pop ds
    0xb9, 0x03, 0x00, // mov cx, 3
    0xbe, 0xfb, 0x1f, // mov si, 0x1ffb
    0xbf, 0xff, 0x0f, // mov di, 0xfff
    0xf3, 0xa5, // rep movsw from RAM to there, over a page's end
    0xb9, 0x03, 0x00, // mov cx, 3
    0xbf, 0x60, 0x00, // mov di, 0x60
    0xf3, 0x6d, // rep insw from the port to there
    0xf4, // hlt
];

/// Answers each read with another value, and stops the vCPU at some of the accesses.
struct Stopping {
    log: Vec<(Access, u64)>,
    stop_at: Box<dyn Fn(usize) -> bool>,
    kick: Arc<dyn Kick>,
}

impl Stopping {
    /// The value depends on how many accesses there have been: one that is repeated or left out changes all that come after.
    fn note(&mut self, access: Access, value: Option<u64>, width: Width) -> u64 {
        let number = self.log.len();
        let value =
            value.unwrap_or((number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) & width.mask());
        self.log.push((access, value));
        if (self.stop_at)(number) {
            self.kick.kick();
        }
        value
    }
}

impl Bus for Stopping {
    fn pio_read(&mut self, port: u16, width: Width) -> u32 {
        self.note(Access::In(port, width), None, width) as u32
    }
    fn pio_write(&mut self, port: u16, width: Width, value: u32) {
        self.note(Access::Out(port, width, value), Some(0), width);
    }
    fn mmio_read(&mut self, gpa: u64, width: Width) -> u64 {
        self.note(Access::Load(gpa, width), None, width)
    }
    fn mmio_write(&mut self, gpa: u64, width: Width, value: u64) {
        self.note(Access::Store(gpa, width, value), Some(0), width);
    }
    fn end_of_interrupt(&mut self, vector: u8) {
        panic!("{vector}");
    }
}

fn copy(ram: &GuestRam) -> GuestRam {
    let fresh = GuestRam::new(&RamConfig::new(RAM)).unwrap();
    fresh.memory().write_slice(&contents(ram), GuestAddress(0)).unwrap();
    fresh
}

fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; RAM as usize];
    ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// What came of a run: all accesses, RAM, and the general registers.
#[derive(PartialEq)]
struct Outcome {
    log: Vec<(Access, u64)>,
    ram: Vec<u8>,
    registers: keel_hypervisor::state::Registers,
}

/// Runs the guest to its end. Wherever `stop_at` says so it moves to a fresh VM. Returns how often it moved, too.
fn run(stop_at: impl Fn(usize) -> bool + 'static) -> (Outcome, usize) {
    let mut guest = Guest::new(GUEST);
    let mut bus =
        Stopping { log: Vec::new(), stop_at: Box::new(stop_at), kick: guest.vcpu.kicker() };
    let mut moves = 0;
    loop {
        match guest.vcpu.run(&mut bus).unwrap() {
            Exit::Halted => break,
            Exit::Kicked => {}
            other => panic!("{other:?}"),
        }
        guest.watchdog.check();
        let state = guest.vcpu.settle(&mut bus).unwrap().save().unwrap();
        let ram = copy(&guest.ram);
        guest = Guest::around(ram, USER, false);
        bus.kick = guest.vcpu.kicker();
        guest.vcpu.settle(&mut bus).unwrap().load(&state).unwrap();
        moves += 1;
    }
    let registers = guest.vcpu.settle(&mut bus).unwrap().save().unwrap().registers;
    (Outcome { log: bus.log, ram: contents(&guest.ram), registers }, moves)
}

fn assert_same(outcome: &Outcome, undisturbed: &Outcome, what: &str) {
    assert_eq!(outcome.log, undisturbed.log, "{what}");
    assert_eq!(outcome.registers, undisturbed.registers, "{what}");
    assert!(outcome.ram == undisturbed.ram, "{what}: RAM differs");
}

#[test]
fn a_guest_moved_in_the_middle_of_any_access_loses_and_repeats_nothing() {
    let (undisturbed, moves) = run(|_| false);
    assert_eq!(moves, 0);
    let steps = undisturbed.log.len();
    assert!(steps > 50, "{steps} accesses");
    // Every word the first string read is where it belongs: the run we compare with is right itself.
    let first_string = undisturbed.log.iter().skip(6).take(7).map(|(_, value)| *value as u8);
    assert_eq!(undisturbed.ram[0x1ffb..0x2002], first_string.collect::<Vec<_>>());
    assert_eq!(undisturbed.registers.rip, CODE + GUEST.len() as u64);

    for step in 0..steps {
        let (outcome, moves) = run(move |number| number == step);
        assert_eq!(moves, 1, "step {step}");
        assert_same(
            &outcome,
            &undisturbed,
            &format!("moved at access {step}: {:?}", undisturbed.log[step]),
        );
    }
    let (outcome, moves) = run(|_| true);
    assert_same(&outcome, &undisturbed, "moved at every access");
    println!("accesses {steps} accesses");
    println!("moves_in_one_run {moves} moves");
}

#[test]
fn settling_runs_no_further_instruction_and_keeps_a_kick() {
    let mut guest = Guest::new(&[0xe6, 0x10, 0xe6, 0x11, 0xf4]); // out 0x10, al; out 0x11, al; hlt
    let mut bus = Stopping {
        log: Vec::new(),
        stop_at: Box::new(|number| number == 0),
        kick: guest.vcpu.kicker(),
    };
    assert_eq!(guest.vcpu.run(&mut bus).unwrap(), Exit::Kicked);
    guest.vcpu.kicker().kick();
    for _ in 0..3 {
        let state = guest.vcpu.settle(&mut bus).unwrap().save().unwrap();
        assert_eq!(state.registers.rip, CODE + 2);
    }
    assert_eq!(bus.log.len(), 1);
    assert_eq!(
        guest.vcpu.run(&mut bus).unwrap(),
        Exit::Kicked,
        "the kick before settling still counts"
    );
    assert_eq!(bus.log.len(), 1);
    assert_eq!(guest.vcpu.run(&mut bus).unwrap(), Exit::Halted);
    assert_eq!(bus.log.len(), 2);
}
