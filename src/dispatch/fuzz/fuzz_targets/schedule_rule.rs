//! The parser of schedules and the next time of each.
#![no_main]

#[allow(dead_code)] // intervals are read by Postgres
#[path = "../../../queue/schedule_rule.rs"]
mod schedule_rule;
#[path = "../../../../pgrx-tests/tests/corpus/rule.rs"]
mod rule;

libfuzzer_sys::fuzz_target!(|data: &[u8]| rule::run(data));
