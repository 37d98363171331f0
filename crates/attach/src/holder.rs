//! The process that holds what brings attached groups back.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use medes_agent::dedup::{
    Cancel, Counts, DedupError, Deduplicated, Hindrance, Operation, Options, Previous, Subject,
};
use medes_core::{DomainId, FunctionId, NodeId};
use medes_memory::guard::{Guard, Orders};
use medes_memory::session::on_tracer_thread;
use medes_pages::{FingerprintConfig, PAGE_SIZE};
use medes_registry::{LocalRegistry, Near, Registry, RegistryConfig, Scope};
use medes_store::{Store, StoreError, View};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal};
use parking_lot::Mutex;
use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

use crate::attached::{Away, Group, Held, Holding, Left, Memory, now_ms};
use crate::cells::Cells;
use crate::client::socket;
use crate::events::Events;
use crate::processes;
use crate::protocol::{
    Attached, Call, Dedup, DedupReport, Reply, Request, RestoreReport, VERSION, Which,
};
use crate::refusal::Refusal;
use crate::target::Target;
use crate::watched::Watched;

/// How long it waits for another command before it ends, when nothing is attached.
const LINGER: Duration = Duration::from_secs(2);

/// How often it looks whether groups have ended by themselves.
const LOOK: Duration = Duration::from_millis(250);

/// Groups of one program that have to be there before the next becomes a base snapshot: each keeps
/// about a third of its memory compressed by itself, a base snapshot all of it, once.
const BASE_FROM: usize = 2;

/// Runs the holder until nothing is attached any more, nor watched, or until it is told to end
/// (SIGTERM), which brings everything back first.
///
/// # Errors
/// When it can't start. That another one runs already is no error.
pub fn run(directory: &Path) -> io::Result<()> {
    // Whatever the host is short of, other processes are a better choice. Best effort.
    let _ = fs::write("/proc/self/oom_score_adj", "-900");
    fs::create_dir_all(directory)?;
    let lock = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(directory.join("lock"))?;
    let Ok(_lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else { return Ok(()) };
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGHUP);
    // Before any thread is started, so that all of them inherit it.
    signals.thread_block()?;
    let orders = Orders::new()?;
    let mut guard = Guard::start(&orders)?;
    leave_cgroup();
    let engine = Arc::new(Engine::new(directory, orders.clone())?);
    engine.clean_up();
    std::thread::Builder::new().name("guard".into()).spawn(move || {
        while guard.wait().is_ok() {
            tracing::warn!("the guard process was killed; starting another");
            match Guard::start(&orders) {
                Ok(another) => guard = another,
                Err(error) => return tracing::error!(%error, "starting a guard process"),
            }
        }
    })?;
    let ended = Arc::clone(&engine);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            if matches!(signals.wait(), Ok(Signal::SIGTERM | Signal::SIGINT)) {
                ended.stop.store(true, Ordering::Release);
            }
        }
    })?;
    let path = socket(directory);
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let served = engine.serve(&listener);
    let _ = fs::remove_file(&path);
    engine.restore_all();
    served
}

/// Leaves the cgroup of whoever started it: that may be a session that ends, or frozen itself.
fn leave_cgroup() {
    if let (Some(unified), _) = processes::cgroup_mounts()
        && let Err(error) = fs::write(unified.join("cgroup.procs"), std::process::id().to_string())
    {
        tracing::debug!(%error, "staying in the cgroup of the command that started this");
    }
}

/// When a group ran, or why it can't.
type Ran = Result<Instant, String>;

/// Everything that is attached, and what it takes.
struct Engine {
    store: Store,
    view: Arc<View>,
    registry: LocalRegistry,
    orders: Orders,
    groups: Mutex<BTreeMap<String, Arc<Group>>>,
    /// What was attached, and may be again.
    watched: Mutex<Vec<Watched>>,
    domains: Mutex<HashMap<String, DomainId>>,
    /// The number of the next group.
    next: AtomicUsize,
    /// Held while something is taken, or let go of: one operation at a time.
    taking: Mutex<()>,
    connections: AtomicUsize,
    /// Connections that watch.
    watchers: AtomicUsize,
    stop: AtomicBool,
    events: Events,
    /// Where the cgroups are written down, for whoever comes after a crash.
    notes: PathBuf,
}

impl Engine {
    fn new(directory: &Path, orders: Orders) -> io::Result<Self> {
        let store = Store::create(NodeId(0), memory_total()? / 2)?;
        let memory = store.memory().descriptor().as_fd().try_clone_to_owned()?;
        Ok(Self {
            view: Arc::new(View::open(memory)?),
            store,
            registry: LocalRegistry::new(RegistryConfig::default()),
            orders,
            groups: Mutex::default(),
            watched: Mutex::default(),
            domains: Mutex::default(),
            next: AtomicUsize::new(1),
            taking: Mutex::default(),
            connections: AtomicUsize::new(0),
            watchers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            events: Events::default(),
            notes: directory.join("cgroups"),
        })
    }

    /// Sets free what a holder before this one has left: what lacked pages was killed with it.
    fn clean_up(&self) {
        let left = fs::read(&self.notes).ok();
        let left: Option<Vec<Cells>> = left.and_then(|text| serde_json::from_slice(&text).ok());
        left.into_iter().flatten().for_each(|cells| cells.give_back());
        let _ = fs::remove_file(&self.notes);
    }

    /// Writes down which cgroups are in use, one more included.
    fn note(&self, more: Option<&Cells>) {
        let groups = self.groups.lock();
        let cells: Vec<&Cells> = groups.values().map(|group| &group.cells).chain(more).collect();
        let text = serde_json::to_vec(&cells).unwrap_or_default();
        if let Err(error) = fs::write(&self.notes, text) {
            tracing::warn!(%error, "writing down which cgroups are in use");
        }
    }

    fn serve(self: &Arc<Self>, listener: &UnixListener) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let mut busy = Instant::now();
        let mut looked = Instant::now();
        while !self.stop.load(Ordering::Acquire) {
            let mut ready =
                [nix::poll::PollFd::new(listener.as_fd(), nix::poll::PollFlags::POLLIN)];
            let _ =
                nix::poll::poll(&mut ready, nix::poll::PollTimeout::from(LOOK.as_millis() as u16));
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    self.connections.fetch_add(1, Ordering::AcqRel);
                    let engine = Arc::clone(self);
                    std::thread::spawn(move || {
                        if let Err(error) = engine.converse(stream) {
                            tracing::debug!(%error, "a conversation ended early");
                        }
                        engine.connections.fetch_sub(1, Ordering::AcqRel);
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if looked.elapsed() > LOOK {
                self.look_after();
                looked = Instant::now();
            }
            let idle = self.groups.lock().is_empty()
                && self.watched.lock().is_empty()
                // Those that only watch keep nobody here.
                && self.connections.load(Ordering::Acquire)
                    == self.watchers.load(Ordering::Acquire);
            if !idle {
                busy = Instant::now();
            } else if busy.elapsed() > LINGER {
                break;
            }
        }
        Ok(())
    }

    fn converse(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        let asker =
            nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut stream = reader.into_inner();
        let request = match serde_json::from_str::<Call>(&line) {
            Ok(Call { version: VERSION, request }) => Ok(request),
            Ok(_) => Err(Refusal::Version),
            Err(error) => Err(Refusal::Bad(error)),
        };
        let answer = match request {
            Ok(Request::Watch) => return self.watch(&mut stream),
            Ok(Request::Dedup(dedup)) => self.dedup(dedup, asker.pid()).map(value),
            Ok(Request::Restore { which, wait }) => self.restore(&which, wait).map(value),
            Ok(Request::Status) => Ok(value(self.status())),
            Ok(Request::Events) => Ok(value(self.events.lately())),
            Err(refusal) => Err(refusal),
        };
        let reply = match answer {
            Ok(value) => Reply::Ok(value),
            Err(refusal) => {
                Reply::Error { code: refusal.code().into(), message: refusal.to_string() }
            }
        };
        stream.write_all(format!("{}\n", serde_json::to_string(&reply)?).as_bytes())
    }

    fn status(&self) -> Vec<Attached> {
        self.groups.lock().values().map(|group| group.describe()).collect()
    }

    fn tell(&self, id: &str, what: &str, detail: impl ToString) {
        self.events.tell(id, what, detail.to_string());
    }

    /// Writes events as they come, until the reader has gone or this process ends.
    fn watch(&self, stream: &mut UnixStream) -> io::Result<()> {
        self.watchers.fetch_add(1, Ordering::AcqRel);
        let result = self.events.write_to(stream, &self.stop);
        self.watchers.fetch_sub(1, Ordering::AcqRel);
        result
    }

    fn dedup(&self, dedup: Dedup, asker: i32) -> Result<DedupReport, Refusal> {
        let Dedup { target, domain, base, dry_run } = dedup;
        let _taking = self.taking.lock();
        let selection = target.select()?;
        let pids = selection.processes();
        target.check(&pids, asker)?;
        if let Some(group) = self.holds_any(&pids) {
            return Err(Refusal::Attached(target, group.id.clone()));
        }
        if !dry_run {
            target.check_running(&pids)?;
        }
        let first = pids[0];
        let program = processes::program(first).unwrap_or_default().display().to_string();
        let user = processes::user(first).unwrap_or_default();
        let domain = domain.unwrap_or_else(|| format!("user {user}"));
        let function = FunctionId(xxh3_64(program.as_bytes()));
        let domain_id = self.domain(&domain);
        let new_base = !dry_run && (base || self.wants_base(domain_id, function));
        let subject = Subject {
            domain: domain_id,
            function,
            near: Near { node: NodeId(0), function },
            scope: Scope::Any,
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let options = Options { fingerprints: FingerprintConfig::default(), workers, new_base };
        let cancel = Cancel::default();
        let operation = Operation {
            store: &self.store,
            registry: &self.registry,
            subject,
            options,
            residents: &[],
            cancel: &cancel,
        };
        if dry_run {
            let estimate = operation.estimate(&pids).map_err(|e| Refusal::Stays(e.to_string()))?;
            return Ok(report(None, pids.len(), estimate.counts, estimate.image_bytes, domain));
        }
        let id = format!("a{}", self.next.fetch_add(1, Ordering::Relaxed));
        let name = format!("medes-attach-{}-{id}", std::process::id());
        let cells =
            Cells::take(&selection, &name).map_err(|error| Refusal::Stays(error.to_string()))?;
        self.note(Some(&cells));
        let group = Arc::new(Group {
            id: id.clone(),
            target,
            program,
            domain: domain.clone(),
            domain_id,
            function,
            cells,
            since_ms: now_ms(),
            memory: Mutex::new(Memory::Going),
        });
        self.groups.lock().insert(id.clone(), Arc::clone(&group));
        self.tell(&id, "attached", &group.target);
        let result = self.take(&group, &operation);
        match &result {
            Ok(report) => self.tell(
                &id,
                "dedup",
                format!("{} bytes to {}", report.private_bytes, report.image_bytes),
            ),
            Err(refusal) => {
                if let Refusal::Lost(_) = refusal {
                    group.cells.kill();
                }
                self.tell(
                    &id,
                    if matches!(refusal, Refusal::Lost(_)) { "killed" } else { "stays" },
                    refusal,
                );
                self.detach(&group);
            }
        }
        result
    }

    /// The group that one of these processes belongs to. One whose memory is on its way back is
    /// waited for.
    fn holds_any(&self, pids: &[i32]) -> Option<Arc<Group>> {
        loop {
            let groups: Vec<Arc<Group>> = self.groups.lock().values().map(Arc::clone).collect();
            let group = groups.into_iter().find(|group| {
                let members = group.cells.pids();
                pids.iter().any(|pid| members.contains(pid))
            })?;
            if !matches!(*group.memory.lock(), Memory::Returning(..)) {
                return Some(group);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn take(&self, group: &Group, operation: &Operation<'_>) -> Result<DedupReport, Refusal> {
        let base_before = self.store.usage().snapshots;
        let mut before = self.left_before(group, operation);
        let mut result = self.attempt(group, operation, before.as_ref());
        if let Err(DedupError::StaysWarm(why)) = &result
            && let Some((watched, _)) = before.take()
        {
            tracing::debug!(id = group.id, %why, "all of it is read again");
            self.let_go(watched);
            result = self.attempt(group, operation, None);
        }
        if let Some((watched, _)) = before {
            // What it was restored from is not needed any more.
            self.let_go(watched);
        }
        let is_full = |why: &Hindrance| matches!(why, Hindrance::Store(StoreError::Full(_)));
        if matches!(&result, Err(DedupError::StaysWarm(why)) if is_full(why))
            // What nobody uses gives way.
            && self.let_go_of(|_| true) > 0
        {
            result = self.attempt(group, operation, None);
        }
        let (done, held) = result.map_err(|error| match error {
            DedupError::Lost(why) => Refusal::Lost(why),
            other => Refusal::Stays(other.to_string()),
        })?;
        let Deduplicated { image, userfaults, counts, .. } = done;
        let Some(held) = held else {
            self.store.remove_image(image);
            return Err(Refusal::Lost("nobody holds its image".into()));
        };
        let (pids, image_bytes) = (group.cells.pids(), image.bytes());
        let mut report =
            report(Some(&group.id), pids.len(), counts, image_bytes, group.domain.clone());
        report.base_bytes = self.store.usage().snapshots.saturating_sub(base_before);
        let private_bytes = report.private_bytes;
        let left = Left { image, userfaults, pids };
        *group.memory.lock() = Memory::Away(Away { left, held, private_bytes, image_bytes });
        Ok(report)
    }

    fn attempt(
        &self,
        group: &Group,
        operation: &Operation<'_>,
        before: Option<&(Watched, Previous)>,
    ) -> Result<(Deduplicated, Option<Held>), DedupError> {
        let (watched, previous) = before.map(|(watched, previous)| (watched, previous)).unzip();
        let (view, cells, orders) = (&self.view, &group.cells, &self.orders);
        let holding = Holding { view, cells, orders, watched, held: Mutex::new(None) };
        let done = on_tracer_thread(|| operation.dedup(cells, &holding, previous))?;
        Ok((done, holding.held.into_inner()))
    }

    /// What is left of the restore before of exactly these processes, if it is of use. What else is
    /// left of any of them is let go of: nobody can watch them beside it.
    fn left_before(&self, group: &Group, operation: &Operation<'_>) -> Option<(Watched, Previous)> {
        let pids = group.cells.pids();
        let is_same = |watched: &Watched| {
            watched.left.pids == pids
                && watched.domain_id == group.domain_id
                // All of a base snapshot is read.
                && !operation.options.new_base
        };
        let same = {
            let mut all = self.watched.lock();
            all.iter().position(is_same).map(|at| all.swap_remove(at))
        };
        self.let_go_of(|watched| watched.left.pids.iter().any(|pid| pids.contains(pid)));
        let watched = same?;
        let Left { image, userfaults, .. } = &watched.left;
        match Previous::of(&self.store, Arc::clone(&self.view), image, userfaults) {
            Ok(Some(previous)) => Some((watched, previous)),
            other => {
                tracing::debug!(id = group.id, error = ?other.err(), "all of it is read again");
                self.let_go(watched);
                None
            }
        }
    }

    /// Lets go of restored groups. Returns of how many.
    fn let_go_of(&self, which: impl Fn(&Watched) -> bool) -> usize {
        let mut watched = self.watched.lock();
        let (gone, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut *watched).into_iter().partition(which);
        *watched = left;
        drop(watched);
        gone.into_iter().map(|watched| self.let_go(watched)).count()
    }

    fn let_go(&self, watched: Watched) {
        let Watched { domain_id, function, .. } = watched;
        self.store.remove_image(watched.let_go());
        self.forget_bases(domain_id, function);
    }

    /// The number of a domain; a new one if it has none.
    fn domain(&self, name: &str) -> DomainId {
        let mut domains = self.domains.lock();
        let next = DomainId(domains.len() as u32 + 1);
        *domains.entry(name.to_owned()).or_insert(next)
    }

    /// Whether there are enough groups of one program, and no base snapshot of it.
    fn wants_base(&self, domain: DomainId, function: FunctionId) -> bool {
        let groups = self.groups.lock();
        let alike = groups.values().filter(|g| g.domain_id == domain && g.function == function);
        alike.count() >= BASE_FROM && self.store.snapshots_of(domain, function).is_empty()
    }

    fn restore(self: &Arc<Self>, which: &Which, wait: bool) -> Result<Vec<RestoreReport>, Refusal> {
        let mut restores = Vec::new();
        let groups = self.find(which)?;
        for group in &groups {
            let begin = Instant::now();
            let memory = &mut *group.memory.lock();
            let away = match std::mem::replace(memory, Memory::Going) {
                Memory::Away(away) => away,
                // It runs already.
                Memory::Returning(private, image) => {
                    *memory = Memory::Returning(private, image);
                    continue;
                }
                Memory::Going if *which == Which::All => continue,
                Memory::Going => return Err(Refusal::Busy(group.id.clone())),
            };
            *memory = Memory::Returning(away.private_bytes, away.image_bytes);
            restores.push((group.id.clone(), begin, self.start_return(group, away)));
        }
        let is_there = |group: &Arc<Group>| self.groups.lock().contains_key(&group.id);
        let returns = |group: &Arc<Group>| matches!(*group.memory.lock(), Memory::Returning(..));
        while wait && groups.iter().any(|group| returns(group) && is_there(group)) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let reports = restores.into_iter().map(|(id, begin, (ran, thread))| {
            let answer = ran.recv().unwrap_or_else(|_| Err("the restore broke off".into()));
            let took = answer.as_ref().map_or_else(|_| begin.elapsed(), |at| *at - begin);
            let run_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            let mut error = answer.err();
            if wait {
                let ended = thread.join().unwrap_or_else(|_| Err("the restore broke off".into()));
                error = error.or(ended.err());
            }
            RestoreReport { id, run_us, error }
        });
        Ok(reports.collect())
    }

    /// Brings a group's memory back on a thread of its own. The channel tells when it ran, or why
    /// it can't.
    fn start_return(
        self: &Arc<Self>,
        group: &Arc<Group>,
        away: Away,
    ) -> (Receiver<Ran>, JoinHandle<Result<(), String>>) {
        let (engine, group) = (Arc::clone(self), Arc::clone(group));
        let (runs, ran) = std::sync::mpsc::channel();
        (ran, std::thread::spawn(move || engine.bring_back(&group, away, &runs)))
    }

    /// Brings a group's memory back; `runs` hears when it runs, or why it can't.
    fn bring_back(&self, group: &Arc<Group>, away: Away, runs: &Sender<Ran>) -> Result<(), String> {
        let result = away.held.bring_back(&group.cells, true, || {
            self.tell(&group.id, "runs", "its memory follows as it is touched");
            let _ = runs.send(Ok(Instant::now()));
        });
        let result = match result {
            Ok((returned, spaces)) => {
                let text =
                    format!("{} page faults, {} pages for them", returned.faults, returned.pages);
                self.tell(&group.id, "restored", text);
                // Before it is detached: whoever wants it next finds it here.
                self.watched.lock().push(Watched::new(group, spaces, away.left));
                Ok(())
            }
            Err(why) => {
                self.tell(&group.id, "killed", &why);
                let _ = runs.send(Err(why.clone()));
                self.store.remove_image(away.left.image);
                Err(why)
            }
        };
        self.detach(group);
        result
    }

    /// Nothing is to be done for a group any more: its processes go back where they came from.
    fn detach(&self, group: &Group) {
        group.cells.give_back();
        self.groups.lock().remove(&group.id);
        self.note(None);
        self.forget_bases(group.domain_id, group.function);
    }

    /// Gives up the base snapshots of a program that nothing attached or watched runs.
    fn forget_bases(&self, domain_id: DomainId, function: FunctionId) {
        let of = |domain, program| domain == domain_id && program == function;
        let groups = self.groups.lock();
        let watched = self.watched.lock();
        if !groups.values().any(|group| of(group.domain_id, group.function))
            && !watched.iter().any(|watched| of(watched.domain_id, watched.function))
        {
            let own = self.store.snapshots_of(domain_id, function);
            // What is held is not freed.
            let own: Vec<_> = own.into_iter().map(|snapshot| snapshot.id()).collect();
            for id in own {
                if let Err(error) = self.registry.remove(id) {
                    tracing::warn!(%error, "forgetting a base snapshot");
                }
                self.store.retire_snapshot(id);
            }
        }
    }

    fn find(&self, which: &Which) -> Result<Vec<Arc<Group>>, Refusal> {
        let groups: Vec<Arc<Group>> = self.groups.lock().values().map(Arc::clone).collect();
        let (name, found) = match which {
            Which::All => return Ok(groups),
            Which::Id(id) => (id.clone(), groups.into_iter().find(|group| group.id == *id)),
            Which::Target(target) => {
                let is_meant = |group: &Arc<Group>| {
                    let member = |pid| group.cells.pids().contains(&pid);
                    group.target == *target || matches!(target, Target::Pid(pid) if member(*pid))
                };
                (target.to_string(), groups.into_iter().find(is_meant))
            }
        };
        found.map(|group| vec![group]).ok_or(Refusal::NotAttached(name))
    }

    /// Gives up what was kept for groups whose processes were killed, or that were restored long
    /// ago, and brings back those that somebody else has thawed: their threads wait for memory.
    fn look_after(self: &Arc<Self>) {
        // Not while an operation may be at the same processes: it lets go of them itself.
        if let Some(_taking) = self.taking.try_lock() {
            self.let_go_of(Watched::is_over);
        }
        self.store.free_retired();
        let groups: Vec<Arc<Group>> = self.groups.lock().values().map(Arc::clone).collect();
        for group in groups {
            let mut memory = group.memory.lock();
            let ended = group.cells.pids().is_empty();
            if !ended && !group.cells.is_thawed() {
                continue;
            }
            let away = match std::mem::replace(&mut *memory, Memory::Going) {
                Memory::Away(away) => away,
                other => {
                    *memory = other;
                    continue;
                }
            };
            if !ended {
                *memory = Memory::Returning(away.private_bytes, away.image_bytes);
                self.tell(&group.id, "thawed", "by somebody else: its memory comes back");
                self.start_return(&group, away);
                continue;
            }
            drop(memory);
            drop(away.held);
            self.store.remove_image(away.left.image);
            self.tell(&group.id, "ended", "its processes were killed");
            self.detach(&group);
        }
    }

    fn restore_all(self: &Arc<Self>) {
        match self.restore(&Which::All, true) {
            Ok(_) => {}
            Err(refusal) => tracing::error!(%refusal, "bringing everything back"),
        }
        // What was on its way back already.
        while !self.groups.lock().is_empty() {
            std::thread::sleep(Duration::from_millis(10));
            self.look_after();
        }
        let _taking = self.taking.lock();
        self.let_go_of(|_| true);
    }
}

fn value(answer: impl Serialize) -> serde_json::Value {
    serde_json::to_value(answer).unwrap_or_default()
}

fn report(
    id: Option<&str>,
    processes: usize,
    counts: Counts,
    image_bytes: u64,
    domain: String,
) -> DedupReport {
    DedupReport {
        id: id.map(str::to_owned),
        processes,
        private_bytes: counts.pages * PAGE_SIZE as u64,
        image_bytes,
        base_bytes: 0,
        zero_pages: counts.zero,
        equal_pages: counts.equal,
        patched_pages: counts.patched,
        unique_pages: counts.unique,
        reused_pages: counts.reused,
        domain,
        encode_us: counts.encode_us,
        commit_us: counts.commit_us,
    }
}

fn memory_total() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = text.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    Ok(kib.ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))? * 1024)
}
