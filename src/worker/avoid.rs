//! Tables whose owner's code (triggers, constraints, functions in an index) had to be ended together with the worker that
//! ran it, or has ended that worker itself: the next one would be in the same trap at once, and serve nobody else. It
//! keeps away from them for a while, longer each time, and their queues are served by those who use them only. Owns the
//! list, which is in shared memory: whoever begins knows nothing.

use crate::pg::shmem::Avoided;
use crate::pg::{shmem, user, worker};

/// How long a table is avoided at first and at most, microseconds; it doubles each time. One that has behaved for as long
/// as the most, after that, begins anew.
const PAUSE_US: (i64, i64) = (60_000_000, 3_600_000_000);

/// The worker turns to a queue's table, or an archive's, in a transaction. False: it keeps away from it for now.
pub fn may_begin(relation: u32) -> bool {
    worker::turn_to(relation);
    let database = user::database();
    shmem::with_server(|server, now| {
        !server
            .avoided
            .iter()
            .any(|a| (a.database, a.relation) == (database, relation) && a.until_us > now.mono_us)
    })
    .unwrap_or(true)
}

/// The worker ends: if that is for what it was at, the next one is to keep away from there.
pub fn worker_ends() {
    let (database, relation) = (user::database(), worker::turned_to());
    if relation == 0 || !worker::is_ended_by_owner() {
        return;
    }
    let pause_us = shmem::with_server(|server, now| {
        let find = |a: &&mut Avoided| (a.database, a.relation) == (database, relation);
        // Where all are taken the one whose time is over, or is over first, is forgotten.
        let place = match server.avoided.iter_mut().find(find) {
            Some(known) => Some(known),
            None => server.avoided.iter_mut().min_by_key(|a| a.until_us),
        };
        place.map_or(0, |place| {
            let is_known = (place.database, place.relation) == (database, relation)
                && place.until_us.saturating_add(PAUSE_US.1) > now.mono_us;
            let pause_us = if is_known { (2 * place.pause_us).min(PAUSE_US.1) } else { PAUSE_US.0 };
            *place = Avoided { database, relation, until_us: now.mono_us.saturating_add(pause_us), pause_us };
            pause_us
        })
    });
    pgrx::log!(
        "pg_queue worker: what the owner has put on this table does not let itself be cancelled, or ends the worker; it \
         ends, and the next one keeps away from the table for {} s ({})",
        pause_us.unwrap_or(0) / 1_000_000,
        worker::place()
    );
}
