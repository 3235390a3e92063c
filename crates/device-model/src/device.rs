//! What every device is, however it is reached: something that resets, saves and restores.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Lent, Nanos, StateError};

/// A device: a plain struct that owns its registers.
///
/// Its fields stand in three groups: configuration (fixed when it is made), wiring (what it talks to on the host) and
/// registers. The registers group is the saved state.
///
/// Saving and resetting have no default. A device without state says so with `type State = ()`.
pub trait Device: Send {
    /// The registers group.
    type State: Serialize + DeserializeOwned;

    /// The name of this kind of device in saved states. Never changed once released.
    const KIND: &'static str;

    /// The version of [`State`](Device::State), counted from 1 and raised with every change of it.
    const VERSION: u32;

    /// Back to the state after power-on, as a reset of the machine does it.
    fn reset(&mut self, lent: &Lent<'_>);

    /// Takes the registers.
    fn save(&self) -> Self::State;

    /// Gives registers from a saved state, which is to be trusted no more than a guest: what could not have been saved is
    /// refused and the device left as it was. The interrupt line is set to what the registers say.
    fn restore(&mut self, state: Self::State, lent: &Lent<'_>) -> Result<(), StateError>;

    /// Reads the state of an older version. Without an implementation only the present one is known.
    fn upgrade(version: u32, _data: serde_json::Value) -> Result<Self::State, StateError> {
        Err(StateError::Version { kind: Self::KIND, found: version, newest: Self::VERSION })
    }

    /// When the device next wants [`expire`](Device::expire) called, in virtual time. Asked after every access.
    fn deadline(&self) -> Option<Nanos> {
        None
    }

    /// The deadline has passed.
    fn expire(&mut self, _lent: &Lent<'_>) {}
}
