//! What names messages: finish, retry, reject, release, extend, cancel, with the lease that holds, another, or none.

use postgres::error::SqlState;

use crate::rng::Rng;
use crate::state::*;
use crate::world::*;

/// A call that names messages, and what it must find.
pub struct Call {
    pub queue: usize,
    pub ids: Vec<i64>,
    /// As long as `ids`; all or none are given in an array.
    pub leases: Vec<Option<i64>>,
    pub fates: Vec<Fate>,
    pub strict: bool,
    pub is_single: bool,
}

impl Call {
    pub fn ids_sql(&self) -> String {
        array(&self.ids, "int8")
    }

    pub fn leases_sql(&self) -> String {
        if self.leases.iter().all(Option::is_none) {
            "NULL".into()
        } else {
            array(self.leases.iter().map(|lease| lease.unwrap_or(1)), "int8")
        }
    }

    pub fn arguments(&self) -> String {
        match self.is_single {
            true => format!("'{}', {}, {}", QUEUES[self.queue], self.ids[0], or_null(self.leases[0])),
            false => format!("'{}', {}, {}", QUEUES[self.queue], self.ids_sql(), self.leases_sql()),
        }
    }
}

/// Whether an answer is what was due, but for ids that may be in it or not.
fn is_but_for(answer: &[i64], due: &[i64], is_doubtful: impl Fn(&i64) -> bool) -> bool {
    let sure = |ids: &[i64]| ids.iter().copied().filter(|id| !is_doubtful(id)).collect::<Vec<_>>();
    sure(answer) == sure(due)
}

impl World {
    /// An id and a lease that somebody may come up with.
    fn target(&self, rng: &mut Rng, queue: usize) -> (i64, Option<i64>) {
        let keys: Vec<Key> = self.model.keys(queue).into_iter().collect();
        let now = self.model.now;
        let held: Vec<Key> =
            keys.iter().copied().filter(|key| self.model.messages[key].leased(now).is_some()).collect();
        let from = if rng.chance(75) && !held.is_empty() { &held } else { &keys };
        let key = match from.get(rng.below(from.len())) {
            Some(key) if !rng.chance(5) => *key,
            // Gone, or not there yet.
            _ => {
                let mut all: Vec<i64> =
                    self.leases.keys().filter(|key| key.0 == queue).map(|key| key.1).collect();
                all.sort_unstable();
                all.push(i64::MAX - rng.below(3) as i64);
                (queue, all[rng.below(all.len())])
            }
        };
        let current = self.model.messages.get(&key).and_then(|m| m.leased(now)).map(|lease| lease.id);
        let lease = match rng.below(10) {
            0..=5 => current,
            6 | 7 => None,
            8 => self.leases.get(&key).and_then(|all| all.get(rng.below(all.len()))).copied(),
            _ => Some(1),
        };
        (key.1, lease)
    }

    /// A call about one message or some; `None`: it would wait for another session.
    pub fn named(&self, s: usize, rng: &mut Rng, queue: usize, may_be_single: bool) -> Option<Call> {
        let is_single = may_be_single && rng.chance(60);
        let count = if is_single { 1 } else { rng.below(5) };
        let mut targets: Vec<(i64, Option<i64>)> = Vec::new();
        for _ in 0..count {
            let target = self.target(rng, queue);
            if targets.iter().all(|(id, _)| *id != target.0) {
                targets.push(target);
            }
        }
        if is_single {
            targets.truncate(1);
        } else if rng.chance(50) {
            targets.iter_mut().for_each(|(_, lease)| *lease = None);
        } else {
            targets.iter_mut().for_each(|(_, lease)| *lease = Some(lease.unwrap_or(1)));
        }
        let (ids, leases): (Vec<i64>, Vec<Option<i64>>) = targets.into_iter().unzip();
        let fate = |(id, lease): (&i64, &Option<i64>)| self.model.fate(s, (queue, *id), *lease, false);
        let fates: Vec<Fate> = ids.iter().zip(&leases).map(fate).collect();
        let call = Call { queue, ids, leases, fates, strict: rng.chance(25), is_single };
        (!call.fates.contains(&Fate::Blocks)).then_some(call)
    }

    /// The lines of a call's answer; `None`: it has failed, as it had to.
    pub fn outcome(
        &mut self,
        s: usize,
        call: &Call,
        result: Result<Vec<Line>, String>,
    ) -> Checked<Option<Vec<Line>>> {
        let needs_lease =
            self.model.policies[call.queue].require_lease && call.leases.iter().any(Option::is_none);
        let must_fail = needs_lease || call.strict && call.fates.contains(&Fate::No);
        let may_fail = must_fail || call.strict && call.fates.contains(&Fate::Either);
        let due = if needs_lease { SqlState::NULL_VALUE_NOT_ALLOWED } else { SqlState::NO_DATA_FOUND };
        match result {
            Ok(_) if must_fail => Err(format!("error {} was due", due.code())),
            Ok(lines) => Ok(Some(lines)),
            Err(code) if may_fail && (code == due.code() || code == "P0002" && !needs_lease) => {
                for id in &call.ids {
                    *self.missed.entry((call.queue, *id)).or_default() += 1;
                }
                self.model.fail(s);
                Ok(None)
            }
            Err(code) => Err(format!("error {code}, and none was due")),
        }
    }

    /// These of the call's messages were finished; whether that is right.
    pub fn finished(&mut self, s: usize, call: &Call, finished: &[i64], is_archive: bool) -> Checked {
        let mut in_order = call.ids.iter().filter(|id| finished.contains(id));
        if !finished.iter().all(|id| in_order.next() == Some(id)) {
            return Err(format!("finished {finished:?} of {:?}", call.ids));
        }
        for ((id, lease), fate) in call.ids.iter().zip(&call.leases).zip(&call.fates) {
            let key = (call.queue, *id);
            match (fate, finished.contains(id)) {
                (Fate::Yes, false) => return Err(format!("message {key:?} should have been finished")),
                (Fate::No, true) => return Err(format!("message {key:?} should not have been finished")),
                (_, true) => {
                    if is_archive {
                        let m = &self.model.messages[&key];
                        let row = Archived {
                            queue: key.0,
                            id: key.1,
                            n: m.n,
                            reason: "archived",
                            count: m.count,
                            headers: m.row_seen_by(s).headers.clone(),
                            born_by: Some(s),
                            gone_by: None,
                        };
                        self.model.archive_add(Some(s), row);
                    }
                    self.model.pin(s, key, Then::Finish);
                }
                (_, false) => self.missed(s, key, *lease),
            }
        }
        self.model.sessions[s].has_id |= !finished.is_empty();
        Ok(())
    }

    /// Without a lease, a call that finds nothing keeps the id until its transaction ends.
    fn missed(&mut self, s: usize, key: Key, lease: Option<i64>) {
        let is_held = self.model.messages.get(&key).is_some_and(|m| m.pin.is_some());
        // Where its own lease is the fence that is lost, nothing is kept.
        if lease.is_none() && !is_held && self.model.mine(s, key).is_none() {
            *self.missed.entry(key).or_default() += 1;
            self.model.miss(s, key);
        }
    }

    pub fn finish(&mut self, s: usize, rng: &mut Rng, is_archive: bool) -> Checked {
        let queue = rng.below(QUEUES.len());
        let Some(call) = self.named(s, rng, queue, true) else { return Ok(()) };
        let verb = match (is_archive, call.is_single) {
            (false, true) => "queue_delete",
            (false, false) => "queue_delete_batch",
            (true, true) => "queue_archive",
            (true, false) => "queue_archive_batch",
        };
        let result = self.run(s, &format!("SELECT {verb}({}, {})", call.arguments(), call.strict))?;
        let Some(lines) = self.outcome(s, &call, result)? else { return Ok(()) };
        let finished = if call.is_single {
            let is_true = lines.first().is_some_and(|line| line[0].as_deref() == Some("t"));
            call.ids.iter().copied().filter(|_| is_true).collect()
        } else {
            lines.iter().map(|line| int(&line[0])).collect::<Checked<Vec<i64>>>()?
        };
        self.finished(s, &call, &finished, is_archive)?;
        self.done(s);
        Ok(())
    }

    pub fn cancel(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let (id, _) = self.target(rng, queue);
        let key = (queue, id);
        let fate = self.model.fate(s, key, None, true);
        if fate == Fate::Blocks {
            return Ok(());
        }
        let is_done = self.value(s, &format!("SELECT queue_cancel('{}', {id})", QUEUES[queue]))?;
        match (is_done.as_deref() == Some("t"), fate) {
            (true, Fate::No) | (false, Fate::Yes) => return Err(format!("cancel of {key:?} is {is_done:?}")),
            (true, _) => {
                self.model.pin(s, key, Then::Finish);
                self.model.sessions[s].has_id = true;
            }
            (false, _) => {
                let is_held =
                    |m: &Message| m.sent_by.is_none_or(|by| by == s) && m.leased(self.model.now).is_some();
                if !self.model.messages.get(&key).is_some_and(is_held) {
                    self.missed(s, key, None);
                }
            }
        }
        self.done(s);
        Ok(())
    }

    /// One message for retry or reject, or `None`.
    fn failing(&self, s: usize, rng: &mut Rng) -> Option<(Call, Option<String>)> {
        let queue = rng.below(QUEUES.len());
        let mut call = self.named(s, rng, queue, true)?;
        if call.ids.is_empty() {
            return None;
        }
        call.ids.truncate(1);
        call.leases.truncate(1);
        call.fates.truncate(1);
        call.strict = false;
        call.is_single = true;
        let error = rng.chance(60).then(|| format!("e{}", rng.below(5)));
        Some((call, error))
    }

    pub fn retry(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let Some((call, error)) = self.failing(s, rng) else { return Ok(()) };
        let delay = rng.chance(60).then(|| rng.pick(&[0, 1, 3, 5]));
        let sql = format!(
            "SELECT outcome, {} FROM queue_retry({}, {}, {})",
            self.ahead("visible_at"),
            call.arguments(),
            or_null(error.as_deref().map(quoted)),
            or_null(delay.map(seconds)),
        );
        let result = self.run(s, &sql)?;
        let Some(lines) = self.outcome(s, &call, result)? else { return Ok(()) };
        let [line] = lines.as_slice() else { return Err(format!("a retry answers {lines:?}")) };
        let key = (call.queue, call.ids[0]);
        let outcome = line[0].as_deref().unwrap_or_default();
        if !self.may_end(s, &call, outcome)? {
            self.done(s);
            return Ok(());
        }
        let policy = self.model.policies[key.0];
        let m = &self.model.messages[&key];
        if policy.is_exhausted(m.count) {
            self.buried(s, key, "max_deliveries", error.as_deref(), outcome)?;
        } else if outcome == "retried" {
            let wait = delay.unwrap_or_else(|| policy.backoff(m.count.max(1)));
            if !self.is_ahead(&line[1], wait) {
                return Err(format!("retried in {:?} s, not in {wait} units", line[1]));
            }
            let row = m.row_seen_by(s).clone();
            let due = (wait > 0).then_some(self.model.now + wait);
            let row = Row { due, error: error.or(row.error), ..row };
            let count = m.count;
            self.model.pin(s, key, Then::Rewrite(row, count));
            self.model.sessions[s].has_id = true;
        } else {
            return Err(format!("{outcome}, though there are deliveries left"));
        }
        self.done(s);
        Ok(())
    }

    /// Whether a retry or reject was accepted, as it may be.
    fn may_end(&mut self, s: usize, call: &Call, outcome: &str) -> Checked<bool> {
        let key = (call.queue, call.ids[0]);
        match (call.fates[0], outcome == "lost") {
            (Fate::Yes, true) => Err(format!("message {key:?} is not lost")),
            (Fate::No, false) => Err(format!("message {key:?} is lost, not {outcome}")),
            (_, false) => Ok(true),
            (_, true) => {
                self.missed(s, key, call.leases[0]);
                Ok(false)
            }
        }
    }

    pub fn reject(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let Some((call, error)) = self.failing(s, rng) else { return Ok(()) };
        let error_sql = or_null(error.as_deref().map(quoted));
        let result = self.run(s, &format!("SELECT queue_reject({}, {error_sql})", call.arguments()))?;
        let Some(lines) = self.outcome(s, &call, result)? else { return Ok(()) };
        let outcome = lines.first().and_then(|line| line[0].clone()).unwrap_or_default();
        if self.may_end(s, &call, &outcome)? {
            self.buried(s, (call.queue, call.ids[0]), "rejected", error.as_deref(), &outcome)?;
        }
        self.done(s);
        Ok(())
    }

    /// The message was moved to where its queue's failures go.
    fn buried(
        &mut self,
        s: usize,
        key: Key,
        reason: &'static str,
        error: Option<&str>,
        outcome: &str,
    ) -> Checked {
        let due = if key.0 == 0 { "dead_lettered" } else { "archived" };
        if outcome != due {
            return Err(format!("{outcome}, not {due}"));
        }
        let mut m = self.model.messages[&key].clone();
        m.row = m.row_seen_by(s).clone();
        let error = error.map(str::to_owned).or_else(|| m.row.error.clone());
        self.model.pin(s, key, Then::Finish);
        self.model.sessions[s].has_id = true;
        if key.0 == 0 {
            let id = self.value(s, &newest(DEAD, m.n))?;
            let headers = Some(dead_headers(key.0, key.1, &m, reason, error.as_deref()));
            let row = Row { due: None, expires: None, error, headers };
            self.model.send(s, (DEAD, int(&id)?), m.n, row);
        } else {
            let row = Archived {
                queue: key.0,
                id: key.1,
                n: m.n,
                reason,
                count: m.count,
                headers: m.row.headers,
                born_by: Some(s),
                gone_by: None,
            };
            self.model.archive_add(Some(s), row);
        }
        Ok(())
    }

    pub fn release(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let Some(mut call) = self.named(s, rng, queue, false) else { return Ok(()) };
        call.strict = false;
        let delay = rng.chance(50).then(|| rng.pick(&[0, 1, 3, 5]));
        let sql = format!("SELECT queue_release({}, {})", call.arguments(), or_null(delay.map(seconds)));
        let result = self.run(s, &sql)?;
        let Some(lines) = self.outcome(s, &call, result)? else { return Ok(()) };
        let released = lines.iter().map(|line| int(&line[0])).collect::<Checked<Vec<i64>>>()?;
        let mut due = Vec::new();
        for ((id, lease), fate) in call.ids.iter().zip(&call.leases).zip(&call.fates) {
            let key = (queue, *id);
            let is_leased = self.model.messages.get(&key).is_some_and(|m| m.leased(self.model.now).is_some());
            let is_there = |m: &Message| m.sent_by.is_none_or(|by| by == s);
            if !self.model.messages.get(&key).is_some_and(is_there) {
                self.missed(s, key, *lease);
            }
            if !is_leased || *fate != Fate::Yes {
                *self.missed.entry(key).or_default() += 1;
            }
            let is_taken = *fate == Fate::Yes || *fate == Fate::Either && released.contains(id);
            // The worker may have moved it away: then it was named in vain.
            self.model.sessions[s].has_read |= *fate == Fate::Either && !is_taken;
            if is_taken && is_leased {
                due.push(*id);
                let m = &self.model.messages[&key];
                let then = match delay.filter(|delay| *delay > 0) {
                    None => Then::Release,
                    Some(delay) => Then::Rewrite(
                        Row { due: Some(self.model.now + delay), ..m.row_seen_by(s).clone() },
                        m.count.saturating_sub(1),
                    ),
                };
                self.model.pin(s, key, then);
            }
        }
        self.model.sessions[s].has_id |= delay.is_some();
        let is_doubtful =
            |id: &i64| delay.is_none_or(|delay| delay == 0) && self.deleted.contains(&(queue, *id));
        if !is_but_for(&released, &due, is_doubtful) {
            return Err(format!("released {released:?}, not {due:?}"));
        }
        self.done(s);
        Ok(())
    }

    pub fn extend(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        // It locks no row: what another has changed by plain SQL is in nobody's way.
        let Some(mut call) = self.named(s, rng, queue, true) else { return Ok(()) };
        call.strict = false;
        let given = rng.chance(80).then(|| rng.pick(&[1, 3, 5, 9]));
        let length = given.unwrap_or(self.model.policies[queue].lease);
        let timeout = or_null(given.map(seconds));
        let sql = if call.is_single {
            let until = self.ahead(&format!("queue_extend({}, {timeout})", call.arguments()));
            format!("SELECT {until}")
        } else {
            format!("SELECT queue_extend_batch({}, {timeout})", call.arguments())
        };
        let result = self.run(s, &sql)?;
        let Some(lines) = self.outcome(s, &call, result)? else { return Ok(()) };
        let mut due = Vec::new();
        for (id, lease) in call.ids.iter().zip(&call.leases) {
            let key = (queue, *id);
            if self.model.extendable(s, key, *lease) {
                due.push(*id);
                let until = self.model.now + length;
                self.model.extend(s, key, until);
            }
        }
        // What somebody has named before it was there is finishing once it is sent: its lease does not end until he ends.
        let until = self.model.now + length;
        for (id, lease) in call.ids.iter().zip(&call.leases) {
            let key = (queue, *id);
            let is_extended = match call.is_single {
                true => lines.first().is_some_and(|line| line[0].is_some()),
                false => lines.iter().any(|line| int(&line[0]) == Ok(*id)),
            };
            let held = self.model.messages.get(&key).and_then(|m| m.lease);
            let is_phantom = self.model.phantoms.iter().any(|(of, _)| *of == key);
            let is_claimed = held.is_some_and(|held| lease.is_none_or(|claimed| claimed == held.id));
            if is_extended && is_phantom && is_claimed && !due.contains(id) {
                due.push(*id);
                self.model.extend(s, key, until);
            }
        }
        // What somebody has named before it was there an open transaction may have been about to read.
        let is_any_open = self.model.sessions.iter().any(|session| session.is_open);
        let is_doubtful = |id: &i64| {
            let key = (queue, *id);
            self.deleted.contains(&key) || is_any_open && !self.model.messages.contains_key(&key)
        };
        let is_right = if call.is_single {
            let answer = lines.first().map(|line| line[0].clone()).unwrap_or_default();
            if due.is_empty() {
                answer.is_none() || call.ids.iter().all(is_doubtful)
            } else {
                self.is_ahead(&answer, length)
            }
        } else {
            let extended = lines.iter().map(|line| int(&line[0])).collect::<Checked<Vec<i64>>>()?;
            is_but_for(&extended, &due, is_doubtful)
        };
        if !is_right {
            return Err(format!("extended {lines:?}, not {due:?}"));
        }
        self.done(s);
        Ok(())
    }
}
