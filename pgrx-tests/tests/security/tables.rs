//! What a queue's owner may have put on its table is respected or refused wherever messages leave it or move: row-level
//! security, triggers, rules, constraints, children, partitions. Sends are in `src/tests/direct.rs`, what one statement
//! does to a trigger in `src/tests/triggers.rs`; here are the moves, the worker, and what lies beside the table.

use super::*;
use queue_tests::wait_until;

#[test]
fn rows_of_children_are_no_messages_and_stay_as_they_are() {
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_create('q', max_deliveries => 3, dead_letter_queue => 'dead');
             CREATE TABLE child () INHERITS (queue.q);
             CREATE TABLE archived () INHERITS (queue_archive.q);
             CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END';
             CREATE TRIGGER a BEFORE DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION nothing();
             SELECT queue_send_batch('q', '{1,2,3,4,5,6,7,8}');
             INSERT INTO child (msg_id, message, expires_at) SELECT n, '\"child\"', now() FROM generate_series(1, 20) n;
             INSERT INTO archived (msg_id, message) SELECT n, '\"child\"' FROM generate_series(1, 20) n",
        )
        .unwrap();
    let children = "SELECT (SELECT string_agg(c::text, ' ' ORDER BY msg_id) FROM child c) \
                    || (SELECT string_agg(c::text, ' ' ORDER BY msg_id) FROM archived c)";
    let before = text(&mut client, children);
    assert_eq!(read(&mut client, "q", 99).len(), 8);
    assert!(delete_id(&mut client, "q", 1), "the trigger makes it a statement, which must not see the child");
    let one = |client: &mut Client, sql: &str| text(client, &format!("SELECT {sql}"));
    assert_eq!(one(&mut client, "queue_archive('q', 2)"), "true");
    assert_eq!(one(&mut client, "(SELECT outcome FROM queue_retry('q', 3, delay => '0'))"), "retried");
    assert_eq!(one(&mut client, "queue_reject('q', 4)"), "dead_lettered");
    assert_eq!(one(&mut client, "(SELECT queue_release('q', '{5}', delay => '1 ms'))"), "5");
    assert_eq!(one(&mut client, "queue_redrive('dead')"), "1");
    assert_eq!(one(&mut client, "queue_unarchive('q')"), "1");
    assert_eq!(number(&mut client, "SELECT count(*) FROM ONLY queue.q"), 7);
    client.batch_execute("SELECT queue_alter('q', max_deliveries => 1)").unwrap();
    wait_until("the worker has moved what is exhausted", || {
        read_for(&mut client, "q", 99, "1 ms");
        number(&mut client, "SELECT count(*) FROM queue.dead") > 0
    });
    one(&mut client, "queue_purge('q')");
    assert_eq!(number(&mut client, "SELECT count(*) FROM ONLY queue.q"), 0);
    assert_eq!(text(&mut client, children), before);
}

#[test]
fn queue_whose_table_is_a_partition_works_within_its_bounds() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE TABLE whole (LIKE queue.q INCLUDING DEFAULTS) PARTITION BY RANGE (msg_id);
             CREATE TABLE seen (what text);
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN INSERT INTO seen VALUES (TG_OP); RETURN coalesce(NEW, OLD); END $$;
             CREATE TRIGGER n AFTER INSERT OR DELETE ON whole FOR EACH ROW EXECUTE FUNCTION note();
             CREATE SEQUENCE ids; -- from 17 on a partition has no identity of its own
             ALTER TABLE queue.q ALTER msg_id DROP IDENTITY, ALTER msg_id SET DEFAULT nextval('ids');
             ALTER TABLE whole ATTACH PARTITION queue.q FOR VALUES FROM (1) TO (4)",
        )
        .unwrap();
    assert_eq!(send_many(&mut client, "q", 2), [1, 2]);
    client.batch_execute("INSERT INTO whole (msg_id, message) VALUES (3, '3')").unwrap();
    assert_eq!(code(try_send(&mut client, "q", 3)), "23505", "the sequence knows nothing of that row");
    assert_eq!(code(try_send(&mut client, "q", 4)), "23514", "outside the bounds");
    assert_eq!(drain(&mut client, "q"), [1, 2, 3]);
    assert_eq!(
        text(&mut client, "SELECT string_agg(what, ' ') FROM seen"),
        "INSERT INSERT INSERT DELETE DELETE DELETE"
    );
}

/// Every way out of the table, as the one who may do all but bypass row-level security.
#[test]
fn row_level_security_that_hides_rows_lets_nobody_past_it() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let owner = make_role(&mut client, &database, "owner");
    client
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA queue TO {owner}; SET ROLE {owner};
             SELECT queue_create('dead');
             SELECT queue_create('q', dead_letter_queue => 'dead');
             SELECT queue_send_batch('q', '{{1,2,3,4}}');
             SELECT queue_reject('q', 3), queue_archive('q', 4);
             ALTER TABLE queue.q ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
             CREATE POLICY even ON queue.q USING (msg_id % 2 = 0) WITH CHECK (message <> '\"no\"');
             ALTER TABLE queue.dead ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
             ALTER TABLE queue_archive.q ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
        ))
        .unwrap();
    client.batch_execute("RESET ROLE").unwrap();
    let before = picture(&mut client);
    client.batch_execute(&format!("SET ROLE {owner}")).unwrap();
    for call in [
        "queue_read('q')",
        "queue_read_any('{q}')",
        "queue_pop('q')",
        "queue_peek('q')",
        "queue_delete('q', 1)",
        "queue_delete_batch('q', '{1}')",
        "queue_archive('q', 1)",
        "queue_delete_and_read('q', '{1}')",
        "queue_retry('q', 1)",
        "queue_reject('q', 1)",
        "queue_release('q', '{1}')",
        "queue_extend('q', 1)",
        "queue_cancel('q', 1)",
        "queue_redrive('dead')",
        "queue_unarchive('q')",
    ] {
        assert_eq!(code(client.batch_execute(&format!("SELECT * FROM {call}"))), "0A000", "{call}");
    }
    assert_eq!(code(client.batch_execute("CALL queue_wait('{q}', '0')")), "0A000");
    client.batch_execute("RESET ROLE").unwrap();
    assert_eq!(picture(&mut client), before);
    client.batch_execute(&format!("SET ROLE {owner}")).unwrap();
    assert_eq!(code(client.batch_execute("SELECT queue_send_batch('q', '{5,\"\\\"no\\\"\"}')")), "42501");
    client.batch_execute("RESET ROLE").unwrap();
    assert_eq!(rows(&mut client, "q"), 2, "nothing but an id is gone");
    client.batch_execute(&format!("SET ROLE {owner}")).unwrap();
    // As DELETE does: what the policy hides stays.
    assert_eq!(number(&mut client, "queue_purge('q')"), 1);
    client.batch_execute("RESET ROLE").unwrap();
    assert_eq!(text(&mut client, "SELECT string_agg(message::text, ' ') FROM queue.q"), "1");
}

#[test]
fn row_level_security_of_the_target_refuses_the_worker_and_nothing_is_lost() {
    let database = database_with(&[]);
    let mut client = session(&database);
    let owner = make_role(&mut client, &database, "owner");
    client
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA queue TO {owner};
             SELECT queue_create('dead'); SELECT queue_grant('dead', '{owner}', 'send');
             ALTER TABLE queue.dead ENABLE ROW LEVEL SECURITY;
             CREATE POLICY even ON queue.dead WITH CHECK (message <> '1');
             SET ROLE {owner};
             SELECT queue_create('q', dead_letter_queue => 'dead', max_deliveries => 1);
             SELECT queue_send_batch('q', '{{1,2}}'); RESET ROLE"
        ))
        .unwrap();
    exhaust(&mut client, "q", 2);
    wait_until("what may go has gone", || rows(&mut client, "dead") == 1);
    assert_eq!(text(&mut client, "SELECT string_agg(message::text, ' ') FROM queue.dead"), "2");
    wait_until("it is left where it was", || state(&mut client, "q", 1).as_deref() == Some("exhausted"));
    assert_eq!(code(client.batch_execute("SELECT queue_reject('q', 1)")), "42501", "with the owner's rights");
}

#[test]
fn triggers_of_every_kind_see_what_leaves_and_what_arrives() {
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_create('q', dead_letter_queue => 'dead', max_deliveries => 1);
             CREATE TABLE seen (n bigint GENERATED ALWAYS AS IDENTITY, what text);
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN
                 INSERT INTO public.seen (what) VALUES (concat_ws(' ', TG_TABLE_NAME, TG_WHEN, TG_LEVEL, TG_OP));
                 RETURN coalesce(NEW, OLD);
               END $$;
             CREATE FUNCTION note_rows() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN
                 INSERT INTO public.seen (what) SELECT concat_ws(' ', TG_TABLE_NAME, 'transition', message) FROM changed;
                 RETURN NULL;
               END $$;
             CREATE TRIGGER a BEFORE DELETE ON queue.q FOR EACH STATEMENT EXECUTE FUNCTION note();
             CREATE TRIGGER b BEFORE DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION note();
             CREATE TRIGGER c AFTER DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION note();
             CREATE TRIGGER d AFTER DELETE ON queue.q REFERENCING OLD TABLE AS changed
               FOR EACH STATEMENT EXECUTE FUNCTION note_rows();
             CREATE TRIGGER e AFTER INSERT ON queue.dead REFERENCING NEW TABLE AS changed
               FOR EACH STATEMENT EXECUTE FUNCTION note_rows();
             CREATE TRIGGER f BEFORE INSERT ON queue_archive.q FOR EACH ROW EXECUTE FUNCTION note()",
        )
        .unwrap();
    let left = |message: &str| {
        format!("q BEFORE STATEMENT DELETE; q BEFORE ROW DELETE; q AFTER ROW DELETE; q transition {message}")
    };
    let seen = |client: &mut Client| {
        let what = text(client, "SELECT coalesce(string_agg(what, '; ' ORDER BY n), '') FROM seen");
        client.batch_execute("TRUNCATE seen").unwrap();
        what
    };
    let expire = "SELECT msg_id FROM queue_read('q', 1, '1 ms')";
    for (message, call, arrived) in [
        ("1", "SELECT queue_delete('q', 1)", ""),
        ("2", "SELECT queue_archive('q', 2)", "; q BEFORE ROW INSERT"),
        ("3", "SELECT queue_reject('q', 3)", "; dead transition 3"),
        ("4", "SELECT * FROM queue_pop('q')", ""),
        ("5", "SELECT queue_cancel('q', 5)", ""),
        ("6", expire, "; dead transition 6"), // the worker moves it
    ] {
        send(&mut client, "q", message.parse().unwrap());
        client.batch_execute(call).unwrap();
        wait_until("it has left", || rows(&mut client, "q") == 0);
        assert_eq!(seen(&mut client), left(message) + arrived, "{call}");
    }
    client.batch_execute("SELECT queue_send('q', '7', ttl => '1 ms')").unwrap();
    wait_until("the worker has expired it", || rows(&mut client, "q") == 0);
    assert_eq!(seen(&mut client), left("7") + "; dead transition 7");
}

#[test]
fn rules_and_foreign_keys_on_delete_are_obeyed_by_every_finish() {
    let database = database_with(&["ruled", "referred"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "CREATE RULE no AS ON DELETE TO queue.ruled DO INSTEAD NOTHING;
             CREATE TABLE work (msg_id bigint REFERENCES queue.referred);
             SELECT queue_send('ruled', '1'), queue_send('referred', '1');
             INSERT INTO work VALUES (1)",
        )
        .unwrap();
    for (call, of_ruled) in [
        ("queue_delete($, 1)", "false"),
        ("queue_archive($, 1)", "false"),
        ("queue_cancel($, 1)", "false"),
        ("queue_reject($, 1)", "lost"),
        ("(SELECT count(*) FROM queue_pop($))", "0"),
        ("queue_purge($)", "0"),
    ] {
        assert_eq!(text(&mut client, &format!("SELECT {}", call.replace('$', "'ruled'"))), of_ruled, "{call}");
        let result = client.batch_execute(&format!("SELECT {}", call.replace('$', "'referred'")));
        assert_eq!(code(result), "23503", "{call}");
    }
    assert_eq!((rows(&mut client, "ruled"), rows(&mut client, "referred")), (1, 1));
    assert_eq!(number(&mut client, "SELECT count(*) FROM queue_archive.ruled"), 0);
}
