//! The slot: all that is known of one tracked message. Owns its layout; moves nothing between lists.

use crate::lease::Written;
use crate::{Now, NEVER_US, NIL};

/// A row's address in its table: a hint, never trusted without comparing `msg_id`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Tid {
    /// Block number.
    pub block: u32,
    /// Line pointer, from 1; 0 means that the address is not known.
    pub offset: u16,
}

/// What a row says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The message's id, unique in its queue.
    pub msg_id: i64,
    /// Where the row lies.
    pub tid: Tid,
    /// `visible_at` in wall-clock microseconds; `None` = at once.
    pub visible_at_us: Option<i64>,
    /// `delivery_count` as written in the row.
    pub count: u32,
}

impl Row {
    /// The time before which the row must not be delivered, if that is still to come; on the clock that never
    /// jumps, as deadlines are.
    pub fn due_us(&self, now: Now) -> Option<i64> {
        self.visible_at_us.filter(|at| *at > now.wall_us).map(|at| now.mono_of(at))
    }
}

/// Where a slot's message stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// On the free list.
    Free = 0,
    /// May be taken; in the queue's ready tree.
    Ready = 1,
    /// Not before its deadline; in the queue's timed tree.
    Delayed = 2,
    /// Taken, until its deadline; in the queue's timed tree.
    Leased = 3,
    /// A finish, retry or release waits for its transaction's end; in no tree.
    Pinned = 4,
    /// Had its last allowed delivery; in the queue's exhausted tree.
    Exhausted = 5,
    /// Only as what a pinned slot goes back to: the message had no slot before it was pinned.
    Untracked = 6,
    /// The same, and meanwhile it was published as a message that its sender has read: it goes to that lease.
    Born = 7,
}

impl State {
    /// Total, so that a stray byte in shared memory is a state that no operation acts upon.
    pub(crate) fn from_u8(raw: u8) -> State {
        match raw {
            1 => State::Ready,
            2 => State::Delayed,
            3 => State::Leased,
            4 => State::Pinned,
            5 => State::Exhausted,
            6 => State::Untracked,
            7 => State::Born,
            _ => State::Free,
        }
    }
}

/// One tracked message. Read and written only under the dispatcher's lock. 80 bytes; with its share of the hash
/// at most 88.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Slot {
    // What trees and hash chains look at comes first: a walk touches one cache line of most slots.
    pub(crate) msg_id: i64,
    /// Leased: end of the lease. Delayed: when it becomes ready. On the clock that never jumps.
    pub(crate) deadline_us: i64,
    pub(crate) left: u32,
    pub(crate) right: u32,
    /// Next slot in the hash chain, or on the free list.
    pub(crate) next: u32,
    pub(crate) queue: u32,
    /// The last delivery's lease; 0 = never delivered since it is tracked.
    pub(crate) lease_id: i64,
    pub(crate) leased_at_us: i64,
    pub(crate) block: u32,
    /// Deliveries so far, a running lease included.
    pub(crate) count: u32,
    /// Deliveries that the row knows of. Less than `count`: the slot must not be evicted.
    pub(crate) row_count: u32,
    /// Pinned: the backend whose open transaction did that.
    pub(crate) pinner: u32,
    /// Process id of the backend that took the last lease, and the local id of its transaction.
    pub(crate) pid: u32,
    pub(crate) lxid: u32,
    pub(crate) offset: u16,
    /// Reads in a row whose transaction rolled back.
    pub(crate) returned: u8,
    pub(crate) state: u8,
    /// Pinned: the state to go back to.
    pub(crate) from: u8,
    /// Leased or pinned: a change of the row was published since. Whoever looked at the row under an older
    /// snapshot does not know the last word on it, so it must not be dropped or put off on that ground.
    pub(crate) is_touched: bool,
    /// What the catalog holds of the lease: a `Written`.
    pub(crate) written: u8,
    /// Pinned, and in the queue's list of pinned leases, by `left` and `right`.
    pub(crate) is_listed: bool,
}

const _: () = assert!(core::mem::size_of::<Slot>() == 80 && core::mem::align_of::<Slot>() == 8);

impl Slot {
    /// A free slot.
    pub const FREE: Slot = Slot {
        msg_id: 0,
        deadline_us: NEVER_US,
        lease_id: 0,
        leased_at_us: 0,
        block: 0,
        count: 0,
        row_count: 0,
        queue: NIL,
        pinner: NIL,
        pid: 0,
        lxid: 0,
        next: NIL,
        left: NIL,
        right: NIL,
        offset: 0,
        returned: 0,
        state: State::Free as u8,
        from: State::Free as u8,
        is_touched: false,
        written: Written::No as u8,
        is_listed: false,
    };

    pub(crate) fn state(&self) -> State {
        State::from_u8(self.state)
    }

    pub(crate) fn written(&self) -> Written {
        Written::from_u8(self.written)
    }

    pub(crate) fn set_written(&mut self, written: Written) {
        self.written = written as u8;
    }

    pub(crate) fn tid(&self) -> Tid {
        Tid { block: self.block, offset: self.offset }
    }

    pub(crate) fn set_tid(&mut self, tid: Tid) {
        self.block = tid.block;
        self.offset = tid.offset;
    }

    /// The lease that runs, also while it is pinned; 0 for none.
    pub(crate) fn lease_running(&self) -> i64 {
        match (self.state(), State::from_u8(self.from)) {
            (State::Leased, _) | (State::Pinned, State::Leased | State::Born) => self.lease_id,
            _ => 0,
        }
    }

    /// Whether the row tells everything that the slot knows.
    pub(crate) fn is_evictable(&self) -> bool {
        self.count == self.row_count && self.returned == 0 && self.written() == Written::No
    }
}

/// What an onlooker sees of a tracked message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Where it stands.
    pub state: State,
    /// Deliveries so far.
    pub count: u32,
    /// The last delivery's lease, 0 for none.
    pub lease_id: i64,
    /// When a lease ends or a delay is over, on the clock that never jumps.
    pub deadline_us: i64,
    /// When the running lease began, likewise.
    pub leased_at_us: i64,
    /// Process id of the last reader.
    pub pid: u32,
}
