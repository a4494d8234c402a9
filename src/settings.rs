//! Every setting of the server, and every bound on what a caller may ask for, once, with unit and range.

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};
use queue_dispatch::Config;

/// Microseconds in a second.
pub const SECOND_US: i64 = 1_000_000;
/// Microseconds in a day.
pub const DAY_US: i64 = 86_400 * SECOND_US;

/// Longest queue name in bytes (an identifier's).
pub const NAME_BYTES_MAX: usize = 63;
/// Most messages read, sent or finished by one call.
pub const BATCH_MAX: usize = 100_000;
/// Messages brought back by one call, which goes through them in chunks.
pub const BROUGHT_BACK: std::ops::RangeInclusive<i64> = 1..=i64::MAX;
/// Most queues in one queue_read_any.
pub const QUEUES_MAX: usize = queue_dispatch::WAIT_QUEUES_MAX;
/// Shortest and longest lease.
pub const LEASE_US: std::ops::RangeInclusive<i64> = 1_000..=365 * DAY_US;
/// Delays before delivery, and those of retries.
pub const DELAY_US: std::ops::RangeInclusive<i64> = 0..=3_650 * DAY_US;
/// Deliveries of one message; 0 = unlimited.
pub const DELIVERIES: std::ops::RangeInclusive<i64> = 0..=1_000_000;
/// Factor of a retry's backoff.
pub const BACKOFF: std::ops::RangeInclusive<f64> = 1.0..=1_000.0;
/// Part of the delay by which a retry is spread.
pub const JITTER: std::ops::RangeInclusive<f64> = 0.0..=1.0;
/// Bytes kept of a retry's error text.
pub const ERROR_BYTES_MAX: usize = 10_000;
/// Messages of one transaction that are remembered one by one; beyond that it publishes the lowest id.
pub const JOURNAL_SENT_MAX: usize = 100_000;

static MAX_MESSAGES: GucSetting<i32> = GucSetting::<i32>::new(262_144);
static MAX_QUEUES: GucSetting<i32> = GucSetting::<i32>::new(1_024);
static MAX_DATABASES: GucSetting<i32> = GucSetting::<i32>::new(64);
static READY_WINDOW: GucSetting<i32> = GucSetting::<i32>::new(32_768);
static WAIT_MAX_MS: GucSetting<i32> = GucSetting::<i32>::new(60_000);

/// Defines the settings, in `_PG_init`. Those that size shared memory can only be set when the server starts.
pub fn define(is_preloading: bool) {
    // Outside preloading a setting of the postmaster cannot be defined; nothing needs it there.
    if is_preloading {
        GucRegistry::define_int_guc(
            c"pg_queue.max_messages",
            c"Most messages that the dispatcher tracks at a time, over all queues and databases.",
            c"What does not fit stays in the tables and is loaded as room appears. 88 bytes of shared memory each.",
            &MAX_MESSAGES,
            4_096,
            100_000_000,
            GucContext::Postmaster,
            GucFlags::default(),
        );
        GucRegistry::define_int_guc(
            c"pg_queue.max_queues",
            c"Most queues in use at a time, over all databases.",
            c"Each is promised its share of one half of pg_queue.max_messages, at most 256 messages.",
            &MAX_QUEUES,
            8,
            65_536,
            GucContext::Postmaster,
            GucFlags::default(),
        );
        GucRegistry::define_int_guc(
            c"pg_queue.max_databases",
            c"Most databases that have a worker.",
            c"Each worker takes one of max_worker_processes.",
            &MAX_DATABASES,
            1,
            4_096,
            GucContext::Postmaster,
            GucFlags::default(),
        );
        GucRegistry::define_int_guc(
            c"pg_queue.ready_window",
            c"Most waiting messages of one queue that the dispatcher tracks at a time.",
            c"A deeper queue is loaded from its table in order as it is read.",
            &READY_WINDOW,
            64,
            1_000_000,
            GucContext::Postmaster,
            GucFlags::default(),
        );
    }
    GucRegistry::define_int_guc(
        c"pg_queue.wait_max",
        c"Longest time that a call of queue_read waits for a message.",
        c"A longer wait is asked for in vain: the call ends empty after this.",
        &WAIT_MAX_MS,
        0,
        86_400_000,
        GucContext::Userset,
        GucFlags::UNIT_MS,
    );
}

/// Sizes of the dispatcher's memory.
pub fn sizes() -> crate::pg::shmem::Sizes {
    let (slots, queues) = (MAX_MESSAGES.get() as usize, MAX_QUEUES.get() as usize);
    let queues = queues.min(slots / 2);
    crate::pg::shmem::Sizes {
        slots,
        queues,
        databases: MAX_DATABASES.get() as usize,
        config: Config {
            slots_min: (slots / 2 / queues).clamp(1, 256) as u32,
            window: (READY_WINDOW.get() as usize).min(slots) as u32,
        },
    }
}

/// Longest wait of one call.
pub fn wait_max_us() -> i64 {
    i64::from(WAIT_MAX_MS.get()) * 1_000
}
