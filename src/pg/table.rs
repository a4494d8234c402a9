//! A queue's table, row by row: by address, by primary key, in key order, and deletion, or a lock, by
//! address. Knows columns by number and type; what they mean is the caller's business.
//!
//! Nothing here checks privileges, and nothing here goes through the executor: [`Table::is_plain_for_delete`]
//! says whether that would go past anything that the table's owner put there.

use crate::pg::call::Value;
use pgrx::pg_sys;
use queue_dispatch::Tid;

/// Lock levels that are used on tables.
pub use pgrx::pg_sys::{AccessExclusiveLock, AccessShareLock, RowExclusiveLock};

/// An open, locked table. To be closed with [`Table::close`]; after an ERROR Postgres closes it.
pub struct Table {
    relation: pg_sys::Relation,
    slot: *mut pg_sys::TupleTableSlot,
    /// Blocks of the table when it was opened: it does not shrink while we hold a lock.
    blocks: u32,
}

/// A snapshot taken now, whatever the transaction's isolation level, pushed as the active one. To be ended with
/// [`Snapshot::done`]; after an ERROR Postgres ends it.
pub struct Snapshot(pg_sys::Snapshot);

impl Snapshot {
    /// Everything committed so far is visible.
    pub fn latest() -> Snapshot {
        // SAFETY: in a transaction, outside parallel mode. PushActiveSnapshot copies and registers it, and sees
        // to this transaction's own earlier commands.
        unsafe {
            pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot());
            pg_sys::UpdateActiveSnapshotCommandId();
            Snapshot(pg_sys::GetActiveSnapshot())
        }
    }

    /// What others have committed so far is visible, and nothing that this transaction itself has done.
    pub fn latest_of_others() -> Snapshot {
        // SAFETY: as in `latest`. To a snapshot of command 0 every change of this transaction's own was made after it
        // (HeapTupleSatisfiesMVCC). The copy on the stack is ours alone.
        unsafe {
            pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot());
            let snapshot = pg_sys::GetActiveSnapshot();
            (*snapshot).curcid = 0;
            Snapshot(snapshot)
        }
    }

    /// From here on it shows what this transaction has done since it was taken, too: a trigger of the owner's, say.
    pub fn see_own(&self) {
        // SAFETY: it is the active one, its only reference is the stack's (PushActiveSnapshot copied it), and no parallel
        // operation is under way.
        unsafe { pg_sys::UpdateActiveSnapshotCommandId() }
    }

    /// Ends it.
    pub fn done(self) {
        // SAFETY: it is the top of the stack: snapshots are used strictly nested.
        unsafe { pg_sys::PopActiveSnapshot() }
    }

    pub(super) fn raw(&self) -> pg_sys::Snapshot {
        self.0
    }
}

/// What became of a deletion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Deleted {
    /// The row is deleted, if this transaction commits.
    Ok,
    /// It was updated since: it lies elsewhere now.
    Moved,
    /// It is gone already, or this transaction itself deleted it.
    Gone,
    /// A trigger of the table's owner kept it.
    Kept,
    /// Another transaction is at it, and waiting was not wanted.
    Busy,
}

impl Deleted {
    fn of(result: pg_sys::TM_Result::Type) -> Deleted {
        match result {
            pg_sys::TM_Result::TM_Ok => Deleted::Ok,
            // Invisible (to a lock only): this transaction itself has changed it since it was checked.
            pg_sys::TM_Result::TM_Updated | pg_sys::TM_Result::TM_Invisible => Deleted::Moved,
            pg_sys::TM_Result::TM_BeingModified | pg_sys::TM_Result::TM_WouldBlock => Deleted::Busy,
            _ => Deleted::Gone,
        }
    }
}

/// Whether a table of that oid exists and could be locked without waiting.
pub fn try_lock(oid: u32, mode: u32) -> bool {
    // SAFETY: locking by oid is allowed in any transaction; a relation that is gone is found out on opening.
    unsafe { pg_sys::ConditionalLockRelationOid(oid.into(), mode as _) }
}

/// Locks a relation by oid, waiting if need be; also takes in what other sessions changed about it.
pub fn lock(oid: u32, mode: u32) {
    // SAFETY: as above.
    unsafe { pg_sys::LockRelationOid(oid.into(), mode as _) }
}

/// Releases such a lock before the transaction ends.
pub fn unlock(oid: u32, mode: u32) {
    // SAFETY: the caller holds the lock.
    unsafe { pg_sys::UnlockRelationOid(oid.into(), mode as _) }
}

/// Whether this transaction has given a table, which it has locked, other storage than others know: it was truncated,
/// rewritten, or created. To others all that is in there is not there yet.
pub fn is_stored_anew(oid: u32) -> bool {
    if !super::xact::has_id() {
        return false;
    }
    let none: pg_sys::SubTransactionId = 0;
    // SAFETY: the caller holds a lock; the cache entry keeps these as long as the transaction lasts.
    unsafe {
        let relation = pg_sys::try_relation_open(oid.into(), pg_sys::NoLock as _);
        if relation.is_null() {
            return false;
        }
        #[cfg(feature = "pg15")]
        let changed = (*relation).rd_firstRelfilenodeSubid;
        #[cfg(not(feature = "pg15"))]
        let changed = (*relation).rd_firstRelfilelocatorSubid;
        let is_new = changed != none || (*relation).rd_createSubid != none;
        pg_sys::relation_close(relation, pg_sys::NoLock as _);
        is_new
    }
}

/// Locks a name in a schema, which no relation may have yet, against everybody else who does so, until the transaction's
/// end. Names whose hashes meet in 16 bits wait for each other without need.
pub fn lock_name(schema: u32, hash: u64) {
    // SAFETY: a lock on a part of the schema that there is not (0 is the schema itself, which others lock): nothing but
    // this takes it.
    unsafe {
        pg_sys::LockDatabaseObject(
            pg_sys::NamespaceRelationId,
            schema.into(),
            (hash % u64::from(u16::MAX)) as u16 + 1,
            pg_sys::AccessExclusiveLock as _,
        );
    }
}

impl Table {
    /// Opens a table; `None` if there is none of that oid (any more). The caller holds a lock already if `mode`
    /// is `None`.
    pub fn open(oid: u32, mode: Option<u32>) -> Option<Table> {
        let mode = mode.unwrap_or(pg_sys::NoLock);
        // SAFETY: try_relation_open returns null for what does not exist; the lock is held until close or the
        // end of the transaction.
        unsafe {
            let relation = pg_sys::try_relation_open(oid.into(), mode as _);
            if relation.is_null() {
                return None;
            }
            // Before 16 an owner can turn a table into a view, which has none.
            let has_storage = (*(*relation).rd_rel).relkind == pg_sys::RELKIND_RELATION as std::ffi::c_char;
            let blocks = if has_storage {
                pg_sys::RelationGetNumberOfBlocksInFork(relation, pg_sys::ForkNumber::MAIN_FORKNUM)
            } else {
                0
            };
            Some(Table { relation, slot: pg_sys::table_slot_create(relation, std::ptr::null_mut()), blocks })
        }
    }

    pub(super) fn relation(&self) -> pg_sys::Relation {
        self.relation
    }

    /// Its slot for rows that are looked at, or put in.
    pub(super) fn slot(&self) -> *mut pg_sys::TupleTableSlot {
        self.slot
    }

    /// One more slot for rows of this table.
    pub(super) fn new_slot(&self) -> *mut pg_sys::TupleTableSlot {
        // SAFETY: the relation is open.
        unsafe { pg_sys::table_slot_create(self.relation, std::ptr::null_mut()) }
    }

    /// Closes it. `keep`: the lock stays until the transaction ends, as after any change.
    pub fn close(self, mode: Option<u32>, keep: bool) {
        let mode = if keep { None } else { mode }.unwrap_or(pg_sys::NoLock);
        // SAFETY: opened by `open`, and not used after this.
        unsafe {
            pg_sys::ExecDropSingleTupleTableSlot(self.slot);
            pg_sys::relation_close(self.relation, mode as _);
        }
    }

    /// The columns' names, in the server's encoding, and type oids.
    pub fn columns(&self) -> Vec<(Vec<u8>, u32)> {
        // SAFETY: the descriptor belongs to the open relation; attributes are counted by natts.
        unsafe {
            let descriptor = pgrx::PgTupleDesc::from_pg_unchecked((*self.relation).rd_att);
            (0..descriptor.len())
                .filter_map(|i| descriptor.get(i))
                .map(|column| {
                    let name = std::ffi::CStr::from_ptr(column.attname.data.as_ptr());
                    (name.to_bytes().to_vec(), u32::from(column.atttypid))
                })
                .collect()
        }
    }

    /// Whether it is an ordinary table in heap storage.
    pub fn is_heap(&self) -> bool {
        // SAFETY: the pg_class row belongs to the open relation.
        unsafe {
            let class = (*self.relation).rd_rel;
            (*class).relkind == pg_sys::RELKIND_RELATION as std::ffi::c_char
                && (*class).relam == pg_sys::HEAP_TABLE_AM_OID
        }
    }

    /// Its primary key's index, if that is on the one column given.
    pub fn primary_key(&self, column: i16) -> Option<u32> {
        // SAFETY: RelationGetIndexList fills rd_pkindex (relcache.c).
        let index = unsafe {
            pg_sys::list_free(pg_sys::RelationGetIndexList(self.relation));
            (*self.relation).rd_pkindex
        };
        (index != pg_sys::InvalidOid && is_index_on(index, column, pg_sys::INT8OID)).then(|| index.into())
    }

    /// Whether deleting by address goes past nothing: no trigger on DELETE, no rule.
    pub fn is_plain_for_delete(&self) -> bool {
        // SAFETY: trigdesc and rd_rules belong to the open relation, null if there are none.
        unsafe {
            let triggers = (*self.relation).trigdesc;
            if !(*self.relation).rd_rules.is_null() {
                return false;
            }
            triggers.is_null()
                || !((*triggers).trig_delete_before_row
                    || (*triggers).trig_delete_after_row
                    || (*triggers).trig_delete_before_statement
                    || (*triggers).trig_delete_after_statement)
        }
    }

    /// Fetches the row at an address, if there is a visible one. The result lies in the table's slot.
    pub fn fetch(&self, tid: Tid, snapshot: &Snapshot) -> Option<Record> {
        if tid.offset == 0 || tid.block >= self.blocks {
            return None;
        }
        let mut pointer = item_pointer(tid);
        // SAFETY: the block exists (checked above, and the table cannot shrink under our lock); heap_fetch
        // checks the line pointer. The slot is of the table's own kind.
        let found = unsafe {
            pg_sys::table_tuple_fetch_row_version(self.relation, &mut pointer, snapshot.raw(), self.slot)
        };
        found.then(|| Record::of(self.slot))
    }

    /// The row at an address, committed or not, while that rule is broken on purpose.
    #[cfg(feature = "wait_points")]
    pub fn fetch_if_broken(&self, tid: Tid) -> Option<Record> {
        crate::if_broken!(read_uncommitted, {
            // It sees every row version; a constant of Postgres, neither pushed nor registered.
            let any = Snapshot(&raw mut pg_sys::SnapshotAnyData);
            return self.fetch(tid, &any);
        });
        None
    }

    /// Looks up rows by primary key: those with `key >= from` (or `= from`), ascending.
    /// A walk that is not exact knows where it is ([`Walk::reached`]).
    pub fn walk<'t>(&'t self, index: u32, from: i64, exact: bool, snapshot: &Snapshot) -> Walk<'t> {
        let (strategy, function) = if exact {
            (pg_sys::BTEqualStrategyNumber, pg_sys::F_INT8EQ)
        } else {
            (pg_sys::BTGreaterEqualStrategyNumber, pg_sys::F_INT8GE)
        };
        Walk::begin(self, index, &[(strategy, function, from)], !exact, snapshot)
    }

    /// Rows whose timestamp key lies in `(after, until]`, ascending; `after` of `i64::MIN` = from the beginning,
    /// -infinity included; `until` of `i64::MAX` = without end.
    pub fn walk_times<'t>(&'t self, index: u32, after: i64, until: i64, snapshot: &Snapshot) -> Walk<'t> {
        let conditions = [
            (pg_sys::BTLessEqualStrategyNumber, pg_sys::F_TIMESTAMPTZ_LE, until),
            (pg_sys::BTGreaterStrategyNumber, pg_sys::F_TIMESTAMPTZ_GT, after),
        ];
        let most = if after == i64::MIN { 1 } else { 2 };
        Walk::begin(self, index, &conditions[..most], false, snapshot)
    }

    /// The highest key up to `most` of an index on a bigint column.
    pub fn highest(&self, index: u32, column: usize, most: i64, snapshot: &Snapshot) -> Option<i64> {
        let up_to = (pg_sys::BTLessEqualStrategyNumber, pg_sys::F_INT8LE, most);
        let walk = Walk::begin(self, index, &[up_to], false, snapshot);
        // SAFETY: as in `Walk::step`.
        let found = unsafe {
            pg_sys::index_getnext_slot(walk.scan, pg_sys::ScanDirection::BackwardScanDirection, self.slot)
        };
        let highest = found.then(|| Record::of(self.slot).value(column).i64()).flatten();
        walk.end();
        highest
    }

    /// Whether it has a row: without an index, which its owner may have taken away. What has no storage has none.
    pub fn has_rows(&self, snapshot: &Snapshot) -> bool {
        // SAFETY: the relation is open, and has storage; the slot is of its kind. The scan ends here.
        unsafe {
            if (*(*self.relation).rd_rel).relkind != pg_sys::RELKIND_RELATION as std::ffi::c_char {
                return false;
            }
            let scan = pg_sys::table_beginscan(self.relation, snapshot.raw(), 0, std::ptr::null_mut());
            let has_some =
                pg_sys::table_scan_getnextslot(scan, pg_sys::ScanDirection::ForwardScanDirection, self.slot);
            pg_sys::ExecClearTuple(self.slot);
            pg_sys::table_endscan(scan);
            has_some
        }
    }

    /// The one row with this key, left in the table's slot.
    pub fn lookup(&self, index: u32, key: i64, snapshot: &Snapshot) -> Option<Record> {
        let mut walk = self.walk(index, key, true, snapshot);
        let found = walk.step(self.slot);
        walk.end();
        if found {
            // The slot outlives the scan, the page it points into might not.
            // SAFETY: the slot holds a tuple.
            unsafe { pg_sys::ExecMaterializeSlot(self.slot) };
        }
        found.then(|| Record::of(self.slot))
    }

    /// Deletes the row at an address that a fetch under `_checked` has just verified; that snapshot keeps the
    /// line pointer from being reused until then. Waits for other transactions at the row if `wait`. An ERROR where the
    /// table is published and the deletion would not be: as for a statement.
    pub fn delete(&self, tid: Tid, _checked: &Snapshot, wait: bool) -> Deleted {
        // SAFETY: the relation is open. Whether it is published is kept in its cache entry, so each row may ask.
        unsafe { pg_sys::CheckCmdReplicaIdentity(self.relation, pg_sys::CmdType::CMD_DELETE) };
        let mut pointer = item_pointer(tid);
        let mut failure = pg_sys::TM_FailureData::default();
        // SAFETY: heap_delete asserts that the line pointer is normal: the caller fetched a row there, visible
        // to a snapshot that is still registered, so that no vacuum has taken it. No crosscheck: the message may
        // be newer than a REPEATABLE READ transaction's snapshot.
        let result = unsafe {
            pg_sys::heap_delete(
                self.relation,
                &mut pointer,
                pg_sys::GetCurrentCommandId(true),
                std::ptr::null_mut(),
                wait,
                &mut failure,
                false,
            )
        };
        Deleted::of(result)
    }

    /// Locks the row at such an address, for a deletion that goes through the executor: what [`Table::delete`] would
    /// come to is known, and nobody changes the row before it.
    pub fn lock(&self, tid: Tid, _checked: &Snapshot, wait: bool) -> Deleted {
        let mut tuple = pg_sys::HeapTupleData { t_self: item_pointer(tid), ..Default::default() };
        let mut failure = pg_sys::TM_FailureData::default();
        let mut buffer = pg_sys::InvalidBuffer as pg_sys::Buffer;
        let policy =
            if wait { pg_sys::LockWaitPolicy::LockWaitBlock } else { pg_sys::LockWaitPolicy::LockWaitSkip };
        // SAFETY: the line pointer is normal for the same reason as in `delete`. The tuple's header is filled in; the
        // buffer comes back pinned whatever the result, and is released once.
        let result = unsafe {
            let result = pg_sys::heap_lock_tuple(
                self.relation,
                &mut tuple,
                pg_sys::GetCurrentCommandId(true),
                pg_sys::LockTupleMode::LockTupleExclusive,
                policy,
                false,
                &mut buffer,
                &mut failure,
            );
            pg_sys::ReleaseBuffer(buffer);
            result
        };
        Deleted::of(result)
    }
}

fn item_pointer(tid: Tid) -> pg_sys::ItemPointerData {
    pg_sys::ItemPointerData {
        ip_blkid: pg_sys::BlockIdData { bi_hi: (tid.block >> 16) as u16, bi_lo: tid.block as u16 },
        ip_posid: tid.offset,
    }
}

pub(super) fn tid_of(pointer: &pg_sys::ItemPointerData) -> Tid {
    let block = (u32::from(pointer.ip_blkid.bi_hi) << 16) | u32::from(pointer.ip_blkid.bi_lo);
    Tid { block, offset: pointer.ip_posid }
}

/// A row in a slot. Its values are good until the slot is used again.
#[derive(Clone, Copy)]
pub struct Record(*mut pg_sys::TupleTableSlot);

impl Record {
    fn of(slot: *mut pg_sys::TupleTableSlot) -> Record {
        // SAFETY: the slot holds a tuple; this makes all of its columns readable.
        unsafe { pg_sys::slot_getallattrs(slot) };
        Record(slot)
    }

    /// Where it lies.
    pub fn tid(&self) -> Tid {
        // SAFETY: the slot holds a tuple of a table.
        tid_of(unsafe { &(*self.0).tts_tid })
    }

    /// Whether this version was written by this transaction.
    pub fn is_from_here(&self) -> bool {
        let mut is_null = false;
        // SAFETY: the slot holds a tuple of a table, which has an xmin.
        unsafe {
            let xmin =
                pg_sys::slot_getsysattr(self.0, pg_sys::MinTransactionIdAttributeNumber as _, &mut is_null);
            pg_sys::TransactionIdIsCurrentTransactionId((xmin.value() as u32).into())
        }
    }

    /// A column's value, from 1.
    pub fn value(&self, column: usize) -> Value {
        // SAFETY: the columns were deformed; the number is checked against the descriptor.
        unsafe {
            if column == 0 || column > (*(*self.0).tts_tupleDescriptor).natts as usize {
                return Value::NULL;
            }
            if *(*self.0).tts_isnull.add(column - 1) {
                Value::NULL
            } else {
                Value::of_datum(*(*self.0).tts_values.add(column - 1))
            }
        }
    }
}

/// A walk along an index. To be ended with [`Walk::end`]; after an ERROR Postgres ends it.
pub struct Walk<'t> {
    table: &'t Table,
    index: pg_sys::Relation,
    scan: pg_sys::IndexScanDesc,
}

const _: () = assert!(size_of::<pg_sys::IndexTupleData>() == 8);

/// What a bounded step of a walk came to.
pub enum Step {
    /// This row.
    Row(Record),
    /// None yet, only rows that the snapshot does not show.
    Unseen,
    /// The end.
    End,
}

impl<'t> Walk<'t> {
    fn begin(
        table: &'t Table,
        index: u32,
        conditions: &[(u32, u32, i64)],
        wants_key: bool,
        snapshot: &Snapshot,
    ) -> Walk<'t> {
        let mut keys = [pg_sys::ScanKeyData::default(); 2];
        // SAFETY: the index is a btree on the int8 or timestamptz column that the caller means (both are passed
        // by value), locked here; the keys are copied by index_rescan.
        unsafe {
            let index = pg_sys::index_open(index.into(), pg_sys::AccessShareLock as _);
            for (key, (strategy, function, value)) in keys.iter_mut().zip(conditions) {
                pg_sys::ScanKeyInit(key, 1, *strategy as _, (*function).into(), (*value).into());
            }
            #[cfg(not(feature = "pg18"))]
            let scan = pg_sys::index_beginscan(table.relation, index, snapshot.raw(), conditions.len() as _, 0);
            #[cfg(feature = "pg18")]
            let scan = pg_sys::index_beginscan(
                table.relation,
                index,
                snapshot.raw(),
                std::ptr::null_mut(),
                conditions.len() as _,
                0,
            );
            (*scan).xs_want_itup = wants_key; // to be said before the rescan; it costs memory, and a pin
            pg_sys::index_rescan(scan, keys.as_mut_ptr(), conditions.len() as _, std::ptr::null_mut(), 0);
            Walk { table, index, scan }
        }
    }

    fn step(&mut self, slot: *mut pg_sys::TupleTableSlot) -> bool {
        // SAFETY: the scan is open; the slot is of the table's kind.
        unsafe { pg_sys::index_getnext_slot(self.scan, pg_sys::ScanDirection::ForwardScanDirection, slot) }
    }

    /// The next row, in the table's slot.
    pub fn next(&mut self) -> Option<Record> {
        self.step(self.table.slot).then(|| Record::of(self.table.slot))
    }

    /// The next row, in the table's slot, unless it lies behind `most` that nobody sees.
    pub fn next_within(&mut self, most: usize) -> Step {
        for _ in 0..most {
            // SAFETY: as above. This is what index_getnext_slot does, but that one comes back from dead rows only behind
            // all of them.
            unsafe {
                if !(*self.scan).xs_heap_continue {
                    let tid = pg_sys::index_getnext_tid(self.scan, pg_sys::ScanDirection::ForwardScanDirection);
                    if tid.is_null() {
                        return Step::End;
                    }
                }
                if pg_sys::index_fetch_heap(self.scan, self.table.slot) {
                    return Step::Row(Record::of(self.table.slot));
                }
            }
        }
        Step::Unseen
    }

    /// The key of the index entry that the walk stands at: a bigint.
    pub fn reached(&self) -> Option<i64> {
        // SAFETY: a btree gives the entry that it returned last (xs_want_itup), good until the next step. Where none of
        // its columns is null (the index may INCLUDE some) the key begins right behind the header, which is as long as
        // a bigint.
        unsafe {
            let entry: *const pg_sys::IndexTupleData = (*self.scan).xs_itup;
            let is_plain = !entry.is_null() && u32::from((*entry).t_info) & pg_sys::INDEX_NULL_MASK == 0;
            is_plain.then(|| entry.add(1).cast::<i64>().read_unaligned())
        }
    }

    /// Ends it.
    pub fn end(self) {
        // SAFETY: opened in `begin`, not used after this.
        unsafe {
            pg_sys::index_endscan(self.scan);
            pg_sys::index_close(self.index, pg_sys::AccessShareLock as _);
        }
    }
}

/// A valid btree on just one column, given by number and type, ascending, that holds every row where it is not
/// null: for the index on `visible_at`. To be called as the table's owner: Postgres runs functions in a condition.
pub fn index_on(table: &Table, column: i16, kind: pg_sys::Oid) -> Option<u32> {
    // SAFETY: the list belongs to the caller, and holds oids.
    unsafe {
        let list = pg_sys::RelationGetIndexList(table.relation);
        let found = (0..pg_sys::list_length(list))
            .map(|i| pg_sys::list_nth_oid(list, i))
            .find(|oid| is_index_on(*oid, column, kind));
        pg_sys::list_free(list);
        found.map(Into::into)
    }
}

fn is_index_on(index: pg_sys::Oid, column: i16, kind: pg_sys::Oid) -> bool {
    // SAFETY: the index is opened and locked here; its pg_index row and the arrays of its key columns belong to the
    // relcache entry, and a btree has at least one key column.
    unsafe {
        let index = pg_sys::index_open(index, pg_sys::AccessShareLock as _);
        let form = (*index).rd_index;
        let is_right = (*form).indisvalid
            && (*(*index).rd_rel).relam == pg_sys::BTREE_AM_OID
            && (*form).indnkeyatts == 1
            && (*form).indkey.values.as_slice(1)[0] == column
            && *(*index).rd_opcintype == kind
            && *(*index).rd_indoption == 0
            && is_unfiltered(index, column);
        pg_sys::index_close(index, pg_sys::AccessShareLock as _);
        is_right
    }
}

/// Whether the index has no condition but that the column is not null.
///
/// # Safety
/// `index` is open.
unsafe fn is_unfiltered(index: pg_sys::Relation, column: i16) -> bool {
    // SAFETY: the predicate is a list of expression nodes, whose tags say what they are.
    unsafe {
        let predicate = pg_sys::RelationGetIndexPredicate(index);
        match pg_sys::list_length(predicate) {
            0 => true,
            1 => {
                let test: *mut pg_sys::NullTest = pg_sys::list_nth(predicate, 0).cast();
                if (*test).xpr.type_ != pg_sys::NodeTag::T_NullTest
                    || (*test).nulltesttype != pg_sys::NullTestType::IS_NOT_NULL
                {
                    return false;
                }
                let variable: *mut pg_sys::Var = (*test).arg.cast();
                (*variable).xpr.type_ == pg_sys::NodeTag::T_Var && (*variable).varattno == column
            }
            _ => false,
        }
    }
}

/// The sequence of an identity column, if it is one.
pub fn identity_sequence(table: u32, column: i16) -> Option<u32> {
    let table = Table::open(table, None)?;
    // SAFETY: the relation is open.
    let sequence = unsafe { super::insert::identity_sequence(table.relation, column) };
    table.close(None, true);
    (sequence != pg_sys::InvalidOid).then(|| sequence.into())
}

/// The last value that a sequence has given, 0 if none.
pub fn sequence_last(sequence: u32) -> Option<i64> {
    let sequence = Table::open(sequence, Some(AccessShareLock))?;
    // SAFETY: a sequence's one row is the first in its first block, and never moves; a sequence is a heap to its cache
    // entry (RelationInitTableAccessMethod). Its columns are last_value, log_cnt and is_called.
    let last = unsafe {
        let mut pointer = item_pointer(Tid { block: 0, offset: 1 });
        let any = &raw mut pg_sys::SnapshotAnyData;
        let found = pg_sys::table_tuple_fetch_row_version(sequence.relation, &mut pointer, any, sequence.slot);
        found.then(|| Record::of(sequence.slot)).and_then(|row| {
            let is_called = row.value(3).get::<bool>()?;
            row.value(1).i64().map(|last| if is_called { last } else { 0 })
        })
    };
    sequence.close(Some(AccessShareLock), false);
    last
}

/// What a row trigger was called for.
pub enum Fired {
    /// A row of this table was inserted.
    Inserted(u32, Record),
    /// A row of this table was updated: the old version and the new one.
    Updated(u32, Record, Record),
    /// This table was truncated.
    Truncated(u32),
}

/// The change that a trigger function was called for; `None` if it was not called as such a trigger.
pub fn fired(fcinfo: pg_sys::FunctionCallInfo) -> Option<Fired> {
    // SAFETY: fcinfo is what Postgres called the function with; the trigger data is there if its tag says so,
    // and holds a slot for row triggers (commands/trigger.h).
    unsafe {
        if !pgrx::trigger_support::called_as_trigger(fcinfo) {
            return None;
        }
        let data: *mut pg_sys::TriggerData = (*fcinfo).context.cast();
        let oid = u32::from((*(*data).tg_relation).rd_id);
        let event = (*data).tg_event;
        let is_row = event & pg_sys::TRIGGER_EVENT_ROW != 0;
        let is_after = event & pg_sys::TRIGGER_EVENT_TIMINGMASK == pg_sys::TRIGGER_EVENT_AFTER;
        match event & pg_sys::TRIGGER_EVENT_OPMASK {
            pg_sys::TRIGGER_EVENT_INSERT if is_row && is_after => {
                Some(Fired::Inserted(oid, Record::of((*data).tg_trigslot)))
            }
            pg_sys::TRIGGER_EVENT_UPDATE if is_row && is_after => {
                Some(Fired::Updated(oid, Record::of((*data).tg_trigslot), Record::of((*data).tg_newslot)))
            }
            pg_sys::TRIGGER_EVENT_TRUNCATE if !is_row && is_after => Some(Fired::Truncated(oid)),
            _ => None,
        }
    }
}
