//! Building and installing the extension by cargo-pgrx.
//!
//! Owns how cargo-pgrx is called: always with a PGRX_HOME of ours (a developer's ~/.pgrx stays as it is) and a
//! target directory of its own (so that neither waits for, nor rebuilds, what the developer's cargo builds).

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use queue_tests::{PgTree, ServerUser};

use super::run::{output, run, say};
use super::tree::Tree;
use super::{provision, repository, target};

pub struct Builder {
    cargo_pgrx: PathBuf,
    pub tree: Tree,
    pgrx_home: PathBuf,
}

impl Builder {
    /// For builds against `tree`, whose PGRX_HOME is named after `purpose`.
    pub fn new(cargo_pgrx: PathBuf, tree: Tree, purpose: &str) -> Result<Self> {
        let builder = Self { cargo_pgrx, tree, pgrx_home: target().join("pgrx-home").join(purpose) };
        builder.init()?;
        Ok(builder)
    }

    pub fn pg_feature(&self) -> String {
        format!("pg{}", self.tree.pg.major)
    }

    /// Tells pgrx of the tree, once: to touch its configuration again would rebuild pgrx.
    fn init(&self) -> Result<()> {
        let pg_config = self.tree.pg.pg_config.display().to_string();
        let known = fs::read_to_string(self.pgrx_home.join("config.toml")).unwrap_or_default();
        if known.contains(&format!("\"{pg_config}\"")) {
            return Ok(());
        }
        fs::create_dir_all(&self.pgrx_home)
            .with_context(|| format!("cannot make {}", self.pgrx_home.display()))?;
        let mut init = Command::new(&self.cargo_pgrx);
        init.args(["pgrx", "init", "--no-run", &format!("--{}={pg_config}", self.pg_feature())]);
        output(init.env("PGRX_HOME", &self.pgrx_home))?;
        Ok(())
    }

    /// cargo-pgrx, or cargo, for this tree.
    fn prepare(&self, mut command: Command) -> Command {
        command
            .current_dir(repository())
            .env("PGRX_HOME", &self.pgrx_home)
            .env("CARGO_PGRX", &self.cargo_pgrx)
            .env("CARGO_TARGET_DIR", target().join("pgrx"));
        forget_cargo_run(&mut command);
        command
    }

    pub fn cargo_pgrx(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.cargo_pgrx);
        command.args(["pgrx", verb]);
        self.prepare(command)
    }

    pub fn cargo(&self, verb: &str) -> Command {
        let mut command = Command::new("cargo");
        command.arg(verb);
        self.prepare(command)
    }

    /// Builds the extension and installs it into the tree.
    pub fn install(&self, release: bool, features: &[&str]) -> Result<()> {
        let features = [&[self.pg_feature().as_str()], features].concat().join(" ");
        say(format!(
            "Building pg_queue ({}, features {features}) for {}: installed into {}",
            if release { "release" } else { "debug" },
            self.tree.pg.version,
            self.tree.root.display()
        ));
        let mut install = self.cargo_pgrx("install");
        if release {
            install.arg("--release");
        }
        install.arg("--pg-config").arg(&self.tree.pg.pg_config);
        run(install.args(["--no-default-features", "--features", &features]))
    }
}

/// A tree of `major` with the extension, built in release mode, in it.
pub fn release(major: u16) -> Result<PgTree> {
    let cargo_pgrx = provision::build_tools()?;
    let cached = provision::postgres(major)?;
    println!("    {}", cached.pg.version);
    // Another copy than the tests': the release build stays in it, whatever is tested meanwhile.
    let purpose = format!("release-{major}");
    let tree = provision::clone_tree(&cached, &purpose, &ServerUser::detect()?)?;
    let builder = Builder::new(cargo_pgrx, tree, &purpose)?;
    builder.install(true, &[])?;
    Ok(builder.tree.pg)
}

/// The tree of `major` that the tests use, with the extension as they build it: debug, with wait points.
pub fn debug(major: u16) -> Result<PgTree> {
    let cargo_pgrx = provision::build_tools()?;
    let cached = provision::postgres(major)?;
    println!("    {}", cached.pg.version);
    let purpose = major.to_string();
    let tree = provision::clone_tree(&cached, &purpose, &ServerUser::detect()?)?;
    let builder = Builder::new(cargo_pgrx, tree, &purpose)?;
    builder.install(false, &["wait_points"])?;
    Ok(builder.tree.pg)
}

/// Removes what `cargo run` told xtask about itself: to a child it would tell lies about another package.
pub fn forget_cargo_run(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_BIN_", "CARGO_MANIFEST_"].iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name.as_ref());
        }
    }
}
