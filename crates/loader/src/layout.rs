//! Where in the first MiB of guest RAM this crate puts what a kernel is started with, as guest physical addresses.
//!
//! All of it is RAM in the memory map: a kernel takes what it needs of it and then uses the pages. Only the ACPI
//! tables stay, in the area that belongs to the BIOS on a PC.

/// The global descriptor table.
pub const GDT: u64 = 0x500;
/// PVH: `hvm_start_info`.
pub const START_INFO: u64 = 0x6000;
/// PVH: the list of modules, of which the initrd is the only one.
pub const MODULES: u64 = 0x6040;
/// PVH: the memory map, up to [`BOOT_PARAMS`].
pub const MEMORY_MAP: u64 = 0x6080;
/// Linux: `boot_params`, one page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// The end of a page of stack.
pub const STACK_END: u64 = 0x9000;
/// Linux: six pages of page tables.
pub const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The most bytes of a command line, its final NUL among them.
pub const COMMAND_LINE_SIZE: usize = 0x1_0000;
/// Where the extended BIOS data area begins, and RAM ends for a while.
pub const EBDA: u64 = 0x9_fc00;
/// Where video memory begins and the EBDA ends.
pub const VIDEO: u64 = 0xa_0000;
/// The part of the BIOS area that a kernel searches for the ACPI root pointer (ACPI 6.5, 5.2.5.1).
pub const BIOS: u64 = 0xe_0000;
/// The end of the BIOS area: from here on there is RAM again.
pub const HIGH: u64 = 0x10_0000;
/// From here to 4 GiB is the BIOS of a PC; the last pages before it are what KVM takes for itself on Intel CPUs.
pub const HIGH_BIOS: u64 = 0xfffb_c000;
