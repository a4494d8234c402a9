//! Loading: how what is in the heap without a slot gets one. Owns marks and horizons while a load runs.
//!
//! The order is the whole point. **First** a load is begun here, under the lock; **then** its caller takes a
//! snapshot and walks the primary key from the mark. Whoever commits before the snapshot is seen by the walk;
//! whoever publishes after the load began either gets a slot at once or lowers `redo`, and the next load begins
//! there. So no message falls between the snapshot and the publish. A scan for what is due later does the same
//! with the horizon: raise it first, then the snapshot.

use crate::arena::{Arena, QueueRef};
use crate::slot::{Row, State};
use crate::{Effects, Now, NEVER_US, NIL, NO_MARK};

/// How long before the first message beyond the horizon is due somebody scans for it, microseconds.
pub const SCAN_LEAD_US: i64 = 5_000_000;

/// How far the horizon is raised beyond the present by a scan, microseconds.
pub const HORIZON_US: i64 = 60_000_000;

/// How soon a scan that found no room is tried again, microseconds.
pub(crate) const SCAN_AGAIN_US: i64 = 200_000;

/// When to scan for a message that is due at `visible_at_us` (wall clock), on the clock that never jumps.
pub(crate) fn scan_time_us(visible_at_us: i64, now: Now) -> i64 {
    now.mono_of(visible_at_us.saturating_sub(SCAN_LEAD_US))
}

/// The mark from which a walk meets this id. The highest of all ids means "no mark", so it is met from the one below.
pub const fn mark_at(msg_id: i64) -> i64 {
    if msg_id == NO_MARK {
        NO_MARK - 1
    } else {
        msg_id
    }
}

/// Whether a load may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadStart {
    /// Walk the primary key from this id. [`Arena::load_end`] must follow, whatever happens.
    From(i64),
    /// All is tracked.
    Nothing,
    /// Another backend loads.
    Busy,
    /// There is a mark, but the window is full of ready messages.
    Full,
}

/// Whether a scan for what is due may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanStart {
    /// Scan `visible_at` in `(after, until]`, wall clock. [`Arena::scan_end`] must follow.
    Range {
        /// The horizon as it was.
        after_us: i64,
        /// The horizon as it is now.
        until_us: i64,
    },
    /// Nothing is due soon.
    Nothing,
    /// Something is due, and another backend loads or scans.
    Busy,
}

/// What became of one row of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadRow {
    /// It has a slot, or needs none yet.
    Known,
    /// There is no room: stop here.
    Full,
}

impl Arena<'_> {
    /// Begins a load by backend `loader`.
    pub fn load_begin(&mut self, queue: QueueRef, loader: u32) -> LoadStart {
        let Some(q) = self.index_of(queue) else { return LoadStart::Nothing };
        if self.queues[q as usize].loader != NIL {
            return LoadStart::Busy;
        }
        if self.queues[q as usize].mark == NO_MARK {
            self.queues[q as usize].load_wanted = false;
            return LoadStart::Nothing;
        }
        if !self.window_has_room(q) {
            return LoadStart::Full;
        }
        let record = &mut self.queues[q as usize];
        record.load_wanted = false;
        record.loader = loader;
        record.is_scanning = false;
        record.redo = NO_MARK;
        record.redo_horizon_us = NEVER_US;
        let mark = record.mark;
        record.reached = mark;
        self.hunger_end(q);
        LoadStart::From(mark)
    }

    /// One row of the walk or scan, in its order.
    pub fn load_row(&mut self, queue: QueueRef, row: Row, now: Now, fx: &mut Effects) -> LoadRow {
        let Some(q) = self.index_of(queue) else { return LoadRow::Full };
        let outcome = self.load_row_of(q, row, now, fx);
        if outcome == LoadRow::Known {
            self.queues[q as usize].reached = mark_at(row.msg_id.saturating_add(1));
            // of a scan nobody asks
        }
        outcome
    }

    fn load_row_of(&mut self, q: u32, row: Row, now: Now, fx: &mut Effects) -> LoadRow {
        let slot = self.find(q, row.msg_id);
        if slot != NIL {
            let slot = &mut self.slots[slot as usize];
            if matches!(slot.state(), State::Pinned | State::Leased) {
                // Whoever holds it may have looked before the row came in, and found none: he is to look again
                // before he drops it, for the mark passes it by now.
                slot.is_touched = true;
            }
            self.bring_forward(q, row, now, fx);
            return LoadRow::Known;
        }
        let record = &self.queues[q as usize];
        if let Some(due_us) = row.due_us(now) {
            if record.redo != NO_MARK && row.msg_id >= record.redo {
                // The row may have been changed since this snapshot; the next load begins no later than here.
                return LoadRow::Known;
            }
            let is_scanning = record.is_scanning;
            let is_near = row.visible_at_us.is_some_and(|at| at <= record.horizon_us);
            let is_tracked = self.publish_delayed(q, row, due_us, now, fx);
            // A load goes on: what is due later must not keep what is due out, and the horizon covers it.
            return if is_tracked || !is_near || !is_scanning { LoadRow::Known } else { LoadRow::Full };
        }
        let is_exhausted = record.policy.is_exhausted(row.count);
        if is_exhausted && self.exhausted_left_out(q, row.msg_id) {
            return LoadRow::Known;
        }
        let has_window = self.window_has_room(q);
        let slot = self.track(q, row);
        if slot != NIL {
            self.file_ready_quietly(slot, fx);
            return LoadRow::Known;
        }
        if is_exhausted || has_window {
            self.hunger_begin(q);
        }
        LoadRow::Full
    }

    /// A message that waits in its slot may have been changed by a transaction that was prepared, whose commit is told
    /// of no row: if it lies elsewhere, it waits no longer than the row says. (An older version, if the snapshot is older
    /// than the change: then whoever takes it puts it off.)
    fn bring_forward(&mut self, q: u32, row: Row, now: Now, fx: &mut Effects) {
        let slot = self.find(q, row.msg_id);
        let Some(record) = self.slots.get(slot as usize) else { return };
        let deadline_us = record.deadline_us;
        if record.state() != State::Delayed || record.tid().offset == 0 || record.tid() == row.tid {
            return;
        }
        match row.due_us(now) {
            Some(due_us) if due_us >= deadline_us => {}
            Some(due_us) => {
                self.unfile(slot);
                self.file_delayed(slot, due_us, fx);
            }
            None => {
                self.unfile(slot);
                self.file_ready(slot, fx);
            }
        }
    }

    /// Whether an exhausted message gets no slot because too many have one: the worker may not be able to move them, and
    /// they must not keep the others from being loaded.
    pub(crate) fn exhausted_left_out(&mut self, q: u32, msg_id: i64) -> bool {
        let record = &mut self.queues[q as usize];
        let is_full = record.exhausted_len >= self.head.config.window;
        if is_full {
            record.exhausted_from = record.exhausted_from.min(mark_at(msg_id));
        }
        is_full
    }

    /// A load has come to this id, which it has not looked at yet, past rows that nobody sees any more.
    pub fn load_reached(&mut self, queue: QueueRef, loader: u32, msg_id: i64) {
        if let Some(q) = self.index_of(queue) {
            let record = &mut self.queues[q as usize];
            if record.loader == loader && !record.is_scanning && !record.is_restoring {
                record.reached = record.reached.max(mark_at(msg_id));
            }
        }
    }

    /// Ends a load: `stopped_at` is the first id that was not looked at (as [`mark_at`] has it), [`NO_MARK`] when the
    /// walk reached the end. Wakes who waits for it.
    pub fn load_end(&mut self, queue: QueueRef, loader: u32, stopped_at: i64, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let record = &mut self.queues[q as usize];
        debug_assert!(record.loader != loader || !record.is_scanning);
        if record.loader != loader || record.is_scanning || record.is_restoring {
            return;
        }
        record.mark = stopped_at.min(record.redo);
        record.horizon_us = record.horizon_us.min(record.redo_horizon_us);
        self.loader_leaves(q, fx);
    }

    /// Ends whatever load or scan backend `loader` has begun, for its abort callback. A load has come as far as it has:
    /// else one that takes longer than its callers may would begin anew for ever. A scan ends as if it had done nothing.
    pub fn load_abort(&mut self, queue: QueueRef, loader: u32, now: Now, fx: &mut Effects) {
        let Some(q) = self.index_of(queue) else { return };
        let record = &self.queues[q as usize];
        if record.loader != loader {
            return;
        }
        if record.is_restoring {
            self.restore_leave(q, fx);
        } else if record.is_scanning {
            let (reached_us, beyond_us) = (record.scan_horizon_us, record.scan_beyond_us);
            self.scan_end(queue, loader, reached_us, beyond_us, now, fx);
        } else {
            self.load_end(queue, loader, record.reached, fx);
            self.load_want(q, fx); // whoever was cancelled may be cancelled at the same place the next time
        }
    }

    fn loader_leaves(&mut self, q: u32, fx: &mut Effects) {
        let record = &mut self.queues[q as usize];
        record.loader = NIL;
        record.is_scanning = false;
        record.loads = record.loads.wrapping_add(1);
        let is_asked = record.load_wanted && record.mark != NO_MARK;
        self.wake_rest(q, fx);
        self.room_made(fx); // for others, if this load did not need it
        if is_asked {
            self.worker_wanted(q, fx); // it may have looked while this load ran
        }
    }

    /// Begins a scan for what is due within [`HORIZON_US`], if the first message beyond the horizon is due
    /// within [`SCAN_LEAD_US`]. Raises the horizon.
    pub fn scan_begin(&mut self, queue: QueueRef, loader: u32, now: Now) -> ScanStart {
        let Some(q) = self.index_of(queue) else { return ScanStart::Nothing };
        let has_room = self.window_has_room(q);
        if self.queues[q as usize].loader != NIL {
            return if self.is_beyond_due(q, now) { ScanStart::Busy } else { ScanStart::Nothing };
        }
        let record = &mut self.queues[q as usize];
        if record.beyond_us > now.wall_us.saturating_add(SCAN_LEAD_US) || !has_room {
            return ScanStart::Nothing;
        }
        record.loader = loader;
        record.is_scanning = true;
        record.redo = NO_MARK;
        record.redo_horizon_us = NEVER_US;
        record.scan_horizon_us = record.horizon_us;
        record.scan_beyond_us = record.beyond_us;
        record.beyond_us = NEVER_US;
        let after_us = record.horizon_us.min(now.wall_us);
        let until_us = now.wall_us.saturating_add(HORIZON_US).max(record.horizon_us);
        record.horizon_us = until_us;
        ScanStart::Range { after_us, until_us }
    }

    /// Whether a message beyond the horizon is due by now, or was when the scan that runs began.
    fn is_beyond_due(&self, q: u32, now: Now) -> bool {
        let record = &self.queues[q as usize];
        let scanned_us = if record.is_scanning { record.scan_beyond_us } else { NEVER_US };
        record.beyond_us.min(scanned_us) <= now.wall_us
    }

    /// A message beyond the horizon is due, and there is room for it: whoever finds nothing to take scans for it
    /// ([`Arena::scan_begin`]) or waits for who does, for readers do not depend on the worker's punctuality.
    pub fn scan_needed(&self, queue: QueueRef, now: Now) -> bool {
        self.index_of(queue).is_some_and(|q| {
            self.is_beyond_due(q, now) && self.window_has_room(q) && !self.queues[q as usize].is_hungry
        })
    }

    /// Ends a scan: everything due up to `reached_us` has a slot; the first message due after that is due at
    /// `beyond_us` ([`NEVER_US`] when there is none).
    pub fn scan_end(
        &mut self,
        queue: QueueRef,
        loader: u32,
        reached_us: i64,
        beyond_us: i64,
        now: Now,
        fx: &mut Effects,
    ) {
        let Some(q) = self.index_of(queue) else { return };
        let record = &mut self.queues[q as usize];
        debug_assert!(record.loader != loader || record.is_scanning);
        if record.loader != loader || !record.is_scanning {
            return;
        }
        record.mark = record.mark.min(record.redo);
        record.horizon_us = reached_us.min(record.redo_horizon_us);
        record.beyond_us = record.beyond_us.min(beyond_us);
        let next_us = record.beyond_us;
        // What had no room for waiting comes in when it is due.
        let is_full = record.redo_horizon_us != NEVER_US;
        self.loader_leaves(q, fx);
        if next_us != NEVER_US {
            let at_us = if is_full { now.mono_of(next_us) } else { scan_time_us(next_us, now) };
            // Not at once again: what had no room has to wait until room was made.
            self.worker_wanted_at(q, at_us.max(now.mono_us.saturating_add(SCAN_AGAIN_US)), fx);
        }
    }

    /// How many loads have ended: a caller that saw a different number before knows that one did.
    pub fn loads(&self, queue: QueueRef) -> u32 {
        self.index_of(queue).map_or(0, |q| self.queues[q as usize].loads)
    }

    /// Asks the worker to load, for one that has loaded for as long as it may.
    pub fn load_ask(&mut self, queue: QueueRef, fx: &mut Effects) {
        if let Some(q) = self.index_of(queue) {
            self.load_want(q, fx);
        }
    }

    /// The worker could not load what it was asked for: it is to try again at `at_us`.
    pub fn load_again(&mut self, queue: QueueRef, at_us: i64) {
        if let Some(q) = self.index_of(queue) {
            self.queues[q as usize].load_wanted |= self.queues[q as usize].mark != NO_MARK;
            self.worker_comes_at(q, at_us);
        }
    }

    /// Only what the worker will see to is taken for asked: under a mark, where there is a worker.
    pub(crate) fn load_want(&mut self, q: u32, fx: &mut Effects) {
        if self.queues[q as usize].mark != NO_MARK && self.worker_called_at(q, 0, fx) {
            self.queues[q as usize].load_wanted = true;
        }
    }
}
