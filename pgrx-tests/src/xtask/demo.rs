//! `cargo xtask demo`: pg_queue doing a real job, with a consumer killed in the middle of it.
//!
//! Every file becomes a message; four consumer processes store each file's SHA-256 and finish its message in one
//! transaction. Owns the cluster, the consumers and the story; the verdict is `demo_check`'s. Reads the files,
//! never writes near them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use postgres::Client;
use queue_tests::{Cluster, ClusterOptions};
use serde_json::Value;

use super::demo_check::{faults, print_faults, Books};
use super::demo_consumer::BATCH;
use super::run::say;
use super::{build, demo_files, provision, repository};

const CONSUMERS: [&str; 4] = ["anna", "ben", "carla", "dora"];
/// The one that is killed.
const VICTIM: usize = 0;
const SEND_BATCH: usize = 500;
/// Without any progress for so long something is wrong.
const STALL_LIMIT: Duration = Duration::from_secs(120);
/// How many dead letters are spelled out.
const DEAD_SHOWN: usize = 5;
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

const SETUP: &str = "
CREATE EXTENSION pg_queue;
SELECT queue_create('files_dead');
SELECT queue_create('files', visibility_timeout => '3 s', max_deliveries => 3, retry_delay => '200 ms',
                    dead_letter_queue => 'files_dead');
CREATE TABLE results (
    msg_id bigint NOT NULL, path text NOT NULL, sha256 text NOT NULL, delivery_count bigint NOT NULL,
    consumer text NOT NULL, finished_at timestamptz NOT NULL DEFAULT clock_timestamp());
";

pub fn run(directory: Option<PathBuf>, keep: bool) -> Result<bool> {
    let mut files = demo_files::list(directory.as_deref(), repository())?;
    if files.is_empty() {
        bail!("there is no file in {}", directory.as_deref().unwrap_or(repository()).display());
    }
    say("Looking for what building needs: libclang, cargo-pgrx, a PostgreSQL with server headers");
    let tree = build::release(provision::any_major()?)?;
    say("Starting a throwaway cluster");
    let cluster = ClusterOptions::default().durable().start_on(tree)?;
    println!(
        "    {} in {}, as user {}",
        cluster.tree.version,
        cluster.directory().display(),
        cluster.user.name
    );
    cluster.connect("postgres")?.batch_execute("CREATE DATABASE demo").context("cannot create a database")?;
    let mut client = cluster.connect("demo")?;
    client.batch_execute(SETUP).context("cannot set the demo up")?;

    let scratch = tempfile::tempdir().context("cannot make a temporary directory")?;
    let dangling = scratch.path().join("a-link-that-leads-nowhere");
    std::os::unix::fs::symlink("nowhere", &dangling).context("cannot make a link")?;
    files.push(dangling);

    say(format!("Sending {} messages: one for each file, and one for a link that leads nowhere", files.len()));
    let sent = send(&mut client, files)?;
    let passed = work_and_judge(&cluster, &mut client, &sent)?;
    drop(client);
    farewell(&cluster, keep)?;
    Ok(passed)
}

fn send(client: &mut Client, files: Vec<PathBuf>) -> Result<BTreeMap<i64, PathBuf>> {
    let mut sent = BTreeMap::new();
    let begun = Instant::now();
    for some in files.chunks(SEND_BATCH) {
        let messages: Vec<Value> = some.iter().map(|path| demo_files::message(path)).collect();
        let rows = client.query("SELECT queue_send_batch('files', $1)", &[&messages]).context("cannot send")?;
        if rows.len() != some.len() {
            bail!("{} messages were sent, {} ids came back", some.len(), rows.len());
        }
        for (row, path) in rows.iter().zip(some) {
            sent.insert(row.try_get(0)?, path.clone());
        }
    }
    if sent.len() != files.len() {
        bail!("{} messages were sent, but only {} different ids came back", files.len(), sent.len());
    }
    println!("    done in {} ms", begun.elapsed().as_millis());
    Ok(sent)
}

/// The whole job, told as it goes, and the check at its end.
fn work_and_judge(cluster: &Cluster, client: &mut Client, sent: &BTreeMap<i64, PathBuf>) -> Result<bool> {
    say(format!("Starting {} consumer processes", CONSUMERS.len()));
    // The victim first, alone, so that there is surely something left for it to hold.
    let hold_after = u32::from(sent.len() > 4 * BATCH as usize);
    let mut consumers = vec![Consumer::start(cluster, CONSUMERS[VICTIM], Some(hold_after))?];
    let held = consumers[VICTIM].holding()?;
    for name in &CONSUMERS[1..] {
        consumers.push(Consumer::start(cluster, name, None)?);
    }
    // Proof that the kill hits work in progress: its messages are there, and none has a result.
    let open: i64 = client
        .query_one(
            "SELECT count(*) FROM queue.files f WHERE msg_id = ANY ($1)
                AND NOT EXISTS (SELECT FROM results r WHERE r.msg_id = f.msg_id)",
            &[&held.iter().copied().collect::<Vec<_>>()],
        )?
        .try_get(0)?;
    let victim = consumers.remove(VICTIM);
    let victim_pid = victim.child.id();
    victim.kill()?;
    println!("    {} (process {victim_pid}) holds {open} messages: killed with SIGKILL", CONSUMERS[VICTIM]);
    if open as usize != held.len() || held.is_empty() {
        bail!(
            "the killed consumer said it held {} messages, and {open} were open: the kill proves nothing",
            held.len()
        );
    }
    wait_until_empty(client, &mut consumers, sent.len())?;
    let mut tallies = Vec::new();
    for consumer in consumers {
        let name = consumer.name;
        tallies.push((name, consumer.finish()?));
    }

    let books = Books::read(client)?;
    table(client, sent, &books, &held, &tallies)?;
    say("Checking against sha256sum, run anew on every file");
    let mut faults = faults(sent, &books)?;
    let returned = redelivered(&books, &held);
    if returned != held.len() {
        faults.push(format!("{} of the killed consumer's {} messages came back", returned, held.len()));
    }
    print_faults(&faults);
    if faults.is_empty() {
        println!(
            "    OK: {} files, each accounted for exactly once: {} with the same checksum, {} dead-lettered",
            sent.len(),
            books.outcomes.len(),
            books.dead.len()
        );
    }
    Ok(faults.is_empty())
}

/// How many of the killed consumer's messages somebody else got, and brought to an end.
fn redelivered(books: &Books, held: &BTreeSet<i64>) -> usize {
    let finished = books
        .outcomes
        .iter()
        .filter(|outcome| outcome.delivery_count > 1 && outcome.consumer != CONSUMERS[VICTIM])
        .map(|outcome| outcome.msg_id);
    let dead = books.dead.iter().filter_map(|letter| letter.msg_id);
    finished.chain(dead).filter(|msg_id| held.contains(msg_id)).collect::<BTreeSet<_>>().len()
}

fn wait_until_empty(client: &mut Client, consumers: &mut [Consumer], messages: usize) -> Result<()> {
    let mut before = i64::MAX;
    let mut progress = Instant::now();
    let mut shown = Instant::now();
    loop {
        let left: i64 = client.query_one("SELECT count(*) FROM queue.files", &[])?.try_get(0)?;
        if left == 0 {
            return Ok(());
        }
        for consumer in consumers.iter_mut() {
            if let Some(status) = consumer.child.try_wait().context("cannot look after a consumer")? {
                bail!("consumer {} ended by itself ({status})", consumer.name);
            }
        }
        if left != before {
            (before, progress) = (left, Instant::now());
        }
        if progress.elapsed() > STALL_LIMIT {
            bail!("{left} messages stay in the queue: nothing happened for {} s", STALL_LIMIT.as_secs());
        }
        if shown.elapsed() >= Duration::from_secs(1) {
            println!("    {left} of {messages} messages to go");
            shown = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn table(
    client: &mut Client,
    sent: &BTreeMap<i64, PathBuf>,
    books: &Books,
    held: &BTreeSet<i64>,
    tallies: &[(&str, Value)],
) -> Result<()> {
    let sum = |what: &str| tallies.iter().filter_map(|(_, tally)| tally[what].as_u64()).sum::<u64>();
    // Second deliveries wait for the killed consumer's leases to end: they say nothing of the speed.
    let rate = |consumer: Option<&str>, client: &mut Client| -> Result<Option<f64>> {
        let row = client.query_one(
            "SELECT ((count(*) - 1) / nullif(extract(epoch FROM max(finished_at) - min(finished_at)), 0))::float8
               FROM results WHERE delivery_count = 1 AND ($1::text IS NULL OR consumer = $1)",
            &[&consumer],
        )?;
        Ok(row.try_get(0)?)
    };
    let shown = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}"));
    say("What happened");
    println!("    messages sent                         {:>8}", sent.len());
    println!("    finished, with a result               {:>8}", books.outcomes.len());
    println!("    failed and retried, times             {:>8}", sum("retried"));
    println!("    dead-lettered                         {:>8}", books.dead.len());
    println!("    held by the killed consumer           {:>8}", held.len());
    println!("      of these redelivered to others      {:>8}", redelivered(books, held));
    println!("    finishes refused: lease lost          {:>8}", sum("lost"));
    println!("    files a second, all consumers         {:>8}", shown(rate(None, client)?));
    println!("\n    consumer     finished   files/s   retried");
    for name in CONSUMERS {
        let finished = books.outcomes.iter().filter(|outcome| outcome.consumer == name).count();
        let tally = tallies.iter().find(|(consumer, _)| *consumer == name).map(|(_, tally)| tally);
        let retried = tally.map_or_else(|| "killed".to_owned(), |tally| tally["retried"].to_string());
        println!("    {name:<10} {finished:>10} {:>9} {retried:>9}", shown(rate(Some(name), client)?));
    }
    println!("\n    dead letters:");
    for letter in books.dead.iter().take(DEAD_SHOWN) {
        let error = letter.error.as_deref().unwrap_or("no error recorded");
        println!("    {}: {error}", letter.path.display());
    }
    if books.dead.len() > DEAD_SHOWN {
        println!("    ... and {} more", books.dead.len() - DEAD_SHOWN);
    }
    Ok(())
}

fn farewell(cluster: &Cluster, keep: bool) -> Result<()> {
    let psql = format!(
        "{} -h {} -U postgres demo",
        cluster.tree.program("psql").display(),
        cluster.directory().display()
    );
    if !keep {
        say("The cluster goes now; with --keep it stays, to connect by psql and go on playing");
        return Ok(());
    }
    cluster.keep()?;
    let stop =
        format!("{} -D {} -m fast stop", cluster.tree.program("pg_ctl").display(), cluster.data().display());
    let stop = match cluster.user.is_switched() {
        true => format!("su -s /bin/sh {} -c 'cd / && {stop}'", cluster.user.name),
        false => stop,
    };
    say("The cluster stays. To connect and go on playing:");
    println!("    {psql}");
    println!("    demo=# SELECT queue_send('files', '{{\"path\": \"/etc/hostname\"}}');");
    println!("    demo=# SELECT * FROM queue_read('files');");
    println!("    demo=# SELECT * FROM queue.files_dead;");
    println!("\nTo stop it and delete it:");
    println!("    {stop} && rm -r {}", cluster.directory().display());
    Ok(())
}

/// A consumer process; killed when dropped before its end.
struct Consumer {
    name: &'static str,
    child: Child,
    lines: Receiver<String>,
}

impl Consumer {
    fn start(cluster: &Cluster, name: &'static str, hold_after: Option<u32>) -> Result<Self> {
        let this = std::env::current_exe().context("cannot find this program again")?;
        let mut command = Command::new(this);
        command.arg("demo-consumer").arg("--socket").arg(cluster.directory());
        command.args(["--database", "demo", "--name", name]);
        if let Some(batches) = hold_after {
            command.args(["--hold-after", &batches.to_string()]);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start consumer {name}"))?;
        let stdout = child.stdout.take().context("a consumer has no output")?;
        let (sender, lines) = mpsc::channel();
        let consumer = Self { name, child, lines };
        std::thread::Builder::new()
            .name(format!("output of {name}"))
            .spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            })
            .context("cannot start a thread")?;
        Ok(consumer)
    }

    /// The consumer's next word, which must be `event`.
    fn hear(&self, event: &str) -> Result<Value> {
        let line = self
            .lines
            .recv_timeout(ANSWER_LIMIT)
            .map_err(|error| anyhow!("consumer {} did not say {event:?}: {error}", self.name))?;
        let said: Value =
            serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.name))?;
        if said["event"] != event {
            bail!("consumer {} said {line}, not {event:?}", self.name);
        }
        Ok(said)
    }

    fn holding(&self) -> Result<BTreeSet<i64>> {
        let said = self.hear("holding")?;
        let ids =
            said["msg_ids"].as_array().ok_or_else(|| anyhow!("consumer {} named no messages", self.name))?;
        Ok(ids.iter().filter_map(Value::as_i64).collect())
    }

    fn kill(mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill consumer {}", self.name))?;
        let status = self.child.wait().context("cannot wait for the killed consumer")?;
        if status.signal() != Some(9) {
            bail!("consumer {} ended with {status} before it could be killed", self.name);
        }
        Ok(())
    }

    /// Lets it end in order and returns its tally.
    fn finish(mut self) -> Result<Value> {
        drop(self.child.stdin.take());
        let tally = self.hear("tally")?;
        let status = self.child.wait().context("cannot wait for a consumer")?;
        if !status.success() {
            bail!("consumer {} ended with {status}", self.name);
        }
        Ok(tally)
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        // Errors mean that it has ended already, which is all that is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
