//! The extension's own life: updated from an older version, dropped and made again. What an update ends with is what a
//! fresh install has, object by object: definitions, grants, comments, what pg_dump goes by.
//!
//! Scripts of versions that never were are put into the tree while a test runs, under names that are this process's
//! own and nobody's default; the scripts that are there stay as they are.

mod common;
mod inventory;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use common::*;
use inventory::{copied, furnish, Inventory, Leases};
use postgres::Client;
use queue_tests::{skipped, wait_until, PgTree};

/// The version that is built here.
const NOW: &str = env!("CARGO_PKG_VERSION");

/// Written where the test runner does not keep it from who looks on.
fn tell(what: &str) {
    std::io::stderr().write_all(format!("{what}\n").as_bytes()).unwrap();
}

// ---- What an extension consists of ----------------------------------------------------------------------------

/// Every member of the extension with all that an update script could have forgotten, a line each, by names. Without
/// what only test builds have.
fn members(client: &mut Client) -> Vec<String> {
    let text = copied(client, MEMBERS);
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    assert!(lines.len() > 100, "{} lines", lines.len());
    lines
}

/// Lines that only one of both has.
fn difference(one: &[String], other: &[String]) -> String {
    let only = |of: &[String], not: &[String], sign: &str| -> Vec<String> {
        of.iter().filter(|line| !not.contains(line)).map(|line| format!("{sign} {line}")).collect()
    };
    [only(one, other, "-"), only(other, one, "+")].concat().join("\n")
}

const MEMBERS: &str = "
    WITH member AS (
        SELECT d.classid, d.objid, i.type, i.identity
        FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND d.refclassid = 'pg_extension'::regclass,
             pg_identify_object(d.classid, d.objid, 0) i
        WHERE d.deptype = 'e' AND extname = 'pg_queue' AND coalesce(i.schema, i.name) <> 'queue_test'),
    relation AS (SELECT c.*, identity FROM member JOIN pg_class c ON c.oid = objid AND classid = 'pg_class'::regclass)
    SELECT 'member', type, identity, obj_description(objid, classid::regclass::name) FROM member
    UNION ALL
    SELECT 'function', identity, pg_get_functiondef(objid), proowner::regrole::text || coalesce(proacl::text, '')
    FROM member JOIN pg_proc p ON p.oid = objid AND classid = 'pg_proc'::regclass
    UNION ALL
    SELECT 'schema', identity, nspacl::text, nspowner::regrole::text
    FROM member JOIN pg_namespace n ON n.oid = objid AND classid = 'pg_namespace'::regclass
    UNION ALL
    SELECT 'type', identity, typtype::text || typcategory::text, coalesce(typacl::text, '')
    FROM member JOIN pg_type t ON t.oid = objid AND classid = 'pg_type'::regclass
    UNION ALL
    SELECT 'relation', identity, relkind::text || relpersistence::text || relreplident::text || relrowsecurity::text,
           concat_ws('/', relowner::regrole, relacl, (SELECT array_agg(o ORDER BY o) FROM unnest(reloptions) o))
    FROM relation
    UNION ALL
    SELECT 'column', format('%s.%s', c.oid::regclass, attname),
           concat_ws('/', format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated, attstorage, attacl,
               pg_get_expr(adbin, adrelid),
               (SELECT count(*) FROM pg_attribute b WHERE b.attrelid = a.attrelid AND b.attnum BETWEEN 1 AND a.attnum
                AND NOT b.attisdropped)),
           col_description(c.oid, attnum)
    FROM pg_class c JOIN pg_attribute a ON attrelid = c.oid AND attnum > 0 AND NOT attisdropped
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE c.oid IN (SELECT oid FROM relation UNION ALL
                    SELECT typrelid FROM member JOIN pg_type t ON t.oid = objid AND classid = 'pg_type'::regclass)
    UNION ALL
    SELECT 'index', pg_get_indexdef(indexrelid), indisprimary::text || indisvalid::text || indisreplident::text,
           obj_description(indexrelid, 'pg_class')
    FROM relation JOIN pg_index ON indrelid = relation.oid
    UNION ALL
    SELECT 'constraint', format('%s %s', identity, conname), pg_get_constraintdef(o.oid), convalidated::text
    FROM relation JOIN pg_constraint o ON conrelid = relation.oid
    UNION ALL
    SELECT 'trigger', identity, pg_get_triggerdef(t.oid), tgenabled::text
    FROM relation JOIN pg_trigger t ON tgrelid = relation.oid WHERE NOT tgisinternal
    UNION ALL
    SELECT 'dumped', c::regclass::text, condition, NULL
    FROM pg_extension, unnest(extconfig, extcondition) AS x (c, condition) WHERE extname = 'pg_queue'
    UNION ALL
    SELECT 'privileges at first', identity, p.privtype::text, p.initprivs::text
    FROM member JOIN pg_init_privs p ON p.objoid = objid AND p.classoid = classid AND objsubid = 0";

// ---- Scripts --------------------------------------------------------------------------------------------------

/// Scripts in the tree, as long as this lives.
struct Scripts {
    directory: PathBuf,
    files: Vec<PathBuf>,
}

impl Scripts {
    fn new(tree: &PgTree) -> Self {
        Self { directory: tree.sharedir.join("extension"), files: Vec::new() }
    }

    /// The install script of the version that is the default.
    fn fresh(&self) -> String {
        fs::read_to_string(self.directory.join(format!("pg_queue--{NOW}.sql"))).unwrap()
    }

    fn add(&mut self, versions: &str, sql: &str) {
        let path = self.directory.join(format!("pg_queue--{versions}.sql"));
        assert!(!path.exists(), "{}", path.display());
        self.files.push(path.clone());
        fs::write(path, sql).unwrap();
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        for file in &self.files {
            if let Err(error) = fs::remove_file(file) {
                eprintln!("cannot remove {}: {error}", file.display());
            }
        }
    }
}

/// One difference between an older version and this one: what of the script is replaced, by what, and the statements
/// that an update makes up for it with.
struct Step {
    now: String,
    was: String,
    update: String,
}

impl Step {
    fn new(now: &str, was: &str, update: &str) -> Self {
        Self { now: now.to_owned(), was: was.to_owned(), update: update.to_owned() }
    }
}

/// From `begin` to the end of the statement that `last` begins, which comes after it.
fn statements<'a>(script: &'a str, begin: &str, last: &str) -> &'a str {
    let from = script.find(begin).unwrap_or_else(|| panic!("no {begin:?} in the script"));
    let last = from + script[from..].find(last).unwrap_or_else(|| panic!("no {last:?} in the script"));
    let end = last + script[last..].find(";\n").unwrap() + 2;
    &script[from..end]
}

/// One of each kind of thing that an update may have to do.
fn steps(script: &str) -> Vec<Step> {
    let health = statements(script, "CREATE FUNCTION queue_health()", "COMMENT ON FUNCTION queue_health");
    let peek = statements(script, "CREATE FUNCTION queue_peek(", "COMMENT ON FUNCTION queue_peek");
    let dumped = statements(
        script,
        "SELECT pg_catalog.pg_extension_config_dump('queue_catalog.schedule'",
        "SELECT pg_catalog.pg_extension_config_dump('queue_catalog.schedule'",
    );
    let usage = "GRANT USAGE ON SCHEMA queue, queue_archive TO PUBLIC;\n";
    let comment = statements(script, "COMMENT ON COLUMN queue_catalog.lease.until", "COMMENT ON COLUMN");
    let always = "ALTER TABLE queue_catalog.schedule ENABLE ALWAYS TRIGGER pg_queue_schedule;\n";
    let identity = "ALTER TABLE queue_catalog.prepared REPLICA IDENTITY FULL;\n";
    let last = "    last_at pg_catalog.timestamptz,\n";
    let not_null = "    created_at pg_catalog.timestamptz NOT NULL,\n    next_at";
    let drop_peek =
        "DROP FUNCTION @extschema@.queue_peek(pg_catalog.text, pg_catalog.int8, pg_catalog.int8[], pg_catalog.text);\n";
    vec![
        Step::new(health, "", health),
        Step::new(peek, &peek.replace("DEFAULT 10", "DEFAULT 5"), &format!("{drop_peek}{peek}")),
        Step::new(dumped, "", dumped),
        Step::new(usage, "", usage),
        Step::new(comment, "", comment),
        Step::new(always, "", always),
        Step::new(identity, "", identity),
        Step::new(
            last,
            &format!("{last}    note pg_catalog.text,\n"),
            "ALTER TABLE queue_catalog.schedule DROP COLUMN note;\n",
        ),
        Step::new(
            not_null,
            "    created_at pg_catalog.timestamptz,\n    next_at",
            "ALTER TABLE queue_catalog.schedule ALTER created_at SET NOT NULL;\n",
        ),
        Step::new(
            "CREATE FUNCTION queue_pause(",
            "CREATE FUNCTION queue_obsolete() RETURNS pg_catalog.int4 LANGUAGE sql AS 'SELECT 1';\n\
             CREATE FUNCTION queue_pause(",
            "DROP FUNCTION @extschema@.queue_obsolete();\n",
        ),
    ]
}

/// The install script of a version before this one.
fn older(script: &str, steps: &[Step]) -> String {
    steps.iter().fold(script.to_owned(), |script, step| {
        assert_eq!(script.matches(step.now.as_str()).count(), 1, "{:?} in the script", step.now);
        script.replace(&step.now, &step.was)
    })
}

// ---- ALTER EXTENSION UPDATE -----------------------------------------------------------------------------------

/// An older version in the tree, and the update from it to this one.
fn add_older(scripts: &mut Scripts, steps: &[Step], name: &str) -> String {
    let (script, old) = (scripts.fresh(), format!("0.0.9.{name}{}", std::process::id()));
    scripts.add(&old, &older(&script, steps));
    let whole: String = steps.iter().map(|step| step.update.as_str()).collect();
    scripts.add(&format!("{old}--{NOW}"), &whole);
    old
}

#[test]
fn update_from_an_older_version_ends_with_what_a_fresh_install_has() {
    let cluster = queue_tests::shared_cluster();
    let mut scripts = Scripts::new(&cluster.tree);
    let steps = steps(&scripts.fresh());
    let old = add_older(&mut scripts, &steps, "whole");
    // Updates that forget one thing each: that is seen, or the comparison is worth nothing.
    let forgetful: Vec<String> = (0..steps.len())
        .map(|forgotten| {
            let version = format!("{NOW}.minus{forgotten}.test{}", std::process::id());
            let rest = steps.iter().enumerate().filter(|(n, _)| *n != forgotten);
            let sql: String = rest.map(|(_, step)| step.update.as_str()).collect();
            scripts.add(&format!("{old}--{version}"), &sql);
            version
        })
        .collect();
    let fresh = members(&mut session(&database_with(&[])));
    let database = cluster.create_bare_database().unwrap();
    let mut client = session(&database);
    client.batch_execute(&format!("CREATE EXTENSION pg_queue VERSION '{old}'")).unwrap();
    assert_ne!(members(&mut client), fresh);
    for (version, step) in forgetful.iter().zip(&steps) {
        client.batch_execute(&format!("BEGIN; ALTER EXTENSION pg_queue UPDATE TO '{version}'")).unwrap();
        assert_ne!(difference(&fresh, &members(&mut client)), "", "forgotten and not seen: {}", step.update);
        client.batch_execute("ROLLBACK").unwrap();
    }
    client.batch_execute("ALTER EXTENSION pg_queue UPDATE").unwrap();
    assert_eq!(difference(&fresh, &members(&mut client)), "");
}

/// A grant on what was there before is no step here: Postgres then takes all grants on it for the extension's own, also
/// those that an administrator has made, and pg_dump leaves them out. No update may have one.
#[test]
fn update_of_a_database_in_use_keeps_all_that_is_in_it() {
    let cluster = queue_tests::shared_cluster();
    let mut scripts = Scripts::new(&cluster.tree);
    let mut steps = steps(&scripts.fresh());
    steps.retain(|step| !step.update.starts_with("GRANT"));
    let old = add_older(&mut scripts, &steps, "used");
    let database = cluster.create_bare_database().unwrap();
    let mut client = session(&database);
    client.batch_execute(&format!("CREATE EXTENSION pg_queue VERSION '{old}'")).unwrap();
    furnish(&database);
    create(&mut client, &["q"]);
    let held = read_for(&mut client, "many", 2, "1 h");
    // He waits for longer than the update and two inventories take.
    let reading = session(&database).run_with(|client| try_read(client, "q", 1, None, "60 s")).unwrap();
    database.wait_until_backend_waits(reading.pid(), "Extension", None);
    let version = |client: &mut Client| -> String {
        let sql = "SELECT extversion FROM pg_extension WHERE extname = 'pg_queue'";
        client.query_one(sql, &[]).unwrap().get(0)
    };
    assert_eq!(version(&mut client), old);
    wait_written(&mut client, "many", &sorted(ids(&held)));
    let mut before = Inventory::take(&mut client, Leases::Written);
    client.batch_execute("ALTER EXTENSION pg_queue UPDATE").unwrap();
    assert_eq!(version(&mut client), NOW);
    let mut after = Inventory::take(&mut client, Leases::Written);
    // What the update itself changes: the version, a trigger, a column, functions.
    before.change("extension", |line| line.replace(&old, NOW));
    before.change("triggers", |line| match line.strip_suffix("\tO") {
        Some(rest) if line.contains("TRIGGER pg_queue_schedule ") => format!("{rest}\tA"),
        _ => line.to_owned(),
    });
    before.change("schedules as they are kept", |line| line.replace("\"note\": null, ", ""));
    for inventory in [&mut before, &mut after] {
        let changed = ["queue_health(", "queue_peek(", "queue_obsolete("];
        inventory.change("grants on functions", |line| {
            if changed.iter().any(|function| line.starts_with(function)) {
                String::new()
            } else {
                line.to_owned()
            }
        });
    }
    after.assert_same(&before, "updated");
    // Who waits waits on, and leases are those that they were.
    let sent = send(&mut client, "q", 1);
    let (mut reader, got) = joined(reading);
    assert_eq!(ids(&got), [sent]);
    assert!(delete(&mut reader, "q", &got[0]));
    assert!(held.iter().all(|delivery| delete(&mut client, "many", delivery)));
    works(&database);
    // What is dumped from here is what this version restores.
    let before = Inventory::take(&mut client, Leases::Left);
    let dump = program(cluster, "pg_dump", &["-Fc", &database.name], b"");
    let copy = cluster.create_bare_database().unwrap();
    program(cluster, "pg_restore", &["--exit-on-error", "-d", &copy.name], &dump);
    let mut restored = session(&copy);
    Inventory::take(&mut restored, Leases::Left).assert_same(&before, "dumped after an update");
    assert_eq!(difference(&members(&mut client), &members(&mut restored)), "");
}

/// How the scripts of released versions are checked, from the first release on: `sql/pg_queue--A--B.sql` is an update,
/// `sql/pg_queue--A.sql` what version A was installed by, kept to be updated from. Every version that is there must come
/// to what a fresh install has.
#[test]
fn every_released_version_updates_to_what_a_fresh_install_has() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("sql");
    let (mut installs, mut updates) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(&directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some(versions) = name.strip_prefix("pg_queue--").and_then(|rest| rest.strip_suffix(".sql")) else {
            continue;
        };
        match versions.split_once("--") {
            Some((from, to)) => updates.push((from.to_owned(), to.to_owned(), path)),
            None => installs.push((versions.to_owned(), path)),
        }
    }
    for (from, to, path) in &updates {
        assert!(
            installs.iter().any(|(version, _)| version == from),
            "{} updates version {from}, of which there is no sql/pg_queue--{from}.sql to begin with",
            path.display()
        );
        assert!(
            to == NOW || updates.iter().any(|(after, _, _)| after == to),
            "{} ends at {to}, from where no script leads to {NOW}",
            path.display()
        );
    }
    for (version, path) in &installs {
        assert_ne!(version, NOW, "{}: the install script of this version is made, not kept", path.display());
        assert!(updates.iter().any(|(from, _, _)| from == version), "nothing updates version {version}");
    }
    if installs.is_empty() {
        skipped("updates from released versions", "there are none: sql/ holds no pg_queue--*.sql");
        return;
    }
    let cluster = queue_tests::shared_cluster();
    let fresh = members(&mut session(&database_with(&[])));
    let tree = cluster.tree.sharedir.join("extension");
    for path in installs.iter().map(|(_, path)| path).chain(updates.iter().map(|(_, _, path)| path)) {
        let installed = tree.join(path.file_name().unwrap());
        assert_eq!(
            fs::read(&installed).ok(),
            fs::read(path).ok(),
            "{} is installed as it is",
            installed.display()
        );
    }
    for (version, _) in &installs {
        let database = cluster.create_bare_database().unwrap();
        let mut client = session(&database);
        client
            .batch_execute(&format!(
                "CREATE EXTENSION pg_queue VERSION '{version}'; SELECT queue_create('q'), queue_send('q', '1');
                 ALTER EXTENSION pg_queue UPDATE"
            ))
            .unwrap();
        assert_eq!(difference(&fresh, &members(&mut client)), "", "from {version}");
        assert_eq!(drain(&mut client, "q"), [1], "from {version}");
        works(&database);
    }
    tell(&format!("updated from {} released versions", installs.len()));
}

// ---- DROP EXTENSION -------------------------------------------------------------------------------------------

/// DROP EXTENSION takes the schemas with all that is in them (refused without CASCADE, see life.rs). Who wants to keep
/// messages takes the tables elsewhere first, and puts the rows back into queues that he makes anew.
#[test]
fn messages_taken_out_of_the_schema_outlive_the_extension() {
    let database = database_with(&["q", "lost"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 100);
    send_delayed(&mut client, "q", "1 day");
    let held = read_for(&mut client, "q", 10, "1 h");
    let kept = "SELECT to_jsonb(m) FROM %.q m ORDER BY msg_id";
    let before = copied(&mut client, &kept.replace('%', "queue"));
    client
        .batch_execute(
            "CREATE SCHEMA kept; ALTER TABLE queue.q SET SCHEMA kept; DROP EXTENSION pg_queue CASCADE",
        )
        .unwrap();
    assert_eq!(copied(&mut client, &kept.replace('%', "kept")), before);
    // It is a table like any other now: nothing of ours is on it.
    client
        .batch_execute("UPDATE kept.q SET last_error = NULL; INSERT INTO kept.q (message) VALUES ('102')")
        .unwrap();
    client.batch_execute("DELETE FROM kept.q WHERE msg_id = 102; CREATE EXTENSION pg_queue").unwrap();
    assert_eq!(code(try_read(&mut client, "q", 1, None, "0")), "42704");
    create(&mut client, &["q"]);
    worker_pid(&database);
    let columns = "msg_id, enqueued_at, visible_at, delivery_count, priority, group_key, headers, message, last_error, expires_at";
    client.batch_execute(&format!("INSERT INTO queue.q ({columns}) SELECT {columns} FROM kept.q")).unwrap();
    assert_eq!(copied(&mut client, &kept.replace('%', "queue")), before);
    assert_eq!(state(&mut client, "q", 101).as_deref(), Some("delayed"));
    assert!(!delete(&mut client, "q", &held[0]), "leases are not kept");
    assert_eq!(drain(&mut client, "q").len(), 100);
    wait_until("ids go on", || {
        let sql = "SELECT coalesce(last_value, 0) >= 101 FROM pg_sequences WHERE schemaname = 'queue'";
        client.query_one(sql, &[]).unwrap().get(0)
    });
    assert_eq!(send(&mut client, "q", 1), 102);
}
