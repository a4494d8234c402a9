//! What each operation of the dispatcher costs, and how that grows: with messages from 10^3 to 10^7, with queues
//! from 1 to 10^4, with waiters from 1 to 1000. Owns the sizes and the order; the operations are in the other
//! files.
//!
//! ```text
//! cargo bench -p queue-dispatch --bench growth                      all of it, about eight minutes
//! cargo bench -p queue-dispatch --bench growth -- --quick '/1000'   a first look: one size, few samples
//! cargo bench -p queue-dispatch --bench growth -- '^take'           one operation, all sizes
//! ```
//!
//! At the end it prints tables with the median of each. Only the operation is timed, in rounds of up to 4096 with
//! everything put back between them; the arena's memory is in no order (`world`). No lock is taken: the figure is
//! how long an operation would hold it.

#[path = "../../tests/common/mod.rs"]
mod common;
mod floor;
mod ledger;
mod messages;
mod queues;
mod waiters;
mod world;

use std::time::Duration;

use criterion::Criterion;
use ledger::{Ledger, SAMPLES};

const MESSAGES: [usize; 5] = [1_000, 10_000, 100_000, 1_000_000, 10_000_000];
const QUEUES: [usize; 5] = [1, 10, 100, 1_000, 10_000];
const WAITERS: [usize; 4] = [1, 10, 100, 1_000];

fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(250))
        .configure_from_args()
}

fn main() {
    // Run by `cargo test --benches`, once through, it only shows that it still works.
    let is_test = !std::env::args().any(|argument| argument == "--bench");
    let some = |sizes: &'static [usize]| if is_test { &sizes[..1] } else { sizes };
    let mut c = criterion();

    let mut floors = Ledger::default();
    some(&MESSAGES).iter().for_each(|n| floor::run(&mut c, &mut floors, *n));
    let mut by_messages = Ledger::default();
    some(&MESSAGES).iter().for_each(|n| messages::run(&mut c, &mut by_messages, *n));
    let mut by_queues = Ledger::default();
    some(&QUEUES).iter().for_each(|n| queues::run(&mut c, &mut by_queues, *n));
    let mut by_waiters = Ledger::default();
    some(&WAITERS).iter().for_each(|n| waiters::run(&mut c, &mut by_waiters, *n));

    floors.print("ns, by slots");
    by_messages.print("ns, by messages");
    by_queues.print("ns, by queues");
    by_waiters.print("ns, by waiters");
    c.final_summary();
}
