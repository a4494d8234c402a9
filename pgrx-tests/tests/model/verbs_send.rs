//! What brings messages in: sends of every kind, and plain SQL.

use std::io::Write;

use serde_json::{json, Value};

use crate::rng::Rng;
use crate::state::*;
use crate::world::*;

/// What a message is sent with.
struct Options {
    n: i64,
    headers: Option<Value>,
    due: Option<Time>,
    ttl: Option<Time>,
}

impl World {
    fn options(&mut self, rng: &mut Rng, queue: usize) -> Options {
        let headers = [
            None,
            None,
            Some(json!({"h": 1})),
            Some(json!({})),
            Some(json!([1, "x"])),
            Some(json!({"h": {"i": "ü'"}})),
        ];
        let due = rng.chance(25).then(|| rng.pick(&[1, 3, 5, 9]));
        // Counted from when it is visible: what is added up must be odd. The dead-letter queue's never expire.
        let ttl = if due.is_some() { rng.pick(&[4, 8]) } else { rng.pick(&[3, 7, 15]) };
        let ttl = (queue != DEAD && rng.chance(8)).then_some(ttl);
        Options { n: self.number(), headers: headers[rng.below(headers.len())].clone(), due, ttl }
    }

    fn row(&self, options: &Options) -> Row {
        let now = self.model.now;
        Row {
            due: options.due.map(|due| now + due),
            expires: options.ttl.map(|ttl| now + options.due.unwrap_or(0) + ttl),
            error: None,
            headers: options.headers.clone(),
        }
    }

    fn sent(&mut self, s: usize, queue: usize, id: i64, options: &Options) -> Checked {
        let key = (queue, id);
        if self.model.messages.contains_key(&key) {
            return Err(format!("id {key:?} comes twice"));
        }
        let row = self.row(options);
        self.model.send(s, key, options.n, row);
        Ok(())
    }

    fn when(&self, rng: &mut Rng, due: Option<Time>) -> String {
        match due {
            Some(due) if rng.chance(50) => format!("deliver_at => {}", self.wall(self.model.now + due)),
            due => format!("delay => {}", or_null(due.map(seconds))),
        }
    }

    pub fn send(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let options = self.options(rng, queue);
        let when = self.when(rng, options.due);
        let sql = format!(
            "SELECT queue_send('{}', '{}', headers => {}, {when}, ttl => {})",
            QUEUES[queue],
            options.n,
            jsonb(&options.headers),
            or_null(options.ttl.map(seconds)),
        );
        let id = int(&self.value(s, &sql)?)?;
        self.sent(s, queue, id, &options)?;
        self.done(s);
        Ok(())
    }

    pub fn send_batch(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let first = self.options(rng, queue);
        // Sometimes more than what one hold of the dispatcher's lock takes, and more than a small window has room for.
        let many = rng.chance(if self.is_small { 30 } else { 8 });
        let count = if many { 50 + rng.below(250) } else { rng.below(5) };
        let all: Vec<Options> = (0..count)
            .map(|_| Options { due: first.due, ttl: first.ttl, ..self.options(rng, queue) })
            .collect();
        let sql = format!(
            "SELECT queue_send_batch('{}', {}, headers => {}, {}, ttl => {})",
            QUEUES[queue],
            array(all.iter().map(|one| format!("'{}'", one.n)), "jsonb"),
            array(all.iter().map(|one| jsonb(&one.headers)), "jsonb"),
            self.when(rng, first.due),
            or_null(first.ttl.map(seconds)),
        );
        let lines = self.ask(s, &sql)?;
        self.all_sent(s, queue, &lines, &all)
    }

    fn all_sent(&mut self, s: usize, queue: usize, lines: &[Line], all: &[Options]) -> Checked {
        if lines.len() != all.len() {
            return Err(format!("{} ids for {} messages", lines.len(), all.len()));
        }
        let mut last = i64::MIN;
        for (line, options) in lines.iter().zip(all) {
            let id = int(&line[0])?;
            if id <= last {
                return Err(format!("id {id} after {last}"));
            }
            last = id;
            self.sent(s, queue, id, options)?;
        }
        self.done(s);
        Ok(())
    }

    /// Also what must be refused: this is the fuzzing of the entries' parser, which cannot run outside a server.
    pub fn send_entries(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let all: Vec<Options> = (0..rng.below(5)).map(|_| self.options(rng, queue)).collect();
        let zero = self.wall(self.model.now);
        let zero = int(&self.value(SESSIONS, &format!("SELECT ceil(extract(epoch FROM {zero}))::int8"))?)?;
        let mut entries: Vec<Value> = all
            .iter()
            .map(|one| {
                let mut entry = json!({ "message": one.n });
                if let Some(headers) = &one.headers {
                    entry["headers"] = headers.clone();
                }
                if let Some(due) = one.due.filter(|_| rng.chance(40)) {
                    entry["deliver_at"] = json!(instant(zero + due * UNIT_S));
                } else if let Some(due) = one.due {
                    entry["delay"] = json!(format!("{} s", due * UNIT_S));
                }
                if let Some(ttl) = one.ttl {
                    entry["ttl"] = json!(format!("{} s", ttl * UNIT_S));
                }
                entry
            })
            .collect();
        let is_wrong = rng.chance(30);
        let mut document = if is_wrong { spoil(rng, &mut entries) } else { None };
        let document = document.get_or_insert(Value::Array(entries)).to_string();
        let sql = format!("SELECT queue_send_entries('{}', {}::jsonb)", QUEUES[queue], quoted(&document));
        match self.run(s, &sql)? {
            Ok(_) if is_wrong => Err("entries that are wrong were sent".into()),
            Ok(lines) => self.all_sent(s, queue, &lines, &all),
            Err(code) if is_wrong && ["22023", "22004", "0A000", "22007", "22008"].contains(&code.as_str()) => {
                self.model.fail(s);
                Ok(())
            }
            Err(code) => Err(format!("error {code} for entries")),
        }
    }

    pub fn insert(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let all: Vec<Options> =
            (0..1 + rng.below(3)).map(|_| Options { ttl: None, ..self.options(rng, queue) }).collect();
        // With an id that no sequence gives: below all others, and lower than the last.
        let has_id = all.len() == 1 && rng.chance(40);
        let rows: Vec<String> = all
            .iter()
            .map(|one| {
                let due = or_null(one.due.map(|due| self.wall(self.model.now + due)));
                let id = if has_id { format!(", {}", -one.n) } else { String::new() };
                format!("('{}', {}, {due}, NULL{id})", one.n, jsonb(&one.headers))
            })
            .collect();
        let id = if has_id { ", msg_id" } else { "" };
        let sql = format!(
            "INSERT INTO queue.{} (message, headers, visible_at, expires_at{id}) VALUES {} RETURNING msg_id",
            QUEUES[queue],
            rows.join(", ")
        );
        let lines = self.ask(s, &sql)?;
        self.all_sent(s, queue, &lines, &all)
    }

    pub fn copy(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let count = if rng.chance(10) { 70 } else { 1 + rng.below(4) };
        let all: Vec<Options> =
            (0..count).map(|_| Options { n: self.number(), headers: None, due: None, ttl: None }).collect();
        let lines: String = all.iter().map(|one| format!("{}\n", one.n)).collect();
        let sql = format!("COPY queue.{} (message) FROM STDIN", QUEUES[queue]);
        self.trace.push(format!("{s}: {sql} -- {} and so on, {count} rows", all[0].n));
        let mut writer = self.clients[s].copy_in(&sql).map_err(|error| error.to_string())?;
        writer.write_all(lines.as_bytes()).map_err(|error| error.to_string())?;
        writer.finish().map_err(|error| error.to_string())?;
        let of_it = format!("message::text::int8 BETWEEN {} AND {}", all[0].n, all[all.len() - 1].n);
        let ids = self.ask(
            if self.model.sessions[s].is_open { s } else { SESSIONS },
            &format!("SELECT msg_id FROM queue.{} WHERE {of_it} ORDER BY 1", QUEUES[queue]),
        )?;
        self.all_sent(s, queue, &ids, &all)
    }

    /// A message whose row this session may change without waiting and without racing the worker.
    fn changeable(&self, s: usize, rng: &mut Rng, queue: usize) -> Option<Key> {
        let keys: Vec<Key> = self.model.keys(queue).into_iter().collect();
        let key = *keys.get(rng.below(keys.len()))?;
        let m = &self.model.messages[&key];
        let is_free =
            m.is_seen_by(s) && [None, Some(s)].contains(&m.locked_by) && [None, Some(s)].contains(&m.pin);
        let is_seen = self.model.sessions[s].snapshot.is_none() || m.born_at.is_some();
        (is_free && is_seen && !self.model.may_go(key)).then_some(key)
    }

    pub fn update(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let Some(key) = self.changeable(s, rng, queue) else { return Ok(()) };
        let mut row = self.model.messages[&key].row_seen_by(s).clone();
        let set = match rng.below(6) {
            0 if queue != DEAD => {
                row.expires = rng.chance(70).then(|| self.model.now + rng.pick(&[1, 3, 7]));
                format!("expires_at = {}", or_null(row.expires.map(|at| self.wall(at))))
            }
            1 => {
                row.headers = rng.chance(70).then(|| json!({"h": 2}));
                format!("headers = {}", jsonb(&row.headers))
            }
            2 => {
                row.error = rng.chance(70).then(|| "by hand".into());
                format!("last_error = {}", or_null(row.error.as_deref().map(quoted)))
            }
            _ => {
                row.due = rng.chance(60).then(|| self.model.now + rng.pick(&[1, 3, 5]));
                format!("visible_at = {}", or_null(row.due.map(|due| self.wall(due))))
            }
        };
        let sql = format!("UPDATE queue.{} SET {set} WHERE msg_id = {} RETURNING msg_id", QUEUES[queue], key.1);
        if !self.changed_one(s, key, &sql)? {
            return Ok(());
        }
        self.model.change(s, key, Some(row));
        self.changed(s);
        Ok(())
    }

    /// Runs what changes one row. Above READ COMMITTED a transaction does not see what was sent since, and does not change
    /// what was changed since: whether it has.
    fn changed_one(&mut self, s: usize, key: Key, sql: &str) -> Checked<bool> {
        let m = &self.model.messages[&key];
        let (born_at, changed_at) = (m.born_at.unwrap_or(0), m.changed_at);
        let is_own = m.sent_by == Some(s) || m.draft.is_some() && m.locked_by == Some(s); // this version, at least
        let snapshot = self.model.sessions[s].snapshot.filter(|_| !is_own).unwrap_or(u64::MAX);
        // Where its own call has written what was newer than its snapshot, that shows the older row, too.
        let is_twofold =
            is_own && self.model.sessions[s].snapshot.is_some_and(|snapshot| changed_at > snapshot);
        match self.run(s, sql)? {
            Ok(lines) if lines.len() == 1 && changed_at <= snapshot => Ok(true),
            Ok(lines) if lines.is_empty() && born_at > snapshot => {
                self.model.sessions[s].has_id = true;
                Ok(false)
            }
            Err(code) if code == "40001" && (is_twofold || born_at <= snapshot && changed_at > snapshot) => {
                self.model.fail(s);
                Ok(false)
            }
            answer => Err(format!(
                "{answer:?} of a change of {key:?} (snapshot {snapshot}): {m:?}",
                m = self.model.messages[&key]
            )),
        }
    }

    fn changed(&mut self, s: usize) {
        self.model.sessions[s].has_id = true;
        self.done(s);
    }

    pub fn delete_row(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let Some(key) = self.changeable(s, rng, queue) else { return Ok(()) };
        let sql = format!("DELETE FROM queue.{} WHERE msg_id = {} RETURNING msg_id", QUEUES[queue], key.1);
        if !self.changed_one(s, key, &sql)? {
            return Ok(());
        }
        self.model.change(s, key, None);
        self.deleted.insert(key);
        self.changed(s);
        Ok(())
    }

    pub fn purge(&mut self, s: usize, rng: &mut Rng) -> Checked {
        let queue = rng.below(QUEUES.len());
        let is_in_the_way = |m: &Message| m.locked_by.is_some_and(|by| by != s);
        let keys: Vec<Key> = self.model.keys(queue).into_iter().collect();
        // What the worker moves here or from here meanwhile would be counted or not.
        let races = self.has_limbo(queue) || queue == DEAD && self.has_limbo(0);
        let is_blind = self.model.sessions[s].snapshot.is_some(); // to what was sent since
        if races || is_blind || keys.iter().any(|key| is_in_the_way(&self.model.messages[key])) {
            return Ok(());
        }
        let there: Vec<Key> = keys.into_iter().filter(|key| self.model.messages[key].is_seen_by(s)).collect();
        let count = int(&self.value(s, &format!("SELECT queue_purge('{}')", QUEUES[queue]))?)?;
        if count != there.len() as i64 {
            return Err(format!("purged {count} messages, not {}", there.len()));
        }
        for key in there {
            let m = &self.model.messages[&key];
            if m.lease.is_some() || m.row.due.is_some() || m.back != (0, 0) {
                self.model.miss(s, key); // let go at commit; till then it is held, should its lease or delay end
            }
            self.model.change(s, key, None);
            self.deleted.insert(key);
        }
        self.changed(s);
        Ok(())
    }
}

/// A time as text, of seconds since 1970.
fn instant(epoch_s: i64) -> String {
    let (days, rest) = (epoch_s.div_euclid(86_400), epoch_s.rem_euclid(86_400));
    // Days since 0000-03-01, after Howard Hinnant's "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    let z = days + 719_468;
    let (era, day_of_era) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02}+00", rest / 3_600, rest / 60 % 60, rest % 60)
}

/// Makes entries wrong somewhere; gives what stands in their place if they are not even entries.
fn spoil(rng: &mut Rng, entries: &mut Vec<Value>) -> Option<Value> {
    let wrong = [
        json!({}),
        json!({"message": 1, "massage": 2}),
        json!({"message": 1, "delay": "1 s", "deliver_at": "2100-01-01"}),
        json!({"message": 1, "delay": "soon"}),
        json!({"message": 1, "delay": "1 month"}),
        json!({"message": 1, "delay": "-1 s"}),
        json!({"message": 1, "delay": 5}),
        json!({"message": 1, "deliver_at": "infinity"}),
        json!({"message": 1, "deliver_at": "2100-13-01"}),
        json!({"message": 1, "ttl": "100000 days"}),
        json!({"message": 1, "priority": 3}),
        json!({"message": 1, "priority": 1e30}),
        json!({"message": 1, "group_key": "g"}),
        json!({"message": 1, "dedup_key": ""}),
        json!({"headers": {"message": 1}}),
        json!([{"message": 1}]),
        json!(null),
        json!("message"),
        json!(7),
    ];
    if rng.chance(10) {
        return Some(wrong[rng.below(16)].clone()).filter(|value| !value.is_array()).or(Some(json!("[]")));
    }
    let at = rng.below(entries.len() + 1);
    entries.insert(at, wrong[rng.below(wrong.len())].clone());
    None
}
