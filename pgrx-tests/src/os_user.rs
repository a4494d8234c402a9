//! Which operating system user runs the server: PostgreSQL refuses to run as root.
//!
//! Owns that one decision. Never creates or changes a user.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{anyhow, Context, Result};
use nix::unistd::{chown, geteuid, Gid, Uid, User};

/// As root the first of these that exists runs the server; `PG_QUEUE_SERVER_USER` goes before them.
const CANDIDATES: [&str; 2] = ["postgres", "nobody"];

/// The user that runs server programs: the current one, or an unprivileged one when the current one is root.
#[derive(Clone, Debug)]
pub struct ServerUser {
    pub name: String,
    uid: Uid,
    gid: Gid,
    /// Whether we are root and have to become this user.
    switch: bool,
}

impl ServerUser {
    pub fn detect() -> Result<Self> {
        let euid = geteuid();
        if !euid.is_root() {
            let user = User::from_uid(euid).context("cannot look up the current user")?.ok_or_else(|| {
                anyhow!("the current user (uid {euid}) has no name: give it an entry in /etc/passwd")
            })?;
            return Ok(Self { name: user.name, uid: user.uid, gid: user.gid, switch: false });
        }
        let wanted = std::env::var("PG_QUEUE_SERVER_USER").ok();
        let names: Vec<&str> = match &wanted {
            Some(name) => vec![name.as_str()],
            None => CANDIDATES.to_vec(),
        };
        for name in &names {
            if let Some(user) = User::from_name(name).with_context(|| format!("cannot look up user {name}"))? {
                return Ok(Self { name: user.name, uid: user.uid, gid: user.gid, switch: true });
            }
        }
        Err(anyhow!(
            "PostgreSQL does not run as root and there is no user {} to run it: create one (useradd --system postgres) \
             or name one in PG_QUEUE_SERVER_USER",
            names.join(" or ")
        ))
    }

    /// Whether server programs run as somebody else than we do.
    pub fn is_switched(&self) -> bool {
        self.switch
    }

    /// A command that runs as this user, in a directory that every user can enter and without libpq's variables
    /// (a PGDATA or PGOPTIONS of the developer's must not reach a test's server).
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir("/").env("LC_ALL", "C");
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(&name);
            }
        }
        if self.switch {
            // The standard library also drops root's supplementary groups when it sets the uid.
            command.uid(self.uid.as_raw()).gid(self.gid.as_raw()).env("HOME", "/").env("USER", &self.name);
        }
        command
    }

    /// Makes `path` this user's.
    pub fn own(&self, path: &Path) -> Result<()> {
        if self.switch {
            chown(path, Some(self.uid), Some(self.gid))
                .with_context(|| format!("cannot give {} to user {}", path.display(), self.name))?;
        }
        Ok(())
    }

    pub fn owns(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|file| file.uid() == self.uid.as_raw())
    }

    /// Whether this user may enter the directory `path`.
    pub fn can_enter(&self, path: &Path) -> bool {
        self.command("test").arg("-x").arg(path).status().is_ok_and(|status| status.success())
    }
}
