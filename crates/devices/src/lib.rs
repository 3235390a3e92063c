//! The PC's own devices: serial, RTC, keyboard controller reset, ACPI power management, …. (Being written.)
