//! What `/proc` says of processes.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// One line of `/proc/PID/status`.
fn status_field(status: &str, name: &str) -> Option<String> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

fn status(pid: i32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/status")).ok()
}

/// Whether there is such a process, dead ones that wait for their parent left out.
pub(crate) fn is_alive(pid: i32) -> bool {
    let state = status(pid).and_then(|status| status_field(&status, "State"));
    state.is_some_and(|state| !state.starts_with(['Z', 'X']))
}

/// Whether it is a thread of the kernel's: one without an address space.
pub(crate) fn is_kernel_thread(pid: i32) -> bool {
    status(pid).is_some_and(|status| {
        let state = status_field(&status, "State").unwrap_or_default();
        status_field(&status, "VmSize").is_none() && !state.starts_with(['Z', 'X'])
    })
}

/// The process's parent, 0 if it has none here.
pub(crate) fn parent(pid: i32) -> Option<i32> {
    status_field(&status(pid)?, "PPid")?.parse().ok()
}

/// The user that the process runs as, as the host sees it.
pub(crate) fn user(pid: i32) -> Option<u32> {
    status_field(&status(pid)?, "Uid")?.split_whitespace().nth(1)?.parse().ok()
}

/// The process's program, by its path in the process's own root.
pub(crate) fn program(pid: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// Whether the process runs the same program file as this one.
pub(crate) fn is_own_program(pid: i32) -> bool {
    let file = |pid: &str| {
        let file = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
        Some((file.dev(), file.ino()))
    };
    file("self").is_some_and(|own| file(&pid.to_string()) == Some(own))
}

/// The process and its ancestors.
pub(crate) fn lineage(pid: i32) -> Vec<i32> {
    let mut all = vec![pid];
    while let Some(parent) = all.last().and_then(|last| parent(*last))
        && parent > 0
        && !all.contains(&parent)
    {
        all.push(parent);
    }
    all
}

/// The process and all that descend from it, as far as they are alive.
pub(crate) fn tree(root: i32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for pid in all() {
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut next = vec![root];
    while let Some(pid) = next.pop() {
        if seen.insert(pid) {
            next.extend(children.get(&pid).into_iter().flatten());
            if is_alive(pid) {
                found.push(pid);
            }
        }
    }
    found.sort_unstable();
    found
}

/// All processes that are listed.
pub(crate) fn all() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The process's cgroups: controllers (empty in version 2) and path.
pub(crate) fn cgroups(pid: i32) -> Vec<(String, String)> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let fields = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some((controllers.to_owned(), path.to_owned()))
    };
    text.lines().filter_map(fields).collect()
}

/// The processes in a cgroup directory and those below it.
pub(crate) fn in_cgroup(directory: &Path) -> Vec<i32> {
    let mut found = Vec::new();
    let mut next = vec![directory.to_path_buf()];
    while let Some(directory) = next.pop() {
        let procs = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        found.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|p| *p > 0));
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        next.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Mount points of the cgroup hierarchies: of version 2, and of version 1 with their options.
pub(crate) fn cgroup_mounts() -> (Option<PathBuf>, Vec<(PathBuf, String)>) {
    let (mut unified, mut others) = (None, Vec::new());
    for line in fs::read_to_string("/proc/self/mounts").unwrap_or_default().lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        match fields.as_slice() {
            [_, at, "cgroup2", ..] => unified = unified.or(Some(PathBuf::from(at))),
            [_, at, "cgroup", options, ..] => others.push((PathBuf::from(at), (*options).into())),
            _ => {}
        }
    }
    (unified, others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_where_it_is() {
        let own = std::process::id() as i32;
        assert!(is_alive(own) && !is_kernel_thread(own) && is_own_program(own));
        assert!(tree(own).contains(&own));
        let lineage = lineage(own);
        assert_eq!(lineage[0], own);
        assert!(lineage.len() > 1);
        assert!(!cgroups(own).is_empty());
        assert!(!is_alive(i32::MAX));
    }
}
