//! The goals, and how a report fares against them: ratios (medians over the rounds of one run), and bounds.

use serde_json::{json, Value};

use super::report::{shown, Report};
use super::{backlog, snapshot, throughput};

/// One goal and what was measured.
#[derive(Debug)]
pub struct Goal {
    pub workload: &'static str,
    /// In whose line of the table it is told.
    pub variant: String,
    /// What the value is, e.g. `x bare`.
    pub of: &'static str,
    pub limit: f64,
    pub is_at_least: bool,
    /// None where the run did not measure it.
    pub value: Option<f64>,
}

impl Goal {
    pub fn passed(&self) -> Option<bool> {
        self.value.map(|value| if self.is_at_least { value >= self.limit } else { value <= self.limit })
    }

    /// `pass: 0.97 x bare (>= 0.90)`.
    pub fn verdict(&self) -> String {
        let sign = if self.is_at_least { ">=" } else { "<=" };
        let word = match self.passed() {
            Some(true) => "pass",
            Some(false) => "MISSED",
            None => "not measured",
        };
        let value = self.value.map_or_else(|| "-".to_owned(), shown);
        format!("{word}: {value} {} ({sign} {})", self.of, shown(self.limit))
    }

    pub fn to_json(&self) -> Value {
        json!({
            "workload": self.workload, "variant": self.variant, "of": self.of, "limit": self.limit,
            "is_at_least": self.is_at_least, "value": self.value, "passed": self.passed(),
        })
    }
}

/// Every goal, with what `report` has of it.
pub fn judge(report: &Report) -> Vec<Goal> {
    let eight = throughput::clients_variant(8);
    let ratio = |workload, of: (&str, &str), by: (&str, &str)| report.ratio(workload, of, by);
    let at_eight = |workload, system, by| ratio(workload, (&eight, system), (&eight, by));
    let mut goals = Vec::new();
    let mut goal = |workload, variant: &str, of, is_at_least, limit, value| {
        goals.push(Goal { workload, variant: variant.to_owned(), of, limit, is_at_least, value });
    };
    let (at_least, at_most) = (true, false);
    let one = "read_delete";
    goal("send", &eight, "x bare INSERT", at_least, 0.9, at_eight("send", "pg_queue", "bare"));
    goal("send_batch", &eight, "x pgmq", at_least, 1.8, at_eight("send_batch", "pg_queue", "pgmq"));
    goal(one, &eight, "x pgmq", at_least, 5.0, at_eight(one, "pg_queue", "pgmq"));
    goal(one, &eight, "x SKIP LOCKED", at_least, 2.0, at_eight(one, "pg_queue", "SKIP LOCKED"));
    goal(one, &eight, "x bare", at_least, 0.85, at_eight(one, "pg_queue", "bare"));
    let combined = at_eight(one, throughput::ONE_STATEMENT, "pg_queue");
    goal(one, &eight, "one statement x two", at_least, 1.25, combined);
    let batch = "read_delete_batch";
    goal(batch, &eight, "x pgmq", at_least, 8.0, at_eight(batch, "pg_queue", "pgmq"));

    // Only a slice that began when the snapshot was a minute old says anything of a minute.
    let late = snapshot::slice_after_a_minute(report);
    let late_variant = late.clone().unwrap_or_else(|| "last slice".to_owned());
    let first = report.variants("snapshot").first().map(|variant| (*variant).to_owned());
    let of_late = |by: (&str, &str)| ratio("snapshot", (late.as_deref()?, "pg_queue"), by);
    let own = first.and_then(|first| of_late((&first, "pg_queue")));
    goal("snapshot", &late_variant, "x its own first slice", at_least, 0.9, own);
    let pgmq = late.as_deref().and_then(|late| of_late((late, "pgmq")));
    goal("snapshot", &late_variant, "x pgmq", at_least, 30.0, pgmq);

    let deep = ratio("backlog", (backlog::DEEP, "pg_queue"), (backlog::SHALLOW, "pg_queue"));
    goal("backlog", backlog::DEEP, "x its rate at 10 k", at_least, 0.9, deep);
    for variant in ["p50", "p99"] {
        let wake_up = ratio("wake_up", (variant, "pg_queue"), (variant, "LISTEN/NOTIFY"));
        goal("wake_up", variant, "x LISTEN/NOTIFY", at_most, 1.2, wake_up);
    }
    let bytes = |variant| ratio("wal", (variant, "pg_queue"), (variant, "bare"));
    goal("wal", "send", "x bare INSERT", at_most, 1.02, bytes("send"));
    goal("wal", "read + delete", "x bare DELETE", at_most, 1.02, bytes("read + delete"));
    let idle = report.median("idle", "CPU, % of one core", "pg_queue");
    goal("idle", "CPU, % of one core", "% (measurable: 0.1)", at_most, 0.1, idle);
    let statements = report.median("idle", "statements ended", "pg_queue");
    goal("idle", "statements ended", "statements", at_most, 0.0, statements);
    let memory = report.median("memory", "worst", "pg_queue");
    goal("memory", "worst", "bytes", at_most, 96.0, memory);
    goals
}
