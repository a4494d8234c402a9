//! What reviewers found by reading when they came a second time, on 2026-11-27: a message's way, the dispatcher, the
//! worker. These were seen to fail before they were mended, but for three: that waiting costs nothing, and that a broken
//! queue does not fill the log, guard what the mends might have brought; and the settings that change in the midst of a
//! round were taken in before, too, since that round is followed by another.

mod common;

use std::time::{Duration, Instant};

use common::*;
use postgres::types::FromSql;
use postgres::Client;
use queue_tests::{wait_points, wait_until, Cluster, ClusterOptions, StopMode};

fn value<T: for<'a> FromSql<'a>>(client: &mut Client, sql: &str) -> T {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

fn text(client: &mut Client, sql: &str) -> String {
    value::<Option<String>>(client, sql).unwrap_or_default()
}

// ---- A table that this transaction has made anew --------------------------------------------------------------

#[test]
fn read_in_a_transaction_that_has_truncated_or_rewritten_the_table_hides_nothing_once_that_is_undone() {
    let cluster = Cluster::start_new().unwrap();
    for change in ["TRUNCATE queue.q", "ALTER TABLE queue.q ADD COLUMN x uuid DEFAULT gen_random_uuid()"] {
        for (begin, undo) in [("BEGIN", "ROLLBACK"), ("BEGIN; SAVEPOINT s", "ROLLBACK TO s; COMMIT")] {
            // The dispatcher knows of what is due soon, and not of the other.
            for delay in ["5 s", "1 h"] {
                let database = database_on(&cluster, &["q"]);
                let mut client = session(&database);
                let mut sent = vec![send(&mut client, "q", 1), send(&mut client, "q", 2)];
                client.batch_execute("ALTER TABLE queue.q SET (fillfactor = 90)").unwrap();
                sent.push(send(&mut client, "q", 3));
                let delayed = send_delayed(&mut client, "q", delay);
                client.batch_execute(&format!("{begin}; {change}")).unwrap();
                let got = ids(&read(&mut client, "q", 9));
                if change.starts_with("TRUNCATE") {
                    assert!(got.is_empty(), "{got:?} of no messages");
                } else if delay == "1 h" {
                    assert!(got.iter().all(|msg_id| sent.contains(msg_id)), "{got:?} of {sent:?}");
                }
                client.batch_execute(undo).unwrap();
                wait_points::advance_clock(&mut client, delay);
                sent.push(delayed);
                let mut other = session(&database);
                let mut got = Vec::new();
                wait_until("all are read", || {
                    got.extend(ids(&read_for(&mut other, "q", 9, "1 h")));
                    sorted(got.clone()) == sent
                });
            }
        }
    }
}

#[test]
fn lease_outlives_a_restart_though_the_queue_is_first_used_by_who_truncates_it_in_vain() {
    let changes = [
        ("TRUNCATE queue.q; SELECT queue_send('q', '9')", "ROLLBACK"),
        ("SAVEPOINT s; TRUNCATE queue.q; SELECT queue_read('q'); ROLLBACK TO s", "COMMIT"),
        ("ALTER TABLE queue.q ADD COLUMN x uuid DEFAULT gen_random_uuid(); SELECT queue_read('q')", "COMMIT"),
    ];
    for (change, end) in changes {
        let cluster = ClusterOptions::default().start().unwrap();
        let database = database_on(&cluster, &["q"]);
        let mut client = session(&database);
        let msg_id = send(&mut client, "q", 1);
        let held = read_for(&mut client, "q", 1, "1 h").remove(0);
        wait_written(&mut client, "q", &[msg_id]);
        set_worker(&database, false);
        cluster.restart(StopMode::Fast).unwrap();
        let mut client = session(&database);
        client.batch_execute(&format!("BEGIN; {change}")).unwrap();
        client.batch_execute(end).unwrap();
        assert!(read(&mut session(&database), "q", 9).is_empty(), "{change}");
        assert!(delete(&mut client, "q", &held), "{change}");
    }
}

#[test]
fn id_that_comes_anew_after_truncate_is_another_message() {
    let database = database_with(&["q", "r"]);
    let mut client = session(&database);
    for (queue, before) in [("q", ""), ("r", "SELECT queue_delete('r', 1);")] {
        assert!(read(&mut client, queue, 1).is_empty());
        let old = send(&mut client, queue, 1);
        let truncate = format!("TRUNCATE queue.{queue} RESTART IDENTITY");
        client.batch_execute(&format!("BEGIN; {before} {truncate}")).unwrap();
        assert_eq!(send(&mut client, queue, 2), old);
        let got = read(&mut client, queue, 9);
        assert_eq!((ids(&got), got[0].count), (vec![old], 1), "{queue}");
        assert!(read(&mut client, queue, 9).is_empty());
        client.batch_execute("COMMIT").unwrap();
        assert!(read(&mut session(&database), queue, 9).is_empty(), "{queue}: it is leased");
        assert!(delete(&mut client, queue, &got[0]), "{queue}");
    }
}

#[test]
fn waiting_in_a_transaction_that_has_truncated_the_queue_costs_nothing() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    assert!(read(&mut client, "q", 1).is_empty());
    send_many(&mut client, "q", 3);
    client.batch_execute("BEGIN; TRUNCATE queue.q").unwrap();
    let pid = client.pid();
    let before = (cpu_ticks(pid), sleeps(pid));
    assert!(try_read(&mut client, "q", 9, None, "2 s").unwrap().is_empty());
    // Of two seconds, of which a busy machine may not give it much; nor does it sleep a little and look again.
    let (ticks, naps) = (cpu_ticks(pid) - before.0, sleeps(pid) - before.1);
    assert!(ticks < 25 && naps < 100, "{ticks} ticks of 200, asleep {naps} times");
    client.batch_execute("ROLLBACK").unwrap();
    assert_eq!(read(&mut client, "q", 9).len(), 3);
}

// ---- Own messages ---------------------------------------------------------------------------------------------

#[test]
fn count_of_an_own_message_that_plain_sql_raised_in_vain_is_undone() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "BEGIN; SELECT queue_send('q', '1'); SAVEPOINT a; UPDATE queue.q SET delivery_count = 20; \
             SELECT queue_read('q'); ROLLBACK TO a; SELECT queue_read('q'); ROLLBACK TO a; COMMIT",
        )
        .unwrap();
    // (Read, where it had twenty deliveries, it was not.)
    assert_eq!(read_one(&mut session(&database), "q").count, 2);
    client
        .batch_execute(
            "BEGIN; SELECT queue_send('q', '1'); SAVEPOINT a; UPDATE queue.q SET delivery_count = 7; \
             SELECT queue_read('q'); ROLLBACK TO a; SELECT queue_read('q'); ROLLBACK TO a; COMMIT",
        )
        .unwrap();
    assert_eq!(read_one(&mut session(&database), "q").count, 3, "after two reads that were undone");
}

fn changes_again(client: &mut Client, name: &str) {
    client
        .batch_execute(&format!(
            "CREATE OR REPLACE FUNCTION public.again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             IF NEW.visible_at IS NOT NULL THEN UPDATE queue.q SET visible_at = NULL WHERE msg_id = NEW.msg_id; END IF; \
             RETURN NULL; END $$; \
             CREATE TRIGGER {name} AFTER UPDATE ON queue.q FOR EACH ROW EXECUTE FUNCTION public.again()"
        ))
        .unwrap();
}

#[test]
fn own_message_that_a_trigger_brings_forward_again_is_delivered() {
    let puts_off = [
        "SELECT queue_retry('q', 1, delay => '1 h')",
        "UPDATE queue.q SET visible_at = now() + '1 h'",
        "SELECT queue_read('q'); SELECT queue_release('q', ARRAY[1], delay => '1 h')",
    ];
    for trigger in ["a", "z"] {
        for (put_off, read_in_it) in puts_off.iter().flat_map(|put_off| [(put_off, false), (put_off, true)]) {
            let database = database_with(&["q"]);
            let mut client = session(&database);
            changes_again(&mut client, trigger);
            client.batch_execute(&format!("BEGIN; SELECT queue_send('q', '1'); {put_off}")).unwrap();
            if read_in_it {
                assert_eq!(ids(&read(&mut client, "q", 1)), [1], "{trigger}: {put_off}");
                client.batch_execute("COMMIT").unwrap();
            } else {
                client.batch_execute("COMMIT").unwrap();
                assert_eq!(ids(&read(&mut session(&database), "q", 1)), [1], "{trigger}: {put_off}");
            }
        }
    }
}

#[test]
fn own_message_that_a_trigger_puts_off_is_put_off() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE FUNCTION public.later() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             IF NEW.visible_at IS NULL THEN UPDATE queue.q SET visible_at = clock_timestamp() + '1 h' \
             WHERE msg_id = NEW.msg_id; END IF; RETURN NULL; END $$; \
             CREATE TRIGGER a AFTER UPDATE ON queue.q FOR EACH ROW EXECUTE FUNCTION public.later(); \
             BEGIN; SELECT queue_send('q', '1'); UPDATE queue.q SET headers = '{}'",
        )
        .unwrap();
    assert!(read(&mut client, "q", 1).is_empty());
    client.batch_execute("COMMIT").unwrap();
    assert!(read(&mut session(&database), "q", 1).is_empty());
}

// ---- Finishing ------------------------------------------------------------------------------------------------

#[test]
fn messages_that_a_trigger_on_the_archive_changes_are_archived_so() {
    for (does, archived) in [
        ("UPDATE queue.q SET headers = '{\"after\": 1}' WHERE msg_id = NEW.msg_id + 1", "1, 2 {\"after\": 1}"),
        ("DELETE FROM queue.q WHERE msg_id = NEW.msg_id + 1", "1"),
    ] {
        let database = database_with(&["q"]);
        let mut client = session(&database);
        client
            .batch_execute(&format!(
                "CREATE FUNCTION public.mark() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {does}; RETURN NULL; END $$; \
                 CREATE TRIGGER t AFTER INSERT ON queue_archive.q FOR EACH ROW EXECUTE FUNCTION public.mark()"
            ))
            .unwrap();
        send_many(&mut client, "q", 2);
        client.batch_execute("SELECT queue_archive_batch('q', '{1, 2}')").unwrap();
        let sql =
            "SELECT string_agg(concat_ws(' ', msg_id, headers), ', ' ORDER BY msg_id) FROM queue_archive.q";
        assert_eq!(text(&mut client, sql), archived);
        assert_eq!(rows(&mut client, "q"), 0);
    }
}

#[test]
fn messages_that_a_trigger_where_they_go_changes_are_redriven_so() {
    let database = database_with(&["d", "q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE FUNCTION public.mark() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             UPDATE queue.d SET headers = headers || '{\"after\": 1}' WHERE msg_id > 1; RETURN NULL; END $$; \
             CREATE TRIGGER t AFTER INSERT ON queue.q FOR EACH ROW EXECUTE FUNCTION public.mark(); \
             SELECT queue_send_batch('d', '{1, 2}'); UPDATE queue.d SET headers = '{}'",
        )
        .unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(value::<i64>(&mut client, "SELECT queue_redrive('d', target => 'q')"), 2);
    let sql = "SELECT string_agg(concat(message, coalesce(headers ->> 'after', '-')), ' ' ORDER BY msg_id) FROM queue.q";
    assert_eq!(text(&mut client, sql), "1- 21");
}

#[test]
fn message_that_a_read_withdraws_here_can_be_finished_here() {
    for finish in [
        "SELECT queue_delete('q', 1)::text",
        "SELECT queue_cancel('q', 1)::text",
        "SELECT (outcome = 'retried')::text FROM queue_retry('q', 1, delay => '1 h')",
    ] {
        for end in ["COMMIT", "ROLLBACK"] {
            let database = database_with(&["q"]);
            let mut client = session(&database);
            assert!(read(&mut client, "q", 1).is_empty());
            send(&mut client, "q", 1);
            client.batch_execute("BEGIN; UPDATE queue.q SET visible_at = now() + '1 h'").unwrap();
            assert!(read(&mut client, "q", 1).is_empty());
            client.batch_execute("SAVEPOINT s").unwrap();
            assert_eq!(text(&mut client, finish), "true", "{finish}");
            client.batch_execute("ROLLBACK TO s").unwrap();
            client.batch_execute("SELECT queue_release('q', ARRAY[1])").unwrap();
            assert!(
                read(&mut session(&database), "q", 1).is_empty(),
                "it is nobody's until that transaction ends"
            );
            assert!(read(&mut client, "q", 1).is_empty());
            assert_eq!(text(&mut client, finish), "true", "{finish}");
            client.batch_execute(end).unwrap();
            let left = match (end, finish.contains("retry")) {
                ("ROLLBACK", _) => vec![(1, 1)],
                (_, true) => vec![],
                _ => vec![],
            };
            let got = read(&mut session(&database), "q", 1);
            assert_eq!(
                got.iter().map(|one| (one.msg_id, one.count)).collect::<Vec<_>>(),
                left,
                "{finish}, {end}"
            );
            let there = i64::from(end == "ROLLBACK" || finish.contains("retry"));
            assert_eq!(rows(&mut client, "q"), there, "{finish}, {end}");
        }
    }
}

// ---- Reading and waiting --------------------------------------------------------------------------------------

#[test]
fn read_any_returns_what_it_has_though_a_durable_queue_has_no_worker() {
    let database = database_with(&["plain", "dur"]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_alter('dur', durable_leases => true)").unwrap();
    set_worker(&database, false);
    send(&mut client, "plain", 1);
    send(&mut client, "dur", 2);
    client.batch_execute("SET statement_timeout = '25 s'").unwrap();
    assert_eq!(
        text(&mut client, "SELECT string_agg(queue, ' ') FROM queue_read_any('{plain, dur}', 2)"),
        "plain"
    );
    assert_eq!(code(client.query("SELECT queue_read_any('{plain, dur}', 2)", &[])), "55000");
}

#[test]
fn prepared_transaction_brings_a_message_forward() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    assert!(read(&mut client, "q", 1).is_empty());
    let msg_id = send(&mut client, "q", 1);
    client.batch_execute("BEGIN; SELECT queue_read('q'); ROLLBACK").unwrap();
    client.batch_execute("UPDATE queue.q SET visible_at = now() + '1 h'").unwrap();
    assert!(read(&mut client, "q", 1).is_empty());
    client.batch_execute("BEGIN; UPDATE queue.q SET visible_at = NULL; PREPARE TRANSACTION 'forward'").unwrap();
    client.batch_execute("COMMIT PREPARED 'forward'").unwrap();
    assert_eq!(read_awaited(&mut client, "q").msg_id, msg_id);
}

#[test]
fn sleeper_hears_when_the_next_is_due_from_one_who_leaves_with_a_message() {
    let database = database_with(&["q"]);
    set_worker(&database, false);
    let mut sender = session(&database);
    let first = reader_asleep_for_long(&database, "q");
    let second = reader_asleep_for_long(&database, "q");
    sender
        .batch_execute(
            "BEGIN; SELECT queue_send('q', '1'); SELECT queue_send('q', '2', delay => '2 s'); COMMIT",
        )
        .unwrap();
    assert_eq!(joined(first).1.len() + joined(second).1.len(), 2);
}

#[test]
fn sleeper_that_would_wait_for_another_queues_lock_passes_its_wake_up_on() {
    let database = database_with(&["a", "b"]);
    let mut sender = session(&database);
    let both = session(&database);
    let pid = both.pid();
    let both = both
        .run_with(|client| client.query("SELECT msg_id FROM queue_read_any('{a, b}', wait => '60 s')", &[]))
        .unwrap();
    database.wait_until_backend_waits(pid, "Extension", None);
    let second = reader_asleep_for_long(&database, "a");
    let mut locker = session(&database);
    locker.batch_execute("BEGIN; LOCK TABLE queue.b IN ACCESS EXCLUSIVE MODE").unwrap();
    let msg_id = send(&mut sender, "a", 1);
    assert_eq!(ids(&joined(second).1), [msg_id]);
    locker.batch_execute("ROLLBACK").unwrap();
    let msg_id = send(&mut sender, "b", 1);
    let rows = both.join().unwrap().1.unwrap();
    assert_eq!(rows.iter().map(|row| row.get(0)).collect::<Vec<i64>>(), [msg_id]);
}

// ---- Leases over a restart ------------------------------------------------------------------------------------

#[test]
fn released_or_shortened_lease_does_not_come_back_after_a_restart() {
    let gives_back = [
        "SELECT queue_release('q', ARRAY[1])",
        "SELECT queue_release('q', ARRAY[1], delay => '2 s')",
        "BEGIN; SELECT queue_extend('q', 1, visibility_timeout => '1 ms'); SELECT pg_sleep(0.01); COMMIT",
    ];
    let cluster = ClusterOptions::default().start().unwrap();
    for give_back in gives_back {
        let database = database_on(&cluster, &["q"]);
        let mut client = session(&database);
        send(&mut client, "q", 1);
        let held = read_for(&mut client, "q", 1, "12 h").remove(0);
        wait_written(&mut client, "q", &[1]);
        client.batch_execute(give_back).unwrap();
        // In no more than about ten seconds, though the worker has nothing else to do.
        wait_until(&format!("the row is corrected after {give_back}"), || {
            written_leases(&mut client, "q").iter().all(|one| one.left_s.is_none_or(|left_s| left_s < 0.0))
        });
        cluster.restart(StopMode::Immediate).unwrap();
        let mut client = session(&database);
        let got = read_awaited(&mut client, "q");
        let count = if give_back.contains("extend") { 2 } else { 1 };
        assert_eq!((got.msg_id, got.count), (1, count), "{give_back}");
        assert!(!delete(&mut client, "q", &held), "{give_back}");
    }
}

#[test]
fn extension_of_a_restored_lease_survives_the_next_crash() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    let held = read_for(&mut client, "q", 1, "10 min").remove(0);
    wait_written(&mut client, "q", &[1]);
    cluster.restart(StopMode::Immediate).unwrap();
    let mut client = session(&database);
    assert!(extend(&mut client, "q", &held, "3 h").is_some());
    wait_until("that is written", || {
        written_lease(&mut client, "q", 1).and_then(|lease| lease.left_s).is_some_and(|left_s| left_s > 3_600.0)
    });
    cluster.restart(StopMode::Immediate).unwrap();
    let mut client = session(&database);
    wait_points::advance_clock(&mut client, "11 min");
    assert!(read(&mut client, "q", 1).is_empty());
    assert!(delete(&mut client, "q", &held));
}

// ---- The worker -----------------------------------------------------------------------------------------------

#[test]
fn worker_waits_for_nobody_who_restores_a_queue() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send(&mut client, "q", 1);
    assert_eq!(read_for(&mut client, "q", 1, "1 h").len(), 1);
    // The worker is called to look at what is new, and may be the one who restores it.
    let stands = (0..50).find_map(|n| {
        let fresh = format!("fresh{n}");
        create(&mut client, &[&fresh]);
        let reader = session(&database);
        let pid = reader.pid();
        let hold = Hold::backend(&database, "restore", pid);
        let reading = start_read(reader, &fresh);
        let mut stands = false;
        wait_until("it stands there, or sleeps", || {
            stands = wait_points::reached(&mut client, "restore").unwrap() == 1;
            let sql = format!("SELECT coalesce(wait_event_type, '') FROM pg_stat_activity WHERE pid = {pid}");
            stands
                || text(&mut client, &sql) == "Extension"
                    && wait_points::reached(&mut client, "restore").unwrap() == 0
        });
        if stands {
            return Some((fresh, reading, hold));
        }
        drop(hold);
        send(&mut client, &fresh, 1);
        assert_eq!(joined(reading).1.len(), 1);
        None
    });
    let (fresh, reading, hold) = stands.expect("one who restores");
    // It serves the others.
    wait_written(&mut client, "q", &[1]);
    client.batch_execute("SELECT queue_alter('q', max_deliveries => 1); SELECT queue_send('q', '2')").unwrap();
    exhaust(&mut client, "q", 1);
    wait_until("it is archived", || value::<i64>(&mut client, "SELECT count(*) FROM queue_archive.q") == 1);
    hold.release();
    send(&mut client, &fresh, 3);
    assert_eq!(joined(reading).1.len(), 1);
}

#[test]
fn queue_whose_ids_could_not_be_looked_after_is_looked_after_again() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    assert!(read(&mut client, "q", 1).is_empty());
    worker_pid(&database);
    let mut locker = session(&database);
    locker.batch_execute("BEGIN; REINDEX TABLE queue_archive.q").unwrap();
    client.batch_execute("INSERT INTO queue.q (msg_id, message) VALUES (1, '1'), (2, '2')").unwrap();
    let place = format!("database \"{}\"", database.name);
    let is_failure = |line: &str| line.contains("looking after message ids failed") && line.contains(&place);
    wait_until("the log says that it failed", || database.cluster.log().lines().any(is_failure));
    locker.batch_execute("ROLLBACK").unwrap();
    let last = "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('queue.q', 'msg_id')), 0)";
    wait_until("its ids are raised", || value::<i64>(&mut client, last) == 2);
    assert_eq!(send(&mut client, "q", 3), 3);
}

#[test]
fn queue_that_is_broken_does_not_fill_the_log() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q", "r"]);
    let mut client = session(&database);
    for queue in ["q", "r"] {
        assert!(read(&mut client, queue, 1).is_empty());
    }
    let key = "SELECT conname::text FROM pg_constraint WHERE conrelid = 'queue.q'::regclass AND contype = 'p'";
    let key = text(&mut client, key);
    client.batch_execute(&format!("ALTER TABLE queue.q DROP CONSTRAINT {key}")).unwrap();
    let failed = || cluster.log().matches(" failed").count();
    wait_until("it is said", || failed() > 0);
    // The worker has other things to do.
    client.batch_execute("SELECT queue_alter('r', durable_leases => true)").unwrap();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(8) {
        send(&mut client, "r", 1);
        let one = read_one(&mut client, "r");
        assert!(delete(&mut client, "r", &one));
    }
    // At 1, 2, 4, 8 and 16 seconds, each duty.
    assert!(failed() <= 20, "{} in {:?}\n{}", failed(), begun.elapsed(), cluster.log());
}

#[test]
fn settings_that_change_while_the_worker_is_at_work_are_taken_in() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_send('q', '1'); SELECT queue_archive('q', 1); \
             UPDATE queue_archive.q SET archived_at = now() - interval '2 h'; \
             CREATE TABLE public.go (); \
             CREATE FUNCTION public.keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             FOR n IN 1 .. 80 LOOP EXIT WHEN EXISTS (SELECT FROM public.go); PERFORM pg_sleep(0.1); END LOOP; \
             RETURN OLD; END $$; \
             CREATE TRIGGER t BEFORE DELETE ON queue_archive.q FOR EACH ROW EXECUTE FUNCTION public.keep(); \
             SELECT queue_alter('q', archive_retention => '1 h')",
        )
        .unwrap();
    let worker = worker_pid(&database);
    database.wait_until_backend_waits(worker, "Timeout", Some("PgSleep"));
    client.batch_execute("ALTER SYSTEM SET pg_queue.worker_enabled = off").unwrap();
    client.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until("the change has come", || text(&mut client, "SHOW pg_queue.worker_enabled") == "off");
    client.batch_execute("INSERT INTO public.go DEFAULT VALUES").unwrap();
    wait_no_worker(&database);
}

#[test]
fn of_two_workers_one_ends_and_the_other_looks_at_everything() {
    let cluster = ClusterOptions::default().start().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_alter('q', archive_retention => '1 h'); SELECT queue_send('q', '1'); \
             SELECT queue_archive('q', 1)",
        )
        .unwrap();
    let worker = worker_pid(&database);
    wait_points::arm(&mut client, "worker-begin", None).unwrap();
    let mut admin = cluster.connect("postgres").unwrap();
    let launcher = launcher_pid(&mut admin).unwrap();
    // No trigger of ours: nobody is told of it.
    client
        .batch_execute("SET session_replication_role = replica; UPDATE queue_archive.q SET archived_at = now() - interval '2 h'")
        .unwrap_or_else(|error| panic!("{error:?}"));
    // Launchers look into other databases, too.
    let workers = |client: &mut Client| -> i64 {
        value(
            client,
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' AND datname = current_database()",
        )
    };
    let all = |client: &mut Client| -> i64 {
        value(client, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_queue worker'")
    };
    let stand = |client: &mut Client| wait_points::reached(client, "worker-begin").unwrap() == all(client);
    client.execute("SELECT pg_terminate_backend($1)", &[&worker]).unwrap();
    database.wait_until_backend_gone(worker);
    wait_until("its successor stands", || workers(&mut client) == 1 && stand(&mut client));
    client.execute("SELECT pg_terminate_backend($1)", &[&launcher]).unwrap();
    wait_until("the next launcher's, too", || workers(&mut client) == 2 && stand(&mut client));
    wait_points::release(&mut client, "worker-begin").unwrap();
    wait_until("one is left", || workers(&mut client) == 1);
    wait_until("it has trimmed the archive", || {
        value::<i64>(&mut client, "SELECT count(*) FROM queue_archive.q") == 0
    });
    assert_eq!(workers(&mut client), 1);
}

// ---- What the model found -----------------------------------------------------------------------------------

#[test]
fn own_message_that_plain_sql_has_deleted_is_not_counted_where_that_is_undone() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client.batch_execute("BEGIN").unwrap();
    let msg_id = send(&mut client, "q", 1);
    client.batch_execute("SAVEPOINT s; DELETE FROM queue.q").unwrap();
    assert!(read(&mut client, "q", 1).is_empty());
    client.batch_execute("ROLLBACK TO s; COMMIT").unwrap();
    let got = read_one(&mut client, "q");
    assert_eq!((got.msg_id, got.count), (msg_id, 1));
}
