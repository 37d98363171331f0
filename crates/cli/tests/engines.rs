//! Containers of the engines that are installed here, through `medes attach` and back.
//!
//! Each test starts an engine of its own, with all its files in a temporary directory, and says so
//! if it can't. No image is downloaded: a container's `/usr` is the host's, read-only; all else is
//! as the engine does it by default: namespaces, capabilities, seccomp filter.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Two processes. Each answers on a socket how often it was asked, and whether its memory is as it
/// was.
const SUBJECT: &str = r#"
import hashlib, os, random, socket, sys
memory = bytearray(random.Random(0).randbytes(1 << 20) + b"much of a muchness" * 100000)
objects = {n: str(n) * 3 for n in range(20000)}
def digest():
    return hashlib.sha256(bytes(memory) + repr(objects).encode()).hexdigest()
name = "child" if os.fork() == 0 else "parent"
before, count = digest(), 0
listener = socket.socket(socket.AF_UNIX)
listener.bind("/shared/new-" + name)
listener.listen()
os.rename("/shared/new-" + name, "/shared/" + name)
while True:
    connection, _ = listener.accept()
    for line in connection.makefile():
        count += 1
        right = digest() == before
        memory[random.randrange(len(memory))] ^= 1
        before = digest()
        connection.sendall(f"{count} {'right' if right else 'wrong'}\n".encode())
"#;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Docker,
    Podman,
    Containerd,
}

/// An engine of the test's own.
struct Engine {
    kind: Kind,
    directory: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Engine {
    /// Starts one, or says why there is none.
    fn start(kind: Kind) -> Option<Self> {
        let (program, needs) = match kind {
            Kind::Docker => ("dockerd", "docker"),
            Kind::Podman => ("podman", "conmon"),
            Kind::Containerd => ("containerd", "ctr"),
        };
        for command in [program, needs] {
            let found = Command::new(command).arg("--version").output();
            if !found.is_ok_and(|output| output.status.success()) {
                println!("skipped: {command} is not installed");
                return None;
            }
        }
        let directory = tempfile::tempdir().expect("a directory");
        let mut engine = Self { kind, directory, daemon: None };
        fs::create_dir(engine.path("shared")).expect("a directory");
        fs::write(engine.path("shared/subject.py"), SUBJECT).expect("a script");
        engine.make_root();
        engine.start_daemon();
        if kind != Kind::Containerd {
            let (archive, root) = (engine.path("root.tar"), engine.path("root"));
            let mut tar = Command::new("tar");
            tar.arg("-C").arg(root).arg("-cf").arg(&archive).arg(".");
            assert!(tar.status().expect("tar").success());
            engine.must(&["import", archive.to_str().expect("text"), "medes-test"]);
        }
        Some(engine)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A root whose programs are the host's.
    fn make_root(&self) {
        for name in ["usr", "shared", "proc", "sys", "dev", "etc", "tmp", "run"] {
            fs::create_dir_all(self.path("root").join(name)).expect("a directory");
        }
        for name in ["bin", "lib", "lib64"] {
            let link = self.path("root").join(name);
            std::os::unix::fs::symlink(format!("usr/{name}"), link).expect("a link");
        }
    }

    fn start_daemon(&mut self) {
        let mut command = match self.kind {
            Kind::Podman => return,
            Kind::Docker => {
                let mut command = Command::new("dockerd");
                command.args(["--iptables=false", "--ip6tables=false", "--bridge=none"]);
                command.args(["--storage-driver=vfs", "--live-restore"]);
                command.arg("--data-root").arg(self.path("data"));
                command.arg("--exec-root").arg(self.path("exec"));
                command.arg("--pidfile").arg(self.path("pid"));
                command.arg("--host").arg(format!("unix://{}", self.path("socket").display()));
                command
            }
            Kind::Containerd => {
                let text = format!(
                    "version = 2\nroot = {:?}\nstate = {:?}\n\
                     disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
                    self.path("data"),
                    self.path("state"),
                    self.path("socket")
                );
                fs::write(self.path("config.toml"), text).expect("a configuration");
                let mut command = Command::new("containerd");
                command.arg("--config").arg(self.path("config.toml"));
                command
            }
        };
        let log = fs::File::create(self.path("log")).expect("a log");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        self.daemon = Some(command.spawn().expect("starts"));
        let lists = if self.kind == Kind::Docker { &["ps"][..] } else { &["task", "ls"] };
        let until = Instant::now() + LIMIT;
        while !self.run(lists).status.success() {
            let log = fs::read_to_string(self.path("log")).unwrap_or_default();
            assert!(Instant::now() < until, "the engine does not answer: {log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends the daemon as a crash does, and starts it again.
    fn restart_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().expect("kills");
            daemon.wait().expect("ends");
            // They name processes that nobody may have waited for yet.
            let _ = fs::remove_file(self.path("pid"));
            let _ = fs::remove_file(self.path("exec/containerd/containerd.pid"));
            self.start_daemon();
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command;
        match self.kind {
            Kind::Docker => {
                command = Command::new("docker");
                command.arg("--host").arg(format!("unix://{}", self.path("socket").display()));
            }
            Kind::Podman => {
                command = Command::new("podman");
                command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]);
                command.args(["--events-backend", "file", "--root"]).arg(self.path("data"));
                command.arg("--runroot").arg(self.path("run"));
                command.arg("--tmpdir").arg(self.path("tmp"));
                // crun refuses hosts with both versions of cgroups.
                let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
                if mounts.lines().any(|line| line.starts_with("cgroup ")) {
                    command.args(["--runtime", "runc"]);
                }
            }
            Kind::Containerd => {
                command = Command::new("ctr");
                command.arg("--address").arg(self.path("socket"));
            }
        }
        command.args(arguments).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("starts")
    }

    fn must(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Starts the container `name`, and waits until both processes answer.
    fn start_container(&self, name: &str) -> Container<'_> {
        let shared = self.path("shared");
        let program = ["/usr/bin/python3", "/shared/subject.py"];
        let id = if self.kind == Kind::Containerd {
            let (root, shared) = (self.path("root"), shared.display());
            let mounts = [
                "type=bind,src=/usr,dst=/usr,options=rbind:ro".to_owned(),
                format!("type=bind,src={shared},dst=/shared,options=rbind:rw"),
            ];
            let options = ["run", "--detach", "--seccomp", "--mount", &mounts[0], "--mount"];
            let rest = [&mounts[1], "--rootfs", root.to_str().expect("text"), name];
            self.must(&[&options[..], &rest, &program].concat());
            name.to_owned()
        } else {
            let shared = format!("{}:/shared", shared.display());
            let mounts = ["--volume", "/usr:/usr:ro", "--volume", &shared];
            // Engines raise these limits, for which not every root has the right.
            let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"];
            let options = ["run", "--detach", "--network", "none", "--name", name];
            let image = ["medes-test"];
            self.must(&[&options[..], &mounts, &limits, &image, &program].concat())
        };
        let container = Container { engine: self, name: name.to_owned(), id, asked: 0 };
        let until = Instant::now() + LIMIT;
        while !["parent", "child"].iter().all(|who| self.path("shared").join(who).exists()) {
            assert!(Instant::now() < until, "the container does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        container
    }

    fn pause(&self, name: &str, paused: bool) {
        match (self.kind, paused) {
            (Kind::Containerd, true) => self.must(&["task", "pause", name]),
            (Kind::Containerd, false) => self.must(&["task", "resume", name]),
            (_, true) => self.must(&["pause", name]),
            (_, false) => self.must(&["unpause", name]),
        };
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.kind == Kind::Podman {
            self.run(&["system", "prune", "--all", "--force"]);
        }
        if let Some(mut daemon) = self.daemon.take() {
            // Docker's has a containerd of its own to end.
            let pid = nix::unistd::Pid::from_raw(daemon.id() as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let until = Instant::now() + LIMIT;
            while daemon.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// A container that is removed in the end.
struct Container<'a> {
    engine: &'a Engine,
    name: String,
    id: String,
    asked: u32,
}

impl Container<'_> {
    fn check(&mut self) {
        self.asked += 1;
        for who in ["parent", "child"] {
            let path = self.engine.path("shared").join(who);
            let mut stream = UnixStream::connect(path).expect("listens");
            stream.set_read_timeout(Some(LIMIT)).expect("a limit");
            stream.write_all(b"?\n").expect("takes a line");
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).expect("answers");
            assert_eq!(line.trim_end(), format!("{} right", self.asked), "{who}");
        }
    }

    /// A shell in it that says something.
    fn exec(&self) -> Child {
        let say = ["/usr/bin/sh", "-c", "echo here"];
        let arguments = match self.engine.kind {
            Kind::Containerd => {
                [&["task", "exec", "--exec-id", "say", &self.name][..], &say].concat()
            }
            _ => [&["exec", &self.name][..], &say].concat(),
        };
        let mut command = self.engine.command(&arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts")
    }

    fn remove(&self) {
        if self.engine.kind == Kind::Containerd {
            self.engine.run(&["task", "rm", "--force", &self.name]);
            self.engine.run(&["container", "rm", &self.name]);
        } else {
            self.engine.run(&["kill", &self.name]);
            self.engine.run(&["rm", "--force", &self.name]);
        }
        for who in ["parent", "child"] {
            let _ = fs::remove_file(self.engine.path("shared").join(who));
        }
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}

/// `medes attach` with a holder of the test's own.
struct Attach(tempfile::TempDir);

impl Attach {
    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_medes"));
        command.args(["attach", "--dir"]).arg(self.0.path()).args(arguments);
        command.stdin(Stdio::null()).output().expect("medes")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn dedup(&self, container: &str) -> Value {
        let report = self.json(&["dedup", "--container", container]);
        let bytes = |name: &str| report[name].as_u64().expect("a number");
        assert!(bytes("image_bytes") * 2 < bytes("private_bytes"), "{report}");
        report
    }

    fn restore(&self, container: &str) {
        self.json(&["restore", "--container", container]);
    }

    fn wait_for_none(&self) {
        let until = Instant::now() + LIMIT;
        while self.json(&["status"])["attached"] != Value::Array(Vec::new()) {
            assert!(Instant::now() < until, "something stays attached");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Attach {
    fn drop(&mut self) {
        self.run(&["restore", "--all", "--wait"]);
    }
}

/// The container's first process.
fn first_process(container: &Container<'_>) -> i32 {
    let kind = container.engine.kind;
    let text = match kind {
        Kind::Containerd => {
            let list = container.engine.must(&["task", "ls"]);
            let line = list.lines().find(|line| line.starts_with(&container.name)).expect("listed");
            line.split_whitespace().nth(1).expect("a number").to_owned()
        }
        _ => container.engine.must(&["inspect", "--format", "{{.State.Pid}}", &container.name]),
    };
    text.parse().expect("a number")
}

/// The path of a process's cgroup in the version 2 hierarchy.
fn cgroup_of(pid: i32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("alive");
    text.lines().find_map(|line| line.strip_prefix("0::")).expect("version 2").to_owned()
}

fn unified() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    PathBuf::from(mounts.find(|fields| fields[2] == "cgroup2").expect("a cgroup2 mount")[1])
}

fn all_of_it(kind: Kind, name: &str) {
    let Some(mut engine) = Engine::start(kind) else { return };
    let name = format!("medes-{name}-{}", std::process::id());
    let attach = Attach(tempfile::tempdir().expect("a directory"));
    there_and_back(&engine, &attach, &name);
    engine_meets_dedup(&engine, &attach, &name);
    ends_in_dedup(&engine, &attach, &name);
    if kind != Kind::Podman {
        let container = engine.start_container(&name);
        attach.dedup(&name);
        // Containers need no engine to go on; what Docker's next one makes of it is its own affair.
        std::mem::forget(container);
        engine.restart_daemon();
        attach.restore(&name);
        let mut container = Container { engine: &engine, id: name.clone(), name, asked: 0 };
        container.check();
    }
}

/// By name and by the beginning of the identifier, with its memory on demand.
fn there_and_back(engine: &Engine, attach: &Attach, name: &str) {
    let mut container = engine.start_container(name);
    container.check();
    let beginning = container.id[..container.id.len().min(12)].to_owned();
    for called in [name, &container.id.clone(), &beginning, name] {
        let dry = attach.json(&["dedup", "--container", called, "--dry-run"]);
        assert_eq!(dry["processes"], 2);
        attach.dedup(called);
        let status = attach.json(&["status"]);
        assert_eq!(status["attached"][0]["state"], "dedup", "{status}");
        attach.restore(called);
        container.check();
        container.check();
    }
}

/// What an engine may do to a container meanwhile.
fn engine_meets_dedup(engine: &Engine, attach: &Attach, name: &str) {
    let mut container = engine.start_container(name);
    engine.pause(name, true);
    let refused = attach.run(&["dedup", "--container", name]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("unpause it first"), "{said}");
    attach.json(&["dedup", "--container", name, "--dry-run"]);
    engine.pause(name, false);
    container.check();
    // A new process in it starts when the container runs again.
    attach.dedup(name);
    let mut exec = container.exec();
    std::thread::sleep(Duration::from_millis(300));
    assert!(exec.try_wait().expect("a child").is_none_or(|status| !status.success()));
    attach.restore(name);
    let output = exec.wait_with_output().expect("ends");
    // Some runtimes refuse at once: the container looks paused to them.
    let refused = String::from_utf8_lossy(&output.stderr).contains("paused");
    assert!(refused || output.stdout == b"here\n", "{output:?}");
    container.check();
    // Whoever thaws it, it comes back whole.
    attach.dedup(name);
    let cgroup = cgroup_of(first_process(&container));
    let thaw = unified().join(cgroup.trim_start_matches('/')).join("cgroup.freeze");
    fs::write(thaw, "0").expect("thaws");
    container.check();
    attach.wait_for_none();
}

/// A container that is removed in the dedup state.
fn ends_in_dedup(engine: &Engine, attach: &Attach, name: &str) {
    let container = engine.start_container(name);
    attach.dedup(name);
    let pid = first_process(&container);
    container.remove();
    attach.wait_for_none();
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn docker() {
    all_of_it(Kind::Docker, "docker");
}

#[test]
fn podman() {
    all_of_it(Kind::Podman, "podman");
}

#[test]
fn containerd() {
    all_of_it(Kind::Containerd, "containerd");
}
