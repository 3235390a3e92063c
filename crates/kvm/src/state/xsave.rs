//! The XSAVE area.
#![allow(unsafe_code, reason = "the kernel takes the area's size for granted")]

use keel_hypervisor::Result;
use keel_hypervisor::state::{Bytes, XsaveArea};
use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::VcpuFd;

use super::{Context, bad, check, name};
use crate::error::{Error, Tried};

/// The legacy region and the header, which every area has (SDM volume 1, 13.4).
const LEAST: usize = 576;
/// Any processor's area fits; a longer one is damage.
const MOST: usize = 1 << 20;

/// An area of the size the kernel takes for granted.
fn area(cx: &Context) -> Result<Xsave> {
    let extra = (cx.xsave_size - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    Xsave::new(extra)
        .map_err(|error| Error::Invalid(format!("no memory for an XSAVE area: {error:?}")).into())
}

pub(super) fn save(fd: &VcpuFd, id: u32, cx: &Context) -> Result<XsaveArea> {
    let mut bytes = Vec::with_capacity(cx.xsave_size);
    let mut put = |words: &[u32]| bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    if cx.xsave2 {
        let mut xsave = area(cx)?;
        // SAFETY: `area` is at least as large as KVM_CAP_XSAVE2 says of this VM. The size depends on the features the process has been permitted
        // to use in guests, which the kernel holds fixed from the first vCPU on.
        unsafe { fd.get_xsave2(&mut xsave) }.tried("KVM_GET_XSAVE2", name(id))?;
        put(&xsave.as_fam_struct_ref().xsave.region);
        put(xsave.as_slice());
    } else {
        put(&fd.get_xsave().tried("KVM_GET_XSAVE", name(id))?.region);
    }
    Ok(XsaveArea(Bytes(bytes)))
}

pub(super) fn check_area(cx: &Context, XsaveArea(Bytes(bytes)): &XsaveArea) -> Result<()> {
    const WHAT: &str = "XSAVE area";
    check((LEAST..=MOST).contains(&bytes.len()), WHAT, || {
        format!("{} bytes; an area has at least {LEAST}", bytes.len())
    })?;
    // One from a host with more kinds of state is no matter as long as they are not in use.
    let beyond = bytes.get(cx.xsave_size..).unwrap_or_default();
    if beyond.iter().any(|byte| *byte != 0) {
        return Err(bad(
            WHAT,
            format!("{} bytes are in use, this host's has {}", bytes.len(), cx.xsave_size),
        ));
    }
    Ok(())
}

pub(super) fn load(
    fd: &VcpuFd,
    id: u32,
    cx: &Context,
    XsaveArea(Bytes(bytes)): &XsaveArea,
) -> Result<()> {
    let mut xsave = area(cx)?;
    // A shorter area leaves the rest zero. Its header does not name the state that would be there, or the kernel loads it as zeros.
    let mut words = bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    });
    // SAFETY: the length of the flexible array is not touched.
    let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    region.iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
    xsave.as_mut_slice().iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
    // SAFETY: the kernel reads as many bytes as KVM_CAP_XSAVE2 says, or 4096 where it does not know that; `area` has them.
    Ok(unsafe { fd.set_xsave2(&xsave) }.tried("KVM_SET_XSAVE", name(id))?)
}
