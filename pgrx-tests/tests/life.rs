//! The extension's life: installed, dumped, restarted, renamed, dropped, in several databases, by several roles,
//! under hostile names. What surrounds the queues, not what they do.

mod common;
mod inventory;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use inventory::{furnish, Inventory, Leases};
use postgres::{Client, NoTls};
use queue_tests::wait_points::advance_clock;
use queue_tests::{wait_until, Cluster, ClusterOptions, Database, Session, StopMode};

// ---- Installing ---------------------------------------------------------------------------------------------

/// What the server said beside its answers: severity and message.
type Notices = Arc<Mutex<Vec<(String, String)>>>;

/// A connection whose notices are kept.
fn listening(database: &Database) -> (Client, Notices) {
    let notices = Notices::default();
    let kept = notices.clone();
    let mut config = database.cluster.config(&database.name);
    config.notice_callback(move |notice| {
        kept.lock().unwrap().push((notice.severity().to_owned(), notice.message().to_owned()));
    });
    (config.connect(NoTls).unwrap(), notices)
}

fn hint<T: std::fmt::Debug>(result: Result<T, postgres::Error>) -> String {
    let error = result.unwrap_err();
    error.as_db_error().and_then(|error| error.hint()).unwrap_or_default().to_owned()
}

#[test]
fn create_extension_without_preload_warns_and_the_functions_say_why() {
    let cluster = ClusterOptions::default().without_preload().start().unwrap();
    let database = cluster.create_bare_database().unwrap();
    let (mut client, notices) = listening(&database);
    client.batch_execute("CREATE EXTENSION pg_queue").unwrap();
    let said = notices.lock().unwrap().clone();
    assert!(
        said.iter().any(|(severity, message)| severity == "WARNING" && message.contains("pg_queue")),
        "a warning: {said:?}"
    );
    for sql in [
        "SELECT queue_create('q')",
        "SELECT queue_send('q', '1')",
        "SELECT * FROM queue_read('q')",
        "SELECT queue_delete('q', 1)",
        "SELECT * FROM queue_peek('q')",
        "SELECT queue_drop('q')",
    ] {
        let result = client.batch_execute(sql);
        assert!(result.is_err(), "{sql}");
        let result_again = client.batch_execute(sql);
        assert_eq!(code(result), "55000", "{sql}");
        assert!(hint(result_again).contains("shared_preload_libraries"), "{sql}");
    }
    client.batch_execute("DROP EXTENSION pg_queue").unwrap();
}

#[test]
fn plain_sql_works_while_the_server_does_not_preload() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 3);
    client.batch_execute("ALTER SYSTEM RESET shared_preload_libraries").unwrap();
    cluster.restart(StopMode::Fast).unwrap();
    let mut client = session(&database);
    client.batch_execute("INSERT INTO queue.q (message) VALUES ('4'), ('5')").unwrap();
    client.batch_execute("UPDATE queue.q SET message = '\"changed\"' WHERE msg_id = 1").unwrap();
    client.batch_execute("DELETE FROM queue.q WHERE msg_id = 2").unwrap();
    client.batch_execute("BEGIN; TRUNCATE queue.q; ROLLBACK").unwrap();
    assert_eq!(code(try_send(&mut client, "q", 6)), "55000");
    client.batch_execute("ALTER SYSTEM SET shared_preload_libraries = 'pg_queue'").unwrap();
    cluster.restart(StopMode::Fast).unwrap();
    let mut client = session(&database);
    assert_eq!(drain(&mut client, "q"), [1, 3, 4, 5]);
}

#[test]
fn drop_extension_is_refused_while_there_are_queues_and_cascade_works() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 5);
    read(&mut client, "q", 2);
    let worker = worker_pid(&database);
    assert_eq!(code(client.batch_execute("DROP EXTENSION pg_queue")), "2BP01");
    assert_eq!(read(&mut client, "q", 9).len(), 3, "nothing happened");
    client.batch_execute("SET lock_timeout = '20 s'; DROP EXTENSION pg_queue CASCADE").unwrap();
    let left: i64 =
        client.query_one("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'queue%'", &[]).unwrap().get(0);
    assert_eq!(left, 0);
    database.wait_until_backend_gone(worker);
    client.batch_execute("CREATE EXTENSION pg_queue; SELECT queue_create('q')").unwrap();
    assert!(read(&mut client, "q", 9).is_empty());
    let sent = send(&mut client, "q", 1);
    assert_eq!(drain(&mut client, "q"), [sent]);
    worker_pid(&database);
}

#[test]
fn extension_in_a_schema_of_its_own_works() {
    let database = queue_tests::shared_cluster().create_bare_database().unwrap();
    let mut client = session(&database);
    client.batch_execute("CREATE SCHEMA \"My Tools\"; CREATE EXTENSION pg_queue SCHEMA \"My Tools\"").unwrap();
    assert_eq!(code(client.batch_execute("SELECT queue_create('q')")), "42883");
    client
        .batch_execute("SET search_path = \"My Tools\"; SELECT queue_create('q', max_deliveries => 1)")
        .unwrap();
    send(&mut client, "q", 1);
    client.batch_execute("SET search_path = ''").unwrap();
    let got = client.query("SELECT msg_id FROM \"My Tools\".queue_read('q', 1, '10 ms')", &[]).unwrap();
    assert_eq!(got.len(), 1);
    // What the worker does needs none of the caller's search_path either.
    wait_until("the exhausted message is archived", || {
        client.query_one("SELECT count(*) FROM queue_archive.q", &[]).unwrap().get::<_, i64>(0) == 1
    });
}

// ---- Databases ----------------------------------------------------------------------------------------------

#[test]
fn two_databases_with_equal_queue_names_do_not_meet() {
    let (one, two) = (database_with(&["q"]), database_with(&["q"]));
    let (mut first, mut second) = (session(&one), session(&two));
    let waiting = reader_asleep(&two, "q");
    for n in 1..=3 {
        send(&mut first, "q", n);
    }
    assert!(!waiting.is_done());
    assert!(read(&mut second, "q", 9).is_empty());
    let got = read(&mut first, "q", 9);
    assert_eq!(got.len(), 3);
    send(&mut second, "q", 100);
    let (_, others) = joined(waiting);
    assert_eq!(others[0].message, 100);
    assert!(!delete(&mut second, "q", &got[0]), "the same id, another database's lease");
    second.batch_execute("TRUNCATE queue.q").unwrap();
    assert!(delete(&mut first, "q", &got[0]));
}

#[test]
fn refused_drop_database_leaves_its_worker_at_work() {
    let cluster = queue_tests::shared_cluster();
    let database = database_with(&["q"]);
    let mut client = session(&database);
    worker_pid(&database);
    let mut admin = cluster.connect("postgres").unwrap();
    let result = admin.batch_execute(&format!("DROP DATABASE {}", database.name));
    assert_eq!(code(result), "55006", "a session is in it");
    send_delayed(&mut client, "q", "10 ms");
    read_awaited(&mut client, "q");
    wait_until("it has a worker", || find_worker(&mut client, &database.name).is_some());
}

/// Does what nobody may be in the database for. The worker leaves for that; one that is kept from running has some seconds
/// to do so, and is in the way if it takes longer: then again, but not for ever.
fn once_free(admin: &mut Client, sql: &str) {
    admin.batch_execute("SET statement_timeout = '60 s'").unwrap();
    let begun = Instant::now();
    while let Err(error) = admin.batch_execute(sql) {
        let is_in_use = error.code().is_some_and(|code| code.code() == "55006");
        assert!(is_in_use && begun.elapsed() < Duration::from_secs(30), "{sql}: {error:?}");
    }
}

#[test]
fn database_made_from_a_template_with_queues_has_its_own() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    furnish(&database);
    let mut client = session(&database);
    let sent = send_many(&mut client, "q", 3);
    let held = read_for(&mut client, "q", 1, "1 h");
    wait_written(&mut client, "q", &ids(&held));
    let before = Inventory::take(&mut client, Leases::Written);
    drop(client);
    let copy = format!("{}_copy", database.name);
    let mut admin = cluster.connect("postgres").unwrap();
    wait_until("the template is free", || {
        let sql = "SELECT FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'";
        admin.query(sql, &[&database.name]).unwrap().is_empty()
    });
    once_free(&mut admin, &format!("CREATE DATABASE {copy} TEMPLATE {}", database.name));
    let copy = Database { cluster: &cluster, name: copy };
    let mut other = session(&copy);
    Inventory::take(&mut other, Leases::Written).assert_same(&before, "made from the template");
    // A lease that is written is in the copy, too: its message is there for nobody until it ends.
    assert_eq!(drain(&mut other, "q"), sent[1..]);
    assert_eq!(state(&mut other, "q", sent[0]).as_deref(), Some("leased"));
    let mut client = session(&database);
    assert_eq!(ids(&read(&mut client, "q", 9)), sent[1..]);
    assert!(delete(&mut client, "q", &held[0]), "the template's lease runs on");
    assert_eq!(state(&mut other, "q", sent[0]).as_deref(), Some("leased"), "the copy's is another one");
    worker_pid(&database);
    worker_pid(&copy);
    advance_clock(&mut other, "61 min");
    let late = read_one(&mut other, "q");
    assert_eq!((late.msg_id, late.count), (sent[0], 2));
    assert!(delete(&mut other, "q", &late));
    works(&copy);
}

#[test]
fn renamed_database_keeps_its_queues_and_gets_a_worker() {
    let cluster = queue_tests::shared_cluster();
    let mut database = database_with(&["q"]);
    let mut client = session(&database);
    let sent = send_many(&mut client, "q", 3);
    read_for(&mut client, "q", 1, "1 h");
    let worker = worker_pid(&database);
    let pid = client.pid();
    drop(client);
    let mut admin = cluster.connect("postgres").unwrap();
    wait_until("the session is gone", || {
        admin.query("SELECT FROM pg_stat_activity WHERE pid = $1", &[&pid]).unwrap().is_empty()
    });
    let name = format!("{}_renamed", database.name);
    once_free(&mut admin, &format!("ALTER DATABASE {} RENAME TO {name}", database.name));
    database.name = name;
    let mut client = session(&database);
    assert_eq!(ids(&read(&mut client, "q", 9)), sent[1..], "leases stay");
    assert_ne!(worker_pid(&database), worker);
    send_delayed(&mut client, "q", "10 ms");
    read_awaited(&mut client, "q");
}

#[test]
fn restart_keeps_everything_but_leases() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q", "empty"]);
    let mut client = session(&database);
    let sent = send_many(&mut client, "q", 1_000);
    let finished = ids(&read(&mut client, "q", 100));
    delete_ids(&mut client, "q", &finished);
    let got = read_one(&mut client, "q");
    assert_eq!(retry(&mut client, "q", &got, Some("0")), "retried");
    client
        .batch_execute("SELECT queue_alter('q', visibility_timeout => '50 ms'), queue_pause('empty')")
        .unwrap();
    let later = send_delayed(&mut client, "q", "1 h");
    cluster.restart(StopMode::Fast).unwrap();
    let mut client = session(&database);
    assert_eq!(state(&mut client, "q", later).as_deref(), Some("delayed"));
    let first = read_one(&mut client, "q");
    assert_eq!((first.msg_id, first.count, first.last_error.as_deref()), (got.msg_id, 2, Some("failed")));
    assert!(!delete(&mut client, "q", &got), "a lease of before the restart");
    assert!(delete_id(&mut client, "q", first.msg_id));
    client.batch_execute("SELECT queue_alter('q', visibility_timeout => '1 h')").unwrap();
    assert_eq!(drain(&mut client, "q"), sent[101..]);
    send(&mut client, "empty", 1);
    assert!(read(&mut client, "empty", 1).is_empty(), "still paused");
}

#[test]
fn settings_of_the_database_do_not_reach_the_worker() {
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_create('q', max_deliveries => 1, dead_letter_queue => 'dead')").unwrap();
    let worker = worker_pid(&database);
    let role = format!("{}_app", database.name);
    client.batch_execute(&format!("CREATE ROLE {role}")).unwrap();
    for setting in [
        format!("session_authorization = {role}").as_str(),
        format!("role = {role}").as_str(),
        "default_transaction_read_only = on",
        "default_transaction_isolation = 'serializable'",
        "search_path = nowhere",
        "statement_timeout = '1 ms'",
        "lock_timeout = '1 ms'",
        "row_security = off",
        "enable_indexscan = off",
    ] {
        client.batch_execute(&format!("ALTER DATABASE {} SET {setting}", database.name)).unwrap();
    }
    client.execute("SELECT pg_terminate_backend($1)", &[&worker]).unwrap();
    wait_until("there is a new worker", || {
        find_worker(&mut client, &database.name).is_some_and(|pid| pid != worker)
    });
    send(&mut client, "q", 7);
    assert_eq!(read_for(&mut client, "q", 1, "10 ms").len(), 1);
    assert_eq!(read_awaited(&mut client, "dead").message, 7, "the worker moves what is exhausted");
    let gid = format!("{}-settings", database.name);
    client.batch_execute("BEGIN").unwrap();
    send(&mut client, "q", 8);
    client.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).unwrap();
    client.batch_execute(&format!("COMMIT PREPARED '{gid}'")).unwrap();
    assert_eq!(read_awaited(&mut client, "q").message, 8, "and finds what prepared transactions sent");
}

// ---- Dump and restore -----------------------------------------------------------------------------------------

#[test]
fn dump_and_restore_bring_queues_and_messages_over() {
    let cluster = queue_tests::shared_cluster();
    let from = database_with(&["q", "Odd \"name\""]);
    let mut client = session(&from);
    client
        .batch_execute(
            "SELECT queue_create('strict', visibility_timeout => '7 min', max_deliveries => 3, require_lease => true,
                                 dead_letter_queue => 'q');
             SELECT queue_send('q', '{\"a\": 1}', headers => '{\"h\": 2}');
             SELECT queue_send_batch('q', array['2', '3', '4']::jsonb[]);
             SELECT queue_send('q', '5', delay => '1 h');
             SELECT queue_send('Odd \"name\"', '\"odd\"');
             SELECT queue_archive('q', 4)",
        )
        .unwrap();
    let got = read_one(&mut client, "q");
    assert_eq!(retry(&mut client, "q", &got, Some("0")), "retried");
    read_for(&mut client, "q", 1, "1 h"); // a lease, which is not dumped
                                          // (how it is dumped, what restores it with which arguments)
    let ways: [(&[&str], &str, &[&str]); 2] = [
        (&["-Fc"], "pg_restore", &["--exit-on-error"]),
        (&["-Fp"], "psql", &["-X", "-q", "-v", "ON_ERROR_STOP=1"]),
    ];
    for (format, restore, args) in ways {
        let dump = program(cluster, "pg_dump", &[format, &[&from.name]].concat(), b"");
        let to = cluster.create_bare_database().unwrap();
        program(cluster, restore, &[args, &["-d", &to.name]].concat(), &dump);
        let mut client = session(&to);
        let settings = client
            .query_one(
                "SELECT visibility_timeout = '7 min' AND max_deliveries = 3 AND require_lease
                        AND dead_letter_queue = 'q' FROM queue_list() WHERE queue = 'strict'",
                &[],
            )
            .unwrap();
        assert!(settings.get::<_, bool>(0), "{restore}: settings");
        let got = read(&mut client, "q", 9);
        assert_eq!(sorted(ids(&got)), [1, 2, 3], "{restore}");
        let first = got.iter().find(|delivery| delivery.msg_id == 1).unwrap();
        assert_eq!((first.count, &first.message), (2, &serde_json::json!({"a": 1})), "{restore}");
        assert_eq!(state(&mut client, "q", 5).as_deref(), Some("delayed"), "{restore}");
        assert_eq!(read_one(&mut client, "Odd \"name\"").message, "odd", "{restore}");
        let archived: i64 = client.query_one("SELECT msg_id FROM queue_archive.q", &[]).unwrap().get(0);
        assert_eq!(archived, 4, "{restore}");
        assert!(send(&mut client, "q", 6) > 5, "{restore}: ids go on");
        // The worker serves it, and the triggers are there.
        client.batch_execute("INSERT INTO queue.q (message) VALUES ('7')").unwrap();
        assert_eq!(read(&mut client, "q", 9).len(), 2, "{restore}");
        worker_pid(&to);
    }
}

/// How the catalog refers to other tables, as it would be dumped.
fn references(client: &mut Client, queue: &str) -> (String, Option<String>) {
    let sql = "SELECT archive::text, dead_letter_queue::text FROM queue_catalog.queue WHERE queue::text = $1";
    let row = client.query_one(sql, &[&format!("queue.{queue}")]).unwrap();
    (row.get(0), row.get(1))
}

/// What is dumped as a number is some other table where it is restored.
#[test]
fn dump_and_restore_without_an_archive_and_a_dead_letter_queue_bring_the_others_over() {
    let cluster = queue_tests::shared_cluster();
    let from = database_with(&["failed", "a", "b"]);
    let mut client = session(&from);
    client
        .batch_execute(
            "SELECT queue_create('work', dead_letter_queue => 'failed'), queue_send('work', '1'), queue_send('a', '1');
             DROP TABLE queue_archive.a; DROP TABLE queue.failed, queue_archive.b",
        )
        .unwrap();
    let dump = program(cluster, "pg_dump", &["-Fc", &from.name], b"");
    let to = cluster.create_bare_database().unwrap();
    program(cluster, "pg_restore", &["--exit-on-error", "-d", &to.name], &dump);
    let mut client = session(&to);
    for queue in ["a", "b"] {
        assert_eq!(references(&mut client, queue), ("-".into(), None));
    }
    assert_eq!(references(&mut client, "work"), ("queue_archive.work".into(), None));
    let reject = "SELECT queue_reject('work', 1)";
    assert_eq!(client.query_one(reject, &[]).unwrap().get::<_, String>(0), "archived");
    assert_eq!(read(&mut client, "a", 1).len(), 1);
    client.batch_execute("SELECT queue_drop('a', true), queue_drop('b')").unwrap();
}

#[test]
fn drop_of_a_dead_letter_queue_is_not_undone_by_who_waited_to_alter_what_referred_to_it() {
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_create('work', dead_letter_queue => 'dead')").unwrap();
    client.batch_execute("BEGIN; SELECT queue_drop('dead', true)").unwrap();
    let pausing = session(&database).run("SELECT queue_pause('work')").unwrap();
    database.wait_until_backend_waits(pausing.pid(), "Lock", None);
    client.batch_execute("COMMIT").unwrap();
    pausing.join().unwrap().1.unwrap();
    assert_eq!(references(&mut client, "work").1, None);
    let listed = "SELECT paused, dead_letter_queue = '' FROM queue_list() WHERE queue = 'work'";
    let listed = client.query_one(listed, &[]).unwrap();
    assert!(listed.get::<_, bool>(0) && listed.get::<_, bool>(1));
}

#[test]
fn drop_of_a_dead_letter_queue_waits_for_who_is_naming_it() {
    for ends in ["COMMIT", "ROLLBACK"] {
        let database = database_with(&["dead", "work"]);
        let mut client = session(&database);
        client.batch_execute("BEGIN; SELECT queue_alter('work', dead_letter_queue => 'dead')").unwrap();
        let dropping = session(&database).run("SELECT queue_drop('dead', true)").unwrap();
        database.wait_until_backend_waits(dropping.pid(), "Lock", Some("relation"));
        client.batch_execute(ends).unwrap();
        dropping.join().unwrap().1.unwrap();
        assert_eq!(references(&mut client, "work").1, None, "{ends}");
    }
    // And who names it while it is being dropped is told.
    let database = database_with(&["dead", "work"]);
    let mut client = session(&database);
    client.batch_execute("BEGIN; DROP TABLE queue.dead").unwrap();
    let naming = session(&database).run("SELECT queue_alter('work', dead_letter_queue => 'dead')").unwrap();
    database.wait_until_backend_waits(naming.pid(), "Lock", Some("relation"));
    client.batch_execute("COMMIT").unwrap();
    assert_eq!(code(naming.join().unwrap().1), "42704");
    assert_eq!(references(&mut client, "work").1, None);
}

#[test]
fn two_that_create_the_same_queue_follow_each_other() {
    for (ends, is_there) in [("COMMIT", true), ("ROLLBACK", false)] {
        let database = database_with(&[]);
        let mut client = session(&database);
        client.batch_execute("BEGIN; SELECT queue_create('q', if_not_exists => true)").unwrap();
        // Another name waits for nobody.
        session(&database).batch_execute("SELECT queue_create('other')").unwrap();
        let creating = session(&database).run("SELECT queue_create('q', if_not_exists => true)").unwrap();
        let refused = session(&database).run("SELECT queue_create('q')").unwrap();
        for pid in [creating.pid(), refused.pid()] {
            database.wait_until_backend_waits(pid, "Lock", Some("object"));
        }
        client.batch_execute(ends).unwrap();
        let is_made: bool = creating.join().unwrap().1.unwrap()[0].get(0);
        let refused = refused.join().unwrap().1;
        // Where there is none, whoever of the two comes first makes it.
        assert_eq!(refused.is_ok(), !is_there && !is_made, "{ends}");
        assert!(!is_there || !is_made, "{ends}");
        assert!(refused.is_ok() || code(refused) == "42710", "{ends}");
        send(&mut client, "q", 1);
    }
}

/// An honest copy of messages with their ids, and whoever wants to keep others from sending.
#[test]
fn ids_of_ones_own_keep_nobody_from_sending() {
    let database = database_with(&["from", "q"]);
    let mut client = session(&database);
    worker_pid(&database);
    send_many(&mut client, "from", 50);
    send_many(&mut client, "q", 3);
    let copy = "INSERT INTO queue.q (msg_id, message) SELECT msg_id + 10, message FROM queue.from";
    client.batch_execute(copy).unwrap();
    let last = "SELECT pg_sequence_last_value(pg_get_serial_sequence('queue.q', 'msg_id')::regclass)";
    wait_until("the identity is raised", || {
        client.query_one(last, &[]).unwrap().get::<_, Option<i64>>(0) == Some(60)
    });
    assert_eq!(send(&mut client, "q", 1), 61);
}

#[test]
fn two_that_grant_on_the_same_queue_follow_each_other() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("BEGIN; SELECT queue_grant('q', 'public', 'send')").unwrap();
    let granting = session(&database).run("SELECT queue_grant('q', 'public', 'consume')").unwrap();
    database.wait_until_backend_waits(granting.pid(), "Lock", None);
    client.batch_execute("COMMIT").unwrap();
    granting.join().unwrap().1.unwrap();
}

#[test]
fn restore_of_the_data_alone_is_noticed() {
    let cluster = queue_tests::shared_cluster();
    let (from, to) = (database_with(&["q"]), database_with(&["q"]));
    let (mut client, mut reader) = (session(&from), session(&to));
    let sent = send_many(&mut client, "q", 500);
    let dump = program(cluster, "pg_dump", &["-Fc", "--data-only", "-t", "queue.q", &from.name], b"");
    assert!(read(&mut reader, "q", 1).is_empty()); // tracked
    let waiting = reader_asleep(&to, "q");
    // Not the sequence: its name has the oid of the table that it was made for.
    let table_only = ["--disable-triggers", "--data-only", "-n", "queue", "-t", "q", "-d", &to.name];
    program(cluster, "pg_restore", &table_only, &dump);
    let (_, got) = joined(waiting);
    let mut all = ids(&got);
    delete_ids(&mut reader, "q", &all);
    all.extend(drain(&mut reader, "q"));
    assert_eq!(sorted(all), sent);
}

#[test]
fn restore_that_disables_triggers_leaves_ours_always_on() {
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    // What pg_restore --disable-triggers does around the data.
    client.batch_execute("ALTER TABLE queue.q DISABLE TRIGGER ALL").unwrap();
    client.batch_execute("ALTER TABLE queue.q ENABLE TRIGGER ALL").unwrap();
    assert!(read(&mut reader, "q", 1).is_empty()); // now the worker knows the queue
    let left = "SELECT FROM pg_trigger WHERE tgrelid = 'queue.q'::regclass AND tgenabled <> 'A' \
                AND tgname IN ('pg_queue_change', 'pg_queue_truncate')";
    wait_until("ours are always on", || client.query(left, &[]).unwrap().is_empty());
    assert!(read(&mut reader, "q", 1).is_empty()); // tracked, as before that change of the table
    client.batch_execute("SET session_replication_role = replica").unwrap(); // as a subscription's worker has it
    let waiting = reader_asleep(&database, "q");
    client.batch_execute("INSERT INTO queue.q (message) VALUES ('1')").unwrap();
    assert_eq!(joined(waiting).1.len(), 1);
}

#[test]
fn create_next_to_helper_names_of_a_restored_queue_works() {
    const NAMES: i64 = 1_000;
    // On a server of its own: other tests use up oids as well.
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    let oid = |client: &mut Session, name: &str| -> i64 {
        client.query_one("SELECT $1::text::regclass::oid::int8", &[&name]).unwrap().get(0)
    };
    client
        .batch_execute(&format!(
            "DO $$ BEGIN
                 FOR n IN 1 .. {NAMES} LOOP EXECUTE format('CREATE TYPE queue.spare_%s AS ()', n); END LOOP;
             END $$"
        ))
        .unwrap();
    // A dump's helpers carry the oids of where they came from, and the new server's oids come by those numbers
    // later. What the server itself does may use up oids as well, hence several attempts.
    let mut first = 0;
    for attempt in 0..10 {
        client.batch_execute(&format!("CREATE TYPE queue.here_{attempt} AS ()")).unwrap();
        let next = oid(&mut client, &format!("queue.here_{attempt}"));
        client
            .batch_execute(&format!(
                "DO $$ BEGIN
                     FOR n IN 1 .. {NAMES} LOOP
                         EXECUTE format('ALTER TYPE queue.%s RENAME TO queue_due_%s',
                             CASE {attempt} WHEN 0 THEN 'spare_' || n ELSE 'queue_due_' || {first} + n END,
                             {next} + n);
                     END LOOP;
                 END $$"
            ))
            .unwrap();
        first = next;
        let name = format!("new_{attempt}");
        create(&mut client, &[&name]);
        let sent = send(&mut client, &name, 1);
        assert_eq!(drain(&mut client, &name), [sent]);
        let used = oid(&mut client, &format!("queue.{name}"));
        if (next + 1..=next + NAMES).contains(&used) {
            return; // its name for the helper was taken
        }
    }
    panic!("no queue met a helper's name that was taken");
}

// ---- Who may do what ------------------------------------------------------------------------------------------

#[test]
fn grants_are_the_only_switch() {
    // (capability, what it allows of the calls below)
    let calls = [
        ("send", "SELECT queue_send('q', '1')"),
        ("send", "SELECT queue_send_batch('q', array['1']::jsonb[])"),
        ("peek", "SELECT * FROM queue_peek('q')"),
        ("read", "SELECT * FROM queue_read('q', 1, '1 h')"),
        ("read", "SELECT queue_extend('q', 1, visibility_timeout => '1 h')"),
        ("read", "SELECT queue_release('q', array[1])"),
        ("read", "SELECT * FROM queue_retry('q', 1, delay => '0')"),
        ("finish", "SELECT queue_delete('q', -1)"),
        ("finish", "SELECT queue_archive('q', -1)"),
        ("finish", "SELECT queue_cancel('q', -1)"),
        ("finish", "SELECT queue_reject('q', -1)"),
        ("finish", "SELECT * FROM queue_pop('q')"),
        ("admin", "SELECT queue_pause('q')"),
        ("admin", "SELECT queue_resume('q')"),
        ("admin", "SELECT queue_purge('q')"),
        ("owner", "SELECT queue_alter('q', visibility_timeout => '1 min')"),
        ("owner", "SELECT queue_drop('q')"),
        ("create", "SELECT queue_create('theirs')"),
    ];
    let capabilities: [(&str, &[&str]); 5] = [
        ("", &[]),
        ("send", &["send"]),
        ("observe", &["peek"]),
        ("consume", &["peek", "read", "finish"]),
        ("admin", &["peek", "read", "finish", "admin"]),
    ];
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let role = format!("{} \"role\"", database.name);
    let quoted = format!("\"{}\"", role.replace('"', "\"\""));
    client.batch_execute(&format!("CREATE ROLE {quoted}")).unwrap();
    let attempt = |client: &mut Session, capability: &str, allowed: &[&str]| {
        for (kind, call) in calls {
            client.batch_execute("TRUNCATE queue.q RESTART IDENTITY").unwrap();
            send(client, "q", 1);
            client.batch_execute(&format!("SET ROLE {quoted}")).unwrap();
            let result = client.batch_execute(call);
            client.batch_execute("RESET ROLE").unwrap();
            if allowed.contains(&kind) {
                assert!(result.is_ok(), "{capability:?} allows {call}: {result:?}");
            } else {
                assert_eq!(code(result), "42501", "{capability:?} does not allow {call}");
            }
        }
    };
    for (capability, allowed) in capabilities {
        if !capability.is_empty() {
            client.execute("SELECT queue_grant('q', $1, $2)", &[&role, &capability]).unwrap();
        }
        attempt(&mut client, capability, allowed);
        client.batch_execute(&format!("SET ROLE {quoted}")).unwrap();
        let seen = client.query("SELECT queue FROM queue_list()", &[]).unwrap().len();
        assert_eq!(seen, usize::from(!capability.is_empty()), "{capability:?}: queue_list");
        client.batch_execute("RESET ROLE").unwrap();
        if !capability.is_empty() {
            client.execute("SELECT queue_revoke('q', $1, $2)", &[&role, &capability]).unwrap();
        }
    }
    attempt(&mut client, "revoked", &[]);
    client.batch_execute(&format!("GRANT CREATE ON SCHEMA queue TO {quoted}; SET ROLE {quoted}")).unwrap();
    client.batch_execute("SELECT queue_create('theirs'), queue_send('theirs', '1')").unwrap();
    client.batch_execute("SELECT queue_drop('theirs', force => true)").unwrap();
}

#[test]
fn failures_move_with_the_rights_of_the_queues_owner() {
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    let role = format!("{}_consumer", database.name);
    client
        .batch_execute(&format!(
            "CREATE ROLE {role};
             SELECT queue_create('q', dead_letter_queue => 'dead', max_deliveries => 1);
             SELECT queue_grant('q', '{role}', 'consume');
             SELECT queue_send_batch('q', array['1', '2', '3']::jsonb[]);
             SET ROLE {role}"
        ))
        .unwrap();
    let got = read_for(&mut client, "q", 3, "1 h");
    assert_eq!(retry(&mut client, "q", &got[0], None), "dead_lettered");
    let rejected: String = client.query_one("SELECT queue_reject('q', 2)", &[]).unwrap().get(0);
    assert_eq!(rejected, "dead_lettered");
    let archived: bool = client.query_one("SELECT queue_archive('q', 3)", &[]).unwrap().get(0);
    assert!(archived);
    assert_eq!(code(client.batch_execute("TABLE queue_archive.q")), "42501");
    client.batch_execute("RESET ROLE").unwrap();
    assert_eq!(rows(&mut client, "dead"), 2);
    // A role that may not send to the dead-letter queue cannot make it that of a queue of its own.
    client.batch_execute(&format!("GRANT CREATE ON SCHEMA queue TO {role}; SET ROLE {role}")).unwrap();
    let result = client.batch_execute("SELECT queue_create('mine', dead_letter_queue => 'dead')");
    assert_eq!(code(result), "42501");
}

#[test]
fn row_level_security_refuses_readers_whom_it_would_filter() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let role = format!("{}_filtered", database.name);
    client
        .batch_execute(&format!(
            "CREATE ROLE {role};
             SELECT queue_grant('q', '{role}', 'consume'), queue_grant('q', '{role}', 'send');
             ALTER TABLE queue.q ENABLE ROW LEVEL SECURITY;
             CREATE POLICY p ON queue.q TO {role} USING (msg_id % 2 = 0)"
        ))
        .unwrap();
    send_many(&mut client, "q", 2);
    client.batch_execute(&format!("SET ROLE {role}")).unwrap();
    for sql in [
        "SELECT * FROM queue_read('q')",
        "SELECT * FROM queue_pop('q')",
        "SELECT * FROM queue_peek('q')",
        "SELECT queue_delete('q', 2)",
    ] {
        assert_eq!(code(client.batch_execute(sql)), "0A000", "{sql}");
    }
    client.batch_execute("RESET ROLE").unwrap();
    assert_eq!(read(&mut client, "q", 9).len(), 2, "the owner is not filtered");
}

#[test]
fn read_only_transaction_looks_and_changes_nothing() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    for sql in [
        "SELECT queue_send('q', '1')",
        "SELECT * FROM queue_read('q')",
        "SELECT * FROM queue_read_any(array['q'])",
        "SELECT * FROM queue_pop('q')",
        "SELECT queue_delete('q', 1)",
        "SELECT * FROM queue_retry('q', 1)",
        "SELECT queue_release('q', array[1])",
        "SELECT queue_extend('q', 1)",
        "SELECT queue_create('r')",
        "SELECT queue_drop('q', true)",
        "SELECT queue_pause('q')",
    ] {
        client.batch_execute("BEGIN READ ONLY").unwrap();
        assert_eq!(code(client.batch_execute(sql)), "25006", "{sql}");
        client.batch_execute("ROLLBACK").unwrap();
    }
    client.batch_execute("BEGIN READ ONLY").unwrap();
    assert_eq!(client.query("SELECT * FROM queue_peek('q')", &[]).unwrap().len(), 1);
    assert_eq!(client.query("SELECT * FROM queue_list()", &[]).unwrap().len(), 1);
    client.batch_execute("COMMIT").unwrap();
    assert_eq!(read_one(&mut client, "q").count, 1);
}

// ---- Bad input ------------------------------------------------------------------------------------------------

#[test]
fn hostile_names_are_names_like_any_other() {
    let long = "x".repeat(63);
    let wide = "队".repeat(21);
    let names = [
        "a\"b",
        "it's; DROP TABLE queue.q; --",
        "$1",
        "%I %s %L",
        "back\\slash",
        "new\nline\ttab\r",
        " ",
        "Foo",
        "foo",
        "select",
        "pg_class",
        "queue.q",
        "\"quoted\"",
        "üñí 🐘",
        &long,
        &wide,
    ];
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    let role = format!("{}_named", database.name);
    client.batch_execute(&format!("CREATE ROLE {role}")).unwrap();
    for name in names {
        client
            .execute("SELECT queue_create($1, max_deliveries => 2, dead_letter_queue => 'dead')", &[&name])
            .unwrap_or_else(|error| panic!("{name:?}: {error}"));
    }
    for name in names {
        let sent = send_many(&mut client, name, 4);
        let got = read(&mut client, name, 4);
        assert_eq!(ids(&got), sent, "{name:?}");
        assert!(delete(&mut client, name, &got[0]), "{name:?}");
        assert_eq!(retry(&mut client, name, &got[1], Some("0")), "retried", "{name:?}");
        let again = read_one(&mut client, name);
        assert_eq!(retry(&mut client, name, &again, None), "dead_lettered", "{name:?}");
        let dead: String = client
            .query_one("DELETE FROM queue.dead RETURNING headers #>> '{dead_letter,queue}'", &[])
            .unwrap()
            .get(0);
        assert_eq!(dead, name);
        let sql = "SELECT queue_archive($1, $2)";
        assert!(client.query_one(sql, &[&name, &got[2].msg_id]).unwrap().get::<_, bool>(0), "{name:?}");
        client.execute("SELECT queue_grant($1, $2, 'admin')", &[&name, &role]).unwrap();
        client.execute("SELECT queue_alter($1, retry_delay => '2 s')", &[&name]).unwrap();
        client.execute("SELECT queue_pause($1), queue_resume($1)", &[&name]).unwrap();
        assert_eq!(client.query("SELECT * FROM queue_peek($1)", &[&name]).unwrap().len(), 1);
        let purged: i64 = client.query_one("SELECT queue_purge($1)", &[&name]).unwrap().get(0);
        assert_eq!(purged, 1, "{name:?}: the queues of other names kept theirs");
    }
    let mut listed: Vec<String> =
        client.query("SELECT queue FROM queue_list()", &[]).unwrap().iter().map(|row| row.get(0)).collect();
    listed.retain(|name| name != "dead");
    let mut expected: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    listed.sort();
    expected.sort();
    assert_eq!(listed, expected);
    for name in names {
        assert_eq!(code(client.execute("SELECT queue_drop($1)", &[&name])), "55006", "{name:?} has an archive");
        client.execute("SELECT queue_drop($1, force => true)", &[&name]).unwrap();
        assert_eq!(code(try_send(&mut client, name, 1)), "42704");
    }
}

#[test]
fn names_that_no_table_can_have_are_refused_whole() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    for name in ["", &"x".repeat(64), &"队".repeat(22), &"x".repeat(10_000)] {
        let result = client.execute("SELECT queue_create($1)", &[&name]);
        assert_eq!(code(result), "42602", "{} bytes", name.len());
        assert_eq!(code(try_send(&mut client, name, 1)), "42704", "{} bytes", name.len());
        assert_eq!(code(try_read(&mut client, name, 1, None, "0")), "42704", "{} bytes", name.len());
    }
    let tables: i64 = client
        .query_one(
            "SELECT count(*) FROM pg_class WHERE relnamespace = 'queue'::regnamespace AND relkind = 'r'",
            &[],
        )
        .unwrap()
        .get(0);
    assert_eq!(tables, 1, "nothing was made of a truncated name");
}

#[test]
fn bad_input_gets_its_sqlstate_and_changes_nothing() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    let cases = [
        ("42704", "SELECT queue_send('nowhere', '1')"),
        ("42704", "SELECT * FROM queue_read('nowhere')"),
        ("42704", "SELECT * FROM queue_read_any(array['q', 'nowhere'], 2)"),
        ("42704", "SELECT queue_delete('nowhere', 1)"),
        ("42704", "SELECT queue_alter('nowhere', visibility_timeout => '1 s')"),
        ("42704", "SELECT queue_grant('q', 'nobody at all', 'send')"),
        ("42710", "SELECT queue_create('q')"),
        ("22023", "SELECT * FROM queue_read('q', 0)"),
        ("22023", "SELECT * FROM queue_read('q', -1)"),
        ("22023", "SELECT * FROM queue_read('q', 9223372036854775807)"),
        ("22023", "SELECT * FROM queue_read('q', 1, '-1 s')"),
        ("22023", "SELECT * FROM queue_read('q', 1, '0')"),
        ("22023", "SELECT * FROM queue_read('q', 1, '1 month')"),
        ("22023", "SELECT * FROM queue_read('q', wait => '-1 s')"),
        ("22023", "SELECT queue_send('q', '1', delay => '-1 s')"),
        ("22023", "SELECT queue_send('q', '1', delay => '1 s', deliver_at => now())"),
        ("22023", "SELECT queue_send('q', '1', deliver_at => 'infinity')"),
        ("22023", "SELECT queue_create('r', max_deliveries => -1)"),
        ("22023", "SELECT queue_create('r', retry_backoff => 'NaN')"),
        ("22023", "SELECT queue_create('r', retry_jitter => 2)"),
        ("22023", "SELECT queue_grant('q', 'postgres', 'everything')"),
        ("22023", "SELECT queue_send_batch('q', array[['1', '2']]::jsonb[])"),
        ("22023", "SELECT queue_send_batch('q', array['1', '2']::jsonb[], array['{}']::jsonb[])"),
        ("22023", "SELECT queue_send_entries('q', '{}')"),
        ("22023", "SELECT queue_send_entries('q', '[{\"massage\": 1}]')"),
        ("22004", "SELECT queue_send('q', NULL)"),
        ("22004", "SELECT queue_send(NULL, '1')"),
        ("22004", "SELECT queue_send_batch('q', array[NULL]::jsonb[])"),
        ("22004", "SELECT * FROM queue_read(NULL)"),
        ("22004", "SELECT * FROM queue_read_any(array[NULL])"),
        ("22004", "SELECT queue_delete('q', NULL)"),
        ("22004", "SELECT queue_delete_batch('q', array[1, NULL])"),
        ("0A000", "SELECT queue_send('q', '1', priority => 1)"),
        ("0A000", "SELECT * FROM queue_read('q', filter => '{}')"),
        ("0A000", "SELECT * FROM queue_stats()"),
        ("0A000", "SELECT queue_create('r', max_length => 1)"),
        ("P0002", "SELECT queue_delete('q', 99, strict => true)"),
    ];
    for (sqlstate, sql) in cases {
        assert_eq!(code(client.batch_execute(sql)), sqlstate, "{sql}");
    }
    let no_errors = [
        ("SELECT queue_delete('q', 99)", false),
        ("SELECT queue_delete('q', -9223372036854775808)", false),
        ("SELECT queue_drop('nowhere')", false),
        ("SELECT queue_create('q', if_not_exists => true)", false),
    ];
    for (sql, result) in no_errors {
        assert_eq!(client.query_one(sql, &[]).unwrap().get::<_, bool>(0), result, "{sql}");
    }
    assert_eq!(rows(&mut client, "q"), 1);
    assert_eq!(read_one(&mut client, "q").count, 1);
}

// ---- In nobody's way ------------------------------------------------------------------------------------------

#[test]
fn utility_error_under_our_hook_keeps_its_fields() {
    let database = queue_tests::shared_cluster().create_bare_database().unwrap();
    let mut client = session(&database);
    client.batch_execute("CREATE TABLE t (a int CONSTRAINT one_only PRIMARY KEY)").unwrap();
    let mut copy = client.copy_in("COPY t FROM STDIN").unwrap();
    copy.write_all(b"1\n1\n").unwrap();
    let error = copy.finish().unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.detail(), Some("Key (a)=(1) already exists."));
    assert_eq!(error.where_(), Some("COPY t, line 2"));
    assert_eq!(
        (error.schema(), error.table(), error.constraint()),
        (Some("public"), Some("t"), Some("one_only"))
    );
    let error = client.batch_execute("CREATE TABLE u (a no_such_type)").unwrap_err();
    let error = error.as_db_error().unwrap();
    assert!(error.position().is_some(), "where in the statement: {error:?}");
    assert_eq!(error.detail(), None);
}

#[test]
fn object_that_is_no_queue_is_left_alone() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE TABLE queue.stray (n int);
             INSERT INTO queue.stray VALUES (1);
             ALTER TABLE queue.stray ADD COLUMN m int;
             TRUNCATE queue.stray;
             CREATE VIEW queue.look AS SELECT 1 AS n",
        )
        .unwrap();
    for name in ["stray", "look"] {
        assert_eq!(code(try_send(&mut client, name, 1)), "42704", "{name}");
        assert_eq!(code(try_read(&mut client, name, 1, None, "0")), "42704", "{name}");
        assert_eq!(code(client.execute("SELECT queue_create($1)", &[&name])), "42710", "{name}");
    }
    client.batch_execute("DROP TABLE queue.stray; DROP VIEW queue.look").unwrap();
    let sent = send(&mut client, "q", 1);
    assert_eq!(drain(&mut client, "q"), [sent]);
}

// ---- Newer than the snapshot ----------------------------------------------------------------------------------

#[test]
fn drop_under_an_old_snapshot_keeps_what_was_sent_while_it_waited() {
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let database = database_with(&["q"]);
        let (mut sender, mut dropper) = (session(&database), session(&database));
        dropper.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; SELECT count(*) FROM queue.q")).unwrap();
        sender.batch_execute("BEGIN; SELECT queue_send('q', '1')").unwrap();
        let dropping = dropper.run("SELECT queue_drop('q')").unwrap();
        database.wait_until_backend_waits(dropping.pid(), "Lock", Some("relation"));
        sender.batch_execute("COMMIT").unwrap();
        let (mut dropper, result) = dropping.join().unwrap();
        assert_eq!(code(result), "55006", "{level}");
        dropper.batch_execute("ROLLBACK").unwrap();
        assert_eq!(drain(&mut sender, "q"), [1], "{level}");
    }
}

#[test]
fn drop_under_an_old_snapshot_heeds_who_has_come_to_send_dead_letters_there() {
    let database = database_with(&["q", "dead"]);
    let (mut client, mut dropper) = (session(&database), session(&database));
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM queue.q";
    dropper.batch_execute(begin).unwrap();
    client.batch_execute("SELECT queue_alter('q', dead_letter_queue => 'dead')").unwrap();
    assert_eq!(code(dropper.batch_execute("SELECT queue_drop('dead')")), "55006");
    dropper.batch_execute("ROLLBACK").unwrap();
    // By force, nothing is left that names it; nor of a queue that is newer than the snapshot itself.
    dropper.batch_execute(begin).unwrap();
    client.batch_execute("SELECT queue_alter('q', max_deliveries => 7), queue_create('new')").unwrap();
    dropper.batch_execute("SELECT queue_drop('dead', force => true), queue_drop('new'); COMMIT").unwrap();
    let sql = "SELECT string_agg(concat_ws(' ', queue, dead_letter_queue, max_deliveries), ',') FROM queue_catalog.queue";
    assert_eq!(client.query_one(sql, &[]).unwrap().get::<_, String>(0), "queue.q 7");
}

#[test]
fn purge_under_an_old_snapshot_deletes_every_message() {
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let database = database_with(&["q"]);
        let (mut sender, mut purger) = (session(&database), session(&database));
        send(&mut sender, "q", 1);
        purger.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; SELECT count(*) FROM queue.q")).unwrap();
        send(&mut sender, "q", 2);
        send(&mut purger, "q", 3);
        let purged: i64 = purger.query_one("SELECT queue_purge('q')", &[]).unwrap().get(0);
        purger.batch_execute("COMMIT").unwrap();
        assert_eq!((purged, rows(&mut sender, "q")), (3, 0), "{level}");
    }
}
