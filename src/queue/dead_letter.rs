//! What failed for good: moving messages to a dead-letter queue or an archive. Always in the transaction that
//! deletes them, always after the deletion and only what it deleted, with the rights of the queue's owner: a
//! consumer who may finish messages needs no rights on the tables they go to.

use crate::error::Result;
use crate::pg::call::Value;
use crate::pg::table::Record;
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
    user::acting_as(user::owner(relation), f)
}

/// Moves a message that was deleted to where its queue's failures go. Returns `dead_lettered` or `archived`.
pub fn bury(queue: &Queue, row: Copied, reason: &str, error: Option<&str>) -> Result<&'static str> {
    // A dead-letter queue that is gone leaves the archive.
    let target = queue.settings.dead_letter_queue.and_then(|oid| Some((oid, user::relation_name(oid)?)));
    let Some((_, target)) = target.filter(|(oid, name)| resolve::find_table(name) == Some(*oid)) else {
        archive_with(queue, row, reason, error)?;
        return Ok("archived");
    };
    let v = row.values;
    let last_error = error.map_or(v[column::LAST_ERROR - 1], Value::of);
    let statement = format!(
        "INSERT INTO queue.{} (priority, group_key, headers, message, last_error) \
         SELECT $1, $2, \
           CASE pg_catalog.jsonb_typeof($3) WHEN 'object' THEN $3 OPERATOR(pg_catalog.||) d.letter \
             ELSE CASE WHEN $3 IS NULL THEN d.letter \
               ELSE d.letter OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object('headers', $3) END END, \
           $4, $5 \
         FROM (SELECT pg_catalog.jsonb_build_object('dead_letter', pg_catalog.jsonb_build_object( \
           'queue', $6, 'msg_id', $7, 'reason', $8, 'error', $5, 'at', $9, 'delivery_count', $10))) AS d (letter)",
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
