//! Shared memory of each message that may be tracked: what the server allocates for one more of them.

use anyhow::{Context, Result};
use queue_tests::StopMode;

use super::report::Title;
use super::systems::PG_QUEUE;
use super::{Bench, DATABASE};

const WORKLOAD: &str = "memory";
/// The smallest pg_queue.max_messages: what it takes, the fixed part included, is not counted.
const BASE: u64 = 4_096;
/// The default, and what lies on and just beyond a power of two, where a table that doubles costs most.
const SIZES: [u64; 4] = [262_144, 262_145, 1_048_576, 1_048_577];

pub fn run(bench: &mut Bench) -> Result<()> {
    let title = "Shared memory for each message that may be tracked";
    bench.begin(Title { workload: WORKLOAD, title, unit: "bytes" });
    let base = allocated(bench, BASE)?;
    let mut worst: f64 = 0.0;
    for size in SIZES {
        let bytes = (allocated(bench, size)? - base) as f64 / (size - BASE) as f64;
        worst = worst.max(bytes);
        let variant = format!("max_messages {size}");
        bench.progress(1, &variant, PG_QUEUE.name, bytes);
        bench.report.add(WORKLOAD, &variant, PG_QUEUE.name, bytes);
    }
    bench.report.add(WORKLOAD, "worst", PG_QUEUE.name, worst);
    bench.report.note(WORKLOAD, format!("(size at N - size at {BASE}) / (N - {BASE}) of pg_shmem_allocations"));
    Ok(())
}

/// Bytes that the server allocates for pg_queue with this max_messages.
fn allocated(bench: &mut Bench, max_messages: u64) -> Result<i64> {
    bench.client.batch_execute(&format!("ALTER SYSTEM SET pg_queue.max_messages = {max_messages}"))?;
    bench.cluster.restart(StopMode::Fast)?;
    bench.client = bench.cluster.connect(DATABASE)?;
    let sql = "SELECT sum(allocated_size)::bigint FROM pg_shmem_allocations WHERE name ILIKE '%pg_queue%'";
    let row = bench.client.query_one(sql, &[])?;
    row.try_get::<_, Option<i64>>(0)?.context("pg_shmem_allocations has nothing of pg_queue")
}
