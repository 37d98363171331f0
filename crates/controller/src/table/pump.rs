//! Matching waiting requests with sandboxes, and making more of those.

use std::sync::Arc;

use medes_core::{FunctionId, FunctionName, SandboxId, StartKind};
use medes_node::DedupMode;
use medes_policy::{FunctionStats, Need, choose};

use super::{Effect, Entry, Grant, Phase, Starting, Table, UNKNOWN_WARM_BYTES, Version, Waiter};
use crate::config::PartialRestore;
use crate::error::HandError;
use crate::store::Deployed;

/// Whether another sandbox may be started.
#[derive(PartialEq, Eq)]
pub(super) enum Admission {
    Granted,
    /// The function has as many as it may have.
    FunctionLimit,
    /// The node has no room.
    NodeLimit,
}

impl Table {
    /// Gives waiting requests what there is, oldest first, and starts what is missing.
    pub(super) fn pump(&mut self, now_ms: u64) {
        let mut order: Vec<(u64, FunctionId)> = self
            .versions
            .iter()
            .filter_map(|(id, v)| v.waiting.front().map(|w| (w.since_ms, *id)))
            .collect();
        order.sort();
        // First everybody's own: else room would be made for one function out of a sandbox that
        // another one is waiting for.
        for (_, function) in &order {
            self.hand_out(now_ms, *function);
        }
        for (_, function) in &order {
            // Who has waited longest for room on the node gets it first.
            if self.start_missing(now_ms, *function) == Admission::NodeLimit {
                break;
            }
        }
    }

    /// Gives a version's idle sandboxes to its waiting requests, as far as nobody has to give way.
    fn hand_out(&mut self, now_ms: u64, function: FunctionId) {
        loop {
            let Some(version) = self.versions.get(&function) else { return };
            if version.waiting.is_empty() {
                return;
            }
            let missing = version.waiting.len() > self.supply(version);
            let restorable = version.wants_restore();
            let candidates = version.sandboxes.iter().filter_map(|id| {
                let entry = self.sandboxes.get(id).filter(|e| !e.doomed)?;
                let fits = match entry.phase {
                    Phase::Warm => true,
                    Phase::Deduping => missing && !entry.claimed,
                    Phase::Dedup => restorable,
                    _ => false,
                };
                if fits { entry.idle() } else { None }
            });
            let Some(sandbox) = choose(candidates) else { return };
            let needed = self.sandboxes.get(&sandbox).map_or(0, Entry::restore_needs);
            // A restore has its memory reserved: while it is under way, it counts as used. One that
            // room has to be made for first takes its turn with the starts.
            if needed > 0 && self.pressure().excess(needed) > 0 {
                return;
            }
            self.take(now_ms, function, sandbox);
        }
    }

    /// Whether a restore may begin: its memory is there, or is being freed already. If not,
    /// whoever waits for it goes on waiting, for this or any other sandbox.
    fn admit_restore(&mut self, now_ms: u64, sandbox: SandboxId) -> bool {
        let needed = self.sandboxes.get(&sandbox).map_or(0, Entry::restore_needs);
        self.relieve(now_ms, needed);
        self.pressure().excess(needed) <= self.coming() || self.is_still()
    }

    /// Whether nothing is under way that could free memory in the end.
    fn is_still(&self) -> bool {
        self.versions.values().all(|v| v.starting.is_empty())
            && self.sandboxes.values().all(|e| matches!(e.phase, Phase::Warm | Phase::Dedup))
    }

    /// A dedup sandbox for a version's waiting requests: a restore takes less than a start.
    fn restorable(&self, version: &Version) -> Option<SandboxId> {
        let fits = |e: &&Entry| e.phase == Phase::Dedup && !e.doomed;
        let entries = version.sandboxes.iter().filter_map(|id| self.sandboxes.get(id));
        version.wants_restore().then(|| choose(entries.filter(fits).filter_map(Entry::idle)))?
    }

    /// Restores or starts a sandbox for each of a version's waiting requests that none is on its
    /// way to, as far as that is allowed.
    fn start_missing(&mut self, now_ms: u64, function: FunctionId) -> Admission {
        loop {
            let Some(version) = self.versions.get(&function) else { return Admission::Granted };
            if version.waiting.len() <= self.supply(version) {
                return Admission::Granted;
            }
            if let Some(sandbox) = self.restorable(version) {
                if !self.admit_restore(now_ms, sandbox) {
                    return Admission::NodeLimit;
                }
                self.take(now_ms, function, sandbox);
                continue;
            }
            match self.admit(now_ms, function) {
                Admission::Granted => {
                    if let Some(stats) = self.stats_of(function) {
                        stats.missed(now_ms);
                    }
                    self.start(now_ms, function, None);
                }
                other => return other,
            }
        }
    }

    /// Gives an idle sandbox to the first request that may have it, or asks for it.
    fn take(&mut self, now_ms: u64, function: FunctionId, sandbox: SandboxId) {
        let Some(version) = self.versions.get_mut(&function) else { return };
        let Some(entry) = self.sandboxes.get_mut(&sandbox) else { return };
        let deployed = version.deployed.clone();
        let gap_ms = now_ms.saturating_sub(entry.last_used_ms);
        let mut taken = false;
        match entry.phase {
            Phase::Deduping => {
                entry.claimed = true;
                self.effects.push(Effect::CancelDedup(sandbox));
            }
            Phase::Warm => {
                let Some(waiter) = version.waiting.pop_front() else { return };
                let grant =
                    Grant::Ready { sandbox, deployed, start: StartKind::Warm, startup_us: 0 };
                if waiter.grant.send(grant).is_ok() {
                    entry.enter(Phase::Running, now_ms);
                    taken = true;
                }
            }
            Phase::Dedup => {
                let at = version.waiting.iter().position(|w: &Waiter| w.restore_allowed);
                let waiter = at.and_then(|at| version.waiting.remove(at));
                let grant = Grant::Restore { sandbox, deployed };
                if waiter.is_some_and(|w| w.grant.send(grant).is_ok()) {
                    entry.enter(Phase::Restoring, now_ms);
                    entry.for_request = true;
                    taken = true;
                }
            }
            Phase::Running | Phase::Restoring | Phase::Leaving => {}
        }
        if taken && let Some(stats) = self.stats_of(function) {
            stats.reused(gap_ms);
        }
    }

    /// Starts a sandbox; `ahead` as in [`Starting`].
    pub(super) fn start(&mut self, now_ms: u64, function: FunctionId, ahead: Option<u64>) {
        let ticket = self.number();
        let expected_bytes = self.expected_bytes(function);
        let Some(version) = self.versions.get_mut(&function) else { return };
        version.starting.push(Starting { ticket, since_ms: now_ms, expected_bytes, ahead });
        self.effects.push(Effect::Start { deployed: version.deployed.clone(), ticket });
    }

    /// Begins a start that no request waits for: what has to be started, and the ticket for
    /// [`Table::started`] or [`Table::start_failed`].
    pub(crate) fn begin_start(
        &mut self,
        now_ms: u64,
        name: &FunctionName,
    ) -> Result<(Arc<Deployed>, u64), HandError> {
        let refused = |reason: &str| HandError::NotStarted {
            function: name.clone(),
            reason: reason.to_owned(),
        };
        if self.closing {
            return Err(refused("the platform is shutting down"));
        }
        let function = self.current.get(name).copied();
        let function = function.ok_or_else(|| HandError::NoSuchFunction(name.clone()))?;
        match self.admit(now_ms, function) {
            Admission::Granted => {}
            Admission::FunctionLimit => {
                return Err(refused("it has as many as its limit, max_sandboxes, allows"));
            }
            Admission::NodeLimit => return Err(refused("the node has no room for it now")),
        }
        let ticket = self.number();
        let expected_bytes = self.expected_bytes(function);
        let version = self.versions.get_mut(&function).ok_or_else(|| refused("it is gone"))?;
        version.starting.push(Starting { ticket, since_ms: now_ms, expected_bytes, ahead: None });
        Ok((version.deployed.clone(), ticket))
    }

    pub(super) fn admit(&mut self, now_ms: u64, function: FunctionId) -> Admission {
        let Some(version) = self.versions.get(&function) else { return Admission::FunctionLimit };
        let within = |limit: u32, count: usize| limit == 0 || count < limit as usize;
        let own = match version.deployed.spec.max_sandboxes {
            0 => self.config.max_sandboxes_per_function,
            limit => limit,
        };
        if !within(own, version.sandboxes.len() + version.starting.len()) {
            return Admission::FunctionLimit;
        }
        let starting: usize = self.versions.values().map(|v| v.starting.len()).sum();
        let all = self.sandboxes.len() + starting;
        if !within(self.config.max_sandboxes, all) {
            let leaving = self.sandboxes.values().filter(|e| e.phase == Phase::Leaving).count();
            if leaving == 0 {
                self.evict(now_ms, Need::Slots(1));
            }
            return Admission::NodeLimit;
        }
        let needed = self.expected_bytes(function);
        // With nothing running, nothing will ever be freed: one sandbox is always allowed.
        if all > 0 && self.pressure().excess(needed) > 0 {
            self.relieve(now_ms, needed);
            return Admission::NodeLimit;
        }
        Admission::Granted
    }

    pub(super) fn expected_bytes(&self, function: FunctionId) -> u64 {
        let Some(version) = self.versions.get(&function) else { return 0 };
        let spec = &version.deployed.spec;
        self.stats
            .get(&spec.name)
            .and_then(|s| s.expected_warm_bytes())
            .unwrap_or_else(|| UNKNOWN_WARM_BYTES.min(u64::from(spec.memory_mib) << 20))
    }

    /// Makes room for `more` bytes, beyond what is being freed already.
    pub(super) fn relieve(&mut self, now_ms: u64, more: u64) {
        let excess = self.pressure().excess(more);
        if excess == 0 {
            return;
        }
        let coming = self.coming();
        if excess > coming {
            self.evict(now_ms, Need::Bytes(excess - coming));
        }
    }

    /// Whether a sandbox that is restored now gets all its memory back, and not only what it
    /// touches.
    pub(crate) fn restores_all(&self) -> bool {
        match self.config.partial_restore {
            PartialRestore::Always => false,
            PartialRestore::Never => true,
            PartialRestore::Pressure => !self.is_short_of_memory(),
        }
    }

    /// How a sandbox is to be deduplicated now.
    pub(crate) fn dedup_mode(&self, sandbox: SandboxId, new_base: bool) -> DedupMode {
        let entry = self.sandboxes.get(&sandbox);
        let version = entry.and_then(|entry| self.versions.get(&entry.function));
        let stats = version.and_then(|version| self.stats.get(&version.deployed.spec.name));
        let execution_us = stats.and_then(FunctionStats::usual_execution_us).unwrap_or_default();
        let again = entry.is_some_and(|entry| entry.again);
        DedupMode { new_base, residents: !again && !self.is_short_of_memory(), execution_us }
    }

    /// Whether less memory is free than the headroom that dedup is to keep.
    fn is_short_of_memory(&self) -> bool {
        let pressure = self.pressure();
        let headroom = pressure.budget / 100 * u64::from(self.settings.headroom_percent);
        pressure.excess(headroom) > 0
    }

    /// What is being freed already, bytes.
    fn coming(&self) -> u64 {
        let frees = |e: &Entry| match e.phase {
            Phase::Leaving => e.memory,
            Phase::Deduping if !e.claimed => e.dedup_frees(),
            _ => 0,
        };
        self.sandboxes.values().map(frees).sum()
    }

    /// Has a policy that deduplicates do so before the memory is needed, so that a request in need
    /// of a sandbox does not have to wait for a dedup operation.
    pub(super) fn keep_headroom(&mut self, now_ms: u64) {
        if self.policy.dedups() && self.dedups < self.config.max_dedups.max(1) {
            let percent = u64::from(self.settings.headroom_percent);
            self.relieve(now_ms, self.pressure().budget / 100 * percent);
        }
    }
}
