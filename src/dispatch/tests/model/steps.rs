//! One random step.

use crate::leases::FLUSH_US;
use crate::world::*;

impl World {
    pub fn pick(&self, q: usize, pick: u8) -> Option<i64> {
        if pick > 250 {
            return Some(i64::from(pick)); // an id that most often is not there
        }
        let len = self.tables[q].len();
        (len > 0).then(|| *self.tables[q].keys().nth(pick as usize % len).expect("within"))
    }

    pub fn visible_at(&self, c: u8) -> Option<i64> {
        let delay_us = match c % 8 {
            0..=3 => return None,
            4 => 2 * SECOND_US,
            5 => 10 * SECOND_US,
            6 => HORIZON_US / 2,
            _ => HORIZON_US * 3,
        };
        Some(self.now.wall_us + delay_us)
    }

    pub fn step(&mut self, (kind, a, b, c): (u8, u8, u8, u8)) {
        let q = a as usize % QUEUES;
        let s = b as usize % BACKENDS;
        match kind {
            0..=9 => {
                // Ids grow, commits do not: `unsent` ones commit whenever.
                for _ in 0..1 + b % 3 {
                    let msg_id = self.next_id[q];
                    self.next_id[q] += 1;
                    let visible_at_us = self.visible_at(c);
                    if b & 32 != 0 {
                        self.unsent.push((q, msg_id, visible_at_us));
                    } else {
                        self.commit_send(q, msg_id, visible_at_us, b & 64 != 0);
                    }
                }
            }
            10..=12 if !self.unsent.is_empty() => {
                let at = b as usize % self.unsent.len();
                let (q, msg_id, visible_at_us) = self.unsent.swap_remove(at);
                self.commit_send(q, msg_id, visible_at_us, c & 1 != 0);
            }
            13..=15 if !self.late.is_empty() => {
                let at = b as usize % self.late.len();
                let (q, row, change) = self.late.remove(at);
                self.publish(q, row, change);
            }
            16..=18 => {
                let visible_at_us = self.visible_at(c);
                if let Some(msg_id) = self.pick(q, b) {
                    let is_there = self.tables[q].contains_key(&msg_id);
                    if is_there && !self.locked.contains(&(q, msg_id)) {
                        self.update(q, msg_id, visible_at_us, c & 64 != 0);
                    }
                }
            }
            19 => {
                if let Some(msg_id) = self.pick(q, b).filter(|id| !self.locked.contains(&(q, *id))) {
                    self.tables[q].remove(&msg_id);
                    self.finished.insert((q, msg_id));
                    if c & 1 != 0 && msg_id < self.next_id[q] {
                        self.commit_send(q, msg_id, None, c & 2 != 0); // the same id again
                    }
                }
            }
            20..=29 => {
                if self.sessions[s].is_committed {
                    return;
                }
                let at = self.refs[q];
                let lease_us = i64::from(1 + c % 40) * SECOND_US;
                for taken in self.take(q, 1 + c as usize % 4, lease_us) {
                    let row = self.tables[q].get(&taken.msg_id).copied();
                    self.sessions[s].unsettled.push((q, at, taken, row));
                }
                if c & 64 == 0 {
                    while !self.sessions[s].unsettled.is_empty() {
                        self.settle_next(s);
                    }
                }
            }
            30..=33 => self.settle_next(s),
            34..=43 => {
                let picked = self.pick(q, c);
                let held = picked.and_then(|id| self.held.get(&(q, id)).map(|held| held.0));
                let fence = match (c % 4, held) {
                    (0, _) | (_, None) => [Fence::Any, Fence::NotLeased][usize::from(c & 8 != 0)],
                    (_, Some(lease_id)) => Fence::Lease(lease_id),
                };
                self.end(s, q, c, b / 4, fence);
            }
            44..=49 => {
                self.commit_visible(s);
                if c & 1 != 0 {
                    self.commit_callback(s);
                }
            }
            50..=52 => self.commit_callback(s),
            53..=56 => self.abort(s),
            57..=58 => self.extend(q, b, i64::from(c % 60), c & 128 != 0),
            59..=63 => self.load_begin(s, q),
            64..=66 => self.scan_begin(s, q),
            67..=72 => self.load_step(s, 1 + c as usize % 8),
            73 => self.load_abort(s),
            74..=76 => {
                self.tick(s);
                if c & 1 != 0 {
                    self.confirm();
                }
            }
            77..=80 => {
                let us = [1, SECOND_US, 8 * SECOND_US, 45 * SECOND_US, 200 * SECOND_US][c as usize % 5];
                self.now = Now { mono_us: self.now.mono_us + us, wall_us: self.now.wall_us + us };
            }
            81..=85 => {
                let w = c as usize % WAITERS;
                if self.sleepers[w] == Sleeper::Away {
                    let queues = if b & 16 != 0 { vec![q] } else { (0..QUEUES).collect() };
                    self.sleep(w, queues, s);
                }
            }
            86..=90 => self.stir(c as usize % WAITERS, s, b & 16 != 0),
            91 => {
                self.policy[q].paused = c & 3 == 0;
                self.policy[q].max_deliveries = u32::from(c / 4 % 5);
                let mut fx = Effects::new();
                self.memory.arena().queue_reconfigure(self.refs[q], self.policy[q], &mut fx);
                self.wake(&fx);
            }
            92 if c < 64 => self.truncate(q),
            92 if c < 160 => self.confirm(),
            92 => self.listen(),
            93 if c < 64 => self.drop_queue(q),
            93 if c < 160 => self.flush(q, c & 1 != 0),
            93 if c < 200 => self.crash(u64::from(b), c & 1 != 0),
            93 => self.restore_step(1 + b as usize % 3),
            94 if c < 32 => self.reset(u64::from(b)),
            95 => self.use_stale(b),
            96..=97 => {
                let is_read = self.consume(s, q);
                assert!(!is_read || !self.policy[q].paused);
            }
            98 => {
                // A bulk load by COPY: only the lowest id is remembered.
                let first = self.next_id[q];
                for _ in 0..1 + c % 20 {
                    self.version += 1;
                    let row =
                        HeapRow { visible_at_us: None, count: 0, expires_us: None, version: self.version };
                    self.tables[q].insert(self.next_id[q], row);
                    self.next_id[q] += 1;
                    self.sent += 1;
                }
                let mut fx = Effects::new();
                self.memory.arena().queue_mark(self.refs[q], first, &mut fx);
                self.wake(&fx);
            }
            99 if c & 128 == 0 => self.read_own(q, c),
            99 => self.end_own(b, c),
            _ => {}
        }
    }

    /// An open transaction reads what it has sent itself, if there is a slot for that; else nothing has happened.
    pub fn read_own(&mut self, q: usize, c: u8) {
        let at = self.refs[q];
        if self.memory.arena().hold(at, 1) == 0 {
            return;
        }
        let msg_id = self.next_id[q];
        self.next_id[q] += 1;
        let lease_id = self.memory.arena().lease_id_next();
        assert!(self.lease_ids.insert(lease_id), "lease id repeats");
        let until_us = self.now.mono_us + i64::from(c) * SECOND_US + 1;
        self.own.push(OwnRead { q, at, msg_id, lease_id, until_us });
    }

    /// Such a transaction ends. A load may come between its commit and its callback.
    pub fn end_own(&mut self, pick: u8, c: u8) {
        if self.own.is_empty() {
            return;
        }
        let OwnRead { q, at, msg_id, lease_id, until_us } =
            self.own.swap_remove(pick as usize % self.own.len());
        let mut fx = Effects::new();
        if c & 8 != 0 {
            self.memory.arena().unhold(at, &mut fx); // rolled back
            self.wake(&fx);
            return;
        }
        self.version += 1;
        let visible_at_us = if c & 16 != 0 { self.visible_at(c / 32) } else { None };
        let row = HeapRow { visible_at_us, count: 0, expires_us: None, version: self.version };
        self.tables[q].insert(msg_id, row);
        self.sent += 1;
        if c & 1 != 0 {
            self.publish(q, row_of(msg_id, &row), Change::Insert);
            if c & 2 != 0 {
                self.consume(0, q); // this or another one
            }
        }
        // Memory that was lost since has lost the slot that was held; and who has named it before has one for it.
        let is_kept = at == self.refs[q] && self.memory.arena().view(at, msg_id).is_none() && c & 1 == 0;
        let mut arena = self.memory.arena();
        arena.unhold(at, &mut fx);
        if visible_at_us.is_some() || c & 4 != 0 {
            // The read was undone, and it was put off perhaps: only the count is left.
            arena.publish_counted(self.refs[q], row_of(msg_id, &row), 1, self.now, &mut fx);
            let count = arena.view(self.refs[q], msg_id).map(|view| view.count);
            assert!(!is_kept || count == Some(1), "its count was forgotten");
        } else {
            let lease = Lease { until_us, pid: 7, lxid: 1, flush_us: FLUSH_US };
            arena.publish_leased(self.refs[q], row_of(msg_id, &row), lease_id, lease, self.now, &mut fx);
            arena.count_own(self.refs[q], msg_id, 1, &mut fx);
            let is_leased = arena.view(self.refs[q], msg_id).is_some_and(|view| view.lease_id == lease_id);
            assert!(!is_kept || is_leased, "its lease was forgotten");
            if is_leased {
                self.held.insert((q, msg_id), (lease_id, until_us));
            }
        }
        self.wake(&fx);
    }
}
