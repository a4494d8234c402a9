//! Leases that reach the tables. Owns what is known of a lease's row in the catalog: which leases must be written,
//! which rows have become stale, and how leases come back after memory was lost. Writes nothing itself: the worker
//! does, and tells what it wrote.
//!
//! # What is written
//!
//! A lease that outlives the flush interval gets a row: its message, its fence, its count, its deadline. While the
//! transaction that read the message is open only the count is written, for if the server dies that transaction has
//! rolled back, and the lease with it. Nobody tells the dispatcher that a read has committed (that is why a read's
//! commit takes no lock): the worker asks Postgres whether the transaction that is named in the slot still runs.
//!
//! A row outlives its lease, as the count of an ended one, until the message is gone or its own row knows the count
//! (a retry writes it). Rows that are not needed any more do no harm, so they are swept together after a while.
//!
//! # What comes back
//!
//! A queue that was just attached delivers nothing before its rows were read ([`Arena::restore_begin`] to
//! [`Arena::restore_end`]): whoever attaches it does that.

use crate::arena::{Arena, QueueRef};
use crate::slot::{Row, State};
use crate::tree::{self, Order};
use crate::{Effects, Now, NEVER_US, NIL, NO_MARK};

/// How long stale rows lie before they are swept together, microseconds.
pub const SWEEP_US: i64 = 10_000_000;

/// How much of a lease its row in the catalog holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Written {
    /// There is no row.
    No = 0,
    /// There is one, of an earlier lease.
    Earlier = 1,
    /// Its count and fence, not when it ends.
    Count = 2,
    /// All of it.
    Whole = 3,
}

/// What became of the count of a lease that somebody waits to have on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseCount {
    /// Its row in the catalog has it.
    Written,
    /// It is to be written.
    Open,
    /// The message was finished.
    Gone,
    /// The lease is over, or nothing is known of it: nobody may ever write it.
    Over,
}

impl Written {
    pub(crate) fn from_u8(raw: u8) -> Written {
        match raw {
            1 => Written::Earlier,
            2 => Written::Count,
            3 => Written::Whole,
            _ => Written::No,
        }
    }
}

/// A lease, as far as its row says it. Times on the clock that never jumps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseRow {
    /// The message.
    pub msg_id: i64,
    /// The fence.
    pub lease_id: i64,
    /// Deliveries, this one included.
    pub count: u32,
    /// When it began.
    pub leased_at_us: i64,
    /// When it ends.
    pub until_us: i64,
    /// Process id of the backend that took it.
    pub pid: u32,
    /// The local id of the transaction that took it.
    pub lxid: u32,
    /// What is written of it already.
    pub written: Written,
}

/// A row to fill a chunk with.
impl Default for LeaseRow {
    fn default() -> Self {
        LeaseRow {
            msg_id: 0,
            lease_id: 0,
            count: 0,
            leased_at_us: 0,
            until_us: 0,
            pid: 0,
            lxid: 0,
            written: Written::No,
        }
    }
}

/// Where a walk over a queue's leases goes on. First come those that are pinned, by the list they are in, then the
/// others, by their deadlines. A lease that moves while the walk goes on may come twice; one that the walk misses has
/// asked for another.
#[derive(Clone, Copy, Debug)]
pub struct LeaseWalk {
    stage: Stage,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Start,
    /// The next slot of the list, and its message.
    Pinned(u32, i64),
    /// Behind this deadline and message.
    Timed(i64, i64),
}

impl LeaseWalk {
    /// At the beginning.
    pub const START: LeaseWalk = LeaseWalk { stage: Stage::Start };
}

/// Whether a queue's leases are to be read from their rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restore {
    /// They have been.
    Done,
    /// By the caller, now. [`Arena::restore_end`] must follow.
    Begun,
    /// Another backend is at it.
    Busy,
}

/// What is to become of a lease's row, as far as the dispatcher knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFate {
    /// It stays as it is.
    Keep,
    /// It is of a delivery that was given back or that ended before its time, or of a message from before the table was
    /// truncated: this is the count now, 0 for none to be kept; and there is no lease.
    Recount(u32),
}

impl Arena<'_> {
    // ---- writing ---------------------------------------------------------------------------------------------

    /// A lease was taken or moved: somebody is to look at `at_us` whether it must be written.
    pub(crate) fn flush_wanted_at(&mut self, q: u32, at_us: i64, fx: &mut Effects) {
        let queue = &mut self.queues[q as usize];
        if at_us < queue.flush_at_us {
            queue.flush_at_us = at_us;
            self.worker_called_at(q, at_us, fx);
        }
    }

    /// A lease that is not wholly written, and will outlive the interval, is to be looked at by the worker.
    pub(crate) fn flush_lease(&mut self, slot: u32, fx: &mut Effects) {
        let record = &self.slots[slot as usize];
        let q = record.queue;
        // What was restored may be extended before anybody reads: then the worker, which is called, knows the interval.
        let at_us = record.leased_at_us.saturating_add(self.queues[q as usize].flush_us.max(0));
        if record.written() != Written::Whole && at_us < record.deadline_us {
            self.flush_wanted_at(q, at_us, fx);
        }
    }

    /// The worker is about to look for leases to write. What is taken from now on asks anew.
    pub fn flush_begin(&mut self, queue: QueueRef) {
        if let Some(q) = self.index_of(queue) {
            self.queues[q as usize].flush_at_us = NEVER_US;
        }
    }

    /// Gives leases that began at least `interval_us` (or what the queue's last reader asked for, if that is less) ago
    /// and are not wholly written, and says how many and whether that was all. Looks at no more than
    /// [`crate::CHUNK_MAX`]; call it again with the same `walk` until it was. Those that are younger are looked at when
    /// they are old enough.
    pub fn flush_next(
        &mut self,
        queue: QueueRef,
        walk: &mut LeaseWalk,
        interval_us: i64,
        now: Now,
        out: &mut [LeaseRow],
    ) -> (usize, bool) {
        let Some(q) = self.index_of(queue) else { return (0, true) };
        let asked_us = Some(self.queues[q as usize].flush_us).filter(|us| *us >= 0);
        let interval_us = asked_us.map_or(interval_us, |us| us.min(interval_us));
        let mut found = 0;
        for _ in 0..crate::CHUNK_MAX {
            if found == out.len() {
                return (found, false);
            }
            let slot = match walk.stage {
                Stage::Start => self.queues[q as usize].pinned,
                Stage::Pinned(slot, msg_id) => {
                    let record = &self.slots[slot as usize];
                    if !record.is_listed || record.queue != q || record.msg_id != msg_id {
                        // The list has changed under the walk: what it misses is looked at in the next round.
                        self.flush_comes_at(q, now.mono_us);
                        NIL
                    } else {
                        slot
                    }
                }
                Stage::Timed(deadline_us, msg_id) => {
                    let root = self.queues[q as usize].timed;
                    let slot = tree::after(self.slots, root, (deadline_us, msg_id), Order::Deadline);
                    if slot == NIL {
                        return (found, true);
                    }
                    slot
                }
            };
            walk.stage = match walk.stage {
                _ if slot == NIL => Stage::Timed(i64::MIN, i64::MIN),
                Stage::Timed(..) => {
                    Stage::Timed(self.slots[slot as usize].deadline_us, self.slots[slot as usize].msg_id)
                }
                Stage::Start | Stage::Pinned(..) => match self.slots[slot as usize].right {
                    NIL => Stage::Timed(i64::MIN, i64::MIN),
                    next => Stage::Pinned(next, self.slots[next as usize].msg_id),
                },
            };
            if slot != NIL && self.slots[slot as usize].lease_running() != 0 {
                found += self.flush_look(q, slot, interval_us, now, &mut out[found..]);
            }
        }
        (found, false)
    }

    /// The worker, which is at it, looks for leases to write again at `at_us`.
    fn flush_comes_at(&mut self, q: u32, at_us: i64) {
        let queue = &mut self.queues[q as usize];
        queue.flush_at_us = queue.flush_at_us.min(at_us);
        self.worker_comes_at(q, at_us);
    }

    /// Looks at one lease; 1 if it is to be written.
    fn flush_look(&mut self, q: u32, slot: u32, interval_us: i64, now: Now, out: &mut [LeaseRow]) -> usize {
        let record = &self.slots[slot as usize];
        if record.written() == Written::Whole {
            return 0;
        }
        let at_us = record.leased_at_us.saturating_add(interval_us);
        if at_us > now.mono_us {
            if at_us < record.deadline_us {
                self.flush_comes_at(q, at_us);
            }
            return 0;
        }
        out[0] = LeaseRow {
            msg_id: record.msg_id,
            lease_id: record.lease_id,
            count: record.count,
            leased_at_us: record.leased_at_us,
            until_us: record.deadline_us,
            pid: record.pid,
            lxid: record.lxid,
            written: record.written(),
        };
        1
    }

    /// The worker's transaction that wrote this lease has committed.
    pub fn lease_written(&mut self, queue: QueueRef, row: &LeaseRow, written: Written, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let slot = self.find(q, row.msg_id);
        if slot == NIL {
            let queue = &mut self.queues[q as usize];
            queue.rows_are_stale = true; // finished meanwhile
            if queue.was_emptied {
                self.sweep_wanted(q, fx);
            }
            return;
        }
        let record = &mut self.slots[slot as usize];
        if record.lease_running() != row.lease_id {
            // Over meanwhile; if it was given back, the row says one delivery too many, and a deadline.
            record.set_written(record.written().max(Written::Earlier));
            self.queues[q as usize].rows_are_stale = true;
            self.sweep_wanted(q, fx);
            return;
        }
        let (is_moved, is_shortened) = (record.deadline_us != row.until_us, record.deadline_us < row.until_us);
        record.set_written(match () {
            () if record.count != row.count => Written::Earlier,
            () if is_moved => Written::Count.min(written),
            () => written,
        });
        if is_moved || record.count != row.count {
            self.flush_lease(slot, fx);
        }
        if is_shortened {
            self.row_is_too_long(slot, fx);
        }
    }

    /// Leases are to be looked at again then: one could not be written yet.
    pub fn flush_again(&mut self, queue: QueueRef, at_us: i64, fx: &mut Effects) {
        if let Some(q) = self.index_of(queue) {
            self.flush_wanted_at(q, at_us, fx);
        }
    }

    /// What became of the count of this lease, which somebody waits to have on disk.
    pub fn lease_count(&self, queue: QueueRef, msg_id: i64, lease_id: i64) -> LeaseCount {
        let Some(q) = self.index_of(queue) else { return LeaseCount::Over };
        let slot = self.find(q, msg_id);
        if slot == NIL {
            // What knows more deliveries than its row keeps its slot.
            LeaseCount::Gone
        } else if self.slots[slot as usize].lease_running() != lease_id {
            LeaseCount::Over
        } else if self.slots[slot as usize].written() >= Written::Count {
            LeaseCount::Written
        } else {
            LeaseCount::Open
        }
    }

    /// A backend sleeps until the worker of its database has written leases.
    pub fn written_wait(&mut self, proc: u32, database: u32) {
        let db = self.db_find(database).unwrap_or(NIL);
        if let Some(waiter) = self.waiters.get_mut(proc as usize) {
            waiter.written_db = db;
        }
    }

    /// The worker of a database has written leases: who sleeps until then is woken. Looks at every backend once.
    pub fn written_wake(&mut self, database: u32, fx: &mut Effects) {
        let Some(db) = self.db_find(database) else { return };
        for proc in 0..self.waiters.len() {
            if self.waiters[proc].written_db == db {
                self.waiters[proc].written_db = NIL;
                if fx.has_room() {
                    fx.wake(proc as u32);
                } else {
                    fx.wake_everyone();
                }
            }
        }
    }

    // ---- rows that are not needed any more -------------------------------------------------------------------

    /// A slot is given up or its message's row knows all: the lease's row, if there is one, is stale.
    pub(crate) fn row_is_stale(&mut self, slot: u32) {
        let record = &mut self.slots[slot as usize];
        if record.written() != Written::No {
            record.set_written(Written::No);
            self.queues[record.queue as usize].rows_are_stale = true;
        }
    }

    /// A delivery was given back and does not count: its row says otherwise.
    pub(crate) fn row_is_recounted(&mut self, slot: u32, fx: &mut Effects) {
        let record = &mut self.slots[slot as usize];
        if record.written() != Written::No {
            record.set_written(Written::Earlier);
            let q = record.queue;
            self.sweep_wanted(q, fx);
        }
    }

    /// A lease is to end earlier than its row says: should it do so before the worker has written that, the row is to be
    /// corrected, too.
    pub(crate) fn row_is_too_long(&mut self, slot: u32, fx: &mut Effects) {
        let record = &self.slots[slot as usize];
        if record.written() == Written::Count {
            self.sweep_wanted(record.queue, fx);
        }
    }

    /// Rows say more than holds, which a restart would believe: they are to be corrected after a while, even if the worker
    /// has nothing else to do.
    pub(crate) fn sweep_wanted(&mut self, q: u32, fx: &mut Effects) {
        let queue = &mut self.queues[q as usize];
        queue.rows_are_recounted = true;
        if queue.sweep_at_us == NEVER_US {
            self.worker_called_at(q, 0, fx); // it looks at the clock
        }
    }

    /// The worker is about to sweep the queue's rows together. Returns whether some are of deliveries that were given
    /// back, which only the dispatcher knows ([`Arena::row_fate`]).
    pub fn sweep_begin(&mut self, queue: QueueRef) -> bool {
        let Some(q) = self.index_of(queue) else { return false };
        let queue = &mut self.queues[q as usize];
        queue.rows_are_stale = false;
        queue.sweep_at_us = NEVER_US;
        core::mem::take(&mut queue.rows_are_recounted)
    }

    /// The sweep failed: it is to be made again.
    pub fn sweep_again(&mut self, queue: QueueRef) {
        if let Some(q) = self.index_of(queue) {
            self.queues[q as usize].rows_are_stale = true;
            self.queues[q as usize].rows_are_recounted = true;
        }
    }

    /// What is to become of a row that says that a message was delivered `count` times. Once that has been committed,
    /// [`Arena::row_is_corrected`] is to follow.
    pub fn row_fate(&self, queue: QueueRef, msg_id: i64, count: u32) -> RowFate {
        let Some(q) = self.index_of(queue) else { return RowFate::Keep };
        let slot = self.find(q, msg_id);
        let is_known = slot != NIL && self.slots[slot as usize].written() != Written::No;
        if self.queues[q as usize].was_emptied && !is_known {
            return RowFate::Recount(0);
        }
        if slot == NIL {
            return RowFate::Keep;
        }
        let record = &self.slots[slot as usize];
        let is_over = matches!(record.state(), State::Ready | State::Delayed | State::Exhausted);
        let says_too_long = record.count == count && record.written() == Written::Count;
        if !is_over || record.count >= count && !says_too_long {
            RowFate::Keep
        } else if record.count > record.row_count {
            RowFate::Recount(record.count)
        } else {
            RowFate::Recount(0)
        }
    }

    /// A row was corrected as [`Arena::row_fate`] had it: this is the count that it says now, without a deadline; 0: it is
    /// not there any more. A message that waits for long has no slot then.
    pub fn row_is_corrected(&mut self, queue: QueueRef, msg_id: i64, count: u32, now: Now, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let slot = self.find(q, msg_id);
        let Some(record) = self.slots.get_mut(slot as usize) else { return };
        let is_over = matches!(record.state(), State::Ready | State::Delayed | State::Exhausted);
        if !is_over || count > 0 {
            if is_over && record.count == count && record.written() == Written::Count {
                record.set_written(Written::Whole);
            }
            return;
        }
        record.set_written(Written::No);
        // Its row has it wait: nothing else does so for longer than a scan looks ahead.
        let wait_us = record.deadline_us.saturating_sub(now.mono_us);
        let is_late = record.state() == State::Delayed && wait_us > crate::load::HORIZON_US;
        let visible_at_us = now.wall_us.saturating_add(wait_us);
        if is_late && record.is_evictable() && visible_at_us > self.queues[q as usize].horizon_us {
            self.unfile(slot);
            self.free(slot);
            self.beyond_at(q, visible_at_us, now, fx);
            self.room_made(fx);
        }
    }

    // ---- coming back -----------------------------------------------------------------------------------------

    /// Begins to restore a queue's leases, unless that was done since it was attached.
    pub fn restore_begin(&mut self, queue: QueueRef, loader: u32) -> Restore {
        let Some(q) = self.index_of(queue) else { return Restore::Done };
        let record = &mut self.queues[q as usize];
        if record.is_restored {
            Restore::Done
        } else if record.loader != NIL {
            Restore::Busy
        } else {
            record.loader = loader;
            record.is_restoring = true;
            Restore::Begun
        }
    }

    /// A lease's row, and what the message's own row says (`row.count` is less than the lease's). A lease that has
    /// ended leaves its count. False: there is no room for it.
    pub fn lease_restore(
        &mut self,
        queue: QueueRef,
        lease: &LeaseRow,
        row: Row,
        now: Now,
        fx: &mut Effects,
    ) -> bool {
        let Some(q) = self.index_of(queue) else { return true };
        self.lease_id_avoid(lease.lease_id);
        let mut slot = self.find(q, lease.msg_id);
        if slot == NIL {
            slot = self.alloc(q, lease.msg_id);
            if slot == NIL {
                return false;
            }
            self.describe(slot, row);
        } else {
            let record = &self.slots[slot as usize];
            if record.lease_id != 0 || record.row_count >= lease.count {
                return true; // published since those rows were read, by one who knows more
            }
            if record.state() == State::Pinned {
                self.restore_pinned(slot, lease, now, fx);
                return true;
            }
            self.unfile(slot);
            self.restore_into(slot, lease);
            if lease.until_us > now.mono_us {
                self.file_leased(slot, lease.until_us, fx);
            } else {
                self.file_ready(slot, fx); // its row may have been published since: whoever takes it looks
            }
            return true;
        }
        self.restore_into(slot, lease);
        if lease.until_us > now.mono_us {
            self.file_leased(slot, lease.until_us, fx);
        } else {
            self.file_as_row(slot, row, now, fx);
        }
        true
    }

    fn restore_into(&mut self, slot: u32, lease: &LeaseRow) {
        let record = &mut self.slots[slot as usize];
        record.count = record.count.max(lease.count);
        record.lease_id = lease.lease_id;
        record.leased_at_us = lease.leased_at_us;
        record.pid = lease.pid;
        record.set_written(Written::Whole);
    }

    /// A finish that names no lease was faster: the lease is what is there if it is undone.
    fn restore_pinned(&mut self, slot: u32, lease: &LeaseRow, now: Now, fx: &mut Effects) {
        self.restore_into(slot, lease);
        let record = &mut self.slots[slot as usize];
        if lease.until_us > now.mono_us {
            record.from = State::Leased as u8;
            record.deadline_us = lease.until_us;
            self.list_pinned(slot);
            self.flush_lease(slot, fx);
        } else {
            record.from = State::Ready as u8;
        }
    }

    /// The queue's leases are restored: from now on it delivers. Wakes who waits.
    pub fn restore_end(&mut self, queue: QueueRef, loader: u32, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let record = &mut self.queues[q as usize];
        if record.loader == loader && record.is_restoring {
            record.is_restored = true;
            self.restore_leave(q, fx);
        }
    }

    /// Whoever restores leaves, with or without success.
    pub(crate) fn restore_leave(&mut self, q: u32, fx: &mut Effects) {
        let record = &mut self.queues[q as usize];
        record.loader = NIL;
        record.is_restoring = false;
        let is_asked = record.load_wanted && record.mark != NO_MARK;
        self.wake_rest(q, fx);
        if is_asked {
            self.worker_wanted(q, fx); // it may have looked meanwhile
        }
    }
}
