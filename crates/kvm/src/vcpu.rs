//! A vCPU: the run loop and what other threads can do to it.

use std::io;
use std::sync::Arc;

use keel_hypervisor::{
    Bus, CpuState, Cpuid, Debug, DebugStop, Exit, Failure, Kick, Result, Settled, StateAccess,
    Vcpu, Width, units,
};
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_UNKNOWN, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, KVM_INTERNAL_ERROR_EMULATION,
    kvm_debug_exit_arch, kvm_guest_debug, kvm_guest_debug_arch,
};
use kvm_ioctls::VcpuFd;

use crate::error::{Error, Tried};
use crate::kick::Shared;
use crate::sys::{MemoryAccess, PortAccess, RunPage};
use crate::vm::Machine;
use crate::{cpuid, state, sys};

/// One vCPU of a [`KvmVm`](crate::KvmVm).
pub struct KvmVcpu {
    core: Core,
    /// The last exit was an access whose end is still to be written back by the next `KVM_RUN`.
    in_flight: bool,
}

/// What state is taken from and given to. Apart from the vCPU so that only [`Vcpu::settle`] lends it.
struct Core {
    fd: VcpuFd,
    id: u32,
    shared: Arc<Shared>,
    /// Keeps the guest's memory mapped as long as the vCPU can run.
    machine: Arc<Machine>,
}

/// What one `KVM_RUN` led to, if not to I/O.
enum Step {
    /// Nothing to decide.
    Again,
    /// The kernel was told not to enter the guest, or a signal came.
    Interrupted,
    /// The machine must decide.
    Exit(Exit),
}

impl KvmVcpu {
    pub(crate) fn new(fd: VcpuFd, id: u32, machine: Arc<Machine>) -> crate::Result<Self> {
        let page = sys::RunPage::new(&fd).map_err(|source| Error::Ioctl {
            ioctl: "mmap",
            on: format!("vCPU {id}"),
            source,
        })?;
        Ok(KvmVcpu { core: Core { fd, id, shared: Shared::new(page), machine }, in_flight: false })
    }

    /// Sets the signals that are blocked while guest code runs, a bit a signal (bit 0 for signal 1). The signal that kicks need
    /// (`SIGRTMIN`) must not be among them.
    pub fn set_signal_mask(&mut self, blocked: u64) -> crate::Result<()> {
        sys::set_signal_mask(&self.core.fd, blocked).map_err(|source| Error::Ioctl {
            ioctl: "KVM_SET_SIGNAL_MASK",
            on: self.core.name(),
            source,
        })
    }

    /// One `KVM_RUN`, and the I/O it ended with. Returns nothing if there was I/O, whose end now is in flight.
    #[inline(always)]
    fn step(&mut self, bus: &mut dyn Bus) -> Option<Result<Step>> {
        let page = &self.core.shared.page;
        let entered = page.enter(&self.core.fd);
        if entered.is_ok() {
            // Not a `match`: what comes often is asked for first, with no jump through a table.
            let reason = page.exit_reason();
            if reason == KVM_EXIT_IO {
                if let Some(access) = page.port_access() {
                    do_port_access(page, &access, bus);
                    self.in_flight = true;
                    return None;
                }
            } else if reason == KVM_EXIT_MMIO {
                do_memory_access(page, bus);
                self.in_flight = true;
                return None;
            }
        }
        Some(self.other_step(entered, bus))
    }

    /// What a `KVM_RUN` led to that was not I/O.
    #[cold]
    fn other_step(&mut self, entered: io::Result<()>, bus: &mut dyn Bus) -> Result<Step> {
        self.in_flight = false;
        let page = &self.core.shared.page;
        let reason = page.exit_reason();
        if let Err(source) = entered {
            return match source.raw_os_error() {
                Some(libc::EINTR) => Ok(Step::Interrupted),
                // An application processor that has not been started: the kernel has waited for it, and wants to be asked again.
                Some(libc::EAGAIN) => Ok(Step::Again),
                // The only exit that comes with an error; with any other error the reason is an old one.
                Some(libc::EFAULT | libc::EHWPOISON) if reason == KVM_EXIT_MEMORY_FAULT => {
                    let (gpa, size) = page.memory_fault();
                    Ok(Step::Exit(Exit::Failed(Failure::Memory { gpa, size })))
                }
                _ => Err(Error::Ioctl { ioctl: "KVM_RUN", on: self.core.name(), source }.into()),
            };
        }
        Ok(Step::Exit(match reason {
            KVM_EXIT_INTR => return Ok(Step::Interrupted),
            KVM_EXIT_IOAPIC_EOI => {
                bus.end_of_interrupt(page.ended_vector());
                return Ok(Step::Again);
            }
            KVM_EXIT_HLT => Exit::Halted,
            KVM_EXIT_SHUTDOWN => Exit::TripleFault,
            KVM_EXIT_IRQ_WINDOW_OPEN => {
                page.request_interrupt_window(false);
                Exit::InterruptWindow
            }
            KVM_EXIT_DEBUG => {
                let kvm_debug_exit_arch { pc, exception, dr6, dr7, .. } = page.debug();
                Exit::Debug(DebugStop { pc, exception, dr6, dr7 })
            }
            KVM_EXIT_DIRTY_RING_FULL => Exit::DirtyRingFull,
            KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent(page.system_event()),
            KVM_EXIT_FAIL_ENTRY => {
                let (reason, cpu) = page.failed_entry();
                Exit::Failed(Failure::Entry { reason, cpu })
            }
            KVM_EXIT_INTERNAL_ERROR => Exit::Failed(match page.internal_suberror() {
                KVM_INTERNAL_ERROR_EMULATION => Failure::Emulation,
                code => Failure::Internal(code),
            }),
            KVM_EXIT_UNKNOWN => Exit::Failed(Failure::Unknown(page.hardware_exit_reason() as u32)),
            KVM_EXIT_IO => {
                let on = self.core.name();
                return Err(Error::Invalid(format!(
                    "the kernel gave {on} a port access of a size there is not"
                ))
                .into());
            }
            reason => Exit::Failed(Failure::Unknown(reason)),
        }))
    }

    fn run_until_exit(&mut self, bus: &mut dyn Bus) -> Result<Exit> {
        loop {
            match self.step(bus) {
                None => {}
                Some(step) => match step? {
                    Step::Again => {}
                    Step::Interrupted => {
                        self.core.shared.take_kicks();
                        return Ok(Exit::Kicked);
                    }
                    Step::Exit(exit) => return Ok(exit),
                },
            }
        }
    }
}

/// Does the access of an `IN`, an `OUT`, or a string instruction of them.
#[inline]
fn do_port_access(page: &RunPage, access: &PortAccess, bus: &mut dyn Bus) {
    for unit in 0..access.units {
        if access.read {
            let value = bus.pio_read(access.port, access.width);
            page.set_port_data(access, unit, value);
        } else {
            bus.pio_write(access.port, access.width, page.port_data(access, unit));
        }
    }
}

#[inline]
fn do_memory_access(page: &RunPage, bus: &mut dyn Bus) {
    let MemoryAccess { gpa, write, len, value } = page.memory_access();
    match Width::from_bytes(len) {
        Some(width) if write => bus.mmio_write(gpa, width, value & width.mask()),
        Some(width) => page.set_memory_data(bus.mmio_read(gpa, width)),
        None => do_odd_memory_access(page, bus),
    }
}

/// A part of an access that crosses a page can have any length.
#[cold]
fn do_odd_memory_access(page: &RunPage, bus: &mut dyn Bus) {
    let MemoryAccess { gpa, write, len, mut value } = page.memory_access();
    // No more than there is data for.
    for (offset, width) in units(gpa, len.min(8)) {
        let at = gpa.wrapping_add(offset);
        if write {
            bus.mmio_write(at, width, value >> (8 * offset) & width.mask());
        } else {
            let mask = width.mask() << (8 * offset);
            value = value & !mask | bus.mmio_read(at, width) << (8 * offset) & mask;
        }
    }
    if !write {
        page.set_memory_data(value);
    }
}

impl Vcpu for KvmVcpu {
    fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<()> {
        let cpuid = cpuid::to_kvm(cpuid)?;
        Ok(self.core.fd.set_cpuid2(&cpuid).tried("KVM_SET_CPUID2", || self.core.name())?)
    }

    fn run(&mut self, bus: &mut dyn Bus) -> Result<Exit> {
        self.core.shared.enter();
        let exit = self.run_until_exit(bus);
        self.core.shared.leave();
        exit
    }

    fn settle(&mut self, bus: &mut dyn Bus) -> Result<Settled<'_>> {
        if self.in_flight {
            let shared = self.core.shared.clone();
            // An access over a page's end, or a string instruction, may need several rounds of I/O until the kernel gets to look
            // at the flag.
            shared.without_entering(|| {
                while self.in_flight {
                    self.step(bus).transpose()?;
                }
                Ok::<_, keel_hypervisor::Error>(())
            })?;
        }
        Ok(Settled::new(&mut self.core))
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.core.shared.clone()
    }

    fn set_debug(&mut self, debug: &Debug) -> Result<()> {
        let mut wanted = kvm_guest_debug::default();
        let mut flags = 0;
        if debug.single_step {
            flags |= KVM_GUESTDBG_SINGLESTEP;
        }
        if debug.software_breakpoints {
            flags |= KVM_GUESTDBG_USE_SW_BP;
        }
        let mut arch = kvm_guest_debug_arch::default();
        for (index, address) in debug.hardware_breakpoints.iter().enumerate() {
            if let Some(address) = address {
                flags |= KVM_GUESTDBG_USE_HW_BP;
                arch.debugreg[index] = *address;
                // Global enable; type and length 0: on execution (SDM volume 3, 18.2.4). Bit 10 reads as one.
                arch.debugreg[7] |= 1 << 10 | 2 << (2 * index);
            }
        }
        if flags != 0 {
            wanted.control = KVM_GUESTDBG_ENABLE | flags;
            wanted.arch = arch;
        }
        Ok(self
            .core
            .fd
            .set_guest_debug(&wanted)
            .tried("KVM_SET_GUEST_DEBUG", || self.core.name())?)
    }

    fn inject(&mut self, vector: u8) -> Result<bool> {
        let page = &self.core.shared.page;
        if !page.ready_for_interrupt() {
            page.request_interrupt_window(true);
            return Ok(false);
        }
        sys::interrupt(&self.core.fd, vector).map_err(|source| Error::Ioctl {
            ioctl: "KVM_INTERRUPT",
            on: self.core.name(),
            source,
        })?;
        Ok(true)
    }

    fn inject_nmi(&mut self) -> Result<()> {
        Ok(self.core.fd.nmi().tried("KVM_NMI", || self.core.name())?)
    }

    fn notify_paused(&mut self) -> Result<()> {
        match self.core.fd.kvmclock_ctrl() {
            // The guest does not use the clock.
            Err(error) if error.errno() == libc::EINVAL => Ok(()),
            result => Ok(result.tried("KVM_KVMCLOCK_CTRL", || self.core.name())?),
        }
    }
}

impl Core {
    fn name(&self) -> String {
        format!("vCPU {}", self.id)
    }
}

impl StateAccess for Core {
    fn save(&self) -> Result<CpuState> {
        let mut state = state::save_cpu(&self.fd, self.id, &self.machine.state)?;
        state.interrupt_window = self.shared.page.interrupt_window_requested();
        Ok(state)
    }

    fn load(&mut self, state: &CpuState) -> Result<()> {
        state::load_cpu(&self.fd, self.id, &self.machine.state, state)?;
        // Where the local APIC is not in the kernel these two live in the shared page.
        self.shared.page.set_cr8(state.control.cr8);
        self.shared.page.request_interrupt_window(state.interrupt_window);
        Ok(())
    }

    fn translate(&self, linear: u64) -> Result<Option<u64>> {
        let found = self.fd.translate_gva(linear).tried("KVM_TRANSLATE", || self.name())?;
        Ok((found.valid != 0).then_some(found.physical_address))
    }
}
