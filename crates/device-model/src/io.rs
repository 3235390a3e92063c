//! How a device is reached: port and memory-mapped I/O, and what it is lent for one access.

use keel_hypervisor::Width;

use crate::{Clock, Line, Machine};

/// What a device is lent for the length of one call.
///
/// A device keeps none of it: so it can be tested with a [`Workbench`](crate::testing::Workbench) and no machine at all.
#[derive(Clone, Copy)]
pub struct Lent<'a> {
    /// The device's interrupt line.
    pub line: &'a Line,
    /// The machine's time.
    pub clock: &'a dyn Clock,
    /// Whom to tell of a guest's wish to power off, reset, …
    pub machine: &'a dyn Machine,
}

/// A device reached by `IN` and `OUT`.
///
/// Offsets count from the first port the device is mapped at. The board splits accesses wider than the device was
/// mapped for, and those that run over its end, into narrower ones; so `offset + width` is always inside, and `width`
/// never above what was declared. Values are zero-extended.
pub trait PortIo {
    /// `IN` of `width` at `offset`.
    fn pio_read(&mut self, offset: u16, width: Width, lent: &Lent<'_>) -> u32;
    /// `OUT` of `width` at `offset`.
    fn pio_write(&mut self, offset: u16, width: Width, value: u32, lent: &Lent<'_>);
}

/// A device reached by loads and stores. The same promises as [`PortIo`]'s hold.
///
/// Accesses need not be aligned.
pub trait MmioIo {
    /// A load of `width` at `offset`.
    fn mmio_read(&mut self, offset: u64, width: Width, lent: &Lent<'_>) -> u64;
    /// A store of `width` at `offset`.
    fn mmio_write(&mut self, offset: u64, width: Width, value: u64, lent: &Lent<'_>);
}

/// What the board dispatches a port access to: something that several threads may call at once.
///
/// A plain [`PortIo`] device becomes one in a [`Seat`](crate::Seat); a device that needs no lock implements this itself.
pub trait SharedPio: Send + Sync {
    /// `IN` of `width` at `offset`.
    fn read(&self, offset: u16, width: Width) -> u32;
    /// `OUT` of `width` at `offset`.
    fn write(&self, offset: u16, width: Width, value: u32);
}

/// What the board dispatches a memory-mapped access to. See [`SharedPio`].
pub trait SharedMmio: Send + Sync {
    /// A load of `width` at `offset`.
    fn read(&self, offset: u64, width: Width) -> u64;
    /// A store of `width` at `offset`.
    fn write(&self, offset: u64, width: Width, value: u64);
}

/// What hears of the end of interrupts when the I/O APIC is a device of ours and the local APICs are not.
pub trait EndOfInterrupt: Send + Sync {
    /// A local APIC has ended an interrupt of `vector`.
    fn end_of_interrupt(&self, vector: u8);
}
