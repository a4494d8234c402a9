//! Time: delays, messages that expire, archives that are trimmed, waiting without reading, notifications to those who
//! LISTEN, clocks that jump, and life without a worker.
//!
//! Tests that move the clock have a cluster of their own, and send what plain SQL stamps (`clock_timestamp()`, which
//! they cannot move) before they do.

mod common;

use std::time::{Duration, Instant};

use common::*;
use postgres::fallible_iterator::FallibleIterator;
use postgres::{Client, Error};
use queue_tests::wait_points::{advance_clock, set_wall_clock};
use queue_tests::{wait_until, Cluster, ClusterOptions, Database, Running, StopMode};

fn value<T: for<'a> postgres::types::FromSql<'a>>(client: &mut Client, sql: &str) -> T {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

// ---- Delays ---------------------------------------------------------------------------------------------------

#[test]
fn delayed_message_is_never_early_and_soon_there() {
    let database = database_with(&["q"]);
    let mut sender = session(&database);
    let mut late_ms = Vec::new();
    for round in 0..12 {
        let reading = reader_asleep(&database, "q");
        let sql = if round % 2 == 0 {
            "SELECT queue_send('q', '1', delay => '150 ms'), clock_timestamp() + '150 ms'"
        } else {
            "WITH t AS MATERIALIZED (SELECT clock_timestamp() + '150 ms' AS at)
             SELECT queue_send('q', '1', deliver_at => at) FROM t"
        };
        let begun = Instant::now();
        sender.query_one(sql, &[]).unwrap();
        let (mut reader, got) = joined(reading);
        let late: f64 = value(
            &mut reader,
            "SELECT extract(epoch FROM clock_timestamp() - visible_at)::float8 * 1000 FROM queue.q",
        );
        assert!(late >= 0.0, "{late} ms early");
        assert!(begun.elapsed() >= Duration::from_millis(140), "{:?}", begun.elapsed());
        late_ms.push(late);
        assert!(delete(&mut reader, "q", &got[0]));
    }
    late_ms.sort_by(f64::total_cmp);
    println!("delayed messages came late by, in ms: {late_ms:.1?}");
    // 50 ms on an idle machine; this one may be kept by others most of the time.
    assert!(late_ms[2] < 250.0, "{late_ms:?}");
}

#[test]
fn delayed_messages_take_no_slots_and_come_when_they_are_due() {
    const LATER: i64 = 100_000;
    let cluster = ClusterOptions::default()
        .set("pg_queue.max_messages", "4096")
        .set("pg_queue.max_queues", "8")
        .set("pg_queue.ready_window", "512")
        .start()
        .unwrap();
    let database = database_on(&cluster, &["later", "now", "q"]);
    let mut client = session(&database);
    let sql = "SELECT count(*) FROM queue_send_batch('later', array(SELECT to_jsonb(n) \
               FROM generate_series(1, 100000) n), delay => '1 day')";
    assert_eq!(value::<i64>(&mut client, sql), LATER);
    send_many(&mut client, "now", 5_000);
    let (mut leased, mut empty) = (0, 0);
    while empty < 2 {
        match read_for(&mut client, "now", 500, "9 days").len() {
            0 => {
                empty += 1;
                std::thread::sleep(Duration::from_millis(100));
            }
            n => (leased, empty) = (leased + n, 0),
        }
    }
    assert!(leased > 2_000, "{leased} messages of another queue have room");
    assert_eq!(state(&mut client, "later", 1).as_deref(), Some("delayed"));
    // Long delays and times.
    let day = send_delayed(&mut client, "q", "1 day");
    let at = value::<i64>(&mut client, "SELECT queue_send('q', '1', deliver_at => clock_timestamp() + '36 h')");
    advance_clock(&mut client, "23:58");
    assert!(read(&mut client, "q", 9).is_empty() && read(&mut client, "later", 9).is_empty());
    advance_clock(&mut client, "2 min");
    assert_eq!(ids(&[read_awaited(&mut client, "q")]), [day]);
    let mut got = Vec::new();
    wait_until("all hundred thousand came", || {
        got.extend(drain(&mut client, "later"));
        got.len() as i64 >= LATER
    });
    got.sort_unstable();
    assert!(got.windows(2).all(|pair| pair[0] < pair[1]), "each once");
    assert_eq!((got.len() as i64, rows(&mut client, "later")), (LATER, 0));
    assert!(read(&mut client, "q", 9).iter().all(|one| one.msg_id == day));
    advance_clock(&mut client, "12 h");
    let mut due = ids(&[read_awaited(&mut client, "q")]);
    due.extend(ids(&read(&mut client, "q", 9)));
    assert!(due.contains(&at), "{due:?}");
}

#[test]
fn wall_clock_that_jumps_moves_delays_by_no_more_than_the_jump() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    let forth = send_delayed(&mut client, "q", "3 h");
    set_wall_clock(&mut client, "1 h");
    assert!(read(&mut client, "q", 1).is_empty());
    advance_clock(&mut client, "119 min");
    assert!(read(&mut client, "q", 1).is_empty(), "an hour early at most");
    advance_clock(&mut client, "61 min");
    let got = read_awaited(&mut client, "q");
    assert_eq!(got.msg_id, forth);
    assert!(delete(&mut client, "q", &got));
    let back = send_delayed(&mut client, "q", "30 min");
    set_wall_clock(&mut client, "-1 h");
    advance_clock(&mut client, "29 min");
    assert!(read(&mut client, "q", 1).is_empty(), "never early");
    advance_clock(&mut client, "62 min");
    assert_eq!(read_awaited(&mut client, "q").msg_id, back, "an hour late at most");
}

// ---- Expiry ---------------------------------------------------------------------------------------------------

fn create_mortal(client: &mut Client, queue: &str, ttl: &str, dead: &str) {
    let sql = "SELECT queue_create($1, message_ttl => $2::text::interval, dead_letter_queue => $3)";
    client.query_one(sql, &[&queue, &ttl, &dead]).unwrap();
}

fn send_with(client: &mut Client, queue: &str, options: &str) -> i64 {
    client.query_one(&format!("SELECT queue_send($1, '1', {options})"), &[&queue]).unwrap().get(0)
}

fn holds(client: &mut Client, queue: &str, ids: &[i64]) -> bool {
    let sql = format!("SELECT msg_id FROM queue.{queue} ORDER BY 1");
    client.query(&sql, &[]).unwrap().iter().map(|row| row.get::<_, i64>(0)).eq(ids.iter().copied())
}

#[track_caller]
fn wait_rows(client: &mut Client, queue: &str, ids: &[i64]) {
    wait_until(&format!("{queue} holds exactly {ids:?}"), || holds(client, queue, ids));
}

/// Returns when the worker sleeps. What woke it before has been looked at only if something shows that it did.
#[track_caller]
fn wait_worker_asleep(database: &Database) {
    database.wait_until_backend_waits(worker_pid(database), "Extension", None);
}

/// On a cluster of the test's own.
#[track_caller]
fn assert_nobody_waits_for_a_lock(client: &mut Client) {
    assert_eq!(value::<i64>(client, "SELECT count(*) FROM pg_locks WHERE NOT granted"), 0);
}

#[test]
fn expired_messages_go_to_the_dead_letter_queue_or_away() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["dead"]);
    let mut client = session(&database);
    create_mortal(&mut client, "q", "1 h", "dead");
    create_mortal(&mut client, "away", "0", "");
    create_mortal(&mut client, "plain", "1 h", "");
    create_mortal(&mut client, "probe", "58 min", "");
    // As plain SQL sends them, on the real clock.
    client.batch_execute("INSERT INTO queue.plain (message) VALUES ('1')").unwrap();
    let mut copy = client.copy_in("COPY queue.plain (message) FROM STDIN").unwrap();
    std::io::Write::write_all(&mut copy, b"2\n").unwrap();
    copy.finish().unwrap();
    assert!(value::<bool>(
        &mut client,
        "SELECT bool_and(expires_at BETWEEN now() + '59 min' AND now() + '61 min') AND count(*) = 2 FROM queue.plain"
    ));
    let ordinary = send(&mut client, "q", 7);
    let forever = send_with(&mut client, "q", "ttl => '0'");
    let longer = send_with(&mut client, "q", "ttl => '10 h'");
    let delayed = send_with(&mut client, "q", "delay => '2 h'"); // so until three hours from now
    let short = send_with(&mut client, "away", "ttl => '1 h'");
    let kept = send_with(&mut client, "away", "ttl => null");
    client.batch_execute("SELECT queue_alter('plain', message_ttl => '5 h')").unwrap();
    client.batch_execute("INSERT INTO queue.plain (message) VALUES ('3')").unwrap();
    send(&mut client, "probe", 1);
    advance_clock(&mut client, "59 min");
    wait_rows(&mut client, "probe", &[]);
    wait_worker_asleep(&database);
    assert_eq!(read_for(&mut client, "q", 1, "1 s")[0].msg_id, ordinary);
    assert_eq!((rows(&mut client, "away"), rows(&mut client, "plain")), (2, 3));
    advance_clock(&mut client, "2 min");
    wait_rows(&mut client, "q", &[forever, longer, delayed]);
    wait_rows(&mut client, "away", &[kept]);
    wait_rows(&mut client, "plain", &[3]);
    assert_ne!(short, kept);
    let dead = read_awaited(&mut client, "dead");
    assert_eq!(dead.message, 7);
    let header: serde_json::Value = value(&mut client, "SELECT headers -> 'dead_letter' FROM queue.dead");
    assert_eq!((&header["reason"], &header["queue"]), (&"expired".into(), &"q".into()), "{header}");
    assert_eq!((&header["msg_id"], &header["delivery_count"]), (&ordinary.into(), &1.into()), "{header}");
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM queue_archive.away"), 0);
    // The delayed one became visible and lives for an hour from then.
    advance_clock(&mut client, "1 h");
    assert_eq!(state(&mut client, "q", delayed).as_deref(), Some("ready"));
    advance_clock(&mut client, "1 h");
    wait_rows(&mut client, "q", &[forever, longer]);
    advance_clock(&mut client, "8 h");
    wait_rows(&mut client, "q", &[forever]);
    wait_rows(&mut client, "plain", &[]);
    assert_eq!(ids(&read(&mut client, "q", 9)), [forever]);
}

#[test]
fn expired_message_is_never_delivered_even_without_a_worker() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    worker_pid(&database);
    set_worker(&database, false);
    let expired = send_with(&mut client, "q", "ttl => '1 min'");
    let alive = send_with(&mut client, "q", "ttl => '1 day'");
    advance_clock(&mut client, "61 s");
    assert_eq!(ids(&read_for(&mut client, "q", 9, "1 day")), [alive]);
    assert!(client.query("SELECT * FROM queue_pop('q', 9)", &[]).unwrap().is_empty());
    client.batch_execute("BEGIN").unwrap();
    let own = send_with(&mut client, "q", "ttl => '1 min'");
    advance_clock(&mut client, "61 s");
    assert!(read(&mut client, "q", 9).is_empty(), "nor to the transaction that sent it");
    client.batch_execute("COMMIT").unwrap();
    assert!(read(&mut client, "q", 9).is_empty());
    assert_eq!(rows(&mut client, "q"), 3);
    set_worker(&database, true);
    wait_rows(&mut client, "q", &[alive]);
    assert!(expired < alive && alive < own);
}

#[test]
fn leased_message_expires_after_its_lease_and_may_be_finished_until_then() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["dead"]);
    let mut client = session(&database);
    create_mortal(&mut client, "q", "10 min", "dead");
    send_many(&mut client, "q", 4);
    let got = read_for(&mut client, "q", 2, "1 h");
    // One whose row another transaction holds, in the way of nobody.
    let mut holder = session(&database);
    holder.batch_execute("BEGIN; SELECT * FROM queue.q WHERE msg_id = 3 FOR UPDATE").unwrap();
    advance_clock(&mut client, "11 min");
    wait_until("the last one is gone", || {
        assert_nobody_waits_for_a_lock(&mut client);
        holds(&mut client, "q", &[1, 2, 3])
    });
    assert!(delete(&mut client, "q", &got[0]));
    wait_rows(&mut client, "q", &[2, 3]);
    holder.batch_execute("ROLLBACK").unwrap();
    advance_clock(&mut client, "2 s"); // it looks again
    wait_rows(&mut client, "q", &[2]);
    assert_eq!(state(&mut client, "q", 2).as_deref(), Some("leased"));
    advance_clock(&mut client, "50 min");
    wait_rows(&mut client, "q", &[]);
    assert!(!delete(&mut client, "q", &got[1]));
    assert_eq!(rows(&mut client, "dead"), 3);
    assert!(!cluster.log().contains("lock timeout"));
}

#[test]
fn message_expires_after_a_restart_though_nobody_uses_its_queue() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["dead"]);
    let mut client = session(&database);
    create_mortal(&mut client, "q", "1 h", "dead");
    send_many(&mut client, "q", 3);
    cluster.restart(StopMode::Fast).unwrap();
    let mut client = session(&database);
    worker_pid(&database);
    assert_eq!(rows(&mut client, "q"), 3);
    advance_clock(&mut client, "61 min");
    wait_rows(&mut client, "q", &[]);
    wait_rows(&mut client, "dead", &[1, 2, 3]);
}

#[test]
fn message_expires_though_its_table_was_locked_when_the_worker_looked() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["dead"]);
    let mut client = session(&database);
    create_mortal(&mut client, "q", "1 h", "dead");
    send(&mut client, "q", 1);
    set_worker(&database, false);
    cluster.restart(StopMode::Fast).unwrap();
    let (mut client, mut locker) = (session(&database), session(&database));
    locker.batch_execute("BEGIN; LOCK TABLE queue.q").unwrap();
    set_worker(&database, true);
    database.wait_until_backend_waits(worker_pid(&database), "Extension", None);
    locker.batch_execute("COMMIT").unwrap();
    advance_clock(&mut client, "61 min");
    wait_rows(&mut client, "dead", &[1]);
}

#[test]
fn message_expires_on_the_real_clock() {
    let database = database_with(&["q", "dead"]);
    let mut client = session(&database);
    create_mortal(&mut client, "mortal", "200 ms", "dead");
    let begun = Instant::now();
    send(&mut client, "mortal", 5);
    assert_eq!(read_awaited(&mut client, "dead").message, 5);
    println!("expired after {} ms of 200", begun.elapsed().as_millis());
    assert!(begun.elapsed() >= Duration::from_millis(200));
}

#[test]
fn expired_messages_that_the_dead_letter_table_refuses_do_not_keep_the_others() {
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    create_mortal(&mut client, "q", "200 ms", "dead");
    client.batch_execute("ALTER TABLE queue.dead ADD CONSTRAINT large CHECK (message > '2')").unwrap();
    send_many(&mut client, "q", 40);
    wait_rows(&mut client, "q", &[1, 2]);
    // Nor those that expire later.
    send_many(&mut client, "q", 3);
    send(&mut client, "q", 9);
    wait_rows(&mut client, "q", &[1, 2, 41, 42]);
    client.batch_execute("ALTER TABLE queue.dead DROP CONSTRAINT large").unwrap();
    wait_rows(&mut client, "q", &[]);
    assert_eq!(rows(&mut client, "dead"), 44);
}

// ---- Archives -------------------------------------------------------------------------------------------------

#[test]
fn archive_is_trimmed_of_what_is_old_and_of_nothing_else() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["kept"]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_create('q', archive_retention => '1 day')").unwrap();
    for queue in ["q", "kept"] {
        send_many(&mut client, queue, 2_500);
        let sql = format!(
            "SELECT queue_archive_batch('{queue}', array(SELECT msg_id FROM queue_read('{queue}', 9999)))"
        );
        let mut archived = 0;
        wait_until("all are archived", || {
            archived += client.query(&sql, &[]).unwrap().len();
            archived == 2_500
        });
    }
    // Probes: once theirs is trimmed, and the worker sleeps, it has looked at all archives.
    for (queue, retention) in [("soon", "23 h"), ("late", "500 days")] {
        let create = format!("SELECT queue_create('{queue}', archive_retention => '{retention}')");
        client.batch_execute(&create).unwrap();
        send(&mut client, queue, 1);
        client.batch_execute(&format!("SELECT queue_archive('{queue}', 1)")).unwrap();
    }
    // The newest are half a day old when the others' time has come.
    client
        .batch_execute("UPDATE queue_archive.q SET archived_at = archived_at + '12 h' WHERE msg_id > 2400")
        .unwrap();
    let archived = |client: &mut Client, queue: &str| -> i64 {
        value(client, &format!("SELECT count(*) FROM queue_archive.{queue}"))
    };
    advance_clock(&mut client, "23:58:00");
    // Whatever wakes the worker, it is too early.
    send(&mut client, "kept", 1);
    wait_until("the worker has looked", || archived(&mut client, "soon") == 0);
    wait_worker_asleep(&database);
    assert_eq!(archived(&mut client, "q"), 2_500);
    // A row that somebody holds is left for later and keeps nothing else.
    let mut holder = session(&database);
    holder.batch_execute("BEGIN; SELECT * FROM queue_archive.q WHERE msg_id = 1 FOR UPDATE").unwrap();
    advance_clock(&mut client, "3 min"); // wakes by itself
    wait_until("all old ones but the locked one are gone", || {
        assert_nobody_waits_for_a_lock(&mut client);
        archived(&mut client, "q") == 101
    });
    holder.batch_execute("ROLLBACK").unwrap();
    advance_clock(&mut client, "2 s");
    wait_until("the locked one is gone", || archived(&mut client, "q") == 100);
    let deleting: i64 = value(&mut client, "SELECT count(DISTINCT xmin::text) FROM queue_archive.q");
    assert_eq!(deleting, 1, "the rest was not touched");
    advance_clock(&mut client, "12 h");
    wait_until("the rest is gone", || archived(&mut client, "q") == 0);
    advance_clock(&mut client, "1000 days");
    wait_until("the worker has looked", || archived(&mut client, "late") == 0);
    wait_worker_asleep(&database);
    assert_eq!(archived(&mut client, "kept"), 2_500, "no retention: for ever");
    // The setting can come later.
    client.batch_execute("SELECT queue_alter('kept', archive_retention => '10 days')").unwrap();
    wait_until("it is trimmed now", || archived(&mut client, "kept") == 0);
    assert!(!cluster.log().contains("lock timeout"));
}

#[test]
fn archive_that_cannot_be_trimmed_is_tried_less_and_less_often_and_keeps_no_other() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    for queue in ["q", "kept"] {
        let create = format!("SELECT queue_create('{queue}', archive_retention => '1 h', max_deliveries => 1)");
        client.batch_execute(&create).unwrap();
        send(&mut client, queue, 1);
        client.batch_execute(&format!("SELECT queue_archive('{queue}', 1)")).unwrap();
    }
    client
        .batch_execute(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''not this one''; END';
             CREATE TRIGGER fail BEFORE DELETE ON queue_archive.q FOR EACH ROW EXECUTE FUNCTION fail()",
        )
        .unwrap();
    let failed = || cluster.log().matches("trimming archives failed: not this one").count();
    advance_clock(&mut client, "2 h");
    wait_until("the other one is trimmed", || {
        value::<i64>(&mut client, "SELECT count(*) FROM queue_archive.kept") == 0
    });
    for count in 1..=6 {
        wait_until("it is tried again", || failed() >= count);
        advance_clock(&mut client, "40 s");
    }
    wait_until("it is tried again", || failed() >= 7); // then not for a minute
    let count = failed();
    for number in 1..=3 {
        // What a worker does when it is called, settings looked at anew, changes nothing in that.
        client.batch_execute(&format!("SELECT queue_create('new_{number}', max_deliveries => 1)")).unwrap();
        advance_clock(&mut client, "2 s");
        send(&mut client, "kept", number);
        exhaust(&mut client, "kept", 1);
        advance_clock(&mut client, "10 ms");
        wait_until("the worker has looked", || rows(&mut client, "kept") == 0);
    }
    assert_eq!(failed(), count);
    client.batch_execute("DROP TRIGGER fail ON queue_archive.q").unwrap();
    advance_clock(&mut client, "2 min");
    wait_until("it is trimmed", || {
        value::<i64>(&mut client, "SELECT count(*) FROM queue_archive.q WHERE msg_id = 1") == 0
    });
}

// ---- Waiting without reading ----------------------------------------------------------------------------------

type Waiting = Running<Result<Option<String>, Error>>;

fn try_wait(client: &mut Client, queues: &str, timeout: &str) -> Result<Option<String>, Error> {
    let rows = client.simple_query(&format!("CALL queue_wait(array[{queues}], '{timeout}')"))?;
    let row = rows.iter().find_map(|message| match message {
        postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).map(str::to_owned)),
        _ => None,
    });
    Ok(row.expect("CALL gives a row"))
}

/// Starts a wait of [`LONG`] and returns when it sleeps.
fn waiter_asleep(database: &Database, queues: &'static str) -> Waiting {
    let waiting = session(database).run_with(move |client| try_wait(client, queues, LONG)).unwrap();
    database.wait_until_backend_waits(waiting.pid(), "Extension", None);
    waiting
}

#[track_caller]
fn waited(waiting: Waiting) -> Option<String> {
    waiting.join().unwrap().1.unwrap_or_else(|error| panic!("the wait failed: {error:?}"))
}

#[test]
fn wait_returns_the_queue_that_became_ready() {
    let database = database_with(&["a", "b", "c"]);
    let mut client = session(&database);
    // A commit, a delay, a retry, a lease that ends.
    let waiting = waiter_asleep(&database, "'a', 'b', 'c'");
    client.batch_execute("BEGIN").unwrap();
    send(&mut client, "b", 1);
    database.wait_until_backend_waits(waiting.pid(), "Extension", None);
    assert!(!waiting.is_done());
    client.batch_execute("COMMIT").unwrap();
    assert_eq!(waited(waiting).as_deref(), Some("b"));
    let got = read_for(&mut client, "b", 1, "1 h"); // it had only waited
    let waiting = waiter_asleep(&database, "'a', 'b', 'c'");
    assert_eq!(retry(&mut client, "b", &got[0], Some("0")), "retried");
    assert_eq!(waited(waiting).as_deref(), Some("b"));
    let got = read_for(&mut client, "b", 1, "1 h");
    let waiting = waiter_asleep(&database, "'a', 'b', 'c'");
    assert!(extend(&mut client, "b", &got[0], "100 ms").is_some());
    assert_eq!(waited(waiting).as_deref(), Some("b"));
    assert_eq!(drain(&mut client, "b").len(), 1);
    let waiting = waiter_asleep(&database, "'a', 'b', 'c'");
    send_delayed(&mut client, "c", "100 ms");
    assert_eq!(waited(waiting).as_deref(), Some("c"));
    // What is ready already, the first of them; nothing.
    send(&mut client, "a", 1);
    assert_eq!(try_wait(&mut client, "'b', 'c', 'a'", "0").unwrap().as_deref(), Some("c"));
    assert_eq!(try_wait(&mut client, "'b', 'a', 'c'", LONG).unwrap().as_deref(), Some("a"));
    let begun = Instant::now();
    assert_eq!(try_wait(&mut client, "'b'", "300 ms").unwrap(), None);
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
}

#[test]
fn wait_wakes_for_long_delays_and_leases() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["a", "b"]);
    let mut client = session(&database);
    send(&mut client, "a", 1);
    read_for(&mut client, "a", 1, "1 h");
    send_delayed(&mut client, "b", "2 h");
    let waiting = || {
        let waiting = session(&database)
            .run_with(|client| {
                client.batch_execute("SET pg_queue.wait_max = '1 d'").unwrap();
                try_wait(client, "'b', 'a'", "12 h")
            })
            .unwrap();
        database.wait_until_backend_waits(waiting.pid(), "Extension", None);
        waiting
    };
    let first = waiting();
    advance_clock(&mut client, "59 min");
    database.wait_until_backend_waits(first.pid(), "Extension", None);
    assert!(!first.is_done());
    advance_clock(&mut client, "2 min");
    assert_eq!(waited(first).as_deref(), Some("a"));
    assert_eq!(drain(&mut client, "a").len(), 1);
    let second = waiting();
    advance_clock(&mut client, "1 h");
    assert_eq!(waited(second).as_deref(), Some("b"));
}

/// Whether a backend keeps vacuum from its work.
fn holds_snapshot(client: &mut Client, pid: i32) -> bool {
    let sql = "SELECT backend_xmin IS NOT NULL FROM pg_stat_activity WHERE pid = $1";
    client.query_one(sql, &[&pid]).unwrap().get(0)
}

#[test]
fn wait_holds_no_snapshot_outside_a_transaction_block() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE TABLE seen (queue text);
             CREATE PROCEDURE around() LANGUAGE plpgsql AS $$
             DECLARE found text;
             BEGIN
                 INSERT INTO seen VALUES ('before'); COMMIT;
                 CALL queue_wait(array['q'], '25 s', found);
                 INSERT INTO seen VALUES (found); COMMIT;
             END $$",
        )
        .unwrap();
    for (call, is_bare) in [
        ("CALL queue_wait(array['q'], '25 s')", true),
        ("DO $$ DECLARE found text; BEGIN CALL queue_wait(array['q'], '25 s', found); END $$", true),
        ("CALL around()", true),
        // In a block it waits all the same.
        ("BEGIN; CALL queue_wait(array['q'], '25 s'); COMMIT", false),
        ("BEGIN ISOLATION LEVEL REPEATABLE READ; CALL queue_wait(array['q'], '25 s'); COMMIT", false),
    ] {
        let waiting = session(&database).run_with(move |client| client.batch_execute(call)).unwrap();
        database.wait_until_backend_waits(waiting.pid(), "Extension", None);
        if is_bare {
            // It may just have been woken, and look.
            wait_until(&format!("{call} holds no snapshot"), || !holds_snapshot(&mut client, waiting.pid()));
            database.wait_until_backend_waits(waiting.pid(), "Extension", None);
        }
        assert!(!waiting.is_done());
        send(&mut client, "q", 1);
        waiting.join().unwrap().1.unwrap_or_else(|error| panic!("{call}: {error:?}"));
        assert_eq!(drain(&mut client, "q").len(), 1, "{call}");
    }
    let seen: Vec<String> = value(&mut client, "SELECT array_agg(queue) FROM seen");
    assert_eq!(seen, ["before", "q"]);
    // With a reader that holds one, the same look says so.
    let reading = reader_asleep(&database, "q");
    assert!(holds_snapshot(&mut client, reading.pid()));
    send(&mut client, "q", 1);
    joined(reading);
}

#[test]
fn wait_commits_nothing() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE TABLE t (n int);
             CREATE PROCEDURE undo() LANGUAGE plpgsql AS $$
             DECLARE found text;
             BEGIN
                 INSERT INTO t VALUES (1);
                 CALL queue_wait(array['q'], '25 s', found);
                 INSERT INTO t VALUES (2);
                 ROLLBACK;
                 INSERT INTO t VALUES (3);
             END $$;
             CREATE PROCEDURE catching() LANGUAGE plpgsql AS $$
             DECLARE found text;
             BEGIN
                 BEGIN
                     INSERT INTO t VALUES (4);
                     CALL queue_wait(array['q'], '25 s', found);
                     RAISE division_by_zero;
                 EXCEPTION WHEN division_by_zero THEN INSERT INTO t VALUES (5);
                 END;
             END $$",
        )
        .unwrap();
    for call in ["CALL undo()", "CALL catching()"] {
        let waiting = session(&database).run_with(move |client| client.batch_execute(call)).unwrap();
        database.wait_until_backend_waits(waiting.pid(), "Extension", None);
        send(&mut client, "q", 1);
        waiting.join().unwrap().1.unwrap_or_else(|error| panic!("{call}: {error:?}"));
        assert_eq!(drain(&mut client, "q").len(), 1);
    }
    assert_eq!(value::<Vec<i32>>(&mut client, "SELECT array_agg(n ORDER BY n) FROM t"), [3, 5]);
}

#[test]
fn wait_is_cancelled_at_once_and_passes_its_wake_up_on() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let waiting = waiter_asleep(&database, "'q'");
    let begun = Instant::now();
    client.execute("SELECT pg_cancel_backend($1)", &[&waiting.pid()]).unwrap();
    let (mut cancelled, result) = waiting.join().unwrap();
    assert_eq!(code(result), "57014");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    // The same session ends in time before its statement's timeout, unless it is kept for the moment that lies between.
    cancelled.batch_execute("SET statement_timeout = '1 s'").unwrap();
    let ends_in_time = (0..5).any(|_| match try_wait(&mut cancelled, "'q'", LONG) {
        Ok(found) => {
            assert_eq!(found, None);
            true
        }
        Err(error) => {
            assert_eq!(code::<()>(Err(error)), "57014");
            false
        }
    });
    assert!(ends_in_time);
    // It is woken first; who waits behind it, to read, gets the message.
    for _ in 0..5 {
        let waiting = waiter_asleep(&database, "'q'");
        let reading = reader_asleep(&database, "q");
        let msg_id = send(&mut client, "q", 1);
        assert_eq!(waited(waiting).as_deref(), Some("q"));
        let (mut reader, got) = joined(reading);
        assert_eq!(ids(&got), [msg_id]);
        assert!(delete(&mut reader, "q", &got[0]));
    }
}

#[test]
fn sleeper_woken_for_the_servers_own_reasons_keeps_its_place() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    for is_first in [true, false] {
        let [first, second] = [(); 2].map(|()| reader_asleep(&database, "q"));
        // Whichever of the two is disturbed, the first stays first.
        let disturbed = if is_first { &first } else { &second };
        let from = cluster.log().len();
        client.execute("SELECT pg_log_backend_memory_contexts($1)", &[&disturbed.pid()]).unwrap();
        cluster.wait_for_log(from, &format!("logging memory contexts of PID {}", disturbed.pid()));
        cluster.wait_for_log(from, "Grand total:");
        database.wait_until_backend_waits(disturbed.pid(), "Extension", None);
        for reading in [first, second] {
            let msg_id = send(&mut client, "q", 1);
            assert_eq!(ids(&joined(reading).1), [msg_id], "disturbed the first: {is_first}");
        }
        client.batch_execute("SELECT queue_purge('q')").unwrap();
    }
}

#[test]
fn wait_without_a_worker_sees_what_becomes_due() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    set_worker(&database, false);
    send(&mut client, "q", 1);
    let begun = Instant::now();
    assert_eq!(read_for(&mut client, "q", 1, "500 ms").len(), 1);
    assert_eq!(try_wait(&mut client, "'q'", LONG).unwrap().as_deref(), Some("q"));
    let (took, most) = (begun.elapsed(), Duration::from_secs(15));
    assert!(took >= Duration::from_millis(500) && took < most, "{took:?}");
    // Nor does it count on a worker that ends while it sleeps.
    set_worker(&database, true);
    drain(&mut client, "q");
    let waiting = waiter_asleep(&database, "'q'");
    send_delayed(&mut client, "q", "4 s");
    set_worker(&database, false);
    let begun = Instant::now();
    assert_eq!(waited(waiting).as_deref(), Some("q"));
    assert!(begun.elapsed() < most, "{:?}", begun.elapsed());
}

#[test]
fn wait_with_bad_input_says_so() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let role = format!("{}_stranger", database.name);
    for (call, expected) in [
        ("CALL queue_wait(array['nowhere'], '1 s')", "42704"),
        ("CALL queue_wait(array['q', null], '1 s')", "22004"),
        ("CALL queue_wait(null, '1 s')", "22004"),
        ("CALL queue_wait(array['q'], null)", "22004"),
        ("CALL queue_wait(array[]::text[], '1 s')", "22023"),
        ("CALL queue_wait(array['q'], '-1 s')", "22023"),
        ("CALL queue_wait(array['q'], '1 month')", "22023"),
    ] {
        assert_eq!(code(client.batch_execute(call)), expected, "{call}");
    }
    client.batch_execute(&format!("CREATE ROLE {role}; SET ROLE {role}")).unwrap();
    assert_eq!(code(client.batch_execute("CALL queue_wait(array['q'], '1 s')")), "42501");
    client
        .batch_execute(&format!("RESET ROLE; GRANT SELECT, UPDATE ON queue.q TO {role}; SET ROLE {role}"))
        .unwrap();
    assert_eq!(try_wait(&mut client, "'q'", "1 ms").unwrap(), None);
    client.batch_execute(&format!("RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")).unwrap();
    // Dropped meanwhile: who waits for it hears so.
    let waiting = waiter_asleep(&database, "'q'");
    client.batch_execute("SELECT queue_drop('q')").unwrap();
    assert_eq!(code(waiting.join().unwrap().1), "42704");
}

// ---- Notifications --------------------------------------------------------------------------------------------

fn listener(database: &Database, channels: &[&str]) -> Client {
    let mut client = database.connect().unwrap();
    for channel in channels {
        client.batch_execute(&format!("LISTEN \"{channel}\"")).unwrap();
    }
    client
}

/// The channels notified of within that time.
fn notified_within(client: &mut Client, most: Duration) -> Vec<String> {
    let mut notifications = client.notifications();
    let mut iter = notifications.timeout_iter(most);
    let mut channels = Vec::new();
    while let Some(notification) = iter.next().unwrap() {
        channels.push(notification.channel().to_owned());
    }
    channels
}

/// Returns when a notification has come; it must be of that channel.
#[track_caller]
fn notified(client: &mut Client, channel: &str) {
    let mut notifications = client.notifications();
    let found = notifications.timeout_iter(Duration::from_secs(25)).next().unwrap();
    assert_eq!(found.map(|one| one.channel().to_owned()).as_deref(), Some(channel));
}

#[test]
fn notification_of_a_burst_is_one_an_interval() {
    const SENDS: usize = 400;
    let cluster = ClusterOptions::default().set("pg_queue.notify_interval", "300 ms").start().unwrap();
    let database = database_on(&cluster, &["q", "other"]);
    let mut client = session(&database);
    let mut listening = listener(&database, &["queue_q"]);
    let begun = Instant::now();
    for n in 0..SENDS {
        send(&mut client, "q", n as i64);
        send(&mut client, "other", n as i64);
    }
    let sending = begun.elapsed();
    let mut got = notified_within(&mut listening, Duration::from_secs(1));
    got.extend(notified_within(&mut listening, Duration::from_millis(700)));
    let took = begun.elapsed();
    println!("{SENDS} sends in {} ms: {} notifications", sending.as_millis(), got.len());
    assert!(!got.is_empty() && got.iter().all(|channel| channel == "queue_q"), "{got:?}");
    let most = 2 + (took.as_millis() / 300) as usize;
    assert!(got.len() <= most && got.len() < SENDS / 4, "{} in {took:?}", got.len());
}

#[test]
fn notification_comes_for_what_plain_sql_puts_into_a_new_queue() {
    let database = database_with(&[]);
    let mut client = session(&database);
    worker_pid(&database);
    for (queue, fill) in [
        ("one", "INSERT INTO queue.one (message) VALUES ('1')"),
        ("many", "INSERT INTO queue.many (message) SELECT to_jsonb(n) FROM generate_series(1, 200000) n"),
    ] {
        let mut listening = listener(&database, &[&format!("queue_{queue}")]);
        client.execute("SELECT queue_create($1)", &[&queue]).unwrap();
        client.batch_execute(fill).unwrap();
        notified(&mut listening, &format!("queue_{queue}"));
    }
}

#[test]
fn notification_comes_for_whatever_becomes_ready() {
    let database = database_with(&["q", "other"]);
    let mut client = session(&database);
    worker_pid(&database);
    let mut listening = listener(&database, &["queue_q"]);
    send(&mut client, "other", 1);
    send_delayed(&mut client, "q", "200 ms");
    let is_delayed =
        "SELECT state = 'delayed' OR visible_at <= clock_timestamp() FROM queue_peek('q', msg_ids => '{1}')";
    assert!(value::<bool>(&mut client, is_delayed));
    notified(&mut listening, "queue_q");
    assert_ne!(state(&mut client, "q", 1).as_deref(), Some("delayed"));
    let got = read_for(&mut client, "q", 1, "300 ms"); // it ends
    notified(&mut listening, "queue_q");
    assert_eq!(state(&mut client, "q", 1).as_deref(), Some("ready"));
    let again = read_for(&mut client, "q", 1, "1 h");
    assert_eq!((again[0].msg_id, again[0].count), (got[0].msg_id, 2));
    assert_eq!(retry(&mut client, "q", &again[0], Some("100 ms")), "retried");
    notified(&mut listening, "queue_q");
    assert_eq!(drain(&mut client, "q").len(), 1);
    let mut copy = client.copy_in("COPY queue.q (message) FROM STDIN").unwrap();
    std::io::Write::write_all(&mut copy, b"1\n2\n3\n").unwrap();
    copy.finish().unwrap();
    notified(&mut listening, "queue_q");
    assert_eq!(drain(&mut client, "q").len(), 3);
    client.batch_execute("BEGIN").unwrap();
    send(&mut client, "q", 1);
    client.batch_execute("ROLLBACK").unwrap();
    assert_eq!(notified_within(&mut listening, Duration::from_millis(500)), Vec::<String>::new());
}

#[test]
fn notification_is_not_made_before_anybody_listens() {
    let long = "a queue's name of sixty-three bytes, so that its channel is hash";
    assert!(long.len() == 64);
    let long = &long[..63];
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q", long]);
    let mut client = session(&database);
    worker_pid(&database);
    let committed = |client: &mut Client| -> i64 {
        client.batch_execute("SELECT pg_stat_force_next_flush()").unwrap();
        value(client, "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")
    };
    // The worker wakes for notifications only where somebody listens: it stays asleep over the sends.
    let mut hold = session(&database);
    let sleeps = |pid: i32| -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap();
        line.split_whitespace().last().unwrap().parse().unwrap()
    };
    send(&mut hold, "q", 1); // attached and looked after
    let worker = worker_pid(&database);
    let mut before = 0;
    wait_until("the worker has settled", || {
        let now = sleeps(worker);
        std::mem::replace(&mut before, now) == now
    });
    let begun = committed(&mut client);
    for n in 0..200 {
        send(&mut hold, "q", n);
    }
    let switches = sleeps(worker) - before;
    println!("the worker slept {switches} times over 200 sends; {} commits", committed(&mut client) - begun);
    assert!(switches < 20, "{switches}");
    let channel: String =
        client.query_one("SELECT channel FROM queue_list() WHERE queue = $1", &[&long]).unwrap().get(0);
    assert!(channel.starts_with("queue_") && channel.len() <= 63, "{channel}");
    let mut listening = listener(&database, &[&channel, "queue_q"]);
    // Nothing of what came before; then of each queue its own.
    assert_eq!(notified_within(&mut listening, Duration::from_millis(500)), Vec::<String>::new());
    send(&mut client, long, 1);
    notified(&mut listening, &channel);
    send(&mut client, "q", 1);
    notified(&mut listening, "queue_q");
}

// ---- Without a worker -----------------------------------------------------------------------------------------

#[test]
fn worker_is_switched_off_and_on_by_its_databases_setting_and_the_servers() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let other = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    let (first, neighbour) = (worker_pid(&database), worker_pid(&other));
    for scope in ["database", "server"] {
        let reload = |client: &mut Client, sql: &str| {
            client.batch_execute(sql).unwrap();
            client.batch_execute("SELECT pg_reload_conf()").unwrap();
        };
        let begun = Instant::now();
        match scope {
            // As anybody may write it.
            "database" => {
                let off = format!("ALTER DATABASE \"{}\" SET pg_queue.worker_enabled = 0", database.name);
                client.batch_execute(&off).unwrap();
            }
            _ => reload(&mut client, "ALTER SYSTEM SET pg_queue.worker_enabled = off"),
        }
        wait_no_worker(&database);
        println!("{scope}: off after {} ms", begun.elapsed().as_millis());
        works_without_worker(&database);
        // Also to a session that began before: it knows the setting as it was.
        let found = problems(&mut client);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, "worker_not_running");
        let cure = match scope {
            "database" => format!("ALTER DATABASE \"{}\" RESET pg_queue.worker_enabled", database.name),
            _ => "ALTER SYSTEM SET pg_queue.worker_enabled = on".to_owned(),
        };
        assert_eq!(found[0].1, cure);
        wait_no_worker(&database); // it stays away
        if scope == "database" {
            // Which is awake now and then, and is not found then.
            wait_until("others keep theirs", || find_worker(&mut client, &other.name) == Some(neighbour));
            set_worker(&database, true);
        } else {
            wait_no_worker(&other);
            reload(&mut client, "ALTER SYSTEM RESET pg_queue.worker_enabled");
        }
        assert_ne!(worker_pid(&database), first);
        wait_until("there is no problem any more", || problems(&mut client).is_empty());
        worker_pid(&other);
    }
}

/// Sends, reads, retries and delays, with readers that sleep.
fn works_without_worker(database: &Database) {
    let mut client = session(database);
    let reading = reader_asleep(database, "q");
    let msg_id = send(&mut client, "q", 1);
    let (mut reader, got) = joined(reading);
    assert_eq!(ids(&got), [msg_id]);
    assert_eq!(retry(&mut reader, "q", &got[0], Some("100 ms")), "retried");
    let again = read_awaited(&mut reader, "q");
    assert_eq!((again.msg_id, again.count), (msg_id, 2));
    assert!(delete(&mut reader, "q", &again));
    let reading = reader_asleep(database, "q");
    let delayed = send_delayed(&mut client, "q", "100 ms");
    let (mut reader, got) = joined(reading);
    assert_eq!(ids(&got), [delayed]);
    assert!(extend(&mut client, "q", &got[0], "100 ms").is_some());
    let got = read_awaited(&mut reader, "q"); // its lease has ended
    assert_eq!((got.msg_id, got.count), (delayed, 2));
    assert!(delete(&mut reader, "q", &got));
}
