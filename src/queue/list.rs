//! `queue_list`, and what it shows: who may use a queue, and on which channel its worker notifies.

use crate::error::Result;
use crate::pg::call::{Args, Rows, Value};
use crate::pg::spi;
use crate::pg::user::{self, Right};
use crate::queue::admin::oid;
use crate::settings;
use pgrx::pg_sys;

/// What the channels of all queues begin with.
pub const CHANNEL_PREFIX: &str = "queue_";

/// The channel on which the worker notifies of a queue: `queue_<name>`, hashed beyond 63 bytes.
pub fn channel(name: &str) -> String {
    let channel = format!("{CHANNEL_PREFIX}{name}");
    if channel.len() <= settings::NAME_BYTES_MAX {
        return channel;
    }
    format!("{CHANNEL_PREFIX}{:016x}", hash(name))
}

/// FNV-1a, 64 bits: it only has to be the same for whoever listens, or makes a queue of that name.
pub fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Whether the caller may use a queue in any way.
pub fn may_use(relation: u32) -> bool {
    user::is_owner(relation)
        || [Right::Insert, Right::Select, Right::Update, Right::Delete, Right::Truncate]
            .iter()
            .any(|right| user::has_rights(relation, &[*right]))
}

/// `queue_list`: a row for each queue that the caller may use in any way; pg_monitor sees all.
pub fn queue_list(_args: &Args, rows: &mut Rows) -> Result<()> {
    let outcome = user::acting_as_extension(|| {
        spi::look(
            "SELECT c.oid, c.relname::pg_catalog.text, pg_catalog.pg_get_userbyid(c.relowner)::pg_catalog.text, \
             q.visibility_timeout, q.max_deliveries, COALESCE(d.relname::pg_catalog.text, ''), q.retry_delay, \
             q.retry_backoff, q.retry_delay_max, q.retry_jitter, q.require_lease, \
             c.relpersistence OPERATOR(pg_catalog.=) 'u', q.paused, q.created_at, q.message_ttl, \
             q.archive_retention, q.durable_leases \
             FROM queue_catalog.queue q \
             JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) q.queue::pg_catalog.oid \
               AND c.relnamespace OPERATOR(pg_catalog.=) $1 \
             LEFT JOIN pg_catalog.pg_class d ON d.oid OPERATOR(pg_catalog.=) q.dead_letter_queue::pg_catalog.oid \
               AND d.relnamespace OPERATOR(pg_catalog.=) $1 \
             ORDER BY c.relname",
            &[pg_sys::OIDOID.into()],
            &[oid(user::schema(c"queue").unwrap_or(0))], // in another schema it is no queue
        )
    });
    let sees_all = user::is_monitor();
    let zero = Value::of_interval_us(0);
    for row in outcome.rows {
        let relation: u32 = row[0].get::<pg_sys::Oid>().map_or(0, Into::into);
        // Under an old snapshot one may be listed that was dropped meanwhile.
        let is_seen = user::relation_name(relation).is_some() && (sees_all || may_use(relation));
        if !is_seen {
            continue;
        }
        let name = user::relation_name(relation).unwrap_or_default();
        rows.emit([
            row[1],
            row[2],
            row[3],
            row[4],
            row[5],
            row[6],
            row[7],
            row[8],
            row[9],
            row[14],
            row[15],
            Value::of(0i64),                                     // max_length
            Value::of("reject"),                                 // overflow
            Value::of_interval_us(5 * 60 * settings::SECOND_US), // dedup_window
            zero,                                                // priority_ageing
            Value::of(false),                                    // group_fairness
            row[10],
            row[16],
            row[11],
            row[12],
            Value::of(channel(&name)),
            row[13],
        ]);
    }
    Ok(())
}
