//! Serial ports: the 16550A (National Semiconductor PC16550D data sheet).
//!
//! Registers, receiver and loopback are those of [`vm_superio::Serial`]. That model raises an interrupt once for each cause and forgets it when the
//! guest looks, which a driver on a shared or edge-triggered line can lose; it has no FIFO control, no priorities and no
//! modem-status changes. So the interrupt logic is here, and makes a level: high exactly while an enabled cause is there.

use std::io::{self, Write};

use keel_device_model::{Device, Lent, PortIo, StateError};
use keel_hypervisor::Width;
use keel_hypervisor::state::Bytes;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState as UartState};

use crate::check::possible;
use crate::output::Output;

/// Where a PC has a serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Com {
    /// The first of its [`PORTS`] ports.
    pub port: u16,
    /// Its ISA interrupt.
    pub irq: u32,
}

/// `ttyS0`.
pub const COM1: Com = Com { port: 0x3f8, irq: 4 };
/// `ttyS1`.
pub const COM2: Com = Com { port: 0x2f8, irq: 3 };
/// `ttyS2`. Shares COM1's interrupt.
pub const COM3: Com = Com { port: 0x3e8, irq: 4 };
/// `ttyS3`. Shares COM2's interrupt.
pub const COM4: Com = Com { port: 0x2e8, irq: 3 };
/// The four in the order of their names.
pub const COM_PORTS: [Com; 4] = [COM1, COM2, COM3, COM4];
/// How many ports a serial port takes.
pub const PORTS: u16 = 8;
/// The widest access it takes.
pub const WIDEST: Width = Width::Byte;

const DATA: u8 = 0;
const IER: u8 = 1;
/// Interrupt identification when read, FIFO control when written.
const IIR_FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const MSR: u8 = 6;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_LINE: u8 = 0x06;
const IIR_RECEIVED: u8 = 0x04;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_TRANSMITTER: u8 = 0x02;
const IIR_MODEM: u8 = 0x00;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const FCR_TRIGGER: u8 = 0xc0;

const LCR_DLAB: u8 = 1 << 7;
const MCR_LOOPBACK: u8 = 1 << 4;
const LSR_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_BREAK: u8 = 1 << 4;
/// Holding and shift register empty: characters leave at once.
const LSR_EMPTY: u8 = 0x60;
const MSR_RING: u8 = 1 << 6;
/// Carrier, data set ready, clear to send: somebody is there.
const MSR_CONNECTED: u8 = 0xb0;

/// The receiver's FIFO, in characters.
const FIFO: usize = 16;
/// What `vm_superio` would hold.
const UART_FIFO: usize = 64;

/// The registers of a [`Serial`] port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// The divisor latch.
    pub divisor: u16,
    /// IER.
    pub interrupt_enable: u8,
    /// FCR without the bits that clear themselves.
    pub fifo_control: u8,
    /// LCR.
    pub line_control: u8,
    /// MCR.
    pub modem_control: u8,
    /// SCR.
    pub scratch: u8,
    /// What has happened to the line since LSR was last read: bit 1, a character was lost; bit 4, a break was received.
    pub line_events: u8,
    /// Modem lines that have changed: bits 0 to 3 of MSR.
    pub modem_changes: u8,
    /// The transmitter has become empty and the guest not yet been told.
    pub transmitter_pending: bool,
    /// Characters received, the oldest first.
    pub received: Bytes,
}

/// A serial port.
///
/// ```
/// use keel_device_model::{PortIo, testing::Workbench};
/// use keel_devices::serial::Serial;
/// use keel_hypervisor::Width;
///
/// let bench = Workbench::new();
/// let mut serial = Serial::new(Box::new(std::io::stdout()));
/// serial.pio_write(0, Width::Byte, u32::from(b'!'), &bench.lent());
/// assert_eq!(serial.receive(b"hello", &bench.lent()), 1, "the FIFO is off after reset");
/// assert_eq!(serial.pio_read(0, Width::Byte, &bench.lent()), u32::from(b'h'));
/// ```
pub struct Serial {
    // Wiring.
    room: Option<Box<dyn Fn() + Send>>,
    /// The last input was not taken whole: `room` is to be called.
    waiting: bool,
    // Registers.
    /// Holds the output, too.
    uart: Uart<Nobody, NoEvents, Output>,
    /// As the UART's own, which can not be read while the divisor latch is shown in its place.
    interrupt_enable: u8,
    fifo_control: u8,
    line_events: u8,
    modem_changes: u8,
    transmitter_pending: bool,
}

/// Whom the UART model tells of interrupts: they are made from its registers instead.
struct Nobody;

impl vm_superio::Trigger for Nobody {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        Ok(())
    }
}

impl Serial {
    /// A serial port that writes to `output`, each character at once.
    ///
    /// A character that can not be written (the pipe is closed, or full and not blocking) is lost. A writer that blocks holds up the vCPU.
    pub fn new(output: Box<dyn Write + Send>) -> Self {
        let uart = Uart::with_events(Nobody, NoEvents, Output::new(output));
        Serial {
            room: None,
            waiting: false,
            uart,
            interrupt_enable: 0,
            fifo_control: 0,
            line_events: 0,
            modem_changes: 0,
            transmitter_pending: false,
        }
    }

    /// Calls `room` when there is room again after [`receive`](Serial::receive) did not take all it was given.
    ///
    /// It is called in the middle of a guest's access and must not come back to this device: it should write an eventfd or the like.
    pub fn on_room(&mut self, room: Box<dyn Fn() + Send>) {
        self.room = Some(room);
    }

    /// Characters for the guest. Returns how many were taken; the caller keeps the others until there is [room](Serial::on_room).
    pub fn receive(&mut self, input: &[u8], lent: &Lent<'_>) -> usize {
        let room =
            if self.in_loopback() { 0 } else { self.capacity().saturating_sub(self.received()) };
        let taken = match input.get(..room.min(input.len())) {
            None | Some([]) => 0,
            Some(fits) => self.uart.enqueue_raw_bytes(fits).unwrap_or(0),
        };
        self.waiting = taken < input.len();
        self.settle(lent);
        taken
    }

    /// A break for the guest: a character of zeroes that LSR marks. Where characters wait that came before it, or in loopback, it is lost.
    pub fn receive_break(&mut self, lent: &Lent<'_>) {
        if self.received() == 0 && !self.in_loopback() {
            self.line_events |= LSR_BREAK;
            // There is room for one.
            let _ = self.uart.enqueue_raw_bytes(&[0]);
            self.settle(lent);
        }
    }

    /// How many characters of output were lost.
    pub fn lost(&self) -> u64 {
        self.uart.writer().lost()
    }

    /// How many characters the receiver holds.
    fn received(&self) -> usize {
        UART_FIFO - self.uart.fifo_capacity()
    }

    /// How many it can hold.
    fn capacity(&self) -> usize {
        if self.fifo_control & FCR_ENABLE != 0 { FIFO } else { 1 }
    }

    fn in_loopback(&mut self) -> bool {
        self.uart.read(MCR) & MCR_LOOPBACK != 0
    }

    /// The most urgent interrupt, as IIR identifies it (data sheet, table 4).
    fn interrupt(&self) -> u8 {
        let enabled = |cause| self.interrupt_enable & cause != 0;
        if enabled(IER_LINE) && self.line_events != 0 {
            IIR_LINE
        } else if enabled(IER_RECEIVED) && self.received() > 0 {
            let trigger = match self.fifo_control & (FCR_TRIGGER | FCR_ENABLE) {
                0x41 => 4,
                0x81 => 8,
                0xc1 => 14,
                _ => 1,
            };
            // Below the trigger level the guest hears of characters only after a pause. No time passes between ours, so that the pause
            // is over at once; but a driver may take `IIR_RECEIVED` for a promise of so many characters.
            if self.received() < trigger { IIR_TIMEOUT } else { IIR_RECEIVED }
        } else if enabled(IER_TRANSMITTER) && self.transmitter_pending {
            IIR_TRANSMITTER
        } else if enabled(IER_MODEM) && self.modem_changes != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// Sets the line, which on a PC's port OUT2 gates too; no driver wants it gated, and some firmware forgets to open the gate.
    fn drive(&self, lent: &Lent<'_>) {
        lent.line.set(self.interrupt() != IIR_NONE);
    }

    /// To be done after every change.
    fn settle(&mut self, lent: &Lent<'_>) {
        self.drive(lent);
        if self.waiting && self.received() == 0 && !self.in_loopback() {
            self.waiting = false;
            if let Some(room) = &self.room {
                room();
            }
        }
    }

    fn put(&mut self, byte: u8, lent: &Lent<'_>) {
        // The holding register is full for no time at all. But its interrupt ends and begins anew, and behind an edge-triggered input the
        // driver must see that.
        self.transmitter_pending = false;
        self.drive(lent);
        if self.in_loopback() && self.received() >= self.capacity() {
            self.line_events |= LSR_OVERRUN;
        } else {
            self.write_uart(DATA, byte);
        }
        self.transmitter_pending = true;
    }

    /// Writes FCR.
    fn control_fifos(&mut self, value: u8) {
        let switched = (self.fifo_control ^ value) & FCR_ENABLE != 0;
        // The other bits count only together with this one (data sheet, 8.5).
        self.fifo_control =
            if value & FCR_ENABLE != 0 { value & (FCR_TRIGGER | FCR_ENABLE) } else { 0 };
        if switched || value & (FCR_ENABLE | FCR_CLEAR_RECEIVER) == FCR_ENABLE | FCR_CLEAR_RECEIVER
        {
            self.clear_receiver();
        }
    }

    fn clear_receiver(&mut self) {
        let line_control = self.uart.read(LCR);
        // Or the divisor would be read in place of the characters.
        self.write_uart(LCR, line_control & !LCR_DLAB);
        while self.received() > 0 {
            self.uart.read(DATA);
        }
        self.write_uart(LCR, line_control);
    }

    /// Writes MCR, which in loopback moves the modem lines.
    fn control_modem(&mut self, value: u8) {
        let before = self.uart.read(MSR);
        self.write_uart(MCR, value & 0x1f);
        let after = self.uart.read(MSR);
        // The end of ringing counts, its begin does not.
        let changed = (before ^ after) & !(after & MSR_RING);
        self.modem_changes |= changed >> 4;
    }

    fn write_uart(&mut self, register: u8, value: u8) {
        // It can not fail: the output does not, nor does the trigger.
        let _ = self.uart.write(register, value);
    }

    /// Gives the UART new registers and leaves it its output.
    fn rebuild(&mut self, state: &UartState) -> Result<(), StateError> {
        let output = std::mem::replace(self.uart.writer_mut(), Output::new(Box::new(io::sink())));
        self.uart = Uart::from_state(state, Nobody, NoEvents, output)
            .map_err(|error| StateError::Impossible { kind: Self::KIND, why: error.to_string() })?;
        Ok(())
    }
}

impl PortIo for Serial {
    fn pio_read(&mut self, offset: u16, _width: Width, lent: &Lent<'_>) -> u32 {
        let value = match offset as u8 {
            IIR_FCR => {
                let interrupt = self.interrupt();
                if interrupt == IIR_TRANSMITTER {
                    self.transmitter_pending = false;
                }
                interrupt | if self.fifo_control & FCR_ENABLE != 0 { IIR_FIFOS } else { 0 }
            }
            LSR => self.uart.read(LSR) | std::mem::take(&mut self.line_events),
            MSR => self.uart.read(MSR) | std::mem::take(&mut self.modem_changes),
            register => self.uart.read(register),
        };
        self.settle(lent);
        value.into()
    }

    fn pio_write(&mut self, offset: u16, _width: Width, value: u32, lent: &Lent<'_>) {
        let (register, value) = (offset as u8, value as u8);
        let divisor = self.uart.read(LCR) & LCR_DLAB != 0;
        match register {
            DATA if !divisor => self.put(value, lent),
            IER if !divisor => {
                // Enabling this interrupt while the transmitter is empty raises it.
                self.transmitter_pending |= value & !self.interrupt_enable & IER_TRANSMITTER != 0;
                self.interrupt_enable = value & 0x0f;
                self.write_uart(IER, value);
            }
            IIR_FCR => self.control_fifos(value),
            MCR => self.control_modem(value),
            register => self.write_uart(register, value),
        }
        self.settle(lent);
    }
}

impl Device for Serial {
    type State = SerialState;
    const KIND: &'static str = "serial";
    const VERSION: u32 = 1;

    fn reset(&mut self, lent: &Lent<'_>) {
        // The default state holds nothing that could be refused.
        let _ = self.rebuild(&UartState::default());
        self.interrupt_enable = 0;
        self.fifo_control = 0;
        self.line_events = 0;
        self.modem_changes = 0;
        self.transmitter_pending = false;
        self.settle(lent);
    }

    fn save(&self) -> SerialState {
        let uart = self.uart.state();
        SerialState {
            divisor: u16::from_le_bytes([uart.baud_divisor_low, uart.baud_divisor_high]),
            interrupt_enable: self.interrupt_enable,
            fifo_control: self.fifo_control,
            line_control: uart.line_control,
            modem_control: uart.modem_control,
            scratch: uart.scratch,
            line_events: self.line_events,
            modem_changes: self.modem_changes,
            transmitter_pending: self.transmitter_pending,
            received: Bytes(uart.in_buffer),
        }
    }

    fn restore(&mut self, state: SerialState, lent: &Lent<'_>) -> Result<(), StateError> {
        let enabled = state.fifo_control & FCR_ENABLE != 0;
        possible::<Self>(state.interrupt_enable <= 0x0f, "interrupt enable register")?;
        possible::<Self>(
            state.fifo_control & !(FCR_TRIGGER | FCR_ENABLE) == 0
                && (enabled || state.fifo_control == 0),
            "FIFO control register",
        )?;
        possible::<Self>(state.modem_control <= 0x1f, "modem control register")?;
        possible::<Self>(state.modem_changes <= 0x0f, "modem status register")?;
        possible::<Self>(
            state.line_events & !(LSR_OVERRUN | LSR_BREAK) == 0,
            "line status register",
        )?;
        possible::<Self>(
            state.received.0.len() <= if enabled { FIFO } else { 1 },
            "more characters received than there is room for",
        )?;
        let [baud_divisor_low, baud_divisor_high] = state.divisor.to_le_bytes();
        self.rebuild(&UartState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: IIR_NONE,
            line_control: state.line_control,
            line_status: LSR_EMPTY | if state.received.0.is_empty() { 0 } else { LSR_READY },
            modem_control: state.modem_control,
            modem_status: MSR_CONNECTED,
            scratch: state.scratch,
            in_buffer: state.received.0,
        })?;
        self.interrupt_enable = state.interrupt_enable;
        self.fifo_control = state.fifo_control;
        self.line_events = state.line_events;
        self.modem_changes = state.modem_changes;
        self.transmitter_pending = state.transmitter_pending;
        self.settle(lent);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
