//! `cargo xtask soak`: sends and finishes at a steady rate for minutes to hours, and says whether anything grew.
//!
//! Owns the throwaway cluster and the story; `soak_load` sends and finishes, `soak_sample` looks, `soak_judge`
//! decides. The load's sessions live as long as the run, so that what they keep can be seen to grow.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use postgres::Client;
use queue_tests::{Cluster, ClusterOptions};
use serde_json::json;

use super::run::say;
use super::soak_load::{Load, Rates};
use super::soak_sample::{Eye, Sample};
use super::{build, soak_judge, soak_load, target};

const DATABASE: &str = "soak";
/// So many rows are printed, unless an interval is given.
const SAMPLES: u32 = 60;
/// Too few to compare a beginning with an end.
const SAMPLES_MIN: usize = 8;
/// After the last send all but the backlog must be finished within this time.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub struct Options {
    /// The PostgreSQL to run on.
    #[arg(long, default_value_t = 18, value_name = "MAJOR", value_parser = clap::value_parser!(u16).range(15..=18))]
    pg: u16,
    /// How long. Autovacuum comes once a minute: in less than eight a table has not found its size.
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_080))]
    minutes: u32,
    /// Messages a second, sent and finished.
    #[arg(long, default_value_t = 800, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Seconds between two samples [default: a sixtieth of the run].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=3_600))]
    interval: Option<u32>,
    /// Messages that lie in the queue all the time. What is sent then waits for its turn: latencies of messages
    /// say how long the queue is, no more.
    #[arg(long, default_value_t = 0, value_name = "N")]
    backlog: u32,
    /// Storage parameters for the queue's table, to compare, e.g. `autovacuum_vacuum_scale_factor=0`.
    #[arg(long, value_delimiter = ',', value_name = "NAME=VALUE")]
    table: Vec<String>,
    /// Settings of the server, e.g. `--server autovacuum_naptime=10s`.
    #[arg(long, value_name = "NAME=VALUE")]
    server: Vec<String>,
    /// Where the JSON goes [default: soak/ in the target directory].
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<bool> {
    say("Looking for what building needs: libclang, cargo-pgrx, a PostgreSQL with server headers");
    let tree = build::release(options.pg)?;
    say("Starting a throwaway cluster: fsync and autovacuum on");
    let cluster = settings(options)?.start_on(tree)?;
    cluster.connect("postgres")?.batch_execute(&format!("CREATE DATABASE {DATABASE}"))?;
    let mut client = cluster.connect(DATABASE)?;
    set_up(&mut client, options)?;
    let samples = soak(options, &cluster, &mut client)
        .with_context(|| format!("log of the server:\n{}", cluster.log_tail()))?;
    let findings = soak_judge::judge(&samples, f64::from(options.rate));
    say("Between the first third after warming up and the last third (medians)");
    findings.iter().for_each(|finding| println!("    {finding}"));
    let is_level = findings.iter().all(soak_judge::Finding::is_level);
    write_out(options, &samples, &findings)?;
    println!("\n{}", if is_level { "Level: nothing grew." } else { "NOT level." });
    Ok(is_level)
}

fn settings(options: &Options) -> Result<ClusterOptions> {
    let mut cluster = ClusterOptions::default()
        .durable()
        .set("shared_buffers", "512MB")
        .set("max_wal_size", "4GB")
        .set("checkpoint_timeout", "5min")
        .set("log_autovacuum_min_duration", "0");
    for setting in &options.server {
        let (name, value) = pair(setting)?;
        cluster = cluster.set(name, value);
    }
    Ok(cluster)
}

fn pair(setting: &str) -> Result<(&str, &str)> {
    setting.split_once('=').with_context(|| format!("{setting:?} is not NAME=VALUE"))
}

fn set_up(client: &mut Client, options: &Options) -> Result<()> {
    client.batch_execute(
        "CREATE EXTENSION pg_queue; SELECT queue_create('soak', max_deliveries => 0, retry_delay => '500 ms')",
    )?;
    for setting in &options.table {
        let (name, value) = pair(setting)?;
        let sql = format!("ALTER TABLE queue.soak SET ({name} = {value})");
        client.batch_execute(&sql).with_context(|| format!("cannot set {setting}"))?;
    }
    let fill = "INSERT INTO queue.soak (message) \
        SELECT jsonb_build_object('due', 0, 'fails', false, 'is_late', true, 'text', $1::text) \
        FROM generate_series(1, $2::int8)";
    client
        .execute(fill, &[&soak_load::FILLING, &i64::from(options.backlog)])
        .context("cannot fill the queue")?;
    client.batch_execute("VACUUM ANALYZE queue.soak").context("cannot vacuum the queue")?;
    client.batch_execute("CHECKPOINT").context("cannot write a checkpoint")
}

/// The whole run: a sample each interval, then everything must come to its end.
fn soak(options: &Options, cluster: &Cluster, client: &mut Client) -> Result<Vec<Sample>> {
    let length = Duration::from_secs(u64::from(options.minutes) * 60);
    let interval =
        Duration::from_secs(options.interval.unwrap_or((options.minutes * 60 / SAMPLES).max(1)).into());
    say(format!(
        "{} messages a second for {} minutes, a sample every {} s",
        options.rate,
        options.minutes,
        interval.as_secs()
    ));
    let rates = Rates { per_second: options.rate, backlog: options.backlog };
    let load = Load::start(rates, || cluster.connect(DATABASE))?;
    let mut eye = Eye::new(cluster.postmaster_pid()?, &load, client)?;
    println!("{}", Sample::HEADER);
    let (begun, mut samples) = (Instant::now(), Vec::new());
    let mut next = begun + interval;
    while next <= begun + length {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        next += interval;
        let sample = eye.look(begun.elapsed(), load.progress()?, client)?;
        println!("{sample}");
        samples.push(sample);
    }
    if samples.len() < SAMPLES_MIN {
        bail!("{} samples are too few to tell a trend: at least {SAMPLES_MIN}", samples.len());
    }
    let books = load.finish(DRAIN_LIMIT)?;
    let left: i64 = client.query_one("SELECT count(*) FROM queue.soak", &[])?.try_get(0)?;
    println!("    {} sent, {} finished, {} retried, {left} left", books.sent, books.finished, books.retried);
    if books.sent - books.finished != left as u64 {
        bail!("{} were sent and {} finished, yet {left} are left", books.sent, books.finished);
    }
    Ok(samples)
}

fn write_out(options: &Options, samples: &[Sample], findings: &[soak_judge::Finding]) -> Result<()> {
    let directory = options.output.clone().unwrap_or_else(|| target().join("soak"));
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let path = directory.join("soak.json");
    let all = json!({
        "postgresql": options.pg, "minutes": options.minutes, "rate": options.rate, "backlog": options.backlog,
        "table": options.table, "server": options.server,
        "samples": samples.iter().map(Sample::to_json).collect::<Vec<_>>(),
        "findings": findings.iter().map(soak_judge::Finding::to_json).collect::<Vec<_>>(),
    });
    std::fs::write(&path, format!("{all:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    println!("\nEvery sample: {}", path.display());
    Ok(())
}
