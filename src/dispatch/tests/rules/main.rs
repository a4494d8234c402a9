//! One test for each rule of PROTOCOL.md that lives in this crate. Backends are numbers, time is an argument.

#[path = "../common/mod.rs"]
mod common;

mod desk;
mod finish;
mod flush;
mod load;
mod news;
mod restore;
mod room;
mod sweep;
mod take;
mod wait;
