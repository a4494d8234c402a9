//! Faults that strike single sessions while the server goes on: pg_terminate_backend, pg_cancel_backend, timeouts, and
//! a consumer that stands still past its lease.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;

use super::{catch, cut_off, Fault, Proof, Struck};
use crate::processes;
use crate::torture::consumers::LEASE_US;
use crate::torture::rng::Rng;
use crate::torture::world::World;
use crate::wait::poll;

/// Something must have come of it within this time.
const LIMIT: Duration = Duration::from_secs(3);

/// pg_terminate_backend of up to three backends in mid-call.
pub struct Terminate;

impl Fault for Terminate {
    fn name(&self) -> &'static str {
        "terminate"
    }

    fn strike(&mut self, world: &World, rng: &mut Rng) -> Result<Struck> {
        let Some(open) = catch(world, 1, |_| true) else { return Ok(Struck::idle()) };
        let mut client = world.admin()?;
        let from_us = world.now_us();
        let mut chosen = Vec::new();
        for _ in 0..rng.between(1, 3) {
            chosen.extend(rng.pick(&open).map(|open| open.pid));
        }
        let sql = "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity \
            WHERE pid = ANY ($1) AND state = 'active'";
        let pids: Vec<i32> = client.query(sql, &[&chosen])?.iter().map(|row| row.get(0)).collect();
        let struck_us = world.now_us();
        for pid in &pids {
            if !super::is_gone(world, *pid)? {
                return Ok(Struck::Missed(format!("backend {pid} did not end")));
            }
        }
        if pids.is_empty() {
            return Ok(Struck::Missed("they were over".to_owned()));
        }
        let Some(cut_off) = cut_off(world, from_us, struck_us) else { return Ok(Struck::unnoticed()) };
        let seen = format!("backends {pids:?} ended, {cut_off} calls cut off");
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls: open.len(), seen }))
    }
}

/// pg_cancel_backend of whoever is in a call, again and again until it ended one.
pub struct Cancel;

impl Fault for Cancel {
    fn name(&self) -> &'static str {
        "cancel"
    }

    fn strike(&mut self, world: &World, _rng: &mut Rng) -> Result<Struck> {
        let mut client = world.admin()?;
        let (from_us, before) = (world.now_us(), world.counters.cut_off.load(Relaxed));
        let mut open_calls = 0;
        let cut_off = poll(LIMIT, || {
            let pids: Vec<i32> = world.open_calls().iter().map(|open| open.pid).collect();
            open_calls = pids.len().max(open_calls);
            let sql =
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid = ANY ($1) AND state = 'active'";
            if client.execute(sql, &[&pids]).is_err() {
                return None;
            }
            Some(world.counters.cut_off.load(Relaxed) - before).filter(|cut_off| *cut_off > 0)
        });
        let Some(cut_off) = cut_off else { return Ok(Struck::Missed("no call was cancelled".to_owned())) };
        let seen = format!("{cut_off} calls cancelled");
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls, seen }))
    }
}

/// For a while every call has a statement_timeout and a lock_timeout of some milliseconds.
pub struct Timeouts;

impl Fault for Timeouts {
    fn name(&self) -> &'static str {
        "timeouts"
    }

    fn strike(&mut self, world: &World, rng: &mut Rng) -> Result<Struck> {
        const FOR: Duration = Duration::from_millis(200);
        let Some(open) = catch(world, 1, |_| true) else { return Ok(Struck::idle()) };
        let (from_us, before) = (world.now_us(), world.counters.cut_off.load(Relaxed));
        let ms = rng.between(2, 12) as u32;
        world.set_patience_ms(ms);
        std::thread::sleep(FOR);
        let cut_off =
            poll(LIMIT, || Some(world.counters.cut_off.load(Relaxed) - before).filter(|cut_off| *cut_off > 0));
        world.set_patience_ms(0);
        let Some(cut_off) = cut_off else { return Ok(Struck::Missed("no call took that long".to_owned())) };
        let seen = format!("{cut_off} calls ended by timeouts of {ms} ms");
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls: open.len(), seen }))
    }
}

/// SIGSTOP of a consumer's backend in mid-call for longer than its lease lasts, then SIGCONT: what it does under the
/// lease is refused.
pub struct Stop;

impl Fault for Stop {
    fn name(&self) -> &'static str {
        "stop-consumer"
    }

    fn weight(&self) -> u64 {
        6 // it takes as long as a lease, and not every one is hit
    }

    fn strike(&mut self, world: &World, rng: &mut Rng) -> Result<Struck> {
        const UNDER_A_LEASE: [&str; 6] =
            ["finish", "delete_strictly_and_read", "retry", "release", "extend", "ledger"];
        let caught = catch(world, 1, |open| open.is_consumer && UNDER_A_LEASE.contains(&open.call));
        let Some(victim) = caught.as_deref().and_then(|open| rng.pick(open)).cloned() else {
            return Ok(Struck::idle());
        };
        let open_calls = world.open_calls().len();
        let pid = victim.pid as u32;
        let (ended, refused) = victim.seat.ended_and_refused();
        let from_us = world.now_us();
        processes::send(pid, Signal::SIGSTOP)?;
        std::thread::sleep(Duration::from_micros(LEASE_US + LEASE_US / 10));
        let is_stopped = processes::is_stopped(pid);
        let was_in_call = world.is_open(&victim);
        processes::send(pid, Signal::SIGCONT)?;
        if !is_stopped || !was_in_call {
            return Ok(Struck::Missed(format!("backend {pid} was not in the call any more")));
        }
        let stood_ms = (world.now_us() - from_us) / 1_000;
        // It may have stood before its lease was looked at, or after.
        let was_refused = poll(LIMIT, || match victim.seat.ended_and_refused() {
            (_, now) if now > refused => Some(true),
            (now, _) => (now > ended).then_some(false),
        });
        if was_refused != Some(true) {
            return Ok(Struck::Missed(format!("{} of backend {pid} was not refused", victim.call)));
        }
        let seen = format!("backend {pid} stood still for {stood_ms} ms in {}, and was refused", victim.call);
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls, seen }))
    }
}
