//! The two clocks. Reads them; converts nothing.

use pgrx::pg_sys;
use queue_dispatch::Now;

#[cfg(target_os = "linux")]
const MONOTONIC: libc::clockid_t = libc::CLOCK_BOOTTIME;
// Elsewhere the monotonic clock is the one that goes on while the machine sleeps, or the nearest to it.
#[cfg(not(target_os = "linux"))]
const MONOTONIC: libc::clockid_t = libc::CLOCK_MONOTONIC;

/// The first time that is later than any of Postgres' (END_TIMESTAMP in datatype/timestamp.h), microseconds since 2000.
pub const END_US: i64 = 9_223_371_331_200_000_000;

/// Both clocks, now.
pub fn now() -> Now {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec, and the clock exists on every system this compiles for.
    unsafe { libc::clock_gettime(MONOTONIC, &mut time) };
    // SAFETY: reads the wall clock only.
    let wall_us = unsafe { pg_sys::GetCurrentTimestamp() };
    // The fields' widths differ between platforms.
    #[allow(clippy::unnecessary_cast)]
    let mono_us = time.tv_sec as i64 * 1_000_000 + time.tv_nsec as i64 / 1_000;
    let (mono_shift_us, wall_shift_us) = shift_us();
    Now { mono_us: mono_us + mono_shift_us, wall_us: wall_us + wall_shift_us }
}

/// What a test has added to the two clocks.
#[cfg(feature = "wait_points")]
pub(super) use super::wait_point::clock_shift_us as shift_us;

/// Nothing.
#[cfg(not(feature = "wait_points"))]
pub(super) fn shift_us() -> (i64, i64) {
    (0, 0)
}
