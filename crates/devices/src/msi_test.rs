//! A doorbell for test guests: by it they send themselves message-signalled interrupts through the VMM.

use std::sync::Arc;

use keel_device_model::{Device, Lent, PortIo, StateError};
use keel_hypervisor::{Msi, Width};
use serde::{Deserialize, Serialize};

use crate::MsiSink;

/// The first port.
pub const PORT: u16 = 0x5e0;
/// How many ports it takes: the address at offset 0, the data at offset 4.
pub const PORTS: u16 = 8;
/// The widest access it takes.
pub const WIDEST: Width = Width::Dword;

const ADDRESS: u16 = 0;
const DATA: u16 = 4;

/// The registers of [`MsiTest`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsiTestState {
    /// The address messages are sent to.
    pub address: u32,
    /// The last message.
    pub data: u32,
}

/// A 32-bit write at offset 0 sets the address, one at offset 4 sends its value there. Other writes are dropped.
pub struct MsiTest {
    // Wiring.
    sink: Arc<dyn MsiSink>,
    // Registers.
    registers: MsiTestState,
}

impl MsiTest {
    /// A doorbell that sends to `sink`.
    pub fn new(sink: Arc<dyn MsiSink>) -> Self {
        MsiTest { sink, registers: MsiTestState::default() }
    }
}

impl PortIo for MsiTest {
    fn pio_read(&mut self, offset: u16, width: Width, _lent: &Lent<'_>) -> u32 {
        let both = u64::from(self.registers.data) << 32 | u64::from(self.registers.address);
        (both >> (8 * (offset & 7)) & width.mask()) as u32
    }

    fn pio_write(&mut self, offset: u16, width: Width, value: u32, _lent: &Lent<'_>) {
        match (offset, width) {
            (ADDRESS, Width::Dword) => self.registers.address = value,
            (DATA, Width::Dword) => {
                self.registers.data = value;
                self.sink.send(Msi { address: self.registers.address.into(), data: value });
            }
            _ => {}
        }
    }
}

impl Device for MsiTest {
    type State = MsiTestState;
    const KIND: &'static str = "msi-test";
    const VERSION: u32 = 1;

    fn reset(&mut self, _lent: &Lent<'_>) {
        self.registers = MsiTestState::default();
    }

    fn save(&self) -> MsiTestState {
        self.registers.clone()
    }

    fn restore(&mut self, state: MsiTestState, _lent: &Lent<'_>) -> Result<(), StateError> {
        self.registers = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use keel_device_model::testing::Workbench;

    use super::*;
    use crate::msi::testing::Sent;

    #[test]
    fn sends_what_it_is_told() {
        let bench = Workbench::new();
        let sent = Arc::new(Sent::default());
        let mut doorbell = MsiTest::new(sent.clone());
        doorbell.pio_write(ADDRESS, Width::Dword, 0xfee0_1000, &bench.lent());
        doorbell.pio_write(DATA, Width::Byte, 0x99, &bench.lent());
        assert!(sent.take().is_empty());
        doorbell.pio_write(DATA, Width::Dword, 0x41, &bench.lent());
        assert_eq!(sent.take(), [Msi { address: 0xfee0_1000, data: 0x41 }]);
        assert_eq!(doorbell.pio_read(ADDRESS, Width::Dword, &bench.lent()), 0xfee0_1000);
        assert_eq!(doorbell.pio_read(DATA, Width::Byte, &bench.lent()), 0x41);
    }
}
