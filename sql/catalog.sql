-- The extension's own schemas and tables. Functions are in functions.sql.

CREATE SCHEMA queue;
COMMENT ON SCHEMA queue IS 'pg_queue: one table for each queue, named like it';
CREATE SCHEMA queue_archive;
COMMENT ON SCHEMA queue_archive IS 'pg_queue: one table for each queue''s archive';
CREATE SCHEMA queue_catalog;
COMMENT ON SCHEMA queue_catalog IS 'pg_queue: settings and state, written by the extension only';
-- Reveals nothing: what is in these schemas has its own grants.
GRANT USAGE ON SCHEMA queue, queue_archive TO PUBLIC;

CREATE TABLE queue_catalog.queue (
    queue pg_catalog.regclass PRIMARY KEY,
    archive pg_catalog.regclass NOT NULL,
    visibility_timeout pg_catalog.interval NOT NULL,
    max_deliveries pg_catalog.int8 NOT NULL,
    dead_letter_queue pg_catalog.regclass,
    retry_delay pg_catalog.interval NOT NULL,
    retry_backoff pg_catalog.float8 NOT NULL,
    retry_delay_max pg_catalog.interval NOT NULL,
    retry_jitter pg_catalog.float8 NOT NULL,
    require_lease pg_catalog.bool NOT NULL,
    paused pg_catalog.bool NOT NULL DEFAULT false,
    message_ttl pg_catalog.interval NOT NULL,
    archive_retention pg_catalog.interval NOT NULL,
    durable_leases pg_catalog.bool NOT NULL,
    created_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.now()
);
COMMENT ON TABLE queue_catalog.queue IS 'the queues and their settings; changed by queue_create, queue_alter, queue_drop, queue_pause and queue_resume';
COMMENT ON COLUMN queue_catalog.queue.queue IS 'the queue''s table';
COMMENT ON COLUMN queue_catalog.queue.archive IS 'its archive''s table, - if that was dropped';
COMMENT ON COLUMN queue_catalog.queue.dead_letter_queue IS 'the table of its dead-letter queue, null for none';
-- Not what a plain DROP TABLE has left: a regclass whose table is gone is dumped as a number, which in the restored
-- database may be that of any table. (What refers to an archive or a dead-letter queue is changed when that is dropped.
-- Should something be left all the same, it must keep no queue from being restored: nothing is unique but the table.)
SELECT pg_catalog.pg_extension_config_dump('queue_catalog.queue',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid OPERATOR(pg_catalog.=) queue::pg_catalog.oid)');

-- Rows are rewritten as leases are extended; all that changes is in no index.
CREATE TABLE queue_catalog.lease (
    queue pg_catalog.oid NOT NULL,
    msg_id pg_catalog.int8 NOT NULL,
    lease_id pg_catalog.int8 NOT NULL,
    delivery_count pg_catalog.int4 NOT NULL,
    leased_at pg_catalog.timestamptz NOT NULL,
    until pg_catalog.timestamptz,
    PRIMARY KEY (queue, msg_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
COMMENT ON TABLE queue_catalog.lease IS 'leases that outlived pg_queue.lease_flush_interval, so that they survive a crash; written by the worker, read when a queue is first used after a start';
COMMENT ON COLUMN queue_catalog.lease.queue IS 'the queue''s table';
COMMENT ON COLUMN queue_catalog.lease.until IS 'when the lease ends; null while the transaction that took it is open: then only the delivery counts';

CREATE TABLE queue_catalog.prepared (
    queue pg_catalog.regclass NOT NULL,
    msg_id pg_catalog.int8 NOT NULL
);
-- It has no unique key, and must not refuse deletions where all tables are published.
ALTER TABLE queue_catalog.prepared REPLICA IDENTITY FULL;
COMMENT ON TABLE queue_catalog.prepared IS 'what prepared transactions sent: for each queue the lowest message id; read and deleted by the worker once they are committed';

CREATE TABLE queue_catalog.schedule (
    queue pg_catalog.regclass NOT NULL,
    name pg_catalog.text NOT NULL,
    schedule pg_catalog.text NOT NULL,
    timezone pg_catalog.text NOT NULL,
    message pg_catalog.jsonb NOT NULL,
    headers pg_catalog.jsonb,
    paused pg_catalog.bool NOT NULL DEFAULT false,
    created_at pg_catalog.timestamptz NOT NULL,
    next_at pg_catalog.timestamptz NOT NULL,
    last_at pg_catalog.timestamptz,
    PRIMARY KEY (queue, name)
);
COMMENT ON TABLE queue_catalog.schedule IS 'what the worker sends on a schedule; changed by queue_schedule, queue_unschedule and queue_schedule_pause, and by the worker when it sends';
COMMENT ON COLUMN queue_catalog.schedule.queue IS 'the queue''s table';
COMMENT ON COLUMN queue_catalog.schedule.schedule IS 'a cron expression or an interval, as it was given';
COMMENT ON COLUMN queue_catalog.schedule.timezone IS 'the IANA name of the time zone that a cron expression is about';
COMMENT ON COLUMN queue_catalog.schedule.created_at IS 'since when the schedule has been what it is: an interval is counted from here';
COMMENT ON COLUMN queue_catalog.schedule.next_at IS 'when it sends next; of no meaning while it is paused';
COMMENT ON COLUMN queue_catalog.schedule.last_at IS 'when it sent last, null if it has not yet';
SELECT pg_catalog.pg_extension_config_dump('queue_catalog.schedule',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid OPERATOR(pg_catalog.=) queue::pg_catalog.oid)');

CREATE FUNCTION queue_catalog.on_schedule() RETURNS pg_catalog.trigger
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_on_schedule';
COMMENT ON FUNCTION queue_catalog.on_schedule() IS 'the trigger on queue_catalog.schedule: has the worker look at the schedules, at commit, whoever changed them (a restore, say)';
CREATE TRIGGER pg_queue_schedule AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON queue_catalog.schedule
    FOR EACH STATEMENT EXECUTE FUNCTION queue_catalog.on_schedule();
ALTER TABLE queue_catalog.schedule ENABLE ALWAYS TRIGGER pg_queue_schedule;

CREATE FUNCTION queue.on_change() RETURNS pg_catalog.trigger
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'queue_on_change';
COMMENT ON FUNCTION queue.on_change() IS 'the trigger on every queue''s table: tells the dispatcher, at commit, of rows that plain SQL wrote';

-- This setting exists only where the library was preloaded.
DO $$
BEGIN
    IF pg_catalog.current_setting('pg_queue.max_messages', true) IS NULL THEN
        RAISE WARNING 'pg_queue is not loaded by the server: its functions will not work yet'
            USING HINT = 'Add the line "shared_preload_libraries = ''pg_queue''" to postgresql.conf and restart the server.';
    END IF;
END
$$;
