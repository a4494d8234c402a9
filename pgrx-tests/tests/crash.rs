//! What dies: backends, workers, the launcher, the postmaster, at their worst moments. Afterwards every committed
//! message that was not finished is delivered, nothing else is, and the workers are back.
//!
//! Every test that kills has a cluster of its own. Each asserts that what it kills was in the midst of something.

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;

use common::*;
use queue_tests::{wait_until, wait_until_some, Cluster, ClusterOptions, Database, Running, Session, StopMode};

/// For a [`Scene`]: no lease is written while it lasts, so that none comes back.
fn start_cluster() -> Cluster {
    ClusterOptions::default().set("pg_queue.lease_flush_interval", "1 h").start().unwrap()
}

/// Work in flight on queue `q`: leases, open finishes, open sends, a commit that is not published yet.
struct Scene<'a> {
    database: Database<'a>,
    /// What must be delivered afterwards: message and least delivery count.
    expected: BTreeMap<i64, i64>,
    /// Open transactions.
    open: Vec<Session>,
    /// Calls that stand still.
    standing: Vec<(Hold, Running<()>)>,
    worker: i32,
}

impl<'a> Scene<'a> {
    /// With `in_mid_call` two backends stand still in the midst of a finish and of a commit.
    fn new(cluster: &'a Cluster, in_mid_call: bool) -> Self {
        let database = database_on(cluster, &["q"]);
        let mut client = session(&database);
        let sent = send_many(&mut client, "q", 10);
        let mut expected: BTreeMap<i64, i64> = sent.iter().map(|id| (*id, 1)).collect();
        let got = try_read(&mut client, "q", 4, Some("1 h"), "0").unwrap();
        assert!(delete(&mut client, "q", &got[0])); // finished
        expected.remove(&got[0].msg_id);
        assert_eq!(retry(&mut client, "q", &got[1], Some("0")), "retried"); // its count is written
        expected.insert(got[1].msg_id, 2);
        // The other two are leased.
        let mut reader = session(&database);
        reader.batch_execute("BEGIN").unwrap();
        assert_eq!(read(&mut reader, "q", 2).len(), 2);
        let mut finisher = session(&database);
        finisher.batch_execute("BEGIN").unwrap();
        let mine = read_one(&mut finisher, "q");
        assert!(delete(&mut finisher, "q", &mine));
        let mut sender = session(&database);
        sender.batch_execute("BEGIN").unwrap();
        send_many(&mut sender, "q", 5); // never committed
        let mut standing = Vec::new();
        if in_mid_call {
            let finishing = session(&database);
            let mut hold = Hold::backend(&database, "finish-deleted", finishing.pid());
            let running = finishing
                .run_with(|client| {
                    let sql = "SELECT queue_delete('q', msg_id, lease_id) FROM queue_read('q')";
                    assert!(client.query(sql, &[]).is_err(), "it was killed in it");
                })
                .unwrap();
            hold.wait_reached();
            standing.push((hold, running));
            let publishing = session(&database);
            let mut hold = Hold::backend(&database, "publish", publishing.pid());
            let running = publishing
                .run_with(|client| assert!(client.query("SELECT queue_send('q', '\"late\"')", &[]).is_err()))
                .unwrap();
            hold.wait_reached();
            standing.push((hold, running));
            let late: i64 = client
                .query_one("SELECT max(msg_id) FROM queue.q WHERE message = '\"late\"'", &[])
                .unwrap()
                .get(0);
            expected.insert(late, 1);
        }
        let worker = worker_pid(&database);
        Self { database, expected, open: vec![reader, finisher, sender], standing, worker }
    }

    /// The server runs again: nothing was lost, nothing came back, and there is a worker.
    fn check(mut self) {
        for session in &mut self.open {
            assert!(session.batch_execute("SELECT 1").is_err(), "its session died with the server");
        }
        for (hold, running) in self.standing {
            drop(hold);
            running.join().unwrap();
        }
        let mut client = session(&self.database);
        let mut got = BTreeMap::new();
        for delivery in read(&mut client, "q", 100) {
            assert!(delete(&mut client, "q", &delivery));
            assert!(got.insert(delivery.msg_id, delivery.count).is_none());
        }
        assert_eq!(got, self.expected);
        assert_eq!(rows(&mut client, "q"), 0);
        wait_until("there is a new worker", || {
            find_worker(&mut client, &self.database.name).is_some_and(|pid| pid != self.worker)
        });
        works(&self.database);
    }
}

#[test]
fn kill_backend_in_mid_call_loses_nothing() {
    let cluster = start_cluster();
    let scene = Scene::new(&cluster, true);
    let pid = scene.standing[0].1.pid();
    cluster.kill_backend(pid).unwrap();
    scene.check();
}

#[test]
fn kill_backend_in_commit_loses_nothing() {
    let cluster = start_cluster();
    let scene = Scene::new(&cluster, true);
    let pid = scene.standing[1].1.pid();
    cluster.kill_backend(pid).unwrap();
    scene.check();
}

#[test]
fn kill_postmaster_loses_nothing() {
    let cluster = start_cluster();
    // A backend at a wait point would not notice that its postmaster is gone.
    let scene = Scene::new(&cluster, false);
    cluster.kill_postmaster().unwrap();
    cluster.start().unwrap();
    scene.check();
}

#[test]
fn kill_all_processes_loses_nothing() {
    let cluster = start_cluster();
    let scene = Scene::new(&cluster, true);
    cluster.kill_all().unwrap();
    cluster.start().unwrap();
    scene.check();
}

#[test]
fn stop_immediate_loses_nothing() {
    let cluster = start_cluster();
    let scene = Scene::new(&cluster, true);
    cluster.restart(StopMode::Immediate).unwrap();
    scene.check();
}

#[test]
fn stop_fast_with_work_in_flight_loses_nothing() {
    let cluster = start_cluster();
    let scene = Scene::new(&cluster, false);
    create(&mut session(&scene.database), &["idle"]);
    let waiting = reader_asleep(&scene.database, "idle");
    cluster.restart(StopMode::Fast).unwrap();
    assert_terminated(waiting.join().unwrap().1);
    scene.check();
}

#[test]
fn kill_worker_in_the_midst_of_a_move_moves_once() {
    let cluster = start_cluster();
    let scene = Scene::new(&cluster, false);
    let mut client = session(&scene.database);
    client.batch_execute("SELECT queue_create('dead')").unwrap();
    client
        .batch_execute("SELECT queue_create('m', max_deliveries => 1, dead_letter_queue => 'dead', visibility_timeout => '50 ms')")
        .unwrap();
    send(&mut client, "m", 7);
    let mut hold = Hold::backend(&scene.database, "move-pinned", scene.worker);
    read(&mut client, "m", 1);
    hold.wait_reached();
    cluster.kill_backend(scene.worker).unwrap();
    drop(hold);
    let database = &scene.database;
    let mut client = session(database);
    // The count was not written: delivered once more, then moved.
    let again = read_awaited(&mut client, "m");
    assert_eq!(again.message, 7);
    let dead = read_awaited(&mut client, "dead");
    assert_eq!(dead.message, 7);
    assert_eq!((rows(&mut client, "m"), rows(&mut client, "dead")), (0, 1));
    scene.check();
}

#[test]
fn kill_launcher_loses_nothing_and_it_comes_back() {
    let cluster = start_cluster();
    let scene = Scene::new(&cluster, true);
    let mut client = session(&scene.database);
    let launcher = wait_until_some("the launcher runs", || launcher_pid(&mut client));
    cluster.kill_backend(launcher).unwrap();
    let mut client = session(&scene.database);
    wait_until("there is a new launcher", || launcher_pid(&mut client).is_some_and(|pid| pid != launcher));
    scene.check();
}

#[test]
fn cancelled_worker_loses_no_lease_and_serves_on() {
    let database = database_with(&["q", "held"]);
    let (mut client, mut locker) = (session(&database), session(&database));
    send(&mut client, "held", 1);
    let held = read_for(&mut client, "held", 1, "1 h").remove(0);
    let signal = |client: &mut Session, function: &str, pid: i32| {
        client.execute(&format!("SELECT {function}($1)"), &[&pid]).unwrap();
    };
    let check = |client: &mut Session| {
        works(&database);
        assert!(extend(client, "held", &held, "1 h").is_some(), "the lease runs on");
    };
    let blocked = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' \
                   AND datname = current_database() AND wait_event_type = 'Lock'";
    let told = "failed: canceling statement due to user request";
    let place = format!("database \"{}\"", database.name);
    signal(&mut client, "pg_cancel_backend", worker_pid(&database)); // asleep
    check(&mut client);
    // A worker that is called looks whether it is still wanted. The second time it is a new worker that looks.
    for is_new in [false, true] {
        let worker = worker_pid(&database);
        let logged = database.cluster.log().len();
        locker.batch_execute("BEGIN; LOCK TABLE pg_catalog.pg_extension IN ACCESS EXCLUSIVE MODE").unwrap();
        if is_new {
            signal(&mut client, "pg_terminate_backend", worker);
        }
        // It stands there for half a second, so that it may be missed: then it is called again.
        let mut looks = 0;
        wait_until("the worker was cancelled where it stood before the catalog", || {
            if looks % 100 == 0 {
                let call = format!("ALTER DATABASE {} SET work_mem = '4MB'", database.name);
                client.batch_execute(&call).unwrap();
            }
            looks += 1;
            let standing = client.query_opt(blocked, &[]).unwrap().map(|row| row.get(0));
            if let Some(standing) = standing.filter(|pid: &i32| is_new == (*pid != worker)) {
                signal(&mut client, "pg_cancel_backend", standing);
            }
            let log = database.cluster.log();
            let mut lines = log.get(logged..).unwrap_or_default().lines();
            lines.any(|line| line.contains(told) && line.contains(&place))
        });
        locker.batch_execute("ROLLBACK").unwrap();
        check(&mut client);
    }
}

#[test]
fn terminated_waiter_leaves_nothing_behind() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let waiting: Vec<Reading> = (0..3).map(|_| reader_asleep(&database, "q")).collect();
    let survivor = reader_asleep(&database, "q");
    for reading in waiting {
        let pid = reading.pid();
        client.execute("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
        assert_terminated(reading.join().unwrap().1);
        database.wait_until_backend_gone(pid);
    }
    let msg_id = send(&mut client, "q", 1);
    assert_eq!(ids(&joined(survivor).1), [msg_id]);
}

#[test]
fn terminated_transaction_gives_its_leases_back() {
    let database = database_with(&["q"]);
    let (mut client, mut holder) = (session(&database), session(&database));
    let sent = send_many(&mut client, "q", 4);
    holder.batch_execute("BEGIN").unwrap();
    let held = read_for(&mut holder, "q", 2, "1 h");
    assert!(delete(&mut holder, "q", &held[0]));
    // One more stands still between taking and fetching.
    let reader = session(&database);
    let mut hold = Hold::backend(&database, "take-fetch", reader.pid());
    let reading = start_read(reader, "q");
    hold.wait_reached();
    let got = read_one(&mut client, "q");
    assert_eq!(got.msg_id, sent[3], "the others are held");
    for pid in [holder.pid(), reading.pid()] {
        client.execute("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
    }
    hold.release();
    assert_terminated(reading.join().unwrap().1);
    database.wait_until_backend_gone(holder.pid());
    let mut again = Vec::new();
    wait_until("all three are delivered again", || {
        again.extend(read(&mut client, "q", 9));
        again.len() == 3
    });
    assert_eq!(sorted(ids(&again)), sent[..3]);
    assert!(again.iter().all(|delivery| delivery.count == 2), "{again:?}");
}

#[test]
fn terminated_loader_leaves_the_load_to_others() {
    let database = database_with(&["q"]);
    let (mut client, loader) = (session(&database), session(&database));
    let sent = send_many(&mut client, "q", 600);
    let mut hold = Hold::backend(&database, "load-row", loader.pid());
    let loading = start_read(loader, "q");
    hold.wait_reached();
    client.execute("SELECT pg_terminate_backend($1)", &[&loading.pid()]).unwrap();
    hold.release();
    assert_terminated(loading.join().unwrap().1);
    assert_eq!(drain(&mut client, "q"), sent);
}

#[test]
fn prepared_transaction_outlives_a_crash() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    for gid in ["kept", "undone"] {
        client.batch_execute("BEGIN").unwrap();
        send(&mut client, "q", 1);
        client.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).unwrap();
    }
    cluster.kill_all().unwrap();
    cluster.start().unwrap();
    let mut client = session(&database);
    assert!(read(&mut client, "q", 9).is_empty());
    let waiting = reader_asleep(&database, "q");
    client.batch_execute("ROLLBACK PREPARED 'undone'").unwrap();
    client.batch_execute("COMMIT PREPARED 'kept'").unwrap();
    assert_eq!(joined(waiting).1.len(), 1);
    assert!(read(&mut client, "q", 9).is_empty());
}

#[test]
fn settings_that_are_not_committed_reach_nobody_after_a_restart() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q", "p"]);
    let mut client = session(&database);
    set_worker(&database, false); // it would take the queues in before anybody else
    send(&mut client, "p", 1);
    send(&mut client, "q", 1);
    let failed = read_one(&mut client, "q");
    assert_eq!(retry(&mut client, "q", &failed, Some("0")), "retried");
    cluster.restart(StopMode::Fast).unwrap();
    let (mut client, mut altering) = (session(&database), session(&database));
    altering.batch_execute("BEGIN; SELECT queue_alter('q', max_deliveries => 1), queue_pause('p')").unwrap();
    send(&mut altering, "q", 2);
    send(&mut altering, "p", 2);
    assert_eq!(read_one(&mut client, "p").message, 1, "it is not paused yet");
    assert_eq!(read_one(&mut client, "q").count, 2, "nor is that one too many");
    altering.batch_execute("COMMIT").unwrap();
    assert!(read(&mut client, "p", 9).is_empty());
    client.batch_execute("SELECT queue_resume('p')").unwrap();
    assert_eq!(read_one(&mut client, "p").message, 2);
}

#[test]
fn unlogged_queue_is_empty_after_a_crash_and_works() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["kept"]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_create('q', unlogged => true)").unwrap();
    send_many(&mut client, "q", 5);
    let kept = send_many(&mut client, "kept", 5);
    assert_eq!(read(&mut client, "q", 2).len(), 2);
    let pid = client.pid();
    cluster.kill_backend(pid).unwrap();
    let mut client = session(&database);
    assert!(read(&mut client, "q", 9).is_empty());
    assert_eq!(drain(&mut client, "kept"), kept);
    works(&database);
}

/// Runs `work` on one connection after the other until `stop`, whatever happens to the server.
fn relentlessly(
    database: &Database,
    stop: &AtomicBool,
    mut work: impl FnMut(&mut postgres::Client) -> Result<(), postgres::Error>,
) {
    while !stop.load(Ordering::SeqCst) {
        let Ok(mut client) = database.connect() else {
            std::thread::yield_now();
            continue;
        };
        while !stop.load(Ordering::SeqCst) && work(&mut client).is_ok() {}
    }
}

#[test]
fn kills_under_load_lose_and_double_nothing() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    client.batch_execute("CREATE TABLE ledger (msg_id bigint, pid int)").unwrap();
    let (stop, acknowledged) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let count = |client: &mut postgres::Client| -> i64 {
        client.query_one("SELECT count(*) FROM ledger", &[]).unwrap().get(0)
    };
    std::thread::scope(|scope| {
        let (stop, acknowledged, database) = (&stop, &acknowledged, &database);
        for _ in 0..2 {
            scope.spawn(move || {
                relentlessly(database, stop, |client| {
                    let msg_id = try_send(client, "q", 1)?;
                    acknowledged.lock().unwrap().push(msg_id);
                    Ok(())
                });
            });
            scope.spawn(move || {
                relentlessly(database, stop, |client| {
                    for got in try_read(client, "q", 3, None, "200 ms")? {
                        client.batch_execute("BEGIN")?;
                        client.execute("INSERT INTO ledger VALUES ($1, pg_backend_pid())", &[&got.msg_id])?;
                        delete_strictly(client, "q", &got)?;
                        client.batch_execute("COMMIT")?;
                    }
                    Ok(())
                });
            });
        }
        for _ in 0..3 {
            let mut client = session(database);
            let before = count(&mut client);
            // Consumers that are at work right now.
            let victim: i32 = wait_until_some("some work is done, and a consumer works", || {
                let sql = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() \
                           AND pid IN (SELECT pid FROM ledger) AND backend_xid IS NOT NULL LIMIT 1";
                if count(&mut client) < before + 100 {
                    return None;
                }
                client.query_opt(sql, &[]).unwrap().map(|row| row.get(0))
            });
            cluster.kill_backend(victim).unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert_eq!(cluster.log().matches("reinitializing").count(), 3);
    let mut client = session(&database);
    let mut done: Vec<i64> =
        client.query("SELECT msg_id FROM ledger", &[]).unwrap().iter().map(|row| row.get(0)).collect();
    done.sort_unstable();
    let len = done.len();
    done.dedup();
    assert_eq!(done.len(), len, "no effect happened twice");
    // Leases of the sessions that ended are waited for.
    let mut rest = Vec::new();
    client.batch_execute("SELECT queue_release('q', array(SELECT msg_id FROM queue.q))").unwrap();
    while rows(&mut client, "q") > 0 {
        let got = read_awaited(&mut client, "q");
        assert!(delete(&mut client, "q", &got));
        rest.push(got.msg_id);
    }
    let all: std::collections::BTreeSet<i64> = done.iter().chain(&rest).copied().collect();
    assert_eq!(all.len(), done.len() + rest.len(), "nothing that is done comes again");
    let lost: Vec<i64> =
        acknowledged.into_inner().unwrap().into_iter().filter(|id| !all.contains(id)).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
}
