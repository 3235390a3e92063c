//! ACPI tables: what an operating system learns the platform from (ACPI 6.5).
//!
//! | table | tells |
//! |---|---|
//! | RSDP, XSDT | where the others are |
//! | FADT | power management registers, reset, which PC parts there are |
//! | FACS | nothing: there is no sleep state to wake from |
//! | MADT | CPUs, I/O APIC, interrupts that are not as on a PC |
//! | DSDT | sleep state S5, CPUs, serial ports, clock, panic device, and what the VMM adds |

mod dsdt;
mod fadt;
mod madt;
#[cfg(test)]
pub(crate) mod tests;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use keel_memory::Memory;
use keel_memory::layout::PAGE_SIZE;

use crate::layout::{BIOS, HIGH};
use crate::start::write;
use crate::{Error, Result};

const OEM_ID: [u8; 6] = *b"KEEL  ";
const OEM_TABLE_ID: [u8; 8] = *b"KEELVMM ";
const OEM_REVISION: u32 = 1;
/// The length of the header of every table but RSDP and FACS, in bytes.
const HEADER_LEN: u32 = 36;
/// The tables begin on lines of 64 bytes, as the FACS must (ACPI 6.5, 5.2.10).
const ALIGNMENT: usize = 64;
/// The most CPUs and serial ports: their names in the DSDT have three hexadecimal digits.
const MAX_NAMED: usize = 0x1000;

/// What the tables say of the platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// The local APIC IDs of the CPUs, the boot CPU first.
    pub apic_ids: Vec<u32>,
    /// The I/O APIC.
    pub io_apic: IoApic,
    /// There are two 8259A PICs.
    pub legacy_pic: bool,
    /// The 8254 PIT is on GSI 2 rather than on GSI 0, as on a PC.
    pub legacy_timer: bool,
    /// The GSI of the system control interrupt: level-triggered, active high. On a PC 9.
    pub sci_irq: u8,
    /// The port of the PM1a event registers: 4 bytes, status and enable.
    pub pm1_event: u16,
    /// The port of the PM1a control register: 2 bytes.
    pub pm1_control: u16,
    /// The port of the PM timer: 4 bytes, and the timer has 32 bits.
    pub pm_timer: u16,
    /// What resets the machine.
    pub reset: Reset,
    /// The `SLP_TYP` that powers off, 0 to 7.
    pub s5_sleep_type: u8,
    /// The serial ports (16550), COM1 first.
    pub serial: Vec<Serial>,
    /// There is a real-time clock (MC146818) at port 0x70 with IRQ 8 and its century at index 0x32.
    pub rtc: bool,
    /// The port of the panic device.
    pub pvpanic: Option<u16>,
    /// There is a keyboard controller (8042).
    pub i8042: bool,
    /// There is a VGA.
    pub vga: bool,
    /// AML of further devices: each a list of terms in the DSDT's root scope.
    pub aml: Vec<Vec<u8>>,
}

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Its APIC ID.
    pub id: u8,
    /// The guest physical address of its registers.
    pub address: u32,
    /// The GSI of its first input.
    pub gsi_base: u32,
}

/// A port that resets the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// The port.
    pub port: u16,
    /// The byte to write to it.
    pub value: u8,
}

/// A serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial {
    /// The first of its 8 ports.
    pub port: u16,
    /// Its interrupt, edge-triggered.
    pub irq: u8,
}

/// All tables, and where they go.
#[derive(Clone, Debug)]
pub struct Tables {
    /// Guest physical addresses and what is to be written there. The RSDP is at [`BIOS`].
    pub pieces: [(u64, Vec<u8>); 2],
    /// Where RAM now ends: before its end if the tables took it.
    pub ram_end: u64,
}

impl Tables {
    /// Makes the tables for the BIOS area, or, where they do not fit there, for the end of the low RAM, at `ram_end`
    /// ([`crate::map::low_ram_end`]).
    ///
    /// # Errors
    ///
    /// [`Error::Acpi`].
    pub fn place(platform: &Platform, ram_end: u64) -> Result<Tables> {
        let base = BIOS + ALIGNMENT as u64;
        let (tables, xsdt) = build(platform, base)?;
        if base + tables.len() as u64 <= HIGH {
            return Ok(Tables { pieces: [(BIOS, rsdp(xsdt)), (base, tables)], ram_end });
        }
        let len = tables.len();
        let room = ram_end.saturating_sub(HIGH) as usize;
        if len > room {
            return Err(Error::Acpi {
                what: "so many devices, in bytes,",
                given: len,
                limit: room,
            });
        }
        let base = (ram_end - len as u64) & !(PAGE_SIZE - 1);
        let (tables, xsdt) = build(platform, base)?;
        Ok(Tables { pieces: [(BIOS, rsdp(xsdt)), (base, tables)], ram_end: base })
    }

    /// Writes the tables to where they go.
    ///
    /// # Errors
    ///
    /// [`Error::Write`].
    pub fn write(&self, memory: &Memory) -> Result<()> {
        self.pieces.iter().try_for_each(|(gpa, bytes)| write(memory, bytes, "ACPI tables", *gpa))
    }
}

fn rsdp(xsdt: u64) -> Vec<u8> {
    bytes(&Rsdp::new(OEM_ID, xsdt))
}

/// All tables but the RSDP, as they are to stand at `base`, and where the XSDT then is.
fn build(platform: &Platform, base: u64) -> Result<(Vec<u8>, u64)> {
    for (what, given) in
        [("CPUs", platform.apic_ids.len()), ("serial ports", platform.serial.len())]
    {
        if given > MAX_NAMED {
            return Err(Error::Acpi { what, given, limit: MAX_NAMED });
        }
    }
    let mut all = Vec::new();
    let mut put = |table: &dyn Aml| {
        let at = all.len().next_multiple_of(ALIGNMENT);
        all.resize(at, 0);
        table.to_aml_bytes(&mut all);
        base + at as u64
    };
    let facs = put(&FACS::new());
    let dsdt = put(&dsdt::table(platform));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    // The FADT first: there are systems that look no further for it.
    xsdt.add_entry(put(&fadt::table(platform, facs, dsdt)));
    xsdt.add_entry(put(&madt::table(platform)));
    let xsdt = put(&xsdt);
    Ok((all, xsdt))
}

/// A table of `body` behind the common header.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(*signature, HEADER_LEN, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}
