use std::collections::HashSet;
use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;
use crate::spec::{Layout, Mount, Process, Resources, Seccomp, SeccompProfile};

fn spec() -> SandboxSpec {
    SandboxSpec {
        id: "a".into(),
        hostname: "a".into(),
        mounts: vec![],
        files: vec![],
        code: None,
        layers: vec![],
        tmp_size_bytes: 1 << 20,
        process: Process { args: vec!["/bin/true".into()], ..Process::default() },
        host_uid: 100_000,
        resources: Resources { memory_limit_bytes: 1 << 26, pids_max: 10, cpu_millicores: None },
        layout: Layout::fixed(1),
        seccomp: Seccomp::default(),
        die_with_parent: false,
    }
}

fn build(spec: &SandboxSpec) -> Result<Plan, SandboxError> {
    let v1_tasks =
        vec![("/sys/fs/cgroup/memory/x".into(), 9), ("/sys/fs/cgroup/pids/x".into(), 12)];
    Plan::build(spec, &Descriptors { stdout: 5, stderr: 6, channel: 7, v1_tasks })
}

fn steps(spec: &SandboxSpec) -> Vec<String> {
    build(spec).unwrap().steps.iter().map(ToString::to_string).collect()
}

/// The index of the only step whose description starts with `start`.
fn index(steps: &[String], start: &str) -> usize {
    let mut found = steps.iter().enumerate().filter(|(_, s)| s.starts_with(start));
    let (i, _) = found.next().unwrap_or_else(|| panic!("no step {start:?} in {steps:#?}"));
    assert!(found.next().is_none(), "two steps {start:?}");
    i
}

#[test]
fn privileges_go_in_the_right_order() {
    let s = steps(&spec());
    let order = [
        "closing inherited",
        "joining the cgroup /sys/fs/cgroup/memory",
        "making mounts private",
        "making a new root",
        "mounting a proc on /proc",
        "mounting a tmpfs on /tmp",
        "unmounting the host's root",
        "making the root read-only",
        "making a user namespace",
        "waiting for the user map",
        "making network",
        "bringing the loopback",
        "emptying the capability bounding set",
        "becoming user 1000",
        "dropping capabilities",
        "giving up new privileges",
        "changing to the directory /",
        "turning address randomisation off",
        "filtering system calls",
        "waiting for the start",
        "executing /bin/true",
    ];
    let found: Vec<usize> = order.iter().map(|start| index(&s, start)).collect();
    assert!(found.is_sorted(), "{s:#?}");
    assert_eq!(found.last(), Some(&(s.len() - 1)));
}

#[test]
fn options_leave_steps_out() {
    let mut spec = spec();
    spec.layout = Layout::random();
    spec.seccomp = Seccomp { profile: SeccompProfile::Unconfined, deny_io_uring: false };
    let s = steps(&spec);
    assert!(!s.iter().any(|s| s.starts_with("turning") || s.starts_with("filtering")));
}

#[test]
fn a_kept_link_is_made_again_and_a_moved_one_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("usr/lib");
    fs::create_dir_all(&real).unwrap();
    let link = dir.path().join("lib");
    symlink("usr/lib", &link).unwrap();
    let mut spec = spec();
    spec.mounts = vec![
        Mount::read_only(&link),
        Mount { source: link.clone(), target: "/moved".into(), read_only: true },
    ];
    let s = steps(&spec);
    index(&s, &format!("linking {} to usr/lib", link.display()));
    let real = fs::canonicalize(&real).unwrap();
    index(&s, &format!("mounting {} on /moved", real.display()));
}

#[test]
fn mount_points_are_made_once_and_never_on_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let path = fs::canonicalize(dir.path()).unwrap();
    fs::write(path.join("file"), "x").unwrap();
    let mount = |source: &str, target: &str| Mount {
        source: path.join(source),
        target: target.into(),
        read_only: true,
    };
    let mut spec = spec();
    spec.mounts =
        vec![mount("", "/a/b/c"), mount("file", "/a/b/file"), mount("file", "/a/b/c/below")];
    let s = steps(&spec);
    let made: Vec<&String> = s.iter().filter(|s| s.starts_with("making the ")).collect();
    assert_eq!(made.iter().collect::<HashSet<_>>().len(), made.len());
    index(&s, "making the directory /a/b/c");
    index(&s, "making the file /a/b/file");
    assert!(!s.iter().any(|s| s.starts_with("making") && s.ends_with("/a/b/c/below")));
}

#[test]
fn a_file_can_not_be_made_on_the_host() {
    let mut spec = spec();
    spec.mounts = vec![Mount::read_only("/usr")];
    spec.files = vec![crate::SmallFile { path: "/usr/share/x".into(), contents: String::new() }];
    let e = build(&spec).err().unwrap().to_string();
    assert!(e.contains("/usr/share/x lies below /usr"), "{e}");
}

#[test]
fn layers_are_merged_with_the_last_on_top() {
    let dir = tempfile::tempdir().unwrap();
    let path = fs::canonicalize(dir.path()).unwrap();
    let names = ["first", "second:with,odd\\name"];
    let mut spec = spec();
    for name in names {
        fs::create_dir(path.join(name)).unwrap();
        spec.layers.push(path.join(name));
    }
    let plan = build(&spec).unwrap();
    let options = plan
        .steps
        .iter()
        .find_map(|s| match s {
            Step::Filesystem { kind, options, .. } if kind.as_bytes() == b"overlay" => {
                Some(options.to_str().unwrap())
            }
            _ => None,
        })
        .unwrap();
    let p = path.display();
    assert_eq!(options, format!("lowerdir={HOST}{p}/second\\:with\\,odd\\\\name:{HOST}{p}/first"));
}

#[test]
fn a_layer_that_is_a_link_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = fs::canonicalize(dir.path()).unwrap();
    fs::create_dir(path.join("real")).unwrap();
    symlink("real", path.join("link")).unwrap();
    let mut spec = spec();
    spec.layers = vec![path.join("link"), path.join("real")];
    let plan = build(&spec).unwrap();
    let options = plan.steps.iter().find_map(|s| match s {
        Step::Filesystem { kind, options, .. } if kind.as_bytes() == b"overlay" => Some(options),
        _ => None,
    });
    let real = format!("{HOST}{}/real", path.display());
    assert_eq!(options.unwrap().to_str().unwrap(), format!("lowerdir={real}:{real}"));
}

#[test]
fn a_zero_byte_is_refused() {
    let mut spec = spec();
    spec.process.args.push("a\0b".into());
    assert!(matches!(build(&spec), Err(SandboxError::Spec { .. })));
}

#[test]
fn programs_are_looked_up_in_the_path() {
    let env = ["A=b".to_owned(), "PATH=/x:/y/z".to_owned()];
    assert_eq!(candidates("p", &env).unwrap(), [c"/x/p".to_owned(), c"/y/z/p".to_owned()]);
    assert_eq!(candidates("./p", &env).unwrap(), [c"./p".to_owned()]);
    assert_eq!(candidates("p", &[]).unwrap().len(), 3);
}

proptest! {
    #[test]
    fn all_descriptors_but_the_kept_are_closed(mut kept in prop::collection::vec(0..40i32, 0..9)) {
        let keep: HashSet<u32> = kept.iter().map(|fd| *fd as u32).collect();
        let ranges = gaps(&mut kept);
        for fd in (0..60).chain([u32::MAX]) {
            let closed = ranges.iter().filter(|(from, to)| (*from..=*to).contains(&fd)).count();
            prop_assert_eq!(closed, usize::from(fd > 2 && !keep.contains(&fd)), "{}", fd);
        }
        prop_assert!(ranges.iter().all(|(from, to)| from <= to));
    }
}
