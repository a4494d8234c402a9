//! Throwaway clusters: initdb, start, stop, kill, connect, read the log, and leave nothing behind.
//!
//! Owns a cluster's directory and its postmaster. Never listens on TCP: the socket lies in the cluster's own
//! directory, which only its server's user (and root) may enter, so trust authentication trusts nobody else.
//!
//! Why not a crate: pgtemp 0.7 listens on TCP and cannot kill or restart its server, postgresql_embedded and
//! pg-embed download servers and run them as the current user, who is root here; none takes all of our cases.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use nix::sys::signal::Signal;
use postgres::{Client, Config, NoTls};

use crate::database::Database;
use crate::disk::{Disk, SmallDisk};
use crate::os_user::ServerUser;
use crate::pg_tree::PgTree;
use crate::processes;
use crate::wait::{poll, wait_until};

/// Where clusters lie, if not in /tmp: a short path, because those of sockets are limited to 107 bytes (TMPDIR can have
/// any length).
pub const CLUSTERS_ENV: &str = "PG_QUEUE_TEST_CLUSTERS";
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(60);
const LOG_TAIL_LINES: usize = 60;

/// Takes the cluster away when the process that made it ends, in whatever way: it reads from a pipe that only
/// that process holds open, so a test that is killed leaves no server behind, nor a pooler (it has a .pid file there), nor
/// a small disk. `keep` on the pipe dismisses it.
const CLEANUP: &str = r#"
read -r word
[ "$word" = keep ] && exit 0
pid_file="$1/data/postmaster.pid"
if [ -e "$pid_file" ]; then
    pid=$(head -n 1 "$pid_file")
    kill -QUIT "$pid" 2>/dev/null
    tries=0
    while [ -e "$pid_file" ] && kill -0 "$pid" 2>/dev/null && [ $tries -lt 100 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    [ $tries -lt 100 ] || kill -KILL "$pid" 2>/dev/null
fi
for pid in "$1"/*.pid; do [ -e "$pid" ] && kill -KILL "$(cat "$pid")" 2>/dev/null; done
umount -l "$1"/disk-* 2>/dev/null
rm -rf "$1"
"#;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Ends sessions, writes a checkpoint.
    Fast,
    /// Drops everything; the next start recovers from the WAL.
    Immediate,
}

/// What a cluster is made with.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    conf: Vec<(String, String)>,
    initdb: Vec<String>,
    preload: bool,
    durable: bool,
    disks: Vec<(Disk, u32)>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self { conf: Vec::new(), initdb: Vec::new(), preload: true, durable: false, disks: Vec::new() }
    }
}

impl ClusterOptions {
    /// A line for postgresql.conf; it wins over the harness's own.
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.conf.push((name.to_owned(), value.to_owned()));
        self
    }

    /// An argument for initdb.
    pub fn initdb(mut self, argument: &str) -> Self {
        self.initdb.push(argument.to_owned());
        self
    }

    /// Leaves pg_queue out of shared_preload_libraries.
    pub fn without_preload(mut self) -> Self {
        self.preload = false;
        self
    }

    /// Leaves fsync on. Off, killing any process loses nothing (the kernel has the pages); only a machine that
    /// dies does, and no test makes one die.
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// A small disk of so many mebibytes; see [`crate::disk`].
    pub fn disk(mut self, disk: Disk, mebibytes: u32) -> Self {
        self.disks.push((disk, mebibytes));
        self
    }

    pub fn start(self) -> Result<Cluster> {
        self.start_on(PgTree::from_env()?)
    }

    pub fn start_on(self, tree: PgTree) -> Result<Cluster> {
        let cluster = self.create_on(tree)?;
        cluster.start()?;
        Ok(cluster)
    }

    /// A cluster that has not been started yet.
    pub fn create_on(self, tree: PgTree) -> Result<Cluster> {
        let cluster = Cluster::place(tree)?;
        let mut arguments = self.initdb.clone();
        for (disk, mebibytes) in &self.disks {
            let path = cluster.directory.join(disk.directory());
            SmallDisk::make(&path, *mebibytes, &cluster.user)?;
            if *disk == Disk::Wal {
                // Small segments, so that a small disk holds some.
                arguments
                    .extend([format!("--waldir={}", path.join("pg_wal").display()), "--wal-segsize=1".into()]);
            }
        }
        cluster.initdb(&arguments)?;
        cluster.configure(&self)?;
        Ok(cluster)
    }

    /// A backup of `primary`, which runs and need not pause for it; not started yet.
    pub fn create_backup_of(self, primary: &Cluster) -> Result<Cluster> {
        let cluster = Cluster::place(primary.tree.clone())?;
        let mut backup = cluster.user.command(cluster.tree.program("pg_basebackup"));
        backup.args(["-U", "postgres", "--checkpoint=fast", "--wal-method=stream", "--no-sync", "-h"]);
        run(backup.arg(primary.directory()).arg("-D").arg(cluster.data()), &cluster.tree)?;
        cluster.configure(&self)?;
        Ok(cluster)
    }

    /// A hot standby that streams from `primary`; it returns when the standby takes connections.
    pub fn start_standby_of(self, primary: &Cluster) -> Result<Cluster> {
        let conninfo = format!("host={} user=postgres", primary.directory().display());
        let cluster = self.set("primary_conninfo", &conninfo).create_backup_of(primary)?;
        let signal = cluster.data().join("standby.signal");
        fs::write(&signal, "").with_context(|| format!("cannot write {}", signal.display()))?;
        cluster.user.own(&signal)?;
        cluster.start()?;
        Ok(cluster)
    }

    fn conf_text(&self, directory: &Path) -> String {
        let directory = directory.display().to_string();
        let mut lines: Vec<(&str, &str)> = vec![
            ("listen_addresses", ""),
            ("unix_socket_directories", &directory),
            ("timezone", "UTC"),
            ("log_timezone", "UTC"),
            ("log_line_prefix", "%m [%p] %q%u@%d "),
            // Tests run many sessions, and many databases of which each has a worker.
            ("max_connections", "100"),
            ("max_worker_processes", "64"),
            ("max_prepared_transactions", "20"),
            ("shared_buffers", "32MB"),
        ];
        if self.preload {
            lines.push(("shared_preload_libraries", "pg_queue"));
        }
        if !self.durable {
            lines.push(("fsync", "off"));
        }
        lines.extend(self.conf.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        lines.iter().map(|(name, value)| format!("{name} = '{}'\n", value.replace('\'', "''"))).collect()
    }
}

/// One cluster and its server. Dropping it stops the server and deletes the directory.
pub struct Cluster {
    pub tree: PgTree,
    pub user: ServerUser,
    directory: PathBuf,
    postmaster: Mutex<Option<Child>>,
    /// The process that runs [`CLEANUP`]; None once it is done or dismissed.
    cleanup: Mutex<Option<Child>>,
    databases: AtomicU32,
}

impl Cluster {
    /// A cluster with pg_queue preloaded, on the PostgreSQL that `cargo xtask test` prepared.
    pub fn start_new() -> Result<Self> {
        ClusterOptions::default().start()
    }

    /// A directory for a cluster, with nothing in it, and somebody who takes it away.
    fn place(tree: PgTree) -> Result<Self> {
        let user = ServerUser::detect()?;
        let base = std::env::var_os(CLUSTERS_ENV).unwrap_or_else(|| "/tmp".into());
        let directory = tempfile::Builder::new()
            .prefix("pgq-")
            .tempdir_in(&base)
            .with_context(|| format!("cannot make a directory in {}", base.display()))?
            .keep();
        let cleanup = Command::new("sh")
            .args(["-c", CLEANUP, "pg_queue-cleanup"])
            .arg(&directory)
            .stdin(Stdio::piped())
            .process_group_of_its_own()
            .spawn()
            .context("cannot start sh")?;
        let cluster = Self {
            tree,
            user,
            directory,
            postmaster: Mutex::new(None),
            cleanup: Mutex::new(Some(cleanup)),
            databases: AtomicU32::new(0),
        };
        cluster.user.own(&cluster.directory)?;
        Ok(cluster)
    }

    fn initdb(&self, arguments: &[String]) -> Result<()> {
        let kept = kept_data(&self.tree);
        if arguments.is_empty() && self.user.owns(&kept) {
            return run(self.user.command("cp").arg("-a").arg(kept).arg(self.data()), &self.tree);
        }
        initdb(&self.tree, &self.user, arguments, &self.data())
    }

    fn configure(&self, options: &ClusterOptions) -> Result<()> {
        let conf = self.data().join("postgresql.auto.conf");
        fs::write(&conf, options.conf_text(&self.directory))
            .with_context(|| format!("cannot write {}", conf.display()))
    }

    /// Returns when this standby has replayed all that `primary` has written.
    #[track_caller]
    pub fn wait_until_replayed(&self, primary: &Self) {
        let lsn = |cluster: &Self, sql: &str| -> Result<String> {
            let row = cluster.connect("postgres")?.query_one(sql, &[])?;
            Ok(row.try_get(0)?)
        };
        let written = lsn(primary, "SELECT pg_current_wal_insert_lsn()::text")
            .unwrap_or_else(|error| panic!("cannot ask the primary: {error:#}"));
        let is_replayed = format!("SELECT (pg_last_wal_replay_lsn() >= '{written}')::text");
        wait_until(&format!("the standby has replayed {written}"), || {
            lsn(self, &is_replayed).is_ok_and(|answer| answer == "true")
        });
    }

    /// Where the socket lies.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// The small disk that it was made with.
    pub fn disk(&self, disk: Disk) -> Option<SmallDisk> {
        SmallDisk::at(self.directory.join(disk.directory()))
    }

    pub fn log_path(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// The whole log, over all starts.
    pub fn log(&self) -> String {
        fs::read(self.log_path()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// How many bytes were logged so far.
    pub fn log_len(&self) -> u64 {
        fs::metadata(self.log_path()).map_or(0, |metadata| metadata.len())
    }

    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }

    pub fn config(&self, database: &str) -> Config {
        let mut config = Client::configure();
        config
            .host_path(&self.directory)
            .user("postgres")
            .dbname(database)
            .application_name("pg_queue-harness");
        config
    }

    pub fn connect(&self, database: &str) -> Result<Client> {
        self.config(database).connect(NoTls).with_context(|| format!("cannot connect to database {database}"))
    }

    /// A database of its own with the extension in it, dropped with the handle.
    pub fn create_database(&self) -> Result<Database<'_>> {
        let database = self.create_bare_database()?;
        database
            .connect()?
            .batch_execute("CREATE EXTENSION pg_queue")
            .context("cannot create extension pg_queue")?;
        Ok(database)
    }

    /// The same without the extension.
    pub fn create_bare_database(&self) -> Result<Database<'_>> {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed) + 1);
        self.connect("postgres")?
            .batch_execute(&format!("CREATE DATABASE {name}"))
            .with_context(|| format!("cannot create database {name}"))?;
        Ok(Database { cluster: self, name })
    }

    /// Starts the server and returns when it takes connections.
    pub fn start(&self) -> Result<()> {
        let mut postmaster = lock(&self.postmaster);
        if postmaster.is_some() {
            bail!("the server of {} is started already", self.directory.display());
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())
            .with_context(|| format!("cannot open {}", self.log_path().display()))?;
        let child = self
            .user
            .command(self.tree.program("postgres"))
            .arg("-D")
            .arg(self.data())
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share the log file")?)
            .stderr(log)
            .process_group_of_its_own()
            .spawn()
            .with_context(|| format!("cannot start {}", self.tree.program("postgres").display()))?;
        let child = postmaster.insert(child);
        let outcome = poll(START_LIMIT, || match child.try_wait() {
            Ok(None) => self.config("postgres").connect(NoTls).ok().map(|_| Ok(())),
            Ok(Some(status)) => Some(Err(anyhow!("the server ended at its start ({status})"))),
            Err(error) => Some(Err(anyhow!(error).context("cannot look after the server"))),
        });
        match outcome {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => {
                *postmaster = None;
                Err(error.context(format!("log of the server:\n{}", self.log_tail())))
            }
            None => Err(anyhow!(
                "the server took no connection within {} s; its log:\n{}",
                START_LIMIT.as_secs(),
                self.log_tail()
            )),
        }
    }

    pub fn stop(&self, mode: StopMode) -> Result<()> {
        let signal = match mode {
            StopMode::Fast => Signal::SIGINT,
            StopMode::Immediate => Signal::SIGQUIT,
        };
        let mut child = lock(&self.postmaster).take().ok_or_else(|| anyhow!("the server does not run"))?;
        processes::send(child.id(), signal)?;
        if poll(STOP_LIMIT, || child.try_wait().transpose()).is_none() {
            child.kill().context("cannot kill the server")?;
            child.wait().context("cannot wait for the server")?;
            bail!(
                "the server did not stop ({mode:?}) within {} s and was killed; its log:\n{}",
                STOP_LIMIT.as_secs(),
                self.log_tail()
            );
        }
        Ok(())
    }

    pub fn restart(&self, mode: StopMode) -> Result<()> {
        self.stop(mode)?;
        self.start()
    }

    /// Returns true if the server has ended by itself; then it can be started again.
    pub fn has_ended(&self) -> Result<bool> {
        let mut postmaster = lock(&self.postmaster);
        let Some(child) = postmaster.as_mut() else { return Ok(true) };
        let has_ended = child.try_wait().context("cannot look after the server")?.is_some();
        if has_ended {
            *postmaster = None;
        }
        Ok(has_ended)
    }

    pub fn postmaster_pid(&self) -> Result<u32> {
        lock(&self.postmaster).as_ref().map(Child::id).ok_or_else(|| anyhow!("the server does not run"))
    }

    /// SIGKILLs the postmaster alone; its children notice and end by themselves. Comes back when all
    /// have, and returns when it was killed.
    pub fn kill_postmaster(&self) -> Result<Instant> {
        self.kill(false)
    }

    /// SIGKILLs the postmaster and all its children at one go: nobody gets to clean up anything.
    pub fn kill_all(&self) -> Result<Instant> {
        self.kill(true)
    }

    fn kill(&self, children_too: bool) -> Result<Instant> {
        let mut child = lock(&self.postmaster).take().ok_or_else(|| anyhow!("the server does not run"))?;
        // Stopped, the postmaster starts no child that we would not know of.
        processes::send(child.id(), Signal::SIGSTOP)?;
        // The signal is sent, not yet obeyed: until it is, one more child may come.
        if poll(STOP_LIMIT, || processes::is_stopped(child.id()).then_some(())).is_none() {
            bail!("the postmaster did not stop for SIGSTOP within {} s", STOP_LIMIT.as_secs());
        }
        let children = processes::descendants(child.id());
        let killed = Instant::now();
        child.kill().context("cannot kill the postmaster")?;
        if children_too {
            for pid in &children {
                processes::send(*pid, Signal::SIGKILL)?;
            }
        }
        child.wait().context("cannot wait for the postmaster")?;
        // A server cannot start while a process of the old one holds the shared memory.
        match poll(STOP_LIMIT, || (!children.iter().any(|pid| processes::is_running(*pid))).then_some(())) {
            Some(()) => Ok(killed),
            None => bail!("server processes outlived their postmaster by {} s", STOP_LIMIT.as_secs()),
        }
    }

    /// SIGKILLs one backend (or worker) of this cluster. The postmaster then restarts all of them: returns when
    /// the server takes connections again.
    pub fn kill_backend(&self, pid: i32) -> Result<()> {
        match self.kill_backend_if(pid, || Ok(true))? {
            true => Ok(()),
            false => bail!("process {pid} is none of this cluster's, or has just ended"),
        }
    }

    /// The same if there is such a process and `is_wanted`, asked just before the signal, says so. Returns whether.
    pub fn kill_backend_if(&self, pid: i32, is_wanted: impl FnOnce() -> Result<bool>) -> Result<bool> {
        let postmaster = self.postmaster_pid()?;
        let pid = u32::try_from(pid).context("a PID is positive")?;
        if !processes::descendants(postmaster).contains(&pid) {
            return Ok(false);
        }
        // Of a log that may be long only what is new.
        let from = fs::metadata(self.log_path()).context("cannot look at the log")?.len();
        let has_crashed = || self.log_from(from).contains("all server processes terminated; reinitializing");
        if !is_wanted()? {
            return Ok(false);
        }
        if !processes::send_if_there(pid, Signal::SIGKILL)? {
            return Ok(false); // it has just ended by itself, and nothing will come of it
        }
        poll(START_LIMIT, || (has_crashed() && self.connect("postgres").is_ok()).then_some(true)).ok_or_else(
            || anyhow!("the server did not come back after the crash of {pid}; its log:\n{}", self.log_tail()),
        )
    }

    /// The log from so many bytes on.
    pub fn log_from(&self, from: u64) -> String {
        let mut bytes = Vec::new();
        let read = fs::File::open(self.log_path()).and_then(|mut file| {
            file.seek(SeekFrom::Start(from))?;
            file.read_to_end(&mut bytes)
        });
        read.map(|_| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Returns when the log, from `from` bytes on, holds `text`.
    #[track_caller]
    pub fn wait_for_log(&self, from: usize, text: &str) {
        wait_until(&format!("the log says {text:?}"), || {
            self.log().get(from..).is_some_and(|log| log.contains(text))
        });
    }

    /// Leaves the server running and the directory in place when this handle, or the process, ends.
    pub fn keep(&self) -> Result<()> {
        if let Some(mut cleanup) = lock(&self.cleanup).take() {
            let mut pipe = cleanup.stdin.take().ok_or_else(|| anyhow!("the clean-up process has no pipe"))?;
            pipe.write_all(b"keep\n").context("cannot dismiss the clean-up process")?;
            drop(pipe);
            cleanup.wait().context("cannot wait for the clean-up process")?;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {}, last lines:\n{}", self.tree.version, self.log_tail());
        }
        let Some(mut cleanup) = lock(&self.cleanup).take() else { return };
        if lock(&self.postmaster).is_some() {
            if let Err(error) = self.stop(StopMode::Immediate) {
                eprintln!("{error:#}");
            }
        }
        drop(cleanup.stdin.take());
        if let Err(error) = cleanup.wait() {
            eprintln!("cannot wait for the clean-up of {}: {error}", self.directory.display());
        }
    }
}

/// Runs one of a tree's programs to its end.
fn run(command: &mut Command, tree: &PgTree) -> Result<()> {
    let name = command.get_program().to_owned();
    let output = command.output().with_context(|| format!("cannot run {}", name.display()))?;
    if !output.status.success() {
        bail!(
            "{} of {} failed ({}): {}{}",
            name.display(),
            tree.version,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

fn initdb(tree: &PgTree, user: &ServerUser, arguments: &[String], data: &Path) -> Result<()> {
    let mut initdb = user.command(tree.program("initdb"));
    initdb.args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]);
    run(initdb.args(arguments).arg("-D").arg(data), tree)
}

/// Where [`keep_data`] leaves it: beside the programs.
fn kept_data(tree: &PgTree) -> PathBuf {
    tree.bindir.with_file_name("pg_queue.data")
}

/// Runs initdb once for all clusters of a tree that is ours: to copy what it makes takes a small part of its time, and the
/// tests make a hundred and more. These clusters have one system identifier, which no test minds.
pub fn keep_data(tree: &PgTree, user: &ServerUser) -> Result<()> {
    let kept = kept_data(tree);
    if kept.exists() {
        return Ok(());
    }
    let fresh = kept.with_extension("fresh");
    let _ = fs::remove_dir_all(&fresh); // of a run that was ended
    fs::create_dir(&fresh).with_context(|| format!("cannot make {}", fresh.display()))?;
    user.own(&fresh)?;
    initdb(tree, user, &[], &fresh)?;
    fs::rename(&fresh, &kept).with_context(|| format!("cannot make {}", kept.display()))
}

/// A poisoned lock only says that another thread's test failed; the child in it is still ours to end.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Ctrl-C in a terminal reaches the foreground group; server and clean-up must outlive it to end in order.
trait OwnGroup {
    fn process_group_of_its_own(&mut self) -> &mut Self;
}

impl OwnGroup for Command {
    fn process_group_of_its_own(&mut self) -> &mut Self {
        std::os::unix::process::CommandExt::process_group(self, 0)
    }
}
