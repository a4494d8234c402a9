//! `queue_health`: what is wrong right now and how to mend it, a row a problem. Looks, changes nothing. Each problem is
//! a small question of its own; a role sees what concerns the queues that it may use, and of the server what Postgres
//! shows it.

use crate::error::Result;
use crate::pg::call::{Args, Rows, Value};
use crate::pg::{shmem, spi, user, xact};
use crate::queue::{admin, list, resolve};
use crate::settings;
use pgrx::pg_sys;
use queue_dispatch::NIL;

/// A problem: severity, its name, what has it, what it is, and the statement that mends it.
struct Problem {
    is_critical: bool,
    name: &'static str,
    object: String,
    detail: String,
    fix: Option<String>,
}

/// A transaction that has been open for so long holds back vacuum.
const SNAPSHOT_OLD: &str = "10 min";
/// An archive of more rows than this, by the planner's estimate, that nobody trims.
const ARCHIVE_ROWS: i64 = 1_000_000;

/// `queue_health`.
pub fn queue_health(_args: &Args, rows: &mut Rows) -> Result<()> {
    let mut problems = Vec::new();
    if !xact::is_standby() {
        problems.extend(worker_missing()?);
        problems.extend(dispatcher_full()?);
        problems.extend(queues_full()?);
    }
    problems.extend(vacuum_held_back());
    problems.extend(archives_growing());
    problems.extend(functions_shadowed());
    for Problem { is_critical, name, object, detail, fix } in problems {
        rows.emit([
            Value::of(if is_critical { "critical" } else { "warning" }),
            Value::of(name),
            Value::of(object.as_str()),
            Value::of(detail.as_str()),
            fix.as_deref().map_or(Value::NULL, Value::of),
        ]);
    }
    Ok(())
}

fn database_name() -> String {
    let outcome = spi::look("SELECT pg_catalog.current_database()::pg_catalog.text", &[], &[]);
    outcome.rows.first().and_then(|row| row[0].text()).unwrap_or_default()
}

fn worker_missing() -> Result<Option<Problem>> {
    let database = user::database();
    if shmem::with_arena(|arena, _, _| arena.worker_proc(database))? != NIL {
        return Ok(None);
    }
    let name = database_name();
    let (detail, fix) = match missing_why() {
        Why::OffInDatabase => (OFF, format!("ALTER DATABASE {} RESET pg_queue.worker_enabled", spi::quoted(&name))),
        Why::Off => (OFF, "ALTER SYSTEM SET pg_queue.worker_enabled = on".to_owned()),
        Why::NoPlace(most) => (
            "This database has no pg_queue worker: pg_queue.max_databases others have one.",
            format!("ALTER SYSTEM SET pg_queue.max_databases = {}", most.saturating_mul(2)),
        ),
        Why::Unknown => (
            "This database has no pg_queue worker: no process was free for it (max_worker_processes), it is starting, \
             or it fails; the server's log says which.",
            format!("ALTER SYSTEM SET max_worker_processes = {}", setting("max_worker_processes", 8).saturating_mul(2)),
        ),
    };
    let detail = detail.to_owned();
    Ok(Some(Problem { is_critical: true, name: "worker_not_running", object: name, detail, fix: Some(fix) }))
}

const OFF: &str =
    "This database has no pg_queue worker, because pg_queue.worker_enabled is off: nothing expires, no \
                   schedule fires, no message moves to a dead-letter queue.";

/// Why there is no worker.
enum Why {
    /// It is switched off for this database.
    OffInDatabase,
    /// It is switched off, and this database says nothing else.
    Off,
    /// As many databases as may have one have one.
    NoPlace(i64),
    /// Something else.
    Unknown,
}

fn missing_why() -> Why {
    match enabled_in_database() {
        Some(false) => return Why::OffInDatabase,
        None if !settings::is_worker_enabled() => return Why::Off,
        _ => {}
    }
    // Others' processes are shown to few.
    let workers = user::acting_as_extension(|| {
        spi::look(
            "SELECT FROM pg_catalog.pg_stat_activity WHERE backend_type OPERATOR(pg_catalog.=) 'pg_queue worker'",
            &[],
            &[],
        )
    });
    let most = setting("pg_queue.max_databases", 64);
    if workers.processed as i64 >= most {
        return Why::NoPlace(most);
    }
    Why::Unknown
}

/// A whole number that is set.
fn setting(name: &str, default: i64) -> i64 {
    let outcome =
        spi::look("SELECT pg_catalog.current_setting($1)", &[pg_sys::TEXTOID.into()], &[Value::of(name)]);
    outcome.rows.first().and_then(|row| row[0].text()?.parse().ok()).unwrap_or(default)
}

/// What ALTER DATABASE has set: a session that is older than that does not know.
fn enabled_in_database() -> Option<bool> {
    const NAME: &str = "pg_queue.worker_enabled=";
    let outcome = spi::look(
        "SELECT pg_catalog.substr(s, pg_catalog.length($2) OPERATOR(pg_catalog.+) 1)::pg_catalog.bool \
         FROM pg_catalog.pg_db_role_setting r, LATERAL pg_catalog.unnest(r.setconfig) s \
         WHERE r.setrole OPERATOR(pg_catalog.=) 0 AND r.setdatabase OPERATOR(pg_catalog.=) $1 \
         AND pg_catalog.starts_with(s, $2)",
        &[pg_sys::OIDOID.into(), pg_sys::TEXTOID.into()],
        &[admin::oid(user::database()), Value::of(NAME)],
    );
    outcome.rows.first().and_then(|row| row[0].get::<bool>())
}

fn dispatcher_full() -> Result<Option<Problem>> {
    let (free, all) = shmem::with_arena(|arena, _, _| (arena.slots_unpromised(), arena.slots_len()))?;
    // Below this, messages that are not due yet get no slot any more (see the dispatcher's `room`).
    if free >= all / 8 {
        return Ok(None);
    }
    Ok(Some(Problem {
        is_critical: false,
        name: "dispatcher_full",
        object: "pg_queue.max_messages".into(),
        detail: format!(
            "Of {all} messages that the dispatcher can track, {free} more have room beyond what each queue is promised. \
             What has none stays in its table and is loaded as room appears."
        ),
        fix: Some(format!("ALTER SYSTEM SET pg_queue.max_messages = {}", u64::from(all) * 2)),
    }))
}

fn queues_full() -> Result<Option<Problem>> {
    let (is_full, most) = shmem::with_arena(|arena, _, _| (arena.queues_are_full(), arena.queues_len()))?;
    if !is_full {
        return Ok(None);
    }
    Ok(Some(Problem {
        is_critical: true,
        name: "queues_full",
        object: "pg_queue.max_queues".into(),
        detail: format!(
            "{most} queues have been used since the server was started, over all databases: another one's sends and \
             reads fail. A place is freed when a queue is dropped, or the server is restarted."
        ),
        fix: Some(format!("ALTER SYSTEM SET pg_queue.max_queues = {}", most.saturating_mul(2).min(65_536))),
    }))
}

fn vacuum_held_back() -> Vec<Problem> {
    let outcome = spi::look(
        &format!(
            "SELECT pid::pg_catalog.int8, COALESCE(usename::pg_catalog.text, ''), COALESCE(state, ''), \
             (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) xact_start)::pg_catalog.text \
             FROM pg_catalog.pg_stat_activity a WHERE backend_xmin IS NOT NULL \
             AND datid OPERATOR(pg_catalog.=) $1 \
             AND NOT EXISTS (SELECT FROM pg_catalog.pg_stat_progress_vacuum v WHERE v.pid OPERATOR(pg_catalog.=) a.pid) \
             AND xact_start OPERATOR(pg_catalog.<) (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) \
               '{SNAPSHOT_OLD}'::pg_catalog.interval) ORDER BY xact_start LIMIT 10"
        ),
        &[pg_sys::OIDOID.into()],
        &[admin::oid(user::database())], // transactions of others hold back nothing here, nor does a vacuum
    );
    let problem = |row: &Vec<Value>| {
        let pid = row[0].i64()?;
        Some(Problem {
            is_critical: false,
            name: "vacuum_held_back",
            object: format!("process {pid} of {}", row[1].text()?),
            detail: format!(
                "Its transaction ({}) has been open for {}: no dead row younger than that can be removed. Reads stay \
                 fast, but tables and indexes grow.",
                row[2].text()?,
                row[3].text()?
            ),
            fix: Some(format!("SELECT pg_terminate_backend({pid})")),
        })
    };
    outcome.rows.iter().filter_map(problem).collect()
}

fn archives_growing() -> Vec<Problem> {
    let outcome = user::acting_as_extension(|| {
        spi::look(
            "SELECT q.queue::pg_catalog.oid, c.reltuples::pg_catalog.int8 FROM queue_catalog.queue q \
             JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) q.archive::pg_catalog.oid \
             WHERE q.archive_retention OPERATOR(pg_catalog.=) '0'::pg_catalog.interval \
             AND c.reltuples OPERATOR(pg_catalog.>) $1::pg_catalog.float8 ORDER BY 2 DESC",
            &[pg_sys::INT8OID.into()],
            &[Value::of(ARCHIVE_ROWS)],
        )
    });
    let problem = |row: &Vec<Value>| {
        let relation: u32 = row[0].get::<pg_sys::Oid>()?.into();
        let name = user::relation_name(relation).filter(|name| resolve::find_table(name) == Some(relation))?;
        let is_seen = user::is_monitor() || list::may_use(relation);
        is_seen.then(|| Problem {
            is_critical: false,
            name: "archive_grows",
            detail: format!(
                "Its archive has about {} messages and no archive_retention, so it only grows.",
                row[1].i64().unwrap_or(0)
            ),
            fix: Some(format!(
                "SELECT queue_alter('{}', archive_retention => '30 days')",
                name.replace('\'', "''")
            )),
            object: name,
        })
    };
    outcome.rows.iter().filter_map(problem).collect()
}

/// Functions that are called in place of ours: of the same name, where the caller's search_path, or whoever names the
/// extension's schema, finds them. Where in the path does not matter: with untyped arguments, as drivers send them, one
/// that takes texts is a better match wherever it is.
fn functions_shadowed() -> Vec<Problem> {
    let outcome = spi::look(
        "SELECT pg_catalog.format('%I.%I(%s)', n.nspname, p.proname, \
             pg_catalog.pg_get_function_identity_arguments(p.oid)), \
           pg_catalog.pg_get_userbyid(p.proowner)::pg_catalog.text \
         FROM pg_catalog.pg_extension e \
         JOIN pg_catalog.pg_proc p ON pg_catalog.starts_with(p.proname::pg_catalog.text, 'queue_') \
         JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) p.pronamespace \
         WHERE e.extname OPERATOR(pg_catalog.=) 'pg_queue' \
         AND (n.oid OPERATOR(pg_catalog.=) e.extnamespace \
           OR n.nspname OPERATOR(pg_catalog.=) ANY (pg_catalog.current_schemas(true))) \
         AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d \
           WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid \
           AND d.objid OPERATOR(pg_catalog.=) p.oid AND d.refobjid OPERATOR(pg_catalog.=) e.oid \
           AND d.deptype OPERATOR(pg_catalog.=) 'e') \
         AND EXISTS (SELECT FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_proc o \
             ON o.oid OPERATOR(pg_catalog.=) d.objid AND o.proname OPERATOR(pg_catalog.=) p.proname \
           WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid \
           AND d.refobjid OPERATOR(pg_catalog.=) e.oid AND d.deptype OPERATOR(pg_catalog.=) 'e') \
         ORDER BY 1 LIMIT 10",
        &[],
        &[],
    );
    let problem = |row: &Vec<Value>| {
        let function = row[0].text()?;
        Some(Problem {
            is_critical: true,
            name: "function_shadowed",
            detail: format!(
                "A function of role {} has the name of one of pg_queue's, and may be called in its place.",
                row[1].text()?
            ),
            fix: Some(format!("DROP ROUTINE {function}")),
            object: function,
        })
    };
    outcome.rows.iter().filter_map(problem).collect()
}
