//! Small disks, to be filled to the brim: each a tmpfs below a cluster's directory.
//!
//! Owns mounting, filling and making room again. The cluster's clean-up unmounts them, however its process ends
//! (`cluster::CLEANUP`). Needs the right to mount (root, as a rule): whoever wants one asks [`mounting_refused`] first,
//! and says aloud what it skips.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{mount, umount2, MntFlags, MsFlags};

use crate::os_user::ServerUser;

/// What lies on a small disk of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// pg_wal.
    Wal,
    /// A directory for tablespaces.
    Tables,
}

impl Disk {
    /// Its directory within a cluster's.
    pub(crate) fn directory(self) -> &'static str {
        match self {
            Self::Wal => "disk-wal",
            Self::Tables => "disk-tables",
        }
    }
}

/// Why no disk can be mounted on this machine by this process; None: it can.
pub fn mounting_refused() -> Option<String> {
    let attempt = || -> Result<()> {
        let place = tempfile::tempdir().context("cannot make a directory")?;
        mount_tmpfs(place.path(), 1)?;
        umount2(place.path(), MntFlags::MNT_DETACH).context("cannot unmount it again")
    };
    attempt().err().map(|error| format!("{error:#}"))
}

/// A disk that is there.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Makes one of so many mebibytes at `path`, which belongs to `user`.
    pub(crate) fn make(path: &Path, mebibytes: u32, user: &ServerUser) -> Result<()> {
        fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))?;
        mount_tmpfs(path, mebibytes)?;
        user.own(path)
    }

    /// The one at `path`, if there is one.
    pub(crate) fn at(path: PathBuf) -> Option<Self> {
        path.is_dir().then_some(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Takes all the room that is left.
    pub fn fill(&self) -> Result<()> {
        const BLOCK: [u8; 4096] = [0; 4096];
        let path = self.ballast();
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        loop {
            match file.write_all(&BLOCK) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error).with_context(|| format!("cannot write {}", path.display())),
            }
        }
    }

    /// Gives it back. The file stays: one could not be made on a disk that has no room for its name.
    pub fn make_room(&self) -> Result<()> {
        let path = self.ballast();
        File::create(&path).map(drop).with_context(|| format!("cannot empty {}", path.display()))
    }
}

fn mount_tmpfs(at: &Path, mebibytes: u32) -> Result<()> {
    let options = format!("size={mebibytes}m,mode=0700");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("pg_queue"), at, Some("tmpfs"), flags, Some(options.as_str()))
        .with_context(|| format!("cannot mount a tmpfs at {}", at.display()))
}
