//! Torture: clients send and consume while the server is broken on purpose, and afterwards every message is accounted
//! for.
//!
//! From below: `rng` (choices from a seed), `history` (what clients saw), `world` (where they live), `faults` (what
//! is done to them), `tally` (what came of their calls), `actor` (a client's session: calls, transactions, and their
//! outcome), `senders`, `consumers` and `mortal` (what they do), `checker` and `claims` (the verdict, from the history
//! alone), `round` (all of it once), `report`.
//!
//! A seed decides what clients and faults choose; when it happens is the machine's. So a seed repeats a run's shape,
//! not its every step.

mod actor;
pub mod checker;
#[cfg(test)]
mod checker_tests;
mod claims;
#[cfg(test)]
mod claims_tests;
mod consumers;
pub mod faults;
pub mod history;
mod mortal;
mod report;
pub mod rng;
pub mod round;
mod senders;
pub mod tally;
pub mod world;
