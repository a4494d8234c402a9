//! The operations that could depend on how many queues there are, by that number. Owns what of each is timed.

use std::hint::black_box;
use std::time::Duration;

use criterion::Criterion;
use queue_dispatch::{Change, Config, Effects, Fence, LoadRow, LoadStart, QueueRef, Taken, NIL};

use crate::common::Memory;
use crate::ledger::{seen, time, Ledger};
use crate::world::{
    attach, lease, remove, row, worker_asleep, Random, BACKEND, BACKENDS, DATABASE, HORIZON_US, HOUR_US, NOW,
    WORKER,
};

/// Ready messages, all queues together.
const MESSAGES: usize = 1_000_000;
/// A database without queues.
const ANOTHER_DATABASE: u32 = 2;
const ROUND: usize = 4_096;

/// The same number of messages in each queue; ids and slots in no order.
struct Many {
    memory: Memory,
    queues: Vec<QueueRef>,
    each: usize,
    fx: Effects,
    random: Random,
}

type Round = fn(&mut Many, usize) -> (usize, Duration);

const ROUNDS: [(&str, Round); 9] = [
    ("publish", publish),
    ("take 1", take),
    ("pin ready, pin_finish", finish),
    ("queue_find", find),
    ("queue_attach, queue_detach", attach_detach),
    ("tick", tick),
    ("tick, all of another database", tick_another),
    ("queue_of_database, none", of_database),
    ("worker_set", worker_set),
];

pub fn run(c: &mut Criterion, ledger: &mut Ledger, n: usize) {
    let mut many: Option<Many> = None;
    for (operation, round) in ROUNDS {
        ledger.measure(c, &format!("queues: {operation}"), n, || {
            round(many.get_or_insert_with(|| Many::new(n)), ROUND)
        });
    }
    drop(many);
    let mut hungry: Option<Hungry> = None;
    ledger.measure(c, "queues: pin_finish, all others hungry", n, || {
        hungry.get_or_insert_with(|| Hungry::new(n)).finish()
    });
}

impl Many {
    fn new(queues: usize) -> Many {
        let config = Config { slots_min: 50, window: u32::MAX };
        let slots = MESSAGES + MESSAGES / 4 + 50 * (queues + 1);
        let mut memory = Memory::new(queues + 1, slots, BACKENDS, config, 1);
        let (mut fx, mut random) = (Effects::new(), Random(1));
        let mut arena = memory.arena();
        let relations = random.shuffled(queues);
        let queues: Vec<QueueRef> =
            relations.iter().map(|relation| attach(&mut arena, relation + 1, &mut fx)).collect();
        worker_asleep(&mut arena);
        let each = MESSAGES / queues.len();
        for number in random.shuffled(each * queues.len()) {
            let (at, msg_id) = (queues[number as usize / each], i64::from(number) % each as i64);
            arena.publish(at, row(msg_id), Change::Insert, NOW, &mut fx);
        }
        Many { memory, queues, each, fx, random }
    }

    fn some(&mut self, k: usize) -> Vec<QueueRef> {
        (0..k).map(|_| self.queues[self.random.below(self.queues.len())]).collect()
    }
}

fn publish(m: &mut Many, k: usize) -> (usize, Duration) {
    let above = m.each as i64;
    let some: Vec<(QueueRef, i64)> = m.some(k).into_iter().zip(above..).collect();
    let (mut arena, fx) = (m.memory.arena(), &mut m.fx);
    let took = time(|| {
        some.iter().for_each(|(at, id)| arena.publish(*at, row(*id), Change::Insert, NOW, fx));
    });
    some.iter().for_each(|(at, id)| remove(&mut arena, *at, *id, fx));
    (k, took)
}

fn take(m: &mut Many, k: usize) -> (usize, Duration) {
    // A queue has at least so many.
    let some = m.some(k.min(MESSAGES / 10_000));
    let mut taken = vec![Taken::default(); some.len()];
    let (mut arena, fx) = (m.memory.arena(), &mut m.fx);
    let took = time(|| {
        for (at, one) in some.iter().zip(taken.chunks_mut(1)) {
            assert_eq!(arena.take(*at, lease(NOW.mono_us + HOUR_US), NOW, one, fx), 1);
        }
    });
    for (at, one) in some.iter().zip(&taken) {
        arena.pin(*at, one.msg_id, Fence::Lease(one.lease_id), BACKEND, NOW, fx);
        arena.pin_release(*at, one.msg_id, BACKEND, fx);
    }
    (some.len(), took)
}

fn finish(m: &mut Many, k: usize) -> (usize, Duration) {
    let first = m.random.below(m.each) as i64;
    let mut some: Vec<(QueueRef, i64)> = m.some(k).into_iter().zip(first..).collect();
    some.iter_mut().for_each(|(_, id)| *id %= m.each as i64);
    some.sort_unstable_by_key(|(at, id)| (*id, at.index));
    some.dedup();
    let (mut arena, fx) = (m.memory.arena(), &mut m.fx);
    let took = time(|| some.iter().for_each(|(at, id)| remove(&mut arena, *at, *id, fx)));
    some.iter().for_each(|(at, id)| arena.publish(*at, row(*id), Change::Insert, NOW, fx));
    (some.len(), took)
}

fn find(m: &mut Many, k: usize) -> (usize, Duration) {
    let some: Vec<u32> = (0..k).map(|_| m.random.below(m.queues.len()) as u32 + 1).collect();
    let arena = m.memory.arena();
    (k, time(|| some.iter().for_each(|relation| seen(arena.queue_find(DATABASE, *relation)))))
}

/// One that is empty comes and goes.
fn attach_detach(m: &mut Many, k: usize) -> (usize, Duration) {
    let (mut arena, fx) = (m.memory.arena(), &mut m.fx);
    let relation = u32::MAX;
    let took = time(|| {
        for _ in 0..k {
            black_box(arena.queue_attach(DATABASE, relation, HORIZON_US));
            assert!(arena.queue_detach(DATABASE, relation, 256, fx));
        }
    });
    (k, took)
}

/// A queue's share of a worker's round in which nothing is due.
fn tick(m: &mut Many, k: usize) -> (usize, Duration) {
    let (mut arena, fx) = (m.memory.arena(), &mut m.fx);
    let took = time(|| {
        let mut from = 0;
        for _ in 0..k {
            let (tick, next) = black_box(arena.tick(DATABASE, from, NOW, fx));
            assert!(tick.is_some());
            // The record that `attach_detach` used comes last and is free.
            from = if next >= m.queues.len() as u32 { 0 } else { next };
        }
    });
    (k, took)
}

/// One call that looks at a stretch in vain.
fn tick_another(m: &mut Many, k: usize) -> (usize, Duration) {
    let k = k.min(16);
    let (mut arena, fx) = (m.memory.arena(), &mut m.fx);
    (k, time(|| (0..k).for_each(|_| seen(arena.tick(ANOTHER_DATABASE, 0, NOW, fx)))))
}

fn of_database(m: &mut Many, k: usize) -> (usize, Duration) {
    let k = k.min(16);
    let arena = m.memory.arena();
    let took = time(|| (0..k).for_each(|_| seen(arena.queue_of_database(black_box(ANOTHER_DATABASE), 0))));
    (k, took)
}

fn worker_set(m: &mut Many, k: usize) -> (usize, Duration) {
    let k = k.min(16);
    let mut arena = m.memory.arena();
    let took = time(|| (0..k).for_each(|_| seen(arena.worker_set(DATABASE, WORKER))));
    worker_asleep(&mut arena);
    (k, took)
}

/// One queue leases every slot; all others have something to load and no room for it.
struct Hungry {
    memory: Memory,
    hog: QueueRef,
    others: Vec<QueueRef>,
    /// Which of the others is the longest hungry.
    first: usize,
    leased: Vec<i64>,
    fx: Effects,
}

/// How many of the hungry one look wakes at most (`room_made`).
const LOOK_MAX: usize = 16;

impl Hungry {
    fn new(queues: usize) -> Hungry {
        let slots = 1_024;
        let mut memory = Memory::new(queues + 1, slots, BACKENDS, Config { slots_min: 0, window: u32::MAX }, 1);
        let (mut fx, mut arena) = (Effects::new(), memory.arena());
        let hog = attach(&mut arena, 1, &mut fx);
        let others: Vec<QueueRef> = (0..queues as u32).map(|i| attach(&mut arena, i + 2, &mut fx)).collect();
        worker_asleep(&mut arena);
        let leased: Vec<i64> = (0..slots as i64).collect();
        for msg_id in &leased {
            arena.publish_leased(hog, row(*msg_id), msg_id + 1, lease(NOW.mono_us + HOUR_US), NOW, &mut fx);
        }
        assert_eq!(arena.slots_free(), 0);
        others.iter().for_each(|at| make_hungry(&mut arena, *at, &mut fx));
        Hungry { memory, hog, others, first: 0, leased, fx }
    }

    fn finish(&mut self) -> (usize, Duration) {
        let (mut arena, fx) = (self.memory.arena(), &mut self.fx);
        let msg_id = self.leased[self.first % self.leased.len()];
        arena.pin(self.hog, msg_id, Fence::Any, BACKEND, NOW, fx);
        let took = time(|| arena.pin_finish(self.hog, msg_id, BACKEND, fx));
        arena.publish_leased(self.hog, row(msg_id), msg_id + 1, lease(NOW.mono_us + HOUR_US), NOW, fx);
        for _ in 0..LOOK_MAX.min(self.others.len()) {
            make_hungry(&mut arena, self.others[self.first % self.others.len()], fx);
            self.first += 1;
        }
        (1, took)
    }
}

fn make_hungry(arena: &mut queue_dispatch::Arena, at: QueueRef, fx: &mut Effects) {
    arena.queue_mark(at, 0, fx);
    assert_eq!(arena.load_begin(at, WORKER), LoadStart::From(0));
    assert_eq!(arena.load_row(at, row(0), NOW, fx), LoadRow::Full);
    arena.load_end(at, WORKER, 0, fx);
    assert_ne!(at.index, NIL);
}
