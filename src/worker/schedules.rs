//! The worker's duty for schedules: has those that are due fire, each in a transaction of its own, and tells when the
//! next one is. Owns what the worker remembers of them, which is little: when to look again, and which of them failed.
//! What a firing does is `queue::schedule`'s.
//!
//! It looks when the time has come and when it is told that schedules have changed, and sleeps otherwise. One that
//! fails waits, longer each time, and keeps no other. What is due is told by the wall clock: if that is set back or
//! forth, it is noticed when the worker wakes next, which is when the next one would have been due, and within the hour.
//! Intervals then go on, though their next times may lie far ahead.

use crate::pg::call::Value;
use crate::pg::table::{AccessShareLock, RowExclusiveLock};
use crate::pg::{clock, spi, worker};
use crate::queue::schedule::{self, Fired};
use crate::worker::database::try_lock_catalog;
use crate::worker::delay::{Delay, FAILED_US};
use crate::worker::{avoid, TURN_US};
use pgrx::pg_sys;
use queue_dispatch::{Now, NEVER_US};
use std::collections::{HashMap, HashSet};

/// Schedules fired in one turn; then the worker looks after its other duties.
const TURN_MAX: usize = 100;
/// One that somebody has locked is tried again after this long, microseconds, and after twice as long each time.
const BUSY_US: std::ops::RangeInclusive<i64> = 50_000..=1_000_000;
/// When they could not be looked at, that is tried again after this long.
const LOOK_AGAIN_US: i64 = 1_000_000;

/// The clocks have drifted apart by so much: one was set.
const JUMP_US: i64 = 1_000_000;

fn ahead_us(now: Now) -> i64 {
    now.wall_us.saturating_sub(now.mono_us)
}

/// A schedule that is due.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Due {
    relation: u32,
    name: String,
    /// Which version of its row: one that was changed since is tried at once.
    version: String,
}

/// What the worker remembers.
pub struct Schedules {
    /// When the first that is not due yet will be, on the wall clock.
    next_wall_us: i64,
    /// When to look again whatever that says, on the clock that never jumps.
    again_us: i64,
    /// How far the wall clock is ahead of that one.
    ahead_us: i64,
    /// The wall clock may have been set back since the schedules were moved on.
    was_set_back: bool,
    /// Not before this: they could not be looked at. On that clock, too.
    not_before_us: i64,
    /// Tables of which it was said that they have a schedule whose name nobody can read here.
    unreadable: HashSet<u32>,
    delays: HashMap<Due, Delay>,
}

impl Schedules {
    /// Nothing is known yet: the first look is due.
    pub fn new() -> Schedules {
        Schedules {
            next_wall_us: NEVER_US,
            again_us: 0,
            ahead_us: ahead_us(clock::now()),
            was_set_back: true, // while the server was down, perhaps
            not_before_us: 0,
            unreadable: HashSet::new(),
            delays: HashMap::new(),
        }
    }

    /// The worker has woken: it compares the clocks.
    pub fn look_at_clock(&mut self) {
        let now_us = ahead_us(clock::now());
        if (now_us - self.ahead_us).abs() > JUMP_US {
            self.was_set_back |= now_us < self.ahead_us;
            self.again_us = 0;
            self.ahead_us = now_us;
        }
    }

    /// When to call [`Schedules::fire`] next, on the clock that never jumps.
    pub fn due_us(&self) -> i64 {
        let next_us = match self.next_wall_us {
            NEVER_US => NEVER_US,
            wall_us => clock::now().mono_of(wall_us),
        };
        let delayed_us = self.delays.values().map(|delay| delay.until_us).min().unwrap_or(NEVER_US);
        next_us.min(self.again_us).min(delayed_us).max(self.not_before_us)
    }

    /// Has what is due fire, a turn of it.
    pub fn fire(&mut self) {
        let now = clock::now();
        if self.was_set_back {
            let done = worker::transaction("looking for schedules", || {
                let is_locked = try_lock_catalog("schedule", RowExclusiveLock);
                if is_locked {
                    schedule::clock_set_back(now.wall_us);
                }
                Ok(is_locked)
            });
            self.was_set_back = done != Some(true);
        }
        let waiting: Vec<&Due> =
            self.delays.iter().filter(|(_, d)| d.until_us > now.mono_us).map(|(due, _)| due).collect();
        let Some(Found { due, is_full, unreadable, next_wall_us }) = look(now.wall_us, &waiting) else {
            self.again_us = now.mono_us.saturating_add(LOOK_AGAIN_US);
            self.not_before_us = self.again_us;
            return;
        };
        self.not_before_us = 0;
        for relation in unreadable {
            if self.unreadable.insert(relation) {
                pgrx::log!(
                    "pg_queue worker: a schedule of table {relation} is not sent: its name is not ASCII, and this \
                     database's encoding is not UTF8"
                );
            }
        }
        self.next_wall_us = next_wall_us;
        self.again_us = match (is_full, self.was_set_back) {
            (true, _) => 0,
            (false, true) => now.mono_us.saturating_add(LOOK_AGAIN_US),
            (false, false) => NEVER_US,
        };
        if !is_full {
            // What is neither waiting nor due any more has been changed, or is gone.
            self.delays.retain(|key, delay| delay.until_us > now.mono_us || due.contains(key));
        }
        for one in due {
            if clock::now().mono_us.saturating_sub(now.mono_us) > TURN_US {
                self.again_us = 0; // the rest after the others' turns; what fired is behind it then
                return;
            }
            self.fire_one(one);
            pgrx::check_for_interrupts!();
        }
    }

    fn fire_one(&mut self, due: Due) {
        let what = format!("sending on schedule \"{}\"", due.name);
        let fired = worker::transaction(&what, || {
            if !avoid::may_begin(due.relation) || !try_lock_catalog("schedule", RowExclusiveLock) {
                return Ok(Fired::Busy);
            }
            schedule::fire(due.relation, &due.name, clock::now().wall_us)
        });
        let range = match fired {
            Some(Fired::Sent(next_us)) => {
                self.next_wall_us = self.next_wall_us.min(next_us);
                self.delays.remove(&due);
                return;
            }
            Some(Fired::Gone) => {
                self.delays.remove(&due);
                return;
            }
            Some(Fired::Busy) => BUSY_US,
            None => FAILED_US,
        };
        let last = self.delays.get(&due).copied().unwrap_or_default();
        self.delays.insert(due, last.longer(&range));
    }
}

/// What a look at the schedules has shown.
struct Found {
    /// Those that are due, those that wait left out, the longest due first.
    due: Vec<Due>,
    /// They are [`TURN_MAX`], and there may be more.
    is_full: bool,
    /// Tables of others, whose names cannot be read.
    unreadable: Vec<u32>,
    /// When the first of those that are not due yet will be.
    next_wall_us: i64,
}

/// `None`: they could not be looked at.
fn look(now_us: i64, waiting: &[&Due]) -> Option<Found> {
    const DUE: &str = "SELECT s.queue::pg_catalog.oid, s.name, s.xmin::pg_catalog.text FROM queue_catalog.schedule s \
        WHERE NOT s.paused AND s.next_at OPERATOR(pg_catalog.<=) $1 AND NOT EXISTS (SELECT FROM ROWS FROM \
          (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4)) AS w (queue, name, version) \
          WHERE w.queue OPERATOR(pg_catalog.=) s.queue::pg_catalog.oid AND w.name OPERATOR(pg_catalog.=) s.name \
          AND w.version OPERATOR(pg_catalog.=) s.xmin::pg_catalog.text) \
        ORDER BY s.next_at, s.queue::pg_catalog.oid, s.name LIMIT $5";
    const NEXT: &str = "SELECT pg_catalog.min(next_at) FROM queue_catalog.schedule \
        WHERE NOT paused AND next_at OPERATOR(pg_catalog.>) $1";
    worker::transaction("looking for schedules", || {
        if !try_lock_catalog("schedule", AccessShareLock) {
            return Ok(None);
        }
        let texts = |text: fn(&Due) -> &str| {
            let texts: Vec<Value> = waiting.iter().map(|due| Value::of(text(due))).collect();
            Value::array(pg_sys::TEXTOID.into(), &texts)
        };
        let oids: Vec<Value> = waiting.iter().map(|due| Value::of(pg_sys::Oid::from(due.relation))).collect();
        let now = Value::of_time_us(now_us);
        let found = spi::look(
            DUE,
            &[
                pg_sys::TIMESTAMPTZOID,
                pg_sys::OIDARRAYOID,
                pg_sys::TEXTARRAYOID,
                pg_sys::TEXTARRAYOID,
                pg_sys::INT8OID,
            ]
            .map(u32::from),
            &[
                now,
                Value::array(pg_sys::OIDOID.into(), &oids),
                texts(|due| &due.name),
                texts(|due| &due.version),
                Value::of(TURN_MAX as i64),
            ],
        );
        let (mut due, mut unreadable) = (Vec::new(), Vec::new());
        for row in &found.rows {
            let Some(relation) = row[0].get::<pg_sys::Oid>().map(u32::from) else { continue };
            match (row[1].text_if_readable(), row[2].text()) {
                (Some(name), Some(version)) => due.push(Due { relation, name, version }),
                _ => unreadable.push(relation),
            }
        }
        let next = spi::look(NEXT, &[pg_sys::TIMESTAMPTZOID.into()], &[now]);
        let next_wall_us = next.rows.first().and_then(|row| row[0].time_us()).unwrap_or(NEVER_US);
        Ok(Some(Found {
            is_full: found.rows.len() == TURN_MAX && !due.is_empty(),
            due,
            unreadable,
            next_wall_us,
        }))
    })
    .flatten()
}
