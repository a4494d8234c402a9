//! Bad input that is the same for many functions: nulls, unknown queues, what is not built.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;

    #[pg_test]
    fn null_for_a_queue_a_message_or_an_id_is_refused_by_each_function() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        for (call, argument) in [
            ("queue_create(NULL)", "queue"),
            ("queue_alter(NULL)", "queue"),
            ("queue_drop(NULL)", "queue"),
            ("queue_drop(NULL, true)", "queue"),
            ("queue_purge(NULL)", "queue"),
            ("queue_pause(NULL)", "queue"),
            ("queue_resume(NULL)", "queue"),
            ("queue_grant(NULL, 'public', 'send')", "queue"),
            ("queue_grant('q', NULL, 'send')", "role"),
            ("queue_grant('q', 'public', NULL)", "capability"),
            ("queue_revoke(NULL, 'public', 'send')", "queue"),
            ("queue_revoke('q', NULL, 'send')", "role"),
            ("queue_revoke('q', 'public', NULL)", "capability"),
            ("queue_send(NULL, '1')", "queue"),
            ("queue_send('q', NULL)", "message"),
            ("queue_send_batch(NULL, '{1}')", "queue"),
            ("queue_send_batch('q', NULL)", "messages"),
            ("queue_send_batch('q', '{1,NULL}')", "messages"),
            ("queue_send_entries(NULL, '[]')", "queue"),
            ("queue_send_entries('q', NULL)", "entries"),
            ("queue_read(NULL)", "queue"),
            ("queue_read_any(NULL)", "queues"),
            ("queue_read_any('{q,NULL}')", "queues"),
            ("queue_pop(NULL)", "queue"),
            ("queue_delete_and_read(NULL, '{}')", "queue"),
            ("queue_delete_and_read('q', NULL)", "msg_ids"),
            ("queue_delete_and_read('q', '{NULL}')", "msg_ids"),
            ("queue_delete(NULL, 1)", "queue"),
            ("queue_delete('q', NULL)", "msg_id"),
            ("queue_delete_batch(NULL, '{1}')", "queue"),
            ("queue_delete_batch('q', NULL)", "msg_ids"),
            ("queue_delete_batch('q', '{NULL}')", "msg_ids"),
            ("queue_delete_batch('q', '{1}', '{NULL}')", "lease_ids"),
            ("queue_archive(NULL, 1)", "queue"),
            ("queue_archive('q', NULL)", "msg_id"),
            ("queue_archive_batch(NULL, '{1}')", "queue"),
            ("queue_archive_batch('q', NULL)", "msg_ids"),
            ("queue_archive_batch('q', '{NULL}')", "msg_ids"),
            ("queue_retry(NULL, 1)", "queue"),
            ("queue_retry('q', NULL)", "msg_id"),
            ("queue_reject(NULL, 1)", "queue"),
            ("queue_reject('q', NULL)", "msg_id"),
            ("queue_release(NULL, '{1}')", "queue"),
            ("queue_release('q', NULL)", "msg_ids"),
            ("queue_release('q', '{NULL}')", "msg_ids"),
            ("queue_extend(NULL, 1)", "queue"),
            ("queue_extend('q', NULL)", "msg_id"),
            ("queue_extend_batch(NULL, '{1}')", "queue"),
            ("queue_extend_batch('q', NULL)", "msg_ids"),
            ("queue_extend_batch('q', '{NULL}')", "msg_ids"),
            ("queue_cancel(NULL, 1)", "queue"),
            ("queue_cancel('q', NULL)", "msg_id"),
            ("queue_peek(NULL)", "queue"),
            ("queue_peek('q', msg_ids => '{NULL}')", "msg_ids"),
        ] {
            let failure = fails(&format!("SELECT * FROM {call}"));
            assert_eq!(failure.sqlstate, "22004", "{call}: {failure:?}");
            assert_eq!(failure.message, format!("argument \"{argument}\" must not be null"), "{call}");
        }
        assert!(is("(SELECT count(*) = 1 FROM queue.q)"));
        assert!(is("(SELECT count(*) = 1 FROM queue_list())"));
    }

    #[pg_test]
    fn null_for_an_optional_argument_means_its_default() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3,4,5,6,7,8}', NULL, NULL, NULL, NULL, NULL, NULL, NULL)");
        assert_eq!(number("SELECT count(*) FROM queue_read('q', NULL, NULL, NULL, NULL, NULL)"), 1);
        assert_eq!(number("SELECT count(*) FROM queue_read_any('{q}', NULL, NULL, NULL, NULL)"), 1);
        assert_eq!(number("SELECT count(*) FROM queue_pop('q', NULL)"), 1);
        assert_eq!(
            number("SELECT count(*) FROM queue_delete_and_read('q', '{1}', NULL, NULL, NULL, NULL, NULL)"),
            1
        );
        assert_eq!(number("SELECT count(*) FROM queue_delete_batch('q', '{2}', NULL, NULL)"), 1);
        assert!(is("queue_archive('q', 4, NULL, NULL)"));
        assert_eq!(number("SELECT count(*) FROM queue_archive_batch('q', '{5}', NULL, NULL)"), 1);
        assert_eq!(number("SELECT count(*) FROM queue_retry('q', 6, NULL, NULL, NULL)"), 1);
        assert!(is("queue_reject('q', 6, NULL, NULL) = 'archived'"));
        assert_eq!(number("SELECT count(*) FROM queue_release('q', '{7}', NULL, NULL)"), 0);
        assert!(is("queue_extend('q', 7, NULL, NULL) IS NULL"));
        assert_eq!(number("SELECT count(*) FROM queue_extend_batch('q', '{7}', NULL, NULL)"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_peek('q', NULL, NULL, NULL)"), 2);
        assert!(is("queue_delete('q', 7, NULL, NULL)"));
    }

    #[pg_test]
    fn unknown_queue_is_refused_by_each_function() {
        for call in [
            "queue_alter('none')",
            "queue_purge('none')",
            "queue_pause('none')",
            "queue_resume('none')",
            "queue_grant('none', 'public', 'send')",
            "queue_revoke('none', 'public', 'send')",
            "queue_send('none', '1')",
            "queue_send_batch('none', '{1}')",
            "queue_send_entries('none', '[]')",
            "queue_read('none')",
            "queue_read_any('{none}')",
            "queue_pop('none')",
            "queue_delete_and_read('none', '{}')",
            "queue_delete('none', 1)",
            "queue_delete_batch('none', '{1}')",
            "queue_delete_batch('none', '{}')",
            "queue_archive('none', 1)",
            "queue_archive_batch('none', '{1}')",
            "queue_retry('none', 1)",
            "queue_reject('none', 1)",
            "queue_release('none', '{1}')",
            "queue_extend('none', 1)",
            "queue_extend_batch('none', '{1}')",
            "queue_cancel('none', 1)",
            "queue_peek('none')",
            "queue_redrive('none')",
            "queue_unarchive('none')",
        ] {
            fails(&format!("SELECT * FROM {call}")).is_unknown_queue("none");
        }
    }

    #[pg_test]
    fn function_that_is_not_built_says_so() {
        run("SELECT queue_create('q')");
        for statement in [
            "SELECT queue_limit('q')",
            "SELECT queue_limit('q', 1, 1, 1, true)",
            "SELECT * FROM queue_stats()",
            "SELECT * FROM queue_stats('q')",
            "SELECT * FROM queue_leases()",
            "SELECT * FROM queue_leases('q')",
            "SELECT queue_limit(NULL)",
        ] {
            fails(statement).is("0A000", "this function is not supported by this version of pg_queue", "", "");
        }
    }

    #[pg_test]
    fn text_that_is_no_interval_or_number_is_refused_by_postgres() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_send('q', '1', delay => 'soon')").says("22007", "interval");
        fails("SELECT * FROM queue_read('q', 'many')").says("22P02", "bigint");
        fails("SELECT queue_delete('q', '99999999999999999999')").says("22003", "bigint");
        fails("SELECT queue_delete('q', 1.5)").says("42883", "queue_delete");
    }
}
