//! Which pages of a region this process has written.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use crate::layout::PAGE_SIZE;
use crate::sys;

/// A bit for every page of a region, set after each write through `vm-memory`.
///
/// Like [`vm_memory::bitmap::AtomicBitmap`], and for two reasons not that: its words come zeroed from the kernel and cost nothing
/// until a page is marked (32 MiB a TiB otherwise, written before the guest starts), and they are taken without a copy, those
/// without a mark by a plain load.
#[derive(Default)]
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    pages: u64,
}

impl DirtyBitmap {
    /// Takes all marks: `each` is given the words that have any, with the page of their bit 0.
    ///
    /// Each word is taken and cleared in one step, so that a mark made meanwhile is in this call's words or stays for the next.
    pub fn take(&self, mut each: impl FnMut(u64, u64)) {
        for (first, word) in (0..).step_by(64).zip(&self.words) {
            // Relaxed: a mark made before this call is seen by whatever told the caller of it, a later one may wait.
            if word.load(Ordering::Relaxed) != 0 {
                // Acquire: who reads a page afterwards reads at least what was there when it was marked.
                each(first, word.swap(0, Ordering::Acquire));
            }
        }
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let Some(last) = len.checked_sub(1) else { return };
        let mut page = offset as u64 / PAGE_SIZE;
        let end = (offset.saturating_add(last) as u64 / PAGE_SIZE + 1).min(self.pages);
        while page < end {
            let bit = page % 64;
            let count = (end - page).min(64 - bit);
            // Always a locked write, even where the bit is set already: a load could be done before the data is out, just ahead
            // of someone who takes the mark and then reads the old data.
            self.words[(page / 64) as usize]
                .fetch_or((u64::MAX >> (64 - count)) << bit, Ordering::Release);
            page += count;
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE_SIZE;
        page < self.pages
            && self.words[(page / 64) as usize].load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DirtyBitmap {
    fn with_len(len: usize) -> Self {
        let pages = (len as u64).div_ceil(PAGE_SIZE);
        DirtyBitmap { words: sys::zeroed_words(pages.div_ceil(64) as usize), pages }
    }
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirtyBitmap({} pages)", self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::sync::atomic::AtomicBool;

    fn take(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        bitmap.take(|first, word| {
            pages.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| first + bit));
        });
        pages
    }

    proptest! {
        #[test]
        fn as_a_set(len in 1..600_000usize, marks in proptest::collection::vec((0..700_000usize, 0..400_000usize), 0..8)) {
            let bitmap = DirtyBitmap::with_len(len);
            let mut oracle = BTreeSet::new();
            for (offset, count) in marks {
                bitmap.mark_dirty(offset, count);
                if count > 0 {
                    oracle.extend((offset / 4096..=(offset + count - 1) / 4096).take_while(|page| page * 4096 < len).map(|page| page as u64));
                }
            }
            for page in 0..200u64 {
                prop_assert_eq!(bitmap.dirty_at(page as usize * 4096 + 1), oracle.contains(&page));
            }
            prop_assert_eq!(take(&bitmap), oracle);
            prop_assert!(take(&bitmap).is_empty());
        }
    }

    /// Two threads mark, each page only while it has no mark, and a third takes: so each mark is taken exactly once, and one that is
    /// lost is never made up for by the next.
    #[test]
    fn no_mark_is_lost_to_a_concurrent_take() {
        const PAGES: usize = 64;
        let bitmap = DirtyBitmap::with_len(PAGES * 4096);
        let marked = [const { AtomicBool::new(false) }; PAGES];
        let (made, running) = (AtomicU64::new(0), AtomicU64::new(2));
        let mut taken = 0;
        let mut take_all = || {
            bitmap.take(|first, mut word| {
                while word != 0 {
                    let page = first as usize + word.trailing_zeros() as usize;
                    word &= word - 1;
                    assert!(marked[page].swap(false, Ordering::SeqCst), "page {page} made up");
                    taken += 1;
                }
            });
        };
        std::thread::scope(|scope| {
            for step in [1, 7] {
                let (bitmap, marked, made, running) = (&bitmap, &marked, &made, &running);
                scope.spawn(move || {
                    // Bounded twice: where marks are lost, all pages end up waiting for theirs to be taken.
                    for page in (0..20_000_000).map(|n| n * step % PAGES) {
                        if made.load(Ordering::Relaxed) > 300_000 {
                            break;
                        }
                        if !marked[page].swap(true, Ordering::SeqCst) {
                            bitmap.mark_dirty(page * 4096, 1);
                            made.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                    running.fetch_sub(1, Ordering::SeqCst);
                });
            }
            while running.load(Ordering::SeqCst) > 0 {
                take_all();
            }
        });
        take_all();
        assert_eq!(taken, made.into_inner());
        assert!(taken > PAGES as u64, "nothing happened at the same time");
    }

    #[test]
    fn marks_at_the_end_of_all_addresses_are_dropped() {
        let bitmap = DirtyBitmap::with_len(8192);
        bitmap.mark_dirty(usize::MAX, usize::MAX);
        bitmap.mark_dirty(4096, usize::MAX);
        assert_eq!(take(&bitmap), [1].into());
        assert!(!bitmap.dirty_at(usize::MAX));
    }
}
