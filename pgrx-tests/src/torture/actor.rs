//! A client's session: its calls and transactions, each logged before and after, and what an error says about how a
//! transaction ended.
//!
//! Owns that judgement: an ERROR rolls back; a connection lost before COMMIT was sent rolls back; one lost after that
//! leaves it unknown, and so does a lost call outside a transaction. What clients do is `senders`' and `consumers`'.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use postgres::error::Severity;
use postgres::types::ToSql;
use postgres::{Client, Row, Statement};

use super::history::{Act, Answer, Delivered, EffectRefused, End, Key, Log, Mark, Outcome, Us, Verb};
use super::rng::Rng;
use super::tally::{self, Tally};
use super::world::{Seat, World};

/// The queues of a round, by the number that stands in the history.
pub const QUEUES: [&str; 3] = ["exact", "plain", "durable"];
/// Here every finish writes the ledger in the same transaction.
pub const EXACT: u8 = 0;
pub const PLAIN: u8 = 1;
/// With durable_leases.
pub const DURABLE: u8 = 2;

/// The ledger's unique index.
const LEDGER_KEY: &str = "ledger_pkey";

/// no_data_found: a lease is lost, and the call is strict.
const NOT_HELD: &str = "P0002";

/// Why a call did not do what it was to.
#[derive(Debug)]
pub enum Failed {
    /// An ERROR; what was open is rolled back, the session goes on.
    Error,
    /// The session is gone.
    Session,
}

pub type Done<T = ()> = Result<T, Failed>;

/// A message that was read.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub key: Key,
    pub queue: u8,
    pub msg_id: i64,
    pub lease_id: i64,
}

/// What a client keeps for long, and when it means to finish it.
#[derive(Debug)]
pub struct Kept {
    pub held: Vec<Held>,
    pub until_us: Us,
}

struct Returned {
    rows: Vec<Row>,
    began_us: Us,
    returned_us: Us,
}

pub struct Actor<'w> {
    pub world: &'w World,
    pub rng: Rng,
    pub log: Log,
    pub kept: Vec<Kept>,
    seat: Arc<Seat>,
    client: Option<Client>,
    statements: HashMap<&'static str, Statement>,
    /// When the last call began.
    call_began_us: Us,
    /// A transaction is open; when the last answer in it came.
    open_us: Option<Us>,
    /// Of that transaction.
    level: &'static str,
    /// An ERROR rolls back to savepoint s, set when the log stood here.
    savepoint: Option<Mark>,
    /// Keys that the open transaction sends.
    own: Vec<Key>,
    patience_ms: u32,
    /// What the ledger had already when the last ERROR came.
    key_exists: Option<Key>,
    tally: Tally,
}

impl<'w> Actor<'w> {
    pub fn new(world: &'w World, name: &str, is_consumer: bool, rng: Rng) -> Self {
        let (seat, log) = world.seat(name, is_consumer);
        Self {
            world,
            rng,
            log,
            kept: Vec::new(),
            seat,
            client: None,
            statements: HashMap::new(),
            call_began_us: 0,
            open_us: None,
            level: tally::ALONE,
            savepoint: None,
            own: Vec::new(),
            patience_ms: 0,
            key_exists: None,
            tally: Tally::default(),
        }
    }

    /// Works on one session after the other until the round is over, then does what is to be done at the end, if its
    /// session still stands, and hands in the log.
    pub fn run(mut self, mut work: impl FnMut(&mut Self) -> Done, at_end: impl FnOnce(&mut Self) -> Done) {
        while !self.world.is_over() {
            if self.client.is_none() && !self.connect() {
                break;
            }
            // What it failed of is logged; the next round of work begins anew.
            let _ = work(&mut self);
            if self.open_us.is_some() {
                let _ = self.rollback();
            }
        }
        let _ = at_end(&mut self);
        self.hand_in();
    }

    pub fn hand_in(self) {
        self.world.note_tally(self.tally);
        self.world.hand_in(self.log);
    }

    /// A new session; false: the round is over.
    pub fn connect(&mut self) -> bool {
        self.statements.clear();
        self.patience_ms = 0;
        self.client = self.world.connect(&self.seat);
        self.client.is_some()
    }

    pub fn is_connected(&self) -> bool {
        self.client.is_some()
    }

    // ---- calls and transactions --------------------------------------------------------------------------------

    pub fn begin(&mut self, isolation: &'static str) -> Done {
        let sql = match isolation {
            "serializable" => "BEGIN ISOLATION LEVEL SERIALIZABLE",
            "repeatable read" => "BEGIN ISOLATION LEVEL REPEATABLE READ",
            _ => "BEGIN",
        };
        self.level = isolation;
        self.plain("begin", sql)?;
        self.open_us = Some(self.world.now_us());
        Ok(())
    }

    pub fn commit(&mut self) -> Done {
        let asked_us = self.world.now_us();
        // A session that was ended while it was idle is found out only now: it is sure of no more than its last answer.
        let answered_us = self.open_us.unwrap_or(asked_us);
        let result = self.execute("commit", "COMMIT");
        let over_us = self.world.now_us();
        match result {
            Ok(()) => {
                self.ended(End { open_us: asked_us, over_us, outcome: Outcome::Acknowledged });
                Ok(())
            }
            Err(error) => {
                let failed = self.failed(&error);
                let end = match failed {
                    Failed::Error => End { open_us: asked_us, over_us, outcome: Outcome::RolledBack },
                    Failed::Session => {
                        End { open_us: answered_us, over_us: Us::MAX, outcome: Outcome::Unknown }
                    }
                };
                self.ended(end);
                Err(failed)
            }
        }
    }

    pub fn rollback(&mut self) -> Done {
        let asked_us = self.world.now_us();
        let answered_us = self.open_us.unwrap_or(asked_us);
        let result = self.execute("rollback", "ROLLBACK");
        let open_us = if result.is_ok() { asked_us } else { answered_us };
        let over_us = self.world.now_us();
        self.ended(End { open_us, over_us, outcome: Outcome::RolledBack });
        result.map_err(|error| self.failed(&error))
    }

    /// Until it is released or rolled back to, an ERROR undoes only what came after it.
    pub fn savepoint(&mut self) -> Done {
        self.plain("savepoint", "SAVEPOINT s")?;
        self.savepoint = Some(self.log.mark());
        Ok(())
    }

    pub fn release_savepoint(&mut self) -> Done {
        if self.savepoint.is_some() {
            self.plain("savepoint", "RELEASE SAVEPOINT s")?;
            self.savepoint = None;
        }
        Ok(())
    }

    pub fn rollback_to_savepoint(&mut self) -> Done {
        let Some(mark) = self.savepoint.take() else { return Ok(()) };
        let open_us = self.world.now_us();
        self.plain("savepoint", "ROLLBACK TO SAVEPOINT s")?;
        self.log.rolled_back_to(mark, open_us, self.world.now_us());
        Ok(())
    }

    /// A statement without parameters whose rows do not matter.
    pub fn plain(&mut self, call: &'static str, sql: &str) -> Done {
        let began_us = self.world.now_us();
        match self.execute(call, sql) {
            Ok(()) => {
                if let Some(open_us) = &mut self.open_us {
                    *open_us = self.world.now_us();
                }
                Ok(())
            }
            Err(error) => Err(self.call_failed(began_us, false, &error)),
        }
    }

    fn execute(&mut self, call: &'static str, sql: &str) -> Result<(), postgres::Error> {
        let Some(client) = &mut self.client else { return Ok(()) };
        self.call_began_us = self.world.now_us();
        self.seat.opens(call, self.call_began_us);
        let result = client.batch_execute(sql);
        self.closes(call, result.is_err());
        if result.is_ok() {
            self.did(call, true);
        }
        result
    }

    /// A call is over.
    fn closes(&mut self, call: &'static str, is_failed: bool) {
        self.seat.closes();
        self.world.counters.calls.fetch_add(1, Relaxed);
        let calls = self.tally.of(call, self.level);
        calls.tried += 1;
        calls.failed += u64::from(is_failed);
    }

    /// Whether a call that was answered came to something.
    fn did(&mut self, call: &'static str, something: bool) {
        self.tally.of(call, self.level).done += u64::from(something);
    }

    /// One statement. `commits_inside`: it may have committed some of its work before it fails.
    fn call(
        &mut self,
        call: &'static str,
        sql: &'static str,
        parameters: &[&(dyn ToSql + Sync)],
        commits_inside: bool,
    ) -> Done<Returned> {
        self.be_patient()?;
        // Without an answer the round is over.
        let Ok(types) = self.world.parameter_types(sql) else { return Err(Failed::Session) };
        let Some(client) = &mut self.client else { return Err(Failed::Session) };
        let began_us = self.world.now_us();
        self.call_began_us = began_us;
        self.seat.opens(call, began_us);
        let result = match (types, self.statements.get(sql)) {
            // Through a pooler nothing that was prepared is there the next time.
            (Some(types), _) => {
                let typed: Vec<_> = parameters.iter().copied().zip(types).collect();
                client.query_typed(sql, &typed)
            }
            (None, Some(statement)) => client.query(statement, parameters),
            (None, None) => client.prepare(sql).and_then(|statement| {
                let rows = client.query(&statement, parameters);
                self.statements.insert(sql, statement);
                rows
            }),
        };
        self.closes(call, result.is_err());
        let returned_us = self.world.now_us();
        match result {
            Ok(rows) => {
                if let Some(open_us) = &mut self.open_us {
                    *open_us = returned_us;
                }
                Ok(Returned { rows, began_us, returned_us })
            }
            Err(error) => Err(self.call_failed(began_us, commits_inside, &error)),
        }
    }

    /// Sets the timeouts that the world asks for, if it asks for others than before.
    fn be_patient(&mut self) -> Done {
        let wanted_ms = self.world.patience_ms();
        if wanted_ms != self.patience_ms && self.open_us.is_none() {
            let sql = format!("SET statement_timeout = {wanted_ms}; SET lock_timeout = {}", wanted_ms / 2);
            self.plain("set", &sql)?;
            self.patience_ms = wanted_ms;
        }
        Ok(())
    }

    /// Outside a transaction a call that was answered has committed. Comes after what it returned was logged.
    fn answered(&mut self, returned: &Returned) {
        if self.open_us.is_none() {
            let Returned { began_us: open_us, returned_us: over_us, .. } = *returned;
            self.ended(End { open_us, over_us, outcome: Outcome::Acknowledged });
        }
    }

    fn call_failed(&mut self, began_us: Us, commits_inside: bool, error: &postgres::Error) -> Failed {
        let failed = self.failed(error);
        let over_us = self.world.now_us();
        match (&failed, self.open_us) {
            (Failed::Error, Some(open_us)) => {
                if let Some(mark) = self.savepoint.take() {
                    self.log.rolled_back_to(mark, open_us, over_us);
                    if let Err(lost) = self.plain("savepoint", "ROLLBACK TO SAVEPOINT s") {
                        return lost;
                    }
                } else {
                    self.ended(End { open_us, over_us, outcome: Outcome::RolledBack });
                    if let Err(error) = self.execute("rollback", "ROLLBACK") {
                        return self.failed(&error);
                    }
                }
            }
            (Failed::Session, Some(open_us)) => {
                self.ended(End { open_us, over_us, outcome: Outcome::RolledBack });
            }
            (Failed::Error, None) if !commits_inside => {
                self.ended(End { open_us: began_us, over_us, outcome: Outcome::RolledBack });
            }
            (_, None) => self.ended(End { open_us: began_us, over_us: Us::MAX, outcome: Outcome::Unknown }),
        }
        failed
    }

    fn failed(&mut self, error: &postgres::Error) -> Failed {
        let code = error.code().map_or(tally::CONNECTION, |code| code.code()).to_owned();
        let constraint = error.as_db_error().and_then(|error| error.constraint());
        // Only the ledger may have something already.
        let what = match constraint.filter(|constraint| *constraint != LEDGER_KEY) {
            Some(constraint) => format!("{code} of {constraint}"),
            None => code.clone(),
        };
        self.tally.ended_with(what, error);
        if matches!(code.as_str(), "57014" | "55P03") {
            self.world.counters.cut_off.fetch_add(1, Relaxed);
        }
        let severity = error.as_db_error().and_then(|error| error.parsed_severity());
        if code == NOT_HELD {
            self.seat.refuses(1);
        }
        if severity == Some(Severity::Error) && !error.is_closed() {
            self.key_exists = key_of(error);
            return Failed::Error;
        }
        self.client = None;
        self.world.lost_session(self.call_began_us);
        Failed::Session
    }

    fn ended(&mut self, end: End) {
        self.open_us = None;
        self.level = tally::ALONE;
        self.savepoint = None;
        self.own.clear();
        self.seat.ends();
        let (sent, delivered, acts) = self.log.ended(end);
        let counters = &self.world.counters;
        if end.outcome == Outcome::Acknowledged {
            counters.acknowledged.fetch_add(sent as u64, Relaxed);
            counters.acts.fetch_add(acts as u64, Relaxed);
        }
        counters.delivered.fetch_add(delivered as u64, Relaxed);
    }

    // ---- sending -----------------------------------------------------------------------------------------------

    /// New keys, about to be sent to `queue` with this delay; [`Actor::send`] them.
    pub fn keys(&mut self, queue: u8, messages: usize, delay_us: Us) -> Vec<i64> {
        let due_us = self.world.now_us() + delay_us;
        let keys = self.log.sending(queue, messages, due_us);
        self.own.extend(&keys);
        keys.into_iter().map(|key| key as i64).collect()
    }

    /// The same for messages whose sending is certain to be undone.
    pub fn keys_undone(&mut self, queue: u8, messages: usize) -> Vec<i64> {
        let (mark, now_us) = (self.log.mark(), self.world.now_us());
        let keys = self.log.sending(queue, messages, now_us);
        self.log.rolled_back_to(mark, now_us, Us::MAX);
        keys.into_iter().map(|key| key as i64).collect()
    }

    /// A statement that returns nothing that is logged, such as one that sends what was announced by [`Actor::keys`].
    pub fn send(&mut self, call: &'static str, sql: &'static str, parameters: &[&(dyn ToSql + Sync)]) -> Done {
        let returned = self.call(call, sql, parameters, false)?;
        self.did(call, true);
        self.answered(&returned);
        Ok(())
    }

    /// The same where it commits in between: if it fails nobody knows how far it came.
    pub fn committing(
        &mut self,
        call: &'static str,
        sql: &'static str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Done {
        let returned = self.effecting(call, sql, parameters, &[], true)?;
        self.did(call, true);
        self.answered(&returned);
        Ok(())
    }

    /// The same for a statement without parameters.
    pub fn committing_plain(&mut self, call: &'static str, sql: &str) -> Done {
        let began_us = self.world.now_us();
        match self.execute(call, sql) {
            Ok(()) => {
                let (open_us, over_us) = (began_us, self.world.now_us());
                self.ended(End { open_us, over_us, outcome: Outcome::Acknowledged });
                Ok(())
            }
            Err(error) => Err(self.call_failed(began_us, true, &error)),
        }
    }

    /// By COPY, in a transaction of its own: the answer to a COPY alone comes before its commit (the client library does
    /// not wait for more), and a server that dies in between still sends it.
    pub fn copy(&mut self, sql: &str, rows: &str) -> Done {
        self.begin("read committed")?;
        let Some(client) = &mut self.client else { return Err(Failed::Session) };
        let began_us = self.world.now_us();
        self.call_began_us = began_us;
        self.seat.opens("copy", began_us);
        let result = client.copy_in(sql).and_then(|mut writer| {
            // A failure to write is told by finish().
            let _ = std::io::Write::write_all(&mut writer, rows.as_bytes());
            writer.finish()
        });
        self.closes("copy", result.is_err());
        match result {
            Ok(_) => {
                self.did("copy", true);
                // A cancel may come after the answer, and then COMMIT would roll back without a word.
                self.plain("copy", "SELECT")?;
                self.commit()
            }
            Err(error) => Err(self.call_failed(began_us, false, &error)),
        }
    }

    // ---- consuming ---------------------------------------------------------------------------------------------

    /// A statement that reads: it returns message id, lease, count, key, the queue's name, and whether the message is
    /// another than what was sent under that key.
    pub fn read(
        &mut self,
        call: &'static str,
        sql: &'static str,
        parameters: &[&(dyn ToSql + Sync)],
        lease_us: Us,
    ) -> Done<Vec<Held>> {
        let returned = self.call(call, sql, parameters, false)?;
        let held = self.log_delivered(&returned, lease_us);
        self.did(call, !held.is_empty());
        self.answered(&returned);
        Ok(held)
    }

    fn log_delivered(&mut self, returned: &Returned, lease_us: Us) -> Vec<Held> {
        let mut held = Vec::with_capacity(returned.rows.len());
        for row in &returned.rows {
            let (key, count): (i64, i64) = (row.get(3), row.get(2));
            let name: &str = row.get(4);
            if row.get(5) {
                self.tally.altered.push(format!("{key:x} in {name}, delivered for the {count}. time"));
            }
            let queue = QUEUES.iter().position(|queue| *queue == name).unwrap_or(QUEUES.len()) as u8;
            let one = Held { key: key as Key, queue, msg_id: row.get(0), lease_id: row.get(1) };
            self.log.delivered(Delivered {
                key: one.key,
                queue,
                is_own: self.own.contains(&one.key),
                lease_id: one.lease_id,
                count: count as i32,
                lease_us,
                began_us: returned.began_us,
                returned_us: returned.returned_us,
                end: End { open_us: 0, over_us: Us::MAX, outcome: Outcome::Unknown }, // settled by the log
            });
            held.push(one);
        }
        held
    }

    /// A statement that acts on leases and returns the ids of the messages for which it was done (others: refused).
    pub fn act(
        &mut self,
        call: &'static str,
        sql: &'static str,
        parameters: &[&(dyn ToSql + Sync)],
        on: &[Held],
        verb: Verb,
    ) -> Done<Vec<i64>> {
        let mark = self.log.mark();
        let tried_us = self.world.now_us();
        on.iter().for_each(|one| self.log.acting(one.key, one.lease_id, verb, tried_us));
        let returned = self.call(call, sql, parameters, false)?;
        let done: Vec<i64> = returned.rows.iter().filter_map(|row| row.get(0)).collect();
        self.log_answers(mark, returned.returned_us, on, &done);
        self.seat.refuses(on.len().saturating_sub(done.len()) as u64);
        self.did(call, !done.is_empty());
        self.answered(&returned);
        Ok(done)
    }

    fn log_answers(&mut self, mark: Mark, returned_us: Us, on: &[Held], done: &[i64]) {
        let is_done = |act: &Act| {
            let msg_id = on.iter().find(|one| one.lease_id == act.lease_id).map(|one| one.msg_id);
            msg_id.is_some_and(|msg_id| done.contains(&msg_id))
        };
        self.log.answered(mark, returned_us, |act| if is_done(act) { Answer::Done } else { Answer::Refused });
    }

    /// queue_delete_and_read: the answer does not say what it finished, so nothing is known but that it was asked for,
    /// unless it is strict.
    pub fn act_and_read(
        &mut self,
        sql: &'static str,
        parameters: &[&(dyn ToSql + Sync)],
        on: &[Held],
        lease_us: Us,
        is_strict: bool,
    ) -> Done<Vec<Held>> {
        let mark = self.log.mark();
        let tried_us = self.world.now_us();
        on.iter().for_each(|one| self.log.acting(one.key, one.lease_id, Verb::Finish, tried_us));
        let call = if is_strict { "delete_strictly_and_read" } else { "delete_and_read" };
        let returned = self.call(call, sql, parameters, false)?;
        if is_strict {
            self.log.answered(mark, returned.returned_us, |_| Answer::Done);
        }
        let held = self.log_delivered(&returned, lease_us);
        self.did(call, !held.is_empty());
        self.answered(&returned);
        Ok(held)
    }

    /// A statement that writes the ledger for what is held.
    pub fn effect(&mut self, sql: &'static str, parameters: &[&(dyn ToSql + Sync)], held: &[Held]) -> Done {
        let returned = self.effecting("ledger", sql, parameters, held, false)?;
        self.did("ledger", true);
        self.answered(&returned);
        Ok(())
    }

    /// A statement that reads, writes the ledger and finishes, all in one; it returns what [`Actor::read`] wants.
    pub fn pop(
        &mut self,
        call: &'static str,
        sql: &'static str,
        parameters: &[&(dyn ToSql + Sync)],
        lease_us: Us,
    ) -> Done {
        let result = self.effecting(call, sql, parameters, &[], false);
        if matches!(result, Err(Failed::Session)) {
            self.world.counters.pops_unknown.fetch_add(1, Relaxed);
        }
        let returned = result?;
        let held = self.log_delivered(&returned, lease_us);
        self.did(call, !held.is_empty());
        let mark = self.log.mark();
        held.iter().for_each(|one| self.log.acting(one.key, one.lease_id, Verb::Finish, returned.began_us));
        self.log.answered(mark, returned.returned_us, |_| Answer::Done);
        self.answered(&returned);
        Ok(())
    }

    /// A call that may write the ledger; nothing held: for what it reads itself.
    fn effecting(
        &mut self,
        call: &'static str,
        sql: &'static str,
        parameters: &[&(dyn ToSql + Sync)],
        held: &[Held],
        commits_inside: bool,
    ) -> Done<Returned> {
        self.key_exists = None;
        let began_us = self.world.now_us();
        let result = self.call(call, sql, parameters, commits_inside);
        if let Some(key) = self.key_exists.take() {
            let lease_id = held.iter().find(|one| one.key == key).map(|one| one.lease_id);
            let at_us = self.world.now_us();
            self.log.effect_refused(EffectRefused { key, lease_id, began_us, at_us });
        }
        result
    }
}

/// The key that the ledger has already, from the detail `Key (key)=(17) already exists.`
fn key_of(error: &postgres::Error) -> Option<Key> {
    let error = error.as_db_error()?;
    let detail = error.detail().filter(|_| error.constraint() == Some(LEDGER_KEY))?;
    detail.split_once(")=(")?.1.split_once(')')?.0.parse().ok()
}
