//! The boundary to SQL: how a function gets its arguments and gives its rows, and how its errors are raised.
//! Values pass through as they are; a message's JSON is never parsed on its way.

use crate::error::{Error, Result};
use pgrx::{pg_sys, FromDatum, IntoDatum};

/// A value of Postgres, or null. By-reference values are good as long as what they came from.
#[derive(Clone, Copy)]
pub struct Value(Option<pg_sys::Datum>);

impl Value {
    /// The null of every type.
    pub const NULL: Value = Value(None);

    /// What an AFTER trigger returns: no row, but not SQL's null either.
    pub fn no_row() -> Value {
        Value(Some(pg_sys::Datum::from(0)))
    }

    pub(super) fn of_datum(datum: pg_sys::Datum) -> Value {
        Value(Some(datum))
    }

    pub(super) fn datum(self) -> Option<pg_sys::Datum> {
        self.0
    }

    /// The type text.
    pub const TEXT: u32 = 25;

    /// A row of columns, each with its name and type: what a procedure with output arguments returns.
    pub fn record(columns: &[(&str, u32, Value)]) -> Value {
        let mut datums: Vec<pg_sys::Datum> =
            columns.iter().map(|(_, _, value)| value.0.unwrap_or(pg_sys::Datum::from(0))).collect();
        let mut nulls: Vec<bool> = columns.iter().map(|(_, _, value)| value.is_null()).collect();
        // SAFETY: the descriptor has as many columns as there are values, of the types that were given with them; a
        // blessed one can be told from the row itself.
        unsafe {
            let descriptor = pg_sys::CreateTemplateTupleDesc(columns.len() as _);
            for (i, (name, kind, _)) in columns.iter().enumerate() {
                let name = std::ffi::CString::new(*name).unwrap_or_default();
                let kind = pg_sys::Oid::from(*kind);
                pg_sys::TupleDescInitEntry(descriptor, (i + 1) as _, name.as_ptr(), kind, -1, 0);
            }
            let descriptor = pg_sys::BlessTupleDesc(descriptor);
            let tuple = pg_sys::heap_form_tuple(descriptor, datums.as_mut_ptr(), nulls.as_mut_ptr());
            Value(Some(pg_sys::heap_copy_tuple_as_datum(tuple, descriptor)))
        }
    }

    /// Whether it is null.
    pub fn is_null(self) -> bool {
        self.0.is_none()
    }

    /// A value made from a Rust one, in the current memory context.
    pub fn of<T: IntoDatum>(value: T) -> Value {
        Value(value.into_datum())
    }

    /// The value as a Rust one. The type must be the SQL type's counterpart.
    pub fn get<T: FromDatum>(self) -> Option<T> {
        // SAFETY: the SQL declarations in sql/ and the types asked for here are written side by side, and every
        // function is called in the tests.
        self.0.and_then(|datum| unsafe { T::from_datum(datum, false) })
    }

    /// A bigint.
    pub fn i64(self) -> Option<i64> {
        self.get()
    }

    /// A timestamptz in microseconds since 2000-01-01 UTC.
    pub fn time_us(self) -> Option<i64> {
        self.0.map(|datum| datum.value() as i64)
    }

    /// A timestamptz.
    pub fn of_time_us(us: i64) -> Value {
        Value(Some(us.into()))
    }

    /// A text, copied. Other characters than ASCII's are an ERROR where the server's are not Rust's.
    pub fn text(self) -> Option<String> {
        // SAFETY: the SQL type is text; the detoasted value is read before it can go.
        self.0.map(|datum| unsafe {
            let text = pg_sys::pg_detoast_datum_packed(datum.cast_mut_ptr());
            in_utf8(pgrx::varlena::varlena_to_byte_slice(text))
        })
    }

    /// A text, copied, or nothing where [`Value::text`] is an ERROR.
    pub fn text_if_readable(self) -> Option<String> {
        // SAFETY: as in `text`.
        let is_readable = self.0.is_some_and(|datum| unsafe {
            let text = pg_sys::pg_detoast_datum_packed(datum.cast_mut_ptr());
            is_readable(pgrx::varlena::varlena_to_byte_slice(text))
        });
        if is_readable {
            self.text()
        } else {
            None
        }
    }

    /// An interval in months, days and microseconds.
    pub fn interval(self) -> Option<(i32, i32, i64)> {
        // SAFETY: the SQL type is interval, which is passed by reference.
        self.0.map(|datum| unsafe {
            let interval = datum.cast_mut_ptr::<pg_sys::Interval>();
            ((*interval).month, (*interval).day, (*interval).time)
        })
    }

    /// The elements of a one-dimensional array. Of what element type, and how that is passed, Postgres is asked. Some
    /// millions of nulls take no place in an array: so many that they are refused are not even looked at.
    pub fn elements(self, most: usize) -> Elements {
        let Some(datum) = self.0 else { return Elements::These(Vec::new()) };
        // SAFETY: the SQL type is an array, whose dimensions follow its header (utils/array.h). deconstruct_array
        // allocates both results in the current context; the elements of a detoasted array live as long as that.
        unsafe {
            let array: *mut pg_sys::ArrayType = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast();
            if (*array).ndim > 1 {
                return Elements::Matrix;
            }
            let len = if (*array).ndim == 1 { *array.add(1).cast::<i32>() as usize } else { 0 };
            if len > most {
                return Elements::TooMany(len);
            }
            let (mut len, mut by_val, mut align) = (0i16, false, 0 as std::ffi::c_char);
            pg_sys::get_typlenbyvalalign((*array).elemtype, &mut len, &mut by_val, &mut align);
            let (mut values, mut nulls, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
            pg_sys::deconstruct_array(
                array,
                (*array).elemtype,
                len.into(),
                by_val,
                align,
                &mut values,
                &mut nulls,
                &mut count,
            );
            let elements = (0..count as usize)
                .map(|i| if *nulls.add(i) { Value::NULL } else { Value::of_datum(*values.add(i)) })
                .collect();
            Elements::These(elements)
        }
    }

    /// The text of a jsonb; of characters the same as in [`Value::text`].
    pub fn jsonb_text(self) -> Option<String> {
        // SAFETY: the SQL type is jsonb; jsonb_out returns a palloc'd C string in the server's encoding.
        self.0.map(|datum| unsafe {
            let text: Option<&std::ffi::CStr> = pgrx::direct_function_call(pg_sys::jsonb_out, &[Some(datum)]);
            text.map(|t| in_utf8(t.to_bytes())).unwrap_or_default()
        })
    }
}

/// What an array holds.
pub enum Elements {
    /// These.
    These(Vec<Value>),
    /// More than were asked for: so many.
    TooMany(usize),
    /// It has more than one dimension.
    Matrix,
}

fn is_readable(bytes: &[u8]) -> bool {
    // SAFETY: reads a variable of this process.
    let is_utf8 = unsafe { pg_sys::GetDatabaseEncoding() } == pg_sys::pg_enc::PG_UTF8 as i32;
    is_utf8 || bytes.is_ascii()
}

fn in_utf8(bytes: &[u8]) -> String {
    if !is_readable(bytes) {
        Error::Unsupported {
            what: "text that is not ASCII is not supported in a database whose encoding is not UTF8".into(),
            hint: Some("queue_send, queue_send_batch and plain SQL take such messages.".into()),
        }
        .raise();
    }
    let mut text = Vec::new();
    // A text can be as long as a gigabyte, and what Rust cannot get of its own accord ends the whole server.
    if text.try_reserve_exact(bytes.len()).is_err() {
        Error::Memory.raise();
    }
    text.extend_from_slice(bytes);
    String::from_utf8(text).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// The oid of a function, from its name and argument types, qualified.
pub fn function_oid(signature: &str) -> Option<u32> {
    // SAFETY: takes a text and returns a regprocedure, or null if there is no such function.
    let oid: Option<pg_sys::Oid> =
        unsafe { pgrx::direct_function_call(pg_sys::to_regprocedure, &[signature.into_datum()]) };
    oid.map(Into::into)
}

/// How many triggers deep this is.
pub fn trigger_depth() -> i32 {
    // SAFETY: pg_trigger_depth takes no arguments and only reads a variable of trigger.c.
    unsafe { pgrx::direct_function_call(pg_sys::pg_trigger_depth, &[]) }.unwrap_or(0)
}

/// A function's arguments, by position from 0.
pub struct Args(pg_sys::FunctionCallInfo);

impl Args {
    /// One argument.
    pub fn value(&self, position: usize) -> Value {
        // SAFETY: Postgres passes nargs arguments; the SQL declaration has at least as many as are asked for.
        unsafe {
            if position >= (*self.0).nargs as usize {
                return Value::NULL;
            }
            let argument = *(*self.0).args.as_slice((*self.0).nargs as usize).as_ptr().add(position);
            if argument.isnull {
                Value::NULL
            } else {
                Value::of_datum(argument.value)
            }
        }
    }

    /// Whether this is CALL where a procedure may end transactions: outside of a transaction block.
    pub fn is_nonatomic_call(&self) -> bool {
        // SAFETY: the context is null or a node whose tag says what it is (ExecuteCallStmt).
        unsafe {
            let context = (*self.0).context;
            !context.is_null()
                && (*context).type_ == pg_sys::NodeTag::T_CallContext
                && !(*context.cast::<pg_sys::CallContext>()).atomic
        }
    }

    /// The change a trigger function was called for.
    pub fn fired(&self) -> Option<super::table::Fired> {
        super::table::fired(self.0)
    }
}

/// The rows that a set-returning function gives.
pub struct Rows {
    store: *mut pg_sys::Tuplestorestate,
    descriptor: pg_sys::TupleDesc,
}

impl Rows {
    /// Adds a row; the values are copied.
    pub fn emit<const N: usize>(&mut self, values: [Value; N]) {
        let mut datums = values.map(|v| v.datum().unwrap_or(pg_sys::Datum::from(0)));
        let mut nulls = values.map(Value::is_null);
        // SAFETY: both belong to this call; the number of columns is compared, the types are those of the SQL
        // declaration.
        unsafe {
            assert!((*self.descriptor).natts as usize == N, "a row has the columns of its declaration");
            pg_sys::tuplestore_putvalues(self.store, self.descriptor, datums.as_mut_ptr(), nulls.as_mut_ptr());
        }
    }
}

fn refuse_where_impossible(writes: bool) -> Result<()> {
    if writes {
        if super::xact::is_parallel() {
            return Err(Error::Parallel);
        }
        if super::xact::is_read_only() {
            return Err(Error::ReadOnly { what: "a pg_queue function that changes messages or leases" });
        }
    }
    Ok(())
}

/// Calls a function that returns one value.
///
/// # Safety
/// `fcinfo` is what Postgres called the SQL function with.
pub unsafe fn call_value(
    fcinfo: pg_sys::FunctionCallInfo,
    writes: bool,
    f: fn(&Args) -> Result<Value>,
) -> pg_sys::Datum {
    let result = refuse_where_impossible(writes).and_then(|()| f(&Args(fcinfo)));
    match result {
        Ok(value) => {
            // SAFETY: the caller's promise.
            unsafe { (*fcinfo).isnull = value.is_null() };
            value.datum().unwrap_or(pg_sys::Datum::from(0))
        }
        Err(error) => error.raise(),
    }
}

/// Calls a function that returns rows (of one column, too): all at once, into a tuplestore, so that what was
/// taken and what was given are the same whatever the caller does with the rows.
///
/// The caller has looked up the rows' type; it is not looked up again, nor given back to be compared with itself
/// (InitMaterializedSRF does both, for several microseconds).
///
/// # Safety
/// As [`call_value`].
pub unsafe fn call_rows(
    fcinfo: pg_sys::FunctionCallInfo,
    writes: bool,
    f: fn(&Args, &mut Rows) -> Result<()>,
) -> pg_sys::Datum {
    // SAFETY: the caller's promise.
    let result = unsafe { begin_rows(fcinfo) }
        .and_then(|mut rows| refuse_where_impossible(writes).and_then(|()| f(&Args(fcinfo), &mut rows)));
    if let Err(error) = result {
        error.raise();
    }
    pg_sys::Datum::from(0)
}

/// # Safety
/// As [`call_value`].
unsafe fn begin_rows(fcinfo: pg_sys::FunctionCallInfo) -> Result<Rows> {
    let refused = |what: &str| Error::Unsupported { what: what.into(), hint: None };
    // SAFETY: resultinfo is null or a node whose tag says what it is (fmgr.h); the fields are those that
    // execSRF.c fills, and of which InitMaterializedSRF makes the same use. The tuplestore and what it points to
    // live in the query's context; a set's description may be left out where the rows are as expected.
    unsafe {
        let info: *mut pg_sys::ReturnSetInfo = (*fcinfo).resultinfo.cast();
        if info.is_null() || (*info).type_ != pg_sys::NodeTag::T_ReturnSetInfo {
            return Err(refused("a function that returns rows is called where rows are not accepted"));
        }
        let modes = (*info).allowedModes as u32;
        let descriptor = (*info).expectedDesc;
        if modes & pg_sys::SetFunctionReturnMode::SFRM_Materialize == 0 || descriptor.is_null() {
            return Err(refused("a function that returns rows is called where their type is not known"));
        }
        let random_access = modes & pg_sys::SetFunctionReturnMode::SFRM_Materialize_Random != 0;
        let caller = pg_sys::MemoryContextSwitchTo((*(*info).econtext).ecxt_per_query_memory);
        let store = pg_sys::tuplestore_begin_heap(random_access, false, pg_sys::work_mem);
        pg_sys::MemoryContextSwitchTo(caller);
        (*info).returnMode = pg_sys::SetFunctionReturnMode::SFRM_Materialize;
        (*info).setResult = store;
        (*info).setDesc = std::ptr::null_mut();
        Ok(Rows { store, descriptor })
    }
}

/// Declares the C functions behind the SQL functions of `sql/`: `name => value f` or `name => rows f`, `writes`
/// or `looks`.
#[macro_export]
macro_rules! sql_functions {
    ($($name:ident => $kind:ident $access:ident $function:path;)*) => {$(
        #[allow(unsafe_code)] // the entry points have to be exported under the names that the SQL gives
        const _: () = {
            #[unsafe(export_name = concat!("pg_finfo_", stringify!($name)))]
            extern "C-unwind" fn info() -> &'static ::pgrx::pg_sys::Pg_finfo_record {
                &::pgrx::pg_sys::Pg_finfo_record { api_version: 1 }
            }

            #[unsafe(export_name = stringify!($name))]
            #[::pgrx::pg_guard]
            unsafe extern "C-unwind" fn function(
                fcinfo: ::pgrx::pg_sys::FunctionCallInfo,
            ) -> ::pgrx::pg_sys::Datum {
                let (call, access) = ($crate::sql_functions!(@ $kind), $crate::sql_functions!(@ $access));
                let verb = $function;
                // SAFETY: only Postgres calls this, through the SQL declaration.
                unsafe { call(fcinfo, access, verb) }
            }
        };
    )*};
    (@ value) => { $crate::pg::call::call_value };
    (@ rows) => { $crate::pg::call::call_rows };
    (@ writes) => { true };
    (@ looks) => { false };
}

impl Value {
    /// An interval without months and days.
    pub fn of_interval_us(us: i64) -> Value {
        let interval = pgrx::datum::Interval::from_micros(us);
        Value::of(interval)
    }

    /// An interval from its text; an ERROR if it is none.
    pub fn of_interval_text(text: &str) -> Value {
        Value::of_input(pg_sys::interval_in, text)
    }

    /// A timestamptz from its text; an ERROR if it is none.
    pub fn of_time_text(text: &str) -> Value {
        Value::of_input(pg_sys::timestamptz_in, text)
    }

    /// A jsonb from its text; an ERROR if it is none.
    pub fn of_jsonb_text(text: &str) -> Value {
        Value::of_input(pg_sys::jsonb_in, text)
    }

    fn of_input(function: unsafe fn(pg_sys::FunctionCallInfo) -> pg_sys::Datum, text: &str) -> Value {
        let Ok(text) = std::ffi::CString::new(text) else { return Value::NULL };
        // SAFETY: a type's input function takes the text, the type's io parameter (unused by these) and a type
        // modifier (-1: none), and copies what it keeps.
        Value(unsafe {
            pgrx::direct_function_call_as_datum(
                function,
                &[
                    Some(pg_sys::Datum::from(text.as_ptr())),
                    Some(pg_sys::Datum::from(pg_sys::Oid::INVALID)),
                    Some(pg_sys::Datum::from(-1i32)),
                ],
            )
        })
    }

    /// An array of elements of one type.
    pub fn array(element: u32, values: &[Value]) -> Value {
        let mut datums: Vec<pg_sys::Datum> =
            values.iter().map(|v| v.0.unwrap_or(pg_sys::Datum::from(0))).collect();
        let mut nulls: Vec<bool> = values.iter().map(|v| v.is_null()).collect();
        let (mut len, mut by_val, mut align) = (0i16, false, 0 as std::ffi::c_char);
        let (mut lengths, mut bounds) = ([values.len() as i32], [1]);
        // SAFETY: the type's storage is looked up; construct_md_array copies the elements.
        unsafe {
            let element = pg_sys::Oid::from(element);
            pg_sys::get_typlenbyvalalign(element, &mut len, &mut by_val, &mut align);
            let array = pg_sys::construct_md_array(
                datums.as_mut_ptr(),
                nulls.as_mut_ptr(),
                1,
                lengths.as_mut_ptr(),
                bounds.as_mut_ptr(),
                element,
                len.into(),
                by_val,
                align,
            );
            Value(Some(pg_sys::Datum::from(array)))
        }
    }
}
