//! Sending: rows are inserted, under the caller's own rights. On a table that is as queue_create made it they go past
//! the executor and are recorded here ([`insert`]); on one to which its owner has added something, by a statement.
//! Those, and plain INSERT, COPY and UPDATE, are recorded by the trigger on the table ([`on_change`]).

use crate::error::{Error, Result};
use crate::pg::call::{Args, Rows, Value};
use crate::pg::table::{self, Fired, RowExclusiveLock, Table};
use crate::pg::{clock, shmem, spi, xact};
use crate::queue::resolve::{self, For, Queue};
use crate::queue::{args, capture, column, entries, expires_us, journal, row_of};
use crate::settings;
use pgrx::pg_sys;
use queue_dispatch::Row;
use std::cell::Cell;

/// When a message becomes visible, as its row says it: null for at once.
fn visible_at(delay: Value, deliver_at: Value) -> Result<Value> {
    let delay_us = args::duration(delay, "delay", settings::DELAY_US)?;
    match (delay_us, deliver_at.time_us()) {
        (Some(_), Some(_)) => Err(Error::Arguments {
            message: "arguments \"delay\" and \"deliver_at\" exclude each other".into(),
            hint: Some("Give a duration or a time, not both.".into()),
        }),
        (_, Some(i64::MIN | i64::MAX)) => Err(Error::argument("deliver_at", "infinity", "a finite time")),
        (_, Some(at)) => Ok(Value::of_time_us(at)),
        (None | Some(0), None) => Ok(Value::NULL),
        (Some(us), None) => Ok(Value::of_time_us(clock::now().wall_us.saturating_add(us))),
    }
}

/// When a message expires: so long after it becomes visible.
fn expires_at(queue: &Queue, ttl_us: Option<i64>, visible_at: Value) -> Value {
    match ttl_us.unwrap_or(queue.settings.message_ttl_us) {
        0 => Value::NULL,
        ttl_us => {
            let from_us = visible_at.time_us().unwrap_or_else(|| clock::now().wall_us);
            let until_us = from_us.saturating_add(ttl_us);
            // A later time than Postgres has is never; written down it would be in no dump that can be restored.
            if until_us < clock::END_US {
                Value::of_time_us(until_us)
            } else {
                Value::NULL
            }
        }
    }
}

fn ttl_us(value: Value) -> Result<Option<i64>> {
    args::duration(value, "ttl", settings::TTL_US)
}

/// What to do where a message is null.
pub const MESSAGE_HINT: &str = "To send JSON null, write 'null'::jsonb.";

/// The error of an INSERT that the queue's trigger has not seen.
pub fn no_trigger(queue: &Queue) -> Error {
    Error::Broken {
        queue: queue.name.clone(),
        detail: "Its trigger \"pg_queue_change\" is missing or disabled, so the message would not be noticed."
            .into(),
    }
}

/// `queue_send`: one message; returns its id, or null if a trigger of the table's owner suppressed it.
pub fn send(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let message = args.value(1);
    if message.is_null() {
        return Err(Error::Null { argument: "message", hint: Some(MESSAGE_HINT) });
    }
    let visible_at = visible_at(args.value(3), args.value(4))?;
    args::unbuilt(args.value(5).i64().unwrap_or(0) == 0, "priority")?;
    args::unbuilt(args.value(6).is_null(), "group_key")?;
    args::unbuilt(args.value(7).is_null(), "dedup_key")?;
    let ttl_us = ttl_us(args.value(8))?;
    let queue = resolve::open(&name, RowExclusiveLock)?;
    let expires_at = expires_at(&queue, ttl_us, visible_at);
    let mut sent = Value::NULL;
    let given = [visible_at, args.value(2), message, expires_at];
    insert(&queue, std::iter::once(given), &mut |id| sent = Value::of(id))?;
    Ok(sent)
}

/// Sends one message that is visible at once, under the rights of whoever is the current role.
pub fn send_now(queue: &Queue, headers: Value, message: Value) -> Result<()> {
    let expires_at = expires_at(queue, None, Value::NULL);
    insert(queue, std::iter::once([Value::NULL, headers, message, expires_at]), &mut |_| ())
}

/// A message's row, as far as the sender gives it: `visible_at`, `headers`, `message`, `expires_at`.
type Given = [Value; 4];

/// Inserts messages under the caller's own rights, and calls `done` with each one's id, in order. Past the executor
/// where that goes past nothing, else by a statement. Also where there are none: only here is it asked whether the
/// caller may, and who may not must not keep the table's lock.
fn insert(queue: &Queue, rows: impl ExactSizeIterator<Item = Given>, done: &mut dyn FnMut(i64)) -> Result<()> {
    let Some(direct) = queue.direct.as_ref().filter(|_| queue.may_insert_directly()) else {
        return insert_by_statement(queue, rows, done);
    };
    let Some(table) = Table::open(queue.relation, None) else {
        return Err(Error::QueueUnknown { queue: queue.name.clone() });
    };
    journal::reserve_sent(rows.len())?;
    let mut due = Vec::with_capacity(rows.len());
    let mut expires_us = None;
    let rows = rows.inspect(|row| {
        due.push(row[0].time_us());
        expires_us = expires_us.into_iter().chain(row[3].time_us()).min();
    });
    let mut inserted = Vec::with_capacity(rows.len());
    direct.insert(&table, rows, &mut |msg_id, tid| inserted.push((msg_id, tid)));
    table.close(None, true);
    for ((msg_id, tid), visible_at_us) in inserted.into_iter().zip(due) {
        journal::sent(queue.relation, Row { msg_id, tid, visible_at_us, count: 0 })?;
        done(msg_id);
    }
    expires_us.map_or(Ok(()), |at_us| journal::expires(queue.relation, at_us))
}

fn insert_by_statement(
    queue: &Queue,
    rows: impl ExactSizeIterator<Item = Given>,
    done: &mut dyn FnMut(i64),
) -> Result<()> {
    let (mut due, mut headers, mut messages, mut ends) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for [visible_at, header, message, expires_at] in rows {
        ends.push(expires_at);
        due.push(visible_at);
        headers.push(header);
        messages.push(message);
    }
    let mut values = vec![
        Value::array(pg_sys::TIMESTAMPTZOID.into(), &due),
        Value::array(pg_sys::JSONBOID.into(), &headers),
        Value::array(pg_sys::JSONBOID.into(), &messages),
    ];
    // Who may insert into some columns only need not have a right on this one where nothing expires.
    let does_expire = queue.settings.message_ttl_us > 0 || ends.iter().any(|end| !end.is_null());
    if does_expire {
        values.push(Value::array(pg_sys::TIMESTAMPTZOID.into(), &ends));
    }
    let plan = send_plan(queue, does_expire);
    let (outcome, ids) = capture::sending(queue.relation, || plan.run(&values, None));
    if (ids.len() as u64) < outcome.processed {
        return Err(no_trigger(queue));
    }
    ids.into_iter().for_each(done);
    Ok(())
}

/// The statement that inserts rows given as an array for each column, with `expires_at` or without.
fn send_plan(queue: &Queue, does_expire: bool) -> spi::Plan {
    let (purpose, column, value, array) = if does_expire {
        (For::SendExpiring, ", expires_at", ", e", ", pg_catalog.unnest($4)")
    } else {
        (For::Send, "", "", "")
    };
    queue.plan(purpose, || {
        // The row's number keeps the ids in the order of the input.
        let statement = format!(
            "INSERT INTO {} (visible_at, headers, message{column}) SELECT v, h, m{value} FROM ROWS FROM \
             (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3){array}) WITH ORDINALITY \
             AS input (v, h, m{value}, n) ORDER BY n",
            queue.table_name()
        );
        let times = pg_sys::TIMESTAMPTZARRAYOID.into();
        let types = [times, pg_sys::JSONBARRAYOID.into(), pg_sys::JSONBARRAYOID.into(), times];
        spi::prepare(&statement, &types[..if does_expire { 4 } else { 3 }])
    })
}

/// `queue_send_batch`: all or nothing; returns the ids in the order of the input.
pub fn send_batch(args: &Args, rows: &mut Rows) -> Result<()> {
    let name = args::text(args, 0, "queue")?;
    let messages = args::array(args, 1, "messages")?;
    if messages.iter().any(|m| m.is_null()) {
        return Err(Error::Null { argument: "messages", hint: Some(MESSAGE_HINT) });
    }
    let len = messages.len();
    let headers = args::array_beside(args, 2, "headers", len)?.unwrap_or_else(|| vec![Value::NULL; len]);
    let visible_at = visible_at(args.value(3), args.value(4))?;
    args::unbuilt(args.value(5).i64().unwrap_or(0) == 0, "priority")?;
    args::unbuilt(args.value(6).is_null(), "group_keys")?;
    args::unbuilt(args.value(7).is_null(), "dedup_keys")?;
    let ttl_us = ttl_us(args.value(8))?;
    let queue = resolve::open(&name, RowExclusiveLock)?;
    let expires_at = expires_at(&queue, ttl_us, visible_at);
    let given =
        headers.into_iter().zip(messages).map(|(header, message)| [visible_at, header, message, expires_at]);
    insert(&queue, given, &mut |msg_id| rows.emit([Value::of(msg_id)]))
}

/// `queue_send_entries`: a JSON array of objects with queue_send's argument names.
pub fn send_entries(args: &Args, rows: &mut Rows) -> Result<()> {
    let name = args::text(args, 0, "queue")?;
    let text = args.value(1).jsonb_text().ok_or(Error::Null { argument: "entries", hint: None })?;
    let elements = entries::elements(&text, settings::BATCH_MAX).map_err(|problem| match problem {
        entries::Problem::NoArray => Error::Arguments {
            message: "argument \"entries\" must be a JSON array".into(),
            hint: Some("Each element is an object with the argument names of queue_send.".into()),
        },
        entries::Problem::TooMany(count) => Error::argument(
            "entries",
            format!("{count} elements"),
            format!("at most {} elements", settings::BATCH_MAX),
        ),
    })?;
    let queue = resolve::open(&name, RowExclusiveLock)?;
    let mut given: Vec<Given> = Vec::with_capacity(elements.len());
    for (index, element) in elements.into_iter().enumerate() {
        let entry = entries::entry(element).map_err(|problem| Error::Entry { index, problem })?;
        args::unbuilt(entry.priority.unwrap_or(0) == 0, "priority")?;
        args::unbuilt(entry.group_key.is_none(), "group_key")?;
        args::unbuilt(entry.dedup_key.is_none(), "dedup_key")?;
        let ttl = entry.ttl.as_deref().map_or(Value::NULL, Value::of_interval_text);
        let delay = entry.delay.as_deref().map_or(Value::NULL, Value::of_interval_text);
        let deliver_at = entry.deliver_at.as_deref().map_or(Value::NULL, Value::of_time_text);
        let visible_at = visible_at(delay, deliver_at)?;
        given.push([
            visible_at,
            entry.headers.map_or(Value::NULL, |h| Value::of_jsonb_text(h.get())),
            Value::of_jsonb_text(entry.message.get()),
            expires_at(&queue, ttl_us(ttl)?, visible_at),
        ]);
    }
    insert(&queue, given.into_iter(), &mut |msg_id| rows.emit([Value::of(msg_id)]))
}

thread_local! {
    /// The table last found to have a queue's columns: a trigger fires many times for the same one.
    static KNOWN: Cell<u32> = const { Cell::new(0) };
    /// A table, and the sequence of its identity.
    static IDENTITY: Cell<(u32, Option<u32>)> = const { Cell::new((0, None)) };
    /// A table, a client's statement, and the last id that the identity had given when it was looked at.
    static LAST_GIVEN: Cell<(u32, i64, i64)> = const { Cell::new((0, 0, 0)) };
}

/// Forgets which table was found to be a queue's, and its identity.
pub fn invalidated() {
    KNOWN.set(0);
    IDENTITY.set((0, None));
}

/// The trigger on every queue's table, AFTER INSERT OR UPDATE for each row and AFTER TRUNCATE.
pub fn on_change(args: &Args) -> Result<Value> {
    let fired = args.fired().ok_or_else(|| Error::Unsupported {
        what: "this function is the trigger of a queue's table and nothing else".into(),
        hint: None,
    })?;
    if !shmem::is_available() {
        return Ok(Value::no_row()); // nobody is to be told, and no callback at the end would clear what is recorded
    }
    match fired {
        Fired::Truncated(relation) => journal::emptied(relation)?,
        Fired::Inserted(relation, record) => {
            check_columns(relation)?;
            let row = row_of(&record);
            let is_ours = capture::inserted(relation, row.msg_id);
            journal::sent(relation, row)?;
            if xact::is_replica() {
                journal::replicated(relation)?;
            } else if !is_ours && is_ahead(relation, row.msg_id) {
                journal::id_is_ahead(relation)?;
            }
            expires_us(&record).map_or(Ok(()), |at_us| journal::expires(relation, at_us))?;
        }
        Fired::Updated(relation, old, new) => {
            check_columns(relation)?;
            journal::updated(relation, row_of(&old).msg_id, row_of(&new))?;
            expires_us(&new).map_or(Ok(()), |at_us| journal::expires(relation, at_us))?;
        }
    }
    Ok(Value::no_row())
}

/// Whether the identity has not given this id yet, and so will: then the send that gets it fails. The worker raises it
/// (`raise_identity`). Triggers fire when their statement has given all its ids, so a statement looks once or twice.
fn is_ahead(relation: u32, msg_id: i64) -> bool {
    let now = xact::statement_start();
    let (of, statement, known) = LAST_GIVEN.get();
    if of == relation && statement == now && msg_id <= known {
        return false;
    }
    if IDENTITY.get().0 != relation {
        IDENTITY.set((relation, table::identity_sequence(relation, column::MSG_ID as i16)));
    }
    // Without an identity (any more) the ids are its owner's affair.
    let last = IDENTITY.get().1.and_then(table::sequence_last).unwrap_or(i64::MAX);
    LAST_GIVEN.set((relation, now, last));
    msg_id > last
}

fn check_columns(relation: u32) -> Result<()> {
    if KNOWN.get() == relation {
        return Ok(());
    }
    let table = Table::open(relation, None);
    let is_queue = table.as_ref().is_some_and(|t| resolve::columns_are_ours(&t.columns()));
    if let Some(table) = table {
        table.close(None, true);
    }
    if !is_queue {
        return Err(Error::Unsupported {
            what: "this trigger belongs on tables that queue_create made".into(),
            hint: None,
        });
    }
    crate::pg::hooks::watch_relations();
    KNOWN.set(relation);
    Ok(())
}
