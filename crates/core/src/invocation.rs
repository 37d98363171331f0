//! One request to a function, and what came of it.

use serde::{Deserialize, Serialize};

use crate::id::{RequestId, SandboxId};

/// The state in which a request found its sandbox.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StartKind {
    /// No sandbox was free: a new one was started.
    Cold,
    /// An idle sandbox with all its memory present.
    Warm,
    /// A dedup sandbox, restored for this request.
    Dedup,
}

impl std::fmt::Display for StartKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Dedup => "dedup",
        })
    }
}

/// Where the time of one request went, in microseconds. The phases do not overlap.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Timing {
    /// Waiting for a sandbox to become free, or for the scheduler.
    pub queue_us: u64,
    /// Making the sandbox ready: a cold start, or a restore; 0 when warm.
    pub startup_us: u64,
    /// From handing the request to the function's runtime until its answer.
    pub execution_us: u64,
    /// From the front door's receipt of the request until the answer was ready.
    pub total_us: u64,
}

/// What it took to bring a dedup sandbox's memory back for one request: part of its startup and of
/// its execution. Times are microseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MemoryReturn {
    /// Pages put back before they were needed: the function's working set.
    pub pages_before: u64,
    /// Putting back those without which the sandbox does not begin; part of [`Timing::startup_us`].
    pub prefetch_us: u64,
    /// Letting the sandbox run; part of [`Timing::startup_us`].
    pub thaw_us: u64,
    /// Times that a thread waited for a page while the request ran.
    pub faults: u64,
    /// Pages put back for those.
    pub pages_on_demand: u64,
}

/// Why a function gave no result. The names are the `errorType` that Lambda's clients see.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum InvocationError {
    /// The function reported an error itself; the payload is its own error document (JSON).
    Function,
    /// `Sandbox.Timedout`: the request ran longer than the function's timeout.
    TimedOut,
    /// `Runtime.ExitError`: the process ended before it answered.
    Exited {
        /// What is known of the end, such as `exit status 1` or `signal: killed`.
        how: String,
    },
    /// `Runtime.OutOfMemory`: the sandbox reached its memory limit.
    OutOfMemory,
    /// An error while the function was being initialised; the payload is the runtime's own error
    /// document if it sent one.
    Init,
    /// `Function.ResponseSizeTooLarge`: the answer is longer than the limit.
    ResponseTooLarge {
        /// The answer's length, bytes.
        bytes: u64,
    },
}

/// What came of one request.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InvocationResult {
    /// The request.
    pub request: RequestId,
    /// The sandbox that served it, if there was one.
    pub sandbox: Option<SandboxId>,
    /// The state in which it found its sandbox.
    pub start: StartKind,
    /// Where the time went.
    pub timing: Timing,
    /// How its memory came back, if it found its sandbox in the dedup state.
    pub memory: Option<MemoryReturn>,
    /// The function's answer, or the error document.
    pub payload: Vec<u8>,
    /// Set when `payload` is an error document.
    pub error: Option<InvocationError>,
}
