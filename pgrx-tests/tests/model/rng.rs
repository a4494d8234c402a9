//! Numbers out of a seed, and the steps of a sequence made of them. Knows no queue.

/// SplitMix64.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n.max(1)
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    Send,
    SendBatch,
    SendEntries,
    Insert,
    Copy,
    Read,
    ReadAny,
    Wait,
    Pop,
    Delete,
    Archive,
    DeleteAndRead,
    Retry,
    Reject,
    Release,
    Extend,
    Cancel,
    Peek,
    Update,
    DeleteRow,
    Purge,
    Truncate,
    Redrive,
    Unarchive,
    Alter,
    Scratch,
    Begin,
    End,
    Prepare,
    Savepoint,
    RollbackTo,
    ReleaseSavepoint,
    Advance,
}

/// How often each comes, relative to the others.
pub const WEIGHTS: [(Verb, usize); 33] = [
    (Verb::Send, 10),
    (Verb::SendBatch, 3),
    (Verb::SendEntries, 3),
    (Verb::Insert, 3),
    (Verb::Copy, 2),
    (Verb::Read, 16),
    (Verb::ReadAny, 4),
    (Verb::Wait, 3),
    (Verb::Pop, 3),
    (Verb::Delete, 10),
    (Verb::Archive, 4),
    (Verb::DeleteAndRead, 4),
    (Verb::Retry, 7),
    (Verb::Reject, 4),
    (Verb::Release, 5),
    (Verb::Extend, 6),
    (Verb::Cancel, 3),
    (Verb::Peek, 5),
    (Verb::Update, 4),
    (Verb::DeleteRow, 2),
    (Verb::Purge, 1),
    (Verb::Truncate, 1),
    (Verb::Redrive, 4),
    (Verb::Unarchive, 3),
    (Verb::Alter, 3),
    (Verb::Scratch, 1),
    (Verb::Begin, 14),
    (Verb::End, 7),
    (Verb::Prepare, 6),
    (Verb::Savepoint, 8),
    (Verb::RollbackTo, 8),
    (Verb::ReleaseSavepoint, 2),
    (Verb::Advance, 8),
];

/// One step of a sequence. Which message it is about is decided when it is run, from `seed`: so a step still means
/// something after others were left out.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub verb: Verb,
    pub session: usize,
    pub seed: u64,
}

/// The steps of the sequence with this seed.
pub fn steps(seed: u64, sessions: usize) -> Vec<Step> {
    let mut rng = Rng::new(seed);
    let sum = WEIGHTS.iter().map(|(_, weight)| weight).sum();
    let len = 10 + rng.below(60);
    (0..len)
        .map(|_| {
            let mut at = rng.below(sum);
            let (verb, _) = WEIGHTS
                .into_iter()
                .find(|(_, weight)| {
                    let is_it = at < *weight;
                    at = at.wrapping_sub(*weight);
                    is_it
                })
                .expect("below the sum");
            Step { verb, session: rng.below(sessions), seed: rng.next() }
        })
        .collect()
}
