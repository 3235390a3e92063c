//! Kernels, initrds and ACPI tables into guest RAM, and the registers a kernel is entered with.
//!
//! ```
//! use keel_hypervisor::state::CpuState;
//! use keel_loader::{Error, Image, Linux, acpi};
//! use keel_memory::{GuestRam, RamConfig};
//!
//! fn load(ram: &GuestRam, kernel: &mut Image, platform: &acpi::Platform) -> keel_loader::Result<CpuState> {
//!     let entry = Linux { kernel, initrd: None, command_line: "console=ttyS0", acpi: platform }.load(ram.memory())?;
//!     let mut boot_cpu = CpuState::default(); // that of a vCPU after reset
//!     entry.apply(&mut boot_cpu);
//!     Ok(boot_cpu)
//! }
//!
//! let ram = GuestRam::new(&RamConfig::new(16 << 20))?;
//! let mut kernel = Image::bytes("hello.txt", b"hello");
//! let error = load(&ram, &mut kernel, &platform()).unwrap_err();
//! assert!(error.to_string().starts_with("hello.txt is no Linux or PVH kernel: it looks like text"));
//! # fn platform() -> acpi::Platform {
//! #     acpi::Platform {
//! #         apic_ids: vec![0],
//! #         io_apic: acpi::IoApic { id: 1, address: 0xfec0_0000, gsi_base: 0 },
//! #         legacy_pic: true,
//! #         legacy_timer: true,
//! #         sci_irq: 9,
//! #         pm1_event: 0x600,
//! #         pm1_control: 0x604,
//! #         pm_timer: 0x608,
//! #         reset: acpi::Reset { port: 0xcf9, value: 0xf },
//! #         s5_sleep_type: 5,
//! #         serial: vec![],
//! #         rtc: true,
//! #         pvpanic: None,
//! #         i8042: true,
//! #         vga: false,
//! #         aml: vec![],
//! #     }
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Files are hostile: whatever they hold ends in an [`Error`] that says what is wrong and what would help, and at most
//! some kilobytes of them are ever on this process's heap.
//!
//! # Modules
//!
//! | file | subject |
//! |---|---|
//! | `linux` | [`Linux`]: all steps in order |
//! | `image` | [`Image`]: where a kernel or initrd comes from |
//! | [`kernel`], `bzimage`, `elf` | the formats of kernels |
//! | [`initrd`] | where an initrd goes |
//! | `looks` | what a file that is no kernel looks like |
//! | [`acpi`] | [`acpi::Platform`] and the tables that tell it |
//! | [`map`], [`layout`] | the memory map; what stands where in the first MiB |
//! | [`start`] | `boot_params`, `hvm_start_info`, command line |
//! | `entry` | [`Entry`]: registers, descriptors, page tables; [`set_memory_types`] |
//! | `error` | [`Error`] |
#![forbid(unsafe_code)]

pub mod acpi;
mod bzimage;
mod elf;
mod entry;
mod error;
mod image;
pub mod initrd;
pub mod kernel;
pub mod layout;
mod linux;
mod looks;
pub mod map;
pub mod start;
#[cfg(test)]
mod tests;

pub use entry::{Entry, set_memory_types};
pub use error::{Error, Result};
pub use image::Image;
pub use linux::Linux;
