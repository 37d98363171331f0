//! The Medes policy: how many sandboxes stay warm, by a latency target or a memory budget.

use medes_core::SandboxState;
use serde::{Deserialize, Serialize};

use crate::decision::{Action, Decision, Dedupable, IdleSandbox, Policy, Pressure, purge_at};
use crate::eviction::{
    DEDUP_FREES_PERCENT, Evicting, Eviction, Need, evict_least_recently_used, take_until,
};
use crate::model::Model;
use crate::objective::{Form, Objective};
use crate::price::{Buyer, spend};
use crate::stats::{Directive, FunctionStats};
use crate::targets::{Split, budgets_by_rate, least_latency, least_memory};

/// How often budgets are divided anew, milliseconds.
const PLAN_PERIOD_MS: u64 = 60_000;
/// The share of the memory that idle sandboxes are planned for if no budget is given: what runs,
/// and what comes at once, needs room too.
const PLANNED_SHARE: f64 = 0.9;

/// How many times worse than its length a cold start is counted when it is decided who gives way:
/// the chance of a request is an estimate, and what is purged by mistake can't be had back, while
/// what is deduplicated by mistake can.
const COLD_AVERSION: f64 = 4.0;

/// The periods of a sandbox's life, milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Periods {
    /// Warm without a request for this long: dedup, if the policy says so.
    pub idle_ms: u64,
    /// Warm without a request for this long: purge ([`Form::Paper`]), dedup ([`Form::Served`]).
    pub keep_alive_ms: u64,
    /// Dedup for this long: purge.
    pub keep_dedup_ms: u64,
}

impl Periods {
    /// With what the operator set for this function alone.
    #[must_use]
    pub fn of(self, stats: &FunctionStats) -> Self {
        let s = &stats.settings;
        Self {
            idle_ms: s.idle_ms.unwrap_or(self.idle_ms),
            keep_alive_ms: s.keep_alive_ms.unwrap_or(self.keep_alive_ms),
            keep_dedup_ms: s.keep_dedup_ms.unwrap_or(self.keep_dedup_ms),
        }
    }
}

/// See the module.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Medes {
    /// What is wanted.
    pub objective: Objective,
    /// How it is worked out.
    pub form: Form,
    /// The periods of a sandbox's life.
    pub periods: Periods,
}

impl Medes {
    /// How the function's sandboxes should be divided into warm and dedup by the paper's
    /// equations; `None` as long as too little was measured.
    #[must_use]
    pub fn split(&self, now_ms: u64, stats: &FunctionStats, pressure: Pressure) -> Option<Split> {
        let model = Model::of(stats, now_ms)?;
        let sandboxes = stats.population.warm + stats.population.dedup;
        let memory_free = pressure.excess(0) == 0;
        Some(match self.objective {
            Objective::Latency { alpha } => {
                let alpha = stats.settings.alpha.unwrap_or(alpha);
                least_memory(&model, sandboxes, alpha, memory_free)
            }
            Objective::Memory { budget } => {
                let own = stats.settings.budget.map(|b| b as f64).or(stats.directive.budget);
                let budget = own.unwrap_or(self.total(budget, pressure));
                least_latency(&model, sandboxes, budget, memory_free)
            }
        })
    }

    /// How long the function's sandboxes stay warm without a request, and how long after it they
    /// are there at all, milliseconds, by the requests that idle sandboxes did serve.
    #[must_use]
    pub fn keep(&self, now_ms: u64, stats: &FunctionStats) -> (u64, u64) {
        let p = self.periods.of(stats);
        let (warm_ms, longest) = match self.objective {
            Objective::Latency { alpha } => {
                let alpha = stats.settings.alpha.unwrap_or(alpha);
                let share = Model::of(stats, now_ms).map(|m| m.allowed_dedup_share(alpha));
                (share.and_then(|share| stats.gaps().quantile_ms(share)), p.keep_alive_ms)
            }
            // What the plan has memory for may stay warm for longer.
            Objective::Memory { .. } => {
                (stats.directive.warm_ms, stats.directive.warm_ms.unwrap_or(p.keep_alive_ms))
            }
        };
        // What nobody knows anything about goes dedup after the idle period, as in the paper's
        // infeasible case.
        let warm_ms = warm_ms.unwrap_or(p.idle_ms).clamp(p.idle_ms, longest.max(p.idle_ms));
        let purge_ms = stats.directive.purge_ms.unwrap_or(0).max(warm_ms + p.keep_dedup_ms);
        (warm_ms, purge_ms)
    }

    fn total(&self, budget: u64, pressure: Pressure) -> f64 {
        match (budget, pressure.budget) {
            (0, 0) => f64::INFINITY,
            (0, all) => all as f64 * PLANNED_SHARE,
            (budget, _) => budget as f64,
        }
    }

    fn decide_paper(
        &self,
        now_ms: u64,
        sandbox: &IdleSandbox,
        stats: &FunctionStats,
        pressure: Pressure,
    ) -> Decision {
        let p = self.periods.of(stats);
        let purge = sandbox.since_ms.saturating_add(p.keep_alive_ms);
        if now_ms >= purge {
            return Decision::now(Action::Purge, now_ms);
        }
        let ask = match sandbox.dedupable {
            Dedupable::Now => sandbox.since_ms.saturating_add(p.idle_ms),
            Dedupable::From(moment) => moment.max(sandbox.since_ms.saturating_add(p.idle_ms)),
            Dedupable::Never => u64::MAX,
        };
        if now_ms < ask {
            return Decision::keep_until(ask.min(purge));
        }
        let target = self.split(now_ms, stats, pressure);
        if target.is_none_or(|t| stats.population.dedup < t.dedup) {
            Decision::now(Action::Dedup, now_ms)
        } else {
            Decision::keep_until(now_ms.saturating_add(p.idle_ms.max(1)).min(purge))
        }
    }

    fn decide_served(&self, now_ms: u64, sandbox: &IdleSandbox, stats: &FunctionStats) -> Decision {
        let (warm_ms, purge_ms) = self.keep(now_ms, stats);
        // From the last request on, so that a dedup given up and begun again does not prolong it;
        // one that was made but never used counts from its making.
        let purge = sandbox.last_used_ms.saturating_add(purge_ms);
        if now_ms >= purge {
            return Decision::now(Action::Purge, now_ms);
        }
        if sandbox.state == SandboxState::Dedup {
            return Decision::keep_until(purge);
        }
        let dedup = sandbox.last_used_ms.saturating_add(warm_ms);
        let dedup = match sandbox.dedupable {
            Dedupable::Now => dedup,
            Dedupable::From(moment) => moment.max(dedup),
            // As expensive as it stays it does not stay longer than any other warm one.
            Dedupable::Never => {
                return purge_at(
                    now_ms,
                    sandbox.since_ms.saturating_add(self.periods.of(stats).keep_alive_ms),
                );
            }
        };
        if now_ms >= dedup {
            Decision::now(Action::Dedup, now_ms)
        } else {
            Decision::keep_until(dedup.min(purge))
        }
    }

    /// Seconds of waiting expected per second and byte freed if this sandbox gives way, what is to
    /// be done with it, and how much that frees.
    fn loss(&self, s: &IdleSandbox, ctx: &Evicting<'_, '_>) -> Option<(f64, Action, u64)> {
        let stats = (ctx.stats)(s.function);
        let model = stats.and_then(|stats| Model::of(stats, ctx.now_ms));
        let hazard = stats.map_or(0.0, |f| f.gaps().hazard_from(s.idle_for(ctx.now_ms)));
        let priority = stats.and_then(|f| f.settings.priority).unwrap_or(1.0);
        let per_byte = |waiting: f64, frees: u64| hazard * priority * waiting / frees.max(1) as f64;
        let (restore, cold) = model.map_or((0.01, 1.0), |m| {
            (m.dedup_startup - m.warm_startup, m.cold_startup - m.warm_startup)
        });
        let cold = cold * COLD_AVERSION;
        match s.state {
            SandboxState::Dedup => {
                Some((per_byte((cold - restore).max(0.0), s.memory), Action::Purge, s.memory))
            }
            SandboxState::Warm => {
                let purge = (per_byte(cold, s.memory), Action::Purge, s.memory);
                if s.dedupable != Dedupable::Now {
                    return Some(purge);
                }
                let left = model
                    .map_or(s.memory as f64 * 0.4, |m| m.dedup_bytes + m.restore_bytes)
                    .max(s.memory as f64 * (100 - DEDUP_FREES_PERCENT) as f64 / 400.0);
                let frees = (s.memory as f64 - left).max(0.0) as u64;
                let dedup = (per_byte(restore, frees), Action::Dedup, frees);
                Some(if frees > 0 && dedup.0 <= purge.0 { dedup } else { purge })
            }
            _ => None,
        }
    }
}

impl Policy for Medes {
    fn name(&self) -> &'static str {
        match (self.objective, self.form) {
            (Objective::Latency { .. }, Form::Paper) => "medes-latency-paper",
            (Objective::Latency { .. }, Form::Served) => "medes-latency",
            (Objective::Memory { .. }, Form::Paper) => "medes-memory-paper",
            (Objective::Memory { .. }, Form::Served) => "medes-memory",
        }
    }

    fn decide(
        &self,
        now_ms: u64,
        sandbox: &IdleSandbox,
        stats: &FunctionStats,
        pressure: Pressure,
    ) -> Decision {
        match self.form {
            Form::Paper if sandbox.state == SandboxState::Dedup => {
                let keep_dedup = self.periods.of(stats).keep_dedup_ms;
                purge_at(now_ms, sandbox.since_ms.saturating_add(keep_dedup))
            }
            Form::Paper => self.decide_paper(now_ms, sandbox, stats, pressure),
            Form::Served => self.decide_served(now_ms, sandbox, stats),
        }
    }

    fn evict(&self, idle: &[IdleSandbox], need: Need) -> Vec<Eviction> {
        evict_least_recently_used(idle, need, true)
    }

    /// [`Form::Served`]: what is least likely to be missed per byte goes first.
    fn evict_by(
        &self,
        idle: &[IdleSandbox],
        need: Need,
        ctx: &mut Evicting<'_, '_>,
    ) -> Vec<Eviction> {
        if self.form == Form::Paper || matches!(need, Need::Slots(_)) {
            return self.evict(idle, need);
        }
        let mut list: Vec<_> =
            idle.iter().filter_map(|s| self.loss(s, ctx).map(|loss| (loss, s))).collect();
        list.sort_by(|(a, s), (b, t)| a.0.total_cmp(&b.0).then_with(|| s.order().cmp(&t.order())));
        take_until(need, list.into_iter().map(|((_, action, frees), s)| (action, frees, s)))
    }

    fn plan_period_ms(&self) -> Option<u64> {
        matches!(self.objective, Objective::Memory { .. }).then_some(PLAN_PERIOD_MS)
    }

    fn plan(
        &self,
        now_ms: u64,
        functions: &[&FunctionStats],
        pressure: Pressure,
    ) -> Vec<Directive> {
        let Objective::Memory { budget } = self.objective else {
            return vec![Directive::default(); functions.len()];
        };
        let total = self.total(budget, pressure);
        let rates: Vec<f64> =
            functions.iter().map(|f| f.arrivals_per_minute(now_ms) / 60.0).collect();
        if self.form == Form::Paper {
            return budgets_by_rate(total, &rates)
                .into_iter()
                .map(|b| Directive { budget: Some(b), ..Directive::default() })
                .collect();
        }
        // What runs needs its memory whatever is decided here.
        let mut left = total;
        let mut buyers = Vec::new();
        let mut bought = Vec::new();
        let mut directives = vec![Directive::default(); functions.len()];
        for (i, (stats, rate)) in functions.iter().zip(&rates).enumerate() {
            let Some(model) = Model::of(stats, now_ms) else { continue };
            left -= rate * model.warm_period() * model.warm_bytes;
            let buyer = Buyer {
                model,
                rate: *rate,
                curve: stats.gaps().curve(),
                priority: stats.settings.priority.unwrap_or(1.0),
            };
            match stats.settings.budget {
                // Who has a budget of its own does not bid for the others'.
                Some(own) => {
                    let keep = spend(std::slice::from_ref(&buyer), own as f64)[0];
                    left -= buyer.outlook(keep).bytes;
                    directives[i] = Directive::keep(keep);
                }
                None => {
                    buyers.push(buyer);
                    bought.push(i);
                }
            }
        }
        for (i, keep) in bought.into_iter().zip(spend(&buyers, left.max(0.0))) {
            directives[i] = Directive::keep(keep);
        }
        directives
    }
}
