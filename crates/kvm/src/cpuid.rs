//! `CPUID` between the seam's form and KVM's.

use keel_hypervisor::{Cpuid, CpuidEntry};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::{Error, Result};

pub(crate) fn from_kvm(cpuid: &CpuId) -> Cpuid {
    let entry = |entry: &kvm_cpuid_entry2| CpuidEntry {
        leaf: entry.function,
        subleaf: (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index),
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    };
    Cpuid(cpuid.as_slice().iter().map(entry).collect())
}

pub(crate) fn to_kvm(cpuid: &Cpuid) -> Result<CpuId> {
    let entries: Vec<_> = cpuid
        .0
        .iter()
        .map(|entry| kvm_cpuid_entry2 {
            function: entry.leaf,
            index: entry.subleaf.unwrap_or(0),
            flags: if entry.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| {
        Error::Invalid(format!("{} CPUID leaves are more than KVM takes", entries.len()))
    })
}
