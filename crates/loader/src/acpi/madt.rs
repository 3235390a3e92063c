//! The multiple APIC description table (ACPI 6.5, 5.2.12).

use acpi_tables::madt::{self, EnabledStatus, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;

use super::{Platform, bytes};

/// Where the local APICs are.
const LOCAL_APIC: u32 = 0xfee0_0000;
/// The table's flag: there are 8259A PICs too.
const PCAT_COMPAT: u32 = 1 << 0;
/// From here on an APIC ID is not told in a byte: 255 means all.
const ALL: u32 = 0xff;
/// "MPS INTI flags": active high and level-triggered; conforming to the bus.
const HIGH_LEVEL: u16 = 0b1101;
const CONFORMING: u16 = 0;
/// The GSI of the PIT, and its IRQ on the ISA bus.
const TIMER_GSI: u32 = 2;
const TIMER_IRQ: u8 = 0;

pub fn table(platform: &Platform) -> Sdt {
    let mut body = Vec::new();
    body.extend(LOCAL_APIC.to_le_bytes());
    body.extend(if platform.legacy_pic { PCAT_COMPAT } else { 0 }.to_le_bytes());

    let mut x2apic = false;
    for (uid, &id) in (0_u32..).zip(&platform.apic_ids) {
        match (u8::try_from(uid), u8::try_from(id)) {
            (Ok(small_uid), Ok(small_id)) if uid < ALL && id < ALL => {
                body.extend(bytes(&ProcessorLocalApic::new(
                    small_uid,
                    small_id,
                    EnabledStatus::Enabled,
                )));
            }
            _ => {
                x2apic = true;
                body.extend(processor_x2apic(uid, id));
            }
        }
    }
    let io_apic = &platform.io_apic;
    body.extend(bytes(&madt::IoApic::new(io_apic.id, io_apic.address, io_apic.gsi_base)));
    if platform.legacy_timer {
        body.extend(source_override(TIMER_IRQ, TIMER_GSI, CONFORMING));
    }
    body.extend(source_override(platform.sci_irq, platform.sci_irq.into(), HIGH_LEVEL));
    body.extend(LOCAL_NMI);
    if x2apic {
        body.extend(X2APIC_NMI);
    }
    super::table(b"APIC", 5, &body)
}

/// Processor local x2APIC structure (5.2.12.12).
fn processor_x2apic(uid: u32, id: u32) -> Vec<u8> {
    let mut entry = vec![9, 16, 0, 0];
    for field in [id, EnabledStatus::Enabled as u32, uid] {
        entry.extend(field.to_le_bytes());
    }
    entry
}

/// Interrupt source override structure (5.2.12.5).
fn source_override(irq: u8, gsi: u32, flags: u16) -> Vec<u8> {
    let mut entry = vec![2, 10, 0, irq];
    entry.extend(gsi.to_le_bytes());
    entry.extend(flags.to_le_bytes());
    entry
}

/// Local APIC NMI structure (5.2.12.7): on all CPUs, LINT1.
const LOCAL_NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];
/// Local x2APIC NMI structure (5.2.12.13): the same.
const X2APIC_NMI: [u8; 12] = [10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0];
