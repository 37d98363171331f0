//! Discrete-event simulation of a cluster that runs functions.
//!
//! Arrivals come from a trace, times and sizes from a profile that was measured, and every decision
//! over a sandbox from `medes-policy`, the code that decides in a live controller. Scheduling
//! follows the controller: a request takes a warm sandbox, else one whose dedup has only begun,
//! else a dedup one, else has one started on the node with the least memory in use; whichever is
//! free first serves whoever has waited longest. The same inputs and seed give the same result,
//! to the last digit.
//!
//! Two things are simpler than in the controller. Room for a request that waits is made by ending
//! idle sandboxes, and dedup only keeps the headroom, where the controller waits for a dedup
//! operation; and a restore is never refused its memory, so that a node may be above its limit
//! while requests run.
//!
//! What is not simulated: processors (requests don't slow each other down, whatever runs at the
//! same time), failures, and the network but for the base pages that a restore reads from another
//! node.

#![forbid(unsafe_code)]

mod cluster;
mod compare;
mod config;
mod engine;
mod evaluation;
mod event;
mod latency;
mod node;
mod profile;
mod result;
mod validation;
mod workload;

pub use medes_policy::PolicyConfig;

pub use compare::{Improvement, Latencies, improvement};
pub use config::{Bases, Execution, Functions, SimulationConfig};
pub use engine::{Observer, Outcome, Silent, SimulateError, simulate};
pub use evaluation::{Experiment, Planned, Run, carry_out, evaluation, policies};
pub use latency::{LatencyHistogram, LatencySummary};
pub use profile::{FunctionProfile, Profile, ProfileError};
pub use result::{
    FunctionResult, MemoryResult, Sample, SimulationResult, StartCounts, TraceResult,
};
pub use validation::{Comparison, Served, Side, Validation};
