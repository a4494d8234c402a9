//! Waiting and waking, by how many wait for one queue. Owns what of each is timed.

use std::time::Duration;

use criterion::Criterion;
use queue_dispatch::{Change, Config, Effects, QueueRef, Taken, CHUNK_MAX, WAIT_QUEUES_MAX};

use crate::common::Memory;
use crate::ledger::{time, Ledger};
use crate::world::{attach, lease, remove, row, worker_asleep, Random, BACKENDS, HOUR_US, NOW, WORKER};

/// All who wait, for whatever queue.
const ALL: usize = 1_000;
/// Wake-ups that one list of effects has room for.
const WAKES: usize = CHUNK_MAX;

/// A thousand backends, so many of them at each queue; the queues are empty.
struct Room {
    memory: Memory,
    queues: Vec<QueueRef>,
    /// Who waits, in the order in which they came, and where.
    sleepers: Vec<(u32, Vec<QueueRef>)>,
    random: Random,
}

pub fn run(c: &mut Criterion, ledger: &mut Ledger, n: usize) {
    for (width, name) in [(1, "1 queue"), (WAIT_QUEUES_MAX, "64 queues")] {
        let mut room: Option<Room> = None;
        let mut measure = |operation: &str, round: fn(&mut Room) -> (usize, Duration)| {
            ledger.measure(c, &format!("waiters: {operation}, {name}"), n, || {
                round(room.get_or_insert_with(|| Room::new(n, width)))
            });
        };
        measure("wait_begin", Room::begin);
        measure("wait_end", Room::end);
        measure("publish and wake", Room::publish);
        measure("take and wait_end, woken", Room::take);
    }
}

impl Room {
    /// `waiters` at each queue, each of them at `width` queues.
    fn new(waiters: usize, width: usize) -> Room {
        let groups = ALL / waiters;
        let mut memory =
            Memory::new(groups * width, 10_000, BACKENDS, Config { slots_min: 0, window: u32::MAX }, 1);
        let (mut fx, mut arena) = (Effects::new(), memory.arena());
        let relations = Random(1).shuffled(groups * width);
        let queues: Vec<QueueRef> =
            relations.iter().map(|relation| attach(&mut arena, relation + 1, &mut fx)).collect();
        worker_asleep(&mut arena);
        let sleepers =
            (0..ALL).map(|i| (WORKER + 1 + i as u32, queues[i % groups * width..][..width].to_vec())).collect();
        let mut room = Room { memory, queues, sleepers, random: Random(1) };
        room.all_wait();
        room
    }

    fn all_wait(&mut self) {
        let (mut arena, mut fx) = (self.memory.arena(), Effects::new());
        self.sleepers.iter().for_each(|(proc, queues)| arena.wait_begin(*proc, queues, &mut fx));
    }

    fn all_leave(&mut self) {
        let (mut arena, mut fx) = (self.memory.arena(), Effects::new());
        self.sleepers.iter().for_each(|(proc, _)| arena.wait_end(*proc, &mut fx));
    }

    fn begin(&mut self) -> (usize, Duration) {
        self.all_leave();
        let (mut arena, mut fx) = (self.memory.arena(), Effects::new());
        let sleepers = &self.sleepers;
        (ALL, time(|| sleepers.iter().for_each(|(proc, queues)| arena.wait_begin(*proc, queues, &mut fx))))
    }

    /// Nobody woke them: a timeout, a cancellation. In no order.
    fn end(&mut self) -> (usize, Duration) {
        let order = self.random.shuffled(ALL);
        let (mut arena, mut fx) = (self.memory.arena(), Effects::new());
        let sleepers = &self.sleepers;
        let took = time(|| order.iter().for_each(|i| arena.wait_end(sleepers[*i as usize].0, &mut fx)));
        self.all_wait();
        (ALL, took)
    }

    /// The queues that are sent to, one for each message, one message for each waiter at most.
    fn targets(&self) -> Vec<QueueRef> {
        let width = self.sleepers[0].1.len();
        let firsts: Vec<QueueRef> = self.queues.iter().step_by(width).copied().collect();
        (0..WAKES).map(|i| firsts[i % firsts.len()]).collect()
    }

    fn wake(&mut self, targets: &[QueueRef], fx: &mut Effects) -> Duration {
        let mut arena = self.memory.arena();
        let took = time(|| {
            for (id, at) in targets.iter().enumerate() {
                arena.publish(*at, row(id as i64), Change::Insert, NOW, fx);
            }
        });
        assert_eq!(fx.procs().len(), targets.len());
        took
    }

    fn publish(&mut self) -> (usize, Duration) {
        let (targets, mut fx) = (self.targets(), Effects::new());
        let took = self.wake(&targets, &mut fx);
        self.quiet(&targets);
        (targets.len(), took)
    }

    fn take(&mut self) -> (usize, Duration) {
        let (targets, mut fx) = (self.targets(), Effects::new());
        self.wake(&targets, &mut fx);
        let (mut arena, mut unused) = (self.memory.arena(), Effects::new());
        let took = time(|| {
            for (at, proc) in targets.iter().zip(fx.procs()) {
                let mut one = [Taken::default()];
                assert_eq!(arena.take(*at, lease(NOW.mono_us + HOUR_US), NOW, &mut one, &mut unused), 1);
                arena.wait_end(*proc, &mut unused);
            }
        });
        self.quiet(&targets);
        (targets.len(), took)
    }

    /// No messages, everybody waits.
    fn quiet(&mut self, targets: &[QueueRef]) {
        let (mut arena, mut fx) = (self.memory.arena(), Effects::new());
        for (id, at) in targets.iter().enumerate() {
            remove(&mut arena, *at, id as i64, &mut fx);
        }
        self.all_leave();
        self.all_wait();
    }
}
