//! What can be wrong with files, and with the RAM they go into.

use std::io;

use vm_memory::GuestMemoryError;

/// What this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened.
    #[error("cannot open {name}")]
    Open {
        /// The file.
        name: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A directory, device, pipe or socket where a file was expected.
    #[error("{name} is {what}: give a regular file")]
    NotAFile {
        /// The file.
        name: String,
        /// What it is.
        what: &'static str,
    },
    /// A file of no bytes.
    #[error("{name} is empty: was it copied or downloaded in full?")]
    Empty {
        /// The file.
        name: String,
    },
    /// A file could not be read.
    #[error("cannot read {len} bytes at offset {offset:#x} of {name}")]
    Read {
        /// The file.
        name: String,
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A file could not be read into guest RAM.
    #[error("cannot read {len} bytes at offset {offset:#x} of {name} into guest RAM at {gpa:#x}")]
    ReadIntoRam {
        /// The file.
        name: String,
        /// Where in it, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
        /// To where: a guest physical address.
        gpa: u64,
        /// What went wrong.
        #[source]
        source: GuestMemoryError,
    },
    /// The file is something else than a kernel.
    #[error("{name} is no Linux or PVH kernel: it looks like {looks}; {help}")]
    NotAKernel {
        /// The file.
        name: String,
        /// What it looks like.
        looks: &'static str,
        /// What would help.
        help: &'static str,
    },
    /// The file is a kernel of a kind that can not be started here.
    #[error("the kernel {name} is {what}; {help}")]
    Unsupported {
        /// The file.
        name: String,
        /// What it is.
        what: &'static str,
        /// What would help.
        help: &'static str,
    },
    /// The file ends before what it says it holds.
    #[error(
        "the kernel {name} is truncated: it has {have} bytes and its headers say at least {need}; copy or download it again"
    )]
    Truncated {
        /// The file.
        name: String,
        /// What its headers say, in bytes.
        need: u64,
        /// What there is, in bytes.
        have: u64,
    },
    /// The file contradicts itself.
    #[error("the kernel {name} is damaged: {what}; copy or download it again")]
    Damaged {
        /// The file.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
    /// The kernel needs more RAM than the guest has below the hole under 4 GiB.
    #[error(
        "the kernel {name} does not fit: it needs guest RAM up to {need} MiB, and there is RAM up to {} MiB; give the guest at least {need} MiB (-m {need})",
        .have >> 20, need = .need.div_ceil(1 << 20)
    )]
    KernelTooBig {
        /// The file.
        name: String,
        /// The end of the RAM it needs, in bytes from address 0.
        need: u64,
        /// The end of the RAM there is, in bytes from address 0.
        have: u64,
    },
    /// The initrd does not fit beside the kernel.
    #[error(
        "the initrd {name} of {} MiB does not fit: the kernel takes RAM up to {} MiB and can use an initrd up to {} MiB; {}",
        .len.div_ceil(1 << 20), .from.div_ceil(1 << 20), .to >> 20,
        if *.more_ram_helps { "give the guest more RAM (-m), or make the initrd smaller" } else { "make the initrd smaller" }
    )]
    InitrdTooBig {
        /// The file.
        name: String,
        /// Its length in bytes.
        len: u64,
        /// The first guest physical address it could have.
        from: u64,
        /// The end of the room for it.
        to: u64,
        /// The room ends with the RAM, not with what the kernel can reach.
        more_ram_helps: bool,
    },
    /// The kernel takes no command line that long.
    #[error("the kernel command line has {len} bytes and {name} takes at most {limit}: shorten it")]
    CommandLineTooLong {
        /// What takes no longer one: the kernel, or the room there is.
        name: String,
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// A NUL would end the command line early.
    #[error("the kernel command line holds a NUL character at byte {0}: leave it out")]
    CommandLineNul(usize),
    /// Guest RAM does not begin at address 0.
    #[error("guest RAM does not begin at address 0")]
    NoLowRam,
    /// More ranges of RAM than the boot protocol can tell.
    #[error("guest RAM is in {0} ranges, and the boot protocol can tell at most {max}", max = crate::map::MAX_ENTRIES)]
    TooManyRanges(usize),
    /// The ACPI tables can not describe the platform.
    #[error("cannot describe {what} in ACPI tables: {given} given, at most {limit} possible")]
    Acpi {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        given: usize,
        /// How much could be.
        limit: usize,
    },
    /// A structure the kernel is started with could not be written.
    #[error("cannot write {what} to guest RAM at {gpa:#x}")]
    Write {
        /// Which.
        what: &'static str,
        /// Its guest physical address.
        gpa: u64,
        /// What went wrong.
        #[source]
        source: GuestMemoryError,
    },
}
