//! What can be wrong with guest RAM.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why guest RAM can not be had or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size no guest can have, in bytes.
    #[error(
        "{} of RAM can not be: it takes a multiple of 4 KiB, from 4 KiB to 64 TiB", Size(*.0)
    )]
    Size(u64),
    /// A size that is no multiple of the pages it is to be made of.
    #[error(
        "{} of RAM at {gpa:#x} ({backing}) can not be made of pages of {}: make it a multiple of that",
        Size(*size), Size(*page)
    )]
    HugePages {
        /// Where the range begins.
        gpa: u64,
        /// Its length in bytes.
        size: u64,
        /// The size of the pages in bytes.
        page: u64,
        /// By what it was to be backed.
        backing: String,
    },
    /// A step of making RAM ready failed: `mmap`, `madvise`, …
    #[error("{call} of {} of RAM ({backing}) failed{advice}", Size(*size))]
    Call {
        /// The system call, with what tells it from others.
        call: &'static str,
        /// The length of the range in bytes.
        size: u64,
        /// By what it was to be backed.
        backing: String,
        /// What to do about it; empty, or begins with a separator.
        advice: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The file that backs RAM could not be made ready.
    #[error("{call} of {path} to back {} of RAM failed{advice}", Size(*size))]
    File {
        /// The system call.
        call: &'static str,
        /// The file or directory, or what stands in its place.
        path: PathBuf,
        /// The size of RAM in bytes.
        size: u64,
        /// What to do about it; empty, or begins with a separator.
        advice: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The regions overlap or are out of order.
    #[error("RAM can not be laid out")]
    Layout(#[from] vm_memory::GuestRegionCollectionError),
    /// An access outside RAM.
    #[error("cannot read {} of RAM at {gpa:#x}", Size(*len))]
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

/// A number of bytes, shown in the largest unit that leaves no rest.
pub(crate) struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
        let unit = (self.0.trailing_zeros() as usize / 10).min(UNITS.len() - 1);
        // Zero has all its bits trailing.
        let unit = if self.0 == 0 { 0 } else { unit };
        write!(f, "{} {}", self.0 >> (10 * unit), UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (size, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (4096, "4 KiB"),
            (3 << 20, "3 MiB"),
            ((1 << 30) + 4096, "1048580 KiB"),
            (1 << 50, "1024 TiB"),
        ] {
            assert_eq!(Size(size).to_string(), text);
        }
    }
}
