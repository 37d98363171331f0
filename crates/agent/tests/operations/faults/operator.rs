//! The process that operates dies at a step. In a dedup another, which holds what it was given, goes
//! on from there: what the keeper does when its daemon dies. In a restore nobody does: the keeper
//! itself has died, and what lacks pages has to die with it.

use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, mpsc};

use medes_agent::dedup::{Cancel, DedupError, Handover, Holder, Previous, let_run};
use medes_agent::index::ImageIndex;
use medes_agent::restore::HeldImage;
use medes_agent::view::SpaceView;
use medes_core::NodeId;
use medes_faults::{Call, Verdict, die, supervise};
use medes_memory::descriptor::ProcessHandle;
use medes_memory::guard::{Guard, Orders};
use medes_memory::session::on_tracer_thread;
use medes_memory::userfault::{UserFault, UserFaultFeatures};
use medes_registry::{LocalRegistry, RegistryConfig};
use medes_sandbox::{Cgroup, CgroupRoot};
use medes_store::{Extent, Store, View};

use super::scene::{Answer, Keeping, Memory, ask};
use super::steps::{Fault, Injector};
use super::{Outcome, STORE_BYTES, STRIPE, Samples, Scene, Stop, What, alone, operation};
use crate::harness::{Bench, Group, stripes};

/// Set for the process that operates: where its holder listens, the cgroups' root, the step at
/// which it dies, what it does; and if the sandbox has an image, where that lies, and which of the
/// inherited descriptors are the store's memory file and the userfaultfds.
const OPERATOR: &str = "MEDES_FAULTS_OPERATOR";

#[test]
fn the_operator_is_killed() {
    match std::env::var(OPERATOR) {
        Ok(orders) => operate(&orders),
        Err(_) => sweep_deaths(What::AsBase),
    }
}

#[test]
fn the_operator_of_a_second_dedup_is_killed() {
    sweep_deaths(What::Again);
}

#[test]
fn the_operator_of_a_restore_is_killed() {
    sweep_deaths(What::Restore);
}

fn sweep_deaths(what: What) {
    alone(|| {
        let name = format!("{what:?}, the operator is killed");
        let mut scene = Scene::new(&name);
        let (outcome, steps) = attempt(&mut scene, what, u64::MAX);
        assert_eq!(outcome, Outcome::Done);
        let mut samples = Samples::of(steps, &mut scene.random);
        let mut counts = [0; 3];
        let mut beyond = 0;
        while beyond < 3 {
            let at = samples.next();
            let (outcome, steps) = attempt(&mut scene, what, at);
            beyond += u64::from(steps <= at);
            counts[outcome as usize] += 1;
        }
        let [done, as_it_was, dead] = counts;
        println!("{name}: {steps} steps; done {done}, as it was {as_it_was}, dead {dead}");
        // A restore that is over leaves nothing that has to die.
        assert!(dead > 0 && if what == What::Restore { done > 0 } else { as_it_was > 0 });
    });
}

/// Has another process operate, which dies at step `at`; returns how many steps it got to.
fn attempt(scene: &mut Scene, what: What, at: u64) -> (Outcome, u64) {
    scene.prepare(what);
    let name = format!("medes-faults-{}-{what:?}", std::process::id());
    let socket = std::env::temp_dir().join(name);
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).expect("a socket");
    let root = scene.target.root_name();
    let mut orders = format!("{} {root} {at} {what:?}", socket.display());
    let mut inherited: Vec<OwnedFd> = Vec::new();
    if let Some(before) = &scene.before {
        let Extent { start, pages } = before.image.extent();
        orders += &format!(" {start} {pages}");
        let store = scene.bench.store.memory().descriptor();
        let all = std::iter::once(store).chain(before.userfaults.iter().map(AsFd::as_fd));
        for fd in all {
            // Not to be closed on exec.
            let copy = nix::unistd::dup(fd).expect("a descriptor");
            orders += &format!(" {}", copy.as_raw_fd());
            inherited.push(copy);
        }
    }
    let mut operator = Command::new(std::env::current_exe().expect("this program"));
    operator.args(["--exact", "faults::operator::the_operator_is_killed"]);
    operator.env(OPERATOR, orders).stdout(Stdio::null()).stdin(Stdio::null());
    let mut operator = operator.spawn().expect("starts");
    drop(inherited);
    if what == What::Restore {
        // Whoever else had the userfaultfds would keep those who wait for pages waiting.
        *scene.keeping.memory() = Memory::Present;
        scene.before.iter_mut().for_each(|before| before.userfaults.clear());
    }
    let (stream, _) = listener.accept().expect("the operator");
    std::fs::remove_file(&socket).expect("a socket");
    drop(listener);
    let steps = hold(scene, &mut operator, stream);
    let outcome = match what {
        What::Restore => run_on(scene),
        _ => go_on(scene),
    };
    scene.clear(outcome, false);
    (outcome, steps)
}

/// Takes what the operator gives, until it is dead.
fn hold(scene: &mut Scene, operator: &mut Child, stream: UnixStream) -> u64 {
    let pid = operator.id() as i32;
    let process = ProcessHandle::open(pid).expect("the operator");
    let mut steps = 0;
    let mut answers = stream.try_clone().expect("a socket");
    for line in BufReader::new(stream).lines() {
        // Killed in the middle of a word.
        let Ok(line) = line else { break };
        let mut words = line.split(' ');
        let order = words.next();
        let mut numbers = words.map(|word| word.parse::<u64>().expect("a number"));
        let mut number = || numbers.next().expect("a number");
        match order {
            Some("store") => {
                let memory = process.take_descriptor(number() as i32).expect("its store");
                scene.keeping.view = Arc::new(View::open(memory).expect("maps"));
                writeln!(answers, "held").expect("the operator");
            }
            Some("hold") => {
                let image = Extent { start: number() as u32, pages: number() as u32 };
                let userfaults: std::io::Result<Vec<OwnedFd>> =
                    (0..number()).map(|_| process.take_descriptor(number() as i32)).collect();
                // It may have died since it asked.
                let Ok(userfaults) = userfaults else { break };
                let mut residents = Vec::new();
                while let Some(count) = numbers.next() {
                    let mut number = || numbers.next().expect("a number");
                    residents.push((0..count).map(|_| number()..number()).collect());
                }
                let view = Arc::clone(&scene.keeping.view);
                let mut held = HeldImage::open(view, image, userfaults).expect("an image");
                held.leave(residents);
                scene.keeping.take(held).expect("all its own");
                let _ = writeln!(answers, "held");
            }
            Some("release") => scene.keeping.release(),
            Some("suspend") => {
                let views = scene.keeping.suspend().expect("watched");
                let bytes = postcard::to_allocvec(&views).expect("encodes");
                let line: String = bytes.iter().map(|byte| format!("{byte} ")).collect();
                let _ = writeln!(answers, "{line}");
            }
            Some("resume") => {
                scene.keeping.resume().expect("suspended");
                let _ = writeln!(answers, "resumed");
            }
            Some("runs") => {
                // Dead is dead when it is asked again.
                ask(&mut scene.target, &mut scene.asked);
                let _ = writeln!(answers, "asked");
            }
            Some("step") => steps = number(),
            other => panic!("{other:?}"),
        }
    }
    let end = operator.wait().expect("its end");
    assert_eq!(end.signal(), Some(libc::SIGKILL), "the operator failed: {end}");
    steps
}

/// Has a sandbox run whose restore is over, or will never be.
fn run_on(scene: &mut Scene) -> Outcome {
    scene.keeping.cgroup.thaw().expect("thaws");
    match scene.ask() {
        Answer::Right => Outcome::Done,
        Answer::Dead => Outcome::Dead,
    }
}

/// What is done with a sandbox whose operator is dead.
fn go_on(scene: &mut Scene) -> Outcome {
    let cgroup = scene.keeping.cgroup.clone();
    let is_to_be_frozen = cgroup.is_to_be_frozen().expect("a cgroup");
    let is_held = matches!(&*scene.keeping.memory(), Memory::Held(..));
    if is_held && !is_to_be_frozen {
        cgroup.order_kill().expect("kills");
        return Outcome::Dead;
    }
    if is_held {
        return match scene.restore(&mut |_| Verdict::Go) {
            Some(Answer::Right) => Outcome::Done,
            Some(Answer::Dead) | None => Outcome::Dead,
        };
    }
    if matches!(&*scene.keeping.memory(), Memory::Suspended(_)) {
        scene.keeping.resume().expect("suspended");
    }
    if is_to_be_frozen {
        on_tracer_thread(|| let_run(&mut Group(&cgroup))).expect("thaws");
    }
    match scene.ask() {
        Answer::Right => Outcome::AsItWas,
        Answer::Dead => Outcome::Dead,
    }
}

/// The process that operates.
fn operate(orders: &str) {
    let mut words = orders.split(' ');
    let mut word = || words.next().expect("orders");
    let stream = UnixStream::connect(word()).expect("who holds");
    let root = CgroupRoot::new(word()).expect("cgroups");
    let cgroup = root.get("subject").expect("a cgroup");
    let at: u64 = word().parse().expect("a step");
    let restores = word() == format!("{:?}", What::Restore);
    let rest: Vec<u64> = words.map(|word| word.parse().expect("a number")).collect();
    let told = Told(stream);
    let act = || {
        told.tell(&format!("step {}", at.saturating_add(1)));
        die()
    };
    let mut injector = Injector::new(Fault::Killed, at, &act);
    let judge = &mut |call: &_| injector.judge(call);
    match restores {
        true => restore(cgroup, &rest, &told, judge),
        false => dedup(&cgroup, &rest, &told, judge),
    }
    told.tell(&format!("step {}", injector.steps));
    // It ends as it would by a signal: nothing of it is put away.
    die();
}

fn dedup(cgroup: &Cgroup, rest: &[u64], told: &Told, judge: &mut dyn FnMut(&Call) -> Verdict) {
    let mut bench = Bench::new(STORE_BYTES, LocalRegistry::new(RegistryConfig::default()));
    let previous = (!rest.is_empty()).then(|| take_over(&mut bench, rest));
    told.store(bench.store.memory().descriptor());
    let cancel = Cancel::default();
    let residents = previous.as_ref().map_or_else(Vec::new, |_| stripes(cgroup, STRIPE));
    let operation = operation(&bench, previous.is_none(), &residents, &cancel);
    let done = supervise(judge, || operation.dedup(Group(cgroup), told, previous.as_ref()));
    assert!(matches!(done, Ok(_) | Err(DedupError::StaysWarm(_))), "{done:?}");
}

/// Restores under the eyes of a guard, as every process does that has userfaultfds of its own.
fn restore(cgroup: Cgroup, rest: &[u64], told: &Told, judge: &mut dyn FnMut(&Call) -> Verdict) {
    let (extent, store, userfaults) = inherited(rest);
    let view = Arc::new(View::open(store).expect("maps"));
    let orders = Orders::new().expect("memory");
    let _guard = Guard::start(&orders).expect("a process");
    let order = orders.add(cgroup.kill_file().expect("a cgroup")).expect("room for an order");
    let held = HeldImage::open(Arc::clone(&view), extent, userfaults).expect("an image");
    let keeping = Keeping { view, cgroup, memory: Mutex::new(Memory::Held(held, Vec::new())) };
    // From here on nobody else has the userfaultfds.
    told.store(keeping.view.descriptor());
    let (stop, (runs, running)) = (AtomicBool::new(false), mpsc::channel());
    let stop = &stop;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let _stopping = Stop(stop);
            if running.recv().is_ok() {
                told.tell("runs");
                told.hear().expect("who asks");
            }
        });
        let work = move || keeping.restore(false, || runs.send(()).expect("who listens"), stop);
        supervise(judge, work).expect("restores");
    });
    // Nothing is missing any more.
    drop(order);
}

/// What the process before has left: where the image lies, the store's memory file, the
/// userfaultfds.
fn inherited(orders: &[u64]) -> (Extent, OwnedFd, Vec<OwnedFd>) {
    let [start, pages, store, userfaults @ ..] = orders else { panic!("{orders:?}") };
    let this = ProcessHandle::open(std::process::id() as i32).expect("this process");
    let take = |fd: &u64| this.take_descriptor(*fd as i32).expect("inherited");
    let extent = Extent { start: *start as u32, pages: *pages as u32 };
    (extent, take(store), userfaults.iter().map(take).collect())
}

/// Takes over the store and what is left of the operation before.
fn take_over(bench: &mut Bench, orders: &[u64]) -> Previous {
    let (extent, store, userfaults) = inherited(orders);
    bench.store = Store::reopen(NodeId(0), store).expect("a store");
    let image = ImageIndex::open(bench.view(), extent).expect("an image");
    let snapshots: Vec<_> = image.table().snapshots.iter().map(|used| used.id).collect();
    let _adopted = bench.store.adopt_image(extent, &snapshots).expect("an image");
    let features = UserFaultFeatures::events_and_writes();
    let userfault = |fd| UserFault::from_parts(fd, features, Vec::new(), None);
    Previous { image, userfaults: userfaults.into_iter().map(userfault).collect() }
}

/// Who holds is another process.
struct Told(UnixStream);

impl Told {
    fn tell(&self, line: &str) {
        // In one piece, whoever else tells something.
        (&self.0).write_all(format!("{line}\n").as_bytes()).expect("who holds");
    }

    /// Tells which descriptor is the store's memory file.
    fn store(&self, memory: BorrowedFd<'_>) {
        self.tell(&format!("store {}", memory.as_raw_fd()));
        self.hear().expect("who holds");
    }

    fn hear(&self) -> std::io::Result<String> {
        let mut line = String::new();
        BufReader::new(&self.0).read_line(&mut line)?;
        Ok(line)
    }
}

impl Holder for Told {
    fn hold(&self, handover: &Handover<'_>) -> Result<(), String> {
        let Handover { image, userfaults, residents, .. } = handover;
        let Extent { start, pages } = image.extent();
        let mut numbers = vec![u64::from(start), u64::from(pages), userfaults.len() as u64];
        numbers.extend(userfaults.iter().map(|fd| fd.as_raw_fd() as u64));
        for ranges in residents.iter() {
            numbers.push(ranges.len() as u64);
            numbers.extend(ranges.iter().flat_map(|range| [range.start, range.end]));
        }
        let numbers: String = numbers.iter().map(|number| format!(" {number}")).collect();
        self.tell(&format!("hold{numbers}"));
        self.hear().map(drop).map_err(|error| error.to_string())
    }

    fn release(&self) {
        self.tell("release");
    }

    fn left(&self, _ranges: &[Vec<Range<u64>>]) -> Result<(), String> {
        Err("nobody cancels here".into())
    }

    fn take_back(&self, _: &[Vec<Range<u64>>], _: &mut dyn FnMut()) -> Result<(), String> {
        unreachable!("nobody asks for the sandbox here")
    }

    fn put_back(&self) -> Result<(), String> {
        Err("nothing fails here".into())
    }

    fn suspend(&self) -> Result<Vec<SpaceView>, String> {
        self.tell("suspend");
        let line = self.hear().map_err(|error| error.to_string())?;
        let bytes: Vec<u8> =
            line.split_whitespace().map(|byte| byte.parse().expect("a byte")).collect();
        postcard::from_bytes(&bytes).map_err(|error| error.to_string())
    }

    fn resume(&self) -> Result<(), String> {
        self.tell("resume");
        self.hear().map(drop).map_err(|error| error.to_string())
    }
}
