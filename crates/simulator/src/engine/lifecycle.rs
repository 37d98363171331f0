//! What becomes of sandboxes: starts and requests that end, and what the policy decides.

use medes_core::StartKind;
use medes_policy::{Action, Decision, Dedupable, base_due};

use crate::cluster::Phase;
use crate::config::Bases;
use crate::event::{Event, Happening};

use super::PAUSE_US;

use super::Engine;

impl Engine<'_> {
    pub(super) fn happen(&mut self, event: Event) {
        if event.what == Happening::Prewarm {
            self.prewarm(event.slot, event.epoch);
            return;
        }
        let s = &self.cluster.sandboxes[event.slot as usize];
        if s.epoch != event.epoch {
            return;
        }
        match event.what {
            Happening::Started => self.started(event.slot),
            Happening::Done => self.done(event.slot),
            Happening::Ask if s.timer_us == event.at_us => self.ask(event.slot),
            Happening::Deduped => self.deduped(event.slot),
            Happening::Ask | Happening::Prewarm => {}
        }
    }

    pub(super) fn started(&mut self, slot: u32) {
        let s = &self.cluster.sandboxes[slot as usize];
        let (function, startup) = (s.function, s.startup_us);
        let f = &mut self.cluster.functions[function as usize];
        f.starting -= 1;
        f.stats.warm_memory(s.memory);
        if let Some(w) = f.waiting.pop_front() {
            self.unblock(function, w.arrived_us);
            let waited = self.now_us - w.arrived_us;
            let startup = startup.min(waited);
            self.run(function, slot, w, StartKind::Cold, waited - startup, startup);
            return;
        }
        self.idle(slot);
    }

    pub(super) fn done(&mut self, slot: u32) {
        let now_ms = self.now_ms();
        let s = &mut self.cluster.sandboxes[slot as usize];
        s.last_used_ms = now_ms;
        let function = s.function;
        let f = &mut self.cluster.functions[function as usize];
        f.running -= 1;
        f.last_used_ms = now_ms;
        if let Some(w) = f.waiting.pop_front() {
            self.unblock(function, w.arrived_us);
            let startup = self.workload.costs(function).warm.draw(w.bits >> 20);
            let f = &mut self.cluster.functions[function as usize];
            f.stats.reused(0);
            self.run(function, slot, w, StartKind::Warm, self.now_us - w.arrived_us, startup);
            return;
        }
        self.idle(slot);
        self.pump();
    }

    /// A sandbox that ran, or was started for nobody, has nothing to do.
    pub(super) fn idle(&mut self, slot: u32) {
        let now_ms = self.now_ms();
        let s = &mut self.cluster.sandboxes[slot as usize];
        s.phase = Phase::Warm;
        s.epoch += 1;
        s.since_ms = now_ms;
        s.timer_us = u64::MAX;
        let (function, key) = (s.function, s.key(slot));
        self.cluster.functions[function as usize].warm.insert(key);
        self.cluster.idle_add(slot);
        self.account(|t| {
            t.running -= 1;
            t.warm += 1;
        });
        self.ask_soon(slot);
    }

    pub(super) fn decide(&mut self, slot: u32) -> Decision {
        let s = &self.cluster.sandboxes[slot as usize];
        let node = &self.cluster.nodes[s.node as usize];
        let pressure = node.pressure(self.config.node_memory);
        let f = &mut self.cluster.functions[s.function as usize];
        f.note_population();
        self.policy.decide(self.now_us / 1_000, &s.view(slot, Dedupable::Now), &f.stats, pressure)
    }

    /// Notes when the policy has to be asked about a sandbox that has just become idle.
    pub(super) fn ask_soon(&mut self, slot: u32) {
        let decision = self.decide(slot);
        let at = match decision.action {
            Action::Keep => decision.ask_again_ms.saturating_mul(1_000),
            Action::Dedup | Action::Purge => self.now_us + PAUSE_US,
        };
        self.ask_at(slot, at);
    }

    pub(super) fn ask_at(&mut self, slot: u32, at_us: u64) {
        let s = &mut self.cluster.sandboxes[slot as usize];
        s.ask_us = at_us;
        // An event that comes earlier looks again.
        if at_us < s.timer_us && at_us < u64::MAX / 2 {
            s.timer_us = at_us;
            self.calendar.add(at_us, Happening::Ask, slot, s.epoch);
        }
    }

    pub(super) fn ask(&mut self, slot: u32) {
        let s = &mut self.cluster.sandboxes[slot as usize];
        s.timer_us = u64::MAX;
        if !matches!(s.phase, Phase::Warm | Phase::Dedup) {
            return;
        }
        let decision = self.decide(slot);
        match decision.action {
            Action::Keep => {
                let at = decision.ask_again_ms.saturating_mul(1_000).max(self.now_us + 1_000);
                self.ask_at(slot, at);
            }
            Action::Purge => {
                self.purge(slot);
                self.pump();
            }
            Action::Dedup => {
                if !self.begin_dedup(slot) {
                    let s = &self.cluster.sandboxes[slot as usize];
                    let entry = (slot, s.epoch);
                    self.cluster.nodes[s.node as usize].dedup_queue.push_back(entry);
                }
            }
        }
    }

    pub(super) fn begin_dedup(&mut self, slot: u32) -> bool {
        let s = &self.cluster.sandboxes[slot as usize];
        let (node, function, key) = (s.node, s.function, s.key(slot));
        if self.cluster.nodes[node as usize].dedups >= self.config.max_dedups.max(1) {
            return false;
        }
        let costs = self.workload.costs(function);
        let frees = s.memory.saturating_sub(costs.dedup_bytes);
        let takes = costs.dedup.draw(self.workload.bits(self.dedups ^ (1 << 62)));
        self.cluster.idle_remove(slot);
        let s = &mut self.cluster.sandboxes[slot as usize];
        s.phase = Phase::Deduping;
        s.epoch += 1;
        s.timer_us = u64::MAX;
        let epoch = s.epoch;
        let n = &mut self.cluster.nodes[node as usize];
        n.dedups += 1;
        n.coming += frees;
        let f = &mut self.cluster.functions[function as usize];
        f.warm.remove(&key);
        f.deduping.insert(key);
        let family = self.workload.functions[function as usize].profile;
        self.cluster.families[family as usize].dedup += 1;
        self.calendar.add(self.now_us + takes, Happening::Deduped, slot, epoch);
        true
    }

    /// Ends the accounting of a dedup operation.
    pub(super) fn end_dedup(&mut self, slot: u32) {
        let s = &self.cluster.sandboxes[slot as usize];
        let frees = s.memory.saturating_sub(self.workload.costs(s.function).dedup_bytes);
        let n = &mut self.cluster.nodes[s.node as usize];
        n.dedups -= 1;
        n.coming = n.coming.saturating_sub(frees);
    }

    /// A request takes a sandbox before its dedup has come to dropping anything. The caller has
    /// taken it out of its function's list.
    pub(super) fn cancel_dedup(&mut self, slot: u32) {
        self.end_dedup(slot);
        let s = &mut self.cluster.sandboxes[slot as usize];
        s.epoch += 1;
        let (node, function) = (s.node, s.function);
        let family = self.workload.functions[function as usize].profile;
        self.leave_dedup(family);
        self.cluster.idle_add(slot);
        self.next_dedup(node);
    }

    pub(super) fn deduped(&mut self, slot: u32) {
        self.end_dedup(slot);
        self.dedups += 1;
        let now_ms = self.now_ms();
        let s = &mut self.cluster.sandboxes[slot as usize];
        let (node, function, key, before) = (s.node, s.function, s.key(slot), s.memory);
        let costs = self.workload.costs(function);
        s.phase = Phase::Dedup;
        s.epoch += 1;
        s.since_ms = now_ms;
        s.timer_us = u64::MAX;
        s.memory = costs.dedup_bytes;
        let f = &mut self.cluster.functions[function as usize];
        f.deduping.remove(&key);
        f.dedup.insert(key);
        f.stats.warm_memory(before);
        f.stats.dedup_memory(costs.dedup_bytes);
        self.cluster.charge(node, costs.dedup_bytes, before);
        self.cluster.idle_add(slot);
        self.account(|t| {
            t.warm -= 1;
            t.dedup += 1;
            t.warm_bytes -= before;
            t.dedup_bytes += costs.dedup_bytes;
        });
        let family =
            &mut self.cluster.families[self.workload.functions[function as usize].profile as usize];
        let there = match self.config.bases {
            Bases::Cluster { .. } => family.bases.len() as u64,
            Bases::Node => family.bases.iter().filter(|n| **n == node).count() as u64,
        };
        let dedup = match self.config.bases {
            Bases::Cluster { .. } => u64::from(family.dedup),
            // Those of the node are not counted apart; a node seldom has forty of one function.
            Bases::Node => 1,
        };
        if base_due(dedup, there, self.config.base_threshold) {
            family.bases.push(node);
            self.cluster.charge(node, costs.base_bytes, 0);
            self.account(|t| t.base_bytes += costs.base_bytes);
        }
        self.ask_soon(slot);
        self.next_dedup(node);
        self.relieve(node, 0, false);
        self.pump();
    }

    /// Begins the next dedup operation that had to wait for its turn.
    pub(super) fn next_dedup(&mut self, node: u32) {
        while self.cluster.nodes[node as usize].dedups < self.config.max_dedups.max(1) {
            let Some((slot, epoch)) = self.cluster.nodes[node as usize].dedup_queue.pop_front()
            else {
                return;
            };
            let s = &self.cluster.sandboxes[slot as usize];
            if s.epoch == epoch && s.phase == Phase::Warm {
                match self.decide(slot).action {
                    Action::Dedup => drop(self.begin_dedup(slot)),
                    _ => self.ask_soon(slot),
                }
            }
        }
    }

    /// One sandbox less refers to the family's base snapshots; without any they go.
    pub(super) fn leave_dedup(&mut self, family: u32) {
        let f = &mut self.cluster.families[family as usize];
        f.dedup -= 1;
        if f.dedup > 0 {
            return;
        }
        let bytes = self.workload.costs[family as usize].base_bytes;
        for node in std::mem::take(&mut f.bases) {
            self.cluster.charge(node, 0, bytes);
            self.account(|t| t.base_bytes -= bytes);
        }
    }

    /// Ends an idle sandbox.
    pub(super) fn purge(&mut self, slot: u32) {
        let now_ms = self.now_ms();
        self.cluster.idle_remove(slot);
        let s = self.cluster.sandboxes[slot as usize];
        let f = &mut self.cluster.functions[s.function as usize];
        f.stats.purged(now_ms, s.last_used_ms);
        match s.phase {
            Phase::Dedup => {
                f.dedup.remove(&s.key(slot));
                let family = self.workload.functions[s.function as usize].profile;
                self.leave_dedup(family);
                self.account(|t| {
                    t.dedup -= 1;
                    t.dedup_bytes -= s.memory;
                });
            }
            _ => {
                f.warm.remove(&s.key(slot));
                self.account(|t| {
                    t.warm -= 1;
                    t.warm_bytes -= s.memory;
                });
            }
        }
        self.cluster.charge(s.node, 0, s.memory);
        self.cluster.destroy(slot);
        let f = &self.cluster.functions[s.function as usize];
        if f.sandboxes() == 0
            && let Some(at) = self.policy.prewarm(now_ms, f.last_used_ms, &f.stats)
        {
            self.calendar.add(at * 1_000, Happening::Prewarm, s.function, f.arrivals);
        }
    }

    pub(super) fn prewarm(&mut self, function: u32, arrivals: u32) {
        let f = &self.cluster.functions[function as usize];
        if f.arrivals != arrivals || f.sandboxes() > 0 || !self.blocked.is_empty() {
            return;
        }
        let last_used_ms = f.last_used_ms;
        let needed = self.workload.costs(function).warm_bytes;
        let node = self.cluster.emptiest();
        let pressure = self.cluster.nodes[node as usize].pressure(self.config.node_memory);
        // Nobody gives way for a guess.
        if pressure.excess(needed) > 0 {
            return;
        }
        let slot = self.start(function, node);
        self.cluster.sandboxes[slot as usize].last_used_ms = last_used_ms;
        self.prewarmed += 1;
    }
}
