//! What a role that may own a queue, or only make objects somewhere, puts in the way of others: of the worker, which is
//! a superuser's process and serves everybody, and of sessions with other rights. Each test first sees its trap run
//! where it may, so that one which never ran is no proof.

use super::*;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use queue_tests::wait_points::advance_clock;
use queue_tests::{shared_cluster, wait_until, wait_until_some, Cluster, StopMode};
use std::time::{Duration, Instant};

/// A role that may own queues, with a schema `evil` of its own. Its function `evil.deed` notes as whom and in which
/// process it runs, and makes the role a superuser if it can; `evil.innocent` claims to be immutable and calls it.
fn make_mallory(client: &mut Client, database: &Database) -> String {
    let role = make_role(client, database, "mallory");
    client
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA queue TO {role}; GRANT CREATE ON DATABASE {name} TO {role};
             SET ROLE {role}; CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO PUBLIC;
             CREATE TABLE evil.seen (who text, pid int, what text); GRANT INSERT ON evil.seen TO PUBLIC;
             CREATE FUNCTION evil.deed(what text) RETURNS int LANGUAGE plpgsql AS $$
               BEGIN
                 INSERT INTO evil.seen VALUES (current_user, pg_backend_pid(), what);
                 IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
                   ALTER ROLE {role} SUPERUSER;
                 END IF;
                 RETURN 1;
               END $$;
             CREATE FUNCTION evil.innocent(what text) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
               BEGIN RETURN evil.deed(what); END $$;
             RESET ROLE",
            name = database.name,
        ))
        .unwrap();
    role
}

/// As whom the deed was done in process `pid`, each once, in alphabetical order.
fn seen_in(client: &mut Client, pid: i32) -> String {
    text(
        client,
        &format!("SELECT coalesce(string_agg(DISTINCT who, ' '), '') FROM evil.seen WHERE pid = {pid}"),
    )
}

/// Ends the worker, which comes back and begins with looking at every queue.
fn restart_worker(client: &mut Client, database: &Database) -> i32 {
    let before = worker_pid(database);
    client.execute("SELECT pg_terminate_backend($1)", &[&before]).unwrap();
    wait_until_some("there is a new worker", || {
        find_worker(client, &database.name).filter(|pid| *pid != before)
    })
}

/// Waits for what an owner may keep the worker from for ten seconds and more.
#[track_caller]
fn wait_past_traps(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(60), "waited a minute in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns when the log, from `from` bytes on, has a line with all of these.
#[track_caller]
fn wait_for_line(cluster: &Cluster, from: usize, parts: &[&str]) {
    wait_past_traps(&format!("the log says {parts:?}"), || {
        let log = cluster.log();
        let mut lines = log.get(from..).unwrap_or_default().lines();
        lines.any(|line| parts.iter().all(|part| line.contains(part)))
    });
}

/// Sends a message that fails at once, and returns when the worker has moved it: it has looked at all queues, and works.
fn worker_works(client: &mut Client, queue: &str) {
    let count = format!("SELECT count(*) FROM queue_archive.{queue}");
    let before = number(client, &count);
    send(client, queue, 1);
    exhaust(client, queue, 1);
    wait_past_traps("the worker has moved the message", || number(client, &count) > before);
}

#[test]
fn functions_in_an_owners_indexes_never_run_as_the_worker() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    client
        .batch_execute(&format!(
            "SELECT queue_create('honest', max_deliveries => 1);
             SET ROLE {mallory};
             SELECT queue_create('mine', max_deliveries => 1);
             DO $$ DECLARE i text; BEGIN
               FOR i IN SELECT indexrelid::regclass FROM pg_index
                 WHERE indrelid = 'queue.mine'::regclass AND indpred IS NOT NULL LOOP
                 EXECUTE 'DROP INDEX ' || i;
               END LOOP;
             END $$;
             CREATE INDEX ON queue.mine (visible_at) WHERE visible_at IS NOT NULL AND evil.innocent('due') = 1;
             CREATE INDEX ON queue.mine (expires_at) WHERE expires_at IS NOT NULL AND evil.innocent('expiry') = 1;
             CREATE INDEX ON queue.mine ((msg_id + evil.innocent('expression')));
             ALTER TABLE queue.mine ADD CHECK (msg_id > -evil.innocent('check'));
             ALTER TABLE queue_archive.mine ADD CHECK (msg_id > -evil.innocent('check of the archive'));
             SELECT queue_send('mine', '1', ttl => '1 day'), queue_send('mine', '2', ttl => '1 ms');
             SELECT queue_schedule('mine', 's', '1 s', '3');
             RESET ROLE; TRUNCATE evil.seen"
        ))
        .unwrap();
    let worker = restart_worker(&mut client, &database);
    // Every duty: expiry, a schedule, leases that are written, messages that failed.
    as_role(&mut client, &mallory, |client| {
        wait_until("the schedule has fired", || {
            number(client, "SELECT count(*) FROM queue.mine WHERE headers ? 'schedule'") > 0
        });
        assert!(!read_for(client, "mine", 9, "2 s").is_empty());
        wait_until("the failures are archived", || {
            number(client, "SELECT count(*) FROM queue_archive.mine WHERE archive_reason = 'max_deliveries'")
                > 0
        });
    });
    worker_works(&mut client, "honest");
    assert_eq!(seen_in(&mut client, worker), mallory, "it ran in the worker, as its owner");
    assert!(!is_superuser(&mut client, &mallory));
}

/// Before 16 a table could be turned into a view, whose functions run as whoever looks.
#[test]
fn table_that_its_owner_turns_into_a_view_is_no_queue_to_the_worker() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    client
        .batch_execute(&format!(
            "SELECT queue_create('honest', max_deliveries => 1);
             SET ROLE {mallory}; SELECT queue_create('mine'); SELECT queue_create('kept')"
        ))
        .unwrap();
    let strip = |table: &str| {
        format!(
            "DO $$ DECLARE i text; BEGIN
               EXECUTE 'ALTER TABLE {table} ALTER msg_id DROP IDENTITY IF EXISTS';
               FOR i IN SELECT conname FROM pg_constraint WHERE conrelid = '{table}'::regclass AND contype = 'p' LOOP
                 EXECUTE format('ALTER TABLE {table} DROP CONSTRAINT %I', i);
               END LOOP;
               FOR i IN SELECT tgname FROM pg_trigger WHERE tgrelid = '{table}'::regclass AND NOT tgisinternal LOOP
                 EXECUTE format('DROP TRIGGER %I ON {table}', i);
               END LOOP;
               FOR i IN SELECT indexrelid::regclass FROM pg_index WHERE indrelid = '{table}'::regclass LOOP
                 EXECUTE 'DROP INDEX ' || i;
               END LOOP;
             END $$"
        )
    };
    let is_old = number(&mut client, "current_setting('server_version_num')") < 160_000;
    for table in ["queue.mine", "queue_archive.kept"] {
        client.batch_execute(&strip(table)).unwrap();
        client.batch_execute(&format!("VACUUM {table}")).unwrap();
        let columns = text(
            &mut client,
            &format!(
                "SELECT string_agg(format('%s::%s AS %I', CASE attname WHEN 'msg_id' THEN 'evil.deed(''view'')' \
                 WHEN 'expires_at' THEN '(now() + evil.deed(''view'') * interval ''1 s'')' ELSE 'NULL' END, \
                 atttypid::regtype, attname), ', ' ORDER BY attnum) FROM pg_attribute \
                 WHERE attrelid = '{table}'::regclass AND attnum > 0 AND NOT attisdropped"
            ),
        );
        let rule = format!("CREATE RULE \"_RETURN\" AS ON SELECT TO {table} DO INSTEAD SELECT {columns}");
        let result = client.batch_execute(&rule);
        assert_eq!(result.is_ok(), is_old, "{table}: {result:?}");
        if is_old {
            client.batch_execute(&format!("SELECT * FROM {table}")).unwrap();
            assert_eq!(number(&mut client, "SELECT count(DISTINCT who) FROM evil.seen"), 1, "it runs");
            client.batch_execute("TRUNCATE evil.seen").unwrap();
        }
    }
    client.batch_execute("RESET ROLE").unwrap();
    let worker = restart_worker(&mut client, &database);
    as_role(&mut client, &mallory, |client| {
        assert_eq!(code(try_send(client, "mine", 1)), "55000");
        send(client, "kept", 1);
    });
    worker_works(&mut client, "honest");
    assert!(!seen_in(&mut client, worker).contains("postgres"));
    assert!(!is_superuser(&mut client, &mallory));
}

/// What an owner's trigger tries where it runs with the owner's rights in somebody else's process.
const ESCAPES: &str = "
    CREATE FUNCTION evil.try(what text) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
      EXECUTE what;
      INSERT INTO evil.seen VALUES (current_user, pg_backend_pid(), what);
    EXCEPTION WHEN OTHERS THEN NULL;
    END $$;
    CREATE FUNCTION evil.escape() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      PERFORM evil.deed('trigger');
      PERFORM evil.try('RESET ROLE');
      PERFORM evil.try('SET ROLE DEFAULT');
      PERFORM evil.try('SET ROLE NONE');
      PERFORM evil.try('SET ROLE postgres');
      PERFORM evil.try('RESET SESSION AUTHORIZATION');
      PERFORM evil.try('SET SESSION AUTHORIZATION postgres');
      PERFORM evil.try('CREATE TEMP TABLE pg_class ()');
      PERFORM evil.try('LISTEN queue_x');
      PERFORM evil.try('DECLARE c CURSOR WITH HOLD FOR SELECT evil.deed(''cursor'')');
      PERFORM evil.try('ALTER ROLE ' || current_user || ' SUPERUSER');
      PERFORM evil.try('UPDATE queue_catalog.queue SET paused = true');
      SET default_transaction_read_only = on;
      SET search_path = evil;
      SET lock_timeout = 1;
      RETURN coalesce(NEW, OLD);
    END $$;";

#[test]
fn owners_triggers_in_the_worker_cannot_escape_nor_change_what_it_goes_by() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    client
        .batch_execute(&format!(
            "SELECT queue_create('honest', max_deliveries => 1);
             SET ROLE {mallory}; {ESCAPES}
             CREATE FUNCTION evil.settings() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
               SET default_transaction_read_only = on;
               SET search_path = evil;
               PERFORM set_config('lock_timeout', '1', false), set_config('work_mem', '64kB', false);
               RETURN NULL;
             END $$;
             SELECT queue_create('mine', max_deliveries => 1);
             CREATE TRIGGER a BEFORE DELETE ON queue.mine FOR EACH ROW EXECUTE FUNCTION evil.escape();
             CREATE TRIGGER b AFTER INSERT ON queue_archive.mine FOR EACH STATEMENT EXECUTE FUNCTION evil.settings();
             SELECT queue_send('mine', '1');
             SELECT * FROM queue_read('mine', 1, '1 ms');
             RESET ROLE"
        ))
        .unwrap();
    let worker = worker_pid(&database);
    wait_until("the trap has sprung", || number(&mut client, "SELECT count(*) FROM queue_archive.mine") == 1);
    assert_eq!(seen_in(&mut client, worker), mallory, "the worker fired it, as its owner");
    let got = text(
        &mut client,
        "SELECT coalesce(string_agg(DISTINCT what, '; '), '') FROM evil.seen WHERE what <> 'trigger'",
    );
    assert_eq!(got, "", "what the trigger got away with");
    worker_works(&mut client, "honest");
    assert_eq!(worker_pid(&database), worker, "it is the same one");
    assert!(!is_superuser(&mut client, &mallory));
}

#[test]
fn owners_triggers_in_a_consumers_call_cannot_escape_nor_change_the_session() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    client
        .batch_execute(&format!(
            "SET ROLE {mallory}; {ESCAPES}
             CREATE FUNCTION evil.settings() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
               PERFORM evil.deed('archived');
               SET search_path = evil;
               PERFORM set_config('work_mem', '64kB', false);
               RETURN NULL;
             END $$;
             SELECT queue_create('mine');
             CREATE TRIGGER a BEFORE INSERT ON queue_archive.mine FOR EACH ROW EXECUTE FUNCTION evil.escape();
             CREATE TRIGGER b AFTER INSERT ON queue_archive.mine FOR EACH STATEMENT EXECUTE FUNCTION evil.settings();
             SELECT queue_send('mine', '1'), queue_send('mine', '2');
             RESET ROLE"
        ))
        .unwrap();
    let settings = "SELECT concat_ws(' ', current_setting('search_path'), current_setting('work_mem'), \
                    current_setting('default_transaction_read_only'), current_user)";
    let before = text(&mut client, settings);
    // A superuser consumes.
    client.batch_execute("SELECT queue_archive('mine', 1), queue_reject('mine', 2)").unwrap();
    assert_eq!(text(&mut client, settings), before);
    assert_eq!(number(&mut client, "SELECT count(*) FROM queue_archive.mine"), 2);
    let pid = client.pid();
    assert_eq!(seen_in(&mut client, pid), mallory);
    let got = text(
        &mut client,
        "SELECT coalesce(string_agg(DISTINCT what, '; '), '') FROM evil.seen \
         WHERE what NOT IN ('trigger', 'archived')",
    );
    assert_eq!(got, "", "what the trigger got away with");
    assert!(!is_superuser(&mut client, &mallory));
}

#[test]
fn trigger_of_an_owner_that_never_ends_keeps_no_other_queue() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    client
        .batch_execute(&format!(
            "SELECT queue_create('honest', max_deliveries => 1);
             SET ROLE {mallory};
             CREATE FUNCTION evil.endless() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN LOOP PERFORM pg_sleep(0.01); END LOOP; END $$;
             SELECT queue_create('mine', max_deliveries => 1);
             CREATE TRIGGER a BEFORE DELETE ON queue.mine FOR EACH ROW EXECUTE FUNCTION evil.endless();
             SELECT queue_send('mine', '1');
             SELECT * FROM queue_read('mine', 1, '1 ms');
             RESET ROLE"
        ))
        .unwrap();
    let from = shared_cluster().log().len();
    let worker = worker_pid(&database);
    wait_until("the worker is in the trap", || {
        let sql = "SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'";
        !client.query(sql, &[&worker]).unwrap().is_empty()
    });
    worker_works(&mut client, "honest");
    wait_for_line(shared_cluster(), from, &[CANCELLED, &place_of_trap(&database)]);
    assert_eq!(worker_pid(&database), worker, "it is the same one");
    client.batch_execute("DROP TRIGGER a ON queue.mine").unwrap();
}

/// What the log says of a trap whose time was over.
const CANCELLED: &str =
    "moving exhausted messages failed: what the owner has put on the table took longer than 10 s, \
                         and was cancelled (SQLSTATE 57014, ";

fn place_of_trap(database: &Database) -> String {
    format!("database \"{}\", table queue.mine)", database.name)
}

/// Queue `honest`, and mallory's `mine` with an exhausted message, whose trigger the worker is in when this returns.
fn trap_worker(client: &mut Client, database: &Database, mallory: &str, body: &str) {
    client
        .batch_execute(&format!(
            "SELECT queue_create('honest', max_deliveries => 1);
             SET ROLE {mallory};
             CREATE FUNCTION evil.trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;
             SELECT queue_create('mine', max_deliveries => 1), queue_create('other');
             CREATE TRIGGER a BEFORE DELETE ON queue.mine FOR EACH ROW EXECUTE FUNCTION evil.trap();
             SELECT queue_send('mine', '1');
             SELECT * FROM queue_read('mine', 1, '1 ms');
             RESET ROLE"
        ))
        .unwrap();
    database.wait_until_backend_waits(worker_pid(database), "Timeout", Some("PgSleep"));
}

/// Its time and its grace are over at once, when it runs again. On a cluster of its own: who drops a database waits for
/// every process, and one that is stopped does not answer.
#[test]
fn worker_that_did_not_run_when_its_owners_time_was_over_is_cancelled_and_stays() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    let worker = worker_pid(&database);
    trap_worker(&mut client, &database, &mallory, "PERFORM pg_sleep(60); RETURN OLD;");
    let signal = |signal: Signal| kill(Pid::from_raw(worker), signal).unwrap();
    signal(Signal::SIGSTOP);
    wait_past_traps("both times are over", || {
        let sql = "SELECT clock_timestamp() - query_start > interval '12.5 s' \
                   FROM pg_stat_activity WHERE pid = $1";
        client.query_one(sql, &[&worker]).unwrap().get(0)
    });
    assert!(!cluster.log().contains(CANCELLED), "it did not run");
    signal(Signal::SIGCONT);
    wait_for_line(&cluster, 0, &[CANCELLED, &place_of_trap(&database)]);
    worker_works(&mut client, "honest");
    assert_eq!(worker_pid(&database), worker, "it is the same one");
    client.batch_execute("DROP TRIGGER a ON queue.mine").unwrap();
}

/// That call acts as the other queue's owner, within what is done as this one's.
#[test]
fn trigger_of_an_owner_that_calls_the_extension_gets_no_more_time() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    let worker = worker_pid(&database);
    trap_worker(
        &mut client,
        &database,
        &mallory,
        "PERFORM public.queue_send('other', '1'); LOOP PERFORM pg_sleep(0.01); END LOOP;",
    );
    worker_works(&mut client, "honest");
    assert_eq!(worker_pid(&database), worker, "it is the same one");
    client.batch_execute("DROP TRIGGER a ON queue.mine").unwrap();
}

/// As above, but at once: the next worker would die at the same message, and the one after that.
#[test]
fn trigger_of_an_owner_that_ends_the_worker_is_kept_away_from() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    let worker = worker_pid(&database);
    let from = shared_cluster().log().len();
    trap_worker(
        &mut client,
        &database,
        &mallory,
        "WHILE NOT EXISTS (SELECT FROM evil.seen WHERE what = 'go') LOOP PERFORM pg_sleep(0.01); END LOOP;
         PERFORM set_config('exit_on_error', 'on', true); RAISE 'out with it';",
    );
    client.batch_execute("INSERT INTO evil.seen (what) VALUES ('go')").unwrap();
    wait_for_line(shared_cluster(), from, &["keeps away from the table for 60 s", &place_of_trap(&database)]);
    wait_until("the next worker is there", || {
        find_worker(&mut client, &database.name).is_some_and(|next| next != worker)
    });
    let next = worker_pid(&database);
    for _ in 0..3 {
        worker_works(&mut client, "honest");
    }
    assert_eq!(worker_pid(&database), next, "it is the same one");
    client.batch_execute("DROP TRIGGER a ON queue.mine").unwrap();
}

/// The worker's session is nobody's.
#[test]
fn advisory_locks_that_a_trigger_takes_in_the_worker_do_not_outlast_the_call() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    let sql = format!(
        "SELECT queue_create('honest', max_deliveries => 1);
         SET ROLE {mallory};
         CREATE FUNCTION evil.lock() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           PERFORM pg_advisory_lock(4711);
           IF OLD.msg_id = 1 THEN RAISE 'not this one'; END IF;
           RETURN OLD;
         END $$;
         SELECT queue_create('mine', max_deliveries => 1);
         CREATE TRIGGER a BEFORE DELETE ON queue.mine FOR EACH ROW EXECUTE FUNCTION evil.lock();
         SELECT queue_send('mine', '1'), queue_send('mine', '2');
         SELECT * FROM queue_read('mine', 2, '1 ms');
         RESET ROLE"
    );
    client.batch_execute(&sql).unwrap();
    wait_until("one has been moved, and the other has not", || rows(&mut client, "mine") == 1);
    worker_works(&mut client, "honest");
    // It gives them back after its transaction.
    let held = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711";
    wait_until("nobody holds it", || client.query(held, &[]).unwrap().is_empty());
}

#[test]
fn trigger_of_an_owner_that_catches_its_cancellation_ends_with_the_worker_and_the_next_one_keeps_away() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    let worker = worker_pid(&database);
    let from = shared_cluster().log().len();
    trap_worker(
        &mut client,
        &database,
        &mallory,
        "LOOP BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP;",
    );
    worker_works(&mut client, "honest");
    let next = worker_pid(&database);
    assert_ne!(next, worker);
    wait_for_line(shared_cluster(), from, &["does not let itself be cancelled", &place_of_trap(&database)]);
    // The trap is still there, and the worker is not in it.
    for _ in 0..3 {
        worker_works(&mut client, "honest");
    }
    assert_eq!(state(&mut client, "mine", 1).as_deref(), Some("exhausted"));
    assert_eq!(worker_pid(&database), next, "it is the same one");
}

#[test]
fn deferred_triggers_of_an_owner_run_at_once_as_the_owner_and_not_as_somebody_else_at_commit() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    client
        .batch_execute(&format!(
            "SELECT queue_create('honest', max_deliveries => 1);
             SET ROLE {mallory};
             CREATE FUNCTION evil.later() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN PERFORM evil.deed('deferred'); RETURN NULL; END $$;
             SELECT queue_create('mine', max_deliveries => 1), queue_create('yours', max_deliveries => 1);
             CREATE CONSTRAINT TRIGGER a AFTER INSERT ON queue_archive.mine
               DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.later();
             CREATE CONSTRAINT TRIGGER a AFTER DELETE ON queue.yours
               DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.later();
             SELECT queue_send('mine', '1'), queue_send('mine', '2'), queue_send('yours', '1');
             RESET ROLE"
        ))
        .unwrap();
    exhaust(&mut client, "mine", 1);
    exhaust(&mut client, "yours", 1);
    wait_until("the worker has moved them", || {
        rows(&mut client, "mine") == 1 && rows(&mut client, "yours") == 0
    });
    assert_eq!(code(client.batch_execute("SELECT queue_archive('mine', 2)")), "42501");
    worker_works(&mut client, "honest");
    assert_eq!(text(&mut client, "SELECT string_agg(DISTINCT who, ' ') FROM evil.seen"), mallory);
    assert_eq!(rows(&mut client, "mine"), 1, "nothing is lost");
    assert!(!is_superuser(&mut client, &mallory));
}

#[test]
fn dead_letter_queue_of_another_sees_the_queues_owner_and_nobody_higher() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    let bob = make_role(&mut client, &database, "bob");
    client
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA queue TO {bob};
             SET ROLE {mallory};
             CREATE FUNCTION evil.note() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN PERFORM evil.deed('dead letter'); RETURN NEW; END $$;
             SELECT queue_create('dead');
             CREATE TRIGGER a BEFORE INSERT ON queue.dead FOR EACH ROW EXECUTE FUNCTION evil.note();
             SELECT queue_grant('dead', '{bob}', 'send');
             SET ROLE {bob};
             SELECT queue_create('q', max_deliveries => 1, dead_letter_queue => 'dead');
             SELECT queue_send('q', '1'), queue_send('q', '2');
             RESET ROLE"
        ))
        .unwrap();
    read_for(&mut client, "q", 1, "1 ms");
    wait_until("the worker has moved it", || rows(&mut client, "dead") == 1);
    client.batch_execute("SELECT queue_reject('q', 2)").unwrap(); // a superuser does
    let who = text(&mut client, "SELECT string_agg(DISTINCT who, ' ') FROM evil.seen");
    assert_eq!(who, bob, "whoever moves it: with the rights of the queue's owner, who chose the target");
    assert!(!is_superuser(&mut client, &mallory));
    // The right to send there taken back, nothing more arrives, and nothing is lost.
    client.batch_execute(&format!("SELECT queue_revoke('dead', '{bob}', 'send')")).unwrap();
    let kept = send(&mut client, "q", 3);
    let from = shared_cluster().log().len();
    read_for(&mut client, "q", 1, "1 ms");
    shared_cluster().wait_for_log(from, "permission denied for table dead");
    wait_until("it is left where it was", || state(&mut client, "q", kept).as_deref() == Some("exhausted"));
    client.batch_execute(&format!("SELECT queue_grant('dead', '{bob}', 'send')")).unwrap();
    wait_until("it comes to its end", || rows(&mut client, "q") == 0);
}

/// Whoever may send to a dead-letter queue writes what header he likes.
#[test]
fn redrive_by_a_superuser_runs_what_an_owner_whom_a_message_names_has_put_on_his_queue_as_that_owner() {
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    client
        .batch_execute(&format!(
            "SELECT queue_grant('dead', '{mallory}', 'send');
             SET ROLE {mallory};
             CREATE FUNCTION evil.note() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN PERFORM evil.deed('redriven'); RETURN NEW; END $$;
             SELECT queue_create('mine'), queue_create('later');
             ALTER TABLE queue.mine ALTER priority SET DEFAULT evil.innocent('default');
             CREATE TRIGGER a BEFORE INSERT ON queue.mine FOR EACH ROW EXECUTE FUNCTION evil.note();
             CREATE CONSTRAINT TRIGGER a AFTER INSERT ON queue.later
               DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.note();
             SELECT queue_send('dead', '1', headers => format('{{\"dead_letter\": {{\"queue\": \"%s\"}}}}', q)::jsonb)
               FROM unnest('{{mine,mine,later}}'::text[]) q;
             RESET ROLE"
        ))
        .unwrap();
    assert_eq!(number(&mut client, "SELECT queue_redrive('dead', 1)"), 1);
    assert_eq!(number(&mut client, "SELECT queue_redrive('dead', 1, source => 'mine')"), 1);
    assert_eq!(text(&mut client, "SELECT string_agg(DISTINCT who, ' ') FROM evil.seen"), mallory);
    assert_eq!(rows(&mut client, "mine"), 2);
    client.batch_execute("TRUNCATE evil.seen").unwrap();
    assert_eq!(code(client.batch_execute("SELECT queue_redrive('dead')")), "42501", "a deferred trigger");
    assert_eq!(rows(&mut client, "dead"), 1);
    assert_eq!(number(&mut client, "SELECT count(*) FROM evil.seen"), 0);
    assert!(!is_superuser(&mut client, &mallory));
}

#[test]
fn drop_by_a_superuser_runs_nothing_of_the_owners() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    client
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA queue_archive TO {mallory};
             SET ROLE {mallory};
             SELECT queue_create('mine');
             CREATE INDEX ON queue.mine (msg_id) WHERE evil.innocent('index') = 1;
             CREATE INDEX ON queue_archive.mine (msg_id) WHERE evil.innocent('index of the archive') = 1;
             RESET ROLE; TRUNCATE evil.seen"
        ))
        .unwrap();
    client.batch_execute("SELECT queue_drop('mine')").unwrap();
    assert_eq!(text(&mut client, "SELECT coalesce(string_agg(who, ' '), '') FROM evil.seen"), "");
    assert!(!is_superuser(&mut client, &mallory));
}

/// A cluster of its own: the places for queues are the server's.
#[test]
fn stranger_takes_no_place_of_a_queue_that_he_may_not_use() {
    let cluster = queue_tests::ClusterOptions::default().set("pg_queue.max_queues", "8").start().unwrap();
    let names: Vec<String> = (0..10).map(|n| format!("q{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let database = database_on(&cluster, &names);
    let mut client = session(&database);
    let stranger = make_role(&mut client, &database, "stranger");
    let mut other = session(&database);
    other.batch_execute(&format!("SET ROLE {stranger}")).unwrap();
    for name in &names {
        for call in [
            format!("SELECT queue_send('{name}', '1')"),
            format!("SELECT * FROM queue_read('{name}')"),
            format!("SELECT * FROM queue_peek('{name}')"),
            format!("SELECT queue_delete('{name}', 1)"),
            format!("CALL queue_wait('{{{name}}}', '0')"),
        ] {
            assert_eq!(code(other.batch_execute(&call)), "42501", "{call}");
        }
    }
    for name in &names[..8] {
        send(&mut client, name, 1);
        assert_eq!(read(&mut client, name, 1).len(), 1, "{name}");
    }
    assert_eq!(
        code(client.batch_execute("SELECT queue_read('q8')")),
        "53400",
        "these were all places there are"
    );
    // Once he may, he takes it, in the same session too; also who may only send.
    client.batch_execute("SELECT queue_drop('q0', true), queue_drop('q1', true)").unwrap();
    client
        .batch_execute(&format!(
            "GRANT INSERT (visible_at, headers, message) ON queue.q8 TO {stranger};
             SELECT queue_grant('q9', '{stranger}', 'consume'), queue_grant('q9', '{stranger}', 'send')"
        ))
        .unwrap();
    for name in ["q8", "q9"] {
        send(&mut other, name, 1);
    }
    assert_eq!(read(&mut other, "q9", 1).len(), 1);
    assert_eq!(read(&mut client, "q8", 1).len(), 1);
}

/// A server of its own: only after a start does the worker look at queues that nobody has used.
#[test]
fn owner_whose_table_fails_when_looked_at_keeps_no_other_queue_from_the_worker() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &[]);
    let mut client = session(&database);
    let mallory = make_mallory(&mut client, &database);
    client
        .batch_execute(&format!(
            "SET ROLE {mallory};
             SELECT queue_create('a_trap');
             CREATE FUNCTION evil.fail() RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
               BEGIN
                 IF to_regclass('evil.sprung') IS NOT NULL THEN RAISE 'the trap has sprung'; END IF;
                 RETURN 1;
               END $$;
             DO $$ BEGIN EXECUTE 'DROP INDEX ' || (SELECT indexrelid::regclass FROM pg_index
               WHERE indrelid = 'queue.a_trap'::regclass AND indkey[0] = 10); END $$;
             CREATE INDEX ON queue.a_trap (expires_at) WHERE expires_at IS NOT NULL AND evil.fail() = 1;
             CREATE TABLE evil.sprung ();
             RESET ROLE;
             SELECT queue_create('honest');
             SELECT queue_send('honest', '1', ttl => '1 h')"
        ))
        .unwrap();
    drop(client);
    cluster.restart(StopMode::Fast).unwrap();
    cluster.wait_for_log(0, "failed: the trap has sprung");
    let mut client = database.connect().unwrap();
    assert_eq!(rows(&mut client, "honest"), 1);
    advance_clock(&mut client, "61 min");
    wait_until("what has expired is gone", || rows(&mut client, "honest") == 0);
}

/// How many locks a session holds on what lies in the schemas of queues and archives.
fn locks_on_queues(client: &mut Client, pid: i32) -> i64 {
    let sql = format!(
        "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
         WHERE l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND l.pid = {pid}
           AND c.relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace)"
    );
    number(client, &sql)
}

#[test]
fn stranger_who_drops_what_is_no_queue_locks_nothing() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let stranger = make_role(&mut client, &database, "stranger");
    let helpers =
        "SELECT relname::text FROM pg_class WHERE relnamespace = 'queue'::regnamespace AND relkind <> 'r'";
    let helpers = client.query(helpers, &[]).unwrap();
    assert_eq!(helpers.len(), 4, "the key, two indexes and the sequence");
    let mut other = session(&database);
    other.batch_execute(&format!("SET ROLE {stranger}; BEGIN")).unwrap();
    for helper in helpers {
        let helper: String = helper.get(0);
        let dropped: bool = other.query_one("SELECT queue_drop($1)", &[&helper]).unwrap().get(0);
        assert!(!dropped, "{helper}");
        assert_eq!(locks_on_queues(&mut client, other.pid()), 0, "{helper}");
    }
    client.batch_execute("SET lock_timeout = '10 s'").unwrap();
    send(&mut client, "q", 1);
}

#[test]
fn administrator_who_lost_his_right_while_he_waited_for_the_table_is_denied() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let role = make_role(&mut client, &database, "admin");
    client.execute("SELECT queue_grant('q', $1, 'admin')", &[&role]).unwrap();
    let mut admin = session(&database);
    admin
        .batch_execute(&format!("SET ROLE {role}; SELECT queue_pause('q'); SELECT queue_resume('q')"))
        .unwrap();
    client.batch_execute("BEGIN; LOCK TABLE queue.q IN ACCESS EXCLUSIVE MODE").unwrap();
    let pausing = admin.run("SELECT queue_pause('q')").unwrap();
    database.wait_until_backend_waits(pausing.pid(), "Lock", Some("relation"));
    client.execute("SELECT queue_revoke('q', $1, 'admin')", &[&role]).unwrap();
    client.batch_execute("COMMIT").unwrap();
    assert_eq!(code(pausing.join().unwrap().1), "42501");
    send(&mut client, "q", 1);
    assert_eq!(read(&mut client, "q", 1).len(), 1, "it is not paused");
}

/// Without the error the table's lock would be his to the end of his transaction.
#[test]
fn stranger_who_sends_or_moves_nothing_is_denied() {
    let database = database_with(&["victim"]);
    let mut client = session(&database);
    let stranger = make_role(&mut client, &database, "stranger");
    client.batch_execute(&format!("GRANT CREATE ON SCHEMA queue TO {stranger}")).unwrap();
    let mut other = session(&database);
    other.batch_execute(&format!("SET ROLE {stranger}; SELECT queue_create('mine')")).unwrap();
    let redrives = [
        "SELECT queue_redrive('mine', target => 'victim')",
        "SELECT queue_redrive('mine', source => 'victim')",
    ];
    for call in ["SELECT queue_send_batch('victim', '{}')", "SELECT queue_send_entries('victim', '[]')"]
        .iter()
        .chain(&redrives)
    {
        assert_eq!(code(other.batch_execute(call)), "42501", "{call}");
    }
    // Who may insert what a redrive inserts may redrive, and send nothing.
    client
        .batch_execute(&format!(
            "GRANT INSERT (priority, group_key, headers, message) ON queue.victim TO {stranger}"
        ))
        .unwrap();
    for call in redrives {
        other.batch_execute(call).unwrap();
    }
    client.execute("SELECT queue_grant('victim', $1, 'send')", &[&stranger]).unwrap();
    other.batch_execute("SELECT queue_send_batch('victim', '{}'), queue_send_entries('victim', '[]')").unwrap();
}

#[test]
fn default_privileges_of_the_superuser_open_nobodys_queue() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let alice = make_role(&mut client, &database, "alice");
    let reader = make_role(&mut client, &database, "reader");
    client
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA queue TO {alice};
             ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {reader};
             ALTER DEFAULT PRIVILEGES IN SCHEMA queue GRANT ALL ON TABLES TO {reader} WITH GRANT OPTION;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO PUBLIC;
             SET ROLE {alice}; SELECT queue_create('q'), queue_send('q', '1'); RESET ROLE"
        ))
        .unwrap();
    let sequence = text(&mut client, "pg_get_serial_sequence('queue.q', 'msg_id')");
    let mut other = session(&database);
    other.batch_execute(&format!("SET ROLE {reader}")).unwrap();
    for call in [
        "SELECT FROM queue.q",
        "SELECT FROM queue_archive.q",
        "SELECT * FROM queue_read('q')",
        "SELECT * FROM queue_peek('q')",
        "SELECT queue_send('q', '2')",
        "SELECT queue_purge('q')",
        &format!("SELECT nextval('{sequence}')"),
        &format!("SELECT FROM {sequence}"),
    ] {
        assert_eq!(code(other.batch_execute(call)), "42501", "{call}");
    }
    as_role(&mut client, &alice, |client| {
        client.batch_execute(&format!("SELECT nextval('{sequence}'); SELECT FROM queue_archive.q")).unwrap();
        assert_eq!(read(client, "q", 1).len(), 1, "to its owner it is open");
        client.execute("SELECT queue_grant('q', $1, 'observe')", &[&reader]).unwrap();
    });
    assert_eq!(other.query("SELECT FROM queue_peek('q')", &[]).unwrap().len(), 1, "and to whom he grants it");
}
