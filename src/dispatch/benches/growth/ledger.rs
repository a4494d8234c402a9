//! Runs one operation through criterion and keeps its figures for the table at the end. Owns the table.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode};

/// Criterion's samples of a benchmark; earlier calls are its warm-up.
pub const SAMPLES: usize = 10;

/// What every operation cost, by operation and size, in the order of measuring.
#[derive(Default)]
pub struct Ledger {
    rows: Vec<Line>,
}

struct Line {
    operation: String,
    ns_by_size: BTreeMap<usize, f64>,
}

impl Ledger {
    /// Measures `operation` at `size`. `round` does it some thousand times, restores what it changed, and returns
    /// how often it was done and how long that alone took. It is never asked for less, however few iterations
    /// criterion wants: what restoring costs must not decide how much is measured.
    pub fn measure(
        &mut self,
        c: &mut Criterion,
        operation: &str,
        size: usize,
        mut round: impl FnMut() -> (usize, Duration),
    ) {
        let mut calls_ns: Vec<f64> = Vec::new();
        let mut group = c.benchmark_group(operation);
        group.sampling_mode(SamplingMode::Flat);
        group.bench_function(size.to_string(), |b| {
            b.iter_custom(|iterations| {
                let (mut done, mut took) = (0, Duration::ZERO);
                while (done as u64) < iterations {
                    let (count, duration) = round();
                    done += count;
                    took += duration;
                }
                let each_ns = took.as_nanos() as f64 / done as f64;
                calls_ns.push(each_ns);
                Duration::from_nanos((each_ns * iterations as f64) as u64)
            });
        });
        group.finish();
        let samples = &mut calls_ns[calls_ns.len().saturating_sub(SAMPLES)..].to_vec();
        if !samples.is_empty() {
            samples.sort_by(f64::total_cmp);
            self.note(operation, size, samples[samples.len() / 2]);
        }
    }

    fn note(&mut self, operation: &str, size: usize, ns: f64) {
        if let Some(line) = self.rows.iter_mut().find(|line| line.operation == operation) {
            line.ns_by_size.insert(size, ns);
        } else {
            self.rows.push(Line { operation: operation.to_owned(), ns_by_size: [(size, ns)].into() });
        }
    }

    /// A Markdown table of all that was measured: nanoseconds, and how they grew from the smallest size to the
    /// largest.
    pub fn print(&self, title: &str) {
        let sizes: Vec<usize> = {
            let mut all: Vec<usize> =
                self.rows.iter().flat_map(|line| line.ns_by_size.keys().copied()).collect();
            all.sort_unstable();
            all.dedup();
            all
        };
        if sizes.is_empty() {
            return;
        }
        println!(
            "\n| {title} | {} | growth |",
            sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(" | ")
        );
        println!("|---|{}", "---:|".repeat(sizes.len() + 1));
        for line in &self.rows {
            let cells: Vec<String> = sizes
                .iter()
                .map(|size| line.ns_by_size.get(size).map_or_else(|| "-".to_owned(), |ns| shown(*ns)))
                .collect();
            let (first, last) = (line.ns_by_size.values().next(), line.ns_by_size.values().next_back());
            let growth = first.zip(last).map_or(1.0, |(first, last)| last / first);
            println!("| {} | {} | {growth:.1} |", line.operation, cells.join(" | "));
        }
    }
}

fn shown(ns: f64) -> String {
    if ns < 100.0 {
        format!("{ns:.1}")
    } else {
        format!("{ns:.0}")
    }
}

/// How long it takes.
pub fn time(f: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    f();
    begun.elapsed()
}

/// Somebody wants the result: it is computed.
pub fn seen<T>(value: T) {
    black_box(value);
}
