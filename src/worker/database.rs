//! A database's worker: does what is due, then sleeps until the next thing is. Its duties, each a `tick` over one
//! queue: leases and delays that end, loading ahead of the readers, scanning for what is due soon, moving away
//! what had its last delivery or has expired ([`super::expiry`]), writing leases ([`super::leases`]), telling those
//! who listen ([`super::notify`]); and, for the database, archives, schedules, and what
//! prepared transactions sent.
//!
//! It is in nobody's way: each piece of work is a transaction of its own, no row or table lock is waited for, and
//! it ends when somebody needs the database for himself. An error in one piece is logged and the others go on.
//!
//! Reads do not depend on it, except that a message which had its last delivery stays until it is moved.

use crate::pg::call::Value;
use crate::pg::shmem::Request;
use crate::pg::table::{self, AccessShareLock, RowExclusiveLock, Snapshot, Table};
use crate::pg::{clock, latch, shmem, spi, user, worker};
use crate::queue::{column, dead_letter, journal, load, resolve, retry};
use crate::settings;
use crate::worker::delay::{Delay, FAILED_US};
use crate::worker::schedules::Schedules;
use crate::worker::{avoid, expiry, leases, notify, survey, TURN_US};
use pgrx::pg_sys;
use queue_dispatch::{QueueRef, Taken, Tick, NEVER_US, NIL};
use std::cell::Cell;
use std::collections::HashMap;

/// Messages moved away per transaction.
const MOVE_MAX: usize = 100;
/// Attempts of one turn that fail before there is a pause: each is a line in the server's log.
const FAILED_MAX: usize = MOVE_MAX;
/// The pause after a turn in which messages had to be left, in microseconds: at first and at most, for it doubles from
/// turn to turn. Left because another transaction is at them, or a trigger keeps them:
const LEFT_PAUSE_US: (i64, i64) = (50_000, 1_000_000);
/// Left because moving them failed:
const FAILED_PAUSE_US: (i64, i64) = (1_000_000, 60_000_000);
/// Work that met a lock is tried again after this long, microseconds.
const POSTPONE_US: i64 = 50_000;

/// A turn through the exhausted messages of a queue, in the order of their ids, a transaction at a time. What cannot
/// be moved is passed by, so that it does not keep what is behind it, and is tried again in the next turn, after a
/// pause.
struct Turn {
    /// Where to go on.
    from: i64,
    /// Nothing is tried before this.
    until_us: i64,
    /// How long the last pause was.
    pause_us: i64,
    /// Some had to be left.
    has_left: bool,
    /// So many attempts have failed since the last pause.
    failed: usize,
    /// Below this id messages are moved one by one: moving them together has failed, and one that cannot be moved (its
    /// dead-letter table has a constraint, say) must not keep the others.
    single_below: i64,
}

impl Turn {
    const NEW: Turn =
        Turn { from: i64::MIN, until_us: 0, pause_us: 0, has_left: false, failed: 0, single_below: i64::MIN };
}

/// By table.
type Turns = HashMap<u32, Turn>;

/// A queue that could not be looked at, since its table is locked, is looked at again after this long, microseconds.
pub const LOOK_AGAIN_US: i64 = 1_000_000;
/// How often prepared transactions are looked after while there are any, microseconds.
const PREPARED_US: i64 = 1_000_000;

/// Before a longer sleep than this, milliseconds, what has been done shows in the statistics.
const REPORTED_MS: i64 = 1_000;

/// The worker's main function; its argument is the database's oid.
pub fn main(database: u32) {
    worker::begin(database);
    crate::wait_point!("worker-begin");
    match serves_extension() {
        Some(true) => {}
        Some(false) => {
            tell_end(database, false);
            worker::end();
        }
        // Not known: the launcher tries again after a while.
        None => worker::end(),
    }
    end_if_disabled(database);
    let enabled = survey::enabled_at_start();
    worker::at_exit(|| {
        avoid::worker_ends();
        let (database, me) = (user::database(), latch::my_proc());
        let _ = shmem::with_arena(|arena, _, fx| {
            if arena.worker_proc(database) == me {
                arena.worker_end(database, fx);
            }
        });
        super::wake_launcher(); // which is not told of a worker that another one started
    });
    let me = latch::my_proc();
    // One that a launcher started and did not live to see may be here already: it is woken and gives way.
    let placed = shmem::with_arena(|arena, _, fx| {
        arena.worker_wake(database, fx);
        arena.worker_set(database, me)
    });
    if !matches!(placed, Ok(true)) {
        tell_end(database, true);
        worker::end();
    }
    // From here on it is told; what was set since its start it was not.
    if survey::enabled_setting() != enabled {
        worker::end(); // the next one begins with it
    }
    let wait_event = latch::wait_event(c"QueueWorker");
    let mut rounds = Rounds::default();
    let mut archives = expiry::Archives::default();
    let mut survey = survey::Survey::default();
    let (mut prepared_us, mut look_us) = (0, NEVER_US);
    let mut schedules = Schedules::new();
    let mut is_first = true;
    loop {
        if worker::reload_config() {
            end_if_disabled(database);
        }
        // Of two for a moment the one that is replaced ends, and takes no call from the other.
        let is_called = shmem::with_arena(|arena, _, _| {
            (arena.worker_proc(database) == me).then(|| arena.worker_round(database))
        });
        let Some(is_called) = is_called.unwrap_or(Some(true)) else { worker::end() };
        let is_called = is_called | std::mem::take(&mut is_first);
        if is_called {
            end_if_unwanted(database);
            if survey::enabled_setting() != enabled {
                prepared(); // it may have been called for that, too, and be the last
                worker::end();
            }
        }
        if is_called || look_us <= clock::now().mono_us {
            let again_us = survey.attach_queues(database);
            look_us = match archives.look() {
                true => again_us,
                false => again_us.min(clock::now().mono_us + LOOK_AGAIN_US),
            };
            rounds.forget_gone(database);
        }
        if is_called || prepared_us <= clock::now().mono_us {
            prepared_us = prepared();
        }
        schedules.look_at_clock();
        if is_called || schedules.due_us() <= clock::now().mono_us {
            schedules.fire();
        }
        let next_us = prepared_us.min(look_us).min(schedules.due_us()).min(archives.trim());
        let sleep_ms = rounds.round(database, next_us);
        if !(0..=REPORTED_MS).contains(&sleep_ms) {
            worker::report_statistics(true);
        }
        if !worker::is_reload_pending() {
            latch::sleep(sleep_ms, wait_event);
        }
    }
}

/// Ends this worker where there is to be none. The launcher tries again when settings change.
fn end_if_disabled(database: u32) {
    if !settings::is_worker_enabled() {
        tell_end(database, false);
        worker::end();
    }
}

/// Ends this worker if somebody needs the database for himself, or it has become one that gets no worker (a template,
/// say), or there is nothing to serve in it any more.
fn end_if_unwanted(database: u32) {
    let is_listed =
        || worker::transaction("looking for databases", || Ok(worker::databases().contains(&database)));
    if super::is_kept_away(database) || is_listed() == Some(false) {
        worker::end();
    }
    // If that cannot be told now, it is as it was.
    if serves_extension() == Some(false) {
        worker::transaction("forgetting queues", || {
            worker::forget_catalogs();
            super::forget_queues_gone(database);
            Ok(())
        });
        tell_end(database, false);
        worker::end();
    }
}

/// `None`: it could not be looked up.
fn serves_extension() -> Option<bool> {
    worker::transaction("looking for the extension", || {
        worker::forget_catalogs();
        Ok(worker::has_extension(c"pg_queue"))
    })
}

/// Tells the launcher that there is nothing to serve here, or no place for this worker.
fn tell_end(database: u32, has_no_place: bool) {
    let _ = shmem::with_server(|server, now| {
        let free = server.requests.iter_mut().find(|r| r.database == 0 || r.until_us <= now.mono_us);
        if let Some(request) = free {
            let until_us = now.mono_us + 10_000_000;
            *request = Request { database, keep_away: false, has_no_place, until_us };
        }
    });
}

/// What the worker remembers from one round over the queues to the next.
#[derive(Default)]
struct Rounds {
    /// The record of the first queue that the last round had no time for.
    place: u32,
    turns: Turns,
    /// Queues that could not be loaded.
    failing: HashMap<u32, Delay>,
    /// New ones that could not be looked at.
    unseen: HashMap<u32, Delay>,
    expiring: expiry::Expiring,
    sweeps: leases::Sweeps,
}

impl Rounds {
    /// Forgets queues that the dispatcher does not know any more.
    fn forget_gone(&mut self, database: u32) {
        let is_here = |relation: &u32| {
            shmem::with_arena(|arena, _, _| arena.queue_find(database, *relation).is_some()).unwrap_or(true)
        };
        self.turns.retain(|relation, _| is_here(relation));
        self.failing.retain(|relation, _| is_here(relation));
        self.unseen.retain(|relation, _| is_here(relation));
        self.expiring.retain(is_here);
        self.sweeps.retain(is_here);
    }

    /// One round; `next_us`: when something else is due. Returns how long nothing is due, in milliseconds, -1 for ever.
    ///
    /// It passes by every queue: what becomes ready, and what readers and listeners wait for, is seen to in each round.
    /// What takes long is done for a turn in all, or until the worker is called for the database's sake; the next round
    /// begins with the queue for which there was no time.
    fn round(&mut self, database: u32, next_us: i64) -> i64 {
        let mut next_us = next_us;
        let mut to_flush: Vec<(QueueRef, u32)> = Vec::new();
        let mut to_notify: Vec<(QueueRef, u32)> = Vec::new();
        let (mut worked_us, mut left_at) = (0, None);
        let start = std::mem::take(&mut self.place);
        let (mut from, mut has_wrapped) = (start, start == 0);
        loop {
            if from == NIL || has_wrapped && start > 0 && from >= start {
                if has_wrapped {
                    break;
                }
                (from, has_wrapped) = (0, true);
            }
            let Ok((tick, next, is_called)) = shmem::with_arena(|arena, now, fx| {
                let (tick, next) = arena.tick(database, from, now, fx);
                (tick, next, arena.worker_is_called(database))
            }) else {
                break;
            };
            let here = std::mem::replace(&mut from, next);
            if let Some(tick) = tick {
                next_us = next_us.min(tick.next_us);
                if let Some(delay) = self.unseen.get(&tick.relation) {
                    next_us = next_us.min(delay.until_us);
                }
                if tick.flush {
                    to_flush.push((tick.queue, tick.relation));
                }
                if tick.notify {
                    to_notify.push((tick.queue, tick.relation));
                }
                let is_over = left_at.is_some() || worked_us > 0 && (is_called || worked_us > TURN_US);
                if is_over && self.is_asked(&tick) {
                    left_at.get_or_insert(here);
                    if tick.is_new {
                        let _ = shmem::with_arena(|arena, _, _| arena.queue_look_again(tick.queue));
                    }
                } else if self.is_asked(&tick) {
                    let begun_us = clock::now().mono_us;
                    next_us = next_us.min(self.work(database, &tick));
                    worked_us += (clock::now().mono_us - begun_us).max(1);
                } else {
                    self.turns.remove(&tick.relation);
                }
            }
            pgrx::check_for_interrupts!();
        }
        if !to_flush.is_empty() {
            leases::flush(database, &to_flush);
        }
        if !to_notify.is_empty() {
            notify::notify(&to_notify);
        }
        if let Some(place) = left_at {
            self.place = place;
            return 0; // still awake
        }
        let now_us = clock::now().mono_us;
        let until_us =
            shmem::with_arena(|arena, _, _| arena.worker_sleep(database, next_us)).unwrap_or(NEVER_US);
        match until_us {
            NEVER_US => -1,
            until_us => until_us.saturating_sub(now_us).clamp(0, 3_600_000_000).div_euclid(1_000) + 1,
        }
    }

    /// Whether a queue asks for what may take long.
    fn is_asked(&self, tick: &Tick) -> bool {
        tick.load
            || tick.scan
            || tick.exhausted > 0
            || tick.expire
            || tick.sweep
            || tick.is_new
            || self.is_unseen_due(tick.relation)
            || self.sweeps.is_under_way(tick.relation)
    }

    /// Does that. Returns when the queue must be looked at again.
    fn work(&mut self, database: u32, tick: &Tick) -> i64 {
        let mut next_us = serve(database, tick, &mut self.turns, &mut self.failing);
        if tick.expire {
            self.expiring.expire(database, tick);
        }
        if tick.sweep || tick.is_new || self.sweeps.is_under_way(tick.relation) {
            next_us = next_us.min(self.sweeps.sweep(database, tick));
        }
        if tick.is_new || self.is_unseen_due(tick.relation) {
            next_us = next_us.min(self.look_after_new(database, tick));
        }
        next_us
    }

    /// Whether it is time to look again at a new queue.
    fn is_unseen_due(&self, relation: u32) -> bool {
        self.unseen.get(&relation).is_some_and(|delay| delay.until_us <= clock::now().mono_us)
    }

    /// Looks after a queue that is new, or whose rows came from elsewhere. Returns when to look again.
    fn look_after_new(&mut self, database: u32, tick: &Tick) -> i64 {
        let delay = match [raise_identity(database, tick), enable_triggers(database, tick)] {
            [Some(true), Some(true)] => {
                self.unseen.remove(&tick.relation);
                return NEVER_US;
            }
            // It failed (and the log says why): perhaps it will not the next time.
            [None, _] | [_, None] => {
                self.unseen.get(&tick.relation).copied().unwrap_or_default().longer(&FAILED_US)
            }
            // Somebody holds a lock on it, the one who made it perhaps.
            _ => Delay::default().longer(&(LOOK_AGAIN_US..=LOOK_AGAIN_US)),
        };
        self.unseen.insert(tick.relation, delay);
        delay.until_us
    }
}

/// What one queue asks for. Returns when it must be looked at again.
fn serve(database: u32, tick: &Tick, turns: &mut Turns, failing: &mut HashMap<u32, Delay>) -> i64 {
    let mut next_us = NEVER_US;
    let delay = failing.get(&tick.relation).copied().unwrap_or_default();
    if (tick.load || tick.scan) && delay.until_us > clock::now().mono_us {
        next_us = delay.until_us;
        if tick.load {
            let _ = shmem::with_arena(|arena, _, _| arena.load_again(tick.queue, next_us));
        }
    } else if tick.load || tick.scan {
        let done = worker::transaction("loading messages", || {
            let queue = match open(database, tick, AccessShareLock)? {
                Opened::Yes(queue) => queue,
                Opened::Gone => return Ok(true),
                Opened::Locked => return Ok(false),
            };
            if tick.scan {
                load::scan(&queue)?;
            }
            if tick.load {
                let until_us = clock::now().mono_us + load::TURN_US;
                if load::walk(&queue, until_us)? == load::Loaded::Unfinished {
                    queue.with(|arena, at, _, fx| arena.load_ask(at, fx))?; // after the others' turns
                }
            }
            Ok(true)
        });
        failing.remove(&tick.relation);
        if done != Some(true) {
            next_us = clock::now().mono_us + POSTPONE_US;
            if done.is_none() {
                let delay = delay.longer(&FAILED_US);
                failing.insert(tick.relation, delay);
                next_us = delay.until_us;
            }
            if tick.load {
                let _ = shmem::with_arena(|arena, _, _| arena.load_again(tick.queue, next_us));
            }
        }
    }
    if tick.exhausted == 0 {
        turns.remove(&tick.relation);
        return next_us;
    }
    next_us.min(move_away(database, tick, turns))
}

/// Goes on with the turn through a queue's exhausted messages. Returns when to go on.
fn move_away(database: u32, tick: &Tick, turns: &mut Turns) -> i64 {
    let turn = turns.entry(tick.relation).or_insert(Turn::NEW);
    if turn.until_us > clock::now().mono_us {
        return turn.until_us;
    }
    let most = if turn.from < turn.single_below { 1 } else { MOVE_MAX };
    let begun_us = clock::now().mono_us;
    let (left, next) = attempt(database, tick, turn.from, most);
    let now_us = clock::now().mono_us;
    if left.is_none() {
        // One that took long counts for many: the others have waited for it.
        turn.failed += 1 + ((now_us - begun_us) / TURN_US).max(0) as usize;
        if most > 1 {
            turn.single_below = next.unwrap_or(i64::MAX);
            return now_us;
        }
    }
    turn.has_left |= left.is_some_and(|left| left > 0);
    turn.from = next.unwrap_or(i64::MIN);
    if next.is_some() && turn.failed < FAILED_MAX {
        return now_us;
    }
    let (shortest_us, longest_us) = match (turn.failed, turn.has_left) {
        (0, false) => {
            turns.remove(&tick.relation);
            return now_us; // there may be new ones
        }
        (0, true) => LEFT_PAUSE_US,
        _ => FAILED_PAUSE_US,
    };
    let pause_us = (2 * turn.pause_us).clamp(shortest_us, longest_us);
    let until_us = now_us + pause_us;
    *turn = match next {
        None => Turn { until_us, pause_us, ..Turn::NEW },
        Some(from) => Turn { from, until_us, pause_us, failed: 0, ..*turn },
    };
    until_us
}

/// Moves up to `most` exhausted messages, from id `from` on. Returns how many had to be left (`None`: it failed), and
/// the id behind all of them; `None`: these were the last, or it did not get that far.
fn attempt(database: u32, tick: &Tick, from: i64, most: usize) -> (Option<usize>, Option<i64>) {
    let reached = Cell::new(None);
    let left = worker::transaction("moving exhausted messages", || {
        let queue = match open(database, tick, RowExclusiveLock)? {
            Opened::Yes(queue) if dead_letter::try_lock_target(&queue) => queue,
            Opened::Gone => return Ok(0),
            Opened::Yes(_) | Opened::Locked => return Ok(1),
        };
        let mut taken = [Taken::default(); MOVE_MAX];
        journal::reserve(MOVE_MAX)?;
        let me = latch::my_proc();
        let ((count, next), at) =
            queue.with(|arena, at, _, fx| (arena.exhausted_pin(at, from, me, &mut taken[..most], fx), at))?;
        for one in &taken[..count] {
            journal::pinned(at, one.msg_id);
        }
        reached.set(next);
        crate::wait_point!("move-pinned");
        let until_us = clock::now().mono_us + TURN_US;
        let (left, rest) = retry::bury_exhausted(&queue, at, &taken[..count], until_us)?;
        if rest.is_some() {
            reached.set(rest);
        }
        Ok(left)
    });
    (left, reached.get())
}

/// What came of opening a queue.
pub enum Opened {
    /// Here it is, locked.
    Yes(std::rc::Rc<resolve::Queue>),
    /// It is not there any more, and is forgotten.
    Gone,
    /// Somebody holds a lock that we would have to wait for.
    Locked,
}

/// Locks a table of the catalog without waiting. Who changes the extension may want a queue's table next, which we
/// have locked.
pub fn try_lock_catalog(name: &str, mode: u32) -> bool {
    let catalog = user::schema(c"queue_catalog").and_then(|schema| user::relation(schema, name));
    catalog.is_some_and(|catalog| table::try_lock(catalog, mode))
}

/// Opens the tick's queue without waiting for its lock; forgets it if its table is gone.
pub fn open(database: u32, tick: &Tick, mode: u32) -> crate::Result<Opened> {
    let is_locked = avoid::may_begin(tick.relation) && table::try_lock(tick.relation, mode);
    if !is_locked || !try_lock_catalog("queue", AccessShareLock) {
        return Ok(Opened::Locked);
    }
    // Moved to another schema it is a queue no more, whatever has its name now.
    let is_here = user::relation_schema(tick.relation) == user::schema(c"queue");
    let queue = match user::relation_name(tick.relation).filter(|_| is_here) {
        Some(name) => resolve::open(&name, mode),
        None => Err(crate::Error::QueueUnknown { queue: String::new() }),
    };
    match queue {
        Ok(queue) if queue.relation == tick.relation => Ok(Opened::Yes(queue)),
        Ok(_) | Err(crate::Error::BeingRestored { .. }) => Ok(Opened::Locked), // or renamed a moment ago
        Err(crate::Error::QueueUnknown { .. }) => {
            super::forget_queue(database, tick.relation);
            Ok(Opened::Gone)
        }
        Err(error) => Err(error),
    }
}

/// Rows that came with ids of their own (a restore, a replica, plain INSERT) leave the identity behind: then the
/// next send would collide with one of them. Raised past the highest id of queue and archive, if it is behind.
/// False: not now; `None`: it failed.
fn raise_identity(database: u32, tick: &Tick) -> Option<bool> {
    const BEHIND: &str = "SELECT s.oid FROM \
        (SELECT pg_catalog.pg_get_serial_sequence($1, 'msg_id')::pg_catalog.regclass::pg_catalog.oid) AS s (oid) \
        WHERE $2 OPERATOR(pg_catalog.>) COALESCE(pg_catalog.pg_sequence_last_value(s.oid), 0)";
    worker::transaction("looking after message ids", || {
        let queue = match open(database, tick, AccessShareLock)? {
            Opened::Yes(queue) => queue,
            Opened::Gone => return Ok(true),
            Opened::Locked => return Ok(false),
        };
        if !table::try_lock(queue.archive, AccessShareLock) {
            return Ok(false);
        }
        let look = || {
            let highest = highest_id(queue.relation).max(highest_id(queue.archive))?;
            let table = queue.table_name();
            let outcome = spi::run(
                BEHIND,
                &[pg_sys::TEXTOID.into(), pg_sys::INT8OID.into()],
                &[Value::of(table.as_str()), Value::of(highest)],
            );
            outcome.rows.first().and_then(|row| Some((highest, row[0].get::<pg_sys::Oid>()?)))
        };
        let Some((_, sequence)) = look() else { return Ok(true) };
        // nextval takes a weaker lock that conflicts with this one: nobody draws an id between look and set.
        if !table::try_lock(sequence.into(), pg_sys::ShareRowExclusiveLock) {
            return Ok(false); // somebody is sending
        }
        if let Some((highest, sequence)) = look() {
            spi::run(
                "SELECT pg_catalog.setval($1::pg_catalog.regclass, $2)",
                &[pg_sys::OIDOID.into(), pg_sys::INT8OID.into()],
                &[Value::of(sequence), Value::of(highest)],
            );
        }
        Ok(true)
    })
}

/// Ids beyond this do not raise an identity: whoever may INSERT could else use up all there are with one row.
const RAISED_MAX: i64 = i64::MAX / 2;

/// The highest id (that counts) in a queue's table or an archive, by its index; `None`: it has none, or its owner has
/// taken the index away. No statement: planning one runs functions of the owner's, with the rights of whoever plans.
fn highest_id(relation: u32) -> Option<i64> {
    let table = Table::open(relation, None)?;
    let index = user::acting_as(user::owner(relation), || {
        table::index_on(&table, column::MSG_ID as i16, pg_sys::INT8OID)
    });
    let snapshot = Snapshot::latest();
    let highest = index.and_then(|index| table.highest(index, column::MSG_ID, RAISED_MAX, &snapshot));
    snapshot.done();
    table.close(None, true);
    highest
}

/// A restore with --disable-triggers leaves ours enabled like ordinary ones, which do not fire for logical
/// replication: they are to fire always. Those that somebody has disabled stay so. False: not now; `None`: it failed.
fn enable_triggers(database: u32, tick: &Tick) -> Option<bool> {
    worker::transaction("looking after triggers", || {
        let queue = match open(database, tick, AccessShareLock)? {
            Opened::Yes(queue) => queue,
            Opened::Gone => return Ok(true),
            Opened::Locked => return Ok(false),
        };
        let ours = spi::run(
            "SELECT tgname::pg_catalog.text FROM pg_catalog.pg_trigger WHERE tgrelid OPERATOR(pg_catalog.=) $1 \
             AND tgname OPERATOR(pg_catalog.=) ANY ('{pg_queue_change,pg_queue_truncate}'::pg_catalog.name[]) \
             AND tgenabled OPERATOR(pg_catalog.=) ANY ('{O,R}'::pg_catalog.\"char\"[])",
            &[pg_sys::OIDOID.into()],
            &[Value::of(pg_sys::Oid::from(tick.relation))],
        );
        if ours.rows.is_empty() || !table::try_lock(tick.relation, pg_sys::ShareRowExclusiveLock) {
            return Ok(ours.rows.is_empty());
        }
        for name in ours.rows.iter().filter_map(|row| row[0].text()) {
            let table = queue.table_name();
            let enable = format!("ALTER TABLE {table} ENABLE ALWAYS TRIGGER {}", spi::quoted(&name));
            user::acting_as(user::owner(queue.relation), || spi::run(&enable, &[], &[]));
        }
        Ok(true)
    })
}

/// What prepared transactions that have been committed meanwhile sent: their rows name the queue and the lowest
/// id. Returns when to look again.
fn prepared() -> i64 {
    let found = worker::transaction("looking after prepared transactions", || {
        if !try_lock_catalog("prepared", RowExclusiveLock) {
            return Ok(true);
        }
        // First the look, then the rows: a transaction that the look no longer shows is visible by then
        // (FinishPreparedTransaction in twophase.c).
        let open = spi::look(
            "SELECT FROM pg_catalog.pg_prepared_xacts WHERE database OPERATOR(pg_catalog.=) \
             pg_catalog.current_database() LIMIT 1",
            &[],
            &[],
        );
        let outcome =
            spi::run("DELETE FROM queue_catalog.prepared RETURNING queue::pg_catalog.oid, msg_id", &[], &[]);
        for row in &outcome.rows {
            if let (Some(relation), Some(msg_id)) = (row[0].get::<pg_sys::Oid>(), row[1].i64()) {
                journal::mark_from(relation.into(), msg_id)?;
                // They may have come by logical replication: the identity knows nothing of them.
                journal::replicated(relation.into())?;
            }
        }
        Ok(open.processed > 0)
    });
    match found {
        Some(false) => NEVER_US,
        _ => clock::now().mono_us + PREPARED_US,
    }
}
