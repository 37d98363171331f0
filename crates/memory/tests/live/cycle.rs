//! Whole evictions and restores.

use crate::harness::{Cgroup, How, Saved, Target, evict, private_bytes};
use medes_memory::session::{Freezer, Session, on_tracer_thread};
use medes_memory::tracee::SeizeOptions;
use medes_memory::userfault::{UserFault, UserFaultFeatures, UserFaultOptions};

fn restore_and_thaw(cgroup: &Cgroup, mut saved: Saved) {
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
        let saved = evict(&cgroup, target.pid, &how);
        let after = private_bytes(target.pid);
        assert!(saved.evicted.anonymous.bytes > 16 << 20 && saved.evicted.file.bytes > 0);
        assert!(before > 16 << 20 && after < 1 << 20, "cycle {cycle}: {before} -> {after}");
        restore_and_thaw(&cgroup, saved);
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
    let saved = evict(&cgroup, target.pid, &how);
    let kept = saved.userfault.target_fd().unwrap();
    let link = std::fs::read_link(format!("/proc/{}/fd/{kept}", target.pid)).unwrap();
    assert_eq!(link.to_str(), Some("anon_inode:[userfaultfd]"));
    restore_and_thaw(&cgroup, saved);
    assert_eq!(target.ask("check"), "ok");
}

#[test]
fn pages_are_served_on_demand() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("memory");
    cgroup.add(target.pid);
    for _ in 0..5 {
        let mut saved = evict(&cgroup, target.pid, &How::with_events());
        medes_memory::writer::write_pages(saved.pid, &saved.file, &saved.file_content).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let mut freezer = &cgroup;
        let faults = std::thread::scope(|scope| {
            let handler = scope.spawn(|| serve_faults(&mut saved, &stop));
            freezer.thaw().unwrap();
            let answer = target.ask("check");
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            let faults = handler.join().unwrap();
            assert_eq!(answer, "ok");
            faults
        });
        assert!(faults > 1000, "{faults} faults");
        // The program has overwritten most pages; the rest goes back where it was. Stopping the
        // threads keeps the freezer from ending their waits with EINTR.
        on_tracer_thread(|| {
            let session = Session::open(&cgroup, &SeizeOptions::default()).unwrap();
            let mut rest = &saved.anonymous_content[..];
            for run in &saved.anonymous {
                let (content, tail) = rest.split_at(run.bytes() as usize);
                saved.userfault.copy(run.start, content, Default::default()).unwrap();
                rest = tail;
            }
            saved.userfault.unregister_all().unwrap();
            session.close().unwrap();
        });
        freezer.thaw().unwrap();
        assert_eq!(target.ask("check"), "ok");
    }
}

/// Serves faults from what was saved until told to stop; returns their number.
fn serve_faults(saved: &mut Saved, stop: &std::sync::atomic::AtomicBool) -> usize {
    use medes_memory::userfault::Event;
    use std::collections::HashMap;
    let mut pages: HashMap<u64, &[u8]> = HashMap::new();
    let mut rest = &saved.anonymous_content[..];
    for run in &saved.anonymous {
        for address in run.range().step_by(4096) {
            let (content, tail) = rest.split_at(4096);
            pages.insert(address, content);
            rest = tail;
        }
    }
    let mut faults = 0;
    let mut events = Vec::new();
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        saved.userfault.read_events(&mut events).unwrap();
        for event in events.drain(..) {
            match event {
                Event::Fault { address, .. } => {
                    let page = address & !4095;
                    faults += 1;
                    let filled = match pages.get(&page) {
                        Some(content) => saved.userfault.copy(page, content, Default::default()),
                        None => saved.userfault.zeropage(page..page + 4096, false),
                    };
                    let filled = filled.unwrap();
                    if filled.present > 0 {
                        saved.userfault.wake(page..page + 4096).unwrap();
                    }
                }
                Event::Remove(range) | Event::Unmap(range) => {
                    for page in range.step_by(4096) {
                        pages.remove(&page);
                    }
                }
                Event::Remap { .. } | Event::Fork { .. } => {}
            }
        }
        std::thread::yield_now();
    }
    faults
}

#[test]
fn a_forked_child_of_a_lazily_restored_process_has_a_userfaultfd() {
    use medes_memory::userfault::{CopyMode, Event};
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("fork");
    cgroup.add(target.pid);
    let saved = evict(&cgroup, target.pid, &How::with_events());
    let features = saved.userfault.features();
    // Everything but the region that the child reads.
    let largest = saved.anonymous.iter().map(|run| run.bytes()).max().unwrap();
    let mut rest = &saved.anonymous_content[..];
    let mut withheld = Vec::new();
    for run in &saved.anonymous {
        let (content, tail) = rest.split_at(run.bytes() as usize);
        if run.bytes() == largest {
            withheld.push((run.start, content));
        } else {
            saved.userfault.copy(run.start, content, CopyMode::default()).unwrap();
        }
        rest = tail;
    }
    medes_memory::writer::write_pages(saved.pid, &saved.file, &saved.file_content).unwrap();
    let mut freezer = &cgroup;
    freezer.thaw().unwrap();
    target.send("fork");
    let registered = saved.userfault.registered().to_vec();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let mut parent = saved.userfault;
    let mut child: Option<UserFault> = None;
    let mut child_faults = 0;
    let serve = |uffd: &UserFault, address: u64| {
        let page = address & !4095;
        let content = withheld.iter().find_map(|(start, content)| {
            let offset = page.checked_sub(*start)? as usize;
            content.get(offset..offset + 4096)
        });
        match content {
            Some(content) => uffd.copy(page, content, CopyMode::default()).unwrap(),
            None => uffd.zeropage(page..page + 4096, false).unwrap(),
        }
    };
    let answered = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reply = scope.spawn(|| {
            let reply = target.reply();
            answered.store(true, std::sync::atomic::Ordering::Relaxed);
            reply
        });
        while !answered.load(std::sync::atomic::Ordering::Relaxed) {
            assert!(std::time::Instant::now() < until, "no answer");
            let mut events = Vec::new();
            parent.read_events(&mut events).unwrap();
            for event in events {
                match event {
                    Event::Fault { address, .. } => drop(serve(&parent, address)),
                    Event::Fork { child: fd } => {
                        child = Some(UserFault::from_parts(fd, features, registered.clone(), None));
                    }
                    _ => {}
                }
            }
            if let Some(child) = &mut child {
                let mut events = Vec::new();
                child.read_events(&mut events).unwrap();
                for event in events {
                    if let Event::Fault { address, .. } = event {
                        child_faults += 1;
                        serve(child, address);
                    }
                }
            }
            std::thread::yield_now();
        }
        assert_eq!(reply.join().unwrap(), "ok");
    });
    assert!(child_faults > 0);
}

#[test]
fn written_pages_are_found_after_a_restore() {
    let supported = UserFaultFeatures::supported().unwrap();
    if !supported.contains(UserFaultFeatures::TRACK_WRITES) {
        println!("skipped: this kernel has no asynchronous write protection (Linux 6.7)");
        return;
    }
    use medes_memory::pages::{PageClass, PageScanner};
    use medes_memory::userfault::CopyMode;
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
    let mut written = |protect| {
        let mut runs = Vec::new();
        for range in saved.userfault.registered() {
            scanner.scan_written(range.clone(), PageClass::Anonymous, protect, &mut runs).unwrap();
        }
        runs.iter().map(|run| u64::from(run.pages)).sum::<u64>()
    };
    let total: u64 = saved.anonymous.iter().map(|run| u64::from(run.pages)).sum();
    // Only what was never dropped counts as written.
    let at_rest = written(true);
    assert!(at_rest < 16, "{at_rest} of {total}");
    assert_eq!(written(false), 0);
}

#[test]
fn the_last_descriptor_in_the_target_keeps_pages_from_reading_as_zeros() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("fork");
    cgroup.add(target.pid);
    let mut how = How::with_events();
    how.userfault.keep_in_target = true;
    let mut saved = evict(&cgroup, target.pid, &how);
    // Everything but the region's first pages is there, and nobody serves faults any more.
    let largest = saved.anonymous.iter().position(|run| run.pages > 1).unwrap();
    let withheld = saved.anonymous.remove(largest);
    let offset: u64 = saved.anonymous[..largest].iter().map(|run| run.bytes()).sum();
    let end = offset + withheld.bytes();
    saved.anonymous_content.drain(offset as usize..end as usize);
    saved.restore();
    drop(saved);
    let mut freezer = &cgroup;
    freezer.thaw().unwrap();
    target.send("fork");
    // It waits for the page, for ever.
    let waiting = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", target.pid)).unwrap();
        tasks.flatten().any(|task| {
            std::fs::read_to_string(task.path().join("wchan"))
                .is_ok_and(|wchan| wchan.contains("userfault"))
        })
    };
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !waiting() && std::time::Instant::now() < until {
        std::thread::yield_now();
    }
    assert!(waiting());
}
