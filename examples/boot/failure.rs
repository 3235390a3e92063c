//! Why the program can not do what it was asked.

use std::error::Error;
use std::fmt;

/// A message for the user, with its causes.
#[derive(Debug)]
pub struct Failure(String);

impl Failure {
    pub fn message(message: impl Into<String>) -> Self {
        Failure(message.into())
    }

    pub fn io(what: &str, error: std::io::Error) -> Self {
        Failure(format!("cannot {what}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The crates' errors, with all that caused them.
fn chain(error: &dyn Error) -> Failure {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    Failure(text)
}

macro_rules! from {
    ($($error:ty),*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                chain(&error)
            }
        }
    )*};
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure(error.to_string())
    }
}

from!(
    keel_device_model::MapError,
    keel_device_model::StateError,
    keel_hypervisor::Error,
    keel_kvm::Error,
    keel_loader::Error,
    keel_memory::Error
);
