//! Failover: a standby streams, and takes over in mid-load when every process of its primary is killed.
//!
//! Synchronous: commits wait for the standby, so nothing that was acknowledged may be lost. Asynchronous: the standby is
//! kept from following for a moment first, so that there is something to lose; how much it was, the checker tells.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::sys::signal::Signal;
use postgres::Client;

use super::{catch, Fault, Proof, Struck};
use crate::cluster::{Cluster, ClusterOptions};
use crate::disk::Disk;
use crate::processes;
use crate::torture::history::Us;
use crate::torture::rng::Rng;
use crate::torture::world::World;
use crate::wait::poll;

/// Calls that must be open when the primary is killed.
const OPEN_MIN: usize = 3;
const LIMIT: Duration = Duration::from_secs(60);
/// Messages that are acknowledged while an asynchronous standby cannot follow.
const BEHIND_MIN: u64 = 50;
/// WAL that must be unsent by then: less may still lie in the socket and arrive.
const BEHIND_BYTES: i64 = 1 << 20;

pub struct Promotion {
    is_synchronous: bool,
    /// The one for the next strike, if there is one already.
    standby: Option<Cluster>,
}

impl Promotion {
    pub const SYNCHRONOUS: Self = Self { is_synchronous: true, standby: None };
    pub const ASYNCHRONOUS: Self = Self { is_synchronous: false, standby: None };
}

/// A standby is made with its primary's settings, but for those that are its own.
fn options_of(primary: &mut Client) -> Result<ClusterOptions> {
    let sql = "SELECT name, current_setting(name) FROM pg_settings WHERE sourcefile IS NOT NULL AND name <> ALL ( \
        '{listen_addresses, unix_socket_directories, synchronous_standby_names, primary_conninfo, data_directory, \
        hba_file, ident_file, config_file}')";
    let rows = primary.query(sql, &[])?;
    let options = ClusterOptions::default();
    Ok(rows.iter().fold(options, |options, row| options.set(row.get(0), row.get(1))))
}

fn make_standby(primary: &Cluster) -> Result<Cluster> {
    let mut client = primary.connect("postgres")?;
    // Kept for the time between the copy's end and the standby's first question.
    client.batch_execute("ALTER SYSTEM SET wal_keep_size = '1GB'")?;
    client.batch_execute("SELECT pg_reload_conf()")?;
    options_of(&mut client)?.start_standby_of(primary).context("cannot make a standby")
}

/// Waits until a query of one boolean is true.
fn wait_true(client: &mut Client, limit: Duration, what: &str, sql: &str) -> Result<()> {
    let is_true = poll(limit, || match client.query_one(sql, &[]) {
        Ok(row) => row.get::<_, Option<bool>>(0).unwrap_or(false).then_some(Ok(())),
        Err(error) => Some(Err(error)),
    });
    is_true.transpose()?.with_context(|| format!("waited {} s in vain until {what}", limit.as_secs()))
}

/// Whether there is a standby that streams, in a while.
fn streams(primary: &mut Client) -> bool {
    let sql = "SELECT bool_or(state = 'streaming') FROM pg_stat_replication";
    wait_true(primary, LIMIT, "the standby streams", sql).is_ok()
}

/// From now on commits wait for the standby, and it has all that was committed before.
fn make_synchronous(primary: &mut Client) -> Result<()> {
    primary.batch_execute("ALTER SYSTEM SET synchronous_standby_names = '*'")?;
    primary.batch_execute("SELECT pg_reload_conf()")?;
    let is_sync = "SELECT bool_or(sync_state = 'sync') FROM pg_stat_replication";
    wait_true(primary, LIMIT, "the standby is synchronous", is_sync)?;
    // What they say of themselves is not what backends go by: somebody must be seen to wait.
    wait_true(
        primary,
        LIMIT,
        "a commit waits for the standby",
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')",
    )?;
    let lsn: String = primary.query_one("SELECT pg_current_wal_insert_lsn()::text", &[])?.get(0);
    let sql = format!("SELECT bool_or(flush_lsn >= '{lsn}') FROM pg_stat_replication");
    wait_true(primary, LIMIT, "the standby has what was committed before", &sql)
}

/// Keeps the standby from receiving until clients have heard of commits that it does not have. Returns the process that
/// stands still, and a time by which the standby had whatever was acknowledged.
fn leave_behind(world: &World, primary: &mut Client, standby: &Cluster) -> Result<(u32, Us)> {
    let mut client = standby.connect("postgres")?;
    // There may be none for a moment: it is started again when its connection was lost.
    let sql = "SELECT pid FROM pg_stat_wal_receiver WHERE pid IS NOT NULL";
    let receiver: Option<i32> = poll(LIMIT, || match client.query_opt(sql, &[]) {
        Ok(row) => row.map(|row| Ok(row.get(0))),
        Err(error) => Some(Err(error)),
    })
    .transpose()?;
    let receiver = receiver.context("the standby receives nothing")?;
    let receiver = u32::try_from(receiver).context("a PID is positive")?;
    let kept_until_us = world.now_us();
    let lsn: String = primary.query_one("SELECT pg_current_wal_insert_lsn()::text", &[])?.get(0);
    let sql = format!("SELECT bool_or(flush_lsn >= '{lsn}') FROM pg_stat_replication");
    wait_true(primary, LIMIT, "the standby has what was acknowledged", &sql)?;
    processes::send(receiver, Signal::SIGSTOP)?;
    let behind =
        "SELECT coalesce(pg_current_wal_flush_lsn() - min(sent_lsn), 0)::int8 FROM pg_stat_replication";
    let is_behind = poll(LIMIT, || match primary.query_one(behind, &[]) {
        Ok(row) => (row.get::<_, i64>(0) >= BEHIND_BYTES).then_some(Ok(())),
        Err(error) => Some(Err(error)),
    });
    is_behind.transpose()?.context("the standby could not be left behind")?;
    let acknowledged = || world.counters.acknowledged.load(Relaxed);
    let before = acknowledged();
    poll(LIMIT, || (acknowledged() >= before + BEHIND_MIN).then_some(()))
        .context("nothing is acknowledged any more")?;
    Ok((receiver, kept_until_us))
}

impl Fault for Promotion {
    fn name(&self) -> &'static str {
        if self.is_synchronous {
            "promote-synchronous"
        } else {
            "promote-asynchronous"
        }
    }

    /// A standby is costly to make.
    fn weight(&self) -> u64 {
        1
    }

    fn skipped(&self, world: &World) -> Option<String> {
        let has_disks = [Disk::Wal, Disk::Tables].iter().any(|disk| world.cluster().disk(*disk).is_some());
        has_disks.then(|| "a cluster with small disks is not copied".to_owned())
    }

    /// The first is made while the server has nothing else to do; later ones in mid-load.
    fn prepare(&mut self, world: &World) -> Result<()> {
        self.standby = Some(make_standby(&world.cluster())?);
        Ok(())
    }

    fn strike(&mut self, world: &World, _rng: &mut Rng) -> Result<Struck> {
        let (primary, mut client) = (world.cluster(), world.admin()?);
        let standby = match self.standby.take().filter(|_| streams(&mut client)) {
            Some(standby) => standby,
            // Later ones, or the first has fallen behind what the primary keeps.
            None => make_standby(&primary)?,
        };
        if !streams(&mut client) {
            bail!("the standby does not stream; its log:\n{}", standby.log_tail());
        }
        let mut stopped = None;
        if self.is_synchronous {
            make_synchronous(&mut client)?;
        } else {
            stopped = Some(leave_behind(world, &mut client, &standby)?);
        }
        let Some(open) = catch(world, OPEN_MIN, |_| true) else {
            // Nobody is to wait for a standby that goes.
            client.batch_execute("ALTER SYSTEM RESET synchronous_standby_names")?;
            client.batch_execute("SELECT pg_reload_conf()")?;
            return Ok(Struck::idle());
        };
        let from_us = world.now_us();
        let old = primary.postmaster_pid()?;
        primary.kill_all()?;
        if let Some((receiver, _)) = stopped {
            processes::send(receiver, Signal::SIGCONT)?;
        }
        let mut admin = standby.connect("postgres")?;
        let is_promoted: bool = admin.query_one("SELECT pg_promote()", &[])?.get(0);
        if !is_promoted {
            bail!("the standby was not promoted; its log:\n{}", standby.log_tail());
        }
        let new = standby.postmaster_pid()?;
        world.fail_over(Arc::new(standby), stopped.map(|(_, kept_until_us)| kept_until_us), from_us);
        let seen = format!("postmaster {old} was killed, {new} took over");
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls: open.len(), seen }))
    }
}
