//! Finding a container by its identifier, from what the engines leave on disk and in cgroups.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::processes;
use crate::target::{Selection, TargetError, directory};

/// Where engines keep a directory for each container, `*` for one level of any name, and the file
/// in it that names the container's first process.
const STATES: [(&str, &str); 8] = [
    ("/run/containerd/io.containerd.runtime.v2.task/*", "init.pid"),
    ("/run/containerd/runc/*", "state.json"),
    ("/run/docker/runtime-runc/*", "state.json"),
    ("/run/runc", "state.json"),
    ("/run/crun", "status"),
    ("/run/containers/storage/overlay-containers", "userdata/pidfile"),
    ("/var/run/containers/storage/overlay-containers", "userdata/pidfile"),
    ("/run/youki", "state.json"),
];

/// Commands that know containers by name.
const COMMANDS: [(&str, &[&str]); 3] = [
    ("docker", &["inspect", "--format", "{{.State.Pid}}"]),
    ("podman", &["inspect", "--format", "{{.State.Pid}}"]),
    ("nerdctl", &["inspect", "--format", "{{.State.Pid}}"]),
];

/// Beginnings shorter than this would mean anything.
const SHORTEST: usize = 4;

pub(crate) fn select(
    id: &str,
    unified: &Path,
    others: &[(PathBuf, String)],
) -> Result<Selection, TargetError> {
    let id = id.strip_prefix("containerd://").unwrap_or(id);
    let init = match by_state(id, Path::new("/"))? {
        Some(pid) => Some(pid),
        None => by_command(id),
    };
    let paths = match init {
        Some(pid) if processes::is_alive(pid) => processes::cgroups(pid),
        _ => by_cgroup(id)?,
    };
    // The outermost cgroup that bears the container's name: engines nest others in it.
    let named = |path: &str| {
        let mut at = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            at = format!("{at}/{part}");
            if bears_name(part, id) {
                return Some(at);
            }
        }
        None
    };
    let in_unified = paths.iter().find(|(controllers, _)| controllers.is_empty());
    if let Some(found) = in_unified
        .and_then(|(_, path)| named(path))
        .and_then(|path| directory(unified, &path))
        .filter(|directory| directory.is_dir())
    {
        return Ok(Selection::Unified(found));
    }
    for (controllers, path) in &paths {
        let mount = others.iter().find(|(_, options)| {
            controllers
                .split(',')
                .all(|one| !one.is_empty() && options.split(',').any(|option| option == one))
        });
        if let (Some((mount, _)), Some(path)) = (mount, named(path))
            && let Some(found) = directory(mount, &path).filter(|found| found.is_dir())
        {
            return Ok(Selection::Legacy(found));
        }
    }
    match init {
        Some(pid) if processes::is_alive(pid) => Ok(Selection::Tree(pid)),
        _ => Err(TargetError::NoContainer(id.to_owned())),
    }
}

/// Whether a cgroup's name is that of a container: `ID`, `docker-ID.scope`, `libpod-ID` and so on.
fn bears_name(part: &str, id: &str) -> bool {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    // Beside the container's own there is one for whoever watches it.
    if part.starts_with("libpod-conmon-") || part.starts_with("crio-conmon-") {
        return false;
    }
    let name = part.rsplit(['-', ':']).next().unwrap_or(part);
    part == id
        || name == id
        || (id.len() >= SHORTEST
            && is_hex(id)
            && is_hex(name)
            && name.len() == 64
            && name.starts_with(id))
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The first process of the container with this identifier, or the only one that begins so.
fn by_state(id: &str, root: &Path) -> Result<Option<i32>, TargetError> {
    let mut found: BTreeSet<(String, i32)> = BTreeSet::new();
    for (pattern, file) in STATES {
        for parent in expand(&root.join(pattern.trim_start_matches('/'))) {
            for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
                let Ok(name) = entry.file_name().into_string() else { continue };
                let meant = name == id || (id.len() >= SHORTEST && name.starts_with(id));
                if meant && let Some(pid) = read_pid(&entry.path().join(file)) {
                    found.insert((name, pid));
                }
            }
        }
    }
    if let Some((_, pid)) = found.iter().find(|(name, _)| name == id) {
        return Ok(Some(*pid));
    }
    let names: BTreeSet<&String> = found.iter().map(|(name, _)| name).collect();
    match names.len() {
        0 => Ok(None),
        1 => Ok(found.first().map(|(_, pid)| *pid)),
        _ => Err(TargetError::Ambiguous(id.to_owned())),
    }
}

/// The directories that a pattern with a last level of any name means.
fn expand(pattern: &Path) -> Vec<PathBuf> {
    match pattern.file_name() {
        Some(name) if name == "*" => {
            let parent = pattern.parent().unwrap_or(pattern);
            let entries = fs::read_dir(parent).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect()
        }
        _ => vec![pattern.to_path_buf()],
    }
}

/// A file that holds a number, or JSON with one under a name that runtimes use.
fn read_pid(file: &Path) -> Option<i32> {
    let text = fs::read_to_string(file).ok()?;
    if let Ok(pid) = text.trim().parse() {
        return Some(pid);
    }
    let state: serde_json::Value = serde_json::from_str(&text).ok()?;
    let pid = state.get("init_process_pid").or_else(|| state.get("pid"))?.as_i64()?;
    i32::try_from(pid).ok().filter(|pid| *pid > 0)
}

fn by_command(id: &str) -> Option<i32> {
    // Not an option of theirs.
    if id.starts_with('-') {
        return None;
    }
    COMMANDS.iter().find_map(|(program, arguments)| {
        let mut command = Command::new(program);
        command.args(*arguments).arg(id).stdin(Stdio::null()).stderr(Stdio::null());
        let output = command.output().ok().filter(|output| output.status.success())?;
        let pid = String::from_utf8_lossy(&output.stdout).trim().parse::<i32>().ok()?;
        (pid > 0).then_some(pid)
    })
}

/// The cgroups of some process in a cgroup that bears the name.
fn by_cgroup(id: &str) -> Result<Vec<(String, String)>, TargetError> {
    let mut names = BTreeSet::new();
    let mut found = Vec::new();
    for pid in processes::all() {
        let cgroups = processes::cgroups(pid);
        let part = cgroups.iter().flat_map(|(_, path)| path.split('/')).find(|p| bears_name(p, id));
        if let Some(part) = part {
            names.insert(
                part.trim_end_matches(".scope").rsplit(['-', ':']).next().map(str::to_owned),
            );
            found = cgroups;
        }
    }
    match names.len() {
        0 => Err(TargetError::NoContainer(id.to_owned())),
        1 => Ok(found),
        _ => Err(TargetError::Ambiguous(id.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f0c1c3e8d5a4f0c1c3e8d5a4f0c1c3e8d5a4f0c1c3e8d5a4f0c1c3e8d5a0123";

    #[test]
    fn engines_name_cgroups_in_many_ways() {
        for name in [
            ID.to_owned(),
            format!("docker-{ID}.scope"),
            format!("libpod-{ID}.scope"),
            format!("cri-containerd-{ID}.scope"),
            format!("crio-{ID}"),
        ] {
            assert!(bears_name(&name, ID), "{name}");
            assert!(bears_name(&name, &ID[..12]), "{name}");
            assert!(!bears_name(&name, "4f1"), "{name}");
        }
        assert!(bears_name("my-web", "my-web"));
        assert!(!bears_name(&format!("libpod-conmon-{ID}.scope"), ID));
        assert!(!bears_name("user.slice", "user"));
    }

    #[test]
    fn engines_say_where_the_first_process_is() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: String, content: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        put(format!("run/containerd/io.containerd.runtime.v2.task/moby/{ID}/init.pid"), "17");
        put("run/runc/web/state.json".into(), r#"{"id":"web","init_process_pid":18}"#);
        put("run/crun/batch/status".into(), r#"{"pid":19,"bundle":"/b"}"#);
        put("run/runc/web2/state.json".into(), r#"{"init_process_pid":20}"#);
        let find = |id: &str| by_state(id, root.path());
        assert_eq!(find(ID).unwrap(), Some(17));
        assert_eq!(find(&ID[..12]).unwrap(), Some(17));
        assert_eq!(find("web").unwrap(), Some(18));
        assert_eq!(find("batch").unwrap(), Some(19));
        assert_eq!(find("nothing").unwrap(), None);
        put(
            format!("run/runc/{}/state.json", ID.replace("0123", "4567")),
            r#"{"init_process_pid":21}"#,
        );
        assert!(matches!(find(&ID[..12]), Err(TargetError::Ambiguous(_))));
        assert_eq!(find(ID).unwrap(), Some(17));
    }
}
