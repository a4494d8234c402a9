//! Read one, delete it, while another session holds a snapshot: nothing that a reader leaves behind can go.
//!
//! Owns that session. The systems take turns slice by slice under the same snapshot, so that a slice's time is the
//! system's own work so far, and what the machine does meanwhile hits all of them.

use anyhow::{Context, Result};

use super::report::{Report, Title};
use super::systems::{Work, SYSTEMS};
use super::throughput::{warm_up, Turn};
use super::{Bench, DATABASE};

const WORKLOAD: &str = "snapshot";
const QUEUE: &str = "bench";
const CLIENTS: u32 = 8;
const SLICES: u32 = 7;
const SLICE_SECONDS: u32 = 10;
/// How much more than its unhampered rate asks for each system is given.
const MARGIN: f64 = 1.7;

fn variant(seconds: u32) -> String {
    format!("after {seconds} s")
}

/// The first slice that began after a minute or more.
pub fn slice_after_a_minute(report: &Report) -> Option<String> {
    let seconds = |variant: &str| variant.strip_prefix("after ")?.strip_suffix(" s")?.parse::<u32>().ok();
    report.variants(WORKLOAD).into_iter().find(|v| seconds(v).is_some_and(|s| s >= 60)).map(str::to_owned)
}

pub fn run(bench: &mut Bench) -> Result<()> {
    let slices = bench.options.scaled(SLICES, 3);
    let seconds = bench.options.scaled(SLICE_SECONDS, 2);
    let title = "Read one and delete it, 8 clients, another session holding a snapshot all the while";
    bench.begin(Title { workload: WORKLOAD, title, unit: "messages/s" });
    let mut slice_rows = Vec::new();
    for system in SYSTEMS {
        let rate = warm_up(bench, system, Work::ReadDelete)?;
        slice_rows.push((rate * f64::from(seconds) * MARGIN) as u64);
    }
    for (system, rows) in SYSTEMS.into_iter().zip(&slice_rows) {
        println!("    {}: {} messages", system.name, rows * u64::from(slices));
        bench.renew(system, QUEUE, rows * u64::from(slices))?;
    }
    let mut holder = bench.cluster.connect(DATABASE)?;
    let mut snapshot =
        holder.build_transaction().isolation_level(postgres::IsolationLevel::RepeatableRead).start()?;
    snapshot.query_one("SELECT count(*) FROM pg_class", &[]).context("cannot take a snapshot")?;
    for slice in 0..slices {
        for (system, rows) in SYSTEMS.into_iter().zip(&slice_rows) {
            bench.client.batch_execute("CHECKPOINT")?;
            let walk = (u64::from(slice) * rows, rows / u64::from(CLIENTS));
            let turn = Turn { system, queue: QUEUE, work: Work::ReadDelete, clients: CLIENTS, seconds, walk };
            let rate = turn.run(bench)?;
            bench.progress(1, &variant(slice * seconds), system.name, rate);
            bench.report.add(WORKLOAD, &variant(slice * seconds), system.name, rate);
        }
    }
    snapshot.commit().context("the snapshot did not last")?;
    for system in SYSTEMS {
        bench.empty(system, QUEUE)?;
    }
    Ok(())
}
