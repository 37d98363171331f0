//! The policy in force: what it plans for all functions, what it wants made ahead of time, and how
//! another takes its place.

use medes_core::{FunctionId, FunctionName};
use medes_policy::{
    AgingClock, Directive, Explanation, FunctionSettings, FunctionStats, Periods, PolicySettings,
    Population, explain,
};

use super::pump::Admission;
use super::{Effect, Entry, Phase, Table, Version};

impl Version {
    /// Whether a waiting request would take a dedup sandbox.
    pub(super) fn wants_restore(&self) -> bool {
        self.waiting.iter().any(|w| w.restore_allowed)
    }
}

impl Table {
    /// The settings of the policy in force.
    pub(crate) fn policy_settings(&self) -> PolicySettings {
        self.settings
    }

    /// Has another policy decide, beginning with all sandboxes that are idle now.
    pub(crate) fn set_policy(&mut self, now_ms: u64, settings: PolicySettings) {
        self.settings = settings;
        self.policy = settings.config().build();
        self.clock = AgingClock::default();
        for stats in self.stats.values_mut() {
            stats.directive = Directive::default();
        }
        for version in self.versions.values_mut() {
            version.prewarm_at_ms = None;
        }
        self.next_plan_ms = now_ms;
        self.plan_if_due(now_ms);
        self.ask_about_all(now_ms);
    }

    /// Changes what the operator wants for one function alone; false if there is none.
    pub(crate) fn set_function_settings(
        &mut self,
        now_ms: u64,
        name: &FunctionName,
        deployed: std::sync::Arc<crate::store::Deployed>,
    ) -> bool {
        let Some(version) = self.current.get(name).and_then(|id| self.versions.get_mut(id)) else {
            return false;
        };
        if version.deployed.spec.id != deployed.spec.id {
            return false;
        }
        let settings: FunctionSettings = deployed.settings;
        version.deployed = deployed;
        if let Some(stats) = self.stats.get_mut(name) {
            stats.settings = settings;
        }
        self.next_plan_ms = now_ms;
        self.plan_if_due(now_ms);
        self.ask_about_all(now_ms);
        true
    }

    fn ask_about_all(&mut self, now_ms: u64) {
        let idle = |e: &&Entry| matches!(e.phase, Phase::Warm | Phase::Dedup);
        let all: Vec<_> = self.sandboxes.values().filter(idle).map(|e| e.id).collect();
        for sandbox in all {
            self.ask_policy(now_ms, sandbox);
        }
        self.effects.push(Effect::Wake);
    }

    /// Counts a function's sandboxes, for the policy to know.
    pub(super) fn note_population(&mut self, function: FunctionId) {
        let Some(version) = self.versions.get(&function) else { return };
        let mut population = Population { warm: version.starting.len() as u32, dedup: 0 };
        for entry in version.sandboxes.iter().filter_map(|id| self.sandboxes.get(id)) {
            match entry.phase {
                Phase::Running | Phase::Warm | Phase::Restoring => population.warm += 1,
                Phase::Deduping | Phase::Dedup => population.dedup += 1,
                Phase::Leaving => {}
            }
        }
        if let Some(stats) = self.stats.get_mut(&version.deployed.spec.name) {
            stats.population = population;
        }
    }

    /// Lets the policy look at all functions, if its time has come.
    pub(super) fn plan_if_due(&mut self, now_ms: u64) {
        if now_ms < self.next_plan_ms {
            return;
        }
        let Some(period_ms) = self.policy.plan_period_ms() else {
            self.next_plan_ms = u64::MAX;
            return;
        };
        self.next_plan_ms = now_ms.saturating_add(period_ms.max(1));
        for id in self.current.values().copied().collect::<Vec<_>>() {
            self.note_population(id);
        }
        let unknown = FunctionStats::default();
        let functions: Vec<_> =
            self.current.keys().map(|name| self.stats.get(name).unwrap_or(&unknown)).collect();
        let directives = self.policy.plan(now_ms, &functions, self.pressure());
        for (name, directive) in self.current.keys().zip(directives) {
            if let Some(stats) = self.stats.get_mut(name) {
                stats.directive = directive;
            }
        }
    }

    /// A sandbox of the function has gone: if it was the last, the policy may want another to be
    /// there when the next request comes.
    pub(super) fn plan_prewarm(&mut self, now_ms: u64, function: FunctionId) {
        let Some(version) = self.versions.get_mut(&function) else { return };
        let deserted = version.sandboxes.is_empty()
            && version.starting.is_empty()
            && version.waiting.is_empty();
        if !version.current || !deserted || self.closing {
            return;
        }
        let Some(stats) = self.stats.get(&version.deployed.spec.name) else { return };
        version.prewarm_at_ms = self.policy.prewarm(now_ms, version.last_used_ms, stats);
        if let Some(at) = version.prewarm_at_ms
            && at < self.next_tick_ms
        {
            self.next_tick_ms = at;
            self.effects.push(Effect::Wake);
        }
    }

    /// Starts the sandboxes whose time has come. Nobody gives way for a guess: those that there is
    /// no room for are forgotten.
    pub(super) fn prewarm_due(&mut self, now_ms: u64) {
        let due: Vec<_> = self
            .versions
            .iter_mut()
            .filter(|(_, v)| v.prewarm_at_ms.is_some_and(|at| at <= now_ms))
            .map(|(id, v)| {
                v.prewarm_at_ms = None;
                (*id, v.last_used_ms)
            })
            .collect();
        for (id, last_used_ms) in due {
            let anybody_waits = self.versions.values().any(|v| !v.waiting.is_empty());
            let starting: usize = self.versions.values().map(|v| v.starting.len()).sum();
            let limit = self.config.max_sandboxes as usize;
            let full = limit > 0 && self.sandboxes.len() + starting >= limit;
            let needed = self.expected_bytes(id);
            if anybody_waits || full || self.closing || self.pressure().excess(needed) > 0 {
                continue;
            }
            if self.admit(now_ms, id) == Admission::Granted {
                self.start(now_ms, id, Some(last_used_ms));
            }
        }
    }

    /// What the policy decided for a function, and from what.
    pub(crate) fn explain(&mut self, now_ms: u64, name: &FunctionName) -> Option<Explanation> {
        let id = *self.current.get(name)?;
        self.note_population(id);
        let s = &self.settings;
        let periods = Periods {
            idle_ms: s.idle_ms,
            keep_alive_ms: s.keep_alive_ms,
            keep_dedup_ms: s.keep_dedup_ms,
        };
        let stats = self.stats.get(name)?;
        Some(explain(&s.config(), periods, now_ms, stats, self.pressure()))
    }
}
