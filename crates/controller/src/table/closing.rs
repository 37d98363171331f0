//! The end: no new requests, then no sandboxes.

use super::{Grant, Phase, Table};
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

    /// Refuses what waits and ends every sandbox, running or not.
    pub(crate) fn end_all(&mut self) {
        self.closing = true;
        for version in self.versions.values_mut() {
            for waiter in version.waiting.drain(..) {
                let _ = waiter.grant.send(Grant::Refused(InvokeError::ShuttingDown));
            }
        }
        for sandbox in self.sandboxes.keys().copied().collect::<Vec<_>>() {
            self.purge(sandbox);
        }
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

    /// Whether there is no sandbox, not even one on its way in or out.
    pub(crate) fn is_empty(&self) -> bool {
        self.sandboxes.is_empty() && self.versions.values().all(|v| v.starting.is_empty())
    }
}
