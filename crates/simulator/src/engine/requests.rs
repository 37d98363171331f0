//! Requests: which sandbox serves them, and the making of more.

use medes_core::StartKind;
use medes_trace::Arrival;

use crate::cluster::{Phase, Waiting};
use crate::config::Bases;
use crate::event::Happening;

use super::{Outcome, PROGRESS_EVERY};

use super::Engine;

impl Engine<'_> {
    pub(super) fn arrive(&mut self, arrival: &Arrival) {
        let now_ms = self.now_ms();
        let request = self.requests;
        self.requests += 1;
        if request.is_multiple_of(PROGRESS_EVERY) {
            self.observer.progress(now_ms, request);
        }
        let bits = self.workload.bits(request);
        let function = self.workload.function_of(arrival);
        let execution_us = self.workload.execution_us(arrival, bits);
        let f = &mut self.cluster.functions[function as usize];
        f.arrivals = f.arrivals.wrapping_add(1);
        f.stats.arrived(now_ms);
        f.waiting.push_back(Waiting { request, arrived_us: self.now_us, execution_us, bits });
        self.cluster.totals.waiting += 1;
        let may_start = self.blocked.is_empty();
        if !self.serve(function, may_start) {
            self.block(function);
        }
    }

    pub(super) fn block(&mut self, function: u32) {
        if let Some(first) = self.cluster.functions[function as usize].waiting.front() {
            self.blocked.insert((first.arrived_us, function));
        }
    }

    /// Gives waiting requests what there is, and starts what is missing. False if a request is
    /// left that needs memory which is not there.
    pub(super) fn serve(&mut self, function: u32, may_start: bool) -> bool {
        loop {
            let f = &mut self.cluster.functions[function as usize];
            let Some(first) = f.waiting.front().copied() else { return true };
            let missing = f.waiting.len() > f.starting as usize;
            if let Some(key) = f.warm.pop_last() {
                f.waiting.pop_front();
                self.take_warm(function, key.2, first);
                continue;
            }
            if missing && let Some(key) = f.deduping.pop_last() {
                f.waiting.pop_front();
                self.cancel_dedup(key.2);
                self.take_warm(function, key.2, first);
                continue;
            }
            if let Some(key) = f.dedup.pop_last() {
                f.waiting.pop_front();
                self.restore(function, key.2, first);
                continue;
            }
            if !missing {
                return true;
            }
            let limit = self.config.max_sandboxes_per_function;
            if limit > 0 && f.sandboxes() >= limit {
                // One of its own will be free; nobody else's memory helps.
                return true;
            }
            if !may_start {
                return false;
            }
            let Some(node) = self.room(function) else { return false };
            let now_ms = self.now_ms();
            self.cluster.functions[function as usize].stats.missed(now_ms);
            self.start(function, node);
        }
    }

    /// A node with room for one more sandbox of the function.
    pub(super) fn room(&mut self, function: u32) -> Option<u32> {
        let needed = self.workload.costs(function).warm_bytes;
        let budget = self.config.node_memory;
        let node = self.cluster.emptiest();
        if self.cluster.nodes[node as usize].pressure(budget).excess(needed) == 0 {
            return Some(node);
        }
        let node = self.cluster.most_reclaimable();
        self.relieve(node, needed, true);
        let n = &self.cluster.nodes[node as usize];
        // With nothing running nothing will ever be freed: one sandbox is always allowed.
        (n.pressure(budget).excess(needed) == 0 || n.sandboxes == 0).then_some(node)
    }

    pub(super) fn start(&mut self, function: u32, node: u32) -> u32 {
        let costs = self.workload.costs(function);
        let (memory, startup) =
            (costs.warm_bytes, costs.cold.draw(self.workload.bits(self.requests ^ (1 << 63))));
        let slot = self.cluster.create(function, node, self.now_us);
        let s = &mut self.cluster.sandboxes[slot as usize];
        (s.memory, s.startup_us) = (memory, startup);
        let epoch = s.epoch;
        self.cluster.charge(node, memory, 0);
        self.cluster.functions[function as usize].starting += 1;
        self.account(|t| {
            t.warm_bytes += memory;
            t.running += 1;
        });
        self.calendar.add(self.now_us + startup, Happening::Started, slot, epoch);
        self.tidy(node);
        slot
    }

    /// A request takes a sandbox that was idle with all its memory.
    pub(super) fn take_warm(&mut self, function: u32, slot: u32, w: Waiting) {
        self.cluster.idle_remove(slot);
        self.account(|t| {
            t.warm -= 1;
            t.running += 1;
        });
        let now_ms = self.now_ms();
        let s = &self.cluster.sandboxes[slot as usize];
        let gap = now_ms.saturating_sub(s.last_used_ms);
        self.cluster.functions[function as usize].stats.reused(gap);
        let startup = self.workload.costs(function).warm.draw(w.bits >> 20);
        self.run(function, slot, w, StartKind::Warm, self.now_us - w.arrived_us, startup);
    }

    pub(super) fn restore(&mut self, function: u32, slot: u32, w: Waiting) {
        self.cluster.idle_remove(slot);
        let costs = self.workload.costs(function);
        let family = self.workload.functions[function as usize].profile;
        let s = &mut self.cluster.sandboxes[slot as usize];
        let (node, before) = (s.node, s.memory);
        s.memory = costs.warm_bytes;
        let gap = (self.now_us / 1_000).saturating_sub(s.last_used_ms);
        self.cluster.charge(node, costs.warm_bytes, before);
        self.account(|t| {
            t.dedup -= 1;
            t.running += 1;
            t.dedup_bytes -= before;
            t.warm_bytes += costs.warm_bytes;
        });
        let mut startup = costs.restore.draw(w.bits >> 10);
        if let Bases::Cluster { bandwidth } = self.config.bases
            && !self.cluster.families[family as usize].bases.contains(&node)
        {
            let read = costs.warm_bytes.saturating_sub(before) as f64 * 8.0;
            startup += (read / bandwidth * 1e6) as u64;
            self.remote_restores += 1;
        }
        let f = &mut self.cluster.functions[function as usize];
        f.stats.reused(gap);
        f.stats.restore_memory(costs.restore_bytes);
        self.leave_dedup(family);
        self.run(function, slot, w, StartKind::Dedup, self.now_us - w.arrived_us, startup);
        // A restore is never refused; what it needs is taken from idle sandboxes.
        self.relieve(node, 0, true);
        self.tidy(node);
    }

    pub(super) fn run(
        &mut self,
        function: u32,
        slot: u32,
        w: Waiting,
        start: StartKind,
        queue_us: u64,
        startup_us: u64,
    ) {
        let done = self.now_us + if start == StartKind::Cold { 0 } else { startup_us };
        let s = &mut self.cluster.sandboxes[slot as usize];
        s.phase = Phase::Running;
        s.epoch += 1;
        s.timer_us = u64::MAX;
        let (epoch, node) = (s.epoch, s.node);
        let f = &mut self.cluster.functions[function as usize];
        f.running += 1;
        f.stats.served(start, startup_us, w.execution_us, false);
        self.cluster.totals.waiting -= 1;
        self.calendar.add(done + w.execution_us, Happening::Done, slot, epoch);
        let outcome = Outcome {
            request: w.request,
            arrived_us: w.arrived_us,
            function,
            node,
            start,
            queue_us,
            startup_us,
            execution_us: w.execution_us,
        };
        self.observer.outcome(&outcome);
        if w.arrived_us >= self.warmup_us {
            let tally = &mut self.tallies[function as usize];
            tally.starts.count(start);
            self.counted.count(start);
            tally.end_to_end.record(outcome.end_to_end_us());
            tally.startup.record(queue_us + startup_us);
            self.queueing.record(queue_us);
        }
    }
}
