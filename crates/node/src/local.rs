//! The node on this machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use medes_core::{DomainId, FunctionSpec, MemoryUse, SandboxId};
use medes_keeper::protocol::Command;
use medes_keeper::{Keeper, Unasked, logs};
use medes_registry::{LocalRegistry, Registry, RegistryConfig};
use medes_sandbox::CgroupRoot;
use medes_store::{Store, View};
use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc;

use crate::api::{
    DedupFailure, DedupMode, DedupReport, Inheritance, Invocation, NodeApi, NodeEvent, NodeMemory,
    Outcome, RestoreFailure, RestoreReport, StartFailure,
};
use crate::bases::{self, Unused};
use crate::config::NodeConfig;
use crate::dedup;
use crate::error::NodeError;
use crate::recovery::{self, InstanceLock};
use crate::runtimes::Runtimes;
use crate::shared::Shared;
use crate::table::Table;
use crate::takeover::{self, TakenOver, TakeoverError};

/// The node on this machine. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    pub(crate) shared: Arc<Shared>,
}

impl Node {
    /// Sets the node up. If an earlier instance has died or left ([`Node::leave`]), its keeper and
    /// its sandboxes are taken over; where that can't be, they are ended, a page store is made, and
    /// a keeper started. The receiver hears what sandboxes do by themselves.
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
        let TakenOver { keeper, news, store, view, table, inheritance } = match takeover::take_over(
            &config, &root,
        )
        .await
        {
            Ok(Some(taken_over)) => taken_over,
            Ok(None) => begin(&config, &root).await?,
            Err(why) => {
                tracing::warn!(%why, "the sandboxes of the instance before can't be taken over");
                if let TakeoverError::OtherCgroup(other) = &why {
                    end_cgroup(&config, other)?;
                }
                begin(&config, &root).await?
            }
        };
        let took_over = !inheritance.sandboxes.is_empty() || !inheritance.bases.is_empty();
        let (events, received) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            runtimes: Runtimes::below(&config.data_dir),
            registry: LocalRegistry::new(RegistryConfig::default()),
            table,
            unused: Unused::default(),
            keeper: RwLock::new(keeper),
            inheritance: Mutex::new(inheritance),
            took_over,
            closing: false.into(),
            config,
            store,
            view,
            fingerprints,
            root,
            events,
            lock,
        });
        if took_over {
            let sandboxes = shared.inheritance.lock().sandboxes.len();
            tracing::info!(sandboxes, "took over what the instance before left");
            if let Err(error) = takeover::refill_registry(&shared) {
                tracing::warn!(%error, "base pages are found by address only");
            }
        }
        tokio::spawn(listen(Arc::clone(&shared), news));
        let idle = Duration::from_millis(shared.config.dedup.base_idle_ms);
        tokio::spawn(bases::sweep(Arc::downgrade(&shared), idle));
        Ok((Self { shared }, received))
    }

    /// Whether sandboxes or base snapshots of an earlier node were taken over.
    #[must_use]
    pub fn took_over(&self) -> bool {
        self.shared.took_over
    }

    /// Leaves everything to the next node that is opened with this run directory: the keeper and
    /// all sandboxes go on. The process should end now; operations must have come to their end.
    pub fn leave(&self) {
        self.shared.closing.store(true, Ordering::Release);
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

/// Begins with nothing.
async fn begin(config: &NodeConfig, root: &CgroupRoot) -> Result<TakenOver, NodeError> {
    let left = recovery::clean_up(&config.run_dir, root)?;
    if left > 0 {
        tracing::warn!(sandboxes = left, "ended what the instance before left");
    }
    let store = Store::create(config.node, config.store_capacity).map_err(NodeError::Store)?;
    let memory = store.memory().descriptor().try_clone_to_owned();
    let view = Arc::new(memory.and_then(View::open).map_err(NodeError::Store)?);
    let (keeper, news) = launch(config, &store).await?;
    let (table, inheritance) = (Table::default(), Inheritance::default());
    Ok(TakenOver { keeper, news, store, view, table, inheritance })
}

/// Ends what an earlier node left in cgroups of another name.
fn end_cgroup(config: &NodeConfig, name: &str) -> Result<(), NodeError> {
    let other = CgroupRoot::new(name)?;
    recovery::clean_up(&config.run_dir, &other)?;
    Ok(other.remove()?)
}

async fn launch(
    config: &NodeConfig,
    store: &Store,
) -> Result<(Keeper, mpsc::UnboundedReceiver<Unasked>), NodeError> {
    let (tell, ended) = mpsc::unbounded_channel();
    let keeper = Keeper::launch(
        &config.keeper_program,
        &config.keeper_arguments,
        &recovery::keeper_socket(&config.run_dir),
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
                Unasked::Idle { sandbox } => {
                    let _ = shared.events.send(NodeEvent::Idle { sandbox });
                    continue;
                }
                Unasked::Filled { watched: true, .. } => continue,
                Unasked::Filled { sandbox, number, watched: false } => {
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

impl NodeApi for Node {
    fn inherit(&self) -> Inheritance {
        std::mem::take(&mut *self.shared.inheritance.lock())
    }

    async fn start(&self, function: &FunctionSpec) -> Result<SandboxId, StartFailure> {
        self.shared.start(function).await
    }

    async fn invoke(&self, sandbox: SandboxId, invocation: Invocation) -> Outcome {
        self.shared.invoke(sandbox, invocation).await
    }

    async fn dedup(
        &self,
        sandbox: SandboxId,
        mode: DedupMode,
    ) -> Result<DedupReport, DedupFailure> {
        let Some(entry) = self.shared.table.get(sandbox) else {
            return Err(DedupFailure::Lost("the sandbox is gone".into()));
        };
        let result = dedup::run(Arc::clone(&self.shared), entry, mode).await;
        if let Err(DedupFailure::Lost(_)) = &result {
            self.shared.kill(sandbox).await;
        }
        result
    }

    fn cancel_dedup(&self, sandbox: SandboxId) {
        if let Some(entry) = self.shared.table.get(sandbox) {
            // Its answer puts another one in its place.
            let cancel = Arc::clone(&entry.cancel.lock());
            cancel.request();
        }
    }

    async fn restore(
        &self,
        sandbox: SandboxId,
        fill: bool,
        first: Option<Invocation>,
    ) -> Result<RestoreReport, RestoreFailure> {
        self.shared.restore(sandbox, fill, true, first).await
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
        NodeMemory {
            sandboxes: self.shared.root.memory().map_or(0, |m| m.anon + m.shmem + m.kernel),
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
