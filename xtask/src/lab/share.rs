//! Files in the share: what is to be run in the host, and what the user named on the command line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::host::share;
use super::initrd::{self, Guest};
use super::packages::Package;
use crate::workspace::{build_static, output};

/// Builds the example `boot` without shared libraries and puts it into the host's `PATH`.
pub fn boot() -> Result<()> {
    let built = build_static(&["--example", "boot"], "examples/boot")?;
    copy(&built, "bin/boot")?;
    Ok(())
}

/// Puts a file into the share under `name`, if it is not there as it is, and gives its path in the host.
pub fn copy(file: &Path, name: &str) -> Result<String> {
    let target = share().join(name);
    let said = || format!("copy {} to {}", file.display(), target.display());
    let from = fs::metadata(file).with_context(said)?;
    let same = fs::metadata(&target).is_ok_and(|to| {
        to.len() == from.len()
            && matches!((to.modified(), from.modified()), (Ok(to), Ok(from)) if to >= from)
    });
    if !same {
        fs::create_dir_all(target.parent().unwrap_or(&target)).with_context(said)?;
        // A new file and not new content: an older one may be running in a host.
        let new = target.with_extension("new");
        fs::copy(file, &new).with_context(said)?;
        fs::rename(&new, &target).with_context(said)?;
    }
    Ok(format!("/share/{name}"))
}

/// A Debian kernel in the share: its path in the host.
pub fn kernel(package: Package) -> Result<String> {
    copy(&package.kernel()?, if package == Package::Cloud { "debian-cloud" } else { "debian" })
}

/// A guest's initrd in the share: its path in the host.
pub fn initrd(kind: Guest, kernel: Option<Package>) -> Result<String> {
    let file = initrd::guest(kind, kernel)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    copy(&file, &name)
}

/// Words of a command line for the host: `-kernel debian` and `-initrd test` and the like are replaced by the ready-made
/// files, and every word that names a file here by its copy in the share.
pub fn translate(words: &[String]) -> Result<Vec<String>> {
    let after = |option: &str| {
        let at = words.iter().position(|word| word == option)?;
        words.get(at + 1).map(String::as_str)
    };
    let ready_kernel = match after("-kernel") {
        Some("debian") => Some(Package::Generic),
        Some("debian-cloud") => Some(Package::Cloud),
        _ => None,
    };
    let mut translated = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let option = index.checked_sub(1).map_or("", |before| words[before].as_str());
        translated.push(match (option, word.as_str(), ready_kernel) {
            ("-kernel", _, Some(package)) => kernel(package)?,
            ("-initrd", "test", package) => initrd(Guest::Test, package)?,
            ("-initrd", "busybox", package) => initrd(Guest::Busybox, package)?,
            _ if Path::new(word).is_file() => {
                let path = PathBuf::from(word);
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                copy(&path, &format!("files/{index}-{name}"))?
            }
            _ => word.clone(),
        });
    }
    Ok(translated)
}

/// One word for the host's shell.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Puts QEMU with its libraries and firmware into the share, as `qemu-system-x86_64` in the host's `PATH`: the VMM that ours is
/// compared with.
pub fn qemu() -> Result<()> {
    let folders: Vec<_> = std::env::var_os("PATH").iter().flat_map(std::env::split_paths).collect();
    let binary =
        folders.iter().map(|folder| folder.join("qemu-system-x86_64")).find(|path| path.is_file());
    let binary = binary.context("qemu-system-x86_64 is not in PATH")?;
    copy(&binary, "qemu/qemu-system-x86_64")?;
    // Each line is `name => path (address)`, or `path (address)` for the loader itself.
    let mut loader = None;
    for line in output(Command::new("ldd").arg(&binary))?.lines() {
        let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) else {
            continue;
        };
        let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned();
        copy(Path::new(path), &format!("qemu/lib/{name}"))?;
        if name.starts_with("ld-linux") {
            loader = Some(name);
        }
    }
    let loader = loader.context("ldd names no loader for qemu-system-x86_64")?;
    for name in FIRMWARE {
        let places = ["/usr/share/qemu", "/usr/share/seabios", "/usr/local/share/qemu"];
        match places.iter().map(|folder| Path::new(folder).join(name)).find(|path| path.is_file()) {
            Some(path) => copy(&path, &format!("qemu/firmware/{name}"))?,
            None => {
                bail!("QEMU's firmware {name} is in none of {}: install seabios", places.join(", "))
            }
        };
    }
    let script = share().join("bin/qemu-system-x86_64");
    let text = format!(
        "#!/bin/sh\nexec /share/qemu/lib/{loader} --library-path /share/qemu/lib /share/qemu/qemu-system-x86_64 \
         -L /share/qemu/firmware \"$@\"\n"
    );
    fs::write(&script, text).with_context(|| format!("write {}", script.display()))?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&script, mode)
        .with_context(|| format!("make {} executable", script.display()))
}

/// What `pc` and `microvm` load to boot a kernel.
const FIRMWARE: &[&str] = &[
    "bios-256k.bin",
    "bios-microvm.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "pvh.bin",
    "qboot.rom",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_word_is_one_word_to_a_shell() {
        for word in ["plain", "two words", "it's", "$HOME `x` \"q\"", ""] {
            let told =
                output(Command::new("sh").args(["-c", &format!("printf %s {}", quote(word))]))
                    .unwrap();
            assert_eq!(told, word);
        }
    }

    #[test]
    fn only_words_that_name_files_are_translated() {
        let words: Vec<_> = ["-m", "512", "-append", "console=ttyS0"].map(str::to_owned).to_vec();
        assert_eq!(translate(&words).unwrap(), words);
    }
}
