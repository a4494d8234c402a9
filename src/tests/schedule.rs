//! queue_schedule, queue_unschedule, queue_schedule_pause, queue_schedules: arguments, errors, rights, what is listed.
//! Nothing fires here, for that takes a commit: see `pgrx-tests/tests/schedules.rs`. When a schedule fires is tested
//! in `queue/schedule_rule.rs`.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::{json, Value};

    const FORMS: &str =
        "an interval such as '5 minutes', or a cron expression of five fields (minute, hour, day of \
        month, month, day of week) or six (second first)";

    fn schedule(schedule: &str) -> String {
        format!("SELECT queue_schedule('q', 'n', '{schedule}', '1')")
    }

    #[track_caller]
    fn is_refused(text: &str, value: &str, allowed_begins: &str) {
        let failure = fails(&schedule(text));
        let message = format!("invalid value for argument \"schedule\": {value}");
        assert_eq!((&*failure.sqlstate, &*failure.message), ("22023", &*message), "{failure:?}");
        assert!(failure.detail.starts_with(&format!("Allowed: {allowed_begins}")), "{failure:?}");
    }

    #[pg_test]
    fn schedule_is_new_or_replaces_the_one_of_its_name() {
        run("SELECT queue_create('q')");
        assert!(is("queue_schedule('q', 'n', '0 9 * * MON-FRI', '{\"a\": 1}')"));
        assert!(!is("queue_schedule('q', 'n', '1 day', '2', '{\"h\": 1}', 'Europe/Berlin')"));
        assert!(is("queue_schedule('q', 'N', '1 day', '3')"), "another name");
        let found =
            rows("SELECT name, schedule, timezone, paused, last_at, message, headers FROM queue_schedules()");
        assert_eq!(
            found,
            [
                json!({"name": "N", "schedule": "1 day", "timezone": "UTC", "paused": false, "last_at": null,
                       "message": 3, "headers": null}),
                json!({"name": "n", "schedule": "1 day", "timezone": "Europe/Berlin", "paused": false,
                       "last_at": null, "message": 2, "headers": {"h": 1}}),
            ]
        );
        assert_eq!(number("SELECT count(*) FROM queue_peek('q')"), 0, "nothing is sent by it");
    }

    #[pg_test]
    fn schedule_replaced_by_the_same_keeps_its_next_time() {
        run("SELECT queue_create('q')");
        run(&schedule("1 day"));
        run("UPDATE queue_catalog.schedule SET created_at = '2026-01-01 00:00+00', next_at = '2039-01-02 00:00+00'");
        let next = || value("SELECT next_at = '2039-01-02 00:00+00' FROM queue_schedules()");
        assert!(!is("queue_schedule('q', 'n', '1 day', '2')"));
        assert_eq!(next(), json!(true));
        assert_eq!(value("SELECT message FROM queue_schedules()"), json!(2));
        assert!(!is("queue_schedule('q', 'n', '1 day', '2', timezone => 'Europe/Berlin')"));
        assert_eq!(next(), json!(false), "in another zone it is another");
        assert!(is("(SELECT created_at > '2026-01-02' FROM queue_catalog.schedule)"));
    }

    #[pg_test]
    fn schedule_says_when_it_is_next() {
        run("SELECT queue_create('q')");
        run("SELECT queue_schedule('q', 'cron', '30 2 1 1 *', '1', timezone => 'Asia/Tokyo')");
        run("SELECT queue_schedule('q', 'seconds', '15 30 2 1 1 *', '1')");
        run("SELECT queue_schedule('q', 'interval', '1 day 00:00:30', '1')");
        assert!(is(
            "(SELECT to_char(next_at AT TIME ZONE 'Asia/Tokyo', 'MM-DD HH24:MI:SS') = '01-01 02:30:00' \
                     AND next_at > now() FROM queue_schedules() WHERE name = 'cron')"
        ));
        assert!(is("(SELECT to_char(next_at AT TIME ZONE 'UTC', 'MM-DD HH24:MI:SS') = '01-01 02:30:15' \
                     FROM queue_schedules() WHERE name = 'seconds')"));
        assert!(is("(SELECT next_at - created_at = '24:00:30'::interval FROM queue_catalog.schedule \
                     WHERE name = 'interval')"));
    }

    #[pg_test]
    fn schedule_that_is_no_expression_names_the_field() {
        run("SELECT queue_create('q')");
        let number = "0 to 59, *, lists, ranges and steps";
        is_refused("61 * * * *", "minute \"61\" in \"61 * * * *\"", number);
        is_refused("60 0 * * * *", "second \"60\" in \"60 0 * * * *\"", number);
        is_refused("0 24 * * *", "hour \"24\" in \"0 24 * * *\"", "0 to 23, *");
        is_refused("0 0 32 * *", "day of month \"32\" in \"0 0 32 * *\"", "1 to 31, *");
        is_refused("0 0 1 JUNE *", "month \"JUNE\" in \"0 0 1 JUNE *\"", "1 to 12 or JAN to DEC");
        is_refused("0 0 * * 9", "day of week \"9\" in \"0 0 * * 9\"", "0 to 7 or SUN to SAT");
        is_refused("* noon * * *", "hour \"noon\" in \"* noon * * *\"", "0 to 23, *");
        is_refused("* * * *", "\"* * * *\" has 4 fields", FORMS);
        is_refused("* * * * * * *", "\"* * * * * * *\" has 7 fields", FORMS);
        is_refused("*", "\"*\" has 1 field", FORMS);
        is_refused("", "\"\"", FORMS);
        is_refused(" ", "\" \"", FORMS);
        is_refused("0 0 30 2 *", "\"0 0 30 2 *\" never comes true", "a cron expression that comes true");
        let long = "1,".repeat(500) + "1 * * * *";
        is_refused(&long, "1009 bytes", "at most 1000 bytes.");
        assert_eq!(column("SELECT name FROM queue_schedules()"), Vec::<Value>::new());
    }

    #[pg_test]
    fn schedule_of_an_interval_out_of_range_is_refused() {
        run("SELECT queue_create('q')");
        let allowed = "1000 ms to 3650 days, without months.";
        is_refused("0.999 s", "999 ms", allowed);
        is_refused("-1 day", "-1 days", allowed);
        is_refused("0", "0", allowed);
        is_refused("1 month", "an interval with months", allowed);
        is_refused("1 year", "an interval with months", allowed);
        is_refused("3651 days", "3651 days", allowed);
        for text in ["1 s", "3650 days", "00:00:01", "PT5M", "1 day 2 hours"] {
            run(&schedule(text));
        }
        fails(&schedule("soon")).says("22007", "interval");
    }

    #[pg_test]
    fn schedule_in_an_unknown_time_zone_is_refused() {
        run("SELECT queue_create('q')");
        for (text, zone) in [("* * * * *", "Mars/Olympus"), ("1 day", "+02"), ("1 day", "")] {
            fails(&format!("SELECT queue_schedule('q', 'n', '{text}', '1', timezone => '{zone}')")).is(
                "22023",
                &format!("invalid value for argument \"timezone\": \"{zone}\""),
                "",
                "Use an IANA name such as Europe/Berlin, spelled like this.",
            );
        }
        assert!(is("queue_schedule('q', 'n', '1 day', '1', timezone => NULL)"), "null is the default");
    }

    #[pg_test]
    fn schedule_with_a_null_or_a_bad_name_is_refused() {
        run("SELECT queue_create('q')");
        fails("SELECT queue_schedule(NULL, 'n', '1 day', '1')").is_null("queue");
        fails("SELECT queue_schedule('q', NULL, '1 day', '1')").is_null("name");
        fails("SELECT queue_schedule('q', 'n', NULL, '1')").is_null("schedule");
        let failure = fails("SELECT queue_schedule('q', 'n', '1 day', NULL)");
        failure.is_null("message");
        assert_eq!(failure.hint, "To send JSON null, write 'null'::jsonb.");
        fails("SELECT queue_unschedule(NULL, 'n')").is_null("queue");
        fails("SELECT queue_unschedule('q', NULL)").is_null("name");
        fails("SELECT queue_schedule_pause(NULL, 'n')").is_null("queue");
        fails("SELECT queue_schedule_pause('q', NULL)").is_null("name");
        fails("SELECT queue_schedule('q', '', '1 day', '1')").is_out_of_range(
            "name",
            "0 bytes",
            "1 to 200 bytes",
        );
        fails("SELECT queue_schedule('q', repeat('n', 201), '1 day', '1')").is_out_of_range(
            "name",
            "201 bytes",
            "1 to 200 bytes",
        );
        assert!(is("queue_schedule('q', repeat('n', 200), '1 day', 'null')"));
        for headers in ["[]", "1", "null", "\"x\""] {
            fails(&format!("SELECT queue_schedule('q', 'n', '1 day', '1', '{headers}')")).is_out_of_range(
                "headers",
                "JSON of another kind",
                "null, or a JSON object",
            );
        }
    }

    #[pg_test]
    fn schedule_of_an_unknown_queue_is_refused() {
        fails("SELECT queue_schedule('none', 'n', '1 day', '1')").is_unknown_queue("none");
        fails("SELECT queue_unschedule('none', 'n')").is_unknown_queue("none");
        fails("SELECT queue_schedule_pause('none', 'n')").is_unknown_queue("none");
        run("CREATE TABLE queue.plain (x int)");
        fails("SELECT queue_schedule('plain', 'n', '1 day', '1')").is_unknown_queue("plain");
    }

    #[pg_test]
    fn unschedule_ends_one_and_says_whether_there_was_one() {
        run("SELECT queue_create('q')");
        run(&schedule("1 day"));
        assert!(!is("queue_unschedule('q', 'other')"));
        assert!(is("queue_unschedule('q', 'n')"));
        assert!(!is("queue_unschedule('q', 'n')"));
        assert_eq!(number("SELECT count(*) FROM queue_schedules()"), 0);
    }

    #[pg_test]
    fn pause_of_a_schedule_says_whether_it_changed_something() {
        run("SELECT queue_create('q')");
        run(&schedule("0 * * * *"));
        let shown = || rows("SELECT paused, next_at IS NULL AS unknown FROM queue_schedules()");
        assert!(!is("queue_schedule_pause('q', 'n', false)"));
        assert!(is("queue_schedule_pause('q', 'n')"));
        assert!(!is("queue_schedule_pause('q', 'n', NULL)"), "null is the default");
        assert_eq!(shown(), [json!({"paused": true, "unknown": true})]);
        assert!(!is("queue_schedule('q', 'n', '1 day', '1')"));
        assert_eq!(shown(), [json!({"paused": true, "unknown": true})], "replaced, it stays paused");
        run("UPDATE queue_catalog.schedule SET next_at = '2026-01-01'");
        assert!(is("queue_schedule_pause('q', 'n', false)"));
        assert!(
            is("(SELECT NOT paused AND next_at > now() FROM queue_schedules())"),
            "what was missed is skipped"
        );
        assert!(!is("queue_schedule_pause('q', 'other')"), "there is none of that name");
    }

    #[pg_test]
    fn drop_of_a_queue_ends_its_schedules() {
        run("SELECT queue_create('q'), queue_create('r')");
        run(&schedule("1 day"));
        run("SELECT queue_schedule('r', 'n', '1 day', '1')");
        run("SELECT queue_drop('q')");
        assert_eq!(number("SELECT count(*) FROM queue_catalog.schedule"), 1);
        // What plain SQL left is cleaned up when the next queue is made.
        run("DROP TABLE queue.r");
        assert_eq!(number("SELECT count(*) FROM queue_schedules()"), 0);
        run("SELECT queue_create('s')");
        assert_eq!(number("SELECT count(*) FROM queue_catalog.schedule"), 0);
    }

    #[pg_test]
    fn rename_of_a_queue_takes_its_schedules_along() {
        run("SELECT queue_create('q')");
        run(&schedule("1 day"));
        run("ALTER TABLE queue.q RENAME TO r");
        assert_eq!(value("SELECT queue FROM queue_schedules()"), json!("r"));
        assert!(is("queue_unschedule('r', 'n')"));
    }

    #[pg_test]
    fn schedules_show_a_role_only_queues_it_may_use() {
        run("SELECT queue_create('q'), queue_create('r')");
        run("SELECT queue_schedule('q', 'n', '1 day', '1', '{}'), queue_schedule('r', 'n', '1 day', '2')");
        make_role("somebody");
        let seen = || as_role("somebody", || rows("SELECT queue, message, headers FROM queue_schedules()"));
        assert_eq!(seen(), Vec::<Value>::new());
        run("SELECT queue_grant('q', 'somebody', 'send')");
        let hidden = |queue: &str| json!({"queue": queue, "message": null, "headers": null});
        assert_eq!(seen(), [hidden("q")], "who may not read messages sees none here");
        run("SELECT queue_grant('q', 'somebody', 'observe')");
        assert_eq!(seen(), [json!({"queue": "q", "message": 1, "headers": {}})]);
        run("SELECT queue_revoke('q', 'somebody', 'observe'), queue_revoke('q', 'somebody', 'send')");
        run("GRANT pg_monitor TO somebody");
        assert_eq!(seen(), [hidden("q"), hidden("r")]);
    }

    #[pg_test]
    fn schedule_needs_the_right_to_administer() {
        run("SELECT queue_create('q')");
        run("SELECT queue_schedule('q', 'n', '1 day', '1')");
        make_role("somebody");
        run("SELECT queue_grant('q', 'somebody', 'send'), queue_grant('q', 'somebody', 'consume')");
        let calls = [
            "queue_schedule('q', 'm', '1 day', '1')",
            "queue_unschedule('q', 'n')",
            "queue_schedule_pause('q', 'n')",
        ];
        as_role("somebody", || {
            for call in calls {
                fails(&format!("SELECT {call}")).is_denied(
                    "schedule messages of",
                    "q",
                    "TRUNCATE on its table",
                );
            }
        });
        run("SELECT queue_grant('q', 'somebody', 'admin')");
        as_role("somebody", || {
            for call in calls.iter().rev() {
                assert!(is(call), "{call}");
            }
            assert_eq!(column("SELECT name FROM queue_schedules()"), [json!("m")]);
            fails("SELECT * FROM queue_catalog.schedule").says("42501", "permission denied for schema");
        });
    }

    #[pg_test]
    fn schedule_in_a_read_only_transaction_is_refused() {
        run("SELECT queue_create('q')");
        run(&schedule("1 day"));
        run("SET LOCAL transaction_read_only = on");
        for call in [
            "queue_schedule('q', 'm', '1 day', '1')",
            "queue_unschedule('q', 'n')",
            "queue_schedule_pause('q', 'n')",
        ] {
            let failure = fails(&format!("SELECT {call}"));
            assert_eq!(failure.sqlstate, "25006", "{call}: {failure:?}");
        }
        assert_eq!(column("SELECT name FROM queue_schedules()"), [json!("n")]);
    }
}
