//! A queue's settings as far as the dispatcher needs them, and the backoff they define.

/// What the dispatcher knows of a queue's settings. Written when the queue is attached or altered.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Policy {
    /// Delay before the second delivery of a message that failed, microseconds.
    pub retry_delay_us: i64,
    /// The ceiling of that delay as it grows.
    pub retry_delay_max_us: i64,
    /// What the delay is multiplied with from one failure to the next; at least 1.
    pub retry_backoff: f64,
    /// The part of the delay by which it is spread, up or down; 0 to 1.
    pub retry_jitter: f64,
    /// Deliveries after which a message is exhausted; 0 = never.
    pub max_deliveries: u32,
    /// Reads return nothing.
    pub paused: bool,
}

impl Policy {
    /// SQL.md's defaults.
    pub const DEFAULT: Policy = Policy {
        retry_delay_us: 1_000_000,
        retry_delay_max_us: 3_600_000_000,
        retry_backoff: 2.0,
        retry_jitter: 0.2,
        max_deliveries: 20,
        paused: false,
    };

    /// Whether a message delivered `count` times has had its last delivery.
    pub fn is_exhausted(&self, count: u32) -> bool {
        self.max_deliveries > 0 && count >= self.max_deliveries
    }
}

/// Microseconds to wait after the `failures`th failure (from 1): `min(delay * backoff^(failures-1), max)`,
/// spread by plus or minus `jitter` (SQL.md, "Backoff"). `random` decides where in the spread.
pub fn backoff_us(policy: &Policy, failures: u32, random: u64) -> i64 {
    let max = policy.retry_delay_max_us as f64;
    let mut delay = (policy.retry_delay_us as f64).min(max);
    // 2^63 microseconds are reached in fewer steps than this by any factor that matters.
    const STEPS_MAX: u32 = 4096;
    for _ in 1..failures.min(STEPS_MAX) {
        if delay >= max || policy.retry_backoff <= 1.0 {
            break;
        }
        delay = (delay * policy.retry_backoff).min(max);
    }
    let unit = (mix(random) >> 11) as f64 / (1u64 << 53) as f64;
    (delay * (1.0 + policy.retry_jitter * (2.0 * unit - 1.0))) as i64
}

/// SplitMix64's finaliser: one well-spread number from another.
pub(crate) fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
