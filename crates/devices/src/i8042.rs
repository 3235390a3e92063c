//! The keyboard controller (Intel 8042 as in the IBM PC/AT), with no keyboard.
//!
//! What is left of it in a machine without PS/2: the CPU reset, the A20 gate, and answers at once to whoever looks for a keyboard, so
//! that nobody waits for one.

use keel_device_model::{Device, Lent, PortIo, Request, StateError};
use keel_hypervisor::Width;
use serde::{Deserialize, Serialize};

use crate::check::possible;

/// The data port: offset 0.
pub const DATA_PORT: u16 = 0x60;
/// The status and command port: offset 4. Port 0x61 is [another device's](crate::port61), so that the two are mapped
/// by themselves ([`Shifted`](crate::Shifted)).
pub const COMMAND_PORT: u16 = 0x64;
/// The keyboard's ISA interrupt.
pub const IRQ: u32 = 1;
/// The widest access it takes.
pub const WIDEST: Width = Width::Byte;

const DATA: u16 = 0;
const COMMAND: u16 = COMMAND_PORT - DATA_PORT;

/// There is a byte to read.
const STATUS_OUTPUT: u8 = 1 << 0;
/// The self test has passed. Always set: it has, before any guest code ran.
const STATUS_SYSTEM: u8 = 1 << 2;
/// The last write was to the command port.
const STATUS_COMMAND: u8 = 1 << 3;
/// The keyboard lock is open.
const STATUS_UNLOCKED: u8 = 1 << 4;
/// The byte is from the auxiliary device (mouse).
const STATUS_AUXILIARY: u8 = 1 << 5;
/// The device did not answer.
const STATUS_TIMEOUT: u8 = 1 << 6;

const CONFIG_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const CONFIG_KEYBOARD_OFF: u8 = 1 << 4;
const CONFIG_AUXILIARY_OFF: u8 = 1 << 5;
/// Both devices off, scan codes translated, system flag.
const CONFIG_AFTER_RESET: u8 = 0x74;

/// High lets the CPU run, low resets it.
const OUTPUT_RUN: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;
const OUTPUT_AFTER_RESET: u8 = 0xcf;

/// "Resend": what a controller says for a device that does not answer.
const NO_ANSWER: u8 = 0xfe;

/// The registers of the [`I8042`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042State {
    /// The configuration byte.
    pub config: u8,
    /// The output port.
    pub output_port: u8,
    /// A command that waits for its parameter.
    pub pending: Option<u8>,
    /// A byte to be read.
    pub output: Option<Output>,
    /// The last write was a command.
    pub last_was_command: bool,
}

/// A byte to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// It.
    pub byte: u8,
    /// Bits 5 and 6 of the status that come with it.
    pub status: u8,
}

/// A keyboard controller without a keyboard.
pub struct I8042 {
    registers: I8042State,
}

impl Default for I8042 {
    fn default() -> Self {
        I8042::new()
    }
}

impl I8042 {
    /// One as after a reset.
    pub fn new() -> Self {
        let registers = I8042State {
            config: CONFIG_AFTER_RESET,
            output_port: OUTPUT_AFTER_RESET,
            pending: None,
            output: None,
            last_was_command: false,
        };
        I8042 { registers }
    }

    fn status(&self) -> u8 {
        // Never bit 1, "busy with your last write": every write is done when it ends.
        STATUS_SYSTEM
            | STATUS_UNLOCKED
            | if self.registers.last_was_command { STATUS_COMMAND } else { 0 }
            | self.registers.output.map_or(0, |output| STATUS_OUTPUT | output.status)
    }

    fn answer(&mut self, byte: u8, status: u8) {
        self.registers.output = Some(Output { byte, status });
    }

    fn command(&mut self, command: u8, lent: &Lent<'_>) {
        let registers = &mut self.registers;
        registers.last_was_command = true;
        registers.pending = None;
        match command {
            0x20 => self.answer(self.registers.config, 0),
            // Those that take a parameter: configuration byte, output port, pretend the keyboard or the auxiliary device said it, send it
            // to the auxiliary device.
            0x60 | 0xd1..=0xd4 => registers.pending = Some(command),
            0xa7 => registers.config |= CONFIG_AUXILIARY_OFF,
            0xa8 => registers.config &= !CONFIG_AUXILIARY_OFF,
            // Tests of the two device's wires: "clock line stuck low", for none is connected.
            0xa9 | 0xab => self.answer(0x01, 0),
            // Self test: passed.
            0xaa => self.answer(0x55, 0),
            0xad => registers.config |= CONFIG_KEYBOARD_OFF,
            0xae => registers.config &= !CONFIG_KEYBOARD_OFF,
            // Input port: keyboard not locked.
            0xc0 => self.answer(0x80, 0),
            0xd0 => self.answer(self.registers.output_port, 0),
            0xdd => registers.output_port &= !OUTPUT_A20,
            0xdf => registers.output_port |= OUTPUT_A20,
            // Pulses low those of the output port's bits 0 to 3 that are zero here.
            0xf0..=0xff if command & OUTPUT_RUN == 0 => lent.machine.request(Request::Reset),
            _ => {}
        }
    }

    fn data(&mut self, value: u8, lent: &Lent<'_>) {
        self.registers.last_was_command = false;
        match self.registers.pending.take() {
            Some(0x60) => self.registers.config = value,
            Some(0xd1) => {
                self.registers.output_port = value | OUTPUT_RUN;
                if value & OUTPUT_RUN == 0 {
                    lent.machine.request(Request::Reset);
                }
            }
            Some(0xd2) => self.answer(value, 0),
            // Linux takes an auxiliary port for present if it hears this parameter back, and waits half a second if it hears nothing.
            Some(0xd3 | 0xd4) => self.answer(NO_ANSWER, STATUS_AUXILIARY | STATUS_TIMEOUT),
            // For the keyboard.
            _ => self.answer(NO_ANSWER, STATUS_TIMEOUT),
        }
    }

    fn drive(&self, lent: &Lent<'_>) {
        let keyboard =
            self.registers.output.is_some_and(|output| output.status & STATUS_AUXILIARY == 0);
        lent.line.set(keyboard && self.registers.config & CONFIG_KEYBOARD_INTERRUPT != 0);
    }
}

impl PortIo for I8042 {
    fn pio_read(&mut self, offset: u16, _width: Width, lent: &Lent<'_>) -> u32 {
        let value = match offset {
            DATA => self.registers.output.take().map_or(0, |output| output.byte),
            COMMAND => self.status(),
            _ => 0xff,
        };
        self.drive(lent);
        value.into()
    }

    fn pio_write(&mut self, offset: u16, _width: Width, value: u32, lent: &Lent<'_>) {
        match offset {
            DATA => self.data(value as u8, lent),
            COMMAND => self.command(value as u8, lent),
            _ => {}
        }
        self.drive(lent);
    }
}

impl Device for I8042 {
    type State = I8042State;
    const KIND: &'static str = "i8042";
    const VERSION: u32 = 1;

    fn reset(&mut self, lent: &Lent<'_>) {
        *self = I8042::new();
        self.drive(lent);
    }

    fn save(&self) -> I8042State {
        self.registers.clone()
    }

    fn restore(&mut self, state: I8042State, lent: &Lent<'_>) -> Result<(), StateError> {
        possible::<Self>(
            matches!(state.pending, None | Some(0x60 | 0xd1..=0xd4)),
            "command without a parameter",
        )?;
        possible::<Self>(state.output_port & OUTPUT_RUN != 0, "CPU held in reset")?;
        let flags = state.output.map_or(0, |output| output.status);
        possible::<Self>(flags & !(STATUS_AUXILIARY | STATUS_TIMEOUT) == 0, "status")?;
        self.registers = state;
        self.drive(lent);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use keel_device_model::testing::Workbench;

    use super::*;

    struct Rig(Workbench, I8042);

    impl Rig {
        fn new() -> Self {
            Rig(Workbench::new(), I8042::new())
        }
        fn read(&mut self, offset: u16) -> u8 {
            self.1.pio_read(offset, Width::Byte, &self.0.lent()) as u8
        }
        fn write(&mut self, offset: u16, value: u8) {
            self.1.pio_write(offset, Width::Byte, value.into(), &self.0.lent());
        }
        fn ask(&mut self, command: u8) -> u8 {
            self.write(COMMAND, command);
            assert_eq!(self.read(COMMAND) & 3, STATUS_OUTPUT);
            let answer = self.read(DATA);
            assert_eq!(self.read(COMMAND) & 3, 0);
            answer
        }
    }

    #[test]
    fn resets_the_cpu() {
        let mut rig = Rig::new();
        rig.write(COMMAND, 0xff);
        assert!(rig.0.requests().is_empty());
        rig.write(COMMAND, 0xfe);
        assert_eq!(rig.0.requests(), [Request::Reset]);
        rig.write(COMMAND, 0xd1);
        rig.write(DATA, 0xfe);
        assert_eq!(rig.0.requests(), [Request::Reset]);
    }

    #[test]
    fn keeps_the_a20_gate() {
        let mut rig = Rig::new();
        assert_eq!(rig.ask(0xd0) & OUTPUT_A20, OUTPUT_A20);
        rig.write(COMMAND, 0xd1);
        rig.write(DATA, 0xdd);
        assert_eq!(rig.ask(0xd0), 0xdd);
        rig.write(COMMAND, 0xdf);
        assert_eq!(rig.ask(0xd0), 0xdf);
        assert!(rig.0.requests().is_empty());
    }

    #[test]
    fn answers_that_nothing_is_connected() {
        let mut rig = Rig::new();
        assert_eq!(rig.ask(0xaa), 0x55);
        assert_eq!(rig.ask(0xab), 1);
        assert_eq!(rig.ask(0xa9), 1);
        rig.write(DATA, 0xf2);
        assert_eq!(rig.read(COMMAND), 0x55);
        assert_eq!(rig.read(DATA), NO_ANSWER);
        rig.write(COMMAND, 0xd3);
        rig.write(DATA, 0x5a);
        assert_eq!(rig.read(COMMAND), 0x75);
        assert_eq!(rig.read(DATA), NO_ANSWER);
        assert_eq!(rig.read(COMMAND), 0x14);
    }

    #[test]
    fn interrupts_for_the_keyboard_when_told_to() {
        let mut rig = Rig::new();
        rig.write(COMMAND, 0x60);
        rig.write(DATA, 0x65);
        assert_eq!(rig.ask(0x20), 0x65);
        rig.write(COMMAND, 0xd2);
        rig.write(DATA, 0x1c);
        assert_eq!(rig.0.levels(), [true, false, true]);
        assert_eq!(rig.read(DATA), 0x1c);
        assert_eq!(rig.0.levels(), [false]);
    }

    #[test]
    fn impossible_states_are_refused() {
        let mut rig = Rig::new();
        let good = rig.1.save();
        for bad in [
            I8042State { output_port: 0, ..good.clone() },
            I8042State { pending: Some(0xfe), ..good.clone() },
            I8042State { output: Some(Output { byte: 0, status: 2 }), ..good.clone() },
        ] {
            assert!(rig.1.restore(bad, &rig.0.lent()).is_err());
        }
        assert_eq!(rig.1.save(), good);
    }
}
