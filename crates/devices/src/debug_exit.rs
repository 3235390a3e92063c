//! `isa-debug-exit`: a port by which a guest ends the VMM with a status of its choice.

use keel_device_model::{Device, Lent, PortIo, Request, StateError};
use keel_hypervisor::Width;

/// The first port unless told otherwise (`iobase`).
pub const PORT: u16 = 0x501;
/// How many ports it takes unless told otherwise (`iosize`).
pub const PORTS: u16 = 2;
/// The widest access it takes.
pub const WIDEST: Width = Width::Dword;

/// A write of `v` ends the VMM with status `(v << 1) | 1`, modulo 256: never 0, which a guest gets by powering off. It has no state.
#[derive(Default)]
pub struct DebugExit;

impl PortIo for DebugExit {
    fn pio_read(&mut self, _offset: u16, _width: Width, _lent: &Lent<'_>) -> u32 {
        0
    }

    fn pio_write(&mut self, _offset: u16, _width: Width, value: u32, lent: &Lent<'_>) {
        lent.machine.request(Request::Exit((value << 1 | 1) as u8));
    }
}

impl Device for DebugExit {
    type State = ();
    const KIND: &'static str = "debug-exit";
    const VERSION: u32 = 1;

    fn reset(&mut self, _lent: &Lent<'_>) {}

    fn save(&self) {}

    fn restore(&mut self, (): (), _lent: &Lent<'_>) -> Result<(), StateError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use keel_device_model::testing::Workbench;

    use super::*;

    #[test]
    fn exits_with_an_odd_status() {
        let bench = Workbench::new();
        DebugExit.pio_write(0, Width::Byte, 0x10, &bench.lent());
        DebugExit.pio_write(0, Width::Dword, u32::MAX, &bench.lent());
        assert_eq!(bench.requests(), [Request::Exit(0x21), Request::Exit(0xff)]);
    }
}
