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
/// How long a message lives; 0 = for ever.
pub const TTL_US: std::ops::RangeInclusive<i64> = 0..=3_650 * DAY_US;
/// How long an archived message is kept; 0 = for ever.
pub const RETENTION_US: std::ops::RangeInclusive<i64> = 0..=36_500 * DAY_US;
/// Deliveries of one message; 0 = unlimited.
pub const DELIVERIES: std::ops::RangeInclusive<i64> = 0..=1_000_000;
/// Factor of a retry's backoff.
pub const BACKOFF: std::ops::RangeInclusive<f64> = 1.0..=1_000.0;
/// Part of the delay by which a retry is spread.
pub const JITTER: std::ops::RangeInclusive<f64> = 0.0..=1.0;
/// Bytes kept of a retry's error text.
pub const ERROR_BYTES_MAX: usize = 10_000;
/// Shortest and longest name of a schedule, bytes.
pub const SCHEDULE_NAME_BYTES: std::ops::RangeInclusive<usize> = 1..=200;
/// Longest text of a schedule, bytes: lists of every second, minute and hour have room in it.
pub const SCHEDULE_BYTES_MAX: usize = 1_000;
/// Shortest and longest interval of a schedule.
pub const SCHEDULE_INTERVAL_US: std::ops::RangeInclusive<i64> = SECOND_US..=3_650 * DAY_US;
/// Messages of one transaction that are remembered one by one; beyond that it publishes the lowest id.
pub const JOURNAL_SENT_MAX: usize = 100_000;

static MAX_MESSAGES: GucSetting<i32> = GucSetting::<i32>::new(262_144);
static MAX_QUEUES: GucSetting<i32> = GucSetting::<i32>::new(1_024);
static MAX_DATABASES: GucSetting<i32> = GucSetting::<i32>::new(64);
static READY_WINDOW: GucSetting<i32> = GucSetting::<i32>::new(32_768);
static WAIT_MAX_MS: GucSetting<i32> = GucSetting::<i32>::new(60_000);
static LEASE_FLUSH_MS: GucSetting<i32> = GucSetting::<i32>::new(1_000);
static NOTIFY_MS: GucSetting<i32> = GucSetting::<i32>::new(100);
static WORKER_ENABLED: GucSetting<bool> = GucSetting::<bool>::new(true);

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
            c"Most queues used since the server started, over all databases.",
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
    define_worker_settings();
}

/// Refuses from now on to set what is misspelt, once all settings are defined. Only where the library is preloaded: else
/// those that size shared memory are not, and may be in postgresql.conf for the next start.
pub fn reserve_prefix() {
    crate::pg::worker::reserve_settings(c"pg_queue");
}

/// Defines what the workers go by.
fn define_worker_settings() {
    GucRegistry::define_int_guc(
        c"pg_queue.lease_flush_interval",
        c"Leases that last longer than this are written to a table, so that they survive a crash.",
        c"On a queue with durable_leases every read waits for that.",
        &LEASE_FLUSH_MS,
        1,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"pg_queue.notify_interval",
        c"Shortest time between two notifications of one queue to clients that LISTEN.",
        c"What becomes ready meanwhile is told together.",
        &NOTIFY_MS,
        1,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_bool_guc(
        c"pg_queue.worker_enabled",
        c"Whether the database has a worker.",
        c"Off, schedules do not fire, nothing expires or moves, no lease is written; sends and reads go on. For a database with ALTER DATABASE ... SET, before it is restored, to keep a copy quiet.",
        &WORKER_ENABLED,
        GucContext::Suset,
        GucFlags::default(),
    );
}

/// How old leases are when they are written.
pub fn lease_flush_us() -> i64 {
    i64::from(LEASE_FLUSH_MS.get()) * 1_000
}

/// Time between two notifications of one queue.
pub fn notify_us() -> i64 {
    i64::from(NOTIFY_MS.get()) * 1_000
}

/// Whether this database is to have a worker.
pub fn is_worker_enabled() -> bool {
    WORKER_ENABLED.get()
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
