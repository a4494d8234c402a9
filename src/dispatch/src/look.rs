//! Questions that change nothing: what a sleeper must know before it sleeps.

use crate::arena::{Arena, QueueRef};
use crate::slot::State;
use crate::{tree, Now, NEVER_US, NIL, NO_MARK};

/// A sleeper under a mark looks again after this long even if nobody wakes it. Room that is made wakes the hungry
/// ([`Arena::room_made`]), but room that could be had by evicting, and a worker that was asked and is gone, do not.
const LOOK_AGAIN_US: i64 = 1_000_000;

impl Arena<'_> {
    /// Whether reads of the queue return nothing.
    pub fn is_paused(&self, queue: QueueRef) -> bool {
        self.index_of(queue).is_some_and(|q| self.queues[q as usize].policy.paused)
    }

    /// Some of the queue's messages that are leased or delayed, as many as `out` has room for and a bounded stretch of
    /// slots holds, from slot `from` on. Returns how many, and where to go on, or [`NIL`].
    pub fn timed_some(&self, queue: QueueRef, from: u32, out: &mut [i64]) -> (usize, u32) {
        const STRETCH: u32 = 1_024;
        let Some(q) = self.index_of(queue) else { return (0, NIL) };
        let (mut found, touched) = (0, self.head.slots_touched);
        let end = touched.min(from.saturating_add(STRETCH));
        for index in from..end {
            let slot = &self.slots[index as usize];
            if slot.queue == q && matches!(slot.state(), State::Leased | State::Delayed) {
                if found == out.len() {
                    return (found, index);
                }
                out[found] = slot.msg_id;
                found += 1;
            }
        }
        (found, if end < touched { end } else { NIL })
    }

    /// When a reader of the queue has to look again without being woken: at once if something is ready (or the
    /// reference is stale), else when the next message is due. On the clock that never jumps.
    pub fn next_event_us(&self, queue: QueueRef, now: Now) -> i64 {
        let Some(q) = self.index_of(queue) else { return now.mono_us };
        let record = &self.queues[q as usize];
        if record.policy.paused {
            return NEVER_US;
        }
        if record.ready_len > 0 {
            return now.mono_us;
        }
        let mut next_us = NEVER_US;
        let first = tree::first(self.slots, record.timed);
        if first != NIL {
            next_us = self.slots[first as usize].deadline_us;
        }
        if record.beyond_us != NEVER_US {
            // Whoever is due was scanned for by then; if there was no room, it is looked at again and again.
            let again_us = now.mono_us.saturating_add(LOOK_AGAIN_US);
            let due_us = now.mono_of(record.beyond_us);
            next_us = next_us.min(if due_us > now.mono_us { due_us } else { again_us });
        }
        if record.mark != NO_MARK {
            next_us = next_us.min(now.mono_us.saturating_add(LOOK_AGAIN_US));
        }
        next_us
    }
}
