//! The dispatcher against a naive model of everything around it: tables with committed rows, snapshots, sessions
//! with open transactions, callbacks that run late, loads that are interleaved with all of it, a worker that writes
//! leases and moves what expires, memory that is lost. Random sequences over tiny arenas, so that overflow, eviction
//! and hunger happen all the time; after each step every committed message must be within reach, and at the end
//! every one must be delivered and finished.

#[path = "../common/mod.rs"]
mod common;

mod bytes;
mod check;
mod leases;
mod loads;
mod sessions;
mod steps;
mod whole;
mod world;

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use world::World;

/// As many as take a few seconds, or what the environment asks for.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2000)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(),
        max_shrink_iters: 4000,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/model/regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_sequence_of_calls_keeps_every_message_in_reach(
        slots in 12usize..40,
        slots_min in 1u32..4,
        window in 4u32..16,
        seed in any::<u64>(),
        steps in prop::collection::vec((0u8..100, any::<u8>(), any::<u8>(), any::<u8>()), 1..250),
    ) {
        let mut world = World::new(slots, slots_min, window, seed);
        for step in steps {
            world.step(step);
            world.check();
        }
        world.drain();
    }
}

/// What the fuzz target `dispatcher` (fuzz/) has found worth keeping: replayed, so that it never rots.
#[test]
fn corpus_of_steps_holds() {
    let mut count = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/dispatcher")).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display()); // the one that fails is the last
        bytes::run(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count >= 500, "{count} files in the corpus");
}
