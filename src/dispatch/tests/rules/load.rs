//! Loads and scans, and what is published while they run.

use crate::desk::*;

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
fn load_abort_leaves_the_mark_where_the_load_has_come_to() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    d.memory.arena().queue_mark(queue, 10, &mut d.fx);
    d.arena().load_begin(queue, 2);
    d.wait(3);
    d.woken();
    d.memory.arena().load_abort(queue, 2, now, &mut d.fx);
    assert_eq!((d.mark(), d.woken()), (10, vec![3]));
    d.arena().load_begin(queue, 2);
    d.load_row(row(10));
    d.load_row(due(14, 3_600 * SECOND_US)); // gets no slot, and needs none
    d.memory.arena().load_abort(queue, 2, now, &mut d.fx);
    assert_eq!(d.mark(), 15);
    assert_eq!(d.take_one().msg_id, 10);
}

#[test]
fn load_abort_goes_back_to_what_was_published_meanwhile() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    d.memory.arena().queue_mark(queue, 10, &mut d.fx);
    d.arena().load_begin(queue, 2);
    d.load_row(row(20));
    d.memory.arena().queue_mark(queue, 12, &mut d.fx);
    d.memory.arena().load_abort(queue, 2, now, &mut d.fx);
    assert_eq!(d.mark(), 12);
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
fn scan_needed_is_true_of_what_another_scans_for_once_it_is_due() {
    let mut d = Desk::new(16, 2, 8);
    let (queue, now) = (d.queue, d.now);
    d.publish_row(due(1, SECOND_US), Change::Insert);
    assert!(matches!(d.arena().scan_begin(queue, 2, now), ScanStart::Range { .. }));
    assert!(!d.arena().scan_needed(queue, now), "not yet due");
    d.now = Now { mono_us: now.mono_us + SECOND_US, wall_us: now.wall_us + SECOND_US };
    let now = d.now;
    assert!(d.arena().scan_needed(queue, now));
    assert_eq!(d.arena().scan_begin(queue, 3, now), ScanStart::Busy);
    assert_eq!(d.load_row(due(1, 0)), LoadRow::Known);
    d.memory.arena().scan_end(queue, 2, now.wall_us + SECOND_US, NEVER_US, now, &mut d.fx);
    assert!(!d.arena().scan_needed(queue, now) && d.arena().has_ready(queue));
}

#[test]
fn load_ask_is_remembered_only_where_somebody_will_see_to_it() {
    let mut d = Desk::new(16, 2, 4);
    let queue = d.queue;
    d.memory.arena().queue_mark(queue, 1, &mut d.fx);
    d.memory.arena().load_ask(queue, &mut d.fx); // there is no worker
    assert!(d.arena().worker_set(DATABASE, WORKER));
    assert!(!d.tick().load);
    d.arena().load_begin(queue, 2);
    d.memory.arena().load_end(queue, 2, NO_MARK, &mut d.fx);
    d.memory.arena().load_ask(queue, &mut d.fx); // there is no mark any more
    d.memory.arena().queue_mark(queue, 5, &mut d.fx);
    assert!(!d.tick().load);
    d.memory.arena().load_ask(queue, &mut d.fx);
    assert!(d.tick().load);
    // Where there is no room it is asked anew by whoever makes some.
    d.arena().load_begin(queue, 2);
    (1..=4).for_each(|id| assert_eq!(d.load_row(row(id)), LoadRow::Known));
    assert_eq!(d.load_row(row(5)), LoadRow::Full);
    d.memory.arena().load_ask(queue, &mut d.fx);
    d.memory.arena().load_end(queue, 2, 5, &mut d.fx);
    assert!(!d.tick().load);
    d.worker_sleeps();
    d.woken();
    d.take(4);
    assert_eq!(d.woken(), [WORKER]);
    assert!(d.tick().load);
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

#[test]
fn highest_id_of_all_is_taken_whether_there_is_a_mark_room_or_a_load() {
    // It is also what no mark is written as.
    let highest = i64::MAX;
    let load = |d: &mut Desk| {
        let queue = d.queue;
        assert!(d.arena().load_needed(queue));
        assert!(matches!(d.arena().load_begin(queue, 2), LoadStart::From(_)));
        assert_eq!(d.load_row(row(highest)), LoadRow::Known);
        d.memory.arena().load_end(queue, 2, NO_MARK, &mut d.fx);
        assert_eq!((d.take_one().msg_id, d.mark()), (highest, NO_MARK));
    };
    // Without a mark.
    let mut d = Desk::new(16, 2, 1);
    d.publish(highest);
    assert_eq!(d.take_one().msg_id, highest);
    // Without room; and where it is the first that a load has no room for.
    for is_loaded in [false, true] {
        let mut d = Desk::new(16, 2, 1);
        let queue = d.queue;
        if is_loaded {
            d.memory.arena().queue_mark(queue, 1, &mut d.fx);
            d.arena().load_begin(queue, 2);
            assert_eq!(d.load_row(row(1)), LoadRow::Known);
            assert_eq!(d.load_row(row(highest)), LoadRow::Full);
            d.memory.arena().load_end(queue, 2, mark_at(highest), &mut d.fx);
        } else {
            d.publish(1);
            d.publish(highest);
        }
        assert_eq!(d.take_one().msg_id, 1);
        load(&mut d);
    }
    // A load that ended early just below it.
    let mut d = Desk::new(16, 2, 4);
    let (queue, now) = (d.queue, d.now);
    d.memory.arena().queue_mark(queue, 1, &mut d.fx);
    d.arena().load_begin(queue, 2);
    d.load_row(row(highest - 1));
    d.memory.arena().load_abort(queue, 2, now, &mut d.fx);
    assert_eq!(d.take_one().msg_id, highest - 1);
    load(&mut d);
    // Due later, met by a load.
    let mut d = Desk::new(16, 2, 4);
    let (queue, now) = (d.queue, d.now);
    d.memory.arena().queue_mark(queue, 1, &mut d.fx);
    d.arena().load_begin(queue, 2);
    d.load_row(due(highest, SECOND_US));
    d.memory.arena().load_end(queue, 2, NO_MARK, &mut d.fx);
    assert!(matches!(d.arena().scan_begin(queue, 2, now), ScanStart::Range { .. }));
}

#[test]
fn exhausted_messages_without_room_keep_no_others() {
    let mut d = Desk::new(64, 2, 4);
    let queue = d.queue;
    assert!(d.arena().worker_set(DATABASE, WORKER));
    d.reconfigure(Policy { max_deliveries: 2, ..Policy::DEFAULT });
    d.arena().queue_mark_all(queue, &mut Effects::new());
    assert_eq!(d.arena().load_begin(queue, 3), LoadStart::From(i64::MIN));
    for msg_id in 1..=6 {
        assert_eq!(d.load_row(Row { count: 2, ..row(msg_id) }), LoadRow::Known);
    }
    assert_eq!(d.load_row(row(7)), LoadRow::Known);
    d.memory.arena().load_end(queue, 3, NO_MARK, &mut d.fx);
    assert_eq!((d.state(4), d.state(5), d.mark()), (Some(State::Exhausted), None, NO_MARK));
    d.publish_row(Row { count: 2, ..row(8) }, Change::Update);
    d.publish(9);
    assert_eq!(d.take(9).iter().map(|one| one.msg_id).collect::<Vec<_>>(), [7, 9]);
    d.tick();
    assert_eq!(d.mark(), NO_MARK, "the half of the window is not free");
    for msg_id in [1, 2] {
        assert!(matches!(d.pin(msg_id, Fence::Any, 5), Pin::Done(_)));
        d.finish(msg_id, 5);
    }
    assert!(d.tick().load);
    assert_eq!(d.mark(), 5);
}

#[test]
fn load_that_was_cancelled_is_the_workers_from_where_it_came_to() {
    let mut d = Desk::new(64, 2, 16);
    let (queue, now) = (d.queue, d.now);
    assert!(d.arena().worker_set(DATABASE, WORKER));
    d.arena().queue_mark_all(queue, &mut Effects::new());
    d.tick();
    assert_eq!(d.arena().load_begin(queue, 3), LoadStart::From(i64::MIN));
    d.arena().load_reached(queue, 3, 1_000); // all dead up to here
    d.memory.arena().load_abort(queue, 3, now, &mut d.fx);
    assert_eq!(d.mark(), 1_000);
    assert!(d.tick().load);
}

#[test]
fn load_brings_forward_what_waits_and_was_changed_by_a_prepared_transaction() {
    let mut d = Desk::new(16, 2, 8);
    let queue = d.queue;
    // A horizon that is a minute away.
    d.publish_row(due(9, SECOND_US), Change::Insert);
    let now = d.now;
    let ScanStart::Range { until_us, .. } = d.arena().scan_begin(queue, 0, now) else { panic!("no scan") };
    d.memory.arena().scan_end(queue, 0, until_us, NEVER_US, now, &mut d.fx);
    for id in 1..=3 {
        d.publish_row(due(id, 30 * SECOND_US), Change::Insert);
    }
    d.memory.arena().queue_mark(queue, 1, &mut d.fx);
    assert_eq!(d.arena().load_begin(queue, 0), LoadStart::From(1));
    let elsewhere = Tid { block: 90, offset: 2 };
    assert_eq!(d.load_row(Row { tid: elsewhere, ..row(1) }), LoadRow::Known);
    assert_eq!(d.load_row(Row { tid: elsewhere, ..due(2, 10 * SECOND_US) }), LoadRow::Known);
    assert_eq!(d.load_row(row(3)), LoadRow::Known); // where it was: it waits for other reasons than its row's
    d.memory.arena().load_end(queue, 0, NO_MARK, &mut d.fx);
    d.arena().check().unwrap();
    let states = [1, 2, 3].map(|id| d.state(id));
    assert_eq!(states, [Some(State::Ready), Some(State::Delayed), Some(State::Delayed)]);
    d.pass(10 * SECOND_US);
    assert_eq!(d.take(3).iter().map(|taken| taken.msg_id).collect::<Vec<_>>(), [1, 2]);
}
