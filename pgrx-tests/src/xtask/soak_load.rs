//! The soak's load: sessions that send at a steady rate, and sessions that finish what comes.
//!
//! Owns the threads and their books. An open loop: a send has a time at which it should begin, kept whatever the
//! server does, and every latency counts from there. Not pgbench: it keeps a line for each transaction until its
//! end, which for hours is gigabytes. Some messages are delayed, some are retried, so that every index is used.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use postgres::Client;

/// So many that one slow flush does not hold up the rest.
const SENDERS: u32 = 8;
const CONSUMERS: u32 = 8;
/// Of so many messages one is delayed, another one fails once.
const DELAYED_EVERY: u64 = 50;
const FAILING_EVERY: u64 = 51;
pub const FILLING: &str = "a message of about a hundred bytes, as the benchmarks send them";
const SEND: &str =
    "SELECT queue_send('soak', jsonb_build_object('due', $1::int8, 'fails', $2::bool, 'is_late', \
    $3::bool, 'text', $4::text), delay => CASE WHEN $3 THEN interval '1 s' END)";
const READ: &str = "SELECT msg_id, lease_id, delivery_count, (message ->> 'due')::int8, \
    (message ->> 'fails')::bool, (message ->> 'is_late')::bool FROM queue_read('soak', wait => '1 s')";
const DELETE: &str = "SELECT queue_delete('soak', $1, $2)";
const RETRY: &str = "SELECT outcome FROM queue_retry('soak', $1, $2, error => 'once more')";

#[derive(Clone, Copy)]
pub struct Rates {
    pub per_second: u32,
    /// So many messages are there; consumers leave as many alone.
    pub backlog: u32,
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Books {
    /// The backlog included.
    pub sent: u64,
    pub finished: u64,
    pub retried: u64,
}

/// What was done so far, and the latencies since the last look.
#[derive(Default)]
pub struct Progress {
    pub books: Books,
    /// Of each send, from when it should have begun, microseconds; sorted.
    pub sends_us: Vec<u64>,
    /// Of each message that was neither delayed nor retried, from there until it was finished; sorted.
    pub messages_us: Vec<u64>,
}

struct Shared {
    begun: Instant,
    rates: Rates,
    is_over: AtomicBool,
    is_drained: AtomicBool,
    sent: AtomicU64,
    finished: AtomicU64,
    retried: AtomicU64,
    sends_us: Mutex<Vec<u64>>,
    messages_us: Mutex<Vec<u64>>,
}

/// The load while it runs.
pub struct Load {
    shared: Arc<Shared>,
    senders: Vec<JoinHandle<Result<()>>>,
    consumers: Vec<JoinHandle<Result<()>>>,
    backends: Vec<u32>,
}

impl Load {
    pub fn start(rates: Rates, connect: impl Fn() -> Result<Client>) -> Result<Load> {
        let shared = Arc::new(Shared {
            begun: Instant::now(),
            rates,
            is_over: AtomicBool::new(false),
            is_drained: AtomicBool::new(false),
            sent: AtomicU64::new(rates.backlog.into()),
            finished: AtomicU64::new(0),
            retried: AtomicU64::new(0),
            sends_us: Mutex::default(),
            messages_us: Mutex::default(),
        });
        let mut load = Load { shared, senders: Vec::new(), consumers: Vec::new(), backends: Vec::new() };
        for number in 0..SENDERS + CONSUMERS {
            let mut client = connect()?;
            let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[])?.try_get(0)?;
            load.backends.push(pid as u32);
            let shared = Arc::clone(&load.shared);
            if number < SENDERS {
                load.senders.push(std::thread::spawn(move || shared.send(client, number)));
            } else {
                load.consumers.push(std::thread::spawn(move || shared.consume(client)));
            }
        }
        Ok(load)
    }

    /// The process ids of its sessions.
    pub fn backends(&self) -> Vec<u32> {
        self.backends.clone()
    }

    pub fn books(&self) -> Books {
        self.shared.books()
    }

    pub fn progress(&self) -> Result<Progress> {
        if self.senders.iter().chain(&self.consumers).any(JoinHandle::is_finished) {
            bail!("a session of the load ended before its time");
        }
        Ok(Progress {
            books: self.shared.books(),
            sends_us: drain(&self.shared.sends_us),
            messages_us: drain(&self.shared.messages_us),
        })
    }

    /// Sends no more, waits until all but the backlog is finished.
    pub fn finish(self, limit: Duration) -> Result<Books> {
        self.shared.is_over.store(true, Relaxed);
        join(self.senders)?;
        let begun = Instant::now();
        let backlog = u64::from(self.shared.rates.backlog);
        while self.shared.books().finished + backlog < self.shared.books().sent {
            if begun.elapsed() > limit {
                bail!("not everything was finished in {} s: {:?}", limit.as_secs(), self.shared.books());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.shared.is_drained.store(true, Relaxed);
        join(self.consumers)?;
        Ok(self.shared.books())
    }
}

fn join(threads: Vec<JoinHandle<Result<()>>>) -> Result<()> {
    threads
        .into_iter()
        .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a session's thread panicked"))?)
}

fn drain(of: &Mutex<Vec<u64>>) -> Vec<u64> {
    let mut some = std::mem::take(&mut *of.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    some.sort_unstable();
    some
}

fn note(to: &Mutex<Vec<u64>>, us: u64) {
    to.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(us);
}

impl Shared {
    fn books(&self) -> Books {
        // In this order, so that never more seem finished than sent.
        let (finished, retried) = (self.finished.load(Relaxed), self.retried.load(Relaxed));
        Books { sent: self.sent.load(Relaxed), finished, retried }
    }

    fn send(&self, mut client: Client, number: u32) -> Result<()> {
        let send = client.prepare(SEND)?;
        let period = Duration::from_secs(1) * SENDERS / self.rates.per_second;
        let mut due = self.begun + Duration::from_secs(1) * number / self.rates.per_second;
        for count in 1.. {
            if self.is_over.load(Relaxed) {
                break;
            }
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let due_us = due.duration_since(self.begun).as_micros() as i64;
            let (fails, is_late) = (count % FAILING_EVERY == 0, count % DELAYED_EVERY == 0);
            // Before it is sent: it may be finished before the answer is here.
            self.sent.fetch_add(1, Relaxed);
            client.query_one(&send, &[&due_us, &fails, &is_late, &FILLING]).context("cannot send")?;
            note(&self.sends_us, due.elapsed().as_micros() as u64);
            due += period;
        }
        Ok(())
    }

    fn consume(&self, mut client: Client) -> Result<()> {
        let [read, delete, retry] = [client.prepare(READ)?, client.prepare(DELETE)?, client.prepare(RETRY)?];
        while !self.is_drained.load(Relaxed) {
            let books = self.books();
            if books.sent < books.finished + u64::from(self.rates.backlog) {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let Some(row) = client.query_opt(&read, &[]).context("cannot read")? else { continue };
            let (msg_id, lease_id): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
            let (count, due_us): (i64, i64) = (row.try_get(2)?, row.try_get(3)?);
            let (fails, is_late): (bool, bool) = (row.try_get(4)?, row.try_get(5)?);
            if fails && count == 1 {
                let outcome: String = client.query_one(&retry, &[&msg_id, &lease_id])?.try_get(0)?;
                if outcome != "retried" {
                    bail!("message {msg_id} was {outcome}, not retried");
                }
                self.retried.fetch_add(1, Relaxed);
                continue;
            }
            if !client
                .query_one(&delete, &[&msg_id, &lease_id])
                .context("cannot delete")?
                .try_get::<_, bool>(0)?
            {
                bail!("message {msg_id} was lost while it was leased");
            }
            self.finished.fetch_add(1, Relaxed);
            if !fails && !is_late {
                let took = self.begun.elapsed().as_micros() as u64;
                note(&self.messages_us, took.saturating_sub(due_us as u64));
            }
        }
        Ok(())
    }
}
