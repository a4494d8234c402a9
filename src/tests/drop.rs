//! queue_drop and queue_purge.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    #[pg_test]
    fn drop_of_what_is_not_there_gives_false() {
        assert!(!is("queue_drop('q')"));
        assert!(!is("queue_drop('q', true)"));
    }

    #[pg_test]
    fn drop_of_an_empty_queue_removes_everything() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1'), queue_delete('q', 1)");
        assert!(is("queue_drop('q')"));
        assert!(is("to_regclass('queue.q') IS NULL AND to_regclass('queue_archive.q') IS NULL"));
        assert_eq!(number("SELECT count(*) FROM queue_list()"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_catalog.queue"), 0);
        fails("SELECT queue_send('q', '1')").is_unknown_queue("q");
        fails("SELECT * FROM queue_read('q')").is_unknown_queue("q");
        assert!(!is("queue_drop('q')"));
    }

    #[pg_test]
    fn drop_of_a_queue_with_messages_wants_force() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        let (message, hint) = (
            "queue \"q\" or its archive still holds messages",
            "Use queue_drop(queue, force => true) to drop them too.",
        );
        fails("SELECT queue_drop('q')").is("55006", message, "", hint);
        fails("SELECT queue_drop('q', NULL)").is("55006", message, "", hint);
        run("SELECT queue_archive('q', 1)");
        fails("SELECT queue_drop('q')").is("55006", message, "", hint);
        assert!(is("queue_drop('q', force => true)"));
        assert!(is("to_regclass('queue.q') IS NULL AND to_regclass('queue_archive.q') IS NULL"));
    }

    #[pg_test]
    fn drop_of_a_dead_letter_queue_wants_force_and_leaves_the_archive() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', dead_letter_queue => 'dead')");
        fails("SELECT queue_drop('dead')").is(
            "55006",
            "queue \"dead\" is the dead-letter queue of \"q\"",
            "",
            "Give that queue another one with queue_alter, or use force => true.",
        );
        run("SELECT queue_send('q', '1')");
        assert!(is("queue_drop('dead', true)"));
        assert_eq!(column("SELECT dead_letter_queue FROM queue_list()"), [json!("")]);
        assert_eq!(value("SELECT queue_reject('q', 1)"), json!("archived"));
    }

    #[pg_test]
    fn drop_of_the_table_by_plain_sql_drops_the_queue() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("DROP TABLE queue.q");
        fails("SELECT queue_send('q', '1')").is_unknown_queue("q");
        assert_eq!(number("SELECT count(*) FROM queue_list()"), 0);
    }

    #[pg_test]
    fn drop_then_create_starts_anew() {
        run("SELECT queue_create('q', require_lease => true)");
        run("SELECT queue_send('q', '\"old\"')");
        run("SELECT queue_drop('q', true)");
        run("SELECT queue_create('q')");
        assert_eq!(number("SELECT queue_send('q', '\"new\"')"), 1);
        assert_eq!(column("SELECT message FROM queue_read('q', 5)"), [json!("new")]);
        assert!(is("queue_delete('q', 1)"), "no lease is required any more");
    }

    #[pg_test]
    fn drop_undone_leaves_the_queue() {
        run("SELECT queue_create('q', max_deliveries => 3)");
        run("SELECT queue_send('q', '1')");
        undone("PERFORM queue_drop('q', true);");
        assert_eq!(column("SELECT max_deliveries FROM queue_list()"), [json!(3)]);
        assert_eq!(number("SELECT queue_send('q', '2')"), 2);
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 5)"), [json!(1), json!(2)]);
    }

    #[pg_test]
    fn purge_deletes_every_message_in_flight_included() {
        run("SELECT queue_create('q')");
        run("SELECT queue_create('other')");
        run("SELECT queue_send('other', '1')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3,4}')");
        run("SELECT queue_send('q', '5', delay => '1 h')");
        run("SELECT queue_archive('q', 1)");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        assert_eq!(number("SELECT queue_purge('q')"), 4);
        assert_eq!(number("SELECT queue_purge('q')"), 0);
        assert!(!is(&format!("queue_delete('q', 2, {lease})")));
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 10)"), 0);
        assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 1, "the archive is not the queue");
        assert_eq!(number("SELECT count(*) FROM queue_read('other', 10)"), 1);
        assert_eq!(number("SELECT queue_send('q', '6')"), 6);
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 10)"), [json!(6)]);
    }

    #[pg_test]
    fn purge_undone_leaves_the_messages() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        undone("PERFORM queue_purge('q');");
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 5)"), [json!(1), json!(2)]);
    }

    /// As it would be dumped.
    const REFERENCES: &str =
        "SELECT archive::text AS a, dead_letter_queue::text AS d FROM queue_catalog.queue \
        WHERE queue = 'queue.q'::regclass";

    #[pg_test]
    fn drop_by_plain_sql_of_what_a_queue_refers_to_leaves_no_number_behind() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', dead_letter_queue => 'dead')");
        let before = rows(REFERENCES);
        assert_eq!(before, [json!({"a": "queue_archive.q", "d": "queue.dead"})]);
        undone("DROP TABLE queue.dead, queue_archive.q;");
        assert_eq!(rows(REFERENCES), before);
        run("DROP TABLE queue.dead");
        assert_eq!(rows(REFERENCES), [json!({"a": "queue_archive.q", "d": null})]);
        run("DROP TABLE queue_archive.q");
        assert_eq!(rows(REFERENCES), [json!({"a": "-", "d": null})]);
        run("SELECT queue_create('p')");
        run("DROP TABLE queue_archive.p");
        assert_eq!(number("SELECT count(*) FROM queue_catalog.queue WHERE archive = 0"), 2);
        assert!(is("queue_grant('q', 'public', 'admin')"), "of what is left");
        assert!(is("queue_drop('q') AND queue_drop('p')"));
    }

    #[pg_test]
    fn drop_of_the_extension_with_queues_that_refer_to_each_other_works() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', dead_letter_queue => 'dead')");
        undone("DROP EXTENSION pg_queue CASCADE;");
        assert!(is("queue_drop('q') AND queue_drop('dead')"));
    }

    #[pg_test]
    fn drop_heeds_what_row_security_hides() {
        make_role("somebody");
        run("GRANT CREATE ON SCHEMA queue TO somebody");
        as_role("somebody", || {
            run("SELECT queue_create('q')");
            run("SELECT queue_send('q', '1')");
            run("ALTER TABLE queue.q ENABLE ROW LEVEL SECURITY");
            run("ALTER TABLE queue.q FORCE ROW LEVEL SECURITY");
            assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
            assert_eq!(fails("SELECT queue_drop('q')").sqlstate, "55006");
            run("TRUNCATE queue.q");
            run("INSERT INTO queue_archive.q (msg_id, message) VALUES (1, '1')");
            assert_eq!(fails("SELECT queue_drop('q')").sqlstate, "55006", "the archive");
            run("TRUNCATE queue_archive.q");
            assert!(is("queue_drop('q')"));
        });
    }

    #[pg_test]
    fn purge_of_an_unknown_queue_is_refused() {
        fails("SELECT queue_purge('q')").is_unknown_queue("q");
    }

    #[pg_test]
    fn drop_of_the_archive_by_plain_sql_is_told() {
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        run("DROP TABLE queue_archive.q");
        for call in ["queue_archive('q', 1)", "queue_reject('q', 1)"] {
            let failure = fails(&format!("SELECT {call}"));
            failure.is("55000", "table of queue \"q\" is not intact", "Its archive is missing.", "");
        }
        assert_eq!(column("SELECT msg_id FROM queue_read('q')"), [json!(1)]);
        assert!(is("queue_delete('q', 1)"));
        assert!(is("queue_drop('q')"));
    }
}
