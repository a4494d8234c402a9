//! What a database holds of pg_queue, as text that means the same in another database, on another server and in
//! another version: by names, never by oids. Taken before and after, compared byte by byte.
//!
//! Owns the list of what counts: messages, archives, settings, schedules, definitions, owners, grants, comments, the
//! next ids; leases only where they are asked for. Never changes anything, decides nothing.
#![allow(dead_code)] // each test file uses its part

pub mod load;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::Read;
use std::sync::Mutex;

use postgres::Client;
use queue_tests::Database;

/// What it is of, and the text. Numbered parts of `of` keep what belongs together side by side.
#[derive(Clone, PartialEq, Eq)]
pub struct Inventory(BTreeMap<String, String>);

/// What of an inventory may be asked for beside what every copy must have.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Leases {
    /// They are not expected to travel.
    Left,
    /// The written ones, deadlines and fences included.
    Written,
}

impl Inventory {
    #[track_caller]
    pub fn take(client: &mut Client, leases: Leases) -> Self {
        let mut all = BTreeMap::new();
        for (of, source) in WHOLE {
            let text = copied(client, source);
            let mut lines: Vec<&str> = text.lines().collect();
            lines.sort_unstable();
            all.insert((*of).to_owned(), lines.join("\n"));
        }
        if leases == Leases::Written {
            all.insert("leases".to_owned(), copied(client, LEASES));
        }
        let tables = client.query(TABLES, &[]).unwrap();
        for table in &tables {
            let (name, columns): (&str, &str) = (table.get(0), table.get(1));
            // Archives have no key: their rows in the order of all columns.
            let rows = format!("SELECT {columns} FROM {name} ORDER BY {columns}");
            all.insert(format!("rows of {name}"), copied(client, &rows));
        }
        Self(all)
    }

    /// Without the next ids, which a recovery moves forward.
    pub fn without_ids(mut self) -> Self {
        assert!(self.0.remove(NEXT_IDS).is_some());
        self
    }

    /// Rewrites each line of one part, where something is meant to have changed; a line that comes out empty is left
    /// out.
    #[track_caller]
    pub fn change(&mut self, of: &str, line: impl Fn(&str) -> String) {
        let text = self.0.get_mut(of).unwrap_or_else(|| panic!("no {of:?} in it"));
        let mut lines: Vec<String> = text.lines().map(line).filter(|line| !line.is_empty()).collect();
        lines.sort_unstable();
        *text = lines.join("\n");
    }

    /// Asserts that `self`, which came of `before` by way of `how`, is the same to the byte; says where it is not.
    #[track_caller]
    pub fn assert_same(&self, before: &Self, how: &str) {
        let differences = self.differences(before);
        assert!(differences.is_empty(), "{how}:\n{differences}");
    }

    /// Which lines are only in one of both; empty if they are the same.
    pub fn differences(&self, before: &Self) -> String {
        let mut text = String::new();
        let parts = before.0.keys().chain(self.0.keys().filter(|of| !before.0.contains_key(*of)));
        for of in parts {
            let (old, new) = (before.0.get(of), self.0.get(of));
            if old == new {
                continue;
            }
            let lines = |text: Option<&String>| -> Vec<String> {
                text.map(|text| text.lines().map(str::to_owned).collect()).unwrap_or_default()
            };
            let (old, new) = (lines(old), lines(new));
            writeln!(text, "{of}:").unwrap();
            old.iter().filter(|line| !new.contains(line)).for_each(|l| writeln!(text, "  - {l}").unwrap());
            new.iter().filter(|line| !old.contains(line)).for_each(|l| writeln!(text, "  + {l}").unwrap());
            if old.len() == new.len() && old.iter().all(|line| new.contains(line)) {
                writeln!(text, "  (the same lines in another order)").unwrap();
            }
        }
        text
    }
}

/// What a query returns, as COPY writes it.
#[track_caller]
pub fn copied(client: &mut Client, query: &str) -> String {
    let mut text = String::new();
    let mut reader = client
        .copy_out(&format!("COPY ({query}) TO STDOUT"))
        .unwrap_or_else(|error| panic!("cannot look: {error:?}\n{query}"));
    reader.read_to_string(&mut text).unwrap();
    text
}

const NEXT_IDS: &str = "next ids";

/// The tables of queues and archives, with the names of their columns.
const TABLES: &str = "
    SELECT a.attrelid::regclass::text, string_agg(quote_ident(attname), ', ' ORDER BY attnum)
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    WHERE attnum > 0 AND NOT attisdropped AND relkind = 'r'
      AND relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace)
    GROUP BY attrelid ORDER BY 1";

/// (of what, the query); sets, whose lines are sorted here: names sort otherwise by their oids.
const WHOLE: &[(&str, &str)] = &[
    ("extension", "SELECT extversion, extnamespace::regnamespace FROM pg_extension WHERE extname = 'pg_queue'"),
    ("settings", "SELECT to_jsonb(l) FROM queue_list() l"),
    ("settings as they are kept", "SELECT to_jsonb(q) FROM queue_catalog.queue q"),
    ("schedules", "SELECT to_jsonb(s) FROM queue_schedules() s"),
    ("schedules as they are kept", "SELECT to_jsonb(s) FROM queue_catalog.schedule s"),
    // The names of helpers have the oids of where they were made, and keep them.
    (
        NEXT_IDS,
        "SELECT s.schemaname, s.sequencename, s.sequenceowner, d.refobjid::regclass, s.data_type, s.start_value,
                s.increment_by, s.cycle, s.cache_size, s.last_value
         FROM pg_sequences s
         JOIN pg_depend d ON d.objid = format('%I.%I', schemaname, sequencename)::regclass AND d.deptype = 'i'
         WHERE s.schemaname IN ('queue', 'queue_archive')",
    ),
    (
        "tables",
        "SELECT c.oid::regclass, relowner::regrole, relpersistence, relreplident, relrowsecurity, relforcerowsecurity,
                (SELECT array_agg(o ORDER BY o) FROM unnest(reloptions) o), obj_description(c.oid, 'pg_class')
         FROM pg_class c WHERE relkind IN ('r', 'S', 'v')
           AND relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace)",
    ),
    (
        "columns",
        "SELECT attrelid::regclass,
                (SELECT count(*) FROM pg_attribute b WHERE b.attrelid = a.attrelid AND b.attnum BETWEEN 1 AND a.attnum
                 AND NOT b.attisdropped),
                attname, format_type(atttypid, atttypmod), attnotnull, attidentity, nullif(attstattarget, -1),
                pg_get_expr(adbin, adrelid), col_description(attrelid, attnum)
         FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid
         LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
         WHERE relkind = 'r' AND attnum > 0 AND NOT attisdropped
           AND relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace)
",
    ),
    (
        "indexes",
        "SELECT indrelid::regclass, pg_get_indexdef(indexrelid), indisprimary, indisvalid, indisreplident,
                obj_description(indexrelid, 'pg_class')
         FROM pg_index JOIN pg_class c ON c.oid = indrelid
         WHERE relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace)",
    ),
    // Version 18 has constraints for NOT NULL, too; those are among the columns.
    (
        "constraints",
        "SELECT conrelid::regclass, conname, pg_get_constraintdef(o.oid) FROM pg_constraint o
         JOIN pg_class c ON c.oid = conrelid
         WHERE contype <> 'n' AND relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace)",
    ),
    (
        "triggers",
        "SELECT pg_get_triggerdef(t.oid), tgenabled FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
         WHERE NOT tgisinternal
           AND relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace, 'queue_catalog'::regnamespace)",
    ),
    (
        "policies",
        "SELECT polrelid::regclass, polname, polcmd, polpermissive, polroles::regrole[], pg_get_expr(polqual, polrelid),
                pg_get_expr(polwithcheck, polrelid) FROM pg_policy",
    ),
    // Of everybody but the owner, who has what his version of Postgres knows of.
    (
        "grants on tables",
        "SELECT c.oid::regclass, x.grantor::regrole, CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END,
                x.privilege_type, x.is_grantable
         FROM pg_class c, aclexplode(relacl) x
         WHERE relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace, 'queue_catalog'::regnamespace)
           AND x.grantee <> relowner",
    ),
    (
        "grants on columns",
        "SELECT attrelid::regclass, attname, x.grantee::regrole, x.privilege_type, x.is_grantable
         FROM pg_attribute JOIN pg_class c ON c.oid = attrelid, aclexplode(attacl) x
         WHERE relnamespace IN ('queue'::regnamespace, 'queue_archive'::regnamespace, 'queue_catalog'::regnamespace)",
    ),
    (
        "grants on schemas",
        "SELECT nspname, nspowner::regrole, CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END,
                x.privilege_type, x.is_grantable
         FROM pg_namespace, aclexplode(coalesce(nspacl, acldefault('n', nspowner))) x
         WHERE nspname IN ('queue', 'queue_archive', 'queue_catalog')",
    ),
    (
        "grants on functions",
        "SELECT p.oid::regprocedure, p.proowner::regrole,
                CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END, x.privilege_type
         FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
         JOIN pg_extension e ON e.oid = d.refobjid AND extname = 'pg_queue',
         aclexplode(coalesce(proacl, acldefault('f', proowner))) x",
    ),
];

/// Those that run; of others a row may stay until it is swept.
const LEASES: &str = "SELECT l.queue::regclass, msg_id, lease_id, delivery_count, leased_at, until
    FROM queue_catalog.lease l WHERE until IS NOT NULL ORDER BY l.queue::regclass::text, msg_id";

/// Fills a database with queues of every kind, messages in every state, and whatever its administrator adds: grants,
/// comments, owners, policies, options. Nothing in it comes due for a day. Roles are made if they are not there: they
/// belong to the server, not to the database.
pub fn furnish(database: &Database) {
    crate::common::worker_pid(database); // durable leases need it
    let mut client = database.connect().unwrap();
    {
        // Tests of one process that share a cluster make them one at a time.
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        client.batch_execute(ROLES).unwrap();
    }
    client.batch_execute(FURNISHED).unwrap();
    // A retry, a dead letter, something archived by the way; all without leases that stay.
    client
        .batch_execute(
            "DO $$
             DECLARE m record;
             BEGIN
                 SELECT * INTO STRICT m FROM queue_read('strict');
                 PERFORM queue_retry('strict', m.msg_id, m.lease_id, E'tab\\t, quote'' and\\nline', '2 days');
             END $$;
             DO $$
             DECLARE m record;
             BEGIN
                 SELECT * INTO STRICT m FROM queue_read('strict');
                 PERFORM queue_reject('strict', m.msg_id, m.lease_id, 'no good');
             END $$;
             SELECT queue_archive('Odd \"name\"', 1)",
        )
        .unwrap();
    // The highest id is that of no message.
    client
        .batch_execute(
            "SELECT queue_send('many', '0'), queue_send('many', '0');
             DELETE FROM queue.many WHERE msg_id > 200",
        )
        .unwrap();
}

const ROLES: &str = r#"
    DO $$ DECLARE r text; BEGIN
        FOREACH r IN ARRAY ARRAY['life_owner', 'life_app', 'life Odd "role"'] LOOP
            IF to_regrole(quote_ident(r)) IS NULL THEN EXECUTE format('CREATE ROLE %I', r); END IF;
        END LOOP;
    END $$"#;

const FURNISHED: &str = r#"
    GRANT USAGE, CREATE ON SCHEMA queue TO life_owner;
    GRANT USAGE ON SCHEMA queue_catalog TO life_app;
    REVOKE EXECUTE ON FUNCTION queue_drop FROM PUBLIC;
    GRANT EXECUTE ON FUNCTION queue_drop TO life_owner;
    SET SESSION AUTHORIZATION life_owner;
    SELECT queue_create('dead');
    SELECT queue_create('strict', visibility_timeout => '7 min', max_deliveries => 3, dead_letter_queue => 'dead',
        retry_delay => '1 h', retry_backoff => 1.5, retry_delay_max => '12 h', retry_jitter => 0.125,
        message_ttl => '9 days', archive_retention => '90 days', require_lease => true, durable_leases => true);
    SELECT queue_grant('strict', 'life_app', 'consume');
    RESET SESSION AUTHORIZATION;
    SELECT queue_create('many'), queue_create('Odd "name"'), queue_create('paused'), queue_create('empty'),
           queue_create('here', unlogged => true);
    SELECT queue_pause('paused');
    SELECT queue_grant('many', 'life_app', 'admin'), queue_grant('many', 'life Odd "role"', 'send');
    GRANT SELECT (msg_id, enqueued_at) ON queue.paused TO life_app WITH GRANT OPTION;
    COMMENT ON TABLE queue.many IS 'ours, since 2019';
    COMMENT ON COLUMN queue.many.message IS 'an order';
    COMMENT ON TABLE queue_archive.many IS 'what was done';
    ALTER TABLE queue.many SET (fillfactor = 90), ALTER message SET STATISTICS 300,
        ADD COLUMN tenant text DEFAULT 'nobody';
    CREATE INDEX many_tenant ON queue.many (tenant);
    ALTER TABLE queue.paused ENABLE ROW LEVEL SECURITY;
    CREATE POLICY even ON queue.paused TO life_app USING (msg_id % 2 = 0);
    SELECT queue_send_batch('many', array(SELECT jsonb_build_object('n', n, 'text', repeat('x', n * 11 % 257))
        FROM generate_series(1, 200) n));
    SELECT queue_send('many', '{"a": [1, 2.50, "x\ty\\"], "n": null}', headers => '{"h": null}', delay => '2 days');
    DELETE FROM queue.many WHERE msg_id % 10 = 0 OR msg_id = 201;
    UPDATE queue.many SET tenant = 'them' WHERE msg_id = 1;
    SELECT queue_send('Odd "name"', '"odd"'), queue_send('Odd "name"', '"\\. \\N"');
    SELECT queue_send('paused', 'null', deliver_at => '2100-01-01 00:00:00.123456+00');
    SELECT queue_send('strict', '1'), queue_send('strict', '2'), queue_send('strict', '3', ttl => '8 days');
    SELECT queue_schedule('many', 'yearly', '0 0 1 1 *', '{"kind": "year"}', '{"h": 1}', 'Asia/Tokyo'),
           queue_schedule('Odd "name"', 'odd "schedule"', '900 days', '1'),
           queue_schedule('paused', 'off', '* * * * * *', '2');
    SELECT queue_schedule_pause('paused', 'off');
"#;
