//! Bringing messages back: dead letters to where they came from ([`queue_redrive`]), archived messages into their
//! queue ([`queue_unarchive`]). They come back as new messages, under new ids. A move is one transaction, the
//! caller's: deleted here and inserted there, or neither. Nothing is waited for: what another transaction is at
//! stays where it is.
//!
//! A dead letter is a message of a queue that has consumers of its own. So it is moved as it would be cancelled:
//! pinned in the dispatcher unless somebody holds it, verified, deleted; and only what was deleted is inserted. An
//! archive has no dispatcher: a statement does it.
//!
//! Taking out runs with the owner's rights where the caller, who has TRUNCATE and SELECT, lacks others. Putting in needs
//! INSERT. Into a queue that the caller names it is an INSERT of his own; into one that a message names it runs with
//! that queue's owner's rights: whoever can send to a dead-letter queue can write such a header, and must not choose
//! whose triggers run as the caller.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Value};
use crate::pg::spi;
use crate::pg::table::{Deleted, Record, RowExclusiveLock, Snapshot, Table};
use crate::pg::user::{self, Right};
use crate::queue::finish::{self, Target};
use crate::queue::journal::{self, OwnThen};
use crate::queue::resolve::{self, For, Queue};
use crate::queue::take::find;
use crate::queue::{args, capture, column, dead_letter, send};
use crate::settings;
use pgrx::pg_sys;
use queue_dispatch::{QueueRef, CHUNK_MAX};
use std::collections::HashMap;
use std::rc::Rc;

/// How many messages a call is to bring back; null = all.
fn quantity(args: &Args, position: usize) -> Result<u64> {
    let range = settings::BROUGHT_BACK;
    args::number(args, position, "quantity", *range.end(), range).map(i64::unsigned_abs)
}

/// A queue whose table one must have these rights on.
fn open_source(name: &str, action: &'static str, rights: &[Right], needs: &str) -> Result<Rc<Queue>> {
    let queue = resolve::open(name, RowExclusiveLock)?;
    queue.check(action, rights, needs)?;
    Ok(queue)
}

/// A queue that messages are put into. Who may not keeps no lock on its table, also if nothing is moved.
fn open_goal(name: &str) -> Result<Rc<Queue>> {
    let queue = resolve::open(name, RowExclusiveLock)?;
    if !user::may_insert(queue.relation) {
        return Err(Error::Denied {
            action: "move messages into",
            queue: queue.name.clone(),
            needs: "INSERT on its table".into(),
        });
    }
    Ok(queue)
}

/// Does `f` with the caller's rights if he has all that taking messages out needs, else with the owner's.
fn taking_out<R>(queue: &Queue, f: impl FnOnce() -> R) -> R {
    // A row lock needs UPDATE.
    if user::has_rights(queue.relation, &[Right::Select, Right::Update, Right::Delete]) {
        f()
    } else {
        user::acting_as(user::owner(queue.relation), f)
    }
}

fn bigints(ids: &[i64]) -> Value {
    let values: Vec<Value> = ids.iter().map(|id| Value::of(*id)).collect();
    Value::array(pg_sys::INT8OID.into(), &values)
}

/// A table of the queue's does not take what is to be inserted.
fn kept_out(queue: &Queue) -> Error {
    Error::Broken {
        queue: queue.name.clone(),
        detail: "A trigger or a rule of its table keeps a message out that was to come back.".into(),
    }
}

// ---- dead letters ------------------------------------------------------------------------------------------

/// A call of `queue_redrive`.
struct Redrive {
    queue: Rc<Queue>,
    /// Only what came from this queue.
    source: Option<String>,
    /// Where all of it goes, whatever it came from.
    target: Option<Rc<Queue>>,
    /// The queues it went to so far, by name.
    sources: HashMap<String, Rc<Queue>>,
}

/// `queue_redrive`: how many messages were moved.
pub fn queue_redrive(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "dead_letter_queue")?;
    let quantity = quantity(args, 1)?;
    let (target, source) = (args.value(2).text(), args.value(3).text());
    let ids = args::ids_if_any(args, 4)?;
    if target.as_ref() == Some(&name) {
        return Err(Error::Arguments {
            message: format!("messages of queue \"{name}\" cannot be moved to the same queue"),
            hint: Some("Give another queue as target.".into()),
        });
    }
    // What is taken out may be read where it goes: who may not read it here must not take it there.
    let rights = [Right::Truncate, Right::Select];
    let queue = open_source(&name, "redrive messages of", &rights, "TRUNCATE and SELECT on its table")?;
    let target = target.map(|target| open_goal(&target)).transpose()?;
    let mut redrive = Redrive { queue, source, target, sources: HashMap::new() };
    if let (Some(source), None) = (redrive.source.clone(), &redrive.target) {
        redrive.goal(&source)?; // a name that is mistaken is told also where it matches nothing
    }
    redrive.run(quantity, ids.as_deref()).map(|moved| Value::of(moved as i64))
}

impl Redrive {
    /// Moves up to `quantity` messages, a chunk at a time.
    fn run(&mut self, quantity: u64, ids: Option<&[i64]>) -> Result<u64> {
        // What comes in from now on is the next call's: this one comes to an end.
        let last = spi::in_passing(|| self.last_id());
        let (mut moved, mut from) = (0, Some(i64::MIN));
        while let Some(id) = from.filter(|_| moved < quantity) {
            let most = (quantity - moved).min(CHUNK_MAX as u64) as usize;
            let (more, next) = spi::in_passing(|| self.chunk(id..=last, most, ids))?;
            moved += more;
            from = next;
            pgrx::check_for_interrupts!();
        }
        Ok(moved)
    }

    /// The highest id there is now.
    fn last_id(&self) -> i64 {
        let statement = format!("SELECT pg_catalog.max(msg_id) FROM ONLY {}", self.queue.table_name());
        let snapshot = Snapshot::latest();
        let outcome = taking_out(&self.queue, || spi::look(&statement, &[], &[]));
        snapshot.done();
        outcome.rows.first().and_then(|row| row[0].i64()).unwrap_or(i64::MIN)
    }

    /// Moves up to `most` messages of a range. Returns how many, and the id to go on from.
    fn chunk(
        &mut self,
        range: std::ops::RangeInclusive<i64>,
        most: usize,
        ids: Option<&[i64]>,
    ) -> Result<(u64, Option<i64>)> {
        let last = *range.end();
        // Of ids that were given, too, a chunk at a time.
        let ids = ids.map(|ids| &ids[ids.partition_point(|id| id < range.start())..]);
        let ids = ids.map(|ids| &ids[..ids.len().min(most)]);
        let snapshot = Snapshot::latest();
        let found = self.select(range, ids, most);
        snapshot.done();
        let reached = match ids {
            Some(ids) => ids.last().copied(),
            None => found.last().map(|(msg_id, _)| *msg_id),
        };
        let moved = if found.is_empty() { 0 } else { self.move_all(&found)? };
        Ok((moved, reached.and_then(|id| id.checked_add(1)).filter(|next| *next <= last)))
    }

    /// The messages of a range that are to be moved, under the active snapshot, in the order of their ids, each with
    /// the name of the queue it came from.
    fn select(
        &self,
        range: std::ops::RangeInclusive<i64>,
        ids: Option<&[i64]>,
        most: usize,
    ) -> Vec<(i64, Option<String>)> {
        let chosen = match ids {
            Some(_) => "msg_id OPERATOR(pg_catalog.=) ANY ($3)",
            None => "$3 IS NULL",
        };
        let statement = format!(
            "SELECT msg_id, {source} FROM ONLY {table} WHERE msg_id OPERATOR(pg_catalog.>=) $1 \
             AND msg_id OPERATOR(pg_catalog.<=) $2 AND {chosen} \
             AND ($4 IS NULL OR {source} OPERATOR(pg_catalog.=) $4) AND ($5 OR {source} IS NOT NULL) \
             ORDER BY msg_id LIMIT $6",
            source = dead_letter::SOURCE,
            table = self.queue.table_name(),
        );
        let types = [
            pg_sys::INT8OID,
            pg_sys::INT8OID,
            pg_sys::INT8ARRAYOID,
            pg_sys::TEXTOID,
            pg_sys::BOOLOID,
            pg_sys::INT8OID,
        ]
        .map(u32::from);
        let values = [
            Value::of(*range.start()),
            Value::of(*range.end()),
            ids.map_or(Value::NULL, bigints),
            self.source.as_deref().map_or(Value::NULL, Value::of),
            Value::of(self.target.is_some()),
            Value::of(most as i64),
        ];
        let outcome = taking_out(&self.queue, || spi::look(&statement, &types, &values));
        outcome.rows.iter().filter_map(|row| Some((row[0].i64()?, row[1].text()))).collect()
    }

    /// Moves (at most [`CHUNK_MAX`]) messages, except those that somebody is at.
    fn move_all(&mut self, found: &[(i64, Option<String>)]) -> Result<u64> {
        let queue = self.queue.clone();
        let ids: Vec<_> = found.iter().map(|(msg_id, _)| (*msg_id, None)).collect();
        let (at, mut targets) = finish::targets(&queue, &ids, true)?;
        targets.sort_unstable_by_key(|target| target.msg_id); // own ones are among the others
        crate::wait_point!("redrive-pinned");
        let Some(table) = Table::open(queue.relation, None) else {
            return Err(Error::QueueUnknown { queue: queue.name.clone() });
        };
        let mut held: Vec<i64> = targets.iter().map(|target| target.msg_id).collect();
        if !table.is_plain_for_delete() {
            held = self.lock_rows(&held);
        }
        // One snapshot for what decides and for what is moved: the same version of the row.
        let snapshot = Snapshot::latest();
        let verified: HashMap<i64, Option<String>> =
            self.select(i64::MIN..=i64::MAX, Some(&held), held.len()).into_iter().collect();
        let mut moved = 0;
        for target in &targets {
            let goal = match verified.get(&target.msg_id) {
                Some(source) => self.goal_of(source.as_deref())?,
                None => None,
            };
            if self.move_one(&table, at, target, goal, &snapshot)? {
                moved += 1;
            }
        }
        table.close(None, true);
        snapshot.done();
        Ok(moved)
    }

    /// Locks rows for a statement that is to delete them; returns the ids of those that nobody is at.
    fn lock_rows(&self, ids: &[i64]) -> Vec<i64> {
        let statement = format!(
            "SELECT msg_id FROM ONLY {} WHERE msg_id OPERATOR(pg_catalog.=) ANY ($1) FOR UPDATE SKIP LOCKED",
            self.queue.table_name()
        );
        let outcome =
            taking_out(&self.queue, || spi::run(&statement, &[pg_sys::INT8ARRAYOID.into()], &[bigints(ids)]));
        outcome.rows.iter().filter_map(|row| row[0].i64()).collect()
    }

    /// Deletes a message and inserts it into the queue `goal`; whether it did. `None`: it is to stay.
    fn move_one(
        &self,
        table: &Table,
        at: QueueRef,
        target: &Target,
        goal: Option<Rc<Queue>>,
        snapshot: &Snapshot,
    ) -> Result<bool> {
        let queue = &*self.queue;
        snapshot.see_own(); // a trigger where another one went may have changed this one
        let record = find(queue, table, target.tid, target.msg_id, snapshot);
        let deleted = match (&record, &goal) {
            (Some(record), Some(_)) if table.is_plain_for_delete() => {
                table.delete(record.tid(), snapshot, false)
            }
            (Some(record), Some(_)) => {
                taking_out(queue, || finish::delete_row(queue, table, record.tid(), target.msg_id, snapshot))?
            }
            (Some(_), None) => Deleted::Kept,
            // The pin stays until the end of the transaction, as in a finish.
            (None, _) => Deleted::Gone,
        };
        match (deleted, record, goal) {
            (Deleted::Ok, Some(record), Some(goal)) => {
                if target.is_own {
                    journal::own_set(queue.relation, target.msg_id, OwnThen::Finish)?;
                }
                let put = || insert(&goal, &record);
                user::hiding_rows(queue.relation, || match self.target {
                    Some(_) => put(),
                    None => user::acting_as(user::owner(goal.relation), put),
                })?;
                Ok(true)
            }
            (Deleted::Gone, ..) => Ok(false),
            _ => {
                if target.is_pinned {
                    finish::unpin(at, target.msg_id)?;
                }
                Ok(false)
            }
        }
    }

    /// Where a message goes that came from the queue `source`. `None`: it stays.
    fn goal_of(&mut self, source: Option<&str>) -> Result<Option<Rc<Queue>>> {
        match (&self.target, source) {
            (Some(target), _) => Ok(Some(target.clone())),
            (None, Some(source)) => self.goal(source),
            (None, None) => Ok(None),
        }
    }

    /// The queue of that name. `None`: it is the one whose messages are moved.
    fn goal(&mut self, source: &str) -> Result<Option<Rc<Queue>>> {
        if source == self.queue.name {
            return Ok(None);
        }
        if let Some(queue) = self.sources.get(source) {
            return Ok(Some(queue.clone()));
        }
        let queue = open_goal(source).map_err(|error| match error {
            Error::QueueUnknown { queue } => Error::Unknown {
                kind: "queue",
                name: queue,
                hint: Some("Give another queue as target.".into()),
            },
            other => other,
        })?;
        self.sources.insert(source.to_owned(), queue.clone());
        Ok(Some(queue))
    }
}

/// Inserts a dead letter as the message it was.
fn insert(goal: &Queue, record: &Record) -> Result<()> {
    let plan = goal.plan(For::Redrive, || {
        spi::prepare(
            &format!(
                "INSERT INTO {} (priority, group_key, headers, message) SELECT $1, $2, {}, $4",
                goal.table_name(),
                dead_letter::HEADERS_BEFORE
            ),
            &[pg_sys::INT2OID, pg_sys::TEXTOID, pg_sys::JSONBOID, pg_sys::JSONBOID].map(u32::from),
        )
    });
    let values = [column::PRIORITY, column::GROUP_KEY, column::HEADERS, column::MESSAGE]
        .map(|column| record.value(column));
    let (outcome, ids) = capture::sending(goal.relation, || plan.run(&values, None));
    match (outcome.processed, ids.len()) {
        (1, 1) => Ok(()),
        (1, _) => Err(send::no_trigger(goal)),
        _ => Err(kept_out(goal)),
    }
}

// ---- the archive -------------------------------------------------------------------------------------------

/// Messages moved by one statement: more than are pinned at a time, for each statement looks for the oldest anew.
const UNARCHIVE_CHUNK: u64 = 10_000;

/// `queue_unarchive`: how many messages were moved.
pub fn queue_unarchive(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let quantity = quantity(args, 1)?;
    let reason = args.value(2).text();
    let ids = args::ids_if_any(args, 3)?;
    let action = "bring back archived messages of";
    let queue = open_source(&name, action, &[Right::Truncate], "TRUNCATE on its table")?;
    check_archive(&queue, action)?;
    let statement = unarchive_statement(&queue, reason.is_some(), ids.is_some())?;
    let (mut moved, mut oldest_us) = (0, i64::MIN);
    while moved < quantity {
        let most = (quantity - moved).min(UNARCHIVE_CHUNK);
        let (more, newest_us) = spi::in_passing(|| {
            unarchive(&queue, &statement, most, oldest_us, reason.as_deref(), ids.as_deref())
        })?;
        moved += more;
        if more < most {
            break;
        }
        oldest_us = newest_us;
        pgrx::check_for_interrupts!();
    }
    Ok(Value::of(moved as i64))
}

/// Refuses one who may not read the whole archive: he could read in the queue what he brings back.
fn check_archive(queue: &Queue, action: &'static str) -> Result<()> {
    if resolve::archive_name(queue.archive).is_none() {
        return Err(Error::Broken { queue: queue.name.clone(), detail: "Its archive is missing.".into() });
    }
    if !user::has_rights(queue.archive, &[Right::Select]) {
        let (queue, needs) = (queue.name.clone(), "SELECT on its archive".into());
        return Err(Error::Denied { action, queue, needs });
    }
    if user::is_row_filtered(queue.archive) {
        return Err(Error::Unsupported {
            what: format!("cannot {action} queue \"{}\" under row-level security", queue.name),
            hint: Some("Use a role that bypasses row-level security.".into()),
        });
    }
    Ok(())
}

/// What moves one chunk: `$1` at most so many, `$2` archived no earlier than this, `$3` the reason, `$4` the ids.
fn unarchive_statement(queue: &Queue, by_reason: bool, by_ids: bool) -> Result<String> {
    let Some(archive) = resolve::archive_name(queue.archive) else {
        return Err(Error::Broken { queue: queue.name.clone(), detail: "Its archive is missing.".into() });
    };
    let reason = if by_reason { "archive_reason OPERATOR(pg_catalog.=) $3" } else { "$3 IS NULL" };
    let ids = if by_ids { "msg_id OPERATOR(pg_catalog.=) ANY ($4)" } else { "$4 IS NULL" };
    Ok(format!(
        "WITH gone AS ( \
           DELETE FROM ONLY queue_archive.{archive} WHERE ctid OPERATOR(pg_catalog.=) ANY (ARRAY( \
             SELECT ctid FROM ONLY queue_archive.{archive} \
             WHERE archived_at OPERATOR(pg_catalog.>=) $2 AND {reason} AND {ids} \
             ORDER BY archived_at, msg_id LIMIT $1 FOR UPDATE SKIP LOCKED)) \
           RETURNING msg_id, archived_at, priority, group_key, headers, message \
         ), back AS ( \
           INSERT INTO {table} (priority, group_key, headers, message) \
           SELECT priority, group_key, headers, message FROM gone ORDER BY archived_at, msg_id \
           RETURNING msg_id \
         ) SELECT (SELECT pg_catalog.count(*) FROM gone), (SELECT pg_catalog.count(*) FROM back), \
             (SELECT pg_catalog.max(archived_at) FROM gone)",
        archive = spi::quoted(&archive),
        table = queue.table_name(),
    ))
}

/// Moves one chunk, with the owner's rights. Returns how many, and when the last of them was archived.
fn unarchive(
    queue: &Queue,
    statement: &str,
    most: u64,
    oldest_us: i64,
    reason: Option<&str>,
    ids: Option<&[i64]>,
) -> Result<(u64, i64)> {
    let types = [pg_sys::INT8OID, pg_sys::TIMESTAMPTZOID, pg_sys::TEXTOID, pg_sys::INT8ARRAYOID].map(u32::from);
    let values = [
        Value::of(most as i64),
        Value::of_time_us(oldest_us),
        reason.map_or(Value::NULL, Value::of),
        ids.map_or(Value::NULL, bigints),
    ];
    let (outcome, sent) = capture::sending(queue.relation, || {
        user::hiding_rows(queue.archive, || {
            user::acting_as(user::owner(queue.relation), || spi::run(statement, &types, &values))
        })
    });
    let row = outcome.rows.first();
    let count = |i: usize| row.and_then(|row| row[i].i64()).unwrap_or(0);
    let (gone, back) = (count(0), count(1));
    if back < gone {
        return Err(kept_out(queue));
    }
    if (sent.len() as i64) < back {
        return Err(send::no_trigger(queue));
    }
    let newest_us = row.and_then(|row| row[2].time_us()).unwrap_or(oldest_us);
    Ok((gone.unsigned_abs(), newest_us))
}
