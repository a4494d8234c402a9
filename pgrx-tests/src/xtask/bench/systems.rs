//! What is measured, as data: how each system makes and fills a queue, and its pgbench script for each work.
//!
//! Every script is what a client of that system would send: the payload is a parameter, one row is one message, a
//! reader gets the payload, and a read is finished by the ids that it returned. `{q}` stands for the queue's name.
//! Never runs anything.

/// What a script does each time that it is run through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    Send,
    SendBatch,
    ReadDelete,
    /// The same in one statement; only pg_queue has one.
    DeleteAndRead,
    ReadDeleteBatch,
    /// Send one, read one, delete it: the backlog stays as deep as it is.
    Cycle,
}

/// Messages in a batch.
pub const BATCH: u64 = 100;

impl Work {
    /// How many messages one run through the script sends.
    pub fn sends(self) -> u64 {
        match self {
            Self::Send | Self::Cycle => 1,
            Self::SendBatch => BATCH,
            Self::ReadDelete | Self::DeleteAndRead | Self::ReadDeleteBatch => 0,
        }
    }

    /// How many messages it finishes.
    pub fn finishes(self) -> u64 {
        match self {
            Self::Send | Self::SendBatch => 0,
            Self::ReadDelete | Self::DeleteAndRead | Self::Cycle => 1,
            Self::ReadDeleteBatch => BATCH,
        }
    }

    /// How many messages it is about: what the rates count.
    pub fn messages(self) -> u64 {
        self.sends().max(self.finishes())
    }
}

/// A message: 110 bytes of JSON.
pub const PAYLOAD: &str = r#"{"id": 48151623, "kind": "order.paid", "customer": "c-00042", "amount_cents": 129900, "note": "to the door"}"#;

/// A system under test.
pub struct System {
    pub name: &'static str,
    /// Makes the queue.
    pub create: &'static str,
    /// Its table.
    pub table: &'static str,
    /// Inserts `{n}` messages with the payload `$1` as text.
    pub fill: &'static str,
    pub scripts: &'static [(Work, &'static str)],
}

impl System {
    pub fn script(&self, work: Work, queue: &str) -> Option<String> {
        let (_, script) = self.scripts.iter().find(|(of, _)| *of == work)?;
        Some(script.replace("{q}", queue))
    }

    pub fn table(&self, queue: &str) -> String {
        self.table.replace("{q}", queue)
    }
}

pub const PG_QUEUE: System = System {
    name: "pg_queue",
    // As it ships: its table has the storage parameters that queue_create gives it.
    create: "SELECT queue_create('{q}')",
    table: "queue.{q}",
    fill: "INSERT INTO queue.{q} (message) SELECT '{payload}'::jsonb FROM generate_series(1, {n})",
    scripts: &[
        (Work::Send, "SELECT queue_send('{q}', :payload);\n"),
        (Work::SendBatch, "SELECT queue_send_batch('{q}', :payloads);\n"),
        (
            Work::ReadDelete,
            "SELECT msg_id, lease_id, message FROM queue_read('{q}') \\gset\n\
             SELECT queue_delete('{q}', :msg_id, :lease_id);\n",
        ),
        (
            Work::DeleteAndRead,
            "SELECT ARRAY[msg_id] AS msg_ids, ARRAY[lease_id] AS lease_ids, message \
             FROM queue_delete_and_read('{q}', :msg_ids, :lease_ids) \\gset\n",
        ),
        (
            Work::ReadDeleteBatch,
            "SELECT array_agg(msg_id) AS msg_ids, array_agg(lease_id) AS lease_ids, array_agg(message) AS messages \
             FROM queue_read('{q}', 100) \\gset\n\
             SELECT queue_delete_batch('{q}', :msg_ids, :lease_ids);\n",
        ),
        (
            Work::Cycle,
            "SELECT queue_send('{q}', :payload);\n\
             SELECT msg_id, lease_id, message FROM queue_read('{q}') \\gset\n\
             SELECT queue_delete('{q}', :msg_id, :lease_id);\n",
        ),
    ],
};

/// Autovacuum for the peers' tables, which need it most: as often and as fast as it can.
pub const PEER_VACUUM: &str = "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, \
    autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0.5";

pub const PGMQ: System = System {
    name: "pgmq",
    create: "SELECT pgmq.create('{q}'); ALTER TABLE pgmq.q_{q} SET ({vacuum})",
    table: "pgmq.q_{q}",
    fill: "INSERT INTO pgmq.q_{q} (vt, message) \
           SELECT clock_timestamp(), '{payload}'::jsonb FROM generate_series(1, {n})",
    scripts: &[
        (Work::Send, "SELECT pgmq.send('{q}', :payload::jsonb);\n"),
        (Work::SendBatch, "SELECT pgmq.send_batch('{q}', :payloads::jsonb[]);\n"),
        (
            Work::ReadDelete,
            "SELECT msg_id, message FROM pgmq.read('{q}', 30, 1) \\gset\n\
             SELECT pgmq.delete('{q}', :msg_id::bigint);\n",
        ),
        (
            Work::ReadDeleteBatch,
            "SELECT array_agg(msg_id) AS msg_ids, array_agg(message) AS messages \
             FROM pgmq.read('{q}', 30, 100) \\gset\n\
             SELECT pgmq.delete('{q}', :msg_ids::bigint[]);\n",
        ),
        (
            Work::Cycle,
            "SELECT pgmq.send('{q}', :payload::jsonb);\n\
             SELECT msg_id, message FROM pgmq.read('{q}', 30, 1) \\gset\n\
             SELECT pgmq.delete('{q}', :msg_id::bigint);\n",
        ),
    ],
};

/// The queue that one writes by hand: one table, one index, the lease in a column that no index holds, so that
/// a claim can be a HOT update; room for it is left on the pages.
pub const HAND: System = System {
    name: "SKIP LOCKED",
    create: "CREATE TABLE hand_{q} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, \
             visible_at timestamptz NOT NULL DEFAULT clock_timestamp(), message jsonb NOT NULL) \
             WITH (fillfactor = 70, {vacuum})",
    table: "hand_{q}",
    fill: "INSERT INTO hand_{q} (message) SELECT '{payload}'::jsonb FROM generate_series(1, {n})",
    scripts: &[
        (Work::Send, "INSERT INTO hand_{q} (message) VALUES (:payload) RETURNING id;\n"),
        (
            Work::SendBatch,
            "INSERT INTO hand_{q} (message) SELECT unnest(:payloads::jsonb[]) RETURNING id;\n",
        ),
        (
            Work::ReadDelete,
            "UPDATE hand_{q} SET visible_at = clock_timestamp() + interval '30 s' WHERE id = \
             (SELECT id FROM hand_{q} WHERE visible_at <= clock_timestamp() ORDER BY id LIMIT 1 \
             FOR UPDATE SKIP LOCKED) RETURNING id, message \\gset\n\
             DELETE FROM hand_{q} WHERE id = :id;\n",
        ),
        (
            Work::ReadDeleteBatch,
            "WITH claimed AS (SELECT id FROM hand_{q} WHERE visible_at <= clock_timestamp() ORDER BY id LIMIT 100 \
             FOR UPDATE SKIP LOCKED), leased AS (UPDATE hand_{q} h SET visible_at = clock_timestamp() \
             + interval '30 s' FROM claimed WHERE h.id = claimed.id RETURNING h.id, h.message) \
             SELECT array_agg(id) AS ids, array_agg(message) AS messages FROM leased \\gset\n\
             DELETE FROM hand_{q} WHERE id = ANY (:ids::bigint[]) RETURNING id;\n",
        ),
        (
            Work::Cycle,
            "INSERT INTO hand_{q} (message) VALUES (:payload) RETURNING id;\n\
             UPDATE hand_{q} SET visible_at = clock_timestamp() + interval '30 s' WHERE id = \
             (SELECT id FROM hand_{q} WHERE visible_at <= clock_timestamp() ORDER BY id LIMIT 1 \
             FOR UPDATE SKIP LOCKED) RETURNING id, message \\gset\n\
             DELETE FROM hand_{q} WHERE id = :id;\n",
        ),
    ],
};

/// What PostgreSQL itself takes for a row written, and for one found and deleted by its address, no queue at all.
/// Each client walks rows of its own: from `:start`, `:share` for each, `:per_page` on a page.
pub const BARE: System = System {
    name: "bare",
    create:
        "CREATE TABLE bare_{q} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, message jsonb NOT NULL)",
    table: "bare_{q}",
    fill: "INSERT INTO bare_{q} (message) SELECT '{payload}'::jsonb FROM generate_series(1, {n})",
    scripts: &[
        (Work::Send, "INSERT INTO bare_{q} (message) VALUES (:payload);\n"),
        (Work::SendBatch, "INSERT INTO bare_{q} (message) SELECT unnest(:payloads::jsonb[]);\n"),
        (
            Work::ReadDelete,
            "\\set row :start + :client_id * :share + :turn\n\
             \\set turn :turn + 1\n\
             \\set page :row / :per_page\n\
             \\set line :row % :per_page + 1\n\
             SELECT id, message FROM bare_{q} WHERE ctid = ('(' || :page || ',' || :line || ')')::tid \\gset\n\
             DELETE FROM bare_{q} WHERE ctid = ('(' || :page || ',' || :line || ')')::tid;\n",
        ),
        (
            Work::ReadDeleteBatch,
            "\\set row :start + :client_id * :share + :turn * 100\n\
             \\set turn :turn + 1\n\
             \\set page :row / :per_page\n\
             \\set line :row % :per_page + 1\n\
             \\set row :row + 100\n\
             \\set last_page :row / :per_page\n\
             \\set last_line :row % :per_page + 1\n\
             SELECT array_agg(ctid) AS tids, array_agg(id) AS ids, array_agg(message) AS messages FROM bare_{q} \
             WHERE ctid >= ('(' || :page || ',' || :line || ')')::tid \
             AND ctid < ('(' || :last_page || ',' || :last_line || ')')::tid \\gset\n\
             DELETE FROM bare_{q} WHERE ctid = ANY (:tids::tid[]) RETURNING id;\n",
        ),
    ],
};

pub const SYSTEMS: [&System; 4] = [&PG_QUEUE, &PGMQ, &HAND, &BARE];
