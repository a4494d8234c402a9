//! What outlives memory, and the worker that sees to it: leases in their table, written, swept, and read back after a
//! crash; messages that expire; news for those who listen.

use queue_dispatch::{LeaseRow, LeaseWalk, Restore, RowFate, Tick, Written};

use crate::world::*;

/// How old leases are when they are written.
pub const FLUSH_US: i64 = 5 * SECOND_US;
const NOTIFY_US: i64 = SECOND_US;

/// A lease's row.
#[derive(Clone, Copy, Debug)]
pub struct Persisted {
    pub lease_id: i64,
    pub count: u32,
    pub leased_at_us: i64,
    /// `None`: of a transaction that was open; only the count counts.
    pub until_us: Option<i64>,
}

/// A restore under way: what is still to come.
pub struct Restoring {
    pub q: usize,
    pub rows: Vec<(i64, Persisted, Row)>,
}

/// Backend that restores.
const RESTORER: u32 = 77;

impl World {
    fn is_open(&self, lease_id: i64) -> bool {
        self.sessions.iter().any(|s| {
            let in_journal = s
                .journal
                .iter()
                .any(|entry| matches!(entry, Entry::Lease { lease_id: of, .. } if *of == lease_id));
            !s.is_committed && (in_journal || s.unsettled.iter().any(|one| one.2.lease_id == lease_id))
        })
    }

    /// The worker writes a queue's leases; what it has written it tells later ([`World::confirm`]).
    pub fn flush(&mut self, q: usize, does_fail: bool) {
        let at = self.refs[q];
        self.memory.arena().flush_begin(at);
        let (mut walk, mut fx) = (LeaseWalk::START, Effects::new());
        for _ in 0..200 {
            let mut rows = [LeaseRow::default(); 3];
            let (found, is_all) = self.memory.arena().flush_next(at, &mut walk, FLUSH_US, self.now, &mut rows);
            for row in &rows[..found] {
                assert!(row.written != Written::Whole, "written already");
                assert!(row.leased_at_us + FLUSH_US <= self.now.mono_us, "too young to be written");
                let is_open = self.is_open(row.lease_id);
                if is_open {
                    self.memory.arena().flush_again(at, self.now.mono_us + FLUSH_US, &mut fx);
                }
                if does_fail {
                    self.memory.arena().flush_again(at, self.now.mono_us + SECOND_US, &mut fx);
                } else if !(is_open && row.written >= Written::Count) {
                    let LeaseRow { msg_id, lease_id, count, leased_at_us, until_us, .. } = *row;
                    let until_us = (!is_open).then_some(until_us);
                    self.persisted.insert((q, msg_id), Persisted { lease_id, count, leased_at_us, until_us });
                    let written = if is_open { Written::Count } else { Written::Whole };
                    self.unconfirmed.push((at, *row, written));
                }
            }
            if is_all {
                return self.wake(&fx);
            }
        }
        panic!("the walk over leases does not end");
    }

    pub fn confirm(&mut self) {
        let mut fx = Effects::new();
        for (at, row, written) in std::mem::take(&mut self.unconfirmed) {
            self.memory.arena().lease_written(at, &row, written, &mut fx);
        }
        self.wake(&fx);
    }

    /// The worker deletes rows that are not needed, and corrects those of deliveries that were given back.
    fn sweep(&mut self, q: usize) {
        let at = self.refs[q];
        let is_recounted = self.memory.arena().sweep_begin(at);
        let table = &self.tables[q];
        self.persisted
            .retain(|(of, id), row| *of != q || table.get(id).is_some_and(|message| message.count < row.count));
        if !is_recounted {
            return;
        }
        let rows: Vec<(i64, u32)> = self
            .persisted
            .iter()
            .filter(|((of, _), _)| *of == q)
            .map(|((_, id), row)| (*id, row.count))
            .collect();
        for (msg_id, count) in rows {
            match self.memory.arena().row_fate(at, msg_id, count) {
                RowFate::Keep => {}
                RowFate::Recount(0) => {
                    self.persisted.remove(&(q, msg_id));
                    self.corrected(at, msg_id, 0);
                }
                RowFate::Recount(less) => {
                    assert!(less <= count); // as much: without a deadline
                    let row = self.persisted.get_mut(&(q, msg_id)).expect("listed");
                    (row.count, row.until_us) = (less, None);
                    self.corrected(at, msg_id, less);
                }
            }
        }
    }

    fn corrected(&mut self, at: QueueRef, msg_id: i64, count: u32) {
        let mut fx = Effects::new();
        self.memory.arena().row_is_corrected(at, msg_id, count, self.now, &mut fx);
        self.wake(&fx);
    }

    /// The worker moves away what has expired and nobody holds.
    fn expire(&mut self, q: usize) {
        let at = self.refs[q];
        self.memory.arena().expiry_begin(at);
        let mut next_us = NEVER_US;
        let mut fx = Effects::new();
        let rows: Vec<(i64, i64)> =
            self.tables[q].iter().filter_map(|(id, row)| Some((*id, row.expires_us?))).collect();
        for (msg_id, at_us) in rows {
            if at_us > self.now.wall_us {
                next_us = next_us.min(at_us);
                continue;
            }
            let is_locked = self.locked.contains(&(q, msg_id));
            let mut arena = self.memory.arena();
            let pin = arena.pin(at, msg_id, Fence::NotLeased, WORKER, self.now, &mut fx);
            if matches!(pin, Pin::Done(_)) && is_locked {
                arena.pin_undo(at, msg_id, WORKER, self.now, &mut fx);
            }
            if matches!(pin, Pin::Lost | Pin::Busy) || is_locked {
                next_us = next_us.min(self.now.wall_us + SECOND_US);
                self.expire_again_us[q] = self.now.wall_us + SECOND_US;
                continue;
            }
            assert!(!self.is_held(q, msg_id), "expired under a lease");
            self.tables[q].remove(&msg_id);
            self.finished.insert((q, msg_id));
            self.memory.arena().pin_finish(at, msg_id, WORKER, &mut fx);
        }
        self.memory.arena().expires_at(at, next_us, self.now, &mut fx);
        self.wake(&fx);
    }

    /// What the worker's round does for a queue beside loading and moving.
    /// `was_ready`: some messages were ready when the tick was made.
    pub fn see_to(&mut self, q: usize, tick: &Tick, was_ready: bool) {
        if tick.flush {
            self.flush(q, false);
        }
        if tick.sweep {
            self.sweep(q);
        }
        if tick.expire {
            self.expire(q);
        }
        if tick.notify {
            assert!(self.memory.arena().has_listeners(DATABASE), "told though nobody listens");
            self.memory.arena().news_told(self.refs[q], false, self.now.mono_us + NOTIFY_US);
            self.news[q] = (false, self.now.mono_us + NOTIFY_US);
            self.seen[q] = self.ready_ids(q);
        } else {
            let (is_news, at_us) = self.news[q];
            // What came while the queue was paused and has gone since is no news to anybody.
            let is_due = is_news && was_ready && !self.policy[q].paused && self.now.mono_us >= at_us;
            assert!(!is_due, "queue {q} has something new, and those who listen are not told");
        }
    }

    /// After a round nothing that has expired lies about, unless it is somebody's.
    pub fn check_expired(&mut self) {
        for q in 0..QUEUES {
            for (msg_id, row) in &self.tables[q] {
                let is_over = row.expires_us.is_some_and(|at| at <= self.now.wall_us);
                let is_late = self.late.iter().any(|(of, row, _)| *of == q && row.msg_id == *msg_id);
                let is_busy = self.is_held(q, *msg_id) || self.is_pinned(q, *msg_id) || is_late;
                let is_free = !is_busy && !self.locked.contains(&(q, *msg_id));
                let is_free = is_free && self.now.wall_us >= self.expire_again_us[q];
                assert!(
                    !(is_over && is_free),
                    "message {msg_id} of queue {q} has expired, and nobody sees to it"
                );
            }
        }
    }

    pub fn ready_ids(&mut self, q: usize) -> BTreeSet<i64> {
        let at = self.refs[q];
        let arena = self.memory.arena();
        let is_ready = |id: &&i64| arena.view(at, **id).is_some_and(|view| view.state == State::Ready);
        self.tables[q].keys().filter(is_ready).copied().collect()
    }

    /// Whatever has become ready since it was looked last is news.
    pub fn check_news(&mut self) {
        if !self.memory.arena().has_listeners(DATABASE) {
            return;
        }
        for q in 0..QUEUES {
            let ready = self.ready_ids(q);
            if ready.difference(&self.seen[q]).next().is_some() {
                self.news[q].0 = true;
            }
            self.seen[q] = ready;
        }
    }

    /// From now on somebody listens. What is there already he looks for himself.
    pub fn listen(&mut self) {
        if !self.memory.arena().has_listeners(DATABASE) {
            assert!(self.memory.arena().listeners_set(DATABASE));
            self.nothing_is_news();
        }
    }

    pub fn nothing_is_news(&mut self) {
        self.news = vec![(false, 0); QUEUES];
        self.seen = (0..QUEUES).map(|q| self.ready_ids(q)).collect();
    }

    // ---- memory is lost ----------------------------------------------------------------------------------------

    /// Begins to restore a queue's leases.
    pub fn restore_begin(&mut self, q: usize) {
        let at = self.refs[q];
        assert_eq!(self.memory.arena().restore_begin(at, RESTORER), Restore::Begun);
        let of_it = self.persisted.iter().filter(|((of, _), _)| *of == q);
        let rows = of_it.filter_map(|((_, id), lease)| {
            let message = self.tables[q].get(id).filter(|message| message.count < lease.count)?;
            Some((*id, *lease, row_of(*id, message)))
        });
        let rows = rows.collect();
        self.restoring.push(Restoring { q, rows });
    }

    /// Restores some more of whichever restore was begun first.
    pub fn restore_step(&mut self, most: usize) {
        if self.restoring.is_empty() {
            return;
        }
        let mut restoring = self.restoring.remove(0);
        let (q, at) = (restoring.q, self.refs[restoring.q]);
        let mut fx = Effects::new();
        let count = restoring.rows.len().min(most);
        let mut is_full = false;
        for (msg_id, lease, row) in restoring.rows.drain(..count) {
            let until_us = lease.until_us.unwrap_or(self.now.mono_us);
            let lease_row = LeaseRow {
                msg_id,
                lease_id: lease.lease_id,
                count: lease.count,
                leased_at_us: lease.leased_at_us,
                until_us,
                written: Written::Whole,
                ..LeaseRow::default()
            };
            if !self.memory.arena().lease_restore(at, &lease_row, row, self.now, &mut fx) {
                is_full = true;
                break;
            }
            let view = self.memory.arena().view(at, msg_id);
            let is_leased =
                view.is_some_and(|view| view.state == State::Leased && view.lease_id == lease.lease_id);
            if is_leased {
                assert!(until_us > self.now.mono_us, "an ended lease came back");
                self.held.insert((q, msg_id), (lease.lease_id, until_us));
            } else if until_us > self.now.mono_us && self.is_untouched(q, msg_id, row) {
                panic!("lease {} of message {msg_id} of queue {q} did not come back: {view:?}", lease.lease_id);
            }
        }
        if is_full || restoring.rows.is_empty() {
            self.memory.arena().restore_end(at, RESTORER, &mut fx);
        } else {
            self.restoring.insert(0, restoring);
        }
        self.wake(&fx);
    }

    /// Nobody has done anything about the message since its row was read.
    fn is_untouched(&self, q: usize, msg_id: i64, row: Row) -> bool {
        let is_as_read = self.tables[q].get(&msg_id).is_some_and(|now| row_of(msg_id, now) == row);
        is_as_read && !self.is_pinned(q, msg_id) && !self.locked.contains(&(q, msg_id))
    }

    /// The server dies and starts again: every transaction is over, what was committed is there, the leases that were
    /// written come back, and nothing else.
    pub fn crash(&mut self, seed: u64, does_restore: bool) {
        let seed = self.next_seed(seed);
        self.sessions = (0..BACKENDS).map(|_| Session::default()).collect();
        self.sleepers = vec![Sleeper::Away; WAITERS];
        self.locked.clear();
        self.late.clear();
        self.unsent.clear();
        self.own.clear();
        self.unconfirmed.clear();
        self.restoring.clear();
        self.held.clear();
        self.stale.extend(self.refs.iter().copied());
        self.memory = Memory::new(QUEUES + 1, self.slots, WAITERS, self.config, seed);
        assert!(self.memory.arena().worker_set(DATABASE, WORKER));
        for q in 0..QUEUES {
            self.attach_unrestored(q);
            self.restore_begin(q);
        }
        if does_restore {
            self.restore_all();
        }
        self.nothing_is_news();
    }

    pub fn restore_all(&mut self) {
        while !self.restoring.is_empty() {
            self.restore_step(usize::MAX);
        }
    }
}
