//! Leases and the tables: what the worker has written of them is read back when a queue is first used after a start
//! ([`restore`]), a read of a queue with durable leases waits until they are written ([`await_written`]), and whoever
//! truncates a queue has them deleted ([`forget_written`]). Owns the way back, that wait and that deletion; what is
//! written, and when, is `worker::leases`' business.

use crate::error::{Error, Result};
use crate::pg::call::Value;
use crate::pg::table::{self, Record, Snapshot, Table};
use crate::pg::{latch, shmem, spi, user};
use crate::queue::resolve::Queue;
use crate::queue::{column, journal, row_of};
use pgrx::pg_sys;
use queue_dispatch::{LeaseCount, LeaseRow, Now, QueueRef, Restore, Row, Written, CHUNK_MAX, NIL};

/// Restores the leases of a queue that was just attached, unless that was done, or waits until another backend has.
/// Reads only; the caller holds a lock on the table.
pub fn restore(queue: &Queue, at: QueueRef) -> Result<()> {
    const LOOK_MS: i64 = 2;
    let me = latch::my_proc();
    journal::reserve(1)?;
    loop {
        match shmem::with_arena(|arena, _, _| arena.restore_begin(at, me))? {
            Restore::Done => return Ok(()),
            // It may take him long: other queues' affairs do not wait for that.
            Restore::Busy if crate::pg::worker::is_ours() => {
                return Err(Error::BeingRestored { queue: queue.name.clone() });
            }
            Restore::Busy => latch::sleep(LOOK_MS, latch::wait_event(c"QueueRestore")),
            Restore::Begun => break,
        }
    }
    journal::loading(Some(at));
    crate::wait_point!("restore");
    let is_stored_anew = table::is_stored_anew(queue.relation) && !journal::is_created_here(queue.relation);
    if is_stored_anew {
        journal::restored(queue.relation);
    }
    let leases = written_leases(queue, is_stored_anew)?;
    let mut is_full = false;
    for chunk in leases.chunks(CHUNK_MAX) {
        is_full = shmem::with_arena(|arena, now, fx| {
            chunk.iter().any(|lease| !arena.lease_restore(at, &lease.at(now), lease.row, now, fx))
        })?;
        if is_full {
            break;
        }
    }
    if is_full {
        pgrx::log!(
            "pg_queue: no room to restore all leases of queue \"{}\"; raise pg_queue.max_messages",
            queue.name
        );
    }
    journal::loading(None);
    shmem::with_arena(|arena, _, fx| arena.restore_end(at, me, fx))
}

/// A lease as it was written, times on the wall clock, and its message's row.
struct WrittenLease {
    lease_id: i64,
    count: u32,
    leased_at_us: i64,
    until_us: Option<i64>,
    row: Row,
}

impl WrittenLease {
    /// The same on the clock that never jumps. A lease never gets longer than it was, however the wall clock jumped
    /// since.
    fn at(&self, now: Now) -> LeaseRow {
        let length_us = self.until_us.map_or(0, |until_us| until_us.saturating_sub(self.leased_at_us)).max(0);
        let left_us =
            self.until_us.map_or(0, |until_us| until_us.saturating_sub(now.wall_us)).clamp(0, length_us);
        let age_us = now.wall_us.saturating_sub(self.leased_at_us).max(0);
        LeaseRow {
            msg_id: self.row.msg_id,
            lease_id: self.lease_id,
            count: self.count,
            leased_at_us: now.mono_us.saturating_sub(age_us),
            until_us: now.mono_us.saturating_add(left_us),
            written: Written::Whole,
            ..LeaseRow::default()
        }
    }
}

/// What is written of leases of messages that are there and whose own rows do not know of those deliveries: as others
/// see it, without what this transaction itself may have changed; but where it has rewritten the table, others see none
/// (`is_stored_anew`), so that it is what is there now. The queue's table is not named in a statement: that
/// would leave a lock on it until the transaction's end, and a reader that goes on to sleep is in nobody's way.
fn written_leases(queue: &Queue, is_stored_anew: bool) -> Result<Vec<WrittenLease>> {
    let snapshot = if is_stored_anew { Snapshot::latest() } else { Snapshot::latest_of_others() };
    let outcome = user::acting_as_extension(|| {
        spi::look(
            "SELECT msg_id, lease_id, delivery_count, leased_at, until FROM queue_catalog.lease \
             WHERE queue OPERATOR(pg_catalog.=) $1",
            &[pg_sys::OIDOID.into()],
            &[Value::of(pg_sys::Oid::from(queue.relation))],
        )
    });
    let mut leases = Vec::new();
    let has_leases = !outcome.rows.is_empty(); // most queues have none
    if let Some(table) = has_leases.then(|| Table::open(queue.relation, None)).flatten() {
        let is_unlogged = user::is_unlogged(queue.relation);
        leases.try_reserve_exact(outcome.rows.len()).map_err(|_| Error::Memory)?;
        leases.extend(outcome.rows.iter().filter_map(|row| {
            let message = table.lookup(queue.key, row[0].i64()?, &snapshot)?;
            if journal::own_view(queue.relation, row[0].i64()?).is_some() {
                return None; // another message, whose id came anew
            }
            let lease = WrittenLease {
                lease_id: row[1].i64()?,
                count: row[2].get::<i32>()?.max(0) as u32,
                leased_at_us: row[3].time_us()?,
                until_us: row[4].time_us(),
                row: row_of(&message),
            };
            let is_other = is_unlogged && is_of_an_earlier_message(lease.leased_at_us, &message);
            (lease.count > lease.row.count && !is_other).then_some(lease)
        }));
        table.close(None, true);
    }
    snapshot.done();
    Ok(leases)
}

/// Whether a lease is of an earlier message than the one that has its id now: an unlogged queue is empty after a crash,
/// and its ids begin anew. Not to be asked of others, which lose nothing in this way: clocks may be set back, and what
/// came from another server has the time of that one's.
pub fn is_of_an_earlier_message(leased_at_us: i64, message: &Record) -> bool {
    message.value(column::ENQUEUED_AT).time_us().is_some_and(|sent_us| leased_at_us < sent_us)
}

/// Deletes what is written of a queue's leases, in this transaction. What the worker is writing at this moment is left
/// out, so that neither waits for the other: the dispatcher has it swept.
pub fn forget_written(relation: u32) {
    const STATEMENT: &str = "DELETE FROM queue_catalog.lease WHERE ctid OPERATOR(pg_catalog.=) ANY (ARRAY(\
         SELECT ctid FROM queue_catalog.lease WHERE queue OPERATOR(pg_catalog.=) $1 FOR UPDATE SKIP LOCKED))";
    // This transaction may have dropped the extension since.
    if user::schema(c"queue_catalog").and_then(|schema| user::relation(schema, "lease")).is_none() {
        return;
    }
    // COMMIT runs without a snapshot, and what a REPEATABLE READ transaction has is too old.
    let snapshot = Snapshot::latest();
    user::acting_as_extension(|| {
        let plan = spi::prepare(STATEMENT, &[pg_sys::OIDOID.into()]);
        plan.run(&[Value::of(pg_sys::Oid::from(relation))], Some(&snapshot));
        plan.free();
    });
    snapshot.done();
}

/// Sleeps until the worker has written the counts of these leases (message, lease) and its transaction is on disk. A
/// lease that is lost before that, or ends at `until_us` (on the clock that never jumps), is an error: its message would
/// be delivered, and no crash would leave a trace of it.
pub fn await_written(queue: &Queue, at: QueueRef, leases: &[(i64, i64)], until_us: i64) -> Result<()> {
    /// Should a wake-up be lost with the worker, somebody looks all the same.
    const LOOK_US: i64 = 1_000_000;
    let (me, database) = (latch::my_proc(), user::database());
    let mut open = leases;
    loop {
        // A chunk at a time, and first of all registered: what is written from then on wakes us.
        let chunk = &open[..open.len().min(CHUNK_MAX)];
        let (written, is_lost, left_us, has_worker) = shmem::with_arena(|arena, now, fx| {
            arena.written_wait(me, database);
            let state = |(msg, lease): &(i64, i64)| arena.lease_count(at, *msg, *lease);
            let is_settled = |one: &&(i64, i64)| matches!(state(one), LeaseCount::Written | LeaseCount::Gone);
            let written = chunk.iter().take_while(is_settled).count();
            let is_lost = chunk.get(written).is_some_and(|one| state(one) == LeaseCount::Over);
            if written < chunk.len() && !is_lost {
                arena.flush_again(at, 0, fx);
            }
            (written, is_lost, until_us.saturating_sub(now.mono_us), arena.worker_proc(database) != NIL)
        })?;
        open = &open[written..];
        let Some((msg_id, _)) = open.first() else { return Ok(()) };
        if written == chunk.len() {
            continue;
        }
        if is_lost || left_us <= 0 {
            return Err(Error::LeaseOver { queue: queue.name.clone(), msg_id: *msg_id });
        }
        if !has_worker {
            return Err(Error::NoWorker { queue: queue.name.clone() });
        }
        latch::sleep(left_us.min(LOOK_US).div_euclid(1_000) + 1, latch::wait_event(c"QueueLeaseWrite"));
    }
}
