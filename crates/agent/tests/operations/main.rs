//! Dedup and restore on live processes, with every fault that can be put in between.

mod faults;
mod harness;
mod torture;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::Duration;

use harness::{Bench, Target, pages_of, stripes};
use medes_agent::RestoreError;
use medes_agent::dedup::{Cancel, DedupError, Hindrance};
use medes_agent::encode::PageSource;
use medes_agent::index::ImageIndex;
use medes_agent::plan::PlanError;
use medes_agent::restore::{Filling, OpenImage, RestoreBuffers, Served};
use medes_agent::working_set::{Prefetch, WorkingSet};
use medes_core::{DomainId, FunctionId, NodeId, PageRef, SnapshotId};
use medes_memory::pages::{PageClass, PageRun, PageScanner};
use medes_memory::ranges::within;
use medes_memory::writer::write_pages;
use medes_pages::{Fingerprint, PAGE_SIZE};
use medes_registry::{
    Candidate, LocalRegistry, Near, Registry, RegistryConfig, RegistryError, RegistryStats, Scope,
};
use medes_store::StoreError;

fn bench() -> Bench {
    Bench::new(256 << 20, LocalRegistry::new(RegistryConfig::default()))
}

/// A registry that does something before it answers, or answers what it is told to.
struct Tampering<F>(LocalRegistry, F);

impl<F> Registry for Tampering<F>
where
    F: Fn(&mut Vec<Option<Candidate>>, usize) -> Result<(), RegistryError> + Send + Sync,
{
    fn lookup_within(
        &self,
        domain: DomainId,
        near: Near,
        scope: Scope,
        fingerprints: &[Fingerprint],
        out: &mut Vec<Option<Candidate>>,
    ) -> Result<(), RegistryError> {
        let first = out.len();
        self.0.lookup_within(domain, near, scope, fingerprints, out)?;
        (self.1)(out, first)
    }

    fn insert(
        &self,
        domain: DomainId,
        function: FunctionId,
        snapshot: SnapshotId,
        pages: &[(u32, Fingerprint)],
    ) -> Result<(), RegistryError> {
        self.0.insert(domain, function, snapshot, pages)
    }

    fn remove(&self, snapshot: SnapshotId) -> Result<(), RegistryError> {
        self.0.remove(snapshot)
    }

    fn stats(&self) -> RegistryStats {
        self.0.stats()
    }
}

#[test]
fn memory_comes_back_as_it_was_over_many_cycles() {
    let bench = bench();
    let (mut first, mut second) = (Target::start(1), Target::start(2));
    for cycle in 0..12 {
        let base = bench.dedup(&first, cycle == 0).expect("deduplicates");
        bench.restore(&mut first, Target::check);
        bench.give_back(base);
        first.check();

        let done = bench.dedup(&second, false).expect("deduplicates");
        assert!(done.counts.pages > 2000, "{:?}", done.counts);
        assert!(done.counts.equal + done.counts.patched > 0, "{:?}", done.counts);
        let faults = bench.restore(&mut second, |t| {
            t.check();
            t.check();
        });
        assert!(faults > 100, "memory comes back as it is touched: {faults} faults");
        bench.give_back(done);
        second.check();
    }
}

#[test]
fn what_was_touched_is_there_the_next_time() {
    let bench = bench();
    let mut target = Target::start(3);
    let mut set = WorkingSet::default();
    let mut faults = Vec::new();
    for _ in 0..3 {
        let done = bench.dedup(&target, false).expect("deduplicates");
        let trial = set.trial();
        let touched = bench.restore_with(&mut target, &set.prefetch(Some(trial), &[]));
        set.touched(0, &touched);
        faults.push(touched.len());
        bench.give_back(done);
    }
    // A few are left out to see whether they are needed.
    assert!(faults[0] > 1000 && faults[2] * 20 < faults[0], "{faults:?}");
}

#[test]
fn what_is_read_in_order_comes_before_it_is_waited_for() {
    let bench = bench();
    let mut target = Target::start(3);
    let done = bench.dedup(&target, false).expect("deduplicates");
    // Most of it are arrays.
    let faults = bench.restore(&mut target, Target::check);
    assert!(faults * 5 < done.counts.pages, "{faults} faults for {:?}", done.counts);
    bench.give_back(done);
}

#[test]
fn an_image_tells_what_hardly_compresses() {
    let bench = bench();
    let mut target = Target::start(3);
    let mut set = WorkingSet::default();
    let done = bench.dedup(&target, false).expect("deduplicates");
    let touched = bench.restore_with(&mut target, &Prefetch::default());
    set.touched(0, &touched);
    bench.give_back(done);
    let done = bench.dedup(&target, false).expect("deduplicates");
    OpenImage::open(bench.view(), done.image.extent()).expect("an image").teach(&mut set);
    // Some go, others each time.
    let stay = (0..16).flat_map(|_| set.residents(Duration::ZERO, 0).ranges.swap_remove(0));
    let stay: BTreeSet<u64> = stay.flat_map(|range| range.step_by(PAGE_SIZE)).collect();
    let index = ImageIndex::open(bench.view(), done.image.extent()).expect("an image");
    let mut large = BTreeSet::new();
    for page in touched.iter().map(|address| address & !(PAGE_SIZE as u64 - 1)) {
        let range = page..page + PAGE_SIZE as u64;
        let found = index.for_each_source(0, range, |_, source, patch| {
            if matches!(source, PageSource::Patch { .. }) && patch.len() > 15 * PAGE_SIZE / 16 {
                large.insert(page);
            }
            Ok::<_, Infallible>(())
        });
        let Ok(()) = found;
    }
    assert!(large.len() > 100 && stay == large, "{} of {}", stay.len(), large.len());
    bench.restore(&mut target, Target::check);
    bench.give_back(done);
}

#[test]
fn what_is_to_stay_stays() {
    let bench = bench();
    let mut target = Target::start(3);
    let first = bench.dedup(&target, false).expect("deduplicates");
    bench.restore_watched(&mut target, true, Target::check);
    let stay = |stripes| *bench.residents.lock().unwrap() = stripes;
    let all = stripes(&target.cgroup, 8);
    stay(all.clone());
    let second = bench.dedup_again(&target, &first).expect("deduplicates again");
    bench.watched.lock().unwrap().clear();
    drop(first.userfaults);
    bench.store.remove_image(first.image);
    let (kept, pages) = (second.counts.kept, second.counts.pages);
    assert!(kept * 3 > pages && kept < pages * 3, "{:?}", second.counts);
    let of_image = pages_of(bench.view(), bench.held.lock().unwrap().as_ref().expect("held"));
    let held = bench.held.lock().unwrap().as_ref().expect("held").left().to_vec();
    let bytes = |ranges: &[Range<u64>]| ranges.iter().map(|r| r.end - r.start).sum::<u64>();
    assert!((kept - 8..=kept).contains(&(bytes(&held[0]) >> 12)), "{kept}");
    for range in &of_image[0] {
        assert!(within(range, &held[0]).is_empty(), "{range:x?} stays and is in the image");
    }
    // Nothing that stayed has to be waited for, though all is read.
    let touched = bench.restore_with(&mut target, &Prefetch::default());
    let waited = |address: &u64| !within(&(*address..address + 1), &held[0]).is_empty();
    assert!(touched.len() > 500 && !touched.iter().any(waited), "{}", touched.len());
    bench.give_back(second);
    // What stayed once goes the next time.
    stay(Vec::new());
    let third = bench.dedup(&target, false).expect("deduplicates");
    assert!(third.counts.pages > pages + kept / 2, "{:?}", third.counts);
    bench.restore(&mut target, Target::check);
    bench.give_back(third);
}

#[test]
fn a_single_sandbox_is_its_own_base() {
    let bench = bench();
    let mut target = Target::start(3);
    let done = bench.dedup(&target, true).expect("deduplicates");
    assert_eq!(done.counts.patched + done.counts.unique, 0);
    // The snapshot stays though nobody needs it but the image.
    let id = done.image.snapshots()[0];
    bench.store.retire_snapshot(id);
    assert!(bench.store.usage().snapshots > 0);
    bench.restore(&mut target, Target::check);
    bench.give_back(done);
    assert_eq!(bench.store.usage().snapshots, 0);
    target.check();
}

#[test]
fn a_full_store_leaves_the_sandbox_as_it_was() {
    // Room for no base snapshot, then for a base but not for an image beside it.
    let bench = Bench::new(64 << 10, LocalRegistry::new(RegistryConfig::default()));
    let mut target = Target::start(4);
    for new_base in [true, false] {
        let full = bench.dedup(&target, new_base);
        let is_full =
            matches!(&full, Err(DedupError::StaysWarm(Hindrance::Store(StoreError::Full(_)))));
        assert!(is_full, "{full:?}");
        target.check();
        let usage = bench.store.usage();
        assert_eq!((usage.images, usage.snapshots), (0, 0), "nothing is left in the store");
    }
}

#[test]
fn a_full_registry_costs_only_what_others_could_have_found() {
    let tiny = RegistryConfig { max_entries: 10, ..RegistryConfig::default() };
    let bench = Bench::new(256 << 20, LocalRegistry::new(tiny));
    let mut target = Target::start(5);
    let done = bench.dedup(&target, true).expect("deduplicates all the same");
    assert_eq!(bench.registry.stats().entries, 0, "nothing half entered");
    bench.restore(&mut target, Target::check);
    bench.give_back(done);
    target.check();
}

#[test]
fn bases_that_are_gone_or_wrong_cost_only_time() {
    let next = AtomicI32::new(0);
    let lies = move |out: &mut Vec<Option<Candidate>>, first: usize| {
        for answer in &mut out[first..] {
            let n = next.fetch_add(1, Ordering::Relaxed) as u32;
            let number = if n.is_multiple_of(2) { 1 } else { 4711 };
            let snapshot = SnapshotId { node: NodeId(0), number };
            *answer = Some(Candidate { base: PageRef { snapshot, page: n * 7 }, overlap: 5 });
        }
        Ok(())
    };
    let bench =
        Bench::new(256 << 20, Tampering(LocalRegistry::new(RegistryConfig::default()), lies));
    let (first, mut second) = (Target::start(6), Target::start(7));
    let base = bench.dedup(&first, true).expect("deduplicates");
    let done = bench.dedup(&second, false).expect("deduplicates");
    bench.restore(&mut second, Target::check);
    bench.store.remove_image(base.image);
    bench.give_back(done);
    second.check();
}

#[test]
fn a_registry_that_fails_leaves_the_sandbox_as_it_was() {
    let fails = |_: &mut Vec<Option<Candidate>>, _: usize| {
        Err(RegistryError::Full { wanted: 1, max_entries: 0 })
    };
    let bench =
        Bench::new(256 << 20, Tampering(LocalRegistry::new(RegistryConfig::default()), fails));
    let mut target = Target::start(8);
    let failed = bench.dedup(&target, false);
    let expected = matches!(&failed, Err(DedupError::StaysWarm(Hindrance::Encode(_))));
    assert!(expected, "{failed:?}");
    bench.assert_no_images();
    target.check();
}

#[test]
fn a_page_that_changes_under_the_reader_is_noticed() {
    let target = Target::start(9);
    let pid = target.pid();
    let heap = medes_memory::mappings::Mappings::read(pid).expect("mappings");
    let heap = heap.iter().find(|m| m.name == "[heap]").expect("a heap").start;
    let writes = move |_: &mut Vec<Option<Candidate>>, _: usize| {
        // What a thread would do that the freezer missed, or a peer with rights: here the first
        // page of the heap is read and written back with one more bit, and later with one less.
        let mut page = [0u8; PAGE_SIZE];
        let run = PageRun { start: heap, pages: 1, class: PageClass::Anonymous };
        medes_memory::reader::read_pages(pid, &[run], &mut page).expect("reads");
        page[PAGE_SIZE - 1] ^= 1;
        write_pages(pid, &[run], &page).expect("writes");
        Ok(())
    };
    let bench =
        Bench::new(256 << 20, Tampering(LocalRegistry::new(RegistryConfig::default()), writes));
    let changed = bench.dedup(&target, false);
    let expected = matches!(&changed, Err(DedupError::StaysWarm(Hindrance::Changed)));
    assert!(expected, "{changed:?}");
    bench.assert_no_images();
    assert!(!target.cgroup.is_frozen().expect("a cgroup"));
}

#[test]
fn a_sandbox_that_dies_in_the_middle_leaves_nothing() {
    // While pages are encoded.
    let pid = Arc::new(AtomicI32::new(0));
    let victim = Arc::clone(&pid);
    let kills = move |_: &mut Vec<Option<Candidate>>, _: usize| {
        let pid = nix::unistd::Pid::from_raw(victim.load(Ordering::Relaxed));
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    };
    let bench =
        Bench::new(256 << 20, Tampering(LocalRegistry::new(RegistryConfig::default()), kills));
    let target = Target::start(10);
    pid.store(target.pid(), Ordering::Relaxed);
    assert!(bench.dedup(&target, false).is_err());
    bench.assert_no_images();

    // Between taking hold and dropping.
    let mut bench = self::bench();
    let target = Target::start(11);
    let pid = nix::unistd::Pid::from_raw(target.pid());
    bench.on_hold = Box::new(move || {
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    });
    match bench.dedup(&target, true) {
        // The holder has the image; whoever runs this sees the end and gives it back.
        Ok(done) => {
            bench.held.lock().unwrap().take();
            bench.give_back(done);
        }
        Err(_) => {
            bench.held.lock().unwrap().take();
        }
    }

    // In the dedup state.
    let bench = self::bench();
    let mut target = Target::start(12);
    let done = bench.dedup(&target, true).expect("deduplicates");
    target.kill();
    std::thread::sleep(Duration::from_millis(50));
    let image = bench.held.lock().unwrap().take().expect("held");
    let mut buffers = RestoreBuffers::default();
    let gone = image.revive(&Prefetch::default(), &mut buffers).and_then(|revived| {
        let space = &revived.spaces[0];
        while space.fill(64, false, &mut buffers, &mut Served::default())? == Filling::Going {}
        Ok(())
    });
    assert!(gone.is_ok() || gone.is_err_and(|e| e.is_gone()));
    bench.give_back(done);
}

#[test]
fn a_holder_that_refuses_leaves_the_sandbox_as_it_was() {
    let mut bench = bench();
    bench.on_hold = Box::new(|| Err("no".into()));
    let mut target = Target::start(13);
    let refused = bench.dedup(&target, true);
    let expected = matches!(&refused, Err(DedupError::StaysWarm(Hindrance::Holder(_))));
    assert!(expected, "{refused:?}");
    bench.assert_no_images();
    target.check();
}

#[test]
fn a_request_cancels_at_any_moment() {
    let bench = bench();
    let mut target = Target::start(14);
    let base = bench.dedup(&target, true).expect("deduplicates");
    bench.restore(&mut target, Target::check);
    bench.give_back(base);
    let (mut cancelled, told) = (0, Arc::new(AtomicUsize::new(0)));
    for n in 0..20u64 {
        let (cancel, back) = (Cancel::default(), Arc::clone(&told));
        cancel.when_back(move || {
            back.fetch_add(1, Ordering::Relaxed);
        });
        let done = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(n * 2500));
                cancel.request();
            });
            bench.dedup_with(&target, false, None, &cancel)
        });
        match done {
            Ok(done) => {
                cancelled += usize::from(done.taken_back);
                bench.restore(&mut target, Target::check);
                bench.give_back(done);
            }
            Err(DedupError::Cancelled) => cancelled += 1,
            Err(other) => panic!("{other}"),
        }
        bench.assert_no_images();
        target.check();
    }
    assert!(cancelled > 0);
    assert_eq!(told.load(Ordering::Relaxed), cancelled, "somebody waited for the operation");
}

#[test]
fn the_next_dedup_costs_what_was_written() {
    let bench = bench();
    let (mut first, mut second) = (Target::start(17), Target::start(18));
    let base = bench.dedup(&first, true).expect("deduplicates");
    let mut done = bench.dedup(&second, false).expect("deduplicates");
    let pages = done.counts.pages;
    for cycle in 0..10 {
        // Every other time some memory is still away when it goes again.
        bench.restore_watched(&mut second, cycle % 2 == 0, Target::check);
        let again = bench.dedup_again(&second, &done).expect("deduplicates");
        let reused = again.counts.reused;
        // Of what was written to, most is what it was before.
        assert!(reused > pages / 10 * 9, "{reused} of {pages} pages reused in cycle {cycle}");
        assert!(again.counts.pages.abs_diff(pages) < pages / 10, "{:?}", again.counts);
        drop(done.userfaults);
        bench.store.remove_image(done.image);
        done = again;
    }
    bench.restore(&mut second, Target::check);
    second.check();
    bench.store.remove_image(done.image);
    // The other process was dedup all the while.
    *bench.held.lock().unwrap() = Some(bench.reopen(&base));
    bench.restore(&mut first, Target::check);
    bench.give_back(base);
}

#[test]
fn a_request_cancels_the_next_dedup_at_any_moment() {
    let bench = bench();
    let mut target = Target::start(19);
    let mut done = bench.dedup(&target, true).expect("deduplicates");
    bench.restore_watched(&mut target, false, Target::check);
    let mut cancelled = 0;
    for n in 0..30u64 {
        let cancel = Cancel::default();
        let again = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(n * 500));
                cancel.request();
            });
            bench.dedup_with(&target, false, Some(&bench.previous(&done)), &cancel)
        });
        match again {
            Ok(again) => {
                drop(done.userfaults);
                bench.store.remove_image(done.image);
                done = again;
                bench.restore_watched(&mut target, n % 2 == 0, Target::check);
            }
            Err(DedupError::Cancelled) => {
                cancelled += 1;
                bench.serve_watched(|| target.check());
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(cancelled > 0);
}

#[test]
fn what_was_away_before_is_not_left_when_a_request_comes_again() {
    let mut bench = bench();
    let mut target = Target::start(20);
    let mut done = bench.dedup(&target, true).expect("deduplicates");
    let mut taken_back = 0;
    for n in 0..16u64 {
        // Every other block of pages is there, the rest still away.
        bench.restore_half(&target);
        let cancel = Arc::new(Cancel::default());
        let request = Arc::clone(&cancel);
        bench.on_hold = Box::new(move || {
            let request = Arc::clone(&request);
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(200 + n * 150));
                request.request();
            });
            Ok(())
        });
        let again = bench.dedup_with(&target, false, Some(&bench.previous(&done)), &cancel);
        match again {
            Ok(again) => {
                taken_back += usize::from(again.taken_back);
                drop(done.userfaults);
                bench.store.remove_image(done.image);
                done = again;
                bench.restore_watched(&mut target, true, Target::check);
            }
            Err(DedupError::Cancelled) => bench.serve_watched(|| target.check()),
            Err(other) => panic!("{other}"),
        }
        bench.on_hold = Box::new(|| Ok(()));
        let again = bench.dedup_again(&target, &done).expect("deduplicates");
        drop(done.userfaults);
        bench.store.remove_image(done.image);
        done = again;
    }
    assert!(taken_back > 0);
    bench.restore(&mut target, Target::check);
    bench.give_back(done);
}

#[test]
fn memory_that_is_away_and_must_stay_from_now_on_is_not_forgotten() {
    let bench = bench();
    let mut target = Target::start(21);
    let done = bench.dedup(&target, true).expect("deduplicates");
    bench.restore_watched(&mut target, false, |target| {
        target.tell("wipe");
        assert_eq!(target.line(), "wiped");
    });
    let again = bench.dedup_again(&target, &done);
    let expected =
        matches!(&again, Err(DedupError::StaysWarm(Hindrance::Plan(PlanError::Stays { .. }))));
    assert!(expected, "{again:?}");
    bench.serve_watched(|| target.check());
    bench.give_back(done);
}

/// How much anonymous memory is there of a range.
fn private_bytes(pid: i32, range: Range<u64>) -> u64 {
    let (mut scanner, mut there) = (PageScanner::open(pid).expect("opens"), Vec::new());
    scanner.scan_range(range, PageClass::Anonymous, &mut there).expect("scans");
    there.iter().map(|run| run.bytes()).sum()
}

#[test]
fn what_a_restored_process_maps_anew_stays_if_it_has_to() {
    const BYTES: u64 = 1 << 20;
    let bench = bench();
    let mut target = Target::start(22);
    let done = bench.dedup(&target, true).expect("deduplicates");
    let mut at = 0;
    bench.restore_watched(&mut target, true, |target| {
        target.tell("more that stays");
        at = target.line().parse::<u64>().expect("an address");
        target.check();
    });
    let again = bench.dedup_again(&target, &done).expect("deduplicates");
    assert_eq!(private_bytes(target.pid(), at..at + BYTES), BYTES);
    assert!(again.counts.reused > 1000, "{:?}", again.counts);
    drop(done.userfaults);
    bench.store.remove_image(done.image);
    bench.restore(&mut target, Target::check);
    bench.give_back(again);
}

#[test]
fn what_a_restored_process_maps_anew_goes_and_comes_back() {
    const BYTES: u64 = 1 << 20;
    let bench = bench();
    let mut target = Target::start(23);
    let mut done = bench.dedup(&target, true).expect("deduplicates");
    // Other parts of it stay each time.
    for pages in [8, 5, 3] {
        let mut at = 0;
        bench.restore_watched(&mut target, pages != 5, |target| {
            target.tell("more");
            at = target.line().parse::<u64>().expect("an address");
            target.check();
        });
        *bench.residents.lock().unwrap() = stripes(&target.cgroup, pages);
        let again = bench.dedup_again(&target, &done).expect("deduplicates");
        bench.watched.lock().unwrap().clear();
        let of_image = pages_of(bench.view(), bench.held.lock().unwrap().as_ref().expect("held"));
        let new = within(&(at..at + BYTES), &of_image[0]);
        let bytes: u64 = new.iter().map(|range| range.end - range.start).sum();
        assert!((BYTES / 3..BYTES * 2 / 3).contains(&bytes), "{bytes} of it are in the image");
        let there = private_bytes(target.pid(), at..at + BYTES);
        assert_eq!(there + bytes, BYTES, "what is in the image is away");
        drop(done.userfaults);
        bench.store.remove_image(done.image);
        done = again;
    }
    bench.restore(&mut target, Target::check);
    bench.give_back(done);
}

#[test]
fn a_corrupt_store_never_reaches_a_process() {
    use std::os::unix::fs::FileExt;
    let bench = bench();
    let (first, mut second) = (Target::start(15), Target::start(16));
    let base = bench.dedup(&first, true).expect("deduplicates");
    let done = bench.dedup(&second, false).expect("deduplicates");
    assert!(done.counts.unique > 0, "{:?}", done.counts);
    // The last patches of the image are spoilt behind the store's back.
    let fd = bench.store.memory().descriptor().try_clone_to_owned().expect("a descriptor");
    let file = std::fs::File::from(fd);
    let extent = done.image.extent();
    let middle = (u64::from(extent.start) + u64::from(extent.pages) * 2 / 3) * PAGE_SIZE as u64;
    let mut bytes = vec![0; PAGE_SIZE * 4];
    file.read_exact_at(&mut bytes, middle).expect("reads");
    bytes.iter_mut().for_each(|b| *b ^= 0x5a);
    file.write_all_at(&bytes, middle).expect("writes");

    let image = bench.held.lock().unwrap().take().expect("held");
    let revived = image
        .revive(&Prefetch::default(), &mut RestoreBuffers::default())
        .expect("nothing read yet");
    let mut buffers = RestoreBuffers::default();
    let error = loop {
        let space = &revived.spaces[0];
        match space.fill(64, false, &mut buffers, &mut Served::default()) {
            Ok(Filling::Going) => {}
            Ok(_) => panic!("corrupt patches were taken for pages"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, RestoreError::Patch(_) | RestoreError::Corrupt), "{error}");
    // It never ran: frozen until it is killed.
    assert!(second.cgroup.is_frozen().expect("a cgroup"));
    second.kill();
    bench.store.remove_image(base.image);
    bench.give_back(done);
}
