//! Walks the whole structure and says what is wrong with it. For tests (feature `check`); changes nothing, and is
//! far too slow for anything else.

use crate::arena::{Arena, QueueRef};
use crate::slot::State;
use crate::tree::{self, Order};
use crate::wait::WAIT_QUEUES_MAX;
use crate::{NIL, NO_MARK};

/// What a queue promises to find later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// See the queue's record.
    pub mark: i64,
    /// Likewise; meaningful while a load or scan runs.
    pub redo: i64,
    /// Likewise.
    pub horizon_us: i64,
    /// Likewise; meaningful while a load or scan runs.
    pub redo_horizon_us: i64,
    /// Likewise.
    pub beyond_us: i64,
    /// Exhausted messages from this id on may be untracked.
    pub exhausted_from: i64,
    /// Whether a load or scan runs.
    pub is_loading: bool,
}

fn ensure(holds: bool, what: &'static str) -> Result<(), &'static str> {
    if holds {
        Ok(())
    } else {
        Err(what)
    }
}

impl Arena<'_> {
    /// A queue's mark and horizon.
    #[doc(hidden)]
    pub fn check_bounds(&self, queue: QueueRef) -> Option<Bounds> {
        self.index_of(queue).map(|q| {
            let q = &self.queues[q as usize];
            Bounds {
                mark: q.mark,
                redo: q.redo,
                horizon_us: q.horizon_us,
                redo_horizon_us: q.redo_horizon_us,
                beyond_us: q.beyond_us,
                exhausted_from: q.exhausted_from,
                is_loading: q.loader != NIL,
            }
        })
    }

    /// Whether all lists, trees and counters agree with one another.
    #[doc(hidden)]
    pub fn check(&self) -> Result<(), &'static str> {
        self.check_slots()?;
        self.check_queues()?;
        self.check_waiters()?;
        self.check_hungry()
    }

    fn check_slots(&self) -> Result<(), &'static str> {
        let total = self.slots.len() as u32;
        let touched = self.head.slots_touched;
        ensure(touched <= total, "slots_touched")?;
        let (mut free, mut here) = (0, self.head.slot_free);
        while here != NIL {
            free += 1;
            ensure(free <= total, "free list has a cycle")?;
            ensure(self.slots[here as usize].state() == State::Free, "used slot on the free list")?;
            here = self.slots[here as usize].next;
        }
        let held: u32 = self.queues.iter().map(|queue| queue.held_len).sum();
        ensure(free + (total - touched) == self.head.slots_free + held, "slots_free")?;
        let mut used = 0;
        for (index, slot) in self.slots[..touched as usize].iter().enumerate() {
            if slot.state() == State::Free {
                continue;
            }
            used += 1;
            ensure(self.queues[slot.queue as usize].is_attached, "slot of a queue that is not attached")?;
            ensure(self.find(slot.queue, slot.msg_id) == index as u32, "slot not found through the hash")?;
            ensure(!matches!(slot.state(), State::Untracked | State::Born), "slot in a state to go back to")?;
            ensure((slot.pinner != NIL) == (slot.state() == State::Pinned), "pinner")?;
        }
        ensure(used + held + self.head.slots_free == total, "slots lost")?;
        let mut chained = 0;
        for bucket in self.slot_buckets.iter() {
            let mut here = *bucket;
            while here != NIL {
                chained += 1;
                ensure(chained <= used, "hash holds too many slots")?;
                here = self.slots[here as usize].next;
            }
        }
        ensure(chained == used, "hash holds too few slots")
    }

    fn check_queues(&self) -> Result<(), &'static str> {
        let (mut reserved, mut free, mut attached) = (0, 0, 0);
        for q in 0..self.head.queues_touched {
            let queue = &self.queues[q as usize];
            if !queue.is_attached {
                free += 1;
                continue;
            }
            attached += 1;
            reserved += self.head.config.slots_min.saturating_sub(queue.used());
            let ready = self.check_tree(q, queue.ready, Order::Id, &[State::Ready])?;
            ensure(ready == queue.ready_len, "ready_len")?;
            let timed = self.check_tree(q, queue.timed, Order::Deadline, &[State::Leased, State::Delayed])?;
            ensure(timed == queue.leased_len + queue.delayed_len, "timed")?;
            let exhausted = self.check_tree(q, queue.exhausted, Order::Id, &[State::Exhausted])?;
            ensure(exhausted == queue.exhausted_len, "exhausted_len")?;
            let count = |state: State| {
                let slots = self.slots[..self.head.slots_touched as usize].iter();
                slots.filter(|s| s.queue == q && s.state() == state).count() as u32
            };
            ensure(count(State::Leased) == queue.leased_len, "leased_len")?;
            ensure(count(State::Delayed) == queue.delayed_len, "delayed_len")?;
            ensure(count(State::Pinned) == queue.pinned_len, "pinned_len")?;
            ensure(queue.loader != NIL || !queue.is_scanning, "scanning without a scanner")?;
            ensure(queue.loader != NIL || !queue.is_restoring, "restoring without a restorer")?;
            self.check_pinned(q)?;
            let is_found =
                self.queue_find(queue.database, queue.relation).is_some_and(|found| found.index == q);
            ensure(is_found || queue.is_dying, "queue not found through the hash")?;
        }
        reserved += self.head.config.slots_min * (self.queues.len() as u32 - attached);
        ensure(reserved == self.head.reserved, "reserved")?;
        let (mut listed, mut here) = (0, self.head.queue_free);
        while here != NIL {
            listed += 1;
            ensure(listed <= free, "free queues")?;
            ensure(!self.queues[here as usize].is_attached, "attached queue on the free list")?;
            here = self.queues[here as usize].next;
        }
        ensure(listed == free, "free queues lost")?;
        let mut chained = 0;
        for bucket in self.queue_buckets.iter() {
            let mut here = *bucket;
            while here != NIL {
                chained += 1;
                ensure(chained <= attached, "hash holds too many queues")?;
                here = self.queues[here as usize].next;
            }
        }
        Ok(())
    }

    /// The list of pinned leases: of this queue, linked both ways, and all that say they are in it.
    fn check_pinned(&self, q: u32) -> Result<(), &'static str> {
        let (mut here, mut previous, mut len) = (self.queues[q as usize].pinned, NIL, 0);
        while here != NIL {
            len += 1;
            ensure(len <= self.slots.len(), "list of pinned leases has a cycle")?;
            let slot = &self.slots[here as usize];
            ensure(
                slot.queue == q && slot.is_listed && slot.left == previous,
                "list of pinned leases is broken",
            )?;
            ensure(slot.state() == State::Pinned && slot.lease_running() != 0, "stranger among pinned leases")?;
            (previous, here) = (here, slot.right);
        }
        let listed = self.slots[..self.head.slots_touched as usize].iter();
        ensure(listed.filter(|s| s.is_listed && s.queue == q).count() == len, "pinned lease in no list")
    }

    /// The length of a tree whose slots are in order, of this queue, and in these states.
    fn check_tree(&self, q: u32, root: u32, order: Order, states: &[State]) -> Result<u32, &'static str> {
        let mut here = tree::last(self.slots, root);
        let (mut len, mut above) = (0, NIL);
        while here != NIL {
            len += 1;
            ensure(len as usize <= self.slots.len(), "tree has a cycle")?;
            let slot = &self.slots[here as usize];
            ensure(slot.queue == q && states.contains(&slot.state()), "stranger in a tree")?;
            ensure(above == NIL || tree::is_less(self.slots, here, above, order), "tree out of order")?;
            for child in [slot.left, slot.right] {
                ensure(
                    child == NIL || tree::is_above(self.slots, self.head.epoch, here, child),
                    "tree is no heap",
                )?;
            }
            above = here;
            here = tree::before(self.slots, root, here, order);
        }
        Ok(len)
    }

    fn check_waiters(&self) -> Result<(), &'static str> {
        let mut listed = 0;
        for q in 0..self.head.queues_touched {
            let queue = &self.queues[q as usize];
            let (mut here, mut previous) = (queue.waiter_first, NIL);
            while here != NIL {
                listed += 1;
                ensure(listed <= self.wait_nodes.len(), "list of waiters has a cycle")?;
                let node = &self.wait_nodes[here as usize];
                ensure(node.queue == q && node.previous == previous, "list of waiters is broken")?;
                let waiter = &self.waiters[here as usize / WAIT_QUEUES_MAX];
                ensure(waiter.is_waiting && waiter.woken_by == NIL, "one who is awake in a list of waiters")?;
                previous = here;
                here = node.next;
            }
            ensure(queue.waiter_last == previous, "last waiter")?;
            let woken = self.waiters.iter();
            let woken = woken.filter(|w| w.woken_by == q && w.woken_generation == queue.generation).count();
            ensure(!queue.is_attached || woken as u32 == queue.woken_len, "woken_len")?;
        }
        let used = self.wait_nodes.iter().filter(|node| node.queue != NIL).count();
        ensure(used == listed, "a waiter's node is in no list")
    }

    fn check_hungry(&self) -> Result<(), &'static str> {
        let (mut here, mut previous, mut listed) = (self.head.hungry_first, NIL, 0);
        while here != NIL {
            listed += 1;
            ensure(listed <= self.queues.len(), "list of the hungry has a cycle")?;
            let queue = &self.queues[here as usize];
            ensure(queue.is_hungry && queue.is_attached && !queue.is_dying, "sated queue among the hungry")?;
            ensure(queue.hungry_previous == previous, "list of the hungry is broken")?;
            previous = here;
            here = queue.hungry_next;
        }
        ensure(self.head.hungry_last == previous, "last of the hungry")?;
        let hungry = self.queues.iter().filter(|queue| queue.is_hungry).count();
        ensure(hungry == listed, "hungry queue in no list")
    }

    /// Whether nobody sleeps in vain. Only true while nobody is between beginning to wait and trying once more.
    #[doc(hidden)]
    pub fn check_sleepers(&self) -> Result<(), &'static str> {
        let attached = || self.queues[..self.head.queues_touched as usize].iter().filter(|q| q.is_attached);
        // One slot wakes one: he uses it, or says so when he leaves.
        let is_room_seen_to = attached().any(|queue| queue.woken_len > 0 || queue.loader != NIL);
        for q in 0..self.head.queues_touched {
            let queue = &self.queues[q as usize];
            // A load wakes at its end, however it ends.
            let is_cared_for = queue.woken_len > 0 || queue.loader != NIL;
            if queue.waiter_first == NIL || queue.policy.paused || is_cared_for {
                continue;
            }
            ensure(queue.ready_len == 0, "a waiter sleeps beside a ready message")?;
            let may_load = queue.mark != NO_MARK && !queue.load_wanted;
            ensure(!may_load || queue.is_hungry, "a waiter sleeps beside a mark that nobody will load")?;
            let has_room = queue.is_hungry && self.has_room_for_hungry(q);
            ensure(!has_room || is_room_seen_to, "a hungry waiter sleeps though there is room")?;
        }
        Ok(())
    }
}
