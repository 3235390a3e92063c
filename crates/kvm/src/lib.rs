//! The KVM backend of [`keel_hypervisor`]: the only crate of Keel with an ioctl.
//!
//! Built on `kvm-ioctls`; what that lacks is added here (`KVM_INTERRUPT`, `KVM_CLEAR_DIRTY_LOG`, dirty rings, the signal mask, the binary
//! statistics, the access size of string I/O). A guest of three instructions:
//!
//! ```no_run
//! use std::sync::Arc;
//! use keel_hypervisor::{Bus, Exit, MemorySlot, Vcpu, Vm, Width};
//! use keel_kvm::{Kvm, VmConfig};
//! use keel_memory::Region;
//! use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
//!
//! struct Print;
//! impl Bus for Print {
//!     fn pio_read(&mut self, _: u16, width: Width) -> u32 { width.mask() as u32 }
//!     fn pio_write(&mut self, port: u16, _: Width, value: u32) { println!("port {port:#x}: {value:#x}"); }
//!     fn mmio_read(&mut self, _: u64, width: Width) -> u64 { width.mask() }
//!     fn mmio_write(&mut self, _: u64, _: Width, _: u64) {}
//!     fn end_of_interrupt(&mut self, _: u8) {}
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vm = Kvm::open()?.create_vm(VmConfig { interrupts: keel_hypervisor::Interrupts::User, ..VmConfig::default() })?;
//! let region = Arc::new(Region::from_range(GuestAddress(0), 4096, None)?);
//! // mov al, 42; out 0x10, al; hlt
//! region.write_slice(&[0xb0, 42, 0xe6, 0x10, 0xf4], MemoryRegionAddress(0))?;
//! vm.map(MemorySlot { index: 0, region, read_only: false, log_dirty: false })?;
//! let mut vcpu = vm.create_vcpu(0)?;
//! let mut state = vcpu.settle(&mut Print)?.save()?;
//! state.segments.cs.base = 0;
//! state.segments.cs.selector = 0;
//! state.registers.rip = 0;
//! vcpu.settle(&mut Print)?.load(&state)?;
//! assert_eq!(vcpu.run(&mut Print)?, Exit::Halted);
//! # Ok(())
//! # }
//! ```
//!
//! # Modules
//!
//! | file | subject |
//! |---|---|
//! | `probe` | what this host can do, and why not |
//! | `vm` | [`KvmVm`]: memory slots, interrupts, doorbells, dirty pages |
//! | `vcpu` | [`KvmVcpu`]: the run loop |
//! | `kick` | stopping a vCPU from any thread |
//! | `state/` | the complete state, both ways |
//! | `cpuid` | `CPUID` both ways |
//! | `stats` | KVM's statistics |
//! | `sys` | the ioctls and mappings themselves |
//! | `error` | [`Error`] |

mod cpuid;
mod error;
mod kick;
pub mod probe;
mod state;
mod stats;
mod sys;
mod vcpu;
mod vm;

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use keel_hypervisor::{Cpuid, CpuidEntry};
use kvm_bindings::{KVM_API_VERSION, KVM_CAP_TSC_DEADLINE_TIMER, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm as KvmFd;

pub use error::{Error, Result};
pub use vcpu::KvmVcpu;
pub use vm::{DirtyTracking, KvmVm, VmConfig};

use error::Tried;

/// Where the kernel offers KVM.
pub const DEVICE: &str = "/dev/kvm";

/// The kernel's offer of virtual machines.
pub struct Kvm(KvmFd);

impl Kvm {
    /// Opens [`DEVICE`]. Where this fails, [`probe`] says why and what to do.
    pub fn open() -> Result<Self> {
        Self::open_at(DEVICE)
    }

    /// Opens the device at another path.
    pub fn open_at(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed = |source| Error::Open { path: path.display().to_string(), source };
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        let kvm = KvmFd::new_with_path(&name)
            .map_err(|error| failed(io::Error::from_raw_os_error(error.errno())))?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(Error::Invalid(format!(
                "{} speaks version {version} of KVM's API; this program speaks {KVM_API_VERSION}, as every kernel since 2.6.22",
                path.display()
            )));
        }
        Ok(Kvm(kvm))
    }

    /// What `CPUID` can answer in a guest here: the processor's features as far as KVM supports them, and KVM's own.
    pub fn supported_cpuid(&self) -> Result<Cpuid> {
        let supported = self
            .0
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .tried("KVM_GET_SUPPORTED_CPUID", || DEVICE.into())?;
        let mut supported = cpuid::from_kvm(&supported);
        // The kernel leaves the local APIC's deadline mode out of the list, for it depends on where the local APIC is.
        if self.0.check_extension_raw(KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0
            && let Some(CpuidEntry { ecx, .. }) = supported.get_mut(1, 0)
        {
            *ecx |= 1 << 24;
        }
        Ok(supported)
    }

    /// The most vCPUs a VM can have here.
    pub fn max_vcpus(&self) -> usize {
        self.0.get_max_vcpus()
    }

    /// Makes a VM.
    pub fn create_vm(&self, config: VmConfig) -> Result<KvmVm> {
        KvmVm::new(&self.0, config)
    }
}
