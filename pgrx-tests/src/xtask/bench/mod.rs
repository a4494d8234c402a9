//! `cargo xtask bench`: pg_queue beside its peers and beside bare PostgreSQL, measured in turns in one run.
//!
//! Owns the throwaway cluster, its settings, and the order of the workloads. What is measured is data in `systems`;
//! `throughput` has the closed loops, a file each the workloads that are no plain rate; `goals` judges, `report`
//! and `picture` show. Peers are set up at their best: indexes as they ship, prepared statements, an autovacuum
//! that never waits. Never measures a build with test features, and never a server with fsync off.

mod backlog;
mod goals;
mod idle;
mod machine;
mod memory;
mod open_loop;
pub mod pgbench;
mod picture;
mod rebuild;
mod report;
mod snapshot;
mod systems;
mod throughput;
mod wake_up;
mod wal;

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use postgres::Client;
use queue_tests::{Cluster, ClusterOptions};
use serde_json::json;

use self::pgbench::Pgbench;
use self::report::{Report, Title};
use self::systems::{System, Work, BARE, PAYLOAD, PEER_VACUUM};
use super::run::say;
use super::{build, provision, target};

const DATABASE: &str = "bench";
/// How long the server may take to take over a setting.
const RELOAD_LIMIT: Duration = Duration::from_secs(10);
/// Sessions: 200 idle readers and what else there is.
const CONNECTIONS_MAX: u32 = 300;

#[derive(clap::Args)]
pub struct Options {
    /// The PostgreSQL to measure on.
    #[arg(long, default_value_t = 18, value_name = "MAJOR", value_parser = clap::value_parser!(u16).range(15..=18))]
    pg: u16,
    /// Only these workloads, e.g. `--only send,wake_up`.
    #[arg(long, value_delimiter = ',', value_name = "NAME", value_parser = names())]
    only: Vec<String>,
    /// Length of one measurement [default: 4, quick: 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: Option<u32>,
    /// How many measurements of each, of which the median counts [default: 5, quick: 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// A look in about three minutes: shorter, fewer, smaller. Its figures are no basis for anything.
    #[arg(long)]
    quick: bool,
    /// Fail if a goal is missed.
    #[arg(long)]
    check: bool,
    /// Where the JSON and the picture go [default: bench/ in the target directory].
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

impl Options {
    pub fn seconds(&self) -> u32 {
        self.seconds.unwrap_or(if self.quick { 1 } else { 4 })
    }

    pub fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 5 })
    }

    /// `full`, or for a quick look `quick`.
    pub fn scaled<T>(&self, full: T, quick: T) -> T {
        if self.quick {
            quick
        } else {
            full
        }
    }
}

type Workload = fn(&mut Bench) -> Result<()>;

/// By name, in the order in which they run: those that restart the server come last.
const WORKLOADS: [(&str, Workload); 12] = [
    ("send", throughput::send),
    ("send_batch", throughput::send_batch),
    ("read_delete", throughput::read_delete),
    ("read_delete_batch", throughput::read_delete_batch),
    ("snapshot", snapshot::run),
    ("backlog", backlog::run),
    ("open_loop", open_loop::run),
    ("wake_up", wake_up::run),
    ("wal", wal::run),
    ("idle", idle::run),
    ("rebuild", rebuild::run),
    ("memory", memory::run),
];

fn names() -> clap::builder::PossibleValuesParser {
    clap::builder::PossibleValuesParser::new(WORKLOADS.map(|(name, _)| name))
}

/// What every workload works with.
pub struct Bench<'a> {
    pub options: &'a Options,
    pub cluster: &'a Cluster,
    pub pgbench: Pgbench<'a>,
    pub client: Client,
    pub report: Report,
    /// The most messages a second that a system was seen to do at a work: what a queue must hold for a run.
    pub rates: HashMap<(&'static str, Work), f64>,
    /// Rows on each page of a table that is walked by address, by the table's name.
    pub rows_per_page: HashMap<String, u64>,
}

pub fn run(options: &Options) -> Result<bool> {
    say("Looking for what building needs: libclang, cargo-pgrx, a PostgreSQL with server headers");
    let tree = build::release(options.pg)?;
    let pgmq = provision::pgmq_sql()?;
    say("Starting a throwaway cluster: fsync and synchronous_commit on");
    let memory_mb = machine::memory_mb()?;
    let cluster = settings(memory_mb).start_on(tree)?;
    cluster
        .connect("postgres")?
        .batch_execute(&format!("CREATE DATABASE {DATABASE}"))
        .context("cannot create a database")?;
    let mut client = cluster.connect(DATABASE)?;
    client.batch_execute("CREATE EXTENSION pg_queue").context("cannot create extension pg_queue")?;
    let sql = fs::read_to_string(&pgmq.sql).with_context(|| format!("cannot read {}", pgmq.sql.display()))?;
    client.batch_execute(&sql).context("cannot install pgmq")?;
    let pgbench = Pgbench::new(&cluster, DATABASE)?;
    let mut about = machine::about(&mut client, &pgbench, &pgmq.version, options)?;
    print_about(&about);
    let flushes = machine::flushes_per_s(cluster.directory())?;
    println!("    the disk makes a page durable {flushes} times a second");

    let mut bench = Bench {
        options,
        cluster: &cluster,
        pgbench,
        client,
        report: Report::default(),
        rates: HashMap::new(),
        rows_per_page: HashMap::new(),
    };
    let begun = Instant::now();
    let mut failed = Vec::new();
    for (name, workload) in WORKLOADS {
        let is_wanted = options.only.is_empty() || options.only.iter().any(|only| only == name);
        // One that cannot be run takes nothing from what the others have measured.
        if let Err(error) = if is_wanted { workload(&mut bench) } else { Ok(()) } {
            println!("\nerror: workload {name}: {error:#}\nlog of the server:\n{}", cluster.log_tail());
            failed.push(name);
        }
    }
    let flushes_after = machine::flushes_per_s(cluster.directory())?;
    about["machine"]["flushes/s, before and after"] = json!([flushes, flushes_after]);
    let goals = goals::judge(&bench.report);
    say(format!(
        "Medians of {} round(s) of {} s, after {} s in all",
        options.rounds(),
        options.seconds(),
        begun.elapsed().as_secs()
    ));
    bench.report.print(&goals);
    println!("\nThe disk made a page durable {flushes} times a second before, {flushes_after} times after.");
    write_out(options, &about, &bench.report, &goals)?;
    let missed = goals.iter().filter(|goal| goal.passed() == Some(false)).count();
    let judged = goals.iter().filter(|goal| goal.passed().is_some()).count();
    println!(
        "\n{} of {judged} goals reached{}",
        judged - missed,
        options.scaled("", " (a quick look proves nothing)")
    );
    if !failed.is_empty() {
        println!("NOT MEASURED in whole: {}", failed.join(", "));
    }
    Ok(failed.is_empty() && (!options.check || missed == 0))
}

/// A server of a size for this machine, on which no checkpoint comes by itself during a run: each measurement begins
/// right after one.
fn settings(memory_mb: u64) -> ClusterOptions {
    ClusterOptions::default()
        .durable()
        .set("synchronous_commit", "on")
        .set("max_connections", &CONNECTIONS_MAX.to_string())
        .set("shared_buffers", &format!("{}MB", (memory_mb / 4).clamp(128, 2_048)))
        .set("max_wal_size", "16GB")
        .set("min_wal_size", "2GB")
        .set("wal_keep_size", "2GB") // so that what was just written can be counted
        .set("checkpoint_timeout", "30min")
        .set("autovacuum_naptime", "5s")
        .set("log_checkpoints", "off")
}

fn print_about(about: &serde_json::Value) {
    for part in ["machine", "versions", "settings"] {
        for (name, value) in about[part].as_object().into_iter().flatten() {
            println!("    {name:<36} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        }
    }
}

fn write_out(
    options: &Options,
    about: &serde_json::Value,
    report: &Report,
    goals: &[goals::Goal],
) -> Result<()> {
    let directory = options.output.clone().unwrap_or_else(|| target().join("bench"));
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let write = |name: &str, text: String| -> Result<PathBuf> {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    };
    let all = json!({ "about": about, "results": report.to_json(goals) });
    let json = write("bench.json", format!("{all:#}\n"))?;
    println!("\nEvery round: {}", json.display());
    if let Some(picture) = picture::draw(report, about) {
        println!("Picture: {}", write("bench.svg", picture)?.display());
    }
    Ok(())
}

impl Bench<'_> {
    pub fn begin(&mut self, title: Title) {
        say(format!("{} ({})", title.title, title.unit));
        self.report.begin(title);
    }

    pub fn progress(&self, round: u32, variant: &str, system: &str, value: f64) {
        println!("    round {round}, {variant:<12} {system:<16} {:>12}", report::shown(value));
    }

    /// The queue, made if it is not there, emptied, filled with `rows` messages, vacuumed; then a checkpoint.
    pub fn renew(&mut self, system: &System, queue: &str, rows: u64) -> Result<()> {
        let table = system.table(queue);
        let renew = |client: &mut Client| -> Result<(), postgres::Error> {
            if client.query_one("SELECT to_regclass($1) IS NULL", &[&table])?.try_get(0)? {
                client.batch_execute(&system.create.replace("{q}", queue).replace("{vacuum}", PEER_VACUUM))?;
            }
            client.batch_execute(&format!("TRUNCATE {table}"))?;
            if rows > 0 {
                let fill = system.fill.replace("{q}", queue).replace("{payload}", PAYLOAD);
                client.batch_execute(&fill.replace("{n}", &rows.to_string()))?;
            }
            client.batch_execute(&format!("VACUUM ANALYZE {table}"))?;
            client.batch_execute("CHECKPOINT")
        };
        renew(&mut self.client).with_context(|| format!("cannot fill {table} with {rows} rows"))?;
        if system.name == BARE.name && rows > 0 {
            let per_page = self.count_per_page(&table)?;
            self.rows_per_page.insert(table, per_page);
        }
        Ok(())
    }

    /// Takes a queue's rows away, so that the next workload finds room.
    pub fn empty(&mut self, system: &System, queue: &str) -> Result<()> {
        let table = system.table(queue);
        self.client.batch_execute(&format!("TRUNCATE {table}")).with_context(|| format!("cannot empty {table}"))
    }

    pub fn count(&mut self, system: &System, queue: &str) -> Result<i64> {
        let table = system.table(queue);
        let row = self.client.query_one(&format!("SELECT count(*) FROM {table}"), &[]);
        Ok(row.with_context(|| format!("cannot count {table}"))?.try_get(0)?)
    }

    /// How many rows each page of a table holds, which all but the last must share.
    fn count_per_page(&mut self, table: &str) -> Result<u64> {
        let sql = format!(
            "SELECT array_agg(DISTINCT n) FROM (SELECT count(*) AS n FROM {table} \
             GROUP BY (ctid::text::point)[0] ORDER BY (ctid::text::point)[0] DESC OFFSET 1) pages"
        );
        let counts: Option<Vec<i64>> = self.client.query_one(&sql, &[])?.try_get(0)?;
        match counts.as_deref() {
            Some([one]) => Ok(*one as u64),
            other => bail!("the pages of {table} hold {other:?} rows, not all the same"),
        }
    }

    /// Changes settings of the running server; they are in force when this returns.
    pub fn set_server(&mut self, settings: &[(&str, &str)]) -> Result<()> {
        for (name, value) in settings {
            self.client.batch_execute(&format!("ALTER SYSTEM SET {name} = '{value}'"))?;
        }
        self.reload(settings)
    }

    /// The same, back to what they were.
    pub fn reset_server(&mut self, names: &[&str]) -> Result<()> {
        for name in names {
            self.client.batch_execute(&format!("ALTER SYSTEM RESET {name}"))?;
        }
        let defaults: Vec<(&str, &str)> = names.iter().map(|name| (*name, "on")).collect();
        self.reload(&defaults)
    }

    fn reload(&mut self, wanted: &[(&str, &str)]) -> Result<()> {
        self.client.batch_execute("SELECT pg_reload_conf()")?;
        let deadline = Instant::now() + RELOAD_LIMIT;
        for (name, value) in wanted {
            while self.client.query_one("SELECT current_setting($1)", &[name])?.try_get::<_, String>(0)?
                != *value
            {
                if Instant::now() > deadline {
                    bail!("{name} did not become {value}");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }
}
