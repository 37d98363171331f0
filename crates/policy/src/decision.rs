//! What to do with an idle sandbox, and when to ask again.

use std::fmt::Debug;

use medes_core::{FunctionId, SandboxId, SandboxState};
use serde::{Deserialize, Serialize};

use crate::adaptive::Adaptive;
use crate::eviction::{Evicting, Eviction, Need, evict_least_recently_used};
use crate::greedy_dual::GreedyDual;
use crate::medes::{Medes, Periods};
use crate::objective::{Form, Objective};
use crate::stats::{Directive, FunctionStats};

/// Whether a sandbox can go dedup.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Dedupable {
    /// At any time.
    Now,
    /// An attempt failed; the next one makes sense from this moment on, milliseconds.
    From(u64),
    /// Something in it makes it impossible.
    Never,
}

/// A sandbox that serves no request, as a policy sees it. Moments are milliseconds on the caller's
/// clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IdleSandbox {
    /// The sandbox.
    pub id: SandboxId,
    /// The function version that it runs.
    pub function: FunctionId,
    /// [`SandboxState::Warm`], [`SandboxState::Deduping`] or [`SandboxState::Dedup`].
    pub state: SandboxState,
    /// When it went into that state.
    pub since_ms: u64,
    /// When it last served a request (when it was started, if it never did).
    pub last_used_ms: u64,
    /// Whether it can go dedup.
    pub dedupable: Dedupable,
    /// What it is charged for now, bytes.
    pub memory: u64,
}

impl IdleSandbox {
    /// Least recently used first.
    pub(crate) fn order(&self) -> (u64, SandboxId) {
        (self.last_used_ms, self.id)
    }

    /// How long it has not been used, milliseconds.
    #[must_use]
    pub fn idle_for(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.last_used_ms)
    }
}

/// The memory of the node, bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pressure {
    /// In use or promised.
    pub used: u64,
    /// What may be used; 0 if there is no limit.
    pub budget: u64,
}

impl Pressure {
    /// Bytes above the budget if `more` were used as well.
    #[must_use]
    pub fn excess(self, more: u64) -> u64 {
        if self.budget == 0 { 0 } else { (self.used + more).saturating_sub(self.budget) }
    }
}

/// What to do with an idle sandbox.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Leave it as it is.
    Keep,
    /// Deduplicate it.
    Dedup,
    /// End it.
    Purge,
}

/// A policy's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// What to do now.
    pub action: Action,
    /// If it is kept: when to ask again, milliseconds on the caller's clock.
    pub ask_again_ms: u64,
}

impl Decision {
    pub(crate) fn keep_until(ask_again_ms: u64) -> Self {
        Self { action: Action::Keep, ask_again_ms }
    }

    pub(crate) fn now(action: Action, now_ms: u64) -> Self {
        Self { action, ask_again_ms: now_ms }
    }
}

/// Decides over idle sandboxes.
pub trait Policy: Send + Sync + Debug {
    /// The policy's name as configuration and statistics show it.
    fn name(&self) -> &'static str;

    /// What to do with one idle sandbox, warm or dedup.
    fn decide(
        &self,
        now_ms: u64,
        sandbox: &IdleSandbox,
        stats: &FunctionStats,
        pressure: Pressure,
    ) -> Decision;

    /// Which of `idle` have to give way so that `need` is met, in the order in which they should.
    /// May meet less than the need if there is not enough to take.
    fn evict(&self, idle: &[IdleSandbox], need: Need) -> Vec<Eviction>;

    /// Whether it ever deduplicates a sandbox.
    fn dedups(&self) -> bool {
        true
    }

    /// Like [`Policy::evict`], for a caller that has the functions' statistics at hand.
    fn evict_by(
        &self,
        idle: &[IdleSandbox],
        need: Need,
        _ctx: &mut Evicting<'_, '_>,
    ) -> Vec<Eviction> {
        self.evict(idle, need)
    }

    /// How often [`Policy::plan`] wants to be called, milliseconds; `None`: never.
    fn plan_period_ms(&self) -> Option<u64> {
        None
    }

    /// Looks at all functions at once. The answer's n-th directive is for the n-th of `functions`;
    /// the caller keeps it in [`FunctionStats::directive`]. `pressure` is that of all nodes.
    fn plan(
        &self,
        _now_ms: u64,
        functions: &[&FunctionStats],
        _pressure: Pressure,
    ) -> Vec<Directive> {
        vec![Directive::default(); functions.len()]
    }

    /// Asked when a function's last sandbox has gone whose last request ended at `last_used_ms`:
    /// when to start one ahead of the next request, if at all. The caller does so if no request
    /// has come until then, and gives the sandbox that same `last_used_ms`.
    fn prewarm(&self, _now_ms: u64, _last_used_ms: u64, _stats: &FunctionStats) -> Option<u64> {
        None
    }
}

/// Which policy decides, and its periods (milliseconds).
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "policy", rename_all = "kebab-case")]
pub enum PolicyConfig {
    /// See [`Simple`].
    Simple {
        /// Warm without a request for this long: dedup.
        idle_ms: u64,
        /// Warm without a request for this long: purge.
        keep_alive_ms: u64,
        /// Dedup for this long: purge.
        keep_dedup_ms: u64,
    },
    /// See [`FixedKeepAlive`].
    FixedKeepAlive {
        /// Idle for this long: purge.
        keep_alive_ms: u64,
    },
    /// See [`Medes`].
    Medes {
        /// What is wanted.
        objective: Objective,
        /// How it is worked out.
        form: Form,
        /// Warm without a request for this long: dedup, maybe.
        idle_ms: u64,
        /// Warm without a request for this long: not any longer.
        keep_alive_ms: u64,
        /// Dedup for this long: purge.
        keep_dedup_ms: u64,
    },
    /// See [`Adaptive`].
    Adaptive(Adaptive),
    /// See [`GreedyDual`].
    GreedyDual,
}

impl Default for PolicyConfig {
    /// The paper's periods: idle 60 s, keep-alive 10 min, keep-dedup 15 min.
    fn default() -> Self {
        Self::Simple { idle_ms: 60_000, keep_alive_ms: 600_000, keep_dedup_ms: 900_000 }
    }
}

impl PolicyConfig {
    /// The policy with these settings.
    #[must_use]
    pub fn build(self) -> Box<dyn Policy> {
        match self {
            Self::Simple { idle_ms, keep_alive_ms, keep_dedup_ms } => {
                Box::new(Simple { idle_ms, keep_alive_ms, keep_dedup_ms })
            }
            Self::FixedKeepAlive { keep_alive_ms } => Box::new(FixedKeepAlive { keep_alive_ms }),
            Self::Medes { objective, form, idle_ms, keep_alive_ms, keep_dedup_ms } => {
                let periods = Periods { idle_ms, keep_alive_ms, keep_dedup_ms };
                Box::new(Medes { objective, form, periods })
            }
            Self::Adaptive(adaptive) => Box::new(adaptive),
            Self::GreedyDual => Box::new(GreedyDual),
        }
    }
}

/// Dedup after the idle period; purge after the keep-alive period what stayed warm, and after the
/// keep-dedup period what is dedup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Simple {
    /// Warm without a request for this long: dedup. Milliseconds.
    pub idle_ms: u64,
    /// Warm without a request for this long: purge. Milliseconds.
    pub keep_alive_ms: u64,
    /// Dedup for this long: purge. Milliseconds.
    pub keep_dedup_ms: u64,
}

impl Simple {
    /// The periods without a function's own.
    #[must_use]
    pub fn periods(&self) -> Periods {
        let Self { idle_ms, keep_alive_ms, keep_dedup_ms } = *self;
        Periods { idle_ms, keep_alive_ms, keep_dedup_ms }
    }
}

impl Policy for Simple {
    fn name(&self) -> &'static str {
        "simple"
    }

    fn decide(
        &self,
        now_ms: u64,
        sandbox: &IdleSandbox,
        stats: &FunctionStats,
        _pressure: Pressure,
    ) -> Decision {
        let periods = self.periods().of(stats);
        if sandbox.state == SandboxState::Dedup {
            return purge_at(now_ms, sandbox.since_ms.saturating_add(periods.keep_dedup_ms));
        }
        let purge = sandbox.since_ms.saturating_add(periods.keep_alive_ms);
        if now_ms >= purge {
            return Decision::now(Action::Purge, now_ms);
        }
        let idle_over = sandbox.since_ms.saturating_add(periods.idle_ms);
        let dedup = match sandbox.dedupable {
            Dedupable::Now => idle_over,
            Dedupable::From(moment) => idle_over.max(moment),
            Dedupable::Never => u64::MAX,
        };
        if now_ms >= dedup {
            Decision::now(Action::Dedup, now_ms)
        } else {
            Decision::keep_until(dedup.min(purge))
        }
    }

    fn evict(&self, idle: &[IdleSandbox], need: Need) -> Vec<Eviction> {
        evict_least_recently_used(idle, need, true)
    }
}

/// The usual platform: warm for a fixed period after the last request, then purged. Never dedup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FixedKeepAlive {
    /// Idle for this long: purge. Milliseconds.
    pub keep_alive_ms: u64,
}

impl Policy for FixedKeepAlive {
    fn name(&self) -> &'static str {
        "fixed-keep-alive"
    }

    fn dedups(&self) -> bool {
        false
    }

    fn decide(
        &self,
        now_ms: u64,
        sandbox: &IdleSandbox,
        stats: &FunctionStats,
        _pressure: Pressure,
    ) -> Decision {
        let keep_alive_ms = stats.settings.keep_alive_ms.unwrap_or(self.keep_alive_ms);
        purge_at(now_ms, sandbox.since_ms.saturating_add(keep_alive_ms))
    }

    fn evict(&self, idle: &[IdleSandbox], need: Need) -> Vec<Eviction> {
        evict_least_recently_used(idle, need, false)
    }
}

pub(crate) fn purge_at(now_ms: u64, moment_ms: u64) -> Decision {
    if now_ms >= moment_ms {
        Decision::now(Action::Purge, now_ms)
    } else {
        Decision::keep_until(moment_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(state: SandboxState, dedupable: Dedupable) -> IdleSandbox {
        IdleSandbox {
            id: SandboxId(1),
            function: FunctionId(1),
            state,
            since_ms: 1_000,
            last_used_ms: 500,
            dedupable,
            memory: 1,
        }
    }

    fn simple(now: u64, s: &IdleSandbox) -> Decision {
        PolicyConfig::default().build().decide(
            now,
            s,
            &FunctionStats::default(),
            Pressure::default(),
        )
    }

    #[test]
    fn a_warm_sandbox_goes_dedup_after_the_idle_period() {
        let s = sandbox(SandboxState::Warm, Dedupable::Now);
        assert_eq!(simple(1_000, &s), Decision::keep_until(61_000));
        assert_eq!(simple(61_000, &s).action, Action::Dedup);
        assert_eq!(simple(601_000, &s).action, Action::Purge);
    }

    #[test]
    fn one_that_stays_warm_is_purged_after_the_keep_alive_period() {
        let s = sandbox(SandboxState::Warm, Dedupable::Never);
        assert_eq!(simple(90_000, &s), Decision::keep_until(601_000));
        assert_eq!(simple(601_000, &s).action, Action::Purge);
    }

    #[test]
    fn a_failed_attempt_is_repeated_from_the_given_moment() {
        let s = sandbox(SandboxState::Warm, Dedupable::From(121_000));
        assert_eq!(simple(90_000, &s), Decision::keep_until(121_000));
        assert_eq!(simple(121_000, &s).action, Action::Dedup);
    }

    #[test]
    fn a_dedup_sandbox_is_purged_after_the_keep_dedup_period() {
        let s = sandbox(SandboxState::Dedup, Dedupable::Now);
        assert_eq!(simple(1_000, &s), Decision::keep_until(901_000));
        assert_eq!(simple(901_000, &s).action, Action::Purge);
    }

    #[test]
    fn a_functions_own_periods_count_before_the_policys() {
        let mut stats = FunctionStats::default();
        stats.settings.idle_ms = Some(5_000);
        stats.settings.keep_alive_ms = Some(7_000);
        stats.settings.keep_dedup_ms = Some(9_000);
        let none = Pressure::default();
        let warm = sandbox(SandboxState::Warm, Dedupable::Now);
        let policy = PolicyConfig::default().build();
        assert_eq!(policy.decide(1_000, &warm, &stats, none), Decision::keep_until(6_000));
        assert_eq!(policy.decide(8_000, &warm, &stats, none).action, Action::Purge);
        let dedup = sandbox(SandboxState::Dedup, Dedupable::Now);
        assert_eq!(policy.decide(1_000, &dedup, &stats, none), Decision::keep_until(10_000));
        let fixed = PolicyConfig::FixedKeepAlive { keep_alive_ms: 600_000 }.build();
        assert_eq!(fixed.decide(1_000, &warm, &stats, none), Decision::keep_until(8_000));
    }

    #[test]
    fn fixed_keep_alive_never_dedups() {
        let p = PolicyConfig::FixedKeepAlive { keep_alive_ms: 600_000 }.build();
        let s = sandbox(SandboxState::Warm, Dedupable::Now);
        let none = FunctionStats::default();
        for now in (0..700_000).step_by(1_000) {
            let d = p.decide(now, &s, &none, Pressure::default());
            assert_eq!(d.action == Action::Purge, now >= 601_000);
            assert_ne!(d.action, Action::Dedup);
        }
    }
}
