//! `cargo xtask valgrind`: tests on a server of which valgrind sees every access to memory, PostgreSQL's contexts included.
//!
//! Owns the build and the judgement: any report fails. Whether the tests themselves pass is only told, for at a thirtieth
//! of the speed what waits for a time may fail.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{bail, Context, Result};
use queue_tests::{ServerUser, PG_CONFIG_ENV};

use super::build::{forget_cargo_run, Builder};
use super::run::{command_line, say};
use super::{provision, repository};

/// Each verb by itself, then all of them mixed, then what hostile owners and broken rows do.
const TESTS: [&str; 6] = ["found", "model", "moves", "leases", "hardening", "security"];

#[derive(clap::Args)]
pub struct Options {
    /// The files of tests to run (`pgrx-tests/tests`).
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    tests: Vec<String>,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

pub fn run(options: &Options) -> Result<bool> {
    let cargo_pgrx = provision::build_tools()?;
    let purpose = "valgrind";
    let tree = provision::clone_tree(&provision::postgres_for_valgrind()?, purpose, &ServerUser::detect()?)?;
    let builder = Builder::new(cargo_pgrx, tree, purpose)?;
    builder.install(false, &["wait_points"])?;
    let reports = builder.tree.root.join(provision::VALGRIND_REPORTS);
    if reports.exists() {
        fs::remove_dir_all(&reports).with_context(|| format!("cannot remove {}", reports.display()))?;
    }
    fs::create_dir(&reports).with_context(|| format!("cannot make {}", reports.display()))?;
    fs::set_permissions(&reports, Permissions::from_mode(0o1777))
        .context("cannot open it to the server's user")?;

    let names =
        if options.tests.is_empty() { TESTS.map(str::to_owned).to_vec() } else { options.tests.clone() };
    let mut test = Command::new("cargo");
    test.args(["test", "--no-fail-fast", "-p", "queue-tests"]).current_dir(repository());
    names.iter().for_each(|name| {
        test.args(["--test", name]);
    });
    test.args(&options.filter).env(PG_CONFIG_ENV, &builder.tree.pg.pg_config);
    forget_cargo_run(&mut test);
    say("Tests on a server under valgrind");
    println!("    $ {}", command_line(&test));
    let have_passed = test.status()?.success();
    println!("\nThe tests themselves {}.", if have_passed { "passed" } else { "did not all pass" });
    judge(&reports)
}

/// Prints what was reported. A run that no process took part in proves nothing.
fn judge(reports: &Path) -> Result<bool> {
    let (mut processes, mut found) = (0, 0);
    for entry in fs::read_dir(reports).with_context(|| format!("cannot list {}", reports.display()))? {
        let path = entry.context("cannot list the reports")?.path();
        let report = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        processes += 1;
        if !report.trim().is_empty() {
            found += 1;
            println!("--- {}\n{report}", path.display());
        }
    }
    if processes == 0 {
        bail!("no process of a server wrote a report: nothing ran under valgrind");
    }
    println!("{processes} processes under valgrind, {found} with something to report");
    Ok(found == 0)
}
