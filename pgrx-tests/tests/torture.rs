//! A short round of torture, with every fault; the long form is `cargo xtask torture`. And the proof that the checker
//! sees what is wrong: the same on an engine that is broken on purpose.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use queue_tests::torture::faults;
use queue_tests::torture::round::{self, Outcome, Plan};
use queue_tests::PgTree;

/// Another one each time, unless it is given.
const SEED_ENV: &str = "PG_QUEUE_TORTURE_SEED";

fn seed() -> u64 {
    let given = std::env::var(SEED_ENV).ok().map(|seed| seed.parse().expect("a seed is a number"));
    given.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() % 1_000_000)
}

fn torture(seconds: u64, names: &[&str], break_rule: Option<&str>) -> Outcome {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let faults =
        if names.iter().any(|name| name == "none") { Vec::new() } else { faults::named(&names).unwrap() };
    let seed = seed();
    println!("seed {seed} ({SEED_ENV} repeats it)");
    let plan = Plan {
        seed,
        length: Duration::from_secs(seconds),
        faults,
        senders: 4,
        consumers: 8,
        is_durable: false,
        break_rule: break_rule.map(str::to_owned),
        is_told: true,
    };
    let outcome = round::run(PgTree::from_env().unwrap(), plan).unwrap();
    println!("{outcome}");
    outcome
}

#[test]
fn torture_with_every_fault_loses_and_doubles_nothing() {
    assert!(torture(20, &[], None).is_good());
}
