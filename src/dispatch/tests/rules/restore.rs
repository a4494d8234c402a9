//! Leases that come back after memory was lost.

use crate::desk::*;

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
