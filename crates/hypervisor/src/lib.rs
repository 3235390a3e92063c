//! The seam between a virtual machine monitor and whatever runs its vCPUs.
//!
//! A VMM is written against [`Vm`] and [`Vcpu`]; a backend (`keel-kvm`, later a CPU in software) implements them. There is no
//! ioctl here and no backend. Three properties hold on every backend:
//!
//! * **I/O is a capability handed to [`Vcpu::run`]**, not an exit that surfaces: every port and memory-mapped access is
//!   made on the [`Bus`] in place, in [units](Width) of the size the guest's instruction used. `run` returns only for what the machine must
//!   decide, as an [`Exit`] that borrows nothing.
//! * **State is saved only from a [`Settled`] vCPU**, one whose last instruction has ended: anything else does not compile.
//! * **A [`Kick`] is never lost**, whichever moment it comes at.
//!
//! ```
//! use keel_hypervisor::{Bus, Exit, Result, Vcpu, Width};
//!
//! /// A machine with one port that prints.
//! struct Console;
//!
//! impl Bus for Console {
//!     fn pio_read(&mut self, _port: u16, width: Width) -> u32 {
//!         width.mask() as u32
//!     }
//!     fn pio_write(&mut self, port: u16, _width: Width, value: u32) {
//!         if port == 0xe9 {
//!             print!("{}", char::from(value as u8));
//!         }
//!     }
//!     fn mmio_read(&mut self, _gpa: u64, width: Width) -> u64 {
//!         width.mask()
//!     }
//!     fn mmio_write(&mut self, _gpa: u64, _width: Width, _value: u64) {}
//!     fn end_of_interrupt(&mut self, _vector: u8) {}
//! }
//!
//! fn until_it_halts(vcpu: &mut dyn Vcpu) -> Result<Exit> {
//!     loop {
//!         match vcpu.run(&mut Console)? {
//!             Exit::Kicked => continue,
//!             exit => return Ok(exit),
//!         }
//!     }
//! }
//! ```
//!
//! # Modules
//!
//! | file | subject |
//! |---|---|
//! | `bus` | [`Bus`], [`Width`]: how a vCPU reaches the machine |
//! | `vcpu` | [`Vcpu`], [`Settled`], [`Kick`] |
//! | `vm` | [`Vm`]: memory slots, interrupts, doorbells, clock |
//! | `exit` | [`Exit`]: why a vCPU stopped |
//! | `state` | [`CpuState`], [`VmState`]: all that is saved and restored |
//! | `cpuid` | [`Cpuid`]: what `CPUID` answers |
//! | `cpu_model` | [`CpuModel`]: `-cpu` models, features and topology |
//! | `error` | [`Error`] |
#![forbid(unsafe_code)]

mod bus;
pub mod cpu_model;
mod cpuid;
mod error;
mod exit;
pub mod state;
mod vcpu;
mod vm;

pub use bus::{Bus, Width, units};
pub use cpu_model::CpuModel;
pub use cpuid::{Cpuid, CpuidEntry};
pub use error::{Error, Result};
pub use exit::{DebugStop, Exit, Failure};
pub use state::{CpuState, VmState};
pub use vcpu::{Debug, Kick, Settled, StateAccess, Vcpu};
pub use vm::{
    Doorbell, DoorbellAddress, Interrupts, MemorySlot, Msi, Route, Statistic, Target, Vm,
};
