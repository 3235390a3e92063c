//! The saved state of devices.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The saved state of one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Section {
    /// Which of the machine's devices: its name on the [`Roster`].
    pub name: String,
    /// What kind of device it is: [`Device::KIND`](crate::Device::KIND).
    pub kind: String,
    /// The version of the state: [`Device::VERSION`](crate::Device::VERSION).
    pub version: u32,
    /// The registers.
    pub data: serde_json::Value,
}

/// Why a saved state was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The section is of another kind of device.
    #[error("device {name} is of kind {expected}, the saved state of kind {found}")]
    Kind {
        /// The device's name.
        name: String,
        /// Its kind.
        expected: &'static str,
        /// The section's.
        found: String,
    },
    /// The section is of a version this program does not know.
    #[error("state of kind {kind} has version {found}; versions up to {newest} are known")]
    Version {
        /// The kind of device.
        kind: &'static str,
        /// The section's version.
        found: u32,
        /// The newest one known.
        newest: u32,
    },
    /// The section can not be read or written.
    #[error("state of kind {kind} is malformed")]
    Malformed {
        /// The kind of device.
        kind: &'static str,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Registers that no such device can have.
    #[error("state of kind {kind} is impossible: {why}")]
    Impossible {
        /// The kind of device.
        kind: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The machine has no such device.
    #[error(
        "the saved state has a device {0} that this machine does not have: start it with the same options"
    )]
    Unknown(String),
    /// The machine has a device the state has nothing for.
    #[error("the saved state lacks device {0} of this machine: start it with the same options")]
    Missing(String),
    /// The state names a device twice.
    #[error("the saved state has device {0} twice")]
    Twice(String),
}

/// A device in its place, as the machine's reset, save and restore see it.
pub trait Stateful: Send + Sync {
    /// Back to the state after power-on.
    fn reset(&self);
    /// Takes the registers. The name is left to the roster.
    fn save(&self, name: &str) -> Result<Section, StateError>;
    /// Gives registers.
    fn restore(&self, section: &Section) -> Result<(), StateError>;
}

/// All devices of a machine by name, in the order they were added.
#[derive(Default)]
pub struct Roster(Vec<(String, Arc<dyn Stateful>)>);

impl Roster {
    /// An empty roster.
    pub fn new() -> Self {
        Roster::default()
    }

    /// Adds a device. A name that is taken already is given a number (`serial`, `serial.1`), so that states stay told apart.
    pub fn add(&mut self, name: &str, device: Arc<dyn Stateful>) {
        let taken = |candidate: &str| self.0.iter().any(|(name, _)| name == candidate);
        let mut unique = name.to_owned();
        let mut number = 1;
        while taken(&unique) {
            unique = format!("{name}.{number}");
            number += 1;
        }
        self.0.push((unique, device));
    }

    /// Resets all devices.
    pub fn reset(&self) {
        self.0.iter().for_each(|(_, device)| device.reset());
    }

    /// Saves all devices.
    pub fn save(&self) -> Result<Vec<Section>, StateError> {
        self.0.iter().map(|(name, device)| device.save(name)).collect()
    }

    /// Restores all devices from just the sections they saved: an unknown, missing or repeated one is an error.
    pub fn restore(&self, sections: &[Section]) -> Result<(), StateError> {
        let mut by_name = BTreeMap::new();
        for section in sections {
            if by_name.insert(section.name.as_str(), section).is_some() {
                return Err(StateError::Twice(section.name.clone()));
            }
        }
        for (name, device) in &self.0 {
            let section =
                by_name.remove(name.as_str()).ok_or_else(|| StateError::Missing(name.clone()))?;
            device.restore(section)?;
        }
        match by_name.into_keys().next() {
            Some(name) => Err(StateError::Unknown(name.to_owned())),
            None => Ok(()),
        }
    }
}
