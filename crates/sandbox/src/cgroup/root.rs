//! One platform instance's part of the cgroup tree.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use super::hierarchy::Hierarchies;
use super::{
    Cgroup, CgroupError, MemoryReading, make_dir, read, remove_dir, write, write_if_present,
};
use crate::spec::{Resources, is_plain_name};

/// The directory below which an instance makes its sandboxes' cgroups, in every hierarchy it
/// needs. It lies at the top of the hierarchy, beside those of the host's services, so that it
/// does not end when the platform's own service does.
#[derive(Clone, Debug)]
pub struct CgroupRoot {
    name: String,
    hierarchies: Hierarchies,
}

impl CgroupRoot {
    /// Makes the directories of the instance `name`, or takes those that are there.
    ///
    /// # Errors
    /// If the machine's cgroups lack something (the message says what and how to get it), or if
    /// the caller is not root.
    pub fn new(name: &str) -> Result<Self, CgroupError> {
        if !is_plain_name(name) {
            return Err(CgroupError::BadName(name.to_owned()));
        }
        let root = Self { name: name.to_owned(), hierarchies: Hierarchies::detect()? };
        for mount_point in root.hierarchies.v1() {
            let dir = mount_point.join(name);
            make_dir(&dir)?;
            // Needed before Linux 5.11, ignored since.
            write_if_present(&dir.join("memory.use_hierarchy"), "1").ok();
        }
        let unified = root.hierarchies.unified.join(name);
        make_dir(&unified)?;
        let enable: String =
            root.hierarchies.unified_controllers().map(|c| format!("+{c} ")).collect();
        if !enable.is_empty() {
            enable_controllers(&root.hierarchies.unified, &enable)?;
            write(&unified.join("cgroup.subtree_control"), &enable)?;
        }
        Ok(root)
    }

    /// The instance's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cgroup of the sandbox `id`, whether it exists or not.
    ///
    /// # Errors
    /// [`CgroupError::BadName`] if `id` can't be a cgroup's name.
    pub fn get(&self, id: &str) -> Result<Cgroup, CgroupError> {
        if !is_plain_name(id) {
            return Err(CgroupError::BadName(id.to_owned()));
        }
        let dir = |mount_point: &Path| mount_point.join(&self.name).join(id);
        let h = &self.hierarchies;
        Ok(Cgroup {
            unified: dir(&h.unified),
            memory: h.memory.as_deref().map(dir),
            pids: h.pids.as_deref().map(dir),
            cpu: h.cpu.as_deref().map(dir),
        })
    }

    /// What all sandboxes of the instance together are charged for: one reading, however many there
    /// are. Memory that outlives its sandbox for a moment is part of it.
    ///
    /// # Errors
    /// If the instance's cgroup is gone.
    pub fn memory(&self) -> Result<MemoryReading, CgroupError> {
        let h = &self.hierarchies;
        match &h.memory {
            None => MemoryReading::read_v2(&h.unified.join(&self.name)),
            Some(mount_point) => MemoryReading::read_v1(&mount_point.join(&self.name)),
        }
    }

    /// Makes the cgroup of the sandbox `id` with its limits.
    ///
    /// # Errors
    /// If it exists (a cgroup that is not empty would be shared by accident), or the kernel
    /// refuses. Nothing is left in that case.
    pub fn create(&self, id: &str, resources: &Resources) -> Result<Cgroup, CgroupError> {
        let cgroup = self.get(id)?;
        fs::create_dir(&cgroup.unified)
            .map_err(CgroupError::io("making the cgroup", &cgroup.unified))?;
        let made = cgroup
            .dirs()
            .into_iter()
            .try_for_each(make_dir)
            .and_then(|()| cgroup.set_resources(resources));
        if let Err(e) = made {
            cgroup.remove(Duration::ZERO).ok();
            return Err(e);
        }
        Ok(cgroup)
    }

    /// The names of the sandboxes that have a cgroup in any hierarchy.
    ///
    /// # Errors
    /// If a directory can't be read.
    pub fn list(&self) -> Result<BTreeSet<String>, CgroupError> {
        let mut names = BTreeSet::new();
        for mount_point in self.mount_points() {
            let dir = mount_point.join(&self.name);
            let entries = match fs::read_dir(&dir) {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                other => other.map_err(CgroupError::io("listing", &dir))?,
            };
            for entry in entries {
                let entry = entry.map_err(CgroupError::io("listing", &dir))?;
                if entry.file_type().is_ok_and(|t| t.is_dir())
                    && let Ok(name) = entry.file_name().into_string()
                {
                    names.insert(name);
                }
            }
        }
        Ok(names)
    }

    /// Kills every process below this root and removes the sandboxes' cgroups, as after a crash.
    /// `limit` is the time for each sandbox. Goes on after a failure and returns the first.
    ///
    /// # Errors
    /// If a process can't be killed or a directory can't be removed.
    pub fn remove_all(&self, limit: Duration) -> Result<(), CgroupError> {
        let mut first = Ok(());
        for id in self.list()? {
            // A crash may have left a sandbox in some of the hierarchies only.
            let result = self.get(&id).and_then(|cgroup| {
                cgroup.kill(limit)?;
                cgroup.remove(limit)
            });
            first = first.and(result);
        }
        first
    }

    /// Removes the instance's own directories, which must hold no sandbox any more.
    ///
    /// # Errors
    /// If sandboxes are left.
    pub fn remove(&self) -> Result<(), CgroupError> {
        self.mount_points()
            .iter()
            .try_for_each(|m| remove_dir(&m.join(&self.name), Duration::from_secs(1)))
    }

    fn mount_points(&self) -> Vec<&Path> {
        let mut all = self.hierarchies.v1();
        all.push(&self.hierarchies.unified);
        all
    }
}

/// Enables controllers for the children of the cgroup at `top`.
///
/// The host's root cgroup may do that while it holds processes. The root that a container sees is
/// an ordinary cgroup, which must hold none; then its processes are moved to a child `init` first.
fn enable_controllers(top: &Path, enable: &str) -> Result<(), CgroupError> {
    let control = top.join("cgroup.subtree_control");
    let busy = match write(&control, enable) {
        Err(CgroupError::Io { source, .. }) if source.kind() == ErrorKind::ResourceBusy => source,
        other => return other,
    };
    let init = top.join("init");
    make_dir(&init)?;
    // Processes are born while others are moved.
    for _ in 0..8 {
        let procs = read(&top.join("cgroup.procs"))?;
        for pid in procs.lines() {
            // Those that died meanwhile, and kernel threads, can't be moved.
            write(&init.join("cgroup.procs"), pid).ok();
        }
        if write(&control, enable).is_ok() {
            return Ok(());
        }
    }
    Err(CgroupError::io("enabling controllers for the children of", top)(busy))
}
