//! What consumers do: each function is one piece of work, chosen at random. Owns the ways to consume; the logging and
//! what an error means is [`super::actor`]'s.
//!
//! Messages of the queue `exact` are finished only together with the ledger, those of the others anyhow.

use std::time::Duration;

use super::actor::{Actor, Done, Failed, Held, Kept, DURABLE, EXACT, PLAIN, QUEUES};
use super::history::{Short, Unseen, Us, Verb};
use super::tally::{Kind, ALONE};
use super::{mortal, senders};

/// What the queues have as their visibility_timeout.
pub const LEASE_US: Us = 2_000_000;
/// Of what is kept while servers crash and come back: long enough to be written, and to be missed if it was not.
pub const LONG_LEASE_US: Us = 20_000_000;
/// When it is finished; well before its end, so that nothing excuses who gives it to somebody else.
const LONG_HELD_MS: std::ops::RangeInclusive<u64> = 6_000..=12_000;
/// Readings that one client keeps at a time.
const KEPT_MAX: usize = 12;
/// How many are finished at a time at the end of a round, at most, and at least.
pub const DRAINED_MAX: u64 = 500;
const DRAINED_MIN: u64 = 20;
/// Of those who ask for another one.
const SHORT_LEASE_MS: std::ops::RangeInclusive<u64> = 20..=400;

const READ: &str = "SELECT msg_id, lease_id, delivery_count, (message ->> 'k')::int8, $1, \
    is_altered(message, headers) FROM queue_read($1, $2, $3::int8 * interval '1 us', $4::int8 * interval '1 ms')";
const READ_ANY: &str = "SELECT msg_id, lease_id, delivery_count, (message ->> 'k')::int8, queue, \
    is_altered(message, headers) FROM queue_read_any($1, $2, wait => $3::int8 * interval '1 ms')";
const DELETE_AND_READ: &str = "SELECT msg_id, lease_id, delivery_count, (message ->> 'k')::int8, $1, \
    is_altered(message, headers) FROM queue_delete_and_read($1, $2, $3, quantity => $4, strict => $5)";
const DELETE_STRICTLY: &str = "SELECT queue_delete_batch($1, $2, $3, strict => true)";
const DELETE: &str = "SELECT queue_delete_batch($1, $2, $3)";
const ARCHIVE: &str = "SELECT queue_archive_batch($1, $2, $3)";
const RETRY: &str = "SELECT CASE outcome WHEN 'retried' THEN $2 END \
    FROM queue_retry($1, $2, $3, 'again', $4::int8 * interval '1 us')";
const RELEASE: &str = "SELECT queue_release($1, $2, $3, delay => nullif($4::int8, 0) * interval '1 us')";
const EXTEND: &str = "SELECT queue_extend_batch($1, $2, $3, $4::int8 * interval '1 us')";
const LEDGER: &str = "INSERT INTO ledger (key, lease_id) SELECT * FROM unnest($1::int8[], $2::int8[])";
const CONSUME_COMMITTING: &str = "CALL consume_committing($1)";
const POP: &str = "WITH popped AS MATERIALIZED (SELECT * FROM queue_pop('exact', $1)), \
    written AS (INSERT INTO ledger SELECT (message ->> 'k')::int8, lease_id, 'pop' FROM popped) \
    SELECT msg_id, lease_id, delivery_count, (message ->> 'k')::int8, 'exact', is_altered(message, headers) FROM popped";

const FINISH_DEEP: &str = "SELECT (unnest(finish_deep(1, $1, $2))).*";
/// Subtransactions within each other.
const DEPTH: u64 = 100;

const LEVELS: [&str; 5] =
    ["read committed", "read committed", "read committed", "repeatable read", "serializable"];

/// What a consumer has done after a while.
pub const KINDS: [Kind; 24] = [
    ("read", ALONE),
    ("read_waiting", ALONE),
    ("read_waiting", "read committed"),
    ("read_waiting", "repeatable read"),
    ("read_waiting", "serializable"),
    ("read_any", ALONE),
    ("pop", ALONE),
    ("consume_mortal", ALONE),
    ("finish_deep", ALONE),
    ("ledger", "read committed"),
    ("ledger", "repeatable read"),
    ("ledger", "serializable"),
    ("finish", ALONE),
    ("finish", "read committed"),
    ("finish", "repeatable read"),
    ("finish", "serializable"),
    ("commit", "repeatable read"),
    ("commit", "serializable"),
    ("delete_and_read", ALONE),
    ("delete_strictly_and_read", ALONE),
    ("consume_committing", ALONE),
    ("retry", ALONE),
    ("release", ALONE),
    ("extend", ALONE),
];

/// One piece of work of a consumer.
pub fn work(actor: &mut Actor) -> Done {
    finish_kept(actor, actor.world.now_us())?;
    match actor.rng.below(29) {
        0..=9 => exactly_once(actor),
        10 => rolled_back(actor),
        11 => in_procedure(actor),
        12 => popping(actor),
        13..=16 => at_least_once(actor),
        17 | 18 => chained(actor),
        19 => given_back(actor),
        20 => prolonged(actor),
        21 => too_late(actor),
        22 => own(actor),
        23 => long_held(actor),
        25 => deep(actor),
        26 | 27 => mortal::consume(actor),
        _ => any(actor),
    }
}

/// At the end of a round: nobody need wait until leases have ended.
pub fn end(actor: &mut Actor) -> Done {
    finish_kept(actor, Us::MAX)
}

fn name(queue: u8) -> &'static str {
    QUEUES[queue as usize]
}

/// At any level.
fn begin(actor: &mut Actor) -> Done {
    let level = actor.rng.pick(&LEVELS).copied().unwrap_or("read committed");
    actor.begin(level)
}

/// A few; now and then more than the dispatcher gives at one go.
fn quantity(actor: &mut Actor) -> u64 {
    if actor.rng.one_in(12) {
        600
    } else {
        actor.rng.between(1, 60)
    }
}

fn ids(held: &[Held]) -> (Vec<i64>, Vec<i64>) {
    held.iter().map(|one| (one.msg_id, one.lease_id)).unzip()
}

fn read(actor: &mut Actor, queue: u8, quantity: u64, lease_us: Us, wait_ms: u64) -> Done<Vec<Held>> {
    let call = if wait_ms > 0 { "read_waiting" } else { "read" };
    let numbers = [quantity as i64, lease_us as i64, wait_ms as i64];
    let began_us = actor.world.now_us();
    let result = actor.read(call, READ, &[&name(queue), &numbers[0], &numbers[1], &numbers[2]], lease_us);
    let returned_us = actor.world.now_us();
    match &result {
        Ok(held) => {
            // Without room for all a queue may have no more of it than it is promised, and that is given.
            let least = if actor.world.is_room_scarce() { 1 } else { quantity };
            if (held.len() as u64) < least {
                actor.log.short(Short { queue, began_us, returned_us });
            }
        }
        Err(failed) => unseen(actor, queue, began_us, lease_us, failed),
    }
    result
}

/// A call that takes has failed: with its session, its leases may last. With an ERROR all is undone.
fn unseen(actor: &mut Actor, queue: u8, from_us: Us, lease_us: Us, failed: &Failed) {
    /// A session's server may outlive what its client sees of it.
    const LINGERS_US: Us = 1_000_000;
    let now_us = actor.world.now_us();
    let to_us = match failed {
        Failed::Error => now_us,
        Failed::Session => now_us + lease_us + LINGERS_US,
    };
    actor.log.unseen(Unseen { queue, from_us, to_us });
}

/// The same of a call that does not say what it takes.
fn telling_nothing(actor: &mut Actor, call: impl FnOnce(&mut Actor) -> Done) -> Done {
    let from_us = actor.world.now_us();
    let result = call(actor);
    unseen(actor, EXACT, from_us, LEASE_US, result.as_ref().err().unwrap_or(&Failed::Error));
    result
}

fn finish(actor: &mut Actor, queue: u8, held: &[Held], sql: &'static str) -> Done<Vec<i64>> {
    let (msg_ids, lease_ids) = ids(held);
    let verb = if sql == ARCHIVE { Verb::Archive } else { Verb::Finish };
    actor.act("finish", sql, &[&name(queue), &msg_ids, &lease_ids], held, verb)
}

fn ledger(actor: &mut Actor, held: &[Held]) -> Done {
    // In one order, so that two who have the same messages do not wait for each other.
    let mut held = held.to_vec();
    held.sort_by_key(|one| one.key);
    let (numbers, leases): (Vec<i64>, Vec<i64>) = held.iter().map(|one| (one.key as i64, one.lease_id)).unzip();
    actor.effect(LEDGER, &[&numbers, &leases], &held)
}

/// The transaction that the README promises exactly once: read, effect, strict finish.
pub fn exactly_once(actor: &mut Actor) -> Done {
    let quantity = quantity(actor);
    begin(actor)?;
    if actor.rng.one_in(4) {
        actor.savepoint()?; // and the read within it
    }
    let held = read(actor, EXACT, quantity, LEASE_US, 20)?;
    if held.is_empty() {
        return actor.rollback();
    }
    match actor.rng.below(12) {
        0 => return actor.rollback(),
        1 => {
            actor.rollback_to_savepoint()?;
            return actor.commit();
        }
        _ => actor.release_savepoint()?,
    }
    if actor.rng.one_in(8) {
        // The effect fails and is caught; then once more.
        actor.savepoint()?;
        ledger(actor, &held)?;
        actor.rollback_to_savepoint()?;
    }
    ledger(actor, &held)?;
    finish(actor, EXACT, &held, DELETE_STRICTLY)?;
    if actor.rng.one_in(20) {
        std::thread::sleep(Duration::from_millis(actor.rng.between(1, 50)));
    }
    actor.commit()
}

fn rolled_back(actor: &mut Actor) -> Done {
    let queue = *actor.rng.pick(&[EXACT, PLAIN, DURABLE]).unwrap_or(&EXACT);
    begin(actor)?;
    let quantity = actor.rng.between(1, 5);
    let held = read(actor, queue, quantity, LEASE_US, 0)?;
    if !held.is_empty() && actor.rng.one_in(2) {
        // Finished and rolled back: it is there again.
        finish(actor, queue, &held, DELETE)?;
    }
    actor.rollback()
}

fn in_procedure(actor: &mut Actor) -> Done {
    // Nothing of it is logged: what it did is in the ledger.
    telling_nothing(actor, |actor| actor.committing("consume_committing", CONSUME_COMMITTING, &[&10_i64]))
}

fn popping(actor: &mut Actor) -> Done {
    let quantity = actor.rng.between(1, 20) as i64;
    telling_nothing(actor, |actor| actor.pop("pop", POP, &[&quantity], LEASE_US))
}

/// Reads, writes the ledger and finishes, each message in a subtransaction within that of the one before; from one
/// of them on all is undone.
fn deep(actor: &mut Actor) -> Done {
    let depth = actor.rng.between(2, DEPTH) as i64;
    let breaks_at = actor.rng.between(2, DEPTH) as i64;
    telling_nothing(actor, |actor| actor.pop("finish_deep", FINISH_DEEP, &[&depth, &breaks_at], LEASE_US))
}

fn at_least_once(actor: &mut Actor) -> Done {
    let queue = if actor.rng.one_in(5) { DURABLE } else { PLAIN };
    let quantity = quantity(actor);
    let held = read(actor, queue, quantity, LEASE_US, 10)?;
    if held.is_empty() {
        return Ok(());
    }
    let sql = if actor.rng.one_in(5) { ARCHIVE } else { DELETE };
    finish(actor, queue, &held, sql)?;
    Ok(())
}

/// The loop in one statement.
fn chained(actor: &mut Actor) -> Done {
    let quantity = actor.rng.between(5, 50) as i64;
    let is_strict = actor.rng.one_in(2);
    let mut held = read(actor, PLAIN, quantity as u64, LEASE_US, 0)?;
    for _ in 0..actor.rng.below(6) {
        if held.is_empty() {
            return Ok(());
        }
        let (msg_ids, lease_ids) = ids(&held);
        let parameters: [&(dyn postgres::types::ToSql + Sync); 5] =
            [&name(PLAIN), &msg_ids, &lease_ids, &quantity, &is_strict];
        let began_us = actor.world.now_us();
        let result = actor.act_and_read(DELETE_AND_READ, &parameters, &held, LEASE_US, is_strict);
        if let Err(failed) = &result {
            unseen(actor, PLAIN, began_us, LEASE_US, failed);
        }
        held = result?;
    }
    finish(actor, PLAIN, &held, DELETE)?;
    Ok(())
}

/// Retries or releases, and then tries to finish all the same: that must be refused.
fn given_back(actor: &mut Actor) -> Done {
    let queue = *actor.rng.pick(&[EXACT, PLAIN, DURABLE]).unwrap_or(&EXACT);
    let held = read(actor, queue, 3, LEASE_US, 0)?;
    let delay_us = if actor.rng.one_in(2) { 0 } else { actor.rng.between(1, 300) * 1_000 };
    if held.is_empty() {
        return Ok(());
    }
    if actor.rng.one_in(2) {
        let (msg_ids, lease_ids) = ids(&held);
        let parameters: [&(dyn postgres::types::ToSql + Sync); 4] =
            [&name(queue), &msg_ids, &lease_ids, &(delay_us as i64)];
        actor.act("release", RELEASE, &parameters, &held, Verb::Release { delay_us })?;
    } else {
        for one in &held {
            let parameters: [&(dyn postgres::types::ToSql + Sync); 4] =
                [&name(queue), &one.msg_id, &one.lease_id, &(delay_us as i64)];
            actor.act("retry", RETRY, &parameters, &[*one], Verb::Retry { delay_us })?;
        }
    }
    if queue != EXACT {
        finish(actor, queue, &held, DELETE)?;
    }
    Ok(())
}

/// A short lease, prolonged once or more, at last finished.
fn prolonged(actor: &mut Actor) -> Done {
    let lease_us = actor.rng.between(*SHORT_LEASE_MS.start(), *SHORT_LEASE_MS.end()) * 1_000;
    let queue = if actor.rng.one_in(3) { DURABLE } else { PLAIN };
    let held = read(actor, queue, 5, lease_us, 0)?;
    if held.is_empty() {
        return Ok(());
    }
    for _ in 0..actor.rng.between(1, 4) {
        // Now and then it comes too late.
        std::thread::sleep(Duration::from_micros(lease_us / 2));
        let longer_us = actor.rng.between(1, 4) * lease_us;
        let (msg_ids, lease_ids) = ids(&held);
        let parameters: [&(dyn postgres::types::ToSql + Sync); 4] =
            [&name(queue), &msg_ids, &lease_ids, &(longer_us as i64)];
        actor.act("extend", EXTEND, &parameters, &held, Verb::Extend { lease_us: longer_us })?;
    }
    finish(actor, queue, &held, DELETE)?;
    Ok(())
}

/// Works for longer than its lease lasts, and then finishes, or tries to.
fn too_late(actor: &mut Actor) -> Done {
    let lease_us = actor.rng.between(*SHORT_LEASE_MS.start(), *SHORT_LEASE_MS.end()) * 1_000;
    let is_exact = actor.rng.one_in(2);
    let queue = if is_exact { EXACT } else { PLAIN };
    if is_exact {
        begin(actor)?;
    }
    let held = read(actor, queue, 3, lease_us, 0)?;
    if !held.is_empty() {
        if is_exact {
            ledger(actor, &held)?;
        }
        std::thread::sleep(Duration::from_micros(lease_us + actor.rng.below(lease_us)));
        match finish(actor, queue, &held, if is_exact { DELETE_STRICTLY } else { DELETE }) {
            Err(Failed::Error) => return Ok(()), // refused, as it should be
            other => other?,
        };
    }
    if is_exact {
        actor.commit()?;
    }
    Ok(())
}

/// A long lease, whose work goes on while others are done.
fn long_held(actor: &mut Actor) -> Done {
    if actor.kept.len() >= KEPT_MAX {
        return Ok(());
    }
    let queue = if actor.rng.one_in(2) { DURABLE } else { PLAIN };
    let quantity = actor.rng.between(1, 3);
    let held = read(actor, queue, quantity, LONG_LEASE_US, 0)?;
    let held_us = actor.rng.between(*LONG_HELD_MS.start(), *LONG_HELD_MS.end()) * 1_000;
    if !held.is_empty() {
        actor.kept.push(Kept { held, until_us: actor.world.now_us() + held_us });
    }
    Ok(())
}

/// Finishes what was to be kept until `now_us`, whatever sessions and servers there were meanwhile.
fn finish_kept(actor: &mut Actor, now_us: Us) -> Done {
    while let Some(place) = actor.kept.iter().position(|kept| kept.until_us <= now_us) {
        let held = actor.kept.swap_remove(place).held;
        finish(actor, held[0].queue, &held, DELETE)?;
    }
    Ok(())
}

/// Sends and reads in one transaction: what others sent comes first, then its own.
fn own(actor: &mut Actor) -> Done {
    begin(actor)?;
    let key = actor.keys(PLAIN, 1, 0)[0];
    actor.send("send", senders::SEND, &[&name(PLAIN), &key])?;
    let quantity = actor.rng.between(1, 20);
    let held = read(actor, PLAIN, quantity, LEASE_US, 0)?;
    if !held.is_empty() && actor.rng.one_in(2) {
        finish(actor, PLAIN, &held, DELETE)?;
    }
    if actor.rng.one_in(4) {
        actor.rollback()
    } else {
        actor.commit()
    }
}

/// From several queues at once.
fn any(actor: &mut Actor) -> Done {
    let names = [name(PLAIN), name(DURABLE)];
    let quantity = actor.rng.between(1, 20) as i64;
    let began_us = actor.world.now_us();
    let result = actor.read("read_any", READ_ANY, &[&&names[..], &quantity, &20_i64], LEASE_US);
    if let Err(failed) = &result {
        [PLAIN, DURABLE].into_iter().for_each(|queue| unseen(actor, queue, began_us, LEASE_US, failed));
    }
    let held = result?;
    for queue in [PLAIN, DURABLE] {
        let of_queue: Vec<Held> = held.iter().filter(|one| one.queue == queue).copied().collect();
        if !of_queue.is_empty() {
            finish(actor, queue, &of_queue, DELETE)?;
        }
    }
    Ok(())
}

/// One piece of work of who empties the queues at the end, on so many messages at most. Returns how many it finished.
/// After a lease that it was too slow for it tries fewer the next time.
pub fn drain(actor: &mut Actor, queue: u8, quantity: &mut u64) -> Done<usize> {
    let finished = drain_once(actor, queue, *quantity);
    if !matches!(finished, Ok(Finished { are_all: true, .. })) {
        *quantity = (*quantity / 2).max(DRAINED_MIN);
    }
    finished.map(|finished| finished.messages)
}

struct Finished {
    messages: usize,
    /// No lease was lost.
    are_all: bool,
}

fn drain_once(actor: &mut Actor, queue: u8, quantity: u64) -> Done<Finished> {
    if queue != EXACT {
        let held = read(actor, queue, quantity, LEASE_US, 10)?;
        let done = if held.is_empty() { Vec::new() } else { finish(actor, queue, &held, DELETE)? };
        return Ok(Finished { messages: done.len(), are_all: done.len() == held.len() });
    }
    actor.begin("read committed")?;
    let held = read(actor, queue, quantity, LEASE_US, 10)?;
    if held.is_empty() {
        actor.rollback()?;
        return Ok(Finished { messages: 0, are_all: true });
    }
    ledger(actor, &held)?;
    finish(actor, queue, &held, DELETE_STRICTLY)?;
    actor.commit()?;
    Ok(Finished { messages: held.len(), are_all: true })
}
