//! The dispatcher's memory: one block, laid out when the server starts, one lock over all of it. Owns the block,
//! the lock and the dirty flag; knows the types of the arena's parts, nothing of their meaning.
//!
//! # The lock
//!
//! `with_arena` takes the one LWLock, lends the arena to a closure of pure memory operations, releases it, and
//! then sets the latches that the closure asked for. Under the lock nothing calls Postgres, allocates or sleeps.
//!
//! # The dirty flag
//!
//! It is set when the lock is taken and cleared when the closure returned. Whoever finds it set knows that
//! somebody died or panicked half way: the arena is made anew, with a new epoch, and loaded again from the heap.
//!
//! # What else lies here
//!
//! `Server`: what launcher, workers and hooks tell each other, under the same lock.

use crate::error::{Error, Result};
use crate::pg::{clock, latch};
use pgrx::{pg_guard, pg_sys};
use queue_dispatch::{
    Arena, Config, Db, Effects, Head, Now, Parts, Queue, Slot, WaitNode, Waiter, NIL, WAIT_QUEUES_MAX,
};
use std::mem::{align_of, size_of};
use std::sync::atomic::{AtomicPtr, Ordering};

/// How much memory, in units of what it holds.
#[derive(Clone, Copy)]
pub struct Sizes {
    /// Messages tracked at a time.
    pub slots: usize,
    /// Queues attached at a time.
    pub queues: usize,
    /// Databases with a worker.
    pub databases: usize,
    /// How slots are shared out.
    pub config: Config,
}

/// Most databases that can be asked for at a time to be left alone or to be looked at.
pub const REQUESTS_MAX: usize = 32;

/// A database that the launcher is to treat specially. Under the lock.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Request {
    /// The database, 0 for an unused entry.
    pub database: u32,
    /// Let no worker run there. Otherwise its worker ends, and says why.
    pub keep_away: bool,
    /// There was no place for it; else there is nothing to serve.
    pub has_no_place: bool,
    /// On the clock that never jumps: after this the request no longer holds, in case its maker died.
    pub until_us: i64,
}

impl Request {
    /// An unused entry.
    pub const NONE: Request = Request { database: 0, keep_away: false, has_no_place: false, until_us: 0 };
}

/// Most tables that workers keep away from at a time.
pub const AVOIDED_MAX: usize = 64;

/// A table that a database's worker keeps away from (`worker::avoid`). Under the lock.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Avoided {
    /// The database.
    pub database: u32,
    /// The table, 0 for an unused entry.
    pub relation: u32,
    /// On the clock that never jumps.
    pub until_us: i64,
    /// How long that is altogether.
    pub pause_us: i64,
}

impl Avoided {
    /// An unused entry.
    pub const NONE: Avoided = Avoided { database: 0, relation: 0, until_us: 0, pause_us: 0 };
}

/// What is shared by launcher, workers and hooks. Under the lock.
#[repr(C)]
pub struct Server {
    /// The launcher's backend, NIL while it does not run.
    pub launcher: u32,
    /// Look at every database again.
    pub probe_all: bool,
    /// Databases to stay away from, or to probe.
    pub requests: [Request; REQUESTS_MAX],
    /// Tables to stay away from.
    pub avoided: [Avoided; AVOIDED_MAX],
}

#[repr(C)]
struct Root {
    lock: *mut pg_sys::LWLock,
    is_dirty: u32,
    sizes: Sizes,
    backends: usize,
    server: Server,
    head: Head,
}

const TRANCHE: &std::ffi::CStr = c"pg_queue";

static ROOT: AtomicPtr<Root> = AtomicPtr::new(std::ptr::null_mut());
static mut SIZES: Option<fn() -> Sizes> = None;
static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;

/// Where each part lies, in bytes from the block's beginning.
struct Layout {
    queues: usize,
    queue_buckets: usize,
    slots: usize,
    slot_buckets: usize,
    waiters: usize,
    wait_nodes: usize,
    dbs: usize,
    total: usize,
}

fn layout(sizes: &Sizes, backends: usize) -> Layout {
    let mut at = 0usize;
    let mut place = |size: usize, align: usize, len: usize| {
        let start = at.next_multiple_of(align.max(64)); // a cache line
        at = start + size * len;
        start
    };
    place(size_of::<Root>(), align_of::<Root>(), 1);
    Layout {
        queues: place(size_of::<Queue>(), align_of::<Queue>(), sizes.queues),
        queue_buckets: place(4, 4, sizes.queues.next_power_of_two()),
        slots: place(size_of::<Slot>(), align_of::<Slot>(), sizes.slots),
        slot_buckets: place(4, 4, sizes.slots.next_power_of_two()),
        waiters: place(size_of::<Waiter>(), align_of::<Waiter>(), backends),
        wait_nodes: place(size_of::<WaitNode>(), align_of::<WaitNode>(), backends * WAIT_QUEUES_MAX),
        dbs: place(size_of::<Db>(), align_of::<Db>(), sizes.databases),
        total: at,
    }
}

/// Asks for the memory; in `_PG_init`, while the server preloads libraries. The settings that `sizes` reads must
/// be defined by then.
pub fn install(sizes: fn() -> Sizes) {
    // SAFETY: _PG_init runs in the postmaster, single-threaded, before any hook is called; the previous hooks
    // are kept and called.
    unsafe {
        SIZES = Some(sizes);
        PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(on_request);
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(on_startup);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_request() {
    // SAFETY: called once by the postmaster; RequestAddinShmemSpace is allowed here only.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            previous();
        }
        if let Some(sizes) = SIZES {
            pg_sys::RequestAddinShmemSpace(layout(&sizes(), latch::backends_max()).total);
            pg_sys::RequestNamedLWLockTranche(TRANCHE.as_ptr(), 1);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_startup() {
    // SAFETY: called by the postmaster when it creates shared memory (again after a crash). The block is as
    // large as was requested; every part is written before anybody else can see it, under AddinShmemInitLock.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            previous();
        }
        let Some(sizes) = SIZES else { return };
        let sizes = sizes();
        let backends = latch::backends_max();
        let layout = layout(&sizes, backends);
        let lock = &raw mut (*pg_sys::GetNamedLWLockTranche(TRANCHE.as_ptr())).lock;
        pg_sys::LWLockAcquire(
            pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT_LOCK).cast(),
            pg_sys::LWLockMode::LW_EXCLUSIVE,
        );
        let mut found = false;
        let root: *mut Root = pg_sys::ShmemInitStruct(TRANCHE.as_ptr(), layout.total, &mut found).cast();
        if !found {
            root.write(Root {
                lock,
                is_dirty: 0,
                sizes,
                backends,
                server: Server {
                    launcher: NIL,
                    probe_all: true,
                    requests: [Request::NONE; REQUESTS_MAX],
                    avoided: [Avoided::NONE; AVOIDED_MAX],
                },
                head: Head::EMPTY,
            });
            let base = root.cast::<u8>();
            fill(base.add(layout.queues), Queue::FREE, sizes.queues);
            fill(base.add(layout.queue_buckets), NIL, sizes.queues.next_power_of_two());
            fill(base.add(layout.slots), Slot::FREE, sizes.slots);
            fill(base.add(layout.slot_buckets), NIL, sizes.slots.next_power_of_two());
            fill(base.add(layout.waiters), Waiter::IDLE, backends);
            fill(base.add(layout.wait_nodes), WaitNode::FREE, backends * WAIT_QUEUES_MAX);
            fill(base.add(layout.dbs), Db::FREE, sizes.databases);
            arena(root).reset(sizes.config, seed(), &mut Effects::new());
        }
        ROOT.store(root, Ordering::Release);
        pg_sys::LWLockRelease(pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT_LOCK).cast());
    }
}

/// AddinShmemInitLock's place in MainLWLockArray (lwlocknames.txt, lwlocklist.h): the same in 15 to 18.
const ADDIN_SHMEM_INIT_LOCK: usize = 21;

/// # Safety
/// `at` points to room for `len` values of `T`, aligned.
unsafe fn fill<T: Copy>(at: *mut u8, value: T, len: usize) {
    let at = at.cast::<T>();
    for i in 0..len {
        // SAFETY: the caller's promise.
        unsafe { at.add(i).write(value) };
    }
}

/// 64 random bits.
fn seed() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: writes 8 bytes into `bytes`. On failure they stay zero, and the clock has to do.
    let ok = unsafe { pg_sys::pg_strong_random(bytes.as_mut_ptr().cast(), bytes.len()) };
    u64::from_ne_bytes(bytes) ^ if ok { 0 } else { clock::now().wall_us as u64 }
}

/// # Safety
/// `root` is the initialised block, and nobody else touches its parts while the result lives: the lock is held,
/// or nobody else can see the block yet.
unsafe fn arena<'a>(root: *mut Root) -> Arena<'a> {
    // SAFETY: the parts lie apart from each other within the block (layout), hold initialised values of these
    // types (on_startup), and are reached only through here; hence the mutable slices do not overlap.
    unsafe {
        let sizes = (*root).sizes;
        let backends = (*root).backends;
        let layout = layout(&sizes, backends);
        let base = root.cast::<u8>();
        fn part<'a, T>(base: *mut u8, at: usize, len: usize) -> &'a mut [T] {
            // SAFETY: see `arena`.
            unsafe { std::slice::from_raw_parts_mut(base.add(at).cast(), len) }
        }
        Arena::new(Parts {
            head: &mut (*root).head,
            queues: part(base, layout.queues, sizes.queues),
            queue_buckets: part(base, layout.queue_buckets, sizes.queues.next_power_of_two()),
            slots: part(base, layout.slots, sizes.slots),
            slot_buckets: part(base, layout.slot_buckets, sizes.slots.next_power_of_two()),
            waiters: part(base, layout.waiters, backends),
            wait_nodes: part(base, layout.wait_nodes, backends * WAIT_QUEUES_MAX),
            dbs: part(base, layout.dbs, sizes.databases),
        })
    }
}

/// Whether there is a dispatcher: the library was preloaded.
pub fn is_available() -> bool {
    !ROOT.load(Ordering::Acquire).is_null()
}

/// Lends the arena to `f` under the lock. `f` only touches memory.
pub fn with_arena<R>(f: impl FnOnce(&mut Arena, Now, &mut Effects) -> R) -> Result<R> {
    locked(|root, now, fx| {
        // SAFETY: `locked` holds the lock.
        f(&mut unsafe { arena(root) }, now, fx)
    })
}

/// Lends what launcher, workers and hooks share to `f` under the lock. `f` only touches memory.
pub fn with_server<R>(f: impl FnOnce(&mut Server, Now) -> R) -> Result<R> {
    locked(|root, now, _| {
        // SAFETY: `locked` holds the lock.
        f(unsafe { &mut (*root).server }, now)
    })
}

/// Takes the lock. It is held for a microsecond, and to sleep and be woken takes longer: so it is tried a few times
/// first, each time after twice the pause, so that many who try do not keep the lock's cache line from its holder.
///
/// # Safety
/// The lock is one of ours, in shared memory.
unsafe fn acquire(lock: *mut pg_sys::LWLock) {
    const PAUSES: [usize; 6] = [4, 8, 16, 32, 64, 128];
    for pauses in PAUSES {
        // SAFETY: the caller's promise.
        if unsafe { pg_sys::LWLockConditionalAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE) } {
            return;
        }
        (0..pauses).for_each(|_| std::hint::spin_loop());
    }
    // SAFETY: as above.
    unsafe { pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE) };
}

fn locked<R>(f: impl FnOnce(*mut Root, Now, &mut Effects) -> R) -> Result<R> {
    let root = ROOT.load(Ordering::Acquire);
    if root.is_null() {
        return Err(Error::NotPreloaded);
    }
    let now = clock::now();
    let mut fx = Effects::new();
    // SAFETY: the lock is ours, in shared memory, initialised with the tranche; it is released below on every
    // path, also when `f` panics. Interrupts are held off while it is held (lwlock.c).
    let lock = unsafe { (*root).lock };
    // SAFETY: as above.
    unsafe { acquire(lock) };
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        // SAFETY: the lock is held; `is_dirty` and the arena are touched under it only.
        unsafe {
            if (*root).is_dirty != 0 {
                arena(root).reset((*root).sizes.config, seed(), &mut fx);
            }
            (*root).is_dirty = 1;
        }
        let result = f(root, now, &mut fx);
        // SAFETY: as above.
        unsafe { (*root).is_dirty = 0 };
        result
    }));
    // SAFETY: taken above.
    unsafe { pg_sys::LWLockRelease(lock) };
    if fx.is_everyone() {
        (0..latch::backends_max() as u32).for_each(latch::set);
    }
    for proc in fx.procs() {
        latch::set(*proc);
    }
    match result {
        Ok(result) => Ok(result),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
