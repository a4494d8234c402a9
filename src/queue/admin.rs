//! Making, changing and dropping queues; who may use them. Owns the definition of a queue's tables and its row in
//! `queue_catalog.queue`. Everything here takes effect at commit.
//!
//! The tables are made with the rights of the extension (a caller needs CREATE on schema `queue` and nothing on
//! the trigger function or on `queue_archive`) and then given to the caller.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Rows, Value};
use crate::pg::spi::{self, quoted};
use crate::pg::table::{self, AccessExclusiveLock, AccessShareLock, RowExclusiveLock, Snapshot, Table};
use crate::pg::user::{self, Right};
use crate::pg::{hooks, shmem};
use crate::queue::resolve::{self, Settings};
use crate::queue::{args, journal, schedule};
use crate::settings;
use pgrx::pg_sys;
use std::ops::RangeInclusive;

/// A relation's oid as a value.
pub fn oid(relation: u32) -> Value {
    Value::of(pg_sys::Oid::from(relation))
}

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

fn real(args: &Args, position: usize, name: &'static str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
    match args.value(position).get::<f64>() {
        Some(value) if !range.contains(&value) => {
            Err(Error::argument(name, value, format!("{} to {}", range.start(), range.end())))
        }
        other => Ok(other),
    }
}

/// What `queue_create` and `queue_alter` were given: positions 1 to 17 are the same in both.
struct Given {
    settings: Settings,
    dead_letter_queue: Option<String>,
}

fn given(args: &Args, base: Settings) -> Result<Given> {
    let mut s = base;
    let duration = |position, name, range| args::duration(args.value(position), name, range);
    if let Some(us) = duration(1, "visibility_timeout", settings::LEASE_US)? {
        s.visibility_timeout_us = us;
    }
    s.max_deliveries = args::number(args, 2, "max_deliveries", s.max_deliveries, settings::DELIVERIES)?;
    let dead_letter_queue = args.value(3).text();
    if let Some(us) = duration(4, "retry_delay", settings::DELAY_US)? {
        s.retry_delay_us = us;
    }
    if let Some(factor) = real(args, 5, "retry_backoff", settings::BACKOFF)? {
        s.retry_backoff = factor;
    }
    if let Some(us) = duration(6, "retry_delay_max", settings::DELAY_US)? {
        s.retry_delay_max_us = us;
    }
    if let Some(part) = real(args, 7, "retry_jitter", settings::JITTER)? {
        s.retry_jitter = part;
    }
    if let Some(us) = duration(8, "message_ttl", settings::TTL_US)? {
        s.message_ttl_us = us;
    }
    if let Some(us) = duration(9, "archive_retention", settings::RETENTION_US)? {
        s.archive_retention_us = us;
    }
    let is_zero = |position| args.value(position).interval().is_none_or(|i| i == (0, 0, 0));
    args::unbuilt(args.value(10).i64().unwrap_or(0) == 0, "max_length")?;
    args::unbuilt(args.value(11).text().is_none_or(|o| o == "reject"), "overflow")?;
    let window = args.value(12).interval();
    args::unbuilt(window.is_none_or(|i| i == (0, 0, 5 * 60 * settings::SECOND_US)), "dedup_window")?;
    args::unbuilt(is_zero(13), "priority_ageing")?;
    args::unbuilt(!args::flag(args, 14, false), "group_fairness")?;
    s.require_lease = args::flag(args, 15, s.require_lease);
    s.durable_leases = args::flag(args, 16, s.durable_leases);
    Ok(Given { settings: s, dead_letter_queue })
}

/// The table of a dead-letter queue, checked: it exists, is no circle, and the queue's owner may send to it.
fn dead_letter_target(queue: &str, relation: Option<u32>, owner: u32, target: &str) -> Result<Option<u32>> {
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
    // A circle that two alterations at a time have made must not hold us.
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

fn run_ddl(statement: &str) {
    spi::run(statement, &[], &[]);
}

/// `queue_create`.
pub fn queue_create(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    check_name(&name)?;
    if !shmem::is_available() {
        return Err(Error::NotPreloaded);
    }
    let given = given(args, Settings::DEFAULT)?;
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
        table::lock_name(schema, hash(&name));
        resolve::find_table(&name)
    });
    let left = match existing.map(|table| (table, resolve::read_settings(table))) {
        Some((table, Some((_, settings)))) if if_not_exists => {
            let differs = !args.value(17).is_null() && user::is_unlogged(table) != is_unlogged;
            notice_differences(&name, args, &settings, &given, differs);
            return Ok(Value::of(false));
        }
        Some((_, Some(_))) => return Err(Error::QueueExists { queue: name }),
        Some((table, None)) => {
            let is_alike = args.value(17).is_null() || user::is_unlogged(table) == is_unlogged;
            let archive = archive_of_left(&name, table).filter(|_| is_alike);
            Some((table, archive.ok_or_else(|| Error::TableExists { name: name.clone() })?))
        }
        None => None,
    };
    let owner = left.map_or_else(user::current, |(table, _)| user::owner(table));
    let dead_letter_queue = match &given.dead_letter_queue {
        Some(target) => dead_letter_target(&name, None, owner, target)?,
        None => None,
    };
    let s = Settings { dead_letter_queue, ..given.settings };
    let (relation, archive) = match left {
        Some((table, archive)) => {
            set_expiry_default(table, s.message_ttl_us);
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
        let (names, places): (Vec<&str>, Vec<String>) =
            COLUMNS.iter().zip(3..).map(|((name, kind), place)| (*name, placed(place, *kind))).unzip();
        let statement = format!(
            "INSERT INTO queue_catalog.queue (queue, archive, {}) \
             VALUES ($1::pg_catalog.regclass, $2::pg_catalog.regclass, {})",
            names.join(", "),
            places.join(", ")
        );
        run_stored(&statement, &[oid(relation), oid(archive)], &s);
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
    let default = if ttl_us > 0 { format!(" DEFAULT ({})", expiry_default(ttl_us)) } else { String::new() };
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

fn notice_differences(name: &str, args: &Args, is: &Settings, given: &Given, unlogged_differs: bool) {
    let mut differ = Vec::new();
    let wanted = &given.settings;
    let given_at = |position: usize| !args.value(position).is_null();
    let dead_letter_queue = is.dead_letter_queue.and_then(user::relation_name).unwrap_or_default();
    let all = [
        ("visibility_timeout", given_at(1) && is.visibility_timeout_us != wanted.visibility_timeout_us),
        ("max_deliveries", given_at(2) && is.max_deliveries != wanted.max_deliveries),
        ("dead_letter_queue", given.dead_letter_queue.as_ref().is_some_and(|d| *d != dead_letter_queue)),
        ("retry_delay", given_at(4) && is.retry_delay_us != wanted.retry_delay_us),
        ("retry_backoff", given_at(5) && is.retry_backoff != wanted.retry_backoff),
        ("retry_delay_max", given_at(6) && is.retry_delay_max_us != wanted.retry_delay_max_us),
        ("retry_jitter", given_at(7) && is.retry_jitter != wanted.retry_jitter),
        ("message_ttl", given_at(8) && is.message_ttl_us != wanted.message_ttl_us),
        ("archive_retention", given_at(9) && is.archive_retention_us != wanted.archive_retention_us),
        ("require_lease", given_at(15) && is.require_lease != wanted.require_lease),
        ("durable_leases", given_at(16) && is.durable_leases != wanted.durable_leases),
        ("unlogged", unlogged_differs),
    ];
    for (setting, differs) in all {
        if differs {
            differ.push(setting);
        }
    }
    if differ.is_empty() {
        pgrx::notice!("queue \"{name}\" already exists");
    } else {
        pgrx::notice!("queue \"{name}\" already exists with other settings: {}", differ.join(", "));
    }
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

/// The columns of `queue_catalog.queue` that hold settings, with the types that their values are given in.
const COLUMNS: [(&str, pg_sys::Oid); 12] = [
    ("visibility_timeout", pg_sys::INTERVALOID),
    ("max_deliveries", pg_sys::INT8OID),
    ("dead_letter_queue", pg_sys::OIDOID),
    ("retry_delay", pg_sys::INTERVALOID),
    ("retry_backoff", pg_sys::FLOAT8OID),
    ("retry_delay_max", pg_sys::INTERVALOID),
    ("retry_jitter", pg_sys::FLOAT8OID),
    ("require_lease", pg_sys::BOOLOID),
    ("paused", pg_sys::BOOLOID),
    ("message_ttl", pg_sys::INTERVALOID),
    ("archive_retention", pg_sys::INTERVALOID),
    ("durable_leases", pg_sys::BOOLOID),
];

/// A parameter's place in a statement, as its column takes it.
fn placed(place: usize, kind: pg_sys::Oid) -> String {
    if kind == pg_sys::OIDOID {
        format!("${place}::pg_catalog.regclass")
    } else {
        format!("${place}")
    }
}

/// Which columns, in the order of [`COLUMNS`], hold other settings in one than in the other.
fn differing(one: &Settings, other: &Settings) -> [bool; COLUMNS.len()] {
    [
        one.visibility_timeout_us != other.visibility_timeout_us,
        one.max_deliveries != other.max_deliveries,
        one.dead_letter_queue != other.dead_letter_queue,
        one.retry_delay_us != other.retry_delay_us,
        one.retry_backoff != other.retry_backoff,
        one.retry_delay_max_us != other.retry_delay_max_us,
        one.retry_jitter != other.retry_jitter,
        one.require_lease != other.require_lease,
        one.paused != other.paused,
        one.message_ttl_us != other.message_ttl_us,
        one.archive_retention_us != other.archive_retention_us,
        one.durable_leases != other.durable_leases,
    ]
}

/// Runs a statement whose parameters are these oids and then the settings, in the order of [`COLUMNS`].
fn run_stored(statement: &str, oids: &[Value], s: &Settings) -> spi::Outcome {
    let stored = [
        Value::of_interval_us(s.visibility_timeout_us),
        Value::of(s.max_deliveries),
        s.dead_letter_queue.map_or(Value::NULL, oid),
        Value::of_interval_us(s.retry_delay_us),
        Value::of(s.retry_backoff),
        Value::of_interval_us(s.retry_delay_max_us),
        Value::of(s.retry_jitter),
        Value::of(s.require_lease),
        Value::of(s.paused),
        Value::of_interval_us(s.message_ttl_us),
        Value::of_interval_us(s.archive_retention_us),
        Value::of(s.durable_leases),
    ];
    let types: Vec<u32> = oids
        .iter()
        .map(|_| pg_sys::OIDOID)
        .chain(COLUMNS.iter().map(|(_, kind)| *kind))
        .map(u32::from)
        .collect();
    let values: Vec<Value> = oids.iter().copied().chain(stored).collect();
    spi::run(statement, &types, &values)
}

/// The default of `expires_at`, for messages that plain SQL sends.
fn expiry_default(ttl_us: i64) -> String {
    format!("pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) '{ttl_us} microseconds'::pg_catalog.interval")
}

/// Writes what settings are other ones than before, and has every backend and the dispatcher take them in at commit. What
/// stays is not written: the drop of a dead-letter queue changes other queues' rows without a lock on their tables.
fn store(relation: u32, s: &Settings, before: &Settings) -> Result<()> {
    let changes: Vec<String> = COLUMNS
        .iter()
        .zip(2..)
        .zip(differing(s, before))
        .filter(|(_, differs)| *differs)
        .map(|(((name, kind), place), _)| format!("{name} = {}", placed(place, *kind)))
        .collect();
    if changes.is_empty() {
        return Ok(());
    }
    let statement = format!(
        "UPDATE queue_catalog.queue SET {} WHERE queue OPERATOR(pg_catalog.=) $1::pg_catalog.regclass",
        changes.join(", ")
    );
    let outcome = user::acting_as_extension(|| run_stored(&statement, &[oid(relation)], s));
    if outcome.processed != 1 {
        // It was made or dropped since this transaction's snapshot (REPEATABLE READ).
        return Err(Error::QueueUnknown { queue: user::relation_name(relation).unwrap_or_default() });
    }
    hooks::invalidate_relation(relation);
    if s.message_ttl_us != before.message_ttl_us {
        set_expiry_default(relation, s.message_ttl_us);
    }
    if s.archive_retention_us != before.archive_retention_us {
        journal::worker_called()?;
    }
    journal::configured(relation, s.policy(), before.policy())
}

/// Locks the table against everybody for a moment, as any ALTER TABLE that changes a default does.
fn set_expiry_default(relation: u32, ttl_us: i64) {
    let Some(name) = user::relation_name(relation) else { return };
    let default = if ttl_us > 0 {
        format!("SET DEFAULT ({})", expiry_default(ttl_us))
    } else {
        "DROP DEFAULT".to_owned()
    };
    user::acting_as_extension(|| {
        run_ddl(&format!("ALTER TABLE queue.{} ALTER COLUMN expires_at {default}", quoted(&name)));
    });
}

/// A lock that lets messages flow and one alteration at a time.
const ALTER_LOCK: u32 = pg_sys::ShareUpdateExclusiveLock;

/// `queue_alter`: null leaves a setting as it is.
pub fn queue_alter(args: &Args) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let (relation, _, before) = find(&name, ALTER_LOCK, |relation| check_owner(&name, relation, "alter"))?;
    let mut given = given(args, before.clone())?;
    if let Some(target) = &given.dead_letter_queue {
        let owner = user::owner(relation);
        given.settings.dead_letter_queue = dead_letter_target(&name, Some(relation), owner, target)?;
    }
    store(relation, &given.settings, &before)?;
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
        store(relation, &Settings { paused, ..before.clone() }, &before)?;
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

fn rights_of(capability: &str) -> Result<(&'static str, &'static str)> {
    match capability {
        "send" => Ok(("INSERT", "")),
        "observe" => Ok(("SELECT", "SELECT")),
        "consume" => Ok(("SELECT, UPDATE, DELETE", "")),
        "admin" => Ok(("SELECT, UPDATE, DELETE, TRUNCATE", "SELECT")),
        _ => Err(Error::Argument {
            argument: "capability",
            value: format!("\"{capability}\""),
            allowed: "send, observe, consume, admin".into(),
        }),
    }
}

fn change_grants(args: &Args, verb: &str, preposition: &str) -> Result<Value> {
    let name = args::text(args, 0, "queue")?;
    let role = args::text(args, 1, "role")?;
    let capability = args::text(args, 2, "capability")?;
    let (on_queue, on_archive) = rights_of(&capability)?;
    let role = if role == "public" {
        "PUBLIC".to_owned()
    } else if user::role_exists(&role) {
        quoted(&role)
    } else {
        return Err(Error::Unknown { kind: "role", name: role, hint: None });
    };
    // Before he waits for the lock: whoever may not must not stand in others' way.
    let unknown = || Error::QueueUnknown { queue: name.clone() };
    resolve::find_table(&name).and_then(resolve::read_settings).ok_or_else(unknown)?;
    // Postgres only warns when somebody grants what he has and may not pass on.
    let may = |table: u32, rights: &str| {
        rights.is_empty()
            || user::is_owner(table)
            || spi::run(
                "SELECT FROM pg_catalog.unnest(pg_catalog.string_to_array($2, ', ')) AS r (name) \
                 WHERE NOT pg_catalog.has_table_privilege($1, r.name OPERATOR(pg_catalog.||) ' WITH GRANT OPTION')",
                &[pg_sys::OIDOID.into(), pg_sys::TEXTOID.into()],
                &[oid(table), Value::of(rights)],
            )
            .processed
                == 0
    };
    let check = |relation| {
        let archive = resolve::read_settings(relation).map_or(0, |(archive, _)| archive);
        let has_archive = resolve::archive_name(archive).is_some();
        if may(relation, on_queue) && (!has_archive || may(archive, on_archive)) {
            return Ok(());
        }
        Err(Error::Denied {
            action: "change grants on",
            queue: name.clone(),
            needs: format!("ownership of its table, or {on_queue} on it WITH GRANT OPTION"),
        })
    };
    // One at a time: Postgres fails where two change the grants on one table.
    let (_, archive, _) = find(&name, ALTER_LOCK, check)?;
    // Plain statements of the caller's, so that Postgres decides the rest.
    run_ddl(&format!("{verb} {on_queue} ON TABLE queue.{} {preposition} {role}", quoted(&name)));
    if let (false, Some(archive)) = (on_archive.is_empty(), resolve::archive_name(archive)) {
        run_ddl(&format!(
            "{verb} {on_archive} ON TABLE queue_archive.{} {preposition} {role}",
            quoted(&archive)
        ));
    }
    Ok(Value::of(true))
}

/// `queue_grant`.
pub fn queue_grant(args: &Args) -> Result<Value> {
    change_grants(args, "GRANT", "TO")
}

/// `queue_revoke`.
pub fn queue_revoke(args: &Args) -> Result<Value> {
    change_grants(args, "REVOKE", "FROM")
}

/// What the channels of all queues begin with.
pub const CHANNEL_PREFIX: &str = "queue_";

/// The channel on which the worker notifies of a queue: `queue_<name>`, hashed beyond 63 bytes.
pub fn channel(name: &str) -> String {
    let channel = format!("{CHANNEL_PREFIX}{name}");
    if channel.len() <= settings::NAME_BYTES_MAX {
        return channel;
    }
    format!("{CHANNEL_PREFIX}{:016x}", hash(name))
}

/// FNV-1a, 64 bits: it only has to be the same for whoever listens, or makes a queue of that name.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Whether the caller may use a queue in any way.
pub fn may_use(relation: u32) -> bool {
    user::is_owner(relation)
        || [Right::Insert, Right::Select, Right::Update, Right::Delete, Right::Truncate]
            .iter()
            .any(|right| user::has_rights(relation, &[*right]))
}

/// `queue_list`: a row for each queue that the caller may use in any way; pg_monitor sees all.
pub fn queue_list(_args: &Args, rows: &mut Rows) -> Result<()> {
    let outcome = user::acting_as_extension(|| {
        spi::look(
            "SELECT c.oid, c.relname::pg_catalog.text, pg_catalog.pg_get_userbyid(c.relowner)::pg_catalog.text, \
             q.visibility_timeout, q.max_deliveries, COALESCE(d.relname::pg_catalog.text, ''), q.retry_delay, \
             q.retry_backoff, q.retry_delay_max, q.retry_jitter, q.require_lease, \
             c.relpersistence OPERATOR(pg_catalog.=) 'u', q.paused, q.created_at, q.message_ttl, \
             q.archive_retention, q.durable_leases \
             FROM queue_catalog.queue q \
             JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) q.queue::pg_catalog.oid \
               AND c.relnamespace OPERATOR(pg_catalog.=) $1 \
             LEFT JOIN pg_catalog.pg_class d ON d.oid OPERATOR(pg_catalog.=) q.dead_letter_queue::pg_catalog.oid \
               AND d.relnamespace OPERATOR(pg_catalog.=) $1 \
             ORDER BY c.relname",
            &[pg_sys::OIDOID.into()],
            &[oid(user::schema(c"queue").unwrap_or(0))], // in another schema it is no queue
        )
    });
    let sees_all = user::is_monitor();
    let zero = Value::of_interval_us(0);
    for row in outcome.rows {
        let relation: u32 = row[0].get::<pg_sys::Oid>().map_or(0, Into::into);
        // Under an old snapshot one may be listed that was dropped meanwhile.
        let is_seen = user::relation_name(relation).is_some() && (sees_all || may_use(relation));
        if !is_seen {
            continue;
        }
        let name = user::relation_name(relation).unwrap_or_default();
        rows.emit([
            row[1],
            row[2],
            row[3],
            row[4],
            row[5],
            row[6],
            row[7],
            row[8],
            row[9],
            row[14],
            row[15],
            Value::of(0i64),                                     // max_length
            Value::of("reject"),                                 // overflow
            Value::of_interval_us(5 * 60 * settings::SECOND_US), // dedup_window
            zero,                                                // priority_ageing
            Value::of(false),                                    // group_fairness
            row[10],
            row[16],
            row[11],
            row[12],
            Value::of(channel(&name)),
            row[13],
        ]);
    }
    Ok(())
}
