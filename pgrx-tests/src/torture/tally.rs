//! How many calls of each kind, at each isolation level, came to something, and which errors there were: work that
//! always fails loses and doubles nothing, so no other rule sees it. And which messages were not as they were sent.
//!
//! Owns the list of errors that faults may cause. Judges nothing but that.

use std::collections::BTreeMap;

/// What was called, and at which isolation level.
pub type Kind = (&'static str, &'static str);
/// The level of a call outside a transaction.
pub const ALONE: &str = "alone";

/// What faults, and clients in each other's way, may cause.
const EXPECTED: [&str; 15] = [
    CONNECTION, // the client library's own, without a SQLSTATE
    "23505",    // the ledger has the key already
    "25P02",    // a COPY was cancelled after its answer
    "40001", "40P01", "53100", "53300", "53400", "55000", "55P03", "57014", "57P01", "57P02", "57P03",
    "P0002", // a strict finish is refused
];
pub const CONNECTION: &str = "connection";
/// So many attempts cannot all have had bad luck.
const TRIED_MIN: u64 = 100;

/// Calls of one kind at one level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    pub tried: u64,
    /// Answered, and not by "nothing": a message was read, an act was done.
    pub done: u64,
    pub failed: u64,
}

#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub calls: BTreeMap<Kind, Calls>,
    /// Messages that were delivered otherwise than they were sent.
    pub altered: Vec<String>,
    /// By SQLSTATE.
    pub errors: BTreeMap<String, u64>,
    /// The first of those that must not be, likewise, as the server put it.
    pub examples: BTreeMap<String, String>,
}

impl Tally {
    pub fn of(&mut self, call: &'static str, level: &'static str) -> &mut Calls {
        self.calls.entry((call, level)).or_default()
    }

    /// How often this was called, at any level.
    pub fn tried(&self, call: &str) -> u64 {
        self.calls.iter().filter(|((name, _), _)| *name == call).map(|(_, calls)| calls.tried).sum()
    }

    pub fn append(&mut self, other: Self) {
        for ((call, level), calls) in other.calls {
            let all = self.of(call, level);
            all.tried += calls.tried;
            all.done += calls.done;
            all.failed += calls.failed;
        }
        self.altered.extend(other.altered);
        for (code, count) in other.errors {
            *self.errors.entry(code).or_default() += count;
        }
        for (code, example) in other.examples {
            self.examples.entry(code).or_insert(example);
        }
    }

    /// A call ended with an error; `code` may be followed by more.
    pub fn ended_with(&mut self, code: String, error: &postgres::Error) {
        if !EXPECTED.contains(&code.as_str()) && !self.examples.contains_key(&code) {
            self.examples.insert(code.clone(), format!(": {error:?}"));
        }
        *self.errors.entry(code).or_default() += 1;
    }

    /// What cannot be by faults alone. `wanted`: kinds that must have been done at least once.
    pub fn failures(&self, wanted: &[Kind]) -> Vec<String> {
        let mut failures = Vec::new();
        for (code, count) in &self.errors {
            if !EXPECTED.contains(&code.as_str()) {
                let example = self.examples.get(code).map_or("", String::as_str);
                failures.push(format!("{count} calls ended with SQLSTATE {code}{example}"));
            }
        }
        for ((call, level), calls) in &self.calls {
            if calls.done == 0 && calls.tried >= TRIED_MIN {
                failures.push(format!("of {} calls of {call} ({level}) none came to anything", calls.tried));
            }
        }
        for one in wanted {
            let calls = self.calls.get(one).copied().unwrap_or_default();
            if calls.done == 0 && calls.tried < TRIED_MIN {
                failures.push(format!("{} ({}) was never done ({} tries)", one.0, one.1, calls.tried));
            }
        }
        if let Some(first) = self.altered.first() {
            failures.push(format!("{} messages were altered, the first: {first}", self.altered.len()));
        }
        let sum = |what: fn(&Calls) -> u64| self.calls.values().map(what).sum::<u64>();
        let (tried, failed) = (sum(|calls| calls.tried), sum(|calls| calls.failed));
        if 2 * failed > tried {
            failures.push(format!("{failed} of {tried} calls failed"));
        }
        failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(tried: u64, done: u64, failed: u64) -> Tally {
        let mut tally = Tally::default();
        *tally.of("extend", ALONE) = Calls { tried, done, failed };
        tally
    }

    #[test]
    fn tally_of_good_work_has_no_failures() {
        let mut good = tally(TRIED_MIN, 1, TRIED_MIN / 2);
        good.errors.insert("57014".to_owned(), 3);
        assert!(good.failures(&[("extend", ALONE)]).is_empty());
    }

    #[test]
    fn tally_of_an_unexpected_error_fails() {
        let mut bad = tally(10, 9, 1);
        bad.errors.insert("26000".to_owned(), 1);
        assert_eq!(bad.failures(&[]), ["1 calls ended with SQLSTATE 26000"]);
    }

    #[test]
    fn tally_of_a_kind_that_is_never_done_fails() {
        assert!(tally(TRIED_MIN - 1, 0, 0).failures(&[]).is_empty());
        assert_eq!(tally(TRIED_MIN, 0, 0).failures(&[]).len(), 1);
        assert_eq!(tally(1, 0, 0).failures(&[("extend", ALONE)]).len(), 1);
        assert_eq!(tally(1, 1, 0).failures(&[("extend", "serializable")]).len(), 1);
    }

    #[test]
    fn tally_of_an_altered_message_fails() {
        let mut bad = tally(1, 1, 0);
        bad.altered = vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(bad.failures(&[]), ["2 messages were altered, the first: a"]);
    }

    #[test]
    fn tally_of_more_failed_than_answered_calls_fails() {
        assert_eq!(tally(10, 4, 6).failures(&[]), ["6 of 10 calls failed"]);
    }
}
