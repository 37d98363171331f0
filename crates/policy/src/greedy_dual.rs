//! Greedy-dual keep-alive (FaasCache: Fuerst and Sharma, ASPLOS '21): nothing goes until memory
//! is needed, and then what is cheapest to lose.

use crate::decision::{Action, Decision, IdleSandbox, Policy, Pressure};
use crate::eviction::{Evicting, Eviction, Need, take_until};
use crate::stats::FunctionStats;

/// How often it is asked about a sandbox that it keeps anyway, milliseconds.
const ASK_AGAIN_MS: u64 = 3_600_000;

/// The clock of greedy-dual: the priority of what was last evicted. It grows, so that what was
/// used long ago falls behind whatever it is worth.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct AgingClock {
    /// What the clock was set to and when, oldest first.
    steps: Vec<(u64, f64)>,
}

impl AgingClock {
    /// The clock at a moment, milliseconds on the caller's clock.
    #[must_use]
    pub fn at(&self, ms: u64) -> f64 {
        match self.steps.partition_point(|(when, _)| *when <= ms) {
            0 => 0.0,
            n => self.steps[n - 1].1,
        }
    }

    fn advance(&mut self, now_ms: u64, to: f64, oldest_ms: u64) {
        if to <= self.at(now_ms) {
            return;
        }
        // What no sandbox looks back to is forgotten.
        let keep = self.steps.partition_point(|(when, _)| *when <= oldest_ms).saturating_sub(1);
        if keep > 64 {
            self.steps.drain(..keep);
        }
        match self.steps.last_mut() {
            Some((when, clock)) if *when == now_ms => *clock = to,
            _ => self.steps.push((now_ms, to)),
        }
    }
}

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GreedyDual;

impl GreedyDual {
    /// What a sandbox is worth: the clock at its last use, and frequency x cost / size of its
    /// function: requests of the last hour, seconds of a cold start, mebibytes. FaasCache counts
    /// requests since the function was last without a container; an hour forgets likewise.
    fn priority(sandbox: &IdleSandbox, ctx: &Evicting<'_, '_>) -> f64 {
        let value = (ctx.stats)(sandbox.function).map_or(0.0, |stats| {
            let cost = stats
                .startup(medes_core::StartKind::Cold)
                .and_then(|l| l.average_us())
                .map_or(1.0, |us| us as f64 / 1e6);
            let size = (sandbox.memory as f64 / f64::from(1 << 20)).max(1e-3);
            let priority = stats.settings.priority.unwrap_or(1.0);
            stats.recent_requests(ctx.now_ms) as f64 * cost * priority / size
        });
        ctx.clock.at(sandbox.last_used_ms) + value
    }
}

impl Policy for GreedyDual {
    fn name(&self) -> &'static str {
        "greedy-dual"
    }

    fn dedups(&self) -> bool {
        false
    }

    fn decide(
        &self,
        now_ms: u64,
        _sandbox: &IdleSandbox,
        _stats: &FunctionStats,
        _pressure: Pressure,
    ) -> Decision {
        Decision { action: Action::Keep, ask_again_ms: now_ms.saturating_add(ASK_AGAIN_MS) }
    }

    /// Without statistics: least recently used first.
    fn evict(&self, idle: &[IdleSandbox], need: Need) -> Vec<Eviction> {
        crate::eviction::evict_least_recently_used(idle, need, false)
    }

    fn evict_by(
        &self,
        idle: &[IdleSandbox],
        need: Need,
        ctx: &mut Evicting<'_, '_>,
    ) -> Vec<Eviction> {
        let mut list: Vec<_> =
            idle.iter().map(|s| (Self::priority(s, ctx), Action::Purge, s.memory, s)).collect();
        list.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.3.order().cmp(&b.3.order())));
        let evictions =
            take_until(need, list.iter().map(|(_, action, frees, s)| (*action, *frees, *s)));
        if let Some(last) = evictions.len().checked_sub(1).and_then(|n| list.get(n)) {
            let oldest = idle.iter().map(|s| s.last_used_ms).min().unwrap_or(ctx.now_ms);
            ctx.clock.advance(ctx.now_ms, last.0, oldest);
        }
        evictions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use medes_core::{FunctionId, SandboxId, SandboxState, StartKind};

    use crate::decision::Dedupable;

    fn sandbox(id: u64, memory: u64, used: u64) -> IdleSandbox {
        IdleSandbox {
            id: SandboxId(id),
            function: FunctionId(id),
            state: SandboxState::Warm,
            since_ms: used,
            last_used_ms: used,
            dedupable: Dedupable::Never,
            memory,
        }
    }

    #[test]
    fn the_cheapest_to_lose_goes_first_and_the_clock_catches_up() {
        let mut often = FunctionStats::default();
        for i in 0..50 {
            often.arrived(i * 10);
            often.served(StartKind::Cold, 1_000_000, 1_000, false);
        }
        let mut seldom = FunctionStats::default();
        seldom.arrived(0);
        seldom.served(StartKind::Cold, 1_000_000, 1_000, false);
        let stats = [often, seldom];
        let find = |f: FunctionId| stats.get(f.0 as usize);
        let mut clock = AgingClock::default();
        let idle = [sandbox(0, 1 << 20, 100), sandbox(1, 1 << 20, 600)];
        let mut ctx = Evicting { now_ms: 1_000, stats: &find, clock: &mut clock };
        let out = GreedyDual.evict_by(&idle, Need::Bytes(1), &mut ctx);
        assert_eq!(out.iter().map(|e| e.sandbox.0).collect::<Vec<_>>(), [1]);
        assert_eq!(clock.at(999), 0.0);
        assert!((clock.at(1_000) - 1.0).abs() < 1e-9);
        // Each eviction lifts those used after it; in the end the frequent one goes.
        for round in 2..100u64 {
            let idle = [sandbox(0, 1 << 20, 100), sandbox(1, 1 << 20, round * 1_000)];
            let now_ms = round * 1_000 + 1;
            let mut ctx = Evicting { now_ms, stats: &find, clock: &mut clock };
            let out = GreedyDual.evict_by(&idle, Need::Bytes(1), &mut ctx);
            if out[0].sandbox.0 == 0 {
                assert!(round > 10);
                return;
            }
        }
        panic!("what was used long ago never went");
    }
}
