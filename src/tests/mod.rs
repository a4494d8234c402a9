//! What one transaction does, seen from inside it. These tests are rolled back and never see a commit: what
//! commits, blocks, races or dies is tested in `pgrx-tests/`.
//!
//! Here is what the files share: running SQL, reading its rows as JSON, failing on purpose, undoing to a
//! savepoint, being another role. The tests follow each other ([`take_turn`]), because they make queues and roles of
//! the same names in one database. What a test sends is its own transaction's, so its leases are in the journal's
//! overlay and not in shared memory.

mod alter;
mod catalog;
mod create;
mod direct;
mod drop;
mod finish;
mod grant;
mod health;
mod input;
mod names;
mod peek;
mod plain_sql;
mod privileges;
mod read;
mod redrive;
mod retry;
mod savepoint;
mod schedule;
mod send;
mod triggers;

use pgrx::prelude::*;
use serde_json::{json, Value};
use std::cell::{Cell, RefCell};

/// What a statement that must fail said.
#[derive(Debug, PartialEq)]
pub struct Failure {
    pub sqlstate: String,
    pub message: String,
    pub detail: String,
    pub hint: String,
}

impl Failure {
    /// Whether it is what was expected; empty detail and hint mean that there is none.
    #[track_caller]
    pub fn is(&self, sqlstate: &str, message: &str, detail: &str, hint: &str) {
        let found = (&*self.sqlstate, &*self.message, &*self.detail, &*self.hint);
        assert_eq!(found, (sqlstate, message, detail, hint));
    }

    /// The same for an error that Postgres itself words: SQLSTATE and a part of the message.
    #[track_caller]
    pub fn says(&self, sqlstate: &str, part: &str) {
        assert!(
            self.sqlstate == sqlstate && self.message.contains(part),
            "{sqlstate} ... {part} ... != {self:?}"
        );
    }

    /// An argument whose capability is not built.
    #[track_caller]
    pub fn is_unbuilt(&self, argument: &str) {
        let message = format!("argument \"{argument}\" is not supported by this version of pg_queue");
        self.is("0A000", &message, "", "");
    }

    /// An argument outside its range: the value is named, and the range.
    #[track_caller]
    pub fn is_out_of_range(&self, argument: &str, value: &str, allowed: &str) {
        let message = format!("invalid value for argument \"{argument}\": {value}");
        self.is("22023", &message, &format!("Allowed: {allowed}."), "");
    }

    /// A null where none is allowed.
    #[track_caller]
    pub fn is_null(&self, argument: &str) {
        assert_eq!(
            (&*self.sqlstate, &*self.message),
            ("22004", &*format!("argument \"{argument}\" must not be null")),
            "{self:?}"
        );
    }

    /// A queue that is not there.
    #[track_caller]
    pub fn is_unknown_queue(&self, queue: &str) {
        let message = format!("queue \"{queue}\" does not exist");
        self.is("42704", &message, "", "Create it with queue_create.");
    }

    /// Rights are missing; the action is named, and what it needs.
    #[track_caller]
    pub fn is_denied(&self, action: &str, queue: &str, needs: &str) {
        let message = format!("permission denied to {action} queue \"{queue}\"");
        self.is("42501", &message, &format!("This needs {needs}."), "");
    }
}

/// Waits, once in a test, until no other test runs: two transactions that make a queue of the same name would wait
/// for each other at places that differ, and deadlock. The lock goes with the transaction.
fn take_turn() {
    thread_local!(static IS_OURS: Cell<bool> = const { Cell::new(false) });
    const KEY: i64 = 0x7067_5f71_7565_7565;
    if !IS_OURS.replace(true) {
        Spi::run(&format!("SELECT pg_catalog.pg_advisory_xact_lock({KEY})")).unwrap();
    }
}

/// Runs statements whose results do not matter.
#[track_caller]
pub fn run(sql: &str) {
    take_turn();
    if let Err(error) = Spi::run(sql) {
        panic!("{sql}: {error}");
    }
}

/// The rows of a query, each a JSON object.
#[track_caller]
pub fn rows(query: &str) -> Vec<Value> {
    take_turn();
    let sql =
        format!("SELECT coalesce(pg_catalog.jsonb_agg(pg_catalog.to_jsonb(x)), '[]') FROM ({query}) AS x");
    match Spi::get_one::<pgrx::JsonB>(&sql) {
        Ok(Some(pgrx::JsonB(Value::Array(rows)))) => rows,
        other => panic!("{query}: {:?}", other.map(|json| json.map(|json| json.0))),
    }
}

/// The only column of a query.
#[track_caller]
pub fn column(query: &str) -> Vec<Value> {
    let only = |row: Value| match row {
        Value::Object(fields) if fields.len() == 1 => fields.into_iter().next().map_or(Value::Null, |f| f.1),
        other => panic!("{query}: one column expected, not {other}"),
    };
    rows(query).into_iter().map(only).collect()
}

/// The only value of a query.
#[track_caller]
pub fn value(query: &str) -> Value {
    let mut values = column(query);
    assert_eq!(values.len(), 1, "{query}: one row expected, not {values:?}");
    values.remove(0)
}

/// A condition.
#[track_caller]
pub fn is(condition: &str) -> bool {
    value(&format!("SELECT {condition}")) == json!(true)
}

/// A whole number.
#[track_caller]
pub fn number(query: &str) -> i64 {
    let value = value(query);
    value.as_i64().unwrap_or_else(|| panic!("{query}: a number expected, not {value}"))
}

/// Runs a statement that must fail, in a subtransaction, and returns what it said.
#[track_caller]
pub fn fails(sql: &str) -> Failure {
    run(&format!(
        "DO $fails$ DECLARE s text := ''; m text := ''; d text := ''; h text := ''; BEGIN \
           BEGIN EXECUTE $sql${sql}$sql$; \
           EXCEPTION WHEN OTHERS THEN GET STACKED DIAGNOSTICS s = RETURNED_SQLSTATE, m = MESSAGE_TEXT, \
             d = PG_EXCEPTION_DETAIL, h = PG_EXCEPTION_HINT; \
           END; \
           PERFORM pg_catalog.set_config('queue_tests.failure', \
             pg_catalog.json_build_array(s, m, d, h)::pg_catalog.text, true); \
         END $fails$"
    ));
    let said = Spi::get_one::<String>("SELECT pg_catalog.current_setting('queue_tests.failure')");
    let said: [String; 4] = serde_json::from_str(&said.unwrap().unwrap()).unwrap();
    let [sqlstate, message, detail, hint] = said;
    assert_ne!(sqlstate, "", "did not fail: {sql}");
    Failure { sqlstate, message, detail, hint }
}

/// Runs plpgsql statements in a subtransaction that is then rolled back.
#[track_caller]
pub fn undone(body: &str) {
    run(&format!(
        "DO $undone$ BEGIN BEGIN {body} RAISE EXCEPTION USING ERRCODE = 'UNDO1'; \
         EXCEPTION WHEN SQLSTATE 'UNDO1' THEN NULL; END; END $undone$"
    ));
}

/// Runs plpgsql statements in a subtransaction that is kept.
#[track_caller]
pub fn kept(body: &str) {
    run(&format!("DO $kept$ BEGIN BEGIN {body} EXCEPTION WHEN SQLSTATE 'UNDO1' THEN NULL; END; END $kept$"));
}

/// Makes a role that may use schema public and nothing else.
pub fn make_role(role: &str) {
    run(&format!("CREATE ROLE {role}"));
}

/// Does something as another role.
pub fn as_role<R>(role: &str, f: impl FnOnce() -> R) -> R {
    run(&format!("SET LOCAL ROLE {role}"));
    let result = f();
    run("RESET ROLE");
    result
}

thread_local!(static HEARD: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) });

/// The notices and warnings that a statement gives.
#[allow(unsafe_code)] // the only place where the server tells of notices is a hook
pub fn notices(sql: &str) -> Vec<String> {
    #[pg_guard]
    unsafe extern "C-unwind" fn hear(error: *mut pg_sys::ErrorData) {
        // SAFETY: Postgres calls the hook with the report at hand, whose message is null or a C string.
        unsafe {
            let level = (*error).elevel as u32;
            if (level == pg_sys::NOTICE || level == pg_sys::WARNING) && !(*error).message.is_null() {
                let message = std::ffi::CStr::from_ptr((*error).message).to_string_lossy().into_owned();
                HEARD.with_borrow_mut(|heard| heard.push(message));
            }
        }
    }
    run("SET LOCAL log_min_messages = notice");
    HEARD.with_borrow_mut(Vec::clear);
    // SAFETY: a variable of this process, which has one thread; the hook is taken off below. Should the statement
    // fail, the test fails, and the hook only goes on collecting until the process ends with it.
    let previous = unsafe {
        let previous = pg_sys::emit_log_hook;
        pg_sys::emit_log_hook = Some(hear);
        previous
    };
    run(sql);
    // SAFETY: as above.
    unsafe { pg_sys::emit_log_hook = previous };
    HEARD.with_borrow_mut(std::mem::take)
}
