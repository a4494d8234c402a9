//! What a message says is told to nobody who may not read it: not in an error's text, detail or context, not in the
//! server's log but where Postgres itself writes statements.

use super::*;
use queue_tests::{shared_cluster, wait_until, ClusterOptions};

const SECRET: &str = "s3cr3t-b0dy";

/// All that an error says.
#[track_caller]
fn said(result: Result<(), postgres::Error>) -> String {
    let error = result.expect_err("this must fail");
    format!("{:?}", error.as_db_error().expect("an error of the server's"))
}

#[test]
fn errors_of_constraints_show_no_row_to_who_may_not_read_it() {
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    let role = make_role(&mut client, &database, "blind");
    client
        .batch_execute(&format!(
            "SELECT queue_create('q', dead_letter_queue => 'dead');
             SELECT queue_send('q', '\"{SECRET}\"') FROM generate_series(1, 4);
             SELECT queue_archive('q', 4), queue_reject('q', 3);
             ALTER TABLE queue_archive.q ADD CONSTRAINT c CHECK (msg_id > 3) NOT VALID;
             CREATE UNIQUE INDEX ON queue_archive.q (message);
             ALTER TABLE queue.q ADD CONSTRAINT c CHECK (msg_id < 5);
             GRANT DELETE, TRUNCATE, INSERT ON queue.q TO {role};
             GRANT DELETE, TRUNCATE ON queue.dead TO {role}"
        ))
        .unwrap();
    // (queue_unarchive and queue_redrive are for those who may read what they bring back.)
    for call in ["queue_archive('q', 1)", "queue_archive_batch('q', '{1}')"] {
        let told = as_role(&mut client, &role, |client| said(client.batch_execute(&format!("SELECT {call}"))));
        assert!(told.contains("23514") && !told.contains(SECRET), "{call}: {told}");
        assert!(told.contains("The row is shown only to those who may read it."), "{call}: {told}");
    }
    client.batch_execute("ALTER TABLE queue_archive.q DROP CONSTRAINT c").unwrap();
    let told = as_role(&mut client, &role, |client| said(client.batch_execute("SELECT queue_archive('q', 1)")));
    assert!(told.contains("23505") && !told.contains(SECRET), "a key holds the message: {told}");
    // One who may read it is told what is wrong, as ever.
    let told = said(client.batch_execute("SELECT queue_archive('q', 1)"));
    assert!(told.contains(SECRET), "{told}");
    client.batch_execute(&format!("GRANT SELECT ON queue.q TO {role}")).unwrap();
    let told = as_role(&mut client, &role, |client| said(client.batch_execute("SELECT queue_archive('q', 1)")));
    assert!(told.contains(SECRET), "{told}");
    // Errors after that, of the same session, are as Postgres words them.
    let told =
        said(client.batch_execute("CREATE TEMP TABLE t (x int CHECK (x > 0)); INSERT INTO t VALUES (-777)"));
    assert!(told.contains("-777"), "{told}");
}

/// What an owner's generated column, index, constraint or default makes of a message may fail with the message's words.
#[test]
fn errors_of_expressions_show_no_row_to_who_may_not_read_it() {
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    let role = make_role(&mut client, &database, "blind");
    client
        .batch_execute(&format!(
            "SELECT queue_create('q', dead_letter_queue => 'dead');
             SELECT queue_send('q', '\"{SECRET}\"') FROM generate_series(1, 4);
             SELECT queue_archive('q', 4), queue_reject('q', 3);
             GRANT DELETE, TRUNCATE, INSERT ON queue.q TO {role};
             GRANT DELETE, TRUNCATE ON queue.dead TO {role}"
        ))
        .unwrap();
    // (what the error names, the SQLSTATE)
    for (expression, state) in [
        ("((message #>> '{}')::int)", "22P02"),
        ("((message #>> '{}')::json ->> 0)", "22P02"), // whose context quotes the text, too
        ("((message #>> '{}')::timestamptz)", "22007"),
    ] {
        // In a new archive: what is there already does not fit.
        let function =
            "CREATE OR REPLACE FUNCTION public.of(message jsonb) RETURNS text IMMUTABLE LANGUAGE sql";
        let index = "CREATE INDEX broken ON queue_archive.q (public.of(message))";
        client
            .batch_execute(&format!("{function} RETURN '1'; {index}; {function} RETURN {expression}"))
            .unwrap();
        for call in ["queue_archive('q', 1)", "queue_archive_batch('q', '{1}')"] {
            let fails = |client: &mut Client| said(client.batch_execute(&format!("SELECT {call}")));
            let told = as_role(&mut client, &role, fails);
            assert!(told.contains(state) && !told.contains("s3cr3t"), "{expression}, {call}: {told}");
            assert!(told.contains("The row is shown only to those who may read it."), "{call}: {told}");
            // One who may read it is told what is wrong, as ever.
            let told = fails(&mut client);
            assert!(told.contains(state) && told.contains("s3cr3t"), "{expression}, {call}: {told}");
        }
        client.batch_execute("DROP INDEX queue_archive.broken").unwrap();
    }
}

#[test]
fn errors_caught_by_the_caller_show_no_row_either() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let role = make_role(&mut client, &database, "blind");
    client
        .batch_execute(&format!(
            "SELECT queue_send('q', '\"{SECRET}\"');
             ALTER TABLE queue_archive.q ADD CHECK (msg_id > 3);
             GRANT DELETE ON queue.q TO {role};
             CREATE TABLE told (what text); GRANT INSERT ON told TO {role};
             SET ROLE {role};
             DO $$ DECLARE m text; d text; h text; c text; BEGIN
               PERFORM queue_archive('q', 1);
             EXCEPTION WHEN check_violation THEN
               GET STACKED DIAGNOSTICS m = MESSAGE_TEXT, d = PG_EXCEPTION_DETAIL, h = PG_EXCEPTION_HINT,
                 c = PG_EXCEPTION_CONTEXT;
               INSERT INTO told VALUES (concat_ws('|', m, d, h, c));
             END $$;
             RESET ROLE"
        ))
        .unwrap();
    let told = text(&mut client, "SELECT what FROM told");
    assert!(told.contains("check constraint") && !told.contains(SECRET), "{told}");
}

#[test]
fn denials_and_mistakes_quote_no_message() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let role = make_role(&mut client, &database, "nobody");
    client.execute("SELECT queue_send('q', to_jsonb($1::text))", &[&SECRET]).unwrap();
    for call in [
        "SELECT * FROM queue_read('q')",
        "SELECT * FROM queue_peek('q')",
        "SELECT queue_delete('q', 1)",
        "SELECT queue_reject('q', 1)",
        "SELECT * FROM queue_delete_and_read('q', '{1}')",
        "SELECT queue_unarchive('q')",
    ] {
        let told = as_role(&mut client, &role, |client| said(client.batch_execute(call)));
        assert!(!told.contains(SECRET), "{call}: {told}");
    }
    for call in
        ["SELECT queue_delete('q', 9, 8, strict => true)", "SELECT queue_delete('q', 1, 8, strict => true)"]
    {
        let told = said(client.batch_execute(call));
        assert!(told.contains("P0002") && !told.contains(SECRET), "{call}: {told}");
    }
}

/// The worker's errors go to the log alone: what of them, the most verbose setting does not change.
#[test]
fn log_of_the_worker_says_what_failed_and_not_of_which_message() {
    let cluster = ClusterOptions::default().set("log_error_verbosity", "verbose").start().unwrap();
    let database = database_on(&cluster, &["dead"]);
    let mut client = session(&database);
    client
        .batch_execute(&format!(
            "SELECT queue_create('q', dead_letter_queue => 'dead', max_deliveries => 1);
             ALTER TABLE queue.dead ADD CHECK (msg_id < 0);
             CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no schedule''; END';
             CREATE TRIGGER a BEFORE INSERT ON queue.q FOR EACH ROW WHEN (NEW.headers ? 'schedule') EXECUTE FUNCTION fail();
             SELECT queue_schedule('q', 's', '1 s', '\"{SECRET}\"')"
        ))
        .unwrap();
    client.execute("SELECT queue_send('q', to_jsonb($1::text))", &[&SECRET]).unwrap();
    let from = cluster.log().len();
    assert_eq!(read_for(&mut client, "q", 1, "1 ms").len(), 1);
    cluster.wait_for_log(from, "moving exhausted messages failed");
    cluster.wait_for_log(from, "sending on schedule \"s\" failed: no schedule");
    let log = cluster.log();
    assert!(!log[from..].contains(SECRET), "{}", &log[from..]);
    wait_until("it is left where it was", || state(&mut client, "q", 1).as_deref() == Some("exhausted"));
}

/// Text in other encodings than Rust's: kept as it is, or refused, never changed.
#[test]
fn messages_in_a_database_of_another_encoding_are_kept_or_refused() {
    let cluster = shared_cluster();
    let mut admin = cluster.connect("postgres").unwrap();
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let name = format!("of_{}", encoding.to_lowercase());
        admin.batch_execute(&format!("DROP DATABASE IF EXISTS {name}")).unwrap();
        admin
            .batch_execute(&format!("CREATE DATABASE {name} ENCODING {encoding} TEMPLATE template0 LOCALE 'C'"))
            .unwrap();
        let database = Database { cluster, name };
        let mut client = session(&database);
        client
            .batch_execute("CREATE EXTENSION pg_queue; SELECT queue_create('q', max_deliveries => 1)")
            .unwrap();
        for call in [
            "queue_create('é')",
            "queue_send('é', '1')",
            "queue_read('é')",
            "queue_send_entries('q', '[{\"message\": \"é\"}]')",
            "queue_schedule('q', 'é', '1 h', '1')",
            "queue_reject('q', 1, error => 'é')",
            "queue_grant('q', 'é', 'send')",
        ] {
            let told = said(client.batch_execute(&format!("SELECT {call}")));
            assert!(told.contains("0A000") && told.contains("not ASCII"), "{encoding}: {call}: {told}");
        }
        client
            .batch_execute(
                "SELECT queue_send('q', '\"é\"'); SELECT * FROM queue_send_batch('q', '{\"\\\"é\\\"\"}');
                 SELECT queue_send_entries('q', '[{\"message\": \"e\"}]');
                 SELECT queue_schedule('q', 's', '1 h', '\"é\"')",
            )
            .unwrap();
        let sent = "SELECT string_agg(message #>> '{}', ' ') FROM queue_peek('q')";
        assert_eq!(text(&mut client, sent), "é é e", "{encoding}");
        read_for(&mut client, "q", 1, "1 ms");
        wait_until("the worker has archived it", || {
            text(&mut client, "SELECT string_agg(message #>> '{}', ' ') FROM queue_archive.q") == "é"
        });
        assert_eq!(text(&mut client, "SELECT message #>> '{}' FROM queue_schedules()"), "é");
    }
}
