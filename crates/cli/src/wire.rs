//! What the native API sends, as far as the command shows it.

use std::time::Duration;

use medes_core::{FunctionName, Layout, MemoryUse, SandboxState};
use serde::Deserialize;

/// One function, as `GET /v1/functions` lists it.
#[derive(Clone, Debug, Deserialize)]
pub struct FunctionView {
    /// Its name.
    pub name: FunctionName,
    /// Its runtime.
    pub runtime: String,
    /// Its handler.
    pub handler: String,
    /// Memory limit of one sandbox, MiB.
    pub memory_mib: u32,
    /// How long one request may run, milliseconds.
    pub timeout_ms: u64,
    /// Which sandboxes share one address-space layout.
    pub layout: Layout,
    /// Requests so far.
    #[serde(default)]
    pub counts: Counts,
    /// Sandboxes now.
    #[serde(default)]
    pub sandboxes: u64,
}

/// Requests by the state in which they found their sandbox.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// A new sandbox was started.
    pub cold: u64,
    /// An idle one had all its memory.
    pub warm: u64,
    /// A dedup one was restored.
    pub dedup: u64,
    /// Answers that were errors.
    pub errors: u64,
}

/// `GET /v1/functions`.
#[derive(Debug, Deserialize)]
pub struct Functions {
    /// All functions.
    pub functions: Vec<FunctionView>,
}

/// One sandbox, as `GET /v1/sandboxes` lists it.
#[derive(Clone, Debug, Deserialize)]
pub struct SandboxView {
    /// Its identifier; `-` while it is being started.
    pub id: String,
    /// Whose sandbox it is.
    pub function: FunctionName,
    /// Its state.
    pub state: SandboxState,
    /// Time since it was started, milliseconds.
    #[serde(default)]
    pub age_ms: u64,
    /// Time since its last request, milliseconds.
    #[serde(default)]
    pub idle_ms: Option<u64>,
    /// Requests that it served.
    #[serde(default)]
    pub requests: u64,
    /// Its memory now, bytes.
    #[serde(default)]
    pub memory_total: u64,
    /// Its memory when it was last warm, bytes.
    #[serde(default)]
    pub warm_bytes: u64,
    /// The share of its warm memory that is saved now, 0 to 1.
    #[serde(default)]
    pub saved: Option<f64>,
    /// Why it is not deduplicated.
    #[serde(default)]
    pub stays_warm: Option<String>,
}

/// `GET /v1/sandboxes`.
#[derive(Debug, Deserialize)]
pub struct Sandboxes {
    /// All sandboxes.
    pub sandboxes: Vec<SandboxView>,
}

/// What came of an operation on one sandbox of several.
#[derive(Clone, Debug, Deserialize)]
pub struct Done {
    /// The sandbox.
    pub sandbox: String,
    /// The operation's report.
    #[serde(default)]
    pub report: Option<serde_json::Value>,
    /// Why it was not done.
    #[serde(default)]
    pub error: Option<serde_json::Value>,
}

impl Done {
    /// The error as text, if there is one.
    pub fn error_text(&self) -> Option<String> {
        let error = self.error.as_ref().filter(|e| !e.is_null())?;
        let text = error.as_str().or_else(|| error["message"].as_str());
        Some(text.map_or_else(|| error.to_string(), str::to_owned))
    }
}

/// `POST /v1/functions/{name}/dedup` and the like.
#[derive(Debug, Deserialize)]
pub struct Results {
    /// One entry per sandbox that was in the fitting state.
    pub results: Vec<Done>,
}

/// The part of a dedup or restore report that is shown in a line.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ReportView {
    /// Pages dropped or put back.
    pub pages: u64,
    /// The whole operation, microseconds.
    pub total_us: u64,
    /// Bytes added to the store as a base snapshot.
    pub base_bytes: u64,
    /// Memory before a dedup.
    pub before: Option<MemoryUse>,
    /// Memory after a dedup.
    pub after: Option<MemoryUse>,
}

/// `GET /v1/info`, as far as it is used.
#[derive(Debug, Deserialize)]
pub struct Info {
    /// The platform's version.
    pub version: String,
    /// Its node.
    pub node: NodeInfo,
}

/// The node's part of [`Info`].
#[derive(Debug, Deserialize)]
pub struct NodeInfo {
    /// The node's memory.
    #[serde(default)]
    pub memory: NodeMemoryView,
    /// Runtimes that are installed.
    #[serde(default)]
    pub runtimes: Vec<String>,
}

/// The node's memory, bytes.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeMemoryView {
    /// Base snapshots in the page store.
    pub base: u64,
}

/// The body of an error answer.
#[derive(Debug, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What went wrong, for programs and for people.
#[derive(Debug, Deserialize)]
pub struct ErrorDetail {
    /// A stable name such as `NoSuchFunction`.
    pub code: String,
    /// What went wrong and the way out.
    pub message: String,
}

/// Milliseconds as a span of time.
pub const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}
