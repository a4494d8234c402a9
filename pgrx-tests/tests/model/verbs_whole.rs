//! What is about whole queues: bringing messages back, TRUNCATE, settings. And the end of a sequence, when everything
//! is drained.

use std::time::{Duration, Instant};

use crate::rng::Rng;
use crate::state::*;
use crate::world::*;

/// How long the worker may take for what it has to do.
const WORKER_LIMIT: Duration = Duration::from_secs(25);

impl World {
    pub fn redrive(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let quantity = rng.chance(60).then(|| 1 + rng.below(3));
        let source_name = rng.chance(30).then_some("a");
        let target = rng.chance(30).then_some(1);
        let (messages, now) = (&self.model.messages, self.model.now);
        let keys = self.model.keys(DEAD);
        let ids = some_ids(rng, keys.iter().map(|key| key.1).collect());
        let is_doubtful = keys.iter().any(|key| self.model.phantoms.iter().any(|(of, _)| of == key));
        if self.has_limbo(0) || is_doubtful {
            return Ok(());
        }
        let moves = |key: &Key| {
            let m = &messages[key];
            let from = source(&m.row_seen_by(s).headers);
            let is_free = m.is_seen_by(s) && m.pin.is_none() && m.leased(now).is_none();
            is_free
                && ids.as_ref().is_none_or(|ids| ids.contains(&key.1))
                && [None, Some(s)].contains(&m.locked_by)
                && source_name.is_none_or(|name| from == Some(name))
                && (target.is_some() || from.is_some_and(|from| from != "d"))
        };
        let moved: Vec<Key> = keys.into_iter().filter(moves).take(quantity.unwrap_or(usize::MAX)).collect();
        let sql = format!(
            "SELECT queue_redrive('d', {}, target => {}, source => {}, msg_ids => {})",
            or_null(quantity),
            or_null(target.map(|q| quoted(QUEUES[q]))),
            or_null(source_name.map(quoted)),
            or_null(ids.as_ref().map(|ids| array(ids, "int8"))),
        );
        let count = int(&self.value(s, &sql)?)?;
        if count != moved.len() as i64 {
            return Err(format!("{count} messages were brought back, not {moved:?}"));
        }
        for key in moved {
            let m = &self.model.messages[&key];
            let (n, headers) = (m.n, m.row_seen_by(s).headers.clone());
            self.model.pin(s, key, Then::Finish);
            self.came_back(s, target.unwrap_or(0), n, headers_before(&headers))?;
        }
        self.model.sessions[s].has_id = true;
        self.done(s);
        Ok(())
    }

    /// A message is in this queue as a new one.
    fn came_back(&mut self, s: usize, queue: usize, n: i64, headers: Option<serde_json::Value>) -> Checked {
        let id = int(&self.value(s, &newest(queue, n))?)?;
        self.model.send(s, (queue, id), n, Row { due: None, expires: None, error: None, headers });
        Ok(())
    }

    pub fn unarchive(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        // An archive is moved by a statement, which sees what its transaction sees.
        if self.has_limbo(queue) || self.model.sessions[s].snapshot.is_some() {
            return Ok(());
        }
        let quantity = rng.chance(60).then(|| 1 + rng.below(3));
        let reason = rng.chance(40).then(|| rng.pick(&["archived", "rejected", "max_deliveries"]));
        let there = self.model.archive.values().filter(|row| row.queue == queue).map(|row| row.id).collect();
        let ids = some_ids(rng, there);
        let comes = |row: &Archived| {
            row.queue == queue
                && ids.as_ref().is_none_or(|ids| ids.contains(&row.id))
                && row.gone_by.is_none()
                && [None, Some(s)].contains(&row.born_by)
                && reason.is_none_or(|reason| row.reason == reason)
        };
        let there: Vec<(usize, i64)> =
            self.model.archive.iter().filter(|(_, row)| comes(row)).map(|(at, row)| (*at, row.n)).collect();
        let due = there.len().min(quantity.unwrap_or(usize::MAX));
        let sql = format!(
            "SELECT queue_unarchive('{}', {}, {}, {})",
            QUEUES[queue],
            or_null(quantity),
            or_null(reason.map(quoted)),
            or_null(ids.as_ref().map(|ids| array(ids, "int8"))),
        );
        let count = int(&self.value(s, &sql)?)?;
        if count != due as i64 {
            return Err(format!("{count} messages were brought back, not {due}"));
        }
        if due > 0 {
            // The oldest; which they are, the clock says.
            let sql =
                format!("SELECT message::text FROM queue.{} ORDER BY msg_id DESC LIMIT {due}", QUEUES[queue]);
            for line in self.ask(s, &sql)? {
                let n = int(&line[0])?;
                let Some((at, _)) = there.iter().find(|(_, of)| *of == n) else {
                    return Err(format!("number {n} was brought back and is not of {there:?}"));
                };
                let row = self.model.archive.get_mut(at).expect("listed");
                row.gone_by = Some(s);
                let headers = row.headers.clone();
                self.model.log(s, Entry::Unarchived(*at));
                self.came_back(s, queue, n, headers)?;
            }
            self.model.sessions[s].has_id = true;
        }
        self.done(s);
        Ok(())
    }

    /// Sends, empties, sends, with reads between, and commits or not: a transaction of its own, or within a savepoint of
    /// the open one, which is undone.
    pub fn truncate(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let is_alone =
            (0..self.model.sessions.len()).all(|other| other == s || !self.model.sessions[other].is_open);
        if !is_alone || self.has_limbo(queue) || queue == DEAD && self.has_limbo(0) {
            return Ok(()); // it would wait; or the worker's moves would race it
        }
        let is_within = self.model.sessions[s].is_open;
        let does_commit = !is_within && rng.chance(60);
        if is_within {
            self.ask(s, "SAVEPOINT emptied")?;
            let len = self.model.sessions[s].log.len();
            self.model.sessions[s].saves.push(len);
        } else {
            self.ask(s, "BEGIN")?;
            self.model.sessions[s].is_open = true;
        }
        for is_emptied in [false, true] {
            if is_emptied {
                self.ask(s, &format!("TRUNCATE queue.{}", QUEUES[queue]))?;
                for key in self.model.keys(queue) {
                    self.model.change(s, key, None);
                }
            }
            if rng.chance(30) {
                self.read_there(s, rng, queue)?;
            }
            if rng.chance(50) {
                self.send_plainly(s, queue)?;
            }
            if rng.chance(50) {
                self.read_there(s, rng, queue)?;
            }
        }
        if is_within {
            self.ask(s, "ROLLBACK TO emptied; RELEASE emptied")?;
            self.undone(s);
            let place = self.model.sessions[s].saves.len() - 1;
            self.model.rollback_to(s, place);
            self.model.sessions[s].saves.pop();
        } else {
            self.end(s, does_commit)?;
        }
        self.model.is_marked(queue); // what was sent in that transaction is to be loaded; or what was there before
        Ok(())
    }

    fn read_there(&mut self, s: usize, rng: &mut Rng, queue: usize) -> Checked {
        let quantity = rng.pick(&[1, 2, 300]);
        let lease = self.model.policies[queue].lease;
        self.read_so(s, queue, quantity, None, lease, "NULL").map(drop)
    }

    fn send_plainly(&mut self, s: usize, queue: usize) -> Checked {
        let n = self.number();
        let id = int(&self.value(s, &format!("SELECT queue_send('{}', '{n}')", QUEUES[queue]))?)?;
        self.model.send(s, (queue, id), n, Row { due: None, expires: None, error: None, headers: None });
        Ok(())
    }

    pub fn alter(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let mut policy = self.model.policies[queue];
        let name = QUEUES[queue];
        let what = rng.below(5);
        // A transaction that has the queue's lock already goes on with the settings that it has.
        let is_another_open = (0..SESSIONS).any(|other| other != s && self.model.sessions[other].is_open);
        if is_another_open && (1..=2).contains(&what) {
            return Ok(());
        }
        let sql = match what {
            0 => {
                policy.paused = !policy.paused;
                let verb = if policy.paused { "queue_pause" } else { "queue_resume" };
                format!("SELECT {verb}('{name}')")
            }
            1 => {
                policy.lease = rng.pick(&[1, 3, 7]);
                format!("SELECT queue_alter('{name}', visibility_timeout => {})", seconds(policy.lease))
            }
            2 => {
                policy.require_lease = !policy.require_lease;
                format!("SELECT queue_alter('{name}', require_lease => {})", policy.require_lease)
            }
            3 => {
                policy.retry_delay = rng.pick(&[1, 3]);
                format!("SELECT queue_alter('{name}', retry_delay => {})", seconds(policy.retry_delay))
            }
            _ => {
                policy.max_deliveries = rng.pick(&[0, 1, 2, 4]);
                if queue == DEAD || self.would_exhaust(queue, policy) {
                    return Ok(());
                }
                format!("SELECT queue_alter('{name}', max_deliveries => {})", policy.max_deliveries)
            }
        };
        match rng.below(6) {
            0 => {
                for sql in ["BEGIN", &sql, "ROLLBACK"] {
                    self.ask(s, sql)?;
                }
            }
            1 => {
                for sql in ["BEGIN", "SAVEPOINT x", &sql, "ROLLBACK TO x", "COMMIT"] {
                    self.ask(s, sql)?;
                }
            }
            _ => {
                if self.value(s, &sql)?.as_deref() != Some("t") {
                    return Err("nothing was altered".into());
                }
                self.model.policies[queue] = policy;
            }
        }
        Ok(())
    }

    /// A queue comes, is used, and goes again: what it had is given back with it.
    pub fn scratch(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let is_one = rng.chance(50); // one transaction, which may be undone
        let does_commit = !is_one || rng.chance(50);
        if is_one {
            self.ask(s, "BEGIN")?;
        }
        if self.value(s, "SELECT queue_create('scratch')")?.as_deref() != Some("t") {
            return Err("the queue was not made".into());
        }
        let count = rng.below(4);
        for _ in 0..count {
            self.ask(s, "SELECT queue_send('scratch', '1')")?;
        }
        let read = rng.below(3);
        let lines = self.ask(s, &format!("SELECT msg_id FROM queue_read('scratch', {})", read + 1))?;
        if lines.len() != count.min(read + 1) {
            return Err(format!("{lines:?} of {count} messages"));
        }
        if is_one {
            self.ask(s, if does_commit { "COMMIT" } else { "ROLLBACK" })?;
        }
        let force = rng.chance(60);
        let dropped = self.run(s, &format!("SELECT queue_drop('scratch', force => {force})"))?;
        let due = match (does_commit, force || count == 0) {
            (true, false) => Err("55006".to_owned()),
            (there, _) => Ok(vec![vec![Some(if there { "t" } else { "f" }.to_owned())]]),
        };
        if dropped != due {
            return Err(format!("a drop gave {dropped:?}, not {due:?}"));
        }
        if due.is_err() {
            self.ask(s, "SELECT queue_drop('scratch', force => true)")?;
        }
        Ok(())
    }

    /// Whether some message that nobody holds has had its last delivery by the old limit or the new: when it moves, or
    /// does not, would be the worker's choice.
    fn would_exhaust(&self, queue: usize, policy: Policy) -> bool {
        let now = self.model.now;
        self.model.keys(queue).into_iter().any(|key| {
            let m = &self.model.messages[&key];
            let is_out = policy.is_exhausted(m.count) || self.model.exhausted(key);
            is_out && (m.leased(now).is_none() || m.pin.is_some())
        })
    }

    // ---- the beginning and the end -----------------------------------------------------------------------------

    /// Gives the queues settings for a sequence.
    pub fn set_up(&mut self, rng: &mut Rng) -> Checked {
        for queue in 0..QUEUES.len() {
            let policy = Policy {
                lease: rng.pick(&[3, 5, 9]),
                max_deliveries: if queue == DEAD { 0 } else { rng.pick(&[0, 0, 1, 2, 3]) },
                retry_delay: rng.pick(&[1, 3]),
                require_lease: rng.chance(10),
                is_durable: rng.chance(10),
                ..PLAIN
            };
            self.configure(queue, policy)?;
        }
        Ok(())
    }

    fn configure(&mut self, queue: usize, policy: Policy) -> Checked {
        let sql = format!(
            "SELECT queue_alter('{}', visibility_timeout => {}, max_deliveries => {}, retry_delay => {}, \
             retry_backoff => {}, retry_delay_max => {}, retry_jitter => 0, require_lease => {}, durable_leases => {})",
            QUEUES[queue],
            seconds(policy.lease),
            policy.max_deliveries,
            seconds(policy.retry_delay),
            policy.backoff,
            seconds(RETRY_MAX),
            policy.require_lease,
            policy.is_durable
        );
        self.ask(SESSIONS, &sql)?;
        if self.model.policies[queue].paused {
            self.ask(SESSIONS, &format!("SELECT queue_resume('{}')", QUEUES[queue]))?;
        }
        self.model.policies[queue] = policy;
        Ok(())
    }

    /// Ends every transaction, waits for what the worker has to do, and compares; then reads and finishes all there is.
    pub fn drain(&mut self, rng: &mut Rng) -> Checked {
        for s in 0..SESSIONS {
            if self.model.sessions[s].is_open {
                self.end(s, rng.chance(50))?;
            }
        }
        self.end_all_prepared(rng)?;
        self.look(SESSIONS)?;
        self.settle()?;
        for queue in 0..QUEUES.len() {
            self.configure(queue, PLAIN)?;
        }
        self.advance(64)?; // all leases end, all is due
        self.settle()?;
        let begun = Instant::now();
        loop {
            let mut got = 0;
            for (queue, name) in QUEUES.iter().enumerate() {
                let keys = self.read_so(0, queue, 100, None, PLAIN.lease, "NULL")?;
                got += keys.len();
                self.done(0);
                if keys.is_empty() {
                    continue;
                }
                let (ids, leases): (Vec<i64>, Vec<i64>) =
                    keys.iter().filter_map(|key| Some((key.1, self.model.messages[key].lease?.id))).unzip();
                let sql = format!(
                    "SELECT count(*) FROM queue_delete_batch('{}', {}, {}, strict => true)",
                    name,
                    array(ids, "int8"),
                    array(leases, "int8")
                );
                self.ask(0, &sql)?;
                for key in keys {
                    self.model.messages.remove(&key);
                }
            }
            if self.model.messages.is_empty() && got == 0 {
                break;
            }
            if begun.elapsed() > WORKER_LIMIT {
                self.not_counting(begun.elapsed());
                return Err(format!("never delivered: {:?}", self.model.messages));
            }
        }
        self.look(SESSIONS)?;
        let empty: Vec<String> =
            QUEUES.iter().map(|name| format!("DELETE FROM queue_archive.{name}")).collect();
        self.ask(SESSIONS, &empty.join("; "))?;
        self.model.archive.clear();
        Ok(())
    }

    /// Waits until the worker has moved all that it has to move.
    fn settle(&mut self) -> Checked {
        let begun = Instant::now();
        while (0..QUEUES.len()).any(|queue| self.has_limbo(queue)) {
            if begun.elapsed() > WORKER_LIMIT {
                self.not_counting(begun.elapsed());
                return Err(format!("the worker does not move: {:?}", self.model.messages));
            }
            std::thread::sleep(Duration::from_millis(1));
            if begun.elapsed() > Duration::from_millis(50) {
                self.advance(2)?; // what it could not have, it looks at again after a while
            }
            let len = self.trace.len();
            self.look(SESSIONS)?;
            self.trace.truncate(len + 1);
        }
        Ok(())
    }
}
