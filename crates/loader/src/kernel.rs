//! A kernel in guest RAM, whatever format it came in.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use keel_memory::Memory;

use crate::image::Image;
use crate::layout::HIGH;
use crate::looks::{self, not_a_kernel};
use crate::{Error, Result, bzimage, elf};

/// A kernel that has been read into guest RAM.
#[derive(Debug)]
pub struct Kernel {
    /// The end of the RAM it needs before it has looked at the memory map.
    pub end: u64,
    /// The end of where it can use an initrd.
    pub initrd_limit: u64,
    /// The longest command line it takes, in bytes without the final NUL.
    pub command_line_limit: usize,
    /// How it is entered.
    pub protocol: Protocol,
}

/// How a kernel is entered.
#[derive(Debug)]
pub enum Protocol {
    /// In 64-bit mode with `boot_params` (Linux, Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    Linux {
        /// The guest physical address of the first instruction.
        entry: u64,
        /// The setup header to go into `boot_params`.
        header: Box<setup_header>,
    },
    /// In 32-bit mode with `hvm_start_info` (Xen, docs/misc/pvh.pandoc).
    Pvh {
        /// The guest physical address of the first instruction.
        entry: u32,
    },
}

/// Reads the kernel `image` into the RAM from [`HIGH`] to `ram_end`, each part of it to where it wants to be.
///
/// The image may hold anything: this is also what a fuzzer calls, with [`Image::bytes`].
///
/// # Errors
///
/// Those of [`Error`] that speak of a kernel, and [`Error::Empty`], [`Error::Read`], [`Error::ReadIntoRam`],
/// [`Error::Write`]. Guest RAM may have been written to in part.
pub fn load(image: &mut Image, memory: &Memory, ram_end: u64) -> Result<Kernel> {
    if image.is_empty() {
        return Err(Error::Empty { name: image.name().to_owned() });
    }
    let mut start = [0; looks::ENOUGH];
    let count = image.read_at(0, &mut start)?;
    let start = &start[..count];
    if bzimage::is(start) {
        bzimage::load(image, start, memory, ram_end)
    } else if elf::is(start) {
        elf::load(image, start, memory, ram_end)
    } else {
        if bzimage::is_cut(start) {
            image.has(bzimage::HEADER_END as u64)?;
        }
        Err(not_a_kernel(image.name(), start))
    }
}

/// What stands at `offset` of `bytes`; what is past their end is zero.
pub(crate) fn read<T: ByteValued + Default>(bytes: &[u8], offset: usize) -> T {
    let mut value = T::default();
    let rest = bytes.get(offset..).unwrap_or_default();
    let count = rest.len().min(size_of::<T>());
    value.as_mut_slice()[..count].copy_from_slice(&rest[..count]);
    value
}

/// Refuses a kernel that needs RAM outside of what it may have.
pub(crate) fn fits(image: &Image, start: u64, end: u64, ram_end: u64) -> Result<()> {
    let name = image.name().to_owned();
    if start < HIGH {
        let what = "it wants to be below 1 MiB, where what it is started with stands";
        Err(Error::Damaged { name, what })
    } else if end > keel_memory::layout::HOLE_START {
        Err(Error::Damaged { name, what: "it wants RAM above 3 GiB, where no guest has any" })
    } else if end > ram_end {
        Err(Error::KernelTooBig { name, need: end, have: ram_end })
    } else {
        Ok(())
    }
}
