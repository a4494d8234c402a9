//! A queue's name is its table's name: kept as given, never truncated, never built into SQL text.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    /// Puts a name through every verb.
    fn exercise(name: &str) {
        let q = format!("'{}'", name.replace('\'', "''"));
        let dead = "'dead-letters'";
        run(&format!("SELECT queue_create({dead}, if_not_exists => true)"));
        assert!(is(&format!("queue_create({q}, dead_letter_queue => {dead})")), "{name}");
        assert_eq!(number(&format!("SELECT queue_send({q}, '1')")), 1);
        assert_eq!(column(&format!("SELECT * FROM queue_send_batch({q}, '{{2,3}}')")), [json!(2), json!(3)]);
        assert_eq!(column(&format!("SELECT queue_send_entries({q}, '[{{\"message\": 4}}]')")), [json!(4)]);
        assert_eq!(column(&format!("SELECT msg_id FROM queue_read({q})")), [json!(1)]);
        assert_eq!(
            rows(&format!("SELECT queue, msg_id FROM queue_read_any(ARRAY[{q}])")),
            [json!({"queue": name, "msg_id": 2})]
        );
        assert_eq!(column(&format!("SELECT msg_id FROM queue_pop({q})")), [json!(3)]);
        assert_eq!(column(&format!("SELECT msg_id FROM queue_peek({q})")), [json!(1), json!(2), json!(4)]);
        assert_eq!(value(&format!("SELECT outcome FROM queue_retry({q}, 1, delay => '0')")), json!("retried"));
        assert!(is(&format!("queue_extend({q}, 2) > now()")));
        assert_eq!(value(&format!("SELECT queue_reject({q}, 2)")), json!("dead_lettered"));
        assert_eq!(
            value("SELECT headers #>> '{dead_letter,queue}' FROM queue_pop('dead-letters')"),
            json!(name)
        );
        assert!(is(&format!("queue_archive({q}, 1)")));
        assert!(is(&format!("queue_cancel({q}, 4)")));
        assert_eq!(number(&format!("SELECT queue_purge({q})")), 0);
        assert!(is(&format!("queue_alter({q}, max_deliveries => 1)")));
        assert!(is(&format!("queue_pause({q}) AND queue_resume({q})")));
        assert!(is(&format!("queue_grant({q}, 'public', 'admin') AND queue_revoke({q}, 'public', 'admin')")));
        let listed = format!("SELECT count(*) FROM queue_list() WHERE queue = {q} AND max_deliveries = 1");
        assert_eq!(number(&listed), 1);
        let failure = fails(&format!("SELECT queue_drop({q})"));
        failure.is(
            "55006",
            &format!("queue \"{name}\" or its archive still holds messages"),
            "",
            "Use queue_drop(queue, force => true) to drop them too.",
        );
        assert!(is(&format!("queue_drop({q}, true)")));
        let left = format!("SELECT count(*) FROM pg_class WHERE relname = {q} AND relkind = 'r'");
        assert_eq!(number(&left), 0, "{name}");
    }

    #[pg_test]
    fn name_of_one_byte_works() {
        exercise("q");
    }

    #[pg_test]
    fn name_of_63_bytes_works() {
        exercise(&"x".repeat(63));
    }

    #[pg_test]
    fn name_of_63_bytes_in_many_byte_characters_works() {
        exercise(&"é".repeat(31));
        exercise(&format!("{}x", "é".repeat(31)));
    }

    #[pg_test]
    fn name_full_of_quotes_works() {
        exercise("\"; DROP SCHEMA queue CASCADE; --");
        exercise("'); SELECT 1/0; --");
        exercise("\"\"''$$\\'\\\"");
        exercise("$sq$ %s %I :name ?");
    }

    #[pg_test]
    fn name_of_spaces_dots_and_keywords_works() {
        exercise(" ");
        exercise("queue.a");
        exercise("select");
        exercise("a\tb\nc");
    }

    #[pg_test]
    fn name_of_a_helper_relation_is_not_taken() {
        run("SELECT queue_create('queue_due_1')");
        run("SELECT queue_create('q_msg_id_seq')");
        run("SELECT queue_create('q_pkey')");
        exercise("q");
    }

    #[pg_test]
    fn names_that_differ_in_case_are_two_queues() {
        run("SELECT queue_create('Foo')");
        run("SELECT queue_create('foo')");
        assert_eq!(number("SELECT queue_send('Foo', '\"upper\"')"), 1);
        assert_eq!(number("SELECT queue_send('foo', '\"lower\"')"), 1);
        assert_eq!(column("SELECT message FROM queue_read('foo', 10)"), [json!("lower")]);
        assert_eq!(column("SELECT message FROM queue_read('Foo', 10)"), [json!("upper")]);
        fails("SELECT queue_send('FOO', '1')").is_unknown_queue("FOO");
    }

    #[pg_test]
    fn names_of_63_bytes_that_differ_in_the_last_are_two_queues() {
        let (a, b) = (format!("{}a", "x".repeat(62)), format!("{}b", "x".repeat(62)));
        run(&format!("SELECT queue_create('{a}'), queue_create('{b}')"));
        run(&format!("SELECT queue_send('{a}', '1'), queue_send('{b}', '2')"));
        assert_eq!(column(&format!("SELECT message FROM queue_read('{a}', 9)")), [json!(1)]);
        assert_eq!(column(&format!("SELECT message FROM queue_read('{b}', 9)")), [json!(2)]);
        let channels = column("SELECT channel FROM queue_list()");
        assert_ne!(channels[0], channels[1]);
        assert!(channels.iter().all(|c| c.as_str().is_some_and(|c| c.len() <= 63 && c.starts_with("queue_"))));
    }

    #[pg_test]
    fn name_of_57_bytes_has_a_readable_channel_and_a_longer_one_a_hash() {
        run(&format!("SELECT queue_create('{}'), queue_create('{}')", "x".repeat(57), "y".repeat(58)));
        let channels = column("SELECT channel FROM queue_list()");
        assert_eq!(channels[0], json!(format!("queue_{}", "x".repeat(57))));
        assert!(channels[1].as_str().is_some_and(|c| c.len() == "queue_".len() + 16 && !c.contains('y')));
    }

    #[pg_test]
    fn name_that_is_empty_is_refused() {
        fails("SELECT queue_create('')").is("42602", "invalid queue name \"\"", "It is empty.", "");
        fails("SELECT queue_send('', '1')").is_unknown_queue("");
    }

    #[pg_test]
    fn name_of_64_bytes_is_refused_and_not_truncated() {
        let long = "x".repeat(64);
        run(&format!("SELECT queue_create('{}')", &long[..63]));
        fails(&format!("SELECT queue_create('{long}')")).is(
            "42602",
            &format!("invalid queue name \"{long}\""),
            "A queue's name is its table's name: it has at most 63 bytes.",
            "",
        );
        fails(&format!("SELECT queue_create('{long}', if_not_exists => true)"))
            .says("42602", "invalid queue name");
        fails(&format!("SELECT queue_send('{long}', '1')")).is_unknown_queue(&long);
        fails(&format!("SELECT * FROM queue_read('{long}')")).is_unknown_queue(&long);
        assert!(!is(&format!("queue_drop('{long}')")));
        fails(&format!("SELECT queue_create('{}')", "é".repeat(32))).says("42602", "invalid queue name");
    }

    #[pg_test]
    fn rename_of_the_table_renames_the_queue() {
        run("SELECT queue_create('a', max_deliveries => 3)");
        run("SELECT queue_send('a', '1')");
        assert_eq!(column("SELECT msg_id FROM queue_read('a')"), [json!(1)]);
        run("ALTER TABLE queue.a RENAME TO b");
        fails("SELECT queue_send('a', '1')").is_unknown_queue("a");
        assert_eq!(
            rows("SELECT queue, max_deliveries FROM queue_list()"),
            [json!({"queue": "b", "max_deliveries": 3})]
        );
        assert_eq!(number("SELECT queue_send('b', '2')"), 2);
        assert!(is("queue_archive('b', 1)"));
        assert_eq!(column("SELECT msg_id FROM queue_read('b')"), [json!(2)]);
        assert_eq!(value("SELECT queue_reject('b', 2)"), json!("archived"));
        assert!(is("queue_drop('b', true)"));
    }

    #[pg_test]
    fn rename_of_the_table_frees_the_name_for_another_queue() {
        run("SELECT queue_create('a')");
        run("SELECT queue_send('a', '1')");
        run("ALTER TABLE queue.a RENAME TO b");
        assert!(is("queue_create('a')"));
        run("SELECT queue_send('a', '\"new\"')");
        assert_eq!(column("SELECT message FROM queue_read('a', 9)"), [json!("new")]);
        assert_eq!(column("SELECT message FROM queue_read('b', 9)"), [json!(1)]);
        assert!(is("queue_archive('a', 1) AND queue_archive('b', 1)"));
    }

    #[pg_test]
    fn rename_of_a_dead_letter_queue_is_followed() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', dead_letter_queue => 'dead')");
        run("ALTER TABLE queue.dead RENAME TO buried");
        assert_eq!(column("SELECT dead_letter_queue FROM queue_list() WHERE queue = 'q'"), [json!("buried")]);
        run("SELECT queue_send('q', '1')");
        assert_eq!(value("SELECT queue_reject('q', 1)"), json!("dead_lettered"));
        assert_eq!(column("SELECT message FROM queue_read('buried')"), [json!(1)]);
    }

    #[pg_test]
    fn rename_undone_leaves_the_name() {
        run("SELECT queue_create('a')");
        run("SELECT queue_send('a', '1')");
        undone("ALTER TABLE queue.a RENAME TO b; PERFORM queue_send('b', '2');");
        fails("SELECT queue_send('b', '3')").is_unknown_queue("b");
        assert_eq!(column("SELECT message FROM queue_read('a', 9)"), [json!(1)]);
    }
}
