//! Takes the memory of a command away and puts it back, and says what each step costs.
//!
//! `roundtrip SECONDS COMMAND [ARGUMENT...]`, as root: starts the command, waits so long for it
//! to settle, then does ten round trips.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use medes_memory::mappings::Mappings;
use medes_memory::pages::{PageRun, PageScanner};
use medes_memory::ranges::without;
use medes_memory::reader::read_pages;
use medes_memory::session::{Eviction, Freezer, Session, on_tracer_thread};
use medes_memory::tracee::SeizeOptions;
use medes_memory::userfault::{CopyMode, UserFaultFeatures, UserFaultOptions};
use medes_memory::writer::write_pages;

struct Cgroup(PathBuf);

impl Cgroup {
    fn set(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.0.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
        let wanted = if frozen { "frozen 1" } else { "frozen 0" };
        while !fs::read_to_string(self.0.join("cgroup.events"))?.contains(wanted) {
            std::thread::yield_now();
        }
        Ok(())
    }
}

impl Freezer for &Cgroup {
    fn freeze(&mut self) -> io::Result<()> {
        self.set(true)
    }

    fn thaw(&mut self) -> io::Result<()> {
        self.set(false)
    }

    fn processes(&mut self) -> io::Result<Vec<i32>> {
        let procs = fs::read_to_string(self.0.join("cgroup.procs"))?;
        Ok(procs.lines().filter_map(|line| line.parse().ok()).collect())
    }
}

/// Milliseconds of each step, by name.
#[derive(Default)]
struct Steps(Vec<(&'static str, f64)>);

impl Steps {
    fn time<T>(&mut self, name: &'static str, step: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = step();
        self.0.push((name, start.elapsed().as_secs_f64() * 1e3));
        result
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let seconds: f64 = arguments.next().ok_or("roundtrip SECONDS COMMAND...")?.parse()?;
    let program = arguments.next().ok_or("roundtrip SECONDS COMMAND...")?;
    let mounts = fs::read_to_string("/proc/mounts")?;
    let root = mounts
        .lines()
        .find_map(|line| line.split(' ').nth(1).filter(|_| line.contains(" cgroup2 ")))
        .ok_or("no cgroup2 mount")?;
    let cgroup = Cgroup(PathBuf::from(root).join(format!("roundtrip-{}", std::process::id())));
    fs::create_dir(&cgroup.0)?;
    let mut child = Command::new(program).args(arguments).spawn()?;
    fs::write(cgroup.0.join("cgroup.procs"), child.id().to_string())?;
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let mut buffer = Vec::new();
    let result = (0..10).try_for_each(|_| {
        let steps = on_tracer_thread(|| roundtrip(&cgroup, child.id() as i32, &mut buffer))?;
        let line: Vec<_> = steps.0.iter().map(|(name, ms)| format!("{name} {ms:.3}")).collect();
        println!("{}", line.join("  "));
        Ok(())
    });
    fs::write(cgroup.0.join("cgroup.kill"), "1")?;
    child.wait()?;
    while fs::remove_dir(&cgroup.0).is_err() {}
    result
}

fn roundtrip(mut cgroup: &Cgroup, pid: i32, buffer: &mut Vec<u8>) -> Result<Steps, Failure> {
    let mut steps = Steps::default();
    steps.time("freeze", || cgroup.freeze())?;
    let mut session = steps.time("seize", || Session::open(cgroup, &SeizeOptions::default()))?;
    let process = session.process(pid).ok_or("the process is gone")?;
    let keep: Vec<Range<u64>> = process
        .rseq_areas()?
        .iter()
        .flat_map(|area| area.resident_pages().collect::<Vec<_>>())
        .collect();
    let mappings = steps.time("maps", || Mappings::read(pid))?;
    let mut scanner = PageScanner::open(pid)?;
    let mut eviction = Eviction::default();
    let (mut anonymous, mut file) = (Vec::new(), Vec::new());
    steps.time("scan", || -> io::Result<()> {
        for mapping in mappings.iter().filter(|mapping| mapping.left_resident().is_none()) {
            let mut runs = Vec::new();
            scanner.scan(mapping, &mut runs)?;
            if runs.is_empty() {
                continue;
            }
            let runs = runs.iter().flat_map(|run| {
                without(run.range(), &keep).into_iter().map(|part| PageRun {
                    start: part.start,
                    pages: ((part.end - part.start) / medes_memory::PAGE_SIZE) as u32,
                    class: run.class,
                })
            });
            let drop = without(mapping.range(), &keep);
            if mapping.is_anonymous() {
                eviction.register.push(mapping.range());
                eviction.anonymous.extend(drop);
                anonymous.extend(runs);
            } else {
                eviction.file.extend(drop);
                file.extend(runs);
            }
        }
        Ok(())
    })?;
    let bytes = |runs: &[PageRun]| runs.iter().map(PageRun::bytes).sum::<u64>() as usize;
    buffer.resize(buffer.len().max(bytes(&anonymous) + bytes(&file)), 0);
    let (first, second) = buffer.split_at_mut(bytes(&anonymous));
    let second = &mut second[..bytes(&file)];
    steps.time("read", || {
        read_pages(pid, &anonymous, first)?;
        read_pages(pid, &file, second)
    })?;
    let options =
        UserFaultOptions { features: UserFaultFeatures::EVENTS, ..UserFaultOptions::default() };
    let own = session.process(pid).ok_or("the process is gone")?;
    steps.time("100 getpid", || {
        (0..100).try_for_each(|_| own.inject_syscall(39, [0; 6]).map(|_| ()))
    })?;
    let mut userfault = steps.time("userfaultfd", || session.userfault(pid, &options))?;
    let handed = UserFaultOptions { without_privilege: true, ..options };
    steps.time("handed", || session.userfault(pid, &handed).map(|_| ()))?;
    let evicted = steps.time("evict", || session.evict(pid, &mut userfault, &eviction))?;
    steps.time("close", || session.close())?;
    steps.time("copy", || -> Result<(), Failure> {
        let mut rest = &*first;
        for run in &anonymous {
            let (content, tail) = rest.split_at(run.bytes() as usize);
            userfault.copy(run.start, content, CopyMode::default())?;
            rest = tail;
        }
        Ok(())
    })?;
    steps.time("write", || write_pages(pid, &file, second))?;
    steps.time("unregister", || userfault.unregister_all())?;
    steps.time("thaw", || cgroup.thaw())?;
    let mapped = mappings.len() as f64;
    steps.0.push(("| mappings", mapped));
    steps.0.push(("anon MB", first.len() as f64 / 1e6));
    steps.0.push(("runs", anonymous.len() as f64));
    steps.0.push(("file MB", second.len() as f64 / 1e6));
    steps.0.push(("ranges", (eviction.anonymous.len() + eviction.file.len()) as f64));
    steps.0.push(("calls", f64::from(evicted.anonymous.calls + evicted.file.calls)));
    Ok(steps)
}
