//! Which idle sandboxes give way when there is not enough room.

use std::fmt;

use medes_core::{FunctionId, SandboxId, SandboxState};

use crate::decision::{Action, Dedupable, IdleSandbox};
use crate::greedy_dual::AgingClock;
use crate::stats::FunctionStats;

/// What is missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// Memory, bytes.
    Bytes(u64),
    /// Room for this many sandboxes, whatever they weigh.
    Slots(u32),
}

/// One sandbox that has to give way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Eviction {
    /// The sandbox.
    pub sandbox: SandboxId,
    /// [`Action::Dedup`] or [`Action::Purge`].
    pub action: Action,
}

/// What a policy may look at to decide who gives way.
pub struct Evicting<'s, 'c> {
    /// The moment, milliseconds on the caller's clock.
    pub now_ms: u64,
    /// The statistics of each function.
    pub stats: &'s dyn Fn(FunctionId) -> Option<&'s FunctionStats>,
    /// What [`crate::GreedyDual`] remembers from one eviction to the next; one per node.
    pub clock: &'c mut AgingClock,
}

impl fmt::Debug for Evicting<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Evicting").field("now_ms", &self.now_ms).finish_non_exhaustive()
    }
}

/// What part of a warm sandbox's memory its dedup is counted on to free, in percent. Low on
/// purpose: who counts on too much starts a sandbox that then does not fit.
pub const DEDUP_FREES_PERCENT: u64 = 60;

/// Least recently used first; for memory, warm sandboxes go dedup before dedup ones go away, and
/// warm ones that can't go dedup are purged last. For room, the oldest is purged, dedup before
/// warm. With `dedup` false nothing is deduplicated.
#[must_use]
pub fn evict_least_recently_used(idle: &[IdleSandbox], need: Need, dedup: bool) -> Vec<Eviction> {
    let mut candidates: Vec<(u8, Action, u64, &IdleSandbox)> = idle
        .iter()
        .filter_map(|s| match (s.state, need) {
            (SandboxState::Warm, Need::Bytes(_)) if dedup && s.dedupable == Dedupable::Now => {
                Some((0, Action::Dedup, s.memory * DEDUP_FREES_PERCENT / 100, s))
            }
            (SandboxState::Dedup, _) => Some((1, Action::Purge, s.memory, s)),
            (SandboxState::Warm, _) => Some((2, Action::Purge, s.memory, s)),
            _ => None,
        })
        .collect();
    candidates.sort_by_key(|(class, _, _, s)| (*class, s.last_used_ms, s.id));

    take_until(need, candidates.into_iter().map(|(_, action, frees, s)| (action, frees, s)))
}

/// The first of `candidates` (what to do, bytes that it frees, the sandbox) that together meet the
/// need.
pub(crate) fn take_until<'a>(
    need: Need,
    candidates: impl Iterator<Item = (Action, u64, &'a IdleSandbox)>,
) -> Vec<Eviction> {
    let mut missing = match need {
        Need::Bytes(n) => n,
        Need::Slots(n) => u64::from(n),
    };
    let mut evictions = Vec::new();
    for (action, frees, s) in candidates {
        if missing == 0 {
            break;
        }
        missing = missing.saturating_sub(if matches!(need, Need::Slots(_)) { 1 } else { frees });
        evictions.push(Eviction { sandbox: s.id, action });
    }
    evictions
}

#[cfg(test)]
mod tests {
    use super::*;
    use medes_core::FunctionId;

    fn idle(id: u64, state: SandboxState, used: u64, dedupable: Dedupable) -> IdleSandbox {
        IdleSandbox {
            id: SandboxId(id),
            function: FunctionId(1),
            state,
            since_ms: used,
            last_used_ms: used,
            dedupable,
            memory: 100,
        }
    }

    fn pool() -> Vec<IdleSandbox> {
        vec![
            idle(1, SandboxState::Warm, 50, Dedupable::Now),
            idle(2, SandboxState::Warm, 10, Dedupable::Now),
            idle(3, SandboxState::Dedup, 5, Dedupable::Now),
            idle(4, SandboxState::Warm, 1, Dedupable::Never),
            idle(5, SandboxState::Deduping, 0, Dedupable::Now),
        ]
    }

    fn plan(need: Need, dedup: bool) -> Vec<(u64, Action)> {
        evict_least_recently_used(&pool(), need, dedup)
            .into_iter()
            .map(|e| (e.sandbox.0, e.action))
            .collect()
    }

    #[test]
    fn memory_warm_into_dedup_before_dedup_into_nothing() {
        assert_eq!(plan(Need::Bytes(60), true), [(2, Action::Dedup)]);
        assert_eq!(
            plan(Need::Bytes(1_000), true),
            [(2, Action::Dedup), (1, Action::Dedup), (3, Action::Purge), (4, Action::Purge)]
        );
        assert_eq!(plan(Need::Bytes(0), true), []);
    }

    #[test]
    fn without_dedup_the_least_recently_used_goes() {
        assert_eq!(plan(Need::Bytes(101), false), [(3, Action::Purge), (4, Action::Purge)]);
    }

    #[test]
    fn room_is_made_by_purging() {
        assert_eq!(plan(Need::Slots(2), true), [(3, Action::Purge), (4, Action::Purge)]);
    }
}
