//! The ioctls that `kvm-ioctls` does not have (Linux `Documentation/virt/kvm/api.rst`), and the mappings of a vCPU's file.
#![allow(unsafe_code, reason = "ioctls and shared mappings of the kernel's own pages")]

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{NonNull, addr_of, addr_of_mut};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use keel_hypervisor::Width;
use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, KVM_EXIT_IO_IN, KVM_PIO_PAGE_OFFSET, KVMIO, kvm_clear_dirty_log,
    kvm_debug_exit_arch, kvm_dirty_gfn, kvm_dirty_log, kvm_interrupt, kvm_run,
    kvm_run__bindgen_ty_1__bindgen_ty_6, kvm_signal_mask,
};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);
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

/// A port access to be done: `kvm_run.io`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PortAccess {
    pub(crate) port: u16,
    /// `IN`: its units are to be set.
    pub(crate) read: bool,
    pub(crate) width: Width,
    /// More than one if the instruction is a repeated string instruction.
    pub(crate) units: u32,
    /// Offset of the data in the mapping.
    data: usize,
}

/// A load or store to be done: `kvm_run.mmio`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemoryAccess {
    pub(crate) gpa: u64,
    pub(crate) write: bool,
    /// Bytes, 1 to 8.
    pub(crate) len: u64,
    /// What is to be stored, from the lowest byte on; what is above `len` bytes means nothing.
    pub(crate) value: u64,
}

/// Our own mapping of a vCPU's `kvm_run` and of the page behind it, which has the data of port accesses.
///
/// Owned apart from the vCPU, so that a kick can not reach an unmapped page however late it comes. Exits are read from here and not
/// through `VcpuFd::run`: they find the processor's caches cold, so that each line and page touched on the way counts.
#[derive(Debug)]
pub(crate) struct RunPage(Mapping);

/// Pages are of this size on x86.
const PAGE_SIZE: usize = 4096;
const RUN_SIZE: usize = (KVM_PIO_PAGE_OFFSET as usize + 1) * PAGE_SIZE;

/// The bytes of a load or store can be reached as one word.
const _: () = assert!(
    (offset_of!(kvm_run, __bindgen_anon_1) + offset_of!(kvm_run__bindgen_ty_1__bindgen_ty_6, data))
        .is_multiple_of(8)
);

impl RunPage {
    pub(crate) fn new(vcpu: &impl AsRawFd) -> io::Result<Self> {
        Mapping::new(vcpu, 0, RUN_SIZE).map(RunPage)
    }

    #[inline]
    fn run(&self) -> *mut kvm_run {
        self.0.start.as_ptr().cast()
    }

    /// Makes the next `KVM_RUN` return at once, after finishing the I/O in flight.
    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: a byte inside the mapping, only ever reached through this atomic in this process; the borrow of `self` keeps it mapped.
        unsafe { AtomicU8::from_ptr(addr_of_mut!((*self.run()).immediate_exit)) }
    }

    /// Runs the vCPU, whose page this must be, until it stops.
    #[inline]
    pub(crate) fn enter(&self, vcpu: &impl AsRawFd) -> io::Result<()> {
        // SAFETY: what changes is the guest's memory and this page, which nothing borrows. The argument must be zero.
        match unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_RUN(), 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Why the vCPU stopped: `KVM_EXIT_…`.
    #[inline]
    pub(crate) fn exit_reason(&self) -> u32 {
        // SAFETY: inside the mapping; any bit pattern is a `u32`. Volatile, for the kernel changes it.
        unsafe { addr_of!((*self.run()).exit_reason).read_volatile() }
    }

    /// The port access that caused the last exit; nothing if the kernel gives a size that does not exist or data outside the mapping.
    #[inline]
    pub(crate) fn port_access(&self) -> Option<PortAccess> {
        // SAFETY: as above.
        let io = unsafe { addr_of!((*self.run()).__bindgen_anon_1.io).read_volatile() };
        let width = match io.size {
            1 => Width::Byte,
            2 => Width::Word,
            4 => Width::Dword,
            _ => return None,
        };
        let end = io.data_offset.checked_add(u64::from(io.count) * u64::from(io.size))?;
        (end <= RUN_SIZE as u64).then_some(PortAccess {
            port: io.port,
            read: u32::from(io.direction) == KVM_EXIT_IO_IN,
            width,
            units: io.count,
            data: io.data_offset as usize,
        })
    }

    fn unit(&self, access: &PortAccess, index: u32) -> *mut u8 {
        assert!(index < access.units);
        // SAFETY: `port_access` has seen to it that all units are in the mapping, and it is never changed.
        unsafe {
            self.0.start.as_ptr().add(access.data + index as usize * access.width.bytes() as usize)
        }
    }

    /// A unit of what is written to a port, zero-extended.
    #[inline]
    pub(crate) fn port_data(&self, access: &PortAccess, index: u32) -> u32 {
        let unit = self.unit(access, index);
        // SAFETY: as many bytes as the width has are at `unit`, maybe unaligned.
        unsafe {
            match access.width {
                Width::Byte => unit.read().into(),
                Width::Word => unit.cast::<u16>().read_unaligned().into(),
                _ => unit.cast::<u32>().read_unaligned(),
            }
        }
    }

    /// Answers a unit of a read from a port; bits above the width are ignored.
    #[inline]
    pub(crate) fn set_port_data(&self, access: &PortAccess, index: u32, value: u32) {
        let unit = self.unit(access, index);
        // SAFETY: as above.
        unsafe {
            match access.width {
                Width::Byte => unit.write(value as u8),
                Width::Word => unit.cast::<u16>().write_unaligned(value as u16),
                _ => unit.cast::<u32>().write_unaligned(value),
            }
        }
    }

    /// The load or store that caused the last exit.
    #[inline]
    pub(crate) fn memory_access(&self) -> MemoryAccess {
        // SAFETY: as for `exit_reason`. The data lies at a multiple of 8, as the assertion below has it.
        unsafe {
            let mmio = addr_of!((*self.run()).__bindgen_anon_1.mmio);
            MemoryAccess {
                gpa: addr_of!((*mmio).phys_addr).read_volatile(),
                write: addr_of!((*mmio).is_write).read_volatile() != 0,
                len: addr_of!((*mmio).len).read_volatile().into(),
                value: u64::from_le(addr_of!((*mmio).data).cast::<u64>().read_volatile()),
            }
        }
    }

    /// Answers a load; bits above its length are ignored.
    #[inline]
    pub(crate) fn set_memory_data(&self, value: u64) {
        // SAFETY: inside the mapping, and aligned as in `memory_access`; the kernel reads it on entry only.
        unsafe {
            let data = addr_of_mut!((*self.run()).__bindgen_anon_1.mmio.data);
            data.cast::<u64>().write_volatile(value.to_le());
        }
    }

    /// Where and why guest code that is debugged stopped.
    pub(crate) fn debug(&self) -> kvm_debug_exit_arch {
        // SAFETY: as for `exit_reason`.
        unsafe { addr_of!((*self.run()).__bindgen_anon_1.debug.arch).read_volatile() }
    }

    /// The kind of the system event.
    pub(crate) fn system_event(&self) -> u32 {
        // SAFETY: as for `exit_reason`.
        unsafe { addr_of!((*self.run()).__bindgen_anon_1.system_event.type_).read_volatile() }
    }

    /// Why the hardware did not enter the guest, and on which CPU of the host.
    pub(crate) fn failed_entry(&self) -> (u64, u32) {
        // SAFETY: as for `exit_reason`.
        let failed = unsafe { addr_of!((*self.run()).__bindgen_anon_1.fail_entry).read_volatile() };
        (failed.hardware_entry_failure_reason, failed.cpu)
    }

    /// The guest memory that the host could not provide: address and size.
    pub(crate) fn memory_fault(&self) -> (u64, u64) {
        // SAFETY: as for `exit_reason`.
        let fault =
            unsafe { addr_of!((*self.run()).__bindgen_anon_1.memory_fault).read_volatile() };
        (fault.gpa, fault.size)
    }

    /// The vector whose interrupt has ended.
    pub(crate) fn ended_vector(&self) -> u8 {
        // SAFETY: as for `exit_reason`.
        unsafe { addr_of!((*self.run()).__bindgen_anon_1.eoi.vector).read_volatile() }
    }

    /// The suberror of the internal error that caused the last exit.
    pub(crate) fn internal_suberror(&self) -> u32 {
        // SAFETY: as for `exit_reason`.
        unsafe { addr_of!((*self.run()).__bindgen_anon_1.internal.suberror).read_volatile() }
    }

    /// The hardware's own reason of an exit the kernel did not know (`KVM_EXIT_UNKNOWN`).
    pub(crate) fn hardware_exit_reason(&self) -> u64 {
        // SAFETY: as for `exit_reason`.
        unsafe { addr_of!((*self.run()).__bindgen_anon_1.hw.hardware_exit_reason).read_volatile() }
    }

    /// Asks for an exit as soon as an interrupt can be injected.
    pub(crate) fn request_interrupt_window(&self, on: bool) {
        // SAFETY: inside the mapping; the kernel reads it on entry only.
        unsafe { addr_of_mut!((*self.run()).request_interrupt_window).write_volatile(on.into()) }
    }

    /// Whether that is asked for.
    pub(crate) fn interrupt_window_requested(&self) -> bool {
        // SAFETY: as for `exit_reason`.
        unsafe { addr_of!((*self.run()).request_interrupt_window).read_volatile() != 0 }
    }

    /// Whether an interrupt could be injected when the vCPU last stopped.
    pub(crate) fn ready_for_interrupt(&self) -> bool {
        // SAFETY: as for `exit_reason`.
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
    /// The ring was found full: the kernel may have gone on past its end and be further than `next`.
    overrun: bool,
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
        Ok(DirtyRing { mapping, entries, next: 0, overrun: false })
    }

    /// Hands every new entry to `each` as slot and page offset in the slot. Duplicates are to be expected. Returns whether every entry
    /// was new: then others may have been lost.
    ///
    /// A kernel stops the vCPU some entries before that. One that emulates the guest's instructions has been seen (Linux 6.18, `kvm_pvm`) to make
    /// several writes between two looks at the ring, and to write over entries that were never collected.
    pub(crate) fn collect(&mut self, mut each: impl FnMut(u32, u64)) -> bool {
        if self.overrun {
            self.catch_up();
        }
        let mut left = self.entries;
        // Acquire: the kernel writes slot and offset before the flag.
        while left > 0 && self.flags(self.next).load(Ordering::Acquire) == DIRTY {
            let entry = self.entry(self.next);
            // SAFETY: inside the mapping; the kernel does not touch an entry that is marked dirty.
            let (slot, offset) = unsafe {
                (addr_of!((*entry).slot).read_volatile(), addr_of!((*entry).offset).read_volatile())
            };
            each(slot, offset);
            // Release: we have read it before the kernel may fill it again.
            self.flags(self.next).store(RESET, Ordering::Release);
            self.next = (self.next + 1) % self.entries;
            left -= 1;
        }
        self.overrun |= left == 0;
        left == 0
    }

    /// Goes on where the kernel does after it ran over: past entries it has used twice, which it still waits to be given back.
    fn catch_up(&mut self) {
        let dirty = |ahead: &u32| {
            self.flags((self.next + ahead) % self.entries).load(Ordering::Acquire) == DIRTY
        };
        if let Some(ahead) = (0..self.entries).find(dirty) {
            for skipped in 0..ahead {
                self.flags((self.next + skipped) % self.entries).store(RESET, Ordering::Release);
            }
            self.next = (self.next + ahead) % self.entries;
            self.overrun = false;
        }
    }

    fn entry(&self, index: u32) -> *mut kvm_dirty_gfn {
        // SAFETY: the remainder is below the number of entries that were mapped.
        unsafe {
            self.mapping.start.as_ptr().cast::<kvm_dirty_gfn>().add((index % self.entries) as usize)
        }
    }

    fn flags(&self, index: u32) -> &AtomicU32 {
        // SAFETY: an aligned `u32` in the mapping, which the borrow keeps, and which both sides reach atomically.
        unsafe { AtomicU32::from_ptr(addr_of_mut!((*self.entry(index)).flags)) }
    }
}
