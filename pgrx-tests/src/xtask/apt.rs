//! Debian's packages: what is offered, installing it, and source packages of the next release.
//!
//! Owns every call of apt. Installs only from the machine's own sources and never changes its apt set-up: the
//! source packages are fetched with lists and caches of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{anyhow, bail, Context, Result};

use super::apt_sources::{archive, parse_deb822, parse_one_line, source_line, Source};
use super::run::{find_program, output, run, say};

/// The next release after Debian 12, and which its PostgreSQL is.
pub const NEXT_RELEASE: &str = "trixie";

pub fn is_there() -> bool {
    find_program("apt-get").is_some()
}

/// What else the machine does may hold apt's locks for a while, and what serves packages may not be there at once.
const PATIENT: [&str; 4] = ["-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=5"];
/// The lists' own lock is not waited for: they are tried again after these times.
const UPDATE_AGAIN_AFTER_S: [u64; 4] = [10, 20, 30, 60];

/// apt-get with the rights to install, or why it cannot be.
fn apt_get() -> Result<Command> {
    let mut command = if nix::unistd::geteuid().is_root() {
        Command::new("apt-get")
    } else if find_program("sudo").is_some() {
        // A question of dpkg's would wait for an answer that nobody is asked for.
        let mut command = Command::new("sudo");
        command.args(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        command
    } else {
        bail!("installing needs root or sudo, and there is neither");
    };
    command.env("DEBIAN_FRONTEND", "noninteractive").args(PATIENT);
    Ok(command)
}

/// Installs `packages`; `why` completes "... because".
pub fn install(packages: &[&str], why: &str) -> Result<()> {
    let by_hand =
        format!("to do it by hand: install {} (Debian's names), then run this again", packages.join(" "));
    if !is_there() {
        bail!("{} missing ({why}) and this system has no apt; {by_hand}", packages.join(" "));
    }
    say(format!("Installing {} from the distribution: {why}", packages.join(" ")));
    let install = || -> Result<()> {
        update()?;
        // Without recommended packages: they double the download and nothing here uses them.
        run(apt_get()?.args(["install", "-y", "-q", "--no-install-recommends"]).args(packages))
    };
    install().with_context(|| format!("cannot install {}; {by_hand}", packages.join(" ")))
}

/// Whether the distribution has all of `packages`.
pub fn offers(packages: &[&str]) -> Result<bool> {
    if !is_there() {
        return Ok(false);
    }
    update()?;
    for package in packages {
        let policy = output(Command::new("apt-cache").env("LC_ALL", "C").args(["policy", package]))?;
        let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
        if candidate.is_none_or(|version| version == "(none)") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Brings the lists up to date once; a machine as it comes has none. Where that cannot be it says so: the old lists may do.
fn update() -> Result<()> {
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.get().is_some() {
        return Ok(());
    }
    let mut pauses_s = UPDATE_AGAIN_AFTER_S.iter();
    while let Err(error) = run(apt_get()?.args(["update", "-q"])) {
        let Some(pause_s) = pauses_s.next() else {
            say(format!("Goes on with the lists of packages as they are: {error:#}"));
            break;
        };
        println!("    {error:#}; once more in {pause_s} s");
        std::thread::sleep(Duration::from_secs(*pause_s));
    }
    DONE.get_or_init(|| ());
    Ok(())
}

/// Downloads the source package `name` of [`NEXT_RELEASE`] into `directory` and returns the original tarball.
/// apt checks it against the archive's signed lists.
pub fn fetch_next_source(name: &str, directory: &Path) -> Result<PathBuf> {
    for part in ["lists/partial", "cache/archives/partial", "source"] {
        let path = directory.join(part);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    let list = directory.join("sources.list");
    let line = source_line(&machine_sources()?, &codename()?, NEXT_RELEASE)?;
    fs::write(&list, line).with_context(|| format!("cannot write {}", list.display()))?;
    let private = |verb: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(["-q", "-o"]).arg(format!("Dir::Etc::sourcelist={}", list.display()));
        command.args(["-o", "Dir::Etc::sourceparts=-", "-o"]);
        command.arg(format!("Dir::State::lists={}", directory.join("lists").display())).arg("-o");
        command.arg(format!("Dir::Cache={}", directory.join("cache").display()));
        // apt's own user may not be able to enter the directory; what it fetches is checked either way.
        command.args(["-o", "APT::Sandbox::User=root"]).args(verb).current_dir(directory.join("source"));
        command
    };
    run(&mut private(&["update"]))?;
    run(&mut private(&["source", "--download-only", name]))?;
    let tarball = fs::read_dir(directory.join("source"))
        .context("cannot list the downloaded source")?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains(".orig.tar.")));
    tarball.ok_or_else(|| anyhow!("the source package {name} came without an original tarball"))
}

/// Downloads one file of the machine's archive, by its place in it, into `directory`. apt checks it against `sha256`.
pub fn fetch_pinned(path: &str, sha256: &str, directory: &Path) -> Result<PathBuf> {
    let name = path.rsplit('/').next().unwrap_or(path);
    let file = directory.join(name);
    let sources = machine_sources()?;
    let uri = format!("{}/{path}", archive(&sources, &codename()?)?.uris[0].trim_end_matches('/'));
    let mut helper = Command::new("/usr/lib/apt/apt-helper");
    helper.args(["-o", "APT::Sandbox::User=root", "download-file", &uri]).arg(&file);
    run(helper.arg(format!("SHA256:{sha256}")))?;
    Ok(file)
}

fn machine_sources() -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    if let Ok(text) = fs::read_to_string("/etc/apt/sources.list") {
        sources.extend(parse_one_line(&text));
    }
    let mut parts: Vec<PathBuf> = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    parts.sort();
    for path in parts {
        let parse = match path.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => parse_deb822,
            Some("list") => parse_one_line,
            _ => continue,
        };
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        sources.extend(parse(&text));
    }
    Ok(sources)
}

fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .ok_or_else(|| anyhow!("/etc/os-release names no release (VERSION_CODENAME)"))
}
