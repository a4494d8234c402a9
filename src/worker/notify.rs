//! Clients that LISTEN are told when a queue has something ready: by one notification for all that became ready
//! since the last, and not more often than the setting allows. Senders never notify: NOTIFY takes a lock of the whole
//! server at commit. In a database where nobody has ever listened nothing is sent.

use crate::pg::call::Value;
use crate::pg::{clock, shmem, spi, user, worker};
use crate::queue::list;
use crate::settings;
use pgrx::pg_sys;
use queue_dispatch::QueueRef;

/// What failed is tried again after this long, microseconds.
const AGAIN_US: i64 = 1_000_000;

/// Notifies of these queues, in one transaction.
pub fn notify(queues: &[(QueueRef, u32)]) {
    let done = worker::transaction("notifying listeners", || {
        // A notification lost in a crash is lost with those who listened.
        spi::run("SELECT pg_catalog.set_config('synchronous_commit', 'off', true)", &[], &[]);
        for (_, relation) in queues {
            if let Some(name) = user::relation_name(*relation) {
                let channel = list::channel(&name);
                spi::run(
                    "SELECT pg_catalog.pg_notify($1, '')",
                    &[pg_sys::TEXTOID.into()],
                    &[Value::of(channel.as_str())],
                );
            }
        }
        Ok(())
    });
    let pause_us = if done.is_some() { settings::notify_us() } else { AGAIN_US };
    let next_us = clock::now().mono_us.saturating_add(pause_us);
    let _ = shmem::with_arena(|arena, _, _| {
        for (at, _) in queues {
            arena.news_told(*at, done.is_none(), next_us);
        }
    });
}
