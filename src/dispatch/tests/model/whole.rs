//! Sleepers, whole queues, memory that is lost.

use crate::world::*;

impl World {
    /// Sleeps on these queues, after one more attempt, as a reader does.
    pub fn sleep(&mut self, w: usize, queues: Vec<usize>, b: usize) {
        let refs: Vec<QueueRef> = queues.iter().map(|q| self.refs[*q]).collect();
        let mut fx = Effects::new();
        self.memory.arena().wait_begin(w as u32, &refs, &mut fx);
        self.wake(&fx);
        self.sleepers[w] = Sleeper::Asleep(queues.clone());
        let found = queues.iter().any(|q| self.consume(b, *q));
        let is_woken = self.memory.arena().wait_is_over(w as u32);
        assert_eq!(is_woken, matches!(self.sleepers[w], Sleeper::Woken(_)));
        if found {
            self.leave(w);
        }
    }

    pub fn leave(&mut self, w: usize) {
        self.sleepers[w] = Sleeper::Away;
        let mut fx = Effects::new();
        self.memory.arena().wait_end(w as u32, &mut fx);
        self.wake(&fx);
    }

    /// What a sleeper does: one that was woken tries, then leaves or sleeps again; one that was not is cancelled.
    pub fn stir(&mut self, w: usize, b: usize, does_try: bool) {
        match self.sleepers[w].clone() {
            Sleeper::Woken(queues) if does_try => {
                if queues.iter().any(|q| self.consume(b, *q)) {
                    self.leave(w);
                } else {
                    self.sleep(w, queues, b);
                }
            }
            Sleeper::Away => {}
            _ => self.leave(w),
        }
    }

    /// Ends everything open that concerns a queue: TRUNCATE's and DROP's lock waits for it.
    pub fn quiesce(&mut self, q: usize) {
        self.restore_all();
        for b in 0..BACKENDS {
            let is_in = self.sessions[b].load.as_ref().is_some_and(|load| load.q == q);
            if is_in {
                self.load_abort(b);
            }
            self.abort(b);
        }
        for (q, row, change) in std::mem::take(&mut self.late) {
            self.publish(q, row, change);
        }
        self.unsent.retain(|(of, ..)| *of != q);
        let (gone, own) = std::mem::take(&mut self.own).into_iter().partition(|own| own.q == q);
        self.own = own;
        let gone: Vec<OwnRead> = gone;
        let mut fx = Effects::new();
        gone.iter().for_each(|own| self.memory.arena().unhold(own.at, &mut fx));
        self.wake(&fx);
        self.held.retain(|(of, _), _| *of != q);
    }

    pub fn truncate(&mut self, q: usize) {
        self.quiesce(q);
        self.tables[q].clear();
        for _ in 0..100 {
            let mut fx = Effects::new();
            let is_done = self.memory.arena().queue_clear(self.refs[q], 3, &mut fx);
            self.wake(&fx);
            if is_done {
                return;
            }
        }
        panic!("clear does not end");
    }

    pub fn drop_queue(&mut self, q: usize) {
        self.quiesce(q);
        self.tables[q].clear();
        self.stale.push(self.refs[q]);
        let relation = self.relation_of(q);
        for _ in 0..100 {
            let mut fx = Effects::new();
            let is_done = self.memory.arena().queue_detach(DATABASE, relation, 3, &mut fx);
            self.wake(&fx);
            assert!(!self.memory.arena().is_current(self.refs[q]));
            if is_done {
                self.persisted.retain(|(of, _), _| *of != q);
                self.news[q] = (false, 0);
                self.attach(q);
                return;
            }
        }
        panic!("detach does not end");
    }

    pub fn relation_of(&mut self, q: usize) -> u32 {
        let at = self.refs[q];
        let arena = self.memory.arena();
        (101..=self.relation)
            .find(|relation| arena.queue_find(DATABASE, *relation) == Some(at))
            .expect("attached")
    }

    /// Finds the structure dirty: everything is forgotten.
    /// Random in the server: one that comes twice would bring its lease ids and its epoch again.
    pub fn next_seed(&mut self, seed: u64) -> u64 {
        self.seeds += 1;
        seed | self.seeds << 8
    }

    pub fn reset(&mut self, seed: u64) {
        let seed = self.next_seed(seed);
        let mut fx = Effects::new();
        self.memory.arena().reset(self.config, seed, &mut fx);
        for (w, sleeper) in self.sleepers.iter_mut().enumerate() {
            let is_woken = fx.procs().contains(&(w as u32));
            assert!(is_woken || !matches!(sleeper, Sleeper::Asleep(_)), "slept through a reset");
            *sleeper = Sleeper::Away;
        }
        self.held.clear();
        self.restoring.clear();
        self.unconfirmed.clear();
        self.stale.extend(self.refs.iter().copied());
        for q in 0..QUEUES {
            self.attach(q);
        }
        self.nothing_is_news();
    }

    /// Calls with references to queues that are gone: none may do anything.
    pub fn use_stale(&mut self, pick: u8) {
        let Some(at) = self.stale.get(pick as usize % self.stale.len().max(1)).copied() else { return };
        let before: Vec<_> = self.refs.iter().map(|at| self.memory.arena().lengths(*at)).collect();
        let free = self.memory.arena().slots_free();
        let mut fx = Effects::new();
        let mut arena = self.memory.arena();
        let row = Row { msg_id: i64::from(pick % 8), tid: Tid::default(), visible_at_us: None, count: 0 };
        arena.publish(at, row, Change::Insert, self.now, &mut fx);
        arena.load_end(at, 0, NO_MARK, &mut fx);
        arena.pin_undo(at, row.msg_id, 0, self.now, &mut fx);
        arena.pin_finish(at, row.msg_id, 0, &mut fx);
        assert_eq!(arena.pin(at, row.msg_id, Fence::Any, 0, self.now, &mut fx), Pin::NoSlot);
        arena.queue_mark_all(at, &mut fx);
        assert_eq!(arena.hold(at, 1), 0);
        arena.unhold(at, &mut fx);
        assert!(fx.procs().is_empty());
        let after: Vec<_> = self.refs.iter().map(|at| self.memory.arena().lengths(*at)).collect();
        assert_eq!(before, after);
        assert_eq!(free, self.memory.arena().slots_free());
    }
}
