//! The few calls on mappings that neither `vm-memory` nor the standard library make.
#![allow(unsafe_code, reason = "system calls on ranges of our own mappings")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use vm_memory::GuestMemoryRegion;

use crate::Region;

fn check(ret: i32) -> io::Result<i32> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// Advises the kernel on a whole region. Only for advice that leaves the contents as they are.
pub(crate) fn advise(region: &Region, advice: i32) -> io::Result<()> {
    debug_assert!(![libc::MADV_DONTNEED, libc::MADV_REMOVE, libc::MADV_FREE].contains(&advice));
    // SAFETY: the range is a mapping that `region` owns, and the advice changes no contents.
    check(unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, advice) }).map(drop)
}

/// An anonymous file in memory, of huge pages of 2^`huge` bytes if given.
pub(crate) fn memfd(name: &str, huge: Option<u32>) -> io::Result<File> {
    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    let huge = huge.map_or(0, |log| libc::MFD_HUGETLB | log << libc::MFD_HUGE_SHIFT);
    // SAFETY: the name outlives the call.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | huge) })?;
    // SAFETY: a descriptor the kernel has just made, owned by nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// The page size of a hugetlbfs file, or nothing if it is on another file system.
pub(crate) fn huge_page_size(file: &File) -> io::Result<Option<u64>> {
    // SAFETY: all zeroes is a valid `statfs`, and the kernel only writes into it.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the structure outlives the call.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) })?;
    Ok((stat.f_type == libc::HUGETLBFS_MAGIC).then_some(stat.f_bsize as u64))
}
