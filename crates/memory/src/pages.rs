//! Reading guest RAM page by page, those that were never touched not at all.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

use crate::layout::PAGE_SIZE;
use crate::{Error, Region, sys};

/// Pages looked at, and read, at once.
const BATCH: u64 = 256;

/// Whether all bytes are zero.
pub fn is_zero(page: &[u8]) -> bool {
    // As much at a time as the compiler turns into a few vector instructions.
    let (blocks, rest) = page.as_chunks::<128>();
    blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// Calls `each` with every page that is not all zeroes, by frame number, in ascending order.
pub(crate) fn for_each<E: From<Error>>(
    region: &Region,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let first = region.start_addr().0;
    let touched = Touched::new(region);
    let mut buffer = vec![0; (BATCH * PAGE_SIZE) as usize];
    let mut done = 0;
    while let Some((start, map)) = touched.batch(done) {
        done = start + map.len() as u64 * PAGE_SIZE;
        let mut at = start;
        for run in map.chunk_by(|a, b| a == b) {
            let len = run.len() as u64 * PAGE_SIZE;
            if run[0] {
                let bytes = &mut buffer[..len as usize];
                region
                    .read_slice(bytes, MemoryRegionAddress(at))
                    .map_err(|source| Error::Read { gpa: first + at, len, source })?;
                for (gfn, page) in
                    ((first + at) / PAGE_SIZE..).zip(bytes.chunks(PAGE_SIZE as usize))
                {
                    if !is_zero(page) {
                        each(gfn, page)?;
                    }
                }
            }
            at += len;
        }
    }
    Ok(())
}

/// Which pages of a region may hold anything but zeroes, as the kernel has it. A page that is not known to be empty counts as touched.
///
/// It matters: to read a page that is not there costs a page fault, and a table entry that stays.
struct Touched<'a> {
    region: &'a Region,
    source: Source<'a>,
}

enum Source<'a> {
    /// Anonymous memory: this process's page map, see proc_pid_pagemap(5).
    PageMap(File),
    /// A shared file: its holes.
    Holes {
        file: &'a File,
        start: u64,
    },
    Unknown,
}

impl<'a> Touched<'a> {
    fn new(region: &'a Region) -> Self {
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let source = match GuestMemoryRegion::file_offset(region) {
            Some(at) if shared => Source::Holes { file: at.file(), start: at.start() },
            // A page of a private file is either's.
            Some(_) => Source::Unknown,
            None => File::open("/proc/self/pagemap").map_or(Source::Unknown, Source::PageMap),
        };
        Touched { region, source }
    }

    /// For the next few pages from offset `from` on, at or after which nothing but zeroes is left out: where they begin, and whether
    /// each may hold anything.
    fn batch(&self, from: u64) -> Option<(u64, Vec<bool>)> {
        let len = self.region.len();
        let start = match &self.source {
            Source::Holes { file, start } => match sys::next_data(file, start + from) {
                Ok(Some(data)) => (data - start) / PAGE_SIZE * PAGE_SIZE,
                Ok(None) => return None,
                Err(_) => from,
            },
            _ => from,
        };
        let pages = (len.checked_sub(start)? / PAGE_SIZE).min(BATCH);
        if pages == 0 {
            return None;
        }
        let map = match &self.source {
            Source::PageMap(file) => self.page_map(file, start, pages),
            _ => None,
        };
        Some((start, map.unwrap_or_else(|| vec![true; pages as usize])))
    }

    fn page_map(&self, file: &File, start: u64, pages: u64) -> Option<Vec<bool>> {
        /// In memory, or swapped.
        const TOUCHED: u64 = 0b11 << 62;
        let page = (self.region.as_ptr() as u64 + start) / PAGE_SIZE;
        let mut entries = vec![0; pages as usize * size_of::<u64>()];
        file.read_exact_at(&mut entries, page * size_of::<u64>() as u64).ok()?;
        let (entries, _) = entries.as_chunks();
        Some(entries.iter().map(|entry| u64::from_ne_bytes(*entry) & TOUCHED != 0).collect())
    }
}
