//! Kernels of a few instructions, in the shape of a bzImage.

use keel_devices::{acpi_pm, reset_register};

/// A kernel that runs this code in 64-bit mode, interrupts off, at any address.
pub fn image(code: &[u8]) -> Vec<u8> {
    let guest = keel_guests::find("hostile").unwrap();
    let mut image = guest.image.to_vec();
    let entry = image.len() - guest.payload().len() + keel_guests::ENTRY;
    image[entry..entry + code.len()].copy_from_slice(code);
    image
}

/// `mov eax, value; mov edx, port; out dx, al`
pub fn out_byte(port: u16, value: u8) -> Vec<u8> {
    [&with_registers(port, value.into())[..], &[0xee]].concat()
}

/// `mov eax, value; mov edx, port; out dx, ax`
pub fn out_word(port: u16, value: u16) -> Vec<u8> {
    [&with_registers(port, value)[..], &[0x66, 0xef]].concat()
}

fn with_registers(port: u16, value: u16) -> [u8; 10] {
    let ([v0, v1], [p0, p1]) = (value.to_le_bytes(), port.to_le_bytes());
    [0xb8, v0, v1, 0, 0, 0xba, p0, p1, 0, 0]
}

/// `hlt` for ever.
pub const HALT: &[u8] = &[0xf4, 0xeb, 0xfd];

/// No interrupt table, and an exception.
pub const TRIPLE_FAULT: &[u8] = &[
    0x0f, 0x01, 0x1d, 2, 0, 0, 0, // lidt [rip + 2]
    0x0f, 0x0b, // ud2
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// Writes `.` to COM1 without end.
pub const FLOOD: &[u8] = &[
    0xba, 0xf8, 0x03, 0, 0, // mov edx, 0x3f8
    0xb0, b'.', // mov al, '.'
    0xee, // out dx, al
    0xeb, 0xfd, // jmp to the out
];

/// Says `>` and gives back what comes to COM1.
pub const ECHO: &[u8] = &[
    0xba, 0xf8, 0x03, 0, 0, // mov edx, 0x3f8
    0xb0, b'>', // mov al, '>'
    0xee, // out dx, al
    0xb2, 0xfd, // mov dl, 0xfd: the line status
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xfb, // jz to the in
    0xb2, 0xf8, // mov dl, 0xf8
    0xec, // in al, dx
    0xee, // out dx, al
    0xeb, 0xf3, // jmp to the line status
];

/// Power off, as the ACPI tables say.
pub fn power_off() -> Vec<u8> {
    let sleep = u16::from(acpi_pm::SLEEP_TYPE_S5) << 10 | 1 << 13;
    [&out_word(acpi_pm::PM1A_CONTROL_PORT, sleep)[..], HALT].concat()
}

/// Reset, as the ACPI tables say.
pub fn reset() -> Vec<u8> {
    [&out_byte(reset_register::PORT, reset_register::RESET_VALUE)[..], HALT].concat()
}

/// Says `text` on COM1, then runs `then`.
pub fn say(text: &str, then: &[u8]) -> Vec<u8> {
    text.bytes().flat_map(|byte| out_byte(0x3f8, byte)).chain(then.iter().copied()).collect()
}
