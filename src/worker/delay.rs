//! Trying again later, and later each time. Owns no state: each duty keeps its delays.

use crate::pg::clock;
use std::ops::RangeInclusive;

/// How long what failed waits at first and at most, microseconds.
pub const FAILED_US: RangeInclusive<i64> = 1_000_000..=60_000_000;

/// Of something that could not be done.
#[derive(Clone, Copy, Default)]
pub struct Delay {
    /// Nothing is tried before this, on the clock that never jumps.
    pub until_us: i64,
    /// How long that was altogether.
    pub pause_us: i64,
}

impl Delay {
    /// The next one, from now on: twice as long, within `range`.
    pub fn longer(self, range: &RangeInclusive<i64>) -> Delay {
        let pause_us = self.pause_us.saturating_mul(2).clamp(*range.start(), *range.end());
        Delay { until_us: clock::now().mono_us.saturating_add(pause_us), pause_us }
    }
}
