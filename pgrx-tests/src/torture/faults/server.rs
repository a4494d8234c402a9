//! Faults that take the server's memory away: SIGKILL of the postmaster, of a backend in mid-call, of the worker, of
//! the launcher, and `stop -m immediate`. After each the server is up again; the proof is the processes' new ids.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{catch, cut_off, Fault, Proof, Struck};
use crate::torture::history::Blow;
use crate::torture::rng::Rng;
use crate::torture::world::World;
use crate::wait::poll;
use crate::StopMode;

/// So many calls must be open for a strike at all of them.
const OPEN_MIN: usize = 3;

/// Soon after a start the server loads its queues.
const LOAD_MS: u64 = 200;
/// How long a client, and the worker, may have nothing to do.
const CALL_LIMIT: Duration = Duration::from_secs(1);
const BUSY_LIMIT: Duration = Duration::from_secs(3);

const WORKER: &str = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' \
    AND datname = current_database()";
const LAUNCHER: &str = "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'pg_queue launcher%'";

/// How the whole server goes down.
enum Down {
    /// SIGKILL of the postmaster alone.
    KillPostmaster,
    /// SIGKILL of everything at once.
    KillAll,
    /// What `pg_ctl stop -m immediate` sends.
    Immediate,
}

pub struct Whole(Down);

impl Whole {
    pub const KILL_POSTMASTER: Self = Self(Down::KillPostmaster);
    pub const KILL_ALL: Self = Self(Down::KillAll);
    pub const IMMEDIATE: Self = Self(Down::Immediate);
}

impl Fault for Whole {
    fn name(&self) -> &'static str {
        match self.0 {
            Down::KillPostmaster => "kill-postmaster",
            Down::KillAll => "kill-all",
            Down::Immediate => "stop-immediate",
        }
    }

    fn strike(&mut self, world: &World, rng: &mut Rng) -> Result<Struck> {
        let Some(open) = catch(world, OPEN_MIN, |_| true) else { return Ok(Struck::idle()) };
        let cluster = world.cluster();
        let before = cluster.postmaster_pid()?;
        let from_us = world.now_us();
        let struck_us = match self.0 {
            Down::KillPostmaster => world.us_at(cluster.kill_postmaster()?),
            Down::KillAll => world.us_at(cluster.kill_all()?),
            Down::Immediate => {
                cluster.stop(StopMode::Immediate)?;
                from_us
            }
        };
        cluster.start()?;
        world.befell(Blow::Crash, from_us);
        let is_twice = matches!(self.0, Down::KillAll) && rng.one_in(5);
        if is_twice {
            // Once more while it loads what the first left.
            std::thread::sleep(Duration::from_millis(rng.below(LOAD_MS)));
            let from_us = world.now_us();
            cluster.kill_all()?;
            cluster.start()?;
            world.befell(Blow::Crash, from_us);
        }
        let after = cluster.postmaster_pid()?;
        let Some(cut_off) = cut_off(world, from_us, struck_us) else { return Ok(Struck::unnoticed()) };
        let twice = if is_twice { ", killed twice" } else { "" };
        let seen = format!("postmaster {before} -> {after}, {cut_off} calls cut off{twice}");
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls: open.len(), seen }))
    }
}

/// Whose death makes the postmaster restart everything.
enum Victim {
    /// A client's backend, in the midst of a call.
    Backend,
    Worker,
    Launcher,
}

pub struct Kill(Victim);

impl Kill {
    pub const BACKEND: Self = Self(Victim::Backend);
    pub const WORKER: Self = Self(Victim::Worker);
    pub const LAUNCHER: Self = Self(Victim::Launcher);
}

impl Fault for Kill {
    fn name(&self) -> &'static str {
        match self.0 {
            Victim::Backend => "kill-backend",
            Victim::Worker => "kill-worker",
            Victim::Launcher => "kill-launcher",
        }
    }

    fn strike(&mut self, world: &World, rng: &mut Rng) -> Result<Struck> {
        let Some(open) = catch(world, OPEN_MIN, |_| true) else { return Ok(Struck::idle()) };
        let chosen = rng.pick(&open).context("what was caught is not empty")?;
        let (found, mut what) = match self.0 {
            Victim::Backend => (Some(chosen.pid), chosen.call.to_owned()),
            Victim::Worker => (super::find(world, WORKER)?, "no client".to_owned()),
            Victim::Launcher => (super::find(world, LAUNCHER)?, "no client".to_owned()),
        };
        let Some(pid) = found else { return Ok(Struck::Missed("there was none".to_owned())) };
        let is_at_work = matches!(self.0, Victim::Worker) && rng.one_in(2);
        let cluster = world.cluster();
        let logged = std::fs::metadata(cluster.log_path()).context("cannot look at the log")?.len();
        let from_us = world.now_us();
        let mut struck_us = from_us;
        let is_killed = cluster.kill_backend_if(pid, || {
            let is_wanted = match self.0 {
                Victim::Backend => match poll(CALL_LIMIT, || open_call_of(world, pid)) {
                    Some(call) => {
                        what = call.to_owned();
                        true
                    }
                    None => false,
                },
                Victim::Worker if is_at_work => match busy_worker(world, BUSY)? {
                    Some((busy, at)) if busy == pid => {
                        what = at;
                        true
                    }
                    _ => false,
                },
                _ => catch(world, OPEN_MIN, |_| true).is_some(),
            };
            struck_us = world.now_us();
            Ok(is_wanted)
        })?;
        if !is_killed {
            return Ok(Struck::Missed(format!("process {pid} ({what}) was over, or had nothing to do")));
        }
        world.befell(Blow::Crash, from_us);
        world.counters.crashes_caused.fetch_add(1, Relaxed);
        let is_told = cluster.log_from(logged).contains(&format!("(PID {pid}) was terminated by signal 9"));
        let open_calls = open.len();
        if !is_told {
            return Ok(Struck::Missed(format!("the log does not say that {pid} was killed")));
        }
        let Some(cut_off) = cut_off(world, from_us, struck_us) else { return Ok(Struck::unnoticed()) };
        let seen = format!("process {pid} killed ({what}), {cut_off} calls cut off");
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls, seen }))
    }
}

/// What the client of a backend has open at this moment.
fn open_call_of(world: &World, pid: i32) -> Option<&'static str> {
    world.open_calls().iter().find(|open| open.pid == pid).map(|open| open.call)
}

const BUSY: &str = "SELECT pid, query FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' \
    AND datname = current_database() AND state = 'active'";
const TERMINATE_BUSY: &str = "SELECT pid, query, pg_terminate_backend(pid) FROM pg_stat_activity \
    WHERE backend_type = 'pg_queue worker' AND datname = current_database() AND state = 'active'";

/// The worker as soon as it is at work, and at what. Looked for without a pause: what it does is soon done.
fn busy_worker(world: &World, sql: &str) -> Result<Option<(i32, String)>> {
    let mut client = world.admin()?;
    let statement = client.prepare(sql)?;
    let begun = Instant::now();
    while begun.elapsed() < BUSY_LIMIT {
        if let Some(row) = client.query_opt(&statement, &[])? {
            return Ok(Some((row.get(0), format!("at {}", row.get::<_, &str>(1)))));
        }
    }
    Ok(None)
}

/// pg_terminate_backend of the worker: nothing else ends, and another one comes.
pub struct TerminateWorker;

impl Fault for TerminateWorker {
    fn name(&self) -> &'static str {
        "terminate-worker"
    }

    fn strike(&mut self, world: &World, rng: &mut Rng) -> Result<Struck> {
        let Some(open) = catch(world, 1, |_| true) else { return Ok(Struck::idle()) };
        let from_us = world.now_us();
        let found = if rng.one_in(2) {
            busy_worker(world, TERMINATE_BUSY)?
        } else {
            let found = super::find(world, WORKER)?;
            if let Some(pid) = found {
                world.admin()?.execute("SELECT pg_terminate_backend($1)", &[&pid])?;
            }
            found.map(|pid| (pid, "whatever it did".to_owned()))
        };
        let Some((pid, what)) = found else { return Ok(Struck::Missed("there was none".to_owned())) };
        if !super::is_gone(world, pid)? {
            return Ok(Struck::Missed(format!("worker {pid} did not end")));
        }
        let seen = format!("worker {pid} ended ({what})");
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls: open.len(), seen }))
    }
}
