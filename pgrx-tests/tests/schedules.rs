//! Schedules: that the worker sends what is due, once, and nothing before its time. Time is moved by the tests, on
//! clusters of their own; one test has the real clock.
//!
//! That something has *not* been sent is asked once something else has been, that was due in the same round, and the
//! worker sleeps again.

mod common;

use common::*;
use postgres::Client;
use queue_tests::wait_points::{advance_clock, set_wall_clock};
use queue_tests::{wait_until, wait_until_some, Cluster, ClusterOptions, Database, Session, StopMode};

fn own_cluster() -> Cluster {
    ClusterOptions::default().start().unwrap()
}

/// True if it is new.
fn schedule(client: &mut Client, queue: &str, name: &str, schedule: &str) -> bool {
    let sql = "SELECT queue_schedule($1, $2, $3, to_jsonb($2::text))";
    client.query_one(sql, &[&queue, &name, &schedule]).unwrap().get(0)
}

/// Names of the schedules whose messages are in a queue, in the order in which they came.
fn sent(client: &mut Client, queue: &str) -> Vec<String> {
    let sql = format!("SELECT headers->'schedule'->>'name' FROM queue.\"{queue}\" ORDER BY msg_id");
    client.query(&sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

#[track_caller]
fn wait_sent(client: &mut Client, queue: &str, names: &[&str]) {
    wait_until(&format!("{queue} holds {names:?}"), || sent(client, queue).len() >= names.len());
    assert_eq!(sent(client, queue), names);
}

/// Returns when the worker sleeps. What woke it before has been looked at only if something shows that it did.
#[track_caller]
fn wait_worker_asleep(database: &Database) {
    database.wait_until_backend_waits(worker_pid(database), "Extension", None);
}

fn is(client: &mut Client, condition: &str) -> bool {
    client.query_one(&format!("SELECT {condition}"), &[]).unwrap().get(0)
}

#[test]
fn schedule_that_was_restored_without_its_trigger_is_sent() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    schedule(&mut client, "q", "first", "1 hour");
    wait_worker_asleep(&database);
    // As pg_restore --data-only --disable-triggers does.
    client
        .batch_execute(
            "ALTER TABLE queue_catalog.schedule DISABLE TRIGGER ALL;
             UPDATE queue_catalog.schedule SET next_at = now();
             ALTER TABLE queue_catalog.schedule ENABLE TRIGGER ALL",
        )
        .unwrap();
    wait_sent(&mut client, "q", &["first"]);
}

#[test]
fn schedule_sends_when_it_is_due_and_not_before() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    schedule(&mut client, "q", "first", "1 hour");
    schedule(&mut client, "q", "second", "2 hours"); // a moment after the second hour of that
    client.batch_execute("SELECT queue_schedule('q', 'probe', '55 minutes', '0', '{\"trace\": 7}')").unwrap();
    let due: String = client
        .query_one("SELECT to_jsonb(next_at)::text FROM queue_schedules() WHERE name = 'probe'", &[])
        .unwrap()
        .get(0);
    advance_clock(&mut client, "58 minutes");
    // Delivered like any other message, and it says where it comes from.
    let got = read_awaited(&mut client, "q");
    assert_eq!(got.message, 0);
    let headers: String = client.query_one("SELECT headers::text FROM queue.q", &[]).unwrap().get(0);
    assert_eq!(headers, format!("{{\"trace\": 7, \"schedule\": {{\"at\": {due}, \"name\": \"probe\"}}}}"));
    wait_worker_asleep(&database);
    assert_eq!(sent(&mut client, "q"), ["probe"]);
    assert!(is(
        &mut client,
        "last_at >= '1 minute' + clock_timestamp() AND next_at = created_at + '110 minutes' \
         FROM queue_schedules() JOIN queue_catalog.schedule USING (name, last_at, next_at) WHERE name = 'probe'"
    ));
    advance_clock(&mut client, "2 minutes");
    wait_sent(&mut client, "q", &["probe", "first"]);
    // The second hour: one that is due earlier is sent earlier.
    advance_clock(&mut client, "1 hour");
    wait_until("all are sent", || sent(&mut client, "q").len() == 5);
    assert_eq!(sent(&mut client, "q")[2..], ["probe", "first", "second"]);
}

#[test]
fn schedule_of_cron_sends_by_the_clock_of_its_zone() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_schedule('q', 'tokyo', '0 12 * * *', '1', timezone => 'Asia/Tokyo');
             SELECT queue_schedule('q', 'utc', '0 0 12 * * *', '1')",
        )
        .unwrap();
    for _ in 0..2 {
        // Just past the next noon of the one, then of the other.
        let before = sent(&mut client, "q").len();
        let by: String = client
            .query_one(
                "SELECT (min(next_at) - clock_timestamp() - s.shift + '1 s')::text FROM queue_schedules(),
                 (SELECT coalesce(max(last_at) - clock_timestamp(), '0') FROM queue_schedules()) AS s (shift)
                 GROUP BY s.shift",
                &[],
            )
            .unwrap()
            .get(0);
        advance_clock(&mut client, &by);
        wait_until("it is sent", || sent(&mut client, "q").len() > before);
    }
    let mut names = sent(&mut client, "q");
    names.sort();
    assert_eq!(names, ["tokyo", "utc"]);
    let at = "extract(hour FROM (headers->'schedule'->>'at')::timestamptz AT TIME ZONE 'UTC')";
    assert!(is(
        &mut client,
        &format!("array_agg({at}::int ORDER BY headers->'schedule'->>'name') = '{{3,12}}' FROM queue.q")
    ));
}

#[test]
fn schedule_missed_for_a_day_sends_once() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    schedule(&mut client, "q", "hourly", "1 hour");
    advance_clock(&mut client, "1 day");
    wait_sent(&mut client, "q", &["hourly"]);
    assert!(
        is(&mut client, "(headers->'schedule'->>'at')::timestamptz < now() + '2 hours' FROM queue.q"),
        "the first missed"
    );
    assert!(is(
        &mut client,
        "next_at BETWEEN now() + '24 hours' AND now() + '25 hours' FROM queue_schedules()"
    ));
    advance_clock(&mut client, "1 hour");
    wait_sent(&mut client, "q", &["hourly"; 2]);
    // The wall clock alone, set forth.
    set_wall_clock(&mut client, "1 hour");
    wait_sent(&mut client, "q", &["hourly"; 3]);
}

#[test]
fn schedule_missed_while_the_server_was_down_sends_once() {
    let cluster = own_cluster();
    for mode in [StopMode::Fast, StopMode::Immediate] {
        let database = database_on(&cluster, &["q"]);
        let mut client = session(&database);
        schedule(&mut client, "q", "hourly", "1 hour");
        // As if it had been down since: the worker, which would send at once, is away.
        set_worker(&database, false);
        client
            .batch_execute("UPDATE queue_catalog.schedule SET next_at = now() - interval '100 hours'")
            .unwrap();
        assert_eq!(rows(&mut client, "q"), 0);
        drop(client);
        cluster.restart(mode).unwrap();
        set_worker(&database, true);
        let mut client = session(&database);
        assert_eq!(read_awaited(&mut client, "q").message, "hourly", "{mode:?}");
        wait_worker_asleep(&database);
        assert_eq!(sent(&mut client, "q"), ["hourly"], "{mode:?}");
        assert!(
            is(&mut client, "next_at BETWEEN now() AND now() + '1 hour' FROM queue_schedules()"),
            "{mode:?}"
        );
    }
}

#[test]
fn schedule_that_is_paused_sends_nothing_until_resumed() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["q", "other"]);
    let mut client = session(&database);
    schedule(&mut client, "q", "hourly", "1 hour");
    schedule(&mut client, "other", "probe", "1 hour");
    assert!(is(&mut client, "queue_schedule_pause('q', 'hourly')"));
    advance_clock(&mut client, "90 minutes");
    wait_sent(&mut client, "other", &["probe"]);
    wait_worker_asleep(&database);
    assert_eq!(rows(&mut client, "q"), 0);
    // What was due meanwhile stays unsent.
    assert!(is(&mut client, "queue_schedule_pause('q', 'hourly', false)"));
    advance_clock(&mut client, "31 minutes");
    wait_sent(&mut client, "q", &["hourly"]);
    wait_sent(&mut client, "other", &["probe"; 2]);
}

#[test]
fn schedule_that_is_replaced_or_ended_sends_no_more_as_it_was() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    for name in ["a", "b", "probe"] {
        assert!(schedule(&mut client, "q", name, "1 hour"));
    }
    assert!(!is(&mut client, "queue_schedule('q', 'a', '2 hours', '\"new\"')"));
    assert!(is(&mut client, "queue_unschedule('q', 'b')"));
    advance_clock(&mut client, "61 minutes");
    wait_sent(&mut client, "q", &["probe"]);
    wait_worker_asleep(&database);
    assert_eq!(sent(&mut client, "q"), ["probe"]);
    advance_clock(&mut client, "1 hour");
    wait_until("both are sent", || sent(&mut client, "q").len() == 3);
    assert!(is(&mut client, "message = '\"new\"' FROM queue.q WHERE headers->'schedule'->>'name' = 'a'"));
}

#[test]
fn schedule_takes_effect_at_commit_and_not_after_a_rollback() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    client.batch_execute("BEGIN; SELECT queue_schedule('q', 'gone', '1 hour', '1'); ROLLBACK").unwrap();
    client
        .batch_execute(
            "BEGIN; SELECT queue_schedule('q', 'kept', '1 hour', '1');
             SAVEPOINT s; SELECT queue_schedule('q', 'undone', '1 hour', '1'); ROLLBACK TO s; COMMIT",
        )
        .unwrap();
    advance_clock(&mut client, "61 minutes");
    wait_sent(&mut client, "q", &["kept"]);
    client.batch_execute("BEGIN; SELECT queue_unschedule('q', 'kept')").unwrap();
    assert_eq!(code(client.batch_execute("PREPARE TRANSACTION 'schedule'")), "0A000");
    assert!(is(&mut client, "count(*) = 1 FROM queue_schedules()"));
}

#[test]
fn schedule_of_a_queue_that_is_renamed_or_dropped_follows_it() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["q", "dropped", "gone", "probe"]);
    let mut client = session(&database);
    for queue in ["q", "dropped", "gone", "probe"] {
        schedule(&mut client, queue, "n", "1 hour");
    }
    client
        .batch_execute(
            "ALTER TABLE queue.q RENAME TO r; SELECT queue_drop('dropped'); DROP TABLE queue.gone;
             SELECT queue_create('dropped')",
        )
        .unwrap();
    // Past what queue_create cleans up: the worker comes upon it.
    create(&mut client, &["later"]);
    schedule(&mut client, "later", "n", "1 hour");
    client.batch_execute("DROP TABLE queue.later").unwrap();
    advance_clock(&mut client, "61 minutes");
    wait_sent(&mut client, "r", &["n"]);
    wait_sent(&mut client, "probe", &["n"]);
    wait_until("what is left of them is deleted", || {
        is(&mut client, "count(*) = 2 FROM queue_catalog.schedule")
    });
    assert_eq!(rows(&mut client, "dropped"), 0, "the new queue of that name has no schedule");
}

#[test]
fn schedule_survives_dump_and_restore() {
    let cluster = queue_tests::shared_cluster();
    let from = database_with(&["q", "far"]);
    let mut client = session(&from);
    schedule(&mut client, "far", "yearly", "0 0 1 1 *");
    client
        .batch_execute(
            "SELECT queue_schedule('far', 'odd \"name\"', '365 days', '{\"a\": [1]}', '{\"h\": 1}', 'Asia/Tokyo');
             SELECT queue_schedule_pause('far', 'odd \"name\"');
             SELECT queue_schedule('q', 'seconds', '* * * * * *', '1')",
        )
        .unwrap();
    let all = "SELECT jsonb_agg(to_jsonb(s) - 'last_at' ORDER BY name)::text FROM queue_schedules() s WHERE queue = 'far'";
    let before: String = client.query_one(all, &[]).unwrap().get(0);
    let ways: [(&[&str], &str, &[&str]); 2] = [
        (&["-Fc"], "pg_restore", &["--exit-on-error"]),
        (&["-Fp"], "psql", &["-X", "-q", "-v", "ON_ERROR_STOP=1"]),
    ];
    for (format, restore, args) in ways {
        let dump = program(cluster, "pg_dump", &[format, &[&from.name]].concat(), b"");
        let to = cluster.create_bare_database().unwrap();
        program(cluster, restore, &[args, &["-d", &to.name]].concat(), &dump);
        let mut client = session(&to);
        let after: String = client.query_one(all, &[]).unwrap().get(0);
        assert_eq!(after, before, "{restore}");
        // Nobody touches the queue: the worker has noticed the rows by itself.
        let restored = rows(&mut client, "q");
        wait_until("the restored schedule sends", || rows(&mut client, "q") > restored + 1);
    }
}

#[test]
fn schedule_sends_with_the_rights_of_the_queues_owner() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE ROLE owner_of_q; GRANT CREATE ON SCHEMA queue TO owner_of_q; CREATE ROLE helper;
             SET ROLE owner_of_q;
             SELECT queue_create('q'); SELECT queue_grant('q', 'helper', 'admin');
             RESET ROLE;
             CREATE FUNCTION public.who() RETURNS trigger LANGUAGE plpgsql
               AS $$ BEGIN NEW.message := to_jsonb(current_user::text); RETURN NEW; END $$;
             CREATE TRIGGER who BEFORE INSERT ON queue.q FOR EACH ROW EXECUTE FUNCTION public.who();
             SET ROLE helper;
             SELECT queue_schedule('q', 'n', '1 hour', '1');
             RESET ROLE",
        )
        .unwrap();
    advance_clock(&mut client, "61 minutes");
    wait_sent(&mut client, "q", &["n"]);
    assert_eq!(read_one(&mut client, "q").message, "owner_of_q");
    // Who may not send to his own queue sends nothing on schedule either.
    client.batch_execute("REVOKE INSERT ON queue.q FROM owner_of_q").unwrap();
    let log = cluster.log().len();
    advance_clock(&mut client, "1 hour");
    cluster.wait_for_log(log, "sending on schedule \"n\" failed: permission denied for table q");
    assert_eq!(rows(&mut client, "q"), 1);
}

#[test]
fn schedule_that_fails_keeps_no_other_and_is_tried_again() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["bad", "good"]);
    let mut client = session(&database);
    client.batch_execute("ALTER TABLE queue.bad ADD CONSTRAINT no CHECK (message <> '\"fails\"')").unwrap();
    schedule(&mut client, "bad", "fails", "50 minutes");
    schedule(&mut client, "bad", "works", "1 hour");
    schedule(&mut client, "good", "works", "1 hour");
    advance_clock(&mut client, "61 minutes");
    wait_sent(&mut client, "good", &["works"]);
    wait_sent(&mut client, "bad", &["works"]);
    // Another failure, after a while.
    let failed = "sending on schedule \"fails\" failed: new row for relation \"bad\" violates check constraint";
    wait_until("it has failed twice", || cluster.log().matches(failed).count() >= 2);
    client.batch_execute("ALTER TABLE queue.bad DROP CONSTRAINT no").unwrap();
    advance_clock(&mut client, "2 minutes"); // past its delay
    wait_sent(&mut client, "bad", &["works", "fails"]);
}

#[test]
fn schedule_that_fails_is_tried_at_once_when_it_is_replaced() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    client.batch_execute("ALTER TABLE queue.q ADD CONSTRAINT no CHECK (message <> '\"n\"')").unwrap();
    schedule(&mut client, "q", "n", "1 hour");
    let failures = || cluster.log().matches("sending on schedule \"n\" failed").count();
    advance_clock(&mut client, "61 minutes");
    // Until the delay has grown longer than this test waits.
    for _ in 0..7 {
        let before = failures();
        advance_clock(&mut client, "70 seconds");
        wait_until("it fails again", || failures() > before);
    }
    assert!(!is(&mut client, "queue_schedule('q', 'n', '1 hour', '\"other\"')"));
    wait_sent(&mut client, "q", &["n"]);
}

#[test]
fn schedule_waits_for_no_lock_on_the_table() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["locked", "q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    schedule(&mut client, "locked", "n", "50 minutes");
    schedule(&mut client, "q", "n", "1 hour");
    other.batch_execute("BEGIN; LOCK TABLE queue.locked IN ACCESS EXCLUSIVE MODE").unwrap();
    advance_clock(&mut client, "61 minutes");
    wait_sent(&mut client, "q", &["n"]);
    other.batch_execute("COMMIT").unwrap();
    wait_sent(&mut client, "locked", &["n"]);
    // Nor long for one who is writing the same key.
    client
        .batch_execute("CREATE UNIQUE INDEX one ON queue.locked (message); DELETE FROM queue.locked")
        .unwrap();
    other.batch_execute("BEGIN; INSERT INTO queue.locked (message) VALUES ('\"n\"')").unwrap();
    advance_clock(&mut client, "1 hour");
    wait_sent(&mut client, "q", &["n"; 2]);
    other.batch_execute("ROLLBACK").unwrap();
    advance_clock(&mut client, "2 minutes"); // past its delay
    wait_sent(&mut client, "locked", &["n"]);
}

#[test]
fn schedule_on_the_real_clock_sends_in_order_and_never_early() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    schedule(&mut client, "q", "n", "1 second");
    wait_until("two messages came", || rows(&mut client, "q") >= 2);
    assert!(is(&mut client, "queue_unschedule('q', 'n')"));
    let at = "(headers->'schedule'->>'at')::timestamptz";
    assert!(is(&mut client, &format!("bool_and(enqueued_at >= {at}) FROM queue.q")), "none is early");
    assert!(is(
        &mut client,
        &format!(
            "array_agg(msg_id ORDER BY {at}) = array_agg(msg_id ORDER BY msg_id) \
                  AND count(DISTINCT {at}) = count(*) FROM queue.q"
        )
    ));
}

#[test]
fn schedules_that_are_far_off_cost_no_transactions() {
    let cluster = own_cluster();
    let database = database_on(&cluster, &["q", "probe"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_send('probe', '1', ttl => '1 hour');
             SELECT queue_schedule('q', 'n' || n, '1000 days', '1') FROM generate_series(1, 100) n;
             SELECT queue_schedule('q', 'cron' || n, '0 0 29 2 *', '1') FROM generate_series(1, 10) n",
        )
        .unwrap();
    // Each of the worker's transactions shows itself in pg_stat_activity.
    fn last_activity(client: &mut Session, worker: i32) -> Option<String> {
        let sql = "SELECT state_change::text FROM pg_stat_activity \
                   WHERE pid = $1 AND state = 'idle' AND wait_event_type = 'Extension'";
        client.query_opt(sql, &[&worker]).unwrap().map(|row| row.get(0))
    }
    let worker = worker_pid(&database);
    // Something that it does do in a round shows that it has taken in all of that.
    advance_clock(&mut client, "61 minutes");
    wait_until("the worker has looked", || rows(&mut client, "probe") == 0);
    // One that had still something to do, and was kept from it for a moment, is asked again.
    let mut quiet = String::new();
    let stays_quiet = (0..3).any(|_| {
        quiet = wait_until_some("the worker has nothing to do", || {
            let before = last_activity(&mut client, worker);
            client.batch_execute("SELECT pg_sleep(0.3)").unwrap();
            before.filter(|before| last_activity(&mut client, worker).as_ref() == Some(before))
        });
        for _ in 0..20 {
            advance_clock(&mut client, "3 hours"); // wakes it
            wait_worker_asleep(&database);
        }
        client.batch_execute("SELECT pg_sleep(0.3)").unwrap();
        wait_until_some("it sleeps", || last_activity(&mut client, worker)) == quiet
    });
    assert!(stays_quiet);
    // It is there all the same.
    advance_clock(&mut client, "1000 days");
    wait_until("all are sent", || rows(&mut client, "q") >= 100);
    assert_ne!(last_activity(&mut client, worker), Some(quiet));
}
