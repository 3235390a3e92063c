//! One virtual CPU, and how to stop it.

use std::sync::Arc;

use crate::{Bus, CpuState, Cpuid, Exit, Result};

/// One virtual CPU. Used from one thread at a time; [`Kick`] reaches it from any other.
pub trait Vcpu: Send {
    /// Sets what `CPUID` answers. Must be called before the first [`run`](Vcpu::run).
    fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<()>;

    /// Runs guest code until the machine must decide something. All I/O on the way is done on `bus`.
    fn run(&mut self, bus: &mut dyn Bus) -> Result<Exit>;

    /// Finishes the instruction in flight, if its I/O still has an end to be written back, and lends the vCPU's
    /// state. No further guest instruction is run.
    fn settle(&mut self, bus: &mut dyn Bus) -> Result<Settled<'_>>;

    /// The handle by which other threads stop this vCPU.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Asks for single steps and breakpoints, or for none of it.
    fn set_debug(&mut self, debug: &Debug) -> Result<()>;

    /// With interrupt controllers in user space: delivers the external interrupt `vector` if the guest can take one now,
    /// and says whether it did. If it did not, the vCPU exits with [`Exit::InterruptWindow`] as soon as it can.
    fn inject(&mut self, vector: u8) -> Result<bool>;

    /// Raises a non-maskable interrupt.
    fn inject_nmi(&mut self) -> Result<()>;

    /// Tells the guest's kernel that it was stopped by its host, so that its soft-lockup detector does not complain.
    /// Does nothing where the guest does not use the clock this belongs to.
    fn notify_paused(&mut self) -> Result<()>;
}

/// Stops a vCPU from any thread.
pub trait Kick: Send + Sync {
    /// Makes the vCPU's current or next [`Vcpu::run`] return [`Exit::Kicked`].
    ///
    /// What the caller wrote before this call is visible to the vCPU's thread once `run` has returned. Kicks do not
    /// add up: several before one return make one return.
    fn kick(&self);
}

/// What a debugger wants of a vCPU. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Debug {
    /// Stop after every instruction.
    pub single_step: bool,
    /// Stop at `INT3` instead of giving it to the guest.
    pub software_breakpoints: bool,
    /// Linear addresses at which execution stops (the CPU has four such registers).
    pub hardware_breakpoints: [Option<u64>; 4],
}

/// A vCPU between two instructions: the only thing that state can be taken from or given to.
///
/// A port or memory-mapped access ends only when the vCPU is entered again: registers read before that are those of
/// a half-done instruction. So a [`Vcpu`] itself has no way to save, and this does not compile:
///
/// ```compile_fail
/// fn mid_instruction(vcpu: &mut dyn keel_hypervisor::Vcpu) {
///     vcpu.save();
/// }
/// ```
///
/// while this does:
///
/// ```
/// # use keel_hypervisor::{Bus, CpuState, Result, Vcpu};
/// fn between_instructions(vcpu: &mut dyn Vcpu, bus: &mut dyn Bus) -> Result<CpuState> {
///     vcpu.settle(bus)?.save()
/// }
/// ```
pub struct Settled<'a>(&'a mut dyn StateAccess);

impl<'a> Settled<'a> {
    /// For backends: lends the state of a vCPU that has been settled.
    pub fn new(access: &'a mut dyn StateAccess) -> Self {
        Settled(access)
    }

    /// Takes the complete state.
    pub fn save(&self) -> Result<CpuState> {
        self.0.save()
    }

    /// Gives the complete state. A state that no CPU can be in is refused; the vCPU must then not be run.
    pub fn load(&mut self, state: &CpuState) -> Result<()> {
        self.0.load(state)
    }

    /// The guest physical address behind a linear address in the vCPU's present paging mode, if one is mapped.
    pub fn translate(&self, linear: u64) -> Result<Option<u64>> {
        self.0.translate(linear)
    }
}

/// For backends: what [`Settled`] calls. A backend keeps its implementor private.
pub trait StateAccess {
    /// Takes the complete state.
    fn save(&self) -> Result<CpuState>;
    /// Gives the complete state.
    fn load(&mut self, state: &CpuState) -> Result<()>;
    /// The guest physical address behind a linear one.
    fn translate(&self, linear: u64) -> Result<Option<u64>>;
}
