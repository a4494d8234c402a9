//! An open loop: 800 sends and 800 reads + deletes a second, whether or not the server keeps up, beside a session
//! that aggregates a big table over and over. What counts is how long each took from when it should have begun.

use anyhow::{bail, Result};

use super::pgbench::{Length, Load, Outcome};
use super::report::Title;
use super::systems::{System, Work, HAND, PAYLOAD, PGMQ, PG_QUEUE};
use super::Bench;

const WORKLOAD: &str = "open_loop";
const QUEUE: &str = "open";
const RATE: f64 = 800.0;
const CLIENTS: u32 = 4;
/// So that a reader never comes before a sender.
const BACKLOG: u64 = 10_000;
/// Fewer than this part of the wanted rate and the system has not kept up.
const KEPT_UP: f64 = 0.95;
const ANALYTIC: &str =
    "SELECT k % 1000 AS g, count(*), sum(v), avg(v), max(note) FROM facts GROUP BY 1 ORDER BY 3;\n";

pub fn run(bench: &mut Bench) -> Result<()> {
    let title = "800 sends and 800 reads + deletes a second beside an analytic query: latency";
    bench.begin(Title { workload: WORKLOAD, title, unit: "ms" });
    let facts = bench.options.scaled(2_000_000, 300_000);
    bench.client.batch_execute(&format!(
        "CREATE TABLE IF NOT EXISTS facts AS SELECT g AS k, random() AS v, md5(g::text) AS note \
         FROM generate_series(1, {facts}) g"
    ))?;
    bench.client.batch_execute("VACUUM ANALYZE facts")?;
    let seconds = bench.options.seconds().max(bench.options.scaled(10, 2));
    for round in 1..=bench.options.rounds() {
        for system in [&PG_QUEUE, &PGMQ, &HAND] {
            turn(bench, system, round, seconds)?;
        }
    }
    bench.client.batch_execute("DROP TABLE facts")?;
    Ok(())
}

fn turn(bench: &mut Bench, system: &'static System, round: u32, seconds: u32) -> Result<()> {
    bench.renew(system, QUEUE, BACKLOG)?;
    let variables = [("payload", PAYLOAD.to_owned())];
    let script = |work| system.script(work, QUEUE).unwrap_or_default();
    let (send, read) = (script(Work::Send), script(Work::ReadDelete));
    let paced = |script| {
        let mut load = Load::new(script, CLIENTS, Length::Seconds(seconds));
        (load.rate, load.latencies, load.variables) = (Some(RATE), true, &variables);
        load
    };
    let analytic = bench.pgbench.start(&Load::new(ANALYTIC, 1, Length::Seconds(seconds)))?;
    let senders = bench.pgbench.start(&paced(&send))?;
    let readers = bench.pgbench.start(&paced(&read))?;
    let (sent, read) = (senders.finish()?, readers.finish()?);
    let queries = analytic.finish()?.transactions;
    let left = bench.count(system, QUEUE)?;
    if left != BACKLOG as i64 + sent.transactions as i64 - read.transactions as i64 {
        bail!(
            "{}: {left} rows are left of {BACKLOG} + {} - {}",
            system.name,
            sent.transactions,
            read.transactions
        );
    }
    let mut add = |what: &str, outcome: &Outcome| {
        for (name, quantile) in [("p50", 0.5), ("p99", 0.99)] {
            if let Some(us) = outcome.latency_us(quantile) {
                let variant = format!("{what} {name}");
                bench.report.add(WORKLOAD, &variant, system.name, us as f64 / 1e3);
                bench.progress(round, &variant, system.name, us as f64 / 1e3);
            }
        }
        if (outcome.transactions as f64) < RATE * f64::from(seconds) * KEPT_UP {
            let did = outcome.transactions as f64 / f64::from(seconds);
            bench
                .report
                .note(WORKLOAD, format!("{} did not keep up: {did:.0} {what}/s in round {round}", system.name));
        }
    };
    add("send", &sent);
    add("read + delete", &read);
    println!("    (the analytic query ran {queries} times meanwhile)");
    Ok(())
}
