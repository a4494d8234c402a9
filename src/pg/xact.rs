//! Transaction callbacks, registered once per process and told in plain calls. Owns nothing but the table of
//! functions to call; keeps no list per transaction (pgrx's own receipts outlive a PREPARE, HAZARDS.md).
//!
//! COMMIT and ABORT callbacks must not raise: a panic in them ends here. They run after the transaction has
//! ended for everybody else (CommitTransaction, AbortTransaction in xact.c).

use pgrx::{pg_guard, pg_sys};
use std::cell::Cell;

/// What to call when.
#[derive(Clone, Copy)]
pub struct Callbacks {
    /// Before COMMIT; may raise.
    pub pre_commit: fn(),
    /// Before PREPARE TRANSACTION; may raise.
    pub pre_prepare: fn(),
    /// After PREPARE TRANSACTION; must not raise.
    pub prepared: fn(),
    /// After the commit became visible; must not raise.
    pub committed: fn(),
    /// After the transaction id ended; must not raise.
    pub aborted: fn(),
    /// A subtransaction, given by its id, rolled back; must not raise.
    pub sub_aborted: fn(u32),
}

thread_local! {
    static CALLBACKS: Cell<Option<Callbacks>> = const { Cell::new(None) };
}

/// Registers the callbacks, in `_PG_init`.
pub fn install(callbacks: Callbacks) {
    CALLBACKS.set(Some(callbacks));
    // SAFETY: both functions stay loaded as long as the process lives, and have the types Postgres expects.
    unsafe {
        pg_sys::RegisterXactCallback(Some(on_xact), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(on_sub_xact), std::ptr::null_mut());
    }
}

/// Runs what must not raise. A panic is a bug of ours: it is left unsaid, since saying it could fail as well; the
/// dispatcher's dirty flag has whoever comes next load everything anew.
fn quietly(f: impl FnOnce()) {
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
}

#[pg_guard]
unsafe extern "C-unwind" fn on_xact(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    let Some(callbacks) = CALLBACKS.get() else { return };
    match event {
        pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT => (callbacks.pre_commit)(),
        pg_sys::XactEvent::XACT_EVENT_COMMIT => quietly(callbacks.committed),
        pg_sys::XactEvent::XACT_EVENT_ABORT => quietly(callbacks.aborted),
        pg_sys::XactEvent::XACT_EVENT_PREPARE => quietly(callbacks.prepared),
        pg_sys::XactEvent::XACT_EVENT_PRE_PREPARE => (callbacks.pre_prepare)(),
        _ => {}
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_sub_xact(
    event: pg_sys::SubXactEvent::Type,
    id: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut std::ffi::c_void,
) {
    if event == pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB {
        if let Some(callbacks) = CALLBACKS.get() {
            quietly(|| (callbacks.sub_aborted)(id));
        }
    }
}

/// The current subtransaction's id; ids only grow within a transaction.
pub fn sub_id() -> u32 {
    // SAFETY: reads a variable of this process.
    unsafe { pg_sys::GetCurrentSubTransactionId() }
}

/// Whether this is within a savepoint (or what PL/pgSQL makes one for), and so can be undone alone.
pub fn is_nested() -> bool {
    // SAFETY: reads the state of this process' transaction.
    unsafe { pg_sys::GetCurrentTransactionNestLevel() > 1 }
}

/// Whether this transaction has written anything (has an id).
pub fn has_id() -> bool {
    // SAFETY: reads a variable of this process.
    unsafe { pg_sys::GetTopTransactionIdIfAny() != pg_sys::InvalidTransactionId }
}

/// Whether nothing may be written: a standby, or a read-only transaction.
pub fn is_read_only() -> bool {
    // SAFETY: reads variables of this process and the recovery state in shared memory.
    unsafe { pg_sys::XactReadOnly || pg_sys::RecoveryInProgress() }
}

/// Whether the server replays somebody else's WAL.
pub fn is_standby() -> bool {
    // SAFETY: reads the recovery state in shared memory.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// Whether rows come from another server, by logical replication: where its triggers are not to fire again.
pub fn is_replica() -> bool {
    // SAFETY: reads a variable of this process.
    unsafe { pg_sys::SessionReplicationRole == pg_sys::SESSION_REPLICATION_ROLE_REPLICA as std::ffi::c_int }
}

/// Whether this is a parallel operation, in the leader or in a worker.
pub fn is_parallel() -> bool {
    // SAFETY: reads a variable of this process.
    unsafe { pg_sys::IsInParallelMode() }
}

/// Lets what follows in this transaction see what was done so far.
pub fn command_done() {
    // SAFETY: called in a transaction, between commands, outside parallel mode.
    unsafe { pg_sys::CommandCounterIncrement() }
}

/// Ends every snapshot of a procedure that may end transactions, and has none kept of the catalogs: from here on this
/// transaction keeps no vacuum from its work (but where its isolation level holds a snapshot). Nothing may be looked
/// up before [`ensure_snapshot`].
pub fn drop_snapshots() {
    // SAFETY: the procedure's caller holds none but its portals' (ExecuteCallStmt), as for the COMMIT that it might
    // make (_SPI_commit).
    unsafe {
        // Of a CALL that returns something the portal keeps one more, for what is in its result: given up as
        // PreCommit_Portals does, since that result is not made yet.
        let portal = pg_sys::ActivePortal;
        if !portal.is_null() && !(*portal).holdSnapshot.is_null() && !(*portal).resowner.is_null() {
            pg_sys::UnregisterSnapshotFromOwner((*portal).holdSnapshot, (*portal).resowner);
            (*portal).holdSnapshot = std::ptr::null_mut();
        }
        pg_sys::ForgetPortalSnapshots();
        pg_sys::InvalidateCatalogSnapshot();
    }
}

/// Takes a snapshot again, if there is none.
pub fn ensure_snapshot() {
    // SAFETY: in a procedure, whose portal is the active one.
    unsafe { pg_sys::EnsurePortalSnapshotExists() }
}

/// When the client's statement began: another for each, as a mark.
pub fn statement_start() -> i64 {
    // SAFETY: reads a variable of this process.
    unsafe { pg_sys::GetCurrentStatementStartTimestamp() }
}
