//! All that it takes to start a kernel, in order.

use keel_memory::Memory;

use crate::image::Image;
use crate::kernel::Protocol;
use crate::layout::BIOS;
use crate::start::{Start, check_command_line};
use crate::{Entry, Result, acpi, initrd, kernel, map};

/// A kernel and what it is started with.
///
/// [`Linux::load`] calls the other modules of this crate in order; a VMM that wants it otherwise calls them itself.
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
    /// Any of [`crate::Error`] but those of [`Image::open`]. Guest RAM may have been written to in part.
    pub fn load(self, memory: &Memory) -> Result<Entry> {
        let Linux { kernel: image, initrd: initrd_image, command_line, acpi } = self;
        let ram_end = map::low_ram_end(memory)?;
        let acpi = acpi::Tables::place(acpi, ram_end)?;
        let kernel = kernel::load(image, memory, acpi.ram_end)?;
        check_command_line(image.name(), command_line, kernel.command_line_limit)?;
        let initrd = match initrd_image {
            Some(image) => Some(initrd::load(image, &kernel, memory, acpi.ram_end)?),
            None => None,
        };
        acpi.write(memory)?;

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
