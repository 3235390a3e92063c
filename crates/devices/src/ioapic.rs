//! The I/O APIC (Intel 82093AA data sheet), for when the local APICs are the hypervisor's and this is not (`-machine kernel-irqchip=split`).
//!
//! Its version is 0x20, which has an EOI register besides.

use std::sync::Arc;

use keel_device_model::{Device, EndOfInterrupt, Lent, LineSink, MmioIo, Seat, StateError};
use keel_hypervisor::state::IoApicState;
use keel_hypervisor::{Msi, Route, Target, Width};

use crate::MsiSink;
use crate::check::possible;

/// The guest physical address of its registers.
pub const BASE: u64 = 0xfec0_0000;
/// How many bytes they take.
pub const SIZE: u64 = 0x1000;
/// How many inputs it has.
pub const PINS: u8 = 24;
/// The widest access it takes.
pub const WIDEST: Width = Width::Dword;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

const ID: u32 = 0;
const VERSION_REGISTER: u32 = 1;
const ARBITRATION: u32 = 2;
const REDIRECTION: u32 = 0x10;
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 7 << 8;
const LOGICAL: u64 = 1 << 11;
const POLARITY: u64 = 1 << 13;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// The destination's 8 bits, and below them the 7 more that KVM and other hypervisors define.
const DESTINATION: u64 = 0xfffe << 48;
const WRITABLE: u64 = VECTOR | DELIVERY_MODE | LOGICAL | POLARITY | LEVEL | MASKED | DESTINATION;

/// The first vector that can be delivered: those below are errors (Intel SDM volume 3, 11.5.2).
const FIRST_VECTOR: u64 = 16;

/// Who is told of [routes](IoApic::routes).
type OnRoutes = Box<dyn Fn(Vec<Route>) + Send>;

/// An I/O APIC.
///
/// Interrupts leave it through an [`MsiSink`]. They come in by [`Pin`]s, and their ends by [`Eoi`]:
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use keel_device_model::{HostClock, Line, MmioIo, Seat, Surroundings, testing::Requests};
/// use keel_devices::MsiSink;
/// use keel_devices::ioapic::{IoApic, Pin};
/// use keel_hypervisor::{Msi, Width};
///
/// #[derive(Default)]
/// struct Cpus(Mutex<Vec<Msi>>);
/// impl MsiSink for Cpus {
///     fn send(&self, msi: Msi) {
///         self.0.lock().unwrap().push(msi);
///     }
/// }
///
/// let cpus = Arc::new(Cpus::default());
/// let surroundings = Surroundings {
///     clock: Arc::new(HostClock::stopped_at(0)),
///     machine: Arc::new(Requests::default()),
/// };
/// let ioapic = IoApic::new(cpus.clone(), Box::new(|_routes| {}));
/// let ioapic = Seat::new(ioapic, Line::unconnected(), &surroundings);
/// let line = Line::new(Pin::new(&ioapic, 4));
///
/// // The guest unmasks pin 4, edge-triggered, vector 0x41, and the device on it interrupts.
/// ioapic.with(|ioapic, lent| {
///     ioapic.mmio_write(0x00, Width::Dword, 0x10 + 2 * 4, lent);
///     ioapic.mmio_write(0x10, Width::Dword, 0x41, lent);
/// });
/// line.pulse();
/// assert_eq!(cpus.0.lock().unwrap()[..], [Msi { address: 0xfee0_0000, data: 0x41 }]);
/// ```
pub struct IoApic {
    // Wiring.
    sink: Arc<dyn MsiSink>,
    on_routes: OnRoutes,
    // Registers.
    /// `irr` holds the levels of the inputs.
    registers: IoApicState,
}

/// A level-triggered entry whose end is told of. The other delivery modes have none.
fn is_level(entry: u64) -> bool {
    // Fixed or lowest priority.
    entry & LEVEL != 0 && entry & DELIVERY_MODE <= 1 << 8
}

/// The message an entry makes (Intel SDM volume 3, 11.11).
fn msi(entry: u64) -> Msi {
    let logical = if entry & LOGICAL != 0 { 1 << 2 } else { 0 };
    let level = if entry & LEVEL != 0 { 1 << 15 | 1 << 14 } else { 0 };
    Msi {
        // The extension of the destination comes to stand in bits 5 to 11, where the hypervisor looks for it.
        address: 0xfee0_0000 | (entry & DESTINATION) >> 44 | logical,
        data: (entry & (VECTOR | DELIVERY_MODE)) as u32 | level,
    }
}

/// What [`IoApic::routes`] has of an entry.
fn route(entry: u64) -> Option<Msi> {
    (is_level(entry) && entry & VECTOR >= FIRST_VECTOR).then(|| msi(entry))
}

impl IoApic {
    /// An I/O APIC as after a reset: all masked.
    ///
    /// `on_routes` is called with the new [routes](IoApic::routes) whenever they have changed, in the middle of the guest's access and before an interrupt
    /// goes that way. It must not come back to the device.
    pub fn new(sink: Arc<dyn MsiSink>, on_routes: Box<dyn Fn(Vec<Route>) + Send>) -> Self {
        let registers = IoApicState {
            base: BASE,
            select: 0,
            id: 0,
            irr: 0,
            redirection: [MASKED; PINS as usize],
        };
        IoApic { sink, on_routes, registers }
    }

    /// The routes the hypervisor must know of so that it tells of the end of their interrupts: those of level-triggered entries.
    ///
    /// Masked ones are among them. An interrupt may be masked before it ends; and drivers mask and unmask level-triggered interrupts all the time, which would be
    /// dear if each changed the hypervisor's table.
    pub fn routes(&self) -> Vec<Route> {
        (0..)
            .zip(self.registers.redirection)
            .filter_map(|(gsi, entry)| Some(Route { gsi, target: Target::Msi(route(entry)?) }))
            .collect()
    }

    /// An input is now high or low. There are [`PINS`]; on others nothing happens.
    pub fn set_pin(&mut self, pin: u8, high: bool) {
        let Some(entry) = self.registers.redirection.get(usize::from(pin)) else {
            return;
        };
        let level = is_level(*entry);
        let bit = 1 << pin;
        let was_high = self.registers.irr & bit != 0;
        if high {
            self.registers.irr |= bit;
        } else {
            self.registers.irr &= !bit;
        }
        // An edge at a masked pin is lost (data sheet, 3.2.4). A level waits.
        if high && (level || !was_high) {
            self.deliver(usize::from(pin));
        }
    }

    /// A local APIC has ended an interrupt.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..usize::from(PINS) {
            let entry = &mut self.registers.redirection[pin];
            if *entry & VECTOR == u64::from(vector) && *entry & REMOTE_IRR != 0 {
                *entry &= !REMOTE_IRR;
                self.deliver_level(pin);
            }
        }
    }

    /// Sends the interrupt of a pin, unless it is masked or not yet ended.
    fn deliver(&mut self, pin: usize) {
        let entry = &mut self.registers.redirection[pin];
        if *entry & (MASKED | REMOTE_IRR) != 0 {
            return;
        }
        if is_level(*entry) {
            *entry |= REMOTE_IRR;
        }
        self.sink.send(msi(*entry));
    }

    /// The same if its level asks for it.
    fn deliver_level(&mut self, pin: usize) {
        if is_level(self.registers.redirection[pin]) && self.registers.irr & 1 << pin != 0 {
            self.deliver(pin);
        }
    }

    fn read_register(&self) -> u32 {
        match self.registers.select {
            ID | ARBITRATION => self.registers.id << 24,
            VERSION_REGISTER => VERSION,
            select => self.entry_of(select).map_or(0, |(pin, high)| {
                let entry = self.registers.redirection[pin];
                if high { (entry >> 32) as u32 } else { entry as u32 }
            }),
        }
    }

    fn write_register(&mut self, value: u32) {
        if self.registers.select == ID {
            self.registers.id = value >> 24 & 0x0f;
        }
        let Some((pin, high)) = self.entry_of(self.registers.select) else {
            return;
        };
        let entry = &mut self.registers.redirection[pin];
        let before = *entry;
        let written = if high {
            before & 0xffff_ffff | u64::from(value) << 32
        } else {
            before & !0xffff_ffff | u64::from(value)
        };
        *entry = written & WRITABLE | before & REMOTE_IRR;
        // An edge has no end. Drivers that know no EOI register use this to end a level by force.
        if !is_level(*entry) {
            *entry &= !REMOTE_IRR;
        }
        if route(before) != route(*entry) {
            (self.on_routes)(self.routes());
        }
        self.deliver_level(pin);
    }

    /// The entry a register belongs to, and whether it is its upper half.
    fn entry_of(&self, select: u32) -> Option<(usize, bool)> {
        let index = select.checked_sub(REDIRECTION)? as usize;
        (index / 2 < usize::from(PINS)).then_some((index / 2, index % 2 == 1))
    }
}

impl MmioIo for IoApic {
    fn mmio_read(&mut self, offset: u64, width: Width, _lent: &Lent<'_>) -> u64 {
        let register = match offset & !3 {
            SELECT => self.registers.select,
            WINDOW => self.read_register(),
            _ => 0,
        };
        u64::from(register) >> (8 * (offset & 3)) & width.mask()
    }

    fn mmio_write(&mut self, offset: u64, width: Width, value: u64, _lent: &Lent<'_>) {
        match (offset, width) {
            // Eight bits of it count.
            (SELECT, _) => self.registers.select = value as u32 & 0xff,
            (WINDOW, Width::Dword) => self.write_register(value as u32),
            (EOI, _) => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

impl Device for IoApic {
    type State = IoApicState;
    const KIND: &'static str = "ioapic";
    const VERSION: u32 = 1;

    /// The levels of the inputs are the devices' business, and stay.
    fn reset(&mut self, _lent: &Lent<'_>) {
        let irr = self.registers.irr;
        let IoApicState { base, .. } = self.registers;
        self.registers = IoApicState {
            base,
            irr,
            redirection: [MASKED; PINS as usize],
            ..IoApicState::default()
        };
        (self.on_routes)(self.routes());
    }

    fn save(&self) -> IoApicState {
        self.registers
    }

    /// Sends no interrupt: whatever the inputs had asked for has been sent, and is part of the local APICs' states.
    fn restore(&mut self, state: IoApicState, _lent: &Lent<'_>) -> Result<(), StateError> {
        possible::<Self>(state.base == self.registers.base, "address")?;
        possible::<Self>(state.select <= 0xff, "register select")?;
        possible::<Self>(state.id <= 0x0f, "identification")?;
        possible::<Self>(state.irr < 1 << PINS, "inputs")?;
        possible::<Self>(
            state.redirection.iter().all(|entry| {
                entry & !(WRITABLE | REMOTE_IRR) == 0
                    && (entry & REMOTE_IRR == 0 || is_level(*entry))
            }),
            "redirection table",
        )?;
        self.registers = state;
        (self.on_routes)(self.routes());
        Ok(())
    }
}

/// An input of an I/O APIC, to end a line at.
pub struct Pin {
    ioapic: Arc<Seat<IoApic>>,
    pin: u8,
}

impl Pin {
    /// Input `pin`, below [`PINS`].
    pub fn new(ioapic: &Arc<Seat<IoApic>>, pin: u8) -> Self {
        Pin { ioapic: ioapic.clone(), pin }
    }
}

impl LineSink for Pin {
    fn set(&self, high: bool) {
        self.ioapic.with(|ioapic, _| ioapic.set_pin(self.pin, high));
    }
}

/// Tells an I/O APIC of the end of interrupts, for [`Board::listen_end_of_interrupt`](keel_device_model::Board::listen_end_of_interrupt).
pub struct Eoi(pub Arc<Seat<IoApic>>);

impl EndOfInterrupt for Eoi {
    fn end_of_interrupt(&self, vector: u8) {
        self.0.with(|ioapic, _| ioapic.end_of_interrupt(vector));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use keel_device_model::testing::Workbench;

    use super::*;
    use crate::msi::testing::Sent;

    struct Rig {
        bench: Workbench,
        ioapic: IoApic,
        sent: Arc<Sent>,
        routes: Arc<Mutex<Vec<Vec<Route>>>>,
    }

    impl Rig {
        fn new() -> Self {
            let sent = Arc::new(Sent::default());
            let routes = Arc::new(Mutex::new(Vec::new()));
            let log = routes.clone();
            let ioapic =
                IoApic::new(sent.clone(), Box::new(move |routes| log.lock().unwrap().push(routes)));
            Rig { bench: Workbench::new(), ioapic, sent, routes }
        }
        fn read(&mut self, register: u32) -> u32 {
            self.ioapic.mmio_write(SELECT, Width::Dword, register.into(), &self.bench.lent());
            self.ioapic.mmio_read(WINDOW, Width::Dword, &self.bench.lent()) as u32
        }
        fn write(&mut self, register: u32, value: u32) {
            self.ioapic.mmio_write(SELECT, Width::Dword, register.into(), &self.bench.lent());
            self.ioapic.mmio_write(WINDOW, Width::Dword, value.into(), &self.bench.lent());
        }
        fn entry(&mut self, pin: u8, low: u32) {
            self.write(REDIRECTION + 2 * u32::from(pin), low);
        }
        /// The data of what was sent.
        fn sent(&self) -> Vec<u32> {
            self.sent.take().iter().map(|msi| msi.data).collect()
        }
        fn routes(&self) -> Vec<Vec<Route>> {
            std::mem::take(&mut self.routes.lock().unwrap())
        }
    }

    const LEVEL_32: u32 = LEVEL as u32;
    const MASKED_32: u32 = MASKED as u32;
    const REMOTE_IRR_32: u32 = REMOTE_IRR as u32;

    #[test]
    fn registers_read_as_the_data_sheet_says() {
        let mut rig = Rig::new();
        assert_eq!(rig.read(VERSION_REGISTER), 0x0017_0020);
        rig.write(ID, 0xff00_0000);
        assert_eq!(rig.read(ID), 0x0f00_0000);
        assert_eq!(rig.read(REDIRECTION + 46), MASKED_32);
        assert_eq!(rig.read(REDIRECTION + 48), 0);
        rig.write(REDIRECTION + 1, 0xffff_ffff);
        assert_eq!(rig.read(REDIRECTION + 1), 0xfffe_0000);
        rig.write(REDIRECTION, !LEVEL_32);
        assert_eq!(rig.read(REDIRECTION), 0x0001_2fff);
        assert_eq!(rig.ioapic.mmio_read(WINDOW + 1, Width::Byte, &rig.bench.lent()), 0x2f);
    }

    #[test]
    fn messages_carry_destination_and_modes() {
        let mut rig = Rig::new();
        rig.write(REDIRECTION + 7, 0xab02_0000);
        rig.entry(3, 0x0000_0955);
        rig.ioapic.set_pin(3, true);
        assert_eq!(rig.sent.take(), [Msi { address: 0xfeea_b024, data: 0x155 }]);
    }

    #[test]
    fn edges_interrupt_once_each_and_are_lost_when_masked() {
        let mut rig = Rig::new();
        rig.ioapic.set_pin(4, true);
        rig.ioapic.set_pin(4, false);
        rig.entry(4, 0x31);
        assert!(rig.sent().is_empty());
        rig.ioapic.set_pin(4, true);
        rig.ioapic.set_pin(4, true);
        assert_eq!(rig.sent(), [0x31]);
        rig.ioapic.set_pin(4, false);
        rig.ioapic.set_pin(4, true);
        assert_eq!(rig.sent(), [0x31]);
    }

    #[test]
    fn a_level_interrupts_again_until_it_is_low() {
        let mut rig = Rig::new();
        rig.entry(9, LEVEL_32 | 0x39);
        rig.ioapic.set_pin(9, true);
        assert_eq!(rig.sent(), [0xc039]);
        assert_eq!(rig.read(REDIRECTION + 18), LEVEL_32 | REMOTE_IRR_32 | 0x39);
        rig.ioapic.set_pin(9, false);
        rig.ioapic.set_pin(9, true);
        assert!(rig.sent().is_empty(), "not ended yet");
        rig.ioapic.end_of_interrupt(0x40);
        assert!(rig.sent().is_empty(), "another's end");
        rig.ioapic.end_of_interrupt(0x39);
        assert_eq!(rig.sent(), [0xc039]);
        rig.ioapic.set_pin(9, false);
        rig.ioapic.mmio_write(EOI, Width::Dword, 0x39, &rig.bench.lent());
        assert!(rig.sent().is_empty());
        assert_eq!(rig.read(REDIRECTION + 18), LEVEL_32 | 0x39);
    }

    #[test]
    fn a_masked_level_waits() {
        let mut rig = Rig::new();
        rig.entry(10, LEVEL_32 | MASKED_32 | 0x3a);
        rig.ioapic.set_pin(10, true);
        assert!(rig.sent().is_empty());
        rig.entry(10, LEVEL_32 | 0x3a);
        assert_eq!(rig.sent(), [0xc03a]);
        rig.entry(10, LEVEL_32 | MASKED_32 | 0x3a);
        rig.entry(10, LEVEL_32 | 0x3a);
        assert!(rig.sent().is_empty(), "writing the entry ends nothing");
        // As a threaded handler does it: mask, end, handle, unmask.
        rig.entry(10, LEVEL_32 | MASKED_32 | 0x3a);
        rig.ioapic.end_of_interrupt(0x3a);
        assert!(rig.sent().is_empty());
        rig.entry(10, LEVEL_32 | 0x3a);
        assert_eq!(rig.sent(), [0xc03a]);
    }

    #[test]
    fn switching_to_edge_ends_a_level() {
        let mut rig = Rig::new();
        rig.entry(9, LEVEL_32 | 0x39);
        rig.ioapic.set_pin(9, true);
        rig.entry(9, MASKED_32 | 0x39);
        rig.entry(9, LEVEL_32 | 0x39);
        assert_eq!(rig.sent(), [0xc039, 0xc039]);
    }

    #[test]
    fn routes_are_those_of_levels_and_do_not_follow_the_mask() {
        let mut rig = Rig::new();
        rig.entry(4, 0x31);
        assert!(rig.routes().is_empty());
        rig.entry(9, LEVEL_32 | MASKED_32 | 0x39);
        let target = Target::Msi(Msi { address: 0xfee0_0000, data: 0xc039 });
        assert_eq!(rig.routes(), [[Route { gsi: 9, target }]]);
        rig.entry(9, LEVEL_32 | 0x39);
        assert!(rig.routes().is_empty());
        rig.ioapic.reset(&rig.bench.lent());
        assert_eq!(rig.routes(), [[] as [Route; 0]]);
    }

    #[test]
    fn restoring_sends_nothing_and_knows_the_inputs() {
        let mut rig = Rig::new();
        rig.entry(4, 0x31);
        rig.entry(9, LEVEL_32 | 0x39);
        rig.ioapic.set_pin(4, true);
        rig.ioapic.set_pin(9, true);
        let mut other = Rig::new();
        other.ioapic.restore(rig.ioapic.save(), &other.bench.lent()).unwrap();
        // The devices' lines rise when they are restored.
        other.ioapic.set_pin(4, true);
        other.ioapic.set_pin(9, true);
        assert!(other.sent().is_empty());
        assert_eq!(other.routes().len(), 1);
        other.ioapic.end_of_interrupt(0x39);
        assert_eq!(other.sent(), [0xc039]);
    }

    #[test]
    fn impossible_states_are_refused() {
        let mut rig = Rig::new();
        let good = rig.ioapic.save();
        let mut edge_not_ended = good;
        edge_not_ended.redirection[0] = REMOTE_IRR;
        for bad in [
            edge_not_ended,
            IoApicState { base: 0, ..good },
            IoApicState { irr: 1 << 24, ..good },
            IoApicState { select: 256, ..good },
        ] {
            assert!(rig.ioapic.restore(bad, &rig.bench.lent()).is_err());
        }
        assert_eq!(rig.ioapic.save(), good);
    }
}
