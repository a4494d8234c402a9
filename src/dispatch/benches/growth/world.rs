//! What is measured: an arena that has lived. Owns its filling, and putting back what a round of measuring took
//! out. Measures nothing itself.
//!
//! Everything is laid out as badly as a long life would: ids, deadlines and free slots lie in no order in memory,
//! so that each step down a tree is a step to another place. A fresh arena, filled in order, is faster.

use queue_dispatch::{
    Arena, Change, Config, Effects, Fence, Lease, LoadStart, Now, Pin, Policy, QueueRef, Row, Taken, Tid,
    NO_MARK,
};

use crate::common::Memory;

/// The database that all queues are in.
pub const DATABASE: u32 = 1;
/// The database's worker.
pub const WORKER: u32 = 0;
/// The backend that does everything else.
pub const BACKEND: u32 = 1;
/// Backends that there are.
pub const BACKENDS: usize = 1_024;
/// The time, always. Far from zero, so that what is past can be said.
pub const NOW: Now = Now { mono_us: 1_000 * HOUR_US, wall_us: 1_000 * HOUR_US };
/// An hour in microseconds.
pub const HOUR_US: i64 = 3_600_000_000;
/// How far the horizon of each queue reaches.
pub const HORIZON_US: i64 = NOW.wall_us + 100 * HOUR_US;
/// The count at which a message is exhausted.
pub const DELIVERIES_MAX: u32 = 1_000_000;
/// From one id to the next, so that there are ids between them.
const ID_STEP: i64 = 2;

/// SplitMix64: numbers without a pattern, the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(z ^ (z >> 31)) * n as u128) >> 64) as usize
    }

    pub fn shuffled(&mut self, n: usize) -> Vec<u32> {
        let mut numbers: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            numbers.swap(i, self.below(i + 1));
        }
        numbers
    }
}

/// A row that may be delivered at once.
pub fn row(msg_id: i64) -> Row {
    Row { msg_id, tid: Tid { block: msg_id as u32, offset: 1 }, visible_at_us: None, count: 0 }
}

/// A row that is due later.
pub fn row_due(msg_id: i64, visible_at_us: i64) -> Row {
    Row { visible_at_us: Some(visible_at_us), ..row(msg_id) }
}

/// A lease of the backend's.
pub fn lease(until_us: i64) -> Lease {
    Lease { until_us, pid: 1, lxid: 1, flush_us: queue_dispatch::NEVER_US }
}

/// Settings under which nothing but the count ever makes a message go away.
pub fn policy() -> Policy {
    Policy { max_deliveries: DELIVERIES_MAX, ..Policy::DEFAULT }
}

/// Attaches a queue and gives it its settings; all is loaded, the horizon is far.
pub fn attach(arena: &mut Arena, relation: u32, fx: &mut Effects) -> QueueRef {
    let at = arena.queue_attach(DATABASE, relation, HORIZON_US).expect("a free record");
    let (_, version) = arena.queue_config_state(at).expect("an attached queue");
    assert!(arena.queue_configure(at, version, policy()));
    assert_eq!(arena.restore_begin(at, 0), queue_dispatch::Restore::Begun);
    arena.restore_end(at, 0, &mut queue_dispatch::Effects::new());
    all_loaded(arena, at, fx);
    at
}

/// A load that finds nothing.
pub fn all_loaded(arena: &mut Arena, at: QueueRef, fx: &mut Effects) {
    assert!(matches!(arena.load_begin(at, BACKEND), LoadStart::From(_)));
    arena.load_end(at, BACKEND, NO_MARK, fx);
}

/// A worker that is asleep and need not be woken for anything: what each queue normally has.
pub fn worker_asleep(arena: &mut Arena) {
    assert!(arena.worker_set(DATABASE, WORKER));
    arena.worker_round(DATABASE);
    arena.worker_sleep(DATABASE, 0);
}

/// A message goes, whatever holds it.
pub fn remove(arena: &mut Arena, at: QueueRef, msg_id: i64, fx: &mut Effects) {
    let pin = arena.pin(at, msg_id, Fence::Any, BACKEND, NOW, fx);
    assert!(matches!(pin, Pin::Done(_)));
    arena.pin_finish(at, msg_id, BACKEND, fx);
}

/// Free slots come in no order from now on: all were used, and were freed in no order. That is cheap where
/// nothing that is freed is in a tree.
pub fn scatter_free_slots(
    arena: &mut Arena,
    at: QueueRef,
    slots: usize,
    random: &mut Random,
    fx: &mut Effects,
) {
    let ids = 0..slots as i64;
    ids.clone().for_each(|msg_id| arena.publish(at, row(msg_id), Change::Insert, NOW, fx));
    for msg_id in ids {
        assert!(matches!(arena.pin(at, msg_id, Fence::Any, BACKEND, NOW, fx), Pin::Done(_)));
    }
    for msg_id in random.shuffled(slots) {
        arena.pin_finish(at, i64::from(msg_id), BACKEND, fx);
    }
}

/// Half of a queue's messages leased (the lower ids), half of them ready, and a third as many slots free; beside
/// it a queue of exhausted messages, a quarter as long.
pub struct World {
    /// Messages in the queue.
    pub n: usize,
    /// The queue.
    pub at: QueueRef,
    /// The queue of the exhausted.
    pub graves: QueueRef,
    pub fx: Effects,
    pub random: Random,
    memory: Memory,
    /// Of each leased message, by rank.
    lease_ids: Vec<i64>,
    /// Ranks handed out so far in this round, so that none comes twice.
    next_rank: usize,
    stride: usize,
}

impl World {
    pub fn new(n: usize) -> World {
        let spare = n / 3 + 1_024;
        let slots = n + n / 4 + spare;
        let config = Config { slots_min: 1, window: u32::MAX };
        let mut memory = Memory::new(4, slots + 4, BACKENDS, config, 1); // what is promised stays free
        let (mut fx, mut random) = (Effects::new(), Random(n as u64));
        let mut arena = memory.arena();
        let at = attach(&mut arena, 1, &mut fx);
        let graves = attach(&mut arena, 2, &mut fx);
        scatter_free_slots(&mut arena, at, slots, &mut random, &mut fx);
        let ids = (0..n as i64).map(|rank| rank * ID_STEP);
        ids.for_each(|msg_id| arena.publish(at, row(msg_id), Change::Insert, NOW, &mut fx));
        for msg_id in 0..n as i64 / 4 {
            let exhausted = Row { count: DELIVERIES_MAX, ..row(msg_id) };
            arena.publish(graves, exhausted, Change::Insert, NOW, &mut fx);
        }
        let half = n as i64 / 2;
        let lease_ids = (0..half)
            .map(|rank| {
                let mut taken = [Taken::default()];
                let until_us = NOW.mono_us + HOUR_US + rank * (HOUR_US / half);
                assert_eq!(arena.take(at, lease(until_us), NOW, &mut taken, &mut fx), 1);
                taken[0].lease_id
            })
            .collect();
        worker_asleep(&mut arena);
        let stride = coprime_stride(n / 2);
        World { n, at, graves, fx, random, memory, lease_ids, next_rank: 0, stride }
    }

    /// The dispatcher, and what its calls need beside it.
    pub fn open(&mut self) -> (Arena<'_>, &mut Effects) {
        (self.memory.arena(), &mut self.fx)
    }

    /// How many messages a round should work on: enough to drive the last round's out of the near caches, few
    /// enough to leave the queue as long as it is.
    pub fn round(&self) -> usize {
        (self.n / 8).clamp(64, 4_096)
    }

    /// Leased messages, each once, in no order: `(id, lease)`.
    pub fn leased(&mut self, count: usize) -> Vec<(i64, i64)> {
        self.ranks(count).into_iter().map(|rank| (rank as i64 * ID_STEP, self.lease_ids[rank])).collect()
    }

    /// Ready messages, likewise.
    pub fn ready(&mut self, count: usize) -> Vec<i64> {
        let half = self.n / 2;
        self.ranks(count).into_iter().map(|rank| (half + rank) as i64 * ID_STEP).collect()
    }

    /// Ids between those of ready messages, likewise.
    pub fn between(&mut self, count: usize) -> Vec<i64> {
        self.ready(count).into_iter().map(|msg_id| msg_id + 1).collect()
    }

    /// Ids above all others.
    pub fn above(&self, count: usize) -> Vec<i64> {
        (0..count).map(|i| (self.n + i) as i64 * ID_STEP).collect()
    }

    fn ranks(&mut self, count: usize) -> Vec<usize> {
        let half = self.n / 2;
        assert!(count <= half);
        (0..count)
            .map(|_| {
                self.next_rank = (self.next_rank + self.stride) % half;
                self.next_rank
            })
            .collect()
    }

    /// A leased message is as it was, wherever it went meanwhile.
    pub fn lease_again(&mut self, msg_id: i64) {
        let lease_id = self.lease_ids[(msg_id / ID_STEP) as usize];
        let until_us = NOW.mono_us + HOUR_US + self.random.below(HOUR_US as usize) as i64;
        let at = self.at;
        let (mut arena, fx) = self.open();
        if arena.view(at, msg_id).is_some() {
            remove(&mut arena, at, msg_id, fx);
        }
        arena.publish_leased(at, row(msg_id), lease_id, lease(until_us), NOW, fx);
    }

    /// Messages that were taken are ready again, and nobody knows of it.
    pub fn ready_again(&mut self, taken: &[Taken]) {
        let at = self.at;
        let (mut arena, fx) = self.open();
        for one in taken {
            arena.pin(at, one.msg_id, Fence::Lease(one.lease_id), BACKEND, NOW, fx);
            arena.pin_release(at, one.msg_id, BACKEND, fx);
        }
    }

    /// Messages go.
    pub fn remove_all(&mut self, ids: &[i64]) {
        let at = self.at;
        let (mut arena, fx) = self.open();
        for msg_id in ids {
            remove(&mut arena, at, *msg_id, fx);
        }
    }

    /// For assertions: ready, delayed, leased, exhausted, pinned.
    pub fn lengths(&mut self) -> [u32; 5] {
        let at = self.at;
        self.open().0.lengths(at).expect("an attached queue")
    }

    /// Whether a round left everything as it found it.
    pub fn assert_restored(&mut self) {
        let half = (self.n / 2) as u32;
        assert_eq!(self.lengths(), [self.n as u32 - half, 0, half, 0, 0]);
        assert!(self.fx.procs().is_empty());
    }
}

/// A step that visits every rank below `n` once, far from the last.
fn coprime_stride(n: usize) -> usize {
    let mut stride = (n as f64 * 0.618_033_988_75) as usize | 1;
    while gcd(stride, n) != 1 {
        stride += 2;
    }
    stride
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 {
        a
    } else {
        gcd(b, a % b)
    }
}
