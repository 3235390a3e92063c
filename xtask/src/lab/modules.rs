//! Kernel modules and what they need: the `depends=` of each module's `.modinfo` section, read from the file itself, so that
//! no `depmod` has to have run.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The modules of one kernel package, by name.
pub struct Modules(HashMap<String, PathBuf>);

/// One module to insert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name as `lsmod` shows it: with underscores.
    pub name: String,
    /// The object file, decompressed.
    pub object: Vec<u8>,
}

impl Modules {
    /// Finds every module under `folder` (a package's `lib/modules`).
    pub fn under(folder: &Path) -> Result<Self> {
        let (mut found, mut folders) = (HashMap::new(), vec![folder.to_path_buf()]);
        while let Some(folder) = folders.pop() {
            for entry in
                fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))?
            {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if let Some((name, _)) =
                    path.file_name().and_then(|name| name.to_str()?.split_once(".ko"))
                {
                    found.insert(name.replace('-', "_"), path);
                }
            }
        }
        Ok(Self(found))
    }

    /// The modules of `wanted` and all they need, each once and after those it needs. A name that the package has no
    /// file for is built into the kernel (or of another kernel): it is left out.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut ordered = Vec::new();
        for name in wanted {
            self.visit(name, &mut ordered, 0)?;
        }
        Ok(ordered)
    }

    fn visit(&self, name: &str, ordered: &mut Vec<Module>, depth: usize) -> Result<()> {
        let name = name.replace('-', "_");
        if depth > 16 {
            bail!("the module {name} needs itself, by way of others");
        }
        if ordered.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let Some(path) = self.0.get(&name) else { return Ok(()) };
        let object = load(path)?;
        let depends =
            depends(&object).with_context(|| format!("read .modinfo of {}", path.display()))?;
        for needed in &depends {
            self.visit(needed, ordered, depth + 1)?;
        }
        ordered.push(Module { name, object });
        Ok(())
    }
}

/// The module's object file. Newer Debian kernels compress theirs.
fn load(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output =
            Command::new("xz").arg("-dc").arg(path).output().context("run xz: install xz-utils")?;
        if !output.status.success() {
            bail!("xz -dc {}: {}", path.display(), String::from_utf8_lossy(&output.stderr).trim());
        }
        return Ok(output.stdout);
    }
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// The names in `depends=` of an object's `.modinfo`.
fn depends(object: &[u8]) -> Result<Vec<String>> {
    let section = section(object, ".modinfo").context("no ELF file with such a section")?;
    let value = section.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
    Ok(names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

/// The bytes of a section of a 64-bit little-endian ELF file (System V ABI, "Sections"); `None` if anything is out of bounds.
fn section<'a>(object: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    let number = |at: usize, size: usize| -> Option<usize> {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(object.get(at..at.checked_add(size)?)?);
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    if !object.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, entry_size) = (number(0x28, 8)?, number(0x3a, 2)?);
    let (count, names_index) = (number(0x3c, 2)?, number(0x3e, 2)?);
    let header = |index: usize| table.checked_add(index.checked_mul(entry_size)?);
    let content = |index: usize| {
        let header = header(index)?;
        let offset = number(header + 0x18, 8)?;
        object.get(offset..offset.checked_add(number(header + 0x20, 8)?)?)
    };
    let names = content(names_index)?;
    (0..count).find_map(|index| {
        let name = names.get(number(header(index)?, 4)?..)?.split(|byte| *byte == 0).next()?;
        (name == wanted.as_bytes()).then(|| content(index))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A least ELF file: a header, the sections' names, `.modinfo`, and the table of the three sections.
    fn object(info: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0";
        let mut file = vec![0; 0x40];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let names_at = file.len();
        file.extend_from_slice(names);
        let info_at = file.len();
        file.extend_from_slice(info);
        let table = file.len();
        for (name, offset, size) in
            [(0, 0, 0), (0, names_at, names.len()), (1, info_at, info.len())]
        {
            let mut header = [0; 0x40];
            header[0] = name;
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        file[0x3a..0x3c].copy_from_slice(&0x40u16.to_le_bytes());
        file[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
        file[0x3e..0x40].copy_from_slice(&1u16.to_le_bytes());
        file
    }

    #[test]
    fn depends_is_read_and_a_cut_file_is_an_error() {
        let file = object(b"license=GPL\0depends=kvm,ccp\0name=kvm_amd\0");
        assert_eq!(depends(&file).unwrap(), ["kvm", "ccp"]);
        assert_eq!(depends(&object(b"depends=\0")).unwrap(), [""; 0]);
        for cut in 0..file.len() {
            let _ = depends(&file[..cut]);
        }
        assert!(depends(&file[..0x80]).is_err());
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let folder = std::env::temp_dir().join(format!("keel-modules-{}", std::process::id()));
        fs::create_dir_all(folder.join("deep")).unwrap();
        for (file, info) in [
            ("9p.ko", "depends=9pnet,fs-cache\0"),
            ("9pnet.ko", "depends=\0"),
            ("deep/fs-cache.ko", "depends=9pnet\0"),
        ] {
            fs::write(folder.join(file), object(info.as_bytes())).unwrap();
        }
        let modules =
            Modules::under(&folder).unwrap().closure(&["built_in", "9p", "9pnet"]).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["9pnet", "fs_cache", "9p"]);
    }
}
