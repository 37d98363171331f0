//! The controller itself: its parts, its background tasks, its end.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::time::Duration;

use medes_core::{Layout, SandboxId};
use medes_node::{DedupFailure, DedupMode, DedupReport, NodeApi, NodeEvent, StartFailure};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use crate::code::{CodeLimits, CodeStore};
use crate::config::ControllerConfig;
use crate::error::{DeployError, StoreError};
use crate::store::{Deployed, Store};
use crate::table::{Effect, Table};

/// Functions, scheduler and lifecycle over one node. Clones share everything.
pub struct Controller<N: NodeApi> {
    pub(crate) inner: Arc<Inner<N>>,
}

impl<N: NodeApi> Clone for Controller<N> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

pub(crate) struct Inner<N> {
    pub(crate) node: N,
    pub(crate) config: Arc<ControllerConfig>,
    pub(crate) store: Arc<Store>,
    pub(crate) code: Arc<CodeStore>,
    /// Held while functions are deployed, changed or removed, and while code is cleaned up.
    pub(crate) changing: tokio::sync::Mutex<()>,
    /// Reach it through [`Inner::with`] only.
    table: Mutex<Table>,
    /// The lifecycle loop has something to do.
    wake: Arc<Notify>,
    /// Told whenever a sandbox, a start or a dedup operation ended.
    pub(crate) changed: Notify,
    /// Whether the policy in force was set live, as against in the configuration.
    pub(crate) live_policy: AtomicBool,
    started: Instant,
    stop: watch::Sender<bool>,
}

impl<N: NodeApi> Controller<N> {
    /// Opens the data directory, loads the functions and begins to run their lifecycle. `events`
    /// is what the node reports unasked. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If the data directory or the state store can't be used.
    pub fn open(
        config: ControllerConfig,
        node: N,
        events: mpsc::UnboundedReceiver<NodeEvent>,
    ) -> Result<Self, DeployError> {
        let dir = &config.data_dir;
        std::fs::create_dir_all(dir)
            .map_err(|source| StoreError::Io { path: dir.display().to_string(), source })?;
        let store = Store::open(&dir.join("controller.redb"))?;
        let limits = CodeLimits {
            packed: config.max_code,
            unpacked: config.max_code_unpacked,
            entries: config.max_code_entries,
        };
        let code = CodeStore::open(dir.join("code"), limits)?;
        config.policy.check()?;
        let live = store.policy()?;
        let policy = live.unwrap_or(config.policy);
        let config = Arc::new(config);
        let mut table = Table::new(config.clone(), policy, node.memory());
        let mut used = Vec::new();
        for mut deployed in store.functions()? {
            // The operator may have joined or parted tenants since it was deployed.
            let domain = store.domain(config.dedup_group(&deployed.spec.tenant))?;
            if deployed.spec.domain != domain {
                deployed.spec.domain = domain;
                if deployed.spec.layout == Layout::Shared {
                    deployed.spec.layout_seed = store.domain_seed(domain, crate::random)?;
                }
                store.put(&deployed)?;
            }
            used.push(deployed.spec.code.clone());
            used.extend(deployed.spec.layers.iter().cloned());
            table.install(0, Arc::new(deployed));
        }
        code.keep_only(|path| used.iter().any(|u| u == path))?;
        let unwanted = table.adopt(0, &node.inherit());

        let inner = Arc::new(Inner {
            node,
            config,
            store: Arc::new(store),
            code: Arc::new(code),
            changing: tokio::sync::Mutex::new(()),
            table: Mutex::new(table),
            wake: Arc::new(Notify::new()),
            changed: Notify::new(),
            live_policy: AtomicBool::new(live.is_some()),
            started: Instant::now(),
            stop: watch::Sender::new(false),
        });
        for sandbox in unwanted {
            tracing::info!(%sandbox, "its function is no more: ended");
            let inner = Arc::clone(&inner);
            tokio::spawn(async move { inner.node.purge(sandbox).await });
        }
        // The loops hold the parts weakly, so that dropping the last controller ends them.
        tokio::spawn(lifecycle(Arc::downgrade(&inner)));
        tokio::spawn(listen(Arc::downgrade(&inner), events));
        Ok(Self { inner })
    }

    /// The settings in force.
    #[must_use]
    pub fn config(&self) -> &ControllerConfig {
        &self.inner.config
    }

    /// The node.
    #[must_use]
    pub fn node(&self) -> &N {
        &self.inner.node
    }

    /// Asks whoever runs the platform to shut it down; see [`Controller::shutdown_requested`].
    pub fn request_shutdown(&self) {
        self.inner.stop.send_replace(true);
    }

    /// Returns once [`Controller::request_shutdown`] or [`Controller::shutdown`] was called.
    pub async fn shutdown_requested(&self) {
        let mut stop = self.inner.stop.subscribe();
        let _ = stop.wait_for(|stop| *stop).await;
    }

    /// Accepts no more requests, lets those that wait or run end within the grace period, and
    /// brings every other operation to its end. Sandboxes stay as they are, for a controller that
    /// is opened later over the same node's keeper.
    pub async fn leave(&self) {
        let inner = &self.inner;
        inner.with(|t, _| t.leave());
        inner.stop.send_replace(true);
        let grace = Duration::from_millis(inner.config.shutdown_grace_ms);
        if tokio::time::timeout(grace, inner.until(|t| !t.is_busy())).await.is_err() {
            tracing::warn!("the grace period is over: requests under way end unheard");
        }
        inner.with(|t, _| t.refuse_waiting());
        inner.until(|t| !t.is_operating()).await;
    }

    /// Whether [`Controller::leave`] was called.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.inner.with(|t, _| t.is_leaving())
    }

    /// Accepts no more requests, lets those that wait or run end within the grace period, then
    /// ends every sandbox. Returns when the node has none left. May be called more than once. After
    /// [`Controller::leave`] sandboxes stay.
    pub async fn shutdown(&self) {
        let inner = &self.inner;
        if self.is_leaving() {
            return self.leave().await;
        }
        inner.stop.send_replace(true);
        inner.with(|t, _| t.close());
        let grace = Duration::from_millis(inner.config.shutdown_grace_ms);
        if tokio::time::timeout(grace, inner.until(|t| !t.is_busy())).await.is_err() {
            tracing::warn!("the grace period is over: requests under way are aborted");
        }
        inner.with(|t, _| t.end_all());
        inner.until(Table::is_empty).await;
    }
}

impl<N: NodeApi> Inner<N> {
    /// Milliseconds since the controller was opened: the clock of the table.
    pub(crate) fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Works on the table, then carries out what has to be done about it.
    pub(crate) fn with<T>(self: &Arc<Self>, f: impl FnOnce(&mut Table, u64) -> T) -> T {
        let (result, effects) = {
            let mut table = self.table.lock();
            // Read under the lock, so that time in the table never runs backwards.
            let now = self.now_ms();
            let result = f(&mut table, now);
            (result, table.take_effects())
        };
        for effect in effects {
            self.carry_out(effect);
        }
        result
    }

    /// Returns once `condition` holds.
    pub(crate) async fn until(self: &Arc<Self>, condition: impl Fn(&Table) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before the look, so that no change in between is missed.
            changed.as_mut().enable();
            if self.with(|t, _| condition(t)) {
                return;
            }
            changed.await;
        }
    }

    /// Takes a new reading of the node's memory, then works on the table.
    pub(crate) fn with_memory<T>(self: &Arc<Self>, f: impl FnOnce(&mut Table, u64) -> T) -> T {
        let memory = self.node.memory();
        self.with(|t, now| {
            t.set_memory(memory);
            f(t, now)
        })
    }

    /// Works on the table and tells everybody who waits for a change.
    pub(crate) fn change<T>(self: &Arc<Self>, f: impl FnOnce(&mut Table, u64) -> T) -> T {
        let result = self.with_memory(f);
        self.changed.notify_waiters();
        result
    }

    fn carry_out(self: &Arc<Self>, effect: Effect) {
        let inner = self.clone();
        match effect {
            Effect::Wake => self.wake.notify_one(),
            Effect::CancelDedup(sandbox) => self.node.cancel_dedup(sandbox),
            Effect::Start { deployed, ticket } => {
                tokio::spawn(async move {
                    // The table has been told, and tells the request that waits.
                    let _ = inner.start(deployed, ticket).await;
                });
            }
            Effect::Dedup { sandbox, new_base, reply } => {
                tokio::spawn(async move {
                    let result = inner.dedup(sandbox, new_base).await;
                    if let Some(reply) = reply {
                        let _ = reply.send(result);
                    }
                });
            }
            Effect::Purge(sandbox) => {
                tokio::spawn(async move { inner.purge(sandbox).await });
            }
            Effect::Retired(deployed) => {
                tokio::spawn(async move { inner.forget(deployed).await });
            }
        }
    }

    /// Starts a sandbox and tells the table of it.
    pub(crate) async fn start(
        self: Arc<Self>,
        deployed: Arc<Deployed>,
        ticket: u64,
    ) -> Result<SandboxId, StartFailure> {
        let began = Instant::now();
        let function = deployed.spec.id;
        let result = self
            .guarded({
                let deployed = deployed.clone();
                move |inner| async move { inner.node.start(&deployed.spec).await }
            })
            .await
            .unwrap_or_else(|| Err(StartFailure::Sandbox("the node failed".into())));
        // A sandbox that ended at once was reported before anybody knew it.
        let result = result.and_then(|sandbox| match self.node.memory_of(sandbox) {
            Some(memory) => Ok((sandbox, memory.total())),
            None => Err(StartFailure::Sandbox("it ended as soon as it was started".into())),
        });
        let took_us = began.elapsed().as_micros() as u64;
        match result {
            Ok((sandbox, memory)) => {
                tracing::debug!(function = %deployed.spec.name, %sandbox, took_us, "started");
                self.change(|t, now| t.started(now, function, ticket, sandbox, took_us, memory));
                Ok(sandbox)
            }
            Err(failure) => {
                tracing::warn!(function = %deployed.spec.name, error = %failure, "not started");
                self.change(|t, now| t.start_failed(now, function, ticket, took_us, &failure));
                Err(failure)
            }
        }
    }

    async fn dedup(
        self: Arc<Self>,
        sandbox: SandboxId,
        new_base: bool,
    ) -> Result<DedupReport, DedupFailure> {
        let mode = self.with(|t, _| t.dedup_mode(sandbox, new_base));
        let result = self.run_dedup(sandbox, mode).await;
        match &result {
            Ok(report) => tracing::debug!(
                %sandbox,
                before = report.before.total(),
                after = report.after.total(),
                base = report.base_bytes,
                took_us = report.total_us,
                "deduplicated"
            ),
            Err(DedupFailure::Cancelled) => tracing::debug!(%sandbox, "dedup cancelled"),
            Err(failure) => tracing::info!(%sandbox, reason = %failure, "not deduplicated"),
        }
        self.change(|t, now| t.dedup_ended(now, sandbox, mode, &result));
        result
    }

    async fn run_dedup(
        self: &Arc<Self>,
        sandbox: SandboxId,
        mode: DedupMode,
    ) -> Result<DedupReport, DedupFailure> {
        if self.with(|t, _| t.dedup_is_unwanted(sandbox)) {
            return Err(DedupFailure::Cancelled);
        }
        self.guarded(move |inner| async move { inner.node.dedup(sandbox, mode).await })
            .await
            .unwrap_or_else(|| Err(DedupFailure::Lost("the node failed".into())))
    }

    async fn purge(self: Arc<Self>, sandbox: SandboxId) {
        self.guarded(move |inner| async move { inner.node.purge(sandbox).await }).await;
        tracing::debug!(%sandbox, "purged");
        self.change(|t, now| t.gone(now, sandbox));
    }

    async fn forget(self: Arc<Self>, deployed: Arc<Deployed>) {
        let name = deployed.spec.name.clone();
        let replaced = self.with(|t, _| t.function(&name)).is_some();
        self.guarded(move |inner| async move {
            inner.node.forget_function(&deployed.spec, replaced).await;
        })
        .await;
        if let Err(e) = self.clean_up_code().await {
            tracing::warn!(function = %name, error = %e, "outdated code remains on disk");
        }
        self.changed.notify_waiters();
    }

    /// Runs an operation of the node in a task of its own; `None` if it panicked, which must not
    /// take the caller's bookkeeping along.
    pub(crate) async fn guarded<T, F>(
        self: &Arc<Self>,
        operation: impl FnOnce(Arc<Self>) -> F,
    ) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let task = tokio::spawn(operation(self.clone()));
        match task.await {
            Ok(result) => Some(result),
            Err(e) => {
                tracing::error!(error = %e, "an operation of the node did not return");
                None
            }
        }
    }
}

impl<N> Drop for Inner<N> {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

/// Asks the policy when the time has come.
async fn lifecycle<N: NodeApi>(inner: Weak<Inner<N>>) {
    /// Longer than anybody wants to wait, and short enough for every timer.
    const LONGEST: Duration = Duration::from_secs(3600);
    loop {
        let Some(alive) = inner.upgrade() else { return };
        let next_ms = alive.with_memory(|t, now| t.tick(now).saturating_sub(now));
        let wake = alive.wake.clone();
        drop(alive);
        let _ = tokio::time::timeout(Duration::from_millis(next_ms).min(LONGEST), wake.notified())
            .await;
    }
}

/// Takes in what the node reports unasked.
async fn listen<N: NodeApi>(inner: Weak<Inner<N>>, mut events: mpsc::UnboundedReceiver<NodeEvent>) {
    while let Some(event) = events.recv().await {
        let Some(alive) = inner.upgrade() else { return };
        match event {
            NodeEvent::Idle { sandbox } => alive.change(|t, now| t.inherited_idle(now, sandbox)),
            NodeEvent::Gone { sandbox, how } => {
                tracing::info!(%sandbox, %how, "a sandbox ended by itself");
                alive.change(|t, now| t.ended_by_itself(now, sandbox));
            }
        }
    }
}
