//! What reviewers found in the worker and the launcher: one queue's or database's work that kept the others, places that
//! did not come back, looks that were repeated without a pause.

mod common;

use std::time::{Duration, Instant};

use common::*;
use postgres::Client;
use queue_tests::wait_points::{advance_clock, set_wall_clock};
use queue_tests::{wait_until, Cluster, ClusterOptions};

fn count(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

fn lines(cluster: &Cluster, text: &str) -> usize {
    cluster.log().matches(text).count()
}

#[test]
fn many_queues_that_take_a_turn_each_keep_no_durable_read_schedule_or_rename() {
    // A round in which each had its turn would take twelve seconds.
    const SLOW: usize = 40;
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["ticks"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql
               AS $$ BEGIN PERFORM pg_sleep(0.3); RETURN OLD; END $$;
             SELECT queue_create('durable', durable_leases => true), queue_schedule('ticks', 't', '1 second', '1')",
        )
        .unwrap();
    for number in 0..SLOW {
        let sql = format!(
            "SELECT queue_create('slow_{number}', max_deliveries => 1);
             CREATE TRIGGER slow BEFORE DELETE ON queue.slow_{number} FOR EACH ROW EXECUTE FUNCTION slow();
             SELECT queue_send('slow_{number}', to_jsonb(n)) FROM generate_series(1, 20) n;
             SELECT count(*) FROM queue_read('slow_{number}', 20, '1 ms')"
        );
        client.batch_execute(&sql).unwrap();
    }
    let left =
        |client: &mut Client| (0..SLOW).map(|number| rows(client, &format!("slow_{number}"))).sum::<i64>();
    let worker = worker_pid(&database);
    database.wait_until_backend_waits(worker, "Timeout", Some("PgSleep"));
    let sent = rows(&mut client, "ticks");
    let mut took = Vec::new();
    for number in 0..5 {
        send(&mut client, "durable", number);
        let begun = Instant::now();
        assert_eq!(read_for(&mut client, "durable", 1, "1 h").len(), 1);
        took.push(begun.elapsed());
    }
    took.sort_unstable();
    assert!(took[took.len() / 2] < Duration::from_secs(5), "durable reads took {took:?}");
    // By rounds it would be half a minute and more.
    wait_until("the schedule of every second is sent", || rows(&mut client, "ticks") >= sent + 4);
    let mut admin = cluster.connect("postgres").unwrap();
    assert!(left(&mut client) > 0, "the worker is still at it");
    drop(client);
    wait_until("nobody is there but the worker", || {
        let sql =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'";
        admin.query_one(sql, &[&database.name]).unwrap().get::<_, i64>(0) == 0
    });
    // Where the worker does not give way, Postgres refuses it after some seconds: at the latest the second time, when a
    // round has just begun.
    let other = format!("{}_r", database.name);
    for (from, to) in [(&database.name, &other), (&other, &database.name)] {
        wait_until("the worker is at it", || {
            let sql = "SELECT FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'pg_queue worker' \
                       AND wait_event = 'PgSleep'";
            admin.query_opt(sql, &[from]).unwrap().is_some()
        });
        admin.batch_execute(&format!("ALTER DATABASE {from} RENAME TO {to}")).unwrap();
    }
}

#[test]
fn every_one_of_many_queues_has_its_turn() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql
               AS $$ BEGIN PERFORM pg_sleep(0.12); RETURN OLD; END $$",
        )
        .unwrap();
    for number in 0..6 {
        let sql = format!(
            "SELECT queue_create('slow_{number}', max_deliveries => 1);
             CREATE TRIGGER slow BEFORE DELETE ON queue.slow_{number} FOR EACH ROW EXECUTE FUNCTION slow();
             SELECT queue_send('slow_{number}', to_jsonb(n)) FROM generate_series(1, 60) n"
        );
        client.batch_execute(&sql).unwrap();
        let mut delivered = 0;
        wait_until("all are delivered", || {
            delivered += read_for(&mut client, &format!("slow_{number}"), 60, "1 h").len();
            delivered == 60
        });
    }
    advance_clock(&mut client, "2 h"); // now all leases have ended
    wait_until("all are begun", || (0..6).all(|number| rows(&mut client, &format!("slow_{number}")) < 58));
    let left: Vec<i64> = (0..6).map(|number| rows(&mut client, &format!("slow_{number}"))).collect();
    assert!(left.iter().all(|left| *left > 30), "in turn: {left:?}");
}

#[test]
fn place_of_a_database_that_is_served_no_more_goes_to_another() {
    let cluster = ClusterOptions::default().set("pg_queue.max_databases", "1").start().unwrap();
    let one = database_on(&cluster, &["q"]);
    worker_pid(&one);
    let two = database_on(&cluster, &["q"]);
    let told = "and its worker; raise pg_queue.max_databases";
    cluster.wait_for_log(0, told);
    let mut client = session(&one);
    advance_clock(&mut client, "2 min"); // it is tried again, and said no more
    works(&one);
    set_worker(&one, false);
    worker_pid(&two);
    works(&two);
    // The other way round: now this one gets none, until the other's extension is gone.
    client.batch_execute(&format!("ALTER DATABASE {} RESET pg_queue.worker_enabled", one.name)).unwrap();
    wait_until("that is said of this one, too", || lines(&cluster, told) == 2);
    session(&two).batch_execute("DROP EXTENSION pg_queue CASCADE").unwrap();
    worker_pid(&one);
    works(&one);
    assert_eq!(lines(&cluster, told), 2);
}

/// A worker's word that there is nothing to serve is of that moment.
#[test]
fn worker_that_fails_comes_back_though_an_earlier_one_had_nothing_to_serve() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let (mut client, mut admin) = (session(&database), session(&database));
    // It says so while there is no launcher, which is for a second; to the next one a probe says it again.
    let has_said_it = (0..5).any(|_| {
        let (worker, launcher) = (worker_pid(&database), launcher_pid(&mut admin).unwrap());
        client.batch_execute("BEGIN; DROP EXTENSION pg_queue CASCADE").unwrap();
        admin.execute("SELECT pg_terminate_backend($1)", &[&launcher]).unwrap();
        wait_until("there is no launcher", || launcher_pid(&mut admin) != Some(launcher));
        client.batch_execute("COMMIT").unwrap();
        database.wait_until_backend_gone(worker);
        let is_without = launcher_pid(&mut admin).is_none();
        wait_until("there is a launcher again", || launcher_pid(&mut admin).is_some());
        if !is_without {
            client.batch_execute("CREATE EXTENSION pg_queue").unwrap();
        }
        is_without
    });
    assert!(has_said_it, "the next launcher was there each time");
    std::thread::sleep(Duration::from_secs(1)); // the probe
    client.batch_execute("CREATE EXTENSION pg_queue").unwrap();
    create(&mut client, &["q"]);
    let worker = worker_pid(&database);
    client.execute("SELECT pg_terminate_backend($1)", &[&worker]).unwrap();
    database.wait_until_backend_gone(worker);
    worker_pid(&database);
    works(&database);
}

#[test]
fn schedules_that_cannot_be_looked_at_are_looked_at_after_a_while() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_schedule('q', 'n', '1 second', '1')").unwrap();
    wait_until("it is sent", || rows(&mut client, "q") > 0);
    let begun = Instant::now();
    client.batch_execute("ALTER TABLE queue_catalog.schedule RENAME COLUMN paused TO p").unwrap();
    let failed = "looking for schedules failed: column s.paused does not exist";
    wait_until("it has failed again and again", || lines(&cluster, failed) >= 3);
    std::thread::sleep(Duration::from_secs(2).saturating_sub(begun.elapsed()));
    // Every second, and at once when the worker is called, as it is for such a change.
    let (times, seconds) = (lines(&cluster, failed), begun.elapsed().as_secs());
    assert!(times as u64 <= seconds + 3, "{times} times in {seconds} seconds");
    assert!(cluster.log().contains(&format!("{failed} (SQLSTATE 42703, database \"{}\")", database.name)));
    client.batch_execute("ALTER TABLE queue_catalog.schedule RENAME COLUMN p TO paused").unwrap();
    let sent = rows(&mut client, "q");
    wait_until("it is sent again", || rows(&mut client, "q") > sent);
}

#[test]
fn interval_goes_on_though_the_clock_is_set_back() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_schedule('q', 'interval', '1 hour', '1'),
                    queue_schedule('q', 'cron', '0 12 * * *', '2')",
        )
        .unwrap();
    set_wall_clock(&mut client, "-3 days");
    wait_until("the worker has noticed", || {
        let sql = "SELECT count(*) FROM queue_catalog.schedule WHERE next_at < now() - interval '2 days'";
        count(&mut client, sql) == 1
    });
    for sent in 1..=3 {
        advance_clock(&mut client, "61 minutes");
        wait_until("it is sent", || rows(&mut client, "q") >= sent);
    }
    assert_eq!(rows(&mut client, "q"), 3);
    assert_eq!(count(&mut client, "SELECT count(*) FROM queue.q WHERE message = '1'"), 3);
}

#[test]
fn schedule_with_an_unreadable_name_keeps_no_other() {
    let cluster = Cluster::start_new().unwrap();
    cluster
        .connect("postgres")
        .unwrap()
        .batch_execute("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        .unwrap();
    let mut client = cluster.connect("latin").unwrap();
    client
        .batch_execute(
            "CREATE EXTENSION pg_queue; SELECT queue_create('q');
             INSERT INTO queue_catalog.schedule (queue, name, schedule, timezone, message, created_at, next_at)
             SELECT 'queue.q', name, '1 second', 'UTC', to_jsonb(1), now(), now()
             FROM unnest('{ä, a}'::text[]) name",
        )
        .unwrap();
    wait_until("the other is sent", || rows(&mut client, "q") > 1);
    assert_eq!(lines(&cluster, "its name is not ASCII, and this database's encoding is not UTF8"), 1);
    assert_eq!(lines(&cluster, "looking for schedules failed"), 0);
}

#[test]
fn archive_retention_of_months_or_less_than_nothing_trims_nothing() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["months", "negative", "hour"]);
    let mut client = session(&database);
    for queue in ["months", "negative", "hour"] {
        let id = send(&mut client, queue, 1);
        client.execute("SELECT queue_archive($1, $2)", &[&queue, &id]).unwrap();
    }
    client
        .batch_execute(
            "UPDATE queue_catalog.queue SET archive_retention = '1 month' WHERE queue = 'queue.months'::regclass;
             UPDATE queue_catalog.queue SET archive_retention = '1 month -40 days'
             WHERE queue = 'queue.negative'::regclass;
             SELECT queue_alter('hour', archive_retention => '1 hour')",
        )
        .unwrap();
    advance_clock(&mut client, "2 hours");
    wait_until("the other is trimmed", || count(&mut client, "SELECT count(*) FROM queue_archive.hour") == 0);
    for queue in ["months", "negative"] {
        assert_eq!(count(&mut client, &format!("SELECT count(*) FROM queue_archive.{queue}")), 1, "{queue}");
    }
}

#[test]
fn more_written_leases_than_a_chunk_are_swept_and_those_that_are_left_are_not() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 2_500);
    let mut got = Vec::new();
    wait_until("all are delivered", || {
        got.extend(read_for(&mut client, "q", 2_500, "1 h"));
        got.len() == 2_500
    });
    let (gone, kept): (Vec<i64>, Vec<i64>) = ids(&got).iter().partition(|id| **id % 50 > 0);
    let written = |client: &mut Client| written_leases(client, "q").len();
    advance_clock(&mut client, "1 min");
    wait_until("all are written", || written(&mut client) == 2_500);
    delete_ids(&mut client, "q", &gone);
    advance_clock(&mut client, "1 min");
    wait_until("the others' rows are gone", || written(&mut client) == kept.len());
    let left: Vec<i64> = written_leases(&mut client, "q").iter().map(|lease| lease.msg_id).collect();
    assert_eq!(left, sorted(kept));
}

#[test]
fn queues_without_a_place_are_told_once_and_how_to_mend_it() {
    let cluster = ClusterOptions::default().set("pg_queue.max_queues", "8").start().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    client.batch_execute("SELECT queue_create('q_' || n) FROM generate_series(1, 12) n").unwrap();
    let told = "some queues are not served until they are used";
    let mut listener = session(&database);
    listener.batch_execute("LISTEN queue_q_1").unwrap();
    cluster.wait_for_log(0, told);
    for number in 13..16 {
        client.batch_execute(&format!("SELECT queue_create('q_{number}', max_deliveries => 1)")).unwrap();
        advance_clock(&mut client, "1 min");
    }
    works_somehow(&mut client);
    let fix = "ALTER SYSTEM SET pg_queue.max_queues = 16";
    assert_eq!(problems(&mut client), [("queues_full".to_owned(), fix.to_owned())]);
    assert_eq!(lines(&cluster, told), 1);
    assert_eq!(
        lines(&cluster, "too many queues are in use. Raise pg_queue.max_queues and restart the server."),
        1
    );
}

/// The worker has been through its rounds.
fn works_somehow(client: &mut Client) {
    send(client, "q_1", 1);
    assert_eq!(read_for(client, "q_1", 1, "1 h").len(), 1);
    advance_clock(client, "1 min");
    wait_until("the lease is written", || !written_leases(client, "q_1").is_empty());
}

/// What expired is found again though the walk does not begin at the beginning.
#[test]
fn expired_messages_that_were_held_are_found_after_those_behind_them() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    let sql = "SELECT queue_send('q', to_jsonb(n), ttl => make_interval(secs => 60 + n)) \
               FROM generate_series(1, 40) n";
    client.batch_execute(sql).unwrap();
    let leased = ids(&read_for(&mut client, "q", 1, "5 min"))[0];
    other.batch_execute("BEGIN; SELECT FROM queue.q WHERE msg_id = 7 FOR UPDATE").unwrap();
    for minute in 1..=2 {
        advance_clock(&mut client, "1 min");
        wait_until("the others are gone", || minute < 2 || rows(&mut client, "q") == 2);
    }
    // Committed with a time that is long past.
    let past = "INSERT INTO queue.q (message, expires_at) VALUES ('1', now() - interval '1 day')";
    client.batch_execute(past).unwrap();
    wait_until("that is gone, too", || rows(&mut client, "q") == 2);
    other.batch_execute("COMMIT").unwrap();
    advance_clock(&mut client, "5 s");
    wait_until("the locked one is gone", || rows(&mut client, "q") == 1);
    assert_eq!(count(&mut client, "SELECT msg_id FROM queue.q"), leased);
    advance_clock(&mut client, "5 min");
    wait_until("the leased one is gone", || rows(&mut client, "q") == 0);
}

/// It has taken in its settings by then, and nobody can tell it anything yet.
#[test]
fn worker_that_is_switched_off_as_it_starts_ends() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let first = worker_pid(&database);
    let mut hold = Hold::everybody(&database, "worker-begin");
    let mut client = session(&database);
    client.execute("SELECT pg_terminate_backend($1)", &[&first]).unwrap();
    hold.wait_reached();
    let off = format!("ALTER DATABASE {} SET pg_queue.worker_enabled = off", database.name);
    client.batch_execute(&off).unwrap();
    hold.release();
    wait_no_worker(&database);
    set_worker(&database, true);
}

/// Of the two the role's counts, for the worker, too: it must not take the other for news each time it starts.
#[test]
fn setting_of_the_workers_role_goes_before_the_databases() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q"]);
    let first = worker_pid(&database);
    let mut client = session(&database);
    client.batch_execute("ALTER ROLE postgres SET pg_queue.worker_enabled = on").unwrap();
    let off = format!("ALTER DATABASE {} SET pg_queue.worker_enabled = off", database.name);
    client.batch_execute(&off).unwrap();
    wait_until("another has begun with it", || {
        find_worker(&mut client, &database.name).is_some_and(|pid| pid != first)
    });
    let second = worker_pid(&database);
    send(&mut client, "q", 1);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(worker_pid(&database), second);
}
