use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use keel_device_model::testing::Workbench;

use super::*;
use crate::output::testing::{Closed, Shared};

const SCR: u8 = 7;

/// A port on a bench.
struct Rig {
    bench: Workbench,
    serial: Serial,
    out: Shared,
}

impl Rig {
    fn new() -> Self {
        let out = Shared::default();
        Rig { bench: Workbench::new(), serial: Serial::new(Box::new(out.clone())), out }
    }
    fn read(&mut self, register: u8) -> u8 {
        self.serial.pio_read(register.into(), Width::Byte, &self.bench.lent()) as u8
    }
    fn write(&mut self, register: u8, value: u8) {
        self.serial.pio_write(register.into(), Width::Byte, value.into(), &self.bench.lent());
    }
    fn receive(&mut self, input: &[u8]) -> usize {
        self.serial.receive(input, &self.bench.lent())
    }
    fn levels(&self) -> Vec<bool> {
        self.bench.levels()
    }
}

#[test]
fn output_reaches_the_writer() {
    let mut rig = Rig::new();
    b"hello\n".iter().for_each(|byte| rig.write(DATA, *byte));
    assert_eq!(rig.out.text(), "hello\n");
    assert_eq!(rig.read(LSR), LSR_EMPTY);
}

#[test]
fn a_closed_pipe_stalls_nobody() {
    let bench = Workbench::new();
    let mut serial = Serial::new(Box::new(Closed));
    serial.pio_write(IER.into(), Width::Byte, IER_TRANSMITTER.into(), &bench.lent());
    for _ in 0..3 {
        serial.pio_write(DATA.into(), Width::Byte, 65, &bench.lent());
        assert_eq!(
            serial.pio_read(IIR_FCR.into(), Width::Byte, &bench.lent()),
            u32::from(IIR_TRANSMITTER)
        );
    }
    assert_eq!(serial.lost(), 3);
    assert_eq!(bench.levels(), [true, false, true, false, true, false, true, false]);
}

#[test]
fn fifos_show_only_when_enabled() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(IIR_FCR), IIR_NONE);
    rig.write(IIR_FCR, FCR_ENABLE);
    assert_eq!(rig.read(IIR_FCR), IIR_NONE | IIR_FIFOS);
    rig.write(IIR_FCR, FCR_TRIGGER);
    assert_eq!(rig.read(IIR_FCR), IIR_NONE, "nothing counts without the enable bit");
}

#[test]
fn the_receiver_can_be_cleared_even_while_the_divisor_shows() {
    let mut rig = Rig::new();
    rig.write(IIR_FCR, FCR_ENABLE);
    rig.write(IER, IER_RECEIVED);
    assert_eq!(rig.receive(b"abc"), 3);
    rig.write(LCR, LCR_DLAB | 3);
    rig.write(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER);
    assert_eq!(rig.read(LCR), LCR_DLAB | 3);
    assert_eq!(rig.read(LSR), LSR_EMPTY);
    assert_eq!(rig.levels(), [true, false]);
}

#[test]
fn received_data_keeps_the_line_high_until_all_is_read() {
    let mut rig = Rig::new();
    rig.write(IIR_FCR, FCR_ENABLE);
    rig.write(IER, IER_RECEIVED);
    assert_eq!(rig.receive(b"ab"), 2);
    assert_eq!(rig.read(IIR_FCR), IIR_RECEIVED | IIR_FIFOS);
    assert_eq!(rig.read(IIR_FCR), IIR_RECEIVED | IIR_FIFOS, "looking does not end it");
    assert_eq!((rig.read(DATA), rig.read(LSR)), (b'a', LSR_EMPTY | LSR_READY));
    assert_eq!(rig.levels(), [true]);
    assert_eq!((rig.read(DATA), rig.read(LSR)), (b'b', LSR_EMPTY));
    assert_eq!(rig.levels(), [false]);
}

#[test]
fn below_the_trigger_level_it_is_a_timeout() {
    let mut rig = Rig::new();
    rig.write(IIR_FCR, FCR_ENABLE | 0x80);
    rig.write(IER, IER_RECEIVED);
    rig.receive(b"1234567");
    assert_eq!(rig.read(IIR_FCR), IIR_TIMEOUT | IIR_FIFOS);
    rig.receive(b"8");
    assert_eq!(rig.read(IIR_FCR), IIR_RECEIVED | IIR_FIFOS);
}

#[test]
fn causes_have_their_priority_and_none_hides_another() {
    let mut rig = Rig::new();
    rig.write(IIR_FCR, FCR_ENABLE);
    rig.write(IER, IER_RECEIVED | IER_TRANSMITTER);
    rig.receive(b"x");
    assert_eq!(rig.read(IIR_FCR), IIR_RECEIVED | IIR_FIFOS);
    rig.read(DATA);
    assert_eq!(rig.read(IIR_FCR), IIR_TRANSMITTER | IIR_FIFOS);
    assert_eq!(rig.read(IIR_FCR), IIR_NONE | IIR_FIFOS);
    assert_eq!(rig.levels(), [true, false]);
}

/// Linux's console masks all interrupts while it writes, and trusts that unmasking raises what came meanwhile.
#[test]
fn unmasking_raises_what_is_there() {
    let mut rig = Rig::new();
    rig.write(IER, IER_RECEIVED);
    rig.write(IER, 0);
    rig.receive(b"x");
    assert!(rig.levels().is_empty());
    rig.write(IER, IER_RECEIVED);
    assert_eq!(rig.levels(), [true]);
    rig.write(IER, 0);
    rig.write(IER, IER_RECEIVED);
    assert_eq!(rig.levels(), [false, true], "an edge, again");
}

/// Linux's test for UARTs whose transmitter interrupt does not come back.
#[test]
fn enabling_the_transmitter_interrupt_raises_it_every_time() {
    let mut rig = Rig::new();
    for _ in 0..2 {
        rig.write(IER, IER_TRANSMITTER);
        assert_eq!(rig.read(IIR_FCR), IIR_TRANSMITTER);
        rig.write(IER, 0);
    }
    assert_eq!(rig.levels(), [true, false, true, false]);
}

#[test]
fn a_further_character_makes_a_further_edge() {
    let mut rig = Rig::new();
    rig.write(IER, IER_TRANSMITTER);
    rig.write(DATA, b'a');
    rig.write(DATA, b'b');
    assert_eq!(rig.levels(), [true, false, true, false, true]);
}

#[test]
fn loopback_returns_characters_and_modem_lines() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(MSR), MSR_CONNECTED);
    rig.write(MCR, MCR_LOOPBACK | 0x0a);
    assert_eq!(rig.read(MSR) & 0xf0, 0x90, "what Linux looks for");
    rig.write(DATA, b'l');
    assert_eq!(rig.read(LSR), LSR_EMPTY | LSR_READY);
    rig.write(DATA, b'm');
    assert_eq!(rig.read(LSR), LSR_EMPTY | LSR_READY | LSR_OVERRUN);
    assert_eq!(rig.read(LSR), LSR_EMPTY | LSR_READY);
    assert_eq!(rig.read(DATA), b'l');
    assert_eq!(rig.out.text(), "");
}

#[test]
fn changes_of_modem_lines_interrupt() {
    let mut rig = Rig::new();
    rig.write(MCR, MCR_LOOPBACK);
    rig.read(MSR);
    rig.write(IER, IER_MODEM);
    rig.write(MCR, MCR_LOOPBACK | 0x04);
    assert!(rig.levels().is_empty(), "ringing has begun");
    rig.write(MCR, MCR_LOOPBACK);
    assert_eq!(rig.levels(), [true], "and ended");
    assert_eq!(rig.read(IIR_FCR), IIR_MODEM);
    assert_eq!(rig.read(MSR), 0x04);
    assert_eq!(rig.levels(), [false]);
}

#[test]
fn input_waits_for_room() {
    let mut rig = Rig::new();
    let calls = Arc::new(AtomicU32::new(0));
    let counter = calls.clone();
    rig.serial.on_room(Box::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    rig.write(IIR_FCR, FCR_ENABLE);
    assert_eq!(rig.receive(&[b'x'; 20]), 16);
    assert_eq!(rig.receive(&[b'y'; 4]), 0);
    for _ in 0..15 {
        rig.read(DATA);
    }
    assert_eq!(calls.load(Ordering::Relaxed), 0);
    rig.read(DATA);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    rig.write(MCR, MCR_LOOPBACK);
    assert_eq!(rig.receive(b"z"), 0);
    rig.write(MCR, 0);
    assert_eq!(calls.load(Ordering::Relaxed), 2, "the line is connected again");
}

#[test]
fn reset_keeps_the_output() {
    let mut rig = Rig::new();
    rig.write(SCR, 0x5a);
    rig.write(LCR, LCR_DLAB);
    rig.serial.reset(&rig.bench.lent());
    assert_eq!(rig.read(SCR), 0);
    rig.write(DATA, b'k');
    assert_eq!(rig.out.text(), "k");
}

#[test]
fn impossible_states_are_refused() {
    let rig = Rig::new();
    let mut other = Rig::new();
    let full = SerialState { received: Bytes(vec![0; 2]), ..rig.serial.save() };
    assert!(matches!(
        other.serial.restore(full, &other.bench.lent()),
        Err(StateError::Impossible { kind: "serial", .. })
    ));
    assert_eq!(other.serial.save(), rig.serial.save());
}

#[test]
fn a_break_is_a_marked_zero() {
    let bench = Workbench::new();
    let mut serial = Serial::new(Box::new(std::io::sink()));
    serial.pio_write(1, Width::Byte, 0x04, &bench.lent());
    serial.receive_break(&bench.lent());
    assert_eq!(bench.levels(), [true]);
    assert_eq!(
        serial.pio_read(2, Width::Byte, &bench.lent()) & 0x0f,
        0x06,
        "line status interrupt"
    );
    assert_eq!(serial.pio_read(5, Width::Byte, &bench.lent()), 0x71);
    assert_eq!(bench.levels(), [false]);
    assert_eq!(serial.pio_read(0, Width::Byte, &bench.lent()), 0);
    assert_eq!(serial.pio_read(5, Width::Byte, &bench.lent()), 0x60);
}
