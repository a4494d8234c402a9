//! The only room with `unsafe`: Postgres, told in terms that the rest of the extension can use without it.
//! Knows nothing of queues, but for the shape of the memory that the dispatcher lives in (`shmem`).
//!
//! Two rules hold throughout. A call into Postgres may raise an ERROR, which unwinds the Rust stack as a panic,
//! or a FATAL, which does not unwind at all: so nothing here relies on `Drop`, and what must be undone is undone
//! by the transaction's abort callback. And no call into Postgres is made while the dispatcher's lock is held.

#[cfg(feature = "wait_points")]
pub mod broken_rule;
pub mod call;
pub mod clock;
pub mod hooks;
pub mod insert;
pub mod latch;
pub mod shmem;
pub mod spi;
pub mod table;
pub mod user;
#[cfg(feature = "wait_points")]
pub mod wait_point;
pub mod worker;
pub mod xact;

/// Marks a place where a race test can hold this backend still; nothing at all in other builds.
#[macro_export]
macro_rules! wait_point {
    ($name:literal) => {
        #[cfg(feature = "wait_points")]
        $crate::pg::wait_point::pass($name);
    };
}

/// What is done instead while a rule is broken on purpose (`pg_queue.break_rule`); nothing at all in other builds.
#[macro_export]
macro_rules! if_broken {
    ($rule:ident, $instead:block) => {
        #[cfg(feature = "wait_points")]
        if $crate::pg::broken_rule::is($crate::pg::broken_rule::Rule::$rule) $instead
    };
}
