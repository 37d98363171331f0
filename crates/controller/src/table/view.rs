//! What the table shows of itself.

use std::collections::BTreeMap;

use medes_core::{FunctionName, SandboxId, SandboxState};

use super::{Phase, Table};

/// One sandbox as it is shown. Periods are milliseconds, sizes bytes.
#[derive(Clone, Debug)]
pub(crate) struct SandboxRow {
    /// `None` while it is being started.
    pub(crate) id: Option<SandboxId>,
    pub(crate) function: FunctionName,
    pub(crate) state: SandboxState,
    pub(crate) age_ms: u64,
    pub(crate) idle_ms: u64,
    pub(crate) requests: u64,
    pub(crate) warm_bytes: u64,
    pub(crate) stays_warm: Option<String>,
    pub(crate) dedups: u64,
    pub(crate) restores: u64,
}

impl Table {
    /// Every sandbox, oldest first within its function.
    pub(crate) fn sandbox_rows(&self, now_ms: u64) -> Vec<SandboxRow> {
        let mut rows = Vec::new();
        for version in self.versions.values() {
            let function = &version.deployed.spec.name;
            for entry in version.sandboxes.iter().filter_map(|id| self.sandboxes.get(id)) {
                let Some(state) = entry.state() else { continue };
                let idle = matches!(entry.phase, Phase::Warm | Phase::Deduping | Phase::Dedup);
                rows.push(SandboxRow {
                    id: Some(entry.id),
                    function: function.clone(),
                    state,
                    age_ms: now_ms.saturating_sub(entry.created_ms),
                    idle_ms: if idle { now_ms.saturating_sub(entry.last_used_ms) } else { 0 },
                    requests: entry.requests,
                    warm_bytes: entry.warm_bytes,
                    stays_warm: entry.stays_warm.as_ref().map(|s| s.reason.clone()),
                    dedups: entry.dedups,
                    restores: entry.restores,
                });
            }
            rows.extend(version.starting.iter().map(|s| SandboxRow {
                id: None,
                function: function.clone(),
                state: SandboxState::Starting,
                age_ms: now_ms.saturating_sub(s.since_ms),
                idle_ms: 0,
                requests: 0,
                warm_bytes: 0,
                stays_warm: None,
                dedups: 0,
                restores: 0,
            }));
        }
        rows.sort_by(|a, b| {
            a.function.cmp(&b.function).then(b.age_ms.cmp(&a.age_ms)).then(a.id.cmp(&b.id))
        });
        rows
    }

    /// How many sandboxes there are in each state.
    pub(crate) fn sandbox_counts(&self) -> BTreeMap<SandboxState, u64> {
        let mut counts = BTreeMap::new();
        for state in self.sandboxes.values().filter_map(super::Entry::state) {
            *counts.entry(state).or_default() += 1;
        }
        let starting: usize = self.versions.values().map(|v| v.starting.len()).sum();
        if starting > 0 {
            counts.insert(SandboxState::Starting, starting as u64);
        }
        counts
    }

    /// The sandboxes of a function's current version, with their states.
    pub(crate) fn sandboxes_of(
        &self,
        name: &FunctionName,
    ) -> Option<Vec<(SandboxId, SandboxState)>> {
        let version = &self.versions[self.current.get(name)?];
        let mut found: Vec<_> = version
            .sandboxes
            .iter()
            .filter_map(|id| Some((*id, self.sandboxes.get(id)?.state()?)))
            .collect();
        found.sort();
        Some(found)
    }

    /// How many sandboxes a function has, those being started included.
    pub(crate) fn sandbox_count(&self, name: &FunctionName) -> u64 {
        self.current.get(name).map_or(0, |id| {
            let version = &self.versions[id];
            (version.sandboxes.len() + version.starting.len()) as u64
        })
    }

    /// Whether the table knows the sandbox, even if it is being ended.
    pub(crate) fn knows(&self, sandbox: SandboxId) -> bool {
        self.sandboxes.contains_key(&sandbox)
    }
}
