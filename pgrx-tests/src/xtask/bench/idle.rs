//! 200 readers that wait for a message that does not come: what do they cost?
//!
//! Sums the CPU time of all the server's processes but our own backend, over a window in which nobody asks the
//! server anything. "No readers" is the same window on the idle server; pg_queue's figure is what comes on top.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use queue_tests::descendants;

use super::pgbench::{Length, Load};
use super::report::Title;
use super::systems::{System, PGMQ, PG_QUEUE};
use super::Bench;

const WORKLOAD: &str = "idle";
const CPU: &str = "CPU, % of one core";
const STATEMENTS: &str = "statements ended";
const READERS: u32 = 200;
/// Until everything that a new session does is done. Its last act is Postgres' own: ten seconds after a session's last
/// transaction the timer for its statistics goes off (PGSTAT_IDLE_INTERVAL), once, whatever the session does by then.
const SETTLE: Duration = Duration::from_secs(12);
const START_LIMIT: Duration = Duration::from_secs(30);

pub fn run(bench: &mut Bench) -> Result<()> {
    let title = "200 readers blocked in a call that waits for a message";
    bench.begin(Title { workload: WORKLOAD, title, unit: "see each line" });
    bench.set_server(&[("autovacuum", "off")])?;
    let window = Duration::from_secs(bench.options.scaled(20, 5));
    for system in [&PG_QUEUE, &PGMQ] {
        bench.renew(system, "idle", 0)?;
    }
    std::thread::sleep(SETTLE);
    let alone = used_percent(bench, window)?;
    let seconds = (window + SETTLE).as_secs() + 5;
    let wait = format!("SELECT msg_id FROM queue_read('idle', wait => '{seconds} s');\n");
    let poll = format!("SELECT msg_id FROM pgmq.read_with_poll('idle', 30, 1, {seconds});\n");
    for (system, script) in [(&PG_QUEUE, &wait), (&PGMQ, &poll)] {
        let (used, ended) = with_readers(bench, script, window)?;
        add(bench, CPU, system, (used - alone).max(0.0));
        add(bench, STATEMENTS, system, ended as f64);
    }
    bench.report.add(WORKLOAD, CPU, "no readers", alone);
    bench
        .report
        .note(WORKLOAD, format!("over {} s; less what the server takes without readers", window.as_secs()));
    bench.report.note(WORKLOAD, "pgmq: read_with_poll, which looks ten times a second within one statement");
    bench.reset_server(&["autovacuum"])
}

fn add(bench: &mut Bench, variant: &str, system: &System, value: f64) {
    bench.progress(1, variant, system.name, value);
    bench.report.add(WORKLOAD, variant, system.name, value);
}

/// CPU in the window with readers, and how many of their statements ended in it.
fn with_readers(bench: &mut Bench, script: &str, window: Duration) -> Result<(f64, i64)> {
    let readers = bench.pgbench.start(&Load::new(script, READERS, Length::Transactions(1)))?;
    // pgbench adds nothing to a statement: this is its text.
    let text = script.trim_end().trim_end_matches(';').to_owned();
    let deadline = Instant::now() + START_LIMIT;
    while waiting(bench, &text, "infinity")? < i64::from(READERS) {
        if Instant::now() > deadline {
            bail!("not all of {READERS} readers came to wait");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(SETTLE);
    let from: String = bench.client.query_one("SELECT clock_timestamp()::text", &[])?.try_get(0)?;
    let used = used_percent(bench, window)?;
    let still = waiting(bench, &text, &from)?;
    readers.finish()?;
    Ok((used, i64::from(READERS) - still))
}

/// How many sessions are in this statement since before `from`.
fn waiting(bench: &mut Bench, text: &str, from: &str) -> Result<i64> {
    let sql = "SELECT count(*) FROM pg_stat_activity \
        WHERE state = 'active' AND rtrim(query, E';\\n') = $1 AND query_start < $2::text::timestamptz";
    Ok(bench.client.query_one(sql, &[&text, &from])?.try_get(0)?)
}

/// Percent of one core that the server took over `window`.
fn used_percent(bench: &mut Bench, window: Duration) -> Result<f64> {
    let own: i32 = bench.client.query_one("SELECT pg_backend_pid()", &[])?.try_get(0)?;
    // What our own question set off (its statistics, say) is over by then.
    std::thread::sleep(Duration::from_secs(1));
    let postmaster = bench.cluster.postmaster_pid()?;
    let before = cpu_ns(postmaster, own as u32)?;
    let begun = Instant::now();
    std::thread::sleep(window);
    let after = cpu_ns(postmaster, own as u32)?;
    let took = begun.elapsed();
    let used: u64 =
        after.iter().map(|(pid, ns)| ns.saturating_sub(before.get(pid).copied().unwrap_or(0))).sum();
    Ok(used as f64 / took.as_nanos() as f64 * 100.0)
}

/// Time on a CPU of each of the server's processes but `except`, in nanoseconds.
fn cpu_ns(postmaster: u32, except: u32) -> Result<HashMap<u32, u64>> {
    let mut used = HashMap::new();
    for pid in descendants(postmaster).into_iter().chain([postmaster]).filter(|pid| *pid != except) {
        // A process that has just ended has no such file.
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/schedstat")) else { continue };
        let ns = text.split_whitespace().next().and_then(|word| word.parse().ok());
        used.insert(pid, ns.with_context(|| format!("/proc/{pid}/schedstat says {text:?}"))?);
    }
    if used.is_empty() {
        bail!("this kernel has no /proc/PID/schedstat");
    }
    Ok(used)
}
