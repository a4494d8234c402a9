//! Who may have a slot, and where it is found: allocation, eviction, the hash, and the list of those who wait for
//! room. The rules are told in `arena`'s header. Knows nothing of deliveries.

use crate::arena::{Arena, Queue, QueueRef};
use crate::policy::mix;
use crate::slot::{Slot, State};
use crate::tree::{self, Order};
use crate::{Effects, NIL};

/// Buckets, of 4 bytes, in a cache line.
const NEIGHBOURS: u64 = 16;

impl Arena<'_> {
    /// Ids that follow each other share a cache line of buckets, in an order of its own: a batch finds its slots with
    /// one miss for [`NEIGHBOURS`] ids. Which line is salted, for whoever may INSERT chooses ids.
    fn bucket(&self, q: u32, msg_id: i64) -> usize {
        let salt = (u64::from(q) << 32) | u64::from(self.head.epoch);
        let id = msg_id as u64;
        let line = mix((id / NEIGHBOURS) ^ mix(salt));
        let place = (id ^ (line >> 32)) % NEIGHBOURS;
        line.wrapping_mul(NEIGHBOURS).wrapping_add(place) as usize & (self.slot_buckets.len() - 1)
    }

    /// The slot of a message, or NIL.
    pub(crate) fn find(&self, q: u32, msg_id: i64) -> u32 {
        let mut index = self.slot_buckets[self.bucket(q, msg_id)];
        while index != NIL {
            let slot = &self.slots[index as usize];
            if slot.msg_id == msg_id && slot.queue == q {
                return index;
            }
            index = slot.next;
        }
        NIL
    }

    /// Whether the queue's window has room for one more ready message.
    pub(crate) fn window_has_room(&self, q: u32) -> bool {
        self.queues[q as usize].ready_len < self.head.config.window
    }

    /// Whether the queue is promised one more slot.
    fn is_promised(&self, q: u32) -> bool {
        self.queues[q as usize].used() < self.head.config.slots_min
    }

    /// Whether there is a slot for the queue, without taking it from another.
    fn slot_is_available(&self, q: u32) -> bool {
        self.head.slots_free > if self.is_promised(q) { 0 } else { self.head.reserved }
    }

    /// Sees to it that there is a slot for the queue, if need be by taking it from another. False: it may have none.
    fn make_room(&mut self, q: u32) -> bool {
        if self.slot_is_available(q) {
            return true;
        }
        // One that is promised to a third queue would be taken from the second in vain.
        let does_help = self.is_promised(q) || self.head.slots_free == self.head.reserved;
        does_help && self.evict(q)
    }

    /// A slot for a message that has none, in no tree yet; NIL if the queue may not have one.
    pub(crate) fn alloc(&mut self, q: u32, msg_id: i64) -> u32 {
        if self.make_room(q) {
            self.alloc_available(q, msg_id)
        } else {
            NIL
        }
    }

    /// Holds up to `most` slots (at most [`crate::CHUNK_MAX`]) for messages that nobody else can know of yet: their
    /// sender reads them before it commits, and what it was given must have a slot then. Returns how many.
    pub fn hold(&mut self, queue: QueueRef, most: usize) -> usize {
        let Some(q) = self.index_of(queue) else { return 0 };
        let mut held = 0;
        while held < most.min(crate::CHUNK_MAX) && self.make_room(q) {
            self.room_take(q);
            self.queues[q as usize].held_len += 1;
            held += 1;
        }
        held
    }

    /// Ends the hold on one slot, at the end of the transaction it was held for. Whoever publishes its message in the
    /// same hold of the lock gets one.
    pub fn unhold(&mut self, queue: QueueRef, fx: &mut Effects) {
        let q = queue.index;
        let is_it = queue.epoch == self.head.epoch
            && self
                .queues
                .get(q as usize)
                .is_some_and(|of| of.is_attached && of.generation == queue.generation);
        if is_it && self.queues[q as usize].held_len > 0 {
            self.queues[q as usize].held_len -= 1;
            self.room_give(q);
            self.release_if_dead(q);
            self.room_made(fx);
        }
    }

    /// One free slot less. Before the queue's counters tell of it.
    fn room_take(&mut self, q: u32) {
        if self.is_promised(q) {
            self.head.reserved -= 1;
        }
        self.head.slots_free -= 1;
    }

    /// One more. After the queue's counters have told of it.
    fn room_give(&mut self, q: u32) {
        self.head.slots_free += 1;
        if self.is_promised(q) {
            self.head.reserved += 1;
        }
    }

    /// A slot for a message that is not due yet; NIL unless slots are plentiful.
    pub(crate) fn alloc_delayed(&mut self, q: u32, msg_id: i64) -> u32 {
        let queue = &self.queues[q as usize];
        let spare = self.slots.len() as u32 / 8;
        let is_plentiful = self.head.slots_free > self.head.reserved.saturating_add(spare);
        let is_promised = queue.used() < self.head.config.slots_min / 2 && self.head.slots_free > 0;
        if queue.delayed_len >= self.head.config.window || !(is_plentiful || is_promised) {
            return NIL;
        }
        self.alloc_available(q, msg_id)
    }

    fn alloc_available(&mut self, q: u32, msg_id: i64) -> u32 {
        self.room_take(q);
        let index = if self.head.slot_free != NIL {
            let index = self.head.slot_free;
            self.head.slot_free = self.slots[index as usize].next;
            index
        } else {
            self.head.slots_touched += 1;
            self.head.slots_touched - 1
        };
        let bucket = self.bucket(q, msg_id);
        self.slots[index as usize] = Slot { msg_id, queue: q, next: self.slot_buckets[bucket], ..Slot::FREE };
        self.slot_buckets[bucket] = index;
        // Counted as pinned until it is filed, so that `used` is right at every moment.
        self.slots[index as usize].state = State::Pinned as u8;
        self.slots[index as usize].from = State::Untracked as u8;
        self.queues[q as usize].pinned_len += 1;
        index
    }

    /// Gives back a slot that is in no tree (pinned, as [`Arena::unfile`] leaves it). Whoever does not use it at
    /// once says so to the hungry ([`Arena::room_made`]).
    pub(crate) fn free(&mut self, index: u32) {
        self.unlist_pinned(index);
        self.row_is_stale(index);
        let (q, msg_id, next) = {
            let slot = &self.slots[index as usize];
            (slot.queue, slot.msg_id, slot.next)
        };
        let bucket = self.bucket(q, msg_id);
        if self.slot_buckets[bucket] == index {
            self.slot_buckets[bucket] = next;
        } else {
            let mut here = self.slot_buckets[bucket];
            while here != NIL {
                let after = self.slots[here as usize].next;
                if after == index {
                    self.slots[here as usize].next = next;
                    break;
                }
                here = after;
            }
        }
        self.slots[index as usize] = Slot { next: self.head.slot_free, ..Slot::FREE };
        self.head.slot_free = index;
        self.queues[q as usize].pinned_len -= 1;
        self.room_give(q);
        self.release_if_dead(q);
    }

    /// There is room, or may be: somebody who waits for the longest hungry queue that may use it is woken.
    pub(crate) fn room_made(&mut self, fx: &mut Effects) {
        const LOOK_MAX: usize = 16;
        let mut q = self.head.hungry_first;
        for _ in 0..LOOK_MAX {
            if q == NIL {
                return;
            }
            let next = self.queues[q as usize].hungry_next;
            if self.has_room_for_hungry(q) {
                self.hunger_end(q);
                if self.queues[q as usize].load_wanted {
                    self.worker_wanted(q, fx);
                }
                let woken_before = self.queues[q as usize].woken_len;
                self.announce_unloaded(q, fx);
                if self.queues[q as usize].woken_len > woken_before {
                    return; // who leaves without using the room says so again
                }
            }
            q = next;
        }
    }

    /// Whether what a hungry queue's load stopped for is there now.
    pub(crate) fn has_room_for_hungry(&self, q: u32) -> bool {
        self.slot_is_available(q)
    }

    /// A load of the queue stopped for want of room.
    pub(crate) fn hunger_begin(&mut self, q: u32) {
        self.hunger_end(q);
        let last = self.head.hungry_last;
        let queue = &mut self.queues[q as usize];
        queue.is_hungry = true;
        queue.hungry_previous = last;
        self.head.hungry_last = q;
        if last == NIL {
            self.head.hungry_first = q;
        } else {
            self.queues[last as usize].hungry_next = q;
        }
    }

    /// The queue is loaded again, or need not be.
    pub(crate) fn hunger_end(&mut self, q: u32) {
        let Queue { is_hungry, hungry_next, hungry_previous, .. } = self.queues[q as usize];
        if !is_hungry {
            return;
        }
        if hungry_previous == NIL {
            self.head.hungry_first = hungry_next;
        } else {
            self.queues[hungry_previous as usize].hungry_next = hungry_next;
        }
        if hungry_next == NIL {
            self.head.hungry_last = hungry_previous;
        } else {
            self.queues[hungry_next as usize].hungry_previous = hungry_previous;
        }
        let queue = &mut self.queues[q as usize];
        queue.is_hungry = false;
        queue.hungry_next = NIL;
        queue.hungry_previous = NIL;
    }

    /// Takes one slot from a queue that holds more than `q`. Looks at a bounded number of queues.
    fn evict(&mut self, q: u32) -> bool {
        const LOOK_MAX: u32 = 16;
        let touched = self.head.queues_touched;
        let mine = self.queues[q as usize].used();
        for _ in 0..touched.min(LOOK_MAX) {
            let victim = self.head.evict_hand % touched;
            let queue = &self.queues[victim as usize];
            let holds_more = queue.used() > mine + 1 && queue.used() > self.head.config.slots_min;
            if victim != q && queue.is_attached && holds_more {
                let slot = match self.evictable(queue.ready) {
                    NIL => self.evictable(queue.exhausted),
                    slot => slot,
                };
                if slot != NIL {
                    self.mark_lower(victim, self.slots[slot as usize].msg_id);
                    self.unfile(slot);
                    self.free(slot);
                    return true; // the hand stays: this queue has more to give
                }
            }
            self.head.evict_hand = self.head.evict_hand.wrapping_add(1) % touched;
        }
        false
    }

    /// The last slot of a tree by id that its row can stand in for, among the last few; or NIL.
    fn evictable(&self, root: u32) -> u32 {
        const LOOK_MAX: usize = 8;
        let mut slot = tree::last(self.slots, root);
        for _ in 0..LOOK_MAX {
            if slot == NIL || self.slots[slot as usize].is_evictable() {
                return slot;
            }
            slot = tree::before(self.slots, root, slot, Order::Id);
        }
        NIL
    }
}
