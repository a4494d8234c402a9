//! `cargo xtask`: the commands of a newcomer and of CI.
//!
//! Owns the command line only; the work is in `xtask/`. Never changes the machine without saying what and why.

mod xtask;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Shows and tests pg_queue; installs what is missing first.")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Shows pg_queue at work: checks every file of a directory with four consumer processes, one of them killed.
    Demo {
        /// Whose files become messages [default: the repository's tracked files].
        directory: Option<PathBuf>,
        /// Leave the cluster running afterwards, to go on playing.
        #[arg(long)]
        keep: bool,
    },
    /// Runs every test on every supported PostgreSQL.
    Test {
        /// Only on these major versions, e.g. `--pg 17,18`.
        #[arg(long = "pg", value_delimiter = ',', value_name = "MAJOR",
              value_parser = clap::value_parser!(u16).range(15..=18))]
        versions: Vec<u16>,
        /// Repeat what is a matter of luck a hundred times instead of five.
        #[arg(long)]
        long: bool,
        /// Only tests whose name contains this.
        filter: Option<String>,
    },
    /// Measures pg_queue beside pgmq, a hand-written SKIP LOCKED queue and bare PostgreSQL, in turns.
    Bench(xtask::bench::Options),
    /// Sends and finishes at a steady rate for minutes to hours: fails if anything grew.
    Soak(xtask::soak::Options),
    /// Runs random sequences of every verb beside a plain model.
    Model(xtask::model::Options),
    /// Breaks the server on purpose under load, then accounts for every message: fails if one is lost or doubled.
    Torture(xtask::torture::Options),
    /// Runs tests on a server under valgrind, and judges by what that reports.
    Valgrind(xtask::valgrind::Options),
    /// Checks format and lints (`cargo fmt`, `cargo clippy`), the extension's on one PostgreSQL.
    Lint,
    /// One consumer of the demo; started by it.
    #[command(hide = true)]
    DemoConsumer(xtask::demo_consumer::Arguments),
}

fn main() -> ExitCode {
    // The server runs as another user when we are root: it must be able to read what is built and installed.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let outcome = match Arguments::parse().command {
        Task::Demo { directory, keep } => xtask::demo::run(directory, keep),
        Task::Test { versions, long, filter } => xtask::suite::run(versions, long, filter),
        Task::Bench(options) => xtask::bench::run(&options),
        Task::Soak(options) => xtask::soak::run(&options),
        Task::Model(options) => xtask::model::run(&options),
        Task::Torture(options) => xtask::torture::run(&options),
        Task::Valgrind(options) => xtask::valgrind::run(&options),
        Task::Lint => xtask::lint::run_all(),
        Task::DemoConsumer(arguments) => xtask::demo_consumer::run(&arguments).map(|()| true),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
