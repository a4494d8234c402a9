//! Faults that take the server's memory away: SIGKILL of the postmaster, of a backend in mid-call, of the worker, of
//! the launcher, and `stop -m immediate`. After each the server is up again; the proof is the processes' new ids.

use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, Result};

use super::{catch, cut_off_since, Fault, Proof, Struck};
use crate::torture::history::Blow;
use crate::torture::rng::Rng;
use crate::torture::world::World;
use crate::StopMode;

/// So many calls must be open for a strike at all of them.
const OPEN_MIN: usize = 3;

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

    fn strike(&mut self, world: &World, _rng: &mut Rng) -> Result<Struck> {
        let Some(open) = catch(world, OPEN_MIN, |_| true) else { return Ok(Struck::idle()) };
        let cluster = world.cluster();
        let before = cluster.postmaster_pid()?;
        let (from_us, lost_before) = (world.now_us(), world.counters.lost_sessions.load(Relaxed));
        match self.0 {
            Down::KillPostmaster => cluster.kill_postmaster()?,
            Down::KillAll => cluster.kill_all()?,
            Down::Immediate => cluster.stop(StopMode::Immediate)?,
        }
        cluster.start()?;
        let after = cluster.postmaster_pid()?;
        world.befell(Blow::Crash, from_us);
        let Some(cut_off) = cut_off_since(world, lost_before) else { return Ok(Struck::unnoticed()) };
        let seen = format!("postmaster {before} -> {after}, {cut_off} calls cut off");
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
        let found = match self.0 {
            Victim::Backend => None,
            Victim::Worker => super::find(world, WORKER)?,
            Victim::Launcher => super::find(world, LAUNCHER)?,
        };
        if found.is_none() && !matches!(self.0, Victim::Backend) {
            return Ok(Struck::Missed("there was none".to_owned()));
        }
        let Some(open) = catch(world, OPEN_MIN, |_| true) else { return Ok(Struck::idle()) };
        let chosen = rng.pick(&open).context("what was caught is not empty")?;
        let (pid, what) = match found {
            Some(pid) => (pid, "no client"),
            None => (chosen.pid, chosen.call),
        };
        let cluster = world.cluster();
        let logged = std::fs::metadata(cluster.log_path()).context("cannot look at the log")?.len();
        let (from_us, lost_before) = (world.now_us(), world.counters.lost_sessions.load(Relaxed));
        cluster.kill_backend(pid)?;
        world.befell(Blow::Crash, from_us);
        world.counters.crashes_caused.fetch_add(1, Relaxed);
        let is_told = cluster.log_from(logged).contains(&format!("(PID {pid}) was terminated by signal 9"));
        let open_calls = open.len();
        if !is_told {
            return Ok(Struck::Missed(format!("the log does not say that {pid} was killed")));
        }
        let Some(cut_off) = cut_off_since(world, lost_before) else { return Ok(Struck::unnoticed()) };
        let seen = format!("process {pid} killed ({what}), {cut_off} calls cut off");
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls, seen }))
    }
}

/// pg_terminate_backend of the worker: nothing else ends, and another one comes.
pub struct TerminateWorker;

impl Fault for TerminateWorker {
    fn name(&self) -> &'static str {
        "terminate-worker"
    }

    fn strike(&mut self, world: &World, _rng: &mut Rng) -> Result<Struck> {
        let Some(pid) = super::find(world, WORKER)? else {
            return Ok(Struck::Missed("there was none".to_owned()));
        };
        let Some(open) = catch(world, 1, |_| true) else { return Ok(Struck::idle()) };
        let from_us = world.now_us();
        world.admin()?.execute("SELECT pg_terminate_backend($1)", &[&pid])?;
        if !super::is_gone(world, pid)? {
            return Ok(Struck::Missed(format!("worker {pid} did not end")));
        }
        let seen = format!("worker {pid} ended");
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls: open.len(), seen }))
    }
}
