//! What ends a delivery: finish, retry, release, extend.

use crate::desk::*;

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
