//! Replays the corpora of the fuzz targets `schedule_rule` and `entries` (src/dispatch/fuzz), so that they never rot;
//! the dispatcher's is replayed by its model's test. Needs no server.

#[allow(dead_code)] // what becomes of most fields is not the parser's matter
#[path = "../../../src/queue/entries.rs"]
mod entries;
mod entries_text;
mod rule;
#[allow(dead_code)] // intervals are read by Postgres
#[path = "../../../src/queue/schedule_rule.rs"]
mod schedule_rule;

/// Runs what is in a corpus; returns how many files that were.
fn replay(corpus: &str, run: fn(&[u8])) -> usize {
    let corpus = format!("{}/../src/dispatch/fuzz/corpus/{corpus}", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(corpus).unwrap();
    files
        .map(|entry| {
            let path = entry.unwrap().path();
            println!("{}", path.display()); // the one that fails is the last
            run(&std::fs::read(path).unwrap());
        })
        .count()
}

#[test]
fn corpus_of_schedules_holds() {
    let count = replay("schedule_rule", rule::run);
    assert!(count >= 250, "{count} files in the corpus");
}

#[test]
fn corpus_of_entries_holds() {
    let count = replay("entries", entries_text::run);
    assert!(count >= 10, "{count} files in the corpus");
}
