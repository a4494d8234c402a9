//! Plain SQL on a queue's table is noticed: INSERT, UPDATE, DELETE, TRUNCATE.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    fn read(quantity: i64) -> Vec<serde_json::Value> {
        column(&format!("SELECT msg_id FROM queue_read('q', {quantity})"))
    }

    #[pg_test]
    fn insert_is_a_send() {
        run("SELECT queue_create('q')");
        run("INSERT INTO queue.q (message, headers) VALUES ('1', '{\"h\": 1}'), ('2', NULL)");
        run("INSERT INTO queue.q (message, visible_at) VALUES ('3', now() + '1 h')");
        assert_eq!(
            rows("SELECT msg_id, message, headers FROM queue_read('q', 9)"),
            [
                json!({"msg_id": 1, "message": 1, "headers": {"h": 1}}),
                json!({"msg_id": 2, "message": 2, "headers": null}),
            ]
        );
        assert!(is("queue_delete('q', 1) AND queue_archive('q', 2) AND queue_cancel('q', 3)"));
    }

    #[pg_test]
    fn insert_with_a_count_goes_on_counting() {
        run("SELECT queue_create('q')");
        run("INSERT INTO queue.q (msg_id, message, delivery_count, last_error) VALUES (100, '1', 7, 'before')");
        assert_eq!(
            rows("SELECT msg_id, delivery_count, last_error FROM queue_read('q')"),
            [json!({"msg_id": 100, "delivery_count": 8, "last_error": "before"})]
        );
    }

    #[pg_test]
    fn insert_with_ids_of_ones_own_is_read_in_their_order() {
        run("SELECT queue_create('q')");
        run("INSERT INTO queue.q (msg_id, message) VALUES (5, '5'), (-3, '-3'), (4, '4')");
        assert_eq!(read(9), [json!(-3), json!(4), json!(5)]);
    }

    #[pg_test]
    fn insert_undone_is_never_read() {
        run("SELECT queue_create('q')");
        undone("INSERT INTO queue.q (message) VALUES ('1');");
        run("INSERT INTO queue.q (message) VALUES ('2')");
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(2)]);
    }

    #[pg_test]
    fn insert_on_conflict_sends_once() {
        run("SELECT queue_create('q')");
        run("INSERT INTO queue.q (msg_id, message) VALUES (1, '1')");
        run("INSERT INTO queue.q (msg_id, message) VALUES (1, '2') ON CONFLICT (msg_id) DO UPDATE SET message = '3'");
        run("INSERT INTO queue.q (msg_id, message) VALUES (1, '4') ON CONFLICT DO NOTHING");
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(3)]);
    }

    #[pg_test]
    fn update_of_the_message_is_delivered() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("UPDATE queue.q SET message = '2'");
        assert_eq!(column("SELECT message FROM queue_read('q')"), [json!(2)]);
        run("UPDATE queue.q SET message = '3'");
        assert!(is("queue_archive('q', 1)"));
        assert_eq!(
            rows("SELECT message, delivery_count FROM queue_archive.q"),
            [json!({"message": 3, "delivery_count": 1})]
        );
    }

    #[pg_test]
    fn update_of_a_leased_message_keeps_the_lease_and_the_count() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        run("UPDATE queue.q SET headers = '{\"seen\": true}'");
        assert_eq!(read(1), Vec::<serde_json::Value>::new());
        assert_eq!(
            value(&format!("SELECT outcome FROM queue_retry('q', 1, {lease}, delay => '0')")),
            json!("retried")
        );
        assert_eq!(number("SELECT delivery_count FROM queue_read('q')"), 2);
    }

    #[pg_test]
    fn update_of_the_time_moves_the_message() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1'), queue_send('q', '2', delay => '1 h')");
        run("UPDATE queue.q SET visible_at = CASE msg_id WHEN 1 THEN now() + '1 h' END");
        assert_eq!(read(9), [json!(2)]);
    }

    #[pg_test]
    fn update_undone_leaves_the_message_where_it_was() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        undone("UPDATE queue.q SET visible_at = now() + '1 h';");
        assert_eq!(read(1), [json!(1)], "its row is due at once");
    }

    #[pg_test]
    fn update_undone_of_a_leased_message_leaves_its_count() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        undone("UPDATE queue.q SET message = '2', visible_at = now() + '1 h';");
        run("SELECT queue_release('q', '{1}')");
        assert_eq!(
            rows("SELECT message, delivery_count FROM queue_read('q')"),
            [json!({"message": 1, "delivery_count": 1})]
        );
    }

    #[pg_test]
    fn update_of_the_id_moves_the_message() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("UPDATE queue.q SET msg_id = 10");
        assert_eq!(read(9), [json!(10)]);
        assert!(!is("queue_delete('q', 1)"));
        assert!(is("queue_delete('q', 10)"));
    }

    #[pg_test]
    fn delete_is_noticed() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        run("DELETE FROM queue.q WHERE msg_id <= 2");
        assert!(!is(&format!("queue_delete('q', 1, {lease})")));
        assert_eq!(value("SELECT outcome FROM queue_retry('q', 1)"), json!("lost"));
        assert_eq!(read(9), [json!(3)]);
    }

    #[pg_test]
    fn delete_undone_is_noticed() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        undone("DELETE FROM queue.q; ASSERT (SELECT count(*) FROM queue_read('q')) = 0;");
        assert_eq!(read(9), [json!(1), json!(2)]);
    }

    #[pg_test]
    fn truncate_leaves_only_what_came_after() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        run("TRUNCATE queue.q");
        assert!(!is(&format!("queue_delete('q', 1, {lease})")));
        assert_eq!(read(9), Vec::<serde_json::Value>::new());
        assert_eq!(number("SELECT queue_send('q', '3')"), 3);
        assert_eq!(read(9), [json!(3)]);
    }

    #[pg_test]
    fn truncate_restarting_identity_reuses_ids() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '\"old\"')");
        run("TRUNCATE queue.q RESTART IDENTITY");
        assert_eq!(number("SELECT queue_send('q', '\"new\"')"), 1);
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!("new")]);
        assert!(is("queue_delete('q', 1)"));
    }

    #[pg_test]
    fn truncate_undone_leaves_the_messages() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        undone("TRUNCATE queue.q;");
        assert_eq!(read(9), [json!(1), json!(2)]);
    }

    #[pg_test]
    fn trigger_function_on_a_table_that_is_no_queue_is_refused() {
        run("CREATE TABLE t (x int)");
        run("CREATE TRIGGER t AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION queue.on_change()");
        fails("INSERT INTO t VALUES (1)").is(
            "0A000",
            "this trigger belongs on tables that queue_create made",
            "",
            "",
        );
        fails("SELECT queue.on_change()").says("0A000", "trigger");
    }
}
