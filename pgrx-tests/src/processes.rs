//! Processes of the machine: who descends from whom, who is still there, signals.
//!
//! Reads `/proc` (the harness is for Linux). Never signals a process that the caller did not name.

use std::fs;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

/// To one that has just ended by itself, too: what the caller wanted.
pub(crate) fn send(pid: u32, signal: Signal) -> Result<()> {
    send_if_there(pid, signal).map(|_| ())
}

/// Returns whether there is such a process.
pub(crate) fn send_if_there(pid: u32, signal: Signal) -> Result<bool> {
    match kill(Pid::from_raw(pid as i32), signal) {
        Ok(()) => Ok(true),
        Err(Errno::ESRCH) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot send {signal} to process {pid}")),
    }
}

/// Whether a process runs; one that ended and was not waited for (a zombie) does not.
pub(crate) fn is_running(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != 'Z' && state != 'X')
}

/// Whether SIGSTOP holds it.
pub(crate) fn is_stopped(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state == 'T')
}

/// Every process that `pid` started, directly or not.
pub fn descendants(pid: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let parents: Vec<(u32, u32)> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|child: u32| Some((child, stat(child)?.1)))
        .collect();
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(child, _)| *child));
        next += 1;
    }
    found.remove(0);
    found
}

/// State and parent from `/proc/PID/stat`; the name before them may itself hold blanks and parentheses.
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.next()?.parse().ok()?))
}
