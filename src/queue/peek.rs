//! Looking at a queue's messages: rows and where each one stands. Leases nothing, changes nothing.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Rows, Value};
use crate::pg::table::{AccessShareLock, Record, Snapshot, Table};
use crate::pg::user::Right;
use crate::pg::{clock, latch, xact};
use crate::queue::overlay::{self, Local};
use crate::queue::resolve::{self, Queue};
use crate::queue::{args, column, journal, row_of};
use queue_dispatch::{Now, State, View};

/// Where a message stands, in the words of the reference: also where nobody has moved it there yet.
fn state_of(queue: &Queue, view: Option<View>, record: &Record, now: Now) -> &'static str {
    let row = row_of(record);
    let count = view.map_or(row.count, |view| view.count.max(row.count));
    let by_row = || match row.due_us(now) {
        Some(_) => "delayed",
        None if queue.settings.policy().is_exhausted(count) => "exhausted",
        None => "ready",
    };
    match view {
        None => by_row(),
        Some(view) => match view.state {
            State::Ready | State::Free | State::Untracked | State::Born => by_row(),
            State::Delayed if view.deadline_us <= now.mono_us => by_row(),
            State::Delayed => "delayed",
            State::Leased if view.deadline_us <= now.mono_us => by_row(),
            State::Leased => "leased",
            State::Pinned => "finishing",
            State::Exhausted => "exhausted",
        },
    }
}

const STATES: [&str; 5] = ["ready", "delayed", "leased", "finishing", "exhausted"];

/// `queue_peek`.
pub fn queue_peek(args: &Args, rows: &mut Rows) -> Result<()> {
    let name = args::text(args, 0, "queue")?;
    let quantity = args::quantity(args, 1, 10)?;
    let wanted = args.value(3).text();
    if let Some(wanted) = &wanted {
        if !STATES.contains(&wanted.as_str()) {
            return Err(Error::argument("state", format!("\"{wanted}\""), STATES.join(", ")));
        }
    }
    let ids: Option<Vec<i64>> = if args.value(2).is_null() {
        None
    } else {
        let mut ids = Vec::new();
        for id in args::array(args, 2, "msg_ids")? {
            ids.push(id.i64().ok_or(Error::Null { argument: "msg_ids", hint: None })?);
        }
        Some(ids)
    };
    let queue = resolve::open(&name, AccessShareLock)?;
    queue.check("look at", &[Right::Select], "SELECT on its table")?;
    let snapshot = Snapshot::latest();
    let Some(table) = Table::open(queue.relation, None) else { return Ok(()) };
    let mut shown = 0;
    let mut show = |record: &Record| -> Result<bool> {
        if show_one(&queue, record, wanted.as_deref(), rows)? {
            shown += 1;
        }
        Ok(shown < quantity)
    };
    match ids {
        Some(ids) => {
            let mut seen = std::collections::HashSet::new();
            for msg_id in ids.into_iter().filter(|id| seen.insert(*id)) {
                if let Some(record) = table.lookup(queue.key, msg_id, &snapshot) {
                    if !show(&record)? {
                        break;
                    }
                }
            }
        }
        None => {
            let mut walk = table.walk(queue.key, i64::MIN, false, &snapshot);
            while let Some(record) = walk.next() {
                pgrx::check_for_interrupts!();
                if !show(&record)? {
                    break;
                }
            }
            walk.end();
        }
    }
    table.close(None, true);
    snapshot.done();
    Ok(())
}

/// What the dispatcher will hear of a message of this transaction's own.
fn own_view(own: Local, now: Now) -> Option<View> {
    let (state, lease_id, deadline_us) = match own.state {
        overlay::State::Leased { lease_id, until_us, .. } => (State::Leased, lease_id, until_us),
        // A read of it that was undone counts, and its row does not say so.
        overlay::State::Waiting => (State::Ready, 0, own.row.due_us(now).unwrap_or(now.mono_us)),
        overlay::State::Gone => return None,
    };
    Some(View { state, count: own.row.count, lease_id, deadline_us, leased_at_us: 0, pid: latch::my_pid() })
}

fn show_one(queue: &Queue, record: &Record, wanted: Option<&str>, rows: &mut Rows) -> Result<bool> {
    let row = row_of(record);
    let now = clock::now();
    let view = match journal::own_view(queue.relation, row.msg_id) {
        Some(own) => own_view(own, now),
        None if xact::is_standby() => None,
        None => queue.with(|arena, at, _, _| arena.view(at, row.msg_id))?,
    };
    let state = state_of(queue, view, record, now);
    if wanted.is_some_and(|wanted| wanted != state) {
        return Ok(false);
    }
    let leased = view.filter(|_| state == "leased");
    let wall_of = |mono_us: i64| now.wall_us.saturating_add(mono_us.saturating_sub(now.mono_us));
    let visible_at = match view {
        // Unless it is the row that delays it: then the slot's time is that of a lease which has ended, say.
        Some(View { state: State::Leased | State::Delayed, deadline_us, .. })
            if (state == "leased" || state == "delayed") && deadline_us > now.mono_us =>
        {
            let row_us = row.visible_at_us.filter(|_| state == "delayed").unwrap_or(i64::MIN);
            Value::of_time_us(wall_of(deadline_us).max(row_us))
        }
        _ => record.value(column::VISIBLE_AT),
    };
    rows.emit([
        record.value(column::MSG_ID),
        leased.map_or(Value::NULL, |view| Value::of(view.lease_id)),
        Value::of(i64::from(view.map_or(row.count, |view| view.count.max(row.count)))),
        record.value(column::ENQUEUED_AT),
        leased.map_or(Value::NULL, |view| Value::of_time_us(wall_of(view.deadline_us))),
        Value::of(i64::from(record.value(column::PRIORITY).get::<i16>().unwrap_or(0))),
        record.value(column::GROUP_KEY),
        record.value(column::LAST_ERROR),
        record.value(column::HEADERS),
        record.value(column::MESSAGE),
        Value::of(state),
        Value::NULL, // consumer: not built
        leased.map_or(Value::NULL, |view| Value::of(i64::from(view.pid))),
        visible_at,
    ]);
    Ok(true)
}
