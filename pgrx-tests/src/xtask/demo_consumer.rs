//! One consumer process of the demo: an ordinary client, in the way that one would write it.
//!
//! Read; compute the file's SHA-256; store it and finish the message in one transaction. A file that cannot be
//! read is handed back for a retry. Owns no state: whatever it knows is in the database, so that it may be
//! killed at any time. Tells the demo by lines of JSON on its output; ends when its input is closed.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context, Result};
use postgres::error::SqlState;
use postgres::{Client, NoTls, Statement};
use serde_json::{json, Value};
use sha2::{Digest, Sha256};

use super::demo_files::path_of;

/// How many messages one read leases.
pub const BATCH: i64 = 8;
/// How often the leases of a batch are extended while its files are read; well below the queue's timeout.
const HEARTBEAT: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub struct Arguments {
    /// The directory with the server's socket.
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    database: String,
    /// What the consumer calls itself in the results.
    #[arg(long)]
    name: String,
    /// After finishing this many batches, read one more, say so, and do nothing: waiting to be killed.
    #[arg(long)]
    hold_after: Option<u32>,
}

/// A message that this consumer holds.
struct Held {
    msg_id: i64,
    lease_id: i64,
    delivery_count: i64,
    message: Value,
}

#[derive(Default)]
struct Tally {
    finished: u64,
    retried: u64,
    dead_lettered: u64,
    lost: u64,
}

/// The connection, and what it says over and over.
struct Consumer {
    name: String,
    client: Client,
    read: Statement,
    extend: Statement,
    store: Statement,
    finish: Statement,
    retry: Statement,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let mut consumer = Consumer::connect(arguments)?;
    let stop = watch_input()?;
    let mut tally = Tally::default();
    let mut batches = 0;
    while !stop.load(Ordering::Relaxed) {
        let batch = consumer.read()?;
        if batch.is_empty() {
            continue;
        }
        if arguments.hold_after.is_some_and(|after| batches >= after) {
            let ids: Vec<i64> = batch.iter().map(|held| held.msg_id).collect();
            // The read committed when its statement ended: from here on the leases are this process's.
            println!("{}", json!({ "event": "holding", "msg_ids": ids }));
            while !stop.load(Ordering::Relaxed) {
                std::thread::park_timeout(Duration::from_millis(100));
            }
            return Ok(());
        }
        consumer.work(&batch, &mut tally)?;
        batches += 1;
    }
    println!(
        "{}",
        json!({
            "event": "tally",
            "finished": tally.finished,
            "retried": tally.retried,
            "dead_lettered": tally.dead_lettered,
            "lost": tally.lost,
        })
    );
    Ok(())
}

impl Consumer {
    fn connect(arguments: &Arguments) -> Result<Self> {
        let mut client = Client::configure()
            .host_path(&arguments.socket)
            .user("postgres")
            .dbname(&arguments.database)
            .application_name(&arguments.name)
            .connect(NoTls)
            .context("cannot connect")?;
        let mut prepare = |sql: &str| client.prepare(sql).with_context(|| format!("cannot prepare {sql}"));
        let read = prepare(
            "SELECT msg_id, lease_id, delivery_count, message
               FROM queue_read('files', quantity => $1, wait => '250 ms')",
        )?;
        let extend = prepare("SELECT queue_extend_batch('files', $1, $2)")?;
        let store = prepare(
            "INSERT INTO results (msg_id, path, sha256, delivery_count, consumer) VALUES ($1, $2, $3, $4, $5)",
        )?;
        let finish = prepare("SELECT queue_delete('files', $1, $2, strict => true)")?;
        let retry = prepare("SELECT outcome FROM queue_retry('files', $1, $2, $3)")?;
        Ok(Self { name: arguments.name.clone(), client, read, extend, store, finish, retry })
    }

    fn read(&mut self) -> Result<Vec<Held>> {
        let rows = self.client.query(&self.read, &[&BATCH]).context("cannot read from the queue")?;
        rows.iter()
            .map(|row| {
                Ok(Held {
                    msg_id: row.try_get("msg_id")?,
                    lease_id: row.try_get("lease_id")?,
                    delivery_count: row.try_get("delivery_count")?,
                    message: row.try_get("message")?,
                })
            })
            .collect()
    }

    fn work(&mut self, batch: &[Held], tally: &mut Tally) -> Result<()> {
        let mut extended = Instant::now();
        for (position, held) in batch.iter().enumerate() {
            let path = path_of(&held.message)?;
            // A large file may take longer than a lease: the ones still to do are kept alive meanwhile.
            let mut beat = || -> Result<()> {
                if extended.elapsed() >= HEARTBEAT {
                    self.extend(&batch[position..])?;
                    extended = Instant::now();
                }
                Ok(())
            };
            match sha256(&path, &mut beat)? {
                Ok(sum) => match self.store_and_finish(held, &path, &sum)? {
                    true => tally.finished += 1,
                    false => tally.lost += 1,
                },
                Err(error) => match self.retry(held, &error.to_string())?.as_str() {
                    "retried" => tally.retried += 1,
                    "lost" => tally.lost += 1,
                    _ => tally.dead_lettered += 1,
                },
            }
        }
        Ok(())
    }

    fn extend(&mut self, batch: &[Held]) -> Result<()> {
        let msg_ids: Vec<i64> = batch.iter().map(|held| held.msg_id).collect();
        let lease_ids: Vec<i64> = batch.iter().map(|held| held.lease_id).collect();
        self.client.query(&self.extend, &[&msg_ids, &lease_ids]).context("cannot extend leases")?;
        Ok(())
    }

    /// Both happen or neither. False when the lease was lost meanwhile.
    fn store_and_finish(&mut self, held: &Held, path: &Path, sum: &str) -> Result<bool> {
        let mut transaction = self.client.transaction().context("cannot begin a transaction")?;
        let path = path.to_string_lossy();
        transaction
            .execute(&self.store, &[&held.msg_id, &path, &sum, &held.delivery_count, &self.name])
            .context("cannot store a result")?;
        match transaction.query_one(&self.finish, &[&held.msg_id, &held.lease_id]) {
            Ok(_) => {
                transaction.commit().context("cannot commit a result")?;
                Ok(true)
            }
            // Somebody else has the message by now: with the transaction our result goes too.
            Err(error) if error.code() == Some(&SqlState::NO_DATA_FOUND) => Ok(false),
            Err(error) => Err(anyhow!(error).context("cannot finish a message")),
        }
    }

    fn retry(&mut self, held: &Held, error: &str) -> Result<String> {
        let row = self
            .client
            .query_one(&self.retry, &[&held.msg_id, &held.lease_id, &error])
            .context("cannot hand a message back")?;
        Ok(row.try_get(0)?)
    }
}

/// Set once the demo has closed our input, or is gone.
fn watch_input() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    std::thread::Builder::new()
        .name("input".to_owned())
        .spawn(move || {
            // Nothing is ever sent; the end, or an error, is the sign.
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            seen.store(true, Ordering::Relaxed);
        })
        .context("cannot start a thread")?;
    Ok(stop)
}

/// The outer error is ours, the inner one the file's.
fn sha256(path: &Path, beat: &mut dyn FnMut() -> Result<()>) -> Result<Result<String, io::Error>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return Ok(Err(error)),
    };
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        beat()?;
        match file.read(&mut buffer) {
            Ok(0) => return Ok(Ok(hex::encode(hash.finalize()))),
            Ok(length) => hash.update(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Ok(Err(error)),
        }
    }
}
