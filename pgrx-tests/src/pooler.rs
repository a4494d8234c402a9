//! PgBouncer before a cluster, pooling by transaction: many clients, few sessions, each transaction on another.
//!
//! Owns the process and its files, which lie in the cluster's directory; so does its socket, and there is no TCP. The
//! cluster's clean-up kills it, should its owner die (`cluster::CLEANUP` knows its .pid file). Installs nothing:
//! `cargo xtask test` does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use postgres::{Client, Config, NoTls};

use crate::cluster::Cluster;
use crate::wait::poll;

/// Part of the socket's name.
const PORT: u16 = 6432;
const START_LIMIT: Duration = Duration::from_secs(20);

/// The program, if it is installed: Debian has it where only root's PATH leads.
pub fn find_pgbouncer() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    places.map(|place| place.join("pgbouncer")).find(|program| program.is_file())
}

/// A running pooler.
pub struct Pooler {
    program: PathBuf,
    directory: PathBuf,
    child: Child,
}

impl Pooler {
    /// Starts one with so many server sessions for each database; returns when it serves `database`.
    pub fn start(cluster: &Cluster, database: &str, sessions: u32) -> Result<Self> {
        let program = find_pgbouncer().context("there is no pgbouncer on this machine")?;
        let directory = cluster.directory().to_owned();
        let text = format!(
            "[databases]\n* = host={place} user=postgres\n\
             [pgbouncer]\nunix_socket_dir = {place}\nlisten_port = {PORT}\nauth_type = any\npool_mode = transaction\n\
             default_pool_size = {sessions}\nmax_client_conn = 200\npidfile = {place}/pgbouncer.pid\n\
             logfile = {place}/pgbouncer.log\n",
            place = directory.display()
        );
        let ini = directory.join("pgbouncer.ini");
        fs::write(&ini, text).with_context(|| format!("cannot write {}", ini.display()))?;
        cluster.user.own(&ini)?;
        let child = spawn(cluster, &program, &ini)?;
        let mut pooler = Self { program, directory, child };
        pooler.wait(database)?;
        Ok(pooler)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The way through it.
    pub fn config(&self, database: &str) -> Config {
        let mut config = Client::configure();
        config.host_path(&self.directory).port(PORT).user("postgres").dbname(database);
        config
    }

    /// SIGKILLs it, and starts it again.
    pub fn kill_and_restart(&mut self, cluster: &Cluster, database: &str) -> Result<()> {
        self.end();
        self.child = spawn(cluster, &self.program, &self.directory.join("pgbouncer.ini"))?;
        self.wait(database)
    }

    fn wait(&mut self, database: &str) -> Result<()> {
        let config = self.config(database);
        let serves = poll(START_LIMIT, || match self.child.try_wait() {
            Ok(None) => config.connect(NoTls).ok().map(|_| true),
            _ => Some(false),
        });
        if serves != Some(true) {
            let log = fs::read_to_string(self.directory.join("pgbouncer.log")).unwrap_or_default();
            bail!("pgbouncer does not serve; its log:\n{log}");
        }
        Ok(())
    }

    fn end(&mut self) {
        // Neither fails but for one that has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Else the clean-up might take another process for it, and the next one take it for running.
        let _ = fs::remove_file(self.directory.join("pgbouncer.pid"));
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.end();
    }
}

fn spawn(cluster: &Cluster, program: &Path, ini: &Path) -> Result<Child> {
    cluster
        .user
        .command(program)
        .args(["-q"])
        .arg(ini)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))
}
