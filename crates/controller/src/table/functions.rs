//! Function versions: which one is current, and the end of the others.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use medes_core::{FunctionId, FunctionName};
use medes_policy::FunctionStats;

use super::{Effect, Grant, Phase, Table, Version};
use crate::error::InvokeError;
use crate::store::Deployed;

impl Table {
    /// Makes `deployed` the version that new requests of its name go to.
    pub(crate) fn install(&mut self, now_ms: u64, deployed: Arc<Deployed>) {
        let id = deployed.spec.id;
        let name = deployed.spec.name.clone();
        let settings = deployed.settings;
        self.versions.insert(
            id,
            Version {
                deployed,
                current: true,
                sandboxes: HashSet::new(),
                starting: Vec::new(),
                waiting: VecDeque::new(),
                bases: 0,
                last_used_ms: now_ms,
                prewarm_at_ms: None,
            },
        );
        self.stats.entry(name.clone()).or_default().settings = settings;
        if let Some(old) = self.current.insert(name, id) {
            self.drain(now_ms, old);
        }
    }

    /// Removes a function: requests that wait are refused, those that run may end.
    pub(crate) fn uninstall(&mut self, now_ms: u64, name: &FunctionName) -> bool {
        let Some(id) = self.current.remove(name) else { return false };
        self.stats.remove(name);
        if let Some(version) = self.versions.get_mut(&id) {
            for waiter in version.waiting.drain(..) {
                let refusal = InvokeError::NoSuchFunction(name.clone());
                let _ = waiter.grant.send(Grant::Refused(refusal));
            }
        }
        self.drain(now_ms, id);
        true
    }

    fn drain(&mut self, now_ms: u64, id: FunctionId) {
        if let Some(version) = self.versions.get_mut(&id) {
            version.current = false;
        }
        self.retire(id);
        self.pump(now_ms);
    }

    /// Ends what an outdated version does not need any more, and the version itself once nothing
    /// is left of it.
    pub(super) fn retire(&mut self, id: FunctionId) {
        let Some(version) = self.versions.get(&id) else { return };
        if version.current || !version.waiting.is_empty() {
            return;
        }
        for sandbox in version.sandboxes.iter().copied().collect::<Vec<_>>() {
            let unused = self.sandboxes.get(&sandbox).is_some_and(|e| match e.phase {
                Phase::Warm | Phase::Dedup | Phase::Deduping => true,
                Phase::Restoring => !e.for_request,
                Phase::Running | Phase::Leaving => false,
            });
            if unused {
                self.purge(sandbox);
            }
        }
        let done =
            self.versions.get(&id).is_some_and(|v| v.sandboxes.is_empty() && v.starting.is_empty());
        if done && let Some(version) = self.versions.remove(&id) {
            self.effects.push(Effect::Retired(version.deployed));
        }
    }

    pub(crate) fn function(&self, name: &FunctionName) -> Option<Arc<Deployed>> {
        let id = self.current.get(name)?;
        Some(self.versions[id].deployed.clone())
    }

    pub(crate) fn functions(&self) -> Vec<Arc<Deployed>> {
        self.current.values().map(|id| self.versions[id].deployed.clone()).collect()
    }

    /// Every version that still has something to do, replaced ones included.
    pub(crate) fn all_versions(&self) -> Vec<Arc<Deployed>> {
        self.versions.values().map(|v| v.deployed.clone()).collect()
    }

    pub(crate) fn stats_mut(&mut self, name: &FunctionName) -> Option<&mut FunctionStats> {
        self.stats.get_mut(name)
    }

    /// The statistics of the function that a version belongs to.
    pub(crate) fn stats_of(&mut self, id: FunctionId) -> Option<&mut FunctionStats> {
        let version = self.versions.get(&id)?;
        self.stats.get_mut(&version.deployed.spec.name)
    }

    pub(crate) fn stats(&self, name: &FunctionName) -> Option<&FunctionStats> {
        self.stats.get(name)
    }
}
