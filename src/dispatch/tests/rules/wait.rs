//! Who is woken, and the backoff.

use crate::desk::*;

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
fn worker_that_ends_has_one_of_each_queues_sleepers_look() {
    let mut d = Desk::new(32, 2, 16);
    assert!(d.arena().worker_set(DATABASE, WORKER));
    d.worker_sleeps();
    d.wait(1);
    d.wait(2);
    d.publish_row(due(1, SECOND_US), Change::Insert); // the worker's matter
    d.worker_sleeps();
    assert!(!d.woken().contains(&1));
    d.memory.arena().worker_end(DATABASE, &mut d.fx);
    assert_eq!(d.woken(), [1]);
    assert_eq!(d.arena().worker_proc(DATABASE), NIL);
}

#[test]
fn worker_that_ends_gives_its_place_back_unless_somebody_listens() {
    let mut d = Desk::new(32, 2, 16);
    let free = |d: &mut Desk| (2..).take_while(|oid| d.arena().worker_set(*oid, WORKER + 1)).count();
    assert!(d.arena().worker_set(DATABASE, WORKER));
    let others = free(&mut d);
    d.memory.arena().worker_end(DATABASE, &mut d.fx);
    assert!(d.arena().worker_set(1_000, WORKER), "after {others} others");
    assert!(!d.arena().worker_set(DATABASE, WORKER));
    d.memory.arena().worker_end(1_000, &mut d.fx);
    assert!(d.arena().listeners_set(DATABASE) && d.arena().worker_set(DATABASE, WORKER));
    d.memory.arena().worker_end(DATABASE, &mut d.fx);
    assert!(!d.arena().worker_set(1_000, WORKER) && d.arena().has_listeners(DATABASE));
}

#[test]
fn worker_that_ends_before_it_looked_why_it_was_called_leaves_marks() {
    for has_looked in [true, false] {
        let mut d = Desk::new(32, 2, 16);
        assert!(d.arena().worker_set(DATABASE, WORKER));
        d.arena().worker_round(DATABASE);
        d.memory.arena().worker_wake(DATABASE, &mut d.fx); // a prepared transaction was committed
        if has_looked {
            d.arena().worker_round(DATABASE);
        }
        d.memory.arena().worker_end(DATABASE, &mut d.fx);
        let queue = d.queue;
        assert_eq!(d.arena().load_needed(queue), !has_looked);
    }
}

#[test]
fn worker_that_ends_leaves_what_it_was_told_to_the_next() {
    let mut d = Desk::new(32, 2, 16);
    assert!(d.arena().worker_set(DATABASE, WORKER));
    d.publish(1);
    d.quiet();
    let queue = d.queue;
    d.arena().flush_begin(queue);
    d.arena().expiry_begin(queue);
    d.arena().sweep_begin(queue);
    d.memory.arena().worker_end(DATABASE, &mut d.fx);
    assert!(d.arena().worker_set(DATABASE, WORKER));
    let tick = d.tick();
    assert!(tick.is_new && tick.flush && tick.expire, "{tick:?}");
    d.pass(SWEEP_US);
    assert!(d.tick().sweep);
}

#[test]
fn look_ready_makes_ready_what_is_due() {
    let mut d = Desk::new(32, 2, 16);
    let queue = d.queue;
    d.publish(1);
    d.take_one();
    d.pass(30 * SECOND_US);
    let now = d.now;
    assert!(!d.arena().has_ready(queue));
    assert!(d.memory.arena().look_ready(queue, now, &mut d.fx));
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

#[test]
fn worker_that_is_awake_may_be_kept_so_one_sleeper_sees_to_what_is_due_itself() {
    let mut d = Desk::new(32, 2, 16);
    assert!(d.arena().worker_set(DATABASE, WORKER));
    d.worker_sleeps();
    d.wait(1);
    d.arena().worker_round(DATABASE);
    d.publish_row(due(1, SECOND_US), Change::Insert);
    assert_eq!(d.woken(), [WORKER, 1]);
}

#[test]
fn sleeper_that_leaves_tells_another_when_the_next_message_is_due() {
    let mut d = Desk::new(32, 2, 16);
    let queue = d.queue;
    d.wait(1);
    d.wait(2);
    d.publish_row(due(1, SECOND_US), Change::Insert);
    assert_eq!(d.woken(), [1]);
    d.leave(1);
    d.memory.arena().wait_pass_on(queue, &mut d.fx);
    assert_eq!(d.woken(), [2]);
    d.wait(2);
    assert!(d.woken().is_empty(), "it sleeps on, and knows");
    d.wait(3);
    d.memory.arena().wait_abort(2, &mut d.fx);
    assert_eq!(d.woken(), [3], "so it is for one who is cancelled");
}

#[test]
fn resumed_queue_has_a_sleeper_look_when_its_next_message_is_due() {
    let mut d = Desk::new(32, 2, 16);
    d.publish_row(due(1, SECOND_US), Change::Insert);
    d.reconfigure(Policy { paused: true, ..Policy::DEFAULT });
    d.wait(1);
    assert!(d.woken().is_empty());
    d.reconfigure(Policy::DEFAULT);
    assert_eq!(d.woken(), [1]);
}

#[test]
fn message_of_another_queue_wakes_its_sleeper_even_when_readers_fill_the_list() {
    let config = Config { slots_min: 1, window: 4096 };
    let mut memory = Memory::new(2, 4096, 1000, config, 1);
    let now = Now { mono_us: SECOND_US, wall_us: WALL_US };
    let mut fx = Effects::new();
    let queues = [100, 101].map(|relation| {
        let queue = memory.arena().queue_attach(DATABASE, relation, WALL_US).unwrap();
        assert!(memory.arena().queue_configure(queue, 0, Policy::DEFAULT));
        memory.arena().restore_begin(queue, 0);
        memory.arena().restore_end(queue, 0, &mut fx);
        memory.arena().load_begin(queue, 0);
        memory.arena().load_end(queue, 0, NO_MARK, &mut fx);
        queue
    });
    for proc in 0..999 {
        memory.arena().wait_begin(proc, &queues[..1], &mut fx);
    }
    memory.arena().wait_begin(999, &queues[1..], &mut fx);
    let mut fx = Effects::new();
    for id in 0..900 {
        memory.arena().publish(queues[0], row(id), Change::Insert, now, &mut fx);
    }
    assert!(!fx.is_everyone(), "those who are woken wake the rest");
    memory.arena().publish(queues[1], row(1), Change::Insert, now, &mut fx);
    assert!(fx.is_everyone());
    assert!(memory.arena().wait_is_over(999));
    memory.arena().check().unwrap();
}
