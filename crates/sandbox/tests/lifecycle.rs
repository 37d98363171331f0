//! Creating, starting, freezing, killing, removing, and what goes wrong on the way.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use common::{Instance, LONG, processes_of};
use medes_sandbox::{Exit, SandboxError, in_network_namespace};

#[test]
fn exit_status_and_signals_are_told() {
    let i = Instance::new();
    assert_eq!(i.run(&i.shell("exit 7")).0, Exit::Code(7));
    let (running, mut output) = i.start(&i.shell("echo ready; exec sleep 1000"));
    assert_eq!(output.line(), "ready");
    assert_eq!(running.wait_status().unwrap(), None);
    assert!(matches!(running.wait(Duration::from_millis(10)), Err(SandboxError::Timeout { .. })));
    running.cgroup().kill(LONG).unwrap();
    assert_eq!(running.wait(LONG).unwrap(), Exit::Signal(libc::SIGKILL));
    assert_eq!(running.wait_status().unwrap(), Some(Exit::Signal(libc::SIGKILL)));
    let cgroup = running.cgroup().clone();
    running.destroy(LONG).unwrap();
    cgroup.kill(LONG).unwrap();
}

#[test]
fn a_listener_made_between_create_and_start_serves_the_loopback() {
    let i = Instance::new();
    let spec = i.python(
        "import socket\n\
         s = socket.create_connection(('127.0.0.1', 9001))\n\
         s.sendall(b'hello')\n\
         print(s.recv(100).decode())",
    );
    let (created, output) = i.create(&spec).unwrap();
    let listener =
        in_network_namespace(created.net_namespace(), || TcpListener::bind("127.0.0.1:9001"))
            .unwrap()
            .unwrap();
    let running = created.start().unwrap();
    let (mut connection, _) = listener.accept().unwrap();
    let mut request = [0; 5];
    connection.read_exact(&mut request).unwrap();
    assert_eq!(&request, b"hello");
    connection.write_all(b"world").unwrap();
    assert_eq!(output.read().0, "world\n");
    assert_eq!(running.wait(LONG).unwrap(), Exit::Code(0));
}

#[test]
fn two_sandboxes_may_use_the_same_port() {
    let i = Instance::new();
    let listen = |created: &medes_sandbox::Created| {
        in_network_namespace(created.net_namespace(), || TcpListener::bind("127.0.0.1:9001"))
            .unwrap()
    };
    let (a, _oa) = i.create(&i.shell("true")).unwrap();
    let (b, _ob) = i.create(&i.shell("true")).unwrap();
    let (_la, _lb) = (listen(&a).unwrap(), listen(&b).unwrap());
    assert!(listen(&a).is_err());
}

#[test]
fn freezing_stops_every_process_and_thawing_lets_them_go_on() {
    let i = Instance::new();
    let spec =
        i.shell("(while :; do :; done) & echo ready; while read x; do echo $x; done < /tmp/f");
    let (running, mut output) = i.start(&spec);
    assert_eq!(output.line(), "ready");
    let cpu = || -> u64 {
        let time = |pid: &i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
            stat.split(' ').next().and_then(|t| t.parse::<u64>().ok()).unwrap_or(0)
        };
        processes_of(spec.host_uid).iter().map(time).sum()
    };
    running.cgroup().freeze(LONG).unwrap();
    assert!(running.cgroup().is_frozen().unwrap());
    let before = cpu();
    std::thread::sleep(Duration::from_millis(50));
    // A task counts as frozen a few instructions before it leaves the processor.
    assert!(cpu() - before < 2_000_000, "{} ns", cpu() - before);
    running.cgroup().thaw().unwrap();
    assert!(!running.cgroup().is_frozen().unwrap());
    running.cgroup().freeze(LONG).unwrap();
    // A frozen sandbox dies without running another instruction.
    running.destroy(LONG).unwrap();
    assert!(processes_of(spec.host_uid).is_empty());
}

#[test]
fn steps_that_fail_are_named() {
    let i = Instance::new();
    let message = |e: SandboxError| e.to_string();

    let mut spec = i.shell("true");
    spec.code = Some("/no/such/code".into());
    let e = message(i.create(&spec).unwrap_err());
    assert_eq!(e, "mounting /no/such/code on /var/task: ENOENT: No such file or directory");

    let spec = i.spec(&["/no/such/program"]);
    let e = message(i.create(&spec).unwrap().0.start().unwrap_err());
    assert_eq!(e, "executing /no/such/program: ENOENT: No such file or directory");

    let spec = i.spec(&["no-such-program"]);
    let e = message(i.create(&spec).unwrap().0.start().unwrap_err());
    assert_eq!(e, "executing no-such-program: ENOENT: No such file or directory");

    let spec = i.spec(&["/etc/passwd"]);
    let e = message(i.create(&spec).unwrap().0.start().unwrap_err());
    assert_eq!(e, "executing /etc/passwd: EACCES: Permission denied");

    let mut spec = i.shell("true");
    spec.process.cwd = "/nowhere".into();
    let e = message(i.create(&spec).unwrap_err());
    assert_eq!(e, "changing to the directory /nowhere: ENOENT: No such file or directory");

    let mut spec = i.shell("true");
    spec.mounts.push(medes_sandbox::Mount {
        source: "/etc/hostname".into(),
        target: "/usr/no/such/place".into(),
        read_only: true,
    });
    let e = message(i.create(&spec).unwrap_err());
    assert_eq!(
        e,
        "mounting /etc/hostname on /usr/no/such/place: ENOENT: No such file or directory"
    );

    let mut spec = i.shell("true");
    spec.id = "not/a/name".into();
    assert!(matches!(i.create(&spec), Err(SandboxError::Spec { .. })));

    let mut spec = i.shell("true");
    spec.resources.memory_limit_bytes = 64 << 10;
    let e = i.create(&spec).map(|(c, _)| c.start());
    assert!(
        matches!(
            e,
            Err(SandboxError::Died { exit: Exit::Signal(libc::SIGKILL) }
                | SandboxError::Step { .. })
        ),
        "{e:?}"
    );
    assert!(i.root.list().unwrap().is_empty());
}

#[test]
fn an_identifier_in_use_is_refused_and_its_owner_stays() {
    let i = Instance::new();
    let spec = i.shell("echo ready; exec sleep 1000");
    let (running, mut output) = i.start(&spec);
    assert_eq!(output.line(), "ready");
    assert!(matches!(i.create(&spec), Err(SandboxError::Cgroup(_))));
    assert_eq!(running.wait_status().unwrap(), None);
    running.destroy(LONG).unwrap();
}

#[test]
fn dropping_removes_at_any_stage() {
    let i = Instance::new();
    let spec = i.shell("sleep 1000");
    drop(i.create(&spec).unwrap());
    assert!(processes_of(spec.host_uid).is_empty());
    drop(i.start(&spec));
    assert!(processes_of(spec.host_uid).is_empty());
    assert!(i.root.list().unwrap().is_empty());
}

#[test]
fn recovery_kills_and_removes_what_a_crash_left() {
    let i = Instance::new();
    let specs: Vec<_> = (0..3).map(|_| i.shell("sleep 1000 & sleep 1000")).collect();
    let left: Vec<_> = specs.iter().map(|s| i.start(s)).collect();
    left[0].0.cgroup().freeze(LONG).unwrap();
    assert_eq!(i.root.list().unwrap().len(), 3);
    // Another handle on the same instance, as a new process would make it.
    let root = medes_sandbox::CgroupRoot::new(i.root.name()).unwrap();
    root.remove_all(LONG).unwrap();
    assert!(root.list().unwrap().is_empty());
    for (running, _) in &left {
        assert_eq!(running.wait(LONG).unwrap(), Exit::Signal(libc::SIGKILL));
    }
    for (running, _) in left {
        running.destroy(LONG).unwrap();
    }
    for spec in &specs {
        assert!(processes_of(spec.host_uid).is_empty());
    }
}

#[test]
fn many_threads_make_sandboxes_at_once() {
    let i = Instance::new();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..10 {
                    assert_eq!(i.output("echo hello"), "hello\n");
                }
            });
        }
    });
}

#[test]
fn the_pidfd_becomes_readable_at_the_end() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let i = Instance::new();
    let (running, mut output) = i.start(&i.shell("echo ready; exec sleep 1000"));
    assert_eq!(output.line(), "ready");
    let ready = |timeout| {
        let mut fds = [PollFd::new(running.pidfd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).unwrap()
    };
    assert_eq!(ready(PollTimeout::ZERO), 0);
    running.cgroup().kill(LONG).unwrap();
    assert_eq!(ready(PollTimeout::from(10_000u16)), 1);
}
