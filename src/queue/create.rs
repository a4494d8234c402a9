//! Making queues. Owns the definition of a queue's tables, and takes on what a restore has left of them.
//!
//! The tables are made with the rights of the extension (a caller needs CREATE on schema `queue` and nothing on
//! the trigger function or on `queue_archive`) and then given to the caller. Everything here takes effect at commit.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Value};
use crate::pg::spi::{self, quoted};
use crate::pg::table::{self, AccessExclusiveLock, Table};
use crate::pg::{shmem, user};
use crate::queue::admin::{self, oid, run_ddl};
use crate::queue::resolve::{self, Settings};
use crate::queue::{args, journal, list, schedule, stored};
use crate::settings;
use pgrx::pg_sys;

fn check_name(name: &str) -> Result<()> {
    let why = if name.is_empty() {
        "It is empty."
    } else if name.len() > settings::NAME_BYTES_MAX {
        "A queue's name is its table's name: it has at most 63 bytes."
    } else {
        return Ok(());
    };
    Err(Error::NameInvalid { name: name.to_owned(), why })
}

/// `queue_create`.
pub fn queue_create(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    check_name(&name)?;
    if !shmem::is_available() {
        return Err(Error::NotPreloaded);
    }
    let given = stored::given(args, Settings::DEFAULT)?;
    let (is_unlogged, if_not_exists) = (args::flag(args, 17, false), args::flag(args, 18, false));
    let schema = user::schema(c"queue").ok_or_else(|| Error::Unknown {
        kind: "schema",
        name: "queue".into(),
        hint: Some("Run CREATE EXTENSION pg_queue.".into()),
    })?;
    if !user::may_create_in(schema) {
        return Err(Error::Denied { action: "create", queue: name, needs: "CREATE on schema queue".into() });
    }
    let existing = resolve::find_table(&name).or_else(|| {
        // Another transaction may be making it: wait for what becomes of that.
        table::lock_name(schema, list::hash(&name));
        resolve::find_table(&name)
    });
    let left = match existing.map(|table| (table, resolve::read_settings(table))) {
        Some((table, Some((_, settings)))) if if_not_exists => {
            let differs = !args.value(17).is_null() && user::is_unlogged(table) != is_unlogged;
            stored::notice_differences(&name, args, &settings, &given, differs);
            return Ok(Value::of(false));
        }
        Some((_, Some(_))) => return Err(Error::QueueExists { queue: name }),
        Some((table, None)) => {
            if given.dead_letter_queue.as_ref().is_some_and(|target| !target.is_empty()) {
                admin::lock_dead_letter_queues(); // to a new queue nobody can refer yet
            }
            let is_alike = args.value(17).is_null() || user::is_unlogged(table) == is_unlogged;
            let archive = archive_of_left(&name, table).filter(|_| is_alike);
            Some((table, archive.ok_or_else(|| Error::TableExists { name: name.clone() })?))
        }
        None => None,
    };
    let owner = left.map_or_else(user::current, |(table, _)| user::owner(table));
    let dead_letter_queue = match &given.dead_letter_queue {
        Some(target) => admin::dead_letter_target(&name, left.map(|(table, _)| table), owner, target)?,
        None => None,
    };
    let s = Settings { dead_letter_queue, ..given.settings };
    let (relation, archive) = match left {
        Some((table, archive)) => {
            stored::set_expiry_default(table, s.message_ttl_us);
            (table, archive)
        }
        None => make(&name, owner, is_unlogged, s.message_ttl_us)?,
    };
    user::acting_as_extension(|| {
        // What a plain DROP TABLE left behind.
        spi::run(
            "DELETE FROM queue_catalog.queue q WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_class c \
             WHERE c.oid OPERATOR(pg_catalog.=) q.queue::pg_catalog.oid)",
            &[],
            &[],
        );
        schedule::forget_orphans();
        stored::insert(relation, archive, &s);
    });
    match left {
        Some(_) => journal::mark_from(relation, i64::MIN)?,
        None => journal::created(relation)?,
    }
    if s.archive_retention_us > 0 {
        journal::worker_called()?;
    }
    Ok(Value::of(true))
}

/// The archive of a table that is a queue's in all but the catalog's row, as a restore without the catalog's data leaves it
/// (pg_dump --schema-only, --schema=queue*). Both must be the caller's: he becomes, or stays, the owner of a queue. From
/// here on it is locked against everybody.
fn archive_of_left(name: &str, table: u32) -> Option<u32> {
    let archive = user::relation(user::schema(c"queue_archive")?, name)?;
    if !user::is_owner(table) || !user::is_owner(archive) || user::owner(table) != user::owner(archive) {
        return None;
    }
    table::lock(table, AccessExclusiveLock);
    if resolve::find_table(name) != Some(table) {
        return None;
    }
    let triggers = spi::look(
        "SELECT FROM pg_catalog.pg_trigger WHERE tgrelid OPERATOR(pg_catalog.=) $1 \
         AND tgfoid OPERATOR(pg_catalog.=) 'queue.on_change()'::pg_catalog.regprocedure::pg_catalog.oid",
        &[pg_sys::OIDOID.into()],
        &[oid(table)],
    );
    let table = Table::open(table, None)?;
    let is_ours = table.is_heap() && resolve::columns_are_ours(&table.columns()) && triggers.processed == 2;
    table.close(None, true);
    is_ours.then_some(archive)
}

/// A new queue's table and archive.
fn make(name: &str, owner: u32, is_unlogged: bool, ttl_us: i64) -> Result<(u32, u32)> {
    if user::schema(c"queue_archive").is_some_and(|schema| user::relation(schema, name).is_some()) {
        return Err(Error::ArchiveLeft { queue: name.to_owned() });
    }
    // The tables are made with other rights than the caller's.
    if !user::may_use_default_tablespace(is_unlogged) {
        return Err(Error::Denied {
            action: "create",
            queue: name.to_owned(),
            needs: "CREATE on the tablespace that default_tablespace names".into(),
        });
    }
    let relation = user::acting_as_extension(|| make_tables(name, owner, is_unlogged, ttl_us))
        .ok_or_else(|| Error::Broken { queue: name.to_owned(), detail: "Its table was not made.".into() })?;
    let archive = user::schema(c"queue_archive").and_then(|schema| user::relation(schema, name)).unwrap_or(0);
    Ok((relation, archive))
}

/// How a queue's table is vacuumed: by the number of dead rows, not by their share. Every message leaves one, also
/// beside a backlog of which a fifth (the default) is much. Measured by `cargo xtask soak` at 2,500 messages a second
/// beside a backlog of 500,000: a table of 97 MB instead of 115, a quarter of the dead rows, CPU and WAL alike; without a
/// backlog no difference beyond noise, nor by autovacuum_vacuum_cost_delay = 0. One run of two minutes each.
const VACUUM: &str = "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000";

/// The tables, their indexes and triggers, owned by `owner`. Returns the queue's table.
fn make_tables(name: &str, owner: u32, is_unlogged: bool, ttl_us: i64) -> Option<u32> {
    let table = quoted(name);
    let kind = if is_unlogged { "UNLOGGED TABLE" } else { "TABLE" };
    let columns = "enqueued_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(), \
        visible_at pg_catalog.timestamptz, \
        delivery_count pg_catalog.int4 NOT NULL DEFAULT 0, \
        priority pg_catalog.int2 NOT NULL DEFAULT 0, \
        group_key pg_catalog.text, \
        headers pg_catalog.jsonb, \
        message pg_catalog.jsonb NOT NULL, \
        last_error pg_catalog.text";
    let default =
        if ttl_us > 0 { format!(" DEFAULT ({})", stored::expiry_default(ttl_us)) } else { String::new() };
    run_ddl(&format!(
        "CREATE {kind} queue.{table} (msg_id pg_catalog.int8 NOT NULL, {columns}, \
         expires_at pg_catalog.timestamptz{default}) USING heap WITH ({VACUUM})"
    ));
    run_ddl(&format!(
        "CREATE {kind} queue_archive.{table} (msg_id pg_catalog.int8 NOT NULL, {columns}, \
         archived_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(), \
         archive_reason pg_catalog.text) USING heap"
    ));
    let relation = user::relation(user::schema(c"queue")?, name)?;
    let archive = user::relation(user::schema(c"queue_archive")?, name)?;
    // Helpers are named by oid: else a queue "a_pkey" and the key of a queue "a" would collide. A restored queue's
    // helpers carry the oids of another database, so a name may be taken all the same.
    let free = |schema: &std::ffi::CStr, base: &str, oid: u32| {
        let is_free =
            |name: &String| user::schema(schema).is_some_and(|schema| user::relation(schema, name).is_none());
        let name = format!("{base}_{oid}");
        (1..=1_000).map(|i| format!("{name}_{i}")).find(is_free).filter(|_| !is_free(&name)).unwrap_or(name)
    };
    let key = free(c"queue", "queue_key", relation);
    let sequence = free(c"queue", "queue_id", relation);
    run_ddl(&format!(
        "ALTER TABLE queue.{table} ADD CONSTRAINT {key} PRIMARY KEY (msg_id), \
         ALTER COLUMN msg_id ADD GENERATED BY DEFAULT AS IDENTITY (SEQUENCE NAME queue.{sequence})"
    ));
    let due = free(c"queue", "queue_due", relation);
    run_ddl(&format!("CREATE INDEX {due} ON queue.{table} (visible_at) WHERE visible_at IS NOT NULL"));
    let expiry = free(c"queue", "queue_expiry", relation);
    run_ddl(&format!("CREATE INDEX {expiry} ON queue.{table} (expires_at) WHERE expires_at IS NOT NULL"));
    let kept = free(c"queue_archive", "queue_archive", archive);
    run_ddl(&format!("CREATE INDEX {kept} ON queue_archive.{table} (msg_id)"));
    let aged = free(c"queue_archive", "queue_archived", archive);
    run_ddl(&format!("CREATE INDEX {aged} ON queue_archive.{table} (archived_at)"));
    // It has no unique key, and must not refuse deletions where all tables are published.
    run_ddl(&format!("ALTER TABLE queue_archive.{table} REPLICA IDENTITY FULL"));
    run_ddl(&format!(
        "CREATE TRIGGER pg_queue_change AFTER INSERT OR UPDATE ON queue.{table} \
         FOR EACH ROW EXECUTE FUNCTION queue.on_change()"
    ));
    run_ddl(&format!(
        "CREATE TRIGGER pg_queue_truncate AFTER TRUNCATE ON queue.{table} \
         FOR EACH STATEMENT EXECUTE FUNCTION queue.on_change()"
    ));
    // Also where session_replication_role = replica: logical replication, some restores.
    run_ddl(&format!(
        "ALTER TABLE queue.{table} ENABLE ALWAYS TRIGGER pg_queue_change, \
         ENABLE ALWAYS TRIGGER pg_queue_truncate"
    ));
    revoke_defaults(&[relation, archive, user::relation(user::schema(c"queue")?, &sequence)?]);
    let owner = quoted(&user::role_name(owner));
    run_ddl(&format!("ALTER TABLE queue.{table} OWNER TO {owner}"));
    run_ddl(&format!("ALTER TABLE queue_archive.{table} OWNER TO {owner}"));
    Some(relation)
}

/// Takes back what ALTER DEFAULT PRIVILEGES has given others on what the extension just made. It was said of a
/// superuser's own tables, and would stay when these are given to the caller.
fn revoke_defaults(relations: &[u32]) {
    let revocations = spi::run(
        "SELECT DISTINCT pg_catalog.format('REVOKE ALL ON TABLE %I.%I FROM %s', n.nspname, c.relname, \
           COALESCE(pg_catalog.quote_ident(r.rolname::pg_catalog.text), 'PUBLIC')) \
         FROM pg_catalog.pg_class c \
         JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
         CROSS JOIN pg_catalog.aclexplode(c.relacl) a \
         LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) a.grantee \
         WHERE c.oid OPERATOR(pg_catalog.=) ANY ($1) AND a.grantee OPERATOR(pg_catalog.<>) c.relowner",
        &[pg_sys::OIDARRAYOID.into()],
        &[Value::array(
            pg_sys::OIDOID.into(),
            &relations.iter().map(|relation| oid(*relation)).collect::<Vec<_>>(),
        )],
    );
    for statement in revocations.rows.iter().filter_map(|row| row[0].text()) {
        run_ddl(&statement);
    }
}
