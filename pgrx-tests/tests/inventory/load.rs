//! Sessions that send, read and finish while something happens to the database, and a ledger that tells afterwards
//! whether a message was lost or done twice.
//!
//! Owns the queue `load` and the tables `load_sent` and `load_done`. What a session meets (a lock, a server that is away)
//! it tries again; what a lost answer leaves open the ledger decides, which is written in the same transaction.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use postgres::{Client, Config, Error, NoTls};
use queue_tests::{wait_until, Database};

/// Number of sessions: enough to meet each other, few enough for two cores.
const SESSIONS: i64 = 2;

pub struct Load {
    stop: Arc<AtomicBool>,
    turns: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Makes queue and ledger and starts the sessions.
    pub fn start(database: &Database) -> Self {
        let mut client = database.connect().unwrap();
        client
            .batch_execute(
                "SELECT queue_create('load', visibility_timeout => '200 ms', max_deliveries => 0);
                 CREATE TABLE load_sent (n bigint PRIMARY KEY);
                 CREATE TABLE load_done (n bigint PRIMARY KEY)",
            )
            .unwrap();
        Self::go_on(database)
    }

    /// Starts the sessions where queue and ledger are already.
    pub fn go_on(database: &Database) -> Self {
        let mut load = Self { stop: Arc::default(), turns: Arc::default(), threads: Vec::new() };
        for _ in 0..SESSIONS {
            let config = database.cluster.config(&database.name);
            let (stop, turns) = (load.stop.clone(), load.turns.clone());
            load.threads.push(std::thread::spawn(move || work(&config, &stop, &turns)));
        }
        load.wait_busy();
        load
    }

    /// Returns when some more has been done.
    #[track_caller]
    pub fn wait_busy(&self) {
        let before = self.turns.load(Ordering::SeqCst);
        wait_until("the load goes on", || self.turns.load(Ordering::SeqCst) > before + 5);
    }

    /// How many turns were committed, as far as the clients know.
    pub fn turns(&self) -> u64 {
        self.turns.load(Ordering::SeqCst)
    }

    /// Returns when its sessions are gone from the server.
    pub fn stop(mut self, database: &Database) {
        self.end();
        let mut admin = database.cluster.connect("postgres").unwrap();
        let sql = "SELECT FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'";
        wait_until("its sessions are gone", || admin.query(sql, &[&database.name]).unwrap().is_empty());
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

fn work(config: &Config, stop: &AtomicBool, turns: &AtomicU64) {
    while !stop.load(Ordering::SeqCst) {
        let Ok(mut client) = config.connect(NoTls) else {
            std::thread::sleep(Duration::from_millis(10)); // the server is away for a moment
            continue;
        };
        while !stop.load(Ordering::SeqCst) && turn(&mut client).is_ok() {
            turns.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Sends ten and writes them down; reads some, leaves a few to their leases, finishes the others and writes that down.
fn turn(client: &mut Client) -> Result<(), Error> {
    client.batch_execute(
        "WITH sent AS (
             SELECT * FROM queue_send_batch('load', array(SELECT to_jsonb(n) FROM generate_series(1, 10) n)))
         INSERT INTO load_sent SELECT * FROM sent",
    )?;
    let mut transaction = client.transaction()?;
    transaction.batch_execute(
        "WITH got AS MATERIALIZED (SELECT * FROM queue_read('load', 12)),
              done AS MATERIALIZED (
                  SELECT msg_id, queue_delete('load', msg_id, lease_id, strict => true) FROM got
                  WHERE (msg_id + delivery_count) % 7 > 0)
         INSERT INTO load_done SELECT msg_id FROM done",
    )?;
    transaction.commit()
}

/// Finishes what is left, and asserts that every message whose sending was committed was done once and no other was.
/// Returns how many.
#[track_caller]
pub fn check(client: &mut Client) -> i64 {
    wait_until("what was sent is done", || {
        client
            .batch_execute(
                "WITH got AS MATERIALIZED (SELECT * FROM queue_read('load', 1000, '1 min')),
                      done AS MATERIALIZED (
                          SELECT msg_id, queue_delete('load', msg_id, lease_id, strict => true) FROM got)
                 INSERT INTO load_done SELECT msg_id FROM done",
            )
            .unwrap();
        client.query_one("SELECT count(*) = 0 FROM queue.load", &[]).unwrap().get(0)
    });
    let row = client
        .query_one(
            "SELECT (SELECT count(*) FROM load_sent),
                    (SELECT count(*) FROM (TABLE load_sent EXCEPT TABLE load_done) AS lost),
                    (SELECT count(*) FROM (TABLE load_done EXCEPT TABLE load_sent) AS phantom)",
            &[],
        )
        .unwrap();
    let (sent, lost, phantom): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert!(sent > 0);
    assert_eq!((lost, phantom), (0, 0), "of {sent}: lost, never sent"); // done twice: the key of load_done
    sent
}
