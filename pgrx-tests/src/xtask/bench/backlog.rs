//! Send one, read one, delete it, in front of a backlog: does its depth matter?
//!
//! Beside the rates it tells what was written to the WAL meanwhile: a deep backlog's head lies on pages that no
//! checkpoint has met yet, and PostgreSQL logs such a page in full when it is first changed.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::report::Title;
use super::systems::{System, Work, HAND, PGMQ, PG_QUEUE};
use super::throughput::Turn;
use super::Bench;

const WORKLOAD: &str = "backlog";
pub const SHALLOW: &str = "backlog 10 k";
pub const DEEP: &str = "backlog 5 M";
const CLIENTS: u32 = 8;

/// A backlog: what it is called, its queue, its messages, and who is measured at it.
type Depth = (&'static str, &'static str, u64, &'static [&'static System]);

const FULL: [Depth; 3] = [
    (SHALLOW, "shallow", 10_000, &[&PG_QUEUE, &PGMQ, &HAND]),
    ("backlog 1 M", "middle", 1_000_000, &[&PG_QUEUE, &PGMQ, &HAND]),
    (DEEP, "deep", 5_000_000, &[&PG_QUEUE]),
];
const QUICK: [Depth; 2] = [FULL[0], ("backlog 300 k", "deep", 300_000, &[&PG_QUEUE, &PGMQ, &HAND])];

pub fn run(bench: &mut Bench) -> Result<()> {
    let title = "Send one, read one, delete it, three statements, 8 clients";
    bench.begin(Title { workload: WORKLOAD, title, unit: "rounds of three/s" });
    let depths: &[Depth] = bench.options.scaled(&FULL, &QUICK);
    let cases: Vec<(&Depth, &'static System)> =
        depths.iter().flat_map(|depth| depth.3.iter().map(move |system| (depth, *system))).collect();
    for (depth, system) in &cases {
        println!("    filling {}: {} messages", system.name, depth.2);
        bench.renew(system, depth.1, depth.2)?;
        turn(depth.1, system, 1).run(bench)?;
    }
    let mut logged: BTreeMap<(u64, &str), Logged> = BTreeMap::new();
    for round in 1..=bench.options.rounds() {
        for (depth, system) in &cases {
            let table = system.table(depth.1);
            bench.client.batch_execute(&format!("VACUUM {table}"))?;
            bench.client.batch_execute("CHECKPOINT")?;
            let before = Logged::so_far(bench)?;
            let seconds = bench.options.seconds();
            let rate = turn(depth.1, system, seconds).run(bench)?;
            let turns = rate * f64::from(seconds);
            logged.entry((depth.2, system.name)).or_default().add(&before, &Logged::so_far(bench)?, turns);
            bench.progress(round, depth.0, system.name, rate);
            bench.report.add(WORKLOAD, depth.0, system.name, rate);
        }
    }
    for (depth, _) in cases.iter().filter(|(_, system)| system.name == PG_QUEUE.name) {
        if let Some(logged) = logged.get(&(depth.2, PG_QUEUE.name)) {
            bench.report.note(WORKLOAD, format!("pg_queue, {}: {}", depth.0, logged.in_words()));
        }
    }
    for (depth, system) in &cases {
        bench.empty(system, depth.1)?;
    }
    Ok(())
}

fn turn(queue: &'static str, system: &'static System, seconds: u32) -> Turn<'static> {
    Turn { system, queue, work: Work::Cycle, clients: CLIENTS, seconds, walk: (0, 0) }
}

/// What went to the WAL, by all processes, during some rounds of three statements.
#[derive(Default)]
struct Logged {
    bytes: f64,
    full_pages: f64,
    turns: f64,
}

impl Logged {
    /// Since the server began. A session tells what it did when it ends at the latest.
    fn so_far(bench: &mut Bench) -> Result<Self> {
        let sql = "SELECT wal_bytes::float8, wal_fpi::float8 FROM pg_stat_wal";
        let row = bench.client.query_one(sql, &[]).context("cannot read pg_stat_wal")?;
        Ok(Self { bytes: row.try_get(0)?, full_pages: row.try_get(1)?, turns: 0.0 })
    }

    fn add(&mut self, before: &Self, after: &Self, turns: f64) {
        self.bytes += after.bytes - before.bytes;
        self.full_pages += after.full_pages - before.full_pages;
        self.turns += turns;
    }

    fn in_words(&self) -> String {
        let each = |of: f64| of / self.turns.max(1.0);
        format!(
            "{:.0} bytes of WAL a round of three, {:.3} pages in full",
            each(self.bytes),
            each(self.full_pages)
        )
    }
}
