//! The memory map a kernel is given: what firmware's `E820` call answers on a PC (ACPI 6.5, 15.1).

use keel_memory::{Memory, layout};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{BIOS, EBDA, HIGH, HIGH_BIOS, VIDEO};
use crate::{Error, Result};

/// The most entries `boot_params` holds.
pub const MAX_ENTRIES: usize = 128;

/// What is at a range of addresses. The values are those of `E820`, and of PVH's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
    /// RAM once the ACPI tables in it have been read.
    AcpiTables = 3,
}

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
    /// What is there.
    pub kind: Kind,
}

/// The end of the RAM that begins at address 0, at most the hole under 4 GiB.
///
/// # Errors
///
/// [`Error::NoLowRam`].
pub fn low_ram_end(memory: &Memory) -> Result<u64> {
    match merged(memory).first() {
        Some(&(0, end)) => Ok(end.min(layout::HOLE_START)),
        _ => Err(Error::NoLowRam),
    }
}

/// The map of `memory`, with ACPI tables in the low RAM from `tables` to its end ([`crate::acpi::Tables::ram_end`]; none
/// if that is its end).
///
/// # Errors
///
/// [`Error::NoLowRam`], [`Error::TooManyRanges`].
pub fn memory_map(memory: &Memory, tables: u64) -> Result<Vec<Range>> {
    let low_end = low_ram_end(memory)?;
    let mut map = Vec::new();
    let mut add = |start: u64, end: u64, kind| {
        if start < end {
            map.push(Range { start, end, kind });
        }
    };
    for (start, end) in merged(memory) {
        if start == 0 {
            add(0, EBDA.min(end), Kind::Ram);
            add(EBDA, VIDEO, Kind::Reserved);
            add(BIOS, HIGH, Kind::Reserved);
            add(HIGH, tables, Kind::Ram);
            add(tables, low_end, Kind::AcpiTables);
            add(low_end.max(HIGH), end, Kind::Ram);
        } else {
            add(start, end, Kind::Ram);
        }
    }
    add(HIGH_BIOS, layout::HOLE_END, Kind::Reserved);
    map.sort_by_key(|range| range.start);
    if map.len() > MAX_ENTRIES {
        return Err(Error::TooManyRanges(map.len()));
    }
    Ok(map)
}

/// Start and end of the ranges of RAM, adjacent ones made one.
fn merged(memory: &Memory) -> Vec<(u64, u64)> {
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start + region.len();
        match merged.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => merged.push((start, end)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn memory(ranges: &[(u64, usize)]) -> Memory {
        let ranges: Vec<_> =
            ranges.iter().map(|&(start, len)| (GuestAddress(start), len)).collect();
        Memory::from_ranges(&ranges).unwrap()
    }

    #[test]
    fn a_pc_with_ram_on_both_sides_of_the_hole() {
        let memory = memory(&[(0, 3 << 30), (4 << 30, 1 << 30)]);
        let end = low_ram_end(&memory).unwrap();
        assert_eq!(end, 3 << 30);
        let map: Vec<_> = memory_map(&memory, end - 0x3000)
            .unwrap()
            .iter()
            .map(|range| (range.start, range.end, range.kind as u32))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, 0xa_0000, 2),
                (0xe_0000, 0x10_0000, 2),
                (0x10_0000, 0xbfff_d000, 1),
                (0xbfff_d000, 0xc000_0000, 3),
                (0xfffb_c000, 0x1_0000_0000, 2),
                (0x1_0000_0000, 0x1_4000_0000, 1),
            ]
        );
    }

    #[test]
    fn adjacent_regions_are_one() {
        let memory = memory(&[(0, 2 << 20), (2 << 20, 2 << 20)]);
        assert_eq!(low_ram_end(&memory).unwrap(), 4 << 20);
        assert_eq!(memory_map(&memory, 4 << 20).unwrap().len(), 5);
    }

    #[test]
    fn ram_that_begins_elsewhere_or_is_in_pieces_is_refused() {
        assert!(matches!(low_ram_end(&memory(&[(0x1000, 0x1000)])), Err(Error::NoLowRam)));
        let pieces: Vec<_> = (0..200).map(|n| (n << 21, 1 << 20)).collect();
        assert!(matches!(memory_map(&memory(&pieces), 1 << 20), Err(Error::TooManyRanges(203))));
    }
}
