//! Where RAM is in a PC's physical address space.

use crate::Error;

/// The size of a page of guest memory, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Where RAM below 4 GiB ends at the latest, in bytes: from here to [`HOLE_END`] is room for devices.
pub const HOLE_START: u64 = 3 << 30;

/// Where RAM goes on above the hole, in bytes.
pub const HOLE_END: u64 = 4 << 30;

/// The most RAM, in bytes: 2^46, what fits with the hole below the 2^47 bytes of address space a process has.
pub const MAX_SIZE: u64 = 1 << 46;

/// A contiguous range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first guest physical address.
    pub start: u64,
    /// The length in bytes.
    pub len: u64,
}

/// The ranges of RAM of a PC with `size` bytes of it: one below the hole under 4 GiB, and what does not fit there above it.
///
/// # Errors
///
/// [`Error::Size`] unless `size` is a multiple of [`PAGE_SIZE`], from one page to [`MAX_SIZE`].
///
/// ```
/// use keel_memory::layout::{self, Range};
/// assert_eq!(layout::ranges(4 << 30)?, [
///     Range { start: 0, len: 3 << 30 },
///     Range { start: 4 << 30, len: 1 << 30 },
/// ]);
/// # Ok::<(), keel_memory::Error>(())
/// ```
pub fn ranges(size: u64) -> Result<Vec<Range>, Error> {
    if size == 0 || size > MAX_SIZE || !size.is_multiple_of(PAGE_SIZE) {
        return Err(Error::Size(size));
    }
    let low = size.min(HOLE_START);
    let mut ranges = vec![Range { start: 0, len: low }];
    if size > low {
        ranges.push(Range { start: HOLE_END, len: size - low });
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_that_can_not_be() {
        for size in [0, 1, PAGE_SIZE + 1, MAX_SIZE + PAGE_SIZE, u64::MAX] {
            assert!(matches!(ranges(size), Err(Error::Size(wrong)) if wrong == size));
        }
    }

    proptest! {
        #[test]
        fn ranges_hold_all_of_it_and_leave_the_hole(pages in 1..=MAX_SIZE / PAGE_SIZE) {
            let size = pages * PAGE_SIZE;
            let ranges = ranges(size).unwrap();
            prop_assert_eq!(ranges.iter().map(|range| range.len).sum::<u64>(), size);
            for range in ranges {
                prop_assert!(range.start + range.len <= HOLE_START || range.start >= HOLE_END);
            }
        }
    }
}
