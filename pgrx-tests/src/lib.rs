//! What stands outside a backend: throwaway clusters, many sessions, crashes.
//!
//! The tests in `tests/` and `cargo xtask demo` use it. It owns every server process and directory that it
//! makes, and takes them away again, however the process that asked for them ends. It never builds or installs
//! anything (that is `cargo xtask`), and never touches a cluster that it did not make.

mod cluster;
mod database;
pub mod disk;
mod os_user;
mod pg_tree;
pub mod pooler;
mod processes;
mod session;
mod skip;
pub mod torture;
mod wait;
pub mod wait_points;

pub use cluster::{keep_data, Cluster, ClusterOptions, StopMode, CLUSTERS_ENV};
pub use database::{shared_cluster, shared_database, Database};
pub use os_user::ServerUser;
pub use pg_tree::{PgTree, PG_CONFIG_ENV, PG_CONFIG_OLD_ENV};
pub use processes::descendants;
pub use session::{Running, Session};
pub use skip::{skipped, SKIPPED};
pub use wait::{wait_until, wait_until_some, WAIT_LIMIT};
