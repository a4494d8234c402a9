//! Who may call which function: every function of the extension has a row here, or the test fails. A call that is
//! denied has changed nothing. Grants on the table are the only switch, in whatever way a role comes by them.

use super::*;
use queue_tests::shared_database;
use Expect::*;

const ROLES: [&str; 20] = [
    "nobody",
    "send",
    "observe",
    "consume",
    "admin",
    "owner",
    "other",
    "monitor",
    "postgres",
    // One privilege each, on q and on dead, and the least that reads.
    "insert",
    "select",
    "update",
    "delete",
    "truncate",
    "select_update",
    // What Postgres has for all tables: pg_read_all_data, pg_write_all_data, both, pg_maintain, BYPASSRLS.
    "read_all",
    "write_all",
    "read_write_all",
    "maintain",
    "bypass",
];

/// Who may.
#[derive(Clone, Copy)]
enum Expect {
    /// These roles; all others get 42501.
    Only(&'static [&'static str]),
    /// Everybody; what it shows is another test's.
    Anybody,
    /// Nobody, whoever he is: this SQLSTATE.
    Never(&'static str),
    /// The same for those who may use the schema that it is in, [`INSIDERS`]; it is closed to all others.
    Closed(&'static str),
}

/// INSERT.
const SENDERS: Expect = Only(&["send", "owner", "postgres", "insert", "write_all", "read_write_all"]);
/// SELECT and UPDATE.
const READERS: Expect = Only(&["consume", "admin", "owner", "postgres", "select_update", "read_write_all"]);
/// DELETE.
const FINISHERS: Expect =
    Only(&["consume", "admin", "owner", "postgres", "delete", "write_all", "read_write_all"]);
/// SELECT and DELETE, with UPDATE or without it.
const CONSUMERS: Expect = Only(&["consume", "admin", "owner", "postgres", "read_write_all"]);
/// SELECT.
const OBSERVERS: Expect = Only(&[
    "observe",
    "consume",
    "admin",
    "owner",
    "postgres",
    "select",
    "select_update",
    "read_all",
    "read_write_all",
]);
/// TRUNCATE.
const ADMINS: Expect = Only(&["admin", "owner", "postgres", "truncate"]);
/// TRUNCATE, and SELECT on what is brought back.
const BRINGERS: Expect = Only(&["admin", "owner", "postgres"]);
const OWNERS: Expect = Only(&["owner", "postgres"]);
/// Whoever may read, or delete from, `theirs` as well as `q`.
const OF_ALL: Expect = Only(&["postgres", "read_write_all"]);
/// Who may use every schema there is.
const INSIDERS: [&str; 4] = ["postgres", "read_all", "write_all", "read_write_all"];

/// Function, a call that succeeds for who may, and who may. Queue `q` has messages 1 to 4 (4 in its archive, 3 in its
/// dead-letter queue `dead`) and a schedule `s`; `other` owns another queue.
const MATRIX: &[(&str, &str, Expect)] = &[
    ("queue_create", "SELECT queue_create('new')", Only(&["owner", "other", "postgres"])),
    ("queue_alter", "SELECT queue_alter('q', retry_delay => '2 s')", OWNERS),
    ("queue_drop", "SELECT queue_drop('q', force => true)", OWNERS),
    ("queue_purge", "SELECT queue_purge('q')", ADMINS),
    ("queue_pause", "SELECT queue_pause('q')", ADMINS),
    ("queue_resume", "SELECT queue_resume('q')", ADMINS),
    ("queue_list", "SELECT * FROM queue_list()", Anybody),
    ("queue_grant", "SELECT queue_grant('q', 'public', 'send')", OWNERS),
    ("queue_revoke", "SELECT queue_revoke('q', 'public', 'send')", OWNERS),
    ("queue_send", "SELECT queue_send('q', '1')", SENDERS),
    ("queue_send", "SELECT queue_send('q', '1', '{}', '1 s', ttl => '1 h')", SENDERS),
    ("queue_send_batch", "SELECT * FROM queue_send_batch('q', '{1,2}')", SENDERS),
    ("queue_send_entries", "SELECT * FROM queue_send_entries('q', '[{\"message\": 1}]')", SENDERS),
    ("queue_read", "SELECT * FROM queue_read('q')", READERS),
    ("queue_read_any", "SELECT * FROM queue_read_any('{q}')", READERS),
    // What the first queue has is given without a look at the others.
    ("queue_read_any", "SELECT * FROM queue_read_any('{q,theirs}')", OF_ALL),
    ("queue_read_any", "SELECT * FROM queue_read_any('{q,theirs}', 9)", OF_ALL),
    ("queue_read_any", "SELECT * FROM queue_read_any('{theirs,q}')", OF_ALL),
    ("queue_pop", "SELECT * FROM queue_pop('q')", CONSUMERS),
    ("queue_delete", "SELECT queue_delete('q', 1)", FINISHERS),
    ("queue_delete", "SELECT queue_delete('q', 99)", FINISHERS),
    ("queue_delete_batch", "SELECT * FROM queue_delete_batch('q', '{1,2}')", FINISHERS),
    ("queue_archive", "SELECT queue_archive('q', 1)", FINISHERS),
    ("queue_archive_batch", "SELECT * FROM queue_archive_batch('q', '{1,2}')", FINISHERS),
    ("queue_delete_and_read", "SELECT * FROM queue_delete_and_read('q', '{1}')", CONSUMERS),
    ("queue_delete_and_read", "SELECT * FROM queue_delete_and_read('q', '{}')", CONSUMERS),
    ("queue_retry", "SELECT * FROM queue_retry('q', 1)", READERS),
    ("queue_reject", "SELECT queue_reject('q', 1)", CONSUMERS),
    ("queue_release", "SELECT * FROM queue_release('q', '{1}')", READERS),
    ("queue_release", "SELECT * FROM queue_release('q', '{}', delay => '1 s')", READERS),
    ("queue_extend", "SELECT queue_extend('q', 1)", READERS),
    ("queue_extend_batch", "SELECT * FROM queue_extend_batch('q', '{1}')", READERS),
    ("queue_cancel", "SELECT queue_cancel('q', 1)", FINISHERS),
    ("queue_peek", "SELECT * FROM queue_peek('q')", OBSERVERS),
    ("queue_peek", "SELECT * FROM queue_peek('q', msg_ids => '{1}')", OBSERVERS),
    // Putting them back into q is a send.
    ("queue_redrive", "SELECT queue_redrive('dead')", OWNERS),
    ("queue_redrive", "SELECT queue_redrive('dead', msg_ids => '{99}')", BRINGERS),
    ("queue_unarchive", "SELECT queue_unarchive('q')", BRINGERS),
    ("queue_limit", "SELECT queue_limit('q')", Never("0A000")),
    ("queue_schedule", "SELECT queue_schedule('q', 'new', '1 h', '1')", ADMINS),
    ("queue_schedule", "SELECT queue_schedule('q', 's', '2 h', '1')", ADMINS),
    ("queue_unschedule", "SELECT queue_unschedule('q', 's')", ADMINS),
    ("queue_schedule_pause", "SELECT queue_schedule_pause('q', 's')", ADMINS),
    ("queue_schedules", "SELECT * FROM queue_schedules()", Anybody),
    ("queue_stats", "SELECT * FROM queue_stats('q')", Never("0A000")),
    ("queue_leases", "SELECT * FROM queue_leases('q')", Never("0A000")),
    ("queue_health", "SELECT * FROM queue_health()", Anybody),
    ("queue_wait", "CALL queue_wait('{q}', '0')", READERS),
    ("queue_wait", "CALL queue_wait('{q,theirs}', '0')", OF_ALL),
    ("queue_wait", "CALL queue_wait('{theirs,q}', '0')", OF_ALL),
    // The triggers of the queues' tables and of the schedules: not to be called as functions, by anybody.
    ("on_change", "SELECT queue.on_change()", Never("0A000")),
    ("on_schedule", "SELECT queue_catalog.on_schedule()", Closed("0A000")),
];

/// The queues and roles of the matrix; the roles' names, in the order of [`ROLES`].
fn set_up(database: &Database, client: &mut Client) -> Vec<String> {
    let name =
        |role: &str| if role == "postgres" { role.to_owned() } else { format!("{}_{role}", database.name) };
    let roles: Vec<String> = ROLES.iter().map(|role| name(role)).collect();
    for role in roles.iter().filter(|role| *role != "postgres") {
        client.batch_execute(&format!("CREATE ROLE {role}")).unwrap();
    }
    client
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA queue TO {owner}, {other};
             GRANT pg_monitor TO {monitor};
             SET ROLE {other};
             SELECT queue_create('theirs', retry_delay => '0'), queue_send('theirs', '\"theirs\"'),
               queue_schedule('theirs', 's', '1 h', '\"theirs\"');
             SET ROLE {owner};
             SELECT queue_create('dead');
             SELECT queue_create('q', dead_letter_queue => 'dead', max_deliveries => 0, retry_delay => '0');
             SELECT * FROM queue_send_batch('q', '{{1,2,3,4}}');
             SELECT queue_reject('q', 3), queue_archive('q', 4), queue_schedule('q', 's', '1 h', '\"scheduled\"');
             RESET ROLE",
            owner = name("owner"),
            other = name("other"),
            monitor = name("monitor"),
        ))
        .unwrap();
    let version = number(client, "current_setting('server_version_num')");
    client
        .batch_execute(&format!(
            "GRANT INSERT ON queue.q, queue.dead TO {insert};
             GRANT SELECT ON queue.q, queue.dead TO {select};
             GRANT UPDATE ON queue.q, queue.dead TO {update};
             GRANT DELETE ON queue.q, queue.dead TO {delete};
             GRANT TRUNCATE ON queue.q, queue.dead TO {truncate};
             GRANT SELECT, UPDATE ON queue.q, queue.dead TO {select_update};
             GRANT pg_read_all_data TO {read_all}, {both};
             GRANT pg_write_all_data TO {write_all}, {both};
             ALTER ROLE {bypass} BYPASSRLS",
            insert = name("insert"),
            read_all = name("read_all"),
            write_all = name("write_all"),
            select = name("select"),
            update = name("update"),
            delete = name("delete"),
            truncate = name("truncate"),
            select_update = name("select_update"),
            both = name("read_write_all"),
            bypass = name("bypass"),
        ))
        .unwrap();
    if version >= 170_000 {
        client.batch_execute(&format!("GRANT pg_maintain TO {}", name("maintain"))).unwrap();
    }
    for capability in ["send", "observe", "consume", "admin"] {
        for queue in ["q", "dead"] {
            client
                .execute("SELECT queue_grant($1, $2, $3)", &[&queue, &name(capability), &capability])
                .unwrap();
        }
    }
    roles
}

/// Of two pictures only the lines that differ are shown.
#[track_caller]
fn assert_unchanged(before: &str, after: &str, what: &str) {
    let only = |one: &str, other: &str| -> Vec<String> {
        one.lines().filter(|line| !other.lines().any(|l| l == *line)).map(str::to_owned).collect()
    };
    assert!(before == after, "{what}:\n- {:?}\n+ {:?}", only(before, after), only(after, before));
}

#[test]
fn every_function_is_denied_unless_granted_and_has_then_changed_nothing() {
    let database = shared_database();
    let mut client = database.connect().unwrap();
    let roles = set_up(&database, &mut client);
    let functions = client
        .query(
            "SELECT DISTINCT p.proname::text FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid \
             JOIN pg_proc p ON p.oid = d.objid WHERE e.extname = 'pg_queue' AND d.deptype = 'e' \
             AND d.refclassid = 'pg_extension'::regclass AND d.classid = 'pg_proc'::regclass \
             AND p.pronamespace::regnamespace::text <> 'queue_test'",
            &[],
        )
        .unwrap();
    for function in functions.iter().map(|row| row.get::<_, String>(0)) {
        assert!(MATRIX.iter().any(|(name, ..)| *name == function), "{function} has no row in the matrix");
    }
    assert!(MATRIX.iter().all(|(name, ..)| functions.iter().any(|row| row.get::<_, String>(0) == *name)));
    let (mut denied, mut allowed) = (0, 0);
    let mut before: Option<String> = None; // while only denied calls were made since
    for (_, call, expect) in MATRIX {
        for (kind, role) in ROLES.iter().zip(&roles) {
            let code = match expect {
                Only(who) if !who.contains(kind) => Some("42501"),
                Closed(_) if !INSIDERS.contains(kind) => Some("42501"),
                Never(code) | Closed(code) => Some(*code),
                _ => None,
            };
            if code.is_some() {
                before.get_or_insert_with(|| picture(&mut client));
            }
            client.batch_execute(&format!("BEGIN; SET LOCAL ROLE {role}")).unwrap();
            let result = client.batch_execute(call);
            match code {
                None => {
                    assert!(result.is_ok(), "{kind} may {call}: {result:?}");
                    allowed += 1;
                    client.batch_execute("ROLLBACK").unwrap();
                    before = None;
                }
                Some(code) => {
                    assert!(result.is_err(), "{kind} may not {call}");
                    assert_eq!(common::code(result), code, "{kind} may not {call}");
                    denied += 1;
                    client.batch_execute("COMMIT").unwrap(); // which rolls back, since it failed
                    assert_unchanged(
                        before.as_deref().unwrap(),
                        &picture(&mut client),
                        &format!("{kind}: {call}"),
                    );
                }
            }
        }
    }
    assert!(denied > 600 && allowed > 200, "{denied} denied, {allowed} allowed");
}

#[test]
fn call_that_is_denied_and_caught_has_changed_nothing_either() {
    let database = shared_database();
    let mut client = database.connect().unwrap();
    let roles = set_up(&database, &mut client);
    let nobody = &roles[0];
    // All in one transaction that commits: what a denied call left in the journal would come to pass.
    let before = picture(&mut client);
    let calls: String = MATRIX
        .iter()
        .filter(|(_, _, expect)| matches!(expect, Only(_)))
        .map(|(_, call, _)| {
            let call = call.strip_prefix("SELECT").map_or((*call).to_owned(), |rest| format!("PERFORM{rest}"));
            format!("BEGIN {call}; RAISE 'not denied'; EXCEPTION WHEN insufficient_privilege THEN denied := denied + 1; END;\n")
        })
        .filter(|block| !block.contains("CALL"))
        .collect();
    client
        .batch_execute(&format!(
            "BEGIN; SET LOCAL ROLE {nobody}; DO $$ DECLARE denied int := 0; BEGIN {calls} \
             ASSERT denied > 30; END $$; COMMIT"
        ))
        .unwrap();
    assert_eq!(before, picture(&mut client));
    let mut other = database.connect().unwrap();
    assert_eq!(ids(&read(&mut other, "q", 9)), [1, 2], "no lease or pin is left");
}

#[test]
fn lists_show_a_role_only_the_queues_it_may_use() {
    let database = shared_database();
    let mut client = database.connect().unwrap();
    let roles = set_up(&database, &mut client);
    let another = database_with(&["q", "elsewhere"]);
    let mut elsewhere = another.connect().unwrap();
    elsewhere
        .batch_execute("SELECT queue_send('q', '\"elsewhere\"'), queue_schedule('q', 'elsewhere', '1 h', '1')")
        .unwrap();
    client.batch_execute("UPDATE pg_class SET reltuples = 2000000 WHERE relnamespace = 'queue_archive'::regnamespace AND relkind = 'r'").unwrap();
    let list = "SELECT coalesce(string_agg(queue, ' ' ORDER BY queue), '') FROM queue_list()";
    let schedules = "SELECT coalesce(string_agg(concat_ws(':', queue, message), ' ' ORDER BY queue), '') \
                     FROM queue_schedules()";
    let health = "SELECT coalesce(string_agg(object, ' ' ORDER BY object), '') FROM queue_health() \
                  WHERE problem = 'archive_grows'";
    let both = ("dead q", "q:\"scheduled\"", "dead q");
    let sender = ("dead q", "q", "dead q");
    let expected = [
        ("", "", ""),
        sender,
        both,
        both,
        both,
        both,
        ("theirs", "theirs:\"theirs\"", "theirs"),
        ("dead q theirs", "q theirs", "dead q theirs"), // pg_monitor: the queues, no messages
        ("dead q theirs", "q:\"scheduled\" theirs:\"theirs\"", "dead q theirs"),
        sender,
        both,
        sender,
        sender,
        sender,
        both,
        ("dead q theirs", "q:\"scheduled\" theirs:\"theirs\"", "dead q theirs"),
        ("dead q theirs", "q theirs", "dead q theirs"),
        ("dead q theirs", "q:\"scheduled\" theirs:\"theirs\"", "dead q theirs"),
        ("", "", ""),
        ("", "", ""),
    ];
    for ((kind, role), expected) in ROLES.iter().zip(&roles).zip(expected) {
        let seen = as_role(&mut client, role, |client| {
            (text(client, list), text(client, schedules), text(client, health))
        });
        assert_eq!((&*seen.0, &*seen.1, &*seen.2), expected, "{kind}");
    }
    assert_eq!(text(&mut client, "SELECT string_agg(message::text, ' ') FROM queue_peek('q')"), "1 2");
    assert_eq!(code(client.batch_execute("SELECT * FROM queue_peek('elsewhere')")), "42704");
    assert_eq!(
        text(&mut elsewhere, "SELECT string_agg(message::text, ' ') FROM queue_peek('q')"),
        "\"elsewhere\""
    );
    assert_eq!(text(&mut elsewhere, list), "elsewhere q");
}

#[test]
fn membership_gives_the_groups_rights_only_where_it_is_inherited_or_taken_on() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 3);
    let team = make_role(&mut client, &database, "team");
    let member = make_role(&mut client, &database, "member");
    let reserved = make_role(&mut client, &database, "reserved");
    client
        .batch_execute(&format!(
            "ALTER ROLE {reserved} NOINHERIT; GRANT {team} TO {member}, {reserved};
             SELECT queue_grant('q', '{team}', 'consume'), queue_grant('q', '{team}', 'send')"
        ))
        .unwrap();
    let calls = ["SELECT * FROM queue_read('q')", "SELECT queue_send('q', '1')", "SELECT queue_delete('q', 1)"];
    // As sessions of their own: SET ROLE by a superuser could be anybody's.
    for (role, is_inherited) in [(&member, true), (&reserved, false)] {
        client.batch_execute(&format!("ALTER ROLE {role} LOGIN")).unwrap();
        let mut config = database.cluster.config(&database.name);
        let mut theirs = config.user(role).connect(postgres::NoTls).unwrap();
        for call in calls {
            let result = theirs.batch_execute(&format!("BEGIN; {call}"));
            assert_eq!(result.is_ok(), is_inherited, "{role}: {call}: {result:?}");
            if !is_inherited {
                assert_eq!(code(result), "42501", "{call}");
            }
            theirs.batch_execute("ROLLBACK").unwrap();
        }
        theirs.batch_execute(&format!("SET ROLE {team}")).unwrap();
        calls.iter().for_each(|call| theirs.batch_execute(&format!("BEGIN; {call}; ROLLBACK")).unwrap());
        theirs.batch_execute("RESET ROLE").unwrap();
        client.batch_execute(&format!("REVOKE {team} FROM {role}")).unwrap();
        assert_eq!(code(theirs.batch_execute(calls[0])), "42501", "{role}: revoked, in the same session");
    }
    // The switch of one membership, from 16 on.
    if number(&mut client, "current_setting('server_version_num')") >= 160_000 {
        client.batch_execute(&format!("GRANT {team} TO {member} WITH INHERIT FALSE, SET FALSE")).unwrap();
        let result = as_role(&mut client, &member, |client| client.batch_execute(calls[0]));
        assert_eq!(code(result), "42501");
    }
}

#[test]
fn function_of_its_definer_has_the_definers_rights_and_no_others() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let consumer = make_role(&mut client, &database, "consumer");
    let nobody = make_role(&mut client, &database, "nobody");
    client
        .batch_execute(&format!(
            "SELECT queue_grant('q', '{consumer}', 'consume'), queue_send('q', '1'), queue_send('q', '2');
             CREATE FUNCTION take() RETURNS bigint LANGUAGE sql SECURITY DEFINER
               AS 'SELECT msg_id FROM public.queue_read(''q'')';
             CREATE FUNCTION theirs() RETURNS bigint LANGUAGE sql SECURITY DEFINER
               AS 'SELECT msg_id FROM public.queue_read(''q'')';
             CREATE FUNCTION mine() RETURNS bigint LANGUAGE sql
               AS 'SELECT msg_id FROM public.queue_read(''q'')';
             ALTER FUNCTION take() OWNER TO {consumer}; ALTER FUNCTION theirs() OWNER TO {nobody}"
        ))
        .unwrap();
    assert_eq!(as_role(&mut client, &nobody, |client| number(client, "SELECT take()")), 1);
    assert_eq!(code(client.batch_execute("SELECT theirs()")), "42501", "even for a superuser");
    assert_eq!(code(as_role(&mut client, &nobody, |client| client.batch_execute("SELECT mine()"))), "42501");
    assert_eq!(as_role(&mut client, &consumer, |client| number(client, "SELECT mine()")), 2);
}

#[test]
fn grants_on_columns_do_not_read_and_send_as_far_as_insert_does() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let role = make_role(&mut client, &database, "columns");
    send(&mut client, "q", 1);
    client
        .batch_execute(&format!(
            "GRANT SELECT (msg_id, message), UPDATE (visible_at, delivery_count, last_error) ON queue.q TO {role};
             GRANT INSERT (message) ON queue.q TO {role}"
        ))
        .unwrap();
    let before = picture(&mut client);
    client.batch_execute(&format!("SET ROLE {role}")).unwrap();
    for call in [
        "queue_read('q')",
        "queue_pop('q')",
        "queue_peek('q')",
        "queue_retry('q', 1)",
        "queue_delete('q', 1)",
        "queue_release('q', '{1}')",
        "queue_send('q', '2')", // which writes headers and visible_at
        "queue_send_batch('q', '{2}')",
        "queue_list()",
    ] {
        let result = client.batch_execute(&format!("SELECT * FROM {call}"));
        if call == "queue_list()" {
            result.unwrap();
        } else {
            assert_eq!(code(result), "42501", "{call}");
        }
    }
    client.batch_execute("RESET ROLE").unwrap();
    assert_eq!(picture(&mut client), before);
    client.batch_execute(&format!("GRANT INSERT (headers, visible_at) ON queue.q TO {role}")).unwrap();
    as_role(&mut client, &role, |client| {
        client
            .batch_execute("SELECT queue_send('q', '2'); SELECT * FROM queue_send_batch('q', '{3}')")
            .unwrap();
        let result = client.batch_execute("SELECT queue_send('q', '4', ttl => '1 h')");
        assert_eq!(code(result), "42501", "expires_at is not granted");
    });
}

#[test]
fn owner_who_gave_up_a_right_does_not_have_it() {
    let database = shared_database();
    let mut client = session(&database);
    let owner = make_role(&mut client, &database, "owner");
    client
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA queue TO {owner}; SET ROLE {owner};
             SELECT queue_create('q'), queue_send('q', '1');
             REVOKE ALL ON queue.q FROM {owner}"
        ))
        .unwrap();
    for call in [
        "SELECT queue_send('q', '1')",
        "SELECT * FROM queue_read('q')",
        "SELECT queue_delete('q', 1)",
        "SELECT queue_purge('q')",
        "SELECT queue_schedule('q', 's', '1 h', '1')",
    ] {
        assert_eq!(code(client.batch_execute(call)), "42501", "{call}");
    }
    client.batch_execute("SELECT queue_alter('q', max_deliveries => 3), queue_drop('q', true)").unwrap();
}

#[test]
fn tablespace_that_a_role_may_not_use_is_not_used_for_its_queue() {
    let database = shared_database();
    let mut client = session(&database);
    let role = make_role(&mut client, &database, "maker");
    let space = format!("{}_space", database.name);
    client
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA queue, public TO {role}; SET allow_in_place_tablespaces = on"
        ))
        .unwrap();
    client.batch_execute(&format!("CREATE TABLESPACE {space} LOCATION ''")).unwrap();
    client.batch_execute(&format!("SET default_tablespace = {space}; SET ROLE {role}")).unwrap();
    for call in
        ["CREATE TABLE plain ()", "SELECT queue_create('q')", "SELECT queue_create('q', unlogged => true)"]
    {
        assert_eq!(code(client.batch_execute(call)), "42501", "{call}");
    }
    client.batch_execute("RESET ROLE").unwrap();
    client.batch_execute(&format!("GRANT CREATE ON TABLESPACE {space} TO {role}")).unwrap();
    as_role(&mut client, &role, |client| client.batch_execute("SELECT queue_create('q')").unwrap());
    let used = "SELECT string_agg(DISTINCT spcname, ' ') FROM pg_class c JOIN pg_tablespace t ON t.oid = reltablespace \
                WHERE relnamespace = 'queue'::regnamespace AND relkind = 'r'";
    assert_eq!(text(&mut client, used), space);
    client.batch_execute(&format!("SELECT queue_drop('q'); DROP OWNED BY {role}")).unwrap();
    client.batch_execute(&format!("DROP TABLESPACE {space}")).unwrap();
}
