//! What the kernel offers.

use std::path::Path;

use medes_memory::features::KernelFeatures;
use nix::unistd::geteuid;

use super::Verdict::{Fail, Note, Warn};
use super::{Check, read, read_number};

/// All checks of this module.
pub fn checks() -> Vec<Check> {
    let features = KernelFeatures::probe();
    let mut checks = vec![root(), release(&features), architecture()];
    checks.extend(dedup(&features));
    checks.extend([
        ptrace(),
        freezer(),
        controllers(),
        namespaces(),
        overlay(),
        seccomp(),
        ksm(),
        zswap(),
        zram(),
        pressure(),
    ]);
    checks
}

fn root() -> Check {
    let uid = geteuid();
    if uid.is_root() {
        return Check::ok("root", "running as root");
    }
    Check::not(
        Fail,
        "root",
        format!("running as uid {uid}"),
        "sandboxes, ptrace and userfaultfd of other users' processes need root",
        "run `medes serve` as root (sudo)",
    )
}

fn release(features: &KernelFeatures) -> Check {
    Check::ok("kernel", features.release.clone())
}

/// What dedup and restore are made of. One check for all of it if it is there, else one for each
/// part that is missing.
fn dedup(features: &KernelFeatures) -> Vec<Check> {
    let missing = features.missing();
    if missing.is_empty() {
        return vec![Check::ok("dedup", "userfaultfd, page scans and all else that it uses")];
    }
    missing
        .into_iter()
        .map(|m| {
            let (verdict, consequence) = if m.required {
                (Fail, "no sandbox can be deduplicated")
            } else {
                (Warn, "dedup works, but less well than it could, or not for every sandbox")
            };
            let found = format!("{} is missing", m.what);
            Check::not(verdict, "dedup", found, consequence, m.remedy)
        })
        .collect()
}

fn architecture() -> Check {
    let found = std::env::consts::ARCH;
    if found == "x86_64" {
        return Check::ok("architecture", found);
    }
    Check::not(
        Fail,
        "architecture",
        found,
        "system calls are injected into sandboxes with x86-64's registers",
        "use an x86-64 machine",
    )
}

fn ptrace() -> Check {
    match read_number("/proc/sys/kernel/yama/ptrace_scope") {
        Some(3) => Check::not(
            Fail,
            "ptrace",
            "switched off (Yama scope 3)",
            "sandboxes can't be seized: no dedup",
            "boot with kernel.yama.ptrace_scope below 3; it can't be lowered at run time",
        ),
        Some(scope) => Check::ok("ptrace", format!("allowed for root (Yama scope {scope})")),
        None => Check::ok("ptrace", "allowed"),
    }
}

/// Mount points of a kind of file system, with their options.
fn mounts_of(kind: &str) -> Vec<(String, String)> {
    let Some(table) = read("/proc/self/mounts") else { return Vec::new() };
    table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (point, found, options) = (fields.next()?, fields.next()?, fields.next()?);
            (found == kind).then(|| (point.to_owned(), options.to_owned()))
        })
        .collect()
}

fn freezer() -> Check {
    match mounts_of("cgroup2").first() {
        Some((point, _)) => Check::ok("freezer", format!("cgroup v2 at {point}")),
        None => Check::not(
            Fail,
            "freezer",
            "no cgroup v2 hierarchy is mounted",
            "sandboxes are frozen and killed through cgroup v2 (it needs no controllers)",
            "mount -t cgroup2 none /sys/fs/cgroup/unified, or boot with \
             systemd.unified_cgroup_hierarchy=1",
        ),
    }
}

fn controllers() -> Check {
    const WANTED: [&str; 3] = ["memory", "pids", "cpu"];
    let v2 = mounts_of("cgroup2")
        .first()
        .and_then(|(point, _)| read(&format!("{point}/cgroup.controllers")))
        .unwrap_or_default();
    let v2: Vec<_> = v2.split_whitespace().collect();
    let v1 = mounts_of("cgroup");
    let mut places = Vec::new();
    let mut missing = Vec::new();
    for wanted in WANTED {
        if v2.contains(&wanted) {
            places.push(format!("{wanted} (v2)"));
        } else if v1.iter().any(|(_, options)| options.split(',').any(|o| o == wanted)) {
            places.push(format!("{wanted} (v1)"));
        } else {
            missing.push(wanted);
        }
    }
    if missing.is_empty() {
        return Check::ok("limits", places.join(", "));
    }
    let verdict = if missing.contains(&"memory") { Fail } else { Warn };
    Check::not(
        verdict,
        "limits",
        format!("no cgroup controller for {}", missing.join(", ")),
        "sandboxes can't be limited in that, nor be charged for it",
        "enable the controller (kernel command line: cgroup_enable=memory), or delegate it to \
         this container",
    )
}

fn namespaces() -> Check {
    let missing: Vec<_> = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"]
        .into_iter()
        .filter(|n| !Path::new("/proc/self/ns").join(n).exists())
        .collect();
    if !missing.is_empty() {
        return Check::not(
            Fail,
            "namespaces",
            format!("this kernel has no {}", missing.join(", ")),
            "sandboxes can't be isolated",
            "use a kernel with all namespaces (CONFIG_*_NS)",
        );
    }
    match read_number("/proc/sys/user/max_user_namespaces") {
        Some(n) if n < 1024 => Check::not(
            if n == 0 { Fail } else { Warn },
            "namespaces",
            format!("user.max_user_namespaces is {n}"),
            "each sandbox has a user namespace of its own",
            "sysctl -w user.max_user_namespaces=65536",
        ),
        Some(n) => Check::ok("namespaces", format!("all kinds, {n} user namespaces at most")),
        None => Check::ok("namespaces", "all kinds"),
    }
}

fn overlay() -> Check {
    let known = read("/proc/filesystems")
        .is_some_and(|list| list.lines().any(|l| l.split_whitespace().last() == Some("overlay")));
    if known {
        return Check::ok("overlayfs", "in the kernel");
    }
    Check::not(
        Warn,
        "overlayfs",
        "not loaded",
        "a function with more than one layer needs it to merge them",
        "modprobe overlay",
    )
}

fn seccomp() -> Check {
    match read("/proc/sys/kernel/seccomp/actions_avail") {
        Some(actions) if actions.split_whitespace().any(|a| a == "errno") => {
            Check::ok("seccomp", "filters")
        }
        _ => Check::not(
            Fail,
            "seccomp",
            "no filters",
            "sandboxes would reach the whole system-call interface",
            "use a kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
}

fn ksm() -> Check {
    match read("/sys/kernel/mm/ksm/run").as_deref() {
        Some("1") => Check::not(
            Warn,
            "KSM",
            "running",
            "it merges some of the same pages, so that memory figures are hard to compare, and \
             costs CPU time",
            "echo 0 > /sys/kernel/mm/ksm/run, unless other programs need it",
        ),
        Some(_) => Check::ok("KSM", "present, not running"),
        None => Check::not(Note, "KSM", "not in this kernel", "", ""),
    }
}

fn zswap() -> Check {
    match read("/sys/module/zswap/parameters/enabled").as_deref() {
        Some("Y") => {
            let compressor = read("/sys/module/zswap/parameters/compressor").unwrap_or_default();
            Check::ok("zswap", format!("on ({compressor})"))
        }
        Some(_) => Check::ok("zswap", "present, off"),
        None => Check::not(Note, "zswap", "not in this kernel", "", ""),
    }
}

fn zram() -> Check {
    if Path::new("/sys/class/zram-control").exists() || Path::new("/dev/zram0").exists() {
        let swap = read("/proc/swaps").is_some_and(|s| s.contains("/dev/zram"));
        return Check::ok("zram", if swap { "in use as swap" } else { "present, unused" });
    }
    Check::not(Note, "zram", "not loaded", "", "")
}

fn pressure() -> Check {
    if Path::new("/proc/pressure/memory").exists() {
        return Check::ok("pressure", "stall information (PSI)");
    }
    Check::not(Note, "pressure", "no stall information (PSI)", "", "boot with psi=1")
}
