//! The fixed ACPI description table (ACPI 6.5, 5.2.9).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform};

/// `IAPC_BOOT_ARCH` (table 5.11): there are devices on an ISA or LPC bus.
const LEGACY_DEVICES: u16 = 1 << 0;
const KEYBOARD_CONTROLLER: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
const NO_RTC: u16 = 1 << 5;
/// Where the century is in the real-time clock's memory.
const CENTURY: u8 = 0x32;
/// Latencies, in microseconds, that say a CPU has no state C2 and no state C3.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

pub fn table(platform: &Platform, facs: u64, dsdt: u64) -> FADT {
    // No SMI command port: ACPI is on from the start.
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .dsdt_32(dsdt as u32)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton) // none among the fixed registers, unlike the power button
        .flag(Flags::FixRtc) // and no wake-up by the clock
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    // What flat logical addressing reaches is 8 CPUs.
    if platform.apic_ids.iter().any(|id| *id > 7) {
        fadt = fadt.flag(Flags::ForceApicPhysicalDestinationMode);
    }

    fadt.sci_int = u16::from(platform.sci_irq).into();
    fadt.pm1a_evt_blk = u32::from(platform.pm1_event).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(platform.pm1_event, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(platform.pm1_control).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(platform.pm1_control, 16, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(platform.pm_timer).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(platform.pm_timer, 32, AccessSize::DwordAccess);
    fadt.reset_reg = port(platform.reset.port, 8, AccessSize::ByteAccess);
    fadt.reset_value = platform.reset.value;
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();

    let mut architecture = 0;
    if platform.i8042 || platform.pvpanic.is_some() || !platform.serial.is_empty() {
        architecture |= LEGACY_DEVICES;
    }
    if platform.i8042 {
        architecture |= KEYBOARD_CONTROLLER;
    }
    if !platform.vga {
        architecture |= NO_VGA;
    }
    if platform.rtc {
        fadt.century = CENTURY;
    } else {
        architecture |= NO_RTC;
    }
    fadt.iapc_boot_arch = architecture.into();
    fadt.finalize()
}

fn port(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}
