//! Waiting: a reader sleeps on its latch until the commit that made a message ready wakes it, or until the next thing
//! is due. Owns the sleep, and `CALL queue_wait`, which only waits.
//!
//! A sleeper holds no lock on the tables (unless its transaction had one before) and is in the dispatcher's lists; its
//! abort callback takes it out again. `CALL queue_wait` outside a transaction block holds no snapshot either, so it
//! keeps no vacuum from its work.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Value};
use crate::pg::table::{self, AccessShareLock};
use crate::pg::user::Right;
use crate::pg::{clock, latch, shmem, xact};
use crate::queue::resolve::{self, Queue};
use crate::queue::take::{bring_in, has_ready, own_next_us, Loads, Next, AWAIT_US};
use crate::queue::{args, journal};
use crate::settings::{self, SECOND_US};
use queue_dispatch::{Now, QueueRef, NEVER_US};
use std::rc::Rc;

/// When a call that began at `start_us` must have ended, for its statement would be cancelled soon after. On the clock
/// that never jumps.
pub fn strikes_us(start_us: i64, now: Now) -> i64 {
    latch::statement_deadline_us().map_or(NEVER_US, |at| {
        let at_us = now.mono_of(at);
        // A fifth of what there is, at most this: a busy server wakes us late.
        const MARGIN_MAX_US: i64 = 100_000;
        at_us - (at_us.saturating_sub(start_us) / 5).clamp(0, MARGIN_MAX_US)
    })
}

/// Sleeps until one of the queues may have something, at most until `until_us`.
pub fn sleep(queues: &[Rc<Queue>], until_us: i64) -> Result<()> {
    let me = latch::my_proc();
    // (What has become ready in a table that this transaction has emptied is not there for it.)
    let is_there = |queue: &&Rc<Queue>| !journal::is_emptied_here(queue.relation);
    let places: Vec<QueueRef> = queues.iter().filter(is_there).map(|queue| queue.at()).collect();
    // Registered first: whatever becomes ready from here on wakes us. Then a last look.
    journal::waiting(true);
    let (next_us, now_us) = shmem::with_arena(|arena, now, fx| {
        arena.wait_begin(me, &places, fx);
        let next_us = places.iter().map(|at| arena.next_event_us(*at, now)).min().unwrap_or(NEVER_US);
        (next_us, now.mono_us)
    })?;
    if next_us <= now_us {
        return Ok(());
    }
    crate::wait_point!("wait-sleep");
    // The worker is on time; should it not be, a reader sees to what is due itself, a little later.
    const WORKER_GRACE_US: i64 = 25_000;
    let until_us = until_us.min(next_us.saturating_add(WORKER_GRACE_US));
    // As long as nothing of ours wakes it, it keeps its place: the server sets latches for its own reasons, too (all
    // of them when a database is dropped, say), and whoever begins anew is behind those who came later.
    let until_us = until_us.min(now_us.saturating_add(60 * SECOND_US));
    let mut left_us = until_us.saturating_sub(clock::now().mono_us);
    while left_us > 0 {
        latch::sleep(left_us.div_euclid(1_000) + 1, wait_event());
        let (is_over, now_us) = shmem::with_arena(|arena, now, _| (arena.wait_is_over(me), now.mono_us))?;
        left_us = if is_over { 0 } else { until_us.saturating_sub(now_us) };
    }
    Ok(())
}

fn wait_event() -> u32 {
    thread_local!(static EVENT: std::cell::OnceCell<u32> = const { std::cell::OnceCell::new() });
    EVENT.with(|event| *event.get_or_init(|| latch::wait_event(c"QueueRead")))
}

/// Leaves the lists of waiters after an attempt to take; a wake-up that is not used up goes on to the next.
pub fn leave() -> Result<()> {
    let me = latch::my_proc();
    shmem::with_arena(|arena, _, fx| arena.wait_end(me, fx))?;
    journal::waiting(false);
    Ok(())
}

/// Whether somebody holds a lock on one of several queues that one who was woken by another would have to wait for: then
/// he leaves first, so that his wake-up goes on. (Of a single queue the others would have to wait, too.)
pub fn would_block(names: &[String], mode: u32) -> bool {
    let is_locked = |name: &String| {
        resolve::find_table(name).is_some_and(|relation| {
            let is_free = table::try_lock(relation, mode);
            if is_free {
                table::unlock(relation, mode);
            }
            !is_free
        })
    };
    names.len() > 1 && names.iter().any(is_locked)
}

/// A waiter leaves for good. Where no worker is there to come when the next message is due, that is known
/// to the one who was woken when it was sent: another is to know it now.
pub fn passed_on(queues: &[Rc<Queue>]) -> Result<()> {
    for queue in queues {
        queue.with(|arena, at, _, fx| arena.wait_pass_on(at, fx))?;
    }
    Ok(())
}

/// How long a call waits at most, as it was asked and as the settings allow.
pub fn wait_us(args: &Args, position: usize) -> Result<i64> {
    let wait = args::duration(args.value(position), "wait", 0..=settings::DAY_US)?.unwrap_or(0);
    Ok(wait.min(settings::wait_max_us()))
}

/// The names of queues that a call waits for or reads from, each once.
pub fn queue_names(args: &Args, position: usize) -> Result<Vec<String>> {
    let (mut names, mut seen) = (Vec::new(), std::collections::HashSet::new());
    for name in args::array(args, position, "queues")? {
        let name = name.text().ok_or(Error::Null { argument: "queues", hint: None })?;
        if seen.insert(name.clone()) {
            names.push(name);
        }
    }
    if names.is_empty() || names.len() > settings::QUEUES_MAX {
        return Err(Error::argument(
            "queues",
            format!("{} names", names.len()),
            format!("1 to {}", settings::QUEUES_MAX),
        ));
    }
    Ok(names)
}

/// `CALL queue_wait`: the first of the queues that has something ready, or null after the time.
pub fn queue_wait(args: &Args) -> Result<Value> {
    let names = queue_names(args, 0)?;
    let wait_us = args::duration(args.value(1), "timeout", 0..=settings::DAY_US)?
        .ok_or(Error::Null { argument: "timeout", hint: None })?
        .min(settings::wait_max_us());
    let ready = wait(&names, wait_us, args.is_nonatomic_call())?;
    Ok(Value::record(&[("ready", Value::TEXT, ready.as_deref().map_or(Value::NULL, Value::of))]))
}

/// `drops_snapshots`: while it sleeps it holds none.
fn wait(names: &[String], wait_us: i64, drops_snapshots: bool) -> Result<Option<String>> {
    let start_us = clock::now().mono_us;
    let mut is_registered = false;
    let mut loads = Loads::new(names.len());
    loop {
        pgrx::check_for_interrupts!();
        if drops_snapshots {
            xact::ensure_snapshot();
        }
        if is_registered && would_block(names, AccessShareLock) {
            leave()?;
            is_registered = false;
        }
        let mut opened: Vec<Rc<Queue>> = Vec::with_capacity(names.len());
        for name in names {
            let queue = resolve::open(name, AccessShareLock)?;
            queue.check("wait for", &[Right::Select, Right::Update], "SELECT and UPDATE on its table")?;
            opened.push(queue);
        }
        let next = bring_in(&opened, start_us, false, &mut loads)?;
        let mut ready = None;
        for queue in &opened {
            let is_own = || own_next_us(std::slice::from_ref(queue), clock::now());
            if has_ready(queue)? || is_own()? <= clock::now().mono_us {
                ready = Some(queue.name.clone());
                break;
            }
        }
        // The wake-up goes on to one who reads only now: he would be faster than this look.
        if is_registered {
            leave()?;
            is_registered = false;
        }
        if ready.is_some() {
            // (Who reads now sees to what is due next.)
            opened.iter().for_each(|queue| queue.unlock(AccessShareLock));
            return Ok(ready);
        }
        opened.iter().for_each(|queue| queue.unlock(AccessShareLock));
        let now = clock::now();
        let until_us = match next {
            Next::TakeAgain => continue,
            Next::Await => now.mono_us.saturating_add(AWAIT_US),
            Next::Empty => start_us.saturating_add(wait_us),
        };
        let until_us = until_us.min(strikes_us(start_us, now));
        if now.mono_us >= until_us {
            passed_on(&opened)?;
            return Ok(None);
        }
        loads.begin_anew();
        is_registered = true;
        let until_us = until_us.min(own_next_us(&opened, now)?);
        if drops_snapshots {
            xact::drop_snapshots();
        }
        sleep(&opened, until_us)?;
    }
}
