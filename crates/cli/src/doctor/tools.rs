//! What else is installed: runtimes, container engines, CRIU, libfabric.

use std::path::Path;
use std::process::Command;

use super::Check;
use super::Verdict::{Note, Warn};
use crate::config::Config;
use crate::runtime_install::{available, installed};

/// All checks of this module.
pub fn checks(config: &Config) -> Vec<Check> {
    vec![runtimes(config), engines(), criu(), libfabric()]
}

fn runtimes(config: &Config) -> Check {
    let records = installed(&config.node.data_dir.join("runtimes"));
    if !records.is_empty() {
        let list: Vec<_> = records.iter().map(|r| format!("{} ({})", r.name, r.version)).collect();
        return Check::ok("runtimes", list.join(", "));
    }
    let (found, remedy) = match available().last() {
        Some((name, ..)) => ("none installed".to_owned(), format!("medes runtime install {name}")),
        None => (
            "none installed, and no Python 3.10 or newer in $PATH".to_owned(),
            "apt-get install python3 python3-pip, then `medes runtime install`".to_owned(),
        ),
    };
    Check::not(Warn, "runtimes", found, "no function can be started", &remedy)
}

/// An engine's name, the command that says its version, its socket if it has one, and what
/// `medes attach --container` takes.
const ENGINES: [(&str, &str, &[&str], &str); 4] = [
    ("Docker", "dockerd", &["/run/docker.sock"], "by name or identifier"),
    ("Podman", "podman", &["/run/podman/podman.sock"], "by name or identifier"),
    (
        "containerd",
        "containerd",
        &["/run/containerd/containerd.sock", "/run/docker/containerd/containerd.sock"],
        "by identifier",
    ),
    ("CRI-O", "crio", &["/run/crio/crio.sock"], "by identifier"),
];

fn engines() -> Check {
    let describe = |(name, command, sockets, takes): &(&str, &str, &[&str], &str)| {
        let listens = sockets.iter().find(|socket| Path::new(socket).exists());
        let version = first_line(command, &["--version"]);
        let version = version.as_deref().map(version_number);
        let place = match (listens, version) {
            (None, None) => return None,
            (Some(socket), None) => socket.to_string(),
            (Some(socket), Some(version)) => format!("{version}, {socket}"),
            (None, Some(version)) => format!("{version}, no socket at its usual place"),
        };
        Some(format!("{name} ({place}; attach {takes})"))
    };
    let found: Vec<_> = ENGINES.iter().filter_map(describe).collect();
    if found.is_empty() {
        return Check::not(Note, "containers", "no engine", "", "");
    }
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    if mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup2")) {
        return Check::ok("containers", found.join(", "));
    }
    Check::not(
        Warn,
        "containers",
        found.join(", "),
        "no container can be attached: no cgroup version 2 hierarchy is mounted",
        "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
    )
}

/// The number in what a command says of its version, or all of that.
fn version_number(said: &str) -> &str {
    let is_number = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
    said.split([' ', ',']).find(is_number).unwrap_or(said)
}

fn criu() -> Check {
    match first_line("criu", &["--version"]) {
        Some(version) => match Command::new("criu").arg("check").output() {
            Ok(out) if out.status.success() => Check::ok("CRIU", version),
            _ => Check::not(Note, "CRIU", format!("{version}, does not work here"), "", ""),
        },
        None => Check::not(Note, "CRIU", "not installed (only used for comparison)", "", ""),
    }
}

fn libfabric() -> Check {
    let Some(list) = output("fi_info", &["-l"]) else {
        return Check::not(
            Note,
            "libfabric",
            "fi_info is not installed",
            "",
            "apt-get install libfabric-bin shows which providers there are",
        );
    };
    let providers: Vec<_> =
        list.lines().filter_map(|l| l.strip_suffix(':')).map(str::trim).collect();
    let verbs = providers.iter().any(|p| matches!(*p, "verbs" | "efa"));
    let kind = if verbs { "with RDMA" } else { "without RDMA" };
    Check::ok("libfabric", format!("{} ({kind})", providers.join(", ")))
}

fn output(command: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(command).args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn first_line(command: &str, args: &[&str]) -> Option<String> {
    output(command, args)?.lines().next().map(|l| l.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::version_number;

    #[test]
    fn versions_are_told_in_many_ways() {
        for (said, number) in [
            ("Docker version 20.10.24+dfsg1, build 5d6db84", "20.10.24+dfsg1"),
            ("podman version 4.3.1", "4.3.1"),
            ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1", "1.6.20~ds1"),
            ("who knows", "who knows"),
        ] {
            assert_eq!(version_number(said), number);
        }
    }
}
