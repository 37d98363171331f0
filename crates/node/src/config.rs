//! How a node is set up.

use std::path::PathBuf;
use std::time::Duration;

use medes_core::NodeId;

/// How a node is set up.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Its number in the cluster.
    pub node: NodeId,
    /// Runtimes and logs.
    pub data_dir: PathBuf,
    /// The keeper's socket; empty after a clean end.
    pub run_dir: PathBuf,
    /// The name of this instance's cgroups.
    pub cgroup: String,
    /// The first of the user ids that sandboxes run under.
    pub uid_base: u32,
    /// Memory for sandboxes and page store together, bytes.
    pub memory_budget: u64,
    /// The most that the page store may hold, bytes.
    pub store_capacity: u64,
    /// What is kept of each function's log, bytes.
    pub log_bytes: u64,
    /// The size of a sandbox's private scratch, bytes.
    pub scratch_bytes: u64,
    /// The most processes and threads that a sandbox may have.
    pub pids_max: u32,
    /// How long a runtime may take until it asks for the first request, milliseconds.
    pub init_timeout_ms: u64,
    /// The keeper's program.
    pub keeper_program: PathBuf,
    /// The arguments that make it a keeper; the socket is added.
    pub keeper_arguments: Vec<String>,
    /// The dedup engine.
    pub dedup: DedupConfig,
}

/// How the dedup engine works.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DedupConfig {
    /// Chunks in a page's fingerprint.
    pub cardinality: u8,
    /// Bytes in a chunk.
    pub chunk_size: u16,
    /// Threads that encode pages.
    pub workers: usize,
    /// How long bringing a dedup sandbox back may take before some of its working set stays where it
    /// is instead. A small share of what requests take counts if that is longer
    /// ([`DedupMode::execution_us`]). Zero: only what would take as much memory in the page store stays.
    ///
    /// [`DedupMode::execution_us`]: crate::api::DedupMode::execution_us
    pub restore_target: Duration,
    /// How long a base snapshot that nobody refers to is kept, milliseconds.
    pub base_idle_ms: u64,
}

impl Default for DedupConfig {
    fn default() -> Self {
        Self {
            cardinality: 5,
            chunk_size: 64,
            workers: 1,
            restore_target: Duration::from_millis(2),
            base_idle_ms: 900_000,
        }
    }
}
