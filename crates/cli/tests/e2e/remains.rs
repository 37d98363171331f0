//! What a platform leaves behind: processes, cgroups, mounts.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::platform;

/// How many user ids from its base on a platform may use.
const UIDS: u32 = 30_000;

/// Processes that belong to a platform: that name its directory (if given) in their arguments,
/// are in its cgroup, or have a user id of its sandboxes.
pub fn processes(directory: Option<&Path>, cgroup: &str, uid_base: u32) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap() {
        let Ok(pid) = entry.unwrap().file_name().to_string_lossy().parse::<i32>() else { continue };
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let status = String::from_utf8(read("status")).unwrap_or_default();
        // A process that is dead and not yet buried is no process any more.
        if status.contains("\nState:\tZ") || status.contains("\nState:\tX") {
            continue;
        }
        let uid = status.lines().find_map(|line| {
            line.strip_prefix("Uid:")?.split_whitespace().next()?.parse::<u32>().ok()
        });
        let arguments = String::from_utf8_lossy(&read("cmdline")).into_owned();
        let cgroups = String::from_utf8_lossy(&read("cgroup")).into_owned();
        let named = directory.is_some_and(|d| arguments.contains(d.to_str().unwrap()));
        let inside = cgroups.lines().any(|line| line.split(['/', ':']).any(|part| part == cgroup));
        let is_its_user = uid.is_some_and(|uid| (uid_base..uid_base + UIDS).contains(&uid));
        if named || inside || is_its_user {
            found.push(pid);
        }
    }
    found
}

/// The platform's cgroup directories, in whatever hierarchies there are.
pub fn cgroups(cgroup: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut found = Vec::new();
    for line in mounts.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        if fields[2].starts_with("cgroup") {
            found.extend(Some(Path::new(fields[1]).join(cgroup)).filter(|path| path.exists()));
        }
    }
    found
}

/// What is mounted below a directory.
fn mounts(directory: &Path) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let targets = text.lines().filter_map(|line| line.split(' ').nth(4));
    targets.filter(|target| Path::new(target).starts_with(directory)).map(str::to_owned).collect()
}

/// Asserts that a platform that has ended left nothing.
#[track_caller]
pub fn assert_none(directory: &Path, cgroup: &str, uid_base: u32) {
    // A process leaves its cgroup a moment before it is gone.
    let mut left = Vec::new();
    platform::eventually(|| {
        left = processes(Some(directory), cgroup, uid_base);
        left.is_empty()
    });
    let names: Vec<_> = left
        .iter()
        .map(|pid| (pid, fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()))
        .collect();
    assert!(names.is_empty(), "processes are left: {names:?}");
    assert_eq!(cgroups(cgroup), Vec::<PathBuf>::new(), "cgroups are left");
    // What the test mounted there itself is not the platform's.
    let left: Vec<_> =
        mounts(directory).into_iter().filter(|target| !target.ends_with("/data")).collect();
    assert_eq!(left, Vec::<String>::new(), "mounts are left");
}

/// Removes whatever a platform left.
pub fn clear_away(directory: &Path, cgroup: &str, uid_base: u32) {
    for _ in 0..500 {
        let left = processes(Some(directory), cgroup, uid_base);
        if left.is_empty() {
            break;
        }
        for pid in left {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    for root in cgroups(cgroup) {
        for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                let _ = fs::remove_dir(entry.path());
            }
        }
        let _ = fs::remove_dir(root);
    }
    for target in mounts(directory) {
        let _ = nix::mount::umount2(target.as_str(), nix::mount::MntFlags::MNT_DETACH);
    }
}
