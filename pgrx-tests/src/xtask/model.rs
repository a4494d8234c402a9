//! `cargo xtask model`: random sequences of every verb beside a plain model, as many as you like.
//!
//! Owns the build and the seed; the sequences and the model are the test `model`.

use std::process::Command;

use anyhow::Result;
use queue_tests::{ServerUser, CLUSTERS_ENV, PG_CONFIG_ENV};

use super::build::{forget_cargo_run, Builder};
use super::run::{command_line, say};
use super::{provision, repository};

#[derive(clap::Args)]
pub struct Options {
    /// The PostgreSQL to run on.
    #[arg(long, default_value_t = 18, value_name = "MAJOR", value_parser = clap::value_parser!(u16).range(15..=18))]
    pg: u16,
    /// How many; and a quarter as many where the dispatcher has least room.
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    sequences: u64,
    /// What they are made of [default: the time].
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
}

pub fn run(options: &Options) -> Result<bool> {
    let cargo_pgrx = provision::build_tools()?;
    let purpose = options.pg.to_string();
    let tree = provision::clone_tree(&provision::postgres(options.pg)?, &purpose, &ServerUser::detect()?)?;
    let builder = Builder::new(cargo_pgrx, tree, &purpose)?;
    builder.install(false, &["wait_points"])?;
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = options.seed.unwrap_or(clock.as_secs());
    say(format!("{} sequences of seed {seed}", options.sequences));
    let mut test = Command::new("cargo");
    test.args(["test", "--release", "-p", "queue-tests", "--test", "model", "--", "--nocapture"])
        .current_dir(repository());
    test.env(PG_CONFIG_ENV, &builder.tree.pg.pg_config).env(CLUSTERS_ENV, provision::clusters());
    test.env("PG_QUEUE_MODEL_SEQUENCES", options.sequences.to_string());
    test.env("PG_QUEUE_MODEL_SEED", seed.to_string());
    forget_cargo_run(&mut test);
    println!("    $ {}", command_line(&test));
    Ok(test.status()?.success())
}
