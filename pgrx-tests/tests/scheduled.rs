//! Millions of messages that are scheduled for tomorrow cost disk and nothing else: no slots, no memory of any process,
//! no time of those who send and read beside them. Figures go to stderr; what is asserted leaves room for a busy machine.
//!
//! Ten million of them in the long form (`cargo xtask test --long`; some 3 GB below /tmp), twenty thousand otherwise:
//! time.rs has a hundred thousand come when they are due.

mod common;

use std::io::Write;
use std::time::{Duration, Instant};

use common::*;
use postgres::Client;
use queue_tests::wait_points::advance_clock;
use queue_tests::{wait_until, ClusterOptions, Database, Session, StopMode};

const AT_ONCE: i64 = 10_000;

/// How many are scheduled, and how many turns of a sender and reader make one figure.
fn size() -> (i64, u32) {
    if std::env::var_os("PG_QUEUE_TEST_ROUNDS").is_some() {
        (10_000_000, 400)
    } else {
        (20_000, 100)
    }
}

/// Written where the test runner does not keep it from who looks on.
fn tell(what: &str) {
    std::io::stderr().write_all(format!("{what}\n").as_bytes()).unwrap();
}

/// What is measured with and without them.
#[derive(Debug)]
struct Figures {
    /// Messages that may be leased at one time: the slots that nothing else has.
    slots: usize,
    /// Send, read, finish, one after the other: the median.
    turn: Duration,
    /// A read of the queue itself, which has nothing ready: the median, and the worst.
    empty_read: [Duration; 2],
    /// Memory of its own, of the worker and of a session that has done all this, kB.
    anonymous_kb: [u64; 2],
    /// All of pg_queue's shared memory, bytes.
    shared: i64,
}

fn figures(database: &Database, client: &mut Session) -> Figures {
    // All are taken when two reads at some distance are empty.
    let (mut slots, mut empty) = (0, 0);
    while empty < 2 {
        match read_for(client, "beside", 256, "1 h").len() {
            0 => {
                empty += 1;
                std::thread::sleep(Duration::from_millis(100));
            }
            n => (slots, empty) = (slots + n, 0),
        }
    }
    client.batch_execute("SELECT queue_release('beside', array(SELECT msg_id FROM queue.beside))").unwrap();
    let (_, turns) = size();
    let mut took: Vec<Duration> = (0..turns)
        .map(|_| {
            let begun = Instant::now();
            send(client, "turns", 1);
            let got = read_one(client, "turns");
            assert!(delete(client, "turns", &got));
            begun.elapsed()
        })
        .collect();
    took.sort_unstable();
    let mut reads: Vec<Duration> = (0..turns)
        .map(|_| {
            let begun = Instant::now();
            assert!(read(client, "later", 10).is_empty());
            begun.elapsed()
        })
        .collect();
    reads.sort_unstable();
    let sql = "SELECT sum(allocated_size)::int8 FROM pg_shmem_allocations WHERE name LIKE 'pg_queue%'";
    Figures {
        slots,
        turn: took[took.len() / 2],
        empty_read: [reads[reads.len() / 2], reads[reads.len() - 1]],
        anonymous_kb: [worker_pid(database), client.pid()].map(anonymous_kb),
        shared: client.query_one(sql, &[]).unwrap().get(0),
    }
}

fn anonymous_kb(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Sizes of the table, its primary key and its index on `visible_at`, in MB.
fn sizes(client: &mut Client) -> String {
    let sql = "SELECT format('table %s MB, indexes: %s', pg_relation_size('queue.later') >> 20,
                   string_agg(format('%s %s', a.attname, pg_size_pretty(pg_relation_size(indexrelid))), ', '))
               FROM pg_index JOIN pg_attribute a ON a.attrelid = indrelid AND attnum = indkey[0]
               WHERE indrelid = 'queue.later'::regclass";
    client.query_one(sql, &[]).unwrap().get(0)
}

#[test]
fn messages_scheduled_for_tomorrow_cost_no_memory_and_slow_nothing_down() {
    let cluster = ClusterOptions::default()
        .set("pg_queue.max_messages", "4096")
        .set("pg_queue.max_queues", "8")
        .set("pg_queue.ready_window", "512")
        .set("max_wal_size", "512MB")
        .start()
        .unwrap();
    let database = database_on(&cluster, &["later", "beside", "turns"]);
    let mut client = session(&database);
    send_many(&mut client, "beside", 6_000);
    let without = figures(&database, &mut client);
    tell(&format!("without: {without:?}"));

    let (all, _) = size();
    let begun = Instant::now();
    let mut sender = session(&database);
    for _ in 0..all / AT_ONCE {
        let sql = "SELECT count(*) FROM queue_send_batch('later', array(SELECT to_jsonb(n) \
                   FROM generate_series(1, $1::int8) n), deliver_at => now() + interval '1 day')";
        assert_eq!(sender.query_one(sql, &[&AT_ONCE]).unwrap().get::<_, i64>(0), AT_ONCE);
    }
    let rate = all as f64 / begun.elapsed().as_secs_f64();
    tell(&format!(
        "{all} sent for tomorrow, {rate:.0}/s; {}; the sender has {} kB",
        sizes(&mut client),
        anonymous_kb(sender.pid())
    ));
    drop(sender);
    let with = figures(&database, &mut client);
    tell(&format!("with {all}: {with:?}"));
    let check = |with: &Figures| {
        assert!(with.slots + 64 > without.slots, "{} of {} slots are left", with.slots, without.slots);
        assert_eq!(with.shared, without.shared);
        for (now, before) in with.anonymous_kb.iter().zip(without.anonymous_kb) {
            assert!(*now < before + 16 * 1024, "{with:?}, {without:?}");
        }
        assert!(with.turn < without.turn * 4 + Duration::from_millis(2), "{with:?}, {without:?}");
        assert!(
            with.empty_read[0] < without.empty_read[0] * 4 + Duration::from_millis(2),
            "{with:?}, {without:?}"
        );
    };
    check(&with);
    // What comes before them does not wait for them.
    let soon = send_delayed(&mut client, "later", "300 ms");
    let begun = Instant::now();
    let got = read_awaited(&mut client, "later");
    assert_eq!(got.msg_id, soon);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert!(delete(&mut client, "later", &got));

    // A lease that was given back is forgotten for good when its row is swept.
    advance_clock(&mut client, "15 s");
    wait_until("no lease is written any more", || {
        client
            .query_one("SELECT count(*) = 0 FROM queue_catalog.lease WHERE until IS NOT NULL", &[])
            .unwrap()
            .get(0)
    });
    // The better of two starts: the machine may have been kept by others.
    let first_read = |client: Session| {
        drop(client);
        cluster.restart(StopMode::Fast).unwrap();
        let mut client = session(&database);
        let begun = Instant::now();
        assert_eq!(read(&mut client, "beside", 10).len(), 10);
        (begun.elapsed(), client)
    };
    let at_once = Duration::from_secs(2);
    let (mut beside, mut client) = first_read(client);
    if beside >= at_once {
        (beside, client) = first_read(client);
    }
    // Not bounded here: the first read of the queue itself walks past every one of them (51 s for ten million, in a debug
    // build on a busy machine), as it does after DDL on the table.
    let begun = Instant::now();
    assert!(read(&mut client, "later", 10).is_empty());
    let later = begun.elapsed();
    assert_eq!(state(&mut client, "later", 1).as_deref(), Some("delayed"));
    client.batch_execute("SELECT queue_release('beside', array(SELECT msg_id FROM queue.beside))").unwrap();
    let restarted = figures(&database, &mut client);
    tell(&format!(
        "after a restart: first read beside them in {beside:?}, of their queue in {later:?}; {restarted:?}"
    ));
    check(&restarted);
    assert!(beside < at_once, "{beside:?}");
    assert_eq!(rows(&mut client, "later"), all);
}
