//! From a queue's name to its table, settings and place in the dispatcher. Owns this backend's cache of that,
//! which lives until Postgres says that one of its tables changed.
//!
//! The order matters: the table is locked first, which also takes in what other sessions changed, and only then
//! is the cache believed. So a name never means another table than the one that is locked.

use crate::error::{Error, Result};
use crate::pg::call::{self, Value};
use crate::pg::insert::{Direct, Source};
use crate::pg::table::{self, Snapshot, Table};
use crate::pg::user::{self, Right};
use crate::pg::{hooks, shmem, spi, xact};
use crate::queue::{column, list};
use crate::settings;
use pgrx::pg_sys;
use queue_dispatch::{Arena, Effects, Now, Policy, QueueRef};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

/// A queue's settings, as in `queue_catalog.queue`.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Length of a lease unless the read says otherwise, microseconds.
    pub visibility_timeout_us: i64,
    /// Deliveries of a message before it is moved away; 0 = no limit.
    pub max_deliveries: i64,
    /// Table of the dead-letter queue.
    pub dead_letter_queue: Option<u32>,
    /// See `Policy`.
    pub retry_delay_us: i64,
    /// See `Policy`.
    pub retry_backoff: f64,
    /// See `Policy`.
    pub retry_delay_max_us: i64,
    /// See `Policy`.
    pub retry_jitter: f64,
    /// A finish, retry or extend must name the lease.
    pub require_lease: bool,
    /// Reads return nothing.
    pub paused: bool,
    /// How long a message lives unless its sender says otherwise, microseconds; 0 = for ever.
    pub message_ttl_us: i64,
    /// How long archived messages are kept, microseconds; 0 = for ever.
    pub archive_retention_us: i64,
    /// A read returns when its counts are on disk.
    pub durable_leases: bool,
}

impl Settings {
    /// SQL.md's defaults.
    pub const DEFAULT: Settings = Settings {
        visibility_timeout_us: 30 * settings::SECOND_US,
        max_deliveries: 20,
        dead_letter_queue: None,
        retry_delay_us: Policy::DEFAULT.retry_delay_us,
        retry_backoff: Policy::DEFAULT.retry_backoff,
        retry_delay_max_us: Policy::DEFAULT.retry_delay_max_us,
        retry_jitter: Policy::DEFAULT.retry_jitter,
        require_lease: false,
        paused: false,
        message_ttl_us: 0,
        archive_retention_us: 0,
        durable_leases: false,
    };

    /// The part that the dispatcher needs.
    pub fn policy(&self) -> Policy {
        Policy {
            retry_delay_us: self.retry_delay_us,
            retry_delay_max_us: self.retry_delay_max_us,
            retry_backoff: self.retry_backoff,
            retry_jitter: self.retry_jitter,
            max_deliveries: self.max_deliveries.clamp(0, i64::from(u32::MAX)) as u32,
            paused: self.paused,
        }
    }
}

/// A queue that this backend knows.
pub struct Queue {
    /// Its name, which is its table's.
    pub name: String,
    /// Its table.
    pub relation: u32,
    /// Its archive's table.
    pub archive: u32,
    /// The primary key's index.
    pub key: u32,
    /// The index on `visible_at`.
    pub due: u32,
    /// The index on `expires_at`.
    pub expiry: u32,
    /// The way past the executor for its messages, if its table is as queue_create made it.
    pub direct: Option<Direct>,
    /// Its settings.
    pub settings: Settings,
    /// Its place in the dispatcher.
    at: Cell<QueueRef>,
    /// Kept plans, by what they are for.
    plans: RefCell<[Option<spi::Plan>; PLANS]>,
}

/// Where a sent message's columns come from, as `create` makes the table.
const SOURCES: [Source; 10] = [
    Source::Identity,    // msg_id
    Source::Clock,       // enqueued_at
    Source::GivenOrNull, // visible_at
    Source::Zero,        // delivery_count
    Source::Zero,        // priority
    Source::Null,        // group_key
    Source::GivenOrNull, // headers
    Source::Given,       // message
    Source::Null,        // last_error
    Source::GivenOrNull, // expires_at; its default is for plain SQL
];

/// What a kept plan is for.
#[derive(Clone, Copy)]
pub enum For {
    /// `send`: rows.
    Send,
    /// `send`: rows of which some expire.
    SendExpiring,
    /// `finish`: deletion through the executor.
    Delete,
    /// `retry`: the row's new state.
    Retry,
    /// `finish`: into the archive.
    Archive,
    /// `redrive`: a dead letter comes back.
    Redrive,
}

const PLANS: usize = 6;

/// No place in the dispatcher yet.
const UNPLACED: QueueRef = QueueRef { epoch: 0, generation: 0, index: 0 };

thread_local! {
    static CACHE: RefCell<HashMap<String, Rc<Queue>>> = RefCell::new(HashMap::new());
    /// A Bloom filter of the cached tables, one bit each: the invalidation callback may look at nothing else.
    static CACHED: Cell<[u64; 4]> = const { Cell::new([0; 4]) };
    /// Queues that are no longer cached but in use somewhere up the stack.
    static RETIRED: Cell<Vec<Rc<Queue>>> = const { Cell::new(Vec::new()) };
    static IS_STALE: Cell<bool> = const { Cell::new(false) };
}

fn filter_bit(relation: u32) -> (usize, u64) {
    let bit = relation.wrapping_mul(0x9e37_79b9) >> 24;
    ((bit / 64) as usize, 1 << (bit % 64))
}

/// Something about a relation (0: about all) changed. Called from anywhere, in the midst of anything.
pub fn invalidated(relation: u32) {
    let (word, bit) = filter_bit(relation);
    if relation == 0 || CACHED.get()[word] & bit != 0 {
        IS_STALE.set(true);
    }
}

fn watch(relation: u32) {
    let (word, bit) = filter_bit(relation);
    let mut filter = CACHED.get();
    filter[word] |= bit;
    CACHED.set(filter);
}

fn cached(name: &str) -> Option<Rc<Queue>> {
    if IS_STALE.get() {
        let old = CACHE.with_borrow_mut(std::mem::take);
        CACHED.set([0; 4]);
        IS_STALE.set(false);
        let mut retired = RETIRED.take();
        retired.extend(old.into_values());
        // A plan may be running right now, when a user's trigger calls us in the midst of it: such a queue's
        // plans are freed the next time round.
        retired.retain(|queue| {
            let is_used = Rc::strong_count(queue) > 1;
            if !is_used {
                for plan in queue.plans.take().into_iter().flatten() {
                    plan.free();
                }
            }
            is_used
        });
        RETIRED.set(retired);
        return None;
    }
    CACHE.with_borrow(|cache| cache.get(name).cloned())
}

/// Finds a queue and locks its table in `mode`, until the transaction's end or [`Queue::unlock`].
pub fn open(name: &str, mode: u32) -> Result<Rc<Queue>> {
    if !shmem::is_available() {
        return Err(Error::NotPreloaded);
    }
    hooks::watch_relations();
    // As for any statement that names the table.
    if !user::schema(c"queue").is_some_and(user::may_use) {
        return Err(Error::SchemaDenied);
    }
    let unknown = || Error::QueueUnknown { queue: name.to_owned() };
    loop {
        if let Some(queue) = cached(name) {
            table::lock(queue.relation, mode);
            if !IS_STALE.get() {
                attach_for_caller(&queue)?;
                return Ok(queue);
            }
            table::unlock(queue.relation, mode);
            continue;
        }
        let relation = find_table(name).ok_or_else(unknown)?;
        table::lock(relation, mode);
        if find_table(name) != Some(relation) {
            table::unlock(relation, mode);
            continue; // renamed or dropped while we waited for the lock
        }
        // Watched before it is read: what changes meanwhile makes the cache stale.
        watch(relation);
        let queue = Rc::new(read(name, relation)?.ok_or_else(unknown)?);
        watch(queue.archive); // whose name is in a plan
        attach_for_caller(&queue)?;
        CACHE.with_borrow_mut(|cache| cache.insert(name.to_owned(), queue.clone()));
        return Ok(queue);
    }
}

/// The table of that name in schema `queue`.
pub fn find_table(name: &str) -> Option<u32> {
    if name.is_empty() || name.len() > settings::NAME_BYTES_MAX || name.contains('\0') {
        return None;
    }
    user::relation(user::schema(c"queue")?, name)
}

fn read(name: &str, relation: u32) -> Result<Option<Queue>> {
    let Some((archive, settings)) = read_settings(relation) else { return Ok(None) };
    let broken = |detail: &str| Error::Broken { queue: name.to_owned(), detail: detail.to_owned() };
    let Some(table) = Table::open(relation, None) else { return Ok(None) };
    let columns = table.columns();
    let is_heap = table.is_heap();
    let trigger = user::acting_as_extension(|| call::function_oid("queue.on_change()"));
    // As its owner: to look at an index Postgres runs what functions its condition has, and a worker looks at all
    // queues as superuser.
    let (key, due, expiry, direct) = user::acting_as(user::owner(relation), || {
        let key = table.primary_key(column::MSG_ID as i16);
        let due = table::index_on(&table, column::VISIBLE_AT as i16, pg_sys::TIMESTAMPTZOID);
        let expiry = table::index_on(&table, column::EXPIRES_AT as i16, pg_sys::TIMESTAMPTZOID);
        let indexes = key.zip(due).zip(expiry).filter(|_| is_heap && columns_are_ours(&columns));
        let direct = indexes.and_then(|((key, due), expiry)| {
            let indexes = [(key, column::MSG_ID), (due, column::VISIBLE_AT), (expiry, column::EXPIRES_AT)];
            Direct::of(&table, &SOURCES, indexes, trigger)
        });
        (key, due, expiry, direct)
    });
    table.close(None, true);
    if !is_heap {
        return Err(broken("It is not an ordinary table in heap storage."));
    }
    if !columns_are_ours(&columns) {
        return Err(broken("Its first ten columns are not those that queue_create made."));
    }
    let key = key.ok_or_else(|| broken("It has no primary key on msg_id (yet)."))?;
    let due = due.ok_or_else(|| broken("It has no plain index on visible_at."))?;
    let expiry = expiry.ok_or_else(|| broken("It has no plain index on expires_at."))?;
    Ok(Some(Queue {
        name: name.to_owned(),
        relation,
        archive,
        key,
        due,
        expiry,
        direct,
        settings,
        at: Cell::new(UNPLACED),
        plans: RefCell::new([None; PLANS]),
    }))
}

/// The name of an archive, if it is (still) in the schema of archives.
pub fn archive_name(archive: u32) -> Option<String> {
    let schema = user::schema(c"queue_archive")?;
    user::relation_name(archive).filter(|_| user::relation_schema(archive) == Some(schema))
}

/// Whether a table's columns are those of a queue, as far as they matter here.
pub fn columns_are_ours(columns: &[(Vec<u8>, u32)]) -> bool {
    let expected = [
        ("msg_id", pg_sys::INT8OID),
        ("enqueued_at", pg_sys::TIMESTAMPTZOID),
        ("visible_at", pg_sys::TIMESTAMPTZOID),
        ("delivery_count", pg_sys::INT4OID),
        ("priority", pg_sys::INT2OID),
        ("group_key", pg_sys::TEXTOID),
        ("headers", pg_sys::JSONBOID),
        ("message", pg_sys::JSONBOID),
        ("last_error", pg_sys::TEXTOID),
        ("expires_at", pg_sys::TIMESTAMPTZOID),
    ];
    columns.len() >= expected.len()
        && expected
            .iter()
            .zip(columns)
            .all(|((name, oid), (column, is))| name.as_bytes() == column && u32::from(*oid) == *is)
}

/// A queue's archive and settings, as they are committed now (or changed by this transaction).
pub fn read_settings(relation: u32) -> Option<(u32, Settings)> {
    read_settings_under(Snapshot::latest(), relation)
}

fn read_settings_under(snapshot: Snapshot, relation: u32) -> Option<(u32, Settings)> {
    const STATEMENT: &str = "SELECT archive::pg_catalog.oid, visibility_timeout, max_deliveries, \
        dead_letter_queue::pg_catalog.oid, retry_delay, retry_backoff, retry_delay_max, retry_jitter, \
        require_lease, paused, message_ttl, archive_retention, durable_leases FROM queue_catalog.queue \
        WHERE queue OPERATOR(pg_catalog.=) $1::pg_catalog.regclass";
    let outcome = user::acting_as_extension(|| {
        spi::look(STATEMENT, &[pg_sys::OIDOID.into()], &[Value::of(pg_sys::Oid::from(relation))])
    });
    snapshot.done();
    let row = outcome.rows.first()?;
    let us = |value: Value| value.interval().map_or(0, |(_, days, us)| i64::from(days) * settings::DAY_US + us);
    Some((
        row[0].get::<pg_sys::Oid>()?.into(),
        Settings {
            visibility_timeout_us: us(row[1]),
            max_deliveries: row[2].i64()?,
            dead_letter_queue: row[3].get::<pg_sys::Oid>().map(Into::into),
            retry_delay_us: us(row[4]),
            retry_backoff: row[5].get()?,
            retry_delay_max_us: us(row[6]),
            retry_jitter: row[7].get()?,
            require_lease: row[8].get()?,
            paused: row[9].get()?,
            message_ttl_us: us(row[10]),
            archive_retention_us: us(row[11]),
            durable_leases: row[12].get()?,
        },
    ))
}

/// Gives the queue its place in the dispatcher when it is first opened by one who may do anything with it: places are
/// few, and whoever will be refused must not use them up. A standby hears nothing of later changes: the settings are
/// given to the dispatcher after a promotion.
fn attach_for_caller(queue: &Queue) -> Result<()> {
    let is_placed = queue.at.get() != UNPLACED;
    if is_placed || xact::is_standby() || !list::may_use(queue.relation) && !user::may_insert(queue.relation) {
        return Ok(());
    }
    attach(queue)
}

/// Gives the queue its place in the dispatcher. The place comes first, then the settings are read under a fresh
/// snapshot: an alteration that commits in between changes the place's version, and they are read again.
fn attach(queue: &Queue) -> Result<()> {
    crate::wait_point!("attach");
    loop {
        let database = user::database();
        let (at, is_configured, version) = shmem::with_arena(|arena, now, fx| {
            let at = arena.queue_attach(database, queue.relation, now.wall_us)?;
            let (is_configured, version) = arena.queue_config_state(at)?;
            if !is_configured {
                arena.queue_look(at, fx); // the worker looks at what is new
            }
            Some((at, is_configured, version))
        })?
        .ok_or_else(|| Error::Full {
            what: "too many queues are in use",
            hint: "Raise pg_queue.max_queues and restart the server.".into(),
        })?;
        // Its place is remembered only when all is done: whoever is interrupted comes here again.
        if is_configured {
            super::lease::restore(queue, at)?;
            queue.at.set(at);
            return Ok(());
        }
        // What this transaction has changed may roll back, and is given to the dispatcher when it commits. Only a queue
        // that it has created nobody else can see.
        let committed = read_settings_under(Snapshot::latest_of_others(), queue.relation);
        let Some((_, settings)) = committed.or_else(|| read_settings(queue.relation)) else {
            return Err(Error::QueueUnknown { queue: queue.name.clone() });
        };
        shmem::with_arena(|arena, _, _| arena.queue_configure(at, version, settings.policy()))?;
    }
}

impl Queue {
    /// Its place in the dispatcher when it was last used.
    pub fn at(&self) -> QueueRef {
        self.at.get()
    }

    /// Releases a lock that [`open`] took.
    pub fn unlock(&self, mode: u32) {
        table::unlock(self.relation, mode);
    }

    /// Does `f` to the queue in the dispatcher, attaching it again if it has lost its place.
    pub fn with<R>(&self, mut f: impl FnMut(&mut Arena, QueueRef, Now, &mut Effects) -> R) -> Result<R> {
        loop {
            let at = self.at.get();
            let result =
                shmem::with_arena(|arena, now, fx| arena.is_current(at).then(|| f(arena, at, now, fx)))?;
            match result {
                Some(result) => return Ok(result),
                None => attach(self)?,
            }
        }
    }

    /// Refuses one who lacks rights on the table, or whom row-level security would show only some of it.
    pub fn check(&self, action: &'static str, rights: &[Right], needs: &str) -> Result<()> {
        if !user::has_rights(self.relation, rights) {
            return Err(Error::Denied { action, queue: self.name.clone(), needs: needs.to_owned() });
        }
        if [Right::Select, Right::Delete, Right::Truncate].iter().any(|right| rights.contains(right)) {
            self.check_row_security(action)?;
        }
        Ok(())
    }

    fn check_row_security(&self, action: &'static str) -> Result<()> {
        if user::is_row_filtered(self.relation) {
            return Err(Error::Unsupported {
                what: format!("cannot {action} queue \"{}\" under row-level security", self.name),
                hint: Some("Use a role that bypasses row-level security.".into()),
            });
        }
        Ok(())
    }

    /// Whether the caller's rights are such that an INSERT would come to the same as going past it.
    pub fn may_insert_directly(&self) -> bool {
        user::has_rights(self.relation, &[Right::Insert])
            && !user::is_row_filtered(self.relation)
            && !user::are_rights_hooked()
    }

    /// A kept plan, prepared when it is first asked for. Its text names the table, whose name cannot change
    /// while it is locked; when it changes, the cache forgets the plan.
    pub fn plan(&self, purpose: For, prepare: impl FnOnce() -> spi::Plan) -> spi::Plan {
        let known = self.plans.borrow()[purpose as usize];
        known.unwrap_or_else(|| {
            let plan = prepare();
            self.plans.borrow_mut()[purpose as usize] = Some(plan);
            plan
        })
    }

    /// The table's qualified, quoted name.
    pub fn table_name(&self) -> String {
        format!("queue.{}", spi::quoted(&self.name))
    }

    /// Refuses a call without a lease where the queue wants one.
    pub fn check_lease(&self, argument: &'static str, lease_id: Option<i64>) -> Result<()> {
        if lease_id.is_none() && self.settings.require_lease {
            return Err(Error::Null {
                argument,
                hint: Some(
                    "This queue was created with require_lease: give the lease_id that queue_read returned.",
                ),
            });
        }
        Ok(())
    }
}
