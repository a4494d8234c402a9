//! pg_queue: queues inside the PostgreSQL server. The heap is the truth, shared memory is the index.
//!
//! This file is the door: the module's magic, `_PG_init`, and what is installed by CREATE EXTENSION. The SQL
//! functions are in [`api`], the verbs in [`queue`], the background workers in [`worker`]; everything `unsafe` is
//! in [`pg`]; what decides who gets which message is the package `queue-dispatch` in `src/dispatch`.
#![deny(unsafe_code)]

use pgrx::prelude::*;

mod api;
mod error;
#[allow(unsafe_code)]
mod pg;
mod queue;
mod settings;
#[cfg(any(test, feature = "pg_test"))]
mod tests;
mod worker;

pub(crate) use error::{Error, Result};

pgrx::pg_module_magic!(name, version);

extension_sql_file!("../sql/catalog.sql", name = "catalog", bootstrap);
extension_sql_file!("../sql/functions.sql", name = "functions", requires = ["catalog"]);
#[cfg(feature = "wait_points")]
extension_sql_file!("../sql/wait_points.sql", name = "wait_points", requires = ["functions"]);

/// Called when a process loads the library: by the postmaster if it is in shared_preload_libraries, else by a
/// single backend (CREATE EXTENSION without preloading, pg_upgrade), where nothing must fail and nothing is
/// installed but the functions, which then say what is missing.
#[allow(non_snake_case)]
#[allow(unsafe_code)] // `no_mangle`: Postgres looks for this name
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    let is_preloading = pg::worker::is_preloading();
    settings::define(is_preloading);
    if !is_preloading {
        return;
    }
    pg::shmem::install(settings::sizes);
    #[cfg(feature = "wait_points")]
    pg::wait_point::install();
    #[cfg(feature = "wait_points")]
    pg::broken_rule::define();
    settings::reserve_prefix();
    queue::journal::install();
    pg::hooks::install(pg::hooks::Hooks {
        table_altered: worker::table_altered,
        table_renamed: worker::table_renamed,
        table_reowned: worker::table_reowned,
        table_dropped: worker::table_dropped,
        relation_invalidated: worker::relation_invalidated,
        database_wanted: worker::database_wanted,
        database_released: worker::database_released,
        extensions_changed: worker::extensions_changed,
        prepared_committed: worker::prepared_committed,
        subscriptions_changed: worker::subscriptions_changed,
        listening: worker::listening,
    });
    if !pg::worker::is_binary_upgrade() {
        pg::worker::register("pg_queue launcher", "pg_queue_launcher_main");
    }
}

/// This module is required by `cargo pgrx test`.
#[cfg(test)]
pub mod pg_test {
    /// Nothing to set up.
    pub fn setup(_options: Vec<&str>) {}

    /// What the test server needs in its postgresql.conf.
    #[must_use]
    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec!["shared_preload_libraries = 'pg_queue'", "max_prepared_transactions = 10"]
    }
}
