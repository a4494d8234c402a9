//! Prepared transactions that outlive crashes: sends are prepared in mid-load, the whole server is killed, some are
//! committed, the server is killed again, and the rest is rolled back or committed. What was committed is delivered,
//! what was not is not.

use std::sync::Arc;

use anyhow::{bail, ensure, Context, Result};
use postgres::Client;

use super::{Fault, Proof, Struck};
use crate::torture::actor::{EXACT, PLAIN, QUEUES};
use crate::torture::history::{Blow, End, Log, Outcome, Us};
use crate::torture::rng::Rng;
use crate::torture::senders;
use crate::torture::world::{Seat, World};

const TRANSACTIONS: usize = 6;
/// Each sends so many in a batch, one by one, and by plain SQL.
const MESSAGES: usize = 5;

#[derive(Default)]
pub struct Prepared {
    strikes: u32,
}

struct Transaction {
    gid: String,
    seat: Arc<Seat>,
    log: Log,
}

impl Transaction {
    fn prepare(world: &World, client: &mut Client, gid: String, queue: u8) -> Result<Self> {
        let (seat, mut log) = world.seat("prepared", false);
        let name = QUEUES[queue as usize];
        let keys = log.sending(queue, 3 * MESSAGES, world.now_us());
        let keys: Vec<i64> = keys.into_iter().map(|key| key as i64).collect();
        let (batch, rest) = keys.split_at(MESSAGES);
        let (single, plain) = rest.split_at(MESSAGES);
        client.batch_execute("BEGIN")?;
        client.execute(senders::SEND_BATCH, &[&name, &batch])?;
        for key in single {
            client.execute(senders::SEND, &[&name, key])?;
        }
        let rows = "SELECT message_of(k), headers_of(k) FROM unnest($1::int8[]) k";
        client.execute(&format!("INSERT INTO queue.{name} (message, headers) {rows}"), &[&plain])?;
        client.batch_execute(&format!("PREPARE TRANSACTION '{gid}'"))?;
        Ok(Self { gid, seat, log })
    }

    fn settle(mut self, world: &World, client: &mut Client, commits: bool) -> Result<()> {
        let open_us = world.now_us();
        self.seat.opens("settle_prepared", open_us);
        let (verb, outcome) =
            if commits { ("COMMIT", Outcome::Acknowledged) } else { ("ROLLBACK", Outcome::RolledBack) };
        client.batch_execute(&format!("{verb} PREPARED '{}'", self.gid))?;
        self.seat.closes();
        self.log.ended(End { open_us, over_us: world.now_us(), outcome });
        world.hand_in(self.log);
        Ok(())
    }
}

/// Kills every process of the server at one go, and starts it again. Returns from when to when it was away.
fn crash(world: &World) -> Result<(Us, usize, String)> {
    let cluster = world.cluster();
    let (from_us, open_calls, old) = (world.now_us(), world.open_calls().len(), cluster.postmaster_pid()?);
    cluster.kill_all()?;
    cluster.start()?;
    world.befell(Blow::Crash, from_us);
    Ok((from_us, open_calls, format!("{old} -> {}", cluster.postmaster_pid()?)))
}

fn ours(client: &mut Client, prefix: &str) -> Result<usize> {
    let sql =
        "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database() AND starts_with(gid, $1)";
    Ok(client.query_one(sql, &[&prefix])?.get::<_, i64>(0) as usize)
}

impl Fault for Prepared {
    fn name(&self) -> &'static str {
        "prepared"
    }

    fn strike(&mut self, world: &World, rng: &mut Rng) -> Result<Struck> {
        self.strikes += 1;
        let prefix = format!("torture-{}-", self.strikes);
        let mut client = world.admin()?;
        let mut open = Vec::new();
        for n in 0..TRANSACTIONS {
            let queue = if n % 2 == 0 { EXACT } else { PLAIN };
            let one = Transaction::prepare(world, &mut client, format!("{prefix}{n}"), queue);
            open.push(one.with_context(|| format!("cannot prepare {prefix}{n}"))?);
        }
        let (from_us, open_calls, first) = crash(world)?;
        let mut client = world.admin()?;
        ensure!(
            ours(&mut client, &prefix)? == TRANSACTIONS,
            "a prepared transaction did not outlive the crash"
        );
        // One is committed while the server is fresh, and at once it crashes again: nobody was told.
        let committed_first = open.remove(rng.below(open.len() as u64) as usize);
        committed_first.settle(world, &mut client, true)?;
        let (_, _, second) = crash(world)?;
        let mut client = world.admin()?;
        let (mut committed, mut rolled_back) = (1, 0);
        for (n, one) in open.into_iter().enumerate() {
            // Both happen, whatever is drawn.
            let commits = n == 0 || (n > 1 && rng.one_in(2));
            *(if commits { &mut committed } else { &mut rolled_back }) += 1;
            one.settle(world, &mut client, commits)?;
        }
        if ours(&mut client, &prefix)? != 0 {
            bail!("a prepared transaction that was settled is still there");
        }
        if open_calls == 0 {
            return Ok(Struck::Missed("no call was open".to_owned()));
        }
        Ok(Struck::Hit(Proof {
            from_us,
            to_us: world.now_us(),
            open_calls,
            seen: format!(
                "{TRANSACTIONS} prepared outlived the crash (postmaster {first}); 1 committed before another ({second}); \
                 {committed} committed, {rolled_back} rolled back in all"
            ),
        }))
    }
}
