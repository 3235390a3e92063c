//! Exceptions and interrupts on their way into a vCPU.

use keel_hypervisor::state::{Activity, Events, Exception, Interrupt};
use keel_hypervisor::{Error, Result};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;

use super::{Context, check, name};
use crate::error::Tried;

const WHAT: &str = "events";

pub(super) fn save(fd: &VcpuFd, id: u32) -> Result<Events> {
    let from = fd.get_vcpu_events().tried("KVM_GET_VCPU_EVENTS", name(id))?;
    let valid = |flag: u32| from.flags & flag != 0;
    let exception =
        (from.exception.injected != 0 || from.exception.pending != 0).then(|| Exception {
            vector: from.exception.nr,
            error_code: (from.exception.has_error_code != 0).then_some(from.exception.error_code),
            pending: from.exception.pending != 0,
            payload: (from.exception_has_payload != 0).then_some(from.exception_payload),
        });
    let interrupt = (from.interrupt.injected != 0)
        .then_some(Interrupt { vector: from.interrupt.nr, software: from.interrupt.soft != 0 });
    let smm = valid(KVM_VCPUEVENT_VALID_SMM);
    Ok(Events {
        exception,
        interrupt,
        shadow: from.interrupt.shadow,
        nmi_injected: from.nmi.injected != 0,
        nmi_pending: from.nmi.pending != 0,
        nmi_masked: from.nmi.masked != 0,
        sipi_vector: if valid(KVM_VCPUEVENT_VALID_SIPI_VECTOR) { from.sipi_vector } else { 0 },
        smm: smm && from.smi.smm != 0,
        smi_pending: smm && from.smi.pending != 0,
        smm_inside_nmi: smm && from.smi.smm_inside_nmi != 0,
        latched_init: smm && from.smi.latched_init != 0,
        triple_fault: valid(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && from.triple_fault.pending != 0,
    })
}

/// Refuses what the kernel would refuse without a reason, and what it would drop without a word.
pub(super) fn check_events(cx: &Context, events: &Events, activity: Activity) -> Result<()> {
    if let Some(exception) = &events.exception {
        // Vector 2 is the NMI, which is no exception.
        check(exception.vector < 32 && exception.vector != 2, WHAT, || {
            format!("there is no exception {}", exception.vector)
        })?;
        check(exception.pending || exception.payload.is_none(), WHAT, || {
            "an exception that is being delivered has no payload any more".into()
        })?;
        if exception.pending && !cx.exception_payload {
            return Err(Error::Unsupported("KVM_CAP_EXCEPTION_PAYLOAD (a pending exception)"));
        }
    }
    check(events.shadow < 4, WHAT, || {
        format!("interrupt shadow {:#x} does not fit 2 bits", events.shadow)
    })?;
    check(events.sipi_vector < 256, WHAT, || {
        format!("there is no SIPI vector {:#x}", events.sipi_vector)
    })?;
    check(events.smm || !events.smm_inside_nmi, WHAT, || {
        "in an NMI inside SMM, but not in SMM".into()
    })?;
    if (events.smm || events.smi_pending) && !cx.smm {
        return Err(Error::Unsupported("KVM_CAP_X86_SMM (system-management mode)"));
    }
    check(cx.lapic() || !events.latched_init, WHAT, || {
        "an INIT is latched in a local APIC that is not there".into()
    })?;
    let waits = matches!(activity, Activity::InitReceived | Activity::SipiReceived);
    check(!(waits && (events.smm || events.smi_pending || events.latched_init)), WHAT, || {
        format!("an INIT is held off in SMM, so that the vCPU can not be in {activity:?}")
    })?;
    if events.triple_fault && !cx.triple_fault {
        return Err(Error::Unsupported(
            "KVM_CAP_X86_TRIPLE_FAULT_EVENT (a triple fault on its way)",
        ));
    }
    Ok(())
}

/// Puts the vCPU into or out of system-management mode, with no event on its way.
pub(super) fn load_smm(fd: &VcpuFd, id: u32, cx: &Context, smm: bool) -> Result<()> {
    if !cx.smm {
        return Ok(());
    }
    let mut to = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SMM, ..Default::default() };
    to.smi.smm = smm.into();
    Ok(fd.set_vcpu_events(&to).tried("KVM_SET_VCPU_EVENTS", || format!("vCPU {id} (SMM)"))?)
}

pub(super) fn load(
    fd: &VcpuFd,
    id: u32,
    cx: &Context,
    events: &Events,
    activity: Activity,
) -> Result<()> {
    let mut to = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(exception) = &events.exception {
        to.exception.injected = (!exception.pending).into();
        to.exception.pending = exception.pending.into();
        to.exception.nr = exception.vector;
        to.exception.has_error_code = exception.error_code.is_some().into();
        to.exception.error_code = exception.error_code.unwrap_or(0);
        to.exception_has_payload = exception.payload.is_some().into();
        to.exception_payload = exception.payload.unwrap_or(0);
    }
    if cx.exception_payload {
        to.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if let Some(interrupt) = &events.interrupt {
        to.interrupt.injected = 1;
        to.interrupt.nr = interrupt.vector;
        to.interrupt.soft = interrupt.software.into();
    }
    to.interrupt.shadow = events.shadow;
    to.nmi.injected = events.nmi_injected.into();
    to.nmi.pending = events.nmi_pending.into();
    to.nmi.masked = events.nmi_masked.into();
    // The kernel never says it on saving: by then it has started the vCPU there. Taken only where the vCPU still waits.
    if activity == Activity::SipiReceived {
        to.sipi_vector = events.sipi_vector;
        to.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    }
    // Without SMM the flag is still how a latched INIT is set and cleared.
    to.flags |= KVM_VCPUEVENT_VALID_SMM;
    to.smi.smm = events.smm.into();
    to.smi.pending = events.smi_pending.into();
    to.smi.smm_inside_nmi = events.smm_inside_nmi.into();
    to.smi.latched_init = events.latched_init.into();
    if cx.triple_fault {
        to.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        to.triple_fault.pending = events.triple_fault.into();
    }
    Ok(fd.set_vcpu_events(&to).tried("KVM_SET_VCPU_EVENTS", name(id))?)
}
