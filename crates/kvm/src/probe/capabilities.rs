//! Every capability of KVM this project uses, and for what.

use std::fmt;

use kvm_bindings::*;

/// Whether one can do without a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// No machine runs without it.
    Needed,
    /// Some option or speed is lost without it.
    Optional,
}

/// One capability of the kernel's KVM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its name in the kernel's headers.
    pub name: &'static str,
    /// Its number there.
    pub number: u32,
    /// What `KVM_CHECK_EXTENSION` says: 0 if it is not there, else 1 or a limit.
    pub value: i32,
    /// Whether one can do without.
    pub importance: Use,
    /// What it is for.
    pub purpose: &'static str,
}

impl Capability {
    /// Whether the kernel has it.
    pub fn is_there(&self) -> bool {
        self.value > 0
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let there = match (self.is_there(), self.importance) {
            (true, _) => "yes",
            (false, Use::Needed) => "NO",
            (false, Use::Optional) => "no",
        };
        let importance = match self.importance {
            Use::Needed => "needed",
            Use::Optional => "optional",
        };
        write!(f, "{there:<4} {:<36} {importance:<9} {}", self.name, self.purpose)?;
        // Flags and limits are worth a look; a plain yes is not.
        if self.value > 1 { write!(f, " ({})", self.value) } else { Ok(()) }
    }
}

/// Asks for all of them.
pub(super) fn check(extension: impl Fn(u32) -> i32) -> Vec<Capability> {
    let rows = NEEDED
        .iter()
        .map(|row| (row, Use::Needed))
        .chain(OPTIONAL.iter().map(|row| (row, Use::Optional)));
    rows.map(|(&(name, number, purpose), importance)| {
        let value = extension(number);
        Capability { name, number, value, importance, purpose }
    })
    .collect()
}

type Row = (&'static str, u32, &'static str);

/// A row whose name is that of the constant.
macro_rules! rows {
    ($($name:ident $purpose:literal)*) => { &[$((stringify!($name), $name, $purpose)),*] };
}

const NEEDED: &[Row] = rows! {
    KVM_CAP_USER_MEMORY "guest memory from the VMM's own"
    KVM_CAP_DESTROY_MEMORY_REGION_WORKS "taking memory slots away"
    KVM_CAP_NR_MEMSLOTS "number of memory slots"
    KVM_CAP_NR_VCPUS "number of vCPUs that run well"
    KVM_CAP_EXT_CPUID "telling the guest what its CPU is"
    KVM_CAP_SET_TSS_ADDR "real mode on Intel"
    KVM_CAP_IMMEDIATE_EXIT "stopping a vCPU without losing the request, and settling it"
    KVM_CAP_IRQCHIP "interrupt controllers in the kernel"
    KVM_CAP_PIT2 "the timer of a PC in the kernel"
    KVM_CAP_PIT_STATE2 "saving that timer"
    KVM_CAP_IRQ_ROUTING "routing interrupts to pins and messages"
    KVM_CAP_SIGNAL_MSI "message-signalled interrupts"
    KVM_CAP_IRQFD "interrupts raised without leaving the kernel"
    KVM_CAP_IOEVENTFD "doorbells rung without leaving the kernel"
    KVM_CAP_MP_STATE "saving which vCPUs wait or halt"
    KVM_CAP_VCPU_EVENTS "saving pending exceptions and interrupts"
    KVM_CAP_DEBUGREGS "saving debug registers"
    KVM_CAP_XSAVE "saving x87, SSE and AVX registers"
    KVM_CAP_ADJUST_CLOCK "saving the guest's clock"
    KVM_CAP_GET_TSC_KHZ "the frequency of the time-stamp counter"
    KVM_CAP_ENABLE_CAP_VM "switching capabilities on"
};

const OPTIONAL: &[Row] = rows! {
    KVM_CAP_MAX_VCPUS "the most vCPUs of a machine"
    KVM_CAP_MAX_VCPU_ID "the highest APIC ID"
    KVM_CAP_SPLIT_IRQCHIP "only the local APICs in the kernel (kernel-irqchip=split)"
    KVM_CAP_X2APIC_API "APIC IDs above 254"
    KVM_CAP_IRQFD_RESAMPLE "level-triggered interrupts without leaving the kernel"
    KVM_CAP_IOEVENTFD_ANY_LENGTH "fast doorbells of any access size"
    KVM_CAP_SET_IDENTITY_MAP_ADDR "choosing where Intel's real-mode page table lies"
    KVM_CAP_READONLY_MEM "ROM and flash memory"
    KVM_CAP_SYNC_MMU "swapping, sharing and post-copy of guest memory"
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 "cheap dirty logs: migration without long stops"
    KVM_CAP_DIRTY_LOG_RING "dirty rings instead of bitmaps"
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL "dirty rings with defined memory ordering"
    KVM_CAP_XCRS "saving XCR0, on CPUs with XSAVE"
    KVM_CAP_XSAVE2 "saving state larger than 4 KiB (AMX)"
    KVM_CAP_EXCEPTION_PAYLOAD "saving an exception's address before it is delivered"
    KVM_CAP_X86_TRIPLE_FAULT_EVENT "saving a triple fault that is pending"
    KVM_CAP_NESTED_STATE "saving a guest that runs guests"
    KVM_CAP_X86_SMM "system management mode"
    KVM_CAP_TSC_CONTROL "moving to hosts with another time-stamp frequency"
    KVM_CAP_VM_TSC_CONTROL "the same for a whole machine"
    KVM_CAP_TSC_DEADLINE_TIMER "the APIC timer's TSC-deadline mode"
    KVM_CAP_KVMCLOCK_CTRL "telling the guest that it was paused"
    KVM_CAP_GET_MSR_FEATURES "what MSRs may say about CPU features"
    KVM_CAP_X86_DISABLE_EXITS "idling in the guest on hosts of its own"
    KVM_CAP_SET_GUEST_DEBUG "breakpoints and single steps"
    KVM_CAP_BINARY_STATS_FD "KVM's statistics"
    KVM_CAP_PMU_CAPABILITY "switching performance counters off"
};
