//! Everything that can go wrong for a user, and how it is told: one enum, one map to SQLSTATE, detail and hint.
//! Owns no policy; raises nothing except at the boundary ([`Error::raise`]).

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode};

/// The extension's errors. Texts follow Postgres' style: lower case, no full stop.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// 55000: the library is not in shared_preload_libraries, so there is no dispatcher.
    NotPreloaded,
    /// 42704.
    QueueUnknown { queue: String },
    /// 42710.
    QueueExists { queue: String },
    /// 42710: a table that is no queue has the name.
    TableExists { name: String },
    /// 42710: a queue of that name was dropped or renamed by plain SQL, and its archive is still there.
    ArchiveLeft { queue: String },
    /// 42602: a name that no table can have.
    NameInvalid { name: String, why: &'static str },
    /// 22023.
    Argument { argument: &'static str, value: String, allowed: String },
    /// 22023: a rule between arguments.
    Arguments { message: String, hint: Option<String> },
    /// 22004.
    Null { argument: &'static str, hint: Option<&'static str> },
    /// 0A000: named in the reference, not built yet.
    NotBuilt { what: String },
    /// 0A000: will not work, for a reason.
    Unsupported { what: String, hint: Option<String> },
    /// 42501.
    Denied { action: &'static str, queue: String, needs: String },
    /// 42501: no USAGE on the schema of the queues.
    SchemaDenied,
    /// 55006: queue or archive holds rows.
    NotEmpty { queue: String },
    /// 55006: another queue sends its dead letters here.
    DeadLetterTarget { queue: String, of: String },
    /// 55006: another session is restoring the queue's leases, and a worker waits for nobody.
    BeingRestored { queue: String },
    /// 55000: there is no worker, and the queue's leases must be on disk.
    NoWorker { queue: String },
    /// 55000: a lease of a queue with durable leases ended before it was on disk.
    LeaseOver { queue: String, msg_id: i64 },
    /// 53400: a bound of the server is reached.
    Full { what: &'static str, hint: String },
    /// 53200.
    Memory,
    /// 25006: on a standby, or in a read-only transaction.
    ReadOnly { what: &'static str },
    /// 25000: in a parallel worker.
    Parallel,
    /// P0002: with strict, a finish that did nothing.
    Lost { queue: String, msg_id: i64 },
    /// 55000: the table is not what queue_create made.
    Broken { queue: String, detail: String },
    /// 42704: a role or a capability that does not exist.
    Unknown { kind: &'static str, name: String, hint: Option<String> },
    /// 22023: JSON of another shape.
    Entry { index: usize, problem: String },
}

/// What the extension's functions return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An argument outside its range.
    pub fn argument(argument: &'static str, value: impl ToString, allowed: impl Into<String>) -> Error {
        Error::Argument { argument, value: value.to_string(), allowed: allowed.into() }
    }

    fn report(&self) -> ErrorReport {
        use PgSqlErrorCode as Code;
        let (code, message, detail, hint): (Code, String, Option<String>, Option<String>) = match self {
            Error::NotPreloaded => (
                Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                "pg_queue is not loaded by the server".into(),
                Some("The dispatcher lives in shared memory that is set up when the server starts.".into()),
                Some("Add the line \"shared_preload_libraries = 'pg_queue'\" to postgresql.conf and restart the server.".into()),
            ),
            Error::QueueUnknown { queue } => (
                Code::ERRCODE_UNDEFINED_OBJECT,
                format!("queue \"{queue}\" does not exist"),
                None,
                Some("Create it with queue_create.".into()),
            ),
            Error::QueueExists { queue } => {
                (Code::ERRCODE_DUPLICATE_OBJECT, format!("queue \"{queue}\" already exists"), None, None)
            }
            Error::TableExists { name } => (
                Code::ERRCODE_DUPLICATE_OBJECT,
                format!("a table \"{name}\" already exists in schema queue, and is no queue"),
                Some("What queue_create has made, and a restore without the data of queue_catalog.queue has brought here, becomes a queue again where its owner, who must own the archive too, creates it. This is something else.".into()),
                Some("Drop it, or rename it with ALTER TABLE.".into()),
            ),
            Error::ArchiveLeft { queue } => (
                Code::ERRCODE_DUPLICATE_OBJECT,
                format!("an archive \"{queue}\" already exists"),
                Some("It is left from a queue whose table was dropped or renamed without it.".into()),
                Some("Drop it with DROP TABLE queue_archive.<name>; a superuser may also rename it.".into()),
            ),
            Error::NameInvalid { name, why } => {
                (Code::ERRCODE_INVALID_NAME, format!("invalid queue name \"{name}\""), Some((*why).into()), None)
            }
            Error::Argument { argument, value, allowed } => (
                Code::ERRCODE_INVALID_PARAMETER_VALUE,
                format!("invalid value for argument \"{argument}\": {value}"),
                Some(format!("Allowed: {allowed}.")),
                None,
            ),
            Error::Arguments { message, hint } => {
                (Code::ERRCODE_INVALID_PARAMETER_VALUE, message.clone(), None, hint.clone())
            }
            Error::Null { argument, hint } => (
                Code::ERRCODE_NULL_VALUE_NOT_ALLOWED,
                format!("argument \"{argument}\" must not be null"),
                None,
                hint.map(Into::into),
            ),
            Error::NotBuilt { what } => (
                Code::ERRCODE_FEATURE_NOT_SUPPORTED,
                format!("{what} is not supported by this version of pg_queue"),
                None,
                None,
            ),
            Error::Unsupported { what, hint } => {
                (Code::ERRCODE_FEATURE_NOT_SUPPORTED, what.clone(), None, hint.clone())
            }
            Error::Denied { action, queue, needs } => (
                Code::ERRCODE_INSUFFICIENT_PRIVILEGE,
                format!("permission denied to {action} queue \"{queue}\""),
                Some(format!("This needs {needs}.")),
                None,
            ),
            Error::SchemaDenied => (
                Code::ERRCODE_INSUFFICIENT_PRIVILEGE,
                "permission denied for schema queue".into(),
                None,
                None,
            ),
            Error::NotEmpty { queue } => (
                Code::ERRCODE_OBJECT_IN_USE,
                format!("queue \"{queue}\" or its archive still holds messages"),
                None,
                Some("Use queue_drop(queue, force => true) to drop them too.".into()),
            ),
            Error::DeadLetterTarget { queue, of } => (
                Code::ERRCODE_OBJECT_IN_USE,
                format!("queue \"{queue}\" is the dead-letter queue of \"{of}\""),
                None,
                Some("Give that queue another one with queue_alter, or use force => true.".into()),
            ),
            Error::BeingRestored { queue } => (
                Code::ERRCODE_OBJECT_IN_USE,
                format!("leases of queue \"{queue}\" are being restored"),
                None,
                None,
            ),
            Error::NoWorker { queue } => (
                Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("cannot read queue \"{queue}\" while this database has no pg_queue worker"),
                Some("The queue has durable_leases: what is delivered is written to disk by the worker first.".into()),
                Some("See pg_queue.worker_enabled and max_worker_processes, or the server's log.".into()),
            ),
            Error::LeaseOver { queue, msg_id } => (
                Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("lease of message {msg_id} in queue \"{queue}\" ended before it was on disk"),
                Some("The queue has durable_leases: what is delivered is written to disk by the worker first.".into()),
                Some("Read again; if it happens often, raise visibility_timeout.".into()),
            ),
            Error::Full { what, hint } => {
                (Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, (*what).into(), None, Some(hint.clone()))
            }
            Error::Memory => (Code::ERRCODE_OUT_OF_MEMORY, "out of memory".into(), None, None),
            Error::ReadOnly { what } => (
                Code::ERRCODE_READ_ONLY_SQL_TRANSACTION,
                format!("cannot execute {what} in a read-only transaction or on a standby"),
                None,
                None,
            ),
            Error::Parallel => (
                Code::ERRCODE_INVALID_TRANSACTION_STATE,
                "cannot change messages or leases during a parallel operation".into(),
                None,
                None,
            ),
            Error::Lost { queue, msg_id } => (
                Code::ERRCODE_NO_DATA_FOUND,
                format!("message {msg_id} of queue \"{queue}\" is not there, or its lease is lost"),
                None,
                Some("Roll back: another consumer may have the message.".into()),
            ),
            Error::Broken { queue, detail } => (
                Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("table of queue \"{queue}\" is not intact"),
                Some(detail.clone()),
                None,
            ),
            Error::Unknown { kind, name, hint } => (
                Code::ERRCODE_UNDEFINED_OBJECT,
                format!("{kind} \"{name}\" does not exist"),
                None,
                hint.clone(),
            ),
            Error::Entry { index, problem } => (
                Code::ERRCODE_INVALID_PARAMETER_VALUE,
                format!("invalid entry {index} in argument \"entries\": {problem}"),
                Some("Each entry is a JSON object with the argument names of queue_send.".into()),
                None,
            ),
        };
        let mut report = ErrorReport::new(code, message, "pg_queue");
        if let Some(detail) = detail {
            report = report.set_detail(detail);
        }
        if let Some(hint) = hint {
            report = report.set_hint(hint);
        }
        report
    }

    /// For the server's log: the message, and what to do.
    pub fn in_a_line(&self) -> String {
        let report = self.report();
        match report.hint() {
            Some(hint) => format!("{}. {hint}", report.message()),
            None => report.message().to_owned(),
        }
    }

    /// Raises it as a Postgres ERROR. Only at the boundary to SQL, where nothing of ours is on the stack.
    pub fn raise(&self) -> ! {
        self.report().report(PgLogLevel::ERROR);
        unreachable!("an ERROR does not return")
    }
}
