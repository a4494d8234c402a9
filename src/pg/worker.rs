//! Background workers: registering them, starting up in one, transactions in one. Owns no duty of theirs.

use pgrx::bgworkers::{BackgroundWorkerBuilder, BgWorkerStartTime, DynamicBackgroundWorker};
use pgrx::{pg_sys, PgTryBuilder};
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

unsafe extern "C-unwind" {
    // Declared anew: pgrx binds these as Rust functions, which cannot be signal handlers.
    fn die(signal: std::ffi::c_int);
    fn SignalHandlerForConfigReload(signal: std::ffi::c_int);
    /// utils/timeout.h; pgrx does not bind these.
    fn enable_timeout_after(id: std::ffi::c_int, delay_ms: std::ffi::c_int);
    fn disable_timeout(id: std::ffi::c_int, keep_indicator: bool);
    fn RegisterTimeout(id: std::ffi::c_int, handler: extern "C-unwind" fn()) -> std::ffi::c_int;
}

/// STATEMENT_TIMEOUT in utils/timeout.h, in all versions. InitPostgres registers it in every process; a worker with a
/// database has its signal's handler (BackgroundWorkerMain).
const STATEMENT_TIMEOUT: std::ffi::c_int = 3;
/// How long what a queue's owner has put on his tables (triggers, constraints, functions in an index) may run in a
/// worker at a time, milliseconds.
const OWNERS_MS: std::ffi::c_int = 10_000;
/// USER_TIMEOUT in utils/timeout.h from 17 on; before, the one behind it. For either, RegisterTimeout gives one that is
/// free for extensions.
const USER_TIMEOUT: std::ffi::c_int = 13;
/// What still runs so long after it was cancelled, milliseconds, has caught that, and may do so for ever.
const GRACE_MS: std::ffi::c_int = 1_000;

thread_local! {
    /// This process is a worker of ours, and not a session or somebody else's worker.
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
    /// In [`limited`].
    static IS_LIMITED: Cell<bool> = const { Cell::new(false) };
    /// Since then.
    static LIMITED_SINCE: Cell<Option<Instant>> = const { Cell::new(None) };
    /// What an owner has put on his tables has run in this transaction.
    static HAS_RUN_OWNERS: Cell<bool> = const { Cell::new(false) };
    /// The table that this transaction has turned to last, and its name.
    static AT: RefCell<(u32, String)> = const { RefCell::new((0, String::new())) };
    /// The name of the database, once a transaction has looked. Who renames it ends its worker first.
    static DATABASE: RefCell<String> = const { RefCell::new(String::new()) };
    /// The timeout that ends a worker of ours.
    static END_TIMEOUT: Cell<std::ffi::c_int> = const { Cell::new(USER_TIMEOUT) };
}

/// The time of [`limited`] is long over.
static HAS_OVERSTAYED: AtomicBool = AtomicBool::new(false);

/// The handler of that timeout, in a signal's handler. What ends the process nobody can catch. If the process has not come
/// to see that it was cancelled (it did not run, and both times were over at once), its grace begins now.
extern "C-unwind" fn on_overstayed() {
    // SAFETY: a variable of this process. A timeout's handler may enable one: handle_sig_alarm looks at the list anew after
    // each, and its signal is blocked meanwhile.
    unsafe {
        if pg_sys::QueryCancelPending != 0 {
            enable_timeout_after(END_TIMEOUT.get(), GRACE_MS);
            return;
        }
    }
    HAS_OVERSTAYED.store(true, Ordering::Relaxed);
    // SAFETY: async-signal-safe; SIGTERM has its handler (`die`).
    unsafe { libc::raise(libc::SIGTERM) };
}

/// Somebody terminates this process (or it does so itself, see above): Postgres has forgotten that when it ends.
static WAS_TERMINATED: AtomicBool = AtomicBool::new(false);

/// The handler of SIGTERM.
extern "C-unwind" fn on_terminated(signal: std::ffi::c_int) {
    WAS_TERMINATED.store(true, Ordering::Relaxed);
    // SAFETY: Postgres' own handler, in a signal's handler.
    unsafe { die(signal) };
}

/// Whether this worker, which ends, does so because of what it had limited: that did not end in time, or has made an
/// error of its own one that ends the process (exit_on_error, transaction_timeout).
pub fn is_ended_by_owner() -> bool {
    let is_from_outside = || {
        // SAFETY: reads a variable of this process. Who has lost the postmaster is another process' child.
        WAS_TERMINATED.load(Ordering::Relaxed) || unsafe { pg_sys::PostmasterPid != libc::getppid() }
    };
    HAS_OVERSTAYED.load(Ordering::Relaxed) || IS_LIMITED.get() && !is_from_outside()
}

/// This transaction turns to a table: should it fail, the log says where.
pub fn turn_to(relation: u32) {
    let name = super::user::relation_full_name(relation).unwrap_or_default();
    AT.set((relation, name));
}

/// The table that it has turned to last.
pub fn turned_to() -> u32 {
    AT.with_borrow(|at| at.0)
}

/// Where this worker is, for the log: `database "x", table queue.y`.
pub fn place() -> String {
    let mut place = DATABASE.with_borrow(|database| match database.as_str() {
        "" => String::new(),
        name => format!("database \"{name}\""),
    });
    AT.with_borrow(|(relation, name)| match (*relation, name.as_str()) {
        (0, _) => {}
        (relation, "") => place += &format!(", table {relation}"),
        (_, name) => place += &format!(", table {name}"),
    });
    place
}

/// Does `f`, in a worker of ours for so long at most: then it is cancelled, with an ERROR; and if it catches that, the
/// worker ends. A call within a call gets no time of its own.
pub fn limited<R>(f: impl FnOnce() -> R) -> R {
    if !IS_OURS.get() || IS_LIMITED.replace(true) {
        return f();
    }
    HAS_RUN_OWNERS.set(true);
    LIMITED_SINCE.set(Some(Instant::now()));
    // SAFETY: both timeouts are registered.
    unsafe {
        enable_timeout_after(STATEMENT_TIMEOUT, OWNERS_MS);
        enable_timeout_after(END_TIMEOUT.get(), OWNERS_MS + GRACE_MS);
    }
    let result = f();
    end_limit();
    result
}

/// Also where the time was over, and nobody has looked yet.
fn end_limit() {
    IS_LIMITED.set(false);
    // SAFETY: the timeouts are registered; the first one's handler sets the flag, which only this process reads.
    unsafe {
        disable_timeout(STATEMENT_TIMEOUT, false);
        disable_timeout(END_TIMEOUT.get(), false);
        pg_sys::QueryCancelPending = 0;
    }
}

/// Whether the server is loading the libraries of shared_preload_libraries: only then can shared memory and
/// static workers be asked for.
pub fn is_preloading() -> bool {
    // SAFETY: a variable of this process.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// Refuses settings of this prefix that are not defined.
pub fn reserve_settings(prefix: &'static std::ffi::CStr) {
    // SAFETY: in `_PG_init`; the name is null-terminated, and copied.
    unsafe { pg_sys::MarkGUCPrefixReserved(prefix.as_ptr()) }
}

/// Whether pg_upgrade runs this server: then nothing of ours must.
pub fn is_binary_upgrade() -> bool {
    // SAFETY: a variable of this process.
    unsafe { pg_sys::IsBinaryUpgrade }
}

/// Registers a worker that runs as long as the server does, from the end of recovery on.
pub fn register(name: &str, function: &str) {
    BackgroundWorkerBuilder::new(name)
        .set_type(name)
        .set_library("pg_queue")
        .set_function(function)
        .enable_spi_access()
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(1)))
        .load();
}

/// A worker that was started by [`start`].
pub struct Started(DynamicBackgroundWorker);

/// Starts a worker for a database; it is not started again by itself. `None`: max_worker_processes are in use.
pub fn start(name: &str, kind: &str, function: &str, database: u32) -> Option<Started> {
    BackgroundWorkerBuilder::new(name)
        .set_type(kind)
        .set_library("pg_queue")
        .set_function(function)
        .enable_spi_access()
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(None)
        .set_argument(Some(pg_sys::Datum::from(database)))
        .set_notify_pid(super::latch::my_pid() as i32)
        .load_dynamic()
        .ok()
        .map(Started)
}

impl Started {
    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        use pgrx::bgworkers::BackgroundWorkerStatus as Status;
        matches!(self.0.pid(), Err(Status::Stopped | Status::PostmasterDied))
    }
}

/// Makes this process a proper worker: signals first, then the connection. `database`: 0 = the shared catalogs
/// only.
pub fn begin(database: u32) {
    IS_OURS.set(true);
    // SAFETY: the first thing a worker's main function does. SIGTERM is served by CHECK_FOR_INTERRUPTS (as of `die`),
    // and its handler is there before signals are let through.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        {
            pg_sys::pqsignal(libc::SIGTERM, Some(on_terminated));
            pg_sys::pqsignal(libc::SIGHUP, Some(SignalHandlerForConfigReload));
        }
        #[cfg(feature = "pg18")]
        {
            pg_sys::pqsignal_be(libc::SIGTERM, Some(on_terminated));
            pg_sys::pqsignal_be(libc::SIGHUP, Some(SignalHandlerForConfigReload));
        }
        pg_sys::BackgroundWorkerUnblockSignals();
        if database == 0 {
            pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
        } else {
            pg_sys::BackgroundWorkerInitializeConnectionByOid(database.into(), pg_sys::InvalidOid, 0);
        }
    }
    // Whatever ALTER DATABASE ... SET session_authorization says; SET role is among the settings below.
    // SAFETY: this process is authenticated as this role (InitializeSessionUserIdStandalone).
    unsafe { pg_sys::SetSessionAuthorization(pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID), true) };
    // SAFETY: timeouts were set up by the connection, and this is one for extensions; once per process.
    END_TIMEOUT.set(unsafe { RegisterTimeout(USER_TIMEOUT, on_overstayed) });
    // SAFETY: set by the postmaster before a worker's main function is called; its name is null-terminated.
    let name = unsafe { std::ffi::CStr::from_ptr((*pg_sys::MyBgworkerEntry).bgw_name.as_ptr()) };
    for (name, value) in [(c"application_name", name)].iter().chain(SETTINGS) {
        // SAFETY: both are null-terminated and copied; each version knows all of its names.
        unsafe {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_OVERRIDE,
            );
        }
    }
}

/// What a worker must not take over from a database's or the server's settings (the model is autovacuum's).
/// Housekeeping never waits for a standby either: that can hang a fast shutdown. It takes no lock that it would have to
/// wait for; what the owner's triggers and constraints wait for is not ours to choose, but it gives up before anybody's
/// deadlock_timeout.
const SETTINGS: &[(&std::ffi::CStr, &std::ffi::CStr)] = &[
    (c"synchronous_commit", c"local"),
    (c"default_transaction_read_only", c"off"),
    (c"default_transaction_isolation", c"read committed"),
    (c"statement_timeout", c"0"),
    (c"lock_timeout", c"500ms"),
    (c"idle_in_transaction_session_timeout", c"0"),
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    (c"transaction_timeout", c"0"),
    (c"search_path", c""),
    (c"role", c"none"),
];

/// Whether this process is a worker of ours.
pub fn is_ours() -> bool {
    IS_OURS.get()
}

/// Whether there is a changed configuration to be taken in. To be asked just before a sleep: its signal sets the latch, but
/// whatever has waited for something else since may have reset that.
pub fn is_reload_pending() -> bool {
    // SAFETY: ConfigReloadPending is set by the signal handler; read and cleared in the main loop only.
    unsafe { std::ptr::read_volatile(&raw const pg_sys::ConfigReloadPending) != 0 }
}

/// Takes in a changed configuration, if there is one.
pub fn reload_config() -> bool {
    let is_pending = is_reload_pending();
    if is_pending {
        // SAFETY: as above.
        unsafe {
            pg_sys::ConfigReloadPending = 0;
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
    }
    is_pending
}

/// Shows in pg_stat_activity what the worker does; empty = idle.
pub fn show(activity: &str) {
    let text = std::ffi::CString::new(activity).unwrap_or_default();
    let state = if activity.is_empty() {
        pg_sys::BackendState::STATE_IDLE
    } else {
        pg_sys::BackendState::STATE_RUNNING
    };
    // SAFETY: the text is copied.
    unsafe { pg_sys::pgstat_report_activity(state, text.as_ptr()) };
}

/// A boolean as settings are written: `on`, `no`, `0`; `None` if it is none.
pub fn parse_bool(text: &str) -> Option<bool> {
    let text = std::ffi::CString::new(text).ok()?;
    let mut value = false;
    // SAFETY: reads a string that ends in a zero byte, writes one bool.
    unsafe { pg_sys::parse_bool(text.as_ptr(), &mut value) }.then_some(value)
}

/// Runs `f` in a transaction of its own, with a snapshot. An error of ours or an ERROR rolls it back, is written to
/// the server's log and gives `None`; an interrupt (shutdown) goes on.
pub fn transaction<R>(what: &str, f: impl FnOnce() -> crate::Result<R>) -> Option<R> {
    show(what);
    AT.take();
    // SAFETY: the usual frame of a worker's transaction (worker_spi.c); on an ERROR the transaction is aborted,
    // which releases everything it held.
    let result = unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let body = std::panic::AssertUnwindSafe(|| {
            know_database();
            fire_at_once();
            let result = f().unwrap_or_else(|error| error.raise());
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
            Some(result)
        });
        PgTryBuilder::new(body)
            .catch_others(|error| {
                let line = match &error {
                    pg_sys::panic::CaughtError::PostgresError(report)
                    | pg_sys::panic::CaughtError::ErrorReport(report)
                    | pg_sys::panic::CaughtError::RustPanic { ereport: report, .. } => failure(what, report),
                };
                end_limit(); // first: however long the abort takes is not the owner's doing
                pg_sys::AbortCurrentTransaction();
                pgrx::log!("{line}");
                None
            })
            .execute()
    };
    if HAS_RUN_OWNERS.replace(false) {
        // Advisory locks that an owner's code has taken for the session: this one is nobody's. The transaction's own are
        // gone already.
        // SAFETY: outside a transaction, as when a session ends (ShutdownPostgres).
        unsafe { pg_sys::LockReleaseAll(pg_sys::USER_LOCKMETHOD as _, true) };
    }
    report_statistics(false);
    show("");
    result
}

/// Has what the worker did show in the statistics: at the latest a while from now, or at once (`is_last`: nothing will
/// be done for a while). Outside a transaction.
pub fn report_statistics(is_last: bool) {
    // SAFETY: outside a transaction.
    unsafe { pg_sys::pgstat_report_stat(is_last) };
}

/// Deferred triggers and constraints fire at the end of each statement instead: where an owner's code runs restricted
/// (which it does in every move), Postgres refuses to put it off.
fn fire_at_once() {
    // SAFETY: SET CONSTRAINTS ALL IMMEDIATE, at the beginning of a transaction, in which nothing is deferred yet.
    unsafe {
        let mut all =
            pg_sys::ConstraintsSetStmt { type_: pg_sys::NodeTag::T_ConstraintsSetStmt, ..Default::default() };
        pg_sys::AfterTriggerSetState(&mut all);
    }
}

/// Remembers the database's name, in a transaction.
fn know_database() {
    let database = super::user::database();
    if database != 0 && DATABASE.with_borrow(String::is_empty) {
        DATABASE.set(super::user::database_name(database).unwrap_or_default());
    }
}

/// What the log says of a piece of work that failed. While `limited` is not undone yet.
fn failure(what: &str, report: &pg_sys::panic::ErrorReportWithLevel) -> String {
    let code = report.sql_error_code();
    let most = Duration::from_millis(OWNERS_MS as u64);
    let is_over = IS_LIMITED.get()
        && code == pgrx::PgSqlErrorCode::ERRCODE_QUERY_CANCELED
        && LIMITED_SINCE.get().is_some_and(|since| since.elapsed() >= most);
    let mut line = format!("pg_queue worker: {what} failed: ");
    if is_over {
        let seconds = most.as_secs();
        line += &format!("what the owner has put on the table took longer than {seconds} s, and was cancelled");
    } else {
        line += report.message();
    }
    line += &format!(" (SQLSTATE {}", sqlstate(code as i32));
    let place = place();
    if !place.is_empty() {
        line += &format!(", {place}");
    }
    line.push(')'); // the detail may hold a message
    line
}

/// The five characters of an SQLSTATE (MAKE_SQLSTATE in elog.h).
fn sqlstate(code: i32) -> String {
    (0..5).map(|place| char::from(((code >> (6 * place)) & 0x3f) as u8 + b'0')).collect()
}

/// The connectable databases that are no templates, for a worker on the shared catalogs, in a transaction.
pub fn databases() -> Vec<u32> {
    // SAFETY: the model is autovacuum's get_database_list: a catalog scan under a registered snapshot.
    unsafe {
        let relation = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as _);
        let scan = pg_sys::table_beginscan_catalog(relation, 0, std::ptr::null_mut());
        let mut found = Vec::new();
        loop {
            let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
            if tuple.is_null() {
                break;
            }
            let form = pg_sys::heap_tuple_get_struct::<pg_sys::FormData_pg_database>(tuple);
            // -2: a DROP DATABASE that did not come to its end (DATCONNLIMIT_INVALID_DB).
            if (*form).datallowconn && !(*form).datistemplate && (*form).datconnlimit != -2 {
                found.push((*form).oid.into());
            }
        }
        pg_sys::table_endscan(scan);
        pg_sys::relation_close(relation, pg_sys::AccessShareLock as _);
        found
    }
}

/// Whether this database has an extension of that name, in a transaction.
pub fn has_extension(name: &std::ffi::CStr) -> bool {
    // SAFETY: a catalog look-up; missing_ok.
    unsafe { pg_sys::get_extension_oid(name.as_ptr(), true) != pg_sys::InvalidOid }
}

/// Forgets what this process remembers of the catalogs. For one that is told of a commit by its callback: that runs
/// after the commit is visible, but before others hear that what they remember is out of date.
pub fn forget_catalogs() {
    // SAFETY: in a transaction that has nothing open yet.
    unsafe { pg_sys::InvalidateSystemCaches() }
}

/// Ends this worker, whose work is done, without complaint.
pub fn end() -> ! {
    #[allow(unreachable_code)] // only some versions' bindings know that it does not return
    // SAFETY: outside any transaction; a worker that is not to be restarted may exit with 0.
    unsafe {
        pg_sys::proc_exit(0);
        unreachable!("proc_exit returned")
    }
}

/// Calls `f` when this process ends, while shared memory is still there.
pub fn at_exit(f: fn()) {
    thread_local!(static AT_EXIT: std::cell::Cell<Option<fn()>> = const { std::cell::Cell::new(None) });
    #[pgrx::pg_guard]
    unsafe extern "C-unwind" fn on_exit(_code: std::ffi::c_int, _arg: pg_sys::Datum) {
        if let Some(f) = AT_EXIT.get() {
            f();
        }
    }
    AT_EXIT.set(Some(f));
    // SAFETY: the function stays loaded.
    unsafe { pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0)) };
}

/// Waits up to this long for a condition, looking every few milliseconds, serving interrupts.
pub fn wait_until(most: Duration, condition: impl Fn() -> bool) -> bool {
    let start = std::time::Instant::now();
    while !condition() {
        if start.elapsed() > most {
            return false;
        }
        super::latch::sleep(5, pg_sys::PG_WAIT_EXTENSION);
    }
    true
}

/// Declares the main functions of background workers: `name => f`, where `f` takes the worker's argument.
#[macro_export]
macro_rules! worker_mains {
    ($($name:ident => $function:path;)*) => {$(
        #[allow(unsafe_code)] // the entry points have to be exported under the names that workers are registered with
        const _: () = {
            #[unsafe(export_name = stringify!($name))]
            #[::pgrx::pg_guard]
            extern "C-unwind" fn main(argument: ::pgrx::pg_sys::Datum) {
                $function(argument.value() as u32)
            }
        };
    )*};
}
