//! What the checker claims of messages that nobody complains of: that who asks for one gets it, that a lease that runs
//! is honoured, that the archive has what was archived, that a transaction is committed as a whole.
//!
//! Owns these rules; the others, and what is known of a lease, are [`super::checker`]'s.
//!
//! # When a message is stalled
//!
//! A read that gives less than it was asked for says that there was no more. A message that was committed and due by
//! then, and surely neither leased nor given back for later, should have been there. Twice within one stretch without a
//! crash: what was being loaded, or given back by a session that had just died, is there the second time; what is not
//! comes again with the next crash, if at all.

use std::collections::HashMap;

use super::checker::{is_finished, Checker, Message};
use super::history::{Answer, Blow, BlowAt, Delivered, History, Key, Outcome, Sent, Short, Us, Verb};

/// After whatever kept a message away: backoff of a delivery that failed (half a second here), and the time that a
/// server takes to notice that a session has died.
const GRACE_US: Us = 2_000_000;
/// The same after a crash or failover: everything is loaded again.
const AFTER_BLOW_US: Us = 5_000_000;
/// It was missed by two reads so far apart.
const MISSED_FOR_US: Us = 1_000_000;

/// The reads of each queue, by their beginning, that came back short while no other call may have had what they missed.
pub(super) struct Shorts(HashMap<u8, Vec<Short>>);

impl Shorts {
    pub fn of(history: &History) -> Self {
        let mut unseen: HashMap<u8, Vec<(Us, Us)>> = HashMap::new();
        for one in &history.unseen {
            unseen.entry(one.queue).or_default().push((one.from_us, one.to_us));
        }
        unseen.values_mut().for_each(|spans| *spans = united(std::mem::take(spans)));
        let mut shorts: HashMap<u8, Vec<Short>> = HashMap::new();
        for short in &history.short {
            let spans = unseen.get(&short.queue).map(Vec::as_slice).unwrap_or_default();
            let next = spans.partition_point(|(_, to_us)| *to_us < short.began_us);
            if spans.get(next).is_none_or(|(from_us, _)| *from_us > short.returned_us) {
                shorts.entry(short.queue).or_default().push(*short);
            }
        }
        shorts.values_mut().for_each(|shorts| shorts.sort_by_key(|short| short.began_us));
        Self(shorts)
    }

    pub fn count(&self) -> u64 {
        self.0.values().map(|shorts| shorts.len() as u64).sum()
    }

    /// The first that lies between the two.
    fn between(&self, queue: u8, from_us: Us, to_us: Us) -> Option<Short> {
        let shorts = self.0.get(&queue)?;
        let begun = shorts[shorts.partition_point(|short| short.began_us < from_us)..].iter();
        begun.take_while(|short| short.began_us <= to_us).find(|short| short.returned_us <= to_us).copied()
    }
}

/// Spans in their order, those that overlap made one.
fn united(mut spans: Vec<(Us, Us)>) -> Vec<(Us, Us)> {
    spans.sort_unstable();
    let mut united: Vec<(Us, Us)> = Vec::with_capacity(spans.len());
    for (from_us, to_us) in spans {
        match united.last_mut() {
            Some(last) if from_us <= last.1 => last.1 = last.1.max(to_us),
            _ => united.push((from_us, to_us)),
        }
    }
    united
}

/// What is known of the messages of a transaction whose end nobody heard of.
#[derive(Default)]
pub(super) struct Torn {
    seen: Option<Key>,
    unseen: Option<Key>,
}

impl Checker<'_> {
    /// A message that is there is given to who asks.
    pub(super) fn not_stalled(&mut self, message: &Message, sent: &Sent) {
        let is_done = message.acts.iter().any(is_finished);
        // Who took it without being seen did so at a time that nobody knows.
        if sent.end.outcome != Outcome::Acknowledged || self.ledger.contains(&message.key) && !is_done {
            return;
        }
        // A failover may have lost it, after it was delivered and before it was finished.
        if self.may_be_undone(sent.end.over_us, Us::MAX) {
            return;
        }
        let mut away = vec![(0, sent.end.over_us.max(sent.due_us))];
        away.extend(message.delivered.iter().map(|one| (one.began_us, Self::may_hold_until_us(one))));
        away.extend(message.acts.iter().filter_map(|act| {
            let heard_us = act.end.over_us.min(act.returned_us);
            let until_us = match (act.verb, act.end.outcome) {
                _ if act.answer == Answer::Refused => return None,
                // Lengthening a lease survives a rollback.
                (Verb::Extend { lease_us }, Outcome::RolledBack) => act.end.over_us.saturating_add(lease_us),
                (_, Outcome::RolledBack) => act.end.over_us,
                (Verb::Finish | Verb::Archive, _) => Us::MAX,
                (Verb::Extend { lease_us }, _) => heard_us.saturating_add(lease_us),
                (Verb::Retry { delay_us } | Verb::Release { delay_us }, _) => {
                    act.end.over_us.saturating_add(delay_us)
                }
            };
            Some((act.began_us, until_us))
        }));
        let away = united(away);
        for (place, (_, until_us)) in away.iter().enumerate() {
            let from_us = until_us.saturating_add(GRACE_US);
            let to_us = away.get(place + 1).map_or(Us::MAX, |next| next.0);
            if let Some((first, second)) = self.missed_twice(sent.queue, from_us, to_us) {
                self.verdict.stalled.add(|| {
                    format!(
                        "{:x} was there and two reads missed it: {first:?}, {second:?}, {sent:?}, {:?}, {:?}",
                        message.key, message.delivered, message.acts
                    )
                });
                return;
            }
        }
    }

    fn may_hold_until_us(one: &Delivered) -> Us {
        let leased_until_us = one.returned_us + one.lease_us;
        match one.end.outcome {
            Outcome::RolledBack => one.end.over_us,
            Outcome::Acknowledged => leased_until_us.max(one.end.over_us),
            Outcome::Unknown => leased_until_us,
        }
    }

    fn missed_twice(&self, queue: u8, mut from_us: Us, to_us: Us) -> Option<(Short, Short)> {
        loop {
            let first = self.shorts.between(queue, from_us, to_us)?;
            let again_us = first.began_us.max(from_us) + MISSED_FOR_US;
            let second = self.shorts.between(queue, again_us, to_us)?;
            let is_near = |blow: &&BlowAt| {
                blow.blow != Blow::WorkerAway
                    && blow.to_us + AFTER_BLOW_US >= first.began_us
                    && blow.from_us <= second.returned_us
            };
            // The last of them: what is after it is looked at next.
            match self.blows.iter().rfind(is_near) {
                None => return Some((first, second)),
                Some(blow) => from_us = blow.to_us + AFTER_BLOW_US + 1,
            }
        }
    }

    /// Who holds a message may do with it what he likes.
    pub(super) fn not_refused(&mut self, message: &Message) {
        for act in message.acts.iter().filter(|act| act.answer == Answer::Refused) {
            let Some(of) = message.delivered.iter().find(|one| one.lease_id == act.lease_id) else { continue };
            let others = || message.acts.iter().filter(|other| other.lease_id == act.lease_id);
            // What may have ended the lease before: whatever became of its transaction, it is not held against anybody.
            let may_be_over = others().any(|other| {
                let is_end = !matches!(other.verb, Verb::Extend { .. });
                is_end && other.answer != Answer::Refused && other.began_us <= act.returned_us
            });
            let may_be_shorter_us = others().filter_map(|other| match other.verb {
                Verb::Extend { lease_us } if other.answer != Answer::Refused => Some(other.began_us + lease_us),
                _ => None,
            });
            let lease_us = of.began_us + of.lease_us;
            let live_until_us = may_be_shorter_us.min().unwrap_or(Us::MAX).min(lease_us);
            let has_crashed = self.blows.iter().any(|blow| {
                blow.blow != Blow::WorkerAway && blow.to_us >= of.began_us && blow.from_us <= act.returned_us
            });
            let was_held = of.end.outcome == Outcome::Acknowledged && !may_be_over && !has_crashed;
            if was_held && act.returned_us + self.rules.clock_slack_us < live_until_us {
                self.verdict.refused_held.add(|| {
                    format!(
                        "{:x}: {act:?} was refused while its lease ran: {of:?}, {:?}",
                        message.key, message.acts
                    )
                });
            }
        }
    }

    /// What was archived is in the archive, once, and nothing else is.
    pub(super) fn archived_once(&mut self, message: &Message) {
        let copies = self.archived.get(&message.key).copied().unwrap_or(0);
        let acts = || message.acts.iter().filter(|act| act.verb == Verb::Archive);
        let kept =
            acts().find(|act| is_finished(act) && !self.may_be_undone(act.end.over_us, Us::MAX)).copied();
        let may_be = acts().any(|act| act.answer != Answer::Refused && act.end.outcome != Outcome::RolledBack);
        let key = message.key;
        if let (0, Some(act)) = (copies, kept) {
            self.verdict.archive.add(|| format!("{key:x} was archived and is not in the archive: {act:?}"));
        } else if copies > 0 && !may_be {
            self.verdict
                .archive
                .add(|| format!("{key:x} is in the archive and nobody archived it: {:?}", message.acts));
        } else if copies > 1 {
            self.verdict.archive.add(|| format!("{key:x} is in the archive {copies} times"));
        } else if copies > 0 && self.left.contains(&key) {
            self.verdict.archive.add(|| format!("{key:x} is in the archive and in its queue"));
        }
    }

    /// Of a transaction whose end nobody heard of: whether this message of it was committed.
    pub(super) fn note_torn(&mut self, message: &Message, sent: &Sent) {
        if sent.end.outcome != Outcome::Unknown || self.may_lose_after(sent.end.open_us) {
            return;
        }
        let is_seen = message.delivered.iter().any(|one| !one.is_own)
            || self.ledger.contains(&message.key)
            || self.left.contains(&message.key)
            || self.archived.contains_key(&message.key);
        let torn = self.torn.entry(sent.transaction).or_default();
        let place = if is_seen { &mut torn.seen } else { &mut torn.unseen };
        place.get_or_insert(message.key);
    }

    /// Whether there is a failover after `us` that loses what was acknowledged.
    fn may_lose_after(&self, us: Us) -> bool {
        let loses = |blow: &BlowAt| matches!(blow.blow, Blow::Failover { kept_until_us: Some(_) });
        self.blows.iter().any(|blow| loses(blow) && blow.to_us >= us)
    }

    /// A transaction is committed as a whole.
    pub(super) fn not_torn(&mut self) {
        let mut torn: Vec<(Key, Key)> =
            self.torn.values().filter_map(|torn| torn.seen.zip(torn.unseen)).collect();
        torn.sort_unstable();
        for (seen, unseen) in torn {
            self.verdict
                .torn
                .add(|| format!("{seen:x} was committed and {unseen:x} of the same transaction was not"));
        }
    }

    /// No two messages have the same lease. (Twice for one message: that is a double delivery.)
    pub(super) fn leases_differ(&mut self, history: &History) {
        let mut leases: Vec<(i64, Key)> = history.delivered.iter().map(|one| (one.lease_id, one.key)).collect();
        leases.sort_unstable();
        for pair in leases.windows(2) {
            let ((first, one), (second, other)) = (pair[0], pair[1]);
            if first == second && one != other {
                self.verdict.lease_id.add(|| format!("lease {first} was given for {one:x} and for {other:x}"));
            }
        }
    }
}
