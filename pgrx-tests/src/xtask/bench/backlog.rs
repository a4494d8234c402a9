//! Send one, read one, delete it, in front of a backlog: does its depth matter?

use anyhow::Result;

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
    for round in 1..=bench.options.rounds() {
        for (depth, system) in &cases {
            let table = system.table(depth.1);
            bench.client.batch_execute(&format!("VACUUM {table}"))?;
            bench.client.batch_execute("CHECKPOINT")?;
            let rate = turn(depth.1, system, bench.options.seconds()).run(bench)?;
            bench.progress(round, depth.0, system.name, rate);
            bench.report.add(WORKLOAD, depth.0, system.name, rate);
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
