//! What ends a delivery without finishing the message: queue_retry, queue_reject, queue_release, queue_extend.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    /// A retry of message 1: its outcome, and the seconds until the next delivery.
    fn retry(args: &str) -> (String, f64) {
        let said = rows(&format!(
            "SELECT outcome, extract(epoch FROM visible_at - clock_timestamp())::float8 AS left \
             FROM queue_retry('q', 1{args})"
        ));
        assert_eq!(said.len(), 1);
        (said[0]["outcome"].as_str().unwrap().to_owned(), said[0]["left"].as_f64().unwrap_or(f64::NAN))
    }

    #[pg_test]
    fn retry_delivers_again_after_the_backoff() {
        run("SELECT queue_create('q', retry_delay => '100 s', retry_backoff => 3, retry_jitter => 0)");
        run("SELECT queue_send('q', '1')");
        for (deliveries, expected) in [(1, 100.0), (2, 300.0), (3, 900.0)] {
            assert_eq!(number("SELECT delivery_count FROM queue_read('q')"), deliveries);
            let (outcome, left) = retry("");
            assert_eq!(outcome, "retried");
            assert!((expected - 60.0..=expected).contains(&left), "delivery {deliveries}: {left}");
            assert!(is("(SELECT visible_at - clock_timestamp() > '10 s' FROM queue.q)"));
            assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 0, "not due yet");
            run("UPDATE queue.q SET visible_at = NULL");
        }
    }

    #[pg_test]
    fn retry_spreads_the_backoff_by_the_jitter() {
        run("SELECT queue_create('q', retry_delay => '10000 s', retry_delay_max => '1 day', retry_jitter => 0.2)");
        run("SELECT * FROM queue_send_batch('q', array_fill('1'::jsonb, ARRAY[50]))");
        run("CREATE TEMP TABLE waits AS SELECT extract(epoch FROM (r).visible_at - clock_timestamp())::float8 AS secs \
            FROM (SELECT queue_retry('q', msg_id, lease_id) AS r FROM queue_read('q', 50)) AS retries");
        assert!(is("(SELECT count(*) = 50 AND min(secs) >= 7940 AND max(secs) <= 12000 FROM waits)"));
        assert!(is("(SELECT max(secs) - min(secs) > 1000 FROM waits)"), "they are spread");
    }

    #[pg_test]
    fn retry_keeps_the_backoff_below_its_ceiling() {
        run("SELECT queue_create('q', retry_delay => '50 s', retry_delay_max => '150 s', retry_jitter => 0)");
        run("SELECT queue_send('q', '1')");
        for _ in 0..4 {
            run("SELECT * FROM queue_read('q')");
            assert_eq!(retry(", delay => '0'").0, "retried");
        }
        run("SELECT * FROM queue_read('q')");
        let (_, left) = retry("");
        assert!((90.0..=150.0).contains(&left), "{left}");
    }

    #[pg_test]
    fn retry_with_a_delay_takes_that() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        let (outcome, left) = retry(", delay => '1 h'");
        assert_eq!(outcome, "retried");
        assert!((3540.0..=3600.0).contains(&left), "{left}");
        assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 0);
    }

    #[pg_test]
    fn retry_with_no_delay_is_ready_at_once_and_counted() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        let (outcome, left) = retry(&format!(", {lease}, delay => '0'"));
        assert_eq!(outcome, "retried");
        assert!(left <= 0.0, "{left}");
        let again = rows("SELECT lease_id, delivery_count FROM queue_read('q')");
        assert_eq!(again[0]["delivery_count"], json!(2));
        assert_ne!(again[0]["lease_id"], json!(lease));
        assert_eq!(retry(&format!(", {lease}")).0, "lost");
    }

    #[pg_test]
    fn retry_keeps_the_last_error() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        for (given, kept) in [
            ("'first'", json!("first")),
            ("NULL", json!("first")),
            ("'second'", json!("second")),
            ("''", json!("")),
        ] {
            run("SELECT * FROM queue_read('q')");
            assert_eq!(retry(&format!(", error => {given}, delay => '0'")).0, "retried");
            assert_eq!(column("SELECT last_error FROM queue_peek('q')"), [kept]);
        }
        assert_eq!(column("SELECT last_error FROM queue_read('q')"), [json!("")]);
    }

    #[pg_test]
    fn retry_with_a_huge_error_keeps_its_start() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_retry('q', 1, error => 'x' || repeat('é', 10000))");
        assert!(is(
            "(SELECT octet_length(last_error) = 9999 AND last_error = 'x' || repeat('é', 4999) FROM queue.q)"
        ));
        run("SELECT queue_reject('q', 1, error => repeat('y', 20000))");
        assert!(is("(SELECT last_error = repeat('y', 10000) FROM queue_archive.q)"));
    }

    #[pg_test]
    fn retry_of_what_is_not_there_is_lost() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        let lost = [json!({"outcome": "lost", "visible_at": null})];
        assert_eq!(rows(&format!("SELECT * FROM queue_retry('q', 1, {})", lease + 1)), lost);
        assert_eq!(rows("SELECT * FROM queue_retry('q', 99)"), lost);
        assert_eq!(value(&format!("SELECT queue_reject('q', 1, {})", lease + 1)), json!("lost"));
        assert_eq!(value("SELECT queue_reject('q', 99)"), json!("lost"));
        run("SELECT queue_delete('q', 1)");
        assert_eq!(rows("SELECT * FROM queue_retry('q', 1)"), lost);
        assert_eq!(value("SELECT queue_reject('q', 1)"), json!("lost"));
    }

    #[pg_test]
    fn retry_with_a_delay_out_of_range_is_refused() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        let allowed = "0 to 3650 days, without months";
        for (delay, shown) in
            [("-1 s", "-1000 ms"), ("1 month", "an interval with months"), ("3651 days", "3651 days")]
        {
            fails(&format!("SELECT * FROM queue_retry('q', 1, delay => '{delay}')"))
                .is_out_of_range("delay", shown, allowed);
            fails(&format!("SELECT * FROM queue_release('q', '{{1}}', delay => '{delay}')"))
                .is_out_of_range("delay", shown, allowed);
        }
        assert!(is("queue_delete('q', 1)"), "it is still held");
    }

    #[pg_test]
    fn retry_of_the_last_delivery_goes_to_the_dead_letter_queue() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_send('dead', '0')");
        run("SELECT queue_create('q', max_deliveries => 2, dead_letter_queue => 'dead')");
        run("SELECT queue_send('q', '{\"a\": 1}', '{\"h\": 1}')");
        run("SELECT * FROM queue_read('q')");
        assert_eq!(retry(", error => 'first', delay => '0'").0, "retried");
        run("SELECT * FROM queue_read('q')");
        assert_eq!(
            rows("SELECT * FROM queue_retry('q', 1, error => 'second', delay => '1 h')"),
            [json!({"outcome": "dead_lettered", "visible_at": null})]
        );
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 0);
        run("CREATE TEMP TABLE letter AS SELECT * FROM queue_read('dead', 5) WHERE msg_id = 2");
        assert_eq!(
            rows(
                "SELECT msg_id, delivery_count, message, last_error, headers #- '{dead_letter,at}' AS headers \
                FROM letter"
            ),
            [json!({
                "msg_id": 2, "delivery_count": 1, "message": {"a": 1}, "last_error": "second",
                "headers": {"h": 1, "dead_letter": {"queue": "q", "msg_id": 1, "reason": "max_deliveries",
                    "error": "second", "delivery_count": 2}},
            })]
        );
        assert!(is(
            "(SELECT (headers #>> '{dead_letter,at}')::timestamptz BETWEEN now() AND clock_timestamp() \
            FROM letter)"
        ));
    }

    #[pg_test]
    fn retry_of_the_last_delivery_without_a_dead_letter_queue_is_archived() {
        run("SELECT queue_create('q', max_deliveries => 1)");
        run("SELECT queue_send('q', '{\"a\": 1}', '{\"h\": 1}')");
        run("SELECT * FROM queue_read('q')");
        assert_eq!(
            rows("SELECT * FROM queue_retry('q', 1, error => 'boom')"),
            [json!({"outcome": "archived", "visible_at": null})]
        );
        assert_eq!(
            rows("SELECT msg_id, delivery_count, headers, message, last_error, archive_reason FROM queue_archive.q"),
            [json!({"msg_id": 1, "delivery_count": 1, "headers": {"h": 1}, "message": {"a": 1},
                "last_error": "boom", "archive_reason": "max_deliveries"})]
        );
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 0);
    }

    #[pg_test]
    fn retry_of_the_last_delivery_keeps_an_error_of_before() {
        run("SELECT queue_create('q', max_deliveries => 2)");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        run("SELECT * FROM queue_retry('q', 1, error => 'first', delay => '0')");
        run("SELECT * FROM queue_read('q')");
        run("SELECT * FROM queue_retry('q', 1)");
        assert_eq!(column("SELECT last_error FROM queue_archive.q"), [json!("first")]);
    }

    #[pg_test]
    fn reject_goes_to_the_dead_letter_queue_at_once() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', dead_letter_queue => 'dead')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        assert_eq!(value(&format!("SELECT queue_reject('q', 1, {lease}, 'bad')")), json!("dead_lettered"));
        assert_eq!(
            rows(
                "SELECT message, last_error, headers #- '{dead_letter,at}' AS headers FROM queue_read('dead')"
            ),
            [json!({"message": 1, "last_error": "bad", "headers": {"dead_letter": {"queue": "q", "msg_id": 1,
                "reason": "rejected", "error": "bad", "delivery_count": 1}}})]
        );
        assert_eq!(value(&format!("SELECT queue_reject('q', 1, {lease})")), json!("lost"));
        assert_eq!(number("SELECT count(*) FROM queue.dead"), 1);
    }

    #[pg_test]
    fn reject_without_an_error_says_null() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', dead_letter_queue => 'dead')");
        run("SELECT queue_send('q', '1'), queue_reject('q', 1)");
        assert_eq!(
            rows("SELECT last_error, headers #- '{dead_letter,at}' AS headers FROM queue_read('dead')"),
            [
                json!({"last_error": null, "headers": {"dead_letter": {"queue": "q", "msg_id": 1, "reason": "rejected",
                "error": null, "delivery_count": 0}}})
            ]
        );
    }

    #[pg_test]
    fn reject_keeps_headers_that_are_no_object() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', dead_letter_queue => 'dead')");
        run("SELECT queue_send('q', '1', '[1, 2]'), queue_reject('q', 1)");
        assert_eq!(
            rows(
                "SELECT headers - 'dead_letter' AS keys, headers #> '{dead_letter,headers}' AS kept, \
                headers #> '{dead_letter,queue}' AS queue FROM queue_read('dead')"
            ),
            [json!({"keys": {}, "kept": [1, 2], "queue": "q"})]
        );
    }

    #[pg_test]
    fn reject_of_a_dead_letter_names_the_last_queue() {
        run("SELECT queue_create('end')");
        run("SELECT queue_create('dead', dead_letter_queue => 'end')");
        run("SELECT queue_create('q', dead_letter_queue => 'dead')");
        run("SELECT queue_send('q', '1')");
        assert_eq!(value("SELECT queue_reject('q', 1, error => 'one')"), json!("dead_lettered"));
        assert_eq!(value("SELECT queue_reject('dead', 1, error => 'two')"), json!("dead_lettered"));
        assert_eq!(
            value(
                "SELECT headers #- '{dead_letter,at}' #- '{dead_letter,dead_letter,at}' FROM queue_read('end')"
            ),
            json!({"dead_letter": {"queue": "dead", "msg_id": 1, "reason": "rejected", "error": "two",
                "delivery_count": 0, "dead_letter": {"queue": "q", "msg_id": 1, "reason": "rejected",
                "error": "one", "delivery_count": 0}}})
        );
    }

    #[pg_test]
    fn reject_without_a_dead_letter_queue_is_archived() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        assert_eq!(value("SELECT queue_reject('q', 1, NULL, 'bad')"), json!("archived"));
        assert_eq!(
            rows("SELECT msg_id, delivery_count, last_error, archive_reason FROM queue_archive.q"),
            [json!({"msg_id": 1, "delivery_count": 1, "last_error": "bad", "archive_reason": "rejected"})]
        );
    }

    #[pg_test]
    fn release_gives_back_what_is_leased_without_counting() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        run("SELECT * FROM queue_read('q', 2)");
        assert_eq!(column("SELECT queue_release('q', '{2,1,3,99,2}')"), [json!(2), json!(1)]);
        assert_eq!(number("SELECT count(*) FROM queue_release('q', '{1,2}')"), 0, "nobody holds them now");
        assert_eq!(
            rows("SELECT msg_id, delivery_count FROM queue_read('q', 3)"),
            [
                json!({"msg_id": 1, "delivery_count": 1}),
                json!({"msg_id": 2, "delivery_count": 1}),
                json!({"msg_id": 3, "delivery_count": 1}),
            ]
        );
    }

    #[pg_test]
    fn release_loses_the_lease() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        assert_eq!(column(&format!("SELECT queue_release('q', '{{1}}', '{{{lease}}}')")), [json!(1)]);
        assert!(!is(&format!("queue_delete('q', 1, {lease})")));
        assert!(is(&format!("queue_extend('q', 1, {lease}) IS NULL")));
        assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 1);
        assert_eq!(number(&format!("SELECT count(*) FROM queue_release('q', '{{1}}', '{{{lease}}}')")), 0);
    }

    #[pg_test]
    fn release_with_a_delay_delivers_later_without_counting() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        run("SELECT * FROM queue_read('q')");
        assert_eq!(column("SELECT queue_release('q', '{1,2}', delay => '1 h')"), [json!(1)]);
        assert_eq!(
            rows("SELECT state, delivery_count, last_error FROM queue_peek('q', 1)"),
            [json!({"state": "delayed", "delivery_count": 0, "last_error": null})]
        );
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 5)"), [json!(2)]);
        run("UPDATE queue.q SET visible_at = NULL WHERE msg_id = 1");
        assert_eq!(number("SELECT delivery_count FROM queue_read('q')"), 1);
    }

    #[pg_test]
    fn release_with_no_delay_is_a_plain_release() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        assert_eq!(column("SELECT queue_release('q', '{1}', delay => '0')"), [json!(1)]);
        assert_eq!(number("SELECT delivery_count FROM queue_read('q')"), 1);
    }

    #[pg_test]
    fn release_is_not_undone_by_the_count_of_earlier_deliveries() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        run("SELECT * FROM queue_retry('q', 1, delay => '0')");
        assert_eq!(number("SELECT delivery_count FROM queue_read('q')"), 2);
        run("SELECT queue_release('q', '{1}')");
        assert_eq!(number("SELECT delivery_count FROM queue_read('q')"), 2);
        run("SELECT queue_release('q', '{1}', delay => '1 ms')");
        assert_eq!(number("SELECT delivery_count FROM pg_sleep(0.01), queue_read('q')"), 2);
    }

    #[pg_test]
    fn extend_of_a_held_message_returns_the_new_end() {
        run("SELECT queue_create('q', '1 h')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q', visibility_timeout => '1 min')");
        let in_range = |call: &str, from: &str, to: &str| {
            is(&format!("{call} BETWEEN clock_timestamp() + '{from}' AND clock_timestamp() + '{to}'"))
        };
        assert!(in_range(&format!("queue_extend('q', 1, {lease}, '2 h')"), "119 min", "120 min"));
        assert!(in_range("queue_extend('q', 1)", "59 min", "60 min"), "the queue's timeout unless told");
        assert!(in_range("queue_extend('q', 1, NULL, NULL)", "59 min", "60 min"));
        assert_eq!(
            column(&format!("SELECT queue_extend_batch('q', '{{1}}', '{{{lease}}}', '1 h')")),
            [json!(1)]
        );
        assert!(is(&format!("queue_delete('q', 1, {lease})")), "it is the same lease");
    }

    #[pg_test]
    fn extend_of_what_is_not_held_gives_null() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        assert!(is(&format!("queue_extend('q', 1, {}) IS NULL", lease + 1)));
        assert!(is("queue_extend('q', 2) IS NULL"), "nobody holds it");
        assert!(is("queue_extend('q', 99) IS NULL"));
        assert_eq!(column("SELECT queue_extend_batch('q', '{1,2,99,1}')"), [json!(1)]);
        run("SELECT queue_delete('q', 1)");
        assert!(is(&format!("queue_extend('q', 1, {lease}) IS NULL")));
        assert_eq!(number("SELECT count(*) FROM queue_extend_batch('q', '{1}')"), 0);
    }

    #[pg_test]
    fn extend_keeps_the_lease_beyond_its_first_end() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        // Of a few attempts one comes before the lease has ended.
        let extended = || {
            let lease =
                number("SELECT lease_id FROM queue_read('q', visibility_timeout => '300 ms', wait => '10 s')");
            is(&format!("queue_extend('q', 1, {lease}, '1 h') IS NOT NULL")).then_some(lease)
        };
        let lease = (0..5).find_map(|_| extended()).expect("a lease that runs is extended");
        assert_eq!(number("SELECT count(*) FROM pg_sleep(0.4), queue_read('q')"), 0);
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn extend_that_shortens_acts_at_commit() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q', visibility_timeout => '1 h')");
        assert!(is(&format!("queue_extend('q', 1, {lease}, '1 ms') < now() + '1 h'")));
        assert_eq!(number("SELECT count(*) FROM pg_sleep(0.01), queue_read('q')"), 0, "not before the commit");
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn extend_after_the_lease_ran_out_revives_it_unless_lost() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q', visibility_timeout => '1 ms')");
        run("SELECT pg_sleep(0.01)");
        let again = number("SELECT lease_id FROM queue_read('q')");
        assert!(is(&format!("queue_extend('q', 1, {lease}) IS NULL")));
        assert!(is(&format!("queue_extend('q', 1, {again}) IS NOT NULL")));
    }
}
