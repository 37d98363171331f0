//! What came out.

use medes_core::StartKind;
use medes_policy::PolicyConfig;
use serde::{Deserialize, Serialize};

use crate::config::SimulationConfig;
use crate::latency::LatencySummary;

/// Requests by the state in which they found their sandbox.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct StartCounts {
    /// There was none.
    pub cold: u64,
    /// All its memory was there.
    pub warm: u64,
    /// It was restored.
    pub dedup: u64,
}

impl StartCounts {
    /// Counts one.
    pub fn count(&mut self, start: StartKind) {
        match start {
            StartKind::Cold => self.cold += 1,
            StartKind::Warm => self.warm += 1,
            StartKind::Dedup => self.dedup += 1,
        }
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.cold + self.warm + self.dedup
    }
}

/// What came out for one function.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FunctionResult {
    /// Its name.
    pub name: String,
    /// The profile's function that stands for it.
    pub profile: String,
    /// Its requests.
    pub starts: StartCounts,
    /// From arrival to answer.
    pub end_to_end: LatencySummary,
    /// From arrival to the beginning of execution.
    pub startup: LatencySummary,
}

/// Memory over the whole time, bytes, of all nodes together.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct MemoryResult {
    /// The mean.
    pub mean: f64,
    /// The greatest.
    pub peak: u64,
    /// The mean of what warm and running sandboxes used.
    pub mean_warm: f64,
    /// The mean of what dedup sandboxes used.
    pub mean_dedup: f64,
    /// The mean of what base snapshots used.
    pub mean_base: f64,
}

/// One moment. Memory is bytes, of all nodes together.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds since the beginning.
    pub at_s: f64,
    /// Memory of sandboxes with all their pages, idle, running or being started.
    pub warm_bytes: u64,
    /// Memory of dedup sandboxes.
    pub dedup_bytes: u64,
    /// Memory of base snapshots.
    pub base_bytes: u64,
    /// Sandboxes that run a request, or are made ready for one.
    pub running: u32,
    /// Idle ones with all their pages.
    pub warm: u32,
    /// Dedup ones.
    pub dedup: u32,
    /// Requests that wait for memory.
    pub waiting: u32,
    /// Cold starts so far.
    pub cold_starts: u64,
}

/// What the trace was.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct TraceResult {
    /// Where it was read from.
    pub path: String,
    /// Its functions that were called at all.
    pub functions: u64,
    /// Simulated time, seconds.
    pub length_s: f64,
    /// How many times faster than recorded it was played.
    pub speed: f64,
    /// What was repaired in it.
    pub repairs: medes_trace::Repairs,
}

/// What came out of a simulation.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SimulationResult {
    /// The policy's name.
    pub policy_name: String,
    /// What was simulated.
    pub config: SimulationConfig,
    /// The arrivals.
    pub trace: TraceResult,
    /// Where times and sizes come from.
    pub profile: String,
    /// Requests.
    pub starts: StartCounts,
    /// Sandboxes that were started ahead of a request.
    pub prewarmed: u64,
    /// Sandboxes that had to go dedup because memory was short.
    pub evicted_to_dedup: u64,
    /// Sandboxes that were ended because memory was short.
    pub evicted: u64,
    /// Dedup operations that came to their end.
    pub dedups: u64,
    /// Restores that read base pages from another node.
    pub remote_restores: u64,
    /// From arrival to answer.
    pub end_to_end: LatencySummary,
    /// From arrival to the beginning of execution.
    pub startup: LatencySummary,
    /// Of that, waiting for a sandbox that was not being made ready.
    pub queueing: LatencySummary,
    /// The distribution of end-to-end latencies: milliseconds, and the share at or below.
    pub end_to_end_curve: Vec<(f64, f64)>,
    /// The distribution of startup latencies, likewise.
    pub startup_curve: Vec<(f64, f64)>,
    /// Memory.
    pub memory: MemoryResult,
    /// By function, the most called first.
    pub functions: Vec<FunctionResult>,
    /// What happened over time.
    pub timeline: Vec<Sample>,
    /// How long the simulation took, seconds. The only figure that differs from run to run.
    pub wall_s: f64,
}

impl SimulationResult {
    /// The policy and its settings.
    #[must_use]
    pub fn policy(&self) -> PolicyConfig {
        self.config.policy
    }
}
