//! Idle sandboxes: what the policy decides over them, and what an operator does with them.

use medes_core::{FunctionId, SandboxId, SandboxState};
use medes_policy::{Action, Decision, Evicting, FunctionStats, Need, base_due};

use super::{DedupReply, Effect, Entry, Phase, Table, Version};
use crate::error::HandError;

/// A dedup operation can't begin.
#[derive(Debug)]
pub(crate) enum DedupRefused {
    /// As many as allowed are under way.
    Busy,
    /// It makes no sense.
    Hand(HandError),
}

/// How often memory is looked at while there are sandboxes and a budget, milliseconds.
const PRESSURE_PERIOD_MS: u64 = 1_000;
/// What the policy decides over a sandbox in the very moment it becomes idle waits this long,
/// milliseconds, so that a dedup that was given up is not begun again at once.
const PAUSE_MS: u64 = 100;

/// What is hardly worth an operation to be let go, bytes.
const LEAST_RESIDENTS: u64 = 256 << 10;

impl Table {
    pub(super) fn decide(&mut self, now_ms: u64, sandbox: SandboxId) -> Option<Decision> {
        let entry = self.sandboxes.get(&sandbox)?;
        let function = entry.function;
        let idle = entry.idle()?;
        self.note_population(function);
        let unknown = FunctionStats::default();
        let stats = self
            .versions
            .get(&function)
            .and_then(|v| self.stats.get(&v.deployed.spec.name))
            .unwrap_or(&unknown);
        Some(self.policy.decide(now_ms, &idle, stats, self.pressure()))
    }

    /// Notes when the policy has to be asked about a sandbox that has just become idle.
    pub(super) fn ask_policy(&mut self, now_ms: u64, sandbox: SandboxId) {
        let Some(decision) = self.decide(now_ms, sandbox) else { return };
        let at = match decision.action {
            Action::Keep => decision.ask_again_ms,
            Action::Dedup | Action::Purge => now_ms + PAUSE_MS,
        };
        if let Some(entry) = self.sandboxes.get_mut(&sandbox) {
            entry.ask_at_ms = at;
        }
        if at < self.next_tick_ms {
            self.next_tick_ms = at;
            self.effects.push(Effect::Wake);
        }
    }

    /// Carries out what is due, and says when to come again.
    pub(crate) fn tick(&mut self, now_ms: u64) -> u64 {
        if self.leaving {
            return u64::MAX;
        }
        let mut due: Vec<(u64, SandboxId)> = self
            .sandboxes
            .values()
            .filter(|e| matches!(e.phase, Phase::Warm | Phase::Dedup) && e.ask_at_ms <= now_ms)
            .map(|e| (e.since_ms, e.id))
            .collect();
        due.sort();
        for (_, sandbox) in due {
            let Some(decision) = self.decide(now_ms, sandbox) else { continue };
            match decision.action {
                Action::Keep => {
                    if let Some(entry) = self.sandboxes.get_mut(&sandbox) {
                        entry.ask_at_ms = decision.ask_again_ms.max(now_ms + 1);
                    }
                }
                Action::Purge => self.discard(now_ms, sandbox),
                // If too many are under way it stays due: the end of one of them comes back here.
                Action::Dedup => {
                    let _ = self.begin_dedup(now_ms, sandbox, false, None);
                }
            }
        }
        self.plan_if_due(now_ms);
        self.prewarm_due(now_ms);
        self.relieve(now_ms, 0);
        self.pump(now_ms);
        self.keep_headroom(now_ms);
        let next = self
            .sandboxes
            .values()
            .filter(|e| matches!(e.phase, Phase::Warm | Phase::Dedup) && e.ask_at_ms > now_ms)
            .map(|e| e.ask_at_ms)
            .chain(self.versions.values().filter_map(|v| v.prewarm_at_ms))
            .chain([self.next_plan_ms])
            .min()
            .unwrap_or(u64::MAX);
        let watched = self.pressure().budget > 0 && !self.is_empty();
        self.next_tick_ms = if watched { next.min(now_ms + PRESSURE_PERIOD_MS) } else { next };
        self.next_tick_ms
    }

    /// Has dedup sandboxes let go of what stays of them, those first that were used longest ago, as far
    /// as it takes to free so many bytes: a restore that takes a few milliseconds longer is the least
    /// that can be given up. Returns how many that will be. Those that have to wait for other
    /// operations count: the end of one of them comes back here.
    fn drop_residents(&mut self, now_ms: u64, bytes: u64) -> u64 {
        if !self.policy.dedups() {
            return 0;
        }
        let may_go =
            |e: &&Entry| e.phase == Phase::Dedup && !e.doomed && e.residents >= LEAST_RESIDENTS;
        let mut all: Vec<_> = self
            .sandboxes
            .values()
            .filter(|e| may_go(e) && !self.is_waited_for(e))
            .map(|e| (e.last_used_ms, e.id, e.dedup_frees()))
            .collect();
        all.sort_unstable();
        let mut freed = 0;
        for (_, sandbox, frees) in all {
            if freed >= bytes {
                break;
            }
            freed += frees;
            let _ = self.begin_dedup_again(now_ms, sandbox);
        }
        freed.min(bytes)
    }

    /// Whether a request waits for a restore of this one, or of another of its function.
    fn is_waited_for(&self, entry: &Entry) -> bool {
        let version = self.versions.get(&entry.function);
        entry.phase == Phase::Dedup && version.is_some_and(Version::wants_restore)
    }

    /// Makes room. What the policy wants to deduplicate while as many operations as allowed are
    /// under way waits for one of them to end, which comes back here.
    pub(super) fn evict(&mut self, now_ms: u64, need: Need) {
        let need = match need {
            Need::Bytes(bytes) => match bytes - self.drop_residents(now_ms, bytes) {
                0 => return,
                more => Need::Bytes(more),
            },
            slots @ Need::Slots(_) => slots,
        };
        let idle: Vec<_> = self
            .sandboxes
            .values()
            .filter(|e| matches!(e.phase, Phase::Warm | Phase::Dedup) && !self.is_waited_for(e))
            .filter_map(Entry::idle)
            .collect();
        let Self { policy, clock, stats, versions, .. } = self;
        let stats = |id| versions.get(&id).and_then(|v| stats.get(&v.deployed.spec.name));
        let mut ctx = Evicting { now_ms, stats: &stats, clock };
        for eviction in policy.evict_by(&idle, need, &mut ctx) {
            match eviction.action {
                Action::Keep => {}
                Action::Dedup => {
                    let _ = self.begin_dedup(now_ms, eviction.sandbox, false, None);
                }
                Action::Purge => self.discard(now_ms, eviction.sandbox),
            }
        }
    }

    /// Ends an idle sandbox that the policy does not want to keep.
    fn discard(&mut self, now_ms: u64, sandbox: SandboxId) {
        let Some(entry) = self.sandboxes.get(&sandbox) else { return };
        let (function, last_used_ms) = (entry.function, entry.last_used_ms);
        if let Some(stats) = self.stats_of(function) {
            stats.purged(now_ms, last_used_ms);
        }
        self.purge(sandbox);
    }

    /// Begins to deduplicate a warm sandbox. A new base snapshot is made if `force_base` or if one
    /// is due.
    pub(crate) fn begin_dedup(
        &mut self,
        now_ms: u64,
        sandbox: SandboxId,
        force_base: bool,
        reply: Option<DedupReply>,
    ) -> Result<(), DedupRefused> {
        let function = self.begin_operation(now_ms, sandbox, SandboxState::Warm)?;
        let new_base = force_base
            || self.versions.get(&function).is_some_and(|v| {
                let dedup = v
                    .sandboxes
                    .iter()
                    .filter_map(|id| self.sandboxes.get(id))
                    .filter(|e| matches!(e.phase, Phase::Dedup | Phase::Deduping))
                    .count() as u64;
                base_due(dedup, v.bases, self.config.base_threshold)
            });
        self.effects.push(Effect::Dedup { sandbox, new_base, reply });
        Ok(())
    }

    /// Has a dedup sandbox let go of what stays of it.
    fn begin_dedup_again(&mut self, now_ms: u64, sandbox: SandboxId) -> Result<(), DedupRefused> {
        self.begin_operation(now_ms, sandbox, SandboxState::Dedup)?;
        if let Some(entry) = self.sandboxes.get_mut(&sandbox) {
            entry.again = true;
        }
        self.effects.push(Effect::Dedup { sandbox, new_base: false, reply: None });
        Ok(())
    }

    /// A sandbox that is `from` goes into a dedup operation, if one more may be under way. Returns its
    /// function.
    fn begin_operation(
        &mut self,
        now_ms: u64,
        sandbox: SandboxId,
        from: SandboxState,
    ) -> Result<FunctionId, DedupRefused> {
        let function = self.expect(sandbox, from).map_err(DedupRefused::Hand)?;
        if self.dedups >= self.config.max_dedups.max(1) {
            return Err(DedupRefused::Busy);
        }
        self.dedups += 1;
        if let Some(entry) = self.sandboxes.get_mut(&sandbox) {
            entry.before_ms = entry.since_ms;
            entry.enter(Phase::Deduping, now_ms);
        }
        Ok(function)
    }

    /// Begins a restore that an operator asked for.
    pub(crate) fn begin_restore(
        &mut self,
        now_ms: u64,
        sandbox: SandboxId,
    ) -> Result<(), HandError> {
        self.expect(sandbox, SandboxState::Dedup)?;
        if let Some(entry) = self.sandboxes.get_mut(&sandbox) {
            entry.enter(Phase::Restoring, now_ms);
        }
        // An operator's word is done at once; what it needs is taken from idle sandboxes.
        self.relieve(now_ms, 0);
        Ok(())
    }

    /// Whether a request, or the end, wants a sandbox whose dedup has not begun in earnest.
    pub(crate) fn dedup_is_unwanted(&self, sandbox: SandboxId) -> bool {
        // One that is dedup still has to run again first.
        self.sandboxes.get(&sandbox).is_none_or(|e| (e.claimed || e.doomed) && !e.again)
    }

    fn expect(&self, sandbox: SandboxId, wanted: SandboxState) -> Result<FunctionId, HandError> {
        let gone = HandError::NoSuchSandbox(sandbox);
        let entry = self.sandboxes.get(&sandbox).ok_or_else(|| gone.clone())?;
        match entry.state() {
            Some(state) if state == wanted => Ok(entry.function),
            Some(state) => Err(HandError::WrongState { sandbox, state, wanted }),
            None => Err(gone),
        }
    }
}
