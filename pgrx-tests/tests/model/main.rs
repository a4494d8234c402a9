//! Random sequences of every verb over several sessions, with transactions, savepoints and a clock that is moved,
//! beside a plain model of what SQL.md and the README promise ([`state`]). One thread: the sessions take turns, and
//! what would wait for another is left out. At the end of each sequence everything is drained and compared.
//!
//! `cargo xtask model --sequences N --seed S` runs many. What fails is printed with the seed of its sequence, which
//! `PG_QUEUE_MODEL_REPLAY` runs again, and with the fewest steps that were found to fail.
//!
//! Left to other tests: several readers at the same moment, crashes, `message_ttl` of a queue (plain SQL stamps it with
//! a clock that tests cannot move), and reading what the same transaction has changed by plain SQL.

mod rng;
mod state;
mod verbs_finish;
mod verbs_read;
mod verbs_send;
mod verbs_whole;
mod world;

use std::cell::Cell;
use std::time::{Duration, Instant};

use queue_tests::{Cluster, ClusterOptions, Database};
use rng::{steps, Rng, Step};
use state::SESSIONS;
use world::{Checked, World};

const SEQUENCES_ENV: &str = "PG_QUEUE_MODEL_SEQUENCES";
const SEED_ENV: &str = "PG_QUEUE_MODEL_SEED";
const REPLAY_ENV: &str = "PG_QUEUE_MODEL_REPLAY";
/// In the suite.
const SEQUENCES: u64 = 100;
const SEED: u64 = 1;
const SHRINK_LIMIT: Duration = Duration::from_secs(120);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn world(database: &Database, shift_s: i64) -> World {
    let mut clients: Vec<_> = (0..SESSIONS + 1).map(|_| database.connect().unwrap()).collect();
    for client in &mut clients {
        client.batch_execute("SET lock_timeout = '10 s'; SET client_min_messages = error").unwrap();
    }
    clients[0]
        .batch_execute(
            "SELECT queue_create('d'); SELECT queue_create('b'); SELECT queue_create('a', dead_letter_queue => 'd')",
        )
        .unwrap();
    for queue in state::QUEUES {
        clients[0].execute("SELECT * FROM queue_read($1)", &[&queue]).unwrap(); // so all that is there is tracked
    }
    World::new(clients, shift_s)
}

/// Runs one sequence in empty queues, and leaves them empty.
fn run(world: &mut World, seed: u64, steps: &[Step]) -> Checked {
    let mut rng = Rng::new(!seed);
    world.begin();
    world.set_up(&mut rng)?;
    for step in steps {
        world.step(*step).map_err(|what| format!("{step:?}: {what}"))?;
    }
    world.drain(&mut rng).map_err(|what| format!("at the end: {what}"))
}

/// What kind of failure this is: its text without the step, the numbers and what was seen.
fn kind(what: &str) -> String {
    let text = what.rsplit("}: ").next().unwrap_or(what);
    text.chars().filter(|c| c.is_ascii_alphabetic()).take(24).collect()
}

/// The fewest steps that were found to fail, and how.
fn shrunk(
    cluster: &Cluster,
    shift_s: &Cell<i64>,
    seed: u64,
    steps: Vec<Step>,
) -> Option<(Vec<Step>, String, Vec<String>)> {
    let begun = Instant::now();
    let fails = |steps: &[Step]| -> Option<(String, Vec<String>)> {
        let database = cluster.create_database().unwrap();
        let mut world = world(&database, shift_s.get());
        let result = run(&mut world, seed, steps);
        shift_s.set(world.shift_s);
        let what = result.err()?;
        Some((what, world.trace))
    };
    let (mut what, mut trace) = fails(&steps)?;
    let wanted = kind(&what);
    let mut steps = steps;
    let mut size = steps.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        while at < steps.len() && begun.elapsed() < SHRINK_LIMIT {
            let mut fewer = steps.clone();
            fewer.drain(at..(at + size).min(steps.len()));
            match fails(&fewer) {
                Some(found) if kind(&found.0) == wanted => ((what, trace), steps) = (found, fewer),
                _ => at += size,
            }
        }
        size /= 2;
    }
    Some((steps, what, trace))
}

#[test]
fn random_sequences_of_every_verb_agree_with_a_plain_model() {
    // Only what moves the clock and the worker is in the way of a sequence; autovacuum is not to be.
    let cluster = ClusterOptions::default().set("autovacuum", "off").start().unwrap();
    let database = cluster.create_database().unwrap();
    let mut world = world(&database, 0);
    let (count, seed) = (number(SEQUENCES_ENV).unwrap_or(SEQUENCES), number(SEED_ENV).unwrap_or(SEED));
    let seeds: Vec<u64> = match number(REPLAY_ENV) {
        Some(seed) => vec![seed],
        None => {
            let mut rng = Rng::new(seed);
            (0..count).map(|_| rng.next()).collect()
        }
    };
    let (begun, mut slow, mut run_steps) = (Instant::now(), 0, 0);
    for (place, seed) in seeds.iter().enumerate() {
        if place % 1_000 == 999 {
            println!("{place} sequences in {:.0} s", begun.elapsed().as_secs_f64());
        }
        let steps = steps(*seed, SESSIONS);
        run_steps += steps.len();
        let Err(what) = run(&mut world, *seed, &steps) else { continue };
        if world.was_slow() {
            slow += 1;
            println!("sequence {place} took too long for its clock: {what}");
            let fresh = cluster.create_database().unwrap();
            world = self::world(&fresh, world.shift_s);
            std::mem::forget(fresh); // goes with the cluster
            continue;
        }
        println!("{}", world.trace.join("\n"));
        println!("sequence {place} ({REPLAY_ENV}={seed}): {what}\n");
        match shrunk(&cluster, &Cell::new(world.shift_s), *seed, steps) {
            Some((steps, what, trace)) => {
                println!("the same in {} steps: {what}\n{}\n{steps:?}", steps.len(), trace.join("\n"));
            }
            None => println!("alone in a fresh database it does not fail"),
        }
        panic!("sequence {place} of seed {seed}: {what}");
    }
    let took = begun.elapsed().as_secs_f64();
    println!(
        "{} sequences, {run_steps} steps in {took:.1} s ({:.0} sequences/s), {slow} too slow; seed {seed}",
        seeds.len(),
        seeds.len() as f64 / took
    );
    let mut ran: Vec<_> = world.ran.iter().map(|(verb, times)| (*times, format!("{verb:?} {times}"))).collect();
    ran.sort_unstable();
    println!("{}", ran.into_iter().rev().map(|(_, text)| text).collect::<Vec<_>>().join(", "));
    println!("{} of {} reads were given less than was due", world.short_reads, world.reads);
    assert!(world.short_reads * 100 <= world.reads.max(100), "what is due is not delivered at once");
    assert!(slow * 10 <= seeds.len(), "the machine is too slow for most of it");
}
