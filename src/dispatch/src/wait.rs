//! Who sleeps until a queue has something. Owns the lists of waiters; sets no latch, sleeps never.
//!
//! Waiters are woken in the order in which they came. Whoever is woken is out of every list, and counted in the
//! queue's `woken_len` until it ends its wait or begins another. Two rules keep wake-ups from being lost or
//! multiplied:
//!
//! * A message that becomes ready wakes one waiter (`announce`).
//! * Whoever was woken and leaves, with or without a message, in time or cancelled, wakes as many as there are
//!   ready messages that nobody is on his way to (`wake_rest`): a taken one is not announced twice, one that was
//!   left lying is.
//!
//! What lies under a mark is not counted in messages: one waiter is woken, loads, and the load's end wakes the
//! others.

use crate::arena::{Arena, QueueRef};
use crate::{Effects, NEVER_US, NIL, NO_MARK};

/// Most queues that one backend can wait for at a time.
pub const WAIT_QUEUES_MAX: usize = 64;

/// One backend's place in one queue's list. Read and written under the dispatcher's lock.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct WaitNode {
    pub(crate) queue: u32,
    pub(crate) next: u32,
    pub(crate) previous: u32,
}

impl WaitNode {
    /// In no list.
    pub const FREE: WaitNode = WaitNode { queue: NIL, next: NIL, previous: NIL };
}

/// One backend. Read and written under the dispatcher's lock.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Waiter {
    pub(crate) is_waiting: bool,
    /// The queue that woke it, until it has seen so; NIL when none did.
    pub(crate) woken_by: u32,
    /// That queue's generation: its record may have a successor by the time the waiter looks.
    pub(crate) woken_generation: u32,
    /// It sleeps until the worker of this database (its index) has written leases; NIL: it does not.
    pub(crate) written_db: u32,
}

impl Waiter {
    /// Not waiting.
    pub const IDLE: Waiter = Waiter { is_waiting: false, woken_by: NIL, woken_generation: 0, written_db: NIL };
}

impl Arena<'_> {
    /// Puts a backend at the end of the lists of these queues. Queues beyond [`WAIT_QUEUES_MAX`] are the
    /// caller's error. A wake-up that it did not use goes on to the next one. Try to take once more between this
    /// and sleeping.
    pub fn wait_begin(&mut self, proc: u32, queues: &[QueueRef], fx: &mut Effects) {
        debug_assert!(queues.len() <= WAIT_QUEUES_MAX);
        debug_assert!((proc as usize) < self.waiters.len());
        if proc as usize >= self.waiters.len() {
            return;
        }
        self.wait_end(proc, fx);
        self.waiters[proc as usize].is_waiting = true;
        let mut next_free = proc as usize * WAIT_QUEUES_MAX;
        for queue in queues.iter().take(WAIT_QUEUES_MAX) {
            let Some(q) = self.index_of(*queue) else { continue };
            let node = next_free as u32;
            next_free += 1;
            let last = self.queues[q as usize].waiter_last;
            self.wait_nodes[node as usize] = WaitNode { queue: q, next: NIL, previous: last };
            if last == NIL {
                self.queues[q as usize].waiter_first = node;
            } else {
                self.wait_nodes[last as usize].next = node;
            }
            self.queues[q as usize].waiter_last = node;
        }
    }

    /// Takes a backend out of all lists. If something woke it, the wake-up goes on to the next one unless it is
    /// used up; call this after the attempt to take.
    pub fn wait_end(&mut self, proc: u32, fx: &mut Effects) {
        if proc as usize >= self.waiters.len() {
            return;
        }
        self.wait_unlink(proc);
        let Waiter { woken_by, woken_generation, .. } = self.waiters[proc as usize];
        self.waiters[proc as usize] = Waiter::IDLE;
        if woken_by == NIL {
            return;
        }
        let queue = &mut self.queues[woken_by as usize];
        if queue.is_attached && queue.generation == woken_generation {
            queue.woken_len = queue.woken_len.saturating_sub(1);
            self.wake_rest(woken_by, fx);
        }
        self.room_made(fx); // if it was woken to load and did not
    }

    /// A backend whose transaction ends takes it out of all lists, too. What it knew goes on to others.
    pub fn wait_abort(&mut self, proc: u32, fx: &mut Effects) {
        let mut queues = [NIL; WAIT_QUEUES_MAX + 1];
        let first = proc as usize * WAIT_QUEUES_MAX;
        let nodes = self.wait_nodes.get(first..first + WAIT_QUEUES_MAX).unwrap_or(&[]);
        queues.iter_mut().zip(nodes).for_each(|(q, node)| *q = node.queue);
        queues[WAIT_QUEUES_MAX] = self.waiters.get(proc as usize).map_or(NIL, |waiter| waiter.woken_by);
        self.wait_end(proc, fx);
        queues.into_iter().filter(|q| *q != NIL).for_each(|q| self.pass_on(q, fx));
    }

    /// A backend that has waited at this queue and ended its wait waits no more.
    pub fn wait_pass_on(&mut self, queue: QueueRef, fx: &mut Effects) {
        if let Some(q) = self.index_of(queue) {
            self.pass_on(q, fx);
        }
    }

    /// If the worker does not come when the next message is due, one of those who sleep is to know when that is: the one
    /// who did sleeps no more.
    pub(crate) fn pass_on(&mut self, q: u32, fx: &mut Effects) {
        let queue = &self.queues[q as usize];
        let is_known = queue.woken_len > 0 || queue.ready_len > 0 || !queue.is_attached || queue.is_dying;
        let has_more = queue.timed != NIL || queue.beyond_us != NEVER_US;
        if has_more && !is_known && !self.is_worker_at_rest(q) {
            self.announce(q, fx);
        }
    }

    /// Whether something woke this backend since it began to wait (or the arena was made anew).
    pub fn wait_is_over(&self, proc: u32) -> bool {
        self.waiters.get(proc as usize).is_none_or(|waiter| !waiter.is_waiting || waiter.woken_by != NIL)
    }

    /// One message became ready: one waiter is woken.
    pub(crate) fn announce(&mut self, q: u32, fx: &mut Effects) {
        if !self.queues[q as usize].policy.paused {
            self.wake(q, 1, fx);
        }
    }

    /// Something became ready: has the worker notify those who listen, if there are any and they are not about to be.
    pub(crate) fn tell_news(&mut self, q: u32, fx: &mut Effects) {
        let queue = &mut self.queues[q as usize];
        let has_listeners = self.dbs.get(queue.db as usize).is_some_and(|db| db.has_listeners);
        if has_listeners && !queue.is_news && !queue.policy.paused {
            queue.is_news = true;
            let at_us = queue.notify_at_us;
            self.worker_called_at(q, at_us, fx);
        }
    }

    /// Something came under the mark.
    pub(crate) fn announce_mark(&mut self, q: u32, fx: &mut Effects) {
        self.announce_unloaded(q, fx);
        self.tell_news(q, fx);
    }

    /// Something lies under the mark: one waiter is woken to load it, unless one is awake already.
    pub(crate) fn announce_unloaded(&mut self, q: u32, fx: &mut Effects) {
        let queue = &self.queues[q as usize];
        let is_known = queue.loader != NIL || queue.is_hungry || queue.ready_len > 0 || queue.woken_len > 0;
        if !is_known {
            self.announce(q, fx);
        }
    }

    /// Wakes as many as there are ready messages that no woken one is on his way to. If nothing is ready but
    /// something may be loaded, and nobody was asked to, wakes one.
    pub(crate) fn wake_rest(&mut self, q: u32, fx: &mut Effects) {
        let queue = &self.queues[q as usize];
        if queue.policy.paused {
            return;
        }
        let rest = queue.ready_len.saturating_sub(queue.woken_len);
        if rest > 0 {
            self.wake(q, rest, fx);
        } else if queue.mark != NO_MARK && !queue.load_wanted {
            self.announce_unloaded(q, fx);
        }
    }

    /// Wakes up to `most` waiters of a queue, first come first.
    pub(crate) fn wake(&mut self, q: u32, most: u32, fx: &mut Effects) {
        for _ in 0..most {
            let node = self.queues[q as usize].waiter_first;
            // Whoever is woken wakes the rest, if somebody is.
            if node == NIL || !fx.has_room() && self.queues[q as usize].woken_len > 0 {
                return;
            }
            let proc = node / WAIT_QUEUES_MAX as u32;
            self.wait_unlink(proc);
            self.waiters[proc as usize].woken_by = q;
            self.waiters[proc as usize].woken_generation = self.queues[q as usize].generation;
            self.queues[q as usize].woken_len += 1;
            if fx.has_room() {
                fx.wake(proc);
            } else {
                fx.wake_everyone();
            }
        }
    }

    fn wait_unlink(&mut self, proc: u32) {
        let start = proc as usize * WAIT_QUEUES_MAX;
        for node in start..start + WAIT_QUEUES_MAX {
            let WaitNode { queue, next, previous } = self.wait_nodes[node];
            if queue == NIL {
                break; // nodes are used from the first on
            }
            if previous == NIL {
                self.queues[queue as usize].waiter_first = next;
            } else {
                self.wait_nodes[previous as usize].next = next;
            }
            if next == NIL {
                self.queues[queue as usize].waiter_last = previous;
            } else {
                self.wait_nodes[next as usize].previous = previous;
            }
            self.wait_nodes[node] = WaitNode::FREE;
        }
    }
}
