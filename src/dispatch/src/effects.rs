//! What is to be done once the lock is released. Owns the list; sets no latch itself.

use crate::CHUNK_MAX;

/// Places that only workers' latches may take, so that readers never crowd a worker out.
const WORKERS_MAX: usize = 8;

/// Most latches that one hold of the lock can ask for: one for each message of a chunk that becomes ready, as
/// many again for timers that are due, and the workers'.
pub const EFFECTS_MAX: usize = 2 * CHUNK_MAX + WORKERS_MAX;

/// The backends whose latches are to be set after the lock is released.
pub struct Effects {
    len: usize,
    is_everyone: bool,
    procs: [u32; EFFECTS_MAX],
}

impl Default for Effects {
    fn default() -> Self {
        Self::new()
    }
}

impl Effects {
    /// Nothing to do.
    pub const fn new() -> Self {
        Effects { len: 0, is_everyone: false, procs: [0; EFFECTS_MAX] }
    }

    /// Whether another reader's latch fits. Who finds that it does not leaves its waiter in the list if another one of
    /// the same queue is woken, for he wakes the rest ([`crate::Arena::wait_end`]), or else wakes everyone.
    pub(crate) fn has_room(&self) -> bool {
        self.len < EFFECTS_MAX - WORKERS_MAX
    }

    /// A reader's latch. The caller has asked [`Effects::has_room`].
    pub(crate) fn wake(&mut self, proc: u32) {
        self.push(proc);
    }

    /// A worker's latch, once. It is never left out: nobody would set it later.
    pub(crate) fn wake_worker(&mut self, proc: u32) {
        if !self.procs().contains(&proc) {
            self.push(proc);
        }
    }

    /// More are to be woken than there is room for.
    pub(crate) fn wake_everyone(&mut self) {
        self.is_everyone = true;
    }

    fn push(&mut self, proc: u32) {
        if self.len < EFFECTS_MAX {
            self.procs[self.len] = proc;
            self.len += 1;
        } else {
            self.is_everyone = true;
        }
    }

    /// The backends to wake.
    pub fn procs(&self) -> &[u32] {
        &self.procs[..self.len]
    }

    /// More are to be woken than the list can hold: set the latch of every backend that may wait or work. Only what
    /// wakes all comes to this ([`crate::Arena::reset`], [`crate::Arena::workers_wake`], [`crate::Arena::written_wake`]),
    /// or hundreds who sleep at once.
    pub fn is_everyone(&self) -> bool {
        self.is_everyone
    }
}
