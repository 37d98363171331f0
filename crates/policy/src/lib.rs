//! When a sandbox goes warm, dedup or away: pure decisions.
//!
//! State and statistics come in, decisions go out. Nothing here reads a clock, draws a random
//! number or does I/O: time is given in milliseconds since whatever moment the caller counts from,
//! so that the same code decides in a live controller and in a simulation, and decides the same.

#![forbid(unsafe_code)]

mod adaptive;
mod base;
mod decision;
mod eviction;
mod explain;
mod forecast;
mod gaps;
mod greedy_dual;
mod histogram;
mod medes;
mod model;
mod objective;
mod price;
mod schedule;
mod settings;
mod stats;
mod targets;

pub use adaptive::{Adaptive, IdleTimes, WindowSource, Windows};
pub use base::{DEFAULT_BASE_THRESHOLD, base_due};
pub use decision::{
    Action, Decision, Dedupable, FixedKeepAlive, IdleSandbox, Policy, PolicyConfig, Pressure,
    Simple,
};
pub use eviction::{DEDUP_FREES_PERCENT, Evicting, Eviction, Need, evict_least_recently_used};
pub use explain::{Expected, Explanation, Target, explain};
pub use forecast::forecast;
pub use gaps::{Interval, ReuseGaps};
pub use greedy_dual::{AgingClock, GreedyDual};
pub use histogram::Histogram;
pub use medes::{Medes, Periods};
pub use model::{Model, WARM_STARTUP_FLOOR_US};
pub use objective::{Form, Objective};
pub use price::{Buyer, Keep, Outlook, spend};
pub use schedule::choose;
pub use settings::{BadSetting, PolicyName, PolicySettings};
pub use stats::{Directive, FunctionSettings, FunctionStats, Latency, Population, StatsSummary};
pub use targets::{Split, budgets_by_rate, least_latency, least_memory};
