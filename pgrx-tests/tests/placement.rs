//! Where queues lie and whose they are: moved to other tablespaces, with their database or by themselves, under load;
//! given to another owner; owned by roles that are reassigned or dropped. Nothing is lost, nobody stands in the way.

mod common;
mod inventory;

use std::time::{Duration, Instant};

use common::*;
use inventory::load::{self, Load};
use inventory::{furnish, Inventory, Leases};
use queue_tests::{wait_until, wait_until_some, Cluster, Database};

/// How often what depends on the moment is repeated: `cargo xtask test --long` sets it.
fn rounds() -> usize {
    std::env::var("PG_QUEUE_TEST_ROUNDS").map_or(2, |text| text.parse().unwrap())
}

/// How long a statement may take that needs the database for itself, beyond what moving its files takes.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Exhausted messages that a worker is given: more than it moves before the database is wanted, for each takes it two
/// milliseconds.
const BACKLOG: i64 = 10_000;

/// A tablespace within the cluster's own directory.
fn make_tablespace(cluster: &Cluster, name: &str) {
    let path = cluster.directory().join(name);
    assert!(cluster.user.command("mkdir").arg(&path).status().unwrap().success());
    let sql = format!("CREATE TABLESPACE {name} LOCATION '{}'", path.display());
    cluster.connect("postgres").unwrap().batch_execute(&sql).unwrap();
}

// ---- Tablespaces ----------------------------------------------------------------------------------------------

#[test]
fn queue_moves_to_another_tablespace_under_load() {
    let cluster = Cluster::start_new().unwrap();
    make_tablespace(&cluster, "elsewhere");
    let database = cluster.create_database().unwrap();
    furnish(&database);
    let mut client = session(&database);
    let kept = read_for(&mut client, "many", 3, "1 h");
    wait_written(&mut client, "many", &sorted(ids(&kept)));
    let whole = Inventory::take(&mut client, Leases::Written);
    create(&mut client, &["q"]);
    let load = Load::start(&database);
    let sent = send_many(&mut client, "q", 1_000);
    let held = read_for(&mut client, "q", 100, "1 h");
    let later = send_delayed(&mut client, "q", "1 h");
    let node = |client: &mut postgres::Client, table: &str| -> i64 {
        let sql = "SELECT pg_relation_filenode($1::text::regclass)::int8";
        client.query_one(sql, &[&table]).unwrap().get(0)
    };
    for round in 0..rounds() {
        for space in ["elsewhere", "pg_default"] {
            let before = [node(&mut client, "queue.q"), node(&mut client, "queue.load")];
            let turns = load.turns();
            // Table by table with its indexes, and all at once: neither resets anything.
            if round % 2 == 0 {
                client
                    .batch_execute(&format!(
                        "DO $$ DECLARE r record; BEGIN
                             FOR r IN SELECT c.oid::regclass AS name, relkind FROM pg_class c
                                 WHERE relkind IN ('r', 'i')
                                   AND relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace) LOOP
                                 EXECUTE format('ALTER %s %s SET TABLESPACE {space}',
                                                CASE r.relkind WHEN 'r' THEN 'TABLE' ELSE 'INDEX' END, r.name);
                                 COMMIT;
                             END LOOP;
                         END $$"
                    ))
                    .unwrap();
            } else {
                let from = if space == "elsewhere" { "pg_default" } else { "elsewhere" };
                // It locks all tables at once, in no order that those at work know of: a deadlock ends it, as any.
                let move_all = format!(
                    "ALTER TABLE ALL IN TABLESPACE {from} SET TABLESPACE {space};
                     ALTER INDEX ALL IN TABLESPACE {from} SET TABLESPACE {space}"
                );
                queue_tests::wait_until("all are moved", || match client.batch_execute(&move_all) {
                    Ok(()) => true,
                    Err(error) if error.code().is_some_and(|code| code.code() == "40P01") => false,
                    Err(error) => panic!("{error:?}"),
                });
            }
            let after = [node(&mut client, "queue.q"), node(&mut client, "queue.load")];
            assert!(before.iter().zip(&after).all(|(before, after)| before != after), "both moved");
            load.wait_busy();
            assert!(load.turns() > turns);
            assert!(extend(&mut client, "q", &held[0], "1 h").is_some(), "leases stay");
        }
    }
    drop(client);
    load.stop(&database);
    let mut client = session(&database);
    assert_eq!(state(&mut client, "q", later).as_deref(), Some("delayed"));
    assert_eq!(drain(&mut client, "q"), sent[100..]);
    assert!(held.iter().all(|delivery| delete(&mut client, "q", delivery)));
    load::check(&mut client);
    client.batch_execute("SELECT queue_drop('q', true), queue_drop('load', true)").unwrap();
    wait_written(&mut client, "many", &sorted(ids(&kept)));
    Inventory::take(&mut client, Leases::Written).assert_same(&whole, "moved");
    assert!(kept.iter().all(|delivery| delete(&mut client, "many", delivery)));
    assert!(!cluster.log().contains("could not read"));
}

#[test]
fn database_moves_to_another_tablespace_with_its_worker_at_work() {
    let cluster = Cluster::start_new().unwrap();
    make_tablespace(&cluster, "elsewhere");
    let mut admin = cluster.connect("postgres").unwrap();
    let database = cluster.create_database().unwrap();
    furnish(&database);
    let before = Inventory::take(&mut session(&database), Leases::Left);
    session(&database)
        .batch_execute(
            "SELECT queue_create('b_dead');
             SELECT queue_create('b', max_deliveries => 1, dead_letter_queue => 'b_dead');
             CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql
                 AS 'BEGIN PERFORM pg_sleep(0.002); RETURN OLD; END';
             CREATE TRIGGER slow BEFORE DELETE ON queue.b FOR EACH ROW EXECUTE FUNCTION slow()",
        )
        .unwrap();
    // Each time: what moving it took, and what it takes without a worker, which is Postgres' own. One of them is to be as
    // it should: in others the machine may have been kept, or the disk.
    let mut took: Vec<(Duration, Duration)> = Vec::new();
    let is_at_once = |(took, plain): &(Duration, Duration)| *took < AT_ONCE + 3 * *plain;
    let mut load = Some(Load::start(&database));
    while took.len() < rounds() || took.len() < rounds() + 5 && !took.iter().any(is_at_once) {
        let running = load.take().unwrap_or_else(|| Load::go_on(&database));
        let mut client = session(&database);
        client.batch_execute("TRUNCATE queue.b, queue.b_dead").unwrap();
        send_many(&mut client, "b", BACKLOG);
        drop(client);
        running.stop(&database);
        let mut client = session(&database);
        let mut delivered = 0;
        wait_until("the backlog is delivered", || {
            let got = read_for(&mut client, "b", BACKLOG, "1 h");
            end_leases(&mut client, "b", &got);
            delivered += got.len() as i64;
            delivered == BACKLOG
        });
        let pid = client.pid();
        drop(client);
        wait_until("nobody but the worker is in it", || {
            admin.query("SELECT FROM pg_stat_activity WHERE pid = $1", &[&pid]).unwrap().is_empty()
        });
        let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_queue worker' AND datname = $1
                   AND state = 'active' AND query = 'moving exhausted messages'";
        let worker: i32 = wait_until_some("the worker moves what is exhausted", || {
            admin.query_opt(sql, &[&database.name]).unwrap().map(|row| row.get(0))
        });
        let begun = Instant::now();
        admin.batch_execute(&format!("ALTER DATABASE {} SET TABLESPACE elsewhere", database.name)).unwrap();
        let with_worker = begun.elapsed();
        let mut client = session(&database);
        assert_ne!(worker_pid(&database), worker);
        let moved = rows(&mut client, "b_dead");
        let both = "SELECT (SELECT count(*) FROM queue.b) + (SELECT count(*) FROM queue.b_dead)";
        assert_eq!(client.query_one(both, &[]).unwrap().get::<_, i64>(0), BACKLOG, "in neither, or in both");
        wait_until("it goes on where it was", || {
            let now = rows(&mut client, "b_dead");
            now > moved || now == BACKLOG
        });
        drop(client);
        set_worker(&database, false);
        wait_until("nobody is in it", || {
            let sql = "SELECT FROM pg_stat_activity WHERE datname = $1";
            admin.query(sql, &[&database.name]).unwrap().is_empty()
        });
        let begun = Instant::now();
        admin.batch_execute(&format!("ALTER DATABASE {} SET TABLESPACE pg_default", database.name)).unwrap();
        took.push((with_worker, begun.elapsed()));
        set_worker(&database, true);
    }
    assert!(took.iter().any(is_at_once), "with the worker at work, and without: {took:?}");
    let mut client = session(&database);
    load::check(&mut client);
    client
        .batch_execute(
            "SELECT queue_drop('b', true), queue_drop('b_dead', true), queue_drop('load', true);
             DROP FUNCTION slow()",
        )
        .unwrap();
    Inventory::take(&mut client, Leases::Left).assert_same(&before, "moved");
    create(&mut client, &["q"]);
    works(&database);
}

// ---- Owners ---------------------------------------------------------------------------------------------------

/// Makes roles of these names, each to be dropped with the cluster.
fn make_roles(database: &Database, names: &[&str]) {
    let mut client = session(database);
    for name in names {
        client.batch_execute(&format!("CREATE ROLE {name}; GRANT CREATE ON SCHEMA queue TO {name}")).unwrap();
    }
}

/// Everything that a queue's owner's rights are needed for: archiving, dying, expiring, a schedule, settings.
#[track_caller]
fn works_as_owned(client: &mut queue_tests::Session, owner: &str, how: &str) {
    let owners: Vec<String> = client
        .query(
            "SELECT DISTINCT relowner::regrole::text FROM pg_class
             WHERE oid IN ('queue.mine'::regclass, 'queue_archive.mine'::regclass)",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(owners, [owner], "{how}: of queue and archive");
    let archived = |client: &mut queue_tests::Session| rows_of(client, "queue_archive.mine");
    let before = archived(client);
    client.batch_execute(&format!("SET ROLE {owner}")).unwrap();
    let first = send(client, "mine", 1);
    let got = read_one(client, "mine");
    assert_eq!(got.msg_id, first, "{how}");
    client.execute("SELECT queue_archive('mine', $1, $2)", &[&got.msg_id, &got.lease_id]).unwrap();
    client.batch_execute("SELECT queue_alter('mine', visibility_timeout => '40 s')").unwrap();
    client.batch_execute("RESET ROLE").unwrap();
    // The worker moves it, as the owner.
    send(client, "mine", 2);
    exhaust(client, "mine", 1);
    wait_until(&format!("{how}: the worker has archived what is exhausted"), || archived(client) == before + 2);
}

fn rows_of(client: &mut postgres::Client, table: &str) -> i64 {
    client.query_one(&format!("SELECT count(*) FROM {table}"), &[]).unwrap().get(0)
}

#[test]
fn queue_goes_to_another_owner_with_its_archive() {
    let cluster = Cluster::start_new().unwrap();
    let database = cluster.create_database().unwrap();
    make_roles(&database, &["one", "two", "three"]);
    let mut client = session(&database);
    client.batch_execute("SET ROLE one; SELECT queue_create('mine', max_deliveries => 1); RESET ROLE").unwrap();
    worker_pid(&database);
    works_as_owned(&mut client, "one", "made");
    client.batch_execute("ALTER TABLE queue.mine OWNER TO two").unwrap();
    works_as_owned(&mut client, "two", "ALTER TABLE ... OWNER TO");
    client.batch_execute("BEGIN; ALTER TABLE queue.mine OWNER TO three; ROLLBACK").unwrap();
    works_as_owned(&mut client, "two", "rolled back");
    client.batch_execute("REASSIGN OWNED BY two TO three").unwrap();
    works_as_owned(&mut client, "three", "REASSIGN OWNED");
    client.batch_execute(&format!("ALTER DATABASE {} OWNER TO three", database.name)).unwrap();
    works_as_owned(&mut client, "three", "ALTER DATABASE ... OWNER TO");
    let result = client.batch_execute("DROP ROLE three");
    assert_eq!(code(result), "2BP01", "who owns a queue is not dropped");
}

#[test]
fn drop_owned_takes_queues_like_any_table() {
    let cluster = Cluster::start_new().unwrap();
    let database = database_on(&cluster, &["q", "others"]);
    make_roles(&database, &["leaver"]);
    let mut client = session(&database);
    client
        .batch_execute(
            "SELECT queue_grant('others', 'leaver', 'consume');
             SET ROLE leaver;
             SELECT queue_create('theirs_dead'), queue_create('theirs', dead_letter_queue => 'theirs_dead');
             RESET ROLE;
             SELECT queue_create('mine', max_deliveries => 1, dead_letter_queue => 'theirs_dead');
             SELECT queue_schedule('theirs', 's', '900 days', '1');
             SELECT queue_send('theirs', '1'), queue_send('others', '2'), queue_send('mine', '3')",
        )
        .unwrap();
    let held = read_for(&mut client, "theirs", 1, "1 h");
    wait_written(&mut client, "theirs", &ids(&held));
    let reading = reader_asleep(&database, "theirs");
    client.batch_execute("DROP OWNED BY leaver; DROP ROLE leaver").unwrap();
    let (_, outcome) = reading.join().unwrap();
    assert_eq!(code(outcome), "42704", "who waited for a message hears that there is no queue");
    let listed: Vec<String> = client
        .query("SELECT queue FROM queue_list() ORDER BY 1", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(listed, ["mine", "others", "q"]);
    assert!(client.query("SELECT FROM queue_schedules()", &[]).unwrap().is_empty());
    assert_eq!(code(try_send(&mut client, "theirs", 1)), "42704");
    assert!(!client.query_one("SELECT queue_drop('theirs')", &[]).unwrap().get::<_, bool>(0));
    // Whose dead letters went there: they go to the archive.
    exhaust(&mut client, "mine", 1);
    wait_until("it is archived", || rows_of(&mut client, "queue_archive.mine") == 1);
    // The names are free, and nothing of what was there is in what has them now.
    client.batch_execute("SELECT queue_create('theirs'), queue_create('theirs_dead')").unwrap();
    assert!(read(&mut client, "theirs", 9).is_empty());
    assert!(client.query("SELECT FROM queue_schedules()", &[]).unwrap().is_empty());
    assert_eq!(read_one(&mut client, "others").message, 2);
    client.batch_execute("SELECT queue_alter('mine', dead_letter_queue => 'theirs_dead')").unwrap();
    wait_until("the lease that was written is forgotten", || rows_of(&mut client, "queue_catalog.lease") == 0);
    works(&database);
}
