//! Seizing, injecting, and what the process notices of it.

use std::time::{Duration, Instant};

use crate::harness::{Cgroup, Target};
use crate::targets::WAITS;
use medes_memory::session::{Freezer, Session, on_tracer_thread};
use medes_memory::tracee::{InjectError, SeizeError, SeizeOptions, ThreadGroup};

/// Stops the target and makes it run calls, with the freezer and without it by turns.
fn disturb(cgroup: &Cgroup, pid: i32, rounds: u64) {
    let options = SeizeOptions::default();
    for round in 0..rounds {
        on_tracer_thread(|| {
            if round % 2 == 0 {
                let mut session = Session::open(cgroup, &options).unwrap();
                let process = session.process(pid).unwrap();
                let own = process.inject_syscall(libc::SYS_getpid, [0; 6]).unwrap();
                assert_eq!(own, i64::from(pid));
                session.close().unwrap();
                let mut freezer = cgroup;
                freezer.thaw().unwrap();
            } else {
                let mut process = ThreadGroup::seize(pid, &options).unwrap();
                process.scratch().unwrap();
                process.detach().unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(round % 5));
    }
    // A wait that starts anew ends only once it is left alone for its whole timeout.
    std::thread::sleep(Duration::from_millis(100));
}

fn assert_waits_ended(target: &mut Target) {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let verdict = target.ask("verdict");
        let fewest: u64 = verdict.parse().unwrap_or_else(|_| panic!("{verdict}"));
        if fewest > 0 {
            break;
        }
        assert!(Instant::now() < until, "a wait never ended");
    }
}

#[test]
fn interrupted_waits_go_on() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("waits");
    cgroup.add(target.pid);
    disturb(&cgroup, target.pid, 200);
    assert_waits_ended(&mut target);
}

#[test]
fn waits_of_the_thread_that_runs_injected_calls_go_on() {
    for index in 0..WAITS.len() {
        let cgroup = Cgroup::new();
        let mut target = Target::spawn(&format!("wait {index}"));
        cgroup.add(target.pid);
        disturb(&cgroup, target.pid, 50);
        assert_waits_ended(&mut target);
    }
}

#[test]
fn a_thread_in_sigsuspend_keeps_both_of_its_masks() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("suspended");
    cgroup.add(target.pid);
    for round in 1..=20 {
        disturb(&cgroup, target.pid, 2);
        // SAFETY: kill takes integers only.
        let signal = || unsafe { libc::kill(target.pid, libc::SIGUSR1) };
        if round % 2 == 0 {
            signal();
        } else {
            // While it runs an injected call.
            on_tracer_thread(|| {
                let mut process = ThreadGroup::seize(target.pid, &Default::default()).unwrap();
                process.inject_syscall(libc::SYS_getpid, [0; 6]).unwrap();
                signal();
                process.inject_syscall(libc::SYS_getpid, [0; 6]).unwrap();
                process.detach().unwrap();
            });
        }
        assert_eq!(target.reply(), format!("{round} true"));
    }
}

#[test]
fn injection_needs_a_thawed_group() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("idle");
    cgroup.add(target.pid);
    let mut freezer = &cgroup;
    freezer.freeze().unwrap();
    on_tracer_thread(|| {
        let options =
            SeizeOptions { call_deadline: Duration::from_millis(100), ..Default::default() };
        let mut process = ThreadGroup::seize(target.pid, &options).unwrap();
        let error = process.inject_syscall(libc::SYS_getpid, [0; 6]).unwrap_err();
        assert!(matches!(error, InjectError::TimedOut { .. }), "{error}");
        // The same process, thawed under its stopped threads, runs the call.
        let mut freezer = &cgroup;
        freezer.thaw().unwrap();
        let own = process.inject_syscall(libc::SYS_getpid, [0; 6]).unwrap();
        assert_eq!(own, i64::from(target.pid));
        freezer.freeze().unwrap();
        process.detach().unwrap();
    });
    target.send("still there?");
    std::thread::sleep(Duration::from_millis(50));
    freezer.thaw().unwrap();
    assert_eq!(target.reply(), "ok");
}

#[test]
fn a_call_that_does_not_return_is_given_up() {
    let mut target = Target::spawn("idle");
    on_tracer_thread(|| {
        let options =
            SeizeOptions { call_deadline: Duration::from_millis(50), ..Default::default() };
        let mut process = ThreadGroup::seize(target.pid, &options).unwrap();
        for _ in 0..3 {
            let error = process.inject_syscall(libc::SYS_pause, [0; 6]).unwrap_err();
            assert!(matches!(error, InjectError::TimedOut { .. }), "{error}");
            let own = process.inject_syscall(libc::SYS_getpid, [0; 6]).unwrap();
            assert_eq!(own, i64::from(target.pid));
        }
        assert!(process.inject_syscall(libc::SYS_pause, [0; 6]).is_err());
        process.detach().unwrap();
    });
    target.send("still there?");
    assert_eq!(target.reply(), "ok");
}

#[test]
fn signals_are_not_lost() {
    let mut target = Target::spawn("signals");
    let real_time = libc::SIGRTMIN() + 3;
    for round in 0..50u32 {
        on_tracer_thread(|| {
            // SAFETY: kill takes integers only.
            let kill = |signal| unsafe { libc::kill(target.pid, signal) };
            kill(real_time);
            let mut process = ThreadGroup::seize(target.pid, &Default::default()).unwrap();
            kill(real_time);
            process.inject_syscall(libc::SYS_getpid, [0; 6]).unwrap();
            kill(real_time);
            if round % 2 == 0 {
                process.scratch().unwrap();
            }
            process.detach().unwrap();
        });
    }
    // Real-time signals queue: each one is counted.
    let until = Instant::now() + Duration::from_secs(5);
    while target.ask("count") != "150" && Instant::now() < until {}
    assert_eq!(target.ask("count"), "150");
}

#[test]
fn a_stopped_process_stays_stopped() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("signals");
    cgroup.add(target.pid);
    let pid = target.pid;
    // SAFETY: kill takes integers only.
    let kill = |signal| unsafe { libc::kill(pid, signal) };
    let state = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    };
    let wait_for = |wanted| {
        let until = Instant::now() + Duration::from_secs(5);
        while state() != wanted {
            assert!(Instant::now() < until, "state {} instead of {wanted}", state());
            std::thread::yield_now();
        }
    };
    kill(libc::SIGSTOP);
    wait_for('T');
    for round in 0..20 {
        on_tracer_thread(|| {
            if round % 2 == 0 {
                let mut session = Session::open(&cgroup, &SeizeOptions::default()).unwrap();
                session.process(pid).unwrap().scratch().unwrap();
                session.close().unwrap();
                let mut freezer = &cgroup;
                freezer.thaw().unwrap();
            } else {
                let mut process = ThreadGroup::seize(pid, &Default::default()).unwrap();
                process.scratch().unwrap();
                process.detach().unwrap();
            }
        });
        wait_for('T');
    }
    kill(libc::SIGCONT);
    assert_eq!(target.ask("count"), "0");
    // Stopped while it runs injected calls: stopped after them.
    on_tracer_thread(|| {
        let mut process = ThreadGroup::seize(pid, &Default::default()).unwrap();
        process.scratch().unwrap();
        kill(libc::SIGSTOP);
        process.inject_syscall(libc::SYS_getpid, [0; 6]).unwrap();
        process.detach().unwrap();
    });
    wait_for('T');
    kill(libc::SIGCONT);
    assert_eq!(target.ask("count"), "0");
}

#[test]
fn threads_that_come_and_go_are_followed() {
    let mut target = Target::spawn("threads");
    for _ in 0..100 {
        on_tracer_thread(|| {
            let mut process = ThreadGroup::seize(target.pid, &Default::default()).unwrap();
            process.scratch().unwrap();
            // Nobody runs: the listing does not change.
            let list = || {
                let mut tids: Vec<i32> = std::fs::read_dir(format!("/proc/{}/task", target.pid))
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
                    .collect();
                tids.sort_unstable();
                tids
            };
            let mut seized: Vec<i32> = process.threads().collect();
            seized.sort_unstable();
            let alive = |tid: &i32| {
                std::fs::read_to_string(format!("/proc/{}/task/{tid}/stat", target.pid))
                    .is_ok_and(|stat| !stat.contains(") Z") && !stat.contains(") X"))
            };
            let listed: Vec<i32> = list().into_iter().filter(alive).collect();
            assert!(listed.iter().all(|tid| seized.contains(tid)), "{listed:?} {seized:?}");
            process.detach().unwrap();
        });
    }
    assert_eq!(target.ask("alive?"), "ok");
}

#[test]
fn a_process_is_traced_once() {
    let target = Target::spawn("idle");
    on_tracer_thread(|| {
        let _process = ThreadGroup::seize(target.pid, &Default::default()).unwrap();
        let error = on_tracer_thread(|| ThreadGroup::seize(target.pid, &Default::default()).err());
        let error = error.unwrap();
        assert!(matches!(error, SeizeError::AlreadyTraced { .. }), "{error}");
        assert!(error.to_string().contains("already traced by"));
    });
}

#[test]
fn a_process_that_is_gone_or_dead_cannot_be_seized() {
    let mut target = Target::spawn("idle");
    let pid = target.pid;
    // SAFETY: kill takes integers only.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    let until = Instant::now() + Duration::from_secs(5);
    while !std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") Z") {
        assert!(Instant::now() < until);
    }
    let error = on_tracer_thread(|| ThreadGroup::seize(pid, &Default::default()).err().unwrap());
    assert!(matches!(error, SeizeError::Zombie(_)), "{error}");
    target.child().wait().unwrap();
    let error = on_tracer_thread(|| ThreadGroup::seize(pid, &Default::default()).err().unwrap());
    assert!(matches!(error, SeizeError::Gone(_)), "{error}");
}

#[test]
fn errors_of_injected_calls_are_errors() {
    let mut target = Target::spawn("idle");
    on_tracer_thread(|| {
        let mut process = ThreadGroup::seize(target.pid, &Default::default()).unwrap();
        let error = process.call("close", libc::SYS_close, [9999, 0, 0, 0, 0, 0]).unwrap_err();
        assert!(error.to_string().starts_with("close in process"), "{error}");
    });
    assert_eq!(target.ask("alive?"), "ok");
}

#[test]
fn a_process_frozen_by_the_v1_freezer_is_refused() {
    let root = std::path::Path::new("/sys/fs/cgroup/freezer");
    if !root.join("cgroup.procs").exists() {
        println!("skipped: this host mounts no v1 freezer");
        return;
    }
    let group = root.join(format!("medes-memtest-{}", std::process::id()));
    std::fs::create_dir(&group).unwrap();
    let set = |state: &str| std::fs::write(group.join("freezer.state"), state).unwrap();
    let mut target = Target::spawn("idle");
    std::fs::write(group.join("cgroup.procs"), target.pid.to_string()).unwrap();
    set("FROZEN");
    let options = SeizeOptions { deadline: Duration::from_millis(50), ..Default::default() };
    let error = on_tracer_thread(|| ThreadGroup::seize(target.pid, &options).err().unwrap());
    set("THAWED");
    assert_eq!(target.ask("alive?"), "ok");
    drop(target);
    std::fs::remove_dir(&group).unwrap();
    assert!(matches!(error, SeizeError::FrozenV1 { .. }), "{error}");
}
