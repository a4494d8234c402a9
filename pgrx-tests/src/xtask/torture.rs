//! `cargo xtask torture`: breaks the server on purpose under load, for minutes to hours, and accounts for every message.
//!
//! Owns the command line and where the report goes; the work is in `queue_tests::torture`.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use queue_tests::torture::{faults, round};
use queue_tests::{PgTree, PG_CONFIG_ENV};

use super::build;
use super::run::say;

#[derive(clap::Args)]
pub struct Options {
    /// The PostgreSQL to run on.
    #[arg(long, default_value_t = 18, value_name = "MAJOR", value_parser = clap::value_parser!(u16).range(15..=18))]
    pg: u16,
    /// How long faults strike.
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_080))]
    minutes: u64,
    /// What clients and faults choose is made from it [default: another one each time]. When things happen is the
    /// machine's, so a seed repeats a run's shape and not its every step.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Only these faults; `--faults list` names them.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    faults: Vec<String>,
    /// Clients that send.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=40))]
    senders: u32,
    /// Clients that consume.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=40))]
    consumers: u32,
    /// Build in release mode, without what tests need; many more messages.
    #[arg(long)]
    release_build: bool,
    /// Leave fsync on. No fault needs it: what a killed process wrote is in the kernel.
    #[arg(long)]
    fsync: bool,
    /// Also write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<bool> {
    if options.faults == ["list"] {
        faults::named(&[])?.iter().for_each(|fault| println!("{}", fault.name()));
        faults::special().iter().for_each(|fault| println!("{} (only where it is named)", fault.name()));
        return Ok(true);
    }
    let faults = faults::named(&options.faults)?;
    let tree = tree(options)?;
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock stands before 1970")?;
    let seed = options.seed.unwrap_or(since_1970.as_secs());
    say(format!("Torture for {} minutes, seed {seed}, on a throwaway cluster", options.minutes));
    let outcome = round::run(
        tree,
        round::Plan {
            seed,
            length: Duration::from_secs(options.minutes * 60),
            faults,
            senders: options.senders,
            consumers: options.consumers,
            is_durable: options.fsync,
            quiet_one_in: 8,
            drain_limit: Duration::from_secs(30),
            break_rule: None,
            is_told: true,
        },
    )?;
    say("What was found");
    println!("{outcome}");
    if let Some(path) = &options.json {
        let json = format!("{:#}\n", outcome.to_json());
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(outcome.is_good())
}

/// The one that the environment names, as for the tests, or else one with the extension as it is now.
fn tree(options: &Options) -> Result<PgTree> {
    if std::env::var_os(PG_CONFIG_ENV).is_some() {
        say(format!("Taking the PostgreSQL that {PG_CONFIG_ENV} names, with the extension that is in it"));
        return PgTree::from_env();
    }
    say("Looking for what building needs: libclang, cargo-pgrx, a PostgreSQL with server headers");
    if options.release_build {
        build::release(options.pg)
    } else {
        build::debug(options.pg)
    }
}
