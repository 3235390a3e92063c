use keel_device_model::testing::Workbench;
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestRunner};

use super::*;

/// 2023-12-31 23:59:58 UTC, a Sunday.
const NEARLY_2024: Nanos = 1_704_067_198 * SECOND;

struct Rig(Workbench, Rtc);

impl Rig {
    fn at(wall: Nanos) -> Self {
        let bench = Workbench::new();
        bench.set_wall(wall);
        Rig(bench, Rtc::new(Config::default()))
    }
    fn read(&mut self, index: usize) -> u8 {
        self.1.pio_write(0, Width::Byte, index as u32, &self.0.lent());
        self.1.pio_read(1, Width::Byte, &self.0.lent()) as u8
    }
    fn write(&mut self, index: usize, value: u8) {
        self.1.pio_write(0, Width::Byte, index as u32, &self.0.lent());
        self.1.pio_write(1, Width::Byte, value.into(), &self.0.lent());
    }
    /// Century, year, month, day, weekday, hour, minute, second.
    fn time(&mut self) -> [u8; 8] {
        [CENTURY.into(), YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS]
            .map(|index| self.read(index))
    }
    /// Lets time pass, and the device expire whenever it wants to. Returns how often it did.
    fn run(&mut self, ns: Nanos) -> u32 {
        let end = self.0.lent().clock.now() + ns;
        let mut times = 0;
        while let Some(at) = self.1.deadline().filter(|at| *at <= end) {
            self.0.advance(at.saturating_sub(self.0.lent().clock.now()));
            self.1.expire(&self.0.lent());
            times += 1;
        }
        self.0.advance(end - self.0.lent().clock.now());
        times
    }
}

#[test]
fn shows_the_hosts_time_in_all_formats() {
    let mut rig = Rig::at(NEARLY_2024);
    assert_eq!(rig.time(), [0x20, 0x23, 0x12, 0x31, 1, 0x23, 0x59, 0x58]);
    rig.write(B, 0);
    assert_eq!(rig.time(), [0x20, 0x23, 0x12, 0x31, 1, 0x91, 0x59, 0x58]);
    rig.write(B, BINARY | HOURS_24);
    assert_eq!(rig.time(), [20, 23, 12, 31, 1, 23, 59, 58]);
    rig.run(2 * SECOND);
    assert_eq!(rig.time(), [20, 24, 1, 1, 2, 0, 0, 0]);
    rig.write(B, BINARY);
    assert_eq!(rig.read(HOURS), 12, "12 AM is midnight");
    rig.run(12 * 3600 * SECOND);
    assert_eq!(rig.read(HOURS), 12 | AFTERNOON);
}

#[test]
fn the_offset_counts() {
    let bench = Workbench::new();
    let mut rtc = Rtc::new(Config { offset_s: -1, ..Config::default() });
    rtc.pio_write(0, Width::Byte, YEAR as u32, &bench.lent());
    assert_eq!(rtc.pio_read(1, Width::Byte, &bench.lent()), 0x69);
}

/// As Linux's mc146818_set_time does it.
#[test]
fn the_guest_sets_the_time() {
    let mut rig = Rig::at(NEARLY_2024 + 700_000_000);
    rig.write(B, HOURS_24 | SET);
    rig.write(A, 0x70);
    rig.run(5 * SECOND);
    assert_eq!(rig.time()[7], 0x58, "it stands still");
    for (index, value) in
        [(YEAR, 0x00), (MONTH, 0x02), (DAY, 0x28), (HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)]
    {
        rig.write(index, value);
    }
    rig.write(CENTURY.into(), 0x20);
    rig.write(B, HOURS_24);
    rig.write(A, 0x26);
    rig.run(499_999_999);
    assert_eq!(rig.time(), [0x20, 0x00, 0x02, 0x28, 2, 0x23, 0x59, 0x59]);
    rig.run(1);
    assert_eq!(
        rig.time(),
        [0x20, 0x00, 0x02, 0x29, 3, 0x00, 0x00, 0x00],
        "half a second after the divider runs"
    );
}

#[test]
fn one_register_can_be_set_while_it_runs() {
    let mut rig = Rig::at(NEARLY_2024);
    rig.write(YEAR, 0x25);
    assert_eq!(rig.time(), [0x20, 0x25, 0x12, 0x31, 4, 0x23, 0x59, 0x58]);
    rig.write(WEEKDAY, 7);
    assert_eq!(rig.read(WEEKDAY), 4);
}

#[test]
fn any_bytes_make_some_time() {
    let mut rig = Rig::at(NEARLY_2024);
    rig.write(B, SET);
    for index in (0..=9).chain([0x32]) {
        rig.write(index, 0xff);
    }
    rig.write(B, 0);
    let saved = rig.1.save();
    assert!(rig.1.restore(saved, &rig.0.lent()).is_ok());
    rig.time();
}

#[test]
fn tells_of_an_update_before_it_comes() {
    let mut rig = Rig::at(NEARLY_2024);
    assert_eq!(rig.read(A), 0x26);
    rig.run(SECOND - UPDATE_NOTICE);
    assert_eq!(rig.read(A), 0xa6);
    rig.run(UPDATE_NOTICE);
    assert_eq!(rig.read(A), 0x26);
}

#[test]
fn updates_interrupt_once_a_second_if_told_to() {
    let mut rig = Rig::at(NEARLY_2024 + 250_000_000);
    assert_eq!(rig.run(10 * SECOND), 0);
    rig.read(C);
    rig.write(B, HOURS_24 | UPDATE);
    assert_eq!(rig.1.deadline(), Some(10 * SECOND + 750_000_000));
    assert_eq!(rig.run(5 * SECOND), 1, "not before the guest has looked");
    assert_eq!(rig.0.levels(), [true]);
    assert_eq!(rig.read(C) & !PERIODIC, INTERRUPTING | UPDATE);
    assert_eq!(rig.0.levels(), [false]);
    assert_eq!(rig.read(C), 0);
    assert_eq!(rig.run(SECOND), 1);
}

#[test]
fn updates_go_on_when_the_hosts_time_is_set_back() {
    let mut rig = Rig::at(NEARLY_2024);
    rig.write(B, HOURS_24 | UPDATE);
    rig.0.set_wall(0);
    let state = rig.1.save();
    rig.1.restore(state, &rig.0.lent()).unwrap();
    assert_eq!(rig.run(SECOND), 1);
    assert_eq!(rig.0.levels(), [true]);
}

#[test]
fn flags_are_set_without_interrupts() {
    let mut rig = Rig::at(NEARLY_2024);
    rig.read(C);
    rig.run(SECOND);
    assert_eq!(rig.read(C), UPDATE | PERIODIC);
    assert!(rig.0.levels().is_empty());
}

#[test]
fn the_alarm_rings_at_its_time() {
    let mut rig = Rig::at(NEARLY_2024);
    rig.write(HOURS_ALARM, 0x00);
    rig.write(MINUTES_ALARM, 0x30);
    rig.write(SECONDS_ALARM, 0x05);
    rig.write(B, HOURS_24 | ALARM);
    assert_eq!(rig.1.deadline(), Some((2 + 30 * 60 + 5) * SECOND));
    assert_eq!(rig.run(3 * 3600 * SECOND), 1);
    assert_eq!(rig.read(C) & !PERIODIC, INTERRUPTING | ALARM | UPDATE);
    assert_eq!(rig.1.deadline(), Some((2 + 86_400 + 30 * 60 + 5) * SECOND), "and again tomorrow");
}

#[test]
fn an_alarm_can_leave_fields_open() {
    let mut rig = Rig::at(NEARLY_2024);
    rig.write(HOURS_ALARM, 0xc0);
    rig.write(MINUTES_ALARM, 0xff);
    rig.write(SECONDS_ALARM, 0x30);
    rig.write(B, HOURS_24 | ALARM);
    assert_eq!(rig.1.deadline(), Some(32 * SECOND));
    rig.write(SECONDS_ALARM, 0x77);
    assert_eq!(rig.1.deadline(), None, "no such second");
    rig.write(SECONDS_ALARM, 0xc0);
    assert_eq!(rig.1.deadline(), Some(SECOND), "every second");
}

#[test]
fn the_next_alarm_is_the_first_second_that_matches() {
    let mut rtc = Rtc::new(Config::default());
    rtc.memory[B] = HOURS_24 | BINARY;
    let matches = |rtc: &Rtc, at| {
        let date = Date::at(at);
        [(HOURS_ALARM, date.hour), (MINUTES_ALARM, date.minute), (SECONDS_ALARM, date.second)]
            .iter()
            .all(|(alarm, value)| {
                rtc.memory[*alarm] >= 0xc0 || i64::from(rtc.memory[*alarm]) == *value
            })
    };
    // The longest search: all but over.
    rtc.memory[HOURS_ALARM] = 10;
    assert_eq!(rtc.next_alarm(10 * 3600 + 1), Some(34 * 3600));
    let field = |below: u8| prop_oneof![0..below, Just(0xc0), Just(below)];
    let alarms = (0i64..200_000, field(24), field(60), field(60));
    let test = |(from, hour, minute, second)| {
        let mut rtc = Rtc::new(Config::default());
        rtc.memory[B] = HOURS_24 | BINARY;
        for (index, value) in
            [(HOURS_ALARM, hour), (MINUTES_ALARM, minute), (SECONDS_ALARM, second)]
        {
            rtc.memory[index] = value;
        }
        prop_assert_eq!(rtc.next_alarm(from), (from..from + 86_400).find(|at| matches(&rtc, *at)));
        Ok(())
    };
    TestRunner::new(Cases::with_cases(32)).run(&alarms, test).unwrap();
}

#[test]
fn periodic_interrupts_come_at_their_rate() {
    let mut rig = Rig::at(NEARLY_2024);
    rig.write(B, HOURS_24 | PERIODIC);
    for (rate, per_second) in [(3, 8192), (6, 1024), (15, 2), (1, 256), (2, 128), (0, 0)] {
        rig.write(A, DIVIDER_RUNS | rate);
        rig.read(C);
        let mut count = 0;
        let end = rig.0.lent().clock.now() + SECOND;
        while let Some(at) = rig.1.deadline().filter(|at| *at <= end) {
            rig.run(at - rig.0.lent().clock.now());
            assert_eq!(rig.read(C) & PERIODIC, PERIODIC);
            count += 1;
        }
        rig.run(end - rig.0.lent().clock.now());
        assert_eq!(count, per_second, "rate {rate}");
    }
}

#[test]
fn the_memory_tells_of_ram_and_keeps_what_is_written() {
    let bench = Workbench::new();
    let config = Config { ram_below_4g: 3 << 30, ram_above_4g: 5 << 30, ..Config::default() };
    let mut rig = Rig(bench, Rtc::new(config));
    let mut word = |at| u16::from_le_bytes([rig.read(at), rig.read(at + 1)]);
    assert_eq!([word(0x15), word(0x17), word(0x30)], [640, 0xffff, 0xffff]);
    assert_eq!([word(0x34), word(0x5b), word(0x5c)], [(3 << 14) - (1 << 8), 0x4000, 0x0140]);
    rig.write(0x8f, 0x0a);
    assert!(rig.1.nmi_masked());
    rig.1.reset(&rig.0.lent());
    assert!(!rig.1.nmi_masked());
    assert_eq!(rig.read(0x0f), 0x0a, "the shutdown status survives a reset");
    assert_eq!(rig.read(D), VALID);
    let small = Rtc::new(Config { ram_below_4g: 8 << 20, ..Config::default() });
    assert_eq!(small.memory[0x17..0x19], (7u16 << 10).to_le_bytes());
    assert_eq!(small.memory[0x34..0x36], [0, 0]);
}

#[test]
fn reset_ends_interrupts_and_keeps_the_time() {
    let mut rig = Rig::at(NEARLY_2024);
    rig.write(YEAR, 0x42);
    rig.write(B, HOURS_24 | UPDATE);
    rig.run(SECOND);
    rig.1.reset(&rig.0.lent());
    assert_eq!(rig.0.levels(), [true, false]);
    assert_eq!(rig.1.deadline(), None);
    assert_eq!(rig.read(YEAR), 0x42);
}
