//! The state of a hypervisor in the guest: opaque but for its header.
#![allow(unsafe_code, reason = "the state is a union, opaque to us")]

use keel_hypervisor::Result;
use keel_hypervisor::state::Bytes;
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GIF_SET,
};
use kvm_ioctls::VcpuFd;

use super::{Context, check, name};
use crate::error::Tried;

/// The name of the block in this backend's private section.
pub(super) const BLOCK: &str = "nested";
const WHAT: &str = "nested virtualization";
/// `struct kvm_nested_state` without its data.
const HEADER: usize = 128;
/// VMX is off, and there is no current VMCS: an address of all ones (`kvm_vmx_nested_state_hdr`).
const NO_ADDRESS: u64 = u64::MAX;

fn get(fd: &VcpuFd, id: u32) -> Result<KvmNestedStateBuffer> {
    let mut buffer = KvmNestedStateBuffer::empty();
    fd.nested_state(&mut buffer).tried("KVM_GET_NESTED_STATE", name(id))?;
    Ok(buffer)
}

/// The state of a vCPU whose guest does not virtualize.
fn idle(format: u16) -> KvmNestedStateBuffer {
    let mut buffer = KvmNestedStateBuffer::empty();
    buffer.size = HEADER as u32;
    buffer.format = format;
    if u32::from(format) == KVM_STATE_NESTED_FORMAT_SVM {
        buffer.flags = KVM_STATE_NESTED_GIF_SET as u16;
    } else {
        buffer.hdr.vmx.vmxon_pa = NO_ADDRESS;
        buffer.hdr.vmx.vmcs12_pa = NO_ADDRESS;
    }
    buffer
}

fn is_idle(buffer: &KvmNestedStateBuffer) -> bool {
    if u32::from(buffer.format) == KVM_STATE_NESTED_FORMAT_SVM {
        u32::from(buffer.flags) == KVM_STATE_NESTED_GIF_SET
    } else {
        // SAFETY: every member of the union is plain data that was zero or has been filled in by the kernel.
        buffer.flags == 0 && unsafe { buffer.hdr.vmx.vmxon_pa } == NO_ADDRESS
    }
}

/// The state, if the guest virtualizes. If it does not there is nothing to say, so that such a guest can move between makes of CPU
/// and to a host without nested virtualization.
pub(super) fn save(fd: &VcpuFd, id: u32, cx: &Context) -> Result<Option<Bytes>> {
    if cx.nested == 0 {
        return Ok(None);
    }
    let buffer = get(fd, id)?;
    if is_idle(&buffer) {
        return Ok(None);
    }
    let size = (buffer.size as usize).clamp(HEADER, size_of::<KvmNestedStateBuffer>());
    // SAFETY: the structure is `repr(C)` without padding, all of it was zeroed or filled in by the kernel, and `size` does not go past it.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const buffer).cast::<u8>(), size) };
    Ok(Some(Bytes(bytes.to_vec())))
}

pub(super) fn check_block(cx: &Context, block: Option<&Bytes>) -> Result<()> {
    let Some(Bytes(bytes)) = block else { return Ok(()) };
    check(cx.nested > 0, WHAT, || {
        "the guest uses it, and this host's KVM does not offer it".into()
    })?;
    let most = cx.nested.min(size_of::<KvmNestedStateBuffer>());
    check((HEADER..=most).contains(&bytes.len()), WHAT, || {
        format!("{} bytes; this host's KVM takes {HEADER} to {most}", bytes.len())
    })?;
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let size = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    // The kernel copies as much as the header announces.
    check(size as usize == bytes.len(), WHAT, || format!("{} bytes announce {size}", bytes.len()))?;
    let format = u32::from(u16_at(2));
    check(matches!(format, KVM_STATE_NESTED_FORMAT_VMX | KVM_STATE_NESTED_FORMAT_SVM), WHAT, || {
        format!("format {format} is neither VMX nor SVM")
    })
}

/// Makes the vCPU leave any virtualization its guest did before.
pub(super) fn clear(fd: &VcpuFd, id: u32, cx: &Context) -> Result<()> {
    if cx.nested == 0 {
        return Ok(());
    }
    let now = get(fd, id)?;
    if is_idle(&now) {
        return Ok(());
    }
    Ok(fd.set_nested_state(&idle(now.format)).tried("KVM_SET_NESTED_STATE", name(id))?)
}

/// Loads a block that has been checked.
pub(super) fn load(fd: &VcpuFd, id: u32, Bytes(bytes): &Bytes) -> Result<()> {
    let mut buffer = KvmNestedStateBuffer::empty();
    let len = bytes.len().min(size_of::<KvmNestedStateBuffer>());
    // SAFETY: both are at least `len` bytes and distinct; every member of the structure is plain data in which any bit pattern is valid.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut buffer).cast::<u8>(), len) };
    Ok(fd.set_nested_state(&buffer).tried("KVM_SET_NESTED_STATE", name(id))?)
}
