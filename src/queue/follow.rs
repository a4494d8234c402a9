//! What becomes of a queue when its tables are renamed, given away or dropped by plain DDL. Owns what is then changed of
//! the archive and of `queue_catalog.queue`; called by the hooks, in the transaction that runs the DDL.

use crate::pg::spi::{self, quoted};
use crate::pg::table::Snapshot;
use crate::pg::{hooks, user};
use crate::queue::admin::{oid, run_ddl};
use crate::queue::resolve;
use pgrx::pg_sys;

/// A table was renamed, and if it is a queue's, the queue with it: so is its archive, unless the name is taken.
pub fn table_renamed(relation: u32) {
    let Some((archive, _)) = resolve::read_settings(relation) else { return };
    let (Some(name), Some(was)) = (user::relation_name(relation), resolve::archive_name(archive)) else {
        return;
    };
    let is_taken = user::schema(c"queue_archive").is_none_or(|schema| user::relation(schema, &name).is_some());
    if name != was && !is_taken {
        user::acting_as_extension(|| {
            run_ddl(&format!("ALTER TABLE queue_archive.{} RENAME TO {}", quoted(&was), quoted(&name)));
        });
    }
}

/// A queue's table is being dropped: those that sent their dead letters there send them to their archives from now on.
pub fn dead_letter_queue_dropped(relation: u32) {
    update_references(
        "UPDATE queue_catalog.queue SET dead_letter_queue = NULL \
         WHERE dead_letter_queue OPERATOR(pg_catalog.=) $1::pg_catalog.regclass RETURNING queue::pg_catalog.oid",
        relation,
    );
}

/// An archive is being dropped without its queue.
pub fn archive_dropped(relation: u32) {
    update_references(
        "UPDATE queue_catalog.queue SET archive = '-'::pg_catalog.regclass \
         WHERE archive OPERATOR(pg_catalog.=) $1::pg_catalog.regclass RETURNING queue::pg_catalog.oid",
        relation,
    );
}

/// Runs such a statement, within whatever drops the table; also where that drops the extension, whose own tables may be
/// gone already.
fn update_references(statement: &str, relation: u32) {
    if user::schema(c"queue_catalog").is_none_or(|schema| user::relation(schema, "queue").is_none()) {
        return;
    }
    // What refers to it may be newer than the transaction's snapshot (REPEATABLE READ).
    let snapshot = Snapshot::latest();
    let outcome = user::acting_as_extension(|| {
        spi::run_under(&snapshot, statement, &[pg_sys::OIDOID.into()], &[oid(relation)])
    });
    snapshot.done();
    for queue in outcome.rows.iter().filter_map(|row| row[0].get::<pg_sys::Oid>()) {
        if user::relation_name(queue.into()).is_some() {
            hooks::invalidate_relation(queue.into());
        }
    }
}

/// A table was given away, and if it is a queue's, the queue with it: so is its archive, into which its owner's rights
/// move messages. An archive that was somebody else's stays his.
pub fn table_reowned(relation: u32, was: u32) {
    let owner = user::owner(relation);
    if owner == was {
        return;
    }
    let Some((archive, _)) = resolve::read_settings(relation) else { return };
    if let Some(name) = resolve::archive_name(archive).filter(|_| user::owner(archive) == was) {
        let (name, owner) = (quoted(&name), quoted(&user::role_name(owner)));
        user::acting_as_extension(|| run_ddl(&format!("ALTER TABLE queue_archive.{name} OWNER TO {owner}")));
    }
}
