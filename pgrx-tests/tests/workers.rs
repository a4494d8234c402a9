//! Workers that behave: they are there wherever they are wanted, give way at once to whoever needs the database for
//! himself, come back, show what they do, and cost nothing while there is nothing to do. And what they must not
//! touch: a standby, a server that pg_upgrade runs.
//!
//! Whatever is measured against the clock here has a cluster of its own, whose worker has thousands of messages to
//! move at that moment; each test makes sure that it was at it.

mod common;
mod inventory;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::*;
use inventory::{furnish, Inventory, Leases};
use postgres::{Client, Error, NoTls};
use queue_tests::wait_points::advance_clock;
use queue_tests::{
    skipped, wait_until, wait_until_some, Cluster, ClusterOptions, Database, PgTree, Session, StopMode,
};

/// How long a statement may take that needs what a worker uses, and how long until a worker is there.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How long it may take where the machine is kept by others meanwhile.
const IN_THE_END: Duration = Duration::from_secs(20);
/// Exhausted messages that a worker is given: more than it moves while a test goes on, for each takes it two milliseconds.
const BACKLOG: i64 = 8_000;

// ---- Load -----------------------------------------------------------------------------------------------------

/// How often what depends on the moment is repeated: `cargo xtask test --long` sets it.
fn rounds() -> usize {
    std::env::var("PG_QUEUE_TEST_ROUNDS").map_or(5, |text| text.parse().unwrap())
}

/// Sessions that send, read and finish in a database until they are stopped, whatever they meet meanwhile.
struct Load {
    stop: Arc<AtomicBool>,
    turns: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(database: &Database) -> Self {
        let mut load = Self { stop: Arc::default(), turns: Arc::default(), threads: Vec::new() };
        for _ in 0..2 {
            let config = database.cluster.config(&database.name);
            let (stop, turns) = (load.stop.clone(), load.turns.clone());
            let run = move || {
                while !stop.load(Ordering::SeqCst) {
                    let Ok(mut client) = config.connect(NoTls) else {
                        std::thread::sleep(Duration::from_millis(10)); // the server is away for a moment
                        continue;
                    };
                    while !stop.load(Ordering::SeqCst) && turn(&mut client).is_ok() {
                        turns.fetch_add(1, Ordering::SeqCst);
                    }
                }
            };
            load.threads.push(std::thread::spawn(run));
        }
        load.wait_busy();
        load
    }

    /// Returns when some more has been done.
    #[track_caller]
    fn wait_busy(&self) {
        let before = self.turns.load(Ordering::SeqCst);
        wait_until("the load goes on", || self.turns.load(Ordering::SeqCst) > before + 5);
    }

    /// Returns when its sessions are gone.
    fn stop(mut self, admin: &mut Client, database: &str) {
        self.end();
        wait_until("its sessions are gone", || {
            let sql = "SELECT FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'";
            admin.query(sql, &[&database]).unwrap().is_empty()
        });
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

/// Sends, some of it for later, reads, finishes most of it and lets the leases of the rest run out.
fn turn(client: &mut Client) -> Result<(), Error> {
    for sql in [
        "SELECT queue_send_batch('load', array(SELECT to_jsonb(n) FROM generate_series(1, 20) n))",
        "SELECT queue_send('load', '0', delay => '20 ms')",
        "SELECT queue_delete_batch('load', coalesce(array_agg(msg_id) FILTER (WHERE msg_id % 10 > 0), '{}'))
         FROM queue_read('load', 30, '30 ms')",
    ] {
        client.query(sql, &[])?;
    }
    Ok(())
}

const QUEUES: &str = "SELECT queue_create('q'), queue_create('dead');
    SELECT queue_create('load', max_deliveries => 2, dead_letter_queue => 'dead');
    SELECT queue_create('backlog', max_deliveries => 1, dead_letter_queue => 'dead');
    CREATE OR REPLACE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN PERFORM pg_sleep(0.002); RETURN OLD; END';
    CREATE TRIGGER slow BEFORE DELETE ON queue.backlog FOR EACH ROW EXECUTE FUNCTION public.slow()";

/// A cluster where nobody does anything but the test and our workers.
fn quiet_cluster() -> Cluster {
    ClusterOptions::default().set("autovacuum", "off").start().unwrap()
}

/// A database with the queues of the load.
fn loadable(cluster: &Cluster) -> Database<'_> {
    let database = cluster.create_database().unwrap();
    session(&database).batch_execute(QUEUES).unwrap();
    database
}

/// Gives the database's worker a backlog to move away, and returns when it has begun.
#[track_caller]
fn lay_backlog(client: &mut Client) {
    client.batch_execute("TRUNCATE queue.backlog, queue.dead").unwrap();
    send_many(client, "backlog", BACKLOG);
    let mut delivered = 0;
    wait_until("the backlog has been delivered", || {
        let got = read_for(client, "backlog", 10_000, "1 h");
        end_leases(client, "backlog", &got);
        delivered += got.len() as i64;
        delivered == BACKLOG
    });
    wait_until("the worker has begun with it", || rows(client, "backlog") < BACKLOG);
}

/// Returns the PID of the database's worker, in the midst of moving its backlog.
#[track_caller]
fn worker_at_work(admin: &mut Client, database: &str) -> i32 {
    let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' AND datname = $1 \
               AND state = 'active' AND query = 'moving exhausted messages'";
    wait_until_some("the worker moves what is exhausted", || {
        admin.query_opt(sql, &[&database]).unwrap().map(|row| row.get(0))
    })
}

/// Asserts that the worker has moved some of its backlog, and not all.
#[track_caller]
fn assert_midway(client: &mut Client) {
    let left = rows(client, "backlog");
    assert!((1..BACKLOG).contains(&left), "it was in the midst of it: {left} of {BACKLOG} left");
}

/// How long something took, each time.
struct Times {
    what: &'static str,
    all: Vec<Duration>,
}

impl Times {
    fn of(what: &'static str) -> Self {
        Self { what, all: Vec::new() }
    }

    fn time<T>(&mut self, f: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let value = f();
        self.all.push(begun.elapsed());
        value
    }

    fn median(&self) -> Duration {
        let mut all = self.all.clone();
        all.sort_unstable();
        all.get(all.len() / 2).copied().unwrap_or_default()
    }

    /// Tells the median and the worst, also where the test passes, and asserts that the median is within the bound. A
    /// single one may have met a machine that others kept.
    #[track_caller]
    fn check(&self, bound: Duration) {
        let (median, worst) = (self.median(), self.all.iter().max().copied().unwrap_or_default());
        tell(&format!("{}: {} times, median {median:.0?}, worst {worst:.0?}", self.what, self.all.len()));
        assert!(median <= bound && worst <= IN_THE_END, "{}: {:?}", self.what, self.all);
    }
}

/// Written where the test runner does not keep it from who looks on.
fn tell(what: &str) {
    std::io::stderr().write_all(format!("{what}\n").as_bytes()).unwrap();
}

fn postgres(cluster: &Cluster) -> Session {
    Session::from_client(cluster.connect("postgres").unwrap()).unwrap()
}

// ---- Giving way -----------------------------------------------------------------------------------------------

#[test]
fn drop_database_under_load_is_done_at_once() {
    let cluster = quiet_cluster();
    let mut admin = postgres(&cluster);
    let other = loadable(&cluster);
    let elsewhere = Load::start(&other);
    let mut times = Times::of("DROP DATABASE");
    for _ in 0..rounds() {
        let database = loadable(&cluster);
        let load = Load::start(&database);
        lay_backlog(&mut session(&database));
        load.stop(&mut admin, &database.name);
        let worker = worker_at_work(&mut admin, &database.name);
        times.time(|| admin.batch_execute(&format!("DROP DATABASE {}", database.name)).unwrap());
        other.wait_until_backend_gone(worker);
        elsewhere.wait_busy();
    }
    works(&other);
    times.check(AT_ONCE);
}

#[test]
fn create_database_from_a_template_under_load_is_done_at_once() {
    let cluster = quiet_cluster();
    let mut admin = postgres(&cluster);
    let (other, database) = (loadable(&cluster), loadable(&cluster));
    let elsewhere = Load::start(&other);
    let mut times = Times::of("CREATE DATABASE ... TEMPLATE");
    let mut plain = Times::of("CREATE DATABASE ... TEMPLATE template0");
    for _ in 0..rounds() {
        let load = Load::start(&database);
        lay_backlog(&mut session(&database));
        load.stop(&mut admin, &database.name);
        let worker = worker_at_work(&mut admin, &database.name);
        let copy = format!("{}_copy", database.name);
        let sql = format!("CREATE DATABASE {copy} TEMPLATE {}", database.name);
        times.time(|| admin.batch_execute(&sql).unwrap());
        // What the copying itself takes, with nobody in the way, is Postgres' own; of a bare database half as much or less.
        plain.time(|| admin.batch_execute("CREATE DATABASE plain TEMPLATE template0").unwrap());
        admin.batch_execute("DROP DATABASE plain").unwrap();
        let copy = Database { cluster: &cluster, name: copy };
        assert_midway(&mut session(&copy));
        for database in [&copy, &database] {
            assert_ne!(worker_pid(database), worker);
            works(database);
        }
        elsewhere.wait_busy();
    }
    times.check(AT_ONCE + 2 * plain.median());
}

#[test]
fn rename_of_a_database_under_load_is_done_at_once() {
    let cluster = quiet_cluster();
    let mut admin = postgres(&cluster);
    let (other, mut database) = (loadable(&cluster), loadable(&cluster));
    let elsewhere = Load::start(&other);
    let mut times = Times::of("ALTER DATABASE ... RENAME");
    for round in 0..rounds() {
        let load = Load::start(&database);
        lay_backlog(&mut session(&database));
        load.stop(&mut admin, &database.name);
        let worker = worker_at_work(&mut admin, &database.name);
        let name = format!("renamed_{round}");
        let sql = format!("ALTER DATABASE {} RENAME TO {name}", database.name);
        times.time(|| admin.batch_execute(&sql).unwrap());
        database.name = name;
        assert_midway(&mut session(&database));
        assert_ne!(worker_pid(&database), worker);
        works(&database);
        elsewhere.wait_busy();
    }
    times.check(AT_ONCE);
}

#[test]
fn drop_extension_under_load_is_done_at_once() {
    let cluster = quiet_cluster();
    let mut admin = postgres(&cluster);
    let (other, database) = (loadable(&cluster), loadable(&cluster));
    let elsewhere = Load::start(&other);
    let mut client = session(&database);
    let mut times = Times::of("DROP EXTENSION ... CASCADE");
    for _ in 0..rounds() {
        let load = Load::start(&database);
        lay_backlog(&mut client);
        let worker = worker_at_work(&mut admin, &database.name);
        assert_midway(&mut client);
        times.time(|| client.batch_execute("DROP EXTENSION pg_queue CASCADE").unwrap());
        database.wait_until_backend_gone(worker);
        drop(load);
        client.batch_execute("CREATE EXTENSION pg_queue").unwrap();
        client.batch_execute(QUEUES).unwrap();
        assert_ne!(worker_pid(&database), worker);
        works(&database);
        elsewhere.wait_busy();
    }
    times.check(AT_ONCE);
}

/// A second version of the extension, in the tree while this lives. Other tests may run on the tree meanwhile: it
/// is nobody's default, and its name is this process's own.
struct SecondVersion {
    name: String,
    scripts: Vec<PathBuf>,
}

impl SecondVersion {
    fn new(tree: &PgTree) -> Self {
        let name = format!("0.1.0.test{}", std::process::id());
        let mut second = Self { name, scripts: Vec::new() };
        for (from, to) in [("0.1.0", second.name.as_str()), (second.name.as_str(), "0.1.0")] {
            let script = tree.sharedir.join(format!("extension/pg_queue--{from}--{to}.sql"));
            // What sessions and workers read is needed for itself.
            let sql = format!(
                "LOCK TABLE queue_catalog.queue, queue_catalog.prepared IN ACCESS EXCLUSIVE MODE;
                 COMMENT ON SCHEMA queue_catalog IS 'of version {to}';"
            );
            second.scripts.push(script);
            std::fs::write(second.scripts.last().unwrap(), sql).unwrap();
        }
        second
    }
}

impl Drop for SecondVersion {
    fn drop(&mut self) {
        for script in &self.scripts {
            if let Err(error) = std::fs::remove_file(script) {
                eprintln!("cannot remove {}: {error}", script.display());
            }
        }
    }
}

#[test]
fn update_of_the_extension_under_load_is_done_at_once() {
    let cluster = quiet_cluster();
    let mut admin = postgres(&cluster);
    let second = SecondVersion::new(&cluster.tree);
    let (other, database) = (loadable(&cluster), loadable(&cluster));
    let elsewhere = Load::start(&other);
    let load = Load::start(&database);
    let mut client = session(&database);
    let mut times = Times::of("ALTER EXTENSION ... UPDATE");
    for round in 0..rounds() {
        lay_backlog(&mut client);
        worker_at_work(&mut admin, &database.name);
        assert_midway(&mut client);
        let to = if round % 2 == 0 { second.name.as_str() } else { "0.1.0" };
        let sql = format!("ALTER EXTENSION pg_queue UPDATE TO '{to}'");
        times.time(|| client.batch_execute(&sql).unwrap());
        assert_midway(&mut client);
        let version = client
            .query_one(
                "SELECT extversion, obj_description('queue_catalog'::regnamespace) FROM pg_extension
                 WHERE extname = 'pg_queue'",
                &[],
            )
            .unwrap();
        assert_eq!(version.get::<_, &str>(0), to);
        assert_eq!(version.get::<_, String>(1), format!("of version {to}"), "the script ran");
        worker_pid(&database);
        works(&database);
        load.wait_busy();
        elsewhere.wait_busy();
    }
    times.check(AT_ONCE);
}

#[test]
fn fast_shutdown_under_load_is_done_at_once() {
    let cluster = quiet_cluster();
    let (one, two) = (loadable(&cluster), loadable(&cluster));
    let loads = [Load::start(&one), Load::start(&two)];
    let mut times = Times::of("fast shutdown");
    for _ in 0..rounds() {
        let mut admin = postgres(&cluster);
        loads.iter().for_each(Load::wait_busy);
        for database in [&one, &two] {
            lay_backlog(&mut session(database));
        }
        let workers = [&one, &two].map(|database| worker_at_work(&mut admin, &database.name));
        drop(admin);
        times.time(|| cluster.stop(StopMode::Fast).unwrap());
        cluster.start().unwrap();
        for (database, worker) in [&one, &two].into_iter().zip(workers) {
            assert_midway(&mut session(database));
            assert_ne!(worker_pid(database), worker);
            works(database);
        }
    }
    assert!(!cluster.log().contains("database system was not properly shut down"));
    times.check(AT_ONCE);
}

#[test]
fn move_waits_for_no_lock_on_where_the_message_goes() {
    for (dead_letter_queue, target) in [("dead", "queue.dead"), ("", "queue_archive.m")] {
        let database = database_with(&["dead", "other"]);
        let (mut client, mut locker) = (session(&database), session(&database));
        let create = "SELECT queue_create('m', max_deliveries => 1, dead_letter_queue => $1)";
        client.execute(create, &[&dead_letter_queue]).unwrap();
        send(&mut client, "m", 7);
        let worker = worker_pid(&database);
        locker.batch_execute(&format!("BEGIN; LOCK TABLE {target}")).unwrap();
        exhaust(&mut client, "m", 1);
        // A witness that is due later than the lease ends: the worker has met the lock by then.
        send_delayed(&mut client, "other", "400 ms");
        wait_until("the witness is there", || {
            let sql = "SELECT FROM pg_locks WHERE pid = $1 AND locktype = 'relation' AND NOT granted";
            assert!(client.query(sql, &[&worker]).unwrap().is_empty(), "the worker waits for a lock");
            !read(&mut client, "other", 1).is_empty()
        });
        assert_eq!(rows(&mut client, "m"), 1, "it could not be moved");
        // As DROP EXTENSION does: one table after the other. (The worker may be kept with its own lock on this one.)
        locker.batch_execute("SET LOCAL lock_timeout = '500 ms'; SAVEPOINT s").unwrap();
        let is_locked = (0..3).any(|_| match locker.batch_execute("LOCK TABLE queue.m") {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(code::<()>(Err(error)), "55P03");
                locker.batch_execute("ROLLBACK TO s").unwrap();
                false
            }
        });
        assert!(is_locked, "the worker keeps its lock");
        locker.batch_execute("COMMIT").unwrap();
        wait_until("it is moved", || rows(&mut client, "m") == 0);
    }
}

// ---- Being there ----------------------------------------------------------------------------------------------

/// Returns when the database has another worker than `old`.
#[track_caller]
fn wait_for_worker(admin: &mut Client, database: &str, old: Option<i32>) -> i32 {
    wait_until_some("there is a worker", || find_worker(admin, database).filter(|pid| Some(*pid) != old))
}

fn terminate(admin: &mut Client, pid: i32) {
    assert!(admin.query_one("SELECT pg_terminate_backend($1)", &[&pid]).unwrap().get::<_, bool>(0));
}

/// What the log says of a database for whose worker there is no process: what is the matter, and the cure.
fn refused(admin: &mut Client, database: &Database) -> String {
    let sql = "SELECT oid FROM pg_database WHERE datname = $1";
    let oid: u32 = admin.query_one(sql, &[&database.name]).unwrap().get(0);
    format!("no worker process for database {oid} is to be had; raise max_worker_processes")
}

#[test]
fn new_database_and_extension_are_found_at_once() {
    let cluster = quiet_cluster();
    let mut admin = postgres(&cluster);
    let started = "SELECT pg_postmaster_start_time()::text";
    let start: String = admin.query_one(started, &[]).unwrap().get(0);
    let launcher = wait_until_some("the launcher runs", || launcher_pid(&mut admin));
    let mut times = Times::of("a worker after CREATE EXTENSION or CREATE DATABASE");
    for _ in 0..rounds() {
        let database = cluster.create_bare_database().unwrap();
        session(&database).batch_execute("CREATE EXTENSION pg_queue; SELECT queue_create('q')").unwrap();
        times.time(|| wait_for_worker(&mut admin, &database.name, None));
        works(&database);
        let copy = format!("{}_copy", database.name);
        wait_until("the template is free", || {
            let sql = "SELECT FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'";
            admin.query(sql, &[&database.name]).unwrap().is_empty()
        });
        admin.batch_execute(&format!("CREATE DATABASE {copy} TEMPLATE {}", database.name)).unwrap();
        times.time(|| wait_for_worker(&mut admin, &copy, None));
        works(&Database { cluster: &cluster, name: copy });
    }
    assert_eq!(
        admin.query_one(started, &[]).unwrap().get::<_, String>(0),
        start,
        "nobody restarted the server"
    );
    assert_eq!(launcher_pid(&mut admin), Some(launcher));
    times.check(AT_ONCE);
}

#[test]
fn database_that_is_no_template_any_more_gets_a_worker() {
    let cluster = Cluster::start_new().unwrap();
    let mut admin = postgres(&cluster);
    let database = database_on(&cluster, &["q"]);
    let name = &database.name;
    let mut old = worker_pid(&database);
    for (off, on) in
        [("IS_TEMPLATE true", "IS_TEMPLATE false"), ("ALLOW_CONNECTIONS false", "ALLOW_CONNECTIONS true")]
    {
        admin.batch_execute(&format!("ALTER DATABASE {name} {off}")).unwrap();
        wait_no_worker(&database);
        admin.batch_execute(&format!("ALTER DATABASE {name} {on}")).unwrap();
        old = wait_for_worker(&mut admin, name, Some(old));
        works(&database);
    }
}

#[test]
fn bare_database_has_no_worker_and_gets_one_with_the_extension() {
    let cluster = Cluster::start_new().unwrap();
    let bare = cluster.create_bare_database().unwrap();
    let database = database_on(&cluster, &["q"]);
    worker_pid(&database);
    let mut client = session(&bare);
    wait_no_worker(&bare); // the probe is over
    client.batch_execute("CREATE EXTENSION pg_queue").unwrap();
    let worker = worker_pid(&bare);
    client.batch_execute("BEGIN; DROP EXTENSION pg_queue; ROLLBACK").unwrap();
    create(&mut client, &["q"]);
    works(&bare);
    assert_eq!(worker_pid(&bare), worker, "it serves on");
}

#[test]
fn every_new_database_gets_its_worker() {
    // The extension comes while the probe that CREATE DATABASE started is under way, at ever other moments.
    for n in 0..10 {
        let database = queue_tests::shared_cluster().create_bare_database().unwrap();
        let mut client = session(&database);
        for _ in 0..n {
            client.batch_execute("SELECT 1 FROM generate_series(1, 1000)").unwrap();
        }
        client.batch_execute("CREATE EXTENSION pg_queue").unwrap();
        worker_pid(&database);
    }
}

#[test]
fn worker_ends_with_its_extension() {
    let database = queue_tests::shared_cluster().create_bare_database().unwrap();
    let mut client = session(&database);
    for _ in 0..2 {
        client.batch_execute("CREATE EXTENSION pg_queue").unwrap();
        let worker = worker_pid(&database);
        client.batch_execute("DROP EXTENSION pg_queue").unwrap();
        database.wait_until_backend_gone(worker);
    }
}

#[test]
fn worker_that_fails_again_and_again_comes_back_later_each_time() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut admin = session(&database);
    let fail = |admin: &mut Client| {
        let worker = worker_pid(&database);
        let begun = Instant::now();
        terminate(admin, worker);
        wait_for_worker(admin, &database.name, Some(worker));
        let pause = begun.elapsed();
        works(&database);
        pause
    };
    // The launcher may have been told to look again while the first one was there: then its end is no failure.
    fail(&mut admin);
    // Having served for so long, it is back as soon as after its first failure.
    advance_clock(&mut admin, "2 min");
    let mut pauses = vec![fail(&mut admin), fail(&mut admin), fail(&mut admin)];
    advance_clock(&mut admin, "2 min");
    pauses.push(fail(&mut admin));
    for (pause, seconds) in pauses.iter().zip([1, 2, 4, 1]) {
        assert!(*pause >= Duration::from_secs(seconds), "1, 2, 4 and 1 seconds: {pauses:?}");
    }
    assert!(pauses[3] < Duration::from_secs(7), "1 and not 8 seconds: {pauses:?}");
}

#[test]
fn terminated_launcher_comes_back_and_workers_serve_on() {
    // There is room for others; or only for Postgres' own launcher, ours, and the two workers.
    for processes in ["8", "4"] {
        serve_on_without_a_launcher(processes);
    }
}

fn serve_on_without_a_launcher(processes: &str) {
    let cluster = ClusterOptions::default().set("max_worker_processes", processes).start().unwrap();
    let (one, two) = (database_on(&cluster, &["q"]), database_on(&cluster, &["q"]));
    let workers = [worker_pid(&one), worker_pid(&two)];
    let mut admin = postgres(&cluster);
    let mut launcher = wait_until_some("the launcher runs", || launcher_pid(&mut admin));
    let logged = cluster.log().len();
    for _ in 0..2 {
        terminate(&mut admin, launcher);
        works(&one);
        launcher = wait_until_some("there is a new launcher", || {
            launcher_pid(&mut admin).filter(|pid| *pid != launcher)
        });
        one.wait_until_backend_waits(launcher, "Extension", None);
        works(&one);
        works(&two);
        assert_eq!([worker_pid(&one), worker_pid(&two)], workers, "they serve on");
    }
    let log = cluster.log().split_off(logged);
    for database in [&one, &two] {
        assert!(!log.contains(&refused(&mut admin, database)), "it has its worker");
    }
    // The new launcher looks after them like after its own.
    terminate(&mut admin, workers[0]);
    wait_for_worker(&mut admin, &one.name, Some(workers[0]));
    let mut client = session(&two);
    client.batch_execute("DROP EXTENSION pg_queue CASCADE").unwrap();
    two.wait_until_backend_gone(workers[1]);
    client.batch_execute("CREATE EXTENSION pg_queue; SELECT queue_create('q')").unwrap();
    wait_for_worker(&mut admin, &two.name, Some(workers[1]));
    works(&one);
    works(&two);
    assert!(!cluster.log().contains("reinitializing"), "nothing crashed");
}

#[test]
fn databases_without_a_worker_are_served_by_their_readers_until_they_get_one() {
    // Room for the launchers, Postgres' own and ours, and for two workers.
    let cluster = ClusterOptions::default().set("max_worker_processes", "4").start().unwrap();
    let served = [database_on(&cluster, &["q"]), database_on(&cluster, &["q"])];
    for database in &served {
        worker_pid(database);
    }
    let unserved = [database_on(&cluster, &["q"]), database_on(&cluster, &["q"])];
    let mut admin = postgres(&cluster);
    for database in &unserved {
        cluster.wait_for_log(0, &refused(&mut admin, database));
        let mut client = session(database);
        let waiting = reader_asleep(database, "q");
        let msg_id = send_delayed(&mut client, "q", "100 ms");
        let (mut reader, got) = joined(waiting);
        assert_eq!(ids(&got), [msg_id], "what is due");
        assert!(extend(&mut reader, "q", &got[0], "50 ms").is_some());
        let again = read_awaited(&mut reader, "q");
        assert_eq!(again.count, 2, "leases that end");
        assert!(delete(&mut reader, "q", &again));
        assert_eq!(find_worker(&mut client, &database.name), None);
        let cure = "ALTER SYSTEM SET max_worker_processes = 8".to_owned();
        assert_eq!(problems(&mut client), [("worker_not_running".to_owned(), cure)]);
    }
    // Tried again each time, and said once.
    for database in &unserved {
        assert_eq!(cluster.log().matches(&refused(&mut admin, database)).count(), 1);
    }
    for (n, database) in served.into_iter().enumerate() {
        drop(database); // drops the database, which frees a place
        wait_until("another has a worker instead", || {
            unserved.iter().filter(|other| find_worker(&mut admin, &other.name).is_some()).count() == n + 1
        });
    }
    unserved.iter().for_each(works);
    for database in &unserved {
        assert!(problems(&mut session(database)).is_empty());
    }
}

#[test]
fn who_listens_where_there_is_no_extension_takes_no_workers_place() {
    let cluster = ClusterOptions::default().set("pg_queue.max_databases", "1").start().unwrap();
    let bare = cluster.create_bare_database().unwrap();
    session(&bare).batch_execute("LISTEN queue_q").unwrap();
    let database = database_on(&cluster, &["q"]);
    worker_pid(&database);
    assert!(problems(&mut session(&database)).is_empty());
    // The one place is taken: what to do about it is said.
    let other = database_on(&cluster, &["q"]);
    let cure = "ALTER SYSTEM SET pg_queue.max_databases = 2".to_owned();
    assert_eq!(problems(&mut session(&other)), [("worker_not_running".to_owned(), cure)]);
}

// ---- Where nothing of ours runs -------------------------------------------------------------------------------

#[test]
fn streaming_standby_looks_and_changes_nothing_and_serves_once_promoted() {
    let primary = Cluster::start_new().unwrap();
    let database = database_on(&primary, &["q"]);
    let sent = send_many(&mut session(&database), "q", 3);
    let standby = ClusterOptions::default().start_standby_of(&primary).unwrap();
    let copy = Database { cluster: &standby, name: database.name.clone() };
    let mut client = session(&copy);
    let ours = |client: &mut Client| -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'pg_queue%'";
        client.query_one(sql, &[]).unwrap().get(0)
    };
    assert!(client.query_one("SELECT pg_is_in_recovery()", &[]).unwrap().get::<_, bool>(0));
    assert_eq!(client.query("SELECT * FROM queue_peek('q')", &[]).unwrap().len(), 3);
    // What happens on the primary is seen there: it streams.
    let late = send(&mut session(&database), "q", 4);
    database
        .cluster
        .connect("postgres")
        .unwrap()
        .batch_execute("CREATE DATABASE another TEMPLATE DEFAULT")
        .unwrap();
    wait_until("the standby has it", || {
        client.query("SELECT * FROM queue_peek('q')", &[]).unwrap().len() == 4
            && client.query("SELECT FROM pg_database WHERE datname = 'another'", &[]).unwrap().len() == 1
    });
    for sql in [
        "SELECT queue_send('q', '1')",
        "SELECT * FROM queue_read('q')",
        "SELECT * FROM queue_read('q', wait => '1 s')",
        "SELECT * FROM queue_pop('q')",
        "SELECT queue_delete('q', 1)",
        "SELECT queue_create('r')",
    ] {
        assert_eq!(code(client.batch_execute(sql)), "25006", "{sql}");
        assert_eq!(ours(&mut client), 0, "no launcher and no worker");
    }
    assert_eq!(client.query("SELECT * FROM queue_list()", &[]).unwrap().len(), 1);
    let mut on_primary = session(&database);
    wait_until("the primary has both, and no more", || ours(&mut on_primary) == 2);
    drop(on_primary);
    primary.stop(StopMode::Fast).unwrap();
    assert_eq!(ours(&mut client), 0);
    assert!(client.query_one("SELECT pg_promote()", &[]).unwrap().get::<_, bool>(0));
    worker_pid(&copy);
    assert_eq!(drain(&mut client, "q"), [sent, vec![late]].concat());
    works(&copy);
}

/// Every row of every table of ours, as COPY writes it, and what sequences and queue_list say. But for written leases:
/// the worker writes and sweeps them meanwhile.
fn contents(client: &mut Client) -> BTreeMap<String, String> {
    let tables = client
        .query(
            "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r'
             AND relnamespace::regnamespace::text IN ('queue', 'queue_archive', 'queue_catalog')
             AND oid <> 'queue_catalog.lease'::regclass",
            &[],
        )
        .unwrap();
    let mut sources: Vec<String> =
        tables.iter().map(|row| format!("SELECT * FROM {} ORDER BY 1", row.get::<_, &str>(0))).collect();
    sources.push("SELECT * FROM queue_list() ORDER BY 1".to_owned());
    sources.push("SELECT * FROM pg_sequences WHERE schemaname LIKE 'queue%' ORDER BY 1, 2".to_owned());
    let mut all = BTreeMap::new();
    for source in sources {
        let mut text = String::new();
        client.copy_out(&format!("COPY ({source}) TO STDOUT")).unwrap().read_to_string(&mut text).unwrap();
        all.insert(source, text);
    }
    all
}

/// What a server says at `debug1` when it starts a worker of ours, and when it loads the library.
const STARTS_OURS: &str = "starting background worker process \"pg_queue";
const LOADS_OURS: &str = "loaded library \"pg_queue\"";

/// Runs pg_upgrade on two clusters that do not run. Returns what the servers said meanwhile, or what went wrong.
fn pg_upgrade(old: &Cluster, new: &Cluster) -> Result<String, String> {
    let mut upgrade = new.user.command(new.tree.program("pg_upgrade"));
    upgrade.current_dir(new.directory()).args(["--retain", "-U", "postgres", "-s"]).arg(new.directory());
    upgrade.arg("-b").arg(&old.tree.bindir).arg("-B").arg(&new.tree.bindir);
    let output = upgrade.arg("-d").arg(old.data()).arg("-D").arg(new.data()).output().unwrap();
    let logs = |name: &str| -> String {
        let files = walkdir::WalkDir::new(new.data().join("pg_upgrade_output.d")).into_iter();
        let paths = files.flatten().map(|entry| entry.into_path());
        let named = paths.filter(|path| {
            path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)) && path.is_file()
        });
        named.map(|path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned()).collect()
    };
    if output.status.success() {
        return Ok(logs("pg_upgrade_server.log"));
    }
    let restores = logs("pg_upgrade_dump_");
    let errors: Vec<&str> =
        restores.lines().filter(|line| line.contains("error: ") || line.contains("ERROR: ")).collect();
    Err(if errors.is_empty() {
        String::from_utf8_lossy(&output.stdout).into_owned()
    } else {
        errors.join("\n")
    })
}

/// A cluster for pg_upgrade to fill: 18 and later have checksums by default, those before do not.
fn upgrade_target(options: ClusterOptions, tree: &PgTree) -> Cluster {
    let options = if tree.major >= 18 { options.initdb("--no-data-checksums") } else { options };
    options.create_on(tree.clone()).unwrap()
}

/// The oldest PostgreSQL from which one can come to `tree`. From 15.20 (November 2026; 15.18 is as it was) each column
/// has an internal option, `pg_attver`, in its attoptions, which only the pg_dump of a minor release as new leaves out.
/// pg_upgrade takes the new version's: where that is older, the restore of any table at all fails. That is found out
/// with a table of nobody's, on servers that know nothing of pg_queue.
fn oldest_upgradable(tree: &PgTree) -> PgTree {
    for old_tree in PgTree::old_from_env().unwrap() {
        assert!(old_tree.major < tree.major, "from {} to {}", old_tree.version, tree.version);
        let old = ClusterOptions::default().without_preload().start_on(old_tree.clone()).unwrap();
        old.connect("postgres").unwrap().batch_execute("CREATE TABLE plain (n int)").unwrap();
        old.stop(StopMode::Fast).unwrap();
        let new = upgrade_target(ClusterOptions::default().without_preload(), tree);
        match pg_upgrade(&old, &new) {
            Ok(_) => return old_tree,
            Err(error) => skipped(
                &format!("pg_upgrade from {} to {}", old_tree.version, tree.version),
                &format!("it fails without pg_queue, too: {}", error.lines().next().unwrap_or_default()),
            ),
        }
    }
    panic!("pg_upgrade comes to {} from none of the versions at hand", tree.version)
}

#[test]
#[ignore = "needs two PostgreSQLs: `cargo xtask test` runs it where it tests two versions or more"]
fn pg_upgrade_keeps_everything_and_runs_nothing_of_ours() {
    let tree = PgTree::from_env().unwrap();
    let old_tree = oldest_upgradable(&tree);
    let options = || ClusterOptions::default().set("log_min_messages", "debug1");
    let old = options().start_on(old_tree).unwrap();
    let database = database_on(&old, &["q", "Odd \"name\"", "dead"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_create('strict', visibility_timeout => '7 min', max_deliveries => 3, retry_delay => '1 h',
                                 require_lease => true, dead_letter_queue => 'dead');
             SELECT queue_create('paused', retry_backoff => 1.5, retry_jitter => 0), queue_pause('paused');
             SELECT queue_send('paused', '{\"a\": [1, 2.50, \"x\\ty\"]}', headers => '{\"h\": null}');
             SELECT queue_send_batch('q', array(SELECT to_jsonb(repeat('x', n)) FROM generate_series(1, 3000) n));
             SELECT queue_send('q', '\"later\"', delay => '1 h');
             SELECT queue_send('Odd \"name\"', '\"odd\"');
             SELECT queue_archive('q', 4);
             SELECT queue_send('strict', '1'), queue_send('strict', '2');
             UPDATE queue.q SET message = '\"changed\"' WHERE msg_id = 5",
        )
        .unwrap();
    let got = read(&mut client, "strict", 2);
    assert_eq!(retry(&mut client, "strict", &got[0], None), "retried");
    let sql = "SELECT queue_reject('strict', $1, $2, 'no good')";
    let outcome: String = client.query_one(sql, &[&got[1].msg_id, &got[1].lease_id]).unwrap().get(0);
    assert_eq!(outcome, "dead_lettered");
    let last = send(&mut client, "q", 0);
    assert!(delete_id(&mut client, "q", last), "the highest id is that of no message");
    worker_pid(&database);
    let before = contents(&mut client);
    drop(client);
    // One more database: of other owners, with grants, comments, options, and leases.
    let furnished = old.create_database().unwrap();
    furnish(&furnished);
    let mut client = session(&furnished);
    let held = read_for(&mut client, "many", 3, "1 h");
    wait_written(&mut client, "many", &sorted(ids(&held)));
    let inventory = Inventory::take(&mut client, Leases::Written);
    drop(client);
    old.stop(StopMode::Fast).unwrap();
    assert!(old.log().contains(STARTS_OURS) && old.log().contains(LOADS_OURS), "the log would tell of it");

    let new = upgrade_target(options(), &tree);
    let servers = pg_upgrade(&old, &new).unwrap_or_else(|error| panic!("{error}"));
    assert!(servers.matches(LOADS_OURS).count() >= 2, "the library was there, in both servers");
    assert!(!servers.contains(STARTS_OURS), "nothing of ours ran");

    new.start().unwrap();
    assert!(new.log().contains(STARTS_OURS), "now it runs");
    let furnished = Database { cluster: &new, name: furnished.name.clone() };
    let mut client = session(&furnished);
    Inventory::take(&mut client, Leases::Written).assert_same(&inventory, "pg_upgrade");
    let others = read(&mut client, "many", 1_000);
    assert_eq!(others.len(), 180 - 3, "leases are kept");
    assert!(held.iter().all(|delivery| delete(&mut client, "many", delivery)));
    assert!(send(&mut client, "many", 1) > 203);
    let database = Database { cluster: &new, name: database.name.clone() };
    let mut client = session(&database);
    assert_eq!(contents(&mut client), before);
    let next = send(&mut client, "q", 7);
    assert!(next > last, "ids go on: {next} after {last}");
    let first = read_one(&mut client, "q");
    assert_eq!((first.msg_id, first.count), (1, 1));
    assert!(delete(&mut client, "q", &first));
    assert_eq!(state(&mut client, "q", 3001).as_deref(), Some("delayed"));
    assert_eq!(state(&mut client, "strict", got[0].msg_id).as_deref(), Some("delayed"));
    assert!(read(&mut client, "paused", 1).is_empty(), "still paused");
    client.batch_execute("SELECT queue_resume('paused')").unwrap();
    assert_eq!(read_one(&mut client, "paused").message, serde_json::json!({"a": [1, 2.50, "x\ty"]}));
    assert_eq!(read_one(&mut client, "Odd \"name\"").message, "odd");
    client.batch_execute("INSERT INTO queue.\"Odd \"\"name\"\"\" (message) VALUES ('2')").unwrap();
    assert_eq!(read_one(&mut client, "Odd \"name\"").message, 2);
    assert_eq!(drain(&mut client, "q").len(), 2998 + 1);
    client.batch_execute("SELECT queue_purge('q')").unwrap();
    works(&database);
    tell(&format!("pg_upgrade from {} to {}", old.tree.version, new.tree.version));
}

// ---- Being seen -----------------------------------------------------------------------------------------------

/// What pg_stat_activity says of a process.
#[derive(Debug, PartialEq)]
struct Activity {
    backend_type: String,
    application_name: String,
    database: Option<String>,
    state: Option<String>,
    query: String,
    wait_event_type: Option<String>,
    wait_event: Option<String>,
}

fn activity(client: &mut Client, pid: i32) -> Activity {
    let sql = "SELECT backend_type, application_name, datname::text, state, query, wait_event_type, wait_event
               FROM pg_stat_activity WHERE pid = $1";
    let row = client.query_one(sql, &[&pid]).unwrap();
    Activity {
        backend_type: row.get(0),
        application_name: row.get(1),
        database: row.get(2),
        state: row.get(3),
        query: row.get(4),
        wait_event_type: row.get(5),
        wait_event: row.get(6),
    }
}

#[test]
fn workers_say_in_pg_stat_activity_who_they_are_and_what_they_do() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q", "dead"]);
    let mut client = session(&database);
    let worker = worker_pid(&database);
    let launcher = launcher_pid(&mut client).unwrap();
    let event =
        |name: &str| Some(if cluster.tree.major >= 17 { name.to_owned() } else { "Extension".to_owned() });
    let oid: u32 =
        client.query_one("SELECT oid FROM pg_database WHERE datname = current_database()", &[]).unwrap().get(0);
    let idle = |backend_type: &str, application_name: &str, database: Option<&str>, wait: &str| Activity {
        backend_type: backend_type.to_owned(),
        application_name: application_name.to_owned(),
        database: database.map(str::to_owned),
        state: Some("idle".to_owned()),
        query: String::new(),
        wait_event_type: Some("Extension".to_owned()),
        wait_event: event(wait),
    };
    let name = format!("pg_queue worker for database {oid}");
    let worker_idle = idle("pg_queue worker", &name, Some(&database.name), "QueueWorker");
    let launcher_idle = idle("pg_queue launcher", "pg_queue launcher", None, "QueueLauncher");
    wait_until("both are idle and say so", || {
        activity(&mut client, worker) == worker_idle && activity(&mut client, launcher) == launcher_idle
    });
    let reading = reader_asleep(&database, "q");
    wait_until("the reader says that it waits for messages", || {
        activity(&mut client, reading.pid()).wait_event == event("QueueRead")
    });
    send(&mut client, "q", 1);
    joined(reading);

    let busy = |query: &str| (Some("active".to_owned()), query.to_owned());
    let shown = |client: &mut Client| {
        let activity = activity(client, worker);
        (activity.state, activity.query)
    };
    // Moving away what had its last delivery.
    client.batch_execute("SELECT queue_create('m', max_deliveries => 1, dead_letter_queue => 'dead')").unwrap();
    send(&mut client, "m", 1);
    let mut hold = Hold::backend(&database, "move-pinned", worker);
    exhaust(&mut client, "m", 1);
    hold.wait_reached();
    assert_eq!(shown(&mut client), busy("moving exhausted messages"));
    hold.release();
    // Looking for what is due soon.
    let mut hold = Hold::backend(&database, "scan-snapshot", worker);
    send_delayed(&mut client, "q", "10 min");
    advance_clock(&mut client, "10 min");
    hold.wait_reached();
    assert_eq!(shown(&mut client), busy("loading messages"));
    hold.release();
    // Looking whether it is still wanted. It waits half a second for that lock, and then no more until it is called again.
    let mut locker = session(&database);
    locker.batch_execute("BEGIN; LOCK TABLE pg_catalog.pg_extension IN ACCESS EXCLUSIVE MODE").unwrap();
    let looking = Activity {
        state: Some("active".to_owned()),
        query: "looking for the extension".to_owned(),
        wait_event_type: Some("Lock".to_owned()),
        wait_event: Some("relation".to_owned()),
        ..idle("pg_queue worker", &name, Some(&database.name), "QueueWorker")
    };
    let call = format!("ALTER DATABASE {} CONNECTION LIMIT -1", database.name);
    let mut called: Option<Instant> = None;
    wait_until("it looks for the extension and says so", || {
        if called.is_none_or(|at| at.elapsed() > Duration::from_millis(600)) {
            client.batch_execute(&call).unwrap();
            called = Some(Instant::now());
        }
        activity(&mut client, worker) == looking
    });
    locker.batch_execute("ROLLBACK").unwrap();
    wait_until("it is idle again and says so", || activity(&mut client, worker) == worker_idle);
}

// ---- Costing nothing ------------------------------------------------------------------------------------------

#[test]
fn idle_server_with_a_hundred_queues_is_idle() {
    // Nothing else writes: no vacuum, no checkpoint, no snapshots for standbys.
    let cluster = ClusterOptions::default()
        .set("autovacuum", "off")
        .set("checkpoint_timeout", "1d")
        .set("wal_level", "minimal")
        .set("max_wal_senders", "0")
        .start()
        .unwrap();
    let database = cluster.create_database().unwrap();
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT count(queue_create('q' || n)) FROM generate_series(1, 100) n;
             SELECT count(queue_send('q' || n, '0', delay => '1 day')) FROM generate_series(1, 100) n",
        )
        .unwrap();
    for n in 1..=100 {
        assert!(read(&mut client, &format!("q{n}"), 1).is_empty());
    }
    let mut admin = postgres(&cluster);
    let worker = worker_pid(&database);
    let launcher = launcher_pid(&mut admin).unwrap();
    // Else our own transactions would be counted when this session has been idle for ten seconds.
    client.batch_execute("SELECT pg_stat_force_next_flush()").unwrap();
    let look = |admin: &mut Client| {
        let sql = "SELECT (SELECT pg_current_wal_insert_lsn()::text),
                          (SELECT pg_snapshot_xmax(pg_current_snapshot())::text),
                          (SELECT string_agg(concat(pid, state_change, query_start, xact_start), ' ' ORDER BY pid)
                           FROM pg_stat_activity WHERE backend_type LIKE 'pg_queue%'),
                          (SELECT concat(xact_commit, '/', xact_rollback) FROM pg_stat_database WHERE datname = $1)";
        let row = admin.query_one(sql, &[&database.name]).unwrap();
        let seen: Vec<(&str, String)> = ["WAL", "transaction ids", "what they did last", "transactions"]
            .into_iter()
            .enumerate()
            .map(|(i, what)| (what, row.get(i)))
            .collect();
        (seen, sleeps(worker), sleeps(launcher), cpu_ticks(worker) + cpu_ticks(launcher))
    };
    // What the hundred new queues need of the worker is done, and one second has gone by, after which it looks again at
    // a new queue that was locked. A timeout that PostgreSQL disables leaves the kernel's timer as it is (timeout.c), so
    // that the ten seconds which a transaction gives an owner's triggers wake the worker once more, for nothing.
    // (First for a while: the time that the setup takes is not taken from the other.)
    for quiet_s in [2.0, 11.0] {
        wait_until("nobody has done anything for so long", || {
            let sql =
                "SELECT max(state_change) < clock_timestamp() - make_interval(secs => $1) FROM pg_stat_activity
                       WHERE backend_type LIKE 'pg_queue%'";
            admin.query_one(sql, &[&quiet_s]).unwrap().get(0)
        });
    }
    let before = look(&mut admin);
    // The one thing that no condition tells: that time goes by and nothing happens.
    admin.batch_execute("SELECT pg_sleep(3)").unwrap();
    let after = look(&mut admin);
    assert_eq!(after.0, before.0);
    assert_eq!((after.1, after.2), (before.1, before.2), "nobody woke them");
    assert!(after.3 <= before.3 + 1, "processor time: {} ticks, then {}", before.3, after.3);
    // All of it would have told of work.
    send_delayed(&mut client, "q1", "50 ms");
    client.batch_execute(&format!("CREATE DATABASE {}_other", database.name)).unwrap();
    wait_until("work is seen", || {
        let now = look(&mut admin);
        now.0.iter().zip(&before.0).all(|(now, before)| now != before) && now.1 > before.1 && now.2 > before.2
    });
}
