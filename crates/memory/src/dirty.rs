//! Dirty pages from several sources as one set.

use std::sync::Arc;

use vm_memory::{GuestMemoryRegion, MmapRegion};

use crate::layout::PAGE_SIZE;
use crate::{PageSet, Region};

/// Something that knows which pages were written: a hypervisor's log, this process's own writes, …
///
/// The contract: a page written before `collect` begins and not reported by an earlier one is added; a page written while it runs is
/// added by this one or the next. Pages that were not written may be added, though at a cost.
pub trait DirtySource {
    /// Why it can fail.
    type Error;

    /// Adds the pages written since the last call to `into`, and starts over.
    fn collect(&mut self, into: &mut PageSet) -> Result<(), Self::Error>;
}

impl<E, F: FnMut(&mut PageSet) -> Result<(), E>> DirtySource for F {
    type Error = E;

    fn collect(&mut self, into: &mut PageSet) -> Result<(), E> {
        self(into)
    }
}

/// Unites sources, and keeps what they said until it is taken.
///
/// ```
/// use keel_memory::{DirtyTracker, GuestRam, PageSet, RamConfig};
/// use vm_memory::{Bytes, GuestAddress};
///
/// let ram = GuestRam::new(&RamConfig::new(1 << 20))?;
/// let mut tracker = DirtyTracker::new();
/// let mut own = ram.own_writes();
/// tracker.add(move |into: &mut PageSet| {
///     own.collect(into);
///     Ok::<(), std::io::Error>(())
/// });
/// // and a hypervisor's: tracker.add(|into: &mut PageSet| vm.collect_dirty(0, into));
///
/// ram.memory().write_obj(1_u8, GuestAddress(0x5000))?;
/// assert_eq!(tracker.take()?.iter().collect::<Vec<_>>(), [5]);
/// assert!(tracker.take()?.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DirtyTracker<'a, E> {
    sources: Vec<Box<dyn DirtySource<Error = E> + 'a>>,
    /// Collected and not yet taken: not lost if a later source fails.
    pending: PageSet,
}

impl<'a, E> DirtyTracker<'a, E> {
    /// A tracker without sources.
    pub fn new() -> Self {
        DirtyTracker { sources: Vec::new(), pending: PageSet::new() }
    }

    /// Adds a source.
    pub fn add(&mut self, source: impl DirtySource<Error = E> + 'a) {
        self.sources.push(Box::new(source));
    }

    /// Takes the pages written since the last call. After an error nothing is lost: the next call has it all.
    pub fn take(&mut self) -> Result<PageSet, E> {
        for source in &mut self.sources {
            source.collect(&mut self.pending)?;
        }
        Ok(std::mem::take(&mut self.pending))
    }
}

impl<E> Default for DirtyTracker<'_, E> {
    fn default() -> Self {
        Self::new()
    }
}

/// The pages this process writes through `vm-memory`.
pub struct OwnWrites(Vec<Arc<Region>>);

impl OwnWrites {
    pub(crate) fn new(regions: Vec<Arc<Region>>) -> Self {
        OwnWrites(regions)
    }

    /// Adds the pages written since the last call to `into`, and starts over.
    ///
    /// A write marks its pages after it is done; one that is marked just now is in this set or the next.
    pub fn collect(&mut self, into: &mut PageSet) {
        take_own_writes(&self.0, into);
    }
}

/// Moves the marks of all regions into `into`.
pub(crate) fn take_own_writes(regions: &[Arc<Region>], into: &mut PageSet) {
    for region in regions {
        let first_gfn = region.start_addr().0 / PAGE_SIZE;
        MmapRegion::bitmap(region).take(|page, word| into.insert_words(first_gfn + page, &[word]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GuestRam, RamConfig};
    use proptest::prelude::*;
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicU32, Ordering};
    use vm_memory::{Bytes, GuestAddress};

    #[derive(Clone, Debug)]
    enum Step {
        /// The VMM writes: address and length.
        Own(u64, usize),
        /// The guest writes a page.
        Guest(u64),
        Take,
    }

    const SIZE: u64 = 1 << 20;

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..SIZE - 10_000, 1..10_000usize).prop_map(|(at, len)| Step::Own(at, len)),
            (0..SIZE / PAGE_SIZE).prop_map(Step::Guest),
            Just(Step::Take),
        ]
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_made_up(steps in proptest::collection::vec(step(), 0..60)) {
            let ram = GuestRam::new(&RamConfig::new(SIZE)).unwrap();
            let log = RefCell::new(PageSet::new());
            let mut own = ram.own_writes();
            let mut tracker = DirtyTracker::<Infallible>::new();
            tracker.add(move |into: &mut PageSet| { own.collect(into); Ok(()) });
            tracker.add(|into: &mut PageSet| { into.union(&log.take()); Ok(()) });
            let mut oracle = BTreeSet::new();
            for step in steps.into_iter().chain([Step::Take]) {
                match step {
                    Step::Own(at, len) => {
                        ram.memory().write_slice(&vec![1; len], GuestAddress(at)).unwrap();
                        oracle.extend(at / PAGE_SIZE..=(at + len as u64 - 1) / PAGE_SIZE);
                    }
                    Step::Guest(gfn) => {
                        log.borrow_mut().insert(gfn);
                        oracle.insert(gfn);
                    }
                    Step::Take => {
                        let taken: BTreeSet<_> = tracker.take().unwrap().iter().collect();
                        prop_assert_eq!(taken, std::mem::take(&mut oracle));
                    }
                }
            }
        }
    }

    /// What a migration relies on: a copy that is brought up to date by the pages taken, while they are written, ends up the same.
    #[test]
    fn a_copy_follows_memory_that_is_being_written() {
        const PAGES: u64 = 64;
        let ram = GuestRam::new(&RamConfig::new(PAGES * PAGE_SIZE)).unwrap();
        let mut copy = [0_u64; PAGES as usize];
        let done = AtomicU32::new(0);
        let mut taken = 0;
        let mut bring = |copy: &mut [u64]| {
            let mut dirty = PageSet::new();
            ram.take_own_writes(&mut dirty);
            for gfn in dirty.iter() {
                copy[gfn as usize] = ram.memory().read_obj(GuestAddress(gfn * PAGE_SIZE)).unwrap();
            }
            taken += dirty.len();
        };
        std::thread::scope(|scope| {
            for half in 0..2 {
                let (ram, done) = (&ram, &done);
                scope.spawn(move || {
                    for n in 1..=50_000_u64 {
                        // The two write neighbouring pages, and so the same words of the bitmap; page 1 never.
                        let gfn = (n * 7 * 2 + half * 5) % PAGES;
                        let gfn = if gfn == 1 { 0 } else { gfn };
                        ram.memory()
                            .write_obj(n << 1 | half, GuestAddress(gfn * PAGE_SIZE))
                            .unwrap();
                    }
                    done.fetch_add(1, Ordering::Release);
                });
            }
            while done.load(Ordering::Acquire) < 2 {
                bring(&mut copy);
            }
        });
        bring(&mut copy);
        for gfn in 0..PAGES {
            let is: u64 = ram.memory().read_obj(GuestAddress(gfn * PAGE_SIZE)).unwrap();
            assert_eq!(copy[gfn as usize], is, "page {gfn} after {taken} pages taken");
        }
        assert_eq!(copy[1], 0);
        assert!(copy.iter().filter(|value| **value != 0).count() > 40);
    }

    #[test]
    fn a_failing_source_loses_nothing() {
        let fail = RefCell::new(true);
        let mut tracker = DirtyTracker::new();
        let mut first = Some(7);
        tracker.add(move |into: &mut PageSet| {
            into.extend(first.take());
            Ok(())
        });
        tracker.add(|_: &mut PageSet| if fail.replace(false) { Err("no") } else { Ok(()) });
        assert_eq!(tracker.take().unwrap_err(), "no");
        assert_eq!(tracker.take().unwrap().iter().collect::<Vec<_>>(), [7]);
    }
}
