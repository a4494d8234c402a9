//! When a schedule fires: cron expressions and intervals, and the next time after a given one. Owns the rules of that
//! and nothing else: no Postgres, no clock, no table. Times are microseconds since 2000-01-01 UTC, as Postgres' are.
//!
//! # When clocks are changed
//!
//! A cron expression is about the wall clock of its time zone. Where an hour is skipped or comes twice, `croner`
//! (and this module passes on) does as Vixie cron does:
//!
//! * one time of day (`30 2 * * *`: second, minute and hour are each one number) fires once that day: a time that is
//!   skipped fires at the first moment after the gap, one that comes twice fires the first time;
//! * everything else (`*`, steps, lists, ranges in second, minute or hour) fires whenever the wall clock shows such a
//!   time: not at all in the hour that is skipped, in both of the hour that comes twice.
//!
//! An interval knows no wall clock: it fires at its anchor plus a multiple of its length; a day is 24 hours.

use chrono::{DateTime, TimeDelta, Utc};
use chrono_tz::Tz;
use croner::parser::{CronParser, Seconds, Year};
use croner::Cron;

/// 2000-01-01 in microseconds since 1970-01-01.
const EPOCH_US: i64 = 946_684_800_000_000;

/// How often the search goes on from a time that `croner` gave although it is not later than asked for.
const TRIES_MAX: usize = 3;

/// When a schedule fires.
#[derive(Debug)]
pub enum Rule {
    /// At the times that an expression names on the clock of a zone.
    Cron {
        /// The expression.
        cron: Box<Cron>,
        /// The zone.
        zone: Tz,
    },
    /// At `anchor_us + k * period_us`, k = 1, 2, ...
    Interval {
        /// From when it is counted.
        anchor_us: i64,
        /// Its length, above 0.
        period_us: i64,
    },
}

/// What is wrong with a cron expression.
#[derive(Debug, PartialEq, Eq)]
pub enum Problem {
    /// It has so many fields.
    Fields(usize),
    /// A field cannot be read: its name, its text, what it may be.
    Field {
        /// `minute`, say.
        name: &'static str,
        /// As it was given.
        text: String,
        /// What would be right.
        allowed: &'static str,
    },
    /// Each field can be read, but not all together.
    Unreadable(String),
}

/// A cron expression's fields, in order, and what each may be.
const FIELDS: [(&str, &str); 6] = [
    ("second", "0 to 59, *, lists, ranges and steps such as 1,5-9,*/10"),
    ("minute", "0 to 59, *, lists, ranges and steps such as 1,5-9,*/10"),
    ("hour", "0 to 23, *, lists, ranges and steps such as 1,5-9,*/10"),
    ("day of month", "1 to 31, *, lists, ranges and steps such as 1,5-9,*/10, L for the last day, 15W for the weekday nearest to the 15th"),
    ("month", "1 to 12 or JAN to DEC, *, lists, ranges and steps such as 1,5-9,*/3"),
    ("day of week", "0 to 7 or SUN to SAT (0 and 7 are Sunday), *, lists, ranges and steps such as 1,3-5,*/2, 5#2 for the second Friday, 5L for the last one, +5 for a Friday that is also the day of month"),
];

/// Whether a text is meant as a cron expression; else it is meant as an interval. After the first number of an
/// interval comes a unit; in an expression comes another field.
pub fn is_cron(text: &str) -> bool {
    let second = text.split_whitespace().nth(1).and_then(|token| token.chars().next());
    // No interval has a star in it, or is called @daily: what does is an expression, however wrong.
    text.contains(['*', '@']) || second.is_some_and(|first| !first.is_alphabetic())
}

/// A time zone by its IANA name.
pub fn zone(name: &str) -> Option<Tz> {
    name.parse().ok()
}

/// Reads a cron expression of five or six fields.
pub fn cron(text: &str, zone: Tz) -> Result<Rule, Problem> {
    let fields: Vec<&str> = text.split_whitespace().collect();
    let missing = FIELDS.len().wrapping_sub(fields.len()); // without seconds: one
    if missing > 1 {
        return Err(Problem::Fields(fields.len()));
    }
    let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
    for (i, field) in fields.iter().enumerate() {
        let (name, allowed) = FIELDS[i + missing];
        let mut alone = ["*"; FIELDS.len()];
        alone[i + missing] = field;
        // What `croner` would let pass: a nickname such as @daily, which stands for all fields, and an empty element
        // of a list; a second, minute or hour that never is would have it search all days to the year 5000; and the name
        // of a month or a weekday in any field, as if it were its number.
        let is_odd = field.contains('@') || field.split(',').any(str::is_empty);
        if is_odd || has_others_names(name, field) || parser.parse(&alone.join(" ")).is_err() {
            return Err(Problem::Field { name, text: (*field).to_owned(), allowed });
        }
    }
    let cron = parser.parse(&fields.join(" ")).map_err(|error| Problem::Unreadable(error.to_string()))?;
    Ok(Rule::Cron { cron: Box::new(cron), zone })
}

/// Whether a field has names in it that are not its own.
fn has_others_names(name: &str, field: &str) -> bool {
    const MONTHS: [&str; 12] =
        ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];
    const DAYS: [&str; 7] = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];
    let own: &[&str] = match name {
        "month" => &MONTHS,
        "day of week" => &DAYS,
        _ => &[],
    };
    let words = field.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| word.len() >= 3);
    // FRIL is the last Friday.
    let is_own = |word: &str| own.iter().any(|own| word.get(..3).is_some_and(|w| w.eq_ignore_ascii_case(own)));
    words.into_iter().any(|word| !is_own(word))
}

impl Rule {
    /// The first time after `after_us` at which it fires. `None`: it never does again.
    pub fn next_us(&self, after_us: i64) -> Option<i64> {
        match self {
            Rule::Cron { cron, zone } => next_of_cron(cron, *zone, after_us),
            Rule::Interval { anchor_us, period_us } => {
                let passed = after_us.checked_sub(*anchor_us)?.div_euclid(*period_us);
                // The clock may have been set back since: then it goes on all the same.
                let passed = if passed == -1 { 0 } else { passed };
                anchor_us.checked_add(passed.checked_add(1)?.checked_mul(*period_us)?)
            }
        }
    }
}

fn next_of_cron(cron: &Cron, zone: Tz, after_us: i64) -> Option<i64> {
    let after: DateTime<Utc> = DateTime::from_timestamp_micros(after_us.checked_add(EPOCH_US)?)?;
    let mut from = after.with_timezone(&zone);
    for _ in 0..TRIES_MAX {
        // An error: there is none before the year 5000, where the search ends.
        let next = cron.find_next_occurrence(&from, false).ok()?;
        if next > after {
            return next.timestamp_micros().checked_sub(EPOCH_US);
        }
        from = from.checked_add_signed(TimeDelta::seconds(1))?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(rfc3339: &str) -> i64 {
        DateTime::parse_from_rfc3339(rfc3339).unwrap().timestamp_micros() - EPOCH_US
    }

    fn shown(us: i64) -> String {
        DateTime::<Utc>::from_timestamp_micros(us + EPOCH_US).unwrap().format("%F %T%.f").to_string()
    }

    fn rule(text: &str, zone_name: &str) -> Rule {
        cron(text, zone(zone_name).unwrap()).unwrap()
    }

    /// The first `count` times after a moment, in UTC.
    fn times(rule: &Rule, after: &str, count: usize) -> Vec<String> {
        let mut at_us = us(after);
        (0..count)
            .map(|_| {
                at_us = rule.next_us(at_us).unwrap();
                shown(at_us)
            })
            .collect()
    }

    #[test]
    fn schedule_rule_tells_cron_from_interval() {
        for text in [
            "* * * * *",
            "0 0 * * * *",
            "5 4 * * SUN",
            "1 2",
            "*/5 x * * *",
            " 0\t12 1 1 1 ",
            "0 @daily",
            "@daily",
        ] {
            assert!(is_cron(text), "{text}");
        }
        for text in ["5 minutes", "1 day", "00:00:30", "1 day 02:00", "PT5M", "", "banana", "90 s"] {
            assert!(!is_cron(text), "{text}");
        }
    }

    #[test]
    fn schedule_rule_names_the_field_that_is_wrong() {
        let cases = [
            ("60 * * * * *", "second", "60"),
            ("x * * * * *", "second", "x"),
            ("60 * * * *", "minute", "60"),
            ("0 60 * * * *", "minute", "60"),
            ("* 24 * * *", "hour", "24"),
            ("* 5-3 * * *", "hour", "5-3"),
            ("* */0 * * *", "hour", "*/0"),
            ("* 0/10 * * *", "hour", "0/10"),
            ("* * 32 * *", "day of month", "32"),
            ("* * 0 * *", "day of month", "0"),
            ("* * 1# * *", "day of month", "1#"),
            ("* * * 13 *", "month", "13"),
            ("* * * JANUARY *", "month", "JANUARY"),
            ("* * * * 8", "day of week", "8"),
            ("* * * * FRIDAY", "day of week", "FRIDAY"),
            ("* * * * 5#6", "day of week", "5#6"),
            ("* * * * ä", "day of week", "ä"),
            ("@daily * * * *", "minute", "@daily"),
            (", * * * *", "minute", ","),
            ("* 1,,2 * * *", "hour", "1,,2"),
            ("* 99999999999 * * *", "hour", "99999999999"),
            // The first of two.
            ("61 25 * * *", "minute", "61"),
        ];
        for (text, wanted, part) in cases {
            match cron(text, Tz::UTC).unwrap_err() {
                Problem::Field { name, text: of, .. } => assert_eq!((name, &*of), (wanted, part), "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn schedule_rule_takes_names_in_their_own_fields_only() {
        for text in
            ["0 9 * MON *", "0 9 * * JAN", "0 9 * * JAN-MAR", "MON 9 * * *", "JAN * * * *", "0 0 FEB * *"]
        {
            assert!(matches!(cron(text, Tz::UTC), Err(Problem::Field { .. })), "{text}");
        }
        for text in ["0 9 * jan,Mar *", "0 9 * * mon-FRI", "0 9 * * FRIL", "0 9 L * *", "0 9 15W * *"] {
            assert!(cron(text, Tz::UTC).is_ok(), "{text}");
        }
    }

    #[test]
    fn schedule_rule_counts_fields() {
        for (text, count) in
            [("", 0), ("* *", 2), ("* * * *", 4), ("* * * * * * *", 7), ("0 0 1 1 * * 2030", 7)]
        {
            assert_eq!(cron(text, Tz::UTC).unwrap_err(), Problem::Fields(count), "{text}");
        }
    }

    #[test]
    fn schedule_rule_survives_any_text() {
        let pieces = ["*", "/", "-", ",", "#", "L", "W", "+", "?", "0", "7", "65535", "65536", "SUN", "é", "@"];
        let mut seed = 1u64;
        for _ in 0..500 {
            let mut next = || {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (seed >> 33) as usize
            };
            let mut field = || (0..1 + next() % 4).map(|_| pieces[next() % pieces.len()]).collect::<String>();
            let text = (0..5).map(|_| field()).collect::<Vec<_>>().join(" ");
            let _ = cron(&text, Tz::UTC);
            let alone = format!("{} 0 1 1 *", field());
            if let Ok(rule) = cron(&alone, Tz::UTC) {
                let _ = rule.next_us(0);
            }
        }
    }

    #[test]
    fn schedule_rule_gives_the_next_time() {
        let after = "2026-11-23T10:07:30Z";
        assert_eq!(times(&rule("* * * * *", "UTC"), after, 2), ["2026-11-23 10:08:00", "2026-11-23 10:09:00"]);
        assert_eq!(
            times(&rule("*/20 * * * * *", "UTC"), after, 2),
            ["2026-11-23 10:07:40", "2026-11-23 10:08:00"]
        );
        assert_eq!(times(&rule("0 9 * * MON-FRI", "UTC"), "2026-11-27T09:00:00Z", 1), ["2026-11-30 09:00:00"]);
        assert_eq!(times(&rule("0 0 29 2 *", "UTC"), after, 2), ["2028-02-29 00:00:00", "2032-02-29 00:00:00"]);
        assert_eq!(times(&rule("0 12 L * *", "UTC"), after, 1), ["2026-11-30 12:00:00"]);
        assert_eq!(times(&rule("0 9 * * *", "Asia/Tokyo"), after, 1), ["2026-11-24 00:00:00"]);
        assert_eq!(times(&rule("0 9 * * *", "Europe/Berlin"), after, 1), ["2026-11-24 08:00:00"]);
    }

    #[test]
    fn schedule_rule_gives_times_after_and_never_at_the_one_given() {
        let rule = rule("* * * * * *", "Europe/Berlin");
        let at_us = us("2026-10-25T00:30:00Z"); // in the hour that comes twice
        for after_us in [at_us - 1, at_us, at_us + 1, at_us + 500_000, at_us + 999_999] {
            let next_us = rule.next_us(after_us).unwrap();
            assert!(next_us > after_us && next_us - after_us <= 1_000_000, "{after_us}: {next_us}");
        }
    }

    #[test]
    fn schedule_rule_that_never_comes_true_has_no_next_time() {
        for text in ["0 0 30 2 *", "0 0 31 2,4,6,9,11 *"] {
            assert_eq!(rule(text, "UTC").next_us(us("2026-11-23T10:00:00Z")), None, "{text}");
        }
    }

    #[test]
    fn schedule_rule_fires_after_the_gap_what_falls_into_the_skipped_hour() {
        // 2026-03-29 in Berlin: 01:59:59 +01 is followed by 03:00:00 +02.
        assert_eq!(
            times(&rule("30 2 * * *", "Europe/Berlin"), "2026-03-28T00:00:00Z", 3),
            ["2026-03-28 01:30:00", "2026-03-29 01:00:00", "2026-03-30 00:30:00"]
        );
        // What is due in the hour before the gap fires once.
        assert_eq!(
            times(&rule("0 1 * * *", "Europe/Berlin"), "2026-03-28T12:00:00Z", 2),
            ["2026-03-29 00:00:00", "2026-03-29 23:00:00"]
        );
        // Not one time of day: the skipped ones are left out.
        assert_eq!(
            times(&rule("15,45 2 * * *", "Europe/Berlin"), "2026-03-28T12:00:00Z", 1),
            ["2026-03-30 00:15:00"]
        );
    }

    #[test]
    fn schedule_rule_fires_once_in_the_doubled_hour() {
        // 2026-10-25 in Berlin: 02:59:59 +02 is followed by 02:00:00 +01.
        assert_eq!(
            times(&rule("30 2 * * *", "Europe/Berlin"), "2026-10-24T12:00:00Z", 2),
            ["2026-10-25 00:30:00", "2026-10-26 01:30:00"]
        );
    }

    #[test]
    fn schedule_rule_fires_every_hour_whatever_the_clock_does() {
        let hourly = rule("0 * * * *", "Europe/Berlin");
        assert_eq!(
            times(&hourly, "2026-03-28T23:30:00Z", 4),
            ["2026-03-29 00:00:00", "2026-03-29 01:00:00", "2026-03-29 02:00:00", "2026-03-29 03:00:00"]
        );
        assert_eq!(
            times(&hourly, "2026-10-24T23:30:00Z", 4),
            ["2026-10-25 00:00:00", "2026-10-25 01:00:00", "2026-10-25 02:00:00", "2026-10-25 03:00:00"]
        );
        // Every quarter of the doubled hour, in both of it, forwards.
        let quarters = times(&rule("*/15 2 * * *", "Europe/Berlin"), "2026-10-24T12:00:00Z", 9);
        assert_eq!(quarters[0], "2026-10-25 00:00:00");
        assert_eq!(quarters[7], "2026-10-25 01:45:00");
        assert_eq!(quarters[8], "2026-10-26 01:00:00");
    }

    #[test]
    fn schedule_rule_of_an_interval_counts_from_its_anchor() {
        let anchor_us = us("2026-11-23T10:00:07.5Z");
        let rule = Rule::Interval { anchor_us, period_us: 60_000_000 };
        assert_eq!(rule.next_us(anchor_us), Some(anchor_us + 60_000_000));
        assert_eq!(rule.next_us(anchor_us + 59_999_999), Some(anchor_us + 60_000_000));
        assert_eq!(rule.next_us(anchor_us + 60_000_000), Some(anchor_us + 120_000_000));
        assert_eq!(rule.next_us(anchor_us + 86_400_000_000 + 1), Some(anchor_us + 86_460_000_000));
        assert_eq!(rule.next_us(anchor_us - 1), Some(anchor_us + 60_000_000), "a clock that was set back");
        assert_eq!(rule.next_us(anchor_us - 86_400_000_000), Some(anchor_us - 86_340_000_000), "by a day");
        assert_eq!(rule.next_us(i64::MAX), None);
    }

    #[test]
    fn schedule_rule_knows_the_zones_of_the_iana_database() {
        for name in ["UTC", "Europe/Berlin", "America/Argentina/Buenos_Aires", "Etc/GMT+5"] {
            assert!(zone(name).is_some(), "{name}");
        }
        for name in ["", "Mars/Olympus", "+02:00", "Europe/berlin "] {
            assert!(zone(name).is_none(), "{name}");
        }
    }
}
