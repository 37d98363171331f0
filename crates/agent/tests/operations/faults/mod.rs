//! A fault at every step of the operations: a system call that fails, one of those that fails which
//! the sandbox is made to run, a sandbox that is killed, a request that arrives.
//!
//! A step is a system call of the thread that operates, or of one that it started. Whatever happens
//! at it, afterwards the sandbox runs with the memory it had, or is dead; nothing is left in the
//! page store, traced, frozen or registered, and no descriptor stays open.
//!
//! A sandbox that dies any other death than by being killed counts as one with wrong memory.
//!
//! Unless `MEDES_FAULTS` is `all` only some steps of each operation are tried, chosen by
//! `MEDES_TORTURE_SEED`.

mod operator;
mod scene;
mod steps;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};

use medes_agent::dedup::{Cancel, DedupError, Deduplicated, Operation, Options, Subject};
use medes_agent::restore::RestoreBuffers;
use medes_core::{DomainId, NodeId};
use medes_faults::{Verdict, descriptors, own_descriptors, supervise};
use medes_pages::{FingerprintConfig, PAGE_SIZE};
use medes_registry::{LocalRegistry, Near, RegistryConfig, Scope};

use medes_store::ImageHandle;

use crate::harness::{Bench, FUNCTION, Group, Target, stripes};
use crate::torture::Random;
use scene::{Answer, Keeping, Memory, ask, serve, start};
use steps::{Fault, Injector};

/// Steps of an operation that are tried for a kind of fault, unless all are.
const SAMPLES: u64 = 12;

/// Room for some sandboxes.
const STORE_BYTES: u64 = 16 << 20;

/// Pages in each block of those that stay.
const STRIPE: u64 = 4;

const DOMAIN: DomainId = DomainId(1);

/// What is done to a sandbox.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    /// Dedup of a sandbox that becomes a base.
    AsBase,
    /// Dedup against the base snapshot of another.
    First,
    /// Dedup of one that was restored before and is watched since.
    Again,
    /// Restore, until all is back.
    Restore,
}

/// What became of a sandbox.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Outcome {
    /// The operation did what it should.
    Done,
    /// The sandbox runs as if nothing had happened.
    AsItWas,
    /// It is dead.
    Dead,
}

/// A sandbox, taken from one state to the next.
struct Scene {
    bench: Bench,
    random: Random,
    target: Target,
    asked: u32,
    keeping: Keeping,
    /// What the operation before left: the sandbox is away, or watched.
    before: Option<Deduplicated>,
    /// Bytes of base snapshots that stay.
    bases: u64,
    /// How many pages the store has left for the operation, unless it is not to be full.
    room: Option<u64>,
    open: Vec<String>,
}

impl Scene {
    fn new(name: &str) -> Self {
        let registry = LocalRegistry::new(RegistryConfig::default());
        let (bench, mut random) = (Bench::new(STORE_BYTES, registry), Random::new(name));
        let base = start(random.below(1 << 32));
        let keeping = keeping(&bench, &base);
        let mut scene = Self {
            bench,
            random,
            target: base,
            asked: 0,
            keeping,
            before: None,
            bases: 0,
            room: None,
            open: Vec::new(),
        };
        scene.before = Some(
            scene.dedup(What::AsBase, &mut |_| Verdict::Go, &Cancel::default()).expect("a base"),
        );
        assert_eq!(scene.restore(&mut |_| Verdict::Go), Some(Answer::Right));
        scene.give_before_back();
        scene.bases = scene.bench.store.usage().snapshots;
        assert!(scene.bases > 0);
        scene.renew();
        scene.open = kinds_of_descriptors();
        scene
    }

    /// Another sandbox in the place of a dead one.
    fn renew(&mut self) {
        self.target = start(self.random.below(1 << 32));
        self.asked = 0;
        self.keeping = keeping(&self.bench, &self.target);
    }

    fn give_before_back(&mut self) {
        if let Some(before) = self.before.take() {
            drop(before.userfaults);
            self.bench.store.remove_image(before.image);
        }
    }

    fn ask(&mut self) -> Answer {
        let spaces = match &*self.keeping.memory() {
            Memory::Present => Vec::new(),
            Memory::Returning(spaces) => spaces.clone(),
            Memory::Held(..) => panic!("held, and expected to run"),
            Memory::Suspended(_) => panic!("not served, and expected to run"),
        };
        let stop = AtomicBool::new(false);
        let cgroup = &self.keeping.cgroup;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                serve(&spaces, &stop, &mut RestoreBuffers::default()).unwrap_or_else(|error| {
                    let _ = cgroup.order_kill();
                    panic!("serving: {error}")
                })
            });
            let _stopping = Stop(&stop);
            ask(&mut self.target, &mut self.asked)
        })
    }

    fn dedup(
        &self,
        what: What,
        judge: &mut dyn FnMut(&medes_faults::Call) -> Verdict,
        cancel: &Cancel,
    ) -> Result<Deduplicated, DedupError> {
        let residents = match what {
            What::AsBase => Vec::new(),
            What::First | What::Again | What::Restore => stripes(&self.keeping.cgroup, STRIPE),
        };
        let operation = operation(&self.bench, what == What::AsBase, &residents, cancel);
        let previous = self.before.as_ref().map(|done| self.bench.previous(done));
        supervise(judge, || {
            operation.dedup(Group(&self.keeping.cgroup), &self.keeping, previous.as_ref())
        })
    }

    /// Restores, asking meanwhile and afterwards; `None` if that failed, and the sandbox was killed.
    fn restore(&mut self, judge: &mut dyn FnMut(&medes_faults::Call) -> Verdict) -> Option<Answer> {
        let stop = AtomicBool::new(false);
        let (runs, running) = mpsc::channel();
        let (target, asked, keeping) = (&mut self.target, &mut self.asked, &self.keeping);
        let stop = &stop;
        let restored = std::thread::scope(|scope| {
            let asker = scope.spawn(move || {
                let _stopping = Stop(stop);
                running.recv().is_ok().then(|| ask(target, asked))
            });
            let result = supervise(judge, move || {
                let restored = keeping.restore(
                    false,
                    || {
                        let _ = runs.send(());
                    },
                    stop,
                );
                restored.inspect_err(|_| drop(keeping.cgroup.order_kill()))
            });
            let answer = asker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result.is_ok().then_some(answer).flatten()
        });
        match restored {
            Some(Answer::Right) => Some(self.ask()),
            other => {
                *self.keeping.memory() = Memory::Present;
                other
            }
        }
    }

    /// Brings the sandbox to the state in which `what` can be done to it.
    fn prepare(&mut self, what: What) {
        let mut go = |_: &_| Verdict::Go;
        match what {
            What::AsBase | What::First => {}
            What::Again => {
                let done = self.dedup(What::First, &mut go, &Cancel::default());
                self.before = Some(done.expect("deduplicates"));
                self.keeping.restore(true, || {}, &AtomicBool::new(true)).expect("restores");
                assert_eq!(self.ask(), Answer::Right);
            }
            What::Restore => {
                let done = self.dedup(What::First, &mut go, &Cancel::default());
                self.before = Some(done.expect("deduplicates"));
            }
        }
    }

    /// Does `what` with a fault, if there is a step for it, and checks what came of it.
    fn attempt(
        &mut self,
        what: What,
        fault: Fault,
        at: u64,
    ) -> (Outcome, u64, Option<(String, usize)>) {
        self.prepare(what);
        let filler = self.room.map(|pages| self.leave_room(pages));
        let (cancel, cgroup) = (Cancel::default(), self.keeping.cgroup.clone());
        let leader = nix::unistd::Pid::from_raw(self.target.pid());
        let act = || match fault {
            Fault::Killed => cgroup.order_kill().expect("kills"),
            Fault::LeaderKilled => {
                nix::sys::signal::kill(leader, nix::sys::signal::SIGKILL).expect("kills")
            }
            Fault::Cancelled => cancel.request(),
            Fault::Error(_) | Fault::Injected => {}
        };
        let mut injector = Injector::new(fault, at, &act);
        let mut judge = |call: &_| injector.judge(call);
        let outcome = match what {
            What::Restore => match self.restore(&mut judge) {
                Some(Answer::Right) => Outcome::Done,
                Some(Answer::Dead) | None => Outcome::Dead,
            },
            _ => self.judge_dedup(what, &mut judge, &cancel),
        };
        let (steps, hit) = (injector.steps, injector.hit.take());
        if let Some(filler) = filler {
            self.bench.store.remove_image(filler);
        }
        self.clear(outcome, matches!(&hit, Some((name, _)) if name == "injected munmap"));
        (outcome, steps, hit)
    }

    /// Fills the store but for some pages.
    fn leave_room(&self, pages: u64) -> ImageHandle {
        let usage = self.bench.store.usage();
        let left = usage.capacity - usage.snapshots - usage.images - pages * PAGE_SIZE as u64;
        let content = vec![0; left as usize];
        self.bench.store.put_image(&[&content], &[]).expect("room")
    }

    fn judge_dedup(
        &mut self,
        what: What,
        judge: &mut dyn FnMut(&medes_faults::Call) -> Verdict,
        cancel: &Cancel,
    ) -> Outcome {
        match self.dedup(what, judge, cancel) {
            Ok(done) => {
                self.give_before_back();
                self.before = Some(done);
                match self.restore(&mut |_| Verdict::Go) {
                    Some(Answer::Right) => Outcome::Done,
                    Some(Answer::Dead) | None => Outcome::Dead,
                }
            }
            Err(DedupError::Lost(_)) => {
                // As who runs the operation does.
                self.keeping.cgroup.order_kill().expect("kills");
                Outcome::Dead
            }
            Err(DedupError::Cancelled | DedupError::StaysWarm(_)) => {
                // One that died meanwhile is found out about by its silence.
                match self.ask() {
                    Answer::Right => Outcome::AsItWas,
                    Answer::Dead => Outcome::Dead,
                }
            }
        }
    }

    /// Everything back to a sandbox that runs with all its memory; nothing may be left over.
    fn clear(&mut self, outcome: Outcome, scratch_is_left: bool) {
        if outcome == Outcome::Dead {
            *self.keeping.memory() = Memory::Present;
        }
        self.complete();
        self.give_before_back();
        if outcome == Outcome::Dead {
            self.renew();
        } else {
            assert_eq!(self.ask(), Answer::Right);
            self.assert_nobody_was_here(scratch_is_left);
            if scratch_is_left {
                self.renew();
            }
        }
        let snapshots = self.bench.store.snapshots_of(DOMAIN, FUNCTION);
        let new: Vec<_> = snapshots.iter().skip(1).map(|snapshot| snapshot.id()).collect();
        drop(snapshots);
        for id in new {
            self.bench.registry.remove(id).expect("removes");
            self.bench.store.retire_snapshot(id);
        }
        let usage = self.bench.store.usage();
        assert_eq!((usage.images, usage.image_count), (0, 0), "images are left");
        assert_eq!(usage.snapshots, self.bases, "pages of snapshots are left");
        assert_eq!(kinds_of_descriptors(), self.open, "descriptors are left");
    }

    /// Brings back what is away or watched.
    fn complete(&mut self) {
        let spaces = match std::mem::take(&mut *self.keeping.memory()) {
            Memory::Present => return,
            Memory::Returning(spaces) => spaces,
            Memory::Held(..) | Memory::Suspended(_) => panic!("not on its way back"),
        };
        let mut buffers = RestoreBuffers::default();
        for space in spaces {
            use medes_agent::restore::{Filling, Served};
            while space.fill(64, false, &mut buffers, &mut Served::default()).expect("fills")
                != Filling::Released
            {}
        }
    }

    /// The processes are as if nobody had ever looked at them.
    fn assert_nobody_was_here(&self, scratch_is_left: bool) {
        let cgroup = &self.keeping.cgroup;
        assert!(!cgroup.is_to_be_frozen().expect("a cgroup"), "frozen");
        for pid in cgroup.processes().expect("a cgroup") {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
            assert!(status.contains("\nTracerPid:\t0\n"), "traced: {status}");
            let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("a process");
            for flags in smaps.lines().filter(|line| line.starts_with("VmFlags:")) {
                assert!(
                    !flags.contains(" um") && !flags.contains(" uw"),
                    "its memory is registered"
                );
            }
            let scratch = smaps.contains("/dev/zero (deleted)");
            assert!(scratch_is_left || !scratch, "memory of ours is left in it");
            for fd in fs::read_dir(format!("/proc/{pid}/fd")).expect("a process").flatten() {
                let file = fs::read_link(fd.path()).unwrap_or_default();
                assert!(!file.to_string_lossy().contains("userfaultfd"), "a descriptor of ours");
            }
        }
    }
}

fn operation<'a>(
    bench: &'a Bench,
    new_base: bool,
    residents: &'a [Vec<Range<u64>>],
    cancel: &'a Cancel,
) -> Operation<'a> {
    Operation {
        store: &bench.store,
        registry: &*bench.registry,
        subject: Subject {
            domain: DOMAIN,
            function: FUNCTION,
            near: Near { node: NodeId(0), function: FUNCTION },
            scope: Scope::Any,
        },
        options: Options { fingerprints: FingerprintConfig::default(), workers: 1, new_base },
        residents,
        cancel,
    }
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn keeping(bench: &Bench, target: &Target) -> Keeping {
    let memory = Mutex::default();
    Keeping { view: bench.view(), cgroup: target.cgroup.clone(), memory }
}

/// What descriptors there are on, without what makes each one different.
fn kinds_of_descriptors() -> Vec<String> {
    let open = descriptors().expect("descriptors");
    let kind = |open: &String| open.split_once(":[").map_or(open.clone(), |(kind, _)| kind.into());
    open.iter().map(kind).collect()
}

/// Whether every step is to be tried.
fn all() -> bool {
    std::env::var("MEDES_FAULTS").is_ok_and(|which| which == "all")
}

/// Runs a test with a table of descriptors of its own.
fn alone(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            own_descriptors().expect("descriptors of its own");
            test();
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Which steps are tried, of how ever many there turn out to be.
struct Samples {
    at: u64,
    stride: u64,
}

impl Samples {
    fn of(steps: u64, random: &mut Random) -> Self {
        match all() {
            true => Self { at: 0, stride: 1 },
            false => {
                let stride = steps.div_ceil(SAMPLES).max(1);
                Self { at: random.below(stride), stride }
            }
        }
    }

    fn next(&mut self) -> u64 {
        self.at += self.stride;
        self.at - self.stride
    }
}

/// Tries faults of a kind at the steps of an operation: all, or some.
fn sweep(what: What, fault: Fault) {
    let all = all();
    let name = format!("{what:?}, {fault:?}");
    alone(|| {
        let mut scene = Scene::new(&name);
        // What is asked only once in a process is asked now.
        scene.attempt(what, fault, u64::MAX);
        let (outcome, steps, _) = scene.attempt(what, fault, u64::MAX);
        assert_eq!(outcome, Outcome::Done);
        let mut samples = Samples::of(steps, &mut scene.random);
        let mut seen: BTreeMap<Outcome, BTreeMap<String, u64>> = BTreeMap::new();
        let (mut faults, mut failed, mut beyond) = (0, 0, 0);
        while beyond < 3 {
            let at = samples.next();
            let mut variant = if all { 0 } else { scene.random.below(3) as usize };
            loop {
                let fault = if let Fault::Error(_) = fault { Fault::Error(variant) } else { fault };
                let tried = catch_unwind(AssertUnwindSafe(|| scene.attempt(what, fault, at)));
                let Ok((outcome, _, hit)) = tried else {
                    let step = steps::LAST.take();
                    println!("FAILED: {what:?}, {fault:?} at step {at}, {step}");
                    failed += 1;
                    // What is left of it does not count in the next one.
                    drop(scene);
                    scene = Scene::new(&name);
                    break;
                };
                let Some((step, variants)) = hit else {
                    beyond += 1;
                    break;
                };
                faults += 1;
                *seen.entry(outcome).or_default().entry(step).or_default() += 1;
                variant += 1;
                let is_error = matches!(fault, Fault::Error(_));
                if !all || !is_error || variant >= variants {
                    break;
                }
            }
        }
        println!("{name}: {steps} steps, {faults} faults");
        for (outcome, at) in &seen {
            println!("  {outcome:?}: {} {at:?}", at.values().sum::<u64>());
        }
        assert!(faults > 0);
        assert_eq!(failed, 0, "steps at which a fault did harm");
    });
}

/// Tries an operation with ever more room in the page store, page by page, until it has enough.
fn sweep_room(what: What) {
    let name = format!("{what:?}, full");
    alone(|| {
        let mut scene = Scene::new(&name);
        let needed = |scene: &mut Scene, room| {
            scene.room = Some(room);
            scene.attempt(what, Fault::Cancelled, u64::MAX).0
        };
        let stride = if all() { 1 } else { 1 + scene.random.below(60) };
        let (mut room, mut refused, mut enough) = (0, 0, 0);
        while enough < 3 {
            match needed(&mut scene, room) {
                Outcome::AsItWas => refused += 1,
                Outcome::Done => enough += 1,
                Outcome::Dead => panic!("killed for want of room: {room} pages"),
            }
            room += stride;
        }
        println!("{name}: refused {refused} times, up to {room} pages");
        assert!(refused > 0);
    });
}

macro_rules! sweeps {
    ($($name:ident: $what:ident, $fault:expr;)*) => {
        $(#[test] fn $name() { sweep(What::$what, $fault); })*
    };
}

#[test]
fn a_store_with_ever_more_room() {
    for what in [What::AsBase, What::First, What::Again] {
        sweep_room(what);
    }
}

sweeps! {
    dedup_as_base_with_an_error: AsBase, Fault::Error(0);
    dedup_with_an_error: First, Fault::Error(0);
    dedup_with_a_failing_injected_call: First, Fault::Injected;
    dedup_of_a_sandbox_that_is_killed: First, Fault::Killed;
    dedup_of_a_sandbox_whose_leader_is_killed: First, Fault::LeaderKilled;
    dedup_cancelled: First, Fault::Cancelled;
    dedup_again_with_an_error: Again, Fault::Error(0);
    dedup_again_with_a_failing_injected_call: Again, Fault::Injected;
    dedup_again_of_a_sandbox_that_is_killed: Again, Fault::Killed;
    dedup_again_cancelled: Again, Fault::Cancelled;
    restore_with_an_error: Restore, Fault::Error(0);
    restore_of_a_sandbox_that_is_killed: Restore, Fault::Killed;
    restore_of_a_sandbox_whose_leader_is_killed: Restore, Fault::LeaderKilled;
}
