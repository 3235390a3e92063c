//! ELF kernels: `vmlinux`, and whatever has an entry for PVH (System V ABI, chapters 4 and 5; Xen,
//! docs/misc/pvh.pandoc).

use std::ops::Range;

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS32, ELFCLASS64, ELFDATA2LSB, ELFMAG, EM_X86_64, ET_DYN, ET_EXEC,
    Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE,
};
use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress};

use keel_memory::Memory;

use crate::image::Image;
use crate::kernel::{Kernel, Protocol, fits, read};
use crate::{Error, Result};

/// `XEN_ELFNOTE_PHYS32_ENTRY` (Xen, public/elfnote.h).
const NOTE_PVH_ENTRY: u32 = 18;
/// The most segments; what Linux has is 5.
const MAX_SEGMENTS: u16 = 64;
/// How much of a segment of notes is looked at, in bytes.
const MAX_NOTES: u64 = 1 << 16;
/// Where the kernel's half of the virtual address space begins.
const KERNEL_HALF: u64 = 1 << 63;
/// Where an ELF kernel, which does not say it, can use an initrd (boot.rst, `initrd_addr_max`).
const INITRD_LIMIT: u64 = 0x8000_0000;
/// The longest command line of an ELF kernel, which does not say it: Linux's `COMMAND_LINE_SIZE` on x86 without the NUL.
const COMMAND_LINE_LIMIT: usize = 2047;

/// Whether a file begins as ELF files do.
pub fn is(start: &[u8]) -> bool {
    start.starts_with(ELFMAG)
}

/// Reads the segments to their physical addresses.
pub fn load(image: &mut Image, start: &[u8], memory: &Memory, ram_end: u64) -> Result<Kernel> {
    let header: Elf64_Ehdr = read(start, 0);
    check_kind(image, start, &header)?;
    let segments = segments(image, &header)?;
    let protocol = protocol(image, &header, &segments)?;

    let loaded: Vec<&Elf64_Phdr> = segments
        .iter()
        .filter(|segment| segment.p_type == PT_LOAD && segment.p_memsz > 0)
        .collect();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for segment in &loaded {
        let range = check_segment(image, segment, ram_end)?;
        if ranges.iter().any(|other| range.start < other.end && other.start < range.end) {
            let what = "two of its segments overlap";
            return Err(Error::Damaged { name: image.name().to_owned(), what });
        }
        ranges.push(range);
    }
    let entry = match &protocol {
        Protocol::Linux { entry, .. } => *entry,
        Protocol::Pvh { entry } => u64::from(*entry),
    };
    if !ranges.iter().any(|range| range.contains(&entry)) {
        let what = "its entry lies outside of its segments";
        return Err(Error::Damaged { name: image.name().to_owned(), what });
    }

    for segment in loaded {
        image.load(segment.p_offset, segment.p_filesz, memory, segment.p_paddr)?;
        // Not left to the RAM being new: after a reset it holds what the last kernel left.
        zero(memory, segment.p_paddr + segment.p_filesz, segment.p_memsz - segment.p_filesz)?;
    }
    Ok(Kernel {
        end: ranges.iter().map(|range| range.end).max().unwrap_or_default(),
        initrd_limit: INITRD_LIMIT,
        command_line_limit: COMMAND_LINE_LIMIT,
        protocol,
    })
}

fn check_kind(image: &Image, start: &[u8], header: &Elf64_Ehdr) -> Result<()> {
    let looks = if header.e_ident[EI_CLASS] == ELFCLASS32 {
        "an ELF file for a 32-bit machine"
    } else if start.len() < size_of::<Elf64_Ehdr>() {
        return image.has(size_of::<Elf64_Ehdr>() as u64);
    } else if header.e_ident[EI_CLASS] != ELFCLASS64 {
        "an ELF file of an unknown class"
    } else if header.e_ident[EI_DATA] != ELFDATA2LSB || header.e_machine != EM_X86_64 {
        "an ELF file for another machine than x86-64"
    } else if header.e_type != ET_EXEC && header.e_type != ET_DYN {
        "an ELF object or core dump"
    } else {
        return Ok(());
    };
    Err(not_a_kernel(image, looks))
}

fn not_a_kernel(image: &Image, looks: &'static str) -> Error {
    Error::NotAKernel {
        name: image.name().to_owned(),
        looks,
        help: "give a bzImage (vmlinuz), a vmlinux for 64-bit x86, or a 64-bit ELF kernel with a PVH entry note",
    }
}

fn segments(image: &Image, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>> {
    let damaged = |what| Error::Damaged { name: image.name().to_owned(), what };
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(damaged("its program headers have a wrong size"));
    }
    if header.e_phnum > MAX_SEGMENTS {
        return Err(damaged("it has more than 64 program headers"));
    }
    let len = usize::from(header.e_phnum) * size_of::<Elf64_Phdr>();
    image.has(header.e_phoff.saturating_add(len as u64))?;
    let mut table = vec![0; len];
    image.read_at(header.e_phoff, &mut table)?;
    Ok((0..len).step_by(size_of::<Elf64_Phdr>()).map(|offset| read(&table, offset)).collect())
}

/// The RAM a segment takes.
fn check_segment(image: &Image, segment: &Elf64_Phdr, ram_end: u64) -> Result<Range<u64>> {
    if segment.p_filesz > segment.p_memsz {
        let what = "a segment of it is larger in the file than in memory";
        return Err(Error::Damaged { name: image.name().to_owned(), what });
    }
    image.has(segment.p_offset.saturating_add(segment.p_filesz))?;
    let end = segment.p_paddr.saturating_add(segment.p_memsz);
    fits(image, segment.p_paddr, end, ram_end)?;
    Ok(segment.p_paddr..end)
}

/// The PVH entry where there is one, or Linux's 64-bit entry.
fn protocol(image: &Image, header: &Elf64_Ehdr, segments: &[Elf64_Phdr]) -> Result<Protocol> {
    for notes in segments.iter().filter(|segment| segment.p_type == PT_NOTE) {
        image.has(notes.p_offset.saturating_add(notes.p_filesz))?;
        let mut bytes = vec![0; notes.p_filesz.min(MAX_NOTES) as usize];
        let count = image.read_at(notes.p_offset, &mut bytes)?;
        if let Some(entry) = pvh_entry(&bytes[..count]) {
            return Ok(Protocol::Pvh { entry });
        }
    }
    // Position-independent, and nothing says that it runs where it is linked.
    if header.e_type == ET_DYN {
        return Err(not_a_kernel(image, "an ELF library or program"));
    }
    // A program, too, can be of type EXEC; that one of its segments is in the kernel's half tells a kernel.
    let kernel = |segment: &Elf64_Phdr| segment.p_type == PT_LOAD && segment.p_vaddr >= KERNEL_HALF;
    if !segments.iter().any(kernel) {
        return Err(not_a_kernel(image, "an ELF program"));
    }
    let mut setup = Box::new(setup_header::default());
    setup.boot_flag = 0xaa55;
    setup.header = u32::from_le_bytes(*b"HdrS");
    setup.version = 0x020f;
    setup.kernel_alignment = 0x100_0000;
    setup.initrd_addr_max = (INITRD_LIMIT - 1) as u32;
    setup.cmdline_size = COMMAND_LINE_LIMIT as u32;
    Ok(Protocol::Linux { entry: header.e_entry, header: setup })
}

/// The entry a segment of notes tells: in 4 or 8 bytes, of which the low 4 are the address.
fn pvh_entry(notes: &[u8]) -> Option<u32> {
    let mut at = 0;
    while at + size_of::<Elf64_Nhdr>() <= notes.len() {
        let note: Elf64_Nhdr = read(notes, at);
        let name = at + size_of::<Elf64_Nhdr>();
        let description = aligned(name, note.n_namesz)?;
        let next = aligned(description, note.n_descsz)?;
        if note.n_type == NOTE_PVH_ENTRY
            && note.n_descsz >= 4
            && notes.get(name..name + 4) == Some(b"Xen\0")
        {
            let entry = notes.get(description..description + 4)?;
            return Some(u32::from_le_bytes(entry.try_into().ok()?));
        }
        at = next;
    }
    None
}

/// `at + len`, rounded up to what notes are aligned to.
fn aligned(at: usize, len: u32) -> Option<usize> {
    at.checked_add(len as usize)?.checked_next_multiple_of(4)
}

fn zero(memory: &Memory, mut gpa: u64, mut len: u64) -> Result<()> {
    const ZEROS: [u8; 4096] = [0; 4096];
    while len > 0 {
        let count = len.min(ZEROS.len() as u64);
        memory
            .write_slice(&ZEROS[..count as usize], GuestAddress(gpa))
            .map_err(|source| Error::Write { what: "a segment's zeros", gpa, source })?;
        gpa += count;
        len -= count;
    }
    Ok(())
}
