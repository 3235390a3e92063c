//! A whole vCPU: which step comes when, and why.
//!
//! The kernel does not document an order; the reasons below are what its calls do to each other's state.

use std::collections::BTreeMap;

use keel_hypervisor::state::{Activity, Private};
use keel_hypervisor::{CpuState, Result};
use kvm_ioctls::VcpuFd;

use super::{Context, PRIVATE, bad, check, events, lapic, msrs, nested, registers, xsave};

/// Takes the state of a vCPU that is between two instructions.
pub(crate) fn save_cpu(fd: &VcpuFd, id: u32, cx: &Context) -> Result<CpuState> {
    // First of all: asking for the activity makes the kernel act on an INIT or SIPI that has come in, which changes registers.
    let activity = lapic::save_activity(fd, id)?;
    // The MSRs before the local APIC: the deadline of its timer may pass in between. Then the interrupt is in the saved IRR as well as the deadline
    // in the past, and comes once too often, where the other way round it would be lost.
    let (private_msrs, msrs): (BTreeMap<u32, u64>, BTreeMap<u32, u64>) =
        msrs::save(fd, id, cx)?.into_iter().partition(|(index, _)| msrs::is_private(*index));
    let (segments, control) = registers::save_special(fd, id, cx)?;
    let blocks = nested::save(fd, id, cx)?
        .map(|block| (nested::BLOCK.to_owned(), block))
        .into_iter()
        .collect();
    Ok(CpuState {
        registers: registers::save(fd, id)?,
        segments,
        control,
        debug: registers::save_debug(fd, id, cx)?,
        msrs,
        xsave: xsave::save(fd, id, cx)?,
        xcrs: registers::save_xcrs(fd, id, cx)?,
        lapic: lapic::save(fd, id, cx)?,
        activity,
        events: events::save(fd, id)?,
        tsc_khz: msrs::save_tsc_khz(fd, id)?,
        interrupt_window: false,
        private: BTreeMap::from([(PRIVATE.to_owned(), Private { msrs: private_msrs, blocks })]),
    })
}

/// Gives a vCPU its state. CPUID must have been set and guest memory be mapped: the kernel judges control registers, XCRs and MSRs by
/// the one, and looks up the pages that paravirtual MSRs and nested state name in the other.
///
/// Nothing is changed where a part of the state is impossible. Where the kernel refuses something later, the vCPU must not be run.
pub(crate) fn load_cpu(fd: &VcpuFd, id: u32, cx: &Context, state: &CpuState) -> Result<()> {
    // Sections of other backends have no meaning here: what they hold is, by definition, nothing the architecture or this backend knows.
    let none = Private::default();
    let private = state.private.get(PRIVATE).unwrap_or(&none);
    let nested_block = private.blocks.get(nested::BLOCK);
    check_cpu(cx, state, private)?;

    // Out of any wait and out of nested virtualization, which the vCPU may be in if it has been used before: the kernel refuses system-management
    // events in a vCPU that waits for a SIPI, and leaving nested virtualization overwrites registers.
    if cx.lapic() {
        lapic::load_activity(fd, id, Activity::Runnable)?;
    }
    nested::clear(fd, id, cx)?;
    // The frequency before the counter: writing MSR 0x10 makes an offset from the scaled host counter.
    msrs::load_tsc_khz(fd, id, cx, state.tsc_khz)?;
    // Segment and control registers before all that depends on the CPU's mode: the APIC base decides how the local APIC is laid out,
    // EFER.SVME and CR4.VMXE whether there can be nested state.
    registers::load_special(fd, id, cx, &state.segments, &state.control)?;
    // After the segments: RFLAGS.VM changes what the kernel makes of them. Before the events: this drops a pending exception.
    registers::load(fd, id, &state.registers)?;
    // Which extended state there is, then the state. And both before the MSRs, among which are XFD, which disarms parts of it, and XSS.
    registers::load_xcrs(fd, id, cx, &state.xcrs)?;
    xsave::load(fd, id, cx, &state.xsave)?;
    // Before the events: a pending #DB changes DR6 when it is delivered.
    registers::load_debug(fd, id, &state.debug)?;
    // Before the local APIC, whose timer starts with it and counts by the TSC; not yet the timer's deadline.
    let (deadline, now): (Vec<_>, Vec<_>) = state
        .msrs
        .iter()
        .chain(&private.msrs)
        .partition(|(index, _)| **index == msrs::TSC_DEADLINE);
    msrs::load(fd, id, cx, now)?;
    if let Some(lapic) = &state.lapic {
        lapic::load(fd, id, lapic)?;
        // The kernel takes a deadline only while the local APIC's timer is in deadline mode, and arms the timer by it.
        msrs::load(fd, id, cx, deadline)?;
    }
    // After the registers, which are those of the nested guest if it is in one; after feature control, the VMX capabilities
    // and the host save area, by which it is judged. Whether in SMM must be known before, for changing it later leaves nested virtualization.
    if let Some(block) = nested_block {
        events::load_smm(fd, id, cx, state.events.smm)?;
        nested::load(fd, id, block)?;
    }
    // After everything that drops, raises or delivers events.
    events::load(fd, id, cx, &state.events, state.activity)?;
    // Last: the calls above wake a vCPU that waits (the kernel takes segments at the reset vector for a reset), and a SIPI starts it at
    // the vector given with the events.
    if cx.lapic() {
        lapic::load_activity(fd, id, state.activity)?;
    }
    Ok(())
}

fn check_cpu(cx: &Context, state: &CpuState, private: &Private) -> Result<()> {
    registers::check_general(&state.registers)?;
    registers::check_special(&state.segments, &state.control)?;
    registers::check_debug(&state.debug)?;
    registers::check_xcrs(&state.xcrs)?;
    msrs::check_values(&state.msrs)?;
    let deadline = state.msrs.get(&msrs::TSC_DEADLINE).copied().unwrap_or(0);
    check(cx.lapic() || deadline == 0, "MSR", || {
        format!("{deadline:#x} for MSR {:#x} needs a local APIC in the kernel", msrs::TSC_DEADLINE)
    })?;
    xsave::check_area(cx, &state.xsave)?;
    lapic::check_state(cx, state.lapic.as_ref())?;
    lapic::check_activity(cx, state.activity)?;
    events::check_events(cx, &state.events, state.activity)?;
    nested::check_block(cx, private.blocks.get(nested::BLOCK))?;
    if let Some(block) = private.blocks.keys().find(|name| *name != nested::BLOCK) {
        return Err(bad("KVM's own state", format!("there is no block {block:?}")));
    }
    if let Some(index) = private.msrs.keys().find(|index| !msrs::is_private(**index)) {
        return Err(bad("KVM's own state", format!("MSR {index:#x} is none of KVM's")));
    }
    Ok(())
}
