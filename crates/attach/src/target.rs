//! What can be attached, and which processes that means.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::container;
use crate::processes;

/// What somebody wants to attach.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// A process and all that descend from it.
    Pid(i32),
    /// A cgroup: its directory, or its path below the mount point.
    Cgroup(PathBuf),
    /// A container of containerd, Docker, Podman or another engine that starts containers with
    /// runc or crun: its identifier, the beginning of it, or a name that the engine's command knows.
    Container(String),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "process {pid}"),
            Self::Cgroup(path) => write!(f, "cgroup {}", path.display()),
            Self::Container(id) => write!(f, "container {id}"),
        }
    }
}

/// A target can't be attached. Nothing has been touched.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// No such process.
    #[error("there is no process {0}")]
    NoProcess(i32),
    /// No such cgroup.
    #[error("there is no cgroup {}: give its directory, or its path below /sys/fs/cgroup", .0.display())]
    NoCgroup(PathBuf),
    /// No such container.
    #[error(
        "there is no running container {0}: looked at what containerd, Docker, Podman, CRI-O, runc \
         and crun keep of theirs, and for a cgroup of that name; --pid with its first process, or \
         --cgroup, take it too"
    )]
    NoContainer(String),
    /// A name, or the beginning of an identifier, that several have: it, and theirs.
    #[error("{0} may be any of the containers {1}: give the identifier")]
    Ambiguous(String, String),
    /// Somebody has frozen it already.
    #[error(
        "{0} is paused ({path}): unpause it first, with what paused it (docker unpause, podman \
         unpause, ctr task resume)", path = .1.display()
    )]
    Paused(Target, PathBuf),
    /// Nothing in it.
    #[error("there is no process in {0}")]
    Empty(Target),
    /// The whole host.
    #[error("{0} holds all of the host: attach one service or container of it")]
    WholeHost(Target),
    /// One of its processes must not be stopped.
    #[error("process {pid} of {target} must go on: {why}")]
    Untouchable {
        /// What was to be attached.
        target: Target,
        /// The process.
        pid: i32,
        /// Why it can't be.
        why: &'static str,
    },
    /// The host has no version 2 hierarchy to freeze in.
    #[error(
        "no cgroup version 2 hierarchy is mounted, which freezing needs: boot with it, or \
         mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
    )]
    NoUnified,
}

/// What a target comes to on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    /// A process and its descendants.
    Tree(i32),
    /// A directory of the version 2 hierarchy, which can be frozen as it is.
    Unified(PathBuf),
    /// A directory of a version 1 hierarchy.
    Legacy(PathBuf),
}

impl Selection {
    /// The processes that it means now.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let all = match self {
            Self::Tree(root) => processes::tree(*root),
            Self::Unified(directory) | Self::Legacy(directory) => processes::in_cgroup(directory),
        };
        all.into_iter().filter(|pid| processes::is_alive(*pid)).collect()
    }
}

impl Target {
    /// Finds out what is meant.
    ///
    /// # Errors
    /// [`TargetError`] when there is no such thing.
    pub(crate) fn select(&self) -> Result<Selection, TargetError> {
        let (unified, others) = processes::cgroup_mounts();
        let unified = unified.ok_or(TargetError::NoUnified)?;
        match self {
            Self::Pid(pid) if *pid > 0 && processes::is_alive(*pid) => Ok(Selection::Tree(*pid)),
            Self::Pid(pid) => Err(TargetError::NoProcess(*pid)),
            Self::Cgroup(path) => {
                let below = path.strip_prefix("/").unwrap_or(path);
                let legacy = others.iter().map(|(mount, _)| mount);
                let directory = if path.starts_with(&unified)
                    || legacy.clone().any(|m| path.starts_with(m))
                {
                    Some(path.clone())
                } else {
                    let mounts = std::iter::once(&unified).chain(legacy.clone());
                    mounts.map(|mount| mount.join(below)).find(|d| d.join("cgroup.procs").exists())
                };
                let directory = directory.filter(|d| d.join("cgroup.procs").exists());
                let directory = directory.ok_or_else(|| TargetError::NoCgroup(path.clone()))?;
                // The innermost mount: a version 1 hierarchy may lie below the other's mount point.
                let in_legacy = legacy.clone().any(|m| directory.starts_with(m))
                    && !(directory.starts_with(&unified)
                        && legacy
                            .clone()
                            .all(|m| !directory.starts_with(m) || unified.starts_with(m)));
                if directory == unified || legacy.clone().any(|mount| *mount == directory) {
                    return Err(TargetError::WholeHost(self.clone()));
                }
                Ok(if in_legacy {
                    Selection::Legacy(directory)
                } else {
                    Selection::Unified(directory)
                })
            }
            Self::Container(id) => container::select(id, &unified, &others),
        }
    }

    /// Refuses what somebody has frozen: tracing would wait for it, and thawing is not ours to do.
    ///
    /// # Errors
    /// [`TargetError::Paused`].
    pub(crate) fn check_running(&self, pids: &[i32]) -> Result<(), TargetError> {
        match pids.iter().find_map(|pid| frozen_by(*pid)) {
            Some(cgroup) => Err(TargetError::Paused(self.clone(), cgroup)),
            None => Ok(()),
        }
    }

    /// Refuses what must not be stopped: the host's first process, the kernel's threads, this
    /// program, and `asker` with all that wait for it.
    ///
    /// # Errors
    /// [`TargetError::Untouchable`], or that there is nothing.
    pub(crate) fn check(&self, pids: &[i32], asker: i32) -> Result<(), TargetError> {
        if pids.is_empty() {
            return Err(TargetError::Empty(self.clone()));
        }
        let asking = processes::lineage(asker);
        let refuse = |pid, why| Err(TargetError::Untouchable { target: self.clone(), pid, why });
        for pid in pids.iter().copied() {
            let above = processes::lineage(pid);
            if pid == 1 {
                return refuse(pid, "it is the host's first process");
            }
            if processes::is_kernel_thread(pid) {
                return refuse(pid, "it is a thread of the kernel");
            }
            if asking.contains(&pid) {
                return refuse(pid, "it is, or has started, the command that asks for this");
            }
            if processes::is_own_program(pid) {
                return refuse(pid, "it is a part of Medes, which others' memory depends on");
            }
            if above[1..].iter().any(|pid| *pid != 1 && processes::is_own_program(*pid)) {
                return refuse(pid, "it belongs to a platform: `medes dedup` does that");
            }
        }
        Ok(())
    }
}

/// The cgroup that keeps a process from running, in whichever hierarchy: its own or one above.
pub(crate) fn frozen_by(pid: i32) -> Option<PathBuf> {
    let (unified, others) = processes::cgroup_mounts();
    processes::cgroups(pid).into_iter().find_map(|(controllers, path)| {
        let (mount, file, frozen) = if controllers.is_empty() {
            (unified.as_ref()?, "cgroup.freeze", &["1"][..])
        } else {
            let is_freezer = |list: &str| list.split(',').any(|one| one == "freezer");
            let (mount, _) = others.iter().find(|(_, options)| is_freezer(options))?;
            is_freezer(&controllers).then_some(())?;
            (mount, "freezer.state", &["FROZEN", "FREEZING"][..])
        };
        let own = directory(mount, &path)?;
        let is_frozen = |directory: &&Path| {
            let state = std::fs::read_to_string(directory.join(file)).unwrap_or_default();
            frozen.contains(&state.trim())
        };
        own.ancestors().take_while(|d| d.starts_with(mount)).find(is_frozen).map(Path::to_path_buf)
    })
}

/// A cgroup's path below its mount point, as `/proc/PID/cgroup` says it, as a directory.
pub(crate) fn directory(mount: &Path, path: &str) -> Option<PathBuf> {
    // Outside of what this process can see.
    if path.starts_with("/..") {
        return None;
    }
    Some(mount.join(path.trim_start_matches('/')))
}
