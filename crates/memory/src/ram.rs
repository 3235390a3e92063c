//! Guest RAM.

use std::fmt;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::PAGE_SIZE;
use crate::{Backing, Error, Memory, OwnWrites, PageSet, Region, backing, dirty, pages};

/// What guest RAM is to be.
#[derive(Clone, Debug)]
pub struct RamConfig {
    /// Its size in bytes, a multiple of 4 KiB.
    pub size: u64,
    /// What is behind it.
    pub backing: Backing,
    /// Have all pages before the guest starts, instead of each when it is first touched. What they hold stays.
    pub prealloc: bool,
    /// Let the host share equal pages (KSM, `MADV_MERGEABLE`).
    pub merge: bool,
    /// Transparent huge pages: wanted, not wanted, or as the host's setting has it.
    pub huge_pages: Option<bool>,
    /// With [`Backing::Path`]: write to the file what the guest writes. If not, the file is only what RAM holds at first.
    pub share: bool,
    /// Have it in a core dump of this process.
    pub dump: bool,
}

impl RamConfig {
    /// Anonymous memory of `size` bytes, and otherwise as QEMU has it by default: no page before it is touched, none merged, private,
    /// in core dumps.
    pub fn new(size: u64) -> Self {
        RamConfig {
            size,
            backing: Backing::Anonymous,
            prealloc: false,
            merge: false,
            huge_pages: None,
            share: false,
            dump: true,
        }
    }
}

/// All RAM of a guest.
///
/// Never locked in memory. `Debug` shows where it is, not what is in it. A child of this process does not have it (`MADV_DONTFORK`):
/// a process that forks to the background does so first.
pub struct GuestRam {
    memory: Memory,
    regions: Vec<Arc<Region>>,
    size: u64,
}

impl GuestRam {
    /// Maps RAM as `config` has it, laid out as [`layout::ranges`](crate::layout::ranges) says.
    ///
    /// # Errors
    ///
    /// A size that can not be, a backing the host can not give, a file that can not be made.
    pub fn new(config: &RamConfig) -> Result<Self, Error> {
        let regions = backing::map(config)?;
        let memory = Memory::from_arc_regions(regions.clone())?;
        Ok(GuestRam { memory, regions, size: config.size })
    }

    /// The RAM as `vm-memory` sees it.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Its regions in ascending order. A region's backing file, if it has one, is `region.file_offset()`: all have the same file, at
    /// ascending offsets from 0.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds the pages this process has written through `vm-memory` since they were last taken, here or by [`Self::own_writes`].
    ///
    /// What is written past `vm-memory`, through a pointer, is here only if the writer marks it in the region's bitmap.
    pub fn take_own_writes(&self, into: &mut PageSet) {
        dirty::take_own_writes(&self.regions, into);
    }

    /// The same as a source for a [`DirtyTracker`](crate::DirtyTracker). Whoever takes a page takes it from all: have one taker.
    pub fn own_writes(&self) -> OwnWrites {
        OwnWrites::new(self.regions.clone())
    }

    /// Calls `each` with every page that is not all zeroes, by frame number, in ascending order. `each` may end it with an error.
    ///
    /// Each page is a copy. Pages that the guest and this process never touched are not read, where the kernel can tell.
    pub fn for_each_page<E: From<Error>>(
        &self,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.regions.iter().try_for_each(|region| pages::for_each(region, &mut each))
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

#[cfg(test)]
#[path = "ram_tests.rs"]
mod tests;
