//! Who has a slot: promises, eviction, hunger, whole queues.

use crate::desk::*;

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
