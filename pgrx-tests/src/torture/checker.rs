//! The verdict on a round, from what its clients saw: pure, no server, no clock.
//!
//! # What is known of a lease
//!
//! A client knows when it sent a call and when the answer came; what the call did happened between the two. So a lease
//! granted by a read in `[began, returned]` for `timeout` was surely granted by `returned`, and could not end by itself
//! before `began + timeout`; it was surely over after `returned + timeout`. In `[returned, began + timeout)` it was
//! **surely live**, unless something may have ended it before: its transaction was not committed and may have been
//! rolled back since [`End::open_us`]; a retry or release may have committed since theirs; an extension that shortens
//! it; a crash. An extension that was answered moves the end to no earlier than its own `began + timeout`. A finish
//! that was answered holds the message until its transaction ends.
//!
//! Of two deliveries whose calls overlapped the order is not known: only what holds for both orders is held against
//! them. So every count is of what **cannot** be explained; a late answer excuses, it never accuses.
//!
//! # The exception after a crash
//!
//! A lease younger than the flush interval may be forgotten by a crash: counted, not held against anybody. An older
//! one must survive, if since then there was a worker for [`Rules::flush_slack_us`] at one go to write it.
//!
//! # After an asynchronous failover
//!
//! What was acknowledged before it may be gone: counted as measured loss. But not what was acknowledged when the standby
//! was seen to have everything.

use std::collections::{HashMap, HashSet};

use super::claims::{Shorts, Torn};
use super::history::{
    Act, Answer, Blow, BlowAt, Delivered, EffectRefused, History, Key, Outcome, Sent, Us, Verb,
};

/// So many examples of each are kept.
const EXAMPLES_MAX: usize = 5;

/// What holds for the round.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// pg_queue.lease_flush_interval.
    pub flush_us: Us,
    /// How long after that the worker may take to have a lease on disk.
    pub flush_slack_us: Us,
    /// How far the server's wall clock, by which delays are kept, may run from the monotonic one meanwhile.
    pub clock_slack_us: Us,
    /// How long a lease lasts that nobody asked to be longer or shorter.
    pub lease_us: Us,
    /// The queue whose finishes all write the ledger.
    pub exact: u8,
    /// The queue with durable_leases: what a read returned is counted on disk.
    pub durable: u8,
}

/// What the tables held when everything was drained.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// Keys in the ledger. (Its unique index is why there is no key twice.)
    pub ledger: Vec<Key>,
    /// Who wrote these into it had heard of the delivery: they must be in the history.
    pub claimed: Vec<(Key, i64)>,
    /// Keys of messages that nobody could read any more.
    pub left: Vec<Key>,
    /// Keys in the archives, each as often as it is there.
    pub archived: Vec<Key>,
}

/// One rule: how often it was broken, and the first examples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub broken: u64,
    pub examples: Vec<String>,
}

impl Count {
    pub(super) fn add(&mut self, example: impl FnOnce() -> String) {
        self.broken += 1;
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(example());
        }
    }
}

/// What was found. Only the first part must be 0.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    pub lost: Count,
    pub phantom: Count,
    pub early: Count,
    pub doubled: Count,
    pub concurrent: Count,
    pub fence: Count,
    pub effect: Count,
    pub count: Count,
    pub stalled: Count,
    pub refused_held: Count,
    pub archive: Count,
    pub torn: Count,
    pub lease_id: Count,

    pub tried: u64,
    pub acknowledged: u64,
    pub rolled_back: u64,
    pub unknown: u64,
    /// Of the unknown ones: those that turned out to be committed.
    pub unknown_delivered: u64,
    pub deliveries: u64,
    pub finishes: u64,
    pub refused: u64,
    /// Leases forgotten by a crash that were younger than the flush interval: the documented exception.
    pub forgotten_young: u64,
    /// Those that were a little older, or whose worker was away: neither promised nor excluded.
    pub forgotten_unsure: u64,
    /// Reads that found less than they were asked for, while nobody was seen who may have had more.
    pub short: u64,
    /// Leases that were too old to be forgotten when a crash came.
    pub outlived: u64,
    /// Acknowledged sends lost, and finishes undone, by an asynchronous failover.
    pub failover_lost: u64,
    pub failover_undone: u64,
}

impl Verdict {
    /// The rules, by the names that the report uses.
    pub fn counts(&self) -> [(&'static str, &Count); 13] {
        [
            ("lost", &self.lost),
            ("phantom", &self.phantom),
            ("early", &self.early),
            ("doubled", &self.doubled),
            ("concurrent", &self.concurrent),
            ("fence", &self.fence),
            ("effect", &self.effect),
            ("count", &self.count),
            ("stalled", &self.stalled),
            ("refused", &self.refused_held),
            ("archive", &self.archive),
            ("torn", &self.torn),
            ("lease-id", &self.lease_id),
        ]
    }

    pub fn is_clean(&self) -> bool {
        self.counts().iter().all(|(_, count)| count.broken == 0)
    }
}

/// Everything about one message.
pub(super) struct Message<'a> {
    pub key: Key,
    sent: Option<&'a Sent>,
    /// By when they returned.
    pub delivered: &'a [Delivered],
    /// By when they began.
    pub acts: &'a [Act],
    refused: &'a [EffectRefused],
}

pub(super) struct Checker<'a> {
    pub rules: Rules,
    pub blows: Vec<BlowAt>,
    pub ledger: HashSet<Key>,
    pub left: HashSet<Key>,
    /// How often each key is in the archives.
    pub archived: HashMap<Key, u32>,
    pub shorts: Shorts,
    /// By transaction: those whose end is unknown.
    pub torn: HashMap<Key, Torn>,
    pub verdict: &'a mut Verdict,
}

/// Judges a round.
pub fn check(mut history: History, tables: &Tables, rules: Rules) -> Verdict {
    history.sent.sort_by_key(|sent| sent.key);
    history.delivered.sort_by_key(|one| (one.key, one.returned_us));
    history.acts.sort_by_key(|act| (act.key, act.began_us));
    history.refused.sort_by_key(|refused| refused.key);
    history.blows.sort_by_key(|blow| blow.from_us);
    let mut verdict = Verdict::default();
    let mut checker = Checker {
        rules,
        blows: history.blows.clone(),
        ledger: tables.ledger.iter().copied().collect(),
        left: tables.left.iter().copied().collect(),
        archived: HashMap::new(),
        shorts: Shorts::of(&history),
        torn: HashMap::new(),
        verdict: &mut verdict,
    };
    checker.verdict.short = checker.shorts.count();
    for key in &tables.archived {
        *checker.archived.entry(*key).or_default() += 1;
    }
    let (mut sent, mut delivered, mut acts) = (&history.sent[..], &history.delivered[..], &history.acts[..]);
    let mut refused = &history.refused[..];
    while let Some(key) = [
        sent.first().map(|sent| sent.key),
        delivered.first().map(|one| one.key),
        acts.first().map(|act| act.key),
        refused.first().map(|refused| refused.key),
    ]
    .into_iter()
    .flatten()
    .min()
    {
        let message = Message {
            key,
            sent: split(&mut sent, |sent| sent.key == key).first(),
            delivered: split(&mut delivered, |one| one.key == key),
            acts: split(&mut acts, |act| act.key == key),
            refused: split(&mut refused, |refused| refused.key == key),
        };
        checker.message(&message);
    }
    checker.effects(&history);
    checker.not_torn();
    checker.leases_differ(&history);
    checker.claims(&history, &tables.claimed);
    verdict
}

/// Takes off what belongs together.
fn split<'a, T>(of: &mut &'a [T], is_same: impl Fn(&T) -> bool) -> &'a [T] {
    let (these, rest) = of.split_at(of.iter().position(|one| !is_same(one)).unwrap_or(of.len()));
    *of = rest;
    these
}

impl Checker<'_> {
    fn message(&mut self, message: &Message) {
        self.count(message);
        let Some(sent) = message.sent else {
            if !message.delivered.is_empty() {
                self.verdict.phantom.add(|| format!("{:x} was delivered and nobody sent it", message.key));
            }
            return;
        };
        self.not_phantom_nor_early(message, sent);
        self.not_lost(message, sent);
        self.not_stalled(message, sent);
        self.note_torn(message, sent);
        self.not_after_finish(message);
        for (index, second) in message.delivered.iter().enumerate() {
            for first in &message.delivered[..index] {
                self.pair(message, first, second);
                self.counted(message, first, second);
            }
        }
        self.outlived(message);
        self.fences(message);
        self.not_refused(message);
        self.archived_once(message);
        self.effect_once(message);
        self.not_early_again(message);
    }

    fn count(&mut self, message: &Message) {
        let verdict = &mut *self.verdict;
        if let Some(sent) = message.sent {
            verdict.tried += 1;
            match sent.end.outcome {
                Outcome::Acknowledged => verdict.acknowledged += 1,
                Outcome::RolledBack => verdict.rolled_back += 1,
                Outcome::Unknown => {
                    verdict.unknown += 1;
                    let is_done = self.ledger.contains(&sent.key);
                    verdict.unknown_delivered += u64::from(is_done || !message.delivered.is_empty());
                }
            }
        }
        verdict.deliveries += message.delivered.len() as u64;
        for act in message.acts {
            verdict.finishes += u64::from(is_finished(act));
            verdict.refused += u64::from(act.answer == Answer::Refused);
        }
    }

    fn not_phantom_nor_early(&mut self, message: &Message, sent: &Sent) {
        for one in message.delivered.iter().filter(|one| !one.is_own) {
            let key = message.key;
            if sent.end.outcome == Outcome::RolledBack {
                self.verdict
                    .phantom
                    .add(|| format!("{key:x} was delivered and its sending was rolled back: {one:?}"));
            } else if one.returned_us < sent.end.open_us {
                self.verdict.phantom.add(|| {
                    format!("{key:x} was delivered while its sender's transaction was open: {one:?}, {sent:?}")
                });
            }
        }
        for one in message.delivered {
            if one.returned_us + self.rules.clock_slack_us < sent.due_us {
                self.verdict.early.add(|| {
                    let early_us = sent.due_us - one.returned_us;
                    format!(
                        "{:x} was delivered {early_us} us before it was due: {one:?}, {sent:?}",
                        message.key
                    )
                });
            }
        }
    }

    /// A committed send is delivered until it is finished: a message that is gone was finished by somebody.
    fn not_lost(&mut self, message: &Message, sent: &Sent) {
        if sent.end.outcome != Outcome::Acknowledged {
            return;
        }
        let key = message.key;
        if self.left.contains(&key) {
            let times = message.delivered.len();
            self.verdict.lost.add(|| {
                format!("{key:x} is in its table and is not delivered (it was {times} times before): {sent:?}")
            });
            return;
        }
        let is_finished = self.ledger.contains(&key)
            || message.acts.iter().any(|act| {
                let may_be_done = act.verb.is_finish() && act.answer != Answer::Refused;
                may_be_done && act.end.outcome != Outcome::RolledBack
            });
        if is_finished {
            return;
        }
        if self.may_be_undone(sent.end.over_us, Us::MAX) {
            self.verdict.failover_lost += 1;
            return;
        }
        self.verdict.lost.add(|| match message.delivered.last() {
            None => format!("{key:x} was never delivered and is gone: {sent:?}"),
            Some(last) => format!("{key:x} was delivered, not finished, and is gone: {sent:?}, {last:?}"),
        });
    }

    /// Whether what was acknowledged at `us` may be lost by a failover that began before `until_us`.
    pub(super) fn may_be_undone(&self, us: Us, until_us: Us) -> bool {
        self.blows.iter().any(|blow| {
            let Blow::Failover { kept_until_us: Some(kept_until_us) } = blow.blow else { return false };
            kept_until_us <= us && us <= blow.to_us && blow.from_us <= until_us
        })
    }

    fn not_after_finish(&mut self, message: &Message) {
        let acts = message.acts.iter().filter(|act| is_finished(act));
        let Some(finish) = acts.min_by_key(|act| act.end.over_us) else { return };
        for one in message.delivered.iter().filter(|one| one.began_us >= finish.end.over_us) {
            if self.may_be_undone(finish.end.over_us, one.returned_us) {
                self.verdict.failover_undone += 1;
                continue;
            }
            self.verdict.doubled.add(|| {
                format!(
                    "{:x} was delivered after its finish was acknowledged: {finish:?}, {one:?}",
                    message.key
                )
            });
        }
    }

    /// When a lease can have ended by itself at the earliest.
    fn deadline_us(message: &Message, one: &Delivered) -> Us {
        let mut live_until_us = one.began_us + one.lease_us;
        for act in message.acts.iter().filter(|act| act.lease_id == one.lease_id) {
            let Verb::Extend { lease_us } = act.verb else { continue };
            if act.answer == Answer::Refused {
                continue;
            }
            let until_us = act.began_us + lease_us;
            if until_us < live_until_us {
                // It may shorten the lease, if it commits.
                if act.end.outcome != Outcome::RolledBack {
                    live_until_us = until_us;
                }
            } else if act.answer == Answer::Done {
                live_until_us = until_us;
            }
        }
        live_until_us
    }

    /// When a lease can have ended at the earliest, a crash aside.
    fn live_until_us(message: &Message, one: &Delivered) -> Us {
        let mut live_until_us = Self::deadline_us(message, one);
        for act in message.acts.iter().filter(|act| act.lease_id == one.lease_id) {
            match act.verb {
                Verb::Finish | Verb::Archive if act.answer == Answer::Done => {
                    live_until_us = live_until_us.max(act.end.open_us)
                }
                Verb::Retry { .. } | Verb::Release { .. }
                    if act.answer != Answer::Refused && act.end.outcome != Outcome::RolledBack =>
                {
                    live_until_us = live_until_us.min(act.end.open_us.max(act.began_us));
                }
                _ => {}
            }
        }
        if one.end.outcome != Outcome::Acknowledged {
            live_until_us = live_until_us.min(one.end.open_us.max(one.returned_us));
        }
        live_until_us
    }

    /// What of two deliveries of one message must not be: that both leases run at once.
    fn pair(&mut self, message: &Message, first: &Delivered, second: &Delivered) {
        let key = message.key;
        if first.lease_id == second.lease_id {
            self.verdict
                .doubled
                .add(|| format!("{key:x} was delivered twice under one lease: {first:?}, {second:?}"));
            return;
        }
        // Twice in one answer: the first lease ran until then, whatever became of the transaction.
        let is_one_call = (first.began_us, first.returned_us) == (second.began_us, second.returned_us);
        if is_one_call && first.returned_us < first.began_us + first.lease_us {
            self.verdict.doubled.add(|| format!("{key:x} came twice in one answer: {first:?}, {second:?}"));
            return;
        }
        let is_live = |of: &Delivered, at_us: Us| at_us < Self::live_until_us(message, of);
        let is_order_known = first.returned_us <= second.began_us;
        let is_concurrent =
            is_live(first, second.returned_us) && (is_order_known || is_live(second, first.returned_us));
        if !is_concurrent {
            return;
        }
        match self.forgotten(message, first, second) {
            Some(Forgotten::Young) => self.verdict.forgotten_young += 1,
            Some(Forgotten::Unsure) => self.verdict.forgotten_unsure += 1,
            None => {
                let example =
                    || format!("{key:x} had two leases at once: {first:?}, {second:?}, {:?}", message.acts);
                self.verdict.concurrent.add(example);
                self.verdict.doubled.add(example);
            }
        }
    }

    /// With durable leases no crash makes a delivery uncounted that a client heard of while its lease ran.
    fn counted(&mut self, message: &Message, first: &Delivered, second: &Delivered) {
        let is_known = first.returned_us <= second.began_us && first.end.outcome == Outcome::Acknowledged;
        let is_uncounted =
            |act: &Act| matches!(act.verb, Verb::Release { .. }) && act.answer != Answer::Refused;
        if first.queue != self.rules.durable || !is_known || second.count > first.count {
            return;
        }
        let is_undone = self.may_be_undone(first.returned_us, second.returned_us);
        if message.acts.iter().any(is_uncounted) || is_undone {
            return;
        }
        self.verdict.count.add(|| format!("{:x} was not counted: {first:?}, {second:?}", message.key));
    }

    /// Whether the first crash after a delivery may have made the server forget its lease before the next delivery.
    fn forgotten(&self, message: &Message, first: &Delivered, second: &Delivered) -> Option<Forgotten> {
        let is_between = |blow: &&BlowAt| blow.to_us >= first.began_us && blow.from_us <= second.returned_us;
        let crash = self.blows.iter().filter(|b| b.blow != Blow::WorkerAway).find(is_between)?;
        // Both orders are possible, so the younger one is what counts.
        if first.returned_us > second.began_us {
            return Some(Forgotten::Young);
        }
        self.forgotten_by(crash, message, first)
    }

    fn forgotten_by(&self, crash: &BlowAt, message: &Message, first: &Delivered) -> Option<Forgotten> {
        let committed_us = match first.end.outcome {
            Outcome::Acknowledged => first.end.over_us,
            _ => return Some(Forgotten::Young), // its transaction died in the crash, or may have
        };
        let lost_from_us = match crash.blow {
            Blow::Failover { kept_until_us } => kept_until_us.unwrap_or(Us::MAX).min(crash.from_us),
            Blow::Crash | Blow::WorkerAway => crash.from_us,
        };
        let writable_us = committed_us + self.rules.flush_us;
        if writable_us >= lost_from_us {
            return Some(Forgotten::Young);
        }
        // A finish, or a change of its end, that was under way keeps the new end from being written.
        let was_moving = message.acts.iter().any(|act| {
            let is_near = act.returned_us.saturating_add(self.rules.flush_us + self.rules.flush_slack_us);
            act.lease_id == first.lease_id && act.began_us <= crash.to_us && is_near >= lost_from_us
        });
        (was_moving || !self.had_worker(writable_us, lost_from_us)).then_some(Forgotten::Unsure)
    }

    /// Counts the leases that went on over a crash and could not be forgotten: of so many it would have been noticed.
    fn outlived(&mut self, message: &Message) {
        for one in message.delivered {
            let live_until_us = Self::live_until_us(message, one);
            let is_crash = |blow: &&BlowAt| blow.blow != Blow::WorkerAway && blow.to_us >= one.began_us;
            let Some(crash) = self.blows.iter().find(is_crash) else { continue };
            if crash.to_us < live_until_us && self.forgotten_by(crash, message, one).is_none() {
                self.verdict.outlived += 1;
            }
        }
    }

    /// Whether there was a worker between the two for so long at one go that it had its turn.
    fn had_worker(&self, from_us: Us, until_us: Us) -> bool {
        let mut since_us = from_us;
        for blow in self.blows.iter().filter(|blow| blow.blow == Blow::WorkerAway && blow.to_us >= from_us) {
            if blow.from_us.min(until_us) > since_us + self.rules.flush_slack_us {
                return true;
            }
            since_us = since_us.max(blow.to_us);
        }
        until_us > since_us + self.rules.flush_slack_us
    }

    /// A finish, retry, release or extension is refused once its lease is lost.
    fn fences(&mut self, message: &Message) {
        for act in message.acts.iter().filter(|act| act.answer == Answer::Done) {
            let Some(of) = message.delivered.iter().find(|one| one.lease_id == act.lease_id) else { continue };
            let earlier: Vec<&Act> = message
                .acts
                .iter()
                .filter(|other| other.began_us < act.began_us && other.lease_id == act.lease_id)
                .collect();
            // Extensions made since then do not excuse it.
            let over_from_us =
                earlier.iter().fold(of.returned_us + of.lease_us, |over_us, other| match other.verb {
                    Verb::Extend { lease_us } if other.answer != Answer::Refused => {
                        over_us.max(other.returned_us.saturating_add(lease_us))
                    }
                    _ => over_us,
                });
            let given_back = earlier.iter().find(|other| {
                let is_ended = !matches!(other.verb, Verb::Extend { .. });
                let is_sure = other.answer == Answer::Done && other.end.outcome == Outcome::Acknowledged;
                is_ended && is_sure && other.end.over_us <= act.began_us
            });
            let successor = message.delivered.iter().find(|next| {
                next.began_us >= of.returned_us
                    && next.returned_us <= act.began_us
                    && next.lease_id != of.lease_id
            });
            let why = if act.began_us > over_from_us + self.rules.clock_slack_us {
                "its lease had ended"
            } else if given_back.is_some_and(|other| !self.may_be_undone(other.end.over_us, act.returned_us)) {
                "its lease was given back"
            } else if successor.is_some_and(|next| !self.may_be_undone(next.returned_us, act.returned_us)) {
                "another lease was given since"
            } else {
                continue;
            };
            self.verdict.fence.add(|| {
                format!("{:x}: {act:?} was accepted, and {why}: {of:?}, {:?}", message.key, message.acts)
            });
        }
    }

    /// After a retry or release with a delay it does not come before that.
    fn not_early_again(&mut self, message: &Message) {
        for act in message.acts {
            let (Verb::Retry { delay_us } | Verb::Release { delay_us }) = act.verb else { continue };
            if act.answer != Answer::Done || act.end.outcome != Outcome::Acknowledged {
                continue;
            }
            let due_us = act.began_us + delay_us;
            for one in message.delivered.iter().filter(|one| one.began_us >= act.end.over_us) {
                let is_early = one.returned_us + self.rules.clock_slack_us < due_us;
                if is_early && !self.may_be_undone(act.end.over_us, one.returned_us) {
                    self.verdict.early.add(|| {
                        format!("{:x} came again before its delay was over: {act:?}, {one:?}", message.key)
                    });
                }
            }
        }
    }

    /// Who holds a message finds it undone. (One whose lease has ended may find that another has done it.)
    fn effect_once(&mut self, message: &Message) {
        for refused in message.refused {
            let of = refused.lease_id.and_then(|id| message.delivered.iter().find(|one| one.lease_id == id));
            let deadline_us = match (of, refused.lease_id) {
                (Some(of), _) => Self::deadline_us(message, of),
                (None, None) => refused.began_us + self.rules.lease_us,
                (None, Some(_)) => Us::MAX,
            };
            if refused.at_us >= deadline_us {
                continue;
            }
            self.verdict.effect.add(|| {
                format!("the ledger had it already: {refused:?}, {:?}, {:?}", message.delivered, message.acts)
            });
        }
    }

    /// What stands in the ledger was delivered to who wrote it, under that lease.
    fn claims(&mut self, history: &History, claimed: &[(Key, i64)]) {
        let known: HashSet<(Key, i64)> = history.delivered.iter().map(|one| (one.key, one.lease_id)).collect();
        for (key, lease_id) in claimed.iter().filter(|claim| !known.contains(claim)) {
            self.verdict
                .effect
                .add(|| format!("{key:x} is in the ledger under lease {lease_id}, and nobody read that"));
        }
    }

    /// The ledger and the messages tell the same.
    fn effects(&mut self, history: &History) {
        let sent = &history.sent;
        let known = |key: Key| sent.binary_search_by_key(&key, |sent| sent.key).ok().map(|index| sent[index]);
        for key in &self.ledger {
            match known(*key) {
                None => self.verdict.effect.add(|| format!("{key:x} is in the ledger and nobody sent it")),
                Some(sent) if sent.end.outcome == Outcome::RolledBack => {
                    self.verdict
                        .effect
                        .add(|| format!("{key:x} is in the ledger and its sending was rolled back"));
                }
                Some(_) => {}
            }
        }
        for key in self.archived.keys().filter(|key| known(**key).is_none()) {
            self.verdict.archive.add(|| format!("{key:x} is in the archive and nobody sent it"));
        }
        for sent in sent.iter().filter(|sent| sent.queue == self.rules.exact) {
            let is_settled = self.ledger.contains(&sent.key) || self.left.contains(&sent.key);
            let is_excused = self.may_be_undone(sent.end.over_us, Us::MAX);
            if sent.end.outcome == Outcome::Acknowledged && !is_settled && !is_excused {
                self.verdict.effect.add(|| format!("{:x} is gone and not in the ledger", sent.key));
            }
        }
    }
}

/// Why a lease that would have run on was forgotten.
enum Forgotten {
    /// The documented exception.
    Young,
    /// Not promised, not excluded.
    Unsure,
}

pub(super) fn is_finished(act: &Act) -> bool {
    act.verb.is_finish() && act.answer == Answer::Done && act.end.outcome == Outcome::Acknowledged
}
