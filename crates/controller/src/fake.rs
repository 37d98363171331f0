//! A node that exists in memory only, for tests.
//!
//! It keeps to the contract of [`NodeApi`], watches that its caller does too, and fails as often
//! as it is told to. Time is tokio's, so tests can let it run as fast as they like. The payload of
//! a request says what its function does, see [`FakeNode::invoke`].

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use medes_core::{FunctionId, FunctionSpec, InvocationError, MemoryUse, RequestId, SandboxId};
use medes_node::{
    DedupFailure, DedupMode, DedupReport, Invocation, NodeApi, NodeEvent, NodeMemory, Outcome,
    RestoreFailure, RestoreReport, StartFailure,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep};

/// How the node behaves. Times are milliseconds, probabilities percent.
#[derive(Clone, Debug)]
pub struct Behaviour {
    /// How long a cold start takes.
    pub start_ms: u64,
    /// How long a restore takes.
    pub restore_ms: u64,
    /// How long a dedup takes; in the last quarter it can't be cancelled any more.
    pub dedup_ms: u64,
    /// What a warm sandbox uses, bytes.
    pub warm_bytes: u64,
    /// What a dedup sandbox uses, bytes.
    pub dedup_bytes: u64,
    /// What it uses beside, if that may stay, bytes.
    pub residents: u64,
    /// The memory budget, bytes.
    pub budget: u64,
    /// Starts that fail.
    pub start_fails: u64,
    /// Restores that fail.
    pub restore_fails: u64,
    /// Restores of which nobody knows whether they failed.
    pub restore_unknown: u64,
    /// Dedups after which the sandbox stays warm.
    pub stays_warm: u64,
    /// Whether such a reason is lasting.
    pub stays_warm_lasting: bool,
    /// Dedups that lose the sandbox.
    pub dedup_loses: u64,
    /// Requests after which the sandbox is gone.
    pub exits: u64,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            start_ms: 100,
            restore_ms: 5,
            dedup_ms: 40,
            warm_bytes: 20 << 20,
            dedup_bytes: 4 << 20,
            residents: 0,
            budget: 0,
            start_fails: 0,
            restore_fails: 0,
            restore_unknown: 0,
            stays_warm: 0,
            stays_warm_lasting: true,
            dedup_loses: 0,
            exits: 0,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Warm,
    Running,
    Deduping { cancelled: bool, again: bool },
    Dedup,
    Restoring,
}

struct Sandbox {
    phase: Phase,
    /// What stays of it in the dedup state, bytes.
    residents: u64,
    killed: Arc<Notify>,
}

#[derive(Default)]
struct State {
    behaviour: Behaviour,
    random: u64,
    sandboxes: HashMap<SandboxId, Sandbox>,
    started: u64,
    bases: u64,
    violations: Vec<String>,
    forgotten: Vec<FunctionId>,
    filled: Vec<bool>,
    /// Where requests have begun.
    begun: HashMap<RequestId, SandboxId>,
    dedups: Vec<DedupMode>,
    logs: BTreeMap<String, String>,
}

/// See the module. Clones are the same node.
#[derive(Clone)]
pub struct FakeNode {
    state: Arc<Mutex<State>>,
    events: mpsc::UnboundedSender<NodeEvent>,
}

impl FakeNode {
    /// A node and what it reports. `seed` decides what fails.
    #[must_use]
    pub fn new(seed: u64) -> (Self, mpsc::UnboundedReceiver<NodeEvent>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let state = State { random: seed | 1, ..State::default() };
        (Self { state: Arc::new(Mutex::new(state)), events }, receiver)
    }

    /// Changes how the node behaves from now on.
    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.state.lock().behaviour);
    }

    /// What its caller did against the contract.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.state.lock().violations.clone()
    }

    /// Of each restore so far, whether all memory was to come back.
    #[must_use]
    pub fn filled(&self) -> Vec<bool> {
        self.state.lock().filled.clone()
    }

    /// How each dedup was to be done.
    pub fn dedups(&self) -> Vec<DedupMode> {
        self.state.lock().dedups.clone()
    }

    /// How many sandboxes there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.state.lock().sandboxes.len()
    }

    /// The sandboxes there are.
    #[must_use]
    pub fn ids(&self) -> Vec<SandboxId> {
        let mut ids: Vec<_> = self.state.lock().sandboxes.keys().copied().collect();
        ids.sort();
        ids
    }

    /// How many sandboxes were ever started.
    #[must_use]
    pub fn started(&self) -> u64 {
        self.state.lock().started
    }

    /// How many base snapshots were made.
    #[must_use]
    pub fn bases(&self) -> u64 {
        self.state.lock().bases
    }

    /// The versions that the node was told to forget.
    #[must_use]
    pub fn forgotten(&self) -> Vec<FunctionId> {
        self.state.lock().forgotten.clone()
    }

    /// Ends a sandbox as if it had crashed; false if there is none.
    pub fn crash(&self, sandbox: SandboxId) -> bool {
        let found = self.state.lock().sandboxes.remove(&sandbox);
        let Some(found) = found else { return false };
        found.killed.notify_waiters();
        let _ = self.events.send(NodeEvent::Gone { sandbox, how: "signal: killed".into() });
        true
    }

    /// Appends to a function's log.
    pub fn log(&self, function: &str, text: &str) {
        self.state.lock().logs.entry(function.to_owned()).or_default().push_str(text);
    }

    fn enter(&self, sandbox: SandboxId, from: Phase, to: Phase) -> Option<Arc<Notify>> {
        let mut state = self.state.lock();
        let found = state.sandboxes.get_mut(&sandbox)?;
        if found.phase != from {
            let violation =
                format!("{sandbox} is {:?}, not {from:?}, on its way to {to:?}", found.phase);
            state.violations.push(violation);
            return None;
        }
        found.phase = to;
        Some(found.killed.clone())
    }

    /// Leaves an operation; false if the sandbox is gone.
    fn leave(&self, sandbox: SandboxId, to: Phase) -> bool {
        let mut state = self.state.lock();
        state.sandboxes.get_mut(&sandbox).map(|s| s.phase = to).is_some()
    }

    fn remove(&self, sandbox: SandboxId) {
        if let Some(found) = self.state.lock().sandboxes.remove(&sandbox) {
            found.killed.notify_waiters();
        }
    }

    /// A request begins in a sandbox: it may not begin in another one afterwards.
    fn note_begun(&self, sandbox: SandboxId, request: RequestId) {
        let mut state = self.state.lock();
        let before = state.begun.insert(request, sandbox);
        if let Some(before) = before.filter(|before| *before != sandbox) {
            let violation = format!("{request} begins in {sandbox}, after {before}");
            state.violations.push(violation);
        }
    }

    fn chance(&self, percent: impl Fn(&Behaviour) -> u64) -> bool {
        let mut state = self.state.lock();
        // xorshift64: good enough to decide what fails, and the same for the same seed.
        let mut x = state.random;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        state.random = x;
        x % 100 < percent(&state.behaviour)
    }

    fn behaviour(&self) -> Behaviour {
        self.state.lock().behaviour.clone()
    }

    fn usage(&self, phase: Phase, residents: u64) -> MemoryUse {
        let b = self.behaviour();
        match phase {
            Phase::Dedup => {
                MemoryUse { private: residents, store: b.dedup_bytes, ..MemoryUse::default() }
            }
            _ => MemoryUse { private: b.warm_bytes, ..MemoryUse::default() },
        }
    }
}

fn answer(payload: impl Into<Bytes>) -> Outcome {
    let payload = payload.into();
    // As of a restore that put 7 pages back, and a request that waited for two more; only told
    // after a restore.
    Outcome {
        payload,
        error: None,
        execution_us: 0,
        faults: 2,
        pages: 2,
        prefetched: 7,
        alive: true,
    }
}

fn failed(error: InvocationError, alive: bool) -> Outcome {
    let error = Some(error);
    Outcome {
        payload: Bytes::new(),
        error,
        execution_us: 0,
        faults: 0,
        pages: 0,
        prefetched: 0,
        alive,
    }
}

impl NodeApi for FakeNode {
    async fn start(&self, function: &FunctionSpec) -> Result<SandboxId, StartFailure> {
        sleep(Duration::from_millis(self.behaviour().start_ms)).await;
        if function.handler == "broken.handler" {
            let payload = r#"{"errorType":"Runtime.ImportModuleError","errorMessage":"no module"}"#;
            let payload = Bytes::from(payload);
            return Err(StartFailure::Init { error: InvocationError::Init, payload });
        }
        if self.chance(|b| b.start_fails) {
            return Err(StartFailure::Sandbox("out of luck".into()));
        }
        let mut state = self.state.lock();
        state.started += 1;
        let id = SandboxId(state.started);
        state
            .sandboxes
            .insert(id, Sandbox { phase: Phase::Warm, residents: 0, killed: Arc::default() });
        Ok(id)
    }

    /// Answers with the payload, or does what it says: `{"sleep_ms":n}`, `{"raise":text}`,
    /// `{"exit":how}`, `{"oom":true}`, `{"bytes":n}`, `{"refused":true}`, `{"print":text,"log":function}`.
    async fn invoke(&self, sandbox: SandboxId, invocation: Invocation) -> Outcome {
        let gone = || failed(InvocationError::Exited { how: "signal: killed".into() }, false);
        let Some(killed) = self.enter(sandbox, Phase::Warm, Phase::Running) else { return gone() };
        self.note_begun(sandbox, invocation.request);
        let began = Instant::now();
        let order: serde_json::Value =
            serde_json::from_slice(&invocation.payload).unwrap_or_default();
        let wanted = order["sleep_ms"].as_u64().unwrap_or(0);
        let timed_out = wanted > invocation.timeout_ms;
        let time = Duration::from_millis(wanted.min(invocation.timeout_ms));
        let ended = tokio::select! {
            biased;
            () = killed.notified() => true,
            () = sleep(time) => false,
        };
        let mut outcome = if ended {
            gone()
        } else if timed_out {
            failed(InvocationError::TimedOut, false)
        } else if let Some(how) = order["exit"].as_str() {
            failed(InvocationError::Exited { how: how.into() }, false)
        } else if order["oom"] == true {
            failed(InvocationError::OutOfMemory, false)
        } else if order["refused"] == true {
            failed(InvocationError::ResponseTooLarge { bytes: u64::MAX }, true)
        } else if let Some(text) = order["raise"].as_str() {
            let document = serde_json::json!({ "errorType": "ValueError", "errorMessage": text });
            Outcome { error: Some(InvocationError::Function), ..answer(document.to_string()) }
        } else if let Some(n) = order["bytes"].as_u64() {
            answer(vec![b'7'; n as usize])
        } else if self.chance(|b| b.exits) {
            failed(InvocationError::Exited { how: "exit status 1".into() }, false)
        } else {
            if let (Some(text), Some(log)) = (order["print"].as_str(), order["log"].as_str()) {
                self.log(log, text);
            }
            answer(invocation.payload)
        };
        outcome.execution_us = began.elapsed().as_micros() as u64;
        if !outcome.alive {
            self.remove(sandbox);
        } else if !self.leave(sandbox, Phase::Warm) {
            return gone();
        }
        outcome
    }

    async fn dedup(
        &self,
        sandbox: SandboxId,
        mode: DedupMode,
    ) -> Result<DedupReport, DedupFailure> {
        self.state.lock().dedups.push(mode);
        let lost = || DedupFailure::Lost("it is gone".into());
        let now = self.state.lock().sandboxes.get(&sandbox).map(|s| s.phase);
        let from = match now {
            Some(Phase::Dedup) if !mode.residents && !mode.new_base => Phase::Dedup,
            _ => Phase::Warm,
        };
        let again = from == Phase::Dedup;
        let began = self.enter(sandbox, from, Phase::Deduping { cancelled: false, again });
        began.ok_or_else(lost)?;
        let quarter = Duration::from_millis(self.behaviour().dedup_ms / 4);
        for _ in 0..3 {
            sleep(quarter).await;
            let phase = self.state.lock().sandboxes.get(&sandbox).map(|s| s.phase);
            match phase {
                Some(Phase::Deduping { cancelled: false, .. }) => {}
                Some(_) => {
                    self.leave(sandbox, Phase::Warm);
                    return Err(DedupFailure::Cancelled);
                }
                None => return Err(lost()),
            }
        }
        sleep(quarter).await;
        if self.chance(|b| b.stays_warm) {
            self.leave(sandbox, Phase::Warm);
            let lasting = self.behaviour().stays_warm_lasting;
            return Err(DedupFailure::StaysWarm { reason: "it has io_uring".into(), lasting });
        }
        if self.chance(|b| b.dedup_loses) {
            self.remove(sandbox);
            return Err(lost());
        }
        if !self.leave(sandbox, Phase::Dedup) {
            return Err(lost());
        }
        let residents = if mode.residents { self.behaviour().residents } else { 0 };
        let mut state = self.state.lock();
        state.bases += u64::from(mode.new_base);
        if let Some(found) = state.sandboxes.get_mut(&sandbox) {
            found.residents = residents;
        }
        drop(state);
        Ok(DedupReport {
            base_bytes: if mode.new_base { 1 << 20 } else { 0 },
            before: self.usage(Phase::Warm, 0),
            after: self.usage(Phase::Dedup, residents),
            kept_pages: residents >> 12,
            ..DedupReport::default()
        })
    }

    fn cancel_dedup(&self, sandbox: SandboxId) {
        if let Some(found) = self.state.lock().sandboxes.get_mut(&sandbox)
            && let Phase::Deduping { cancelled, .. } = &mut found.phase
        {
            *cancelled = true;
        }
    }

    async fn restore(
        &self,
        sandbox: SandboxId,
        fill: bool,
        first: Option<Invocation>,
    ) -> Result<RestoreReport, RestoreFailure> {
        self.state.lock().filled.push(fill);
        let gone = || RestoreFailure::before("it is gone");
        self.enter(sandbox, Phase::Dedup, Phase::Restoring).ok_or_else(gone)?;
        sleep(Duration::from_millis(self.behaviour().restore_ms)).await;
        if self.chance(|b| b.restore_fails) {
            self.remove(sandbox);
            return Err(RestoreFailure::before("a page is missing"));
        }
        if let Some(first) = first {
            self.note_begun(sandbox, first.request);
        }
        if self.chance(|b| b.restore_unknown) {
            self.remove(sandbox);
            return Err(RestoreFailure::unknown("no answer"));
        }
        let report =
            RestoreReport { pages: 7, pages_us: 3, thaw_us: 1, ..RestoreReport::default() };
        match self.leave(sandbox, Phase::Warm) {
            true => Ok(report),
            false => Err(RestoreFailure::unknown("it is gone")),
        }
    }

    async fn purge(&self, sandbox: SandboxId) {
        sleep(Duration::from_millis(1)).await;
        self.remove(sandbox);
    }

    fn memory_of(&self, sandbox: SandboxId) -> Option<MemoryUse> {
        let (phase, residents) = {
            let state = self.state.lock();
            let found = state.sandboxes.get(&sandbox)?;
            (found.phase, found.residents)
        };
        Some(self.usage(phase, residents))
    }

    fn memory(&self) -> NodeMemory {
        let state = self.state.lock();
        let b = &state.behaviour;
        let is_dedup =
            |s: &&Sandbox| matches!(s.phase, Phase::Dedup | Phase::Deduping { again: true, .. });
        let dedup = state.sandboxes.values().filter(is_dedup).count() as u64;
        let residents: u64 = state.sandboxes.values().filter(is_dedup).map(|s| s.residents).sum();
        NodeMemory {
            sandboxes: (state.sandboxes.len() as u64 - dedup) * b.warm_bytes + residents,
            patches: dedup * b.dedup_bytes,
            budget: b.budget,
            ..NodeMemory::default()
        }
    }

    fn base_bytes(&self, _domain: medes_core::DomainId) -> u64 {
        0
    }

    fn runtimes(&self) -> Vec<String> {
        vec!["fake".into(), "python3.11".into()]
    }

    async fn forget_function(&self, function: &FunctionSpec, replaced: bool) {
        let mut state = self.state.lock();
        state.forgotten.push(function.id);
        if !replaced {
            state.logs.remove(function.name.as_str());
        }
    }

    async fn logs_tail(&self, function: &FunctionSpec, bytes: usize) -> (String, u64) {
        let state = self.state.lock();
        let log = state.logs.get(function.name.as_str()).map_or("", String::as_str);
        (log[log.len().saturating_sub(bytes)..].to_owned(), log.len() as u64)
    }

    async fn logs_after(&self, function: &FunctionSpec, position: u64) -> (String, u64) {
        let state = self.state.lock();
        let log = state.logs.get(function.name.as_str()).map_or("", String::as_str);
        (log.get(position as usize..).unwrap_or("").to_owned(), log.len() as u64)
    }
}
