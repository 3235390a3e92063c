//! The few calls that neither `vm-memory` nor the standard library make.
#![allow(unsafe_code, reason = "system calls on ranges of our own mappings, and zeroed memory")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use vm_memory::GuestMemoryRegion;

use crate::Region;
use crate::layout::PAGE_SIZE;

fn check(ret: i32) -> io::Result<i32> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// Words of zeroes that take no memory until they are written.
pub(crate) fn zeroed_words(count: usize) -> Box<[AtomicU64]> {
    // SAFETY: all zeroes is a valid `AtomicU64`.
    unsafe { Box::new_zeroed_slice(count).assume_init() }
}

/// Advises the kernel on a whole region. Only for advice that leaves the contents as they are.
pub(crate) fn advise(region: &Region, advice: i32) -> io::Result<()> {
    debug_assert!(![libc::MADV_DONTNEED, libc::MADV_REMOVE, libc::MADV_FREE].contains(&advice));
    // SAFETY: the range is a mapping that `region` owns, and the advice changes no contents.
    check(unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, advice) }).map(drop)
}

/// Has every page of a region written, without a change: what `MADV_POPULATE_WRITE` does, for kernels before 5.14.
///
/// The process is killed by SIGBUS where the file behind the region can not grow.
pub(crate) fn touch(region: &Region) {
    for offset in (0..region.len()).step_by(PAGE_SIZE as usize) {
        // SAFETY: within the mapping that `region` owns; everything else reaches this byte by volatile or atomic accesses, or from
        // outside the process.
        let byte = unsafe { AtomicU8::from_ptr(region.as_ptr().add(offset as usize)) };
        let is = byte.load(Ordering::Relaxed);
        // Not a load and a store, which would undo another's write in between; and not an `or` of 0, which need not write at all.
        let _ = byte.compare_exchange(is, is, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// An anonymous file in memory, of huge pages of 2^`huge` bytes if given.
pub(crate) fn memfd(name: &CStr, huge: Option<u32>) -> io::Result<File> {
    let huge = huge.map_or(0, |log| libc::MFD_HUGETLB | log << libc::MFD_HUGE_SHIFT);
    // SAFETY: the name outlives the call.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | huge) })?;
    // SAFETY: a descriptor the kernel has just made, owned by nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// The page size of a hugetlbfs file in bytes, or nothing if it is on another file system.
pub(crate) fn huge_page_size(file: &File) -> io::Result<Option<u64>> {
    // SAFETY: all zeroes is a valid `statfs`, and the kernel only writes into it.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the structure outlives the call.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) })?;
    Ok((stat.f_type == libc::HUGETLBFS_MAGIC).then_some(stat.f_bsize as u64))
}

/// Where the first data at or after `offset` begins; nothing if only a hole follows.
pub(crate) fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    // SAFETY: the call takes no pointer. Nobody goes by the file's position.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, libc::SEEK_DATA) };
    match u64::try_from(at) {
        Ok(at) => Ok(Some(at)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}
