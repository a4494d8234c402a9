//! Postgres' hooks and invalidations, told in plain calls: a table changed, was dropped, may look different; a
//! statement is about to need a database for itself. Owns the chain to other extensions' hooks.

use super::user;
use pgrx::{pg_guard, pg_sys, PgList};
use std::cell::Cell;

/// What to call when. All may raise, but for `relation_invalidated`.
#[derive(Clone, Copy)]
pub struct Hooks {
    /// DDL is changing this relation.
    pub table_altered: fn(u32),
    /// This relation was renamed.
    pub table_renamed: fn(u32),
    /// This table, whose owner was this role, may have another one now.
    pub table_reowned: fn(u32, u32),
    /// This relation is being dropped.
    pub table_dropped: fn(u32),
    /// What is remembered of this relation (0: of all) may be wrong. Called anywhere; only sets a flag.
    pub relation_invalidated: fn(u32),
    /// A statement needs this database without other sessions.
    pub database_wanted: fn(u32),
    /// That statement is over; the flag says whether the database is gone.
    pub database_released: fn(u32, bool),
    /// An extension was created or dropped, a database created, or made a template or none.
    pub extensions_changed: fn(),
    /// A prepared transaction was committed.
    pub prepared_committed: fn(),
    /// A subscription to another server's tables was altered or dropped.
    pub subscriptions_changed: fn(),
    /// A session listens to this channel, or will when its transaction commits.
    pub listening: fn(&str),
}

thread_local! {
    static HOOKS: Cell<Option<Hooks>> = const { Cell::new(None) };
}

static mut PREVIOUS_UTILITY: pg_sys::ProcessUtility_hook_type = None;
static mut PREVIOUS_ACCESS: pg_sys::object_access_hook_type = None;

/// Installs them, in `_PG_init`.
pub fn install(hooks: Hooks) {
    HOOKS.set(Some(hooks));
    // SAFETY: _PG_init runs once, before any hook is called; what was there is kept and called.
    unsafe {
        PREVIOUS_UTILITY = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(on_utility);
        PREVIOUS_ACCESS = pg_sys::object_access_hook;
        pg_sys::object_access_hook = Some(on_access);
    }
}

/// Has invalidations of relations reported from now on in this process (the list is not inherited: it is reset
/// when a backend starts).
pub fn watch_relations() {
    thread_local!(static WATCHED: Cell<bool> = const { Cell::new(false) });
    if !WATCHED.replace(true) {
        // SAFETY: the function stays loaded and has the type Postgres expects.
        unsafe { pg_sys::CacheRegisterRelcacheCallback(Some(on_relcache), pg_sys::Datum::from(0)) };
    }
}

/// Has every session look again at a relation, once this transaction commits.
pub fn invalidate_relation(oid: u32) {
    // SAFETY: the relation exists and is locked by the caller.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(oid.into()) }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_relcache(_arg: pg_sys::Datum, relation: pg_sys::Oid) {
    if let Some(hooks) = HOOKS.get() {
        (hooks.relation_invalidated)(relation.into());
    }
}

/// Not guarded, for the same reason as `on_utility`.
unsafe extern "C-unwind" fn on_access(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub: std::ffi::c_int,
    arg: *mut std::ffi::c_void,
) {
    // SAFETY: the previous hook is called as Postgres called us.
    unsafe {
        if let Some(previous) = PREVIOUS_ACCESS {
            previous(access, class, object, sub, arg);
        }
        note_access(access, class, object, sub);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn note_access(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub: std::ffi::c_int,
) {
    let Some(hooks) = HOOKS.get() else { return };
    if class == pg_sys::RelationRelationId {
        if access == pg_sys::ObjectAccessType::OAT_DROP && sub == 0 {
            (hooks.table_dropped)(object.into());
        } else if access == pg_sys::ObjectAccessType::OAT_POST_ALTER {
            (hooks.table_altered)(object.into());
        }
    }
    if class == pg_sys::ExtensionRelationId
        && (access == pg_sys::ObjectAccessType::OAT_POST_CREATE || access == pg_sys::ObjectAccessType::OAT_DROP)
    {
        (hooks.extensions_changed)();
    }
}

/// What a utility statement wants of us.
#[derive(Clone, Copy)]
#[repr(C)]
enum Concern {
    None,
    /// It needs this database for itself; `true`: it drops it.
    Database(u32, bool),
    /// From this template, 0 if none is named; or altered, so that it may get a worker now.
    DatabaseCreated(u32),
    Altered(u32),
    Renamed(u32),
    /// Given away; with its owner before.
    Reowned(u32, u32),
    PreparedCommitted,
    Subscriptions,
    /// Settings of databases are changed.
    Configured,
    Listening(*const std::ffi::c_char),
}

fn database_named(name: *const std::ffi::c_char) -> u32 {
    // SAFETY: a look-up in pg_database; missing_ok. The name is null-terminated, as the parser made it.
    unsafe {
        if name.is_null() {
            return 0;
        }
        pg_sys::get_database_oid(name, true).into()
    }
}

/// Which table a statement means, 0 for none: only to know, the statement itself looks it up again and locks it.
///
/// # Safety
/// `name` is a parse tree's, or null.
unsafe fn table_named(name: *mut pg_sys::RangeVar) -> u32 {
    if name.is_null() {
        return 0;
    }
    // SAFETY: a look-up without a lock; missing_ok.
    unsafe {
        pg_sys::RangeVarGetRelidExtended(
            name,
            pg_sys::NoLock as _,
            pg_sys::RVROption::RVR_MISSING_OK,
            None,
            std::ptr::null_mut(),
        )
        .into()
    }
}

/// # Safety
/// `statement` is a parse tree.
unsafe fn concern_of(statement: *mut pg_sys::Node) -> Concern {
    // SAFETY: the node's tag says what it is.
    unsafe {
        match (*statement).type_ {
            pg_sys::NodeTag::T_DropdbStmt => {
                let drop: *mut pg_sys::DropdbStmt = statement.cast();
                Concern::Database(database_named((*drop).dbname), true)
            }
            pg_sys::NodeTag::T_AlterDatabaseStmt => {
                let alter: *mut pg_sys::AlterDatabaseStmt = statement.cast();
                match option_named((*alter).options, c"tablespace") {
                    Some(_) => Concern::Database(database_named((*alter).dbname), false),
                    // Whether it is a template, or takes connections.
                    None => Concern::DatabaseCreated(0),
                }
            }
            pg_sys::NodeTag::T_AlterDatabaseSetStmt => Concern::Configured,
            pg_sys::NodeTag::T_ListenStmt => {
                Concern::Listening((*statement.cast::<pg_sys::ListenStmt>()).conditionname)
            }
            pg_sys::NodeTag::T_RenameStmt => {
                let rename: *mut pg_sys::RenameStmt = statement.cast();
                if (*rename).renameType == pg_sys::ObjectType::OBJECT_DATABASE {
                    Concern::Database(database_named((*rename).subname), false)
                } else if matches!(
                    (*rename).renameType,
                    // ALTER INDEX renames tables, too.
                    pg_sys::ObjectType::OBJECT_TABLE | pg_sys::ObjectType::OBJECT_INDEX
                ) && !(*rename).relation.is_null()
                {
                    match table_named((*rename).relation) {
                        0 => Concern::None,
                        table => Concern::Renamed(table),
                    }
                } else {
                    Concern::None
                }
            }
            // The access hook is not called for all of it in every version: not for triggers in 15.
            pg_sys::NodeTag::T_AlterTableStmt => {
                let alter: *mut pg_sys::AlterTableStmt = statement.cast();
                let gives_away = PgList::<pg_sys::AlterTableCmd>::from_pg((*alter).cmds)
                    .iter_ptr()
                    .any(|command| (*command).subtype == pg_sys::AlterTableType::AT_ChangeOwner);
                match table_named((*alter).relation) {
                    table if table != 0 && gives_away => Concern::Reowned(table, user::owner(table)),
                    table => Concern::Altered(table),
                }
            }
            pg_sys::NodeTag::T_AlterSubscriptionStmt | pg_sys::NodeTag::T_DropSubscriptionStmt => {
                Concern::Subscriptions
            }
            pg_sys::NodeTag::T_CreateTrigStmt => {
                Concern::Altered(table_named((*statement.cast::<pg_sys::CreateTrigStmt>()).relation))
            }
            pg_sys::NodeTag::T_CreatedbStmt => {
                let create: *mut pg_sys::CreatedbStmt = statement.cast();
                // TEMPLATE DEFAULT has no argument.
                let template = option_named((*create).options, c"template")
                    .filter(|option| !(**option).arg.is_null())
                    .map_or(0, |option| database_named(pg_sys::defGetString(option)));
                Concern::DatabaseCreated(template)
            }
            pg_sys::NodeTag::T_TransactionStmt => {
                let transaction: *mut pg_sys::TransactionStmt = statement.cast();
                if (*transaction).kind == pg_sys::TransactionStmtKind::TRANS_STMT_COMMIT_PREPARED {
                    Concern::PreparedCommitted
                } else {
                    Concern::None
                }
            }
            _ => Concern::None,
        }
    }
}

/// # Safety
/// `options` is a list of DefElem, or null.
unsafe fn option_named(options: *mut pg_sys::List, name: &std::ffi::CStr) -> Option<*mut pg_sys::DefElem> {
    // SAFETY: the caller's promise; names are null-terminated.
    unsafe {
        PgList::<pg_sys::DefElem>::from_pg(options)
            .iter_ptr()
            .find(|option| std::ffi::CStr::from_ptr((**option).defname) == name)
    }
}

unsafe extern "C-unwind" {
    // Declared anew: pgrx's binding catches an ERROR and raises another from the few fields it keeps.
    #[link_name = "standard_ProcessUtility"]
    #[allow(clippy::too_many_arguments)] // Postgres' signature
    fn standard_process_utility(
        statement: *mut pg_sys::PlannedStmt,
        query: *const std::ffi::c_char,
        read_only_tree: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        params: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        destination: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    );
}

/// Before the statement: what it wants of us, with what is to be done first done.
///
/// # Safety
/// `statement` is a utility statement.
#[pg_guard]
unsafe extern "C-unwind" fn before_utility(statement: *mut pg_sys::PlannedStmt) -> Concern {
    // SAFETY: the caller's promise.
    let concern = unsafe { concern_of((*statement).utilityStmt) };
    if let (Some(hooks), Concern::Database(oid, _) | Concern::DatabaseCreated(oid)) = (HOOKS.get(), &concern) {
        if *oid != 0 {
            (hooks.database_wanted)(*oid);
        }
    }
    concern
}

/// After the statement, if it did not fail: a request to stay away ends by itself.
#[pg_guard]
unsafe extern "C-unwind" fn after_utility(concern: Concern) {
    let Some(hooks) = HOOKS.get() else { return };
    match concern {
        Concern::Database(oid, drops) if oid != 0 => (hooks.database_released)(oid, drops),
        Concern::DatabaseCreated(template) => {
            if template != 0 {
                (hooks.database_released)(template, false);
            }
            (hooks.extensions_changed)();
        }
        Concern::Altered(table) if table != 0 => (hooks.table_altered)(table),
        Concern::Renamed(table) => (hooks.table_renamed)(table),
        Concern::Reowned(table, owner) => {
            (hooks.table_altered)(table);
            (hooks.table_reowned)(table, owner);
        }
        Concern::Subscriptions => (hooks.subscriptions_changed)(),
        Concern::PreparedCommitted => (hooks.prepared_committed)(),
        Concern::Configured => (hooks.extensions_changed)(),
        Concern::Listening(name) => {
            // SAFETY: the parse tree, which still stands, has the channel's name null-terminated.
            let channel = unsafe { std::ffi::CStr::from_ptr(name) };
            (hooks.listening)(&channel.to_string_lossy());
        }
        _ => {}
    }
}

/// Not guarded: an ERROR of the statement goes by as it is, with all of its fields. That is sound because nothing
/// in this frame has anything to drop; what of ours could panic is in guarded functions of its own.
#[allow(clippy::too_many_arguments)] // Postgres' signature
unsafe extern "C-unwind" fn on_utility(
    statement: *mut pg_sys::PlannedStmt,
    query: *const std::ffi::c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    destination: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: called by ProcessUtility with a utility statement; everything is passed on as it came.
    unsafe {
        let concern = before_utility(statement);
        match PREVIOUS_UTILITY {
            Some(previous) => previous(
                statement,
                query,
                read_only_tree,
                context,
                params,
                environment,
                destination,
                completion,
            ),
            None => standard_process_utility(
                statement,
                query,
                read_only_tree,
                context,
                params,
                environment,
                destination,
                completion,
            ),
        }
        after_utility(concern);
    }
}
