//! Processes that run while pages are missing.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::harness::{Cgroup, How, Saved, Target, evict};
use medes_memory::session::{Freezer, Session, on_tracer_thread};
use medes_memory::tracee::SeizeOptions;
use medes_memory::userfault::{CopyMode, Event, FillError, UserFault};
use medes_memory::writer::write_pages;

/// Serves faults from what was saved; a page it does not know is one that was never there.
struct Server<'a> {
    pages: HashMap<u64, &'a [u8]>,
    waiting: Vec<u64>,
    faults: usize,
}

impl<'a> Server<'a> {
    fn new(saved: &'a Saved) -> Self {
        let mut pages = HashMap::new();
        let mut rest = &saved.anonymous_content[..];
        for address in saved.anonymous.iter().flat_map(|run| run.range().step_by(4096)) {
            let (content, tail) = rest.split_at(4096);
            pages.insert(address, content);
            rest = tail;
        }
        Self { pages, waiting: Vec::new(), faults: 0 }
    }

    /// Serves what waits; returns the events that are not faults. They count before the faults
    /// of the same reading do: a fault may be on a page that was just given up. While the
    /// process changes its mappings faults have to wait.
    fn step(&mut self, userfault: &mut UserFault) -> Vec<Event> {
        let mut events = Vec::new();
        userfault.read_events(&mut events).unwrap();
        events.retain(|event| match event {
            Event::Fault { address, .. } => {
                self.waiting.push(address & !4095);
                self.faults += 1;
                false
            }
            Event::Remove(range) | Event::Unmap(range) => {
                self.pages.retain(|page, _| !range.contains(page));
                true
            }
            _ => true,
        });
        let pages = &self.pages;
        self.waiting.retain(|&page| {
            let filled = match pages.get(&page) {
                Some(content) => userfault.copy(page, content, CopyMode::default()),
                None => userfault.zeropage(page..page + 4096, false),
            };
            match filled {
                Ok(filled) if filled.present > 0 => userfault.wake(page..page + 4096).unwrap(),
                Ok(_) | Err(FillError::Gone) => {}
                Err(FillError::Changing { .. }) => return true,
                Err(error) => panic!("{error}"),
            }
            false
        });
        std::thread::yield_now();
        events
    }
}

/// Asks the target while `step` runs again and again. Asking is for another thread: a target
/// that waits for a page in the middle of reading a pipe holds the pipe's lock, and writing to
/// the pipe then waits for whoever serves the page.
fn ask_while(target: &mut Target, question: &str, mut step: impl FnMut()) -> String {
    let until = Instant::now() + Duration::from_secs(30);
    std::thread::scope(|scope| {
        let reply = scope.spawn(|| target.ask(question));
        while !reply.is_finished() {
            assert!(Instant::now() < until, "no answer");
            step();
        }
        reply.join().unwrap()
    })
}

#[test]
fn pages_are_served_on_demand() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("memory");
    cgroup.add(target.pid);
    let mut freezer = &cgroup;
    for _ in 0..5 {
        let mut saved = evict(&cgroup, target.pid, &How::with_events());
        write_pages(saved.pid, &saved.file, &saved.file_content).unwrap();
        freezer.thaw().unwrap();
        let mut userfault = saved.take_userfault();
        let mut server = Server::new(&saved);
        let answer = ask_while(&mut target, "check", || drop(server.step(&mut userfault)));
        assert_eq!(answer, "ok");
        assert!(server.faults > 1000, "{} faults", server.faults);
        // The program has overwritten most pages; the rest goes back where it was. Stopping the
        // threads keeps the freezer from ending their waits with EINTR; none of them may need
        // a page to get to its stop.
        on_tracer_thread(|| {
            let stop = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                let server = scope.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        server.step(&mut userfault);
                    }
                });
                let session = Session::open(&cgroup, &SeizeOptions::default()).unwrap();
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                server.join().unwrap();
                session.close().unwrap();
            });
        });
        for (page, content) in &server.pages {
            userfault.copy(*page, content, CopyMode::default()).unwrap();
        }
        userfault.unregister_all().unwrap();
        freezer.thaw().unwrap();
        assert_eq!(target.ask("check"), "ok");
    }
}

#[test]
fn a_forked_child_of_a_lazily_restored_process_has_a_userfaultfd() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("fork");
    cgroup.add(target.pid);
    let mut saved = evict(&cgroup, target.pid, &How::with_events());
    let mut parent = saved.take_userfault();
    write_pages(saved.pid, &saved.file, &saved.file_content).unwrap();
    let mut freezer = &cgroup;
    freezer.thaw().unwrap();
    let mut server = Server::new(&saved);
    let mut children = Vec::new();
    let answer = ask_while(&mut target, "fork", || {
        for event in server.step(&mut parent) {
            if let Event::Fork { child } = event {
                let registered = parent.registered().to_vec();
                let child = UserFault::from_parts(child, parent.features(), registered, None);
                children.push((child, Server::new(&saved)));
            }
        }
        for (child, server) in &mut children {
            server.step(child);
        }
    });
    assert_eq!(answer, "ok");
    assert_eq!(children.len(), 1);
    assert!(children[0].1.faults > 0);
}

#[test]
fn a_moved_and_extended_mapping_is_unregistered_where_it_is() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("remap");
    cgroup.add(target.pid);
    let mut how = How::with_events();
    how.userfault.keep_in_target = true;
    let mut saved = evict(&cgroup, target.pid, &how);
    saved.restore();
    let mut userfault = saved.take_userfault();
    let mut freezer = &cgroup;
    freezer.thaw().unwrap();
    let mut server = Server::new(&saved);
    let mut remapped = false;
    let answer = ask_while(&mut target, "move", || {
        for event in server.step(&mut userfault) {
            remapped |= matches!(event, Event::Remap { len, .. } if len == 1 << 20);
        }
    });
    assert_eq!(answer, "ok");
    assert!(remapped);
    userfault.unregister_process(target.pid).unwrap();
    assert_eq!(target.ask("extend"), "ok");
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
    let until = Instant::now() + Duration::from_secs(10);
    while !waiting() && Instant::now() < until {
        std::thread::yield_now();
    }
    assert!(waiting());
}
