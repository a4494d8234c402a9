//! Holding backends still at named places, so that a test can make an interleaving happen; and moving the server's
//! clocks, so that a test need not sleep.
//!
//! Thin calls of the SQL functions that a build with the feature `wait_points` has; `cargo xtask test` installs
//! such a build. Never used by the demo.

use anyhow::{Context, Result};
use postgres::Client;

use crate::wait::wait_until;

/// From now on whoever comes to `name` stands still there: every backend, or only `pid`.
pub fn arm(client: &mut Client, name: &str, pid: Option<i32>) -> Result<()> {
    client
        .execute("SELECT queue_test.wait_point_arm($1, $2)", &[&name, &pid])
        .with_context(|| format!("cannot arm wait point {name}"))?;
    Ok(())
}

/// Disarms `name` and lets everybody who stands there go on.
pub fn release(client: &mut Client, name: &str) -> Result<()> {
    client
        .execute("SELECT queue_test.wait_point_release($1)", &[&name])
        .with_context(|| format!("cannot release wait point {name}"))?;
    Ok(())
}

/// How many backends stand at `name`.
pub fn reached(client: &mut Client, name: &str) -> Result<i64> {
    let row = client
        .query_one("SELECT queue_test.wait_point_reached($1)", &[&name])
        .with_context(|| format!("cannot look at wait point {name}"))?;
    Ok(row.try_get(0)?)
}

/// Returns when `backends` of them stand at `name`.
#[track_caller]
pub fn wait_reached(client: &mut Client, name: &str, backends: i64) {
    wait_until(&format!("{backends} backend(s) stand at {name}"), || {
        reached(client, name).unwrap_or_else(|error| panic!("{error:#}")) >= backends
    });
}

/// Lets time pass for the whole server: both clocks go forward by an interval such as `1 hour`. What sleeps wakes and
/// looks. Only on a cluster of the test's own.
pub fn advance_clock(client: &mut Client, by: &str) {
    shift_clocks(client, by, by);
}

/// Sets the wall clock forth, or back, while no time passes. Only on a cluster of the test's own.
pub fn set_wall_clock(client: &mut Client, by: &str) {
    shift_clocks(client, "0", by);
}

fn shift_clocks(client: &mut Client, mono: &str, wall: &str) {
    let sql = "SELECT queue_test.clock_shift($1::text::interval, $2::text::interval)";
    client.execute(sql, &[&mono, &wall]).unwrap_or_else(|error| panic!("cannot shift the clocks: {error:#}"));
}
