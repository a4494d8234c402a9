//! A database's worker: does what is due, then sleeps until the next thing is. Its duties, each a `tick` over one
//! queue: leases and delays that end, loading ahead of the readers, scanning for what is due soon, moving away
//! what had its last delivery; and, for the database, what prepared transactions sent.
//!
//! It is in nobody's way: each piece of work is a transaction of its own, no row or table lock is waited for, and
//! it ends when somebody needs the database for himself. An error in one piece is logged and the others go on.
//!
//! Reads do not depend on it, except that a message which had its last delivery stays until it is moved.

use crate::pg::call::Value;
use crate::pg::shmem::Request;
use crate::pg::table::{self, AccessShareLock, RowExclusiveLock};
use crate::pg::{clock, latch, shmem, spi, user, worker};
use crate::queue::{finish, journal, load, resolve, retry};
use pgrx::pg_sys;
use queue_dispatch::{Taken, Tick, NEVER_US, NIL};
use std::collections::HashMap;

/// Messages moved away per transaction.
const MOVE_MAX: usize = 100;
/// Messages that could not be moved, because another transaction is at them, are tried again after this long;
/// where it failed, after twice as long each time, up to the second.
const POSTPONE_US: i64 = 50_000;
const POSTPONE_MAX_US: i64 = 60_000_000;

/// What the owner's triggers and constraints wait for is not ours to choose: it gives up before anybody's
/// deadlock_timeout.
const MOVE_LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '500 ms'";

/// A queue whose exhausted messages could not be moved.
#[derive(Clone, Copy)]
struct Delay {
    /// Nothing is tried before this.
    until_us: i64,
    /// How long the last pause was.
    pause_us: i64,
    /// After a failure each message is moved by itself, so that one that cannot be (its dead-letter table has a
    /// constraint, say) does not keep the others; so many have failed in this turn.
    failed: Option<usize>,
}

/// By table.
type Postponed = HashMap<u32, Delay>;

/// A new queue whose table is locked is looked at again after this long, microseconds.
const LOOK_AGAIN_US: i64 = 1_000_000;
/// How often prepared transactions are looked after while there are any, microseconds.
const PREPARED_US: i64 = 1_000_000;

/// The worker's main function; its argument is the database's oid.
pub fn main(database: u32) {
    worker::begin(database);
    match serves_extension() {
        Some(true) => {}
        Some(false) => {
            tell_idle(database);
            worker::end();
        }
        // Not known: the launcher tries again after a while.
        None => worker::end(),
    }
    worker::at_exit(|| {
        let (database, me) = (user::database(), latch::my_proc());
        let _ = shmem::with_arena(|arena, _, _| {
            if arena.worker_proc(database) == me {
                arena.worker_set(database, NIL);
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
        pgrx::log!("pg_queue: no place for another database; raise pg_queue.max_databases");
        tell_idle(database);
        worker::end();
    }
    let wait_event = latch::wait_event(c"QueueWorker");
    let mut postponed = Postponed::new();
    let mut prepared_us = 0;
    loop {
        worker::reload_config();
        let is_called = shmem::with_arena(|arena, _, _| arena.worker_round(database)).unwrap_or(true);
        if is_called {
            end_if_unwanted(database);
        }
        if is_called || prepared_us <= clock::now().mono_us {
            prepared_us = prepared();
        }
        latch::sleep(round(database, prepared_us, &mut postponed), wait_event);
    }
}

/// Ends this worker if another has its place, or somebody needs the database for himself, or it has become one that
/// gets no worker (a template, say), or there is nothing to serve in it any more.
fn end_if_unwanted(database: u32) {
    let me = latch::my_proc();
    let is_replaced =
        matches!(shmem::with_arena(|arena, _, _| arena.worker_proc(database)), Ok(proc) if proc != me);
    let is_listed =
        || worker::transaction("looking for databases", || Ok(worker::databases().contains(&database)));
    if is_replaced || super::is_kept_away(database) || is_listed() == Some(false) {
        worker::end();
    }
    // If that cannot be told now, it is as it was.
    if serves_extension() == Some(false) {
        super::forget_database(database);
        tell_idle(database);
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

/// Tells the launcher that there is nothing to serve here.
fn tell_idle(database: u32) {
    let _ = shmem::with_server(|server, now| {
        let free = server.requests.iter_mut().find(|r| r.database == 0 || r.until_us <= now.mono_us);
        if let Some(request) = free {
            *request = Request { database, keep_away: false, until_us: now.mono_us + 10_000_000 };
        }
    });
}

/// One round over the queues. Returns how long nothing is due, in milliseconds, -1 for ever.
fn round(database: u32, prepared_us: i64, postponed: &mut Postponed) -> i64 {
    let mut next_us = prepared_us;
    let mut from = 0;
    while from != NIL {
        let Ok((tick, next)) = shmem::with_arena(|arena, now, fx| arena.tick(database, from, now, fx)) else {
            break;
        };
        from = next;
        if let Some(tick) = tick {
            next_us = next_us.min(tick.next_us);
            if tick.load || tick.scan || tick.exhausted > 0 {
                next_us = next_us.min(serve(database, &tick, postponed));
            }
            if tick.is_new && !(raise_identity(database, &tick) & enable_triggers(database, &tick)) {
                // Somebody holds a lock on it, the one who made it perhaps: later.
                let _ = shmem::with_arena(|arena, _, _| arena.queue_look_again(tick.queue));
                next_us = next_us.min(clock::now().mono_us + LOOK_AGAIN_US);
            }
        }
        pgrx::check_for_interrupts!();
    }
    let now_us = clock::now().mono_us;
    let until_us = shmem::with_arena(|arena, _, _| arena.worker_sleep(database, next_us)).unwrap_or(NEVER_US);
    match until_us {
        NEVER_US => -1,
        until_us => until_us.saturating_sub(now_us).clamp(0, 3_600_000_000).div_euclid(1_000) + 1,
    }
}

/// What one queue asks for. Returns when it must be looked at again.
fn serve(database: u32, tick: &Tick, postponed: &mut Postponed) -> i64 {
    let later_us = || clock::now().mono_us + POSTPONE_US;
    let mut next_us = NEVER_US;
    if tick.load || tick.scan {
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
                load::walk(&queue)?;
            }
            Ok(true)
        });
        if done != Some(true) {
            next_us = later_us();
        }
    }
    if tick.exhausted == 0 {
        postponed.remove(&tick.relation);
        return next_us;
    }
    next_us.min(move_away(database, tick, postponed))
}

/// What came of an attempt to move exhausted messages.
enum Moved {
    All,
    /// Some are another transaction's concern, or a trigger keeps them.
    NotAll,
    /// Each of those that failed has been tried.
    TurnOver,
}

/// Moves exhausted messages of a queue. Returns when to go on.
fn move_away(database: u32, tick: &Tick, postponed: &mut Postponed) -> i64 {
    let before = postponed.get(&tick.relation).copied();
    if let Some(delay) = before.filter(|delay| delay.until_us > clock::now().mono_us) {
        return delay.until_us;
    }
    let failed = before.and_then(|delay| delay.failed);
    let moved = worker::transaction("moving exhausted messages", || {
        let queue = match open(database, tick, RowExclusiveLock)? {
            Opened::Yes(queue) => queue,
            Opened::Gone => return Ok(Moved::All),
            Opened::Locked => return Ok(Moved::NotAll),
        };
        let targets = [Some(queue.archive), queue.settings.dead_letter_queue];
        if !targets.into_iter().flatten().all(|target| table::try_lock(target, RowExclusiveLock)) {
            return Ok(Moved::NotAll);
        }
        spi::run(MOVE_LOCK_TIMEOUT, &[], &[]);
        let mut taken = [Taken::default(); MOVE_MAX];
        journal::reserve(MOVE_MAX)?;
        let me = latch::my_proc();
        let (count, at) = queue.with(|arena, at, _, fx| (arena.exhausted_pin(at, me, &mut taken, fx), at))?;
        for one in &taken[..count] {
            journal::pinned(at, one.msg_id);
        }
        crate::wait_point!("move-pinned");
        let mine = match failed {
            None => &taken[..count],
            Some(failed) => {
                let mine = failed.min(count)..(failed + 1).min(count);
                for (i, one) in taken[..count].iter().enumerate() {
                    if !mine.contains(&i) {
                        finish::unpin(at, one.msg_id)?;
                    }
                }
                &taken[mine]
            }
        };
        if mine.is_empty() && count > 0 {
            return Ok(Moved::TurnOver);
        }
        let moved = retry::bury_exhausted(&queue, at, mine)?;
        Ok(if moved == mine.len() { Moved::All } else { Moved::NotAll })
    });
    let now_us = clock::now().mono_us;
    let last_us = before.map_or(0, |delay| delay.pause_us);
    let grown_us = (last_us * 2).clamp(20 * POSTPONE_US, POSTPONE_MAX_US);
    let (pause_us, keep_us, failed) = match (moved, failed) {
        (Some(Moved::All), None) => {
            postponed.remove(&tick.relation);
            return now_us; // there may be more
        }
        (Some(Moved::All), Some(failed)) => (0, last_us, Some(failed)),
        (Some(Moved::NotAll), None) => (POSTPONE_US, last_us, None),
        (Some(Moved::TurnOver), _) => (grown_us, grown_us, Some(0)),
        (Some(Moved::NotAll) | None, failed) => (0, last_us, Some(failed.map_or(0, |failed| failed + 1))),
    };
    postponed.insert(tick.relation, Delay { until_us: now_us + pause_us, pause_us: keep_us, failed });
    now_us + pause_us
}

enum Opened {
    Yes(std::rc::Rc<resolve::Queue>),
    /// It is not there any more, and is forgotten.
    Gone,
    /// Somebody holds a lock that we would have to wait for.
    Locked,
}

/// Locks a table of the catalog without waiting. Who changes the extension may want a queue's table next, which we
/// have locked.
fn try_lock_catalog(name: &str, mode: u32) -> bool {
    let catalog = user::schema(c"queue_catalog").and_then(|schema| user::relation(schema, name));
    catalog.is_some_and(|catalog| table::try_lock(catalog, mode))
}

/// Opens the tick's queue without waiting for its lock; forgets it if its table is gone.
fn open(database: u32, tick: &Tick, mode: u32) -> crate::Result<Opened> {
    if !table::try_lock(tick.relation, mode) || !try_lock_catalog("queue", AccessShareLock) {
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
        Ok(_) => Ok(Opened::Locked), // renamed a moment ago
        Err(crate::Error::QueueUnknown { .. }) => {
            let most = queue_dispatch::CHUNK_MAX;
            while matches!(
                shmem::with_arena(|arena, _, fx| arena.queue_detach(database, tick.relation, most, fx)),
                Ok(false)
            ) {}
            Ok(Opened::Gone)
        }
        Err(error) => Err(error),
    }
}

/// Rows that came with ids of their own (a restore, a replica, plain INSERT) leave the identity behind: then the
/// next send would collide with one of them. Raised past the highest id of queue and archive, if it is behind.
fn raise_identity(database: u32, tick: &Tick) -> bool {
    const BEHIND: &str = "SELECT h.id, s.oid FROM \
        (SELECT pg_catalog.pg_get_serial_sequence($1, 'msg_id')::pg_catalog.regclass::pg_catalog.oid) AS s (oid), \
        (SELECT GREATEST((SELECT pg_catalog.max(msg_id) FROM ONLY {queue}), \
                         (SELECT pg_catalog.max(msg_id) FROM ONLY {archive}))) AS h (id) \
        WHERE h.id OPERATOR(pg_catalog.>) COALESCE(pg_catalog.pg_sequence_last_value(s.oid), 0)";
    worker::transaction("looking after message ids", || {
        let queue = match open(database, tick, AccessShareLock)? {
            Opened::Yes(queue) => queue,
            Opened::Gone => return Ok(true),
            Opened::Locked => return Ok(false),
        };
        if !table::try_lock(queue.archive, AccessShareLock) {
            return Ok(false);
        }
        let Some(archive) = resolve::archive_name(queue.archive) else { return Ok(true) };
        let archive = format!("queue_archive.{}", spi::quoted(&archive));
        let behind = BEHIND.replace("{queue}", &queue.table_name()).replace("{archive}", &archive);
        let look = || {
            let table = queue.table_name();
            let outcome = spi::run(&behind, &[pg_sys::TEXTOID.into()], &[Value::of(table.as_str())]);
            outcome.rows.first().and_then(|row| Some((row[0].i64()?, row[1].get::<pg_sys::Oid>()?)))
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
    }) != Some(false)
}

/// A restore with --disable-triggers leaves ours enabled like ordinary ones, which do not fire for logical
/// replication: they are to fire always. Those that somebody has disabled stay so.
fn enable_triggers(database: u32, tick: &Tick) -> bool {
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
            spi::run(&format!("ALTER TABLE {table} ENABLE ALWAYS TRIGGER {}", spi::quoted(&name)), &[], &[]);
        }
        Ok(true)
    }) != Some(false)
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
            }
        }
        Ok(open.processed > 0)
    });
    match found {
        Some(false) => NEVER_US,
        _ => clock::now().mono_us + PREPARED_US,
    }
}
