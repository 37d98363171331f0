//! The keeper's own process: one connection to the daemon at a time, commands in, reports out.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use medes_agent::restore::{OpenImage, RestoreBuffers};
use medes_core::SandboxId;
use medes_memory::guard::{Guard, Orders};
use medes_sandbox::CgroupRoot;
use medes_store::{Extent, View};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::caller::{Caller, Entered};
use crate::protocol::{
    self, Answer, Call, Command, Hold, Listed, Message, Reply, Restored, Start, Started, VERSION,
};
use crate::returning::Service;
use crate::sandbox::{Common, Held, News, Settings};
use crate::spawner::Spawner;

/// How long an image stays open after it was taken hold of. A request that comes while the memory is
/// being dropped saves the time to open it.
const OPEN: Duration = Duration::from_secs(1);

/// How a keeper is set up.
#[derive(Clone, Debug)]
pub struct KeeperConfig {
    /// Where its socket is made; only root can connect.
    pub socket: PathBuf,
    /// The name of the instance's cgroups.
    pub cgroup: String,
}

/// Runs a keeper until it is told to stop, then kills every sandbox.
///
/// # Errors
/// When the socket or the cgroups can't be made.
pub fn run(config: &KeeperConfig) -> io::Result<()> {
    // When the host is out of memory, everything else is a better choice than the process that
    // all sandboxes depend on. Best effort: it needs CAP_SYS_RESOURCE.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    let orders = Orders::new()?;
    guard(orders.clone())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // What a request has to pass through is short, and does not wait behind other requests.
        .on_thread_start(medes_memory::priority::raise_this_thread)
        .worker_threads(2)
        .thread_name("keeper")
        .enable_all()
        .build()?;
    runtime.block_on(serve(config, orders))
}

async fn serve(config: &KeeperConfig, orders: Orders) -> io::Result<()> {
    let root = CgroupRoot::new(&config.cgroup).map_err(io::Error::other)?;
    let shared = Arc::new(Shared {
        spawner: Spawner::new(root)?,
        common: Arc::new(Common {
            service: Service::start()?,
            working_sets: Mutex::default(),
            orders,
        }),
        sandboxes: Mutex::default(),
        handed: Mutex::default(),
        cgroup: config.cgroup.clone(),
        daemon: Mutex::default(),
        handover: tokio::sync::Mutex::default(),
        listed: Mutex::default(),
        store: Mutex::default(),
        buffers: Mutex::default(),
        stop: Notify::new(),
    });
    let listener = bind(&config.socket)?;
    let mut terminate = signal(SignalKind::terminate())?;
    // The terminal's signals are for the daemon.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    tokio::spawn(Arc::clone(&shared).converse(stream));
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting the daemon's connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
            _ = terminate.recv() => break,
            () = shared.stop.notified() => break,
        }
    }
    drop(listener);
    let _ = std::fs::remove_file(&config.socket);
    shared.kill_all().await;
    Ok(())
}

/// Keeps the userfaultfds open until every process of the sandboxes has been killed, should this
/// process be killed: a page that is missing then is never read as zeros.
fn guard(orders: Orders) -> io::Result<()> {
    let mut guard = Guard::start(&orders)?;
    std::thread::Builder::new().name("guard".into()).spawn(move || {
        loop {
            if let Err(error) = guard.wait() {
                tracing::error!(%error, "waiting for the guard");
                return;
            }
            tracing::warn!("the guard process was killed; starting another");
            match Guard::start(&orders) {
                Ok(another) => guard = another,
                Err(error) => {
                    tracing::error!(%error, "starting a guard process");
                    return;
                }
            }
        }
    })?;
    Ok(())
}

fn bind(socket: &PathBuf) -> io::Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(socket, mode)?;
    Ok(listener)
}

struct Shared {
    spawner: Spawner,
    common: Arc<Common>,
    sandboxes: Mutex<HashMap<SandboxId, Arc<Held>>>,
    cgroup: String,
    /// The daemon: who said hello last.
    daemon: Mutex<Option<Arc<Caller>>>,
    /// Held while one daemon's things are put right for the next.
    handover: tokio::sync::Mutex<()>,
    /// The page store's memory file.
    store: Mutex<Option<Arc<View>>>,
    /// Answers to requests that came with a restore, for whoever asks for them.
    handed: Mutex<HashMap<SandboxId, oneshot::Receiver<Answer>>>,
    /// Descriptors that a new daemon is about to take.
    listed: Mutex<Vec<OwnedFd>>,
    /// As many as there ever were restores at the same time.
    buffers: Mutex<Vec<RestoreBuffers>>,
    stop: Notify,
}

impl Shared {
    async fn converse(self: Arc<Self>, stream: UnixStream) {
        let (mut from, mut to) = stream.into_split();
        let (messages, mut queue) = mpsc::unbounded_channel::<Message>();
        tokio::spawn(async move {
            while let Some(message) = queue.recv().await {
                if let Err(error) = protocol::write(&mut to, &message).await {
                    tracing::warn!(%error, "writing to the daemon");
                    break;
                }
            }
        });
        let caller = Arc::new(Caller::new(messages));
        loop {
            match protocol::read::<Call>(&mut from).await {
                Ok(Some(Call { number, command })) => {
                    let (shared, caller) = (Arc::clone(&self), Arc::clone(&caller));
                    tokio::spawn(async move {
                        let reply = shared.obey(&caller, command).await;
                        caller.tell(Message::Reply { number, reply });
                    });
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "reading from the daemon");
                    break;
                }
            }
        }
        let _handover = self.handover.lock().await;
        self.end_daemon(|daemon| Arc::ptr_eq(daemon, &caller)).await;
    }

    /// If there is a daemon and it is the one that is `meant`, does without it from now on.
    async fn end_daemon(self: &Arc<Self>, meant: impl FnOnce(&Arc<Caller>) -> bool) {
        let Some(daemon) = lock(&self.daemon).take_if(|daemon| meant(daemon)) else { return };
        let shared = Arc::clone(self);
        let ended = tokio::task::spawn_blocking(move || {
            daemon.end();
            lock(&shared.listed).clear();
            lock(&shared.handed).clear();
            let sandboxes: Vec<_> = lock(&shared.sandboxes).values().map(Arc::clone).collect();
            tracing::info!(sandboxes = sandboxes.len(), "the daemon is gone");
            sandboxes.iter().for_each(Held::orphan);
        });
        if let Err(error) = ended.await {
            tracing::error!(%error, "putting right what the daemon left");
        }
    }

    async fn obey(self: Arc<Self>, caller: &Arc<Caller>, command: Command) -> Reply {
        match command {
            Command::Hello { version, pid, store } => {
                let hello = self.hello(caller, version, pid, store).await;
                hello.unwrap_or_else(Reply::Refused)
            }
            Command::List => {
                let caller = Arc::clone(caller);
                let list = move || caller.enter().map(|_by| self.list());
                let listed = tokio::task::spawn_blocking(list).await;
                let listed = listed.map_err(|e| e.to_string()).flatten();
                listed.map_or_else(Reply::Refused, Reply::Listed)
            }
            Command::Taken => done(caller.enter().map(|_by| lock(&self.listed).clear())),
            Command::Start(start) => Reply::Started(self.start(caller, *start).await),
            Command::Invoke { sandbox, request } => {
                let (answer, answered) = oneshot::channel();
                let sent = caller.enter().and_then(|by| {
                    let held = self.find(sandbox)?;
                    held.invoke(&by, request, answer)?;
                    Ok(held)
                });
                if sent.as_ref().is_ok_and(|held| held.lacks_working_set()) {
                    let behind = |held: &Arc<Held>, buffers: &mut RestoreBuffers| {
                        // The request comes first.
                        medes_memory::priority::lower_this_thread();
                        held.prefetch(buffers);
                        medes_memory::priority::raise_this_thread();
                        Ok(())
                    };
                    tokio::spawn(Arc::clone(&self).with_buffers(sandbox, behind));
                }
                match sent {
                    Ok(held) => answered_by(Some(&held), answered).await,
                    Err(why) => Reply::Refused(why),
                }
            }
            Command::Collect { sandbox } => {
                let handed = caller.enter().map(|_by| lock(&self.handed).remove(&sandbox));
                match handed {
                    // If it has ended, its answer says so.
                    Ok(Some(answered)) => {
                        answered_by(self.find(sandbox).ok().as_ref(), answered).await
                    }
                    Ok(None) => refused("no request came with the sandbox's restore"),
                    Err(why) => Reply::Refused(why),
                }
            }
            Command::Kill { sandbox } => done(caller.enter().and_then(|_by| {
                lock(&self.handed).remove(&sandbox);
                self.find(sandbox).map(|held| held.kill())
            })),
            Command::Idle { sandbox } => match self.find(sandbox) {
                Ok(held) => done(held.idle().await),
                Err(why) => Reply::Refused(why),
            },
            Command::Examine { sandbox, image } => {
                done(caller.enter().and_then(|by| self.examine(&by, sandbox, image)))
            }
            Command::Residents { sandbox, target_us, most } => {
                let target = Duration::from_micros(target_us);
                let residents =
                    caller.enter().and_then(|by| self.find(sandbox)?.residents(&by, target, most));
                residents.map_or_else(Reply::Refused, Reply::Residents)
            }
            Command::Hold(hold) => done(caller.enter().and_then(|by| self.hold(&by, hold))),
            Command::Release { sandbox } => {
                done(caller.enter().and_then(|by| self.find(sandbox)?.release(&by)))
            }
            Command::Left { sandbox, ranges } => {
                done(caller.enter().and_then(|by| self.find(sandbox)?.leave(&by, ranges)))
            }
            Command::TakeBack { sandbox, left } => {
                let taken = caller.enter().and_then(|by| self.take_back(&by, sandbox, left));
                taken.map_or_else(Reply::Refused, Reply::Restored)
            }
            Command::Restore { sandbox, fill, prefetch, request } => {
                // A request waits for this one, and would for another thread to wake.
                let restored = tokio::task::block_in_place(|| {
                    let by = caller.enter()?;
                    let held = self.find(sandbox)?;
                    let request = request.map(|request| {
                        let (answer, answered) = oneshot::channel();
                        lock(&self.handed).insert(sandbox, answered);
                        (request, answer)
                    });
                    let restored =
                        self.lend_buffers(|b| held.restore(&by, fill, prefetch, request, b));
                    restored.inspect_err(|_| {
                        lock(&self.handed).remove(&sandbox);
                    })
                });
                restored.map_or_else(Reply::Refused, Reply::Restored)
            }
            Command::Complete { sandbox } => {
                done(self.for_caller(caller, sandbox, |held, _, b| held.complete(b)).await)
            }
            Command::Suspend { sandbox } => {
                let views =
                    self.for_caller(caller, sandbox, |held, by, b| held.suspend(by, b)).await;
                views.map_or_else(Reply::Refused, Reply::Suspended)
            }
            Command::Resume { sandbox } => {
                done(self.for_caller(caller, sandbox, |held, _, _| held.resume()).await)
            }
            Command::Stop => {
                self.kill_all().await;
                self.stop.notify_one();
                Reply::Done
            }
        }
    }

    /// Serves the memory of a sandbox again that a request takes back while it is being dropped, all
    /// but what is `left`. It takes about as long as waking another thread for it would.
    fn take_back(
        &self,
        by: &Entered<'_>,
        sandbox: SandboxId,
        left: Vec<Vec<Range<u64>>>,
    ) -> Result<Restored, String> {
        let held = self.find(sandbox)?;
        tokio::task::block_in_place(|| {
            self.lend_buffers(|buffers| held.take_back(by, left, buffers))
        })
    }

    async fn hello(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        version: u32,
        pid: i32,
        store: Option<i32>,
    ) -> Result<Reply, String> {
        let own = std::process::id() as i32;
        if version != VERSION {
            let cgroup = self.cgroup.clone();
            return Ok(Reply::Hello { version: VERSION, pid: own, store: -1, cgroup });
        }
        caller.introduce(pid)?;
        let _handover = self.handover.lock().await;
        self.end_daemon(|_| true).await;
        if let Some(store) = store {
            if !lock(&self.sandboxes).is_empty() {
                return Err("there are sandboxes with another page store".into());
            }
            let view = View::open(caller.take_descriptor(store)?);
            let view = view.map_err(|e| format!("mapping the page store: {e}"))?;
            *lock(&self.store) = Some(Arc::new(view));
        }
        let store = lock(&self.store).as_ref().map(|view| view.descriptor().as_raw_fd());
        let store = store.ok_or("there is no page store")?;
        *lock(&self.daemon) = Some(Arc::clone(caller));
        Ok(Reply::Hello { version: VERSION, pid: own, store, cgroup: self.cgroup.clone() })
    }

    fn list(&self) -> Vec<Listed> {
        let sandboxes: Vec<_> = lock(&self.sandboxes).values().map(Arc::clone).collect();
        let mut descriptors = Vec::new();
        let listed = sandboxes.iter().filter_map(|held| held.list(&mut descriptors)).collect();
        *lock(&self.listed) = descriptors;
        listed
    }

    async fn start(self: &Arc<Self>, caller: &Caller, start: Start) -> Started {
        let Start { sandbox, spec, port, log, log_bytes, working_set, limit_ms, label } = start;
        let limit = Duration::from_millis(limit_ms);
        let settings = Settings { id: sandbox, log, log_bytes, working_set, limit, label };
        let spawned = match self.spawner.spawn(spec, port).await {
            Ok(spawned) => spawned,
            Err(why) => return Started::Failed(why),
        };
        let (starting, started) = oneshot::channel();
        let shared = Arc::clone(self);
        let tell = move |news| {
            let message = match news {
                News::Filled(number, watched) => Message::Filled { sandbox, number, watched },
                News::Idle => Message::Idle { sandbox },
                News::Ended(unheard) => {
                    lock(&shared.sandboxes).remove(&sandbox);
                    let Some(how) = unheard else { return };
                    Message::Ended { sandbox, how }
                }
            };
            if let Some(daemon) = lock(&shared.daemon).as_ref() {
                daemon.tell(message);
            }
        };
        {
            let _by = match caller.enter() {
                Ok(by) => by,
                Err(why) => return Started::Failed(why),
            };
            // Held from before the sandbox can end until it is in the table, so that its end
            // finds it there.
            let mut sandboxes = lock(&self.sandboxes);
            match Held::take(Arc::clone(&self.common), spawned, settings, starting, tell) {
                Ok(held) => sandboxes.insert(sandbox, held),
                Err(error) => return Started::Failed(error.to_string()),
            };
        }
        started.await.unwrap_or_else(|_| Started::Failed("the sandbox is gone".into()))
    }

    fn hold(&self, by: &Entered<'_>, hold: Hold) -> Result<(), String> {
        let Hold { sandbox, image, userfaults, written, residents } = hold;
        let held = self.find(sandbox)?;
        let userfaults = userfaults.iter().map(|number| by.take_descriptor(*number));
        let userfaults = userfaults.collect::<Result<_, _>>()?;
        let image = match held.take_examined(image) {
            Some(image) => image,
            None => self.open_image(image)?,
        };
        let mut image = image.hold(userfaults).map_err(|error| error.to_string())?;
        image.leave(residents);
        held.hold(by, image, &written)?;
        tokio::spawn(async move {
            tokio::time::sleep(OPEN).await;
            held.close_image();
        });
        Ok(())
    }

    fn examine(&self, by: &Entered<'_>, sandbox: SandboxId, image: Extent) -> Result<(), String> {
        self.find(sandbox)?.examined(by, self.open_image(image)?)
    }

    fn open_image(&self, image: Extent) -> Result<OpenImage, String> {
        let view = lock(&self.store).clone().ok_or("no page store: say hello first")?;
        OpenImage::open(view, image).map_err(|error| error.to_string())
    }

    /// Runs `work`, for a caller, where it may block.
    async fn for_caller<R: Send + 'static>(
        self: Arc<Self>,
        caller: &Arc<Caller>,
        sandbox: SandboxId,
        work: fn(&Arc<Held>, &Entered<'_>, &mut RestoreBuffers) -> Result<R, String>,
    ) -> Result<R, String> {
        let caller = Arc::clone(caller);
        self.with_buffers(sandbox, move |held, buffers| work(held, &caller.enter()?, buffers)).await
    }

    /// Runs `work` where it may block, with buffers that earlier work has used, if there are any.
    async fn with_buffers<R: Send + 'static>(
        self: Arc<Self>,
        sandbox: SandboxId,
        work: impl FnOnce(&Arc<Held>, &mut RestoreBuffers) -> Result<R, String> + Send + 'static,
    ) -> Result<R, String> {
        let held = self.find(sandbox)?;
        let blocking =
            tokio::task::spawn_blocking(move || self.lend_buffers(|buffers| work(&held, buffers)));
        blocking.await.map_err(|e| e.to_string())?
    }

    fn lend_buffers<R>(&self, work: impl FnOnce(&mut RestoreBuffers) -> R) -> R {
        let mut buffers = lock(&self.buffers).pop().unwrap_or_default();
        let result = work(&mut buffers);
        lock(&self.buffers).push(buffers);
        result
    }

    fn find(&self, sandbox: SandboxId) -> Result<Arc<Held>, String> {
        let found = lock(&self.sandboxes).get(&sandbox).map(Arc::clone);
        found.ok_or_else(|| format!("the keeper has no sandbox {sandbox}"))
    }

    async fn kill_all(&self) {
        let all: Vec<Arc<Held>> = lock(&self.sandboxes).values().map(Arc::clone).collect();
        for held in all {
            held.kill();
        }
        for _ in 0..1000 {
            if lock(&self.sandboxes).is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tracing::error!("sandboxes are left that could not be killed");
    }
}

/// What a sandbox answers, and what memory has come back by then.
async fn answered_by(held: Option<&Arc<Held>>, answered: oneshot::Receiver<Answer>) -> Reply {
    match answered.await {
        Ok(answer) => {
            Reply::Answered { answer, returned: held.map(|h| h.returned()).unwrap_or_default() }
        }
        Err(_) => refused("the sandbox is gone"),
    }
}

fn done(result: Result<(), String>) -> Reply {
    result.map_or_else(Reply::Refused, |()| Reply::Done)
}

fn refused(why: &str) -> Reply {
    Reply::Refused(why.to_owned())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
