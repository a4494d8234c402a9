//! After a restart the dispatcher is empty: how long until a queue with a million messages is served again?

use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use queue_tests::StopMode;

use super::pgbench::{Length, Load};
use super::report::Title;
use super::systems::{Work, BATCH, PG_QUEUE};
use super::throughput::Turn;
use super::{Bench, DATABASE};

const WORKLOAD: &str = "rebuild";
const QUEUE: &str = "rebuild";
const FIRST_LIMIT: Duration = Duration::from_secs(60);
const CLIENTS: u32 = 8;
/// How much of the backlog the drain reads: what is left keeps every batch full.
const DRAINED: f64 = 0.8;

pub fn run(bench: &mut Bench) -> Result<()> {
    let messages: u64 = bench.options.scaled(1_000_000, 200_000);
    let title = "After a restart with a backlog of 1 M messages (quick: 200 k)";
    bench.begin(Title { workload: WORKLOAD, title, unit: "see each line" });
    for round in 1..=bench.options.rounds() {
        bench.renew(&PG_QUEUE, QUEUE, messages)?;
        restart(bench)?;
        let ready = Instant::now();
        let window = read_a_window(bench, round, ready)?;
        // Again: the drain begins with an empty dispatcher, too.
        restart(bench)?;
        let rate = drain(bench, messages)?;
        add(bench, round, "drain, 8 clients, messages/s", rate);
        bench
            .report
            .note(WORKLOAD, format!("from when the server takes connections; the window is {window} messages"));
    }
    bench.empty(&PG_QUEUE, QUEUE)
}

fn add(bench: &mut Bench, round: u32, variant: &str, value: f64) {
    bench.progress(round, variant, PG_QUEUE.name, value);
    bench.report.add(WORKLOAD, variant, PG_QUEUE.name, value);
}

fn restart(bench: &mut Bench) -> Result<()> {
    bench.cluster.restart(StopMode::Fast)?;
    bench.client = bench.cluster.connect(DATABASE)?;
    Ok(())
}

/// Reads until a whole window was handed out; returns how many messages that is.
fn read_a_window(bench: &mut Bench, round: u32, ready: Instant) -> Result<i64> {
    let window: i64 =
        bench.client.query_one("SELECT current_setting('pg_queue.ready_window')::int8", &[])?.try_get(0)?;
    let read = "SELECT count(*) FROM queue_read('rebuild', $1)";
    let mut take = |quantity: i64| -> Result<i64> {
        let row = bench.client.query_one(read, &[&quantity]).context("cannot read after the restart")?;
        Ok(row.try_get(0)?)
    };
    while take(1)? == 0 {
        if ready.elapsed() > FIRST_LIMIT {
            bail!("no message came within {} s after the restart", FIRST_LIMIT.as_secs());
        }
    }
    let first = ready.elapsed();
    let mut read = 1;
    while read < window {
        read += take((window - read).min(1_000))?;
        if ready.elapsed() > FIRST_LIMIT {
            bail!("only {read} messages came within {} s after the restart", FIRST_LIMIT.as_secs());
        }
    }
    let all = ready.elapsed();
    add(bench, round, "first message read, s", first.as_secs_f64());
    add(bench, round, "a whole window read, s", all.as_secs_f64());
    Ok(window)
}

fn drain(bench: &mut Bench, messages: u64) -> Result<f64> {
    let turns = (messages as f64 * DRAINED) as u64 / BATCH / u64::from(CLIENTS);
    let work = Work::ReadDeleteBatch;
    let turn = Turn { system: &PG_QUEUE, queue: QUEUE, work, clients: CLIENTS, seconds: 0, walk: (0, 0) };
    let variables = turn.variables(bench)?;
    let script = PG_QUEUE.script(work, QUEUE).unwrap_or_default();
    let mut load = Load::new(&script, CLIENTS, Length::Transactions(turns));
    load.variables = &variables;
    let before = bench.count(&PG_QUEUE, QUEUE)?;
    let outcome = bench.pgbench.run(&load)?;
    let deleted = before - bench.count(&PG_QUEUE, QUEUE)?;
    Ok(outcome.tps * deleted as f64 / outcome.transactions as f64)
}
