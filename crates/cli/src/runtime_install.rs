//! Runtimes: a language's interpreter found on this host, and the vendor's runtime interface
//! client installed beside it.
//!
//! A runtime is a directory `<runtimes>/<name>` with a record, `runtime.json`, that says what a
//! node mounts into the sandboxes. It appears by a rename: there is no half-installed runtime.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use medes_node::RuntimeRecord;
use serde::Deserialize;

/// What is installed for a Python runtime: AWS's runtime interface client and what it needs.
/// Exact versions, so that every installation of one release of Medes is the same.
const PACKAGES: &[&str] =
    &["awslambdaric==4.2.2", "simplejson==4.3.0", "snapshot-restore-py==1.0.0"];

/// Where the client is mounted in a sandbox: the paths that its compiled code shows in traces.
const MOUNTED_AT: &str = "/var/runtime";

/// The oldest Python that the client runs on.
const OLDEST: (u32, u32) = (3, 10);

/// Directories of the host that every sandbox sees, so that what lies there needs no mount.
const ALWAYS_THERE: &[&str] = &["/usr", "/lib", "/lib64", "/bin", "/etc"];

/// What an interpreter says of itself.
#[derive(Clone, Debug, Deserialize)]
struct Interpreter {
    executable: PathBuf,
    prefix: PathBuf,
    exec_prefix: PathBuf,
    version: String,
}

/// Asks an interpreter what it is. A version manager's shim or a virtual environment leads to the
/// interpreter behind it.
const PROBE: &str = "\
import json, os, sys
executable = getattr(sys, '_base_executable', None) or sys.executable
print(json.dumps({
    'executable': os.path.realpath(executable),
    'prefix': os.path.realpath(sys.base_prefix),
    'exec_prefix': os.path.realpath(sys.base_exec_prefix),
    'version': '%d.%d.%d' % sys.version_info[:3],
}))";

/// What an installation came to.
#[derive(Debug)]
pub struct Installed {
    /// The runtime's record.
    pub record: RuntimeRecord,
    /// Whether there was nothing to do.
    pub already: bool,
}

/// Installs the runtime `name` (such as `python3.11`) into the directory `runtimes`.
///
/// The interpreter is `interpreter` if given, else the command `name` in `$PATH`.
///
/// # Errors
/// If there is no such interpreter, if it is of another version, or if the client can't be
/// installed or imported.
pub fn install(name: &str, interpreter: Option<&Path>, runtimes: &Path) -> Result<Installed> {
    let wanted = python_version(name)?;
    let command = interpreter.unwrap_or(Path::new(name));
    let python = probe(command).with_context(|| {
        format!(
            "no usable interpreter for {name}: tried {}; install Python {wanted}, or name the \
             interpreter with --python or in the configuration ([runtimes.\"{name}\"] path = ...)",
            command.display()
        )
    })?;
    let short = python.version.rsplit_once('.').map_or("", |(short, _)| short);
    ensure!(short == wanted, "{} is Python {}, not {wanted}", command.display(), python.version);

    fs::create_dir_all(runtimes).with_context(|| runtimes.display().to_string())?;
    let runtimes = runtimes.canonicalize()?;
    let target = runtimes.join(name);
    let record = RuntimeRecord {
        name: name.to_owned(),
        kind: "aws-lambda-python".to_owned(),
        mounts: mounts(&python),
        interpreter: python.executable,
        prefix: python.prefix,
        ric: target.join("ric"),
        version: python.version,
        packages: PACKAGES.iter().map(|&p| p.to_owned()).collect(),
    };

    // Two installations at once would each do all the work; the second waits and finds it done.
    let lock = File::create(runtimes.join(".lock"))?;
    lock.lock()?;
    if read(&target).is_ok_and(|r| r == record) {
        return Ok(Installed { record, already: true });
    }
    let staging = tempfile::Builder::new().prefix(".new-").tempdir_in(&runtimes)?;
    fill(staging.path(), &record)?;
    let new = staging.keep();
    replace(&new, &target, &runtimes)?;
    Ok(Installed { record, already: false })
}

/// The runtimes that are installed in a directory, by name.
pub fn installed(runtimes: &Path) -> Vec<RuntimeRecord> {
    let Ok(entries) = fs::read_dir(runtimes) else { return Vec::new() };
    let mut records: Vec<_> = entries.flatten().filter_map(|e| read(&e.path()).ok()).collect();
    records.sort_by(|a, b| a.name.cmp(&b.name));
    records
}

/// The names of the Python runtimes for which this host has an interpreter in `$PATH`.
pub fn available() -> Vec<(String, PathBuf, String)> {
    (OLDEST.1..OLDEST.1 + 10)
        .filter_map(|minor| {
            let name = format!("3.{minor}");
            let python = probe(Path::new(&format!("python{name}"))).ok()?;
            python
                .version
                .starts_with(&format!("{name}."))
                .then(|| (format!("python{name}"), python.executable, python.version))
        })
        .collect()
}

/// The runtime's name (such as `python3.11`) for a Python interpreter, and the interpreter itself
/// behind whatever shim or link was named.
///
/// # Errors
/// If it is no Python interpreter.
pub fn identify(command: &Path) -> Result<(String, PathBuf)> {
    let python = probe(command).with_context(|| command.display().to_string())?;
    let short = python.version.rsplit_once('.').map_or("", |(short, _)| short);
    Ok((format!("python{short}"), python.executable))
}

/// `3.11` of `python3.11`.
fn python_version(name: &str) -> Result<&str> {
    let version = name.strip_prefix("python").and_then(|v| {
        let minor: u32 = v.strip_prefix("3.")?.parse().ok()?;
        Some((v, minor))
    });
    match version {
        Some((v, minor)) if (3, minor) >= OLDEST => Ok(v),
        Some(_) => bail!("{name}: the runtime interface client needs Python 3.10 or newer"),
        None => bail!("{name:?} is no runtime; runtimes are named like python3.11"),
    }
}

fn probe(command: &Path) -> Result<Interpreter> {
    let output = Command::new(command).args(["-I", "-c", PROBE]).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", errors.trim());
    serde_json::from_slice(&output.stdout).context("it does not answer as a Python interpreter")
}

fn mounts(python: &Interpreter) -> Vec<PathBuf> {
    let mut mounts: Vec<PathBuf> = Vec::new();
    let bin = python.executable.parent().unwrap_or(Path::new("/")).to_owned();
    for path in [&python.prefix, &python.exec_prefix, &bin] {
        let there = ALWAYS_THERE.iter().map(Path::new).chain(mounts.iter().map(PathBuf::as_path));
        if !there.into_iter().any(|dir| path.starts_with(dir)) {
            mounts.push(path.clone());
        }
    }
    mounts
}

fn read(runtime: &Path) -> Result<RuntimeRecord> {
    let record: RuntimeRecord = serde_json::from_slice(&fs::read(runtime.join("runtime.json"))?)?;
    ensure!(record.ric.is_dir() && record.interpreter.is_file(), "a part of it is missing");
    Ok(record)
}

/// Makes a runtime in an empty directory.
fn fill(directory: &Path, record: &RuntimeRecord) -> Result<()> {
    let ric = directory.join("ric");
    let python = || {
        let mut command = Command::new(&record.interpreter);
        command.env_remove("PYTHONPATH").env_remove("PYTHONHOME");
        command
    };
    run(python().args(["-m", "pip", "--version"])).with_context(|| {
        format!(
            "{} has no pip; on Debian and Ubuntu: apt-get install python3-pip",
            record.interpreter.display()
        )
    })?;
    run(python()
        .args(["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"])
        .args(["--root-user-action", "ignore", "--no-compile", "--no-deps", "--target"])
        .arg(&ric)
        .args(&record.packages))
    .with_context(|| format!("installing {}", record.packages.join(", ")))?;
    // Sandboxes see the directory read-only, so the compiled code must be there already. It is
    // never compared with its source: copying may change times.
    run(python()
        .args(["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s"])
        .arg(&ric)
        .args(["-p", MOUNTED_AT])
        .arg(&ric))
    .context("compiling the runtime interface client")?;
    run(python().env("PYTHONPATH", &ric).args(["-B", "-c", "import awslambdaric.bootstrap"]))
        .context("the runtime interface client can't be imported")?;
    make_readable(directory)?;
    let mut text = serde_json::to_string_pretty(record)?;
    text.push('\n');
    fs::write(directory.join("runtime.json"), text)?;
    Ok(())
}

/// Sandboxes run under other users: whatever the umask was, everybody may read.
fn make_readable(path: &Path) -> Result<()> {
    let metadata = path.symlink_metadata()?;
    if metadata.is_symlink() {
        return Ok(());
    }
    let owner = metadata.permissions().mode();
    let enter = if metadata.is_dir() || owner & 0o100 != 0 { 0o555 } else { 0o444 };
    fs::set_permissions(path, fs::Permissions::from_mode(owner | enter))?;
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            make_readable(&entry?.path())?;
        }
    }
    Ok(())
}

/// Puts `new` in the place of `target`.
fn replace(new: &Path, target: &Path, runtimes: &Path) -> Result<()> {
    if target.exists() {
        let old = tempfile::Builder::new().prefix(".old-").tempdir_in(runtimes)?;
        fs::rename(target, old.path().join("old"))?;
    }
    fs::rename(new, target).with_context(|| target.display().to_string())
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let output = command.output().with_context(|| program.clone())?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = errors.trim().lines().collect();
    let last = &lines[lines.len().saturating_sub(8)..];
    bail!("{program}: {}: {}", output.status, last.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interpreter(executable: &str, prefix: &str) -> Interpreter {
        Interpreter {
            executable: executable.into(),
            prefix: prefix.into(),
            exec_prefix: prefix.into(),
            version: "3.11.7".into(),
        }
    }

    #[test]
    fn only_what_a_sandbox_lacks_is_mounted() {
        assert!(mounts(&interpreter("/usr/bin/python3.11", "/usr")).is_empty());
        let pyenv = interpreter(
            "/root/.pyenv/versions/3.11.7/bin/python3.11",
            "/root/.pyenv/versions/3.11.7",
        );
        assert_eq!(mounts(&pyenv), [PathBuf::from("/root/.pyenv/versions/3.11.7")]);
        // Not everything that begins with the letters /usr is below /usr.
        let odd = interpreter("/usrlocal/bin/python3.11", "/usrlocal");
        assert_eq!(mounts(&odd), [PathBuf::from("/usrlocal")]);
    }

    #[test]
    fn runtimes_are_named_after_a_python_that_the_client_runs_on() {
        assert_eq!(python_version("python3.13").unwrap(), "3.13");
        for bad in ["python", "python3", "python2.7", "python3.9", "node20", "python3.11/../x", ""]
        {
            assert!(python_version(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_interpreter_of_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let fake = dir.path().join("python3.12");
        fs::write(
            &fake,
            "#!/bin/sh\necho '{\"executable\":\"/usr/bin/python3.11\",\"prefix\":\"/usr\",\
             \"exec_prefix\":\"/usr\",\"version\":\"3.11.2\"}'\n",
        )
        .unwrap();
        fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
        let e = install("python3.12", Some(&fake), &dir.path().join("runtimes")).unwrap_err();
        assert!(e.to_string().contains("is Python 3.11.2, not 3.12"), "{e:#}");
        let e = install("python3.12", Some(Path::new("/nonexistent")), dir.path()).unwrap_err();
        assert!(format!("{e:#}").contains("--python"), "{e:#}");
    }

    #[test]
    fn everybody_may_read_what_is_installed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        for (name, mode) in [("d/plain", 0o600), ("d/program", 0o700), ("d", 0o700)] {
            let path = dir.path().join(name);
            if !path.is_dir() {
                fs::write(&path, "").unwrap();
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        make_readable(dir.path()).unwrap();
        for (name, mode) in [("d/plain", 0o644), ("d/program", 0o755), ("d", 0o755)] {
            let found = dir.path().join(name).metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(found, mode, "{name}");
        }
    }

    #[test]
    fn a_new_runtime_takes_the_place_of_the_old() {
        let dir = tempfile::tempdir().unwrap();
        for n in ["1", "2"] {
            let new = dir.path().join(".new");
            fs::create_dir(&new).unwrap();
            fs::write(new.join("n"), n).unwrap();
            replace(&new, &dir.path().join("python3.11"), dir.path()).unwrap();
        }
        assert_eq!(fs::read_to_string(dir.path().join("python3.11/n")).unwrap(), "2");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
