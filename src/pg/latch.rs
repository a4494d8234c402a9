//! Sleeping until somebody sets this backend's latch, and setting another's.

use pgrx::pg_sys;
use queue_dispatch::NIL;

/// This backend's number: its index among the server's processes, below [`backends_max`].
pub fn my_proc() -> u32 {
    // SAFETY: set once when the backend starts, before any of our code runs in a transaction.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        {
            if pg_sys::MyProc.is_null() {
                return NIL;
            }
            (*pg_sys::MyProc).pgprocno as u32
        }
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        {
            if pg_sys::MyProc.is_null() {
                return NIL;
            }
            pg_sys::MyProcNumber as u32
        }
    }
}

/// This backend's process id.
pub fn my_pid() -> u32 {
    // SAFETY: a plain global of this process.
    unsafe { pg_sys::MyProcPid as u32 }
}

/// The local id of this backend's transaction.
pub fn my_lxid() -> u32 {
    // SAFETY: as in `my_proc`; called in a transaction.
    unsafe {
        if pg_sys::MyProc.is_null() {
            return 0;
        }
        lxid_of(pg_sys::MyProc)
    }
}

/// Whether the transaction of that local id, of the backend with that process id, may still be open. It is not any
/// more once others see its effects.
pub fn is_transaction_open(pid: u32, lxid: u32) -> bool {
    // SAFETY: BackendPidGetProc looks the process up under its lock; the entry stays in shared memory, and what is
    // read of it is one number, which is 0 or another's when the process has ended meanwhile.
    unsafe {
        let proc = pg_sys::BackendPidGetProc(pid as _);
        lxid != 0 && !proc.is_null() && lxid_of(proc) == lxid
    }
}

/// # Safety
/// `proc` is an entry of the server's table of processes.
unsafe fn lxid_of(proc: *mut pg_sys::PGPROC) -> u32 {
    // SAFETY: the caller's promise; another process may write it meanwhile.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        {
            (&raw const (*proc).lxid).read_volatile()
        }
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        {
            (&raw const (*proc).vxid.lxid).read_volatile()
        }
    }
}

/// One more than the highest number a regular backend or background worker can have.
pub fn backends_max() -> usize {
    // SAFETY: computed before shared memory is requested (PostmasterMain), constant from then on.
    unsafe { pg_sys::MaxBackends.max(1) as usize }
}

/// Wakes a backend. One that has ended meanwhile, or whose number another has now, is woken for nothing.
pub fn set(proc: u32) {
    if proc != NIL && (proc as usize) < backends_max() {
        // SAFETY: the number is that of a PGPROC, checked above; setting a latch neither blocks nor fails.
        unsafe { pg_sys::ProcSendSignal(proc as _) }
    }
}

/// Why a sleep ended is not told: the caller looks again. Sleeps at most `timeout_ms` (-1: for ever), then
/// serves interrupts, so that a cancel or a shutdown ends it with the usual ERROR.
pub fn sleep(timeout_ms: i64, wait_event: u32) {
    let mut events = pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH;
    if timeout_ms >= 0 {
        events |= pg_sys::WL_TIMEOUT;
    }
    // SAFETY: MyLatch belongs to this process and is set up; WaitLatch is called outside any lock.
    unsafe {
        pg_sys::WaitLatch(pg_sys::MyLatch, events as _, timeout_ms as _, wait_event);
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
}

/// The wait event to show while sleeping; with a name of its own from PostgreSQL 17 on.
pub fn wait_event(name: &std::ffi::CStr) -> u32 {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    {
        let _ = name;
        pg_sys::PG_WAIT_EXTENSION
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    // SAFETY: the name is copied into shared memory; the same name gives the same event.
    unsafe {
        pg_sys::WaitEventExtensionNew(name.as_ptr())
    }
}

unsafe extern "C-unwind" {
    fn get_timeout_active(id: std::ffi::c_int) -> bool;
    fn get_timeout_finish_time(id: std::ffi::c_int) -> pg_sys::TimestampTz;
}

/// Its place in the enum TimeoutId (utils/timeout.h), which pgrx does not bind: the same in 15 to 18.
const STATEMENT_TIMEOUT: std::ffi::c_int = 3;

/// When `statement_timeout` will strike, wall clock in microseconds.
pub fn statement_deadline_us() -> Option<i64> {
    // SAFETY: both only read this process' table of timeouts (timeout.c) and cannot fail.
    let at_us =
        unsafe { get_timeout_active(STATEMENT_TIMEOUT).then(|| get_timeout_finish_time(STATEMENT_TIMEOUT)) };
    at_us.map(|at_us| at_us + super::clock::shift_us().1)
}
