//! What the worker looks for when it begins, and when it is called: queues that want it though nobody has used them
//! since the server was started. They are given their places in the dispatcher, which then says what is due.
//!
//! Such are queues with leases to restore, with messages that expire, and, where somebody listens, all: what becomes
//! due in them is told. Other queues get their places when they are first used.

use crate::error::Error;
use crate::pg::call::Value;
use crate::pg::table::{self, AccessShareLock, Snapshot, Table};
use crate::pg::{shmem, spi, user, worker};
use crate::queue::{column, resolve};
use crate::worker::avoid;
use pgrx::pg_sys;
use queue_dispatch::NEVER_US;

/// Attaches those queues of this database.
pub fn attach_queues(database: u32) {
    let has_listeners = shmem::with_arena(|arena, _, _| arena.has_listeners(database)).unwrap_or(false);
    let found = worker::transaction("looking at queues", || {
        // Rows of leases whose queue is gone are nobody's any more.
        spi::run(
            "DELETE FROM queue_catalog.lease l WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_class c \
             WHERE c.oid OPERATOR(pg_catalog.=) l.queue)",
            &[],
            &[],
        );
        let outcome = spi::look(
            "SELECT q.queue::pg_catalog.oid, EXISTS (SELECT FROM queue_catalog.lease l \
             WHERE l.queue OPERATOR(pg_catalog.=) q.queue::pg_catalog.oid) FROM queue_catalog.queue q ORDER BY 1",
            &[],
            &[],
        );
        let queues = outcome.rows.iter().filter_map(|row| {
            let relation: u32 = row[0].get::<pg_sys::Oid>()?.into();
            Some((relation, has_listeners || row[1].get::<bool>()?))
        });
        Ok(queues.collect::<Vec<_>>())
    });
    for (relation, is_wanted) in found.unwrap_or_default() {
        let is_attached = shmem::with_arena(|arena, _, _| arena.queue_find(database, relation).is_some());
        if is_attached.unwrap_or(true) {
            continue;
        }
        // Each in a transaction of its own: what one owner has done to his table keeps no other's queue.
        let is_full = worker::transaction("looking at a queue", || {
            // Any other error: it is locked, changed or dropped right now, and whoever uses it next attaches it.
            if let Err(error @ Error::Full { .. }) = attach(relation, is_wanted) {
                pgrx::log!("pg_queue worker: some queues are not served until they are used: {error:?}");
                return Ok(true);
            }
            Ok(false)
        });
        if is_full == Some(true) {
            return;
        }
        pgrx::check_for_interrupts!();
    }
}

fn attach(relation: u32, is_wanted: bool) -> crate::Result<()> {
    if !avoid::may_begin(relation) || !table::try_lock(relation, AccessShareLock) {
        return Ok(());
    }
    let is_here = user::relation_schema(relation) == user::schema(c"queue");
    let Some(name) = user::relation_name(relation).filter(|_| is_here) else { return Ok(()) };
    if is_wanted || has_expiring(relation) {
        resolve::open(&name, AccessShareLock)?;
    }
    Ok(())
}

/// By the index, as the owner has it. No statement: planning one runs functions of the owner's, with the rights of
/// whoever plans.
fn has_expiring(relation: u32) -> bool {
    let Some(table) = Table::open(relation, None) else { return false };
    let index = user::acting_as(user::owner(relation), || {
        table::index_on(&table, column::EXPIRES_AT as i16, pg_sys::TIMESTAMPTZOID)
    });
    let snapshot = Snapshot::latest();
    let has_some = index.is_some_and(|index| {
        let mut walk = table.walk_times(index, i64::MIN, NEVER_US, &snapshot);
        let has_some = walk.next().is_some();
        walk.end();
        has_some
    });
    snapshot.done();
    table.close(None, true);
    has_some
}

/// What `ALTER DATABASE ... SET pg_queue.worker_enabled` has set for this database, as it is written: another process
/// would have taken it in at its start.
pub fn enabled_setting() -> Option<String> {
    worker::transaction("looking at settings", || {
        let outcome = spi::look(
            "SELECT s FROM pg_catalog.pg_db_role_setting d, LATERAL pg_catalog.unnest(d.setconfig) s \
             WHERE d.setrole OPERATOR(pg_catalog.=) 0 \
             AND d.setdatabase OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database \
               WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()) \
             AND pg_catalog.starts_with(s, 'pg_queue.worker_enabled=')",
            &[],
            &[],
        );
        Ok(outcome.rows.first().and_then(|row: &Vec<Value>| row[0].text()))
    })
    .flatten()
}
