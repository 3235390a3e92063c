//! One virtual machine: its memory slots, interrupts and the state that belongs to no single vCPU.

use std::sync::Arc;

use keel_memory::{PageSet, Region};
use vmm_sys_util::eventfd::EventFd;

use crate::{Result, Vcpu, VmState, Width};

/// One virtual machine. All calls may come from any thread.
pub trait Vm: Send + Sync {
    /// Creates the vCPU with this APIC ID (x86). Each ID once.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>>;

    /// Maps host memory into the guest. The VM keeps the region alive until it is unmapped or the VM is gone.
    fn map(&self, slot: MemorySlot) -> Result<()>;

    /// Takes a slot's memory away from the guest.
    fn unmap(&self, slot: u32) -> Result<()>;

    /// Switches the log of pages the guest writes on or off for one slot.
    fn set_dirty_log(&self, slot: u32, on: bool) -> Result<()>;

    /// Adds the pages the guest has written since the last call to `into`, by guest frame number, and starts over.
    ///
    /// With a dirty ring the vCPUs' rings are emptied whatever the slot; the vCPUs should be kicked before, or pages
    /// just written may come with the next call.
    fn collect_dirty(&self, slot: u32, into: &mut PageSet) -> Result<()>;

    /// Sets the level of an interrupt line by its global system interrupt number.
    fn set_line(&self, gsi: u32, high: bool) -> Result<()>;

    /// Delivers a message-signalled interrupt.
    fn signal_msi(&self, msi: Msi) -> Result<()>;

    /// Replaces the whole table of where interrupts raised by `irqfd` and lines go.
    fn set_routes(&self, routes: &[Route]) -> Result<()>;

    /// Raises `gsi` whenever `event` is written, without leaving the kernel. With `resample`, the line is level
    /// triggered: it is lowered and `resample` written when the guest ends the interrupt.
    fn attach_irqfd(&self, event: &EventFd, gsi: u32, resample: Option<&EventFd>) -> Result<()>;

    /// Undoes [`attach_irqfd`](Vm::attach_irqfd).
    fn detach_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()>;

    /// Writes `event` whenever the guest makes this access, without leaving the kernel.
    fn attach_ioevent(&self, event: &EventFd, doorbell: Doorbell) -> Result<()>;

    /// Undoes [`attach_ioevent`](Vm::attach_ioevent).
    fn detach_ioevent(&self, event: &EventFd, doorbell: Doorbell) -> Result<()>;

    /// Takes the state that belongs to no single vCPU. All vCPUs must be stopped and settled.
    fn save(&self) -> Result<VmState>;

    /// Gives it. Must come before the vCPUs' own states are loaded.
    fn load(&self, state: &VmState) -> Result<()>;

    /// The guest's paravirtual clock, in nanoseconds since the VM was created. Stop it by reading it, and start it again
    /// from there by [`set_clock`](Vm::set_clock).
    fn clock(&self) -> Result<u64>;

    /// Sets the guest's paravirtual clock, in nanoseconds.
    fn set_clock(&self, ns: u64) -> Result<()>;

    /// The backend's own counters of this VM, by name.
    fn statistics(&self) -> Result<Vec<Statistic>>;
}

/// Host memory at a place in the guest's physical address space.
#[derive(Clone, Debug)]
pub struct MemorySlot {
    /// The slot's number. Mapping a number again replaces what was there.
    pub index: u32,
    /// The memory, which knows its own guest physical address and length.
    pub region: Arc<Region>,
    /// Guest writes go to the [`Bus`](crate::Bus) instead (ROM, flash).
    pub read_only: bool,
    /// Keep a log of the pages the guest writes.
    pub log_dirty: bool,
}

/// Which interrupt controllers the backend provides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interrupts {
    /// Local APICs, I/O APIC and the two PICs in the backend.
    #[default]
    Kernel,
    /// Local APICs in the backend, the rest in user space.
    Split,
    /// None: all in user space.
    User,
}

/// A message-signalled interrupt (PCI Local Bus Specification 3.0, 6.8.1; Intel SDM volume 3, 11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Msi {
    /// The address the message is written to: 0xfee0_0000 and destination bits on x86.
    pub address: u64,
    /// The message: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// Where one global system interrupt goes. A number may stand in the table several times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The global system interrupt number.
    pub gsi: u32,
    /// Its target.
    pub target: Target,
}

/// The target of a [`Route`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A pin, 0 to 7, of the first PIC.
    PicMaster(u8),
    /// A pin, 0 to 7, of the second PIC.
    PicSlave(u8),
    /// A pin, 0 to 23, of the I/O APIC.
    IoApic(u8),
    /// A message.
    Msi(Msi),
}

impl Route {
    /// The routes of a PC's 16 ISA interrupts and the I/O APIC's other pins: what a backend starts with.
    ///
    /// The timer's interrupt 0 is wired to I/O APIC pin 2, as the MADT's override says.
    pub fn pc() -> Vec<Route> {
        let pic = (0..16u8).filter(|irq| *irq != 2).map(|irq| Route {
            gsi: u32::from(irq),
            target: if irq < 8 { Target::PicMaster(irq) } else { Target::PicSlave(irq - 8) },
        });
        let ioapic = (0..24u8).filter(|pin| *pin != 2).map(|gsi| Route {
            gsi: u32::from(gsi),
            target: Target::IoApic(if gsi == 0 { 2 } else { gsi }),
        });
        pic.chain(ioapic).collect()
    }
}

/// An access that is turned into an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Doorbell {
    /// The port or guest physical address.
    pub at: DoorbellAddress,
    /// Only this value of this width; any write if `None`.
    pub matching: Option<(Width, u64)>,
}

/// Where a [`Doorbell`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DoorbellAddress {
    /// A port.
    Pio(u16),
    /// A guest physical address.
    Mmio(u64),
}

/// One of the backend's counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statistic {
    /// The backend's own name of it.
    pub name: String,
    /// Its value, or the buckets of a histogram.
    pub values: Vec<u64>,
}
