//! The verbs, and what each does when its transaction commits or does not.
//!
//! A message's way: [`send`] writes the row; at commit [`journal`] publishes it to the dispatcher; [`take`]
//! leases it and fetches its row, after [`load`] has brought in what has no slot; [`finish`] pins it and deletes
//! the row, or [`retry`] rewrites it; at commit [`journal`] settles the pin. [`overlay`] is what a
//! transaction sees of its own sends, [`wait`] how one sleeps until there is something, [`lease`] what brings leases
//! to the tables and back. [`resolve`] knows which table a queue's name means, [`create`] makes queues, [`admin`]
//! changes and drops them, [`follow`] has them follow what plain DDL does to their tables, [`grant`] says who may.
//! [`dead_letter`] moves what failed for good, [`redrive`] brings it back, [`peek`], [`list`] and [`health`] look,
//! [`schedule`] sends at times that [`schedule_rule`] tells.

pub mod admin;
pub mod args;
pub mod capture;
pub mod create;
pub mod dead_letter;
mod entries;
pub mod finish;
pub mod follow;
pub mod grant;
pub mod health;
pub mod journal;
pub mod lease;
pub mod list;
pub mod load;
pub mod overlay;
pub mod peek;
pub mod redrive;
pub mod resolve;
pub mod retry;
pub mod schedule;
pub mod schedule_rule;
pub mod send;
mod stored;
pub mod take;
pub mod wait;

/// A queue table's columns, by number: their names are the table's definition in `create`.
pub mod column {
    /// bigint, the primary key.
    pub const MSG_ID: usize = 1;
    /// timestamptz.
    pub const ENQUEUED_AT: usize = 2;
    /// timestamptz, null = at once.
    pub const VISIBLE_AT: usize = 3;
    /// integer: deliveries known when the row was written.
    pub const DELIVERY_COUNT: usize = 4;
    /// smallint.
    pub const PRIORITY: usize = 5;
    /// text.
    pub const GROUP_KEY: usize = 6;
    /// jsonb.
    pub const HEADERS: usize = 7;
    /// jsonb.
    pub const MESSAGE: usize = 8;
    /// text.
    pub const LAST_ERROR: usize = 9;
    /// timestamptz, null = never.
    pub const EXPIRES_AT: usize = 10;
}

use crate::pg::table::Record;
use queue_dispatch::Row;

/// When a message expires, wall clock.
pub fn expires_us(record: &Record) -> Option<i64> {
    record.value(column::EXPIRES_AT).time_us()
}

/// What the dispatcher must know of a row.
pub fn row_of(record: &Record) -> Row {
    Row {
        msg_id: record.value(column::MSG_ID).i64().unwrap_or(0),
        tid: record.tid(),
        visible_at_us: record.value(column::VISIBLE_AT).time_us(),
        count: record.value(column::DELIVERY_COUNT).get::<i32>().unwrap_or(0).max(0) as u32,
    }
}
