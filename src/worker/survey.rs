//! What the worker looks for when it begins, and when it is called: queues that want it though nobody has used them
//! since the server was started. They are given their places in the dispatcher, which then says what is due.
//!
//! Such are queues with leases to restore, with messages that expire, and, where somebody listens, all: what becomes
//! due in them is told, and what plain SQL has put there before they had a place. Other queues get their places when
//! they are first used.

use crate::error::Error;
use crate::pg::call::Value;
use crate::pg::table::{self, AccessShareLock, RowExclusiveLock, Snapshot, Table};
use crate::pg::{clock, shmem, spi, user, worker};
use crate::queue::column;
use crate::queue::resolve::{self, Queue};
use crate::settings;
use crate::worker::avoid;
use crate::worker::database::{try_lock_catalog, LOOK_AGAIN_US};
use crate::worker::delay::{Delay, FAILED_US};
use pgrx::pg_sys;
use queue_dispatch::NEVER_US;

/// What the worker remembers from one look to the next.
#[derive(Default)]
pub struct Survey {
    /// Of looks that failed.
    delay: Delay,
    /// It was said that there are no places left.
    has_said_full: bool,
}

/// How a look went, or a part of it; the worst counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    /// All was seen.
    All,
    /// Something is locked, or to be kept away from, for now.
    NotNow,
    /// Something failed, or there is no place for it.
    Failed,
}

impl Survey {
    /// Attaches those queues of this database. Returns when to look again, because some could not be looked at.
    pub fn attach_queues(&mut self, database: u32) -> i64 {
        match attach_queues(database, &mut self.has_said_full) {
            Seen::All => {
                *self = Survey::default();
                NEVER_US
            }
            Seen::NotNow => clock::now().mono_us + LOOK_AGAIN_US,
            Seen::Failed => {
                self.delay = self.delay.longer(&FAILED_US);
                self.delay.until_us
            }
        }
    }
}

fn attach_queues(database: u32, has_said_full: &mut bool) -> Seen {
    let (has_listeners, has_news) =
        shmem::with_arena(|arena, _, _| (arena.has_listeners(database), arena.news_unplaced_taken(database)))
            .unwrap_or_default();
    let found = worker::transaction("looking at queues", || {
        if !try_lock_catalog("lease", RowExclusiveLock) || !try_lock_catalog("queue", AccessShareLock) {
            return Ok(None);
        }
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
        Ok(Some(queues.collect::<Vec<_>>()))
    });
    let mut all = match &found {
        Some(Some(_)) => Seen::All,
        Some(None) => Seen::NotNow,
        None => Seen::Failed,
    };
    for (relation, is_wanted) in found.flatten().unwrap_or_default() {
        if super::is_kept_away(database) {
            return Seen::NotNow; // for we end now
        }
        let is_attached = shmem::with_arena(|arena, _, _| arena.queue_find(database, relation).is_some());
        if is_attached.unwrap_or(true) {
            continue;
        }
        // Each in a transaction of its own: what one owner has done to his table keeps no other's queue.
        let seen = worker::transaction("looking at a queue", || Ok(attach(relation, is_wanted, has_news)));
        match seen {
            Some(Err(error @ Error::Full { .. })) => {
                if !std::mem::replace(has_said_full, true) {
                    let place = worker::place();
                    pgrx::log!(
                        "pg_queue worker: some queues are not served until they are used, and there is a place for them: \
                         {} ({place})",
                        error.in_a_line()
                    );
                }
                all = Seen::Failed;
                break;
            }
            Some(Ok(true)) => {}
            Some(Ok(false) | Err(Error::BeingRestored { .. })) => all = all.max(Seen::NotNow),
            // Any other error: it is changed or dropped right now, or broken. Whoever uses it next attaches it, too.
            Some(Err(_)) | None => all = Seen::Failed,
        }
        pgrx::check_for_interrupts!();
    }
    if all != Seen::All && has_news {
        let _ = shmem::with_arena(|arena, _, _| arena.news_unplaced_again(database));
    }
    all
}

/// False: it is locked, or to be kept away from for now.
fn attach(relation: u32, is_wanted: bool, has_news: bool) -> crate::Result<bool> {
    if !avoid::may_begin(relation) || !table::try_lock(relation, AccessShareLock) {
        return Ok(false);
    }
    let is_here = user::relation_schema(relation) == user::schema(c"queue");
    let Some(name) = user::relation_name(relation).filter(|_| is_here) else { return Ok(true) };
    if is_wanted || has_expiring(relation) {
        let queue = resolve::open(&name, AccessShareLock)?;
        if has_news && has_rows(&queue) {
            queue.with(|arena, at, _, fx| arena.news(at, fx))?;
        }
    }
    Ok(true)
}

fn has_rows(queue: &Queue) -> bool {
    let Some(table) = Table::open(queue.relation, None) else { return false };
    let snapshot = Snapshot::latest();
    let mut walk = table.walk(queue.key, i64::MIN, false, &snapshot);
    let has_some = walk.next().is_some();
    walk.end();
    snapshot.done();
    table.close(None, true);
    has_some
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

/// What this process took in of `ALTER DATABASE ... SET pg_queue.worker_enabled` at its start. Where a setting of its role
/// has hidden that: what it says now.
pub fn enabled_at_start() -> Option<bool> {
    let source = worker::transaction("looking at settings", || {
        let outcome = spi::look(
            "SELECT source FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) 'pg_queue.worker_enabled'",
            &[],
            &[],
        );
        Ok(outcome.rows.first().and_then(|row: &Vec<Value>| row[0].text()))
    });
    match source.flatten().as_deref() {
        Some("user" | "database user") | None => enabled_setting(),
        Some("database") => Some(settings::is_worker_enabled()),
        Some(_) => None,
    }
}

/// What it says now: another process would take that in.
pub fn enabled_setting() -> Option<bool> {
    worker::transaction("looking at settings", || {
        let outcome = spi::look(
            "SELECT pg_catalog.split_part(s, '=', 2) \
             FROM pg_catalog.pg_db_role_setting d, LATERAL pg_catalog.unnest(d.setconfig) s \
             WHERE d.setrole OPERATOR(pg_catalog.=) 0 \
             AND d.setdatabase OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database \
               WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()) \
             AND pg_catalog.starts_with(s, 'pg_queue.worker_enabled=')",
            &[],
            &[],
        );
        Ok(outcome
            .rows
            .first()
            .and_then(|row: &Vec<Value>| row[0].text())
            .as_deref()
            .and_then(worker::parse_bool))
    })
    .flatten()
}
