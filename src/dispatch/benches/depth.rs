//! The growth that no clock is needed for: how deep the trees are, and how long the hash chains, counted. The
//! priorities in a tree are a hash of the message and the arena's epoch, which is drawn from a seed: so every count
//! is the same in every run, on every machine.
//!
//! The crate shows its links to nobody. They are read from what `Debug` prints of a slot, which costs the crate
//! nothing; it only has to go on printing them.

use queue_dispatch::{
    Arena, Change, Config, Db, Effects, Fence, Head, Lease, LoadStart, Now, Parts, Pin, Policy, Queue,
    QueueRef, Row, Slot, Taken, Tid, WaitNode, Waiter, CHUNK_MAX, NIL, NO_MARK, WAIT_QUEUES_MAX,
};

const DATABASE: u32 = 1;
const BACKEND: u32 = 0;
const NOW: Now = Now { mono_us: 0, wall_us: 0 };
const SECOND_US: i64 = 1_000_000;
const SIZES: [i64; 3] = [1_000, 10_000, 100_000];
/// Buckets are as many as slots or more; longer chains than this come only of a bad hash.
const CHAIN_MAX: usize = 12;

/// Memory for an arena whose slots can be looked at.
struct Memory {
    head: Head,
    queues: Vec<Queue>,
    queue_buckets: Vec<u32>,
    slots: Vec<Slot>,
    slot_buckets: Vec<u32>,
    waiters: Vec<Waiter>,
    wait_nodes: Vec<WaitNode>,
    dbs: Vec<Db>,
    fx: Effects,
    at: Vec<QueueRef>,
}

/// What was counted: depth of the slots in trees (the root is 1), and length of the hash chains.
struct Depths {
    mean: f64,
    deepest: usize,
    longest_chain: usize,
}

impl Memory {
    /// Queues that are loaded and have nothing.
    fn new(queues: usize, slots: i64) -> Memory {
        let slots = slots as usize;
        let mut memory = Memory {
            head: Head::EMPTY,
            queues: vec![Queue::FREE; queues],
            queue_buckets: vec![0; queues.next_power_of_two()],
            slots: vec![Slot::FREE; slots],
            slot_buckets: vec![0; slots.next_power_of_two()],
            waiters: vec![Waiter::IDLE; 1],
            wait_nodes: vec![WaitNode::FREE; WAIT_QUEUES_MAX],
            dbs: vec![Db::FREE],
            fx: Effects::new(),
            at: Vec::new(),
        };
        let (mut arena, fx, at) = memory.open();
        arena.reset(Config { slots_min: 0, window: u32::MAX }, 1, fx);
        for relation in 0..queues as u32 {
            let queue = arena.queue_attach(DATABASE, relation, 0).expect("a free record");
            assert!(arena.queue_configure(queue, 0, Policy { max_deliveries: 0, ..Policy::DEFAULT }));
            assert_eq!(arena.restore_begin(queue, 0), queue_dispatch::Restore::Begun);
            arena.restore_end(queue, 0, &mut queue_dispatch::Effects::new());
            assert!(matches!(arena.load_begin(queue, BACKEND), LoadStart::From(_)));
            arena.load_end(queue, BACKEND, NO_MARK, fx);
            at.push(queue);
        }
        memory
    }

    fn open(&mut self) -> (Arena<'_>, &mut Effects, &mut Vec<QueueRef>) {
        let arena = Arena::new(Parts {
            head: &mut self.head,
            queues: &mut self.queues,
            queue_buckets: &mut self.queue_buckets,
            slots: &mut self.slots,
            slot_buckets: &mut self.slot_buckets,
            waiters: &mut self.waiters,
            wait_nodes: &mut self.wait_nodes,
            dbs: &mut self.dbs,
        });
        (arena, &mut self.fx, &mut self.at)
    }

    fn publish(&mut self, queue: usize, msg_id: i64) {
        let (mut arena, fx, at) = self.open();
        let row = Row { msg_id, tid: Tid { block: 1, offset: 1 }, visible_at_us: None, count: 0 };
        arena.publish(at[queue], row, Change::Insert, NOW, fx);
    }

    fn finish(&mut self, queue: usize, msg_id: i64) {
        let (mut arena, fx, at) = self.open();
        assert!(matches!(arena.pin(at[queue], msg_id, Fence::Any, BACKEND, NOW, fx), Pin::Done(_)));
        arena.pin_finish(at[queue], msg_id, BACKEND, fx);
    }

    fn take(&mut self, queue: usize, until_us: i64) -> i64 {
        let (mut arena, fx, at) = self.open();
        let mut taken = [Taken::default()];
        let lease = Lease { until_us, pid: 0, lxid: 1, flush_us: queue_dispatch::NEVER_US };
        assert_eq!(arena.take(at[queue], lease, NOW, &mut taken, fx), 1);
        taken[0].msg_id
    }

    fn depths(&self) -> Depths {
        let links: Vec<[u32; 3]> = self.slots.iter().map(links).collect();
        let mut is_below = vec![false; links.len()];
        for [left, right, _] in &links {
            [left, right].into_iter().filter(|child| **child != NIL).for_each(|c| is_below[*c as usize] = true);
        }
        let (mut sum, mut count, mut deepest) = (0, 0, 0);
        let is_used = |index: &usize| !format!("{:?}", self.slots[*index]).contains(" state: 0,");
        let mut todo: Vec<(usize, usize)> =
            (0..links.len()).filter(|i| !is_below[*i]).filter(is_used).map(|i| (i, 1)).collect();
        while let Some((here, depth)) = todo.pop() {
            (sum, count, deepest) = (sum + depth, count + 1, deepest.max(depth));
            let [left, right, _] = links[here];
            todo.extend([left, right].into_iter().filter(|c| *c != NIL).map(|c| (c as usize, depth + 1)));
        }
        let real = |slot: u32| Some(slot).filter(|slot| *slot != NIL);
        let length =
            |bucket: &u32| std::iter::successors(real(*bucket), |here| real(links[*here as usize][2])).count();
        let longest = self.slot_buckets.iter().map(length);
        let mean = sum as f64 / f64::from(count.max(1));
        Depths { mean, deepest, longest_chain: longest.max().unwrap_or(0) }
    }
}

/// A slot's left, right and next.
fn links(slot: &Slot) -> [u32; 3] {
    let printed = format!("{slot:?}");
    ["left", "right", "next"].map(|name| {
        let name = format!(" {name}: ");
        let from = printed.find(&name).expect("the field") + name.len();
        let rest = &printed[from..];
        rest[..rest.find([',', ' ']).expect("its end")].parse().expect("a slot")
    })
}

/// A tree of random shape is `2 ln n` deep on average; a deepest slot of twice that is already improbable.
fn assert_shallow(what: &str, memory: &Memory, per_tree: i64) {
    let Depths { mean, deepest, longest_chain } = memory.depths();
    let ln = (per_tree as f64).ln();
    println!(
        "{what}, {per_tree} a tree: mean depth {mean:.1}, deepest {deepest}, longest chain {longest_chain}"
    );
    assert!(mean <= 2.0 * ln + 1.0, "{what}: a mean depth of {mean}");
    assert!(deepest as f64 <= 5.0 * ln, "{what}: a slot {deepest} deep");
    assert!(longest_chain <= CHAIN_MAX, "{what}: a chain of {longest_chain}");
}

/// Ids from 0 to `n` in no order: 7919 is prime and divides no power of ten.
fn scattered(n: i64) -> impl Iterator<Item = i64> {
    (0..n).map(move |i| i * 7_919 % n)
}

#[test]
fn publish_in_any_order_leaves_the_ready_tree_shallow() {
    for n in SIZES {
        let orders: [(&str, Vec<i64>); 3] = [
            ("ascending", (0..n).collect()),
            ("descending", (0..n).rev().collect()),
            ("scattered", scattered(n).collect()),
        ];
        for (order, ids) in orders {
            let mut memory = Memory::new(1, n);
            ids.into_iter().for_each(|msg_id| memory.publish(0, msg_id));
            assert_shallow(order, &memory, n);
        }
    }
}

/// The deadline of the so manieth of so many.
type Deadline = fn(i64, i64) -> i64;

#[test]
fn take_with_any_deadlines_leaves_the_timed_tree_shallow() {
    for n in SIZES {
        let deadlines: [(&str, Deadline); 4] = [
            ("equal deadlines", |_, _| 1),
            ("growing deadlines", |i, _| i + 1),
            ("shrinking deadlines", |i, n| n - i),
            ("scattered deadlines", |i, n| i * 7_919 % n + 1),
        ];
        for (what, deadline) in deadlines {
            let mut memory = Memory::new(1, n);
            (0..n).for_each(|msg_id| memory.publish(0, msg_id));
            (0..n).for_each(|i| assert_eq!(memory.take(0, deadline(i, n) * SECOND_US), i));
            assert_shallow(what, &memory, n);
        }
    }
}

/// A tree that is emptied from its root frees its slots in the order of their priorities. (When these were a hash of
/// the slot's index, the next messages made one long chain, and every read of every queue walked along it.)
#[test]
fn publish_after_the_queue_was_emptied_leaves_the_trees_shallow() {
    for n in SIZES {
        let mut memory = Memory::new(1, n);
        for _ in 0..2 {
            (0..n).for_each(|msg_id| memory.publish(0, msg_id));
            let (mut arena, fx, at) = memory.open();
            while !arena.queue_clear(at[0], CHUNK_MAX, fx) {}
        }
        (0..n).for_each(|msg_id| memory.publish(0, msg_id));
        assert_shallow("emptied and filled", &memory, n);
        (0..n).for_each(|i| assert_eq!(memory.take(0, SECOND_US), i));
        assert_shallow("emptied, filled and leased", &memory, n);
    }
}

/// Slots come and go, first in, first out, until each was used many times.
#[test]
fn finish_and_publish_many_times_keeps_the_trees_shallow() {
    let n = 10_000;
    for queues in [1, 10, 100] {
        let each = n / queues as i64;
        let mut memory = Memory::new(queues, n + 1);
        (0..n).for_each(|i| memory.publish((i / each) as usize, i % each));
        for round in 0..10 * each {
            for queue in 0..queues {
                memory.publish(queue, each + round);
                let held = memory.take(queue, SECOND_US);
                memory.finish(queue, held);
            }
        }
        assert_shallow(&format!("{queues} queues, after some life"), &memory, each);
    }
}
