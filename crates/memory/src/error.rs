//! What can be wrong with guest RAM.

use std::io;
use std::path::PathBuf;

/// Why guest RAM can not be had or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size no guest can have.
    #[error("{0} bytes of RAM can not be: a multiple of 4 KiB, from 4 KiB to 64 TiB, is needed")]
    Size(u64),
    /// A size that is no multiple of the pages it is to be made of.
    #[error("{size} bytes of RAM at {gpa:#x} can not be made of pages of {page} bytes")]
    HugePages {
        /// Where the range begins.
        gpa: u64,
        /// Its length in bytes.
        size: u64,
        /// The size of the pages in bytes.
        page: u64,
    },
    /// The range could not be mapped.
    #[error("cannot map {mib} MiB of RAM ({backing}){advice}")]
    Map {
        /// The size in MiB.
        mib: u64,
        /// By what it was to be backed.
        backing: String,
        /// What to do about it; begins with a separator.
        advice: &'static str,
        /// The operating system's reason.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The file that backs RAM could not be made ready.
    #[error("cannot {what} {path} to back RAM")]
    File {
        /// The step.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// Advice the kernel did not take.
    #[error("cannot {what} {mib} MiB of RAM")]
    Advise {
        /// What was to be done.
        what: &'static str,
        /// The size in MiB.
        mib: u64,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The regions overlap or are out of order.
    #[error("RAM can not be laid out")]
    Layout(#[from] vm_memory::GuestRegionCollectionError),
    /// An access outside RAM.
    #[error("cannot read {len} bytes of RAM at {gpa:#x}")]
    Read {
        /// The guest physical address.
        gpa: u64,
        /// The length in bytes.
        len: u64,
        /// The reason.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}
