//! When a sandbox goes warm, dedup or away: pure decisions.
//!
//! State and statistics come in, decisions go out. Nothing here reads a clock, draws a random
//! number or does I/O: time is given in milliseconds since whatever moment the caller counts from,
//! so that the same code decides in a live controller and in a simulation, and decides the same.

#![forbid(unsafe_code)]

mod base;
mod decision;
mod eviction;
mod histogram;
mod schedule;
mod stats;

pub use base::{DEFAULT_BASE_THRESHOLD, base_due};
pub use decision::{
    Action, Decision, Dedupable, FixedKeepAlive, IdleSandbox, Policy, PolicyConfig, Pressure,
    Simple,
};
pub use eviction::{Eviction, Need, evict_least_recently_used};
pub use histogram::Histogram;
pub use schedule::choose;
pub use stats::{FunctionStats, Latency, StatsSummary};
