//! Loading a queue's messages from its table into the dispatcher: by primary key from the mark, and by due time.
//! Owns the order of things (begin, then snapshot, then walk, then end; see `queue_dispatch`'s `load`); decides
//! nothing about which message gets a slot. Writes nothing.

use crate::error::Result;
use crate::pg::table::{Snapshot, Step, Table};
use crate::pg::{clock, latch, shmem};
use crate::queue::column;
use crate::queue::journal;
use crate::queue::resolve::Queue;
use crate::queue::row_of;
use queue_dispatch::{mark_at, LoadRow, LoadStart, QueueRef, Row, ScanStart, NEVER_US, NO_MARK};

/// Rows per hold of the lock.
const CHUNK: usize = 256;

/// Rows in a row that the snapshot does not show, before a load looks at the clock.
const UNSEEN_MAX: usize = 1_024;

/// For how long a load goes on at a time when others have to wait for its end, microseconds.
pub const TURN_US: i64 = 100_000;

/// What came of an attempt to load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loaded {
    /// A load was made; all that has room has a slot.
    Done,
    /// There is nothing to load.
    Nothing,
    /// Another backend is at it.
    Busy,
    /// There is no room.
    Full,
    /// A part of it was loaded, the time was up; the mark is where the next load goes on.
    Unfinished,
}

/// Loads from the mark on, if there is one, until `until_us` (on the clock that never jumps) at most: millions of
/// messages that are due much later may lie before the first that is due. The transaction holds a lock on the table. What
/// it has done itself is not looked at: its own rows are published when it commits, and what it has deleted is still
/// there for others, should it not. So not to be called where it has given the table other storage
/// ([`crate::pg::table::is_stored_anew`]): there it would find nothing.
pub fn walk(queue: &Queue, until_us: i64) -> Result<Loaded> {
    let me = latch::my_proc();
    let (start, at) = queue.with(|arena, at, _, _| (arena.load_begin(at, me), at))?;
    let from = match start {
        LoadStart::From(id) => id,
        LoadStart::Nothing => return Ok(Loaded::Nothing),
        LoadStart::Busy => return Ok(Loaded::Busy),
        LoadStart::Full => return Ok(Loaded::Full),
    };
    journal::loading(Some(at));
    crate::if_broken!(skip_reload, {
        journal::loading(None);
        shmem::with_arena(|arena, _, fx| arena.load_end(at, me, NO_MARK, fx))?;
        return Ok(Loaded::Done);
    });
    crate::wait_point!("load-snapshot");
    let snapshot = Snapshot::latest_of_others();
    let mut stopped_at = NO_MARK;
    let mut loaded = Loaded::Done;
    if let Some(table) = Table::open(queue.relation, None) {
        let mut walk = table.walk(queue.key, from, false, &snapshot);
        let mut chunk: Vec<Row> = Vec::with_capacity(CHUNK);
        loop {
            let step = walk.next_within(UNSEEN_MAX);
            if let Step::Row(record) = &step {
                chunk.push(row_of(record));
            }
            if chunk.len() == CHUNK || !matches!(step, Step::Row(_)) {
                if let Some(full_at) = file(at, &chunk)? {
                    stopped_at = mark_at(full_at);
                    break;
                }
                if matches!(step, Step::End) {
                    break;
                }
                // What is not seen counts as looked at: there may be millions of dead rows.
                let next_id = match step {
                    Step::Unseen => walk.reached(),
                    _ => chunk.last().map(|row| row.msg_id.saturating_add(1)),
                };
                let next_id = next_id.unwrap_or(from);
                if clock::now().mono_us >= until_us {
                    stopped_at = mark_at(next_id);
                    loaded = Loaded::Unfinished;
                    break;
                }
                if matches!(step, Step::Unseen) {
                    shmem::with_arena(|arena, _, _| arena.load_reached(at, me, next_id))?;
                }
                chunk.clear();
                pgrx::check_for_interrupts!();
                crate::wait_point!("load-row");
            }
        }
        walk.end();
        table.close(None, true);
    }
    snapshot.done();
    journal::loading(None);
    shmem::with_arena(|arena, _, fx| arena.load_end(at, me, stopped_at, fx))?;
    Ok(loaded)
}

/// Gives each row its slot; returns the id of the first that has no room.
fn file(at: QueueRef, rows: &[Row]) -> Result<Option<i64>> {
    shmem::with_arena(|arena, now, fx| {
        rows.iter().find(|row| arena.load_row(at, **row, now, fx) == LoadRow::Full).map(|row| row.msg_id)
    })
}

/// Scans for what is due soon, if anything is. The same conditions.
pub fn scan(queue: &Queue) -> Result<Loaded> {
    let me = latch::my_proc();
    let (start, at) = queue.with(|arena, at, now, _| (arena.scan_begin(at, me, now), at))?;
    let (after_us, until_us) = match start {
        ScanStart::Range { after_us, until_us } => (after_us, until_us),
        ScanStart::Nothing => return Ok(Loaded::Nothing),
        ScanStart::Busy => return Ok(Loaded::Busy),
    };
    journal::loading(Some(at));
    crate::wait_point!("scan-snapshot");
    let snapshot = Snapshot::latest_of_others();
    let (mut reached_us, mut beyond_us) = (until_us, NEVER_US);
    if let Some(table) = Table::open(queue.relation, None) {
        let mut walk = table.walk_times(queue.due, after_us, NEVER_US - 1, &snapshot);
        let mut chunk: Vec<Row> = Vec::with_capacity(CHUNK);
        loop {
            let record = walk.next();
            let due_us = record.and_then(|r| r.value(column::VISIBLE_AT).time_us());
            let is_end = due_us.is_none_or(|due| due > until_us);
            if is_end {
                beyond_us = due_us.unwrap_or(NEVER_US);
            } else {
                chunk.extend(record.map(|r| row_of(&r)));
            }
            if chunk.len() == CHUNK || is_end {
                if let Some(full_at) = file(at, &chunk)? {
                    let due = chunk.iter().find(|row| row.msg_id == full_at).and_then(|row| row.visible_at_us);
                    beyond_us = due.unwrap_or(after_us);
                    reached_us = beyond_us.saturating_sub(1);
                    break;
                }
                if is_end {
                    break;
                }
                chunk.clear();
                pgrx::check_for_interrupts!();
            }
        }
        walk.end();
        table.close(None, true);
    }
    snapshot.done();
    journal::loading(None);
    shmem::with_arena(|arena, now, fx| arena.scan_end(at, me, reached_us, beyond_us, now, fx))?;
    Ok(Loaded::Done)
}
