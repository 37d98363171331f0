//! Nothing is left behind. Alone in its program, so that it can count what the program has open.

mod common;

use std::fs;
use std::time::Instant;

use common::{Instance, LONG, processes_of};

/// Open descriptors, threads, and mounts that keep a namespace alive.
fn held() -> (usize, usize, usize) {
    let count = |dir: &str| fs::read_dir(dir).unwrap().count();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let namespaces = mounts.lines().filter(|l| l.contains(" - nsfs ")).count();
    (count("/proc/self/fd"), count("/proc/self/task"), namespaces)
}

#[test]
fn nothing_is_left_after_a_hundred_sandboxes() {
    let i = Instance::new();
    let mut spec = i.spec(&["/bin/sleep", "1000"]);
    let before = held();
    let (mut created, mut deleted) = (Vec::new(), Vec::new());
    for n in 0..100 {
        spec.id = format!("n{n}");
        let start = Instant::now();
        let (running, output) = i.start(&spec);
        created.push(start.elapsed());
        drop(output);
        let start = Instant::now();
        running.destroy(LONG).unwrap();
        deleted.push(start.elapsed());
    }
    assert_eq!(held(), before);
    assert_eq!(processes_of(spec.host_uid), Vec::<i32>::new());
    assert!(i.root.list().unwrap().is_empty());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("/.host"), "{mounts}");
    created.sort();
    deleted.sort();
    println!(
        "create and start: p50 {:?}, p99 {:?}; delete: p50 {:?}, p99 {:?}",
        created[50], created[98], deleted[50], deleted[98]
    );
}
