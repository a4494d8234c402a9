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
//!             it ends, somebody keeps it      -> away; due, if we were told to look meanwhile: he has let go of it
//!             another took its place          -> adopted
//!             it ends otherwise               -> back-off
//!   idle      we are told to look             -> due
//!   away      released, of which we are told  -> due; we also look every second: who keeps it may have died
//!   back-off  after a while; at once when we  -> due
//!             are told to look
//!   refused   after a while; at once when a   -> due
//!             worker ends or we are told to look
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
        latch::sleep(sleep_ms, wait_event);
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
    let has_ended = known.len() > databases.len()
        || known.iter().any(|(oid, k)| match &k.worker {
            Some(started) => started.has_ended(),
            None => k.is_adopted && !super::has_worker(*oid),
        });
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
        if entry.is_refused && (was_told || has_ended) {
            // A process may be free now.
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

/// A worker has ended: because there is nothing to serve, because somebody needs the database, or in an error.
fn note_end(oid: u32, entry: &mut Known, now_us: i64) {
    let had_nothing = shmem::with_server(|server, _| {
        let found = server.requests.iter_mut().find(|r| r.database == oid && !r.keep_away);
        found.map(|request| request.database = 0).is_some()
    });
    let look_again = std::mem::take(&mut entry.look_again);
    if matches!(had_nothing, Ok(true)) {
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
