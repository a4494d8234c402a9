//! Sending past the executor: never past anything that the executor would have honoured. What a send does is
//! compared with what the same INSERT does, before and after the table is altered.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    /// What a test has the owner's triggers and rules write to, and a queue whose helpers have names of their own.
    fn set_up() {
        run("SET LOCAL track_functions = 'all'");
        run("CREATE TABLE seen (what text)");
        make_queue();
    }

    fn make_queue() {
        run("SELECT queue_create('q')");
        run("DO $$ BEGIN \
               EXECUTE format('ALTER INDEX %s RENAME TO q_key', (SELECT indexrelid::regclass FROM pg_index \
                 WHERE indrelid = 'queue.q'::regclass AND indisprimary)); \
               EXECUTE format('ALTER INDEX %s RENAME TO q_due', (SELECT indexrelid::regclass FROM pg_index \
                 WHERE indrelid = 'queue.q'::regclass AND indkey[0] = 3)); \
               EXECUTE format('ALTER INDEX %s RENAME TO q_expiry', (SELECT indexrelid::regclass FROM pg_index \
                 WHERE indrelid = 'queue.q'::regclass AND indkey[0] = 10)); \
               EXECUTE format('ALTER SEQUENCE %s RENAME TO q_ids', pg_get_serial_sequence('queue.q', 'msg_id')); \
             END $$");
    }

    /// A trigger function that runs a plpgsql body.
    fn function(name: &str, body: &str) {
        run(&format!("CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN {body} END $f$"));
    }

    /// How often the executor fired our trigger.
    fn fired() -> i64 {
        number("SELECT coalesce(pg_stat_get_xact_function_calls('queue.on_change()'::regprocedure), 0)")
    }

    /// Whether sends to the queue go past the executor; they are undone.
    fn is_direct() -> bool {
        let before = fired();
        undone("ASSERT queue_send('q', '1') > 0; ASSERT (SELECT count(*) FROM queue_send_batch('q', '{2,3}')) = 2;");
        fired() == before
    }

    /// Sends, and the INSERTs that they are to be like.
    const ALIKE: [[&str; 2]; 2] = [
        [
            "PERFORM queue_send('q', '1'); PERFORM queue_send('q', '2', '{\"h\": 1}'); \
             PERFORM queue_send('q', '2', '{\"h\": 1}');",
            "INSERT INTO queue.q (visible_at, headers, message) VALUES (NULL, NULL, '1'); \
             INSERT INTO queue.q (visible_at, headers, message) VALUES (NULL, '{\"h\": 1}', '2'); \
             INSERT INTO queue.q (visible_at, headers, message) VALUES (NULL, '{\"h\": 1}', '2');",
        ],
        [
            "PERFORM queue_send_batch('q', '{1,2,2}', ARRAY[NULL, '{\"h\": 1}', '{\"h\": 1}']::jsonb[]);",
            "INSERT INTO queue.q (visible_at, headers, message) \
             VALUES (NULL, NULL, '1'), (NULL, '{\"h\": 1}', '2'), (NULL, '{\"h\": 1}', '2');",
        ],
    ];

    /// The rows and what was seen after these statements, or how they failed; they are undone.
    #[track_caller]
    fn outcome(statements: &str) -> (String, String) {
        let failure = fails(&format!(
            "DO $outcome$ BEGIN {statements} SET CONSTRAINTS ALL IMMEDIATE; \
               RAISE EXCEPTION USING ERRCODE = 'UNDO1', MESSAGE = jsonb_build_array( \
                 (SELECT jsonb_agg(to_jsonb(x) - 'msg_id' - 'enqueued_at' || jsonb_build_object( \
                    'old', x.enqueued_at < '2001-01-01', 'now', x.enqueued_at = now()) ORDER BY x.msg_id) \
                  FROM queue.q x), \
                 (SELECT jsonb_agg(what ORDER BY what) FROM seen)); \
             END $outcome$"
        ));
        (failure.sqlstate, failure.message)
    }

    /// What the sends come to, the same as the INSERTs.
    #[track_caller]
    fn outcomes(context: &str) -> [(String, String); 2] {
        ALIKE.map(|[send, insert]| {
            let sent = outcome(send);
            assert_eq!(sent, outcome(insert), "{context}");
            sent
        })
    }

    /// A send honours an alteration that was there before the first send, or came after one, and none that was undone.
    #[track_caller]
    fn is_obeyed(alter: &str, undo: Option<&str>) {
        let plain = ALIKE.map(|[_, insert]| outcome(insert));
        run(alter);
        let altered = outcomes(alter);
        assert_ne!(altered, plain, "{alter}: this test sees no difference");
        run("SELECT queue_drop('q', true)");
        make_queue();
        assert!(is_direct());
        undone(&format!(
            "EXECUTE $alter${alter}$alter$; BEGIN {} EXCEPTION WHEN OTHERS THEN NULL; END;",
            ALIKE[1][0]
        ));
        assert!(is_direct(), "{alter}: it was undone");
        assert_eq!(outcomes(alter), plain);
        run(alter);
        assert_eq!(outcomes(alter), altered);
        if let Some(undo) = undo {
            run(undo);
            assert!(is_direct(), "{undo}");
            assert_eq!(outcomes(undo), plain);
        }
        run("SELECT queue_drop('q', true)");
        make_queue();
    }

    #[pg_test]
    fn send_to_a_table_as_created_fires_no_trigger() {
        set_up();
        assert!(is_direct());
        outcomes("as created");
        let before = fired();
        run("INSERT INTO queue.q (message) VALUES ('1'), ('2')");
        assert_eq!(fired(), before + 2);
        assert_eq!(column("SELECT queue_send_entries('q', '[{\"message\": 3}]')").len(), 1);
        assert_eq!(fired(), before + 2);
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(1), json!(2), json!(3)]);
    }

    #[pg_test]
    fn send_fires_every_trigger_of_the_owner() {
        set_up();
        function("change", "NEW.message := '\"changed\"'; NEW.priority := 7; RETURN NEW;");
        function("suppress", "IF NEW.message = '1' THEN RETURN NULL; END IF; RETURN NEW;");
        function("tell", "INSERT INTO seen VALUES (TG_WHEN || TG_LEVEL || TG_OP); RETURN NEW;");
        function(
            "tell_all",
            "INSERT INTO seen SELECT message::text || ' of ' || count(*) OVER () FROM new_rows; RETURN NULL;",
        );
        function("refuse", "RAISE EXCEPTION 'never';");
        for (kind, how) in [
            ("TRIGGER", "BEFORE INSERT ON queue.q FOR EACH ROW EXECUTE FUNCTION change()"),
            ("TRIGGER", "BEFORE INSERT ON queue.q FOR EACH ROW EXECUTE FUNCTION suppress()"),
            (
                "TRIGGER",
                "BEFORE INSERT ON queue.q FOR EACH ROW WHEN (NEW.message = '2') EXECUTE FUNCTION tell()",
            ),
            ("TRIGGER", "BEFORE INSERT OR DELETE ON queue.q FOR EACH ROW EXECUTE FUNCTION tell()"),
            ("TRIGGER", "AFTER INSERT ON queue.q FOR EACH ROW EXECUTE FUNCTION tell()"),
            ("TRIGGER", "AFTER INSERT OR UPDATE ON queue.q FOR EACH ROW EXECUTE FUNCTION tell()"),
            ("TRIGGER", "BEFORE INSERT ON queue.q FOR EACH STATEMENT EXECUTE FUNCTION tell()"),
            ("TRIGGER", "AFTER INSERT ON queue.q FOR EACH STATEMENT EXECUTE FUNCTION tell()"),
            (
                "TRIGGER",
                "AFTER INSERT ON queue.q REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT \
                 EXECUTE FUNCTION tell_all()",
            ),
            ("TRIGGER", "AFTER INSERT ON queue.q FOR EACH ROW EXECUTE FUNCTION refuse()"),
            (
                "CONSTRAINT TRIGGER",
                "AFTER INSERT ON queue.q DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()",
            ),
        ] {
            is_obeyed(&format!("CREATE {kind} mine {how}"), Some("DROP TRIGGER mine ON queue.q"));
        }
    }

    #[pg_test]
    fn send_fires_a_trigger_again_that_was_enabled_again() {
        set_up();
        function("change", "NEW.message := '\"changed\"'; RETURN NEW;");
        run("CREATE TRIGGER mine BEFORE INSERT ON queue.q FOR EACH ROW EXECUTE FUNCTION change()");
        let fires = outcomes("enabled");
        run("ALTER TABLE queue.q DISABLE TRIGGER mine");
        let disabled = outcomes("disabled");
        assert_ne!(disabled, fires);
        run("ALTER TABLE queue.q ENABLE REPLICA TRIGGER mine");
        assert_eq!(outcomes("replica"), disabled);
        run("SET LOCAL session_replication_role = replica");
        assert_eq!(outcomes("replica, in a replica"), fires);
        run("ALTER TABLE queue.q ENABLE TRIGGER mine");
        assert_eq!(outcomes("enabled, in a replica"), disabled);
        run("SET LOCAL session_replication_role = origin");
        assert_eq!(outcomes("enabled again"), fires);
    }

    #[pg_test]
    fn send_obeys_a_rule() {
        set_up();
        for rule in [
            "DO ALSO INSERT INTO seen VALUES (NEW.message)",
            "DO INSTEAD NOTHING",
            "WHERE NEW.headers IS NULL DO INSTEAD NOTHING",
        ] {
            is_obeyed(
                &format!("CREATE RULE mine AS ON INSERT TO queue.q {rule}"),
                Some("DROP RULE mine ON queue.q"),
            );
        }
    }

    #[pg_test]
    fn send_obeys_every_constraint() {
        set_up();
        for check in ["(message <> '2')", "(message <> '2') NOT VALID", "(group_key IS NOT NULL)"] {
            is_obeyed(
                &format!("ALTER TABLE queue.q ADD CONSTRAINT mine CHECK {check}"),
                Some("ALTER TABLE queue.q DROP CONSTRAINT mine"),
            );
        }
        for column in ["headers", "group_key", "last_error", "visible_at"] {
            let undo = format!("ALTER TABLE queue.q ALTER COLUMN {column} DROP NOT NULL");
            is_obeyed(&format!("ALTER TABLE queue.q ALTER COLUMN {column} SET NOT NULL"), Some(&undo));
        }
    }

    #[pg_test]
    fn send_obeys_a_foreign_key() {
        set_up();
        run("CREATE TABLE known (message jsonb PRIMARY KEY)");
        run("INSERT INTO known VALUES ('1')");
        for kind in ["", " DEFERRABLE INITIALLY DEFERRED", " NOT VALID"] {
            is_obeyed(
                &format!(
                    "ALTER TABLE queue.q ADD CONSTRAINT mine FOREIGN KEY (message) REFERENCES known (message){kind}"
                ),
                Some("ALTER TABLE queue.q DROP CONSTRAINT mine"),
            );
        }
    }

    #[pg_test]
    fn send_uses_a_changed_default() {
        set_up();
        run("CREATE SEQUENCE places");
        run("CREATE FUNCTION place() RETURNS int2 LANGUAGE sql AS 'SELECT 4::int2'");
        for (column, default, was) in [
            ("enqueued_at", "now()", "clock_timestamp()"),
            ("enqueued_at", "'2000-01-01'", "clock_timestamp()"),
            ("enqueued_at", "clock_timestamp() - '100 years'::interval", "clock_timestamp()"),
            ("enqueued_at", "NULL", "clock_timestamp()"),
            ("priority", "5", "0"),
            ("priority", "place()", "0"),
            ("priority", "NULL", "0"),
            ("delivery_count", "3", "0"),
            ("delivery_count", "-1", "0"),
            ("group_key", "'g'", "NULL"),
            ("last_error", "'none'", "NULL"),
        ] {
            let set = |to| format!("ALTER TABLE queue.q ALTER COLUMN {column} SET DEFAULT {to}");
            is_obeyed(&set(default), Some(&set(was)));
        }
        for (column, was) in [("enqueued_at", "clock_timestamp()"), ("priority", "0"), ("delivery_count", "0")]
        {
            let undo = format!("ALTER TABLE queue.q ALTER COLUMN {column} SET DEFAULT {was}");
            is_obeyed(&format!("ALTER TABLE queue.q ALTER COLUMN {column} DROP DEFAULT"), Some(&undo));
        }
    }

    #[pg_test]
    fn send_uses_a_default_whose_function_was_replaced() {
        set_up();
        let replace = |body: &str| {
            run(&format!(
                "CREATE OR REPLACE FUNCTION place() RETURNS int2 LANGUAGE sql IMMUTABLE AS 'SELECT {body}::int2'"
            ));
        };
        replace("0");
        run("ALTER TABLE queue.q ALTER COLUMN priority SET DEFAULT place()");
        let before = outcomes("as before");
        replace("5");
        assert_ne!(outcomes("replaced"), before);
    }

    #[pg_test]
    fn send_uses_a_default_time_whose_function_was_replaced() {
        set_up();
        let replace = |body: &str| {
            run(&format!(
                "CREATE OR REPLACE FUNCTION start() RETURNS timestamptz LANGUAGE sql AS 'SELECT {body}'"
            ));
        };
        replace("pg_catalog.clock_timestamp()");
        run("ALTER TABLE queue.q ALTER COLUMN enqueued_at SET DEFAULT start()");
        let before = outcomes("as before");
        replace("pg_catalog.now()");
        assert_ne!(outcomes("replaced"), before);
    }

    #[pg_test]
    fn send_rounds_times_as_insert_does() {
        make_queue();
        run("ALTER TABLE queue.q ALTER COLUMN visible_at TYPE timestamptz(0)");
        run("SELECT queue_send('q', '1', deliver_at => '2100-01-01 00:00:00.4Z')");
        assert!(is("(SELECT visible_at FROM queue.q) = '2100-01-01 00:00:00Z'"));
    }

    #[pg_test]
    fn send_fills_additional_columns() {
        set_up();
        for column in [
            "note text",
            "note text DEFAULT 'x'",
            "note int NOT NULL DEFAULT 1",
            "note text NOT NULL",
            "note int CHECK (note > 0) DEFAULT 0",
            "note int GENERATED ALWAYS AS (priority + 1) STORED",
        ] {
            is_obeyed(&format!("ALTER TABLE queue.q ADD COLUMN {column}"), None);
        }
    }

    #[pg_test]
    fn send_leaves_out_a_dropped_column() {
        set_up();
        run("SELECT queue_send('q', '0')");
        run("ALTER TABLE queue.q ADD COLUMN note text DEFAULT 'x'");
        run("ALTER TABLE queue.q DROP COLUMN note");
        outcomes("dropped");
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(0), json!(1), json!(2)]);
    }

    #[pg_test]
    fn send_obeys_additional_indexes() {
        set_up();
        for index in [
            "UNIQUE INDEX mine ON queue.q (message)",
            "UNIQUE INDEX mine ON queue.q (message) WHERE headers IS NOT NULL",
            "UNIQUE INDEX mine ON queue.q ((message #>> '{}'))",
            "INDEX mine ON queue.q ((1 / ((message #>> '{}')::int - 2)))",
            "INDEX mine ON queue.q (msg_id) WHERE 1 / ((message #>> '{}')::int - 2) > 0",
            "UNIQUE INDEX mine ON queue.q (visible_at) NULLS NOT DISTINCT",
        ] {
            is_obeyed(&format!("CREATE {index}"), Some("DROP INDEX queue.mine"));
        }
        for constraint in [
            "UNIQUE (message)",
            "UNIQUE (message) DEFERRABLE INITIALLY DEFERRED",
            "EXCLUDE USING btree (message WITH =)",
            "EXCLUDE USING btree (message WITH =) WHERE (headers IS NOT NULL) DEFERRABLE INITIALLY DEFERRED",
        ] {
            is_obeyed(
                &format!("ALTER TABLE queue.q ADD CONSTRAINT mine {constraint}"),
                Some("ALTER TABLE queue.q DROP CONSTRAINT mine"),
            );
        }
    }

    #[pg_test]
    fn send_is_found_by_every_index() {
        set_up();
        run("SELECT queue_send('q', '0')");
        run("CREATE INDEX by_message ON queue.q (message)");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_send_batch('q', (SELECT array_agg(to_jsonb(i)) FROM generate_series(2, 300) i), \
            delay => '1 h')");
        run("DROP INDEX queue.by_message");
        run("SELECT * FROM queue_send_batch('q', (SELECT array_agg(to_jsonb(i)) FROM generate_series(301, 600) i), \
            delay => '1 h')");
        run("CREATE INDEX by_message ON queue.q (message)");
        run("SELECT queue_send('q', '601')");
        run("SET LOCAL enable_seqscan = off");
        for (condition, index, count) in [
            ("message >= '0'", "by_message", 602),
            ("msg_id > 0", "q_key", 602),
            ("visible_at IS NOT NULL", "q_due", 599),
        ] {
            let query = format!("SELECT count(*) FROM queue.q WHERE {condition}");
            run(&format!(
                "DO $$ DECLARE plan json; BEGIN EXECUTE 'EXPLAIN (FORMAT json) {}' INTO plan; \
                 ASSERT plan::text LIKE '%{index}%', plan::text; END $$",
                query.replace('\'', "''")
            ));
            assert_eq!(number(&query), count, "{index}");
        }
    }

    #[pg_test]
    fn send_obeys_an_index_on_visible_at_of_the_owners() {
        set_up();
        is_obeyed(
            "DO $$ BEGIN DROP INDEX queue.q_due; \
               CREATE UNIQUE INDEX mine ON queue.q (visible_at) NULLS NOT DISTINCT; END $$",
            Some(
                "DO $$ BEGIN DROP INDEX queue.mine; \
                   CREATE INDEX q_due ON queue.q (visible_at) WHERE visible_at IS NOT NULL; END $$",
            ),
        );
        run("DROP INDEX queue.q_due");
        run("CREATE UNIQUE INDEX mine ON queue.q (visible_at)");
        run("SELECT queue_send('q', '1'), queue_send('q', '2', deliver_at => '2999-01-01')");
        run("SELECT queue_send('q', '3'), queue_send('q', '4', deliver_at => '2999-01-02')");
        fails("SELECT queue_send('q', '5', deliver_at => '2999-01-02')").says("23505", "\"mine\"");
        fails("SELECT queue_send_batch('q', '{6,7}', deliver_at => '2999-01-03')").says("23505", "\"mine\"");
        run("SET LOCAL enable_seqscan = off");
        assert_eq!(
            number("SELECT count(*) FROM queue.q WHERE visible_at IS NULL"),
            2,
            "nulls are in this index"
        );
        assert_eq!(number("SELECT count(*) FROM queue.q WHERE visible_at > '2999-01-01'"), 1);
    }

    #[pg_test]
    fn send_fills_the_included_column_of_a_primary_key() {
        set_up();
        assert!(is_direct());
        run("ALTER TABLE queue.q DROP CONSTRAINT q_key, ADD CONSTRAINT mine PRIMARY KEY (msg_id) INCLUDE (priority)");
        assert!(!is_direct());
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_send_batch('q', '{2,3}')");
        run("SET LOCAL enable_seqscan = off");
        run("SET LOCAL enable_bitmapscan = off");
        assert_eq!(
            column("SELECT priority FROM queue.q WHERE msg_id > 0 ORDER BY msg_id"),
            [json!(0), json!(0), json!(0)]
        );
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(1), json!(2), json!(3)]);
    }

    #[pg_test]
    fn send_with_a_deferrable_primary_key_is_not_direct() {
        set_up();
        assert!(is_direct());
        run("ALTER TABLE queue.q DROP CONSTRAINT q_key, \
             ADD CONSTRAINT mine PRIMARY KEY (msg_id) DEFERRABLE INITIALLY DEFERRED");
        run("INSERT INTO queue.q (msg_id, message) VALUES (nextval('queue.q_ids') + 1, '1')");
        // Either it is no queue like this, or the key is checked when it is to be checked.
        let failure =
            fails("DO $$ BEGIN PERFORM queue_send('q', '2'); RAISE EXCEPTION USING ERRCODE = 'LATER'; END $$");
        assert!(["55000", "LATER"].contains(&&*failure.sqlstate), "{failure:?}");
        run("DELETE FROM queue.q");
        run("ALTER TABLE queue.q DROP CONSTRAINT mine, ADD CONSTRAINT q_key PRIMARY KEY (msg_id)");
        assert!(is_direct());
    }

    #[cfg(any(feature = "pg15", feature = "pg16"))] // from 17 a partition has no identity of its own
    #[pg_test]
    fn send_obeys_the_bounds_of_a_partition() {
        set_up();
        run("CREATE TABLE parent (LIKE queue.q) PARTITION BY LIST (priority)");
        is_obeyed(
            "ALTER TABLE parent ATTACH PARTITION queue.q FOR VALUES IN (7)",
            Some("ALTER TABLE parent DETACH PARTITION queue.q"),
        );
    }

    #[pg_test]
    fn send_takes_its_ids_from_the_identity_as_it_is() {
        set_up();
        let send = || number("SELECT queue_send('q', '1')");
        let batch = || column("SELECT * FROM queue_send_batch('q', '{2,3}')");
        assert_eq!((send(), batch()), (1, vec![json!(2), json!(3)]));
        run("ALTER TABLE queue.q ALTER COLUMN msg_id SET GENERATED ALWAYS");
        assert_eq!((send(), batch()), (4, vec![json!(5), json!(6)]));
        run("ALTER TABLE queue.q ALTER COLUMN msg_id SET INCREMENT BY 10");
        assert_eq!((send(), batch()), (16, vec![json!(26), json!(36)]));
        assert_eq!(number("SELECT lastval()"), 36);
        assert_eq!(number("SELECT currval('queue.q_ids')"), 36);
        run("ALTER TABLE queue.q ALTER COLUMN msg_id SET GENERATED BY DEFAULT SET CACHE 20 SET INCREMENT BY 1 RESTART 100");
        assert_eq!((send(), batch()), (100, vec![json!(101), json!(102)]));
        undone("ALTER TABLE queue.q ALTER COLUMN msg_id RESTART 500; ASSERT queue_send('q', '1') = 500;");
        run("ALTER TABLE queue.q ALTER COLUMN msg_id SET INCREMENT BY -1 SET MINVALUE -9 RESTART -5");
        assert_eq!((send(), batch()), (-5, vec![json!(-6), json!(-7)]));
        run("ALTER TABLE queue.q ALTER COLUMN msg_id SET INCREMENT BY 1 SET MAXVALUE 202 RESTART 201");
        assert_eq!(send(), 201);
        fails("SELECT queue_send_batch('q', '{2,3}')")
            .says("2200H", "reached maximum value of sequence \"q_ids\"");
        assert_eq!(number("SELECT count(*) FROM queue.q WHERE msg_id = 202"), 0);
    }

    #[pg_test]
    fn send_without_an_identity_does_as_insert_does() {
        set_up();
        is_obeyed(
            "ALTER TABLE queue.q ALTER COLUMN msg_id DROP IDENTITY",
            Some(
                "ALTER TABLE queue.q ALTER COLUMN msg_id ADD GENERATED BY DEFAULT AS IDENTITY \
                 (SEQUENCE NAME queue.others)",
            ),
        );
        run("SELECT queue_send('q', '1')");
        run("ALTER TABLE queue.q ALTER COLUMN msg_id DROP IDENTITY");
        run("CREATE SEQUENCE mine START 50");
        run("ALTER TABLE queue.q ALTER COLUMN msg_id SET DEFAULT nextval('mine')");
        assert_eq!(number("SELECT queue_send('q', '2')"), 50);
        assert_eq!(column("SELECT * FROM queue_send_batch('q', '{3,4}')"), [json!(51), json!(52)]);
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 9)"), 4);
    }

    /// After that a send would not be noticed, so it is refused, whatever was known before.
    fn is_refused_after(alter: &str, undo: &str) {
        run(alter);
        for call in ["queue_send('q', '1')", "queue_send_batch('q', '{1,2}')"] {
            fails(&format!("SELECT {call}")).says("55000", "table of queue \"q\" is not intact");
        }
        run("SELECT queue_drop('q', true)");
        make_queue();
        assert!(is_direct());
        undone(&format!("EXECUTE $alter${alter}$alter$;"));
        assert!(is_direct(), "{alter}: it was undone");
        run(alter);
        fails("SELECT queue_send('q', '1')").says("55000", "table of queue \"q\" is not intact");
        run(undo);
        assert!(is_direct(), "{undo}");
    }

    #[pg_test]
    fn send_without_our_trigger_is_refused_whenever_it_went() {
        set_up();
        function("own", "RETURN NEW;");
        let ours = "CREATE TRIGGER pg_queue_change AFTER INSERT OR UPDATE ON queue.q \
                    FOR EACH ROW EXECUTE FUNCTION queue.on_change()";
        let always = "ALTER TABLE queue.q ENABLE ALWAYS TRIGGER pg_queue_change";
        let again = format!(
            "DO $$ BEGIN DROP TRIGGER IF EXISTS pg_queue_change ON queue.q; EXECUTE '{ours}'; EXECUTE '{always}'; END $$"
        );
        is_refused_after("DROP TRIGGER pg_queue_change ON queue.q", &again);
        is_refused_after("ALTER TABLE queue.q DISABLE TRIGGER pg_queue_change", always);
        is_refused_after("ALTER TABLE queue.q DISABLE TRIGGER ALL", always);
        is_refused_after("ALTER TABLE queue.q ENABLE REPLICA TRIGGER pg_queue_change", always);
        for how in [
            "AFTER INSERT OR UPDATE ON queue.q FOR EACH ROW EXECUTE FUNCTION own()",
            "AFTER INSERT ON queue.q FOR EACH STATEMENT EXECUTE FUNCTION own()",
            "AFTER UPDATE ON queue.q FOR EACH ROW EXECUTE FUNCTION queue.on_change()",
            "AFTER INSERT ON queue.q FOR EACH ROW WHEN (NEW.message IS NULL) EXECUTE FUNCTION queue.on_change()",
        ] {
            is_refused_after(
                &format!(
                    "DO $$ BEGIN DROP TRIGGER pg_queue_change ON queue.q; \
                     CREATE TRIGGER pg_queue_change {how}; {always}; END $$"
                ),
                &again,
            );
        }
    }

    #[pg_test]
    fn send_in_a_replica_is_refused_if_our_trigger_fires_only_at_the_origin() {
        set_up();
        run("SET LOCAL session_replication_role = replica");
        assert!(is_direct());
        run("ALTER TABLE queue.q ENABLE TRIGGER pg_queue_change");
        fails("SELECT queue_send('q', '1')").says("55000", "table of queue \"q\" is not intact");
        run("SET LOCAL session_replication_role = origin");
        run("SELECT queue_send('q', '2')");
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(2)]);
    }

    /// The sends fail as the INSERT does. A debug build adds to DETAIL what came from below.
    #[track_caller]
    fn both_fail(messages: &str, sqlstate: &str, part: &str) {
        let last = messages.rsplit(", ").next().unwrap_or_default();
        let inserted = fails(&format!(
            "INSERT INTO queue.q (visible_at, headers, message) \
             SELECT NULL, NULL, m::jsonb FROM unnest(ARRAY[{messages}]) m"
        ));
        inserted.says(sqlstate, part);
        for send in
            [format!("queue_send_batch('q', ARRAY[{messages}]::jsonb[])"), format!("queue_send('q', {last})")]
        {
            let sent = fails(&format!("SELECT {send}"));
            let said =
                |failure: &Failure| (failure.sqlstate.clone(), failure.message.clone(), failure.hint.clone());
            assert_eq!(said(&sent), said(&inserted), "{send}");
        }
    }

    #[pg_test]
    fn send_obeys_row_security_that_came_after_a_send() {
        set_up();
        make_role("somebody");
        run("GRANT INSERT, SELECT ON queue.q TO somebody");
        let send = "SELECT queue_send('q', '20')";
        let fired_by = |statement: &str| {
            let before = fired();
            as_role("somebody", || run(statement));
            fired() - before
        };
        assert_eq!(fired_by(send), 0);
        run("ALTER TABLE queue.q ENABLE ROW LEVEL SECURITY");
        as_role("somebody", || both_fail("'1', '20'", "42501", "row-level security policy for table \"q\""));
        run("CREATE POLICY small ON queue.q FOR INSERT WITH CHECK (message < '10')");
        as_role("somebody", || both_fail("'1', '20'", "42501", "row-level security policy"));
        assert_eq!(fired_by("SELECT queue_send('q', '2')"), 1);
        as_role("somebody", || {
            run("SET LOCAL row_security = off");
            both_fail("'1', '2'", "42501", "would be affected by row-level security policy");
            run("SET LOCAL row_security = on");
        });
        run("ALTER POLICY small ON queue.q WITH CHECK (message < '100')");
        assert_eq!(fired_by(send), 1);
        run("CREATE POLICY none ON queue.q AS RESTRICTIVE FOR INSERT WITH CHECK (message <> '20')");
        as_role("somebody", || both_fail("'1', '20'", "42501", "row-level security policy \"none\""));
        assert!(is_direct(), "a superuser bypasses it");
        run("ALTER ROLE somebody BYPASSRLS");
        assert_eq!(fired_by(send), 0);
        run("ALTER ROLE somebody NOBYPASSRLS");
        as_role("somebody", || both_fail("'1', '20'", "42501", "row-level security policy \"none\""));
        run("ALTER TABLE queue.q DISABLE ROW LEVEL SECURITY");
        assert_eq!(fired_by(send), 0);
    }

    #[pg_test]
    fn send_by_the_owner_obeys_row_security_only_if_forced() {
        set_up();
        make_role("somebody");
        run("ALTER TABLE queue.q OWNER TO somebody");
        run("ALTER TABLE queue.q ENABLE ROW LEVEL SECURITY");
        run("CREATE POLICY small ON queue.q FOR INSERT WITH CHECK (message < '10')");
        as_role("somebody", || run("SELECT queue_send('q', '20')"));
        run("ALTER TABLE queue.q FORCE ROW LEVEL SECURITY");
        as_role("somebody", || both_fail("'1', '20'", "42501", "row-level security policy for table \"q\""));
        run("ALTER TABLE queue.q NO FORCE ROW LEVEL SECURITY");
        as_role("somebody", || run("SELECT queue_send('q', '20')"));
    }

    #[pg_test]
    fn send_without_the_privilege_fails_as_insert_does() {
        set_up();
        make_role("somebody");
        let is_denied = || {
            as_role("somebody", || both_fail("'1', '2'", "42501", "permission denied for table q"));
        };
        is_denied();
        run("SELECT queue_send('q', '1')");
        is_denied();
        run("GRANT SELECT, UPDATE, DELETE ON queue.q TO somebody");
        is_denied();
        run("GRANT INSERT ON queue.q TO somebody");
        as_role("somebody", || run("SELECT queue_send('q', '2')"));
        run("REVOKE INSERT ON queue.q FROM somebody");
        is_denied();
        undone("GRANT INSERT ON queue.q TO somebody;");
        is_denied();
        run("ALTER TABLE queue.q OWNER TO somebody");
        as_role("somebody", || run("SELECT queue_send('q', '3')"));
        run("REVOKE ALL ON queue.q FROM somebody");
        is_denied();
        assert_eq!(column("SELECT message FROM queue.q"), [json!(1), json!(2), json!(3)]);
    }

    #[pg_test]
    fn send_with_privileges_on_columns_does_as_insert_does() {
        set_up();
        make_role("somebody");
        run("SELECT queue_send('q', '1')");
        run("GRANT INSERT (visible_at, headers, message) ON queue.q TO somebody");
        as_role("somebody", || {
            run("INSERT INTO queue.q (visible_at, headers, message) VALUES (NULL, NULL, '2')");
            run("SELECT queue_send('q', '3')");
            run("SELECT * FROM queue_send_batch('q', '{4,5}')");
        });
        run("REVOKE INSERT (headers) ON queue.q FROM somebody");
        as_role("somebody", || both_fail("'1', '2'", "42501", "permission denied for table q"));
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 9)"), 5);
    }

    #[pg_test]
    fn send_in_a_function_of_its_definer_has_the_definers_privileges() {
        set_up();
        make_role("somebody");
        make_role("sender");
        run("GRANT INSERT ON queue.q TO sender");
        run("CREATE FUNCTION sends() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS $$ SELECT queue_send('q', '1') $$");
        run("ALTER FUNCTION sends() OWNER TO sender");
        as_role("somebody", || run("SELECT sends()"));
        run("REVOKE INSERT ON queue.q FROM sender");
        run("GRANT INSERT ON queue.q TO somebody");
        as_role("somebody", || {
            fails("SELECT sends()").says("42501", "permission denied for table q");
            run("SELECT queue_send('q', '2')");
        });
    }

    #[pg_test]
    fn send_without_usage_on_the_schema_fails_as_insert_does() {
        set_up();
        make_role("somebody");
        run("GRANT INSERT ON queue.q TO somebody");
        as_role("somebody", || run("SELECT queue_send('q', '1')"));
        run("REVOKE USAGE ON SCHEMA queue FROM PUBLIC");
        run("SELECT queue_send('q', '2')");
        as_role("somebody", || both_fail("'1', '2'", "42501", "permission denied for schema queue"));
    }

    #[pg_test]
    fn read_without_usage_on_the_schema_does_the_same_whoever_came_first() {
        set_up();
        make_role("somebody");
        run("SELECT queue_grant('q', 'somebody', 'consume')");
        run("REVOKE USAGE ON SCHEMA queue FROM PUBLIC");
        let read = || {
            let read =
                "DO $$ BEGIN PERFORM * FROM queue_read('q'); RAISE EXCEPTION USING ERRCODE = 'READ1'; END $$";
            let failure = as_role("somebody", || fails(read));
            (failure.sqlstate, failure.message)
        };
        let first = read();
        run("SELECT * FROM queue_read('q')");
        assert_eq!(read(), first);
    }

    /// A jsonb string of so many bytes, compressible or not.
    const TEXT: &str = "CREATE FUNCTION text_of(bytes int, compressible bool) RETURNS jsonb LANGUAGE sql AS $$ \
        SELECT to_jsonb(CASE WHEN compressible THEN repeat('a', bytes) ELSE \
        left((SELECT coalesce(string_agg(md5(i::text), ''), '') FROM generate_series(0, bytes / 32) i), bytes) END) $$";

    #[pg_test]
    fn send_stores_messages_of_every_size_as_insert_does() {
        set_up();
        run(TEXT);
        run("CREATE TABLE given AS SELECT row_number() OVER ()::int AS n, bytes, text_of(bytes, compressible) AS message, \
             CASE WHEN bytes % 2 = 0 THEN text_of(bytes, NOT compressible) END AS headers \
             FROM unnest('{0,1,100,121,122,123,1000,1990,2000,2010,2030,2040,4000,8000,8192,65535,65536,1048576}'::int[]) \
             AS bytes, unnest('{true,false}'::bool[]) AS compressible");
        let stored =
            "SELECT jsonb_agg(jsonb_build_array(pg_column_size(message), pg_column_compression(message), \
             pg_column_size(headers), pg_column_compression(headers), md5(message::text), md5(headers::text)) \
             ORDER BY msg_id) FROM queue.q";
        let of = |statement: &str| {
            run("TRUNCATE queue.q");
            run(statement);
            value(stored)
        };
        let inserted =
            of("INSERT INTO queue.q (headers, message) SELECT headers, message FROM given ORDER BY n");
        assert_eq!(inserted.as_array().map(Vec::len), Some(36));
        for send in [
            "SELECT queue_send('q', message, headers) FROM (SELECT * FROM given ORDER BY n) g",
            "SELECT * FROM queue_send_batch('q', (SELECT array_agg(message ORDER BY n) FROM given), \
               (SELECT array_agg(headers ORDER BY n) FROM given))",
        ] {
            assert_eq!(of(send), inserted, "{send}");
        }
        assert_eq!(
            value("SELECT jsonb_agg(md5(message::text) ORDER BY msg_id) FROM queue_read('q', 100)"),
            value("SELECT jsonb_agg(md5(message::text) ORDER BY n) FROM given")
        );
    }

    #[pg_test]
    fn send_of_what_another_table_keeps_outside_keeps_a_copy() {
        set_up();
        run(TEXT);
        // Down to values that would be kept inside.
        run("CREATE TABLE source (n int, message jsonb, packed jsonb) WITH (toast_tuple_target = 128)");
        run("ALTER TABLE source ALTER COLUMN message SET STORAGE EXTERNAL");
        run("INSERT INTO source SELECT bytes, text_of(bytes, false), text_of(bytes * 10, true) \
             FROM unnest('{1,200,500,3000,200000}'::int[]) AS bytes");
        assert!(is(
            "(SELECT pg_relation_size(reltoastrelid) > 0 FROM pg_class WHERE oid = 'source'::regclass)"
        ));
        run("SELECT queue_send('q', message, packed) FROM (SELECT * FROM source ORDER BY n) s");
        run("SELECT queue_send('q', packed, message) FROM (SELECT * FROM source ORDER BY n) s");
        run("SELECT * FROM queue_send_batch('q', (SELECT array_agg(message ORDER BY n) FROM source))");
        let expected = column(
            "SELECT md5(text_of(CASE WHEN kind = 2 THEN bytes * 10 ELSE bytes END, kind = 2)::text) \
             FROM generate_series(1, 3) kind, unnest('{1,200,500,3000,200000}'::int[]) WITH ORDINALITY AS b (bytes, n) \
             ORDER BY kind, n",
        );
        run("DROP TABLE source");
        assert_eq!(column("SELECT md5(message::text) FROM queue_read('q', 100)"), expected);
        assert!(is("(SELECT max(length(headers::text)) = 2000002 FROM queue.q)"));
    }

    #[pg_test]
    fn send_batch_of_any_length_keeps_its_order() {
        set_up();
        let mut sent = 0;
        for (length, bytes) in [
            (1, 0),
            (2, 0),
            (127, 0),
            (128, 0),
            (129, 0),
            (256, 0),
            (257, 0),
            (1000, 0),
            (300, 1000),
            (7, 70_000),
        ] {
            let ids = column(&format!(
                "SELECT * FROM queue_send_batch('q', (SELECT array_agg(jsonb_build_array(i, repeat('a', {bytes})) ORDER BY i) \
                 FROM generate_series({sent} + 1, {sent} + {length}) i))"
            ));
            assert_eq!(ids, (sent + 1..=sent + length).map(|id| json!(id)).collect::<Vec<_>>(), "{length}");
            sent += length;
        }
        assert_eq!(fired(), 0, "all of it was direct");
        assert!(is(&format!(
            "(SELECT count(*) = {sent} AND bool_and(message -> 0 = to_jsonb(msg_id)) FROM queue.q)"
        )));
        assert_eq!(
            column("SELECT msg_id FROM queue_read('q', 10000)"),
            (1..=sent).map(|id| json!(id)).collect::<Vec<_>>()
        );
        assert!(is(&format!(
            "(SELECT count(*) = {sent} FROM generate_series(1, {sent}) i WHERE queue_delete('q', i))"
        )));
    }

    #[pg_test]
    fn send_batch_gives_each_of_many_its_headers() {
        set_up();
        run("SELECT * FROM queue_send_batch('q', (SELECT array_agg(to_jsonb(i) ORDER BY i) FROM generate_series(1, 400) i), \
            (SELECT array_agg(CASE WHEN i % 3 = 0 THEN NULL ELSE jsonb_build_object('i', i) END ORDER BY i) \
             FROM generate_series(1, 400) i))");
        assert!(is("(SELECT count(*) = 400 AND bool_and(headers IS NOT DISTINCT FROM \
            CASE WHEN msg_id % 3 = 0 THEN NULL ELSE jsonb_build_object('i', msg_id) END) FROM queue_read('q', 400))"));
    }

    #[pg_test]
    fn send_entries_with_times_of_their_own_are_ready_then() {
        set_up();
        run("SELECT * FROM queue_send_entries('q', (SELECT jsonb_agg(CASE i % 3 \
            WHEN 0 THEN jsonb_build_object('message', i) \
            WHEN 1 THEN jsonb_build_object('message', i, 'delay', '1 h') \
            ELSE jsonb_build_object('message', i, 'deliver_at', '2000-01-01') END ORDER BY i) \
            FROM generate_series(1, 300) i))");
        assert_eq!(fired(), 0);
        assert!(is(
            "(SELECT count(*) = 200 AND bool_and((message #>> '{}')::int % 3 <> 1) FROM queue_read('q', 400))"
        ));
        run("SET LOCAL enable_seqscan = off");
        assert_eq!(number("SELECT count(*) FROM queue.q WHERE visible_at > now()"), 100);
        assert_eq!(number("SELECT count(*) FROM queue.q WHERE visible_at <= '2000-01-01'"), 100);
    }

    #[pg_test]
    fn send_batch_that_fails_in_the_middle_leaves_nothing() {
        set_up();
        run("INSERT INTO queue.q (msg_id, message) VALUES (5, '\"there\"'), (1300, '\"there\"')");
        let is_duplicate = |call: &str, id: i64| {
            let failure = fails(&format!("SELECT {call}"));
            failure.says("23505", "duplicate key value violates unique constraint \"q_key\"");
            assert!(failure.detail.starts_with(&format!("Key (msg_id)=({id}) already exists.")), "{failure:?}");
        };
        is_duplicate("queue_send_batch('q', '{1,2,3,4,5,6}')", 5);
        run("SELECT setval('queue.q_ids', 4)");
        is_duplicate("queue_send('q', '5')", 5);
        run("SELECT setval('queue.q_ids', 1000)");
        is_duplicate("queue_send_batch('q', array_fill('1'::jsonb, ARRAY[1000]))", 1300);
        assert_eq!(fired(), 2, "it was direct");
        assert_eq!(number("SELECT count(*) FROM queue.q"), 2);
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 100)"), [json!(5), json!(1300)]);
        assert!(!is("queue_delete('q', 1001)"));
        run("SELECT setval('queue.q_ids', 3000)");
        assert_eq!(number("SELECT queue_send('q', '1')"), 3001);
        assert_eq!(column("SELECT msg_id FROM queue_read('q', 100)"), [json!(3001)]);
    }

    #[pg_test]
    fn send_batch_undone_leaves_nothing_and_kept_all() {
        set_up();
        undone(
            "PERFORM queue_send_batch('q', array_fill('1'::jsonb, ARRAY[500])); PERFORM queue_send('q', '2');",
        );
        assert_eq!(number("SELECT count(*) FROM queue.q"), 0);
        kept(
            "PERFORM queue_send_batch('q', array_fill('3'::jsonb, ARRAY[500])); PERFORM queue_send('q', '4');",
        );
        assert_eq!(fired(), 0);
        assert_eq!(
            column("SELECT msg_id FROM queue_read('q', 2000)"),
            (502..=1002).map(|id| json!(id)).collect::<Vec<_>>()
        );
    }

    #[pg_test]
    fn send_leaves_nothing_open() {
        set_up();
        let said = notices(
            "DO $$ BEGIN BEGIN PERFORM queue_send('q', '1'); PERFORM queue_send('q', '1', delay => '1 h'); \
             PERFORM queue_send_batch('q', array_fill('1'::jsonb, ARRAY[500]), delay => '1 h'); \
             EXCEPTION WHEN division_by_zero THEN NULL; END; END $$",
        );
        assert_eq!(said, Vec::<String>::new());
        // The table could not be altered if it were.
        run("ALTER TABLE queue.q ADD COLUMN note text");
    }

    #[pg_test]
    fn send_twice_in_one_select_sends_two() {
        set_up();
        assert_eq!(
            rows(
                "SELECT queue_send('q', '1') AS a, queue_send('q', '2', delay => '0') AS b, \
                (SELECT count(*) FROM queue.q) AS n"
            ),
            [json!({"a": 1, "b": 2, "n": 0})],
            "the statement itself sees nothing of it"
        );
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(1), json!(2)]);
    }

    #[pg_test]
    fn send_in_one_statement_with_insert_delivers_both() {
        set_up();
        run("WITH i AS (INSERT INTO queue.q (message) VALUES ('1'), ('2') RETURNING msg_id), \
             s AS (SELECT queue_send('q', '3') AS id) \
             INSERT INTO seen SELECT msg_id FROM i UNION ALL SELECT id FROM s");
        assert_eq!(column("SELECT what FROM seen ORDER BY 1"), [json!("1"), json!("2"), json!("3")]);
        let messages = column("SELECT message FROM queue_read('q', 9) ORDER BY 1");
        assert_eq!(messages, [json!(1), json!(2), json!(3)]);
    }

    #[pg_test]
    fn send_of_each_row_of_the_queue_ends() {
        set_up();
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        assert_eq!(
            column("SELECT queue_send('q', message) FROM queue.q"),
            [json!(4), json!(5), json!(6)],
            "what it sends it does not see"
        );
        run("INSERT INTO queue.q (message) SELECT to_jsonb(queue_send('q', message)) FROM queue.q");
        assert_eq!(number("SELECT count(*) FROM queue.q"), 18);
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 99)"), 18);
    }

    #[pg_test]
    fn send_in_a_select_of_many_rows_sends_each() {
        set_up();
        assert!(is("(SELECT count(*) = 10000 AND bool_and(id = i) FROM \
            (SELECT queue_send('q', to_jsonb(i)) AS id, i FROM generate_series(1, 10000) i) s)"));
        assert_eq!(fired(), 0);
        assert!(is(
            "(SELECT count(*) = 10000 AND bool_and(message = to_jsonb(msg_id)) FROM queue_read('q', 10000))"
        ));
    }

    #[pg_test]
    fn send_in_functions_triggers_and_defaults_sends() {
        set_up();
        run("CREATE FUNCTION sends(m jsonb) RETURNS bigint LANGUAGE plpgsql AS \
            $f$ DECLARE id bigint := queue_send('q', m); BEGIN id := queue_send('q', m); RETURN id; END $f$");
        assert_eq!(number("SELECT sends('1')"), 2);
        run("CREATE TABLE t (m jsonb, id bigint DEFAULT queue_send('q', '\"default\"'))");
        function(
            "on_t",
            "PERFORM queue_send('q', NEW.m); PERFORM queue_send_batch('q', ARRAY[NEW.m]); RETURN NEW;",
        );
        for when in ["BEFORE", "AFTER"] {
            run(&format!("CREATE TRIGGER send_{when} {when} INSERT ON t FOR EACH ROW EXECUTE FUNCTION on_t()"));
        }
        run("INSERT INTO t (m) VALUES ('2'), ('3')");
        assert_eq!(
            rows("SELECT message, count(*) FROM queue_read('q', 99) GROUP BY 1 ORDER BY 1"),
            [
                json!({"message": "default", "count": 2}),
                json!({"message": 1, "count": 2}),
                json!({"message": 2, "count": 4}),
                json!({"message": 3, "count": 4}),
            ]
        );
        assert_eq!(fired(), 0);
    }

    #[pg_test]
    fn send_by_a_cursor_sends_what_was_fetched() {
        set_up();
        run("DO $$ DECLARE id bigint; c CURSOR FOR SELECT queue_send('q', to_jsonb(i)) FROM generate_series(1, 10) i; \
            BEGIN OPEN c; FETCH c INTO id; ASSERT id = 1; ASSERT queue_send('q', '\"between\"') = 2; \
            FETCH c INTO id; ASSERT id = 3; \
            BEGIN FETCH c INTO id; ASSERT id = 4; RAISE division_by_zero; EXCEPTION WHEN division_by_zero THEN NULL; END; \
            END $$");
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(1), json!("between"), json!(2)]);
    }

    #[pg_test]
    fn send_to_an_unlogged_queue_delivers() {
        run("SET LOCAL track_functions = 'all'");
        run("SELECT queue_create('q', unlogged => true)");
        assert!(is_direct());
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_send_batch('q', array_fill('2'::jsonb, ARRAY[200]))");
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 999)"), 201);
    }

    #[pg_test]
    fn send_after_the_table_was_rewritten_delivers() {
        set_up();
        run("SELECT queue_send('q', '\"first\"')");
        for (i, rewrite) in [
            "CLUSTER queue.q USING q_key",
            "REINDEX TABLE queue.q",
            "ALTER TABLE queue.q SET UNLOGGED",
            "ALTER TABLE queue.q SET LOGGED",
            "ALTER TABLE queue.q ALTER COLUMN message TYPE jsonb USING message || '{}'",
            "ALTER TABLE queue.q SET (fillfactor = 10, toast_tuple_target = 128)",
            "TRUNCATE queue.q RESTART IDENTITY",
        ]
        .into_iter()
        .enumerate()
        {
            run(rewrite);
            assert!(is_direct(), "{rewrite}");
            let message = format!("[{i}]");
            run(&format!("SELECT queue_send('q', '{message}', delay => '1 ms')"));
            run(&format!("SELECT * FROM queue_send_batch('q', '{{{message},{message}}}')"));
            assert_eq!(
                number(&format!(
                    "SELECT count(*) FROM pg_sleep(0.005), queue_pop('q', 9) WHERE message = '{message}'"
                )),
                3,
                "{rewrite}"
            );
            run("SET LOCAL enable_seqscan = off");
            assert_eq!(number("SELECT count(*) FROM queue.q WHERE msg_id > 0"), 0, "{rewrite}");
        }
    }

    #[pg_test]
    fn send_to_another_queue_of_the_same_name_forgets_the_first() {
        set_up();
        assert!(is_direct());
        run("SELECT queue_drop('q', true)");
        run("SELECT queue_create('q')");
        run("ALTER TABLE queue.q ALTER COLUMN priority SET DEFAULT 5");
        assert_eq!(number("SELECT queue_send('q', '1')"), 1);
        assert_eq!(number("SELECT priority FROM queue.q"), 5);
        run("ALTER TABLE queue.q RENAME TO other");
        run("SELECT queue_create('q')");
        assert!(is_direct());
        run("SELECT queue_send('q', '2'), queue_send('other', '3')");
        assert_eq!(rows("SELECT message, priority FROM queue.q"), [json!({"message": 2, "priority": 0})]);
        assert_eq!(
            rows("SELECT message, priority FROM queue.other ORDER BY msg_id"),
            [json!({"message": 1, "priority": 5}), json!({"message": 3, "priority": 5})]
        );
    }

    #[pg_test]
    fn send_is_enqueued_when_it_is_sent() {
        set_up();
        run("CREATE TABLE times (sent timestamptz)");
        for _ in 0..3 {
            run("SELECT pg_sleep(0.002)");
            run("INSERT INTO times VALUES (clock_timestamp())");
            run("SELECT queue_send('q', '1')");
            run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        }
        run("INSERT INTO times VALUES (clock_timestamp())");
        assert_eq!(fired(), 0);
        // Three between any two of the times.
        let between = column(
            "SELECT (SELECT count(*) FROM queue.q WHERE enqueued_at BETWEEN t.sent AND t.until) FROM \
             (SELECT sent, lead(sent) OVER (ORDER BY sent) AS until FROM times) t WHERE until IS NOT NULL",
        );
        assert_eq!(between, [json!(3), json!(3), json!(3)]);
    }

    #[pg_test]
    fn send_is_counted_in_the_tables_statistics() {
        set_up();
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_send_batch('q', array_fill('2'::jsonb, ARRAY[300]))");
        undone("PERFORM queue_send_batch('q', '{3,4}');");
        assert_eq!(fired(), 0);
        let counted = "SELECT n_tup_ins FROM pg_stat_xact_user_tables WHERE relid = 'queue.q'::regclass";
        assert_eq!(number(counted), 303);
        undone("INSERT INTO queue.q (message) VALUES ('5'), ('6');");
        assert_eq!(number(counted), 305, "as INSERT is, undone or not");
    }
}
