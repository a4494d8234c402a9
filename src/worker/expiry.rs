//! What is past its time: messages that expired go to their dead-letter queue, or away if there is none; archived
//! messages are trimmed. Both in small transactions that wait for nobody.
//!
//! When the next message of a queue expires is the dispatcher's knowledge, told by whoever commits one. Archives have
//! no place there: their times are kept here ([`Archives`]). Whatever is archived from now on is trimmed no earlier
//! than a retention from now, so the oldest row, or the retention itself, says when to look again.

use crate::pg::call::Value;
use crate::pg::table::{self, Deleted, RowExclusiveLock, Snapshot, Table};
use crate::pg::{clock, shmem, spi, user, worker};
use crate::queue::resolve::{self, Queue};
use crate::queue::{column, dead_letter, finish, retry};
use crate::settings::{DAY_US, SECOND_US};
use crate::worker::avoid;
use crate::worker::database::{open, Opened};
use pgrx::pg_sys;
use queue_dispatch::{Tick, CHUNK_MAX, NEVER_US};

/// Most messages that one transaction looks at, the earliest first. If so many are leased at a time, those behind them
/// are deleted when leases end; they are delivered to nobody meanwhile.
const LOOK_MAX: usize = 4 * CHUNK_MAX;
/// Most archived messages that one transaction deletes.
const TRIM_MAX: usize = 1_000;
/// What somebody else holds, or what failed, is looked at again after this long, microseconds.
const AGAIN_US: i64 = SECOND_US;

/// Expires messages of a queue. When the next one is due is told to the dispatcher.
pub fn expire(database: u32, tick: &Tick) {
    let _ = shmem::with_arena(|arena, _, _| arena.expiry_begin(tick.queue));
    let next_us = worker::transaction("expiring messages", || {
        let again = Ok(clock::now().wall_us + AGAIN_US);
        match open(database, tick, RowExclusiveLock)? {
            Opened::Yes(queue) if dead_letter::try_lock_target(&queue) => expire_some(&queue),
            Opened::Gone => Ok(NEVER_US),
            Opened::Yes(_) | Opened::Locked => again,
        }
    });
    let next_us = next_us.unwrap_or_else(|| clock::now().wall_us + AGAIN_US);
    let _ = shmem::with_arena(|arena, now, fx| arena.expires_at(tick.queue, next_us, now, fx));
}

/// Returns when to go on, wall clock.
fn expire_some(queue: &Queue) -> crate::Result<i64> {
    let Some(table) = Table::open(queue.relation, None) else { return Ok(NEVER_US) };
    let snapshot = Snapshot::latest();
    let now_us = clock::now().wall_us;
    let mut walk = table.walk_times(queue.expiry, i64::MIN, NEVER_US - 1, &snapshot);
    let mut next_us = NEVER_US;
    let mut ids = Vec::with_capacity(LOOK_MAX);
    while let Some(record) = walk.next() {
        let (Some(msg_id), Some(at_us)) =
            (record.value(column::MSG_ID).i64(), record.value(column::EXPIRES_AT).time_us())
        else {
            continue;
        };
        if at_us > now_us {
            next_us = at_us;
            break;
        }
        if ids.len() == LOOK_MAX {
            next_us = now_us; // there is more
            break;
        }
        ids.push((msg_id, None));
    }
    walk.end();
    let mut expired = 0;
    for chunk in ids.chunks(CHUNK_MAX) {
        expired += bury_expired(queue, &table, chunk, &snapshot)?;
        pgrx::check_for_interrupts!();
    }
    table.close(None, true);
    snapshot.done();
    // What is leased may still be finished in time, and what another transaction is at is its concern.
    Ok(if expired < ids.len() { now_us + AGAIN_US } else { next_us })
}

/// Moves away those of these messages that nobody holds; returns how many.
fn bury_expired(
    queue: &Queue,
    table: &Table,
    ids: &[(i64, Option<i64>)],
    snapshot: &Snapshot,
) -> crate::Result<usize> {
    let (at, held) = finish::pin(queue, ids, true)?;
    let mut expired = 0;
    for one in held {
        // It may have been changed since it was found: whether it has expired is asked of what is deleted.
        let found = finish::pinned_record(queue, table, &one, snapshot);
        let is_expired =
            |r: &table::Record| crate::queue::expires_us(r).is_some_and(|at| at <= clock::now().wall_us);
        let Some(record) = found.filter(is_expired) else {
            finish::unpin(at, one.msg_id)?;
            continue;
        };
        match retry::delete_at_once(queue, table, &record, one.msg_id, snapshot) {
            Deleted::Ok => {
                expired += 1;
                if queue.settings.dead_letter_queue.is_some() {
                    let copied = dead_letter::copy(&record, finish::deliveries(&one, &record));
                    dead_letter::bury(queue, copied, "expired", None)?;
                }
            }
            Deleted::Gone => {}
            Deleted::Moved | Deleted::Busy | Deleted::Kept => finish::unpin(at, one.msg_id)?,
        }
    }
    Ok(expired)
}

/// A queue whose archive is trimmed.
struct Archive {
    queue: u32,
    archive: u32,
    retention_us: i64,
    /// When to look at it, wall clock.
    next_us: i64,
}

/// The archives that are trimmed, as the settings of their queues were when the worker last looked.
#[derive(Default)]
pub struct Archives(Vec<Archive>);

impl Archives {
    /// Reads the settings anew.
    pub fn look(&mut self) {
        let found = worker::transaction("looking at archives", || {
            let outcome = spi::look(
                "SELECT queue::pg_catalog.oid, archive::pg_catalog.oid, archive_retention FROM queue_catalog.queue \
                 WHERE archive_retention OPERATOR(pg_catalog.>) '0'::pg_catalog.interval",
                &[],
                &[],
            );
            Ok(outcome.rows.iter().filter_map(|row| archive_of(row)).collect::<Vec<_>>())
        });
        if let Some(found) = found {
            self.0 = found;
        }
    }

    /// Trims what is due. Returns when to come again, on the clock that never jumps.
    pub fn trim(&mut self) -> i64 {
        let now = clock::now();
        for archive in self.0.iter_mut().filter(|archive| archive.next_us <= now.wall_us) {
            archive.next_us = worker::transaction("trimming archives", || Ok(trim(archive, now.wall_us)))
                .unwrap_or(now.wall_us + AGAIN_US);
        }
        self.0.iter().map(|archive| now.mono_of(archive.next_us)).min().unwrap_or(NEVER_US)
    }
}

fn archive_of(row: &[Value]) -> Option<Archive> {
    let (_, days, us) = row[2].interval()?;
    Some(Archive {
        queue: row[0].get::<pg_sys::Oid>()?.into(),
        archive: row[1].get::<pg_sys::Oid>()?.into(),
        retention_us: i64::from(days) * DAY_US + us,
        next_us: i64::MIN,
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
