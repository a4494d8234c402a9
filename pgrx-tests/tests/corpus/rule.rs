//! What must hold of any text that is given as a schedule. What the fuzzer drives, and what replays its corpus.

use crate::schedule_rule::{cron, is_cron, zone, Rule};

/// In order: no change of clocks, one an hour wide, one of half an hour, one at midnight, one that skipped a day.
const ZONES: [&str; 5] = ["UTC", "Europe/Berlin", "Australia/Lord_Howe", "America/Santiago", "Pacific/Apia"];

/// A byte for the zone, eight for the time, the rest is the expression.
pub fn run(data: &[u8]) {
    let Some((place, rest)) = data.split_first() else { return };
    let Some((time, text)) = rest.split_first_chunk::<8>() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let after_us = i64::from_le_bytes(*time);
    let zone = zone(ZONES[usize::from(*place) % ZONES.len()]).expect("a zone's name");
    let _ = is_cron(text);
    if let Ok(rule) = cron(text, zone) {
        // From 1973 to 2026: between the ends of time nothing else happens, at them nothing may overflow.
        let _ = rule.next_us(after_us);
        check(&rule, after_us.rem_euclid(1_700_000_000_000_000) - 850_000_000_000_000);
    }
    if let Some(period_us) = after_us.checked_abs().filter(|us| *us > 0) {
        check(&Rule::Interval { anchor_us: after_us / 2, period_us }, after_us / 3);
    }
}

/// Times only go on, and none is passed over.
fn check(rule: &Rule, after_us: i64) {
    let mut at_us = after_us;
    for _ in 0..3 {
        let Some(next_us) = rule.next_us(at_us) else { return };
        assert!(next_us > at_us, "{next_us} is not after {at_us}");
        let between_us = at_us + (next_us - at_us) / 2;
        if between_us > at_us && between_us < next_us {
            assert_eq!(rule.next_us(between_us), Some(next_us), "after {at_us} and after {between_us}");
        }
        at_us = next_us;
    }
}
