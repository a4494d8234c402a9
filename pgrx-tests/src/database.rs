//! A database for one test, and the cluster that the tests of a process share.
//!
//! Owns the database from CREATE to DROP. Never stops a server: whoever does makes a cluster of their own.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use postgres::{Client, NoTls};

use crate::cluster::Cluster;
use crate::wait::wait_until;

/// How long a statement of a test may take, which no test's does.
const STATEMENT_LIMIT: Duration = Duration::from_secs(120);

/// A database of a [`Cluster`]; dropped on the server when the handle is.
pub struct Database<'a> {
    pub cluster: &'a Cluster,
    pub name: String,
}

impl Database<'_> {
    /// A session of this database. A statement that blocks for good ends, so that the test says where it was.
    pub fn connect(&self) -> Result<Client> {
        let limit = format!("-c statement_timeout={}", STATEMENT_LIMIT.as_millis());
        let mut config = self.cluster.config(&self.name);
        config
            .options(&limit)
            .connect(NoTls)
            .with_context(|| format!("cannot connect to database {}", self.name))
    }

    /// Returns when backend `pid` waits for `event_type` and, where given, `event` (pg_stat_activity's words).
    #[track_caller]
    pub fn wait_until_backend_waits(&self, pid: i32, event_type: &str, event: Option<&str>) {
        let mut client = self.connect().unwrap_or_else(|error| panic!("{error:#}"));
        let what = format!("backend {pid} waits for {event_type}/{}", event.unwrap_or("any"));
        wait_until(&what, || {
            let row = client
                .query_opt("SELECT wait_event_type, wait_event FROM pg_stat_activity WHERE pid = $1", &[&pid])
                .unwrap_or_else(|error| panic!("cannot look at pg_stat_activity: {error}"));
            row.is_some_and(|row| {
                row.get::<_, Option<&str>>(0) == Some(event_type)
                    && (event.is_none() || row.get::<_, Option<&str>>(1) == event)
            })
        });
    }

    /// Returns when no backend has this PID any more.
    #[track_caller]
    pub fn wait_until_backend_gone(&self, pid: i32) {
        let mut client = self.connect().unwrap_or_else(|error| panic!("{error:#}"));
        wait_until(&format!("backend {pid} is gone"), || {
            client
                .query("SELECT FROM pg_stat_activity WHERE pid = $1", &[&pid])
                .unwrap_or_else(|error| panic!("cannot look at pg_stat_activity: {error}"))
                .is_empty()
        });
    }
}

impl Drop for Database<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {}, last lines:\n{}", self.cluster.tree.version, self.cluster.log_tail());
            // Left as it is: what the test found is still in it, and the cluster goes soon anyway.
            return;
        }
        // A server that the test stopped or killed has nothing to drop from.
        if let Ok(mut client) = self.cluster.config("postgres").connect(NoTls) {
            let drop =
                format!("SET statement_timeout = '30s'; DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
            for statement in drop.split("; ") {
                if let Err(error) = client.batch_execute(statement) {
                    eprintln!("cannot drop database {}: {error}", self.name);
                }
            }
        }
    }
}

/// The cluster that the tests of one process share; tests that stop or kill a server make their own.
/// It goes when the process does (see `CLEANUP`). Panics when it cannot be made, as every test on it would.
pub fn shared_cluster() -> &'static Cluster {
    static SHARED: OnceLock<Result<Cluster, String>> = OnceLock::new();
    match SHARED.get_or_init(|| Cluster::start_new().map_err(|error| format!("{error:#}"))) {
        Ok(cluster) => cluster,
        Err(error) => panic!("{error}"),
    }
}

/// A fresh database with pg_queue on the shared cluster.
pub fn shared_database() -> Database<'static> {
    shared_cluster().create_database().unwrap_or_else(|error| panic!("{error:#}"))
}
