//! Whether a soak was level: nothing that should stay as it is grew between a run's beginning and its end.
//! Owns the bounds.

use std::fmt;

use serde_json::{json, Value};

use super::soak_sample::Sample;

/// The part of a run that is warming up: tables find their size, caches fill.
const WARM_UP_PART: usize = 4;
/// Of the wanted rate at least this part must be sent and finished, also at the end.
const RATE_PART: f64 = 0.98;

/// How a figure at the end may differ from the one at the beginning.
#[derive(Clone, Copy)]
enum Bound {
    /// At most so many times as much, and so much more.
    Grows { times: f64, plus: f64 },
    /// At least so much.
    Least(f64),
    /// Not at all.
    Same,
}

/// One figure, at the beginning and at the end.
pub struct Finding {
    what: &'static str,
    unit: &'static str,
    first: f64,
    last: f64,
    bound: Bound,
}

impl Finding {
    pub fn is_level(&self) -> bool {
        match self.bound {
            Bound::Grows { times, plus } => self.last <= self.first * times + plus,
            Bound::Least(least) => self.last >= least,
            Bound::Same => self.first == self.last,
        }
    }

    pub fn to_json(&self) -> Value {
        json!({ "what": self.what, "unit": self.unit, "first": self.first, "last": self.last, "is_level": self.is_level() })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let word = if self.is_level() { "level" } else { "NOT LEVEL" };
        let bound = match self.bound {
            Bound::Grows { times, plus } => format!("<= {times} x + {plus}"),
            Bound::Least(least) => format!(">= {least:.0}"),
            Bound::Same => "the same".to_owned(),
        };
        let Finding { what, unit, first, last, .. } = self;
        write!(f, "{what:<28} {first:>10.2} -> {last:>10.2} {unit:<7} {word} ({bound})")
    }
}

type Figure = fn(&Sample) -> f64;

const MB: f64 = 1_048_576.0;
/// Latencies on a shared machine differ from minute to minute; what grows with the run grows past this.
const LATENCY: Bound = Bound::Grows { times: 1.5, plus: 5.0 };
/// Autovacuum comes in turns, so a table breathes.
const SIZE: Bound = Bound::Grows { times: 1.15, plus: 1.0 };
const MEMORY: Bound = Bound::Grows { times: 1.05, plus: 0.5 };

const FIGURES: [(&str, &str, Figure, Bound); 12] = [
    ("send, p50", "ms", |s| s.send_p50_ms, LATENCY),
    ("send, p99", "ms", |s| s.send_p99_ms, LATENCY),
    ("send to finished, p50", "ms", |s| s.message_p50_ms, LATENCY),
    ("send to finished, p99", "ms", |s| s.message_p99_ms, LATENCY),
    ("messages open", "", |s| s.open as f64, Bound::Grows { times: 1.25, plus: 200.0 }),
    ("heap", "MB", |s| s.heap_bytes as f64 / MB, SIZE),
    ("primary key", "MB", |s| s.primary_key_bytes as f64 / MB, SIZE),
    ("other indexes", "MB", |s| s.other_indexes_bytes as f64 / MB, SIZE),
    ("dead rows", "", |s| s.dead_rows as f64, Bound::Grows { times: 1.5, plus: 5_000.0 }),
    ("own memory of a session", "MB", |s| s.session_bytes as f64 / MB, MEMORY),
    ("own memory of the workers", "MB", |s| s.worker_bytes as f64 / MB, MEMORY),
    ("shared memory", "MB", |s| s.shared_bytes as f64 / MB, Bound::Same),
];

/// Compares the first third after warming up with the last third.
pub fn judge(samples: &[Sample], rate: f64) -> Vec<Finding> {
    let warm = &samples[samples.len() / WARM_UP_PART..];
    let third = (warm.len() / 3).max(1);
    let (beginning, end) = (&warm[..third], &warm[warm.len() - third..]);
    let finding = |what, unit, figure: Figure, bound| Finding {
        what,
        unit,
        first: median(beginning, figure),
        last: median(end, figure),
        bound,
    };
    let least = Bound::Least(rate * RATE_PART);
    let mut findings = vec![
        finding("sent", "/s", |s| s.sent_per_s, least),
        finding("finished", "/s", |s| s.finished_per_s, least),
    ];
    findings.extend(FIGURES.map(|(what, unit, figure, bound)| finding(what, unit, figure, bound)));
    if samples.iter().all(|sample| sample.slots.is_some()) {
        let slots: Figure = |s| s.slots.unwrap_or(0) as f64;
        findings.push(finding("slots in use", "", slots, Bound::Grows { times: 1.25, plus: 200.0 }));
    }
    findings
}

fn median(samples: &[Sample], figure: Figure) -> f64 {
    let mut figures: Vec<f64> = samples.iter().map(figure).collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(figure: impl Fn(usize) -> Sample) -> Vec<Finding> {
        judge(&(0..40).map(figure).collect::<Vec<_>>(), 100.0)
    }

    fn steady() -> Sample {
        Sample { sent_per_s: 100.0, finished_per_s: 100.0, heap_bytes: 50 << 20, ..Sample::default() }
    }

    #[test]
    fn steady_is_level() {
        assert!(run(|_| steady()).iter().all(Finding::is_level));
        // What grows while it warms up has not grown.
        let warming = |i: usize| Sample { heap_bytes: (5 + i.min(9) as i64) << 20, ..steady() };
        assert!(run(warming).iter().all(Finding::is_level));
    }

    #[test]
    fn growing_is_not_level() {
        let not_level = |findings: Vec<Finding>| -> Vec<&'static str> {
            findings.iter().filter(|finding| !finding.is_level()).map(|finding| finding.what).collect()
        };
        let fat = |i: usize| Sample { heap_bytes: (i as i64) << 20, ..steady() };
        assert_eq!(not_level(run(fat)), ["heap"]);
        let slow = |i: usize| Sample { finished_per_s: if i > 30 { 90.0 } else { 100.0 }, ..steady() };
        assert_eq!(not_level(run(slow)), ["finished"]);
        let leaking = |i: usize| Sample { session_bytes: (10 << 20) + ((i as i64) << 17), ..steady() };
        assert_eq!(not_level(run(leaking)), ["own memory of a session"]);
        let shared = |i: usize| Sample { shared_bytes: i as i64, ..steady() };
        assert_eq!(not_level(run(shared)), ["shared memory"]);
    }
}
