//! A queue's settings on their way from the arguments of `queue_create` and `queue_alter` to its row in
//! `queue_catalog.queue`. Owns that row's columns; `resolve` reads it.

use crate::error::{Error, Result};
use crate::pg::call::{Args, Value};
use crate::pg::spi::{self, quoted};
use crate::pg::{hooks, user};
use crate::queue::admin::{oid, run_ddl};
use crate::queue::resolve::Settings;
use crate::queue::{args, journal};
use crate::settings;
use pgrx::pg_sys;
use std::ops::RangeInclusive;

fn real(args: &Args, position: usize, name: &'static str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
    match args.value(position).get::<f64>() {
        Some(value) if !range.contains(&value) => {
            Err(Error::argument(name, value, format!("{} to {}", range.start(), range.end())))
        }
        other => Ok(other),
    }
}

/// What `queue_create` and `queue_alter` were given: positions 1 to 17 are the same in both.
pub struct Given {
    /// Those that need no look at anything else.
    pub settings: Settings,
    /// The name of the dead-letter queue, if one is named; empty: none from now on.
    pub dead_letter_queue: Option<String>,
}

pub fn given(args: &Args, base: Settings) -> Result<Given> {
    let mut s = base;
    let duration = |position, name, range| args::duration(args.value(position), name, range);
    if let Some(us) = duration(1, "visibility_timeout", settings::LEASE_US)? {
        s.visibility_timeout_us = us;
    }
    s.max_deliveries = args::number(args, 2, "max_deliveries", s.max_deliveries, settings::DELIVERIES)?;
    let dead_letter_queue = args.value(3).text();
    if let Some(us) = duration(4, "retry_delay", settings::DELAY_US)? {
        s.retry_delay_us = us;
    }
    if let Some(factor) = real(args, 5, "retry_backoff", settings::BACKOFF)? {
        s.retry_backoff = factor;
    }
    if let Some(us) = duration(6, "retry_delay_max", settings::DELAY_US)? {
        s.retry_delay_max_us = us;
    }
    if let Some(part) = real(args, 7, "retry_jitter", settings::JITTER)? {
        s.retry_jitter = part;
    }
    if let Some(us) = duration(8, "message_ttl", settings::TTL_US)? {
        s.message_ttl_us = us;
    }
    if let Some(us) = duration(9, "archive_retention", settings::RETENTION_US)? {
        s.archive_retention_us = us;
    }
    let is_zero = |position| args.value(position).interval().is_none_or(|i| i == (0, 0, 0));
    args::unbuilt(args.value(10).i64().unwrap_or(0) == 0, "max_length")?;
    args::unbuilt(args.value(11).text().is_none_or(|o| o == "reject"), "overflow")?;
    let window = args.value(12).interval();
    args::unbuilt(window.is_none_or(|i| i == (0, 0, 5 * 60 * settings::SECOND_US)), "dedup_window")?;
    args::unbuilt(is_zero(13), "priority_ageing")?;
    args::unbuilt(!args::flag(args, 14, false), "group_fairness")?;
    s.require_lease = args::flag(args, 15, s.require_lease);
    s.durable_leases = args::flag(args, 16, s.durable_leases);
    Ok(Given { settings: s, dead_letter_queue })
}

pub fn notice_differences(name: &str, args: &Args, is: &Settings, given: &Given, unlogged_differs: bool) {
    let mut differ = Vec::new();
    let wanted = &given.settings;
    let given_at = |position: usize| !args.value(position).is_null();
    let dead_letter_queue = is.dead_letter_queue.and_then(user::relation_name).unwrap_or_default();
    let all = [
        ("visibility_timeout", given_at(1) && is.visibility_timeout_us != wanted.visibility_timeout_us),
        ("max_deliveries", given_at(2) && is.max_deliveries != wanted.max_deliveries),
        ("dead_letter_queue", given.dead_letter_queue.as_ref().is_some_and(|d| *d != dead_letter_queue)),
        ("retry_delay", given_at(4) && is.retry_delay_us != wanted.retry_delay_us),
        ("retry_backoff", given_at(5) && is.retry_backoff != wanted.retry_backoff),
        ("retry_delay_max", given_at(6) && is.retry_delay_max_us != wanted.retry_delay_max_us),
        ("retry_jitter", given_at(7) && is.retry_jitter != wanted.retry_jitter),
        ("message_ttl", given_at(8) && is.message_ttl_us != wanted.message_ttl_us),
        ("archive_retention", given_at(9) && is.archive_retention_us != wanted.archive_retention_us),
        ("require_lease", given_at(15) && is.require_lease != wanted.require_lease),
        ("durable_leases", given_at(16) && is.durable_leases != wanted.durable_leases),
        ("unlogged", unlogged_differs),
    ];
    for (setting, differs) in all {
        if differs {
            differ.push(setting);
        }
    }
    if differ.is_empty() {
        pgrx::notice!("queue \"{name}\" already exists");
    } else {
        pgrx::notice!("queue \"{name}\" already exists with other settings: {}", differ.join(", "));
    }
}

/// The columns of `queue_catalog.queue` that hold settings, with the types that their values are given in.
const COLUMNS: [(&str, pg_sys::Oid); 12] = [
    ("visibility_timeout", pg_sys::INTERVALOID),
    ("max_deliveries", pg_sys::INT8OID),
    ("dead_letter_queue", pg_sys::OIDOID),
    ("retry_delay", pg_sys::INTERVALOID),
    ("retry_backoff", pg_sys::FLOAT8OID),
    ("retry_delay_max", pg_sys::INTERVALOID),
    ("retry_jitter", pg_sys::FLOAT8OID),
    ("require_lease", pg_sys::BOOLOID),
    ("paused", pg_sys::BOOLOID),
    ("message_ttl", pg_sys::INTERVALOID),
    ("archive_retention", pg_sys::INTERVALOID),
    ("durable_leases", pg_sys::BOOLOID),
];

/// A parameter's place in a statement, as its column takes it.
fn placed(place: usize, kind: pg_sys::Oid) -> String {
    if kind == pg_sys::OIDOID {
        format!("${place}::pg_catalog.regclass")
    } else {
        format!("${place}")
    }
}

/// Which columns, in the order of [`COLUMNS`], hold other settings in one than in the other.
fn differing(one: &Settings, other: &Settings) -> [bool; COLUMNS.len()] {
    [
        one.visibility_timeout_us != other.visibility_timeout_us,
        one.max_deliveries != other.max_deliveries,
        one.dead_letter_queue != other.dead_letter_queue,
        one.retry_delay_us != other.retry_delay_us,
        one.retry_backoff != other.retry_backoff,
        one.retry_delay_max_us != other.retry_delay_max_us,
        one.retry_jitter != other.retry_jitter,
        one.require_lease != other.require_lease,
        one.paused != other.paused,
        one.message_ttl_us != other.message_ttl_us,
        one.archive_retention_us != other.archive_retention_us,
        one.durable_leases != other.durable_leases,
    ]
}

/// Runs a statement whose parameters are these oids and then the settings, in the order of [`COLUMNS`].
fn run_stored(statement: &str, oids: &[Value], s: &Settings) -> spi::Outcome {
    let stored = [
        Value::of_interval_us(s.visibility_timeout_us),
        Value::of(s.max_deliveries),
        s.dead_letter_queue.map_or(Value::NULL, oid),
        Value::of_interval_us(s.retry_delay_us),
        Value::of(s.retry_backoff),
        Value::of_interval_us(s.retry_delay_max_us),
        Value::of(s.retry_jitter),
        Value::of(s.require_lease),
        Value::of(s.paused),
        Value::of_interval_us(s.message_ttl_us),
        Value::of_interval_us(s.archive_retention_us),
        Value::of(s.durable_leases),
    ];
    let types: Vec<u32> = oids
        .iter()
        .map(|_| pg_sys::OIDOID)
        .chain(COLUMNS.iter().map(|(_, kind)| *kind))
        .map(u32::from)
        .collect();
    let values: Vec<Value> = oids.iter().copied().chain(stored).collect();
    spi::run(statement, &types, &values)
}

/// A new queue's row.
pub fn insert(relation: u32, archive: u32, s: &Settings) {
    let (names, places): (Vec<&str>, Vec<String>) =
        COLUMNS.iter().zip(3..).map(|((name, kind), place)| (*name, placed(place, *kind))).unzip();
    let statement = format!(
        "INSERT INTO queue_catalog.queue (queue, archive, {}) \
         VALUES ($1::pg_catalog.regclass, $2::pg_catalog.regclass, {})",
        names.join(", "),
        places.join(", ")
    );
    run_stored(&statement, &[oid(relation), oid(archive)], s);
}

/// Writes what settings are other ones than before, and has every backend and the dispatcher take them in at commit. What
/// stays is not written: the drop of a dead-letter queue changes other queues' rows without a lock on their tables.
pub fn store(relation: u32, s: &Settings, before: &Settings) -> Result<()> {
    let changes: Vec<String> = COLUMNS
        .iter()
        .zip(2..)
        .zip(differing(s, before))
        .filter(|(_, differs)| *differs)
        .map(|(((name, kind), place), _)| format!("{name} = {}", placed(place, *kind)))
        .collect();
    if changes.is_empty() {
        return Ok(());
    }
    let statement = format!(
        "UPDATE queue_catalog.queue SET {} WHERE queue OPERATOR(pg_catalog.=) $1::pg_catalog.regclass",
        changes.join(", ")
    );
    let outcome = user::acting_as_extension(|| run_stored(&statement, &[oid(relation)], s));
    if outcome.processed != 1 {
        // It was made or dropped since this transaction's snapshot (REPEATABLE READ).
        return Err(Error::QueueUnknown { queue: user::relation_name(relation).unwrap_or_default() });
    }
    hooks::invalidate_relation(relation);
    if s.message_ttl_us != before.message_ttl_us {
        set_expiry_default(relation, s.message_ttl_us);
    }
    if s.archive_retention_us != before.archive_retention_us {
        journal::worker_called()?;
    }
    journal::configured(relation, s.policy(), before.policy())
}

/// The default of `expires_at`, for messages that plain SQL sends.
pub fn expiry_default(ttl_us: i64) -> String {
    format!("pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) '{ttl_us} microseconds'::pg_catalog.interval")
}

/// Locks the table against everybody for a moment, as any ALTER TABLE that changes a default does.
pub fn set_expiry_default(relation: u32, ttl_us: i64) {
    let Some(name) = user::relation_name(relation) else { return };
    let default = if ttl_us > 0 {
        format!("SET DEFAULT ({})", expiry_default(ttl_us))
    } else {
        "DROP DEFAULT".to_owned()
    };
    user::acting_as_extension(|| {
        run_ddl(&format!("ALTER TABLE queue.{} ALTER COLUMN expires_at {default}", quoted(&name)));
    });
}
