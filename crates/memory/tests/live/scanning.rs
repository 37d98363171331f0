//! Scanning and reading without changing anything.

use std::ops::Range;

use crate::harness::{Cgroup, Target, content_of};
use medes_memory::mappings::Mappings;
use medes_memory::pages::{PageClass, PageRun, PageScanner};
use medes_memory::session::Freezer;

fn all_runs(pid: i32, scanner: &mut PageScanner) -> Vec<PageRun> {
    let mut runs = Vec::new();
    for mapping in Mappings::read(pid).unwrap() {
        scanner.scan(&mapping, &mut runs).unwrap();
    }
    runs
}

/// A process that changes nothing between two scans.
fn frozen_target() -> (Cgroup, Target) {
    let cgroup = Cgroup::new();
    let target = Target::spawn("idle");
    cgroup.add(target.pid);
    let mut freezer = &cgroup;
    freezer.freeze().unwrap();
    (cgroup, target)
}

fn pages(runs: &[PageRun], class: PageClass) -> Vec<u64> {
    runs.iter().filter(|run| run.class == class).flat_map(|run| run.range().step_by(4096)).collect()
}

#[test]
fn both_ways_of_scanning_agree() {
    let (_cgroup, target) = frozen_target();
    let scanned = all_runs(target.pid, &mut PageScanner::open(target.pid).unwrap());
    let read = all_runs(target.pid, &mut PageScanner::open_without_scan(target.pid).unwrap());
    assert_eq!(pages(&scanned, PageClass::FileCow), pages(&read, PageClass::FileCow));
    let mut both = pages(&scanned, PageClass::Anonymous);
    both.extend(pages(&scanned, PageClass::ZeroPage));
    both.sort_unstable();
    assert!(both == pages(&read, PageClass::Anonymous));
    assert!(!pages(&scanned, PageClass::FileCow).is_empty());
}

#[test]
fn many_mappings_are_scanned_as_each_by_itself() {
    let (_cgroup, target) = frozen_target();
    let mappings = Mappings::read(target.pid).unwrap();
    let droppable: Vec<_> = mappings.iter().filter(|m| m.left_resident().is_none()).collect();
    let open = [PageScanner::open, PageScanner::open_without_scan];
    for mut scanner in open.map(|open| open(target.pid).unwrap()) {
        let all = scanner.scan_all(&droppable, &|| false).unwrap();
        assert_eq!(all.len(), droppable.len());
        for (mapping, found) in droppable.iter().zip(&all) {
            let mut runs = Vec::new();
            scanner.scan(mapping, &mut runs).unwrap();
            assert_eq!(found.runs, runs, "{mapping:?}");
            // Nothing is write-protected.
            let pages =
                |ranges: &[Range<u64>]| -> u64 { ranges.iter().map(|r| r.end - r.start).sum() };
            let all: Vec<_> = runs.iter().map(PageRun::range).collect();
            assert_eq!(pages(&found.written), pages(&all), "{mapping:?}");
        }
        assert!(scanner.scan_all(&droppable, &|| true).is_err());
    }
}

#[test]
fn scanning_faults_nothing_in() {
    let (_cgroup, target) = frozen_target();
    let mut scanner = PageScanner::open(target.pid).unwrap();
    let before = all_runs(target.pid, &mut scanner);
    let content = content_of(target.pid, &before);
    let after = all_runs(target.pid, &mut scanner);
    assert_eq!(before, after);
    assert!(content == content_of(target.pid, &after));
}

#[test]
fn a_reservation_of_gigabytes_is_scanned_at_once() {
    let target = Target::spawn("memory");
    let mappings = Mappings::read(target.pid).unwrap();
    let reservation = mappings.iter().find(|mapping| mapping.len() >= 64 << 30).unwrap();
    let mut runs = Vec::new();
    PageScanner::open(target.pid).unwrap().scan(reservation, &mut runs).unwrap();
    assert!(runs.is_empty());
    let locked: Vec<_> = mappings.iter().filter(|mapping| mapping.flags.locked).collect();
    assert_eq!(locked.len(), 1, "{locked:?}");
}

#[test]
fn a_process_that_is_gone_is_an_error() {
    let pid = Target::spawn("idle").pid;
    assert!(PageScanner::open(pid).is_err());
    let run = PageRun { start: 0x10000, pages: 1, class: PageClass::Anonymous };
    let error = medes_memory::reader::read_pages(pid, &[run], &mut [0; 4096]).unwrap_err();
    assert!(matches!(error, medes_memory::reader::ReadError::Gone(_)), "{error}");
    assert!(medes_memory::writer::write_pages(pid, &[run], &[0; 4096]).is_err());
}

#[test]
fn buffers_of_the_wrong_size_are_refused() {
    let target = Target::spawn("idle");
    let run = PageRun { start: 0x10000, pages: 2, class: PageClass::Anonymous };
    assert!(medes_memory::reader::read_pages(target.pid, &[run], &mut [0; 4096]).is_err());
    assert!(medes_memory::writer::write_pages(target.pid, &[run], &[0; 4096]).is_err());
    let error = medes_memory::reader::read_pages(target.pid, &[run], &mut [0; 8192]).unwrap_err();
    assert!(error.to_string().contains("0x10000"), "{error}");
}
