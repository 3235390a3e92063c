//! The reset control register (Intel 82371SB data sheet, RC; ACPI's `RESET_REG`).

use keel_device_model::{Device, Lent, PortIo, Request, StateError};
use keel_hypervisor::Width;
use serde::{Deserialize, Serialize};

use crate::check::possible;

/// The port, for the FADT's `RESET_REG`.
pub const PORT: u16 = 0xcf9;
/// What is to be written there for a reset: the FADT's `RESET_VALUE`. A full reset of everything.
pub const RESET_VALUE: u8 = 0x0f;
/// The widest access it takes.
pub const WIDEST: Width = Width::Byte;

/// Resets when it rises.
const RESET_CPU: u8 = 1 << 2;
/// What kind of reset: hard, with power cycle. All are the same here.
const WRITABLE: u8 = 1 << 1 | 1 << 3;

/// The register of [`ResetRegister`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResetRegisterState {
    /// Bits 1 and 3.
    pub control: u8,
}

/// The reset control register.
#[derive(Default)]
pub struct ResetRegister {
    control: u8,
}

impl ResetRegister {
    /// The register as after a reset.
    pub fn new() -> Self {
        ResetRegister::default()
    }
}

impl PortIo for ResetRegister {
    fn pio_read(&mut self, _offset: u16, _width: Width, _lent: &Lent<'_>) -> u32 {
        self.control.into()
    }

    fn pio_write(&mut self, _offset: u16, _width: Width, value: u32, lent: &Lent<'_>) {
        let value = value as u8;
        self.control = value & WRITABLE;
        // The bit falls back by itself, so that every write of it rises.
        if value & RESET_CPU != 0 {
            lent.machine.request(Request::Reset);
        }
    }
}

impl Device for ResetRegister {
    type State = ResetRegisterState;
    const KIND: &'static str = "reset-register";
    const VERSION: u32 = 1;

    fn reset(&mut self, _lent: &Lent<'_>) {
        self.control = 0;
    }

    fn save(&self) -> ResetRegisterState {
        ResetRegisterState { control: self.control }
    }

    fn restore(&mut self, state: ResetRegisterState, _lent: &Lent<'_>) -> Result<(), StateError> {
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
    fn resets_when_the_bit_rises() {
        let bench = Workbench::new();
        let mut register = ResetRegister::new();
        // As Linux does it: choose the kind, then reset.
        register.pio_write(0, Width::Byte, 0x02, &bench.lent());
        assert!(bench.requests().is_empty());
        assert_eq!(register.pio_read(0, Width::Byte, &bench.lent()), 0x02);
        register.pio_write(0, Width::Byte, 0x06, &bench.lent());
        assert_eq!(bench.requests(), [Request::Reset]);
        register.pio_write(0, Width::Byte, RESET_VALUE.into(), &bench.lent());
        assert_eq!(bench.requests(), [Request::Reset]);
    }
}
