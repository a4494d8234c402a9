//! Leases that are to be written.

use crate::desk::*;

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
        let state = d.arena().lease_count(queue, 1, taken.lease_id);
        assert_eq!(state, LeaseCount::Open, "a smaller one is written");
        assert!(d.tick().flush);
        assert_eq!(d.walk(8)[0].count, 5);
        d.write_all();
        assert_eq!(d.arena().lease_count(queue, 1, taken.lease_id), LeaseCount::Written);
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
fn lease_count_tells_a_written_count_from_a_lease_that_is_over() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    d.publish(1);
    let taken = d.take_for(1, 30, 0)[0];
    assert_eq!(d.arena().lease_count(queue, 1, taken.lease_id), LeaseCount::Open);
    assert_eq!(d.arena().lease_count(queue, 1, taken.lease_id + 1), LeaseCount::Over);
    assert_eq!(d.arena().lease_count(queue, 2, taken.lease_id), LeaseCount::Gone);
    d.pin(1, Fence::Lease(taken.lease_id), 5);
    assert_eq!(d.arena().lease_count(queue, 1, taken.lease_id), LeaseCount::Open);
    let rows = d.walk(8);
    d.written(&rows[0], Written::Count);
    assert_eq!(d.arena().lease_count(queue, 1, taken.lease_id), LeaseCount::Written);
    d.undo(1, 5);
    assert_eq!(d.arena().lease_count(queue, 1, taken.lease_id), LeaseCount::Written);
    d.pass(30 * SECOND_US);
    let next = d.take_for(1, 30, 0)[0];
    assert_eq!(d.arena().lease_count(queue, 1, taken.lease_id), LeaseCount::Over);
    let state = d.arena().lease_count(queue, 1, next.lease_id);
    assert_eq!(state, LeaseCount::Open, "the row is the earlier one's");
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
    assert_eq!(d.arena().lease_count(queue, 1, 5), LeaseCount::Over, "of an arena that is gone");
}

#[test]
fn restored_lease_that_is_extended_before_anybody_reads_is_written() {
    let mut d = Desk::new(16, 2, 8);
    d.quiet();
    d.queue = d.attach(101);
    let (queue, now) = (d.queue, d.now);
    let until_us = now.mono_us + 60 * SECOND_US;
    let lease = LeaseRow {
        msg_id: 1,
        lease_id: 77,
        count: 1,
        until_us,
        written: Written::Whole,
        ..LeaseRow::default()
    };
    assert!(d.memory.arena().lease_restore(queue, &lease, row(1), now, &mut d.fx));
    assert!(d.walk(8).is_empty());
    let later_us = now.mono_us + 7200 * SECOND_US;
    let extended = d.memory.arena().extend(queue, 1, Fence::Lease(77), later_us, now, &mut d.fx);
    assert_eq!(extended, Some((later_us, 77)));
    assert!(d.tick().flush);
    assert_eq!(d.walk(8).iter().map(|row| row.until_us).collect::<Vec<_>>(), [later_us]);
}
