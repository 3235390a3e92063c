//! What is behind guest RAM: files, flags, advice.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion};

use crate::error::Size;
use crate::layout::{self, Range};
use crate::{DirtyBitmap, Error, RamConfig, Region, sys};

/// What is behind guest RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Anonymous private memory, as an ordinary process has it: it can be swapped.
    #[default]
    Anonymous,
    /// Anonymous memory that another process can be given by a file descriptor (memfd).
    Shared,
    /// The same of huge pages of this many bytes (2 MiB or 1 GiB), from the host's pool.
    HugeTlb(u64),
    /// A file, made or extended as needed; or a directory, in which a file without a name is made. On hugetlbfs this gives huge
    /// pages. [`RamConfig::share`] says whether the file gets what the guest writes.
    Path(PathBuf),
}

impl Backing {
    /// The file behind `size` bytes of RAM, with its page size if those are huge; or nothing for anonymous memory.
    fn open(&self, size: u64) -> Result<Option<(File, Option<u64>)>, Error> {
        let failed = |call, advice| {
            move |source| {
                let path = match self {
                    Backing::Path(path) => path.clone(),
                    other => other.to_string().into(),
                };
                Error::File { call, path, size, advice, source }
            }
        };
        let file = match self {
            Backing::Anonymous => return Ok(None),
            Backing::Shared => sys::memfd(c"keel-ram", None).map_err(failed("memfd_create", ""))?,
            Backing::HugeTlb(page) => {
                // The kernel is told a power of two.
                let made = match page.is_power_of_two() {
                    true => sys::memfd(c"keel-ram", Some(page.trailing_zeros())),
                    false => Err(io::ErrorKind::InvalidInput.into()),
                };
                let advice = ": the sizes this host has are in /sys/kernel/mm/hugepages";
                made.map_err(failed("memfd_create", advice))?
            }
            Backing::Path(path) if path.is_dir() => tempfile::tempfile_in(path)
                .map_err(failed("open of a file without a name in", ""))?,
            Backing::Path(path) => OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .map_err(failed("open", ""))?,
        };
        let page = sys::huge_page_size(&file).map_err(failed("fstatfs", ""))?;
        for range in layout::ranges(size)? {
            if let Some(page) = page.filter(|page| !range.len.is_multiple_of(*page)) {
                let backing = self.to_string();
                return Err(Error::HugePages { gpa: range.start, size: range.len, page, backing });
            }
        }
        // A larger file is left as it is: its beginning is used.
        if file.metadata().map_err(failed("fstat", ""))?.len() < size {
            file.set_len(size).map_err(failed("ftruncate", ""))?;
        }
        Ok(Some((file, page)))
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backing::Anonymous => f.write_str("anonymous memory"),
            Backing::Shared => f.write_str("shared memory"),
            Backing::HugeTlb(page) => write!(f, "huge pages of {}", Size(*page)),
            Backing::Path(path) => path.display().fmt(f),
        }
    }
}

/// The regions of RAM as `config` has it, in ascending order.
pub(crate) fn map(config: &RamConfig) -> Result<Vec<Arc<Region>>, Error> {
    let ranges = layout::ranges(config.size)?;
    let (file, huge) = config.backing.open(config.size)?.unzip();
    let (file, huge) = (file.map(Arc::new), huge.flatten());
    let mut offset = 0;
    let mut regions = Vec::with_capacity(ranges.len());
    for range in ranges {
        let at = file.clone().map(|file| FileOffset::from_arc(file, offset));
        regions.push(Arc::new(map_range(range, at, huge, config)?));
        offset += range.len;
    }
    Ok(regions)
}

fn map_range(
    range: Range,
    file: Option<FileOffset>,
    huge: Option<u64>,
    config: &RamConfig,
) -> Result<Region, Error> {
    let private = match config.backing {
        Backing::Anonymous => true,
        Backing::Path(_) => !config.share,
        Backing::Shared | Backing::HugeTlb(_) => false,
    };
    let mut flags = if private { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
    if file.is_none() {
        flags |= libc::MAP_ANONYMOUS;
    }
    if huge.is_none() {
        // Nothing is set aside for pages that may never be touched: guests are given more than they use. Huge pages are: one that
        // is missing when the guest touches it would kill the process.
        flags |= libc::MAP_NORESERVE;
    }
    let len = range.len as usize;
    let mut builder =
        MmapRegionBuilder::new_with_bitmap(len, <DirtyBitmap as NewBitmap>::with_len(len))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_hugetlbfs(huge.is_some());
    if let Some(at) = file {
        builder = builder.with_file_offset(at);
    }
    let mapping = builder.build().map_err(|error| {
        let source = match error {
            MmapRegionError::Mmap(source) => source,
            other => io::Error::other(other),
        };
        let advice = match huge {
            _ if source.raw_os_error() != Some(libc::ENOMEM) => String::new(),
            Some(page) => format!(
                ": it takes {} free pages in /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
                range.len / page,
                page >> 10
            ),
            None => ": give the guest less, or see vm.overcommit_memory and `ulimit -v`".into(),
        };
        failed("mmap", range.len, config, advice)(source)
    })?;
    let region = Region::new(mapping, GuestAddress(range.start)).ok_or(Error::Size(config.size))?;
    advise(&region, config)?;
    Ok(region)
}

fn advise(region: &Region, config: &RamConfig) -> Result<(), Error> {
    let advise = |call, advice, hint: &str| {
        sys::advise(region, advice).map_err(failed(call, region.len(), config, hint.into()))
    };
    // A child of this process has no use for the guest's memory, and would make every page be copied.
    advise("madvise(MADV_DONTFORK)", libc::MADV_DONTFORK, "")?;
    if !config.dump {
        advise("madvise(MADV_DONTDUMP)", libc::MADV_DONTDUMP, "")?;
    }
    if config.merge {
        advise("madvise(MADV_MERGEABLE)", libc::MADV_MERGEABLE, ": has this kernel KSM?")?;
    }
    let thp = ": has this kernel transparent huge pages?";
    match config.huge_pages {
        Some(true) => advise("madvise(MADV_HUGEPAGE)", libc::MADV_HUGEPAGE, thp)?,
        Some(false) => advise("madvise(MADV_NOHUGEPAGE)", libc::MADV_NOHUGEPAGE, thp)?,
        None => {}
    }
    if config.prealloc {
        match sys::advise(region, libc::MADV_POPULATE_WRITE) {
            // Not known before Linux 5.14.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => sys::touch(region),
            result => result.map_err(failed(
                "madvise(MADV_POPULATE_WRITE)",
                region.len(),
                config,
                ": is there as much free memory, or room in the file system?".into(),
            ))?,
        }
    }
    Ok(())
}

fn failed(
    call: &'static str,
    size: u64,
    config: &RamConfig,
    advice: String,
) -> impl FnOnce(io::Error) -> Error {
    let backing = config.backing.to_string();
    move |source| Error::Call { call, size, backing, advice, source }
}
