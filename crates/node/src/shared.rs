//! What a node's operations share: store, registry, sandboxes, the keeper.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use medes_core::{FunctionSpec, MemoryUse, SandboxId};
use medes_keeper::Keeper;
use medes_keeper::protocol::Command;
use medes_registry::LocalRegistry;
use medes_sandbox::CgroupRoot;
use medes_store::{Store, View};
use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc;

use crate::api::{Inheritance, NodeEvent};
use crate::bases::Unused;
use crate::config::NodeConfig;
use crate::recovery::InstanceLock;
use crate::runtimes::Runtimes;
use crate::table::{Entry, Table};

/// How long the processes of a killed sandbox may take to go away.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What a node's operations share.
pub(crate) struct Shared {
    pub(crate) config: NodeConfig,
    pub(crate) store: Store,
    /// The store as the keeper sees it, to read images.
    pub(crate) view: Arc<View>,
    pub(crate) registry: LocalRegistry,
    pub(crate) table: Table,
    pub(crate) fingerprints: medes_pages::FingerprintConfig,
    pub(crate) unused: Unused,
    pub(crate) root: CgroupRoot,
    pub(crate) runtimes: Runtimes,
    pub(crate) keeper: RwLock<Keeper>,
    pub(crate) events: mpsc::UnboundedSender<NodeEvent>,
    /// What was taken over, until somebody asks.
    pub(crate) inheritance: Mutex<Inheritance>,
    /// Whether anything was.
    pub(crate) took_over: bool,
    pub(crate) closing: AtomicBool,
    pub(crate) lock: InstanceLock,
}

impl Shared {
    pub(crate) fn keeper(&self) -> Keeper {
        self.keeper.read().clone()
    }

    /// Gives back what a sandbox that is no more had here. Returns whether its end is news: it was
    /// known, and nobody killed it on purpose.
    pub(crate) fn forget(&self, sandbox: SandboxId) -> bool {
        let Some(entry) = self.table.remove(sandbox) else { return false };
        entry.gone.store(true, Ordering::SeqCst);
        // An operation that is under way may be reading the image; it drops it at its end.
        if let Some(_operating) = entry.operating.try_lock() {
            self.drop_image(&entry);
        }
        !entry.doomed.load(Ordering::Acquire)
    }

    /// All memory is back after the restore `number` and watched no longer: the image has served
    /// its purpose.
    pub(crate) fn filled(&self, entry: &Entry, number: u64) {
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

    pub(crate) fn log_directory(&self, function: &FunctionSpec) -> PathBuf {
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
    pub(crate) async fn kill(&self, sandbox: SandboxId) {
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
}

/// Microseconds since a moment.
pub(crate) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
