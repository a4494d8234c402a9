//! queue_send, queue_send_batch and queue_send_entries.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    const DELAYS: &str = "0 to 3650 days, without months";
    const MESSAGE_HINT: &str = "To send JSON null, write 'null'::jsonb.";

    #[pg_test]
    fn send_returns_ids_from_one_up_and_stores_the_message() {
        run("SELECT queue_create('q')");
        assert_eq!(number("SELECT queue_send('q', '{\"a\": [1, {\"b\": null}]}')"), 1);
        assert_eq!(number("SELECT queue_send('q', '\"text\"')"), 2);
        assert_eq!(
            rows(
                "SELECT msg_id, visible_at, delivery_count, priority, group_key, headers, message, last_error \
                FROM queue.q ORDER BY msg_id"
            ),
            [
                json!({"msg_id": 1, "visible_at": null, "delivery_count": 0, "priority": 0, "group_key": null,
                    "headers": null, "message": {"a": [1, {"b": null}]}, "last_error": null}),
                json!({"msg_id": 2, "visible_at": null, "delivery_count": 0, "priority": 0, "group_key": null,
                    "headers": null, "message": "text", "last_error": null}),
            ]
        );
        assert!(is("(SELECT bool_and(enqueued_at BETWEEN now() AND clock_timestamp()) FROM queue.q)"));
    }

    #[pg_test]
    fn send_with_headers_delivers_them() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1', '{\"trace\": \"x\"}')");
        run("SELECT queue_send('q', '2', headers => NULL)");
        run("SELECT queue_send('q', '3', '[1]')");
        assert_eq!(
            column("SELECT headers FROM queue_read('q', 3)"),
            [json!({"trace": "x"}), json!(null), json!([1])]
        );
    }

    #[pg_test]
    fn send_with_null_options_means_their_defaults() {
        run("SELECT queue_create('q')");
        let sent = number("SELECT queue_send('q', '1', NULL, NULL, NULL, NULL, NULL, NULL, NULL)");
        assert_eq!(column("SELECT msg_id FROM queue_read('q')"), [json!(sent)]);
    }

    #[pg_test]
    fn send_of_json_null_is_a_message_and_of_null_is_refused() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_send('q', NULL)").is(
            "22004",
            "argument \"message\" must not be null",
            "",
            MESSAGE_HINT,
        );
        assert_eq!(number("SELECT queue_send('q', 'null')"), 1);
        assert!(is("(SELECT message = 'null'::jsonb FROM queue_read('q'))"));
    }

    #[pg_test]
    fn send_with_a_delay_is_not_ready_until_then() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1', delay => '1 h')");
        run("SELECT queue_send('q', '2', delay => '0')");
        run("SELECT queue_send('q', '3', delay => '1 day 1 h')");
        assert!(is(
            "(SELECT visible_at - clock_timestamp() BETWEEN '59 min' AND '1 h' FROM queue.q WHERE msg_id = 1)"
        ));
        assert!(is("(SELECT visible_at IS NULL FROM queue.q WHERE msg_id = 2)"));
        assert!(is("(SELECT visible_at - clock_timestamp() BETWEEN '24 h 59 min' AND '25 h' FROM queue.q \
            WHERE msg_id = 3)"));
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 5)"), [json!(2)]);
    }

    #[pg_test]
    fn send_with_a_short_delay_is_read_when_it_is_over() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1', delay => '5 ms')");
        assert_eq!(column("SELECT msg_id FROM pg_sleep(0.01), queue_read('q')"), [json!(1)]);
    }

    #[pg_test]
    fn send_with_deliver_at_is_ready_then() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1', deliver_at => '2999-01-01 00:00:00+00')");
        run("SELECT queue_send('q', '2', deliver_at => '1999-01-01 00:00:00+00')");
        run("SELECT queue_send('q', '3', deliver_at => now())");
        assert!(is("(SELECT visible_at = '2999-01-01 00:00:00+00' FROM queue.q WHERE msg_id = 1)"));
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 5)"), [json!(2), json!(3)]);
    }

    #[pg_test]
    fn send_with_delay_and_deliver_at_is_refused() {
        run("SELECT queue_create('q')");
        for call in [
            "queue_send('q', '1', delay => '1 s', deliver_at => now())",
            "queue_send('q', '1', delay => '0', deliver_at => now())",
            "queue_send_batch('q', '{1}', delay => '1 s', deliver_at => now())",
            "queue_send_entries('q', '[{\"message\": 1, \"delay\": \"1 s\", \"deliver_at\": \"2030-01-01\"}]')",
        ] {
            fails(&format!("SELECT {call}")).is(
                "22023",
                "arguments \"delay\" and \"deliver_at\" exclude each other",
                "",
                "Give a duration or a time, not both.",
            );
        }
    }

    #[pg_test]
    fn send_with_a_delay_out_of_range_is_refused() {
        run("SELECT queue_create('q')");
        for (delay, shown) in [
            ("-1 s", "-1000 ms"),
            ("-1 us", "-0.001 ms"),
            ("1 month", "an interval with months"),
            ("1 year", "an interval with months"),
            ("-1 month", "an interval with months"),
            ("3651 days", "3651 days"),
            ("1 month -30 days", "an interval with months"),
        ] {
            fails(&format!("SELECT queue_send('q', '1', delay => '{delay}')"))
                .is_out_of_range("delay", shown, DELAYS);
        }
        fails("SELECT queue_send('q', '1', delay => '2147483647 days')").says("22023", "\"delay\"");
        fails("SELECT queue_send('q', '1', delay => '2147483647 days 2562047788 h')")
            .says("22023", "\"delay\"");
        assert_eq!(number("SELECT queue_send('q', '1', delay => '3650 days')"), 1);
    }

    #[pg_test]
    fn send_at_an_infinite_time_is_refused() {
        run("SELECT queue_create('q')");
        for time in ["infinity", "-infinity"] {
            let failure = fails(&format!("SELECT queue_send('q', '1', deliver_at => '{time}')"));
            assert_eq!(failure.sqlstate, "22023");
            assert_eq!(failure.detail, "Allowed: a finite time.");
            assert!(failure.message.contains("\"deliver_at\""), "{failure:?}");
        }
    }

    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    #[pg_test]
    fn send_with_an_infinite_delay_is_refused() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_send('q', '1', delay => 'infinity')").says("22023", "\"delay\"");
        fails("SELECT queue_send('q', '1', delay => '-infinity')").says("22023", "\"delay\"");
    }

    #[pg_test]
    fn send_with_an_unbuilt_option_is_refused() {
        run("SELECT queue_create('q')");
        for (option, given) in
            [("priority", "1"), ("priority", "-1"), ("group_key", "'g'"), ("dedup_key", "''")]
        {
            fails(&format!("SELECT queue_send('q', '1', {option} => {given})")).is_unbuilt(option);
            let entry = match option {
                "priority" => format!("{{\"message\": 1, \"priority\": {given}}}"),
                _ => format!("{{\"message\": 1, \"{option}\": \"{}\"}}", given.trim_matches('\'')),
            };
            fails(&format!("SELECT queue_send_entries('q', '[{entry}]')")).is_unbuilt(option);
        }
        for (option, given) in [("priority", "1"), ("group_keys", "'{g}'"), ("dedup_keys", "'{d}'")] {
            fails(&format!("SELECT queue_send_batch('q', '{{1}}', {option} => {given})")).is_unbuilt(option);
        }
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
    }

    #[pg_test]
    fn send_to_an_unknown_queue_is_refused() {
        fails("SELECT queue_send('q', '1')").is_unknown_queue("q");
        fails("SELECT queue_send_batch('q', '{1}')").is_unknown_queue("q");
        fails("SELECT queue_send_batch('q', '{}')").is_unknown_queue("q");
        fails("SELECT queue_send_entries('q', '[{\"message\": 1}]')").is_unknown_queue("q");
        fails("SELECT queue_send_entries('q', '[]')").is_unknown_queue("q");
    }

    #[pg_test]
    fn send_of_json_that_is_none_is_refused_by_postgres() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_send('q', '{broken')").says("22P02", "json");
    }

    #[pg_test]
    fn send_of_a_large_message_delivers_all_of_it() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', to_jsonb(string_agg(md5(i::text), ''))) FROM generate_series(1, 50000) i");
        assert!(is("(SELECT message #>> '{}' = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 50000) i) \
            FROM queue_read('q'))"));
    }

    #[pg_test]
    fn send_keeps_every_digit_of_a_number() {
        run("SELECT queue_create('q')");
        let number = "123456789012345678901234567890.123456789012345678901234567890";
        run(&format!("SELECT queue_send('q', '{number}')"));
        run(&format!("SELECT * FROM queue_send_batch('q', '{{{number}}}')"));
        run(&format!("SELECT * FROM queue_send_entries('q', '[{{\"message\": {{\"n\": {number}}}}}]')"));
        run("SELECT * FROM queue_send_entries('q', '[{\"message\": 1e300, \"headers\": {\"n\": 9007199254740993}}]')");
        assert_eq!(
            column("SELECT message::text FROM queue_read('q', 9)"),
            [
                json!(number),
                json!(number),
                json!(format!("{{\"n\": {number}}}")),
                json!(format!("1{}", "0".repeat(300))),
            ]
        );
        assert_eq!(
            value("SELECT headers::text FROM queue.q WHERE msg_id = 4"),
            json!("{\"n\": 9007199254740993}")
        );
    }

    #[pg_test]
    fn send_batch_returns_ids_in_the_order_of_the_input() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '0')");
        let sent = column(
            "SELECT * FROM queue_send_batch('q', (SELECT array_agg(to_jsonb(i) ORDER BY i) \
             FROM generate_series(1, 1000) i))",
        );
        assert_eq!(sent, (2..=1001).map(|id| json!(id)).collect::<Vec<_>>());
        assert!(is("(SELECT bool_and(message = to_jsonb(msg_id - 1)) FROM queue.q)"));
        assert_eq!(
            column("SELECT msg_id FROM queue_read('q', 2000)"),
            (1..=1001).map(|id| json!(id)).collect::<Vec<_>>()
        );
    }

    #[pg_test]
    fn send_batch_with_headers_gives_each_message_its_own() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}', ARRAY['{\"h\": 1}', NULL, 'null']::jsonb[])");
        assert_eq!(
            rows("SELECT message, headers, headers IS NULL AS none FROM queue_read('q', 3)"),
            [
                json!({"message": 1, "headers": {"h": 1}, "none": false}),
                json!({"message": 2, "headers": null, "none": true}),
                json!({"message": 3, "headers": null, "none": false}),
            ]
        );
    }

    #[pg_test]
    fn send_batch_with_a_delay_delays_each() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2}', delay => '1 h')");
        run("SELECT * FROM queue_send_batch('q', '{3,4}', deliver_at => '2999-01-01')");
        run("SELECT * FROM queue_send_batch('q', '{5}')");
        assert!(is("(SELECT bool_and(visible_at > now() + '59 min') FROM queue.q WHERE msg_id < 5)"));
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 9)"), [json!(5)]);
    }

    #[pg_test]
    fn send_batch_of_nothing_sends_nothing() {
        run("SELECT queue_create('q')");
        assert_eq!(number("SELECT count(*) FROM queue_send_batch('q', '{}')"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_send_batch('q', '{}', '{}')"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_send_entries('q', '[]')"), 0);
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
    }

    #[pg_test]
    fn send_batch_of_unequal_arrays_is_refused() {
        run("SELECT queue_create('q')");
        let hint = "Arrays of one call must be equally long.";
        fails("SELECT queue_send_batch('q', '{1,2}', ARRAY['{}']::jsonb[])").is(
            "22023",
            "argument \"headers\" has 1 elements, but 2 are needed",
            "",
            hint,
        );
        fails("SELECT queue_send_batch('q', '{1}', ARRAY['{}', '{}']::jsonb[])").is(
            "22023",
            "argument \"headers\" has 2 elements, but 1 are needed",
            "",
            hint,
        );
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
    }

    #[pg_test]
    fn send_batch_of_two_dimensions_is_refused() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_send_batch('q', '{{1,2},{3,4}}')").is(
            "22023",
            "argument \"messages\" must be a one-dimensional array",
            "",
            "",
        );
        fails("SELECT queue_send_batch('q', '{1,2}', '{{1},{2}}')").is(
            "22023",
            "argument \"headers\" must be a one-dimensional array",
            "",
            "",
        );
    }

    #[pg_test]
    fn send_batch_with_other_array_bounds_works() {
        run("SELECT queue_create('q')");
        assert_eq!(column("SELECT * FROM queue_send_batch('q', '[5:6]={1,2}')"), [json!(1), json!(2)]);
    }

    #[pg_test]
    fn send_batch_with_a_null_message_sends_nothing() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_send_batch('q', '{1,NULL,3}')").is(
            "22004",
            "argument \"messages\" must not be null",
            "",
            MESSAGE_HINT,
        );
        assert_eq!(column("SELECT * FROM queue_send_batch('q', ARRAY['null', '1']::jsonb[])").len(), 2);
    }

    #[pg_test]
    fn send_batch_beyond_the_bound_is_refused() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_send_batch('q', array_fill('1'::jsonb, ARRAY[100001]))").is_out_of_range(
            "messages",
            "100001 elements",
            "at most 100000 elements",
        );
        fails("SELECT queue_send_entries('q', to_jsonb(array_fill('1'::jsonb, ARRAY[100001])))")
            .is_out_of_range("entries", "100001 elements", "at most 100000 elements");
    }

    #[pg_test]
    fn send_entries_takes_options_per_message() {
        run("SELECT queue_create('q')");
        let sent = column(
            r#"SELECT * FROM queue_send_entries('q', '[
                {"message": "plain"},
                {"message": "headers", "headers": {"h": 1}},
                {"message": "delay", "delay": "1 h"},
                {"message": "deliver_at", "deliver_at": "2999-01-01T00:00:00Z"},
                {"message": "past", "deliver_at": "1999-01-01T00:00:00Z"},
                {"message": null},
                {"message": "nulls", "headers": null, "delay": null, "deliver_at": null, "priority": null,
                 "group_key": null, "dedup_key": null, "ttl": null},
                {"message": "zero", "delay": "0", "priority": 0}
            ]')"#,
        );
        assert_eq!(sent, (1..=8).map(|id| json!(id)).collect::<Vec<_>>());
        assert_eq!(
            column("SELECT message FROM queue_read('q', 10)"),
            [json!("plain"), json!("headers"), json!("past"), json!(null), json!("nulls"), json!("zero")]
        );
        assert!(is("(SELECT visible_at > now() + '59 min' FROM queue.q WHERE msg_id = 3)"));
        assert!(is("(SELECT visible_at = '2999-01-01T00:00:00Z' FROM queue.q WHERE msg_id = 4)"));
        assert_eq!(value("SELECT headers FROM queue.q WHERE msg_id = 2"), json!({"h": 1}));
    }

    #[pg_test]
    fn send_with_a_ttl_expires_so_long_after_it_is_visible() {
        run("SELECT queue_create('q', message_ttl => '1 day')");
        run("SELECT queue_send('q', '1', ttl => '1 h')");
        run("SELECT queue_send('q', '2', delay => '2 h', ttl => '1 h')");
        run("SELECT queue_send('q', '3', deliver_at => '2999-01-01T00:00:00Z', ttl => '1 h')");
        run("SELECT queue_send('q', '4')");
        run("SELECT queue_send('q', '5', ttl => '0')");
        run("SELECT queue_send_batch('q', '{6,7}', ttl => '1 h')");
        run(r#"SELECT queue_send_entries('q', '[{"message": 8, "ttl": "1 h"}, {"message": 9}]')"#);
        let hours =
            "SELECT round(extract(epoch FROM expires_at - coalesce(visible_at, clock_timestamp())) / 3600) \
                     FROM queue.q ORDER BY msg_id";
        let (hour, day) = (json!(1), json!(24));
        assert_eq!(
            column(hours),
            [
                hour.clone(),
                hour.clone(),
                hour.clone(),
                day.clone(),
                json!(null),
                hour.clone(),
                hour.clone(),
                hour,
                day
            ]
        );
    }

    #[pg_test]
    fn send_with_a_ttl_out_of_range_is_refused() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_send('q', '1', ttl => '-1 s')").says("22023", "\"ttl\"");
        fails("SELECT queue_send('q', '1', ttl => '1 month')").says("22023", "\"ttl\"");
        fails("SELECT queue_send_entries('q', '[{\"message\": 1, \"ttl\": \"-1 s\"}]')")
            .says("22023", "\"ttl\"");
    }

    #[pg_test]
    fn read_of_an_expired_message_gives_nothing() {
        run("SELECT queue_create('q')");
        run("INSERT INTO queue.q (message, expires_at) VALUES ('1', clock_timestamp() - interval '1 s'), ('2', NULL)");
        assert_eq!(column("SELECT message FROM queue_read('q', 10)"), [json!(2)]);
        assert_eq!(column("SELECT message FROM queue_pop('q', 10)"), [] as [serde_json::Value; 0]);
        assert_eq!(number("SELECT count(*) FROM queue.q"), 2);
    }

    #[pg_test]
    fn send_entries_keeps_strange_text() {
        run("SELECT queue_create('q')");
        let strange = r#"[{"message": {"k\"\\\n\u00e9é": "\u2028 \ud83d\ude00 \\u0000"}}]"#;
        run(&format!("SELECT queue_send_entries('q', $j${strange}$j$)"));
        assert!(is(&format!(
            "(SELECT message = ($j${strange}$j$::jsonb -> 0 -> 'message') FROM queue_read('q'))"
        )));
    }

    #[pg_test]
    fn send_entries_that_are_no_array_are_refused() {
        run("SELECT queue_create('q')");
        for entries in ["{\"message\": 1}", "1", "null", "\"[]\"", "true"] {
            fails(&format!("SELECT queue_send_entries('q', '{entries}')")).is(
                "22023",
                "argument \"entries\" must be a JSON array",
                "",
                "Each element is an object with the argument names of queue_send.",
            );
        }
    }

    #[pg_test]
    fn send_entries_with_a_bad_entry_name_it_and_send_nothing() {
        run("SELECT queue_create('q')");
        for (entry, said) in [
            ("{\"message\": 1, \"dealy\": \"1 s\"}", "dealy"),
            ("{\"message\": 1, \"queue\": \"q\"}", "queue"),
            ("{}", "message"),
            ("{\"headers\": {}}", "message"),
            ("{\"message\": 1, \"delay\": 5}", "string"),
            ("{\"message\": 1, \"priority\": \"high\"}", "high"),
            ("{\"message\": 1, \"priority\": 1.5}", "1.5"),
            ("1", "not an object"),
            ("null", "not an object"),
            ("\"message\"", "not an object"),
            ("[1]", "not an object"),
        ] {
            let failure = fails(&format!("SELECT queue_send_entries('q', '[{{\"message\": 0}}, {entry}]')"));
            failure.says("22023", "invalid entry 1 in argument \"entries\": ");
            failure.says("22023", said);
            assert_eq!(failure.detail, "Each entry is a JSON object with the argument names of queue_send.");
        }
        fails("SELECT queue_send_entries('q', '[{\"message\": 1, \"delay\": \"-1 s\"}]')")
            .is_out_of_range("delay", "-1000 ms", DELAYS);
        fails("SELECT queue_send_entries('q', '[{\"message\": 1, \"delay\": \"soon\"}]')")
            .says("22007", "soon");
        fails("SELECT queue_send_entries('q', '[{\"message\": 1, \"deliver_at\": \"soon\"}]')")
            .says("22007", "soon");
        fails("SELECT queue_send_entries('q', '[{\"message\": 1, \"deliver_at\": \"infinity\"}]')")
            .says("22023", "deliver_at");
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
    }

    #[pg_test]
    fn send_into_a_table_without_our_trigger_is_refused() {
        run("SELECT queue_create('q')");
        run("ALTER TABLE queue.q DISABLE TRIGGER pg_queue_change");
        for call in [
            "queue_send('q', '1')",
            "queue_send_batch('q', '{1}')",
            "queue_send_entries('q', '[{\"message\": 1}]')",
        ] {
            fails(&format!("SELECT {call}")).is(
                "55000",
                "table of queue \"q\" is not intact",
                "Its trigger \"pg_queue_change\" is missing or disabled, so the message would not be noticed.",
                "",
            );
        }
        run("ALTER TABLE queue.q ENABLE ALWAYS TRIGGER pg_queue_change");
        run("SELECT queue_send('q', '1')");
    }

    #[pg_test]
    fn send_after_the_columns_changed_is_refused_and_with_more_columns_works() {
        run("SELECT queue_create('q')");
        run("ALTER TABLE queue.q ADD COLUMN note text DEFAULT 'x'");
        run("SELECT queue_send('q', '1')");
        assert_eq!(column("SELECT msg_id FROM queue_read('q')"), [json!(1)]);
        run("ALTER TABLE queue.q RENAME COLUMN message TO body");
        fails("SELECT queue_send('q', '1')").is(
            "55000",
            "table of queue \"q\" is not intact",
            "Its first ten columns are not those that queue_create made.",
            "",
        );
    }

    #[pg_test]
    fn send_obeys_a_constraint_of_the_owner() {
        run("SELECT queue_create('q')");
        run("ALTER TABLE queue.q ADD CONSTRAINT objects CHECK (jsonb_typeof(message) = 'object')");
        fails("SELECT queue_send('q', '1')").says("23514", "objects");
        fails("SELECT queue_send_batch('q', ARRAY['{}', '1']::jsonb[])").says("23514", "objects");
        assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 0);
        assert!(is("queue_send('q', '{}') > 0"));
        assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 1);
    }

    #[pg_test]
    fn send_of_more_than_is_remembered_one_by_one_loses_nothing() {
        run("SELECT queue_create('q')");
        run("INSERT INTO queue.q (message) SELECT '1' FROM generate_series(1, 100010)");
        assert_eq!(number("SELECT queue_send('q', '2')"), 100_011);
        assert!(is("queue_delete('q', 100005)"), "beyond the bound");
        assert!(!is("queue_delete('q', 100005)"));
        assert!(is("queue_archive('q', 100011)"));
        undone("ASSERT queue_delete('q', 100006);");
        assert_eq!(
            column("SELECT msg_id FROM queue_peek('q', msg_ids => '{100005,100006}')"),
            [json!(100_006)]
        );
        assert!(is("(SELECT count(DISTINCT msg_id) = 10 FROM queue_read('q', 10))"));
    }
}
