//! `pvpanic` on the ISA bus: how a guest's kernel says that it has panicked (QEMU, `docs/specs/pvpanic.rst`).

use keel_device_model::{Device, Lent, PortIo, Request, StateError};
use keel_hypervisor::Width;

/// The port, for the DSDT's device `QEMU0001`.
pub const PORT: u16 = 0x505;
/// The widest access it takes.
pub const WIDEST: Width = Width::Byte;

const PANICKED: u32 = 1 << 0;
const CRASH_LOADED: u32 = 1 << 1;

/// Reads as the events it knows, and takes them. It has no state.
#[derive(Default)]
pub struct Pvpanic;

impl PortIo for Pvpanic {
    fn pio_read(&mut self, _offset: u16, _width: Width, _lent: &Lent<'_>) -> u32 {
        PANICKED | CRASH_LOADED
    }

    fn pio_write(&mut self, _offset: u16, _width: Width, value: u32, lent: &Lent<'_>) {
        // Panicked is the worse of the two, so it counts where both are set.
        if value & (PANICKED | CRASH_LOADED) != 0 {
            lent.machine.request(Request::Panicked { crash_loaded: value & PANICKED == 0 });
        }
    }
}

impl Device for Pvpanic {
    type State = ();
    const KIND: &'static str = "pvpanic";
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
    fn tells_of_a_panic() {
        let bench = Workbench::new();
        let lent = &bench.lent();
        assert_eq!(Pvpanic.pio_read(0, Width::Byte, lent), 3);
        Pvpanic.pio_write(0, Width::Byte, 1, lent);
        Pvpanic.pio_write(0, Width::Byte, 2, lent);
        Pvpanic.pio_write(0, Width::Byte, 4, lent);
        assert_eq!(
            bench.requests(),
            [Request::Panicked { crash_loaded: false }, Request::Panicked { crash_loaded: true }]
        );
    }
}
