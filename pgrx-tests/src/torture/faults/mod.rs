//! Faults: what is done to the server and to clients while they work.
//!
//! A fault must prove that it struck while work was in flight: that calls were open in the server (by the clients' own
//! books, taken just before), and that something came of it (a process is another one, a call failed). One that
//! cannot prove it has missed. A round in which a chosen fault never struck fails.

mod clients;
mod connections;
mod disk;
mod maintenance;
mod pooler;
mod prepared;
mod room;
mod server;
mod standby;

use std::time::Duration;

use anyhow::{bail, Result};

use super::history::Us;
use super::rng::Rng;
use super::world::{Open, World};
use crate::wait::poll;
use crate::ClusterOptions;

/// How long a fault waits for work to strike at.
const CATCH_LIMIT: Duration = Duration::from_secs(5);

/// The fault that makes the server panic.
pub const WAL_FULL: &str = "wal-full";
/// What the kernel says of a full disk, as the server's log repeats it (SQLSTATE 53100).
pub const NO_SPACE: &str = "No space left on device";

/// The proof that a fault struck.
#[derive(Clone, Debug)]
pub struct Proof {
    /// When it began, and when the world was whole again.
    pub from_us: Us,
    pub to_us: Us,
    /// Calls that clients had open just before.
    pub open_calls: usize,
    /// What came of it, in a few words, e.g. `postmaster 17 -> 39`.
    pub seen: String,
}

/// What came of an attempt.
#[derive(Clone, Debug)]
pub enum Struck {
    Hit(Proof),
    /// Nothing was in flight, or the victim was gone: it does not count.
    Missed(String),
}

impl Struck {
    /// There was no call to strike at.
    pub fn idle() -> Self {
        Self::Missed("no call was open".to_owned())
    }

    /// It struck, and no client noticed.
    pub fn unnoticed() -> Self {
        Self::Missed("no call was cut off".to_owned())
    }
}

pub trait Fault: Send {
    /// As `--faults` has it.
    fn name(&self) -> &'static str;

    /// How often it is chosen, relative to the others.
    fn weight(&self) -> u64 {
        10
    }

    /// What the cluster must be made with, so that it can be tried.
    fn cluster(&self, options: ClusterOptions) -> ClusterOptions {
        options
    }

    /// Why it cannot be tried on this machine; said aloud in the report.
    fn skipped(&self, _world: &World) -> Option<String> {
        None
    }

    /// What it needs before clients start (a standby, a pooler). Called once.
    fn prepare(&mut self, _world: &World) -> Result<()> {
        Ok(())
    }

    /// Strikes once, and returns when the world is whole again (the server takes connections, what was stopped goes
    /// on). Whatever it does to the server's memory it tells by [`World::befell`] or [`World::fail_over`]. An error
    /// ends the round as failed.
    fn strike(&mut self, world: &World, rng: &mut Rng) -> Result<Struck>;
}

/// What kills and stops processes, and ends calls.
pub fn all() -> Vec<Box<dyn Fault>> {
    vec![
        Box::new(server::Whole::KILL_POSTMASTER),
        Box::new(server::Whole::KILL_ALL),
        Box::new(server::Whole::IMMEDIATE),
        Box::new(server::Kill::BACKEND),
        Box::new(server::Kill::WORKER),
        Box::new(server::Kill::LAUNCHER),
        Box::new(server::TerminateWorker),
        Box::new(clients::Terminate),
        Box::new(clients::Cancel),
        Box::new(clients::Timeouts),
        Box::new(clients::Stop),
    ]
}

/// What administrators do, and servers out of something: for longer rounds, and by name.
pub fn more() -> Vec<Box<dyn Fault>> {
    let mut more: Vec<Box<dyn Fault>> = vec![
        Box::new(connections::OutOfConnections),
        Box::new(maintenance::Autovacuum),
        Box::new(prepared::Prepared::default()),
        Box::new(standby::Promotion::SYNCHRONOUS),
    ];
    more.extend(maintenance::Rewrite::ALL.map(|rewrite| -> Box<dyn Fault> { Box::new(rewrite) }));
    more
}

/// Those that want a cluster or a way to it made for them, or after which something may be lost: only by name.
pub fn special() -> Vec<Box<dyn Fault>> {
    vec![
        Box::new(disk::WalFull),
        Box::new(disk::TablesFull),
        Box::new(room::NoRoom),
        Box::new(standby::Promotion::ASYNCHRONOUS),
        Box::new(pooler::PoolerKilled::default()),
    ]
}

/// The calls that are open, as soon as so many are of the kind that is wanted; None: they never were.
pub fn catch(world: &World, least: usize, is_wanted: impl Fn(&Open) -> bool) -> Option<Vec<Open>> {
    poll(CATCH_LIMIT, || {
        let open: Vec<Open> = world.open_calls().into_iter().filter(|open| is_wanted(open)).collect();
        (open.len() >= least).then_some(open)
    })
}

/// How many sessions ended since `from_us` in the midst of a call that was open at `struck_us`, as soon as clients
/// notice; None: none did. A client between two calls notices at its next one, which does not count.
fn cut_off(world: &World, from_us: Us, struck_us: Us) -> Option<u64> {
    const LIMIT: Duration = Duration::from_secs(1);
    poll(LIMIT, || Some(world.cut_off(from_us, struck_us)).filter(|sessions| *sessions > 0))
}

/// The process that a statement finds, if it does in a while.
fn find(world: &World, sql: &str) -> Result<Option<i32>> {
    const LIMIT: Duration = Duration::from_secs(10);
    let mut client = world.admin()?;
    let mut look = || Ok(client.query_opt(sql, &[])?.map(|row| row.get(0)));
    poll(LIMIT, || look().transpose()).transpose()
}

/// Whether a backend ends in a while.
fn is_gone(world: &World, pid: i32) -> Result<bool> {
    const LIMIT: Duration = Duration::from_secs(10);
    let mut client = world.admin()?;
    let mut look = || Ok(client.query("SELECT FROM pg_stat_activity WHERE pid = $1", &[&pid])?.is_empty());
    let gone = poll(LIMIT, || match look() {
        Ok(false) => None,
        other => Some(other),
    });
    gone.unwrap_or(Ok(false))
}

/// Those of these names; none named: all but the special ones.
pub fn named(names: &[String]) -> Result<Vec<Box<dyn Fault>>> {
    let mut faults = all();
    faults.extend(more());
    if names.is_empty() {
        return Ok(faults);
    }
    faults.extend(special());
    let known: Vec<&str> = faults.iter().map(|fault| fault.name()).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("there is no fault {unknown:?}; there are {}", known.join(", "));
    }
    Ok(faults.into_iter().filter(|fault| names.iter().any(|name| name == fault.name())).collect())
}
