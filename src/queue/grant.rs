//! `queue_grant` and `queue_revoke`: plain grants on a queue's table and archive, by what they are for. Owns what each
//! capability needs; whether the caller may pass it on, Postgres decides.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Value};
use crate::pg::spi::{self, quoted};
use crate::pg::user;
use crate::queue::admin::{find, oid, run_ddl, ALTER_LOCK};
use crate::queue::{args, resolve};
use pgrx::pg_sys;

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
