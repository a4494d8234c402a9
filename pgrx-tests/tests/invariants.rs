//! DESIGN.md's ten invariants, each by its name, as many sessions see them.
//!
//! Tests of one file run side by side on one cluster, each in a database of its own; where a test measures the
//! server itself, or sizes the dispatcher, it starts a cluster.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use common::*;
use queue_tests::wait_points::advance_clock;
use queue_tests::{wait_until, Cluster, ClusterOptions, Session};

/// How many messages one call of queue_pop gave.
fn pop(client: &mut Session, queue: &str, quantity: i64) -> i64 {
    client.query_one("SELECT count(*) FROM queue_pop($1, $2)", &[&queue, &quantity]).unwrap().get(0)
}

// ---- 1. A committed send is delivered -----------------------------------------------------------------------

#[test]
fn invariant_1_committed_send_is_delivered() {
    let database = database_with(&["q"]);
    let (mut sender, mut reader) = (session(&database), session(&database));
    sender.batch_execute("BEGIN").unwrap();
    let msg_id = send(&mut sender, "q", 7);
    assert!(read(&mut reader, "q", 1).is_empty(), "nobody sees what is not committed");
    sender.batch_execute("COMMIT").unwrap();
    let got = read_one(&mut reader, "q");
    assert_eq!((got.msg_id, got.count, &got.message), (msg_id, 1, &serde_json::json!(7)));
    assert!(delete(&mut reader, "q", &got));
    assert!(read(&mut reader, "q", 1).is_empty(), "a finished message is not delivered");
    assert_eq!(rows(&mut reader, "q"), 0);
}

#[test]
fn invariant_1_rolled_back_send_never_is_delivered() {
    let database = database_with(&["q"]);
    let (mut sender, mut reader) = (session(&database), session(&database));
    // Once with nothing tracked yet, once on a queue that is.
    for _ in 0..2 {
        sender.batch_execute("BEGIN").unwrap();
        send(&mut sender, "q", 1);
        send_many(&mut sender, "q", 300);
        sender.batch_execute("ROLLBACK").unwrap();
        assert!(read(&mut reader, "q", 1).is_empty());
        assert_eq!(rows(&mut reader, "q"), 0);
    }
    sender.batch_execute("BEGIN").unwrap();
    send(&mut sender, "q", 1);
    assert_eq!(code(sender.batch_execute("SELECT 1/0")), "22012");
    sender.batch_execute("COMMIT").unwrap();
    assert!(read(&mut reader, "q", 1).is_empty());
    let kept = send(&mut sender, "q", 2);
    assert_eq!(drain(&mut reader, "q"), [kept]);
}

#[test]
fn invariant_1_send_rolled_back_to_a_savepoint_never_is_delivered() {
    let database = database_with(&["q"]);
    let (mut sender, mut reader) = (session(&database), session(&database));
    assert!(read(&mut reader, "q", 1).is_empty()); // tracked from here on
    let mut kept = Vec::new();
    sender.batch_execute("BEGIN").unwrap();
    kept.push(send(&mut sender, "q", 1));
    sender.batch_execute("SAVEPOINT a").unwrap();
    send(&mut sender, "q", 2);
    sender.batch_execute("SAVEPOINT b").unwrap();
    send_many(&mut sender, "q", 300);
    sender.batch_execute("RELEASE b; ROLLBACK TO a").unwrap();
    kept.push(send(&mut sender, "q", 3));
    sender.batch_execute("SAVEPOINT c").unwrap();
    kept.push(send(&mut sender, "q", 4));
    sender.batch_execute("RELEASE c; SAVEPOINT d").unwrap();
    // An exception block is a savepoint too.
    sender
        .batch_execute(
            "DO $$ BEGIN
                 BEGIN PERFORM queue_send('q', '5'); RAISE 'no'; EXCEPTION WHEN raise_exception THEN END;
             END $$",
        )
        .unwrap();
    kept.push(send(&mut sender, "q", 6));
    sender.batch_execute("COMMIT").unwrap();
    assert_eq!(drain(&mut reader, "q"), kept);
    assert_eq!(rows(&mut reader, "q"), 0);
}

#[test]
fn invariant_1_unfinished_message_is_delivered_again() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let msg_id = send(&mut client, "q", 1);
    for count in 1..=3 {
        let got = try_read(&mut client, "q", 1, Some("50 ms"), LONG).unwrap();
        assert_eq!((got[0].msg_id, got[0].count), (msg_id, count));
    }
}

#[test]
fn invariant_1_own_message_is_read_and_finished_in_the_transaction_that_sent_it() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    for end in ["COMMIT", "ROLLBACK"] {
        client.batch_execute("BEGIN").unwrap();
        let (finished, leased, waiting) =
            (send(&mut client, "q", 1), send(&mut client, "q", 2), send(&mut client, "q", 3));
        let got = read(&mut client, "q", 2);
        assert_eq!(ids(&got), [finished, leased]);
        assert!(delete(&mut client, "q", &got[0]));
        assert!(read(&mut other, "q", 9).is_empty());
        client.batch_execute(end).unwrap();
        if end == "COMMIT" {
            assert_eq!(ids(&read(&mut other, "q", 9)), [waiting], "the leased one is leased to everybody");
            assert!(delete(&mut other, "q", &got[1]), "and its lease may be finished by anybody");
        } else {
            assert!(read(&mut other, "q", 9).is_empty());
        }
    }
}

#[test]
fn invariant_1_more_messages_than_a_transaction_remembers_are_all_delivered() {
    let database = database_with(&["q"]);
    let (mut sender, mut reader) = (session(&database), session(&database));
    assert!(read(&mut reader, "q", 1).is_empty()); // tracked from here on
    sender
        .batch_execute(
            "BEGIN;
             INSERT INTO queue.q (message) SELECT to_jsonb(n) FROM generate_series(1, 99990) n;
             SAVEPOINT s;
             INSERT INTO queue.q (message) SELECT to_jsonb(n) FROM generate_series(1, 100) n;
             ROLLBACK TO s;
             INSERT INTO queue.q (message) SELECT to_jsonb(n) FROM generate_series(1, 50) n;
             COMMIT",
        )
        .unwrap();
    let mut delivered = 0;
    let mut patience = Patience::default();
    loop {
        match pop(&mut reader, "q", 30_000) {
            0 if patience.is_over() || !has_ready(&mut reader, "q") => break,
            0 => {}
            count => {
                delivered += count;
                patience = Patience::default();
            }
        }
    }
    assert_eq!(delivered, 100_040);
    assert_eq!(rows(&mut reader, "q"), 0);
}

// ---- 2. Commit order is not id order ------------------------------------------------------------------------

#[test]
fn invariant_2_commit_order_is_not_id_order() {
    let database = database_with(&["q"]);
    let (mut late, mut early, mut reader) = (session(&database), session(&database), session(&database));
    for round in 0..2 {
        if round == 1 {
            assert!(read(&mut reader, "q", 1).is_empty()); // the second time everything is tracked
        }
        late.batch_execute("BEGIN").unwrap();
        let low = send(&mut late, "q", 1);
        let high = send(&mut early, "q", 2);
        assert!(low < high);
        assert_eq!(drain(&mut reader, "q"), [high]);
        late.batch_execute("COMMIT").unwrap();
        assert_eq!(drain(&mut reader, "q"), [low]);
    }
}

#[test]
fn invariant_2_late_committers_among_many_lose_nothing() {
    let database = database_with(&["q", "done"]);
    let mut work = Vec::new();
    for seed in 0..4i64 {
        let sender = session(&database);
        work.push(
            sender
                .run_with(move |client| {
                    let mut sent = Vec::new();
                    for n in 0..40i64 {
                        client.batch_execute("BEGIN").unwrap();
                        let id = send(client, "q", n);
                        // Holds its id for a while, so that others with higher ones commit first.
                        for _ in 0..(n + seed) % 4 {
                            client.batch_execute("SELECT 1").unwrap();
                        }
                        if (n * 7 + seed) % 5 == 0 {
                            client.batch_execute("ROLLBACK").unwrap();
                        } else {
                            client.batch_execute("COMMIT").unwrap();
                            sent.push(id);
                        }
                    }
                    sent
                })
                .unwrap(),
        );
    }
    let mut readers = Vec::new();
    for _ in 0..2 {
        readers.push(
            session(&database)
                .run_with(|client| {
                    let mut got = Vec::new();
                    loop {
                        let batch = ids(&try_read(client, "q", 5, None, "100 ms").unwrap());
                        if batch.is_empty() && !read(client, "done", 1).is_empty() {
                            got.extend(drain(client, "q"));
                            return got;
                        }
                        assert_eq!(delete_ids(client, "q", &batch), batch);
                        got.extend(batch);
                    }
                })
                .unwrap(),
        );
    }
    let mut sent: Vec<i64> = work.into_iter().flat_map(|running| running.join().unwrap().1).collect();
    send_many(&mut session(&database), "done", readers.len() as i64);
    let mut got: Vec<i64> = readers.into_iter().flat_map(|running| running.join().unwrap().1).collect();
    sent.sort_unstable();
    got.sort_unstable();
    assert_eq!(got, sent);
}

// ---- 3. One lease at a time ---------------------------------------------------------------------------------

#[test]
fn invariant_3_one_lease_at_a_time_among_many_readers() {
    let database = database_with(&["q"]);
    let mut sender = session(&database);
    assert!(read(&mut sender, "q", 1).is_empty()); // tracked from here on
    let sessions: Vec<_> = (0..8i64).map(|n| (n, session(&database))).collect();
    let sent = send_many(&mut sender, "q", 1_500);
    // Nobody goes on before all have something.
    let all_have_some = Arc::new(Barrier::new(sessions.len()));
    let readers: Vec<_> = sessions
        .into_iter()
        .map(|(n, session)| {
            let all_have_some = all_have_some.clone();
            session
                .run_with(move |client| {
                    let mut got = read_for(client, "q", 1 + n, "1 h");
                    all_have_some.wait();
                    loop {
                        let batch = read_for(client, "q", 1 + n, "1 h");
                        if batch.is_empty() {
                            return got;
                        }
                        got.extend(batch);
                    }
                })
                .unwrap()
        })
        .collect();
    let mut got = Vec::new();
    for reader in readers {
        let (_, part) = reader.join().unwrap();
        assert!(!part.is_empty(), "each reader took part");
        got.extend(part);
    }
    assert_eq!(sorted(ids(&got)), sent, "each message went to one reader");
    let leases: BTreeSet<i64> = got.iter().map(|delivery| delivery.lease_id).collect();
    assert_eq!(leases.len(), got.len(), "each delivery has a lease of its own");
}

#[test]
fn invariant_3_lost_lease_is_refused_everywhere() {
    let database = database_with(&["q"]);
    let (mut slow, mut quick) = (session(&database), session(&database));
    send(&mut slow, "q", 1);
    let lost = read_for(&mut slow, "q", 1, "50 ms").remove(0);
    let held = read_awaited(&mut quick, "q");
    assert_eq!((held.msg_id, held.count), (lost.msg_id, 2));
    assert_ne!(held.lease_id, lost.lease_id);
    assert!(!delete(&mut slow, "q", &lost));
    assert_eq!(code(delete_strictly(&mut slow, "q", &lost)), "P0002");
    assert_eq!(extend(&mut slow, "q", &lost, "1 h"), None);
    assert_eq!(retry(&mut slow, "q", &lost, None), "lost");
    assert!(!release(&mut slow, "q", &lost));
    let reject = slow
        .query_one("SELECT queue_reject('q', $1, $2)", &[&lost.msg_id, &lost.lease_id])
        .unwrap()
        .get::<_, String>(0);
    assert_eq!(reject, "lost");
    let archived = slow
        .query_one("SELECT queue_archive('q', $1, $2)", &[&lost.msg_id, &lost.lease_id])
        .unwrap()
        .get::<_, bool>(0);
    assert!(!archived);
    assert!(read(&mut slow, "q", 1).is_empty(), "none of it touched the running lease");
    assert!(delete(&mut quick, "q", &held));
}

#[test]
fn invariant_3_nobody_gets_a_message_whose_finish_waits_for_commit() {
    let database = database_with(&["q"]);
    let (mut worker, mut other) = (session(&database), session(&database));
    let mut scene = |end: &str, lease: &str| {
        send_many(&mut worker, "q", 2);
        // Two leases that end together: when the second comes again, the first one's end is past as well.
        let got = read_for(&mut worker, "q", 2, lease);
        worker.batch_execute("BEGIN").unwrap();
        if !delete(&mut worker, "q", &got[0]) {
            worker.batch_execute("ROLLBACK; SELECT queue_purge('q')").unwrap();
            return None;
        }
        let again = read_awaited(&mut other, "q");
        assert_eq!((again.msg_id, again.count), (got[1].msg_id, 2));
        assert!(read(&mut other, "q", 9).is_empty(), "the first waits for its finish to commit");
        worker.batch_execute(end).unwrap();
        let left = read(&mut other, "q", 9);
        if end == "COMMIT" {
            assert!(left.is_empty());
        } else {
            assert_eq!(
                (left[0].msg_id, left[0].count),
                (got[0].msg_id, 2),
                "its lease is over: ready and counted"
            );
        }
        assert!(delete(&mut other, "q", &again));
        Some(())
    };
    for end in ["COMMIT", "ROLLBACK"] {
        in_time(|lease| scene(end, lease));
    }
}

#[test]
fn invariant_3_lease_ids_never_repeat() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    let mut leases = BTreeSet::new();
    for _ in 0..200 {
        let got = read_one(&mut client, "q");
        assert!(leases.insert(got.lease_id));
        assert!(release(&mut client, "q", &got));
    }
}

// ---- 4. Finishing is transactional --------------------------------------------------------------------------

#[test]
fn invariant_4_finishing_is_transactional() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("CREATE TABLE ledger (msg_id bigint)").unwrap();
    send(&mut client, "q", 1);
    let ledger =
        |client: &mut Session| -> i64 { client.query_one("SELECT count(*) FROM ledger", &[]).unwrap().get(0) };
    for end in ["ROLLBACK", "COMMIT"] {
        let got = read_one(&mut client, "q");
        client.batch_execute("BEGIN").unwrap();
        client.execute("INSERT INTO ledger VALUES ($1)", &[&got.msg_id]).unwrap();
        delete_strictly(&mut client, "q", &got).unwrap();
        client.batch_execute(end).unwrap();
        if end == "ROLLBACK" {
            assert_eq!(ledger(&mut client), 0);
            assert_eq!(rows(&mut client, "q"), 1);
            assert!(release(&mut client, "q", &got), "the lease runs on");
        }
    }
    assert_eq!(ledger(&mut client), 1);
    assert_eq!(rows(&mut client, "q"), 0);
}

#[test]
fn invariant_4_effects_happen_once_however_often_leases_are_lost() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("CREATE TABLE ledger (msg_id bigint)").unwrap();
    let sent = send_many(&mut client, "q", 60);
    let consumers: Vec<_> = (0..4)
        .map(|seed: i64| {
            session(&database)
                .run_with(move |client| {
                    let (mut lost, mut step) = (0, seed);
                    loop {
                        step += 1;
                        // Some leases are so short that they end before the work is done.
                        let timeout = if step % 3 == 0 { "1 ms" } else { "20 s" };
                        let Some(got) = try_read(client, "q", 1, Some(timeout), "300 ms").unwrap().pop() else {
                            return lost;
                        };
                        client.batch_execute("BEGIN").unwrap();
                        client.execute("INSERT INTO ledger VALUES ($1)", &[&got.msg_id]).unwrap();
                        match delete_strictly(client, "q", &got) {
                            Ok(()) if step % 7 == 0 => {
                                client.batch_execute("ROLLBACK").unwrap();
                                release(client, "q", &got);
                            }
                            Ok(()) => client.batch_execute("COMMIT").unwrap(),
                            Err(error) => {
                                assert_eq!(error.code().map(|code| code.code()), Some("P0002"), "{error:?}");
                                client.batch_execute("ROLLBACK").unwrap();
                                lost += 1;
                            }
                        }
                    }
                })
                .unwrap()
        })
        .collect();
    let lost: i32 = consumers.into_iter().map(|consumer| consumer.join().unwrap().1).sum();
    assert!(lost > 0, "some leases were lost in the midst of the work");
    let done: Vec<i64> = client
        .query("SELECT msg_id FROM ledger ORDER BY 1", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(done, sent);
    assert_eq!(rows(&mut client, "q"), 0);
}

// ---- 5. A read that rolled back gives its lease back at once ------------------------------------------------

#[test]
fn invariant_5_read_that_rolled_back_gives_its_lease_back() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let (mut reader, mut other) = (session(&database), session(&database));
    reader
        .batch_execute("SELECT queue_alter('q', retry_delay => '1 h', retry_backoff => 1, retry_jitter => 0)")
        .unwrap();
    send(&mut reader, "q", 1);
    reader.batch_execute("BEGIN").unwrap();
    let first = read_one(&mut reader, "q");
    assert!(read(&mut other, "q", 1).is_empty());
    reader.batch_execute("ROLLBACK").unwrap();
    assert!(!delete(&mut reader, "q", &first), "the lease is gone");
    other.batch_execute("BEGIN").unwrap();
    assert_eq!(read_one(&mut other, "q").count, 2, "at once, and counted");
    other.batch_execute("ROLLBACK").unwrap();
    // From the second such in a row the queue's backoff applies.
    assert!(read(&mut other, "q", 1).is_empty());
    assert_eq!(state(&mut other, "q", first.msg_id).as_deref(), Some("delayed"));
    advance_clock(&mut other, "59 min");
    assert!(read(&mut other, "q", 1).is_empty(), "it comes after the backoff");
    advance_clock(&mut other, "2 min");
    assert_eq!(read_awaited(&mut other, "q").count, 3);
}

#[test]
fn invariant_5_read_rolled_back_to_a_savepoint_gives_its_lease_back() {
    let database = database_with(&["q"]);
    let (mut reader, mut other) = (session(&database), session(&database));
    send_many(&mut reader, "q", 3);
    reader.batch_execute("BEGIN").unwrap();
    let kept = read_one(&mut reader, "q");
    reader.batch_execute("SAVEPOINT a").unwrap();
    let undone = read_one(&mut reader, "q");
    reader.batch_execute("ROLLBACK TO a").unwrap();
    let got = read_one(&mut other, "q");
    assert_eq!((got.msg_id, got.count), (undone.msg_id, 2));
    reader.batch_execute("SAVEPOINT b").unwrap();
    let released = read_one(&mut reader, "q");
    reader.batch_execute("RELEASE b; COMMIT").unwrap();
    assert!(read(&mut other, "q", 9).is_empty());
    assert!(
        delete(&mut other, "q", &kept) && delete(&mut other, "q", &got) && delete(&mut other, "q", &released)
    );
}

#[test]
fn invariant_5_read_that_rolled_back_wakes_who_waits() {
    let database = database_with(&["q"]);
    let mut reader = session(&database);
    send(&mut reader, "q", 1);
    reader.batch_execute("BEGIN").unwrap();
    let got = read_for(&mut reader, "q", 1, "1 h");
    let waiting = reader_asleep(&database, "q");
    reader.batch_execute("ROLLBACK").unwrap();
    let (_, again) = joined(waiting);
    assert_eq!((again[0].msg_id, again[0].count), (got[0].msg_id, 2));
}

#[test]
fn invariant_5_lease_of_a_committed_read_outlives_its_session() {
    let database = database_with(&["q"]);
    let (mut reader, mut other) = (session(&database), session(&database));
    send_many(&mut reader, "q", 2);
    let got = read(&mut reader, "q", 2);
    let pid = reader.pid();
    drop(reader);
    database.wait_until_backend_gone(pid);
    assert!(read(&mut other, "q", 9).is_empty());
    assert!(extend(&mut other, "q", &got[0], "1 h").is_some());
    assert!(delete(&mut other, "q", &got[0]) && delete(&mut other, "q", &got[1]));
}

#[test]
fn invariant_5_lease_of_an_open_transaction_ends_with_its_session() {
    let database = database_with(&["q"]);
    let (mut reader, mut other) = (session(&database), session(&database));
    send(&mut reader, "q", 1);
    reader.batch_execute("BEGIN").unwrap();
    let got = read_for(&mut reader, "q", 1, "1 h");
    let pid = reader.pid();
    drop(reader);
    database.wait_until_backend_gone(pid);
    let again = read_one(&mut other, "q");
    assert_eq!((again.msg_id, again.count), (got[0].msg_id, 2));
}

// ---- 6. Reads don't degrade ---------------------------------------------------------------------------------

/// Buffers touched by one read.
fn buffers(client: &mut Session) -> i64 {
    let plan: serde_json::Value = client
        .query_one("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM queue_read('q')", &[])
        .unwrap()
        .get(0);
    let plan = &plan[0]["Plan"];
    assert_eq!(plan["Actual Rows"].as_f64(), Some(1.0), "a message was read: {plan}");
    ["Shared Hit Blocks", "Shared Read Blocks"].iter().map(|key| plan[key].as_i64().unwrap()).sum()
}

#[test]
fn invariant_6_reads_stay_flat_with_backlog_dead_rows_and_an_old_snapshot() {
    let database = database_with(&["q"]);
    let (mut client, mut holder) = (session(&database), session(&database));
    send_many(&mut client, "q", 6);
    buffers(&mut client); // warms the caches
    let at_first = (0..5).map(|_| buffers(&mut client)).min().unwrap();
    // One read or another may have to look at the catalog again: others' DDL, or VACUUM, makes the caches forget.
    let is_flat = |client: &mut Session| (0..5).any(|_| buffers(client) <= at_first + 2);
    send_many(&mut client, "q", 10_000);
    holder.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").unwrap();
    assert_eq!(rows(&mut holder, "q"), 10_006);
    assert!(is_flat(&mut client), "with a backlog");
    let mut finished = 0;
    wait_until("most of the backlog is finished", || {
        finished += pop(&mut client, "q", 9_000 - finished);
        finished == 9_000
    });
    client.batch_execute("VACUUM queue.q").unwrap();
    assert_eq!(rows(&mut holder, "q"), 10_006, "the dead rows cannot go while the snapshot is held");
    assert!(is_flat(&mut client), "behind dead rows");
    holder.batch_execute("COMMIT").unwrap();
}

#[test]
fn invariant_6_reads_write_nothing() {
    // Nothing else may write WAL here.
    let cluster = ClusterOptions::default()
        .set("autovacuum", "off")
        .set("wal_level", "minimal")
        .set("max_wal_senders", "0")
        .set("pg_queue.lease_flush_interval", "1 h")
        .start()
        .unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 500);
    client.batch_execute("VACUUM (FREEZE) queue.q").unwrap();
    client.batch_execute("CHECKPOINT").unwrap();
    read(&mut client, "q", 1);
    let wal = |client: &mut Session| -> String {
        client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).unwrap().get(0)
    };
    // A round may meet something of the server's own; a read that writes would spoil each.
    let is_silent = (0..5).any(|_| {
        let before = wal(&mut client);
        client.batch_execute("BEGIN").unwrap();
        for _ in 0..20 {
            let got = read_one(&mut client, "q");
            assert!(extend(&mut client, "q", &got, "1 h").is_some());
        }
        let assigned = client.query_one("SELECT pg_current_xact_id_if_assigned()::text", &[]).unwrap();
        assert_eq!(assigned.get::<_, Option<String>>(0), None, "a read takes no transaction id");
        client.batch_execute("COMMIT").unwrap();
        for _ in 0..20 {
            let got = read_one(&mut client, "q");
            assert!(release(&mut client, "q", &got));
        }
        before == wal(&mut client)
    });
    assert!(is_silent, "reads wrote WAL");
}

// ---- 7. Memory is bounded -----------------------------------------------------------------------------------

fn small_cluster() -> Cluster {
    ClusterOptions::default()
        .set("pg_queue.max_messages", "4096")
        .set("pg_queue.max_queues", "8")
        .set("pg_queue.ready_window", "512")
        .start()
        .unwrap()
}

/// Reads without finishing until there is nothing more to be had. (What has no room counts as ready: no patience with
/// it lasts until nothing is.)
fn lease_all(client: &mut Session, queue: &str) -> Vec<i64> {
    let (mut got, mut empty_reads) = (Vec::new(), 0);
    while empty_reads < 10 {
        let batch = read_for(client, queue, 500, "1 h");
        if batch.is_empty() {
            empty_reads += 1;
            std::thread::sleep(Duration::from_millis(10));
        } else {
            empty_reads = 0;
            got.extend(ids(&batch));
        }
    }
    got
}

#[test]
fn invariant_7_memory_is_bounded_and_everything_is_delivered() {
    let cluster = small_cluster();
    let database = database_on(&cluster, &["a", "b", "c"]);
    let mut client = session(&database);
    let mut sent = BTreeMap::new();
    for queue in ["a", "b", "c"] {
        sent.insert(queue, send_many(&mut client, queue, 5_000));
    }
    // In order, as room appears; the queues in turn.
    let mut got: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
    let mut patience = Patience::default();
    loop {
        let mut is_empty = true;
        for queue in ["a", "b", "c"] {
            let batch = ids(&read(&mut client, queue, 700));
            is_empty &= batch.is_empty();
            delete_ids(&mut client, queue, &batch);
            got.entry(queue).or_default().extend(batch);
        }
        if !is_empty {
            patience = Patience::default();
        } else if patience.is_over() || !["a", "b", "c"].iter().any(|queue| has_ready(&mut client, queue)) {
            break;
        }
    }
    assert!(got == sent, "everything came, in order");
    drop(database);
    no_queue_starves_another(&cluster);
    later_messages_cost_no_memory(&cluster);
    own_messages_keep_their_leases(&cluster);
}

fn no_queue_starves_another(cluster: &Cluster) {
    let database = database_on(cluster, &["greedy", "modest"]);
    let mut client = session(&database);
    let sent = send_many(&mut client, "greedy", 10_000);
    let held = lease_all(&mut client, "greedy");
    assert!(held.len() > 2_000 && held.len() <= 4_096, "{} leases fill the dispatcher", held.len());
    let others = send_many(&mut client, "modest", 600);
    assert_eq!(drain(&mut client, "modest"), others);
    // What had no room is still there, and a finish without a slot works, also when it is undone.
    let unheld = *sent.last().unwrap();
    assert!(!held.contains(&unheld));
    client.batch_execute("BEGIN").unwrap();
    assert!(delete_id(&mut client, "greedy", unheld));
    client.batch_execute("ROLLBACK").unwrap();
    delete_ids(&mut client, "greedy", &held);
    let rest: Vec<i64> = sent.iter().copied().filter(|id| !held.contains(id)).collect();
    assert!(sorted(drain(&mut client, "greedy")) == rest, "what had no room came as room appeared");
}

/// What a transaction sends and reads itself is leased, and counted, when it commits: else it is not given it.
fn own_messages_keep_their_leases(cluster: &Cluster) {
    let database = database_on(cluster, &["greedy", "own"]);
    let (mut greedy, mut client, mut other) = (session(&database), session(&database), session(&database));
    client.batch_execute("BEGIN").unwrap();
    let sent = send_many(&mut client, "own", 2_000);
    let held = read_for(&mut client, "own", 300, "1 h");
    assert_eq!(ids(&held), sent[..300], "there is room");
    client.batch_execute("SAVEPOINT s").unwrap();
    assert_eq!(ids(&read_for(&mut client, "own", 10, "1 h")), sent[300..310]);
    client.batch_execute("ROLLBACK TO s").unwrap();
    send_many(&mut greedy, "greedy", 10_000);
    lease_all(&mut greedy, "greedy");
    // The ten have theirs; for others there is none.
    assert_eq!(ids(&read_for(&mut client, "own", 500, "1 h")), sent[300..310]);
    client.batch_execute("ROLLBACK TO s; COMMIT").unwrap();
    let rest = read_for(&mut other, "own", 2_000, "1 h");
    assert!(rest.iter().all(|one| !sent[..300].contains(&one.msg_id)), "a lease was forgotten");
    let counts: BTreeMap<i64, i64> = rest.iter().map(|one| (one.msg_id, one.count)).collect();
    assert!(sent[300..310].iter().all(|msg_id| counts.get(msg_id) == Some(&3)), "{counts:?}");
    for one in held.iter().chain(&rest) {
        assert!(delete(&mut client, "own", one), "the lease holds");
    }
    // What is rolled back is room again.
    drain(&mut client, "own");
    // Of what is gone for good nothing is held.
    client
        .batch_execute(
            "DO $$ BEGIN FOR i IN 1..5000 LOOP
                 PERFORM queue_send('own', '1');
                 ASSERT (SELECT count(*) FROM queue_pop('own')) = 1, i;
             END LOOP; END $$",
        )
        .unwrap();
    let mut held = Vec::new();
    for _ in 0..3 {
        client.batch_execute("BEGIN").unwrap();
        send_many(&mut client, "own", 2_000);
        held.push(read_for(&mut client, "own", 2_000, "1 h").len());
        client.batch_execute("ROLLBACK").unwrap();
    }
    assert!(held[0] >= 200 && held[1..] == held[..2], "{held:?}");
}

fn later_messages_cost_no_memory(cluster: &Cluster) {
    let database = database_on(cluster, &["later", "now"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_send_batch('later', array(SELECT to_jsonb(n) FROM generate_series(1, 10000) n),
                                     delay => '1 h')",
        )
        .unwrap();
    let soon = send_delayed(&mut client, "later", "300 ms");
    send_many(&mut client, "now", 5_000);
    assert!(lease_all(&mut client, "now").len() > 2_000, "they take nobody's place");
    assert_eq!(read_awaited(&mut client, "later").msg_id, soon, "what is due comes all the same");
    assert!(read(&mut client, "later", 1).is_empty());
}

// ---- 8. Waiting costs nothing -------------------------------------------------------------------------------

#[test]
fn invariant_8_waiting_reader_is_woken_by_the_commit() {
    let database = database_with(&["q"]);
    let mut sender = session(&database);
    let reading = reader_asleep(&database, "q");
    sender.batch_execute("BEGIN").unwrap();
    let msg_id = send(&mut sender, "q", 1);
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    assert!(!reading.is_done());
    sender.batch_execute("COMMIT").unwrap();
    assert_eq!(ids(&joined(reading).1), [msg_id]);
}

#[test]
fn invariant_8_waiting_reader_is_woken_when_a_delay_or_lease_ends() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let reading = reader_asleep(&database, "q");
    let msg_id = send_delayed(&mut client, "q", "200 ms");
    let (_, got) = joined(reading);
    assert_eq!(ids(&got), [msg_id]);
    // A lease that ends sooner than it was to when the reader fell asleep.
    let reading = reader_asleep(&database, "q");
    assert!(extend(&mut client, "q", &got[0], "200 ms").is_some());
    let (_, got) = joined(reading);
    assert_eq!(got[0].count, 2);
    // And one whose end it knows from the first, if it is not too late for that.
    assert!(extend(&mut client, "q", &got[0], "200 ms").is_some());
    assert_eq!(joined(start_read(session(&database), "q")).1[0].count, 3);
}

#[test]
fn invariant_8_reader_of_several_queues_is_woken_by_any() {
    let database = database_with(&["a", "b", "c"]);
    let mut sender = session(&database);
    for queue in ["c", "a", "b"] {
        let reading = session(&database)
            .run("SELECT queue, msg_id FROM queue_read_any(array['a', 'b', 'c'], wait => '25 s')")
            .unwrap();
        database.wait_until_backend_waits(reading.pid(), "Extension", None);
        let msg_id = send(&mut sender, queue, 1);
        let got = reading.join().unwrap().1.unwrap();
        assert_eq!((got[0].get::<_, &str>(0), got[0].get::<_, i64>(1)), (queue, msg_id));
    }
}

#[test]
fn invariant_8_n_messages_wake_n_readers() {
    // Alone on its server: other sessions' DDL may wake any backend.
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    // Whoever of them is awake by chance when the messages come may pass a wake-up on: one round of several is to show
    // that the others sleep on.
    let rest_slept_through = (0..5).any(|_| {
        let waiting: Vec<Reading> = (0..6).map(|_| reader_asleep(&database, "q")).collect();
        let before = settled(&mut client, &waiting);
        send_many(&mut client, "q", 2);
        wait_until("two readers are served", || {
            waiting.iter().filter(|reading| reading.is_done()).count() >= 2
        });
        let (done, rest): (Vec<_>, Vec<_>) = waiting.into_iter().partition(Reading::is_done);
        assert_eq!(done.len(), 2);
        finish(done);
        let after = settled(&mut client, &rest);
        let slept_through = after.iter().all(|(pid, sleeps)| before[pid] == *sleeps);
        send_many(&mut client, "q", 4);
        finish(rest);
        slept_through
    });
    assert!(rest_slept_through, "more were woken than there were messages");
}

/// Each of these reads gets one message, and finishes it.
fn finish(readings: Vec<Reading>) {
    for reading in readings {
        let (mut session, got) = joined(reading);
        assert_eq!(got.len(), 1);
        assert!(delete(&mut session, "q", &got[0]));
    }
}

/// Returns when all of these readers sleep and have done so for a while: how often each has gone to sleep, by its PID.
fn settled(client: &mut Session, waiting: &[Reading]) -> BTreeMap<i32, u64> {
    let pids: Vec<i32> = waiting.iter().map(Reading::pid).collect();
    let mut settled = BTreeMap::new();
    let mut since = Instant::now();
    wait_until("the waiters sleep", || {
        let sql =
            "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY ($1) AND wait_event_type = 'Extension'";
        let asleep: i64 = client.query_one(sql, &[&pids]).unwrap().get(0);
        let now: BTreeMap<i32, u64> = pids.iter().map(|pid| (*pid, sleeps(*pid))).collect();
        if asleep < pids.len() as i64 || now != settled {
            (settled, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_millis(50)
    });
    settled
}

#[test]
fn invariant_8_no_wake_up_is_lost() {
    let database = database_with(&["q", "back"]);
    const READERS: i64 = 6;
    const SENDERS: i64 = 3;
    const EACH: i64 = 30;
    let readers: Vec<_> = (0..READERS)
        .map(|_| {
            session(&database)
                .run_with(|client| loop {
                    let got = try_read(client, "q", 1, None, LONG).unwrap();
                    assert!(!got.is_empty(), "a wake-up was lost");
                    assert!(delete(client, "q", &got[0]));
                    if got[0].message == serde_json::json!(-1) {
                        return;
                    }
                    send(client, "back", got[0].msg_id);
                })
                .unwrap()
        })
        .collect();
    // Each waits for an answer before it sends the next: a lost wake-up stands still.
    let senders: Vec<_> = (0..SENDERS)
        .map(|_| {
            session(&database)
                .run_with(|client| {
                    for n in 0..EACH {
                        send(client, "q", n);
                        let answer = read_awaited(client, "back");
                        assert!(delete(client, "back", &answer));
                    }
                })
                .unwrap()
        })
        .collect();
    for sender in senders {
        sender.join().unwrap();
    }
    let mut client = session(&database);
    for _ in 0..READERS {
        send(&mut client, "q", -1);
    }
    for reader in readers {
        reader.join().unwrap();
    }
    assert_eq!(rows(&mut client, "q") + rows(&mut client, "back"), 0);
}

#[test]
fn invariant_8_cancelled_waiter_takes_no_wake_up_with_it() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let (first, second) = (reader_asleep(&database, "q"), reader_asleep(&database, "q"));
    client.execute("SELECT pg_cancel_backend($1)", &[&first.pid()]).unwrap();
    let (mut session, result) = first.join().unwrap();
    assert_eq!(code(result), "57014");
    let msg_id = send(&mut client, "q", 1);
    assert_eq!(ids(&joined(second).1), [msg_id]);
    let again = send(&mut client, "q", 2);
    assert_eq!(read_one(&mut session, "q").msg_id, again, "the cancelled session is sound");
}

#[test]
fn invariant_8_waiting_reader_is_in_nobodys_way() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    // It waits for longer than anybody does for a lock.
    let reading = session(&database).run_with(|client| try_read(client, "q", 1, None, "50 s")).unwrap();
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    let sql = "SELECT count(*) FROM pg_locks WHERE pid = $1 AND locktype = 'relation' \
               AND relation IN (SELECT oid FROM pg_class WHERE relnamespace = 'queue'::regnamespace)";
    // Waited for: it may have slept while another was restoring the new queue's leases, and that with a lock.
    wait_until("it sleeps without a lock", || {
        client.query_one(sql, &[&reading.pid()]).unwrap().get::<_, i64>(0) == 0
    });
    client
        .batch_execute(
            "SET lock_timeout = '30 s';
             ALTER TABLE queue.q ADD COLUMN note text;
             TRUNCATE queue.q;
             SELECT queue_alter('q', visibility_timeout => '1 min')",
        )
        .unwrap();
    let msg_id = send(&mut client, "q", 1);
    assert_eq!(ids(&joined(reading).1), [msg_id]);
}

#[test]
fn invariant_8_wait_ends_empty_before_the_statement_timeout() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    assert!(read(&mut client, "q", 1).is_empty()); // what a session does once is done
    client.batch_execute("SET statement_timeout = '1 s'").unwrap();
    // It ends a tenth of a second before: one that was kept from running for as long tries again.
    let is_empty = (0..5).any(|_| match try_read(&mut client, "q", 1, None, LONG) {
        Ok(got) => {
            assert_eq!(got, []);
            true
        }
        Err(error) => {
            assert_eq!(code::<()>(Err(error)), "57014");
            false
        }
    });
    assert!(is_empty, "it was cancelled each time");
}

#[test]
fn invariant_8_senders_never_take_the_global_lock_of_notify() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let sender = session(&database);
    // In the COMMIT callback every lock of the transaction is still held.
    let mut hold = Hold::backend(&database, "publish", sender.pid());
    let sending = sender.run("SELECT queue_send('q', '1')").unwrap();
    hold.wait_reached();
    let locks = client
        .query("SELECT mode FROM pg_locks WHERE pid = $1 AND locktype = 'relation'", &[&sending.pid()])
        .unwrap();
    assert!(!locks.is_empty(), "it still holds its locks");
    let global = "SELECT FROM pg_locks WHERE pid = $1 AND (locktype = 'object' OR mode LIKE '%Exclusive%' \
                  AND mode <> 'RowExclusiveLock' AND locktype NOT IN ('virtualxid', 'transactionid'))";
    assert!(client.query(global, &[&sending.pid()]).unwrap().is_empty());
    hold.release();
    sending.join().unwrap().1.unwrap();
}

// ---- 9. Locks in the dispatcher are held for microseconds -----------------------------------------------------

#[test]
fn invariant_9_no_backend_that_stands_still_holds_the_dispatchers_lock() {
    // (where, on which queue, by which statements)
    let cases = [
        ("attach", "fresh", "SELECT queue_read('fresh')"),
        ("finish-deleted", "q", "SELECT queue_delete('q', 1)"),
        ("finish-verify", "q", "SELECT queue_delete('q', 20)"),
        ("load-row", "deep", "SELECT queue_read('deep')"),
        ("load-snapshot", "untracked", "SELECT queue_read('untracked')"),
        ("publish", "q", "SELECT queue_send('q', '1')"),
        ("return", "q", "BEGIN; SELECT queue_read('q'); ROLLBACK"),
        ("take-fetch", "q", "SELECT queue_read('q')"),
        ("wait-sleep", "empty", "SELECT queue_read('empty', wait => '25 s')"),
    ];
    let database = database_with(&["q", "fresh", "deep", "untracked", "empty", "other"]);
    let mut client = session(&database);
    client.batch_execute("SET statement_timeout = '30 s'").unwrap();
    send_many(&mut client, "q", 20);
    read(&mut client, "q", 1);
    client.batch_execute("INSERT INTO queue.untracked (message) VALUES ('1')").unwrap();
    client
        .batch_execute("INSERT INTO queue.deep (message) SELECT to_jsonb(n) FROM generate_series(1, 600) n")
        .unwrap();
    for (point, queue, sql) in cases {
        let still = session(&database);
        let mut hold = Hold::backend(&database, point, still.pid());
        let standing = still.run_with(move |client| client.batch_execute(sql)).unwrap();
        hold.wait_reached();
        // The whole way of a message, in another queue and in the same one.
        for queue in ["other", queue] {
            send(&mut client, queue, 1);
        }
        let got = read_one(&mut client, "other");
        assert!(delete(&mut client, "other", &got), "{point}");
        if queue == "q" {
            let got = read_one(&mut client, "q");
            assert!(delete(&mut client, "q", &got), "{point}");
        }
        assert_eq!(hold.reached(), 1, "{point}: it still stands there");
        hold.release();
        standing.join().unwrap().1.unwrap();
    }
}

// ---- 10. Plain SQL works ------------------------------------------------------------------------------------

#[test]
fn invariant_10_plain_sql_works() {
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    // The first time nothing is tracked yet, the second time all is.
    for _ in 0..2 {
        let inserted: Vec<i64> = client
            .query("INSERT INTO queue.q (message) SELECT to_jsonb(n) FROM generate_series(1, 3) n RETURNING msg_id", &[])
            .unwrap()
            .iter()
            .map(|row| row.get(0))
            .collect();
        assert_eq!(drain(&mut reader, "q"), inserted);
    }
    let waiting = reader_asleep(&database, "q");
    client.batch_execute("INSERT INTO queue.q (message) VALUES ('\"woken\"')").unwrap();
    assert_eq!(joined(waiting).1[0].message, "woken");
    client
        .batch_execute("SET session_replication_role = replica; INSERT INTO queue.q (message) VALUES ('9')")
        .unwrap();
    assert_eq!(read_one(&mut reader, "q").message, 9);
}

#[test]
fn invariant_10_copy_is_noticed() {
    use std::io::Write;
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    assert!(read(&mut reader, "q", 1).is_empty());
    let waiting = reader_asleep(&database, "q");
    let mut copy = client.copy_in("COPY queue.q (message) FROM STDIN").unwrap();
    for n in 1..=1_000 {
        writeln!(copy, "{n}").unwrap();
    }
    assert_eq!(copy.finish().unwrap(), 1_000);
    assert_eq!(joined(waiting).1[0].message, 1);
    assert_eq!(drain(&mut reader, "q").len(), 999);
}

#[test]
fn invariant_10_update_is_noticed() {
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    let ids = send_many(&mut client, "q", 3);
    assert_eq!(read_for(&mut reader, "q", 1, "1 h").len(), 1);
    client
        .batch_execute(
            "UPDATE queue.q SET message = '\"changed\"';
             UPDATE queue.q SET visible_at = now() + interval '1 h' WHERE msg_id = 2",
        )
        .unwrap();
    let got = read_one(&mut reader, "q");
    assert_eq!((got.msg_id, &got.message), (ids[2], &serde_json::json!("changed")));
    assert!(read(&mut reader, "q", 9).is_empty(), "the second is put off");
    let waiting = reader_asleep(&database, "q");
    client.batch_execute("UPDATE queue.q SET visible_at = NULL WHERE msg_id = 2").unwrap();
    assert_eq!(joined(waiting).1[0].msg_id, ids[1], "and brought forward");
    client.batch_execute("UPDATE queue.q SET delivery_count = 7 WHERE msg_id = 3").unwrap();
    assert!(release(&mut reader, "q", &got));
    assert_eq!(read_one(&mut reader, "q").count, 8, "a higher count in the row counts");
}

#[test]
fn invariant_10_delete_is_noticed() {
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    let ids = send_many(&mut client, "q", 4);
    let held = read_one(&mut reader, "q");
    client.batch_execute("DELETE FROM queue.q WHERE msg_id IN (1, 2)").unwrap();
    assert!(!delete(&mut reader, "q", &held), "what is not there was not finished");
    client.batch_execute("BEGIN; DELETE FROM queue.q WHERE msg_id = 3; ROLLBACK").unwrap();
    assert_eq!(drain(&mut reader, "q"), ids[2..]);
}

#[test]
fn invariant_10_truncate_is_noticed() {
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    send_many(&mut client, "q", 500);
    let held = read_one(&mut reader, "q");
    client.batch_execute("BEGIN; TRUNCATE queue.q; ROLLBACK").unwrap();
    assert_eq!(read_one(&mut reader, "q").msg_id, held.msg_id + 1, "rolled back, it changes nothing");
    client
        .batch_execute(
            "BEGIN;
             INSERT INTO queue.q (message) VALUES ('\"before\"');
             TRUNCATE queue.q;
             INSERT INTO queue.q (message) VALUES ('\"after\"');
             COMMIT",
        )
        .unwrap();
    let got = read_one(&mut reader, "q");
    assert_eq!(got.message, "after");
    assert!(read(&mut reader, "q", 9).is_empty());
    assert!(!delete(&mut reader, "q", &held));
    client.batch_execute("TRUNCATE queue.q RESTART IDENTITY").unwrap();
    let sent = send(&mut client, "q", 1);
    assert_eq!(sent, 1, "an id that was leased before");
    assert!(!delete(&mut reader, "q", &held), "the old lease does not reach the new message");
    assert_eq!(drain(&mut reader, "q"), [sent]);
}

#[test]
fn invariant_10_prepared_transactions_are_noticed() {
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    for is_tracked in [false, true] {
        if is_tracked {
            assert!(read(&mut reader, "q", 1).is_empty());
        }
        let gid = format!("{}-{is_tracked}", database.name);
        client.batch_execute("BEGIN").unwrap();
        let sent = vec![send(&mut client, "q", 1), send(&mut client, "q", 2)];
        client.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).unwrap();
        assert!(read(&mut reader, "q", 9).is_empty());
        let waiting = reader_asleep(&database, "q");
        client.batch_execute(&format!("COMMIT PREPARED '{gid}'")).unwrap();
        let (mut session, mut got) = joined(waiting);
        got.push(read_awaited(&mut session, "q"));
        assert_eq!(ids(&got), sent);
        delete_ids(&mut session, "q", &sent);
        client.batch_execute("BEGIN").unwrap();
        send(&mut client, "q", 3);
        client.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).unwrap();
        client.batch_execute(&format!("ROLLBACK PREPARED '{gid}'")).unwrap();
        assert!(read(&mut reader, "q", 9).is_empty());
    }
}

#[test]
fn invariant_10_prepare_with_a_lease_or_truncate_is_refused() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let msg_id = send(&mut client, "q", 1);
    let gid = &database.name;
    for sql in [
        "SELECT queue_read('q')",
        "SELECT queue_delete('q', 1)",
        "SELECT queue_retry('q', 1, delay => '0')",
        "TRUNCATE queue.q RESTART IDENTITY", // nobody would forget the leases when it commits
    ] {
        client.batch_execute(&format!("BEGIN; {sql}")).unwrap();
        assert_eq!(code(client.batch_execute(&format!("PREPARE TRANSACTION '{gid}'"))), "0A000", "{sql}");
        client.batch_execute("ROLLBACK").unwrap();
    }
    assert_eq!(read_one(&mut client, "q").msg_id, msg_id);
}

#[test]
fn invariant_10_grants_on_the_table_are_the_access_control() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let role = format!("{}_plain", database.name);
    client
        .batch_execute(&format!("CREATE ROLE {role}; GRANT INSERT ON queue.q TO {role}; SET ROLE {role}"))
        .unwrap();
    send(&mut client, "q", 1);
    assert_eq!(code(try_read(&mut client, "q", 1, None, "0")), "42501");
    client
        .batch_execute(&format!("RESET ROLE; REVOKE INSERT ON queue.q FROM {role}; SET ROLE {role}"))
        .unwrap();
    assert_eq!(code(try_send(&mut client, "q", 1)), "42501");
    client
        .batch_execute(&format!(
            "RESET ROLE; GRANT SELECT, UPDATE, DELETE ON queue.q TO {role}; SET ROLE {role}"
        ))
        .unwrap();
    assert_eq!(drain(&mut client, "q").len(), 1);
    client.batch_execute(&format!("RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")).unwrap();
}

#[test]
fn invariant_10_logical_replication_is_noticed() {
    let cluster = ClusterOptions::default().set("wal_level", "logical").start().unwrap();
    let (from, to) = (database_on(&cluster, &["q"]), database_on(&cluster, &["q"]));
    let (mut sender, mut reader) = (session(&from), session(&to));
    let first = send(&mut sender, "q", 1);
    sender.batch_execute("CREATE PUBLICATION p FOR TABLE queue.q").unwrap();
    sender.batch_execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')").unwrap();
    assert!(read(&mut reader, "q", 1).is_empty()); // tracked from here on
    reader
        .batch_execute(&format!(
            "CREATE SUBSCRIPTION s CONNECTION 'host={} dbname={} user=postgres' PUBLICATION p
             WITH (create_slot = false, slot_name = 's')",
            cluster.directory().display(),
            from.name
        ))
        .unwrap();
    wait_until("the table is copied, and what comes is applied", || {
        let sql = "SELECT FROM pg_subscription_rel WHERE srsubstate = 'r'";
        reader.query_opt(sql, &[]).unwrap().is_some()
    });
    let copied = read_awaited(&mut reader, "q");
    assert_eq!(copied.msg_id, first, "copied at first");
    assert!(delete(&mut reader, "q", &copied));
    let waiting = reader_asleep(&to, "q");
    let second = send(&mut sender, "q", 2);
    assert_eq!(joined(waiting).1[0].msg_id, second, "applied later");
    reader.batch_execute("DROP SUBSCRIPTION s").unwrap();
}
