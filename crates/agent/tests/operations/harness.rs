//! A live process to work on, in a cgroup of its own, and a holder in this process.

use std::io::{self, BufRead, BufReader, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use medes_agent::RestoreError;
use medes_agent::dedup::{
    Cancel, DedupError, Deduplicated, Handover, Holder, Operation, Options, Previous, Subject,
};
use medes_agent::image::ProcessTable;
use medes_agent::index::ImageIndex;
use medes_agent::restore::{
    self, AddressSpace, Filling, HeldImage, RestoreBuffers, Revived, Served, Unasked,
};
use medes_agent::view::SpaceView;
use medes_agent::working_set::Prefetch;
use medes_core::{DomainId, FunctionId, NodeId};
use medes_memory::mappings::{Mapping, Mappings};
use medes_memory::ranges::slices;
use medes_memory::session::{Freezer, Thaw, on_tracer_thread};
use medes_pages::FingerprintConfig;
use medes_registry::{Near, Registry, Scope};
use medes_sandbox::{Cgroup, CgroupRoot, Resources};
use medes_store::{Store, View};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub const FUNCTION: FunctionId = FunctionId(5);

/// A running subject.
pub struct Target {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    root: CgroupRoot,
    pub cgroup: Cgroup,
    requests: u32,
}

impl Target {
    pub fn start(seed: u32) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/operations/subject.py");
        let mut command = Command::new("python3");
        command.args([script, &seed.to_string()]).env("PYTHONHASHSEED", "1");
        Self::run(&command)
    }

    /// Runs a program in a cgroup of its own until it prints "ready".
    pub fn run(program: &Command) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let root = CgroupRoot::new(&format!("medes-agenttest-{}-{number}", std::process::id()));
        let root = root.expect("cgroups; run as root");
        let resources =
            Resources { memory_limit_bytes: 1 << 30, pids_max: 64, cpu_millicores: None };
        let cgroup = root.create("subject", &resources).expect("a cgroup");
        // In the cgroup before it can have children.
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"echo $$ >"$0" && exec "$@""#])
            .arg(cgroup.path().join("cgroup.procs"));
        command.arg(program.get_program()).args(program.get_args());
        command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut target = Self { child, input, output, root, cgroup, requests: 0 };
        assert_eq!(target.line(), "ready");
        target
    }

    /// Sends a line.
    pub fn tell(&mut self, line: &str) {
        // A subject that has ended is found out about by its answer.
        let _ = writeln!(self.input, "{line}");
    }

    /// The next line from the subject; waits a minute for it.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        let limit = PollTimeout::from(60_000u16);
        let mut ready = [PollFd::new(self.output.get_ref().as_fd(), PollFlags::POLLIN)];
        if self.output.buffer().is_empty() && poll(&mut ready, limit) == Ok(0) {
            panic!("no answer after a minute; process {} is left as it is", self.pid());
        }
        self.output.read_line(&mut line).expect("reads");
        line.trim_end().to_owned()
    }

    /// Asks the subject whether its memory is as it has to be, and its thread alive.
    pub fn check(&mut self) {
        self.send();
        self.answer();
    }

    pub fn send(&mut self) {
        self.tell("?");
        self.requests += 1;
    }

    pub fn answer(&mut self) {
        assert_eq!(self.line(), format!("{} right alive", self.requests));
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("dies");
    }

    /// Its end, when it has closed its output.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("its end")
    }

    pub fn root_name(&self) -> &str {
        self.root.name()
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let limit = Duration::from_secs(10);
        let _ = self.cgroup.kill(limit);
        let _ = self.child.wait();
        self.cgroup.remove(limit).expect("an empty cgroup");
        self.root.remove().expect("an empty root");
    }
}

pub struct Group<'a>(pub &'a Cgroup);

impl Freezer for Group<'_> {
    fn freeze(&mut self) -> io::Result<()> {
        self.0.freeze(Duration::from_secs(5)).map_err(io::Error::other)
    }

    fn thaw(&mut self) -> io::Result<()> {
        self.0.thaw().map_err(io::Error::other)
    }

    fn processes(&mut self) -> io::Result<Vec<i32>> {
        self.0.processes().map_err(io::Error::other)
    }

    fn thawer(&self) -> Option<Thaw> {
        let cgroup = self.0.clone();
        Some(Box::new(move || cgroup.thaw().map_err(io::Error::other)))
    }
}

/// A node without the rest: store, registry, and who holds images.
pub struct Bench {
    pub store: Store,
    pub registry: Box<dyn Registry>,
    pub cancel: Cancel,
    /// What was restored last and is watched.
    pub watched: Mutex<Vec<Arc<AddressSpace>>>,
    pub held: Mutex<Option<HeldImage>>,
    /// What is to stay of the targets that are deduplicated.
    pub residents: Mutex<Vec<Vec<Range<u64>>>>,
    /// Runs when an image is to be held; an error refuses.
    pub on_hold: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
}

impl Bench {
    pub fn new(capacity: u64, registry: impl Registry + 'static) -> Self {
        Self {
            store: Store::create(NodeId(0), capacity).expect("a store"),
            registry: Box::new(registry),
            cancel: Cancel::default(),
            watched: Mutex::default(),
            held: Mutex::new(None),
            residents: Mutex::default(),
            on_hold: Box::new(|| Ok(())),
        }
    }

    pub fn view(&self) -> Arc<View> {
        let fd = self.store.memory().descriptor().try_clone_to_owned().expect("a descriptor");
        Arc::new(View::open(fd).expect("maps"))
    }

    pub fn dedup(&self, target: &Target, new_base: bool) -> Result<Deduplicated, DedupError> {
        self.dedup_with(target, new_base, None, &self.cancel)
    }

    /// Deduplicates a target that was restored by [`Bench::restore_watched`].
    pub fn dedup_again(
        &self,
        target: &Target,
        done: &Deduplicated,
    ) -> Result<Deduplicated, DedupError> {
        self.dedup_with(target, false, Some(&self.previous(done)), &self.cancel)
    }

    pub fn previous(&self, done: &Deduplicated) -> Previous {
        let previous = Previous::of(&self.store, self.view(), &done.image, &done.userfaults);
        previous.expect("an image and descriptors").expect("of use")
    }

    pub fn dedup_with(
        &self,
        target: &Target,
        new_base: bool,
        previous: Option<&Previous>,
        cancel: &Cancel,
    ) -> Result<Deduplicated, DedupError> {
        let operation = Operation {
            store: &self.store,
            registry: &*self.registry,
            subject: Subject {
                domain: DomainId(1),
                function: FUNCTION,
                near: Near { node: NodeId(0), function: FUNCTION },
                scope: Scope::Any,
            },
            options: Options { fingerprints: FingerprintConfig::default(), workers: 2, new_base },
            residents: &self.residents.lock().unwrap(),
            cancel,
        };
        on_tracer_thread(|| operation.dedup(Group(&target.cgroup), self, previous))
    }

    /// Lets the target run, unless a request has done so already.
    fn revive(&self, target: &Target, working_set: &Prefetch) -> Revived {
        let Some(image) = self.held.lock().unwrap().take() else {
            return Revived {
                spaces: std::mem::take(&mut *self.watched.lock().unwrap()),
                pages: 0,
            };
        };
        let revived = image.revive(working_set, &mut RestoreBuffers::default()).expect("revives");
        target.cgroup.thaw().expect("thaws");
        revived
    }

    /// Lets the target run with none of its anonymous memory but what it touches, which comes
    /// back as it does, while `meanwhile` runs; then brings everything back.
    pub fn restore(&self, target: &mut Target, meanwhile: impl FnOnce(&mut Target)) -> u64 {
        let revived = self.revive(target, &Prefetch::default());
        let served = serve_while(&revived, || meanwhile(target));
        finish(&revived, false);
        served.faults
    }

    /// As [`Bench::restore`], with the memory watched from then on; some of it stays away unless
    /// `fill` says otherwise.
    pub fn restore_watched(
        &self,
        target: &mut Target,
        fill: bool,
        meanwhile: impl FnOnce(&mut Target),
    ) {
        let revived = self.revive(target, &Prefetch::default());
        serve_while(&revived, || meanwhile(target));
        if fill {
            finish(&revived, true);
        }
        *self.watched.lock().unwrap() = revived.spaces;
    }

    /// As [`Bench::restore`], with a working set. Returns which pages of the first process were
    /// touched and not in it.
    pub fn restore_with(&self, target: &mut Target, working_set: &Prefetch) -> Vec<u64> {
        let revived = self.revive(target, working_set);
        let served = serve_while(&revived, || target.check());
        finish(&revived, false);
        served.touched
    }

    /// Lets the target run with every other block of its pages; it is watched then, and served by
    /// nobody yet.
    pub fn restore_half(&self, target: &Target) {
        let mut blocks = vec![Vec::new()];
        if let Some(image) = &*self.held.lock().unwrap() {
            blocks = pages_of(self.view(), image);
        }
        for ranges in &mut blocks {
            let halves = ranges.iter().flat_map(|range| slices(range.clone(), 16 << 12));
            *ranges =
                halves.map(|slice| slice.start..slice.end.min(slice.start + (8 << 12))).collect();
        }
        let revived = self.revive(target, &Prefetch::of(&blocks));
        *self.watched.lock().unwrap() = revived.spaces;
    }

    /// Serves the memory that is watched while `meanwhile` runs.
    pub fn serve_watched(&self, meanwhile: impl FnOnce()) {
        let spaces = self.watched.lock().unwrap().clone();
        serve_while(&Revived { spaces, pages: 0 }, meanwhile);
    }

    /// Takes hold once more of what a target in the dedup state has.
    pub fn reopen(&self, done: &Deduplicated) -> HeldImage {
        let userfaults = done.userfaults.iter().map(|u| u.as_fd().try_clone_to_owned());
        let userfaults: io::Result<Vec<OwnedFd>> = userfaults.collect();
        let image = HeldImage::open(self.view(), done.image.extent(), userfaults.expect("open"));
        image.expect("an image")
    }

    /// Nothing may be left in the store but base snapshots.
    pub fn assert_no_images(&self) {
        let usage = self.store.usage();
        assert_eq!((usage.images, usage.image_count), (0, 0), "images are left");
    }

    pub fn give_back(&self, done: Deduplicated) {
        drop(done.userfaults);
        self.store.remove_image(done.image);
        self.assert_no_images();
    }
}

/// Stops the service when it is dropped, by a failing test too.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The pages that an image has of each of its processes.
pub fn pages_of(view: Arc<View>, image: &HeldImage) -> Vec<Vec<Range<u64>>> {
    let index = ImageIndex::open(view, image.image()).expect("an image");
    let of_process = |table: &ProcessTable| table.runs.iter().map(|r| r.address..r.end()).collect();
    index.table().processes.iter().map(of_process).collect()
}

/// Every other block of `pages` pages of the memory of each process of a group, by process id: what
/// may stay when it is deduplicated.
pub fn stripes(cgroup: &Cgroup, pages: u64) -> Vec<Vec<Range<u64>>> {
    let mut pids = cgroup.processes().expect("a cgroup");
    pids.sort_unstable();
    let of_process = |pid: &i32| {
        // It may have ended.
        let mappings = Mappings::read(*pid).map(|all| all.iter().map(Mapping::range).collect());
        let mappings: Vec<Range<u64>> = mappings.unwrap_or_default();
        let blocks = mappings.into_iter().flat_map(|range| {
            let reserved = range.end - range.start > 1 << 30;
            slices(range, if reserved { 1 << 40 } else { pages << 12 }).step_by(2)
        });
        blocks.collect()
    };
    pids.iter().map(of_process).collect()
}

/// Serves faults on a thread of its own while `work` runs; returns what it did.
pub fn serve_while(revived: &Revived, work: impl FnOnce()) -> Served {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let mut buffers = RestoreBuffers::default();
            let mut served = Served::default();
            while !stop.load(Ordering::Acquire) {
                for space in &revived.spaces {
                    space.serve(Unasked::Ahead, &mut buffers, &mut served).expect("serves");
                }
                std::thread::yield_now();
            }
            served
        });
        let stopping = Stop(&stop);
        work();
        drop(stopping);
        server.join().expect("served")
    })
}

pub fn finish(revived: &Revived, keep: bool) {
    let mut buffers = RestoreBuffers::default();
    for space in &revived.spaces {
        let mut fill = || space.fill(64, keep, &mut buffers, &mut Served::default());
        while fill().expect("fills") == Filling::Going {}
    }
}

impl Holder for Bench {
    fn hold(&self, handover: &Handover<'_>) -> Result<(), String> {
        let Handover { image, userfaults, residents, .. } = handover;
        (self.on_hold)()?;
        let userfaults: io::Result<Vec<OwnedFd>> =
            userfaults.iter().map(|fd| fd.as_fd().try_clone_to_owned()).collect();
        let held = HeldImage::open(self.view(), image.extent(), userfaults.expect("descriptors"));
        let mut held = held.map_err(|e: RestoreError| e.to_string())?;
        held.leave(residents.to_vec());
        *self.held.lock().unwrap() = Some(held);
        Ok(())
    }

    fn release(&self) {
        self.held.lock().unwrap().take();
    }

    fn left(&self, ranges: &[Vec<Range<u64>>]) -> Result<(), String> {
        let mut held = self.held.lock().unwrap();
        held.as_mut().ok_or("nothing is held")?.leave(ranges.to_vec());
        Ok(())
    }

    fn take_back(
        &self,
        left: &[Vec<Range<u64>>],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), String> {
        let mut image = self.held.lock().unwrap().take().ok_or("nothing is held")?;
        image.leave(left.to_vec());
        let revived = std::thread::scope(|scope| {
            let reviving =
                scope.spawn(|| image.revive(&Prefetch::default(), &mut RestoreBuffers::default()));
            meanwhile();
            reviving.join().unwrap()
        });
        *self.watched.lock().unwrap() = revived.map_err(|e| e.to_string())?.spaces;
        Ok(())
    }

    fn put_back(&self) -> Result<(), String> {
        Err("not in these tests".into())
    }

    fn suspend(&self) -> Result<Vec<SpaceView>, String> {
        let mut watched = self.watched.lock().unwrap();
        watched.retain(|space| !space.is_child() || !space.has_ended());
        let mut children = Vec::new();
        let forked = |_: &AddressSpace, served: Served| children.extend(served.children);
        let views = restore::suspend(&mut watched, &mut RestoreBuffers::default(), forked);
        watched.extend(children);
        views
    }

    fn resume(&self) -> Result<(), String> {
        self.watched.lock().unwrap().iter().for_each(|space| space.resume());
        Ok(())
    }
}
