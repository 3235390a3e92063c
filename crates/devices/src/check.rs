//! What all devices say of a saved state that they could not have saved.

use keel_device_model::{Device, StateError};

/// Refuses the state of a `D` unless `possible`.
pub(crate) fn possible<D: Device>(possible: bool, why: &str) -> Result<(), StateError> {
    if possible {
        Ok(())
    } else {
        Err(StateError::Impossible { kind: D::KIND, why: why.to_owned() })
    }
}
