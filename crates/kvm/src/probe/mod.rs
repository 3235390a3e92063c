//! What this host can do for virtual machines, and if it can not, why and what to do about it.
//!
//! ```no_run
//! let report = keel_kvm::probe::Report::probe();
//! println!("{report}");
//! if let Err(advice) = report.usable() {
//!     eprintln!("{advice}");
//! }
//! ```
//!
//! # Modules
//!
//! | file | subject |
//! |---|---|
//! | `mod` | [`Report`]: all of it, and its text |
//! | `host` | [`Host`]: the CPU, the modules, containers; [`Node`]: who may open the device |
//! | `capabilities` | [`Capability`]: what the kernel's KVM has of what this crate uses |
//! | `advice` | [`Advice`]: what is wrong and what to do |

mod advice;
mod capabilities;
mod host;
#[cfg(test)]
mod tests;

use std::ffi::CString;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::Kvm;

pub use advice::Advice;
pub use capabilities::{Capability, Use};
pub use host::{Host, Node};

/// All that was found out about a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The CPU and the kernel's modules.
    pub host: Host,
    /// The device node.
    pub device: Device,
}

/// What came of opening `/dev/kvm`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// There is no such file.
    Absent,
    /// It can not be opened.
    Closed {
        /// The operating system's error number.
        errno: i32,
        /// Who could open it.
        node: Option<Node>,
    },
    /// It opens and is something else.
    Foreign,
    /// It opens and is KVM.
    Open {
        /// `KVM_GET_API_VERSION`. All kernels since 2.6.22 answer 12.
        api_version: i32,
        /// The error number of `KVM_CREATE_VM`, if that failed.
        no_vm: Option<i32>,
        /// What of this crate's needs and wishes is there.
        capabilities: Vec<Capability>,
    },
}

impl Report {
    /// Looks at this host.
    pub fn probe() -> Report {
        Report::probe_at(Path::new("/"))
    }

    /// Looks at a host whose root directory is `root`: `/proc`, `/sys`, `/etc` and `/dev` are looked for in it.
    pub fn probe_at(root: &Path) -> Report {
        Report { host: Host::read(root), device: Device::open(&root.join("dev/kvm")) }
    }

    /// Whether `/dev/kvm` has neither VT-x nor AMD-V behind it: the kernel then runs guests by other means, instruction by
    /// instruction. A small guest runs; a stock Linux does not get through its boot.
    pub fn is_emulated(&self) -> bool {
        matches!(self.device, Device::Open { .. }) && !self.host.has_hardware()
    }

    /// The capabilities found; none if the device does not open.
    pub fn capabilities(&self) -> &[Capability] {
        match &self.device {
            Device::Open { capabilities, .. } => capabilities,
            _ => &[],
        }
    }

    /// Whether virtual machines can be run here.
    ///
    /// # Errors
    ///
    /// What is wrong, and what to do about it.
    pub fn usable(&self) -> Result<(), Advice> {
        Advice::on(self).map_or(Ok(()), Err)
    }

    /// Why KVM can not be used and what to do, as one paragraph; nothing if it can be.
    pub fn why_not(&self) -> Option<String> {
        self.usable().err().map(|advice| advice.to_string())
    }

    /// What one should know although KVM can be used, as one paragraph.
    pub fn caution(&self) -> Option<String> {
        self.is_emulated().then(|| {
            let modules = match self.host.modules.as_slice() {
                [] => String::new(),
                modules => format!(" (modules: {})", modules.join(", ")),
            };
            format!(
                "/dev/kvm works here, but with neither Intel VT-x nor AMD-V behind it{modules}: the kernel emulates each \
                 instruction. Small guests run, at microseconds an instruction; a stock Linux will not get through \
                 its boot. This is not a matter of BIOS settings: to boot one, use a host with hardware virtualization."
            )
        })
    }
}

impl Device {
    fn open(path: &Path) -> Device {
        let closed = |errno| match errno {
            libc::ENOENT | libc::ENOTDIR => Device::Absent,
            errno => Device::Closed { errno, node: Node::read(path) },
        };
        // A path with a zero byte in it names no file.
        let Ok(name) = CString::new(path.as_os_str().as_bytes()) else { return Device::Absent };
        let kvm = match Kvm::new_with_path(name) {
            Ok(kvm) => kvm,
            Err(error) => return closed(error.errno()),
        };
        let api_version = kvm.get_api_version();
        if api_version < 0 {
            return Device::Foreign;
        }
        // Asked at creation and not before: whether another hypervisor has the CPU's virtualization to itself.
        let no_vm = kvm.create_vm().err().map(|error| error.errno());
        let capabilities = capabilities::check(|number| kvm.check_extension_raw(number.into()));
        Device::Open { api_version, no_vm, capabilities }
    }
}

/// The doctor's text.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.host.fmt(f)?;
        match &self.device {
            Device::Absent => writeln!(f, "/dev/kvm       not there")?,
            Device::Closed { errno, node } => {
                write!(
                    f,
                    "/dev/kvm       can not be opened: {}",
                    std::io::Error::from_raw_os_error(*errno)
                )?;
                match node {
                    Some(node) => writeln!(f, "; {node}")?,
                    None => writeln!(f)?,
                }
            }
            Device::Foreign => writeln!(f, "/dev/kvm       opens, but is not KVM")?,
            Device::Open { api_version, no_vm, capabilities } => {
                write!(f, "/dev/kvm       opens; API version {api_version}")?;
                if *api_version != KVM_API_VERSION as i32 {
                    write!(f, " (not {KVM_API_VERSION})")?;
                }
                match no_vm {
                    None => writeln!(f, "; creates a VM")?,
                    Some(errno) => {
                        writeln!(
                            f,
                            "; creates no VM: {}",
                            std::io::Error::from_raw_os_error(*errno)
                        )?;
                    }
                }
                writeln!(f, "\nCapabilities:")?;
                for capability in capabilities {
                    writeln!(f, "  {capability}")?;
                }
                writeln!(f)?;
            }
        }
        match self.usable() {
            Ok(()) => writeln!(f, "Result: virtual machines can be run here.")?,
            Err(advice) => {
                writeln!(f, "Result: virtual machines can not be run here: {}.", advice.problem)?;
                for step in &advice.steps {
                    writeln!(f, "  * {step}.")?;
                }
            }
        }
        match self.caution() {
            Some(caution) => writeln!(f, "Caution: {caution}"),
            None => Ok(()),
        }
    }
}
