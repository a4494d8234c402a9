//! Copies of a database: dumped and restored in every format, whole and in parts, into this version and from older
//! ones; backed up with the server at work, and recovered to a moment. Whatever can be compared before and after is
//! compared to the byte (`inventory`).

mod common;
mod inventory;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use common::*;
use inventory::load::{self, Load};
use inventory::{furnish, Inventory, Leases};
use queue_tests::{wait_until, Cluster, ClusterOptions, Database, PgTree, StopMode};

/// A furnished database on `cluster`, the leases that somebody holds in it, and what it held when nobody used it.
fn furnished(cluster: &Cluster) -> (Database<'_>, Vec<Delivery>, Inventory) {
    let database = cluster.create_database().unwrap();
    furnish(&database);
    let mut client = session(&database);
    let held = read_for(&mut client, "many", 3, "1 h");
    assert_eq!(held.len(), 3);
    wait_written(&mut client, "many", &sorted(ids(&held)));
    let inventory = Inventory::take(&mut client, Leases::Left);
    (database, held, inventory)
}

/// The restored database is the old one, served by its worker; leases stayed behind; ids go on after all that ever were.
#[track_caller]
fn assert_restored(to: &Database, before: &Inventory, held: &[Delivery], how: &str) {
    let mut client = session(to);
    Inventory::take(&mut client, Leases::Left).assert_same(before, how);
    worker_pid(to);
    let leases: i64 = client.query_one("SELECT count(*) FROM queue_catalog.lease", &[]).unwrap().get(0);
    assert_eq!(leases, 0, "{how}: leases do not travel");
    for delivery in held {
        assert!(!delete(&mut client, "many", delivery), "{how}: a lease of the original");
        assert_eq!(state(&mut client, "many", delivery.msg_id).as_deref(), Some("ready"), "{how}");
    }
    // 203 were given, the last two to messages that are gone.
    let next = send(&mut client, "many", 1);
    assert!(next > 203, "{how}: id {next} has been another message's");
    assert_eq!(send(&mut client, "empty", 1), 1, "{how}");
    // What plain SQL does is noticed, and the worker sees to what is due.
    create(&mut client, &["q"]);
    works(to);
    client.batch_execute("INSERT INTO queue.empty (message) VALUES ('2')").unwrap();
    assert_eq!(drain(&mut client, "empty"), [1, 2], "{how}");
    assert_eq!(drain(&mut client, "many").len(), 180 + 1, "{how}");
    assert!(read(&mut client, "paused", 1).is_empty(), "{how}");
    client.batch_execute("SELECT queue_drop('q', force => true)").unwrap();
}

/// A directory for a dump, which the server's user may write.
fn scratch(cluster: &Cluster, name: &str) -> PathBuf {
    let path = cluster.directory().join(name);
    assert!(cluster.user.command("mkdir").arg(&path).status().unwrap().success());
    path
}

#[test]
fn dump_of_every_format_restores_to_the_same() {
    let cluster = queue_tests::shared_cluster();
    let (from, held, before) = furnished(cluster);
    let psql = ["-X", "-q", "-v", "ON_ERROR_STOP=1"];
    let restore = ["--exit-on-error"];
    let ways: [(&str, &[&str], &str, &[&str]); 3] = [
        ("plain", &["-Fp"], "psql", &psql),
        ("custom", &["-Fc"], "pg_restore", &restore),
        ("tar", &["-Ft"], "pg_restore", &restore),
    ];
    for (how, format, restore, args) in ways {
        let dump = program(cluster, "pg_dump", &[format, &[&from.name]].concat(), b"");
        let to = cluster.create_bare_database().unwrap();
        program(cluster, restore, &[args, &["-d", &to.name]].concat(), &dump);
        assert_restored(&to, &before, &held, how);
    }
    let directory = scratch(cluster, "parallel");
    let path = directory.join("dump").display().to_string();
    program(cluster, "pg_dump", &["-Fd", "-j", "3", "-f", &path, &from.name], b"");
    let to = cluster.create_bare_database().unwrap();
    program(cluster, "pg_restore", &["--exit-on-error", "-j", "3", "-d", &to.name, &path], b"");
    assert_restored(&to, &before, &held, "directory, in parallel");
    // The original still knows of its leases.
    let mut client = session(&from);
    assert!(held.iter().all(|delivery| delete(&mut client, "many", delivery)));
}

#[test]
fn dump_in_two_parts_restores_to_the_same() {
    let cluster = queue_tests::shared_cluster();
    let (from, held, before) = furnished(cluster);
    let schema = program(cluster, "pg_dump", &["-Fc", "--schema-only", &from.name], b"");
    let data = program(cluster, "pg_dump", &["-Fc", "--data-only", &from.name], b"");
    let to = cluster.create_bare_database().unwrap();
    program(cluster, "pg_restore", &["--exit-on-error", "-d", &to.name], &schema);
    // The tables are there, the settings are data: no queues yet, and nothing that thinks they were.
    let mut client = session(&to);
    assert_eq!(rows(&mut client, "many"), 0);
    assert!(client.query("SELECT FROM queue_list()", &[]).unwrap().is_empty());
    assert_eq!(code(try_send(&mut client, "many", 1)), "42704");
    assert_eq!(code(try_read(&mut client, "many", 1, None, "0")), "42704");
    worker_pid(&to);
    program(cluster, "pg_restore", &["--exit-on-error", "-d", &to.name], &data);
    assert_restored(&to, &before, &held, "schema, then data");
}

#[test]
fn restored_message_expires_though_nobody_uses_its_queue() {
    let cluster = queue_tests::shared_cluster();
    let from = cluster.create_database().unwrap();
    let mut client = session(&from);
    create(&mut client, &["mortal"]);
    // One that has it.
    let dump = queue_tests::wait_until_some("it is dumped before it expires", || {
        client.batch_execute("SELECT queue_purge('mortal'), queue_send('mortal', '1', ttl => '5 s')").unwrap();
        let dump = program(cluster, "pg_dump", &["-Fc", &from.name], b"");
        (rows(&mut client, "mortal") == 1).then_some(dump)
    });
    let to = cluster.create_bare_database().unwrap();
    // The worker looks before the indexes are there.
    for section in ["pre-data", "data", "post-data"] {
        let section = format!("--section={section}");
        program(cluster, "pg_restore", &["--exit-on-error", &section, "-d", &to.name], &dump);
        to.wait_until_backend_waits(worker_pid(&to), "Extension", None);
    }
    let mut client = session(&to);
    queue_tests::wait_until("it is gone", || rows(&mut client, "mortal") == 0);
}

#[test]
fn dump_that_cleans_replaces_what_is_there() {
    let cluster = queue_tests::shared_cluster();
    let (from, held, before) = furnished(cluster);
    let dump = program(cluster, "pg_dump", &["-Fc", &from.name], b"");
    let to = cluster.create_database().unwrap();
    let mut client = session(&to);
    // Other queues under the same names, in use; their leases and ids are others.
    create(&mut client, &["many", "empty", "paused"]);
    send_many(&mut client, "many", 500);
    read(&mut client, "many", 10);
    program(cluster, "pg_restore", &["--clean", "--if-exists", "--exit-on-error", "-d", &to.name], &dump);
    assert_restored(&to, &before, &held, "--clean");
    // Over itself, with a reader that sleeps meanwhile. He is no obstacle, and hears that his queue is gone, or that it
    // is half gone: pg_restore drops a table's parts one by one.
    let reading = reader_asleep(&to, "empty");
    program(cluster, "pg_restore", &["--clean", "--if-exists", "--exit-on-error", "-d", &to.name], &dump);
    let (_, outcome) = reading.join().unwrap();
    match outcome {
        Ok(got) => assert!(got.is_empty(), "{got:?}"),
        Err(error) => {
            let code = error.code().map(|code| code.code());
            assert!(matches!(code, Some("42704" | "55000")), "{error:?}");
        }
    }
    assert_restored(&to, &before, &held, "--clean once more");
}

#[test]
fn restore_without_the_sequence_gives_no_id_twice() {
    let cluster = queue_tests::shared_cluster();
    let (from, to) = (database_with(&["q"]), database_with(&["q"]));
    let mut client = session(&from);
    let sent = send_many(&mut client, "q", 300);
    client.execute("SELECT queue_archive('q', $1)", &[sent.last().unwrap()]).unwrap();
    let tables = ["-t", "queue.q", "-t", "queue_archive.q"];
    let dump =
        program(cluster, "pg_dump", &[&["-Fc", "--data-only"], &tables[..], &[&from.name]].concat(), b"");
    program(cluster, "pg_restore", &["--data-only", "-t", "q", "-d", &to.name], &dump);
    let mut client = session(&to);
    worker_pid(&to);
    read(&mut client, "q", 1); // the first use
    wait_until("the identity is past the highest id of queue and archive", || {
        let sql = "SELECT coalesce(last_value, 0) >= 300 FROM pg_sequences WHERE schemaname = 'queue'";
        client.query_one(sql, &[]).unwrap().get(0)
    });
    assert_eq!(send(&mut client, "q", 1), 301);
}

#[test]
fn dump_knows_nothing_of_queues_whose_tables_were_dropped() {
    let cluster = queue_tests::shared_cluster();
    let from = database_with(&["gone", "kept"]);
    let mut client = session(&from);
    client
        .batch_execute(
            "SELECT queue_schedule('gone', 'never', '900 days', '1'), queue_schedule('kept', 'rare', '900 days', '1');
             DROP TABLE queue.gone",
        )
        .unwrap();
    // A regclass whose table is gone is dumped as a number, which means any table that has it over there.
    let dump = program(cluster, "pg_dump", &["-Fc", &from.name], b"");
    let to = cluster.create_bare_database().unwrap();
    program(cluster, "pg_restore", &["--exit-on-error", "-d", &to.name], &dump);
    let mut client = session(&to);
    for table in ["queue", "schedule"] {
        let sql = format!("SELECT queue::oid::regclass::text FROM queue_catalog.{table}");
        let queues: Vec<String> = client.query(&sql, &[]).unwrap().iter().map(|row| row.get(0)).collect();
        assert_eq!(queues, ["queue.kept"], "{table}");
    }
}

/// Consistent however much goes on meanwhile: what a dump holds is what one moment had.
#[test]
fn dump_under_load_is_of_one_moment() {
    let cluster = queue_tests::shared_cluster();
    let from = cluster.create_database().unwrap();
    let load = Load::start(&from);
    let before = load.turns();
    let dump = program(cluster, "pg_dump", &["-Fc", &from.name], b"");
    load.wait_busy();
    assert!(load.turns() > before, "it was under load");
    load.stop(&from);
    let to = cluster.create_bare_database().unwrap();
    program(cluster, "pg_restore", &["--exit-on-error", "-d", &to.name], &dump);
    let mut client = session(&to);
    let highest: i64 = client.query_one("SELECT max(n) FROM load_sent", &[]).unwrap().get(0);
    let in_dump = load::check(&mut client);
    assert!(send(&mut client, "load", 0) > highest);
    assert!(load::check(&mut session(&from)) > in_dump, "more came after it");
}

// ---- From older versions --------------------------------------------------------------------------------------

/// Runs a program of `tree` on a server of any version.
fn program_of(
    tree: &PgTree,
    cluster: &Cluster,
    name: &str,
    args: &[&str],
    input: &[u8],
) -> Result<Vec<u8>, String> {
    let mut child = cluster
        .user
        .command(tree.program(name))
        .arg("-h")
        .arg(cluster.directory())
        .args(["-U", "postgres"])
        .args(args)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).ok());
        child.wait_with_output().unwrap()
    });
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("{name}: {said}"))
    }
}

/// Written where the test runner does not keep it from who looks on.
fn tell(what: &str) {
    std::io::stderr().write_all(format!("{what}\n").as_bytes()).unwrap();
}

#[test]
#[ignore = "needs two PostgreSQLs: `cargo xtask test` runs it where it tests two versions or more"]
fn dump_of_every_older_version_restores_to_the_same() {
    let tree = PgTree::from_env().unwrap();
    let new = ClusterOptions::default().start_on(tree.clone()).unwrap();
    // Roles belong to the server.
    furnish(&new.create_database().unwrap());
    for old_tree in PgTree::old_from_env().unwrap() {
        let old = ClusterOptions::default().start_on(old_tree.clone()).unwrap();
        let (from, held, before) = furnished(&old);
        // (how it is dumped, what restores it with which arguments)
        let ways: [(&str, &str, &[&str]); 2] = [
            ("-Fp", "psql", &["-X", "-q", "-v", "ON_ERROR_STOP=1"]),
            ("-Fc", "pg_restore", &["--exit-on-error"]),
        ];
        for (format, restore, args) in ways {
            // The newer pg_dump is the one to take; see `oldest_upgradable` in workers.rs for why it may not do.
            let restored = [&tree, &old_tree].into_iter().find_map(|dumper| {
                let dump = program_of(dumper, &old, "pg_dump", &[format, &from.name], b"").unwrap();
                let to = new.create_bare_database().unwrap();
                match program_of(&tree, &new, restore, &[args, &["-d", &to.name]].concat(), &dump) {
                    Ok(_) => Some((to, dumper)),
                    Err(error) => {
                        tell(&format!(
                            "a dump {format} of {} by {} is refused by {}: {}",
                            old_tree.version,
                            dumper.version,
                            tree.version,
                            error.lines().next().unwrap_or_default()
                        ));
                        assert!(error.contains("pg_attver"), "for another reason than the known one");
                        None
                    }
                }
            });
            let (to, dumper) = restored.expect("one of both dumps can be restored");
            let (from, by, into) = (&old_tree.version, &dumper.version, &tree.version);
            let how = format!("from {from} by pg_dump {format} of {by} into {into}");
            assert_restored(&to, &before, &held, &how);
            tell(&how);
        }
    }
}

// ---- Recovery to a moment -------------------------------------------------------------------------------------

fn add_settings(cluster: &Cluster, lines: &str) {
    let path = cluster.data().join("postgresql.conf");
    OpenOptions::new().append(true).open(path).unwrap().write_all(lines.as_bytes()).unwrap();
}

/// A backup that recovers from `archive` until `target`, a line of settings, and is then a server like any other.
fn recovered(backup: Cluster, archive: &Path, target: &str) -> Cluster {
    add_settings(
        &backup,
        &format!(
            "restore_command = 'cp {}/%f %p'\nrecovery_target_action = promote\nhot_standby = on\n{target}\n",
            archive.display()
        ),
    );
    let signal = backup.data().join("recovery.signal");
    std::fs::write(&signal, "").unwrap();
    backup.user.own(&signal).unwrap();
    backup.start().unwrap();
    let mut client = backup.connect("postgres").unwrap();
    wait_until("the recovery is over", || {
        !client.query_one("SELECT pg_is_in_recovery()", &[]).unwrap().get::<_, bool>(0)
    });
    backup
}

#[test]
fn backup_under_load_recovers_to_any_moment() {
    let place = tempfile::Builder::new().prefix("pgq-archive-").tempdir_in("/tmp").unwrap();
    let archive = place.path();
    let primary = ClusterOptions::default()
        .set("archive_mode", "on")
        .set("archive_command", &format!("test ! -f {0}/%f && cp %p {0}/%f", archive.display()))
        .create_on(PgTree::from_env().unwrap())
        .unwrap();
    primary.user.own(archive).unwrap();
    primary.start().unwrap();
    let (quiet, held, _) = furnished(&primary);
    let busy = primary.create_database().unwrap();
    let load = Load::start(&busy);
    let turns = load.turns();
    let backups = [(); 2].map(|()| ClusterOptions::default().create_backup_of(&primary).unwrap());
    assert!(load.turns() > turns, "it was backed up under load");

    // What must be there afterwards: this, which was committed before; nothing that comes later.
    let mut client = session(&quiet);
    let last = send(&mut client, "empty", 7);
    let late = read_for(&mut client, "many", 1, "1 h");
    wait_written(&mut client, "many", &sorted([ids(&held), ids(&late)].concat()));
    let before = Inventory::take(&mut client, Leases::Written).without_ids();
    load.wait_busy();
    let moment: String = client.query_one("SELECT clock_timestamp()::text", &[]).unwrap().get(0);
    client.batch_execute("SELECT pg_create_restore_point('the moment')").unwrap();
    load.wait_busy();
    send(&mut client, "empty", 8);
    assert!(held.iter().all(|delivery| delete(&mut client, "many", delivery)));
    client
        .batch_execute(
            "SELECT queue_alter('dead', visibility_timeout => '1 s'), queue_resume('paused'), queue_create('new'),
                    queue_unschedule('many', 'yearly'), queue_drop('Odd \"name\"', force => true),
                    queue_revoke('many', 'life_app', 'admin')",
        )
        .unwrap();
    let after = Inventory::take(&mut client, Leases::Written).without_ids();
    assert_ne!(after.differences(&before), "", "a recovery that goes too far is seen");
    load.stop(&busy);
    let all = load::check(&mut session(&busy));
    let wal: String = client.query_one("SELECT pg_walfile_name(pg_switch_wal())", &[]).unwrap().get(0);
    wait_until("the WAL is in the archive", || archive.join(&wal).exists());
    drop(client);
    primary.stop(StopMode::Fast).unwrap();

    let targets =
        ["recovery_target_name = 'the moment'".to_owned(), format!("recovery_target_time = '{moment}'")];
    for (backup, target) in backups.into_iter().zip(targets) {
        let server = recovered(backup, archive, &target);
        let [quiet, busy] =
            [&quiet, &busy].map(|database| Database { cluster: &server, name: database.name.clone() });
        let mut client = session(&quiet);
        Inventory::take(&mut client, Leases::Written).without_ids().assert_same(&before, &target);
        // Leases that were written hold as over any crash: nobody else gets the message, whoever held it may finish.
        worker_pid(&quiet);
        for delivery in held.iter().chain(&late) {
            assert_eq!(state(&mut client, "many", delivery.msg_id).as_deref(), Some("leased"), "{target}");
        }
        let others = read(&mut client, "many", 1_000);
        assert_eq!(others.len(), 180 - 4, "{target}");
        assert!(held.iter().chain(&late).all(|delivery| delete(&mut client, "many", delivery)), "{target}");
        assert!(others.iter().all(|other| held.iter().all(|held| held.lease_id != other.lease_id)));
        assert_eq!(read_one(&mut client, "empty").message, 7, "{target}");
        let next = send(&mut client, "empty", 9);
        assert!(next > last, "{target}: id {next} after {last}");
        create(&mut client, &["q"]);
        works(&quiet);
        // Of the load every message up to the moment is there once, done or to be done.
        worker_pid(&busy);
        let mut client = session(&busy);
        let highest: i64 = client.query_one("SELECT max(n) FROM load_sent", &[]).unwrap().get(0);
        let then = load::check(&mut client);
        assert!(then < all, "{target}: {then} of {all}");
        assert!(send(&mut client, "load", 0) > highest, "{target}");
    }
}
