//! Faults: what is done to the server and to clients while they work.
//!
//! A fault must prove that it struck while work was in flight: that calls were open in the server (by the clients' own
//! books, taken just before), and that something came of it (a process is another one, a call failed). One that
//! cannot prove it has missed. A round in which a chosen fault never struck fails.

use anyhow::{bail, Result};

use super::history::Us;
use super::rng::Rng;
use super::world::World;

/// The proof that a fault struck.
#[derive(Clone, Debug)]
pub struct Proof {
    /// When it began, and when the world was whole again.
    pub from_us: Us,
    pub to_us: Us,
    /// Calls that clients had open just before.
    pub open_calls: usize,
    /// What came of it, in a few words, e.g. `postmaster 17 -> 39`.
    pub seen: String,
}

/// What came of an attempt.
#[derive(Clone, Debug)]
pub enum Struck {
    Hit(Proof),
    /// Nothing was in flight, or the victim was gone: it does not count.
    Missed(String),
}

pub trait Fault: Send {
    /// As `--faults` has it.
    fn name(&self) -> &'static str;

    /// Why it cannot be tried on this machine; said aloud in the report.
    fn skipped(&self, _world: &World) -> Option<String> {
        None
    }

    /// What it needs before clients start (a standby, a pooler). Called once.
    fn prepare(&mut self, _world: &World) -> Result<()> {
        Ok(())
    }

    /// Strikes once, and returns when the world is whole again (the server takes connections, what was stopped goes
    /// on). Whatever it does to the server's memory it tells by [`World::befell`] or [`World::fail_over`]. An error
    /// ends the round as failed.
    fn strike(&mut self, world: &World, rng: &mut Rng) -> Result<Struck>;
}

/// Every fault there is, by name.
pub fn all() -> Vec<Box<dyn Fault>> {
    Vec::new()
}

/// Those of these names; none named: all.
pub fn named(names: &[String]) -> Result<Vec<Box<dyn Fault>>> {
    let known: Vec<&str> = all().iter().map(|fault| fault.name()).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("there is no fault {unknown:?}; there are {}", known.join(", "));
    }
    Ok(all().into_iter().filter(|fault| names.is_empty() || names.iter().any(|n| n == fault.name())).collect())
}
