//! queue_read, queue_read_any, queue_pop and queue_delete_and_read.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    const QUANTITIES: &str = "1 to 100000";
    const LEASES: &str = "1 ms to 365 days, without months";

    #[pg_test]
    fn read_of_own_uncommitted_message_delivers_its_whole_row() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '{\"a\": 1}', '{\"h\": 2}')");
        let read = rows(
            "SELECT *, lease_expires_at - clock_timestamp() BETWEEN '15 s' AND '30 s' AS lasts FROM queue_read('q')",
        );
        assert_eq!(read.len(), 1);
        let mut fields = read[0].as_object().unwrap().clone();
        assert_eq!(fields.remove("lasts"), Some(json!(true)), "{fields:?}");
        let lease = fields["lease_id"].as_i64().unwrap();
        assert!(lease > 0);
        for (name, expected) in [
            ("msg_id", json!(1)),
            ("delivery_count", json!(1)),
            ("priority", json!(0)),
            ("group_key", json!(null)),
            ("last_error", json!(null)),
            ("headers", json!({"h": 2})),
            ("message", json!({"a": 1})),
        ] {
            assert_eq!(fields[name], expected, "{name}");
        }
        assert_eq!(fields.len(), 10);
        assert!(is(&format!(
            "'{}'::timestamptz = (SELECT enqueued_at FROM queue.q)",
            fields["enqueued_at"].as_str().unwrap()
        )));
        assert!(is("(SELECT delivery_count = 0 FROM queue.q)"), "a read writes nothing");
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn read_while_leased_delivers_nothing() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 1);
        assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 100)"), 0);
    }

    #[pg_test]
    fn read_of_an_empty_queue_gives_nothing_at_once() {
        run("SELECT queue_create('q')");
        // Of a few attempts one: the machine may stand still in another.
        let is_at_once = || {
            let begun = value("SELECT clock_timestamp()");
            assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 0);
            is(&format!("clock_timestamp() - '{}'::timestamptz < '500 ms'", begun.as_str().unwrap()))
        };
        assert!((0..5).any(|_| is_at_once()), "wait is 0, but it took longer each time");
    }

    #[pg_test]
    fn read_with_a_wait_ends_empty_after_it() {
        run("SELECT queue_create('q')");
        run("CREATE TEMP TABLE t AS SELECT clock_timestamp() AS at");
        assert_eq!(number("SELECT count(*) FROM queue_read('q', wait => '200 ms')"), 0);
        assert!(is("(SELECT clock_timestamp() - at >= '200 ms' FROM t)"));
    }

    #[pg_test]
    fn read_with_a_wait_delivers_own_message_when_its_delay_is_over() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1', delay => '300 ms')");
        assert_eq!(column("SELECT msg_id FROM queue_read('q', wait => '10 s')"), [json!(1)]);
    }

    #[pg_test]
    fn read_with_a_wait_longer_than_wait_max_is_capped() {
        run("SELECT queue_create('q')");
        run("SET LOCAL pg_queue.wait_max = '50 ms'");
        run("CREATE TEMP TABLE t AS SELECT clock_timestamp() AS at");
        assert_eq!(number("SELECT count(*) FROM queue_read('q', wait => '1 day')"), 0);
        assert!(is("(SELECT clock_timestamp() - at < '10 s' FROM t)"));
    }

    #[pg_test]
    fn read_delivers_in_the_order_of_sending_up_to_quantity() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3,4,5}')");
        assert_eq!(column("SELECT msg_id FROM queue_read('q')"), [json!(1)]);
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 3)"), [json!(2), json!(3), json!(4)]);
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 100000)"), [json!(5)]);
    }

    #[pg_test]
    fn read_of_more_than_a_chunk_delivers_each_once() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', array_fill('1'::jsonb, ARRAY[1000]))");
        let read = column("SELECT msg_id FROM queue_read('q', 999)");
        assert_eq!(read, (1..=999).map(|id| json!(id)).collect::<Vec<_>>());
        assert!(is("(SELECT count(DISTINCT lease_id) = 1 FROM queue_read('q', 999))"));
    }

    #[pg_test]
    fn read_gives_each_delivery_a_lease_of_its_own() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        let mut leases: Vec<i64> =
            column("SELECT lease_id FROM queue_read('q', 3)").iter().map(|l| l.as_i64().unwrap()).collect();
        run("SELECT queue_release('q', '{1,2,3}')");
        leases.extend(column("SELECT lease_id FROM queue_read('q', 3)").iter().map(|l| l.as_i64().unwrap()));
        let distinct: std::collections::HashSet<i64> = leases.iter().copied().collect();
        assert_eq!(distinct.len(), 6, "{leases:?}");
    }

    #[pg_test]
    fn read_with_a_quantity_out_of_range_is_refused() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        for quantity in ["0", "-1", "100001", "9223372036854775807", "-9223372036854775808"] {
            for call in [
                format!("queue_read('q', {quantity})"),
                format!("queue_read_any('{{q}}', {quantity})"),
                format!("queue_pop('q', {quantity})"),
                format!("queue_delete_and_read('q', '{{}}', quantity => {quantity})"),
                format!("queue_peek('q', {quantity})"),
            ] {
                fails(&format!("SELECT * FROM {call}")).is_out_of_range("quantity", quantity, QUANTITIES);
            }
        }
        assert_eq!(number("SELECT count(*) FROM queue_read('q', NULL)"), 1);
    }

    #[pg_test]
    fn read_with_a_visibility_timeout_leases_for_that_long() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3,4}')");
        let ends = |call: &str, from: &str, to: &str| {
            is(&format!(
                "(SELECT bool_and(lease_expires_at BETWEEN clock_timestamp() + '{from}' AND clock_timestamp() + '{to}') \
                 FROM {call})"
            ))
        };
        assert!(ends("queue_read('q', visibility_timeout => '1 h')", "59 min", "1 h"));
        assert!(ends("queue_read('q', visibility_timeout => '365 days')", "364 days", "365 days"));
        assert!(ends("queue_read_any('{q}', visibility_timeout => '2 h')", "119 min", "2 h"));
        assert!(ends("queue_delete_and_read('q', '{}', visibility_timeout => '3 h')", "179 min", "3 h"));
    }

    #[pg_test]
    fn read_with_a_visibility_timeout_out_of_range_is_refused() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        for (given, shown) in [
            ("0", "0"),
            ("-1 s", "-1000 ms"),
            ("0.5 ms", "0.5 ms"),
            ("366 days", "366 days"),
            ("1 month", "an interval with months"),
        ] {
            for call in [
                format!("queue_read('q', visibility_timeout => '{given}')"),
                format!("queue_read_any('{{q}}', visibility_timeout => '{given}')"),
                format!("queue_delete_and_read('q', '{{}}', visibility_timeout => '{given}')"),
                format!("queue_extend('q', 1, visibility_timeout => '{given}')"),
                format!("queue_extend_batch('q', '{{1}}', visibility_timeout => '{given}')"),
            ] {
                fails(&format!("SELECT * FROM {call}")).is_out_of_range("visibility_timeout", shown, LEASES);
            }
        }
        assert_eq!(number("SELECT count(*) FROM queue_read('q', visibility_timeout => '1 ms')"), 1);
    }

    #[pg_test]
    fn read_with_a_wait_out_of_range_is_refused() {
        run("SELECT queue_create('q')");
        for (given, shown) in [("-1 ms", "-1 ms"), ("2 days", "2 days"), ("1 month", "an interval with months")]
        {
            for call in ["queue_read('q', ", "queue_read_any('{q}', "] {
                fails(&format!("SELECT * FROM {call}wait => '{given}')")).is_out_of_range(
                    "wait",
                    shown,
                    "0 to 1 days, without months",
                );
            }
        }
    }

    #[pg_test]
    fn read_with_an_unbuilt_option_is_refused() {
        run("SELECT queue_create('q')");
        fails("SELECT * FROM queue_read('q', filter => '{}')").is_unbuilt("filter");
        fails("SELECT * FROM queue_read('q', consumer => 'c')").is_unbuilt("consumer");
        fails("SELECT * FROM queue_read_any('{q}', consumer => 'c')").is_unbuilt("consumer");
        fails("SELECT * FROM queue_delete_and_read('q', '{}', consumer => 'c')").is_unbuilt("consumer");
    }

    #[pg_test]
    fn read_after_the_lease_ran_out_delivers_again_under_another_lease() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let first = number("SELECT lease_id FROM queue_read('q', visibility_timeout => '1 ms')");
        let again = rows("SELECT lease_id, delivery_count FROM pg_sleep(0.01), queue_read('q')");
        assert_eq!(again[0]["delivery_count"], json!(2));
        let second = again[0]["lease_id"].as_i64().unwrap();
        assert_ne!(first, second);
        assert!(!is(&format!("queue_delete('q', 1, {first})")), "the first lease is lost");
        assert_eq!(value(&format!("SELECT outcome FROM queue_retry('q', 1, {first})")), json!("lost"));
        assert!(is(&format!("queue_delete('q', 1, {second})")));
    }

    #[pg_test]
    fn read_does_not_deliver_more_often_than_max_deliveries() {
        run("SELECT queue_create('q', max_deliveries => 1)");
        run("SELECT queue_send('q', '1')");
        assert_eq!(number("SELECT count(*) FROM queue_read('q', visibility_timeout => '1 ms')"), 1);
        assert_eq!(number("SELECT count(*) FROM pg_sleep(0.01), queue_read('q')"), 0);
    }

    #[pg_test]
    fn read_with_unlimited_deliveries_goes_on_for_ever() {
        run("SELECT queue_create('q', max_deliveries => 0)");
        run("SELECT queue_send('q', '1')");
        for count in 1..=30 {
            assert_eq!(number("SELECT delivery_count FROM queue_read('q')"), count);
            assert_eq!(value("SELECT outcome FROM queue_retry('q', 1, delay => '0')"), json!("retried"));
        }
    }

    #[pg_test]
    fn read_of_an_unknown_queue_is_refused() {
        fails("SELECT * FROM queue_read('q')").is_unknown_queue("q");
        fails("SELECT * FROM queue_pop('q')").is_unknown_queue("q");
        fails("SELECT * FROM queue_peek('q')").is_unknown_queue("q");
        fails("SELECT * FROM queue_delete_and_read('q', '{}')").is_unknown_queue("q");
        fails("SELECT * FROM queue_delete_and_read('q', '{1}')").is_unknown_queue("q");
        run("SELECT queue_create('a')");
        fails("SELECT * FROM queue_read_any('{a,q}')").is_unknown_queue("q");
    }

    #[pg_test]
    fn read_in_the_same_statement_as_the_send_is_consistent() {
        run("SELECT queue_create('q')");
        run("DO $$ DECLARE m jsonb; BEGIN FOR i IN 1..100 LOOP PERFORM queue_send('q', to_jsonb(i)); \
            SELECT message INTO m FROM queue_read('q'); ASSERT m = to_jsonb(i); \
            ASSERT queue_delete('q', i); END LOOP; END $$");
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
    }

    #[pg_test]
    fn read_under_limit_leases_all_it_popped() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        assert_eq!(number("SELECT msg_id FROM queue_read('q', 3) LIMIT 1"), 1);
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 3)"), 0);
    }

    #[pg_test]
    fn read_any_takes_from_earlier_queues_first() {
        run("SELECT queue_create('a'), queue_create('b'), queue_create('c')");
        run("SELECT queue_send('a', '1'), queue_send('b', '2'), queue_send('b', '3'), queue_send('c', '4')");
        assert_eq!(
            rows("SELECT queue, msg_id, message FROM queue_read_any('{b,c,a}', 3)"),
            [
                json!({"queue": "b", "msg_id": 1, "message": 2}),
                json!({"queue": "b", "msg_id": 2, "message": 3}),
                json!({"queue": "c", "msg_id": 1, "message": 4}),
            ]
        );
        assert_eq!(column("SELECT queue FROM queue_read_any('{b,c,a}', 3)"), [json!("a")]);
        assert_eq!(number("SELECT count(*) FROM queue_read_any('{b,c,a}', 3)"), 0);
    }

    #[pg_test]
    fn read_any_with_one_name_twice_reads_it_once() {
        run("SELECT queue_create('a')");
        run("SELECT queue_send('a', '1')");
        assert_eq!(column("SELECT queue FROM queue_read_any('{a,a}', 3)"), [json!("a")]);
    }

    #[pg_test]
    fn read_any_takes_each_queues_own_timeout() {
        run("SELECT queue_create('a', '1 h'), queue_create('b', '2 h')");
        run("SELECT queue_send('a', '1'), queue_send('b', '1')");
        assert!(is("(SELECT bool_and(lease_expires_at - clock_timestamp() BETWEEN \
            CASE queue WHEN 'a' THEN '59 min' ELSE '119 min' END::interval AND \
            CASE queue WHEN 'a' THEN '1 h' ELSE '2 h' END::interval) FROM queue_read_any('{a,b}', 2))"));
    }

    #[pg_test]
    fn read_any_of_no_queues_or_too_many_is_refused() {
        fails("SELECT * FROM queue_read_any('{}')")
            .says("22023", "invalid value for argument \"queues\": 0 names");
        let failure =
            fails("SELECT * FROM queue_read_any((SELECT array_agg(i::text) FROM generate_series(1, 1000) i))");
        failure.says("22023", "invalid value for argument \"queues\": 1000 names");
        assert!(failure.detail.starts_with("Allowed: 1 to "), "{failure:?}");
        fails("SELECT * FROM queue_read_any('{{a,b},{c,d}}')").is(
            "22023",
            "argument \"queues\" must be a one-dimensional array",
            "",
            "",
        );
    }

    #[pg_test]
    fn read_any_passes_over_a_paused_queue() {
        run("SELECT queue_create('a'), queue_create('b')");
        run("SELECT queue_send('a', '1'), queue_send('b', '1')");
        run("SELECT queue_pause('a')");
        assert_eq!(column("SELECT queue FROM queue_read_any('{a,b}', 5)"), [json!("b")]);
    }

    #[pg_test]
    fn pop_reads_and_deletes() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        assert_eq!(
            rows("SELECT msg_id, delivery_count, message FROM queue_pop('q', 2)"),
            [
                json!({"msg_id": 1, "delivery_count": 1, "message": 1}),
                json!({"msg_id": 2, "delivery_count": 1, "message": 2}),
            ]
        );
        assert_eq!(column("SELECT msg_id FROM queue.q"), [json!(3)]);
        assert!(!is("queue_delete('q', 1)"));
        assert_eq!(column("SELECT msg_id FROM queue_pop('q', 2)"), [json!(3)]);
        assert_eq!(number("SELECT count(*) FROM queue_pop('q', 2)"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 0);
    }

    #[pg_test]
    fn delete_and_read_finishes_and_gives_the_next() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3,4}')");
        assert_eq!(column("SELECT msg_id FROM queue_delete_and_read('q', '{}')"), [json!(1)]);
        assert_eq!(column("SELECT msg_id FROM queue_delete_and_read('q', '{1}')"), [json!(2)]);
        assert_eq!(
            column("SELECT msg_id FROM queue_delete_and_read('q', '{2}', quantity => 5)"),
            [json!(3), json!(4)]
        );
        assert_eq!(number("SELECT count(*) FROM queue_delete_and_read('q', '{3,4,3}')"), 0);
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
    }

    #[pg_test]
    fn delete_and_read_with_leases_finishes_only_what_they_hold() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        run("SELECT * FROM queue_read('q')");
        let next =
            column(&format!("SELECT msg_id FROM queue_delete_and_read('q', '{{1,2}}', '{{{lease},77}}')"));
        assert_eq!(next, [json!(3)]);
        assert_eq!(column("SELECT msg_id FROM queue.q ORDER BY 1"), [json!(2), json!(3)]);
    }

    #[pg_test]
    fn delete_and_read_strict_with_a_lost_lease_does_nothing() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        fails(&format!(
            "SELECT * FROM queue_delete_and_read('q', '{{1,2}}', '{{{lease},77}}', strict => true)"
        ))
        .is(
            "P0002",
            "message 2 of queue \"q\" is not there, or its lease is lost",
            "",
            "Roll back: another consumer may have the message.",
        );
        assert_eq!(number("SELECT count(*) FROM queue.q"), 3);
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 5)"), [json!(2), json!(3)]);
    }
}
