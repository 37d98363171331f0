//! Why a function's sandboxes stay warm for as long as they do, and what else could be had.

use serde::{Deserialize, Serialize};

use crate::decision::Pressure;
use crate::medes::Medes;
use crate::model::Model;
use crate::price::{Buyer, Keep};
use crate::stats::{FunctionStats, Population};
use crate::targets::Split;

/// Latency targets that are told of besides the one in force.
const TARGETS: [f64; 6] = [1.1, 1.5, 2.5, 5.0, 10.0, 25.0];

/// What the Medes policy decided for one function, and from what.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// The quantities of the paper's equations, as measured.
    pub model: Model,
    /// How many sandboxes there are.
    pub population: Population,
    /// How they would be divided by the paper's equations.
    pub by_rate: Option<Split>,
    /// How long they stay, by the requests that idle ones did serve.
    pub keep: Keep,
    /// How many reuses of idle sandboxes that stands on; older ones count less.
    pub known_reuses: f64,
    /// What that is expected to bring.
    pub outlook: Expected,
    /// What other latency targets would.
    pub targets: Vec<Target>,
}

/// What keeping sandboxes for some time is expected to bring.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Expected {
    /// Memory of idle sandboxes, on average, bytes.
    pub bytes: f64,
    /// Startup of a request, on average, seconds.
    pub startup: f64,
}

/// Another latency target, and what it would bring.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Target {
    /// The multiple of a warm startup.
    pub alpha: f64,
    /// How long sandboxes would stay.
    pub keep: Keep,
    /// What that is expected to bring.
    pub outlook: Expected,
}

/// Explains a function; `None` as long as none of its requests was served.
#[must_use]
pub fn explain(
    policy: &Medes,
    now_ms: u64,
    stats: &FunctionStats,
    pressure: Pressure,
) -> Option<Explanation> {
    let model = Model::of(stats, now_ms)?;
    let buyer = Buyer {
        model,
        rate: model.rate,
        curve: stats.gaps().curve(),
        priority: stats.settings.priority.unwrap_or(1.0),
    };
    let expected = |keep: Keep| {
        let outlook = buyer.outlook(keep);
        let startup = if model.rate > 0.0 { outlook.waiting / model.rate } else { 0.0 };
        Expected { bytes: outlook.bytes, startup }
    };
    let (warm_ms, purge_ms) = policy.keep(now_ms, stats);
    let keep = Keep { warm_ms, purge_ms };
    let targets = TARGETS.into_iter().filter_map(|alpha| {
        let warm_ms = stats.gaps().quantile_ms(model.allowed_dedup_share(alpha))?;
        let keep = Keep { warm_ms, purge_ms: purge_ms.max(warm_ms) };
        Some(Target { alpha, keep, outlook: expected(keep) })
    });
    Some(Explanation {
        model,
        population: stats.population,
        by_rate: policy.split(now_ms, stats, pressure),
        keep,
        known_reuses: stats.gaps().known(),
        outlook: expected(keep),
        targets: targets.collect(),
    })
}
