//! Memory that is short: who gives way, and who is served then.

use medes_core::FunctionId;
use medes_policy::{Action, Dedupable, Evicting, Need};

use super::Engine;

impl Engine<'_> {
    /// Makes room on a node for `more` bytes. `now`: a request waits for it, so idle sandboxes are
    /// ended; else warm ones may go dedup, which frees memory later.
    pub(super) fn relieve(&mut self, node: u32, more: u64, now: bool) {
        let n = &mut self.cluster.nodes[node as usize];
        let coming = if now { 0 } else { n.coming };
        let excess = n.pressure(self.config.node_memory).excess(more).saturating_sub(coming);
        if excess == 0 || n.idle.is_empty() {
            return;
        }
        let busy = n.dedups >= self.config.max_dedups.max(1);
        if busy && !now {
            return;
        }
        let now_ms = self.now_us / 1_000;
        let dedupable = if now { Dedupable::From(now_ms + 1) } else { Dedupable::Now };
        let sandboxes = &self.cluster.sandboxes;
        let idle: Vec<_> =
            n.idle.iter().map(|slot| sandboxes[*slot as usize].view(*slot, dedupable)).collect();
        let functions = &self.cluster.functions;
        let stats = |f: FunctionId| functions.get(f.0 as usize).map(|f| &f.stats);
        let mut ctx = Evicting { now_ms, stats: &stats, clock: &mut n.clock };
        let evictions = self.policy.evict_by(&idle, Need::Bytes(excess), &mut ctx);
        for eviction in evictions {
            let slot = eviction.sandbox.0 as u32;
            match eviction.action {
                Action::Keep => {}
                Action::Dedup => {
                    if self.begin_dedup(slot) {
                        self.evicted[0] += 1;
                    }
                }
                Action::Purge => {
                    self.evicted[1] += 1;
                    self.purge(slot);
                }
            }
        }
    }

    /// Keeps a node's headroom.
    pub(super) fn tidy(&mut self, node: u32) {
        if self.headroom > 0 {
            self.relieve(node, self.headroom, false);
        }
    }

    pub(super) fn unblock(&mut self, function: u32, arrived_us: u64) {
        if self.blocked.remove(&(arrived_us, function)) {
            self.block(function);
        }
    }

    /// Serves those who wait for memory, the longest first.
    pub(super) fn pump(&mut self) {
        while let Some((arrived_us, function)) = self.blocked.first().copied() {
            self.blocked.remove(&(arrived_us, function));
            if !self.serve(function, true) {
                self.block(function);
                return;
            }
        }
    }
}
