//! All that it takes to start a kernel, in order.

use keel_memory::Memory;
use keel_memory::layout::PAGE_SIZE;

use crate::image::Image;
use crate::kernel::{Kernel, Protocol};
use crate::layout::{BIOS, COMMAND_LINE_SIZE, HIGH};
use crate::start::{Start, write};
use crate::{Entry, Error, Result, acpi, kernel, map};

/// A kernel and what it is started with.
#[derive(Debug)]
pub struct Linux<'a> {
    /// The kernel: a bzImage or a vmlinux of Linux, or any ELF kernel with an entry for PVH.
    pub kernel: &'a mut Image,
    /// The initial RAM file system.
    pub initrd: Option<&'a mut Image>,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// What the ACPI tables say.
    pub acpi: &'a acpi::Platform,
}

impl Linux<'_> {
    /// Puts kernel, initrd and all they need into guest RAM, for the first time or again at a reset.
    ///
    /// # Errors
    ///
    /// Any of [`Error`] but those of [`Image::open`]. Guest RAM may have been written to in part.
    pub fn load(self, memory: &Memory) -> Result<Entry> {
        let Linux { kernel: image, initrd, command_line, acpi } = self;
        let ram_end = map::low_ram_end(memory)?;
        let acpi = acpi::Tables::place(acpi, ram_end)?;
        let kernel = kernel::load(image, memory, acpi.ram_end)?;
        check_command_line(image, command_line, kernel.command_line_limit)?;
        let initrd = match initrd {
            Some(initrd) => Some(load_initrd(initrd, &kernel, memory, acpi.ram_end)?),
            None => None,
        };
        for (gpa, bytes) in &acpi.pieces {
            write(memory, bytes, "ACPI tables", *gpa)?;
        }

        let map = map::memory_map(memory, acpi.ram_end)?;
        let start = Start { command_line, initrd, map: &map, rsdp: BIOS };
        let entry = match kernel.protocol {
            Protocol::Linux { entry, header } => {
                start.write_linux(memory, *header)?;
                Entry::Long { rip: entry }
            }
            Protocol::Pvh { entry } => {
                start.write_pvh(memory)?;
                Entry::Protected { eip: entry }
            }
        };
        entry.write_tables(memory)?;
        Ok(entry)
    }
}

fn check_command_line(kernel: &Image, command_line: &str, limit: usize) -> Result<()> {
    if let Some(at) = command_line.find('\0') {
        return Err(Error::CommandLineNul(at));
    }
    let limit = limit.min(COMMAND_LINE_SIZE - 1);
    let len = command_line.len();
    if len > limit {
        return Err(Error::CommandLineTooLong { name: kernel.name().to_owned(), len, limit });
    }
    Ok(())
}

/// Reads the initrd as high as the kernel can use it, out of the way of what the kernel unpacks; gives where it is and
/// how long.
fn load_initrd(
    initrd: &mut Image,
    kernel: &Kernel,
    memory: &Memory,
    ram_end: u64,
) -> Result<(u64, u64)> {
    let len = initrd.len();
    if len == 0 {
        return Err(Error::Empty { name: initrd.name().to_owned() });
    }
    let from = kernel.end.max(HIGH);
    let to = kernel.initrd_limit.min(ram_end);
    let address = to.checked_sub(len).map(|address| address & !(PAGE_SIZE - 1));
    let Some(address) = address.filter(|address| *address >= from) else {
        let more_ram_helps =
            from.saturating_add(len) <= kernel.initrd_limit.min(keel_memory::layout::HOLE_START);
        return Err(Error::InitrdTooBig {
            name: initrd.name().to_owned(),
            len,
            from,
            to,
            more_ram_helps,
        });
    };
    initrd.load(0, len, memory, address)?;
    Ok((address, len))
}
