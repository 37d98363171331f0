//! Which idle sandbox serves the next request.

use medes_core::{SandboxId, SandboxState};

use crate::decision::IdleSandbox;

/// The sandbox that should serve the next request of its function: a warm one, else one whose
/// dedup has only begun, else a dedup one; among equals the most recently used, so that the others
/// grow old and leave. `None` means a cold start.
#[must_use]
pub fn choose(idle: impl IntoIterator<Item = IdleSandbox>) -> Option<SandboxId> {
    idle.into_iter()
        .filter_map(|s| {
            let rank = match s.state {
                SandboxState::Warm => 2,
                SandboxState::Deduping => 1,
                SandboxState::Dedup => 0,
                _ => return None,
            };
            Some((rank, s.last_used_ms, s.id))
        })
        .max()
        .map(|(_, _, id)| id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decision::Dedupable;
    use medes_core::FunctionId;

    #[test]
    fn warm_else_deduping_else_dedup_and_the_newest_of_each() {
        let mut pool = vec![];
        for (id, state, used) in [
            (1, SandboxState::Dedup, 90),
            (2, SandboxState::Dedup, 95),
            (3, SandboxState::Deduping, 1),
            (4, SandboxState::Warm, 3),
            (5, SandboxState::Warm, 7),
            (6, SandboxState::Running, 99),
        ] {
            pool.push(IdleSandbox {
                id: SandboxId(id),
                function: FunctionId(1),
                state,
                since_ms: used,
                last_used_ms: used,
                dedupable: Dedupable::Now,
                memory: 1,
            });
        }
        for expected in [5, 4, 3, 2, 1] {
            let id = choose(pool.iter().copied()).unwrap();
            assert_eq!(id, SandboxId(expected));
            pool.retain(|s| s.id != id);
        }
        assert_eq!(choose(pool), None);
    }
}
