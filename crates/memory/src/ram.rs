//! Guest RAM and what is behind it.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::sync::Arc;

use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use crate::layout::{self, PAGE_SIZE};
use crate::{Error, Memory, OwnWrites, PageSet, Region, sys};

/// What guest RAM is to be.
#[derive(Clone, Debug)]
pub struct RamConfig {
    /// Its size in bytes, a multiple of 4 KiB.
    pub size: u64,
    /// What is behind it.
    pub backing: Backing,
    /// Have all pages before the guest starts, instead of each when it is first touched.
    pub prealloc: bool,
    /// Let the host share equal pages (KSM).
    pub merge: bool,
    /// Transparent huge pages: wanted, not wanted, or as the host's setting has it.
    pub huge_pages: Option<bool>,
}

impl RamConfig {
    /// Anonymous memory of `size` bytes, and otherwise as the host does it by default.
    pub fn new(size: u64) -> Self {
        RamConfig {
            size,
            backing: Backing::Anonymous,
            prealloc: false,
            merge: false,
            huge_pages: None,
        }
    }
}

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
    /// A file; or a directory, in which a file without a name is made. On hugetlbfs this gives huge pages.
    Path(PathBuf),
}

/// All RAM of a guest.
///
/// Never locked in memory. `Debug` shows where it is, not what is in it.
pub struct GuestRam {
    memory: Memory,
    regions: Vec<Arc<Region>>,
    size: u64,
}

impl GuestRam {
    /// Maps RAM as `config` has it, laid out as [`layout::ranges`] says.
    ///
    /// # Errors
    ///
    /// A size that can not be, a backing the host can not give, a file that can not be made.
    pub fn new(config: &RamConfig) -> Result<Self, Error> {
        let ranges = layout::ranges(config.size)?;
        let file = config.backing.open(config.size)?;
        let page = match &file {
            Some(file) => sys::huge_page_size(file).ok().flatten(),
            None => None,
        };
        let mut offset = 0;
        let mut regions = Vec::with_capacity(ranges.len());
        for range in ranges {
            if let Some(page) = page.filter(|page| !range.len.is_multiple_of(*page)) {
                return Err(Error::HugePages { gpa: range.start, size: range.len, page });
            }
            let at = match &file {
                None => None,
                Some(file) => Some(FileOffset::new(config.backing.dup(file)?, offset)),
            };
            regions.push(Arc::new(map(range, at, page.is_some(), config)?));
            offset += range.len;
        }
        for region in &regions {
            config.advise(region)?;
        }
        let memory = Memory::from_arc_regions(regions.clone())?;
        Ok(GuestRam { memory, regions, size: config.size })
    }

    /// The RAM as `vm-memory` sees it.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Its regions in ascending order. A region's backing file, if it has one, is `region.file_offset()`.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The pages this process has written since the last call, through `vm-memory`: a source for a
    /// [`DirtyTracker`](crate::DirtyTracker).
    pub fn own_writes(&self) -> OwnWrites {
        OwnWrites::new(self.regions.clone())
    }

    /// Calls `each` with every page that is not all zeroes, by frame number, in ascending order. `each` may end it with an error.
    ///
    /// Pages that were never touched are read, and so may come to be backed by the host's page of zeroes; none is allocated.
    pub fn for_each_page<E: From<Error>>(
        &self,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        /// Pages read at once.
        const BATCH: u64 = 64;
        let mut buffer = vec![0; (BATCH * PAGE_SIZE) as usize];
        for region in &self.regions {
            let first = region.start_addr().0;
            let mut done = 0;
            while done < region.len() {
                let len = (region.len() - done).min(BATCH * PAGE_SIZE);
                let batch = &mut buffer[..len as usize];
                region
                    .read_slice(batch, MemoryRegionAddress(done))
                    .map_err(|source| Error::Read { gpa: first + done, len, source })?;
                for (index, page) in (0..).zip(batch.chunks(PAGE_SIZE as usize)) {
                    if !is_zero(page) {
                        each((first + done) / PAGE_SIZE + index, page)?;
                    }
                }
                done += len;
            }
        }
        Ok(())
    }

    /// Whether a frame is RAM.
    pub fn contains(&self, gfn: u64) -> bool {
        gfn.checked_mul(PAGE_SIZE)
            .is_some_and(|gpa| self.memory.address_in_range(GuestAddress(gpa)))
    }

    /// All frames.
    pub fn frames(&self) -> PageSet {
        let mut set = PageSet::new();
        for region in &self.regions {
            set.insert_range(region.start_addr().0 / PAGE_SIZE, region.len() / PAGE_SIZE);
        }
        set
    }
}

impl fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.regions.iter().map(|region| (region.start_addr().0, region.len()));
        write!(f, "GuestRam(")?;
        f.debug_map().entries(ranges).finish()?;
        write!(f, ")")
    }
}

/// Whether a page is all zeroes.
fn is_zero(page: &[u8]) -> bool {
    // Words of 16 bytes, which the compiler turns into vector instructions.
    let (words, rest) = page.as_chunks::<16>();
    rest.iter().all(|byte| *byte == 0) && words.iter().all(|word| u128::from_ne_bytes(*word) == 0)
}

fn map(
    range: layout::Range,
    file: Option<FileOffset>,
    huge: bool,
    config: &RamConfig,
) -> Result<Region, Error> {
    let len = range.len as usize;
    let bitmap = <_ as NewBitmap>::with_len(len);
    let mut builder = MmapRegionBuilder::new_with_bitmap(len, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_hugetlbfs(huge);
    builder = match file {
        // Nothing is set aside for pages that may never be touched: guests are given more than they use.
        None => {
            builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        }
        // Huge pages are set aside: one that is missing when the guest touches it would kill the process.
        Some(at) if huge => builder.with_mmap_flags(libc::MAP_SHARED).with_file_offset(at),
        Some(at) => {
            builder.with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE).with_file_offset(at)
        }
    };
    let mapping = builder.build().map_err(|source| Error::Map {
        mib: range.len >> 20,
        backing: config.backing.to_string(),
        advice: if huge {
            "; are there enough free pages in /proc/sys/vm/nr_hugepages?"
        } else {
            ""
        },
        source,
    })?;
    // Only a range past the end of the address space has no region, and the layout has none such.
    Region::new(mapping, GuestAddress(range.start)).ok_or(Error::Size(config.size))
}

impl RamConfig {
    fn advise(&self, region: &Region) -> Result<(), Error> {
        let advise = |what, advice| {
            sys::advise(region, advice).map_err(|source| Error::Advise {
                what,
                mib: region.len() >> 20,
                source,
            })
        };
        // A child of this process has no use for the guest's memory, and would make every page be copied.
        advise("keep to this process", libc::MADV_DONTFORK)?;
        if self.merge {
            advise("let the host share equal pages of", libc::MADV_MERGEABLE)?;
        }
        match self.huge_pages {
            Some(true) => advise("use huge pages for", libc::MADV_HUGEPAGE)?,
            Some(false) => advise("use no huge pages for", libc::MADV_NOHUGEPAGE)?,
            None => {}
        }
        if self.prealloc {
            // Since Linux 5.14. It faults pages in for writing and changes nothing in them.
            advise("allocate", libc::MADV_POPULATE_WRITE)?;
        }
        Ok(())
    }
}

impl Backing {
    /// The file behind `size` bytes of RAM, if there is one.
    fn open(&self, size: u64) -> Result<Option<File>, Error> {
        let file = match self {
            Backing::Anonymous => return Ok(None),
            Backing::Shared => sys::memfd("keel-ram", None).map_err(self.failed("make"))?,
            Backing::HugeTlb(page) => {
                sys::memfd("keel-ram", Some(page.trailing_zeros())).map_err(self.failed("make"))?
            }
            Backing::Path(path) if path.is_dir() => {
                tempfile::tempfile_in(path).map_err(self.failed("make a file in"))?
            }
            Backing::Path(path) => {
                let mut options = OpenOptions::new();
                options
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(path)
                    .map_err(self.failed("open"))?
            }
        };
        let is = file.metadata().map_err(self.failed("examine"))?.len();
        // A larger file is left as it is: its beginning is used.
        if is < size {
            file.set_len(size).map_err(self.failed("extend"))?;
        }
        Ok(Some(file))
    }

    fn dup(&self, file: &File) -> Result<File, Error> {
        file.try_clone().map_err(self.failed("share"))
    }

    fn failed(&self, what: &'static str) -> impl Fn(std::io::Error) -> Error + '_ {
        move |source| {
            let path = match self {
                Backing::Path(path) => path.clone(),
                other => other.to_string().into(),
            };
            Error::File { what, path, source }
        }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backing::Anonymous => f.write_str("anonymous memory"),
            Backing::Shared => f.write_str("shared memory"),
            Backing::HugeTlb(page) => write!(f, "huge pages of {} MiB", page >> 20),
            Backing::Path(path) => path.display().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram(backing: Backing) -> Result<GuestRam, Error> {
        GuestRam::new(&RamConfig { backing, ..RamConfig::new(4 << 20) })
    }

    fn works(ram: &GuestRam) {
        let memory = ram.memory();
        memory.write_obj(0x1234_5678_u32, GuestAddress(0x3000)).unwrap();
        assert_eq!(memory.read_obj::<u32>(GuestAddress(0x3000)).unwrap(), 0x1234_5678);
        assert!(memory.read_obj::<u32>(GuestAddress(4 << 20)).is_err());
        let mut pages = Vec::new();
        ram.for_each_page(|gfn, page| {
            pages.push((gfn, page.len()));
            Ok::<_, Error>(())
        })
        .unwrap();
        assert_eq!(pages, [(3, 4096)]);
        assert_eq!(ram.frames().len(), 1024);
        assert!(ram.contains(1023) && !ram.contains(1024) && !ram.contains(u64::MAX));
    }

    #[test]
    fn anonymous_and_shared() {
        works(&ram(Backing::Anonymous).unwrap());
        let shared = ram(Backing::Shared).unwrap();
        works(&shared);
        assert_eq!(
            shared.regions()[0].file_offset().unwrap().file().metadata().unwrap().len(),
            4 << 20
        );
    }

    #[test]
    fn files_and_directories() {
        let directory = tempfile::tempdir().unwrap();
        works(&ram(Backing::Path(directory.path().into())).unwrap());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "no name is left");
        let path = directory.path().join("ram");
        works(&ram(Backing::Path(path.clone())).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4 << 20);
        let error = ram(Backing::Path(directory.path().join("no/such"))).unwrap_err();
        assert!(error.to_string().contains("no/such"), "{error}");
    }

    #[test]
    fn huge_pages_from_the_pool() {
        const POOL: &str = "/proc/sys/vm/nr_hugepages";
        let before = std::fs::read_to_string(POOL).unwrap();
        let grown = std::fs::write(POOL, "8").is_ok();
        let free = std::fs::read_to_string("/proc/meminfo").unwrap();
        let free = free.lines().find(|line| line.starts_with("HugePages_Free")).unwrap();
        let free: u64 = free.split_whitespace().nth(1).unwrap().parse().unwrap();
        let made = ram(Backing::HugeTlb(2 << 20));
        if free >= 2 {
            works(&made.unwrap());
        } else {
            // Without a pool the error says so.
            assert!(made.unwrap_err().to_string().contains("huge pages"));
        }
        let odd = GuestRam::new(&RamConfig {
            backing: Backing::HugeTlb(2 << 20),
            ..RamConfig::new(3 << 20)
        });
        assert!(odd.is_err());
        if grown {
            std::fs::write(POOL, before).unwrap();
        }
    }

    #[test]
    fn preallocated_merged_and_huge() {
        let mut config =
            RamConfig { prealloc: true, huge_pages: Some(false), ..RamConfig::new(4 << 20) };
        config.merge = std::path::Path::new("/sys/kernel/mm/ksm").exists();
        works(&GuestRam::new(&config).unwrap());
    }

    #[test]
    fn debug_shows_no_contents() {
        let ram = ram(Backing::Anonymous).unwrap();
        ram.memory().write_slice(b"secret", GuestAddress(0)).unwrap();
        assert_eq!(format!("{ram:?}"), "GuestRam({0: 4194304})");
    }

    #[test]
    fn paged_out_memory_comes_back_and_none_is_locked() {
        let ram = ram(Backing::Anonymous).unwrap();
        ram.memory().write_slice(&[0x5a; 1 << 20], GuestAddress(1 << 20)).unwrap();
        sys::advise(&ram.regions()[0], libc::MADV_PAGEOUT).unwrap();
        let mut back = vec![0; 1 << 20];
        ram.memory().read_slice(&mut back, GuestAddress(1 << 20)).unwrap();
        assert!(back.iter().all(|byte| *byte == 0x5a));
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(
            status.lines().any(|line| line.starts_with("VmLck:") && line.contains(" 0 kB")),
            "{status}"
        );
    }
}
