//! System control port B at 0x61 (IBM PC/AT; Intel 82371SB data sheet, NMISC).

use keel_device_model::{Device, Lent, Nanos, PortIo, StateError};
use keel_hypervisor::Width;
use serde::{Deserialize, Serialize};

use crate::check::possible;

/// The port.
pub const PORT: u16 = 0x61;
/// The widest access it takes.
pub const WIDEST: Width = Width::Byte;

/// Gate of timer channel 2, speaker, and the two masks of NMI sources that a PC without parity memory never has.
const WRITABLE: u8 = 0x0f;
/// Changes with every refresh of the memory.
const REFRESH: u8 = 1 << 4;
/// How often memory is refreshed: every 18 clocks of 1.193182 MHz.
const REFRESH_NS: Nanos = 15_085;
/// The output of timer channel 2.
const TIMER_OUTPUT: u8 = 1 << 5;

/// The register of [`Port61`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port61State {
    /// Bits 0 to 3.
    pub control: u8,
}

/// System control port B.
///
/// There is no timer behind it (KVM's own answers this port by itself): its output reads as set. Linux calibrates its clock by waiting for that, and
/// would wait long for what never comes; as it is, it finds the wait too short to be true and asks another clock.
#[derive(Default)]
pub struct Port61 {
    control: u8,
}

impl Port61 {
    /// The port as after a reset.
    pub fn new() -> Self {
        Port61::default()
    }
}

impl PortIo for Port61 {
    fn pio_read(&mut self, _offset: u16, _width: Width, lent: &Lent<'_>) -> u32 {
        let refresh = if lent.clock.now() / REFRESH_NS % 2 == 1 { REFRESH } else { 0 };
        (self.control | refresh | TIMER_OUTPUT).into()
    }

    fn pio_write(&mut self, _offset: u16, _width: Width, value: u32, _lent: &Lent<'_>) {
        self.control = value as u8 & WRITABLE;
    }
}

impl Device for Port61 {
    type State = Port61State;
    const KIND: &'static str = "port61";
    const VERSION: u32 = 1;

    fn reset(&mut self, _lent: &Lent<'_>) {
        self.control = 0;
    }

    fn save(&self) -> Port61State {
        Port61State { control: self.control }
    }

    fn restore(&mut self, state: Port61State, _lent: &Lent<'_>) -> Result<(), StateError> {
        possible::<Self>(state.control & !WRITABLE == 0, "control bits")?;
        self.control = state.control;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use keel_device_model::testing::Workbench;

    use super::*;

    #[test]
    fn keeps_the_gate_and_shows_refresh() {
        let bench = Workbench::new();
        let mut port = Port61::new();
        port.pio_write(0, Width::Byte, 0xf1, &bench.lent());
        assert_eq!(port.pio_read(0, Width::Byte, &bench.lent()), 0x21);
        bench.advance(REFRESH_NS);
        assert_eq!(port.pio_read(0, Width::Byte, &bench.lent()), 0x31);
        bench.advance(REFRESH_NS);
        assert_eq!(port.pio_read(0, Width::Byte, &bench.lent()), 0x21);
    }
}
