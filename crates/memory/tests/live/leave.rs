//! Memory left to the kernel's own means.

use crate::harness::{Target, content_of};
use medes_memory::leave::{allow_merging, own_pages, page_out};
use medes_memory::pages::{PageClass, PageRun};
use medes_memory::session::on_tracer_thread;

#[test]
fn paging_out_changes_no_content() {
    let mut target = Target::spawn("idle");
    // It has its first answer behind it then, and waits.
    target.ask("hello");
    wait_until_asleep(target.pid);
    let pages = own_pages(target.pid).unwrap();
    let runs: Vec<_> = pages
        .iter()
        .map(|range| PageRun {
            start: range.start,
            pages: ((range.end - range.start) / 4096) as u32,
            class: PageClass::Anonymous,
        })
        .collect();
    let before = content_of(target.pid, &runs);
    assert!(before.len() > 100_000, "{} bytes of its own", before.len());
    // With swap or without: what can't be written anywhere stays.
    page_out(target.pid, &pages).unwrap();
    assert!(content_of(target.pid, &runs) == before);
    assert_eq!(target.ask("hello"), "ok");
    assert!(page_out(i32::MAX, &pages).is_err());
}

/// Waits until a process does nothing.
fn wait_until_asleep(pid: i32) {
    let status = || std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    while !status().contains("State:\tS") {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn merging_is_asked_for_in_a_processs_name() {
    let mut target = Target::spawn("idle");
    on_tracer_thread(|| allow_merging(target.pid)).unwrap();
    assert_eq!(target.ask("hello"), "ok");
    let status = std::fs::read_to_string(format!("/proc/{}/ksm_stat", target.pid)).unwrap();
    // Kernels from 6.16 on say so; before, only the merged pages show.
    if let Some(line) = status.lines().find(|line| line.starts_with("ksm_merge_any")) {
        assert!(line.ends_with("yes"), "{status}");
    }
}
