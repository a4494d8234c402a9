//! What expires, and who listens.

use crate::desk::*;

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
fn expiry_begin_tells_what_was_known() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    assert_eq!(d.arena().expiry_begin(queue), i64::MIN, "nothing");
    d.memory.arena().expires_at(queue, WALL_US + 9, now, &mut d.fx);
    d.memory.arena().expires_at(queue, WALL_US + 7, now, &mut d.fx);
    d.memory.arena().expires_at(queue, WALL_US + 8, now, &mut d.fx);
    assert_eq!(d.arena().expiry_begin(queue), WALL_US + 7);
    assert_eq!(d.arena().expiry_begin(queue), NEVER_US, "that nothing does, until somebody tells");
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
