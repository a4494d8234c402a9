-- The database of a round: three queues, the ledger, and routines in which clients send and consume.
CREATE EXTENSION pg_queue;
SELECT queue_create('exact', visibility_timeout => '2 s', max_deliveries => 0, retry_delay => '50 ms', retry_delay_max => '500 ms');
SELECT queue_create('plain', visibility_timeout => '2 s', max_deliveries => 0, retry_delay => '50 ms', retry_delay_max => '500 ms');
SELECT queue_create('durable', visibility_timeout => '2 s', max_deliveries => 0, retry_delay => '50 ms',
                    retry_delay_max => '500 ms', durable_leases => true);

-- What the exact consumers do, written in the transaction that finishes.
CREATE TABLE ledger (key bigint PRIMARY KEY, lease_id bigint NOT NULL, who text NOT NULL DEFAULT 'client');

-- What is sent under a key: of twenty one has 10 to 20 kB that do not compress, and headers. (senders.rs has them too.)
CREATE FUNCTION sha(of text) RETURNS text IMMUTABLE LANGUAGE sql
    AS $$ SELECT encode(sha256(convert_to(of, 'UTF8')), 'hex') $$;
CREATE FUNCTION message_of(k bigint) RETURNS jsonb IMMUTABLE LANGUAGE sql AS $$
    SELECT CASE WHEN k % 20 = 7
        THEN jsonb_build_object('k', k, 'text',
            (SELECT string_agg(sha(k || ' ' || n), '' ORDER BY n) FROM generate_series(1, 157 + k % 157) n))
        ELSE jsonb_build_object('k', k) END $$;
CREATE FUNCTION headers_of(k bigint) RETURNS jsonb IMMUTABLE LANGUAGE sql
    AS $$ SELECT CASE WHEN k % 20 = 7 THEN jsonb_build_object('hash', sha(k::text)) END $$;
CREATE FUNCTION is_altered(message jsonb, headers jsonb) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$
    SELECT message IS DISTINCT FROM message_of((message ->> 'k')::bigint)
        OR headers IS DISTINCT FROM headers_of((message ->> 'k')::bigint) $$;

-- Sends `kept`; sends `undone` in a block that fails and is caught.
CREATE FUNCTION send_caught(queue text, kept bigint[], undone bigint[]) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    PERFORM queue_send(queue, message_of(k), headers_of(k)) FROM unnest(kept) k;
    BEGIN
        PERFORM queue_send_batch(queue, array(SELECT message_of(k) FROM unnest(undone) k));
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
        PERFORM queue_send(queue, message_of(keys[depth]), headers_of(keys[depth]));
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
        PERFORM queue_send(queue, message_of(k), headers_of(k));
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
            FOR one IN SELECT msg_id, lease_id, (message ->> 'k')::bigint AS k, message, headers
                       FROM queue_read('exact', 2) LOOP
                IF is_altered(one.message, one.headers) THEN
                    RAISE '% was altered: %, %', one.k, one.message, one.headers;
                END IF;
                INSERT INTO ledger VALUES (one.k, one.lease_id, 'procedure');
                PERFORM queue_delete('exact', one.msg_id, one.lease_id, strict => true);
            END LOOP;
        EXCEPTION WHEN no_data_found THEN
            NULL;
        END;
        IF n % 5 = 0 THEN ROLLBACK; ELSE COMMIT; END IF;
    END LOOP;
END $$;

-- Reads, writes the ledger and finishes: one message in a subtransaction within that of the one before; from `breaks_at`
-- on all is undone. Returns what stays.
CREATE TYPE taken AS (msg_id bigint, lease_id bigint, delivery_count bigint, k bigint, queue text, altered boolean);
CREATE FUNCTION finish_deep(depth bigint, deepest bigint, breaks_at bigint) RETURNS taken[] LANGUAGE plpgsql AS $$
DECLARE
    one taken;
    deeper taken[];
BEGIN
    IF depth > deepest THEN
        RETURN '{}';
    END IF;
    BEGIN
        SELECT msg_id, lease_id, delivery_count, (message ->> 'k')::bigint, 'exact', is_altered(message, headers)
            INTO one FROM queue_read('exact');
        IF one.msg_id IS NULL THEN
            RETURN '{}';
        END IF;
        INSERT INTO ledger VALUES (one.k, one.lease_id, 'pop');
        PERFORM queue_delete('exact', one.msg_id, one.lease_id, strict => true);
        deeper := finish_deep(depth + 1, deepest, breaks_at);
        IF depth = breaks_at THEN
            PERFORM 1 / 0;
        END IF;
        RETURN one || deeper;
    EXCEPTION WHEN division_by_zero THEN
        RETURN '{}';
    END;
END $$;

-- A queue whose messages die, and its accounts: what was sent and what was finished, each written in that transaction.
SELECT queue_create('dead', max_deliveries => 0);
SELECT queue_create('mortal', visibility_timeout => '300 ms', max_deliveries => 3, dead_letter_queue => 'dead',
                    retry_delay => '20 ms', retry_delay_max => '100 ms');
CREATE SEQUENCE mortal_key;
CREATE TABLE mortal_sent (k bigint PRIMARY KEY);
CREATE TABLE mortal_finished (k bigint PRIMARY KEY);
CREATE VIEW mortal_accounts AS
    SELECT k, (count(*) FILTER (WHERE place = 'sent')) AS sent, (count(*) FILTER (WHERE place <> 'sent')) AS places,
           string_agg(place, ' and ' ORDER BY place) FILTER (WHERE place <> 'sent') AS which
    FROM (SELECT k, 'sent' AS place FROM mortal_sent
          UNION ALL SELECT k, 'finished' FROM mortal_finished
          UNION ALL SELECT (message ->> 'k')::bigint, 'left' FROM queue.mortal
          UNION ALL SELECT (message ->> 'k')::bigint, 'dead, ' || (headers -> 'dead_letter' ->> 'reason') FROM queue.dead
          UNION ALL SELECT (message ->> 'k')::bigint, 'archived, ' || coalesce(archive_reason, '?') FROM queue_archive.mortal) AS all_places
    GROUP BY k;

-- One in four does not live long.
CREATE FUNCTION send_mortal(messages bigint) RETURNS bigint LANGUAGE sql AS $$
    WITH new AS MATERIALIZED (SELECT nextval('mortal_key') AS k FROM generate_series(1, messages)),
         sent AS (INSERT INTO mortal_sent SELECT k FROM new)
    SELECT count(queue_send('mortal', jsonb_build_object('k', k), ttl => CASE WHEN k % 4 = 0 THEN interval '400 ms' END))
    FROM new $$;

-- choice 0: all are finished; others: finished, retried, rejected, or left to their leases.
CREATE FUNCTION consume_mortal(quantity bigint, choice bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    one record;
    done bigint := 0;
BEGIN
    FOR one IN SELECT msg_id, lease_id, (message ->> 'k')::bigint AS k FROM queue_read('mortal', quantity) LOOP
        CASE WHEN choice = 0 OR (choice + one.msg_id) % 4 = 0 THEN
            INSERT INTO mortal_finished VALUES (one.k);
            PERFORM queue_delete('mortal', one.msg_id, one.lease_id, strict => true);
        WHEN (choice + one.msg_id) % 4 = 1 THEN
            PERFORM queue_retry('mortal', one.msg_id, one.lease_id, 'again');
        WHEN (choice + one.msg_id) % 8 = 2 THEN
            PERFORM queue_reject('mortal', one.msg_id, one.lease_id, 'bad');
        ELSE
            NULL;
        END CASE;
        done := done + 1;
    END LOOP;
    RETURN done;
END $$;
