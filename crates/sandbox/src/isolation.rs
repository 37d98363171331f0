//! Checks from outside that a running sandbox is as confined as it should be.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

use crate::spec::SANDBOX_UID;

/// The namespaces that a sandbox does not share with its maker, by their names in `/proc/PID/ns`.
const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// What the kernel says about a process's confinement (`/proc/PID`, proc(5)).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Isolation {
    /// Namespaces that the process shares with the caller.
    pub shared_namespaces: Vec<&'static str>,
    /// Real, effective, saved and file system user, as the caller's user namespace numbers them.
    pub uids: Vec<u32>,
    /// The same for the group.
    pub gids: Vec<u32>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// All capability sets together (inheritable, permitted, effective, bounding, ambient).
    pub capabilities: u64,
    /// Whether new privileges are given up for good.
    pub no_new_privileges: bool,
    /// Whether a system call filter is installed.
    pub filtered: bool,
    /// The user map: first user inside, first outside, count.
    pub user_map: Vec<(u32, u32, u32)>,
    /// Mount points that are not read-only.
    pub writable_mounts: Vec<PathBuf>,
}

/// One way in which a process is less confined than a sandbox has to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Weakness {
    /// It is in one of the caller's own namespaces.
    SharedNamespace(&'static str),
    /// It runs as root, or its users differ.
    User(Vec<u32>),
    /// It has supplementary groups.
    Groups(Vec<u32>),
    /// It has or can get these capabilities.
    Capabilities(u64),
    /// Executing a set-user-id program would raise its privileges.
    NewPrivileges,
    /// It may make any system call.
    Unfiltered,
    /// More users than its own exist in its user namespace.
    UserMap(Vec<(u32, u32, u32)>),
    /// It can write where it should not.
    WritableMount(PathBuf),
}

impl fmt::Display for Weakness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SharedNamespace(name) => write!(f, "it shares the host's {name} namespace"),
            Self::User(uids) => write!(f, "it runs as the host's users {uids:?}"),
            Self::Groups(groups) => write!(f, "it has the supplementary groups {groups:?}"),
            Self::Capabilities(set) => write!(f, "it has the capabilities {set:#x}"),
            Self::NewPrivileges => f.write_str("it can gain privileges by executing a program"),
            Self::Unfiltered => f.write_str("its system calls are not filtered"),
            Self::UserMap(map) => write!(f, "its user map is {map:?}"),
            Self::WritableMount(path) => write!(f, "it can write to {}", path.display()),
        }
    }
}

impl Isolation {
    /// Reads the state of the process `pid`.
    ///
    /// # Errors
    /// If the process is gone or the caller may not look.
    pub fn of(pid: i32) -> io::Result<Self> {
        let mut shared_namespaces = Vec::new();
        for name in NAMESPACES {
            let theirs = fs::read_link(format!("/proc/{pid}/ns/{name}"))?;
            if theirs == fs::read_link(format!("/proc/self/ns/{name}"))? {
                shared_namespaces.push(name);
            }
        }
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
        Ok(Self {
            shared_namespaces,
            ..Self::parse(&read("status")?, &read("uid_map")?, &read("mountinfo")?)
        })
    }

    fn parse(status: &str, uid_map: &str, mountinfo: &str) -> Self {
        let value = |key: &str| {
            status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':')).unwrap_or("").trim()
        };
        let capabilities = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]
            .iter()
            // What can't be read counts as everything.
            .fold(0, |all, key| all | u64::from_str_radix(value(key), 16).unwrap_or(u64::MAX));
        let user_map = uid_map
            .lines()
            .filter_map(|l| match numbers(l)[..] {
                [inside, outside, count] => Some((inside, outside, count)),
                _ => None,
            })
            .collect();
        let writable_mounts = mountinfo
            .lines()
            .filter_map(|l| {
                let mut fields = l.split(' ').skip(4);
                let (path, options) = (fields.next()?, fields.next()?);
                (!options.split(',').any(|o| o == "ro")).then(|| path.into())
            })
            .collect();
        Self {
            shared_namespaces: Vec::new(),
            uids: numbers(value("Uid")),
            gids: numbers(value("Gid")),
            groups: numbers(value("Groups")),
            capabilities,
            no_new_privileges: value("NoNewPrivs") == "1",
            filtered: value("Seccomp") == "2",
            user_map,
            writable_mounts,
        }
    }

    /// Everything that is not as it should be for a sandbox whose user is `host_uid` outside, and
    /// which may write to `/tmp` and `/dev/shm` only. Empty for one made by
    /// [`crate::Sandbox::create`] with read-only mounts and a system call filter.
    #[must_use]
    pub fn weaknesses(&self, host_uid: u32) -> Vec<Weakness> {
        let mut found: Vec<Weakness> =
            self.shared_namespaces.iter().map(|n| Weakness::SharedNamespace(n)).collect();
        for ids in [&self.uids, &self.gids] {
            if ids[..] != [host_uid; 4] {
                found.push(Weakness::User(ids.clone()));
            }
        }
        if !self.groups.is_empty() {
            found.push(Weakness::Groups(self.groups.clone()));
        }
        if self.capabilities != 0 {
            found.push(Weakness::Capabilities(self.capabilities));
        }
        if !self.no_new_privileges {
            found.push(Weakness::NewPrivileges);
        }
        if !self.filtered {
            found.push(Weakness::Unfiltered);
        }
        if self.user_map != [(SANDBOX_UID, host_uid, 1)] {
            found.push(Weakness::UserMap(self.user_map.clone()));
        }
        // Writing to /proc is a matter of each file's own permissions.
        let writable = self.writable_mounts.iter().filter(|path| {
            !["/tmp", "/dev/shm", "/proc"].iter().any(|allowed| path.as_os_str() == *allowed)
                && !path.starts_with("/proc")
        });
        found.extend(writable.cloned().map(Weakness::WritableMount));
        found
    }
}

fn numbers(text: &str) -> Vec<u32> {
    text.split_whitespace().filter_map(|n| n.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFINED: &str = "Name:\tx\nUid:\t7\t7\t7\t7\nGid:\t7\t7\t7\t7\nGroups:\t \n\
        CapInh:\t0000000000000000\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n\
        CapBnd:\t0000000000000000\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n";
    const MOUNTS: &str = "9 1 0:1 / / ro,nosuid - tmpfs tmpfs rw\n\
        10 9 0:2 / /tmp rw,nosuid - tmpfs tmpfs rw\n";

    #[test]
    fn a_confined_process_has_no_weakness() {
        let i = Isolation::parse(CONFINED, " 1000 7 1\n", MOUNTS);
        assert_eq!(i.weaknesses(7), []);
    }

    #[test]
    fn each_weakness_is_found() {
        let weak = |status: &str, map: &str, mounts: &str| {
            Isolation::parse(status, map, mounts).weaknesses(7)
        };
        let changed = |from: &str, to: &str| weak(&CONFINED.replace(from, to), "1000 7 1", MOUNTS);
        assert_eq!(
            changed("CapBnd:\t0000000000000000", "CapBnd:\t0000000000000400"),
            [Weakness::Capabilities(0x400)]
        );
        assert_eq!(changed("Uid:\t7", "Uid:\t0"), [Weakness::User(vec![0, 7, 7, 7])]);
        assert_eq!(changed("Groups:\t ", "Groups:\t4 "), [Weakness::Groups(vec![4])]);
        assert_eq!(changed("NoNewPrivs:\t1", "NoNewPrivs:\t0"), [Weakness::NewPrivileges]);
        assert_eq!(changed("Seccomp:\t2", "Seccomp:\t0"), [Weakness::Unfiltered]);
        assert_eq!(
            weak(CONFINED, "0 0 4294967295", MOUNTS),
            [Weakness::UserMap(vec![(0, 0, u32::MAX)])]
        );
        assert_eq!(
            weak(CONFINED, "1000 7 1", "9 1 0:1 / /usr rw - ext4 x rw"),
            [Weakness::WritableMount("/usr".into())]
        );
    }
}
