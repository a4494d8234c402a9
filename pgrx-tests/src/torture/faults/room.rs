//! The dispatcher has no room: one queue's leases hold every slot that they may have, so that nothing else of it is
//! delivered, and the others have to do with what they are promised. Only on a server with a small
//! pg_queue.max_messages.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use postgres::Client;

use super::{Fault, Proof, Struck};
use crate::torture::actor::QUEUES;
use crate::torture::history::Unseen;
use crate::torture::rng::Rng;
use crate::torture::world::World;
use crate::wait::poll;
use crate::ClusterOptions;

/// Above this, filling the dispatcher takes too long.
const MESSAGES_MAX: i64 = 20_000;
/// How long the others may take to finish so many messages while there is no room.
const LIMIT: Duration = Duration::from_secs(30);
const FINISHED_MIN: u64 = 50;

const READ: &str = "SELECT msg_id, lease_id FROM queue_read('hoard', 100000, '1 h')";

pub struct NoRoom;

fn max_messages(client: &mut Client) -> Result<i64> {
    let sql = "SELECT setting::int8 FROM pg_settings WHERE name = 'pg_queue.max_messages'";
    Ok(client.query_opt(sql, &[])?.context("the server has no pg_queue.max_messages")?.get(0))
}

impl Fault for NoRoom {
    fn name(&self) -> &'static str {
        "no-room"
    }

    fn cluster(&self, options: ClusterOptions) -> ClusterOptions {
        // Each queue is promised its share of half of the messages.
        options.set("pg_queue.max_messages", "4096").set("pg_queue.max_queues", "8")
    }

    fn skipped(&self, world: &World) -> Option<String> {
        match world.admin().and_then(|mut client| max_messages(&mut client)) {
            Ok(most) if most <= MESSAGES_MAX => None,
            Ok(most) => Some(format!("pg_queue.max_messages is {most}, more than {MESSAGES_MAX}")),
            Err(error) => Some(format!("{error:#}")),
        }
    }

    fn prepare(&mut self, world: &World) -> Result<()> {
        world.admin()?.batch_execute("SELECT queue_create('hoard', max_deliveries => 0)")?;
        world.make_room_scarce();
        Ok(())
    }

    /// Until the hoard is gone others may find nothing, though something is there.
    fn strike(&mut self, world: &World, _rng: &mut Rng) -> Result<Struck> {
        let from_us = world.now_us();
        let struck = hoard(world);
        let (_, mut log) = world.seat("hoard", false);
        let to_us = world.now_us();
        (0..QUEUES.len() as u8).for_each(|queue| log.unseen(Unseen { queue, from_us, to_us }));
        world.hand_in(log);
        struck
    }
}

fn hoard(world: &World) -> Result<Struck> {
    let (mut client, mut other) = (world.admin()?, world.admin()?);
    let most = max_messages(&mut client)?;
    let from_us = world.now_us();
    let send =
        "SELECT queue_send_batch('hoard', array(SELECT to_jsonb(n) FROM generate_series(1, $1::int8) n))";
    let mut missing: HashSet<i64> = client.query(send, &[&most])?.iter().map(|row| row.get(0)).collect();
    // In an open transaction: what it holds comes back at its end.
    client.batch_execute("BEGIN")?;
    let mut held = client.query(READ, &[])?.len();
    // Other sessions get what is left, until they get no more of them, though they are there.
    loop {
        let more = other.query(READ, &[])?.len();
        held += more;
        if more == 0 {
            break;
        }
    }
    let full = "SELECT detail FROM queue_health() WHERE problem = 'dispatcher_full'";
    let full: Option<String> = other.query_opt(full, &[])?.map(|row| row.get(0));
    let open_calls = world.open_calls().len();
    let Some(full) = full.filter(|_| held < most as usize && open_calls > 0) else {
        client.batch_execute("ROLLBACK")?;
        other.batch_execute("SELECT queue_purge('hoard')")?;
        return Ok(Struck::Missed(format!("{held} of {most} leased, {open_calls} calls open")));
    };
    let finished = || world.counters.acts.load(Relaxed);
    let before = finished();
    let meanwhile = poll(LIMIT, || Some(finished() - before).filter(|count| *count >= FINISHED_MIN));
    let Some(meanwhile) = meanwhile else {
        bail!(
            "without room in the dispatcher only {} messages were finished in {LIMIT:?}",
            finished() - before
        );
    };
    client.batch_execute("ROLLBACK")?;
    let to_us = world.now_us();
    let sql = "SELECT queue_release('hoard', array(SELECT msg_id FROM queue.hoard))";
    other.batch_execute(sql)?; // what the other session has
    drain(&mut client, &mut missing)?;
    Ok(Struck::Hit(Proof {
        from_us,
        to_us,
        open_calls,
        seen: format!(
            "{held} leases of {most} messages; {full} {meanwhile} messages of others were finished meanwhile, and the \
             {most} afterwards"
        ),
    }))
}

/// Finishes all that is missing; each comes once.
fn drain(client: &mut Client, missing: &mut HashSet<i64>) -> Result<()> {
    let drained = poll(LIMIT, || {
        let mut round = || -> Result<()> {
            let rows = client.query(READ, &[])?;
            let ids: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
            let leases: Vec<i64> = rows.iter().map(|row| row.get(1)).collect();
            for row in
                client.query("SELECT queue_delete_batch('hoard', $1, $2, strict => true)", &[&ids, &leases])?
            {
                let id: i64 = row.get(0);
                ensure!(missing.remove(&id), "message {id} was delivered after it was finished");
            }
            Ok(())
        };
        match round() {
            Ok(()) => missing.is_empty().then_some(Ok(())),
            Err(error) => Some(Err(error)),
        }
    });
    drained.transpose()?.with_context(|| format!("{} hoarded messages never came", missing.len()))
}
