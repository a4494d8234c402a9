//! What could not be tried on this machine is said aloud: a test that passes because it did nothing says so.
//!
//! Owns the word that `cargo xtask test` counts.

use std::io::Write;

/// How such a line begins.
pub const SKIPPED: &str = "SKIPPED: ";

/// Says that `what` was not tried, and why, where the test runner does not keep it from who looks on.
pub fn skipped(what: &str, why: &str) {
    // Nothing better could be done about a closed output.
    let _ = writeln!(std::io::stdout(), "\n{SKIPPED}{what}: {why}");
}
