//! What takes messages out, and what looks at them: every delivery must be one that is allowed, and none that is due
//! may be missing.

use crate::rng::Rng;
use crate::state::*;
use crate::world::*;

/// A wait that does not last so long, for something is there.
const LONG: &str = "'4 s'";

/// Of so many leases and delays that are over a read takes the lowest ids; of more it first takes those that ended first.
const READY_AT_ONCE: usize = 256;

/// A read's columns. The lease's end as seconds from now.
fn columns(world: &World) -> String {
    let left = world.ahead("lease_expires_at");
    format!("msg_id, lease_id, delivery_count, message::text, last_error, headers::text, {left}")
}

/// What a read of one queue was asked for.
pub struct Asked {
    pub queue: usize,
    pub quantity: usize,
    pub lease: Time,
}

impl World {
    fn lease(&self, rng: &mut Rng, queue: usize) -> (Option<Time>, Time) {
        let given = rng.chance(60).then(|| rng.pick(&[1, 3, 5, 9]));
        (given, given.unwrap_or(self.model.policies[queue].lease))
    }

    /// What must be given of a queue, if enough is asked for.
    fn due(&self, s: usize, queue: usize) -> Vec<Key> {
        let keys = self.model.keys(queue).into_iter();
        keys.filter(|key| self.model.readable(s, *key).1).collect()
    }

    /// In which order a read gives messages: its transaction's own come last, all by id. `None`: it may not be tracked.
    fn place(&self, s: usize, key: Key) -> Option<(bool, i64)> {
        let m = &self.model.messages[&key];
        let is_as_known = m.row_seen_by(s).due == m.row.due; // to the dispatcher, before this transaction's commit
        let is_tracked =
            !m.is_late && !self.is_small && is_as_known && self.model.keys(key.0).len() <= READY_AT_ONCE;
        is_tracked.then_some((m.sent_by == Some(s), key.1))
    }

    /// Whether what is held of a queue leaves room for what is ready, by what a queue is promised.
    fn has_room(&self, queue: usize) -> bool {
        let held = |key: &Key| {
            let m = &self.model.messages[key];
            m.lease.is_some() || m.pin.is_some() || m.count > 0 || m.row.due.is_some()
        };
        !self.is_small || self.model.keys(queue).iter().filter(|key| held(key)).count() < 64
    }

    /// Deliveries of one queue: each is allowed, and all that must be are there.
    pub fn delivered(&mut self, s: usize, asked: &Asked, lines: &[Line]) -> Checked<Vec<Key>> {
        let mut due = self.due(s, asked.queue);
        let (mut given, mut last) = (Vec::new(), None);
        self.model.sessions[s].has_read = true;
        for line in lines {
            let (id, lease, count, n) = (int(&line[0])?, int(&line[1])?, int(&line[2])?, int(&line[3])?);
            let key = (asked.queue, id);
            if asked.queue == DEAD && !self.model.messages.contains_key(&key) {
                self.follow_dead(id, n, &headers(&line[5])?)?;
            }
            let Some(m) = self.model.messages.get(&key).filter(|m| m.n == n) else {
                return Err(format!("message {key:?} (number {n}) was delivered and should not be there"));
            };
            if !self.model.readable(s, key).0 {
                return Err(format!("message {key:?} must not be delivered now ({}): {m:?}", self.model.now));
            }
            if count != i64::from(m.count) + 1 {
                return Err(format!("delivery {count} of message {key:?}, not {}", m.count + 1));
            }
            let row = m.row_seen_by(s);
            if line[4] != row.error || headers(&line[5])? != row.headers {
                return Err(format!("delivered {line:?}, not {m:?}"));
            }
            if !self.is_ahead(&line[6], asked.lease) {
                return Err(format!("lease ends in {:?} s, not in {} units", line[6], asked.lease));
            }
            let place = self.place(s, key);
            if place.is_some() && last > place {
                return Err(format!("message {key:?} after {last:?}"));
            }
            last = place.or(last);
            self.lease_is_new(key, lease)?;
            self.model.take(s, key, lease, asked.lease);
            due.retain(|other| *other != key);
            given.push(key);
        }
        if lines.len() > asked.quantity {
            return Err(format!("{} messages, {} were asked for", lines.len(), asked.quantity));
        }
        if let Some(passed) =
            due.iter().find(|key| self.place(s, **key).is_some_and(|place| Some(place) < last))
        {
            return Err(format!("message {passed:?} is due, and {last:?} was given before it"));
        }
        self.reads += 1;
        if lines.len() < asked.quantity && !due.is_empty() && self.has_room(asked.queue) {
            // While the worker scans for what is due, a reader does without: that is rare, and the next one gets it.
            self.short_reads += 1;
            self.trace.push(format!("   (short: {due:?} are due)"));
        } else if lines.len() < asked.quantity && !self.model.policies[asked.queue].paused {
            // It looked everywhere; what a paused queue has, nobody looks for.
            self.model.is_loaded(asked.queue);
        }
        self.model.withhold(s, asked.queue);
        Ok(given)
    }

    pub fn read(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let quantity = rng.pick(&[1, 1, 2, 3, 20, 300]);
        let (given, lease) = self.lease(rng, queue);
        let wait = self.wait_sql(s, rng, &[queue]);
        self.read_so(s, queue, quantity, given, lease, wait)?;
        self.done(s);
        Ok(())
    }

    pub fn read_so(
        &mut self,
        s: usize,
        queue: usize,
        quantity: usize,
        given: Option<Time>,
        lease: Time,
        wait: &str,
    ) -> Checked<Vec<Key>> {
        let columns = columns(self);
        let timeout = or_null(given.map(seconds));
        let sql =
            format!("SELECT {columns} FROM queue_read('{}', {quantity}, {timeout}, {wait})", QUEUES[queue]);
        let is_due = !self.due(s, queue).is_empty() && self.has_room(queue);
        let lines = self.ask(s, &sql)?;
        if wait == LONG && is_due && lines.is_empty() {
            return Err("waited in vain for what is due".into());
        }
        self.delivered(s, &Asked { queue, quantity, lease }, &lines)
    }

    pub fn read_any(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let first = rng.below(QUEUES.len());
        let queues = [first, (first + 1 + rng.below(2)) % QUEUES.len()];
        let quantity = rng.pick(&[1, 2, 3, 20]);
        let lease = rng.pick(&[1, 3, 5, 9]);
        let sql = format!(
            "SELECT {}, queue FROM queue_read_any({}, {quantity}, {}, {})",
            columns(self),
            array(queues.iter().map(|queue| format!("'{}'", QUEUES[*queue])), "text"),
            seconds(lease),
            self.wait_sql(s, rng, &queues),
        );
        let lines = self.ask(s, &sql)?;
        let mut left = quantity;
        for (place, queue) in queues.into_iter().enumerate() {
            let of_it: Vec<Line> =
                lines.iter().filter(|line| line[7].as_deref() == Some(QUEUES[queue])).cloned().collect();
            // Where a later one gave something, the earlier had nothing more.
            let quantity = if lines.len() == quantity && place == 0 && of_it.len() == lines.len() {
                of_it.len()
            } else {
                left
            };
            self.delivered(s, &Asked { queue, quantity, lease }, &of_it)?;
            left = quantity - of_it.len();
            if left == 0 {
                break;
            }
        }
        self.done(s);
        Ok(())
    }

    /// For how long a read is to wait: long only if something is due, for which it need not.
    fn wait_sql(&self, s: usize, rng: &mut Rng, queues: &[usize]) -> &'static str {
        let is_due = queues.iter().any(|queue| !self.due(s, *queue).is_empty() && self.has_room(*queue));
        match rng.below(10) {
            0 => "'0'",
            1 => "'3 ms'",
            2 | 3 if is_due => LONG,
            _ => "NULL",
        }
    }

    pub fn wait(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queues: Vec<usize> = (0..QUEUES.len()).filter(|_| rng.chance(50)).collect();
        if queues.is_empty() {
            return Ok(());
        }
        // What its own transaction has sent is to be told, too: it could read it.
        let is_due = |queue: &usize| !self.due(s, *queue).is_empty() && self.has_room(*queue);
        let due: Vec<&str> = queues.iter().filter(|queue| is_due(queue)).map(|queue| QUEUES[*queue]).collect();
        let names = array(queues.iter().map(|queue| quoted(QUEUES[*queue])), "text");
        let limit = if due.is_empty() { "'3 ms'" } else { LONG };
        let ready = self.value(s, &format!("CALL queue_wait({names}, {limit})"))?;
        let place = |name: &str| queues.iter().position(|queue| QUEUES[*queue] == name);
        self.reads += 1;
        match (ready.as_deref(), due.first()) {
            (None, Some(due)) => return Err(format!("queue {due} has something, and nobody said so")),
            // Something may be there that is not due for sure; but the first that has something is named.
            (Some(name), due) => {
                let at = place(name).ok_or_else(|| format!("queue {name} was not asked for"))?;
                if due.is_some_and(|due| place(due) < Some(at)) {
                    self.short_reads += 1; // likewise: while the worker scans it
                    self.trace.push(format!("   (short: {due:?} has something)"));
                }
                let queue = queues[at];
                // It may be told in vain of what was put off, or of what is not there any more; not of an empty queue.
                let may_be = |key: &Key| self.model.messages[key].sent_by.is_none_or(|by| by == s);
                let is_possible = self.model.keys(queue).iter().any(may_be)
                    || self.is_small
                    || self.model.finished_late.iter().any(|key| key.0 == queue)
                    || self.missed.keys().any(|key| key.0 == queue)
                    || self.deleted.iter().any(|key| key.0 == queue)
                    || queue == DEAD && self.has_limbo(0);
                if !is_possible {
                    self.short_reads += 1; // brought in by a scan that began before it was gone
                    self.trace.push(format!("   (in vain: {name} is empty)"));
                }
            }
            (None, None) => {}
        }
        self.done(s);
        Ok(())
    }

    pub fn pop(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        // It would wait for whoever has changed a row by plain SQL.
        let is_locked = |m: &Message| m.locked_by.is_some_and(|by| by != s) && m.pin.is_none();
        let keys = self.model.keys(queue);
        if keys.iter().any(|key| is_locked(&self.model.messages[key])) {
            return Ok(());
        }
        let quantity = rng.pick(&[1, 2, 20]);
        let sql = format!("SELECT {} FROM queue_pop('{}', {quantity})", columns(self), QUEUES[queue]);
        let lines = self.ask(s, &sql)?;
        let lease = self.model.policies[queue].lease;
        for key in self.delivered(s, &Asked { queue, quantity, lease }, &lines)? {
            self.model.pin(s, key, Then::Finish);
        }
        self.model.sessions[s].has_id = true;
        self.done(s);
        Ok(())
    }

    pub fn delete_and_read(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let Some(call) = self.named(s, rng, queue, false) else { return Ok(()) };
        let is_doubtful = call.fates.contains(&Fate::Either); // it does not say what it finished
        if is_doubtful {
            return Ok(());
        }
        let quantity = rng.pick(&[1, 2, 20]);
        let (given, lease) = self.lease(rng, queue);
        let sql = format!(
            "SELECT {} FROM queue_delete_and_read('{}', {}, {}, {quantity}, {}, {})",
            columns(self),
            QUEUES[queue],
            call.ids_sql(),
            call.leases_sql(),
            or_null(given.map(seconds)),
            call.strict
        );
        let result = self.run(s, &sql)?;
        let Some(lines) = self.outcome(s, &call, result)? else { return Ok(()) };
        let finished: Vec<i64> = call
            .ids
            .iter()
            .zip(&call.fates)
            .filter(|(_, fate)| **fate == Fate::Yes)
            .map(|(id, _)| *id)
            .collect();
        self.finished(s, &call, &finished, false)?;
        self.model.sessions[s].has_id = true;
        self.delivered(s, &Asked { queue, quantity, lease }, &lines)?;
        self.done(s);
        Ok(())
    }

    /// Looks at all of a queue.
    pub fn peek(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let wanted =
            rng.chance(40).then(|| rng.pick(&["ready", "delayed", "leased", "finishing", "exhausted"]));
        let ids = some_ids(rng, self.model.keys(queue).iter().map(|key| key.1).collect());
        let sql = format!(
            "SELECT msg_id, lease_id, delivery_count, message::text, headers::text, state \
             FROM queue_peek('{}', 10000, {}, {})",
            QUEUES[queue],
            or_null(ids.as_ref().map(|ids| array(ids, "int8"))),
            or_null(wanted.map(quoted)),
        );
        let lines = self.ask(s, &sql)?;
        let mut missing = self.model.keys(queue);
        missing.retain(|key| {
            let is_asked_for = ids.as_ref().is_none_or(|ids| ids.contains(&key.1));
            let is_there = self.model.messages[key].is_seen_by(s) && !self.model.may_go(*key);
            is_there && is_asked_for && wanted.is_none_or(|wanted| self.states(s, *key) == [wanted])
        });
        let mut shown = Vec::new();
        for line in &lines {
            let (id, n) = (int(&line[0])?, int(&line[3])?);
            let key = (queue, id);
            if ids.as_ref().is_some_and(|ids| !ids.contains(&id)) || shown.contains(&id) {
                return Err(format!("message {key:?} was not asked for, or is shown twice"));
            }
            if ids.is_none() && shown.last() > Some(&id) {
                return Err(format!("message {key:?} is shown after {shown:?}"));
            }
            shown.push(id);
            if wanted.is_some_and(|wanted| line[5].as_deref() != Some(wanted)) {
                return Err(format!("message {key:?} is {:?}, {wanted:?} was asked for", line[5]));
            }
            if queue == DEAD && !self.model.messages.contains_key(&key) {
                self.follow_dead(id, n, &headers(&line[4])?)?;
            }
            missing.remove(&key);
            let Some(m) = self.model.messages.get(&key).filter(|m| m.n == n && m.is_seen_by(s)) else {
                return Err(format!("message {key:?} (number {n}) was shown and should not be there"));
            };
            if self.model.may_go(key) {
                continue;
            }
            let state = line[5].as_deref().unwrap_or_default();
            let states = self.states(s, key);
            if !states.contains(&state) {
                return Err(format!("message {key:?} is {state}, not {states:?}: {m:?}"));
            }
            if int(&line[2])? != i64::from(m.count) {
                return Err(format!("message {key:?} was delivered {:?} times, not {}", line[2], m.count));
            }
            let lease = m.lease.filter(|_| state == "leased").map(|lease| lease.id.to_string());
            if line[1] != lease {
                return Err(format!("message {key:?} is under lease {:?}, not {lease:?}", line[1]));
            }
        }
        if !missing.is_empty() {
            return Err(format!("{missing:?} were not shown"));
        }
        self.done(s);
        Ok(())
    }

    fn states(&self, s: usize, key: Key) -> Vec<&'static str> {
        let (m, now) = (&self.model.messages[&key], self.model.now);
        let row = m.row_seen_by(s);
        let mut states = Vec::new();
        // Who has deleted it by plain SQL may have tried to finish it since.
        if self.model.phantoms.iter().any(|(of, _)| *of == key) || m.pin.is_some() || m.gone_by.is_some() {
            states.push("finishing");
        }
        if m.pin.is_none() && m.leased(now).is_some() {
            // Who has deleted it by plain SQL may have given it back since; or its id was named before it was there.
            return if self.deleted.contains(&key) || !states.is_empty() {
                vec!["leased", "finishing"]
            } else {
                vec!["leased"]
            };
        }
        if m.pin.is_none() {
            let is_exhausted = self.model.exhausted(key);
            // Of what its transaction has brought forward the dispatcher hears at its commit.
            let due = row.due.max(m.row.due);
            // And one that has expired is put off by a read that meets it, till the worker has it.
            if due.is_some_and(|due| due > now) || m.back.1 > now || m.is_expired(now) {
                states.push("delayed");
            }
            if row.due.is_none_or(|due| due <= now) && m.back.0 <= now {
                states.push(if is_exhausted { "exhausted" } else { "ready" });
            }
        }
        states
    }
}
