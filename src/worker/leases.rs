//! Leases that last are written to `queue_catalog.lease`, in batches, so that a crash, a restart or a failover loses
//! neither fence nor count; rows that are not needed any more are swept together. The only writer of that table, but for
//! whoever truncates a queue, who deletes its rows. What a row means, and which leases need one, is told in the
//! dispatcher's `lease`.
//!
//! The order: the dispatcher says which leases are old enough; then Postgres is asked whether the transaction that
//! took each one still runs; then they are written; after the commit the dispatcher is told. A lease that ends
//! meanwhile leaves a stale row, which does no harm.

use crate::pg::call::Value;
use crate::pg::table::{AccessShareLock, RowExclusiveLock, Snapshot, Table};
use crate::pg::{clock, latch, shmem, spi, user, worker};
use crate::queue::resolve::Queue;
use crate::queue::{lease, row_of};
use crate::settings;
use crate::worker::database::{open, try_lock_catalog, Opened, LOOK_AGAIN_US};
use crate::worker::TURN_US;
use pgrx::pg_sys;
use queue_dispatch::{LeaseRow, LeaseWalk, Now, QueueRef, RowFate, Tick, Written, CHUNK_MAX, NEVER_US};
use std::collections::hash_map::{Entry, HashMap};

/// Most leases that one transaction writes.
const WRITE_MAX: usize = 1_000;
/// Rows that are swept at a time.
const SWEEP_MAX: usize = 1_000;
/// What failed is tried again after this long, microseconds.
const AGAIN_US: i64 = 1_000_000;

/// A lease to be written.
struct Due {
    at: QueueRef,
    relation: u32,
    row: LeaseRow,
    /// The transaction that took it still runs.
    is_open: bool,
}

/// Writes what is old enough of these queues' leases, all together: whoever waits for it waits for one commit.
pub fn flush(database: u32, queues: &[(QueueRef, u32)]) {
    let interval_us = settings::lease_flush_us();
    let mut batch = Vec::new();
    for (at, relation) in queues {
        let _ = shmem::with_arena(|arena, _, _| arena.flush_begin(*at));
        let mut walk = LeaseWalk::START;
        loop {
            let mut rows = [LeaseRow::default(); CHUNK_MAX];
            let Ok((found, is_all)) = shmem::with_arena(|arena, now, _| {
                arena.flush_next(*at, &mut walk, interval_us, now, &mut rows)
            }) else {
                return;
            };
            batch.extend(rows[..found].iter().map(|row| Due {
                at: *at,
                relation: *relation,
                row: *row,
                is_open: latch::is_transaction_open(row.pid, row.lxid),
            }));
            if batch.len() >= WRITE_MAX {
                write(database, &mut batch, interval_us);
            }
            if is_all {
                break;
            }
            pgrx::check_for_interrupts!();
        }
    }
    write(database, &mut batch, interval_us);
}

/// Writes a batch in one transaction, and tells the dispatcher and those who wait.
fn write(database: u32, batch: &mut Vec<Due>, interval_us: i64) {
    let mut due = std::mem::take(batch);
    // Of an open transaction's lease the count is all that can be written.
    let mut asked = None;
    for one in due.iter().filter(|one| one.is_open) {
        if asked.replace(one.at) == Some(one.at) {
            continue; // once for each queue, not for each lease
        }
        let _ = shmem::with_arena(|arena, now, fx| {
            arena.flush_again(one.at, now.mono_us.saturating_add(interval_us), fx);
        });
    }
    due.retain(|one| !(one.is_open && one.row.written >= Written::Count));
    // One that moved while the queue was walked has come twice; a statement can write a row once.
    let mut last = HashMap::with_capacity(due.len());
    for (place, one) in due.iter().enumerate() {
        last.insert((one.relation, one.row.msg_id), place);
    }
    let mut place = 0..due.len();
    due.retain(|one| last.get(&(one.relation, one.row.msg_id)).copied() == place.next());
    if due.is_empty() {
        return;
    }
    crate::wait_point!("lease-write");
    let done = worker::transaction("writing leases", || {
        crate::if_broken!(skip_lease_flush, { return Ok(true) });
        // Not now: somebody changes the extension.
        let is_locked = try_lock_catalog("lease", RowExclusiveLock);
        if is_locked {
            upsert(&due, clock::now());
        }
        Ok(is_locked)
    });
    let is_done = done == Some(true);
    for chunk in due.chunks(CHUNK_MAX) {
        let _ = shmem::with_arena(|arena, now, fx| {
            for one in chunk {
                let written = if one.is_open { Written::Count } else { Written::Whole };
                match is_done {
                    true => arena.lease_written(one.at, &one.row, written, fx),
                    false => arena.flush_again(one.at, now.mono_us.saturating_add(AGAIN_US), fx),
                }
            }
        });
    }
    if is_done {
        let _ = shmem::with_arena(|arena, _, fx| arena.written_wake(database, fx));
    }
}

fn upsert(due: &[Due], now: Now) {
    const STATEMENT: &str = "INSERT INTO queue_catalog.lease \
         (queue, msg_id, lease_id, delivery_count, leased_at, until) \
         SELECT q, m, l, c, b, e FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), \
           pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5), pg_catalog.unnest($6)) \
           AS input (q, m, l, c, b, e) \
         ON CONFLICT (queue, msg_id) DO UPDATE SET lease_id = excluded.lease_id, \
           delivery_count = excluded.delivery_count, leased_at = excluded.leased_at, until = excluded.until";
    let wall =
        |mono_us: i64| Value::of_time_us(now.wall_us.saturating_add(mono_us.saturating_sub(now.mono_us)));
    let column = |kind: pg_sys::Oid, value: &dyn Fn(&Due) -> Value| {
        Value::array(kind.into(), &due.iter().map(value).collect::<Vec<_>>())
    };
    let until = |one: &Due| if one.is_open { Value::NULL } else { wall(one.row.until_us) };
    spi::run(
        STATEMENT,
        &[
            pg_sys::OIDARRAYOID,
            pg_sys::INT8ARRAYOID,
            pg_sys::INT8ARRAYOID,
            pg_sys::INT4ARRAYOID,
            pg_sys::TIMESTAMPTZARRAYOID,
            pg_sys::TIMESTAMPTZARRAYOID,
        ]
        .map(u32::from),
        &[
            column(pg_sys::OIDOID, &|one| Value::of(pg_sys::Oid::from(one.relation))),
            column(pg_sys::INT8OID, &|one| Value::of(one.row.msg_id)),
            column(pg_sys::INT8OID, &|one| Value::of(one.row.lease_id)),
            column(pg_sys::INT4OID, &|one| Value::of(one.row.count.min(i32::MAX as u32) as i32)),
            column(pg_sys::TIMESTAMPTZOID, &|one| wall(one.row.leased_at_us)),
            column(pg_sys::TIMESTAMPTZOID, &until),
        ],
    );
}

/// Sweeps that are under way, by table.
#[derive(Default)]
pub struct Sweeps(HashMap<u32, Sweep>);

/// One of them.
struct Sweep {
    /// The message to go on behind.
    after: i64,
    /// Counts are to be corrected, too.
    is_recounted: bool,
    /// Another one is to follow.
    is_asked_again: bool,
}

impl Sweeps {
    /// Whether one of this table is.
    pub fn is_under_way(&self, relation: u32) -> bool {
        self.0.contains_key(&relation)
    }

    /// Forgets those of other tables.
    pub fn retain(&mut self, is_here: impl Fn(&u32) -> bool) {
        self.0.retain(|relation, _| is_here(relation));
    }

    /// Goes on with a queue's sweep, for a turn, or begins one. Returns when to come again.
    pub fn sweep(&mut self, database: u32, tick: &Tick) -> i64 {
        let sweep = match self.0.entry(tick.relation) {
            Entry::Occupied(known) => {
                if tick.is_new {
                    // What is behind us, too, once this one is done.
                    let _ = shmem::with_arena(|arena, _, _| arena.sweep_again(tick.queue));
                }
                let known = known.into_mut();
                known.is_asked_again |= tick.is_new;
                known
            }
            Entry::Vacant(place) => {
                // What becomes stale from here on asks for another.
                let is_recounted = shmem::with_arena(|arena, _, _| arena.sweep_begin(tick.queue));
                let is_recounted = is_recounted.unwrap_or(false) || tick.is_new;
                place.insert(Sweep { after: i64::MIN, is_recounted, is_asked_again: false })
            }
        };
        match sweep_some(database, tick, sweep) {
            Some(Some(true)) => {
                let is_asked_again = sweep.is_asked_again;
                self.0.remove(&tick.relation);
                if is_asked_again {
                    clock::now().mono_us + LOOK_AGAIN_US
                } else {
                    NEVER_US
                }
            }
            Some(Some(false)) => clock::now().mono_us, // after the others' turns
            Some(None) | None => {
                self.0.remove(&tick.relation);
                let _ = shmem::with_arena(|arena, _, _| arena.sweep_again(tick.queue));
                clock::now().mono_us + LOOK_AGAIN_US
            }
        }
    }
}

/// Deletes the rows of a queue that are not needed any more: of messages that are gone or whose own rows know of the
/// delivery. What only the dispatcher knows, it is asked. True: these were the last; `Some(None)`: somebody holds a lock
/// on the table; `None`: it failed.
fn sweep_some(database: u32, tick: &Tick, sweep: &mut Sweep) -> Option<Option<bool>> {
    let (mut after, is_recounted) = (sweep.after, sweep.is_recounted);
    let mut corrected = Vec::new();
    let done = worker::transaction("sweeping leases", || {
        let queue = match open(database, tick, AccessShareLock)? {
            Opened::Yes(queue) => queue,
            Opened::Gone => return Ok(Some(true)),
            Opened::Locked => return Ok(None),
        };
        if !try_lock_catalog("lease", RowExclusiveLock) {
            return Ok(None);
        }
        let until_us = clock::now().mono_us + TURN_US;
        loop {
            let rows = spi::in_passing(|| written(&queue, after));
            if !rows.is_empty() {
                let kept = spi::in_passing(|| delete_stale(&queue, &rows))?;
                if is_recounted {
                    corrected.extend(spi::in_passing(|| recount(&queue, tick.queue, &kept))?);
                }
            }
            match rows.last() {
                Some((msg_id, ..)) if rows.len() == SWEEP_MAX => after = *msg_id,
                _ => return Ok(Some(true)),
            }
            if clock::now().mono_us > until_us {
                return Ok(Some(false));
            }
            pgrx::check_for_interrupts!();
        }
    });
    sweep.after = after;
    // What it was told it may forget once that is committed.
    for chunk in corrected.chunks(CHUNK_MAX).filter(|_| matches!(done, Some(Some(_)))) {
        let _ = shmem::with_arena(|arena, now, fx| {
            chunk
                .iter()
                .for_each(|(msg_id, count)| arena.row_is_corrected(tick.queue, *msg_id, *count, now, fx));
        });
    }
    done
}

/// What is written of a lease: message, count and beginning.
type WrittenRow = (i64, i32, i64);

/// Of a queue's leases the next ones, in the order of their messages.
fn written(queue: &Queue, after: i64) -> Vec<WrittenRow> {
    let outcome = spi::run(
        "SELECT msg_id, delivery_count, leased_at FROM queue_catalog.lease WHERE queue OPERATOR(pg_catalog.=) $1 \
         AND msg_id OPERATOR(pg_catalog.>) $2 ORDER BY msg_id LIMIT $3",
        &[pg_sys::OIDOID.into(), pg_sys::INT8OID.into(), pg_sys::INT8OID.into()],
        &[Value::of(pg_sys::Oid::from(queue.relation)), Value::of(after), Value::of(SWEEP_MAX as i64)],
    );
    let columns = |row: &Vec<Value>| Some((row[0].i64()?, row[1].get::<i32>()?, row[2].time_us()?));
    outcome.rows.iter().filter_map(columns).collect()
}

/// Returns those that are not stale. The queue's table is not named in a statement: planning one runs functions of its
/// owner's, with the rights of whoever plans.
fn delete_stale(queue: &Queue, rows: &[WrittenRow]) -> crate::Result<Vec<WrittenRow>> {
    let Some(table) = Table::open(queue.relation, None) else { return Ok(Vec::new()) };
    let snapshot = Snapshot::latest();
    let is_unlogged = user::is_unlogged(queue.relation);
    let (stale, kept): (Vec<WrittenRow>, Vec<WrittenRow>) =
        rows.iter().partition(|(msg_id, count, leased_at_us)| {
            let message = table.lookup(queue.key, *msg_id, &snapshot);
            message.is_none_or(|message| {
                i64::from(row_of(&message).count) >= i64::from(*count)
                    || is_unlogged && lease::is_of_an_earlier_message(*leased_at_us, &message)
            })
        });
    snapshot.done();
    table.close(None, true);
    let stale: Vec<Value> = stale.iter().map(|(msg_id, ..)| Value::of(*msg_id)).collect();
    if !stale.is_empty() {
        spi::run(
            "DELETE FROM queue_catalog.lease WHERE queue OPERATOR(pg_catalog.=) $1 \
             AND msg_id OPERATOR(pg_catalog.=) ANY ($2)",
            &[pg_sys::OIDOID.into(), pg_sys::INT8ARRAYOID.into()],
            &[Value::of(pg_sys::Oid::from(queue.relation)), Value::array(pg_sys::INT8OID.into(), &stale)],
        );
    }
    Ok(kept)
}

/// Corrects rows of deliveries that were given back and do not count, or that ended early. Returns those, and what they
/// say now.
fn recount(queue: &Queue, at: QueueRef, rows: &[WrittenRow]) -> crate::Result<Vec<(i64, u32)>> {
    let relation = Value::of(pg_sys::Oid::from(queue.relation));
    let mut fates = Vec::new();
    for chunk in rows.chunks(CHUNK_MAX) {
        fates.reserve(chunk.len());
        shmem::with_arena(|arena, _, _| {
            for (msg_id, count, _) in chunk {
                if let RowFate::Recount(count) = arena.row_fate(at, *msg_id, (*count).max(0) as u32) {
                    fates.push((*msg_id, count)); // within capacity
                }
            }
        })?;
    }
    const GONE: &str = "DELETE FROM queue_catalog.lease WHERE queue OPERATOR(pg_catalog.=) $1 \
        AND msg_id OPERATOR(pg_catalog.=) $2";
    const LESS: &str = "UPDATE queue_catalog.lease SET delivery_count = $3, until = NULL \
        WHERE queue OPERATOR(pg_catalog.=) $1 AND msg_id OPERATOR(pg_catalog.=) $2";
    let types = [pg_sys::OIDOID, pg_sys::INT8OID, pg_sys::INT4OID].map(u32::from);
    for (msg_id, count) in fates.iter().copied() {
        let values = [relation, Value::of(msg_id), Value::of(count.min(i32::MAX as u32) as i32)];
        match count {
            0 => spi::run(GONE, &types[..2], &values[..2]),
            _ => spi::run(LESS, &types, &values),
        };
    }
    Ok(fates)
}
