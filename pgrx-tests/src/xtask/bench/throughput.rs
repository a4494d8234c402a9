//! Rates of closed loops: send, read + delete, one by one and in batches.
//!
//! Owns how one rate is taken: a table made anew, filled with what the run will need, vacuumed, a checkpoint, the
//! run, and then the rows are counted. A rate whose rows do not add up is an error. Systems take turns within each
//! round, so that what the machine does meanwhile hits all of them.

use anyhow::{bail, Context, Result};

use super::pgbench::{Length, Load};
use super::report::Title;
use super::systems::{System, Work, BARE, BATCH, PAYLOAD, SYSTEMS};
use super::Bench;

/// What the same work in one statement is called beside the two statements.
pub const ONE_STATEMENT: &str = "one statement";
const QUEUE: &str = "bench";
/// Rows that a first, unmeasured run is given for each second and core.
const WARM_UP_ROWS: u64 = 30_000;
const WARM_UP_BATCH_ROWS: u64 = 300_000;
/// The same, at most.
const WARM_UP_ROWS_MAX: u64 = 5_000_000;
/// How much more than it needed at its fastest a run is given.
const MARGIN: f64 = 2.0;
const ROWS_MIN: u64 = 20_000;
/// How often a run that emptied its queue is given twice as much.
const REFILLS_MAX: u32 = 3;

pub fn clients_variant(clients: u32) -> String {
    if clients == 1 {
        "1 client".to_owned()
    } else {
        format!("{clients} clients")
    }
}

/// One bar of the picture: a system at a work with so many clients.
struct Case {
    system: &'static System,
    /// What it is called.
    name: &'static str,
    work: Work,
    clients: u32,
}

pub fn send(bench: &mut Bench) -> Result<()> {
    bench.begin(Title { workload: "send", title: "Send one message a transaction", unit: "messages/s" });
    rounds(bench, "send", &cases(&[Work::Send], clients(bench)))
}

pub fn send_batch(bench: &mut Bench) -> Result<()> {
    bench.begin(Title { workload: "send_batch", title: "Send batches of 100", unit: "messages/s" });
    let cases = cases(&[Work::SendBatch], &[8]);
    rounds(bench, "send_batch", &cases)
}

pub fn read_delete(bench: &mut Bench) -> Result<()> {
    let title = "Read one message and delete it, two statements, each its own transaction";
    bench.begin(Title { workload: "read_delete", title, unit: "messages/s" });
    bench.report.note("read_delete", "bare: SELECT and DELETE by ctid, each client in rows of its own");
    bench
        .report
        .note("read_delete", "one statement: queue_delete_and_read deletes the last and reads the next");
    let cases = cases(&[Work::ReadDelete, Work::DeleteAndRead], clients(bench));
    rounds(bench, "read_delete", &cases)
}

pub fn read_delete_batch(bench: &mut Bench) -> Result<()> {
    let title = "Read 100 messages and delete them, two statements";
    bench.begin(Title { workload: "read_delete_batch", title, unit: "messages/s" });
    bench.report.note("read_delete_batch", "bare: SELECT and DELETE by ctid, as above, 100 rows at a time");
    let cases = cases(&[Work::ReadDeleteBatch], &[8]);
    rounds(bench, "read_delete_batch", &cases)
}

/// Numbers of clients at which the loops with one message are run.
fn clients(bench: &Bench) -> &'static [u32] {
    bench.options.scaled(&[1, 8, 32], &[8])
}

/// Every system that has a script for one of `works`, in the order in which they take turns.
fn cases(works: &[Work], clients: &[u32]) -> Vec<Case> {
    let mut cases = Vec::new();
    for clients in clients {
        for system in SYSTEMS {
            for work in works.iter().filter(|work| system.script(**work, QUEUE).is_some()) {
                let name = if *work == Work::DeleteAndRead { ONE_STATEMENT } else { system.name };
                cases.push(Case { system, name, work: *work, clients: *clients });
            }
        }
    }
    // The columns of the table: pg_queue's other way of doing it comes last.
    cases.sort_by_key(|case| (case.clients, case.name == ONE_STATEMENT));
    cases
}

fn rounds(bench: &mut Bench, workload: &'static str, cases: &[Case]) -> Result<()> {
    for round in 1..=bench.options.rounds() {
        for same_clients in cases.chunk_by(|a, b| a.clients == b.clients) {
            // Another one begins each round, so that nobody always comes after the same.
            let first = round as usize % same_clients.len();
            for case in same_clients[first..].iter().chain(&same_clients[..first]) {
                let rate = rate(bench, case)?;
                let variant = clients_variant(case.clients);
                bench.progress(round, &variant, case.name, rate);
                bench.report.add(workload, &variant, case.name, rate);
            }
        }
    }
    Ok(())
}

/// Messages a second of one turn.
fn rate(bench: &mut Bench, case: &Case) -> Result<f64> {
    let seconds = bench.options.seconds();
    warm_up(bench, case.system, case.work)?;
    take_turn(bench, case.system, case.work, case.clients, seconds)
}

/// Runs a work once, unmeasured, before its first measured round; returns its messages a second.
pub fn warm_up(bench: &mut Bench, system: &'static System, work: Work) -> Result<f64> {
    if let Some(rate) = bench.rates.get(&(system.name, work)) {
        return Ok(*rate);
    }
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let each = if work.messages() > 1 { WARM_UP_BATCH_ROWS } else { WARM_UP_ROWS };
    let rows = (each * cores).min(WARM_UP_ROWS_MAX);
    bench.rates.insert((system.name, work), (rows as f64) / MARGIN);
    // As many clients as ever: what they need, fewer need too.
    let rate = take_turn(bench, system, work, 32, bench.options.scaled(2, 1))?;
    bench.rates.insert((system.name, work), rate);
    Ok(rate)
}

fn take_turn(
    bench: &mut Bench,
    system: &'static System,
    work: Work,
    clients: u32,
    seconds: u32,
) -> Result<f64> {
    let known = bench.rates.get(&(system.name, work)).copied().unwrap_or(0.0);
    let mut rows = match work.finishes() {
        0 => 0,
        _ => ((known * MARGIN * f64::from(seconds)) as u64).max(ROWS_MIN),
    };
    for _ in 0..REFILLS_MAX {
        bench.renew(system, QUEUE, rows)?;
        let turn = Turn { system, queue: QUEUE, work, clients, seconds, walk: (0, rows / u64::from(clients)) };
        match turn.run(bench) {
            Ok(rate) => {
                let fastest = bench.rates.entry((system.name, work)).or_insert(rate);
                *fastest = fastest.max(rate);
                return Ok(rate);
            }
            // A reader that finds nothing gives up; that it found nothing because it was fast is no fault.
            Err(_) if rows > 0 && turn.left_little(bench)? => rows *= 2,
            Err(error) => return Err(error),
        }
    }
    bail!("{}: {rows} messages were read in less than {seconds} s", system.name)
}

/// One pgbench run over a queue that is there.
pub struct Turn<'a> {
    pub system: &'static System,
    pub queue: &'a str,
    pub work: Work,
    pub clients: u32,
    pub seconds: u32,
    /// For a walk by address: the first row, and how many each client has.
    pub walk: (u64, u64),
}

impl Turn<'_> {
    /// Messages a second. The rows must add up afterwards.
    pub fn run(&self, bench: &mut Bench) -> Result<f64> {
        let (system, work) = (self.system, self.work);
        let Some(script) = system.script(work, self.queue) else { bail!("{} has no {work:?}", system.name) };
        let variables = self.variables(bench)?;
        let before = bench.count(system, self.queue)?;
        let mut load = Load::new(&script, self.clients, Length::Seconds(self.seconds));
        load.variables = &variables;
        let outcome = bench.pgbench.run(&load)?;
        let after = bench.count(system, self.queue)?;
        let runs = outcome.transactions as i64;
        let wanted = before + runs * (work.sends() as i64 - work.finishes() as i64);
        let extra = match work {
            // Each client still holds what it read last.
            Work::DeleteAndRead => after - wanted - i64::from(self.clients),
            _ => after - wanted,
        };
        let messages = work.messages() as i64;
        // A batch may come short; then it is counted for what it was.
        let short = if work == Work::ReadDeleteBatch { extra } else { 0 };
        if extra != short || !(0..=runs * messages / 2).contains(&short) {
            bail!(
                "{}, {work:?}: {before} rows before, {after} after {runs} runs, where {wanted} were expected",
                system.name
            );
        }
        if short > 0 {
            let note = format!("{}: some batches were not full; deleted messages are counted", system.name);
            bench.report.note("read_delete_batch", note);
        }
        Ok(outcome.tps * (runs * messages - short) as f64 / runs as f64)
    }

    /// Values of the variables that the scripts know.
    pub fn variables(&self, bench: &Bench) -> Result<Vec<(&'static str, String)>> {
        let mut variables = vec![("payload", PAYLOAD.to_owned()), ("payloads", payloads())];
        if self.work == Work::DeleteAndRead {
            variables.extend([("msg_ids", "{}".to_owned()), ("lease_ids", "{}".to_owned())]);
        }
        if self.system.name == BARE.name && self.work.finishes() > 0 {
            let table = self.system.table(self.queue);
            let per_page =
                *bench.rows_per_page.get(&table).with_context(|| format!("{table} is not filled"))?;
            let (start, share) = self.walk;
            let walk = [("turn", 0), ("start", start), ("share", share), ("per_page", per_page)];
            variables.extend(walk.map(|(name, value)| (name, value.to_string())));
        }
        Ok(variables)
    }

    fn left_little(&self, bench: &mut Bench) -> Result<bool> {
        let few = u64::from(self.clients) * self.work.finishes();
        Ok(bench.count(self.system, self.queue)? <= few as i64 || self.system.name == BARE.name)
    }
}

/// A batch of the payload, as the text of an array.
fn payloads() -> String {
    let quoted = format!("\"{}\"", PAYLOAD.replace('\\', "\\\\").replace('"', "\\\""));
    format!("{{{}}}", vec![quoted.as_str(); BATCH as usize].join(","))
}
