//! Child processes, with the reader told what runs and why.
//!
//! Owns how commands are shown, logged and waited for; knows nothing of what they do. A child is always waited for.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

/// How often a long quiet step says that it still lives.
const TICK: Duration = Duration::from_secs(15);
/// How much of a failed step's log is shown.
const LOG_TAIL_LINES: usize = 30;

/// Says what the next step does and why.
pub fn say(what: impl AsRef<str>) {
    println!("\n==> {}", what.as_ref());
}

pub fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs a command whose output the reader sees.
pub fn run(command: &mut Command) -> Result<()> {
    println!("    $ {}", command_line(command));
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", command_line(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", command_line(command));
    }
    Ok(())
}

/// Runs a command for what it prints; its own errors become ours.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", command_line(command)))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed ({}): {}", command_line(command), output.status, errors.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command that prints too much: into `log`, with a sign of life now and then.
pub fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    println!("    $ {}   (output in {})", command_line(command), log.display());
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("cannot share a log file")?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot run {}", command_line(command)))?;
    let mut next_tick = begun + TICK;
    let status = loop {
        if let Some(status) = child.try_wait().context("cannot wait for a child")? {
            break status;
        }
        if Instant::now() >= next_tick {
            println!("      ... {} s", begun.elapsed().as_secs());
            next_tick += TICK;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    if !status.success() {
        bail!("{} failed ({status}); the end of {}:\n{}", command_line(command), log.display(), tail(log));
    }
    println!("      done in {} s", begun.elapsed().as_secs());
    Ok(())
}

fn tail(log: &Path) -> String {
    let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

/// The first file of this name on the PATH.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
}
