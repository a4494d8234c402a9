//! Sequences that a review found, each of which once lost a message, gave away a right, or took the server down.
mod common;

use common::*;
use queue_tests::{shared_cluster, wait_until, Database, Session};

/// A role that may log in and make objects in the database, and nothing more.
fn plain_role(client: &mut postgres::Client, database: &str, role: &str) {
    client
        .batch_execute(&format!(
            "DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN; GRANT CREATE ON DATABASE \"{database}\" TO {role};"
        ))
        .unwrap();
}

fn is_superuser(client: &mut postgres::Client, role: &str) -> bool {
    client.query_one("SELECT rolsuper FROM pg_roles WHERE rolname = $1", &[&role]).unwrap().get(0)
}

#[test]
fn rename_where_the_extension_is_not_installed_runs_nothing_of_the_users_as_superuser() {
    let database = shared_cluster().create_bare_database().unwrap();
    let mut client = database.connect().unwrap();
    plain_role(&mut client, &database.name, "mallory_rename");
    client
        .batch_execute(
            "SET ROLE mallory_rename;
             CREATE SCHEMA queue; CREATE SCHEMA queue_archive; CREATE SCHEMA queue_catalog; CREATE SCHEMA own;
             CREATE TABLE queue.t (); CREATE TABLE queue_archive.t ();
             CREATE FUNCTION own.evil() RETURNS oid LANGUAGE plpgsql AS $$
               BEGIN EXECUTE 'ALTER ROLE mallory_rename SUPERUSER'; RETURN 'queue.t'::regclass; END $$;
             CREATE VIEW queue_catalog.queue AS SELECT own.evil()::regclass AS queue,
               'queue_archive.t'::regclass AS archive, interval '1 s' AS visibility_timeout, 1::bigint AS max_deliveries,
               NULL::regclass AS dead_letter_queue, interval '1 s' AS retry_delay, 1::float8 AS retry_backoff,
               interval '1 s' AS retry_delay_max, 0::float8 AS retry_jitter, false AS require_lease, false AS paused;
             ALTER TABLE queue.t RENAME TO u;
             RESET ROLE",
        )
        .unwrap();
    assert!(!is_superuser(&mut client, "mallory_rename"));
}

#[test]
fn worker_fires_the_owners_triggers_with_the_owners_rights() {
    let database = database_with(&[]);
    let mut client = session(&database);
    plain_role(&mut client, &database.name, "owner_of_trigger");
    client
        .batch_execute(
            "GRANT CREATE ON SCHEMA queue TO owner_of_trigger;
             CREATE TABLE public.seen (who text); GRANT INSERT ON public.seen TO PUBLIC;
             SET ROLE owner_of_trigger;
             SELECT queue_create('mine', max_deliveries => 1);
             RESET ROLE;
             CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN INSERT INTO public.seen VALUES (current_user); RETURN OLD; END $$;
             CREATE TRIGGER z BEFORE DELETE ON queue.mine FOR EACH ROW EXECUTE FUNCTION public.note()",
        )
        .unwrap();
    send(&mut client, "mine", 1);
    read_for(&mut client, "mine", 1, "10 ms");
    wait_until("the worker has moved the message", || {
        client.query_one("SELECT count(*) FROM queue_archive.mine", &[]).unwrap().get::<_, i64>(0) == 1
    });
    let who: Vec<String> =
        client.query("SELECT who FROM public.seen", &[]).unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(who, ["owner_of_trigger"]);
}

#[test]
fn worker_that_cannot_write_the_archive_keeps_the_message() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_alter('q', max_deliveries => 1); DROP TABLE queue_archive.q").unwrap();
    let from = shared_cluster().log().len();
    send(&mut client, "q", 1);
    read_for(&mut client, "q", 1, "10 ms");
    let place = format!("database \"{}\"", database.name);
    wait_until("the worker has failed to move it", || {
        let log = shared_cluster().log();
        let mut lines = log.get(from..).unwrap_or_default().lines();
        lines.any(|line| line.contains("moving exhausted messages failed") && line.contains(&place))
    });
    wait_until("it is left", || state(&mut client, "q", 1).as_deref() == Some("exhausted"));
    assert_eq!(rows(&mut client, "q"), 1);
}

#[test]
fn truncate_does_not_hide_what_the_same_large_transaction_sends_after_it() {
    let database = database_with(&["large", "q"]);
    let mut client = session(&database);
    assert!(read(&mut client, "q", 1).is_empty()); // tracked
    client
        .batch_execute(
            "BEGIN;
             INSERT INTO queue.large (message) SELECT '1' FROM generate_series(1, 100000);
             TRUNCATE queue.q;
             INSERT INTO queue.q (message) SELECT '1' FROM generate_series(1, 10);
             COMMIT",
        )
        .unwrap();
    assert_eq!(drain(&mut client, "q").len(), 10);
}

#[test]
fn update_after_a_retry_that_failed_under_a_savepoint_is_noticed() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("ALTER TABLE queue.q ADD CHECK (last_error <> 'no')").unwrap();
    assert!(read(&mut client, "q", 1).is_empty()); // tracked: the DDL had it all loaded again
    let later = send_delayed(&mut client, "q", "1 day");
    let now = send(&mut client, "q", 1);
    client.batch_execute("BEGIN; SAVEPOINT s").unwrap();
    let failed = client.query("SELECT * FROM queue_retry('q', $1, error => 'no')", &[&now]);
    assert_eq!(code(failed), "23514");
    client.batch_execute("ROLLBACK TO s").unwrap();
    client.execute("UPDATE queue.q SET visible_at = NULL WHERE msg_id = $1", &[&later]).unwrap();
    client.batch_execute("COMMIT").unwrap();
    assert_eq!(sorted(drain(&mut client, "q")), [later, now]);
}

/// What an owner may have put on `queue.q` that has its messages deleted by statements and not by address.
const ON_DELETE: [&str; 3] = [
    "CREATE FUNCTION public.watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END';
     CREATE TRIGGER watch AFTER DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION public.watch()",
    "CREATE FUNCTION public.watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END';
     CREATE TRIGGER watch BEFORE DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION public.watch()",
    "CREATE TABLE public.seen (msg_id bigint);
     CREATE RULE watch AS ON DELETE TO queue.q DO ALSO INSERT INTO public.seen VALUES (OLD.msg_id)",
];

/// Runs a statement about a message that another session changes, and commits, while the statement waits for it.
fn overtaken(
    database: &Database,
    client: Session,
    msg_id: i64,
    sql: String,
) -> (Session, Result<String, postgres::Error>) {
    let mut mover = session(database);
    let change = format!("BEGIN; UPDATE queue.q SET headers = '{{\"moved\": true}}' WHERE msg_id = {msg_id}");
    mover.batch_execute(&change).unwrap();
    let pid = client.pid();
    let running = client.run_with(move |client| client.query_one(&sql, &[]).map(|row| row.get(0))).unwrap();
    database.wait_until_backend_waits(pid, "Lock", Some("transactionid"));
    mover.batch_execute("COMMIT").unwrap();
    running.join().unwrap()
}

#[test]
fn archive_of_a_row_that_another_transaction_moves_keeps_its_last_version() {
    for on_delete in [""].iter().chain(&ON_DELETE) {
        let database = database_with(&["q"]);
        let mut client = session(&database);
        client.batch_execute(&format!("SELECT queue_alter('q', max_deliveries => 1); {on_delete}")).unwrap();
        for (call, expected) in [
            ("SELECT queue_archive('q', $)::text", "true"),
            ("SELECT queue_reject('q', $)", "archived"),
            ("SELECT outcome FROM queue_retry('q', $)", "archived"),
        ] {
            let msg_id = send(&mut client, "q", 1);
            assert_eq!(read_one(&mut client, "q").msg_id, msg_id);
            let call = call.replace('$', &msg_id.to_string());
            let (after, done) = overtaken(&database, client, msg_id, call.clone());
            client = after;
            assert_eq!(done.unwrap(), expected, "{call} {on_delete}");
            let sql = "SELECT concat(headers, message) FROM queue_archive.q WHERE msg_id = $1";
            let kept: String = client.query_one(sql, &[&msg_id]).unwrap().get(0);
            assert_eq!(kept, "{\"moved\": true}1", "{call} {on_delete}");
        }
        assert_eq!(rows(&mut client, "q"), 0);
    }
}

#[test]
fn pop_of_a_row_that_another_transaction_moves_returns_its_last_version() {
    for on_delete in [""].iter().chain(&ON_DELETE) {
        let database = database_with(&["q"]);
        let mut client = session(&database);
        client.batch_execute(on_delete).unwrap();
        let msg_id = send(&mut client, "q", 1);
        let sql = "SELECT concat(headers, message) FROM queue_pop('q')";
        let (_, popped) = overtaken(&database, client, msg_id, sql.into());
        assert_eq!(popped.unwrap(), "{\"moved\": true}1", "{on_delete}");
    }
}

#[test]
fn archive_under_repeatable_read_of_a_row_that_a_statement_deletes_is_refused_if_it_moves() {
    for on_delete in ON_DELETE {
        let database = database_with(&["q"]);
        let (mut client, mut sender) = (session(&database), session(&database));
        client.batch_execute(on_delete).unwrap();
        client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM queue.q").unwrap();
        // What the transaction's own snapshot does not show may be finished all the same.
        let newer = send(&mut sender, "q", 1);
        client.execute("SELECT queue_archive('q', $1)", &[&newer]).unwrap();
        let msg_id = send(&mut sender, "q", 2);
        let call = format!("SELECT queue_archive('q', {msg_id})::text");
        let (mut client, refused) = overtaken(&database, client, msg_id, call);
        assert_eq!(code(refused), "40001", "{on_delete}");
        client.batch_execute("ROLLBACK").unwrap();
        assert_eq!(drain(&mut client, "q"), [newer, msg_id]);
    }
}

#[test]
fn queue_whose_primary_key_is_another_is_refused_and_the_server_lives() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("INSERT INTO queue.q (message, group_key) VALUES ('1', 'a')").unwrap();
    let key: String = client
        .query_one(
            "SELECT conname::text FROM pg_constraint WHERE conrelid = 'queue.q'::regclass AND contype = 'p'",
            &[],
        )
        .unwrap()
        .get(0);
    client
        .batch_execute(&format!(
            "ALTER TABLE queue.q DROP CONSTRAINT {key}; ALTER TABLE queue.q ADD PRIMARY KEY (group_key)"
        ))
        .unwrap();
    assert_eq!(code(try_read(&mut client, "q", 1, None, "0")), "55000");
    assert_eq!(rows(&mut client, "q"), 1);
}

#[test]
fn pause_that_is_rolled_back_does_not_outlive_it_where_it_attached_the_queue() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    // A queue that nobody has used yet: what attaches it reads the settings under the pause.
    client.batch_execute("SELECT queue_create('fresh')").unwrap();
    client
        .batch_execute("BEGIN; SELECT queue_pause('fresh'); SELECT queue_send('fresh', '1'); ROLLBACK")
        .unwrap();
    send(&mut client, "fresh", 2);
    assert_eq!(drain(&mut client, "fresh").len(), 1);
}

#[test]
fn read_after_an_own_delete_that_is_rolled_back_loses_nothing() {
    for change in [
        "SELECT queue_purge('q')",
        "DELETE FROM queue.q",
        "UPDATE queue.q SET visible_at = now() + interval '1 day'",
        "UPDATE queue.q SET delivery_count = 1000",
    ] {
        let database = database_with(&["q"]);
        let mut client = session(&database);
        let sent = send_many(&mut client, "q", 300);
        assert!(read(&mut client, "q", 1).len() == 1); // tracked
        client.batch_execute(&format!("BEGIN; {change}")).unwrap();
        assert!(read(&mut client, "q", 1_000).is_empty(), "{change}");
        client.batch_execute("ROLLBACK").unwrap();
        assert_eq!(rows(&mut client, "q"), 300);
        delete_id(&mut client, "q", sent[0]);
        let mut rest = Vec::new();
        wait_until("everything was delivered", || {
            rest.extend(drain(&mut client, "q"));
            rest.len() == 299
        });
    }
}

#[test]
fn drop_by_somebody_else_is_refused_without_waiting_for_the_table() {
    let database = database_with(&["q"]);
    let (mut reader, mut client) = (session(&database), session(&database));
    plain_role(&mut client, &database.name, "not_the_owner");
    reader.batch_execute("BEGIN; SELECT * FROM queue.q").unwrap(); // holds a lock on it
    client.batch_execute("SET ROLE not_the_owner; SET lock_timeout = '100 ms'").unwrap();
    assert_eq!(code(client.query("SELECT queue_drop('q', true)", &[])), "42501");
}

#[test]
fn drop_database_by_somebody_who_may_not_leaves_its_worker_alone() {
    let database = database_with(&["q"]);
    let before = worker_pid(&database);
    let mut client = shared_cluster().connect("postgres").unwrap();
    client
        .batch_execute("DROP ROLE IF EXISTS may_not_drop; CREATE ROLE may_not_drop; SET ROLE may_not_drop")
        .unwrap();
    let sql = format!("DROP DATABASE \"{}\"", database.name);
    assert_eq!(code(client.simple_query(&sql)), "42501");
    assert_eq!(worker_pid(&database), before);
}

#[test]
fn rename_of_a_database_that_fails_within_a_transaction_gives_its_worker_back() {
    let database = database_with(&["q"]);
    let before = worker_pid(&database);
    let mut client = shared_cluster().connect("postgres").unwrap();
    let rename = format!("ALTER DATABASE \"{}\" RENAME TO postgres", database.name);
    client
        .batch_execute(&format!("DO $$ BEGIN {rename}; EXCEPTION WHEN duplicate_database THEN END $$"))
        .unwrap();
    assert_ne!(worker_pid(&database), before, "it made way, and came back");
}

#[test]
fn message_that_cannot_be_moved_does_not_keep_the_others() {
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_create('q', max_deliveries => 1, dead_letter_queue => 'dead');
             ALTER TABLE queue.dead ADD CHECK (message <> '3')",
        )
        .unwrap();
    let sent = send_many(&mut client, "q", 10);
    read_for(&mut client, "q", 10, "10 ms");
    wait_until("all but one are dead letters", || rows(&mut client, "dead") == 9);
    assert_eq!(state(&mut client, "q", sent[2]).as_deref(), Some("exhausted"));
    // Once it can be, it is.
    let check: String = client
        .query_one(
            "SELECT conname::text FROM pg_constraint WHERE conrelid = 'queue.dead'::regclass AND contype = 'c'",
            &[],
        )
        .unwrap()
        .get(0);
    client.batch_execute(&format!("ALTER TABLE queue.dead DROP CONSTRAINT {check}")).unwrap();
    wait_until("that one, too", || rows(&mut client, "q") == 0);
    assert_eq!(rows(&mut client, "dead"), 10);
}
