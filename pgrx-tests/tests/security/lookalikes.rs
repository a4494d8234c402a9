//! Objects that are named like what our statements and the install script name: in search_path, in pg_temp, in the
//! schema of the extension, before CREATE EXTENSION and at run time. And functions that are named like ours.

use super::*;
use queue_tests::{shared_cluster, shared_database};

/// A role with a schema `evil` of its own, full of what fails whoever uses it.
fn set_traps(client: &mut Client, database: &Database) -> String {
    let role = make_role(client, database, "mallory");
    client
        .batch_execute(&format!(
            "GRANT CREATE ON DATABASE {} TO {role};
             SET ROLE {role}; CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO PUBLIC; {TRAPS} RESET ROLE",
            database.name
        ))
        .unwrap();
    role
}

/// Functions, operators and types that statements of ours name.
const TRAPS: &str = r#"
    CREATE FUNCTION evil.trap() RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'a trap in search_path'; END $$;
    DO $$
    DECLARE kind text; other text; op text; f text;
    BEGIN
      FOREACH kind IN ARRAY '{bigint,int,text,name,oid,jsonb,timestamptz,interval,boolean,float8,regclass,"\"char\""}'::text[]
      LOOP
        FOREACH other IN ARRAY ARRAY[kind, 'text', 'bigint', 'int', 'interval'] LOOP
          CONTINUE WHEN to_regprocedure(format('evil.op(%s, %s)', kind, other)) IS NOT NULL;
          EXECUTE format('CREATE FUNCTION evil.op(%s, %s) RETURNS boolean LANGUAGE plpgsql AS '
            '''BEGIN PERFORM evil.trap(); RETURN true; END''', kind, other);
          FOREACH op IN ARRAY '{=,<>,<,<=,>,>=,||,->,->>,#>,#>>,?,+,-}'::text[] LOOP
            EXECUTE format('CREATE OPERATOR evil.%s (FUNCTION = evil.op, LEFTARG = %s, RIGHTARG = %s)', op, kind, other);
          END LOOP;
        END LOOP;
        FOREACH f IN ARRAY '{max,min,count,unnest,jsonb_typeof,pg_get_userbyid,pg_get_serial_sequence,format,
            pg_sequence_last_value,set_config,current_setting,starts_with,to_regprocedure,coalesce}'::text[] LOOP
          EXECUTE format('CREATE FUNCTION evil.%I(%s) RETURNS text LANGUAGE plpgsql AS '
            '''BEGIN PERFORM evil.trap(); RETURN 1; END''', f, kind);
        END LOOP;
      END LOOP;
      FOREACH f IN ARRAY '{now,clock_timestamp,current_database,current_schemas}'::text[] LOOP
        EXECUTE format('CREATE FUNCTION evil.%I() RETURNS timestamptz LANGUAGE plpgsql AS '
          '''BEGIN PERFORM evil.trap(); RETURN NULL; END''', f);
      END LOOP;
      FOREACH kind IN ARRAY '{bool,text,int8,int4,interval,timestamptz,jsonb,regclass,name,oid}'::text[] LOOP
        EXECUTE format('CREATE DOMAIN evil.%s AS pg_catalog.%1$s CHECK (VALUE IS NULL)', kind);
      END LOOP;
    END $$;"#;

#[test]
fn lookalikes_in_search_path_and_pg_temp_are_never_found() {
    let database = database_with(&[]);
    let mut client = session(&database);
    set_traps(&mut client, &database);
    // All that a careless superuser can do: the hostile schema first, hostile temporary tables.
    client
        .batch_execute(
            "CREATE TEMP TABLE queue (queue text); CREATE TEMP TABLE pg_class (oid oid);
             CREATE TEMP TABLE lease (x int); CREATE TEMP TABLE schedule (x int);
             CREATE TEMP TABLE q (x int); CREATE TEMP TABLE pg_proc (x int);
             SET search_path = evil, pg_temp, public, pg_catalog",
        )
        .unwrap();
    for trap in [
        "1::pg_catalog.int8 = 1::pg_catalog.int8",
        "'{}'::pg_catalog.jsonb -> 'a'::pg_catalog.text",
        "pg_catalog.now() + '1 s'::pg_catalog.interval",
        "count(1::pg_catalog.int8)",
        "clock_timestamp()",
        "'1'::text",
    ] {
        assert!(client.batch_execute(&format!("SELECT {trap}")).is_err(), "{trap} is a trap");
    }
    for call in [
        "queue_create('dead')",
        "queue_create('q', dead_letter_queue => 'dead', message_ttl => '1 h', archive_retention => '1 h')",
        "queue_create('q', if_not_exists => true)",
        "queue_alter('q', max_deliveries => 2, message_ttl => '2 h')",
        "queue_send('q', '1')",
        "queue_send('q', '2', '{}', '1 ms')",
        "queue_send_batch('q', '{3,4,5,6,7,8,9}')",
        "queue_send_entries('q', '[{\"message\": 10, \"delay\": \"1 ms\"}]')",
        "queue_read('q', 3)",
        "queue_read_any('{q}')",
        "queue_peek('q')",
        "queue_peek('q', msg_ids => '{1}', state => 'leased')",
        "queue_delete('q', 1)",
        "queue_archive('q', 2)",
        "queue_retry('q', 3, error => 'e', delay => '0')",
        "queue_reject('q', 4)",
        "queue_release('q', '{5}', delay => '1 ms')",
        "queue_extend('q', 5)",
        "queue_pop('q')",
        "queue_delete_and_read('q', '{6}')",
        "queue_cancel('q', 8)",
        "queue_redrive('dead')",
        "queue_unarchive('q')",
        "queue_schedule('q', 's', '1 h', '1')",
        "queue_schedule_pause('q', 's')",
        "queue_schedule_pause('q', 's', false)",
        "queue_schedules()",
        "queue_list()",
        "queue_health()",
        "queue_grant('q', 'public', 'admin')",
        "queue_revoke('q', 'public', 'admin')",
        "queue_pause('q')",
        "queue_resume('q')",
        "queue_unschedule('q', 's')",
        "queue_purge('q')",
        "queue_drop('q', true)",
    ] {
        let result = client.batch_execute(&format!("SELECT * FROM public.{call}"));
        assert!(result.is_ok(), "{call}: {result:?}");
    }
    client.batch_execute("CALL public.queue_wait('{dead}', '0')").unwrap();
}

#[test]
fn extension_is_not_installed_over_what_somebody_else_has_made() {
    for (code, squatted) in [
        ("42P06", "CREATE SCHEMA queue"),
        ("42P06", "CREATE SCHEMA queue_archive"),
        ("42P06", "CREATE SCHEMA queue_catalog"),
        ("42723", "CREATE FUNCTION public.queue_list() RETURNS text LANGUAGE sql AS 'SELECT NULL::text'"),
        ("42710", "CREATE TYPE public.queue_message AS (x int)"),
        ("42710", "CREATE DOMAIN public.queue_message AS int"),
    ] {
        let database = shared_cluster().create_bare_database().unwrap();
        let mut client = session(&database);
        let squatter = make_role(&mut client, &database, "squatter");
        client
            .batch_execute(&format!(
                "GRANT CREATE ON DATABASE {} TO {squatter}; GRANT CREATE ON SCHEMA public TO {squatter};
                 SET ROLE {squatter}; {squatted}; RESET ROLE",
                database.name
            ))
            .unwrap();
        assert_eq!(common::code(client.batch_execute("CREATE EXTENSION pg_queue")), code, "{squatted}");
        assert_eq!(number(&mut client, "SELECT count(*) FROM pg_extension WHERE extname = 'pg_queue'"), 0);
    }
}

#[test]
fn extension_installs_the_same_among_lookalikes() {
    // Types by oid: their names depend on the search_path, and pg_catalog's are the same everywhere.
    let definitions = "SELECT string_agg(x, E'\\n' ORDER BY x) FROM (
          SELECT concat_ws(' ', p.oid::regprocedure, prosrc, probin, proargtypes, provolatile, proparallel, prosecdef)
            FROM pg_depend JOIN pg_proc p ON p.oid = objid
            WHERE deptype = 'e' AND classid = 'pg_proc'::regclass
            AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_queue')
          UNION ALL SELECT concat_ws(' ', attrelid::regclass, attname, atttypid, attnotnull,
              (SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = attrelid AND adnum = attnum))
            FROM pg_attribute JOIN pg_class c ON c.oid = attrelid AND relnamespace::regnamespace::text LIKE 'queue%'
            WHERE attnum > 0 AND relkind = 'r'
        ) AS parts (x)";
    let of = |database: &Database| {
        let mut client = session(database);
        client
            .batch_execute(
                "SET search_path = pg_catalog, public; SELECT queue_create('q', message_ttl => '1 h')",
            )
            .unwrap();
        text(&mut client, definitions)
    };
    let clean = shared_database();
    let hostile = shared_cluster().create_bare_database().unwrap();
    set_traps(&mut session(&hostile), &hostile);
    let mut client = session(&hostile);
    client
        .batch_execute("SET search_path = evil, public, pg_catalog; CREATE EXTENSION pg_queue SCHEMA public")
        .unwrap();
    let expected = of(&clean);
    assert!(expected.contains("clock_timestamp"), "{expected}");
    assert_eq!(of(&hostile), expected);
}

#[test]
fn functions_that_shadow_ours_are_named_by_queue_health() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let mallory = set_traps(&mut client, &database);
    let shadowed = |client: &mut Client| -> Vec<String> {
        let found = problems(client).into_iter().filter(|(problem, _)| problem == "function_shadowed");
        found.map(|(_, fix)| fix).collect()
    };
    client
        .batch_execute(&format!(
            "SET ROLE {mallory}; CREATE SCHEMA later; GRANT USAGE ON SCHEMA later TO PUBLIC;
             CREATE FUNCTION later.queue_send(queue text, message text) RETURNS bigint LANGUAGE sql AS 'SELECT 666::bigint';
             CREATE FUNCTION later.queue_of_mine() RETURNS int LANGUAGE sql AS 'SELECT 1';
             RESET ROLE"
        ))
        .unwrap();
    assert!(shadowed(&mut client).is_empty(), "not in the path");
    client.batch_execute("SET search_path = public, later").unwrap();
    assert_eq!(number(&mut client, "queue_send('q', '1')"), 666, "though it comes last");
    assert_eq!(shadowed(&mut client), ["DROP ROUTINE later.queue_send(queue text, message text)"]);
    let fix = shadowed(&mut client).remove(0);
    client.batch_execute(&fix).unwrap();
    assert_eq!(number(&mut client, "queue_send('q', '1')"), 1);
    assert!(shadowed(&mut client).is_empty());
    // In the extension's own schema, whatever the path.
    client
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA public TO {mallory}; SET ROLE {mallory};
             CREATE FUNCTION public.queue_delete(text, int) RETURNS bool LANGUAGE sql AS 'SELECT true';
             RESET ROLE; SET search_path = ''"
        ))
        .unwrap();
    let problem = text(
        &mut client,
        "SELECT string_agg(object, ' ') FROM public.queue_health() WHERE problem = 'function_shadowed'",
    );
    assert_eq!(problem, "public.queue_delete(text, integer)");
}
