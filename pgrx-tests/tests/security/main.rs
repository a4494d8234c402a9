//! Security: who may call what, and what owners, senders and strangers try all the same. One file a subject. What is
//! tested elsewhere: sends past the executor (`src/tests/direct.rs`), privileges within a transaction
//! (`src/tests/privileges.rs`), what reviews found (`hardening.rs`).
//!
//! Owns what the subjects share: roles, and a picture of all that a call could change. Expects nothing itself.

#[path = "../common/mod.rs"]
mod common;

mod bounds;
mod hostile;
mod leaks;
mod lookalikes;
mod matrix;
mod names;
mod tables;

use common::*;
use postgres::Client;
use queue_tests::Database;

/// A role of this database's test, made anew: roles are the whole cluster's.
pub fn make_role(client: &mut Client, database: &Database, name: &str) -> String {
    let role = format!("{}_{name}", database.name);
    client.batch_execute(&format!("CREATE ROLE {role}")).unwrap();
    role
}

/// Does `f` as a role.
pub fn as_role<R>(client: &mut Client, role: &str, f: impl FnOnce(&mut Client) -> R) -> R {
    client.batch_execute(&format!("SET ROLE {role}")).unwrap();
    let result = f(client);
    client.batch_execute("RESET ROLE").unwrap();
    result
}

/// One value, as text.
#[track_caller]
pub fn text(client: &mut Client, sql: &str) -> String {
    let sql = format!("SELECT ({sql})::text");
    let row = client.query_one(&sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    row.get::<_, Option<String>>(0).unwrap_or_else(|| "null".into())
}

#[track_caller]
pub fn number(client: &mut Client, sql: &str) -> i64 {
    text(client, sql).parse().unwrap()
}

pub fn is_superuser(client: &mut Client, role: &str) -> bool {
    client.query_one("SELECT rolsuper FROM pg_roles WHERE rolname = $1", &[&role]).unwrap().get(0)
}

/// All that a call could have changed: every queue's rows, archive, next id and place in the dispatcher, the settings and
/// schedules, what is written of leases and of prepared transactions, the tables and who may use them. The worker writes
/// a lease down when it is a second old: wait for that before the first picture.
pub fn picture(client: &mut Client) -> String {
    let queues: Vec<String> = client
        .query(
            "SELECT relname::text FROM queue_catalog.queue q JOIN pg_class c ON c.oid = q.queue ORDER BY 1",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    let mut parts = vec![
        "SELECT string_agg(q::text, E'\\n' ORDER BY q.queue::oid) FROM queue_catalog.queue q".to_owned(),
        "SELECT string_agg(s::text, E'\\n' ORDER BY s.queue::oid, s.name) FROM queue_catalog.schedule s".to_owned(),
        "SELECT string_agg(p::text, E'\\n' ORDER BY p::text) FROM queue_catalog.prepared p".to_owned(),
        // Without the counts of reads that rolled back, which the dispatcher has, too.
        "SELECT string_agg(l::text, E'\\n' ORDER BY l.queue::oid, l.msg_id) FROM queue_catalog.lease l \
         WHERE until IS NOT NULL"
            .to_owned(),
        "SELECT string_agg(format('%s %s', sequencename, last_value), E'\\n' ORDER BY sequencename) \
         FROM pg_sequences WHERE schemaname IN ('queue', 'queue_archive')"
            .to_owned(),
        "SELECT string_agg(format('%s %s %s %s', relname, relowner, relacl, relfilenode), E'\\n' ORDER BY oid) \
         FROM pg_class WHERE relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace)"
            .to_owned(),
    ];
    for queue in queues {
        let quoted = format!("\"{}\"", queue.replace('"', "\"\""));
        let literal = queue.replace('\'', "''");
        parts.push(format!("SELECT string_agg(m::text, E'\\n' ORDER BY msg_id) FROM queue.{quoted} m"));
        parts.push(format!("SELECT string_agg(m::text, E'\\n' ORDER BY msg_id) FROM queue_archive.{quoted} m"));
        parts.push(format!(
            // A deadline is converted from one clock to the other at each look.
            "SELECT string_agg(concat_ws(' ', msg_id, lease_id, delivery_count, state, pid), E'\\n' ORDER BY msg_id) \
             FROM queue_peek('{literal}', 1000)"
        ));
    }
    // In one statement, since tests look often.
    let parts: Vec<String> = parts.iter().map(|part| format!("coalesce(({part}), 'none')")).collect();
    text(client, &format!("concat_ws(E'\\n', {})", parts.join(", ")))
}
