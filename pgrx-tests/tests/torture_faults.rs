//! What befalls a server from outside (full disks, no room, no connections, failover, an administrator at work, a
//! pooler that dies) while clients send and consume: short rounds of torture, each with its faults, each judged by the
//! checker. And what a failover must keep, by hand.
//!
//! What this machine does not allow is said aloud (SKIPPED) and counted by `cargo xtask test`.

mod common;

use std::time::Duration;

use common::*;
use queue_tests::torture::faults;
use queue_tests::torture::round::{self, Plan};
use queue_tests::{skipped, wait_until, Cluster, ClusterOptions, Database, PgTree};

/// Runs these faults, each at least once, for at least so long.
#[track_caller]
fn torture(names: &[&str], length: Duration) {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let plan = Plan {
        seed: 5,
        length: length * rounds(),
        faults: faults::named(&names).unwrap(),
        senders: 3,
        consumers: 5,
        is_durable: false,
        break_rule: None,
        is_told: false,
    };
    let outcome = round::run(PgTree::from_env().unwrap(), plan).unwrap_or_else(|error| panic!("{error:#}"));
    for (name, strikes) in &outcome.strikes {
        if let Some(why) = &strikes.skipped {
            skipped(name, why);
        }
    }
    assert!(outcome.is_good(), "{outcome:#?}");
    eprintln!("{outcome:#?}");
}

/// How often the short form is to be repeated.
fn rounds() -> u32 {
    std::env::var("PG_QUEUE_TEST_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).map_or(1, |n: u32| n.min(10))
}

const AT_ONCE: Duration = Duration::ZERO;

#[test]
fn full_wal_disk_loses_and_doubles_nothing() {
    torture(&["wal-full"], AT_ONCE);
}

#[test]
fn full_table_disk_loses_and_doubles_nothing() {
    torture(&["tables-full"], AT_ONCE);
}

#[test]
fn full_dispatcher_loses_nothing_and_starves_no_queue() {
    torture(&["no-room"], AT_ONCE);
}

#[test]
fn running_out_of_connections_loses_nothing() {
    torture(&["out-of-connections"], AT_ONCE);
}

#[test]
fn maintenance_of_a_queues_table_loses_and_doubles_nothing() {
    torture(
        &["vacuum-full", "cluster", "reindex", "reindex-concurrently", "autovacuum"],
        Duration::from_secs(2),
    );
}

#[test]
fn prepared_transactions_outlive_crashes_under_load() {
    torture(&["prepared"], AT_ONCE);
}

#[test]
fn promotion_of_a_synchronous_standby_loses_nothing() {
    torture(&["promote-synchronous"], AT_ONCE);
}

#[test]
fn promotion_of_an_asynchronous_standby_loses_only_the_last() {
    torture(&["promote-asynchronous"], AT_ONCE);
}

#[test]
fn pooled_connections_lose_and_double_nothing_when_the_pooler_dies() {
    torture(&["kill-pooler"], AT_ONCE);
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
