//! Wait points: named places where a race test can hold a backend still. In builds with the feature
//! `wait_points` only. A backend that comes to an armed point counts itself in, then looks every millisecond
//! whether the point was released; it holds no lock of ours, and serves no interrupt (some of the places are in
//! callbacks that must not raise).
//!
//! And the clock: tests move it instead of sleeping. What they add lies beside the points; a crash of the server
//! takes it back to nothing.

use crate::error::Result;
use crate::pg::call::{Args, Value};
use crate::settings::DAY_US;
use crate::Error;
use pgrx::{pg_guard, pg_sys};
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicPtr, AtomicU32, Ordering};

/// Every point there is; tests name them.
const NAMES: [&str; 16] = [
    "publish",
    "take-fetch",
    "load-snapshot",
    "load-row",
    "finish-verify",
    "finish-deleted",
    "wait-sleep",
    "return",
    "scan-snapshot",
    "move-pinned",
    "move-found",
    "redrive-pinned",
    "attach",
    "restore",
    "lease-write",
    "worker-begin",
];

#[repr(C)]
struct Point {
    /// -1: not armed; 0: stops everybody; else only the backend with this process id.
    armed: AtomicI32,
    standing: AtomicU32,
}

#[repr(C)]
struct Block {
    points: [Point; NAMES.len()],
    /// What tests have added to the clocks, microseconds.
    mono_shift_us: AtomicI64,
    wall_shift_us: AtomicI64,
}

static BLOCK: AtomicPtr<Block> = AtomicPtr::new(std::ptr::null_mut());
static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;

/// In `_PG_init`.
pub fn install() {
    // SAFETY: as in `shmem::install`.
    unsafe {
        PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(on_request);
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(on_startup);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_request() {
    // SAFETY: as in `shmem`.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            previous();
        }
        pg_sys::RequestAddinShmemSpace(std::mem::size_of::<Block>());
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_startup() {
    // SAFETY: as in `shmem`; the postmaster alone sees the block as yet.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            previous();
        }
        let mut found = false;
        let size = std::mem::size_of::<Block>();
        let block: *mut Block =
            pg_sys::ShmemInitStruct(c"pg_queue wait points".as_ptr(), size, &mut found).cast();
        if !found {
            block.write(Block {
                points: [const { Point { armed: AtomicI32::new(-1), standing: AtomicU32::new(0) } };
                    NAMES.len()],
                mono_shift_us: AtomicI64::new(0),
                wall_shift_us: AtomicI64::new(0),
            });
        }
        BLOCK.store(block, Ordering::Release);
    }
}

fn block() -> Option<&'static Block> {
    // SAFETY: the block was written at startup, is reached through shared references only, and lives as long as
    // the server.
    unsafe { BLOCK.load(Ordering::Acquire).as_ref() }
}

fn point(name: &str) -> Option<&'static Point> {
    let index = NAMES.iter().position(|known| *known == name)?;
    block().map(|block| &block.points[index])
}

/// What tests have added to the clocks: the one that never jumps, and the wall's.
pub fn clock_shift_us() -> (i64, i64) {
    block().map_or((0, 0), |b| (b.mono_shift_us.load(Ordering::SeqCst), b.wall_shift_us.load(Ordering::SeqCst)))
}

/// Lets time pass: adds an interval to each clock and wakes everybody who sleeps.
fn clock_shift(args: &Args) -> Result<Value> {
    let us = |position: usize| {
        args.value(position).interval().map_or(0, |(_, days, us)| i64::from(days) * DAY_US + us)
    };
    if let Some(block) = block() {
        block.mono_shift_us.fetch_add(us(0), Ordering::SeqCst);
        block.wall_shift_us.fetch_add(us(1), Ordering::SeqCst);
    }
    (0..super::latch::backends_max() as u32).for_each(super::latch::set);
    Ok(Value::of(true))
}

/// Stands still here while the point is armed for this backend.
pub fn pass(name: &str) {
    let Some(point) = point(name) else { return };
    let pid = super::latch::my_pid() as i32;
    let is_armed =
        || matches!(point.armed.load(Ordering::SeqCst), 0) || point.armed.load(Ordering::SeqCst) == pid;
    if !is_armed() {
        return;
    }
    point.standing.fetch_add(1, Ordering::SeqCst);
    while is_armed() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    point.standing.fetch_sub(1, Ordering::SeqCst);
}

fn named(args: &Args) -> Result<&'static Point> {
    let name = args.value(0).text().unwrap_or_default();
    point(&name).ok_or(Error::Unknown { kind: "wait point", name, hint: Some(NAMES.join(", ")) })
}

fn arm(args: &Args) -> Result<Value> {
    named(args)?.armed.store(args.value(1).get::<i32>().unwrap_or(0), Ordering::SeqCst);
    Ok(Value::of(true))
}

fn release(args: &Args) -> Result<Value> {
    named(args)?.armed.store(-1, Ordering::SeqCst);
    Ok(Value::of(true))
}

fn reached(args: &Args) -> Result<Value> {
    Ok(Value::of(i64::from(named(args)?.standing.load(Ordering::SeqCst))))
}

crate::sql_functions! {
    wait_point_arm => value looks arm;
    wait_point_release => value looks release;
    wait_point_reached => value looks reached;
    clock_shift => value looks clock_shift;
}
