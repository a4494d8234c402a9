//! The transaction's own messages: what it has sent can be read and finished in it before anybody else hears of
//! it. Owns their state, which never leaves this process before commit; the journal undoes changes of it and
//! publishes what it has become. Takes no lock, calls no Postgres.
//!
//! Sending only appends; the indexes are built when something is first looked for.

use queue_dispatch::{Now, Policy, QueueRef, Row, NEVER_US};
use std::collections::{BTreeSet, HashMap};

/// Where an own message stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    /// It may be read, once it is due.
    Waiting,
    /// It was read.
    Leased {
        /// The delivery's fence.
        lease_id: i64,
        /// The end of the lease, on the clock that never jumps.
        until_us: i64,
        /// Where the end is to be at commit, if that is earlier.
        commit_until_us: i64,
    },
    /// It is finished.
    Gone,
}

/// One own message.
#[derive(Clone, Copy, Debug)]
pub struct Local {
    /// Its table.
    pub relation: u32,
    /// Its row; the count is that of all deliveries, an open one included.
    pub row: Row,
    /// Deliveries that the row itself tells of.
    pub row_count: u32,
    /// Where it stands.
    pub state: State,
    /// Reads of it that were undone: they count.
    pub undone: u32,
    /// There may be a later version of its row than this: it is to be looked at.
    pub is_unsure: bool,
    /// Not read before, on the clock that never jumps: it had expired, or a trigger kept it.
    pub aside_until_us: i64,
    /// It was read, so its count may be more than its row's: a slot is held for it there, until this transaction ends, its
    /// sending is undone or it is gone for good.
    pub held: Option<QueueRef>,
}

impl Local {
    fn is_leased(&self, now: Now) -> bool {
        matches!(self.state, State::Leased { until_us, .. } if until_us > now.mono_us)
    }
}

/// What a call that names a message finds among the own ones.
pub enum Own {
    /// It is not one of them.
    No,
    /// It is, and the fence holds: its row, and the lease it is under (0: none).
    Yes(Row, i64),
    /// It is, but finished, or under another lease.
    Lost,
}

/// What becomes of an own message.
pub enum Then {
    /// It is gone.
    Finish,
    /// It waits, with so many deliveries.
    Wait(u32),
    /// It waits, as its rewritten row says.
    Rewritten(Row),
    /// Its lease ends then; lengthened at once, shortened at commit.
    Until(i64),
}

/// All own messages, in the order in which they were sent.
#[derive(Default)]
pub struct Overlay {
    locals: Vec<Local>,
    /// The first so many are in the indexes.
    indexed: usize,
    by_id: HashMap<(u32, i64), usize>,
    /// Those that wait, in the order in which they are read.
    waiting: BTreeSet<(u32, i64)>,
    /// No lease ends before this.
    next_end_us: i64,
}

impl Overlay {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.locals.len()
    }

    /// One of them.
    pub fn get(&self, index: usize) -> Local {
        self.locals[index]
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Local> {
        self.locals.iter()
    }

    /// Makes room for so many more, so that `push` cannot fail.
    pub fn reserve(&mut self, more: usize) -> Result<(), std::collections::TryReserveError> {
        self.locals.try_reserve(more)
    }

    /// A message was sent.
    pub fn push(&mut self, relation: u32, row: Row) {
        let (state, row_count) = (State::Waiting, row.count);
        let (undone, is_unsure, aside_until_us, held) = (0, false, 0, None);
        self.locals.push(Local { relation, row, row_count, state, undone, is_unsure, aside_until_us, held });
    }

    /// The last send was undone.
    pub fn pop(&mut self) {
        if let Some(Local { relation, row, .. }) = self.locals.pop() {
            if self.indexed > self.locals.len() {
                self.indexed = self.locals.len();
                self.by_id.remove(&(relation, row.msg_id));
                self.waiting.remove(&(relation, row.msg_id));
            }
        }
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        // Called in callbacks, where nothing may be allocated: freeing only.
        if self.locals.capacity() > 1_024 {
            *self = Overlay::default();
        } else {
            self.locals.clear();
            self.by_id.clear();
            self.waiting.clear();
            self.indexed = 0;
        }
    }

    fn index(&mut self) {
        if self.indexed == 0 {
            self.next_end_us = NEVER_US;
        }
        for i in self.indexed..self.locals.len() {
            let Local { relation, row, .. } = self.locals[i];
            self.by_id.insert((relation, row.msg_id), i);
            self.waiting.insert((relation, row.msg_id));
        }
        self.indexed = self.locals.len();
    }

    /// The index of a message.
    pub fn find(&mut self, relation: u32, msg_id: i64) -> Option<usize> {
        if self.locals.is_empty() {
            return None;
        }
        self.index();
        self.by_id.get(&(relation, msg_id)).copied()
    }

    /// Sets a message as it is to be.
    pub fn set(&mut self, index: usize, local: Local) {
        self.index();
        let key = (local.relation, local.row.msg_id);
        self.locals[index] = local;
        match local.state {
            State::Waiting => {
                self.waiting.insert(key);
            }
            State::Leased { until_us, .. } => {
                self.waiting.remove(&key);
                self.next_end_us = self.next_end_us.min(until_us);
            }
            State::Gone => {
                self.waiting.remove(&key);
            }
        }
    }

    /// Undoes a change: the message is what it was, but a read that was undone still counts (so its slot is still held),
    /// and a lease that was lengthened stays so.
    pub fn restore(&mut self, index: usize, was: Local) {
        let is = self.locals[index];
        let lease_of = |local: &Local| match local.state {
            State::Leased { lease_id, .. } => Some(lease_id),
            State::Waiting | State::Gone => None,
        };
        let was_read = lease_of(&is).is_some() && lease_of(&is) != lease_of(&was);
        let undone = is.undone.saturating_add(u32::from(was_read));
        let mut local = Local { held: is.held, undone, ..was };
        local.row.count = was.row.count.saturating_add(undone.saturating_sub(was.undone));
        if let (State::Leased { lease_id, until_us, .. }, State::Leased { lease_id: held, until_us: now, .. }) =
            (&mut local.state, is.state)
        {
            if *lease_id == held {
                *until_us = now.max(*until_us);
            }
        }
        self.set(index, local);
    }

    /// Up to `most` messages of a table that may be read now, in the order of their ids.
    pub fn readable(&mut self, relation: u32, most: usize, policy: Policy, now: Now) -> Vec<usize> {
        if self.locals.is_empty() || policy.paused {
            return Vec::new();
        }
        self.index();
        if self.next_end_us <= now.mono_us {
            self.end_leases(now);
        }
        let mut found = Vec::new();
        for key in self.waiting.range((relation, i64::MIN)..=(relation, i64::MAX)) {
            if found.len() == most {
                break;
            }
            let Some(index) = self.by_id.get(key).copied() else { continue };
            let Local { row, aside_until_us, is_unsure, .. } = &self.locals[index];
            let is_due = *is_unsure || row.due_us(now).is_none();
            if is_due && *aside_until_us <= now.mono_us && !policy.is_exhausted(row.count) {
                found.push(index);
            }
        }
        found
    }

    /// When the next message of a table can be read, unless one can be now: its delay is over, or its lease.
    pub fn next_us(&mut self, relation: u32, policy: Policy, now: Now) -> i64 {
        if policy.paused {
            return NEVER_US;
        }
        let later = self.locals.iter().filter(|l| l.relation == relation && !policy.is_exhausted(l.row.count));
        let times = later.map(|local| match local.state {
            State::Waiting if local.is_unsure => local.aside_until_us.max(now.mono_us),
            State::Waiting => local.row.due_us(now).unwrap_or(now.mono_us).max(local.aside_until_us),
            State::Leased { until_us, .. } => until_us,
            State::Gone => NEVER_US,
        });
        times.min().unwrap_or(NEVER_US)
    }

    /// Leases that ended: their messages wait again. What was leased is not changed by that, so nothing of it
    /// needs to be undone.
    fn end_leases(&mut self, now: Now) {
        self.next_end_us = NEVER_US;
        for local in &self.locals {
            if let State::Leased { until_us, .. } = local.state {
                if until_us <= now.mono_us {
                    self.waiting.insert((local.relation, local.row.msg_id));
                } else {
                    self.next_end_us = self.next_end_us.min(until_us);
                }
            }
        }
    }

    /// Looks for a message that a call names.
    pub fn own(&mut self, relation: u32, msg_id: i64, lease_id: Option<i64>, now: Now) -> Own {
        let Some(index) = self.find(relation, msg_id) else { return Own::No };
        let local = self.locals[index];
        match (local.state, lease_id) {
            (State::Gone, _) => Own::Lost,
            (State::Leased { lease_id: held, .. }, claimed) if local.is_leased(now) => {
                if claimed.is_some_and(|claimed| claimed != held) {
                    Own::Lost
                } else {
                    Own::Yes(local.row, held)
                }
            }
            (_, Some(_)) => Own::Lost, // that lease has ended
            (_, None) => Own::Yes(local.row, 0),
        }
    }
}
