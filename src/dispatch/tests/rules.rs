//! One test for each rule of PROTOCOL.md that lives in this crate. Backends are numbers, time is an argument.

mod common;

use std::collections::HashSet;

use common::Memory;
use queue_dispatch::{
    backoff_us, Arena, Change, Config, Effects, Fence, Lease, LeaseRow, LeaseWalk, LoadRow, LoadStart, Now,
    Pin, Policy, QueueRef, Restore, Row, RowFate, ScanStart, Settled, State, Taken, Tick, Tid, Written,
    CHUNK_MAX, EFFECTS_MAX, NEVER_US, NIL, NO_MARK, SWEEP_US,
};

const SECOND_US: i64 = 1_000_000;
const WALL_US: i64 = 800_000_000 * SECOND_US;
const DATABASE: u32 = 1;
const WORKER: u32 = 40;

struct Desk {
    memory: Memory,
    now: Now,
    fx: Effects,
    queue: QueueRef,
}

impl Desk {
    /// One queue (relation 100), loaded: nothing in the heap.
    fn new(slots: usize, slots_min: u32, window: u32) -> Desk {
        let memory = Memory::new(4, slots, 48, Config { slots_min, window }, 42);
        let now = Now { mono_us: 1000 * SECOND_US, wall_us: WALL_US };
        let queue = QueueRef { epoch: 0, generation: 0, index: 0 };
        let mut desk = Desk { memory, now, fx: Effects::new(), queue };
        desk.queue = desk.attach(100);
        desk
    }

    fn attach(&mut self, relation: u32) -> QueueRef {
        let now = self.now;
        let mut arena = self.memory.arena();
        let queue = arena.queue_attach(DATABASE, relation, now.wall_us).unwrap();
        assert!(arena.queue_configure(queue, 0, Policy { retry_jitter: 0.0, ..Policy::DEFAULT }));
        assert_eq!(arena.restore_begin(queue, 0), queue_dispatch::Restore::Begun);
        arena.restore_end(queue, 0, &mut queue_dispatch::Effects::new());
        assert_eq!(arena.load_begin(queue, 0), LoadStart::From(i64::MIN));
        arena.load_end(queue, 0, NO_MARK, &mut Effects::new());
        queue
    }

    fn arena(&mut self) -> Arena<'_> {
        self.memory.arena()
    }

    fn pass(&mut self, us: i64) {
        self.now = Now { mono_us: self.now.mono_us + us, wall_us: self.now.wall_us + us };
    }

    /// The latches asked for since the last call.
    fn woken(&mut self) -> Vec<u32> {
        let fx = std::mem::take(&mut self.fx);
        fx.procs().to_vec()
    }

    fn publish(&mut self, msg_id: i64) {
        self.publish_row(row(msg_id), Change::Insert);
    }

    fn publish_row(&mut self, row: Row, change: Change) {
        self.memory.arena().publish(self.queue, row, change, self.now, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    fn take(&mut self, most: usize) -> Vec<Taken> {
        let lease = Lease { until_us: self.now.mono_us + 30 * SECOND_US, pid: 11, lxid: 1, flush_us: NEVER_US };
        let mut out = vec![Taken::default(); most];
        let taken = self.memory.arena().take(self.queue, lease, self.now, &mut out, &mut self.fx);
        out.truncate(taken);
        self.memory.arena().check().unwrap();
        out
    }

    fn take_one(&mut self) -> Taken {
        self.take(1)[0]
    }

    fn settle(&mut self, taken: Taken, row: Row) -> Settled {
        self.memory.arena().settle(self.queue, taken, row, self.now, &mut self.fx)
    }

    fn pin(&mut self, msg_id: i64, fence: Fence, owner: u32) -> Pin {
        self.memory.arena().pin(self.queue, msg_id, fence, owner, self.now, &mut self.fx)
    }

    fn undo(&mut self, msg_id: i64, owner: u32) {
        self.memory.arena().pin_undo(self.queue, msg_id, owner, self.now, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    fn finish(&mut self, msg_id: i64, owner: u32) {
        self.memory.arena().pin_finish(self.queue, msg_id, owner, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    fn give_back(&mut self, taken: Taken) {
        let Taken { msg_id, lease_id, .. } = taken;
        self.memory.arena().lease_return(self.queue, msg_id, lease_id, self.now, &mut self.fx);
    }

    fn state(&mut self, msg_id: i64) -> Option<State> {
        let queue = self.queue;
        self.arena().view(queue, msg_id).map(|view| view.state)
    }

    fn wait(&mut self, proc: u32) {
        self.memory.arena().wait_begin(proc, &[self.queue], &mut self.fx);
    }

    fn leave(&mut self, proc: u32) {
        self.memory.arena().wait_end(proc, &mut self.fx);
    }

    fn mark(&mut self) -> i64 {
        let queue = self.queue;
        self.arena().check_bounds(queue).unwrap().mark
    }

    fn reconfigure(&mut self, policy: Policy) {
        self.memory.arena().queue_reconfigure(self.queue, policy, &mut self.fx);
    }

    fn load_row(&mut self, row: Row) -> LoadRow {
        self.memory.arena().load_row(self.queue, row, self.now, &mut self.fx)
    }
}

fn row(msg_id: i64) -> Row {
    Row { msg_id, tid: Tid { block: msg_id as u32, offset: 1 }, visible_at_us: None, count: 0 }
}

fn due(msg_id: i64, in_us: i64) -> Row {
    Row { visible_at_us: Some(WALL_US + in_us), ..row(msg_id) }
}

// ---- publish and take --------------------------------------------------------------------------------------

#[test]
fn take_several_ready_gives_lowest_ids_first() {
    let mut d = Desk::new(16, 2, 8);
    for id in [5, 2, 9, 7] {
        d.publish(id);
    }
    let ids: Vec<i64> = d.take(3).iter().map(|taken| taken.msg_id).collect();
    assert_eq!(ids, [2, 5, 7]);
}

#[test]
fn take_leased_message_gives_nothing_until_the_lease_ends() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let first = d.take_one();
    assert!(d.take(1).is_empty());
    d.pass(30 * SECOND_US);
    let second = d.take_one();
    assert_eq!((second.msg_id, second.count), (1, 2));
    assert_ne!(first.lease_id, second.lease_id);
    assert_eq!(d.settle(first, row(1)), Settled::Withdrawn);
    assert_eq!(d.settle(second, row(1)), Settled::Deliver(2));
}

#[test]
fn take_across_epochs_never_repeats_a_lease_id() {
    let mut d = Desk::new(16, 2, 8);
    let mut seen = HashSet::new();
    for round in 0..50 {
        for _ in 0..10 {
            assert!(seen.insert(d.arena().lease_id_next()));
        }
        // The same seed each time: the new epoch must still differ from the last.
        let mut fx = Effects::new();
        d.arena().reset(Config { slots_min: 2, window: 8 }, round / 25, &mut fx);
        let last = *seen.iter().max().unwrap();
        d.arena().lease_id_avoid(last);
        let next = d.arena().lease_id_next();
        assert_ne!(next >> 32, last >> 32);
        seen.clear(); // what is persisted is what counts
    }
}

#[test]
fn take_paused_queue_gives_nothing_and_resuming_wakes() {
    let mut d = Desk::new(16, 2, 8);
    d.reconfigure(Policy { paused: true, ..Policy::DEFAULT });
    d.wait(3);
    d.publish(1);
    assert!(d.take(1).is_empty());
    assert!(d.woken().is_empty());
    d.reconfigure(Policy::DEFAULT);
    assert_eq!(d.woken(), [3]);
    assert_eq!(d.take_one().msg_id, 1);
}

#[test]
fn take_front_of_exhausted_messages_still_finds_the_ready_one() {
    let mut d = Desk::new(64, 2, 64);
    for id in 0..20 {
        d.publish_row(Row { count: 2, ..row(id) }, Change::Insert);
    }
    d.publish(99);
    d.reconfigure(Policy { max_deliveries: 2, ..Policy::DEFAULT });
    assert_eq!(d.take_one().msg_id, 99);
    let queue = d.queue;
    assert_eq!(d.arena().lengths(queue), Some([0, 0, 1, 20, 0]));
}

#[test]
fn publish_delayed_message_is_taken_when_due_and_not_before() {
    let mut d = Desk::new(64, 8, 8);
    d.publish_row(due(1, 2 * SECOND_US), Change::Insert);
    assert!(d.take(1).is_empty());
    let (queue, now) = (d.queue, d.now);
    assert_eq!(d.arena().next_event_us(queue, now), now.mono_us + 2 * SECOND_US);
    let ScanStart::Range { after_us, until_us } = d.arena().scan_begin(queue, 2, now) else { panic!() };
    assert!(after_us < WALL_US + 2 * SECOND_US && until_us >= WALL_US + 2 * SECOND_US);
    assert_eq!(d.load_row(due(1, 2 * SECOND_US)), LoadRow::Known);
    d.memory.arena().scan_end(queue, 2, until_us, NEVER_US, now, &mut d.fx);
    assert_eq!(d.state(1), Some(State::Delayed));
    d.pass(2 * SECOND_US - 1);
    assert!(d.take(1).is_empty());
    d.pass(1);
    assert_eq!(d.take_one().msg_id, 1);
}

#[test]
fn next_event_names_what_is_ready_a_lease_and_nothing() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    assert_eq!(d.arena().next_event_us(queue, now), NEVER_US);
    d.publish(1);
    assert_eq!(d.arena().next_event_us(queue, now), now.mono_us);
    d.take_one();
    assert_eq!(d.arena().next_event_us(queue, now), now.mono_us + 30 * SECOND_US);
    d.publish(2);
    d.reconfigure(Policy { paused: true, ..Policy::DEFAULT });
    assert!(d.arena().is_paused(queue));
    assert_eq!(d.arena().next_event_us(queue, now), NEVER_US);
}

#[test]
fn publish_far_future_message_costs_no_slot() {
    let mut d = Desk::new(16, 2, 8);
    for id in 0..100 {
        d.publish_row(due(id, 3600 * SECOND_US), Change::Insert);
    }
    assert_eq!(d.arena().slots_free(), 16);
    let (queue, now) = (d.queue, d.now);
    assert_eq!(d.arena().scan_begin(queue, 2, now), ScanStart::Nothing);
    d.pass(3600 * SECOND_US);
    let now = d.now;
    assert!(d.arena().scan_needed(queue, now));
}

#[test]
fn publish_late_update_never_puts_a_message_off() {
    let mut d = Desk::new(16, 2, 8);
    // Two updates of one row, published in the wrong order: "at once" is the later truth.
    d.publish_row(row(1), Change::Update);
    d.publish_row(due(1, 3600 * SECOND_US), Change::Update);
    assert_eq!(d.take_one().msg_id, 1);
}

#[test]
fn settle_row_not_due_puts_it_off_uncounted() {
    let mut d = Desk::new(64, 2, 8);
    d.publish(1);
    let taken = d.take_one();
    assert_eq!(d.settle(taken, due(1, 3600 * SECOND_US)), Settled::Withdrawn);
    assert_eq!(d.state(1), None);
    let bounds = {
        let queue = d.queue;
        d.arena().check_bounds(queue).unwrap()
    };
    assert_eq!(bounds.beyond_us, WALL_US + 3600 * SECOND_US);
}

#[test]
fn settle_row_not_due_with_unwritten_count_keeps_its_slot() {
    let mut d = Desk::new(64, 2, 8);
    d.publish(1);
    d.take_one();
    d.pass(30 * SECOND_US);
    let second = d.take_one();
    assert_eq!(d.settle(second, due(1, 3600 * SECOND_US)), Settled::Withdrawn);
    let queue = d.queue;
    let view = d.arena().view(queue, 1).unwrap();
    assert_eq!((view.state, view.count), (State::Delayed, 1));
}

#[test]
fn settle_old_snapshot_after_a_newer_update_stays_ready() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_one();
    d.publish_row(row(1), Change::Update); // commits "at once" after the reader's snapshot ...
    assert_eq!(d.settle(taken, due(1, 3600 * SECOND_US)), Settled::Withdrawn); // ... which says "later"
    assert_eq!(d.state(1), Some(State::Ready));
}

#[test]
fn settle_row_with_higher_count_raises_the_slot() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_one();
    assert_eq!(d.settle(taken, Row { count: 4, ..row(1) }), Settled::Deliver(5));
}

#[test]
fn settle_row_that_had_its_last_delivery_exhausts_it() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_one();
    assert_eq!(d.settle(taken, Row { count: 20, ..row(1) }), Settled::Withdrawn);
    assert_eq!(d.state(1), Some(State::Exhausted));
}

#[test]
fn drop_taken_after_a_new_insert_of_the_id_keeps_it() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_one();
    d.publish(1); // deleted and inserted anew by plain SQL after the reader's snapshot
    d.memory.arena().drop_taken(d.queue, taken, &mut d.fx);
    assert_eq!(d.state(1), Some(State::Ready));
    let taken = d.take_one();
    d.memory.arena().drop_taken(d.queue, taken, &mut d.fx);
    assert_eq!(d.state(1), None);
}

#[test]
fn lease_return_first_time_is_ready_at_once_second_time_waits() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let first = d.take_one();
    d.give_back(first);
    assert_eq!(d.state(1), Some(State::Ready));
    let second = d.take_one();
    assert_eq!((second.count, first.was_returned, second.was_returned), (2, false, true));
    d.give_back(second);
    assert_eq!(d.state(1), Some(State::Delayed));
    d.pass(SECOND_US - 1);
    assert!(d.take(1).is_empty());
    d.pass(1);
    let third = d.take_one();
    assert!(third.was_returned);
    let (queue, Taken { msg_id, lease_id, .. }) = (d.queue, third);
    d.arena().lease_commit(queue, msg_id, lease_id);
    d.pass(30 * SECOND_US);
    let fourth = d.take_one();
    d.give_back(fourth);
    assert_eq!(d.state(1), Some(State::Ready), "a committed read ends the row of returns");
}

#[test]
fn lease_return_of_the_last_delivery_exhausts() {
    let mut d = Desk::new(16, 2, 8);
    d.reconfigure(Policy { max_deliveries: 1, ..Policy::DEFAULT });
    d.publish(1);
    let taken = d.take_one();
    d.give_back(taken);
    assert_eq!(d.state(1), Some(State::Exhausted));
}

#[test]
fn lease_return_while_another_session_pins_takes_effect_at_undo() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_one();
    assert!(matches!(d.pin(1, Fence::Lease(taken.lease_id), 5), Pin::Done(_)));
    d.give_back(taken);
    assert_eq!(d.state(1), Some(State::Pinned));
    d.undo(1, 5);
    assert_eq!(d.state(1), Some(State::Ready));
}

#[test]
fn publish_leased_message_that_a_load_found_first_is_leased() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    d.publish(1);
    let lease_id = d.arena().lease_id_next();
    let lease = Lease { until_us: now.mono_us + SECOND_US, pid: 1, lxid: 1, flush_us: NEVER_US };
    let mut fx = Effects::new();
    d.arena().publish_leased(queue, row(1), lease_id, lease, now, &mut fx);
    assert!(d.take(1).is_empty());
    let view = d.arena().view(queue, 1).unwrap();
    assert_eq!((view.state, view.lease_id, view.count), (State::Leased, lease_id, 1));
}

/// A sender has read its own message; before it commits, another transaction names the id, finds nothing, and goes on.
fn named_before_it_was_there() -> (Desk, i64) {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    assert!(matches!(d.pin(7, Fence::Any, 5), Pin::Done(_)));
    let lease_id = d.arena().lease_id_next();
    let lease = Lease { until_us: now.mono_us + SECOND_US, pid: 1, lxid: 1, flush_us: NEVER_US };
    d.memory.arena().publish_leased(queue, row(7), lease_id, lease, now, &mut d.fx);
    d.arena().check().unwrap();
    assert!(d.take(1).is_empty());
    (d, lease_id)
}

#[test]
fn publish_leased_message_that_another_named_before_keeps_its_lease_when_that_commits() {
    let (mut d, lease_id) = named_before_it_was_there();
    d.finish(7, 5);
    assert!(d.take(1).is_empty(), "it is leased");
    assert!(matches!(d.pin(7, Fence::Lease(lease_id), 6), Pin::Done(_)));
    d.undo(7, 6);
    d.pass(2 * SECOND_US);
    assert_eq!(d.take_one().count, 2, "it is not lost, and its first delivery counts");
}

#[test]
fn publish_leased_message_that_another_named_before_keeps_its_lease_when_that_rolls_back() {
    let (mut d, lease_id) = named_before_it_was_there();
    d.undo(7, 5);
    assert!(d.take(1).is_empty(), "it is leased");
    assert!(matches!(d.pin(7, Fence::Lease(lease_id), 6), Pin::Done(_)));
}

// ---- finish and retry --------------------------------------------------------------------------------------

#[test]
fn pin_lost_lease_is_refused() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let first = d.take_one();
    d.pass(30 * SECOND_US);
    assert_eq!(d.pin(1, Fence::Lease(first.lease_id), 5), Pin::Lost);
    let second = d.take_one();
    assert_eq!(d.pin(1, Fence::Lease(first.lease_id), 5), Pin::Lost);
    assert_eq!(d.pin(1, Fence::NotLeased, 5), Pin::Lost);
    assert!(matches!(d.pin(1, Fence::Lease(second.lease_id), 5), Pin::Done(_)));
    assert_eq!(d.pin(1, Fence::Any, 6), Pin::Busy);
    assert_eq!(d.pin(2, Fence::Lease(second.lease_id), 5), Pin::Lost);
}

#[test]
fn pin_neither_expires_nor_is_taken_however_late_the_commit() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_one();
    d.pin(1, Fence::Lease(taken.lease_id), 5);
    d.pass(3600 * SECOND_US);
    assert!(d.take(1).is_empty());
    d.finish(1, 6);
    assert_eq!(d.state(1), Some(State::Pinned), "another backend's pin");
    d.finish(1, 5);
    assert_eq!(d.state(1), None);
    assert_eq!(d.arena().slots_free(), 16);
}

#[test]
fn pin_undo_restores_the_original_deadline() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_one();
    d.pin(1, Fence::Lease(taken.lease_id), 5);
    d.pass(10 * SECOND_US);
    d.undo(1, 5);
    assert_eq!(d.state(1), Some(State::Leased));
    d.pass(20 * SECOND_US);
    assert_eq!(d.take_one().count, 2);
}

#[test]
fn pin_undo_past_the_deadline_is_ready_and_counted() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_one();
    d.pin(1, Fence::Lease(taken.lease_id), 5);
    d.pass(31 * SECOND_US);
    d.undo(1, 5);
    assert_eq!(d.state(1), Some(State::Ready));
    assert_eq!(d.take_one().count, 2);
}

#[test]
fn pin_untracked_message_gets_a_slot_and_undo_leaves_it_ready() {
    let mut d = Desk::new(16, 2, 8);
    assert!(matches!(d.pin(7, Fence::Any, 5), Pin::Done(_)));
    d.undo(7, 5);
    assert_eq!(d.take_one().msg_id, 7);
}

#[test]
fn pin_undo_of_untracked_beyond_the_window_lowers_the_mark() {
    let mut d = Desk::new(16, 2, 2);
    d.publish(1);
    d.publish(2);
    d.pin(7, Fence::Any, 5);
    d.undo(7, 5);
    assert_eq!((d.state(7), d.mark()), (None, 7));
}

#[test]
fn pin_drop_of_an_id_that_commits_meanwhile_keeps_it() {
    let mut d = Desk::new(16, 2, 8);
    d.pin(7, Fence::Any, 5); // finds no row: its sender has not committed
    d.publish(7);
    d.memory.arena().pin_drop(d.queue, 7, 5, &mut d.fx);
    assert_eq!(d.take_one().msg_id, 7);
}

#[test]
fn pin_refile_after_a_newer_update_is_ready() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    d.pin(1, Fence::Any, 5);
    d.publish_row(row(1), Change::Update);
    d.memory.arena().pin_refile(d.queue, due(1, 3600 * SECOND_US), 5, d.now, &mut d.fx);
    assert_eq!(d.state(1), Some(State::Ready));
}

#[test]
fn pin_refile_near_waits_and_far_is_let_go() {
    let mut d = Desk::new(64, 2, 8);
    d.publish(1);
    d.pin(1, Fence::Any, 5);
    d.memory.arena().pin_refile(d.queue, due(1, 3600 * SECOND_US), 5, d.now, &mut d.fx);
    assert_eq!(d.state(1), None);
    d.publish(2);
    d.pin(2, Fence::Any, 5);
    d.memory.arena().pin_refile(d.queue, Row { count: 1, ..row(2) }, 5, d.now, &mut d.fx);
    assert_eq!(d.take_one().count, 2);
}

#[test]
fn pin_release_is_ready_and_not_counted() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_one();
    d.pin(1, Fence::Lease(taken.lease_id), 5);
    d.memory.arena().pin_release(d.queue, 1, 5, &mut d.fx);
    assert_eq!(d.take_one().count, 1);
}

#[test]
fn extend_lengthens_at_once_and_never_shortens() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let Taken { lease_id, .. } = d.take_one();
    let (queue, now) = (d.queue, d.now);
    let mut fx = Effects::new();
    let fence = Fence::Lease(lease_id);
    let end_us = now.mono_us + 60 * SECOND_US;
    assert_eq!(d.arena().extend(queue, 1, fence, end_us, now, &mut fx), Some((end_us, lease_id)));
    assert_eq!(d.arena().extend(queue, 1, fence, now.mono_us, now, &mut fx), Some((end_us, lease_id)));
    assert_eq!(d.arena().extend(queue, 1, Fence::Lease(1), end_us, now, &mut fx), None);
    d.pass(59 * SECOND_US);
    assert!(d.take(1).is_empty());
    d.memory.arena().shorten(queue, 1, lease_id, d.now.mono_us, &mut fx);
    assert_eq!(d.take_one().count, 2);
    let now = d.now;
    assert_eq!(d.arena().extend(queue, 1, fence, now.mono_us + SECOND_US, now, &mut fx), None);
}

#[test]
fn extend_pinned_lease_counts_when_the_pin_is_undone() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let Taken { lease_id, .. } = d.take_one();
    d.pin(1, Fence::Lease(lease_id), 5);
    let (queue, now) = (d.queue, d.now);
    let end_us = now.mono_us + 90 * SECOND_US;
    let extended = d.memory.arena().extend(queue, 1, Fence::Lease(lease_id), end_us, now, &mut d.fx);
    assert_eq!(extended, Some((end_us, lease_id)));
    d.pass(80 * SECOND_US);
    d.undo(1, 5);
    assert_eq!(d.state(1), Some(State::Leased));
}

#[test]
fn exhausted_pin_after_the_limit_was_raised_makes_ready_again() {
    let mut d = Desk::new(16, 2, 8);
    d.publish_row(Row { count: 20, ..row(1) }, Change::Insert);
    assert_eq!(d.state(1), Some(State::Exhausted));
    let (queue, mut out) = (d.queue, [Taken::default(); 4]);
    assert_eq!(d.memory.arena().exhausted_pin(queue, i64::MIN, WORKER, &mut out, &mut d.fx), (1, None));
    d.undo(1, WORKER);
    d.reconfigure(Policy { max_deliveries: 0, ..Policy::DEFAULT });
    assert_eq!(d.memory.arena().exhausted_pin(queue, i64::MIN, WORKER, &mut out, &mut d.fx), (0, None));
    assert_eq!(d.take_one().msg_id, 1);
}

#[test]
fn exhausted_pin_goes_on_behind_what_could_not_be_moved() {
    let mut d = Desk::new(64, 2, 32);
    for id in [7, 1, 5, 9, 3, i64::MIN] {
        d.publish_row(Row { count: 20, ..row(id) }, Change::Insert);
    }
    let queue = d.queue;
    let (mut from, mut turn) = (Some(i64::MIN), Vec::new());
    while let Some(id) = from {
        let mut out = [Taken::default(); 2];
        let (pinned, next) = d.memory.arena().exhausted_pin(queue, id, WORKER, &mut out, &mut d.fx);
        assert_eq!(d.arena().lengths(queue), Some([0, 0, 0, 6 - pinned as u32, pinned as u32]));
        assert_eq!(d.memory.arena().exhausted_pin(queue, id, WORKER, &mut [], &mut d.fx), (0, Some(id)));
        for one in &out[..pinned] {
            turn.push(one.msg_id);
            d.undo(one.msg_id, WORKER); // it could not be moved
        }
        d.arena().check().unwrap();
        from = next;
    }
    assert_eq!(turn, [i64::MIN, 1, 3, 5, 7, 9]);
    // In the next turn they come again, and one that is pinned by somebody else is passed by.
    d.pin(3, Fence::Any, 5);
    let mut out = [Taken::default(); 8];
    assert_eq!(d.memory.arena().exhausted_pin(queue, 2, WORKER, &mut out, &mut d.fx), (3, None));
    assert_eq!(out[..3].iter().map(|one| one.msg_id).collect::<Vec<_>>(), [5, 7, 9]);
}

// ---- load --------------------------------------------------------------------------------------------------

#[test]
fn publish_at_or_above_the_mark_inserts_nothing_and_wakes_one() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.memory.arena().queue_mark(queue, 10, &mut d.fx);
    d.wait(3);
    d.wait(4);
    d.woken();
    d.publish(10);
    d.publish(11);
    assert_eq!((d.state(10), d.woken()), (None, vec![3]));
    d.publish(9);
    assert_eq!((d.state(9), d.woken()), (Some(State::Ready), vec![4]));
}

#[test]
fn publish_during_a_load_without_room_is_loaded_again() {
    let mut d = Desk::new(16, 2, 2);
    let queue = d.queue;
    d.memory.arena().queue_mark(queue, 10, &mut d.fx);
    assert_eq!(d.arena().load_begin(queue, 2), LoadStart::From(10));
    assert_eq!(d.arena().load_begin(queue, 3), LoadStart::Busy);
    // After the load's snapshot: the walk does not see these.
    d.publish(20);
    d.publish(21);
    d.publish(15);
    d.memory.arena().load_end(queue, 3, NO_MARK, &mut d.fx);
    assert_eq!(d.mark(), 10, "not the loader");
    d.memory.arena().load_end(queue, 2, NO_MARK, &mut d.fx);
    assert_eq!(d.mark(), 15);
}

#[test]
fn load_without_room_stops_and_leaves_the_mark_there() {
    let mut d = Desk::new(16, 2, 2);
    let queue = d.queue;
    d.memory.arena().queue_mark(queue, 1, &mut d.fx);
    d.arena().load_begin(queue, 2);
    assert_eq!(d.load_row(row(1)), LoadRow::Known);
    assert_eq!(d.load_row(row(2)), LoadRow::Known);
    assert_eq!(d.load_row(row(3)), LoadRow::Full);
    d.memory.arena().load_end(queue, 2, 3, &mut d.fx);
    assert_eq!(d.mark(), 3);
    assert_eq!(d.arena().load_begin(queue, 2), LoadStart::Full);
    d.take(2);
    assert_eq!(d.arena().load_begin(queue, 2), LoadStart::From(3));
}

#[test]
fn load_of_rows_not_due_without_room_goes_on_to_those_that_are() {
    let mut d = Desk::new(8, 1, 4);
    let (queue, now) = (d.queue, d.now);
    d.publish_row(due(1, SECOND_US), Change::Insert); // raises the horizon
    let ScanStart::Range { until_us, .. } = d.arena().scan_begin(queue, 2, now) else { panic!() };
    d.memory.arena().scan_end(queue, 2, until_us, NEVER_US, now, &mut d.fx);
    d.memory.arena().queue_mark(queue, 2, &mut d.fx);
    d.arena().load_begin(queue, 2);
    for id in 2..12 {
        assert_eq!(d.load_row(due(id, 30 * SECOND_US)), LoadRow::Known);
    }
    assert_eq!(d.load_row(row(12)), LoadRow::Known);
    d.memory.arena().load_end(queue, 2, NO_MARK, &mut d.fx);
    assert_eq!(d.take_one().msg_id, 12);
    let bounds = d.arena().check_bounds(queue).unwrap();
    assert!(bounds.horizon_us < WALL_US + 30 * SECOND_US && bounds.beyond_us <= WALL_US + 30 * SECOND_US);
}

#[test]
fn load_abort_leaves_the_mark_where_the_load_began() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    d.memory.arena().queue_mark(queue, 10, &mut d.fx);
    d.arena().load_begin(queue, 2);
    d.load_row(row(10));
    d.wait(3);
    d.woken();
    d.memory.arena().load_abort(queue, 2, now, &mut d.fx);
    assert_eq!((d.mark(), d.woken()), (10, vec![3]));
}

#[test]
fn scan_abort_leaves_the_horizon_where_it_was() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    d.publish_row(due(1, SECOND_US), Change::Insert);
    let before = d.arena().check_bounds(queue).unwrap();
    assert!(matches!(d.arena().scan_begin(queue, 2, now), ScanStart::Range { .. }));
    assert_eq!(d.arena().scan_begin(queue, 3, now), ScanStart::Nothing);
    d.memory.arena().load_abort(queue, 2, now, &mut d.fx);
    let after = d.arena().check_bounds(queue).unwrap();
    assert_eq!((before.horizon_us, before.beyond_us), (after.horizon_us, after.beyond_us));
}

#[test]
fn publish_during_a_scan_without_room_lowers_the_horizon_at_its_end() {
    let mut d = Desk::new(8, 1, 1);
    let (queue, now) = (d.queue, d.now);
    d.publish_row(due(1, SECOND_US), Change::Insert);
    let ScanStart::Range { until_us, .. } = d.arena().scan_begin(queue, 2, now) else { panic!() };
    assert_eq!(d.load_row(due(1, SECOND_US)), LoadRow::Known);
    // After the scan's snapshot, and the window for delayed messages is full.
    d.publish_row(due(2, 20 * SECOND_US), Change::Insert);
    d.memory.arena().scan_end(queue, 2, until_us, NEVER_US, now, &mut d.fx);
    let bounds = d.arena().check_bounds(queue).unwrap();
    assert!(bounds.horizon_us < WALL_US + 20 * SECOND_US && bounds.beyond_us <= WALL_US + 20 * SECOND_US);
}

#[test]
fn load_row_changed_since_the_snapshot_is_not_put_off() {
    let mut d = Desk::new(16, 2, 1);
    let (queue, now) = (d.queue, d.now);
    d.publish_row(due(9, SECOND_US), Change::Insert); // raises the horizon
    let ScanStart::Range { until_us, .. } = d.arena().scan_begin(queue, 2, now) else { panic!() };
    d.memory.arena().scan_end(queue, 2, until_us, NEVER_US, now, &mut d.fx);
    d.memory.arena().queue_mark(queue, 1, &mut d.fx);
    d.arena().load_begin(queue, 2);
    d.publish(3);
    d.publish_row(row(5), Change::Update); // visible at once now, but there is no room
    assert_eq!(d.load_row(due(5, 30 * SECOND_US)), LoadRow::Known); // the old version
    d.memory.arena().load_end(queue, 2, NO_MARK, &mut d.fx);
    assert_eq!((d.state(5), d.mark()), (None, 5));
}

#[test]
fn take_under_a_quarter_of_the_window_asks_the_worker_once() {
    let mut d = Desk::new(16, 2, 3);
    let queue = d.queue;
    assert!(d.arena().worker_set(DATABASE, WORKER));
    d.publish(1);
    d.publish(2);
    d.memory.arena().queue_mark(queue, 10, &mut d.fx);
    // The leases' ends are known to the worker, so that only the mark can wake it.
    d.arena().worker_round(DATABASE);
    let until_us = d.now.mono_us;
    d.arena().worker_sleep(DATABASE, until_us);
    d.woken();
    d.take_one();
    assert!(d.woken().is_empty(), "one of three is not under a quarter");
    d.take_one();
    assert_eq!(d.woken(), [WORKER]);
    assert!(d.take(1).is_empty());
    assert!(d.woken().is_empty());
    let now = d.now;
    let (tick, next) = d.memory.arena().tick(DATABASE, 0, now, &mut d.fx);
    assert!(tick.unwrap().load && next == NIL);
}

// ---- the arena ---------------------------------------------------------------------------------------------

#[test]
fn alloc_beyond_the_promise_evicts_from_the_largest_and_marks_it() {
    let mut d = Desk::new(16, 2, 16); // four queues: eight are promised, eight are anybody's
    for id in 1..=10 {
        d.publish(id);
    }
    assert_eq!(d.arena().slots_free(), 6);
    let first = d.queue;
    d.queue = d.attach(101);
    for id in 1..=4 {
        d.publish(id);
    }
    let second = d.queue;
    assert_eq!(d.arena().lengths(second).unwrap()[0], 4);
    assert_eq!(d.arena().lengths(first).unwrap()[0], 8);
    d.queue = first;
    assert_eq!(d.mark(), 9);
}

#[test]
fn alloc_for_a_queue_that_comes_late_finds_its_promise_kept() {
    let mut d = Desk::new(16, 2, 16);
    for id in 1..=12 {
        d.publish(id);
    }
    assert_eq!(d.take(16).len(), 10, "the leases cannot be evicted, and what is promised is not theirs");
    d.queue = d.attach(101);
    d.publish(1);
    d.publish(2);
    d.publish(3);
    assert_eq!((d.state(1), d.state(2), d.state(3)), (Some(State::Ready), Some(State::Ready), None));
}

#[test]
fn alloc_never_evicts_what_the_row_does_not_know() {
    let mut d = Desk::new(7, 1, 8); // four are promised, three are anybody's
    for id in 1..=4 {
        d.publish(id);
    }
    d.take(4);
    d.pass(30 * SECOND_US); // ready again, with counts that no row has
    assert!(d.take(0).is_empty());
    assert_eq!(d.state(4), Some(State::Ready));
    d.queue = d.attach(101);
    d.publish(1);
    d.publish(2);
    assert_eq!((d.state(1), d.state(2), d.mark()), (Some(State::Ready), None, 2));
}

#[test]
fn finish_in_a_full_arena_wakes_the_hungry_queue() {
    let mut d = Desk::new(7, 1, 8);
    for id in 1..=4 {
        d.publish(id);
    }
    let first = d.queue;
    let leases = d.take(4);
    d.queue = d.attach(101);
    d.publish(1); // the promised one
    d.take(1);
    d.publish(2); // no slot to be had
    let (second, now) = (d.queue, d.now);
    d.wait(3);
    assert!(matches!(d.arena().load_begin(second, 3), LoadStart::From(_)));
    assert_eq!(d.load_row(row(2)), LoadRow::Full);
    d.woken();
    d.memory.arena().load_end(second, 3, 2, &mut d.fx);
    assert!(d.woken().is_empty(), "loading again would be futile");
    d.queue = first;
    d.pin(1, Fence::Lease(leases[0].lease_id), 5);
    d.finish(1, 5);
    assert_eq!(d.woken(), [3]);
    d.queue = second;
    assert!(matches!(d.memory.arena().load_begin(second, 3), LoadStart::From(2)));
    assert_eq!(d.memory.arena().load_row(second, row(2), now, &mut d.fx), LoadRow::Known);
}

#[test]
fn finish_of_a_row_that_came_in_under_a_mark_meanwhile_keeps_it_in_reach() {
    let mut d = Desk::new(16, 2, 16);
    d.pin(7, Fence::Any, 5); // before its sender commits: its finisher finds no row
    let queue = d.queue;
    d.memory.arena().queue_mark(queue, 7, &mut d.fx); // a large transaction commits
    assert!(matches!(d.arena().load_begin(queue, 3), LoadStart::From(7)));
    assert_eq!(d.load_row(row(7)), LoadRow::Known);
    d.memory.arena().load_end(queue, 3, NO_MARK, &mut d.fx);
    assert_eq!(d.mark(), NO_MARK);
    d.finish(7, 5);
    assert_eq!(d.state(7), Some(State::Ready), "nobody else would ever look for it");
}

#[test]
fn detach_with_pins_frees_the_record_when_the_last_pin_goes() {
    let mut d = Desk::new(8, 2, 8);
    d.publish(1);
    d.publish(2);
    d.pin(1, Fence::Any, 5);
    d.wait(3);
    let queue = d.queue;
    assert!(!d.memory.arena().queue_detach(DATABASE, 100, 1, &mut d.fx));
    assert_eq!(d.woken(), [3]);
    assert!(!d.arena().is_current(queue));
    while !d.memory.arena().queue_detach(DATABASE, 100, 1, &mut d.fx) {}
    assert_eq!(d.arena().slots_free(), 7);
    d.undo(1, 5);
    assert_eq!(d.arena().slots_free(), 8);
    let successor = d.attach(102);
    assert_eq!(successor.index, queue.index);
    d.publish(1); // with the old reference
    assert_eq!(d.arena().slots_free(), 8);
    d.leave(3); // woken by the one that is gone
    d.arena().check().unwrap();
}

#[test]
fn clear_after_truncate_leaves_nothing_and_no_mark() {
    let mut d = Desk::new(16, 2, 4);
    for id in 1..=6 {
        d.publish(id);
    }
    d.take(1);
    let queue = d.queue;
    let mut rounds = 0;
    while !d.memory.arena().queue_clear(queue, 2, &mut d.fx) {
        rounds += 1;
    }
    assert!(rounds >= 2);
    assert_eq!((d.arena().slots_free(), d.mark()), (16, NO_MARK));
}

#[test]
fn reset_makes_every_reference_stale_and_wakes_all() {
    let mut d = Desk::new(8, 2, 4);
    d.publish(1);
    d.publish(2);
    d.take(2);
    d.wait(3);
    d.woken();
    let (old, before) = (d.queue, d.arena().epoch());
    d.memory.arena().reset(Config { slots_min: 2, window: 4 }, 42, &mut d.fx);
    assert_ne!(before, d.arena().epoch());
    assert_eq!(d.woken(), [3]);
    assert!(d.arena().wait_is_over(3));
    assert!(!d.arena().is_current(old));
    let new = d.attach(100);
    assert_ne!(new.generation, old.generation);
    assert_eq!(d.arena().slots_free(), 8);
}

#[test]
fn reset_with_more_waiters_than_fit_wakes_everyone() {
    let config = Config { slots_min: 1, window: 4 };
    let mut memory = Memory::new(1, 4, EFFECTS_MAX + 10, config, 1);
    let mut fx = Effects::new();
    let queue = memory.arena().queue_attach(DATABASE, 100, WALL_US).unwrap();
    for proc in 0..EFFECTS_MAX as u32 + 10 {
        memory.arena().wait_begin(proc, &[queue], &mut fx);
    }
    memory.arena().reset(config, 1, &mut fx);
    assert!(fx.is_everyone());
}

// ---- wait --------------------------------------------------------------------------------------------------

#[test]
fn wake_n_messages_wakes_at_most_n_waiters() {
    for readers_first in [false, true] {
        let mut d = Desk::new(32, 2, 16);
        for proc in 0..8 {
            d.wait(proc);
        }
        for id in 0..3 {
            d.publish(id);
        }
        let mut woken = d.woken();
        let mut total = woken.len();
        // Whoever leaves with a message must not wake another for what the others are on their way to.
        while let Some(proc) =
            if readers_first { woken.pop() } else { (!woken.is_empty()).then(|| woken.remove(0)) }
        {
            assert_eq!(d.take(1).len(), 1);
            d.leave(proc);
            let more = d.woken();
            total += more.len();
            woken.extend(more);
        }
        assert_eq!(total, 3);
    }
}

#[test]
fn wake_of_one_that_leaves_without_a_message_goes_on_to_the_next() {
    let mut d = Desk::new(32, 2, 16);
    d.wait(1);
    d.wait(2);
    d.wait(3);
    d.publish(1);
    assert_eq!(d.woken(), [1]);
    d.leave(1); // cancelled
    assert_eq!(d.woken(), [2]);
    d.wait(2); // did not try; sleeps again
    assert_eq!(d.woken(), [3]);
    assert_eq!(d.take(1).len(), 1);
    d.leave(3);
    assert!(d.woken().is_empty());
}

#[test]
fn wake_through_one_queue_takes_the_waiter_out_of_all() {
    let mut d = Desk::new(32, 2, 16);
    let first = d.queue;
    let second = d.attach(101);
    d.memory.arena().wait_begin(1, &[first, second], &mut d.fx);
    d.publish(1);
    assert_eq!(d.woken(), [1]);
    d.queue = second;
    d.publish(1);
    assert!(d.woken().is_empty());
    d.arena().check().unwrap();
}

#[test]
fn wake_after_a_load_is_for_what_it_found() {
    let mut d = Desk::new(32, 2, 16);
    let queue = d.queue;
    for proc in 0..8 {
        d.wait(proc);
    }
    d.memory.arena().queue_mark(queue, 1, &mut d.fx);
    assert_eq!(d.woken(), [0]);
    d.arena().load_begin(queue, 0);
    for id in 1..=3 {
        d.load_row(row(id));
    }
    assert!(d.woken().is_empty());
    d.memory.arena().load_end(queue, 0, NO_MARK, &mut d.fx);
    assert_eq!(d.woken(), [1, 2], "the loader takes one itself");
}

#[test]
fn worker_is_woken_even_when_readers_fill_the_list() {
    let config = Config { slots_min: 1, window: 4096 };
    let mut memory = Memory::new(1, 4096, 1000, config, 1);
    let now = Now { mono_us: SECOND_US, wall_us: WALL_US };
    let mut fx = Effects::new();
    let queue = memory.arena().queue_attach(DATABASE, 100, WALL_US).unwrap();
    assert!(memory.arena().worker_set(DATABASE, 1001));
    assert!(memory.arena().queue_configure(queue, 0, Policy::DEFAULT));
    assert_eq!(memory.arena().restore_begin(queue, 0), queue_dispatch::Restore::Begun);
    memory.arena().restore_end(queue, 0, &mut queue_dispatch::Effects::new());
    memory.arena().load_begin(queue, 0);
    memory.arena().load_end(queue, 0, NO_MARK, &mut fx);
    for proc in 0..1000 {
        memory.arena().wait_begin(proc, &[queue], &mut fx);
    }
    memory.arena().worker_round(DATABASE);
    let mut fx = Effects::new();
    for id in 0..900 {
        memory.arena().publish(queue, row(id), Change::Insert, now, &mut fx);
    }
    memory.arena().publish(queue, due(2000, SECOND_US), Change::Insert, now, &mut fx);
    assert!(fx.procs().contains(&1001));
    // Nobody is forgotten: those who were woken wake the others.
    let mut woken: Vec<u32> = fx.procs().iter().copied().filter(|proc| *proc < 1000).collect();
    let mut total = 0;
    while let Some(proc) = woken.pop() {
        total += 1;
        let mut fx = Effects::new();
        let lease = Lease { until_us: NEVER_US, pid: 1, lxid: 1, flush_us: NEVER_US };
        let mut out = [Taken::default()];
        assert_eq!(memory.arena().take(queue, lease, now, &mut out, &mut fx), 1);
        memory.arena().wait_end(proc, &mut fx);
        woken.extend(fx.procs().iter().filter(|proc| **proc < 1000));
    }
    assert_eq!(total, 900);
}

#[test]
fn worker_sleep_after_something_came_up_returns_its_time() {
    let mut d = Desk::new(32, 2, 16);
    assert!(d.arena().worker_set(DATABASE, WORKER));
    d.arena().worker_round(DATABASE);
    d.publish(1);
    d.take_one(); // a lease of 30 s begins during the round
    assert_eq!(d.woken(), [WORKER]);
    let until_us = d.now.mono_us + 30 * SECOND_US;
    assert_eq!(d.arena().worker_sleep(DATABASE, NEVER_US), until_us);
    d.publish(2);
    d.take_one(); // ends no earlier
    assert!(d.woken().is_empty());
}

// ---- backoff -----------------------------------------------------------------------------------------------

#[test]
fn backoff_without_jitter_doubles_up_to_the_ceiling() {
    let policy = Policy { retry_jitter: 0.0, retry_delay_max_us: 10 * SECOND_US, ..Policy::DEFAULT };
    let delays: Vec<i64> = (1..=6).map(|n| backoff_us(&policy, n, 7) / SECOND_US).collect();
    assert_eq!(delays, [1, 2, 4, 8, 10, 10]);
    assert_eq!(backoff_us(&policy, 0, 7), SECOND_US);
    assert_eq!(backoff_us(&policy, u32::MAX, 7), 10 * SECOND_US);
}

#[test]
fn backoff_with_jitter_stays_within_and_is_spread() {
    let mut distinct = HashSet::new();
    for random in 0..1000 {
        let us = backoff_us(&Policy::DEFAULT, 1, random);
        assert!((800_000..=1_200_000).contains(&us));
        distinct.insert(us / 40_000);
    }
    assert!(distinct.len() >= 10);
}

#[test]
fn backoff_with_odd_settings_neither_panics_nor_is_negative() {
    for retry_backoff in [0.0, 1.0, 1e300, f64::INFINITY] {
        for retry_delay_us in [0, 1, i64::MAX] {
            for retry_delay_max_us in [0, i64::MAX] {
                let policy = Policy {
                    retry_backoff,
                    retry_delay_us,
                    retry_delay_max_us,
                    retry_jitter: 1.0,
                    ..Policy::DEFAULT
                };
                for failures in [0, 1, 2, 1000, u32::MAX] {
                    assert!(backoff_us(&policy, failures, 3) >= 0);
                }
            }
        }
    }
}

// ---- leases and the tables ---------------------------------------------------------------------------------

/// A lease that was written before memory was lost.
const OLD_LEASE: i64 = (77 << 32) | 5;

impl Desk {
    /// A queue whose leases have not been restored.
    fn attach_unrestored(&mut self, relation: u32) -> QueueRef {
        let now = self.now;
        let mut arena = self.memory.arena();
        let queue = arena.queue_attach(DATABASE, relation, now.wall_us).unwrap();
        assert!(arena.queue_configure(queue, 0, Policy { retry_jitter: 0.0, ..Policy::DEFAULT }));
        queue
    }

    /// A desk whose only queue is being restored by backend 2.
    fn restoring() -> Desk {
        let mut d = Desk::new(16, 2, 8);
        d.queue = d.attach_unrestored(101);
        let queue = d.queue;
        assert_eq!(d.arena().restore_begin(queue, 2), Restore::Begun);
        d
    }

    fn restore_begin(&mut self, loader: u32) -> Restore {
        self.memory.arena().restore_begin(self.queue, loader)
    }

    fn restore_end(&mut self) {
        self.memory.arena().restore_end(self.queue, 2, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    fn restore(&mut self, lease: LeaseRow, row: Row) -> bool {
        let is_done = self.memory.arena().lease_restore(self.queue, &lease, row, self.now, &mut self.fx);
        self.memory.arena().check().unwrap();
        is_done
    }

    fn old_lease(&self, msg_id: i64, count: u32, in_us: i64) -> LeaseRow {
        let now_us = self.now.mono_us;
        LeaseRow {
            msg_id,
            lease_id: OLD_LEASE,
            count,
            leased_at_us: now_us - 5 * SECOND_US,
            until_us: now_us + in_us,
            pid: 12,
            lxid: 0,
            written: Written::Whole,
        }
    }

    /// Leases of so many seconds, to be written once they are older than `flush_us`.
    fn take_for(&mut self, most: usize, seconds: i64, flush_us: i64) -> Vec<Taken> {
        let lease = Lease { until_us: self.now.mono_us + seconds * SECOND_US, pid: 11, lxid: 3, flush_us };
        let mut out = vec![Taken::default(); most];
        let taken = self.memory.arena().take(self.queue, lease, self.now, &mut out, &mut self.fx);
        out.truncate(taken);
        out
    }

    /// What the worker finds to write in one walk, in chunks of so many.
    fn walk(&mut self, chunk: usize) -> Vec<LeaseRow> {
        self.memory.arena().flush_begin(self.queue);
        let (mut walk, mut all) = (LeaseWalk::START, Vec::new());
        for _ in 0..100 {
            let mut rows = vec![LeaseRow::default(); chunk];
            let (found, is_all) =
                self.memory.arena().flush_next(self.queue, &mut walk, SECOND_US, self.now, &mut rows);
            all.extend_from_slice(&rows[..found]);
            if is_all {
                return all;
            }
        }
        panic!("the walk does not end");
    }

    fn walked_ids(&mut self, chunk: usize) -> Vec<i64> {
        let mut ids: Vec<i64> = self.walk(chunk).iter().map(|row| row.msg_id).collect();
        ids.sort();
        ids
    }

    fn written(&mut self, row: &LeaseRow, written: Written) {
        self.memory.arena().lease_written(self.queue, row, written, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    /// Writes all leases that are old enough, whole.
    fn write_all(&mut self) {
        for row in self.walk(CHUNK_MAX) {
            self.written(&row, Written::Whole);
        }
    }

    fn tick(&mut self) -> Tick {
        let mut from = 0;
        loop {
            let (tick, next) = self.memory.arena().tick(DATABASE, from, self.now, &mut self.fx);
            match tick.filter(|tick| tick.queue == self.queue) {
                Some(tick) => return tick,
                None => from = next,
            }
        }
    }

    /// Expiry and what is new have been seen to.
    fn quiet(&mut self) {
        self.memory.arena().expiry_begin(self.queue);
        self.tick();
    }

    /// A worker that is asleep for ever, unless something of before wakes it.
    fn worker_sleeps(&mut self) -> i64 {
        let mut arena = self.memory.arena();
        assert!(arena.worker_set(DATABASE, WORKER));
        arena.worker_round(DATABASE);
        let until_us = self.memory.arena().worker_sleep(DATABASE, NEVER_US);
        self.woken();
        until_us
    }

    fn release(&mut self, taken: Taken) {
        assert!(matches!(self.pin(taken.msg_id, Fence::Lease(taken.lease_id), 5), Pin::Done(_)));
        self.memory.arena().pin_release(self.queue, taken.msg_id, 5, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    fn fate(&mut self, msg_id: i64, count: u32) -> RowFate {
        self.memory.arena().row_fate(self.queue, msg_id, count)
    }

    /// Whether the worker sweeps once it is time, and not before.
    fn is_swept(&mut self) -> bool {
        let first = self.tick();
        assert!(!first.sweep, "swept at once");
        self.pass(SWEEP_US - 1);
        assert!(!self.tick().sweep);
        self.pass(1);
        self.tick().sweep
    }
}

#[test]
fn take_before_the_restore_ends_gives_nothing() {
    let mut d = Desk::new(16, 2, 8);
    d.queue = d.attach_unrestored(101);
    let queue = d.queue;
    d.publish(1);
    assert!(d.take(1).is_empty() && !d.arena().has_ready(queue));
    assert_eq!(d.restore_begin(2), Restore::Begun);
    d.publish(2);
    assert!(d.take(1).is_empty() && !d.arena().has_ready(queue));
    d.wait(3);
    d.woken();
    d.restore_end();
    assert_eq!(d.woken(), [3]);
    assert_eq!(d.take_one().msg_id, 2, "the first is under the mark");
}

#[test]
fn restore_begin_says_who_restores_and_a_leaver_lets_another() {
    let mut d = Desk::new(16, 2, 8);
    d.queue = d.attach_unrestored(101);
    let (queue, now) = (d.queue, d.now);
    assert_eq!(d.restore_begin(2), Restore::Begun);
    assert_eq!(d.restore_begin(3), Restore::Busy);
    assert_eq!(d.arena().load_begin(queue, 3), LoadStart::Busy);
    d.memory.arena().load_abort(queue, 3, now, &mut d.fx); // not his
    assert_eq!(d.restore_begin(3), Restore::Busy);
    d.memory.arena().load_abort(queue, 2, now, &mut d.fx);
    d.restore_end(); // of one who has left
    assert!(d.take(1).is_empty());
    assert_eq!(d.restore_begin(3), Restore::Begun);
    d.memory.arena().restore_end(queue, 3, &mut d.fx);
    assert_eq!(d.restore_begin(2), Restore::Done);
    assert_eq!(d.arena().load_begin(queue, 2), LoadStart::From(i64::MIN));
}

#[test]
fn restore_end_wakes_the_worker_that_was_asked_to_load_meanwhile() {
    let mut d = Desk::restoring();
    let queue = d.queue;
    d.worker_sleeps();
    d.memory.arena().load_ask(queue, &mut d.fx);
    assert_eq!(d.woken(), [WORKER]);
    assert!(!d.tick().load);
    d.worker_sleeps();
    d.restore_end();
    assert_eq!(d.woken(), [WORKER]);
    assert!(d.tick().load);
}

#[test]
fn restore_running_lease_keeps_fence_count_and_deadline() {
    let mut d = Desk::restoring();
    let lease = d.old_lease(1, 3, 20 * SECOND_US);
    assert!(d.restore(lease, Row { count: 1, ..row(1) }));
    d.restore_end();
    let (queue, now) = (d.queue, d.now);
    let view = d.arena().view(queue, 1).unwrap();
    assert_eq!((view.state, view.lease_id, view.count), (State::Leased, OLD_LEASE, 3));
    assert_eq!((view.deadline_us, view.leased_at_us), (now.mono_us + 20 * SECOND_US, lease.leased_at_us));
    assert!(d.walk(8).is_empty(), "its row is as it should be");
    let Pin::Done(pinned) = d.pin(1, Fence::Lease(OLD_LEASE), 5) else { panic!("the fence is lost") };
    assert_eq!((pinned.count, pinned.lease_id), (3, OLD_LEASE));
    d.undo(1, 5);
    d.pass(20 * SECOND_US);
    assert_eq!(d.take_one().count, 4);
}

#[test]
fn restore_ended_lease_is_ready_with_its_count() {
    let mut d = Desk::restoring();
    let lease = d.old_lease(1, 3, 0);
    assert!(d.restore(lease, row(1)));
    d.restore_end();
    assert_eq!(d.pin(1, Fence::Lease(OLD_LEASE), 5), Pin::Lost);
    let taken = d.take_one();
    assert_eq!((taken.msg_id, taken.count), (1, 4));
}

#[test]
fn restore_ended_lease_of_a_row_not_due_waits_for_it() {
    let mut d = Desk::restoring();
    let lease = d.old_lease(1, 3, 0);
    assert!(d.restore(lease, due(1, 9 * SECOND_US)));
    d.restore_end();
    assert_eq!(d.state(1), Some(State::Delayed));
    d.pass(9 * SECOND_US);
    assert_eq!(d.take_one().count, 4);
}

#[test]
fn restore_ended_lease_never_puts_off_what_was_published_since() {
    let mut d = Desk::restoring();
    d.publish_row(row(1), Change::Update); // "at once", after the restorer's snapshot
    let lease = d.old_lease(1, 3, 0);
    assert!(d.restore(lease, due(1, 3600 * SECOND_US)));
    d.restore_end();
    assert_eq!(d.take_one().count, 4);
}

#[test]
fn restore_lease_of_a_message_retried_since_the_snapshot_leaves_it_ready() {
    let mut d = Desk::restoring();
    d.publish_row(Row { count: 3, ..row(1) }, Change::Update); // the retry wrote the count
    let lease = d.old_lease(1, 3, 20 * SECOND_US);
    assert!(d.restore(lease, row(1)));
    d.restore_end();
    assert_eq!(d.state(1), Some(State::Ready));
}

#[test]
fn restore_over_a_finish_by_id_gives_the_lease_back_when_that_is_undone() {
    for does_commit in [true, false] {
        let mut d = Desk::restoring();
        assert!(matches!(d.pin(1, Fence::Any, 5), Pin::Done(_)));
        let lease = d.old_lease(1, 3, 20 * SECOND_US);
        assert!(d.restore(lease, row(1)));
        d.restore_end();
        assert_eq!(d.state(1), Some(State::Pinned));
        assert!(d.take(1).is_empty());
        if does_commit {
            d.finish(1, 5);
            assert_eq!((d.state(1), d.arena().slots_free()), (None, 16));
        } else {
            d.undo(1, 5);
            let queue = d.queue;
            let view = d.arena().view(queue, 1).unwrap();
            assert_eq!((view.state, view.lease_id, view.count), (State::Leased, OLD_LEASE, 3));
        }
    }
}

#[test]
fn restore_without_room_says_so_and_evicts_what_it_may() {
    let mut d = Desk::new(7, 1, 8); // four queues
    let first = d.queue;
    for id in 1..=4 {
        d.publish(id);
    }
    d.queue = d.attach_unrestored(101);
    assert_eq!(d.restore_begin(2), Restore::Begun);
    let mut restored = 0;
    for id in 1..=4 {
        let lease = LeaseRow { lease_id: OLD_LEASE + id, ..d.old_lease(id, 1, 20 * SECOND_US) };
        restored += usize::from(d.restore(lease, row(id)));
    }
    d.restore_end();
    assert!((2..4).contains(&restored), "{restored}");
    assert_eq!(d.arena().lengths(first).unwrap()[0] as usize, 5 - restored);
}

#[test]
fn restored_lease_and_count_are_never_evicted() {
    for in_us in [0, 20 * SECOND_US] {
        let mut d = Desk::new(7, 1, 8);
        d.queue = d.attach_unrestored(101);
        assert_eq!(d.restore_begin(2), Restore::Begun);
        for id in 1..=4 {
            let lease = d.old_lease(id, 1, in_us);
            assert!(d.restore(lease, row(id)));
        }
        d.restore_end();
        let restored = d.queue;
        d.queue = d.attach(102);
        d.publish(1);
        d.publish(2);
        assert_eq!((d.state(1), d.state(2)), (Some(State::Ready), None));
        assert_eq!(d.arena().lengths(restored).unwrap().iter().sum::<u32>(), 4);
    }
}

#[test]
fn lease_ids_avoid_the_epoch_of_a_restored_lease() {
    let mut d = Desk::restoring();
    let own = d.arena().lease_id_next();
    let lease = LeaseRow { lease_id: own + 100, ..d.old_lease(1, 1, 20 * SECOND_US) };
    assert!(d.restore(lease, row(1)));
    d.restore_end();
    assert_ne!(d.arena().lease_id_next() >> 32, own >> 32);
}

#[test]
fn flush_next_gives_leases_older_than_the_interval_until_they_are_whole() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    d.publish(2);
    let first = d.take_for(1, 30, SECOND_US)[0];
    d.pass(SECOND_US / 2);
    d.take_for(1, 30, SECOND_US);
    assert!(d.walk(8).is_empty());
    d.pass(SECOND_US / 2);
    let rows = d.walk(8);
    let (now, began_us) = (d.now, d.now.mono_us - SECOND_US);
    let row = LeaseRow {
        msg_id: 1,
        lease_id: first.lease_id,
        count: 1,
        leased_at_us: began_us,
        until_us: began_us + 30 * SECOND_US,
        pid: 11,
        lxid: 3,
        written: Written::No,
    };
    assert_eq!(rows, [row]);
    d.written(&row, Written::Count);
    let rows = d.walk(8);
    assert_eq!(rows, [LeaseRow { written: Written::Count, ..row }]);
    d.written(&rows[0], Written::Whole);
    assert!(d.walk(8).is_empty());
    d.pass(SECOND_US / 2);
    assert_eq!(d.walked_ids(8), [2]);
    assert!(now.mono_us < d.now.mono_us);
}

#[test]
fn flush_is_asked_for_when_the_oldest_lease_is_old_enough_and_not_before() {
    let mut d = Desk::new(16, 2, 8);
    d.quiet();
    d.worker_sleeps();
    for id in 1..=2 {
        d.publish(id);
    }
    let start_us = d.now.mono_us;
    d.take_for(1, 30, SECOND_US);
    assert_eq!(d.woken(), [WORKER]);
    assert_eq!(d.tick().next_us, start_us + SECOND_US);
    d.pass(SECOND_US / 2);
    d.take_for(1, 30, SECOND_US);
    d.pass(SECOND_US / 2 - 1);
    assert!(!d.tick().flush);
    d.pass(1);
    d.arena().worker_round(DATABASE);
    assert!(d.tick().flush);
    assert!(d.tick().flush, "until the worker begins");
    d.write_all();
    // The worker sleeps no longer than until the younger one is old enough.
    assert_eq!(d.arena().worker_sleep(DATABASE, NEVER_US), start_us + 3 * SECOND_US / 2);
    assert!(!d.tick().flush);
    assert_eq!(d.tick().next_us, start_us + 3 * SECOND_US / 2);
    d.pass(SECOND_US / 2);
    assert!(d.tick().flush);
    d.write_all();
    assert_eq!(d.tick().next_us, start_us + 30 * SECOND_US);
}

#[test]
fn flush_of_a_lease_shorter_than_the_interval_is_not_asked_for() {
    let mut d = Desk::new(16, 2, 8);
    d.quiet();
    d.publish(1);
    let taken = d.take_for(1, 1, SECOND_US)[0];
    let (queue, start_us) = (d.queue, d.now.mono_us);
    assert_eq!(d.tick().next_us, start_us + SECOND_US);
    d.pass(SECOND_US / 2);
    assert!(!d.tick().flush);
    // A heartbeat makes it a long one.
    let (fence, now) = (Fence::Lease(taken.lease_id), d.now);
    let mut fx = Effects::new();
    assert!(d.arena().extend(queue, 1, fence, start_us + 9 * SECOND_US, now, &mut fx).is_some());
    assert_eq!(d.tick().next_us, start_us + SECOND_US);
    d.pass(SECOND_US / 2);
    assert!(d.tick().flush);
    assert_eq!(d.walked_ids(8), [1]);
}

#[test]
fn flush_of_a_durable_lease_is_asked_for_at_once() {
    let mut d = Desk::new(16, 2, 8);
    d.worker_sleeps();
    d.publish(1);
    d.publish(2);
    d.take_for(1, 30, 0);
    assert_eq!(d.woken(), [WORKER]);
    assert!(d.tick().flush);
    // A transaction that commits what it sent and read does not speak for the reader who waits.
    let (queue, now) = (d.queue, d.now);
    let lease_id = d.arena().lease_id_next();
    let lease = Lease { until_us: now.mono_us + 9 * SECOND_US, pid: 1, lxid: 0, flush_us: SECOND_US };
    d.memory.arena().publish_leased(queue, row(2), lease_id, lease, now, &mut d.fx);
    assert!(d.walked_ids(8).contains(&1));
}

#[test]
fn flush_next_gives_pinned_leases_too_however_many() {
    let mut d = Desk::new(64, 2, 64);
    for id in 1..=20 {
        d.publish(id);
    }
    for taken in d.take_for(20, 30, SECOND_US) {
        if taken.msg_id % 4 != 0 {
            d.pin(taken.msg_id, Fence::Lease(taken.lease_id), 5);
        }
    }
    d.pass(SECOND_US);
    assert_eq!(d.walked_ids(3), (1..=20).collect::<Vec<_>>());
    d.write_all();
    for id in 1..=20 {
        d.undo(id, 5);
    }
    assert!(d.walk(8).is_empty());
}

#[test]
fn flush_walk_over_many_leases_gives_each_while_others_come_and_go() {
    let mut d = Desk::new(2_000, 2, 1_000);
    for id in 1..=900 {
        d.publish(id);
    }
    let mut leases = Vec::new();
    for _ in 0..8 {
        leases.extend(d.take_for(100, 30, SECOND_US));
    }
    d.pass(2 * SECOND_US);
    let queue = d.queue;
    d.arena().flush_begin(queue);
    let (mut walk, mut seen) = (LeaseWalk::START, Vec::new());
    for step in 0i64.. {
        let mut rows = [LeaseRow::default(); 64];
        let now = d.now;
        let (found, is_all) = d.memory.arena().flush_next(queue, &mut walk, SECOND_US, now, &mut rows);
        seen.extend(rows[..found].iter().map(|row| row.msg_id));
        if is_all {
            break;
        }
        assert!(step < 100);
        // One that was given is pinned and let go, one is extended, one that was not is pinned, one goes, one comes.
        let given = leases[step as usize * 3];
        assert!(matches!(d.pin(given.msg_id, Fence::Lease(given.lease_id), 5), Pin::Done(_)));
        if step % 2 == 0 {
            d.undo(given.msg_id, 5);
        }
        let moved = leases[step as usize * 3 + 1];
        let (fence, until_us) = (Fence::Lease(moved.lease_id), now.mono_us + 60 * SECOND_US);
        d.memory.arena().extend(queue, moved.msg_id, fence, until_us, now, &mut d.fx);
        let ahead = leases[799 - step as usize * 3];
        d.pin(ahead.msg_id, Fence::Lease(ahead.lease_id), 5);
        let gone = leases[798 - step as usize * 3];
        d.pin(gone.msg_id, Fence::Lease(gone.lease_id), 5);
        d.finish(gone.msg_id, 5);
        d.take_for(1, 30, SECOND_US);
    }
    let mut distinct: HashSet<i64> = seen.iter().copied().collect();
    assert!(seen.len() - distinct.len() <= 100, "only what moved comes twice");
    // What was pinned ahead of the walk, into the list that it had passed, has asked for another.
    assert!(d.tick().flush);
    distinct.extend(d.walked_ids(64));
    for taken in &leases {
        assert!(d.state(taken.msg_id).is_none() || distinct.contains(&taken.msg_id), "{}", taken.msg_id);
    }
}

#[test]
fn flush_walk_that_misses_a_lease_unpinned_behind_it_is_made_again() {
    let mut d = Desk::new(16, 2, 8);
    d.quiet();
    d.publish(1);
    let taken = d.take_for(1, 30, SECOND_US)[0];
    d.pass(2 * SECOND_US);
    d.pin(1, Fence::Lease(taken.lease_id), 5);
    let queue = d.queue;
    d.arena().flush_begin(queue); // the walk passes where the lease will be
    d.undo(1, 5);
    assert!(d.tick().flush);
}

#[test]
fn lease_extended_or_shortened_is_written_again() {
    for is_pinned in [false, true] {
        let mut d = Desk::new(16, 2, 8);
        d.quiet();
        d.publish(1);
        let taken = d.take_for(1, 30, SECOND_US)[0];
        d.pass(SECOND_US);
        d.write_all();
        assert!(!d.tick().flush);
        if is_pinned {
            d.pin(1, Fence::Lease(taken.lease_id), 5);
        }
        let (queue, now) = (d.queue, d.now);
        let fence = Fence::Lease(taken.lease_id);
        d.memory.arena().extend(queue, 1, fence, now.mono_us + 60 * SECOND_US, now, &mut d.fx);
        assert!(d.tick().flush);
        let rows = d.walk(8);
        assert_eq!((rows[0].until_us, rows[0].written), (now.mono_us + 60 * SECOND_US, Written::Count));
        // And moved again before that was committed.
        d.memory.arena().extend(queue, 1, fence, now.mono_us + 90 * SECOND_US, now, &mut d.fx);
        d.written(&rows[0], Written::Whole);
        assert!(d.tick().flush);
        d.write_all();
        if is_pinned {
            d.undo(1, 5);
        }
        assert!(d.walk(8).is_empty());
        d.memory.arena().shorten(queue, 1, taken.lease_id, now.mono_us + 5 * SECOND_US, &mut d.fx);
        assert!(d.tick().flush);
        assert_eq!(d.walk(8)[0].until_us, now.mono_us + 5 * SECOND_US);
    }
}

#[test]
fn lease_whose_row_raised_the_count_is_written_again() {
    for is_written_first in [false, true] {
        let mut d = Desk::new(16, 2, 8);
        d.publish(1);
        let taken = d.take_for(1, 30, 0)[0];
        let rows = d.walk(8);
        let queue = d.queue;
        if is_written_first {
            d.written(&rows[0], Written::Count);
        }
        assert_eq!(d.settle(taken, Row { count: 4, ..row(1) }), Settled::Deliver(5));
        if !is_written_first {
            d.written(&rows[0], Written::Count);
        }
        assert!(!d.arena().is_count_written(queue, 1, taken.lease_id), "a smaller one is");
        assert!(d.tick().flush);
        assert_eq!(d.walk(8)[0].count, 5);
        d.write_all();
        assert!(d.arena().is_count_written(queue, 1, taken.lease_id));
    }
}

#[test]
fn lease_written_after_the_lease_ended_makes_its_row_stale() {
    for does_finish in [false, true] {
        let mut d = Desk::new(16, 2, 8);
        d.publish(1);
        let taken = d.take_for(1, 3, SECOND_US)[0];
        d.pass(2 * SECOND_US);
        let rows = d.walk(8);
        if does_finish {
            d.pin(1, Fence::Lease(taken.lease_id), 5);
            d.finish(1, 5);
        } else {
            d.pass(SECOND_US);
            d.take_for(1, 30, SECOND_US); // another lease
        }
        d.written(&rows[0], Written::Whole);
        assert!(d.is_swept());
        if !does_finish {
            assert_eq!(d.walk(8)[0].written, Written::Earlier);
        }
    }
}

#[test]
fn lease_written_after_its_release_is_recounted() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_for(1, 30, SECOND_US)[0];
    d.pass(2 * SECOND_US);
    let rows = d.walk(8);
    d.release(taken);
    d.written(&rows[0], Written::Whole);
    assert!(d.is_swept());
    let queue = d.queue;
    assert!(d.arena().sweep_begin(queue));
    assert_eq!(d.fate(1, 1), RowFate::Recount(0));
}

#[test]
fn is_count_written_is_true_of_a_written_count_and_of_a_lease_that_is_over() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.publish(1);
    let taken = d.take_for(1, 30, 0)[0];
    assert!(!d.arena().is_count_written(queue, 1, taken.lease_id));
    assert!(d.arena().is_count_written(queue, 1, taken.lease_id + 1));
    assert!(d.arena().is_count_written(queue, 2, taken.lease_id));
    d.pin(1, Fence::Lease(taken.lease_id), 5);
    assert!(!d.arena().is_count_written(queue, 1, taken.lease_id));
    let rows = d.walk(8);
    d.written(&rows[0], Written::Count);
    assert!(d.arena().is_count_written(queue, 1, taken.lease_id));
    d.undo(1, 5);
    assert!(d.arena().is_count_written(queue, 1, taken.lease_id));
    d.pass(30 * SECOND_US);
    let next = d.take_for(1, 30, 0)[0];
    assert!(d.arena().is_count_written(queue, 1, taken.lease_id));
    assert!(!d.arena().is_count_written(queue, 1, next.lease_id), "the row is the earlier one's");
}

#[test]
fn written_wake_wakes_who_waits_in_that_database_once() {
    let mut d = Desk::new(16, 2, 8);
    assert!(d.arena().worker_set(DATABASE, WORKER));
    assert!(d.arena().worker_set(2, WORKER + 1));
    d.arena().written_wait(3, DATABASE);
    d.arena().written_wait(4, 2);
    d.memory.arena().written_wake(DATABASE, &mut d.fx);
    assert_eq!(d.woken(), [3]);
    d.memory.arena().written_wake(DATABASE, &mut d.fx);
    assert!(d.woken().is_empty());
    d.memory.arena().written_wake(2, &mut d.fx);
    assert_eq!(d.woken(), [4]);
    d.arena().written_wait(5, DATABASE);
    d.leave(5); // gone
    d.memory.arena().written_wake(DATABASE, &mut d.fx);
    assert!(d.woken().is_empty());
}

#[test]
fn written_wake_of_more_than_fit_forgets_nobody() {
    let all = EFFECTS_MAX as u32 + 10;
    let mut memory = Memory::new(1, 4, all as usize, Config { slots_min: 1, window: 4 }, 1);
    assert!(memory.arena().worker_set(DATABASE, WORKER));
    for proc in 0..all {
        memory.arena().written_wait(proc, DATABASE);
    }
    let mut fx = Effects::new();
    memory.arena().written_wake(DATABASE, &mut fx);
    assert!(fx.is_everyone());
}

#[test]
fn reset_wakes_who_waits_for_what_will_not_be_written() {
    let mut d = Desk::new(8, 2, 4);
    assert!(d.arena().worker_set(DATABASE, WORKER));
    d.arena().written_wait(3, DATABASE);
    d.memory.arena().reset(Config { slots_min: 2, window: 4 }, 42, &mut d.fx);
    assert_eq!(d.woken(), [3, WORKER]);
    let queue = d.queue;
    assert!(d.arena().is_count_written(queue, 1, 5), "of an arena that is gone");
}

#[test]
fn rows_of_what_is_finished_retried_replaced_or_truncated_are_swept_after_a_while() {
    for how in 0..4 {
        let mut d = Desk::new(16, 2, 8);
        d.publish(1);
        let taken = d.take_for(1, 30, SECOND_US)[0];
        d.pass(SECOND_US);
        d.write_all();
        assert!(!d.is_swept(), "nothing is stale");
        let (queue, now, fence) = (d.queue, d.now, Fence::Lease(taken.lease_id));
        match how {
            0 => {
                d.pin(1, fence, 5);
                d.finish(1, 5);
            }
            1 => {
                d.pin(1, fence, 5);
                let retried = Row { count: 1, ..due(1, 15 * SECOND_US) };
                d.memory.arena().pin_refile(queue, retried, 5, now, &mut d.fx);
            }
            2 => {
                d.pin(1, fence, 5);
                d.publish(1); // the id comes anew
                d.finish(1, 5);
                let view = d.arena().view(queue, 1).unwrap();
                assert_eq!((view.state, view.count, view.lease_id), (State::Ready, 0, 0));
            }
            _ => while !d.memory.arena().queue_clear(queue, 2, &mut d.fx) {},
        }
        assert!(d.is_swept(), "{how}");
        assert!(!d.arena().sweep_begin(queue), "nothing is recounted");
        assert!(!d.is_swept());
        d.arena().sweep_again(queue);
        assert!(d.is_swept());
    }
}

#[test]
fn row_of_a_released_delivery_is_recounted() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.publish(1);
    for count in 1..=2 {
        let taken = d.take_for(1, 30, SECOND_US)[0];
        d.pass(SECOND_US);
        d.write_all();
        if count == 2 {
            assert_eq!(d.fate(1, 2), RowFate::Keep, "it runs");
            d.release(taken);
        } else {
            d.pass(29 * SECOND_US);
            d.tick();
            assert_eq!(d.fate(1, 1), RowFate::Keep);
        }
    }
    assert!(d.is_swept());
    assert!(d.arena().sweep_begin(queue));
    assert!(!d.arena().sweep_begin(queue));
    assert_eq!((d.fate(1, 2), d.fate(1, 1), d.fate(9, 1)), (RowFate::Recount(1), RowFate::Keep, RowFate::Keep));
    let taken = d.take_for(1, 30, SECOND_US)[0];
    assert_eq!(taken.count, 2);
    assert_eq!(d.fate(1, 2), RowFate::Keep);
}

#[test]
fn row_of_a_released_first_delivery_is_deleted_and_its_slot_stays_until_then() {
    let mut d = Desk::new(7, 1, 8);
    for id in 1..=4 {
        d.publish(id);
    }
    let leases = d.take_for(4, 30, SECOND_US);
    d.pass(SECOND_US);
    d.write_all();
    for taken in leases {
        d.release(taken);
    }
    let first = d.queue;
    d.queue = d.attach(101);
    d.publish(1);
    d.publish(2);
    d.queue = first;
    for id in 1..=4 {
        assert_eq!(d.fate(id, 1), RowFate::Recount(0), "{id}");
    }
}

#[test]
fn put_off_message_is_not_counted_and_comes_back() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    d.publish(1);
    let taken = d.take_for(1, 30, 0)[0];
    d.write_all();
    d.memory.arena().put_off(queue, taken, now.mono_us + SECOND_US, &mut d.fx);
    d.arena().check().unwrap();
    assert_eq!(d.state(1), Some(State::Delayed));
    assert_eq!(d.fate(1, 1), RowFate::Recount(0));
    assert!(d.arena().sweep_begin(queue), "its row says that it was delivered");
    assert_eq!(d.pin(1, Fence::Lease(taken.lease_id), 5), Pin::Lost);
    d.pass(SECOND_US - 1);
    assert!(d.take(1).is_empty());
    d.pass(1);
    assert_eq!(d.take_one().count, 1);
    d.memory.arena().put_off(queue, taken, now.mono_us, &mut d.fx); // of a lease that is over
    assert_eq!(d.state(1), Some(State::Leased));
}

#[test]
fn settle_row_not_due_of_a_written_lease_has_its_row_recounted() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.publish(1);
    let taken = d.take_for(1, 30, 0)[0];
    d.write_all();
    assert_eq!(d.settle(taken, due(1, 9 * SECOND_US)), Settled::Withdrawn);
    assert!(d.arena().sweep_begin(queue));
    assert_eq!(d.fate(1, 1), RowFate::Recount(0));
}

#[test]
fn detach_with_pinned_leases_leaves_no_list_behind() {
    let mut d = Desk::new(16, 2, 8);
    for id in 1..=5 {
        d.publish(id);
    }
    let queue = d.queue;
    for taken in d.take_for(5, 30, SECOND_US) {
        d.pin(taken.msg_id, Fence::Lease(taken.lease_id), 5);
    }
    while !d.memory.arena().queue_detach(DATABASE, 100, 2, &mut d.fx) {}
    d.pass(SECOND_US);
    assert!(d.walk(8).is_empty());
    let now = d.now;
    d.undo(3, 5);
    d.finish(1, 5);
    d.memory.arena().pin_refile(queue, row(5), 5, now, &mut d.fx);
    d.arena().check().unwrap();
    d.memory.arena().pin_release(queue, 4, 5, &mut d.fx);
    d.arena().check().unwrap();
    d.undo(2, 5);
    assert_eq!(d.arena().slots_free(), 16);
    let successor = d.attach(102);
    assert_eq!(successor.index, queue.index);
}

#[test]
fn lease_returned_while_pinned_leaves_the_list_of_the_pinned() {
    let mut d = Desk::new(16, 2, 8);
    for id in 1..=3 {
        d.publish(id);
    }
    let leases = d.take_for(3, 30, SECOND_US);
    for taken in &leases {
        d.pin(taken.msg_id, Fence::Lease(taken.lease_id), 5);
    }
    d.give_back(leases[1]);
    d.arena().check().unwrap();
    d.pass(SECOND_US);
    assert_eq!(d.walked_ids(8), [1, 3]);
    for id in 1..=3 {
        d.undo(id, 5);
    }
}

// ---- what expires, and who listens -------------------------------------------------------------------------

#[test]
fn expiry_is_unknown_after_attach_and_after_a_mark() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    assert!(d.tick().expire && d.tick().expire, "until somebody looks");
    d.quiet();
    let tick = d.tick();
    assert_eq!((tick.expire, tick.next_us), (false, NEVER_US));
    d.memory.arena().queue_mark(queue, 7, &mut d.fx);
    assert!(d.tick().expire);
    d.quiet();
    d.memory.arena().queue_mark_all(queue, &mut d.fx);
    assert!(d.tick().expire);
    d.memory.arena().expires_at(queue, WALL_US, now, &mut d.fx);
    assert!(d.tick().expire, "unknown is earlier than all");
}

#[test]
fn expires_at_the_earliest_time_wakes_the_worker_and_the_tick_says_so() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.quiet();
    d.worker_sleeps();
    let now = d.now;
    d.memory.arena().expires_at(queue, WALL_US + 9 * SECOND_US, now, &mut d.fx);
    assert_eq!(d.woken(), [WORKER]);
    d.memory.arena().expires_at(queue, WALL_US + 20 * SECOND_US, now, &mut d.fx);
    assert!(d.woken().is_empty());
    d.pass(9 * SECOND_US - 1);
    let tick = d.tick();
    assert_eq!((tick.expire, tick.next_us), (false, d.now.mono_us + 1));
    d.pass(1);
    assert!(d.tick().expire);
    d.arena().expiry_begin(queue);
    let now = d.now;
    // Committed after the worker's snapshot; then the worker tells what it found.
    d.memory.arena().expires_at(queue, now.wall_us + SECOND_US, now, &mut d.fx);
    d.memory.arena().expires_at(queue, NEVER_US, now, &mut d.fx);
    assert_eq!(d.tick().next_us, now.mono_us + SECOND_US);
}

#[test]
fn expires_at_without_a_worker_wakes_no_reader() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    d.quiet();
    d.wait(3);
    d.memory.arena().expires_at(queue, WALL_US + SECOND_US, now, &mut d.fx);
    assert!(d.woken().is_empty(), "nothing for him to read");
}

#[test]
fn news_is_only_for_those_who_listen_and_once_per_readiness() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    assert!(!d.tick().notify && !d.arena().has_listeners(DATABASE));
    assert!(d.arena().listeners_set(DATABASE));
    assert!(d.arena().has_listeners(DATABASE) && !d.arena().has_listeners(2));
    assert!(!d.tick().notify, "what lay there before is no news");
    d.worker_sleeps();
    d.publish(2);
    d.publish(3);
    assert_eq!(d.woken(), [WORKER]);
    assert!(d.tick().notify);
    assert!(!d.tick().notify);
    d.publish(4);
    assert!(d.tick().notify);
    d.take(4);
    assert!(!d.tick().notify);
}

#[test]
fn news_waits_for_notify_at_and_a_failed_one_is_told_again() {
    let mut d = Desk::new(16, 2, 8);
    d.quiet();
    assert!(d.arena().listeners_set(DATABASE));
    d.worker_sleeps();
    d.publish(1);
    d.woken();
    d.arena().worker_round(DATABASE);
    assert!(d.tick().notify);
    let (queue, at_us) = (d.queue, d.now.mono_us + SECOND_US);
    d.arena().news_told(queue, false, at_us);
    d.publish(2);
    assert_eq!(d.arena().worker_sleep(DATABASE, NEVER_US), at_us);
    let tick = d.tick();
    assert_eq!((tick.notify, tick.next_us), (false, at_us));
    d.pass(SECOND_US);
    d.arena().worker_round(DATABASE);
    assert!(d.tick().notify);
    // It failed: the worker, which has looked at its queues already, comes again in time.
    let at_us = d.now.mono_us + SECOND_US;
    d.arena().news_told(queue, true, at_us);
    assert_eq!(d.arena().worker_sleep(DATABASE, NEVER_US), at_us);
    d.pass(SECOND_US);
    assert!(d.tick().notify);
}

#[test]
fn news_comes_of_delays_loads_marks_releases_and_leases_that_end() {
    let mut d = Desk::new(32, 8, 8);
    let (queue, now) = (d.queue, d.now);
    assert!(d.arena().listeners_set(DATABASE));
    d.memory.arena().queue_mark(queue, 5, &mut d.fx);
    assert!(d.tick().notify, "a mark");
    assert_eq!(d.arena().load_begin(queue, 2), LoadStart::From(5));
    assert!(!d.tick().notify);
    d.load_row(row(5));
    d.memory.arena().load_end(queue, 2, NO_MARK, &mut d.fx);
    assert!(d.tick().notify, "a load");
    let taken = d.take_one();
    d.pass(30 * SECOND_US);
    assert!(d.tick().notify, "a lease that ended");
    let again = d.take_one();
    assert_eq!(again.msg_id, taken.msg_id);
    d.release(again);
    assert!(d.tick().notify, "a release");
    let again = d.take_one();
    d.memory.arena().put_off(queue, again, now.mono_us + 40 * SECOND_US, &mut d.fx);
    assert!(!d.tick().notify);
    d.pass(10 * SECOND_US);
    assert!(d.tick().notify, "a delay that is over");
    let again = d.take_one();
    d.give_back(again);
    assert!(d.tick().notify, "a read that rolled back");
    d.reconfigure(Policy { max_deliveries: 1, ..Policy::DEFAULT });
    d.tick();
    d.publish_row(Row { count: 1, ..row(6) }, Change::Insert);
    assert!(!d.tick().notify, "exhausted is not ready");
}

#[test]
fn news_of_a_paused_queue_is_told_when_it_is_resumed() {
    for is_under_a_mark in [false, true] {
        let mut d = Desk::new(16, 2, 8);
        let queue = d.queue;
        assert!(d.arena().listeners_set(DATABASE));
        d.reconfigure(Policy { paused: true, ..Policy::DEFAULT });
        if is_under_a_mark {
            d.memory.arena().queue_mark(queue, 1, &mut d.fx);
        } else {
            d.publish(1);
        }
        assert!(!d.tick().notify);
        d.reconfigure(Policy::DEFAULT);
        assert!(d.tick().notify, "{is_under_a_mark}");
        assert!(!d.tick().notify);
    }
}

#[test]
fn news_that_is_not_told_yet_waits_while_the_queue_is_paused() {
    let mut d = Desk::new(16, 2, 8);
    assert!(d.arena().listeners_set(DATABASE));
    d.publish(1);
    d.reconfigure(Policy { paused: true, ..Policy::DEFAULT });
    assert!(!d.tick().notify);
    d.reconfigure(Policy::DEFAULT);
    assert!(d.tick().notify);
}

#[test]
fn listeners_are_remembered_over_a_reset_and_a_new_worker() {
    let mut d = Desk::new(16, 2, 8);
    assert!(d.arena().listeners_set(DATABASE));
    assert!(d.arena().worker_set(DATABASE, WORKER));
    d.memory.arena().reset(Config { slots_min: 2, window: 8 }, 42, &mut d.fx);
    assert!(d.arena().worker_set(DATABASE, NIL));
    assert!(d.arena().worker_set(DATABASE, WORKER));
    assert!(d.arena().has_listeners(DATABASE));
    d.queue = d.attach(100);
    d.tick();
    d.publish(1);
    assert!(d.tick().notify);
    d.arena().worker_forget(DATABASE);
    assert!(!d.arena().has_listeners(DATABASE));
}

#[test]
fn workers_wake_wakes_each_worker_and_has_it_look_around() {
    let mut d = Desk::new(16, 2, 8);
    assert!(d.arena().worker_set(DATABASE, WORKER));
    assert!(d.arena().worker_set(2, WORKER + 1));
    assert!(d.arena().worker_set(3, NIL));
    for database in 1..=3 {
        d.arena().worker_round(database);
        d.arena().worker_sleep(database, NEVER_US);
    }
    d.memory.arena().workers_wake(&mut d.fx);
    assert_eq!(d.woken(), [WORKER, WORKER + 1]);
    for database in 1..=3 {
        assert!(d.arena().worker_round(database), "{database}");
        assert!(!d.arena().worker_round(database));
    }
}
