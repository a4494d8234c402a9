//! WAL of a send and of a read + delete, beside a bare INSERT into, and a bare DELETE by ctid from, a table with the
//! queue's columns, defaults and indexes, but no trigger.
//!
//! Full-page images are excluded: pg_waldump counts them apart. One client; autovacuum is off meanwhile.

use std::process::Command;

use anyhow::{bail, Context, Result};

use super::pgbench::{Length, Load};
use super::report::Title;
use super::systems::{System, Work, BARE, HAND, PGMQ, PG_QUEUE};
use super::throughput::Turn;
use super::Bench;
use crate::xtask::run::output;

const WORKLOAD: &str = "wal";
const QUEUE: &str = "wal";

/// The bare table with the queue's own columns.
const SAME_COLUMNS: System = System {
    create: "CREATE TABLE same_{q} (LIKE queue.{q} INCLUDING DEFAULTS INCLUDING IDENTITY INCLUDING INDEXES)",
    table: "same_{q}",
    fill: "INSERT INTO same_{q} (message) SELECT '{payload}'::jsonb FROM generate_series(1, {n})",
    scripts: &[
        (Work::Send, "INSERT INTO same_{q} (message) VALUES (:payload);\n"),
        (
            Work::ReadDelete,
            "\\set row :start + :client_id * :share + :turn\n\
             \\set turn :turn + 1\n\
             \\set page :row / :per_page\n\
             \\set line :row % :per_page + 1\n\
             SELECT msg_id, message FROM same_{q} WHERE ctid = ('(' || :page || ',' || :line || ')')::tid \\gset\n\
             DELETE FROM same_{q} WHERE ctid = ('(' || :page || ',' || :line || ')')::tid;\n",
        ),
    ],
    ..BARE
};
static SUBJECTS: [&System; 4] = [&PG_QUEUE, &SAME_COLUMNS, &PGMQ, &HAND];

pub fn run(bench: &mut Bench) -> Result<()> {
    let title = "WAL of one message, full-page images excluded, 1 client";
    bench.begin(Title { workload: WORKLOAD, title, unit: "bytes" });
    bench
        .report
        .note(WORKLOAD, "bare: the queue's columns, defaults and indexes, no trigger; INSERT, DELETE by ctid");
    bench.set_server(&[("autovacuum", "off"), ("full_page_writes", "off")])?;
    let operations = bench.options.scaled(10_000, 2_000);
    for (work, variant) in [(Work::Send, "send"), (Work::ReadDelete, "read + delete")] {
        for system in SUBJECTS {
            let rows = if work.finishes() > 0 { operations } else { 0 };
            bench.renew(system, QUEUE, rows + 100 * work.finishes())?;
            let bytes = measure(bench, system, work, operations)?;
            bench.progress(1, variant, system.name, bytes);
            bench.report.add(WORKLOAD, variant, system.name, bytes);
        }
    }
    bench.reset_server(&["autovacuum", "full_page_writes"])?;
    for system in SUBJECTS {
        bench.empty(system, QUEUE)?;
    }
    Ok(())
}

fn measure(bench: &mut Bench, system: &'static System, work: Work, operations: u64) -> Result<f64> {
    let turn = Turn { system, queue: QUEUE, work, clients: 1, seconds: 0, walk: (0, operations) };
    let before_rows = bench.count(system, QUEUE)?;
    let variables = turn.variables(bench)?;
    let script = system.script(work, QUEUE).unwrap_or_default();
    let mut load = Load::new(&script, 1, Length::Transactions(operations));
    load.variables = &variables;
    let from = insert_lsn(bench)?;
    bench.pgbench.run(&load)?;
    let to = insert_lsn(bench)?;
    let changed = bench.count(system, QUEUE)? - before_rows;
    if changed.unsigned_abs() != operations {
        bail!("{}: {operations} operations changed the queue by {changed} rows", system.name);
    }
    // So that what pg_waldump reads is in the files.
    bench.client.batch_execute("CHECKPOINT")?;
    let mut dump = bench.cluster.user.command(bench.cluster.tree.program("pg_waldump"));
    dump.arg("--stats").arg("--path").arg(bench.cluster.data().join("pg_wal"));
    let stats = wal_dump(dump.args(["--start", &from, "--end", &to]))?;
    Ok(stats as f64 / operations as f64)
}

fn insert_lsn(bench: &mut Bench) -> Result<String> {
    Ok(bench.client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[])?.try_get(0)?)
}

/// Bytes of all records, without full-page images.
fn wal_dump(command: &mut Command) -> Result<u64> {
    let text = output(command)?;
    total_record_bytes(&text).with_context(|| format!("pg_waldump said:\n{text}"))
}

/// From `Total   30012   2143210 [99.10%]   8192 [0.90%]   2151402 [100%]` the second number.
fn total_record_bytes(text: &str) -> Option<u64> {
    let total = text.lines().rev().find_map(|line| line.trim_start().strip_prefix("Total"))?;
    total.split_whitespace().filter(|word| !word.starts_with('[')).nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::total_record_bytes;

    #[test]
    fn record_bytes_are_read_from_the_total() {
        let text = "Type      N      (%)   Record size  (%)  FPI size (%) Combined size (%)\n\
            XLOG      12 ( 0.04)           588 ( 0.03)\n\
            \x20         --------\n\
            Total   30012            2143210 [99.10%]          8192 [0.90%]      2151402 [100%]\n";
        assert_eq!(total_record_bytes(text), Some(2_143_210));
        assert_eq!(total_record_bytes("nothing"), None);
    }
}
