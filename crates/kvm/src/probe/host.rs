//! What `/proc`, `/sys` and the file system say about a host.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The CPU and the kernel's modules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// The CPU's vendor: `GenuineIntel`, `AuthenticAMD`. Empty if `/proc/cpuinfo` does not say.
    pub vendor: String,
    /// Intel VT-x is there and switched on.
    pub vmx: bool,
    /// AMD-V is there and switched on.
    pub svm: bool,
    /// This host is itself a virtual machine.
    pub is_guest: bool,
    /// The process is in a container.
    pub in_container: bool,
    /// The modules of KVM that are loaded or built in, sorted.
    pub modules: Vec<String>,
    /// Whether guests may run guests themselves, if the module says.
    pub nested: Option<bool>,
}

impl Host {
    /// Reads what the host with this root directory says. What can not be read counts as not there.
    pub(super) fn read(root: &Path) -> Host {
        let cpuinfo = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
        let field = |name: &str| {
            cpuinfo
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| key.trim() == name)
                .map_or("", |(_, value)| value.trim())
        };
        let flag = |name: &str| field("flags").split_whitespace().any(|flag| flag == name);
        let mut modules: Vec<String> = fs::read_dir(root.join("sys/module"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name == "kvm" || name.starts_with("kvm_"))
            .collect();
        modules.sort_unstable();
        let nested = ["kvm_intel", "kvm_amd"].iter().find_map(|module| {
            let value =
                fs::read_to_string(root.join("sys/module").join(module).join("parameters/nested"));
            value.ok().map(|value| matches!(value.trim(), "Y" | "y" | "1"))
        });
        // Marks that Docker, Podman and systemd-nspawn leave in a container's root.
        let marks = [".dockerenv", "run/.containerenv", "run/systemd/container"];
        Host {
            vendor: field("vendor_id").to_owned(),
            vmx: flag("vmx"),
            svm: flag("svm"),
            is_guest: flag("hypervisor"),
            in_container: marks.iter().any(|mark| root.join(mark).exists()),
            modules,
            nested,
        }
    }

    /// Whether KVM has hardware virtualization to use: the CPU says so, or a module that needs it is loaded.
    pub fn has_hardware(&self) -> bool {
        self.vmx || self.svm || self.is_loaded("kvm_intel") || self.is_loaded("kvm_amd")
    }

    pub(super) fn is_loaded(&self, module: &str) -> bool {
        self.modules.iter().any(|loaded| loaded == module)
    }

    /// The module that would use this CPU's virtualization, as `modprobe` calls it.
    pub(super) fn module(&self) -> Option<&'static str> {
        match (self.vmx, self.svm) {
            (true, _) => Some("kvm-intel"),
            (_, true) => Some("kvm-amd"),
            _ => None,
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vendor = if self.vendor.is_empty() { "of unknown vendor" } else { &self.vendor };
        let hardware = match (self.vmx, self.svm) {
            (true, _) => "Intel VT-x (vmx)",
            (_, true) => "AMD-V (svm)",
            _ => "neither Intel VT-x (vmx) nor AMD-V (svm)",
        };
        writeln!(f, "CPU            {vendor}: {hardware}")?;
        let place = match (self.is_guest, self.in_container) {
            (true, true) => "a container in a virtual machine",
            (true, false) => "a virtual machine",
            (false, true) => "a container",
            (false, false) => "no virtual machine, no container",
        };
        writeln!(f, "this host is   {place}")?;
        let modules =
            if self.modules.is_empty() { "none".to_owned() } else { self.modules.join(", ") };
        writeln!(f, "KVM modules    {modules}")?;
        match self.nested {
            Some(nested) => writeln!(f, "nested guests  {}", if nested { "yes" } else { "no" }),
            None => Ok(()),
        }
    }
}

/// Whose a device node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its permission bits.
    pub mode: u32,
    /// The user it belongs to.
    pub uid: u32,
    /// The group it belongs to.
    pub gid: u32,
}

impl Node {
    pub(super) fn read(path: &Path) -> Option<Node> {
        let metadata = fs::metadata(path).ok()?;
        Some(Node { mode: metadata.mode() & 0o7777, uid: metadata.uid(), gid: metadata.gid() })
    }

    /// Whether being in its group would be enough.
    pub(super) fn is_open_to_group(&self) -> bool {
        self.mode & 0o060 == 0o060 && self.gid != 0
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mode {:04o}, user {}, group {}", self.mode, self.uid, self.gid)
    }
}
