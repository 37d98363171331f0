//! Finding a container by its identifier or name, and its cgroup.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::engines::{self, Container, Watcher};
use crate::processes;
use crate::target::{Selection, TargetError, directory};

/// Commands that know containers of engines that leave nothing that is known here.
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
    let mut running = engines::containers(Path::new("/"), &Watcher::all());
    // Records may be left of those that have ended.
    running.retain(|container| processes::is_alive(container.pid));
    let found = named(id, &running)?;
    let init = found.as_ref().map(|container| container.pid).or_else(|| by_command(id));
    // The cgroup bears the identifier, whatever the container was called here.
    let id = found.as_ref().map_or(id, |container| container.id.as_str());
    let paths = match init {
        Some(pid) if processes::is_alive(pid) => processes::cgroups(pid),
        _ => by_cgroup(id)?,
    };
    // The outermost cgroup that bears the container's name: engines nest others in it.
    let cgroup_named = |path: &str| {
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
        .and_then(|(_, path)| cgroup_named(path))
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
        if let (Some((mount, _)), Some(path)) = (mount, cgroup_named(path))
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

/// The container with this identifier or name, or the only one whose identifier begins so.
fn named(id: &str, all: &BTreeSet<Container>) -> Result<Option<Container>, TargetError> {
    let pick = |is_meant: &dyn Fn(&Container) -> bool| {
        let meant: Vec<&Container> = all.iter().filter(|c| is_meant(c)).collect();
        let ids: BTreeSet<&str> = meant.iter().map(|c| c.id.as_str()).collect();
        match ids.len() {
            0 | 1 => Ok(meant.first().map(|c| (*c).clone())),
            _ => Err(TargetError::Ambiguous(
                id.to_owned(),
                ids.into_iter().collect::<Vec<_>>().join(", "),
            )),
        }
    };
    if let Some(found) = pick(&|c| c.id == id)? {
        return Ok(Some(found));
    }
    if let Some(found) = pick(&|c| c.names.iter().any(|name| name == id))? {
        return Ok(Some(found));
    }
    pick(&|c| id.len() >= SHORTEST && c.id.starts_with(id))
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
    let mut found = BTreeMap::new();
    for pid in processes::all() {
        let cgroups = processes::cgroups(pid);
        let part = cgroups.iter().flat_map(|(_, path)| path.split('/')).find(|p| bears_name(p, id));
        let name = part.map(|part| part.trim_end_matches(".scope"));
        if let Some(name) = name.and_then(|name| name.rsplit(['-', ':']).next()) {
            found.insert(name.to_owned(), cgroups);
        }
    }
    if found.len() > 1 {
        let ids = found.into_keys().collect::<Vec<_>>().join(", ");
        return Err(TargetError::Ambiguous(id.to_owned(), ids));
    }
    found.into_values().next().ok_or_else(|| TargetError::NoContainer(id.to_owned()))
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
    fn an_identifier_comes_before_a_name_and_a_name_before_a_beginning() {
        let container = |id: &str, name: &str, pid| Container {
            id: id.to_owned(),
            names: vec![name.to_owned()],
            pid,
        };
        let other = ID.replace("0123", "4567");
        let all = BTreeSet::from([
            container(ID, "web", 1),
            container(&other, "4f0c", 2),
            container("batch", "job", 3),
        ]);
        let find = |id: &str| named(id, &all).map(|found| found.map(|c| c.pid));
        assert_eq!(find(ID).unwrap(), Some(1));
        assert_eq!(find("web").unwrap(), Some(1));
        assert_eq!(find("4f0c").unwrap(), Some(2));
        assert_eq!(find("job").unwrap(), Some(3));
        assert_eq!(find("batc").unwrap(), Some(3));
        assert_eq!(find("nothing").unwrap(), None);
        assert_eq!(find("bat").unwrap(), None);
        let both = find(&ID[..12]).unwrap_err().to_string();
        assert!(both.contains(ID) && both.contains(&other), "{both}");
    }
}
