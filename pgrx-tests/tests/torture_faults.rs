//! What befalls a server from outside (full disks, no room, no connections, failover, an administrator at work, a
//! pooler that dies) while clients send and consume: short rounds of torture, each with its faults, each judged by the
//! checker. And what a failover must keep, by hand.
//!
//! What this machine does not allow is said aloud (SKIPPED) and counted by `cargo xtask test`.

mod common;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::*;
use queue_tests::torture::faults;
use queue_tests::torture::round::{self, Outcome, Plan};
use queue_tests::{skipped, wait_until, Cluster, ClusterOptions, Database, PgTree};

/// Runs these faults, each at least once; in the long form again and again for a minute.
#[track_caller]
fn torture(names: &[&str]) -> Outcome {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let is_long = std::env::var_os("PG_QUEUE_TEST_ROUNDS").is_some();
    let plan = Plan {
        seed: seed(),
        length: Duration::from_secs(if is_long { 60 } else { 0 }),
        faults: faults::named(&names).unwrap(),
        senders: 3,
        consumers: 5,
        is_durable: false,
        quiet_one_in: 8,
        drain_limit: Duration::from_secs(30),
        break_rule: None,
        is_told: true,
    };
    println!("seed {} ({SEED_ENV} repeats it)", plan.seed);
    let outcome = round::run(PgTree::from_env().unwrap(), plan).unwrap_or_else(|error| panic!("{error:#}"));
    for (name, strikes) in &outcome.strikes {
        if let Some(why) = &strikes.skipped {
            skipped(name, why);
        }
    }
    println!("{outcome}");
    assert!(outcome.is_good());
    outcome
}

/// Another one each time, unless it is given.
const SEED_ENV: &str = "PG_QUEUE_TORTURE_SEED";

fn seed() -> u64 {
    let given = std::env::var(SEED_ENV).ok().map(|seed| seed.parse().expect("a seed is a number"));
    given.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() % 1_000_000)
}

#[test]
fn full_disks_lose_and_double_nothing() {
    torture(&["wal-full", "tables-full"]);
}

/// With killed servers in between: they load everything by the indexes that were just made.
#[test]
fn administrators_and_full_tables_of_the_server_lose_and_double_nothing() {
    torture(&[
        "vacuum-full",
        "cluster",
        "reindex",
        "reindex-concurrently",
        "autovacuum",
        "out-of-connections",
        "no-room",
        "prepared",
        "kill-all",
    ]);
}

#[test]
fn promotion_of_a_synchronous_standby_loses_nothing() {
    torture(&["promote-synchronous"]);
}

/// How much it loses is in the report.
#[test]
fn promotion_of_an_asynchronous_standby_loses_only_the_last() {
    let outcome = torture(&["promote-asynchronous"]);
    assert!(outcome.verdict.failover_lost > 0, "nothing was lost: then it was not behind");
}

#[test]
fn pooled_connections_lose_and_double_nothing_when_the_pooler_dies() {
    torture(&["kill-pooler"]);
}

#[test]
fn written_leases_survive_a_promotion_with_fence_and_count() {
    let primary = Cluster::start_new().unwrap();
    let database = database_on(&primary, &["q"]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_create('d', durable_leases => true)").unwrap();
    let standby = ClusterOptions::default().start_standby_of(&primary).unwrap();
    let sent = [send_many(&mut client, "q", 3), send_many(&mut client, "d", 1)].concat();
    // One is delivered for the second time.
    assert!(release_counted(&mut client, "q"));
    worker_pid(&database); // without one a durable read is refused
    let held = read_for(&mut client, "q", 3, "1 h");
    let durable = read_for(&mut client, "d", 1, "1 h").remove(0);
    assert_eq!(sorted(ids(&held)), sent[..3]);
    wait_written(&mut client, "q", &sent[..3]);
    wait_written(&mut client, "d", &sent[3..]);
    standby.wait_until_replayed(&primary);
    primary.kill_all().unwrap();
    let copy = Database { cluster: &standby, name: database.name.clone() };
    let mut client = session(&copy);
    assert!(client.query_one("SELECT pg_promote()", &[]).unwrap().get::<_, bool>(0));
    // Nobody else gets them, and who held them goes on as if nothing had been.
    assert!(read(&mut client, "q", 9).is_empty());
    assert!(read(&mut client, "d", 9).is_empty());
    let mut forged = held[0].clone();
    forged.lease_id += 1;
    assert!(!delete(&mut client, "q", &forged), "the fence holds");
    assert!(extend(&mut client, "q", &held[0], "2 h").is_some());
    assert!(delete(&mut client, "q", &held[0]));
    assert!(delete(&mut client, "d", &durable));
    for one in &held[1..] {
        let sql = "SELECT state, delivery_count FROM queue_peek('q', msg_ids => array[$1::int8])";
        let row = client.query_one(sql, &[&one.msg_id]).unwrap();
        assert_eq!((row.get::<_, &str>(0), row.get::<_, i64>(1)), ("leased", one.count), "{one:?}");
    }
    // Given up, they come again, counted on from there.
    assert_eq!(retry(&mut client, "q", &held[1], Some("0")), "retried");
    let again = read_awaited(&mut client, "q");
    assert_eq!((again.msg_id, again.count), (held[1].msg_id, held[1].count + 1));
    wait_until("the promoted server has a worker", || find_worker(&mut client, &copy.name).is_some());
}

/// A delivery that counts and is over.
fn release_counted(client: &mut postgres::Client, queue: &str) -> bool {
    let one = read_one(client, queue);
    retry(client, queue, &one, Some("0")) == "retried"
}
