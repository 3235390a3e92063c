//! The differentiated system description table (ACPI 6.5, 5.2.11.1): AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use super::{Platform, bytes};

/// `_STA`: present, enabled, shown, working (6.3.7).
const PRESENT: u8 = 0xf;
const RTC_PORT: u16 = 0x70;
const RTC_IRQ: u32 = 8;
const SERIAL_PORTS: u8 = 8;

pub fn table(platform: &Platform) -> Sdt {
    let mut body = sleep_state(platform.s5_sleep_type);
    let mut devices = Vec::new();
    for uid in 0..platform.apic_ids.len() {
        devices.extend(cpu(uid));
    }
    for (index, serial) in platform.serial.iter().enumerate() {
        let port = IO::new(serial.port, serial.port, 1, SERIAL_PORTS);
        let id = EISAName::new("PNP0501");
        devices.extend(device(
            &name('S', index),
            &id,
            index + 1,
            &[&port, &irq(serial.irq.into())],
        ));
    }
    if platform.rtc {
        let port = IO::new(RTC_PORT, RTC_PORT, 1, 2);
        devices.extend(device("RTC_", &EISAName::new("PNP0B00"), 0, &[&port, &irq(RTC_IRQ)]));
    }
    if let Some(port) = platform.pvpanic {
        let port = IO::new(port, port, 1, 1);
        devices.extend(device("PEVT", &"QEMU0001", 0, &[&port]));
    }
    body.extend(Scope::raw(Path::new("\\_SB_"), devices));
    for aml in &platform.aml {
        body.extend(aml);
    }
    super::table(b"DSDT", 2, &body)
}

/// `\_S5`: what to write to PM1a and PM1b to power off (7.4.2).
fn sleep_state(sleep_type: u8) -> Vec<u8> {
    bytes(&Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&sleep_type, &sleep_type, &0_u8, &0_u8]),
    ))
}

/// A CPU, which the MADT knows by the same number (8.4).
fn cpu(uid: usize) -> Vec<u8> {
    let id = Name::new(Path::new("_HID"), &"ACPI0007");
    let number = Name::new(Path::new("_UID"), &uid);
    bytes(&Device::new(Path::new(&name('C', uid)), vec![&id, &number]))
}

fn device(name: &str, id: &dyn Aml, uid: usize, resources: &[&dyn Aml]) -> Vec<u8> {
    let id = Name::new(Path::new("_HID"), id);
    let number = Name::new(Path::new("_UID"), &uid);
    let status = Name::new(Path::new("_STA"), &PRESENT);
    let resources = Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources.to_vec()));
    bytes(&Device::new(Path::new(name), vec![&id, &number, &status, &resources]))
}

/// An interrupt of the ISA bus: edge-triggered, active high, not shared.
fn irq(number: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, number)
}

/// The name of the device of a kind with this index, which is below [`super::MAX_NAMED`].
fn name(kind: char, index: usize) -> String {
    format!("{kind}{index:03X}")
}
