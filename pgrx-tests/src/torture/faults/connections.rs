//! Out of connections: every place is taken, clients that lost theirs are refused, and the worker, which needs none of
//! them, comes back all the same.

use std::time::Duration;

use anyhow::{bail, Context, Result};
use postgres::Client;

use super::{Fault, Proof, Struck};
use crate::cluster::Cluster;
use crate::torture::history::Blow;
use crate::torture::rng::Rng;
use crate::torture::world::{World, DATABASE};
use crate::wait::poll;

const LIMIT: Duration = Duration::from_secs(30);
/// Clients that must be refused (SQLSTATE 53300) before there is room again.
const REFUSED_MIN: usize = 10;
/// More connections than any cluster of ours has.
const HOGS_MAX: usize = 2_000;
const WORKER: &str = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' \
    AND datname = current_database()";

pub struct OutOfConnections;

impl Fault for OutOfConnections {
    fn name(&self) -> &'static str {
        "out-of-connections"
    }

    fn strike(&mut self, world: &World, _rng: &mut Rng) -> Result<Struck> {
        let (cluster, mut admin) = (world.cluster(), world.admin()?);
        let (from_us, logged) = (world.now_us(), cluster.log_len());
        let mut hogs = Vec::new();
        take_all(&cluster, &mut hogs)?;
        let open = world.open_calls();
        // Whoever is faster has the places that became free: clients are ended until they were too slow.
        let refused = poll(LIMIT, || {
            let mut end_and_take = || -> Result<()> {
                let pids: Vec<i32> = world.open_calls().iter().map(|open| open.pid).collect();
                admin.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int4[]) pid", &[&pids])?;
                take_all(&cluster, &mut hogs)
            };
            if let Err(error) = end_and_take() {
                return Some(Err(error));
            }
            let refused = count_refused(&cluster.log_from(logged));
            (refused >= REFUSED_MIN).then_some(Ok(refused))
        });
        let Some(refused) = refused.transpose()? else {
            return Ok(Struck::Missed(format!("{} places were taken, and no client was refused", hogs.len())));
        };
        let worker = replace_worker(world, &mut admin)?;
        drop(hogs);
        let (places, seen_open) = (admin_limit(&mut admin)?, open.len());
        if seen_open == 0 {
            return Ok(Struck::Missed("no call was open".to_owned()));
        }
        Ok(Struck::Hit(Proof {
            from_us,
            to_us: world.now_us(),
            open_calls: seen_open,
            seen: format!(
                "all {places} connections in use, clients refused {refused} times with 53300, worker {worker} meanwhile"
            ),
        }))
    }
}

/// Connects until no connection is to be had.
fn take_all(cluster: &Cluster, hogs: &mut Vec<Client>) -> Result<()> {
    while hogs.len() < HOGS_MAX {
        match cluster.connect("postgres") {
            Ok(hog) => hogs.push(hog),
            Err(error) => {
                let code = error.downcast_ref::<postgres::Error>().and_then(postgres::Error::code).cloned();
                return match code {
                    Some(code) if code == postgres::error::SqlState::TOO_MANY_CONNECTIONS => Ok(()),
                    _ => Err(error.context("connecting failed otherwise than for want of connections")),
                };
            }
        }
    }
    bail!("{HOGS_MAX} connections, and still more are to be had")
}

fn count_refused(log: &str) -> usize {
    let is_refusal = |line: &&str| {
        line.contains(&format!("@{DATABASE} FATAL:"))
            && (line.contains("too many clients already") || line.contains("remaining connection slots"))
    };
    log.lines().filter(is_refusal).count()
}

fn admin_limit(admin: &mut Client) -> Result<String> {
    Ok(admin.query_one("SHOW max_connections", &[])?.try_get(0)?)
}

/// Ends the worker and waits for the next one.
fn replace_worker(world: &World, admin: &mut Client) -> Result<String> {
    // Another fault may just have ended it.
    let Some(old) = poll(LIMIT, || admin.query_opt(WORKER, &[]).ok().flatten().map(|row| row.get::<_, i32>(0)))
    else {
        bail!("there is no worker to begin with, for {} s", LIMIT.as_secs())
    };
    let from_us = world.now_us();
    admin.execute("SELECT pg_terminate_backend($1)", &[&old])?;
    let new = poll(LIMIT, || match admin.query_opt(WORKER, &[]) {
        Ok(row) => row.map(|row| row.get::<_, i32>(0)).filter(|pid| *pid != old).map(Ok),
        Err(error) => Some(Err(error)),
    });
    let new = new.transpose()?.context("without free connections the worker did not come back")?;
    world.befell(Blow::WorkerAway, from_us);
    Ok(format!("{old} -> {new}"))
}
