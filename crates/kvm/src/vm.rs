//! A virtual machine: memory slots, interrupts, doorbells, the clock.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use keel_hypervisor::{
    Doorbell, DoorbellAddress, Interrupts, MemorySlot, Msi, Result, Route, Statistic, Target, Vcpu,
    Vm, VmState, Width,
};
use keel_memory::PageSet;
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_EXCEPTION_PAYLOAD,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting,
    kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm as KvmFd, NoDatamatch, VmFd};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Tried};
use crate::{KvmVcpu, state, stats, sys};

/// Where the kernel keeps the task state segment it needs for real mode on older Intel CPUs: 3 pages that must be no RAM and no device.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Where it keeps the page table it needs for the same: the page before.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// The pages of a dirty ring are of this size, as all pages of an x86 host.
const PAGE_SIZE: usize = 4096;
/// Pins of the I/O APIC.
const IOAPIC_PINS: u64 = 24;

/// How a VM is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmConfig {
    /// Which interrupt controllers the kernel provides.
    pub interrupts: Interrupts,
    /// How pages written by the guest are tracked.
    pub dirty_tracking: DirtyTracking,
}

/// How pages written by the guest are tracked, for slots that ask for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyTracking {
    /// A bitmap, fetched and cleared at once.
    #[default]
    Log,
    /// A bitmap that is cleared, and its pages protected again, by a call of its own and in part
    /// ([`KvmVm::clear_dirty`]); what [`Vm::collect_dirty`] finds it clears.
    ManualLog,
    /// A ring of this many entries per vCPU, a power of two. The kernel takes 1024 to 65536.
    Ring {
        /// The number of entries.
        entries: u32,
    },
}

/// A virtual machine under KVM.
pub struct KvmVm(Arc<Machine>);

/// What a VM and its vCPUs share.
pub(crate) struct Machine {
    pub(crate) state: state::Context,
    config: VmConfig,
    vcpus: Mutex<Vcpus>,
    /// The file comes before the memory, so that it is closed before anything is unmapped.
    fd: VmFd,
    slots: Mutex<BTreeMap<u32, MemorySlot>>,
}

/// What the VM keeps of its vCPUs.
#[derive(Default)]
struct Vcpus {
    rings: Vec<sys::DirtyRing>,
    /// Where KVM has them.
    stats: Vec<(u32, File)>,
    /// Pages found in rings while another slot was asked for, by slot and offset in pages.
    found: BTreeMap<u32, PageSet>,
}

impl KvmVm {
    pub(crate) fn new(kvm: &KvmFd, config: VmConfig) -> crate::Result<Self> {
        let fd = kvm.create_vm().tried("KVM_CREATE_VM", || "/dev/kvm".into())?;
        let vm = || "the VM".to_owned();
        // What Intel hosts without "unrestricted guest" need; must come before the first vCPU.
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).tried("KVM_SET_IDENTITY_MAP_ADDR", vm)?;
        fd.set_tss_address(TSS_ADDRESS).tried("KVM_SET_TSS_ADDR", vm)?;
        // These let saved states tell a pending exception from one being delivered, and 32-bit APIC IDs. Without them a VM works, so a kernel that
        // lacks one is no error.
        for (capability, argument) in [
            (KVM_CAP_EXCEPTION_PAYLOAD, 1),
            (KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1),
            (
                KVM_CAP_X2APIC_API,
                KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
            ),
        ] {
            if fd.check_extension_raw(capability.into()) > 0 {
                enable(&fd, capability, argument.into())?;
            }
        }
        match config.interrupts {
            Interrupts::Kernel => {
                fd.create_irq_chip().tried("KVM_CREATE_IRQCHIP", vm)?;
                let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
                fd.create_pit2(pit).tried("KVM_CREATE_PIT2", vm)?;
            }
            Interrupts::Split => enable(&fd, KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS)?,
            Interrupts::User => {}
        }
        match config.dirty_tracking {
            DirtyTracking::Log => {}
            DirtyTracking::ManualLog => {
                enable(
                    &fd,
                    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into(),
                )?;
            }
            DirtyTracking::Ring { entries } => {
                let capability = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
                    .into_iter()
                    .find(|capability| fd.check_extension_raw((*capability).into()) > 0)
                    .ok_or(Error::Capability("KVM_CAP_DIRTY_LOG_RING"))?;
                let bytes =
                    u64::from(entries) * std::mem::size_of::<kvm_bindings::kvm_dirty_gfn>() as u64;
                enable(&fd, capability, bytes)?;
            }
        }
        let state = state::Context::new(kvm, &fd, config.interrupts)?;
        Ok(KvmVm(Arc::new(Machine {
            state,
            config,
            vcpus: Mutex::default(),
            fd,
            slots: Mutex::default(),
        })))
    }

    /// Creates a vCPU as [`Vm::create_vcpu`] does, with what only KVM's have ([`KvmVcpu::set_signal_mask`]).
    pub fn create_kvm_vcpu(&self, id: u32) -> crate::Result<KvmVcpu> {
        let fd =
            self.0.fd.create_vcpu(id.into()).tried("KVM_CREATE_VCPU", || format!("vCPU {id}"))?;
        let mut vcpus = lock(&self.0.vcpus);
        if let DirtyTracking::Ring { entries } = self.0.config.dirty_tracking {
            let ring = sys::DirtyRing::new(&fd, entries, PAGE_SIZE).map_err(|source| {
                Error::Ioctl { ioctl: "mmap", on: format!("the dirty ring of vCPU {id}"), source }
            })?;
            vcpus.rings.push(ring);
        }
        // Absent before Linux 5.14; `statistics` then has nothing of this vCPU.
        if let Ok(file) = sys::stats_file(&fd) {
            vcpus.stats.push((id, file));
        }
        KvmVcpu::new(fd, id, self.0.clone())
    }

    /// With [`DirtyTracking::ManualLog`]: clears and write-protects again those pages of a slot whose bit is set.
    ///
    /// `first_page` counts from the slot's start and must be a multiple of 64; so must `pages`, unless it reaches the end of the slot.
    pub fn clear_dirty(
        &self,
        slot: u32,
        first_page: u64,
        pages: u32,
        bitmap: &[u64],
    ) -> crate::Result<()> {
        sys::clear_dirty_log(&self.0.fd, slot, first_page, pages, bitmap).map_err(|source| {
            Error::Ioctl {
                ioctl: "KVM_CLEAR_DIRTY_LOG",
                on: format!("{pages} pages from page {first_page} on of memory slot {slot}"),
                source,
            }
        })
    }

    /// Raises the dirty pages of a slot without clearing them, with [`DirtyTracking::ManualLog`]; a bit a page from the slot's start.
    pub fn peek_dirty(&self, slot: u32) -> crate::Result<Vec<u64>> {
        let slots = lock(&self.0.slots);
        let known = slots.get(&slot).ok_or_else(|| no_slot(slot))?;
        self.0.dirty_bitmap(known)
    }

    /// Pages found in rings belong to what the slot was, not to what it will be.
    fn forget_found(&self, slot: u32) {
        lock(&self.0.vcpus).found.remove(&slot);
    }

    fn set_slot(&self, slot: &MemorySlot) -> crate::Result<()> {
        let mut flags = 0;
        if slot.read_only {
            flags |= KVM_MEM_READONLY;
        }
        if slot.log_dirty {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        self.0.set_region(slot, slot.region.len(), flags)
    }
}

impl Machine {
    /// Sets a slot to its region with this size; 0 takes it away.
    #[allow(unsafe_code, reason = "hands host memory to the guest")]
    fn set_region(&self, slot: &MemorySlot, size: u64, flags: u32) -> crate::Result<()> {
        let mapping: &GuestRegionMmap<_> = &slot.region;
        let region = kvm_userspace_memory_region {
            slot: slot.index,
            flags,
            guest_phys_addr: slot.region.start_addr().0,
            memory_size: size,
            userspace_addr: mapping.as_ptr() as u64,
        };
        // SAFETY: `size` bytes from `userspace_addr` on are mapped for as long as the region lives, and `slots` keeps it alive until the slot
        // is taken away or neither the VM nor a vCPU is left to run. Guest memory is reached through volatile accesses only.
        unsafe { self.fd.set_user_memory_region(region) }
            .tried("KVM_SET_USER_MEMORY_REGION", || name_of(slot))
    }

    fn dirty_bitmap(&self, slot: &MemorySlot) -> crate::Result<Vec<u64>> {
        let pages = slot.region.len().div_ceil(PAGE_SIZE as u64);
        let mut bitmap = vec![0; pages.div_ceil(64) as usize];
        sys::get_dirty_log(&self.fd, slot.index, &mut bitmap).map_err(|source| Error::Ioctl {
            ioctl: "KVM_GET_DIRTY_LOG",
            on: name_of(slot),
            source,
        })?;
        Ok(bitmap)
    }

    /// Empties all rings; the pages of `slot` come out, those of others are kept for when they are asked for.
    fn collect_rings(&self, slot: &MemorySlot, into: &mut PageSet) -> crate::Result<()> {
        let slots = lock(&self.slots);
        let mut vcpus = lock(&self.vcpus);
        let Vcpus { rings, found, .. } = &mut *vcpus;
        let mut lost = false;
        for ring in rings.iter_mut() {
            lost |= ring.collect(|index, offset| {
                // A slot number carries the address space in its upper half; there is one only.
                if let Some(slot) = slots.get(&(index & 0xffff))
                    && offset < slot.region.len() / PAGE_SIZE as u64
                {
                    found.entry(slot.index).or_default().insert(first_gfn(slot) + offset);
                }
            });
        }
        if lost {
            // Nobody knows which pages were lost: all that are tracked count as written.
            for slot in slots.values().filter(|slot| slot.log_dirty) {
                let pages = slot.region.len() / PAGE_SIZE as u64;
                found.entry(slot.index).or_default().insert_range(first_gfn(slot), pages);
            }
        }
        sys::reset_dirty_rings(&self.fd).map_err(|source| Error::Ioctl {
            ioctl: "KVM_RESET_DIRTY_RINGS",
            on: "the VM".into(),
            source,
        })?;
        if let Some(pages) = found.remove(&slot.index) {
            into.union(&pages);
        }
        Ok(())
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(self.create_kvm_vcpu(id)?))
    }

    fn map(&self, slot: MemorySlot) -> Result<()> {
        let mut slots = lock(&self.0.slots);
        // KVM can not change a slot's memory in place.
        let old = slots.get(&slot.index);
        if let Some(old) = old {
            self.0.set_region(old, 0, 0)?;
        }
        if let Err(error) = self.set_slot(&slot) {
            // What was there goes back: a map that fails changes nothing.
            if let Some(old) = old {
                self.set_slot(old)?;
            }
            return Err(error.into());
        }
        self.forget_found(slot.index);
        slots.insert(slot.index, slot);
        Ok(())
    }

    fn unmap(&self, slot: u32) -> Result<()> {
        let mut slots = lock(&self.0.slots);
        let old = slots.get(&slot).ok_or_else(|| no_slot(slot))?;
        self.0.set_region(old, 0, 0)?;
        self.forget_found(slot);
        slots.remove(&slot);
        Ok(())
    }

    fn set_dirty_log(&self, slot: u32, on: bool) -> Result<()> {
        let mut slots = lock(&self.0.slots);
        let slot = slots.get_mut(&slot).ok_or_else(|| no_slot(slot))?;
        let changed = MemorySlot { log_dirty: on, ..slot.clone() };
        self.set_slot(&changed)?;
        *slot = changed;
        Ok(())
    }

    fn collect_dirty(&self, slot: u32, into: &mut PageSet) -> Result<()> {
        let slot = lock(&self.0.slots).get(&slot).ok_or_else(|| no_slot(slot))?.clone();
        match self.0.config.dirty_tracking {
            DirtyTracking::Log => into.insert_words(first_gfn(&slot), &self.0.dirty_bitmap(&slot)?),
            DirtyTracking::ManualLog => {
                let bitmap = self.0.dirty_bitmap(&slot)?;
                // Pages are protected again before their contents are looked at, so that no later write is lost.
                let pages = slot.region.len().div_ceil(PAGE_SIZE as u64);
                for (chunk, words) in bitmap.chunks(CLEAR_WORDS).enumerate() {
                    let first = (chunk * CLEAR_WORDS * 64) as u64;
                    if words.iter().any(|word| *word != 0) {
                        let count = (words.len() as u64 * 64).min(pages - first);
                        self.clear_dirty(slot.index, first, count as u32, words)?;
                    }
                }
                into.insert_words(first_gfn(&slot), &bitmap);
            }
            DirtyTracking::Ring { .. } => self.0.collect_rings(&slot, into)?,
        }
        Ok(())
    }

    fn set_line(&self, gsi: u32, high: bool) -> Result<()> {
        Ok(self.0.fd.set_irq_line(gsi, high).tried("KVM_IRQ_LINE", || format!("GSI {gsi}"))?)
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // Zero says that the guest had the interrupt blocked: it is lost, as on hardware.
        self.0
            .fd
            .signal_msi(message)
            .tried("KVM_SIGNAL_MSI", || format!("message {:#x} to {:#x}", msi.data, msi.address))?;
        Ok(())
    }

    fn set_routes(&self, routes: &[Route]) -> Result<()> {
        let entries: Vec<_> = routes.iter().map(route_to_kvm).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| {
            Error::Invalid(format!("{} interrupt routes are more than KVM takes", entries.len()))
        })?;
        Ok(self
            .0
            .fd
            .set_gsi_routing(&table)
            .tried("KVM_SET_GSI_ROUTING", || format!("{} routes", entries.len()))?)
    }

    fn attach_irqfd(&self, event: &EventFd, gsi: u32, resample: Option<&EventFd>) -> Result<()> {
        let attached = match resample {
            None => self.0.fd.register_irqfd(event, gsi),
            Some(resample) => self.0.fd.register_irqfd_with_resample(event, resample, gsi),
        };
        Ok(attached.tried("KVM_IRQFD", || format!("GSI {gsi}"))?)
    }

    fn detach_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        Ok(self
            .0
            .fd
            .unregister_irqfd(event, gsi)
            .tried("KVM_IRQFD", || format!("GSI {gsi}, to detach it"))?)
    }

    fn attach_ioevent(&self, event: &EventFd, doorbell: Doorbell) -> Result<()> {
        let at = ioevent_address(doorbell.at);
        let fd = &self.0.fd;
        let attached = match doorbell.matching {
            None => fd.register_ioevent(event, &at, NoDatamatch),
            Some((Width::Byte, value)) => fd.register_ioevent(event, &at, value as u8),
            Some((Width::Word, value)) => fd.register_ioevent(event, &at, value as u16),
            Some((Width::Dword, value)) => fd.register_ioevent(event, &at, value as u32),
            Some((Width::Qword, value)) => fd.register_ioevent(event, &at, value),
        };
        Ok(attached.tried("KVM_IOEVENTFD", || format!("{doorbell:x?}"))?)
    }

    fn detach_ioevent(&self, event: &EventFd, doorbell: Doorbell) -> Result<()> {
        let at = ioevent_address(doorbell.at);
        let fd = &self.0.fd;
        let detached = match doorbell.matching {
            None => fd.unregister_ioevent(event, &at, NoDatamatch),
            Some((Width::Byte, value)) => fd.unregister_ioevent(event, &at, value as u8),
            Some((Width::Word, value)) => fd.unregister_ioevent(event, &at, value as u16),
            Some((Width::Dword, value)) => fd.unregister_ioevent(event, &at, value as u32),
            Some((Width::Qword, value)) => fd.unregister_ioevent(event, &at, value),
        };
        Ok(detached.tried("KVM_IOEVENTFD", || format!("{doorbell:x?}, to detach it"))?)
    }

    fn save(&self) -> Result<VmState> {
        state::save_vm(&self.0.fd, &self.0.state)
    }

    fn load(&self, state: &VmState) -> Result<()> {
        state::load_vm(&self.0.fd, &self.0.state, state)
    }

    fn clock(&self) -> Result<u64> {
        Ok(self.0.fd.get_clock().tried("KVM_GET_CLOCK", || "the VM".into())?.clock)
    }

    fn set_clock(&self, ns: u64) -> Result<()> {
        let clock = kvm_clock_data { clock: ns, ..Default::default() };
        Ok(self.0.fd.set_clock(&clock).tried("KVM_SET_CLOCK", || "the VM".into())?)
    }

    fn statistics(&self) -> Result<Vec<Statistic>> {
        let failed = |of: String| {
            move |source| {
                keel_hypervisor::Error::from(Error::Ioctl {
                    ioctl: "KVM_GET_STATS_FD",
                    on: of,
                    source,
                })
            }
        };
        let file = sys::stats_file(&self.0.fd).map_err(failed("the VM".into()))?;
        let mut all = stats::read(&file).map_err(failed("the VM".into()))?;
        for (id, file) in &lock(&self.0.vcpus).stats {
            let of_vcpu = stats::read(file).map_err(failed(format!("vCPU {id}")))?;
            all.extend(
                of_vcpu
                    .into_iter()
                    .map(|one| Statistic { name: format!("cpu{id}.{}", one.name), ..one }),
            );
        }
        Ok(all)
    }
}

/// How much of a bitmap is cleared by one call: 2^15 words are 8 GiB of guest RAM.
const CLEAR_WORDS: usize = 1 << 15;

fn ioevent_address(at: DoorbellAddress) -> IoEventAddress {
    match at {
        DoorbellAddress::Pio(port) => IoEventAddress::Pio(port.into()),
        DoorbellAddress::Mmio(gpa) => IoEventAddress::Mmio(gpa),
    }
}

fn route_to_kvm(route: &Route) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: route.gsi, ..Default::default() };
    let (irqchip, pin) = match route.target {
        Target::Msi(msi) => {
            entry.type_ = KVM_IRQ_ROUTING_MSI;
            entry.u.msi.address_lo = msi.address as u32;
            entry.u.msi.address_hi = (msi.address >> 32) as u32;
            entry.u.msi.data = msi.data;
            return entry;
        }
        Target::PicMaster(pin) => (KVM_IRQCHIP_PIC_MASTER, pin),
        Target::PicSlave(pin) => (KVM_IRQCHIP_PIC_SLAVE, pin),
        Target::IoApic(pin) => (KVM_IRQCHIP_IOAPIC, pin),
    };
    entry.type_ = KVM_IRQ_ROUTING_IRQCHIP;
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin.into();
    entry
}

fn enable(fd: &VmFd, capability: u32, argument: u64) -> crate::Result<()> {
    let cap = kvm_enable_cap { cap: capability, args: [argument, 0, 0, 0], ..Default::default() };
    fd.enable_cap(&cap)
        .tried("KVM_ENABLE_CAP", || format!("capability {capability} with {argument:#x}"))
}

fn first_gfn(slot: &MemorySlot) -> u64 {
    slot.region.start_addr().0 / PAGE_SIZE as u64
}

fn name_of(slot: &MemorySlot) -> String {
    let (start, kib) = (slot.region.start_addr().0, slot.region.len() / 1024);
    format!("memory slot {} ({kib} KiB at {start:#x})", slot.index)
}

fn no_slot(slot: u32) -> Error {
    Error::Invalid(format!("there is no memory slot {slot}"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
