//! What the multi-session tests share: the verbs as plain calls, sessions asleep in a read, backends held still at
//! a wait point. Decides nothing: every expectation is in the tests.
#![allow(dead_code)] // each test file uses its part

use std::collections::HashMap;
use std::io::Write;
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use postgres::{Client, Error};
use queue_tests::{shared_database, wait_points, Cluster, Database, Running, Session};

/// How long a reader in a test waits for a message that must come: longer than anything here takes, so that a
/// lost wake-up ends in an empty answer, and shorter than the harness' own limit.
pub const LONG: &str = "25 s";

/// One message, as a read gave it.
#[derive(Clone, Debug, PartialEq)]
pub struct Delivery {
    pub msg_id: i64,
    pub lease_id: i64,
    pub count: i64,
    pub message: serde_json::Value,
    pub last_error: Option<String>,
}

pub type Reading = Running<Result<Vec<Delivery>, Error>>;

pub fn session(database: &Database) -> Session {
    Session::open(database).unwrap()
}

/// A database on the shared cluster with these queues in it.
pub fn database_with(queues: &[&str]) -> Database<'static> {
    let database = shared_database();
    create(&mut session(&database), queues);
    database
}

/// A database on a cluster of the test's own.
pub fn database_on<'a>(cluster: &'a Cluster, queues: &[&str]) -> Database<'a> {
    let database = cluster.create_database().unwrap();
    create(&mut session(&database), queues);
    database
}

pub fn create(client: &mut Client, queues: &[&str]) {
    for queue in queues {
        client.execute("SELECT queue_create($1)", &[queue]).unwrap();
    }
}

/// Sends one message, the number as JSON; returns its id.
pub fn send(client: &mut Client, queue: &str, number: i64) -> i64 {
    try_send(client, queue, number).unwrap()
}

pub fn try_send(client: &mut Client, queue: &str, number: i64) -> Result<i64, Error> {
    Ok(client.query_one("SELECT queue_send($1, to_jsonb($2::int8))", &[&queue, &number])?.get(0))
}

/// Sends the numbers from 1 to `count`, in one statement.
pub fn send_many(client: &mut Client, queue: &str, count: i64) -> Vec<i64> {
    let rows = client
        .query(
            "SELECT queue_send_batch($1, array(SELECT to_jsonb(n) FROM generate_series(1, $2::int8) n))",
            &[&queue, &count],
        )
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Sends one message that is visible after `delay`.
pub fn send_delayed(client: &mut Client, queue: &str, delay: &str) -> i64 {
    let row =
        client.query_one("SELECT queue_send($1, '0', delay => $2::text::interval)", &[&queue, &delay]).unwrap();
    row.get(0)
}

pub fn try_read(
    client: &mut Client,
    queue: &str,
    quantity: i64,
    timeout: Option<&str>,
    wait: &str,
) -> Result<Vec<Delivery>, Error> {
    let rows = client.query(
        "SELECT msg_id, lease_id, delivery_count, message, last_error \
         FROM queue_read($1, $2, $3::text::interval, $4::text::interval)",
        &[&queue, &quantity, &timeout, &wait],
    )?;
    Ok(rows
        .iter()
        .map(|row| Delivery {
            msg_id: row.get(0),
            lease_id: row.get(1),
            count: row.get(2),
            message: row.get(3),
            last_error: row.get(4),
        })
        .collect())
}

/// Reads without waiting, with the queue's own lease.
pub fn read(client: &mut Client, queue: &str, quantity: i64) -> Vec<Delivery> {
    try_read(client, queue, quantity, None, "0").unwrap()
}

/// Reads one message, which must be there.
#[track_caller]
pub fn read_one(client: &mut Client, queue: &str) -> Delivery {
    let mut got = read(client, queue, 1);
    assert_eq!(got.len(), 1, "a message should have been ready");
    got.remove(0)
}

/// Reads without waiting, with a lease of that length.
pub fn read_for(client: &mut Client, queue: &str, quantity: i64, timeout: &str) -> Vec<Delivery> {
    try_read(client, queue, quantity, Some(timeout), "0").unwrap()
}

/// Reads and waits for what must come.
#[track_caller]
pub fn read_awaited(client: &mut Client, queue: &str) -> Delivery {
    let mut got = try_read(client, queue, 1, None, LONG).unwrap();
    assert_eq!(got.len(), 1, "a message should have come");
    got.remove(0)
}

pub fn ids(deliveries: &[Delivery]) -> Vec<i64> {
    deliveries.iter().map(|delivery| delivery.msg_id).collect()
}

pub fn sorted(mut ids: Vec<i64>) -> Vec<i64> {
    ids.sort_unstable();
    ids
}

pub fn delete(client: &mut Client, queue: &str, delivery: &Delivery) -> bool {
    let sql = "SELECT queue_delete($1, $2, $3)";
    client.query_one(sql, &[&queue, &delivery.msg_id, &delivery.lease_id]).unwrap().get(0)
}

pub fn delete_strictly(client: &mut Client, queue: &str, delivery: &Delivery) -> Result<(), Error> {
    let sql = "SELECT queue_delete($1, $2, $3, strict => true)";
    client.query_one(sql, &[&queue, &delivery.msg_id, &delivery.lease_id]).map(|_| ())
}

pub fn delete_id(client: &mut Client, queue: &str, msg_id: i64) -> bool {
    client.query_one("SELECT queue_delete($1, $2)", &[&queue, &msg_id]).unwrap().get(0)
}

pub fn delete_ids(client: &mut Client, queue: &str, ids: &[i64]) -> Vec<i64> {
    let rows = client.query("SELECT queue_delete_batch($1, $2)", &[&queue, &ids]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// When the lease ends now, as text; None: lost.
pub fn extend(client: &mut Client, queue: &str, delivery: &Delivery, timeout: &str) -> Option<String> {
    let sql = "SELECT queue_extend($1, $2, $3, $4::text::interval)::text";
    client.query_one(sql, &[&queue, &delivery.msg_id, &delivery.lease_id, &timeout]).unwrap().get(0)
}

pub fn release(client: &mut Client, queue: &str, delivery: &Delivery) -> bool {
    let sql = "SELECT queue_release($1, array[$2::int8], array[$3::int8])";
    !client.query(sql, &[&queue, &delivery.msg_id, &delivery.lease_id]).unwrap().is_empty()
}

/// Outcome of a retry with this delay.
pub fn retry(client: &mut Client, queue: &str, delivery: &Delivery, delay: Option<&str>) -> String {
    let sql = "SELECT outcome FROM queue_retry($1, $2, $3, 'failed', $4::text::interval)";
    client.query_one(sql, &[&queue, &delivery.msg_id, &delivery.lease_id, &delay]).unwrap().get(0)
}

/// Reads and finishes until the queue has nothing ready; what was delivered, in that order. (A read that found the worker
/// in the midst of a load does not wait for it for ever, so it may be empty though something is ready.)
pub fn drain(client: &mut Client, queue: &str) -> Vec<i64> {
    let mut all = Vec::new();
    let mut patience = Patience::default();
    loop {
        let got = ids(&read(client, queue, 1_000));
        if got.is_empty() {
            if patience.is_over() || !has_ready(client, queue) {
                return all;
            }
            continue;
        }
        patience = Patience::default();
        assert_eq!(sorted(delete_ids(client, queue, &got)), sorted(got.clone()), "what was read is finished");
        all.extend(got);
    }
}

/// Whether a message of the queue is ready, by what [`state`] would say.
pub fn has_ready(client: &mut Client, queue: &str) -> bool {
    client.query_opt("SELECT FROM queue_peek($1, 1, state => 'ready')", &[&queue]).unwrap().is_some()
}

/// How long a loop goes on with reads that are empty where something seems to be there.
#[derive(Default)]
pub struct Patience(Option<Instant>);

impl Patience {
    /// Whether that has lasted too long; if not, some milliseconds have gone by.
    pub fn is_over(&mut self) -> bool {
        let since = *self.0.get_or_insert_with(Instant::now);
        std::thread::sleep(Duration::from_millis(5));
        since.elapsed() > Duration::from_secs(10)
    }
}

/// Delivers `quantity` messages, which must be ready, and lets their leases end at once. (Under so short a lease a reader
/// that is kept between taking a message and fetching its row may find it moved away.)
#[track_caller]
pub fn exhaust(client: &mut Client, queue: &str, quantity: i64) {
    let got = read_for(client, queue, quantity, "1 h");
    assert_eq!(got.len() as i64, quantity, "as many should have been ready");
    end_leases(client, queue, &got);
}

/// Lets leases end at once.
pub fn end_leases(client: &mut Client, queue: &str, of: &[Delivery]) {
    let leases: Vec<i64> = of.iter().map(|delivery| delivery.lease_id).collect();
    let sql = "SELECT queue_extend_batch($1, $2, $3, visibility_timeout => '1 ms')";
    client.query(sql, &[&queue, &ids(of), &leases]).unwrap();
}

pub fn rows(client: &mut Client, queue: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM queue.\"{}\"", queue.replace('"', "\"\""));
    client.query_one(&sql, &[]).unwrap().get(0)
}

pub fn state(client: &mut Client, queue: &str, msg_id: i64) -> Option<String> {
    let sql = "SELECT state FROM queue_peek($1, msg_ids => array[$2::int8])";
    client.query_opt(sql, &[&queue, &msg_id]).unwrap().map(|row| row.get(0))
}

/// A lease as it is written in the catalog.
#[derive(Clone, Debug, PartialEq)]
pub struct WrittenLease {
    pub msg_id: i64,
    pub lease_id: i64,
    pub count: i32,
    /// How long it still lasts by the real clock, seconds; None: only the count is written.
    pub left_s: Option<f64>,
}

/// What is written of a queue's leases, by message.
pub fn written_leases(client: &mut Client, queue: &str) -> Vec<WrittenLease> {
    let sql = "SELECT msg_id, lease_id, delivery_count, extract(epoch FROM until - clock_timestamp())::float8 \
               FROM queue_catalog.lease WHERE queue = to_regclass('queue.' || quote_ident($1)) ORDER BY msg_id";
    let rows = client.query(sql, &[&queue]).unwrap();
    rows.iter()
        .map(|row| WrittenLease {
            msg_id: row.get(0),
            lease_id: row.get(1),
            count: row.get(2),
            left_s: row.get(3),
        })
        .collect()
}

/// What is written of the lease of one message.
pub fn written_lease(client: &mut Client, queue: &str, msg_id: i64) -> Option<WrittenLease> {
    written_leases(client, queue).into_iter().find(|lease| lease.msg_id == msg_id)
}

/// Returns when the leases of exactly these messages are written, deadlines and all.
#[track_caller]
pub fn wait_written(client: &mut Client, queue: &str, msg_ids: &[i64]) {
    queue_tests::wait_until(&format!("the leases of {msg_ids:?} are written"), || {
        let written = written_leases(client, queue);
        written.iter().all(|lease| lease.left_s.is_some())
            && written.iter().map(|lease| lease.msg_id).eq(sorted(msg_ids.to_vec()))
    });
}

/// Switches the worker of a database off, or lets the server's setting hold again, and returns when it is so.
#[track_caller]
pub fn set_worker(database: &Database, is_enabled: bool) {
    let mut client = database.connect().unwrap();
    let change = if is_enabled { "RESET pg_queue.worker_enabled" } else { "SET pg_queue.worker_enabled = off" };
    client.batch_execute(&format!("ALTER DATABASE {} {change}", database.name)).unwrap();
    if is_enabled {
        worker_pid(database);
    } else {
        wait_no_worker(database);
    }
}

/// Returns when a database has no worker, not even a busy one, or one that is on its way in: that has a lock on the
/// database until it is seen.
#[track_caller]
pub fn wait_no_worker(database: &Database) {
    let mut client = database.cluster.connect("postgres").unwrap();
    let entering = "SELECT FROM pg_locks WHERE classid = 'pg_database'::regclass AND pid <> pg_backend_pid() \
                    AND objid = (SELECT oid FROM pg_database WHERE datname = $1)";
    let there = "SELECT FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' AND datname = $1";
    queue_tests::wait_until("the worker has ended", || {
        let mut has_none = |sql| client.query(sql, &[&database.name]).unwrap().is_empty();
        has_none(entering) && has_none(there)
    });
}

/// Starts a read that waits [`LONG`], and returns when it sleeps.
pub fn reader_asleep(database: &Database, queue: &str) -> Reading {
    let reading = start_read(session(database), queue);
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    reading
}

/// Starts a read of one message that waits [`LONG`].
pub fn start_read(session: Session, queue: &str) -> Reading {
    let queue = queue.to_owned();
    session.run_with(move |client| try_read(client, &queue, 1, None, LONG)).unwrap()
}

/// A read of one message that waits for longer than the harness does: one that nobody wakes fails its test.
pub fn start_long_read(session: Session, queue: &str) -> Reading {
    let queue = queue.to_owned();
    session.run_with(move |client| try_read(client, &queue, 1, None, "60 s")).unwrap()
}

/// Starts such a read, and returns when it sleeps.
pub fn reader_asleep_for_long(database: &Database, queue: &str) -> Reading {
    let reading = start_long_read(session(database), queue);
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    reading
}

/// Makes an attempt with a lease, or a delay, of that length; with a longer one again where it says that it did not get
/// there in time.
#[track_caller]
pub fn in_time(mut attempt: impl FnMut(&str) -> Option<()>) {
    let was_in_time = ["100 ms", "1 s", "10 s"].into_iter().any(|length| attempt(length).is_some());
    assert!(was_in_time, "no time was long enough");
}

/// What that read got, and the session.
#[track_caller]
pub fn joined(reading: Reading) -> (Session, Vec<Delivery>) {
    let (session, result) = reading.join().unwrap();
    (session, result.unwrap_or_else(|error| panic!("the read failed: {error:?}")))
}

/// The SQLSTATE of what must be an error.
#[track_caller]
pub fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Ok(value) => panic!("no error but {value:?}"),
        Err(error) => match error.code() {
            Some(code) => code.code().to_owned(),
            None => format!("none: {error}"),
        },
    }
}

/// The session was terminated in this call: the client either reads the server's last word or finds the
/// connection closed.
#[track_caller]
pub fn assert_terminated<T: std::fmt::Debug>(result: Result<T, Error>) {
    match result {
        Err(error) if error.is_closed() => {}
        other => assert_eq!(code(other), "57P01"),
    }
}

/// The PID of a database's worker, once it runs.
pub fn worker_pid(database: &Database) -> i32 {
    let mut client = database.connect().unwrap();
    queue_tests::wait_until_some("the database has a worker", || find_worker(&mut client, &database.name))
}

/// The PID of a database's worker, if it serves: it waits to be called, or is at something else than what it looks at first.
/// (One that has much to do does not wait for half a minute.)
pub fn find_worker(client: &mut Client, database: &str) -> Option<i32> {
    let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' AND datname = $1 \
               AND (wait_event_type = 'Extension' \
                    OR query NOT IN ('', 'looking for the extension', 'looking at settings'))";
    client.query_opt(sql, &[&database]).unwrap().map(|row| row.get(0))
}

/// The problems that queue_health sees, with the statements that mend them.
pub fn problems(client: &mut Client) -> Vec<(String, String)> {
    let rows = client.query("SELECT problem, coalesce(fix_sql, '') FROM queue_health()", &[]).unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

pub fn launcher_pid(client: &mut Client) -> Option<i32> {
    let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'pg_queue launcher%'";
    client.query_opt(sql, &[]).unwrap().map(|row| row.get(0))
}

/// Runs one of the server's programs, with `input` on its standard input, and returns its output.
pub fn program(cluster: &Cluster, name: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = cluster
        .user
        .command(cluster.tree.program(name))
        .arg("-h")
        .arg(cluster.directory())
        .args(["-U", "postgres"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run {name} of {}: {error}", cluster.tree.version));
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} failed: {errors}");
    output.stdout
}

/// How often a process went to sleep of its own accord: unchanged means that nobody woke it.
pub fn sleeps(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The processor time that a process has used, in ticks of the kernel's clock (10 ms).
pub fn cpu_ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name before the other fields may itself hold blanks and parentheses; utime and stime are the 14th and 15th.
    let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 1..].split_ascii_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// The whole way of a message through queue `q`, which is empty, and what needs the worker.
pub fn works(database: &Database) {
    let mut client = session(database);
    let reading = reader_asleep(database, "q");
    let msg_id = send_delayed(&mut client, "q", "50 ms");
    let (mut reader, got) = joined(reading);
    assert_eq!(ids(&got), [msg_id]);
    assert!(delete(&mut reader, "q", &got[0]));
    client.batch_execute("SELECT queue_create('last', max_deliveries => 1, dead_letter_queue => 'q')").unwrap();
    send(&mut client, "last", 1);
    exhaust(&mut client, "last", 1);
    let dead = read_awaited(&mut client, "q"); // moved by the worker
    assert!(delete(&mut client, "q", &dead));
    client.batch_execute("SELECT queue_drop('last', force => true)").unwrap();
}

/// Keeps one backend still at a wait point, once it comes there, until released or dropped. A server's point can be
/// armed for one backend at a time, so a test that uses one has it to itself; a test that uses several takes them
/// in alphabetical order.
pub struct Hold {
    name: &'static str,
    client: Client,
    _turn: MutexGuard<'static, ()>,
}

impl Hold {
    pub fn backend(database: &Database, name: &'static str, pid: i32) -> Self {
        Self::new(database, name, Some(pid))
    }

    /// Whoever comes there: only on a cluster of the test's own.
    pub fn everybody(database: &Database, name: &'static str) -> Self {
        Self::new(database, name, None)
    }

    fn new(database: &Database, name: &'static str, pid: Option<i32>) -> Self {
        static TURNS: Mutex<Option<HashMap<String, &'static Mutex<()>>>> = Mutex::new(None);
        let turn: &'static Mutex<()> = {
            let mut turns = TURNS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let key = format!("{}/{name}", database.cluster.directory().display());
            turns.get_or_insert_default().entry(key).or_insert_with(|| Box::leak(Box::default()))
        };
        let turn = turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut client = database.connect().unwrap();
        wait_points::arm(&mut client, name, pid).unwrap();
        Self { name, client, _turn: turn }
    }

    /// Returns when somebody stands there.
    #[track_caller]
    pub fn wait_reached(&mut self) {
        wait_points::wait_reached(&mut self.client, self.name, 1);
    }

    pub fn reached(&mut self) -> i64 {
        wait_points::reached(&mut self.client, self.name).unwrap()
    }

    /// Lets it go on.
    pub fn release(self) {}
}

impl Drop for Hold {
    fn drop(&mut self) {
        // After a crash the server has forgotten the point by itself.
        if wait_points::release(&mut self.client, self.name).is_err() {
            return;
        }
        // The next test at this point must not take our backend for its own.
        while matches!(wait_points::reached(&mut self.client, self.name), Ok(1..)) {
            std::thread::yield_now();
        }
    }
}
