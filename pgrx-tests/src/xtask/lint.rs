//! `cargo xtask lint`: format, then clippy with warnings as errors.
//!
//! Owns which packages are looked at and how. Never changes a file.

use std::process::Command;

use anyhow::Result;
use queue_tests::ServerUser;

use super::build::{forget_cargo_run, Builder};
use super::run::{run, say};
use super::{provision, repository};

pub fn run_all() -> Result<bool> {
    let mut passed = true;
    let mut check = |what: &str, command: &mut Command| {
        say(what);
        forget_cargo_run(command);
        if let Err(error) = run(command.current_dir(repository())) {
            println!("error: {error:#}");
            passed = false;
        }
    };
    check("Checking the format of all packages", Command::new("cargo").args(["fmt", "--all", "--check"]));
    let mut pure = Command::new("cargo");
    pure.args(["clippy", "-p", "queue-dispatch", "-p", "queue-tests", "--all-targets", "--", "-D", "warnings"]);
    check("Linting the packages without PostgreSQL", &mut pure);

    let major = provision::any_major_at_hand()?;
    let cargo_pgrx = provision::build_tools()?;
    let tree = provision::clone_tree(&provision::postgres(major)?, &major.to_string(), &ServerUser::detect()?)?;
    let builder = Builder::new(cargo_pgrx, tree, &major.to_string())?;
    // Not --all-targets: cargo would build the tests' own dependencies once more for little.
    let features = format!("{} wait_points pg_test", builder.pg_feature());
    let mut extension = builder.cargo("clippy");
    extension.args(["--no-default-features", "--features", &features, "--", "-D", "warnings"]);
    check(&format!("Linting the extension for PostgreSQL {major}"), &mut extension);
    Ok(passed)
}
