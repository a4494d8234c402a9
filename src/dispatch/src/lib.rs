//! The dispatcher: who may be delivered next, who is leased until when, what is due when.
//!
//! This crate owns the structure and its rules (`PROTOCOL.md`), and nothing else: it has no pointers, no clock,
//! no lock, no allocation and no Postgres. It works on slices that somebody else lends it ([`Parts`]); in the
//! server these lie in shared memory and are lent under one LWLock, in tests they are vectors. Time comes in as
//! an argument ([`Now`]), backends are numbers, and latches to be set come out in [`Effects`].
//!
//! # A message's way through it
//!
//! ```text
//!            publish / load                 take                    pin            finish
//!   (heap) ----------------> Ready ------------------> Leased ------------> Pinned --------> (gone)
//!              |               ^  ^  expire, return      |                    |  |
//!              | not yet due   |  +----------------------+     unpin (abort)  |  | refile (retry), release
//!              +---> Delayed --+ <--------------------------------------------+--+
//!                                 the last allowed delivery failed: Exhausted (the worker moves it away)
//! ```
//!
//! # The two promises that keep memory bounded
//!
//! * A queue's **mark** is the lowest message id that may be in the heap without being tracked here. No mark
//!   ([`NO_MARK`]) means that every committed message that is visible now has a slot. Whatever cannot be given a
//!   slot lowers the mark, and a later load walks the primary key from there.
//! * A queue's **horizon** is the same for time: messages with a `visible_at` later than the horizon are not
//!   tracked, and the first of them is remembered (`beyond`), so that somebody scans the index on `visible_at`
//!   before it is due.
//!
//! # What survives
//!
//! Nothing here does. Leases that last are written to a table by the worker, which asks for them, and are read back
//! before a queue delivers anything; the header of `lease` tells how.
//!
//! Every operation is O(log n) in the messages of one queue, or bounded by a constant that the caller names.

#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

#[cfg(test)]
extern crate std;

mod arena;
#[cfg(any(test, feature = "check"))]
mod check;
mod effects;
mod finish;
mod lease;
mod load;
mod look;
mod policy;
mod room;
mod slot;
mod take;
mod tree;
mod wait;
mod worker;

pub use arena::{Arena, Config, Head, Parts, Queue, QueueRef};
#[cfg(any(test, feature = "check"))]
pub use check::Bounds;
pub use effects::{Effects, EFFECTS_MAX};
pub use finish::{Fence, Pin, Pinned};
pub use lease::{LeaseCount, LeaseRow, LeaseWalk, Restore, RowFate, Written, SWEEP_US};
pub use load::{mark_at, LoadRow, LoadStart, ScanStart, HORIZON_US, SCAN_LEAD_US};
pub use policy::{backoff_us, Policy};
pub use slot::{Row, Slot, State, Tid, View};
pub use take::{Change, Lease, Settled, Taken};
pub use wait::{WaitNode, Waiter, WAIT_QUEUES_MAX};
pub use worker::{Db, Tick};

/// "No slot", "no queue", "no backend": the end of every list.
pub const NIL: u32 = u32::MAX;

/// The mark of a queue whose every visible message is tracked.
pub const NO_MARK: i64 = i64::MAX;

/// A point in time that never comes, on either clock.
pub const NEVER_US: i64 = i64::MAX;

/// Most messages that one call works on while the lock is held.
pub const CHUNK_MAX: usize = 256;

/// The time, read once by the caller before it takes the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Microseconds on a clock that never jumps (CLOCK_BOOTTIME): what leases and backoff are measured with.
    pub mono_us: i64,
    /// Microseconds since 2000-01-01 UTC (a `timestamptz`): what `visible_at` is compared with.
    pub wall_us: i64,
}

impl Now {
    /// Where a wall-clock time lies on the clock that never jumps.
    pub fn mono_of(&self, wall_us: i64) -> i64 {
        self.mono_us.saturating_add(wall_us.saturating_sub(self.wall_us))
    }
}
