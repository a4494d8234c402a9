//! One test for each rule of PROTOCOL.md that lives in this crate. Backends are numbers, time is an argument.

mod common;

use std::collections::HashSet;

use common::Memory;
use queue_dispatch::{
    backoff_us, Arena, Change, Config, Effects, Fence, Lease, LoadRow, LoadStart, Now, Pin, Policy, QueueRef,
    Row, ScanStart, Settled, State, Taken, Tid, EFFECTS_MAX, NEVER_US, NIL, NO_MARK,
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
