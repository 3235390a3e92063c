//! Where message-signalled interrupts go.

use keel_hypervisor::Msi;

/// Delivers message-signalled interrupts to the local APICs.
///
/// ```
/// use keel_devices::MsiSink;
/// use keel_hypervisor::{Msi, Vm};
///
/// struct ToVm<V>(V);
///
/// impl<V: Vm> MsiSink for ToVm<V> {
///     fn send(&self, msi: Msi) {
///         // A message to no CPU is the guest's own loss.
///         let _ = self.0.signal_msi(msi);
///     }
/// }
/// ```
pub trait MsiSink: Send + Sync {
    /// Delivers one. Called in the middle of guests' accesses: it must not come back to the device.
    fn send(&self, msi: Msi);
}

#[cfg(test)]
pub(crate) mod testing {
    use std::sync::Mutex;

    use super::*;

    /// Remembers what was sent.
    #[derive(Default)]
    pub struct Sent(Mutex<Vec<Msi>>);

    impl Sent {
        /// What was sent since the last call.
        pub fn take(&self) -> Vec<Msi> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl MsiSink for Sent {
        fn send(&self, msi: Msi) {
            self.0.lock().unwrap().push(msi);
        }
    }
}
