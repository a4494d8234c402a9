//! The background workers: a launcher for the server ([`launcher`]), and one worker for each database that has
//! the extension ([`database`]; its duties: [`leases`],
//! [`expiry`], [`notify`], [`schedules`], [`survey`]; what it keeps away from: [`avoid`]). This file owns what the rest of
//! the extension tells them.
//!
//! ```text
//!   server starts, recovery ends, is promoted ---> launcher (never on a standby, nor when pg_upgrade runs the server)
//!   launcher --- for each connectable database that is no template ---> worker
//!     the extension is not there: it says so and ends (it was a probe)
//!     it is: serves the database, until
//!       - the extension is dropped, pg_queue.worker_enabled is off, or there is no room for another database: says which
//!         of them and ends
//!       - somebody needs the database for himself, or it became a template, or another worker took its place: ends
//!       - it is terminated, or its connection fails: ends with an error. An error in a piece of work ends nothing:
//!         it is logged, and the work is tried again
//!       - what an owner has put on a table takes too long and does not let itself be cancelled, or ends it: ends with an
//!         error, and the next one keeps away from that table for a while
//!   worker ends -------------------------------------------> launcher looks
//!   CREATE/DROP EXTENSION, CREATE/ALTER DATABASE commit ----> launcher looks, and every worker
//!   DROP DATABASE, ... TEMPLATE, RENAME, SET TABLESPACE ----> worker ends first; none is started until it is over (or
//!                                                            a minute has passed: the one who asked may have died)
//!   launcher ends (the postmaster starts it again after a second) ---> workers serve on; the new one adopts them
//!   any process of the server crashes ---> all end, dispatcher and all; the postmaster starts the launcher anew
//! ```

pub mod avoid;
pub mod database;
pub mod delay;
pub mod expiry;
pub mod launcher;
pub mod leases;
pub mod notify;
pub mod schedules;
pub mod survey;

use crate::error::Result;
use crate::pg::call::Value;
use crate::pg::shmem::Request;
use crate::pg::table::Snapshot;
use crate::pg::{latch, shmem, spi, user, worker, xact};
use crate::queue::{follow, journal, list, resolve, send};
use pgrx::pg_sys;
use queue_dispatch::NIL;
use std::cell::Cell;
use std::time::Duration;

crate::worker_mains! {
    pg_queue_launcher_main => launcher::main;
    pg_queue_database_main => database::main;
}

/// How long one duty goes on, microseconds, before the others have their turns; what an owner's triggers take for one
/// message comes on top ([`worker::limited`]).
pub const TURN_US: i64 = 100_000;

/// How long a database is left alone at most for a statement that needs it for itself: should the session that
/// asked for it die, a worker comes back after this.
const KEEP_AWAY_US: i64 = 60_000_000;

/// Has the launcher look at every database again, and every worker at whether it is still wanted. Called in a COMMIT
/// callback: cannot fail.
pub fn look_again() {
    let _ = shmem::with_arena(|arena, _, fx| arena.workers_wake(fx));
    let _ = shmem::with_server(|server, _| server.probe_all = true);
    wake_launcher();
}

/// Has a database's worker, if there is one, look at whether it is still wanted.
fn look_whether_wanted(database: u32) {
    let _ = shmem::with_arena(|arena, _, fx| arena.worker_wake(database, fx));
}

fn wake_launcher() {
    let launcher = shmem::with_server(|server, _| server.launcher);
    latch::set(launcher.unwrap_or(queue_dispatch::NIL));
}

/// Whether somebody needs the database for himself right now.
pub fn is_kept_away(database: u32) -> bool {
    shmem::with_server(|server, now| {
        server.requests.iter().any(|r| r.database == database && r.keep_away && r.until_us > now.mono_us)
    })
    .unwrap_or(false)
}

thread_local! {
    /// The database that a statement of this session has asked for, and the subtransaction that the statement is in.
    static WANTED: Cell<(u32, u32)> = const { Cell::new((0, 0)) };
}

/// If a statement of the subtransactions from `id` up had asked for a database, it has failed. Called in the abort
/// callbacks.
pub fn database_unwanted(id: u32) {
    let (database, sub) = WANTED.get();
    if database != 0 && sub >= id {
        database_released(database, false);
    }
}

/// A statement is about to need the database without other sessions: its worker ends first.
pub fn database_wanted(database: u32) {
    // A statement that will be refused anyway must not stop anybody's worker.
    if database == user::database() || !user::owns_database(database) {
        return;
    }
    if !shmem::is_available() || !has_worker(database) && !launcher_runs() {
        return;
    }
    let placed = shmem::with_server(|server, now| {
        let free = server
            .requests
            .iter_mut()
            .find(|r| r.database == database || r.database == 0 || r.until_us <= now.mono_us);
        match free {
            Some(request) => {
                let until_us = now.mono_us.saturating_add(KEEP_AWAY_US);
                *request = Request { database, keep_away: true, has_no_place: false, until_us };
                true
            }
            None => false,
        }
    });
    if !matches!(placed, Ok(true)) {
        return;
    }
    WANTED.set((database, xact::sub_id()));
    look_whether_wanted(database);
    worker::wait_until(Duration::from_secs(5), || !has_worker(database));
}

fn launcher_runs() -> bool {
    shmem::with_server(|server, _| server.launcher != queue_dispatch::NIL).unwrap_or(false)
}

fn has_worker(database: u32) -> bool {
    matches!(shmem::with_arena(|arena, _, _| arena.worker_proc(database)), Ok(proc) if proc != queue_dispatch::NIL)
}

/// That statement is over. What the dispatcher knew of a database that is gone is forgotten.
pub fn database_released(database: u32, is_dropped: bool) {
    WANTED.set((0, 0));
    let _ = shmem::with_server(|server, _| {
        for request in &mut server.requests {
            if request.database == database {
                *request = Request::NONE;
            }
        }
    });
    if is_dropped {
        forget_database(database);
    }
    look_again();
}

/// Frees what the dispatcher holds for a database.
fn forget_database(database: u32) {
    while let Ok(Some((relation, _))) = shmem::with_arena(|arena, _, _| arena.queue_of_database(database, 0)) {
        forget_queue(database, relation);
    }
    let _ = shmem::with_arena(|arena, _, _| arena.worker_forget(database));
}

/// Frees what the dispatcher holds for a queue.
fn forget_queue(database: u32, relation: u32) {
    let most = queue_dispatch::CHUNK_MAX;
    while matches!(shmem::with_arena(|a, _, fx| a.queue_detach(database, relation, most, fx)), Ok(false)) {}
}

/// Frees what it holds for tables of this database that are gone, in a transaction. Others may be the queues of an
/// extension that somebody has just made anew.
fn forget_queues_gone(database: u32) {
    let mut from = 0;
    while let Ok(Some((relation, next))) =
        shmem::with_arena(|arena, _, _| arena.queue_of_database(database, from))
    {
        if user::relation_name(relation).is_none() {
            forget_queue(database, relation);
        }
        from = next;
    }
    let _ = shmem::with_arena(|arena, _, _| {
        if arena.queue_of_database(database, 0).is_none() {
            arena.worker_forget(database);
        }
    });
}

/// A prepared transaction was committed: its messages are to be found. The worker knows which queue has some; where there
/// is none, any may.
pub fn prepared_committed() {
    let database = user::database();
    let _ = shmem::with_arena(|arena, _, fx| {
        if arena.worker_proc(database) == NIL {
            arena.database_mark_all(database, fx);
        }
    });
    look_whether_wanted(database);
}

/// Writes down, in a transaction that is being prepared, what it sent: for the worker to find once it commits.
pub fn prepared_write(lowest: &[(u32, i64)]) -> Result<()> {
    // PREPARE TRANSACTION itself runs without a snapshot.
    let snapshot = Snapshot::latest();
    user::acting_as_extension(|| {
        for (relation, msg_id) in lowest {
            spi::run(
                "INSERT INTO queue_catalog.prepared (queue, msg_id) VALUES ($1::pg_catalog.regclass, $2)",
                &[pg_sys::OIDOID.into(), pg_sys::INT8OID.into()],
                &[Value::of(pg_sys::Oid::from(*relation)), Value::of(*msg_id)],
            );
        }
    });
    snapshot.done();
    Ok(())
}

/// DDL on a relation: if it is a queue's table, or that of the schedules, rows may have come in unseen.
pub fn table_altered(relation: u32) {
    let noted = if is_table_in(c"queue", relation) {
        journal::mark_from(relation, i64::MIN)
    } else if is_table_in(c"queue_catalog", relation) {
        journal::worker_called()
    } else {
        Ok(())
    };
    if let Err(error) = noted {
        error.raise();
    }
}

/// A relation was renamed.
pub fn table_renamed(relation: u32) {
    if is_queue_table(relation) {
        crate::pg::xact::command_done();
        follow::table_renamed(relation);
    }
}

/// A table may have another owner than this one, whom it had.
pub fn table_reowned(relation: u32, was: u32) {
    // pg_upgrade makes the extension's members one by one, and gives archives to their owners itself.
    if is_queue_table(relation) && !worker::is_binary_upgrade() {
        crate::pg::xact::command_done();
        follow::table_reowned(relation, was);
    }
}

/// A relation is being dropped. What refers to it goes with it: a number in its place might be another table's where the
/// catalog is restored.
pub fn table_dropped(relation: u32) {
    if is_queue_table(relation) {
        if let Err(error) = journal::dropped(relation) {
            error.raise();
        }
        if user::is_table(relation) {
            follow::dead_letter_queue_dropped(relation);
        }
    } else if user::is_table(relation) && is_table_in(c"queue_archive", relation) {
        follow::archive_dropped(relation);
    }
}

fn is_queue_table(relation: u32) -> bool {
    is_table_in(c"queue", relation)
}

fn is_table_in(schema: &std::ffi::CStr, relation: u32) -> bool {
    // Somebody may have schemas of these names and not this extension: with it they are its own, since its script
    // fails where they exist.
    shmem::is_available()
        && worker::has_extension(c"pg_queue")
        && user::schema(schema).is_some_and(|schema| user::relation_schema(relation) == Some(schema))
}

/// Extensions or databases are coming or going, in this transaction.
pub fn extensions_changed() {
    if shmem::is_available() {
        if let Err(error) = journal::extensions_changed() {
            error.raise();
        }
    }
}

/// Replication to this database may have ended: from now on it may give ids of its own (see `raise_identity`).
pub fn subscriptions_changed() {
    if shmem::is_available() {
        if let Err(error) = journal::worker_called() {
            error.raise();
        }
    }
}

/// A session listens to this channel, or will when its transaction commits.
pub fn listening(channel: &str) {
    if !channel.starts_with(list::CHANNEL_PREFIX) || !shmem::is_available() {
        return;
    }
    // Anybody may LISTEN anywhere; a database that has no queues takes nobody's place.
    if !worker::has_extension(c"pg_queue") {
        return;
    }
    let database = user::database();
    let _ = shmem::with_arena(|arena, _, fx| {
        if !arena.has_listeners(database) && arena.listeners_set(database) {
            arena.worker_wake(database, fx); // it looks after all queues from now on
        }
    });
}

/// What this backend remembers of a relation may be wrong.
pub fn relation_invalidated(relation: u32) {
    resolve::invalidated(relation);
    send::invalidated();
}
