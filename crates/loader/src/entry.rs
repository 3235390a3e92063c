//! The state a kernel finds the boot CPU in.

use keel_hypervisor::state::{CpuState, DescriptorTable, Registers, Segment, Segments};
use keel_memory::Memory;
use vm_memory::{Bytes, GuestAddress};

use crate::layout::{BOOT_PARAMS, GDT, PAGE_TABLES, STACK_END, START_INFO};
use crate::{Error, Result};

/// The code segment (boot.rst, `__BOOT_CS`).
const CODE: u16 = 0x10;
/// The data segment (boot.rst, `__BOOT_DS`).
const DATA: u16 = 0x18;
/// The task's segment, which a CPU that virtualizes wants to be there.
const TASK: u16 = 0x20;
/// How long the task's segment is: a 32-bit TSS.
const TASK_LEN: u32 = 0x68;

const CR0_PROTECTION: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS: u64 = 1 << 1;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;
const PAGE: u64 = keel_memory::layout::PAGE_SIZE;

/// `IA32_MTRR_DEF_TYPE` (SDM volume 3, 12.11.2.1).
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// Memory type ranges are on, and the type of all that is in none of them is write-back.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// Does for a CPU what firmware does to every one before it starts a kernel: turns the memory type ranges (MTRRs) on,
/// with write-back as the type of all memory.
///
/// [`Entry::apply`] does it to the boot CPU; it is for the others, which INIT leaves it to. Linux warns of CPUs that differ
/// in it, and uses no page attribute table (PAT) where it finds the ranges off, as they are after reset. No range is
/// set: what is no RAM is told by the kernel's own page tables, and none that a hypervisor follows needs to be. A CPU without
/// the register stays as it is.
pub fn set_memory_types(state: &mut CpuState) {
    if let Some(value) = state.msrs.get_mut(&MTRR_DEFAULT_TYPE) {
        *value = MTRR_ON_WRITE_BACK;
    }
}

/// Where and how the kernel that was loaded is entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode, with the first 4 GiB mapped as they are and the address of `boot_params` in RSI.
    Long {
        /// The guest physical address of the first instruction.
        rip: u64,
    },
    /// In 32-bit mode without paging, with the address of `hvm_start_info` in EBX.
    Protected {
        /// The guest physical address of the first instruction.
        eip: u32,
    },
}

impl Entry {
    /// Sets the registers of the boot CPU: general, segment, descriptor-table and control registers and, with
    /// [`set_memory_types`], the memory types.
    ///
    /// Everything else of `state` stays, which is to be that of a CPU after reset.
    pub fn apply(&self, state: &mut CpuState) {
        let long = matches!(self, Entry::Long { .. });
        let registers = Registers { rflags: RFLAGS, ..Registers::default() };
        state.registers = match *self {
            Entry::Long { rip } => Registers { rip, rsi: BOOT_PARAMS, rsp: STACK_END, ..registers },
            Entry::Protected { eip } => Registers { rip: eip.into(), rbx: START_INFO, ..registers },
        };
        let data = flat(DATA, long);
        state.segments = Segments {
            cs: flat(CODE, long),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: Segment {
                limit: TASK_LEN - 1,
                selector: TASK,
                kind: 11,
                present: true,
                ..Segment::default()
            },
            ldt: Segment { unusable: true, ..Segment::default() },
            gdt: DescriptorTable { base: GDT, limit: (descriptors(long).len() * 8 - 1) as u16 },
            idt: DescriptorTable::default(),
        };
        state.control.cr0 = CR0_PROTECTION | CR0_EXTENSION_TYPE;
        state.control.cr2 = 0;
        state.control.cr3 = 0;
        state.control.cr4 = 0;
        state.control.efer = 0;
        state.control.pdptrs = None;
        if long {
            state.control.cr0 |= CR0_PAGING;
            state.control.cr3 = PAGE_TABLES;
            state.control.cr4 = CR4_PAE;
            state.control.efer = EFER_LONG_MODE;
        }
        set_memory_types(state);
    }

    /// Writes what the registers point to: descriptors and page tables.
    ///
    /// # Errors
    ///
    /// [`Error::Write`].
    pub fn write_tables(&self, memory: &Memory) -> Result<()> {
        let long = matches!(self, Entry::Long { .. });
        let write = |bytes: &[u8], what, gpa| {
            memory.write_slice(bytes, GuestAddress(gpa)).map_err(|source| Error::Write {
                what,
                gpa,
                source,
            })
        };
        let words =
            |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        write(&words(&descriptors(long)), "the GDT", GDT)?;
        if long {
            write(&words(&page_tables()), "page tables", PAGE_TABLES)?;
        }
        Ok(())
    }
}

/// A segment over all addresses.
fn flat(selector: u16, long: bool) -> Segment {
    let code = selector == CODE;
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        kind: if code { 11 } else { 3 }, // code, readable; data, writable; both accessed
        dpl: 0,
        code_or_data: true,
        present: true,
        default_32: !(long && code),
        long: long && code,
        granular: true,
        available: false,
        unusable: false,
    }
}

/// The descriptor table that matches the segment registers (SDM volume 3, 3.4.5).
fn descriptors(long: bool) -> [u64; 6] {
    let task = u64::from(TASK_LEN - 1) | 0x8b << 40; // present, busy 32-bit TSS; at address 0, and in 64-bit mode two entries
    [0, 0, descriptor(&flat(CODE, long)), descriptor(&flat(DATA, long)), task, 0]
}

/// The descriptor of a flat segment.
fn descriptor(segment: &Segment) -> u64 {
    let bit = |set: bool, bit: u32| u64::from(set) << bit;
    0x000f_0000_0000_ffff
        | u64::from(segment.kind) << 40
        | bit(segment.code_or_data, 44)
        | bit(segment.present, 47)
        | bit(segment.long, 53)
        | bit(segment.default_32, 54)
        | bit(segment.granular, 55)
}

/// Page tables that map the first 4 GiB to themselves in pages of 2 MiB: a PML4, a page-directory-pointer table and
/// four page directories (SDM volume 3, 4.5).
fn page_tables() -> Vec<u64> {
    const ENTRIES: u64 = 512;
    let first = |entries: &[u64]| {
        let mut table = entries.to_vec();
        table.resize(ENTRIES as usize, 0);
        table
    };
    let directories: Vec<u64> =
        (2..6).map(|page| (PAGE_TABLES + page * PAGE) | PRESENT_WRITABLE).collect();
    let mut tables = first(&[(PAGE_TABLES + PAGE) | PRESENT_WRITABLE]);
    tables.extend(first(&directories));
    tables.extend((0..4 * ENTRIES).map(|page| (page * LARGE_PAGE) | PRESENT_WRITABLE | LARGE));
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_hypervisor::state::Control;

    /// Walks `tables` as a CPU does.
    fn translate(memory: &Memory, cr3: u64, linear: u64) -> Option<u64> {
        let mut table = cr3;
        for shift in [39, 30, 21] {
            let index = linear >> shift & 511;
            let entry: u64 = memory.read_obj(GuestAddress(table + index * 8)).unwrap();
            if entry & 1 == 0 {
                return None;
            }
            table = entry & !0xfff;
            if entry & LARGE != 0 {
                return Some(table & !(LARGE_PAGE - 1) | linear & (LARGE_PAGE - 1));
            }
        }
        None
    }

    #[test]
    fn the_first_4_gib_are_mapped_to_themselves_and_nothing_else() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let entry = Entry::Long { rip: 0x100_0200 };
        entry.write_tables(&memory).unwrap();
        let mut state = CpuState::default();
        entry.apply(&mut state);
        for page in 0..2048_u64 {
            let linear = page * LARGE_PAGE + 0x1234;
            assert_eq!(translate(&memory, state.control.cr3, linear), Some(linear));
        }
        for linear in [4 << 30, 1 << 39, 0xffff_ffff_8000_0000] {
            assert_eq!(translate(&memory, state.control.cr3, linear), None);
        }
    }

    #[test]
    fn a_64_bit_kernel_is_entered_as_its_protocol_says() {
        let mut state = CpuState {
            control: Control { apic_base: 0xfee0_0900, ..Control::default() },
            ..CpuState::default()
        };
        Entry::Long { rip: 0x100_0200 }.apply(&mut state);
        assert_eq!(state.registers.rip, 0x100_0200);
        assert_eq!(state.registers.rsi, BOOT_PARAMS);
        assert_eq!(state.registers.rflags, 2, "interrupts off");
        assert_eq!(state.segments.cs.selector, 0x10);
        assert!(state.segments.cs.long && !state.segments.cs.default_32);
        assert_eq!(state.segments.ss.selector, 0x18);
        assert_eq!(state.control.efer, 0x500);
        assert_eq!(state.control.cr0, 0x8000_0011);
        assert_eq!(state.control.apic_base, 0xfee0_0900, "left as it was");
    }

    #[test]
    fn a_pvh_kernel_is_entered_as_its_protocol_says() {
        let mut state = CpuState::default();
        Entry::Protected { eip: 0x100_0040 }.apply(&mut state);
        assert_eq!(state.registers.rip, 0x100_0040);
        assert_eq!(state.registers.rbx, START_INFO);
        assert_eq!((state.control.cr0, state.control.cr4, state.control.efer), (0x11, 0, 0));
        assert!(state.segments.cs.default_32 && !state.segments.cs.long);
        assert_eq!((state.segments.cs.base, state.segments.cs.limit), (0, u32::MAX));
        assert_eq!((state.segments.tr.limit, state.segments.tr.kind), (0x67, 11));
    }

    #[test]
    fn memory_types_are_on_where_there_are_any() {
        let mut state = CpuState::default();
        Entry::Long { rip: 0x100_0200 }.apply(&mut state);
        assert!(state.msrs.is_empty(), "a register it does not have would be refused");
        state.msrs.insert(0x2ff, 0);
        Entry::Long { rip: 0x100_0200 }.apply(&mut state);
        assert_eq!(state.msrs[&0x2ff], 0x806);
    }

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(
            descriptors(true),
            [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x8b00_0000_0067, 0]
        );
        assert_eq!(descriptors(false)[2], 0x00cf_9b00_0000_ffff);
    }
}
