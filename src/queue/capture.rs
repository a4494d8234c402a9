//! What a statement of ours learns from the trigger that it fires: the ids of the rows it inserted, the address of
//! the row it updated. So a sender needs no SELECT on the table (RETURNING would), and a retry knows where its row
//! went. Owns the stack of such statements; records nothing.

use crate::pg;
use queue_dispatch::Row;
use std::cell::RefCell;

/// What the trigger is to tell the statement that fires it.
enum Captured {
    /// The ids of the rows it inserts.
    Sent(Vec<i64>),
    /// The row it updates, as it is then.
    Rewritten(Option<Row>),
}

/// A statement of ours that runs right now. Only rows of its own, at its own trigger depth, are its: a trigger of
/// the owner's may send to the same queue in the midst of it.
struct Capture {
    relation: u32,
    depth: i32,
    /// The subtransaction it runs in.
    sub: u32,
    captured: Captured,
}

thread_local! {
    static CAPTURES: RefCell<Vec<Capture>> = const { RefCell::new(Vec::new()) };
}

/// Tells the statement of ours that is running of a row of its own. True if it was.
fn tell_of(relation: u32, tell: impl FnOnce(&mut Captured) -> bool) -> bool {
    let is_running = CAPTURES.with_borrow(|c| c.last().is_some_and(|c| c.relation == relation));
    if !is_running {
        return false;
    }
    let depth = pg::call::trigger_depth();
    CAPTURES.with_borrow_mut(|captures| {
        captures.last_mut().filter(|c| c.depth + 1 == depth).is_some_and(|c| tell(&mut c.captured))
    })
}

/// Runs a statement of ours on a queue's table and returns what the trigger saw of it. After an ERROR the
/// callbacks of the (sub)transaction forget the capture.
fn capturing<R>(relation: u32, captured: Captured, statement: impl FnOnce() -> R) -> (R, Captured) {
    let (depth, sub) = (pg::call::trigger_depth(), pg::xact::sub_id());
    let level = CAPTURES.with_borrow_mut(|captures| {
        captures.push(Capture { relation, depth, sub, captured });
        captures.len()
    });
    let result = statement();
    let captured = CAPTURES.with_borrow_mut(|captures| {
        captures.truncate(level); // of what an inner one left when it failed
        captures.pop().map_or(Captured::Rewritten(None), |capture| capture.captured)
    });
    (result, captured)
}

/// Runs an INSERT into a queue's table and returns the ids of the rows it inserted, in order.
pub fn sending<R>(relation: u32, statement: impl FnOnce() -> R) -> (R, Vec<i64>) {
    match capturing(relation, Captured::Sent(Vec::new()), statement) {
        (result, Captured::Sent(ids)) => (result, ids),
        (result, Captured::Rewritten(_)) => (result, Vec::new()),
    }
}

/// Runs an UPDATE of one pinned row and returns what the row is now, as the trigger saw it.
pub fn rewriting<R>(relation: u32, statement: impl FnOnce() -> R) -> (R, Option<Row>) {
    match capturing(relation, Captured::Rewritten(None), statement) {
        (result, Captured::Rewritten(row)) => (result, row),
        (result, Captured::Sent(_)) => (result, None),
    }
}

/// Statements of subtransactions from `sub` up are not running any more: they failed with it. 0: none is, at the end
/// of the transaction.
pub fn forget(sub: u32) {
    CAPTURES.with(|captures| {
        if let Ok(mut captures) = captures.try_borrow_mut() {
            captures.retain(|capture| capture.sub < sub);
        }
    });
}

/// A row was inserted: told to the statement whose it is. True if there is one.
pub fn inserted(relation: u32, msg_id: i64) -> bool {
    tell_of(relation, |captured| match captured {
        Captured::Sent(ids) => {
            ids.push(msg_id);
            true
        }
        Captured::Rewritten(_) => false,
    })
}

/// A row was updated: told to the statement whose it is. True if there is one.
pub fn updated(relation: u32, row: Row) -> bool {
    tell_of(relation, |captured| match captured {
        Captured::Rewritten(seen) => {
            *seen = Some(row);
            true
        }
        Captured::Sent(_) => false,
    })
}
