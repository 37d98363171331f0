//! The table: every function version, every sandbox, every waiting request, in one place.
//!
//! The table is plain data behind one mutex. Its methods change it and note what has to be done
//! about it as [`Effect`]s, which the caller carries out after it has let go of the lock; nothing
//! here waits. Requests never look for a sandbox themselves: each becomes a waiter, and whatever
//! happens (a sandbox is free, a start has ended, memory is back) calls [`Table::pump`], which
//! matches waiters with sandboxes, oldest first, and makes more of them if it may. So a request
//! takes whichever comes first: the sandbox that is started for it, or one that becomes free.

mod closing;
mod entry;
mod functions;
mod idle;
mod policy;
mod pump;
mod view;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use medes_core::{FunctionId, FunctionName, SandboxId, SandboxState, StartKind};
use medes_node::{
    DedupFailure, DedupMode, DedupReport, Inheritance, InheritedSandbox, NodeMemory, StartFailure,
};
use medes_policy::{AgingClock, FunctionStats, Policy, PolicySettings, Pressure};
use tokio::sync::oneshot;

use crate::config::ControllerConfig;
use crate::error::InvokeError;
use crate::store::Deployed;

pub(crate) use entry::{Entry, Phase, StaysWarm};
pub(crate) use idle::DedupRefused;

/// What a start is expected to need before a function's first sandbox was measured, bytes.
const UNKNOWN_WARM_BYTES: u64 = 64 << 20;

/// Who wants to know how a dedup operation ended.
pub(crate) type DedupReply = oneshot::Sender<Result<DedupReport, DedupFailure>>;

/// Something to be done once the lock is released.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Start a sandbox; then [`Table::started`] or [`Table::start_failed`].
    Start { deployed: Arc<Deployed>, ticket: u64 },
    /// Deduplicate a sandbox; then [`Table::dedup_ended`].
    Dedup { sandbox: SandboxId, new_base: bool, reply: Option<DedupReply> },
    /// Ask a dedup operation to give up.
    CancelDedup(SandboxId),
    /// End a sandbox; then [`Table::gone`].
    Purge(SandboxId),
    /// A version that was replaced or removed has no sandbox and no request any more.
    Retired(Arc<Deployed>),
    /// Call [`Table::tick`] earlier than planned.
    Wake,
}

/// What a waiting request gets.
#[derive(Debug)]
pub(crate) enum Grant {
    /// A sandbox, warm and running for this request.
    Ready { sandbox: SandboxId, deployed: Arc<Deployed>, start: StartKind, startup_us: u64 },
    /// A dedup sandbox that the request has to restore.
    Restore { sandbox: SandboxId, deployed: Arc<Deployed> },
    /// The sandbox that was to be started for it could not be.
    StartFailed { failure: StartFailure, deployed: Arc<Deployed>, startup_us: u64 },
    /// Nothing, and nothing will come.
    Refused(InvokeError),
}

/// Where a waiting request stands.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) function: FunctionId,
    pub(crate) waiter: u64,
    pub(crate) granted: oneshot::Receiver<Grant>,
}

struct Waiter {
    id: u64,
    since_ms: u64,
    /// False for a request whose restore failed once: it does not try its luck with another.
    restore_allowed: bool,
    grant: oneshot::Sender<Grant>,
}

struct Starting {
    ticket: u64,
    since_ms: u64,
    expected_bytes: u64,
    /// For one that is made ahead of a request: when the function was last used.
    ahead: Option<u64>,
}

/// One deployed version of a function.
struct Version {
    deployed: Arc<Deployed>,
    /// False once it was replaced or removed: it serves what waits, then it goes.
    current: bool,
    sandboxes: HashSet<SandboxId>,
    starting: Vec<Starting>,
    waiting: VecDeque<Waiter>,
    /// Base snapshots made so far.
    bases: u64,
    /// When its last request ended; 0 before the first.
    last_used_ms: u64,
    /// When the policy wants a sandbox to be there again, unless a request comes first.
    prewarm_at_ms: Option<u64>,
}

/// See the module.
pub(crate) struct Table {
    config: Arc<ControllerConfig>,
    settings: PolicySettings,
    policy: Box<dyn Policy>,
    /// What the policy remembers from one eviction to the next.
    clock: AgingClock,
    /// When the policy wants to look at all functions.
    next_plan_ms: u64,
    versions: HashMap<FunctionId, Version>,
    current: BTreeMap<FunctionName, FunctionId>,
    stats: HashMap<FunctionName, FunctionStats>,
    sandboxes: HashMap<SandboxId, Entry>,
    /// The node's last reading.
    memory: NodeMemory,
    /// Dedup operations under way.
    dedups: u32,
    /// When [`Table::tick`] is going to be called.
    next_tick_ms: u64,
    next_number: u64,
    closing: bool,
    /// Closing, and sandboxes stay.
    leaving: bool,
    effects: Vec<Effect>,
}

impl Table {
    pub(crate) fn new(
        config: Arc<ControllerConfig>,
        settings: PolicySettings,
        memory: NodeMemory,
    ) -> Self {
        Self {
            settings,
            policy: settings.config().build(),
            clock: AgingClock::default(),
            next_plan_ms: 0,
            config,
            versions: HashMap::new(),
            current: BTreeMap::new(),
            stats: HashMap::new(),
            sandboxes: HashMap::new(),
            memory,
            dedups: 0,
            next_tick_ms: u64::MAX,
            next_number: 0,
            closing: false,
            leaving: false,
            effects: Vec::new(),
        }
    }

    /// What is to be done, in this order.
    pub(crate) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Takes in a new reading of the node's memory.
    pub(crate) fn set_memory(&mut self, memory: NodeMemory) {
        self.memory = memory;
    }

    /// Adds a request. It may have been granted a sandbox when this returns. `again` is for one
    /// whose restore failed: it goes to the front and is not restored again.
    pub(crate) fn enqueue(
        &mut self,
        now_ms: u64,
        name: &FunctionName,
        again: bool,
    ) -> Result<Ticket, InvokeError> {
        let refused = || InvokeError::NoSuchFunction(name.clone());
        if self.closing && !again {
            return Err(InvokeError::ShuttingDown);
        }
        let function = *self.current.get(name).ok_or_else(refused)?;
        let number = self.number();
        let (grant, granted) = oneshot::channel();
        let waiter = Waiter { id: number, since_ms: now_ms, restore_allowed: !again, grant };
        let version = self.versions.get_mut(&function).ok_or_else(refused)?;
        if again {
            version.waiting.push_front(waiter);
        } else {
            version.waiting.push_back(waiter);
            version.prewarm_at_ms = None;
            self.stats.entry(name.clone()).or_default().arrived(now_ms);
        }
        self.pump(now_ms);
        let uncovered = self.uncovered(function);
        if uncovered > self.config.queue_limit && !again && self.leave_queue(function, number) {
            return Err(InvokeError::QueueFull {
                function: name.clone(),
                limit: self.config.queue_limit,
            });
        }
        Ok(Ticket { function, waiter: number, granted })
    }

    /// Takes a request out of the queue; false if it has been granted something already.
    pub(crate) fn leave_queue(&mut self, function: FunctionId, waiter: u64) -> bool {
        let Some(version) = self.versions.get_mut(&function) else { return false };
        let Some(at) = version.waiting.iter().position(|w| w.id == waiter) else { return false };
        version.waiting.remove(at);
        self.retire(function);
        true
    }

    /// Whether a sandbox is being made ready for this request.
    pub(crate) fn is_covered(&self, function: FunctionId, waiter: u64) -> bool {
        let Some(version) = self.versions.get(&function) else { return false };
        let at = version.waiting.iter().position(|w| w.id == waiter);
        at.is_some_and(|at| at < self.supply(version))
    }

    /// How many waiting requests no sandbox is being made ready for.
    fn uncovered(&self, function: FunctionId) -> usize {
        self.versions.get(&function).map_or(0, |v| v.waiting.len().saturating_sub(self.supply(v)))
    }

    /// How many sandboxes of a version are on their way to its waiting requests.
    fn supply(&self, version: &Version) -> usize {
        version.starting.len()
            + version
                .sandboxes
                .iter()
                .filter(|id| self.sandboxes.get(id).is_some_and(Entry::on_its_way))
                .count()
    }

    /// A sandbox was started; `memory` is what it uses, bytes.
    pub(crate) fn started(
        &mut self,
        now_ms: u64,
        function: FunctionId,
        ticket: u64,
        sandbox: SandboxId,
        startup_us: u64,
        memory: u64,
    ) {
        let mut entry = Entry::new(sandbox, function, now_ms);
        entry.memory = memory;
        entry.warm_bytes = memory;
        self.sandboxes.insert(sandbox, entry);
        let Some(version) = self.versions.get_mut(&function) else {
            self.purge(sandbox);
            return;
        };
        let begun = version.starting.iter().position(|s| s.ticket == ticket);
        let ahead = begun.and_then(|at| version.starting.swap_remove(at).ahead);
        version.sandboxes.insert(sandbox);
        while let Some(waiter) = version.waiting.pop_front() {
            let grant = Grant::Ready {
                sandbox,
                deployed: version.deployed.clone(),
                start: StartKind::Cold,
                startup_us,
            };
            if waiter.grant.send(grant).is_ok() {
                self.pump(now_ms);
                return;
            }
        }
        if let (Some(last_used_ms), Some(entry)) = (ahead, self.sandboxes.get_mut(&sandbox)) {
            entry.last_used_ms = last_used_ms;
        }
        self.free(now_ms, sandbox);
    }

    /// Takes in what the node has inherited. Returns the sandboxes that no function of now has.
    pub(crate) fn adopt(&mut self, now_ms: u64, inheritance: &Inheritance) -> Vec<SandboxId> {
        let mut unwanted = Vec::new();
        for inherited in &inheritance.sandboxes {
            let InheritedSandbox { sandbox, function, domain, state, warm_bytes, kept_bytes } =
                *inherited;
            let version = self.versions.get_mut(&function);
            let Some(version) = version.filter(|v| v.deployed.spec.domain == domain) else {
                unwanted.push(sandbox);
                continue;
            };
            version.sandboxes.insert(sandbox);
            let mut entry = Entry::new(sandbox, function, now_ms);
            entry.warm_bytes = warm_bytes;
            entry.memory = warm_bytes;
            entry.residents = kept_bytes;
            match state {
                SandboxState::Dedup => entry.enter(Phase::Dedup, now_ms),
                SandboxState::Warm => entry.enter(Phase::Warm, now_ms),
                _ => entry.inherited = true,
            }
            self.sandboxes.insert(sandbox, entry);
            self.ask_policy(now_ms, sandbox);
        }
        for (function, bases) in &inheritance.bases {
            if let Some(version) = self.versions.get_mut(function) {
                version.bases = *bases;
            }
        }
        unwanted
    }

    /// A sandbox that was inherited running has nothing to do any more.
    pub(crate) fn inherited_idle(&mut self, now_ms: u64, sandbox: SandboxId) {
        if self.sandboxes.get(&sandbox).is_some_and(|e| e.inherited) {
            self.free(now_ms, sandbox);
        }
    }

    /// A sandbox could not be started: the request that has waited longest is told so.
    pub(crate) fn start_failed(
        &mut self,
        now_ms: u64,
        function: FunctionId,
        ticket: u64,
        startup_us: u64,
        failure: &StartFailure,
    ) {
        let Some(version) = self.versions.get_mut(&function) else { return };
        version.starting.retain(|s| s.ticket != ticket);
        while let Some(waiter) = version.waiting.pop_front() {
            let grant = Grant::StartFailed {
                failure: failure.clone(),
                deployed: version.deployed.clone(),
                startup_us,
            };
            if waiter.grant.send(grant).is_ok() {
                break;
            }
        }
        self.retire(function);
        self.pump(now_ms);
    }

    /// A request that the sandbox served is over.
    pub(crate) fn finished(&mut self, now_ms: u64, sandbox: SandboxId) {
        if let Some(entry) = self.sandboxes.get_mut(&sandbox) {
            entry.requests += 1;
            entry.last_used_ms = now_ms;
            if let Some(version) = self.versions.get_mut(&entry.function) {
                version.last_used_ms = now_ms;
            }
            if entry.stays_warm.as_ref().is_some_and(|s| !s.lasting) {
                entry.stays_warm = None;
            }
            self.free(now_ms, sandbox);
        }
    }

    /// A restore for a request went well. False if the sandbox is being purged.
    pub(crate) fn restored(&mut self, now_ms: u64, sandbox: SandboxId) -> bool {
        let Some(entry) = self.sandboxes.get_mut(&sandbox) else { return false };
        if entry.phase != Phase::Restoring {
            return false;
        }
        entry.restores += 1;
        entry.memory = entry.warm_bytes;
        let (function, image_bytes) = (entry.function, entry.image_bytes);
        entry.enter(Phase::Running, now_ms);
        let doomed = entry.doomed;
        if let Some(stats) = self.stats_of(function) {
            stats.restore_memory(image_bytes);
        }
        if doomed {
            self.purge(sandbox);
            return false;
        }
        true
    }

    /// A restore that an operator asked for went well.
    pub(crate) fn restored_by_hand(&mut self, now_ms: u64, sandbox: SandboxId) {
        if self.restored(now_ms, sandbox) {
            self.free(now_ms, sandbox);
        }
    }

    /// A dedup operation is over.
    pub(crate) fn dedup_ended(
        &mut self,
        now_ms: u64,
        sandbox: SandboxId,
        mode: DedupMode,
        result: &Result<DedupReport, DedupFailure>,
    ) {
        self.dedups = self.dedups.saturating_sub(1);
        // Another may begin now.
        self.effects.push(Effect::Wake);
        let Some(entry) = self.sandboxes.get_mut(&sandbox) else { return };
        let function = entry.function;
        let (again, before_ms) = (entry.again, entry.before_ms);
        // It was not warm before.
        let warm_since_ms = if again { now_ms } else { before_ms };
        match result {
            Ok(report) => {
                entry.dedups += 1;
                if !again {
                    entry.warm_bytes = report.before.total();
                }
                entry.memory = report.after.total();
                entry.residents = if mode.residents { report.kept_bytes() } else { 0 };
                entry.image_bytes = report.after.store + report.after.metadata;
                entry.stays_warm = None;
                entry.enter(Phase::Dedup, if again { before_ms } else { now_ms });
                if let Some(version) = self.versions.get_mut(&function) {
                    version.bases += u64::from(report.base_bytes > 0);
                }
                if let Some(stats) = self.stats_of(function) {
                    if !again {
                        stats.warm_memory(report.before.total());
                    }
                    stats.dedup_memory(report.after.total());
                }
                self.settle(now_ms, sandbox);
            }
            Err(DedupFailure::Cancelled) => self.free_since(now_ms, warm_since_ms, sandbox),
            Err(DedupFailure::StaysWarm { reason, lasting }) => {
                entry.stays_warm = Some(StaysWarm {
                    reason: reason.clone(),
                    lasting: *lasting,
                    retry_at_ms: now_ms.saturating_add(self.config.dedup_retry_ms),
                });
                self.free_since(now_ms, warm_since_ms, sandbox);
            }
            Err(DedupFailure::Lost(_)) => self.gone(now_ms, sandbox),
        }
    }

    /// A sandbox has nothing to do: a waiting request takes it, or it stays as the policy decides.
    pub(crate) fn free(&mut self, now_ms: u64, sandbox: SandboxId) {
        self.free_since(now_ms, now_ms, sandbox);
    }

    /// Like [`Table::free`], but its time as a warm sandbox is counted from `since_ms`.
    fn free_since(&mut self, now_ms: u64, since_ms: u64, sandbox: SandboxId) {
        let Some(entry) = self.sandboxes.get_mut(&sandbox) else { return };
        if entry.phase == Phase::Leaving {
            return;
        }
        entry.enter(Phase::Warm, since_ms);
        self.settle(now_ms, sandbox);
    }

    /// Finds a place for a sandbox that has just become warm or dedup.
    fn settle(&mut self, now_ms: u64, sandbox: SandboxId) {
        let Some(entry) = self.sandboxes.get(&sandbox) else { return };
        let function = entry.function;
        if entry.doomed {
            self.purge(sandbox);
            return;
        }
        self.pump(now_ms);
        let idle = |e: &Entry| matches!(e.phase, Phase::Warm | Phase::Dedup);
        if self.sandboxes.get(&sandbox).is_some_and(idle) {
            if self.closing && !self.leaving {
                self.purge(sandbox);
            } else if !self.leaving {
                self.ask_policy(now_ms, sandbox);
            }
        }
        self.retire(function);
    }

    /// A sandbox does not exist any more.
    pub(crate) fn gone(&mut self, now_ms: u64, sandbox: SandboxId) {
        let Some(entry) = self.sandboxes.remove(&sandbox) else { return };
        if let Some(version) = self.versions.get_mut(&entry.function) {
            version.sandboxes.remove(&sandbox);
        }
        self.retire(entry.function);
        self.pump(now_ms);
        self.plan_prewarm(now_ms, entry.function);
    }

    /// The node saw a sandbox end by itself. If an operation on it is under way, that one's own
    /// answer says what to do.
    pub(crate) fn ended_by_itself(&mut self, now_ms: u64, sandbox: SandboxId) {
        match self.sandboxes.get_mut(&sandbox).map(|e| (e.phase, e)) {
            Some((Phase::Warm | Phase::Dedup, _)) => self.gone(now_ms, sandbox),
            Some((_, entry)) if entry.inherited => self.gone(now_ms, sandbox),
            Some((_, entry)) => entry.doomed = true,
            None => {}
        }
    }

    /// Ends a sandbox, whatever it is doing: at once, or as soon as a dedup or restore that is
    /// under way has come to its end.
    pub(crate) fn purge(&mut self, sandbox: SandboxId) {
        let Some(entry) = self.sandboxes.get_mut(&sandbox) else { return };
        match entry.phase {
            Phase::Leaving | Phase::Restoring => {}
            Phase::Deduping if entry.doomed => {}
            Phase::Deduping => self.effects.push(Effect::CancelDedup(sandbox)),
            Phase::Running | Phase::Warm | Phase::Dedup => {
                entry.phase = Phase::Leaving;
                self.effects.push(Effect::Purge(sandbox));
            }
        }
        entry.doomed = true;
    }

    /// Takes in what a warm sandbox uses, bytes.
    pub(crate) fn note_warm_memory(&mut self, sandbox: SandboxId, bytes: u64) {
        let Some(entry) = self.sandboxes.get_mut(&sandbox) else { return };
        if !matches!(entry.phase, Phase::Warm | Phase::Running) {
            return;
        }
        entry.memory = bytes;
        entry.warm_bytes = bytes;
        let function = entry.function;
        if let Some(stats) = self.stats_of(function) {
            stats.warm_memory(bytes);
        }
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// The node's memory with what is promised to starts and restores under way.
    fn pressure(&self) -> Pressure {
        let m = &self.memory;
        let starting: u64 =
            self.versions.values().flat_map(|v| v.starting.iter().map(|s| s.expected_bytes)).sum();
        let under_way = |e: &&Entry| e.phase == Phase::Restoring;
        let restoring: u64 =
            self.sandboxes.values().filter(under_way).map(Entry::restore_needs).sum();
        let budget = match (self.config.memory_budget, m.budget) {
            (0, node) => node,
            (own, 0) => own,
            (own, node) => own.min(node),
        };
        Pressure {
            used: m.sandboxes + m.base + m.patches + m.registry + starting + restoring,
            budget,
        }
    }
}
