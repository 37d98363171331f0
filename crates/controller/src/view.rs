//! What users see of functions and sandboxes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use medes_core::{
    DomainId, FunctionId, FunctionName, FunctionSpec, Layout, MemoryUse, SandboxState, StartKind,
    Tenant,
};
use medes_node::{NodeApi, NodeMemory};
use medes_policy::{FunctionSettings, StatsSummary};
use serde::{Deserialize, Serialize};

use crate::config::ControllerConfig;
use crate::controller::Controller;
use crate::store::Deployed;

/// Requests of a function since the platform was started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// That waited for a cold start.
    pub cold: u64,
    /// That found a warm sandbox.
    pub warm: u64,
    /// That found a dedup sandbox.
    pub dedup: u64,
    /// That ended in an error.
    pub errors: u64,
}

/// A function as it is shown: its settings without the layout seed, which is a secret.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FunctionView {
    /// This version's identifier.
    pub id: FunctionId,
    /// The name.
    pub name: FunctionName,
    /// Whose function it is.
    pub tenant: Tenant,
    /// Whose base pages its sandboxes may use.
    pub domain: DomainId,
    /// The runtime.
    pub runtime: String,
    /// The handler.
    pub handler: String,
    /// The directory with the unpacked code.
    pub code: PathBuf,
    /// Base64 of the SHA-256 of the code archive.
    pub code_sha256: String,
    /// The size of the code archive, bytes.
    pub code_size: u64,
    /// The layers' directories.
    pub layers: Vec<PathBuf>,
    /// Environment variables.
    pub environment: BTreeMap<String, String>,
    /// Memory limit of one sandbox, MiB.
    pub memory_mib: u32,
    /// How long one request may run, milliseconds.
    pub timeout_ms: u64,
    /// At most this many sandboxes at once; 0 for the platform's default.
    pub max_sandboxes: u32,
    /// Which sandboxes share one address-space layout.
    pub layout: Layout,
    /// A description.
    pub description: String,
    /// When this version was deployed, milliseconds since 1970.
    pub deployed_at_ms: u64,
    /// Requests since the platform was started.
    pub counts: Counts,
    /// Sandboxes now.
    pub sandboxes: u64,
    /// What was set of the policy for this function alone.
    pub policy: FunctionSettings,
    /// Times, rates and sizes measured since the platform was started.
    pub stats: StatsSummary,
}

/// A sandbox as it is shown. Periods are milliseconds, sizes bytes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SandboxView {
    /// Its identifier; `-` while it is being started.
    pub id: String,
    /// Its function.
    pub function: FunctionName,
    /// What it is doing.
    pub state: SandboxState,
    /// How long it has been there.
    pub age_ms: u64,
    /// How long it has served no request; 0 while it does.
    pub idle_ms: u64,
    /// How many requests it has served.
    pub requests: u64,
    /// What it uses.
    pub memory: MemoryUse,
    /// All of that together.
    pub memory_total: u64,
    /// The last total measured while it was warm.
    pub warm_bytes: u64,
    /// What part of that is saved (0 to 1), in the dedup state.
    pub saved: Option<f64>,
    /// Why it is not deduplicated, if it can't be.
    pub stays_warm: Option<String>,
    /// How often it was deduplicated.
    pub dedups: u64,
    /// How often it was restored.
    pub restores: u64,
}

/// What one tenant has. Sizes are bytes.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct TenantView {
    /// Its name.
    pub tenant: Tenant,
    /// Whose base pages its sandboxes may use.
    pub domain: DomainId,
    /// Its functions.
    pub functions: u64,
    /// Its sandboxes.
    pub sandboxes: u64,
    /// What its sandboxes use: private and kernel memory, and what the page store keeps for them
    /// alone.
    pub memory: MemoryUse,
    /// Base snapshots of its dedup domain, which it may share with tenants joined with it.
    pub base_bytes: u64,
}

/// The platform as it is shown.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Info {
    /// The node's memory.
    pub memory: NodeMemory,
    /// Runtimes that are installed.
    pub runtimes: Vec<String>,
    /// The settings in force.
    pub config: ControllerConfig,
    /// How many functions there are.
    pub functions: u64,
    /// How many sandboxes there are in each state.
    pub sandboxes: BTreeMap<SandboxState, u64>,
    /// How long the controller has been running, milliseconds.
    pub uptime_ms: u64,
}

impl<N: NodeApi> Controller<N> {
    /// The platform as a whole.
    #[must_use]
    pub fn info(&self) -> Info {
        let inner = &self.inner;
        let (functions, sandboxes, policy) = inner
            .with(|t, _| (t.functions().len() as u64, t.sandbox_counts(), t.policy_settings()));
        Info {
            memory: inner.node.memory(),
            runtimes: inner.node.runtimes(),
            config: ControllerConfig { policy, ..(*inner.config).clone() },
            functions,
            sandboxes,
            uptime_ms: inner.now_ms(),
        }
    }

    /// How long the controller has been running, milliseconds.
    #[must_use]
    pub fn uptime_ms(&self) -> u64 {
        self.inner.now_ms()
    }

    /// A deployed function.
    #[must_use]
    pub fn deployed(&self, name: &FunctionName) -> Option<std::sync::Arc<Deployed>> {
        self.inner.with(|t, _| t.function(name))
    }

    /// All deployed functions, by name.
    #[must_use]
    pub fn all_deployed(&self) -> Vec<std::sync::Arc<Deployed>> {
        self.inner.with(|t, _| t.functions())
    }

    /// All functions, by name.
    #[must_use]
    pub fn functions(&self) -> Vec<FunctionView> {
        self.inner
            .with(|t, now| t.functions().iter().filter_map(|d| view(t, now, &d.spec)).collect())
    }

    /// One function.
    #[must_use]
    pub fn function(&self, name: &FunctionName) -> Option<FunctionView> {
        self.inner.with(|t, now| view(t, now, &t.function(name)?.spec))
    }

    /// All tenants that have a function, by name.
    #[must_use]
    pub fn tenants(&self) -> Vec<TenantView> {
        let mut tenants: BTreeMap<Tenant, TenantView> = BTreeMap::new();
        let mut owners: BTreeMap<FunctionName, Tenant> = BTreeMap::new();
        for deployed in self.all_deployed() {
            let spec = &deployed.spec;
            owners.insert(spec.name.clone(), spec.tenant.clone());
            let view = tenants.entry(spec.tenant.clone()).or_insert_with(|| TenantView {
                tenant: spec.tenant.clone(),
                domain: spec.domain,
                base_bytes: self.inner.node.base_bytes(spec.domain),
                ..TenantView::default()
            });
            view.functions += 1;
        }
        for sandbox in self.sandboxes() {
            let owner = owners.get(&sandbox.function);
            if let Some(view) = owner.and_then(|owner| tenants.get_mut(owner)) {
                view.sandboxes += 1;
                view.memory.private += sandbox.memory.private;
                view.memory.kernel += sandbox.memory.kernel;
                view.memory.store += sandbox.memory.store;
                view.memory.metadata += sandbox.memory.metadata;
            }
        }
        tenants.into_values().collect()
    }

    /// All sandboxes, by function, oldest first.
    #[must_use]
    pub fn sandboxes(&self) -> Vec<SandboxView> {
        let rows = self.inner.with(|t, now| t.sandbox_rows(now));
        rows.into_iter()
            .map(|row| {
                // Asked of the node without the lock: it reads files of the kernel for this.
                let memory =
                    row.id.and_then(|id| self.inner.node.memory_of(id)).unwrap_or_default();
                let total = memory.total();
                let mut warm_bytes = row.warm_bytes;
                if row.state == SandboxState::Warm
                    && total > 0
                    && let Some(id) = row.id
                {
                    warm_bytes = total;
                    self.inner.with(|t, _| t.note_warm_memory(id, total));
                }
                let saved = (row.state == SandboxState::Dedup && warm_bytes > 0)
                    .then(|| (1.0 - total as f64 / warm_bytes as f64).clamp(0.0, 1.0));
                SandboxView {
                    id: row.id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
                    function: row.function,
                    state: row.state,
                    age_ms: row.age_ms,
                    idle_ms: row.idle_ms,
                    requests: row.requests,
                    memory,
                    memory_total: total,
                    warm_bytes,
                    saved,
                    stays_warm: row.stays_warm,
                    dedups: row.dedups,
                    restores: row.restores,
                }
            })
            .collect()
    }
}

fn view(table: &crate::table::Table, now_ms: u64, spec: &FunctionSpec) -> Option<FunctionView> {
    let stats = table.stats(&spec.name)?;
    let s = spec.clone();
    Some(FunctionView {
        counts: Counts {
            cold: stats.starts(StartKind::Cold),
            warm: stats.starts(StartKind::Warm),
            dedup: stats.starts(StartKind::Dedup),
            errors: stats.errors,
        },
        sandboxes: table.sandbox_count(&spec.name),
        policy: stats.settings,
        stats: stats.summary(now_ms),
        id: s.id,
        name: s.name,
        tenant: s.tenant,
        domain: s.domain,
        runtime: s.runtime,
        handler: s.handler,
        code: s.code,
        code_sha256: s.code_sha256,
        code_size: s.code_size,
        layers: s.layers,
        environment: s.environment,
        memory_mib: s.memory_mib,
        timeout_ms: s.timeout_ms,
        max_sandboxes: s.max_sandboxes,
        layout: s.layout,
        description: s.description,
        deployed_at_ms: s.deployed_at_ms,
    })
}
