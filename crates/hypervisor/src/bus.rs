//! What a vCPU is given to reach the machine with: port and memory-mapped I/O.

/// The size of one access, as the guest's instruction made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Width {
    /// 1 byte (8 bits).
    Byte = 1,
    /// 2 bytes (16 bits).
    Word = 2,
    /// 4 bytes (32 bits).
    Dword = 4,
    /// 8 bytes (64 bits). Never used for port I/O.
    Qword = 8,
}

impl Width {
    /// The number of bytes: 1, 2, 4 or 8.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self as u64
    }

    /// A mask of the bits an access of this width carries.
    #[inline]
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self as u32)
    }

    /// The width of `bytes` bytes, if there is one.
    #[inline]
    pub const fn from_bytes(bytes: u64) -> Option<Width> {
        match bytes {
            1 => Some(Width::Byte),
            2 => Some(Width::Word),
            4 => Some(Width::Dword),
            8 => Some(Width::Qword),
            _ => None,
        }
    }

    /// The next smaller width, if there is one.
    #[inline]
    pub const fn half(self) -> Option<Width> {
        match self {
            Width::Byte => None,
            Width::Word => Some(Width::Byte),
            Width::Dword => Some(Width::Word),
            Width::Qword => Some(Width::Dword),
        }
    }
}

/// The machine as a vCPU sees it. A capability handed to [`Vcpu::run`](crate::Vcpu::run), called in place
/// for every access that the backend does not handle itself.
///
/// Values are zero-extended: bits above the width are zero when given, and ignored when returned.
/// A repeated string instruction arrives as one call per unit, in the order the CPU would have made them.
///
/// A bus has no way to fail: an access that nothing claims reads as all ones, a write to it is dropped.
pub trait Bus {
    /// `IN` of `width` (at most [`Width::Dword`]) from `port`.
    fn pio_read(&mut self, port: u16, width: Width) -> u32;

    /// `OUT` of `width` (at most [`Width::Dword`]) to `port`.
    fn pio_write(&mut self, port: u16, width: Width, value: u32);

    /// A load of `width` from a guest physical address that no memory slot backs.
    ///
    /// The address need not be aligned to the width.
    fn mmio_read(&mut self, gpa: u64, width: Width) -> u64;

    /// A store of `width` to a guest physical address that no writable memory slot backs.
    fn mmio_write(&mut self, gpa: u64, width: Width, value: u64);

    /// A local APIC has seen the end of an interrupt of `vector` that a user-space I/O APIC must know about
    /// (split interrupt controller only, see [`Interrupts::Split`](crate::Interrupts::Split)).
    fn end_of_interrupt(&mut self, vector: u8);
}

/// Splits an access of `len` bytes at `addr` that has no [`Width`] of its own into units that have one.
///
/// A load or store that crosses a page reaches the bus in pieces of any length from 1 to 8 bytes; devices are
/// promised units only. Each unit is the largest that is naturally aligned and still fits.
///
/// ```
/// use keel_hypervisor::{Width, units};
/// let three: Vec<_> = units(0x1001, 3).collect();
/// assert_eq!(three, [(0, Width::Byte), (1, Width::Word)]);
/// ```
pub fn units(addr: u64, len: u64) -> impl Iterator<Item = (u64, Width)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = len.checked_sub(done).filter(|left| *left > 0)?;
        let at = addr.wrapping_add(done);
        let aligned = if at == 0 { 8 } else { 1 << at.trailing_zeros().min(3) };
        let fits = 1 << left.ilog2().min(3);
        let unit = Width::from_bytes(std::cmp::min::<u64>(aligned, fits))?;
        let offset = done;
        done += unit.bytes();
        Some((offset, unit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn masks_cover_their_width() {
        assert_eq!(Width::Byte.mask(), 0xff);
        assert_eq!(Width::Word.mask(), 0xffff);
        assert_eq!(Width::Dword.mask(), 0xffff_ffff);
        assert_eq!(Width::Qword.mask(), u64::MAX);
    }

    proptest! {
        #[test]
        fn units_tile_the_access(addr: u64, len in 0u64..=16) {
            let mut next = 0;
            for (offset, width) in units(addr, len) {
                prop_assert_eq!(offset, next);
                prop_assert_eq!(addr.wrapping_add(offset) % width.bytes(), 0);
                next += width.bytes();
            }
            prop_assert_eq!(next, len);
        }
    }
}
