//! Finishing: the message is pinned in the dispatcher, its row verified and deleted, in the caller's own
//! transaction. At commit the pin becomes nothing, at rollback it comes off ([`super::journal`]).
//!
//! The order: pin under the dispatcher's lock (that is where the fence is checked), then, outside it, a snapshot,
//! then verify what lies at the address, then delete there, the snapshot still held so that the place cannot be
//! reused meanwhile. A row that another transaction moved is looked up again. Where a statement must delete, for the
//! sake of a trigger or a rule, the row is locked there first: what is kept of a message is what was deleted.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Rows, Value};
use crate::pg::table::{Deleted, Record, RowExclusiveLock, Snapshot, Table};
use crate::pg::user::{self, Right};
use crate::pg::{latch, shmem, spi, xact};
use crate::queue::journal::{self, Own, OwnThen};
use crate::queue::resolve::{self, For, Queue};
use crate::queue::take::find;
use crate::queue::{args, column, dead_letter};
use pgrx::pg_sys;
use queue_dispatch::{Fence, Pin, Pinned, QueueRef, Row, Tid, CHUNK_MAX, NIL};
use std::collections::HashMap;

/// What becomes of a finished message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// It is deleted.
    No,
    /// It moves to the queue's archive.
    Archive,
}

/// Deletes a row that was just found under `snapshot`; follows it if it was moved. After `Ok` the table's slot holds
/// the version that was deleted, so the record that was found there is that one.
pub fn delete_row(queue: &Queue, table: &Table, tid: Tid, msg_id: i64, snapshot: &Snapshot) -> Result<Deleted> {
    let is_plain = table.is_plain_for_delete();
    // A statement tells nothing of what it deletes, and may find a later version than was found here: what it is to
    // delete is locked first.
    let reach = |tid, snapshot: &Snapshot| {
        if is_plain {
            table.delete(tid, snapshot, true)
        } else {
            table.lock(tid, snapshot, true)
        }
    };
    let mut result = reach(tid, snapshot);
    // Each round another transaction has updated the row and committed; nobody does that for ever.
    const ROUNDS_MAX: usize = 1_000;
    for _ in 0..ROUNDS_MAX {
        if result != Deleted::Moved {
            break;
        }
        pgrx::check_for_interrupts!();
        let again = Snapshot::latest();
        result = match table.lookup(queue.key, msg_id, &again) {
            Some(record) => reach(record.tid(), &again),
            None => Deleted::Gone,
        };
        again.done();
    }
    if is_plain || result == Deleted::Moved {
        return Ok(result);
    }
    // Under the snapshot that the row was found with, also where it is gone: under REPEATABLE READ the statement then
    // fails, as any would there.
    delete_by_statement(queue, table, msg_id, snapshot)
}

/// Deletes a row with whatever triggers and rules its owner put there.
fn delete_by_statement(queue: &Queue, table: &Table, msg_id: i64, snapshot: &Snapshot) -> Result<Deleted> {
    let plan = queue.plan(For::Delete, || {
        spi::prepare(
            &format!("DELETE FROM ONLY {} WHERE msg_id OPERATOR(pg_catalog.=) $1", queue.table_name()),
            &[pg_sys::INT8OID.into()],
        )
    });
    let delete = || plan.run(&[Value::of(msg_id)], Some(snapshot));
    // Its condition wants SELECT, which a finish does not.
    let outcome = if user::has_rights(queue.relation, &[Right::Select]) {
        delete()
    } else {
        user::acting_as(user::owner(queue.relation), delete)
    };
    if outcome.processed == 1 {
        return Ok(Deleted::Ok);
    }
    let again = Snapshot::latest();
    let is_kept = table.lookup(queue.key, msg_id, &again).is_some();
    again.done();
    Ok(if is_kept { Deleted::Kept } else { Deleted::Gone })
}

/// Takes a pin off again, at once: the message stays.
pub fn unpin(at: QueueRef, msg_id: i64) -> Result<()> {
    let me = latch::my_proc();
    if !journal::unpinned(at, msg_id) {
        return Ok(());
    }
    shmem::with_arena(|arena, now, fx| arena.pin_undo(at, msg_id, me, now, fx))
}

/// The row of a pinned message is not there. Only if this transaction itself may have deleted it, and so may bring it
/// back by a rollback, it stays pinned until the transaction's end: else it would keep others from a message whose
/// sender commits meanwhile.
pub fn missed(at: QueueRef, msg_id: i64) -> Result<()> {
    if xact::has_id() {
        return Ok(());
    }
    let me = latch::my_proc();
    journal::unpinned(at, msg_id);
    shmem::with_arena(|arena, _, fx| arena.pin_drop(at, msg_id, me, fx))
}

/// A message pinned by this transaction, or without a slot, to be dealt with in the heap.
pub struct Held {
    /// The message.
    pub msg_id: i64,
    /// What the dispatcher knew of it; `None`: it could have no slot.
    pub pinned: Option<Pinned>,
}

/// Which fence a call without a lease rests on: within the transaction that read the message, that lease.
fn fence_of(lease_id: Option<i64>, msg_id: i64, mine: &HashMap<i64, i64>) -> Fence {
    crate::if_broken!(no_fence, { return Fence::Any });
    match lease_id.or_else(|| mine.get(&msg_id).copied()) {
        Some(lease_id) => Fence::Lease(lease_id),
        None => Fence::Any,
    }
}

/// Pins what may be pinned of these (at most [`CHUNK_MAX`]) messages. The journal takes them off again if the
/// transaction fails.
pub fn pin(queue: &Queue, ids: &[(i64, Option<i64>)], cancel: bool) -> Result<(QueueRef, Vec<Held>)> {
    debug_assert!(ids.len() <= CHUNK_MAX);
    journal::reserve(2 * ids.len())?;
    let unfenced = ids.iter().filter(|(_, lease_id)| !cancel && lease_id.is_none());
    let mine = journal::leases_of(queue.at(), unfenced.map(|(msg_id, _)| *msg_id));
    let me = latch::my_proc();
    let mut pins = Vec::with_capacity(ids.len());
    let at = queue.with(|arena, at, now, fx| {
        pins.clear();
        for (msg_id, lease_id) in ids {
            let fence = if cancel { Fence::NotLeased } else { fence_of(*lease_id, *msg_id, &mine) };
            // Within capacity: nothing allocates under the lock.
            pins.push(arena.pin(at, *msg_id, fence, me, now, fx));
        }
        at
    })?;
    let mut held = Vec::with_capacity(ids.len());
    let claims_nothing =
        |msg_id: i64, lease_id: Option<i64>| cancel || lease_id.is_none() && !mine.contains_key(&msg_id);
    for ((msg_id, lease_id), pin) in ids.iter().zip(&pins) {
        match pin {
            Pin::Done(pinned) => {
                journal::pinned(at, *msg_id);
                held.push(Held { msg_id: *msg_id, pinned: Some(*pinned) });
            }
            Pin::NoSlot => held.push(Held { msg_id: *msg_id, pinned: None }),
            // By this transaction itself, only to keep it from being read here.
            Pin::Busy if claims_nothing(*msg_id, *lease_id) && journal::pinned_over(at, *msg_id) => {
                let pinned = shmem::with_arena(|arena, _, _| arena.pinned_again(at, *msg_id, me))?;
                held.extend(pinned.map(|pinned| Held { msg_id: *msg_id, pinned: Some(pinned) }));
            }
            Pin::Lost | Pin::Busy => {}
        }
    }
    for one in &held {
        if one.pinned.is_none() {
            journal::unslotted(queue.relation, one.msg_id)?;
        }
    }
    Ok((at, held))
}

/// Finishes messages; calls `done` with the id of each one that was, in the order of `ids`. `argument`: what the
/// caller calls their leases.
pub fn finish(
    name: &str,
    (argument, ids): (&'static str, &[(i64, Option<i64>)]),
    strict: bool,
    keep: Keep,
    done: &mut dyn FnMut(i64),
) -> Result<()> {
    let queue = resolve::open(name, RowExclusiveLock)?;
    queue.check("finish messages of", &[Right::Delete], "DELETE on its table")?;
    for (_, lease_id) in ids {
        queue.check_lease(argument, *lease_id)?;
    }
    for chunk in ids.chunks(CHUNK_MAX) {
        let finished = finish_chunk(&queue, chunk, keep, false)?;
        for ((msg_id, _), is_finished) in chunk.iter().zip(finished) {
            if is_finished {
                done(*msg_id);
            } else if strict {
                return Err(Error::Lost { queue: queue.name.clone(), msg_id: *msg_id });
            }
        }
        pgrx::check_for_interrupts!();
    }
    Ok(())
}

/// Finishes, at commit, what this transaction has deleted otherwise and what would keep its place for as long as its
/// lease or its delay: nobody else would find out before that.
pub fn let_go_of_gone(queue: &Queue) -> Result<()> {
    let snapshot = Snapshot::latest();
    let Some(table) = Table::open(queue.relation, None) else { return Ok(()) };
    let mut from = 0;
    while from != NIL {
        pgrx::check_for_interrupts!();
        let mut ids = [0; CHUNK_MAX];
        let (count, next) = queue.with(|arena, at, _, _| arena.timed_some(at, from, &mut ids))?;
        from = next;
        let is_gone = |msg_id: &i64| table.lookup(queue.key, *msg_id, &snapshot).is_none();
        let gone: Vec<_> = ids[..count].iter().copied().filter(is_gone).map(|msg_id| (msg_id, None)).collect();
        if !gone.is_empty() {
            pin(queue, &gone, false)?;
        }
    }
    table.close(None, true);
    snapshot.done();
    Ok(())
}

/// A message to be finished, by its place in the call.
pub struct Target {
    place: usize,
    /// Its id.
    pub msg_id: i64,
    /// Where its row was when last heard of.
    pub tid: Tid,
    count: u32,
    /// This transaction has sent it.
    pub is_own: bool,
    /// It is pinned; else it is this transaction's own, or could have no slot.
    pub is_pinned: bool,
}

/// Those of (at most [`CHUNK_MAX`]) messages that this call may finish: pinned, or this transaction's own. `cancel`:
/// only what nobody holds. Own ones come first, both kinds in the order of `ids`.
pub fn targets(queue: &Queue, ids: &[(i64, Option<i64>)], cancel: bool) -> Result<(QueueRef, Vec<Target>)> {
    let mut others = Vec::with_capacity(ids.len());
    let mut targets = Vec::with_capacity(ids.len());
    for (place, (msg_id, lease_id)) in ids.iter().enumerate() {
        match journal::own_find(queue.relation, *msg_id, *lease_id) {
            Own::No => others.push((place, (*msg_id, *lease_id))),
            Own::Yes(_, held) if cancel && held != 0 => {}
            Own::Yes(Row { tid, count, .. }, _) => {
                targets.push(Target { place, msg_id: *msg_id, tid, count, is_own: true, is_pinned: false });
            }
            Own::Lost => {}
        }
    }
    if others.is_empty() {
        return Ok((queue.at(), targets));
    }
    let (places, ids): (Vec<usize>, Vec<_>) = others.into_iter().unzip();
    let (at, held) = pin(queue, &ids, cancel)?;
    // What is held is in the order of what was asked for.
    let mut places = places.into_iter().zip(ids);
    for Held { msg_id, pinned } in held {
        let Some((place, _)) = places.find(|(_, (id, _))| *id == msg_id) else { break };
        let (tid, count) = pinned.map_or((Tid::default(), 0), |p| (p.tid, p.count));
        targets.push(Target { place, msg_id, tid, count, is_own: false, is_pinned: pinned.is_some() });
    }
    Ok((at, targets))
}

/// Finishes (at most [`CHUNK_MAX`]) messages; says of each whether it was.
fn finish_chunk(queue: &Queue, ids: &[(i64, Option<i64>)], keep: Keep, cancel: bool) -> Result<Vec<bool>> {
    let mut finished = vec![false; ids.len()];
    let (at, targets) = targets(queue, ids, cancel)?;
    if targets.is_empty() {
        return Ok(finished);
    }
    crate::wait_point!("finish-verify");
    let snapshot = Snapshot::latest();
    let Some(table) = Table::open(queue.relation, None) else {
        return Err(Error::QueueUnknown { queue: queue.name.clone() });
    };
    for Target { place, msg_id, tid, count, is_pinned, .. } in &targets {
        snapshot.see_own(); // a trigger on the archive may have changed the next message
        let Some(record) = find(queue, &table, *tid, *msg_id, &snapshot) else {
            if *is_pinned {
                missed(at, *msg_id)?;
            }
            continue;
        };
        match delete_row(queue, &table, record.tid(), *msg_id, &snapshot)? {
            Deleted::Ok => {
                if keep == Keep::Archive {
                    dead_letter::archive(queue, dead_letter::copy(&record, *count), "archived")?;
                }
                finished[*place] = true;
            }
            Deleted::Kept | Deleted::Moved if *is_pinned => unpin(at, *msg_id)?,
            _ => {}
        }
    }
    crate::wait_point!("finish-deleted");
    table.close(None, true);
    snapshot.done();
    for own in targets.iter().filter(|target| target.is_own) {
        if finished[own.place] {
            journal::own_set(queue.relation, own.msg_id, OwnThen::Finish)?;
        }
    }
    Ok(finished)
}

fn finish_one(args: &Args, keep: Keep) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let msg_id = args::msg_id(args, 1)?;
    let mut was_finished = false;
    let ids = [(msg_id, args::lease_id(args, 2))];
    finish(&name, ("lease_id", &ids), args::flag(args, 3, false), keep, &mut |_| {
        was_finished = true;
    })?;
    Ok(Value::of(was_finished))
}

fn finish_batch(args: &Args, rows: &mut Rows, keep: Keep) -> Result<()> {
    let name = args::text(args, 0, "queue")?;
    let ids = args::ids(args, 1, 2)?;
    finish(&name, ("lease_ids", &ids), args::flag(args, 3, false), keep, &mut |msg_id| {
        rows.emit([Value::of(msg_id)])
    })
}

/// `queue_delete`.
pub fn queue_delete(args: &Args) -> Result<Value> {
    finish_one(args, Keep::No)
}

/// `queue_archive`.
pub fn queue_archive(args: &Args) -> Result<Value> {
    finish_one(args, Keep::Archive)
}

/// `queue_delete_batch`.
pub fn queue_delete_batch(args: &Args, rows: &mut Rows) -> Result<()> {
    finish_batch(args, rows, Keep::No)
}

/// `queue_archive_batch`.
pub fn queue_archive_batch(args: &Args, rows: &mut Rows) -> Result<()> {
    finish_batch(args, rows, Keep::Archive)
}

/// `queue_cancel`: deletes a message unless somebody holds it.
pub fn queue_cancel(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let msg_id = args::msg_id(args, 1)?;
    let queue = resolve::open(&name, RowExclusiveLock)?;
    queue.check("cancel messages of", &[Right::Delete], "DELETE on its table")?;
    let finished = finish_chunk(&queue, &[(msg_id, None)], Keep::No, true)?;
    Ok(Value::of(finished == [true]))
}

/// The row of a pinned message, for retry and the like.
pub fn pinned_record(queue: &Queue, table: &Table, held: &Held, snapshot: &Snapshot) -> Option<Record> {
    let tid = held.pinned.map_or(Tid::default(), |p| p.tid);
    find(queue, table, tid, held.msg_id, snapshot)
}

/// Deliveries that a message has had, by the dispatcher and by its row.
pub fn deliveries(held: &Held, record: &Record) -> u32 {
    let in_row = record.value(column::DELIVERY_COUNT).get::<i32>().unwrap_or(0).max(0) as u32;
    held.pinned.map_or(0, |p| p.count).max(in_row)
}
