//! Random sequences of every verb over several sessions, with transactions, savepoints and a clock that is moved,
//! beside a plain model of what SQL.md and the README promise ([`state`]). One thread: the sessions take turns, and
//! what would wait for another is left out. At the end of each sequence everything is drained and compared.
//!
//! The suite runs the same ones each time, so that it fails for a change and not by chance; a long run takes its seed from
//! the clock, and prints it; `cargo xtask model --sequences N --seed S` runs as many as you like. What fails is printed
//! with the seed of its sequence, which `PG_QUEUE_MODEL_REPLAY` runs again, and with the fewest steps that were found to
//! fail; then the run goes on.
//!
//! Twice: on a dispatcher that has room for all there is, and on the smallest, where other queues need room too, so that
//! messages are left out, taken out and loaded again all the while.
//!
//! Left to other tests: several readers at the same moment, crashes, and `message_ttl` of a queue (plain SQL stamps it
//! with a clock that tests cannot move).

mod rng;
mod state;
mod verbs_finish;
mod verbs_read;
mod verbs_send;
mod verbs_whole;
mod world;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant, UNIX_EPOCH};

use queue_tests::{Cluster, ClusterOptions, Database};
use rng::{steps, Rng, Step, WEIGHTS};
use state::SESSIONS;
use world::{Checked, World};

const SEQUENCES_ENV: &str = "PG_QUEUE_MODEL_SEQUENCES";
const SEED_ENV: &str = "PG_QUEUE_MODEL_SEED";
const REPLAY_ENV: &str = "PG_QUEUE_MODEL_REPLAY";
/// Set for a long run of the suite.
const ROUNDS_ENV: &str = "PG_QUEUE_TEST_ROUNDS";
/// In the suite, and in a long run of it.
const SEQUENCES: [u64; 2] = [100, 1_000];
const SEED: u64 = 1;
/// From so many on each verb must have been run.
const SEQUENCES_OF_EVERY_VERB: usize = 50;
/// One of so many reads may be given less than is due, and one more: while the worker loads, nobody else does. (Seen with
/// ample room: 4 of 30,000; with the least, where there is much more to load: 9 of 11,000.)
const SHORT_OF: [u64; 2] = [1_000, 200];
/// The least that a server of its own is worth.
const SEQUENCES_OF_A_SHARE: usize = 1_000;
/// A share goes on after it has found something, until it has found so much.
const FAILURES_MAX: usize = 5;
const SHRINK_LIMIT: Duration = Duration::from_secs(120);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// What the server has room for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Ample,
    /// For the least that can be set; and another queue takes of it what it can.
    Least,
}

fn cluster(room: Room) -> Cluster {
    // Only what moves the clock and the worker is in the way of a sequence; autovacuum is not to be.
    let options = ClusterOptions::default().set("autovacuum", "off").set("max_prepared_transactions", "500");
    let options = match room {
        Room::Ample => options,
        Room::Least => options
            .set("pg_queue.max_messages", "4096")
            .set("pg_queue.ready_window", "64")
            .set("pg_queue.max_queues", "16"),
    };
    options.start().unwrap()
}

fn world(database: &Database, room: Room, shift_s: i64) -> World {
    let mut clients: Vec<_> = (0..SESSIONS + 1).map(|_| database.connect().unwrap()).collect();
    for client in &mut clients {
        // Shorter than what counts as slow: nobody is to wait for another.
        client.batch_execute("SET lock_timeout = '5 s'; SET client_min_messages = error").unwrap();
    }
    clients[0]
        .batch_execute(
            "SELECT queue_create('d'); SELECT queue_create('b'); SELECT queue_create('a', dead_letter_queue => 'd')",
        )
        .unwrap();
    for queue in state::QUEUES {
        clients[0].execute("SELECT * FROM queue_read($1)", &[&queue]).unwrap(); // so all that is there is tracked
    }
    let is_small = room == Room::Least;
    if is_small {
        clients[0].batch_execute("SELECT queue_create('filler', max_deliveries => 0)").unwrap();
    }
    World::new(clients, is_small, shift_s)
}

/// Runs one sequence in empty queues, and leaves them empty.
fn run(world: &mut World, seed: u64, steps: &[Step]) -> Checked {
    let mut rng = Rng::new(!seed);
    world.begin();
    world.set_up(&mut rng)?;
    world.fill()?;
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
    room: Room,
    shift_s: &Cell<i64>,
    seed: u64,
    steps: Vec<Step>,
) -> Option<(Vec<Step>, String, Vec<String>)> {
    let begun = Instant::now();
    let fails = |steps: &[Step]| -> Option<(String, Vec<String>)> {
        let database = cluster.create_database().unwrap();
        let mut world = world(&database, room, shift_s.get());
        let result = run(&mut world, seed, steps);
        shift_s.set(world.shift_s);
        world.forget_prepared();
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
    agree(Room::Ample, 1);
}

#[test]
fn random_sequences_where_there_is_no_room_agree_with_a_plain_model() {
    agree(Room::Least, 4);
}

/// What a share of the sequences came to.
#[derive(Default)]
struct Tally {
    failed: Vec<String>,
    sequences: usize,
    slow: usize,
    steps: usize,
    reads: u64,
    short_reads: u64,
    ran: BTreeMap<String, u64>,
}

impl Tally {
    fn add(&mut self, share: Tally) {
        self.failed.extend(share.failed);
        self.sequences += share.sequences;
        self.slow += share.slow;
        self.steps += share.steps;
        self.reads += share.reads;
        self.short_reads += share.short_reads;
        for (verb, times) in share.ran {
            *self.ran.entry(verb).or_default() += times;
        }
    }
}

/// Runs these sequences, by their places in the run, on a server of their own.
fn run_share(room: Room, sequences: &[(usize, u64)]) -> Tally {
    let cluster = cluster(room);
    let database = cluster.create_database().unwrap();
    let mut world = world(&database, room, 0);
    let begun = Instant::now();
    let mut tally = Tally::default();
    for (place, seed) in sequences {
        if tally.sequences % 1_000 == 999 {
            println!("{} sequences of a share in {:.0} s", tally.sequences, begun.elapsed().as_secs_f64());
        }
        let steps = steps(*seed, SESSIONS);
        tally.sequences += 1;
        tally.steps += steps.len();
        let result = run(&mut world, *seed, &steps);
        tally.reads += std::mem::take(&mut world.reads);
        tally.short_reads += std::mem::take(&mut world.short_reads);
        for (verb, times) in world.ran.drain() {
            *tally.ran.entry(format!("{verb:?}")).or_default() += times;
        }
        let Err(what) = result else { continue };
        world.forget_prepared();
        let shift_s = Cell::new(world.shift_s);
        if world.was_slow() {
            tally.slow += 1;
            println!("sequence {place} took too long for its clock: {what}");
        } else {
            println!("{}", world.trace.join("\n"));
            println!("sequence {place} ({REPLAY_ENV}={seed}): {what}\n");
            match shrunk(&cluster, room, &shift_s, *seed, steps) {
                Some((steps, what, trace)) => {
                    println!("the same in {} steps: {what}\n{}\n{steps:?}", steps.len(), trace.join("\n"));
                }
                None => println!("alone in a fresh database it does not fail"),
            }
            tally.failed.push(format!("sequence {place} ({REPLAY_ENV}={seed}): {what}"));
            if tally.failed.len() == FAILURES_MAX {
                break;
            }
        }
        let fresh = cluster.create_database().unwrap();
        world = self::world(&fresh, room, shift_s.get());
        std::mem::forget(fresh); // goes with the cluster
    }
    tally
}

/// As many sequences as are asked for, or a part of them; long runs on as many servers as there are cores.
fn agree(room: Room, part: u64) {
    let is_long = std::env::var_os(ROUNDS_ENV).is_some();
    let count = number(SEQUENCES_ENV).unwrap_or(SEQUENCES[usize::from(is_long)]) / part;
    let in_suite = if is_long { UNIX_EPOCH.elapsed().unwrap().as_secs() } else { SEED };
    let seed = number(SEED_ENV).unwrap_or(in_suite);
    let seeds: Vec<u64> = match number(REPLAY_ENV) {
        Some(seed) => vec![seed],
        None => {
            let mut rng = Rng::new(seed);
            (0..count).map(|_| rng.next()).collect()
        }
    };
    println!("{} sequences of {SEED_ENV}={seed}", seeds.len());
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let sequences: Vec<(usize, u64)> = seeds.into_iter().enumerate().collect();
    let share = sequences.len().div_ceil(cores).max(SEQUENCES_OF_A_SHARE);
    let begun = Instant::now();
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let shares: Vec<_> =
            sequences.chunks(share).map(|share| scope.spawn(move || run_share(room, share))).collect();
        shares.into_iter().for_each(|share| tally.add(share.join().unwrap()));
    });
    let Tally { failed, sequences, slow, steps, reads, short_reads, ran } = tally;
    let took = begun.elapsed().as_secs_f64();
    println!(
        "{sequences} sequences, {steps} steps in {took:.1} s ({:.0} sequences/s), {slow} too slow; seed {seed}",
        sequences as f64 / took
    );
    println!("{}", ran.iter().map(|(verb, times)| format!("{verb} {times}")).collect::<Vec<_>>().join(", "));
    println!("{short_reads} of {reads} reads were given less than was due");
    assert!(failed.is_empty(), "{SEED_ENV}={seed}: {}", failed.join("\n"));
    for (verb, _) in WEIGHTS {
        let has_run = ran.contains_key(&format!("{verb:?}"));
        assert!(has_run || sequences < SEQUENCES_OF_EVERY_VERB, "{verb:?} was never run: {ran:?}");
    }
    assert!(
        short_reads <= 1 + reads / SHORT_OF[usize::from(room == Room::Least)],
        "what is due is not delivered at once"
    );
    assert!(slow * 10 <= sequences, "the machine is too slow for most of it");
}
