//! What ends a delivery: finish, retry, release, cancel, extend. Owns pins. A pinned slot neither expires nor is
//! taken, however late its transaction commits; the pin says where the slot goes if it does not.

use crate::arena::{Arena, QueueRef};
use crate::lease::Written;
use crate::slot::{Row, State, Tid};
use crate::{Effects, Now, NIL};

/// Whose claim a finish rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// Nobody's: it acts on the message whoever holds it.
    Any,
    /// A delivery's: refused once that lease has ended.
    Lease(i64),
    /// Nobody may hold it (queue_cancel).
    NotLeased,
}

/// A message that was pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// Where its row was when last heard of; offset 0: not known.
    pub tid: Tid,
    /// Deliveries so far.
    pub count: u32,
    /// The lease it was under, 0 for none.
    pub lease_id: i64,
}

/// What came of an attempt to pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// It is pinned.
    Done(Pinned),
    /// The fence does not hold.
    Lost,
    /// Another transaction's finish or retry waits for its commit.
    Busy,
    /// It has no slot and cannot have one; the caller goes to the heap, and lowers the mark if it aborts.
    NoSlot,
}

impl Arena<'_> {
    /// Pins a message for a finish, retry or release in the open transaction of backend `owner`.
    pub fn pin(
        &mut self,
        queue: QueueRef,
        msg_id: i64,
        fence: Fence,
        owner: u32,
        now: Now,
        fx: &mut Effects,
    ) -> Pin {
        let Some(q) = self.index_of(queue) else { return Pin::NoSlot };
        let slot = self.find(q, msg_id);
        if slot == NIL {
            if let Fence::Lease(_) = fence {
                return Pin::Lost; // a lease always has a slot
            }
            let slot = self.alloc(q, msg_id);
            if slot == NIL {
                return Pin::NoSlot;
            }
            self.slots[slot as usize].pinner = owner;
            return Pin::Done(Pinned { tid: Tid::default(), count: 0, lease_id: 0 });
        }
        self.expire(slot, now, fx);
        let record = &self.slots[slot as usize];
        let state = record.state();
        let lease_id = if state == State::Leased { record.lease_id } else { 0 };
        match (state, fence) {
            (State::Pinned, _) => return Pin::Busy,
            (_, Fence::Lease(claimed)) if lease_id != claimed || lease_id == 0 => return Pin::Lost,
            (State::Leased, Fence::NotLeased) => return Pin::Lost,
            _ => {}
        }
        self.unfile(slot);
        let record = &mut self.slots[slot as usize];
        record.pinner = owner;
        record.is_touched = false; // whoever pins looks at the row after this
        let pinned = Pinned { tid: record.tid(), count: record.count, lease_id };
        if lease_id != 0 {
            self.list_pinned(slot);
            if self.slots[slot as usize].written() < Written::Count {
                self.flush_lease(slot, fx); // a walk that has passed the list comes again
            }
        }
        Pin::Done(pinned)
    }

    /// What this backend has pinned, if it has, and holds no lease: to deal with it otherwise.
    pub fn pinned_again(&mut self, queue: QueueRef, msg_id: i64, owner: u32) -> Option<Pinned> {
        let slot = self.pinned(queue, msg_id, owner);
        let record = self.slots.get_mut(slot as usize)?;
        record.is_touched = false; // as in `pin`
        Some(Pinned { tid: record.tid(), count: record.count, lease_id: 0 })
    }

    /// The slot that this backend has pinned, or NIL.
    fn pinned(&self, queue: QueueRef, msg_id: i64, owner: u32) -> u32 {
        // A dying queue's pins are let go all the same, hence no `is_current`.
        if queue.epoch != self.head.epoch || queue.index as usize >= self.queues.len() {
            return NIL;
        }
        if self.queues[queue.index as usize].generation != queue.generation {
            return NIL;
        }
        let slot = self.find(queue.index, msg_id);
        if slot != NIL {
            let record = &self.slots[slot as usize];
            if record.state() == State::Pinned && record.pinner == owner {
                return slot;
            }
        }
        NIL
    }

    /// The finish committed: the message is gone (unless its id was inserted anew meanwhile).
    pub fn pin_finish(&mut self, queue: QueueRef, msg_id: i64, owner: u32, fx: &mut Effects) {
        let slot = self.pinned(queue, msg_id, owner);
        if slot == NIL {
            return;
        }
        let record = &self.slots[slot as usize];
        if State::from_u8(record.from) == State::Born && self.is_current(queue) {
            self.file_leased(slot, record.deadline_us, fx); // it was not there yet when it was to be finished
        } else {
            self.free_unless_touched(slot, fx);
        }
    }

    /// The finish did not commit, or found that it is not to be: the message goes back to where it was. A lease
    /// that ended meanwhile has ended: ready, and counted.
    pub fn pin_undo(&mut self, queue: QueueRef, msg_id: i64, owner: u32, now: Now, fx: &mut Effects) {
        let slot = self.pinned(queue, msg_id, owner);
        if slot == NIL {
            return;
        }
        if !self.is_current(queue) {
            self.free(slot);
            self.room_made(fx);
            return;
        }
        let record = &self.slots[slot as usize];
        let (from, deadline_us) = (State::from_u8(record.from), record.deadline_us);
        let is_touched = record.is_touched;
        let is_over = deadline_us <= now.mono_us;
        match from {
            State::Leased | State::Born if !is_over => self.file_leased(slot, deadline_us, fx),
            State::Delayed if !is_over && !is_touched => self.file_delayed(slot, deadline_us, fx),
            // Pins of what is not tracked are not bounded by the window; what they leave behind is.
            State::Untracked if !self.window_has_room(queue.index) => {
                self.free(slot);
                self.mark_lower(queue.index, msg_id);
                self.room_made(fx);
            }
            // Untracked: a load may have passed it by while it was pinned. Ready; the row will say if it is not.
            _ => self.file_ready(slot, fx),
        }
    }

    /// The message turned out not to be in the heap at all. Only for who looked for it under a snapshot taken
    /// after the pin.
    pub fn pin_drop(&mut self, queue: QueueRef, msg_id: i64, owner: u32, fx: &mut Effects) {
        self.pin_finish(queue, msg_id, owner, fx);
    }

    /// The retry committed: the row was rewritten and says when it is due.
    pub fn pin_refile(&mut self, queue: QueueRef, row: Row, owner: u32, now: Now, fx: &mut Effects) {
        let slot = self.pinned(queue, row.msg_id, owner);
        if slot == NIL {
            return;
        }
        let record = &self.slots[slot as usize];
        let is_delivered = State::from_u8(record.from) == State::Leased;
        let delivered = record.count;
        let count = if is_delivered { delivered.saturating_sub(1) } else { delivered };
        let is_lowered = row.count < record.row_count;
        self.describe(slot, row);
        if row.count >= delivered {
            self.row_is_stale(slot); // the message's own row has the count now
        } else {
            self.row_is_recounted(slot, fx); // it was given back
        }
        let record = &mut self.slots[slot as usize];
        // What the row does not tell of (reads that were undone) is not forgotten, unless it was lowered by hand.
        record.count = if is_lowered { row.count } else { row.count.max(count) };
        record.returned = 0;
        let is_touched = record.is_touched;
        if !self.is_current(queue) {
            self.free(slot);
            self.room_made(fx);
        } else if is_touched {
            self.file_ready(slot, fx); // another transaction has changed the row again: the next reader looks
        } else {
            self.file_as_row(slot, row, now, fx);
        }
    }

    /// The release committed: ready again, and the delivery is not counted.
    pub fn pin_release(&mut self, queue: QueueRef, msg_id: i64, owner: u32, fx: &mut Effects) {
        let slot = self.pinned(queue, msg_id, owner);
        if slot == NIL {
            return;
        }
        let record = &mut self.slots[slot as usize];
        if State::from_u8(record.from) == State::Leased {
            record.count = record.count.saturating_sub(1).max(record.row_count);
        }
        record.returned = 0;
        self.row_is_recounted(slot, fx);
        if self.is_current(queue) {
            self.file_ready(slot, fx);
        } else {
            self.free(slot);
            self.room_made(fx);
        }
    }

    /// Lengthens a lease to `until_us` at once; one that ends later already is left as it is. Returns when it
    /// ends now and its id, or `None` if the lease is lost. A pinned lease is lengthened too: it runs on if the
    /// pin is undone.
    pub fn extend(
        &mut self,
        queue: QueueRef,
        msg_id: i64,
        fence: Fence,
        until_us: i64,
        now: Now,
        fx: &mut Effects,
    ) -> Option<(i64, i64)> {
        let slot = self.find(self.index_of(queue)?, msg_id);
        if slot == NIL {
            return None;
        }
        self.expire(slot, now, fx);
        let record = &mut self.slots[slot as usize];
        let lease_id = record.lease_running();
        if lease_id == 0 || matches!(fence, Fence::Lease(claimed) if claimed != lease_id) {
            return None;
        }
        if record.state() == State::Pinned {
            record.deadline_us = record.deadline_us.max(until_us);
            self.lease_is_moved(slot, fx);
        } else if until_us > record.deadline_us {
            self.lease_move(slot, until_us, fx);
        }
        Some((self.slots[slot as usize].deadline_us, lease_id))
    }

    /// Shortens a lease to `until_us`, at the commit that asked for it.
    pub fn shorten(&mut self, queue: QueueRef, msg_id: i64, lease_id: i64, until_us: i64, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let slot = self.find(q, msg_id);
        if slot == NIL {
            return;
        }
        let record = &self.slots[slot as usize];
        if record.state() == State::Leased && record.lease_id == lease_id && until_us < record.deadline_us {
            self.lease_move(slot, until_us, fx);
            self.row_is_too_long(slot, fx);
        }
    }
}
