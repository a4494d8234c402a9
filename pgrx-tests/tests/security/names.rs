//! Names made by a seeded generator of what breaks programs that build SQL from strings: each goes through every place
//! where a name goes. The seed is printed; PG_QUEUE_TEST_SEED sets it, PG_QUEUE_TEST_ROUNDS multiplies the names.

use super::*;
use queue_tests::wait_until;
use std::collections::BTreeSet;

/// Steele, Lea and Flood's SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

/// What names are made of.
const PIECES: [&str; 44] = [
    "\"", "\"\"", "'", "''", ";", "--", "/*", "*/", "\\", "\\\\", "$$", "$1", "%s", "%I", "%", "{", "}", "(",
    ")", ",", ".", " ", "\n", "\r\n", "\t", "\u{1}", "\u{7f}", "A", "a", "select", "public", "pg_temp",
    "queue", "null", "true", "e\u{301}", "\u{e9}", "\u{212b}", "\u{c5}", "队", "🐘", "\u{202e}", "\u{0}", "😀",
];

/// Names of 1 to 63 bytes, some of exactly 63.
fn names(seed: u64, count: usize) -> BTreeSet<String> {
    let mut random = Random(seed);
    let mut names = BTreeSet::new();
    while names.len() < count {
        let (mut name, is_full) = (String::new(), random.below(4) == 0);
        let pieces = if is_full { 64 } else { 1 + random.below(8) };
        for _ in 0..pieces {
            let piece = PIECES[random.below(PIECES.len())];
            if name.len() + piece.len() <= 63 && !piece.contains('\0') {
                name.push_str(piece);
            }
        }
        while is_full && name.len() < 63 {
            name.push('x');
        }
        if !name.is_empty() {
            names.insert(name);
        }
    }
    names
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[test]
fn names_of_every_kind_go_everywhere_unharmed() {
    let seed = from_env("PG_QUEUE_TEST_SEED", 5);
    let count = 30 * from_env("PG_QUEUE_TEST_ROUNDS", 1) as usize;
    println!("seed {seed}, {count} names");
    let names: Vec<String> = names(seed, count).into_iter().collect();
    let database = database_with(&["dead"]);
    let mut client = session(&database);
    let before = number(&mut client, "SELECT count(*) FROM pg_class");
    for (i, name) in names.iter().enumerate() {
        // Every name is a queue's, its dead-letter queue's, a role's and a schedule's.
        let dead = &names[(i + 1) % names.len()];
        let role = format!("{i}{name}").chars().fold(String::new(), |role, c| {
            if role.len() + c.len_utf8() <= 63 {
                role + &c.to_string()
            } else {
                role
            }
        });
        let run = |client: &mut Client, sql: &str, parameters: &[&(dyn postgres::types::ToSql + Sync)]| {
            client.query(sql, parameters).unwrap_or_else(|error| panic!("{name:?}, {dead:?}: {sql}: {error:?}"))
        };
        for queue in [name, dead] {
            run(&mut client, "SELECT queue_create($1, if_not_exists => true)", &[queue]);
        }
        run(&mut client, "SELECT queue_alter($1, max_deliveries => 2, dead_letter_queue => $2)", &[name, dead]);
        client.batch_execute(&format!("CREATE ROLE {}", quoted(&role))).unwrap();
        run(&mut client, "SELECT queue_grant($1, $2, 'consume')", &[name, &role]);
        let sent = send_many(&mut client, name, 4);
        client.batch_execute(&format!("SET ROLE {}", quoted(&role))).unwrap();
        let got = read(&mut client, name, 9);
        assert_eq!(ids(&got), sent, "{name:?}");
        assert_eq!(retry(&mut client, name, &got[0], Some("0")), "retried");
        assert_eq!(read_one(&mut client, name).msg_id, sent[0]);
        assert_eq!(retry(&mut client, name, &got[1], Some("1 h")), "retried");
        run(&mut client, "SELECT queue_reject($1, $2, error => $1)", &[name, &sent[0]]);
        run(&mut client, "SELECT queue_archive($1, $2)", &[name, &sent[2]]);
        assert_eq!(run(&mut client, "SELECT * FROM queue_read_any(array[$1])", &[name]).len(), 0);
        client.batch_execute(&format!("RESET ROLE; LISTEN {}", quoted("queue_x"))).unwrap();
        let letter = run(
            &mut client,
            "SELECT headers #>> '{dead_letter,queue}', last_error FROM queue_peek($1)",
            &[dead],
        );
        assert_eq!(
            (letter[0].get::<_, String>(0), letter[0].get::<_, String>(1)),
            (name.clone(), name.clone())
        );
        assert_eq!(
            run(&mut client, "SELECT queue_redrive($1, source => $2)", &[dead, name])[0].get::<_, i64>(0),
            1
        );
        assert_eq!(run(&mut client, "SELECT queue_unarchive($1)", &[name])[0].get::<_, i64>(0), 1);
        run(&mut client, "SELECT queue_schedule($1, $1, '1 h', to_jsonb($1::text))", &[name]);
        let schedules = run(
            &mut client,
            "SELECT queue FROM queue_schedules() WHERE name = $1 AND queue = $1 AND message = to_jsonb($1::text)",
            &[name],
        );
        assert_eq!(schedules.len(), 1, "{name:?}");
        run(&mut client, "SELECT queue_schedule_pause($1, $1), queue_unschedule($1, $1)", &[name]);
        run(&mut client, "SELECT queue_pause($1), queue_resume($1)", &[name]);
        let listed =
            run(&mut client, "SELECT dead_letter_queue, channel FROM queue_list() WHERE queue = $1", &[name]);
        assert_eq!(listed[0].get::<_, String>(0), *dead, "{name:?}");
        assert!(listed[0].get::<_, String>(1).len() <= 63);
        run(&mut client, "SELECT queue_revoke($1, $2, 'consume')", &[name, &role]);
        client.batch_execute(&format!("DROP ROLE {}", quoted(&role))).unwrap();
        // Renamed, and back.
        client
            .batch_execute(&format!("ALTER TABLE queue.{} RENAME TO queue_renamed", quoted(name)))
            .unwrap_or_else(|error| panic!("{name:?}: {error:?}"));
        assert_eq!(code(try_send(&mut client, name, 1)), "42704", "{name:?}");
        assert_eq!(rows(&mut client, "queue_renamed"), 4);
        client.batch_execute(&format!("ALTER TABLE queue.queue_renamed RENAME TO {}", quoted(name))).unwrap();
        run(&mut client, "SELECT queue_drop($1, force => true)", &[name]);
    }
    client.batch_execute("SELECT queue_drop('dead')").unwrap();
    client
        .batch_execute("DO $$ DECLARE q text; BEGIN FOR q IN SELECT queue FROM queue_list() LOOP PERFORM queue_drop(q, true); END LOOP; END $$")
        .unwrap();
    assert_eq!(
        number(&mut client, "SELECT count(*) FROM pg_class") - before,
        -12,
        "the first one's, with its archive"
    );
}

#[test]
fn names_are_compared_byte_by_byte() {
    // Pairs that a careless comparison takes for one: case, composed and decomposed, compatible, blanks, 63 bytes.
    let long = "x".repeat(62);
    let pairs = [
        ("Emails".to_owned(), "emails".to_owned()),
        ("caf\u{e9}".to_owned(), "cafe\u{301}".to_owned()),
        ("\u{212b}".to_owned(), "\u{c5}".to_owned()),
        ("a".to_owned(), "a ".to_owned()),
        ("a\"b".to_owned(), "a\"\"b".to_owned()),
        ("c\\n".to_owned(), "c\n".to_owned()),
        (format!("{long}1"), format!("{long}2")),
    ];
    let database = database_with(&[]);
    let mut client = session(&database);
    for (one, other) in &pairs {
        create(&mut client, &[one]);
        assert_eq!(code(try_send(&mut client, other, 1)), "42704", "{other:?} is not {one:?}");
        create(&mut client, &[other]);
        send(&mut client, one, 1);
        send(&mut client, other, 2);
        let numbers = |got: Vec<Delivery>| got.iter().map(|m| m.message.as_i64().unwrap()).collect::<Vec<_>>();
        assert_eq!(numbers(read(&mut client, one, 9)), [1], "{one:?}");
        assert_eq!(numbers(read(&mut client, other, 9)), [2], "{other:?}");
    }
    // The worker, too, goes by the very name.
    client
        .batch_execute("SELECT queue_alter('Emails', max_deliveries => 1), queue_send('Emails', '3')")
        .unwrap();
    read_for(&mut client, "Emails", 1, "1 ms");
    wait_until("it is archived", || number(&mut client, "SELECT count(*) FROM queue_archive.\"Emails\"") == 1);
    assert_eq!(number(&mut client, "SELECT count(*) FROM queue_archive.emails"), 0);
}

#[test]
fn names_that_cannot_be_are_refused_by_every_function_that_takes_one() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let before = picture(&mut client);
    for name in
        ["".to_owned(), "x".repeat(64), "q".to_owned() + &" ".repeat(63), "队".repeat(22), "x".repeat(100_000)]
    {
        for (code, sql) in [
            ("42602", "SELECT queue_create($1)"),
            ("42602", "SELECT queue_create($1, if_not_exists => true)"),
            ("42704", "SELECT queue_alter($1)"),
            ("42704", "SELECT queue_send($1, '1')"),
            ("42704", "SELECT queue_read($1)"),
            ("42704", "SELECT queue_read_any(array['q', $1], 2)"),
            ("42704", "SELECT queue_delete($1, 1)"),
            ("42704", "SELECT queue_purge($1)"),
            ("42704", "SELECT queue_peek($1)"),
            ("42704", "SELECT queue_redrive($1)"),
            ("42704", "SELECT queue_redrive('q', target => $1)"),
            ("42704", "SELECT queue_redrive('q', source => $1)"),
            ("42704", "SELECT queue_unarchive($1)"),
            ("42704", "SELECT queue_pause($1)"),
            ("42704", "SELECT queue_grant($1, 'public', 'send')"),
            ("42704", "SELECT queue_grant('q', $1, 'send')"),
            ("42704", "SELECT queue_schedule($1, 's', '1 h', '1')"),
            ("42704", "SELECT queue_unschedule($1, 's')"),
        ] {
            assert_eq!(common::code(client.execute(sql, &[&name])), code, "{sql}: {} bytes", name.len());
        }
        if !name.is_empty() {
            let sql = "SELECT queue_create('new', dead_letter_queue => $1)";
            assert_eq!(code(client.execute(sql, &[&name])), "42704", "{} bytes", name.len());
        }
        let dropped: bool = client.query_one("SELECT queue_drop($1)", &[&name]).unwrap().get(0);
        assert!(!dropped);
        // Schedules have names of their own kind: 1 to 200 bytes.
        let scheduled = client.execute("SELECT queue_schedule('q', $1, '1 h', '1')", &[&name]);
        if (1..=200).contains(&name.len()) {
            scheduled.unwrap();
            client.execute("SELECT queue_unschedule('q', $1)", &[&name]).unwrap();
        } else {
            assert_eq!(code(scheduled), "22023", "{} bytes", name.len());
        }
    }
    // Postgres takes no zero byte in a text; the driver sends it as it is.
    assert_eq!(code(client.execute("SELECT queue_create($1)", &[&"a\0b"])), "22021");
    assert_eq!(picture(&mut client), before);
}
