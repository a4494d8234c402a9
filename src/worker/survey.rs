//! What the worker looks for when it begins, and when it is called: queues that want it though nobody has used them
//! since the server was started. They are given their places in the dispatcher, which then says what is due.
//!
//! Such are queues with leases to restore, with messages that expire, and, where somebody listens, all: what becomes
//! due in them is told. Other queues get their places when they are first used.

use crate::error::Error;
use crate::pg::call::Value;
use crate::pg::table::{self, AccessShareLock};
use crate::pg::{shmem, spi, user, worker};
use crate::queue::resolve;
use pgrx::pg_sys;

/// Queues that one transaction opens: each is locked until its end.
const CHUNK: usize = 50;

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
    for chunk in found.unwrap_or_default().chunks(CHUNK) {
        let is_full = worker::transaction("looking at queues", || {
            for (relation, is_wanted) in chunk {
                // Any other error: it is locked, changed or dropped right now, and whoever uses it next attaches it.
                if let Err(error @ Error::Full { .. }) = attach(database, *relation, *is_wanted) {
                    pgrx::log!("pg_queue worker: some queues are not served until they are used: {error:?}");
                    return Ok(true);
                }
            }
            Ok(false)
        });
        if is_full == Some(true) {
            return;
        }
        pgrx::check_for_interrupts!();
    }
}

fn attach(database: u32, relation: u32, is_wanted: bool) -> crate::Result<()> {
    let is_attached = shmem::with_arena(|arena, _, _| arena.queue_find(database, relation).is_some())?;
    if is_attached || !table::try_lock(relation, AccessShareLock) {
        return Ok(());
    }
    let is_here = user::relation_schema(relation) == user::schema(c"queue");
    let Some(name) = user::relation_name(relation).filter(|_| is_here) else { return Ok(()) };
    if is_wanted || has_expiring(&name) {
        resolve::open(&name, AccessShareLock)?;
    }
    Ok(())
}

fn has_expiring(name: &str) -> bool {
    let statement =
        format!("SELECT EXISTS (SELECT FROM ONLY queue.{} WHERE expires_at IS NOT NULL)", spi::quoted(name));
    spi::look(&statement, &[], &[]).rows.first().and_then(|row| row[0].get::<bool>()).unwrap_or(false)
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
