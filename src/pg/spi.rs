//! Statements through the executor: for everything that is not hot, and for whatever must respect triggers,
//! constraints and privileges. Names never get into a statement but through [`quoted`]; values are bound.
//!
//! Statements run in the caller's search_path, so each one qualifies every name and operator in it.

use crate::pg::call::Value;
use crate::pg::table::Snapshot;
use pgrx::pg_sys;
use std::ffi::CString;

/// A kept plan. Freed with [`Plan::free`]; otherwise it lives as long as the process.
#[derive(Clone, Copy)]
pub struct Plan(pg_sys::SPIPlanPtr);

/// What a statement gave.
pub struct Outcome {
    /// Rows touched or returned.
    pub processed: u64,
    /// The returned rows.
    pub rows: Vec<Vec<Value>>,
}

/// An identifier, quoted for use in a statement.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn connect() {
    // SAFETY: in a transaction; each connect is followed by finish, or by the abort that cleans up.
    unsafe { pg_sys::SPI_connect() };
}

fn finish() {
    // SAFETY: after connect.
    unsafe { pg_sys::SPI_finish() };
}

/// Prepares a statement to be kept.
pub fn prepare(statement: &str, types: &[u32]) -> Plan {
    let statement = CString::new(statement).unwrap_or_default();
    let mut types: Vec<pg_sys::Oid> = types.iter().map(|oid| (*oid).into()).collect();
    connect();
    // SAFETY: connected; SPI_keepplan moves the plan to a context that lives on. An ERROR for a statement that
    // does not parse unwinds.
    let plan = unsafe {
        let plan = pg_sys::SPI_prepare(statement.as_ptr(), types.len() as _, types.as_mut_ptr());
        assert!(!plan.is_null(), "SPI_prepare failed");
        pg_sys::SPI_keepplan(plan);
        plan
    };
    finish();
    Plan(plan)
}

impl Plan {
    /// Frees it.
    pub fn free(self) {
        // SAFETY: a kept plan, not used after this.
        unsafe { pg_sys::SPI_freeplan(self.0) };
    }

    /// Runs it. `snapshot`: what a statement sees that must see more than its transaction does (REPEATABLE
    /// READ); `None` for the usual. Returned rows are copied into the current memory context.
    pub fn run(self, values: &[Value], snapshot: Option<&Snapshot>) -> Outcome {
        connect();
        // SAFETY: connected; the values are as many and of the types that the plan was prepared with.
        let outcome = unsafe { execute(self.0, values, snapshot) };
        finish();
        outcome
    }
}

/// # Safety
/// Connected; the values are as many and of the types that the plan was prepared with.
unsafe fn execute(plan: pg_sys::SPIPlanPtr, values: &[Value], snapshot: Option<&Snapshot>) -> Outcome {
    let mut datums: Vec<pg_sys::Datum> =
        values.iter().map(|v| v.datum().unwrap_or(pg_sys::Datum::from(0))).collect();
    let nulls: Vec<std::ffi::c_char> =
        values.iter().map(|v| if v.is_null() { b'n' } else { b' ' } as _).collect();
    // SAFETY: the caller's promise; the result is copied out before SPI_finish frees it.
    unsafe {
        let code = pg_sys::SPI_execute_snapshot(
            plan,
            datums.as_mut_ptr(),
            nulls.as_ptr(),
            snapshot.map_or(std::ptr::null_mut(), Snapshot::raw),
            std::ptr::null_mut(),
            false,
            true,
            0,
        );
        assert!(code >= 0, "SPI_execute_snapshot failed: {code}");
        collect()
    }
}

/// # Safety
/// Connected, after a statement.
unsafe fn collect() -> Outcome {
    // SAFETY: SPI_tuptable describes the last statement's rows; columns are counted from 1 (SPI_getbinval).
    unsafe {
        let processed = pg_sys::SPI_processed;
        let table = pg_sys::SPI_tuptable;
        let mut rows = Vec::new();
        if !table.is_null() {
            let descriptor = (*table).tupdesc;
            let columns = (*descriptor).natts;
            for r in 0..(*table).numvals as usize {
                let tuple = *(*table).vals.add(r);
                let row = (1..=columns)
                    .map(|c| {
                        let mut is_null = false;
                        let datum = pg_sys::SPI_getbinval(tuple, descriptor, c, &mut is_null);
                        if is_null {
                            return Value::NULL;
                        }
                        let (mut len, mut by_val) = (0i16, false);
                        pg_sys::get_typlenbyval(pg_sys::SPI_gettypeid(descriptor, c), &mut len, &mut by_val);
                        // Copies to the context that was current before SPI_connect.
                        Value::of_datum(pg_sys::SPI_datumTransfer(datum, by_val, len.into()))
                    })
                    .collect();
                rows.push(row);
            }
        }
        Outcome { processed, rows }
    }
}

/// Does `f`, and gives back what memory of Postgres it asked for: what statements return does not pile up from one
/// chunk of work to the next. The result must not point there. After an ERROR Postgres does the same.
pub fn in_passing<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: the context is a child of the current one, and deleted while that is the current one again.
    unsafe {
        let context = pg_sys::AllocSetContextCreateInternal(
            pg_sys::CurrentMemoryContext,
            c"pg_queue chunk".as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as _,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as _,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as _,
        );
        let caller = pg_sys::MemoryContextSwitchTo(context);
        let result = f();
        pg_sys::MemoryContextSwitchTo(caller);
        pg_sys::MemoryContextDelete(context);
        result
    }
}

/// Prepares, runs and forgets a statement.
pub fn run(statement: &str, types: &[u32], values: &[Value]) -> Outcome {
    once(statement, types, values, false)
}

/// The same under a snapshot that sees more than the transaction's own does (REPEATABLE READ).
pub fn run_under(snapshot: &Snapshot, statement: &str, types: &[u32], values: &[Value]) -> Outcome {
    let statement = CString::new(statement).unwrap_or_default();
    let mut types: Vec<pg_sys::Oid> = types.iter().map(|oid| (*oid).into()).collect();
    connect();
    // SAFETY: connected, as the plan, which is not kept, wants until its end. An ERROR for a statement that does not
    // parse unwinds.
    let outcome = unsafe {
        let plan = pg_sys::SPI_prepare(statement.as_ptr(), types.len() as _, types.as_mut_ptr());
        assert!(!plan.is_null(), "SPI_prepare failed");
        execute(plan, values, Some(snapshot))
    };
    finish();
    outcome
}

/// The same for a statement that only looks, under the active snapshot; works on a standby.
pub fn look(statement: &str, types: &[u32], values: &[Value]) -> Outcome {
    once(statement, types, values, true)
}

fn once(statement: &str, types: &[u32], values: &[Value], read_only: bool) -> Outcome {
    let statement = CString::new(statement).unwrap_or_default();
    let mut types: Vec<pg_sys::Oid> = types.iter().map(|oid| (*oid).into()).collect();
    let mut datums: Vec<pg_sys::Datum> =
        values.iter().map(|v| v.datum().unwrap_or(pg_sys::Datum::from(0))).collect();
    let nulls: Vec<std::ffi::c_char> =
        values.iter().map(|v| if v.is_null() { b'n' } else { b' ' } as _).collect();
    // SAFETY: as in `Plan::run`.
    unsafe {
        connect();
        let code = pg_sys::SPI_execute_with_args(
            statement.as_ptr(),
            types.len() as _,
            types.as_mut_ptr(),
            datums.as_mut_ptr(),
            nulls.as_ptr(),
            read_only,
            0,
        );
        assert!(code >= 0, "SPI_execute_with_args failed: {code}");
        let outcome = collect();
        finish();
        outcome
    }
}
