//! Reading: messages are leased in the dispatcher, their rows fetched, and nothing is written.
//!
//! The order: lock the table, take, **then** a snapshot, then fetch. A message is published after its commit is
//! visible, so a snapshot taken after the take sees it. The address in the slot is a hint: what lies there is
//! compared, and if it is not the message, the primary key is asked, under that same snapshot.
//!
//! How a reader sleeps is told in [`super::wait`].

use crate::error::{Error, Result};
use crate::pg::call::{Args, Rows, Value};
use crate::pg::table::{self, AccessShareLock, Deleted, Record, RowExclusiveLock, Snapshot, Table};
use crate::pg::user::Right;
use crate::pg::{clock, latch, shmem, user, xact};
use crate::queue::load::{self, Loaded};
use crate::queue::resolve::{self, Queue};
use crate::queue::{args, column, expires_us, journal, row_of, wait};
use crate::settings::{self, SECOND_US};
use queue_dispatch::{Fence, Lease, Now, Pin, Policy, QueueRef, Row, Settled, Taken, CHUNK_MAX, NEVER_US, NIL};
use std::rc::Rc;

/// One message on its way out.
pub struct Delivery<'a> {
    /// Its row.
    pub record: &'a Record,
    /// Its lease.
    pub lease_id: i64,
    /// Deliveries, this one included.
    pub count: u32,
    /// End of the lease, wall clock.
    pub expires_us: i64,
}

impl Delivery<'_> {
    fn values(&self) -> [Value; 10] {
        [
            self.record.value(column::MSG_ID),
            Value::of(self.lease_id),
            Value::of(i64::from(self.count)),
            self.record.value(column::ENQUEUED_AT),
            Value::of_time_us(self.expires_us),
            Value::of(i64::from(self.record.value(column::PRIORITY).get::<i16>().unwrap_or(0))),
            self.record.value(column::GROUP_KEY),
            self.record.value(column::LAST_ERROR),
            self.record.value(column::HEADERS),
            self.record.value(column::MESSAGE),
        ]
    }
}

/// What to do with each message that is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Lease,
    /// Deleted at once, in the same statement.
    Pop,
}

fn checked_lock(mode: Mode) -> u32 {
    if mode == Mode::Pop {
        RowExclusiveLock
    } else {
        AccessShareLock
    }
}

fn open(name: &str, mode: Mode) -> Result<Rc<Queue>> {
    let queue = resolve::open(name, checked_lock(mode))?;
    match mode {
        Mode::Lease => {
            queue.check("read", &[Right::Select, Right::Update], "SELECT and UPDATE on its table")?;
        }
        Mode::Pop => queue.check(
            "pop from",
            &[Right::Select, Right::Update, Right::Delete],
            "SELECT, UPDATE and DELETE on its table",
        )?,
    }
    Ok(queue)
}

/// Takes up to `quantity` messages that are ready; what was sent by this transaction itself comes last.
fn take_ready(
    queue: &Queue,
    quantity: usize,
    lease_us: i64,
    mode: Mode,
    give: &mut dyn FnMut(Delivery),
) -> Result<usize> {
    #[cfg(feature = "wait_points")]
    let mut lease_us = lease_us;
    crate::if_broken!(short_leases, { lease_us /= 10 });
    crate::if_broken!(use_freed_memory, { crate::pg::broken_rule::use_freed_memory() });
    let mut given = 0;
    let (pid, lxid) = (latch::my_pid(), latch::my_lxid());
    let is_durable = queue.settings.durable_leases;
    #[cfg(feature = "wait_points")]
    let mut is_durable = is_durable;
    crate::if_broken!(no_durable_wait, { is_durable = false });
    let flush_us = if is_durable { 0 } else { settings::lease_flush_us() };
    let mut leases = Vec::new();
    let mut leases_until_us = NEVER_US;
    // What is known of an emptied table was in it before.
    let is_emptied = journal::is_emptied_here(queue.relation);
    while given < quantity && !is_emptied {
        pgrx::check_for_interrupts!();
        let want = (quantity - given).min(CHUNK_MAX);
        let mut taken = vec![Taken::default(); want];
        journal::reserve(want)?;
        let database = user::database();
        let (count, at, now) = queue.with(|arena, at, now, fx| {
            // What nobody can write is not taken: it would come back as a delivery that failed.
            if is_durable && arena.worker_proc(database) == NIL {
                return (0, at, now);
            }
            let lease = Lease { until_us: now.mono_us.saturating_add(lease_us), pid, lxid, flush_us };
            (arena.take(at, lease, now, &mut taken, fx), at, now)
        })?;
        let taken = &taken[..count];
        for one in taken {
            journal::leased(at, one);
        }
        if taken.is_empty() {
            break;
        }
        crate::wait_point!("take-fetch");
        let expires_us = now.wall_us.saturating_add(lease_us);
        given += fetch(queue, at, taken, expires_us, mode, &mut |delivery: Delivery| {
            if is_durable {
                let msg_id = delivery.record.value(column::MSG_ID).get::<i64>();
                leases.extend(msg_id.map(|msg_id| (msg_id, delivery.lease_id)));
            }
            give(delivery);
        })?;
        if is_durable {
            leases_until_us = leases_until_us.min(now.mono_us.saturating_add(lease_us));
        }
        if count < want {
            break;
        }
    }
    if !leases.is_empty() {
        super::lease::await_written(queue, queue.at(), &leases, leases_until_us)?;
    }
    if given < quantity {
        given += take_own(queue, quantity - given, lease_us, mode, give)?;
    }
    Ok(given)
}

/// Whether a queue has something that cannot be taken, for want of a worker to write leases.
fn wants_worker(queue: &Queue) -> Result<bool> {
    let database = user::database();
    Ok(queue.settings.durable_leases
        && queue.with(|arena, at, now, _| {
            let has_some = arena.has_ready(at) || arena.next_event_us(at, now) <= now.mono_us;
            has_some && arena.worker_proc(database) == NIL
        })?)
}

fn fetch(
    queue: &Queue,
    at: QueueRef,
    taken: &[Taken],
    expires_us: i64,
    mode: Mode,
    give: &mut dyn FnMut(Delivery),
) -> Result<usize> {
    let snapshot = Snapshot::latest();
    let Some(table) = Table::open(queue.relation, None) else { return Ok(0) };
    let mut given = 0;
    for one in taken {
        // Somebody has named it before it was there, so that it has a slot: it is this transaction's own, and read as such.
        if one.tid.offset == 0 && journal::own_view(queue.relation, one.msg_id).is_some() {
            journal::not_leased(at, one);
            shmem::with_arena(|arena, _, fx| arena.drop_taken(at, *one, fx))?;
            continue;
        }
        let found = find(queue, &table, one.tid, one.msg_id, &snapshot);
        #[cfg(feature = "wait_points")]
        let found = found.or_else(|| table.fetch_if_broken(one.tid));
        let Some(record) = found else {
            forget(queue, at, one)?;
            continue;
        };
        if is_expired(&record) {
            put_off(at, one)?;
            continue;
        }
        let row = row_of(&record);
        let mut count = one.count;
        // Most rows say nothing but that the message is there.
        if row.visible_at_us.is_some() || row.count >= one.count {
            if is_changed_here(&record, row, one) {
                // What this transaction wrote is not true for others yet: the slot follows at commit, if there is one.
                withdraw(at, one, journal::Then::Refile(row))?;
                continue;
            }
            match settle(at, one, row)? {
                Some(settled) => count = settled,
                None => continue,
            }
        }
        if mode == Mode::Pop && !delete_leased(queue, at, one, &table, &record, &snapshot)? {
            continue;
        }
        give(Delivery { record: &record, lease_id: one.lease_id, count, expires_us });
        given += 1;
    }
    table.close(None, true);
    snapshot.done();
    Ok(given)
}

fn is_expired(record: &Record) -> bool {
    expires_us(record).is_some_and(|at_us| at_us <= clock::now().wall_us)
}

/// A message that was taken has expired: the worker is to see to it.
fn put_off(at: QueueRef, one: &Taken) -> Result<()> {
    journal::not_leased(at, one);
    shmem::with_arena(|arena, now, fx| {
        arena.put_off(at, *one, now.mono_us.saturating_add(SECOND_US), fx);
        arena.expires_at(at, i64::MIN, now, fx);
    })
}

/// A message that was taken has no row. If this transaction itself may have deleted it, and may roll back, it stays
/// pinned until the transaction's end. Of what was only named before it was there nobody has seen a row: it need not wait
/// for this transaction, and is looked for again should that roll back.
fn forget(queue: &Queue, at: QueueRef, one: &Taken) -> Result<()> {
    if xact::has_id() {
        if one.tid.offset != 0 {
            return withdraw(at, one, journal::Then::Finish);
        }
        journal::unslotted(queue.relation, one.msg_id)?;
    }
    journal::not_leased(at, one);
    shmem::with_arena(|arena, _, fx| arena.drop_taken(at, *one, fx))
}

/// What was taken is given to nobody, by what this transaction itself may have done to its row: it stays pinned until the
/// transaction's end, or until this transaction does something else to it. At commit follows `then`.
fn withdraw(at: QueueRef, one: &Taken, then: journal::Then) -> Result<()> {
    journal::reserve(1)?; // a trigger of the owner's may have used up what was
    let me = latch::my_proc();
    let is_pinned = shmem::with_arena(|arena, _, fx| arena.pin_withdrawn(at, *one, me, fx))?;
    if is_pinned {
        journal::not_leased(at, one);
        journal::withdrawn(at, one.msg_id, then);
    }
    Ok(()) // else its lease is over
}

/// Whether the row would withdraw the delivery, by what this transaction itself has written into it.
fn is_changed_here(record: &Record, row: Row, one: &Taken) -> bool {
    let withdraws = row.count >= one.count || row.due_us(clock::now()).is_some();
    withdraws && xact::has_id() && record.is_from_here()
}

fn pin_leased(at: QueueRef, one: &Taken) -> Result<bool> {
    journal::reserve(1)?; // a trigger of the owner's may have used up what was
    let me = latch::my_proc();
    let fence = Fence::Lease(one.lease_id);
    let pin = shmem::with_arena(|arena, now, fx| arena.pin(at, one.msg_id, fence, me, now, fx))?;
    let is_pinned = matches!(pin, Pin::Done(_));
    if is_pinned {
        journal::pinned(at, one.msg_id);
    }
    Ok(is_pinned)
}

/// A message's row: at its address, if that is still it, else by its id.
pub fn find(
    queue: &Queue,
    table: &Table,
    hint: queue_dispatch::Tid,
    msg_id: i64,
    snapshot: &Snapshot,
) -> Option<Record> {
    table
        .fetch(hint, snapshot)
        .filter(|record| record.value(column::MSG_ID).i64() == Some(msg_id))
        .or_else(|| table.lookup(queue.key, msg_id, snapshot))
}

/// Compares a delivery with its row; takes the lock again only where they differ in what matters.
fn settle(at: QueueRef, one: &Taken, row: Row) -> Result<Option<u32>> {
    let now = clock::now();
    if row.due_us(now).is_none() && row.count < one.count {
        return Ok(Some(one.count));
    }
    let settled = shmem::with_arena(|arena, now, fx| arena.settle(at, *one, row, now, fx))?;
    Ok(match settled {
        Settled::Deliver(count) => Some(count),
        Settled::Withdrawn => {
            journal::not_leased(at, one);
            None
        }
    })
}

fn delete_leased(
    queue: &Queue,
    at: QueueRef,
    one: &Taken,
    table: &Table,
    record: &Record,
    snapshot: &Snapshot,
) -> Result<bool> {
    if !pin_leased(at, one)? {
        return Ok(false);
    }
    let deleted = super::finish::delete_row(queue, table, record.tid(), one.msg_id, snapshot)?;
    if matches!(deleted, Deleted::Kept | Deleted::Moved) {
        super::finish::unpin(at, one.msg_id)?;
        journal::not_leased(at, one);
        // Nobody was given it, so it does not count; nor is it tried again at once.
        shmem::with_arena(|arena, now, fx| {
            arena.put_off(at, *one, now.mono_us.saturating_add(SECOND_US), fx);
        })?;
    }
    Ok(deleted == Deleted::Ok)
}

/// What holds for the transaction's own messages.
fn policy_for_own(queue: &Queue) -> Result<Policy> {
    let mut policy = queue.settings.policy();
    // While this transaction has a lock on the table, what it knows of the queue's settings may be older than a pause.
    policy.paused |= queue.with(|arena, at, _, _| arena.is_paused(at))?;
    Ok(policy)
}

/// When the next of the transaction's own messages of these queues can be read.
pub fn own_next_us(queues: &[Rc<Queue>], now: Now) -> Result<i64> {
    let mut next_us = NEVER_US;
    if journal::has_own() {
        for queue in queues {
            next_us = next_us.min(journal::own_next_us(queue.relation, policy_for_own(queue)?, now));
        }
    }
    Ok(next_us)
}

/// Leases up to `quantity` of the transaction's own messages: as many as there are slots for.
fn lease_own(queue: &Queue, quantity: usize, until_us: i64, now: Now) -> Result<Vec<journal::OwnTaken>> {
    let readable = journal::own_readable(queue.relation, quantity, policy_for_own(queue)?, now);
    let mut taken = Vec::with_capacity(readable.len());
    journal::reserve(readable.len())?;
    for chunk in readable.chunks(CHUNK_MAX) {
        // Their leases need fences like all others.
        let mut lease_ids = Vec::with_capacity(chunk.len());
        let (at, mut to_spare) = queue.with(|arena, at, _, fx| {
            lease_ids.clear();
            lease_ids.extend(chunk.iter().map(|_| arena.lease_id_next()));
            let without = || chunk.iter().filter(|one| one.held != Some(at));
            let held = arena.hold(at, without().count());
            // Where the queue had its place when they were read before.
            without().take(held).filter_map(|one| one.held).for_each(|before| arena.unhold(before, fx));
            (at, held)
        })?;
        for (one, lease_id) in chunk.iter().zip(lease_ids) {
            if one.held != Some(at) {
                if to_spare == 0 {
                    continue; // nobody could tell at commit that it is leased
                }
                to_spare -= 1;
            }
            taken.push(journal::own_taken(*one, at, lease_id, until_us));
        }
    }
    Ok(taken)
}

/// Takes from what this transaction itself has sent.
fn take_own(
    queue: &Queue,
    quantity: usize,
    lease_us: i64,
    mode: Mode,
    give: &mut dyn FnMut(Delivery),
) -> Result<usize> {
    if !journal::has_own() {
        return Ok(0);
    }
    let now = clock::now();
    let until_us = now.mono_us.saturating_add(lease_us);
    let taken = lease_own(queue, quantity, until_us, now)?;
    if taken.is_empty() {
        return Ok(0);
    }
    let snapshot = Snapshot::latest();
    let Some(table) = Table::open(queue.relation, None) else { return Ok(0) };
    let expires_us = now.wall_us.saturating_add(lease_us);
    let mut given = 0;
    for one in taken {
        let journal::OwnTaken { row, lease_id, .. } = one;
        pgrx::check_for_interrupts!();
        let Some(record) = find(queue, &table, row.tid, row.msg_id, &snapshot) else {
            // Plain SQL has deleted it. Should that be undone, this was no delivery.
            journal::own_not_taken(&one, 0);
            journal::own_set(queue.relation, row.msg_id, journal::OwnThen::Finish)?;
            continue;
        };
        if is_expired(&record) {
            journal::own_not_taken(&one, NEVER_US); // the worker has it once this is committed
            continue;
        }
        if let Some(due_us) = row_of(&record).due_us(now) {
            journal::own_not_taken(&one, due_us); // a trigger has changed it
            continue;
        }
        if mode == Mode::Pop {
            let deleted = super::finish::delete_row(queue, &table, record.tid(), row.msg_id, &snapshot)?;
            if deleted != Deleted::Ok {
                if matches!(deleted, Deleted::Kept | Deleted::Moved) {
                    journal::own_not_taken(&one, clock::now().mono_us.saturating_add(SECOND_US));
                }
                continue;
            }
            journal::own_set(queue.relation, row.msg_id, journal::OwnThen::Finish)?;
        }
        give(Delivery { record: &record, lease_id, count: row.count, expires_us });
        given += 1;
    }
    table.close(None, true);
    snapshot.done();
    Ok(given)
}

/// What a read asks for.
struct Request<'a> {
    queues: &'a [String],
    quantity: usize,
    lease_us: Option<i64>,
    wait_us: i64,
    mode: Mode,
    /// It has finished something, so it never waits: not even for a load.
    never_waits: bool,
}

/// Reads from the queues in their order; waits for the first message if it is to.
fn read(request: &Request, give: &mut dyn FnMut(&Queue, Delivery)) -> Result<()> {
    let start_us = clock::now().mono_us;
    let deadline_us = start_us.saturating_add(request.wait_us);
    let mut loads = Loads::new(request.queues.len());
    let (mut is_registered, mut has_waited) = (false, false);
    let mut given = 0;
    loop {
        // All that was taken is in the journal.
        pgrx::check_for_interrupts!();
        if is_registered && wait::would_block(request.queues, checked_lock(request.mode)) {
            wait::leave()?;
            is_registered = false;
        }
        // All of them first: a lock to wait for, or a refusal, would take the time of leases, or a delivery, from
        // messages that nobody gets.
        let mut opened: Vec<Rc<Queue>> = Vec::with_capacity(request.queues.len());
        for name in request.queues {
            opened.push(open(name, request.mode)?);
        }
        let mut lacks_worker = false;
        for queue in &opened {
            if given == request.quantity {
                break;
            }
            if wants_worker(queue)? {
                if given == 0 {
                    return Err(Error::NoWorker { queue: queue.name.clone() });
                }
                lacks_worker = true; // what was given is not kept from the caller for that
                continue;
            }
            let lease_us = request.lease_us.unwrap_or(queue.settings.visibility_timeout_us);
            let left = request.quantity - given;
            given += take_ready(queue, left, lease_us, request.mode, &mut |delivery| give(queue, delivery))?;
        }
        // Not enough is ready: what is under a mark, or due but not tracked, is brought in first. Only then is a
        // wake-up passed on that this call did not use: else the next one would load the same.
        let next = if given == request.quantity || lacks_worker {
            Next::Empty
        } else {
            bring_in(&opened, start_us, given > 0, &mut loads)?
        };
        if is_registered {
            wait::leave()?;
            is_registered = false;
        }
        if given > 0 && !matches!(next, Next::TakeAgain) {
            return if has_waited { wait::passed_on(&opened) } else { Ok(()) };
        }
        // From here on nothing needs the tables: a sleeper is in nobody's way. Where messages were given (or, by
        // queue_pop, deleted) the locks stay until the transaction ends, as after any statement.
        if given == 0 {
            for queue in &opened {
                queue.unlock(checked_lock(request.mode));
            }
        }
        let now = clock::now();
        let until_us = match next {
            Next::TakeAgain => continue,
            Next::Await if request.never_waits => return Ok(()),
            Next::Await => now.mono_us.saturating_add(AWAIT_US),
            Next::Empty => deadline_us,
        };
        let until_us = until_us.min(wait::strikes_us(start_us, now));
        if now.mono_us >= until_us {
            return wait::passed_on(&opened);
        }
        loads.begin_anew();
        (is_registered, has_waited) = (true, true);
        // (One of them may have expired, and stay unread.)
        let own_us = own_next_us(&opened, now)?.max(now.mono_us.saturating_add(AWAIT_US));
        wait::sleep(&opened, until_us.min(own_us))?;
    }
}

/// What there is to do for one who found nothing to take.
pub enum Next {
    /// There may be something now.
    TakeAgain,
    /// There is nothing.
    Empty,
    /// Somebody else loads.
    Await,
}

/// A call answers empty only after a load that was begun since, or after this long: it neither waits for another's load
/// nor makes one itself for longer. (In a build for tests longer: a machine that stands still for a second fails none.)
pub const LOAD_PATIENCE_US: i64 = if cfg!(feature = "wait_points") { 20 * SECOND_US } else { SECOND_US };

/// How soon one who waits for another's load looks again, microseconds: of an end that brings nothing he is not told.
pub const AWAIT_US: i64 = 10_000;

/// Most loads of one queue in one call between two sleeps: a load can end under a mark again, if messages without room
/// were published meanwhile.
const LOADS_MAX: u32 = 3;

/// The loads of one call, by queue.
pub struct Loads {
    made: Vec<u32>,
    /// One went on after its patience was over.
    is_over: bool,
}

impl Loads {
    /// None yet, of so many queues.
    pub fn new(queues: usize) -> Loads {
        Loads { made: vec![0; queues], is_over: false }
    }

    /// The call has slept.
    pub fn begin_anew(&mut self) {
        self.made.fill(0);
        self.is_over = false;
    }
}

/// Brings in what is under a mark, or due but not tracked. Where something was given already (`has_some`) it takes no
/// longer than a turn, and never until the statement is cancelled: what was given would be lost, and counted.
pub fn bring_in(queues: &[Rc<Queue>], start_us: i64, has_some: bool, loads: &mut Loads) -> Result<Next> {
    let mut next = Next::Empty;
    let begun = clock::now();
    let strikes_us = wait::strikes_us(start_us, begun);
    let is_patient = begun.mono_us.saturating_sub(start_us) < LOAD_PATIENCE_US;
    for (place, queue) in queues.iter().enumerate() {
        let (is_marked, is_paused, is_ready) =
            queue.with(|arena, at, _, _| (arena.load_needed(at), arena.is_paused(at), arena.has_ready(at)))?;
        if is_paused || journal::is_emptied_here(queue.relation) {
            continue;
        }
        if is_ready {
            return Ok(Next::TakeAgain); // loaded or published by others since we took
        }
        if table::is_stored_anew(queue.relation) {
            continue; // none of it is there for others yet, and so for a load: it would mark all as loaded
        }
        match load::scan(queue)? {
            Loaded::Done if has_ready(queue)? => return Ok(Next::TakeAgain),
            Loaded::Busy if is_patient => next = Next::Await,
            _ => {}
        }
        if !is_marked {
            continue;
        }
        let now_us = clock::now().mono_us;
        let patient_us = if has_some { now_us } else { start_us.saturating_add(LOAD_PATIENCE_US) };
        if loads.made[place] == LOADS_MAX || loads.is_over || now_us >= strikes_us {
            queue.with(|arena, at, _, fx| arena.load_ask(at, fx))?;
            continue;
        }
        loads.is_over = now_us >= patient_us;
        match load::walk(queue, patient_us.max(now_us.saturating_add(load::TURN_US)).min(strikes_us))? {
            Loaded::Unfinished => {
                loads.made[place] = LOADS_MAX; // the worker goes on with it
                return Ok(Next::TakeAgain);
            }
            Loaded::Done => {
                loads.made[place] += 1;
                return Ok(Next::TakeAgain);
            }
            Loaded::Busy if is_patient => next = Next::Await,
            Loaded::Nothing => return Ok(Next::TakeAgain), // others have loaded it since we looked
            Loaded::Busy | Loaded::Full => {}
        }
    }
    Ok(next)
}

/// Whether something may be taken at once.
pub fn has_ready(queue: &Queue) -> Result<bool> {
    if journal::is_emptied_here(queue.relation) {
        return Ok(false);
    }
    queue.with(|arena, at, now, fx| arena.look_ready(at, now, fx))
}

fn lease_us(args: &Args, position: usize) -> Result<Option<i64>> {
    args::duration(args.value(position), "visibility_timeout", settings::LEASE_US)
}

/// `queue_read`.
pub fn queue_read(args: &Args, rows: &mut Rows) -> Result<()> {
    let queue = args::text(args, 0, "queue")?;
    args::unbuilt(args.value(4).is_null(), "filter")?;
    args::unbuilt(args.value(5).is_null(), "consumer")?;
    let request = Request {
        queues: std::slice::from_ref(&queue),
        quantity: args::quantity(args, 1, 1)?,
        lease_us: lease_us(args, 2)?,
        wait_us: wait::wait_us(args, 3)?,
        mode: Mode::Lease,
        never_waits: false,
    };
    read(&request, &mut |_, delivery| rows.emit(delivery.values()))
}

/// `queue_read_any`.
pub fn queue_read_any(args: &Args, rows: &mut Rows) -> Result<()> {
    let queues = wait::queue_names(args, 0)?;
    args::unbuilt(args.value(4).is_null(), "consumer")?;
    let request = Request {
        queues: &queues,
        quantity: args::quantity(args, 1, 1)?,
        lease_us: lease_us(args, 2)?,
        wait_us: wait::wait_us(args, 3)?,
        mode: Mode::Lease,
        never_waits: false,
    };
    read(&request, &mut |queue, delivery| {
        let [a, b, c, d, e, f, g, h, i, j] = delivery.values();
        rows.emit([Value::of(queue.name.as_str()), a, b, c, d, e, f, g, h, i, j]);
    })
}

/// `queue_pop`: read and deleted in one, so at most once.
pub fn queue_pop(args: &Args, rows: &mut Rows) -> Result<()> {
    let queue = args::text(args, 0, "queue")?;
    let request = Request {
        queues: std::slice::from_ref(&queue),
        quantity: args::quantity(args, 1, 1)?,
        lease_us: None,
        wait_us: 0,
        mode: Mode::Pop,
        never_waits: false,
    };
    read(&request, &mut |_, delivery| rows.emit(delivery.values()))
}

/// `queue_delete_and_read`: a consumer's loop in one statement and one commit. What it finishes comes first, so
/// that it cannot be given what it is about to finish.
pub fn queue_delete_and_read(args: &Args, rows: &mut Rows) -> Result<()> {
    let name = args::text(args, 0, "queue")?;
    let quantity = args::quantity(args, 3, 1)?;
    let lease_us = lease_us(args, 4)?;
    args::unbuilt(args.value(6).is_null(), "consumer")?;
    let strict = args::flag(args, 5, false);
    let ids = args::ids(args, 1, 2)?;
    let mut has_finished = false;
    super::finish::finish(&name, ("lease_ids", &ids), strict, super::finish::Keep::No, &mut |_| {
        has_finished = true
    })?;
    let request = Request {
        queues: std::slice::from_ref(&name),
        quantity,
        lease_us,
        wait_us: 0,
        mode: Mode::Lease,
        never_waits: has_finished,
    };
    read(&request, &mut |_, delivery| rows.emit(delivery.values()))
}
