//! The work behind `cargo xtask`: bring the machine to where it can build, then demo, tests, lints.
//!
//! From below: `run` (child processes), `apt` and `apt_sources` (Debian's packages), `tree` (copies of PostgreSQL
//! installations), `provision` (what of all that is needed), `build` (cargo pgrx), `suite`, `lint`, `demo*`, `bench`, `soak*`,
//! `model`, `torture`, `valgrind`.

mod apt;
mod apt_sources;
pub mod bench;
mod build;
pub mod demo;
mod demo_check;
pub mod demo_consumer;
mod demo_files;
pub mod lint;
pub mod model;
mod provision;
mod report;
mod run;
pub mod soak;
mod soak_judge;
mod soak_load;
mod soak_sample;
pub mod suite;
pub mod torture;
mod tree;
pub mod valgrind;

use std::path::{Path, PathBuf};

/// The versions that pg_queue supports, oldest first.
pub const MAJORS: [u16; 4] = [15, 16, 17, 18];

/// The clone that this xtask was built from.
pub fn repository() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// Cargo's target directory: the one given, else the clone's.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(path) => std::path::absolute(&path).unwrap_or_else(|_| path.into()),
        None => repository().join("target"),
    }
}
