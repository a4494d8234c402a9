//! Waiting for conditions. Tests synchronise by these, never by sleeping for a guessed time.

use std::time::{Duration, Instant};

/// How long anything may take in a test before it counts as hung.
pub const WAIT_LIMIT: Duration = Duration::from_secs(30);

/// How often a condition is looked at: short, because it is the tests' latency.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Returns when `condition` holds; panics, naming `what`, when it does not within [`WAIT_LIMIT`].
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_until_some(what, || condition().then_some(()))
}

/// Returns the first value that `look` finds; panics, naming `what`, when there is none within [`WAIT_LIMIT`].
#[track_caller]
pub fn wait_until_some<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    match poll(WAIT_LIMIT, look) {
        Some(value) => value,
        None => panic!("waited {} s in vain until {what}", WAIT_LIMIT.as_secs()),
    }
}

/// The same for code that handles the failure itself.
pub(crate) fn poll<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = look() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
