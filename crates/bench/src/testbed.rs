//! A private node with real sandboxes, to measure on.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use medes_core::{FunctionSpec, MemoryUse, NodeId, RequestId, SandboxId};
use medes_node::{
    DedupConfig, DedupFailure, DedupMode, DedupReport, Invocation, Node, NodeApi, NodeConfig,
    NodeEvent, NodeMemory, RestoreReport,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::examples::Source;

/// A runtime tidies its heap after 0.1 s without a request; then nothing moves any more.
const QUIET: Duration = Duration::from_millis(800);

/// The page store's room: every base snapshot of a run and some more. It is taken only as it fills.
const STORE: u64 = 8 << 30;

/// How a sandbox becomes a base.
pub(crate) const BASE: DedupMode = DedupMode { new_base: true, residents: false, execution_us: 0 };

/// How it goes into the dedup state as fast as on a platform with plenty of memory.
pub(crate) const ROOMY: DedupMode = DedupMode { new_base: false, residents: true, execution_us: 0 };

/// How it does so when memory is short.
pub(crate) const SHORT: DedupMode =
    DedupMode { new_base: false, residents: false, execution_us: 0 };

/// How often a dedup operation that something passing stood in the way of is tried.
const TRIES: u32 = 5;

/// The program that keeps the node's sandboxes.
#[derive(Clone, Debug)]
pub struct KeeperProgram {
    /// The executable.
    pub program: PathBuf,
    /// The subcommand that makes it a keeper.
    pub command: String,
}

/// A private node, with its own directory, cgroup and user ids. Dropping it ends all sandboxes.
pub struct Testbed {
    runtime: Runtime,
    node: Option<Node>,
    _events: UnboundedReceiver<NodeEvent>,
    _directory: TempDir,
}

/// How a sandbox came back that was wanted while it was being deduplicated; it runs.
#[derive(Clone, Copy, Debug)]
pub enum TakenBack {
    /// After this long.
    After(Duration),
    /// The operation was over by then, and it was restored.
    Over,
}

impl Testbed {
    /// Starts a node. It deduplicates on one core.
    ///
    /// # Errors
    /// If this process is not root, or the node does not start.
    pub fn open(source: &Source, keeper: &KeeperProgram) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("medes-bench-").tempdir()?;
        let data_dir = directory.path().join("data");
        std::fs::create_dir(&data_dir)?;
        let runtimes = source.runtimes.canonicalize()?;
        std::os::unix::fs::symlink(runtimes, data_dir.join("runtimes"))?;
        let number = std::process::id();
        let cgroup = format!("medes-bench-{number}");
        let arguments = [keeper.command.as_str(), "--cgroup", &cgroup, "--log-level", "warn"];
        let config = NodeConfig {
            node: NodeId(0),
            data_dir,
            run_dir: directory.path().join("run"),
            // Ids of its own, in a range that no distribution gives to people or containers.
            uid_base: 1_000_000_000 + number % 16_384 * 65_536,
            memory_budget: u64::MAX,
            store_capacity: STORE,
            log_bytes: 1 << 20,
            scratch_bytes: 512 << 20,
            pids_max: 256,
            init_timeout_ms: 60_000,
            keeper_program: keeper.program.clone(),
            keeper_arguments: arguments.map(str::to_owned).to_vec(),
            dedup: DedupConfig { workers: 1, ..DedupConfig::default() },
            cgroup,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let (node, events) = runtime.block_on(Node::open(config)).context("starting a node")?;
        runtime.spawn(end_on_signal(node.clone(), directory.path().to_owned()));
        Ok(Self { runtime, node: Some(node), _events: events, _directory: directory })
    }

    fn node(&self) -> &Node {
        self.node.as_ref().expect("open until dropped")
    }

    /// Starts a sandbox.
    ///
    /// # Errors
    /// If it does not get as far as waiting for a request.
    pub fn start(&self, function: &FunctionSpec) -> Result<SandboxId> {
        let started = self.runtime.block_on(self.node().start(function));
        started.with_context(|| format!("starting a sandbox for {}", function.name))
    }

    /// Has a sandbox answer a request.
    ///
    /// # Errors
    /// If the answer is an error.
    pub fn invoke(
        &self,
        function: &FunctionSpec,
        sandbox: SandboxId,
        event: &Value,
    ) -> Result<Bytes> {
        let invocation = Invocation {
            request: RequestId::random(),
            payload: Bytes::from(event.to_string()),
            timeout_ms: function.timeout_ms,
            client_context: None,
            trace: None,
        };
        let outcome = self.runtime.block_on(self.node().invoke(sandbox, invocation));
        match outcome.error {
            None => Ok(outcome.payload),
            Some(error) => bail!("{} answered {event} with {error:?}", function.name),
        }
    }

    /// Waits until sandboxes whose last request is just over have tidied up.
    pub fn settle(&self) {
        std::thread::sleep(QUIET);
    }

    /// Deduplicates a sandbox.
    ///
    /// # Errors
    /// If it stays warm for good, or is lost.
    pub fn dedup(&self, sandbox: SandboxId, mode: DedupMode) -> Result<DedupReport> {
        for _ in 1..TRIES {
            match self.try_dedup(sandbox, mode) {
                Err(DedupFailure::StaysWarm { lasting: false, .. }) => self.settle(),
                other => return Ok(other?),
            }
        }
        Ok(self.try_dedup(sandbox, mode)?)
    }

    fn try_dedup(&self, sandbox: SandboxId, mode: DedupMode) -> Result<DedupReport, DedupFailure> {
        self.runtime.block_on(self.node().dedup(sandbox, mode))
    }

    /// Begins to deduplicate a sandbox and takes it back after `after`.
    ///
    /// # Errors
    /// If the operation fails otherwise.
    pub fn cancel_dedup(&self, sandbox: SandboxId, after: Duration) -> Result<TakenBack> {
        let node = self.node();
        self.runtime.block_on(async {
            let mut operation = std::pin::pin!(node.dedup(sandbox, ROOMY));
            if let Ok(done) = tokio::time::timeout(after, &mut operation).await {
                done?;
                node.restore(sandbox, true, None).await?;
                return Ok(TakenBack::Over);
            }
            let asked = std::time::Instant::now();
            node.cancel_dedup(sandbox);
            match operation.await {
                Err(DedupFailure::Cancelled) => Ok(TakenBack::After(asked.elapsed())),
                Ok(_) => {
                    node.restore(sandbox, true, None).await?;
                    Ok(TakenBack::Over)
                }
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Whether some of a running sandbox's memory is, or was, in the page store.
    pub fn has_image(&self, sandbox: SandboxId) -> bool {
        self.node().memory_of(sandbox).is_some_and(|memory| memory.store > 0)
    }

    /// Brings a sandbox back.
    ///
    /// # Errors
    /// If it is lost.
    pub fn restore(&self, sandbox: SandboxId) -> Result<RestoreReport> {
        Ok(self.runtime.block_on(self.node().restore(sandbox, true, None))?)
    }

    /// Ends a sandbox.
    pub fn purge(&self, sandbox: SandboxId) {
        self.runtime.block_on(self.node().purge(sandbox));
    }

    /// Has `look` look at the processes of a sandbox that stands still.
    ///
    /// # Errors
    /// What `look` says, or if the sandbox can't be frozen.
    pub fn inspect<R>(
        &self,
        sandbox: SandboxId,
        look: impl FnOnce(&[i32]) -> Result<R>,
    ) -> Result<R> {
        self.node().inspect(sandbox, look)?
    }

    /// What a sandbox uses now.
    ///
    /// # Errors
    /// If it is gone.
    pub fn memory_of(&self, sandbox: SandboxId) -> Result<MemoryUse> {
        self.node().memory_of(sandbox).ok_or_else(|| anyhow!("the sandbox {sandbox} is gone"))
    }

    /// What the node uses now.
    #[must_use]
    pub fn memory(&self) -> NodeMemory {
        self.node().memory()
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            self.runtime.block_on(node.close());
        }
    }
}

/// Cleans up and ends this process when somebody asks for that.
async fn end_on_signal(node: Node, directory: PathBuf) {
    use tokio::signal::unix::{SignalKind, signal};

    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let [Ok(mut int), Ok(mut term), Ok(mut hup)] = kinds.map(signal) else { return };
    tokio::select! { _ = int.recv() => {}, _ = term.recv() => {}, _ = hup.recv() => {} }
    node.close().await;
    let _ = std::fs::remove_dir_all(&directory);
    eprintln!("interrupted");
    std::process::exit(130);
}
