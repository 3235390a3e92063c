//! The assembler's output as slices: the one place of this crate that is `unsafe`.
#![allow(
    unsafe_code,
    reason = "assembled code is reached through symbols, which only an unsafe block may read"
)]

// One block, because the guests use the macros of the first three files and the assembler knows them only within a block.
core::arch::global_asm!(
    ".pushsection .rodata.keel_guests, \"a\", @progbits",
    include_str!("asm/image.s"),
    include_str!("asm/library.s"),
    include_str!("asm/smp.s"),
    include_str!("asm/demo.s"),
    include_str!("asm/demo_acpi.s"),
    include_str!("asm/demo_io.s"),
    include_str!("asm/checksum.s"),
    include_str!("asm/hostile.s"),
    include_str!("asm/smp_ipi.s"),
    include_str!("asm/raw.s"),
    ".popsection",
    options(raw)
);

/// Makes a function that returns the bytes between two symbols of the assembly above.
macro_rules! assembled {
    ($($name:ident: $first:ident .. $end:ident;)*) => {
        unsafe extern "C" {
            $(static $first: u8; static $end: u8;)*
        }
        $(pub(crate) fn $name() -> &'static [u8] {
            let first = &raw const $first;
            let length = (&raw const $end).addr() - first.addr();
            // SAFETY: both symbols stand in one section of the assembly above, `$end` behind `$first`, and what is between them is
            // initialised, never written and there for the whole run.
            unsafe { core::slice::from_raw_parts(first, length) }
        })*
    };
}

assembled! {
    demo: keel_guest_demo .. keel_guest_demo_end;
    checksum: keel_guest_checksum .. keel_guest_checksum_end;
    hostile: keel_guest_hostile .. keel_guest_hostile_end;
    smp_ipi: keel_guest_smp_ipi .. keel_guest_smp_ipi_end;
    spin: keel_raw_spin .. keel_raw_spin_end;
    halt: keel_raw_halt .. keel_raw_halt_end;
    port_out: keel_raw_port_out .. keel_raw_port_out_end;
    port_in: keel_raw_port_in .. keel_raw_port_in_end;
    string_out: keel_raw_string_out .. keel_raw_string_out_end;
    string_in: keel_raw_string_in .. keel_raw_string_in_end;
    string_in_words: keel_raw_string_in_words .. keel_raw_string_in_words_end;
    mmio_store: keel_raw_mmio_store .. keel_raw_mmio_store_end;
    mmio_load: keel_raw_mmio_load .. keel_raw_mmio_load_end;
}
