//! The world of a round: the server that clients find, who of them has a call open right now, what befell the server.
//! Faults change it, clients live in it.
//!
//! Owns the clock, the way to the server, and the seats. Judges nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use postgres::types::Type;
use postgres::{Client, Config, NoTls, SimpleQueryMessage};

use super::history::{Blow, BlowAt, History, Log, Us};
use super::tally::Tally;
use crate::cluster::Cluster;

/// The database that all is about.
pub const DATABASE: &str = "torture";
/// How soon a client that found no server knocks again.
const KNOCK_EVERY: Duration = Duration::from_millis(3);

/// A client's place: what it does right now, for those who want to strike while it does.
#[derive(Debug)]
pub struct Seat {
    pub name: String,
    /// A consumer's may be stopped past its lease.
    pub is_consumer: bool,
    /// Of its backend, 0 for none.
    pid: AtomicI32,
    /// The call that is open, and since when.
    call: Mutex<Option<(&'static str, Us)>>,
    /// Acts on leases that were refused, and transactions that are over.
    refused: AtomicU64,
    ended: AtomicU64,
}

/// A call that a client had open when it was looked at.
#[derive(Clone, Debug)]
pub struct Open {
    pub client: String,
    pub is_consumer: bool,
    pub pid: i32,
    pub call: &'static str,
    pub since_us: Us,
    pub seat: Arc<Seat>,
}

impl Seat {
    pub fn opens(&self, call: &'static str, now_us: Us) {
        *lock(&self.call) = Some((call, now_us));
    }

    pub fn closes(&self) {
        *lock(&self.call) = None;
    }

    /// So many acts were refused, in the transaction that is open.
    pub fn refuses(&self, acts: u64) {
        self.refused.fetch_add(acts, SeqCst);
    }

    pub fn ends(&self) {
        self.ended.fetch_add(1, SeqCst);
    }

    /// How many transactions are over, and how many acts were refused in these at least.
    pub fn ended_and_refused(&self) -> (u64, u64) {
        let ended = self.ended.load(SeqCst);
        (ended, self.refused.load(SeqCst))
    }
}

/// What was done so far, for pacing and for the report; the history is what is judged by.
#[derive(Debug, Default)]
pub struct Counters {
    pub acknowledged: AtomicU64,
    pub delivered: AtomicU64,
    /// Finishes, retries and the like that committed, for whatever answer.
    pub acts: AtomicU64,
    pub calls: AtomicU64,
    /// Calls that a timeout or a cancel ended.
    pub cut_off: AtomicU64,
    /// Pops that may have committed what nobody heard of.
    pub pops_unknown: AtomicU64,
    pub reconnects: AtomicU64,
    /// Messages in the tables, when somebody last looked.
    pub backlog: AtomicU64,
    /// How often a fault made the postmaster restart everything.
    pub crashes_caused: AtomicU64,
}

pub struct World {
    begun: Instant,
    /// How far the wall clock was ahead of the round's own, at least and at most, microseconds.
    wall_ahead_us: Mutex<Option<(i64, i64)>>,
    cluster: Mutex<Arc<Cluster>>,
    /// Clients go here instead, if it is given (a pooler).
    detour: Mutex<Option<Config>>,
    is_over: AtomicBool,
    /// The dispatcher does not hold all the messages that there may be.
    is_room_scarce: AtomicBool,
    /// The statement_timeout and lock_timeout that clients are to set, milliseconds; 0 for none.
    patience_ms: AtomicU32,
    seats: Mutex<Vec<Arc<Seat>>>,
    clients: AtomicU32,
    /// What those that were given up had logged by then, and how often a fault had made each restart everything.
    old_logs: Mutex<Vec<(String, u64)>>,
    /// Sessions that ended in the midst of a call: when that began, and when its client heard of it.
    lost_sessions: Mutex<Vec<(Us, Us)>>,
    blows: Mutex<Vec<BlowAt>>,
    handed_in: Mutex<History>,
    tally: Mutex<Tally>,
    parameter_types: Mutex<BTreeMap<&'static str, Vec<Type>>>,
    pub counters: Counters,
}

impl World {
    pub fn new(cluster: Cluster) -> Self {
        Self {
            begun: Instant::now(),
            wall_ahead_us: Mutex::default(),
            cluster: Mutex::new(Arc::new(cluster)),
            detour: Mutex::new(None),
            is_over: AtomicBool::new(false),
            is_room_scarce: AtomicBool::new(false),
            patience_ms: AtomicU32::new(0),
            seats: Mutex::default(),
            clients: AtomicU32::new(0),
            old_logs: Mutex::default(),
            lost_sessions: Mutex::default(),
            blows: Mutex::default(),
            handed_in: Mutex::default(),
            tally: Mutex::default(),
            parameter_types: Mutex::default(),
            counters: Counters::default(),
        }
    }

    pub fn now_us(&self) -> Us {
        self.begun.elapsed().as_micros() as Us
    }

    /// Looks how far the wall clock is ahead of the round's own.
    pub fn look_at_wall_clock(&self) {
        const LOOK_MAX: Duration = Duration::from_millis(1);
        let (before, wall, after) = (Instant::now(), SystemTime::now(), Instant::now());
        let Ok(wall) = wall.duration_since(UNIX_EPOCH) else { return };
        // Whoever stood still between the two would take that for a step of the clock.
        if after.duration_since(before) <= LOOK_MAX {
            let ahead_us = wall.as_micros() as i64 - self.us_at(before) as i64;
            let mut seen = lock(&self.wall_ahead_us);
            let (least, most) = seen.unwrap_or((ahead_us, ahead_us));
            *seen = Some((least.min(ahead_us), most.max(ahead_us)));
        }
    }

    /// How far the wall clock moved against the round's own, as far as was seen.
    pub fn wall_clock_moved_us(&self) -> Us {
        lock(&self.wall_ahead_us).map_or(0, |(least, most)| least.abs_diff(most))
    }

    pub fn us_at(&self, at: Instant) -> Us {
        at.saturating_duration_since(self.begun).as_micros() as Us
    }

    /// The server that clients are to use at present.
    pub fn cluster(&self) -> Arc<Cluster> {
        Arc::clone(&lock(&self.cluster))
    }

    /// From now on clients go to another server, which takes connections. `from_us`: before the first was struck;
    /// `kept_until_us`: see [`Blow::Failover`]. Returns the old one, which must not take connections any more.
    pub fn fail_over(&self, to: Arc<Cluster>, kept_until_us: Option<Us>, from_us: Us) -> Arc<Cluster> {
        let old = std::mem::replace(&mut *lock(&self.cluster), to);
        let caused = self.counters.crashes_caused.swap(0, SeqCst); // the new one's log knows of none
        lock(&self.old_logs).push((old.log(), caused));
        self.befell(Blow::Failover { kept_until_us }, from_us);
        old
    }

    /// The log of each server, and how often a fault made it restart everything.
    pub fn logs(&self) -> Vec<(String, u64)> {
        let mut logs = lock(&self.old_logs).clone();
        logs.push((self.cluster().log(), self.counters.crashes_caused.load(SeqCst)));
        logs
    }

    /// From now on clients connect there (None: to the server itself). Sessions that are open stay.
    pub fn set_detour(&self, to: Option<Config>) {
        *lock(&self.detour) = to;
    }

    /// The server, or its worker, was struck at `from_us` and has come back by now.
    pub fn befell(&self, blow: Blow, from_us: Us) {
        let to_us = self.now_us();
        lock(&self.blows).push(BlowAt { blow, from_us, to_us });
    }

    /// From now on a read may give less than there is.
    pub fn make_room_scarce(&self) {
        self.is_room_scarce.store(true, SeqCst);
    }

    pub fn is_room_scarce(&self) -> bool {
        self.is_room_scarce.load(SeqCst)
    }

    /// From the next call on no call of a client may take longer; 0: as long as it likes.
    pub fn set_patience_ms(&self, ms: u32) {
        self.patience_ms.store(ms, SeqCst);
    }

    pub fn patience_ms(&self) -> u32 {
        self.patience_ms.load(SeqCst)
    }

    /// Clients are to end.
    pub fn end(&self) {
        self.is_over.store(true, SeqCst);
    }

    /// The clients have ended; those who clear up may begin.
    pub fn reopen(&self) {
        self.set_patience_ms(0);
        self.is_over.store(false, SeqCst);
    }

    pub fn is_over(&self) -> bool {
        self.is_over.load(SeqCst)
    }

    /// A place for one more client, and a log under a number of its own.
    pub fn seat(&self, name: &str, is_consumer: bool) -> (Arc<Seat>, Log) {
        let number = self.clients.fetch_add(1, SeqCst);
        let name = format!("{name}-{number}");
        let seat = Arc::new(Seat {
            name,
            is_consumer,
            pid: AtomicI32::new(0),
            call: Mutex::new(None),
            refused: AtomicU64::new(0),
            ended: AtomicU64::new(0),
        });
        lock(&self.seats).push(Arc::clone(&seat));
        (seat, Log::new(number))
    }

    /// A client that is done hands in what it saw.
    pub fn hand_in(&self, log: Log) {
        lock(&self.handed_in).append(log.into_history());
    }

    /// What came of a client's calls.
    pub fn note_tally(&self, tally: Tally) {
        lock(&self.tally).append(tally);
    }

    pub fn tally(&self) -> Tally {
        lock(&self.tally).clone()
    }

    /// All that was handed in, and what befell the server.
    pub fn history(&self) -> History {
        let mut history = std::mem::take(&mut *lock(&self.handed_in));
        history.blows.clone_from(&lock(&self.blows));
        history
    }

    /// A session for a client, as soon as there is a server; None: the round is over first.
    pub fn connect(&self, seat: &Seat) -> Option<Client> {
        seat.pid.store(0, SeqCst);
        while !self.is_over() {
            if let Ok(client) = self.knock(seat) {
                self.counters.reconnects.fetch_add(1, SeqCst);
                return Some(client);
            }
            std::thread::sleep(KNOCK_EVERY);
        }
        None
    }

    fn knock(&self, seat: &Seat) -> Result<Client, postgres::Error> {
        let detour = lock(&self.detour).clone();
        let mut config = detour.unwrap_or_else(|| self.cluster().config(DATABASE));
        let mut client = config.application_name(&seat.name).connect(NoTls)?;
        // In one message: a pooler gives each statement to another session.
        let rows = client.simple_query("SELECT pg_backend_pid()")?;
        let pid = rows.iter().find_map(|row| match row {
            SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
            _ => None,
        });
        seat.pid.store(pid.unwrap_or(0), SeqCst);
        Ok(client)
    }

    /// Where clients come through a pooler that knows no prepared statements: the types of a statement's parameters,
    /// asked of the server itself as soon as there is one. Fails when the round is over first.
    pub fn parameter_types(&self, sql: &'static str) -> Result<Option<Vec<Type>>> {
        if lock(&self.detour).is_none() {
            return Ok(None);
        }
        if let Some(types) = lock(&self.parameter_types).get(sql) {
            return Ok(Some(types.clone()));
        }
        let prepared = loop {
            match self.admin().and_then(|mut client| Ok(client.prepare(sql)?)) {
                Err(_) if !self.is_over() => std::thread::sleep(KNOCK_EVERY),
                other => break other?,
            }
        };
        let types = prepared.params().to_vec();
        lock(&self.parameter_types).insert(sql, types.clone());
        Ok(Some(types))
    }

    /// A session for a fault, or whoever looks, straight to the server.
    pub fn admin(&self) -> Result<Client> {
        self.cluster().connect(DATABASE)
    }

    /// How many clients have a session.
    pub fn connected(&self) -> usize {
        lock(&self.seats).iter().filter(|seat| seat.pid.load(SeqCst) != 0).count()
    }

    /// Whether that call is still open.
    pub fn is_open(&self, open: &Open) -> bool {
        *lock(&open.seat.call) == Some((open.call, open.since_us)) && open.seat.pid.load(SeqCst) == open.pid
    }

    /// A session ended in the midst of a call that began then.
    pub fn lost_session(&self, began_us: Us) {
        lock(&self.lost_sessions).push((began_us, self.now_us()));
    }

    /// How many sessions ended since `from_us` in the midst of a call that was open at `struck_us`.
    pub fn cut_off(&self, from_us: Us, struck_us: Us) -> u64 {
        let lost = lock(&self.lost_sessions);
        lost.iter().filter(|(began_us, ended_us)| *began_us < struck_us && *ended_us >= from_us).count() as u64
    }

    /// The calls that are open right now.
    pub fn open_calls(&self) -> Vec<Open> {
        let seats = lock(&self.seats);
        let open = seats.iter().filter_map(|seat| {
            let (call, since_us) = (*lock(&seat.call))?;
            let pid = seat.pid.load(SeqCst);
            let (client, seat) = (seat.name.clone(), Arc::clone(seat));
            Some(Open { client, is_consumer: seat.is_consumer, pid, call, since_us, seat })
        });
        open.filter(|open| open.pid != 0).collect()
    }
}

/// A poisoned lock only says that another thread failed, which is told elsewhere.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
