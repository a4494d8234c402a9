//! Publishing and taking: how a message becomes known, and how it goes out. Owns the lease's beginning and its
//! undoing; what ends it well is in `finish`.

use crate::arena::{Arena, QueueRef};
use crate::lease::Written;
use crate::policy::backoff_us;
use crate::slot::{Row, State, Tid};
use crate::tree::{self, Order};
use crate::{Effects, Now, NIL, NO_MARK};

/// What a committed transaction did to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Inserted it: whoever tracks the message already knows more.
    Insert,
    /// Updated it: where it lies and when it is due may have changed.
    Update,
}

/// Who takes, until when.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// End of the lease, on the clock that never jumps.
    pub until_us: i64,
    /// Process id of the backend that takes.
    pub pid: u32,
    /// The local id of its transaction; 0 if that has ended.
    pub lxid: u32,
    /// If the lease lasts longer than this, the worker is to write it; microseconds.
    pub flush_us: i64,
}

/// A message that was taken: where to find its row, and what holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// The message.
    pub msg_id: i64,
    /// The lease that this delivery was given.
    pub lease_id: i64,
    /// Where its row was when last heard of.
    pub tid: Tid,
    /// Deliveries, this one included.
    pub count: u32,
    /// The transaction of the last delivery rolled back: if this one's commits, it is told to
    /// [`Arena::lease_commit`].
    pub was_returned: bool,
}

/// What the row, once fetched, made of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It goes out; this is its delivery count.
    Deliver(u32),
    /// It does not: it is not due yet, had its last delivery, or the lease was lost meanwhile.
    Withdrawn,
}

impl Arena<'_> {
    /// Makes a committed row known. Called after its transaction became visible to others, in the transaction's
    /// own COMMIT callback: so possibly late, after others have loaded, taken or even finished the message. That
    /// is why it never overrules a slot beyond what the row says, and why a reader verifies what it takes.
    pub fn publish(&mut self, queue: QueueRef, row: Row, change: Change, now: Now, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let slot = self.find(q, row.msg_id);
        if slot != NIL {
            self.touch(slot, row, change, now, fx);
            return;
        }
        if let Some(due_us) = row.due_us(now) {
            self.publish_delayed(q, row, due_us, now, fx);
            return;
        }
        let record = &self.queues[q as usize];
        if record.loader == NIL && record.mark != NO_MARK && row.msg_id >= record.mark {
            self.announce_mark(q, fx); // whoever wakes finds the mark and loads
            return;
        }
        let is_exhausted = record.policy.is_exhausted(row.count);
        if is_exhausted && self.exhausted_left_out(q, row.msg_id) {
            return;
        }
        let slot = self.track(q, row);
        if slot == NIL {
            self.publish_slotless(q, row.msg_id, fx);
        } else {
            self.file_ready(slot, fx);
        }
    }

    fn publish_slotless(&mut self, q: u32, msg_id: i64, fx: &mut Effects) {
        self.mark_lower(q, msg_id);
        self.announce_mark(q, fx);
    }

    /// Publishes what had `count` deliveries within its sender's transaction, all undone, of which its row tells nothing:
    /// due or not, it has a slot, as in [`Arena::publish_leased`].
    pub fn publish_counted(&mut self, queue: QueueRef, row: Row, count: u32, now: Now, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let is_known = self.find(q, row.msg_id) != NIL;
        let slot = if is_known { NIL } else { self.alloc(q, row.msg_id) };
        if slot == NIL {
            self.publish(queue, row, Change::Insert, now, fx);
            self.count_own(queue, row.msg_id, count, fx);
            return;
        }
        self.describe(slot, row);
        self.slots[slot as usize].count = count.max(row.count);
        self.file_as_row(slot, row, now, fx);
    }

    /// Publishes what the transaction that sent it has also read: it comes into the world leased, for a slot was held
    /// ([`Arena::hold`]) and has just been let go. If a load was faster, the lease is given to what it found, unless that
    /// has been delivered to another already. If another transaction has named the message before it was there, it is
    /// leased once that has ended.
    pub fn publish_leased(
        &mut self,
        queue: QueueRef,
        row: Row,
        lease_id: i64,
        lease: Lease,
        now: Now,
        fx: &mut Effects,
    ) {
        let Some(q) = self.index_of(queue) else { return };
        let mut slot = self.find(q, row.msg_id);
        if slot != NIL {
            let record = &self.slots[slot as usize];
            // What has no address was never seen by whoever made the slot: somebody named it in vain.
            let is_named = State::from_u8(record.from) == State::Untracked || record.tid().offset == 0;
            if record.state() == State::Pinned && is_named && record.lease_running() == 0 {
                self.describe(slot, row);
                self.lease_begin(slot, row, lease_id, lease, now);
                let record = &mut self.slots[slot as usize];
                record.from = State::Born as u8;
                record.deadline_us = lease.until_us;
                self.list_pinned(slot);
                self.flush_lease(slot, fx);
                return;
            }
            if !matches!(record.state(), State::Ready | State::Exhausted) || record.lease_id != 0 {
                self.slots[slot as usize].is_touched = true; // whoever looks in vain is to look again
                return;
            }
            self.unfile(slot);
        } else {
            slot = self.alloc(q, row.msg_id);
            if slot == NIL {
                return self.publish_slotless(q, row.msg_id, fx);
            }
            self.describe(slot, row);
        }
        self.lease_begin(slot, row, lease_id, lease, now);
        self.file_leased(slot, lease.until_us, fx);
    }

    /// Deliveries that a message just published has had within its sender's transaction, reads that were undone
    /// included: its row tells nothing of them.
    pub fn count_own(&mut self, queue: QueueRef, msg_id: i64, count: u32, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let slot = self.find(q, msg_id);
        if slot != NIL {
            let record = &mut self.slots[slot as usize];
            record.count = record.count.max(count);
            self.file_by_count(slot, fx);
        }
    }

    /// The count of a message has changed: that it is ready, or had its last delivery, may have, too.
    fn file_by_count(&mut self, slot: u32, fx: &mut Effects) {
        let record = &self.slots[slot as usize];
        let state = record.state();
        if matches!(state, State::Ready | State::Exhausted) {
            let is_exhausted = self.queues[record.queue as usize].policy.is_exhausted(record.count);
            if is_exhausted != (state == State::Exhausted) {
                self.unfile(slot);
                self.file_ready(slot, fx);
            }
        }
    }

    fn lease_begin(&mut self, slot: u32, row: Row, lease_id: i64, lease: Lease, now: Now) {
        let record = &mut self.slots[slot as usize];
        record.count = record.count.max(row.count.saturating_add(1));
        record.lease_id = lease_id;
        record.leased_at_us = now.mono_us;
        record.pid = lease.pid;
        record.lxid = lease.lxid;
    }

    /// A message that will be visible later. True if it is tracked.
    pub(crate) fn publish_delayed(
        &mut self,
        q: u32,
        row: Row,
        due_us: i64,
        now: Now,
        fx: &mut Effects,
    ) -> bool {
        let visible_at_us = row.visible_at_us.unwrap_or(now.wall_us);
        let record = &mut self.queues[q as usize];
        if visible_at_us > record.horizon_us {
            self.beyond_at(q, visible_at_us, now, fx);
            return false;
        }
        let slot = self.alloc_delayed(q, row.msg_id);
        if slot == NIL {
            self.horizon_lower(q, visible_at_us);
            self.worker_wanted_at(q, due_us, fx);
            return false;
        }
        self.describe(slot, row);
        self.file_delayed(slot, due_us, fx);
        true
    }

    /// A message without a slot will be visible then, beyond the horizon.
    pub(crate) fn beyond_at(&mut self, q: u32, visible_at_us: i64, now: Now, fx: &mut Effects) {
        let record = &mut self.queues[q as usize];
        if visible_at_us < record.beyond_us {
            record.beyond_us = visible_at_us; // while a scan runs, it counts from what the scan finds
            self.worker_wanted_at(q, crate::load::scan_time_us(visible_at_us, now), fx);
        }
    }

    /// Gives a visible message a slot, if the queue may have one; it is to be filed. Returns it, or NIL.
    pub(crate) fn track(&mut self, q: u32, row: Row) -> u32 {
        let record = &self.queues[q as usize];
        let has_room = if record.policy.is_exhausted(row.count) {
            record.exhausted_len < self.head.config.window
        } else {
            self.window_has_room(q)
        };
        let slot = if has_room { self.alloc(q, row.msg_id) } else { NIL };
        if slot != NIL {
            self.describe(slot, row);
        }
        slot
    }

    pub(crate) fn describe(&mut self, slot: u32, row: Row) {
        let record = &mut self.slots[slot as usize];
        record.set_tid(row.tid);
        record.count = row.count;
        record.row_count = row.count;
    }

    /// A change of a tracked row is published. Two changes of one row may be published in the wrong order: a
    /// transaction is visible before its callback runs, so another may change the row again and publish that
    /// first. Hence a change never makes a message wait longer than it does already: whoever takes it too early
    /// reads the row and puts it off ([`Arena::settle`]); one that was put off by mistake would be lost.
    fn touch(&mut self, slot: u32, row: Row, change: Change, now: Now, fx: &mut Effects) {
        let record = &mut self.slots[slot as usize];
        let state = record.state();
        if matches!(state, State::Leased | State::Pinned) {
            record.is_touched = true;
        }
        if change == Change::Insert {
            // Lying elsewhere than the one that is known it is another message, whose id came anew: what is known of that
            // one does not hold for it. (Or this is published late, and the next reader looks in vain.)
            let is_known = record.tid().offset != 0 && record.tid() != row.tid;
            if is_known && matches!(state, State::Ready | State::Delayed | State::Exhausted) {
                self.unfile(slot);
                self.forget(slot);
                self.slots[slot as usize].set_tid(row.tid);
                self.file_ready(slot, fx);
            }
            return;
        }
        record.set_tid(row.tid);
        // Lowered by hand (an exhausted message gets another chance), or else what was not written yet stays.
        let is_lowered = row.count < record.row_count && !matches!(state, State::Leased | State::Pinned);
        record.count = if is_lowered { row.count } else { record.count.max(row.count) };
        record.row_count = row.count;
        if is_lowered {
            self.row_is_recounted(slot, fx);
        }
        let record = &self.slots[slot as usize];
        if state != State::Delayed {
            return self.file_by_count(slot, fx);
        }
        let deadline_us = record.deadline_us;
        self.unfile(slot);
        match row.due_us(now) {
            Some(due_us) => self.file_delayed(slot, due_us.min(deadline_us), fx),
            None => self.file_ready(slot, fx),
        }
    }

    /// Files a pinned slot as its row says: ready, delayed, or (beyond the horizon, or where delayed messages
    /// have no room) not at all. What the row does not know keeps its slot.
    pub(crate) fn file_as_row(&mut self, slot: u32, row: Row, now: Now, fx: &mut Effects) {
        let record = &self.slots[slot as usize];
        let (q, is_evictable) = (record.queue, record.is_evictable());
        let (Some(due_us), Some(visible_at_us)) = (row.due_us(now), row.visible_at_us) else {
            return self.file_ready(slot, fx);
        };
        let queue = &self.queues[q as usize];
        let is_near = visible_at_us <= queue.horizon_us && queue.delayed_len < self.head.config.window;
        if is_near || !is_evictable {
            self.file_delayed(slot, due_us, fx);
        } else {
            self.free(slot);
            self.publish_delayed(q, row, due_us, now, fx);
            self.room_made(fx);
        }
    }

    /// A slot whose row was not there when it was looked for, or was deleted: freed, unless a row with this id
    /// was published since. Then nothing is known but that.
    pub(crate) fn free_unless_touched(&mut self, slot: u32, fx: &mut Effects) {
        let record = &mut self.slots[slot as usize];
        let q = record.queue;
        let (is_touched, tid) = (record.is_touched, record.tid());
        // Of what was not tracked before it was pinned: what its sender has counted since.
        let is_new = record.state() == State::Pinned && State::from_u8(record.from) == State::Untracked;
        let count = if is_new { record.count } else { 0 };
        let is_dying = self.queues[q as usize].is_dying;
        if is_touched && !is_dying {
            self.forget(slot);
            let record = &mut self.slots[slot as usize];
            record.set_tid(tid);
            record.count = count;
            self.file_ready(slot, fx);
        } else {
            self.free(slot);
            self.room_made(fx);
        }
    }

    /// Nothing is known of a slot's message but that it may be there.
    fn forget(&mut self, slot: u32) {
        let record = &mut self.slots[slot as usize];
        record.count = 0;
        record.row_count = 0;
        record.returned = 0;
        record.lease_id = 0;
        record.is_touched = false;
        self.row_is_stale(slot);
    }

    /// Takes up to `out.len()` messages (at most [`crate::CHUNK_MAX`]); returns how many. What is due comes in
    /// first. Each one is leased and its delivery counted. 0 while [`Arena::has_ready`] says yes: only messages
    /// that turned out to be exhausted were met; call again.
    pub fn take(
        &mut self,
        queue: QueueRef,
        lease: Lease,
        now: Now,
        out: &mut [Taken],
        fx: &mut Effects,
    ) -> usize {
        let Some(q) = self.index_of(queue) else { return 0 };
        self.promote(q, now, fx);
        let policy = self.queues[q as usize].policy;
        if policy.paused || !self.queues[q as usize].is_configured || !self.queues[q as usize].is_restored {
            return 0;
        }
        self.queues[q as usize].flush_us = lease.flush_us;
        let mut taken = 0;
        // Exhausted messages met on the way (the limit was lowered) are work too, so that the loop is bounded.
        for _ in 0..2 * crate::CHUNK_MAX {
            if taken == out.len().min(crate::CHUNK_MAX) {
                break;
            }
            let slot = self.unfile_first_ready(q);
            if slot == NIL {
                break;
            }
            if policy.is_exhausted(self.slots[slot as usize].count) {
                self.file_ready(slot, fx);
                continue;
            }
            let lease_id = self.lease_id_next();
            let record = &mut self.slots[slot as usize];
            record.lease_id = lease_id;
            record.leased_at_us = now.mono_us;
            record.pid = lease.pid;
            record.lxid = lease.lxid;
            record.set_written(record.written().min(Written::Earlier));
            record.is_touched = false;
            record.count = record.count.saturating_add(1);
            out[taken] = Taken {
                msg_id: record.msg_id,
                lease_id,
                tid: record.tid(),
                count: record.count,
                was_returned: record.returned > 0,
            };
            self.file_leased(slot, lease.until_us, fx);
            taken += 1;
        }
        let record = &self.queues[q as usize];
        let is_low = record.ready_len < self.head.config.window.div_ceil(4);
        // Whoever took nothing loads itself.
        if taken > 0 && is_low && record.mark != NO_MARK && record.loader == NIL && !record.load_wanted {
            self.load_want(q, fx);
        }
        taken
    }

    /// The slot of a lease that runs, pinned or not; or NIL.
    fn lease_of(&self, queue: QueueRef, msg_id: i64, lease_id: i64) -> u32 {
        let Some(q) = self.index_of(queue) else { return NIL };
        let slot = self.find(q, msg_id);
        if slot != NIL && self.slots[slot as usize].lease_running() == lease_id && lease_id != 0 {
            slot
        } else {
            NIL
        }
    }

    /// The slot of a lease that runs and is not pinned; or NIL.
    fn leased(&self, queue: QueueRef, msg_id: i64, lease_id: i64) -> u32 {
        let slot = self.lease_of(queue, msg_id, lease_id);
        if slot != NIL && self.slots[slot as usize].state() == State::Leased {
            slot
        } else {
            NIL
        }
    }

    /// Compares a delivery with its row, which outranks the slot: a row that is not due yet goes back, one that
    /// was delivered more often than the slot knows raises it.
    pub fn settle(&mut self, queue: QueueRef, taken: Taken, row: Row, now: Now, fx: &mut Effects) -> Settled {
        let slot = self.leased(queue, taken.msg_id, taken.lease_id);
        if slot == NIL {
            return Settled::Withdrawn;
        }
        let q = self.slots[slot as usize].queue;
        let policy = self.queues[q as usize].policy;
        let record = &mut self.slots[slot as usize];
        record.set_tid(row.tid);
        if row.due_us(now).is_some() {
            // It was no delivery.
            record.count = record.count.saturating_sub(1).max(row.count);
            record.row_count = row.count;
            let is_touched = record.is_touched;
            self.row_is_recounted(slot, fx);
            self.unfile(slot);
            if is_touched {
                self.file_ready(slot, fx); // the row was changed since it was taken: the next one looks again
            } else {
                self.file_as_row(slot, row, now, fx);
            }
            return Settled::Withdrawn;
        }
        record.row_count = record.row_count.max(row.count);
        if row.count >= record.count {
            if policy.is_exhausted(row.count) {
                record.count = row.count; // it was no delivery
                self.unfile(slot);
                self.file_ready(slot, fx);
                return Settled::Withdrawn;
            }
            record.count = row.count.saturating_add(1);
            record.set_written(record.written().min(Written::Earlier));
            self.flush_lease(slot, fx);
        }
        Settled::Deliver(self.slots[slot as usize].count)
    }

    /// The row of a delivery is gone: the message was finished by plain SQL. Only for who looked for it under a
    /// snapshot taken after the message was.
    pub fn drop_taken(&mut self, queue: QueueRef, taken: Taken, fx: &mut Effects) {
        let slot = self.leased(queue, taken.msg_id, taken.lease_id);
        if slot != NIL {
            self.unfile(slot);
            self.free_unless_touched(slot, fx);
        }
    }

    /// The transaction that read it committed, which ends a row of reads that rolled back. Of a message whose last
    /// read did not ([`Taken::was_returned`]) there is nothing to tell: a lease belongs to no session.
    pub fn lease_commit(&mut self, queue: QueueRef, msg_id: i64, lease_id: i64) {
        let slot = self.lease_of(queue, msg_id, lease_id);
        if slot != NIL {
            self.slots[slot as usize].returned = 0;
        }
    }

    /// The transaction that read it did not commit: it goes back at once, counted; from the second time in a row
    /// after the queue's backoff, so that a message that makes its consumer's transaction fail does not spin. If
    /// another transaction has pinned it meanwhile, that is where it goes when the pin is undone.
    pub fn lease_return(&mut self, queue: QueueRef, msg_id: i64, lease_id: i64, now: Now, fx: &mut Effects) {
        let slot = self.lease_of(queue, msg_id, lease_id);
        if slot == NIL {
            return;
        }
        let is_pinned = self.slots[slot as usize].state() == State::Pinned;
        self.unfile(slot);
        let record = &mut self.slots[slot as usize];
        record.returned = record.returned.saturating_add(1);
        let (returned, count) = (u32::from(record.returned), record.count);
        let policy = self.queues[record.queue as usize].policy;
        let does_wait = returned >= 2 && !policy.is_exhausted(count);
        let wait_us = if does_wait { backoff_us(&policy, returned - 1, lease_id as u64) } else { 0 };
        let deadline_us = now.mono_us.saturating_add(wait_us);
        if is_pinned {
            record.from = State::Delayed as u8;
            record.deadline_us = deadline_us;
            self.unlist_pinned(slot);
        } else if does_wait {
            self.file_delayed(slot, deadline_us, fx);
        } else {
            self.file_ready(slot, fx);
        }
    }

    /// Makes ready what is due: leases that ended (counted), delays that are over. At most
    /// [`crate::CHUNK_MAX`] at a time. Returns the deadline of the next one.
    pub(crate) fn promote(&mut self, q: u32, now: Now, fx: &mut Effects) -> i64 {
        for _ in 0..crate::CHUNK_MAX {
            let slot = tree::first(self.slots, self.queues[q as usize].timed);
            if slot == NIL {
                return crate::NEVER_US;
            }
            let deadline_us = self.slots[slot as usize].deadline_us;
            if deadline_us > now.mono_us {
                return deadline_us;
            }
            self.unfile(slot);
            self.file_ready(slot, fx);
        }
        now.mono_us
    }

    /// Whether a lease's end is past; then it is treated as ended, whoever comes first.
    pub(crate) fn expire(&mut self, slot: u32, now: Now, fx: &mut Effects) {
        let record = &self.slots[slot as usize];
        if record.state() == State::Leased && record.deadline_us <= now.mono_us {
            self.unfile(slot);
            self.file_ready(slot, fx);
        }
    }

    /// Moves a leased slot's deadline.
    pub(crate) fn lease_move(&mut self, slot: u32, until_us: i64, fx: &mut Effects) {
        let q = self.slots[slot as usize].queue as usize;
        tree::remove(self.slots, self.head.epoch, &mut self.queues[q].timed, slot, Order::Deadline);
        self.slots[slot as usize].deadline_us = until_us;
        tree::insert(self.slots, self.head.epoch, &mut self.queues[q].timed, slot, Order::Deadline);
        self.worker_wanted_at(q as u32, until_us, fx);
        self.lease_is_moved(slot, fx);
    }

    /// A lease ends at another time than its row says.
    pub(crate) fn lease_is_moved(&mut self, slot: u32, fx: &mut Effects) {
        let record = &mut self.slots[slot as usize];
        record.set_written(record.written().min(Written::Count));
        self.flush_lease(slot, fx);
    }

    /// A delivery that is not to be: the message comes back at `until_us`, and it does not count.
    pub fn put_off(&mut self, queue: QueueRef, taken: Taken, until_us: i64, fx: &mut Effects) {
        let slot = self.leased(queue, taken.msg_id, taken.lease_id);
        if slot != NIL {
            self.unfile(slot);
            let record = &mut self.slots[slot as usize];
            record.count = record.count.saturating_sub(1).max(record.row_count);
            self.row_is_recounted(slot, fx);
            self.file_delayed(slot, until_us, fx);
        }
    }

    /// What was taken is not there, or not due, for this transaction at least, which may have done that itself: it is
    /// pinned in its name as if it had been ready. Nobody was given it, so that it is no lease, and does not count. False:
    /// the lease is over.
    pub fn pin_withdrawn(&mut self, queue: QueueRef, taken: Taken, owner: u32, fx: &mut Effects) -> bool {
        let slot = self.leased(queue, taken.msg_id, taken.lease_id);
        if slot == NIL {
            return false;
        }
        self.unfile(slot);
        let record = &mut self.slots[slot as usize];
        record.count = record.count.saturating_sub(1).max(record.row_count);
        record.from = State::Ready as u8;
        record.pinner = owner;
        self.row_is_recounted(slot, fx);
        true
    }

    /// Something may be had under the mark.
    pub fn load_needed(&self, queue: QueueRef) -> bool {
        self.index_of(queue).is_some_and(|q| self.queues[q as usize].mark != NO_MARK)
    }

    /// Something may be taken at once, what has just become due included.
    pub fn look_ready(&mut self, queue: QueueRef, now: Now, fx: &mut Effects) -> bool {
        if let Some(q) = self.index_of(queue) {
            self.promote(q, now, fx);
        }
        self.has_ready(queue)
    }

    /// Something may be taken at once.
    pub fn has_ready(&self, queue: QueueRef) -> bool {
        self.index_of(queue).is_some_and(|q| {
            let queue = &self.queues[q as usize];
            queue.ready_len > 0 && queue.is_configured && queue.is_restored && !queue.policy.paused
        })
    }
}
