//! Runs pgbench against a throwaway cluster and reads what it says.
//!
//! Owns how pgbench is called: over the cluster's socket, prepared statements, no vacuum of its own, output and
//! logs into files below the cluster's directory. A run in which a client gave up, a transaction failed, or
//! nothing was done is an error, never a figure. Knows nothing of queues.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use queue_tests::Cluster;

use super::super::run::find_program;

/// How much longer than asked a run may take before it counts as hung: a last transaction may wait for a lock.
const OVERTIME: Duration = Duration::from_secs(60);
/// Longest run by number of transactions.
const COUNTED_LIMIT: Duration = Duration::from_secs(600);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How much of a failed run's errors is shown.
const ERROR_LINES: usize = 10;

#[derive(Clone, Copy, Debug)]
pub enum Length {
    Seconds(u32),
    /// By each client.
    Transactions(u64),
}

/// What one pgbench does.
pub struct Load<'a> {
    /// The text of the script: one run through it is one transaction in pgbench's words.
    pub script: &'a str,
    pub clients: u32,
    pub length: Length,
    /// Transactions a second to start, whether or not earlier ones are done; None: as fast as they end.
    pub rate: Option<f64>,
    /// Values of the script's variables at the start, in every client.
    pub variables: &'a [(&'a str, String)],
    /// Whether every transaction's latency is wanted.
    pub latencies: bool,
    /// Length of the slices of which each one's rate is wanted, in seconds.
    pub slice_seconds: Option<u32>,
}

impl<'a> Load<'a> {
    /// `clients` who run `script` as fast as they can.
    pub fn new(script: &'a str, clients: u32, length: Length) -> Self {
        Self { script, clients, length, rate: None, variables: &[], latencies: false, slice_seconds: None }
    }
}

/// What a run came to.
#[derive(Debug, Default)]
pub struct Outcome {
    pub transactions: u64,
    /// Transactions a second, the time to connect not counted.
    pub tps: f64,
    /// Each transaction's, in microseconds, sorted; with a rate from when it should have begun. Only if asked for.
    pub latencies_us: Vec<u64>,
    /// Transactions a second in each slice. Only if asked for.
    pub slices_tps: Vec<f64>,
}

impl Outcome {
    /// The latency that the part `quantile` (0 to 1) of the transactions did not exceed.
    pub fn latency_us(&self, quantile: f64) -> Option<u64> {
        percentile(&self.latencies_us, quantile)
    }
}

/// The value that the part `quantile` (0 to 1) of `sorted` does not exceed.
pub fn percentile(sorted: &[u64], quantile: f64) -> Option<u64> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get(((sorted.len() as f64 * quantile).ceil() as usize).saturating_sub(1).min(last)).copied()
}

/// pgbench on one database of a cluster.
pub struct Pgbench<'a> {
    cluster: &'a Cluster,
    database: String,
    program: PathBuf,
    pub version: String,
    scratch: PathBuf,
    runs: AtomicU32,
}

impl<'a> Pgbench<'a> {
    pub fn new(cluster: &'a Cluster, database: &str) -> Result<Self> {
        let program = find(cluster)?;
        let version = super::super::run::output(Command::new(&program).arg("--version"))?.trim().to_owned();
        let scratch = cluster.directory().join(format!("pgbench-{database}"));
        fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
        cluster.user.own(&scratch)?;
        Ok(Self { cluster, database: database.to_owned(), program, version, scratch, runs: AtomicU32::new(0) })
    }

    pub fn run(&self, load: &Load) -> Result<Outcome> {
        self.start(load)?.finish()
    }

    /// Starts it, for runs beside something else.
    pub fn start(&self, load: &Load) -> Result<Running> {
        let directory = self.scratch.join(self.runs.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        self.cluster.user.own(&directory)?;
        let script = directory.join("script");
        fs::write(&script, load.script).with_context(|| format!("cannot write {}", script.display()))?;
        let mut command = self.cluster.user.command(&self.program);
        command.arg("--host").arg(self.cluster.directory()).args(["--username=postgres", "--no-vacuum"]);
        command.args(["--protocol=prepared", "--client", &load.clients.to_string()]);
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        command.args(["--jobs", &load.clients.min(cores).to_string()]).arg("--file").arg(&script);
        let limit = match load.length {
            Length::Seconds(seconds) => {
                command.args(["--time", &seconds.to_string()]);
                Duration::from_secs(seconds.into()) + OVERTIME
            }
            Length::Transactions(count) => {
                command.args(["--transactions", &count.to_string()]);
                COUNTED_LIMIT
            }
        };
        if let Some(rate) = load.rate {
            command.args(["--rate", &rate.to_string()]);
        }
        if let Some(seconds) = load.slice_seconds {
            command.args(["--progress", &seconds.to_string()]);
        }
        if load.latencies {
            command.arg("--log").arg("--log-prefix").arg(directory.join("log"));
        }
        for (name, value) in load.variables {
            command.args(["--define", &format!("{name}={value}")]);
        }
        let open = |name: &str| {
            let path = directory.join(name);
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))
        };
        let child = command
            .arg(&self.database)
            .stdin(Stdio::null())
            .stdout(open("out")?)
            .stderr(open("err")?)
            .spawn()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        Ok(Running { child, directory, deadline: Instant::now() + limit, is_done: false })
    }
}

/// The tree's own pgbench, else any other: it talks to every server.
fn find(cluster: &Cluster) -> Result<PathBuf> {
    let own = cluster.tree.program("pgbench");
    if own.is_file() {
        return Ok(own);
    }
    let debian = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    debian.map(|entry| entry.path().join("bin/pgbench")).find(|path| path.is_file()).map_or_else(
        || {
            find_program("pgbench").ok_or_else(|| {
                anyhow!(
                    "{} has no pgbench and none is on the PATH (Debian: it is in the package postgresql-15, \
                     or whichever server version the release has)",
                    cluster.tree.version
                )
            })
        },
        Ok,
    )
}

/// A pgbench under way; killed when dropped before its end.
pub struct Running {
    child: Child,
    directory: PathBuf,
    deadline: Instant,
    is_done: bool,
}

impl Running {
    pub fn finish(mut self) -> Result<Outcome> {
        let status = loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for pgbench")? {
                break status;
            }
            if Instant::now() > self.deadline {
                bail!("pgbench did not end in time; it said:\n{}", self.errors());
            }
            std::thread::sleep(LOOK_EVERY);
        };
        self.is_done = true;
        if !status.success() {
            bail!("pgbench failed ({status}):\n{}", self.errors());
        }
        let out = read(&self.directory.join("out"))?;
        let err = read(&self.directory.join("err"))?;
        let mut outcome = parse(&out).with_context(|| format!("pgbench said:\n{out}{}", self.errors()))?;
        outcome.slices_tps = parse_slices(&err);
        outcome.latencies_us = self.latencies()?;
        fs::remove_dir_all(&self.directory)
            .with_context(|| format!("cannot remove {}", self.directory.display()))?;
        Ok(outcome)
    }

    fn errors(&self) -> String {
        let text = read(&self.directory.join("err")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("progress: ")).collect();
        // What went wrong comes first; what follows from it, last.
        lines[..lines.len().min(ERROR_LINES)].join("\n")
    }

    fn latencies(&self) -> Result<Vec<u64>> {
        let mut latencies = Vec::new();
        let entries = fs::read_dir(&self.directory).context("cannot list pgbench's logs")?;
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("log.")) {
                for line in read(&path)?.lines() {
                    latencies.push(parse_logged(line).with_context(|| format!("pgbench logged {line:?}"))?);
                }
            }
        }
        latencies.sort_unstable();
        Ok(latencies)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_done {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

fn read(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The summary that pgbench prints at its end.
fn parse(out: &str) -> Result<Outcome> {
    let after = |label: &str| {
        out.lines()
            .find_map(|line| line.strip_prefix(label))
            .with_context(|| format!("there is no {label:?} in pgbench's summary"))
    };
    let number = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        text[..end].parse::<f64>().with_context(|| format!("{text:?} is no number"))
    };
    let transactions = number(after("number of transactions actually processed: ")?)? as u64;
    let failed = number(after("number of failed transactions: ")?)?;
    if failed > 0.0 {
        bail!("{failed} transactions failed");
    }
    if transactions == 0 {
        bail!("no transaction was done");
    }
    Ok(Outcome { transactions, tps: number(after("tps = ")?)?, ..Outcome::default() })
}

/// The rates in `progress: 10.0 s, 1234.5 tps, lat 1.234 ms stddev 0.123, 0 failed`.
fn parse_slices(err: &str) -> Vec<f64> {
    let rate =
        |line: &str| line.strip_prefix("progress: ")?.split(", ").nth(1)?.strip_suffix(" tps")?.parse().ok();
    err.lines().filter_map(rate).collect()
}

/// The latency, in microseconds, in a line of pgbench's log: `client_id transaction_no time script_no ...`.
fn parse_logged(line: &str) -> Result<u64> {
    let time = line.split(' ').nth(2).context("there is no third field")?;
    time.parse().context("the third field is no number")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUMMARY: &str = "pgbench (18.6)\ntransaction type: /tmp/x\nscaling factor: 1\nquery mode: prepared\n\
        number of clients: 8\nnumber of threads: 2\nmaximum number of tries: 1\nduration: 5 s\n\
        number of transactions actually processed: 63211\nnumber of failed transactions: 0 (0.000%)\n\
        latency average = 0.632 ms\ninitial connection time = 12.345 ms\n\
        tps = 12655.123456 (without initial connection time)\n";

    #[test]
    fn summary_is_read() {
        let outcome = parse(SUMMARY).expect("a good summary");
        assert_eq!((outcome.transactions, outcome.tps), (63_211, 12_655.123456));
        let counted = SUMMARY.replace("processed: 63211", "processed: 200/200");
        assert_eq!(parse(&counted).expect("a good summary").transactions, 200);
    }

    #[test]
    fn failures_and_idleness_are_errors() {
        assert!(parse(&SUMMARY.replace("failed transactions: 0", "failed transactions: 3")).is_err());
        assert!(parse(&SUMMARY.replace("processed: 63211", "processed: 0")).is_err());
        assert!(parse("").is_err());
    }

    #[test]
    fn slices_are_read_and_other_lines_are_not() {
        let err = "pgbench (18.6)\nprogress: 10.0 s, 1234.5 tps, lat 1.234 ms stddev 0.123, 0 failed\n\
            progress: 20.0 s, 900.0 tps, lat 1.234 ms stddev 0.123, 0 failed, lag 0.1 ms\n";
        assert_eq!(parse_slices(err), [1234.5, 900.0]);
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let sorted: Vec<u64> = (1..=100).collect();
        assert_eq!(percentile(&sorted, 0.5), Some(50));
        assert_eq!(percentile(&sorted, 0.99), Some(99));
        assert_eq!(percentile(&sorted, 1.0), Some(100));
        assert_eq!(percentile(&[7], 0.0), Some(7));
        assert_eq!(percentile(&[], 0.5), None);
        assert_eq!(parse_logged("0 199 2241 0 1175850568 995598 1020").ok(), Some(2241));
    }
}
