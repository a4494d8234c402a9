-- The database of a round: three queues, the ledger, and routines in which clients send and consume.
CREATE EXTENSION pg_queue;
SELECT queue_create('exact', visibility_timeout => '2 s', max_deliveries => 0, retry_delay => '50 ms', retry_delay_max => '500 ms');
SELECT queue_create('plain', visibility_timeout => '2 s', max_deliveries => 0, retry_delay => '50 ms', retry_delay_max => '500 ms');
SELECT queue_create('durable', visibility_timeout => '2 s', max_deliveries => 0, retry_delay => '50 ms',
                    retry_delay_max => '500 ms', durable_leases => true);

-- What the exact consumers do, written in the transaction that finishes.
CREATE TABLE ledger (key bigint PRIMARY KEY, lease_id bigint NOT NULL, who text NOT NULL DEFAULT 'client');

-- Sends `kept`; sends `undone` in a block that fails and is caught.
CREATE FUNCTION send_caught(queue text, kept bigint[], undone bigint[]) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    PERFORM queue_send(queue, jsonb_build_object('k', k)) FROM unnest(kept) k;
    BEGIN
        PERFORM queue_send_batch(queue, array(SELECT jsonb_build_object('k', k) FROM unnest(undone) k));
        PERFORM 1 / 0;
    EXCEPTION WHEN division_by_zero THEN
        NULL;
    END;
    RETURN cardinality(kept);
END $$;

-- Sends each key in a subtransaction within that of the one before; from `breaks_at` on all is undone.
CREATE FUNCTION send_deep(queue text, keys bigint[], depth bigint, breaks_at bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
BEGIN
    IF depth > cardinality(keys) THEN
        RETURN 0;
    END IF;
    BEGIN
        PERFORM queue_send(queue, jsonb_build_object('k', keys[depth]));
        PERFORM send_deep(queue, keys, depth + 1, breaks_at);
        IF depth = breaks_at THEN
            PERFORM 1 / 0;
        END IF;
    EXCEPTION WHEN division_by_zero THEN
        NULL;
    END;
    RETURN depth;
END $$;

-- Sends one message in a transaction.
CREATE PROCEDURE send_committing(queue text, keys bigint[]) LANGUAGE plpgsql AS $$
DECLARE
    k bigint;
BEGIN
    FOREACH k IN ARRAY keys LOOP
        PERFORM queue_send(queue, jsonb_build_object('k', k));
        COMMIT;
    END LOOP;
END $$;

-- Consumes in a procedure: reads, and finishes with the ledger in one transaction; a failure is caught and the message
-- comes again. Nobody outside sees what it read; the ledger tells what it did.
CREATE PROCEDURE consume_committing(rounds bigint) LANGUAGE plpgsql AS $$
DECLARE
    one record;
BEGIN
    FOR n IN 1 .. rounds LOOP
        BEGIN
            FOR one IN SELECT msg_id, lease_id, (message ->> 'k')::bigint AS k FROM queue_read('exact', 2) LOOP
                INSERT INTO ledger VALUES (one.k, one.lease_id, 'procedure');
                PERFORM queue_delete('exact', one.msg_id, one.lease_id, strict => true);
            END LOOP;
        EXCEPTION WHEN no_data_found THEN
            NULL;
        END;
        IF n % 5 = 0 THEN ROLLBACK; ELSE COMMIT; END IF;
    END LOOP;
END $$;
