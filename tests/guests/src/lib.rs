//! Small hand-made guests, assembled from readable source when this crate is built.
//!
//! They run where stock Linux cannot: on a `/dev/kvm` that has no VT-x or AMD-V behind it, in microseconds an instruction,
//! and in any test that wants to know exactly what its guest does. There is no blob and no assembler but the compiler's own.
//!
//! ```
//! let guest = keel_guests::find("demo").ok_or("no such guest")?;
//! assert_eq!(&guest.image[0x202..0x206], b"HdrS");
//! # Ok::<(), &str>(())
//! ```
//!
//! # Images
//!
//! [`demo`], [`checksum`], [`hostile`] and [`smp_ipi`] have the shape of a Linux bzImage: a loader takes them as it takes a stock kernel
//! and enters them by the 64-bit boot protocol (Linux, `Documentation/arch/x86/boot.rst`). They also have the 16-bit entry,
//! so that QEMU's `-kernel` runs them. They can be loaded at any multiple of 4 KiB under 4 GiB, bring their own page
//! tables, GDT and IDT, and use the memory that `init_size` asks for; one that starts a second CPU also uses the page at 0x8000.
//!
//! [`Guest::payload`] is for tests that do without a loader: flat code, entered at [`ENTRY`] with 64-bit mode on, interrupts off, the
//! payload and 128 KiB behind it mapped at their physical addresses, and RSI = physical address of a `boot_params` page or zero
//! (then there is no command line and no memory map; the demo wants one).
//!
//! | guest | command line | what it does |
//! |---|---|---|
//! | `demo` | any | tells on COM1 what it was given, tries ports, MMIO, timers and an MSI, powers off through ACPI S5 |
//! | `checksum` | `pages=64 cpus=1 ports=1 mmio=1` | computes for ever on `cpus` CPUs, `pages` 4 KiB pages each; `ports=0`, `mmio=0`: without the test device's |
//! | `hostile` | `seed=1 count=1000` | random port, MMIO and MSR accesses |
//! | `smp_ipi` | `count=1000` | two CPUs throw an interrupt back and forth |
//!
//! Numbers are decimal. The state of `checksum` that each iteration gives and checks: general registers, stack, memory,
//! x87 and SSE registers with their control words, DR0 to DR3, CR8, FS, GS and kernel GS base, LSTAR, SYSENTER_ESP and
//! SYSENTER_EIP, local APIC timer (every 16th iteration waits for a tick in `HLT`), ports and MMIO in each width.
//!
//! # The test device
//!
//! A few ports by which the guests talk to a test ([`ports`]), all little-endian doublewords but the last:
//!
//! | port | access | meaning |
//! |---|---|---|
//! | 0x5e0 | write | low half of an MSI's address (the high half is zero) |
//! | 0x5e0 | read | anything but all ones: the device is there |
//! | 0x5e4 | write | an MSI's data; sends it |
//! | 0x5e8 | write | the end: 0x600d_0000 done; 0xbad0_0000 + check that failed; 0xbade_0000 + vector of an unexpected exception |
//! | 0x5ec | write | progress: CPU number << 24 \| iteration (or operations, or rounds) & 0xff_ffff |
//! | 0x5f0 to 0x5ff | any width | 16 bytes that keep what was written; a string's last unit stays |
//!
//! `checksum` also reads MMIO at [`MMIO_PATTERN`] in any width: the byte at address `a` is `a ^ a >> 8`, writes are dropped.
//!
//! After the verdict a guest halts for good; one that failed first tries port 0x501 (`isa-debug-exit`, value 42: QEMU's exit
//! status 85) and then a triple fault, so that without any of these devices failure is still not success.
//!
//! # Modules
//!
//! `asm/image.s` bzImage header and 16-bit entry; `asm/library.s` 64-bit entry, text, time, local APIC, interrupts; `asm/smp.s` a
//! second CPU; one file a guest (the demo has three); [`raw`] flat code for benchmarks; `assembly.rs` symbols to slices.

mod assembly;
pub mod raw;

/// Offset of the 64-bit entry in a [payload](Guest::payload), from the boot protocol.
pub const ENTRY: usize = 0x200;

/// Physical address of the 8 KiB of MMIO that `checksum` reads.
pub const MMIO_PATTERN: core::ops::Range<u64> = 0xd000_0000..0xd000_2000;

/// What a guest writes to [`ports::VERDICT`] when all went well.
pub const VERDICT_GOOD: u32 = 0x600d_0000;

/// The test device's ports, described at the top of this crate.
pub mod ports {
    /// Low half of an MSI's address; reads anything but all ones where the device is there.
    pub const MSI_ADDRESS: u16 = 0x5e0;
    /// An MSI's data; the write sends it.
    pub const MSI_DATA: u16 = 0x5e4;
    /// How the guest ended.
    pub const VERDICT: u16 = 0x5e8;
    /// How far a CPU of the guest is.
    pub const PROGRESS: u16 = 0x5ec;
    /// First of 16 ports that keep what was written to them.
    pub const SCRATCH: u16 = 0x5f0;
}

/// A guest in the shape of a Linux bzImage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Its name, as [`find`] knows it.
    pub name: &'static str,
    /// The whole file, as a loader takes it.
    pub image: &'static [u8],
}

impl Guest {
    /// The image without its setup sectors: flat code, to be entered at [`ENTRY`].
    pub fn payload(&self) -> &'static [u8] {
        let setup_sectors = usize::from(self.image[0x1f1]);
        &self.image[(setup_sectors + 1) * 512..]
    }
}

/// All guests that have an image.
pub fn all() -> [Guest; 4] {
    [
        Guest { name: "demo", image: demo() },
        Guest { name: "checksum", image: checksum() },
        Guest { name: "hostile", image: hostile() },
        Guest { name: "smp_ipi", image: smp_ipi() },
    ]
}

/// The guest of this name, if there is one.
pub fn find(name: &str) -> Option<Guest> {
    all().into_iter().find(|guest| guest.name == name)
}

/// Shows what a machine gives its guest and powers off.
pub fn demo() -> &'static [u8] {
    assembly::demo()
}

/// Computes for ever, and notices if any state changes under it.
pub fn checksum() -> &'static [u8] {
    assembly::checksum()
}

/// Random port, MMIO and MSR accesses.
pub fn hostile() -> &'static [u8] {
    assembly::hostile()
}

/// Two CPUs and an interrupt between them.
pub fn smp_ipi() -> &'static [u8] {
    assembly::smp_ipi()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long(image: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(image[offset..offset + 4].try_into().unwrap())
    }

    #[test]
    fn headers_are_those_of_a_bzimage() {
        for Guest { name, image } in all() {
            assert_eq!(image[0x1f1], 2, "{name}: setup_sects");
            assert_eq!(image[0x1fe..0x200], [0x55, 0xaa], "{name}: boot_flag");
            assert_eq!(
                image[0x200..0x202],
                [0xeb, 0x6a],
                "{name}: jump to 0x26c, the header's end"
            );
            assert_eq!(&image[0x202..0x206], b"HdrS", "{name}: header");
            assert_eq!(image[0x206..0x208], [0x0f, 0x02], "{name}: version");
            assert_eq!(image[0x211], 0x01, "{name}: loadflags");
            assert_eq!(long(image, 0x214), 0x10_0000, "{name}: code32_start");
            assert_eq!(long(image, 0x22c), 0x7fff_ffff, "{name}: initrd_addr_max");
            assert_eq!(long(image, 0x230), 0x1000, "{name}: kernel_alignment");
            assert_eq!(
                image[0x234..0x238],
                [1, 12, 1, 0],
                "{name}: relocatable, min_alignment, xloadflags"
            );
            assert_eq!(long(image, 0x238), 2047, "{name}: cmdline_size");
            assert_eq!(image[0x258..0x260], [0, 0, 0x10, 0, 0, 0, 0, 0], "{name}: pref_address");
        }
    }

    #[test]
    fn sizes_in_the_header_are_the_payloads() {
        for guest in all() {
            let payload = guest.payload().len();
            assert_eq!(payload, guest.image.len() - 1536, "{}", guest.name);
            assert_eq!(long(guest.image, 0x1f4) as usize * 16, payload, "{}: syssize", guest.name);
            assert_eq!(
                long(guest.image, 0x260) as usize,
                payload + 0x2_0000,
                "{}: init_size",
                guest.name
            );
            assert!(payload < 32 * 1024, "{}: {payload} bytes", guest.name);
        }
    }

    #[test]
    fn the_64_bit_entry_is_a_jump_and_the_32_bit_entry_halts() {
        for guest in all() {
            assert_eq!(guest.payload()[..ENTRY], [0xf4; 0x200], "{}", guest.name);
            assert!([0xeb, 0xe9].contains(&guest.payload()[ENTRY]), "{}", guest.name);
        }
    }

    #[test]
    fn page_directories_map_each_address_to_itself() {
        for guest in all() {
            for (page, entry) in guest.payload()[0x1000..0x5000].chunks(8).enumerate() {
                assert_eq!(
                    entry,
                    ((page as u64) << 21 | 0x83).to_le_bytes(),
                    "{}: page {page}",
                    guest.name
                );
            }
        }
    }

    #[test]
    fn the_kernel_version_names_the_guest() {
        for Guest { name, image } in all() {
            let offset = usize::from(u16::from_le_bytes([image[0x20e], image[0x20f]])) + 0x200;
            let text = format!("keel-guests {name}\0");
            assert_eq!(&image[offset..offset + text.len()], text.as_bytes());
        }
    }

    #[test]
    fn guests_are_found_by_name() {
        assert_eq!(find("hostile").map(|guest| guest.image), Some(hostile()));
        assert_eq!(find("windows"), None);
    }
}
