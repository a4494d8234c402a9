//! A round: clients work, faults strike, then everything is drained and judged.
//!
//! Owns the order of things and the pace. Strikes are paced by what the clients got done since the one before, not by
//! the clock: a system that does nothing any more ends the round as failed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use postgres::Client;

use super::actor::{Actor, DURABLE, EXACT, QUEUES};
use super::checker::{self, Rules, Tables, Verdict};
use super::faults::{self, Fault, Struck};
use super::history::{Blow, Key, Us};
use super::rng::Rng;
use super::tally::Tally;
use super::world::{lock, World, DATABASE};
use super::{consumers, mortal, senders};
use crate::pg_tree::PgTree;
use crate::wait::poll;
use crate::ClusterOptions;

/// What must have been done between two strikes.
const SENT_BETWEEN: u64 = 200;
const DELIVERED_BETWEEN: u64 = 100;
/// So long without any of that, and the system hangs.
const PROGRESS_LIMIT: Duration = Duration::from_secs(30);
/// No call of a client takes as long.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// A fault that has not struck yet when the time is over is tried so often.
const LAST_TRIES: u32 = 5;
/// How often the database is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// So long without a look, and nobody knows whether there was a worker.
const UNSEEN_US: Us = 1_000_000;
const FLUSH_MS: u64 = 300;
/// The worker is there before it serves, may be kept from a queue for a second at a time, and stands still for some on a
/// busy machine.
const FLUSH_SLACK_US: Us = 5_000_000;
/// Besides what was seen of it: how far the wall clock may run from the monotonic one.
const CLOCK_SLACK_US: Us = 5_000;
/// Now and then nothing strikes for so long that leases are written, beyond doubt, before the next crash.
const QUIET: Duration = Duration::from_secs(7);
/// In a round of that length, and with so many of their most frequent call, clients have done work of every kind; with
/// fewer, of the kinds that they have tried so often.
const WANTED_FROM: Duration = Duration::from_secs(10);
const WANTED_TRIED_MIN: u64 = 2_000;
const TRIED_MIN: u64 = 20;
/// So many rounds at a time leave each other enough of the machine.
const ROUNDS_MAX: u32 = 2;

/// How a round is run.
pub struct Plan {
    pub seed: u64,
    pub length: Duration,
    pub faults: Vec<Box<dyn Fault>>,
    pub senders: u32,
    pub consumers: u32,
    /// Leave fsync on. No fault here needs it: what a killed process has written is in the kernel.
    pub is_durable: bool,
    /// One strike in so many comes after [`QUIET`].
    pub quiet_one_in: u64,
    /// At the end: without a message for so long there comes none. No lease here is over 20 seconds
    /// ([`consumers::LONG_LEASE_US`]), no delay or backoff over two.
    pub drain_limit: Duration,
    /// Break this rule of the engine, in a build that can (`pg_queue.break_rule`).
    pub break_rule: Option<String>,
    /// Say what happens as it does.
    pub is_told: bool,
}

/// What became of one fault.
#[derive(Clone, Debug, Default)]
pub struct Strikes {
    pub hits: u64,
    pub misses: u64,
    /// Calls that were open when it hit, all together.
    pub open_calls: u64,
    /// How long the hits took, all together.
    pub took_us: Us,
    /// What the last ones saw.
    pub last_hit: String,
    pub last_miss: String,
    /// Why it cannot be tried here.
    pub skipped: Option<String>,
}

/// All that a round has found.
#[derive(Debug)]
pub struct Outcome {
    pub seed: u64,
    pub version: String,
    pub is_durable: bool,
    pub took: Duration,
    pub drained_in: Duration,
    pub strikes: BTreeMap<&'static str, Strikes>,
    pub verdict: Verdict,
    pub calls: u64,
    pub sessions: u64,
    pub tally: Tally,
    /// What is wrong besides the verdict.
    pub failures: Vec<String>,
}

impl Outcome {
    pub fn is_good(&self) -> bool {
        self.verdict.is_clean() && self.failures.is_empty()
    }

    pub fn hits(&self) -> u64 {
        self.strikes.values().map(|strikes| strikes.hits).sum()
    }
}

/// Runs a round on a throwaway cluster of `tree`, as soon as there are few enough others in this process.
pub fn run(tree: PgTree, plan: Plan) -> Result<Outcome> {
    let _turn = Turn::take();
    let mut options = ClusterOptions::default()
        .set("shared_buffers", "64MB")
        .set("max_wal_size", "512MB")
        .set("checkpoint_timeout", "30s")
        .set("autovacuum_naptime", "5s")
        .set("restart_after_crash", "on")
        .set("pg_queue.lease_flush_interval", &format!("{FLUSH_MS}ms"));
    if plan.is_durable {
        options = options.durable();
    }
    if let Some(rule) = &plan.break_rule {
        options = options.set("pg_queue.break_rule", rule);
    }
    for fault in &plan.faults {
        options = fault.cluster(options);
    }
    let version = tree.version.clone();
    let cluster = options.start_on(tree)?;
    cluster.connect("postgres")?.batch_execute(&format!("CREATE DATABASE {DATABASE}"))?;
    cluster
        .connect(DATABASE)?
        .batch_execute(include_str!("setup.sql"))
        .context("cannot set the database up")?;
    let world = World::new(cluster);
    let outcome = Round { world: &world, plan, strikes: BTreeMap::new(), failures: Vec::new() }.run(version);
    outcome.with_context(|| format!("log of the server:\n{}", world.cluster().log_tail()))
}

/// The right to run a round; given back when it is dropped.
struct Turn;

static ROUNDS: Mutex<u32> = Mutex::new(0);
static ROUND_ENDED: Condvar = Condvar::new();

impl Turn {
    fn take() -> Self {
        let is_full = |rounds: &mut u32| *rounds >= ROUNDS_MAX;
        let rounds = ROUND_ENDED.wait_while(lock(&ROUNDS), is_full);
        *rounds.unwrap_or_else(|poisoned| poisoned.into_inner()) += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *lock(&ROUNDS) -= 1;
        ROUND_ENDED.notify_one();
    }
}

struct Round<'w> {
    world: &'w World,
    plan: Plan,
    strikes: BTreeMap<&'static str, Strikes>,
    failures: Vec<String>,
}

impl Round<'_> {
    fn run(mut self, version: String) -> Result<Outcome> {
        let rng = Rng::new(self.plan.seed);
        let begun = Instant::now();
        let mut faults = std::mem::take(&mut self.plan.faults);
        for fault in &mut faults {
            let strikes = self.strikes.entry(fault.name()).or_default();
            strikes.skipped = fault.skipped(self.world);
            if strikes.skipped.is_none() {
                fault.prepare(self.world).with_context(|| format!("cannot prepare {}", fault.name()))?;
            }
        }
        faults.retain(|fault| self.strikes[fault.name()].skipped.is_none());
        let looks = AtomicBool::new(true);
        let (world, senders, consumers) = (self.world, self.plan.senders, self.plan.consumers);
        std::thread::scope(|scope| -> Result<()> {
            let watcher = scope.spawn(|| watch(world, &looks));
            let mut clients = Vec::new();
            for number in 0..senders {
                let actor = Actor::new(world, "sender", false, rng.fork(u64::from(number) + 1));
                clients.push(scope.spawn(move || actor.run(senders::work, |_| Ok(()))));
            }
            for number in 0..consumers {
                let actor = Actor::new(world, "consumer", true, rng.fork(u64::from(number) + 1_000));
                clients.push(scope.spawn(move || actor.run(consumers::work, consumers::end)));
            }
            let struck = self.strike_on(&mut faults, &mut rng.fork(0), begun);
            world.end();
            // Whoever hangs now would hang the process: said before it is waited for.
            if poll(CALL_LIMIT, || clients.iter().all(|client| client.is_finished()).then_some(())).is_none() {
                eprintln!("these calls hang: {:?}\n{}", world.open_calls(), world.cluster().log_tail());
                std::process::exit(2);
            }
            looks.store(false, SeqCst);
            for client in clients {
                if client.join().is_err() {
                    self.failures.push("a client's thread panicked".to_owned());
                }
            }
            if watcher.join().is_err() {
                self.failures.push("the watcher panicked".to_owned());
            }
            struck
        })?;
        let drain_begun = Instant::now();
        self.drain(&rng)?;
        self.failures.extend(mortal::settle(self.world, self.plan.drain_limit)?);
        let drained_in = drain_begun.elapsed();
        let tables = self.tables()?;
        self.world.look_at_wall_clock();
        let moved_us = self.world.wall_clock_moved_us();
        if moved_us > CLOCK_SLACK_US {
            println!("the wall clock moved by {moved_us} us");
        }
        let rules = Rules {
            flush_us: FLUSH_MS * 1_000,
            flush_slack_us: FLUSH_SLACK_US,
            clock_slack_us: moved_us + CLOCK_SLACK_US,
            lease_us: consumers::LEASE_US,
            exact: EXACT,
            durable: DURABLE,
        };
        let verdict = checker::check(self.world.history(), &tables, rules);
        self.look_at_logs();
        self.look_at_calls();
        for (name, strikes) in &self.strikes {
            if strikes.hits == 0 && strikes.skipped.is_none() {
                let missed = format!("{name} never struck ({} misses: {})", strikes.misses, strikes.last_miss);
                self.failures.push(missed);
            }
        }
        let counters = &self.world.counters;
        Ok(Outcome {
            seed: self.plan.seed,
            version,
            is_durable: self.plan.is_durable,
            took: begun.elapsed(),
            drained_in,
            strikes: self.strikes,
            verdict,
            calls: counters.calls.load(Relaxed),
            sessions: counters.reconnects.load(Relaxed),
            tally: self.world.tally(),
            failures: self.failures,
        })
    }

    /// One strike after the other until the time is over and each fault has struck.
    fn strike_on(&mut self, faults: &mut [Box<dyn Fault>], rng: &mut Rng, begun: Instant) -> Result<()> {
        let mut last_tries = 0;
        loop {
            self.await_progress()?;
            let is_over = begun.elapsed() >= self.plan.length;
            let open: Vec<usize> =
                (0..faults.len()).filter(|at| self.strikes[faults[*at].name()].hits == 0).collect();
            if is_over {
                last_tries += 1;
                if open.is_empty() || last_tries > LAST_TRIES * faults.len() as u32 {
                    return Ok(());
                }
            }
            // First each of them once, then by weight.
            let chosen = match rng.pick(&open) {
                Some(at) => *at,
                None if faults.is_empty() => continue,
                None => by_weight(faults, rng),
            };
            if rng.one_in(self.plan.quiet_one_in) {
                std::thread::sleep(QUIET);
            }
            let fault = &mut faults[chosen];
            let struck = fault.strike(self.world, rng).with_context(|| format!("fault {}", fault.name()))?;
            let strikes = self.strikes.entry(fault.name()).or_default();
            match struck {
                Struck::Hit(proof) => {
                    strikes.hits += 1;
                    strikes.open_calls += proof.open_calls as u64;
                    strikes.took_us += proof.to_us - proof.from_us;
                    strikes.last_hit.clone_from(&proof.seen);
                    if self.plan.is_told {
                        let (at_s, name) = (proof.from_us as f64 / 1e6, fault.name());
                        println!(
                            "    {at_s:8.1} s  {name:<18} {:>2} calls open  {}",
                            proof.open_calls, proof.seen
                        );
                    }
                }
                Struck::Missed(why) => {
                    strikes.misses += 1;
                    strikes.last_miss = why;
                }
            }
        }
    }

    /// Returns when the clients got something done since it was called.
    fn await_progress(&self) -> Result<()> {
        let counters = &self.world.counters;
        let done = || (counters.acknowledged.load(Relaxed), counters.delivered.load(Relaxed));
        let before = done();
        let is_full = || counters.backlog.load(Relaxed) > senders::BACKLOG_MAX;
        let progress = poll(PROGRESS_LIMIT, || {
            let (sent, delivered) = done();
            let has_sent = sent >= before.0 + SENT_BETWEEN || is_full();
            (has_sent && delivered >= before.1 + DELIVERED_BETWEEN).then_some(())
        });
        if progress.is_some() {
            return Ok(());
        }
        let (sent, delivered) = done();
        bail!(
            "only {} messages were sent and {} delivered in {} s; open calls: {:?}",
            sent - before.0,
            delivered - before.1,
            PROGRESS_LIMIT.as_secs(),
            self.world.open_calls()
        )
    }

    /// Reads and finishes until the tables are empty, or nothing comes any more.
    fn drain(&mut self, rng: &Rng) -> Result<()> {
        self.world.reopen();
        let mut actor = Actor::new(self.world, "drain", true, rng.fork(2_000));
        let mut client = self.world.admin()?;
        let (mut last, limit) = (Instant::now(), self.plan.drain_limit);
        let mut quantity = consumers::DRAINED_MAX;
        loop {
            let mut finished = 0;
            for queue in 0..QUEUES.len() as u8 {
                if actor.is_connected() || actor.connect() {
                    finished += consumers::drain(&mut actor, queue, &mut quantity).unwrap_or(0);
                }
            }
            if finished > 0 {
                last = Instant::now();
            } else if rows(&mut client)? == 0 {
                break;
            } else if last.elapsed() > limit {
                let left =
                    format!("{} messages were not delivered in {} s", rows(&mut client)?, limit.as_secs());
                self.failures.push(left);
                break;
            }
        }
        actor.hand_in();
        Ok(())
    }

    fn tables(&self) -> Result<Tables> {
        let mut client = self.world.admin()?;
        let mut tables = Tables::default();
        let are_pops_known = self.world.counters.pops_unknown.load(Relaxed) == 0;
        for row in client.query("SELECT key, lease_id, who FROM ledger", &[])? {
            let (key, who): (i64, &str) = (row.get(0), row.get(2));
            tables.ledger.push(key as Key);
            if who == "client" || who == "pop" && are_pops_known {
                tables.claimed.push((key as Key, row.get(1)));
            }
        }
        for queue in QUEUES {
            let mut keys = |schema: &str| -> Result<Vec<Key>> {
                let sql = format!("SELECT (message ->> 'k')::int8 FROM {schema}.{queue}");
                Ok(client.query(&sql, &[])?.iter().map(|row| row.get::<_, i64>(0) as Key).collect())
            };
            tables.left.extend(keys("queue")?);
            tables.archived.extend(keys("queue_archive")?);
        }
        Ok(tables)
    }

    /// Nothing but what was killed on purpose died, on no server.
    fn look_at_logs(&mut self) {
        for (log, caused) in self.world.logs() {
            self.look_at_log(&log, caused);
        }
    }

    fn look_at_log(&mut self, log: &str, caused: u64) {
        // A full pg_wal is the one reason for a PANIC; what panics aborts.
        let was_full = self.strikes.get(faults::WAL_FULL).is_some_and(|strikes| strikes.hits > 0);
        let is_bad = |line: &&str| {
            if was_full && (line.contains(faults::NO_SPACE) || line.contains("by signal 6")) {
                return false;
            }
            let died = line.contains("was terminated by signal") && !line.contains("by signal 9");
            // The postmaster's way to end who does not end: after SIGQUIT has had five seconds.
            died || line.contains("PANIC:") || line.contains("TRAP:") || line.contains("panicked at")
        };
        for line in log.lines().filter(is_bad).take(5) {
            self.failures.push(format!("the log says: {line}"));
        }
        let crashes = log.matches("all server processes terminated; reinitializing").count() as u64;
        if crashes != caused {
            self.failures
                .push(format!("the server restarted itself {crashes} times, {caused} of them on purpose"));
        }
    }

    /// Calls fail by what faults do, and no kind of them always.
    fn look_at_calls(&mut self) {
        let tally = self.world.tally();
        let mut wanted = Vec::new();
        if self.plan.length >= WANTED_FROM {
            for (kinds, most_frequent) in
                [(&senders::KINDS[..], "send_batch"), (&consumers::KINDS[..], "read_waiting")]
            {
                let are_all = tally.tried(most_frequent) >= WANTED_TRIED_MIN;
                let is_tried = |kind| tally.calls.get(kind).is_some_and(|calls| calls.tried >= TRIED_MIN);
                wanted.extend(kinds.iter().filter(|kind| are_all || is_tried(kind)));
            }
        }
        self.failures.extend(tally.failures(&wanted));
    }
}

fn by_weight(faults: &[Box<dyn Fault>], rng: &mut Rng) -> usize {
    let mut left = rng.below(faults.iter().map(|fault| fault.weight()).sum());
    for (at, fault) in faults.iter().enumerate() {
        match left.checked_sub(fault.weight()) {
            Some(rest) => left = rest,
            None => return at,
        }
    }
    0
}

fn rows(client: &mut Client) -> Result<u64> {
    let mut all = 0;
    for queue in QUEUES {
        let sql = format!("SELECT count(*) FROM queue.{queue}");
        all += client.query_one(&sql, &[])?.try_get::<_, i64>(0)? as u64;
    }
    Ok(all)
}

/// Looks how many messages there are, when there was no worker, and how far the wall clock moves.
fn watch(world: &World, looks: &AtomicBool) {
    let mut last_us = world.now_us();
    let mut is_away = false;
    let mut client = None;
    while looks.load(SeqCst) {
        let seen = look(world, &mut client);
        if seen.is_none() {
            client = None;
        }
        if let Some((backlog, _)) = seen {
            world.counters.backlog.store(backlog, Relaxed);
        }
        world.look_at_wall_clock();
        let has_worker = seen.is_some_and(|(_, has_worker)| has_worker);
        let now_us = world.now_us();
        if has_worker {
            if is_away || now_us > last_us + UNSEEN_US {
                world.befell(Blow::WorkerAway, last_us);
            }
            last_us = now_us;
        }
        is_away = !has_worker;
        std::thread::sleep(LOOK_EVERY);
    }
    if is_away {
        world.befell(Blow::WorkerAway, last_us);
    }
}

fn look(world: &World, client: &mut Option<Client>) -> Option<(u64, bool)> {
    const WORKER: &str = "SELECT FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' \
        AND datname = current_database()";
    if client.is_none() {
        *client = world.admin().ok();
    }
    let client = client.as_mut()?;
    let backlog = rows(client).ok()?;
    let has_worker = !client.query(WORKER, &[]).ok()?.is_empty();
    Some((backlog, has_worker))
}
