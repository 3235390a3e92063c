//! The ioctls that `kvm-ioctls` does not have (Linux `Documentation/virt/kvm/api.rst`), and the mappings of a vCPU's file.
#![allow(unsafe_code, reason = "ioctls and shared mappings of the kernel's own pages")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{NonNull, addr_of, addr_of_mut};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_clear_dirty_log, kvm_dirty_gfn, kvm_dirty_log,
    kvm_interrupt, kvm_run, kvm_signal_mask,
};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

fn check(ret: i32) -> io::Result<i32> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// Fetches the dirty bitmap of a slot, a bit a page, into `bitmap`, which must have a word for every 64 pages of the slot.
pub(crate) fn get_dirty_log(vm: &impl AsRawFd, slot: u32, bitmap: &mut [u64]) -> io::Result<()> {
    let mut log = kvm_dirty_log { slot, ..Default::default() };
    log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: the kernel writes a bit for every page of the slot; the caller sized `bitmap` for it, and it outlives the call.
    check(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) }).map(drop)
}

/// Clears and write-protects again those of `num_pages` pages from `first_page` on whose bit is set in `bitmap`.
///
/// `first_page` must be a multiple of 64, and `num_pages` too unless it reaches the end of the slot.
pub(crate) fn clear_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    first_page: u64,
    num_pages: u32,
    bitmap: &[u64],
) -> io::Result<()> {
    if (bitmap.len() as u64) < u64::from(num_pages).div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut clear = kvm_clear_dirty_log { slot, num_pages, first_page, ..Default::default() };
    clear.__bindgen_anon_1.dirty_bitmap = bitmap.as_ptr().cast_mut().cast();
    // SAFETY: the kernel only reads the bitmap, and not past `num_pages` bits, which were checked to be there.
    check(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &clear) }).map(drop)
}

/// Gives collected entries of all dirty rings of the VM back to the kernel and protects their pages again. Returns how many.
pub(crate) fn reset_dirty_rings(vm: &impl AsRawFd) -> io::Result<i32> {
    // SAFETY: takes no argument.
    check(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) })
}

/// Queues an external interrupt on a vCPU without an in-kernel local APIC.
pub(crate) fn interrupt(vcpu: &impl AsRawFd, vector: u8) -> io::Result<()> {
    let interrupt = kvm_interrupt { irq: vector.into() };
    // SAFETY: the kernel only reads the structure.
    check(unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &interrupt) }).map(drop)
}

/// Sets the signals that are blocked while the vCPU runs: bit `n - 1` for signal `n`.
pub(crate) fn set_signal_mask(vcpu: &impl AsRawFd, blocked: u64) -> io::Result<()> {
    /// `struct kvm_signal_mask` with the kernel's 8-byte `sigset_t` in place of its flexible array.
    #[repr(C)]
    struct Mask {
        len: u32,
        sigset: [u8; 8],
    }
    let mask = Mask { len: 8, sigset: blocked.to_ne_bytes() };
    // SAFETY: the kernel reads the header and the 8 bytes it announces.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &mask) }).map(drop)
}

/// The file of binary statistics of a VM or a vCPU.
pub(crate) fn stats_file(of: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: takes no argument.
    let fd = check(unsafe { ioctl(of, KVM_GET_STATS_FD()) })?;
    // SAFETY: a descriptor the kernel has just made, owned by nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// A mapping of a part of a vCPU's file, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; what is behind it is reached by atomic or volatile accesses only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &impl AsRawFd, offset: usize, len: usize) -> io::Result<Self> {
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no other memory of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Mapping { start, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `new`, and nothing borrows from it past our own lifetime.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// A second mapping of a vCPU's `kvm_run`, for what other threads do to it and for what `kvm-ioctls` does not show.
///
/// Owned apart from the vCPU, so that a kick can not reach an unmapped page however late it comes.
#[derive(Debug)]
pub(crate) struct RunPage(Mapping);

impl RunPage {
    pub(crate) fn new(vcpu: &impl AsRawFd) -> io::Result<Self> {
        Mapping::new(vcpu, 0, std::mem::size_of::<kvm_run>()).map(RunPage)
    }

    fn run(&self) -> *mut kvm_run {
        self.0.start.as_ptr().cast()
    }

    /// Makes the next `KVM_RUN` return at once, after finishing the I/O in flight.
    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: a byte inside the mapping, only ever reached through this atomic in this process; the borrow of `self` keeps it mapped.
        unsafe { AtomicU8::from_ptr(addr_of_mut!((*self.run()).immediate_exit)) }
    }

    /// The size in bytes of one unit of the port access that caused the last exit.
    #[inline]
    pub(crate) fn io_size(&self) -> u8 {
        // SAFETY: inside the mapping; any bit pattern is a `u8`. Volatile, for the kernel changes it.
        unsafe { addr_of!((*self.run()).__bindgen_anon_1.io.size).read_volatile() }
    }

    /// The suberror of the internal error that caused the last exit.
    pub(crate) fn internal_suberror(&self) -> u32 {
        // SAFETY: as above, for a `u32`.
        unsafe { addr_of!((*self.run()).__bindgen_anon_1.internal.suberror).read_volatile() }
    }

    /// The hardware's own reason of an exit the kernel did not know (`KVM_EXIT_UNKNOWN`).
    pub(crate) fn hardware_exit_reason(&self) -> u64 {
        // SAFETY: as above, for a `u64`.
        unsafe { addr_of!((*self.run()).__bindgen_anon_1.hw.hardware_exit_reason).read_volatile() }
    }

    /// Asks for an exit as soon as an interrupt can be injected.
    pub(crate) fn request_interrupt_window(&self, on: bool) {
        // SAFETY: inside the mapping; the kernel reads it on entry only.
        unsafe { addr_of_mut!((*self.run()).request_interrupt_window).write_volatile(on.into()) }
    }

    /// Whether that is asked for.
    pub(crate) fn interrupt_window_requested(&self) -> bool {
        // SAFETY: as for `io_size`.
        unsafe { addr_of!((*self.run()).request_interrupt_window).read_volatile() != 0 }
    }

    /// Whether an interrupt could be injected when the vCPU last stopped.
    pub(crate) fn ready_for_interrupt(&self) -> bool {
        // SAFETY: as for `io_size`.
        unsafe {
            addr_of!((*self.run()).ready_for_interrupt_injection).read_volatile() != 0
                && addr_of!((*self.run()).if_flag).read_volatile() != 0
        }
    }

    /// The task priority the kernel takes on entry where no local APIC is in the kernel.
    pub(crate) fn set_cr8(&self, cr8: u64) {
        // SAFETY: inside the mapping; the kernel reads it on entry only.
        unsafe { addr_of_mut!((*self.run()).cr8).write_volatile(cr8) }
    }
}

/// A vCPU's ring of dirty pages.
#[derive(Debug)]
pub(crate) struct DirtyRing {
    mapping: Mapping,
    entries: u32,
    next: u32,
}

/// An entry is filled in by the kernel.
const DIRTY: u32 = 1 << 0;
/// An entry has been collected by us.
const RESET: u32 = 1 << 1;

impl DirtyRing {
    /// Maps the ring of a vCPU. `entries` is the number the VM was told.
    pub(crate) fn new(vcpu: &impl AsRawFd, entries: u32, page_size: usize) -> io::Result<Self> {
        let len = entries as usize * std::mem::size_of::<kvm_dirty_gfn>();
        let mapping = Mapping::new(vcpu, KVM_DIRTY_LOG_PAGE_OFFSET as usize * page_size, len)?;
        Ok(DirtyRing { mapping, entries, next: 0 })
    }

    /// Hands every new entry to `each` as slot and page offset in the slot. Duplicates are to be expected.
    pub(crate) fn collect(&mut self, mut each: impl FnMut(u32, u64)) {
        // At most once around: the kernel can not refill what has not been reset.
        for _ in 0..self.entries {
            let index = (self.next % self.entries) as usize;
            // SAFETY: `index` is below the number of entries that were mapped.
            let entry = unsafe { self.mapping.start.as_ptr().cast::<kvm_dirty_gfn>().add(index) };
            // SAFETY: an aligned `u32` in the mapping that both sides reach atomically.
            let flags = unsafe { AtomicU32::from_ptr(addr_of_mut!((*entry).flags)) };
            // Acquire: the kernel writes slot and offset before the flag.
            if flags.load(Ordering::Acquire) != DIRTY {
                return;
            }
            // SAFETY: the kernel does not touch an entry that is marked dirty.
            let (slot, offset) = unsafe {
                (addr_of!((*entry).slot).read_volatile(), addr_of!((*entry).offset).read_volatile())
            };
            each(slot, offset);
            // Release: we have read it before the kernel may fill it again.
            flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1) % self.entries;
        }
    }
}
