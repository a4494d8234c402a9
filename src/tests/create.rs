//! queue_create and queue_list.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    const DEFAULTS: &str = "SELECT queue, visibility_timeout, max_deliveries, dead_letter_queue, retry_delay, \
        retry_backoff, retry_delay_max, retry_jitter, message_ttl, archive_retention, max_length, overflow, \
        dedup_window, priority_ageing, group_fairness, require_lease, durable_leases, unlogged, paused, channel \
        FROM queue_list()";

    #[pg_test]
    fn create_with_defaults_stores_the_documented_ones() {
        assert!(is("queue_create('q')"));
        let listed = rows(DEFAULTS);
        assert_eq!(
            listed,
            [json!({
                "queue": "q", "visibility_timeout": "00:00:30", "max_deliveries": 20, "dead_letter_queue": "",
                "retry_delay": "00:00:01", "retry_backoff": 2, "retry_delay_max": "01:00:00", "retry_jitter": 0.2,
                "message_ttl": "00:00:00", "archive_retention": "00:00:00", "max_length": 0, "overflow": "reject",
                "dedup_window": "00:05:00", "priority_ageing": "00:00:00", "group_fairness": false,
                "require_lease": false, "durable_leases": false, "unlogged": false, "paused": false,
                "channel": "queue_q",
            })]
        );
        assert!(is("(SELECT owner = current_user AND created_at = now() FROM queue_list())"));
    }

    #[pg_test]
    fn create_with_null_settings_stores_the_defaults() {
        run("SELECT queue_create('q')");
        let with_defaults = rows(DEFAULTS);
        run("SELECT queue_drop('q')");
        let nulls = vec!["NULL"; 18].join(", ");
        assert!(is(&format!("queue_create('q', {nulls})")));
        assert_eq!(rows(DEFAULTS), with_defaults);
    }

    #[pg_test]
    fn create_with_every_built_setting_stores_and_lists_it() {
        run("SELECT queue_create('dead')");
        assert!(is("queue_create('q', visibility_timeout => '2 min', max_deliveries => 7, \
            dead_letter_queue => 'dead', retry_delay => '3 s', retry_backoff => 1.5, retry_delay_max => '2 days', \
            retry_jitter => 0.5, require_lease => true, unlogged => true)"));
        assert_eq!(
            rows(
                "SELECT visibility_timeout, max_deliveries, dead_letter_queue, retry_delay, retry_backoff, \
                retry_delay_max, retry_jitter, require_lease, unlogged FROM queue_list() WHERE queue = 'q'"
            ),
            [json!({
                "visibility_timeout": "00:02:00", "max_deliveries": 7, "dead_letter_queue": "dead",
                "retry_delay": "00:00:03", "retry_backoff": 1.5, "retry_delay_max": "48:00:00",
                "retry_jitter": 0.5, "require_lease": true, "unlogged": true,
            })]
        );
    }

    #[pg_test]
    fn create_by_position_takes_settings_in_the_documented_order() {
        // Each has a value that no other has, and no default has; of the flags one at a time is true.
        let built = "'1 min', 3, 'dead', '5 s', 4, '2 min', 0.75, '6 h', '7 days'";
        let unbuilt = ["0", "'reject'", "'5 min'", "'0'", "false"];
        run("SELECT queue_create('dead')");
        for flag in ["require_lease", "durable_leases", "unlogged"] {
            let given = |name: &str| (name == flag).to_string();
            let flags = ["require_lease", "durable_leases", "unlogged"].map(given).join(", ");
            assert!(is(&format!("queue_create('{flag}', {built}, {}, {flags}, false)", unbuilt.join(", "))));
            let mut expected = json!({
                "visibility_timeout": "00:01:00", "max_deliveries": 3, "dead_letter_queue": "dead",
                "retry_delay": "00:00:05", "retry_backoff": 4, "retry_delay_max": "00:02:00", "retry_jitter": 0.75,
                "message_ttl": "06:00:00", "archive_retention": "168:00:00",
                "require_lease": false, "durable_leases": false, "unlogged": false,
            });
            expected[flag] = json!(true);
            assert_eq!(
                rows(&format!(
                    "SELECT visibility_timeout, max_deliveries, dead_letter_queue, retry_delay, retry_backoff, \
                    retry_delay_max, retry_jitter, message_ttl, archive_retention, require_lease, durable_leases, \
                    unlogged FROM queue_list() WHERE queue = '{flag}'"
                )),
                [expected]
            );
        }
        assert!(is(&format!(
            "NOT queue_create('unlogged', {built}, {}, false, false, true, true)",
            unbuilt.join(", ")
        )));
        // What is not built is told by its refusal.
        for (position, setting, given) in [
            (0, "max_length", "8"),
            (1, "overflow", "'drop_oldest'"),
            (2, "dedup_window", "'9 min'"),
            (3, "priority_ageing", "'10 s'"),
            (4, "group_fairness", "true"),
        ] {
            let mut unbuilt = unbuilt;
            unbuilt[position] = given;
            fails(&format!("SELECT queue_create('q', {built}, {})", unbuilt.join(", "))).is_unbuilt(setting);
        }
    }

    #[pg_test]
    fn create_with_an_unbuilt_setting_is_refused() {
        for (setting, given) in [
            ("max_length", "10"),
            ("max_length", "-1"),
            ("overflow", "'drop_oldest'"),
            ("overflow", "''"),
            ("dedup_window", "'0'"),
            ("dedup_window", "'10 min'"),
            ("priority_ageing", "'1 s'"),
            ("group_fairness", "true"),
        ] {
            fails(&format!("SELECT queue_create('q', {setting} => {given})")).is_unbuilt(setting);
        }
        assert!(is("NOT EXISTS (SELECT FROM queue_list())"));
    }

    #[pg_test]
    fn create_with_a_setting_out_of_range_is_refused() {
        for (setting, given, shown, allowed) in [
            ("visibility_timeout", "'0'", "0", "1 ms to 365 days, without months"),
            ("visibility_timeout", "'-1 s'", "-1000 ms", "1 ms to 365 days, without months"),
            ("visibility_timeout", "'999 us'", "0.999 ms", "1 ms to 365 days, without months"),
            ("visibility_timeout", "'366 days'", "366 days", "1 ms to 365 days, without months"),
            ("visibility_timeout", "'1 month'", "an interval with months", "1 ms to 365 days, without months"),
            ("max_deliveries", "-1", "-1", "0 to 1000000"),
            ("max_deliveries", "1000001", "1000001", "0 to 1000000"),
            ("retry_delay", "'-1 s'", "-1000 ms", "0 to 3650 days, without months"),
            ("retry_delay", "'1 year'", "an interval with months", "0 to 3650 days, without months"),
            ("retry_backoff", "0.5", "0.5", "1 to 1000"),
            ("retry_backoff", "1001", "1001", "1 to 1000"),
            ("retry_backoff", "'NaN'", "NaN", "1 to 1000"),
            ("retry_delay_max", "'3651 days'", "3651 days", "0 to 3650 days, without months"),
            ("retry_jitter", "-0.1", "-0.1", "0 to 1"),
            ("retry_jitter", "1.1", "1.1", "0 to 1"),
            ("message_ttl", "'-1 s'", "-1000 ms", "0 to 3650 days, without months"),
            ("message_ttl", "'1 month'", "an interval with months", "0 to 3650 days, without months"),
            ("archive_retention", "'-1 ms'", "-1 ms", "0 to 36500 days, without months"),
        ] {
            let failure = fails(&format!("SELECT queue_create('q', {setting} => {given})"));
            failure.is_out_of_range(setting, shown, allowed);
        }
        assert!(is("NOT EXISTS (SELECT FROM queue_list())"));
    }

    #[pg_test]
    fn create_at_the_edges_of_the_ranges_works() {
        assert!(is(
            "queue_create('least', visibility_timeout => '1 ms', max_deliveries => 0, retry_delay => '0', \
            retry_backoff => 1, retry_delay_max => '0', retry_jitter => 0)"
        ));
        assert!(is("queue_create('most', visibility_timeout => '365 days', max_deliveries => 1000000, \
            retry_delay => '3650 days', retry_backoff => 1000, retry_delay_max => '3650 days', retry_jitter => 1)"));
    }

    #[pg_test]
    fn create_of_an_existing_queue_is_refused() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_create('q')").is("42710", "queue \"q\" already exists", "", "");
    }

    #[pg_test]
    fn create_over_a_table_that_is_no_queue_is_refused() {
        run("CREATE TABLE queue.t (x int)");
        for call in ["queue_create('t')", "queue_create('t', if_not_exists => true)"] {
            let failure = fails(&format!("SELECT {call}"));
            failure.says("42710", "a table \"t\" already exists in schema queue, and is no queue");
            assert!(failure.hint.contains("rename it"), "{failure:?}");
        }
        fails("SELECT queue_send('t', '1')").is_unknown_queue("t");
    }

    #[pg_test]
    fn create_of_what_a_restore_without_the_catalog_left_makes_it_a_queue_again() {
        make_role("keeper");
        run("GRANT CREATE ON SCHEMA queue TO keeper");
        as_role("keeper", || run("SELECT queue_create('q', message_ttl => '1 day'), queue_send('q', '1')"));
        // As what is restored is there: without the row.
        run("DELETE FROM queue_catalog.queue");
        make_role("stranger");
        run("GRANT CREATE ON SCHEMA queue TO stranger");
        as_role("stranger", || assert_eq!(fails("SELECT queue_create('q')").sqlstate, "42710"));
        as_role("keeper", || {
            assert_eq!(fails("SELECT queue_create('q', unlogged => true)").sqlstate, "42710");
            assert!(is("queue_create('q', max_deliveries => 7, if_not_exists => true)"));
            assert!(!is("queue_create('q', if_not_exists => true)"));
            assert_eq!(
                rows("SELECT queue, owner, max_deliveries FROM queue_list()"),
                [json!({"queue": "q", "owner": "keeper", "max_deliveries": 7})]
            );
            assert!(is("queue_archive('q', 1)"));
            run("INSERT INTO queue.q (message) VALUES ('2')");
            assert!(is("(SELECT expires_at IS NULL FROM queue.q)"), "its settings are those given now");
        });
        // What lacks anything of a queue is none.
        run("DELETE FROM queue_catalog.queue; DROP TRIGGER pg_queue_truncate ON queue.q");
        fails("SELECT queue_create('q')").says("42710", "and is no queue");
    }

    #[pg_test]
    fn create_makes_heaps_whatever_the_default_is() {
        run("CREATE ACCESS METHOD other TYPE TABLE HANDLER heap_tableam_handler");
        run("SET LOCAL default_table_access_method = other");
        run("SELECT queue_create('q')");
        run("SELECT queue_send('q', '1')");
        assert_eq!(
            number(
                "SELECT count(*) FROM pg_class c JOIN pg_am a ON a.oid = relam WHERE amname = 'heap' \
                AND c.oid IN ('queue.q'::regclass, 'queue_archive.q'::regclass)"
            ),
            2
        );
    }

    #[pg_test]
    fn list_does_not_show_what_was_moved_to_another_schema() {
        run("SELECT queue_create('q')");
        run("SELECT queue_create('dead')");
        run("SELECT queue_alter('q', dead_letter_queue => 'dead')");
        run("SELECT queue_schedule('dead', 's', '1 h', '1')");
        run("ALTER TABLE queue.dead SET SCHEMA public");
        assert_eq!(
            rows("SELECT queue, dead_letter_queue FROM queue_list()"),
            [json!({"queue": "q", "dead_letter_queue": ""})]
        );
        assert_eq!(number("SELECT count(*) FROM queue_schedules()"), 0);
        run("ALTER TABLE public.dead SET SCHEMA queue");
        assert_eq!(number("SELECT count(*) FROM queue_list()"), 2);
        assert_eq!(number("SELECT count(*) FROM queue_schedules()"), 1);
    }

    #[pg_test]
    fn setting_that_is_misspelt_is_refused() {
        assert_eq!(fails("SET pg_queue.wait_maxx = '1 s'").sqlstate, "42602");
        run("SET LOCAL pg_queue.wait_max = '1 s'");
    }

    #[pg_test]
    fn rename_of_the_table_by_alter_index_renames_the_archive_too() {
        run("SELECT queue_create('q')");
        run("ALTER INDEX queue.q RENAME TO r");
        assert!(is("to_regclass('queue_archive.r') IS NOT NULL AND to_regclass('queue_archive.q') IS NULL"));
    }

    #[pg_test]
    fn create_if_not_exists_makes_a_queue_that_is_not_there() {
        assert_eq!(notices("SELECT queue_create('q', if_not_exists => true)"), Vec::<String>::new());
        assert!(is("EXISTS (SELECT FROM queue_list())"));
    }

    #[pg_test]
    fn create_if_not_exists_of_the_same_gives_a_notice_and_false() {
        run("SELECT queue_create('q', max_deliveries => 5)");
        let said = notices(
            "DO $$ BEGIN ASSERT queue_create('q', max_deliveries => 5, if_not_exists => true) \
            IS FALSE; END $$",
        );
        assert_eq!(said, ["queue \"q\" already exists"]);
    }

    #[pg_test]
    fn create_if_not_exists_of_another_names_the_settings_that_differ() {
        run("SELECT queue_create('dead')");
        run("SELECT queue_create('q')");
        let said = notices(
            "SELECT queue_create('q', visibility_timeout => '1 min', max_deliveries => 1, \
            dead_letter_queue => 'dead', retry_delay => '2 s', retry_backoff => 3, retry_delay_max => '2 h', \
            retry_jitter => 0, message_ttl => '3 h', archive_retention => '4 h', require_lease => true, \
            durable_leases => true, unlogged => true, if_not_exists => true)",
        );
        assert_eq!(said.len(), 1, "{said:?}");
        for setting in [
            "visibility_timeout",
            "max_deliveries",
            "dead_letter_queue",
            "retry_delay",
            "retry_backoff",
            "retry_delay_max",
            "retry_jitter",
            "message_ttl",
            "archive_retention",
            "require_lease",
            "durable_leases",
            "unlogged",
        ] {
            assert!(said[0].contains(setting), "{setting}: {said:?}");
        }
        let listed = rows("SELECT max_deliveries, require_lease FROM queue_list() WHERE queue = 'q'");
        assert_eq!(listed, [json!({"max_deliveries": 20, "require_lease": false})]);
    }

    #[pg_test]
    fn create_if_not_exists_with_bad_settings_is_refused() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_create('q', max_deliveries => -1, if_not_exists => true)")
            .says("22023", "max_deliveries");
        fails("SELECT queue_create('q', max_length => 1, if_not_exists => true)").is_unbuilt("max_length");
    }

    #[pg_test]
    fn create_unlogged_makes_both_tables_unlogged() {
        run("SELECT queue_create('q', unlogged => true)");
        run("SELECT queue_create('logged')");
        let persistence = |table: &str| {
            value(&format!("SELECT relpersistence FROM pg_class WHERE oid = '{table}'::regclass"))
        };
        assert_eq!(persistence("queue.q"), json!("u"));
        assert_eq!(persistence("queue_archive.q"), json!("u"));
        assert_eq!(persistence("queue.logged"), json!("p"));
        assert_eq!(number("SELECT queue_send('q', '1')"), 1);
        assert_eq!(column("SELECT message FROM queue_read('q')"), [json!(1)]);
        assert!(is("queue_archive('q', 1)"));
    }

    #[pg_test]
    fn create_makes_tables_that_are_no_members_of_the_extension() {
        run("SELECT queue_create('q')");
        let members = number(
            "SELECT count(*) FROM pg_depend WHERE deptype = 'e' AND classid = 'pg_class'::regclass \
            AND objid IN ('queue.q'::regclass, 'queue_archive.q'::regclass)",
        );
        assert_eq!(members, 0);
    }

    #[pg_test]
    fn create_makes_the_documented_columns() {
        run("SELECT queue_create('q')");
        let columns = |table: &str| {
            value(&format!(
                "SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod), ', ' ORDER BY attnum) \
                 FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0"
            ))
        };
        let both = "msg_id bigint, enqueued_at timestamp with time zone, visible_at timestamp with time zone, \
            delivery_count integer, priority smallint, group_key text, headers jsonb, message jsonb, last_error text";
        assert_eq!(columns("queue.q"), json!(format!("{both}, expires_at timestamp with time zone")));
        assert_eq!(
            columns("queue_archive.q"),
            json!(format!("{both}, archived_at timestamp with time zone, archive_reason text"))
        );
    }

    #[pg_test]
    fn create_with_an_unknown_dead_letter_queue_is_refused() {
        fails("SELECT queue_create('q', dead_letter_queue => 'dead')").is_unknown_queue("dead");
    }

    #[pg_test]
    fn create_with_itself_as_dead_letter_queue_is_refused() {
        fails("SELECT queue_create('q', dead_letter_queue => 'q')").is(
            "22023",
            "queue \"q\" cannot be the dead-letter queue of \"q\"",
            "",
            "A queue cannot be its own dead-letter queue.",
        );
    }

    #[pg_test]
    fn create_by_an_ordinary_role_needs_create_on_the_schema_and_makes_it_the_owner() {
        make_role("somebody");
        make_role("foreigner");
        as_role("somebody", || {
            fails("SELECT queue_create('q')").is_denied("create", "q", "CREATE on schema queue");
            fails("SELECT queue_create('q', if_not_exists => true)").is_denied(
                "create",
                "q",
                "CREATE on schema queue",
            );
        });
        run("GRANT CREATE ON SCHEMA queue TO somebody, foreigner");
        as_role("somebody", || {
            assert!(is("queue_create('q')"));
            assert_eq!(number("SELECT queue_send('q', '1')"), 1);
            assert_eq!(column("SELECT msg_id FROM queue_read('q')"), [json!(1)]);
            assert!(is("queue_archive('q', 1)"));
            assert_eq!(column("SELECT archive_reason FROM queue_archive.q"), [json!("archived")]);
            assert!(is("queue_alter('q', max_deliveries => 3)"));
        });
        for table in ["queue.q", "queue_archive.q"] {
            let owner =
                value(&format!("SELECT relowner::regrole::text FROM pg_class WHERE oid = '{table}'::regclass"));
            assert_eq!(owner, json!("somebody"));
        }
        as_role("foreigner", || {
            let needs = "ownership of its table";
            fails("SELECT queue_alter('q', max_deliveries => 4)").is_denied("alter", "q", needs);
            fails("SELECT queue_drop('q', true)").is_denied("drop", "q", needs);
            fails("SELECT queue_send('q', '1')").says("42501", "q");
            fails("SELECT queue_create('q')").says("42710", "\"q\" already exists");
        });
        as_role("somebody", || assert!(is("queue_drop('q', true)")));
    }

    #[pg_test]
    fn create_with_a_dead_letter_queue_the_owner_may_not_send_to_is_refused() {
        make_role("somebody");
        run("GRANT CREATE ON SCHEMA queue TO somebody");
        run("SELECT queue_create('dead')");
        as_role("somebody", || {
            fails("SELECT queue_create('q', dead_letter_queue => 'dead')").is_denied(
                "send dead letters to",
                "dead",
                "INSERT on its table for the queue's owner",
            );
        });
        run("SELECT queue_grant('dead', 'somebody', 'send')");
        as_role("somebody", || assert!(is("queue_create('q', dead_letter_queue => 'dead')")));
    }

    #[pg_test]
    fn create_works_with_an_empty_search_path_and_temporary_namesakes() {
        run("CREATE TEMP TABLE queue (x int)");
        run("SET LOCAL search_path = ''");
        run("SELECT public.queue_create('q')");
        run("SELECT public.queue_send('q', '1')");
        assert_eq!(column("SELECT message FROM public.queue_read('q')"), [json!(1)]);
        run("SELECT * FROM public.queue_retry('q', 1, delay => '0')");
        assert_eq!(column("SELECT msg_id FROM public.queue_read_any('{q}')"), [json!(1)]);
        run("SELECT public.queue_archive('q', 1)");
        assert_eq!(column("SELECT * FROM public.queue_send_batch('q', '{1,2}')"), [json!(2), json!(3)]);
        assert_eq!(value("SELECT public.queue_reject('q', 2)"), json!("archived"));
        assert_eq!(number("SELECT public.queue_purge('q')"), 1);
        assert_eq!(column("SELECT queue FROM public.queue_list()"), [json!("q")]);
        run("SELECT public.queue_alter('q', max_deliveries => 1)");
        run("SELECT public.queue_pause('q')");
        run("SELECT public.queue_drop('q', true)");
    }

    #[pg_test]
    fn create_works_under_a_search_path_with_operators_that_lie() {
        run("CREATE SCHEMA liar");
        run("CREATE FUNCTION liar.f(oid, oid) RETURNS bool LANGUAGE sql AS 'SELECT false'");
        run("CREATE OPERATOR liar.= (FUNCTION = liar.f, LEFTARG = oid, RIGHTARG = oid)");
        run("CREATE FUNCTION liar.g(bigint, bigint) RETURNS bool LANGUAGE sql AS 'SELECT false'");
        run("CREATE OPERATOR liar.= (FUNCTION = liar.g, LEFTARG = bigint, RIGHTARG = bigint)");
        run("CREATE FUNCTION liar.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT NULL::timestamptz'");
        run("CREATE FUNCTION liar.unnest(anyarray) RETURNS SETOF anyelement LANGUAGE sql AS 'SELECT $1[1] WHERE false'");
        run("SET LOCAL search_path = liar, pg_catalog, public");
        run("SELECT public.queue_create('dead')");
        run("SELECT public.queue_create('q', dead_letter_queue => 'dead')");
        assert_eq!(
            column("SELECT * FROM public.queue_send_batch('q', '{1,2,3}')"),
            [json!(1), json!(2), json!(3)]
        );
        assert_eq!(column("SELECT msg_id FROM public.queue_read('q', 3)"), [json!(1), json!(2), json!(3)]);
        assert_eq!(value("SELECT outcome FROM public.queue_retry('q', 1)"), json!("retried"));
        assert_eq!(value("SELECT public.queue_reject('q', 2)"), json!("dead_lettered"));
        assert_eq!(value("SELECT public.queue_archive('q', 3)"), json!(true));
        assert_eq!(value("SELECT public.queue_alter('q', max_deliveries => 1)"), json!(true));
        assert_eq!(column("SELECT max_deliveries FROM public.queue_list()"), [json!(20), json!(1)]);
    }

    #[pg_test]
    fn list_without_queues_is_empty() {
        assert_eq!(rows("SELECT * FROM queue_list()"), Vec::<serde_json::Value>::new());
    }

    #[pg_test]
    fn list_shows_a_role_only_the_queues_it_may_use() {
        for queue in ["a", "b", "c", "d"] {
            run(&format!("SELECT queue_create('{queue}')"));
        }
        make_role("somebody");
        make_role("watcher");
        run("GRANT pg_monitor TO watcher");
        as_role("somebody", || {
            assert_eq!(column("SELECT queue FROM queue_list()"), Vec::<serde_json::Value>::new())
        });
        run("SELECT queue_grant('a', 'somebody', 'send'), queue_grant('c', 'somebody', 'observe')");
        run("SELECT queue_grant('d', 'public', 'consume')");
        as_role("somebody", || {
            assert_eq!(column("SELECT queue FROM queue_list()"), [json!("a"), json!("c"), json!("d")]);
        });
        as_role("watcher", || assert_eq!(column("SELECT queue FROM queue_list()").len(), 4));
    }
}
