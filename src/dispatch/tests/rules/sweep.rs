//! Rows of leases that are over.

use crate::desk::*;

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
        assert_eq!(d.arena().sweep_begin(queue), how == 3, "nothing is recounted but what was truncated");
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

#[test]
fn row_written_while_its_table_was_truncated_goes_though_its_id_came_anew() {
    for is_back in [false, true] {
        let mut d = Desk::new(16, 2, 8);
        let queue = d.queue;
        d.publish(1);
        d.publish(2);
        d.take_for(2, 30, SECOND_US);
        d.pass(SECOND_US);
        let in_flight = d.walk(8);
        while !d.memory.arena().queue_clear(queue, 2, &mut d.fx) {}
        d.publish(2);
        d.take_for(1, 60, SECOND_US);
        if is_back {
            d.publish(1);
        }
        d.written(&in_flight[0], Written::Whole);
        assert!(d.is_swept());
        assert!(d.arena().sweep_begin(queue));
        assert_eq!(d.fate(1, 1), RowFate::Recount(0));
        d.write_all();
        assert_eq!(d.fate(2, 1), RowFate::Keep, "the lease of a new message");
    }
}

#[test]
fn row_of_a_delivery_that_was_released_for_later_is_deleted_and_its_slot_stays_until_then() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    d.publish(1);
    let taken = d.take_for(1, 3600, 0)[0];
    d.write_all();
    d.quiet();
    d.worker_sleeps();
    d.pin(1, Fence::Lease(taken.lease_id), 5);
    // Its own row has one less than the lease's.
    d.memory.arena().pin_refile(queue, due(1, 1200 * SECOND_US), 5, now, &mut d.fx);
    assert_eq!(d.state(1), Some(State::Delayed), "though it is due late");
    assert_eq!(d.woken(), [WORKER], "it would sleep for long");
    assert!(d.is_swept());
    assert!(d.arena().sweep_begin(queue));
    assert_eq!(d.fate(1, 1), RowFate::Recount(0));
    assert_eq!(d.fate(1, 1), RowFate::Recount(0), "until that is committed");
    let now = d.now;
    d.memory.arena().row_is_corrected(queue, 1, 0, now, &mut d.fx);
    assert_eq!((d.state(1), d.arena().slots_free()), (None, 16), "it is due late");
    d.arena().check().unwrap();
    assert_eq!(d.tick().next_us, now.mono_us + 1185 * SECOND_US, "and scanned for in time");
}

#[test]
fn row_of_a_count_that_was_lowered_by_hand_is_recounted() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.publish_row(Row { count: 3, ..row(1) }, Change::Insert);
    d.take_for(1, 1, 0);
    d.write_all();
    d.pass(SECOND_US);
    d.tick();
    d.publish_row(row(1), Change::Update);
    assert!(d.is_swept());
    assert!(d.arena().sweep_begin(queue));
    assert_eq!(d.fate(1, 4), RowFate::Recount(0));
}

#[test]
fn row_of_a_lease_that_ended_before_its_time_loses_its_deadline() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.publish(1);
    let taken = d.take_for(1, 3600, 0)[0];
    d.write_all();
    assert_eq!(d.fate(1, 1), RowFate::Keep);
    let until_us = d.now.mono_us;
    d.memory.arena().shorten(queue, 1, taken.lease_id, until_us, &mut d.fx);
    d.tick();
    assert_eq!(d.state(1), Some(State::Ready));
    assert!(d.is_swept());
    assert!(d.arena().sweep_begin(queue));
    assert_eq!(d.fate(1, 1), RowFate::Recount(1));
    let now = d.now;
    d.memory.arena().row_is_corrected(queue, 1, 1, now, &mut d.fx);
    assert_eq!(d.fate(1, 1), RowFate::Keep, "once");
}

#[test]
fn row_of_a_lease_that_was_shortened_while_it_was_written_loses_its_deadline() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.publish(1);
    let taken = d.take_for(1, 3600, 0)[0];
    let in_flight = d.walk(8);
    let until_us = d.now.mono_us;
    d.memory.arena().shorten(queue, 1, taken.lease_id, until_us, &mut d.fx);
    d.written(&in_flight[0], Written::Whole);
    d.tick();
    assert_eq!(d.state(1), Some(State::Ready));
    assert!(d.is_swept());
    assert!(d.arena().sweep_begin(queue));
    assert_eq!(d.fate(1, 1), RowFate::Recount(1));
}

#[test]
fn worker_that_sleeps_for_long_is_called_to_correct_rows() {
    let mut d = Desk::new(16, 2, 8);
    d.publish(1);
    let taken = d.take_for(1, 3600, 0)[0];
    d.write_all();
    d.quiet();
    d.worker_sleeps();
    d.release(taken);
    assert_eq!(d.woken(), [WORKER]);
    let now_us = d.now.mono_us;
    assert_eq!(d.tick().next_us, now_us + SWEEP_US);
}
