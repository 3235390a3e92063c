//! bzImage: the format of `vmlinuz` (Linux, Documentation/arch/x86/boot.rst).

use linux_loader::loader::bootparam::setup_header;

use keel_memory::Memory;

use crate::image::Image;
use crate::kernel::{Kernel, Protocol, fits, read};
use crate::{Error, Result};

/// Where the setup header is in the file, and in `boot_params`.
const HEADER: usize = 0x1f1;
/// Where its magic is.
const MAGIC: usize = 0x202;
/// The byte that says how far after [`MAGIC`] the header ends.
const HEADER_LEN: usize = 0x201;
const SECTOR: u64 = 512;
/// The 64-bit entry, from the start of the protected-mode part.
const ENTRY_64: u64 = 0x200;

/// `loadflags`: the protected-mode part belongs at 1 MiB or above.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry.
const KERNEL_64: u16 = 1 << 0;
/// Version 2.12, the first with `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x020c;

/// The least a bzImage has: a setup header up to `cmdline_size`, of version 2.06.
pub const HEADER_END: usize = 0x23c;

/// Whether a file that begins with `start` has a setup header.
pub fn is(start: &[u8]) -> bool {
    start.get(MAGIC..).is_some_and(|rest| rest.starts_with(b"HdrS"))
}

/// Whether `start`, a whole file, can be a bzImage that ends before its setup header's magic: with an EFI stub it
/// begins as an EFI program, but none of those is this short.
pub fn is_cut(start: &[u8]) -> bool {
    start.len() < MAGIC + 4 && start.starts_with(b"MZ")
}

/// Reads the protected-mode part to where the kernel prefers to run.
pub fn load(image: &mut Image, start: &[u8], memory: &Memory, ram_end: u64) -> Result<Kernel> {
    let name = || image.name().to_owned();
    // A short header may be that of an old kernel, a short file is only one that was cut.
    image.has(header_end(start).max(HEADER_END) as u64)?;
    // The file may have become shorter since it was opened.
    let header: setup_header = read(&start[..header_end(start).min(start.len())], HEADER);
    let unsupported = |what| Error::Unsupported {
        name: name(),
        what,
        help: "use a 64-bit kernel (of Debian: linux-image-amd64)",
    };
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(unsupported("a zImage, which is loaded below 1 MiB"));
    }
    if header.version < VERSION_XLOADFLAGS {
        return Err(unsupported("of a boot protocol before 2.12, which has no 64-bit entry"));
    }
    if header.xloadflags & KERNEL_64 == 0 {
        return Err(unsupported("for 32-bit x86: its setup header has no 64-bit entry"));
    }

    let sectors = match header.setup_sects {
        0 => 4,
        count => u64::from(count),
    };
    let offset = (sectors + 1) * SECTOR;
    let len = u64::from(header.syssize) * 16;
    image.has(offset + len)?;
    if len <= ENTRY_64 {
        return Err(Error::Damaged { name: name(), what: "its 64-bit entry lies past its end" });
    }
    let payload = u64::from(header.payload_offset) + u64::from(header.payload_length);
    if payload > len {
        let what = "its compressed part reaches past its end";
        return Err(Error::Damaged { name: name(), what });
    }

    // Anywhere else it would first have to move itself here.
    let gpa = header.pref_address;
    let needed = len.max(u64::from(header.init_size));
    let end = gpa.saturating_add(needed);
    fits(image, gpa, end, ram_end)?;
    image.load(offset, len, memory, gpa)?;

    let mut header = Box::new(header);
    header.code32_start = gpa as u32;
    Ok(Kernel {
        end,
        initrd_limit: u64::from(header.initrd_addr_max) + 1,
        command_line_limit: header.cmdline_size as usize,
        protocol: Protocol::Linux { entry: gpa + ENTRY_64, header },
    })
}

/// Where the setup header ends, as the file says: what follows is code.
fn header_end(start: &[u8]) -> usize {
    MAGIC + start.get(HEADER_LEN).map_or(0, |len| usize::from(*len))
}
