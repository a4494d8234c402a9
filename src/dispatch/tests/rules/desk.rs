//! The desk at which the rules are tried: one queue, a clock, and the latches that were asked for. Tests nothing.

pub use crate::common::Memory;

pub use queue_dispatch::{
    backoff_us, mark_at, Arena, Change, Config, Effects, Fence, Lease, LeaseCount, LeaseRow, LeaseWalk,
    LoadRow, LoadStart, Now, Pin, Policy, QueueRef, Restore, Row, RowFate, ScanStart, Settled, State, Taken,
    Tick, Tid, View, Written, CHUNK_MAX, EFFECTS_MAX, NEVER_US, NIL, NO_MARK, SWEEP_US,
};
pub use std::collections::HashSet;

pub const SECOND_US: i64 = 1_000_000;
pub const WALL_US: i64 = 800_000_000 * SECOND_US;
pub const DATABASE: u32 = 1;
pub const WORKER: u32 = 40;

pub struct Desk {
    pub memory: Memory,
    pub now: Now,
    pub fx: Effects,
    pub queue: QueueRef,
}

impl Desk {
    /// One queue (relation 100), loaded: nothing in the heap.
    pub fn new(slots: usize, slots_min: u32, window: u32) -> Desk {
        let memory = Memory::new(4, slots, 48, Config { slots_min, window }, 42);
        let now = Now { mono_us: 1000 * SECOND_US, wall_us: WALL_US };
        let queue = QueueRef { epoch: 0, generation: 0, index: 0 };
        let mut desk = Desk { memory, now, fx: Effects::new(), queue };
        desk.queue = desk.attach(100);
        desk
    }

    pub fn attach(&mut self, relation: u32) -> QueueRef {
        let now = self.now;
        let mut arena = self.memory.arena();
        let queue = arena.queue_attach(DATABASE, relation, now.wall_us).unwrap();
        assert!(arena.queue_configure(queue, 0, Policy { retry_jitter: 0.0, ..Policy::DEFAULT }));
        assert_eq!(arena.restore_begin(queue, 0), queue_dispatch::Restore::Begun);
        arena.restore_end(queue, 0, &mut queue_dispatch::Effects::new());
        assert_eq!(arena.load_begin(queue, 0), LoadStart::From(i64::MIN));
        arena.load_end(queue, 0, NO_MARK, &mut Effects::new());
        queue
    }

    pub fn arena(&mut self) -> Arena<'_> {
        self.memory.arena()
    }

    pub fn pass(&mut self, us: i64) {
        self.now = Now { mono_us: self.now.mono_us + us, wall_us: self.now.wall_us + us };
    }

    /// The latches asked for since the last call.
    pub fn woken(&mut self) -> Vec<u32> {
        let fx = std::mem::take(&mut self.fx);
        fx.procs().to_vec()
    }

    pub fn publish(&mut self, msg_id: i64) {
        self.publish_row(row(msg_id), Change::Insert);
    }

    pub fn publish_row(&mut self, row: Row, change: Change) {
        self.memory.arena().publish(self.queue, row, change, self.now, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    pub fn take(&mut self, most: usize) -> Vec<Taken> {
        let lease = Lease { until_us: self.now.mono_us + 30 * SECOND_US, pid: 11, lxid: 1, flush_us: NEVER_US };
        let mut out = vec![Taken::default(); most];
        let taken = self.memory.arena().take(self.queue, lease, self.now, &mut out, &mut self.fx);
        out.truncate(taken);
        self.memory.arena().check().unwrap();
        out
    }

    pub fn take_one(&mut self) -> Taken {
        self.take(1)[0]
    }

    pub fn settle(&mut self, taken: Taken, row: Row) -> Settled {
        self.memory.arena().settle(self.queue, taken, row, self.now, &mut self.fx)
    }

    pub fn pin(&mut self, msg_id: i64, fence: Fence, owner: u32) -> Pin {
        self.memory.arena().pin(self.queue, msg_id, fence, owner, self.now, &mut self.fx)
    }

    pub fn undo(&mut self, msg_id: i64, owner: u32) {
        self.memory.arena().pin_undo(self.queue, msg_id, owner, self.now, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    pub fn finish(&mut self, msg_id: i64, owner: u32) {
        self.memory.arena().pin_finish(self.queue, msg_id, owner, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    pub fn give_back(&mut self, taken: Taken) {
        let Taken { msg_id, lease_id, .. } = taken;
        self.memory.arena().lease_return(self.queue, msg_id, lease_id, self.now, &mut self.fx);
    }

    pub fn state(&mut self, msg_id: i64) -> Option<State> {
        let queue = self.queue;
        self.arena().view(queue, msg_id).map(|view| view.state)
    }

    pub fn wait(&mut self, proc: u32) {
        self.memory.arena().wait_begin(proc, &[self.queue], &mut self.fx);
    }

    pub fn leave(&mut self, proc: u32) {
        self.memory.arena().wait_end(proc, &mut self.fx);
    }

    pub fn mark(&mut self) -> i64 {
        let queue = self.queue;
        self.arena().check_bounds(queue).unwrap().mark
    }

    pub fn reconfigure(&mut self, policy: Policy) {
        self.memory.arena().queue_reconfigure(self.queue, policy, &mut self.fx);
    }

    pub fn load_row(&mut self, row: Row) -> LoadRow {
        self.memory.arena().load_row(self.queue, row, self.now, &mut self.fx)
    }
}

pub fn row(msg_id: i64) -> Row {
    Row { msg_id, tid: Tid { block: msg_id as u32, offset: 1 }, visible_at_us: None, count: 0 }
}

pub fn due(msg_id: i64, in_us: i64) -> Row {
    Row { visible_at_us: Some(WALL_US + in_us), ..row(msg_id) }
}

/// A lease that was written before memory was lost.
pub const OLD_LEASE: i64 = (77 << 32) | 5;

impl Desk {
    /// A queue whose leases have not been restored.
    pub fn attach_unrestored(&mut self, relation: u32) -> QueueRef {
        let now = self.now;
        let mut arena = self.memory.arena();
        let queue = arena.queue_attach(DATABASE, relation, now.wall_us).unwrap();
        assert!(arena.queue_configure(queue, 0, Policy { retry_jitter: 0.0, ..Policy::DEFAULT }));
        queue
    }

    /// A desk whose only queue is being restored by backend 2.
    pub fn restoring() -> Desk {
        let mut d = Desk::new(16, 2, 8);
        d.queue = d.attach_unrestored(101);
        let queue = d.queue;
        assert_eq!(d.arena().restore_begin(queue, 2), Restore::Begun);
        d
    }

    pub fn restore_begin(&mut self, loader: u32) -> Restore {
        self.memory.arena().restore_begin(self.queue, loader)
    }

    pub fn restore_end(&mut self) {
        self.memory.arena().restore_end(self.queue, 2, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    pub fn restore(&mut self, lease: LeaseRow, row: Row) -> bool {
        let is_done = self.memory.arena().lease_restore(self.queue, &lease, row, self.now, &mut self.fx);
        self.memory.arena().check().unwrap();
        is_done
    }

    pub fn old_lease(&self, msg_id: i64, count: u32, in_us: i64) -> LeaseRow {
        let now_us = self.now.mono_us;
        LeaseRow {
            msg_id,
            lease_id: OLD_LEASE,
            count,
            leased_at_us: now_us - 5 * SECOND_US,
            until_us: now_us + in_us,
            pid: 12,
            lxid: 0,
            written: Written::Whole,
        }
    }

    /// Leases of so many seconds, to be written once they are older than `flush_us`.
    pub fn take_for(&mut self, most: usize, seconds: i64, flush_us: i64) -> Vec<Taken> {
        let lease = Lease { until_us: self.now.mono_us + seconds * SECOND_US, pid: 11, lxid: 3, flush_us };
        let mut out = vec![Taken::default(); most];
        let taken = self.memory.arena().take(self.queue, lease, self.now, &mut out, &mut self.fx);
        out.truncate(taken);
        out
    }

    /// What the worker finds to write in one walk, in chunks of so many.
    pub fn walk(&mut self, chunk: usize) -> Vec<LeaseRow> {
        self.memory.arena().flush_begin(self.queue);
        let (mut walk, mut all) = (LeaseWalk::START, Vec::new());
        for _ in 0..100 {
            let mut rows = vec![LeaseRow::default(); chunk];
            let (found, is_all) =
                self.memory.arena().flush_next(self.queue, &mut walk, SECOND_US, self.now, &mut rows);
            all.extend_from_slice(&rows[..found]);
            if is_all {
                return all;
            }
        }
        panic!("the walk does not end");
    }

    pub fn walked_ids(&mut self, chunk: usize) -> Vec<i64> {
        let mut ids: Vec<i64> = self.walk(chunk).iter().map(|row| row.msg_id).collect();
        ids.sort();
        ids
    }

    pub fn written(&mut self, row: &LeaseRow, written: Written) {
        self.memory.arena().lease_written(self.queue, row, written, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    /// Writes all leases that are old enough, whole.
    pub fn write_all(&mut self) {
        for row in self.walk(CHUNK_MAX) {
            self.written(&row, Written::Whole);
        }
    }

    pub fn tick(&mut self) -> Tick {
        let mut from = 0;
        loop {
            let (tick, next) = self.memory.arena().tick(DATABASE, from, self.now, &mut self.fx);
            match tick.filter(|tick| tick.queue == self.queue) {
                Some(tick) => return tick,
                None => from = next,
            }
        }
    }

    /// Expiry and what is new have been seen to.
    pub fn quiet(&mut self) {
        self.memory.arena().expiry_begin(self.queue);
        self.tick();
    }

    /// A worker that is asleep for ever, unless something of before wakes it.
    pub fn worker_sleeps(&mut self) -> i64 {
        let mut arena = self.memory.arena();
        assert!(arena.worker_set(DATABASE, WORKER));
        arena.worker_round(DATABASE);
        let until_us = self.memory.arena().worker_sleep(DATABASE, NEVER_US);
        self.woken();
        until_us
    }

    pub fn release(&mut self, taken: Taken) {
        assert!(matches!(self.pin(taken.msg_id, Fence::Lease(taken.lease_id), 5), Pin::Done(_)));
        self.memory.arena().pin_release(self.queue, taken.msg_id, 5, &mut self.fx);
        self.memory.arena().check().unwrap();
    }

    pub fn fate(&mut self, msg_id: i64, count: u32) -> RowFate {
        self.memory.arena().row_fate(self.queue, msg_id, count)
    }

    /// Whether the worker sweeps once it is time, and not before.
    pub fn is_swept(&mut self) -> bool {
        let first = self.tick();
        assert!(!first.sweep, "swept at once");
        self.pass(SWEEP_US - 1);
        assert!(!self.tick().sweep);
        self.pass(1);
        self.tick().sweep
    }
}
