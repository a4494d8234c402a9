//! The parser of queue_send_entries' argument.
#![no_main]

#[allow(dead_code)] // what becomes of most fields is not the parser's matter
#[path = "../../../queue/entries.rs"]
mod entries;
#[path = "../../../../pgrx-tests/tests/corpus/entries_text.rs"]
mod entries_text;

libfuzzer_sys::fuzz_target!(|data: &[u8]| entries_text::run(data));
