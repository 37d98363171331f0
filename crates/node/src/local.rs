//! The node on this machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use medes_core::{DomainId, FunctionSpec, InvocationError, Layout, MemoryUse, SandboxId};
use medes_keeper::protocol::{Answer, Command, Ending, Reply, Start, Started};
use medes_keeper::{Keeper, KeeperError, Unasked, logs};
use medes_registry::{LocalRegistry, Registry, RegistryConfig};
use medes_runtime::contract::lambda_arn;
use medes_runtime::lambda::deadline_ms;
use medes_runtime::{PORT, Request};
use medes_sandbox::{CgroupError, CgroupRoot};
use medes_store::Store;
use parking_lot::RwLock;
use tokio::sync::mpsc;

use crate::api::{
    DedupFailure, DedupReport, Invocation, NodeApi, NodeEvent, NodeMemory, Outcome, RestoreFailure,
    RestoreReport, StartFailure,
};
use crate::bases::{self, Unused};
use crate::config::NodeConfig;
use crate::dedup;
use crate::recovery::{self, InstanceLock};
use crate::runtimes::Runtimes;
use crate::spec::sandbox_spec;
use crate::table::{Entry, Table};

/// How long the processes of a killed sandbox may take to go away.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// A node could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Another instance uses the run directory.
    #[error(
        "another instance is running with {0}; stop it, or give this one another run_dir, \
         data_dir and cgroup"
    )]
    Running(PathBuf),
    /// A file or directory can't be used.
    #[error("{path}: {error}")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The page store can't be made.
    #[error("making the page store: {0}")]
    Store(std::io::Error),
    /// The machine's cgroups can't be used.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The keeper can't be used.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// The fingerprint settings make no sense.
    #[error("dedup settings: {0}")]
    Dedup(String),
}

/// The node on this machine. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) config: NodeConfig,
    pub(crate) store: Store,
    pub(crate) registry: LocalRegistry,
    pub(crate) table: Table,
    pub(crate) fingerprints: medes_pages::FingerprintConfig,
    pub(crate) unused: Unused,
    root: CgroupRoot,
    runtimes: Runtimes,
    keeper: RwLock<Keeper>,
    events: mpsc::UnboundedSender<NodeEvent>,
    closing: std::sync::atomic::AtomicBool,
    lock: InstanceLock,
}

impl Node {
    /// Sets the node up: cleans up after an earlier instance that did not end properly, makes the
    /// page store, starts the keeper. The receiver hears of sandboxes that end by themselves.
    ///
    /// # Errors
    /// [`NodeError`]; nothing stays behind.
    pub async fn open(
        config: NodeConfig,
    ) -> Result<(Self, mpsc::UnboundedReceiver<NodeEvent>), NodeError> {
        let fingerprints =
            medes_pages::FingerprintConfig::new(config.dedup.cardinality, config.dedup.chunk_size)
                .map_err(|e| NodeError::Dedup(e.to_string()))?;
        let lock = InstanceLock::take(&config.run_dir)?;
        let root = CgroupRoot::new(&config.cgroup)?;
        let left = recovery::clean_up(&config.run_dir, &root)?;
        if left > 0 {
            tracing::warn!(sandboxes = left, "cleaned up after an instance that did not end well");
        }
        let store = Store::create(config.node, config.store_capacity).map_err(NodeError::Store)?;
        let (keeper, ended) = launch(&config, &store).await?;
        let (events, received) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            runtimes: Runtimes::below(&config.data_dir),
            registry: LocalRegistry::new(RegistryConfig::default()),
            table: Table::default(),
            unused: Unused::default(),
            keeper: RwLock::new(keeper),
            closing: false.into(),
            config,
            store,
            fingerprints,
            root,
            events,
            lock,
        });
        tokio::spawn(listen(Arc::clone(&shared), ended));
        let idle = Duration::from_millis(shared.config.dedup.base_idle_ms);
        tokio::spawn(bases::sweep(Arc::downgrade(&shared), idle));
        Ok((Self { shared }, received))
    }

    /// Ends all sandboxes and the keeper, and removes the instance's cgroups and sockets.
    pub async fn close(&self) {
        let shared = Arc::clone(&self.shared);
        shared.closing.store(true, Ordering::Release);
        for entry in shared.table.all() {
            self.purge(entry.id).await;
        }
        if let Err(error) = shared.keeper().order(Command::Stop).await {
            tracing::warn!(%error, "stopping the keeper");
        }
        let cleaned = tokio::task::spawn_blocking(move || {
            let run_dir = &shared.config.run_dir;
            recovery::clean_up(run_dir, &shared.root)?;
            shared.root.remove()?;
            // After an end in order nobody needs it.
            let _ = std::fs::remove_file(recovery::keeper_log(run_dir));
            shared.lock.remove()
        });
        match cleaned.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "cleaning up"),
            Err(error) => tracing::error!(%error, "cleaning up"),
        }
    }
}

async fn launch(
    config: &NodeConfig,
    store: &Store,
) -> Result<(Keeper, mpsc::UnboundedReceiver<Unasked>), NodeError> {
    let (tell, ended) = mpsc::unbounded_channel();
    let keeper = Keeper::launch(
        &config.keeper_program,
        &config.keeper_arguments,
        &config.run_dir.join("keeper.sock"),
        &recovery::keeper_log(&config.run_dir),
        store.memory().descriptor(),
        tell,
    )
    .await?;
    let path = recovery::keeper_pid_file(&config.run_dir);
    std::fs::write(&path, keeper.pid().to_string())
        .map_err(|error| NodeError::File { path, error })?;
    Ok((keeper, ended))
}

/// Hears from the keeper; when it is lost, kills what depended on it and starts another.
async fn listen(shared: Arc<Shared>, mut ended: mpsc::UnboundedReceiver<Unasked>) {
    loop {
        while let Some(unasked) = ended.recv().await {
            let (sandbox, ending) = match unasked {
                Unasked::Ended { sandbox, how } => (sandbox, how),
                Unasked::Filled { sandbox, number } => {
                    if let Some(entry) = shared.table.get(sandbox) {
                        shared.filled(&entry, number);
                    }
                    continue;
                }
            };
            let how = if ending.out_of_memory {
                "the kernel killed it for its memory limit".to_owned()
            } else {
                ending.how
            };
            if shared.forget(sandbox) {
                let _ = shared.events.send(NodeEvent::Gone { sandbox, how });
            }
        }
        if shared.closing.load(Ordering::Acquire) {
            return;
        }
        tracing::error!("the keeper is gone; its sandboxes are killed and another is started");
        let cleaner = Arc::clone(&shared);
        let cleaned = tokio::task::spawn_blocking(move || {
            recovery::clean_up(&cleaner.config.run_dir, &cleaner.root)
        });
        if let Ok(Err(error)) = cleaned.await {
            tracing::error!(%error, "killing sandboxes");
        }
        for entry in shared.table.all() {
            if shared.forget(entry.id) {
                let how = "the keeper ended".to_owned();
                let _ = shared.events.send(NodeEvent::Gone { sandbox: entry.id, how });
            }
        }
        loop {
            match launch(&shared.config, &shared.store).await {
                Ok((keeper, receiver)) => {
                    *shared.keeper.write() = keeper;
                    ended = receiver;
                    break;
                }
                Err(error) => {
                    tracing::error!(%error, "starting another keeper");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }
}

impl Shared {
    pub(crate) fn keeper(&self) -> Keeper {
        self.keeper.read().clone()
    }

    /// Gives back what a sandbox that is no more had here. Returns whether its end is news: it was
    /// known, and nobody killed it on purpose.
    pub(crate) fn forget(&self, sandbox: SandboxId) -> bool {
        let Some(entry) = self.table.remove(sandbox) else { return false };
        self.drop_image(&entry);
        !entry.doomed.load(Ordering::Acquire)
    }

    /// All memory is back after the restore `number`: the image has served its purpose.
    fn filled(&self, entry: &Entry, number: u64) {
        let mut dedup = entry.dedup.lock();
        if let Some(done) = dedup.take_if(|dedup| dedup.restore == Some(number)) {
            drop(done.userfaults);
            self.store.remove_image(done.image);
        }
    }

    /// Gives back whatever image the sandbox has. Its memory must be back, or the sandbox gone.
    pub(crate) fn drop_image(&self, entry: &Entry) {
        if let Some(dedup) = entry.dedup.lock().take() {
            drop(dedup.userfaults);
            self.store.remove_image(dedup.image);
        }
    }

    fn log_directory(&self, function: &FunctionSpec) -> PathBuf {
        self.config.data_dir.join("logs").join(function.name.as_str())
    }

    pub(crate) fn memory_use(&self, entry: &Entry) -> MemoryUse {
        let charged = entry.cgroup.memory().ok();
        let image = entry.dedup.lock().as_ref().map_or(0, |d| d.image.bytes());
        MemoryUse {
            private: charged.as_ref().map_or(0, |m| m.anon + m.shmem),
            kernel: charged.as_ref().map_or(0, |m| m.kernel),
            store: image,
            metadata: if image > 0 { size_of::<Entry>() as u64 } else { 0 },
        }
    }

    /// Kills a sandbox and waits until nothing is left of it.
    async fn kill(&self, sandbox: SandboxId) {
        let Some(entry) = self.table.get(sandbox) else { return };
        entry.doomed.store(true, Ordering::Release);
        if self.keeper().order(Command::Kill { sandbox }).await.is_err() {
            // The keeper may not know it (any more); the cgroup does.
            let cgroup = entry.cgroup.clone();
            let killed = tokio::task::spawn_blocking(move || cgroup.kill(KILL_LIMIT));
            if let Ok(Err(error)) = killed.await {
                tracing::warn!(%sandbox, %error, "killing a sandbox");
            }
        }
        let start = Instant::now();
        while entry.cgroup.path().exists() && start.elapsed() < KILL_LIMIT {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.forget(sandbox);
    }

    async fn start(&self, function: &FunctionSpec) -> Result<SandboxId, StartFailure> {
        let runtime = self
            .runtimes
            .find(&function.runtime)
            .map_err(|e| StartFailure::NoRuntime(e.to_string()))?;
        let broken = |why: &dyn std::fmt::Display| StartFailure::Sandbox(why.to_string());
        let id = SandboxId::random();
        let host_uid = self
            .table
            .take_uid(self.config.uid_base)
            .ok_or_else(|| broken(&"all user ids are taken"))?;
        let spec = sandbox_spec(&self.config, function, &runtime, id, host_uid);
        let cgroup = match self.root.get(&spec.id) {
            Ok(cgroup) => cgroup,
            Err(error) => {
                self.table.give_uid_back(host_uid);
                return Err(broken(&error));
            }
        };
        self.table.insert(Arc::new(Entry {
            id,
            function: function.id,
            name: function.name.clone(),
            domain: function.domain,
            cgroup,
            host_uid,
            cancel: false.into(),
            doomed: false.into(),
            dedup: parking_lot::Mutex::new(None),
        }));
        let log = self.log_directory(function);
        let start = Start {
            sandbox: id,
            spec,
            port: PORT,
            log,
            log_bytes: self.config.log_bytes,
            working_set: match function.layout {
                Layout::Function | Layout::Shared => function.id.0,
                // Its addresses are like no other's.
                Layout::Random => id.0,
            },
        };
        let keeper = self.keeper();
        let mut call = std::pin::pin!(keeper.call(Command::Start(Box::new(start))));
        let limit = Duration::from_millis(self.config.init_timeout_ms);
        let (reply, timed_out) = match tokio::time::timeout(limit, &mut call).await {
            Ok(reply) => (reply, false),
            Err(_) => {
                let _ = keeper.order(Command::Kill { sandbox: id }).await;
                (call.await, true)
            }
        };
        let failure = match reply {
            Ok(Reply::Started(Started::Ready)) if !timed_out => return Ok(id),
            Ok(Reply::Started(_)) if timed_out => {
                StartFailure::Init { error: InvocationError::TimedOut, payload: Bytes::new() }
            }
            Ok(Reply::Started(Started::InitError(payload))) => {
                StartFailure::Init { error: InvocationError::Init, payload }
            }
            Ok(Reply::Started(Started::Ended(ending))) => {
                StartFailure::Init { error: ended(ending), payload: Bytes::new() }
            }
            Ok(Reply::Started(Started::Failed(why))) => StartFailure::Sandbox(why),
            Ok(Reply::Refused(why)) => StartFailure::Sandbox(why),
            Ok(_) => broken(&KeeperError::Protocol),
            Err(error) => broken(&error),
        };
        self.kill(id).await;
        Err(failure)
    }

    async fn invoke(&self, sandbox: SandboxId, invocation: Invocation) -> Outcome {
        let begin = Instant::now();
        let Some(entry) = self.table.get(sandbox) else {
            let how = "the sandbox is gone".to_owned();
            return outcome(begin, Bytes::new(), Some(InvocationError::Exited { how }), false);
        };
        let request = Request {
            id: invocation.request,
            deadline_ms: deadline_ms(invocation.timeout_ms),
            arn: lambda_arn(entry.name.as_str()),
            payload: invocation.payload,
            client_context: invocation.client_context,
            trace: invocation.trace,
        };
        let keeper = self.keeper();
        let mut call = std::pin::pin!(keeper.call(Command::Invoke { sandbox, request }));
        let limit = Duration::from_millis(invocation.timeout_ms);
        let Ok(reply) = tokio::time::timeout(limit, &mut call).await else {
            self.kill(sandbox).await;
            return outcome(begin, Bytes::new(), Some(InvocationError::TimedOut), false);
        };
        let reply = reply.map(|reply| match reply {
            Reply::Answered { answer, .. } => Ok(answer),
            other => Err(other),
        });
        let (payload, error) = match reply {
            Ok(Ok(Answer::Response(payload))) => (payload, None),
            Ok(Ok(Answer::Error(payload))) => (payload, Some(InvocationError::Function)),
            Ok(Ok(Answer::TooLarge(bytes))) => {
                (Bytes::new(), Some(InvocationError::ResponseTooLarge { bytes }))
            }
            Ok(Ok(Answer::Ended(ending))) => {
                self.forget(sandbox);
                return outcome(begin, Bytes::new(), Some(ended(ending)), false);
            }
            Ok(Err(Reply::Refused(how))) => {
                self.kill(sandbox).await;
                return outcome(begin, Bytes::new(), Some(InvocationError::Exited { how }), false);
            }
            Ok(_) | Err(_) => {
                self.kill(sandbox).await;
                let how = "the keeper ended".to_owned();
                return outcome(begin, Bytes::new(), Some(InvocationError::Exited { how }), false);
            }
        };
        outcome(begin, payload, error, true)
    }

    async fn restore(&self, sandbox: SandboxId) -> Result<RestoreReport, RestoreFailure> {
        let begin = Instant::now();
        let entry = self.table.get(sandbox);
        let entry = entry.ok_or_else(|| RestoreFailure("the sandbox is gone".into()))?;
        let fill = true;
        let failure = match self.keeper().call(Command::Restore { sandbox, fill }).await {
            Ok(Reply::Restored(done)) => {
                if let Some(dedup) = entry.dedup.lock().as_mut() {
                    dedup.restore = Some(done.number);
                }
                return Ok(RestoreReport {
                    pages: done.pages,
                    pages_us: done.pages_us,
                    thaw_us: done.thaw_us,
                    total_us: micros(begin),
                });
            }
            Ok(Reply::Refused(why)) => why,
            Ok(_) => KeeperError::Protocol.to_string(),
            Err(error) => error.to_string(),
        };
        self.kill(sandbox).await;
        Err(RestoreFailure(failure))
    }
}

fn ended(ending: Ending) -> InvocationError {
    if ending.out_of_memory {
        InvocationError::OutOfMemory
    } else {
        InvocationError::Exited { how: ending.how }
    }
}

fn outcome(begin: Instant, payload: Bytes, error: Option<InvocationError>, alive: bool) -> Outcome {
    Outcome { payload, error, execution_us: micros(begin), alive }
}

pub(crate) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl NodeApi for Node {
    async fn start(&self, function: &FunctionSpec) -> Result<SandboxId, StartFailure> {
        self.shared.start(function).await
    }

    async fn invoke(&self, sandbox: SandboxId, invocation: Invocation) -> Outcome {
        self.shared.invoke(sandbox, invocation).await
    }

    async fn dedup(&self, sandbox: SandboxId, new_base: bool) -> Result<DedupReport, DedupFailure> {
        let Some(entry) = self.shared.table.get(sandbox) else {
            return Err(DedupFailure::Lost("the sandbox is gone".into()));
        };
        let result = dedup::run(Arc::clone(&self.shared), entry, new_base).await;
        if let Err(DedupFailure::Lost(_)) = &result {
            self.shared.kill(sandbox).await;
        }
        result
    }

    fn cancel_dedup(&self, sandbox: SandboxId) {
        if let Some(entry) = self.shared.table.get(sandbox) {
            entry.cancel.store(true, Ordering::Release);
        }
    }

    async fn restore(&self, sandbox: SandboxId) -> Result<RestoreReport, RestoreFailure> {
        self.shared.restore(sandbox).await
    }

    async fn purge(&self, sandbox: SandboxId) {
        self.cancel_dedup(sandbox);
        self.shared.kill(sandbox).await;
    }

    fn memory_of(&self, sandbox: SandboxId) -> Option<MemoryUse> {
        self.shared.table.get(sandbox).map(|entry| self.shared.memory_use(&entry))
    }

    fn memory(&self) -> NodeMemory {
        let store = self.shared.store.usage();
        let sandboxes = self.shared.table.all();
        NodeMemory {
            sandboxes: sandboxes
                .iter()
                .filter_map(|e| e.cgroup.memory().ok())
                .map(|m| m.anon + m.shmem + m.kernel)
                .sum(),
            base: store.snapshots,
            patches: store.images,
            registry: self.shared.registry.stats().bytes + store.index,
            budget: self.shared.config.memory_budget,
        }
    }

    fn base_bytes(&self, domain: DomainId) -> u64 {
        self.shared.store.snapshot_bytes(domain)
    }

    fn runtimes(&self) -> Vec<String> {
        self.shared.runtimes.names()
    }

    async fn forget_function(&self, function: &FunctionSpec, replaced: bool) {
        for snapshot in self.shared.store.snapshots_of(function.domain, function.id) {
            let id = snapshot.id();
            drop(snapshot);
            self.shared.drop_base(id);
        }
        if replaced {
            return;
        }
        let logs = self.shared.log_directory(function);
        if let Err(error) = std::fs::remove_dir_all(&logs)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, directory = %logs.display(), "removing a log");
        }
    }

    async fn logs_tail(&self, function: &FunctionSpec, bytes: usize) -> (String, u64) {
        let directory = self.shared.log_directory(function);
        let end = logs::end(&directory).unwrap_or(0);
        let (mut text, position) = read_log(directory, end.saturating_sub(bytes as u64), bytes);
        if end > bytes as u64
            && let Some(line) = text.find('\n')
        {
            // The first line is cut in two.
            text.drain(..=line);
        }
        (text, position)
    }

    async fn logs_after(&self, function: &FunctionSpec, position: u64) -> (String, u64) {
        read_log(self.shared.log_directory(function), position, 1 << 20)
    }
}

fn read_log(directory: PathBuf, position: u64, limit: usize) -> (String, u64) {
    match logs::read_from(&directory, position, limit) {
        Ok((bytes, next)) => (String::from_utf8_lossy(&bytes).into_owned(), next),
        Err(error) => {
            tracing::warn!(%error, directory = %directory.display(), "reading a log");
            (String::new(), position)
        }
    }
}
