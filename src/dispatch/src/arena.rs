//! The arena: a fixed number of slots, shared out among queues. Owns its memory's types, which queue is which, marks,
//! and in which list a slot is; who may have one is in `room`. Knows nothing of deliveries.
//!
//! # Who may have a slot
//!
//! Every queue is promised `slots_min` slots, also one that is not attached yet: else leases of the others could
//! fill the arena before it comes. `Head::reserved` counts the promised slots that are not in use; a queue
//! beyond its promise may only have a slot that is not promised to another. When there is none, a slot is taken from a
//! queue that holds more than the asking one: the last of its ready messages (or of its exhausted ones) whose row tells
//! all that the slot knows; that queue's mark goes down to it. So a queue that nobody reads cannot fill the arena.
//!
//! What a transaction sends and reads itself comes into the world leased, or counted, at a commit that cannot fail: its
//! slot is **held** from the read on, as a number, for until then nobody else may find it.
//!
//! Three windows bound what a queue has tracked ahead: ready, delayed and exhausted messages, each on its own, so
//! that what is not due yet does not keep what is due out. For the same reason a delayed message is only given a
//! slot that is not scarce: it never evicts, and leaves an eighth of the arena and half of a promise alone.
//!
//! A queue whose load stopped for want of room is **hungry**: loading it again is futile until a slot is freed.
//! Whoever frees one looks at the list of the hungry.

use crate::load::mark_at;
use crate::policy::{mix, Policy};
use crate::slot::{Slot, State, View};
use crate::tree::{self, Order};
use crate::wait::{WaitNode, Waiter};
use crate::worker::Db;
use crate::{Effects, NEVER_US, NIL, NO_MARK};

/// How the arena is shared out.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Config {
    /// Slots promised to each queue; `slots_min * queues` must not exceed the slots.
    pub slots_min: u32,
    /// Most ready messages that are loaded for one queue; the rest stays in the heap under a mark. The same
    /// again of delayed and of exhausted ones.
    pub window: u32,
}

/// The arena's own fields. Read and written under the dispatcher's lock.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Head {
    /// Drawn when the arena is made; what a backend remembers of the arena carries it.
    pub(crate) epoch: u32,
    /// 31 random bits that lease ids begin with; drawn with the epoch, and again when `sequence` overflows.
    pub(crate) lease_epoch: u32,
    /// The last lease's number within the lease epoch.
    pub(crate) sequence: u32,
    /// State of the generator of epochs.
    pub(crate) seed: u64,
    pub(crate) config: Config,
    /// Slots from here on were never used.
    pub(crate) slots_touched: u32,
    pub(crate) slot_free: u32,
    /// Slots that are in no use and not held for anything.
    pub(crate) slots_free: u32,
    pub(crate) reserved: u32,
    pub(crate) queues_touched: u32,
    pub(crate) queue_free: u32,
    /// Where the search for a queue to evict from goes on.
    pub(crate) evict_hand: u32,
    /// Counts the attachments, over resets too, so that a reference to a queue that is gone does not meet its
    /// successor.
    pub(crate) generation: u32,
    /// The list of hungry queues, the longest hungry first.
    pub(crate) hungry_first: u32,
    pub(crate) hungry_last: u32,
}

impl Head {
    /// Before [`Arena::reset`].
    pub const EMPTY: Head = Head {
        epoch: 0,
        lease_epoch: 0,
        sequence: 0,
        seed: 0,
        config: Config { slots_min: 0, window: 0 },
        slots_touched: 0,
        slot_free: NIL,
        slots_free: 0,
        reserved: 0,
        queues_touched: 0,
        queue_free: NIL,
        evict_hand: 0,
        generation: 0,
        hungry_first: NIL,
        hungry_last: NIL,
    };
}

/// One attached queue. Read and written under the dispatcher's lock.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Queue {
    pub(crate) policy: Policy,
    /// Ids from here on may be in the heap without a slot. While a load runs: where it began.
    pub(crate) mark: i64,
    /// While a load runs: the first id that it has not looked at yet.
    pub(crate) reached: i64,
    /// While a load runs: the lowest id that must be loaded again.
    pub(crate) redo: i64,
    /// Messages due after this wall-clock time have no slot.
    pub(crate) horizon_us: i64,
    /// While a load runs: the horizon must not end above this.
    pub(crate) redo_horizon_us: i64,
    /// The earliest due time known beyond the horizon.
    pub(crate) beyond_us: i64,
    /// While a scan runs: horizon and `beyond_us` as they were, for one that does not come to its end.
    pub(crate) scan_horizon_us: i64,
    pub(crate) scan_beyond_us: i64,
    /// How old leases are when they are written, as the last reader had it; negative: nobody has read yet.
    pub(crate) flush_us: i64,
    /// When the worker is to look for leases that must be written.
    pub(crate) flush_at_us: i64,
    /// When the worker sweeps stale rows of leases together.
    pub(crate) sweep_at_us: i64,
    /// The earliest time known, wall clock, at which a message expires; `i64::MIN`: not known.
    pub(crate) expires_us: i64,
    /// Not before this is another notification sent.
    pub(crate) notify_at_us: i64,
    pub(crate) database: u32,
    pub(crate) relation: u32,
    pub(crate) generation: u32,
    /// Counts the changes of the policy, so that settings read before one do not overwrite it.
    pub(crate) policy_version: u32,
    /// Next in the chain of the queues' hash, or on the free list.
    pub(crate) next: u32,
    /// Index of its database in the table of databases, or NIL.
    pub(crate) db: u32,
    pub(crate) ready: u32,
    pub(crate) timed: u32,
    pub(crate) exhausted: u32,
    /// First of the leases that a transaction has pinned; a list, since they are in no tree.
    pub(crate) pinned: u32,
    pub(crate) ready_len: u32,
    pub(crate) delayed_len: u32,
    pub(crate) leased_len: u32,
    pub(crate) exhausted_len: u32,
    pub(crate) pinned_len: u32,
    /// Slots that are held for messages not committed yet ([`Arena::hold`]).
    pub(crate) held_len: u32,
    /// The backend that loads or scans, or NIL.
    pub(crate) loader: u32,
    /// Messages that had their last delivery may be in the heap untracked from this id on: their window was full. They
    /// keep no others, and come under the mark when the worker has moved the half of it.
    pub(crate) exhausted_from: i64,
    pub(crate) waiter_first: u32,
    pub(crate) waiter_last: u32,
    /// Waiters that this queue woke and that have not ended their wait.
    pub(crate) woken_len: u32,
    pub(crate) hungry_next: u32,
    pub(crate) hungry_previous: u32,
    /// Counts the finished loads.
    pub(crate) loads: u32,
    pub(crate) is_attached: bool,
    /// Dropped; the record goes when its last pinned slot does.
    pub(crate) is_dying: bool,
    /// Policy and table are known to whoever attached it.
    pub(crate) is_configured: bool,
    /// The worker is asked to load.
    pub(crate) load_wanted: bool,
    /// Attached, or changed by DDL, and the worker has not looked at its table since.
    pub(crate) is_new: bool,
    /// What runs is a scan.
    pub(crate) is_scanning: bool,
    /// The last load stopped for want of room, and none was made since; in the list of the hungry.
    pub(crate) is_hungry: bool,
    /// Its leases were read from their rows; before that it delivers nothing.
    pub(crate) is_restored: bool,
    /// What runs is that.
    pub(crate) is_restoring: bool,
    /// Some leases' rows are not needed any more.
    pub(crate) rows_are_stale: bool,
    /// Some leases' rows count a delivery that was given back.
    pub(crate) rows_are_recounted: bool,
    /// Its table was truncated since it was attached: a lease's row that no slot knows of is of a message from before.
    pub(crate) was_emptied: bool,
    /// Something became ready since those who listen were last notified.
    pub(crate) is_news: bool,
}

impl Queue {
    /// A record on the free list.
    pub const FREE: Queue = Queue {
        policy: Policy::DEFAULT,
        mark: NO_MARK,
        reached: i64::MIN,
        redo: NO_MARK,
        horizon_us: 0,
        redo_horizon_us: NEVER_US,
        beyond_us: NEVER_US,
        scan_horizon_us: 0,
        scan_beyond_us: NEVER_US,
        flush_us: -1,
        flush_at_us: NEVER_US,
        sweep_at_us: NEVER_US,
        expires_us: i64::MIN,
        notify_at_us: 0,
        database: 0,
        relation: 0,
        generation: 0,
        policy_version: 0,
        next: NIL,
        db: NIL,
        ready: NIL,
        timed: NIL,
        exhausted: NIL,
        pinned: NIL,
        ready_len: 0,
        delayed_len: 0,
        leased_len: 0,
        exhausted_len: 0,
        pinned_len: 0,
        held_len: 0,
        loader: NIL,
        waiter_first: NIL,
        waiter_last: NIL,
        woken_len: 0,
        hungry_next: NIL,
        hungry_previous: NIL,
        loads: 0,
        is_attached: false,
        is_dying: false,
        is_configured: false,
        load_wanted: false,
        is_new: false,
        is_scanning: false,
        is_hungry: false,
        exhausted_from: NO_MARK,
        is_restored: false,
        is_restoring: false,
        rows_are_stale: false,
        rows_are_recounted: false,
        was_emptied: false,
        is_news: false,
    };

    pub(crate) fn used(&self) -> u32 {
        let filed = self.ready_len + self.delayed_len + self.leased_len + self.exhausted_len;
        filed + self.pinned_len + self.held_len
    }
}

/// What a backend remembers of an attached queue. Valid as long as [`Arena::is_current`] says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueueRef {
    /// The arena's epoch.
    pub epoch: u32,
    /// Which attachment.
    pub generation: u32,
    /// Which record.
    pub index: u32,
}

/// The memory the arena lives in, lent by the caller.
pub struct Parts<'a> {
    /// One.
    pub head: &'a mut Head,
    /// As many as queues can be attached.
    pub queues: &'a mut [Queue],
    /// Heads of the queues' hash chains; a power of two, at least as many as queues.
    pub queue_buckets: &'a mut [u32],
    /// As many as messages can be tracked.
    pub slots: &'a mut [Slot],
    /// Heads of the slots' hash chains; a power of two, at least as many as slots.
    pub slot_buckets: &'a mut [u32],
    /// One for each backend that may wait.
    pub waiters: &'a mut [Waiter],
    /// [`crate::WAIT_QUEUES_MAX`] for each waiter.
    pub wait_nodes: &'a mut [WaitNode],
    /// As many as databases can have a worker.
    pub dbs: &'a mut [Db],
}

/// The dispatcher. Made for one hold of the lock.
pub struct Arena<'a> {
    pub(crate) head: &'a mut Head,
    pub(crate) queues: &'a mut [Queue],
    pub(crate) queue_buckets: &'a mut [u32],
    pub(crate) slots: &'a mut [Slot],
    pub(crate) slot_buckets: &'a mut [u32],
    pub(crate) waiters: &'a mut [Waiter],
    pub(crate) wait_nodes: &'a mut [WaitNode],
    pub(crate) dbs: &'a mut [Db],
}

impl<'a> Arena<'a> {
    /// Over memory that [`Arena::reset`] has been called on.
    pub fn new(parts: Parts<'a>) -> Self {
        Arena {
            head: parts.head,
            queues: parts.queues,
            queue_buckets: parts.queue_buckets,
            slots: parts.slots,
            slot_buckets: parts.slot_buckets,
            waiters: parts.waiters,
            wait_nodes: parts.wait_nodes,
            dbs: parts.dbs,
        }
    }

    /// Forgets everything and begins a new epoch, drawn from `seed` and unlike the last one. Touches the hash
    /// heads and the records in use, not the slots. Everybody who waits is woken and registers again.
    pub fn reset(&mut self, config: Config, seed: u64, fx: &mut Effects) {
        let last = (self.head.epoch, self.head.lease_epoch);
        *self.head = Head { config, seed, generation: self.head.generation, ..Head::EMPTY };
        self.head.epoch = self.draw(last.0);
        self.head.lease_epoch = self.draw(last.1);
        self.head.slots_free = self.slots.len() as u32;
        self.head.reserved = config.slots_min.saturating_mul(self.queues.len() as u32);
        self.queue_buckets.fill(NIL);
        self.slot_buckets.fill(NIL);
        self.queues.fill(Queue::FREE);
        self.wait_nodes.fill(WaitNode::FREE);
        for (proc, waiter) in self.waiters.iter_mut().enumerate() {
            if waiter.is_waiting || waiter.written_db != NIL {
                fx.wake(proc as u32);
            }
            *waiter = Waiter::IDLE;
        }
        for db in self.dbs.iter_mut() {
            db.wake_at_us = 0;
            db.is_called = true;
            if db.proc != NIL {
                fx.wake_worker(db.proc);
            }
        }
    }

    /// 31 random bits, not all zero, unlike the last ones. A counter is hashed, so the loop's second round is
    /// already improbable and its third more so.
    fn draw(&mut self, unlike: u32) -> u32 {
        loop {
            self.head.seed = self.head.seed.wrapping_add(1);
            let drawn = (mix(self.head.seed) >> 33) as u32;
            if drawn != 0 && drawn != unlike {
                return drawn;
            }
        }
    }

    /// Makes the lease ids to come unlike a persisted one. Call it with each persisted lease before the first
    /// delivery.
    pub fn lease_id_avoid(&mut self, lease_id: i64) {
        if lease_id >> 32 == i64::from(self.head.lease_epoch) {
            self.head.lease_epoch = self.draw(self.head.lease_epoch);
            self.head.sequence = 0;
        }
    }

    /// A lease id that no other delivery has.
    pub fn lease_id_next(&mut self) -> i64 {
        if self.head.sequence == u32::MAX {
            self.head.lease_epoch = self.draw(self.head.lease_epoch);
            self.head.sequence = 0;
        }
        self.head.sequence += 1;
        (i64::from(self.head.lease_epoch) << 32) | i64::from(self.head.sequence)
    }

    /// The arena's epoch.
    pub fn epoch(&self) -> u32 {
        self.head.epoch
    }

    // ---- queues ------------------------------------------------------------------------------------------

    fn queue_bucket(&self, database: u32, relation: u32) -> usize {
        mix((u64::from(database) << 32) | u64::from(relation)) as usize & (self.queue_buckets.len() - 1)
    }

    /// The queue of a table, if it is attached.
    pub fn queue_find(&self, database: u32, relation: u32) -> Option<QueueRef> {
        let mut index = self.queue_buckets[self.queue_bucket(database, relation)];
        while index != NIL {
            let queue = &self.queues[index as usize];
            if queue.database == database && queue.relation == relation {
                return Some(self.queue_ref(index));
            }
            index = queue.next;
        }
        None
    }

    fn queue_ref(&self, index: u32) -> QueueRef {
        QueueRef { epoch: self.head.epoch, generation: self.queues[index as usize].generation, index }
    }

    /// Whether the reference still means the queue it was made for.
    pub fn is_current(&self, queue: QueueRef) -> bool {
        queue.epoch == self.head.epoch
            && self
                .queues
                .get(queue.index as usize)
                .is_some_and(|q| q.is_attached && !q.is_dying && q.generation == queue.generation)
    }

    /// The record's index, if the reference is current.
    pub(crate) fn index_of(&self, queue: QueueRef) -> Option<u32> {
        self.is_current(queue).then_some(queue.index)
    }

    /// Attaches a table, or finds it attached. A new queue has everything to load: its mark is at the beginning,
    /// its horizon at `wall_us`. `None`: every record is taken.
    pub fn queue_attach(&mut self, database: u32, relation: u32, wall_us: i64) -> Option<QueueRef> {
        if let Some(found) = self.queue_find(database, relation) {
            return Some(found);
        }
        let index = if self.head.queue_free != NIL {
            let index = self.head.queue_free;
            self.head.queue_free = self.queues[index as usize].next;
            index
        } else if (self.head.queues_touched as usize) < self.queues.len() {
            self.head.queues_touched += 1;
            self.head.queues_touched - 1
        } else {
            return None;
        };
        let bucket = self.queue_bucket(database, relation);
        self.head.generation = self.head.generation.wrapping_add(1);
        self.queues[index as usize] = Queue {
            database,
            relation,
            generation: self.head.generation,
            mark: i64::MIN,
            horizon_us: wall_us,
            db: self.db_find(database).unwrap_or(NIL),
            next: self.queue_buckets[bucket],
            is_attached: true,
            is_new: true,
            ..Queue::FREE
        };
        self.queue_buckets[bucket] = index;
        Some(self.queue_ref(index))
    }

    /// Whether the queue's settings were given, and the version to name in [`Arena::queue_configure`].
    pub fn queue_config_state(&self, queue: QueueRef) -> Option<(bool, u32)> {
        self.index_of(queue).map(|q| {
            let queue = &self.queues[q as usize];
            (queue.is_configured, queue.policy_version)
        })
    }

    /// Sets the policy if nobody has since `version` was read. False: read the settings again.
    pub fn queue_configure(&mut self, queue: QueueRef, version: u32, policy: Policy) -> bool {
        let Some(q) = self.index_of(queue) else { return false };
        let queue = &mut self.queues[q as usize];
        if queue.policy_version != version {
            return false;
        }
        queue.policy = policy;
        queue.is_configured = true;
        true
    }

    /// Sets the policy at the commit that changed it, and wakes those who wait (a queue may have been resumed).
    pub fn queue_reconfigure(&mut self, queue: QueueRef, policy: Policy, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let record = &mut self.queues[q as usize];
        record.policy = policy;
        record.policy_version = record.policy_version.wrapping_add(1);
        record.is_configured = true;
        self.exhausted_come_in(q); // they may not be that any more
        let record = &self.queues[q as usize];
        let has_some = record.ready_len > 0 || record.mark != NO_MARK;
        self.wake_rest(q, fx);
        self.pass_on(q, fx); // a paused queue told nobody when it has something again
        if has_some {
            self.tell_news(q, fx); // it may have been paused
        }
        self.worker_wanted(q, fx);
    }

    /// Everything may be in the heap untracked: after DDL on the table.
    pub fn queue_mark_all(&mut self, queue: QueueRef, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        self.mark_lower(q, i64::MIN);
        self.queues[q as usize].is_new = true;
        self.queues[q as usize].expires_us = i64::MIN;
        self.announce_mark(q, fx);
        self.worker_wanted(q, fx);
    }

    /// Everything of every queue of a database may be in the heap untracked.
    pub fn database_mark_all(&mut self, database: u32, fx: &mut Effects) {
        for q in 0..self.head.queues_touched {
            let queue = &self.queues[q as usize];
            if queue.is_attached && !queue.is_dying && queue.database == database {
                self.mark_lower(q, i64::MIN);
                self.announce_mark(q, fx);
            }
        }
    }

    /// Messages from `msg_id` on may be in the heap untracked: after a transaction too large to publish one by
    /// one, or a prepared one.
    pub fn queue_mark(&mut self, queue: QueueRef, msg_id: i64, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        self.mark_lower(q, msg_id);
        self.queues[q as usize].expires_us = i64::MIN;
        self.announce_mark(q, fx);
        self.worker_wanted(q, fx);
    }

    /// Frees up to `most` slots of a queue whose table was emptied. True when none is left but pinned ones.
    /// Only while nobody else can send to the table or read it (TRUNCATE's lock).
    pub fn queue_clear(&mut self, queue: QueueRef, most: usize, fx: &mut Effects) -> bool {
        match self.index_of(queue) {
            Some(q) => self.clear(q, most, fx),
            None => true,
        }
    }

    fn clear(&mut self, q: u32, most: usize, fx: &mut Effects) -> bool {
        for _ in 0..most {
            let queue = &self.queues[q as usize];
            let slot = [queue.ready, queue.timed, queue.exhausted].into_iter().find(|root| *root != NIL);
            let Some(slot) = slot else {
                let record = &mut self.queues[q as usize];
                record.mark = NO_MARK;
                record.exhausted_from = NO_MARK;
                record.beyond_us = NEVER_US;
                // The worker may be writing leases of what is gone, whose ids may come anew.
                record.was_emptied = true;
                self.sweep_wanted(q, fx);
                self.hunger_end(q);
                return true;
            };
            self.unfile(slot);
            self.free(slot);
            self.room_made(fx);
        }
        false
    }

    /// Frees up to `most` slots of a queue whose table is gone, and at the end its record. True when done. Call
    /// again until then; the first call already makes every reference to the queue stale.
    pub fn queue_detach(&mut self, database: u32, relation: u32, most: usize, fx: &mut Effects) -> bool {
        let Some(found) = self.queue_find(database, relation) else { return true };
        let q = found.index;
        self.queues[q as usize].is_dying = true;
        self.hunger_end(q);
        while self.queues[q as usize].waiter_first != NIL && fx.has_room() {
            self.wake(q, 1, fx);
        }
        if !self.clear(q, most, fx) || self.queues[q as usize].waiter_first != NIL {
            return false;
        }
        self.unlink_queue(q);
        self.release_if_dead(q);
        // What was promised to it is free for others.
        for _ in 0..self.head.config.slots_min.min(crate::CHUNK_MAX as u32) {
            self.room_made(fx);
        }
        true
    }

    /// A queue of this database, by its table, in record `from` or behind it, and the record behind that.
    pub fn queue_of_database(&self, database: u32, from: u32) -> Option<(u32, u32)> {
        (from..self.head.queues_touched)
            .find(|q| {
                let queue = &self.queues[*q as usize];
                queue.is_attached && !queue.is_dying && queue.database == database
            })
            .map(|q| (self.queues[q as usize].relation, q + 1))
    }

    fn unlink_queue(&mut self, q: u32) {
        let Queue { database, relation, next, .. } = self.queues[q as usize];
        let bucket = self.queue_bucket(database, relation);
        if self.queue_buckets[bucket] == q {
            self.queue_buckets[bucket] = next;
            return;
        }
        let mut here = self.queue_buckets[bucket];
        while here != NIL {
            let after = self.queues[here as usize].next;
            if after == q {
                self.queues[here as usize].next = next;
                return;
            }
            here = after;
        }
    }

    pub(crate) fn release_if_dead(&mut self, q: u32) {
        let queue = &self.queues[q as usize];
        if !queue.is_attached || !queue.is_dying || queue.used() > 0 || queue.waiter_first != NIL {
            return;
        }
        if self.queue_find(queue.database, queue.relation).is_some_and(|found| found.index == q) {
            return; // still being emptied; queue_detach comes again
        }
        self.queues[q as usize] = Queue { next: self.head.queue_free, ..Queue::FREE };
        self.head.queue_free = q;
    }

    // ---- marks -------------------------------------------------------------------------------------------

    pub(crate) fn mark_lower(&mut self, q: u32, msg_id: i64) {
        let queue = &mut self.queues[q as usize];
        let msg_id = mark_at(msg_id);
        if queue.loader != NIL {
            queue.redo = queue.redo.min(msg_id);
        } else {
            queue.mark = queue.mark.min(msg_id);
        }
    }

    /// Exhausted messages for which there was no room come under the mark, like any others.
    pub(crate) fn exhausted_come_in(&mut self, q: u32) {
        let from = core::mem::replace(&mut self.queues[q as usize].exhausted_from, NO_MARK);
        if from != NO_MARK {
            self.mark_lower(q, from);
        }
    }

    /// A message due at `wall_us`, within the horizon, has no room.
    pub(crate) fn horizon_lower(&mut self, q: u32, wall_us: i64) {
        let queue = &mut self.queues[q as usize];
        let below = wall_us.saturating_sub(1);
        if queue.loader != NIL {
            queue.redo_horizon_us = queue.redo_horizon_us.min(below);
        } else {
            queue.horizon_us = queue.horizon_us.min(below);
        }
        queue.beyond_us = queue.beyond_us.min(wall_us);
    }

    // ---- filing: the only places where a slot enters and leaves a tree -------------------------------------

    /// Out of its tree; the slot is then pinned, `from` says where it was.
    pub(crate) fn unfile(&mut self, index: u32) {
        let state = self.slots[index as usize].state();
        let queue = &mut self.queues[self.slots[index as usize].queue as usize];
        match state {
            State::Ready => {
                tree::remove(self.slots, self.head.epoch, &mut queue.ready, index, Order::Id);
                queue.ready_len -= 1;
            }
            State::Delayed | State::Leased => {
                tree::remove(self.slots, self.head.epoch, &mut queue.timed, index, Order::Deadline);
                if state == State::Delayed {
                    queue.delayed_len -= 1;
                } else {
                    queue.leased_len -= 1;
                }
            }
            State::Exhausted => {
                tree::remove(self.slots, self.head.epoch, &mut queue.exhausted, index, Order::Id);
                queue.exhausted_len -= 1;
            }
            State::Pinned | State::Free | State::Untracked | State::Born => return,
        }
        queue.pinned_len += 1;
        let slot = &mut self.slots[index as usize];
        slot.from = state as u8;
        slot.state = State::Pinned as u8;
    }

    /// Unfiles the first ready slot; NIL if there is none.
    pub(crate) fn unfile_first_ready(&mut self, q: u32) -> u32 {
        let queue = &mut self.queues[q as usize];
        let index = tree::pop_first(self.slots, &mut queue.ready);
        if index != NIL {
            queue.ready_len -= 1;
            queue.pinned_len += 1;
            let slot = &mut self.slots[index as usize];
            slot.from = State::Ready as u8;
            slot.state = State::Pinned as u8;
        }
        index
    }

    /// Keeps a lease that was just pinned where the worker finds it: in a list, since it is in no tree.
    pub(crate) fn list_pinned(&mut self, index: u32) {
        let q = self.slots[index as usize].queue as usize;
        let first = core::mem::replace(&mut self.queues[q].pinned, index);
        let slot = &mut self.slots[index as usize];
        slot.is_listed = true;
        slot.left = NIL;
        slot.right = first;
        if first != NIL {
            self.slots[first as usize].left = index;
        }
    }

    pub(crate) fn unlist_pinned(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if !slot.is_listed {
            return;
        }
        let (previous, next, q) = (slot.left, slot.right, slot.queue as usize);
        slot.is_listed = false;
        slot.left = NIL;
        slot.right = NIL;
        if previous == NIL {
            self.queues[q].pinned = next;
        } else {
            self.slots[previous as usize].right = next;
        }
        if next != NIL {
            self.slots[next as usize].left = previous;
        }
    }

    fn file(&mut self, index: u32, state: State) {
        self.unlist_pinned(index);
        let slot = &mut self.slots[index as usize];
        debug_assert!(slot.state() == State::Pinned);
        slot.state = state as u8;
        slot.from = State::Free as u8;
        slot.pinner = NIL;
        let queue = &mut self.queues[slot.queue as usize];
        queue.pinned_len -= 1;
        match state {
            State::Ready => {
                tree::insert(self.slots, self.head.epoch, &mut queue.ready, index, Order::Id);
                queue.ready_len += 1;
            }
            State::Exhausted => {
                tree::insert(self.slots, self.head.epoch, &mut queue.exhausted, index, Order::Id);
                queue.exhausted_len += 1;
            }
            _ => {
                tree::insert(self.slots, self.head.epoch, &mut queue.timed, index, Order::Deadline);
                if state == State::Leased {
                    queue.leased_len += 1;
                } else {
                    queue.delayed_len += 1;
                }
            }
        }
    }

    /// A pinned slot becomes ready, or exhausted if it had its last delivery. Wakes whom that concerns.
    pub(crate) fn file_ready(&mut self, index: u32, fx: &mut Effects) {
        let q = self.slots[index as usize].queue;
        if self.file_ready_quietly(index, fx) {
            self.announce(q, fx);
        }
    }

    /// The same, but wakes no reader: a load wakes them at its end. True if the slot is ready.
    pub(crate) fn file_ready_quietly(&mut self, index: u32, fx: &mut Effects) -> bool {
        let slot = &self.slots[index as usize];
        let (q, count) = (slot.queue, slot.count);
        let is_exhausted = self.queues[q as usize].policy.is_exhausted(count);
        if is_exhausted {
            self.file(index, State::Exhausted);
            self.worker_wanted(q, fx);
        } else {
            self.file(index, State::Ready);
            self.tell_news(q, fx);
        }
        !is_exhausted
    }

    /// A pinned slot waits until `deadline_us`.
    pub(crate) fn file_delayed(&mut self, index: u32, deadline_us: i64, fx: &mut Effects) {
        let slot = &mut self.slots[index as usize];
        slot.deadline_us = deadline_us;
        let q = slot.queue;
        self.file(index, State::Delayed);
        self.worker_wanted_at(q, deadline_us, fx);
    }

    /// A pinned slot is leased until `deadline_us`; the caller sets the lease itself.
    pub(crate) fn file_leased(&mut self, index: u32, deadline_us: i64, fx: &mut Effects) {
        self.slots[index as usize].deadline_us = deadline_us;
        let q = self.slots[index as usize].queue;
        self.file(index, State::Leased);
        self.worker_wanted_at(q, deadline_us, fx);
        self.flush_lease(index, fx);
    }

    // ---- for those who look --------------------------------------------------------------------------------

    /// Where a message stands; `None` if it has no slot.
    pub fn view(&self, queue: QueueRef, msg_id: i64) -> Option<View> {
        let slot = self.find(self.index_of(queue)?, msg_id);
        (slot != NIL).then(|| {
            let slot = &self.slots[slot as usize];
            View {
                state: slot.state(),
                count: slot.count,
                lease_id: slot.lease_id,
                deadline_us: slot.deadline_us,
                leased_at_us: slot.leased_at_us,
                pid: slot.pid,
            }
        })
    }

    /// Whether every record of a queue is taken: no other queue can be used.
    pub fn queues_are_full(&self) -> bool {
        self.head.queue_free == NIL && self.head.queues_touched as usize == self.queues.len()
    }

    /// All records of queues.
    pub fn queues_len(&self) -> u32 {
        self.queues.len() as u32
    }

    /// All slots.
    pub fn slots_len(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Slots that are free, of all.
    pub fn slots_free(&self) -> u32 {
        self.head.slots_free
    }

    /// Slots that are free and promised to no queue: what a queue may have beyond its own promise.
    pub fn slots_unpromised(&self) -> u32 {
        self.head.slots_free.saturating_sub(self.head.reserved)
    }

    /// How many messages of a queue are ready, delayed, leased, exhausted and pinned.
    pub fn lengths(&self, queue: QueueRef) -> Option<[u32; 5]> {
        self.index_of(queue).map(|q| {
            let q = &self.queues[q as usize];
            [q.ready_len, q.delayed_len, q.leased_len, q.exhausted_len, q.pinned_len]
        })
    }
}
