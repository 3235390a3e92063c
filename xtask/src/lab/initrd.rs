//! The initrds: the lab host's own, and the guests'. Each is made anew in a fraction of a second.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::modules::{Module, Modules};
use super::packages::Package;
use crate::workspace::{build_static, lab};

/// The host's modules: KVM in the order that is known to work, the share, the agent's channel, swap for the paging test.
const HOST_MODULES: &[&str] = &[
    "irqbypass",
    "kvm",
    "ccp",
    "kvm_amd",
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "zram",
];
/// A guest's: how its kernel says that it panicked.
const GUEST_MODULES: &[&str] = &["pvpanic_mmio", "pvpanic_pci"];

/// What is in a guest's initrd beside the test init.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// The init alone, for tests.
    Test,
    /// A busybox too: the init gives a shell when nothing says otherwise.
    Busybox,
}

/// Makes the lab host's initrd.
pub fn host() -> Result<PathBuf> {
    let modules =
        Modules::under(&Package::Generic.root().join("lib/modules"))?.closure(HOST_MODULES)?;
    write("host.img", true, &modules)
}

/// Makes a guest's initrd for `kernel`, or for a kernel we do not know, whose modules it then has none of.
pub fn guest(kind: Guest, kernel: Option<Package>) -> Result<PathBuf> {
    let modules = match kernel {
        Some(kernel) => {
            Modules::under(&kernel.root().join("lib/modules"))?.closure(GUEST_MODULES)?
        }
        None => Vec::new(),
    };
    let (kind_name, busybox) = match kind {
        Guest::Test => ("test", false),
        Guest::Busybox => ("busybox", true),
    };
    let kernel_name = match kernel {
        Some(Package::Generic) => "debian",
        Some(Package::Cloud) => "debian-cloud",
        _ => "any",
    };
    write(&format!("{kind_name}-{kernel_name}.img"), busybox, &modules)
}

fn write(name: &str, busybox: bool, modules: &[Module]) -> Result<PathBuf> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "tmp", "bin", "modules"] {
        archive.directory(folder);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file(
        "init",
        0o755,
        &read(&build_static(&["--package", "keel-test-init"], "keel-test-init")?)?,
    );
    if busybox {
        archive.file("bin/busybox", 0o755, &read(&Package::Busybox.root().join("bin/busybox"))?);
    }
    let mut load = String::new();
    for module in modules {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.object);
        // A guest hypervisor's guest is not what is tested here, and costs KVM more work at each exit.
        let parameters = if module.name == "kvm_amd" { " nested=0" } else { "" };
        load += &format!("{}.ko{parameters}\n", module.name);
    }
    archive.file("modules/load", 0o644, load.as_bytes());
    let path = lab().join(name);
    fs::write(&path, archive.finish()).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}
