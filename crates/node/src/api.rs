//! What a controller may ask of a node, and what a node reports.

use std::collections::HashMap;
use std::future::Future;

use bytes::Bytes;
use medes_core::{
    DomainId, FunctionId, FunctionSpec, InvocationError, MemoryUse, RequestId, SandboxId,
    SandboxState,
};
use medes_pages::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// One request on its way to a sandbox.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// The request's identifier.
    pub request: RequestId,
    /// The payload as the client sent it.
    pub payload: Bytes,
    /// How long the function may take, milliseconds; then its sandbox is killed.
    pub timeout_ms: u64,
    /// Lambda's client context (JSON), if the client sent one.
    pub client_context: Option<String>,
    /// The trace header, if the client sent one.
    pub trace: Option<String>,
}

/// What a sandbox answered.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The answer, or the error document (JSON).
    pub payload: Bytes,
    /// Set when `payload` is an error document.
    pub error: Option<InvocationError>,
    /// From handing the request to the runtime until its answer, microseconds.
    pub execution_us: u64,
    /// Page faults answered since the sandbox was last restored, while its memory is on its way
    /// back; 0 once all of it is there.
    pub faults: u64,
    /// Pages put back for them.
    pub pages: u64,
    /// Pages put back since then because they belong to the function's working set.
    pub prefetched: u64,
    /// Whether the sandbox can serve another request. When false it is gone already.
    pub alive: bool,
}

/// A sandbox could not be started.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StartFailure {
    /// The runtime or the function failed while it was initialised.
    #[error("the function failed to initialise: {error:?}")]
    Init {
        /// Which kind of failure.
        error: InvocationError,
        /// The error document for the client (JSON).
        payload: Bytes,
    },
    /// No runtime of that name is installed.
    #[error("{0}")]
    NoRuntime(String),
    /// The node could not make the sandbox.
    #[error("the sandbox could not be made: {0}")]
    Sandbox(String),
}

/// How a sandbox is deduplicated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DedupMode {
    /// Its pages also become a base snapshot for its function, whether or not one exists. All of them
    /// go then.
    pub new_base: bool,
    /// What of its working set a restore could not put back within the node's target
    /// ([`DedupConfig::restore_target`]) stays: memory is not short. Pages that hardly compress stay in
    /// any case.
    ///
    /// [`DedupConfig::restore_target`]: crate::config::DedupConfig::restore_target
    pub residents: bool,
    /// What a request usually takes of the function, microseconds; 0 if that is not known. A restore
    /// may take a small share of it, though the target be shorter.
    pub execution_us: u64,
}

/// What a dedup operation did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DedupReport {
    /// Pages that were dropped from the sandbox.
    pub pages: u64,
    /// Of those, pages of zeros.
    pub zero_pages: u64,
    /// Of those, pages equal to a base page.
    pub equal_pages: u64,
    /// Of those, pages kept as a patch against a base page.
    pub patched_pages: u64,
    /// Of those, pages kept compressed or as they are, without a base page.
    pub unique_pages: u64,
    /// Pages whose base page belongs to another function.
    pub foreign_pages: u64,
    /// Pages taken over from the sandbox's image before: nobody has written to them since.
    pub reused_pages: u64,
    /// Pages that stay in the sandbox: those of its working set that a restore would take too long to
    /// put back, and those that the kernel needs there (restartable-sequence areas).
    pub kept_pages: u64,
    /// Bytes that this operation added to the store as a base snapshot.
    pub base_bytes: u64,
    /// Memory before.
    pub before: MemoryUse,
    /// Memory after.
    pub after: MemoryUse,
    /// The whole operation, microseconds.
    pub total_us: u64,
    /// Of that, reading and encoding, in which a request can still take the sandbox.
    pub encode_us: u64,
    /// Of that, seizing, dropping and handing over, in which a request waits.
    pub commit_us: u64,
}

impl DedupReport {
    /// The size of the pages that stay, bytes.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        self.kept_pages * PAGE_SIZE as u64
    }
}

/// A sandbox was not deduplicated. It is as it was before, unless `Lost`.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DedupFailure {
    /// The operation was cancelled because a request wants the sandbox.
    #[error("cancelled: a request wants the sandbox")]
    Cancelled,
    /// This sandbox can't be deduplicated, now or ever; it stays warm, marked with the reason.
    #[error("{reason}")]
    StaysWarm {
        /// What stands in the way.
        reason: String,
        /// False if another try may go better.
        lasting: bool,
    },
    /// The sandbox had to be killed, or died by itself.
    #[error("the sandbox is gone: {0}")]
    Lost(String),
}

/// What a restore did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RestoreReport {
    /// Pages put back before the sandbox ran.
    pub pages: u64,
    /// The whole operation, microseconds.
    pub total_us: u64,
    /// Of that, putting pages back.
    pub pages_us: u64,
    /// Of that, letting the sandbox run again.
    pub thaw_us: u64,
}

/// A restore failed: the sandbox is gone, for it may not run with missing pages.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the sandbox could not be restored and was killed: {reason}")]
pub struct RestoreFailure {
    /// Why.
    pub reason: String,
    /// Whether it may have run for a moment all the same, and with it the request that came along.
    pub may_have_run: bool,
}

impl RestoreFailure {
    /// A restore that failed before the sandbox ran.
    #[must_use]
    pub fn before(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), may_have_run: false }
    }

    /// A restore of which nobody knows how far it came.
    #[must_use]
    pub fn unknown(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), may_have_run: true }
    }
}

/// A sandbox that an earlier node left behind and this one has taken over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InheritedSandbox {
    /// The sandbox.
    pub sandbox: SandboxId,
    /// The version of a function whose sandbox it is.
    pub function: FunctionId,
    /// Whose pages it may have been deduplicated with.
    pub domain: DomainId,
    /// Warm, dedup, or running something for nobody any more; [`NodeEvent::Idle`] follows then.
    pub state: SandboxState,
    /// What it uses with all its memory there, bytes; an estimate for a dedup sandbox.
    pub warm_bytes: u64,
    /// The size of the pages that stay, of a dedup sandbox, bytes.
    pub kept_bytes: u64,
}

/// What an earlier node left behind and this one has taken over.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Inheritance {
    /// Every sandbox.
    pub sandboxes: Vec<InheritedSandbox>,
    /// How many base snapshots each version of a function has, if it has any.
    pub bases: HashMap<FunctionId, u64>,
}

/// What a node reports unasked.
#[derive(Clone, Debug)]
pub enum NodeEvent {
    /// A sandbox that was inherited running ([`InheritedSandbox::state`]) is warm now.
    Idle {
        /// The sandbox.
        sandbox: SandboxId,
    },
    /// An idle or dedup sandbox ended by itself or was killed from outside.
    Gone {
        /// The sandbox.
        sandbox: SandboxId,
        /// What is known of the end, such as `exit status 1` or `signal: killed`.
        how: String,
    },
}

/// The node's memory as the scheduler needs it, bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct NodeMemory {
    /// What sandboxes are charged for, private and kernel memory together.
    pub sandboxes: u64,
    /// Base snapshots in the page store.
    pub base: u64,
    /// Patches, unique pages and tables in the page store.
    pub patches: u64,
    /// The fingerprint registry.
    pub registry: u64,
    /// The budget for all of that.
    pub budget: u64,
}

/// A node, here or on another machine.
pub trait NodeApi: Send + Sync + 'static {
    /// What this node has taken over from one before it. To be asked once, before anything else.
    fn inherit(&self) -> Inheritance {
        Inheritance::default()
    }

    /// Starts a sandbox for `function`; returns when its runtime waits for the first request.
    fn start(
        &self,
        function: &FunctionSpec,
    ) -> impl Future<Output = Result<SandboxId, StartFailure>> + Send;

    /// Sends a request to an idle, warm sandbox and waits for the answer. After a timeout, an
    /// exit or an exhausted memory limit the sandbox is gone.
    fn invoke(
        &self,
        sandbox: SandboxId,
        invocation: Invocation,
    ) -> impl Future<Output = Outcome> + Send;

    /// Puts an idle sandbox into the dedup state. One that is there already lets go of what stays of it,
    /// as far as `mode` has it: it runs again for that, and goes on running if the operation is
    /// cancelled.
    fn dedup(
        &self,
        sandbox: SandboxId,
        mode: DedupMode,
    ) -> impl Future<Output = Result<DedupReport, DedupFailure>> + Send;

    /// Asks a dedup operation that is under way to give up; the operation's own answer tells
    /// whether it did ([`DedupFailure::Cancelled`]) or had passed the point of no return.
    fn cancel_dedup(&self, sandbox: SandboxId);

    /// Brings a dedup sandbox back to warm. What it does not touch follows in the background if it
    /// is used often, or, without `fill`, stays deduplicated. The runtime gets `first` before it runs,
    /// so that the request does not wait until its caller knows of the restore; [`NodeApi::invoke`]
    /// with the same request has to follow, and waits for the answer.
    fn restore(
        &self,
        sandbox: SandboxId,
        fill: bool,
        first: Option<Invocation>,
    ) -> impl Future<Output = Result<RestoreReport, RestoreFailure>> + Send;

    /// Ends a sandbox in whatever state it is, and frees all that it holds.
    fn purge(&self, sandbox: SandboxId) -> impl Future<Output = ()> + Send;

    /// What one sandbox uses now; `None` if there is no such sandbox.
    fn memory_of(&self, sandbox: SandboxId) -> Option<MemoryUse>;

    /// What the node uses now.
    fn memory(&self) -> NodeMemory;

    /// What the base snapshots of one dedup domain take in the page store, bytes.
    fn base_bytes(&self, domain: DomainId) -> u64;

    /// The names of the runtimes that are installed, such as `python3.11`.
    fn runtimes(&self) -> Vec<String>;

    /// Drops what the node keeps for a version of a function that is no more: base snapshots that
    /// nobody refers to, and the function's log unless another version has `replaced` this one.
    fn forget_function(
        &self,
        function: &FunctionSpec,
        replaced: bool,
    ) -> impl Future<Output = ()> + Send;

    /// The newest log lines of a function, oldest first, at most `bytes` of them, and a position
    /// from which [`NodeApi::logs_after`] goes on.
    fn logs_tail(
        &self,
        function: &FunctionSpec,
        bytes: usize,
    ) -> impl Future<Output = (String, u64)> + Send;

    /// Log lines after a position, and the next position. Empty if there are none yet.
    fn logs_after(
        &self,
        function: &FunctionSpec,
        position: u64,
    ) -> impl Future<Output = (String, u64)> + Send;
}
