//! On what the figures were taken: machine, versions, settings, commit.
//!
//! Only looks, but for one file that it writes to see how fast the disk is.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use postgres::Client;
use serde_json::{json, Map, Value};

use super::pgbench::Pgbench;
use super::systems::PAYLOAD;
use super::Options;
use crate::xtask::repository;
use crate::xtask::run::output;

const FLUSH_TIME: Duration = Duration::from_secs(1);
const FLUSH_FILE_BYTES: usize = 16 << 20;
const PAGE: [u8; 8_192] = [1; 8_192];

pub fn memory_mb() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let kb =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    Ok(kb.unwrap_or(1_048_576_u64) / 1_024)
}

/// How often a second the disk under `directory` makes a page durable, one after the other. Nearly every figure
/// leans on it, and on shared machines it is not the same from one minute to the next.
pub fn flushes_per_s(directory: &Path) -> Result<u64> {
    let path = directory.join("flush-test");
    let mut file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    file.write_all(&vec![0; FLUSH_FILE_BYTES]).and_then(|()| file.sync_all()).context("cannot flush")?;
    let (begun, mut flushes) = (Instant::now(), 0);
    while begun.elapsed() < FLUSH_TIME {
        file.seek(SeekFrom::Start(flushes * PAGE.len() as u64 % FLUSH_FILE_BYTES as u64))
            .and_then(|_| file.write_all(&PAGE))
            .and_then(|()| file.sync_data())
            .context("cannot flush")?;
        flushes += 1;
    }
    fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    Ok(flushes / FLUSH_TIME.as_secs())
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, model)| model.to_owned())
}

fn git(arguments: &[&str]) -> Option<String> {
    let text = output(Command::new("git").arg("-C").arg(repository()).args(arguments)).ok()?;
    Some(text.trim().to_owned())
}

pub fn about(client: &mut Client, pgbench: &Pgbench, pgmq: &str, options: &Options) -> Result<Value> {
    let mut one = |sql: &str| -> Result<String> { Ok(client.query_one(sql, &[])?.try_get(0)?) };
    let date = one("SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')")?;
    let postgres = one("SELECT version()")?;
    let pg_queue = one("SELECT extversion FROM pg_extension WHERE extname = 'pg_queue'")?;
    let payload_bytes = one(&format!("SELECT pg_column_size('{PAYLOAD}'::jsonb)::text"))?;
    let mut settings = Map::new();
    for row in client.query(
        "SELECT name, setting || coalesce(' x ' || unit, '') FROM pg_settings \
         WHERE source NOT IN ('default', 'override', 'client', 'session') OR name LIKE 'pg\\_queue.%' \
            OR name IN ('fsync', 'synchronous_commit', 'full_page_writes', 'data_checksums', 'wal_level', \
                        'wal_sync_method', 'autovacuum', 'io_method') ORDER BY name",
        &[],
    )? {
        settings.insert(row.try_get(0)?, Value::String(row.try_get(1)?));
    }
    let dirty = git(&["status", "--porcelain"]).is_some_and(|text| !text.is_empty());
    let commit = git(&["rev-parse", "HEAD"]);
    Ok(json!({
        "date": date,
        "machine": {
            "CPU": cpu_model(),
            "cores": std::thread::available_parallelism().map_or(1, |cores| cores.get()),
            "memory, MB": memory_mb()?,
            "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "file system of /tmp": output(Command::new("stat").args(["-f", "-c", "%T", "/tmp"])).unwrap_or_default().trim(),
        },
        "versions": {
            "postgres": postgres, "pg_queue": pg_queue, "pgmq": pgmq, "pgbench": pgbench.version,
            "commit": commit.map(|commit| if dirty { format!("{commit} and changes") } else { commit }),
        },
        "settings": settings,
        "payload": { "text_bytes": PAYLOAD.len(), "jsonb_bytes": payload_bytes },
        "options": {
            "rounds": options.rounds(), "seconds": options.seconds(), "quick": options.quick, "only": options.only,
        },
    }))
}
