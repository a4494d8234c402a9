//! The dispatcher beside its model (`tests/model`), steps from bytes: every invariant is checked after each.
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/model/bytes.rs"]
mod bytes;
#[path = "../../tests/model/check.rs"]
mod check;
#[path = "../../tests/model/leases.rs"]
mod leases;
#[path = "../../tests/model/loads.rs"]
mod loads;
#[path = "../../tests/model/sessions.rs"]
mod sessions;
#[path = "../../tests/model/steps.rs"]
mod steps;
#[path = "../../tests/model/whole.rs"]
mod whole;
#[path = "../../tests/model/world.rs"]
mod world;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bytes::run(data));
