//! Why a function's sandboxes stay for as long as they do, and what else could be had.

use serde::{Deserialize, Serialize};

use crate::adaptive::Windows;
use crate::decision::{PolicyConfig, Pressure, Simple};
use crate::medes::{Medes, Periods};
use crate::model::Model;
use crate::objective::Form;
use crate::price::{Buyer, Keep};
use crate::stats::{FunctionStats, Population};
use crate::targets::Split;

/// Latency targets that are told of besides the one in force.
const TARGETS: [f64; 6] = [1.1, 1.5, 2.5, 5.0, 10.0, 25.0];

/// What a policy decided for one function, and from what.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Explanation {
    /// How many sandboxes there are.
    pub population: Population,
    /// The quantities of the paper's equations, as measured; `None` as long as no request was
    /// served.
    pub model: Option<Model>,
    /// How long sandboxes stay after their last request; `None` if that is no matter of time: the
    /// paper's equations divide sandboxes by number, and greedy-dual keeps them until their memory
    /// is needed.
    pub keep: Option<Keep>,
    /// How the sandboxes would be divided by the paper's equations. Only Medes does so.
    pub by_rate: Option<Split>,
    /// When a sandbox should be there. Only adaptive keep-alive says so.
    pub windows: Option<Windows>,
    /// The function's part of the memory budget, bytes. Only Medes with a budget, by the paper's
    /// equations, gives one.
    pub budget: Option<f64>,
    /// How many reuses of idle sandboxes are known; older ones count less.
    pub known_reuses: f64,
    /// What that keeping is expected to bring.
    pub outlook: Option<Expected>,
    /// What latency targets of the Medes policy would bring instead.
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

/// Explains what the policy decided for a function. `periods` are those that another latency
/// target would have to work with.
#[must_use]
pub fn explain(
    config: &PolicyConfig,
    periods: Periods,
    now_ms: u64,
    stats: &FunctionStats,
    pressure: Pressure,
) -> Explanation {
    let mut explanation = Explanation {
        population: stats.population,
        model: Model::of(stats, now_ms),
        known_reuses: stats.gaps().known(),
        ..Explanation::default()
    };
    decided(&mut explanation, config, now_ms, stats, pressure);
    let Some(model) = explanation.model else { return explanation };
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
    explanation.outlook = explanation.keep.map(expected);
    let periods = periods.of(stats);
    let targets = TARGETS.into_iter().filter_map(|alpha| {
        let warm_ms = stats.gaps().quantile_ms(model.allowed_dedup_share(alpha))?;
        let longest = periods.keep_alive_ms.max(periods.idle_ms);
        let warm_ms = warm_ms.clamp(periods.idle_ms, longest);
        let keep = Keep { warm_ms, purge_ms: warm_ms + periods.keep_dedup_ms };
        Some(Target { alpha, keep, outlook: expected(keep) })
    });
    explanation.targets = targets.collect();
    explanation
}

/// Notes what the policy in force says.
fn decided(
    explanation: &mut Explanation,
    config: &PolicyConfig,
    now_ms: u64,
    stats: &FunctionStats,
    pressure: Pressure,
) {
    match *config {
        PolicyConfig::Simple { idle_ms, keep_alive_ms, keep_dedup_ms } => {
            let periods = Simple { idle_ms, keep_alive_ms, keep_dedup_ms }.periods().of(stats);
            let warm_ms = periods.idle_ms.min(periods.keep_alive_ms);
            let dedup_ms =
                if periods.idle_ms < periods.keep_alive_ms { periods.keep_dedup_ms } else { 0 };
            explanation.keep = Some(Keep { warm_ms, purge_ms: warm_ms + dedup_ms });
        }
        PolicyConfig::FixedKeepAlive { keep_alive_ms } => {
            let warm_ms = stats.settings.keep_alive_ms.unwrap_or(keep_alive_ms);
            explanation.keep = Some(Keep { warm_ms, purge_ms: warm_ms });
        }
        PolicyConfig::Medes { objective, form, idle_ms, keep_alive_ms, keep_dedup_ms } => {
            let periods = Periods { idle_ms, keep_alive_ms, keep_dedup_ms };
            let medes = Medes { objective, form, periods };
            if form == Form::Served {
                let (warm_ms, purge_ms) = medes.keep(now_ms, stats);
                explanation.keep = Some(Keep { warm_ms, purge_ms });
            }
            explanation.by_rate = medes.split(now_ms, stats, pressure);
            explanation.budget = stats.directive.budget;
        }
        PolicyConfig::Adaptive(adaptive) => {
            let windows = adaptive.windows(stats.idle_times());
            let warm_ms = if windows.prewarm_ms > 0 { 0 } else { windows.keep_ms };
            explanation.keep = Some(Keep { warm_ms, purge_ms: warm_ms });
            explanation.windows = Some(windows);
        }
        PolicyConfig::GreedyDual => {}
    }
}
