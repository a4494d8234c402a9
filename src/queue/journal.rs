//! What this transaction has done that the dispatcher must hear of, or must be told to undo: one list in the
//! order of events, each entry with the subtransaction it was made in. Owns the list, and what this backend has
//! open in shared memory (a load, a wait).
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
//! state is kept in the [`Overlay`], each change of it is an entry with what it was before, and at commit it comes
//! into the world in the state in which it then is. Of one that is read the dispatcher must be able to keep that it was:
//! a slot is held for it from then on.
//!
//! No borrow is held across a call into Postgres: a FATAL error runs the abort callback right there.

use crate::error::{Error, Result};
use crate::pg::{self, clock, latch, shmem, xact};
use crate::queue::overlay::{Local, Overlay, State};
use crate::queue::{capture, lease};
use crate::settings;
use queue_dispatch::{Arena, Change, Effects, Lease, Now, Policy, QueueRef, Row, Taken, NEVER_US};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};

/// Entries per hold of the lock: ten microseconds of work.
const CHUNK: usize = 64;

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

#[derive(Clone, Copy, Debug)]
enum Op {
    /// The last of the own messages was sent.
    Sent,
    /// An own message was this before.
    Was(usize, Local),
    /// A message was leased. If the read before it rolled back, the commit of this one is told.
    Leased { at: QueueRef, msg_id: i64, lease_id: i64, was_returned: bool },
    /// A message was pinned.
    Pinned { at: QueueRef, msg_id: i64, then: Then, hold: Pinning },
    /// A message that could have no slot was deleted, or one was looked for in vain and its slot let go.
    Unslotted { relation: u32, msg_id: i64 },
    /// A lease is to be shortened at commit.
    Shorten { at: QueueRef, msg_id: i64, lease_id: i64, until_us: i64 },
    /// Plain SQL updated a row.
    Updated { relation: u32, row: Row },
    /// Everything from this id on may be untracked.
    MarkFrom { relation: u32, msg_id: i64 },
    /// The table was emptied.
    Emptied { relation: u32 },
    /// The queue's settings were changed. The old ones are kept: of a queue that this transaction created the dispatcher
    /// may know the new ones before they are committed.
    Configured { relation: u32, policy: Policy, before: Policy },
    /// The queue was given its place, and its leases, by what this transaction has made of its table.
    Restored { relation: u32 },
    /// The table was created: nobody must remember it if this is undone.
    Created { relation: u32 },
    /// The table was dropped.
    Dropped { relation: u32 },
    /// Extensions came or went: the launcher is to look.
    Extensions,
    /// Something of the worker's concern that is not one queue's has changed: it is to look.
    WorkerCalled,
}

/// Why a message was pinned.
#[derive(Clone, Copy, Debug)]
enum Pinning {
    /// To be dealt with.
    ForCall,
    /// It was taken, and is to be given to nobody here.
    Withdrawn,
    /// Withdrawn, and dealt with by a later entry: this one only holds the pin.
    Passed,
    /// To be dealt with, after it was withdrawn, at whose commit that would have followed: to which it returns if this is
    /// undone.
    OverWithdrawn(Then),
}

#[derive(Clone, Copy)]
struct Entry {
    sub: u32,
    op: Op,
}

#[derive(Default)]
struct Journal {
    entries: Vec<Entry>,
    overlay: Overlay,
    /// For each table the earliest time at which a message that was written expires. Not undone by a rollback: who
    /// is told of it looks.
    expiries: Vec<(u32, i64)>,
    /// Tables that got rows with ids that are not the identity's, from another server or by plain SQL. Not undone either.
    replicated: Vec<u32>,
    /// Some of that by plain SQL: the next who sends here needs the identity.
    has_ids_ahead: bool,
    /// Tables were emptied; the entries tell which still are.
    has_emptied: bool,
    /// Leases were shortened; the entries tell which still are.
    has_shortened: bool,
    /// Slots are held for own messages; these tell which.
    has_held: bool,
    /// Messages were withdrawn; the entries tell which.
    has_withdrawn: bool,
}

pub use crate::queue::overlay::{Own, Then as OwnThen};

thread_local! {
    static JOURNAL: RefCell<Journal> = RefCell::new(Journal::default());
    static LOADING: Cell<Option<QueueRef>> = const { Cell::new(None) };
    static WAITING: Cell<bool> = const { Cell::new(false) };
}

impl Journal {
    fn push(&mut self, op: Op, sub: u32) {
        debug_assert!(self.entries.len() < self.entries.capacity());
        self.entries.push(Entry { sub, op });
    }

    fn set_own(&mut self, index: usize, local: Local, sub: u32) {
        self.push(Op::Was(index, self.overlay.get(index)), sub);
        self.overlay.set(index, local);
    }

    /// Whether a commit is anybody else's concern: that of a mere read is not.
    fn has_news(&self) -> bool {
        !self.entries.iter().all(|entry| matches!(entry.op, Op::Leased { was_returned: false, .. }))
    }

    /// Whether this transaction has emptied that table.
    fn empties(&self, relation: u32) -> bool {
        let is_it = |e: &Entry| matches!(e.op, Op::Emptied { relation: of } if of == relation);
        self.has_emptied && self.entries.iter().any(is_it)
    }

    /// Whether this transaction made that queue.
    fn creates(&self, relation: u32) -> bool {
        self.entries.iter().any(|e| matches!(e.op, Op::Created { relation: of } if of == relation))
    }

    fn forget(&mut self) {
        self.entries.clear();
        self.overlay.clear();
        self.expiries.clear();
        self.replicated.clear();
        self.has_ids_ahead = false;
        self.has_emptied = false;
        self.has_shortened = false;
        self.has_held = false;
        self.has_withdrawn = false;
        if self.entries.capacity() > 1_024 {
            self.entries = Vec::new(); // a large transaction's memory is given back
        }
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

/// Makes room for so many sends.
pub fn reserve_sent(messages: usize) -> Result<()> {
    let messages = messages.min(settings::JOURNAL_SENT_MAX);
    JOURNAL
        .with_borrow_mut(|j| j.entries.try_reserve(messages).and_then(|()| j.overlay.reserve(messages)))
        .map_err(|_| Error::Memory)
}

/// A row was inserted, by whatever statement.
pub fn sent(relation: u32, row: Row) -> Result<()> {
    crate::if_broken!(publish_before_commit, { return publish_at_once(relation, row) });
    crate::if_broken!(read_uncommitted, { return publish_at_once(relation, row) });
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| {
        j.entries.try_reserve(1).and_then(|()| j.overlay.reserve(1)).map_err(|_| Error::Memory)?;
        if j.overlay.len() < settings::JOURNAL_SENT_MAX {
            j.overlay.push(relation, row);
            j.push(Op::Sent, sub);
            return Ok(());
        }
        // Too many to remember: the lowest id is enough, since a mark there has them all loaded.
        if let Some(Entry { sub: last_sub, op: Op::MarkFrom { relation: last, msg_id } }) = j.entries.last_mut()
        {
            if *last == relation && *last_sub == sub {
                *msg_id = row.msg_id.min(*msg_id);
                return Ok(());
            }
        }
        j.push(Op::MarkFrom { relation, msg_id: row.msg_id }, sub);
        Ok(())
    })
}

#[cfg(feature = "wait_points")]
fn publish_at_once(relation: u32, row: Row) -> Result<()> {
    shmem::with_arena(|arena, now, fx| {
        if let Some(at) = arena.queue_find(pg::user::database(), relation) {
            arena.publish(at, row, Change::Insert, now, fx);
        }
    })
}

/// A row was updated, by whatever statement. `was`: its id before.
pub fn updated(relation: u32, was: i64, row: Row) -> Result<()> {
    if capture::updated(relation, row) {
        return Ok(());
    }
    let sub = xact::sub_id();
    // One that a trigger makes in the midst of another may be told of before that other one, which is older.
    let is_unsure = pg::call::trigger_depth() > 1;
    let is_known = JOURNAL.with_borrow_mut(|j| {
        j.entries.try_reserve(2).map_err(|_| Error::Memory)?;
        let Some(index) = j.overlay.find(relation, was) else {
            if was == row.msg_id {
                j.push(Op::Updated { relation, row }, sub);
            }
            return Ok(was == row.msg_id);
        };
        let local = j.overlay.get(index);
        // A read that is open here is not in the row.
        let count = if local.held.is_some() { local.row.count.max(row.count) } else { row.count };
        let local = if was == row.msg_id {
            let is_unsure = is_unsure || local.is_unsure;
            Local { row: Row { count, ..row }, row_count: row.count, aside_until_us: 0, is_unsure, ..local }
        } else {
            Local { state: State::Gone, ..local }
        };
        j.set_own(index, local, sub);
        Ok(was == row.msg_id)
    })?;
    // With another id it is another message.
    if is_known {
        return Ok(());
    }
    capture::inserted(relation, row.msg_id);
    sent(relation, row)
}

/// The table was truncated: of what this transaction sent so far nothing is left.
pub fn emptied(relation: u32) -> Result<()> {
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| {
        let len = j.overlay.len();
        j.entries.try_reserve(len + 1).map_err(|_| Error::Memory)?;
        for index in 0..len {
            let local = j.overlay.get(index);
            if local.relation == relation && local.state != State::Gone {
                j.set_own(index, Local { state: State::Gone, ..local }, sub);
            }
        }
        j.push(Op::Emptied { relation }, sub);
        j.has_emptied = true;
        Ok(())
    })
}

// ---- what the verbs record ---------------------------------------------------------------------------------

/// A message was leased. Room was reserved.
pub fn leased(at: QueueRef, one: &Taken) {
    let sub = xact::sub_id();
    let Taken { msg_id, lease_id, was_returned, .. } = *one;
    JOURNAL.with_borrow_mut(|j| j.push(Op::Leased { at, msg_id, lease_id, was_returned }, sub));
}

/// What was taken is not given to anybody: no call of this transaction rests on that lease.
pub fn not_leased(at: QueueRef, one: &Taken) {
    JOURNAL.with_borrow_mut(|j| {
        let found = j.entries.iter().rposition(
            |e| matches!(e.op, Op::Leased { at: of, lease_id, .. } if of == at && lease_id == one.lease_id),
        );
        if let Some(index) = found {
            j.entries.remove(index);
        }
    });
}

/// A message was pinned; as long as nothing else is said, to be finished. Room was reserved.
pub fn pinned(at: QueueRef, msg_id: i64) {
    let sub = xact::sub_id();
    let hold = Pinning::ForCall;
    JOURNAL.with_borrow_mut(|j| j.push(Op::Pinned { at, msg_id, then: Then::Finish, hold }, sub));
}

/// A message that was taken was pinned, to be given to nobody; at commit `then`. Room was reserved.
pub fn withdrawn(at: QueueRef, msg_id: i64, then: Then) {
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| {
        j.has_withdrawn = true;
        j.push(Op::Pinned { at, msg_id, then, hold: Pinning::Withdrawn }, sub);
    });
}

/// A message that this transaction has withdrawn, which stays pinned, is to be dealt with. Whether it has. Room was
/// reserved.
pub fn pinned_over(at: QueueRef, msg_id: i64) -> bool {
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| {
        if !j.has_withdrawn {
            return false;
        }
        let mut before = None;
        for entry in j.entries.iter_mut().rev() {
            match &mut entry.op {
                Op::Pinned { at: of, msg_id: id, then, hold } if *of == at && *id == msg_id => {
                    if matches!(hold, Pinning::Withdrawn) {
                        *hold = Pinning::Passed;
                        before = Some(*then);
                    }
                    break;
                }
                _ => {}
            }
        }
        if let Some(before) = before {
            j.push(Op::Pinned { at, msg_id, then: Then::Finish, hold: Pinning::OverWithdrawn(before) }, sub);
        }
        before.is_some()
    })
}

/// What was passed on to an entry that is undone is the withdrawal's again.
fn withdrawn_again(entries: &mut [Entry], at: QueueRef, msg_id: i64, before: Then) {
    for entry in entries.iter_mut().rev() {
        if let Op::Pinned { at: of, msg_id: id, then, hold } = &mut entry.op {
            if *of == at && *id == msg_id && matches!(hold, Pinning::Passed) {
                (*then, *hold) = (before, Pinning::Withdrawn);
                return;
            }
        }
    }
}

/// What is to become of the message pinned last under that id.
pub fn pinned_then(at: QueueRef, msg_id: i64, then: Then) {
    JOURNAL.with_borrow_mut(|j| {
        for entry in j.entries.iter_mut().rev() {
            if let Op::Pinned { at: of, msg_id: id, then: after, .. } = &mut entry.op {
                if *of == at && *id == msg_id {
                    *after = then;
                    return;
                }
            }
        }
    });
}

/// A message that was pinned is not to be dealt with. False: it is to stay pinned, for it was withdrawn before.
pub fn unpinned(at: QueueRef, msg_id: i64) -> bool {
    JOURNAL.with_borrow_mut(|j| {
        let found = j
            .entries
            .iter()
            .rposition(|e| matches!(e.op, Op::Pinned { at: of, msg_id: id, .. } if of == at && id == msg_id));
        let removed = found.map(|index| j.entries.remove(index).op);
        if let Some(Op::Pinned { hold: Pinning::OverWithdrawn(before), .. }) = removed {
            withdrawn_again(&mut j.entries, at, msg_id, before);
            return false;
        }
        true
    })
}

/// The row of a message without a slot was rewritten by a verb.
pub fn rewritten(relation: u32, row: Row) -> Result<()> {
    record(Op::Updated { relation, row })
}

/// A message without a slot is being deleted, or was looked for in vain: if that is undone, it is to be loaded.
pub fn unslotted(relation: u32, msg_id: i64) -> Result<()> {
    record(Op::Unslotted { relation, msg_id })
}

/// A lease is to end earlier, at commit.
pub fn shorten(at: QueueRef, msg_id: i64, lease_id: i64, until_us: i64) -> Result<()> {
    JOURNAL.with_borrow_mut(|j| j.has_shortened = true);
    record(Op::Shorten { at, msg_id, lease_id, until_us })
}

/// A lease that was to end earlier is not to: a longer one was asked for, which no rollback undoes.
pub fn lengthened(at: QueueRef, msg_id: i64, lease_id: i64) {
    JOURNAL.with_borrow_mut(|j| {
        if !j.has_shortened {
            return; // a large batch must not go through a large journal for each
        }
        for entry in &mut j.entries {
            if let Op::Shorten { at: of, msg_id: id, lease_id: lease, until_us } = &mut entry.op {
                if *of == at && *id == msg_id && *lease == lease_id {
                    *until_us = i64::MAX;
                }
            }
        }
    });
}

/// Rows from this id on may have come in unseen.
pub fn mark_from(relation: u32, msg_id: i64) -> Result<()> {
    record(Op::MarkFrom { relation, msg_id })
}

/// The settings were changed.
pub fn configured(relation: u32, policy: Policy, before: Policy) -> Result<()> {
    record(Op::Configured { relation, policy, before })
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

/// What the worker goes by was changed.
pub fn worker_called() -> Result<()> {
    record(Op::WorkerCalled)
}

/// A row was written that expires at that time.
pub fn expires(relation: u32, at_us: i64) -> Result<()> {
    JOURNAL.with_borrow_mut(|j| match j.expiries.iter_mut().find(|(of, _)| *of == relation) {
        Some((_, first_us)) => {
            *first_us = at_us.min(*first_us);
            Ok(())
        }
        None => {
            j.expiries.try_reserve(1).map_err(|_| Error::Memory)?;
            j.expiries.push((relation, at_us));
            Ok(())
        }
    })
}

/// A row was written that came by logical replication: the table's identity knows nothing of its id.
pub fn replicated(relation: u32) -> Result<()> {
    JOURNAL.with_borrow_mut(|j| {
        if !j.replicated.contains(&relation) {
            j.replicated.try_reserve(1).map_err(|_| Error::Memory)?;
            j.replicated.push(relation);
        }
        Ok(())
    })
}

/// Plain SQL wrote a row whose id the identity has not given yet.
pub fn id_is_ahead(relation: u32) -> Result<()> {
    JOURNAL.with_borrow_mut(|j| j.has_ids_ahead = true);
    replicated(relation)
}

/// The queue was given its place, and its leases were read, by what this transaction has made of its table: if that is
/// undone, it is to be done anew. Room was reserved.
pub fn restored(relation: u32) {
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| j.push(Op::Restored { relation }, sub));
}

/// Whether this transaction has emptied the table: then nothing is in it but what it has sent since.
pub fn is_emptied_here(relation: u32) -> bool {
    JOURNAL.with_borrow(|j| j.empties(relation))
}

/// Whether this transaction created the table: then nobody else has sent anything to it.
pub fn is_created_here(relation: u32) -> bool {
    JOURNAL.with_borrow(|j| j.creates(relation))
}

/// The last lease that this transaction took of each of these messages of a queue, if it took any.
pub fn leases_of(at: QueueRef, ids: impl Iterator<Item = i64>) -> HashMap<i64, i64> {
    let mut wanted: HashSet<i64> = ids.collect();
    let mut found = HashMap::new();
    JOURNAL.with_borrow(|j| {
        for entry in j.entries.iter().rev() {
            if wanted.is_empty() {
                break;
            }
            match entry.op {
                Op::Leased { at: of, msg_id, lease_id, .. } if of == at && wanted.remove(&msg_id) => {
                    found.insert(msg_id, lease_id);
                }
                _ => {}
            }
        }
    });
    found
}

// ---- the transaction's own messages ------------------------------------------------------------------------

/// An own message that may be delivered.
#[derive(Clone, Copy)]
pub struct Readable {
    index: usize,
    /// Where a slot is held for it, if one is.
    pub held: Option<QueueRef>,
}

/// Up to `most` own messages of a queue that may be delivered now.
pub fn own_readable(relation: u32, most: usize, policy: Policy, now: Now) -> Vec<Readable> {
    JOURNAL.with_borrow_mut(|j| {
        let indexes = j.overlay.readable(relation, most, policy, now).into_iter();
        indexes.map(|index| Readable { index, held: j.overlay.get(index).held }).collect()
    })
}

/// An own message that was taken.
pub struct OwnTaken {
    index: usize,
    was: Local,
    /// Its row; the count is this delivery's.
    pub row: Row,
    /// Its lease.
    pub lease_id: i64,
}

/// An own message is leased; a slot is held for it. Room was reserved.
pub fn own_taken(message: Readable, at: QueueRef, lease_id: i64, until_us: i64) -> OwnTaken {
    let sub = xact::sub_id();
    JOURNAL.with_borrow_mut(|j| {
        let was = j.overlay.get(message.index);
        let mut local = was;
        local.row.count = local.row.count.saturating_add(1);
        local.state = State::Leased { lease_id, until_us, commit_until_us: i64::MAX };
        local.held = Some(at);
        j.has_held = true;
        j.set_own(message.index, local, sub);
        OwnTaken { index: message.index, was, row: local.row, lease_id }
    })
}

/// An own message just taken is given to nobody: it stands where it did before, and nothing counts; but it is not read
/// again before `until_us`, so that those behind it are. What a trigger has made of its row meanwhile stays. To undo the
/// taking, whose entry stays, then changes nothing.
pub fn own_not_taken(taken: &OwnTaken, until_us: i64) {
    JOURNAL.with_borrow_mut(|j| {
        let mut local = j.overlay.get(taken.index);
        if !matches!(local.state, State::Leased { lease_id, .. } if lease_id == taken.lease_id) {
            return;
        }
        local.state = taken.was.state;
        local.aside_until_us = until_us;
        if local.row.count == taken.row.count {
            local.row.count = taken.was.row.count.max(local.row_count);
        }
        j.overlay.set(taken.index, local);
    });
}

/// Whether this transaction has sent anything that could be read in it.
pub fn has_own() -> bool {
    own_len() > 0
}

/// When the next of the transaction's own messages of a table can be read: now, perhaps.
pub fn own_next_us(relation: u32, policy: Policy, now: Now) -> i64 {
    if !has_own() {
        return NEVER_US;
    }
    JOURNAL.with_borrow_mut(|j| j.overlay.next_us(relation, policy, now))
}

/// How many messages this transaction has sent and remembers.
pub fn own_len() -> usize {
    JOURNAL.with_borrow(|j| j.overlay.len())
}

/// Looks for a message among the transaction's own.
pub fn own_find(relation: u32, msg_id: i64, lease_id: Option<i64>) -> Own {
    if !has_own() {
        return Own::No;
    }
    let now = clock::now();
    JOURNAL.with_borrow_mut(|j| j.overlay.own(relation, msg_id, lease_id, now))
}

/// A message of the transaction's own, for those who look.
pub fn own_view(relation: u32, msg_id: i64) -> Option<Local> {
    JOURNAL.with_borrow_mut(|j| j.overlay.find(relation, msg_id).map(|index| j.overlay.get(index)))
}

/// Changes an own message that [`own_find`] has found.
pub fn own_set(relation: u32, msg_id: i64, then: OwnThen) -> Result<()> {
    let sub = xact::sub_id();
    let let_go = JOURNAL.with_borrow_mut(|j| {
        j.entries.try_reserve(1).map_err(|_| Error::Memory)?;
        let Some(index) = j.overlay.find(relation, msg_id) else { return Ok(None) };
        let mut local = j.overlay.get(index);
        let mut let_go = None;
        match then {
            OwnThen::Finish => {
                local.state = State::Gone;
                // Where there is no savepoint it is gone for good: nothing is to be kept of it.
                if !xact::is_nested() {
                    let_go = local.held.take();
                }
            }
            OwnThen::Wait(count) => {
                local.row.count = count;
                local.state = State::Waiting;
            }
            OwnThen::Rewritten(row) => {
                // (A trigger may have changed it again since: what is unsure stays so.)
                (local.row, local.row_count) = (row, row.count);
                (local.state, local.aside_until_us) = (State::Waiting, 0);
            }
            OwnThen::Until(end_us) => {
                if let State::Leased { until_us, commit_until_us, .. } = &mut local.state {
                    *commit_until_us = if end_us < *until_us { end_us } else { i64::MAX };
                    *until_us = end_us.max(*until_us);
                }
            }
        }
        j.set_own(index, local, sub);
        Ok(let_go)
    })?;
    match let_go {
        Some(at) => shmem::with_arena(|arena, _, fx| arena.unhold(at, fx)),
        None => Ok(()),
    }
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
        let _ = shmem::with_arena(|arena, _, fx| arena.wait_abort(proc, fx));
    }
}

// ---- the end of the transaction ----------------------------------------------------------------------------

/// Registers what has to happen at the end of transactions, in `_PG_init`.
pub fn install() {
    xact::install(xact::Callbacks { pre_commit, pre_prepare, prepared, committed, aborted, sub_aborted });
}

/// What is written of the leases of a truncated table goes with its messages, whose ids may come anew. Only now, and not
/// when it was truncated: the worker never has to wait for a row of its own until somebody's transaction ends.
fn pre_commit() {
    let emptied: Vec<u32> = JOURNAL.with_borrow(|j| {
        let entries = if j.has_emptied { j.entries.as_slice() } else { &[] };
        let relation_of = |entry: &Entry| match entry.op {
            Op::Emptied { relation } => Some(relation),
            _ => None,
        };
        entries.iter().filter_map(relation_of).collect()
    });
    for relation in emptied {
        lease::forget_written(relation);
    }
}

fn committed() {
    end_what_is_open(); // nothing is, unless a verb of ours forgot
    capture::forget(0);
    let Ok(mut journal) = JOURNAL.with(|j| j.try_borrow_mut().map(|mut j| std::mem::take(&mut *j))) else {
        return;
    };
    if !journal.entries.is_empty() && shmem::is_available() {
        crate::wait_point!("publish");
        if journal.has_news() {
            publish(&journal);
        }
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
    let mut next_own = 0;
    let mut extensions = false;
    // First, so that what was sent and read after TRUNCATE is published as it is now. It takes many holds of the lock;
    // but under AccessExclusiveLock, which is still held, nobody sends to or reads from the table meanwhile.
    for Entry { op, .. } in journal.entries.iter().filter(|_| journal.has_emptied) {
        if let Op::Emptied { relation } = *op {
            unpin_all(journal, database, relation);
            empty(database, relation);
        }
    }
    for chunk in journal.entries.chunks(CHUNK) {
        let _ = shmem::with_arena(|arena, now, fx| {
            for Entry { op, .. } in chunk {
                match *op {
                    Op::Sent => {
                        let local = journal.overlay.get(next_own);
                        next_own += 1;
                        publish_own(arena, database, local, pid, now, fx);
                    }
                    Op::Leased { at, msg_id, lease_id, was_returned: true } => {
                        arena.lease_commit(at, msg_id, lease_id);
                    }
                    Op::Pinned { hold: Pinning::Passed, .. } => {}
                    Op::Pinned { at, msg_id, then, .. } => match then {
                        Then::Finish => arena.pin_finish(at, msg_id, owner, fx),
                        Then::Release => arena.pin_release(at, msg_id, owner, fx),
                        Then::Refile(row) => arena.pin_refile(at, row, owner, now, fx),
                    },
                    Op::Shorten { at, msg_id, lease_id, until_us } => {
                        arena.shorten(at, msg_id, lease_id, until_us, fx);
                    }
                    Op::Updated { relation, row } => match arena.queue_find(database, relation) {
                        Some(at) => arena.publish(at, row, Change::Update, now, fx),
                        None => arena.news_unplaced(database, fx),
                    },
                    Op::MarkFrom { relation, msg_id } => {
                        match arena.queue_find(database, relation) {
                            Some(at) if msg_id == i64::MIN => arena.queue_mark_all(at, fx), // DDL
                            Some(at) => arena.queue_mark(at, msg_id, fx),
                            // DDL on a table that is not new: an index that comes back shows what expires, say.
                            None if msg_id == i64::MIN && !journal.creates(relation) => {
                                arena.worker_wake(database, fx);
                            }
                            None => arena.news_unplaced(database, fx),
                        }
                    }
                    Op::Configured { relation, policy, .. } => {
                        if let Some(at) = arena.queue_find(database, relation) {
                            arena.queue_reconfigure(at, policy, fx);
                        }
                    }
                    Op::Extensions => extensions = true,
                    Op::WorkerCalled => arena.worker_wake(database, fx),
                    Op::Leased { .. }
                    | Op::Was(..)
                    | Op::Unslotted { .. }
                    | Op::Emptied { .. }
                    | Op::Restored { .. }
                    | Op::Created { .. }
                    | Op::Dropped { .. } => {}
                }
            }
        });
        for Entry { op, .. } in chunk {
            if let Op::Dropped { relation } = *op {
                detach(database, relation); // likewise
            }
        }
    }
    if !journal.expiries.is_empty() {
        let _ = shmem::with_arena(|arena, now, fx| {
            for (relation, at_us) in &journal.expiries {
                match arena.queue_find(database, *relation) {
                    Some(at) => arena.expires_at(at, *at_us, now, fx),
                    // Plain SQL alone gives a queue no place in the dispatcher: the worker does, and finds the row.
                    None => arena.worker_wake(database, fx),
                }
            }
        });
    }
    if !journal.replicated.is_empty() {
        // For what is replicated nobody is woken: the copy gives no ids as long as it is one. A queue without a place is
        // looked at when it gets one.
        let _ = shmem::with_arena(|arena, _, fx| {
            for relation in &journal.replicated {
                if let Some(at) = arena.queue_find(database, *relation) {
                    arena.queue_look_again(at);
                    if journal.has_ids_ahead {
                        arena.queue_look(at, fx);
                    }
                }
            }
        });
    }
    if extensions {
        crate::worker::look_again();
    }
}

fn publish_own(arena: &mut Arena, database: u32, local: Local, pid: u32, now: Now, fx: &mut Effects) {
    if let Some(at) = local.held {
        arena.unhold(at, fx);
    }
    let Some(at) = arena.queue_find(database, local.relation) else {
        arena.news_unplaced(database, fx);
        return;
    };
    let mut row = Row { count: local.row_count, ..local.row };
    if local.is_unsure {
        row.visible_at_us = None; // whoever takes it reads the row, and puts it off if that is too early
    }
    let count = local.row.count;
    match local.state {
        State::Waiting if count > row.count => arena.publish_counted(at, row, count, now, fx),
        State::Waiting => arena.publish(at, row, Change::Insert, now, fx),
        State::Leased { lease_id, until_us, commit_until_us } => {
            let until_us = until_us.min(commit_until_us);
            let lease = Lease { until_us, pid, lxid: 0, flush_us: settings::lease_flush_us() };
            arena.publish_leased(at, row, lease_id, lease, now, fx);
            arena.count_own(at, row.msg_id, count, fx);
        }
        State::Gone => {}
    }
}

/// No slot is held any more for the own messages from this one on.
fn unhold_from(journal: &Journal, first: usize) {
    if !journal.has_held {
        return;
    }
    let mut held = journal.overlay.iter().skip(first).filter_map(|local| local.held).peekable();
    while held.peek().is_some() {
        let let_go = |arena: &mut Arena, _, fx: &mut Effects| {
            held.by_ref().take(CHUNK).for_each(|at| arena.unhold(at, fx));
        };
        if shmem::with_arena(let_go).is_err() {
            return;
        }
    }
}

/// What was pinned in a table that was emptied is gone like the rest: its ids may have come anew since.
fn unpin_all(journal: &Journal, database: u32, relation: u32) {
    let owner = latch::my_proc();
    for chunk in journal.entries.chunks(CHUNK) {
        let _ = shmem::with_arena(|arena, _, fx| {
            let emptied = arena.queue_find(database, relation);
            for Entry { op, .. } in chunk {
                match *op {
                    Op::Pinned { at, msg_id, .. } if Some(at) == emptied => {
                        arena.pin_finish(at, msg_id, owner, fx)
                    }
                    _ => {}
                }
            }
        });
    }
}

/// After TRUNCATE nothing is left of what was there.
fn empty(database: u32, relation: u32) {
    let most = queue_dispatch::CHUNK_MAX;
    while matches!(
        shmem::with_arena(|arena, _, fx| {
            arena.queue_find(database, relation).is_none_or(|at| arena.queue_clear(at, most, fx))
        }),
        Ok(false)
    ) {}
}

fn detach(database: u32, relation: u32) {
    let most = queue_dispatch::CHUNK_MAX;
    while matches!(
        shmem::with_arena(|arena, _, fx| arena.queue_detach(database, relation, most, fx)),
        Ok(false)
    ) {}
}

fn aborted() {
    capture::forget(0);
    crate::worker::database_unwanted(0);
    end_what_is_open();
    undo_from(0);
}

fn sub_aborted(id: u32) {
    capture::forget(id);
    crate::worker::database_unwanted(id);
    end_what_is_open();
    undo_from(id);
}

/// Undoes the entries of subtransactions from `id` up, last first. Allocates nothing.
fn undo_from(id: u32) {
    let Ok(mut journal) = JOURNAL.with(|j| j.try_borrow_mut().map(|mut j| std::mem::take(&mut *j))) else {
        return;
    };
    let keep = journal.entries.iter().position(|e| e.sub >= id).unwrap_or(journal.entries.len());
    if keep < journal.entries.len() {
        if shmem::is_available() {
            crate::wait_point!("return");
            let (kept, undone) = journal.entries.split_at(keep);
            let sent = undone.iter().filter(|entry| matches!(entry.op, Op::Sent)).count();
            unhold_from(&journal, journal.overlay.len().saturating_sub(sent));
            undo_shared(kept, undone);
        }
        if keep > 0 {
            undo_own(&mut journal, keep); // else all of it is forgotten below
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

fn undo_own(journal: &mut Journal, keep: usize) {
    let (kept, undone) = journal.entries.split_at_mut(keep);
    for entry in undone.iter().rev() {
        match entry.op {
            Op::Sent => journal.overlay.pop(),
            Op::Was(index, was) => journal.overlay.restore(index, was),
            Op::Pinned { at, msg_id, hold: Pinning::OverWithdrawn(before), .. } => {
                withdrawn_again(kept, at, msg_id, before);
            }
            _ => {}
        }
    }
}

fn undo_shared(kept: &[Entry], undone: &[Entry]) {
    let is_made_here =
        |relation| kept.iter().any(|e| matches!(e.op, Op::Created { relation: of } if of == relation));
    let owner = latch::my_proc();
    let database = pg::user::database();
    for chunk in undone.rchunks(CHUNK) {
        let _ = shmem::with_arena(|arena, now, fx| {
            for Entry { op, .. } in chunk.iter().rev() {
                match *op {
                    Op::Leased { at, msg_id, lease_id, .. } => {
                        arena.lease_return(at, msg_id, lease_id, now, fx)
                    }
                    // The entry that withdrew it has the pin.
                    Op::Pinned { hold: Pinning::OverWithdrawn(_), .. } => {}
                    Op::Pinned { at, msg_id, .. } => arena.pin_undo(at, msg_id, owner, now, fx),
                    // Of any other queue it knows what is committed.
                    Op::Configured { relation, before, .. } if is_made_here(relation) => {
                        if let Some(at) = arena.queue_find(database, relation) {
                            arena.queue_reconfigure(at, before, fx);
                        }
                    }
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
            if let Op::Created { relation } | Op::Restored { relation } = *op {
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
                Op::Was(index, _) if matches!(j.overlay.get(index).state, State::Leased { .. }) => {
                    return Some("leased messages");
                }
                Op::Configured { .. } | Op::Created { .. } | Op::Dropped { .. } => {
                    return Some("created, changed or dropped a queue");
                }
                // Nobody would tell the worker at COMMIT PREPARED.
                Op::WorkerCalled => return Some("changed settings or schedules"),
                // Nor would anybody forget its leases. What another server has prepared must not be refused: there the
                // worker looks at everything anew.
                Op::Emptied { relation } if xact::is_replica() => note_lowest(&mut lowest, relation, i64::MIN),
                Op::Emptied { .. } => return Some("truncated a queue"),
                Op::Updated { relation, row } => note_lowest(&mut lowest, relation, row.msg_id),
                Op::MarkFrom { relation, msg_id } => note_lowest(&mut lowest, relation, msg_id),
                _ => {}
            }
        }
        for local in j.overlay.iter() {
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
    capture::forget(0);
    let Ok(journal) = JOURNAL.with(|j| j.try_borrow_mut().map(|mut j| std::mem::take(&mut *j))) else { return };
    unhold_from(&journal, 0);
    let was_written = !journal.entries.is_empty();
    if was_written {
        crate::worker::prepared_committed(); // from now on the worker looks whether it is
    }
}
