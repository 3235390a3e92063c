//! Why a vCPU stopped running guest code.

/// What the machine must decide about. I/O is not among it: that is done in place through the [`Bus`](crate::Bus).
///
/// Borrows nothing, so that it can be kept, sent and compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// Somebody called [`Kick::kick`](crate::Kick::kick): look at what was asked before running on.
    Kicked,
    /// `HLT` with nothing in the backend that could wake the vCPU (interrupt controllers in user space).
    Halted,
    /// The CPU shut down: a triple fault (Intel SDM volume 3, 6.15, "Double Fault Exception"). A PC resets.
    TripleFault,
    /// The backend took a guest's request to power off or reset (a PSCI-like call; not used by a PC).
    SystemEvent(u32),
    /// A breakpoint, watchpoint or single step asked for by [`Vcpu::set_debug`](crate::Vcpu::set_debug).
    Debug(DebugStop),
    /// An interrupt can now be injected, as asked for by [`Vcpu::inject`](crate::Vcpu::inject).
    InterruptWindow,
    /// The ring of dirty pages is full: [`Vm::collect_dirty`](crate::Vm::collect_dirty) it, then run on.
    DirtyRingFull,
    /// The vCPU can not go on.
    Failed(Failure),
}

/// Where a debugged vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugStop {
    /// The linear address of the instruction.
    pub pc: u64,
    /// The exception vector: 1 (`#DB`) or 3 (`#BP`).
    pub exception: u32,
    /// DR6 as the exception would have shown it to the guest.
    pub dr6: u64,
    /// DR7 at that moment.
    pub dr7: u64,
}

/// Why a vCPU can not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// The CPU refused the vCPU's state on entry. `reason` is the VMX or SVM exit code, `cpu` the host's CPU.
    Entry {
        /// The hardware's own reason.
        reason: u64,
        /// The number of the host CPU that refused.
        cpu: u32,
    },
    /// The backend met an instruction it can not emulate.
    Emulation,
    /// Any other internal error of the backend, by its own number (KVM: `kvm_run.internal.suberror`).
    Internal(u32),
    /// The guest accessed memory the host could not provide at this address (a lost page, a poisoned one).
    Memory {
        /// The guest physical address.
        gpa: u64,
        /// The bytes concerned.
        size: u64,
    },
    /// An exit reason the backend knows the number of and nothing else.
    Unknown(u32),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Entry { reason, cpu } => {
                write!(f, "host CPU {cpu} refused to enter the guest (hardware reason {reason:#x})")
            }
            Failure::Emulation => write!(f, "an instruction could not be emulated"),
            Failure::Internal(code) => write!(f, "internal error {code} of the hypervisor"),
            Failure::Memory { gpa, size } => {
                write!(f, "{size} bytes at guest physical address {gpa:#x} could not be provided")
            }
            Failure::Unknown(reason) => write!(f, "unknown exit reason {reason}"),
        }
    }
}
