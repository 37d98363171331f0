//! What container engines leave of their running containers: records in `/run`, the process that
//! watches over each container, and, for names, the engine's own list.
//!
//! Asking an engine would need its address, which anybody may have changed, and the engine to run,
//! which its containers do not need. A container's watcher is always there, and leads to the rest.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::processes;

/// Where engines keep a directory for each container, `*` for one level of any name, and the file
/// in it that names the container's first process.
const STATES: [(&str, &str); 8] = [
    ("run/containerd/io.containerd.runtime.v2.task/*", "init.pid"),
    ("run/containerd/runc/*", "state.json"),
    ("run/docker/runtime-runc/*", "state.json"),
    ("run/runc", "state.json"),
    ("run/crun", "status"),
    ("run/containers/storage/overlay-containers", "userdata/pidfile"),
    ("run/containers/storage/vfs-containers", "userdata/pidfile"),
    ("run/youki", "state.json"),
];

/// A running container.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    /// Its names beside the identifier.
    pub(crate) names: Vec<String>,
    /// Its first process.
    pub(crate) pid: i32,
}

/// All containers of which there are records below `root` or that `watchers` watch over. One may
/// be there several times.
pub(crate) fn containers(root: &Path, watchers: &[Watcher]) -> BTreeSet<Container> {
    let mut found = BTreeSet::new();
    for (pattern, file) in STATES {
        for parent in expand(&root.join(pattern)) {
            found.extend(recorded(&parent, file));
        }
    }
    for watcher in watchers {
        match watcher {
            // One shim may watch over all containers of a pod: their bundles are side by side.
            Watcher::Shim { bundle } => {
                found.extend(bundle.parent().into_iter().flat_map(|p| recorded(p, "init.pid")));
            }
            Watcher::Conmon { id, pid_file, bundle } => {
                let names = bundle.as_deref().map(|b| podman_names(b, id)).unwrap_or_default();
                let container = |pid| Container { id: id.clone(), names, pid };
                found.extend(read_pid(pid_file).map(container));
            }
        }
    }
    found
}

/// The containers with a directory below `parent`.
fn recorded(parent: &Path, file: &str) -> Vec<Container> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let container = |entry: fs::DirEntry| {
        let id = entry.file_name().into_string().ok()?;
        let pid = read_pid(&entry.path().join(file))?;
        let names = docker_name(&entry.path(), &id).into_iter().collect();
        Some(Container { id, names, pid })
    };
    entries.filter_map(container).collect()
}

/// The directories that a pattern with a last level of any name means.
fn expand(pattern: &Path) -> Vec<PathBuf> {
    match (pattern.file_name(), pattern.parent()) {
        (Some(name), Some(parent)) if name == "*" => {
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
    let state: Value = serde_json::from_str(&text).ok()?;
    let pid = state.get("init_process_pid").or_else(|| state.get("pid"))?.as_i64()?;
    i32::try_from(pid).ok().filter(|pid| *pid > 0)
}

fn read_json(file: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

/// The name in Docker's own record of a container, wherever its data are: files beside that record
/// are mounted into the container.
fn docker_name(bundle: &Path, id: &str) -> Option<String> {
    let config = read_json(&bundle.join("config.json"))?;
    let sources = config["mounts"].as_array()?.iter().filter_map(|mount| mount["source"].as_str());
    let records = sources.filter_map(|source| Path::new(source).parent());
    let record = records.filter(|r| r.file_name().is_some_and(|name| name == id));
    record.into_iter().find_map(|record| {
        let record = read_json(&record.join("config.v2.json"))?;
        Some(record["Name"].as_str()?.trim_start_matches('/').to_owned())
    })
}

/// The names in the list beside a container of Podman's: `DRIVER-containers/containers.json` for
/// the bundle `DRIVER-containers/ID/userdata`.
fn podman_names(bundle: &Path, id: &str) -> Vec<String> {
    let list = bundle.ancestors().nth(2).and_then(|all| read_json(&all.join("containers.json")));
    let list = list.as_ref().and_then(Value::as_array).into_iter().flatten();
    let own = list.filter(|container| container["id"] == *id);
    let names = own.filter_map(|container| container["names"].as_array()).flatten();
    names.filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

/// A process that watches over containers.
#[derive(Debug)]
pub(crate) enum Watcher {
    /// containerd's and Docker's: it works in the bundle of its first container.
    Shim { bundle: PathBuf },
    /// Podman's and CRI-O's: it is told where everything is.
    Conmon { id: String, pid_file: PathBuf, bundle: Option<PathBuf> },
}

impl Watcher {
    /// All on this host.
    pub(crate) fn all() -> Vec<Self> {
        processes::all().into_iter().filter_map(Self::of).collect()
    }

    fn of(pid: i32) -> Option<Self> {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        // The kernel keeps 15 bytes of a name.
        if name.starts_with("containerd-shim") {
            let bundle = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
            return Some(Self::Shim { bundle });
        }
        if name.trim() != "conmon" {
            return None;
        }
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        Self::conmon(&words.iter().map(AsRef::as_ref).collect::<Vec<_>>())
    }

    fn conmon(words: &[&str]) -> Option<Self> {
        let after = |short: &str, long: &str| {
            let at = words.iter().position(|word| *word == short || *word == long)?;
            words.get(at + 1).map(|word| (*word).to_owned())
        };
        Some(Self::Conmon {
            id: after("-c", "--cid")?,
            pid_file: after("-p", "--container-pidfile")?.into(),
            bundle: after("-b", "--bundle").map(PathBuf::from),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f0c1c3e8d5a4f0c1c3e8d5a4f0c1c3e8d5a4f0c1c3e8d5a4f0c1c3e8d5a0123";

    fn put(path: &Path, content: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn pids(found: &BTreeSet<Container>) -> Vec<(&str, &[String], i32)> {
        found.iter().map(|c| (c.id.as_str(), c.names.as_slice(), c.pid)).collect()
    }

    #[test]
    fn records_say_where_the_first_process_is() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        let task = format!("containerd/io.containerd.runtime.v2.task/moby/{ID}/init.pid");
        put(&run.join(task), "17");
        put(&run.join("runc/web/state.json"), r#"{"id":"web","init_process_pid":18}"#);
        put(&run.join("crun/batch/status"), r#"{"pid":19,"bundle":"/b"}"#);
        put(&run.join("runc/broken/state.json"), "{");
        let found = containers(root.path(), &[]);
        let none: &[String] = &[];
        assert_eq!(pids(&found), [(ID, none, 17), ("batch", none, 19), ("web", none, 18)]);
    }

    #[test]
    fn watchers_lead_to_engines_that_keep_their_things_elsewhere() {
        let root = tempfile::tempdir().unwrap();
        let bundle = root.path().join(format!("exec/moby/{ID}"));
        let record = root.path().join(format!("data/containers/{ID}"));
        let mounts = format!(
            r#"{{"mounts":[{{"source":"proc"}},{{"source":"{}/hostname"}}]}}"#,
            record.display()
        );
        put(&bundle.join("config.json"), &mounts);
        put(&bundle.join("init.pid"), "21");
        put(&record.join("config.v2.json"), r#"{"Name":"/shop"}"#);
        let storage = root.path().join("storage/vfs-containers");
        let bundle_there = storage.join("abcd/userdata");
        let pid_file = root.path().join("pidfile");
        put(&pid_file, "22\n");
        put(&storage.join("containers.json"), r#"[{"id":"abcd","names":["till"]},{"id":"ef"}]"#);
        let line = ["conmon", "--api-version", "1", "-c", "abcd", "-b"];
        let line = [&line[..], &[bundle_there.to_str().unwrap(), "-n", "before", "-p"]].concat();
        let conmon = Watcher::conmon(&[&line[..], &[pid_file.to_str().unwrap()]].concat());
        let watchers = [Watcher::Shim { bundle }, conmon.unwrap()];
        let found = containers(root.path(), &watchers);
        let (shop, till) = (["shop".to_owned()], ["till".to_owned()]);
        assert_eq!(pids(&found), [(ID, &shop[..], 21), ("abcd", &till[..], 22)]);
        assert!(Watcher::conmon(&["conmon", "--version"]).is_none());
    }
}
