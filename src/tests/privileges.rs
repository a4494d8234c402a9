//! Who may do what: grants on the table, row-level security, read-only transactions.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    /// Each verb that works on messages, the action its refusal names, and what it says it needs; sends are
    /// refused in Postgres' own words.
    const VERBS: [(&str, &str, &str); 15] = [
        ("queue_read('q')", "read", "SELECT and UPDATE on its table"),
        ("queue_read_any('{q}')", "read", "SELECT and UPDATE on its table"),
        ("queue_delete_and_read('q', '{}')", "finish messages of", "DELETE on its table"),
        ("queue_pop('q')", "pop from", "SELECT, UPDATE and DELETE on its table"),
        ("queue_delete('q', 1)", "finish messages of", "DELETE on its table"),
        ("queue_delete_batch('q', '{1}')", "finish messages of", "DELETE on its table"),
        ("queue_archive('q', 1)", "finish messages of", "DELETE on its table"),
        ("queue_archive_batch('q', '{1}')", "finish messages of", "DELETE on its table"),
        ("queue_retry('q', 1)", "retry messages of", "SELECT and UPDATE on its table"),
        ("queue_reject('q', 1)", "reject messages of", "SELECT and DELETE on its table"),
        ("queue_release('q', '{1}')", "release messages of", "SELECT and UPDATE on its table"),
        ("queue_extend('q', 1)", "extend leases of", "SELECT and UPDATE on its table"),
        ("queue_extend_batch('q', '{1}')", "extend leases of", "SELECT and UPDATE on its table"),
        ("queue_cancel('q', 1)", "cancel messages of", "DELETE on its table"),
        ("queue_peek('q')", "look at", "SELECT on its table"),
    ];

    const SENDS: [&str; 3] = [
        "queue_send('q', '2')",
        "queue_send_batch('q', '{2}')",
        "queue_send_entries('q', '[{\"message\": 2}]')",
    ];

    const ADMIN: [(&str, &str, &str); 7] = [
        ("queue_alter('q', max_deliveries => 1)", "alter", "ownership of its table"),
        ("queue_drop('q', true)", "drop", "ownership of its table"),
        ("queue_purge('q')", "purge", "TRUNCATE on its table"),
        ("queue_pause('q')", "pause", "TRUNCATE on its table"),
        ("queue_resume('q')", "resume", "TRUNCATE on its table"),
        ("queue_redrive('q')", "redrive messages of", "TRUNCATE and SELECT on its table"),
        ("queue_unarchive('q')", "bring back archived messages of", "TRUNCATE on its table"),
    ];

    fn set_up() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        make_role("somebody");
    }

    #[track_caller]
    fn is_denied(calls: &[(&str, &str, &str)]) {
        for (call, action, needs) in calls {
            fails(&format!("SELECT * FROM {call}")).is_denied(action, "q", needs);
        }
    }

    #[track_caller]
    fn sends_are_denied() {
        for call in SENDS {
            fails(&format!("SELECT * FROM {call}")).says("42501", "permission denied for table q");
        }
    }

    #[pg_test]
    fn role_without_grants_may_do_nothing() {
        set_up();
        as_role("somebody", || {
            sends_are_denied();
            is_denied(&VERBS);
            is_denied(&ADMIN);
            fails("SELECT * FROM queue.q").says("42501", "permission denied");
            fails("SELECT * FROM queue_archive.q").says("42501", "permission denied");
        });
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 9)"), 1, "nothing was changed");
    }

    #[pg_test]
    fn role_that_may_send_needs_no_select() {
        set_up();
        run("SELECT queue_grant('q', 'somebody', 'send')");
        as_role("somebody", || {
            assert_eq!(number("SELECT queue_send('q', '2', '{}', '1 ms')"), 2);
            assert_eq!(column("SELECT * FROM queue_send_batch('q', '{3,4}')"), [json!(3), json!(4)]);
            assert_eq!(column("SELECT queue_send_entries('q', '[{\"message\": 5}]')"), [json!(5)]);
            run("INSERT INTO queue.q (message) VALUES ('6')");
            is_denied(&VERBS);
            is_denied(&ADMIN);
            fails("SELECT * FROM queue.q").says("42501", "permission denied");
            assert_eq!(column("SELECT queue FROM queue_list()"), [json!("q")]);
        });
        assert_eq!(number("SELECT count(*) FROM pg_sleep(0.01), queue_read('q', 9)"), 6);
    }

    #[pg_test]
    fn role_that_may_observe_may_only_look() {
        set_up();
        run("SELECT queue_grant('q', 'somebody', 'observe')");
        as_role("somebody", || {
            assert_eq!(column("SELECT msg_id FROM queue_peek('q')"), [json!(1)]);
            assert_eq!(number("SELECT count(*) FROM queue.q"), 1);
            assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 0);
            sends_are_denied();
            is_denied(&VERBS[..14]);
            is_denied(&ADMIN);
        });
    }

    #[pg_test]
    fn role_that_may_consume_needs_no_rights_on_archive_and_dead_letter_queue() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', dead_letter_queue => 'dead')");
        make_role("somebody");
        run("SELECT * FROM queue_send_batch('q', array_fill('1'::jsonb, ARRAY[12]))");
        run("SELECT queue_grant('q', 'somebody', 'consume')");
        as_role("somebody", || {
            assert_eq!(number("SELECT count(*) FROM queue_read('q', 8)"), 8);
            assert!(is("queue_delete('q', 1)"));
            assert_eq!(column("SELECT queue_delete_batch('q', '{2}')"), [json!(2)]);
            assert!(is("queue_archive('q', 3)"));
            assert_eq!(column("SELECT queue_archive_batch('q', '{4}')"), [json!(4)]);
            assert_eq!(value("SELECT outcome FROM queue_retry('q', 5, delay => '1 h')"), json!("retried"));
            assert_eq!(value("SELECT queue_reject('q', 6, error => 'no')"), json!("dead_lettered"));
            assert_eq!(column("SELECT queue_release('q', '{7}')"), [json!(7)]);
            assert!(is("queue_extend('q', 8) IS NOT NULL"));
            assert_eq!(column("SELECT queue_extend_batch('q', '{8}')"), [json!(8)]);
            assert!(is("queue_cancel('q', 9)"));
            assert_eq!(column("SELECT msg_id FROM queue_pop('q')"), [json!(7)]);
            assert_eq!(column("SELECT msg_id FROM queue_delete_and_read('q', '{8}')"), [json!(10)]);
            assert_eq!(number("SELECT count(*) FROM queue_peek('q')"), 4);
            sends_are_denied();
            is_denied(&ADMIN);
            fails("SELECT * FROM queue_archive.q").says("42501", "permission denied");
            fails("SELECT * FROM queue_read('dead')").is_denied(
                "read",
                "dead",
                "SELECT and UPDATE on its table",
            );
            assert!(is("current_user = 'somebody'"), "nothing of the owner's rights is left");
        });
        assert_eq!(column("SELECT msg_id FROM queue_archive.q ORDER BY 1"), [json!(3), json!(4)]);
        assert_eq!(number("SELECT count(*) FROM queue.dead"), 1);
    }

    #[pg_test]
    fn role_that_may_administer_purges_and_pauses_and_does_not_alter() {
        set_up();
        run("SELECT queue_grant('q', 'somebody', 'admin')");
        as_role("somebody", || {
            is_denied(&ADMIN[..2]);
            sends_are_denied();
            assert!(is("queue_pause('q')"));
            assert!(is("queue_resume('q')"));
            assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 1);
            assert_eq!(number("SELECT queue_purge('q')"), 1);
        });
    }

    #[pg_test]
    fn role_with_truncate_alone_may_purge() {
        set_up();
        run("GRANT TRUNCATE ON queue.q TO somebody");
        as_role("somebody", || assert_eq!(number("SELECT queue_purge('q')"), 1));
    }

    #[pg_test]
    fn role_of_a_group_has_the_groups_rights() {
        set_up();
        make_role("team");
        run("GRANT team TO somebody");
        run("SELECT queue_grant('q', 'team', 'consume')");
        as_role("somebody", || {
            assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 1);
            assert!(is("queue_delete('q', 1)"));
        });
    }

    #[pg_test]
    fn role_whose_grant_was_revoked_may_no_longer() {
        set_up();
        run("SELECT queue_grant('q', 'somebody', 'consume')");
        as_role("somebody", || assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 1));
        run("SELECT queue_revoke('q', 'somebody', 'consume')");
        as_role("somebody", || is_denied(&VERBS));
    }

    #[pg_test]
    fn role_of_an_owner_that_lost_a_right_on_the_dead_letter_queue_is_told() {
        make_role("somebody");
        run("GRANT CREATE ON SCHEMA queue TO somebody");
        run("SELECT queue_create('dead')");
        run("SELECT queue_grant('dead', 'somebody', 'send')");
        as_role("somebody", || {
            run("SELECT queue_create('q', dead_letter_queue => 'dead')");
            run("SELECT queue_send('q', '1')");
        });
        run("SELECT queue_revoke('dead', 'somebody', 'send')");
        as_role("somebody", || {
            fails("SELECT queue_reject('q', 1)").says("42501", "dead");
            assert!(is("current_user = 'somebody'"));
            assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 1, "it is where it was");
        });
    }

    #[pg_test]
    fn row_security_refuses_readers_it_would_filter() {
        set_up();
        run("SELECT queue_grant('q', 'somebody', 'admin'), queue_grant('q', 'somebody', 'send')");
        run("ALTER TABLE queue.q ENABLE ROW LEVEL SECURITY");
        run("CREATE POLICY all_rows ON queue.q USING (true)");
        as_role("somebody", || {
            for (call, action, _) in VERBS {
                // Finishing comes first in queue_delete_and_read, but only if there is something to finish.
                let actions =
                    if call.starts_with("queue_delete_and_read") { vec![action, "read"] } else { vec![action] };
                let failure = fails(&format!("SELECT * FROM {call}"));
                assert_eq!(failure.sqlstate, "0A000", "{call}: {failure:?}");
                assert!(
                    actions
                        .iter()
                        .any(|a| failure.message == format!("cannot {a} queue \"q\" under row-level security")),
                    "{call}: {failure:?}"
                );
                assert_eq!(failure.hint, "Use a role that bypasses row-level security.");
            }
            assert!(is("queue_send('q', '2') IS NOT NULL"), "sends are checked by Postgres");
        });
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 9)"), 2, "a superuser bypasses it");
    }

    #[pg_test]
    fn row_security_checks_sends() {
        set_up();
        run("SELECT queue_grant('q', 'somebody', 'send')");
        run("ALTER TABLE queue.q ENABLE ROW LEVEL SECURITY");
        run("CREATE POLICY small ON queue.q FOR INSERT WITH CHECK (message < '10')");
        as_role("somebody", || {
            assert!(is("queue_send('q', '2') IS NOT NULL"));
            fails("SELECT queue_send('q', '20')").says("42501", "row-level security");
            fails("SELECT queue_send_batch('q', '{2,20}')").says("42501", "row-level security");
        });
    }

    #[pg_test]
    fn row_security_lets_the_owner_read_unless_forced() {
        make_role("somebody");
        run("GRANT CREATE ON SCHEMA queue TO somebody");
        as_role("somebody", || {
            run("SELECT queue_create('q')");
            run("SELECT queue_send('q', '1')");
            run("ALTER TABLE queue.q ENABLE ROW LEVEL SECURITY");
            assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 1);
            assert!(is("queue_delete('q', 1)"));
            run("ALTER TABLE queue.q FORCE ROW LEVEL SECURITY");
            fails("SELECT * FROM queue_read('q')").says("0A000", "row-level security");
            fails("SELECT queue_delete('q', 1)").says("0A000", "row-level security");
        });
    }

    #[pg_test]
    fn catalog_is_closed_to_ordinary_roles() {
        set_up();
        run("SELECT queue_grant('q', 'somebody', 'admin')");
        as_role("somebody", || {
            for statement in [
                "SELECT * FROM queue_catalog.queue",
                "UPDATE queue_catalog.queue SET paused = true",
                "DELETE FROM queue_catalog.queue",
                "SELECT * FROM queue_catalog.prepared",
                "INSERT INTO queue_catalog.prepared VALUES ('queue.q', 1)",
                "CREATE TABLE queue_catalog.mine (x int)",
                "CREATE TABLE queue.mine (x int)",
                "CREATE TABLE queue_archive.mine (x int)",
            ] {
                fails(statement).says("42501", "permission denied for schema");
            }
        });
        let held = number(
            "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, \
             unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE}'::text[]) r \
             WHERE n.nspname = 'queue_catalog' AND c.relkind IN ('r', 'S') \
             AND has_table_privilege('somebody', c.oid, r)",
        );
        assert_eq!(held, 0);
        assert!(is("has_schema_privilege('somebody', 'queue', 'USAGE') \
            AND has_schema_privilege('somebody', 'queue_archive', 'USAGE') \
            AND NOT has_schema_privilege('somebody', 'queue_catalog', 'USAGE')"));
    }

    #[pg_test]
    fn read_only_transaction_looks_and_changes_nothing() {
        set_up();
        run("SET LOCAL transaction_read_only = on");
        let mut calls: Vec<&str> = VERBS[..14].iter().chain(&ADMIN).map(|(call, _, _)| *call).collect();
        calls.extend(SENDS);
        calls.extend([
            "queue_create('r')",
            "queue_grant('q', 'public', 'send')",
            "queue_revoke('q', 'public', 'send')",
        ]);
        for call in calls {
            let failure = fails(&format!("SELECT * FROM {call}"));
            assert_eq!(failure.sqlstate, "25006", "{call}: {failure:?}");
        }
        assert_eq!(column("SELECT msg_id FROM queue_peek('q')"), [json!(1)]);
        assert_eq!(column("SELECT queue FROM queue_list()"), [json!("q")]);
    }
}
