//! The error of every backend, seen through the seam.

use std::error::Error as StdError;

/// Why a backend could not do what was asked.
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
}

impl Error {
    /// Wraps a backend's own error.
    pub fn backend(error: impl StdError + Send + Sync + 'static) -> Self {
        Error::Backend(Box::new(error))
    }
}

/// The result of a call through the seam.
pub type Result<T> = std::result::Result<T, Error>;
