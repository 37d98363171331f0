//! What is simulated.

use medes_policy::{DEFAULT_BASE_THRESHOLD, PolicyConfig};
use serde::{Deserialize, Serialize};

/// How long a request's execution takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Execution {
    /// As the profile says.
    #[default]
    Profile,
    /// As the trace says, where it does.
    Trace,
}

/// Which functions there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Functions {
    /// The profile's: each serves all calls of the trace's functions that it stands for.
    #[default]
    Profile,
    /// The trace's: each is another function, as large and slow as the one that stands for it, and
    /// made of the same code, so that they share base snapshots.
    Trace,
}

/// Where base snapshots are used.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bases {
    /// On all nodes; a restore reads base pages of another node over the network.
    Cluster {
        /// The network's bandwidth per restore, bits per second.
        bandwidth: f64,
    },
    /// Only on their own node; each needs its own.
    Node,
}

/// What is simulated.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct SimulationConfig {
    /// Everything random that the trace leaves open comes from this.
    pub seed: u64,
    /// How many nodes.
    pub nodes: u32,
    /// Memory for sandboxes and base snapshots of one node, bytes; 0 means no limit.
    pub node_memory: u64,
    /// Who decides over idle sandboxes.
    #[serde(flatten)]
    pub policy: PolicyConfig,
    /// Which functions there are.
    pub functions: Functions,
    /// How long requests take.
    pub execution: Execution,
    /// No execution takes longer, milliseconds: the function's timeout.
    pub timeout_ms: u64,
    /// Where base snapshots are used.
    pub bases: Bases,
    /// Dedup sandboxes per base snapshot before there is another (T).
    pub base_threshold: u32,
    /// Dedup operations at the same time on one node.
    pub max_dedups: u32,
    /// The share of a node's memory that a policy which dedups tries to keep free, so that a
    /// request in need of a sandbox does not have to wait for a dedup operation.
    pub headroom: f64,
    /// Sandboxes of one function at once; 0 means no limit.
    pub max_sandboxes_per_function: u32,
    /// Requests that arrive earlier are simulated but not counted, milliseconds.
    pub warmup_ms: u64,
    /// How often memory and sandboxes are noted, milliseconds.
    pub sample_ms: u64,
}

impl Default for SimulationConfig {
    /// The paper's cluster: 20 nodes, 10 Gb/s.
    fn default() -> Self {
        Self {
            seed: 1,
            nodes: 20,
            node_memory: 0,
            policy: PolicyConfig::default(),
            functions: Functions::default(),
            execution: Execution::default(),
            timeout_ms: 900_000,
            bases: Bases::Cluster { bandwidth: 1e10 },
            base_threshold: DEFAULT_BASE_THRESHOLD,
            max_dedups: 4,
            headroom: 0.1,
            max_sandboxes_per_function: 1_000,
            warmup_ms: 0,
            sample_ms: 60_000,
        }
    }
}
