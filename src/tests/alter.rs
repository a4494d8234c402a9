//! queue_alter, queue_pause and queue_resume.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    const SETTINGS: &str = "SELECT visibility_timeout, max_deliveries, dead_letter_queue, retry_delay, \
        retry_backoff, retry_delay_max, retry_jitter, require_lease, message_ttl, archive_retention, \
        durable_leases FROM queue_list() WHERE queue = 'q'";

    #[pg_test]
    fn alter_with_nulls_changes_nothing() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', '2 min', 7, 'dead', '3 s', 1.5, '2 h', 0.5, require_lease => true)");
        let before = rows(SETTINGS);
        assert!(is("queue_alter('q')"));
        assert_eq!(rows(SETTINGS), before);
    }

    #[pg_test]
    fn alter_of_each_setting_changes_that_one_only() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q')");
        for (setting, given, shown) in [
            ("visibility_timeout", "'2 min'", json!("00:02:00")),
            ("max_deliveries", "0", json!(0)),
            ("dead_letter_queue", "'dead'", json!("dead")),
            ("retry_delay", "'3 s'", json!("00:00:03")),
            ("retry_backoff", "1.5", json!(1.5)),
            ("retry_delay_max", "'2 h'", json!("02:00:00")),
            ("retry_jitter", "0.5", json!(0.5)),
            ("require_lease", "true", json!(true)),
            ("message_ttl", "'1 h'", json!("01:00:00")),
            ("message_ttl", "'0'", json!("00:00:00")),
            ("archive_retention", "'30 days'", json!("720:00:00")),
            ("durable_leases", "true", json!(true)),
            ("dead_letter_queue", "''", json!("")),
        ] {
            let mut expected = rows(SETTINGS);
            expected[0][setting] = shown;
            assert!(is(&format!("queue_alter('q', {setting} => {given})")));
            assert_eq!(rows(SETTINGS), expected, "{setting}");
        }
    }

    #[pg_test]
    fn alter_with_an_unbuilt_setting_is_refused() {
        run("SELECT queue_create('q')");
        for (setting, given) in [
            ("max_length", "10"),
            ("overflow", "'drop_oldest'"),
            ("dedup_window", "'0'"),
            ("priority_ageing", "'1 s'"),
            ("group_fairness", "true"),
        ] {
            fails(&format!("SELECT queue_alter('q', {setting} => {given})")).is_unbuilt(setting);
        }
    }

    #[pg_test]
    fn alter_of_message_ttl_sets_the_columns_default() {
        run("SELECT queue_create('q', message_ttl => '1 h')");
        let lives = |from: &str, to: &str| {
            run("INSERT INTO queue.q (message) VALUES ('1')");
            assert!(is(&format!(
                "(SELECT expires_at BETWEEN clock_timestamp() + '{from}' AND clock_timestamp() + '{to}' \
                  FROM queue.q ORDER BY msg_id DESC LIMIT 1)"
            )));
        };
        lives("59 min", "61 min");
        run("SELECT queue_alter('q', message_ttl => '1 day')");
        lives("23 h", "25 h");
        run("SELECT queue_alter('q', message_ttl => '0'); INSERT INTO queue.q (message) VALUES ('1')");
        assert!(is("(SELECT expires_at IS NULL FROM queue.q ORDER BY msg_id DESC LIMIT 1)"));
    }

    #[pg_test]
    fn alter_with_a_setting_out_of_range_is_refused() {
        run("SELECT queue_create('q')");
        let before = rows(SETTINGS);
        let lease = "1 ms to 365 days, without months";
        fails("SELECT queue_alter('q', '0')").is_out_of_range("visibility_timeout", "0", lease);
        fails("SELECT queue_alter('q', max_deliveries => -1)").is_out_of_range(
            "max_deliveries",
            "-1",
            "0 to 1000000",
        );
        fails("SELECT queue_alter('q', retry_backoff => 0)").is_out_of_range("retry_backoff", "0", "1 to 1000");
        fails("SELECT queue_alter('q', retry_jitter => 2)").is_out_of_range("retry_jitter", "2", "0 to 1");
        fails("SELECT queue_alter('q', retry_delay => '1 month')").says("22023", "retry_delay");
        fails("SELECT queue_alter('q', retry_delay_max => '-1 s')").says("22023", "retry_delay_max");
        fails("SELECT queue_alter('q', message_ttl => '-1 s')").says("22023", "message_ttl");
        fails("SELECT queue_alter('q', archive_retention => '1 month')").says("22023", "archive_retention");
        assert_eq!(rows(SETTINGS), before);
    }

    #[pg_test]
    fn alter_of_an_unknown_queue_is_refused() {
        fails("SELECT queue_alter('q', max_deliveries => 1)").is_unknown_queue("q");
    }

    #[pg_test]
    fn alter_to_a_circle_of_dead_letter_queues_is_refused() {
        run("SELECT queue_create('a')");
        run("SELECT queue_create('b', dead_letter_queue => 'a')");
        run("SELECT queue_create('c', dead_letter_queue => 'b')");
        let back = "Its dead letters would come back.";
        fails("SELECT queue_alter('a', dead_letter_queue => 'b')").is(
            "22023",
            "queue \"b\" cannot be the dead-letter queue of \"a\"",
            "",
            back,
        );
        fails("SELECT queue_alter('a', dead_letter_queue => 'c')").is(
            "22023",
            "queue \"c\" cannot be the dead-letter queue of \"a\"",
            "",
            back,
        );
        fails("SELECT queue_alter('a', dead_letter_queue => 'a')")
            .says("22023", "\"a\" cannot be the dead-letter queue");
        fails("SELECT queue_alter('a', dead_letter_queue => 'd')").is_unknown_queue("d");
    }

    #[pg_test]
    fn alter_of_the_timeout_holds_for_the_next_read() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT queue_alter('q', visibility_timeout => '1 h')");
        assert!(is(
            "(SELECT lease_expires_at - clock_timestamp() BETWEEN '59 min' AND '61 min' FROM queue_read('q'))"
        ));
    }

    #[pg_test]
    fn alter_of_require_lease_holds_for_the_next_finish() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT queue_alter('q', require_lease => true)");
        fails("SELECT queue_delete('q', 1)").is_null("lease_id");
        run("SELECT queue_alter('q', require_lease => false)");
        assert!(is("queue_delete('q', 1)"));
    }

    #[pg_test]
    fn alter_undone_leaves_what_was() {
        run("SELECT queue_create('q', max_deliveries => 2)");
        undone("PERFORM queue_alter('q', max_deliveries => 1, require_lease => true);");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        assert_eq!(value("SELECT outcome FROM queue_retry('q', 1)"), json!("retried"));
        assert_eq!(column("SELECT max_deliveries FROM queue_list()"), [json!(2)]);
    }

    #[pg_test]
    fn pause_stops_reads_and_not_sends() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        assert!(is("queue_pause('q')"));
        assert!(!is("queue_pause('q')"), "it was paused already");
        assert_eq!(column("SELECT paused FROM queue_list()"), [json!(true)]);
        assert_eq!(number("SELECT queue_send('q', '2')"), 2);
        for read in
            ["queue_read('q')", "queue_read_any('{q}')", "queue_pop('q')", "queue_delete_and_read('q', '{}')"]
        {
            assert_eq!(number(&format!("SELECT count(*) FROM {read}")), 0, "{read}");
        }
        assert_eq!(number("SELECT count(*) FROM queue_peek('q')"), 2);
        assert!(is("queue_resume('q')"));
        assert!(!is("queue_resume('q')"), "it was not paused");
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 5)"), [json!(1), json!(2)]);
    }

    #[pg_test]
    fn pause_lets_what_is_leased_be_finished() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        run("SELECT * FROM queue_read('q', 3)");
        run("SELECT queue_pause('q')");
        assert!(is("queue_delete('q', 1)"));
        assert_eq!(value("SELECT outcome FROM queue_retry('q', 2, delay => '0')"), json!("retried"));
        assert!(is("queue_extend('q', 3) IS NOT NULL"));
    }

    #[pg_test]
    fn pause_undone_lets_reads_go_on() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        undone("PERFORM queue_pause('q');");
        assert_eq!(column("SELECT msg_id FROM queue_read('q')"), [json!(1)]);
    }

    #[pg_test]
    fn pause_of_an_unknown_queue_is_refused() {
        fails("SELECT queue_pause('q')").is_unknown_queue("q");
        fails("SELECT queue_resume('q')").is_unknown_queue("q");
    }
}
