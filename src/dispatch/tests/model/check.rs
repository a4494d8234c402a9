//! What must hold after every step, and the drain at the end.

use crate::world::*;

impl World {
    /// Whether a row that has no slot will be found all the same.
    pub fn is_within_reach(
        &self,
        policy: Policy,
        bounds: Bounds,
        load: Option<&Load>,
        msg_id: i64,
        row: &HeapRow,
    ) -> bool {
        // The mark counts in any case: while a load runs it is where that began, so the snapshot holds the row
        // (in the part not walked yet), or `redo` covers it.
        let unwalked = load.is_some_and(|load| load.rows.iter().any(|(id, _)| *id == msg_id));
        let is_marked = match load {
            Some(load) if load.scan.is_none() => unwalked || msg_id >= bounds.redo,
            Some(_) => msg_id >= bounds.mark.min(bounds.redo),
            None => msg_id >= bounds.mark,
        };
        let is_later = row.visible_at_us.is_some_and(|at| match load {
            Some(load) => {
                let is_beyond = at > bounds.horizon_us.min(bounds.redo_horizon_us);
                (is_beyond && bounds.beyond_us.min(load.beyond_us) <= at) || (load.scan.is_some() && unwalked)
            }
            None => at > bounds.horizon_us && bounds.beyond_us <= at,
        });
        let is_left_out = policy.is_exhausted(row.count) && msg_id >= bounds.exhausted_from;
        is_marked || is_later || is_left_out
    }

    pub fn check(&mut self) {
        self.check_news();
        let arena = self.memory.arena();
        if let Err(what) = arena.check() {
            panic!("{what}");
        }
        if let Err(what) = arena.check_sleepers() {
            panic!("{what}");
        }
        let unpublished: HashSet<(usize, i64)> = self.late.iter().map(|(q, row, _)| (*q, row.msg_id)).collect();
        let called_back: HashSet<(usize, i64)> = self
            .sessions
            .iter()
            .filter(|s| s.is_committed)
            .flat_map(|s| &s.journal)
            .filter_map(|entry| match entry {
                Entry::Retry { q, msg_id, .. } => Some((*q, *msg_id)),
                _ => None,
            })
            .collect();
        for q in 0..QUEUES {
            let at = self.refs[q];
            let arena = self.memory.arena();
            let bounds = arena.check_bounds(at).expect("attached");
            let load = self.sessions.iter().filter_map(|s| s.load.as_ref()).find(|load| load.at == at);
            let is_restoring = self.restoring.iter().any(|restoring| restoring.q == q);
            assert_eq!(load.is_some() || is_restoring, bounds.is_loading);
            for (msg_id, row) in &self.tables[q] {
                let key = (q, *msg_id);
                if unpublished.contains(&key) || called_back.contains(&key) || self.locked.contains(&key) {
                    continue;
                }
                let tracked = self.memory.arena().view(at, *msg_id);
                match tracked {
                    Some(view) if view.state == State::Delayed => {
                        let latest_us = HORIZON_US.max(self.policy[q].retry_delay_max_us) * 3 / 2;
                        let row_us = row_of(*msg_id, row).due_us(self.now).unwrap_or(0);
                        let is_soon = view.deadline_us <= (self.now.mono_us + latest_us).max(row_us);
                        assert!(is_soon, "put off for too long");
                    }
                    Some(_) => {}
                    None => {
                        assert!(
                            self.is_within_reach(self.policy[q], bounds, load, *msg_id, row),
                            "message {msg_id} of queue {q} is lost: {row:?} {bounds:?} {:?}",
                            self.now
                        );
                    }
                }
            }
            for ((of, msg_id), (lease_id, until_us)) in &self.held {
                if *of != q || *until_us <= self.now.mono_us || self.is_pinned(q, *msg_id) {
                    continue;
                }
                let view = self.memory.arena().view(at, *msg_id).expect("a lease always has a slot");
                assert_eq!((view.state, view.lease_id), (State::Leased, *lease_id), "a lease was lost");
            }
        }
    }

    /// Ends what is open and reads until nothing is left.
    pub fn drain(&mut self) {
        self.restore_all();
        self.confirm();
        for b in 0..BACKENDS {
            self.load_abort(b);
            while !self.sessions[b].unsettled.is_empty() {
                self.settle_next(b);
            }
            self.commit_visible(b);
            self.commit_callback(b);
        }
        for (q, row, change) in std::mem::take(&mut self.late) {
            self.publish(q, row, change);
        }
        while !self.own.is_empty() {
            self.end_own(0, 0);
        }
        for q in 0..QUEUES {
            self.policy[q] = Policy { max_deliveries: 0, ..Policy::DEFAULT };
            let mut fx = Effects::new();
            self.memory.arena().queue_reconfigure(self.refs[q], self.policy[q], &mut fx);
            self.wake(&fx);
        }
        self.check();
        for _ in 0..4000 {
            self.tick(0);
            let mut has_read = false;
            for q in 0..QUEUES {
                while self.consume(0, q) {
                    has_read = true;
                }
            }
            for w in 0..WAITERS {
                if matches!(self.sleepers[w], Sleeper::Woken(_)) {
                    self.stir(w, 0, true);
                }
            }
            let is_idle = (0..QUEUES).all(|q| {
                self.tables[q].is_empty() && self.memory.arena().lengths(self.refs[q]) == Some([0; 5])
            });
            if is_idle {
                let free = self.memory.arena().slots_free();
                self.check();
                for w in 0..WAITERS {
                    self.leave(w);
                }
                for q in 0..QUEUES {
                    self.drop_queue(q);
                }
                self.check();
                assert_eq!(free, self.memory.arena().slots_free());
                return;
            }
            if !has_read {
                let us = 3 * SECOND_US;
                self.now = Now { mono_us: self.now.mono_us + us, wall_us: self.now.wall_us + us };
            }
        }
        let left: Vec<usize> = self.tables.iter().map(Table::len).collect();
        panic!("messages are never delivered: {left:?}");
    }
}
