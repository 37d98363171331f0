//! One sandbox as the keeper holds it.

mod handover;

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use medes_agent::restore::{HeldImage, OpenImage, RestoreBuffers};
use medes_agent::view::SpaceView;
use medes_agent::working_set::{Prefetch, Trial, WorkingSet};
use medes_core::SandboxId;
use medes_memory::guard::{Order, Orders};
use medes_runtime::lambda::deadline_ms;
use medes_runtime::{LambdaApi, Request, RuntimeEvent};
use medes_sandbox::{Exit, Running};
use medes_store::Extent;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::caller::Entered;
use crate::logs::{LogWriter, MAX_LINE};
use crate::protocol::{Answer, Ending, Restored, Returned, Started};
use crate::returning::{Returning, Service};
use crate::spawner::Spawned;

/// How long dead processes may take to go away.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long a runtime may take from its answer until it asks for the next request. It takes a
/// millisecond, unless the machine is busy.
const IDLE_LIMIT: Duration = Duration::from_millis(500);

/// How long a sandbox has had no request when the memory that nobody has touched is filled in.
const QUIET: Duration = Duration::from_millis(100);

/// How many requests a restored sandbox has had before. One that comes for a single request and goes
/// again needs its working set and no more, and what was filled in would have to be dropped again.
const OFTEN: u64 = 3;

/// How long after a restore it is filled in at the next request, however few there were and although
/// they go on: it keeps them waiting for a page now and then otherwise, and what was kept for it is
/// not freed.
const BUSY: Duration = Duration::from_secs(5);

/// A sandbox: its process, its Runtime API, and who waits for it.
pub(crate) struct Held {
    id: SandboxId,
    common: Arc<Common>,
    api: Arc<LambdaApi>,
    running: Running,
    /// Which working set is this sandbox's.
    working_set: u64,
    tell: Arc<dyn Fn(News) + Send + Sync>,
    /// Requests so far.
    requests: AtomicU64,
    /// Told whenever the runtime asks for a request, and at the end.
    asked: Notify,
    /// Whether this process has ordered its end.
    ended_here: Arc<AtomicBool>,
    label: Vec<u8>,
    /// Kills every process of it should this process die: the kernel kills the first one, and the
    /// others only after that one is gone.
    _order: Order,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Whoever waits is told.
    starting: Option<oneshot::Sender<Started>>,
    pending: Option<oneshot::Sender<Answer>>,
    /// When what is under way must have come to its end, if nobody waits for it any more.
    deadline: Option<tokio::time::Instant>,
    orphan: Option<Orphan>,
    memory: Memory,
    /// The trial that its dedup and the restore after it belong to.
    trial: Option<Trial>,
    /// An image that it is to be deduplicated to, found whole.
    examined: Option<OpenImage>,
    ended: Option<Ending>,
}

/// What a sandbox does though the daemon that wanted it is gone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Orphan {
    Start,
    Request,
}

/// Where a sandbox's memory is.
#[derive(Default)]
enum Memory {
    /// Where it belongs.
    #[default]
    Present,
    /// Away; the image brings it back. With it what the sandbox had before, from an earlier image,
    /// until it is certain that the memory has gone again.
    Held(HeldImage, Option<Arc<Returning>>),
    /// On its way back while the sandbox runs, or back and watched.
    Returning(Arc<Returning>),
    /// Given away by [`Held::suspend`].
    Suspended(Arc<Returning>),
}

/// What is told of a sandbox unasked.
pub(crate) enum News {
    /// All its memory is back after the restore with this number, and whether it is watched
    /// further.
    Filled(u64, bool),
    /// What it did for a daemon that is gone has come to its end.
    Idle,
    /// It has ended and nothing is left of it; how, if nobody has heard it yet.
    Ended(Option<Ending>),
}

/// How a sandbox is held.
pub(crate) struct Settings {
    pub(crate) id: SandboxId,
    pub(crate) log: PathBuf,
    pub(crate) log_bytes: u64,
    pub(crate) working_set: u64,
    pub(crate) limit: Duration,
    pub(crate) label: Vec<u8>,
}

/// What all sandboxes of a keeper share.
pub(crate) struct Common {
    /// Who answers faults.
    pub(crate) service: Service,
    /// Working sets, by the key that the daemon gives.
    pub(crate) working_sets: Mutex<HashMap<u64, WorkingSet>>,
    /// What is done should this process die.
    pub(crate) orders: Orders,
}

impl Held {
    /// Takes charge of a sandbox that was just started. `starting` hears what becomes of the
    /// start; `tell` of everything that nobody waits for, the end of the sandbox last and always.
    pub(crate) fn take(
        common: Arc<Common>,
        spawned: Spawned,
        settings: Settings,
        starting: oneshot::Sender<Started>,
        tell: impl Fn(News) + Send + Sync + 'static,
    ) -> std::io::Result<Arc<Self>> {
        let Spawned { running, listener, output } = spawned;
        let Settings { id, log, log_bytes, working_set, limit, label } = settings;
        let kill = running.cgroup().kill_file().map_err(std::io::Error::other)?;
        let order = common.orders.add(kill);
        let order = order.ok_or_else(|| std::io::Error::other("too many sandboxes"))?;
        let tell: Arc<dyn Fn(News) + Send + Sync> = Arc::new(tell);
        let (events, received) = mpsc::unbounded_channel();
        let api = LambdaApi::new(events);
        let serving =
            tokio::spawn(Arc::clone(&api).serve(tokio::net::TcpListener::from_std(listener)?));
        let pidfd: OwnedFd = running.pidfd().as_fd().try_clone_to_owned()?;
        // SAFETY: an OwnedFd is open and stays the same descriptor until it is dropped, and the
        // AsyncFd owns it.
        let exit = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }
            .map_err(std::io::Error::from)?;
        let pump = tokio::spawn(pump(id, output, LogWriter::new(log, log_bytes))?);
        let deadline = tokio::time::Instant::now().checked_add(limit);
        let state = State { starting: Some(starting), deadline, ..State::default() };
        let state = Mutex::new(state);
        let news = Arc::clone(&tell);
        let asked = Notify::new();
        let held = Arc::new(Self {
            id,
            common,
            api,
            running,
            working_set,
            tell,
            requests: 0.into(),
            asked,
            ended_here: Arc::default(),
            label,
            _order: order,
            state,
        });
        let watched = Arc::clone(&held);
        tokio::spawn(async move {
            let unheard = watched.supervise(received, exit).await;
            serving.abort();
            // The pipe closes with the last process; what it still holds belongs in the log.
            let _ = tokio::time::timeout(Duration::from_secs(2), pump).await;
            news(News::Ended(unheard));
        });
        Ok(held)
    }

    /// Passes the runtime's events on until the process has ended and everything is cleaned up.
    /// Gives the ending back if nobody waited for it.
    async fn supervise(
        self: &Arc<Self>,
        mut events: mpsc::UnboundedReceiver<RuntimeEvent>,
        exit: AsyncFd<OwnedFd>,
    ) -> Option<Ending> {
        loop {
            tokio::select! {
                // What was said before the end counts.
                biased;
                Some(event) = events.recv() => self.hear(event),
                _ = exit.readable() => break,
            }
        }
        while let Ok(event) = events.try_recv() {
            self.hear(event);
        }
        let ending = self.clean_up().await;
        if self.ended_here.load(Ordering::Acquire) {
            tracing::debug!(sandbox = %self.id, how = ending.how, "ended");
        } else {
            tracing::info!(sandbox = %self.id, how = ending.how, "ended by itself, or by somebody else");
        }
        if self.working_set == self.id.0 {
            // Its alone: its addresses were like no other's.
            lock(&self.common.working_sets).remove(&self.working_set);
        }
        let (starting, pending) = {
            let mut state = self.lock();
            state.ended = Some(ending.clone());
            if let Memory::Returning(memory) | Memory::Suspended(memory) =
                std::mem::take(&mut state.memory)
            {
                self.common.service.forget(&memory);
            }
            (state.starting.take(), state.pending.take())
        };
        self.asked.notify_waiters();
        match (starting, pending) {
            (Some(starting), _) => {
                let _ = starting.send(Started::Ended(ending));
                None
            }
            (None, Some(pending)) => {
                let _ = pending.send(Answer::Ended(ending));
                None
            }
            (None, None) => Some(ending),
        }
    }

    fn hear(self: &Arc<Self>, event: RuntimeEvent) {
        let mut state = self.lock();
        let answer = match event {
            RuntimeEvent::Waiting => {
                self.asked.notify_waiters();
                if let Some(starting) = state.starting.take() {
                    let _ = starting.send(Started::Ready);
                } else if state.orphan == Some(Orphan::Start) {
                    state.orphan = None;
                    (self.tell)(News::Idle);
                }
                return;
            }
            RuntimeEvent::InitError { payload } => {
                if let Some(starting) = state.starting.take() {
                    let _ = starting.send(Started::InitError(payload));
                }
                drop(state);
                self.kill();
                return;
            }
            RuntimeEvent::Response { payload, .. } => Answer::Response(payload),
            RuntimeEvent::Error { payload, .. } => Answer::Error(payload),
            RuntimeEvent::TooLarge { bytes, .. } => Answer::TooLarge(bytes),
        };
        if let Some(pending) = state.pending.take() {
            let _ = pending.send(answer);
        } else if state.orphan == Some(Orphan::Request) {
            state.orphan = None;
            (self.tell)(News::Idle);
        }
        if let Memory::Returning(memory) = &state.memory {
            let memory = Arc::clone(memory);
            drop(state);
            self.after_request(&memory);
        }
    }

    /// A request is over while memory is on its way back: what it touched belongs to the working
    /// set, and now the rest may come, if it shall.
    fn after_request(self: &Arc<Self>, memory: &Arc<Returning>) {
        let mut sets = lock(&self.common.working_sets);
        memory.teach(sets.entry(self.working_set).or_default());
        drop(sets);
        let returned = memory.counts();
        tracing::debug!(sandbox = %self.id, ?returned, "memory back so far, after a request");
        self.common.service.tidy(memory);
        let (held, of) = (Arc::clone(self), Arc::clone(memory));
        let requests = self.requests.load(Ordering::Acquire);
        tokio::spawn(async move {
            tokio::time::sleep(QUIET).await;
            // Not while requests come one after the other: filling in costs them more than the
            // few pages that they have to wait for.
            let quiet = held.requests.load(Ordering::Acquire) == requests;
            let due = quiet && of.requests() >= OFTEN || of.age() > BUSY;
            if due && of.take_fill_order() {
                held.fill(&of);
            }
        });
    }

    /// Fills in the rest in the background.
    fn fill(self: &Arc<Self>, memory: &Arc<Returning>) {
        let (held, of) = (Arc::clone(self), Arc::clone(memory));
        self.common.service.fill_later(memory, move || {
            let watched = of.tracks_writes();
            if held.settled(&of, watched) {
                (held.tell)(News::Filled(of.number(), watched));
            }
        });
    }

    /// All of `memory` is back, and watched further or not. Returns whether that is news.
    fn settled(&self, memory: &Arc<Returning>, watched: bool) -> bool {
        let mut state = self.lock();
        let is_news = matches!(&state.memory, Memory::Returning(now) if Arc::ptr_eq(now, memory));
        if is_news && !watched {
            state.memory = Memory::Present;
        }
        is_news
    }

    /// Kills what is left of the process tree and removes the cgroup.
    async fn clean_up(&self) -> Ending {
        let cgroup = self.running.cgroup().clone();
        let out_of_memory = cgroup.memory().is_ok_and(|m| m.oom_kills > 0);
        let exit = self.running.wait_status().ok().flatten();
        let id = self.id;
        let removed = tokio::task::spawn_blocking(move || {
            cgroup.kill(KILL_LIMIT).and_then(|()| cgroup.remove(KILL_LIMIT))
        });
        match removed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(sandbox = %id, %error, "removing a sandbox"),
            Err(error) => tracing::error!(sandbox = %id, %error, "removing a sandbox"),
        }
        let (how, killed) = match exit {
            Some(Exit::Code(code)) => (format!("exit status {code}"), false),
            Some(Exit::Signal(signal)) => (format!("signal: {}", name(signal)), signal == 9),
            None => ("unknown".to_owned(), false),
        };
        Ending { how, out_of_memory: out_of_memory && killed }
    }

    /// Hands a request to the runtime; the answer goes to `answer`.
    pub(crate) fn invoke(
        &self,
        _: &Entered<'_>,
        request: Request,
        answer: oneshot::Sender<Answer>,
    ) -> Result<(), String> {
        let mut state = self.lock();
        if let Some(ending) = &state.ended {
            let _ = answer.send(Answer::Ended(ending.clone()));
            return Ok(());
        }
        match state.memory {
            Memory::Present | Memory::Returning(_) => {}
            Memory::Held(..) => {
                return Err("the sandbox is in the dedup state: restore it first".into());
            }
            Memory::Suspended(_) => return Err("the sandbox is being deduplicated".into()),
        }
        self.hand(&mut state, request, answer)
    }

    /// Hands a request to the runtime, which may be frozen.
    fn hand(
        &self,
        state: &mut State,
        request: Request,
        answer: oneshot::Sender<Answer>,
    ) -> Result<(), String> {
        let left = request.deadline_ms.saturating_sub(deadline_ms(0));
        state.examined = None;
        self.requests.fetch_add(1, Ordering::AcqRel);
        self.api.send(request).map_err(|busy| busy.to_string())?;
        state.pending = Some(answer);
        state.deadline = tokio::time::Instant::now().checked_add(Duration::from_millis(left));
        Ok(())
    }

    /// Kills the whole sandbox; [`Held::supervise`] sees it end and cleans up.
    pub(crate) fn kill(&self) {
        self.ended_here.store(true, Ordering::Release);
        if let Err(error) = self.running.cgroup().order_kill() {
            tracing::warn!(sandbox = %self.id, %error, "killing a sandbox");
        }
    }

    /// Returns once the runtime waits for a request and has none.
    pub(crate) async fn idle(&self) -> Result<(), String> {
        let idle = async {
            loop {
                let asked = self.asked.notified();
                tokio::pin!(asked);
                // Registered before the look, so that no call in between is missed.
                asked.as_mut().enable();
                if self.lock().ended.is_some() {
                    return Err("the sandbox has ended".into());
                }
                if self.api.is_idle() {
                    return Ok(());
                }
                asked.await;
            }
        };
        let limited = tokio::time::timeout(IDLE_LIMIT, idle).await;
        limited.unwrap_or_else(|_| Err("the sandbox is not waiting for a request".into()))
    }

    /// What had better stay of its memory when it is deduplicated ([`WorkingSet::residents`]).
    pub(crate) fn residents(
        &self,
        _: &Entered<'_>,
        target: Duration,
        most: u64,
    ) -> Result<Vec<Vec<Range<u64>>>, String> {
        let mut state = self.lock();
        let mut sets = lock(&self.common.working_sets);
        let residents = sets.entry(self.working_set).or_default().residents(target, most);
        state.trial = Some(residents.trial);
        Ok(residents.ranges)
    }

    /// Keeps an image at hand that is to be held soon.
    pub(crate) fn examined(&self, _: &Entered<'_>, image: OpenImage) -> Result<(), String> {
        let mut state = self.lock();
        let mut sets = lock(&self.common.working_sets);
        image.teach(sets.entry(self.working_set).or_default());
        drop(sets);
        state.examined = Some(image);
        Ok(())
    }

    /// The image at hand, if it is this one. There is none at hand any more then.
    pub(crate) fn take_examined(&self, image: Extent) -> Option<OpenImage> {
        self.lock().examined.take().filter(|examined| examined.extent() == image)
    }

    /// Gives back what an image takes that is held and open.
    pub(crate) fn close_image(&self) {
        if let Memory::Held(image, _) = &mut self.lock().memory {
            image.close();
        }
    }

    /// Takes what brings the sandbox's memory back. `written` is, for each of its processes, what
    /// requests have written to since the restore before.
    pub(crate) fn hold(
        &self,
        _: &Entered<'_>,
        image: HeldImage,
        written: &[Vec<Range<u64>>],
    ) -> Result<(), String> {
        let mut state = self.lock();
        if state.ended.is_some() {
            return Err("the sandbox has ended".into());
        }
        if !self.api.is_idle() {
            return Err("the sandbox is not waiting for a request".into());
        }
        let before = match std::mem::take(&mut state.memory) {
            Memory::Present => None,
            Memory::Suspended(before) => Some(before),
            other => {
                state.memory = other;
                return Err("the sandbox's memory is not all its own".into());
            }
        };
        if let Some(before) = &before {
            let mut sets = lock(&self.common.working_sets);
            before.teach_written(sets.entry(self.working_set).or_default(), written);
        }
        state.memory = Memory::Held(image, before);
        Ok(())
    }

    /// Lets go of it again.
    pub(crate) fn release(&self, _: &Entered<'_>) -> Result<(), String> {
        let mut state = self.lock();
        state.memory = match std::mem::take(&mut state.memory) {
            Memory::Held(_, None) => Memory::Present,
            Memory::Held(_, Some(before)) => Memory::Suspended(before),
            other => other,
        };
        Ok(())
    }

    /// Notes what of a held image's memory has not been dropped.
    pub(crate) fn leave(
        &self,
        _: &Entered<'_>,
        ranges: Vec<Vec<Range<u64>>>,
    ) -> Result<(), String> {
        let mut state = self.lock();
        match &mut state.memory {
            Memory::Held(image, _) => {
                image.leave(ranges);
                Ok(())
            }
            _ => Err("the sandbox's memory is not held".into()),
        }
    }

    /// Stops serving the memory of the sandbox, which must be frozen, and says what of its image is
    /// still its own, process by process. Blocks.
    pub(crate) fn suspend(
        &self,
        _: &Entered<'_>,
        buffers: &mut RestoreBuffers,
    ) -> Result<Vec<SpaceView>, String> {
        let mut state = self.lock();
        let memory = match &state.memory {
            Memory::Returning(memory) => Arc::clone(memory),
            _ => return Err("the sandbox's memory is not watched".into()),
        };
        let views = self.common.service.suspend(&memory, buffers)?;
        state.memory = Memory::Suspended(memory);
        Ok(views)
    }

    /// Serves the memory of a suspended sandbox on. The sandbox is killed if that can't be.
    pub(crate) fn resume(self: &Arc<Self>) -> Result<(), String> {
        let mut state = self.lock();
        let memory = match &state.memory {
            Memory::Suspended(memory) => Arc::clone(memory),
            _ => return Err("the sandbox is not suspended".into()),
        };
        if let Err(error) = self.common.service.resume(&memory) {
            drop(state);
            self.kill();
            return Err(format!("serving faults: {error}"));
        }
        state.memory = Memory::Returning(Arc::clone(&memory));
        drop(state);
        if memory.is_half_filled() {
            self.fill(&memory);
        }
        Ok(())
    }

    /// Puts back what must be there, and with `prefetch` the working set, and lets the sandbox run; the
    /// rest of its memory follows as it is touched, and with `fill` in the background if it is used
    /// often. The runtime finds `request` when it runs. When it fails the sandbox is killed, and has
    /// not run: it may not with missing pages that nobody brings. Blocks.
    pub(crate) fn restore(
        &self,
        _: &Entered<'_>,
        fill: bool,
        prefetch: bool,
        request: Option<(Request, oneshot::Sender<Answer>)>,
        buffers: &mut RestoreBuffers,
    ) -> Result<Restored, String> {
        self.bring_back(None, fill, prefetch, request, buffers)
    }

    /// As [`Held::restore`], while the sandbox's memory is being dropped by somebody who lets it run
    /// then: only what it touches comes until [`Held::prefetch`]. `left` is what has not been
    /// dropped.
    pub(crate) fn take_back(
        &self,
        _: &Entered<'_>,
        left: Vec<Vec<Range<u64>>>,
        buffers: &mut RestoreBuffers,
    ) -> Result<Restored, String> {
        // It is not known whether memory is short: what is used often comes back.
        self.bring_back(Some(left), true, false, None, buffers)
    }

    fn bring_back(
        &self,
        left: Option<Vec<Vec<Range<u64>>>>,
        fill: bool,
        prefetch: bool,
        request: Option<(Request, oneshot::Sender<Answer>)>,
        buffers: &mut RestoreBuffers,
    ) -> Result<Restored, String> {
        let mut state = self.lock();
        let mut image = match std::mem::take(&mut state.memory) {
            // What there was before is gone for good.
            Memory::Held(image, _) => image,
            other => {
                state.memory = other;
                return Err("the sandbox is not in the dedup state".into());
            }
        };
        if let Some((request, answer)) = request
            && let Err(why) = self.hand(&mut state, request, answer)
        {
            state.memory = Memory::Held(image, None);
            return Err(why);
        }
        let start = Instant::now();
        let runs = left.is_some();
        left.into_iter().for_each(|left| image.leave(left));
        let trial = state.trial.take();
        let prefetch = prefetch.then(|| self.working_set(trial, image.left()));
        let restored = self.revive(image, prefetch, fill, runs, buffers, start);
        match restored {
            Ok((memory, restored)) => {
                state.memory = Memory::Returning(memory);
                Ok(restored)
            }
            Err(why) => {
                drop(state);
                self.kill();
                Err(why)
            }
        }
    }

    /// What to put back at this restore beside `residents`.
    fn working_set(&self, trial: Option<Trial>, residents: &[Vec<Range<u64>>]) -> Prefetch {
        let mut sets = lock(&self.common.working_sets);
        let set = sets.entry(self.working_set).or_default();
        let trial = trial.unwrap_or_else(|| set.trial());
        set.prefetch(Some(trial), residents)
    }

    /// Lets the sandbox run with its memory on its way back, unless somebody else does (`runs`). Without
    /// `prefetch` only what it touches comes until [`Held::prefetch`].
    fn revive(
        &self,
        image: HeldImage,
        prefetch: Option<Prefetch>,
        fill: bool,
        runs: bool,
        buffers: &mut RestoreBuffers,
        start: Instant,
    ) -> Result<(Arc<Returning>, Restored), String> {
        let nothing = Prefetch::default();
        let revived = image.revive(prefetch.as_ref().unwrap_or(&nothing), buffers);
        let revived = revived.map_err(|e| e.to_string())?;
        if let Some(prefetch) = &prefetch {
            let mut sets = lock(&self.common.working_sets);
            sets.entry(self.working_set).or_default().took(prefetch, start.elapsed());
        }
        let pages = revived.pages;
        let (id, cgroup) = (self.id, self.running.cgroup().clone());
        let ended_here = Arc::clone(&self.ended_here);
        let kill = move |why: &str| {
            ended_here.store(true, Ordering::Release);
            tracing::error!(sandbox = %id, why, "memory can't be brought back; killing the sandbox");
            let _ = cgroup.order_kill();
        };
        let memory = self.common.service.serve(revived, prefetch, fill, Box::new(kill));
        let memory = memory.map_err(|e| format!("serving faults: {e}"))?;
        let pages_us = micros(start);
        if !runs && let Err(error) = self.running.cgroup().thaw() {
            self.common.service.forget(&memory);
            return Err(error.to_string());
        }
        let number = memory.number();
        Ok((memory, Restored { number, pages, pages_us, thaw_us: micros(start) - pages_us }))
    }

    /// Brings all memory back now, if some is still away while the sandbox runs, and watches it no
    /// longer. Blocks.
    pub(crate) fn complete(&self, buffers: &mut RestoreBuffers) -> Result<(), String> {
        let memory = match &self.lock().memory {
            Memory::Present => return Ok(()),
            Memory::Returning(memory) => Arc::clone(memory),
            _ => return Err("the sandbox is in the dedup state".into()),
        };
        if !self.common.service.complete(&memory, buffers) {
            return Err("the sandbox has ended".into());
        }
        if self.settled(&memory, false) {
            (self.tell)(News::Filled(memory.number(), false));
        }
        Ok(())
    }

    /// Whether the sandbox was taken back and its working set is still to follow.
    pub(crate) fn lacks_working_set(&self) -> bool {
        match &self.lock().memory {
            Memory::Returning(memory) => !memory.has_prefetched(),
            _ => false,
        }
    }

    /// Puts the working set back, if the sandbox runs already. Blocks.
    pub(crate) fn prefetch(&self, buffers: &mut RestoreBuffers) {
        let memory = match &self.lock().memory {
            Memory::Returning(memory) => Arc::clone(memory),
            _ => return,
        };
        // Much of it may be there still, so that nothing can be learned.
        let prefetch = {
            let mut sets = lock(&self.common.working_sets);
            sets.entry(self.working_set).or_default().prefetch(None, &[])
        };
        self.common.service.prefetch(&memory, prefetch, buffers);
    }

    /// How memory has come back since the newest restore.
    pub(crate) fn returned(&self) -> Returned {
        match &self.lock().memory {
            Memory::Returning(memory) => memory.counts(),
            _ => Returned::default(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A signal's name in the words of a shell.
fn name(signal: i32) -> String {
    match signal {
        9 => "killed".into(),
        11 => "segmentation fault".into(),
        6 => "aborted".into(),
        15 => "terminated".into(),
        31 => "bad system call".into(),
        other => other.to_string(),
    }
}

/// Copies a sandbox's output to its function's log, line by line, until the pipe closes.
fn pump(
    id: SandboxId,
    output: OwnedFd,
    mut log: LogWriter,
) -> std::io::Result<impl Future<Output = ()> + Send> {
    let output = tokio::net::unix::pipe::Receiver::from_owned_fd(output)?;
    let name = id.to_string();
    Ok(async move {
        let mut output = BufReader::with_capacity(4096, output);
        let mut line = Vec::new();
        loop {
            line.clear();
            // A line without an end is cut, so that nobody makes the keeper's memory grow.
            let mut piece = (&mut output).take(MAX_LINE as u64);
            match piece.read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => log.line(&name, line.strip_suffix(b"\n").unwrap_or(&line)),
            }
        }
    })
}
