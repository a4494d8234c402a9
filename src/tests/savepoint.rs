//! Rollback to a savepoint, within the transaction's own overlay: as if what came after it had not been said.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    fn read(quantity: i64) -> Vec<serde_json::Value> {
        column(&format!("SELECT msg_id FROM queue_read('q', {quantity})"))
    }

    #[pg_test]
    fn send_undone_is_never_read() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        undone("PERFORM queue_send('q', '2'); PERFORM queue_send_batch('q', '{3,4}');");
        assert_eq!(number("SELECT queue_send('q', '5')"), 5);
        assert_eq!(read(9), [json!(1), json!(5)]);
        assert!(!is("queue_delete('q', 2)"));
    }

    #[pg_test]
    fn send_kept_by_an_inner_and_undone_by_an_outer_savepoint_is_never_read() {
        run("SELECT queue_create('q')");
        undone(
            "PERFORM queue_send('q', '1'); \
            BEGIN PERFORM queue_send('q', '2'); \
              BEGIN PERFORM queue_send('q', '3'); EXCEPTION WHEN division_by_zero THEN NULL; END; \
            EXCEPTION WHEN division_by_zero THEN NULL; END; \
            ASSERT (SELECT count(*) FROM queue_read('q', 9)) = 3;",
        );
        assert_eq!(read(9), Vec::<serde_json::Value>::new());
    }

    #[pg_test]
    fn send_undone_by_an_inner_savepoint_leaves_the_outer() {
        run("SELECT queue_create('q')");
        kept(
            "PERFORM queue_send('q', '1'); \
            BEGIN PERFORM queue_send('q', '2'); PERFORM 1/0; EXCEPTION WHEN division_by_zero THEN NULL; END; \
            PERFORM queue_send('q', '3'); \
            BEGIN PERFORM queue_send('q', '4'); EXCEPTION WHEN division_by_zero THEN NULL; END;",
        );
        assert_eq!(read(9), [json!(1), json!(3), json!(4)]);
    }

    #[pg_test]
    fn read_undone_gives_the_lease_back_and_counts_the_delivery() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        undone("PERFORM * FROM queue_read('q');");
        let again = rows("SELECT msg_id, delivery_count FROM queue_read('q')");
        assert_eq!(again, [json!({"msg_id": 1, "delivery_count": 2})]);
    }

    #[pg_test]
    fn peek_after_a_read_undone_shows_that_it_counted() {
        run("SELECT queue_create('q', max_deliveries => 2)");
        run("SELECT queue_send('q', '1')");
        let look = "SELECT state, delivery_count FROM queue_peek('q')";
        undone("PERFORM * FROM queue_read('q');");
        assert_eq!(rows(look), [json!({"state": "ready", "delivery_count": 1})]);
        undone("PERFORM * FROM queue_read('q');");
        assert_eq!(rows(look), [json!({"state": "exhausted", "delivery_count": 2})]);
    }

    #[pg_test]
    fn read_undone_loses_its_lease() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("CREATE TEMP SEQUENCE leases");
        // A sequence is not rolled back: it carries the lease out of the subtransaction.
        undone("PERFORM setval('leases', lease_id) FROM queue_read('q');");
        assert!(!is("queue_delete('q', 1, currval('leases'))"));
        assert!(is("queue_extend('q', 1, currval('leases')) IS NULL"));
        assert_eq!(read(1), [json!(1)]);
        assert!(!is("queue_delete('q', 1, currval('leases'))"));
        assert!(is("queue_delete('q', 1)"));
    }

    #[pg_test]
    fn delete_undone_is_still_held_by_its_lease() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        undone(&format!("ASSERT queue_delete('q', 1, {lease}); ASSERT NOT queue_delete('q', 1, {lease});"));
        assert_eq!(read(1), Vec::<serde_json::Value>::new());
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn delete_undone_without_a_read_is_ready_again() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        undone("ASSERT (SELECT count(*) FROM queue_delete_batch('q', '{1,2}')) = 2;");
        undone("ASSERT queue_archive('q', 1); ASSERT queue_cancel('q', 2); ASSERT (SELECT count(*) FROM queue_pop('q')) = 1;");
        assert_eq!(read(9), [json!(1), json!(2), json!(3)]);
        assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 0);
    }

    #[pg_test]
    fn delete_strict_that_fails_undoes_the_read_of_its_block() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("DO $$ BEGIN BEGIN PERFORM * FROM queue_read('q'); PERFORM queue_delete('q', 1, 5, strict => true); \
            EXCEPTION WHEN no_data_found THEN NULL; END; END $$");
        assert_eq!(read(1), [json!(1)]);
    }

    #[pg_test]
    fn retry_undone_is_still_held_by_its_lease() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        undone(&format!(
            "ASSERT (SELECT outcome FROM queue_retry('q', 1, {lease}, 'boom', '1 h')) = 'retried';"
        ));
        assert_eq!(read(1), Vec::<serde_json::Value>::new());
        assert_eq!(
            rows("SELECT last_error, visible_at FROM queue.q"),
            [json!({"last_error": null, "visible_at": null})]
        );
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn retry_undone_leaves_no_delay_behind() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        undone(&format!("PERFORM * FROM queue_retry('q', 1, {lease}, 'boom', '1 h');"));
        assert_eq!(column(&format!("SELECT queue_release('q', '{{1}}', '{{{lease}}}')")), [json!(1)]);
        assert_eq!(read(1), [json!(1)], "its row is due at once");
    }

    #[pg_test]
    fn retry_of_the_last_delivery_undone_is_still_held() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', max_deliveries => 1, dead_letter_queue => 'dead')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        undone(&format!(
            "ASSERT (SELECT outcome FROM queue_retry('q', 1, {lease})) = 'dead_lettered'; \
            ASSERT (SELECT count(*) FROM queue_read('dead')) = 1;"
        ));
        assert_eq!(number("SELECT count(*) FROM queue_read('dead')"), 0);
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn reject_undone_is_still_held() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        undone(&format!("ASSERT queue_reject('q', 1, {lease}) = 'archived';"));
        assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 0);
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn release_undone_is_still_held_by_its_lease() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        undone("ASSERT (SELECT count(*) FROM queue_release('q', '{1}')) = 1; ASSERT (SELECT count(*) FROM queue_read('q')) = 1;");
        undone("ASSERT (SELECT count(*) FROM queue_release('q', '{1}', delay => '1 h')) = 1;");
        assert_eq!(read(1), Vec::<serde_json::Value>::new());
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn release_undone_leaves_the_delivery_counted() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        undone("ASSERT (SELECT count(*) FROM queue_release('q', '{1}')) = 1;");
        run("SELECT * FROM queue_retry('q', 1, delay => '0')");
        assert_eq!(column("SELECT delivery_count FROM queue.q"), [json!(1)]);
        assert_eq!(number("SELECT delivery_count FROM queue_read('q')"), 2);
    }

    #[pg_test]
    fn extend_undone_keeps_what_it_lengthened() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        // Of a few attempts one comes before the lease has ended.
        run("CREATE TEMP TABLE extended (lease_id bigint)");
        run("DO $$ DECLARE lease bigint; BEGIN FOR i IN 1..5 LOOP \
            SELECT lease_id INTO STRICT lease \
            FROM queue_read('q', visibility_timeout => '300 ms', wait => '10 s'); \
            BEGIN \
                IF queue_extend('q', 1, lease, '1 h') IS NOT NULL THEN \
                    RAISE EXCEPTION USING ERRCODE = 'UNDO1'; \
                END IF; \
            EXCEPTION WHEN SQLSTATE 'UNDO1' THEN INSERT INTO extended VALUES (lease); EXIT; \
            END; END LOOP; END $$");
        let lease = number("SELECT lease_id FROM extended");
        assert_eq!(number("SELECT count(*) FROM pg_sleep(0.4), queue_read('q')"), 0);
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn extend_undone_forgets_what_it_shortened() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q', visibility_timeout => '1 h')");
        undone(&format!("ASSERT queue_extend('q', 1, {lease}, '1 ms') IS NOT NULL;"));
        assert_eq!(number("SELECT count(*) FROM pg_sleep(0.01), queue_read('q')"), 0);
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn create_undone_leaves_no_queue_and_the_name_free() {
        undone(
            "PERFORM queue_create('q', max_deliveries => 1); PERFORM queue_send('q', '1'); \
            ASSERT (SELECT count(*) FROM queue_read('q')) = 1;",
        );
        fails("SELECT queue_send('q', '1')").is_unknown_queue("q");
        fails("SELECT * FROM queue_read('q')").is_unknown_queue("q");
        assert_eq!(number("SELECT count(*) FROM queue_list()"), 0);
        run("SELECT queue_create('q')");
        assert_eq!(number("SELECT queue_send('q', '2')"), 1);
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(2)]);
    }

    #[pg_test]
    fn everything_in_one_savepoint_undone_leaves_what_was() {
        run("SELECT queue_create('q', retry_jitter => 0)");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3,4,5}')");
        run("SELECT * FROM queue_read('q', 2)");
        let before = rows("SELECT * FROM queue.q ORDER BY msg_id");
        undone(
            "PERFORM queue_delete('q', 1); \
            BEGIN PERFORM * FROM queue_retry('q', 2, delay => '1 h'); PERFORM * FROM queue_read('q', 2); \
            EXCEPTION WHEN division_by_zero THEN NULL; END; \
            PERFORM queue_archive('q', 3); \
            BEGIN PERFORM queue_reject('q', 4); PERFORM 1/0; EXCEPTION WHEN division_by_zero THEN NULL; END; \
            PERFORM queue_send('q', '6'); PERFORM queue_purge('q');",
        );
        assert_eq!(rows("SELECT * FROM queue.q ORDER BY msg_id"), before);
        assert_eq!(read(9), [json!(3), json!(4), json!(5)]);
        assert_eq!(column("SELECT queue_delete_batch('q', '{1,2,3,4,5}')").len(), 5);
    }

    #[pg_test]
    fn many_savepoints_in_a_loop_keep_what_was_kept() {
        run("SELECT queue_create('q')");
        run("DO $$ BEGIN FOR i IN 1..200 LOOP BEGIN PERFORM queue_send('q', to_jsonb(i)); \
            IF i % 2 = 0 THEN PERFORM 1/0; END IF; EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$");
        assert!(is(
            "(SELECT count(*) = 100 AND bool_and((message #>> '{}')::int % 2 = 1) FROM queue_read('q', 300))"
        ));
    }
}
