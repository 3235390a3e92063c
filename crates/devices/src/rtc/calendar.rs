//! Seconds and dates: the proleptic Gregorian calendar, UTC, without leap seconds.

/// A date and a time of day. When made by [`Date::at`] all fields are in their ranges; [`Date::seconds`] takes any values and carries what is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    pub year: i64,
    /// 1 to 12.
    pub month: i64,
    /// 1 to 31.
    pub day: i64,
    pub hour: i64,
    pub minute: i64,
    pub second: i64,
}

/// Days before each month of a year that begins in March, so that a leap day is its last.
const DAYS_BEFORE: [i64; 12] = [0, 31, 61, 92, 122, 153, 184, 214, 245, 275, 306, 337];
const DAYS_PER_4_YEARS: i64 = 4 * 365 + 1;
const DAYS_PER_100_YEARS: i64 = 25 * DAYS_PER_4_YEARS - 1;
const DAYS_PER_400_YEARS: i64 = 4 * DAYS_PER_100_YEARS + 1;
/// From 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;
const DAY: i64 = 86_400;

impl Date {
    /// The date that many seconds after 1970-01-01 00:00.
    pub fn at(seconds: i64) -> Date {
        let days = seconds.div_euclid(DAY) + EPOCH;
        let time = seconds.rem_euclid(DAY);
        let era = days.div_euclid(DAYS_PER_400_YEARS);
        let day = days.rem_euclid(DAYS_PER_400_YEARS);
        // Of the last century and the last year of a period, the leap day that the others lack must not begin another.
        let century = (day / DAYS_PER_100_YEARS).min(3);
        let day = day - century * DAYS_PER_100_YEARS;
        let leap = day / DAYS_PER_4_YEARS;
        let day = day % DAYS_PER_4_YEARS;
        let year = (day / 365).min(3);
        let day = day - year * 365;
        let month = DAYS_BEFORE.partition_point(|before| *before <= day) as i64 - 1;
        let day = day - DAYS_BEFORE[month as usize];
        let january = i64::from(month >= 10);
        Date {
            year: era * 400 + century * 100 + leap * 4 + year + january,
            month: (month + 2) % 12 + 1,
            day: day + 1,
            hour: time / 3600,
            minute: time / 60 % 60,
            second: time % 60,
        }
    }

    /// How many seconds after 1970-01-01 00:00 it is.
    pub fn seconds(self) -> i64 {
        // Months since March of year 0.
        let months = self.year * 12 + self.month - 3;
        let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
        let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
        let days = year * 365 + leap_days + DAYS_BEFORE[month as usize] + self.day - 1 - EPOCH;
        days * DAY + self.hour * 3600 + self.minute * 60 + self.second
    }

    /// The day of the week, 1 (Sunday) to 7.
    pub fn weekday(self) -> i64 {
        // 1970-01-01 was a Thursday.
        (self.seconds().div_euclid(DAY) + 4).rem_euclid(7) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn date(year: i64, month: i64, day: i64) -> Date {
        Date { year, month, day, hour: 0, minute: 0, second: 0 }
    }

    #[test]
    fn known_dates() {
        assert_eq!(Date::at(0), date(1970, 1, 1));
        assert_eq!(Date::at(0).weekday(), 5);
        assert_eq!(Date::at(951_782_400), date(2000, 2, 29));
        assert_eq!(Date::at(951_868_800), date(2000, 3, 1));
        assert_eq!(Date::at(4_107_542_400), date(2100, 3, 1));
        let last = Date { hour: 23, minute: 59, second: 59, ..date(2023, 12, 31) };
        assert_eq!(Date::at(1_704_067_199), last);
        assert_eq!(last.weekday(), 1);
    }

    proptest! {
        #[test]
        fn every_second_has_one_date(seconds in -100_000_000_000i64..400_000_000_000) {
            let date = Date::at(seconds);
            prop_assert_eq!(date.seconds(), seconds);
            prop_assert!((1..=12).contains(&date.month) && (1..=31).contains(&date.day));
        }

        /// Day after day the date grows by one or begins a new month.
        #[test]
        fn days_follow_each_other(day in -1_000_000i64..4_000_000) {
            let (today, tomorrow) = (Date::at(day * DAY), Date::at((day + 1) * DAY));
            if tomorrow.day == 1 {
                let leap = today.year % 4 == 0 && (today.year % 100 != 0 || today.year % 400 == 0);
                let length = match today.month { 2 => 28 + i64::from(leap), 4 | 6 | 9 | 11 => 30, _ => 31 };
                prop_assert_eq!(today.day, length);
                prop_assert_eq!(today.month % 12 + 1, tomorrow.month);
            } else {
                prop_assert_eq!(today.day + 1, tomorrow.day);
                prop_assert_eq!(today.month, tomorrow.month);
            }
        }
    }
}
