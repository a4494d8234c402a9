//! What senders do: each function is one piece of work, chosen at random. Owns the ways to send; the logging and what
//! an error means is [`super::actor`]'s.

use std::fmt::Write as _;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::actor::{Actor, Done, DURABLE, EXACT, PLAIN, QUEUES};
use super::mortal;
use super::tally::{Kind, ALONE};

/// Sending pauses while so many messages lie in the queues.
pub const BACKLOG_MAX: u64 = 20_000;
/// What is due later is due within this.
const DELAY_MS_MAX: u64 = 1_500;
/// Subtransactions within each other.
const DEPTH: usize = 100;

pub const SEND: &str = "SELECT queue_send($1, message_of($2), headers_of($2))";
const SEND_LATER: &str =
    "SELECT queue_send($1, message_of($2), headers_of($2), delay => $3::int8 * interval '1 us')";
pub const SEND_BATCH: &str = "SELECT count(*) FROM queue_send_batch($1, \
    array(SELECT message_of(k) FROM unnest($2::int8[]) k), array(SELECT headers_of(k) FROM unnest($2::int8[]) k))";
const SEND_BATCH_LATER: &str = "SELECT count(*) FROM queue_send_batch($1, \
    array(SELECT message_of(k) FROM unnest($2::int8[]) k), array(SELECT headers_of(k) FROM unnest($2::int8[]) k), \
    delay => $3::int8 * interval '1 us')";
const SEND_CAUGHT: &str = "SELECT send_caught($1, $2, $3)";
const SEND_DEEP: &str = "SELECT send_deep($1, $2, 1, $3)";
const SEND_COMMITTING: &str = "CALL send_committing($1, $2)";
const INSERT_EXACT: &str =
    "INSERT INTO queue.exact (message, headers) SELECT message_of(k), headers_of(k) FROM unnest($1::int8[]) k";
const INSERT_PLAIN: &str =
    "INSERT INTO queue.plain (message, headers) SELECT message_of(k), headers_of(k) FROM unnest($1::int8[]) k";

const COMMITTED: &str = "read committed";

/// What a sender has done after a while.
pub const KINDS: [Kind; 14] = [
    ("send", ALONE),
    ("send", COMMITTED),
    ("send_batch", ALONE),
    ("send_batch", COMMITTED),
    ("send_later", ALONE),
    ("send_caught", ALONE),
    ("send_deep", ALONE),
    ("send_committing", ALONE),
    ("send_in_block", ALONE),
    ("insert", ALONE),
    ("send_mortal", ALONE),
    ("copy", COMMITTED),
    ("savepoint", COMMITTED),
    ("commit", COMMITTED),
];

/// One piece of work of a sender.
pub fn work(actor: &mut Actor) -> Done {
    if actor.world.counters.backlog.load(Relaxed) > BACKLOG_MAX {
        std::thread::sleep(Duration::from_millis(5));
        return Ok(());
    }
    let queue = *actor.rng.pick(&[EXACT, EXACT, EXACT, PLAIN, PLAIN, PLAIN, DURABLE]).unwrap_or(&EXACT);
    match actor.rng.below(21) {
        0..=2 => one(actor, queue),
        3..=9 => batch(actor, queue),
        10 => later(actor, queue),
        11..=13 => savepoints(actor, queue),
        14 => caught(actor, queue),
        15 => deep(actor, queue),
        16 => committing(actor, queue),
        17 => in_block(actor, queue),
        18 => insert(actor),
        19 => mortal::send(actor),
        _ => copy(actor),
    }
}

fn name(queue: u8) -> &'static str {
    QUEUES[queue as usize]
}

fn one(actor: &mut Actor, queue: u8) -> Done {
    let key = actor.keys(queue, 1, 0)[0];
    actor.send("send", SEND, &[&name(queue), &key])
}

fn batch(actor: &mut Actor, queue: u8) -> Done {
    let messages = actor.rng.between(10, 60) as usize;
    let keys = actor.keys(queue, messages, 0);
    actor.send("send_batch", SEND_BATCH, &[&name(queue), &keys])
}

fn later(actor: &mut Actor, queue: u8) -> Done {
    let delay_us = actor.rng.between(1, DELAY_MS_MAX) * 1_000;
    if actor.rng.one_in(2) {
        let key = actor.keys(queue, 1, delay_us)[0];
        actor.send("send_later", SEND_LATER, &[&name(queue), &key, &(delay_us as i64)])
    } else {
        let keys = actor.keys(queue, 10, delay_us);
        actor.send("send_later", SEND_BATCH_LATER, &[&name(queue), &keys, &(delay_us as i64)])
    }
}

/// Part of it is rolled back to a savepoint; of these transactions one in four is rolled back as a whole.
fn savepoints(actor: &mut Actor, queue: u8) -> Done {
    actor.begin("read committed")?;
    batch(actor, queue)?;
    actor.savepoint()?;
    batch(actor, queue)?;
    if actor.rng.one_in(2) {
        actor.rollback_to_savepoint()?;
    } else {
        actor.release_savepoint()?;
    }
    one(actor, queue)?;
    if actor.rng.one_in(4) {
        actor.rollback()
    } else {
        actor.commit()
    }
}

fn caught(actor: &mut Actor, queue: u8) -> Done {
    let kept = actor.keys(queue, 5, 0);
    let undone = actor.keys_undone(queue, 5);
    actor.send("send_caught", SEND_CAUGHT, &[&name(queue), &kept, &undone])
}

fn deep(actor: &mut Actor, queue: u8) -> Done {
    let kept = actor.rng.between(1, DEPTH as u64) as usize;
    let mut keys = actor.keys(queue, kept, 0);
    keys.extend(actor.keys_undone(queue, DEPTH - kept));
    actor.send("send_deep", SEND_DEEP, &[&name(queue), &keys, &(kept as i64 + 1)])
}

fn committing(actor: &mut Actor, queue: u8) -> Done {
    let mark = actor.log.mark();
    let keys = actor.keys(queue, 5, 0);
    actor.log.each_alone(mark);
    actor.committing("send_committing", SEND_COMMITTING, &[&name(queue), &keys])
}

fn insert(actor: &mut Actor) -> Done {
    let (queue, sql) = if actor.rng.one_in(2) { (EXACT, INSERT_EXACT) } else { (PLAIN, INSERT_PLAIN) };
    let messages = actor.rng.between(1, 20) as usize;
    let keys = actor.keys(queue, messages, 0);
    actor.send("insert", sql, &[&keys])
}

fn copy(actor: &mut Actor) -> Done {
    let queue = if actor.rng.one_in(2) { EXACT } else { PLAIN };
    let mut rows = String::new();
    for key in actor.keys(queue, 50, 0) {
        // A String takes everything.
        let _ = match large(key) {
            Some((text, hash)) => {
                writeln!(rows, "{{\"k\": {key}, \"text\": \"{text}\"}}\t{{\"hash\": \"{hash}\"}}")
            }
            None => writeln!(rows, "{{\"k\": {key}}}\t\\N"),
        };
    }
    actor.copy(&format!("COPY queue.{} (message, headers) FROM STDIN", name(queue)), &rows)
}

/// Text and hash of a message that is large, as `message_of` and `headers_of` of setup.sql have them.
fn large(key: i64) -> Option<(String, String)> {
    let hash = |of: String| hex::encode(Sha256::digest(of));
    let text = || (1..=157 + key % 157).map(|n| hash(format!("{key} {n}"))).collect();
    (key % 20 == 7).then(|| (text(), hash(key.to_string())))
}

/// In a block that commits and rolls back in between.
fn in_block(actor: &mut Actor, queue: u8) -> Done {
    let mark = actor.log.mark();
    let (kept, undone) = (actor.keys(queue, 5, 0), actor.keys_undone(queue, 2));
    let send =
        |key: &i64| format!("PERFORM queue_send('{}', message_of({key}), headers_of({key}));", name(queue));
    let mut sql = "DO $$ BEGIN ".to_owned();
    for (n, key) in kept.iter().enumerate() {
        if let Some(key) = undone.get(n) {
            sql += &(send(key) + " ROLLBACK; ");
        }
        sql += &(send(key) + " COMMIT; ");
    }
    let result = actor.committing_plain("send_in_block", &(sql + "END $$"));
    actor.log.each_alone(mark);
    result
}
