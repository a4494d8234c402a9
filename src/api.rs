//! The SQL functions: which C function of `sql/functions.sql` calls which verb, and whether it changes messages or
//! leases (then it is refused in read-only transactions, on standbys and in parallel workers).

use crate::error::{Error, Result};
use crate::pg::call::{Args, Rows, Value};
use crate::queue::{
    admin, create, finish, grant, health, list, peek, redrive, retry, schedule, send, take, wait,
};

/// A function that the reference names and that is not built yet.
fn unbuilt(_args: &Args) -> Result<Value> {
    Err(Error::NotBuilt { what: "this function".into() })
}

fn unbuilt_rows(_args: &Args, _rows: &mut Rows) -> Result<()> {
    Err(Error::NotBuilt { what: "this function".into() })
}

crate::sql_functions! {
    queue_create => value writes create::queue_create;
    queue_alter => value writes admin::queue_alter;
    queue_drop => value writes admin::queue_drop;
    queue_purge => value writes admin::queue_purge;
    queue_pause => value writes admin::queue_pause;
    queue_resume => value writes admin::queue_resume;
    queue_list => rows looks list::queue_list;
    queue_grant => value writes grant::queue_grant;
    queue_revoke => value writes grant::queue_revoke;
    queue_send => value writes send::send;
    queue_send_batch => rows writes send::send_batch;
    queue_send_entries => rows writes send::send_entries;
    queue_on_change => value looks send::on_change;
    queue_read => rows writes take::queue_read;
    queue_read_any => rows writes take::queue_read_any;
    queue_pop => rows writes take::queue_pop;
    queue_delete_and_read => rows writes take::queue_delete_and_read;
    queue_delete => value writes finish::queue_delete;
    queue_delete_batch => rows writes finish::queue_delete_batch;
    queue_archive => value writes finish::queue_archive;
    queue_archive_batch => rows writes finish::queue_archive_batch;
    queue_cancel => value writes finish::queue_cancel;
    queue_retry => rows writes retry::queue_retry;
    queue_reject => value writes retry::queue_reject;
    queue_release => rows writes retry::queue_release;
    queue_extend => value writes retry::queue_extend;
    queue_extend_batch => rows writes retry::queue_extend_batch;
    queue_peek => rows looks peek::queue_peek;
    queue_redrive => value writes redrive::queue_redrive;
    queue_unarchive => value writes redrive::queue_unarchive;
    queue_wait => value writes wait::queue_wait;
    queue_schedule => value writes schedule::queue_schedule;
    queue_unschedule => value writes schedule::queue_unschedule;
    queue_schedule_pause => value writes schedule::queue_schedule_pause;
    queue_schedules => rows looks schedule::queue_schedules;
    queue_on_schedule => value looks schedule::on_schedule;
    queue_health => rows looks health::queue_health;
    queue_unbuilt => value looks unbuilt;
    queue_unbuilt_rows => rows looks unbuilt_rows;
}
