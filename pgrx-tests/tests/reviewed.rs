//! What reviewers found on 2026-11-27 by reading the message's way and the load, each by itself. Every one of these
//! failed before it was mended.

mod common;

use std::time::{Duration, Instant};

use common::*;
use postgres::types::FromSql;
use postgres::Client;
use queue_tests::wait_points::advance_clock;
use queue_tests::{wait_until, wait_until_some, Cluster, ClusterOptions, Database, StopMode};

fn value<T: for<'a> FromSql<'a>>(client: &mut Client, sql: &str) -> T {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

// ---- Settings -------------------------------------------------------------------------------------------------

#[test]
fn settings_that_a_savepoint_undid_reach_nobody_before_the_commit() {
    let database = database_with(&["q"]);
    let (mut owner, mut other) = (session(&database), session(&database));
    let msg_id = send(&mut owner, "q", 1);
    assert!(read(&mut other, "q", 1).len() == 1);
    assert_eq!(
        other.query("SELECT queue_release('q', ARRAY[$1::int8])", &[&msg_id]).unwrap().len(),
        1,
        "and the queue is known"
    );
    owner
        .batch_execute(
            "BEGIN; SELECT queue_alter('q', visibility_timeout => '1 h'); SELECT queue_pause('q'); SAVEPOINT s; \
             SELECT queue_alter('q', retry_delay => '2 s'); ROLLBACK TO s",
        )
        .unwrap();
    assert_eq!(ids(&read(&mut other, "q", 1)), [msg_id], "no pause is committed");
    owner.batch_execute("ROLLBACK").unwrap();
}

// ---- Arguments ------------------------------------------------------------------------------------------------

#[test]
fn arrays_of_millions_of_nulls_are_refused_by_their_length() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let sql = "SELECT queue_delete_batch('q', array_fill(null::bigint, array[20000000]))";
    let begun = Instant::now();
    let error = client.query(sql, &[]).unwrap_err();
    assert_eq!(error.code().map(|code| code.code()), Some("22023"));
    assert!(error.as_db_error().unwrap().message().contains("20000000 elements"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

// ---- Reading from several queues ------------------------------------------------------------------------------

#[test]
fn read_any_that_is_refused_uses_up_no_delivery() {
    let database = database_with(&["g"]);
    let mut client = session(&database);
    assert!(read(&mut client, "g", 1).is_empty());
    let msg_id = send(&mut client, "g", 1);
    for _ in 0..3 {
        assert_eq!(code(client.query("SELECT * FROM queue_read_any(array['g', 'nosuch'], 10)", &[])), "42704");
    }
    let one = read_one(&mut client, "g");
    assert_eq!((one.msg_id, one.count), (msg_id, 1));
}

#[test]
fn read_any_gives_whole_leases_however_long_it_waited_for_a_lock() {
    let database = database_with(&["la", "lb"]);
    let (mut locker, reader) = (session(&database), session(&database));
    for queue in ["la", "lb"] {
        assert!(read(&mut locker, queue, 1).is_empty());
    }
    send(&mut locker, "la", 1);
    locker.batch_execute("BEGIN; LOCK TABLE queue.lb IN ACCESS EXCLUSIVE MODE").unwrap();
    let pid = reader.pid();
    let reading = reader
        .run_with(|client| {
            client.query_one(
                "SELECT extract(epoch FROM lease_expires_at)::float8 FROM queue_read_any(array['la', 'lb'], 2, '1 s')",
                &[],
            )
        })
        .unwrap();
    database.wait_until_backend_waits(pid, "Lock", None);
    std::thread::sleep(Duration::from_millis(1_200));
    let locked_s: f64 = value(&mut locker, "SELECT extract(epoch FROM clock_timestamp())::float8");
    locker.batch_execute("COMMIT").unwrap();
    let (_, row) = reading.join().unwrap();
    let lease_s = row.unwrap().get::<_, f64>(0) - locked_s;
    assert!(lease_s > 0.99, "it ends {lease_s} s after the lock was still held");
}

#[test]
fn read_any_of_many_queues_loads_each_of_them() {
    let names: Vec<String> = (1..=7).map(|n| format!("m{n}")).collect();
    let cluster = ClusterOptions::default().start().unwrap();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let database = database_on(&cluster, &names);
    let mut client = session(&database);
    for name in &names {
        send_delayed(&mut client, name, "1 day");
    }
    send(&mut client, "m6", 6);
    cluster.restart(StopMode::Fast).unwrap();
    set_worker(&database, false);
    let mut client = session(&database);
    let got: String =
        value(&mut client, "SELECT queue FROM queue_read_any(ARRAY['m1','m2','m3','m4','m5','m6','m7'])");
    assert_eq!(got, "m6");
}

// ---- Exhausted messages ---------------------------------------------------------------------------------------

#[test]
fn exhausted_messages_that_cannot_be_moved_keep_no_others() {
    // Leases are not written: none comes back after the restart.
    let cluster = ClusterOptions::default()
        .set("pg_queue.ready_window", "64")
        .set("pg_queue.lease_flush_interval", "1h")
        .start()
        .unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_alter('q', max_deliveries => 2); ALTER TABLE queue_archive.q ADD CHECK (message IS NULL); \
             INSERT INTO queue.q (message, delivery_count) SELECT '1', 2 FROM generate_series(1, 100)",
        )
        .unwrap();
    let msg_id = send(&mut client, "q", 1);
    assert_eq!(ids(&read(&mut client, "q", 1)), [msg_id]);
    cluster.restart(StopMode::Fast).unwrap();
    let mut client = session(&database);
    assert_eq!(read_awaited(&mut client, "q").msg_id, msg_id, "loaded past them");
    client.batch_execute("DELETE FROM queue.q WHERE msg_id <= 90").unwrap();
    client.batch_execute("ALTER TABLE queue_archive.q DROP CONSTRAINT q_message_check").unwrap();
    wait_until("the rest is moved", || value::<i64>(&mut client, "SELECT count(*) FROM queue_archive.q") == 10);
}

// ---- Waiting --------------------------------------------------------------------------------------------------

#[test]
fn sleeper_hears_when_the_next_is_due_from_one_who_leaves() {
    // The message must be sent before the first leaves, and be due after that: a busy machine gets more time for it.
    let is_heard = [1, 3, 6].into_iter().any(|seconds| {
        let database = database_with(&["q"]);
        set_worker(&database, false);
        let mut sender = session(&database);
        let first = session(&database);
        let pid = first.pid();
        let wait = format!("{seconds} s");
        let first = first.run_with(move |client| try_read(client, "q", 1, None, &wait)).unwrap();
        wait_until("the first sleeps", || {
            let sql = "SELECT wait_event_type FROM pg_stat_activity WHERE pid = $1";
            first.is_done()
                || sender.query_one(sql, &[&pid]).unwrap().get::<_, Option<&str>>(0) == Some("Extension")
        });
        let second = reader_asleep_for_long(&database, "q");
        let msg_id = send_delayed(&mut sender, "q", &format!("{} s", 2 * seconds));
        let is_sent_in_time = !first.is_done();
        let is_left_in_time = first.join().unwrap().1.unwrap().is_empty();
        if !is_left_in_time {
            send(&mut sender, "q", 1);
        }
        let (_, got) = joined(second);
        assert!(!is_left_in_time || ids(&got) == [msg_id], "{got:?}");
        is_sent_in_time && is_left_in_time
    });
    assert!(is_heard, "the machine was too busy each time");
}

#[test]
fn sleeper_at_a_queue_that_is_resumed_looks_when_its_message_is_due() {
    // The message must be due after the queue is resumed: a busy machine gets more time for it.
    let is_looked = ["2 s", "5 s", "12 s"].into_iter().any(|delay| {
        let database = database_with(&["q"]);
        set_worker(&database, false);
        let mut sender = session(&database);
        assert!(read(&mut sender, "q", 1).is_empty());
        let msg_id = send_delayed(&mut sender, "q", delay);
        sender.batch_execute("SELECT queue_pause('q')").unwrap();
        let reading = reader_asleep_for_long(&database, "q");
        sender.batch_execute("SELECT queue_resume('q')").unwrap();
        let is_in_time = state(&mut sender, "q", msg_id).as_deref() == Some("delayed");
        assert_eq!(ids(&joined(reading).1), [msg_id]);
        is_in_time
    });
    assert!(is_looked, "the machine was too busy each time");
}

#[test]
fn sleeper_is_on_time_though_the_worker_is_kept() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q", "slow"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE FUNCTION public.keep() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM pg_sleep(8); RETURN NEW; END $$; \
             CREATE TRIGGER t BEFORE INSERT ON queue_archive.slow FOR EACH ROW EXECUTE FUNCTION public.keep(); \
             SELECT queue_alter('slow', max_deliveries => 1)",
        )
        .unwrap();
    // Since when the worker has been in that trigger.
    let kept_since = |client: &mut Client| -> Option<String> {
        let sql = "SELECT xact_start::text FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' \
                   AND datname = current_database() AND wait_event = 'PgSleep'";
        client.query_opt(sql, &[]).unwrap().map(|row| row.get(0))
    };
    // It must be kept for all the while: a busy machine gets another try.
    let is_on_time = (0..3).any(|_| {
        wait_until("the worker is not kept any more", || rows(&mut client, "slow") == 0);
        send(&mut client, "slow", 1);
        exhaust(&mut client, "slow", 1);
        let since = wait_until_some("the worker is kept", || kept_since(&mut client));
        let reading = reader_asleep(&database, "q");
        let msg_id = send_delayed(&mut client, "q", "1 s");
        let (mut reader, got) = joined(reading);
        let is_kept = kept_since(&mut client) == Some(since);
        assert_eq!(ids(&got), [msg_id]);
        assert!(delete(&mut reader, "q", &got[0]));
        is_kept
    });
    assert!(is_on_time, "it came when the worker was free");
}

#[test]
fn wait_in_the_senders_transaction_ends_with_its_own_message() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("BEGIN").unwrap();
    let msg_id = send_delayed(&mut client, "q", "1 s");
    let (mut client, got) = joined(start_long_read(client, "q"));
    assert_eq!(ids(&got), [msg_id]);
    client.batch_execute("COMMIT; BEGIN").unwrap();
    send(&mut client, "q", 2);
    let ready: Option<String> = value(&mut client, "CALL queue_wait(ARRAY['q'], '20 s')");
    assert_eq!(ready.as_deref(), Some("q"));
    client.batch_execute("COMMIT").unwrap();
}

#[test]
fn prepared_transaction_is_found_without_a_worker() {
    let database = database_with(&["q"]);
    set_worker(&database, false);
    let (mut sender, mut reader) = (session(&database), session(&database));
    assert!(read(&mut reader, "q", 1).is_empty());
    sender.batch_execute("BEGIN").unwrap();
    let msg_id = send(&mut sender, "q", 1);
    let name = format!("prepared_without_a_worker_{}", database.name);
    sender.batch_execute(&format!("PREPARE TRANSACTION '{name}'")).unwrap();
    sender.batch_execute(&format!("COMMIT PREPARED '{name}'")).unwrap();
    assert_eq!(ids(&read(&mut reader, "q", 1)), [msg_id]);
}

// ---- What the dispatcher knows of a row -----------------------------------------------------------------------

#[test]
fn count_is_kept_where_a_row_was_put_off_and_read_in_one_transaction() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    client.batch_execute("SELECT queue_alter('q', retry_delay => '10 ms')").unwrap();
    for _ in 0..3 {
        client.batch_execute("BEGIN").unwrap();
        assert_eq!(try_read(&mut client, "q", 1, None, LONG).unwrap().len(), 1);
        client.batch_execute("ROLLBACK").unwrap();
    }
    // (Once its backoff is over.)
    let put_off = "BEGIN; UPDATE queue.q SET visible_at = clock_timestamp() + '1 h'; SELECT pg_sleep(0.1)";
    client.batch_execute(put_off).unwrap();
    assert!(read(&mut client, "q", 1).is_empty());
    client.batch_execute("COMMIT").unwrap();
    let late: f64 = value(
        &mut client,
        "SELECT extract(epoch FROM p.visible_at - q.visible_at)::float8 FROM queue_peek('q') p JOIN queue.q q USING (msg_id)",
    );
    assert!((0.0..0.1).contains(&late), "it is the row that delays it: {late}");
    client.batch_execute("UPDATE queue.q SET visible_at = NULL").unwrap();
    assert_eq!(read_awaited(&mut client, "q").count, 4);
}

#[test]
fn pop_of_what_a_trigger_keeps_is_no_delivery() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE FUNCTION public.keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; \
             CREATE TRIGGER t BEFORE DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION public.keep()",
        )
        .unwrap();
    let msg_id = send(&mut client, "q", 1);
    assert!(client.query("SELECT * FROM queue_pop('q')", &[]).unwrap().is_empty());
    let one = read_awaited(&mut client, "q");
    assert_eq!((one.msg_id, one.count), (msg_id, 1));
}

#[test]
fn lease_taken_after_truncate_in_its_transaction_holds() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    send_many(&mut client, "q", 3);
    assert_eq!(read(&mut other, "q", 1).len(), 1);
    client.batch_execute("BEGIN; TRUNCATE queue.q").unwrap();
    let msg_id = send(&mut client, "q", 4);
    let one = read_one(&mut client, "q");
    let kept = send(&mut client, "q", 5);
    client.batch_execute("COMMIT").unwrap();
    assert_eq!(ids(&read(&mut other, "q", 9)), [kept], "one lease at a time");
    assert_eq!(one.msg_id, msg_id);
    assert!(delete(&mut client, "q", &one));
}

#[test]
fn purge_of_leased_messages_makes_room() {
    let cluster = ClusterOptions::default()
        .set("pg_queue.max_messages", "4096")
        .set("pg_queue.max_queues", "40")
        .start()
        .unwrap();
    let database = database_on(&cluster, &["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    send_many(&mut client, "q", 5_000);
    let leased = |client: &mut Client| {
        client.query("SELECT msg_id FROM queue_peek('q', 5000, state => 'leased')", &[]).unwrap().len()
    };
    let mut delivered = 0;
    wait_until("there is no room for more", || {
        let got = read_for(&mut client, "q", 1_000, "1 h").len();
        delivered += got;
        got == 0 && delivered >= 2_000
    });
    assert!(delivered < 5_000, "{delivered}");
    assert_eq!(leased(&mut other), delivered);
    for end in ["ROLLBACK", "COMMIT"] {
        client.batch_execute("BEGIN; SELECT queue_purge('q')").unwrap();
        client.batch_execute(end).unwrap();
        assert_eq!(leased(&mut other), if end == "COMMIT" { 0 } else { delivered }, "after {end}");
    }
    let sent = send_many(&mut client, "q", 1_000);
    let mut got = Vec::new();
    wait_until("as many are delivered", || {
        got.extend(ids(&read_for(&mut other, "q", 1_000, "1 h")));
        got.len() >= 1_000
    });
    assert_eq!(sorted(got), sent);
}

#[test]
fn id_that_comes_anew_inherits_no_delay() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_alter('q', retry_delay => '1 h')").unwrap();
    send(&mut client, "q", 1);
    for _ in 0..2 {
        client.batch_execute("BEGIN").unwrap();
        read_one(&mut client, "q");
        client.batch_execute("ROLLBACK").unwrap();
    }
    assert!(read(&mut client, "q", 1).is_empty(), "the backoff runs");
    client.batch_execute("DELETE FROM queue.q").unwrap();
    client.batch_execute("INSERT INTO queue.q (msg_id, message) VALUES (1, '2')").unwrap();
    let one = read_one(&mut client, "q");
    assert_eq!((one.count, one.message), (1, serde_json::json!(2)));
}

// ---- The load -------------------------------------------------------------------------------------------------

/// A queue whose only message lies behind many rows that nobody sees; nothing is loaded, and there is no worker.
fn behind_dead_rows<'a>(cluster: &'a Cluster, before: &str) -> (Database<'a>, i64) {
    let database = database_on(cluster, &["q"]);
    set_worker(&database, false); // it would look first, and mark them
    let mut client = session(&database);
    client.batch_execute(before).unwrap();
    client.batch_execute("INSERT INTO queue.q (message) SELECT '1' FROM generate_series(1, 30000)").unwrap();
    client.batch_execute("DELETE FROM queue.q").unwrap();
    let msg_id = send(&mut client, "q", 1);
    cluster.restart(StopMode::Fast).unwrap();
    (database, msg_id)
}

const DROP_KEY: &str = "DO $$ BEGIN EXECUTE (SELECT format('ALTER TABLE queue.q DROP CONSTRAINT %I', conname) \
    FROM pg_constraint WHERE conrelid = 'queue.q'::regclass AND contype = 'p'); END $$;";

#[test]
fn load_goes_on_from_call_to_call_past_rows_that_nobody_sees() {
    let cluster = ClusterOptions::default().set("autovacuum", "off").start().unwrap();
    let (database, msg_id) = behind_dead_rows(&cluster, "");
    let (mut other, reader) = (session(&database), session(&database));
    let pid = reader.pid();
    let mut hold = Hold::backend(&database, "load-row", pid);
    let reading = reader.run_with(|client| try_read(client, "q", 1, None, "0")).unwrap();
    hold.wait_reached(); // it has looked at some of them
    other.execute("SELECT pg_cancel_backend($1)", &[&pid]).unwrap();
    hold.release();
    let (mut reader, result) = reading.join().unwrap();
    assert_eq!(code(result), "57014");
    assert_eq!(ids(&read(&mut reader, "q", 1)), [msg_id]);
}

#[test]
fn load_goes_by_a_key_that_includes_nulls() {
    let cluster = ClusterOptions::default().set("autovacuum", "off").start().unwrap();
    let key = format!("{DROP_KEY} ALTER TABLE queue.q ADD PRIMARY KEY (msg_id) INCLUDE (group_key)");
    let (database, msg_id) = behind_dead_rows(&cluster, &key);
    assert_eq!(ids(&read(&mut session(&database), "q", 1)), [msg_id]);
}

#[test]
fn load_that_fails_is_tried_less_and_less_often() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send_delayed(&mut client, "q", "1 h"); // somebody scans for it five seconds before
    client.batch_execute(DROP_KEY).unwrap();
    let is_failure = |line: &&str| line.contains("loading messages") && line.contains("is not intact");
    let failures = || cluster.log().lines().filter(is_failure).count();
    advance_clock(&mut client, "1 h");
    wait_until("it has failed", || failures() > 0);
    std::thread::sleep(Duration::from_secs(6));
    assert!(failures() <= 8, "{} lines", failures());
}

// ---- What owners do with their tables -------------------------------------------------------------------------

#[test]
fn messages_that_another_table_refers_to_later_are_moved_all_the_same() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE TABLE public.job (msg_id int8 REFERENCES queue.q ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED); \
             SELECT queue_send('q', '1', ttl => '10 ms')",
        )
        .unwrap();
    wait_until("it has expired", || rows(&mut client, "q") == 0);
}

#[test]
fn list_under_an_old_snapshot_leaves_out_what_was_dropped_since() {
    let database = database_with(&["gone", "there"]);
    let (mut client, mut other) = (session(&database), session(&database));
    client
        .batch_execute(
            "DROP ROLE IF EXISTS lists_queues; CREATE ROLE lists_queues; GRANT SELECT ON queue.there TO lists_queues",
        )
        .unwrap();
    client
        .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1; SET LOCAL ROLE lists_queues")
        .unwrap();
    other.batch_execute("SELECT queue_drop('gone')").unwrap();
    let listed: Vec<String> =
        client.query("SELECT queue FROM queue_list()", &[]).unwrap().iter().map(|r| r.get(0)).collect();
    client.batch_execute("ROLLBACK").unwrap();
    client.batch_execute("REVOKE ALL ON queue.there FROM lists_queues; DROP ROLE lists_queues").unwrap();
    assert_eq!(listed, ["there"]);
}

#[test]
fn two_alterations_at_a_time_make_no_circle_of_dead_letter_queues() {
    let database = database_with(&["a", "b"]);
    let (mut client, other) = (session(&database), session(&database));
    let pid = other.pid();
    client.batch_execute("BEGIN; SELECT queue_alter('a', dead_letter_queue => 'b')").unwrap();
    let altering = other.run("SELECT queue_alter('b', dead_letter_queue => 'a')").unwrap();
    wait_until("the second waits", || {
        altering.is_done()
            || value(
                &mut client,
                &format!("SELECT cardinality(pg_blocking_pids({pid})) > 0 FROM pg_sleep(0.01)"),
            )
    });
    client.batch_execute("COMMIT").unwrap();
    assert_eq!(code(altering.join().unwrap().1), "22023");
}

#[test]
fn whoever_creates_a_queue_with_a_dead_letter_queue_keeps_nobody_waiting() {
    let database = database_with(&["dead", "q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    client.batch_execute("BEGIN; SELECT queue_create('a', dead_letter_queue => 'dead')").unwrap();
    other
        .batch_execute(
            "SET statement_timeout = '30 s'; SELECT queue_create('b', dead_letter_queue => 'dead');
             SELECT queue_alter('q', dead_letter_queue => 'dead'); SELECT queue_alter('q', dead_letter_queue => '')",
        )
        .unwrap();
    client.batch_execute("COMMIT").unwrap();
    assert_eq!(code(other.batch_execute("SELECT queue_alter('dead', dead_letter_queue => 'a')")), "22023");
    // Nor does whoever must not alter a queue wait.
    client.batch_execute("CREATE ROLE who_owns_no_queue").unwrap();
    client.batch_execute("BEGIN; SELECT queue_alter('q', dead_letter_queue => 'dead')").unwrap();
    let alter = "SET ROLE who_owns_no_queue; SELECT queue_alter('a', dead_letter_queue => 'dead')";
    assert_eq!(code(other.batch_execute(alter)), "42501");
    client.batch_execute("ROLLBACK; DROP ROLE who_owns_no_queue").unwrap();
}

#[test]
fn what_a_reader_takes_and_does_not_see_is_nobodys_lease() {
    let database = database_with(&["q"]);
    let (mut sender, mut reader, mut other) = (session(&database), session(&database), session(&database));
    sender.batch_execute("BEGIN").unwrap();
    let msg_id = send(&mut sender, "q", 1);
    // Named in vain and undone, it looks ready; a transaction with an id may have deleted what it does not see.
    reader
        .batch_execute(&format!(
            "BEGIN; SELECT txid_current(); SAVEPOINT s; SELECT queue_release('q', ARRAY[{msg_id}]::int8[]); ROLLBACK TO s"
        ))
        .unwrap();
    assert!(read(&mut reader, "q", 1).is_empty());
    let extended = other.query_one("SELECT queue_extend('q', $1, NULL, '1 min') IS NULL", &[&msg_id]).unwrap();
    assert!(extended.get::<_, bool>(0), "nobody holds it");
    sender.batch_execute("COMMIT").unwrap();
    let one = read_one(&mut other, "q"); // the reader's transaction is open
    assert_eq!((one.msg_id, one.count), (msg_id, 1));
    reader.batch_execute("ROLLBACK").unwrap();
    assert!(delete(&mut other, "q", &one));
}

#[test]
fn own_message_that_has_expired_when_it_is_read_is_not_counted_where_that_is_undone() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client
        .batch_execute("BEGIN; SELECT queue_send('q', '1', ttl => '1 ms'), pg_sleep(0.01); SAVEPOINT s")
        .unwrap();
    assert!(read(&mut client, "q", 1).is_empty());
    client.batch_execute("ROLLBACK TO s; UPDATE queue.q SET expires_at = NULL").unwrap();
    assert_eq!(read_one(&mut client, "q").count, 1);
    client.batch_execute("ROLLBACK").unwrap();
}

#[test]
fn own_message_that_has_expired_keeps_none_behind_it() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("BEGIN; SELECT queue_send('q', '1', ttl => '1 ms'), pg_sleep(0.01)").unwrap();
    let msg_id = send(&mut client, "q", 2);
    assert!(read(&mut client, "q", 1)
        .iter()
        .chain(&read(&mut client, "q", 1))
        .map(|one| one.msg_id)
        .eq([msg_id]));
    assert!(read(&mut client, "q", 1).is_empty());
    client.batch_execute("UPDATE queue.q SET expires_at = NULL").unwrap();
    assert_eq!(read_one(&mut client, "q").count, 1);
    client.batch_execute("ROLLBACK").unwrap();
}

/// Before a message of `queue.q` whose text is 1 is deleted.
fn trigger_that(client: &mut postgres::Client, does: &str) {
    client
        .batch_execute(&format!(
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS
                 $$BEGIN IF OLD.message::text = '1' THEN {does}; RETURN NULL; END IF; RETURN OLD; END$$;
             CREATE TRIGGER keep BEFORE DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION keep()"
        ))
        .unwrap();
}

#[test]
fn own_message_that_a_trigger_keeps_from_pop_keeps_none_behind_it() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    trigger_that(&mut client, "NULL");
    client.batch_execute("BEGIN").unwrap();
    let kept = send(&mut client, "q", 1);
    let other = send(&mut client, "q", 2);
    let mut pop = || -> Vec<i64> {
        client.query("SELECT msg_id FROM queue_pop('q')", &[]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    // The one that is kept is tried again after a second.
    let got = loop {
        let begun = Instant::now();
        let got = [pop(), pop()].concat();
        if !got.is_empty() || begun.elapsed() < Duration::from_secs(1) {
            break got;
        }
    };
    assert_eq!(got, [other]);
    assert!(pop().is_empty());
    client.batch_execute("COMMIT").unwrap();
    let one = read_one(&mut client, "q");
    assert_eq!((one.msg_id, one.count), (kept, 1));
}

#[test]
fn own_message_that_a_trigger_puts_off_and_keeps_from_pop_is_put_off() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    trigger_that(
        &mut client,
        "UPDATE queue.q SET visible_at = clock_timestamp() + '1 h' WHERE msg_id = OLD.msg_id",
    );
    client.batch_execute("BEGIN").unwrap();
    send(&mut client, "q", 1);
    assert!(client.query("SELECT FROM queue_pop('q')", &[]).unwrap().is_empty());
    assert!(client.query("SELECT FROM queue_read('q', wait => '1.2 s')", &[]).unwrap().is_empty());
    client.batch_execute("COMMIT").unwrap();
    assert!(read(&mut client, "q", 1).is_empty());
    client.batch_execute("UPDATE queue.q SET visible_at = NULL").unwrap();
    assert_eq!(read_one(&mut client, "q").count, 1);
}

#[test]
fn own_message_that_a_trigger_keeps_from_pop_is_not_delivered() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    client
        .batch_execute(
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             CREATE TRIGGER keep BEFORE DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION keep()",
        )
        .unwrap();
    client.batch_execute("BEGIN").unwrap();
    let msg_id = send(&mut client, "q", 1);
    assert!(client.query("SELECT FROM queue_pop('q')", &[]).unwrap().is_empty());
    client.batch_execute("COMMIT").unwrap();
    let one = read_one(&mut other, "q");
    assert_eq!((one.msg_id, one.count), (msg_id, 1));
}
