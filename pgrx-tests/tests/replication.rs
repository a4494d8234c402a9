//! Logical replication of queues: rows arrive and are dispatched, changes and deletions follow, a copy whose worker is
//! off stays quiet, and whoever publishes everything is in nobody's way.
//!
//! Two servers each time, one test at a time has them. Nothing here waits for a time: a witness that was sent later tells
//! that what came before has arrived.

mod common;
mod inventory;

use common::*;
use inventory::copied;
use postgres::Client;
use queue_tests::wait_points::advance_clock;
use queue_tests::{wait_until, Cluster, ClusterOptions, Database};

fn publisher() -> Cluster {
    ClusterOptions::default().set("wal_level", "logical").start().unwrap()
}

/// Subscribes to the publications of `from`, and returns when what is there has been copied.
fn subscribe(to: &Database, from: &Database, publication: &str) {
    let sql = format!(
        "CREATE SUBSCRIPTION s CONNECTION 'host={} user=postgres dbname={}' PUBLICATION {publication}",
        from.cluster.directory().display(),
        from.name
    );
    let mut client = session(to);
    client.batch_execute(&sql).unwrap();
    wait_until("the tables are copied", || {
        let sql = "SELECT count(*) > 0 AND bool_and(srsubstate = 'r') FROM pg_subscription_rel";
        client.query_one(sql, &[]).unwrap().get(0)
    });
}

/// Ends a subscription, so that database and slot can be dropped.
fn unsubscribe(to: &Database) {
    session(to).batch_execute("DROP SUBSCRIPTION s").unwrap();
}

/// Returns when everything committed on `from` so far has been applied at the subscriber.
#[track_caller]
fn wait_applied(from: &Database) {
    let mut client = session(from);
    let lsn: String = client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).unwrap().get(0);
    let sql = format!("SELECT count(*) = 1 FROM pg_replication_slots WHERE confirmed_flush_lsn >= '{lsn}'");
    wait_until("it is applied", || client.query_one(&sql, &[]).unwrap().get(0));
}

/// Both queues `q` are the same, to the byte.
#[track_caller]
fn assert_replicated(from: &mut Client, to: &mut Client) {
    let rows = "SELECT * FROM queue.q ORDER BY msg_id";
    assert_eq!(copied(to, rows), copied(from, rows));
}

fn row_of(client: &mut Client, msg_id: i64) -> Option<String> {
    let sql = "SELECT to_jsonb(m)::text FROM queue.q m WHERE msg_id = $1";
    client.query_opt(sql, &[&msg_id]).unwrap().map(|row| row.get(0))
}

#[test]
fn replicated_messages_are_dispatched_where_they_arrive() {
    let (here, there) = (publisher(), Cluster::start_new().unwrap());
    let (from, to) = (database_on(&here, &["q"]), database_on(&there, &["q"]));
    let (mut client, mut reader) = (session(&from), session(&to));
    let old = send_many(&mut client, "q", 50);
    client.batch_execute("CREATE PUBLICATION p FOR TABLE queue.q").unwrap();
    // A reader who waits hears of the copy, and of each row that comes by replication.
    let reading = session(&to).run_with(|client| try_read(client, "q", 1, None, "60 s")).unwrap();
    to.wait_until_backend_waits(reading.pid(), "Extension", None);
    subscribe(&to, &from, "p");
    let (_, first) = joined(reading);
    let rest = read(&mut reader, "q", 100);
    assert_eq!(sorted(ids(&[first, rest].concat())), old);
    let reading = reader_asleep(&to, "q");
    let new = send(&mut client, "q", 51);
    assert_eq!(ids(&joined(reading).1), [new]);
    assert_eq!(rows(&mut client, "q"), 51);
    assert_replicated(&mut client, &mut reader);

    // What is finished over there goes here, whoever holds it; what is put off is put off.
    let got = read(&mut client, "q", 51);
    assert_eq!(sorted(ids(&got)), [old.clone(), vec![new]].concat());
    assert!(delete(&mut client, "q", &got[0]));
    assert_eq!(retry(&mut client, "q", &got[1], Some("1 h")), "retried");
    wait_applied(&from);
    assert_eq!(row_of(&mut reader, got[0].msg_id), None);
    assert!(!delete_id(&mut reader, "q", got[0].msg_id));
    assert_eq!(rows(&mut client, "q"), 50);
    assert_replicated(&mut client, &mut reader);
    // And what is sent for later comes later here, too, unless it is cancelled meanwhile.
    let later = send_delayed(&mut client, "q", "1 h");
    client
        .batch_execute(
            r#"SELECT queue_send('q', '{"a": [1, 2.50, "x\ty\\"], "n": null}', '{"h": null}', '1 h', ttl => '1 day')"#,
        )
        .unwrap();
    wait_applied(&from);
    assert_eq!(state(&mut reader, "q", later).as_deref(), Some("delayed"));
    assert_eq!(rows(&mut client, "q"), 52);
    assert_replicated(&mut client, &mut reader);
    client.batch_execute("TRUNCATE queue.q").unwrap();
    let witness = send(&mut client, "q", 0);
    wait_applied(&from); // until then what was leased over here may be delivered once more
    assert_eq!(read_awaited(&mut reader, "q").msg_id, witness, "nothing else is left");
    assert_eq!(rows(&mut reader, "q"), 1);
    unsubscribe(&to);
}

#[test]
fn replica_identity_is_the_primary_key() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let row = client
        .query_one(
            "SELECT relreplident::text, array_agg(attname::text) FROM pg_class c
             JOIN pg_index i ON indrelid = c.oid AND indisprimary
             JOIN pg_attribute a ON a.attrelid = c.oid AND attnum = ANY (indkey::int2[])
             WHERE c.oid = 'queue.q'::regclass GROUP BY relreplident",
            &[],
        )
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), "d", "the default: the primary key");
    assert_eq!(row.get::<_, Vec<String>>(1), ["msg_id"]);
}

#[test]
fn copy_whose_worker_is_off_stays_quiet() {
    let (here, there) = (publisher(), Cluster::start_new().unwrap());
    let (from, to) = (database_on(&here, &["dead"]), database_on(&there, &["dead"]));
    for database in [&from, &to] {
        session(database)
            .batch_execute("SELECT queue_create('q', dead_letter_queue => 'dead', max_deliveries => 1)")
            .unwrap();
    }
    set_worker(&to, false);
    let (mut client, mut copy) = (session(&from), session(&to));
    // What a worker would do at once: a message that expires, a schedule that is due each second.
    copy.batch_execute("SELECT queue_schedule('q', 'each', '* * * * * *', '\"scheduled\"')").unwrap();
    client.batch_execute("CREATE PUBLICATION p FOR TABLE queue.q").unwrap();
    subscribe(&to, &from, "p");
    set_worker(&from, false);
    client.batch_execute("SELECT queue_send('q', '1', ttl => '50 ms')").unwrap();
    wait_applied(&from);
    wait_until("it has expired", || {
        let sql = "SELECT bool_and(expires_at < clock_timestamp() - interval '1.5 s') FROM queue.q";
        copy.query_one(sql, &[]).unwrap().get(0)
    });
    assert_eq!((rows(&mut copy, "q"), rows(&mut copy, "dead")), (1, 0), "no worker has done anything");
    assert!(read(&mut copy, "q", 1).is_empty(), "though it is delivered to nobody");
    // The original's worker moves it, and the copy follows.
    set_worker(&from, true);
    wait_until("the original has moved it", || rows(&mut client, "dead") == 1);
    wait_applied(&from);
    assert_eq!((rows(&mut copy, "q"), rows(&mut copy, "dead")), (0, 0));
    // Only now, switched on, the copy has a life of its own.
    unsubscribe(&to);
    set_worker(&to, true);
    assert_eq!(read_awaited(&mut copy, "q").message, "scheduled");
}

#[test]
fn copy_that_takes_over_gives_ids_that_nobody_had() {
    let (here, there) = (publisher(), Cluster::start_new().unwrap());
    let (from, to) = (database_on(&here, &["q"]), database_on(&there, &["q"]));
    let (mut client, mut copy) = (session(&from), session(&to));
    // In use, and known to the worker, before anything arrives.
    assert_eq!(send(&mut copy, "q", 0), 1);
    assert!(delete_id(&mut copy, "q", 1));
    client.batch_execute("CREATE PUBLICATION p FOR TABLE queue.q").unwrap();
    subscribe(&to, &from, "p");
    let sent = send_many(&mut client, "q", 500);
    wait_applied(&from);
    unsubscribe(&to);
    worker_pid(&to);
    wait_until("the ids of the copy are past those that came", || {
        let sql = "SELECT last_value >= 500 FROM pg_sequences WHERE schemaname = 'queue'";
        copy.query_one(sql, &[]).unwrap().get(0)
    });
    assert_eq!(send(&mut copy, "q", 501), 501);
    assert_eq!(drain(&mut copy, "q"), [sent, vec![501]].concat());
}

#[test]
fn copy_of_prepared_transactions_that_takes_over_gives_ids_that_nobody_had() {
    let (here, there) = (publisher(), Cluster::start_new().unwrap());
    let (from, to) = (database_on(&here, &["q"]), database_on(&there, &["q"]));
    let (mut client, mut copy) = (session(&from), session(&to));
    // In use, and known to the worker, before anything arrives.
    assert_eq!(send(&mut copy, "q", 0), 1);
    assert!(delete_id(&mut copy, "q", 1));
    client.batch_execute("CREATE PUBLICATION p FOR TABLE queue.q").unwrap();
    subscribe(&to, &from, "p WITH (two_phase = true)");
    wait_until("it replicates in two phases", || {
        copy.query_one("SELECT subtwophasestate = 'e' FROM pg_subscription", &[]).unwrap().get(0)
    });
    client.batch_execute("BEGIN").unwrap();
    let sent = send_many(&mut client, "q", 500);
    client.batch_execute("PREPARE TRANSACTION 'here'").unwrap();
    wait_until("it is prepared there, too", || {
        let sql = "SELECT count(*) = 1 FROM pg_prepared_xacts WHERE database = current_database()";
        copy.query_one(sql, &[]).unwrap().get(0)
    });
    client.batch_execute("COMMIT PREPARED 'here'").unwrap();
    wait_applied(&from);
    unsubscribe(&to);
    wait_until("the ids of the copy are past those that came", || {
        let sql = "SELECT last_value >= 500 FROM pg_sequences WHERE schemaname = 'queue'";
        copy.query_one(sql, &[]).unwrap().get(0)
    });
    assert_eq!(send(&mut copy, "q", 501), 501);
    assert_eq!(drain(&mut copy, "q"), [sent, vec![501]].concat());
}

#[test]
fn truncate_that_another_server_has_prepared_is_applied() {
    let (here, there) = (publisher(), Cluster::start_new().unwrap());
    let (from, to) = (database_on(&here, &["q"]), database_on(&there, &["q"]));
    let (mut client, mut copy) = (session(&from), session(&to));
    client.batch_execute("CREATE PUBLICATION p FOR TABLE queue.q").unwrap();
    subscribe(&to, &from, "p WITH (two_phase = true)");
    wait_until("it replicates in two phases", || {
        copy.query_one("SELECT subtwophasestate = 'e' FROM pg_subscription", &[]).unwrap().get(0)
    });
    send_many(&mut client, "q", 3);
    wait_applied(&from);
    // Here it is refused; without our trigger nobody is asked.
    client.batch_execute("ALTER TABLE queue.q DISABLE TRIGGER pg_queue_truncate").unwrap();
    client.batch_execute("BEGIN; TRUNCATE queue.q; PREPARE TRANSACTION 'here'").unwrap();
    client.batch_execute("COMMIT PREPARED 'here'").unwrap();
    wait_applied(&from);
    assert_eq!(rows(&mut copy, "q"), 0);
    let witness = send(&mut client, "q", 4);
    assert_eq!(read_awaited(&mut copy, "q").msg_id, witness);
    unsubscribe(&to);
}

#[test]
fn publication_of_all_tables_is_in_nobodys_way() {
    let here = publisher();
    let database = here.create_database().unwrap();
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE PUBLICATION everything FOR ALL TABLES;
             SELECT queue_create('q', archive_retention => '1 h'), queue_create('here', unlogged => true)",
        )
        .unwrap();
    let worker = worker_pid(&database);
    // Rows without a key are deleted, too: those of archives, by the way back and by age, and the worker's own.
    send_many(&mut client, "q", 3);
    client.batch_execute("SELECT queue_archive_batch('q', array[1, 2, 3])").unwrap();
    let back: i64 = client.query_one("SELECT queue_unarchive('q', msg_ids => array[1])", &[]).unwrap().get(0);
    assert_eq!(back, 1);
    client.batch_execute("UPDATE queue_archive.q SET archived_at = archived_at - interval '1 day'").unwrap();
    client.batch_execute("SELECT queue_alter('q', archive_retention => '30 min')").unwrap();
    wait_until("the archive is trimmed", || {
        client.query_one("SELECT count(*) = 0 FROM queue_archive.q", &[]).unwrap().get(0)
    });
    client.batch_execute("BEGIN; SELECT queue_send('q', '\"prepared\"'); PREPARE TRANSACTION 'life'").unwrap();
    assert_eq!(read_one(&mut client, "q").message, 1);
    client.batch_execute("COMMIT PREPARED 'life'").unwrap();
    assert_eq!(read_awaited(&mut client, "q").message, "prepared");
    // Leases are written and go again.
    let held = read_for(&mut client, "q", 1, "1 h");
    assert!(held.is_empty());
    send(&mut client, "q", 9);
    let held = read_for(&mut client, "q", 1, "1 h");
    wait_until("the lease is written", || written_lease(&mut client, "q", held[0].msg_id).is_some());
    assert!(delete(&mut client, "q", &held[0]));
    advance_clock(&mut client, "15 s"); // rows that are not needed are swept together
    wait_until("and forgotten", || written_lease(&mut client, "q", held[0].msg_id).is_none());
    client
        .batch_execute("SELECT queue_schedule('q', 'n', '900 days', '1'), queue_unschedule('q', 'n')")
        .unwrap();
    client
        .batch_execute("SELECT queue_purge('q'), queue_drop('here'), queue_create('q2'), queue_drop('q2')")
        .unwrap();
    create(&mut client, &["dead"]);
    client.batch_execute("SELECT queue_drop('q', force => true); SELECT queue_create('q')").unwrap();
    works(&database);
    assert_eq!(worker_pid(&database), worker, "it has met no error");
    let log = here.log();
    assert!(!log.contains("replica identity"), "{log}");
}

#[test]
fn finish_that_could_not_be_replicated_is_refused_as_a_delete_is() {
    let here = publisher();
    let database = database_on(&here, &["q", "archived", "dead"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_create('filtered');
             CREATE PUBLICATION p FOR TABLE queue.q, queue.archived, queue.dead;
             CREATE PUBLICATION f FOR TABLE queue.filtered WHERE (priority = 0);
             ALTER TABLE queue.q REPLICA IDENTITY NOTHING;
             ALTER TABLE queue.dead REPLICA IDENTITY NOTHING;
             SELECT queue_send('q', '1'), queue_send('filtered', '1'), queue_send('archived', '1');
             INSERT INTO queue.dead (message, headers) VALUES ('1', '{\"dead_letter\": {\"queue\": \"archived\"}}')",
        )
        .unwrap();
    for call in [
        "DELETE FROM queue.q",
        "SELECT queue_delete('q', 1)",
        "SELECT queue_archive('q', 1)",
        "SELECT queue_cancel('q', 1)",
        "SELECT queue_reject('q', 1)",
        "SELECT * FROM queue_pop('q')",
        "DELETE FROM queue.filtered",
        "SELECT queue_delete('filtered', 1)",
        "SELECT queue_redrive('dead')",
    ] {
        // Said of the table as for a DELETE: an invalid reference to columns, or a prerequisite that is missing.
        let refused = code(client.batch_execute(call));
        assert!(["55000", "42P10"].contains(&refused.as_str()), "{call}: {refused}");
    }
    assert_eq!((rows(&mut client, "q"), rows(&mut client, "filtered"), rows(&mut client, "dead")), (1, 1, 1));
    assert!(delete_id(&mut client, "archived", 1), "published, with its key");
    client.batch_execute("ALTER TABLE queue.q REPLICA IDENTITY DEFAULT; DROP PUBLICATION f").unwrap();
    assert!(delete_id(&mut client, "q", 1));
    assert!(delete_id(&mut client, "filtered", 1));
}
