//! One installation of PostgreSQL, known by its `pg_config`.
//!
//! Owns the reading of `pg_config`. Never changes the installation.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{anyhow, bail, Context, Result};

/// Tests find their PostgreSQL, with the extension installed into it, by this variable.
pub const PG_CONFIG_ENV: &str = "PG_QUEUE_TEST_PG_CONFIG";
/// Older ones, also with the extension, oldest first and separated like a PATH: what the test of pg_upgrade may come
/// from.
pub const PG_CONFIG_OLD_ENV: &str = "PG_QUEUE_TEST_PG_CONFIG_OLD";

#[derive(Clone, Debug)]
pub struct PgTree {
    pub pg_config: PathBuf,
    pub bindir: PathBuf,
    pub pkglibdir: PathBuf,
    pub sharedir: PathBuf,
    pub includedir_server: PathBuf,
    /// As `pg_config --version` says it, e.g. `PostgreSQL 15.20 (Debian 15.20-0+deb12u1)`.
    pub version: String,
    pub major: u16,
}

impl PgTree {
    pub fn from_pg_config(pg_config: &Path) -> Result<Self> {
        let ask = |option: &str| -> Result<String> {
            let output = Command::new(pg_config)
                .arg(option)
                .output()
                .with_context(|| format!("cannot run {}", pg_config.display()))?;
            if !output.status.success() {
                bail!(
                    "{} {option} failed: {}",
                    pg_config.display(),
                    String::from_utf8_lossy(&output.stderr).trim()
                );
            }
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let version = ask("--version")?;
        Ok(Self {
            pg_config: pg_config.to_owned(),
            bindir: ask("--bindir")?.into(),
            pkglibdir: ask("--pkglibdir")?.into(),
            sharedir: ask("--sharedir")?.into(),
            includedir_server: ask("--includedir-server")?.into(),
            major: major_of(&version)
                .ok_or_else(|| anyhow!("{} says {version:?}, which names no version", pg_config.display()))?,
            version,
        })
    }

    /// The installation that `cargo xtask test` prepared.
    pub fn from_env() -> Result<Self> {
        let pg_config = std::env::var_os(PG_CONFIG_ENV).ok_or_else(|| {
            anyhow!(
                "{PG_CONFIG_ENV} is not set: these tests need a PostgreSQL with pg_queue installed; \
                 run them by `cargo xtask test`, which prepares one (`cargo xtask test --pg 18 NAME` for a few)"
            )
        })?;
        Self::from_pg_config(Path::new(&pg_config))
    }

    /// Those that `cargo xtask test` prepared to be upgraded from, oldest first.
    pub fn old_from_env() -> Result<Vec<Self>> {
        let pg_configs = std::env::var_os(PG_CONFIG_OLD_ENV).ok_or_else(|| {
            anyhow!(
                "{PG_CONFIG_OLD_ENV} is not set: pg_upgrade needs an older PostgreSQL, with pg_queue installed, \
                 beside that of {PG_CONFIG_ENV}; `cargo xtask test` on two versions or more sets both"
            )
        })?;
        std::env::split_paths(&pg_configs).map(|path| Self::from_pg_config(&path)).collect()
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.bindir.join(name)
    }

    /// What is missing to build and run an extension on it, or None.
    pub fn lacks(&self) -> Option<PathBuf> {
        let wanted = [
            self.includedir_server.join("postgres.h"),
            self.program("postgres"),
            self.program("initdb"),
            self.program("pg_ctl"),
            self.sharedir.join("postgres.bki"),
        ];
        wanted.into_iter().find(|path| !path.exists())
    }
}

/// `PostgreSQL 18.6` and `PostgreSQL 19beta1` have the majors 18 and 19.
fn major_of(version: &str) -> Option<u16> {
    let number = version.strip_prefix("PostgreSQL ")?;
    let digits = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
    number[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::major_of;

    #[test]
    fn major_of_every_spelling_is_the_number() {
        assert_eq!(major_of("PostgreSQL 15.20 (Debian 15.20-0+deb12u1)"), Some(15));
        assert_eq!(major_of("PostgreSQL 19beta1"), Some(19));
        assert_eq!(major_of("PostgreSQL 18"), Some(18));
        assert_eq!(major_of("MySQL 8"), None);
    }
}
