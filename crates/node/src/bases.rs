//! Base snapshots that nobody refers to: kept for a while, since the next dedup of their function
//! would make them again, then dropped; dropped at once when the page store has no room.

use std::collections::HashMap;
use std::sync::Weak;
use std::time::{Duration, Instant};

use medes_core::{FunctionId, SnapshotId};
use medes_registry::Registry;
use parking_lot::Mutex;

use crate::shared::Shared;

/// How often the bases are looked at.
const INTERVAL: Duration = Duration::from_secs(5);

/// Since when each unreferenced base snapshot has been so.
#[derive(Debug, Default)]
pub(crate) struct Unused(Mutex<HashMap<SnapshotId, Instant>>);

/// Drops base snapshots that have been unused for longer than `idle`, until the node is gone.
pub(crate) async fn sweep(shared: Weak<Shared>, idle: Duration) {
    let mut ticks = tokio::time::interval(INTERVAL.min(idle.max(Duration::from_millis(10))));
    loop {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        shared.drop_unused_bases(idle);
    }
}

impl Shared {
    fn drop_unused_bases(&self, idle: Duration) {
        let now = Instant::now();
        let unused = self.store.unreferenced();
        let due: Vec<SnapshotId> = {
            let mut since = self.unused.0.lock();
            since.retain(|id, _| unused.iter().any(|(unused, _)| unused == id));
            let age = |id: &SnapshotId, since: &mut HashMap<SnapshotId, Instant>| {
                now.duration_since(*since.entry(*id).or_insert(now))
            };
            unused.iter().map(|(id, _)| *id).filter(|id| age(id, &mut since) >= idle).collect()
        };
        for id in due {
            self.drop_base(id);
        }
        self.store.free_retired();
    }

    /// An operation on a sandbox of the function has come to its end, and the sandbox is no more.
    /// If the function is no more either, nobody else drops the base that the operation has made.
    pub(crate) fn drop_unused_of(&self, function: FunctionId) {
        let unused = self.store.unreferenced();
        let own = unused.into_iter().filter(|(_, of)| *of == function);
        own.for_each(|(id, _)| self.drop_base(id));
    }

    /// Drops every base snapshot that nobody refers to, but those of `keep`. Returns how many.
    pub(crate) fn make_room(&self, keep: FunctionId) -> usize {
        let unused = self.store.unreferenced();
        let others = unused.into_iter().filter(|(_, function)| *function != keep);
        others.map(|(id, _)| self.drop_base(id)).count()
    }

    /// Gives a base snapshot up. Its pages go with the last image that refers to them.
    pub(crate) fn drop_base(&self, id: SnapshotId) {
        if let Err(error) = self.registry.remove(id) {
            tracing::warn!(%error, snapshot = %id, "removing a snapshot's fingerprints");
        }
        self.store.retire_snapshot(id);
        tracing::debug!(snapshot = %id, "base snapshot dropped");
    }
}
