//! queue_peek: looking without leasing.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    #[pg_test]
    fn peek_shows_the_row_and_leases_nothing() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '{\"a\": 1}', '{\"h\": 1}')");
        for _ in 0..2 {
            let mut shown = rows("SELECT * FROM queue_peek('q')");
            assert!(shown[0]["enqueued_at"].is_string());
            shown[0]["enqueued_at"] = json!("then");
            assert_eq!(
                shown,
                [json!({
                    "msg_id": 1, "lease_id": null, "delivery_count": 0, "enqueued_at": "then",
                    "lease_expires_at": null, "priority": 0, "group_key": null, "last_error": null,
                    "headers": {"h": 1}, "message": {"a": 1}, "state": "ready", "consumer": null, "pid": null,
                    "visible_at": null,
                })]
            );
        }
        assert_eq!(number("SELECT delivery_count FROM queue_read('q')"), 1);
    }

    #[pg_test]
    fn peek_shows_ten_in_the_order_of_their_ids_unless_told() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', array_fill('1'::jsonb, ARRAY[12]))");
        assert_eq!(
            column("SELECT msg_id FROM queue_peek('q')"),
            (1..=10).map(|id| json!(id)).collect::<Vec<_>>()
        );
        assert_eq!(column("SELECT msg_id FROM queue_peek('q', 2)"), [json!(1), json!(2)]);
        assert_eq!(number("SELECT count(*) FROM queue_peek('q', NULL)"), 10);
        assert_eq!(number("SELECT count(*) FROM queue_peek('q', 100)"), 12);
    }

    #[pg_test]
    fn peek_of_ids_shows_those_that_are_there() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3,4}')");
        run("SELECT queue_delete('q', 2)");
        assert_eq!(
            column("SELECT msg_id FROM queue_peek('q', msg_ids => '{3,2,1,99}') ORDER BY 1"),
            [json!(1), json!(3)]
        );
        assert_eq!(number("SELECT count(*) FROM queue_peek('q', 1, '{3,1}')"), 1);
        assert_eq!(number("SELECT count(*) FROM queue_peek('q', msg_ids => '{}')"), 0);
        fails("SELECT * FROM queue_peek('q', msg_ids => '{1,NULL}')").is_null("msg_ids");
    }

    #[pg_test]
    fn peek_of_an_id_given_twice_shows_it_once() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        assert_eq!(column("SELECT msg_id FROM queue_peek('q', msg_ids => '{1,1}')"), [json!(1)]);
    }

    #[pg_test]
    fn peek_tells_what_is_delayed() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1', delay => '1 h')");
        run("SELECT queue_send('q', '2')");
        assert_eq!(
            rows("SELECT msg_id, state, visible_at > now() + '59 min' AS later FROM queue_peek('q')"),
            [
                json!({"msg_id": 1, "state": "delayed", "later": true}),
                json!({"msg_id": 2, "state": "ready", "later": null}),
            ]
        );
        assert_eq!(column("SELECT msg_id FROM queue_peek('q', state => 'delayed')"), [json!(1)]);
        assert_eq!(column("SELECT msg_id FROM queue_peek('q', state => 'ready')"), [json!(2)]);
    }

    #[pg_test]
    fn peek_tells_what_this_transaction_has_leased() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        let lease = number("SELECT lease_id FROM queue_read('q', visibility_timeout => '1 h')");
        assert_eq!(
            rows(
                "SELECT msg_id, state, lease_id, delivery_count, pid = pg_backend_pid() AS mine, \
                lease_expires_at - clock_timestamp() BETWEEN '50 min' AND '1 h' AS lasts FROM queue_peek('q')"
            ),
            [
                json!({"msg_id": 1, "state": "leased", "lease_id": lease, "delivery_count": 1, "mine": true,
                    "lasts": true}),
                json!({"msg_id": 2, "state": "ready", "lease_id": null, "delivery_count": 0, "mine": null,
                    "lasts": null}),
            ]
        );
        assert_eq!(column("SELECT msg_id FROM queue_peek('q', state => 'leased')"), [json!(1)]);
        run("SELECT queue_release('q', '{1}')");
        assert_eq!(number("SELECT count(*) FROM queue_peek('q', state => 'leased')"), 0);
    }

    #[pg_test]
    fn peek_shows_a_retried_message_with_its_error() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        run("SELECT * FROM queue_retry('q', 1, error => 'boom', delay => '1 h')");
        assert_eq!(
            rows("SELECT state, delivery_count, last_error FROM queue_peek('q')"),
            [json!({"state": "delayed", "delivery_count": 1, "last_error": "boom"})]
        );
    }

    #[pg_test]
    fn peek_for_an_unknown_state_is_refused() {
        run("SELECT queue_create('q')");
        for state in ["finished", "", "Ready"] {
            fails(&format!("SELECT * FROM queue_peek('q', state => '{state}')")).is_out_of_range(
                "state",
                &format!("\"{state}\""),
                "ready, delayed, leased, finishing, exhausted",
            );
        }
        for state in ["'ready'", "'delayed'", "'leased'", "'finishing'", "'exhausted'", "NULL"] {
            run(&format!("SELECT * FROM queue_peek('q', state => {state})"));
        }
    }

    #[pg_test]
    fn peek_of_a_paused_queue_looks_all_the_same() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT queue_pause('q')");
        assert_eq!(column("SELECT state FROM queue_peek('q')"), [json!("ready")]);
    }
}
