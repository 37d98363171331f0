//! The end: no new requests, then no sandboxes.

use super::{Effect, Grant, Phase, Table};
use crate::error::InvokeError;

impl Table {
    /// No request is accepted from now on.
    pub(crate) fn close(&mut self) {
        self.closing = true;
        let idle: Vec<_> = self
            .sandboxes
            .values()
            .filter(|e| {
                matches!(e.phase, Phase::Warm | Phase::Dedup | Phase::Deduping)
                    && self.versions.get(&e.function).is_none_or(|v| v.waiting.is_empty())
            })
            .map(|e| e.id)
            .collect();
        for sandbox in idle {
            self.purge(sandbox);
        }
    }

    /// No request is accepted from now on, and nothing begins by itself; sandboxes stay.
    pub(crate) fn leave(&mut self) {
        self.closing = true;
        self.leaving = true;
        let deduping = self.sandboxes.values().filter(|e| e.phase == Phase::Deduping);
        self.effects.extend(deduping.map(|e| Effect::CancelDedup(e.id)));
    }

    /// Refuses what waits.
    pub(crate) fn refuse_waiting(&mut self) {
        for version in self.versions.values_mut() {
            for waiter in version.waiting.drain(..) {
                let _ = waiter.grant.send(Grant::Refused(InvokeError::ShuttingDown));
            }
        }
    }

    /// Refuses what waits and ends every sandbox, running or not.
    pub(crate) fn end_all(&mut self) {
        self.closing = true;
        self.refuse_waiting();
        for sandbox in self.sandboxes.keys().copied().collect::<Vec<_>>() {
            self.purge(sandbox);
        }
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing
    }

    /// Whether any request waits or runs.
    pub(crate) fn is_busy(&self) -> bool {
        self.versions.values().any(|v| !v.waiting.is_empty())
            || self.sandboxes.values().any(|e| {
                e.phase == Phase::Running || (e.phase == Phase::Restoring && e.for_request)
            })
    }

    /// Whether the state of any sandbox is being changed. Requests that run are no such change.
    pub(crate) fn is_operating(&self) -> bool {
        self.versions.values().any(|v| !v.starting.is_empty())
            || self
                .sandboxes
                .values()
                .any(|e| matches!(e.phase, Phase::Deduping | Phase::Restoring | Phase::Leaving))
    }

    /// Whether there is no sandbox, not even one on its way in or out.
    pub(crate) fn is_empty(&self) -> bool {
        self.sandboxes.is_empty() && self.versions.values().all(|v| v.starting.is_empty())
    }
}
