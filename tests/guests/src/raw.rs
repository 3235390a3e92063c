//! Tiny flat code for benchmarks and for tests of the exit path.
//!
//! Each runs at any address, entered at its first byte, and means the same in real mode and in 64-bit mode; all it needs is in
//! registers, so no page table and no GDT has to be made. In real mode an address is an offset in DS (ES for
//! [`string_in`]), so give the segment register the base, also that of a hole in RAM. Those that end do so with one `HLT`,
//! with `ECX` (strings: `EBP`) at zero.

use crate::assembly;

/// `PAUSE` for ever, without an exit: for kicks.
pub fn spin() -> &'static [u8] {
    assembly::spin()
}

/// `HLT` for ever.
pub fn halt() -> &'static [u8] {
    assembly::halt()
}

/// `ECX` times: the byte `AL` to port `DX`.
pub fn port_out() -> &'static [u8] {
    assembly::port_out()
}

/// `ECX` times: a byte from port `DX` to `AL`.
pub fn port_in() -> &'static [u8] {
    assembly::port_in()
}

/// `BP` times: `BX` bytes from `EDI` to port `DX`, with `REP OUTSB`.
pub fn string_out() -> &'static [u8] {
    assembly::string_out()
}

/// `BP` times: `BX` bytes from port `DX` to `ESI`, with `REP INSB`.
pub fn string_in() -> &'static [u8] {
    assembly::string_in()
}

/// `BP` times: `BX` words in real mode (`REP INSW`), doublewords in 64-bit mode (`REP INSD`), from port `DX` to `ESI`.
pub fn string_in_words() -> &'static [u8] {
    assembly::string_in_words()
}

/// `ECX` times: the byte `AL` to the address `EDI`.
pub fn mmio_store() -> &'static [u8] {
    assembly::mmio_store()
}

/// `ECX` times: the byte at the address `EDI` to `AL`.
pub fn mmio_load() -> &'static [u8] {
    assembly::mmio_load()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_meant_for_both_modes() {
        assert_eq!(spin(), [0xf3, 0x90, 0xeb, 0xfc]);
        assert_eq!(halt(), [0xf4, 0xeb, 0xfd]);
        assert_eq!(port_out(), [0xee, 0x67, 0xe2, 0xfc, 0xf4]);
        assert_eq!(port_in(), [0xec, 0x67, 0xe2, 0xfc, 0xf4]);
        assert_eq!(
            string_out(),
            [0x89, 0xd9, 0x89, 0xfe, 0x67, 0xf3, 0x6e, 0xff, 0xcd, 0x75, 0xf5, 0xf4]
        );
        assert_eq!(
            string_in(),
            [0x89, 0xd9, 0x89, 0xf7, 0x67, 0xf3, 0x6c, 0xff, 0xcd, 0x75, 0xf5, 0xf4]
        );
        assert_eq!(
            string_in_words(),
            [0x89, 0xd9, 0x89, 0xf7, 0x67, 0xf3, 0x6d, 0xff, 0xcd, 0x75, 0xf5, 0xf4]
        );
        assert_eq!(mmio_store(), [0x67, 0x88, 0x07, 0x67, 0xe2, 0xfa, 0xf4]);
        assert_eq!(mmio_load(), [0x67, 0x8a, 0x07, 0x67, 0xe2, 0xfa, 0xf4]);
    }
}
