//! What failed for good: moving messages to a dead-letter queue or an archive. Always in the transaction that
//! deletes them, always after the deletion and only what it deleted, with the rights of the queue's owner: a
//! consumer who may finish messages needs no rights on the tables they go to. A trigger or a rule of that owner's may
//! have them arrive elsewhere, or nowhere: they count as moved all the same (to come back, they must arrive: `redrive`).

use crate::error::Result;
use crate::pg::call::Value;
use crate::pg::table::{self, Record, RowExclusiveLock};
use crate::pg::{clock, spi, user};
use crate::queue::column;
use crate::queue::resolve::{self, For, Queue};
use pgrx::pg_sys;

/// A message, copied out of its row.
pub struct Copied {
    values: [Value; 9],
    count: u32,
}

/// Copies a row. `count`: deliveries that the dispatcher knows of.
pub fn copy(record: &Record, count: u32) -> Copied {
    let mut values = [Value::NULL; 9];
    for (i, value) in values.iter_mut().enumerate() {
        *value = record.value(i + 1);
    }
    let in_row = record.value(column::DELIVERY_COUNT).get::<i32>().unwrap_or(0).max(0) as u32;
    Copied { values, count: count.max(in_row) }
}

/// Writes a message to its queue's archive.
pub fn archive(queue: &Queue, row: Copied, reason: &str) -> Result<()> {
    archive_with(queue, row, reason, None)
}

fn archive_with(queue: &Queue, row: Copied, reason: &str, error: Option<&str>) -> Result<()> {
    let Some(name) = resolve::archive_name(queue.archive) else {
        return Err(crate::Error::Broken {
            queue: queue.name.clone(),
            detail: "Its archive is missing.".into(),
        });
    };
    let plan = queue.plan(For::Archive, || {
        spi::prepare(
            &format!(
                "INSERT INTO queue_archive.{} (msg_id, enqueued_at, visible_at, delivery_count, priority, \
                 group_key, headers, message, last_error, archive_reason) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
                spi::quoted(&name)
            ),
            &[
                pg_sys::INT8OID.into(),
                pg_sys::TIMESTAMPTZOID.into(),
                pg_sys::TIMESTAMPTZOID.into(),
                pg_sys::INT4OID.into(),
                pg_sys::INT2OID.into(),
                pg_sys::TEXTOID.into(),
                pg_sys::JSONBOID.into(),
                pg_sys::JSONBOID.into(),
                pg_sys::TEXTOID.into(),
                pg_sys::TEXTOID.into(),
            ],
        )
    });
    let v = row.values;
    let values = [
        v[column::MSG_ID - 1],
        v[column::ENQUEUED_AT - 1],
        v[column::VISIBLE_AT - 1],
        Value::of(row.count.min(i32::MAX as u32) as i32),
        v[column::PRIORITY - 1],
        v[column::GROUP_KEY - 1],
        v[column::HEADERS - 1],
        v[column::MESSAGE - 1],
        error.map_or(v[column::LAST_ERROR - 1], Value::of),
        Value::of(reason),
    ];
    as_owner(queue.relation, || plan.run(&values, None));
    Ok(())
}

fn as_owner<R>(relation: u32, f: impl FnOnce() -> R) -> R {
    user::hiding_rows(relation, || user::acting_as(user::owner(relation), f))
}

/// The dead-letter queue, if there is (still) one. One that is gone leaves the archive.
fn target(queue: &Queue) -> Option<(u32, String)> {
    let oid = queue.settings.dead_letter_queue?;
    let name = user::relation_name(oid)?;
    (resolve::find_table(&name) == Some(oid)).then_some((oid, name))
}

/// Locks the table that a queue's failures go to, for one who does not wait. False: somebody is in the way.
pub fn try_lock_target(queue: &Queue) -> bool {
    table::try_lock(target(queue).map_or(queue.archive, |(oid, _)| oid), RowExclusiveLock)
}

/// The headers of a dead letter, made of a message's headers `$3` and what is to be known of the failure, `d.letter`.
/// Keys stay where they are; what has none is kept inside, and so is an earlier failure's `dead_letter`.
const HEADERS: &str = "CASE \
    WHEN $3 IS NULL THEN pg_catalog.jsonb_build_object('dead_letter', d.letter) \
    WHEN pg_catalog.jsonb_typeof($3) OPERATOR(pg_catalog.<>) 'object' OR $3 OPERATOR(pg_catalog.=) '{}' \
    THEN pg_catalog.jsonb_build_object('dead_letter', \
      d.letter OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object('headers', $3)) \
    WHEN $3 OPERATOR(pg_catalog.?) 'dead_letter' \
    THEN $3 OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object('dead_letter', \
      d.letter OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object('dead_letter', \
        $3 OPERATOR(pg_catalog.->) 'dead_letter')) \
    ELSE $3 OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object('dead_letter', d.letter) END";

/// The name of the queue that a dead letter with headers `headers` comes from; null for a message that is none.
pub const SOURCE: &str =
    "CASE WHEN pg_catalog.jsonb_typeof(headers OPERATOR(pg_catalog.#>) '{dead_letter,queue}') \
    OPERATOR(pg_catalog.=) 'string' THEN headers OPERATOR(pg_catalog.#>>) '{dead_letter,queue}' END";

/// The way back from [`HEADERS`]: what the headers `$3` of a dead letter were before. Those of a message that is no
/// dead letter stay as they are.
pub const HEADERS_BEFORE: &str = "CASE \
    WHEN pg_catalog.jsonb_typeof($3 OPERATOR(pg_catalog.#>) '{dead_letter,queue}') OPERATOR(pg_catalog.=) 'string' \
    THEN CASE \
      WHEN ($3 OPERATOR(pg_catalog.->) 'dead_letter') OPERATOR(pg_catalog.?) 'headers' \
      THEN $3 OPERATOR(pg_catalog.#>) '{dead_letter,headers}' \
      WHEN ($3 OPERATOR(pg_catalog.->) 'dead_letter') OPERATOR(pg_catalog.?) 'dead_letter' \
      THEN $3 OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object('dead_letter', \
        $3 OPERATOR(pg_catalog.#>) '{dead_letter,dead_letter}') \
      WHEN ($3 OPERATOR(pg_catalog.-) 'dead_letter') OPERATOR(pg_catalog.<>) '{}' \
      THEN $3 OPERATOR(pg_catalog.-) 'dead_letter' END \
    ELSE $3 END";

/// Moves a message that was deleted to where its queue's failures go. Returns `dead_lettered` or `archived`.
pub fn bury(queue: &Queue, row: Copied, reason: &str, error: Option<&str>) -> Result<&'static str> {
    let Some((_, target)) = target(queue) else {
        archive_with(queue, row, reason, error)?;
        return Ok("archived");
    };
    let v = row.values;
    let last_error = error.map_or(v[column::LAST_ERROR - 1], Value::of);
    let statement = format!(
        "INSERT INTO queue.{} (priority, group_key, headers, message, last_error) \
         SELECT $1, $2, {HEADERS}, $4, $5 \
         FROM (SELECT pg_catalog.jsonb_build_object( \
           'queue', $6, 'msg_id', $7, 'reason', $8, 'error', $5, 'at', $9, 'delivery_count', $10)) AS d (letter)",
        spi::quoted(&target)
    );
    let types = [
        pg_sys::INT2OID,
        pg_sys::TEXTOID,
        pg_sys::JSONBOID,
        pg_sys::JSONBOID,
        pg_sys::TEXTOID,
        pg_sys::TEXTOID,
        pg_sys::INT8OID,
        pg_sys::TEXTOID,
        pg_sys::TIMESTAMPTZOID,
        pg_sys::INT4OID,
    ]
    .map(u32::from);
    let values = [
        v[column::PRIORITY - 1],
        v[column::GROUP_KEY - 1],
        v[column::HEADERS - 1],
        v[column::MESSAGE - 1],
        last_error,
        Value::of(queue.name.as_str()),
        v[column::MSG_ID - 1],
        Value::of(reason),
        Value::of_time_us(clock::now().wall_us),
        Value::of(row.count.min(i32::MAX as u32) as i32),
    ];
    as_owner(queue.relation, || spi::run(&statement, &types, &values));
    Ok("dead_lettered")
}
