//! The operations on one queue's messages, by how many there are. Owns what of each is timed.

use std::hint::black_box;
use std::time::Duration;

use criterion::Criterion;
use queue_dispatch::{
    Change, Config, Effects, Fence, LoadRow, LoadStart, Now, QueueRef, Row, Taken, CHUNK_MAX, NO_MARK,
};

use crate::common::Memory;
use crate::ledger::{seen, time, Ledger};
use crate::world::{
    all_loaded, attach, lease, remove, row, row_due, scatter_free_slots, Random, World, BACKEND, BACKENDS,
    DATABASE, HORIZON_US, HOUR_US, NOW, WORKER,
};

/// Does an operation so many times, or as often as it can, and restores what it changed: how often, and how long it took.
type Round = fn(&mut World, usize) -> (usize, Duration);

const ROUNDS: [(&str, Round); 30] = [
    ("publish", publish),
    ("publish among others", publish_among),
    ("publish what is tracked", publish_tracked),
    ("publish_delayed", publish_delayed),
    ("take 1", |w, k| take(w, k, 1)),
    ("take 100", |w, k| take(w, k, 100)),
    ("take 256", |w, k| take(w, k, CHUNK_MAX)),
    ("settle", settle),
    ("settle, not due yet", settle_not_due),
    ("lease_commit", lease_commit),
    ("lease_return", lease_return),
    ("extend", extend),
    ("shorten", shorten),
    ("pin", pin),
    ("pin_undo", pin_undo),
    ("pin_finish", pin_finish),
    ("pin_release", pin_release),
    ("pin_refile near", |w, k| pin_refile(w, k, NOW.wall_us + HOUR_US)),
    ("pin_refile far", |w, k| pin_refile(w, k, HORIZON_US + HOUR_US)),
    ("pin ready, pin_finish", finish_ready),
    ("drop_taken", drop_taken),
    ("promote one of 256 (tick)", promote),
    ("tick, nothing due", tick_idle),
    ("load_row", load_row),
    ("load_row of what is tracked", load_row_tracked),
    ("exhausted_pin 100", exhausted_pin),
    ("view", view),
    ("lengths", lengths),
    ("next_event_us", next_event),
    ("lease_id_next", lease_id_next),
];

pub fn run(c: &mut Criterion, ledger: &mut Ledger, n: usize) {
    let mut world: Option<World> = None; // made when the first operation is not filtered out
    for (operation, round) in ROUNDS {
        ledger.measure(c, operation, n, || {
            let world = world.get_or_insert_with(|| World::new(n));
            let k = world.round();
            round(world, k)
        });
        if let Some(world) = &mut world {
            world.assert_restored();
        }
    }
    drop(world);
    let mut full: Option<Full> = None;
    ledger.measure(c, "publish, evicting another's", n, || {
        full.get_or_insert_with(|| Full::new(n)).evict((n / 8).clamp(64, 4_096))
    });
    drop(full);
    let mut memory: Option<Memory> = None;
    ledger.measure(c, "reset", n, || {
        let config = Config { slots_min: 1, window: u32::MAX };
        let memory = memory.get_or_insert_with(|| Memory::new(64, n, BACKENDS, config, 1));
        (1, time(|| memory.arena().reset(config, 2, &mut Effects::new())))
    });
}

// ---- publishing ------------------------------------------------------------------------------------------------

fn publish_ids(w: &mut World, ids: &[i64]) -> (usize, Duration) {
    let at = w.at;
    let (mut arena, fx) = w.open();
    let took = time(|| ids.iter().for_each(|id| arena.publish(at, row(*id), Change::Insert, NOW, fx)));
    w.remove_all(ids);
    (ids.len(), took)
}

/// Ids that grow: what nearly every send is.
fn publish(w: &mut World, k: usize) -> (usize, Duration) {
    let ids = w.above(k);
    publish_ids(w, &ids)
}

/// Ids between others: commits that come late.
fn publish_among(w: &mut World, k: usize) -> (usize, Duration) {
    let ids = w.between(k);
    publish_ids(w, &ids)
}

/// A load was faster.
fn publish_tracked(w: &mut World, k: usize) -> (usize, Duration) {
    let (at, ids) = (w.at, w.ready(k));
    let (mut arena, fx) = w.open();
    (k, time(|| ids.iter().for_each(|id| arena.publish(at, row(*id), Change::Insert, NOW, fx))))
}

fn publish_delayed(w: &mut World, k: usize) -> (usize, Duration) {
    let (at, ids) = (w.at, w.above(k));
    // Among the ends of leases, which are in the same tree.
    let due = |random: &mut Random| NOW.wall_us + HOUR_US + random.below(HOUR_US as usize) as i64;
    let rows: Vec<Row> = ids.iter().map(|id| row_due(*id, due(&mut w.random))).collect();
    let (mut arena, fx) = w.open();
    let took = time(|| rows.iter().for_each(|row| arena.publish(at, *row, Change::Insert, NOW, fx)));
    w.remove_all(&ids);
    (k, took)
}

// ---- taking ----------------------------------------------------------------------------------------------------

/// `k` calls for `batch` messages each, as far as a quarter of the ready ones goes.
fn take(w: &mut World, k: usize, batch: usize) -> (usize, Duration) {
    let calls = k.min((w.n / 8 / batch).max(1));
    let mut taken = vec![Taken::default(); calls * batch];
    let at = w.at;
    let (mut arena, fx) = w.open();
    // The present's end of a lease is later than nearly all others'.
    let lease = lease(NOW.mono_us + 2 * HOUR_US);
    let took = time(|| {
        for some in taken.chunks_mut(batch) {
            assert_eq!(arena.take(at, lease, NOW, some, fx), batch);
        }
    });
    w.ready_again(&taken);
    (calls, took)
}

fn taken_of((msg_id, lease_id): (i64, i64)) -> Taken {
    Taken { msg_id, lease_id, tid: row(msg_id).tid, count: 1, ..Taken::default() }
}

fn settle(w: &mut World, k: usize) -> (usize, Duration) {
    let (at, leased) = (w.at, w.leased(k));
    let (mut arena, fx) = w.open();
    let took = time(|| {
        for one in &leased {
            black_box(arena.settle(at, taken_of(*one), row(one.0), NOW, fx));
        }
    });
    (k, took)
}

fn settle_not_due(w: &mut World, k: usize) -> (usize, Duration) {
    let due_us = NOW.wall_us + HOUR_US;
    on_leased(w, k, |arena, at, (msg_id, lease_id), fx| {
        arena.settle(at, taken_of((msg_id, lease_id)), row_due(msg_id, due_us), NOW, fx);
    })
}

/// Something done to leased messages, which are leased again afterwards.
fn on_leased(
    w: &mut World,
    k: usize,
    mut f: impl FnMut(&mut queue_dispatch::Arena, QueueRef, (i64, i64), &mut Effects),
) -> (usize, Duration) {
    let (at, leased) = (w.at, w.leased(k));
    let (mut arena, fx) = w.open();
    let took = time(|| leased.iter().for_each(|one| f(&mut arena, at, *one, fx)));
    leased.iter().for_each(|one| w.lease_again(one.0));
    (k, took)
}

fn lease_commit(w: &mut World, k: usize) -> (usize, Duration) {
    let (at, leased) = (w.at, w.leased(k));
    let (mut arena, _) = w.open();
    (k, time(|| leased.iter().for_each(|(msg_id, lease_id)| arena.lease_commit(at, *msg_id, *lease_id))))
}

fn lease_return(w: &mut World, k: usize) -> (usize, Duration) {
    on_leased(w, k, |arena, at, (msg_id, lease_id), fx| arena.lease_return(at, msg_id, lease_id, NOW, fx))
}

fn drop_taken(w: &mut World, k: usize) -> (usize, Duration) {
    on_leased(w, k, |arena, at, one, fx| arena.drop_taken(at, taken_of(one), fx))
}

/// Whoever lengthens a lease now makes it end later than nearly all others.
fn extend(w: &mut World, k: usize) -> (usize, Duration) {
    let until_us = NOW.mono_us + 3 * HOUR_US;
    on_leased(w, k, |arena, at, (msg_id, lease_id), fx| {
        black_box(arena.extend(at, msg_id, Fence::Lease(lease_id), until_us, NOW, fx));
    })
}

fn shorten(w: &mut World, k: usize) -> (usize, Duration) {
    let until_us = NOW.mono_us + HOUR_US / 2;
    on_leased(w, k, |arena, at, (msg_id, lease_id), fx| arena.shorten(at, msg_id, lease_id, until_us, fx))
}

// ---- finishing -------------------------------------------------------------------------------------------------

fn pin_all(w: &mut World, leased: &[(i64, i64)]) -> Duration {
    let at = w.at;
    let (mut arena, fx) = w.open();
    time(|| {
        for (msg_id, lease_id) in leased {
            black_box(arena.pin(at, *msg_id, Fence::Lease(*lease_id), BACKEND, NOW, fx));
        }
    })
}

fn unpin_all(w: &mut World, leased: &[(i64, i64)]) -> Duration {
    let at = w.at;
    let (mut arena, fx) = w.open();
    time(|| leased.iter().for_each(|(msg_id, _)| arena.pin_undo(at, *msg_id, BACKEND, NOW, fx)))
}

fn pin(w: &mut World, k: usize) -> (usize, Duration) {
    let leased = w.leased(k);
    let took = pin_all(w, &leased);
    unpin_all(w, &leased);
    (k, took)
}

fn pin_undo(w: &mut World, k: usize) -> (usize, Duration) {
    let leased = w.leased(k);
    pin_all(w, &leased);
    (k, unpin_all(w, &leased))
}

/// What a pin leads to, the pins not timed.
fn on_pinned(
    w: &mut World,
    k: usize,
    mut f: impl FnMut(&mut queue_dispatch::Arena, QueueRef, i64, &mut Effects),
) -> (usize, Duration) {
    let (at, leased) = (w.at, w.leased(k));
    pin_all(w, &leased);
    let (mut arena, fx) = w.open();
    let took = time(|| leased.iter().for_each(|(msg_id, _)| f(&mut arena, at, *msg_id, fx)));
    leased.iter().for_each(|one| w.lease_again(one.0));
    (k, took)
}

fn pin_finish(w: &mut World, k: usize) -> (usize, Duration) {
    on_pinned(w, k, |arena, at, msg_id, fx| arena.pin_finish(at, msg_id, BACKEND, fx))
}

fn pin_release(w: &mut World, k: usize) -> (usize, Duration) {
    on_pinned(w, k, |arena, at, msg_id, fx| arena.pin_release(at, msg_id, BACKEND, fx))
}

fn pin_refile(w: &mut World, k: usize, visible_at_us: i64) -> (usize, Duration) {
    let measured = on_pinned(w, k, |arena, at, msg_id, fx| {
        arena.pin_refile(at, row_due(msg_id, visible_at_us), BACKEND, NOW, fx);
    });
    let at = w.at;
    let (mut arena, fx) = w.open();
    // What lies beyond the horizon is on the queue's mind: a scan that finds nothing clears it.
    let soon = Now { wall_us: visible_at_us, ..NOW };
    if let queue_dispatch::ScanStart::Range { until_us, .. } = arena.scan_begin(at, BACKEND, soon) {
        arena.scan_end(at, BACKEND, until_us.min(HORIZON_US), queue_dispatch::NEVER_US, NOW, fx);
    }
    measured
}

/// By id, without a lease: out of the ready tree and gone.
fn finish_ready(w: &mut World, k: usize) -> (usize, Duration) {
    let (at, ids) = (w.at, w.ready(k));
    let (mut arena, fx) = w.open();
    let took = time(|| ids.iter().for_each(|id| remove(&mut arena, at, *id, fx)));
    ids.iter().for_each(|id| arena.publish(at, row(*id), Change::Insert, NOW, fx));
    (k, took)
}

// ---- the worker's ----------------------------------------------------------------------------------------------

/// Timers that are due, each of them a lease that ends.
fn promote(w: &mut World, k: usize) -> (usize, Duration) {
    let k = k.min(CHUNK_MAX);
    let (at, leased) = (w.at, w.leased(k));
    let (mut arena, fx) = w.open();
    for (msg_id, lease_id) in &leased {
        arena.shorten(at, *msg_id, *lease_id, NOW.mono_us, fx);
    }
    let took = time(|| seen(arena.tick(DATABASE, 0, NOW, fx)));
    leased.iter().for_each(|one| w.lease_again(one.0));
    (k, took)
}

fn tick_idle(w: &mut World, k: usize) -> (usize, Duration) {
    let (mut arena, fx) = w.open();
    (k, time(|| (0..k).for_each(|_| seen(arena.tick(DATABASE, 0, NOW, fx)))))
}

fn load(w: &mut World, ids: &[i64]) -> Duration {
    let at = w.at;
    let (mut arena, fx) = w.open();
    arena.queue_mark(at, 0, &mut Effects::new()); // it wakes the worker
    assert!(matches!(arena.load_begin(at, WORKER), LoadStart::From(0)));
    let took = time(|| {
        for id in ids {
            assert_eq!(arena.load_row(at, row(*id), NOW, fx), LoadRow::Known);
        }
    });
    arena.load_end(at, WORKER, NO_MARK, fx);
    took
}

fn load_row(w: &mut World, k: usize) -> (usize, Duration) {
    let ids = w.between(k);
    let took = load(w, &ids);
    w.remove_all(&ids);
    (k, took)
}

fn load_row_tracked(w: &mut World, k: usize) -> (usize, Duration) {
    let ids = w.ready(k);
    (k, load(w, &ids))
}

fn exhausted_pin(w: &mut World, _: usize) -> (usize, Duration) {
    let graves = w.graves;
    let mut pinned = [Taken::default(); 100];
    let (mut arena, fx) = w.open();
    let took = time(|| assert_eq!(arena.exhausted_pin(graves, i64::MIN, BACKEND, &mut pinned, fx).0, 100));
    let mut unused = Effects::new(); // it wakes the worker
    pinned.iter().for_each(|one| arena.pin_undo(graves, one.msg_id, BACKEND, NOW, &mut unused));
    (1, took)
}

// ---- looking ---------------------------------------------------------------------------------------------------

fn view(w: &mut World, k: usize) -> (usize, Duration) {
    let (at, ids) = (w.at, w.ready(k));
    let (arena, _) = w.open();
    (k, time(|| ids.iter().for_each(|id| seen(arena.view(at, *id)))))
}

fn lengths(w: &mut World, k: usize) -> (usize, Duration) {
    let at = w.at;
    let (arena, _) = w.open();
    (k, time(|| (0..k).for_each(|_| seen(arena.lengths(black_box(at))))))
}

fn next_event(w: &mut World, k: usize) -> (usize, Duration) {
    let at = w.at;
    let (arena, _) = w.open();
    (k, time(|| (0..k).for_each(|_| seen(arena.next_event_us(black_box(at), NOW)))))
}

fn lease_id_next(w: &mut World, k: usize) -> (usize, Duration) {
    let (mut arena, _) = w.open();
    (k, time(|| (0..k).for_each(|_| seen(arena.lease_id_next()))))
}

// ---- a full arena ----------------------------------------------------------------------------------------------

/// An arena without a free slot: one queue has them all.
struct Full {
    memory: Memory,
    hog: QueueRef,
    other: QueueRef,
}

impl Full {
    fn new(n: usize) -> Full {
        let mut memory = Memory::new(4, n, BACKENDS, Config { slots_min: 0, window: u32::MAX }, 1);
        let (mut arena, mut fx) = (memory.arena(), Effects::new());
        let (hog, other) = (attach(&mut arena, 1, &mut fx), attach(&mut arena, 2, &mut fx));
        scatter_free_slots(&mut arena, hog, n, &mut Random(1), &mut fx);
        let ids = 0..n as i64;
        ids.for_each(|msg_id| arena.publish(hog, row(msg_id), Change::Insert, NOW, &mut fx));
        assert_eq!(arena.slots_free(), 0);
        Full { memory, hog, other }
    }

    fn evict(&mut self, k: usize) -> (usize, Duration) {
        let (hog, other) = (self.hog, self.other);
        let (mut arena, mut fx) = (self.memory.arena(), Effects::new());
        let took = time(|| {
            (0..k).for_each(|id| arena.publish(other, row(id as i64), Change::Insert, NOW, &mut fx));
        });
        assert_eq!(arena.slots_free(), 0);
        assert_eq!(arena.lengths(other), Some([k as u32, 0, 0, 0, 0]));
        (0..k).for_each(|id| remove(&mut arena, other, id as i64, &mut fx));
        // What was evicted comes in again as a load would bring it.
        let LoadStart::From(mark) = arena.load_begin(hog, WORKER) else { unreachable!("a mark") };
        for id in mark..mark + k as i64 {
            assert_eq!(arena.load_row(hog, row(id), NOW, &mut fx), LoadRow::Known);
        }
        arena.load_end(hog, WORKER, NO_MARK, &mut fx);
        all_loaded_is_noted(&mut arena, other, &mut fx);
        (k, took)
    }
}

/// The other queue has no mark either.
fn all_loaded_is_noted(arena: &mut queue_dispatch::Arena, at: QueueRef, fx: &mut Effects) {
    if arena.load_needed(at) {
        all_loaded(arena, at, fx);
    }
}
