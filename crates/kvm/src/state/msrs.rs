//! Model-specific registers, and the frequency of the time-stamp counter.

use std::collections::{BTreeMap, BTreeSet};

use keel_hypervisor::Result;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::{Context, bad, check, name};
use crate::error::{Error, Tried};

/// The deadline of the local APIC's timer. Loaded by itself, for it needs the local APIC.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;
/// Page attribute table: a memory type a byte (SDM volume 3, 12.12.2).
const PAT: u32 = 0x277;
/// How many banks report machine checks, in the low byte (SDM volume 3, 16.3.1.1).
const MCG_CAP: u32 = 0x179;
/// CTL, STATUS, ADDR and MISC of each bank follow each other from here on.
const MC0_CTL: u32 = 0x400;
/// The banks end here: the next MSR range is that of VMX.
const MC_BANKS: u32 = 32;
/// As many as the kernel takes in one call (`KVM_MAX_MSR_ENTRIES`).
const BATCH: usize = 256;

/// The MSRs that make up a vCPU's state: those the kernel lists, and the two groups that older kernels leave out of the list
/// although the guest can write them: memory types (SDM volume 3, 12.11) and the machine-check banks.
pub(super) fn saved(kvm: &Kvm) -> crate::Result<Vec<u32>> {
    let listed =
        kvm.get_msr_index_list().tried("KVM_GET_MSR_INDEX_LIST", || crate::DEVICE.into())?;
    let mut all: BTreeSet<u32> = listed.as_slice().iter().copied().collect();
    all.extend(0x200..0x210);
    all.extend([0x250, 0x258, 0x259]);
    all.extend(0x268..0x270);
    all.insert(0x2ff);
    all.extend(MC0_CTL..MC0_CTL + 4 * MC_BANKS);
    Ok(all.into_iter().collect())
}

/// Whether only KVM gives this MSR a meaning: its own paravirtual ones and Hyper-V's.
pub(super) fn is_private(index: u32) -> bool {
    matches!(index, 0x11 | 0x12 | 0x4b56_4d00..=0x4b56_4dff | 0x4000_0000..=0x4000_01ff)
}

/// The machine-check banks this vCPU has, by a register that is not part of its state but of what it is.
fn bank_end(fd: &VcpuFd) -> u32 {
    MC0_CTL + 4 * get(fd, MCG_CAP).map_or(0, |cap| cap as u32 & 0xff).min(MC_BANKS)
}

/// One MSR, if it can be read.
fn get(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut one = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    match fd.get_msrs(&mut one) {
        Ok(1) => one.as_slice().first().map(|entry| entry.data),
        _ => None,
    }
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries)
        .map_err(|error| Error::Invalid(format!("no list of MSRs: {error:?}")).into())
}

pub(super) fn save(fd: &VcpuFd, id: u32, cx: &Context) -> Result<BTreeMap<u32, u64>> {
    let mut found = BTreeMap::new();
    let absent = bank_end(fd)..MC0_CTL + 4 * MC_BANKS;
    let entries: Vec<kvm_msr_entry> = cx
        .msrs
        .iter()
        .filter(|index| !absent.contains(index))
        .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
        .collect();
    for batch in entries.chunks(BATCH) {
        let mut rest = batch;
        while !rest.is_empty() {
            let mut msrs = list(rest)?;
            let count = fd.get_msrs(&mut msrs).tried("KVM_GET_MSRS", name(id))?;
            found.extend(msrs.as_slice().iter().take(count).map(|entry| (entry.index, entry.data)));
            // The kernel stops at the first one it can not read: the vCPU's CPUID does not have what it belongs to. Go on behind it.
            rest = rest.get(count + 1..).unwrap_or_default();
        }
    }
    Ok(found)
}

/// Refuses what the kernel does not look at everywhere.
pub(super) fn check_values(msrs: &BTreeMap<u32, u64>) -> Result<()> {
    let pat = msrs.get(&PAT).copied().unwrap_or(0);
    check(pat.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)), "MSR", || {
        format!("{pat:#x} for MSR {PAT:#x} names a memory type that does not exist")
    })
}

/// Writes all of them in the order of their numbers. So Intel's counters come before what makes them count, and what permits
/// nested virtualization (0x3a) before its capabilities (0x480 and on); nothing else depends on the order.
pub(super) fn load<'a>(
    fd: &VcpuFd,
    id: u32,
    cx: &Context,
    msrs: impl IntoIterator<Item = (&'a u32, &'a u64)>,
) -> Result<()> {
    let entries: Vec<kvm_msr_entry> = msrs
        .into_iter()
        .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
        .collect();
    for batch in entries.chunks(BATCH) {
        let mut rest = batch;
        while !rest.is_empty() {
            let count = fd.set_msrs(&list(rest)?).tried("KVM_SET_MSRS", name(id))?;
            // The kernel stops at the first one it refuses.
            if let Some(refused) = rest.get(count) {
                tolerate(fd, cx, refused)?;
            }
            rest = rest.get(count + 1..).unwrap_or_default();
        }
    }
    Ok(())
}

/// Says of a refused write whether nothing is lost by it.
fn tolerate(fd: &VcpuFd, cx: &Context, refused: &kvm_msr_entry) -> Result<()> {
    let kvm_msr_entry { index, data, .. } = *refused;
    match get(fd, index) {
        // The register holds this value already, so that there was nothing to write. The kernel gives 0x4b564d06 (the vector of asynchronous
        // page faults) to all who ask, but takes it, even as 0, only with a local APIC in the kernel; feature MSRs are fixed once the vCPU has run.
        Some(now) if now == data => Ok(()),
        Some(now) => Err(bad(
            "MSR",
            format!(
                "the kernel refused {data:#x} for MSR {index:#x}, which is {now:#x} in this vCPU"
            ),
        )),
        // This kernel or this vCPU's CPUID does not have it, and the guest had not used it.
        None if data == 0 => Ok(()),
        None if cx.msrs.contains(&index) => Err(bad(
            "MSR",
            format!(
                "MSR {index:#x} was {data:#x}, but this vCPU's CPUID does not have it: set the same CPUID first"
            ),
        )),
        None => Err(bad(
            "MSR",
            format!("MSR {index:#x} was {data:#x}, but this host's KVM does not have it"),
        )),
    }
}

pub(super) fn save_tsc_khz(fd: &VcpuFd, id: u32) -> Result<Option<u32>> {
    Ok(Some(fd.get_tsc_khz().tried("KVM_GET_TSC_KHZ", name(id))?))
}

/// The frequencies of two hosts of one kind differ by as much as this, and guests correct for it as for a clock's drift.
const TOLERANCE_PPM: u64 = 250;

pub(super) fn load_tsc_khz(fd: &VcpuFd, id: u32, cx: &Context, wanted: Option<u32>) -> Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    // Zero would ask the kernel for its default.
    if wanted == 0 {
        return Err(bad("TSC frequency", "a running counter has one"));
    }
    let now = fd.get_tsc_khz().tried("KVM_GET_TSC_KHZ", name(id))?;
    if wanted == now {
        return Ok(());
    }
    if cx.tsc_control {
        return Ok(fd
            .set_tsc_khz(wanted)
            .tried("KVM_SET_TSC_KHZ", || format!("vCPU {id} ({wanted} kHz)"))?);
    }
    if u64::from(wanted.abs_diff(now)) * 1_000_000 <= u64::from(now) * TOLERANCE_PPM {
        return Ok(());
    }
    Err(bad(
        "TSC frequency",
        format!(
            "the guest's counter runs at {wanted} kHz, this host's at {now} kHz, and its processor can not scale it"
        ),
    ))
}
