//! The demo's verdict: is every file accounted for exactly once, with the checksum that `sha256sum` gives it?
//!
//! Takes nothing on trust: the checksums are computed anew by another program, and what happened is read from the
//! tables. Never changes anything.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use postgres::Client;

use super::demo_files::path_of;

/// How many files one `sha256sum` gets: far below the limit for a command line, even with the longest paths.
const FILES_PER_CALL: usize = 200;
/// How many faults are spelled out.
const FAULTS_SHOWN: usize = 10;

/// One stored result.
pub struct Outcome {
    pub msg_id: i64,
    pub sha256: String,
    pub delivery_count: i64,
    pub consumer: String,
}

/// A message that ended in the dead-letter queue.
pub struct Dead {
    /// Its id while it was in the queue.
    pub msg_id: Option<i64>,
    pub path: PathBuf,
    pub error: Option<String>,
}

/// What the tables say at the end.
pub struct Books {
    pub outcomes: Vec<Outcome>,
    pub dead: Vec<Dead>,
    pub left: i64,
}

impl Books {
    pub fn read(client: &mut Client) -> Result<Self> {
        let outcomes = client
            .query("SELECT msg_id, sha256, delivery_count, consumer FROM results ORDER BY msg_id", &[])
            .context("cannot read the results")?
            .iter()
            .map(|row| {
                Ok(Outcome {
                    msg_id: row.try_get(0)?,
                    sha256: row.try_get(1)?,
                    delivery_count: row.try_get(2)?,
                    consumer: row.try_get(3)?,
                })
            })
            .collect::<Result<_>>()?;
        let dead = client
            .query(
                "SELECT (headers->'dead_letter'->>'msg_id')::bigint, message, headers->'dead_letter'->>'error'
                   FROM queue.files_dead ORDER BY msg_id",
                &[],
            )
            .context("cannot read the dead-letter queue")?
            .iter()
            .map(|row| {
                Ok(Dead { msg_id: row.try_get(0)?, path: path_of(&row.try_get(1)?)?, error: row.try_get(2)? })
            })
            .collect::<Result<_>>()?;
        let left = client.query_one("SELECT count(*) FROM queue.files", &[])?.try_get(0)?;
        Ok(Self { outcomes, dead, left })
    }
}

/// Compares the books with the files; returns what is wrong, nothing if all is well.
pub fn faults(sent: &BTreeMap<i64, PathBuf>, books: &Books) -> Result<Vec<String>> {
    let files: Vec<&Path> = sent.values().map(PathBuf::as_path).collect();
    let sums = sha256sum(&files)?;
    Ok(compare(sent, books, &sums))
}

fn compare(sent: &BTreeMap<i64, PathBuf>, books: &Books, sums: &HashMap<PathBuf, String>) -> Vec<String> {
    let mut faults = Vec::new();
    let mut results: HashMap<i64, Vec<&str>> = HashMap::new();
    for outcome in &books.outcomes {
        results.entry(outcome.msg_id).or_default().push(&outcome.sha256);
    }
    let mut dead: HashMap<&Path, u32> = HashMap::new();
    for letter in &books.dead {
        *dead.entry(&letter.path).or_default() += 1;
    }
    for (msg_id, path) in sent {
        let results = results.remove(msg_id).unwrap_or_default();
        let dead = dead.remove(path.as_path()).unwrap_or(0);
        let shown = path.display();
        match (sums.get(path), results.as_slice(), dead) {
            (Some(sum), [result], 0) if sum == result => {}
            (Some(sum), [result], 0) => faults.push(format!("{shown}: stored {result}, sha256sum says {sum}")),
            (None, [], 1) => {}
            (sum, results, dead) => faults.push(format!(
                "{shown}: {}, {} result(s), {dead} dead letter(s)",
                if sum.is_some() { "readable" } else { "not readable" },
                results.len()
            )),
        }
    }
    faults.extend(results.keys().map(|msg_id| format!("a result for message {msg_id}, which was never sent")));
    faults.extend(dead.keys().map(|path| format!("{}: a dead letter for what was never sent", path.display())));
    if books.left > 0 {
        faults.push(format!("{} message(s) are still in the queue", books.left));
    }
    faults
}

pub fn print_faults(faults: &[String]) {
    for fault in faults.iter().take(FAULTS_SHOWN) {
        println!("    WRONG: {fault}");
    }
    if faults.len() > FAULTS_SHOWN {
        println!("    ... and {} more", faults.len() - FAULTS_SHOWN);
    }
}

/// What coreutils' own program says; files that it cannot read are left out.
fn sha256sum(files: &[&Path]) -> Result<HashMap<PathBuf, String>> {
    let mut sums = HashMap::new();
    for some in files.chunks(FILES_PER_CALL) {
        let output = Command::new("sha256sum")
            // Ends lines with NUL, so that no name needs escaping.
            .args(["--zero", "--"])
            .args(some)
            .stdin(Stdio::null())
            .output()
            .context("cannot run sha256sum (install coreutils)")?;
        sums.extend(parse_sums(&output.stdout));
    }
    Ok(sums)
}

/// `SUM`, a blank, a blank or `*`, the name, NUL.
fn parse_sums(output: &[u8]) -> Vec<(PathBuf, String)> {
    let parse = |line: &[u8]| {
        let (sum, name) = (line.get(..64)?, line.get(66..)?);
        Some((OsString::from_vec(name.to_vec()).into(), String::from_utf8(sum.to_vec()).ok()?))
    };
    output.split(|byte| *byte == 0).filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_read_with_any_name() {
        let sum = "0".repeat(64);
        let output = [sum.as_bytes(), b"  /a b\n\xff\0", sum.as_bytes(), b" */c\0"].concat();
        let names: Vec<PathBuf> = parse_sums(&output).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [PathBuf::from(OsString::from_vec(b"/a b\n\xff".to_vec())), PathBuf::from("/c")]);
    }

    fn case(results: &[(i64, &str)], dead: &[&str], left: i64) -> Vec<String> {
        let sent = BTreeMap::from([(1, "/a".into()), (2, "/b".into()), (3, "/gone".into())]);
        let sums = HashMap::from([("/a".into(), "aa".to_owned()), ("/b".into(), "bb".to_owned())]);
        let outcomes = results
            .iter()
            .map(|(msg_id, sum)| Outcome {
                msg_id: *msg_id,
                sha256: (*sum).to_owned(),
                delivery_count: 1,
                consumer: String::new(),
            })
            .collect();
        let dead = dead.iter().map(|path| Dead { msg_id: None, path: path.into(), error: None }).collect();
        compare(&sent, &Books { outcomes, dead, left }, &sums)
    }

    #[test]
    fn books_in_order_have_no_fault() {
        assert_eq!(case(&[(1, "aa"), (2, "bb")], &["/gone"], 0), Vec::<String>::new());
    }

    #[test]
    fn every_kind_of_fault_is_found() {
        let right = [(1, "aa"), (2, "bb")];
        assert_eq!(case(&right[..1], &["/gone"], 0).len(), 1, "a result missing");
        assert_eq!(case(&[right[0], right[1], right[1]], &["/gone"], 0).len(), 1, "a result twice");
        assert_eq!(case(&[right[0], (2, "ab")], &["/gone"], 0).len(), 1, "a wrong checksum");
        assert_eq!(case(&[right[0], right[1], (9, "cc")], &["/gone"], 0).len(), 1, "a result of nothing sent");
        assert_eq!(case(&right, &[], 0).len(), 1, "a dead letter missing");
        assert_eq!(case(&right, &["/gone", "/gone"], 0).len(), 1, "a dead letter twice");
        assert_eq!(case(&right, &["/gone", "/b"], 0).len(), 1, "finished and dead-lettered");
        assert_eq!(case(&right, &["/gone", "/x"], 0).len(), 1, "a dead letter of nothing sent");
        assert_eq!(case(&right, &["/gone"], 1).len(), 1, "a message left");
    }
}
