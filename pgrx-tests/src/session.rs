//! Sessions that block: a connection whose call runs on a thread of its own while the test goes on.
//!
//! Owns the thread and the connection in it. Never decides when a call is done: the server does.

use std::ops::{Deref, DerefMut};
use std::thread::JoinHandle;

use anyhow::{bail, Context, Result};
use postgres::{Client, Row};

use crate::database::Database;
use crate::wait::{poll, WAIT_LIMIT};

/// A connection that knows its backend's PID. Use it as a [`Client`].
pub struct Session {
    client: Client,
    pid: i32,
}

impl Session {
    pub fn open(database: &Database) -> Result<Self> {
        Self::from_client(database.connect()?)
    }

    pub fn from_client(mut client: Client) -> Result<Self> {
        let pid = client.query_one("SELECT pg_backend_pid()", &[])?.try_get(0)?;
        Ok(Self { client, pid })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Starts `sql` on a thread of its own; for calls that block.
    pub fn run(self, sql: &str) -> Result<Running<Result<Vec<Row>, postgres::Error>>> {
        let sql = sql.to_owned();
        self.run_with(move |client| client.query(&sql, &[]))
    }

    /// Starts `work` on a thread of its own; for calls with parameters, or several in a row.
    pub fn run_with<T: Send + 'static>(
        mut self,
        work: impl FnOnce(&mut Client) -> T + Send + 'static,
    ) -> Result<Running<T>> {
        let pid = self.pid;
        let thread = std::thread::Builder::new()
            .name(format!("session {pid}"))
            .spawn(move || {
                let value = work(&mut self.client);
                (self, value)
            })
            .context("cannot start a thread for a session")?;
        Ok(Running { pid, thread })
    }
}

impl Deref for Session {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

/// A call under way on another thread.
pub struct Running<T> {
    pid: i32,
    thread: JoinHandle<(Session, T)>,
}

impl<T> Running<T> {
    /// The PID of the backend that works on it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn is_done(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits, at most [`WAIT_LIMIT`], and gives back the session and what the call returned.
    pub fn join(self) -> Result<(Session, T)> {
        if poll(WAIT_LIMIT, || self.thread.is_finished().then_some(())).is_none() {
            bail!("the call in backend {} did not return within {} s", self.pid, WAIT_LIMIT.as_secs());
        }
        self.thread.join().map_err(|_| anyhow::anyhow!("the thread of backend {} panicked", self.pid))
    }
}
