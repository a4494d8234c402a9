//! What is past its time: messages that expired go to their dead-letter queue, or away if there is none; archived
//! messages are trimmed. Both in small transactions that wait for nobody.
//!
//! What cannot be moved (somebody holds it, or its dead-letter table refuses it) waits and keeps no other, and what fails
//! waits longer each time.
//!
//! When the next message of a queue expires is the dispatcher's knowledge, told by whoever commits one. Archives have
//! no place there: their times are kept here ([`Archives`]). Whatever is archived from now on is trimmed no earlier
//! than a retention from now, so the oldest row, or the retention itself, says when to look again.

use crate::pg::call::Value;
use crate::pg::table::{self, AccessShareLock, Deleted, RowExclusiveLock, Snapshot, Table};
use crate::pg::{clock, shmem, spi, user, worker};
use crate::queue::resolve::{self, Queue};
use crate::queue::{column, dead_letter, finish, retry};
use crate::settings::{DAY_US, SECOND_US};
use crate::worker::database::{open, try_lock_catalog, Opened};
use crate::worker::delay::{Delay, FAILED_US};
use crate::worker::{avoid, TURN_US};
use pgrx::pg_sys;
use queue_dispatch::{Now, Tick, CHUNK_MAX, NEVER_US};
use std::cell::Cell;
use std::collections::HashMap;

/// Most messages that one transaction moves, the earliest first.
const MOVE_MAX: usize = 4 * CHUNK_MAX;
/// Most messages of a queue that wait to be tried again and are passed by. If so many are leased, say, at a time, those
/// behind them are moved later; they are delivered to nobody meanwhile.
const WAITING_MAX: usize = 4 * MOVE_MAX;
/// Attempts that fail before there is a pause for the whole queue: each is a line in the server's log.
const FAILED_MAX: usize = 100;
/// Most archived messages that one transaction deletes.
const TRIM_MAX: usize = 1_000;
/// What somebody else holds is looked at again after this long, microseconds.
const AGAIN_US: i64 = SECOND_US;

/// What the worker remembers of queues in which it could not do all: by table.
#[derive(Default)]
pub struct Expiring(HashMap<u32, Left>);

/// Of one queue.
struct Left {
    /// Expired messages that could not be moved.
    messages: HashMap<i64, Delay>,
    /// So many are moved together. One, after a failure, which undoes the whole transaction; then more and more again.
    most: usize,
    /// So many attempts have failed.
    failed: usize,
    /// After too many of them nothing is tried for a while.
    pause: Delay,
    /// When the earliest of those expired that were seen and are there still, wall clock: the walk begins there, not with
    /// all the dead entries of its index before.
    from_us: i64,
}

/// What a transaction did.
struct Done {
    /// The messages that it passed by or could not move.
    left: HashMap<i64, Delay>,
    /// When the next one expires, wall clock; `None`: there are more that have expired.
    next_us: Option<i64>,
    /// When the earliest expired that it has seen and not moved, wall clock.
    from_us: i64,
}

impl Expiring {
    /// Forgets those of other tables.
    pub fn retain(&mut self, is_here: impl Fn(&u32) -> bool) {
        self.0.retain(|relation, _| is_here(relation));
    }

    /// Expires messages of a queue. When the next one is due is told to the dispatcher.
    pub fn expire(&mut self, database: u32, tick: &Tick) {
        let known_us = shmem::with_arena(|arena, _, _| arena.expiry_begin(tick.queue)).unwrap_or(i64::MIN);
        let left = self.0.entry(tick.relation).or_insert_with(Left::nothing);
        left.from_us = left.from_us.min(known_us);
        let next_us = left.expire(database, tick);
        if left.is_nothing() {
            self.0.remove(&tick.relation);
        }
        let _ = shmem::with_arena(|arena, now, fx| arena.expires_at(tick.queue, next_us, now, fx));
    }
}

/// A time of the clock that never jumps, on the wall clock.
fn wall_us(now: Now, mono_us: i64) -> i64 {
    now.wall_us.saturating_add(mono_us.saturating_sub(now.mono_us))
}

impl Left {
    fn nothing() -> Left {
        Left { messages: HashMap::new(), most: MOVE_MAX, failed: 0, pause: Delay::default(), from_us: NEVER_US }
    }

    fn is_nothing(&self) -> bool {
        self.messages.is_empty()
            && self.most == MOVE_MAX
            && self.failed == 0
            && self.pause.pause_us == 0
            && self.from_us == NEVER_US
    }

    /// Returns when to go on, wall clock.
    fn expire(&mut self, database: u32, tick: &Tick) -> i64 {
        let begun = clock::now();
        if self.pause.until_us > begun.mono_us {
            return wall_us(begun, self.pause.until_us);
        }
        let at = Cell::new(None);
        let done = worker::transaction("expiring messages", || match open(database, tick, RowExclusiveLock)? {
            Opened::Yes(queue) if dead_letter::try_lock_target(&queue) => {
                self.expire_some(&queue, &at).map(Some)
            }
            Opened::Gone => Ok(Some(Done { left: HashMap::new(), next_us: Some(NEVER_US), from_us: NEVER_US })),
            Opened::Yes(_) | Opened::Locked => Ok(None),
        });
        let now = clock::now();
        match done {
            Some(Some(done)) => self.done(done, now),
            Some(None) => now.wall_us + AGAIN_US,
            None => self.failed_at(at.get(), begun, now),
        }
    }

    fn done(&mut self, done: Done, now: Now) -> i64 {
        self.most = (2 * self.most).min(MOVE_MAX);
        self.from_us = done.from_us;
        let Some(next_us) = done.next_us else {
            self.messages.extend(done.left);
            return now.wall_us;
        };
        self.messages = done.left; // what is not among them any more is gone
        if self.messages.values().all(|delay| delay.pause_us == 0) {
            (self.failed, self.pause) = (0, Delay::default());
        }
        let again_us = self.messages.values().map(|delay| delay.until_us).min();
        next_us.min(again_us.map_or(NEVER_US, |mono_us| wall_us(now, mono_us)))
    }

    /// `at`: the message that it failed at, if that is known.
    fn failed_at(&mut self, at: Option<i64>, begun: Now, now: Now) -> i64 {
        // One that took long counts for many: the others have waited for it.
        self.failed += 1 + ((now.mono_us - begun.mono_us) / TURN_US).max(0) as usize;
        if let Some(msg_id) = at {
            let delay = self.messages.entry(msg_id).or_default();
            *delay = delay.longer(&FAILED_US);
        }
        if self.failed >= FAILED_MAX || at.is_none() && self.most == 1 {
            self.failed = 0;
            self.pause = self.pause.longer(&FAILED_US);
        }
        self.most = 1;
        wall_us(now, self.pause.until_us.max(now.mono_us))
    }

    /// `at` is where it is, for whom it fails.
    fn expire_some(&self, queue: &Queue, at: &Cell<Option<i64>>) -> crate::Result<Done> {
        let mut done = Done { left: HashMap::new(), next_us: Some(NEVER_US), from_us: NEVER_US };
        let Some(table) = Table::open(queue.relation, None) else { return Ok(done) };
        let snapshot = Snapshot::latest();
        let now = clock::now();
        let mut walk = table.walk_times(queue.expiry, self.from_us.saturating_sub(1), NEVER_US - 1, &snapshot);
        // What is to be moved, and when that expired.
        let (mut ids, mut times) = (Vec::new(), HashMap::new());
        while let Some(record) = walk.next() {
            let (Some(msg_id), Some(at_us)) =
                (record.value(column::MSG_ID).i64(), record.value(column::EXPIRES_AT).time_us())
            else {
                continue;
            };
            if at_us > now.wall_us {
                done.next_us = Some(at_us);
                break;
            }
            if let Some(delay) = self.messages.get(&msg_id).filter(|delay| delay.until_us > now.mono_us) {
                done.left.insert(msg_id, *delay);
                done.from_us = done.from_us.min(at_us);
                if done.left.len() == WAITING_MAX {
                    break;
                }
                continue;
            }
            if ids.len() == self.most {
                done.next_us = None;
                done.from_us = done.from_us.min(at_us);
                break;
            }
            ids.push(msg_id);
            times.insert(msg_id, at_us);
        }
        walk.end();
        let until_us = clock::now().mono_us + TURN_US;
        let again = Delay { until_us: now.mono_us + AGAIN_US, pause_us: 0 };
        let mut tried = 0;
        for chunk in ids.chunks(CHUNK_MAX) {
            let buried = bury_expired(queue, &table, chunk, &snapshot, until_us, at)?;
            tried += buried.tried;
            let left_us = buried.left.iter().filter_map(|msg_id| times.get(msg_id).copied()).min();
            done.from_us = done.from_us.min(left_us.unwrap_or(NEVER_US));
            done.left.extend(buried.left.into_iter().map(|msg_id| (msg_id, again)));
            if buried.tried < chunk.len() {
                break;
            }
            pgrx::check_for_interrupts!();
        }
        table.close(None, true);
        snapshot.done();
        if tried < ids.len() {
            done.next_us = None;
            // They are in the order of their times.
            done.from_us =
                done.from_us.min(ids.get(tried).and_then(|id| times.get(id).copied()).unwrap_or(i64::MIN));
        }
        if tried > 1 {
            at.set(None); // should the commit fail, it is not known for which
        }
        Ok(done)
    }
}

/// What came of burying messages: so many of them, from the first on, were tried before the time was over; some of those
/// had to be left.
struct Buried {
    tried: usize,
    left: Vec<i64>,
}

/// Moves away those of these messages that nobody holds, until `until_us`, one at least. What is leased may still be
/// finished in time, and what another transaction is at is its concern.
fn bury_expired(
    queue: &Queue,
    table: &Table,
    ids: &[i64],
    snapshot: &Snapshot,
    until_us: i64,
    at: &Cell<Option<i64>>,
) -> crate::Result<Buried> {
    let unfenced: Vec<_> = ids.iter().map(|msg_id| (*msg_id, None)).collect();
    let (place, held) = finish::pin(queue, &unfenced, true)?;
    let mut held = held.into_iter().peekable();
    let mut buried = Buried { tried: 0, left: Vec::new() };
    for msg_id in ids {
        buried.tried += 1;
        let Some(one) = held.next_if(|one| one.msg_id == *msg_id) else {
            buried.left.push(*msg_id);
            continue;
        };
        at.set(Some(*msg_id));
        if !bury_one(queue, table, &one, snapshot)? {
            finish::unpin(place, *msg_id)?;
            buried.left.push(*msg_id);
        }
        if clock::now().mono_us > until_us {
            break;
        }
    }
    for one in held {
        finish::unpin(place, one.msg_id)?;
    }
    Ok(buried)
}

/// Moves one away that is pinned. False: it has to be left.
fn bury_one(queue: &Queue, table: &Table, one: &finish::Held, snapshot: &Snapshot) -> crate::Result<bool> {
    // It may have been changed since it was found: whether it has expired is asked of what is deleted.
    let found = finish::pinned_record(queue, table, one, snapshot);
    let is_expired =
        |r: &table::Record| crate::queue::expires_us(r).is_some_and(|at| at <= clock::now().wall_us);
    let Some(record) = found.filter(is_expired) else { return Ok(false) };
    match retry::delete_at_once(queue, table, &record, one.msg_id, snapshot) {
        Deleted::Ok => {
            if queue.settings.dead_letter_queue.is_some() {
                let copied = dead_letter::copy(&record, finish::deliveries(one, &record));
                dead_letter::bury(queue, copied, "expired", None)?;
            }
            Ok(true)
        }
        Deleted::Gone => Ok(true),
        Deleted::Moved | Deleted::Busy | Deleted::Kept => Ok(false),
    }
}

/// A queue whose archive is trimmed.
struct Archive {
    queue: u32,
    archive: u32,
    retention_us: i64,
    /// When to look at it, wall clock.
    next_us: i64,
    /// Of one that could not be trimmed the last time.
    delay: Delay,
}

/// The archives that are trimmed, as the settings of their queues were when the worker last looked.
#[derive(Default)]
pub struct Archives(Vec<Archive>);

impl Archives {
    /// Reads the settings anew. False: it could not.
    pub fn look(&mut self) -> bool {
        let found = worker::transaction("looking at archives", || {
            if !try_lock_catalog("queue", AccessShareLock) {
                return Ok(None);
            }
            let outcome = spi::look(
                "SELECT queue::pg_catalog.oid, archive::pg_catalog.oid, archive_retention FROM queue_catalog.queue \
                 WHERE archive_retention OPERATOR(pg_catalog.>) '0'::pg_catalog.interval",
                &[],
                &[],
            );
            Ok(Some(outcome.rows.iter().filter_map(|row| archive_of(row)).collect::<Vec<_>>()))
        });
        let Some(mut found) = found.flatten() else { return false };
        // Those that failed wait on, whatever the worker is called for.
        for failed in self.0.drain(..).filter(|known| known.delay.pause_us > 0) {
            if let Some(archive) = found.iter_mut().find(|archive| archive.archive == failed.archive) {
                (archive.next_us, archive.delay) = (failed.next_us, failed.delay);
            }
        }
        self.0 = found;
        true
    }

    /// Trims what is due, a turn of it. Returns when to come again, on the clock that never jumps.
    pub fn trim(&mut self) -> i64 {
        let now = clock::now();
        self.0.sort_by_key(|archive| archive.next_us); // first what the last turn was not enough for
        for archive in self.0.iter_mut().take_while(|archive| archive.next_us <= now.wall_us) {
            if clock::now().mono_us - now.mono_us > TURN_US {
                break;
            }
            let next_us = worker::transaction("trimming archives", || Ok(trim(archive, now.wall_us)));
            archive.delay = match next_us {
                Some(_) => Delay::default(),
                None => archive.delay.longer(&FAILED_US),
            };
            archive.next_us = next_us.unwrap_or_else(|| wall_us(clock::now(), archive.delay.until_us));
        }
        self.0.iter().map(|archive| now.mono_of(archive.next_us)).min().unwrap_or(NEVER_US)
    }
}

fn archive_of(row: &[Value]) -> Option<Archive> {
    // None that queue_alter makes: written by hand, or restored. How long a month is, is not said; nothing goes.
    let (months, days, us) = row[2].interval()?;
    let retention_us = i64::from(days) * DAY_US + us;
    if months != 0 || retention_us <= 0 {
        return None;
    }
    Some(Archive {
        queue: row[0].get::<pg_sys::Oid>()?.into(),
        archive: row[1].get::<pg_sys::Oid>()?.into(),
        retention_us,
        next_us: i64::MIN,
        delay: Delay::default(),
    })
}

/// Deletes the oldest rows that are past their time, as the queue's owner. Returns when to come again, wall clock.
fn trim(archive: &Archive, now_us: i64) -> i64 {
    let Archive { queue, archive, retention_us, .. } = *archive;
    if !avoid::may_begin(archive) || !table::try_lock(archive, RowExclusiveLock) {
        return now_us + AGAIN_US;
    }
    let Some(name) = resolve::archive_name(archive).filter(|_| user::relation_name(queue).is_some()) else {
        return NEVER_US; // it is gone, or an archive no more
    };
    let name = format!("queue_archive.{}", spi::quoted(&name));
    let delete = format!(
        "DELETE FROM ONLY {name} WHERE ctid OPERATOR(pg_catalog.=) ANY (ARRAY(SELECT ctid FROM ONLY {name} \
         WHERE archived_at OPERATOR(pg_catalog.<=) $1 ORDER BY archived_at LIMIT {TRIM_MAX} \
         FOR UPDATE SKIP LOCKED))"
    );
    let oldest = format!("SELECT archived_at FROM ONLY {name} ORDER BY archived_at LIMIT 1");
    let before = Value::of_time_us(now_us.saturating_sub(retention_us));
    let (deleted, oldest) = user::acting_as(user::owner(archive), || {
        let deleted = spi::run(&delete, &[pg_sys::TIMESTAMPTZOID.into()], &[before]).processed;
        let oldest = spi::run(&oldest, &[], &[]);
        (deleted, oldest.rows.first().and_then(|row| row[0].time_us()))
    });
    if deleted as usize == TRIM_MAX {
        return now_us;
    }
    let next_us = oldest.unwrap_or(now_us).saturating_add(retention_us);
    next_us.max(now_us + AGAIN_US)
}
