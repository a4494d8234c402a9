//! The harness itself: what every other test takes on trust.

use queue_tests::{shared_cluster, wait_until, Cluster, ClusterOptions, Session, StopMode};

#[test]
fn database_is_dropped_with_its_handle() {
    let cluster = shared_cluster();
    let database = cluster.create_bare_database().unwrap();
    let name = database.name.clone();
    let mut session = Session::open(&database).unwrap();
    assert_eq!(session.query_one("SELECT current_database()::text", &[]).unwrap().get::<_, &str>(0), name);
    drop(database);
    let mut client = cluster.connect("postgres").unwrap();
    let left = client.query("SELECT FROM pg_database WHERE datname = $1", &[&name]).unwrap();
    assert!(left.is_empty());
}

#[test]
fn running_call_is_seen_waiting_and_joined() {
    let cluster = shared_cluster();
    let database = cluster.create_bare_database().unwrap();
    let mut holder = Session::open(&database).unwrap();
    holder.batch_execute("BEGIN; SELECT pg_advisory_xact_lock(1)").unwrap();
    let blocked = Session::open(&database).unwrap().run("SELECT pg_advisory_xact_lock(1)").unwrap();
    database.wait_until_backend_waits(blocked.pid(), "Lock", Some("advisory"));
    assert!(!blocked.is_done());
    holder.batch_execute("COMMIT").unwrap();
    let (session, rows) = blocked.join().unwrap();
    assert_eq!(rows.unwrap().len(), 1);
    let pid = session.pid();
    drop(session);
    database.wait_until_backend_gone(pid);
}

#[test]
fn committed_rows_outlive_every_way_to_die() {
    let cluster = Cluster::start_new().unwrap();
    cluster.connect("postgres").unwrap().batch_execute("CREATE TABLE t (n bigint)").unwrap();
    type Death = (&'static str, fn(&Cluster));
    let deaths: [Death; 5] = [
        ("fast stop", |cluster| cluster.restart(StopMode::Fast).unwrap()),
        ("immediate stop", |cluster| cluster.restart(StopMode::Immediate).unwrap()),
        ("postmaster killed", |cluster| {
            cluster.kill_postmaster().unwrap();
            cluster.start().unwrap();
        }),
        ("all killed", |cluster| {
            cluster.kill_all().unwrap();
            cluster.start().unwrap();
        }),
        ("backend killed", |cluster| {
            let session = Session::from_client(cluster.connect("postgres").unwrap()).unwrap();
            cluster.kill_backend(session.pid()).unwrap();
        }),
    ];
    for (done, (how, die)) in deaths.into_iter().enumerate() {
        let mut session = Session::from_client(cluster.connect("postgres").unwrap()).unwrap();
        session.batch_execute("INSERT INTO t VALUES (1)").unwrap();
        die(&cluster);
        wait_until(&format!("the old session is dead after: {how}"), || {
            session.is_closed() || session.batch_execute("").is_err()
        });
        let mut client = cluster.connect("postgres").unwrap();
        let rows: i64 = client.query_one("SELECT count(*) FROM t", &[]).unwrap().get(0);
        assert_eq!(rows, done as i64 + 1, "{how}");
    }
}

#[test]
fn dropped_cluster_leaves_nothing_behind() {
    let cluster = Cluster::start_new().unwrap();
    let directory = cluster.directory().to_owned();
    let postmaster = cluster.postmaster_pid().unwrap();
    drop(cluster);
    assert!(!directory.exists());
    assert!(!std::path::Path::new(&format!("/proc/{postmaster}")).exists());
}

#[test]
#[ignore = "valgrind is to report it: `cargo xtask valgrind` runs it first"]
fn freed_memory_is_read() {
    let cluster = ClusterOptions::default().set("pg_queue.break_rule", "use_freed_memory").start().unwrap();
    let database = cluster.create_database().unwrap();
    let mut client = database.connect().unwrap();
    client.batch_execute("SELECT queue_create('q'); SELECT * FROM queue_read('q')").unwrap();
}
