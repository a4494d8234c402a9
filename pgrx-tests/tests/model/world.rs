//! The server beside the model: sessions that take turns, what they answer, and whether that is allowed. The verbs are
//! in the `verbs_*` files; here is what they share. Decides nothing by the server's answer but what the model leaves
//! open: which of the messages that may come did.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postgres::{Client, SimpleQueryMessage};
use serde_json::{json, Value};

use crate::rng::{Rng, Step, Verb};
use crate::state::*;

/// What is wrong.
pub type Checked<T = ()> = Result<T, String>;
pub type Line = Vec<Option<String>>;

/// A step takes no longer than this, nor do all of a sequence together, for else real time would blur the model's.
const SLOW: Duration = Duration::from_secs(8);

static NEXT_NAME: AtomicU64 = AtomicU64::new(0);

pub struct World {
    pub clients: Vec<Client>,
    pub model: Model,
    /// What the clocks were shifted by so far, seconds.
    pub shift_s: i64,
    /// The dispatcher has not room for all there is.
    pub is_small: bool,
    /// What was sent to the server in this sequence.
    pub trace: Vec<String>,
    pub next_n: i64,
    /// Unlike any other's on this server.
    name: String,
    lease_ids: HashSet<i64>,
    /// Leases of this sequence, ended ones too.
    pub leases: HashMap<Key, Vec<i64>>,
    /// What plain SQL, or a purge, has deleted: nobody notices before its turn, so a lease of it lasts, and may be lengthened and given
    /// back.
    pub deleted: HashSet<Key>,
    /// How often a message was named that was not there: it may look ready until it is read.
    pub missed: HashMap<Key, u32>,
    begun: Instant,
    /// Reads, and those that were given less than was due.
    pub reads: u64,
    pub short_reads: u64,
    /// How often each verb was run, not counting steps that had nothing to do.
    pub ran: HashMap<Verb, u64>,
}

pub const PLAIN: Policy = Policy {
    lease: 5,
    max_deliveries: 0,
    retry_delay: 1,
    backoff: 3,
    require_lease: false,
    is_durable: false,
    paused: false,
};

pub fn seconds(units: Time) -> String {
    format!("'{} s'", units * UNIT_S)
}

pub fn or_null<T: ToString>(value: Option<T>) -> String {
    value.map_or("NULL".into(), |value| value.to_string())
}

pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

pub fn array<T: ToString>(elements: impl IntoIterator<Item = T>, of: &str) -> String {
    let elements: Vec<String> = elements.into_iter().map(|element| element.to_string()).collect();
    format!("ARRAY[{}]::{of}[]", elements.join(","))
}

/// Sometimes: some ids out of these, some twice, and others.
pub fn some_ids(rng: &mut Rng, there: Vec<i64>) -> Option<Vec<i64>> {
    let some = |rng: &mut Rng| match there.get(rng.below(there.len())) {
        Some(id) if rng.chance(85) => *id,
        _ => i64::MAX - rng.below(3) as i64,
    };
    rng.chance(30).then(|| (0..rng.below(6)).map(|_| some(rng)).collect())
}

pub fn int(value: &Option<String>) -> Checked<i64> {
    value.as_deref().and_then(|text| text.parse().ok()).ok_or_else(|| format!("no number: {value:?}"))
}

/// The id that was just given to the message with this number. A transaction above READ COMMITTED may still see the row
/// that it had in this queue before.
pub fn newest(queue: usize, n: i64) -> String {
    format!("SELECT msg_id FROM queue.{} WHERE message = '{n}' ORDER BY msg_id DESC LIMIT 1", QUEUES[queue])
}

pub fn jsonb(value: &Option<Value>) -> String {
    value.as_ref().map_or("NULL::jsonb".into(), |value| format!("{}::jsonb", quoted(&value.to_string())))
}

/// Headers as they were delivered, without when the message died.
pub fn headers(text: &Option<String>) -> Checked<Option<Value>> {
    let Some(text) = text else { return Ok(None) };
    let mut value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if let Some(letter) = value.get_mut("dead_letter").and_then(Value::as_object_mut) {
        if letter.remove("at").is_none() {
            return Err(format!("a dead letter does not say when: {text}"));
        }
    }
    Ok(Some(value))
}

/// The headers of a dead letter, but for the time.
pub fn dead_headers(queue: usize, id: i64, m: &Message, reason: &str, error: Option<&str>) -> Value {
    let mut letter = json!({
        "queue": QUEUES[queue], "msg_id": id, "reason": reason, "error": error, "delivery_count": m.count,
    });
    match &m.row.headers {
        Some(Value::Object(object)) if !object.is_empty() => {
            let mut all = object.clone();
            all.insert("dead_letter".into(), letter);
            Value::Object(all)
        }
        Some(kept) => {
            letter["headers"] = kept.clone();
            json!({ "dead_letter": letter })
        }
        None => json!({ "dead_letter": letter }),
    }
}

/// What they were before.
pub fn headers_before(value: &Option<Value>) -> Option<Value> {
    let Some(letter) = value.as_ref().and_then(|value| value.get("dead_letter")) else { return value.clone() };
    if let Some(kept) = letter.get("headers") {
        return Some(kept.clone());
    }
    let mut object = value.as_ref()?.as_object()?.clone();
    object.remove("dead_letter");
    (!object.is_empty()).then_some(Value::Object(object))
}

/// Where a dead letter comes from.
pub fn source(value: &Option<Value>) -> Option<&str> {
    value.as_ref()?.get("dead_letter")?.get("queue")?.as_str()
}

impl World {
    /// `clients`: one for each session and one more, in a database with the three queues in it, all empty; `shift_s`:
    /// what the server's clocks are shifted by already.
    pub fn new(clients: Vec<Client>, is_small: bool, shift_s: i64) -> World {
        assert_eq!(clients.len(), SESSIONS + 1);
        World {
            clients,
            model: Model {
                now: 0,
                messages: Default::default(),
                archive: Default::default(),
                next_archived: 0,
                commits: 0,
                policies: [PLAIN; QUEUES.len()],
                sessions: (0..SESSIONS + 1 + PREPARED).map(|_| Session::default()).collect(),
                phantoms: Vec::new(),
                finished_late: Default::default(),
                marks: [i64::MAX; QUEUES.len()],
            },
            shift_s,
            is_small,
            trace: Vec::new(),
            next_n: 0,
            name: NEXT_NAME.fetch_add(1, Ordering::Relaxed).to_string(),
            lease_ids: HashSet::new(),
            leases: HashMap::new(),
            deleted: HashSet::new(),
            missed: HashMap::new(),
            begun: Instant::now(),
            reads: 0,
            short_reads: 0,
            ran: HashMap::new(),
        }
    }

    /// Where there is little room another queue takes of it what it can: half of all slots leased for some time, and its
    /// window full of what is ready.
    pub fn fill(&mut self) -> Checked {
        if self.is_small {
            let few = "(SELECT count(*) FROM queue.filler) < 5000";
            let sql = format!(
                "INSERT INTO queue.filler (message) SELECT '0' FROM generate_series(1, 8000) WHERE {few}"
            );
            self.ask(SESSIONS, &sql)?;
            self.ask(SESSIONS, "SELECT count(*) FROM queue_read('filler', 1500, '17 min')")?;
            self.ask(SESSIONS, "SELECT count(*) FROM queue_pop('filler', 70)")?;
        }
        Ok(())
    }

    /// One more sequence begins, in empty queues.
    pub fn begin(&mut self) {
        self.trace.clear();
        self.leases.clear();
        self.deleted.clear();
        self.missed.clear();
        self.model.finished_late.clear();
        self.lease_ids.clear(); // the dispatcher's own tests know all of them
        self.begun = Instant::now();
    }

    /// What was found means nothing: the machine was too slow for the model's clock.
    pub fn was_slow(&self) -> bool {
        self.begun.elapsed() > SLOW
    }

    /// It was not the machine that took this time.
    pub fn not_counting(&mut self, time: Duration) {
        self.begun += time;
    }

    // ---- calls -------------------------------------------------------------------------------------------------

    /// Runs a statement; inside: the SQLSTATE of its error.
    pub fn run(&mut self, s: usize, sql: &str) -> Checked<Result<Vec<Line>, String>> {
        self.trace.push(format!("{s}: {sql}"));
        let result = match self.clients[s].simple_query(sql) {
            Ok(messages) => {
                let lines = messages.iter().filter_map(|message| match message {
                    SimpleQueryMessage::Row(row) => {
                        Some((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect())
                    }
                    _ => None,
                });
                Ok(lines.collect::<Vec<Line>>())
            }
            Err(error) => {
                // The client hears of an error before the server has rolled back: the others go on after that.
                self.clients[s].simple_query("").map_err(|error| format!("after {sql}: {error}"))?;
                match error.code() {
                    Some(code) => Err(code.code().to_owned()),
                    None => return Err(format!("{sql}: {error}")),
                }
            }
        };
        if let Some(last) = self.trace.last_mut() {
            match &result {
                Ok(lines) => {
                    let lines: Vec<String> = lines
                        .iter()
                        .map(|line| {
                            let cells: Vec<&str> =
                                line.iter().map(|cell| cell.as_deref().unwrap_or("null")).collect();
                            cells.join(" ")
                        })
                        .collect();
                    last.push_str(&format!(" -> {}", lines.join(" | ")));
                }
                Err(code) => last.push_str(&format!(" -> ERROR {code}")),
            }
        }
        Ok(result)
    }

    /// Runs a statement that must succeed.
    pub fn ask(&mut self, s: usize, sql: &str) -> Checked<Vec<Line>> {
        self.run(s, sql)?.map_err(|code| format!("error {code}, and none was due"))
    }

    /// The value of a statement that must give one.
    pub fn value(&mut self, s: usize, sql: &str) -> Checked<Option<String>> {
        let lines = self.ask(s, sql)?;
        match lines.as_slice() {
            [line] if line.len() == 1 => Ok(line[0].clone()),
            _ => Err(format!("one value was due, not {lines:?}")),
        }
    }

    /// A statement of this session is over: without a transaction block it has committed.
    pub fn done(&mut self, s: usize) {
        if !self.model.sessions[s].is_open {
            self.model.commit(s);
        }
    }

    /// A time of the model on the server's wall clock, as SQL. Always in the future by some seconds or in the past.
    pub fn wall(&self, at: Time) -> String {
        format!("clock_timestamp() + '{} s'::interval", self.shift_s + (at - self.model.now) * UNIT_S)
    }

    /// The SQL for how many seconds a column lies ahead on the shifted clock.
    pub fn ahead(&self, column: &str) -> String {
        format!("round(extract(epoch FROM {column} - clock_timestamp()) - {})::int8", self.shift_s)
    }

    /// Whether so many seconds ahead are so many units, as far as one can tell.
    pub fn is_ahead(&self, seconds: &Option<String>, units: Time) -> bool {
        int(seconds).is_ok_and(|seconds| (seconds - units * UNIT_S).abs() < UNIT_S / 2)
    }

    pub fn number(&mut self) -> i64 {
        self.next_n += 1;
        self.next_n
    }

    pub fn advance(&mut self, by: Time) -> Checked {
        debug_assert!(by % 2 == 0);
        let by_s = seconds(by);
        self.ask(SESSIONS, &format!("SELECT queue_test.clock_shift({by_s}, {by_s})"))?;
        self.shift_s += by * UNIT_S;
        self.model.advance(by);
        Ok(())
    }

    // ---- what the worker does meanwhile --------------------------------------------------------------------------

    /// The worker has moved a message to the dead-letter queue, as the server shows it. Believed only of one that it
    /// may have moved.
    pub fn follow_dead(&mut self, id: i64, n: i64, has: &Option<Value>) -> Checked {
        let from = self.model.keys(0).into_iter().find(|key| self.model.messages[key].n == n);
        let key = from
            .filter(|key| self.model.may_go(*key))
            .ok_or_else(|| format!("message {id} of queue d (number {n}) appeared from nowhere"))?;
        let m = &self.model.messages[&key];
        let error = m.row.error.clone();
        let reasons =
            [("expired", m.is_expired(self.model.now)), ("max_deliveries", self.model.exhausted(key))];
        let expected: Vec<Value> = reasons
            .into_iter()
            .filter(|(_, may_be)| *may_be)
            .map(|(reason, _)| dead_headers(key.0, key.1, m, reason, error.as_deref()))
            .collect();
        if !has.as_ref().is_some_and(|has| expected.contains(has)) {
            return Err(format!("headers {has:?} of a dead letter, not one of {expected:?}"));
        }
        let row = Row { due: None, expires: None, error, headers: has.clone() };
        self.model.messages.remove(&key);
        let mut letter = Message::new(n, row, None);
        letter.born_at = None;
        letter.is_late = true; // it may have come in the middle of the call that shows it
        self.model.messages.insert((DEAD, id), letter);
        Ok(())
    }

    /// Every row as session `s` sees it is where the model has it, or may be.
    pub fn look(&mut self, s: usize) -> Checked {
        let mut parts = Vec::new();
        for (q, name) in QUEUES.iter().enumerate() {
            parts.push(format!(
                "SELECT {q}, msg_id, message::text, headers::text, delivery_count, null, last_error FROM queue.{name}"
            ));
            parts.push(format!(
                "SELECT {}, msg_id, message::text, headers::text, delivery_count, archive_reason, last_error \
                 FROM queue_archive.{name}",
                q + QUEUES.len()
            ));
        }
        let lines = self.ask(s, &parts.join(" UNION ALL "))?;
        let mut live = HashSet::new();
        let mut archived = Vec::new();
        for line in &lines {
            let (place, id, n) = (int(&line[0])? as usize, int(&line[1])?, int(&line[2])?);
            if place >= QUEUES.len() {
                archived.push((
                    place - QUEUES.len(),
                    id,
                    n,
                    line[5].clone(),
                    int(&line[4])?,
                    headers(&line[3])?,
                ));
                continue;
            }
            let key = (place, id);
            live.insert(key);
            let is_known = self.model.messages.get(&key).is_some_and(|m| m.n == n && m.is_seen_by(s));
            if !is_known && place == DEAD && !self.model.messages.contains_key(&key) {
                self.follow_dead(id, n, &headers(&line[3])?)?;
            } else if !is_known {
                return Err(format!("row {key:?} (number {n}) should not be there"));
            }
            let m = &self.model.messages[&key];
            let row = m.row_seen_by(s);
            if row.error != line[6] || row.headers != headers(&line[3])? {
                return Err(format!("row {key:?} is {line:?}, not {row:?}"));
            }
        }
        self.look_gone(s, &live, &archived)?;
        self.look_archived(s, archived)
    }

    /// What is not there has been moved away.
    fn look_gone(&mut self, s: usize, live: &HashSet<Key>, archived: &[Arch]) -> Checked {
        let keys: Vec<Key> = self.model.messages.keys().copied().collect();
        for key in keys {
            let m = &self.model.messages[&key];
            if !m.is_seen_by(s) || live.contains(&key) {
                continue;
            }
            let (n, is_expired) = (m.n, m.is_expired(self.model.now));
            let has_died = archived.iter().find(|(q, _, of, reason, ..)| {
                *q == key.0 && *of == n && reason.as_deref() == Some("max_deliveries")
            });
            // Without a dead-letter queue: expired ones are deleted, exhausted ones archived.
            if key.0 == 0 || !self.model.may_go(key) || has_died.is_none() && !is_expired {
                return Err(format!("message {key:?} (number {n}) is lost"));
            }
            let m = self.model.messages.remove(&key).expect("listed");
            if has_died.is_some() {
                let row = Archived {
                    queue: key.0,
                    id: key.1,
                    n,
                    reason: "max_deliveries",
                    count: m.count,
                    headers: m.row.headers,
                    born_by: None,
                    gone_by: None,
                };
                self.model.archive_add(None, row);
            }
        }
        Ok(())
    }

    fn look_archived(&mut self, s: usize, mut archived: Vec<Arch>) -> Checked {
        for row in self.model.archive.values() {
            if row.born_by.is_some_and(|by| by != s) || row.gone_by == Some(s) {
                continue;
            }
            let found = archived.iter().position(|(q, id, n, reason, count, headers)| {
                (*q, *id, *n) == (row.queue, row.id, row.n)
                    && reason.as_deref() == Some(row.reason)
                    && *count == i64::from(row.count)
                    && *headers == row.headers
            });
            match found {
                Some(at) => drop(archived.swap_remove(at)),
                None => return Err(format!("archived {row:?} is not there: {archived:?}")),
            }
        }
        if archived.is_empty() {
            Ok(())
        } else {
            Err(format!("archived rows that should not be there: {archived:?}"))
        }
    }

    pub fn has_limbo(&self, queue: usize) -> bool {
        self.model.keys(queue).into_iter().any(|key| self.model.may_go(key))
    }

    /// A lease that no delivery had before.
    pub fn lease_is_new(&mut self, key: Key, id: i64) -> Checked {
        self.leases.entry(key).or_default().push(id);
        if id != 0 && self.lease_ids.insert(id) {
            Ok(())
        } else {
            Err(format!("lease {id} repeats"))
        }
    }

    // ---- steps -------------------------------------------------------------------------------------------------

    /// The session of a step, or, if what it is about is not there, the next where it is.
    fn session_for(&self, step: Step) -> usize {
        let is_fit = |s: &usize| {
            let session = &self.model.sessions[*s];
            match step.verb {
                Verb::End | Verb::Savepoint => session.is_open,
                Verb::RollbackTo | Verb::ReleaseSavepoint => !session.saves.is_empty(),
                _ => true,
            }
        };
        (0..SESSIONS).map(|i| (step.session + i) % SESSIONS).find(is_fit).unwrap_or(step.session)
    }

    pub fn step(&mut self, step: Step) -> Checked {
        let Step { verb, seed, .. } = step;
        let s = self.session_for(step);
        let mut rng = Rng::new(seed);
        let rng = &mut rng;
        if self.is_small && rng.chance(5) {
            self.ask(SESSIONS, "SELECT count(*) FROM queue_read('filler', 100, '17 min')")?;
        }
        let before = self.trace.len();
        let is_open = self.model.sessions[s].is_open;
        if self.model.sessions[s].is_failed && !matches!(verb, Verb::End | Verb::RollbackTo) {
            return Ok(());
        }
        match verb {
            Verb::Send => self.send(s, rng)?,
            Verb::SendBatch => self.send_batch(s, rng)?,
            Verb::SendEntries => self.send_entries(s, rng)?,
            Verb::Insert => self.insert(s, rng)?,
            Verb::Copy => self.copy(s, rng)?,
            Verb::Read => self.read(s, rng)?,
            Verb::ReadAny => self.read_any(s, rng)?,
            Verb::Wait => self.wait(s, rng)?,
            Verb::Pop => self.pop(s, rng)?,
            Verb::Delete => self.finish(s, rng, false)?,
            Verb::Archive => self.finish(s, rng, true)?,
            Verb::DeleteAndRead => self.delete_and_read(s, rng)?,
            Verb::Retry => self.retry(s, rng)?,
            Verb::Reject => self.reject(s, rng)?,
            Verb::Release => self.release(s, rng)?,
            Verb::Extend => self.extend(s, rng)?,
            Verb::Cancel => self.cancel(s, rng)?,
            Verb::Peek => self.peek(s, rng)?,
            Verb::Update => self.update(s, rng)?,
            Verb::DeleteRow => self.delete_row(s, rng)?,
            Verb::Purge => self.purge(s, rng)?,
            Verb::Truncate => self.truncate(s, rng)?,
            Verb::Redrive => self.redrive(s, rng)?,
            Verb::Unarchive => self.unarchive(s, rng)?,
            Verb::Alter if !is_open => self.alter(s, rng)?,
            Verb::Scratch if !is_open => self.scratch(s, rng)?,
            Verb::Begin if !is_open => self.open(s, rng)?,
            Verb::Prepare if is_open => self.prepare(s)?,
            Verb::Prepare => self.end_prepared(s, rng)?,
            Verb::End if is_open => self.end(s, rng.chance(65))?,
            Verb::Savepoint if is_open && self.model.sessions[s].saves.len() < 4 => {
                let place = self.model.sessions[s].saves.len();
                self.ask(s, &format!("SAVEPOINT s{place}"))?;
                let len = self.model.sessions[s].log.len();
                self.model.sessions[s].saves.push(len);
            }
            Verb::RollbackTo if !self.model.sessions[s].saves.is_empty() => {
                let place = rng.below(self.model.sessions[s].saves.len());
                self.ask(s, &format!("ROLLBACK TO s{place}"))?;
                self.undone(s);
                self.model.rollback_to(s, place);
            }
            Verb::ReleaseSavepoint if !self.model.sessions[s].saves.is_empty() => {
                let place = rng.below(self.model.sessions[s].saves.len());
                self.ask(s, &format!("RELEASE s{place}"))?;
                self.model.sessions[s].saves.truncate(place);
            }
            Verb::Advance => self.advance(2 * rng.pick(&[1, 1, 2, 4]))?,
            _ => {}
        }
        if self.trace.len() > before {
            *self.ran.entry(verb).or_default() += 1;
        }
        Ok(())
    }

    fn open(&mut self, s: usize, rng: &mut Rng) -> Checked {
        // Of two that are serializable Postgres may refuse one, where it likes.
        let is_alone = self.model.sessions.iter().all(|session| !session.is_serializable);
        let level = match rng.below(10) {
            0 | 1 => " ISOLATION LEVEL REPEATABLE READ",
            2 | 3 if is_alone => " ISOLATION LEVEL SERIALIZABLE",
            _ => "",
        };
        self.ask(s, &format!("BEGIN{level}"))?;
        self.model.sessions[s].is_open = true;
        if !level.is_empty() {
            self.ask(s, "SELECT 1")?; // its snapshot
            self.model.sessions[s].snapshot = Some(self.model.commits);
            self.model.sessions[s].is_serializable = level.ends_with("SERIALIZABLE");
        }
        Ok(())
    }

    fn gid(&self, place: usize) -> String {
        format!("{}-{place}", self.name)
    }

    /// Prepares the open transaction: refused if it has a lease, or has finished or named anything.
    fn prepare(&mut self, s: usize) -> Checked {
        let Some(place) = (0..PREPARED).find(|place| !self.model.sessions[SESSIONS + 1 + place].is_open) else {
            return Ok(());
        };
        let refusal = self.model.is_preparable(s);
        let may_be_refused = self.model.sessions[s].has_read || !self.deleted.is_empty();
        let sql = format!("PREPARE TRANSACTION '{}'", self.gid(place));
        match (self.run(s, &sql)?, refusal) {
            (Ok(_), Some(true)) | (Ok(_), None) => self.model.prepare(s, SESSIONS + 1 + place),
            (Err(code), Some(false) | None) if code == "0A000" => {
                self.undone(s);
                self.model.rollback(s);
            }
            (Err(code), Some(true)) if code == "0A000" && may_be_refused => {
                self.undone(s);
                self.model.rollback(s);
            }
            (answer, _) => return Err(format!("PREPARE TRANSACTION gave {answer:?}, and it may: {refusal:?}")),
        }
        Ok(())
    }

    fn end_prepared(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let there = (0..PREPARED).find(|place| self.model.sessions[SESSIONS + 1 + place].is_open);
        let Some(place) = there else { return Ok(()) };
        let does_commit = rng.chance(65);
        let verb = if does_commit { "COMMIT" } else { "ROLLBACK" };
        self.ask(s, &format!("{verb} PREPARED '{}'", self.gid(place)))?;
        if does_commit {
            self.model.commit(SESSIONS + 1 + place);
            // The worker is told, and others find what it was sent only after it has looked.
            let begun = Instant::now();
            let len = self.trace.len();
            while self.value(SESSIONS, "SELECT count(*) FROM queue_catalog.prepared")?.as_deref() != Some("0") {
                if begun.elapsed() > Duration::from_secs(5) {
                    return Err("the worker does not look for what was prepared".into());
                }
                std::thread::sleep(Duration::from_millis(1));
                self.trace.truncate(len);
            }
            std::thread::sleep(Duration::from_millis(2)); // from its commit until it has said so
        } else {
            self.model.rollback(SESSIONS + 1 + place);
        }
        Ok(())
    }

    /// Leaves nothing prepared behind: it would keep the database.
    pub fn forget_prepared(&mut self) {
        for place in 0..PREPARED {
            let sql = format!("ROLLBACK PREPARED '{}'", self.gid(place));
            drop(self.clients[SESSIONS].simple_query(&sql));
        }
    }

    /// Ends what is prepared.
    pub fn end_all_prepared(&mut self, rng: &mut Rng) -> Checked {
        for _ in 0..PREPARED {
            self.end_prepared(0, rng)?;
        }
        Ok(())
    }

    pub fn end(&mut self, s: usize, does_commit: bool) -> Checked {
        self.ask(s, if does_commit { "COMMIT" } else { "ROLLBACK" })?;
        if does_commit && !self.model.sessions[s].is_failed {
            self.model.commit(s);
        } else {
            self.undone(s);
            self.model.rollback(s);
        }
        Ok(())
    }

    /// What a reader has looked for in vain, since it was named before it was there, is loaded once that is undone.
    pub fn undone(&mut self, s: usize) {
        if self.model.sessions[s].has_read {
            let queues: HashSet<usize> = self.missed.keys().map(|key| key.0).collect();
            queues.into_iter().for_each(|queue| self.model.is_marked(queue));
        }
    }
}

/// An archived row: queue, message, number, reason, deliveries, headers.
type Arch = (usize, i64, i64, Option<String>, i64, Option<Value>);
