//! ACPI power management: the PM1 registers and the PM timer (ACPI 6.5, 4.8.3).
//!
//! The machine is in ACPI mode from the start: the FADT names no SMI command port.

use keel_device_model::{Device, Lent, Nanos, PortIo, Request, StateError};
use keel_hypervisor::Width;
use serde::{Deserialize, Serialize};

use crate::check::possible;

/// The first port.
pub const PORT: u16 = 0x600;
/// How many ports it takes.
pub const PORTS: u16 = 12;
/// The FADT's `PM1a_EVT_BLK`, 4 bytes: status and enable.
pub const PM1A_EVENT_PORT: u16 = PORT;
/// The FADT's `PM1a_CNT_BLK`, 2 bytes.
pub const PM1A_CONTROL_PORT: u16 = PORT + 4;
/// The FADT's `PM_TMR_BLK`, 4 bytes. The timer has 32 bits (`TMR_VAL_EXT`).
pub const PM_TIMER_PORT: u16 = PORT + 8;
/// The widest access it takes.
pub const WIDEST: Width = Width::Dword;
/// The FADT's `SCI_INT`: a level-triggered, active-high line.
pub const IRQ: u32 = 9;
/// The DSDT's `\_S5`: the `SLP_TYP` that means "soft off". Not 0, which is what the register holds after a reset, so that a
/// guest that has looked nowhere does not power off by accident.
pub const SLEEP_TYPE_S5: u8 = 5;

/// The PM timer's frequency (ACPI 6.5, 4.8.3.3).
const TIMER_HZ: u128 = 3_579_545;
const SECOND: u128 = 1_000_000_000;

const TIMER: u16 = 1 << 0;
const POWER_BUTTON: u16 = 1 << 8;
/// Global lock, sleep button, RTC: can be enabled, and never happen.
const ENABLEABLE: u16 = TIMER | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
const HAPPENING: u16 = TIMER | POWER_BUTTON;

const SCI_ENABLE: u16 = 1 << 0;
/// Bus master reload and `SLP_TYP`: what the control register keeps of a write.
const CONTROL_KEPT: u16 = 1 << 1 | SLEEP_TYPE;
const SLEEP_TYPE: u16 = 7 << 10;
const SLEEP_ENABLE: u16 = 1 << 13;

/// The registers of [`AcpiPm`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcpiPmState {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control without `SCI_EN`.
    pub control: u16,
    /// How often the timer's highest bit had changed, since virtual time 0, when the device last looked. None before it has looked.
    pub timer_changes: Option<u64>,
}

/// ACPI power management.
///
/// ```
/// use keel_device_model::{PortIo, Request, testing::Workbench};
/// use keel_devices::acpi_pm::{AcpiPm, PM1A_CONTROL_PORT, PORT, SLEEP_TYPE_S5};
/// use keel_hypervisor::Width;
///
/// let bench = Workbench::new();
/// let soft_off = u32::from(SLEEP_TYPE_S5) << 10 | 1 << 13;
/// AcpiPm::new().pio_write(PM1A_CONTROL_PORT - PORT, Width::Word, soft_off, &bench.lent());
/// assert_eq!(bench.requests(), [Request::PowerOff]);
/// ```
#[derive(Default)]
pub struct AcpiPm {
    registers: AcpiPmState,
}

/// The timer's unbounded count.
fn ticks(now: Nanos) -> u64 {
    // Less than `now`, as there is less than one tick a nanosecond.
    (u128::from(now) * TIMER_HZ / SECOND) as u64
}

impl AcpiPm {
    /// As after a reset.
    pub fn new() -> Self {
        AcpiPm::default()
    }

    /// The power button is pressed: asks the guest to power off.
    pub fn press_power_button(&mut self, lent: &Lent<'_>) {
        self.registers.status |= POWER_BUTTON;
        self.drive(lent);
    }

    /// Notes whether the timer's highest bit has changed.
    fn look_at_timer(&mut self, lent: &Lent<'_>) {
        let changes = ticks(lent.clock.now()) >> 31;
        if self.registers.timer_changes.replace(changes).is_some_and(|before| before != changes) {
            self.registers.status |= TIMER;
        }
    }

    fn drive(&self, lent: &Lent<'_>) {
        lent.line.set(self.registers.status & self.registers.enable != 0);
    }

    /// Writes one byte of the PM1 registers. No field that acts reaches over two of them.
    fn write(&mut self, offset: u16, value: u8, lent: &Lent<'_>) {
        let registers = &mut self.registers;
        let shift = 8 * (offset & 1);
        let (value, mask) = (u16::from(value) << shift, 0xff << shift);
        let replace = |register: u16, kept: u16| register & !mask | value & kept;
        match offset & !1 {
            0 => registers.status &= !value,
            2 => registers.enable = replace(registers.enable, ENABLEABLE),
            4 => {
                registers.control = replace(registers.control, CONTROL_KEPT);
                let sleep_type = (registers.control & SLEEP_TYPE) >> 10;
                if value & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5) {
                    lent.machine.request(Request::PowerOff);
                }
            }
            _ => {}
        }
    }
}

impl PortIo for AcpiPm {
    fn pio_read(&mut self, offset: u16, width: Width, lent: &Lent<'_>) -> u32 {
        self.look_at_timer(lent);
        self.drive(lent);
        let image = u128::from(self.registers.status)
            | u128::from(self.registers.enable) << 16
            | u128::from(self.registers.control | SCI_ENABLE) << 32
            | u128::from(ticks(lent.clock.now()) as u32) << 64;
        ((image >> (8 * (offset & 15))) as u64 & width.mask()) as u32
    }

    fn pio_write(&mut self, offset: u16, width: Width, value: u32, lent: &Lent<'_>) {
        self.look_at_timer(lent);
        for (byte, value) in (0..width.bytes() as u16).zip(value.to_le_bytes()) {
            self.write(offset.wrapping_add(byte), value, lent);
        }
        self.drive(lent);
    }
}

impl Device for AcpiPm {
    type State = AcpiPmState;
    const KIND: &'static str = "acpi-pm";
    const VERSION: u32 = 1;

    fn reset(&mut self, lent: &Lent<'_>) {
        *self = AcpiPm::new();
        self.drive(lent);
    }

    fn save(&self) -> AcpiPmState {
        self.registers.clone()
    }

    fn restore(&mut self, state: AcpiPmState, lent: &Lent<'_>) -> Result<(), StateError> {
        possible::<Self>(state.status & !HAPPENING == 0, "PM1 status register")?;
        possible::<Self>(state.enable & !ENABLEABLE == 0, "PM1 enable register")?;
        possible::<Self>(state.control & !CONTROL_KEPT == 0, "PM1 control register")?;
        possible::<Self>(
            state.timer_changes.is_none_or(|changes| changes <= ticks(Nanos::MAX) >> 31),
            "PM timer",
        )?;
        self.registers = state;
        self.drive(lent);
        Ok(())
    }

    fn deadline(&self) -> Option<Nanos> {
        let AcpiPmState { status, enable, timer_changes, .. } = self.registers;
        let next = u128::from(timer_changes? + 1) << 31;
        // Rounded up, or it would expire just before.
        let at = u64::try_from((next * SECOND).div_ceil(TIMER_HZ)).ok()?;
        (enable & !status & TIMER != 0).then_some(at)
    }

    fn expire(&mut self, lent: &Lent<'_>) {
        self.look_at_timer(lent);
        self.drive(lent);
    }
}

#[cfg(test)]
mod tests {
    use keel_device_model::testing::Workbench;

    use super::*;

    const STATUS: u16 = 0;
    const ENABLE: u16 = 2;
    const CONTROL: u16 = 4;
    const COUNT: u16 = 8;

    struct Rig(Workbench, AcpiPm);

    impl Rig {
        fn new() -> Self {
            Rig(Workbench::new(), AcpiPm::new())
        }
        fn read(&mut self, offset: u16, width: Width) -> u32 {
            self.1.pio_read(offset, width, &self.0.lent())
        }
        fn write(&mut self, offset: u16, value: u16) {
            self.1.pio_write(offset, Width::Word, value.into(), &self.0.lent());
        }
    }

    #[test]
    fn powers_off_by_the_agreed_type_only() {
        let mut rig = Rig::new();
        rig.write(CONTROL, SLEEP_ENABLE);
        rig.write(CONTROL, SLEEP_ENABLE | 1 << 10);
        rig.write(CONTROL, 5 << 10);
        assert!(rig.0.requests().is_empty());
        assert_eq!(
            rig.read(CONTROL, Width::Word),
            5 << 10 | 1,
            "SCI_EN is set, SLP_EN reads as zero"
        );
        rig.1.pio_write(CONTROL + 1, Width::Byte, 0x34, &rig.0.lent());
        assert_eq!(rig.0.requests(), [Request::PowerOff]);
    }

    #[test]
    fn the_power_button_raises_the_sci_until_it_is_cleared() {
        let mut rig = Rig::new();
        rig.1.press_power_button(&rig.0.lent());
        assert!(rig.0.levels().is_empty());
        rig.write(ENABLE, POWER_BUTTON);
        assert_eq!(rig.0.levels(), [true]);
        assert_eq!(rig.read(STATUS, Width::Dword), 0x0100_0100);
        rig.write(STATUS, POWER_BUTTON);
        assert_eq!(rig.0.levels(), [false]);
        assert_eq!(rig.read(STATUS, Width::Word), 0);
    }

    #[test]
    fn the_timer_counts_at_its_frequency() {
        let mut rig = Rig::new();
        rig.0.advance(1_000_000_000);
        assert_eq!(rig.read(COUNT, Width::Dword), 3_579_545);
        assert_eq!(rig.read(COUNT, Width::Byte), 3_579_545 & 0xff);
        assert_eq!(rig.read(COUNT + 1, Width::Word), 3_579_545 >> 8 & 0xffff);
        rig.0.advance(1_199_000_000_000);
        assert_eq!(u64::from(rig.read(COUNT, Width::Dword)), 1200 * 3_579_545 % (1 << 32));
    }

    #[test]
    fn the_timers_highest_bit_interrupts_when_it_changes() {
        let mut rig = Rig::new();
        assert_eq!(rig.1.deadline(), None);
        rig.write(ENABLE, TIMER);
        let change = rig.1.deadline().unwrap();
        assert_eq!(change / 1_000_000, 599_932);
        rig.0.advance(change - 1);
        rig.1.expire(&rig.0.lent());
        assert!(rig.0.levels().is_empty());
        rig.0.advance(1);
        rig.1.expire(&rig.0.lent());
        assert_eq!(rig.0.levels(), [true]);
        assert_eq!(rig.read(COUNT, Width::Dword), 1 << 31);
        assert_eq!(rig.1.deadline(), None, "the guest has been told");
        rig.write(STATUS, TIMER);
        assert_eq!(rig.0.levels(), [false]);
        assert!(rig.1.deadline().unwrap() > change);
    }

    #[test]
    fn impossible_states_are_refused() {
        let mut rig = Rig::new();
        for state in [
            AcpiPmState { status: 0x8000, ..AcpiPmState::default() },
            AcpiPmState { control: 1, ..AcpiPmState::default() },
            AcpiPmState { timer_changes: Some(u64::MAX), ..AcpiPmState::default() },
        ] {
            assert!(rig.1.restore(state, &rig.0.lent()).is_err());
        }
    }
}
