//! What stands in the way is found before anything is dropped.

use crate::harness::Target;
use medes_memory::mappings::Mappings;
use medes_memory::obstacle::{Obstacle, ObstacleOptions, find_mapping_obstacles, find_obstacles};
use medes_memory::session::on_tracer_thread;
use medes_memory::tracee::ThreadGroup;

fn obstacles(pid: i32) -> Vec<Obstacle> {
    let mappings = Mappings::read(pid).unwrap_or_default();
    let mut found = find_obstacles(pid, &ObstacleOptions::default()).unwrap();
    found.extend(find_mapping_obstacles(pid, &mappings));
    found
}

#[test]
fn an_ordinary_process_has_none() {
    assert_eq!(obstacles(Target::spawn("memory").pid), []);
}

#[test]
fn io_uring_is_found() {
    let target = Target::spawn("uring");
    if std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").is_ok_and(|v| v.trim() == "2")
    {
        println!("skipped: io_uring is disabled on this host");
        return;
    }
    assert!(matches!(obstacles(target.pid)[..], [Obstacle::IoUring { .. }]));
}

#[test]
fn asynchronous_io_is_found() {
    let target = Target::spawn("aio");
    assert_eq!(obstacles(target.pid), [Obstacle::Aio { pid: target.pid }]);
}

#[test]
fn a_userfaultfd_of_its_own_is_found_unless_it_is_ours() {
    let mut target = Target::spawn("userfault");
    let pid = target.pid;
    let fd = target.ask("fd").parse().unwrap();
    assert_eq!(obstacles(pid), [Obstacle::OwnUserfault { pid, fd }]);
    let ours = ObstacleOptions { kept_userfault: Some(fd), ..Default::default() };
    assert_eq!(find_obstacles(pid, &ours).unwrap(), []);
}

#[test]
fn a_tracer_is_found() {
    let target = Target::spawn("idle");
    on_tracer_thread(|| {
        let _process = ThreadGroup::seize(target.pid, &Default::default()).unwrap();
        // SAFETY: takes nothing.
        let tracer = unsafe { libc::gettid() };
        assert_eq!(obstacles(target.pid), [Obstacle::Traced { pid: target.pid, tracer }]);
    });
    assert_eq!(obstacles(target.pid), []);
}

#[test]
fn the_dead_and_the_bodiless_are_found() {
    let mut target = Target::spawn("idle");
    let pid = target.pid;
    // SAFETY: kill takes integers only.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    while !std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") Z") {}
    assert_eq!(obstacles(pid), [Obstacle::Zombie { pid }]);
    target.child().wait().unwrap();
    assert_eq!(obstacles(pid), [Obstacle::Gone { pid }]);
    assert_eq!(obstacles(2), [Obstacle::KernelThread { pid: 2 }]);
}
