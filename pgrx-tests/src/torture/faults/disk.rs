//! Full disks: of pg_wal, which takes the server down until somebody makes room, and of the queues' tables, which makes
//! calls fail. Only on a cluster that was made with small disks ([`crate::disk`]).

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{bail, Result};

use super::{catch, Fault, Proof, Struck, NO_SPACE, WAL_FULL};
use crate::disk::{mounting_refused, Disk, SmallDisk};
use crate::torture::actor::QUEUES;
use crate::torture::history::Blow;
use crate::torture::rng::Rng;
use crate::torture::world::{World, DATABASE};
use crate::wait::poll;
use crate::ClusterOptions;

/// How long the load may take to need more room than there is.
const FULL_LIMIT: Duration = Duration::from_secs(30);
/// How long the calls may take, from the first that failed, that are to fail or to be done on a full disk.
const WITHOUT_ROOM_LIMIT: Duration = Duration::from_secs(60);
/// How long the server may take to notice, recover, and serve again.
const BACK_LIMIT: Duration = Duration::from_secs(60);
/// Calls that must be open at first.
const OPEN_MIN: usize = 3;
/// Calls that must fail before there is room again.
const FAILED_MIN: usize = 10;
/// Messages that must be finished meanwhile: a delete needs no room.
const FINISHED_MIN: u64 = 20;

/// pg_wal's disk: what the server keeps and takes at most with the settings below, several times over.
const WAL_MIB: u32 = 128;
const TABLES_MIB: u32 = 64;

fn no_disk(world: &World, disk: Disk) -> Option<String> {
    world.cluster().disk(disk).is_none().then(|| mounting_refused().unwrap_or_default())
}

/// Where nothing can be mounted the fault is skipped, and says why.
fn with_disk(options: ClusterOptions, disk: Disk) -> ClusterOptions {
    match (mounting_refused(), disk) {
        (Some(_), _) => options,
        (None, Disk::Wal) => options.disk(disk, WAL_MIB).set("max_wal_size", "16MB").set("min_wal_size", "2MB"),
        (None, Disk::Tables) => options.disk(disk, TABLES_MIB),
    }
}

fn small_disk(world: &World, disk: Disk) -> Result<SmallDisk> {
    world.cluster().disk(disk).ok_or_else(|| anyhow::anyhow!("there is no small disk ({disk:?})"))
}

/// pg_wal is full: whoever writes WAL panics, and the server cannot always start again while it is.
pub struct WalFull;

impl Fault for WalFull {
    fn name(&self) -> &'static str {
        WAL_FULL
    }

    fn cluster(&self, options: ClusterOptions) -> ClusterOptions {
        with_disk(options, Disk::Wal)
    }

    fn skipped(&self, world: &World) -> Option<String> {
        no_disk(world, Disk::Wal)
    }

    fn strike(&mut self, world: &World, _rng: &mut Rng) -> Result<Struck> {
        let (cluster, disk) = (world.cluster(), small_disk(world, Disk::Wal)?);
        if catch(world, OPEN_MIN, |_| true).is_none() {
            return Ok(Struck::idle());
        }
        let (from_us, logged) = (world.now_us(), cluster.log_len());
        let mut open_calls = 0;
        // Again and again: a checkpoint may give some of it back.
        let panicked = poll(FULL_LIMIT, || {
            let open = world.open_calls().len();
            if let Err(error) = disk.fill() {
                return Some(Err(error));
            }
            let panic = find_panic(&cluster.log_from(logged));
            if panic.is_none() {
                open_calls = open;
            }
            panic.map(Ok)
        });
        let Some(panic) = panicked.transpose()? else {
            disk.make_room()?;
            return Ok(Struck::Missed(format!("nothing needed room within {} s", FULL_LIMIT.as_secs())));
        };
        // Recovery, too, meets the full disk. It either manages without more room, or the server ends.
        let outcome = poll(BACK_LIMIT, || {
            if let Err(error) = disk.fill() {
                return Some(Err(error));
            }
            match cluster.has_ended() {
                Ok(false) => {}
                ended => return Some(ended),
            }
            let is_reinitialised = cluster.log_from(logged).contains("reinitializing");
            (is_reinitialised && cluster.connect("postgres").is_ok()).then_some(Ok(false))
        });
        disk.make_room()?;
        let Some(has_ended) = outcome.transpose()? else {
            bail!("with pg_wal full the server neither came back nor ended; its log:\n{}", cluster.log_tail());
        };
        // It may have panicked once more meanwhile.
        let is_back = poll(BACK_LIMIT, || match cluster.has_ended() {
            Ok(true) => Some(cluster.start()),
            Ok(false) => cluster.connect("postgres").is_ok().then_some(Ok(())),
            Err(error) => Some(Err(error)),
        });
        match is_back {
            Some(back) => back?,
            None => bail!("with room again the server did not come back; its log:\n{}", cluster.log_tail()),
        }
        world.befell(Blow::Crash, from_us);
        let crashes =
            cluster.log_from(logged).matches("all server processes terminated; reinitializing").count();
        world.counters.crashes_caused.fetch_add(crashes as u64, Relaxed);
        if open_calls == 0 {
            return Ok(Struck::Missed(format!("{panic}, while no call was open")));
        }
        let end = if has_ended { "could not start until there was room" } else { "came back all the same" };
        Ok(Struck::Hit(Proof {
            from_us,
            to_us: world.now_us(),
            open_calls,
            seen: format!("{panic}; the server {end}"),
        }))
    }
}

/// The first PANIC for want of space.
fn find_panic(log: &str) -> Option<String> {
    let line = log.lines().find(|line| line.contains("PANIC:") && line.contains(NO_SPACE))?;
    Some(line[line.find("PANIC:")?..].to_owned())
}

/// The disk with the queues' tables is full: sends and retries fail, reads and deletes go on.
pub struct TablesFull;

impl Fault for TablesFull {
    fn name(&self) -> &'static str {
        "tables-full"
    }

    fn cluster(&self, options: ClusterOptions) -> ClusterOptions {
        with_disk(options, Disk::Tables)
    }

    fn skipped(&self, world: &World) -> Option<String> {
        no_disk(world, Disk::Tables)
    }

    /// The queues and what is written of leases lie there from now on; archives and the ledger do not.
    fn prepare(&mut self, world: &World) -> Result<()> {
        let disk = small_disk(world, Disk::Tables)?;
        let place = disk.path().join("space");
        std::fs::create_dir(&place)?;
        world.cluster().user.own(&place)?;
        let mut client = world.admin()?;
        client.batch_execute(&format!("CREATE TABLESPACE small LOCATION '{}'", place.display()))?;
        let mut tables: Vec<String> = QUEUES.iter().map(|queue| format!("queue.{queue}")).collect();
        tables.push("queue_catalog.lease".to_owned());
        for table in tables {
            client.batch_execute(&format!("ALTER TABLE {table} SET TABLESPACE small"))?;
            let sql = "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = $1::text::regclass";
            for row in client.query(sql, &[&table])? {
                let index: &str = row.get(0);
                client.batch_execute(&format!("ALTER INDEX {index} SET TABLESPACE small"))?;
            }
        }
        Ok(())
    }

    fn strike(&mut self, world: &World, _rng: &mut Rng) -> Result<Struck> {
        let (cluster, disk) = (world.cluster(), small_disk(world, Disk::Tables)?);
        let Some(open) = catch(world, OPEN_MIN, |_| true) else { return Ok(Struck::idle()) };
        let (from_us, logged) = (world.now_us(), cluster.log_len());
        let finished = || world.counters.acts.load(Relaxed);
        let client = format!("@{DATABASE} ERROR:");
        // Again and again: what is deleted gives some of it back.
        let failed_on_full_disk = || -> Result<usize> {
            disk.fill()?;
            let log = cluster.log_from(logged);
            Ok(log.lines().filter(|line| line.contains(&client) && line.contains(NO_SPACE)).count())
        };
        let first =
            poll(FULL_LIMIT, || failed_on_full_disk().map(|failed| (failed > 0).then_some(())).transpose());
        if !matches!(first, Some(Ok(()))) {
            disk.make_room()?;
            return first.transpose().map(|_| Struck::Missed("nothing needed room".to_owned()));
        }
        let before = finished();
        let (mut failed, mut meanwhile) = (0, 0);
        let outcome = poll(WITHOUT_ROOM_LIMIT, || match failed_on_full_disk() {
            Ok(count) => {
                (failed, meanwhile) = (count, finished() - before);
                (failed >= FAILED_MIN && meanwhile >= FINISHED_MIN).then_some(Ok(()))
            }
            Err(error) => Some(Err(error)),
        });
        disk.make_room()?;
        if outcome.transpose()?.is_none() {
            bail!("on a full disk {failed} calls failed, and only {meanwhile} messages were finished");
        }
        Ok(Struck::Hit(Proof {
            from_us,
            to_us: world.now_us(),
            open_calls: open.len(),
            seen: format!("{failed} calls failed with 53100, {meanwhile} messages were finished meanwhile"),
        }))
    }
}
