//! One look at the server under load: what was done since the last one, how large everything is, how much memory
//! and CPU its processes took. Owns the look; changes nothing.

use std::fmt;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use postgres::Client;
use queue_tests::descendants;
use serde_json::{json, Value};

use super::bench::pgbench::percentile;
use super::soak_load::{Books, Load, Progress};

const LOOK: &str = "
SELECT pg_relation_size('queue.soak'), pg_relation_size('queue.soak', 'fsm') + pg_relation_size('queue.soak', 'vm'),
       (SELECT sum(pg_relation_size(indexrelid)) FILTER (WHERE indisprimary)::int8 FROM pg_index i
         WHERE indrelid = 'queue.soak'::regclass),
       (SELECT sum(pg_relation_size(indexrelid)) FILTER (WHERE NOT indisprimary)::int8 FROM pg_index i
         WHERE indrelid = 'queue.soak'::regclass),
       s.n_dead_tup, s.autovacuum_count, s.autoanalyze_count,
       (SELECT sum(allocated_size)::int8 FROM pg_shmem_allocations WHERE name ILIKE '%pg_queue%'),
       (pg_current_wal_insert_lsn() - '0/0')::int8,
       (SELECT array_agg(pid) FROM pg_stat_activity WHERE backend_type ILIKE 'pg_queue%')
  FROM pg_stat_all_tables s WHERE s.relid = 'queue.soak'::regclass";
/// Who holds what: what the queue's counters say.
const SLOTS: &str = "SELECT (ready + delayed + leased)::int8 FROM queue_stats('soak')";
/// A clock tick of /proc/PID/stat on every Linux.
const TICK_MS: u64 = 10;
const MB: f64 = 1_048_576.0;

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    pub at_s: f64,
    pub sent_per_s: f64,
    pub finished_per_s: f64,
    /// Sent and not finished yet.
    pub open: u64,
    pub send_p50_ms: f64,
    pub send_p99_ms: f64,
    pub send_max_ms: f64,
    /// From when it should have been sent until it was finished.
    pub message_p50_ms: f64,
    pub message_p99_ms: f64,
    pub message_max_ms: f64,
    pub heap_bytes: i64,
    pub maps_bytes: i64,
    pub primary_key_bytes: i64,
    pub other_indexes_bytes: i64,
    pub dead_rows: i64,
    pub vacuums: i64,
    pub analyzes: i64,
    pub shared_bytes: i64,
    /// The largest of the load's sessions' own memory (RssAnon).
    pub session_bytes: i64,
    /// All of pg_queue's own processes.
    pub worker_bytes: i64,
    /// None where queue_stats is not there to say.
    pub slots: Option<i64>,
    pub wal_bytes_per_s: f64,
    /// All of the server, in percent of one core.
    pub cpu_percent: f64,
}

impl Sample {
    pub const HEADER: &'static str =
        "    time   sent/s  done/s   open   send p50/p99/max ms       all p50/p99/max ms        heap MB  \
        pkey  other   dead rows  vacuum/analyze  session MB  worker MB    slots  WAL MB/s  CPU %";

    pub fn to_json(&self) -> Value {
        json!({
            "at_s": self.at_s, "sent_per_s": self.sent_per_s, "finished_per_s": self.finished_per_s,
            "open": self.open, "send_p50_ms": self.send_p50_ms, "send_p99_ms": self.send_p99_ms,
            "send_max_ms": self.send_max_ms, "message_max_ms": self.message_max_ms,
            "message_p50_ms": self.message_p50_ms, "message_p99_ms": self.message_p99_ms,
            "heap_bytes": self.heap_bytes, "maps_bytes": self.maps_bytes,
            "primary_key_bytes": self.primary_key_bytes, "other_indexes_bytes": self.other_indexes_bytes,
            "dead_rows": self.dead_rows, "vacuums": self.vacuums, "analyzes": self.analyzes,
            "shared_bytes": self.shared_bytes, "session_bytes": self.session_bytes,
            "worker_bytes": self.worker_bytes, "slots": self.slots,
            "wal_bytes_per_s": self.wal_bytes_per_s, "cpu_percent": self.cpu_percent,
        })
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mb = |bytes: i64| bytes as f64 / MB;
        write!(
            f,
            "{:>6.0} s {:>7.0} {:>7.0} {:>6} {:>8.2} {:>7.2} {:>7.1} {:>7.2} {:>7.2} {:>7.1} {:>9.1} {:>5.1} {:>6.2} {:>11} {:>9}/{:<5} \
             {:>10.1} {:>10.1} {:>8} {:>9.2} {:>6.0}",
            self.at_s,
            self.sent_per_s,
            self.finished_per_s,
            self.open,
            self.send_p50_ms,
            self.send_p99_ms,
            self.send_max_ms,
            self.message_p50_ms,
            self.message_p99_ms,
            self.message_max_ms,
            mb(self.heap_bytes),
            mb(self.primary_key_bytes),
            mb(self.other_indexes_bytes),
            self.dead_rows,
            self.vacuums,
            self.analyzes,
            mb(self.session_bytes),
            mb(self.worker_bytes),
            self.slots.map_or_else(|| "-".to_owned(), |slots| slots.to_string()),
            self.wal_bytes_per_s / MB,
            self.cpu_percent,
        )
    }
}

/// Who looks, and what was seen last.
pub struct Eye {
    postmaster: u32,
    backends: Vec<u32>,
    has_stats: bool,
    last_at: Duration,
    last_books: Books,
    last_wal: i64,
    last_cpu_ms: u64,
}

impl Eye {
    pub fn new(postmaster: u32, load: &Load, client: &mut Client) -> Result<Eye> {
        let last_wal = client.query_one(LOOK, &[]).context("cannot look at the queue")?.try_get(8)?;
        Ok(Eye {
            postmaster,
            backends: load.backends(),
            has_stats: client.query(SLOTS, &[]).is_ok(),
            last_at: Duration::ZERO,
            last_books: load.books(),
            last_wal,
            last_cpu_ms: cpu_ms(postmaster)?,
        })
    }

    pub fn look(&mut self, at: Duration, progress: Progress, client: &mut Client) -> Result<Sample> {
        let row = client.query_one(LOOK, &[]).context("cannot look at the queue")?;
        let (wal, cpu_ms): (i64, u64) = (row.try_get(8)?, cpu_ms(self.postmaster)?);
        let workers: Option<Vec<i32>> = row.try_get(9)?;
        let seconds = (at - self.last_at).as_secs_f64();
        let rate = |now: u64, before: u64| (now - before) as f64 / seconds;
        let ms = |sorted: &[u64], quantile| percentile(sorted, quantile).unwrap_or(0) as f64 / 1e3;
        let books = progress.books;
        let sample = Sample {
            at_s: at.as_secs_f64(),
            sent_per_s: rate(books.sent, self.last_books.sent),
            finished_per_s: rate(books.finished, self.last_books.finished),
            open: books.sent - books.finished,
            send_p50_ms: ms(&progress.sends_us, 0.5),
            send_p99_ms: ms(&progress.sends_us, 0.99),
            send_max_ms: ms(&progress.sends_us, 1.0),
            message_p50_ms: ms(&progress.messages_us, 0.5),
            message_p99_ms: ms(&progress.messages_us, 0.99),
            message_max_ms: ms(&progress.messages_us, 1.0),
            heap_bytes: row.try_get(0)?,
            maps_bytes: row.try_get(1)?,
            primary_key_bytes: row.try_get::<_, Option<i64>>(2)?.unwrap_or(0),
            other_indexes_bytes: row.try_get::<_, Option<i64>>(3)?.unwrap_or(0),
            dead_rows: row.try_get(4)?,
            vacuums: row.try_get(5)?,
            analyzes: row.try_get(6)?,
            shared_bytes: row.try_get::<_, Option<i64>>(7)?.unwrap_or(0),
            session_bytes: self.backends.iter().map(|pid| anonymous_bytes(*pid)).max().unwrap_or(0),
            worker_bytes: workers.iter().flatten().map(|pid| anonymous_bytes(*pid as u32)).sum(),
            slots: match self.has_stats {
                true => client.query_opt(SLOTS, &[])?.map(|row| row.try_get(0)).transpose()?,
                false => None,
            },
            wal_bytes_per_s: (wal - self.last_wal) as f64 / seconds,
            cpu_percent: (cpu_ms.saturating_sub(self.last_cpu_ms)) as f64 / seconds / 10.0,
        };
        (self.last_at, self.last_books, self.last_wal, self.last_cpu_ms) = (at, books, wal, cpu_ms);
        Ok(sample)
    }
}

/// A process' memory that is no file's and no other's; 0 once it has ended.
fn anonymous_bytes(pid: u32) -> i64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kb =
        text.lines().find_map(|line| line.strip_prefix("RssAnon:")?.split_whitespace().next()?.parse().ok());
    kb.unwrap_or(0_i64) * 1_024
}

/// CPU time of the server's processes; the postmaster's own figure includes those that ended (autovacuum's).
fn cpu_ms(postmaster: u32) -> Result<u64> {
    let own = ticks(postmaster).context("the postmaster is gone")?;
    let others = descendants(postmaster).into_iter().filter_map(ticks);
    Ok((own[0] + own[1] + own[2] + own[3] + others.map(|ticks| ticks[0] + ticks[1]).sum::<u64>()) * TICK_MS)
}

/// utime, stime, cutime, cstime (proc(5)).
fn ticks(pid: u32) -> Option<[u64; 4]> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse().ok();
    Some([field(14)?, field(15)?, field(16)?, field(17)?])
}
