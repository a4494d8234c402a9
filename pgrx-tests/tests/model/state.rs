//! The plain model: what SQL.md and the README promise of messages, leases and transactions, in ordinary maps. Knows
//! no SQL and no server; says of each message who may get it and who must.
//!
//! Time is counted in units of [`UNIT_S`]. The present is always even and all that is to come odd, so that nothing is
//! ever due "just now", however slow the machine is.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

pub type Time = i64;
/// A unit, seconds: short of it and beyond it lies the dispatcher's horizon (a minute).
pub const UNIT_S: i64 = 20;

pub const SESSIONS: usize = 3;
/// What fails in the first goes to the third, what fails in the others to their archives.
pub const QUEUES: [&str; 3] = ["a", "b", "d"];
pub const DEAD: usize = 2;
/// So many transactions may be prepared: each is a session of its own from then on, after the observer's.
pub const PREPARED: usize = 2;

/// Queue and message id.
pub type Key = (usize, i64);

#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub due: Option<Time>,
    pub expires: Option<Time>,
    pub error: Option<String>,
    pub headers: Option<Value>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lease {
    pub id: i64,
    pub until: Time,
    /// Where an own message's lease is to end at commit, if earlier.
    pub commit_until: Time,
}

#[derive(Clone, Debug)]
pub struct Message {
    /// What it says: each sends another number.
    pub n: i64,
    /// As it is committed, or, of a session's own message, as it is.
    pub row: Row,
    /// As the session that has changed it sees it.
    pub draft: Option<Row>,
    /// Deliveries.
    pub count: u32,
    /// Those that its row tells of.
    pub row_count: u32,
    /// Reads by the transaction that sent it that were undone: they count.
    pub undone: u32,
    /// After so many commits its row was there, and was as it is. `None`: who knows, the worker has put it there.
    pub born_at: Option<u64>,
    pub changed_at: u64,
    /// Not before this, by what is remembered of reads that rolled back: at the earliest, at the latest.
    pub back: (Time, Time),
    /// Reads in a row that rolled back: at least, at most (where a lease had ended before the rollback, it depends
    /// on who looked in between).
    pub returned: (u32, u32),
    pub lease: Option<Lease>,
    /// A finish or retry of this session waits for its commit.
    pub pin: Option<usize>,
    /// Sent by this session, which has not committed.
    pub sent_by: Option<usize>,
    /// Deleted by this session, which has not committed.
    pub gone_by: Option<usize>,
    /// Its row was changed by this session, which has not committed: others would wait.
    pub locked_by: Option<usize>,
    /// Perhaps not tracked yet, being due since the clock moved, or under a mark: who reads loads it, after what is ready.
    pub is_late: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub lease: Time,
    pub max_deliveries: u32,
    pub retry_delay: Time,
    pub backoff: i64,
    pub require_lease: bool,
    pub is_durable: bool,
    pub paused: bool,
}

/// `min(delay * backoff^(failures - 1), max)`; the jitter is 0 here.
pub const RETRY_MAX: Time = 27;

impl Policy {
    pub fn backoff(&self, failures: u32) -> Time {
        let factor = self.backoff.saturating_pow(failures.saturating_sub(1).min(20));
        self.retry_delay.saturating_mul(factor).min(RETRY_MAX)
    }

    pub fn is_exhausted(&self, count: u32) -> bool {
        self.max_deliveries > 0 && count >= self.max_deliveries
    }
}

#[derive(Clone, Debug)]
pub struct Archived {
    pub queue: usize,
    pub id: i64,
    pub n: i64,
    pub reason: &'static str,
    pub count: u32,
    pub headers: Option<Value>,
    pub born_by: Option<usize>,
    pub gone_by: Option<usize>,
}

#[derive(Clone, Debug)]
pub enum Then {
    Finish,
    Release,
    Rewrite(Row, u32),
}

/// What an open transaction has done.
#[derive(Clone, Debug)]
pub enum Entry {
    Sent(Key),
    OwnWas(Key, Box<Message>),
    Took(Key, i64),
    Pinned {
        key: Key,
        then: Then,
        was: Box<Message>,
    },
    /// Looked for, not there: nobody gets it before the transaction ends, should it come.
    Phantom(Key),
    Shorten(Key, i64, Time),
    /// Plain SQL; `None`: deleted.
    Changed {
        key: Key,
        row: Option<Row>,
        was: Box<Message>,
    },
    Archived(usize),
    Unarchived(usize),
}

#[derive(Default)]
pub struct Session {
    pub is_open: bool,
    /// After an error: only a rollback helps.
    pub is_failed: bool,
    pub log: Vec<Entry>,
    /// Lengths of the log at its savepoints.
    pub saves: Vec<usize>,
    /// It may have a transaction id.
    pub has_id: bool,
    /// It has asked for messages.
    pub has_read: bool,
    /// Above READ COMMITTED: it sees what was committed before so many commits.
    pub snapshot: Option<u64>,
    pub is_serializable: bool,
}

pub struct Model {
    pub now: Time,
    pub messages: BTreeMap<Key, Message>,
    pub archive: BTreeMap<usize, Archived>,
    pub next_archived: usize,
    /// Commits so far.
    pub commits: u64,
    pub policies: [Policy; QUEUES.len()],
    pub sessions: Vec<Session>,
    pub phantoms: Vec<(Key, usize)>,
    /// Finished while they were perhaps being loaded: what is left of them looks ready until it is read.
    pub finished_late: BTreeSet<Key>,
    /// Of each queue: what is sent from this id on is not published, but to be loaded; `i64::MAX`: all is published.
    pub marks: [i64; QUEUES.len()],
}

/// What a call that names a message must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Yes,
    No,
    /// The worker may have been faster.
    Either,
    /// It would wait for another session.
    Blocks,
}

impl Row {
    fn is_due(&self, now: Time) -> bool {
        self.due.is_none_or(|due| due <= now)
    }

    fn is_expired(&self, now: Time) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }

    /// Neither put off nor expired.
    fn is_up(&self, now: Time) -> bool {
        self.is_due(now) && !self.is_expired(now)
    }
}

impl Message {
    pub fn new(n: i64, row: Row, sent_by: Option<usize>) -> Message {
        Message {
            n,
            row,
            draft: None,
            count: 0,
            row_count: 0,
            undone: 0,
            born_at: Some(0),
            changed_at: 0,
            back: (0, 0),
            returned: (0, 0),
            lease: None,
            pin: None,
            sent_by,
            gone_by: None,
            locked_by: None,
            is_late: false,
        }
    }

    /// The lease that runs. A pin holds it beyond its end.
    pub fn leased(&self, now: Time) -> Option<Lease> {
        self.lease.filter(|lease| self.pin.is_some() || lease.until > now)
    }

    pub fn row_seen_by(&self, s: usize) -> &Row {
        self.draft.as_ref().filter(|_| self.locked_by == Some(s)).unwrap_or(&self.row)
    }

    pub fn is_seen_by(&self, s: usize) -> bool {
        self.sent_by.is_none_or(|by| by == s) && self.gone_by != Some(s)
    }

    fn is_due(&self, now: Time) -> bool {
        self.row.is_due(now)
    }

    pub fn is_expired(&self, now: Time) -> bool {
        self.row.is_expired(now)
    }
}

impl Model {
    pub fn exhausted(&self, key: Key) -> bool {
        self.policies[key.0].is_exhausted(self.messages[&key].count)
    }

    /// The worker moves it away now, or has.
    pub fn is_limbo(&self, key: Key) -> bool {
        let m = &self.messages[&key];
        let is_up = m.is_due(self.now) && m.back.0 <= self.now;
        self.is_free(key) && (m.is_expired(self.now) || is_up && self.exhausted(key))
    }

    /// The worker may move it away: had its last delivery while plain SQL put it off, it need not wait for that.
    pub fn may_go(&self, key: Key) -> bool {
        self.is_limbo(key) || self.is_free(key) && self.exhausted(key)
    }

    /// Nobody holds it.
    fn is_free(&self, key: Key) -> bool {
        let m = &self.messages[&key];
        let is_settled = m.sent_by.is_none() && m.pin.is_none() && m.locked_by.is_none();
        is_settled && m.leased(self.now).is_none()
    }

    /// Whether a read of this session may and whether it must give the message, if it asks for enough. What its own
    /// transaction has made of the row decides whether it may; what others know of it, too, whether it must.
    pub fn readable(&self, s: usize, key: Key) -> (bool, bool) {
        let m = &self.messages[&key];
        let may = m.is_seen_by(s)
            && m.pin.is_none()
            && m.leased(self.now).is_none()
            && m.row_seen_by(s).is_up(self.now)
            && m.back.0 <= self.now
            && !self.policies[key.0].paused
            && !self.exhausted(key);
        let is_hidden = self.phantoms.iter().any(|(of, _)| *of == key);
        (may, may && m.row.is_up(self.now) && m.back.1 <= self.now && !is_hidden)
    }

    /// This session has read, and may have met what its own transaction has deleted, put off or let expire: that is given
    /// to nobody, perhaps not to others either, before the transaction ends.
    pub fn withhold(&mut self, s: usize, queue: usize) {
        for key in self.keys(queue) {
            let m = &self.messages[&key];
            let is_in_doubt = m.locked_by == Some(s)
                && m.sent_by.is_none()
                && m.pin.is_none()
                && (m.gone_by == Some(s) || !m.row_seen_by(s).is_up(self.now));
            if is_in_doubt && !self.phantoms.contains(&(key, s)) {
                self.miss(s, key);
            }
        }
    }

    /// The lease that this session's transaction took last from the message.
    pub fn mine(&self, s: usize, key: Key) -> Option<i64> {
        self.sessions[s].log.iter().rev().find_map(|entry| match entry {
            Entry::Took(of, lease) if *of == key => Some(*lease),
            _ => None,
        })
    }

    /// What a finish, retry, reject, release (or `cancel`) of the message finds.
    pub fn fate(&self, s: usize, key: Key, lease: Option<i64>, is_cancel: bool) -> Fate {
        let Some(m) = self.messages.get(&key) else { return Fate::No };
        if m.sent_by.is_some_and(|by| by != s) {
            return Fate::No;
        }
        let running = m.leased(self.now);
        if m.sent_by == Some(s) {
            let holds = match (running, lease) {
                _ if m.gone_by == Some(s) => false,
                (Some(_), _) if is_cancel => false,
                (Some(held), Some(claimed)) => held.id == claimed,
                (None, Some(_)) => false,
                (_, None) => true,
            };
            return if holds { Fate::Yes } else { Fate::No };
        }
        if m.pin.is_some() {
            return Fate::No;
        }
        let fence = if is_cancel { None } else { lease.or_else(|| self.mine(s, key)) };
        let holds = match fence {
            Some(claimed) => running.is_some_and(|held| held.id == claimed),
            None => !(is_cancel && running.is_some()),
        };
        if !holds || m.gone_by == Some(s) {
            return Fate::No;
        }
        if m.locked_by.is_some_and(|by| by != s) {
            return Fate::Blocks;
        }
        // Whoever named it in vain before it was there keeps it until his transaction ends.
        if self.may_go(key) || self.phantoms.iter().any(|(of, _)| *of == key) {
            Fate::Either
        } else {
            Fate::Yes
        }
    }

    pub fn extendable(&self, s: usize, key: Key, lease: Option<i64>) -> bool {
        let Some(m) = self.messages.get(&key) else { return false };
        if m.sent_by.is_some_and(|by| by != s) || (m.sent_by == Some(s) && m.gone_by == Some(s)) {
            return false;
        }
        let fence = if m.sent_by.is_none() { lease.or_else(|| self.mine(s, key)) } else { lease };
        m.leased(self.now).is_some_and(|held| fence.is_none_or(|claimed| claimed == held.id))
    }

    // ---- what sessions do --------------------------------------------------------------------------------------

    pub fn log(&mut self, s: usize, entry: Entry) {
        self.sessions[s].log.push(entry);
    }

    pub fn send(&mut self, s: usize, key: Key, n: i64, row: Row) {
        self.messages.insert(key, Message::new(n, row, Some(s)));
        self.log(s, Entry::Sent(key));
        self.sessions[s].has_id = true;
    }

    fn change_own(&mut self, s: usize, key: Key, change: impl FnOnce(&mut Message)) {
        let was = Box::new(self.messages[&key].clone());
        self.log(s, Entry::OwnWas(key, was));
        change(self.messages.get_mut(&key).expect("own"));
    }

    /// A read gave the message, with this lease.
    pub fn take(&mut self, s: usize, key: Key, id: i64, length: Time) {
        let lease = Lease { id, until: self.now + length, commit_until: Time::MAX };
        let deliver = |m: &mut Message| {
            m.count += 1;
            m.lease = Some(lease);
            m.back = (0, 0);
        };
        if self.messages[&key].sent_by == Some(s) {
            self.change_own(s, key, deliver);
        } else {
            deliver(self.messages.get_mut(&key).expect("read"));
            self.log(s, Entry::Took(key, id));
        }
    }

    /// A finish or the like was accepted.
    pub fn pin(&mut self, s: usize, key: Key, then: Then) {
        if self.messages[&key].sent_by == Some(s) {
            self.change_own(s, key, |m| {
                m.lease = None;
                match then {
                    Then::Finish => m.gone_by = Some(s),
                    Then::Release => m.count = m.count.saturating_sub(1),
                    Then::Rewrite(row, count) => (m.row, m.count, m.row_count) = (row, count, count),
                }
            });
            return;
        }
        let now = self.now;
        let m = self.messages.get_mut(&key).expect("pinned");
        m.lease = m.leased(now);
        let was = Box::new(m.clone());
        m.pin = Some(s);
        match &then {
            Then::Finish => {
                (m.locked_by, m.gone_by) = (Some(s), Some(s));
                if m.is_late {
                    self.finished_late.insert(key);
                }
            }
            Then::Release => {}
            Then::Rewrite(row, _) => (m.locked_by, m.draft) = (Some(s), Some(row.clone())),
        }
        self.log(s, Entry::Pinned { key, then, was });
    }

    /// A call has named a message that is not there.
    pub fn miss(&mut self, s: usize, key: Key) {
        self.phantoms.push((key, s));
        self.log(s, Entry::Phantom(key));
    }

    pub fn extend(&mut self, s: usize, key: Key, until: Time) {
        let is_own = self.messages[&key].sent_by == Some(s);
        let held = self.messages[&key].lease.expect("extendable");
        let longer = Lease { until: held.until.max(until), ..held };
        if is_own {
            let commit_until = if until < held.until { until } else { Time::MAX };
            self.change_own(s, key, |m| m.lease = Some(Lease { commit_until, ..longer }));
            return;
        }
        self.messages.get_mut(&key).expect("extended").lease = Some(longer);
        // The last word counts. A longer lease survives a rollback, and what it took back stays taken back.
        for entry in &mut self.sessions[s].log {
            if let Entry::Shorten(of, id, until) = entry {
                if *of == key && *id == held.id {
                    *until = Time::MAX;
                }
            }
        }
        if until < held.until {
            self.log(s, Entry::Shorten(key, held.id, until));
        }
    }

    /// Plain SQL; `None`: deleted.
    pub fn change(&mut self, s: usize, key: Key, row: Option<Row>) {
        if self.messages[&key].sent_by == Some(s) {
            self.change_own(s, key, |m| match row {
                Some(row) => m.row = row,
                None => m.gone_by = Some(s),
            });
            return;
        }
        let m = self.messages.get_mut(&key).expect("changed");
        let was = Box::new(m.clone());
        m.locked_by = Some(s);
        match &row {
            Some(row) => m.draft = Some(row.clone()),
            None => m.gone_by = Some(s),
        }
        self.log(s, Entry::Changed { key, row, was });
    }

    pub fn archive_add(&mut self, s: Option<usize>, row: Archived) {
        let at = self.next_archived;
        self.next_archived += 1;
        self.archive.insert(at, row);
        if let Some(s) = s {
            self.log(s, Entry::Archived(at));
        }
    }

    // ---- prepared transactions ---------------------------------------------------------------------------------

    /// Whether this transaction may be prepared; `None`: who knows.
    pub fn is_preparable(&self, s: usize) -> Option<bool> {
        let log = &self.sessions[s].log;
        let holds = |entry: &Entry| matches!(entry, Entry::Took(..) | Entry::Pinned { .. });
        let mut own = log.iter().filter_map(|entry| match entry {
            Entry::Sent(key) => self.messages.get(key).filter(|m| m.gone_by != Some(s))?.lease,
            _ => None,
        });
        if log.iter().any(holds) || own.any(|lease| lease.until > self.now) {
            return Some(false);
        }
        // It has named what is not there, a lease is to be shortened, one's own has ended.
        let is_doubtful = log.iter().any(|entry| matches!(entry, Entry::Shorten(..) | Entry::Phantom(_)));
        let has_ended = log.iter().any(|entry| match entry {
            Entry::Sent(key) => self.messages.get(key).is_some_and(|m| m.lease.is_some()),
            _ => false,
        });
        if is_doubtful || has_ended {
            return None;
        }
        Some(true)
    }

    /// All that this session's transaction has done is another's from now on, which nobody is connected to.
    pub fn prepare(&mut self, s: usize, to: usize) {
        let moved = |by: &mut Option<usize>| {
            if *by == Some(s) {
                *by = Some(to);
            }
        };
        for m in self.messages.values_mut() {
            if m.sent_by == Some(s) {
                m.count = m.row_count; // what its row does not say is forgotten
                m.lease = None;
            }
            [&mut m.sent_by, &mut m.gone_by, &mut m.locked_by].into_iter().for_each(moved);
        }
        for row in self.archive.values_mut() {
            [&mut row.born_by, &mut row.gone_by].into_iter().for_each(moved);
        }
        self.phantoms.retain(|(_, by)| *by != s);
        self.sessions[to] = std::mem::take(&mut self.sessions[s]);
    }

    // ---- the ends of transactions ------------------------------------------------------------------------------

    pub fn commit(&mut self, s: usize) {
        self.commits += 1;
        let (now, commits) = (self.now, self.commits);
        // What a prepared transaction has sent is not published, but to be loaded.
        let is_late = s > SESSIONS;
        for entry in std::mem::take(&mut self.sessions[s].log) {
            match entry {
                Entry::Sent(key) => {
                    let Some(m) = self.messages.get_mut(&key) else { continue };
                    if m.gone_by == Some(s) {
                        self.messages.remove(&key);
                        continue;
                    }
                    m.sent_by = None;
                    (m.born_at, m.changed_at) = (Some(commits), commits);
                    let mark = &mut self.marks[key.0];
                    *mark = if is_late { key.1.min(*mark) } else { *mark };
                    m.is_late |= key.1 >= *mark;
                    if let Some(lease) = &mut m.lease {
                        lease.until = lease.until.min(lease.commit_until);
                    }
                }
                Entry::OwnWas(..) => {}
                Entry::Took(key, id) => {
                    let Some(m) = self.messages.get_mut(&key) else { continue };
                    if m.leased(now).is_some_and(|held| held.id == id) {
                        m.returned = (0, 0);
                    } else {
                        m.returned.0 = 0;
                    }
                }
                Entry::Pinned { key, then, .. } => self.settle(key, then),
                Entry::Phantom(key) => self.phantoms.retain(|phantom| *phantom != (key, s)),
                Entry::Shorten(key, id, until) => {
                    let Some(m) = self.messages.get_mut(&key) else { continue };
                    let is_free = m.pin.is_none();
                    if let Some(lease) = m.lease.as_mut().filter(|lease| is_free && lease.id == id) {
                        lease.until = lease.until.min(until);
                    }
                }
                Entry::Changed { key, row: None, .. } => {
                    self.messages.remove(&key);
                }
                Entry::Changed { key, row: Some(row), .. } => {
                    let Some(m) = self.messages.get_mut(&key) else { continue };
                    m.row = row;
                    m.back.0 = 0; // whoever tracks it looks at the row anew
                    let mark = &mut self.marks[key.0];
                    *mark = if is_late { key.1.min(*mark) } else { *mark };
                    m.is_late = is_late || (m.is_late && key.1 >= *mark);
                    m.changed_at = commits;
                    (m.locked_by, m.draft) = (m.pin, None);
                }
                Entry::Archived(at) => {
                    if let Some(row) = self.archive.get_mut(&at) {
                        row.born_by = None;
                        if row.gone_by == Some(s) {
                            self.archive.remove(&at);
                        }
                    }
                }
                Entry::Unarchived(at) => {
                    self.archive.remove(&at);
                }
            }
        }
        self.end(s);
    }

    fn settle(&mut self, key: Key, then: Then) {
        let Some(m) = self.messages.get_mut(&key) else { return };
        match then {
            Then::Finish => {
                self.messages.remove(&key);
                return;
            }
            // If the read was undone meanwhile, that has ended the delivery, and counts.
            Then::Release => m.count -= u32::from(m.lease.is_some()).min(m.count),
            Then::Rewrite(row, count) => {
                // (Likewise: its row does not tell of that delivery.)
                m.count = if m.lease.is_some() { count } else { count.max(m.count) };
                (m.row, m.row_count) = (row, count);
                (m.locked_by, m.draft) = (None, None);
                m.is_late = false;
                m.changed_at = self.commits;
            }
        }
        // A transaction that had changed the row, too, held it until its pin was settled.
        m.locked_by = m.locked_by.filter(|by| m.pin != Some(*by));
        (m.pin, m.lease, m.returned, m.back) = (None, None, (0, 0), (0, 0));
    }

    fn end(&mut self, s: usize) {
        self.sessions[s] = Session::default();
    }

    pub fn rollback(&mut self, s: usize) {
        self.undo(s, 0);
        self.end(s);
    }

    /// To the savepoint of that place, which stays.
    pub fn rollback_to(&mut self, s: usize, save: usize) {
        let len = self.sessions[s].saves[save];
        self.undo(s, len);
        self.sessions[s].saves.truncate(save + 1);
        self.sessions[s].is_failed = false;
    }

    /// A statement has failed.
    pub fn fail(&mut self, s: usize) {
        let len = self.sessions[s].saves.last().copied().unwrap_or(0);
        self.undo(s, len);
        if self.sessions[s].is_open {
            self.sessions[s].is_failed = true;
        } else {
            self.end(s);
        }
    }

    fn undo(&mut self, s: usize, len: usize) {
        while self.sessions[s].log.len() > len {
            let Some(entry) = self.sessions[s].log.pop() else { return };
            match entry {
                Entry::Sent(key) => {
                    self.messages.remove(&key);
                }
                Entry::OwnWas(key, mut was) => {
                    let Some(is) = self.messages.get(&key) else { continue };
                    let id = |lease: Option<Lease>| lease.map(|lease| lease.id);
                    let was_read = is.lease.is_some() && id(is.lease) != id(was.lease);
                    let undone = is.undone + u32::from(was_read);
                    was.count += undone.saturating_sub(was.undone);
                    was.undone = undone;
                    // What was lengthened stays longer.
                    if let (Some(lease), Some(held)) = (&mut was.lease, is.lease) {
                        if lease.id == held.id {
                            lease.until = lease.until.max(held.until);
                        }
                    }
                    self.messages.insert(key, *was);
                }
                Entry::Took(key, id) => self.give_back(key, id),
                Entry::Pinned { key, was, .. } => {
                    let Some(m) = self.messages.get_mut(&key) else { continue };
                    m.pin = None;
                    // A release locks no row: another may have since.
                    if m.locked_by == Some(s) {
                        (m.locked_by, m.gone_by, m.draft) = (was.locked_by, was.gone_by, was.draft);
                    }
                }
                Entry::Phantom(key) => self.phantoms.retain(|phantom| *phantom != (key, s)),
                Entry::Changed { key, was, .. } => {
                    let Some(m) = self.messages.get_mut(&key) else { continue };
                    (m.locked_by, m.gone_by, m.draft) = (was.locked_by, was.gone_by, was.draft);
                }
                Entry::Shorten(..) => {}
                Entry::Archived(at) => {
                    self.archive.remove(&at);
                }
                Entry::Unarchived(at) => {
                    if let Some(row) = self.archive.get_mut(&at) {
                        row.gone_by = None;
                    }
                }
            }
        }
    }

    /// A read is undone: the message is back at once, and counted; from the second time in a row it waits.
    fn give_back(&mut self, key: Key, id: i64) {
        let (now, policy) = (self.now, self.policies[key.0]);
        let Some(m) = self.messages.get_mut(&key) else { return };
        if m.lease.is_none_or(|lease| lease.id != id) {
            return;
        }
        let wait = |returned: u32, count: u32| match returned {
            2.. if !policy.is_exhausted(count) => now + policy.backoff(returned - 1),
            _ => 0,
        };
        // If it had ended, it depends on who looked since then.
        let was_over = m.leased(now).is_none();
        m.returned = (m.returned.0 + u32::from(!was_over), m.returned.1 + 1);
        let least = if was_over { 0 } else { wait(m.returned.0, m.count) };
        m.back = (least, wait(m.returned.1, m.count));
        m.lease = None;
    }

    /// Time passes.
    pub fn advance(&mut self, by: Time) {
        let (before, now) = (self.now, self.now + by);
        for m in self.messages.values_mut() {
            m.is_late |= m.row.due.is_some_and(|due| due > before && due <= now);
        }
        self.now = now;
    }

    /// Anything there may have to be loaded.
    pub fn is_marked(&mut self, queue: usize) {
        for (_, m) in self.messages.range_mut((queue, i64::MIN)..=(queue, i64::MAX)) {
            m.is_late = true;
        }
        self.marks[queue] = i64::MIN;
    }

    /// A read that may load has found all there is.
    pub fn is_loaded(&mut self, queue: usize) {
        for (_, m) in self.messages.range_mut((queue, i64::MIN)..=(queue, i64::MAX)) {
            m.is_late = false;
        }
        self.marks[queue] = i64::MAX;
    }

    pub fn keys(&self, queue: usize) -> BTreeSet<Key> {
        self.messages.range((queue, i64::MIN)..=(queue, i64::MAX)).map(|(key, _)| *key).collect()
    }
}
