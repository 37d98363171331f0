//! How many of a function's sandboxes should be dedup: the paper's P1 and P2 (section 5).
//!
//! With W = C - D every constraint is linear in D, so each leaves an interval of D, and the best D
//! is one end of what all of them leave.

use serde::{Deserialize, Serialize};

use crate::model::Model;

/// How many sandboxes should be warm and dedup.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Split {
    /// W.
    pub warm: u32,
    /// D.
    pub dedup: u32,
    /// Whether all constraints hold. If not, this is the paper's way out.
    pub feasible: bool,
}

/// The integers from `lo` to `hi`; empty if `lo > hi`.
#[derive(Clone, Copy)]
struct Interval {
    lo: f64,
    hi: f64,
}

impl Interval {
    /// Those x that also satisfy `a * x <= b`.
    fn and(self, a: f64, b: f64) -> Self {
        if a > 0.0 {
            Self { hi: self.hi.min((b / a).floor()), ..self }
        } else if a < 0.0 {
            Self { lo: self.lo.max((b / a).ceil()), ..self }
        } else if b < 0.0 {
            Self { lo: 1.0, hi: 0.0 }
        } else {
            self
        }
    }
}

/// P1: the least memory such that the startup latency (4) is at most `alpha` times a warm one and
/// the peak rate can be served. `memory_free` tells whether sandboxes may stay warm if that can't
/// be had.
#[must_use]
pub fn least_memory(model: &Model, sandboxes: u32, alpha: f64, memory_free: bool) -> Split {
    let feasible = latency(model, load(model, all(sandboxes), sandboxes), sandboxes, alpha);
    let saved = model.warm_bytes - model.dedup_bytes - model.restore_bytes;
    pick(model, sandboxes, feasible, saved > 0.0, memory_free)
}

/// P2: the least startup latency (4) such that the memory (3) is at most `budget` bytes and the
/// peak rate can be served. `memory_free` as for [`least_memory`].
#[must_use]
pub fn least_latency(model: &Model, sandboxes: u32, budget: f64, memory_free: bool) -> Split {
    let saved = model.warm_bytes - model.dedup_bytes - model.restore_bytes;
    let feasible = load(model, all(sandboxes), sandboxes)
        .and(-saved, budget - f64::from(sandboxes) * model.warm_bytes);
    let slower = model.dedup_startup / model.dedup_period();
    let faster = model.warm_startup / model.warm_period();
    pick(model, sandboxes, feasible, slower < faster, memory_free)
}

fn all(sandboxes: u32) -> Interval {
    Interval { lo: 0.0, hi: f64::from(sandboxes) }
}

/// Equation (2): (C - D) / R_W + D / R_D >= lambda_max.
fn load(model: &Model, interval: Interval, sandboxes: u32) -> Interval {
    let (warm, dedup) = (model.warm_period(), model.dedup_period());
    interval.and(1.0 / warm - 1.0 / dedup, f64::from(sandboxes) / warm - model.peak_rate)
}

/// Equation (4) within alpha s_W: (C - D) s_W / R_W + D s_D / R_D <= alpha lambda s_W.
fn latency(model: &Model, interval: Interval, sandboxes: u32, alpha: f64) -> Interval {
    let warm = model.warm_startup / model.warm_period();
    let dedup = model.dedup_startup / model.dedup_period();
    let allowed = alpha * model.rate * model.warm_startup;
    interval.and(dedup - warm, allowed - f64::from(sandboxes) * warm)
}

fn pick(
    model: &Model,
    sandboxes: u32,
    feasible: Interval,
    most_dedup: bool,
    memory_free: bool,
) -> Split {
    let split = |dedup: u32, feasible| Split { warm: sandboxes - dedup, dedup, feasible };
    if feasible.lo <= feasible.hi {
        let dedup = if most_dedup { feasible.hi } else { feasible.lo };
        return split((dedup as u32).min(sandboxes), true);
    }
    // "Dedup aggressively; keep warm only if memory allows and the sandboxes are too few."
    if !memory_free {
        return split(sandboxes, false);
    }
    let fast_enough = load(model, all(sandboxes), sandboxes);
    let dedup = if fast_enough.lo <= fast_enough.hi { fast_enough.hi } else { 0.0 };
    split((dedup as u32).min(sandboxes), false)
}

/// The paper's division of a memory budget among functions: in proportion to their rates. Without
/// any request, evenly.
#[must_use]
pub fn budgets_by_rate(budget: f64, rates: &[f64]) -> Vec<f64> {
    let total: f64 = rates.iter().sum();
    rates
        .iter()
        .map(|r| if total > 0.0 { budget * r / total } else { budget / rates.len() as f64 })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn models() -> impl Strategy<Value = Model> {
        (
            (0.001f64..50.0, 1.0f64..4.0),
            (0.0005f64..0.1, 0.5f64..60.0, 0.002f64..5.0),
            (1e6f64..2e8, 0.01f64..1.2, 0.0f64..0.2),
        )
            .prop_map(|((rate, peak), (s_w, slower, exec), (m_w, d, r))| Model {
                rate,
                peak_rate: rate * peak,
                warm_startup: s_w,
                dedup_startup: s_w * slower,
                cold_startup: s_w * slower * 10.0,
                execution: exec,
                warm_bytes: m_w,
                dedup_bytes: m_w * d,
                restore_bytes: m_w * r,
            })
    }

    /// Constraints with a hair's breadth of slack, for the closed forms round otherwise.
    fn at_most(a: f64, b: f64) -> bool {
        a <= b + 1e-9 * (a.abs() + b.abs())
    }

    proptest! {
        #[test]
        fn p1_is_what_trying_every_split_finds(
            m in models(), c in 0u32..80, alpha in 0.5f64..20.0, free in any::<bool>()
        ) {
            let holds = |d: u32| {
                at_most(m.peak_rate, m.capacity(c - d, d))
                    && at_most(m.startup(c - d, d), alpha * m.warm_startup)
            };
            let best = (0..=c).filter(|d| holds(*d)).map(|d| m.memory(c - d, d))
                .fold(f64::INFINITY, f64::min);
            let split = least_memory(&m, c, alpha, free);
            prop_assert_eq!(split.warm + split.dedup, c);
            prop_assert_eq!(split.feasible, best.is_finite());
            if split.feasible {
                prop_assert!(holds(split.dedup));
                prop_assert!(at_most(m.memory(split.warm, split.dedup), best));
            }
        }

        #[test]
        fn p2_is_what_trying_every_split_finds(
            m in models(), c in 0u32..80, share in 0.0f64..1.5, free in any::<bool>()
        ) {
            let budget = share * f64::from(c) * m.warm_bytes;
            let holds = |d: u32| {
                at_most(m.peak_rate, m.capacity(c - d, d)) && at_most(m.memory(c - d, d), budget)
            };
            let best = (0..=c).filter(|d| holds(*d)).map(|d| m.startup(c - d, d))
                .fold(f64::INFINITY, f64::min);
            let split = least_latency(&m, c, budget, free);
            prop_assert_eq!(split.feasible, best.is_finite());
            if split.feasible {
                prop_assert!(holds(split.dedup));
                prop_assert!(at_most(m.startup(split.warm, split.dedup), best));
            }
        }

        #[test]
        fn budgets_add_up(rates in prop::collection::vec(0.0f64..1e3, 1..20)) {
            let sum: f64 = budgets_by_rate(1e9, &rates).iter().sum();
            prop_assert!((sum - 1e9).abs() < 1.0);
        }
    }

    #[test]
    fn without_a_way_sandboxes_go_dedup_unless_there_is_room_and_need() {
        let m = Model {
            rate: 10.0,
            peak_rate: 10.0,
            warm_startup: 0.001,
            dedup_startup: 0.5,
            cold_startup: 1.0,
            execution: 0.5,
            warm_bytes: 1e8,
            dedup_bytes: 1e7,
            restore_bytes: 0.0,
        };
        let split = |c, free| least_memory(&m, c, 1.01, free);
        // Four can't serve ten a second, not even warm.
        assert_eq!(split(4, true), Split { warm: 4, dedup: 0, feasible: false });
        assert_eq!(split(4, false), Split { warm: 0, dedup: 4, feasible: false });
        // A hundred could, all of them dedup.
        assert_eq!(split(100, true), Split { warm: 0, dedup: 100, feasible: false });
    }
}
