//! Bringing messages back: queue_redrive and queue_unarchive.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::{json, Value};

    /// Queues `q` and `other`, whose dead letters go to `dead`.
    fn set_up() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q', dead_letter_queue => 'dead')");
        run("SELECT queue_create('other', dead_letter_queue => 'dead')");
    }

    /// Sends messages and has them dead-lettered, in this order.
    fn bury(queue: &str, messages: &[&str]) {
        for message in messages {
            run(&format!(
                "SELECT queue_reject('{queue}', id, error => 'bad') FROM queue_send('{queue}', '{message}') AS id"
            ));
        }
    }

    fn messages(queue: &str) -> Vec<Value> {
        column(&format!("SELECT message FROM queue.{queue} ORDER BY msg_id"))
    }

    fn redrive(args: &str) -> i64 {
        number(&format!("SELECT queue_redrive('dead'{args})"))
    }

    fn unarchive(args: &str) -> i64 {
        number(&format!("SELECT queue_unarchive('q'{args})"))
    }

    // ---- dead letters ----------------------------------------------------------------------------------------

    #[pg_test]
    fn redrive_brings_a_message_back_as_it_was() {
        set_up();
        run("INSERT INTO queue.q (message, headers, priority, group_key) VALUES ('{\"a\": 1}', '{\"h\": 1}', 7, 'g')");
        run("SELECT * FROM queue_read('q')");
        run("SELECT queue_reject('q', 1, error => 'bad')");
        run("UPDATE queue.dead SET visible_at = NULL, delivery_count = 3");
        assert_eq!(redrive(""), 1);
        assert_eq!(
            rows("SELECT * FROM queue.q"),
            rows(
                "SELECT 2::bigint AS msg_id, enqueued_at, NULL::timestamptz AS visible_at, 0 AS delivery_count, \
                7::smallint AS priority, 'g' AS group_key, '{\"h\": 1}'::jsonb AS headers, \
                '{\"a\": 1}'::jsonb AS message, NULL::text AS last_error, \
                NULL::timestamptz AS expires_at FROM queue.q"
            )
        );
        assert_eq!(number("SELECT count(*) FROM queue.dead"), 0);
        assert_eq!(number("SELECT delivery_count FROM queue_read('q')"), 1, "deliverable");
        assert_eq!(number("SELECT count(*) FROM queue_read('dead')"), 0);
        assert_eq!(redrive(""), 0);
    }

    #[pg_test]
    fn redrive_takes_each_to_where_it_came_from_in_order() {
        set_up();
        bury("q", &["1", "2"]);
        bury("other", &["3"]);
        bury("q", &["4"]);
        bury("other", &["5"]);
        assert_eq!(redrive(""), 5);
        assert_eq!(messages("q"), [1, 2, 4]);
        assert_eq!(messages("other"), [3, 5]);
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(1), json!(2), json!(4)]);
    }

    #[pg_test]
    fn redrive_takes_only_what_is_asked_for() {
        set_up();
        bury("q", &["1", "2", "3"]);
        bury("other", &["4", "5", "6"]);
        assert_eq!(redrive(", 1"), 1);
        assert_eq!(messages("q"), [1], "the first");
        assert_eq!(redrive(", source => 'other', quantity => 2"), 2);
        assert_eq!(messages("other"), [4, 5]);
        assert_eq!(redrive(", msg_ids => '{6,3,3,99,-1}'"), 2);
        assert_eq!(
            (messages("q"), messages("other")),
            (vec![json!(1), json!(3)], vec![json!(4), json!(5), json!(6)])
        );
        assert_eq!(redrive(", msg_ids => '{}'"), 0);
        assert_eq!(redrive(", msg_ids => '{2}', source => 'other'"), 0);
        assert_eq!(redrive(", NULL, NULL, NULL, NULL"), 1);
        assert_eq!(number("SELECT count(*) FROM queue.dead"), 0);
    }

    #[pg_test]
    fn redrive_of_given_ids_takes_the_lowest_first() {
        set_up();
        bury("q", &["1", "2", "3", "4"]);
        run("SELECT * FROM queue_read('dead')");
        assert_eq!(redrive(", 2, msg_ids => '{4,3,2,1}'"), 2);
        assert_eq!(messages("q"), [2, 3], "the first is leased");
    }

    #[pg_test]
    fn redrive_of_many_goes_in_chunks() {
        set_up();
        run("SELECT * FROM queue_send_batch('q', array(SELECT to_jsonb(n) FROM generate_series(1, 700) n))");
        run("SELECT queue_reject('q', n) FROM generate_series(1, 700) n");
        run("SELECT * FROM queue_read('dead', 300)");
        assert_eq!(redrive(", 301"), 301);
        assert_eq!(messages("q"), (301..=601).collect::<Vec<i64>>());
        assert_eq!(redrive(", msg_ids => array(SELECT n FROM generate_series(1, 2000) n)"), 99);
        assert_eq!(messages("q"), (301..=700).collect::<Vec<i64>>());
        assert_eq!(number("SELECT count(*) FROM queue.dead"), 300);
    }

    #[pg_test]
    fn redrive_to_a_target_takes_all_there() {
        set_up();
        run("SELECT queue_create('third')");
        bury("q", &["1"]);
        bury("other", &["2"]);
        run("SELECT queue_send('dead', '3', '{\"h\": 1}'), queue_send('dead', '4')");
        assert_eq!(redrive(", target => 'third', source => 'other'"), 1);
        assert_eq!(redrive(", target => 'third'"), 3);
        assert_eq!(
            rows("SELECT message, headers FROM queue.third ORDER BY msg_id"),
            [
                json!({"message": 2, "headers": null}),
                json!({"message": 1, "headers": null}),
                json!({"message": 3, "headers": {"h": 1}}),
                json!({"message": 4, "headers": null}),
            ]
        );
        assert_eq!((messages("q").len(), messages("other").len()), (0, 0));
    }

    #[pg_test]
    fn redrive_leaves_what_is_no_dead_letter() {
        set_up();
        for headers in [
            "NULL",
            "'null'",
            "'[\"dead_letter\"]'",
            "'\"dead_letter\"'",
            "'{\"dead_letter\": 1}'",
            "'{\"dead_letter\": {\"queue\": 1}}'",
            "'{\"dead_letter\": {\"queue\": null}}'",
            "'{\"dead_letter\": {\"queue\": \"dead\"}}'",
        ] {
            run(&format!("SELECT queue_send('dead', '1', {headers})"));
        }
        assert_eq!(redrive(""), 0);
        assert_eq!(redrive(", source => 'dead'"), 0, "nowhere else to go");
        assert_eq!(number("SELECT count(*) FROM queue_read('dead', 9)"), 8);
    }

    #[pg_test]
    fn redrive_leaves_what_is_leased() {
        set_up();
        bury("q", &["1", "2", "3"]);
        assert_eq!(number("SELECT count(*) FROM queue_read('dead')"), 1);
        assert_eq!(redrive(""), 2);
        assert_eq!(messages("q"), [2, 3]);
        run("SELECT * FROM queue_release('dead', '{1}')");
        assert_eq!(redrive(""), 1);
        assert_eq!(messages("q"), [2, 3, 1]);
    }

    #[pg_test]
    fn redrive_takes_what_is_delayed() {
        set_up();
        bury("q", &["1"]);
        run("SELECT * FROM queue_read('dead')");
        run("SELECT * FROM queue_retry('dead', 1, delay => '1 h')");
        assert_eq!(redrive(""), 1);
        assert_eq!(number("SELECT message FROM queue_read('q')"), 1, "at once");
    }

    #[pg_test]
    fn redrive_undone_leaves_everything_as_it_was() {
        set_up();
        bury("q", &["1", "2"]);
        let before = rows("SELECT * FROM queue.dead ORDER BY msg_id");
        undone("PERFORM queue_redrive('dead', 1);");
        assert_eq!(rows("SELECT * FROM queue.dead ORDER BY msg_id"), before);
        assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 0);
        assert_eq!(redrive(""), 2);
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(1), json!(2)]);
    }

    #[pg_test]
    fn redrive_gives_back_the_headers_that_were() {
        set_up();
        let all = [
            Value::Null,
            json!({}),
            json!({"h": 1}),
            json!({"headers": {"h": 1}}),
            json!({"h": 1, "dead_letter": {"queue": "q", "msg_id": 5}}),
            json!({"dead_letter": 1}),
            json!({"dead_letter": null, "headers": []}),
            json!([]),
            json!([1, {"dead_letter": 2}]),
            json!("text"),
            json!(1.5),
            json!(false),
        ];
        run("SELECT queue_send('q', '\"sql null\"')");
        for headers in &all {
            run(&format!("SELECT queue_send('q', '1', '{headers}')"));
        }
        run("SELECT queue_reject('q', n) FROM generate_series(1, 13) n");
        let dead: Vec<Value> =
            column("SELECT headers - '{dead_letter}'::text[] FROM queue.dead ORDER BY msg_id");
        assert_eq!(dead[3], json!({"h": 1}), "keys stay where they are");
        assert_eq!(dead[5], json!({"h": 1}));
        assert!(dead.iter().all(Value::is_object));
        assert!(is("(SELECT bool_and(headers #>> '{dead_letter,queue}' = 'q') FROM queue.dead)"));
        // Twice dead: the way back leads over the first dead-letter queue.
        run("SELECT queue_create('end')");
        run("SELECT queue_alter('dead', dead_letter_queue => 'end')");
        run("SELECT queue_reject('dead', n) FROM generate_series(1, 13) n");
        assert_eq!(number("SELECT queue_redrive('end')"), 13);
        assert_eq!(redrive(""), 13);
        assert_eq!(number("SELECT count(*) FROM queue.q WHERE headers IS NULL"), 1, "SQL null");
        let headers = column("SELECT headers FROM queue.q WHERE headers IS NOT NULL ORDER BY msg_id");
        assert_eq!(headers, all);
    }

    #[pg_test]
    fn redrive_with_bad_arguments_is_refused() {
        set_up();
        bury("q", &["1"]);
        fails("SELECT queue_redrive(NULL)").is_null("dead_letter_queue");
        fails("SELECT queue_redrive('dead', msg_ids => '{1,NULL}')").is_null("msg_ids");
        for quantity in ["0", "-1"] {
            let allowed = "1 to 9223372036854775807";
            fails(&format!("SELECT queue_redrive('dead', {quantity})"))
                .is_out_of_range("quantity", quantity, allowed);
            fails(&format!("SELECT queue_unarchive('q', {quantity})"))
                .is_out_of_range("quantity", quantity, allowed);
        }
        fails("SELECT queue_redrive('dead', msg_ids => '{{1},{2}}')").says("22023", "one-dimensional");
        fails("SELECT queue_redrive('dead', target => 'dead')").is(
            "22023",
            "messages of queue \"dead\" cannot be moved to the same queue",
            "",
            "Give another queue as target.",
        );
        fails("SELECT queue_redrive('none')").is_unknown_queue("none");
        fails("SELECT queue_redrive('dead', target => 'none')").is_unknown_queue("none");
        assert_eq!(number("SELECT count(*) FROM queue.dead"), 1);
    }

    #[pg_test]
    fn redrive_to_a_queue_that_is_gone_names_it_and_moves_nothing() {
        set_up();
        bury("q", &["1"]);
        bury("other", &["2"]);
        run("SELECT queue_drop('other', true)");
        let gone = |args: &str, name: &str| {
            let message = format!("queue \"{name}\" does not exist");
            fails(&format!("SELECT queue_redrive('dead'{args})")).is(
                "42704",
                &message,
                "",
                "Give another queue as target.",
            );
        };
        gone("", "other");
        gone(", source => 'other'", "other");
        gone(", source => 'typo'", "typo");
        assert_eq!((messages("q").len(), messages("dead").len()), (0, 2));
        assert_eq!(redrive(", target => 'q', source => 'typo'"), 0);
        assert_eq!(redrive(", target => 'q', source => 'other'"), 1);
        assert_eq!(redrive(""), 1);
        assert_eq!(messages("q"), [2, 1]);
    }

    #[pg_test]
    fn redrive_needs_truncate_there_and_insert_here() {
        set_up();
        bury("q", &["1"]);
        bury("other", &["2"]);
        make_role("somebody");
        let needs = "TRUNCATE and SELECT on its table";
        for (half, other) in [("TRUNCATE", "SELECT"), ("SELECT", "TRUNCATE")] {
            run(&format!("GRANT {half} ON queue.dead TO somebody; REVOKE {other} ON queue.dead FROM somebody"));
            as_role("somebody", || {
                fails("SELECT queue_redrive('dead')").is_denied("redrive messages of", "dead", needs);
            });
        }
        run("GRANT TRUNCATE ON queue.dead TO somebody");
        as_role("somebody", || {
            fails("SELECT queue_redrive('dead')")
                .says("42501", "permission denied to move messages into queue \"q\"");
        });
        run("SELECT queue_grant('q', 'somebody', 'send')");
        as_role("somebody", || {
            fails("SELECT queue_redrive('dead')")
                .says("42501", "permission denied to move messages into queue \"other\"");
            assert_eq!(number("SELECT queue_redrive('dead', source => 'q')"), 1);
            assert_eq!(number("SELECT queue_redrive('dead', target => 'q')"), 1);
            assert!(is("current_user = 'somebody'"));
        });
        assert_eq!(messages("q"), [1, 2]);
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 9)"), 2);
    }

    #[pg_test]
    fn redrive_and_unarchive_are_refused_under_row_security() {
        set_up();
        make_role("somebody");
        run("SELECT queue_grant('q', 'somebody', 'admin')");
        run("ALTER TABLE queue.q ENABLE ROW LEVEL SECURITY");
        as_role("somebody", || {
            let hint = "Use a role that bypasses row-level security.";
            for (call, action) in
                [("redrive", "redrive messages of"), ("unarchive", "bring back archived messages of")]
            {
                let message = format!("cannot {action} queue \"q\" under row-level security");
                fails(&format!("SELECT queue_{call}('q')")).is("0A000", &message, "", hint);
            }
        });
    }

    #[pg_test]
    fn redrive_fires_the_triggers_of_both_tables() {
        set_up();
        bury("q", &["1", "2", "3"]);
        run("CREATE TABLE public.seen (what text, who name)");
        run("CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
            IF TG_OP = 'DELETE' AND OLD.message = '2' THEN RETURN NULL; END IF; \
            INSERT INTO public.seen VALUES (TG_OP || TG_TABLE_NAME || coalesce(NEW.message, OLD.message), current_user); \
            RETURN coalesce(NEW, OLD); END $$");
        run("CREATE TRIGGER see BEFORE DELETE ON queue.dead FOR EACH ROW EXECUTE FUNCTION see()");
        run("CREATE TRIGGER see BEFORE INSERT ON queue.q FOR EACH ROW EXECUTE FUNCTION see()");
        make_role("somebody");
        make_role("keeper");
        run("GRANT INSERT ON queue.dead TO keeper; GRANT TRUNCATE, SELECT ON queue.dead TO somebody; GRANT INSERT ON queue.q TO somebody; \
            GRANT INSERT ON public.seen TO public; GRANT CREATE ON SCHEMA queue, queue_archive TO keeper; \
            ALTER TABLE queue.q OWNER TO keeper");
        let owner = value("SELECT current_user::text");
        as_role("somebody", || assert_eq!(redrive(""), 2));
        assert_eq!((messages("q"), messages("dead")), (vec![json!(1), json!(3)], vec![json!(2)]));
        assert_eq!(
            column("SELECT what FROM public.seen"),
            ["DELETEdead1", "INSERTq1", "DELETEdead3", "INSERTq3"]
        );
        // A queue that the message names must not run its triggers as the caller.
        let keeper = json!("keeper");
        assert_eq!(
            column("SELECT who FROM public.seen"),
            [owner.clone(), keeper.clone(), owner.clone(), keeper]
        );
        bury("q", &["4"]);
        run("TRUNCATE public.seen");
        as_role("somebody", || assert_eq!(redrive(", target => 'q'"), 1));
        assert_eq!(column("SELECT who FROM public.seen"), [owner, json!("somebody")], "one that he names");
    }

    #[pg_test]
    fn message_that_its_queue_does_not_take_back_stays() {
        set_up();
        bury("q", &["1"]);
        run("SELECT queue_archive('other', queue_send('other', '1'))");
        run("CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'");
        for queue in ["q", "other"] {
            run(&format!(
                "CREATE TRIGGER drop_it BEFORE INSERT ON queue.{queue} FOR EACH ROW EXECUTE FUNCTION drop_it()"
            ));
        }
        let detail = "A trigger or a rule of its table keeps a message out that was to come back.";
        fails("SELECT queue_redrive('dead')").is("55000", "table of queue \"q\" is not intact", detail, "");
        fails("SELECT queue_unarchive('other')").is(
            "55000",
            "table of queue \"other\" is not intact",
            detail,
            "",
        );
        run("DROP TRIGGER drop_it ON queue.q; ALTER TABLE queue.q DISABLE TRIGGER pg_queue_change");
        fails("SELECT queue_redrive('dead')").says("55000", "table of queue \"q\" is not intact");
        assert_eq!(number("SELECT count(*) FROM queue.dead"), 1);
        assert_eq!(number("SELECT count(*) FROM queue_archive.other"), 1);
    }

    // ---- the archive -----------------------------------------------------------------------------------------

    /// Archives messages 1 to 5 in the order 3, 1, 2, then 5 and 4 as rejected.
    fn archived() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3,4,5}', array_fill('{\"h\": 1}'::jsonb, ARRAY[5]))");
        for id in [3, 1, 2] {
            run(&format!("SELECT queue_archive('q', {id})"));
        }
        run("SELECT queue_reject('q', 5, error => 'bad'), queue_reject('q', 4)");
    }

    #[pg_test]
    fn unarchive_brings_the_oldest_back_first() {
        archived();
        assert_eq!(unarchive(", 2"), 2);
        assert_eq!(messages("q"), [3, 1]);
        assert_eq!(unarchive(""), 3);
        assert_eq!(messages("q"), [3, 1, 2, 5, 4]);
        assert_eq!(unarchive(""), 0);
        assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 0);
        assert_eq!(
            rows("SELECT msg_id, message, headers, delivery_count, last_error FROM queue_read('q', 9) LIMIT 1"),
            [json!({"msg_id": 6, "message": 3, "headers": {"h": 1}, "delivery_count": 1, "last_error": null})]
        );
        assert!(is(
            "(SELECT bool_and(delivery_count = 0 AND last_error IS NULL AND visible_at IS NULL) FROM queue.q)"
        ));
    }

    #[pg_test]
    fn unarchive_takes_only_what_is_asked_for() {
        archived();
        assert_eq!(unarchive(", reason => 'expired'"), 0);
        assert_eq!(unarchive(", 1, 'rejected'"), 1);
        assert_eq!(messages("q"), [5]);
        assert_eq!(unarchive(", msg_ids => '{1,4,99}', reason => 'archived'"), 1);
        assert_eq!(unarchive(", msg_ids => '{4,3,3}'"), 2);
        assert_eq!(messages("q"), [5, 1, 3, 4], "in the order in which they were archived");
        assert_eq!(unarchive(", msg_ids => '{}'"), 0);
        fails("SELECT queue_unarchive(NULL)").is_null("queue");
        fails("SELECT queue_unarchive('q', msg_ids => '{NULL}')").is_null("msg_ids");
        assert_eq!(unarchive(", NULL, NULL, NULL"), 1);
    }

    #[pg_test]
    fn unarchive_of_many_goes_in_chunks() {
        run("SELECT queue_create('q')");
        run("SELECT * FROM queue_send_batch('q', array(SELECT to_jsonb(n) FROM generate_series(1, 700) n))");
        run("SELECT queue_archive_batch('q', array(SELECT n FROM generate_series(1, 700) n))");
        run("UPDATE queue_archive.q SET archived_at = '2020-01-01'"); // all at the same time
        assert_eq!(unarchive(", 600"), 600);
        assert_eq!(messages("q"), (1..=600).collect::<Vec<i64>>());
        assert_eq!(unarchive(""), 100);
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 1000)"), 700);
    }

    #[pg_test]
    fn unarchive_runs_with_the_owners_rights() {
        archived();
        make_role("somebody");
        run("GRANT TRUNCATE ON queue.q TO somebody");
        as_role("somebody", || {
            fails("SELECT queue_unarchive('q')").is_denied(
                "bring back archived messages of",
                "q",
                "SELECT on its archive",
            );
        });
        run("GRANT SELECT ON queue_archive.q TO somebody");
        as_role("somebody", || {
            assert_eq!(number("SELECT queue_unarchive('q')"), 5);
            assert!(is("current_user = 'somebody'"));
        });
        assert_eq!(messages("q").len(), 5);
    }

    #[pg_test]
    fn unarchive_of_what_was_exhausted_gives_it_all_its_deliveries() {
        run("SELECT queue_create('q', max_deliveries => 1)");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        assert_eq!(value("SELECT outcome FROM queue_retry('q', 1, error => 'bad')"), json!("archived"));
        assert_eq!(unarchive(", reason => 'max_deliveries'"), 1);
        assert_eq!(
            rows("SELECT msg_id, delivery_count, last_error FROM queue_read('q')"),
            [json!({"msg_id": 2, "delivery_count": 1, "last_error": null})]
        );
    }

    #[pg_test]
    fn unarchive_without_an_archive_says_so() {
        run("SELECT queue_create('q')");
        run("DROP TABLE queue_archive.q");
        fails("SELECT queue_unarchive('q')").is(
            "55000",
            "table of queue \"q\" is not intact",
            "Its archive is missing.",
            "",
        );
    }
}
