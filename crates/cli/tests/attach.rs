//! Processes that somebody else started: a tree, a cgroup, a container with namespaces and a
//! seccomp filter, through `medes attach` and back.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A number that no other test has.
fn unique() -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// A directory for a holder of the test's own; what is attached is brought back at the end.
struct Holder(tempfile::TempDir);

impl Holder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

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

    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(!output.status.success(), "{arguments:?}");
        String::from_utf8(output.stderr).expect("text")
    }

    fn attached(&self) -> usize {
        self.json(&["status"])["attached"].as_array().expect("a list").len()
    }

    /// The holder itself: whoever has the socket's lock.
    fn pid(&self) -> i32 {
        let directory = self.0.path().to_str().expect("text");
        let processes = fs::read_dir("/proc").expect("/proc").flatten();
        let holder = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(
            |pid: &i32| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                line.contains("attach-holder") && line.contains(directory)
            },
        );
        holder.expect("a holder")
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.run(&["restore", "--all", "--wait"]);
    }
}

/// Whoever sends a line hears how often that happened, and whether memory is as it was.
const SUBJECT: &str = r#"
import hashlib, os, random, sys, threading
memory = bytearray(random.Random(0).randbytes(1 << 20) + b"much of a muchness" * 200000)
objects = {n: str(n) * 3 for n in range(30000)}
def digest():
    return hashlib.sha256(bytes(memory) + repr(objects).encode()).hexdigest()
before, count = digest(), 0
def serve(lines, answers):
    global before, count
    for line in lines:
        count += 1
        right = digest() == before
        memory[random.randrange(len(memory))] ^= 1
        before = digest()
        answers.write(f"{count} {'right' if right else 'wrong'}\n")
        answers.flush()
"#;

/// One process.
const ALONE: &str = r#"
print("ready", flush=True)
serve(sys.stdin, sys.stdout)
"#;

/// One process that forks when it is told to: a child that does nothing and ends with its parent.
const FORKS: &str = r#"
import time
def asked():
    for line in sys.stdin:
        if line != "fork\n":
            yield line
            continue
        parent = os.getpid()
        if os.fork() == 0:
            while os.getppid() == parent:
                time.sleep(0.02)
            os._exit(0)
        print("forked", flush=True)
print("ready", flush=True)
serve(asked(), sys.stdout)
"#;

/// A parent that asks its child, which has memory of its own, each time.
const PARENT: &str = r#"
down, up = os.pipe(), os.pipe()
if os.fork() == 0:
    os.close(down[1])
    serve(os.fdopen(down[0]), os.fdopen(up[1], "w"))
    os._exit(0)
os.close(down[0])
ask, answer = os.fdopen(down[1], "w"), os.fdopen(up[0])
print("ready", flush=True)
class Both:
    def write(self, text):
        ask.write("?\n"); ask.flush()
        child = answer.readline()
        sys.stdout.write(text if child == text else f"the child says {child}")
    def flush(self):
        sys.stdout.flush()
serve(sys.stdin, Both())
"#;

/// Ends by a seccomp filter whatever calls what memory is taken away with; most containers' do.
const FILTER: &str = r#"
import ctypes, struct
def allow_but(*calls):
    lines = [(0x20, 0, 0, 0)]
    for n, call in enumerate(calls):
        lines.append((0x15, len(calls) - n, 0, call))
    lines += [(0x06, 0, 0, 0x7fff0000), (0x06, 0, 0, 0x80000000)]
    program = b"".join(struct.pack("HBBI", *line) for line in lines)
    program = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, head, 0, 0) == 0
allow_but(323, 101, 440, 310, 41, 53)
"#;

struct Subject {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    count: u32,
}

impl Subject {
    fn start(parts: &[&str]) -> Self {
        Self::start_with(Command::new("python3").arg("-c").arg(parts.concat()))
    }

    fn start_with(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut subject = Self { child, input, output, count: 0 };
        assert_eq!(subject.line(), "ready");
        subject
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("reads");
        line.trim_end().to_owned()
    }

    fn check(&mut self) {
        writeln!(self.input, "?").expect("takes a line");
        self.count += 1;
        assert_eq!(self.line(), format!("{} right", self.count));
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }

    fn fork(&mut self) {
        writeln!(self.input, "fork").expect("takes a line");
        assert_eq!(self.line(), "forked");
    }

    /// The process that it has forked.
    fn forked(&self) -> nix::unistd::Pid {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.expect("alive");
        nix::unistd::Pid::from_raw(children.trim().parse().expect("one child"))
    }

    fn is_killed_within(&mut self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if self.child.try_wait().expect("a child").is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A cgroup in the version 2 hierarchy.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Self {
        let path = unified().join(name);
        fs::create_dir(&path).expect("a cgroup");
        Self(path)
    }

    /// Starts `command` in it.
    fn start(&self, command: &[&str]) -> Command {
        let mut shell = Command::new("sh");
        shell.args(["-c", r#"echo $$ >"$0" && exec "$@""#]).arg(self.0.join("cgroup.procs"));
        shell.args(command);
        shell
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let until = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn unified() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
    let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let found = mount.into_iter().find(|fields| fields[2] == "cgroup2");
    PathBuf::from(found.expect("a cgroup2 mount")[1])
}

/// The path of a process's cgroup in the version 2 hierarchy.
fn cgroup_of(pid: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("alive");
    text.lines().find_map(|line| line.strip_prefix("0::")).expect("version 2").to_owned()
}

fn bytes(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_else(|| panic!("{name} in {report}"))
}

#[test]
fn a_tree_that_shares_its_cgroup_with_others() {
    let holder = Holder::new();
    let mut subject = Subject::start(&[SUBJECT, PARENT]);
    let mut bystander = Subject::start(&[SUBJECT, ALONE]);
    let before = cgroup_of(&subject.pid());
    let dry = holder.json(&["dedup", "--pid", &subject.pid(), "--dry-run"]);
    assert_eq!(dry["processes"], 2);
    assert_eq!(holder.attached(), 0);
    subject.check();
    for round in 0..4 {
        let done = holder.json(&["dedup", "--pid", &subject.pid()]);
        assert!(bytes(&done, "image_bytes") * 2 < bytes(&done, "private_bytes"), "{done}");
        let reused = bytes(&done, "reused_pages") * 4096;
        // Nearly all is as it was after the restore before.
        assert_eq!(reused > bytes(&done, "private_bytes") / 2, round > 0, "{done}");
        assert_ne!(cgroup_of(&subject.pid()), before);
        assert_eq!(cgroup_of(&bystander.pid()), before);
        bystander.check();
        let status = holder.json(&["status"]);
        assert_eq!(status["attached"][0]["state"], "dedup");
        assert_eq!(status["attached"][0]["pids"].as_array().map(Vec::len), Some(2));
        let again = holder.refused(&["dedup", "--pid", &subject.pid()]);
        assert!(again.contains("attached already"), "{again}");
        holder.json(&["restore", "--pid", &subject.pid(), "--wait"]);
        assert_eq!(cgroup_of(&subject.pid()), before);
        subject.check();
        subject.check();
    }
}

#[test]
fn a_cgroup_as_it_is_and_its_memory_on_demand() {
    let holder = Holder::new();
    let cgroup = Cgroup::new(&format!("medes-attachtest-{}", unique()));
    let script = [SUBJECT, PARENT].concat();
    let mut subject = Subject::start_with(&mut cgroup.start(&["python3", "-c", &script]));
    let path = cgroup.0.to_str().expect("text");
    for _ in 0..3 {
        let done = holder.json(&["dedup", "--cgroup", path]);
        let id = done["id"].as_str().expect("an identifier");
        holder.json(&["restore", id]);
        subject.check();
    }
    let below = Path::new("/").join(cgroup.0.file_name().expect("a name"));
    holder.json(&["dedup", "--cgroup", below.to_str().expect("text")]);
    holder.json(&["restore", "--all", "--wait"]);
    subject.check();
    assert_eq!(holder.attached(), 0);
}

#[test]
fn a_container_with_namespaces_and_a_seccomp_filter() {
    let holder = Holder::new();
    // As Docker names them on a host with systemd.
    let id = format!("{:0>64}", unique().replace('-', "0"));
    let cgroup = Cgroup::new(&format!("docker-{id}.scope"));
    let script = [SUBJECT, FILTER, ALONE].concat();
    let command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "--pid",
        "--fork",
        "--net",
        "--ipc",
        "--uts",
        "--cgroup",
        "--kill-child",
        "python3",
        "-c",
        &script,
    ];
    let mut subject = Subject::start_with(&mut cgroup.start(&command));
    let dry = holder.json(&["dedup", "--container", &id, "--dry-run"]);
    for _ in 0..2 {
        let done = holder.json(&["dedup", "--container", &id]);
        assert_eq!(done["processes"], dry["processes"]);
        assert!(bytes(&done, "image_bytes") * 2 < bytes(&done, "private_bytes"), "{done}");
        holder.json(&["restore", "--container", &id]);
        subject.check();
        subject.check();
        holder.json(&["restore", "--all", "--wait"]);
    }
    subject.check();
}

#[test]
fn a_group_with_other_processes_than_before_is_read_anew() {
    let holder = Holder::new();
    let mut subject = Subject::start(&[SUBJECT, FORKS]);
    let dedup = |subject: &mut Subject, processes: usize| {
        let done = holder.json(&["dedup", "--pid", &subject.pid()]);
        assert_eq!(done["processes"], processes);
        holder.json(&["restore", "--pid", &subject.pid(), "--wait"]);
        subject.check();
        subject.check();
        bytes(&done, "reused_pages")
    };
    assert_eq!(dedup(&mut subject, 1), 0);
    assert!(dedup(&mut subject, 1) > 0);
    subject.fork();
    assert_eq!(dedup(&mut subject, 2), 0);
    assert!(dedup(&mut subject, 2) > 0);
    // The first is as it was, in the place of the second there is another one.
    let before = subject.forked();
    nix::sys::signal::kill(before, nix::sys::signal::Signal::SIGKILL).expect("kills");
    let status = || fs::read_to_string(format!("/proc/{before}/status")).expect("not waited for");
    while !status().contains("State:\tZ") {
        std::thread::sleep(Duration::from_millis(1));
    }
    subject.fork();
    assert_eq!(dedup(&mut subject, 2), 0);
    assert!(dedup(&mut subject, 2) > 0);
    // The holder's end lets go of it.
    let pid = nix::unistd::Pid::from_raw(holder.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kills");
    subject.check();
}

#[test]
fn groups_of_one_program_share_base_pages_in_their_domain() {
    let holder = Holder::new();
    let mut subjects: Vec<Subject> = (0..4).map(|_| Subject::start(&[SUBJECT, ALONE])).collect();
    let dedup = |subject: &Subject, domain: &str| {
        holder.json(&["dedup", "--pid", &subject.pid(), "--domain", domain])
    };
    let alone = dedup(&subjects[0], "one");
    assert_eq!(bytes(&alone, "equal_pages") + bytes(&alone, "patched_pages"), 0, "{alone}");
    dedup(&subjects[1], "one");
    // The third is worth keeping whole.
    let base = dedup(&subjects[2], "one");
    assert!(bytes(&base, "base_bytes") > 0, "{base}");
    let elsewhere = dedup(&subjects[3], "another");
    let shared = |report: &Value| bytes(report, "equal_pages") + bytes(report, "patched_pages");
    assert_eq!(shared(&elsewhere), 0, "{elsewhere}");
    holder.json(&["restore", "--pid", &subjects[3].pid(), "--wait"]);
    let profits = dedup(&subjects[3], "one");
    assert!(shared(&profits) > 200, "{profits}");
    holder.json(&["restore", "--all", "--wait"]);
    subjects.iter_mut().for_each(Subject::check);
}

#[test]
fn a_holder_that_is_killed_takes_along_what_lacks_memory() {
    let holder = Holder::new();
    let cgroup = Cgroup::new(&format!("medes-attachtest-{}", unique()));
    let script = [SUBJECT, PARENT].concat();
    let mut lacking = Subject::start_with(&mut cgroup.start(&["python3", "-c", &script]));
    let mut tree = Subject::start(&[SUBJECT, ALONE]);
    let mut bystander = Subject::start(&[SUBJECT, ALONE]);
    holder.json(&["dedup", "--cgroup", cgroup.0.to_str().expect("text")]);
    holder.json(&["dedup", "--pid", &tree.pid()]);
    holder.json(&["dedup", "--pid", &bystander.pid()]);
    holder.json(&["restore", "--pid", &bystander.pid(), "--wait"]);
    let pid = nix::unistd::Pid::from_raw(holder.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kills");
    assert!(lacking.is_killed_within(Duration::from_secs(10)));
    assert!(tree.is_killed_within(Duration::from_secs(10)));
    bystander.check();
    // The next one cleans up and works.
    holder.json(&["dedup", "--pid", &bystander.pid()]);
    assert_eq!(holder.attached(), 1);
    holder.json(&["restore", "--all", "--wait"]);
    bystander.check();
    let left = fs::read_dir(unified()).expect("cgroups").flatten().filter(|entry| {
        entry.file_name().to_string_lossy().starts_with(&format!("medes-attach-{pid}-"))
    });
    assert_eq!(left.count(), 0);
}

#[test]
fn what_must_go_on_is_refused() {
    let holder = Holder::new();
    let own = std::process::id().to_string();
    for (arguments, expected) in [
        (["--pid", "1"], "the host's first process"),
        (["--pid", "2"], "a thread of the kernel"),
        (["--pid", &own], "the command that asks"),
        (["--pid", "2147483647"], "there is no process"),
        (["--cgroup", "/no/such/cgroup"], "there is no cgroup"),
        (["--cgroup", "/"], "holds all of the host"),
        (["--container", "no-such-container"], "there is no running container"),
    ] {
        let said = holder.refused(&["dedup", arguments[0], arguments[1]]);
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
    // Something in the way is found before anything is done.
    let held = "import ctypes\nassert ctypes.CDLL(None).syscall(323, 0) >= 0\n";
    let mut subject = Subject::start(&[SUBJECT, held, ALONE]);
    let said = holder.refused(&["dedup", "--pid", &subject.pid()]);
    assert!(said.contains("userfaultfd of its own"), "{said}");
    subject.check();
    assert_eq!(holder.attached(), 0);
}

#[test]
fn events_tell_what_happened() {
    let holder = Holder::new();
    let mut subject = Subject::start(&[SUBJECT, ALONE]);
    holder.json(&["dedup", "--pid", &subject.pid()]);
    holder.json(&["restore", "--all", "--wait"]);
    subject.check();
    drop(subject);
    // Ends when the holder does, which has nothing to do any more.
    let output = holder.run(&["status", "--watch", "--json"]);
    let text = String::from_utf8(output.stdout).expect("text");
    let events: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let what: Vec<&str> = events.iter().filter_map(|event| event["what"].as_str()).collect();
    assert_eq!(what, ["attached", "dedup", "runs", "restored"]);
}
