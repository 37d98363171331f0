//! Which cgroup hierarchies this machine has, and where its controllers are.

use std::path::{Path, PathBuf};

use super::{CgroupError, read};

/// Where the controllers are that sandboxes need.
///
/// Freezing and killing always go through the version 2 hierarchy: a task frozen there can still
/// be traced and dies at once, one frozen by version 1 can't and doesn't. Limits go wherever the
/// controller is; `None` stands for version 2.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Hierarchies {
    /// Mount point of the version 2 hierarchy.
    pub unified: PathBuf,
    pub memory: Option<PathBuf>,
    pub pids: Option<PathBuf>,
    pub cpu: Option<PathBuf>,
}

impl Hierarchies {
    /// Looks at this process's mounts.
    pub fn detect() -> Result<Self, CgroupError> {
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        Self::parse(&mounts, |unified| read(&unified.join("cgroup.controllers")))
    }

    /// Reads `mountinfo` (proc_pid_mountinfo(5)); `controllers` gives the contents of
    /// `cgroup.controllers` of the version 2 hierarchy at a mount point.
    fn parse(
        mountinfo: &str,
        controllers: impl Fn(&Path) -> Result<String, CgroupError>,
    ) -> Result<Self, CgroupError> {
        let mut unified = None;
        let mut v1: Vec<(PathBuf, Vec<&str>)> = Vec::new();
        for line in mountinfo.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let Some(mount_point) = before.split(' ').nth(4).map(unescape) else { continue };
            let mut after = after.split(' ');
            match (after.next(), after.nth(1)) {
                (Some("cgroup2"), _) => unified = unified.or(Some(mount_point)),
                (Some("cgroup"), Some(options)) => {
                    v1.push((mount_point, options.split(',').collect()));
                }
                _ => {}
            }
        }
        let unified = unified.ok_or(CgroupError::NoUnifiedHierarchy)?;
        let in_v2 = controllers(&unified)?;
        let find = |name: &'static str| {
            if in_v2.split_whitespace().any(|c| c == name) {
                return Ok(None);
            }
            v1.iter()
                .find(|(_, options)| options.contains(&name))
                .map(|(path, _)| Some(path.clone()))
                .ok_or(CgroupError::NoController { name })
        };
        Ok(Self { memory: find("memory")?, pids: find("pids")?, cpu: find("cpu")?, unified })
    }

    /// The controllers that are in the version 2 hierarchy.
    pub fn unified_controllers(&self) -> impl Iterator<Item = &'static str> {
        [("memory", &self.memory), ("pids", &self.pids), ("cpu", &self.cpu)]
            .into_iter()
            .filter(|(_, v1)| v1.is_none())
            .map(|(name, _)| name)
    }

    /// Mount points of the version 1 hierarchies in use, each once (`cpu` and `cpuacct` are often
    /// one).
    pub fn v1(&self) -> Vec<&Path> {
        let mut all: Vec<&Path> =
            [&self.memory, &self.pids, &self.cpu].into_iter().flatten().map(|p| &**p).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// Undoes the octal escapes that the kernel puts for blanks and backslashes.
fn unescape(field: &str) -> PathBuf {
    let mut out = String::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|d| u8::from_str_radix(d, 8).ok());
        match code {
            Some(c) => {
                out.push(char::from(c));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const PURE: &str =
        "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn pure_version_2() {
        let h = Hierarchies::parse(PURE, |_| Ok("cpuset cpu io memory hugetlb pids rdma\n".into()))
            .unwrap();
        assert_eq!(h.unified, Path::new("/sys/fs/cgroup"));
        assert_eq!(h.v1(), Vec::<&Path>::new());
        assert_eq!(h.unified_controllers().collect::<Vec<_>>(), ["memory", "pids", "cpu"]);
    }

    #[test]
    fn hybrid() {
        let h = Hierarchies::parse(HYBRID, |p| {
            assert_eq!(p, Path::new("/sys/fs/cgroup/unified"));
            Ok("hugetlb\n".into())
        })
        .unwrap();
        assert_eq!(h.memory.as_deref(), Some(Path::new("/sys/fs/cgroup/memory")));
        assert_eq!(h.cpu.as_deref(), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(h.v1().len(), 3);
        assert_eq!(h.unified_controllers().count(), 0);
    }

    #[test]
    fn controllers_divided_between_the_versions() {
        let h = Hierarchies::parse(HYBRID, |_| Ok("pids".into())).unwrap();
        assert_eq!(h.pids, None);
        assert_eq!(h.v1().len(), 2);
    }

    #[test]
    fn what_is_missing_is_named() {
        let v1_only = HYBRID.lines().filter(|l| !l.contains("cgroup2")).collect::<Vec<_>>();
        let e = Hierarchies::parse(&v1_only.join("\n"), |_| unreachable!()).unwrap_err();
        assert!(e.to_string().contains("mount -t cgroup2"), "{e}");
        let e = Hierarchies::parse(PURE, |_| Ok("cpu pids".into())).unwrap_err();
        assert!(e.to_string().contains("memory"), "{e}");
    }

    #[test]
    fn blanks_in_mount_points() {
        assert_eq!(unescape(r"/a\040b\134c"), Path::new(r"/a b\c"));
        assert_eq!(unescape(r"/a\9\"), Path::new(r"/a\9\"));
    }
}
