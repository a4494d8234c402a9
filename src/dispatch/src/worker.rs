//! What a database's worker asks of the dispatcher, and when it must be woken. Owns the table of databases.

use crate::arena::{Arena, QueueRef};
use crate::slot::State;
use crate::take::Taken;
use crate::tree;
use crate::{Effects, Now, NEVER_US, NIL, NO_MARK};

/// A database with a worker, or with listeners.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Db {
    pub(crate) oid: u32,
    /// The worker's backend; NIL while there is none.
    pub(crate) proc: u32,
    /// When the worker wakes by itself: only what is due earlier wakes it.
    pub(crate) wake_at_us: i64,
    /// Woken for what is not one queue's matter.
    pub(crate) is_called: bool,
    /// A session of this database may listen for notifications.
    pub(crate) has_listeners: bool,
    /// Something came to a queue that has no place here.
    pub(crate) has_unplaced_news: bool,
    /// The worker is awake, and may be for a while: an owner's trigger can keep it.
    pub(crate) is_awake: bool,
}

impl Db {
    /// An unused entry.
    pub const FREE: Db = Db {
        oid: 0,
        proc: NIL,
        wake_at_us: 0,
        is_called: false,
        has_listeners: false,
        has_unplaced_news: false,
        is_awake: false,
    };
}

/// What a queue asks of the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// The queue.
    pub queue: QueueRef,
    /// Its table.
    pub relation: u32,
    /// When it must be looked at again, on the clock that never jumps.
    pub next_us: i64,
    /// There is something to load, and it should be loaded ahead of the readers.
    pub load: bool,
    /// A scan for what is due should be made.
    pub scan: bool,
    /// Messages that had their last delivery.
    pub exhausted: u32,
    /// The queue was attached, or its table changed by DDL, since the last tick that said so.
    pub is_new: bool,
    /// There may be leases to write.
    pub flush: bool,
    /// Rows of leases are to be swept together.
    pub sweep: bool,
    /// Messages expire, or may.
    pub expire: bool,
    /// Those who listen are to be notified. Said once.
    pub notify: bool,
}

/// Whether a time has come, or else when it does.
fn due(at_us: i64, now_us: i64) -> (bool, i64) {
    if at_us <= now_us {
        (true, NEVER_US)
    } else {
        (false, at_us)
    }
}

impl Arena<'_> {
    pub(crate) fn db_find(&self, oid: u32) -> Option<u32> {
        self.dbs.iter().position(|db| db.oid == oid).map(|index| index as u32)
    }

    /// A worker begins. False: more databases than the table holds.
    pub fn worker_set(&mut self, oid: u32, proc: u32) -> bool {
        let Some(index) = self.db_find(oid).or_else(|| self.db_find(0)) else { return false };
        let before = self.dbs[index as usize];
        self.dbs[index as usize] = Db { oid, proc, wake_at_us: 0, is_called: true, is_awake: true, ..before };
        for queue in self.queues[..self.head.queues_touched as usize].iter_mut() {
            if queue.is_attached && queue.database == oid {
                queue.db = index;
            }
        }
        true
    }

    /// The worker ends. Who sleeps counted on it to be woken: one for each queue looks again, and sleeps until what is
    /// due next. It may end in the midst of what a tick told it to do: the next one is told all of that. What it was called
    /// for it has not seen: a prepared transaction may have been committed. Its place in the table of databases is free for
    /// another, unless somebody listens here.
    pub fn worker_end(&mut self, oid: u32, fx: &mut Effects) {
        let has_listeners = self.has_listeners(oid);
        if let Some(index) = self.db_find(oid) {
            self.dbs[index as usize].proc = NIL;
            if self.dbs[index as usize].is_called {
                self.database_mark_all(oid, fx);
            }
        }
        for q in 0..self.head.queues_touched {
            let queue = &mut self.queues[q as usize];
            if queue.is_attached && queue.database == oid {
                queue.load_wanted = false;
                queue.is_new = true;
                queue.flush_at_us = 0;
                queue.expires_us = i64::MIN;
                queue.rows_are_stale = true;
                queue.rows_are_recounted = true;
                queue.is_news |= has_listeners && (queue.ready_len > 0 || queue.mark != NO_MARK);
                if queue.waiter_first != NIL && queue.woken_len == 0 {
                    self.announce(q, fx);
                }
            }
        }
        if !has_listeners {
            self.written_wake(oid, fx); // the place they know may be another's soon
            self.worker_forget(oid);
        }
    }

    /// The database is gone, or has no queues any more, or no worker.
    pub fn worker_forget(&mut self, oid: u32) {
        if let Some(index) = self.db_find(oid) {
            self.dbs[index as usize] = Db::FREE;
            for queue in self.queues[..self.head.queues_touched as usize].iter_mut() {
                if queue.db == index {
                    queue.db = NIL;
                }
            }
        }
    }

    /// The worker's backend, NIL if the database has none.
    pub fn worker_proc(&self, oid: u32) -> u32 {
        self.db_find(oid).map_or(NIL, |index| self.dbs[index as usize].proc)
    }

    /// The worker is about to look at its queues; what comes up from now on wakes it. True if it is to look at the
    /// database, too: it has just begun, or was called by [`Arena::worker_wake`].
    pub fn worker_round(&mut self, oid: u32) -> bool {
        self.db_find(oid).is_some_and(|index| {
            let db = &mut self.dbs[index as usize];
            db.wake_at_us = NEVER_US;
            db.is_awake = true;
            core::mem::take(&mut db.is_called)
        })
    }

    /// The worker has looked and will sleep until `until_us`. Returns the time it may really sleep until:
    /// earlier if something came up during the round.
    pub fn worker_sleep(&mut self, oid: u32, until_us: i64) -> i64 {
        match self.db_find(oid) {
            Some(index) => {
                let db = &mut self.dbs[index as usize];
                db.wake_at_us = db.wake_at_us.min(until_us);
                db.is_awake = false;
                db.wake_at_us
            }
            None => until_us,
        }
    }

    /// Has the worker look at once.
    pub(crate) fn worker_wanted(&mut self, q: u32, fx: &mut Effects) {
        self.worker_wanted_at(q, 0, fx);
    }

    /// Has the worker look at `at_us`, if it would sleep longer. Where there is no worker, or it is not known when it
    /// has time, one who waits is woken if that is earlier than all he knew of when he went to sleep: he looks, and
    /// sleeps until then.
    pub(crate) fn worker_wanted_at(&mut self, q: u32, at_us: i64, fx: &mut Effects) {
        self.worker_called_at(q, at_us, fx);
        let queue = &self.queues[q as usize];
        if self.is_worker_at_rest(q) || queue.waiter_first == NIL || queue.woken_len > 0 || at_us == 0 {
            return;
        }
        let first = tree::first(self.slots, queue.timed);
        if first == NIL || at_us <= self.slots[first as usize].deadline_us {
            self.announce(q, fx);
        }
    }

    /// Whether there is a worker, which sleeps until it is woken or something is due.
    pub(crate) fn is_worker_at_rest(&self, q: u32) -> bool {
        let db = self.dbs.get(self.queues[q as usize].db as usize);
        db.is_some_and(|db| db.proc != NIL && !db.is_awake)
    }

    /// Has the worker look at `at_us`, for what is no reader's matter. Returns whether there is one.
    pub(crate) fn worker_called_at(&mut self, q: u32, at_us: i64, fx: &mut Effects) -> bool {
        let Some(db) = self.dbs.get_mut(self.queues[q as usize].db as usize) else { return false };
        let has_worker = db.proc != NIL;
        if at_us < db.wake_at_us {
            db.wake_at_us = at_us;
            if has_worker {
                fx.wake_worker(db.proc);
            }
        }
        has_worker
    }

    /// The worker itself, in the midst of its round, is to look again at `at_us`.
    pub(crate) fn worker_comes_at(&mut self, q: u32, at_us: i64) {
        if let Some(db) = self.dbs.get_mut(self.queues[q as usize].db as usize) {
            db.wake_at_us = db.wake_at_us.min(at_us);
        }
    }

    /// Whether a database's worker was called since its round began: it is to look at the database first.
    pub fn worker_is_called(&self, oid: u32) -> bool {
        self.db_find(oid).is_none_or(|index| self.dbs[index as usize].is_called)
    }

    /// Wakes a database's worker, for what is not one queue's matter.
    pub fn worker_wake(&mut self, oid: u32, fx: &mut Effects) {
        if let Some(index) = self.db_find(oid) {
            let db = &mut self.dbs[index as usize];
            db.wake_at_us = 0;
            db.is_called = true;
            if db.proc != NIL {
                fx.wake_worker(db.proc);
            }
        }
    }

    /// Has the worker look at a queue.
    pub fn queue_look(&mut self, queue: QueueRef, fx: &mut Effects) {
        if let Some(q) = self.index_of(queue) {
            self.worker_wanted(q, fx);
        }
    }

    /// Wakes every worker, likewise.
    pub fn workers_wake(&mut self, fx: &mut Effects) {
        for db in self.dbs.iter_mut().filter(|db| db.oid != 0) {
            db.wake_at_us = 0;
            db.is_called = true;
            if db.proc != NIL {
                fx.wake_worker(db.proc);
            }
        }
    }

    /// Looks at the next queue of a database from record `from` on: makes ready what is due and says what else
    /// there is to do. `None` with the record to go on from when a bounded stretch held none; the end is reached
    /// when that is [`NIL`].
    pub fn tick(&mut self, oid: u32, from: u32, now: Now, fx: &mut Effects) -> (Option<Tick>, u32) {
        const STRETCH: u32 = 1024;
        let end = self.head.queues_touched;
        for q in from..end.min(from.saturating_add(STRETCH)) {
            let record = &self.queues[q as usize];
            if !record.is_attached || record.is_dying || record.database != oid {
                continue;
            }
            let mut next_us = self.promote(q, now, fx);
            let has_room = self.window_has_room(q);
            let record = &mut self.queues[q as usize];
            if record.exhausted_from != NO_MARK && record.exhausted_len <= self.head.config.window / 2 {
                record.load_wanted = true;
                self.exhausted_come_in(q);
            }
            let record = &mut self.queues[q as usize];
            // Whoever leaves the window nearly empty asks again.
            record.load_wanted &= record.mark != NO_MARK && has_room;
            let is_idle = record.loader == NIL;
            let mut scan = false;
            if record.beyond_us != NEVER_US {
                let at = crate::load::scan_time_us(record.beyond_us, now);
                scan = at <= now.mono_us && is_idle && has_room;
                // Without room it is looked at again when it is really due, and then every so often.
                let again =
                    now.mono_of(record.beyond_us).max(now.mono_us.saturating_add(crate::load::SCAN_AGAIN_US));
                next_us = next_us.min(if at > now.mono_us { at } else { again });
            }
            let flush = record.flush_at_us <= now.mono_us;
            if !flush {
                next_us = next_us.min(record.flush_at_us);
            }
            let (sweep, sweep_us) = self.sweep_due(q, now);
            let (expire, expire_us) = self.expiry_due(q, now);
            let (notify, notify_us) = self.news_due(q, now);
            next_us = next_us.min(sweep_us).min(expire_us).min(notify_us);
            let record = &self.queues[q as usize];
            let tick = Tick {
                queue: QueueRef { epoch: self.head.epoch, generation: record.generation, index: q },
                relation: record.relation,
                next_us,
                load: record.load_wanted && is_idle && !record.is_hungry,
                scan,
                exhausted: record.exhausted_len,
                is_new: record.is_new,
                flush,
                sweep,
                expire,
                notify,
            };
            self.queues[q as usize].is_new = false;
            let next = q + 1;
            return (Some(tick), if next < end { next } else { NIL });
        }
        let next = from.saturating_add(STRETCH);
        (None, if next < end { next } else { NIL })
    }

    /// Whether stale rows are to be swept together now, or when.
    fn sweep_due(&mut self, q: u32, now: Now) -> (bool, i64) {
        let queue = &mut self.queues[q as usize];
        if queue.sweep_at_us == NEVER_US && (queue.rows_are_stale || queue.rows_are_recounted) {
            queue.sweep_at_us = now.mono_us.saturating_add(crate::lease::SWEEP_US);
        }
        due(queue.sweep_at_us, now.mono_us)
    }

    fn expiry_due(&self, q: u32, now: Now) -> (bool, i64) {
        match self.queues[q as usize].expires_us {
            NEVER_US => (false, NEVER_US),
            at_us => due(now.mono_of(at_us), now.mono_us),
        }
    }

    fn news_due(&mut self, q: u32, now: Now) -> (bool, i64) {
        let queue = &mut self.queues[q as usize];
        if !queue.is_news || queue.policy.paused {
            return (false, NEVER_US);
        }
        let (is_due, at_us) = due(queue.notify_at_us, now.mono_us);
        queue.is_news = !is_due; // what becomes ready from here on is news again
        (is_due, at_us)
    }

    /// A notification was sent, or is to be sent again (`is_news`); another not before `at_us`.
    pub fn news_told(&mut self, queue: QueueRef, is_news: bool, at_us: i64) {
        if let Some(q) = self.index_of(queue) {
            let queue = &mut self.queues[q as usize];
            queue.notify_at_us = at_us;
            queue.is_news |= is_news;
            if is_news {
                self.worker_comes_at(q, at_us);
            }
        }
    }

    /// A session of this database listens: from now on its worker notifies. False: more databases than the table
    /// holds. Stays so until the server is restarted: who stops listening is not told.
    pub fn listeners_set(&mut self, oid: u32) -> bool {
        let Some(index) = self.db_find(oid).or_else(|| self.db_find(0)) else { return false };
        self.dbs[index as usize].oid = oid;
        self.dbs[index as usize].has_listeners = true;
        for queue in self.queues[..self.head.queues_touched as usize].iter_mut() {
            if queue.is_attached && queue.database == oid {
                queue.db = index;
            }
        }
        true
    }

    /// Whether somebody listens, or did, in this database.
    pub fn has_listeners(&self, oid: u32) -> bool {
        self.db_find(oid).is_some_and(|index| self.dbs[index as usize].has_listeners)
    }

    /// Something came to a queue of this database that has no place here: where somebody listens, the worker gives it one
    /// and says so.
    pub fn news_unplaced(&mut self, oid: u32, fx: &mut Effects) {
        if self.has_listeners(oid) {
            self.news_unplaced_again(oid);
            self.worker_wake(oid, fx);
        }
    }

    /// The worker could not see to all of it.
    pub fn news_unplaced_again(&mut self, oid: u32) {
        if let Some(index) = self.db_find(oid) {
            self.dbs[index as usize].has_unplaced_news = true;
        }
    }

    /// Whether that was so since the last call.
    pub fn news_unplaced_taken(&mut self, oid: u32) -> bool {
        self.db_find(oid).is_some_and(|index| core::mem::take(&mut self.dbs[index as usize].has_unplaced_news))
    }

    /// There is something new in this queue.
    pub fn news(&mut self, queue: QueueRef, fx: &mut Effects) {
        if let Some(q) = self.index_of(queue) {
            self.tell_news(q, fx);
        }
    }

    /// A message that expires at `at_us` (wall clock) was committed; `i64::MIN`: it is not known when.
    pub fn expires_at(&mut self, queue: QueueRef, at_us: i64, now: Now, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let record = &mut self.queues[q as usize];
        if at_us < record.expires_us {
            record.expires_us = at_us;
            self.worker_called_at(q, now.mono_of(at_us), fx);
        }
    }

    /// The worker is about to look for what expires; then it takes a snapshot. What is committed from now on tells.
    /// Returns what was known: nothing that has not been seen since expires earlier (wall clock).
    pub fn expiry_begin(&mut self, queue: QueueRef) -> i64 {
        match self.index_of(queue) {
            Some(q) => core::mem::replace(&mut self.queues[q as usize].expires_us, NEVER_US),
            None => i64::MIN,
        }
    }

    /// The worker could not look at what is new about a queue: the next tick says so again.
    pub fn queue_look_again(&mut self, queue: QueueRef) {
        if let Some(q) = self.index_of(queue) {
            self.queues[q as usize].is_new = true;
        }
    }

    /// Pins up to `out.len()` exhausted messages, from id `from` on, for the worker to move away. Returns how many,
    /// and the id to go on from; `None`: there are no more. Those that are not exhausted any more, because the limit
    /// was raised, become ready instead; they count as work, so a short answer does not mean that none is left.
    pub fn exhausted_pin(
        &mut self,
        queue: QueueRef,
        from: i64,
        owner: u32,
        out: &mut [Taken],
        fx: &mut Effects,
    ) -> (usize, Option<i64>) {
        let Some(q) = self.index_of(queue) else { return (0, None) };
        let policy = self.queues[q as usize].policy;
        let (mut pinned, mut next) = (0, Some(from));
        for _ in 0..out.len().min(crate::CHUNK_MAX) {
            let slot = tree::first_from(self.slots, self.queues[q as usize].exhausted, from);
            if slot == NIL {
                next = None;
                break;
            }
            next = self.slots[slot as usize].msg_id.checked_add(1);
            self.unfile(slot);
            if !policy.is_exhausted(self.slots[slot as usize].count) {
                self.file_ready(slot, fx);
                continue;
            }
            let record = &mut self.slots[slot as usize];
            debug_assert!(State::from_u8(record.from) == State::Exhausted);
            record.pinner = owner;
            record.is_touched = false;
            out[pinned] = Taken {
                msg_id: record.msg_id,
                lease_id: record.lease_id,
                tid: record.tid(),
                count: record.count,
                was_returned: false,
            };
            pinned += 1;
        }
        self.room_made(fx); // in the window of the exhausted
        (pinned, next)
    }
}
