//! What each client saw, in the order in which it saw it: what it tried to send, what was acknowledged, what it read
//! and under which lease, what it finished and what the answer was; and what befell the server meanwhile.
//!
//! Owns the records and the rules by which a transaction's end settles them. Decides nothing: that is the checker's.
//! Every time is microseconds of one monotonic clock (the harness process'), taken before a call is sent and after
//! its answer came. What happened in the server lies between the two, so every conclusion is drawn from an interval.
//!
//! It is kept in memory: a record takes 48 to 80 bytes, so a run with a million messages some 250 MB.

/// Microseconds since the round began.
pub type Us = u64;

/// What a message is known by: it stands in its payload. A msg_id is no such thing, for an id that was rolled back may
/// come again after a crash.
pub type Key = u64;

/// How a transaction ended, as far as its client knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The client heard that it committed.
    Acknowledged,
    /// It failed before its commit was asked for, or the client heard that it was rolled back.
    RolledBack,
    /// Its commit was asked for and no answer came: either.
    Unknown,
}

/// When something ended, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Until then the transaction was surely open: when its end was asked for, if that was answered, or else when the
    /// last answer within it came.
    pub open_us: Us,
    /// From then on it was surely over, if it is known to have committed; and if it was rolled back, or will be as soon
    /// as its server notices that its session has gone.
    pub over_us: Us,
    pub outcome: Outcome,
}

/// Not ended yet.
const OPEN: End = End { open_us: 0, over_us: Us::MAX, outcome: Outcome::Unknown };

/// One message that somebody tried to send.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    pub key: Key,
    pub queue: u8,
    /// The same for all that are committed together, or not at all: the key of the first.
    pub transaction: Key,
    /// It may not be delivered before this: when its transaction began, and the delay that was asked for.
    pub due_us: Us,
    pub end: End,
}

/// One message that a read returned.
#[derive(Clone, Copy, Debug)]
pub struct Delivered {
    pub key: Key,
    pub queue: u8,
    /// By the transaction that sent it.
    pub is_own: bool,
    pub lease_id: i64,
    pub count: i32,
    pub lease_us: Us,
    pub began_us: Us,
    pub returned_us: Us,
    /// Of the transaction that read it.
    pub end: End,
}

/// What a client does about a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Deleted: the message is done with.
    Finish,
    /// Done with, and to be found in the archive.
    Archive,
    /// Again, after a delay.
    Retry { delay_us: Us },
    /// Given back, perhaps after a delay.
    Release { delay_us: Us },
    /// The lease ends so long from now.
    Extend { lease_us: Us },
}

impl Verb {
    /// Whether the message is done with.
    pub fn is_finish(self) -> bool {
        matches!(self, Self::Finish | Self::Archive)
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    /// The lease is lost.
    Refused,
    /// The answer never came.
    Unknown,
}

/// One call that names one lease.
#[derive(Clone, Copy, Debug)]
pub struct Act {
    pub key: Key,
    pub lease_id: i64,
    pub verb: Verb,
    pub answer: Answer,
    pub began_us: Us,
    pub returned_us: Us,
    pub end: End,
}

/// A unique index kept a key from being written twice into the ledger.
#[derive(Clone, Copy, Debug)]
pub struct EffectRefused {
    pub key: Key,
    /// Under which lease; None: one that the call itself had taken, for [`super::checker::Rules::lease_us`].
    pub lease_id: Option<i64>,
    pub began_us: Us,
    /// When the client heard of it.
    pub at_us: Us,
}

/// A read that gave less than it was asked for: there was no more that it could have given. (Where the dispatcher does not
/// hold all that there may be: one that gave nothing.)
#[derive(Clone, Copy, Debug)]
pub struct Short {
    pub queue: u8,
    pub began_us: Us,
    pub returned_us: Us,
}

/// Meanwhile a call may have had messages of a queue that nobody was told of: it failed, or it does not say. Or there was no
/// room for them in the dispatcher.
#[derive(Clone, Copy, Debug)]
pub struct Unseen {
    pub queue: u8,
    pub from_us: Us,
    pub to_us: Us,
}

/// What befell the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// Its memory was lost; what was committed was not.
    Crash,
    /// Another server took over. What was acknowledged by then it has; what came after that may be lost. None: it has all.
    Failover { kept_until_us: Option<Us> },
    /// The database had no worker, or nobody could look whether it had: perhaps no leases were written meanwhile.
    WorkerAway,
}

#[derive(Clone, Copy, Debug)]
pub struct BlowAt {
    pub blow: Blow,
    /// Before it was struck.
    pub from_us: Us,
    /// It was over.
    pub to_us: Us,
}

/// Everything that is known of a round.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub sent: Vec<Sent>,
    pub delivered: Vec<Delivered>,
    pub acts: Vec<Act>,
    pub blows: Vec<BlowAt>,
    pub refused: Vec<EffectRefused>,
    pub short: Vec<Short>,
    pub unseen: Vec<Unseen>,
}

impl History {
    pub fn append(&mut self, mut other: Self) {
        self.sent.append(&mut other.sent);
        self.delivered.append(&mut other.delivered);
        self.acts.append(&mut other.acts);
        self.blows.append(&mut other.blows);
        self.refused.append(&mut other.refused);
        self.short.append(&mut other.short);
        self.unseen.append(&mut other.unseen);
    }
}

/// A place in a [`Log`]: how much it held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    sent: usize,
    delivered: usize,
    acts: usize,
}

/// One client's part of the history. What is not settled yet belongs to the transaction that is open.
#[derive(Debug)]
pub struct Log {
    client: u32,
    next: u64,
    open_from: Mark,
    history: History,
}

/// So many messages one client may send: their number is the lower part of the key.
const SENT_BITS: u32 = 36;

impl Log {
    /// `client` is nobody else's number.
    pub fn new(client: u32) -> Self {
        Self { client, next: 0, open_from: Mark::default(), history: History::default() }
    }

    pub fn into_history(self) -> History {
        self.history
    }

    pub fn mark(&self) -> Mark {
        Mark {
            sent: self.history.sent.len(),
            delivered: self.history.delivered.len(),
            acts: self.history.acts.len(),
        }
    }

    /// About to send so many messages, none of which may be delivered before `due_us`. Returns their keys.
    pub fn sending(&mut self, queue: u8, messages: usize, due_us: Us) -> Vec<Key> {
        let first = (u64::from(self.client) << SENT_BITS) | self.next;
        self.next += messages as u64;
        let keys: Vec<Key> = (first..).take(messages).collect();
        let transaction = self.history.sent.get(self.open_from.sent).map_or(first, |sent| sent.transaction);
        self.history.sent.extend(keys.iter().map(|key| Sent {
            key: *key,
            queue,
            transaction,
            due_us,
            end: OPEN,
        }));
        keys
    }

    /// What was announced since `from` is committed one by one.
    pub fn each_alone(&mut self, from: Mark) {
        self.history.sent[from.sent..].iter_mut().for_each(|sent| sent.transaction = sent.key);
    }

    /// A read returned this; its end is still open.
    pub fn delivered(&mut self, delivered: Delivered) {
        self.history.delivered.push(Delivered { end: OPEN, ..delivered });
    }

    /// About to act on a lease. Say what came of it with [`Log::answered`].
    pub fn acting(&mut self, key: Key, lease_id: i64, verb: Verb, began_us: Us) {
        let (answer, returned_us) = (Answer::Unknown, Us::MAX);
        self.history.acts.push(Act { key, lease_id, verb, answer, began_us, returned_us, end: OPEN });
    }

    /// The answer to all that was begun since `from`.
    pub fn answered(&mut self, from: Mark, returned_us: Us, answer: impl Fn(&Act) -> Answer) {
        for act in &mut self.history.acts[from.acts..] {
            act.answer = answer(act);
            act.returned_us = returned_us;
        }
    }

    pub fn short(&mut self, short: Short) {
        self.history.short.push(short);
    }

    pub fn unseen(&mut self, unseen: Unseen) {
        self.history.unseen.push(unseen);
    }

    pub fn effect_refused(&mut self, refused: EffectRefused) {
        self.history.refused.push(refused);
    }

    /// The savepoint at `from` was rolled back to: what came after it did not happen.
    pub fn rolled_back_to(&mut self, from: Mark, open_us: Us, over_us: Us) {
        self.settle(from, End { open_us, over_us, outcome: Outcome::RolledBack });
    }

    /// The transaction has ended. Returns how many sends, deliveries and acts it settled.
    pub fn ended(&mut self, end: End) -> (usize, usize, usize) {
        let settled = self.settle(self.open_from, end);
        self.open_from = self.mark();
        settled
    }

    /// What a savepoint took with it stays as it is.
    fn settle(&mut self, from: Mark, end: End) -> (usize, usize, usize) {
        fn each<'a>(ends: impl Iterator<Item = &'a mut End>, end: End) -> usize {
            ends.filter(|old| **old == OPEN).map(|old| *old = end).count()
        }
        let history = &mut self.history;
        (
            each(history.sent[from.sent..].iter_mut().map(|sent| &mut sent.end), end),
            each(history.delivered[from.delivered..].iter_mut().map(|one| &mut one.end), end),
            each(history.acts[from.acts..].iter_mut().map(|act| &mut act.end), end),
        )
    }
}
