//! Whole evictions and restores.

use crate::harness::{Cgroup, How, Saved, Target, evict, evict_again, evict_all, private_bytes};
use medes_memory::session::{Freezer, on_tracer_thread};
use medes_memory::tracee::SeizeOptions;
use medes_memory::userfault::{UserFault, UserFaultFeatures, UserFaultOptions};

fn restore_and_thaw(cgroup: &Cgroup, saved: &mut Saved) {
    saved.restore();
    saved.userfault.unregister_all().unwrap();
    let mut freezer = cgroup;
    freezer.thaw().unwrap();
}

#[test]
fn memory_of_every_kind_survives_a_hundred_cycles() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("memory");
    cgroup.add(target.pid);
    for cycle in 0..100 {
        // Events and none, with the target's own privilege and without, take turns.
        let mut how = if cycle % 2 == 0 { How::with_events() } else { How::default() };
        how.userfault.without_privilege = cycle % 3 == 0;
        let before = private_bytes(target.pid);
        let mut saved = evict(&cgroup, target.pid, &how);
        let after = private_bytes(target.pid);
        assert!(saved.evicted.anonymous.bytes > 16 << 20 && saved.evicted.file.bytes > 0);
        assert!(before > 16 << 20 && after < 1 << 20, "cycle {cycle}: {before} -> {after}");
        restore_and_thaw(&cgroup, &mut saved);
        assert_eq!(target.ask("check"), "ok", "cycle {cycle}");
    }
}

#[test]
fn a_userfaultfd_is_used_again() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("memory");
    cgroup.add(target.pid);
    let mut how = How::with_events();
    how.userfault.keep_in_target = true;
    let mut saved = evict(&cgroup, target.pid, &how);
    let kept = saved.userfault.target_fd().unwrap();
    let link = std::fs::read_link(format!("/proc/{}/fd/{kept}", target.pid)).unwrap();
    assert_eq!(link.to_str(), Some("anon_inode:[userfaultfd]"));
    for _ in 0..10 {
        restore_and_thaw(&cgroup, &mut saved);
        assert_eq!(target.ask("check"), "ok");
        let userfault = saved.take_userfault();
        saved = evict_again(&cgroup, target.pid, &how, userfault);
        assert!(private_bytes(target.pid) < 1 << 20);
    }
}

#[test]
fn written_pages_are_found_after_a_restore() {
    let supported = UserFaultFeatures::supported().unwrap();
    if !supported.contains(UserFaultFeatures::TRACK_WRITES) {
        println!("skipped: this kernel has no asynchronous write protection (Linux 6.7)");
        return;
    }
    use medes_memory::pages::PageScanner;
    use medes_memory::userfault::CopyMode;
    use std::ops::Range;
    let cgroup = Cgroup::new();
    let target = Target::spawn("fork");
    cgroup.add(target.pid);
    let how = How {
        userfault: UserFaultOptions {
            features: UserFaultFeatures::EVENTS.union(UserFaultFeatures::TRACK_WRITES),
            ..Default::default()
        },
        track_writes: true,
    };
    let saved = evict(&cgroup, target.pid, &how);
    let mut rest = &saved.anonymous_content[..];
    for run in &saved.anonymous {
        let (content, tail) = rest.split_at(run.bytes() as usize);
        let mode = CopyMode { write_protect: true, no_wake: false };
        saved.userfault.copy(run.start, content, mode).unwrap();
        rest = tail;
    }
    medes_memory::writer::write_pages(saved.pid, &saved.file, &saved.file_content).unwrap();
    let mut scanner = PageScanner::open(target.pid).unwrap();
    let mut written = || {
        let mut written = Vec::new();
        for range in saved.userfault.registered() {
            scanner.find_written(range.clone(), &mut written).unwrap();
        }
        written
    };
    let pages =
        |ranges: &[Range<u64>]| ranges.iter().map(|r| (r.end - r.start) / 4096).sum::<u64>();
    let total: u64 = saved.anonymous.iter().map(|run| u64::from(run.pages)).sum();
    // Only what was never dropped counts as written.
    let at_rest = written();
    assert!(pages(&at_rest) < 16, "{at_rest:x?} of {total}");
    for range in at_rest {
        saved.userfault.write_protect(range, true).unwrap();
    }
    assert!(written().is_empty());
}

#[test]
fn a_tree_of_processes_is_taken_at_once() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn_with("tree", |command| {
        // The children have to be born in the group.
        let procs = cgroup.procs_file();
        // SAFETY: one write between fork and exec.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(command, move || {
                libc::write(std::os::fd::AsRawFd::as_raw_fd(&procs), c"0".as_ptr().cast(), 1);
                Ok(())
            });
        }
    });
    let mut freezer = &cgroup;
    for _ in 0..10 {
        let pids = freezer.processes().unwrap();
        assert_eq!(pids.len(), 4);
        let mut all = evict_all(&cgroup, &pids, &How::with_events());
        for saved in &mut all {
            saved.restore();
            saved.userfault.unregister_all().unwrap();
        }
        freezer.thaw().unwrap();
        assert_eq!(target.ask("check"), "ok");
    }
}

#[test]
fn a_copy_over_a_border_that_appeared_later_is_split() {
    use medes_memory::pages::{PageClass, PageRun};
    use medes_memory::tracee::ThreadGroup;
    use medes_memory::userfault::{CopyMode, FillError, RegisterMode};
    let mut target = Target::spawn("idle");
    on_tracer_thread(|| {
        const PAGES: u64 = 16;
        let mut process = ThreadGroup::seize(target.pid, &SeizeOptions::default()).unwrap();
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let map = [0, PAGES * 4096, 3, flags, u64::MAX, 0];
        let start = process.call("mmap", libc::SYS_mmap, map).unwrap();
        let end = start + PAGES * 4096;
        let mut userfault = UserFault::create(&mut process, &Default::default()).unwrap();
        userfault.register(start..end, RegisterMode::Missing).unwrap();
        // Three mappings now, one of them without access.
        process
            .call("mprotect", libc::SYS_mprotect, [start + 5 * 4096, 3 * 4096, 0, 0, 0, 0])
            .unwrap();
        let content: Vec<u8> = (0..PAGES * 4096).map(|index| (index / 4096 + 1) as u8).collect();
        // One page is there already.
        let early = start + 2 * 4096;
        userfault.copy(early, &content[2 * 4096..3 * 4096], CopyMode::default()).unwrap();
        let filled = userfault.copy(start, &content, CopyMode::default()).unwrap();
        assert_eq!((filled.filled, filled.present), ((PAGES - 1) * 4096, 4096));
        let run = PageRun { start, pages: PAGES as u32, class: PageClass::Anonymous };
        assert!(crate::harness::content_of(target.pid, &[run]) == content);
        let error = userfault.copy(end, &content[..4096], CopyMode::default()).unwrap_err();
        assert!(matches!(error, FillError::NotRegistered { .. }), "{error}");
        let error = userfault.copy(start + 1, &content[..4096], CopyMode::default()).unwrap_err();
        assert!(matches!(error, FillError::Misaligned), "{error}");
        process.call("munmap", libc::SYS_munmap, [start, PAGES * 4096, 0, 0, 0, 0]).unwrap();
    });
    assert_eq!(target.ask("alive?"), "ok");
}

#[test]
fn what_is_dropped_is_not_reported_where_the_kernel_can_do_without() {
    use medes_memory::drop::{drop_pages, is_quiet, lift};
    use medes_memory::pages::{PageClass, PageRun, PageScanner};
    use medes_memory::tracee::ThreadGroup;
    use medes_memory::userfault::{CopyMode, RegisterMode};
    const MADV_GUARD_INSTALL: u64 = 102;
    if !is_quiet() {
        println!("skipped: this kernel has no guard regions that it tells of (Linux 6.15)");
        return;
    }
    let mut target = Target::spawn("idle");
    on_tracer_thread(|| {
        const PAGES: u64 = 16;
        let mut process = ThreadGroup::seize(target.pid, &SeizeOptions::default()).unwrap();
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let map = [0, PAGES * 4096, 3, flags, u64::MAX, 0];
        let start = process.call("mmap", libc::SYS_mmap, map).unwrap();
        let pages =
            |pages: std::ops::Range<u64>| start + pages.start * 4096..start + pages.end * 4096;
        let options =
            UserFaultOptions { features: UserFaultFeatures::EVENTS, ..Default::default() };
        let mut userfault = UserFault::create(&mut process, &options).unwrap();
        userfault.register(pages(0..PAGES), RegisterMode::Missing).unwrap();
        let content = vec![1; (PAGES * 4096) as usize];
        let fill = |userfault: &UserFault, pages: std::ops::Range<u64>| {
            let content = &content[..(pages.end - pages.start) as usize];
            userfault.copy(pages.start, content, CopyMode::default()).unwrap().filled / 4096
        };
        let there = || {
            let (mut scanner, mut there) = (PageScanner::open(target.pid).unwrap(), Vec::new());
            scanner.scan_range(pages(0..PAGES), PageClass::Anonymous, &mut there).unwrap();
            there.iter().map(PageRun::range).collect::<Vec<_>>()
        };
        assert_eq!(fill(&userfault, pages(0..PAGES)), PAGES);
        // The program has a guard region of its own.
        let own = [start + 3 * 4096, 4096, MADV_GUARD_INSTALL, 0, 0, 0];
        process.call("madvise", libc::SYS_madvise, own).unwrap();
        let can_be_read = |page| {
            let run =
                PageRun { start: pages(page..PAGES).start, pages: 1, class: PageClass::Anonymous };
            medes_memory::reader::read_pages(target.pid, &[run], &mut [0; 4096]).is_ok()
        };
        let (mut guarded, dropped) = (Vec::new(), [pages(0..3), pages(4..8), pages(10..16)]);
        drop_pages(&mut process, &mut userfault, &dropped, &mut guarded).unwrap();
        assert_eq!(guarded, dropped);
        assert_eq!(there(), [pages(8..10)]);
        assert!(!can_be_read(0) && !can_be_read(3) && can_be_read(8));
        lift(&mut process, &guarded).unwrap();
        assert_eq!(there(), [pages(8..10)]);
        let mut events = Vec::new();
        userfault.read_events(&mut events).unwrap();
        assert!(events.is_empty(), "{events:?}");
        assert_eq!(fill(&userfault, pages(0..3)) + fill(&userfault, pages(4..16)), PAGES - 3);
        assert!(can_be_read(0) && !can_be_read(3), "the program's own guard region stays");

        // Locked memory can't be guarded; what comes before it is.
        let lock = [start + 6 * 4096, 4096, 0, 0, 0, 0];
        process.call("mlock", libc::SYS_mlock, lock).unwrap();
        let dropped = [pages(0..3), pages(6..7), pages(12..14)];
        guarded.clear();
        drop_pages(&mut process, &mut userfault, &dropped, &mut guarded).unwrap();
        lift(&mut process, &guarded).unwrap();
        assert_eq!(there(), [pages(4..6), pages(7..12), pages(14..16)]);
        userfault.unregister_all().unwrap();
        process.call("munmap", libc::SYS_munmap, [start, PAGES * 4096, 0, 0, 0, 0]).unwrap();
    });
    assert_eq!(target.ask("alive?"), "ok");
}
