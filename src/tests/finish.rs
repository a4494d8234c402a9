//! queue_delete, queue_archive, their batch forms, and queue_cancel.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    const LOST_HINT: &str = "Roll back: another consumer may have the message.";

    fn lost(msg_id: i64) -> String {
        format!("message {msg_id} of queue \"q\" is not there, or its lease is lost")
    }

    #[pg_test]
    fn delete_of_a_read_message_removes_it_once() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 0);
        assert!(!is(&format!("queue_delete('q', 1, {lease})")));
        assert!(!is("queue_delete('q', 1)"));
        assert!(!is("queue_archive('q', 1)"));
    }

    #[pg_test]
    fn delete_without_a_lease_removes_what_nobody_holds() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1'), queue_send('q', '2', delay => '1 h')");
        assert!(is("queue_delete('q', 1)"));
        assert!(is("queue_delete('q', 2, NULL, NULL)"));
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
    }

    #[pg_test]
    fn delete_without_a_lease_in_the_transaction_that_read_works() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        assert!(is("queue_delete('q', 1)"));
    }

    #[pg_test]
    fn delete_of_what_is_not_there_gives_false() {
        run("SELECT queue_create('q')");
        for id in ["1", "0", "-1", "9223372036854775807", "-9223372036854775808"] {
            assert!(!is(&format!("queue_delete('q', {id})")), "{id}");
            assert!(!is(&format!("queue_archive('q', {id})")), "{id}");
            assert!(!is(&format!("queue_cancel('q', {id})")), "{id}");
            assert!(!is(&format!("queue_delete('q', {id}, 1)")), "{id}");
        }
    }

    #[pg_test]
    fn delete_with_another_lease_does_nothing() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        for wrong in [lease + 1, lease - 1, 0, -1, i64::MAX] {
            assert!(!is(&format!("queue_delete('q', 1, {wrong})")), "{wrong}");
            assert!(!is(&format!("queue_archive('q', 1, {wrong})")), "{wrong}");
            assert!(!is(&format!("queue_delete('q', 2, {wrong})")), "{wrong}: nobody holds it");
        }
        assert!(!is(&format!("queue_delete('q', 2, {lease})")), "another message's lease");
        assert_eq!(number("SELECT count(*) FROM queue.q"), 2);
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn delete_strict_raises_where_false_would_result() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        fails(&format!("SELECT queue_delete('q', 1, {}, strict => true)", lease + 1)).is(
            "P0002",
            &lost(1),
            "",
            LOST_HINT,
        );
        fails(&format!("SELECT queue_archive('q', 1, {}, true)", lease + 1)).is(
            "P0002",
            &lost(1),
            "",
            LOST_HINT,
        );
        fails("SELECT queue_delete('q', 7, strict => true)").is("P0002", &lost(7), "", LOST_HINT);
        fails("SELECT queue_archive('q', 7, strict => true)").is("P0002", &lost(7), "", LOST_HINT);
        assert!(is(&format!("queue_delete('q', 1, {lease}, strict => true)")));
        fails(&format!("SELECT queue_delete('q', 1, {lease}, strict => true)")).is(
            "P0002",
            &lost(1),
            "",
            LOST_HINT,
        );
    }

    #[pg_test]
    fn delete_batch_returns_the_ids_that_were_there() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3,4}')");
        assert_eq!(column("SELECT queue_delete_batch('q', '{3,1,99,3,1}')"), [json!(3), json!(1)]);
        assert_eq!(number("SELECT count(*) FROM queue_delete_batch('q', '{3,1}')"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_delete_batch('q', '{}')"), 0);
        assert_eq!(column("SELECT msg_id FROM queue.q ORDER BY 1"), [json!(2), json!(4)]);
    }

    #[pg_test]
    fn delete_batch_with_leases_checks_each() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        run("CREATE TEMP TABLE held AS SELECT msg_id, lease_id FROM queue_read('q', 3)");
        let done = column(
            "SELECT queue_delete_batch('q', array_agg(msg_id ORDER BY msg_id), \
             array_agg(CASE msg_id WHEN 2 THEN 5 ELSE lease_id END ORDER BY msg_id)) FROM held",
        );
        assert_eq!(done, [json!(1), json!(3)]);
        assert_eq!(column("SELECT msg_id FROM queue.q"), [json!(2)]);
    }

    #[pg_test]
    fn delete_batch_strict_with_one_missing_does_nothing() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        for verb in ["queue_delete_batch", "queue_archive_batch"] {
            let failure = fails(&format!("SELECT {verb}('q', '{{1,7,2}}', strict => true)"));
            failure.is("P0002", &lost(7), "", LOST_HINT);
            assert_eq!(number("SELECT count(*) FROM queue.q"), 3);
            assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 0);
        }
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 9)"), 3);
        assert_eq!(number("SELECT count(*) FROM queue_delete_batch('q', '{1,1,2}', strict => true)"), 2);
    }

    #[pg_test]
    fn delete_batch_of_many_chunks_finishes_all() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', array_fill('1'::jsonb, ARRAY[1000]))");
        assert_eq!(
            number("SELECT count(*) FROM queue_delete_batch('q', (SELECT array_agg(msg_id) FROM queue_read('q', 1000)))"),
            1000
        );
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
    }

    #[pg_test]
    fn delete_batch_with_bad_arrays_is_refused() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        for verb in [
            "queue_delete_batch",
            "queue_archive_batch",
            "queue_release",
            "queue_extend_batch",
            "queue_delete_and_read",
        ] {
            let call = |args: &str| fails(&format!("SELECT * FROM {verb}('q', {args})"));
            call("'{1,NULL}'").is_null("msg_ids");
            call("'{1}', '{NULL}'").is_null("lease_ids");
            call("'{1,2}', '{1}'").is(
                "22023",
                "argument \"lease_ids\" has 1 elements, but 2 are needed",
                "",
                "Arrays of one call must be equally long.",
            );
            call("'{1}', '{}'").says("22023", "argument \"lease_ids\" has 0 elements, but 1 are needed");
            call("'{{1,2},{3,4}}'").is("22023", "argument \"msg_ids\" must be a one-dimensional array", "", "");
            call("'{1,2}', '{{1},{2}}'").is(
                "22023",
                "argument \"lease_ids\" must be a one-dimensional array",
                "",
                "",
            );
            call("array_fill(1::bigint, ARRAY[100001])").is_out_of_range(
                "msg_ids",
                "100001 elements",
                "at most 100000 elements",
            );
        }
        assert_eq!(number("SELECT count(*) FROM queue.q"), 1);
    }

    #[pg_test]
    fn archive_keeps_the_message_with_reason_and_count() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '{\"a\": 1}', '{\"h\": 1}')");
        run("SELECT * FROM queue_read('q')");
        run("SELECT * FROM queue_retry('q', 1, error => 'once', delay => '0')");
        run("CREATE TEMP TABLE sent AS SELECT enqueued_at FROM queue.q");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        assert!(is(&format!("queue_archive('q', 1, {lease})")));
        assert_eq!(
            rows("SELECT msg_id, delivery_count, priority, group_key, headers, message, last_error, archive_reason, \
                archived_at BETWEEN now() AND clock_timestamp() AS at_once, \
                enqueued_at = (SELECT enqueued_at FROM sent) AS same FROM queue_archive.q"),
            [json!({
                "msg_id": 1, "delivery_count": 2, "priority": 0, "group_key": null, "headers": {"h": 1},
                "message": {"a": 1}, "last_error": "once", "archive_reason": "archived", "at_once": true, "same": true,
            })]
        );
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
        assert!(!is("queue_archive('q', 1)"));
        assert!(!is("queue_delete('q', 1)"));
        assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 1);
    }

    #[pg_test]
    fn archive_without_a_read_counts_no_delivery() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        assert!(is("queue_archive('q', 1)"));
        assert_eq!(column("SELECT delivery_count FROM queue_archive.q"), [json!(0)]);
    }

    #[pg_test]
    fn archive_batch_returns_the_ids_that_were_there() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        assert_eq!(column("SELECT queue_archive_batch('q', '{2,2,9,1}')"), [json!(2), json!(1)]);
        assert_eq!(
            rows("SELECT msg_id, message, archive_reason FROM queue_archive.q ORDER BY 1"),
            [
                json!({"msg_id": 1, "message": 1, "archive_reason": "archived"}),
                json!({"msg_id": 2, "message": 2, "archive_reason": "archived"}),
            ]
        );
        let lease = number("SELECT lease_id FROM queue_read('q')");
        assert_eq!(
            number(&format!("SELECT count(*) FROM queue_archive_batch('q', '{{3}}', '{{{}}}')", lease + 1)),
            0
        );
        assert_eq!(column(&format!("SELECT queue_archive_batch('q', '{{3}}', '{{{lease}}}')")), [json!(3)]);
    }

    #[pg_test]
    fn cancel_deletes_what_nobody_holds() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1'), queue_send('q', '2', delay => '1 h'), queue_send('q', '3')");
        run("SELECT * FROM queue_read('q')");
        assert!(!is("queue_cancel('q', 1)"), "it is leased");
        assert!(is("queue_cancel('q', 2)"));
        assert!(!is("queue_cancel('q', 2)"));
        assert!(is("queue_cancel('q', 3)"));
        run("SELECT queue_release('q', '{1}')");
        assert!(is("queue_cancel('q', 1)"));
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 0);
    }

    #[pg_test]
    fn cancel_after_the_lease_ran_out_deletes() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q', visibility_timeout => '1 ms')");
        assert_eq!(column("SELECT queue_cancel('q', 1) FROM pg_sleep(0.01)"), [json!(true)]);
    }

    #[pg_test]
    fn cancel_needs_no_lease_where_finishing_does() {
        run("SELECT queue_create('q', require_lease => true)");
        run("SELECT queue_send('q', '1')");
        assert!(is("queue_cancel('q', 1)"));
    }

    #[pg_test]
    fn require_lease_refuses_calls_without_one() {
        run("SELECT queue_create('q', require_lease => true)");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3,4,5,6,7,8}')");
        run("CREATE TEMP TABLE held AS SELECT msg_id, lease_id FROM queue_read('q', 9)");
        for call in [
            "queue_delete('q', 1)",
            "queue_delete('q', 1, NULL)",
            "queue_delete_batch('q', '{1}')",
            "queue_archive('q', 1)",
            "queue_archive_batch('q', '{1}')",
            "queue_delete_and_read('q', '{1}')",
            "queue_retry('q', 1)",
            "queue_reject('q', 1)",
            "queue_release('q', '{1}')",
            "queue_extend('q', 1)",
            "queue_extend_batch('q', '{1}')",
        ] {
            let failure = fails(&format!("SELECT * FROM {call}"));
            assert_eq!(failure.sqlstate, "22004", "{call}: {failure:?}");
            assert!(failure.message.contains("lease_id"), "{call}: {failure:?}");
            assert!(failure.hint.contains("give the lease_id that queue_read returned"), "{call}: {failure:?}");
        }
        let lease = |id: i64| number(&format!("SELECT lease_id FROM held WHERE msg_id = {id}"));
        assert!(is(&format!("queue_delete('q', 1, {})", lease(1))));
        assert_eq!(column(&format!("SELECT queue_delete_batch('q', '{{2}}', '{{{}}}')", lease(2))), [json!(2)]);
        assert!(is(&format!("queue_archive('q', 3, {})", lease(3))));
        assert_eq!(value(&format!("SELECT outcome FROM queue_retry('q', 4, {})", lease(4))), json!("retried"));
        assert_eq!(value(&format!("SELECT queue_reject('q', 5, {})", lease(5))), json!("archived"));
        assert!(is(&format!("queue_extend('q', 6, {}) > now()", lease(6))));
        assert_eq!(column(&format!("SELECT queue_release('q', '{{6}}', '{{{}}}')", lease(6))), [json!(6)]);
        assert_eq!(
            column(&format!("SELECT queue_archive_batch('q', '{{7}}', '{{{}}}')", lease(7))),
            [json!(7)]
        );
        assert!(!is("queue_delete('q', 8, 5)"));
    }
}
