//! From just before the COMMIT of a send to the return of a reader that was blocked in another connection.
//!
//! Owns one reader thread for each way of waiting. All ways are measured in turns, one sample each, so that what the
//! machine does meanwhile hits all of them; while one is measured nothing else runs.

use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use postgres::fallible_iterator::FallibleIterator;
use postgres::{Client, Statement};

use super::pgbench::percentile;
use super::report::Title;
use super::systems::{HAND, PAYLOAD, PGMQ, PG_QUEUE};
use super::{Bench, DATABASE};

const WORKLOAD: &str = "wake_up";
/// How long after it was told to wait a reader is surely blocked.
const SETTLE: Duration = Duration::from_millis(3);
const WAIT_LIMIT: Duration = Duration::from_secs(20);
/// pgmq's default; a send must fall anywhere between two of its looks.
const POLL_MS: u64 = 100;
/// A poll takes so long that it is sampled only now and then.
const POLL_EVERY: u32 = 15;
const READ_QUEUE: &str = "SELECT msg_id, lease_id, message::text FROM queue_read('wake', wait => '15 s')";
const READ_PGMQ: &str = "SELECT msg_id, message::text FROM pgmq.read_with_poll('wake', 30, 1, 15)";
const READ_HAND: &str = "UPDATE hand_wake SET visible_at = clock_timestamp() + interval '30 s' WHERE id = \
    (SELECT id FROM hand_wake WHERE visible_at <= clock_timestamp() ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) \
    RETURNING id, message::text";

/// A way of waiting for a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Queue,
    /// Ends with the notification: what the message is nobody knows yet.
    Notify,
    /// And then claims the row: what an application does.
    NotifyAndClaim,
    Poll,
}

const WAYS: [Way; 4] = [Way::Queue, Way::Notify, Way::NotifyAndClaim, Way::Poll];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Queue => PG_QUEUE.name,
            Self::Notify => "LISTEN/NOTIFY",
            Self::NotifyAndClaim => "NOTIFY + claim",
            Self::Poll => "pgmq poll",
        }
    }

    /// What the sender's transaction does, beside BEGIN and COMMIT; `$1` is the message.
    fn send(self) -> &'static [&'static str] {
        match self {
            Self::Queue => &["SELECT queue_send('wake', $1::text::jsonb)"],
            Self::Notify => &["INSERT INTO hand_wake (message) VALUES ($1::text::jsonb)", "NOTIFY wake"],
            Self::NotifyAndClaim => {
                &["INSERT INTO hand_wake (message) VALUES ($1::text::jsonb)", "NOTIFY wake_and_claim"]
            }
            Self::Poll => &["SELECT pgmq.send('wake', $1::text::jsonb)"],
        }
    }

    fn channel(self) -> Option<&'static str> {
        match self {
            Self::Notify => Some("wake"),
            Self::NotifyAndClaim => Some("wake_and_claim"),
            Self::Queue | Self::Poll => None,
        }
    }
}

pub fn run(bench: &mut Bench) -> Result<()> {
    let title = "From just before COMMIT of a send to the return of a blocked reader";
    bench.begin(Title { workload: WORKLOAD, title, unit: "microseconds" });
    for system in [&PG_QUEUE, &HAND, &PGMQ] {
        bench.renew(system, "wake", 0)?;
    }
    let mut pairs = Vec::new();
    for way in WAYS {
        pairs.push(Pair::start(bench, way)?);
    }
    let samples: u32 = bench.options.scaled(3_000, 300);
    let warm_up = samples / 20;
    for turn in 0..samples + warm_up {
        for pair in &mut pairs {
            if pair.way == Way::Poll && turn % POLL_EVERY != 0 {
                continue;
            }
            let latency = pair.sample(turn).with_context(|| format!("{}, sample {turn}", pair.way.name()))?;
            if turn >= warm_up {
                pair.latencies_us.push(latency.as_micros() as u64);
            }
        }
    }
    for mut pair in pairs {
        pair.latencies_us.sort_unstable();
        for (variant, quantile) in [("p50", 0.5), ("p99", 0.99)] {
            let us = percentile(&pair.latencies_us, quantile).context("there is no sample")? as f64;
            bench.progress(1, variant, pair.way.name(), us);
            bench.report.add(WORKLOAD, variant, pair.way.name(), us);
        }
    }
    let polls = samples / POLL_EVERY;
    bench.report.note(WORKLOAD, format!("{samples} samples each, one by one in turns; pgmq poll: {polls}"));
    bench
        .report
        .note(WORKLOAD, "pg_queue and NOTIFY + claim return the message; LISTEN/NOTIFY only that there is one");
    Ok(())
}

/// A message that a reader has, and its lease where there is one.
type Held = (i64, Option<i64>);

/// A sender on this thread and a reader on its own.
struct Pair {
    way: Way,
    sender: Client,
    send: Vec<Statement>,
    go: SyncSender<()>,
    woken: Receiver<Result<Instant>>,
    latencies_us: Vec<u64>,
}

impl Pair {
    fn start(bench: &mut Bench, way: Way) -> Result<Self> {
        let mut sender = bench.cluster.connect(DATABASE)?;
        let send = way.send().iter().map(|sql| sender.prepare(sql)).collect::<Result<Vec<_>, _>>()?;
        let reader = Reader::new(bench.cluster.connect(DATABASE)?, way)?;
        let (go, told) = std::sync::mpsc::sync_channel(0);
        let (tell, woken) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name(format!("reader, {}", way.name()))
            .spawn(move || reader.work(&told, &tell))
            .context("cannot start a thread")?;
        Ok(Self { way, sender, send, go, woken, latencies_us: Vec::new() })
    }

    fn sample(&mut self, turn: u32) -> Result<Duration> {
        self.go.send(()).map_err(|_| anyhow!("the reader has ended"))?;
        let mut settle = SETTLE;
        if self.way == Way::Poll {
            // Evenly spread over the time between two looks.
            settle += Duration::from_micros(u64::from(turn / POLL_EVERY) * 61_803 % (POLL_MS * 1_000));
        }
        std::thread::sleep(settle);
        self.sender.batch_execute("BEGIN")?;
        for statement in &self.send {
            let payload = PAYLOAD.to_owned();
            match statement.params().len() {
                0 => self.sender.execute(statement, &[])?,
                _ => self.sender.execute(statement, &[&payload])?,
            };
        }
        let before = Instant::now();
        self.sender.batch_execute("COMMIT")?;
        let woken = self.hear()?;
        // The reader has cleaned up: nothing of this sample runs into the next.
        self.hear()?;
        Ok(woken.duration_since(before))
    }

    fn hear(&self) -> Result<Instant> {
        self.woken.recv_timeout(WAIT_LIMIT).map_err(|_| anyhow!("the reader was not woken"))?
    }
}

struct Reader {
    client: Client,
    way: Way,
    read: Option<Statement>,
    finish: Option<Statement>,
}

impl Reader {
    fn new(mut client: Client, way: Way) -> Result<Self> {
        if let Some(channel) = way.channel() {
            client.batch_execute(&format!("LISTEN {channel}"))?;
        }
        let (read, finish) = match way {
            Way::Queue => (Some(READ_QUEUE), Some("SELECT queue_delete('wake', $1, $2)")),
            Way::Notify => (None, None),
            Way::NotifyAndClaim => (Some(READ_HAND), Some("DELETE FROM hand_wake WHERE id = $1")),
            Way::Poll => (Some(READ_PGMQ), Some("SELECT pgmq.delete('wake', $1::bigint)")),
        };
        let mut prepare = |sql: Option<&str>| sql.map(|sql| client.prepare(sql)).transpose();
        let (read, finish) = (prepare(read)?, prepare(finish)?);
        Ok(Self { client, way, read, finish })
    }

    /// Until nobody tells it to wait any more: waits, says when it returned, cleans up, says so.
    fn work(mut self, told: &Receiver<()>, tell: &std::sync::mpsc::Sender<Result<Instant>>) {
        while told.recv().is_ok() {
            let outcome = self.wait();
            let (woken, held) = match outcome {
                Ok((woken, held)) => (Ok(woken), held),
                Err(error) => (Err(error), None),
            };
            if tell.send(woken).is_err() {
                return;
            }
            let cleaned = self.clean(held).map(|()| Instant::now());
            if tell.send(cleaned).is_err() {
                return;
            }
        }
    }

    /// When it was woken, and the ids that finish the message.
    fn wait(&mut self) -> Result<(Instant, Option<Held>)> {
        if self.way.channel().is_some() {
            let mut notifications = self.client.notifications();
            let next = notifications.timeout_iter(WAIT_LIMIT).next()?;
            if next.is_none() {
                bail!("no notification came");
            }
        }
        let Some(read) = &self.read else { return Ok((Instant::now(), None)) };
        let rows = self.client.query(read, &[])?;
        let woken = Instant::now();
        let [row] = rows.as_slice() else { bail!("{} rows came", rows.len()) };
        let lease = if self.way == Way::Queue { Some(row.try_get(1)?) } else { None };
        Ok((woken, Some((row.try_get(0)?, lease))))
    }

    fn clean(&mut self, held: Option<Held>) -> Result<()> {
        let (Some(finish), Some((id, lease))) = (&self.finish, held) else { return Ok(()) };
        match lease {
            Some(lease) => self.client.query(finish, &[&id, &lease])?,
            None => self.client.query(finish, &[&id])?,
        };
        Ok(())
    }
}
