//! The launcher: sees to it that every database that has the extension has a worker, and no other.
//!
//! It is connected to the shared catalogs only, so it cannot see whether a database has the extension: it starts
//! a worker there, and the worker ends at once if there is nothing to serve. It looks at the list of databases
//! when it starts, when it is told to (see `worker::look_again`), and when a worker ends.
//!
//! # State of a database, here
//!
//! ```text
//!   due       a worker is started             -> running
//!             there is no process for it      -> refused
//!             somebody keeps the database     -> away
//!             an earlier launcher's worker    -> adopted
//!   running,  it ends, and had nothing to     -> idle; due, if we were told to look meanwhile: it may have looked
//!   adopted   serve                              too early
//!             it ends, for want of a place    -> crowded
//!             it ends, somebody keeps it      -> away; due, if we were told to look meanwhile: he has let go of it
//!             another took its place          -> adopted
//!             it ends otherwise               -> back-off
//!   idle      we are told to look             -> due
//!   away      released, of which we are told  -> due; we also look every second: who keeps it may have died
//!   back-off  after a while; at once when we  -> due
//!             are told to look
//!   refused   after a while; at once when a   -> due
//!             worker ends or we are told to look
//!   crowded   the same; the end of another      -> due
//!             that was crowded does not count
//! ```
//!
//! A database begins as due when it is listed: it takes connections and is no template. In whatever state, one that
//! is not listed any more is forgotten; its worker is woken and ends (`database::end_if_unwanted`).
//!
//! A worker outlives the launcher that started it and serves on: adopted. Of its end it tells us itself
//! (`wake_launcher`), not the postmaster.
//!
//! "After a while" is a second at first and twice as long each time, up to a minute. It is a second again for a
//! worker that served for more than a minute (or adopted, or with nothing to serve), and where a process may have
//! become free.

use crate::pg::shmem::Request;
use crate::pg::{clock, latch, shmem, worker};
use std::collections::HashMap;

/// A worker that fails is started again after this long at first, and after twice as long each time it fails
/// again soon.
const BACKOFF_US: i64 = 1_000_000;
const BACKOFF_MAX_US: i64 = 60_000_000;

struct Known {
    worker: Option<worker::Started>,
    started_us: i64,
    /// Not before this.
    next_us: i64,
    backoff_us: i64,
    /// It was found to have nothing to serve.
    is_idle: bool,
    /// There was no process for its worker.
    is_refused: bool,
    /// There was no place for it among the databases.
    is_crowded: bool,
    /// We were told to look while its worker was at it.
    look_again: bool,
    /// Its worker was started by a launcher that has died.
    is_adopted: bool,
}

/// The launcher's main function.
pub fn main(_argument: u32) {
    worker::begin(0);
    if worker::is_binary_upgrade() || !shmem::is_available() {
        worker::end();
    }
    worker::at_exit(|| {
        let _ = shmem::with_server(|server, _| server.launcher = queue_dispatch::NIL);
    });
    let me = latch::my_proc();
    let _ = shmem::with_server(|server, _| {
        server.launcher = me;
        server.probe_all = true;
    });
    let wait_event = latch::wait_event(c"QueueLauncher");
    let mut known: HashMap<u32, Known> = HashMap::new();
    loop {
        if worker::reload_config() {
            // Databases whose worker was switched off may have one now.
            let _ = shmem::with_server(|server, _| server.probe_all = true);
        }
        let sleep_ms = look(&mut known);
        if !worker::is_reload_pending() {
            latch::sleep(sleep_ms, wait_event);
        }
    }
}

/// One round. Returns how long nothing is to be done, -1 for ever.
fn look(known: &mut HashMap<u32, Known>) -> i64 {
    let was_told = shmem::with_server(|server, _| std::mem::take(&mut server.probe_all)).unwrap_or(false);
    let Some(databases) = worker::transaction("looking for databases", || Ok(worker::databases())) else {
        if was_told {
            let _ = shmem::with_server(|server, _| server.probe_all = true);
        }
        return 1_000;
    };
    let now_us = clock::now().mono_us;
    let ended: Vec<u32> = known.iter().filter(|(oid, k)| has_ended(**oid, k)).map(|(oid, _)| *oid).collect();
    let is_one_gone = known.len() > databases.len();
    let has_ended = is_one_gone || !ended.is_empty();
    let is_place_free = is_one_gone || ended.iter().any(|oid| !is_noted(*oid, |note| note.has_no_place));
    known.retain(|oid, _| {
        let is_listed = databases.contains(oid);
        if !is_listed {
            super::look_whether_wanted(*oid);
        }
        is_listed
    });
    let mut next_us = i64::MAX;
    for oid in databases {
        let entry = known.entry(oid).or_insert(Known {
            worker: None,
            started_us: 0,
            next_us: 0,
            backoff_us: BACKOFF_US,
            is_idle: false,
            is_refused: false,
            is_crowded: false,
            look_again: false,
            is_adopted: false,
        });
        let had_worker = entry.worker.is_some() || entry.is_adopted;
        if entry.worker.as_ref().is_some_and(worker::Started::has_ended) {
            entry.worker = None;
        }
        if entry.worker.is_none() {
            entry.is_adopted = super::has_worker(oid);
        }
        if entry.worker.is_some() || entry.is_adopted {
            // It may have looked before what we are told of was there.
            entry.look_again |= was_told;
            continue;
        }
        if had_worker {
            note_end(oid, entry, now_us);
        }
        if was_told {
            entry.is_idle = false;
            entry.next_us = 0; // its end may have been noted just after the database was released
        }
        if entry.is_refused && (was_told || has_ended) || entry.is_crowded && (was_told || is_place_free) {
            // A process, or a place, may be free now.
            entry.next_us = 0;
            entry.backoff_us = BACKOFF_US;
        }
        if super::is_kept_away(oid) {
            // Whoever keeps it will tell; should he die, this does.
            next_us = next_us.min(now_us + BACKOFF_US);
            continue;
        }
        if entry.is_idle {
            continue;
        }
        if entry.next_us > now_us {
            next_us = next_us.min(entry.next_us);
            continue;
        }
        let name = format!("pg_queue worker for database {oid}");
        forget_notes(oid); // of earlier ones: they may have ended unseen
        entry.worker = worker::start(&name, "pg_queue worker", "pg_queue_database_main", oid);
        entry.started_us = now_us;
        let was_refused = std::mem::replace(&mut entry.is_refused, entry.worker.is_none());
        if entry.is_refused {
            // Said once, however often it is tried.
            if !was_refused {
                pgrx::log!(
                    "pg_queue: no worker process for database {oid} is to be had; raise max_worker_processes"
                );
            }
            back_off(entry, now_us);
            next_us = next_us.min(entry.next_us);
        }
    }
    if next_us == i64::MAX {
        -1
    } else {
        next_us.saturating_sub(now_us).max(0) / 1_000 + 1
    }
}

fn back_off(entry: &mut Known, now_us: i64) {
    entry.next_us = now_us + entry.backoff_us;
    entry.backoff_us = (entry.backoff_us * 2).min(BACKOFF_MAX_US);
}

fn has_ended(oid: u32, known: &Known) -> bool {
    match &known.worker {
        Some(started) => started.has_ended(),
        None => known.is_adopted && !super::has_worker(oid),
    }
}

/// Whether a worker of this database has left a note that is one of those.
fn is_noted(oid: u32, is_one: impl Fn(&Request) -> bool) -> bool {
    shmem::with_server(|server, now| {
        let mut notes = server.requests.iter().filter(|r| r.database == oid && !r.keep_away);
        notes.any(|note| note.until_us > now.mono_us && is_one(note))
    })
    .unwrap_or(false)
}

fn forget_notes(oid: u32) {
    let _ = shmem::with_server(|server, _| {
        for note in server.requests.iter_mut().filter(|r| r.database == oid && !r.keep_away) {
            *note = Request::NONE;
        }
    });
}

/// A worker has ended: because there is nothing to serve or no place for it, because somebody needs the database, or in
/// an error.
fn note_end(oid: u32, entry: &mut Known, now_us: i64) {
    let has_no_place = is_noted(oid, |note| note.has_no_place);
    let had_nothing = is_noted(oid, |note| !note.has_no_place);
    forget_notes(oid);
    let was_crowded = std::mem::replace(&mut entry.is_crowded, has_no_place);
    let look_again = std::mem::take(&mut entry.look_again);
    if has_no_place {
        // Said once, however often it is tried.
        if !was_crowded {
            pgrx::log!("pg_queue: no place for database {oid} and its worker; raise pg_queue.max_databases");
        }
        if look_again {
            entry.backoff_us = BACKOFF_US;
        }
        back_off(entry, now_us);
    } else if had_nothing {
        entry.is_idle = !look_again;
        entry.backoff_us = BACKOFF_US;
    } else if super::is_kept_away(oid) || look_again {
        // It gave way, perhaps to what is over already: then we were told to look before it had ended. That is no
        // failure, and must not count as one.
        entry.next_us = 0;
    } else {
        if now_us - entry.started_us > BACKOFF_MAX_US {
            entry.backoff_us = BACKOFF_US;
        }
        back_off(entry, now_us);
    }
}
