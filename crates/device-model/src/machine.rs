//! What a device can ask of the machine it is in.

/// A guest's wish that no device can fulfil by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// Power off (ACPI S5).
    PowerOff,
    /// Reset all devices and CPUs.
    Reset,
    /// The guest's kernel has panicked; with `crash_loaded` it goes on to run a crash kernel by itself.
    Panicked {
        /// A crash kernel is about to run: the guest needs nothing from us.
        crash_loaded: bool,
    },
    /// End the VMM with this status (`isa-debug-exit`).
    Exit(u8),
}

/// Takes the wishes. It returns at once; the vCPU that made the access runs no further instruction than that one.
pub trait Machine: Send + Sync {
    /// Takes one wish.
    fn request(&self, request: Request);
}
