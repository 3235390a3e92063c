//! What went wrong between this crate and the kernel.

use std::io;

/// Why KVM could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device node could not be opened.
    #[error("cannot open {path}")]
    Open {
        /// Its path.
        path: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// An ioctl failed.
    #[error("{ioctl} on {on} failed")]
    Ioctl {
        /// The ioctl's name.
        ioctl: &'static str,
        /// What it was tried on: "the VM", "vCPU 3", "memory slot 0 (128 MiB at 0x0)".
        on: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// This kernel's KVM has no such capability.
    #[error("this kernel's KVM does not have {0}")]
    Capability(&'static str),
    /// A request that no KVM could fulfil.
    #[error("{0}")]
    Invalid(String),
}

/// The result of a call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Turns the error of a `kvm-ioctls` call into ours, naming the ioctl and what it was tried on.
pub(crate) trait Tried<T> {
    fn tried(self, ioctl: &'static str, on: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Tried<T> for std::result::Result<T, kvm_ioctls::Error> {
    fn tried(self, ioctl: &'static str, on: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Ioctl {
            ioctl,
            on: on(),
            source: io::Error::from_raw_os_error(error.errno()),
        })
    }
}

impl From<Error> for keel_hypervisor::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Capability(name) => keel_hypervisor::Error::Unsupported(name),
            error => keel_hypervisor::Error::backend(error),
        }
    }
}
