//! What the lab is made of: Debian's two kernels with their modules, a static busybox, and QEMU 10 or later.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt;
use crate::workspace::{lab, output};

/// The first QEMU whose emulation of several CPUs does not hang.
const QEMU_MAJOR: u32 = 10;

/// What is taken out of Debian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Package {
    /// `linux-image-amd64`: the kernel for any machine. It is also the lab host's own.
    Generic,
    /// `linux-image-cloud-amd64`: the kernel with drivers for virtual machines only.
    Cloud,
    /// `busybox-static`.
    Busybox,
}

impl Package {
    fn folder(self) -> &'static str {
        match self {
            Self::Generic => "generic",
            Self::Cloud => "cloud",
            Self::Busybox => "busybox",
        }
    }

    /// Whether `file` is this package's.
    fn owns(self, file: &str) -> bool {
        let kernel = file.starts_with("linux-image-") && !file.contains("-dbg");
        let cloud = file.contains("cloud");
        file.ends_with("_amd64.deb")
            && match self {
                Self::Generic => kernel && !cloud,
                Self::Cloud => kernel && cloud,
                Self::Busybox => file.starts_with("busybox-static_"),
            }
    }

    /// The name of the package that has the content: a kernel's has its version in it.
    fn resolve(self) -> Result<String> {
        match self {
            Self::Generic => apt::dependency("linux-image-amd64", "linux-image-"),
            Self::Cloud => apt::dependency("linux-image-cloud-amd64", "linux-image-"),
            Self::Busybox => Ok("busybox-static".into()),
        }
    }

    /// The folder that the package is extracted to, once [`fetch`] has been done.
    pub fn root(self) -> PathBuf {
        lab().join("root").join(self.folder())
    }

    /// The kernel image of a kernel package.
    pub fn kernel(self) -> Result<PathBuf> {
        let boot = self.root().join("boot");
        let mut files =
            fs::read_dir(&boot).with_context(|| format!("list {}", boot.display()))?.flatten();
        let image = files.find(|file| file.file_name().to_string_lossy().starts_with("vmlinuz-"));
        Ok(image.with_context(|| format!("no vmlinuz-… in {}", boot.display()))?.path())
    }
}

/// Makes sure that all three packages are there and extracted, and that QEMU is new enough. Says what it does; what is
/// there already costs nothing, and no network.
pub fn fetch() -> Result<()> {
    let debs = lab().join("debs");
    fs::create_dir_all(&debs).with_context(|| format!("make {}", debs.display()))?;
    for package in [Package::Generic, Package::Cloud, Package::Busybox] {
        extract(package, &debs)?;
    }
    qemu()
}

fn extract(package: Package, debs: &Path) -> Result<()> {
    let file = match find(package, debs)? {
        Some(file) => file,
        None if apt::is_there() => {
            apt::download(&package.resolve()?, debs)?;
            find(package, debs)?
                .with_context(|| format!("apt-get download left no file in {}", debs.display()))?
        }
        None => bail!(
            "there is no apt here to fetch packages with: from a Debian mirror, put the files of the packages \
             linux-image-VERSION-amd64, linux-image-VERSION-cloud-amd64 and busybox-static (…_amd64.deb) in {}, and \
             install dpkg",
            debs.display()
        ),
    };
    // The marker is written last: a folder without it is of an extraction that was cut short, or of an older package.
    let (root, marker) = (package.root(), package.root().join(".package"));
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if fs::read_to_string(&marker).is_ok_and(|extracted| extracted == name) {
        return Ok(());
    }
    println!("lab: extracting {name}");
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("remove {}", root.display()))?;
    }
    fs::create_dir_all(&root).with_context(|| format!("make {}", root.display()))?;
    output(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&root))
        .context("extract a package: is dpkg installed?")?;
    fs::write(&marker, name).with_context(|| format!("write {}", marker.display()))
}

fn find(package: Package, debs: &Path) -> Result<Option<PathBuf>> {
    let files = fs::read_dir(debs).with_context(|| format!("list {}", debs.display()))?;
    let mut files: Vec<_> = files.flatten().map(|file| file.path()).collect();
    files.sort();
    Ok(files
        .into_iter()
        .rfind(|file| file.file_name().is_some_and(|name| package.owns(&name.to_string_lossy()))))
}

/// Makes sure of the emulator.
fn qemu() -> Result<()> {
    if version().is_some_and(|major| major >= QEMU_MAJOR) {
        return Ok(());
    }
    let found = match version() {
        Some(major) => format!("QEMU {major} hangs by itself with several CPUs"),
        None => "there is no qemu-system-x86_64".into(),
    };
    println!("lab: {found}; the lab needs QEMU {QEMU_MAJOR} or later");
    if !apt::is_there() {
        bail!(
            "{found}: install qemu-system-x86_64 {QEMU_MAJOR}.0 or later (and qemu-img) and put it in PATH"
        );
    }
    apt::install_from_backports(&["qemu-system-x86", "qemu-utils"])?;
    match version() {
        Some(major) if major >= QEMU_MAJOR => Ok(()),
        _ => bail!("{found}, and installing it did not help: is another one first in PATH?"),
    }
}

fn version() -> Option<u32> {
    let words = output(Command::new("qemu-system-x86_64").arg("--version")).ok()?;
    words.split_once("version ")?.1.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_belongs_to_one_package() {
        for (file, owner) in [
            ("linux-image-6.1.0-1-amd64_6.1-1_amd64.deb", Some(Package::Generic)),
            ("linux-image-6.1.0-1-cloud-amd64_6.1-1_amd64.deb", Some(Package::Cloud)),
            ("busybox-static_1%3a1.35_amd64.deb", Some(Package::Busybox)),
            ("linux-image-6.1.0-1-amd64-dbg_6.1-1_amd64.deb", None),
            ("linux-headers-6.1.0-1-amd64_6.1-1_amd64.deb", None),
            ("busybox-static_1_arm64.deb", None),
        ] {
            let owners = [Package::Generic, Package::Cloud, Package::Busybox];
            let owners: Vec<_> = owners.into_iter().filter(|package| package.owns(file)).collect();
            assert_eq!(owners, Vec::from_iter(owner), "{file}");
        }
    }
}
