//! The debug console: a port that prints (Bochs's 0xe9, and 0x402 as SeaBIOS and OVMF use it).

use std::io::Write;

use keel_device_model::{Device, Lent, PortIo, StateError};
use keel_hypervisor::Width;

use crate::output::Output;

/// Bochs's port.
pub const PORT: u16 = 0xe9;
/// The port of PC firmware.
pub const FIRMWARE_PORT: u16 = 0x402;
/// The widest access it takes.
pub const WIDEST: Width = Width::Byte;

/// What the port reads as, so that a guest knows that it is there.
const PRESENT: u32 = 0xe9;

/// A port that prints. It has no state.
pub struct DebugConsole {
    output: Output,
}

impl DebugConsole {
    /// Prints to `output`, each character at once. What can not be written is lost; a writer that blocks holds up the vCPU.
    pub fn new(output: Box<dyn Write + Send>) -> Self {
        DebugConsole { output: Output::new(output) }
    }

    /// How many characters were lost.
    pub fn lost(&self) -> u64 {
        self.output.lost()
    }
}

impl PortIo for DebugConsole {
    fn pio_read(&mut self, _offset: u16, _width: Width, _lent: &Lent<'_>) -> u32 {
        PRESENT
    }

    fn pio_write(&mut self, _offset: u16, _width: Width, value: u32, _lent: &Lent<'_>) {
        // This writer never fails.
        let _ = self.output.write(&[value as u8]);
    }
}

impl Device for DebugConsole {
    type State = ();
    const KIND: &'static str = "debug-console";
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
    use crate::output::testing::{Closed, Shared};

    #[test]
    fn prints() {
        let bench = Workbench::new();
        let out = Shared::default();
        let mut console = DebugConsole::new(Box::new(out.clone()));
        for byte in b"ok\n" {
            console.pio_write(0, Width::Byte, u32::from(*byte), &bench.lent());
        }
        assert_eq!(out.text(), "ok\n");
        assert_eq!(console.pio_read(0, Width::Byte, &bench.lent()), 0xe9);
    }

    #[test]
    fn counts_what_is_lost() {
        let bench = Workbench::new();
        let mut console = DebugConsole::new(Box::new(Closed));
        console.pio_write(0, Width::Byte, 1, &bench.lent());
        assert_eq!(console.lost(), 1);
    }
}
