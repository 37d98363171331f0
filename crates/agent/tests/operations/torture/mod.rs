//! Programs that check their own memory while they do everything that a process may do to it,
//! deduplicated and restored at random moments.
//!
//! `MEDES_TORTURE_CYCLES` says how often each goes through both operations (3 unless it is set);
//! `MEDES_TORTURE_SEED` repeats a run's choices, though not its timing.

mod runtimes;

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use medes_agent::dedup::{Cancel, DedupError, Deduplicated, Hindrance};
use medes_agent::plan::PlanError;
use medes_agent::restore::{AddressSpace, Filling, RestoreBuffers, Served, Unasked};
use medes_agent::working_set::Prefetch;
use medes_memory::obstacle::Obstacle;
use medes_memory::session::SessionError;
use medes_memory::tracee::SeizeError;
use medes_sandbox::Cgroup;

use crate::bench;
use crate::harness::{Bench, Target, pages_of, stripes};

/// Tries of a dedup operation until something that comes and goes was not in its way.
const TRIES: usize = 200;

/// Base snapshots are made until they take so many bytes: nobody removes them, and however many
/// cycles there are, the page store is to have room for images too.
const BASES: u64 = 96 << 20;

/// A number from the environment.
pub(crate) fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

fn cycles() -> u64 {
    setting("MEDES_TORTURE_CYCLES").unwrap_or(3)
}

/// SplitMix64: the choices of one run.
pub(crate) struct Random(u64);

impl Random {
    /// A new one for the run `name`, which prints its seed.
    pub(crate) fn new(name: &str) -> Self {
        let now =
            || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |t| t.as_nanos() as u64);
        let seed = setting("MEDES_TORTURE_SEED").unwrap_or_else(|| now() % 1_000_000_007);
        println!("{name}: MEDES_TORTURE_SEED={seed}");
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pause(&mut self, most: Duration) {
        std::thread::sleep(Duration::from_micros(self.below(most.as_micros() as u64)));
    }
}

/// A subject, what asks it whether all is well, and what may keep it warm for a moment.
struct Torture<'a> {
    bench: &'a Bench,
    target: Target,
    random: Random,
    ask: &'a mut dyn FnMut(&mut Target),
    tolerates: fn(&Hindrance) -> bool,
    service: &'a Service,
    /// What the operation before left, if the subject is watched since.
    before: Option<Deduplicated>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    /// Operations that left the subject warm.
    stayed_warm: u64,
    /// Operations that encoded only what was written since the one before.
    again: u64,
    /// Operations that could not.
    anew: u64,
    /// Pages that such operations took over.
    reused: u64,
    /// Pages that such operations left where they were.
    kept: u64,
}

/// Takes a subject through dedup and restore as many times as wanted.
fn run(
    target: Target,
    random: Random,
    ask: &mut dyn FnMut(&mut Target),
    tolerates: fn(&Hindrance) -> bool,
) {
    let (bench, service) = (bench(), Service::default());
    let cgroup = target.cgroup.clone();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            service.serve(&bench).unwrap_or_else(|error| {
                // Nobody may wait for a page for ever.
                let _ = cgroup.order_kill();
                panic!("serving: {error}")
            });
        });
        // Whatever is found wrong, the server comes to an end.
        let _end = End { service: &service, cgroup: cgroup.clone() };
        let begin = Instant::now();
        let (before, counts) = (None, Counts::default());
        let (bench, service) = (&bench, &service);
        let mut torture =
            Torture { bench, target, random, ask, tolerates, service, before, counts };
        let cycles = cycles();
        for cycle in 0..cycles {
            torture.random.pause(Duration::from_millis(8));
            let wanted = torture.random.below(8) == 0;
            let has_room = bench.store.usage().snapshots < BASES;
            let new_base = cycle == 0 || wanted && has_room;
            let done = torture.dedup(new_base);
            torture.restore(done);
            (torture.ask)(&mut torture.target);
        }
        torture.complete();
        let took = begin.elapsed().as_secs_f64();
        let faults = service.faults.load(Ordering::Relaxed);
        println!("{cycles} cycles in {took:.1} s, {faults} faults, {:?}", torture.counts);
        service.stop.store(true, Ordering::Release);
        server.join().expect("serves");
    });
}

impl Torture<'_> {
    fn dedup(&mut self, new_base: bool) -> Deduplicated {
        *self.bench.residents.lock().unwrap() = match self.random.below(3) {
            0 => Vec::new(),
            _ => stripes(&self.target.cgroup, 1 << self.random.below(6)),
        };
        if !new_base && let Some(before) = &self.before {
            let previous = self.bench.previous(before);
            let cancel = Cancel::default();
            match self.bench.dedup_with(&self.target, false, Some(&previous), &cancel) {
                Ok(done) => {
                    self.counts.again += 1;
                    self.counts.reused += done.counts.reused;
                    self.counts.kept += done.counts.kept;
                    self.bench.watched.lock().unwrap().clear();
                    self.give_before_back();
                    return done;
                }
                // Processes that came or went, or something that is in the way: as any operation.
                Err(DedupError::StaysWarm(_)) => self.counts.anew += 1,
                Err(error) => panic!("not deduplicated again: {error}"),
            }
            (self.ask)(&mut self.target);
        }
        self.complete();
        for _ in 0..TRIES {
            match self.bench.dedup(&self.target, new_base) {
                Ok(done) => return done,
                Err(DedupError::StaysWarm(why)) if (self.tolerates)(&why) => {
                    self.counts.stayed_warm += 1;
                    self.bench.assert_no_images();
                    (self.ask)(&mut self.target);
                    self.random.pause(Duration::from_millis(4));
                }
                Err(error) => panic!("not deduplicated: {error}"),
            }
        }
        panic!("something was in the way {TRIES} times");
    }

    /// Brings the subject back, mostly as it needs it, and asks it meanwhile. Then the rest is
    /// brought back, or not, and it is watched further, or not.
    fn restore(&mut self, done: Deduplicated) {
        self.random.pause(Duration::from_millis(2));
        let image = self.bench.held.lock().unwrap().take().expect("an image is held");
        // Nothing beforehand, or everything, or what lies high.
        let mut beforehand = pages_of(self.bench.view(), &image);
        let from = [0, 0x7000_0000_0000, u64::MAX, u64::MAX][self.random.below(4) as usize];
        beforehand.iter_mut().for_each(|pages| pages.retain(|range| range.start >= from));
        let revived = image.revive(&Prefetch::of(&beforehand), &mut RestoreBuffers::default());
        let revived = revived.unwrap_or_else(|error| panic!("not revived: {error}"));
        self.service.begin([0, 1, 4, 8][self.random.below(4) as usize]);
        *self.bench.watched.lock().unwrap() = revived.spaces;
        self.before = Some(done);
        self.target.cgroup.thaw().expect("thaws");
        for _ in 0..=self.random.below(3) {
            (self.ask)(&mut self.target);
        }
        match self.random.below(4) {
            0 => {}
            1 => self.complete(),
            _ => self.service.fill.store(true, Ordering::Release),
        }
    }

    /// Brings all back and watches no further.
    fn complete(&mut self) {
        self.service.keep.store(false, Ordering::Release);
        self.service.fill.store(true, Ordering::Release);
        while !self.bench.watched.lock().unwrap().is_empty() {
            std::thread::sleep(Duration::from_micros(50));
        }
        self.give_before_back();
        self.bench.assert_no_images();
    }

    fn give_before_back(&mut self) {
        if let Some(before) = self.before.take() {
            drop(before.userfaults);
            self.bench.store.remove_image(before.image);
        }
    }
}

/// Answers the faults of what is watched, and brings it back.
#[derive(Default)]
struct Service {
    /// What comes unasked: blocks of so many pages, or with 0 what lies ahead.
    block: AtomicU64,
    /// Bring the rest back.
    fill: AtomicBool,
    /// Go on watching when all is back.
    keep: AtomicBool,
    stop: AtomicBool,
    faults: AtomicU64,
}

impl Service {
    fn begin(&self, block: u64) {
        self.block.store(block, Ordering::Release);
        self.fill.store(false, Ordering::Release);
        self.keep.store(true, Ordering::Release);
    }

    fn serve(&self, bench: &Bench) -> Result<(), medes_agent::RestoreError> {
        let mut buffers = RestoreBuffers::default();
        while !self.stop.load(Ordering::Acquire) {
            self.round(&mut bench.watched.lock().unwrap(), &mut buffers)?;
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }

    /// Looks at every address space once, and at those of the children of their processes.
    fn round(
        &self,
        spaces: &mut Vec<Arc<AddressSpace>>,
        buffers: &mut RestoreBuffers,
    ) -> Result<(), medes_agent::RestoreError> {
        let fill = self.fill.load(Ordering::Acquire);
        let keep = self.keep.load(Ordering::Acquire);
        let unasked = match self.block.load(Ordering::Acquire) {
            0 => Unasked::Ahead,
            pages => Unasked::Block(pages),
        };
        let mut children = Vec::new();
        let mut result = Ok(());
        spaces.retain(|space| {
            let mut served = Served::default();
            let is_due = space.filling() == Filling::Going || !keep;
            let done = match fill && is_due {
                true => space.fill(64, keep, buffers, &mut served),
                false => space.serve(unasked, buffers, &mut served).map(|()| Filling::Going),
            };
            self.faults.fetch_add(served.faults, Ordering::Relaxed);
            children.append(&mut served.children);
            match done {
                Ok(done) => done != Filling::Released,
                Err(error) if error.is_gone() => false,
                Err(error) => {
                    result = Err(error);
                    false
                }
            }
        });
        spaces.append(&mut children);
        result
    }
}

/// Ends the service of a subject: when its test has failed, along with the subject.
struct End<'a> {
    service: &'a Service,
    cgroup: Cgroup,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.cgroup.order_kill();
            self.service.stop.store(true, Ordering::Release);
        }
    }
}

/// The program that is tortured, compiled once.
fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/operations/torture/subject.c");
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        // Each test may be a process of its own, all of them at once.
        let own = directory.join(format!("torture-{}", std::process::id()));
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-pthread", "-o"]).arg(&own).arg(source);
        let compiled = cc.status().expect("a C compiler (Debian package gcc)");
        assert!(compiled.success(), "the subject does not compile");
        let program = directory.join("torture");
        std::fs::rename(&own, &program).expect("renames");
        program
    })
}

/// Starts the program in one of its modes.
fn start(mode: &str, random: &mut Random) -> Target {
    let mut command = Command::new(program());
    command.args([mode, &random.below(1 << 32).to_string()]);
    Target::run(&command)
}

/// What asks the program.
fn asking() -> impl FnMut(&mut Target) {
    let mut asked = 0;
    move |target| {
        asked += 1;
        target.tell("");
        assert_eq!(target.line(), format!("right {asked}"));
    }
}

fn torture(mode: &str, tolerates: fn(&Hindrance) -> bool) {
    let mut random = Random::new(mode);
    let target = start(mode, &mut random);
    let mut ask = asking();
    run(target, random, &mut ask, tolerates);
}

/// Nothing may be in the way, but that a thread waits for a processor on a busy machine.
fn nothing(why: &Hindrance) -> bool {
    matches!(why, Hindrance::Session(SessionError::Seize(SeizeError::TimedOut { .. })))
}

/// A debugger that is at it just then.
fn traced(why: &Hindrance) -> bool {
    matches!(
        why,
        Hindrance::Plan(PlanError::Obstacle(Obstacle::Traced { .. }))
            | Hindrance::Session(SessionError::Seize(SeizeError::AlreadyTraced { .. }))
    )
}

macro_rules! tortures {
    ($($name:ident: $mode:literal, $tolerates:expr;)*) => {
        $(#[test] fn $name() { torture($mode, $tolerates); })*
    };
}

tortures! {
    memory_that_is_read_and_written: "plain", nothing;
    children_that_are_forked: "fork", nothing;
    programs_that_exec: "exec", nothing;
    trees_of_processes: "tree", nothing;
    threads_that_come_and_go: "threads", nothing;
    mappings_that_move_and_grow: "mremap", nothing;
    mappings_that_go_and_come: "munmap", nothing;
    protections_that_change: "mprotect", nothing;
    advice_to_the_kernel: "madvise", nothing;
    memory_that_children_do_not_get: "wipe", nothing;
    a_heap_that_grows_and_shrinks: "brk", nothing;
    stacks_that_grow: "stack", nothing;
    debuggers: "debug", traced;
    core_dumps: "core", nothing;
    signals_and_timers: "signals", nothing;
    memory_reached_through_files: "procmem", nothing;
    locked_memory: "locked", nothing;
    shared_memory: "shared", nothing;
    reservations: "reserve", nothing;
    huge_pages: "huge", nothing;
    private_file_mappings_and_new_code: "file", nothing;
    system_calls_on_memory: "syscalls", nothing;
    waits_are_not_cut_short: "waits", nothing;
    all_of_it_at_once: "all", nothing;
}

/// What can't be handled is found before anything is dropped, and does not look like something
/// that will pass.
#[test]
fn obstacles_keep_a_process_as_it_is() {
    for mode in ["uring", "userfault", "aio", "traced"] {
        let is_expected = |found: &Obstacle| match found {
            Obstacle::IoUring { .. } => mode == "uring",
            Obstacle::OwnUserfault { .. } => mode == "userfault",
            Obstacle::Aio { .. } => mode == "aio",
            Obstacle::Traced { .. } => mode == "traced",
            _ => false,
        };
        let bench = bench();
        let mut target = start(mode, &mut Random::new(mode));
        let mut ask = asking();
        match bench.dedup(&target, true) {
            Err(DedupError::StaysWarm(why)) => {
                let found = match &why {
                    Hindrance::Plan(PlanError::Obstacle(obstacle)) => is_expected(obstacle),
                    _ => false,
                };
                assert!(found && why.is_lasting(), "{mode}: {why}");
            }
            other => panic!("{mode}: {other:?}"),
        }
        bench.assert_no_images();
        ask(&mut target);
    }
}

/// Killed at any moment of either operation, a subject leaves nothing behind and holds nobody up.
#[test]
fn processes_that_die_meanwhile() {
    let mut random = Random::new("dying");
    for mode in ["tree", "all", "fork", "threads"] {
        for _ in 0..cycles() {
            let bench = bench();
            let target = start(mode, &mut random);
            let (cgroup, after) = (target.cgroup.clone(), random.below(60_000));
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_micros(after));
                    cgroup.order_kill().expect("kills");
                });
                while let Ok(done) = bench.dedup(&target, true) {
                    let image = bench.held.lock().unwrap().take().expect("held");
                    if let Ok(revived) =
                        image.revive(&Prefetch::default(), &mut RestoreBuffers::default())
                    {
                        target.cgroup.thaw().expect("thaws");
                        let service = Service { fill: true.into(), ..Service::default() };
                        let mut spaces = revived.spaces;
                        while !spaces.is_empty() {
                            service
                                .round(&mut spaces, &mut RestoreBuffers::default())
                                .expect("serves");
                        }
                    }
                    bench.give_back(done);
                }
            });
            bench.held.lock().unwrap().take();
            bench.assert_no_images();
        }
    }
}
