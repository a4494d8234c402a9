//! What a round found, as a table and as JSON. Owns the words; decides nothing.

use std::fmt;

use serde_json::{json, Value};

use super::round::{Outcome, Strikes};
use super::tally::{Calls, Tally};

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = &self.verdict;
        writeln!(
            f,
            "seed {}, {}, fsync {}, {} s and {} s of draining",
            self.seed,
            self.version,
            if self.is_durable { "on" } else { "off" },
            self.took.as_secs() - self.drained_in.as_secs(),
            self.drained_in.as_secs()
        )?;
        writeln!(f, "\nfault                 struck  missed   calls open, mean   ms each   the last one")?;
        for (name, strikes) in &self.strikes {
            if let Some(why) = &strikes.skipped {
                writeln!(f, "    {name:<18} SKIPPED: {why}")?;
                continue;
            }
            let Strikes { hits, misses, .. } = strikes;
            let (open, ms) = (mean(strikes.open_calls, *hits), mean(strikes.took_us, *hits) / 1e3);
            let last = if *hits > 0 { &strikes.last_hit } else { &strikes.last_miss };
            writeln!(f, "    {name:<18} {hits:>5}  {misses:>6}   {open:>16.1}   {ms:>7.0}   {last}")?;
        }
        writeln!(f, "    {:<18} {:>5}", "all", self.hits())?;
        writeln!(f, "\n{} calls in {} sessions", self.calls, self.sessions)?;
        let errors: Vec<String> =
            self.tally.errors.iter().map(|(code, count)| format!("{code} {count}")).collect();
        writeln!(f, "errors by SQLSTATE: {}", errors.join(", "))?;
        writeln!(f, "call                  in a transaction       tried       done     failed")?;
        for ((call, level), Calls { tried, done, failed }) in &self.tally.calls {
            writeln!(f, "    {call:<18} {level:<17} {tried:>10} {done:>10} {failed:>10}")?;
        }
        for (what, count) in self.figures() {
            writeln!(f, "    {what:<44} {count:>10}")?;
        }
        writeln!(f, "\nbroken rules")?;
        for (name, count) in verdict.counts() {
            writeln!(f, "    {name:<44} {:>10}", count.broken)?;
            for example in &count.examples {
                writeln!(f, "        {example}")?;
            }
        }
        writeln!(f, "    {:<44} not applicable: groups are not built", "order")?;
        for failure in &self.failures {
            writeln!(f, "FAILED: {failure}")?;
        }
        write!(f, "\n{}", if self.is_good() { "OK" } else { "NOT OK" })
    }
}

fn mean(sum: u64, count: u64) -> f64 {
    if count == 0 {
        0.0
    } else {
        sum as f64 / count as f64
    }
}

impl Outcome {
    fn figures(&self) -> [(&'static str, u64); 14] {
        let verdict = &self.verdict;
        [
            ("sends tried", verdict.tried),
            ("sends acknowledged", verdict.acknowledged),
            ("sends rolled back", verdict.rolled_back),
            ("sends whose commit is unknown", verdict.unknown),
            ("of these, delivered", verdict.unknown_delivered),
            ("deliveries", verdict.deliveries),
            ("finishes acknowledged", verdict.finishes),
            ("finishes and the like refused", verdict.refused),
            ("reads that came back short, nobody near", verdict.short),
            ("young leases forgotten (the exception)", verdict.forgotten_young),
            ("leases forgotten that may have been written", verdict.forgotten_unsure),
            ("leases that no crash might forget", verdict.outlived),
            ("lost in an asynchronous failover", verdict.failover_lost),
            ("undone by an asynchronous failover", verdict.failover_undone),
        ]
    }

    pub fn to_json(&self) -> Value {
        let strikes: serde_json::Map<String, Value> =
            self.strikes.iter().map(|(name, strikes)| ((*name).to_owned(), strikes.to_json())).collect();
        let figures: serde_json::Map<String, Value> =
            self.figures().iter().map(|(what, count)| ((*what).to_owned(), json!(count))).collect();
        let broken: serde_json::Map<String, Value> = (self.verdict.counts().iter())
            .map(|(name, count)| {
                ((*name).to_owned(), json!({"count": count.broken, "examples": count.examples}))
            })
            .collect();
        json!({
            "seed": self.seed, "version": self.version, "fsync": self.is_durable,
            "seconds": self.took.as_secs_f64(), "seconds_draining": self.drained_in.as_secs_f64(),
            "strikes": self.hits(), "faults": strikes, "calls": self.calls, "sessions": self.sessions,
            "errors": self.tally.errors, "calls_by_kind": self.tally.to_json(), "figures": figures, "broken": broken, "order": "not applicable",
            "failures": self.failures, "is_good": self.is_good(),
        })
    }
}

impl Strikes {
    fn to_json(&self) -> Value {
        json!({
            "hits": self.hits, "misses": self.misses, "open_calls": self.open_calls,
            "seconds": self.took_us as f64 / 1e6, "last_hit": self.last_hit, "last_miss": self.last_miss,
            "skipped": self.skipped,
        })
    }
}

impl Tally {
    fn to_json(&self) -> Value {
        let calls = self.calls.iter().map(|((call, level), calls)| {
            json!({"call": call, "level": level, "tried": calls.tried, "done": calls.done, "failed": calls.failed})
        });
        calls.collect()
    }
}
