//! What a kernel is told: `boot_params` or `hvm_start_info`, the memory map, the command line.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use keel_memory::{Memory, layout};

use crate::layout::{
    BOOT_PARAMS, COMMAND_LINE, COMMAND_LINE_SIZE, MEMORY_MAP, MODULES, START_INFO,
};
use crate::map;
use crate::{Error, Result};

/// `type_of_loader`: one without a number of its own (boot.rst).
const LOADER_UNDEFINED: u8 = 0xff;
/// `vid_mode`: as it is (boot.rst, "special command line options", `vga=`).
const VIDEO_NORMAL: u16 = 0xffff;

/// What a kernel is told, whichever way.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    /// The command line: no NUL, and shorter than [`COMMAND_LINE_SIZE`].
    pub command_line: &'a str,
    /// Where the initrd is, if there is one.
    pub initrd: Option<layout::Range>,
    /// What is where: at most [`map::MAX_ENTRIES`] ranges.
    pub map: &'a [map::Range],
    /// The guest physical address of the ACPI root pointer.
    pub rsdp: u64,
}

impl Start<'_> {
    /// Writes `boot_params` (Linux, Documentation/arch/x86/zero-page.rst) with the kernel's own setup header, and the
    /// command line.
    ///
    /// # Errors
    ///
    /// [`Error::Write`], [`Error::TooManyRanges`], [`Error::CommandLineTooLong`],
    /// [`Error::CommandLineNul`].
    pub fn write_linux(&self, memory: &Memory, header: setup_header) -> Result<()> {
        self.check()?;
        let mut params =
            boot_params { hdr: header, acpi_rsdp_addr: self.rsdp, ..boot_params::default() };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.vid_mode = VIDEO_NORMAL;
        params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
        if let Some(layout::Range { start, len }) = self.initrd {
            params.hdr.ramdisk_image = start as u32;
            params.hdr.ramdisk_size = len as u32;
            params.ext_ramdisk_image = (start >> 32) as u32;
            params.ext_ramdisk_size = (len >> 32) as u32;
        }
        let mut table = params.e820_table;
        for (entry, range) in table.iter_mut().zip(self.map) {
            *entry = boot_e820_entry {
                addr: range.start,
                size: range.end - range.start,
                r#type: range.kind as u32,
            };
        }
        params.e820_table = table;
        params.e820_entries = self.map.len() as u8;
        write(memory, params.as_slice(), "boot_params", BOOT_PARAMS)?;
        self.write_command_line(memory)
    }

    /// Writes `hvm_start_info` (Xen, public/arch-x86/hvm/start_info.h) and the command line.
    ///
    /// # Errors
    ///
    /// As of [`Start::write_linux`].
    pub fn write_pvh(&self, memory: &Memory) -> Result<()> {
        self.check()?;
        let mut info = hvm_start_info {
            magic: XEN_HVM_START_MAGIC_VALUE,
            version: 1,
            cmdline_paddr: COMMAND_LINE,
            rsdp_paddr: self.rsdp,
            memmap_paddr: MEMORY_MAP,
            memmap_entries: self.map.len() as u32,
            ..hvm_start_info::default()
        };
        if let Some(layout::Range { start: paddr, len: size }) = self.initrd {
            info.nr_modules = 1;
            info.modlist_paddr = MODULES;
            let module = hvm_modlist_entry { paddr, size, ..hvm_modlist_entry::default() };
            write(memory, module.as_slice(), "the module list", MODULES)?;
        }
        let map: Vec<u8> = self
            .map
            .iter()
            .flat_map(|range| {
                let size = range.end - range.start;
                let entry = hvm_memmap_table_entry {
                    addr: range.start,
                    size,
                    type_: range.kind as u32,
                    reserved: 0,
                };
                entry.as_slice().to_vec()
            })
            .collect();
        write(memory, info.as_slice(), "hvm_start_info", START_INFO)?;
        write(memory, &map, "the memory map", MEMORY_MAP)?;
        self.write_command_line(memory)
    }

    /// Refuses what would reach over what stands behind it.
    fn check(&self) -> Result<()> {
        if self.map.len() > map::MAX_ENTRIES {
            return Err(Error::TooManyRanges(self.map.len()));
        }
        check_command_line("the room for it", self.command_line, usize::MAX)
    }

    fn write_command_line(&self, memory: &Memory) -> Result<()> {
        let mut bytes = self.command_line.as_bytes().to_vec();
        bytes.push(0);
        write(memory, &bytes, "the command line", COMMAND_LINE)
    }
}

/// Refuses a command line that `name`, whose limit this is in bytes without the final NUL, does not take.
pub(crate) fn check_command_line(name: &str, command_line: &str, limit: usize) -> Result<()> {
    if let Some(at) = command_line.find('\0') {
        return Err(Error::CommandLineNul(at));
    }
    let limit = limit.min(COMMAND_LINE_SIZE - 1);
    let len = command_line.len();
    if len > limit {
        return Err(Error::CommandLineTooLong { name: name.to_owned(), len, limit });
    }
    Ok(())
}

/// Writes one structure.
pub(crate) fn write(memory: &Memory, bytes: &[u8], what: &'static str, gpa: u64) -> Result<()> {
    memory.write_slice(bytes, GuestAddress(gpa)).map_err(|source| Error::Write {
        what,
        gpa,
        source,
    })
}
