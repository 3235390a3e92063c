//! The real-time clock and its battery-backed memory (Motorola MC146818A data sheet; the PC/AT's use of it).
//!
//! Time of day is the host's plus an offset, so that it goes on while the machine is stopped. Interrupts come in virtual time. A flag
//! that raises no interrupt costs nothing: it is worked out when the guest looks.

mod calendar;

use std::ops::RangeInclusive;

use keel_device_model::{Device, Lent, Nanos, PortIo, StateError};
use keel_hypervisor::Width;
use keel_hypervisor::state::Bytes;
use serde::{Deserialize, Serialize};

use self::calendar::Date;
use crate::check::possible;

/// Its ports: index and data.
pub const PORTS: RangeInclusive<u16> = 0x70..=0x71;
/// Its ISA interrupt.
pub const IRQ: u32 = 8;
/// The widest access it takes.
pub const WIDEST: Width = Width::Byte;
/// The index of the century: the FADT's `CENTURY`.
pub const CENTURY: u8 = 0x32;

const SECONDS: usize = 0;
const SECONDS_ALARM: usize = 1;
const MINUTES: usize = 2;
const MINUTES_ALARM: usize = 3;
const HOURS: usize = 4;
const HOURS_ALARM: usize = 5;
const WEEKDAY: usize = 6;
const DAY: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const A: usize = 10;
const B: usize = 11;
const C: usize = 12;
const D: usize = 13;

/// The size of the memory, registers included.
const SIZE: usize = 128;
/// Masks the index; the bit above masks NMI.
const INDEX: u8 = 0x7f;

/// A: the registers are about to change.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// A: both bits hold the divider in reset.
const DIVIDER_RESET: u8 = 0x60;
/// A: the divider's three bits, and their value for the 32768 Hz crystal of a PC.
const DIVIDER: u8 = 0x70;
const DIVIDER_RUNS: u8 = 0x20;
const RATE: u8 = 0x0f;
/// B: the guest sets the time.
const SET: u8 = 1 << 7;
/// B: square wave. Leads nowhere on a PC.
const SQUARE_WAVE: u8 = 1 << 3;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Interrupts: enabled in B, flagged in C.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
const ANY_INTERRUPT: u8 = PERIODIC | ALARM | UPDATE;
/// C: one of them is both.
const INTERRUPTING: u8 = 1 << 7;
/// D: the battery is full.
const VALID: u8 = 1 << 7;

const AFTERNOON: u8 = 1 << 7;

const SECOND: Nanos = 1_000_000_000;
const CRYSTAL_HZ: u128 = 32_768;
/// How long before an update the guest is told that it comes (data sheet, table 6).
const UPDATE_NOTICE: Nanos = 244_141;
/// From the divider's release to the first update.
const FIRST_UPDATE: Nanos = 500_000_000;
/// More than any year a guest can set is from 1970.
const FARTHEST_S: i64 = 1_000_000_000_000;

/// What an [`Rtc`] starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// How many seconds the guest's time is ahead of UTC (`-rtc base=`).
    pub offset_s: i64,
    /// Bytes of RAM below 4 GiB, and above: firmware reads them here.
    pub ram_below_4g: u64,
    /// Bytes of RAM from 4 GiB on.
    pub ram_above_4g: u64,
}

/// The registers of an [`Rtc`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RtcState {
    /// The index port: bit 7 masks NMI.
    pub index: u8,
    /// The memory. Of its first 14 bytes those of the running time hold what was there when it last stood still.
    pub memory: Bytes,
    /// The guest's time is the host's plus this …
    pub offset_s: i64,
    /// … and this, below a second.
    pub offset_ns: u32,
    /// The second when the device last looked for updates and alarms.
    pub seen_second: Option<i64>,
    /// The period, counted from virtual time 0, when it last looked for periodic interrupts.
    pub seen_period: Option<u64>,
}

/// A real-time clock.
///
/// ```
/// use keel_device_model::{PortIo, testing::Workbench};
/// use keel_devices::rtc::{Config, Rtc};
/// use keel_hypervisor::Width;
///
/// let bench = Workbench::new();
/// bench.set_wall(951_782_400_000_000_000);
/// let mut rtc = Rtc::new(Config::default());
/// let mut read = |index| {
///     rtc.pio_write(0, Width::Byte, index, &bench.lent());
///     rtc.pio_read(1, Width::Byte, &bench.lent())
/// };
/// assert_eq!([read(0x32), read(9), read(8), read(7)], [0x20, 0x00, 0x02, 0x29]);
/// ```
pub struct Rtc {
    // Registers.
    index: u8,
    memory: [u8; SIZE],
    offset_s: i64,
    offset_ns: u32,
    seen_second: Option<i64>,
    seen_period: Option<u64>,
    // What follows from them.
    deadline: Option<Nanos>,
}

impl Rtc {
    /// A clock whose battery has never been empty.
    pub fn new(config: Config) -> Self {
        let mut memory = [0; SIZE];
        memory[A] = DIVIDER_RUNS | 0x06;
        memory[B] = HOURS_24;
        let mut put = |at: usize, value: u64, bytes: usize| {
            let most = (1 << (8 * bytes)) - 1;
            memory[at..at + bytes].copy_from_slice(&value.min(most).to_le_bytes()[..bytes]);
        };
        // In KiB: below 640 KiB, and from 1 MiB on, which the PS/2's BIOS wrote a second time.
        put(0x15, 640, 2);
        let extended = (config.ram_below_4g >> 10).saturating_sub(1 << 10);
        put(0x17, extended, 2);
        put(0x30, extended, 2);
        // In units of 64 KiB: from 16 MiB on, and from 4 GiB on.
        put(0x34, (config.ram_below_4g >> 16).saturating_sub(1 << 8), 2);
        put(0x5b, config.ram_above_4g >> 16, 3);
        let offset_s = config.offset_s.clamp(-FARTHEST_S, FARTHEST_S);
        Rtc {
            index: 0,
            memory,
            offset_s,
            offset_ns: 0,
            seen_second: None,
            seen_period: None,
            deadline: None,
        }
    }

    /// The guest wants no NMI.
    pub fn nmi_masked(&self) -> bool {
        self.index & !INDEX != 0
    }

    /// The guest's time, in nanoseconds since 1970.
    fn time(&self, lent: &Lent<'_>) -> i128 {
        i128::from(lent.clock.wall())
            + i128::from(self.offset_s) * i128::from(SECOND)
            + i128::from(self.offset_ns)
    }

    /// The guest's time in seconds, and nanoseconds of the present one.
    fn split_time(&self, lent: &Lent<'_>) -> (i64, Nanos) {
        let (time, second) = (self.time(lent), i128::from(SECOND));
        (time.div_euclid(second) as i64, time.rem_euclid(second) as Nanos)
    }

    /// Sets the guest's time.
    fn set_time(&mut self, seconds: i64, ns: Nanos, lent: &Lent<'_>) {
        let time = i128::from(seconds) * i128::from(SECOND) + i128::from(ns);
        let ahead = time - i128::from(lent.clock.wall());
        let second = i128::from(SECOND);
        self.offset_s = (ahead.div_euclid(second) as i64).clamp(-FARTHEST_S, FARTHEST_S);
        self.offset_ns = ahead.rem_euclid(second) as u32;
        self.seen_second = None;
    }

    fn divider_held(&self) -> bool {
        self.memory[A] & DIVIDER_RESET == DIVIDER_RESET
    }

    /// The time stands still, and its registers are memory.
    fn stands(&self) -> bool {
        self.memory[B] & SET != 0 || self.divider_held()
    }

    /// A number as the registers have it.
    fn encode(&self, number: i64) -> u8 {
        let number = number.rem_euclid(100);
        (if self.memory[B] & BINARY != 0 { number } else { number / 10 * 16 + number % 10 }) as u8
    }

    /// The number a register holds. Of a byte that is none, something.
    fn decode(&self, byte: u8) -> i64 {
        i64::from(if self.memory[B] & BINARY != 0 { byte } else { (byte >> 4) * 10 + (byte & 15) })
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.memory[B] & HOURS_24 != 0 {
            return self.encode(hour);
        }
        // 12 AM is midnight.
        self.encode((hour + 11) % 12 + 1) | if hour >= 12 { AFTERNOON } else { 0 }
    }

    fn decode_hour(&self, byte: u8) -> i64 {
        if self.memory[B] & HOURS_24 != 0 {
            return self.decode(byte);
        }
        self.decode(byte & !AFTERNOON) % 12 + if byte & AFTERNOON != 0 { 12 } else { 0 }
    }

    /// What a register of the time holds, if it is one.
    fn time_register(&self, index: usize, date: Date) -> Option<u8> {
        Some(match index {
            SECONDS => self.encode(date.second),
            MINUTES => self.encode(date.minute),
            HOURS => self.encode_hour(date.hour),
            WEEKDAY => self.encode(date.weekday()),
            DAY => self.encode(date.day),
            MONTH => self.encode(date.month),
            YEAR => self.encode(date.year),
            index if index == usize::from(CENTURY) => self.encode(date.year.div_euclid(100)),
            _ => return None,
        })
    }

    /// Puts the running time into the memory.
    fn freeze(&mut self, lent: &Lent<'_>) {
        let date = Date::at(self.split_time(lent).0);
        for index in (SECONDS..=YEAR).chain([usize::from(CENTURY)]) {
            if let Some(value) = self.time_register(index, date) {
                self.memory[index] = value;
            }
        }
    }

    /// Sets the time to what the memory holds, `ns` into the second. A date that does not exist becomes one that follows.
    fn thaw(&mut self, ns: Nanos, lent: &Lent<'_>) {
        let date = Date {
            year: self.decode(self.memory[usize::from(CENTURY)]) * 100
                + self.decode(self.memory[YEAR]),
            month: self.decode(self.memory[MONTH]),
            day: self.decode(self.memory[DAY]),
            hour: self.decode_hour(self.memory[HOURS]),
            minute: self.decode(self.memory[MINUTES]),
            second: self.decode(self.memory[SECONDS]),
        };
        self.set_time(date.seconds(), ns, lent);
    }

    /// The first second from `from` on that the alarm is set to.
    fn next_alarm(&self, from: i64) -> Option<i64> {
        // Both highest bits set: any value.
        let wanted = |index: usize| Some(self.memory[index]).filter(|byte| *byte < 0xc0);
        let second = wanted(SECONDS_ALARM).map(|byte| self.decode(byte));
        let minute = wanted(MINUTES_ALARM).map(|byte| self.decode(byte));
        let hour = wanted(HOURS_ALARM).map(|byte| self.decode_hour(byte));
        let mut at = from;
        // At most 24 hours, 60 minutes and 60 seconds to the first match of each, and again where that was in the past of another.
        for _ in 0..2 * (24 + 60 + 60) {
            let time = Date::at(at);
            if hour.is_some_and(|hour| hour != time.hour) {
                at += 3600 - at.rem_euclid(3600);
            } else if minute.is_some_and(|minute| minute != time.minute) {
                at += 60 - at.rem_euclid(60);
            } else if second.is_some_and(|second| second != time.second) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }

    /// By how much a crystal's tick count is shifted for a count of periods, if there are any.
    fn period_shift(&self) -> Option<u32> {
        if self.memory[A] & DIVIDER != DIVIDER_RUNS {
            return None;
        }
        match u32::from(self.memory[A] & RATE) {
            0 => None,
            // The two that do not fit the row (data sheet, table 5).
            rate @ 1..=2 => Some(rate + 6),
            rate => Some(rate - 1),
        }
    }

    /// Sets the flags of what has happened since the last look.
    fn look(&mut self, lent: &Lent<'_>) {
        if !self.stands() {
            let second = self.split_time(lent).0;
            if let Some(seen) = self.seen_second.replace(second)
                && seen != second
            {
                self.memory[C] |= UPDATE;
                // The host's time may have been set back; then this second alone counts.
                let first = if seen < second { seen + 1 } else { second };
                if self.next_alarm(first).is_some_and(|alarm| alarm <= second) {
                    self.memory[C] |= ALARM;
                }
            }
        }
        if let Some(shift) = self.period_shift() {
            let period =
                (u128::from(lent.clock.now()) * CRYSTAL_HZ / u128::from(SECOND)) as u64 >> shift;
            if self.seen_period.replace(period).is_some_and(|seen| seen != period) {
                self.memory[C] |= PERIODIC;
            }
        }
    }

    fn interrupting(&self) -> bool {
        self.memory[B] & self.memory[C] & ANY_INTERRUPT != 0
    }

    /// To be done after every change: sets the line, and when to look next.
    fn settle(&mut self, lent: &Lent<'_>) {
        lent.line.set(self.interrupting());
        let awaited = self.memory[B] & !self.memory[C] & ANY_INTERRUPT;
        let period = self.seen_period.zip(self.period_shift()).filter(|_| awaited & PERIODIC != 0);
        let period = period.and_then(|(seen, shift)| {
            let tick = (u128::from(seen) + 1) << shift;
            u64::try_from((tick * u128::from(SECOND)).div_ceil(CRYSTAL_HZ)).ok()
        });
        let seen = self.seen_second.filter(|_| !self.stands());
        let wait = |second: i64| {
            let ns = i128::from(second) * i128::from(SECOND) - self.time(lent);
            u64::try_from(ns).unwrap_or(0)
        };
        // No longer than a second, even if the host's time was set back.
        let update = seen.filter(|_| awaited & UPDATE != 0).map(|seen| wait(seen + 1).min(SECOND));
        let alarm = seen
            .filter(|_| awaited & ALARM != 0)
            .and_then(|seen| self.next_alarm(seen + 1))
            .map(wait);
        let second =
            update.into_iter().chain(alarm).min().map(|wait| lent.clock.now().saturating_add(wait));
        self.deadline = period.into_iter().chain(second).min();
    }

    fn read(&mut self, lent: &Lent<'_>) -> u8 {
        let index = usize::from(self.index & INDEX);
        let (second, ns) = self.split_time(lent);
        match index {
            A => {
                let soon = !self.stands() && ns >= SECOND - UPDATE_NOTICE;
                self.memory[A] | if soon { UPDATE_IN_PROGRESS } else { 0 }
            }
            C => {
                let flags = self.memory[C] | if self.interrupting() { INTERRUPTING } else { 0 };
                self.memory[C] = 0;
                flags
            }
            D => VALID,
            index if self.stands() => self.memory[index],
            index => self.time_register(index, Date::at(second)).unwrap_or(self.memory[index]),
        }
    }

    fn write(&mut self, value: u8, lent: &Lent<'_>) {
        let stood = self.stands();
        let ns = self.split_time(lent).1;
        match usize::from(self.index & INDEX) {
            A => {
                let held = self.divider_held();
                let value = value & !UPDATE_IN_PROGRESS;
                if !stood && value & DIVIDER_RESET == DIVIDER_RESET {
                    self.freeze(lent);
                }
                if value != self.memory[A] {
                    self.seen_period = None;
                }
                self.memory[A] = value;
                if held && !self.divider_held() {
                    self.thaw(SECOND - FIRST_UPDATE, lent);
                }
                self.look(lent);
            }
            B => {
                if !stood && value & SET != 0 {
                    // In the format it has had so far.
                    self.freeze(lent);
                }
                // Setting the time ends the interrupts of its updates (data sheet, register B).
                self.memory[B] = if value & SET != 0 { value & !UPDATE } else { value };
                if stood && !self.stands() {
                    self.thaw(ns, lent);
                }
                self.look(lent);
            }
            C | D => {}
            index if !stood && self.time_register(index, Date::at(0)).is_some() => {
                // The weekday follows from the date.
                if index != WEEKDAY {
                    self.freeze(lent);
                    self.memory[index] = value;
                    self.thaw(ns, lent);
                    self.look(lent);
                }
            }
            index => self.memory[index] = value,
        }
    }
}

impl PortIo for Rtc {
    fn pio_read(&mut self, offset: u16, _width: Width, lent: &Lent<'_>) -> u32 {
        if offset != 1 {
            // The index can not be read back.
            return 0xff;
        }
        self.look(lent);
        let value = self.read(lent);
        self.settle(lent);
        value.into()
    }

    fn pio_write(&mut self, offset: u16, _width: Width, value: u32, lent: &Lent<'_>) {
        if offset != 1 {
            self.index = value as u8;
            return;
        }
        self.look(lent);
        self.write(value as u8, lent);
        self.settle(lent);
    }
}

impl Device for Rtc {
    type State = RtcState;
    const KIND: &'static str = "rtc";
    const VERSION: u32 = 1;

    /// The time and the memory go on: they have a battery, and firmware leaves itself notes there.
    fn reset(&mut self, lent: &Lent<'_>) {
        self.index = 0;
        self.memory[B] &= !(ANY_INTERRUPT | SQUARE_WAVE);
        self.memory[C] = 0;
        self.seen_second = None;
        self.seen_period = None;
        self.settle(lent);
    }

    fn save(&self) -> RtcState {
        RtcState {
            index: self.index,
            memory: Bytes(self.memory.to_vec()),
            offset_s: self.offset_s,
            offset_ns: self.offset_ns,
            seen_second: self.seen_second,
            seen_period: self.seen_period,
        }
    }

    fn restore(&mut self, state: RtcState, lent: &Lent<'_>) -> Result<(), StateError> {
        let Ok(memory) = <[u8; SIZE]>::try_from(state.memory.0) else {
            return possible::<Self>(false, "the memory is not 128 bytes long");
        };
        possible::<Self>(memory[A] & UPDATE_IN_PROGRESS == 0, "register A")?;
        possible::<Self>(memory[B] & (SET | UPDATE) != SET | UPDATE, "register B")?;
        possible::<Self>(memory[C] & !ANY_INTERRUPT == 0, "register C")?;
        possible::<Self>(memory[D] == 0, "register D")?;
        possible::<Self>(
            (-FARTHEST_S..=FARTHEST_S).contains(&state.offset_s)
                && u64::from(state.offset_ns) < SECOND,
            "offset from the host's time",
        )?;
        let farthest = FARTHEST_S + (Nanos::MAX / SECOND) as i64 + 1;
        possible::<Self>(
            state.seen_second.is_none_or(|seen| (-FARTHEST_S..=farthest).contains(&seen)),
            "time when last looked at",
        )?;
        self.index = state.index;
        self.memory = memory;
        self.offset_s = state.offset_s;
        self.offset_ns = state.offset_ns;
        self.seen_second = state.seen_second;
        self.seen_period = state.seen_period;
        self.settle(lent);
        Ok(())
    }

    fn deadline(&self) -> Option<Nanos> {
        self.deadline
    }

    fn expire(&mut self, lent: &Lent<'_>) {
        self.look(lent);
        self.settle(lent);
    }
}

#[cfg(test)]
mod tests;
