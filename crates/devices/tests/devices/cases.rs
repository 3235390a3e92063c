//! Each device, with what the tests need to know of it.

use std::sync::{Arc, Mutex};

use keel_device_model::{Device, Lent, MmioIo, PortIo};
use keel_devices::{
    MsiSink, acpi_pm, debug_console, debug_exit, i8042, ioapic, msi_test, port61, pvpanic,
    reset_register, rtc, serial,
};
use keel_hypervisor::{Msi, Width};

use crate::ops::Op;

/// What a device told those it is wired to.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub fn note(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl MsiSink for Log {
    fn send(&self, msi: Msi) {
        self.note(format!("{msi:x?}"));
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.note(format!("{bytes:x?}"));
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A device under test.
pub trait Case: 'static {
    type Device: Device;
    /// How many ports or bytes it takes.
    const SPAN: u64;
    /// Where it has registers.
    const PLACES: &'static [u64];
    const WIDEST: Width;
    /// Part of its state outlives a reset.
    const BATTERY: bool = false;

    fn make(log: &Log) -> Self::Device;
    fn read(device: &mut Self::Device, offset: u64, width: Width, lent: &Lent<'_>) -> u64;
    fn write(device: &mut Self::Device, offset: u64, width: Width, value: u64, lent: &Lent<'_>);

    /// Something from the host's side, if it has one.
    fn host(_device: &mut Self::Device, _value: u32, _lent: &Lent<'_>) {}
    /// Ends what the host's side has begun.
    fn quiet(_device: &mut Self::Device) {}
    /// What is done before the state for the golden file is taken: something in every register.
    fn golden() -> Vec<Op>;
}

/// The parts of a [`Case`] that are the same for all devices on ports.
macro_rules! on_ports {
    ($device:ty, $span:expr, $places:expr, $widest:expr) => {
        type Device = $device;
        const SPAN: u64 = $span as u64;
        const PLACES: &'static [u64] = &$places;
        const WIDEST: Width = $widest;

        fn read(device: &mut Self::Device, offset: u64, width: Width, lent: &Lent<'_>) -> u64 {
            device.pio_read(offset as u16, width, lent).into()
        }
        fn write(
            device: &mut Self::Device,
            offset: u64,
            width: Width,
            value: u64,
            lent: &Lent<'_>,
        ) {
            device.pio_write(offset as u16, width, value as u32, lent);
        }
    };
}

fn bytes(writes: &[(u64, u64)]) -> Vec<Op> {
    writes.iter().map(|(offset, value)| Op::Write(*offset, Width::Byte, *value)).collect()
}

pub struct Serial;

impl Case for Serial {
    on_ports!(serial::Serial, serial::PORTS, [0, 1, 2, 3, 4, 5, 6, 7], serial::WIDEST);

    fn make(log: &Log) -> serial::Serial {
        let room = log.clone();
        let mut serial = serial::Serial::new(Box::new(log.clone()));
        serial.on_room(Box::new(move || room.note("room".into())));
        serial
    }
    fn host(serial: &mut serial::Serial, value: u32, lent: &Lent<'_>) {
        serial.receive(&[value as u8; 20][..value as usize % 20], lent);
        // Whoever offers input waits for room, and is another after a restore: so nobody waits.
        serial.receive(&[], lent);
    }
    fn golden() -> Vec<Op> {
        let mut ops =
            bytes(&[(3, 0x83), (0, 0x0c), (1, 0x01), (3, 0x1b), (2, 0xc7), (1, 0x0f), (7, 0x5a)]);
        // Modem lines move, more characters than fit come back, and the line is left connected.
        ops.extend(bytes(&[(4, 0x10), (4, 0x1f)]));
        ops.extend((0..20).map(|value| Op::Write(0, Width::Byte, value)));
        ops.extend(bytes(&[(4, 0x0b)]));
        ops
    }
}

pub struct I8042;

impl Case for I8042 {
    on_ports!(i8042::I8042, 5, [0, 4], i8042::WIDEST);

    fn make(_: &Log) -> i8042::I8042 {
        i8042::I8042::new()
    }
    fn golden() -> Vec<Op> {
        bytes(&[(4, 0x60), (0, 0x65), (4, 0xdd), (4, 0xd3), (0, 0x5a), (4, 0xd1)])
    }
}

pub struct Rtc;

impl Case for Rtc {
    on_ports!(rtc::Rtc, 2, [0, 1], rtc::WIDEST);
    const BATTERY: bool = true;

    fn make(_: &Log) -> rtc::Rtc {
        rtc::Rtc::new(rtc::Config {
            offset_s: 951_782_400,
            ram_below_4g: 3 << 30,
            ram_above_4g: 1 << 30,
        })
    }
    fn golden() -> Vec<Op> {
        let mut ops =
            bytes(&[(0, 0x0b), (1, 0x72), (0, 0x09), (1, 0x24), (0, 0x05), (1, 0xc0), (0, 0x03)]);
        ops.extend([Op::Advance(1_234_567_890), Op::Expire]);
        ops.extend(bytes(&[(1, 0xc0), (0, 0x01), (1, 0x59), (0, 0x4f), (1, 0xa5), (0, 0xcf)]));
        ops
    }
}

pub struct Port61;

impl Case for Port61 {
    on_ports!(port61::Port61, 1, [0], port61::WIDEST);

    fn make(_: &Log) -> port61::Port61 {
        port61::Port61::new()
    }
    fn golden() -> Vec<Op> {
        bytes(&[(0, 0x0d)])
    }
}

pub struct DebugConsole;

impl Case for DebugConsole {
    on_ports!(debug_console::DebugConsole, 1, [0], debug_console::WIDEST);

    fn make(log: &Log) -> debug_console::DebugConsole {
        debug_console::DebugConsole::new(Box::new(log.clone()))
    }
    fn golden() -> Vec<Op> {
        bytes(&[(0, 0x41)])
    }
}

pub struct DebugExit;

impl Case for DebugExit {
    on_ports!(debug_exit::DebugExit, debug_exit::PORTS, [0], Width::Word);

    fn make(_: &Log) -> debug_exit::DebugExit {
        debug_exit::DebugExit
    }
    fn golden() -> Vec<Op> {
        bytes(&[(0, 0x10)])
    }
}

pub struct ResetRegister;

impl Case for ResetRegister {
    on_ports!(reset_register::ResetRegister, 1, [0], reset_register::WIDEST);

    fn make(_: &Log) -> reset_register::ResetRegister {
        reset_register::ResetRegister::new()
    }
    fn golden() -> Vec<Op> {
        bytes(&[(0, 0x0e)])
    }
}

pub struct Pvpanic;

impl Case for Pvpanic {
    on_ports!(pvpanic::Pvpanic, 1, [0], pvpanic::WIDEST);

    fn make(_: &Log) -> pvpanic::Pvpanic {
        pvpanic::Pvpanic
    }
    fn golden() -> Vec<Op> {
        bytes(&[(0, 1)])
    }
}

pub struct MsiTest;

impl Case for MsiTest {
    on_ports!(msi_test::MsiTest, msi_test::PORTS, [0, 4], msi_test::WIDEST);

    fn make(log: &Log) -> msi_test::MsiTest {
        msi_test::MsiTest::new(Arc::new(log.clone()))
    }
    fn golden() -> Vec<Op> {
        vec![Op::Write(0, Width::Dword, 0xfee0_1000), Op::Write(4, Width::Dword, 0x4041)]
    }
}

pub struct AcpiPm;

impl Case for AcpiPm {
    on_ports!(acpi_pm::AcpiPm, acpi_pm::PORTS, [0, 2, 4, 5, 8], acpi_pm::WIDEST);

    fn make(_: &Log) -> acpi_pm::AcpiPm {
        acpi_pm::AcpiPm::new()
    }
    fn host(device: &mut acpi_pm::AcpiPm, _value: u32, lent: &Lent<'_>) {
        device.press_power_button(lent);
    }
    fn golden() -> Vec<Op> {
        vec![
            Op::Write(2, Width::Word, 0x0521),
            Op::Advance(700_000_000_000),
            Op::Expire,
            Op::Host(0),
            Op::Write(4, Width::Word, 0x1402),
        ]
    }
}

pub struct IoApic;

impl Case for IoApic {
    type Device = ioapic::IoApic;
    const SPAN: u64 = ioapic::SIZE;
    const PLACES: &'static [u64] = &[0, 0x10, 0x10, 0x10, 0x40];
    const WIDEST: Width = ioapic::WIDEST;

    fn make(log: &Log) -> ioapic::IoApic {
        let routes = log.clone();
        ioapic::IoApic::new(
            Arc::new(log.clone()),
            Box::new(move |new| routes.note(format!("{new:x?}"))),
        )
    }
    fn read(device: &mut ioapic::IoApic, offset: u64, width: Width, lent: &Lent<'_>) -> u64 {
        device.mmio_read(offset, width, lent)
    }
    fn write(device: &mut ioapic::IoApic, offset: u64, width: Width, value: u64, lent: &Lent<'_>) {
        device.mmio_write(offset, width, value, lent);
    }
    fn host(device: &mut ioapic::IoApic, value: u32, _lent: &Lent<'_>) {
        let (what, which) = ((value >> 8) % 3, value as u8);
        match what {
            0 => device.end_of_interrupt(which),
            // Some of them do not exist.
            pin => device.set_pin(which % 26, pin == 1),
        }
    }
    fn quiet(device: &mut ioapic::IoApic) {
        (0..ioapic::PINS).for_each(|pin| device.set_pin(pin, false));
    }
    fn golden() -> Vec<Op> {
        let register = |index, value| {
            [Op::Write(0, Width::Dword, index), Op::Write(0x10, Width::Dword, value)]
        };
        [(0, 0x0500_0000), (0x18, 0x931), (0x23, 0x0302_0000), (0x22, 0xa039), (0x3e, 0x1_0052)]
            .into_iter()
            .flat_map(|(index, value)| register(index, value))
            .chain([Op::Host(0x109), Op::Host(0x104)])
            .collect()
    }
}
