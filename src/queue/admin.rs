//! Changing, emptying and dropping queues: who may, and under which locks. Making them is in `create`, what is written
//! of their settings in `stored`. Everything here takes effect at commit.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Value};
use crate::pg::shmem;
use crate::pg::spi::{self, quoted};
use crate::pg::table::{self, AccessExclusiveLock, AccessShareLock, RowExclusiveLock, Snapshot, Table};
use crate::pg::user::{self, Right};
use crate::queue::resolve::{self, Settings};
use crate::queue::{args, schedule, stored};
use pgrx::pg_sys;

/// A relation's oid as a value.
pub fn oid(relation: u32) -> Value {
    Value::of(pg_sys::Oid::from(relation))
}

/// One transaction at a time says where dead letters go: two could make a circle of what each alone is none.
pub fn lock_dead_letter_queues() {
    if let Some(schema) = user::schema(c"queue_catalog") {
        table::lock_name(schema, 0);
    }
}

/// The table of a dead-letter queue, checked: it exists, is no circle, and the queue's owner may send to it.
/// [`lock_dead_letter_queues`] comes first where there is a target, unless nobody can refer to this queue yet.
pub fn dead_letter_target(queue: &str, relation: Option<u32>, owner: u32, target: &str) -> Result<Option<u32>> {
    if target.is_empty() {
        return Ok(None);
    }
    let circle = |hint: &str| Error::Arguments {
        message: format!("queue \"{target}\" cannot be the dead-letter queue of \"{queue}\""),
        hint: Some(hint.to_owned()),
    };
    if target == queue {
        return Err(circle("A queue cannot be its own dead-letter queue."));
    }
    let unknown = || Error::QueueUnknown { queue: target.to_owned() };
    let is_allowed = |table| {
        if user::role_has_rights(owner, table, &[Right::Insert]) {
            return Ok(());
        }
        Err(Error::Denied {
            action: "send dead letters to",
            queue: target.to_owned(),
            needs: "INSERT on its table for the queue's owner".into(),
        })
    };
    // Locked, so that nobody drops it before the row that refers to it is there to be seen.
    let (table, _, _) = find(target, AccessShareLock, is_allowed)?;
    let mut next = Some(resolve::read_settings(table).ok_or_else(unknown)?.1);
    // A circle that plain SQL in the catalog has made must not hold us.
    let mut seen = std::collections::HashSet::from([table]);
    while let Some(Settings { dead_letter_queue: Some(after), .. }) = next {
        if Some(after) == relation {
            return Err(circle("Its dead letters would come back."));
        }
        if !seen.insert(after) {
            break;
        }
        next = resolve::read_settings(after).map(|(_, settings)| settings);
    }
    Ok(Some(table))
}

/// Runs a utility statement that needs no arguments.
pub fn run_ddl(statement: &str) {
    spi::run(statement, &[], &[]);
}

/// A queue's table for one who may administer it: locked, so that changes to one queue follow each other. Whether it is
/// a queue, and whether he may, is asked before he waits for the lock, in which everybody else would have to stand
/// behind him (an index or a sequence has a name in the schema, too); and once more when he has it. A caller who goes on
/// in spite of an error keeps no lock.
pub fn find(name: &str, mode: u32, check: impl Fn(u32) -> Result<()>) -> Result<(u32, u32, Settings)> {
    if !shmem::is_available() {
        return Err(Error::NotPreloaded);
    }
    let unknown = || Error::QueueUnknown { queue: name.to_owned() };
    loop {
        let relation = resolve::find_table(name).ok_or_else(unknown)?;
        resolve::read_settings(relation).ok_or_else(unknown)?;
        check(relation)?;
        table::lock(relation, mode);
        if resolve::find_table(name) == Some(relation) {
            let found = resolve::read_settings(relation).ok_or_else(unknown);
            let found = found.and_then(|found| check(relation).map(|()| found));
            if found.is_err() {
                table::unlock(relation, mode);
            }
            return found.map(|(archive, settings)| (relation, archive, settings));
        }
        table::unlock(relation, mode);
    }
}

fn check_owner(name: &str, relation: u32, action: &'static str) -> Result<()> {
    if user::is_owner(relation) {
        return Ok(());
    }
    Err(Error::Denied { action, queue: name.to_owned(), needs: "ownership of its table".into() })
}

/// A lock that lets messages flow and one alteration at a time.
pub const ALTER_LOCK: u32 = pg_sys::ShareUpdateExclusiveLock;

/// `queue_alter`: null leaves a setting as it is.
pub fn queue_alter(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let check = |relation| check_owner(&name, relation, "alter");
    if !args.value(3).text().unwrap_or_default().is_empty() {
        // Before the table: whoever holds it may alter this queue next. Who may not alter it waits for nobody.
        resolve::find_table(&name).map_or(Ok(()), check)?;
        lock_dead_letter_queues();
    }
    let (relation, _, before) = find(&name, ALTER_LOCK, check)?;
    let mut given = stored::given(args, before.clone())?;
    if let Some(target) = &given.dead_letter_queue {
        let owner = user::owner(relation);
        given.settings.dead_letter_queue = dead_letter_target(&name, Some(relation), owner, target)?;
    }
    stored::store(relation, &given.settings, &before)?;
    Ok(Value::of(true))
}

fn set_paused(args: &Args, paused: bool) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let (relation, _, before) = find(&name, ALTER_LOCK, |relation| {
        if user::has_rights(relation, &[Right::Truncate]) {
            return Ok(());
        }
        let action = if paused { "pause" } else { "resume" };
        Err(Error::Denied { action, queue: name.clone(), needs: "TRUNCATE on its table".into() })
    })?;
    let changes = before.paused != paused;
    if changes {
        stored::store(relation, &Settings { paused, ..before.clone() }, &before)?;
    }
    Ok(Value::of(changes))
}

/// `queue_pause`: true if it was not paused.
pub fn queue_pause(args: &Args) -> Result<Value> {
    set_paused(args, true)
}

/// `queue_resume`: true if it was paused.
pub fn queue_resume(args: &Args) -> Result<Value> {
    set_paused(args, false)
}

/// `queue_drop`.
pub fn queue_drop(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let force = args::flag(args, 1, false);
    let found = find(&name, AccessExclusiveLock, |relation| check_owner(&name, relation, "drop"));
    let (relation, archive, _) = match found {
        Err(Error::QueueUnknown { .. }) => return Ok(Value::of(false)),
        found => found?,
    };
    // Under the lock nothing more comes in. What is there now may be newer than the transaction's snapshot (REPEATABLE
    // READ): committed while we waited.
    let snapshot = Snapshot::latest();
    let targets = user::acting_as_extension(|| {
        spi::look(
            "SELECT c.relname::pg_catalog.text FROM queue_catalog.queue q JOIN pg_catalog.pg_class c \
             ON c.oid OPERATOR(pg_catalog.=) q.queue::pg_catalog.oid \
             WHERE q.dead_letter_queue OPERATOR(pg_catalog.=) $1::pg_catalog.regclass",
            &[pg_sys::OIDOID.into()],
            &[oid(relation)],
        )
    });
    if !force {
        if let Some(of) = targets.rows.first().and_then(|row| row[0].text()) {
            return Err(Error::DeadLetterTarget { queue: name, of });
        }
        if has_rows(relation) || resolve::archive_name(archive).is_some() && has_rows(archive) {
            return Err(Error::NotEmpty { queue: name });
        }
    }
    user::acting_as_extension(|| {
        spi::run_under(
            &snapshot,
            "DELETE FROM queue_catalog.queue WHERE queue OPERATOR(pg_catalog.=) $1::pg_catalog.regclass",
            &[pg_sys::OIDOID.into()],
            &[oid(relation)],
        );
        schedule::forget(relation);
    });
    snapshot.done();
    // As the caller, who owns both. Queues that sent their dead letters here are told by the hook.
    run_ddl(&format!("DROP TABLE queue.{}", quoted(&name)));
    if let Some(archive) = resolve::archive_name(archive) {
        run_ddl(&format!("DROP TABLE queue_archive.{}", quoted(&archive)));
    }
    Ok(Value::of(true))
}

/// Whether a table has a row now. No statement: planning one runs functions of the owner's, with the rights of the
/// caller; and row-level security might hide the row.
fn has_rows(relation: u32) -> bool {
    let Some(table) = Table::open(relation, Some(AccessShareLock)) else { return false };
    let snapshot = Snapshot::latest();
    let has_some = table.has_rows(&snapshot);
    snapshot.done();
    table.close(Some(AccessShareLock), true);
    has_some
}

/// `queue_purge`: deletes every message, also what is leased; returns how many. Every message that there is now, also
/// what is newer than the transaction's snapshot.
pub fn queue_purge(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let queue = resolve::open(&name, RowExclusiveLock)?;
    if !user::has_rights(queue.relation, &[Right::Truncate]) {
        return Err(Error::Denied { action: "purge", queue: name, needs: "TRUNCATE on its table".into() });
    }
    // A DELETE rather than a TRUNCATE: it waits for no reader and keeps none waiting. Whoever has TRUNCATE may
    // empty the table: without DELETE the owner's right does it.
    let statement = format!("DELETE FROM ONLY {}", queue.table_name());
    let snapshot = Snapshot::latest();
    let purge = || spi::run_under(&snapshot, &statement, &[], &[]);
    let outcome = if user::has_rights(queue.relation, &[Right::Delete, Right::Select]) {
        purge()
    } else {
        user::acting_as(user::owner(queue.relation), purge)
    };
    snapshot.done();
    super::finish::let_go_of_gone(&queue)?;
    Ok(Value::of(outcome.processed as i64))
}
