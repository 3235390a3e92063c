//! Guest RAM. (Being written: the contract others build against.)

use vm_memory::bitmap::AtomicBitmap;

/// One contiguous piece of guest RAM, mapped in this process; writes made through it are remembered as dirty.
pub type Region = vm_memory::GuestRegionMmap<AtomicBitmap>;

/// All guest RAM as `vm-memory` sees it.
pub type Memory = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// A set of guest page frames.
#[derive(Clone, Debug, Default)]
pub struct PageSet;

impl PageSet {
    /// Adds the frames whose bits are set: bit 0 of the first word is frame `first_gfn`.
    pub fn insert_words(&mut self, _first_gfn: u64, _words: &[u64]) {}

    /// Adds one frame.
    pub fn insert(&mut self, _gfn: u64) {}
}
