//! Replays the corpus of the fuzz target `schedule_rule` (src/dispatch/fuzz), so that it never rots; the dispatcher's
//! is replayed by its model's test. Needs no server.

mod rule;
#[allow(dead_code)] // intervals are read by Postgres
#[path = "../../../src/queue/schedule_rule.rs"]
mod schedule_rule;

#[test]
fn corpus_of_schedules_holds() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../src/dispatch/fuzz/corpus/schedule_rule");
    let mut count = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display()); // the one that fails is the last
        rule::run(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count >= 250, "{count} files in the corpus");
}
