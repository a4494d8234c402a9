//! What this transaction has done that the dispatcher must hear of, or must be told to undo: one list in the
//! order of events, each entry with the subtransaction it was made in. Owns the list, the transaction's own
//! uncommitted messages (the overlay), and what this backend has open in shared memory (a load, a wait).
//!
//! # Commit
//!
//! After the transaction became visible to others the entries are gone through in order, [`CHUNK`] per hold of
//! the lock: messages are published, pins settled, leases handed over. Nothing can fail there: whatever needs
//! memory asked for it when it was recorded.
//!
//! # Rollback
//!
//! Subtransaction ids only grow, so ROLLBACK TO undoes the list's tail from the aborted id up, last first; a
//! full rollback undoes all of it. A lease goes back, a pin is taken off.
//!
//! # Own messages
//!
//! A message that this transaction sent can be read and finished in it, before anybody else hears of it: its
//! state is kept here (`Local`), each change of it is an entry too, and at commit it comes into the world in the
//! state in which it then is.
//!
//! No borrow is held across a call into Postgres: a FATAL error runs the abort callback right there.

use crate::error::{Error, Result};
use crate::pg::{self, latch, shmem, xact};
use crate::settings;
use queue_dispatch::{Arena, Change, Effects, Lease, Now, Policy, QueueRef, Row};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

/// Entries per hold of the lock.
const CHUNK: usize = 128;

/// What follows for a pinned message when its transaction commits.
#[derive(Clone, Copy, Debug)]
pub enum Then {
    /// Its row is deleted (or was not there).
    Finish,
    /// It is given back, not counted.
    Release,
    /// Its row was rewritten like this.
    Refile(Row),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum LocalState {
    Waiting,
    Leased { lease_id: i64, until_us: i64 },
    Gone,
}

/// A message that this transaction sent.
#[derive(Clone, Copy, Debug)]
struct Local {
    relation: u32,
    row: Row,
    state: LocalState,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    /// The last of `locals` was sent.
    Sent,
    /// A local message's state was this before.
    LocalWas(usize, LocalState),
    /// A message was leased.
    Leased { at: QueueRef, msg_id: i64, lease_id: i64 },
    /// A message was pinned.
    Pinned { at: QueueRef, msg_id: i64, then: Then },
    /// A message that could have no slot was deleted.
    Unslotted { relation: u32, msg_id: i64 },
    /// A lease is to be shortened at commit.
    Shorten { at: QueueRef, msg_id: i64, lease_id: i64, until_us: i64 },
    /// Plain SQL updated a row.
    Updated { relation: u32, row: Row },
    /// Everything from this id on may be untracked.
    MarkFrom { relation: u32, msg_id: i64 },
    /// The table was emptied.
    Emptied { relation: u32 },
    /// The queue's settings were changed.
    Configured { relation: u32, policy: Policy },
    /// The table was created: nobody must remember it if this is undone.
    Created { relation: u32 },
    /// The table was dropped.
    Dropped { relation: u32 },
    /// Extensions came or went: the launcher is to look.
    Extensions,
}

#[derive(Clone, Copy)]
struct Entry {
    sub: u32,
    op: Op,
}

#[derive(Default)]
struct Journal {
    entries: Vec<Entry>,
    locals: Vec<Local>,
    /// No local before this one is waiting.
    waiting_from: usize,
    /// (relation, msg_id) -> index, for the first `indexed` locals; built when it is first asked for.
    index: HashMap<(u32, i64), usize>,
    indexed: usize,
}

thread_local! {
    static JOURNAL: RefCell<Journal> = RefCell::new(Journal::default());
    static LOADING: Cell<Option<QueueRef>> = const { Cell::new(None) };
    static WAITING: Cell<bool> = const { Cell::new(false) };
    static LAST_SENT: Cell<Option<(u32, i64)>> = const { Cell::new(None) };
    static SENT: RefCell<Option<Vec<i64>>> = const { RefCell::new(None) };
    static REWRITTEN: Cell<Option<Option<Row>>> = const { Cell::new(None) };
}

impl Journal {
    fn push(&mut self, op: Op, sub: u32) {
        debug_assert!(self.entries.len() < self.entries.capacity());
        self.entries.push(Entry { sub, op });
    }

    fn set_local(&mut self, index: usize, state: LocalState, sub: u32) {
        let was = self.locals[index].state;
        self.push(Op::LocalWas(index, was), sub);
        self.locals[index].state = state;
    }

    fn local(&mut self, relation: u32, msg_id: i64) -> Option<usize> {
        if self.locals.is_empty() {
            return None;
        }
        for i in self.indexed..self.locals.len() {
            self.index.insert((self.locals[i].relation, self.locals[i].row.msg_id), i);
        }
        self.indexed = self.locals.len();
        self.index.get(&(relation, msg_id)).copied()
    }

    fn forget(&mut self) {
        self.entries.clear();
        self.locals.clear();
        self.index.clear();
        self.indexed = 0;
        self.waiting_from = 0;
        // A large transaction's memory is given back.
        self.entries.shrink_to(1_024);
        self.locals.shrink_to(1_024);
        self.index.shrink_to(1_024);
    }
}

/// Makes room for so many more entries, so that recording them cannot fail.
pub fn reserve(entries: usize) -> Result<()> {
    JOURNAL.with_borrow_mut(|j| j.entries.try_reserve(entries)).map_err(|_| Error::Memory)
}

fn record(op: Op) -> Result<()> {
    reserve(1)?;
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| j.push(op, sub));
    Ok(())
}

// ---- what the trigger sees ---------------------------------------------------------------------------------

/// A row was inserted, by whatever statement.
pub fn sent(relation: u32, row: Row) -> Result<()> {
    LAST_SENT.set(Some((relation, row.msg_id)));
    SENT.with_borrow_mut(|ids| {
        if let Some(ids) = ids {
            ids.push(row.msg_id);
        }
    });
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| {
        j.entries.try_reserve(1).and_then(|()| j.locals.try_reserve(1)).map_err(|_| Error::Memory)?;
        if j.locals.len() < settings::JOURNAL_SENT_MAX {
            j.locals.push(Local { relation, row, state: LocalState::Waiting });
            j.push(Op::Sent, sub);
            return Ok(());
        }
        // Too many to remember: the lowest id is enough, since a mark there has them all loaded.
        if let Some(Entry { sub: last_sub, op: Op::MarkFrom { relation: last, msg_id } }) = j.entries.last_mut() {
            if *last == relation && *last_sub == sub {
                *msg_id = row.msg_id.min(*msg_id);
                return Ok(());
            }
        }
        j.push(Op::MarkFrom { relation, msg_id: row.msg_id }, sub);
        Ok(())
    })
}

/// A row was updated, by whatever statement.
pub fn updated(relation: u32, row: Row) -> Result<()> {
    if REWRITTEN.get().is_some() {
        REWRITTEN.set(Some(Some(row)));
        return Ok(());
    }
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| {
        j.entries.try_reserve(2).map_err(|_| Error::Memory)?;
        match j.local(relation, row.msg_id) {
            Some(index) => j.locals[index].row = row,
            None => j.push(Op::Updated { relation, row }, sub),
        }
        Ok(())
    })
}

/// The table was truncated: of what this transaction sent so far nothing is left.
pub fn emptied(relation: u32) -> Result<()> {
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| {
        let locals = j.locals.len();
        j.entries.try_reserve(locals + 1).map_err(|_| Error::Memory)?;
        for index in 0..locals {
            if j.locals[index].relation == relation && j.locals[index].state != LocalState::Gone {
                j.set_local(index, LocalState::Gone, sub);
            }
        }
        j.push(Op::Emptied { relation }, sub);
        Ok(())
    })
}

/// Runs an INSERT and returns the ids of the rows it inserted, in order.
pub fn sending<R>(statement: impl FnOnce() -> R) -> (R, Vec<i64>) {
    SENT.with_borrow_mut(|ids| *ids = Some(Vec::new()));
    let result = statement();
    (result, SENT.with_borrow_mut(Option::take).unwrap_or_default())
}

/// Runs an INSERT of one row and returns its id; `None` if the trigger did not see one.
pub fn sending_one<R>(relation: u32, statement: impl FnOnce() -> R) -> (R, Option<i64>) {
    LAST_SENT.set(None);
    let result = statement();
    (result, LAST_SENT.get().filter(|(of, _)| *of == relation).map(|(_, msg_id)| msg_id))
}

/// Runs an UPDATE of one pinned row and returns what the row is now, as the trigger saw it.
pub fn rewriting<R>(statement: impl FnOnce() -> R) -> (R, Option<Row>) {
    REWRITTEN.set(Some(None));
    let result = statement();
    (result, REWRITTEN.take().flatten())
}

// ---- what the verbs record ---------------------------------------------------------------------------------

/// A message was leased. Room was reserved.
pub fn leased(at: QueueRef, msg_id: i64, lease_id: i64) {
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| j.push(Op::Leased { at, msg_id, lease_id }, sub));
}

/// A message was pinned; as long as nothing else is said, to be finished. Room was reserved.
pub fn pinned(at: QueueRef, msg_id: i64) {
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| j.push(Op::Pinned { at, msg_id, then: Then::Finish }, sub));
}

/// What is to become of the message pinned last under that id.
pub fn pinned_then(at: QueueRef, msg_id: i64, then: Then) {
    JOURNAL.with_borrow_mut(|j| {
        for entry in j.entries.iter_mut().rev() {
            if let Op::Pinned { at: of, msg_id: id, then: after } = &mut entry.op {
                if *of == at && *id == msg_id {
                    *after = then;
                    return;
                }
            }
        }
    });
}

/// A pin was taken off again.
pub fn unpinned(at: QueueRef, msg_id: i64) {
    JOURNAL.with_borrow_mut(|j| {
        let found = j.entries.iter().rposition(
            |e| matches!(e.op, Op::Pinned { at: of, msg_id: id, .. } if of == at && id == msg_id),
        );
        if let Some(index) = found {
            j.entries.remove(index);
        }
    });
}

/// A message without a slot is being deleted.
pub fn unslotted(relation: u32, msg_id: i64) -> Result<()> {
    record(Op::Unslotted { relation, msg_id })
}

/// A lease is to end earlier, at commit.
pub fn shorten(at: QueueRef, msg_id: i64, lease_id: i64, until_us: i64) -> Result<()> {
    record(Op::Shorten { at, msg_id, lease_id, until_us })
}

/// Rows from this id on may have come in unseen.
pub fn mark_from(relation: u32, msg_id: i64) -> Result<()> {
    record(Op::MarkFrom { relation, msg_id })
}

/// The settings were changed.
pub fn configured(relation: u32, policy: Policy) -> Result<()> {
    record(Op::Configured { relation, policy })
}

/// The table was created.
pub fn created(relation: u32) -> Result<()> {
    record(Op::Created { relation })
}

/// The table was dropped.
pub fn dropped(relation: u32) -> Result<()> {
    record(Op::Dropped { relation })
}

/// Extensions or databases came or went.
pub fn extensions_changed() -> Result<()> {
    record(Op::Extensions)
}

/// Whether this transaction created the table: then nobody else has sent anything to it.
pub fn is_created_here(relation: u32) -> bool {
    JOURNAL.with_borrow(|j| {
        j.entries.iter().any(|e| matches!(e.op, Op::Created { relation: of } if of == relation))
    })
}

/// The leases that this transaction took from a queue and that are not settled yet: message -> lease.
pub fn leases_of(at: QueueRef) -> HashMap<i64, i64> {
    JOURNAL.with_borrow(|j| {
        j.entries
            .iter()
            .filter_map(|e| match e.op {
                Op::Leased { at: of, msg_id, lease_id } if of == at => Some((msg_id, lease_id)),
                _ => None,
            })
            .collect()
    })
}

// ---- the transaction's own messages ------------------------------------------------------------------------

/// Whether this transaction has sent anything to a queue.
pub fn has_local(relation: u32) -> bool {
    JOURNAL.with_borrow(|j| j.locals[j.waiting_from..].iter().any(|local| local.relation == relation))
}

/// Takes the next own message of a queue that may be delivered now, if there is one.
pub fn local_take(relation: u32, lease_id: i64, lease: Lease, now: Now) -> Result<Option<Row>> {
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| {
        if j.locals.is_empty() {
            return Ok(None);
        }
        j.entries.try_reserve(1).map_err(|_| Error::Memory)?;
        let mut is_prefix = true;
        for index in j.waiting_from..j.locals.len() {
            let local = j.locals[index];
            let is_over = match local.state {
                LocalState::Gone => true,
                LocalState::Leased { until_us, .. } => until_us > now.mono_us,
                LocalState::Waiting => false,
            };
            if is_over || local.relation != relation || local.row.due_us(now).is_some() {
                is_prefix &= local.state == LocalState::Gone;
                if is_prefix {
                    j.waiting_from = index + 1;
                }
                continue;
            }
            j.set_local(index, LocalState::Leased { lease_id, until_us: lease.until_us }, sub);
            j.locals[index].row.count += 1;
            return Ok(Some(j.locals[index].row));
        }
        Ok(None)
    })
}

/// What a call that names a message finds among the transaction's own.
pub enum Own {
    /// It is not one of them.
    No,
    /// It is, and the fence holds: here is its row, and the lease it is under (0: none).
    Yes(Row, i64),
    /// It is, but is finished, or under another lease.
    Lost,
}

/// Looks for a message among the transaction's own.
pub fn local_find(relation: u32, msg_id: i64, lease_id: Option<i64>) -> Own {
    JOURNAL.with_borrow_mut(|j| {
        let Some(index) = j.local(relation, msg_id) else { return Own::No };
        let local = j.locals[index];
        match (local.state, lease_id) {
            (LocalState::Gone, _) => Own::Lost,
            (LocalState::Leased { lease_id: held, .. }, Some(claimed)) if held != claimed => Own::Lost,
            (LocalState::Waiting, Some(_)) => Own::Lost,
            (LocalState::Leased { lease_id: held, .. }, _) => Own::Yes(local.row, held),
            (LocalState::Waiting, None) => Own::Yes(local.row, 0),
        }
    })
}

/// What becomes of an own message.
pub enum OwnThen {
    /// It is gone.
    Finish,
    /// It waits again, as this row says.
    Wait(Row),
    /// Its lease ends then.
    Until(i64),
}

/// Changes an own message that [`local_find`] has found.
pub fn local_set(relation: u32, msg_id: i64, then: OwnThen) -> Result<()> {
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| {
        j.entries.try_reserve(1).map_err(|_| Error::Memory)?;
        let Some(index) = j.local(relation, msg_id) else { return Ok(()) };
        let state = match then {
            OwnThen::Finish => LocalState::Gone,
            OwnThen::Wait(row) => {
                j.locals[index].row = row;
                j.waiting_from = j.waiting_from.min(index);
                LocalState::Waiting
            }
            OwnThen::Until(until_us) => match j.locals[index].state {
                LocalState::Leased { lease_id, .. } => LocalState::Leased { lease_id, until_us },
                other => other,
            },
        };
        j.set_local(index, state, sub);
        Ok(())
    })
}

// ---- what is open in shared memory -------------------------------------------------------------------------

/// A load or scan of this queue begins, or (None) has been ended. If it is not, the abort callback ends it.
pub fn loading(at: Option<QueueRef>) {
    LOADING.set(at);
}

/// This backend is in the lists of waiters, or no longer.
pub fn waiting(is_waiting: bool) {
    WAITING.set(is_waiting);
}

fn end_what_is_open() {
    if let Some(at) = LOADING.take() {
        let proc = latch::my_proc();
        let _ = shmem::with_arena(|arena, now, fx| arena.load_abort(at, proc, now, fx));
    }
    if WAITING.take() {
        let proc = latch::my_proc();
        let _ = shmem::with_arena(|arena, _, fx| arena.wait_end(proc, fx));
    }
}

// ---- the end of the transaction ----------------------------------------------------------------------------

/// Registers what has to happen at the end of transactions, in `_PG_init`.
pub fn install() {
    xact::install(xact::Callbacks { pre_prepare, prepared, committed, aborted, sub_aborted });
}

fn committed() {
    reset_captures();
    let Ok(mut journal) = JOURNAL.with(|j| j.try_borrow_mut().map(|mut j| std::mem::take(&mut *j))) else {
        return;
    };
    if !journal.entries.is_empty() && shmem::is_available() {
        crate::wait_point!("publish");
        publish(&journal);
    }
    journal.forget();
    JOURNAL.with(|j| {
        if let Ok(mut j) = j.try_borrow_mut() {
            *j = journal; // its memory serves the next transaction
        }
    });
}

fn publish(journal: &Journal) {
    let database = pg::user::database();
    let owner = latch::my_proc();
    let pid = latch::my_pid();
    let mut next_local = 0;
    let mut extensions = false;
    for chunk in journal.entries.chunks(CHUNK) {
        let _ = shmem::with_arena(|arena, now, fx| {
            for Entry { op, .. } in chunk {
                match *op {
                    Op::Sent => {
                        let local = journal.locals[next_local];
                        next_local += 1;
                        publish_local(arena, database, local, pid, now, fx);
                    }
                    Op::Leased { at, msg_id, lease_id } => arena.lease_commit(at, msg_id, lease_id),
                    Op::Pinned { at, msg_id, then } => match then {
                        Then::Finish => arena.pin_finish(at, msg_id, owner, fx),
                        Then::Release => arena.pin_release(at, msg_id, owner, fx),
                        Then::Refile(row) => arena.pin_refile(at, row, owner, now, fx),
                    },
                    Op::Shorten { at, msg_id, lease_id, until_us } => {
                        arena.shorten(at, msg_id, lease_id, until_us, fx);
                    }
                    Op::Updated { relation, row } => {
                        if let Some(at) = arena.queue_find(database, relation) {
                            arena.publish(at, row, Change::Update, now, fx);
                        }
                    }
                    Op::MarkFrom { relation, msg_id } => {
                        if let Some(at) = arena.queue_find(database, relation) {
                            arena.queue_mark(at, msg_id, fx);
                        }
                    }
                    Op::Configured { relation, policy } => {
                        if let Some(at) = arena.queue_find(database, relation) {
                            arena.queue_reconfigure(at, policy, fx);
                        }
                    }
                    Op::Extensions => extensions = true,
                    Op::LocalWas(..)
                    | Op::Unslotted { .. }
                    | Op::Emptied { .. }
                    | Op::Created { .. }
                    | Op::Dropped { .. } => {}
                }
            }
        });
        // What takes many holds of the lock. Both happen under AccessExclusiveLock, which is still held: nobody
        // sends to or reads from the table meanwhile.
        for Entry { op, .. } in chunk {
            match *op {
                Op::Emptied { relation } => empty(database, relation, journal),
                Op::Dropped { relation } => detach(database, relation),
                _ => {}
            }
        }
    }
    if extensions {
        crate::worker::look_again();
    }
}

fn publish_local(arena: &mut Arena, database: u32, local: Local, pid: u32, now: Now, fx: &mut Effects) {
    let Some(at) = arena.queue_find(database, local.relation) else { return };
    match local.state {
        LocalState::Waiting => arena.publish(at, local.row, Change::Insert, now, fx),
        LocalState::Leased { lease_id, until_us } => {
            let row = Row { count: local.row.count.saturating_sub(1), ..local.row };
            let lease = Lease { until_us, owner: queue_dispatch::NIL, pid };
            arena.publish_leased(at, row, lease_id, lease, now, fx);
        }
        LocalState::Gone => {}
    }
}

/// After TRUNCATE only what this transaction sent since then is left.
fn empty(database: u32, relation: u32, journal: &Journal) {
    let most = queue_dispatch::CHUNK_MAX;
    while matches!(
        shmem::with_arena(|arena, _, fx| {
            arena.queue_find(database, relation).is_none_or(|at| arena.queue_clear(at, most, fx))
        }),
        Ok(false)
    ) {}
    // Chunks already published may have held some of those.
    let kept = journal.locals.iter().any(|l| l.relation == relation && l.state != LocalState::Gone);
    if kept {
        let _ = shmem::with_arena(|arena, _, fx| {
            if let Some(at) = arena.queue_find(database, relation) {
                arena.queue_mark_all(at, fx);
            }
        });
    }
}

fn detach(database: u32, relation: u32) {
    let most = queue_dispatch::CHUNK_MAX;
    while matches!(
        shmem::with_arena(|arena, _, fx| arena.queue_detach(database, relation, most, fx)),
        Ok(false)
    ) {}
}

fn reset_captures() {
    LAST_SENT.set(None);
    REWRITTEN.set(None);
    SENT.with(|ids| {
        if let Ok(mut ids) = ids.try_borrow_mut() {
            *ids = None;
        }
    });
}

fn aborted() {
    end_what_is_open();
    undo_from(0);
}

fn sub_aborted(id: u32) {
    end_what_is_open();
    undo_from(id);
}

/// Undoes the entries of subtransactions from `id` up, last first. Allocates nothing.
fn undo_from(id: u32) {
    reset_captures();
    let Ok(mut journal) = JOURNAL.with(|j| j.try_borrow_mut().map(|mut j| std::mem::take(&mut *j))) else {
        return;
    };
    let keep = journal.entries.iter().position(|e| e.sub >= id).unwrap_or(journal.entries.len());
    if keep < journal.entries.len() {
        undo_locals(&mut journal, keep);
        if shmem::is_available() {
            crate::wait_point!("return");
            undo_shared(&journal.entries[keep..]);
        }
        journal.entries.truncate(keep);
    }
    if keep == 0 {
        journal.forget();
    }
    JOURNAL.with(|j| {
        if let Ok(mut j) = j.try_borrow_mut() {
            *j = journal;
        }
    });
}

fn undo_locals(journal: &mut Journal, keep: usize) {
    for i in (keep..journal.entries.len()).rev() {
        match journal.entries[i].op {
            Op::Sent => {
                if let Some(local) = journal.locals.pop() {
                    journal.index.remove(&(local.relation, local.row.msg_id));
                }
            }
            Op::LocalWas(index, was) => {
                journal.locals[index].state = was;
                journal.waiting_from = journal.waiting_from.min(index);
            }
            _ => {}
        }
    }
    journal.indexed = journal.indexed.min(journal.locals.len());
    journal.waiting_from = journal.waiting_from.min(journal.locals.len());
}

fn undo_shared(entries: &[Entry]) {
    let owner = latch::my_proc();
    let database = pg::user::database();
    for chunk in entries.rchunks(CHUNK) {
        let _ = shmem::with_arena(|arena, now, fx| {
            for Entry { op, .. } in chunk.iter().rev() {
                match *op {
                    Op::Leased { at, msg_id, lease_id } => arena.lease_return(at, msg_id, lease_id, now, fx),
                    Op::Pinned { at, msg_id, .. } => arena.pin_undo(at, msg_id, owner, now, fx),
                    Op::Unslotted { relation, msg_id } => {
                        if let Some(at) = arena.queue_find(database, relation) {
                            arena.queue_mark(at, msg_id, fx);
                        }
                    }
                    _ => {}
                }
            }
        });
        for Entry { op, .. } in chunk {
            if let Op::Created { relation } = *op {
                detach(database, relation);
            }
        }
    }
}

/// What lives only in shared memory cannot be prepared; what was sent is written down, for whoever commits it.
fn pre_prepare() {
    let mut lowest: Vec<(u32, i64)> = Vec::new();
    let refused = JOURNAL.with_borrow(|j| {
        for entry in &j.entries {
            match entry.op {
                Op::Leased { .. } | Op::Pinned { .. } | Op::Shorten { .. } | Op::Unslotted { .. } => {
                    return Some("leased or finished messages");
                }
                Op::LocalWas(index, _) if matches!(j.locals[index].state, LocalState::Leased { .. }) => {
                    return Some("leased messages");
                }
                Op::Configured { .. } | Op::Created { .. } | Op::Dropped { .. } => {
                    return Some("created, changed or dropped a queue");
                }
                Op::Updated { relation, row } => note_lowest(&mut lowest, relation, row.msg_id),
                Op::MarkFrom { relation, msg_id } => note_lowest(&mut lowest, relation, msg_id),
                _ => {}
            }
        }
        for local in &j.locals {
            note_lowest(&mut lowest, local.relation, local.row.msg_id);
        }
        None
    });
    if let Some(what) = refused {
        Error::Unsupported {
            what: format!("cannot PREPARE a transaction that has {what}"),
            hint: Some("Finish messages in a transaction of their own.".into()),
        }
        .raise();
    }
    if !lowest.is_empty() {
        if let Err(error) = crate::worker::prepared_write(&lowest) {
            error.raise();
        }
    }
}

fn note_lowest(lowest: &mut Vec<(u32, i64)>, relation: u32, msg_id: i64) {
    match lowest.iter_mut().find(|(of, _)| *of == relation) {
        Some((_, low)) => *low = msg_id.min(*low),
        None => lowest.push((relation, msg_id)),
    }
}

fn prepared() {
    reset_captures();
    JOURNAL.with(|j| {
        if let Ok(mut j) = j.try_borrow_mut() {
            j.forget();
        }
    });
}

