//! Messages on a schedule: making, ending, pausing and listing schedules, and what one firing does. Owns the rows of
//! `queue_catalog.schedule`. When a schedule fires is [`schedule_rule`]'s; that somebody fires it, the worker's
//! (`worker::schedules`), who hears of every change at commit through the trigger on the table ([`on_schedule`]).
//!
//! Schedules are written with the rights of the extension, after the caller's were checked; messages are sent with
//! those of the queue's owner. Locks: a caller holds AccessShareLock on the queue's table, so that it is not dropped
//! meanwhile; a firing waits for nobody.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Rows, Value};
use crate::pg::table::{self, AccessShareLock, RowExclusiveLock};
use crate::pg::user::{self, Right};
use crate::pg::{clock, shmem, spi};
use crate::queue::schedule_rule::{self, Problem, Rule};
use crate::queue::{admin, args, journal, list, resolve, send};
use crate::settings;
use pgrx::pg_sys;
use std::cell::Cell;

/// What a schedule may look like.
const FORMS: &str =
    "an interval such as '5 minutes', or a cron expression of five fields (minute, hour, day of month, \
    month, day of week) or six (second first)";

thread_local! {
    /// This process moves a schedule on because it has fired: it need not tell itself.
    static IS_FIRING: Cell<bool> = const { Cell::new(false) };
}

fn quote(text: &str) -> String {
    format!("\"{text}\"")
}

/// Reads a schedule. `anchor_us`: from when an interval is counted.
fn rule(schedule: &str, timezone: &str, anchor_us: i64) -> Result<Rule> {
    let zone = schedule_rule::zone(timezone).ok_or_else(|| Error::Arguments {
        message: format!("invalid value for argument \"timezone\": {}", quote(timezone)),
        hint: Some("Use an IANA name such as Europe/Berlin, spelled like this.".into()),
    })?;
    if schedule_rule::is_cron(schedule) {
        return schedule_rule::cron(schedule, zone).map_err(|problem| explain(schedule, problem));
    }
    if schedule.trim().is_empty() {
        return Err(Error::argument("schedule", quote(schedule), FORMS));
    }
    let interval = Value::of_interval_text(schedule);
    let period_us = args::duration(interval, "schedule", settings::SCHEDULE_INTERVAL_US)?
        .ok_or_else(|| Error::argument("schedule", quote(schedule), FORMS))?;
    Ok(Rule::Interval { anchor_us, period_us })
}

fn explain(schedule: &str, problem: Problem) -> Error {
    match problem {
        Problem::Fields(count) => {
            let noun = if count == 1 { "field" } else { "fields" };
            Error::argument("schedule", format!("{} has {count} {noun}", quote(schedule)), FORMS)
        }
        Problem::Field { name, text, allowed } => {
            Error::argument("schedule", format!("{name} {} in {}", quote(&text), quote(schedule)), allowed)
        }
        Problem::Unreadable(why) => Error::argument("schedule", format!("{} ({why})", quote(schedule)), FORMS),
    }
}

/// When a schedule fires first after a time; an error if it never does.
fn next_us(rule: &Rule, schedule: &str, after_us: i64) -> Result<i64> {
    rule.next_us(after_us).ok_or_else(|| {
        let value = format!("{} never comes true", quote(schedule));
        Error::argument("schedule", value, "a cron expression that comes true before the year 5000")
    })
}

// ---- the verbs ---------------------------------------------------------------------------------------------

fn name_of(args: &Args) -> Result<String> {
    let name = args::text(args, 1, "name")?;
    let range = settings::SCHEDULE_NAME_BYTES;
    if range.contains(&name.len()) {
        return Ok(name);
    }
    let allowed = format!("{} to {} bytes", range.start(), range.end());
    Err(Error::argument("name", format!("{} bytes", name.len()), allowed))
}

fn find(queue: &str) -> Result<u32> {
    let check = |relation| {
        if user::has_rights(relation, &[Right::Truncate]) {
            return Ok(());
        }
        Err(Error::Denied {
            action: "schedule messages of",
            queue: queue.to_owned(),
            needs: "TRUNCATE on its table".into(),
        })
    };
    admin::find(queue, AccessShareLock, check).map(|(relation, _, _)| relation)
}

fn schedule_text(args: &Args) -> Result<String> {
    let schedule = args::text(args, 2, "schedule")?;
    if schedule.len() > settings::SCHEDULE_BYTES_MAX {
        let allowed = format!("at most {} bytes", settings::SCHEDULE_BYTES_MAX);
        return Err(Error::argument("schedule", format!("{} bytes", schedule.len()), allowed));
    }
    Ok(schedule)
}

/// `queue_schedule`: true if there was none of that name. A schedule that stays the same keeps its next time and
/// what it is counted from, so that a deployment which schedules anew does not put an interval off; one that is
/// paused stays so.
pub fn queue_schedule(args: &Args) -> Result<Value> {
    const STORE: &str = "INSERT INTO queue_catalog.schedule AS s \
          (queue, name, schedule, timezone, message, headers, created_at, next_at) \
        VALUES ($1::pg_catalog.regclass, $2, $3, $4, $5, $6, $7, $8) \
        ON CONFLICT (queue, name) DO UPDATE SET schedule = excluded.schedule, timezone = excluded.timezone, \
          message = excluded.message, headers = excluded.headers, \
          created_at = CASE WHEN s.schedule OPERATOR(pg_catalog.=) excluded.schedule \
            AND s.timezone OPERATOR(pg_catalog.=) excluded.timezone THEN s.created_at ELSE excluded.created_at END, \
          next_at = CASE WHEN s.schedule OPERATOR(pg_catalog.=) excluded.schedule \
            AND s.timezone OPERATOR(pg_catalog.=) excluded.timezone THEN s.next_at ELSE excluded.next_at END \
        RETURNING s.xmax OPERATOR(pg_catalog.=) 0"; // a row that was there has been locked before it was updated
    let queue = args::text(args, 0, "queue")?;
    let name = name_of(args)?;
    let schedule = schedule_text(args)?;
    let (message, headers) = (args.value(3), args.value(4));
    if message.is_null() {
        return Err(Error::Null { argument: "message", hint: Some(send::MESSAGE_HINT) });
    }
    if headers.jsonb_text().is_some_and(|text| !text.starts_with('{')) {
        return Err(Error::argument("headers", "JSON of another kind", "null, or a JSON object"));
    }
    let timezone = args.value(5).text().unwrap_or_else(|| "UTC".into());
    let now_us = clock::now().wall_us;
    let next_us = next_us(&rule(&schedule, &timezone, now_us)?, &schedule, now_us)?;
    let relation = find(&queue)?;
    let types = [
        pg_sys::OIDOID,
        pg_sys::TEXTOID,
        pg_sys::TEXTOID,
        pg_sys::TEXTOID,
        pg_sys::JSONBOID,
        pg_sys::JSONBOID,
        pg_sys::TIMESTAMPTZOID,
        pg_sys::TIMESTAMPTZOID,
    ]
    .map(u32::from);
    let values = [
        admin::oid(relation),
        Value::of(name),
        Value::of(schedule),
        Value::of(timezone),
        message,
        headers,
        Value::of_time_us(now_us),
        Value::of_time_us(next_us),
    ];
    let outcome = user::acting_as_extension(|| spi::run(STORE, &types, &values));
    Ok(Value::of(outcome.rows.first().and_then(|row| row[0].get::<bool>()).unwrap_or(false)))
}

const OF_NAME: &str = "queue OPERATOR(pg_catalog.=) $1::pg_catalog.regclass AND name OPERATOR(pg_catalog.=) $2";

/// `queue_unschedule`: false if there is none of that name.
pub fn queue_unschedule(args: &Args) -> Result<Value> {
    let queue = args::text(args, 0, "queue")?;
    let name = name_of(args)?;
    let relation = find(&queue)?;
    let outcome = user::acting_as_extension(|| {
        spi::run(
            &format!("DELETE FROM queue_catalog.schedule WHERE {OF_NAME}"),
            &[pg_sys::OIDOID.into(), pg_sys::TEXTOID.into()],
            &[admin::oid(relation), Value::of(name)],
        )
    });
    Ok(Value::of(outcome.processed > 0))
}

/// `queue_schedule_pause`: true if that changed something. What was due during a pause is not made up for.
pub fn queue_schedule_pause(args: &Args) -> Result<Value> {
    let queue = args::text(args, 0, "queue")?;
    let name = name_of(args)?;
    let paused = args::flag(args, 2, true);
    let relation = find(&queue)?;
    let types = [pg_sys::OIDOID, pg_sys::TEXTOID, pg_sys::BOOLOID, pg_sys::TIMESTAMPTZOID].map(u32::from);
    let values = [admin::oid(relation), Value::of(name), Value::of(paused)];
    let found = user::acting_as_extension(|| {
        spi::run(
            &format!(
                "SELECT schedule, timezone, created_at, next_at FROM queue_catalog.schedule \
                 WHERE {OF_NAME} AND paused OPERATOR(pg_catalog.<>) $3 FOR UPDATE"
            ),
            &types[..3],
            &values,
        )
    });
    let Some(row) = found.rows.first() else { return Ok(Value::of(false)) };
    let next = if paused { row[3] } else { Value::of_time_us(next_of_row(row, clock::now().wall_us)?) };
    let [relation, name, paused] = values;
    user::acting_as_extension(|| {
        spi::run(
            &format!("UPDATE queue_catalog.schedule SET paused = $3, next_at = $4 WHERE {OF_NAME}"),
            &types,
            &[relation, name, paused, next],
        )
    });
    Ok(Value::of(true))
}

/// When a schedule fires first after a time. Its row begins with `schedule`, `timezone` and `created_at`.
fn next_of_row(row: &[Value], after_us: i64) -> Result<i64> {
    let schedule = row[0].text().unwrap_or_default();
    let rule = rule(&schedule, &row[1].text().unwrap_or_default(), row[2].time_us().unwrap_or(0))?;
    next_us(&rule, &schedule, after_us)
}

/// `queue_schedules`: a row for each schedule of a queue that the caller may use; pg_monitor sees all. A message is
/// shown to those who may read the queue.
pub fn queue_schedules(_args: &Args, rows: &mut Rows) -> Result<()> {
    let outcome = user::acting_as_extension(|| {
        spi::look(
            "SELECT c.oid, c.relname::pg_catalog.text, s.name, s.schedule, s.timezone, s.paused, \
             CASE WHEN NOT s.paused THEN s.next_at END, s.last_at, s.message, s.headers \
             FROM queue_catalog.schedule s \
             JOIN queue_catalog.queue q ON q.queue OPERATOR(pg_catalog.=) s.queue \
             JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) s.queue::pg_catalog.oid \
               AND c.relnamespace OPERATOR(pg_catalog.=) $1 \
             ORDER BY c.relname, s.name",
            &[pg_sys::OIDOID.into()],
            &[admin::oid(user::schema(c"queue").unwrap_or(0))], // in another schema it is no queue
        )
    });
    let sees_all = user::is_monitor();
    for row in outcome.rows {
        let relation: u32 = row[0].get::<pg_sys::Oid>().map_or(0, Into::into);
        if !sees_all && !list::may_use(relation) {
            continue;
        }
        let may_read = user::has_rights(relation, &[Right::Select]);
        let shown = |value: Value| if may_read { value } else { Value::NULL };
        rows.emit([row[1], row[2], row[3], row[4], row[5], row[6], row[7], shown(row[8]), shown(row[9])]);
    }
    Ok(())
}

// ---- what others call --------------------------------------------------------------------------------------

/// The trigger on `queue_catalog.schedule`, after each statement that changes it.
pub fn on_schedule(_args: &Args) -> Result<Value> {
    if shmem::is_available() && !IS_FIRING.get() {
        journal::worker_called()?;
    }
    Ok(Value::no_row())
}

/// Deletes the schedules of a table, with the rights of the extension.
pub fn forget(relation: u32) {
    spi::run(
        "DELETE FROM queue_catalog.schedule WHERE queue OPERATOR(pg_catalog.=) $1::pg_catalog.regclass",
        &[pg_sys::OIDOID.into()],
        &[admin::oid(relation)],
    );
}

/// Deletes the schedules of tables that are gone, with the rights of the extension.
pub fn forget_orphans() {
    spi::run(
        "DELETE FROM queue_catalog.schedule s WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_class c \
         WHERE c.oid OPERATOR(pg_catalog.=) s.queue::pg_catalog.oid)",
        &[],
        &[],
    );
}

/// What came of a firing.
pub enum Fired {
    /// The message is sent, if this transaction commits; the schedule fires next at this time.
    Sent(i64),
    /// Somebody holds a lock on table or schedule, or has just changed them.
    Busy,
    /// The queue's table is gone, and so are now its schedules.
    Gone,
}

/// Fires a schedule if it is still due, in the worker's transaction: sends its message as the queue's owner and moves
/// it on to its first time after `now_us`, so that what was missed is sent once.
pub fn fire(relation: u32, name: &str, now_us: i64) -> Result<Fired> {
    IS_FIRING.set(false); // an ERROR may have left it
    if !table::try_lock(relation, RowExclusiveLock) {
        return Ok(Fired::Busy);
    }
    let Some(queue_name) = user::relation_name(relation) else {
        forget(relation);
        return Ok(Fired::Gone);
    };
    let queue = match resolve::open(&queue_name, RowExclusiveLock) {
        Err(Error::BeingRestored { .. }) => return Ok(Fired::Busy),
        opened => opened?,
    };
    if queue.relation != relation {
        // In another schema it is no queue, whatever has its name here.
        return Err(Error::QueueUnknown { queue: queue_name });
    }
    let found = spi::run(
        &format!(
            "SELECT schedule, timezone, created_at, message, \
               COALESCE(headers, '{{}}'::pg_catalog.jsonb) OPERATOR(pg_catalog.||) \
               pg_catalog.jsonb_build_object('schedule', pg_catalog.jsonb_build_object('name', name, 'at', next_at)) \
             FROM queue_catalog.schedule WHERE {OF_NAME} AND NOT paused AND next_at OPERATOR(pg_catalog.<=) $3 \
             FOR UPDATE SKIP LOCKED"
        ),
        &[pg_sys::OIDOID.into(), pg_sys::TEXTOID.into(), pg_sys::TIMESTAMPTZOID.into()],
        &[admin::oid(relation), Value::of(name), Value::of_time_us(now_us)],
    );
    let Some(row) = found.rows.first() else { return Ok(Fired::Busy) };
    let next_us = next_of_row(row, now_us)?;
    user::acting_as(user::owner(relation), || send::send_now(&queue, row[4], row[3]))?;
    move_on(relation, name, now_us, next_us);
    Ok(Fired::Sent(next_us))
}

/// The wall clock may have been set back: an interval is over a period from now at the latest, all the same. What cron
/// expressions say, the clock decides.
pub fn clock_set_back(now_us: i64) {
    let found = spi::run(
        "SELECT queue::pg_catalog.oid, name, schedule, timezone, created_at, next_at \
         FROM queue_catalog.schedule WHERE NOT paused AND next_at OPERATOR(pg_catalog.>) $1 FOR UPDATE SKIP LOCKED",
        &[pg_sys::TIMESTAMPTZOID.into()],
        &[Value::of_time_us(now_us)],
    );
    for row in &found.rows {
        let (schedule, timezone) = (row[2].text_if_readable(), row[3].text_if_readable());
        let (Some(schedule), Some(timezone), Some(next_us)) = (schedule, timezone, row[5].time_us()) else {
            continue;
        };
        // One that cannot be read fails when it fires.
        let rule = rule(&schedule, &timezone, row[4].time_us().unwrap_or(0));
        let Ok(rule @ Rule::Interval { period_us, .. }) = rule else { continue };
        let latest_us = now_us.saturating_add(period_us);
        if next_us <= latest_us {
            continue;
        }
        let next_us = rule.next_us(now_us).map_or(latest_us, |us| us.min(latest_us));
        IS_FIRING.set(true);
        spi::run(
            &format!("UPDATE queue_catalog.schedule SET next_at = $3 WHERE {OF_NAME}"),
            &[pg_sys::OIDOID, pg_sys::TEXTOID, pg_sys::TIMESTAMPTZOID].map(u32::from),
            &[row[0], row[1], Value::of_time_us(next_us)],
        );
        IS_FIRING.set(false);
    }
}

fn move_on(relation: u32, name: &str, last_us: i64, next_us: i64) {
    IS_FIRING.set(true);
    spi::run(
        &format!("UPDATE queue_catalog.schedule SET last_at = $3, next_at = $4 WHERE {OF_NAME}"),
        &[pg_sys::OIDOID, pg_sys::TEXTOID, pg_sys::TIMESTAMPTZOID, pg_sys::TIMESTAMPTZOID].map(u32::from),
        &[admin::oid(relation), Value::of(name), Value::of_time_us(last_us), Value::of_time_us(next_us)],
    );
    IS_FIRING.set(false);
}
