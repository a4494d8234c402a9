//! What an administrator, or autovacuum, does to a queue's table while it is in use: VACUUM FULL, CLUSTER, REINDEX,
//! REINDEX CONCURRENTLY, and vacuums that come as often as they can. Rows move, indexes are other files; leases stay.
//!
//! REINDEX CONCURRENTLY takes the indexes of the table itself, one by one, and never that of its TOAST table: PostgreSQL
//! 16 to 18 lose entries of the latter (`missing chunk number 0`, `no valid index found for toast relation`) where
//! others insert meanwhile, in a table without queues too. README.md has the figures.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result};
use postgres::Client;

use super::{Fault, Proof, Struck};
use crate::torture::actor::QUEUES;
use crate::torture::rng::Rng;
use crate::torture::world::World;
use crate::wait::poll;

/// How long clients may take to use the table, and autovacuum to come.
const LIMIT: Duration = Duration::from_secs(30);

/// One command that gives a table, or its indexes, new files.
pub struct Rewrite {
    name: &'static str,
    /// With `%` for the table, `$` for its primary key's index, `#` for each of its indexes in turn.
    sql: &'static str,
}

impl Rewrite {
    pub const ALL: [Self; 4] = [
        Self { name: "vacuum-full", sql: "VACUUM (FULL, ANALYZE) %" },
        Self { name: "cluster", sql: "CLUSTER % USING $" },
        Self { name: "reindex", sql: "REINDEX TABLE %" },
        Self { name: "reindex-concurrently", sql: "REINDEX INDEX CONCURRENTLY #" },
    ];
}

impl Rewrite {
    /// What is run on `queue`'s table, one command after the other, each a transaction of its own.
    fn commands(&self, client: &mut Client, queue: &str) -> Result<Vec<String>> {
        let find_indexes =
            "SELECT format('queue.%I', relname), quote_ident(relname), indisprimary FROM pg_index \
            JOIN pg_class ON pg_class.oid = indexrelid WHERE indrelid = $1::text::regclass ORDER BY indexrelid";
        let indexes = client.query(find_indexes, &[&format!("queue.{queue}")])?;
        let key = indexes.iter().find(|index| index.get(2)).context("a queue without primary key")?;
        let sql = self.sql.replace('%', &format!("queue.{queue}")).replace('$', key.get(1));
        if sql.contains('#') {
            Ok(indexes.iter().map(|index| sql.replace('#', index.get(0))).collect())
        } else {
            Ok(vec![sql])
        }
    }
}

/// The files of a table and its indexes, in the order of the indexes' names.
fn files(client: &mut Client, queue: &str) -> Result<Vec<u32>> {
    let sql = "SELECT pg_relation_filenode(oid) FROM pg_class WHERE oid = $1::text::regclass \
        OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = $1::text::regclass) ORDER BY relname";
    let rows = client.query(sql, &[&format!("queue.{queue}")])?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Clients that have used the table in a transaction that is still open: they hold a lock on it.
fn users(client: &mut Client, queue: &str) -> Result<i64> {
    let sql = "SELECT count(DISTINCT pid) FROM pg_locks WHERE relation = $1::text::regclass \
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND granted";
    Ok(client.query_one(sql, &[&format!("queue.{queue}")])?.get(0))
}

impl Fault for Rewrite {
    fn name(&self) -> &'static str {
        self.name
    }

    fn strike(&mut self, world: &World, rng: &mut Rng) -> Result<Struck> {
        let mut client = world.admin()?;
        let queue = *rng.pick(&QUEUES).context("there is no queue")?;
        let commands = self.commands(&mut client, queue)?;
        let before = files(&mut client, queue)?;
        let in_use = poll(LIMIT, || match users(&mut client, queue) {
            Ok(0) => None,
            some => Some(some),
        });
        let Some(in_use) = in_use.transpose()? else {
            return Ok(Struck::Missed(format!("nobody uses {queue:?}")));
        };
        let (from_us, open_calls) = (world.now_us(), world.open_calls().len());
        for sql in commands {
            let Err(error) = client.batch_execute(&sql) else { continue };
            // PostgreSQL's own bug 18351: a rewrite keeps rows that died a moment ago, whose large values a vacuum that came
            // before has taken away, since it looked at fewer transactions.
            if error.as_db_error().is_some_and(|error| error.message().starts_with("missing chunk number")) {
                return Ok(Struck::Missed(format!("{sql}: {error:?}")));
            }
            return Err(error).context(sql);
        }
        let to_us = world.now_us();
        let after = files(&mut client, queue)?;
        let changed = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        if before.len() != after.len() || changed + 1 < before.len() || open_calls == 0 {
            let what = format!("{open_calls} calls open, files {before:?} -> {after:?}");
            return Ok(Struck::Missed(what));
        }
        Ok(Struck::Hit(Proof {
            from_us,
            to_us,
            open_calls,
            seen: format!(
                "{queue}, locked by {in_use} open transactions: {changed} of {} files are new",
                after.len()
            ),
        }))
    }
}

/// Vacuum comes as often as it can, and freezes what it finds.
pub struct Autovacuum;

const EAGER: [(&str, &str); 4] = [
    ("autovacuum_naptime", "1s"),
    ("autovacuum_vacuum_cost_delay", "0"),
    ("vacuum_freeze_min_age", "0"),
    ("vacuum_freeze_table_age", "0"),
];

/// How often the queues were vacuumed.
fn vacuumed(client: &mut Client) -> Result<Vec<i64>> {
    let sql =
        "SELECT autovacuum_count FROM pg_stat_user_tables WHERE schemaname = 'queue' AND relname = ANY($1) \
        ORDER BY relname";
    let rows = client.query(sql, &[&&QUEUES[..]])?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

impl Fault for Autovacuum {
    fn name(&self) -> &'static str {
        "autovacuum"
    }

    fn strike(&mut self, world: &World, _rng: &mut Rng) -> Result<Struck> {
        let mut client = world.admin()?;
        for (setting, value) in EAGER {
            client.batch_execute(&format!("ALTER SYSTEM SET {setting} = '{value}'"))?;
        }
        let set = "SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10)";
        for queue in QUEUES {
            client.batch_execute(&format!("ALTER TABLE queue.{queue} {set}"))?;
        }
        client.batch_execute("SELECT pg_reload_conf()")?;
        let (from_us, open_calls) = (world.now_us(), world.open_calls().len());
        let calls = world.counters.calls.load(Relaxed);
        let before = vacuumed(&mut client)?;
        let after = poll(LIMIT, || match vacuumed(&mut client) {
            Ok(after) => before.iter().zip(&after).all(|(before, after)| before < after).then_some(Ok(after)),
            Err(error) => Some(Err(error)),
        });
        let meanwhile = world.counters.calls.load(Relaxed) - calls;
        match after.transpose()? {
            Some(after) if open_calls > 0 && meanwhile > 0 => Ok(Struck::Hit(Proof {
                from_us,
                to_us: world.now_us(),
                open_calls,
                seen: format!("vacuums of the queues {before:?} -> {after:?}, {meanwhile} calls meanwhile"),
            })),
            _ => Ok(Struck::Missed(format!("not every queue was vacuumed (before: {before:?})"))),
        }
    }
}
