//! A queue whose messages die: retried, rejected and left too often they go to a dead-letter queue, and some expire.
//! Each is sent, finished and moved in one transaction with what tells of it, so the database alone says at the end
//! whether every message is in one place: sent = finished + dead + archived + left.
//!
//! Owns that queue, and what clients do with it; their calls are logged as any, and nothing else of it. The accounts
//! are in setup.sql.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use postgres::error::SqlState;

use super::actor::{Actor, Done};
use super::world::World;

const SEND: &str = "SELECT send_mortal($1)";
/// $2: what is done with the messages, see there.
const CONSUME: &str = "SELECT consume_mortal($1, $2)";
/// How messages are left when all is over: finished.
const FINISH: i64 = 0;
/// Finish, retry, reject, or leave, message by message from the number on.
const ANYHOW: i64 = 1;
/// So many are finished at a time when all is over: the lease must last until the last of them is.
const FINISHED_AT_A_TIME: i64 = 20;

pub fn send(actor: &mut Actor) -> Done {
    let messages = actor.rng.between(1, 10) as i64;
    actor.send("send_mortal", SEND, &[&messages])
}

pub fn consume(actor: &mut Actor) -> Done {
    let quantity = actor.rng.between(1, 20) as i64;
    let choice = ANYHOW + actor.rng.below(4) as i64;
    actor.send("consume_mortal", CONSUME, &[&quantity, &choice])
}

/// Finishes what is left, and tells what is wrong with the accounts. `limit`: without a message for so long there comes
/// none.
pub fn settle(world: &World, limit: Duration) -> Result<Vec<String>> {
    let mut client = world.admin()?;
    let mut failures = Vec::new();
    let mut last = Instant::now();
    loop {
        let finished = match client.query_one(CONSUME, &[&FINISHED_AT_A_TIME, &FINISH]) {
            Ok(row) => row.get::<_, i64>(0),
            // It was too slow for a lease: all is undone, and they come again.
            Err(error) if error.code() == Some(&SqlState::NO_DATA_FOUND) => 0,
            Err(error) => return Err(error).context("cannot finish what is mortal"),
        };
        if finished > 0 {
            last = Instant::now();
            continue;
        }
        let left: i64 = client.query_one("SELECT count(*) FROM queue.mortal", &[])?.get(0);
        if left == 0 {
            break;
        }
        if last.elapsed() > limit {
            failures.push(format!("{left} mortal messages were not delivered in {} s", limit.as_secs()));
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    for row in client.query("SELECT * FROM mortal_accounts WHERE places <> 1 OR sent <> 1 LIMIT 5", &[])? {
        let (k, sent, places, which): (i64, i64, i64, Option<&str>) =
            (row.get("k"), row.get("sent"), row.get("places"), row.get("which"));
        failures.push(format!(
            "mortal message {k}, sent {sent} times, is in {places} places: {}",
            which.unwrap_or("none")
        ));
    }
    let sql = "SELECT which, count(*) FROM mortal_accounts GROUP BY 1 ORDER BY 1";
    let figures: Vec<String> = (client.query(sql, &[])?.iter())
        .map(|row| format!("{} {}", row.get::<_, Option<&str>>(0).unwrap_or("nowhere"), row.get::<_, i64>(1)))
        .collect();
    println!("mortal messages: {}", figures.join(", "));
    Ok(failures)
}
