//! `cargo xtask test`: every test on every version, with one number at the end.
//!
//! Owns the order of the stages and the adding up. A stage that ran no test counts as failed, and so does one
//! that ended badly without saying which test failed. Never hides a test's output.

use std::fs;
use std::io::{BufRead, BufReader, IsTerminal};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{kill, killpg, Signal};
use nix::unistd::Pid;
use queue_tests::{PgTree, ServerUser, CLUSTERS_ENV, PG_CONFIG_ENV, PG_CONFIG_OLD_ENV, SKIPPED};

use super::build::{forget_cargo_run, Builder};
use super::report::Tally;
use super::run::{command_line, say};
use super::{provision, repository, MAJORS};

/// A stage hangs that prints nothing for so long (building is silent: what is said of it goes elsewhere), or takes so long
/// in all. Only without a terminal: at one a person sees it and has Ctrl-C.
const LIMITS: Limits = Limits { silence: Duration::from_secs(20 * 60), total: Duration::from_secs(60 * 60) };
const LIMITS_LONG: Limits =
    Limits { silence: Duration::from_secs(90 * 60), total: Duration::from_secs(90 * 60) };
/// The tests that repeat something take from here how often; the xtask sets it for `--long`.
const ROUNDS_ENV: &str = "PG_QUEUE_TEST_ROUNDS";
const ROUNDS_LONG: &str = "100";
/// How many tests of one binary run at a time (Rust's own test runner).
const TEST_THREADS_ENV: &str = "RUST_TEST_THREADS";
/// What a stage started may still hold its output open after the stage itself has ended: until it was waited for so often
/// in vain. (Counted and not timed: if this process stands still, there may be lines that it has not read yet.)
const WAITS_MAX: u32 = 25;
const WAIT: Duration = Duration::from_millis(200);

/// Tests of queue-tests that run on the newest version of a run only: of the harness itself, whatever the version, and
/// long ones of crashes, which `crash` tries on each.
const NEWEST_ONLY: [&str; 3] = ["corpus", "torture", "torture_faults"];

struct Limits {
    silence: Duration,
    total: Duration,
}

struct Stage {
    name: String,
    tally: Tally,
    /// What it could not try on this machine, and why.
    skipped: Vec<String>,
    took: Duration,
}

/// What every stage is run with.
struct Suite<'a> {
    is_long: bool,
    filter: Option<&'a str>,
}

/// Runs the suite on `versions` (none: all) and returns whether all passed.
pub fn run(versions: Vec<u16>, is_long: bool, filter: Option<String>) -> Result<bool> {
    let versions = if versions.is_empty() { MAJORS.to_vec() } else { versions };
    let words: Vec<String> = versions.iter().map(u16::to_string).collect();
    say(format!(
        "Testing on PostgreSQL {}; what is costly to get is kept in {}",
        words.join(", "),
        provision::cache()?.display()
    ));
    let suite = Suite { is_long, filter: filter.as_deref() };
    let mut stages = Vec::new();

    let mut dispatch = Command::new("cargo");
    dispatch.args(["test", "--no-fail-fast", "-p", "queue-dispatch"]).args(suite.filter);
    stages.push(suite.run_stage("queue-dispatch, without PostgreSQL", dispatch.current_dir(repository()))?);

    let cargo_pgrx = provision::build_tools()?;
    provision::pgbouncer();
    let mut trees = Vec::new();
    let newest = versions.iter().copied().max();
    for major in versions {
        match suite.test_version(major, Some(major) == newest, &cargo_pgrx, &mut stages) {
            Ok(tree) => trees.push(tree),
            Err(error) => {
                println!("\nerror: PostgreSQL {major}: {error:#}");
                let tally = Tally { failed: 1, ..Tally::default() };
                stages.push(Stage {
                    name: format!("PostgreSQL {major} could not be tested"),
                    tally,
                    skipped: Vec::new(),
                    took: Duration::ZERO,
                });
            }
        }
    }
    trees.sort_by_key(|tree| tree.major);
    trees.dedup_by_key(|tree| tree.major);
    match trees.as_slice() {
        [old @ .., new] if !old.is_empty() => stages.push(suite.upgrade_test(old, new)?),
        _ => say("SKIPPED: pg_upgrade and dumps of older versions, tested where the suite runs on two versions or more"),
    }
    Ok(summarise(&mut stages, suite.filter.is_some()))
}

impl Suite<'_> {
    /// Returns the tree, which has the extension in it.
    fn test_version(
        &self,
        major: u16,
        is_newest: bool,
        cargo_pgrx: &Path,
        stages: &mut Vec<Stage>,
    ) -> Result<PgTree> {
        let cached = provision::postgres(major)?;
        let user = ServerUser::detect()?;
        let purpose = major.to_string();
        let tree = provision::clone_tree(&cached, &purpose, &user)?;
        let version = short_version(&tree.pg).to_owned();
        let builder = Builder::new(cargo_pgrx.to_owned(), tree, &purpose)?;

        stages.push(self.inside_tests(&builder, &user, &version)?);

        builder.install(false, &["wait_points"])?;
        let mut sessions = Command::new("cargo");
        sessions.args(["test", "--no-fail-fast", "-p", "queue-tests"]).current_dir(repository());
        if !is_newest {
            say(format!("(On the newest version only: {})", NEWEST_ONLY.join(", ")));
            for name in test_names()?.iter().filter(|name| !NEWEST_ONLY.contains(&name.as_str())) {
                sessions.args(["--test", name]);
            }
        }
        sessions.args(self.filter);
        sessions.env(PG_CONFIG_ENV, &builder.tree.pg.pg_config);
        // These tests wait more than they compute: twice as many as there are cores keeps the cores busy.
        if std::env::var_os(TEST_THREADS_ENV).is_none() {
            let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
            sessions.env(TEST_THREADS_ENV, (2 * cores).to_string());
        }
        sessions.env(CLUSTERS_ENV, provision::clusters());
        stages.push(
            self.run_stage(&format!("PostgreSQL {version}, many sessions (queue-tests)"), &mut sessions)?,
        );
        Ok(builder.tree.pg)
    }

    /// pg_upgrade, and dumps, to the newest version of this run: the tests that need two of them.
    fn upgrade_test(&self, old: &[PgTree], new: &PgTree) -> Result<Stage> {
        let old = std::env::join_paths(old.iter().map(|tree| &tree.pg_config))
            .context("a path of a tree holds what separates paths")?;
        let mut upgrade = Command::new("cargo");
        upgrade.args(["test", "--no-fail-fast", "-p", "queue-tests", "--test", "workers", "--test", "backup"]);
        upgrade.args(["--", "--ignored"]).args(self.filter);
        upgrade.env(PG_CONFIG_ENV, &new.pg_config).env(PG_CONFIG_OLD_ENV, old);
        upgrade.env(CLUSTERS_ENV, provision::clusters());
        let name = format!("pg_upgrade and dumps to {}", short_version(new));
        self.run_stage(&name, upgrade.current_dir(repository()))
    }

    /// `cargo pgrx test`: the `#[pg_test]`s, on a server that pgrx starts.
    fn inside_tests(&self, builder: &Builder, user: &ServerUser, version: &str) -> Result<Stage> {
        // Short, because the server's socket lies in it.
        let scratch = tempfile::Builder::new()
            .prefix("pgq-pgrx-")
            .tempdir_in(provision::clusters())
            .context("cannot make a directory")?;
        user.own(scratch.path())?;
        let mut test = builder.cargo_pgrx("test");
        test.arg(builder.pg_feature()).args(self.filter).arg("--pgdata").arg(scratch.path());
        if user.is_switched() {
            provision::sudo()?;
            test.args(["--runas", &user.name]);
        }
        // pgrx takes the database user from here; some containers do not set it.
        test.env("USER", &user.name);
        if user.is_switched() && !user.can_enter(repository()) {
            // The server is started from the tests' directory, and PostgreSQL 15 insists on entering it again.
            let runner =
                format!("CARGO_TARGET_{}_RUNNER", host_triple()?.to_uppercase().replace(['-', '.'], "_"));
            test.env(runner, "env -C /").env("PGRX_MANIFEST_PATH", repository().join("Cargo.toml"));
        }
        let stage =
            self.run_stage(&format!("PostgreSQL {version}, in one transaction (cargo pgrx test)"), &mut test);
        stop_leftovers(scratch.path());
        stage
    }

    /// Runs one `cargo test`, shows what it prints, and counts.
    fn run_stage(&self, name: &str, command: &mut Command) -> Result<Stage> {
        if self.is_long {
            command.env(ROUNDS_ENV, ROUNDS_LONG);
        }
        run_stage(name, command, if self.is_long { &LIMITS_LONG } else { &LIMITS })
    }
}

/// The integration tests of queue-tests.
fn test_names() -> Result<Vec<String>> {
    let tests = repository().join("pgrx-tests/tests");
    let mut names = Vec::new();
    for entry in fs::read_dir(&tests).with_context(|| format!("cannot list {}", tests.display()))? {
        let path = entry.context("cannot list the tests")?.path();
        let is_test =
            path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").exists();
        names.extend(path.file_stem().filter(|_| is_test).map(|name| name.to_string_lossy().into_owned()));
    }
    names.sort_unstable();
    Ok(names)
}

fn host_triple() -> Result<String> {
    let text = super::run::output(Command::new("rustc").arg("-vV"))?;
    let triple = text.lines().find_map(|line| line.strip_prefix("host: "));
    triple.map(str::to_owned).context("rustc does not say what it runs on")
}

/// Ends servers that pgrx started below `scratch` and, its tests having been killed, did not end.
fn stop_leftovers(scratch: &Path) {
    for entry in fs::read_dir(scratch).into_iter().flatten().flatten() {
        let Ok(text) = fs::read_to_string(entry.path().join("postmaster.pid")) else { continue };
        let mut lines = text.lines();
        let (Some(pid), Some(directory)) = (lines.next().and_then(|line| line.parse().ok()), lines.next())
        else {
            continue;
        };
        if Path::new(directory) == entry.path() && queue_tests::descendants(1).contains(&(pid as u32)) {
            println!("    stopping the server that was left in {directory}");
            if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGQUIT) {
                println!("    cannot: {error}");
            }
        }
    }
}

/// `15.20` from `PostgreSQL 15.20 (Debian ...)`.
fn short_version(pg: &PgTree) -> &str {
    pg.version.split_whitespace().nth(1).unwrap_or(&pg.version)
}

fn run_stage(name: &str, command: &mut Command, limits: &Limits) -> Result<Stage> {
    say(format!("Tests: {name}"));
    println!("    $ {}", command_line(command));
    forget_cargo_run(command);
    let limited = !std::io::stdin().is_terminal();
    if limited {
        // A group of its own, so that everything in it can be ended together.
        command.process_group(0);
    }
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", command_line(command)))?;
    let mut skipped = Vec::new();
    let mut tally = follow(&mut child, limited.then_some((begun, limits)), &mut skipped)?;
    let status = child.wait().context("cannot wait for a stage")?;
    if !status.success() && tally.failed == 0 {
        println!("\nerror: {name}: ended with {status} without naming a failed test");
        tally.failed = 1;
    }
    Ok(Stage { name: name.to_owned(), tally, skipped, took: begun.elapsed() })
}

/// Prints the child's output as it comes, adds up its result lines, and collects what was skipped. Beyond the limits, of
/// a child that began then, its group is killed.
fn follow(child: &mut Child, limits: Option<(Instant, &Limits)>, skipped: &mut Vec<String>) -> Result<Tally> {
    let stdout = child.stdout.take().context("a child has no output")?;
    let (sender, lines) = mpsc::channel();
    std::thread::Builder::new()
        .name("output".to_owned())
        .spawn(move || {
            let mut reader = BufReader::new(stdout);
            let mut line = Vec::new();
            // Bytes, because a test may print anything.
            while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                if sender.send(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned()).is_err() {
                    break;
                }
                line.clear();
            }
        })
        .context("cannot start a thread")?;
    let mut tally = Tally::default();
    let mut has_ended = false;
    let mut waits = 0;
    let mut last_line = Instant::now();
    loop {
        match lines.recv_timeout(WAIT) {
            Ok(line) => {
                last_line = Instant::now();
                println!("{line}");
                if let Some((_, what)) = line.split_once(SKIPPED) {
                    skipped.push(what.to_owned());
                }
                if let Some(result) = Tally::from_line(&line) {
                    tally += result;
                }
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(tally),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if has_ended {
            waits += 1;
            if waits > WAITS_MAX {
                println!("    (something that the tests started still holds their output open)");
                return Ok(tally);
            }
            continue;
        }
        has_ended = child.try_wait().context("cannot wait for a stage")?.is_some();
        let Some((begun, limits)) = limits else { continue };
        let (took, silent) = (begun.elapsed(), last_line.elapsed());
        if !has_ended && (took > limits.total || silent > limits.silence) {
            println!(
                "\nerror: not done after {} minutes, and the last {} without a word: it hangs, and is killed",
                took.as_secs() / 60,
                silent.as_secs() / 60
            );
            let group = Pid::from_raw(child.id() as i32);
            if let Err(error) = killpg(group, Signal::SIGKILL) {
                println!("    cannot kill it: {error}");
            }
        }
    }
}

/// Prints what happened; the last line is the one that CI reads.
fn summarise(stages: &mut [Stage], filtered: bool) -> bool {
    for stage in stages.iter_mut() {
        if stage.tally.ran() == 0 && !filtered {
            println!("\nerror: {}: ran no test", stage.name);
            stage.tally.failed = 1;
        }
    }
    let mut sum = Tally::default();
    say("Summary");
    for stage in stages.iter() {
        sum += stage.tally;
        println!(
            "    {:<58} {:>4} passed, {} failed, {} ignored   {:>4} s",
            stage.name,
            stage.tally.passed,
            stage.tally.failed,
            stage.tally.ignored,
            stage.took.as_secs()
        );
    }
    let skipped: Vec<&String> = stages.iter().flat_map(|stage| &stage.skipped).collect();
    if !skipped.is_empty() {
        println!("\n    {} skipped on this machine:", skipped.len());
        skipped.iter().for_each(|what| println!("    {SKIPPED}{what}"));
    }
    if sum.ran() == 0 {
        println!("\nerror: no test has that in its name");
    }
    println!("\n{} passed, {} failed", sum.passed, sum.failed);
    sum.failed == 0 && sum.passed > 0
}
