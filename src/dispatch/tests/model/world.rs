//! The world around a dispatcher: tables with committed rows, sessions, sleepers; sending and taking.

pub use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use queue_dispatch::{LeaseRow, Written};

use crate::leases::{Persisted, Restoring, FLUSH_US};

pub use crate::common::Memory;
pub use queue_dispatch::{
    Bounds, Change, Config, Effects, Fence, Lease, LoadRow, LoadStart, Now, Pin, Policy, QueueRef, Row,
    ScanStart, Settled, State, Taken, Tid, HORIZON_US, NEVER_US, NIL, NO_MARK,
};

pub const QUEUES: usize = 3;
pub const BACKENDS: usize = 4;
pub const WAITERS: usize = 4;
/// The worker's backend number, and the database.
pub const WORKER: u32 = 9;
pub const DATABASE: u32 = 1;
pub const SECOND_US: i64 = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeapRow {
    pub visible_at_us: Option<i64>,
    pub count: u32,
    pub expires_us: Option<i64>,
    /// Which version of the row: stands for its address.
    pub version: u32,
}

pub type Table = BTreeMap<i64, HeapRow>;

pub fn row_of(msg_id: i64, row: &HeapRow) -> Row {
    let tid = Tid { block: row.version, offset: 1 };
    Row { msg_id, tid, visible_at_us: row.visible_at_us, count: row.count }
}

/// What an open transaction has done, oldest first.
#[derive(Clone, Debug)]
pub enum Entry {
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
    /// Taken, and not there for this transaction.
    Missed {
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

/// What an open transaction has sent and read: a slot is held for it.
pub struct OwnRead {
    pub q: usize,
    pub at: QueueRef,
    pub msg_id: i64,
    pub lease_id: i64,
    pub until_us: i64,
}

#[derive(Default)]
pub struct Session {
    pub journal: Vec<Entry>,
    /// Committed and visible; the callback has not run.
    pub is_committed: bool,
    /// Taken under a snapshot, not settled yet.
    pub unsettled: Vec<(usize, QueueRef, Taken, Option<HeapRow>)>,
    pub load: Option<Load>,
}

pub struct Load {
    pub q: usize,
    pub at: QueueRef,
    /// Rows still to be looked at, in the walk's order.
    pub rows: Vec<(i64, HeapRow)>,
    pub scan: Option<(i64, i64)>,
    /// What the snapshot says of the first message beyond a scan.
    pub beyond_us: i64,
}

#[derive(Clone, PartialEq)]
pub enum Sleeper {
    Away,
    Asleep(Vec<usize>),
    Woken(Vec<usize>),
}

pub struct World {
    pub memory: Memory,
    pub config: Config,
    pub slots: usize,
    pub now: Now,
    pub refs: Vec<QueueRef>,
    pub relation: u32,
    pub policy: Vec<Policy>,
    pub tables: Vec<Table>,
    pub next_id: Vec<i64>,
    pub version: u32,
    /// Sent in transactions that are open: queue, id, visible_at.
    pub unsent: Vec<(usize, i64, Option<i64>)>,
    /// Sent and read in transactions that are open.
    pub own: Vec<OwnRead>,
    /// Committed, to be published.
    pub late: Vec<(usize, Row, Change)>,
    pub sessions: Vec<Session>,
    pub sleepers: Vec<Sleeper>,
    /// Rows that an open transaction has deleted or updated.
    pub locked: HashSet<(usize, i64)>,
    /// Running deliveries: lease, end.
    pub held: HashMap<(usize, i64), (i64, i64)>,
    /// Seeds that were drawn.
    pub seeds: u64,
    pub lease_ids: HashSet<i64>,
    pub stale: Vec<QueueRef>,
    pub sent: usize,
    pub finished: BTreeSet<(usize, i64)>,
    /// The table of leases.
    pub persisted: BTreeMap<(usize, i64), Persisted>,
    /// Written, and not told yet.
    pub unconfirmed: Vec<(QueueRef, LeaseRow, Written)>,
    pub restoring: Vec<Restoring>,
    /// Of each queue: something has become ready that was not told, and when it may be told.
    pub news: Vec<(bool, i64)>,
    /// When the worker looks again at what has expired and was somebody's, wall clock.
    pub expire_again_us: Vec<i64>,
    /// What was ready when it was looked last.
    pub seen: Vec<BTreeSet<i64>>,
}

impl World {
    pub fn new(slots: usize, slots_min: u32, window: u32, seed: u64) -> World {
        let config = Config { slots_min, window };
        let memory = Memory::new(QUEUES + 1, slots, WAITERS, config, seed);
        let mut world = World {
            memory,
            config,
            slots,
            now: Now { mono_us: 50 * SECOND_US, wall_us: 800_000_000 * SECOND_US },
            refs: Vec::new(),
            relation: 100,
            policy: vec![Policy { max_deliveries: 0, ..Policy::DEFAULT }; QUEUES],
            tables: vec![Table::new(); QUEUES],
            next_id: vec![1; QUEUES],
            version: 0,
            unsent: Vec::new(),
            own: Vec::new(),
            late: Vec::new(),
            sessions: (0..BACKENDS).map(|_| Session::default()).collect(),
            sleepers: vec![Sleeper::Away; WAITERS],
            locked: HashSet::new(),
            held: HashMap::new(),
            seeds: 0,
            lease_ids: HashSet::new(),
            stale: Vec::new(),
            sent: 0,
            finished: BTreeSet::new(),
            persisted: BTreeMap::new(),
            unconfirmed: Vec::new(),
            restoring: Vec::new(),
            news: vec![(false, 0); QUEUES],
            expire_again_us: vec![i64::MIN; QUEUES],
            seen: vec![BTreeSet::new(); QUEUES],
        };
        assert!(world.memory.arena().worker_set(DATABASE, WORKER));
        for q in 0..QUEUES {
            world.attach(q);
        }
        world
    }

    /// Gives a queue a place; its leases are restored.
    pub fn attach(&mut self, q: usize) {
        self.attach_unrestored(q);
        self.restore_begin(q);
        self.restore_all();
    }

    pub fn attach_unrestored(&mut self, q: usize) {
        self.relation += 1;
        let mut arena = self.memory.arena();
        let queue = arena.queue_attach(DATABASE, self.relation, self.now.wall_us).expect("a record is free");
        let (_, version) = arena.queue_config_state(queue).expect("current");
        assert!(arena.queue_configure(queue, version, self.policy[q]));
        if self.refs.len() > q {
            self.refs[q] = queue;
        } else {
            self.refs.push(queue);
        }
    }

    /// Sets the latches.
    pub fn wake(&mut self, fx: &Effects) {
        assert!(!fx.is_everyone());
        for proc in fx.procs().iter().filter(|proc| **proc != WORKER) {
            match self.sleepers[*proc as usize].clone() {
                Sleeper::Asleep(queues) => self.sleepers[*proc as usize] = Sleeper::Woken(queues),
                _ => panic!("woke one who is not asleep"),
            }
        }
    }

    pub fn publish(&mut self, q: usize, row: Row, change: Change) {
        let mut fx = Effects::new();
        self.memory.arena().publish(self.refs[q], row, change, self.now, &mut fx);
        if let Some(at_us) = self.tables[q].get(&row.msg_id).and_then(|row| row.expires_us) {
            self.memory.arena().expires_at(self.refs[q], at_us, self.now, &mut fx);
        }
        self.wake(&fx);
    }

    pub fn commit_send(&mut self, q: usize, msg_id: i64, visible_at_us: Option<i64>, is_late: bool) {
        self.version += 1;
        let lives_from_us = visible_at_us.unwrap_or(self.now.wall_us);
        let expires_us = (msg_id % 7 == 3).then_some(lives_from_us + 20 * SECOND_US);
        let row = HeapRow { visible_at_us, count: 0, expires_us, version: self.version };
        self.tables[q].insert(msg_id, row);
        self.sent += 1;
        self.change_published(q, row_of(msg_id, &row), Change::Insert, is_late);
    }

    pub fn change_published(&mut self, q: usize, row: Row, change: Change, is_late: bool) {
        if is_late {
            self.late.push((q, row, change));
        } else {
            self.publish(q, row, change);
        }
    }

    pub fn update(&mut self, q: usize, msg_id: i64, visible_at_us: Option<i64>, is_late: bool) {
        self.version += 1;
        let row = self.tables[q].get_mut(&msg_id).expect("picked from the table");
        *row = HeapRow { visible_at_us, version: self.version, ..*row };
        let row = row_of(msg_id, row);
        self.change_published(q, row, Change::Update, is_late);
    }

    pub fn is_held(&self, q: usize, msg_id: i64) -> bool {
        self.held.get(&(q, msg_id)).is_some_and(|(_, until_us)| *until_us > self.now.mono_us)
    }

    pub fn is_pinned(&self, q: usize, msg_id: i64) -> bool {
        self.sessions.iter().flat_map(|s| &s.journal).any(|entry| match entry {
            Entry::Finish { q: of, msg_id: id, at }
            | Entry::Missed { q: of, msg_id: id, at }
            | Entry::Retry { q: of, msg_id: id, at, .. }
            | Entry::Release { q: of, msg_id: id, at } => *of == q && *id == msg_id && *at == self.refs[q],
            _ => false,
        })
    }

    pub fn take(&mut self, q: usize, most: usize, lease_us: i64) -> Vec<Taken> {
        let lease = Lease { until_us: self.now.mono_us + lease_us, pid: 7, lxid: 1, flush_us: FLUSH_US };
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
    pub fn settle(&mut self, q: usize, at: QueueRef, taken: Taken, row: Option<HeapRow>) -> bool {
        let mut fx = Effects::new();
        let mut goes_out = false;
        match row {
            None => self.memory.arena().drop_taken(at, taken, &mut fx),
            Some(HeapRow { expires_us: Some(at_us), .. }) if at_us <= self.now.wall_us => {
                self.memory.arena().put_off(at, taken, self.now.mono_us + SECOND_US, &mut fx);
                self.memory.arena().expires_at(at, i64::MIN, self.now, &mut fx);
            }
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

    pub fn unhold(&mut self, q: usize, msg_id: i64, lease_id: i64) {
        if self.held.get(&(q, msg_id)).is_some_and(|held| held.0 == lease_id) {
            self.held.remove(&(q, msg_id));
        }
    }

    pub fn settle_next(&mut self, b: usize) {
        if self.sessions[b].unsettled.is_empty() || self.sessions[b].is_committed {
            return;
        }
        let (q, at, taken, row) = self.sessions[b].unsettled.remove(0);
        if row.is_none() && b % 2 == 1 {
            // It has a transaction id, so that it may have deleted the row itself.
            if self.memory.arena().pin_withdrawn(at, taken, b as u32, &mut Effects::new()) {
                self.sessions[b].journal.push(Entry::Missed { q, at, msg_id: taken.msg_id });
            }
            self.unhold(q, taken.msg_id, taken.lease_id);
            return;
        }
        if self.settle(q, at, taken, row) {
            let Taken { msg_id, lease_id, was_returned, .. } = taken;
            self.sessions[b].journal.push(Entry::Lease { q, at, msg_id, lease_id, was_returned });
        }
    }
}
