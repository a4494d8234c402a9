//! `cargo xtask valgrind`: tests on a server of which valgrind sees every access to memory, PostgreSQL's contexts included.
//!
//! Owns the build and the judgement: any report fails. Whether the tests themselves pass is only told, for at a thirtieth
//! of the speed what waits for a time may fail. First a build that reads freed memory must be reported, else what follows
//! would prove nothing.

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
    let run = |what: &str, arguments: &[&str]| -> Result<Reports> {
        empty(&reports)?;
        let mut test = Command::new("cargo");
        test.args(["test", "--no-fail-fast", "-p", "queue-tests"]).args(arguments).current_dir(repository());
        test.env(PG_CONFIG_ENV, &builder.tree.pg.pg_config);
        forget_cargo_run(&mut test);
        say(what);
        println!("    $ {}", command_line(&test));
        let have_passed = test.status()?.success();
        println!("\nThe tests themselves {}.", if have_passed { "passed" } else { "did not all pass" });
        Reports::read(&reports)
    };

    let broken = ["--test", "harness", "--", "--ignored", "--exact", "freed_memory_is_read"];
    let proof = run("A server that reads freed memory, under valgrind", &broken)?;
    let is_noticed = proof.found.iter().any(|report| report.contains("use_freed_memory"));
    if !is_noticed {
        bail!("valgrind did not report it: what it does not report means nothing");
    }
    println!("{} processes under valgrind; it is reported, as it must be", proof.processes);

    let names =
        if options.tests.is_empty() { TESTS.map(str::to_owned).to_vec() } else { options.tests.clone() };
    let mut arguments: Vec<&str> = names.iter().flat_map(|name| ["--test", name]).collect();
    arguments.extend(options.filter.as_deref());
    let Reports { processes, found } = run("Tests on a server under valgrind", &arguments)?;
    found.iter().for_each(|report| println!("--- {report}"));
    println!("{processes} processes under valgrind, {} with something to report", found.len());
    Ok(found.is_empty())
}

/// A directory for the servers' processes to write to, with nothing in it.
fn empty(reports: &Path) -> Result<()> {
    if reports.exists() {
        fs::remove_dir_all(reports).with_context(|| format!("cannot remove {}", reports.display()))?;
    }
    fs::create_dir(reports).with_context(|| format!("cannot make {}", reports.display()))?;
    fs::set_permissions(reports, Permissions::from_mode(0o1777)).context("cannot open it to the server's user")
}

/// What the processes of a run wrote.
struct Reports {
    processes: usize,
    /// Of those that had something to say: where it lies, and what.
    found: Vec<String>,
}

impl Reports {
    /// A run that no process took part in proves nothing.
    fn read(reports: &Path) -> Result<Reports> {
        let (mut processes, mut found) = (0, Vec::new());
        for entry in fs::read_dir(reports).with_context(|| format!("cannot list {}", reports.display()))? {
            let path = entry.context("cannot list the reports")?.path();
            let report =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            processes += 1;
            if !report.trim().is_empty() {
                found.push(format!("{}\n{report}", path.display()));
            }
        }
        if processes == 0 {
            bail!("no process of a server wrote a report: nothing ran under valgrind");
        }
        Ok(Reports { processes, found })
    }
}
