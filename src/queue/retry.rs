//! What ends a delivery without finishing the message: retry, reject, release, extend. A retry rewrites the row
//! (its new address is published at commit), a release and an extension write nothing.

use crate::error::Result;
use crate::pg::call::{Args, Rows, Value};
use crate::pg::table::{AccessShareLock, Deleted, Record, RowExclusiveLock, Snapshot, Table};
use crate::pg::user::{self, Right};
use crate::pg::{clock, spi};
use crate::queue::finish::{self, Held};
use crate::queue::journal::{self, Own, OwnThen, Then};
use crate::queue::resolve::{self, For, Queue};
use crate::queue::{args, capture, dead_letter};
use crate::settings;
use pgrx::pg_sys;
use queue_dispatch::{backoff_us, Fence, QueueRef, Row, CHUNK_MAX};

/// Writes a failed or released delivery into the row: when it is due, how often it was delivered, why it failed.
fn rewrite(
    queue: &Queue,
    msg_id: i64,
    visible_at: Value,
    count: u32,
    error: Value,
    snapshot: &Snapshot,
) -> Option<Row> {
    let plan = queue.plan(For::Retry, || {
        spi::prepare(
            &format!(
                "UPDATE ONLY {} SET visible_at = $2, delivery_count = $3, \
                 last_error = COALESCE($4, last_error) WHERE msg_id OPERATOR(pg_catalog.=) $1",
                queue.table_name()
            ),
            &[
                pg_sys::INT8OID.into(),
                pg_sys::TIMESTAMPTZOID.into(),
                pg_sys::INT4OID.into(),
                pg_sys::TEXTOID.into(),
            ],
        )
    });
    let count = count.min(i32::MAX as u32);
    let (outcome, row) = capture::rewriting(queue.relation, || {
        plan.run(&[Value::of(msg_id), visible_at, Value::of(count as i32), error], Some(snapshot))
    });
    // Without the trigger the address is not known: the primary key will be asked.
    (outcome.processed == 1).then(|| {
        row.unwrap_or(Row {
            msg_id,
            tid: queue_dispatch::Tid::default(),
            visible_at_us: visible_at.time_us(),
            count,
        })
    })
}

/// A message that this transaction may deal with: pinned, or its own.
struct Mine {
    held: Held,
    at: QueueRef,
    is_own: bool,
    /// The lease it is under, 0 for none.
    lease_id: i64,
}

fn hold(queue: &Queue, msg_id: i64, lease_id: Option<i64>) -> Result<Option<Mine>> {
    Ok(hold_all(queue, &[(msg_id, lease_id)])?.pop())
}

/// Those of (at most [`CHUNK_MAX`]) messages that this transaction may deal with, in their order.
fn hold_all(queue: &Queue, ids: &[(i64, Option<i64>)]) -> Result<Vec<Mine>> {
    let mut mine = Vec::with_capacity(ids.len());
    let mut others = Vec::with_capacity(ids.len());
    for (place, (msg_id, lease_id)) in ids.iter().enumerate() {
        match journal::own_find(queue.relation, *msg_id, *lease_id) {
            Own::Lost => {}
            Own::Yes(row, lease_id) => {
                let pinned = queue_dispatch::Pinned { tid: row.tid, count: row.count, lease_id };
                let held = Held { msg_id: *msg_id, pinned: Some(pinned) };
                mine.push((place, Mine { held, at: queue.at(), is_own: true, lease_id }));
            }
            Own::No => others.push((place, (*msg_id, *lease_id))),
        }
    }
    if !others.is_empty() {
        let (places, ids): (Vec<usize>, Vec<_>) = others.into_iter().unzip();
        let (at, held) = finish::pin(queue, &ids, false)?;
        // What is held is in the order of what was asked for.
        let mut places = places.into_iter().zip(ids);
        for held in held {
            let Some((place, _)) = places.find(|(_, (id, _))| *id == held.msg_id) else { break };
            let lease_id = held.pinned.map_or(0, |p| p.lease_id);
            mine.push((place, Mine { held, at, is_own: false, lease_id }));
        }
        mine.sort_unstable_by_key(|(place, _)| *place);
    }
    Ok(mine.into_iter().map(|(_, mine)| mine).collect())
}

impl Mine {
    fn then_wait(&self, queue: &Queue, row: Row) -> Result<()> {
        if self.is_own {
            journal::own_set(queue.relation, row.msg_id, OwnThen::Rewritten(row))
        } else if self.held.pinned.is_none() {
            journal::rewritten(queue.relation, row)
        } else {
            journal::pinned_then(self.at, row.msg_id, Then::Refile(row));
            Ok(())
        }
    }

    fn then_gone(&self, queue: &Queue) -> Result<()> {
        if self.is_own {
            journal::own_set(queue.relation, self.held.msg_id, OwnThen::Finish)?;
        }
        Ok(())
    }

    /// Somebody has seen its row.
    fn is_known(&self) -> bool {
        self.is_own || self.held.pinned.is_none_or(|pinned| pinned.tid.offset != 0)
    }

    /// Its row is not there.
    fn missed(&self) -> Result<()> {
        if !self.is_own && self.held.pinned.is_some() {
            finish::missed(self.at, self.held.msg_id)?;
        }
        Ok(())
    }

    /// Takes the pin off again, at once.
    fn let_go(&self) -> Result<()> {
        if !self.is_own && self.held.pinned.is_some() {
            finish::unpin(self.at, self.held.msg_id)?;
        }
        Ok(())
    }
}

fn error_text(args: &Args, position: usize) -> Option<String> {
    args.value(position).text().map(|mut text| {
        if text.len() > settings::ERROR_BYTES_MAX {
            let end = (0..=settings::ERROR_BYTES_MAX).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
            text.truncate(end);
        }
        text
    })
}

/// Deletes the message and moves it to where its queue's failures go; `lost` if it was gone already.
fn bury(
    queue: &Queue,
    mine: &Mine,
    table: &Table,
    record: &Record,
    snapshot: &Snapshot,
    reason: &str,
    error: Option<&str>,
) -> Result<&'static str> {
    // A consumer who may retry may have the last delivery moved away: without DELETE the owner's right does it.
    let delete = || finish::delete_row(queue, table, record.tid(), mine.held.msg_id, snapshot);
    let deleted = if user::has_rights(queue.relation, &[Right::Delete, Right::Select]) {
        delete()
    } else {
        user::acting_as(user::owner(queue.relation), delete)
    };
    match deleted? {
        Deleted::Ok => {
            mine.then_gone(queue)?;
            let copied = dead_letter::copy(record, finish::deliveries(&mine.held, record));
            dead_letter::bury(queue, copied, reason, error)
        }
        Deleted::Kept => {
            mine.let_go()?;
            Ok("lost")
        }
        _ => Ok("lost"),
    }
}

/// `queue_retry`: outcome and the time of the next delivery.
pub fn queue_retry(args: &Args, rows: &mut Rows) -> Result<()> {
    let name = args::text(args, 0, "queue")?;
    let msg_id = args::msg_id(args, 1)?;
    let lease_id = args::lease_id(args, 2);
    let error = error_text(args, 3);
    let delay_us = args::duration(args.value(4), "delay", settings::DELAY_US)?;
    let queue = resolve::open(&name, RowExclusiveLock)?;
    queue.check("retry messages of", &[Right::Select, Right::Update], "SELECT and UPDATE on its table")?;
    queue.check_lease("lease_id", lease_id)?;
    let (outcome, visible_at) = retry(&queue, msg_id, lease_id, error.as_deref(), delay_us)?;
    rows.emit([Value::of(outcome), visible_at]);
    Ok(())
}

fn retry(
    queue: &Queue,
    msg_id: i64,
    lease_id: Option<i64>,
    error: Option<&str>,
    delay_us: Option<i64>,
) -> Result<(&'static str, Value)> {
    const LOST: (&str, Value) = ("lost", Value::NULL);
    let Some(mine) = hold(queue, msg_id, lease_id)? else { return Ok(LOST) };
    crate::wait_point!("finish-verify");
    let snapshot = Snapshot::latest();
    let Some(table) = Table::open(queue.relation, None) else { return Ok(LOST) };
    let mut result = LOST;
    if let Some(record) = finish::pinned_record(queue, &table, &mine.held, &snapshot) {
        let count = finish::deliveries(&mine.held, &record);
        let policy = queue.settings.policy();
        if policy.is_exhausted(count) {
            let outcome = bury(queue, &mine, &table, &record, &snapshot, "max_deliveries", error)?;
            result = (outcome, Value::NULL);
        } else {
            let random = (msg_id as u64) ^ (mine.lease_id as u64).rotate_left(32);
            let wait_us = delay_us.unwrap_or_else(|| backoff_us(&policy, count.max(1), random));
            let now_us = clock::now().wall_us;
            let due_us = now_us.saturating_add(wait_us);
            let visible_at = if wait_us == 0 { Value::NULL } else { Value::of_time_us(due_us) };
            let error = error.map_or(Value::NULL, Value::of);
            if let Some(row) = rewrite(queue, msg_id, visible_at, count, error, &snapshot) {
                mine.then_wait(queue, row)?;
                result = ("retried", Value::of_time_us(due_us));
            } else {
                mine.let_go()?; // a trigger of the owner's kept the row as it was
            }
        }
    } else {
        mine.missed()?;
    }
    table.close(None, true);
    snapshot.done();
    Ok(result)
}

/// `queue_reject`: failed for good.
pub fn queue_reject(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let msg_id = args::msg_id(args, 1)?;
    let lease_id = args::lease_id(args, 2);
    let error = error_text(args, 3);
    let queue = resolve::open(&name, RowExclusiveLock)?;
    queue.check("reject messages of", &[Right::Select, Right::Delete], "SELECT and DELETE on its table")?;
    queue.check_lease("lease_id", lease_id)?;
    let Some(mine) = hold(&queue, msg_id, lease_id)? else { return Ok(Value::of("lost")) };
    let snapshot = Snapshot::latest();
    let Some(table) = Table::open(queue.relation, None) else { return Ok(Value::of("lost")) };
    let mut outcome = "lost";
    if let Some(record) = finish::pinned_record(&queue, &table, &mine.held, &snapshot) {
        outcome = bury(&queue, &mine, &table, &record, &snapshot, "rejected", error.as_deref())?;
    } else {
        mine.missed()?;
    }
    table.close(None, true);
    snapshot.done();
    Ok(Value::of(outcome))
}

/// `queue_release`: given back and not counted.
pub fn queue_release(args: &Args, rows: &mut Rows) -> Result<()> {
    let name = args::text(args, 0, "queue")?;
    let ids = args::ids(args, 1, 2)?;
    let delay_us = args::duration(args.value(3), "delay", settings::DELAY_US)?.filter(|us| *us > 0);
    let lock = if delay_us.is_some() { RowExclusiveLock } else { AccessShareLock };
    let queue = resolve::open(&name, lock)?;
    queue.check("release messages of", &[Right::Select, Right::Update], "SELECT and UPDATE on its table")?;
    for (_, lease_id) in &ids {
        queue.check_lease("lease_ids", *lease_id)?;
    }
    for chunk in ids.chunks(CHUNK_MAX) {
        for mine in hold_all(&queue, chunk)? {
            pgrx::check_for_interrupts!();
            if release(&queue, &mine, delay_us)? {
                rows.emit([Value::of(mine.held.msg_id)]);
            }
        }
    }
    Ok(())
}

fn is_there(queue: &Queue, msg_id: i64) -> bool {
    let snapshot = Snapshot::latest();
    let table = Table::open(queue.relation, None);
    let is_there = table.as_ref().is_some_and(|table| table.lookup(queue.key, msg_id, &snapshot).is_some());
    if let Some(table) = table {
        table.close(None, true);
    }
    snapshot.done();
    is_there
}

fn release(queue: &Queue, mine: &Mine, delay_us: Option<i64>) -> Result<bool> {
    let msg_id = mine.held.msg_id;
    if mine.lease_id == 0 {
        // Nobody holds it: there is nothing to give back. What is not there at all leaves nothing behind.
        if mine.is_known() || is_there(queue, msg_id) {
            mine.let_go()?;
        } else {
            mine.missed()?;
        }
        return Ok(false);
    }
    let count = mine.held.pinned.map_or(0, |p| p.count).saturating_sub(1);
    let Some(delay_us) = delay_us else {
        if mine.is_own {
            journal::own_set(queue.relation, msg_id, OwnThen::Wait(count))?;
        } else {
            journal::pinned_then(mine.at, msg_id, Then::Release);
        }
        return Ok(true);
    };
    let snapshot = Snapshot::latest();
    let visible_at = Value::of_time_us(clock::now().wall_us.saturating_add(delay_us));
    let row = rewrite(queue, msg_id, visible_at, count, Value::NULL, &snapshot);
    snapshot.done();
    match row {
        Some(row) => mine.then_wait(queue, row)?,
        None => mine.let_go()?,
    }
    Ok(row.is_some())
}

/// Lets a lease end `timeout_us` from now; returns that time (wall clock), or `None` if it is lost.
fn extend(
    queue: &Queue,
    ids: &[(i64, Option<i64>)],
    timeout_us: i64,
    mut done: impl FnMut(i64, i64),
) -> Result<()> {
    let unfenced = ids.iter().filter(|(_, lease_id)| lease_id.is_none());
    let mine = journal::leases_of(queue.at(), unfenced.map(|(msg_id, _)| *msg_id));
    for (msg_id, lease_id) in ids {
        let now = clock::now();
        let (until_us, wall_us) =
            (now.mono_us.saturating_add(timeout_us), now.wall_us.saturating_add(timeout_us));
        match journal::own_find(queue.relation, *msg_id, *lease_id) {
            Own::Yes(_, held) if held != 0 => {
                journal::own_set(queue.relation, *msg_id, OwnThen::Until(until_us))?;
                done(*msg_id, wall_us);
                continue;
            }
            Own::Yes(..) | Own::Lost => continue,
            Own::No => {}
        }
        let fence = match lease_id.or_else(|| mine.get(msg_id).copied()) {
            Some(lease_id) => Fence::Lease(lease_id),
            None => Fence::Any,
        };
        let extended = queue
            .with(|arena, at, now, fx| Some((arena.extend(at, *msg_id, fence, until_us, now, fx)?, at)))?;
        let Some(((ends_us, held), at)) = extended else { continue };
        journal::lengthened(at, *msg_id, held); // the last word counts
        if until_us < ends_us {
            journal::shorten(at, *msg_id, held, until_us)?;
        }
        done(*msg_id, wall_us);
    }
    Ok(())
}

fn open_to_extend(
    args: &Args,
    ids: &[(i64, Option<i64>)],
    argument: &'static str,
    timeout: Value,
) -> Result<(std::rc::Rc<Queue>, i64)> {
    let name = args::text(args, 0, "queue")?;
    let timeout_us = args::duration(timeout, "visibility_timeout", settings::LEASE_US)?;
    let queue = resolve::open(&name, AccessShareLock)?;
    queue.check("extend leases of", &[Right::Select, Right::Update], "SELECT and UPDATE on its table")?;
    for (_, lease_id) in ids {
        queue.check_lease(argument, *lease_id)?;
    }
    let timeout_us = timeout_us.unwrap_or(queue.settings.visibility_timeout_us);
    Ok((queue, timeout_us))
}

/// `queue_extend`: the time the lease ends, or null.
pub fn queue_extend(args: &Args) -> Result<Value> {
    let ids = [(args::msg_id(args, 1)?, args::lease_id(args, 2))];
    let (queue, timeout_us) = open_to_extend(args, &ids, "lease_id", args.value(3))?;
    let mut result = Value::NULL;
    extend(&queue, &ids, timeout_us, |_, ends_us| result = Value::of_time_us(ends_us))?;
    Ok(result)
}

/// `queue_extend_batch`: the ids whose leases were extended.
pub fn queue_extend_batch(args: &Args, rows: &mut Rows) -> Result<()> {
    let ids = args::ids(args, 1, 2)?;
    let (queue, timeout_us) = open_to_extend(args, &ids, "lease_ids", args.value(3))?;
    for chunk in ids.chunks(CHUNK_MAX) {
        extend(&queue, chunk, timeout_us, |msg_id, _| rows.emit([Value::of(msg_id)]))?;
        pgrx::check_for_interrupts!();
    }
    Ok(())
}

/// Deletes a row, which is locked, with whatever triggers its owner put there, with the owner's rights and not the
/// worker's.
fn delete_as_owner(queue: &Queue, msg_id: i64) -> Deleted {
    let statement = format!("DELETE FROM ONLY {} WHERE msg_id OPERATOR(pg_catalog.=) $1", queue.table_name());
    let outcome = user::acting_as(user::owner(queue.relation), || {
        spi::run(&statement, &[pg_sys::INT8OID.into()], &[Value::of(msg_id)])
    });
    if outcome.processed == 1 {
        Deleted::Ok
    } else {
        Deleted::Kept
    }
}

/// For the worker: deletes a row that was just found under `snapshot`, and waits for nobody. `Ok`: it was this
/// version; a later one may be none to be moved away.
pub fn delete_at_once(
    queue: &Queue,
    table: &Table,
    record: &Record,
    msg_id: i64,
    snapshot: &Snapshot,
) -> Deleted {
    crate::wait_point!("move-found");
    if table.is_plain_for_delete() {
        return table.delete(record.tid(), snapshot, false);
    }
    match table.lock(record.tid(), snapshot, false) {
        Deleted::Ok => delete_as_owner(queue, msg_id),
        other => other,
    }
}

/// For the worker: moves messages that had their last delivery, pinned by it, to where failures go. What
/// another transaction is at is left for later. Returns how many were left; and, if the time was over before the end, the
/// first one that it was not enough for.
pub fn bury_exhausted(
    queue: &Queue,
    at: QueueRef,
    pinned: &[queue_dispatch::Taken],
    until_us: i64,
) -> Result<(usize, Option<i64>)> {
    let snapshot = Snapshot::latest();
    let Some(table) = Table::open(queue.relation, None) else { return Ok((0, None)) };
    let mut left = 0;
    let mut rest = None;
    for (i, one) in pinned.iter().enumerate() {
        // Never none at all.
        if i > 0 && clock::now().mono_us > until_us {
            rest = Some(one.msg_id);
            for one in &pinned[i..] {
                finish::unpin(at, one.msg_id)?;
            }
            break;
        }
        snapshot.see_own(); // a trigger where another one went may have changed this one
        let found = super::take::find(queue, &table, one.tid, one.msg_id, &snapshot);
        let Some(record) = found else { continue };
        match delete_at_once(queue, &table, &record, one.msg_id, &snapshot) {
            Deleted::Ok => {
                dead_letter::bury(queue, dead_letter::copy(&record, one.count), "max_deliveries", None)?;
            }
            Deleted::Gone => {}
            Deleted::Moved | Deleted::Busy | Deleted::Kept => {
                finish::unpin(at, one.msg_id)?;
                left += 1;
            }
        }
    }
    table.close(None, true);
    snapshot.done();
    Ok((left, rest))
}
