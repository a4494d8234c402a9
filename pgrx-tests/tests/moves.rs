//! Messages that are moved: by the worker, when they had their last delivery, whatever stands in the way of others;
//! and back, by queue_redrive and queue_unarchive, while consumers are at them.

mod common;

use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

use common::*;
use postgres::Client;
use queue_tests::wait_points::advance_clock;
use queue_tests::{wait_until, Cluster, Database, Session};
use serde_json::{json, Value};

/// Queues `dead` and `q`, whose messages go there after so many deliveries.
fn with_dead_letters(client: &mut Client, deliveries: i64) {
    create(client, &["dead"]);
    let sql = "SELECT queue_create('q', max_deliveries => $1, dead_letter_queue => 'dead', retry_jitter => 0)";
    client.execute(sql, &[&deliveries]).unwrap();
}

/// Sends the numbers from 1 to `count` to `q` and has them dead-lettered.
fn bury(client: &mut Client, count: i64) {
    for msg_id in send_many(client, "q", count) {
        client.execute("SELECT queue_reject('q', $1)", &[&msg_id]).unwrap();
    }
}

fn redrive(client: &mut Client, quantity: Option<i64>) -> i64 {
    client.query_one("SELECT queue_redrive('dead', $1)", &[&quantity]).unwrap().get(0)
}

fn unarchive(client: &mut Client, quantity: Option<i64>) -> i64 {
    client.query_one("SELECT queue_unarchive('q', $1)", &[&quantity]).unwrap().get(0)
}

/// The messages, which are numbers, of a table.
fn numbers(client: &mut Client, table: &str) -> Vec<i64> {
    let rows = client.query(&format!("SELECT message::int8 FROM {table} ORDER BY 1"), &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Header `dead_letter` of the messages of `dead`, without the time, which must be about now.
fn letters(client: &mut Client) -> Vec<Value> {
    let sql = "SELECT (headers -> 'dead_letter') - 'at', abs(extract(epoch FROM
                   (headers #>> '{dead_letter,at}')::timestamptz - clock_timestamp()))::float8
               FROM queue.dead ORDER BY msg_id";
    let rows = client.query(sql, &[]).unwrap();
    assert!(rows.iter().all(|row| row.get::<_, f64>(1) < 3_600.0), "it says when");
    rows.iter().map(|row| row.get(0)).collect()
}

fn letter(msg_id: i64, error: Option<&str>, deliveries: i64) -> Value {
    json!({"queue": "q", "msg_id": msg_id, "reason": "max_deliveries", "error": error,
           "delivery_count": deliveries})
}

/// Returns when the table is empty, and asserts that the worker waits for no table meanwhile.
#[track_caller]
fn wait_moved_past_locks(client: &mut Client, queue: &str) {
    let waits = "SELECT FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' \
                 AND datname = current_database() AND wait_event_type = 'Lock' AND wait_event = 'relation'";
    wait_until("it is moved", || {
        assert!(client.query(waits, &[]).unwrap().is_empty(), "the worker waits for a table");
        rows(client, queue) == 0
    });
}

// ---- What cannot be moved keeps nobody ----------------------------------------------------------------------

#[test]
fn exhausted_messages_that_another_transaction_is_at_do_not_keep_those_behind_them() {
    let database = database_with(&[]);
    let (mut client, mut locker) = (session(&database), session(&database));
    with_dead_letters(&mut client, 1);
    send_many(&mut client, "q", 151);
    locker.batch_execute("BEGIN; SELECT FROM queue.q WHERE message < '151' FOR UPDATE").unwrap();
    exhaust(&mut client, "q", 151);
    wait_until("the last one is moved", || numbers(&mut client, "queue.dead") == [151]);
    assert_eq!(rows(&mut client, "q"), 150);
    // Also one that comes later, and comes before some of those.
    client.batch_execute("INSERT INTO queue.q (msg_id, message) VALUES (-1, '200')").unwrap();
    exhaust(&mut client, "q", 1);
    wait_until("a new one is moved", || numbers(&mut client, "queue.dead") == [151, 200]);
    locker.batch_execute("COMMIT").unwrap();
    wait_until("all are moved", || rows(&mut client, "dead") == 152);
    assert_eq!(rows(&mut client, "q"), 0);
}

#[test]
fn exhausted_messages_that_the_dead_letter_table_refuses_do_not_keep_those_behind_them() {
    let database = database_with(&[]);
    let mut client = session(&database);
    with_dead_letters(&mut client, 1);
    client.batch_execute("ALTER TABLE queue.dead ADD CONSTRAINT large CHECK (message > '150')").unwrap();
    send_many(&mut client, "q", 152);
    exhaust(&mut client, "q", 152);
    wait_until("the last two are moved", || numbers(&mut client, "queue.dead") == [151, 152]);
    client.batch_execute("ALTER TABLE queue.dead DROP CONSTRAINT large").unwrap();
    wait_until("all are moved", || rows(&mut client, "dead") == 152);
    assert_eq!(rows(&mut client, "q"), 0);
}

#[test]
fn exhausted_messages_that_a_trigger_keeps_do_not_keep_those_behind_them() {
    let database = database_with(&[]);
    let mut client = session(&database);
    with_dead_letters(&mut client, 1);
    client
        .batch_execute(
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN IF OLD.message <= ''120'' THEN RETURN NULL; END IF; RETURN OLD; END';
             CREATE TRIGGER keep BEFORE DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION keep()",
        )
        .unwrap();
    send_many(&mut client, "q", 121);
    exhaust(&mut client, "q", 121);
    wait_until("the last one is moved", || numbers(&mut client, "queue.dead") == [121]);
    client.batch_execute("DROP TRIGGER keep ON queue.q").unwrap();
    wait_until("all are moved", || rows(&mut client, "dead") == 121);
}

#[test]
fn lock_on_the_dead_letter_table_keeps_no_other_queue() {
    let database = database_with(&[]);
    let (mut client, mut locker) = (session(&database), session(&database));
    with_dead_letters(&mut client, 1);
    client.batch_execute("SELECT queue_create('kept', max_deliveries => 1)").unwrap();
    let msg_id = send(&mut client, "q", 7);
    locker.batch_execute("BEGIN; LOCK TABLE queue.dead").unwrap();
    exhaust(&mut client, "q", 1);
    wait_until("it is exhausted", || state(&mut client, "q", msg_id).as_deref() == Some("exhausted"));
    for number in 1..=3 {
        send(&mut client, "kept", number);
        exhaust(&mut client, "kept", 1);
        wait_moved_past_locks(&mut client, "kept");
    }
    locker.batch_execute("COMMIT").unwrap();
    assert_eq!(read_awaited(&mut client, "dead").message, 7);
}

#[test]
fn lock_on_the_archive_keeps_no_other_queue() {
    let database = database_with(&[]);
    let (mut client, mut locker) = (session(&database), session(&database));
    with_dead_letters(&mut client, 1);
    client.batch_execute("SELECT queue_create('kept', max_deliveries => 1)").unwrap();
    let msg_id = send(&mut client, "kept", 7);
    locker.batch_execute("BEGIN; LOCK TABLE queue_archive.kept, queue_archive.q").unwrap();
    exhaust(&mut client, "kept", 1);
    wait_until("it is exhausted", || state(&mut client, "kept", msg_id).as_deref() == Some("exhausted"));
    send(&mut client, "q", 1);
    exhaust(&mut client, "q", 1);
    wait_moved_past_locks(&mut client, "q");
    assert_eq!(read_awaited(&mut client, "dead").message, 1, "whose own archive is not needed");
    locker.batch_execute("COMMIT").unwrap();
    wait_until("it is archived", || rows(&mut client, "kept") == 0);
}

#[test]
fn unique_index_of_the_dead_letter_table_keeps_the_worker_for_a_moment_only() {
    let database = database_with(&[]);
    let (mut client, mut other) = (session(&database), session(&database));
    with_dead_letters(&mut client, 1);
    client.batch_execute("CREATE UNIQUE INDEX ON queue.dead (message)").unwrap();
    // Whether 1 may be inserted depends on how this ends.
    other.batch_execute("BEGIN; INSERT INTO queue.dead (message) VALUES ('1')").unwrap();
    send_many(&mut client, "q", 3);
    exhaust(&mut client, "q", 3);
    wait_until("the others are moved", || numbers(&mut client, "queue.dead") == [2, 3]);
    other.batch_execute("ROLLBACK").unwrap();
    wait_until("that one, too", || numbers(&mut client, "queue.dead") == [1, 2, 3]);
}

/// More than the worker comes to within two minutes.
const SLOW: i64 = 250;

/// Queue `slow`, on which a trigger takes half a second whenever `event` happens to a row, and `honest`.
fn create_slow(client: &mut Client, event: &str) {
    client
        .batch_execute(&format!(
            "SELECT queue_create('slow', max_deliveries => 1), queue_create('honest', max_deliveries => 1);
             CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN PERFORM pg_sleep(0.5); RETURN COALESCE(NEW, OLD); END';
             CREATE TRIGGER slow BEFORE {event} ON queue.slow FOR EACH ROW EXECUTE FUNCTION slow()"
        ))
        .unwrap();
}

/// Returns when the worker, which is at what is slow, has moved a message of `honest`.
fn wait_honest_moved(client: &mut Client, database: &Database) {
    database.wait_until_backend_waits(worker_pid(database), "Timeout", Some("PgSleep"));
    send(client, "honest", 1);
    exhaust(client, "honest", 1);
    wait_until("the other queue's message is moved", || rows(client, "honest") == 0);
}

#[test]
fn slow_trigger_keeps_no_other_queue_while_exhausted_messages_are_moved() {
    let database = database_with(&[]);
    let mut client = session(&database);
    create_slow(&mut client, "DELETE");
    send_many(&mut client, "slow", SLOW);
    exhaust(&mut client, "slow", SLOW);
    wait_honest_moved(&mut client, &database);
    assert!(rows(&mut client, "slow") > SLOW / 2, "it did not wait for them");
    client.batch_execute("DROP TRIGGER slow ON queue.slow").unwrap();
    wait_until("all are moved", || rows(&mut client, "slow") == 0);
}

#[test]
fn slow_trigger_keeps_no_other_queue_while_messages_expire() {
    let database = database_with(&[]);
    let mut client = session(&database);
    create_slow(&mut client, "DELETE");
    let sent = format!("SELECT queue_send('slow', '1', ttl => '1 ms') FROM generate_series(1, {SLOW})");
    client.batch_execute(&sent).unwrap();
    wait_honest_moved(&mut client, &database);
    assert!(rows(&mut client, "slow") > SLOW / 2, "it did not wait for them");
    client.batch_execute("DROP TRIGGER slow ON queue.slow").unwrap();
    wait_until("all are gone", || rows(&mut client, "slow") == 0);
}

#[test]
fn slow_trigger_keeps_no_other_queue_while_schedules_fire() {
    let database = database_with(&[]);
    let mut client = session(&database);
    create_slow(&mut client, "INSERT");
    // All are due when the worker looks.
    set_worker(&database, false);
    wait_no_worker(&database);
    let schedules =
        format!("SELECT queue_schedule('slow', 's' || i, '1 s', '1') FROM generate_series(1, {SLOW}) i");
    client.batch_execute(&schedules).unwrap();
    wait_until("all are due", || {
        let sql = "SELECT count(*) FROM queue_schedules() WHERE next_at < clock_timestamp()";
        client.query_one(sql, &[]).unwrap().get::<_, i64>(0) == SLOW
    });
    set_worker(&database, true);
    wait_honest_moved(&mut client, &database);
    assert!(rows(&mut client, "slow") < SLOW / 2, "it did not wait for them");
    client.batch_execute("DROP TRIGGER slow ON queue.slow").unwrap();
    wait_until("all have fired", || rows(&mut client, "slow") >= SLOW);
}

#[test]
fn moves_do_not_wait_for_a_transaction_at_another_message() {
    let database = database_with(&[]);
    let (mut client, mut consumer) = (session(&database), session(&database));
    with_dead_letters(&mut client, 1);
    send_many(&mut client, "q", 4);
    consumer.batch_execute("BEGIN").unwrap();
    let held = read_one(&mut consumer, "q");
    assert!(delete(&mut consumer, "q", &held));
    let failed = read_one(&mut client, "q");
    assert_eq!(retry(&mut client, "q", &failed, None), "dead_lettered");
    let rejected = client.query_one("SELECT queue_reject('q', 3)", &[]).unwrap();
    assert_eq!(rejected.get::<_, &str>(0), "dead_lettered");
    exhaust(&mut client, "q", 1);
    wait_until("the worker has moved the last", || numbers(&mut client, "queue.dead") == [2, 3, 4]);
    consumer.batch_execute("ROLLBACK").unwrap();
    wait_until("that read was the last delivery", || numbers(&mut client, "queue.dead") == [1, 2, 3, 4]);
}

// ---- What a dead letter says of itself ----------------------------------------------------------------------

#[test]
fn dead_letter_tells_of_its_failure_whatever_way_it_was_exhausted() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    with_dead_letters(&mut client, 2);

    // By retry.
    let by_retry = send(&mut client, "q", 1);
    let first = read_one(&mut client, "q");
    assert_eq!(retry(&mut client, "q", &first, Some("0")), "retried");
    let last = read_one(&mut client, "q");
    assert_eq!(retry(&mut client, "q", &last, None), "dead_lettered");
    let mut expected = vec![letter(by_retry, Some("failed"), 2)];
    assert_eq!(letters(&mut client), expected);

    // By leases that ended.
    let by_lease = send(&mut client, "q", 2);
    for count in 1..=2 {
        assert_eq!(read_one(&mut client, "q").count, count);
        advance_clock(&mut client, "1 minute");
    }
    expected.push(letter(by_lease, None, 2));
    wait_until("the worker has moved it", || rows(&mut client, "dead") == 2);
    assert_eq!(letters(&mut client), expected);

    // By reads that rolled back: the second in a row would wait for the backoff, but it was the last.
    let by_rollback = send(&mut client, "q", 3);
    for count in 1..=2 {
        client.batch_execute("BEGIN").unwrap();
        assert_eq!(read_one(&mut client, "q").count, count);
        client.batch_execute("ROLLBACK").unwrap();
    }
    expected.push(letter(by_rollback, None, 2));
    wait_until("the worker has moved it", || rows(&mut client, "dead") == 3);
    assert_eq!(letters(&mut client), expected);

    // By both, the error being that of the retry before.
    let by_both = send(&mut client, "q", 4);
    let first = read_one(&mut client, "q");
    assert_eq!(retry(&mut client, "q", &first, Some("0")), "retried");
    read_one(&mut client, "q");
    advance_clock(&mut client, "1 minute");
    expected.push(letter(by_both, Some("failed"), 2));
    wait_until("the worker has moved it", || rows(&mut client, "dead") == 4);
    assert_eq!(letters(&mut client), expected);
    assert_eq!(rows(&mut client, "q"), 0);
}

#[test]
fn second_read_in_a_row_that_rolled_back_waits_for_the_backoff() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    with_dead_letters(&mut client, 9);
    client.batch_execute("SELECT queue_alter('q', retry_delay => '10 minutes')").unwrap();
    let msg_id = send(&mut client, "q", 1);
    for count in 1..=2 {
        client.batch_execute("BEGIN").unwrap();
        assert_eq!(read_one(&mut client, "q").count, count, "the first time it comes back at once");
        client.batch_execute("ROLLBACK").unwrap();
    }
    assert_eq!(state(&mut client, "q", msg_id).as_deref(), Some("delayed"));
    advance_clock(&mut client, "9 min");
    assert!(read(&mut client, "q", 1).is_empty());
    advance_clock(&mut client, "1 min");
    client.batch_execute("BEGIN").unwrap();
    let third = read_awaited(&mut client, "q");
    assert_eq!((third.msg_id, third.count), (msg_id, 3));
    client.batch_execute("ROLLBACK").unwrap();
    // The third time twice as long.
    advance_clock(&mut client, "19 min");
    assert!(read(&mut client, "q", 1).is_empty());
    advance_clock(&mut client, "1 min");
    assert_eq!(read_awaited(&mut client, "q").count, 4);
}

#[test]
fn last_error_is_kept_through_retries_and_leases_that_end() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    with_dead_letters(&mut client, 9);
    let msg_id = send(&mut client, "q", 1);
    let mut seen = Vec::new();
    for error in [Some("one"), None, Some("two"), None] {
        seen.push(read_one(&mut client, "q").last_error);
        let sql = "SELECT outcome FROM queue_retry('q', $1, error => $2, delay => '0')";
        let outcome: String = client.query_one(sql, &[&msg_id, &error]).unwrap().get(0);
        assert_eq!(outcome, "retried");
    }
    seen.push(read_one(&mut client, "q").last_error);
    advance_clock(&mut client, "1 minute");
    seen.push(read_one(&mut client, "q").last_error);
    let seen: Vec<_> = seen.iter().map(Option::as_deref).collect();
    assert_eq!(seen, [None, Some("one"), Some("one"), Some("two"), Some("two"), Some("two")]);
}

// ---- Dead letters come back ---------------------------------------------------------------------------------

#[test]
fn redriven_message_wakes_a_reader_and_can_fail_again() {
    let database = database_with(&[]);
    let mut client = session(&database);
    with_dead_letters(&mut client, 1);
    let sent = client.query_one("SELECT queue_send('q', '7', '[1]')", &[]).unwrap().get::<_, i64>(0);
    for round in 0..3 {
        let got = read_one(&mut client, "q");
        assert_eq!((got.count, got.last_error.as_deref()), (1, None));
        assert_eq!(retry(&mut client, "q", &got, None), "dead_lettered");
        assert_eq!(letters(&mut client)[0]["msg_id"], sent + round);
        let reading = reader_asleep(&database, "q");
        assert_eq!(redrive(&mut client, None), 1);
        let (mut reader, got) = joined(reading);
        assert_eq!(got[0].message, 7);
        assert!(release(&mut reader, "q", &got[0]));
    }
    let headers: Value = client.query_one("SELECT headers FROM queue.q", &[]).unwrap().get(0);
    assert_eq!(headers, json!([1]));
}

#[test]
fn redrive_rolled_back_leaves_everything_as_it_was() {
    let database = database_with(&[]);
    let (mut client, mut other) = (session(&database), session(&database));
    with_dead_letters(&mut client, 9);
    bury(&mut client, 5);
    for end in ["ROLLBACK", "ROLLBACK TO a; COMMIT"] {
        client.batch_execute("BEGIN; SAVEPOINT a").unwrap();
        assert_eq!(redrive(&mut client, None), 5);
        assert!(read(&mut other, "q", 9).is_empty(), "not yet");
        assert!(read(&mut other, "dead", 9).is_empty(), "and no longer");
        client.batch_execute(end).unwrap();
        assert!(read(&mut other, "q", 9).is_empty(), "{end}");
        assert_eq!((rows(&mut other, "q"), rows(&mut other, "dead")), (0, 5), "{end}");
    }
    let held = read(&mut other, "dead", 2);
    assert_eq!(ids(&held), [1, 2], "deliverable");
    assert_eq!(redrive(&mut client, None), 3);
    assert!(delete(&mut other, "dead", &held[0]));
    assert!(release(&mut other, "dead", &held[1]));
    assert_eq!(redrive(&mut client, None), 1);
    assert_eq!(numbers(&mut client, "queue.q"), [2, 3, 4, 5]);
    assert_eq!(drain(&mut client, "q").len(), 4);
}

#[test]
fn redrives_at_the_same_time_do_not_move_the_same_message() {
    let database = database_with(&[]);
    let (mut client, mut other) = (session(&database), session(&database));
    with_dead_letters(&mut client, 9);
    bury(&mut client, 10);
    other.batch_execute("BEGIN").unwrap();
    assert_eq!(redrive(&mut other, Some(4)), 4);
    assert_eq!(redrive(&mut client, Some(3)), 3, "those behind them, without waiting");
    other.batch_execute("COMMIT").unwrap();
    assert_eq!(redrive(&mut client, None), 3);
    assert_eq!(numbers(&mut client, "queue.q"), (1..=10).collect::<Vec<_>>());
    // Both have chosen the same ones, and one of them is the first to pin.
    drain(&mut client, "q");
    bury(&mut client, 10);
    let mut hold = Hold::backend(&database, "redrive-pinned", other.pid());
    let first = other.run("SELECT queue_redrive('dead')").unwrap();
    hold.wait_reached();
    assert_eq!(redrive(&mut client, None), 0);
    hold.release();
    let (_, moved) = first.join().unwrap();
    assert_eq!(moved.unwrap()[0].get::<_, i64>(0), 10);
    assert_eq!(numbers(&mut client, "queue.q"), (1..=10).collect::<Vec<_>>());
}

#[test]
fn redrive_beside_consumers_of_the_dead_letter_queue_doubles_and_loses_nothing() {
    const COUNT: i64 = 600;
    let database = database_with(&[]);
    let mut client = session(&database);
    with_dead_letters(&mut client, 9);
    bury(&mut client, COUNT);
    // Once one side has done a quarter, it waits until the other has begun.
    const SHARE: i64 = COUNT / 4;
    static CONSUMED: AtomicI64 = AtomicI64::new(0);
    static MOVED: AtomicI64 = AtomicI64::new(0);
    let let_begin = |mine: &AtomicI64, others: &AtomicI64| {
        let is_met = || mine.load(SeqCst) < SHARE || others.load(SeqCst) > 0;
        wait_until("the others are at it", is_met);
    };
    let consume = move |client: &mut Client| {
        let mut done = Vec::new();
        for round in 0.. {
            let_begin(&CONSUMED, &MOVED);
            client.batch_execute("BEGIN").unwrap();
            let got = read(client, "dead", 3);
            for one in &got {
                delete_strictly(client, "dead", one).unwrap();
            }
            // Every now and then the work fails; where nothing is to be had, others may be about to give up theirs.
            let fails = round % 4 == 3;
            client.batch_execute(if fails { "ROLLBACK" } else { "COMMIT" }).unwrap();
            if !fails {
                done.extend(got.iter().map(|one| one.message.as_i64().unwrap()));
                CONSUMED.fetch_add(got.len() as i64, SeqCst);
            }
            if got.is_empty() && rows(client, "dead") == 0 {
                break;
            }
        }
        done
    };
    let drive = move |client: &mut Client| {
        let mut moved = 0;
        for round in 0.. {
            let_begin(&MOVED, &CONSUMED);
            client.batch_execute("BEGIN").unwrap();
            let more = redrive(client, Some(7));
            let fails = round % 3 == 2;
            client.batch_execute(if fails { "ROLLBACK" } else { "COMMIT" }).unwrap();
            if !fails {
                moved += more;
                MOVED.fetch_add(more, SeqCst);
            }
            if more == 0 && rows(client, "dead") == 0 {
                break;
            }
        }
        moved
    };
    let consumers: Vec<_> = (0..3).map(|_| session(&database).run_with(consume).unwrap()).collect();
    let drivers: Vec<_> = (0..2).map(|_| session(&database).run_with(drive).unwrap()).collect();
    let moved: i64 = drivers.into_iter().map(|driver| driver.join().unwrap().1).sum();
    let mut all: Vec<i64> = consumers.into_iter().flat_map(|consumer| consumer.join().unwrap().1).collect();
    let back = numbers(&mut client, "queue.q");
    assert_eq!(moved, back.len() as i64, "it says how many");
    assert!(!back.is_empty() && !all.is_empty(), "they were at it together: {} and {}", back.len(), all.len());
    all.extend(back);
    assert_eq!(sorted(all), (1..=COUNT).collect::<Vec<_>>());
    assert_eq!(drain(&mut client, "q").len() as i64, moved);
}

#[test]
fn redrive_waits_for_nobody() {
    let database = database_with(&[]);
    let (mut client, mut consumer, mut locker) = (session(&database), session(&database), session(&database));
    with_dead_letters(&mut client, 9);
    for trigger in
        ["", "CREATE TRIGGER plain BEFORE DELETE ON queue.dead FOR EACH ROW EXECUTE FUNCTION plain()"]
    {
        client
            .batch_execute(
                "CREATE OR REPLACE FUNCTION plain() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END'",
            )
            .unwrap();
        client.batch_execute(trigger).unwrap(); // the other way of deleting
        bury(&mut client, 5);
        consumer.batch_execute("BEGIN").unwrap();
        let held = read_one(&mut consumer, "dead");
        assert!(delete(&mut consumer, "dead", &held));
        locker
            .batch_execute(
                "BEGIN; SELECT FROM queue.dead WHERE message = '2' FOR UPDATE;
                 UPDATE queue.dead SET visible_at = NULL WHERE message = '3'",
            )
            .unwrap();
        client.batch_execute("SET statement_timeout = '20 s'").unwrap();
        assert_eq!(redrive(&mut client, None), 2);
        assert_eq!(numbers(&mut client, "queue.q"), [4, 5]);
        locker.batch_execute("COMMIT").unwrap();
        assert_eq!(redrive(&mut client, None), 2);
        consumer.batch_execute("ROLLBACK").unwrap();
        assert_eq!(redrive(&mut client, None), 1);
        assert_eq!(numbers(&mut client, "queue.q"), [1, 2, 3, 4, 5]);
        assert_eq!(rows(&mut client, "dead"), 0);
        assert_eq!(drain(&mut client, "q").len(), 5);
    }
}

#[test]
fn redrive_goes_by_the_row_as_it_is_when_it_is_moved() {
    let database = database_with(&["elsewhere"]);
    let (mut client, other) = (session(&database), session(&database));
    with_dead_letters(&mut client, 9);
    bury(&mut client, 3);
    let mut hold = Hold::backend(&database, "redrive-pinned", other.pid());
    let redriving = other.run("SELECT queue_redrive('dead')").unwrap();
    hold.wait_reached();
    client
        .batch_execute(
            "UPDATE queue.dead SET headers = NULL WHERE message = '1';
             UPDATE queue.dead SET headers = jsonb_set(headers, '{dead_letter,queue}', '\"elsewhere\"'),
                                   message = '20' WHERE message = '2';
             DELETE FROM queue.dead WHERE message = '3'",
        )
        .unwrap();
    hold.release();
    let (_, moved) = redriving.join().unwrap();
    assert_eq!(moved.unwrap()[0].get::<_, i64>(0), 1);
    assert_eq!(numbers(&mut client, "queue.dead"), [1]);
    assert_eq!(numbers(&mut client, "queue.elsewhere"), [20]);
    assert_eq!(rows(&mut client, "q"), 0);
    assert_eq!(drain(&mut client, "dead").len(), 1, "it is delivered there");
    assert_eq!(drain(&mut client, "elsewhere").len(), 1);
}

#[test]
fn redrive_of_what_its_own_transaction_has_done_is_sensible() {
    let database = database_with(&[]);
    let mut client = session(&database);
    with_dead_letters(&mut client, 9);
    bury(&mut client, 3);
    client.batch_execute("BEGIN").unwrap();
    let leased = read_one(&mut client, "dead");
    let finished = read_one(&mut client, "dead");
    assert!(delete(&mut client, "dead", &finished));
    bury(&mut client, 1); // a fourth, which nobody else has heard of
    assert_eq!(redrive(&mut client, None), 2);
    client.batch_execute("COMMIT").unwrap();
    assert_eq!(rows(&mut client, "dead"), 1);
    assert!(delete(&mut client, "dead", &leased));
    assert_eq!(numbers(&mut client, "queue.q"), [1, 3]);
    assert_eq!(drain(&mut client, "q").len(), 2);
}

#[test]
fn redrive_in_repeatable_read_takes_what_is_there() {
    let database = database_with(&[]);
    let (mut client, mut other) = (session(&database), session(&database));
    with_dead_letters(&mut client, 9);
    bury(&mut client, 2);
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").unwrap();
    bury(&mut other, 1);
    assert_eq!(redrive(&mut client, None), 3);
    client.batch_execute("COMMIT").unwrap();
    assert_eq!(drain(&mut client, "q").len(), 3);
}

#[test]
fn redrive_of_many_can_be_cancelled_and_takes_them_all() {
    const COUNT: i64 = 5_000;
    let database = database_with(&[]);
    let (mut client, other) = (session(&database), session(&database));
    with_dead_letters(&mut client, 9);
    client
        .batch_execute(&format!(
            "INSERT INTO queue.dead (message, headers)
             SELECT to_jsonb(n), '{{\"dead_letter\": {{\"queue\": \"q\"}}}}' FROM generate_series(1, {COUNT}) n"
        ))
        .unwrap();
    let mut hold = Hold::backend(&database, "redrive-pinned", other.pid());
    let redriving = other.run("SELECT queue_redrive('dead')").unwrap();
    hold.wait_reached();
    client.execute("SELECT pg_cancel_backend($1)", &[&redriving.pid()]).unwrap();
    hold.release();
    let (mut other, cancelled): (Session, _) = redriving.join().unwrap();
    assert_eq!(code(cancelled), "57014");
    assert_eq!((rows(&mut client, "q"), rows(&mut client, "dead")), (0, COUNT));
    assert_eq!(redrive(&mut other, None), COUNT);
    assert_eq!(drain(&mut client, "q").len() as i64, COUNT);
}

// ---- Archived messages come back ----------------------------------------------------------------------------

#[test]
fn unarchive_waits_for_nobody_and_takes_nothing_twice() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    let sent = send_many(&mut client, "q", 10);
    client.query("SELECT queue_archive_batch('q', $1)", &[&sent]).unwrap();
    other.batch_execute("BEGIN").unwrap();
    assert_eq!(unarchive(&mut other, Some(4)), 4);
    client.batch_execute("SET statement_timeout = '20 s'").unwrap();
    assert_eq!(unarchive(&mut client, Some(3)), 3);
    other.batch_execute("ROLLBACK").unwrap();
    assert_eq!(numbers(&mut client, "queue.q"), [5, 6, 7]);
    assert_eq!(unarchive(&mut client, None), 7);
    assert_eq!(numbers(&mut client, "queue.q"), (1..=10).collect::<Vec<_>>());
    assert_eq!(drain(&mut client, "q").len(), 10);
}

#[test]
fn unarchived_message_wakes_a_reader() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let msg_id = send(&mut client, "q", 7);
    client.execute("SELECT queue_archive('q', $1)", &[&msg_id]).unwrap();
    let reading = reader_asleep(&database, "q");
    assert_eq!(unarchive(&mut client, None), 1);
    let (_, got) = joined(reading);
    assert_eq!((got[0].message.as_i64(), got[0].count), (Some(7), 1));
}
