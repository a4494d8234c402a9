//! What CREATE EXTENSION installs, as the system catalogs show it.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::{json, Value};

    /// The extension's functions without those that only a test build has.
    const FUNCTIONS: &str = "(SELECT p.* FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass \
        AND d.objid = p.oid AND d.deptype = 'e' JOIN pg_extension e ON e.oid = d.refobjid \
        AND d.refclassid = 'pg_extension'::regclass AND e.extname = 'pg_queue' \
        WHERE p.pronamespace::regnamespace::text NOT IN ('tests', 'queue_test')) AS p";

    fn names(condition: &str) -> Vec<Value> {
        column(&format!("SELECT proname FROM {FUNCTIONS} WHERE {condition} ORDER BY 1"))
    }

    #[pg_test]
    fn functions_are_those_of_the_reference_one_per_name() {
        let expected = [
            "on_change",
            "on_schedule",
            "queue_alter",
            "queue_archive",
            "queue_archive_batch",
            "queue_cancel",
            "queue_create",
            "queue_delete",
            "queue_delete_and_read",
            "queue_delete_batch",
            "queue_drop",
            "queue_extend",
            "queue_extend_batch",
            "queue_grant",
            "queue_health",
            "queue_leases",
            "queue_limit",
            "queue_list",
            "queue_pause",
            "queue_peek",
            "queue_pop",
            "queue_purge",
            "queue_read",
            "queue_read_any",
            "queue_redrive",
            "queue_reject",
            "queue_release",
            "queue_resume",
            "queue_retry",
            "queue_revoke",
            "queue_schedule",
            "queue_schedule_pause",
            "queue_schedules",
            "queue_send",
            "queue_send_batch",
            "queue_send_entries",
            "queue_stats",
            "queue_unarchive",
            "queue_unschedule",
            "queue_wait",
        ];
        assert_eq!(names("true"), expected.map(|name| json!(name)));
    }

    #[pg_test]
    fn functions_have_the_documented_arguments() {
        let arguments = |name: &str| {
            value(&format!("SELECT pg_get_function_arguments(p.oid) FROM {FUNCTIONS} WHERE proname = '{name}'"))
        };
        let starts = |name: &str, start: &str| {
            let found = arguments(name);
            assert!(found.as_str().is_some_and(|a| a.starts_with(start)), "{name}: {found}");
        };
        starts(
            "queue_create",
            "queue text, visibility_timeout interval DEFAULT '00:00:30'::interval, max_deliveries bigint DEFAULT 20, \
             dead_letter_queue text DEFAULT ''::text, retry_delay interval DEFAULT '00:00:01'::interval, \
             retry_backoff double precision DEFAULT 2, retry_delay_max interval DEFAULT '01:00:00'::interval, \
             retry_jitter double precision DEFAULT 0.2, message_ttl interval DEFAULT '00:00:00'::interval, \
             archive_retention interval DEFAULT '00:00:00'::interval, max_length bigint DEFAULT 0, \
             overflow text DEFAULT 'reject'::text, dedup_window interval DEFAULT '00:05:00'::interval, \
             priority_ageing interval DEFAULT '00:00:00'::interval, group_fairness boolean DEFAULT false, \
             require_lease boolean DEFAULT false, durable_leases boolean DEFAULT false, \
             unlogged boolean DEFAULT false, if_not_exists boolean DEFAULT false",
        );
        starts(
            "queue_send",
            "queue text, message jsonb, headers jsonb DEFAULT NULL::jsonb, delay interval DEFAULT NULL::interval, \
             deliver_at timestamp with time zone DEFAULT NULL::timestamp with time zone, priority bigint DEFAULT 0, \
             group_key text DEFAULT NULL::text, dedup_key text DEFAULT NULL::text, ttl interval DEFAULT NULL::interval",
        );
        starts(
            "queue_read",
            "queue text, quantity bigint DEFAULT 1, visibility_timeout interval DEFAULT NULL::interval, \
             wait interval DEFAULT '00:00:00'::interval, filter jsonb DEFAULT NULL::jsonb, \
             consumer text DEFAULT NULL::text",
        );
        starts(
            "queue_delete",
            "queue text, msg_id bigint, lease_id bigint DEFAULT NULL::bigint, strict boolean DEFAULT false",
        );
        starts(
            "queue_retry",
            "queue text, msg_id bigint, lease_id bigint DEFAULT NULL::bigint, error text DEFAULT NULL::text, \
             delay interval DEFAULT NULL::interval",
        );
    }

    #[pg_test]
    fn functions_are_volatile_and_not_strict_and_unsafe_in_parallel() {
        assert_eq!(names("p.provolatile <> 'v' OR p.proparallel <> 'u' OR p.proisstrict"), Vec::<Value>::new());
    }

    #[pg_test]
    fn functions_run_with_the_rights_of_their_caller() {
        assert_eq!(names("p.prosecdef"), Vec::<Value>::new());
        assert_eq!(names("p.prorettype = 'void'::regtype"), Vec::<Value>::new(), "nothing returns void");
    }

    #[pg_test]
    fn functions_are_in_the_schema_of_the_extension() {
        let elsewhere =
            names("p.pronamespace <> (SELECT extnamespace FROM pg_extension WHERE extname = 'pg_queue')");
        assert_eq!(elsewhere, [json!("on_change"), json!("on_schedule")]);
        assert!(is("(SELECT NOT extrelocatable FROM pg_extension WHERE extname = 'pg_queue')"));
    }

    #[pg_test]
    fn objects_of_the_extension_have_comments() {
        let without = column(
            "SELECT pg_describe_object(d.classid, d.objid, d.objsubid) FROM pg_depend d \
             JOIN pg_extension e ON e.oid = d.refobjid AND d.refclassid = 'pg_extension'::regclass \
             WHERE d.deptype = 'e' AND e.extname = 'pg_queue' \
             AND d.classid <> 'pg_type'::regclass \
             AND NOT EXISTS (SELECT FROM pg_description c WHERE c.classoid = d.classid AND c.objoid = d.objid \
               AND c.objsubid = 0 AND c.description <> '') \
             AND NOT (d.classid = 'pg_namespace'::regclass AND d.objid::regnamespace::text IN ('tests', 'queue_test')) \
             AND NOT (d.classid = 'pg_proc'::regclass AND d.objid IN (SELECT oid FROM pg_proc \
               WHERE pronamespace::regnamespace::text IN ('tests', 'queue_test'))) ORDER BY 1",
        );
        assert_eq!(without, Vec::<Value>::new());
        assert!(is("(SELECT obj_description(oid, 'pg_extension') IS NOT NULL FROM pg_extension \
            WHERE extname = 'pg_queue')"));
    }

    #[pg_test]
    fn tables_that_a_dump_must_hold_are_marked() {
        let dumped = column(
            "SELECT c.oid::regclass::text FROM pg_extension e, unnest(e.extconfig) AS c (oid) \
             WHERE e.extname = 'pg_queue' ORDER BY 1",
        );
        for table in ["queue_catalog.queue", "queue_catalog.schedule"] {
            assert!(dumped.contains(&json!(table)), "{dumped:?}");
        }
    }
}
