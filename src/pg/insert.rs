//! Putting rows into a table without the executor: heap_multi_insert, then the indexes. Knows columns by number;
//! what they mean is the caller's business.
//!
//! The executor costs more than the row (a plan's start and end, a trigger's event, a queue of those), but it is
//! what runs defaults, triggers, constraints, rules and policies. So [`Direct::of`] looks at all that a table has,
//! and gives a way past the executor only where there is nothing that it would go past: a table whose columns,
//! defaults and indexes are those that the caller expects, and whose only trigger on INSERT is the caller's own.
//! Everything it looks at is in the relation cache, and whoever keeps a [`Direct`] forgets it when that says so.
//!
//! Privileges and row-level security are of the role, not of the table: the caller checks them each time.

use crate::pg::call::Value;
use crate::pg::clock;
use crate::pg::table::{tid_of, Table};
use pgrx::pg_sys;
use queue_dispatch::Tid;

/// Where a column's value comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The caller gives it; never null.
    Given,
    /// The caller gives it, or null.
    GivenOrNull,
    /// The next number of its identity.
    Identity,
    /// Its default is the time.
    Clock,
    /// Its default is 0.
    Zero,
    /// It has no default.
    Null,
}

/// An index on one column, by number.
#[derive(Clone, Copy)]
struct Index {
    oid: pg_sys::Oid,
    column: usize,
    skips_null: bool,
    is_unique: bool,
}

/// A way into one table past the executor.
pub struct Direct {
    sources: &'static [Source],
    /// Which columns are of variable length.
    are_varlena: Vec<bool>,
    sequence: pg_sys::Oid,
    /// The first is the identity's.
    indexes: [Index; INDEXES],
}

/// How many indexes such a table has.
const INDEXES: usize = 3;

/// Rows inserted by one call of heap_multi_insert at most.
const CHUNK_ROWS: usize = 128;
/// And bytes of given values: each chunk is copied before it is inserted (COPY's bound).
const CHUNK_BYTES: usize = 65_535;

unsafe extern "C-unwind" {
    /// commands/sequence.h; pgrx does not bind it. The SQL function nextval checks the caller's privileges on the
    /// sequence, of which an identity column asks for none.
    fn nextval_internal(sequence: pg_sys::Oid, check_permissions: bool) -> i64;
}

impl Direct {
    /// The way into this table, if it is as the caller expects: columns as in `sources`, these indexes, each with its
    /// column, and no others (the first is unique and on the identity column), and `trigger` (a function) as the only
    /// trigger on INSERT.
    pub fn of(
        table: &Table,
        sources: &'static [Source],
        indexes: [(u32, usize); INDEXES],
        trigger: Option<u32>,
    ) -> Option<Direct> {
        let relation = table.relation();
        let identity = sources.iter().position(|source| *source == Source::Identity)? + 1;
        // SAFETY: all that is read belongs to the open relation's cache entry (rel.h), which a lock on the table keeps
        // as it is.
        unsafe {
            let class = (*relation).rd_rel;
            let is_ordinary = !(*class).relispartition && (*relation).rd_rules.is_null();
            if !is_ordinary || !is_only_trigger(relation, trigger?) || !has_sources(relation, sources) {
                return None;
            }
            let [key, due, expiry] = indexes.map(|(oid, column)| index_of(oid.into(), column));
            let indexes = [key?, due?, expiry?];
            let is_key = indexes[0].column == identity && indexes[0].is_unique && !indexes[0].skips_null;
            if !is_key || !are_all_indexes(relation, &indexes) {
                return None;
            }
            let sequence = identity_sequence(relation, identity as i16);
            let columns = pgrx::PgTupleDesc::from_pg_unchecked((*relation).rd_att);
            let are_varlena =
                (0..sources.len()).map(|i| columns.get(i).is_some_and(|c| c.attlen == -1)).collect();
            (sequence != pg_sys::InvalidOid).then_some(Direct { sources, are_varlena, sequence, indexes })
        }
    }

    /// Inserts rows in the order given; each brings the values of the columns that are given, in order. Calls `done`
    /// for each with its identity and its address. What follows in this transaction sees them.
    ///
    /// The table is open and locked RowExclusive, the caller may insert into it, and no row-level security applies.
    pub fn insert<const N: usize>(
        &self,
        table: &Table,
        rows: impl ExactSizeIterator<Item = [Value; N]>,
        done: &mut dyn FnMut(i64, Tid),
    ) {
        let now = Value::of_time_us(clock::now().wall_us);
        let mut slots = vec![table.slot()];
        let mut open = Indexes::new(self);
        let (mut filled, mut bytes) = (0, 0);
        for given in rows {
            if filled == slots.len() {
                slots.push(table.new_slot());
            }
            bytes += self.fill(slots[filled], now, &given);
            filled += 1;
            if filled == CHUNK_ROWS || bytes > CHUNK_BYTES {
                self.flush(table, &mut slots[..filled], &mut open, done);
                (filled, bytes) = (0, 0);
                pgrx::check_for_interrupts!();
            }
        }
        if filled > 0 {
            self.flush(table, &mut slots[..filled], &mut open, done);
        }
        open.close();
        for slot in slots.drain(1..) {
            // SAFETY: made by `new_slot`, not used after this.
            unsafe { pg_sys::ExecDropSingleTupleTableSlot(slot) };
        }
        crate::pg::xact::command_done();
    }

    /// Returns the bytes of the values given.
    fn fill(&self, slot: *mut pg_sys::TupleTableSlot, now: Value, given: &[Value]) -> usize {
        let mut given = given.iter().copied();
        let mut bytes = 0;
        // SAFETY: the slot has as many columns as `sources` (compared in `of`); the values outlive the statement.
        unsafe {
            pg_sys::ExecClearTuple(slot);
            for (i, source) in self.sources.iter().enumerate() {
                let value = match source {
                    Source::Given | Source::GivenOrNull => given.next().unwrap_or(Value::NULL),
                    Source::Identity => {
                        Value::of(pg_sys::ffi::pg_guard_ffi_boundary(|| nextval_internal(self.sequence, false)))
                    }
                    Source::Clock => now,
                    Source::Zero => Value::of(0i64),
                    Source::Null => Value::NULL,
                };
                if self.are_varlena[i] {
                    bytes += value.datum().map_or(0, |datum| pgrx::varlena::varsize_any(datum.cast_mut_ptr()));
                }
                *(*slot).tts_values.add(i) = value.datum().unwrap_or(pg_sys::Datum::from(0));
                *(*slot).tts_isnull.add(i) = value.is_null();
            }
            pg_sys::ExecStoreVirtualTuple(slot);
        }
        bytes
    }

    fn flush(
        &self,
        table: &Table,
        slots: &mut [*mut pg_sys::TupleTableSlot],
        open: &mut Indexes,
        done: &mut dyn FnMut(i64, Tid),
    ) {
        let relation = table.relation();
        // SAFETY: the slots hold tuples for this table, which is locked for writing; a statement's snapshot is active,
        // as toasting wants it. Both calls leave each row's address in its slot.
        unsafe {
            let command = pg_sys::GetCurrentCommandId(true);
            match slots {
                // One row is logged as one, in fewer bytes.
                [slot] => {
                    pg_sys::table_tuple_insert(relation, *slot, command, 0, std::ptr::null_mut());
                }
                _ => pg_sys::heap_multi_insert(
                    relation,
                    slots.as_mut_ptr(),
                    slots.len() as _,
                    command,
                    0,
                    std::ptr::null_mut(),
                ),
            }
            for slot in slots {
                open.insert(relation, *slot);
                let identity = *(**slot).tts_values.add(self.indexes[0].column - 1);
                done(identity.value() as i64, tid_of(&(**slot).tts_tid));
            }
        }
    }
}

/// The table's indexes, each opened when a row goes into it.
struct Indexes<'a> {
    indexes: &'a [Index; INDEXES],
    open: [Option<(pg_sys::Relation, *mut pg_sys::IndexInfo)>; INDEXES],
}

impl<'a> Indexes<'a> {
    fn new(direct: &'a Direct) -> Self {
        Indexes { indexes: &direct.indexes, open: [None; INDEXES] }
    }

    /// # Safety
    /// The slot holds a row that was just inserted into `relation`.
    unsafe fn insert(&mut self, relation: pg_sys::Relation, slot: *mut pg_sys::TupleTableSlot) {
        for (index, open) in self.indexes.iter().zip(&mut self.open) {
            // SAFETY: the index has one plain column (`index_of`), so the column's value is its key; it is locked
            // as the executor locks it. The uniqueness of a new row is checked at once (indimmediate).
            unsafe {
                let mut value = *(*slot).tts_values.add(index.column - 1);
                let mut is_null = *(*slot).tts_isnull.add(index.column - 1);
                if is_null && index.skips_null {
                    continue;
                }
                let (opened, info) = *open.get_or_insert_with(|| {
                    let opened = pg_sys::index_open(index.oid, pg_sys::RowExclusiveLock as _);
                    (opened, pg_sys::BuildIndexInfo(opened))
                });
                let unique = if index.is_unique {
                    pg_sys::IndexUniqueCheck::UNIQUE_CHECK_YES
                } else {
                    pg_sys::IndexUniqueCheck::UNIQUE_CHECK_NO
                };
                pg_sys::index_insert(
                    opened,
                    &mut value,
                    &mut is_null,
                    &mut (*slot).tts_tid,
                    relation,
                    unique,
                    false,
                    info,
                );
            }
        }
    }

    fn close(self) {
        for (index, _) in self.open.into_iter().flatten() {
            // SAFETY: opened in `insert`; the lock stays, as after any change.
            unsafe { pg_sys::index_close(index, pg_sys::NoLock as _) };
        }
    }
}

/// Whether the one trigger on INSERT is this function, after each row, always.
///
/// # Safety
/// `relation` is open.
unsafe fn is_only_trigger(relation: pg_sys::Relation, function: u32) -> bool {
    // SAFETY: trigdesc is null or describes numtriggers triggers.
    unsafe {
        let triggers = (*relation).trigdesc;
        if triggers.is_null() {
            return false;
        }
        let mut on_insert = (0..(*triggers).numtriggers as usize)
            .map(|i| &*(*triggers).triggers.add(i))
            .filter(|trigger| trigger.tgtype as u32 & pg_sys::TRIGGER_TYPE_INSERT != 0);
        let first = on_insert.next();
        let after_row = pg_sys::TRIGGER_TYPE_ROW; // neither BEFORE nor INSTEAD
        let timing = pg_sys::TRIGGER_TYPE_ROW | pg_sys::TRIGGER_TYPE_BEFORE | pg_sys::TRIGGER_TYPE_INSTEAD;
        on_insert.next().is_none()
            && first.is_some_and(|trigger| {
                u32::from(trigger.tgfoid) == function
                    && trigger.tgenabled == pg_sys::TRIGGER_FIRES_ALWAYS as std::ffi::c_char
                    && trigger.tgtype as u32 & timing == after_row
                    && trigger.tgqual.is_null()
            })
    }
}

/// Whether each column gets its value from where the caller says, and nothing checks it or rounds it.
///
/// # Safety
/// `relation` is open.
unsafe fn has_sources(relation: pg_sys::Relation, sources: &[Source]) -> bool {
    // SAFETY: the descriptor belongs to the relation; constr is null without constraints and defaults.
    unsafe {
        let descriptor = (*relation).rd_att;
        if (*descriptor).natts as usize != sources.len() {
            return false;
        }
        let constraints = (*descriptor).constr;
        if !constraints.is_null() && (*constraints).num_check > 0 {
            return false;
        }
        let columns = pgrx::PgTupleDesc::from_pg_unchecked(descriptor);
        sources.iter().enumerate().all(|(i, source)| {
            let Some(column) = columns.get(i) else { return false };
            if column.attisdropped || column.attgenerated != 0 || column.atttypmod != -1 {
                return false;
            }
            match source {
                Source::Given => true,
                Source::GivenOrNull => !column.attnotnull,
                Source::Identity => column.attidentity != 0,
                Source::Null => !column.atthasdef && !column.attnotnull,
                Source::Clock | Source::Zero => is_default(relation, i + 1, *source),
            }
        })
    }
}

/// Whether a column's default is the one meant, as it is written: folding it would run functions that somebody may
/// replace, of which the table's cache entry hears nothing.
///
/// # Safety
/// `relation` is open and has such a column.
unsafe fn is_default(relation: pg_sys::Relation, column: usize, source: Source) -> bool {
    // SAFETY: build_column_default gives an expression or null; a node's tag says what it is, and a function call has
    // as many arguments as its function.
    unsafe {
        let default: *mut pg_sys::Node = pg_sys::build_column_default(relation, column as _);
        if default.is_null() {
            return false;
        }
        let function = |node: *mut pg_sys::Node| {
            let call: *mut pg_sys::FuncExpr = node.cast();
            ((*node).type_ == pg_sys::NodeTag::T_FuncExpr).then(|| (u32::from((*call).funcid), (*call).args))
        };
        match (source, function(default)) {
            (Source::Clock, Some((called, _))) => called == pg_sys::F_CLOCK_TIMESTAMP,
            // 0 is an int4, and the column may be an int2.
            (Source::Zero, Some((called, arguments))) => {
                called == pg_sys::F_INT2_INT4 && is_zero(pg_sys::list_nth(arguments, 0).cast())
            }
            (Source::Zero, None) => is_zero(default),
            _ => false,
        }
    }
}

/// # Safety
/// `node` is an expression.
unsafe fn is_zero(node: *mut pg_sys::Node) -> bool {
    // SAFETY: the tag says what it is.
    unsafe {
        let constant: *mut pg_sys::Const = node.cast();
        (*node).type_ == pg_sys::NodeTag::T_Const
            && !(*constant).constisnull
            && (*constant).constbyval
            && (*constant).constvalue.value() == 0
    }
}

/// An index with just this column, as insertion sees it; `None` if there is more to it.
///
/// # Safety
/// The oid is that of an index of a table that is locked.
unsafe fn index_of(oid: pg_sys::Oid, column: usize) -> Option<Index> {
    // SAFETY: the index is opened and locked; its pg_index row belongs to the relcache entry.
    unsafe {
        let index = pg_sys::index_open(oid, pg_sys::AccessShareLock as _);
        let form = (*index).rd_index;
        let is_plain = (*form).indnatts == 1
            && (*form).indkey.values.as_slice(1)[0] as usize == column
            && (*form).indisready
            && (!(*form).indisunique || (*form).indimmediate)
            && !(*form).indisexclusion;
        let skips_null = pg_sys::list_length(pg_sys::RelationGetIndexPredicate(index)) > 0;
        let is_unique = (*form).indisunique;
        pg_sys::index_close(index, pg_sys::AccessShareLock as _);
        is_plain.then_some(Index { oid, column, skips_null, is_unique })
    }
}

/// # Safety
/// `relation` is open.
unsafe fn are_all_indexes(relation: pg_sys::Relation, indexes: &[Index]) -> bool {
    // SAFETY: the list belongs to the caller, and holds oids.
    unsafe {
        let list = pg_sys::RelationGetIndexList(relation);
        let are_all = pg_sys::list_length(list) as usize == indexes.len()
            && indexes.iter().all(|index| pg_sys::list_member_oid(list, index.oid));
        pg_sys::list_free(list);
        are_all
    }
}

/// # Safety
/// `relation` is open and has such a column.
pub(super) unsafe fn identity_sequence(relation: pg_sys::Relation, column: i16) -> pg_sys::Oid {
    // SAFETY: a look-up in pg_depend; missing_ok.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        {
            pg_sys::getIdentitySequence((*relation).rd_id, column, true)
        }
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        {
            pg_sys::getIdentitySequence(relation, column, true)
        }
    }
}
