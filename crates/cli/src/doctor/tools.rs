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

fn engines() -> Check {
    let sockets = [
        ("Docker", "/run/docker.sock"),
        ("containerd", "/run/containerd/containerd.sock"),
        ("Podman", "/run/podman/podman.sock"),
        ("CRI-O", "/run/crio/crio.sock"),
    ];
    let running: Vec<_> =
        sockets.iter().filter(|(_, s)| Path::new(s).exists()).map(|(n, _)| *n).collect();
    let there: Vec<_> = ["docker", "podman", "ctr", "crictl", "nerdctl"]
        .into_iter()
        .filter(|c| in_path(c))
        .collect();
    match (running.is_empty(), there.is_empty()) {
        (false, _) => Check::ok("containers", format!("{} running", running.join(", "))),
        (true, false) => Check::not(
            Note,
            "containers",
            format!("{} installed, no engine running", there.join(", ")),
            "",
            "",
        ),
        (true, true) => Check::not(Note, "containers", "no engine", "", ""),
    }
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

fn in_path(command: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(command).is_file()))
}

fn output(command: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(command).args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn first_line(command: &str, args: &[&str]) -> Option<String> {
    output(command, args)?.lines().next().map(|l| l.trim().to_owned())
}
