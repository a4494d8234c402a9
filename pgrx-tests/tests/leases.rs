//! Leases that survive: written to the catalog once they outlive the flush interval, or before a read returns on a
//! queue with durable leases; read back after a crash, a restart or a failover, before anything is delivered.
//!
//! Every test here moves the clock or takes the server down, so each has a cluster of its own. A restart takes the
//! clock back to the real one.

mod common;

use std::collections::BTreeSet;

use common::*;
use nix::sys::signal::Signal;
use postgres::Client;
use queue_tests::wait_points::{advance_clock, set_wall_clock};
use queue_tests::{wait_until, Cluster, ClusterOptions, Database, Session, StopMode};

/// More than `pg_queue.lease_flush_interval`.
const FLUSH: &str = "2 s";
/// More than stale rows lie before they are swept together.
const SWEEP: &str = "11 s";

/// Leases are written a minute after their read: nothing that a test does meanwhile takes as long.
fn slow_flush() -> ClusterOptions {
    ClusterOptions::default().set("pg_queue.lease_flush_interval", "1 min")
}

/// Reads with a lease of that length and returns when what it got, and nothing else of the queue, is written.
#[track_caller]
fn read_written(client: &mut Client, queue: &str, quantity: i64, timeout: &str) -> Vec<Delivery> {
    let got = read_for(client, queue, quantity, timeout);
    assert_eq!(got.len() as i64, quantity);
    advance_clock(client, FLUSH);
    wait_written(client, queue, &ids(&got));
    got
}

/// Returns when `condition` holds, which a sweep is to bring about. When the next one is, the worker settles as it sees
/// that there is something to sweep: the time goes on until it has seen it.
#[track_caller]
fn sweep_until(client: &mut Client, what: &str, mut condition: impl FnMut(&mut Client) -> bool) {
    let mut looks = 0;
    wait_until(what, || {
        if looks % 50 == 0 {
            advance_clock(client, SWEEP);
        }
        looks += 1;
        condition(client)
    });
}

/// SIGKILLs the whole server and starts it again.
fn crash(cluster: &Cluster) {
    let before = cluster.postmaster_pid().unwrap();
    cluster.kill_all().unwrap();
    cluster.start().unwrap();
    assert_ne!(cluster.postmaster_pid().unwrap(), before, "it is a new server");
}

/// Message and delivery count.
fn counts(deliveries: &[Delivery]) -> Vec<(i64, i64)> {
    deliveries.iter().map(|delivery| (delivery.msg_id, delivery.count)).collect()
}

fn in_transaction(database: &Database, sql: &str) -> Session {
    let mut session = session(database);
    session.batch_execute("BEGIN").unwrap();
    assert_eq!(session.query(sql, &[]).unwrap().len(), 1, "{sql}");
    session
}

// ---- What is written ------------------------------------------------------------------------------------------

#[test]
fn lease_is_written_once_it_outlives_the_interval() {
    let cluster = ClusterOptions::default().set("pg_queue.lease_flush_interval", "10 min").start().unwrap();
    let database = database_on(&cluster, &["q", "short"]);
    let mut client = session(&database);
    worker_pid(&database);
    send_many(&mut client, "q", 2);
    send_many(&mut client, "short", 2);
    let long = read_for(&mut client, "q", 1, "1 h");
    let short = read_for(&mut client, "short", 1, "599 s");
    let finished = read_for(&mut client, "short", 1, "1 h");
    // Nothing before its time: another queue's lease, of a shorter interval by far, is written first.
    advance_clock(&mut client, "9 min");
    assert!(delete(&mut client, "short", &finished[0]));
    let durable = "SELECT queue_create('now', durable_leases => true); SELECT queue_send('now', '1')";
    client.batch_execute(durable).unwrap();
    let now = read_for(&mut client, "now", 1, "1 h");
    assert_eq!(written_lease(&mut client, "now", now[0].msg_id).unwrap().lease_id, now[0].lease_id);
    assert_eq!((written_leases(&mut client, "q"), written_leases(&mut client, "short")), (vec![], vec![]));
    advance_clock(&mut client, "61 s");
    wait_written(&mut client, "q", &ids(&long));
    let written = written_lease(&mut client, "q", long[0].msg_id).unwrap();
    assert_eq!((written.lease_id, written.count), (long[0].lease_id, 1));
    assert!(written.left_s.is_some_and(|left_s| (3_500.0..3_700.0).contains(&left_s)), "{written:?}");
    // The short one ended before; its next one is a lease of its own.
    assert_eq!(written_leases(&mut client, "short"), []);
    let again = read_for(&mut client, "short", 1, "1 h");
    assert_eq!((again[0].msg_id, again[0].count), (short[0].msg_id, 2));
    advance_clock(&mut client, "601 s");
    wait_written(&mut client, "short", &ids(&again));
    assert_eq!(written_leases(&mut client, "short")[0].count, 2);
}

#[test]
fn lease_is_written_on_the_real_clock() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    let begun = std::time::Instant::now();
    let got = read_for(&mut client, "q", 1, "1 h");
    wait_written(&mut client, "q", &ids(&got));
    let took = begun.elapsed();
    println!("a lease was written {} ms after its read", took.as_millis());
    assert!(took.as_millis() >= 990, "not before the interval: {took:?}");
    crash(&cluster);
    let mut client = session(&database);
    assert!(read(&mut client, "q", 1).is_empty());
    assert!(delete(&mut client, "q", &got[0]));
}

#[test]
fn extend_moves_the_written_deadline_either_way() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 2);
    let got = read_written(&mut client, "q", 2, "1 h");
    assert!(extend(&mut client, "q", &got[0], "3 h").is_some());
    assert!(extend(&mut client, "q", &got[1], "10 min").is_some());
    wait_until("both new deadlines are written", || {
        let left = |client: &mut Client, one: &Delivery| {
            written_lease(client, "q", one.msg_id).and_then(|lease| lease.left_s).unwrap_or_default()
        };
        left(&mut client, &got[0]) > 10_000.0 && (1.0..700.0).contains(&left(&mut client, &got[1]))
    });
    crash(&cluster);
    let mut client = session(&database);
    assert!(read(&mut client, "q", 9).is_empty());
    advance_clock(&mut client, "11 min");
    assert_eq!(counts(&read_for(&mut client, "q", 9, "5 h")), [(got[1].msg_id, 2)]);
    advance_clock(&mut client, "160 min");
    assert!(read(&mut client, "q", 9).is_empty(), "two hours and fifty minutes");
    advance_clock(&mut client, "15 min");
    assert_eq!(counts(&read(&mut client, "q", 9)), [(got[0].msg_id, 2)]);
}

#[test]
fn rows_that_are_not_needed_go() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q", "dropped"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 5);
    let got = read_written(&mut client, "q", 5, "1 h");
    let mut kept = ids(&got);
    // Swept together after a while: of a finished message, of one that was retried, of one that was released.
    assert!(delete(&mut client, "q", &got[0]));
    assert_eq!(retry(&mut client, "q", &got[1], Some("1 day")), "retried");
    assert!(release(&mut client, "q", &got[2]));
    kept.drain(..3);
    sweep_until(&mut client, "only the others' rows are left", |client| {
        written_leases(client, "q").iter().map(|lease| lease.msg_id).eq(kept.iter().copied())
    });
    // At the next start.
    assert!(delete(&mut client, "q", &got[3]));
    crash(&cluster);
    let mut client = session(&database);
    kept.remove(0);
    wait_written(&mut client, "q", &kept);
    // Those of a queue that is gone.
    send(&mut client, "dropped", 1);
    let dropped = read_written(&mut client, "dropped", 1, "1 h");
    assert_eq!(dropped.len(), 1);
    let oid: u32 = client.query_one("SELECT 'queue.dropped'::regclass::oid", &[]).unwrap().get(0);
    client.batch_execute("SELECT queue_drop('dropped', force => true)").unwrap();
    advance_clock(&mut client, SWEEP);
    let left = |client: &mut Client| -> i64 {
        let sql = "SELECT count(*) FROM queue_catalog.lease WHERE queue = $1";
        client.query_one(sql, &[&oid]).unwrap().get(0)
    };
    crash(&cluster);
    let mut client = session(&database);
    wait_until("the lease of the dropped queue is gone", || left(&mut client) == 0);
    wait_written(&mut client, "q", &kept);
}

// ---- What survives --------------------------------------------------------------------------------------------

/// Messages of queue `q` and what is known of them when the server goes down, on a cluster of [`slow_flush`].
struct Scene {
    /// Leases of an hour, all written: to be finished, extended, retried, and let go, the last of them, which is
    /// its second.
    leased: Vec<Delivery>,
    /// Leased for an hour a moment ago, so not written, however long it takes until the server goes down.
    young: Delivery,
    /// Never delivered.
    ready: i64,
}

impl Scene {
    fn new(client: &mut Client) -> Self {
        let sent = send_many(client, "q", 6);
        let first = read_for(client, "q", 1, "1 s");
        advance_clock(client, "2 s");
        let mut leased = read_for(client, "q", 1, "1 h");
        assert_eq!(counts(&leased), [(first[0].msg_id, 2)]);
        leased.extend(read_for(client, "q", 3, "1 h"));
        leased.rotate_left(1);
        advance_clock(client, "61 s");
        wait_written(client, "q", &ids(&leased));
        let young = read_for(client, "q", 1, "1 h").remove(0);
        Self { leased, young, ready: sent[5] }
    }

    /// The server is another, and its clock the real one.
    fn check(self, client: &mut Client) {
        let Self { leased, young, ready } = self;
        // What was too young to be written may come early; nothing else does.
        let got = read_for(client, "q", 9, "5 h");
        assert_eq!(counts(&got), [(young.msg_id, 1), (ready, 1)]);
        assert!(!delete(client, "q", &young), "its lease was lost");
        for one in &leased {
            let other = Delivery { lease_id: one.lease_id + 1, ..one.clone() };
            assert!(!delete(client, "q", &other));
            assert_eq!(extend(client, "q", &other, "1 h"), None);
            assert_eq!(retry(client, "q", &other, None), "lost");
            assert!(!release(client, "q", &other));
        }
        assert!(delete(client, "q", &leased[0]));
        assert!(extend(client, "q", &leased[1], "3 h").is_some());
        assert_eq!(retry(client, "q", &leased[2], Some("0")), "retried");
        let retried = read_for(client, "q", 9, "5 h");
        assert_eq!(counts(&retried), [(leased[2].msg_id, 2)]);
        advance_clock(client, "50 min");
        assert!(read(client, "q", 9).is_empty());
        advance_clock(client, "11 min");
        let last = read_for(client, "q", 9, "5 h");
        assert_eq!(counts(&last), [(leased[3].msg_id, 3)], "its lease was the second");
        assert!(!delete(client, "q", &leased[3]) && delete(client, "q", &last[0]));
        advance_clock(client, "2 h");
        let extended = read_for(client, "q", 9, "5 h");
        assert_eq!(counts(&extended), [(leased[1].msg_id, 2)]);
        let all = [got, retried, extended].concat();
        assert!(all.iter().all(|one| delete(client, "q", one)));
        assert_eq!(rows(client, "q"), 0);
    }
}

#[test]
fn crash_and_restart_keep_written_leases() {
    let cluster = slow_flush().start().unwrap();
    let database = database_on(&cluster, &["q"]);
    for way in ["crash", "immediate", "fast"] {
        println!("{way}");
        let mut client = session(&database);
        let worker = worker_pid(&database);
        let scene = Scene::new(&mut client);
        match way {
            "crash" => crash(&cluster),
            "immediate" => cluster.restart(StopMode::Immediate).unwrap(),
            _ => cluster.restart(StopMode::Fast).unwrap(),
        }
        let mut client = session(&database);
        assert_ne!(worker_pid(&database), worker);
        scene.check(&mut client);
    }
}

#[test]
fn promotion_keeps_written_leases() {
    let primary = slow_flush().start().unwrap();
    let database = database_on(&primary, &["q"]);
    let standby = slow_flush().start_standby_of(&primary).unwrap();
    let mut client = session(&database);
    let scene = Scene::new(&mut client);
    standby.wait_until_replayed(&primary);
    let there = Database { cluster: &standby, name: database.name.clone() };
    let mut client = session(&there);
    assert_eq!(find_worker(&mut client, &there.name), None);
    primary.kill_all().unwrap();
    assert!(client.query_one("SELECT pg_promote()", &[]).unwrap().get::<_, bool>(0));
    scene.check(&mut client);
    worker_pid(&there);
}

#[test]
fn open_transaction_is_written_as_a_count() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 5);
    let mut committed = in_transaction(&database, "SELECT * FROM queue_read('q', visibility_timeout => '1 h')");
    let mut open = [
        in_transaction(&database, "SELECT * FROM queue_read('q', visibility_timeout => '1 h')"),
        in_transaction(&database, "SELECT * FROM queue_pop('q')"),
        in_transaction(
            &database,
            "SELECT queue_delete('q', msg_id, lease_id) FROM queue_read('q', visibility_timeout => '1 h')",
        ),
        in_transaction(
            &database,
            "SELECT * FROM queue_delete_and_read('q', '{}', visibility_timeout => '1 h')",
        ),
    ];
    advance_clock(&mut client, FLUSH);
    wait_until("all five counts are written", || written_leases(&mut client, "q").len() == 5);
    assert!(written_leases(&mut client, "q").iter().all(|lease| (lease.count, lease.left_s) == (1, None)));
    // As long as they are open nothing else is.
    advance_clock(&mut client, FLUSH);
    committed.batch_execute("COMMIT").unwrap();
    advance_clock(&mut client, FLUSH);
    let deadlines = |client: &mut Client| -> Vec<i64> {
        let written = written_leases(client, "q").into_iter();
        written.filter(|lease| lease.left_s.is_some()).map(|lease| lease.msg_id).collect()
    };
    wait_until("the committed lease's deadline is written", || deadlines(&mut client) == [1]);
    assert_eq!(written_leases(&mut client, "q").len(), 5);
    crash(&cluster);
    for session in &mut open {
        assert!(session.batch_execute("COMMIT").is_err(), "its session died with the server");
    }
    let mut client = session(&database);
    let got = read_for(&mut client, "q", 9, "1 h");
    assert_eq!(counts(&got), [(2, 2), (3, 2), (4, 2), (5, 2)], "at once, and counted");
}

#[test]
fn release_survives_a_crash() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q", "again"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    send(&mut client, "again", 1);
    let got = read_written(&mut client, "q", 1, "1 h");
    let first = read_for(&mut client, "again", 1, "1 s");
    advance_clock(&mut client, FLUSH);
    let second = read_written(&mut client, "again", 1, "1 h");
    assert_eq!(counts(&second), [(first[0].msg_id, 2)]);
    assert!(release(&mut client, "q", &got[0]));
    assert!(release(&mut client, "again", &second[0]));
    sweep_until(&mut client, "the rows know of it", |client| {
        written_leases(client, "q").is_empty()
            && written_leases(client, "again").iter().all(|lease| (lease.count, lease.left_s) == (1, None))
    });
    crash(&cluster);
    let mut client = session(&database);
    assert_eq!(counts(&read(&mut client, "q", 9)), [(got[0].msg_id, 1)]);
    assert_eq!(counts(&read(&mut client, "again", 9)), [(first[0].msg_id, 2)]);
}

#[test]
fn release_while_the_lease_is_being_written_survives_a_crash() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    let mut hold = Hold::backend(&database, "lease-write", worker_pid(&database));
    let got = read_for(&mut client, "q", 1, "1 h");
    advance_clock(&mut client, FLUSH);
    hold.wait_reached();
    assert!(release(&mut client, "q", &got[0]));
    hold.release();
    wait_until("the lease is written all the same", || !written_leases(&mut client, "q").is_empty());
    sweep_until(&mut client, "its row goes", |client| written_leases(client, "q").is_empty());
    crash(&cluster);
    let mut client = session(&database);
    assert_eq!(counts(&read(&mut client, "q", 9)), [(got[0].msg_id, 1)]);
}

// ---- Poison ---------------------------------------------------------------------------------------------------

/// A handler kills the whole server each time it is given the message.
fn poison(durable: bool) {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["dead"]);
    let mut client = session(&database);
    client
        .execute(
            "SELECT queue_create('q', max_deliveries => 3, dead_letter_queue => 'dead', durable_leases => $1)",
            &[&durable],
        )
        .unwrap();
    client.batch_execute("SELECT queue_send('q', '7')").unwrap();
    for count in 1..=3 {
        let mut handler = session(&database);
        worker_pid(&database); // a durable read is refused while the crash's new one is not there yet
        handler.batch_execute("BEGIN").unwrap();
        let got = read_awaited(&mut handler, "q");
        assert_eq!((got.count, &got.message), (count, &serde_json::json!(7)));
        if !durable {
            let mut client = session(&database);
            advance_clock(&mut client, FLUSH);
            wait_until("the delivery is written", || {
                written_leases(&mut client, "q").iter().any(|lease| i64::from(lease.count) == count)
            });
        }
        cluster.kill_backend(handler.pid()).unwrap();
        assert!(handler.batch_execute("COMMIT").is_err());
    }
    // Nobody uses the queue; its worker sees to it.
    let mut client = session(&database);
    let dead = read_awaited(&mut client, "dead");
    assert_eq!(dead.message, 7);
    let header: serde_json::Value =
        client.query_one("SELECT headers -> 'dead_letter' FROM queue.dead", &[]).unwrap().get(0);
    assert_eq!((&header["queue"], &header["delivery_count"]), (&"q".into(), &3.into()), "{header}");
    assert_eq!(rows(&mut client, "q"), 0);
    assert_eq!(cluster.log().matches("reinitializing").count(), 3);
}

#[test]
fn poison_on_a_durable_queue_is_buried_after_its_last_delivery() {
    poison(true);
}

#[test]
fn poison_that_takes_longer_than_the_interval_is_buried_after_its_last_delivery() {
    poison(false);
}

#[test]
fn lease_whose_worker_dies_before_it_is_written_is_written_by_the_next() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    let worker = worker_pid(&database);
    let mut hold = Hold::backend(&database, "lease-write", worker);
    send(&mut client, "q", 1);
    let got = read_for(&mut client, "q", 1, "1 h");
    advance_clock(&mut client, FLUSH);
    hold.wait_reached();
    client.execute("SELECT pg_terminate_backend($1)", &[&worker]).unwrap();
    hold.release();
    wait_until("another worker is there", || worker_pid(&database) != worker);
    wait_written(&mut client, "q", &ids(&got));
}

// ---- Durable leases -------------------------------------------------------------------------------------------

fn create_durable(client: &mut Client, queue: &str) {
    client.execute("SELECT queue_create($1, durable_leases => true)", &[&queue]).unwrap();
}

#[test]
fn durable_read_returns_with_its_counts_written() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let (mut client, mut other) = (session(&database), session(&database));
    create_durable(&mut client, "q");
    worker_pid(&database);
    client.batch_execute("CREATE TABLE t (n int)").unwrap();
    // The last message of each is what the statement gives.
    for (begin, read) in [
        ("BEGIN", "SELECT msg_id, lease_id FROM queue_read('q')"),
        ("BEGIN", "SELECT msg_id, lease_id FROM queue_read_any(array['q'])"),
        ("BEGIN", "SELECT msg_id, lease_id FROM queue_read('q', wait => '1 s')"),
        ("BEGIN; INSERT INTO t VALUES (1)", "SELECT msg_id, lease_id FROM queue_read('q')"),
        ("BEGIN; INSERT INTO t VALUES (1)", "SELECT msg_id, lease_id FROM queue_pop('q')"),
        ("BEGIN", "SELECT msg_id, lease_id FROM queue_pop('q')"),
        ("BEGIN", "SELECT msg_id, lease_id FROM queue_delete_and_read('q', '{}')"),
        (
            "BEGIN; SELECT queue_delete('q', msg_id, lease_id) FROM queue_read('q')",
            "SELECT msg_id, lease_id FROM queue_delete_and_read('q', '{}')",
        ),
        ("BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT msg_id, lease_id FROM queue_read('q')"),
        (
            "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t",
            "SELECT msg_id, lease_id FROM queue_pop('q')",
        ),
        (
            "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM t",
            "SELECT msg_id, lease_id FROM queue_read('q')",
        ),
    ] {
        send_many(&mut other, "q", 2);
        client.batch_execute(begin).unwrap();
        let rows = client.query(read, &[]).unwrap();
        assert_eq!(rows.len(), 1, "{begin}; {read}");
        let written =
            written_lease(&mut other, "q", rows[0].get(0)).unwrap_or_else(|| panic!("{begin}; {read}"));
        assert_eq!(
            (written.lease_id, written.count, written.left_s),
            (rows[0].get(1), 1, None),
            "{begin}; {read}"
        );
        client.batch_execute("COMMIT; TRUNCATE queue.q").unwrap();
    }
    // In autocommit: the deadline follows.
    send(&mut other, "q", 1);
    let got = read_for(&mut client, "q", 1, "1 h");
    let written = written_lease(&mut other, "q", got[0].msg_id).unwrap();
    assert_eq!((written.lease_id, written.count), (got[0].lease_id, 1));
    advance_clock(&mut client, FLUSH);
    wait_until("the deadline is written", || {
        written_lease(&mut other, "q", got[0].msg_id).is_some_and(|lease| lease.left_s.is_some())
    });
    crash(&cluster);
    let mut client = session(&database);
    assert!(read(&mut client, "q", 1).is_empty());
    assert!(delete(&mut client, "q", &got[0]));
}

#[test]
fn durable_read_waits_for_the_worker_and_gives_back_when_cancelled() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    create_durable(&mut client, "q");
    let sent = send_many(&mut client, "q", 2);
    let mut hold = Hold::backend(&database, "lease-write", worker_pid(&database));
    let (first, second) = (start_read(session(&database), "q"), start_read(session(&database), "q"));
    hold.wait_reached();
    for reading in [&first, &second] {
        database.wait_until_backend_waits(reading.pid(), "Extension", None);
    }
    assert!(!first.is_done() && !second.is_done() && written_leases(&mut client, "q").is_empty());
    wait_until("both have taken theirs", || {
        sent.iter().all(|id| state(&mut client, "q", *id).as_deref() == Some("leased"))
    });
    client.execute("SELECT pg_cancel_backend($1)", &[&first.pid()]).unwrap();
    let (_, result) = first.join().unwrap();
    assert_eq!(code(result), "57014");
    let ready: Vec<i64> =
        sent.iter().copied().filter(|id| state(&mut client, "q", *id).as_deref() == Some("ready")).collect();
    assert_eq!(ready.len(), 1, "it was given back");
    assert!(!second.is_done() && written_leases(&mut client, "q").is_empty());
    hold.release();
    let (_, got) = joined(second);
    assert_eq!(got.len(), 1);
    assert_ne!(got[0].msg_id, ready[0]);
    let written = written_lease(&mut client, "q", got[0].msg_id).unwrap();
    assert_eq!((written.lease_id, written.count), (got[0].lease_id, 1));
    assert_eq!(counts(&read(&mut client, "q", 1)), [(ready[0], 2)]);
}

#[test]
fn durable_read_whose_lease_ends_before_it_is_written_is_refused() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_create('q', durable_leases => true, retry_delay => '0')").unwrap();
    let msg_id = send(&mut client, "q", 1);
    let mut hold = Hold::backend(&database, "lease-write", worker_pid(&database));
    let signal = |pid: i32, signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    let reading = session(&database).run("SELECT * FROM queue_read('q', 1, '10 min')").unwrap();
    hold.wait_reached();
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    advance_clock(&mut client, "10 min");
    assert_eq!(code(reading.join().unwrap().1), "55000");
    // One that is given to another meanwhile, too.
    let reading = session(&database).run("SELECT * FROM queue_read('q', 1, '10 min')").unwrap();
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    signal(reading.pid(), Signal::SIGSTOP);
    advance_clock(&mut client, "10 min");
    let other = start_read(session(&database), "q");
    database.wait_until_backend_waits(other.pid(), "Extension", None);
    wait_until("the other has it", || state(&mut client, "q", msg_id).as_deref() == Some("leased"));
    signal(reading.pid(), Signal::SIGCONT);
    assert_eq!(code(reading.join().unwrap().1), "55000");
    hold.release();
    let (_, got) = joined(other);
    assert!(got[0].count > 1, "{got:?}");
    assert_eq!(i64::from(written_lease(&mut client, "q", msg_id).unwrap().count), got[0].count);
}

#[test]
fn durable_reads_share_commits() {
    const READERS: i64 = 30;
    // No deadline is written meanwhile.
    let cluster = ClusterOptions::default().set("pg_queue.lease_flush_interval", "1 h").start().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    let create = "SELECT queue_create('q', durable_leases => true, visibility_timeout => '10 min')";
    client.batch_execute(create).unwrap();
    let mut sent = send_many(&mut client, "q", READERS);
    let mut hold = Hold::backend(&database, "lease-write", worker_pid(&database));
    let readings: Vec<Reading> = (0..READERS).map(|_| start_read(session(&database), "q")).collect();
    hold.wait_reached();
    let pids: Vec<i32> = readings.iter().map(Reading::pid).collect();
    wait_until("each reader has a message and waits for the worker", || {
        let sql =
            "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY ($1) AND wait_event_type = 'Extension'";
        client.query_one(sql, &[&pids]).unwrap().get::<_, i64>(0) == READERS
            && client.query("SELECT FROM queue_peek('q', 100, state => 'leased')", &[]).unwrap().len()
                == pids.len()
    });
    hold.release();
    let got: Vec<i64> = readings.into_iter().map(|reading| joined(reading).1[0].msg_id).collect();
    sent.sort_unstable();
    assert_eq!(sorted(got), sent);
    let sql = "SELECT count(DISTINCT xmin::text), count(*) FROM queue_catalog.lease";
    let row = client.query_one(sql, &[]).unwrap();
    let (transactions, leases): (i64, i64) = (row.get(0), row.get(1));
    println!("{leases} leases in {transactions} transactions of the worker");
    assert_eq!(leases, READERS);
    assert!(transactions <= 5, "{transactions}");
}

#[test]
fn durable_read_without_a_worker_is_refused() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["plain"]);
    let mut client = session(&database);
    create_durable(&mut client, "q");
    create_durable(&mut client, "empty");
    worker_pid(&database);
    let msg_id = send(&mut client, "q", 1);
    set_worker(&database, false);
    for sql in [
        "SELECT * FROM queue_read('q')",
        "SELECT * FROM queue_pop('q')",
        "SELECT * FROM queue_delete_and_read('q', '{}')",
    ] {
        // More often than the messages may be delivered: what was never given to anybody does not count.
        for _ in 0..3 {
            assert_eq!(code(client.query(sql, &[])), "55000", "{sql}");
            assert_eq!(state(&mut client, "q", msg_id).as_deref(), Some("ready"), "{sql}");
        }
    }
    assert!(read(&mut client, "empty", 1).is_empty(), "where there is nothing, nothing has to be written");
    let plain = send(&mut client, "plain", 1);
    assert_eq!(read_one(&mut client, "plain").msg_id, plain, "other queues serve on");
    set_worker(&database, true);
    assert_eq!(counts(&[read_awaited(&mut client, "q")]), [(msg_id, 1)]);
}

// ---- Coming back ----------------------------------------------------------------------------------------------

/// After a crash a queue with one written lease (message 1) and one ready message (2); there is no worker that would
/// restore it, and whoever does stands still.
fn unrestored(cluster: &Cluster) -> (Database<'_>, Delivery) {
    let database = database_on(cluster, &["q"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 2);
    let got = read_written(&mut client, "q", 1, "1 h");
    set_worker(&database, false);
    crash(cluster);
    (database, got.into_iter().next().unwrap())
}

#[test]
fn queue_is_not_served_before_its_leases_are_restored() {
    let cluster = Cluster::start_new().unwrap();
    let (database, leased) = unrestored(&cluster);
    let (mut restorer, second) = (session(&database), session(&database));
    let mut hold = Hold::backend(&database, "restore", restorer.pid());
    let restoring = restorer_runs(&mut hold, restorer);
    restorer = session(&database); // a third, only to look
    let reading = second.run_with(|client| try_read(client, "q", 1, Some("1 h"), "0")).unwrap();
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    assert!(!reading.is_done());
    hold.release();
    let mut got = reading.join().unwrap().1.unwrap();
    got.extend(restoring.join().unwrap().1.unwrap());
    assert_eq!(counts(&got), [(2, 1)], "one of them gets what is ready, nobody what is leased");
    assert!(delete(&mut restorer, "q", &leased));
}

#[test]
fn restore_that_is_ended_is_made_by_another() {
    let cluster = Cluster::start_new().unwrap();
    let (database, leased) = unrestored(&cluster);
    let (mut client, restorer, second) = (session(&database), session(&database), session(&database));
    let mut hold = Hold::backend(&database, "restore", restorer.pid());
    let restoring = restorer_runs(&mut hold, restorer);
    let reading = second.run_with(|client| try_read(client, "q", 9, Some("1 h"), "0")).unwrap();
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    client.execute("SELECT pg_terminate_backend($1)", &[&restoring.pid()]).unwrap();
    hold.release();
    assert_terminated(restoring.join().unwrap().1);
    assert_eq!(counts(&reading.join().unwrap().1.unwrap()), [(2, 1)]);
    assert!(delete(&mut client, "q", &leased));
}

#[test]
fn restore_that_is_killed_is_made_after_the_crash() {
    let cluster = Cluster::start_new().unwrap();
    let (database, leased) = unrestored(&cluster);
    let restorer = session(&database);
    let mut hold = Hold::backend(&database, "restore", restorer.pid());
    let restoring = restorer_runs(&mut hold, restorer);
    cluster.kill_backend(restoring.pid()).unwrap();
    drop(hold);
    assert!(restoring.join().unwrap().1.is_err());
    let mut client = session(&database);
    assert_eq!(counts(&read(&mut client, "q", 9)), [(2, 1)]);
    assert!(delete(&mut client, "q", &leased));
}

fn restorer_runs(hold: &mut Hold, restorer: Session) -> Reading {
    let restoring = restorer.run_with(|client| try_read(client, "q", 1, Some("1 h"), "0")).unwrap();
    hold.wait_reached();
    restoring
}

#[test]
fn wall_clock_that_jumped_while_the_server_was_down_makes_no_lease_longer() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["forth", "back"]);
    let mut client = session(&database);
    let mut leases = Vec::new();
    for queue in ["forth", "back"] {
        send(&mut client, queue, 1);
        leases.extend(read_written(&mut client, queue, 1, "30 min"));
    }
    // As if the clock had been set forth, or back, by an hour between stop and start.
    for (queue, by) in [("forth", "-1 h"), ("back", "1 h")] {
        let sql = "UPDATE queue_catalog.lease SET leased_at = leased_at + $2::text::interval, \
                   until = until + $2::text::interval WHERE queue = to_regclass('queue.' || $1)";
        assert_eq!(client.execute(sql, &[&queue, &by]).unwrap(), 1);
    }
    crash(&cluster);
    let mut client = session(&database);
    assert_eq!(read(&mut client, "forth", 1)[0].count, 2, "its deadline is past");
    assert!(!delete(&mut client, "forth", &leases[0]));
    assert!(read(&mut client, "back", 1).is_empty());
    advance_clock(&mut client, "29 min");
    assert!(read(&mut client, "back", 1).is_empty());
    assert!(extend(&mut client, "back", &leases[1], "1 min").is_some());
    advance_clock(&mut client, "90 s");
    assert_eq!(read(&mut client, "back", 1)[0].count, 2, "no longer than the thirty minutes that it was");
}

#[test]
fn wall_clock_that_jumps_redelivers_no_lease() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    for jump in ["1 h", "-1 h", "-1 h", "1 h"] {
        send(&mut client, "q", 1);
        let got = read_written(&mut client, "q", 1, "10 min");
        set_wall_clock(&mut client, jump);
        assert!(read(&mut client, "q", 1).is_empty(), "{jump}");
        advance_clock(&mut client, "9 min");
        assert!(read(&mut client, "q", 1).is_empty(), "{jump}");
        advance_clock(&mut client, "1 min");
        let again = read_for(&mut client, "q", 1, "10 min");
        assert_eq!(counts(&again), [(got[0].msg_id, 2)], "{jump}");
        assert!(!delete(&mut client, "q", &got[0]) && delete(&mut client, "q", &again[0]));
        sweep_until(&mut client, "its row is gone", |client| written_leases(client, "q").is_empty());
    }
}

#[test]
fn fence_of_before_a_restart_never_comes_again() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let (mut fences, mut epochs) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..4 {
        let mut client = session(&database);
        send_many(&mut client, "q", 50);
        let got = read_for(&mut client, "q", 50, "1 h");
        assert_eq!(got.len(), 50);
        advance_clock(&mut client, FLUSH);
        wait_until("the leases are written", || written_leases(&mut client, "q").len() == 50 * (round + 1));
        for one in &got {
            assert!(one.lease_id > 0 && fences.insert(one.lease_id), "{one:?} had that fence before");
            epochs.insert(one.lease_id >> 32);
        }
        assert_eq!(epochs.len(), round + 1, "each start draws its epoch");
        crash(&cluster);
    }
    assert_eq!(fences.len(), 200);
}

// ---- Ids that come anew ---------------------------------------------------------------------------------------

#[test]
fn truncate_forgets_what_is_written_of_leases() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q", "other"]);
    let (mut client, mut truncating) = (session(&database), session(&database));
    send(&mut client, "q", 1);
    send(&mut client, "other", 1);
    // What others have written since is not in its snapshot.
    truncating.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM queue.other").unwrap();
    let other = read_written(&mut client, "other", 1, "1 h");
    let held = read_written(&mut client, "q", 1, "1 h");
    client
        .batch_execute(
            "BEGIN; SAVEPOINT s; TRUNCATE queue.q; ROLLBACK TO s; COMMIT; BEGIN; TRUNCATE queue.q; ROLLBACK",
        )
        .unwrap();
    assert_eq!(written_leases(&mut client, "q").len(), 1, "rolled back, it changes nothing");
    truncating.batch_execute("TRUNCATE queue.q RESTART IDENTITY; COMMIT").unwrap();
    assert_eq!(send(&mut client, "q", 2), held[0].msg_id, "another message with the id of the first");
    cluster.restart(StopMode::Fast).unwrap();
    let mut client = session(&database);
    assert!(!delete(&mut client, "q", &held[0]), "the old lease does not reach the new message");
    assert_eq!(counts(&read(&mut client, "q", 9)), [(held[0].msg_id, 1)]);
    assert!(read(&mut client, "other", 9).is_empty());
    assert!(delete(&mut client, "other", &other[0]), "another queue's lease survives");
    // The extension may go in the same transaction.
    client.batch_execute("BEGIN; TRUNCATE queue.q; DROP EXTENSION pg_queue CASCADE; COMMIT").unwrap();
}

#[test]
fn truncate_while_the_worker_writes_a_lease_has_it_swept() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    let mut hold = Hold::backend(&database, "lease-write", worker_pid(&database));
    let held = read_for(&mut client, "q", 1, "1 h");
    advance_clock(&mut client, FLUSH);
    hold.wait_reached();
    client.batch_execute("TRUNCATE queue.q RESTART IDENTITY").unwrap();
    hold.release();
    wait_written(&mut client, "q", &ids(&held));
    assert_eq!(send(&mut client, "q", 2), held[0].msg_id);
    sweep_until(&mut client, "what was written of the old message is gone", |client| {
        written_leases(client, "q").is_empty()
    });
    crash(&cluster);
    let mut client = session(&database);
    assert_eq!(counts(&read(&mut client, "q", 9)), [(held[0].msg_id, 1)]);
}

#[test]
fn lease_of_an_unlogged_queue_ends_with_its_message() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_create('q', unlogged => true)").unwrap();
    send(&mut client, "q", 1);
    let held = read_for(&mut client, "q", 1, "1 h"); // on the real clock, like what plain SQL stamps
    wait_written(&mut client, "q", &ids(&held));
    cluster.restart(StopMode::Fast).unwrap();
    let mut client = session(&database);
    assert!(read(&mut client, "q", 9).is_empty(), "it survives what its message survives");
    set_worker(&database, false);
    crash(&cluster);
    let mut client = session(&database);
    client.batch_execute("INSERT INTO queue.q (msg_id, message) VALUES (1, '2')").unwrap();
    assert_eq!(counts(&read(&mut client, "q", 9)), [(held[0].msg_id, 1)]);
    assert!(!delete(&mut client, "q", &held[0]));
    set_worker(&database, true);
    wait_until("what was written of the old message is gone", || written_leases(&mut client, "q").is_empty());
}

/// Each message once looked through all that the transaction had done.
#[test]
fn release_and_extend_of_many_in_the_transaction_that_read_them_take_no_longer_for_each() {
    const MANY: i64 = 20_000;
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("SET statement_timeout = '60 s'").unwrap();
    assert!(read(&mut client, "q", 1).is_empty()); // tracked from here on
    send_many(&mut client, "q", MANY);
    client.batch_execute("BEGIN").unwrap();
    let ids = ids(&read_for(&mut client, "q", MANY, "1 h"));
    assert_eq!(ids.len() as i64, MANY);
    let extended = client.query("SELECT queue_extend_batch('q', $1)", &[&ids]).unwrap();
    assert_eq!(extended.len() as i64, MANY);
    let released = client.query("SELECT queue_release('q', $1)", &[&ids]).unwrap();
    assert_eq!(released.iter().map(|row| row.get::<_, i64>(0)).collect::<Vec<_>>(), ids, "in their order");
    client.batch_execute("COMMIT").unwrap();
    let again = read(&mut client, "q", MANY);
    assert!(again.len() as i64 == MANY && again.iter().all(|delivery| delivery.count == 1));
}
