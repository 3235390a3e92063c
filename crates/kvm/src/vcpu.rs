//! A vCPU: the run loop and what other threads can do to it.

use std::io;
use std::sync::Arc;

use keel_hypervisor::{
    Bus, CpuState, Cpuid, Debug, DebugStop, Exit, Failure, Kick, Result, Settled, StateAccess,
    Vcpu, Width, units,
};
use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, KVM_INTERNAL_ERROR_EMULATION, kvm_guest_debug, kvm_guest_debug_arch,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::error::{Error, Tried};
use crate::kick::Shared;
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

/// What one `KVM_RUN` led to.
enum Step {
    /// I/O was done; its end is in flight.
    Io,
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

    /// One `KVM_RUN`, and the I/O it ended with.
    #[inline]
    fn step(&mut self, bus: &mut dyn Bus) -> Result<Step> {
        let Core { fd, shared, id, .. } = &mut self.core;
        let step = match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                match Width::from_bytes(shared.page.io_size().into()) {
                    Some(width) => {
                        for unit in data.chunks_exact(width.bytes() as usize) {
                            bus.pio_write(port, width, load(unit) as u32);
                        }
                    }
                    None => return Err(bad_size(*id, shared)),
                }
                Step::Io
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                match Width::from_bytes(shared.page.io_size().into()) {
                    Some(width) => {
                        for unit in data.chunks_exact_mut(width.bytes() as usize) {
                            store(unit, bus.pio_read(port, width).into());
                        }
                    }
                    None => return Err(bad_size(*id, shared)),
                }
                Step::Io
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                match Width::from_bytes(data.len() as u64) {
                    Some(width) => store(data, bus.mmio_read(gpa, width)),
                    None => {
                        for (offset, width) in units(gpa, data.len() as u64) {
                            let unit = &mut data[offset as usize..][..width.bytes() as usize];
                            store(unit, bus.mmio_read(gpa.wrapping_add(offset), width));
                        }
                    }
                }
                Step::Io
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                match Width::from_bytes(data.len() as u64) {
                    Some(width) => bus.mmio_write(gpa, width, load(data)),
                    None => {
                        for (offset, width) in units(gpa, data.len() as u64) {
                            let unit = &data[offset as usize..][..width.bytes() as usize];
                            bus.mmio_write(gpa.wrapping_add(offset), width, load(unit));
                        }
                    }
                }
                Step::Io
            }
            Ok(VcpuExit::Intr) => Step::Interrupted,
            Ok(VcpuExit::IoapicEoi(vector)) => {
                bus.end_of_interrupt(vector);
                Step::Again
            }
            Ok(VcpuExit::Hlt) => Step::Exit(Exit::Halted),
            Ok(VcpuExit::Shutdown) => Step::Exit(Exit::TripleFault),
            Ok(VcpuExit::IrqWindowOpen) => {
                shared.page.request_interrupt_window(false);
                Step::Exit(Exit::InterruptWindow)
            }
            Ok(VcpuExit::Debug(debug)) => Step::Exit(Exit::Debug(DebugStop {
                pc: debug.pc,
                exception: debug.exception,
                dr6: debug.dr6,
                dr7: debug.dr7,
            })),
            Ok(VcpuExit::SystemEvent(kind, _)) => Step::Exit(Exit::SystemEvent(kind)),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                Step::Exit(Exit::Failed(Failure::Entry { reason, cpu }))
            }
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                Step::Exit(Exit::Failed(Failure::Memory { gpa, size }))
            }
            Ok(VcpuExit::InternalError) => {
                Step::Exit(Exit::Failed(match shared.page.internal_suberror() {
                    KVM_INTERNAL_ERROR_EMULATION => Failure::Emulation,
                    code => Failure::Internal(code),
                }))
            }
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Step::Exit(Exit::DirtyRingFull),
            Ok(VcpuExit::Unsupported(reason)) => Step::Exit(Exit::Failed(Failure::Unknown(reason))),
            Ok(VcpuExit::Unknown) => Step::Exit(Exit::Failed(Failure::Unknown(
                shared.page.hardware_exit_reason() as u32,
            ))),
            Ok(other) => {
                return Err(Error::Invalid(format!(
                    "vCPU {id} stopped for {other:?}, which was never asked for"
                ))
                .into());
            }
            Err(error) => match error.errno() {
                libc::EINTR => Step::Interrupted,
                // An application processor that has not been started: the kernel has waited for it, and wants to be asked again.
                libc::EAGAIN => Step::Again,
                errno => {
                    return Err(Error::Ioctl {
                        ioctl: "KVM_RUN",
                        on: self.core.name(),
                        source: io::Error::from_raw_os_error(errno),
                    }
                    .into());
                }
            },
        };
        self.in_flight = matches!(step, Step::Io);
        Ok(step)
    }

    fn run_until_exit(&mut self, bus: &mut dyn Bus) -> Result<Exit> {
        loop {
            match self.step(bus)? {
                Step::Io | Step::Again => {}
                Step::Interrupted => {
                    self.core.shared.take_kicks();
                    return Ok(Exit::Kicked);
                }
                Step::Exit(exit) => return Ok(exit),
            }
        }
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
                    self.step(bus)?;
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

fn bad_size(id: u32, shared: &Shared) -> keel_hypervisor::Error {
    Error::Invalid(format!(
        "the kernel gave vCPU {id} a port access of {} bytes",
        shared.page.io_size()
    ))
    .into()
}

/// The value of a unit of 1, 2, 4 or 8 bytes, zero-extended.
#[inline]
fn load(unit: &[u8]) -> u64 {
    match *unit {
        [a] => a.into(),
        [a, b] => u16::from_le_bytes([a, b]).into(),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).into(),
        [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => 0,
    }
}

/// Puts the low bytes of a value into a unit.
#[inline]
fn store(unit: &mut [u8], value: u64) {
    let bytes = value.to_le_bytes();
    match unit.len() {
        1 => unit.copy_from_slice(&bytes[..1]),
        2 => unit.copy_from_slice(&bytes[..2]),
        4 => unit.copy_from_slice(&bytes[..4]),
        8 => unit.copy_from_slice(&bytes),
        _ => {}
    }
}
