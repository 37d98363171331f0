//! Target processes, cgroups to freeze them in, and one whole eviction.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use medes_memory::mappings::{Mapping, Mappings};
use medes_memory::pages::{PageRun, PageScanner};
use medes_memory::ranges::{overlap, without};
use medes_memory::reader::read_pages;
use medes_memory::session::{Evicted, Eviction, Freezer, Session, on_tracer_thread};
use medes_memory::tracee::SeizeOptions;
use medes_memory::userfault::{CopyMode, UserFault, UserFaultFeatures, UserFaultOptions};
use medes_memory::writer::write_pages;

pub const TARGET_VARIABLE: &str = "MEDES_MEMORY_TARGET";

/// A cgroup v2 of one test, removed with everything in it.
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let root = fs::read_to_string("/proc/mounts")
            .unwrap()
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields[2] == "cgroup2")
            .map(|fields| PathBuf::from(fields[1]))
            .expect("a cgroup2 mount");
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("medes-memtest-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self { path }
    }

    pub fn add(&self, pid: i32) {
        fs::write(self.path.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    pub fn procs_file(&self) -> fs::File {
        fs::OpenOptions::new().write(true).open(self.path.join("cgroup.procs")).unwrap()
    }

    fn set_frozen(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.path.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
        let wanted = if frozen { "frozen 1" } else { "frozen 0" };
        let until = Instant::now() + Duration::from_secs(5);
        while !fs::read_to_string(self.path.join("cgroup.events"))?.contains(wanted) {
            if Instant::now() > until {
                return Err(io::Error::new(io::ErrorKind::TimedOut, wanted));
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}

impl Freezer for &Cgroup {
    fn freeze(&mut self) -> io::Result<()> {
        self.set_frozen(true)
    }

    fn thaw(&mut self) -> io::Result<()> {
        self.set_frozen(false)
    }

    fn processes(&mut self) -> io::Result<Vec<i32>> {
        let procs = fs::read_to_string(self.path.join("cgroup.procs"))?;
        Ok(procs.lines().map(|line| line.parse().unwrap()).collect())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        let until = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.path).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A target process: one line in, one line out.
pub struct Target {
    child: Child,
    replies: BufReader<std::process::ChildStderr>,
    pub pid: i32,
}

impl Target {
    pub fn spawn(name: &str) -> Self {
        Self::spawn_with(name, |_| {})
    }

    pub fn spawn_with(name: &str, configure: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .env(TARGET_VARIABLE, name)
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        configure(&mut command);
        let mut child = command.spawn().unwrap();
        let replies = BufReader::new(child.stderr.take().unwrap());
        let pid = child.id() as i32;
        let mut target = Self { child, replies, pid };
        let reply = target.reply();
        match reply.strip_prefix("ready") {
            Some(rest) => {
                if let Ok(pid) = rest.trim().parse() {
                    target.pid = pid;
                }
            }
            None => panic!("target {name}: {reply}"),
        }
        target
    }

    pub fn send(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    pub fn reply(&mut self) -> String {
        let mut line = String::new();
        self.replies.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.send(line);
        self.reply()
    }

    pub fn exited(&mut self, within: Duration) -> bool {
        let until = Instant::now() + within;
        while Instant::now() < until {
            if self.child.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // SAFETY: kill takes integers only.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything that was taken from a process.
pub struct Saved {
    pub pid: i32,
    pub userfault: UserFault,
    pub anonymous: Vec<PageRun>,
    pub anonymous_content: Vec<u8>,
    pub file: Vec<PageRun>,
    pub file_content: Vec<u8>,
    pub evicted: Evicted,
}

impl Saved {
    /// The userfaultfd, to be used while the rest is borrowed. What is left is of no use.
    pub fn take_userfault(&mut self) -> UserFault {
        let placeholder = fs::File::open("/dev/null").unwrap().into();
        let features = self.userfault.features();
        let none = UserFault::from_parts(placeholder, features, Vec::new(), None);
        std::mem::replace(&mut self.userfault, none)
    }

    /// Puts everything back.
    pub fn restore(&mut self) {
        let mut rest = &self.anonymous_content[..];
        for run in &self.anonymous {
            let (content, tail) = rest.split_at(run.bytes() as usize);
            let filled = self.userfault.copy(run.start, content, CopyMode::default()).unwrap();
            assert_eq!(filled.filled + filled.present, run.bytes());
            rest = tail;
        }
        write_pages(self.pid, &self.file, &self.file_content).unwrap();
    }
}

/// How a test's eviction differs from the plain one.
#[derive(Default, Clone)]
pub struct How {
    pub userfault: UserFaultOptions,
    pub track_writes: bool,
}

impl How {
    pub fn with_events() -> Self {
        let userfault =
            UserFaultOptions { features: UserFaultFeatures::EVENTS, ..Default::default() };
        Self { userfault, ..Self::default() }
    }
}

pub fn content_of(pid: i32, runs: &[PageRun]) -> Vec<u8> {
    let bytes: u64 = runs.iter().map(PageRun::bytes).sum();
    let mut content = vec![0; bytes as usize];
    assert_eq!(read_pages(pid, runs, &mut content).unwrap(), content.len());
    content
}

/// What to take from a stopped process: mappings, pages, ranges to drop.
pub struct Plan {
    pub eviction: Eviction,
    pub anonymous: Vec<PageRun>,
    pub file: Vec<PageRun>,
}

pub fn plan(pid: i32, keep: &[Range<u64>]) -> Plan {
    try_plan(pid, keep).unwrap()
}

pub fn try_plan(pid: i32, keep: &[Range<u64>]) -> io::Result<Plan> {
    let mut mappings: Vec<Mapping> = Mappings::read(pid)?;
    mappings.retain(|mapping| mapping.left_resident().is_none());
    let mut scanner = PageScanner::open(pid)?;
    let mut plan = Plan { eviction: Eviction::default(), anonymous: Vec::new(), file: Vec::new() };
    for mapping in &mappings {
        let mut runs = Vec::new();
        scanner.scan(mapping, &mut runs)?;
        if runs.is_empty() {
            continue;
        }
        let kept = |run: &PageRun| {
            without(run.range(), keep)
                .into_iter()
                .map(|part| PageRun {
                    start: part.start,
                    pages: ((part.end - part.start) / medes_memory::PAGE_SIZE) as u32,
                    class: run.class,
                })
                .collect::<Vec<_>>()
        };
        let runs = runs.iter().flat_map(kept);
        let drop = without(mapping.range(), keep);
        if mapping.is_anonymous() {
            plan.eviction.register.push(mapping.range());
            plan.eviction.anonymous.extend(drop);
            plan.anonymous.extend(runs);
        } else {
            plan.eviction.file.extend(drop);
            plan.file.extend(runs);
        }
    }
    assert!(plan.eviction.anonymous.iter().all(|range| !keep.iter().any(|k| overlap(range, k))));
    if plan.anonymous.is_empty() {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(plan)
}

/// Takes everything from one process of a group; the group is frozen afterwards.
pub fn evict(cgroup: &Cgroup, pid: i32, how: &How) -> Saved {
    evict_all(cgroup, &[pid], how).pop().expect("one process")
}

/// Takes everything from processes of a group at once.
pub fn evict_all(cgroup: &Cgroup, pids: &[i32], how: &How) -> Vec<Saved> {
    on_tracer_thread(|| {
        let mut session = Session::open(cgroup, &SeizeOptions::default()).unwrap();
        let all = pids.iter().map(|pid| evict_one(&mut session, *pid, how, None)).collect();
        session.close().unwrap();
        all
    })
}

/// Takes everything from one process, by a userfaultfd that it was taken by before.
pub fn evict_again(cgroup: &Cgroup, pid: i32, how: &How, userfault: UserFault) -> Saved {
    on_tracer_thread(|| {
        let mut session = Session::open(cgroup, &SeizeOptions::default()).unwrap();
        let saved = evict_one(&mut session, pid, how, Some(userfault));
        session.close().unwrap();
        saved
    })
}

fn evict_one(
    session: &mut Session<&Cgroup>,
    pid: i32,
    how: &How,
    userfault: Option<UserFault>,
) -> Saved {
    let process = session.process(pid).expect("the target is in the group");
    let areas = process.rseq_areas().unwrap();
    let keep: Vec<_> =
        areas.iter().flat_map(|area| area.resident_pages().collect::<Vec<_>>()).collect();
    let mut plan = plan(pid, &keep);
    plan.eviction.track_writes = how.track_writes;
    let anonymous_content = content_of(pid, &plan.anonymous);
    let file_content = content_of(pid, &plan.file);
    let mut userfault =
        userfault.unwrap_or_else(|| session.userfault(pid, &how.userfault).unwrap());
    let evicted = session.evict(pid, &mut userfault, &plan.eviction).unwrap();
    assert!(evicted.left_resident.is_empty(), "{:?}", evicted.left_resident);
    let Plan { anonymous, file, .. } = plan;
    Saved { pid, userfault, anonymous, anonymous_content, file, file_content, evicted }
}

/// Private memory of a process in bytes.
pub fn private_bytes(pid: i32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let kib: u64 = rollup
        .lines()
        .filter_map(|line| line.strip_prefix("Anonymous:"))
        .map(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap())
        .sum();
    kib * 1024
}
