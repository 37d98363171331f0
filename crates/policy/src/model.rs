//! The paper's model of one function (section 5, equations (1) to (4)).

use medes_core::StartKind;
use serde::{Deserialize, Serialize};

use crate::eviction::DEDUP_FREES_PERCENT;
use crate::stats::FunctionStats;

/// A warm start is never counted as faster than this, microseconds: the paper's targets are
/// multiples of it, and a multiple of nothing is no target.
pub const WARM_STARTUP_FLOOR_US: u64 = 1_000;
/// What share of a cold start a restore is taken for until one was measured, as a divisor.
const UNMEASURED_RESTORE: f64 = 10.0;

/// What requests and sandboxes of one function cost. Times are seconds, rates per second, memory
/// bytes.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Model {
    /// Average arrival rate: N / T in equation (4).
    pub rate: f64,
    /// The arrival rate that must be met: lambda_max.
    pub peak_rate: f64,
    /// Startup of a warm sandbox: s_W.
    pub warm_startup: f64,
    /// Startup of a dedup sandbox, that is, a restore: s_D.
    pub dedup_startup: f64,
    /// Startup where there is no sandbox. Not in the paper's equations.
    pub cold_startup: f64,
    /// Execution time: R_W and R_D are this and the startup.
    pub execution: f64,
    /// Memory of a warm sandbox: m_W.
    pub warm_bytes: f64,
    /// Memory of a dedup sandbox: m_D.
    pub dedup_bytes: f64,
    /// Memory that a restore needs besides: m_R.
    pub restore_bytes: f64,
}

impl Model {
    /// The model of a function from what was measured of it; `None` as long as no request was
    /// served. What was not measured yet is assumed: a restore takes a tenth of a cold start, and
    /// dedup frees [`DEDUP_FREES_PERCENT`] of the memory.
    #[must_use]
    pub fn of(stats: &FunctionStats, now_ms: u64) -> Option<Self> {
        let seconds = |us: u64| us as f64 / 1e6;
        let average = |kind| stats.startup(kind).and_then(|l| l.average_us()).map(seconds);
        let execution = seconds(stats.execution().average_us()?);
        let warm_startup = seconds(stats.warm_startup_us().unwrap_or(0).max(WARM_STARTUP_FLOOR_US));
        let restore = average(StartKind::Dedup);
        let cold_startup = average(StartKind::Cold)
            .or(restore.map(|r| r * UNMEASURED_RESTORE))
            .unwrap_or(warm_startup * UNMEASURED_RESTORE);
        let warm_bytes = stats.expected_warm_bytes()? as f64;
        let assumed = warm_bytes * (100 - DEDUP_FREES_PERCENT) as f64 / 100.0;
        Some(Self {
            rate: stats.arrivals_per_minute(now_ms) / 60.0,
            peak_rate: f64::from(stats.peak_per_minute()) / 60.0,
            warm_startup,
            dedup_startup: restore.unwrap_or(cold_startup / UNMEASURED_RESTORE).max(warm_startup),
            cold_startup: cold_startup.max(warm_startup),
            execution,
            warm_bytes,
            dedup_bytes: stats.expected_dedup_bytes().map_or(assumed, |b| b as f64),
            restore_bytes: stats.expected_restore_bytes() as f64,
        })
    }

    /// R_W: the least time between two requests on one warm sandbox.
    #[must_use]
    pub fn warm_period(&self) -> f64 {
        self.execution + self.warm_startup
    }

    /// R_D: the least time between two requests on one sandbox that goes dedup between them.
    #[must_use]
    pub fn dedup_period(&self) -> f64 {
        self.execution + self.dedup_startup
    }

    /// Equation (2), left side: requests per second that `warm` and `dedup` sandboxes can serve.
    #[must_use]
    pub fn capacity(&self, warm: u32, dedup: u32) -> f64 {
        f64::from(warm) / self.warm_period() + f64::from(dedup) / self.dedup_period()
    }

    /// Equation (3): M.
    #[must_use]
    pub fn memory(&self, warm: u32, dedup: u32) -> f64 {
        f64::from(warm) * self.warm_bytes
            + f64::from(dedup) * (self.dedup_bytes + self.restore_bytes)
    }

    /// Equation (4): S, the startup latency weighted by what each sandbox *could* serve. Infinite
    /// for a function without requests.
    #[must_use]
    pub fn startup(&self, warm: u32, dedup: u32) -> f64 {
        let warm = f64::from(warm) * self.warm_startup / self.warm_period();
        let dedup = f64::from(dedup) * self.dedup_startup / self.dedup_period();
        if self.rate > 0.0 { (warm + dedup) / self.rate } else { f64::INFINITY }
    }

    /// The startup latency weighted by what is served, if the share `dedup_share` (0 to 1) of the
    /// requests finds a dedup sandbox and the rest a warm one.
    #[must_use]
    pub fn served_startup(&self, dedup_share: f64) -> f64 {
        self.warm_startup + (self.dedup_startup - self.warm_startup) * dedup_share
    }

    /// The largest share of requests that may find a dedup sandbox while
    /// [`Model::served_startup`] stays within `alpha` times a warm startup.
    #[must_use]
    pub fn allowed_dedup_share(&self, alpha: f64) -> f64 {
        let extra = self.dedup_startup - self.warm_startup;
        if extra <= 0.0 {
            return 1.0;
        }
        ((alpha - 1.0) * self.warm_startup / extra).clamp(0.0, 1.0)
    }
}
