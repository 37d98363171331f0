//! The target dies at every step: each step then says so, and nothing hangs.

use std::time::Duration;

use crate::harness::{Cgroup, Target, evict, plan, private_bytes, try_plan};
use medes_memory::obstacle::{Obstacle, ObstacleOptions, find_obstacles};
use medes_memory::pages::PageRun;
use medes_memory::reader::read_pages;
use medes_memory::session::{Freezer, Session, on_tracer_thread};
use medes_memory::tracee::{SeizeOptions, ThreadGroup};
use medes_memory::userfault::{CopyMode, FillError, RegisterMode};
use medes_memory::writer::write_pages;

fn kill(pid: i32) {
    // SAFETY: kill takes integers only.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Whether each step of an eviction succeeded; the target is killed before step `fatal`.
struct Steps {
    pid: i32,
    fatal: usize,
    outcomes: Vec<bool>,
}

impl Steps {
    fn done(&mut self, ok: bool) {
        self.outcomes.push(ok);
        if self.outcomes.len() == self.fatal {
            kill(self.pid);
            // Long enough for the kernel to tear it down, or not: both happen.
            if self.fatal.is_multiple_of(2) {
                std::thread::sleep(Duration::from_millis(30));
            }
        }
    }
}

fn evict_until_death(cgroup: &Cgroup, pid: i32, fatal: usize) -> Vec<bool> {
    on_tracer_thread(|| {
        let mut steps = Steps { pid, fatal, outcomes: Vec::new() };
        let mut session = Session::open(cgroup, &SeizeOptions::default()).unwrap();
        steps.done(true);
        let areas = session.process(pid).expect("seized").rseq_areas();
        steps.done(areas.is_ok());
        let keep: Vec<_> = areas
            .unwrap_or_default()
            .iter()
            .flat_map(|area| area.resident_pages().collect::<Vec<_>>())
            .collect();
        let plan = try_plan(pid, &keep);
        steps.done(plan.is_ok());
        let Ok(plan) = plan else { return steps.outcomes };
        let bytes: u64 = plan.anonymous.iter().map(PageRun::bytes).sum();
        let mut buffer = vec![0; bytes as usize];
        steps.done(read_pages(pid, &plan.anonymous, &mut buffer).is_ok());
        let userfault = session.userfault(pid, &Default::default());
        steps.done(userfault.is_ok());
        if let Ok(mut userfault) = userfault {
            let range = plan.eviction.register[0].clone();
            steps.done(userfault.register(range, RegisterMode::Missing).is_ok());
            let evicted = session.evict(pid, &mut userfault, &plan.eviction);
            steps.done(evicted.is_ok_and(|evicted| evicted.left_resident.is_empty()));
        }
        let _ = session.close();
        steps.outcomes
    })
}

#[test]
fn death_before_every_step_of_an_eviction() {
    for fatal in 1..8 {
        let cgroup = Cgroup::new();
        let mut target = Target::spawn("memory");
        cgroup.add(target.pid);
        let outcomes = evict_until_death(&cgroup, target.pid, fatal);
        assert!(target.exited(Duration::from_secs(5)), "step {fatal}: not dead, {outcomes:?}");
        assert!(outcomes.iter().take(fatal).all(|ok| *ok), "{outcomes:?}");
    }
}

#[test]
fn death_in_the_middle_of_injected_calls() {
    for round in 0..50 {
        let mut target = Target::spawn("idle");
        let pid = target.pid;
        on_tracer_thread(|| {
            let mut process = ThreadGroup::seize(pid, &Default::default()).unwrap();
            let killer = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(round * 20));
                kill(pid);
            });
            let mut calls = 0;
            while process.inject_syscall(libc::SYS_getpid, [0; 6]).is_ok() {
                calls += 1;
                assert!(calls < 10_000_000);
            }
            killer.join().unwrap();
        });
        assert!(target.exited(Duration::from_secs(5)));
    }
}

#[test]
fn death_before_the_restore() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("memory");
    cgroup.add(target.pid);
    let mut saved = evict(&cgroup, target.pid, &Default::default());
    kill(target.pid);
    // A task frozen by the v2 freezer dies at once, missing pages or not.
    assert!(target.exited(Duration::from_secs(5)));
    let run = saved.anonymous[0];
    let content = &saved.anonymous_content[..run.bytes() as usize];
    let error = saved.userfault.copy(run.start, content, CopyMode::default()).unwrap_err();
    assert!(matches!(error, FillError::Gone), "{error}");
    assert!(write_pages(target.pid, &saved.file, &saved.file_content).is_err());
    assert!(saved.userfault.unregister_all().is_err());
}

#[test]
fn the_death_of_the_tracer_kills_only_after_the_first_injected_call() {
    for inject in [false, true] {
        let mut target = Target::spawn("idle");
        let pid = target.pid;
        // A thread that ends without letting go, as one of a killed process does.
        std::thread::spawn(move || {
            let mut process = ThreadGroup::seize(pid, &Default::default()).unwrap();
            if inject {
                process.inject_syscall(libc::SYS_getpid, [0; 6]).unwrap();
            }
            std::mem::forget(process);
        })
        .join()
        .unwrap();
        if inject {
            assert!(target.exited(Duration::from_secs(5)));
        } else {
            assert_eq!(target.ask("alive?"), "ok");
        }
    }
}

#[test]
fn what_is_not_registered_is_not_dropped() {
    let mut target = Target::spawn("memory");
    let pid = target.pid;
    on_tracer_thread(|| {
        let mut process = ThreadGroup::seize(pid, &Default::default()).unwrap();
        let plan = plan(pid, &[]);
        let before = private_bytes(pid);
        let mut userfault =
            medes_memory::userfault::UserFault::create(&mut process, &Default::default()).unwrap();
        let (ranges, mut guarded) = (&plan.eviction.anonymous, Vec::new());
        let drop_pages = medes_memory::drop::drop_pages;
        let error = drop_pages(&mut process, &mut userfault, ranges, &mut guarded).unwrap_err();
        assert_eq!(guarded, []);
        assert!(error.to_string().contains("is not registered"), "{error}");
        assert!(private_bytes(pid) >= before);
    });
    assert_eq!(target.ask("check"), "ok");
}

/// A freezer that works until the group is thawed.
struct Failing<'a>(&'a Cgroup, bool);

impl Freezer for Failing<'_> {
    fn freeze(&mut self) -> std::io::Result<()> {
        if self.1 { Err(std::io::Error::other("broken")) } else { self.0.freeze() }
    }

    fn thaw(&mut self) -> std::io::Result<()> {
        self.1 = true;
        self.0.thaw()
    }

    fn processes(&mut self) -> std::io::Result<Vec<i32>> {
        self.0.processes()
    }
}

#[test]
fn a_process_that_lacks_pages_and_cannot_be_frozen_is_killed() {
    for evict in [true, false] {
        let cgroup = Cgroup::new();
        let mut target = Target::spawn("memory");
        let pid = target.pid;
        cgroup.add(pid);
        on_tracer_thread(|| {
            let failing = Failing(&cgroup, false);
            let mut session = Session::open(failing, &SeizeOptions::default()).unwrap();
            if evict {
                let plan = plan(pid, &[]);
                let mut userfault = session.userfault(pid, &Default::default()).unwrap();
                // Nothing of what the kernel touches on the way to user space.
                let largest = plan.eviction.anonymous.iter().max_by_key(|r| r.end - r.start);
                let eviction = medes_memory::session::Eviction {
                    register: plan.eviction.register.clone(),
                    anonymous: vec![largest.unwrap().clone()],
                    ..Default::default()
                };
                session.evict(pid, &mut userfault, &eviction).unwrap();
            }
            let error = session.close().unwrap_err();
            assert!(error.to_string().contains("broken"), "{error}");
        });
        if evict {
            assert!(target.exited(Duration::from_secs(5)));
        } else {
            assert_eq!(target.ask("check"), "ok");
        }
    }
}

#[test]
fn a_panic_in_a_session_leaves_the_process_frozen_and_whole() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("memory");
    cgroup.add(target.pid);
    let panicked = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let mut session = Session::open(&cgroup, &SeizeOptions::default()).unwrap();
                session.process(target.pid).unwrap().scratch().unwrap();
                std::panic::resume_unwind(Box::new("on purpose"));
            })
            .join()
            .is_err()
    });
    assert!(panicked);
    let mut freezer = &cgroup;
    freezer.thaw().unwrap();
    assert_eq!(target.ask("check"), "ok");
}

#[test]
fn a_parent_in_vfork_is_refused_in_time_and_let_go() {
    let mut target = Target::spawn("vfork");
    let pid = target.pid;
    let cgroup = Cgroup::new();
    cgroup.add(pid);
    target.send("go");
    let until = std::time::Instant::now() + Duration::from_secs(5);
    let child = loop {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let children = tasks.flatten().find_map(|task| {
            std::fs::read_to_string(task.path().join("children")).ok()?.trim().parse::<i32>().ok()
        });
        if let Some(child) = children {
            break child;
        }
        assert!(std::time::Instant::now() < until);
    };
    let options = ObstacleOptions { peers: &[child], ..Default::default() };
    let found = find_obstacles(pid, &options).unwrap();
    assert_eq!(found, [Obstacle::SharedAddressSpace { pid, other: child }]);
    on_tracer_thread(|| {
        let options = SeizeOptions { deadline: Duration::from_millis(100), ..Default::default() };
        let error = ThreadGroup::seize(pid, &options).err().unwrap();
        assert!(error.to_string().contains("did not stop within"), "{error}");
    });
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("TracerPid:\t0"), "{status}");
    kill(child);
}
