//! The demo's files: which there are, and how their names travel in a message.
//!
//! A name is any bytes without NUL; JSON takes only UTF-8. Owns both directions of that. Never opens a file.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{anyhow, bail, Context, Result};
use serde_json::{json, Value};

/// The message for a file: its name as it is or, where it is not UTF-8, in hex.
pub fn message(path: &Path) -> Value {
    match path.to_str() {
        Some(text) => json!({ "path": text }),
        None => json!({ "path_hex": hex::encode(path.as_os_str().as_bytes()) }),
    }
}

/// The file that a message is about.
pub fn path_of(message: &Value) -> Result<PathBuf> {
    if let Some(text) = message.get("path").and_then(Value::as_str) {
        return Ok(text.into());
    }
    let text = message
        .get("path_hex")
        .and_then(Value::as_str)
        .ok_or_else(|| anyhow!("message {message} has neither path nor path_hex"))?;
    let bytes = hex::decode(text).with_context(|| format!("message {message}: path_hex is no hex"))?;
    Ok(OsString::from_vec(bytes).into())
}

/// Every file under `directory`, or, without one, those that the repository tracks. Links that lead nowhere are
/// among them; what is neither file nor link to one (directories, pipes) is not.
pub fn list(directory: Option<&Path>, repository: &Path) -> Result<Vec<PathBuf>> {
    let mut files = match directory {
        None => tracked(repository).unwrap_or_else(|| walk(repository, &[".git", "target"]))?,
        Some(directory) => {
            let directory = std::path::absolute(directory).context("that is no path")?;
            if !directory.is_dir() {
                bail!("{} is no directory", directory.display());
            }
            walk(&directory, &[])?
        }
    };
    files.retain(|path| path.metadata().map_or(true, |metadata| metadata.is_file()));
    files.sort();
    Ok(files)
}

/// What git tracks; None where there is no git, or the repository came without its history.
fn tracked(repository: &Path) -> Option<Result<Vec<PathBuf>>> {
    let mut git = Command::new("git");
    git.args(["ls-files", "-z"]).current_dir(repository).stdin(Stdio::null());
    let output = git.output().ok().filter(|output| output.status.success() && !output.stdout.is_empty())?;
    let names = output.stdout.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Some(Ok(names.map(|name| repository.join(OsStr::from_bytes(name))).collect()))
}

fn walk(directory: &Path, skip: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let wanted =
        |entry: &walkdir::DirEntry| entry.depth() != 1 || !skip.iter().any(|name| entry.file_name() == *name);
    for entry in walkdir::WalkDir::new(directory).into_iter().filter_entry(wanted) {
        match entry {
            Ok(entry) if !entry.file_type().is_dir() => files.push(entry.into_path()),
            Ok(_) => {}
            // A directory that we may not list: said, because its files will be missing.
            Err(error) => println!("    left out: {error}"),
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_any_bytes_come_back() {
        for name in [
            &b"/plain"[..],
            b"/with \"quotes\"\n",
            "/\u{fc}ml\u{e4}ut".as_bytes(),
            b"/\xff\xfe\x01",
            b"/path_hex",
        ] {
            let path = PathBuf::from(OsString::from_vec(name.to_vec()));
            // Through text, as it travels.
            let travelled: Value = serde_json::from_str(&message(&path).to_string()).unwrap();
            assert_eq!(path_of(&travelled).unwrap(), path);
        }
    }

    #[test]
    fn messages_about_no_file_are_errors() {
        for text in ["{}", "null", r#"{"path": 3}"#, r#"{"path_hex": "0g"}"#] {
            assert!(path_of(&serde_json::from_str(text).unwrap()).is_err(), "{text}");
        }
    }

    #[test]
    fn list_takes_files_and_dangling_links_only() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir(at("sub")).unwrap();
        std::fs::write(at("sub/file"), "x").unwrap();
        std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
        std::os::unix::fs::symlink("sub", at("to-directory")).unwrap();
        let found = list(Some(directory.path()), Path::new("/nowhere")).unwrap();
        assert_eq!(found, [at("dangling"), at("sub/file")]);
    }
}
