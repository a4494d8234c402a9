-- The functions, in the schema that CREATE EXTENSION chooses. Names, order of arguments and meanings are fixed
-- (SQL.md); none is STRICT, for a null argument means its default or is an error that names it. The C functions
-- behind them are listed in src/api.rs.

-- What a read returns. A named type: the executor looks a TABLE's columns up in pg_proc for every statement, which
-- costs as much as the delivery itself.
CREATE TYPE @extschema@.queue_message AS (
    msg_id pg_catalog.int8,
    lease_id pg_catalog.int8,
    delivery_count pg_catalog.int8,
    enqueued_at pg_catalog.timestamptz,
    lease_expires_at pg_catalog.timestamptz,
    priority pg_catalog.int8,
    group_key pg_catalog.text,
    last_error pg_catalog.text,
    headers pg_catalog.jsonb,
    message pg_catalog.jsonb
);
COMMENT ON TYPE @extschema@.queue_message IS
    'a message as it is delivered: its id, the fence of this delivery, how many there were, this one included';

CREATE FUNCTION queue_create(
    queue pg_catalog.text,
    visibility_timeout pg_catalog.interval DEFAULT '30 s',
    max_deliveries pg_catalog.int8 DEFAULT 20,
    dead_letter_queue pg_catalog.text DEFAULT '',
    retry_delay pg_catalog.interval DEFAULT '1 s',
    retry_backoff pg_catalog.float8 DEFAULT 2,
    retry_delay_max pg_catalog.interval DEFAULT '1 h',
    retry_jitter pg_catalog.float8 DEFAULT 0.2,
    message_ttl pg_catalog.interval DEFAULT '0',
    archive_retention pg_catalog.interval DEFAULT '0',
    max_length pg_catalog.int8 DEFAULT 0,
    overflow pg_catalog.text DEFAULT 'reject',
    dedup_window pg_catalog.interval DEFAULT '5 min',
    priority_ageing pg_catalog.interval DEFAULT '0',
    group_fairness pg_catalog.bool DEFAULT false,
    require_lease pg_catalog.bool DEFAULT false,
    durable_leases pg_catalog.bool DEFAULT false,
    unlogged pg_catalog.bool DEFAULT false,
    if_not_exists pg_catalog.bool DEFAULT false
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_create';
COMMENT ON FUNCTION queue_create(pg_catalog.text, pg_catalog.interval, pg_catalog.int8, pg_catalog.text, pg_catalog.interval, pg_catalog.float8, pg_catalog.interval, pg_catalog.float8, pg_catalog.interval, pg_catalog.interval, pg_catalog.int8, pg_catalog.text, pg_catalog.interval, pg_catalog.interval, pg_catalog.bool, pg_catalog.bool, pg_catalog.bool, pg_catalog.bool, pg_catalog.bool) IS
    'makes a queue: its table queue.<name> and its archive queue_archive.<name>, owned by the caller, who needs CREATE on schema queue; true, or with if_not_exists false if it is there already';

CREATE FUNCTION queue_alter(
    queue pg_catalog.text,
    visibility_timeout pg_catalog.interval DEFAULT NULL,
    max_deliveries pg_catalog.int8 DEFAULT NULL,
    dead_letter_queue pg_catalog.text DEFAULT NULL,
    retry_delay pg_catalog.interval DEFAULT NULL,
    retry_backoff pg_catalog.float8 DEFAULT NULL,
    retry_delay_max pg_catalog.interval DEFAULT NULL,
    retry_jitter pg_catalog.float8 DEFAULT NULL,
    message_ttl pg_catalog.interval DEFAULT NULL,
    archive_retention pg_catalog.interval DEFAULT NULL,
    max_length pg_catalog.int8 DEFAULT NULL,
    overflow pg_catalog.text DEFAULT NULL,
    dedup_window pg_catalog.interval DEFAULT NULL,
    priority_ageing pg_catalog.interval DEFAULT NULL,
    group_fairness pg_catalog.bool DEFAULT NULL,
    require_lease pg_catalog.bool DEFAULT NULL,
    durable_leases pg_catalog.bool DEFAULT NULL
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_alter';
COMMENT ON FUNCTION queue_alter(pg_catalog.text, pg_catalog.interval, pg_catalog.int8, pg_catalog.text, pg_catalog.interval, pg_catalog.float8, pg_catalog.interval, pg_catalog.float8, pg_catalog.interval, pg_catalog.interval, pg_catalog.int8, pg_catalog.text, pg_catalog.interval, pg_catalog.interval, pg_catalog.bool, pg_catalog.bool, pg_catalog.bool) IS
    'changes settings of a queue at commit; null leaves a setting as it is; the owner''s';

CREATE FUNCTION queue_drop(
    queue pg_catalog.text,
    force pg_catalog.bool DEFAULT false
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_drop';
COMMENT ON FUNCTION queue_drop(pg_catalog.text, pg_catalog.bool) IS
    'drops a queue and its archive; false if there is none; refused while either holds rows, unless forced; the owner''s';

CREATE FUNCTION queue_purge(
    queue pg_catalog.text
) RETURNS pg_catalog.int8
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_purge';
COMMENT ON FUNCTION queue_purge(pg_catalog.text) IS
    'deletes every message of a queue, those in flight included; returns how many; needs TRUNCATE on its table';

CREATE FUNCTION queue_pause(
    queue pg_catalog.text
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_pause';
COMMENT ON FUNCTION queue_pause(pg_catalog.text) IS
    'from commit on reads of the queue return nothing, while sends go on; true if it was not paused; needs TRUNCATE on its table';

CREATE FUNCTION queue_resume(
    queue pg_catalog.text
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_resume';
COMMENT ON FUNCTION queue_resume(pg_catalog.text) IS
    'ends a pause; true if the queue was paused; needs TRUNCATE on its table';

CREATE FUNCTION queue_list() RETURNS TABLE (queue pg_catalog.text, owner pg_catalog.text, visibility_timeout pg_catalog.interval, max_deliveries pg_catalog.int8, dead_letter_queue pg_catalog.text, retry_delay pg_catalog.interval, retry_backoff pg_catalog.float8, retry_delay_max pg_catalog.interval, retry_jitter pg_catalog.float8, message_ttl pg_catalog.interval, archive_retention pg_catalog.interval, max_length pg_catalog.int8, overflow pg_catalog.text, dedup_window pg_catalog.interval, priority_ageing pg_catalog.interval, group_fairness pg_catalog.bool, require_lease pg_catalog.bool, durable_leases pg_catalog.bool, unlogged pg_catalog.bool, paused pg_catalog.bool, channel pg_catalog.text, created_at pg_catalog.timestamptz)
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_list';
COMMENT ON FUNCTION queue_list() IS
    'a row for each queue that the caller may use, with every setting and the channel for LISTEN';

CREATE FUNCTION queue_grant(
    queue pg_catalog.text,
    role pg_catalog.text,
    capability pg_catalog.text
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_grant';
COMMENT ON FUNCTION queue_grant(pg_catalog.text, pg_catalog.text, pg_catalog.text) IS
    'grants plain privileges on the queue''s table: send = INSERT; observe = SELECT, also on the archive; consume = SELECT, UPDATE, DELETE; admin = SELECT, UPDATE, DELETE, TRUNCATE, and SELECT on the archive';

CREATE FUNCTION queue_revoke(
    queue pg_catalog.text,
    role pg_catalog.text,
    capability pg_catalog.text
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_revoke';
COMMENT ON FUNCTION queue_revoke(pg_catalog.text, pg_catalog.text, pg_catalog.text) IS
    'revokes plain privileges on the queue''s table: send = INSERT; observe = SELECT, also on the archive; consume = SELECT, UPDATE, DELETE; admin = SELECT, UPDATE, DELETE, TRUNCATE, and SELECT on the archive';

CREATE FUNCTION queue_send(
    queue pg_catalog.text,
    message pg_catalog.jsonb,
    headers pg_catalog.jsonb DEFAULT NULL,
    delay pg_catalog.interval DEFAULT NULL,
    deliver_at pg_catalog.timestamptz DEFAULT NULL,
    priority pg_catalog.int8 DEFAULT 0,
    group_key pg_catalog.text DEFAULT NULL,
    dedup_key pg_catalog.text DEFAULT NULL,
    ttl pg_catalog.interval DEFAULT NULL
) RETURNS pg_catalog.int8
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_send';
COMMENT ON FUNCTION queue_send(pg_catalog.text, pg_catalog.jsonb, pg_catalog.jsonb, pg_catalog.interval, pg_catalog.timestamptz, pg_catalog.int8, pg_catalog.text, pg_catalog.text, pg_catalog.interval) IS
    'sends a message, visible to readers from commit on, or after delay, or from deliver_at on; returns its id';

CREATE FUNCTION queue_send_batch(
    queue pg_catalog.text,
    messages pg_catalog.jsonb[],
    headers pg_catalog.jsonb[] DEFAULT NULL,
    delay pg_catalog.interval DEFAULT NULL,
    deliver_at pg_catalog.timestamptz DEFAULT NULL,
    priority pg_catalog.int8 DEFAULT 0,
    group_keys pg_catalog.text[] DEFAULT NULL,
    dedup_keys pg_catalog.text[] DEFAULT NULL,
    ttl pg_catalog.interval DEFAULT NULL
) RETURNS SETOF pg_catalog.int8
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_send_batch';
COMMENT ON FUNCTION queue_send_batch(pg_catalog.text, pg_catalog.jsonb[], pg_catalog.jsonb[], pg_catalog.interval, pg_catalog.timestamptz, pg_catalog.int8, pg_catalog.text[], pg_catalog.text[], pg_catalog.interval) IS
    'sends many messages, all or none; returns their ids in the order of the input';

CREATE FUNCTION queue_send_entries(
    queue pg_catalog.text,
    entries pg_catalog.jsonb
) RETURNS SETOF pg_catalog.int8
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_send_entries';
COMMENT ON FUNCTION queue_send_entries(pg_catalog.text, pg_catalog.jsonb) IS
    'sends a JSON array of objects with queue_send''s argument names, all or none; returns their ids in the order of the input';

CREATE FUNCTION queue_read(
    queue pg_catalog.text,
    quantity pg_catalog.int8 DEFAULT 1,
    visibility_timeout pg_catalog.interval DEFAULT NULL,
    wait pg_catalog.interval DEFAULT '0',
    filter pg_catalog.jsonb DEFAULT NULL,
    consumer pg_catalog.text DEFAULT NULL
) RETURNS SETOF @extschema@.queue_message
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_read';
COMMENT ON FUNCTION queue_read(pg_catalog.text, pg_catalog.int8, pg_catalog.interval, pg_catalog.interval, pg_catalog.jsonb, pg_catalog.text) IS
    'leases up to quantity messages for visibility_timeout (the queue''s unless given) and returns them; waits up to wait for the first; writes nothing';

CREATE FUNCTION queue_read_any(
    queues pg_catalog.text[],
    quantity pg_catalog.int8 DEFAULT 1,
    visibility_timeout pg_catalog.interval DEFAULT NULL,
    wait pg_catalog.interval DEFAULT '0',
    consumer pg_catalog.text DEFAULT NULL
) RETURNS TABLE (queue pg_catalog.text, msg_id pg_catalog.int8, lease_id pg_catalog.int8, delivery_count pg_catalog.int8, enqueued_at pg_catalog.timestamptz, lease_expires_at pg_catalog.timestamptz, priority pg_catalog.int8, group_key pg_catalog.text, last_error pg_catalog.text, headers pg_catalog.jsonb, message pg_catalog.jsonb)
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_read_any';
COMMENT ON FUNCTION queue_read_any(pg_catalog.text[], pg_catalog.int8, pg_catalog.interval, pg_catalog.interval, pg_catalog.text) IS
    'queue_read from several queues, earlier ones first';

CREATE FUNCTION queue_pop(
    queue pg_catalog.text,
    quantity pg_catalog.int8 DEFAULT 1
) RETURNS SETOF @extschema@.queue_message
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_pop';
COMMENT ON FUNCTION queue_pop(pg_catalog.text, pg_catalog.int8) IS
    'reads and deletes up to quantity messages: each is delivered at most once';

CREATE FUNCTION queue_delete(
    queue pg_catalog.text,
    msg_id pg_catalog.int8,
    lease_id pg_catalog.int8 DEFAULT NULL,
    strict pg_catalog.bool DEFAULT false
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_delete';
COMMENT ON FUNCTION queue_delete(pg_catalog.text, pg_catalog.int8, pg_catalog.int8, pg_catalog.bool) IS
    'finishes a message: deletes it, in the caller''s transaction; false (with strict an error, P0002) if it is not there or lease_id is lost';

CREATE FUNCTION queue_delete_batch(
    queue pg_catalog.text,
    msg_ids pg_catalog.int8[],
    lease_ids pg_catalog.int8[] DEFAULT NULL,
    strict pg_catalog.bool DEFAULT false
) RETURNS SETOF pg_catalog.int8
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_delete_batch';
COMMENT ON FUNCTION queue_delete_batch(pg_catalog.text, pg_catalog.int8[], pg_catalog.int8[], pg_catalog.bool) IS
    'finishes messages; returns the ids of those that were';

CREATE FUNCTION queue_archive(
    queue pg_catalog.text,
    msg_id pg_catalog.int8,
    lease_id pg_catalog.int8 DEFAULT NULL,
    strict pg_catalog.bool DEFAULT false
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_archive';
COMMENT ON FUNCTION queue_archive(pg_catalog.text, pg_catalog.int8, pg_catalog.int8, pg_catalog.bool) IS
    'finishes a message and keeps it in the queue''s archive; otherwise as queue_delete';

CREATE FUNCTION queue_archive_batch(
    queue pg_catalog.text,
    msg_ids pg_catalog.int8[],
    lease_ids pg_catalog.int8[] DEFAULT NULL,
    strict pg_catalog.bool DEFAULT false
) RETURNS SETOF pg_catalog.int8
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_archive_batch';
COMMENT ON FUNCTION queue_archive_batch(pg_catalog.text, pg_catalog.int8[], pg_catalog.int8[], pg_catalog.bool) IS
    'finishes messages and keeps them in the queue''s archive; returns the ids of those that were';

CREATE FUNCTION queue_delete_and_read(
    queue pg_catalog.text,
    msg_ids pg_catalog.int8[],
    lease_ids pg_catalog.int8[] DEFAULT NULL,
    quantity pg_catalog.int8 DEFAULT 1,
    visibility_timeout pg_catalog.interval DEFAULT NULL,
    strict pg_catalog.bool DEFAULT false,
    consumer pg_catalog.text DEFAULT NULL
) RETURNS SETOF @extschema@.queue_message
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_delete_and_read';
COMMENT ON FUNCTION queue_delete_and_read(pg_catalog.text, pg_catalog.int8[], pg_catalog.int8[], pg_catalog.int8, pg_catalog.interval, pg_catalog.bool, pg_catalog.text) IS
    'a consumer''s loop in one statement and one commit: finishes messages, then reads the next; never waits';

CREATE FUNCTION queue_retry(
    queue pg_catalog.text,
    msg_id pg_catalog.int8,
    lease_id pg_catalog.int8 DEFAULT NULL,
    error pg_catalog.text DEFAULT NULL,
    delay pg_catalog.interval DEFAULT NULL
) RETURNS TABLE (outcome pg_catalog.text, visible_at pg_catalog.timestamptz)
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_retry';
COMMENT ON FUNCTION queue_retry(pg_catalog.text, pg_catalog.int8, pg_catalog.int8, pg_catalog.text, pg_catalog.interval) IS
    'failed: delivered again after delay or the queue''s backoff (outcome retried), or after its last allowed delivery moved away (dead_lettered, archived); lost if it is not there or lease_id is lost';

CREATE FUNCTION queue_reject(
    queue pg_catalog.text,
    msg_id pg_catalog.int8,
    lease_id pg_catalog.int8 DEFAULT NULL,
    error pg_catalog.text DEFAULT NULL
) RETURNS pg_catalog.text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_reject';
COMMENT ON FUNCTION queue_reject(pg_catalog.text, pg_catalog.int8, pg_catalog.int8, pg_catalog.text) IS
    'failed for good: moved to the dead-letter queue (dead_lettered) or the archive (archived); lost if it is not there or lease_id is lost';

CREATE FUNCTION queue_release(
    queue pg_catalog.text,
    msg_ids pg_catalog.int8[],
    lease_ids pg_catalog.int8[] DEFAULT NULL,
    delay pg_catalog.interval DEFAULT NULL
) RETURNS SETOF pg_catalog.int8
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_release';
COMMENT ON FUNCTION queue_release(pg_catalog.text, pg_catalog.int8[], pg_catalog.int8[], pg_catalog.interval) IS
    'gives leased messages back, at commit, without counting the delivery; returns the ids of those that were leased';

CREATE FUNCTION queue_extend(
    queue pg_catalog.text,
    msg_id pg_catalog.int8,
    lease_id pg_catalog.int8 DEFAULT NULL,
    visibility_timeout pg_catalog.interval DEFAULT NULL
) RETURNS pg_catalog.timestamptz
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_extend';
COMMENT ON FUNCTION queue_extend(pg_catalog.text, pg_catalog.int8, pg_catalog.int8, pg_catalog.interval) IS
    'heartbeat: the lease ends visibility_timeout from now; null if it is lost; lengthening acts at once and survives rollback, shortening acts at commit';

CREATE FUNCTION queue_extend_batch(
    queue pg_catalog.text,
    msg_ids pg_catalog.int8[],
    lease_ids pg_catalog.int8[] DEFAULT NULL,
    visibility_timeout pg_catalog.interval DEFAULT NULL
) RETURNS SETOF pg_catalog.int8
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_extend_batch';
COMMENT ON FUNCTION queue_extend_batch(pg_catalog.text, pg_catalog.int8[], pg_catalog.int8[], pg_catalog.interval) IS
    'queue_extend for many; returns the ids whose leases were extended';

CREATE FUNCTION queue_cancel(
    queue pg_catalog.text,
    msg_id pg_catalog.int8
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_cancel';
COMMENT ON FUNCTION queue_cancel(pg_catalog.text, pg_catalog.int8) IS
    'deletes a message unless it is leased';

CREATE FUNCTION queue_peek(
    queue pg_catalog.text,
    quantity pg_catalog.int8 DEFAULT 10,
    msg_ids pg_catalog.int8[] DEFAULT NULL,
    state pg_catalog.text DEFAULT NULL
) RETURNS TABLE (msg_id pg_catalog.int8, lease_id pg_catalog.int8, delivery_count pg_catalog.int8, enqueued_at pg_catalog.timestamptz, lease_expires_at pg_catalog.timestamptz, priority pg_catalog.int8, group_key pg_catalog.text, last_error pg_catalog.text, headers pg_catalog.jsonb, message pg_catalog.jsonb, state pg_catalog.text, consumer pg_catalog.text, pid pg_catalog.int8, visible_at pg_catalog.timestamptz)
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_peek';
COMMENT ON FUNCTION queue_peek(pg_catalog.text, pg_catalog.int8, pg_catalog.int8[], pg_catalog.text) IS
    'looks at messages in the order of their ids, leases nothing; state is ready, delayed, leased, finishing or exhausted';

CREATE FUNCTION queue_redrive(
    dead_letter_queue pg_catalog.text,
    quantity pg_catalog.int8 DEFAULT NULL,
    target pg_catalog.text DEFAULT NULL,
    source pg_catalog.text DEFAULT NULL,
    msg_ids pg_catalog.int8[] DEFAULT NULL
) RETURNS pg_catalog.int8
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_redrive';
COMMENT ON FUNCTION queue_redrive(pg_catalog.text, pg_catalog.int8, pg_catalog.text, pg_catalog.text, pg_catalog.int8[]) IS
    'moves messages of a dead-letter queue, in the order of their ids, back to the queues they came from, or to target: at most quantity, only those from source, only msg_ids; as new messages, with the headers they had; returns how many; leaves what is leased';

CREATE FUNCTION queue_unarchive(
    queue pg_catalog.text,
    quantity pg_catalog.int8 DEFAULT NULL,
    reason pg_catalog.text DEFAULT NULL,
    msg_ids pg_catalog.int8[] DEFAULT NULL
) RETURNS pg_catalog.int8
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_unarchive';
COMMENT ON FUNCTION queue_unarchive(pg_catalog.text, pg_catalog.int8, pg_catalog.text, pg_catalog.int8[]) IS
    'moves messages from a queue''s archive back into the queue, oldest archived first: at most quantity, only those with that archive_reason, only msg_ids; as new messages, visible at once; returns how many';

CREATE FUNCTION queue_limit(
    queue pg_catalog.text,
    concurrency pg_catalog.int8 DEFAULT 0,
    rate pg_catalog.float8 DEFAULT 0,
    burst pg_catalog.int8 DEFAULT 0,
    per_group pg_catalog.bool DEFAULT false
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_unbuilt';
COMMENT ON FUNCTION queue_limit(pg_catalog.text, pg_catalog.int8, pg_catalog.float8, pg_catalog.int8, pg_catalog.bool) IS
    'not built yet: raises 0A000. Limits deliveries';

CREATE FUNCTION queue_schedule(
    queue pg_catalog.text,
    name pg_catalog.text,
    schedule pg_catalog.text,
    message pg_catalog.jsonb,
    headers pg_catalog.jsonb DEFAULT NULL,
    timezone pg_catalog.text DEFAULT 'UTC'
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_schedule';
COMMENT ON FUNCTION queue_schedule(pg_catalog.text, pg_catalog.text, pg_catalog.text, pg_catalog.jsonb, pg_catalog.jsonb, pg_catalog.text) IS
    'sends a message whenever a cron expression of five or six fields (six: second first) comes true in timezone, or at every interval from now on; on an existing name it replaces that schedule and returns false; needs TRUNCATE on the queue''s table';

CREATE FUNCTION queue_unschedule(
    queue pg_catalog.text,
    name pg_catalog.text
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_unschedule';
COMMENT ON FUNCTION queue_unschedule(pg_catalog.text, pg_catalog.text) IS
    'ends a schedule; false if there is none of that name; needs TRUNCATE on the queue''s table';

CREATE FUNCTION queue_schedule_pause(
    queue pg_catalog.text,
    name pg_catalog.text,
    paused pg_catalog.bool DEFAULT true
) RETURNS pg_catalog.bool
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_schedule_pause';
COMMENT ON FUNCTION queue_schedule_pause(pg_catalog.text, pg_catalog.text, pg_catalog.bool) IS
    'from commit on the schedule sends nothing, or with paused => false sends again, first at the next time that is due after that; true if that changed something; needs TRUNCATE on the queue''s table';

CREATE FUNCTION queue_schedules() RETURNS TABLE (queue pg_catalog.text, name pg_catalog.text, schedule pg_catalog.text, timezone pg_catalog.text, paused pg_catalog.bool, next_at pg_catalog.timestamptz, last_at pg_catalog.timestamptz, message pg_catalog.jsonb, headers pg_catalog.jsonb)
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_schedules';
COMMENT ON FUNCTION queue_schedules() IS
    'a row for each schedule of a queue that the caller may use: when it sends next (null while paused) and when it sent last; message and headers only where he may read the queue''s table, else null';

CREATE FUNCTION queue_stats(
    queue pg_catalog.text DEFAULT NULL
) RETURNS TABLE (queue pg_catalog.text, ready pg_catalog.int8, delayed pg_catalog.int8, leased pg_catalog.int8)
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_unbuilt_rows';
COMMENT ON FUNCTION queue_stats(pg_catalog.text) IS
    'not built yet: raises 0A000. Counters of a queue';

CREATE FUNCTION queue_leases(
    queue pg_catalog.text DEFAULT NULL
) RETURNS TABLE (queue pg_catalog.text, msg_id pg_catalog.int8, lease_id pg_catalog.int8)
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_unbuilt_rows';
COMMENT ON FUNCTION queue_leases(pg_catalog.text) IS
    'not built yet: raises 0A000. Who holds what';

CREATE FUNCTION queue_health() RETURNS TABLE (severity pg_catalog.text, problem pg_catalog.text, object pg_catalog.text, detail pg_catalog.text, fix_sql pg_catalog.text)
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10 AS 'MODULE_PATHNAME', 'queue_health';
COMMENT ON FUNCTION queue_health() IS
    'what is wrong right now and how to mend it, a row a problem; severity is critical or warning; nothing to tell, no row';

CREATE PROCEDURE queue_wait(
    queues pg_catalog.text[],
    timeout pg_catalog.interval,
    INOUT ready pg_catalog.text DEFAULT NULL
)
    LANGUAGE c AS 'MODULE_PATHNAME', 'queue_wait';
COMMENT ON PROCEDURE queue_wait(pg_catalog.text[], pg_catalog.interval, pg_catalog.text) IS
    'sleeps until one of the queues has something ready, and names it, or until the time is over: then null; called outside a transaction block it holds no snapshot meanwhile';
