//! The target dies at every step: each step then says so, and nothing hangs.

use std::time::Duration;

use crate::harness::{Cgroup, Target, evict, plan, private_bytes, try_plan};
use medes_memory::pages::PageRun;
use medes_memory::reader::read_pages;
use medes_memory::session::{Session, on_tracer_thread};
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
        let error =
            medes_memory::drop::drop_pages(&mut process, &mut userfault, &plan.eviction.anonymous)
                .unwrap_err();
        assert!(error.to_string().contains("is not registered"), "{error}");
        assert!(private_bytes(pid) >= before);
    });
    assert_eq!(target.ask("check"), "ok");
}
