//! Guest RAM on [`vm_memory`]: where it is, what is behind it, and which pages have been written.
//!
//! ```
//! use keel_memory::{GuestRam, RamConfig};
//! use vm_memory::{Bytes, GuestAddress};
//!
//! let ram = GuestRam::new(&RamConfig::new(128 << 20))?;
//! ram.memory().write_slice(b"hello", GuestAddress(0x1000))?;
//! ram.for_each_page(|gfn, page| {
//!     assert_eq!((gfn, &page[..5]), (1, &b"hello"[..]));
//!     Ok::<(), keel_memory::Error>(())
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Modules
//!
//! | file | subject |
//! |---|---|
//! | `layout` | [`layout`]: RAM below and above the hole under 4 GiB |
//! | `ram` | [`GuestRam`]: all RAM of a guest |
//! | `backing` | [`Backing`]: anonymous, shared, huge pages, files |
//! | `bitmap` | [`DirtyBitmap`]: the pages this process writes |
//! | `pages` | reading pages, and [`is_zero`] |
//! | `page_set` | [`PageSet`]: sets of page frames |
//! | `dirty` | [`DirtyTracker`]: dirty pages from several sources |
//! | `sys` | the system calls |
//! | `error` | [`Error`] |

mod backing;
mod bitmap;
mod dirty;
mod error;
pub mod layout;
mod page_set;
mod pages;
mod ram;
mod sys;

pub use backing::Backing;
pub use bitmap::DirtyBitmap;
pub use dirty::{DirtySource, DirtyTracker, OwnWrites};
pub use error::Error;
pub use page_set::PageSet;
pub use pages::is_zero;
pub use ram::{GuestRam, RamConfig};

/// One contiguous piece of guest RAM, mapped in this process; writes made through it are remembered as dirty.
pub type Region = vm_memory::GuestRegionMmap<DirtyBitmap>;

/// All guest RAM as `vm-memory` sees it.
pub type Memory = vm_memory::GuestMemoryMmap<DirtyBitmap>;
