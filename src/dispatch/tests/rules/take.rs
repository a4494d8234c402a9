//! Publishing and taking; what becomes of a delivery that its row, or a rollback, takes back.

use crate::desk::*;

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

#[test]
fn deliveries_within_the_senders_transaction_count_whoever_named_the_message_meanwhile() {
    for ends in [Desk::finish, Desk::undo] {
        let mut d = Desk::new(16, 2, 8);
        let queue = d.queue;
        assert!(matches!(d.pin(7, Fence::Any, 5), Pin::Done(_)), "before it is there");
        d.publish(7);
        d.memory.arena().count_own(queue, 7, 2, &mut d.fx);
        ends(&mut d, 7, 5);
        assert_eq!(d.take_one().count, 3);
    }
}

#[test]
fn pin_withdrawn_is_no_lease_and_no_delivery() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    for ends in [Desk::undo, Desk::finish] {
        d.publish(1);
        let taken = d.take_one();
        assert!(d.memory.arena().pin_withdrawn(queue, taken, 5, &mut d.fx));
        assert!(!d.memory.arena().pin_withdrawn(queue, taken, 6, &mut d.fx), "once");
        d.arena().check().unwrap();
        for fence in [Fence::Any, Fence::Lease(taken.lease_id)] {
            assert_eq!(d.memory.arena().extend(queue, 1, fence, now.mono_us, now, &mut d.fx), None);
        }
        assert_eq!(d.pin(1, Fence::Any, 6), Pin::Busy);
        ends(&mut d, 1, 5);
    }
    assert_eq!((d.state(1), d.arena().slots_free()), (None, 16), "it was not there");
    d.publish(1);
    assert_eq!(d.take_one().count, 1);
}

#[test]
fn pin_withdrawn_of_what_comes_meanwhile_does_not_lose_it() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.publish(1);
    let taken = d.take_one();
    d.publish(1); // after its reader's snapshot, before he says that it is not there
    assert!(d.memory.arena().pin_withdrawn(queue, taken, 5, &mut d.fx));
    d.finish(1, 5);
    assert_eq!(d.state(1), Some(State::Ready));
}

/// Two queues, eight slots, one promised to each of four: this one has four of its own messages read, the other one has
/// taken what is left.
fn held_in_a_full_arena(held: usize) -> Desk {
    let mut d = Desk::new(8, 1, 8);
    let queue = d.queue;
    assert_eq!(d.arena().hold(queue, held), held);
    d.queue = d.attach(101);
    (1..=8).for_each(|msg_id| d.publish(msg_id));
    d.take(8);
    d.arena().check().unwrap();
    d.queue = queue;
    assert_eq!(d.arena().hold(queue, 1), 0, "there is no room for more");
    d
}

#[test]
fn hold_keeps_a_slot_for_the_lease_of_what_is_not_committed_yet() {
    let mut d = held_in_a_full_arena(4);
    let (queue, now) = (d.queue, d.now);
    let lease = Lease { until_us: now.mono_us + SECOND_US, pid: 1, lxid: 0, flush_us: NEVER_US };
    for msg_id in 1..=4 {
        let lease_id = d.arena().lease_id_next();
        d.memory.arena().unhold(queue, &mut d.fx);
        d.memory.arena().publish_leased(queue, row(msg_id), lease_id, lease, now, &mut d.fx);
        d.arena().check().unwrap();
        assert_eq!(d.arena().view(queue, msg_id).unwrap().lease_id, lease_id);
    }
}

#[test]
fn hold_keeps_a_slot_for_the_count_of_what_is_not_committed_yet() {
    let mut d = held_in_a_full_arena(2);
    let (queue, now) = (d.queue, d.now);
    let far = Row { visible_at_us: Some(WALL_US + 9 * 3600 * SECOND_US), ..row(2) };
    for row in [row(1), far] {
        d.memory.arena().unhold(queue, &mut d.fx);
        d.memory.arena().publish_counted(queue, row, 3, now, &mut d.fx);
        d.arena().check().unwrap();
    }
    let stands = |view: View| (view.state, view.count);
    assert_eq!(
        [1, 2].map(|id| d.arena().view(queue, id).map(stands)),
        [Some((State::Ready, 3)), Some((State::Delayed, 3))]
    );
    assert_eq!(d.take_one().count, 4);
}

#[test]
fn hold_that_is_not_needed_is_room_again() {
    let mut d = held_in_a_full_arena(4);
    let (queue, free) = (d.queue, d.arena().slots_free());
    for _ in 0..5 {
        d.memory.arena().unhold(queue, &mut d.fx); // once too often does nothing
        d.arena().check().unwrap();
    }
    assert_eq!(d.arena().slots_free(), free + 4);
    d.publish(1);
    assert_eq!(d.state(1), Some(State::Ready));
}

#[test]
fn hold_ends_with_its_queue() {
    let mut d = held_in_a_full_arena(4);
    let queue = d.queue;
    assert!(d.memory.arena().queue_detach(DATABASE, 100, 8, &mut d.fx));
    d.arena().check().unwrap();
    let successor = d.attach(102);
    for _ in 0..4 {
        d.memory.arena().unhold(queue, &mut d.fx);
        d.arena().check().unwrap();
    }
    d.queue = successor;
    assert_eq!(d.arena().hold(successor, 8), 4);
    d.arena().check().unwrap();
}

#[test]
fn deliveries_within_the_senders_transaction_use_up_those_allowed() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.reconfigure(Policy { max_deliveries: 2, ..Policy::DEFAULT });
    d.publish(1);
    d.memory.arena().count_own(queue, 1, 2, &mut d.fx);
    d.arena().check().unwrap();
    assert_eq!(d.state(1), Some(State::Exhausted));
    assert!(d.take(1).is_empty());
}

#[test]
fn deliveries_within_the_senders_transaction_are_not_forgotten_for_want_of_room() {
    let mut d = Desk::new(8, 1, 8);
    let queue = d.queue;
    (1..=4).for_each(|msg_id| d.publish(msg_id));
    d.memory.arena().count_own(queue, 4, 1, &mut d.fx);
    d.queue = d.attach(101);
    (1..=8).for_each(|msg_id| d.publish(msg_id));
    d.queue = queue;
    assert_eq!(
        [1, 2, 3, 4].map(|msg_id| d.state(msg_id).is_some()),
        [true, true, false, true],
        "the row of 4 does not know"
    );
}

#[test]
fn message_whose_id_came_anew_does_not_inherit_what_was_known_of_the_old_one() {
    let mut d = Desk::new(16, 2, 8);
    d.reconfigure(Policy { retry_jitter: 0.0, retry_delay_us: 3600 * SECOND_US, ..Policy::DEFAULT });
    d.publish(1);
    for _ in 0..2 {
        let one = d.take_one();
        d.give_back(one);
    }
    assert_eq!(d.state(1), Some(State::Delayed));
    d.publish(1); // its own sender, late
    assert_eq!(d.state(1), Some(State::Delayed));
    d.publish_row(Row { tid: Tid { block: 9, offset: 3 }, ..row(1) }, Change::Insert);
    assert_eq!(d.take_one().count, 1);
}
