//! The PC's own devices, each a plain struct that works without a machine.
//!
//! A device here implements [`Device`](keel_device_model::Device) and the way it is reached,
//! [`PortIo`](keel_device_model::PortIo) or [`MmioIo`](keel_device_model::MmioIo); a VMM seats it, wires its line and maps it at the ports its
//! module names:
//!
//! ```
//! use std::sync::Arc;
//! use keel_device_model::{Board, HostClock, Line, Roster, Seat, Surroundings, testing::Requests};
//! use keel_devices::{Shifted, i8042, serial};
//! use keel_hypervisor::{Bus, Width};
//!
//! let surroundings = Surroundings {
//!     clock: Arc::new(HostClock::stopped_at(0)),
//!     machine: Arc::new(Requests::default()),
//! };
//! let (board, mut roster) = (Board::new(), Roster::new());
//!
//! let com1 = serial::Serial::new(Box::new(std::io::stdout()));
//! let com1 = Seat::new(com1, Line::unconnected(), &surroundings);
//! let first = serial::COM1.port;
//! board.map_pio("serial", first..=first + serial::PORTS - 1, serial::WIDEST, com1.clone())?;
//! roster.add("serial", com1);
//!
//! let keyboard = Seat::new(i8042::I8042::new(), Line::unconnected(), &surroundings);
//! board.map_pio("i8042", i8042::DATA_PORT..=i8042::DATA_PORT, i8042::WIDEST, keyboard.clone())?;
//! let command = Shifted::new(keyboard.clone(), i8042::COMMAND_PORT - i8042::DATA_PORT);
//! board.map_pio("i8042", i8042::COMMAND_PORT..=i8042::COMMAND_PORT, i8042::WIDEST, command)?;
//! roster.add("i8042", keyboard);
//!
//! let mut bus = board.bus();
//! bus.pio_write(serial::COM1.port, Width::Byte, u32::from(b'\n'));
//! assert_eq!(bus.pio_read(i8042::COMMAND_PORT, Width::Byte), 0x14);
//! # Ok::<(), keel_device_model::MapError>(())
//! ```
//!
//! # Modules
//!
//! | file | subject | at |
//! |---|---|---|
//! | [`serial`] | 16550A serial ports | 0x3f8, 0x2f8, 0x3e8, 0x2e8 |
//! | [`i8042`] | keyboard controller without a keyboard: CPU reset | 0x60, 0x64 |
//! | [`rtc`] | MC146818 clock and memory | 0x70 |
//! | [`port61`] | refresh bit, speaker gate | 0x61 |
//! | [`debug_console`] | prints | 0xe9, 0x402 |
//! | [`debug_exit`] | ends the VMM | 0x501 |
//! | [`pvpanic`] | the guest has panicked | 0x505 |
//! | [`msi_test`] | a doorbell for test guests | 0x5e0 |
//! | [`acpi_pm`] | PM1 registers, PM timer, power button | 0x600 |
//! | [`reset_register`] | ACPI's reset register | 0xcf9 |
//! | [`ioapic`] | I/O APIC for the split interrupt controller | memory 0xfec0_0000 |
//! | `msi` | [`MsiSink`]: where interrupts without a line go | |
//! | `shifted` | [`Shifted`]: maps part of a device | |
//! | `output` | where characters go | |
//! | `check` | refuses impossible saved states | |
#![forbid(unsafe_code)]

pub mod acpi_pm;
mod check;
pub mod debug_console;
pub mod debug_exit;
pub mod i8042;
pub mod ioapic;
mod msi;
pub mod msi_test;
mod output;
pub mod port61;
pub mod pvpanic;
pub mod reset_register;
pub mod rtc;
pub mod serial;
mod shifted;

pub use msi::MsiSink;
pub use shifted::Shifted;
