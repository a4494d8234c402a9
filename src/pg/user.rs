//! Who is asking, what they may do, and acting as somebody else for a moment.

use pgrx::pg_sys;

/// Rights on a table, as GRANT names them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// INSERT.
    Insert,
    /// SELECT.
    Select,
    /// UPDATE.
    Update,
    /// DELETE.
    Delete,
    /// TRUNCATE.
    Truncate,
}

impl Right {
    fn bit(self) -> u64 {
        match self {
            Right::Insert => u64::from(pg_sys::ACL_INSERT),
            Right::Select => u64::from(pg_sys::ACL_SELECT),
            Right::Update => u64::from(pg_sys::ACL_UPDATE),
            Right::Delete => u64::from(pg_sys::ACL_DELETE),
            Right::Truncate => u64::from(pg_sys::ACL_TRUNCATE),
        }
    }
}

/// The role whose rights count now.
pub fn current() -> u32 {
    // SAFETY: reads a variable of this process.
    unsafe { pg_sys::GetUserId().into() }
}

/// Whether the current role has all of these rights on the table.
pub fn has_rights(table: u32, rights: &[Right]) -> bool {
    role_has_rights(current(), table, rights)
}

/// Whether a role has all of these rights on the table.
pub fn role_has_rights(role: u32, table: u32, rights: &[Right]) -> bool {
    let wanted = rights.iter().fold(0, |wanted, right| wanted | right.bit());
    // SAFETY: a look-up in the system caches, in a transaction.
    let has = unsafe {
        pg_sys::pg_class_aclmask(table.into(), role.into(), wanted as _, pg_sys::AclMaskHow::ACLMASK_ALL)
    };
    has as u64 == wanted
}

/// Whether the current role may insert into a table, if only into some of its columns.
pub fn may_insert(table: u32) -> bool {
    // SAFETY: a look-up in the system caches, in a transaction.
    has_rights(table, &[Right::Insert])
        || unsafe {
            pg_sys::pg_attribute_aclcheck_all(
                table.into(),
                pg_sys::GetUserId(),
                pg_sys::ACL_INSERT as _,
                pg_sys::AclMaskHow::ACLMASK_ANY,
            )
        } == pg_sys::AclResult::ACLCHECK_OK
}

/// Whether an extension has a say in who may do what to a table (sepgsql, pgaudit).
pub fn are_rights_hooked() -> bool {
    // SAFETY: a variable of this process, set while libraries are loaded.
    unsafe { (&raw const pg_sys::ExecutorCheckPerms_hook).read().is_some() }
}

/// Whether the current role owns the table, or is of a role that does, or is a superuser.
pub fn is_owner(table: u32) -> bool {
    // SAFETY: look-ups in the system caches, in a transaction.
    unsafe {
        #[cfg(feature = "pg15")]
        {
            pg_sys::pg_class_ownercheck(table.into(), pg_sys::GetUserId())
        }
        #[cfg(not(feature = "pg15"))]
        {
            pg_sys::object_ownercheck(pg_sys::RelationRelationId, table.into(), pg_sys::GetUserId())
        }
    }
}

/// Whether the current role may create objects in a schema.
pub fn may_create_in(schema: u32) -> bool {
    has_schema_right(schema, pg_sys::ACL_CREATE)
}

/// Whether the current role may look up objects in a schema.
pub fn may_use(schema: u32) -> bool {
    has_schema_right(schema, pg_sys::ACL_USAGE)
}

/// Whether the current role may put a table where it would go by default_tablespace.
pub fn may_use_default_tablespace(is_unlogged: bool) -> bool {
    let persistence =
        if is_unlogged { pg_sys::RELPERSISTENCE_UNLOGGED } else { pg_sys::RELPERSISTENCE_PERMANENT };
    // SAFETY: look-ups in the system caches, in a transaction.
    unsafe {
        let tablespace = pg_sys::GetDefaultTablespace(persistence as _, false);
        if tablespace == pg_sys::InvalidOid {
            return true; // the database's own
        }
        #[cfg(feature = "pg15")]
        let result = pg_sys::pg_tablespace_aclcheck(tablespace, pg_sys::GetUserId(), pg_sys::ACL_CREATE as _);
        #[cfg(not(feature = "pg15"))]
        let result = pg_sys::object_aclcheck(
            pg_sys::TableSpaceRelationId,
            tablespace,
            pg_sys::GetUserId(),
            pg_sys::ACL_CREATE as _,
        );
        result == pg_sys::AclResult::ACLCHECK_OK
    }
}

fn has_schema_right(schema: u32, right: u32) -> bool {
    // SAFETY: look-ups in the system caches, in a transaction.
    unsafe {
        #[cfg(feature = "pg15")]
        let result = pg_sys::pg_namespace_aclcheck(schema.into(), pg_sys::GetUserId(), right as _);
        #[cfg(not(feature = "pg15"))]
        let result = pg_sys::object_aclcheck(
            pg_sys::NamespaceRelationId,
            schema.into(),
            pg_sys::GetUserId(),
            right as _,
        );
        result == pg_sys::AclResult::ACLCHECK_OK
    }
}

/// Whether row-level security would apply to the current role's queries on the table.
pub fn is_row_filtered(table: u32) -> bool {
    // SAFETY: look-ups in the system caches, in a transaction; noError.
    let state = unsafe { pg_sys::check_enable_rls(table.into(), pg_sys::InvalidOid, true) };
    state == pg_sys::CheckEnableRlsResult::RLS_ENABLED as i32
}

/// Does `f` with a search_path that the caller has no say in: what runs with another's rights must not find the
/// caller's functions (Postgres does so for maintenance since 17). Settings that code in there changes are as before
/// afterwards: an owner's trigger must not decide what the caller's session, or a worker, goes by.
fn with_safe_path<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: the pair that maintenance commands use (vacuum.c, index.c); after an ERROR the (sub)transaction's abort
    // restores the settings.
    let level = unsafe {
        let level = pg_sys::NewGUCNestLevel();
        pg_sys::set_config_option(
            c"search_path".as_ptr(),
            c"pg_catalog, pg_temp".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
        level
    };
    let result = f();
    // SAFETY: as above.
    unsafe { pg_sys::AtEOXact_GUC(false, level) };
    result
}

/// Does `f` as another role, so that nothing of it outlives the call: as for a maintenance command (SET ROLE and
/// temporary objects are refused). After an ERROR the abort restores the role. In a worker, which has others to serve,
/// it may take only so long ([`super::worker::limited`]).
pub fn acting_as<R>(role: u32, f: impl FnOnce() -> R) -> R {
    let (mut user, mut context) = (pg_sys::Oid::INVALID, 0);
    // SAFETY: the pair that Postgres itself uses for this (cluster.c, vacuum.c); reset by AbortTransaction and
    // AbortSubTransaction.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(
            role.into(),
            context
                | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32
                | pg_sys::SECURITY_RESTRICTED_OPERATION as i32,
        );
    }
    let result = super::worker::limited(|| with_safe_path(f));
    // SAFETY: as above.
    unsafe { pg_sys::SetUserIdAndSecContext(user, context) };
    result
}

/// Does `f`, which writes rows of `from` elsewhere. What a constraint, an index or a generated column that refuses one
/// says of it is not shown to a caller who may not read `from`: Postgres would only ask whether whoever writes may.
pub fn hiding_rows<R>(from: u32, f: impl FnOnce() -> R) -> R {
    if has_rights(from, &[Right::Select]) {
        return f();
    }
    /// Takes the callback off again, also where an ERROR unwinds this frame.
    struct Callback(pg_sys::ErrorContextCallback);
    impl Drop for Callback {
        fn drop(&mut self) {
            // SAFETY: a variable of this process.
            unsafe { pg_sys::error_context_stack = self.0.previous };
        }
    }
    let mut callback = Callback(pg_sys::ErrorContextCallback {
        // SAFETY: a variable of this process.
        previous: unsafe { pg_sys::error_context_stack },
        callback: Some(hide_row),
        arg: std::ptr::null_mut(),
    });
    // SAFETY: the callback stays in this frame, which takes it off again.
    unsafe { pg_sys::error_context_stack = &raw mut callback.0 };
    f()
}

/// Called by errfinish, for what is reported while [`hiding_rows`] runs.
unsafe extern "C-unwind" fn hide_row(_arg: *mut std::ffi::c_void) {
    use pgrx::PgSqlErrorCode::{ERRCODE_DATA_EXCEPTION, ERRCODE_INTEGRITY_CONSTRAINT_VIOLATION};
    // SAFETY: errfinish's callbacks may look at the error at hand, and change it; the texts have no format in them.
    // A violated constraint shows the row in its detail, a value that is not what an expression takes it for in the
    // message itself. Everything else is the owner's own words.
    unsafe {
        let category = pg_sys::geterrcode() & 0xfff; // ERRCODE_TO_CATEGORY
        let is_data = category == ERRCODE_DATA_EXCEPTION as i32;
        if is_data {
            pg_sys::errmsg_internal(c"a row holds what an expression of its table cannot take".as_ptr());
        }
        if is_data || category == ERRCODE_INTEGRITY_CONSTRAINT_VIOLATION as i32 {
            pg_sys::errdetail_internal(c"The row is shown only to those who may read it.".as_ptr());
        }
    }
}

/// Does `f` with the rights of the extension itself: only for our own catalog and for the creation of a queue's
/// tables, never for anything that a caller supplied.
pub fn acting_as_extension<R>(f: impl FnOnce() -> R) -> R {
    let (mut user, mut context) = (pg_sys::Oid::INVALID, 0);
    // SAFETY: as in `acting_as`; without the restriction, which would forbid the creation of some objects.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(
            pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID),
            context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32,
        );
    }
    let result = with_safe_path(f);
    // SAFETY: as above.
    unsafe { pg_sys::SetUserIdAndSecContext(user, context) };
    result
}

/// The database of this session.
pub fn database() -> u32 {
    // SAFETY: a variable of this process.
    unsafe { pg_sys::MyDatabaseId.into() }
}

/// The oid of a schema, if there is one of that name.
pub fn schema(name: &std::ffi::CStr) -> Option<u32> {
    // SAFETY: a look-up in the system caches, in a transaction; missing_ok.
    let oid = unsafe { pg_sys::get_namespace_oid(name.as_ptr(), true) };
    (oid != pg_sys::InvalidOid).then(|| oid.into())
}

/// The oid of a relation, if a schema has one of that name.
pub fn relation(schema: u32, name: &str) -> Option<u32> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: a look-up in the system caches, in a transaction.
    let oid = unsafe { pg_sys::get_relname_relid(name.as_ptr(), schema.into()) };
    (oid != pg_sys::InvalidOid).then(|| oid.into())
}

/// A relation's name, if it exists.
pub fn relation_name(oid: u32) -> Option<String> {
    // SAFETY: a look-up in the system caches, in a transaction; returns a palloc'd string or null.
    unsafe {
        let name = pg_sys::get_rel_name(oid.into());
        (!name.is_null()).then(|| std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned())
    }
}

/// Whether a relation is a table, or what may stand for one (a view, say): no index, no sequence.
pub fn is_table(relation: u32) -> bool {
    // SAFETY: a look-up in the system caches, in a transaction.
    let kind = unsafe { pg_sys::get_rel_relkind(relation.into()) } as u8;
    let others = [pg_sys::RELKIND_INDEX, pg_sys::RELKIND_PARTITIONED_INDEX, pg_sys::RELKIND_SEQUENCE];
    kind != 0 && !others.contains(&kind)
}

/// The schema of a relation, if it exists.
pub fn relation_schema(oid: u32) -> Option<u32> {
    // SAFETY: a look-up in the system caches, in a transaction.
    let schema = unsafe { pg_sys::get_rel_namespace(oid.into()) };
    (schema != pg_sys::InvalidOid).then(|| schema.into())
}

/// The role that owns a relation; 0 if there is no such relation.
pub fn owner(relation: u32) -> u32 {
    // SAFETY: a look-up in the system caches, in a transaction; the tuple is released.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::RELOID as _,
            pg_sys::Datum::from(pg_sys::Oid::from(relation)),
        );
        if tuple.is_null() {
            return 0;
        }
        let form = pgrx::pg_sys::heap_tuple_get_struct::<pg_sys::FormData_pg_class>(tuple);
        let owner = (*form).relowner.into();
        pg_sys::ReleaseSysCache(tuple);
        owner
    }
}

/// A role's name.
pub fn role_name(role: u32) -> String {
    // SAFETY: a look-up in the system caches, in a transaction; noerr. Returns a palloc'd string or null.
    unsafe {
        let name = pg_sys::GetUserNameFromId(role.into(), true);
        if name.is_null() {
            return String::new();
        }
        std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned()
    }
}

/// Whether there is a role of that name.
pub fn role_exists(name: &str) -> bool {
    let Ok(name) = std::ffi::CString::new(name) else { return false };
    // SAFETY: a look-up in the system caches, in a transaction; missing_ok.
    unsafe { pg_sys::get_role_oid(name.as_ptr(), true) != pg_sys::InvalidOid }
}

/// Whether the current role may see what concerns all roles (pg_monitor).
pub fn is_monitor() -> bool {
    // SAFETY: look-ups in the system caches, in a transaction.
    unsafe { pg_sys::has_privs_of_role(pg_sys::GetUserId(), pg_sys::Oid::from(pg_sys::ROLE_PG_MONITOR)) }
}

/// Whether a relation is unlogged.
pub fn is_unlogged(relation: u32) -> bool {
    // SAFETY: a look-up in the system caches, in a transaction.
    unsafe {
        pg_sys::get_rel_persistence(relation.into()) == pg_sys::RELPERSISTENCE_UNLOGGED as std::ffi::c_char
    }
}

/// A relation's name and its schema's, if it exists.
pub fn relation_full_name(oid: u32) -> Option<String> {
    let name = relation_name(oid)?;
    // SAFETY: a look-up in the system caches, in a transaction; returns a palloc'd string or null.
    unsafe {
        let schema = pg_sys::get_namespace_name(relation_schema(oid)?.into());
        (!schema.is_null()).then(|| format!("{}.{name}", std::ffi::CStr::from_ptr(schema).to_string_lossy()))
    }
}

/// A database's name, if it exists.
pub fn database_name(oid: u32) -> Option<String> {
    // SAFETY: a look-up in the system caches, in a transaction; returns a palloc'd string or null.
    unsafe {
        let name = pg_sys::get_database_name(oid.into());
        (!name.is_null()).then(|| std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned())
    }
}

/// Whether the current role may drop or rename a database, or copy it: its owner, or a superuser.
pub fn owns_database(oid: u32) -> bool {
    // SAFETY: look-ups in the system caches, in a transaction.
    unsafe {
        #[cfg(feature = "pg15")]
        {
            pg_sys::pg_database_ownercheck(oid.into(), pg_sys::GetUserId())
        }
        #[cfg(not(feature = "pg15"))]
        {
            pg_sys::object_ownercheck(pg_sys::DatabaseRelationId, oid.into(), pg_sys::GetUserId())
        }
    }
}
