//! The error of every backend, seen through the seam.

use std::error::Error as StdError;

use crate::cpu_model::{Feature, Topology};

/// Why a backend could not do what was asked, or a CPU model or topology is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The backend's own error; its message says what was tried on what.
    #[error(transparent)]
    Backend(Box<dyn StdError + Send + Sync>),
    /// The backend, or the host it runs on, does not have this.
    #[error("{0} is not available here")]
    Unsupported(&'static str),
    /// A state that no CPU or machine could be in, from a damaged or hostile stream.
    #[error("{what} can not be restored: {why}")]
    BadState {
        /// The part of the state.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// There is no CPU model of this name.
    #[error("there is no CPU model {name:?}; {}", advice(*nearest))]
    UnknownCpuModel {
        /// The name.
        name: String,
        /// The model it may have meant.
        nearest: Option<&'static str>,
    },
    /// There is no CPU feature of this name.
    #[error("there is no CPU feature {name:?}; {}", advice(*nearest))]
    UnknownCpuFeature {
        /// The name.
        name: String,
        /// The feature it may have meant.
        nearest: Option<&'static str>,
    },
    /// An option of a CPU model has a value it can not have.
    #[error("CPU option {option:?} needs {expected}")]
    CpuOption {
        /// The option as written.
        option: String,
        /// What it can be.
        expected: &'static str,
    },
    /// `enforce` was asked for, and the host does not have all that the model is made of.
    #[error("the host does not support all of CPU model {model}: {} missing", list(features))]
    MissingCpuFeatures {
        /// The model.
        model: &'static str,
        /// What is missing.
        features: Vec<Feature>,
    },
    /// An arrangement of vCPUs that can not be.
    #[error("{} is impossible: {why}", places(topology))]
    Topology {
        /// The arrangement.
        topology: Topology,
        /// What is wrong with it.
        why: String,
    },
}

fn advice(nearest: Option<&str>) -> String {
    match nearest {
        Some(name) => format!("did you mean {name}? (-cpu help lists all)"),
        None => "-cpu help lists all".to_owned(),
    }
}

fn list(features: &[Feature]) -> String {
    let names: Vec<&str> = features.iter().map(|feature| feature.name).collect();
    format!("{} {}", names.join(", "), if names.len() == 1 { "is" } else { "are" })
}

fn places(topology: &Topology) -> String {
    let count = |n: u32, noun: &str| format!("{n} {noun}{}", if n == 1 { "" } else { "s" });
    format!(
        "{} in {} of {} of {} of {}",
        count(topology.cpus, "vCPU"),
        count(topology.sockets, "socket"),
        count(topology.dies, "die"),
        count(topology.cores, "core"),
        count(topology.threads, "thread")
    )
}

impl Error {
    /// Wraps a backend's own error.
    pub fn backend(error: impl StdError + Send + Sync + 'static) -> Self {
        Error::Backend(Box::new(error))
    }
}

/// The result of a call through the seam.
pub type Result<T> = std::result::Result<T, Error>;
