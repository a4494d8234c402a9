//! The dispatcher against a naive model of everything around it: tables with committed rows, snapshots, sessions
//! with open transactions, callbacks that run late, loads that are interleaved with all of it. Random sequences
//! over tiny arenas, so that overflow, eviction and hunger happen all the time; after each step every committed
//! message must be within reach, and at the end every one must be delivered and finished.

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use common::Memory;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use queue_dispatch::{
    Bounds, Change, Config, Effects, Fence, Lease, LoadRow, LoadStart, Now, Pin, Policy, QueueRef, Row,
    ScanStart, Settled, State, Taken, Tid, HORIZON_US, NEVER_US, NIL, NO_MARK,
};

const QUEUES: usize = 3;
const BACKENDS: usize = 4;
const WAITERS: usize = 4;
/// The worker's backend number, and the database.
const WORKER: u32 = 9;
const DATABASE: u32 = 1;
const SECOND_US: i64 = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq)]
struct HeapRow {
    visible_at_us: Option<i64>,
    count: u32,
    /// Which version of the row: stands for its address.
    version: u32,
}

type Table = BTreeMap<i64, HeapRow>;

fn row_of(msg_id: i64, row: &HeapRow) -> Row {
    let tid = Tid { block: row.version, offset: 1 };
    Row { msg_id, tid, visible_at_us: row.visible_at_us, count: row.count }
}

/// What an open transaction has done, oldest first.
#[derive(Clone, Debug)]
enum Entry {
    Lease {
        q: usize,
        at: QueueRef,
        msg_id: i64,
        lease_id: i64,
        was_returned: bool,
    },
    Finish {
        q: usize,
        at: QueueRef,
        msg_id: i64,
    },
    Retry {
        q: usize,
        at: QueueRef,
        msg_id: i64,
        delay_us: i64,
        row: Option<Row>,
    },
    Release {
        q: usize,
        at: QueueRef,
        msg_id: i64,
    },
    /// A finish without a slot.
    Blind {
        q: usize,
        msg_id: i64,
    },
}

#[derive(Default)]
struct Session {
    journal: Vec<Entry>,
    /// Committed and visible; the callback has not run.
    is_committed: bool,
    /// Taken under a snapshot, not settled yet.
    unsettled: Vec<(usize, QueueRef, Taken, Option<HeapRow>)>,
    load: Option<Load>,
}

struct Load {
    q: usize,
    at: QueueRef,
    /// Rows still to be looked at, in the walk's order.
    rows: Vec<(i64, HeapRow)>,
    scan: Option<(i64, i64)>,
    /// What the snapshot says of the first message beyond a scan.
    beyond_us: i64,
}

#[derive(Clone, PartialEq)]
enum Sleeper {
    Away,
    Asleep(Vec<usize>),
    Woken(Vec<usize>),
}

struct World {
    memory: Memory,
    config: Config,
    now: Now,
    refs: Vec<QueueRef>,
    relation: u32,
    policy: Vec<Policy>,
    tables: Vec<Table>,
    next_id: Vec<i64>,
    version: u32,
    /// Sent in transactions that are open: queue, id, visible_at.
    unsent: Vec<(usize, i64, Option<i64>)>,
    /// Committed, to be published.
    late: Vec<(usize, Row, Change)>,
    sessions: Vec<Session>,
    sleepers: Vec<Sleeper>,
    /// Rows that an open transaction has deleted or updated.
    locked: HashSet<(usize, i64)>,
    /// Running deliveries: lease, end.
    held: HashMap<(usize, i64), (i64, i64)>,
    lease_ids: HashSet<i64>,
    stale: Vec<QueueRef>,
    sent: usize,
    finished: BTreeSet<(usize, i64)>,
}

impl World {
    fn new(slots: usize, slots_min: u32, window: u32, seed: u64) -> World {
        let config = Config { slots_min, window };
        let memory = Memory::new(QUEUES + 1, slots, WAITERS, config, seed);
        let mut world = World {
            memory,
            config,
            now: Now { mono_us: 50 * SECOND_US, wall_us: 800_000_000 * SECOND_US },
            refs: Vec::new(),
            relation: 100,
            policy: vec![Policy { max_deliveries: 0, ..Policy::DEFAULT }; QUEUES],
            tables: vec![Table::new(); QUEUES],
            next_id: vec![1; QUEUES],
            version: 0,
            unsent: Vec::new(),
            late: Vec::new(),
            sessions: (0..BACKENDS).map(|_| Session::default()).collect(),
            sleepers: vec![Sleeper::Away; WAITERS],
            locked: HashSet::new(),
            held: HashMap::new(),
            lease_ids: HashSet::new(),
            stale: Vec::new(),
            sent: 0,
            finished: BTreeSet::new(),
        };
        assert!(world.memory.arena().worker_set(DATABASE, WORKER));
        for q in 0..QUEUES {
            world.attach(q);
        }
        world
    }

    fn attach(&mut self, q: usize) {
        self.relation += 1;
        let mut arena = self.memory.arena();
        let queue = arena.queue_attach(DATABASE, self.relation, self.now.wall_us).expect("a record is free");
        let (_, version) = arena.queue_config_state(queue).expect("current");
        assert!(arena.queue_configure(queue, version, self.policy[q]));
        assert_eq!(arena.restore_begin(queue, 0), queue_dispatch::Restore::Begun);
        arena.restore_end(queue, 0, &mut queue_dispatch::Effects::new());
        if self.refs.len() > q {
            self.refs[q] = queue;
        } else {
            self.refs.push(queue);
        }
    }

    /// Sets the latches.
    fn wake(&mut self, fx: &Effects) {
        assert!(!fx.is_everyone());
        for proc in fx.procs().iter().filter(|proc| **proc != WORKER) {
            match self.sleepers[*proc as usize].clone() {
                Sleeper::Asleep(queues) => self.sleepers[*proc as usize] = Sleeper::Woken(queues),
                _ => panic!("woke one who is not asleep"),
            }
        }
    }

    fn publish(&mut self, q: usize, row: Row, change: Change) {
        let mut fx = Effects::new();
        self.memory.arena().publish(self.refs[q], row, change, self.now, &mut fx);
        self.wake(&fx);
    }

    fn commit_send(&mut self, q: usize, msg_id: i64, visible_at_us: Option<i64>, is_late: bool) {
        self.version += 1;
        let row = HeapRow { visible_at_us, count: 0, version: self.version };
        self.tables[q].insert(msg_id, row);
        self.sent += 1;
        self.change_published(q, row_of(msg_id, &row), Change::Insert, is_late);
    }

    fn change_published(&mut self, q: usize, row: Row, change: Change, is_late: bool) {
        if is_late {
            self.late.push((q, row, change));
        } else {
            self.publish(q, row, change);
        }
    }

    fn update(&mut self, q: usize, msg_id: i64, visible_at_us: Option<i64>, is_late: bool) {
        self.version += 1;
        let row = self.tables[q].get_mut(&msg_id).expect("picked from the table");
        *row = HeapRow { visible_at_us, version: self.version, ..*row };
        let row = row_of(msg_id, row);
        self.change_published(q, row, Change::Update, is_late);
    }

    fn is_held(&self, q: usize, msg_id: i64) -> bool {
        self.held.get(&(q, msg_id)).is_some_and(|(_, until_us)| *until_us > self.now.mono_us)
    }

    fn is_pinned(&self, q: usize, msg_id: i64) -> bool {
        self.sessions.iter().flat_map(|s| &s.journal).any(|entry| match entry {
            Entry::Finish { q: of, msg_id: id, at }
            | Entry::Retry { q: of, msg_id: id, at, .. }
            | Entry::Release { q: of, msg_id: id, at } => *of == q && *id == msg_id && *at == self.refs[q],
            _ => false,
        })
    }

    fn take(&mut self, q: usize, most: usize, lease_us: i64) -> Vec<Taken> {
        let lease = Lease { until_us: self.now.mono_us + lease_us, pid: 7, lxid: 1, flush_us: NEVER_US };
        let mut out = vec![Taken::default(); most];
        let mut fx = Effects::new();
        let taken = self.memory.arena().take(self.refs[q], lease, self.now, &mut out, &mut fx);
        self.wake(&fx);
        out.truncate(taken);
        for one in &out {
            assert!(self.lease_ids.insert(one.lease_id), "lease id repeats");
            assert!(!self.is_held(q, one.msg_id), "two leases of one message");
            assert!(!self.is_pinned(q, one.msg_id), "took what is pinned");
            self.held.insert((q, one.msg_id), (one.lease_id, lease.until_us));
        }
        out
    }

    /// Compares a delivery with what its reader's snapshot showed. True if it goes out.
    fn settle(&mut self, q: usize, at: QueueRef, taken: Taken, row: Option<HeapRow>) -> bool {
        let mut fx = Effects::new();
        let mut goes_out = false;
        match row {
            None => self.memory.arena().drop_taken(at, taken, &mut fx),
            Some(row) => {
                let row = row_of(taken.msg_id, &row);
                let settled = self.memory.arena().settle(at, taken, row, self.now, &mut fx);
                if let Settled::Deliver(count) = settled {
                    goes_out = true;
                    assert!(row.due_us(self.now).is_none(), "delivered before it is due");
                    assert!(count > row.count, "delivery not counted");
                    let held = self.held.get(&(q, taken.msg_id)).map(|held| held.0);
                    assert_eq!(held, Some(taken.lease_id), "delivered under another's lease");
                }
            }
        }
        self.wake(&fx);
        if !goes_out {
            self.unhold(q, taken.msg_id, taken.lease_id);
        }
        goes_out
    }

    fn unhold(&mut self, q: usize, msg_id: i64, lease_id: i64) {
        if self.held.get(&(q, msg_id)).is_some_and(|held| held.0 == lease_id) {
            self.held.remove(&(q, msg_id));
        }
    }

    fn settle_next(&mut self, b: usize) {
        if self.sessions[b].unsettled.is_empty() || self.sessions[b].is_committed {
            return;
        }
        let (q, at, taken, row) = self.sessions[b].unsettled.remove(0);
        if self.settle(q, at, taken, row) {
            let Taken { msg_id, lease_id, was_returned, .. } = taken;
            self.sessions[b].journal.push(Entry::Lease { q, at, msg_id, lease_id, was_returned });
        }
    }

    fn end(&mut self, b: usize, q: usize, pick: u8, how: u8, fence: Fence) {
        let Some(msg_id) = self.pick(q, pick) else { return };
        if self.sessions[b].is_committed {
            return;
        }
        let at = self.refs[q];
        let mut fx = Effects::new();
        let owner = b as u32;
        let pin = self.memory.arena().pin(at, msg_id, fence, owner, self.now, &mut fx);
        self.wake(&fx);
        let is_there = self.tables[q].contains_key(&msg_id);
        match pin {
            Pin::Done(pinned) => {
                if let Fence::Lease(claimed) = fence {
                    assert_eq!(pinned.lease_id, claimed);
                    assert!(self.is_held(q, msg_id), "pinned under a lease that is over");
                }
                if matches!(fence, Fence::NotLeased) {
                    assert!(!self.is_held(q, msg_id));
                }
                let mut fx = Effects::new();
                if self.locked.contains(&(q, msg_id)) {
                    // It would wait for the other transaction's lock; here it gives up.
                    self.memory.arena().pin_undo(at, msg_id, owner, self.now, &mut fx);
                    self.wake(&fx);
                    return;
                }
                if !is_there {
                    self.memory.arena().pin_drop(at, msg_id, owner, &mut fx);
                    self.held.remove(&(q, msg_id));
                    self.wake(&fx);
                    return;
                }
                self.locked.insert((q, msg_id));
                let delay_us = i64::from(how / 4) * SECOND_US;
                self.sessions[b].journal.push(match how % 4 {
                    0 | 1 => Entry::Finish { q, at, msg_id },
                    2 => Entry::Retry { q, at, msg_id, delay_us, row: None },
                    _ => Entry::Release { q, at, msg_id },
                });
            }
            Pin::NoSlot if is_there && !self.locked.contains(&(q, msg_id)) => {
                self.locked.insert((q, msg_id));
                self.sessions[b].journal.push(Entry::Blind { q, msg_id });
            }
            _ => {}
        }
    }

    /// Makes the transaction visible; its callback comes later.
    fn commit_visible(&mut self, b: usize) {
        if self.sessions[b].is_committed || !self.sessions[b].unsettled.is_empty() {
            return;
        }
        self.sessions[b].is_committed = true;
        let mut journal = std::mem::take(&mut self.sessions[b].journal);
        for entry in &mut journal {
            match entry {
                Entry::Finish { q, msg_id, .. } | Entry::Blind { q, msg_id } => {
                    self.tables[*q].remove(msg_id);
                    self.finished.insert((*q, *msg_id));
                    self.locked.remove(&(*q, *msg_id));
                }
                Entry::Retry { q, msg_id, delay_us, row, .. } => {
                    self.version += 1;
                    let version = self.version;
                    if let Some(heap) = self.tables[*q].get_mut(msg_id) {
                        heap.visible_at_us = Some(self.now.wall_us + *delay_us);
                        heap.count += 1;
                        heap.version = version;
                        *row = Some(row_of(*msg_id, heap));
                    }
                    self.locked.remove(&(*q, *msg_id));
                }
                Entry::Release { q, msg_id, .. } => {
                    self.locked.remove(&(*q, *msg_id));
                }
                Entry::Lease { .. } => {}
            }
        }
        self.sessions[b].journal = journal;
    }

    fn commit_callback(&mut self, b: usize) {
        if !self.sessions[b].is_committed {
            return;
        }
        self.sessions[b].is_committed = false;
        let owner = b as u32;
        let mut fx = Effects::new();
        for entry in std::mem::take(&mut self.sessions[b].journal) {
            let mut arena = self.memory.arena();
            match entry {
                Entry::Lease { was_returned: false, .. } => {}
                Entry::Lease { at, msg_id, lease_id, .. } => arena.lease_commit(at, msg_id, lease_id),
                Entry::Finish { q, at, msg_id } => {
                    if arena.is_current(at) {
                        self.held.remove(&(q, msg_id));
                    }
                    arena.pin_finish(at, msg_id, owner, &mut fx);
                }
                Entry::Retry { q, at, msg_id, row, .. } => {
                    let row = row.expect("set when it became visible");
                    if arena.is_current(at) {
                        arena.pin_refile(at, row, owner, self.now, &mut fx);
                        self.held.remove(&(q, msg_id));
                    } else {
                        arena.publish(self.refs[q], row, Change::Update, self.now, &mut fx);
                    }
                }
                Entry::Release { q, at, msg_id } => {
                    if arena.is_current(at) {
                        self.held.remove(&(q, msg_id));
                    }
                    arena.pin_release(at, msg_id, owner, &mut fx);
                }
                Entry::Blind { .. } => {}
            }
        }
        self.wake(&fx);
    }

    fn abort(&mut self, b: usize) {
        if self.sessions[b].is_committed {
            return self.commit_callback(b);
        }
        let owner = b as u32;
        let mut fx = Effects::new();
        for (q, at, taken, _) in std::mem::take(&mut self.sessions[b].unsettled) {
            self.memory.arena().lease_return(at, taken.msg_id, taken.lease_id, self.now, &mut fx);
            self.unhold(q, taken.msg_id, taken.lease_id);
        }
        for entry in std::mem::take(&mut self.sessions[b].journal).into_iter().rev() {
            let mut arena = self.memory.arena();
            match entry {
                Entry::Lease { q, at, msg_id, lease_id, .. } => {
                    arena.lease_return(at, msg_id, lease_id, self.now, &mut fx);
                    self.unhold(q, msg_id, lease_id);
                }
                Entry::Finish { q, at, msg_id }
                | Entry::Retry { q, at, msg_id, .. }
                | Entry::Release { q, at, msg_id } => {
                    arena.pin_undo(at, msg_id, owner, self.now, &mut fx);
                    self.locked.remove(&(q, msg_id));
                }
                Entry::Blind { q, msg_id } => {
                    arena.queue_mark(self.refs[q], msg_id, &mut fx);
                    self.locked.remove(&(q, msg_id));
                }
            }
        }
        self.wake(&fx);
    }

    fn extend(&mut self, q: usize, pick: u8, seconds: i64, does_shorten: bool) {
        let Some(msg_id) = self.pick(q, pick) else { return };
        let until_us = self.now.mono_us + seconds * SECOND_US;
        let held = self.held.get(&(q, msg_id)).copied();
        let Some((lease_id, end_us)) = held else { return };
        let mut fx = Effects::new();
        if does_shorten {
            self.memory.arena().shorten(self.refs[q], msg_id, lease_id, until_us, &mut fx);
            let is_leased = self
                .memory
                .arena()
                .view(self.refs[q], msg_id)
                .is_some_and(|view| view.state == State::Leased && view.lease_id == lease_id);
            if is_leased {
                self.held.insert((q, msg_id), (lease_id, end_us.min(until_us)));
            }
        } else {
            let fence = Fence::Lease(lease_id);
            let mut arena = self.memory.arena();
            let extended = arena.extend(self.refs[q], msg_id, fence, until_us, self.now, &mut fx);
            if let Some((end_us, of)) = extended {
                assert_eq!(of, lease_id);
                self.held.insert((q, msg_id), (lease_id, end_us));
            }
        }
        self.wake(&fx);
    }

    fn load_begin(&mut self, b: usize, q: usize) {
        if self.sessions[b].load.is_some() {
            return;
        }
        let at = self.refs[q];
        let LoadStart::From(mark) = self.memory.arena().load_begin(at, b as u32) else { return };
        let rows = self.tables[q].range(mark..).map(|(id, row)| (*id, *row)).collect();
        self.sessions[b].load = Some(Load { q, at, rows, scan: None, beyond_us: NEVER_US });
    }

    fn scan_begin(&mut self, b: usize, q: usize) {
        if self.sessions[b].load.is_some() {
            return;
        }
        let at = self.refs[q];
        let start = self.memory.arena().scan_begin(at, b as u32, self.now);
        let ScanStart::Range { after_us, until_us } = start else { return };
        let mut rows: Vec<(i64, HeapRow)> = self.tables[q]
            .iter()
            .filter(|(_, row)| row.visible_at_us.is_some_and(|at| at > after_us && at <= until_us))
            .map(|(id, row)| (*id, *row))
            .collect();
        rows.sort_by_key(|(id, row)| (row.visible_at_us, *id));
        let later = self.tables[q].values().filter_map(|row| row.visible_at_us);
        let beyond_us = later.filter(|at| *at > until_us).min().unwrap_or(NEVER_US);
        self.sessions[b].load = Some(Load { q, at, rows, scan: Some((after_us, until_us)), beyond_us });
    }

    fn load_step(&mut self, b: usize, most: usize) {
        let Some(mut load) = self.sessions[b].load.take() else { return };
        let mut fx = Effects::new();
        let mut arena = self.memory.arena();
        let mut full = None;
        let step = load.rows.len().min(most);
        for (done, (id, row)) in load.rows[..step].iter().enumerate() {
            if arena.load_row(load.at, row_of(*id, row), self.now, &mut fx) == LoadRow::Full {
                full = Some((done, *id, row.visible_at_us));
                break;
            }
        }
        match full {
            None if step < load.rows.len() => {
                load.rows.drain(..step);
                self.sessions[b].load = Some(load);
            }
            stopped => {
                let owner = b as u32;
                match (load.scan, stopped) {
                    (None, _) => {
                        let stopped_at = stopped.map_or(NO_MARK, |(_, id, _)| id);
                        arena.load_end(load.at, owner, stopped_at, &mut fx);
                    }
                    (Some((_, until_us)), None) => {
                        arena.scan_end(load.at, owner, until_us, load.beyond_us, self.now, &mut fx);
                    }
                    (Some(_), Some((_, _, visible_at_us))) => {
                        let at_us = visible_at_us.expect("scanned by it");
                        arena.scan_end(load.at, owner, at_us - 1, at_us, self.now, &mut fx);
                    }
                }
            }
        }
        self.wake(&fx);
    }

    fn load_abort(&mut self, b: usize) {
        let Some(load) = self.sessions[b].load.take() else { return };
        let mut fx = Effects::new();
        self.memory.arena().load_abort(load.at, b as u32, self.now, &mut fx);
        self.wake(&fx);
    }

    /// The worker's round. `b` is a session whose load it borrows.
    fn tick(&mut self, b: usize) {
        self.memory.arena().worker_round(DATABASE);
        let mut from = 0;
        let mut next_us = NEVER_US;
        while from != NIL {
            let mut fx = Effects::new();
            let (tick, next) = self.memory.arena().tick(DATABASE, from, self.now, &mut fx);
            self.wake(&fx);
            from = next;
            let Some(tick) = tick else { continue };
            next_us = next_us.min(tick.next_us);
            let q = self.refs.iter().position(|at| *at == tick.queue).expect("a queue of ours");
            if tick.load && self.sessions[b].load.is_none() {
                self.load_begin(b, q);
                self.load_step(b, usize::MAX);
            }
            if tick.scan && self.sessions[b].load.is_none() {
                self.scan_begin(b, q);
                self.load_step(b, usize::MAX);
            }
            if tick.exhausted > 0 {
                self.move_exhausted(q);
            }
        }
        let mut arena = self.memory.arena();
        assert!(arena.worker_sleep(DATABASE, next_us) <= next_us);
    }

    /// A turn through a queue's exhausted messages: each is tried once, and what is left is another's concern.
    fn move_exhausted(&mut self, q: usize) {
        let at = self.refs[q];
        let (mut from, mut left) = (Some(i64::MIN), 0);
        while let Some(id) = from {
            let mut out = [Taken::default(); 3];
            let mut fx = Effects::new();
            let (pinned, next) = self.memory.arena().exhausted_pin(at, id, WORKER, &mut out, &mut fx);
            assert!(next.is_none_or(|next| next > id), "the turn goes on");
            for one in &out[..pinned] {
                assert!(one.msg_id >= id && next.is_none_or(|next| one.msg_id < next), "each is tried once");
                left += usize::from(!self.move_one(q, at, *one, &mut fx));
            }
            self.wake(&fx);
            from = next;
        }
        let lengths = self.memory.arena().lengths(at).unwrap_or_default();
        assert_eq!(lengths[3] as usize, left, "those that can be moved are, whatever is before them");
    }

    /// Moves a message that the worker has pinned, unless its row is another's concern; whether it did.
    fn move_one(&mut self, q: usize, at: QueueRef, one: Taken, fx: &mut Effects) -> bool {
        assert!(!self.is_held(q, one.msg_id), "moved away under a lease");
        assert!(!self.is_pinned(q, one.msg_id), "moved away under a pin");
        let mut arena = self.memory.arena();
        if self.locked.contains(&(q, one.msg_id)) {
            arena.pin_undo(at, one.msg_id, WORKER, self.now, fx);
            return false;
        }
        if self.tables[q].contains_key(&one.msg_id) && one.count >= self.policy[q].max_deliveries {
            self.tables[q].remove(&one.msg_id);
            self.finished.insert((q, one.msg_id));
            arena.pin_finish(at, one.msg_id, WORKER, fx);
        } else {
            arena.pin_drop(at, one.msg_id, WORKER, fx);
        }
        true
    }

    /// Reads one and finishes it in one go; `b` lends its load. True if there was one.
    fn consume(&mut self, b: usize, q: usize) -> bool {
        for _ in 0..6 {
            for one in self.take(q, 1, 30 * SECOND_US) {
                let at = self.refs[q];
                let row = self.tables[q].get(&one.msg_id).copied();
                if !self.settle(q, at, one, row) {
                    continue;
                }
                if self.locked.contains(&(q, one.msg_id)) {
                    // Another transaction has the row: the read is rolled back.
                    let mut fx = Effects::new();
                    self.memory.arena().lease_return(at, one.msg_id, one.lease_id, self.now, &mut fx);
                    self.unhold(q, one.msg_id, one.lease_id);
                    self.wake(&fx);
                    continue;
                }
                let mut fx = Effects::new();
                let fence = Fence::Lease(one.lease_id);
                let pin = self.memory.arena().pin(at, one.msg_id, fence, 30, self.now, &mut fx);
                assert!(matches!(pin, Pin::Done(_)));
                self.tables[q].remove(&one.msg_id);
                self.finished.insert((q, one.msg_id));
                self.held.remove(&(q, one.msg_id));
                self.memory.arena().pin_finish(at, one.msg_id, 30, &mut fx);
                self.wake(&fx);
                return true;
            }
            if self.memory.arena().has_ready(self.refs[q]) {
                continue;
            }
            if self.sessions[b].load.is_some() {
                break;
            }
            if self.memory.arena().scan_needed(self.refs[q], self.now) {
                self.scan_begin(b, q);
                self.load_step(b, usize::MAX);
            }
            if self.memory.arena().load_needed(self.refs[q]) {
                self.load_begin(b, q);
                self.load_step(b, usize::MAX);
            }
        }
        // Whoever cannot load, or has loaded often enough, asks the worker before it sleeps.
        if self.memory.arena().load_needed(self.refs[q]) {
            let mut fx = Effects::new();
            self.memory.arena().load_ask(self.refs[q], &mut fx);
            self.wake(&fx);
        }
        false
    }

    /// Sleeps on these queues, after one more attempt, as a reader does.
    fn sleep(&mut self, w: usize, queues: Vec<usize>, b: usize) {
        let refs: Vec<QueueRef> = queues.iter().map(|q| self.refs[*q]).collect();
        let mut fx = Effects::new();
        self.memory.arena().wait_begin(w as u32, &refs, &mut fx);
        self.wake(&fx);
        self.sleepers[w] = Sleeper::Asleep(queues.clone());
        let found = queues.iter().any(|q| self.consume(b, *q));
        let is_woken = self.memory.arena().wait_is_over(w as u32);
        assert_eq!(is_woken, matches!(self.sleepers[w], Sleeper::Woken(_)));
        if found {
            self.leave(w);
        }
    }

    fn leave(&mut self, w: usize) {
        self.sleepers[w] = Sleeper::Away;
        let mut fx = Effects::new();
        self.memory.arena().wait_end(w as u32, &mut fx);
        self.wake(&fx);
    }

    /// What a sleeper does: one that was woken tries, then leaves or sleeps again; one that was not is cancelled.
    fn stir(&mut self, w: usize, b: usize, does_try: bool) {
        match self.sleepers[w].clone() {
            Sleeper::Woken(queues) if does_try => {
                if queues.iter().any(|q| self.consume(b, *q)) {
                    self.leave(w);
                } else {
                    self.sleep(w, queues, b);
                }
            }
            Sleeper::Away => {}
            _ => self.leave(w),
        }
    }

    /// Ends everything open that concerns a queue: TRUNCATE's and DROP's lock waits for it.
    fn quiesce(&mut self, q: usize) {
        for b in 0..BACKENDS {
            let is_in = self.sessions[b].load.as_ref().is_some_and(|load| load.q == q);
            if is_in {
                self.load_abort(b);
            }
            self.abort(b);
        }
        for (q, row, change) in std::mem::take(&mut self.late) {
            self.publish(q, row, change);
        }
        self.unsent.retain(|(of, ..)| *of != q);
        self.held.retain(|(of, _), _| *of != q);
    }

    fn truncate(&mut self, q: usize) {
        self.quiesce(q);
        self.tables[q].clear();
        for _ in 0..100 {
            let mut fx = Effects::new();
            let is_done = self.memory.arena().queue_clear(self.refs[q], 3, &mut fx);
            self.wake(&fx);
            if is_done {
                return;
            }
        }
        panic!("clear does not end");
    }

    fn drop_queue(&mut self, q: usize) {
        self.quiesce(q);
        self.tables[q].clear();
        self.stale.push(self.refs[q]);
        let relation = self.relation_of(q);
        for _ in 0..100 {
            let mut fx = Effects::new();
            let is_done = self.memory.arena().queue_detach(DATABASE, relation, 3, &mut fx);
            self.wake(&fx);
            assert!(!self.memory.arena().is_current(self.refs[q]));
            if is_done {
                self.attach(q);
                return;
            }
        }
        panic!("detach does not end");
    }

    fn relation_of(&mut self, q: usize) -> u32 {
        let at = self.refs[q];
        let arena = self.memory.arena();
        (101..=self.relation)
            .find(|relation| arena.queue_find(DATABASE, *relation) == Some(at))
            .expect("attached")
    }

    /// Finds the structure dirty: everything is forgotten.
    fn reset(&mut self, seed: u64) {
        // Random in the server: a seed that comes twice would bring its lease ids again.
        let seed = seed | (self.lease_ids.len() as u64 + 1) << 8;
        let mut fx = Effects::new();
        self.memory.arena().reset(self.config, seed, &mut fx);
        for (w, sleeper) in self.sleepers.iter_mut().enumerate() {
            let is_woken = fx.procs().contains(&(w as u32));
            assert!(is_woken || !matches!(sleeper, Sleeper::Asleep(_)), "slept through a reset");
            *sleeper = Sleeper::Away;
        }
        self.held.clear();
        self.stale.extend(self.refs.iter().copied());
        for q in 0..QUEUES {
            self.attach(q);
        }
    }

    /// Calls with references to queues that are gone: none may do anything.
    fn use_stale(&mut self, pick: u8) {
        let Some(at) = self.stale.get(pick as usize % self.stale.len().max(1)).copied() else { return };
        let before: Vec<_> = self.refs.iter().map(|at| self.memory.arena().lengths(*at)).collect();
        let free = self.memory.arena().slots_free();
        let mut fx = Effects::new();
        let mut arena = self.memory.arena();
        let row = Row { msg_id: i64::from(pick % 8), tid: Tid::default(), visible_at_us: None, count: 0 };
        arena.publish(at, row, Change::Insert, self.now, &mut fx);
        arena.load_end(at, 0, NO_MARK, &mut fx);
        arena.pin_undo(at, row.msg_id, 0, self.now, &mut fx);
        arena.pin_finish(at, row.msg_id, 0, &mut fx);
        assert_eq!(arena.pin(at, row.msg_id, Fence::Any, 0, self.now, &mut fx), Pin::NoSlot);
        arena.queue_mark_all(at, &mut fx);
        assert!(fx.procs().is_empty());
        let after: Vec<_> = self.refs.iter().map(|at| self.memory.arena().lengths(*at)).collect();
        assert_eq!(before, after);
        assert_eq!(free, self.memory.arena().slots_free());
    }

    fn pick(&self, q: usize, pick: u8) -> Option<i64> {
        if pick > 250 {
            return Some(i64::from(pick)); // an id that most often is not there
        }
        let len = self.tables[q].len();
        (len > 0).then(|| *self.tables[q].keys().nth(pick as usize % len).expect("within"))
    }

    fn visible_at(&self, c: u8) -> Option<i64> {
        let delay_us = match c % 8 {
            0..=3 => return None,
            4 => 2 * SECOND_US,
            5 => 10 * SECOND_US,
            6 => HORIZON_US / 2,
            _ => HORIZON_US * 3,
        };
        Some(self.now.wall_us + delay_us)
    }

    fn step(&mut self, (kind, a, b, c): (u8, u8, u8, u8)) {
        let q = a as usize % QUEUES;
        let s = b as usize % BACKENDS;
        match kind {
            0..=9 => {
                // Ids grow, commits do not: `unsent` ones commit whenever.
                for _ in 0..1 + b % 3 {
                    let msg_id = self.next_id[q];
                    self.next_id[q] += 1;
                    let visible_at_us = self.visible_at(c);
                    if b & 32 != 0 {
                        self.unsent.push((q, msg_id, visible_at_us));
                    } else {
                        self.commit_send(q, msg_id, visible_at_us, b & 64 != 0);
                    }
                }
            }
            10..=12 if !self.unsent.is_empty() => {
                let at = b as usize % self.unsent.len();
                let (q, msg_id, visible_at_us) = self.unsent.swap_remove(at);
                self.commit_send(q, msg_id, visible_at_us, c & 1 != 0);
            }
            13..=15 if !self.late.is_empty() => {
                let at = b as usize % self.late.len();
                let (q, row, change) = self.late.remove(at);
                self.publish(q, row, change);
            }
            16..=18 => {
                let visible_at_us = self.visible_at(c);
                if let Some(msg_id) = self.pick(q, b) {
                    let is_there = self.tables[q].contains_key(&msg_id);
                    if is_there && !self.locked.contains(&(q, msg_id)) {
                        self.update(q, msg_id, visible_at_us, c & 64 != 0);
                    }
                }
            }
            19 => {
                if let Some(msg_id) = self.pick(q, b).filter(|id| !self.locked.contains(&(q, *id))) {
                    self.tables[q].remove(&msg_id);
                    self.finished.insert((q, msg_id));
                    if c & 1 != 0 && msg_id < self.next_id[q] {
                        self.commit_send(q, msg_id, None, c & 2 != 0); // the same id again
                    }
                }
            }
            20..=29 => {
                if self.sessions[s].is_committed {
                    return;
                }
                let at = self.refs[q];
                let lease_us = i64::from(1 + c % 40) * SECOND_US;
                for taken in self.take(q, 1 + c as usize % 4, lease_us) {
                    let row = self.tables[q].get(&taken.msg_id).copied();
                    self.sessions[s].unsettled.push((q, at, taken, row));
                }
                if c & 64 == 0 {
                    while !self.sessions[s].unsettled.is_empty() {
                        self.settle_next(s);
                    }
                }
            }
            30..=33 => self.settle_next(s),
            34..=43 => {
                let picked = self.pick(q, c);
                let held = picked.and_then(|id| self.held.get(&(q, id)).map(|held| held.0));
                let fence = match (c % 4, held) {
                    (0, _) | (_, None) => [Fence::Any, Fence::NotLeased][usize::from(c & 8 != 0)],
                    (_, Some(lease_id)) => Fence::Lease(lease_id),
                };
                self.end(s, q, c, b / 4, fence);
            }
            44..=49 => {
                self.commit_visible(s);
                if c & 1 != 0 {
                    self.commit_callback(s);
                }
            }
            50..=52 => self.commit_callback(s),
            53..=56 => self.abort(s),
            57..=58 => self.extend(q, b, i64::from(c % 60), c & 128 != 0),
            59..=63 => self.load_begin(s, q),
            64..=66 => self.scan_begin(s, q),
            67..=72 => self.load_step(s, 1 + c as usize % 8),
            73 => self.load_abort(s),
            74..=76 => self.tick(s),
            77..=80 => {
                let us = [1, SECOND_US, 8 * SECOND_US, 45 * SECOND_US, 200 * SECOND_US][c as usize % 5];
                self.now = Now { mono_us: self.now.mono_us + us, wall_us: self.now.wall_us + us };
            }
            81..=85 => {
                let w = c as usize % WAITERS;
                if self.sleepers[w] == Sleeper::Away {
                    let queues = if b & 16 != 0 { vec![q] } else { (0..QUEUES).collect() };
                    self.sleep(w, queues, s);
                }
            }
            86..=90 => self.stir(c as usize % WAITERS, s, b & 16 != 0),
            91 => {
                self.policy[q].paused = c & 3 == 0;
                self.policy[q].max_deliveries = u32::from(c / 4 % 5);
                let mut fx = Effects::new();
                self.memory.arena().queue_reconfigure(self.refs[q], self.policy[q], &mut fx);
                self.wake(&fx);
            }
            92 if c < 64 => self.truncate(q),
            93 if c < 64 => self.drop_queue(q),
            94 if c < 32 => self.reset(u64::from(b)),
            95 => self.use_stale(b),
            96..=97 => {
                let is_read = self.consume(s, q);
                assert!(!is_read || !self.policy[q].paused);
            }
            98 => {
                // A bulk load by COPY: only the lowest id is remembered.
                let first = self.next_id[q];
                for _ in 0..1 + c % 20 {
                    self.version += 1;
                    let row = HeapRow { visible_at_us: None, count: 0, version: self.version };
                    self.tables[q].insert(self.next_id[q], row);
                    self.next_id[q] += 1;
                    self.sent += 1;
                }
                let mut fx = Effects::new();
                self.memory.arena().queue_mark(self.refs[q], first, &mut fx);
                self.wake(&fx);
            }
            99 => self.send_leased(q, c),
            _ => {}
        }
    }

    /// A transaction sends and reads its own message; a load may come between its commit and its callback.
    fn send_leased(&mut self, q: usize, c: u8) {
        let msg_id = self.next_id[q];
        self.next_id[q] += 1;
        self.version += 1;
        let row = HeapRow { visible_at_us: None, count: 0, version: self.version };
        self.tables[q].insert(msg_id, row);
        self.sent += 1;
        if c & 1 != 0 {
            self.publish(q, row_of(msg_id, &row), Change::Insert);
            if c & 2 != 0 {
                self.consume(0, q); // this or another one
            }
        }
        let lease_id = self.memory.arena().lease_id_next();
        assert!(self.lease_ids.insert(lease_id), "lease id repeats");
        let until_us = self.now.mono_us + i64::from(c) * SECOND_US + 1;
        let lease = Lease { until_us, pid: 7, lxid: 1, flush_us: NEVER_US };
        let mut fx = Effects::new();
        let mut arena = self.memory.arena();
        arena.publish_leased(self.refs[q], row_of(msg_id, &row), lease_id, lease, self.now, &mut fx);
        if arena.view(self.refs[q], msg_id).is_some_and(|view| view.lease_id == lease_id) {
            self.held.insert((q, msg_id), (lease_id, until_us));
        }
        self.wake(&fx);
    }

    /// Whether a row that has no slot will be found all the same.
    fn is_within_reach(&self, bounds: Bounds, load: Option<&Load>, msg_id: i64, row: &HeapRow) -> bool {
        // The mark counts in any case: while a load runs it is where that began, so the snapshot holds the row
        // (in the part not walked yet), or `redo` covers it.
        let unwalked = load.is_some_and(|load| load.rows.iter().any(|(id, _)| *id == msg_id));
        let is_marked = match load {
            Some(load) if load.scan.is_none() => unwalked || msg_id >= bounds.redo,
            Some(_) => msg_id >= bounds.mark.min(bounds.redo),
            None => msg_id >= bounds.mark,
        };
        let is_later = row.visible_at_us.is_some_and(|at| match load {
            Some(load) => {
                let is_beyond = at > bounds.horizon_us.min(bounds.redo_horizon_us);
                (is_beyond && bounds.beyond_us.min(load.beyond_us) <= at) || (load.scan.is_some() && unwalked)
            }
            None => at > bounds.horizon_us && bounds.beyond_us <= at,
        });
        is_marked || is_later
    }

    fn check(&mut self) {
        let arena = self.memory.arena();
        if let Err(what) = arena.check() {
            panic!("{what}");
        }
        if let Err(what) = arena.check_sleepers() {
            panic!("{what}");
        }
        let unpublished: HashSet<(usize, i64)> = self.late.iter().map(|(q, row, _)| (*q, row.msg_id)).collect();
        let called_back: HashSet<(usize, i64)> = self
            .sessions
            .iter()
            .filter(|s| s.is_committed)
            .flat_map(|s| &s.journal)
            .filter_map(|entry| match entry {
                Entry::Retry { q, msg_id, .. } => Some((*q, *msg_id)),
                _ => None,
            })
            .collect();
        for q in 0..QUEUES {
            let at = self.refs[q];
            let arena = self.memory.arena();
            let bounds = arena.check_bounds(at).expect("attached");
            let load = self.sessions.iter().filter_map(|s| s.load.as_ref()).find(|load| load.at == at);
            assert_eq!(load.is_some(), bounds.is_loading);
            for (msg_id, row) in &self.tables[q] {
                let key = (q, *msg_id);
                if unpublished.contains(&key) || called_back.contains(&key) || self.locked.contains(&key) {
                    continue;
                }
                let tracked = self.memory.arena().view(at, *msg_id);
                match tracked {
                    Some(view) if view.state == State::Delayed => {
                        let latest_us = HORIZON_US.max(self.policy[q].retry_delay_max_us) * 3 / 2;
                        let row_us = row_of(*msg_id, row).due_us(self.now).unwrap_or(0);
                        let is_soon = view.deadline_us <= (self.now.mono_us + latest_us).max(row_us);
                        assert!(is_soon, "put off for too long");
                    }
                    Some(_) => {}
                    None => {
                        assert!(
                            self.is_within_reach(bounds, load, *msg_id, row),
                            "message {msg_id} of queue {q} is lost: {row:?} {bounds:?} {:?}",
                            self.now
                        );
                    }
                }
            }
            for ((of, msg_id), (lease_id, until_us)) in &self.held {
                if *of != q || *until_us <= self.now.mono_us || self.is_pinned(q, *msg_id) {
                    continue;
                }
                let view = self.memory.arena().view(at, *msg_id).expect("a lease always has a slot");
                assert_eq!((view.state, view.lease_id), (State::Leased, *lease_id), "a lease was lost");
            }
        }
    }

    /// Ends what is open and reads until nothing is left.
    fn drain(&mut self) {
        for b in 0..BACKENDS {
            self.load_abort(b);
            while !self.sessions[b].unsettled.is_empty() {
                self.settle_next(b);
            }
            self.commit_visible(b);
            self.commit_callback(b);
        }
        for (q, row, change) in std::mem::take(&mut self.late) {
            self.publish(q, row, change);
        }
        for q in 0..QUEUES {
            self.policy[q] = Policy { max_deliveries: 0, ..Policy::DEFAULT };
            let mut fx = Effects::new();
            self.memory.arena().queue_reconfigure(self.refs[q], self.policy[q], &mut fx);
            self.wake(&fx);
        }
        self.check();
        for _ in 0..4000 {
            self.tick(0);
            let mut has_read = false;
            for q in 0..QUEUES {
                while self.consume(0, q) {
                    has_read = true;
                }
            }
            for w in 0..WAITERS {
                if matches!(self.sleepers[w], Sleeper::Woken(_)) {
                    self.stir(w, 0, true);
                }
            }
            let is_idle = (0..QUEUES).all(|q| {
                self.tables[q].is_empty() && self.memory.arena().lengths(self.refs[q]) == Some([0; 5])
            });
            if is_idle {
                let free = self.memory.arena().slots_free();
                self.check();
                for w in 0..WAITERS {
                    self.leave(w);
                }
                for q in 0..QUEUES {
                    self.drop_queue(q);
                }
                self.check();
                assert_eq!(free, self.memory.arena().slots_free());
                return;
            }
            if !has_read {
                let us = 3 * SECOND_US;
                self.now = Now { mono_us: self.now.mono_us + us, wall_us: self.now.wall_us + us };
            }
        }
        let left: Vec<usize> = self.tables.iter().map(Table::len).collect();
        panic!("messages are never delivered: {left:?}");
    }
}

/// As many as take a few seconds, or what the environment asks for.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2000)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(),
        max_shrink_iters: 4000,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/model.regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_sequence_of_calls_keeps_every_message_in_reach(
        slots in 12usize..40,
        slots_min in 1u32..4,
        window in 4u32..16,
        seed in any::<u64>(),
        steps in prop::collection::vec((0u8..100, any::<u8>(), any::<u8>(), any::<u8>()), 1..250),
    ) {
        let mut world = World::new(slots, slots_min, window, seed);
        for step in steps {
            world.step(step);
            world.check();
        }
        world.drain();
    }
}
