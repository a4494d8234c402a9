//! What a session does with what it was given, and how its transaction ends; its callback may come late.

use crate::world::*;

impl World {
    pub fn end(&mut self, b: usize, q: usize, pick: u8, how: u8, fence: Fence) {
        let Some(msg_id) = self.pick(q, pick) else { return };
        if self.sessions[b].is_committed {
            return;
        }
        let at = self.refs[q];
        let mut fx = Effects::new();
        let owner = b as u32;
        let pin = self.memory.arena().pin(at, msg_id, fence, owner, self.now, &mut fx);
        self.wake(&fx);
        let is_there = self.tables[q].contains_key(&msg_id);
        match pin {
            Pin::Done(pinned) => {
                if let Fence::Lease(claimed) = fence {
                    assert_eq!(pinned.lease_id, claimed);
                    assert!(self.is_held(q, msg_id), "pinned under a lease that is over");
                }
                if matches!(fence, Fence::NotLeased) {
                    assert!(!self.is_held(q, msg_id));
                }
                let mut fx = Effects::new();
                if self.locked.contains(&(q, msg_id)) {
                    // It would wait for the other transaction's lock; here it gives up.
                    self.memory.arena().pin_undo(at, msg_id, owner, self.now, &mut fx);
                    self.wake(&fx);
                    return;
                }
                if !is_there {
                    self.memory.arena().pin_drop(at, msg_id, owner, &mut fx);
                    self.held.remove(&(q, msg_id));
                    self.wake(&fx);
                    return;
                }
                self.locked.insert((q, msg_id));
                let delay_us = i64::from(how / 4) * SECOND_US;
                self.sessions[b].journal.push(match how % 4 {
                    0 | 1 => Entry::Finish { q, at, msg_id },
                    2 => Entry::Retry { q, at, msg_id, delay_us, row: None },
                    _ => Entry::Release { q, at, msg_id },
                });
            }
            Pin::NoSlot if is_there && !self.locked.contains(&(q, msg_id)) => {
                self.locked.insert((q, msg_id));
                self.sessions[b].journal.push(Entry::Blind { q, msg_id });
            }
            _ => {}
        }
    }

    /// Makes the transaction visible; its callback comes later.
    pub fn commit_visible(&mut self, b: usize) {
        if self.sessions[b].is_committed || !self.sessions[b].unsettled.is_empty() {
            return;
        }
        self.sessions[b].is_committed = true;
        let mut journal = std::mem::take(&mut self.sessions[b].journal);
        for entry in &mut journal {
            match entry {
                Entry::Finish { q, msg_id, .. } | Entry::Blind { q, msg_id } => {
                    self.tables[*q].remove(msg_id);
                    self.finished.insert((*q, *msg_id));
                    self.locked.remove(&(*q, *msg_id));
                }
                Entry::Retry { q, msg_id, delay_us, row, .. } => {
                    self.version += 1;
                    let version = self.version;
                    if let Some(heap) = self.tables[*q].get_mut(msg_id) {
                        heap.visible_at_us = Some(self.now.wall_us + *delay_us);
                        heap.count += 1;
                        heap.version = version;
                        *row = Some(row_of(*msg_id, heap));
                    }
                    self.locked.remove(&(*q, *msg_id));
                }
                Entry::Release { q, msg_id, .. } => {
                    self.locked.remove(&(*q, *msg_id));
                }
                Entry::Lease { .. } | Entry::Missed { .. } => {}
            }
        }
        self.sessions[b].journal = journal;
    }

    pub fn commit_callback(&mut self, b: usize) {
        if !self.sessions[b].is_committed {
            return;
        }
        self.sessions[b].is_committed = false;
        let owner = b as u32;
        let mut fx = Effects::new();
        for entry in std::mem::take(&mut self.sessions[b].journal) {
            let mut arena = self.memory.arena();
            match entry {
                Entry::Lease { was_returned: false, .. } => {}
                Entry::Lease { at, msg_id, lease_id, .. } => arena.lease_commit(at, msg_id, lease_id),
                Entry::Finish { q, at, msg_id } => {
                    if arena.is_current(at) {
                        self.held.remove(&(q, msg_id));
                    }
                    arena.pin_finish(at, msg_id, owner, &mut fx);
                }
                Entry::Missed { at, msg_id, .. } => arena.pin_finish(at, msg_id, owner, &mut fx),
                Entry::Retry { q, at, msg_id, row, .. } => {
                    let row = row.expect("set when it became visible");
                    if arena.is_current(at) {
                        arena.pin_refile(at, row, owner, self.now, &mut fx);
                        self.held.remove(&(q, msg_id));
                    } else {
                        arena.publish(self.refs[q], row, Change::Update, self.now, &mut fx);
                    }
                }
                Entry::Release { q, at, msg_id } => {
                    if arena.is_current(at) {
                        self.held.remove(&(q, msg_id));
                    }
                    arena.pin_release(at, msg_id, owner, &mut fx);
                }
                Entry::Blind { .. } => {}
            }
        }
        self.wake(&fx);
    }

    pub fn abort(&mut self, b: usize) {
        if self.sessions[b].is_committed {
            return self.commit_callback(b);
        }
        let owner = b as u32;
        let mut fx = Effects::new();
        for (q, at, taken, _) in std::mem::take(&mut self.sessions[b].unsettled) {
            self.memory.arena().lease_return(at, taken.msg_id, taken.lease_id, self.now, &mut fx);
            self.unhold(q, taken.msg_id, taken.lease_id);
        }
        for entry in std::mem::take(&mut self.sessions[b].journal).into_iter().rev() {
            let mut arena = self.memory.arena();
            match entry {
                Entry::Lease { q, at, msg_id, lease_id, .. } => {
                    arena.lease_return(at, msg_id, lease_id, self.now, &mut fx);
                    self.unhold(q, msg_id, lease_id);
                }
                Entry::Missed { at, msg_id, .. } => {
                    arena.pin_undo(at, msg_id, owner, self.now, &mut fx);
                }
                Entry::Finish { q, at, msg_id }
                | Entry::Retry { q, at, msg_id, .. }
                | Entry::Release { q, at, msg_id } => {
                    arena.pin_undo(at, msg_id, owner, self.now, &mut fx);
                    self.locked.remove(&(q, msg_id));
                }
                Entry::Blind { q, msg_id } => {
                    arena.queue_mark(self.refs[q], msg_id, &mut fx);
                    self.locked.remove(&(q, msg_id));
                }
            }
        }
        self.wake(&fx);
    }

    pub fn extend(&mut self, q: usize, pick: u8, seconds: i64, does_shorten: bool) {
        let Some(msg_id) = self.pick(q, pick) else { return };
        let until_us = self.now.mono_us + seconds * SECOND_US;
        let held = self.held.get(&(q, msg_id)).copied();
        let Some((lease_id, end_us)) = held else { return };
        let mut fx = Effects::new();
        if does_shorten {
            self.memory.arena().shorten(self.refs[q], msg_id, lease_id, until_us, &mut fx);
            let is_leased = self
                .memory
                .arena()
                .view(self.refs[q], msg_id)
                .is_some_and(|view| view.state == State::Leased && view.lease_id == lease_id);
            if is_leased {
                self.held.insert((q, msg_id), (lease_id, end_us.min(until_us)));
            }
        } else {
            let fence = Fence::Lease(lease_id);
            let mut arena = self.memory.arena();
            let extended = arena.extend(self.refs[q], msg_id, fence, until_us, self.now, &mut fx);
            if let Some((end_us, of)) = extended {
                assert_eq!(of, lease_id);
                self.held.insert((q, msg_id), (lease_id, end_us));
            }
        }
        self.wake(&fx);
    }
}
