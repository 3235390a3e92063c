//! The complete state of a vCPU and of a VM, between KVM's structures and the neutral ones of [`keel_hypervisor`].
//!
//! | file | subject |
//! |---|---|
//! | `cpu` | a whole vCPU: the order of the steps, and why |
//! | `registers` | general, segment, control and debug registers, XCRs |
//! | `xsave` | x87, SSE and all further extended state |
//! | `msrs` | model-specific registers and the TSC's frequency |
//! | `lapic` | the local APIC and the vCPU's activity |
//! | `events` | exceptions and interrupts on their way |
//! | `nested` | a hypervisor in the guest |
//! | `vm` | the clock, the PICs, the I/O APIC, the PIT |
//!
//! What is loaded may be damaged or hostile. Lengths and values that no CPU can have are refused here before an ioctl sees
//! them; the rest is left to the kernel, whose refusal is passed on with the ioctl's name.

mod cpu;
mod events;
mod lapic;
mod msrs;
mod nested;
mod registers;
mod vm;
mod xsave;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;

use keel_hypervisor::{Error as HypervisorError, Interrupts, Result};
use kvm_bindings::{
    KVM_CAP_DEBUGREGS, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_NESTED_STATE, KVM_CAP_SREGS2,
    KVM_CAP_TSC_CONTROL, KVM_CAP_X86_SMM, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_CAP_XCRS,
    KVM_CAP_XSAVE2, kvm_xsave,
};
use kvm_ioctls::{Kvm, VmFd};

pub(crate) use cpu::{load_cpu, save_cpu};
pub(crate) use vm::{load_vm, save_vm};

/// The name of this backend's section in [`CpuState::private`](keel_hypervisor::CpuState::private).
const PRIVATE: &str = "kvm";

/// What the kernel offers for a VM's state, asked for once.
pub(crate) struct Context {
    /// The MSRs that make up a vCPU's state.
    msrs: Vec<u32>,
    /// The size in bytes of the area that `KVM_SET_XSAVE` reads.
    xsave_size: usize,
    /// `KVM_GET_XSAVE2` is there, and the only call that gives all of it.
    xsave2: bool,
    sregs2: bool,
    xcrs: bool,
    debug_registers: bool,
    smm: bool,
    /// Exceptions that are pending are told apart from those being delivered.
    exception_payload: bool,
    triple_fault: bool,
    /// The size in bytes of the largest nested state, or 0.
    nested: usize,
    tsc_control: bool,
    interrupts: Interrupts,
}

impl Context {
    /// Asks what is there. Whoever made `vm` has switched on the two capabilities about events where they are there.
    pub(crate) fn new(kvm: &Kvm, vm: &VmFd, interrupts: Interrupts) -> crate::Result<Self> {
        let has = |capability: u32| vm.check_extension_raw(capability.into()) > 0;
        let xsave2 = vm.check_extension_raw(KVM_CAP_XSAVE2.into());
        let nested = vm.check_extension_raw(KVM_CAP_NESTED_STATE.into());
        Ok(Context {
            msrs: msrs::saved(kvm)?,
            xsave_size: usize::try_from(xsave2).unwrap_or(0).max(size_of::<kvm_xsave>()),
            xsave2: xsave2 > 0,
            sregs2: has(KVM_CAP_SREGS2),
            xcrs: has(KVM_CAP_XCRS),
            debug_registers: has(KVM_CAP_DEBUGREGS),
            smm: has(KVM_CAP_X86_SMM),
            exception_payload: has(KVM_CAP_EXCEPTION_PAYLOAD),
            triple_fault: has(KVM_CAP_X86_TRIPLE_FAULT_EVENT),
            nested: usize::try_from(nested).unwrap_or(0),
            tsc_control: has(KVM_CAP_TSC_CONTROL),
            interrupts,
        })
    }

    /// The local APICs are in the kernel.
    fn lapic(&self) -> bool {
        self.interrupts != Interrupts::User
    }
}

/// Which vCPU an ioctl is tried on, for its error.
fn name(id: u32) -> impl FnOnce() -> String {
    move || format!("vCPU {id}")
}

/// A state that no CPU or machine can be in.
fn bad(what: &'static str, why: impl Into<String>) -> HypervisorError {
    HypervisorError::BadState { what, why: why.into() }
}

/// Refuses `what` unless `ok`.
fn check(ok: bool, what: &'static str, why: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(bad(what, why())) }
}
