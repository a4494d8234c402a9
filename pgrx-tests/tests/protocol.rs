//! PROTOCOL.md's rules: each test makes the interleaving happen that its rule is about.
//!
//! A backend is kept still at a wait point (see [`common::Hold`]); the test goes on only once it stands there. Most
//! tests start from a queue whose messages are tracked, or from one whose messages are not (nobody has read it
//! yet, so it is under a mark and its first reader loads): which of them, each test says.

mod common;

use std::time::{Duration, Instant};

use common::*;
use queue_tests::wait_points::advance_clock;
use queue_tests::{wait_until, ClusterOptions, Database, Session, StopMode};

/// Rows of one chunk of a load (queue/load.rs); a load passes "load-row" after each full chunk but the last.
const CHUNK: i64 = 256;

fn cancel(client: &mut Session, pid: i32) {
    client.execute("SELECT pg_cancel_backend($1)", &[&pid]).unwrap();
}

/// What an attempt that was too late leaves behind goes.
fn undo_attempt(client: &mut Session) -> Option<()> {
    client.batch_execute("ROLLBACK; SELECT queue_purge('q')").unwrap();
    None
}

// ---- Send and publish ---------------------------------------------------------------------------------------

#[test]
fn publish_after_a_load_found_the_message_delivers_it_once() {
    let database = database_with(&["q"]);
    let (sender, mut reader) = (session(&database), session(&database));
    let mut hold = Hold::backend(&database, "publish", sender.pid());
    let sending = sender.run("SELECT queue_send('q', '1')").unwrap();
    hold.wait_reached();
    // Visible, not published: the load of an untracked queue finds it. One reader has it when it is published.
    let got = read_one(&mut reader, "q");
    hold.release();
    sending.join().unwrap().1.unwrap();
    assert!(read(&mut reader, "q", 9).is_empty(), "it is leased");
    assert!(delete(&mut reader, "q", &got));
    assert!(read(&mut reader, "q", 9).is_empty());
}

#[test]
fn publish_after_the_message_was_finished_delivers_nothing() {
    let database = database_with(&["q"]);
    let (sender, mut reader) = (session(&database), session(&database));
    let mut hold = Hold::backend(&database, "publish", sender.pid());
    let sending = sender.run("SELECT queue_send('q', '1')").unwrap();
    hold.wait_reached();
    let got = read_one(&mut reader, "q");
    assert!(delete(&mut reader, "q", &got));
    hold.release();
    sending.join().unwrap().1.unwrap();
    assert!(read(&mut reader, "q", 9).is_empty());
}

#[test]
fn publish_of_a_message_that_plain_sql_deleted_delivers_nothing() {
    let database = database_with(&["q"]);
    let (sender, mut reader) = (session(&database), session(&database));
    assert!(read(&mut reader, "q", 1).is_empty()); // tracked
    let mut hold = Hold::backend(&database, "publish", sender.pid());
    let sending = sender.run("SELECT queue_send('q', '1')").unwrap();
    hold.wait_reached();
    reader.batch_execute("DELETE FROM queue.q").unwrap();
    hold.release();
    sending.join().unwrap().1.unwrap();
    assert!(read(&mut reader, "q", 9).is_empty());
}

#[test]
fn publish_of_an_older_update_does_not_bring_back_what_it_said() {
    let database = database_with(&["q"]);
    let (mut client, updater) = (session(&database), session(&database));
    let msg_id = send(&mut client, "q", 1);
    let got = read_one(&mut client, "q");
    assert!(release(&mut client, "q", &got)); // tracked
    let mut hold = Hold::backend(&database, "publish", updater.pid());
    let updating =
        updater.run("UPDATE queue.q SET visible_at = now() + interval '1 h', message = '\"old\"'").unwrap();
    hold.wait_reached();
    client.batch_execute("UPDATE queue.q SET visible_at = NULL, message = '\"new\"'").unwrap();
    hold.release();
    updating.join().unwrap().1.unwrap();
    let got = read_one(&mut client, "q");
    assert_eq!((got.msg_id, &got.message), (msg_id, &serde_json::json!("new")));
}

#[test]
fn update_that_puts_a_message_off_counts_before_it_is_published() {
    let database = database_with(&["q"]);
    let (mut client, updater) = (session(&database), session(&database));
    send(&mut client, "q", 1);
    let got = read_one(&mut client, "q");
    assert!(release(&mut client, "q", &got)); // tracked
    let mut hold = Hold::backend(&database, "publish", updater.pid());
    let updating = updater.run("UPDATE queue.q SET visible_at = now() + interval '1 h'").unwrap();
    hold.wait_reached();
    assert!(read(&mut client, "q", 1).is_empty(), "the row outranks the slot");
    hold.release();
    updating.join().unwrap().1.unwrap();
    assert!(read(&mut client, "q", 1).is_empty());
    client.batch_execute("UPDATE queue.q SET visible_at = NULL").unwrap();
    assert_eq!(read_one(&mut client, "q").count, 1, "none of that was a delivery");
}

#[test]
fn message_sent_during_a_wait_is_seen_though_the_readers_statement_is_older() {
    let database = database_with(&["q"]);
    let (mut sender, reader) = (session(&database), session(&database));
    let mut hold = Hold::backend(&database, "wait-sleep", reader.pid());
    let reading = start_read(reader, "q");
    hold.wait_reached();
    // Registered and about to sleep: the wake-up comes before the sleep.
    let msg_id = send(&mut sender, "q", 1);
    hold.release();
    assert_eq!(ids(&joined(reading).1), [msg_id]);
}

#[test]
fn read_in_repeatable_read_gives_what_is_newer_than_its_snapshot() {
    let database = database_with(&["q"]);
    let (mut sender, mut reader) = (session(&database), session(&database));
    reader.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").unwrap();
    assert_eq!(rows(&mut reader, "q"), 0);
    send(&mut sender, "q", 1);
    let got = read_one(&mut reader, "q");
    assert_eq!(rows(&mut reader, "q"), 0, "its own snapshot is older");
    delete_strictly(&mut reader, "q", &got).unwrap();
    reader.batch_execute("COMMIT").unwrap();
    assert_eq!(rows(&mut reader, "q"), 0);
}

#[test]
fn send_beside_other_sessions_does_as_insert_does() {
    let database = database_with(&["q"]);
    let (mut sender, mut other) = (session(&database), session(&database));
    send(&mut sender, "q", 1);
    // What another session does to the table is heard of before the next send, and waited for.
    other
        .batch_execute(
            "CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql
               AS $$ BEGIN NEW.message := '0'; RETURN NEW; END $$;
             CREATE TRIGGER odd BEFORE INSERT ON queue.q FOR EACH ROW EXECUTE FUNCTION odd()",
        )
        .unwrap();
    send(&mut sender, "q", 2);
    other
        .batch_execute(
            "BEGIN; DROP TRIGGER odd ON queue.q; ALTER TABLE queue.q ADD CONSTRAINT few CHECK (message < '9')",
        )
        .unwrap();
    let sending = sender.run("SELECT queue_send('q', '9')").unwrap();
    database.wait_until_backend_waits(sending.pid(), "Lock", Some("relation"));
    other.batch_execute("COMMIT").unwrap();
    let (mut sender, sent) = sending.join().unwrap();
    assert_eq!(code(sent), "23514");
    other.batch_execute("ALTER TABLE queue.q DROP CONSTRAINT few").unwrap();
    send(&mut sender, "q", 9);
    other.batch_execute("CREATE UNIQUE INDEX CONCURRENTLY once ON queue.q (message)").unwrap();
    assert_eq!(code(try_send(&mut sender, "q", 9)), "23505");
    other.batch_execute("DROP INDEX CONCURRENTLY queue.once").unwrap();
    other.batch_execute("CREATE ROLE sender_beside; GRANT INSERT ON queue.q TO sender_beside").unwrap();
    sender.batch_execute("SET ROLE sender_beside; SELECT queue_send('q', '3')").unwrap();
    other.batch_execute("REVOKE INSERT ON queue.q FROM sender_beside").unwrap();
    assert_eq!(code(try_send(&mut sender, "q", 4)), "42501");
    sender.batch_execute("RESET ROLE").unwrap();
    other.batch_execute("DROP ROLE sender_beside").unwrap();
    // Two that each saw what the other had not sent yet: no order of them explains that.
    for send in ["SELECT queue_send('q', '5')", "SELECT queue_send_batch('q', '{5,6}')"] {
        for client in [&mut sender, &mut other] {
            client.batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM queue.q").unwrap();
        }
        let mut failed = Vec::new();
        for statement in [send, "COMMIT"] {
            for client in [&mut sender, &mut other] {
                failed.extend(client.batch_execute(statement).err().map(|error| code::<()>(Err(error))));
            }
        }
        assert_eq!(failed, ["40001"], "{send}");
    }
    let messages: Vec<_> =
        std::iter::from_fn(|| read(&mut other, "q", 1).pop()).map(|got| got.message).collect();
    assert_eq!(messages, [1, 0, 9, 3, 5, 5, 6]);
}

// ---- Load ---------------------------------------------------------------------------------------------------

#[test]
fn load_whose_snapshot_is_older_than_a_publish_loses_nothing() {
    let database = database_with(&["q"]);
    let (mut sender, mut late, reader) = (session(&database), session(&database), session(&database));
    late.batch_execute("BEGIN").unwrap();
    let low = send(&mut late, "q", 0);
    let sent = send_many(&mut sender, "q", CHUNK + 100);
    let mut hold = Hold::backend(&database, "load-row", reader.pid());
    let reading = start_read(reader, "q");
    hold.wait_reached();
    // The walk is past the low id and has a snapshot that sees neither of these.
    late.batch_execute("COMMIT").unwrap();
    let high = send(&mut sender, "q", 1);
    hold.release();
    let (mut reader, got) = joined(reading);
    delete_ids(&mut reader, "q", &ids(&got));
    let mut all = ids(&got);
    all.extend(drain(&mut reader, "q"));
    let mut expected = vec![low];
    expected.extend(sent);
    expected.push(high);
    assert_eq!(sorted(all), expected);
}

#[test]
fn publish_without_room_during_a_load_is_found_by_the_next() {
    let cluster = ClusterOptions::default().set("pg_queue.ready_window", "300").start().unwrap();
    let database = database_on(&cluster, &["q"]);
    let (mut sender, mut late, reader) = (session(&database), session(&database), session(&database));
    late.batch_execute("BEGIN").unwrap();
    let mut expected = send_many(&mut late, "q", 100);
    expected.extend(send_many(&mut sender, "q", CHUNK + 300));
    let mut hold = Hold::backend(&database, "load-row", reader.pid());
    let reading = start_read(reader, "q");
    hold.wait_reached();
    late.batch_execute("COMMIT").unwrap(); // room for 44 of them
    expected.extend(send_many(&mut sender, "q", 10)); // and for none of these
    hold.release();
    let (mut reader, got) = joined(reading);
    let mut all = ids(&got);
    delete_ids(&mut reader, "q", &all);
    all.extend(drain(&mut reader, "q"));
    assert_eq!(sorted(all), expected);
}

#[test]
fn load_that_is_cancelled_leaves_everything_to_the_next() {
    let database = database_with(&["a", "b"]);
    let mut client = session(&database);
    for (point, queue) in [("load-row", "a"), ("load-snapshot", "b")] {
        let sent = send_many(&mut client, queue, 3 * CHUNK);
        let reader = session(&database);
        let mut hold = Hold::backend(&database, point, reader.pid());
        let reading = start_read(reader, queue);
        hold.wait_reached();
        cancel(&mut client, reading.pid());
        hold.release();
        assert_eq!(code(reading.join().unwrap().1), "57014", "{point}");
        assert_eq!(drain(&mut client, queue), sent, "{point}");
    }
}

#[test]
fn load_past_many_that_are_due_later_ends_in_time_and_the_worker_goes_on_with_it() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q"]);
    let (mut client, reader) = (session(&database), session(&database));
    let sql = "SELECT count(*) FROM queue_send_batch('q', array(SELECT to_jsonb(n) FROM generate_series(1, $1::int8) n), \
               delay => '1 h')";
    let later = 4 * CHUNK;
    assert_eq!(client.query_one(sql, &[&later]).unwrap().get::<_, i64>(0), later);
    let last = send(&mut client, "q", 1);
    let mut worker_hold = Hold::backend(&database, "load-snapshot", worker_pid(&database));
    let mut hold = Hold::backend(&database, "load-row", reader.pid());
    let reading = reader.run_with(|client| try_read(client, "q", 1, None, "0")).unwrap();
    hold.wait_reached();
    advance_clock(&mut client, "25 s"); // its patience is over
    hold.release();
    assert!(joined(reading).1.is_empty(), "it has not come so far");
    worker_hold.wait_reached();
    worker_hold.release();
    assert_eq!(read_awaited(&mut client, "q").msg_id, last);
    assert_eq!(state(&mut client, "q", 1).as_deref(), Some("delayed"));
}

#[test]
fn reader_who_finds_a_load_running_waits_for_it() {
    let database = database_with(&["q"]);
    let (mut sender, loader, second) = (session(&database), session(&database), session(&database));
    let sent = send_many(&mut sender, "q", 2);
    let mut hold = Hold::backend(&database, "load-snapshot", loader.pid());
    let loading = start_read(loader, "q");
    hold.wait_reached();
    // Although it is not to wait for a message: it has not been told yet that there is none.
    let reading = second.run_with(|client| try_read(client, "q", 1, None, "0")).unwrap();
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    hold.release();
    let mut got = ids(&joined(loading).1);
    got.extend(ids(&joined(reading).1));
    assert_eq!(sorted(got), sent);
}

#[test]
fn reader_with_a_transaction_id_loads() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("CREATE TABLE t (n int)").unwrap();
    let sent = send_many(&mut client, "q", 3);
    client.batch_execute("BEGIN; INSERT INTO t VALUES (1)").unwrap();
    assert_eq!(ids(&read(&mut client, "q", 9)), sent);
    let own = send(&mut client, "q", 4);
    assert_eq!(ids(&read(&mut client, "q", 9)), [own]);
    client.batch_execute("COMMIT").unwrap();
    assert!(read(&mut client, "q", 9).is_empty());
}

#[test]
fn reader_with_a_transaction_id_loads_what_others_see() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    set_worker(&database, false);
    let sent = send_many(&mut client, "q", 4);
    let later = send_delayed(&mut client, "q", "1 min");
    cluster.restart(StopMode::Fast).unwrap(); // all of it is under a mark
    let (mut client, mut reader) = (session(&database), session(&database));
    reader.batch_execute("BEGIN").unwrap();
    let own = send(&mut reader, "q", 9);
    reader
        .batch_execute(
            "DELETE FROM queue.q WHERE msg_id = 1; UPDATE queue.q SET visible_at = 'infinity' WHERE msg_id = 2",
        )
        .unwrap();
    assert_eq!(sorted(ids(&read(&mut reader, "q", 9))), [sent[2], sent[3], own], "nothing twice");
    assert!(read(&mut client, "q", 9).is_empty(), "nothing that is not committed");
    reader.batch_execute("ROLLBACK").unwrap();
    assert_eq!(drain(&mut client, "q"), sent, "what it had changed is as it was");
    reader.batch_execute("BEGIN").unwrap();
    let own = send(&mut reader, "q", 10);
    advance_clock(&mut client, "2 min");
    assert_eq!(sorted(ids(&read(&mut reader, "q", 9))), [later, own]);
    reader.batch_execute("COMMIT").unwrap();
    assert!(read(&mut client, "q", 9).is_empty());
    assert_eq!(rows(&mut client, "q"), 2);
}

#[test]
fn reader_with_a_transaction_id_that_has_waited_long_still_loads() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    client.batch_execute("CREATE TABLE t (n int)").unwrap();
    assert!(read(&mut client, "q", 1).is_empty()); // tracked
    worker_pid(&database);
    reader.batch_execute("BEGIN; INSERT INTO t VALUES (1)").unwrap();
    let reading = start_read(reader, "q");
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    advance_clock(&mut client, "5 s");
    client.batch_execute("ALTER TABLE queue.q SET (fillfactor = 90)").unwrap(); // all of it is under a mark
    let msg_id = send(&mut client, "q", 1);
    assert_eq!(ids(&joined(reading).1), [msg_id]);
}

#[test]
fn worker_that_is_to_load_what_is_locked_does_not_spin() {
    let cluster = ClusterOptions::default().set("pg_queue.ready_window", "64").start().unwrap();
    let database = database_on(&cluster, &["q", "other"]);
    let (mut client, mut locker) = (session(&database), session(&database));
    let worker = worker_pid(&database);
    send_many(&mut client, "q", 300);
    assert_eq!(read_for(&mut client, "q", 1, "1 h").len(), 1); // a window of them is tracked
    let mut hold = Hold::backend(&database, "lease-write", worker);
    advance_clock(&mut client, "2 s");
    hold.wait_reached();
    // The worker stands still. Whoever leaves the window nearly empty asks it to load; then it cannot.
    assert_eq!(read_for(&mut client, "q", 60, "1 h").len(), 60);
    locker.batch_execute("BEGIN; LOCK TABLE queue.q").unwrap();
    hold.release();
    let begun = Instant::now();
    let before = cpu_ticks(worker);
    std::thread::sleep(Duration::from_secs(2));
    let used = cpu_ticks(worker) - before;
    let seconds = begun.elapsed().as_secs_f64();
    assert!((used as f64) < 25.0 * seconds, "{used} ticks of 10 ms in {seconds} s");
    let mut hold = Hold::backend(&database, "load-snapshot", worker);
    assert_eq!(hold.reached(), 0);
    locker.batch_execute("COMMIT").unwrap();
    hold.wait_reached(); // now it loads
    hold.release();
}

#[test]
fn scan_whose_snapshot_is_older_than_a_publish_loses_nothing() {
    let database = database_with(&["q"]);
    let (mut sender, mut reader) = (session(&database), session(&database));
    assert!(read(&mut reader, "q", 1).is_empty()); // tracked
    let worker = worker_pid(&database);
    let mut hold = Hold::backend(&database, "scan-snapshot", worker);
    let first = send_delayed(&mut sender, "q", "400 ms");
    hold.wait_reached();
    // The horizon is raised, the snapshot not yet taken.
    let second = send_delayed(&mut sender, "q", "500 ms");
    let far = send_delayed(&mut sender, "q", "1 h");
    hold.release();
    assert_eq!(read_awaited(&mut reader, "q").msg_id, first);
    assert_eq!(read_awaited(&mut reader, "q").msg_id, second);
    assert_eq!(state(&mut reader, "q", far).as_deref(), Some("delayed"));
}

#[test]
fn reader_who_finds_a_scan_running_waits_for_it() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q"]);
    let (mut client, reader) = (session(&database), session(&database));
    assert!(read(&mut client, "q", 1).is_empty()); // tracked
    let mut hold = Hold::backend(&database, "scan-snapshot", worker_pid(&database));
    let msg_id = send_delayed(&mut client, "q", "400 ms");
    hold.wait_reached();
    advance_clock(&mut client, "1 s"); // it is due, and the worker is on its way to it
    let reading = reader.run_with(|client| try_read(client, "q", 1, None, "0")).unwrap();
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    hold.release();
    assert_eq!(ids(&joined(reading).1), [msg_id]);
}

#[test]
fn message_that_is_due_while_the_worker_stands_still_is_found_by_a_reader() {
    let database = database_with(&["q"]);
    let (mut sender, mut reader) = (session(&database), session(&database));
    send(&mut sender, "q", 1);
    read_for(&mut reader, "q", 1, "300 ms"); // a lease that ends, too
    let worker = worker_pid(&database);
    let mut hold = Hold::backend(&database, "lease-write", worker);
    // Another queue's reader keeps the worker busy.
    sender
        .batch_execute("SELECT queue_create('other', durable_leases => true); SELECT queue_send('other', '1')")
        .unwrap();
    let asking = sender.run("SELECT msg_id FROM queue_read('other')").unwrap();
    hold.wait_reached();
    assert_eq!(read_awaited(&mut reader, "q").count, 2, "reads do not depend on the worker");
    hold.release();
    asking.join().unwrap().1.unwrap();
}

// ---- Take ---------------------------------------------------------------------------------------------------

#[test]
fn row_that_moves_between_take_and_fetch_is_found_by_its_id() {
    let database = database_with(&["q"]);
    let (mut client, reader) = (session(&database), session(&database));
    let msg_id = send(&mut client, "q", 1);
    let mut hold = Hold::backend(&database, "take-fetch", reader.pid());
    let reading = start_read(reader, "q");
    hold.wait_reached();
    for n in 0..3 {
        client.execute("UPDATE queue.q SET message = to_jsonb($1::int4)", &[&n]).unwrap();
    }
    hold.release();
    let (mut reader, got) = joined(reading);
    assert_eq!((got[0].msg_id, &got[0].message), (msg_id, &serde_json::json!(2)));
    assert!(delete(&mut reader, "q", &got[0]));
}

#[test]
fn row_that_goes_between_take_and_fetch_is_no_delivery() {
    let database = database_with(&["q"]);
    let (mut client, reader) = (session(&database), session(&database));
    let sent = send_many(&mut client, "q", 2);
    let mut hold = Hold::backend(&database, "take-fetch", reader.pid());
    let reading = start_read(reader, "q");
    hold.wait_reached();
    client.batch_execute("DELETE FROM queue.q WHERE msg_id = 1").unwrap();
    hold.release();
    assert_eq!(ids(&joined(reading).1), sent[1..]);
}

#[test]
fn address_that_another_message_has_by_now_is_not_believed() {
    let database = database_with(&["q"]);
    let (mut client, updater) = (session(&database), session(&database));
    let first = send(&mut client, "q", 1);
    let got = read_one(&mut client, "q");
    assert!(release(&mut client, "q", &got)); // tracked, at the address it has now
    let at = |client: &mut Session, msg_id: i64| -> String {
        client.query_one("SELECT ctid::text FROM queue.q WHERE msg_id = $1", &[&msg_id]).unwrap().get(0)
    };
    let old = at(&mut client, first);
    let mut hold = Hold::backend(&database, "publish", updater.pid());
    // Not HOT (visible_at is indexed), so VACUUM frees the address for the next row.
    let updating = updater.run("UPDATE queue.q SET visible_at = now() - interval '1 h'").unwrap();
    hold.wait_reached();
    let mut second = 0;
    wait_until("another message has the first one's address", || {
        client.batch_execute("VACUUM queue.q").unwrap();
        let id = send(&mut client, "q", 2);
        if at(&mut client, id) == old {
            second = id;
            return true;
        }
        client.execute("DELETE FROM queue.q WHERE msg_id = $1", &[&id]).unwrap();
        false
    });
    let got = read(&mut client, "q", 9);
    let mut messages: Vec<_> = got.iter().map(|d| (d.msg_id, d.message.as_i64().unwrap())).collect();
    messages.sort_unstable();
    assert_eq!(messages, [(first, 1), (second, 2)]);
    hold.release();
    updating.join().unwrap().1.unwrap();
    assert_eq!(sorted(delete_ids(&mut client, "q", &[first, second])), [first, second]);
    assert_eq!(rows(&mut client, "q"), 0);
}

#[test]
fn reader_that_is_cancelled_between_take_and_fetch_gives_the_lease_back() {
    let database = database_with(&["q"]);
    let (mut client, reader) = (session(&database), session(&database));
    let msg_id = send(&mut client, "q", 1);
    let mut hold = Hold::backend(&database, "take-fetch", reader.pid());
    let reading = start_read(reader, "q");
    hold.wait_reached();
    cancel(&mut client, reading.pid());
    hold.release();
    assert_eq!(code(reading.join().unwrap().1), "57014");
    let got = read_one(&mut client, "q");
    assert_eq!((got.msg_id, got.count), (msg_id, 2));
}

#[test]
fn lease_that_is_about_to_be_returned_is_nobody_elses() {
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    send(&mut client, "q", 1);
    reader.batch_execute("BEGIN").unwrap();
    let held = read_one(&mut reader, "q");
    let mut hold = Hold::backend(&database, "return", reader.pid());
    let ending = reader.run_with(|client| client.batch_execute("ROLLBACK")).unwrap();
    hold.wait_reached();
    assert!(read(&mut client, "q", 1).is_empty());
    hold.release();
    ending.join().unwrap().1.unwrap();
    assert!(!delete(&mut client, "q", &held));
    assert_eq!(read_one(&mut client, "q").count, 2);
}

// ---- Finish and retry ---------------------------------------------------------------------------------------

/// A lease on a message and a second one that ends at the same time: when that one is delivered again, the first
/// is past its end too.
fn lease_with_witness(client: &mut Session, lease: &str) -> (Delivery, Delivery) {
    send_many(client, "q", 2);
    let mut got = read_for(client, "q", 2, lease);
    let witness = got.pop().unwrap();
    (got.pop().unwrap(), witness)
}

#[track_caller]
fn wait_for_witness(client: &mut Session, witness: &Delivery) {
    let again = read_awaited(client, "q");
    assert_eq!(again.msg_id, witness.msg_id, "only the witness comes");
    assert!(delete(client, "q", &again));
}

#[test]
fn lease_that_ends_while_its_finish_is_under_way_still_finishes() {
    for point in ["finish-deleted", "finish-verify"] {
        in_time(|lease| {
            let database = database_with(&["q"]);
            let (consumer, mut other) = (session(&database), session(&database));
            let mut hold = Hold::backend(&database, point, consumer.pid());
            let (mine, witness) = lease_with_witness(&mut other, lease);
            let finishing = consumer.run_with(move |client| delete(client, "q", &mine)).unwrap();
            wait_until("the finish stands there, or was refused", || {
                hold.reached() == 1 || finishing.is_done()
            });
            if finishing.is_done() {
                assert!(!finishing.join().unwrap().1, "{point}: it did not come by");
                return None;
            }
            wait_for_witness(&mut other, &witness);
            assert!(read(&mut other, "q", 9).is_empty(), "{point}: pinned");
            hold.release();
            assert!(finishing.join().unwrap().1, "{point}");
            assert!(read(&mut other, "q", 9).is_empty());
            assert_eq!(rows(&mut other, "q"), 0);
            Some(())
        });
    }
}

#[test]
fn aborted_finish_after_the_leases_end_makes_the_message_ready_and_counted() {
    let database = database_with(&["q"]);
    let (mut consumer, mut other) = (session(&database), session(&database));
    in_time(|lease| {
        let (mine, witness) = lease_with_witness(&mut consumer, lease);
        consumer.batch_execute("BEGIN").unwrap();
        if !delete(&mut consumer, "q", &mine) {
            return undo_attempt(&mut consumer);
        }
        wait_for_witness(&mut other, &witness);
        let waiting = reader_asleep(&database, "q");
        consumer.batch_execute("ROLLBACK").unwrap();
        let again = &joined(waiting).1[0];
        assert_eq!((again.msg_id, again.count), (mine.msg_id, 2));
        Some(())
    });
}

#[test]
fn aborted_finish_before_the_leases_end_leaves_the_lease_as_it_was() {
    let database = database_with(&["q"]);
    let (mut consumer, mut other) = (session(&database), session(&database));
    send(&mut consumer, "q", 1);
    let mine = read_one(&mut consumer, "q");
    for undo in ["ROLLBACK", "ROLLBACK TO s; COMMIT"] {
        consumer.batch_execute("BEGIN; SAVEPOINT s").unwrap();
        assert!(delete(&mut consumer, "q", &mine));
        assert!(read(&mut other, "q", 1).is_empty());
        consumer.batch_execute(undo).unwrap();
        assert!(read(&mut other, "q", 1).is_empty(), "the lease runs on after {undo}");
    }
    assert!(delete(&mut other, "q", &mine));
}

#[test]
fn lease_is_extended_by_another_session_while_its_finish_waits_for_commit() {
    let database = database_with(&["q"]);
    let (mut consumer, mut other) = (session(&database), session(&database));
    in_time(|lease| {
        let (mine, witness) = lease_with_witness(&mut consumer, lease);
        consumer.batch_execute("BEGIN").unwrap();
        if !delete(&mut consumer, "q", &mine) || extend(&mut other, "q", &mine, "1 h").is_none() {
            return undo_attempt(&mut consumer);
        }
        wait_for_witness(&mut other, &witness);
        consumer.batch_execute("ROLLBACK").unwrap();
        assert!(read(&mut other, "q", 9).is_empty(), "the lease runs on");
        assert!(delete(&mut other, "q", &mine));
        Some(())
    });
}

#[test]
fn two_transactions_finishing_one_message_finish_it_once() {
    let database = database_with(&["q"]);
    let (mut first, mut second) = (session(&database), session(&database));
    for end in ["COMMIT", "ROLLBACK"] {
        let msg_id = send(&mut first, "q", 1);
        let held = read_one(&mut first, "q");
        first.batch_execute("BEGIN").unwrap();
        assert!(delete(&mut first, "q", &held));
        assert!(!delete(&mut second, "q", &held));
        assert!(!delete_id(&mut second, "q", msg_id));
        assert_eq!(code(delete_strictly(&mut second, "q", &held)), "P0002");
        assert_eq!(retry(&mut second, "q", &held, None), "lost");
        first.batch_execute(end).unwrap();
        assert_eq!(delete(&mut second, "q", &held), end == "ROLLBACK");
        assert_eq!(rows(&mut second, "q"), 0);
    }
}

#[test]
fn two_finishes_without_a_lease_meet_at_the_row() {
    // Both have pinned nothing yet when both verify: what the row says decides.
    let database = database_with(&["q"]);
    let (mut client, first, mut second) = (session(&database), session(&database), session(&database));
    let msg_id = send(&mut client, "q", 1);
    let mut hold = Hold::backend(&database, "finish-verify", first.pid());
    let finishing = first.run_with(move |client| delete_id(client, "q", msg_id)).unwrap();
    hold.wait_reached();
    assert!(!delete_id(&mut second, "q", msg_id), "the other's finish is under way");
    second.batch_execute("DELETE FROM queue.q").unwrap();
    hold.release();
    assert!(!finishing.join().unwrap().1, "plain SQL was faster");
    assert!(read(&mut client, "q", 1).is_empty());
}

#[test]
fn row_that_plain_sql_is_changing_is_finished_as_that_ends() {
    // (what plain SQL does, how it ends, whether the message is there to be finished)
    let cases = [
        ("UPDATE queue.q SET message = '2'", "COMMIT", true),
        ("UPDATE queue.q SET message = '2'", "ROLLBACK", true),
        ("UPDATE queue.q SET visible_at = now()", "COMMIT", true),
        ("DELETE FROM queue.q", "COMMIT", false),
        ("DELETE FROM queue.q", "ROLLBACK", true),
        ("SELECT FROM queue.q FOR UPDATE", "COMMIT", true),
    ];
    let database = database_with(&["q"]);
    let (mut changer, mut consumer) = (session(&database), session(&database));
    for (change, end, is_there) in cases {
        send(&mut changer, "q", 1);
        let held = read_one(&mut changer, "q");
        changer.batch_execute(&format!("BEGIN; {change}")).unwrap();
        let finishing = consumer.run_with(move |client| delete(client, "q", &held)).unwrap();
        database.wait_until_backend_waits(finishing.pid(), "Lock", None);
        changer.batch_execute(end).unwrap();
        let (session, was_finished) = finishing.join().unwrap();
        consumer = session;
        assert_eq!(was_finished, is_there, "{change}; {end}");
        assert_eq!(rows(&mut changer, "q"), 0, "{change}; {end}");
        assert!(read(&mut changer, "q", 9).is_empty(), "{change}; {end}");
    }
}

#[test]
fn row_that_moved_between_pin_and_verify_is_finished() {
    let database = database_with(&["q"]);
    let (mut client, consumer) = (session(&database), session(&database));
    send(&mut client, "q", 1);
    let held = read_one(&mut client, "q");
    let mut hold = Hold::backend(&database, "finish-verify", consumer.pid());
    let finishing = consumer.run_with(move |client| delete(client, "q", &held)).unwrap();
    hold.wait_reached();
    client.batch_execute("UPDATE queue.q SET visible_at = now()").unwrap();
    hold.release();
    assert!(finishing.join().unwrap().1);
    assert_eq!(rows(&mut client, "q"), 0);
    assert!(read(&mut client, "q", 9).is_empty());
}

#[test]
fn untracked_message_that_was_finished_and_rolled_back_is_delivered() {
    let database = database_with(&["q"]);
    let (mut consumer, mut other) = (session(&database), session(&database));
    let sent = send_many(&mut consumer, "q", 3); // under the mark: nobody has read
    consumer.batch_execute("BEGIN").unwrap();
    assert!(delete_id(&mut consumer, "q", sent[1]));
    // A load passes it by while it is pinned.
    assert_eq!(drain(&mut other, "q"), [sent[0], sent[2]]);
    consumer.batch_execute("ROLLBACK").unwrap();
    assert_eq!(drain(&mut other, "q"), sent[1..2]);
}

#[test]
fn finish_in_the_transaction_that_read_rests_on_that_lease() {
    let database = database_with(&["q"]);
    let (mut consumer, mut other) = (session(&database), session(&database));
    let (mine, witness) = {
        send_many(&mut consumer, "q", 2);
        consumer.batch_execute("BEGIN").unwrap();
        let mut got = read_for(&mut consumer, "q", 2, "100 ms");
        (got.remove(0), got.remove(0))
    };
    // Both leases end in the open transaction, and another session gets both messages.
    let again = [read_awaited(&mut other, "q"), read_awaited(&mut other, "q")];
    assert_eq!(ids(&again), [mine.msg_id, witness.msg_id]);
    assert!(
        !delete_id(&mut consumer, "q", mine.msg_id),
        "without naming a lease it means its own, which is lost"
    );
    consumer.batch_execute("COMMIT").unwrap();
    assert!(delete_id(&mut consumer, "q", mine.msg_id), "later it acts on the message whoever holds it");
    assert!(delete(&mut other, "q", &again[1]));
}

#[test]
fn retry_is_delivered_once_it_is_published_and_not_before() {
    let database = database_with(&["q"]);
    let (mut client, consumer) = (session(&database), session(&database));
    send(&mut client, "q", 1);
    let held = read_one(&mut client, "q");
    let mut hold = Hold::backend(&database, "publish", consumer.pid());
    let retrying = consumer.run_with(move |client| retry(client, "q", &held, Some("0"))).unwrap();
    hold.wait_reached();
    assert!(read(&mut client, "q", 9).is_empty(), "committed, not published");
    hold.release();
    assert_eq!(retrying.join().unwrap().1, "retried");
    let got = read_one(&mut client, "q");
    assert_eq!((got.count, got.last_error.as_deref()), (2, Some("failed")));
    assert!(delete(&mut client, "q", &got), "by the address that the retry made");
}

#[test]
fn retry_that_rolled_back_leaves_the_lease_as_it_was() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    send(&mut client, "q", 1);
    let held = read_one(&mut client, "q");
    client.batch_execute("BEGIN").unwrap();
    assert_eq!(retry(&mut client, "q", &held, Some("0")), "retried");
    client.batch_execute("ROLLBACK").unwrap();
    assert!(read(&mut other, "q", 9).is_empty());
    assert!(delete(&mut other, "q", &held));
    assert_eq!(rows(&mut other, "q"), 0);
}

#[test]
fn release_acts_at_commit_and_is_not_counted() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    send(&mut client, "q", 1);
    let held = read_one(&mut client, "q");
    client.batch_execute("BEGIN").unwrap();
    assert!(release(&mut client, "q", &held));
    assert!(read(&mut other, "q", 1).is_empty());
    client.batch_execute("ROLLBACK").unwrap();
    assert!(read(&mut other, "q", 1).is_empty(), "the lease runs on");
    let waiting = reader_asleep(&database, "q");
    assert!(release(&mut client, "q", &held));
    let (_, mut got) = joined(waiting);
    in_time(|delay| {
        let held = got.pop().unwrap();
        assert_eq!(held.count, 1);
        let later = "SELECT queue_release('q', array[$1::int8], array[$2::int8], delay => $3::text::interval)";
        assert_eq!(client.query(later, &[&held.msg_id, &held.lease_id, &delay]).unwrap().len(), 1);
        got = read(&mut other, "q", 1);
        got.is_empty().then_some(())
    });
    assert_eq!(read_awaited(&mut other, "q").count, 1, "nor with a delay");
}

#[test]
fn lengthening_acts_at_once_and_survives_rollback() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    in_time(|lease| {
        let (mine, witness) = lease_with_witness(&mut client, lease);
        client.batch_execute("BEGIN").unwrap();
        if extend(&mut client, "q", &mine, "1 h").is_none() {
            return undo_attempt(&mut client);
        }
        client.batch_execute("ROLLBACK").unwrap();
        wait_for_witness(&mut other, &witness);
        assert!(read(&mut other, "q", 9).is_empty(), "it was lengthened all the same");
        assert!(delete(&mut client, "q", &mine));
        Some(())
    });
}

#[test]
fn shortening_acts_at_commit_only() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    send_many(&mut client, "q", 2);
    let mut held = read_for(&mut client, "q", 2, "1 h");
    let (mut witness, mine) = (held.pop().unwrap(), held.pop().unwrap());
    for end in ["ROLLBACK", "COMMIT"] {
        client.batch_execute("BEGIN").unwrap();
        assert!(extend(&mut client, "q", &mine, "1 ms").is_some());
        // A witness, shortened as much and committed: once it comes, the other's time is over, too.
        assert!(extend(&mut other, "q", &witness, "1 ms").is_some());
        let again = try_read(&mut other, "q", 1, Some("1 h"), LONG).unwrap().remove(0);
        assert_eq!(again.msg_id, witness.msg_id, "{end}");
        assert!(read(&mut other, "q", 9).is_empty(), "before {end}");
        client.batch_execute(end).unwrap();
        if end == "ROLLBACK" {
            assert!(read(&mut other, "q", 9).is_empty(), "it was not shortened");
        }
        witness = again;
    }
    let again = read_awaited(&mut other, "q");
    assert_eq!((again.msg_id, again.count), (mine.msg_id, 2));
    assert!(delete(&mut other, "q", &witness), "the witness is still leased");
}

#[test]
fn cancel_spares_what_is_leased() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    let sent = send_many(&mut client, "q", 2);
    let held = read_one(&mut client, "q");
    let cancel = |client: &mut Session, msg_id: i64| -> bool {
        client.query_one("SELECT queue_cancel('q', $1)", &[&msg_id]).unwrap().get(0)
    };
    assert!(!cancel(&mut other, sent[0]));
    assert!(cancel(&mut other, sent[1]));
    assert!(release(&mut client, "q", &held));
    assert!(cancel(&mut other, sent[0]));
    assert_eq!(rows(&mut other, "q"), 0);
    assert!(read(&mut other, "q", 9).is_empty());
}

#[test]
fn pin_of_what_is_not_there_yet_does_not_hide_it_when_it_comes() {
    let database = database_with(&["q"]);
    let (mut sender, mut finisher, mut reader) = (session(&database), session(&database), session(&database));
    assert!(read(&mut reader, "q", 1).is_empty()); // tracked
    let gid = format!("{}-late", database.name);
    for end in ["COMMIT", "ROLLBACK"] {
        // A prepared transaction's rows come in under a mark, with nobody to publish them one by one.
        sender.batch_execute("BEGIN").unwrap();
        let sent = send_many(&mut sender, "q", 3);
        sender.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).unwrap();
        finisher.batch_execute("BEGIN").unwrap();
        assert!(!delete_id(&mut finisher, "q", sent[1]), "it is not there yet");
        sender.batch_execute(&format!("COMMIT PREPARED '{gid}'")).unwrap();
        let mut got = vec![read_awaited(&mut reader, "q"), read_awaited(&mut reader, "q")];
        finisher.batch_execute(end).unwrap();
        got.push(read_awaited(&mut reader, "q"));
        assert_eq!(sorted(ids(&got)), sent, "{end}");
        assert_eq!(sorted(delete_ids(&mut reader, "q", &sent)), sent, "{end}");
    }
}

#[test]
fn lease_returned_while_another_transaction_finishes_the_message_waits_for_that() {
    let database = database_with(&["q"]);
    let (mut reader, mut finisher, mut other) = (session(&database), session(&database), session(&database));
    for end in ["ROLLBACK", "COMMIT"] {
        let msg_id = match end {
            "ROLLBACK" => send(&mut other, "q", 1),
            _ => 1,
        };
        reader.batch_execute("BEGIN").unwrap();
        assert_eq!(read_awaited(&mut reader, "q").msg_id, msg_id);
        finisher.batch_execute("BEGIN").unwrap();
        assert!(delete_id(&mut finisher, "q", msg_id), "without a fence it acts whoever holds the message");
        reader.batch_execute("ROLLBACK").unwrap();
        assert!(read(&mut other, "q", 1).is_empty(), "pinned");
        finisher.batch_execute(end).unwrap();
        assert_eq!(rows(&mut other, "q"), i64::from(end == "ROLLBACK"));
    }
    assert!(read(&mut other, "q", 1).is_empty());
}

#[test]
fn pop_that_rolled_back_brings_the_message_back() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    let sent = send_many(&mut client, "q", 3);
    let pop = |client: &mut Session| -> Vec<i64> {
        client.query("SELECT msg_id FROM queue_pop('q')", &[]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    client.batch_execute("BEGIN").unwrap();
    assert_eq!(pop(&mut client), sent[..1]);
    client.batch_execute("SAVEPOINT s").unwrap();
    assert_eq!(pop(&mut client), sent[1..2]);
    assert_eq!(pop(&mut other), sent[2..]);
    client.batch_execute("ROLLBACK TO s").unwrap();
    let back = read_one(&mut other, "q");
    assert_eq!((back.msg_id, back.count), (sent[1], 2));
    client.batch_execute("ROLLBACK").unwrap();
    let back = read_one(&mut other, "q");
    assert_eq!((back.msg_id, back.count), (sent[0], 2));
    assert_eq!(rows(&mut other, "q"), 2);
}

#[test]
fn delete_and_read_is_undone_as_one() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    let sent = send_many(&mut client, "q", 2);
    let held = read_one(&mut client, "q");
    let next = |client: &mut Session| -> Vec<i64> {
        let sql = "SELECT msg_id FROM queue_delete_and_read('q', array[$1::int8], array[$2::int8])";
        let rows = client.query(sql, &[&held.msg_id, &held.lease_id]).unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    client.batch_execute("BEGIN").unwrap();
    assert_eq!(next(&mut client), sent[1..]);
    assert!(read(&mut other, "q", 9).is_empty());
    client.batch_execute("ROLLBACK").unwrap();
    let back = read_one(&mut other, "q");
    assert_eq!((back.msg_id, back.count), (sent[1], 2), "read and given back");
    assert!(release(&mut other, "q", &back));
    assert_eq!(next(&mut client), sent[1..], "the first one's lease ran on and finishes");
    assert_eq!(rows(&mut other, "q"), 1);
}

// ---- Wait ---------------------------------------------------------------------------------------------------

/// Returns when a reader that sleeps has done so for a while, or has what it wants.
fn wait_settled(database: &Database, pid: i32) {
    let mut client = session(database);
    let (mut settled, mut since) = (0, Instant::now());
    wait_until("the reader sleeps", || {
        let sql =
            "SELECT FROM pg_stat_activity WHERE pid = $1 AND (wait_event_type = 'Extension' OR state = 'idle')";
        let is_still = client.query_opt(sql, &[&pid]).unwrap().is_some();
        let now = sleeps(pid);
        if !is_still || now != settled {
            (settled, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_millis(50)
    });
}

#[test]
fn woken_waiter_that_is_cancelled_passes_the_wake_up_on() {
    let database = database_with(&["q"]);
    let (mut client, first) = (session(&database), session(&database));
    let mut hold = Hold::backend(&database, "wait-sleep", first.pid());
    let first = start_read(first, "q");
    hold.wait_reached();
    let second = reader_asleep(&database, "q"); // after the first in the list
    wait_settled(&database, second.pid());
    let msg_id = send(&mut client, "q", 1); // wakes the first
    cancel(&mut client, first.pid());
    wait_settled(&database, second.pid());
    assert!(!second.is_done(), "the wake-up went to the first");
    assert_eq!(state(&mut client, "q", msg_id).as_deref(), Some("ready"));
    hold.release();
    assert_eq!(code(first.join().unwrap().1), "57014");
    assert_eq!(ids(&joined(second).1), [msg_id]);
}

#[test]
fn woken_waiter_that_is_terminated_passes_the_wake_up_on() {
    let database = database_with(&["q"]);
    let (mut client, first) = (session(&database), session(&database));
    let mut hold = Hold::backend(&database, "wait-sleep", first.pid());
    let first = start_read(first, "q");
    hold.wait_reached();
    let second = reader_asleep(&database, "q");
    let msg_id = send(&mut client, "q", 1);
    client.execute("SELECT pg_terminate_backend($1)", &[&first.pid()]).unwrap();
    hold.release();
    assert_terminated(first.join().unwrap().1);
    assert_eq!(ids(&joined(second).1), [msg_id]);
}

#[test]
fn woken_waiter_that_comes_too_late_sleeps_on() {
    let database = database_with(&["q"]);
    let (mut client, first) = (session(&database), session(&database));
    let mut hold = Hold::backend(&database, "wait-sleep", first.pid());
    let first = start_read(first, "q");
    hold.wait_reached();
    let sent = send(&mut client, "q", 1);
    let taken = read_one(&mut client, "q"); // from under its nose
    assert_eq!(taken.msg_id, sent);
    hold.release();
    database.wait_until_backend_waits(first.pid(), "Extension", None);
    assert!(release(&mut client, "q", &taken));
    assert_eq!(ids(&joined(first).1), [sent]);
}

#[test]
fn all_waiters_are_served_by_what_comes_in_under_a_mark() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let waiting: Vec<Reading> = (0..3).map(|_| reader_asleep(&database, "q")).collect();
    client
        .batch_execute(
            "BEGIN;
             ALTER TABLE queue.q DISABLE TRIGGER pg_queue_change;
             INSERT INTO queue.q (message) VALUES ('1'), ('2'), ('3');
             ALTER TABLE queue.q ENABLE ALWAYS TRIGGER pg_queue_change;
             COMMIT",
        )
        .unwrap();
    let got: Vec<i64> = waiting.into_iter().flat_map(|reading| ids(&joined(reading).1)).collect();
    assert_eq!(sorted(got), [1, 2, 3]);
}

#[test]
fn read_from_several_queues_brings_in_each_that_is_not_tracked() {
    let database = database_with(&["a", "b"]);
    let mut client = session(&database);
    send(&mut client, "b", 1);
    send(&mut client, "a", 1);
    let got = client.query("SELECT queue FROM queue_read_any(array['a', 'b'], 10)", &[]).unwrap();
    let queues: Vec<&str> = got.iter().map(|row| row.get(0)).collect();
    assert_eq!(queues, ["a", "b"], "a queue that has something does not hide the others");
}

#[test]
fn waiters_on_a_queues_old_name_swallow_no_wake_up() {
    let database = database_with(&["old"]);
    let mut client = session(&database);
    let waiting = [reader_asleep(&database, "old"), reader_asleep(&database, "old")];
    client.batch_execute("ALTER TABLE queue.old RENAME TO new").unwrap();
    let reading = start_read(session(&database), "new");
    let msg_id = send(&mut client, "new", 1);
    assert_eq!(ids(&joined(reading).1), [msg_id]);
    for reading in waiting {
        // Whoever was not woken by the renaming is by a message that comes later.
        send(&mut client, "new", 2);
        assert_eq!(code(reading.join().unwrap().1), "42704");
    }
    assert_eq!(drain(&mut client, "new").len(), 2);
}

#[test]
fn drop_wakes_the_queues_waiters() {
    let database = database_with(&["a", "b"]);
    let mut client = session(&database);
    for (queue, sql) in [("a", "SELECT queue_drop('a')"), ("b", "DROP TABLE queue.b")] {
        let waiting: Vec<Reading> = (0..3).map(|_| reader_asleep(&database, queue)).collect();
        client.batch_execute(sql).unwrap();
        for reading in waiting {
            assert_eq!(code(reading.join().unwrap().1), "42704", "{sql}");
        }
    }
}

#[test]
fn drop_that_rolled_back_leaves_waiters_and_messages() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let waiting = reader_asleep(&database, "q");
    client.batch_execute("BEGIN; SELECT queue_drop('q'); ROLLBACK").unwrap();
    let msg_id = send(&mut client, "q", 1);
    assert_eq!(ids(&joined(waiting).1), [msg_id]);
}

#[test]
fn queue_dropped_and_made_anew_has_none_of_the_olds_messages() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    send_many(&mut client, "q", 5);
    let held = read_one(&mut other, "q");
    client.batch_execute("SELECT queue_drop('q', force => true), queue_create('q')").unwrap();
    assert!(read(&mut other, "q", 9).is_empty());
    let sent = send(&mut client, "q", 1);
    assert_eq!(sent, held.msg_id);
    assert!(!delete(&mut other, "q", &held), "a lease of the old queue's");
    assert_eq!(drain(&mut other, "q"), [sent]);
}

#[test]
fn pause_holds_back_and_resume_wakes() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_pause('q')").unwrap();
    let msg_id = send(&mut client, "q", 1);
    assert!(read(&mut client, "q", 1).is_empty());
    let waiting = reader_asleep(&database, "q");
    client.batch_execute("SELECT queue_resume('q')").unwrap();
    assert_eq!(ids(&joined(waiting).1), [msg_id]);
}

#[test]
fn settings_changed_while_a_queue_is_being_attached_count() {
    let database = database_with(&["q"]);
    let (mut client, reader) = (session(&database), session(&database));
    client.batch_execute("INSERT INTO queue.q (message) VALUES ('1')").unwrap();
    let mut hold = Hold::backend(&database, "attach", reader.pid());
    let reading = reader.run_with(|client| try_read(client, "q", 1, None, "0")).unwrap();
    hold.wait_reached();
    client.batch_execute("SELECT queue_pause('q')").unwrap();
    hold.release();
    assert_eq!(joined(reading).1, []);
}

// ---- The worker's moves -------------------------------------------------------------------------------------

fn queue_with_dead_letters(client: &mut Session) {
    client
        .batch_execute(
            "SELECT queue_create('dead');
             SELECT queue_create('q', max_deliveries => 1, dead_letter_queue => 'dead')",
        )
        .unwrap();
}

#[test]
fn exhausted_message_is_moved_once_no_other_transaction_is_at_it() {
    let database = database_with(&["other"]);
    let (mut client, mut locker) = (session(&database), session(&database));
    queue_with_dead_letters(&mut client);
    let msg_id = send(&mut client, "q", 7);
    let mut hold = Hold::backend(&database, "move-pinned", worker_pid(&database));
    read_for(&mut client, "q", 1, "50 ms");
    hold.wait_reached();
    locker.batch_execute("BEGIN; SELECT FROM queue.q FOR UPDATE").unwrap();
    hold.release();
    // The worker does not wait for the row: it serves other queues meanwhile.
    wait_until("the worker has given it up for now", || {
        state(&mut client, "q", msg_id).as_deref() == Some("exhausted")
    });
    send_delayed(&mut client, "other", "100 ms");
    assert_eq!(read_awaited(&mut client, "other").count, 1);
    assert_eq!(rows(&mut client, "dead"), 0);
    assert!(read(&mut client, "q", 9).is_empty(), "it had its last delivery");
    locker.batch_execute("COMMIT").unwrap();
    let dead = read_awaited(&mut client, "dead");
    assert_eq!(dead.message, 7);
    assert_eq!(rows(&mut client, "q"), 0);
}

/// A trigger that watches deletions, so that the worker deletes by statements and not by address.
const WATCHED: &str =
    "CREATE FUNCTION public.watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER watch AFTER DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION public.watch()";

#[test]
fn exhausted_message_that_is_changed_meanwhile_is_moved_as_it_is_then() {
    for (point, watch) in [("move-pinned", WATCHED), ("move-found", ""), ("move-found", WATCHED)] {
        let database = database_with(&[]);
        let (mut client, mut other) = (session(&database), session(&database));
        queue_with_dead_letters(&mut client);
        client.batch_execute(watch).unwrap();
        send(&mut client, "q", 7);
        let mut hold = Hold::backend(&database, point, worker_pid(&database));
        read_for(&mut client, "q", 1, "50 ms");
        hold.wait_reached();
        other.batch_execute("UPDATE queue.q SET headers = '{\"changed\": true}', message = '8'").unwrap();
        hold.release();
        assert_eq!(read_awaited(&mut client, "dead").message, 8, "{point} {watch}");
        let sql = "SELECT headers->>'changed' FROM queue.dead";
        assert_eq!(client.query_one(sql, &[]).unwrap().get::<_, &str>(0), "true");
        assert_eq!((rows(&mut client, "q"), rows(&mut client, "dead")), (0, 1));
    }
}

#[test]
fn message_whose_life_is_prolonged_while_it_expires_lives() {
    for watch in ["", WATCHED] {
        let database = database_with(&[]);
        let (mut client, mut other) = (session(&database), session(&database));
        queue_with_dead_letters(&mut client);
        client.batch_execute(watch).unwrap();
        let mut hold = Hold::backend(&database, "move-found", worker_pid(&database));
        client.batch_execute("SELECT queue_send('q', '7', ttl => '10 ms')").unwrap();
        hold.wait_reached();
        other.batch_execute("UPDATE queue.q SET expires_at = NULL").unwrap();
        hold.release();
        assert_eq!(read_awaited(&mut client, "q").message, 7, "{watch}");
        assert_eq!(rows(&mut client, "dead"), 0);
    }
}

#[test]
fn finish_and_move_of_an_exhausted_message_exclude_each_other() {
    let database = database_with(&[]);
    let (mut client, mut consumer) = (session(&database), session(&database));
    queue_with_dead_letters(&mut client);
    let msg_id = send(&mut client, "q", 7);
    let mut hold = Hold::backend(&database, "move-pinned", worker_pid(&database));
    let held = read_for(&mut consumer, "q", 1, "50 ms").remove(0);
    hold.wait_reached();
    assert!(!delete(&mut consumer, "q", &held), "its lease is over");
    assert!(!delete_id(&mut consumer, "q", msg_id), "and it is on its way");
    hold.release();
    assert_eq!(read_awaited(&mut client, "dead").message, 7);
    assert_eq!((rows(&mut client, "q"), rows(&mut client, "dead")), (0, 1));
}

#[test]
fn exhausted_message_that_plain_sql_deletes_meanwhile_is_not_moved() {
    let database = database_with(&[]);
    let (mut client, mut other) = (session(&database), session(&database));
    queue_with_dead_letters(&mut client);
    send(&mut client, "q", 7);
    let mut hold = Hold::backend(&database, "move-pinned", worker_pid(&database));
    read_for(&mut client, "q", 1, "50 ms");
    hold.wait_reached();
    other.batch_execute("DELETE FROM queue.q").unwrap();
    hold.release();
    // The next one is moved after it: so the worker has been past the first.
    send(&mut client, "q", 8);
    read_for(&mut client, "q", 1, "50 ms");
    assert_eq!(read_awaited(&mut client, "dead").message, 8);
    assert_eq!(rows(&mut client, "dead"), 1);
}

#[test]
fn worker_waits_for_no_table_lock() {
    let database = database_with(&[]);
    let (mut client, mut locker) = (session(&database), session(&database));
    queue_with_dead_letters(&mut client);
    client
        .batch_execute(
            "SELECT queue_create('witness', max_deliveries => 1, dead_letter_queue => 'dead');
             SELECT queue_create('durable', durable_leases => true); SELECT queue_send('durable', '1')",
        )
        .unwrap();
    send(&mut client, "q", 7);
    send_many(&mut client, "witness", 3);
    let worker = worker_pid(&database);
    let mut hold = Hold::backend(&database, "lease-write", worker);
    let asking = session(&database).run("SELECT msg_id FROM queue_read('durable')").unwrap();
    hold.wait_reached();
    // It stands still until there is something to move, and a lock in its way.
    exhaust(&mut client, "q", 1);
    locker.batch_execute("BEGIN; LOCK TABLE queue.q").unwrap();
    hold.release();
    asking.join().unwrap().1.unwrap();
    // It moves what is in no other's way, one by one: in the second round at the latest it has met the lock.
    for n in 1..=3 {
        exhaust(&mut client, "witness", 1);
        let dead = read_awaited(&mut client, "dead");
        assert_eq!(dead.message, n);
        assert!(delete(&mut client, "dead", &dead));
        let waits = client
            .query_one("SELECT wait_event_type FROM pg_stat_activity WHERE pid = $1", &[&worker])
            .unwrap()
            .get::<_, Option<String>>(0);
        assert_ne!(waits.as_deref(), Some("Lock"));
    }
    locker.batch_execute("COMMIT").unwrap();
    assert_eq!(read_awaited(&mut client, "dead").message, 7);
}

// ---- Whole queues -------------------------------------------------------------------------------------------

#[test]
fn rewrites_of_the_table_reset_nothing() {
    let rewrites = [
        "VACUUM FULL queue.q",
        "DO $$ BEGIN
             EXECUTE (SELECT format('CLUSTER queue.q USING %I', relname) FROM pg_index JOIN pg_class c ON c.oid = indexrelid
                      WHERE indrelid = 'queue.q'::regclass AND indisprimary);
         END $$",
        "ALTER TABLE queue.q ADD COLUMN extra float8 DEFAULT random()",
        "ALTER TABLE queue.q SET UNLOGGED",
        "REINDEX TABLE queue.q",
    ];
    // In as many reads as it takes: one that meets a load gives what it has.
    let lease = |reader: &mut Session, quantity: usize| {
        let mut got = Vec::new();
        wait_until("as many were delivered", || {
            got.extend(read_for(reader, "q", (quantity - got.len()) as i64, "1 h"));
            got.len() == quantity
        });
        got
    };
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    for rewrite in rewrites {
        // Most of the table goes, so that addresses lie beyond its end afterwards.
        assert!(read(&mut reader, "q", 1).is_empty()); // tracked from here on
        let sent = send_many(&mut client, "q", 1_000);
        let (gone, kept) = sent.split_at(900);
        let held = lease(&mut reader, 1_000);
        assert_eq!(ids(&held), sent, "{rewrite}");
        assert_eq!(delete_ids(&mut reader, "q", gone).len(), gone.len());
        for delivery in &held[910..] {
            assert!(release(&mut reader, "q", delivery));
        }
        client.batch_execute(rewrite).unwrap();
        assert_eq!(ids(&lease(&mut reader, 90)), kept[10..], "{rewrite}: what was ready is");
        assert!(read(&mut reader, "q", 9).is_empty(), "{rewrite}: once");
        for delivery in &held[900..910] {
            assert!(extend(&mut reader, "q", delivery, "1 h").is_some(), "{rewrite}: leases stay");
            assert!(delete(&mut reader, "q", delivery), "{rewrite}: and finish");
        }
        assert_eq!(delete_ids(&mut reader, "q", kept).len(), 90, "{rewrite}");
        assert_eq!(rows(&mut client, "q"), 0, "{rewrite}");
    }
}

#[test]
fn rewrite_waits_for_a_reader_between_take_and_fetch() {
    let database = database_with(&["q"]);
    for rewrite in ["VACUUM FULL queue.q", "TRUNCATE queue.q"] {
        let (mut client, reader) = (session(&database), session(&database));
        let msg_id = send(&mut client, "q", 1);
        let mut hold = Hold::backend(&database, "take-fetch", reader.pid());
        let reading = start_read(reader, "q");
        hold.wait_reached();
        let rewriting = client.run_with(move |client| client.batch_execute(rewrite)).unwrap();
        database.wait_until_backend_waits(rewriting.pid(), "Lock", Some("relation"));
        hold.release();
        let (mut reader, got) = joined(reading);
        assert_eq!(ids(&got), [msg_id]);
        rewriting.join().unwrap().1.unwrap();
        assert_eq!(delete(&mut reader, "q", &got[0]), rewrite.starts_with("VACUUM"));
    }
}

#[test]
fn truncate_between_pops_forgets_every_slot() {
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    send_many(&mut client, "q", 700);
    let held = read_for(&mut reader, "q", 100, "1 h");
    client.batch_execute("TRUNCATE queue.q").unwrap();
    assert!(read(&mut reader, "q", 1_000).is_empty());
    assert!(held.iter().all(|delivery| !delete(&mut reader, "q", delivery)));
    let sent = send_many(&mut client, "q", 10);
    assert_eq!(drain(&mut reader, "q"), sent);
}

#[test]
fn rows_that_came_in_while_the_trigger_was_off_are_found_when_it_is_on() {
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    assert!(read(&mut reader, "q", 1).is_empty()); // tracked
    client
        .batch_execute(
            "BEGIN;
             ALTER TABLE queue.q DISABLE TRIGGER pg_queue_change;
             INSERT INTO queue.q (message) VALUES ('1'), ('2');
             ALTER TABLE queue.q ENABLE ALWAYS TRIGGER pg_queue_change;
             COMMIT",
        )
        .unwrap();
    assert_eq!(drain(&mut reader, "q").len(), 2);
}

#[test]
fn purge_empties_the_queue_and_what_is_in_flight() {
    let database = database_with(&["q"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    send_many(&mut client, "q", 20);
    let held = read_one(&mut reader, "q");
    let purged: i64 = client.query_one("SELECT queue_purge('q')", &[]).unwrap().get(0);
    assert_eq!(purged, 20);
    assert!(!delete(&mut reader, "q", &held));
    assert!(read(&mut reader, "q", 99).is_empty());
    let sent = send(&mut client, "q", 1);
    assert_eq!(drain(&mut reader, "q"), [sent]);
}

#[test]
fn renamed_queue_goes_on_under_its_new_name() {
    let database = database_with(&["old"]);
    let (mut client, mut reader) = (session(&database), session(&database));
    let sent = send_many(&mut client, "old", 3);
    let held = read_one(&mut reader, "old");
    client.batch_execute("ALTER TABLE queue.old RENAME TO new").unwrap();
    assert_eq!(code(try_read(&mut reader, "old", 1, None, "0")), "42704");
    assert!(delete(&mut reader, "new", &held));
    assert_eq!(drain(&mut reader, "new"), sent[1..]);
    send(&mut client, "new", 4);
    assert_eq!(read_one(&mut reader, "new").message, 4);
}
