//! The local APIC, and the vCPU's activity, which KVM keeps with it.

use keel_hypervisor::Result;
use keel_hypervisor::state::{Activity, LapicState};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state, kvm_mp_state,
};
use kvm_ioctls::VcpuFd;

use super::{Context, bad, check, name};
use crate::error::{Error, Tried};

/// Registers of 32 bits, 16 bytes apart in `kvm_lapic_state`.
const REGISTERS: usize = 64;

pub(super) fn save(fd: &VcpuFd, id: u32, cx: &Context) -> Result<Option<LapicState>> {
    if !cx.lapic() {
        return Ok(None);
    }
    let from = fd.get_lapic().tried("KVM_GET_LAPIC", name(id))?;
    let registers = from
        .regs
        .chunks_exact(16)
        .map(|chunk| {
            u32::from_le_bytes([chunk[0] as u8, chunk[1] as u8, chunk[2] as u8, chunk[3] as u8])
        })
        .collect();
    Ok(Some(LapicState { registers }))
}

pub(super) fn check_state(cx: &Context, lapic: Option<&LapicState>) -> Result<()> {
    const WHAT: &str = "local APIC";
    match lapic {
        Some(_) if !cx.lapic() => {
            Err(bad(WHAT, "this VM has its interrupt controllers in user space"))
        }
        None if cx.lapic() => {
            Err(bad(WHAT, "the state has none, this VM's vCPUs have one in the kernel"))
        }
        Some(LapicState { registers }) => check(registers.len() == REGISTERS, WHAT, || {
            format!("{} registers instead of {REGISTERS}", registers.len())
        }),
        None => Ok(()),
    }
}

pub(super) fn load(fd: &VcpuFd, id: u32, lapic: &LapicState) -> Result<()> {
    let mut to = kvm_lapic_state::default();
    for (chunk, register) in to.regs.chunks_exact_mut(16).zip(&lapic.registers) {
        chunk.iter_mut().zip(register.to_le_bytes()).for_each(|(to, from)| *to = from as _);
    }
    Ok(fd.set_lapic(&to).tried("KVM_SET_LAPIC", name(id))?)
}

pub(super) fn save_activity(fd: &VcpuFd, id: u32) -> Result<Activity> {
    match fd.get_mp_state().tried("KVM_GET_MP_STATE", name(id))?.mp_state {
        KVM_MP_STATE_RUNNABLE => Ok(Activity::Runnable),
        KVM_MP_STATE_UNINITIALIZED => Ok(Activity::Uninitialized),
        KVM_MP_STATE_INIT_RECEIVED => Ok(Activity::InitReceived),
        KVM_MP_STATE_HALTED => Ok(Activity::Halted),
        KVM_MP_STATE_SIPI_RECEIVED => Ok(Activity::SipiReceived),
        other => {
            Err(Error::Invalid(format!("vCPU {id} is in activity {other}, which can not be saved"))
                .into())
        }
    }
}

pub(super) fn check_activity(cx: &Context, activity: Activity) -> Result<()> {
    // Without a local APIC in the kernel the vCPU waits in user space: HLT and INIT come out of KVM_RUN.
    check(cx.lapic() || activity == Activity::Runnable, "activity", || {
        format!("{activity:?} needs a local APIC in the kernel")
    })
}

pub(super) fn load_activity(fd: &VcpuFd, id: u32, activity: Activity) -> Result<()> {
    let mp_state = match activity {
        Activity::Runnable => KVM_MP_STATE_RUNNABLE,
        Activity::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
        Activity::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::SipiReceived => KVM_MP_STATE_SIPI_RECEIVED,
    };
    Ok(fd.set_mp_state(kvm_mp_state { mp_state }).tried("KVM_SET_MP_STATE", name(id))?)
}
