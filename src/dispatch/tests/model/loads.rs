//! Loads and scans in small steps, the worker's round, and a reader that reads and finishes in one go.

use crate::world::*;

impl World {
    pub fn load_begin(&mut self, b: usize, q: usize) {
        if self.sessions[b].load.is_some() {
            return;
        }
        let at = self.refs[q];
        let LoadStart::From(mark) = self.memory.arena().load_begin(at, b as u32) else { return };
        let rows = self.tables[q].range(mark..).map(|(id, row)| (*id, *row)).collect();
        self.sessions[b].load = Some(Load { q, at, rows, scan: None, beyond_us: NEVER_US });
    }

    pub fn scan_begin(&mut self, b: usize, q: usize) {
        if self.sessions[b].load.is_some() {
            return;
        }
        let at = self.refs[q];
        let start = self.memory.arena().scan_begin(at, b as u32, self.now);
        let ScanStart::Range { after_us, until_us } = start else { return };
        let mut rows: Vec<(i64, HeapRow)> = self.tables[q]
            .iter()
            .filter(|(_, row)| row.visible_at_us.is_some_and(|at| at > after_us && at <= until_us))
            .map(|(id, row)| (*id, *row))
            .collect();
        rows.sort_by_key(|(id, row)| (row.visible_at_us, *id));
        let later = self.tables[q].values().filter_map(|row| row.visible_at_us);
        let beyond_us = later.filter(|at| *at > until_us).min().unwrap_or(NEVER_US);
        self.sessions[b].load = Some(Load { q, at, rows, scan: Some((after_us, until_us)), beyond_us });
    }

    pub fn load_step(&mut self, b: usize, most: usize) {
        let Some(mut load) = self.sessions[b].load.take() else { return };
        let mut fx = Effects::new();
        let mut arena = self.memory.arena();
        let mut full = None;
        let step = load.rows.len().min(most);
        for (done, (id, row)) in load.rows[..step].iter().enumerate() {
            if arena.load_row(load.at, row_of(*id, row), self.now, &mut fx) == LoadRow::Full {
                full = Some((done, *id, row.visible_at_us));
                break;
            }
        }
        match full {
            None if step < load.rows.len() => {
                load.rows.drain(..step);
                self.sessions[b].load = Some(load);
            }
            stopped => {
                let owner = b as u32;
                match (load.scan, stopped) {
                    (None, _) => {
                        let stopped_at = stopped.map_or(NO_MARK, |(_, id, _)| id);
                        arena.load_end(load.at, owner, stopped_at, &mut fx);
                    }
                    (Some((_, until_us)), None) => {
                        arena.scan_end(load.at, owner, until_us, load.beyond_us, self.now, &mut fx);
                    }
                    (Some(_), Some((_, _, visible_at_us))) => {
                        let at_us = visible_at_us.expect("scanned by it");
                        arena.scan_end(load.at, owner, at_us - 1, at_us, self.now, &mut fx);
                    }
                }
            }
        }
        self.wake(&fx);
    }

    pub fn load_abort(&mut self, b: usize) {
        let Some(load) = self.sessions[b].load.take() else { return };
        let mut fx = Effects::new();
        self.memory.arena().load_abort(load.at, b as u32, self.now, &mut fx);
        self.wake(&fx);
    }

    /// The worker's round. `b` is a session whose load it borrows.
    pub fn tick(&mut self, b: usize) {
        self.memory.arena().worker_round(DATABASE);
        let mut from = 0;
        let mut next_us = NEVER_US;
        while from != NIL {
            let mut fx = Effects::new();
            let (tick, next) = self.memory.arena().tick(DATABASE, from, self.now, &mut fx);
            self.wake(&fx);
            from = next;
            let Some(tick) = tick else { continue };
            next_us = next_us.min(tick.next_us);
            let q = self.refs.iter().position(|at| *at == tick.queue).expect("a queue of ours");
            let was_ready = !self.ready_ids(q).is_empty();
            if tick.load && self.sessions[b].load.is_none() {
                self.load_begin(b, q);
                self.load_step(b, usize::MAX);
            }
            if tick.scan && self.sessions[b].load.is_none() {
                self.scan_begin(b, q);
                self.load_step(b, usize::MAX);
            }
            if tick.exhausted > 0 {
                self.move_exhausted(q);
            }
            self.see_to(q, &tick, was_ready);
        }
        self.check_expired();
        let mut arena = self.memory.arena();
        assert!(arena.worker_sleep(DATABASE, next_us) <= next_us);
    }

    /// A turn through a queue's exhausted messages: each is tried once, and what is left is another's concern.
    pub fn move_exhausted(&mut self, q: usize) {
        let at = self.refs[q];
        let (mut from, mut left) = (Some(i64::MIN), 0);
        while let Some(id) = from {
            let mut out = [Taken::default(); 3];
            let mut fx = Effects::new();
            let (pinned, next) = self.memory.arena().exhausted_pin(at, id, WORKER, &mut out, &mut fx);
            assert!(next.is_none_or(|next| next > id), "the turn goes on");
            for one in &out[..pinned] {
                assert!(one.msg_id >= id && next.is_none_or(|next| one.msg_id < next), "each is tried once");
                left += usize::from(!self.move_one(q, at, *one, &mut fx));
            }
            self.wake(&fx);
            from = next;
        }
        let lengths = self.memory.arena().lengths(at).unwrap_or_default();
        assert_eq!(lengths[3] as usize, left, "those that can be moved are, whatever is before them");
    }

    /// Moves a message that the worker has pinned, unless its row is another's concern; whether it did.
    pub fn move_one(&mut self, q: usize, at: QueueRef, one: Taken, fx: &mut Effects) -> bool {
        assert!(!self.is_held(q, one.msg_id), "moved away under a lease");
        assert!(!self.is_pinned(q, one.msg_id), "moved away under a pin");
        let mut arena = self.memory.arena();
        if self.locked.contains(&(q, one.msg_id)) {
            arena.pin_undo(at, one.msg_id, WORKER, self.now, fx);
            return false;
        }
        if self.tables[q].contains_key(&one.msg_id) && one.count >= self.policy[q].max_deliveries {
            self.tables[q].remove(&one.msg_id);
            self.finished.insert((q, one.msg_id));
            arena.pin_finish(at, one.msg_id, WORKER, fx);
        } else {
            arena.pin_drop(at, one.msg_id, WORKER, fx);
        }
        true
    }

    /// Reads one and finishes it in one go; `b` lends its load. True if there was one.
    pub fn consume(&mut self, b: usize, q: usize) -> bool {
        for _ in 0..6 {
            for one in self.take(q, 1, 30 * SECOND_US) {
                let at = self.refs[q];
                let row = self.tables[q].get(&one.msg_id).copied();
                if !self.settle(q, at, one, row) {
                    continue;
                }
                if self.locked.contains(&(q, one.msg_id)) {
                    // Another transaction has the row: the read is rolled back.
                    let mut fx = Effects::new();
                    self.memory.arena().lease_return(at, one.msg_id, one.lease_id, self.now, &mut fx);
                    self.unhold(q, one.msg_id, one.lease_id);
                    self.wake(&fx);
                    continue;
                }
                let mut fx = Effects::new();
                let fence = Fence::Lease(one.lease_id);
                let pin = self.memory.arena().pin(at, one.msg_id, fence, 30, self.now, &mut fx);
                assert!(matches!(pin, Pin::Done(_)));
                self.tables[q].remove(&one.msg_id);
                self.finished.insert((q, one.msg_id));
                self.held.remove(&(q, one.msg_id));
                self.memory.arena().pin_finish(at, one.msg_id, 30, &mut fx);
                self.wake(&fx);
                return true;
            }
            if self.memory.arena().has_ready(self.refs[q]) {
                continue;
            }
            if self.sessions[b].load.is_some() {
                break;
            }
            if self.memory.arena().scan_needed(self.refs[q], self.now) {
                self.scan_begin(b, q);
                self.load_step(b, usize::MAX);
            }
            if self.memory.arena().load_needed(self.refs[q]) {
                self.load_begin(b, q);
                self.load_step(b, usize::MAX);
            }
        }
        // Whoever cannot load, or has loaded often enough, asks the worker before it sleeps.
        if self.memory.arena().load_needed(self.refs[q]) {
            let mut fx = Effects::new();
            self.memory.arena().load_ask(self.refs[q], &mut fx);
            self.wake(&fx);
        }
        false
    }
}
