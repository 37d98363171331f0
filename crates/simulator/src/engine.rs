//! The simulation itself.

use std::collections::BTreeSet;
use std::time::Instant;

use medes_core::{FunctionId, StartKind};
use medes_policy::{
    Action, Decision, Dedupable, Evicting, FunctionStats, Need, Policy, Pressure, base_due,
};
use medes_trace::{Arrival, Trace, TraceError, TraceOptions};

use crate::cluster::{Areas, Cluster, Phase, Totals, Waiting};
use crate::config::{Bases, SimulationConfig};
use crate::event::{Calendar, Event, Happening};
use crate::latency::LatencyHistogram;
use crate::profile::Profile;
use crate::result::{
    FunctionResult, MemoryResult, Sample, SimulationResult, StartCounts, TraceResult,
};
use crate::workload::Workload;

/// What the policy decides over a sandbox in the moment it becomes idle waits this long, as in the
/// controller.
const PAUSE_US: u64 = 100_000;
/// How often an observer is told how far the simulation is: after this many requests.
const PROGRESS_EVERY: u64 = 1 << 16;

/// What became of one request. Times are microseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Its number in the order of arrival, from 0.
    pub request: u64,
    /// When it arrived.
    pub arrived_us: u64,
    /// The simulated function, by its number.
    pub function: u32,
    /// The node that served it.
    pub node: u32,
    /// The state in which it found its sandbox.
    pub start: StartKind,
    /// Waiting for a sandbox that was not being made ready for it.
    pub queue_us: u64,
    /// Waiting for one that was.
    pub startup_us: u64,
    /// Its execution.
    pub execution_us: u64,
}

impl Outcome {
    /// From arrival to answer, microseconds.
    #[must_use]
    pub fn end_to_end_us(&self) -> u64 {
        self.queue_us + self.startup_us + self.execution_us
    }
}

/// Somebody who watches a simulation.
pub trait Observer {
    /// A request's fate is known. Requests come in the order in which they get their sandboxes.
    fn outcome(&mut self, _outcome: &Outcome) {}

    /// The simulation is at `now_ms`, and so many requests have arrived.
    fn progress(&mut self, _now_ms: u64, _requests: u64) {}
}

/// Nobody watches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// A simulation can't be made.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// The trace can't be read.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// A temporary file or a result can't be written.
    #[error("writing results: {0}")]
    Io(#[from] std::io::Error),
    /// There is no node.
    #[error("there must be from 1 to 100000 nodes, not {0}")]
    Nodes(u32),
    /// A request can never be served.
    #[error(
        "function {function} needs {needed} bytes for a sandbox, and a node has {memory}: give \
         nodes more memory"
    )]
    TooSmall {
        /// The function.
        function: String,
        /// What one of its sandboxes needs, bytes.
        needed: u64,
        /// What a node has, bytes.
        memory: u64,
    },
}

/// Simulates a trace.
///
/// # Errors
/// If the trace can't be read, or the configuration makes no sense.
pub fn simulate(
    trace: &Trace,
    options: TraceOptions,
    profile: &Profile,
    config: &SimulationConfig,
    observer: &mut dyn Observer,
) -> Result<SimulationResult, SimulateError> {
    if !(1..=100_000).contains(&config.nodes) {
        return Err(SimulateError::Nodes(config.nodes));
    }
    if let Some(f) = profile
        .functions
        .iter()
        .find(|f| config.node_memory > 0 && f.warm_bytes > config.node_memory)
    {
        return Err(SimulateError::TooSmall {
            function: f.name.clone(),
            needed: f.warm_bytes,
            memory: config.node_memory,
        });
    }
    let began = Instant::now();
    let workload = Workload::new(trace, profile, config);
    let mut engine = Engine::new(&workload, config, observer);
    let mut arrivals = trace.arrivals(options)?;
    let length_us = arrivals.length_ms() * 1_000;
    let mut next = arrivals.next()?;
    loop {
        let event_us = engine.calendar.next_us();
        match (next, event_us) {
            (Some(arrival), event) if event.is_none_or(|e| arrival.at_us < e) => {
                engine.go_to(arrival.at_us);
                engine.arrive(&arrival);
                next = arrivals.next()?;
            }
            (_, Some(at)) => {
                // What stays until the end is not waited for, but requests are.
                if next.is_none() && at > length_us && !engine.busy() {
                    break;
                }
                engine.go_to(at);
                if let Some(event) = engine.calendar.pop() {
                    engine.happen(event);
                }
            }
            (_, None) => break,
        }
    }
    engine.go_to(length_us.max(engine.now_us));
    let mut result = engine.finish(trace, profile);
    result.trace.length_s = length_us as f64 / 1e6;
    result.trace.speed = options.speed;
    result.wall_s = began.elapsed().as_secs_f64();
    Ok(result)
}

/// What is counted of one function.
#[derive(Default)]
struct Tally {
    starts: StartCounts,
    end_to_end: LatencyHistogram,
    startup: LatencyHistogram,
}

struct Engine<'a> {
    config: &'a SimulationConfig,
    workload: &'a Workload,
    observer: &'a mut dyn Observer,
    policy: Box<dyn Policy>,
    headroom: u64,
    now_us: u64,
    cluster: Cluster,
    calendar: Calendar,
    /// Functions with requests that wait for memory, by the arrival of the first.
    blocked: BTreeSet<(u64, u32)>,
    next_plan_us: u64,
    next_sample_us: u64,
    warmup_us: u64,
    areas: Areas,
    requests: u64,
    counted: StartCounts,
    tallies: Vec<Tally>,
    queueing: LatencyHistogram,
    prewarmed: u64,
    evicted: [u64; 2],
    dedups: u64,
    remote_restores: u64,
    timeline: Vec<Sample>,
}

impl<'a> Engine<'a> {
    fn new(
        workload: &'a Workload,
        config: &'a SimulationConfig,
        observer: &'a mut dyn Observer,
    ) -> Self {
        let policy = config.policy.build();
        let headroom = if policy.dedups() {
            (config.node_memory as f64 * config.headroom.clamp(0.0, 0.5)) as u64
        } else {
            0
        };
        let functions = workload.functions.len();
        Self {
            headroom,
            now_us: 0,
            cluster: Cluster::new(config.nodes, functions, workload.costs.len()),
            calendar: Calendar::default(),
            blocked: BTreeSet::new(),
            next_plan_us: policy.plan_period_ms().map_or(u64::MAX, |ms| ms * 1_000),
            next_sample_us: 0,
            warmup_us: config.warmup_ms * 1_000,
            areas: Areas::default(),
            requests: 0,
            counted: StartCounts::default(),
            tallies: (0..functions).map(|_| Tally::default()).collect(),
            queueing: LatencyHistogram::default(),
            prewarmed: 0,
            evicted: [0; 2],
            dedups: 0,
            remote_restores: 0,
            timeline: Vec::new(),
            policy,
            config,
            workload,
            observer,
        }
    }

    fn now_ms(&self) -> u64 {
        self.now_us / 1_000
    }

    fn busy(&self) -> bool {
        let t = &self.cluster.totals;
        t.running > 0 || t.waiting > 0
    }

    /// Lets time pass.
    fn go_to(&mut self, at_us: u64) {
        loop {
            let next = self.next_plan_us.min(self.next_sample_us);
            if next > at_us {
                break;
            }
            self.now_us = next;
            self.areas.advance(next, &self.cluster.totals);
            if self.next_sample_us == next {
                self.sample();
                self.next_sample_us = next + self.config.sample_ms.max(1) * 1_000;
            }
            if self.next_plan_us == next {
                self.plan();
                let period = self.policy.plan_period_ms().unwrap_or(u64::MAX / 1_000);
                self.next_plan_us = next.saturating_add(period * 1_000);
            }
        }
        if self.now_us < self.warmup_us && at_us >= self.warmup_us {
            self.areas.restart(self.warmup_us);
        }
        self.now_us = at_us;
    }

    fn plan(&mut self) {
        let now_ms = self.now_ms();
        let used = self.cluster.totals.used();
        let budget = self.config.node_memory * u64::from(self.config.nodes);
        let stats: Vec<&FunctionStats> = self.cluster.functions.iter().map(|f| &f.stats).collect();
        let directives = self.policy.plan(now_ms, &stats, Pressure { used, budget });
        for (f, directive) in self.cluster.functions.iter_mut().zip(directives) {
            f.stats.directive = directive;
        }
    }

    fn sample(&mut self) {
        let t = &self.cluster.totals;
        self.timeline.push(Sample {
            at_s: self.now_us as f64 / 1e6,
            warm_bytes: t.warm_bytes,
            dedup_bytes: t.dedup_bytes,
            base_bytes: t.base_bytes,
            running: t.running,
            warm: t.warm,
            dedup: t.dedup,
            waiting: t.waiting,
            cold_starts: self.counted.cold,
        });
    }

    /// Changes the sums over all nodes.
    fn account(&mut self, change: impl FnOnce(&mut Totals)) {
        self.areas.advance(self.now_us, &self.cluster.totals);
        change(&mut self.cluster.totals);
        self.areas.advance(self.now_us, &self.cluster.totals);
    }

    // ---- requests ----

    fn arrive(&mut self, arrival: &Arrival) {
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

    fn block(&mut self, function: u32) {
        if let Some(first) = self.cluster.functions[function as usize].waiting.front() {
            self.blocked.insert((first.arrived_us, function));
        }
    }

    /// Gives waiting requests what there is, and starts what is missing. False if a request is
    /// left that needs memory which is not there.
    fn serve(&mut self, function: u32, may_start: bool) -> bool {
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
    fn room(&mut self, function: u32) -> Option<u32> {
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

    fn start(&mut self, function: u32, node: u32) -> u32 {
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
    fn take_warm(&mut self, function: u32, slot: u32, w: Waiting) {
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

    fn restore(&mut self, function: u32, slot: u32, w: Waiting) {
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

    fn run(
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
            for counts in [&mut tally.starts, &mut self.counted] {
                match start {
                    StartKind::Cold => counts.cold += 1,
                    StartKind::Warm => counts.warm += 1,
                    StartKind::Dedup => counts.dedup += 1,
                }
            }
            tally.end_to_end.record(outcome.end_to_end_us());
            tally.startup.record(queue_us + startup_us);
            self.queueing.record(queue_us);
        }
    }

    // ---- events ----

    fn happen(&mut self, event: Event) {
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

    fn started(&mut self, slot: u32) {
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

    fn done(&mut self, slot: u32) {
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
    fn idle(&mut self, slot: u32) {
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

    fn decide(&mut self, slot: u32) -> Decision {
        let s = &self.cluster.sandboxes[slot as usize];
        let node = &self.cluster.nodes[s.node as usize];
        let pressure = node.pressure(self.config.node_memory);
        let f = &mut self.cluster.functions[s.function as usize];
        f.note_population();
        self.policy.decide(self.now_us / 1_000, &s.view(slot, Dedupable::Now), &f.stats, pressure)
    }

    /// Notes when the policy has to be asked about a sandbox that has just become idle.
    fn ask_soon(&mut self, slot: u32) {
        let decision = self.decide(slot);
        let at = match decision.action {
            Action::Keep => decision.ask_again_ms.saturating_mul(1_000),
            Action::Dedup | Action::Purge => self.now_us + PAUSE_US,
        };
        self.ask_at(slot, at);
    }

    fn ask_at(&mut self, slot: u32, at_us: u64) {
        let s = &mut self.cluster.sandboxes[slot as usize];
        s.ask_us = at_us;
        // An event that comes earlier looks again.
        if at_us < s.timer_us && at_us < u64::MAX / 2 {
            s.timer_us = at_us;
            self.calendar.add(at_us, Happening::Ask, slot, s.epoch);
        }
    }

    fn ask(&mut self, slot: u32) {
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

    fn begin_dedup(&mut self, slot: u32) -> bool {
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
    fn end_dedup(&mut self, slot: u32) {
        let s = &self.cluster.sandboxes[slot as usize];
        let frees = s.memory.saturating_sub(self.workload.costs(s.function).dedup_bytes);
        let n = &mut self.cluster.nodes[s.node as usize];
        n.dedups -= 1;
        n.coming = n.coming.saturating_sub(frees);
    }

    /// A request takes a sandbox before its dedup has come to dropping anything. The caller has
    /// taken it out of its function's list.
    fn cancel_dedup(&mut self, slot: u32) {
        self.end_dedup(slot);
        let s = &mut self.cluster.sandboxes[slot as usize];
        s.epoch += 1;
        let (node, function) = (s.node, s.function);
        let family = self.workload.functions[function as usize].profile;
        self.leave_dedup(family);
        self.cluster.idle_add(slot);
        self.next_dedup(node);
    }

    fn deduped(&mut self, slot: u32) {
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
    fn next_dedup(&mut self, node: u32) {
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
    fn leave_dedup(&mut self, family: u32) {
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
    fn purge(&mut self, slot: u32) {
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

    fn prewarm(&mut self, function: u32, arrivals: u32) {
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

    // ---- memory ----

    /// Makes room on a node for `more` bytes. `now`: a request waits for it, so idle sandboxes are
    /// ended; else warm ones may go dedup, which frees memory later.
    fn relieve(&mut self, node: u32, more: u64, now: bool) {
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
    fn tidy(&mut self, node: u32) {
        if self.headroom > 0 {
            self.relieve(node, self.headroom, false);
        }
    }

    fn unblock(&mut self, function: u32, arrived_us: u64) {
        if self.blocked.remove(&(arrived_us, function)) {
            self.block(function);
        }
    }

    /// Serves those who wait for memory, the longest first.
    fn pump(&mut self) {
        while let Some((arrived_us, function)) = self.blocked.first().copied() {
            self.blocked.remove(&(arrived_us, function));
            if !self.serve(function, true) {
                self.block(function);
                return;
            }
        }
    }

    fn finish(mut self, trace: &Trace, profile: &Profile) -> SimulationResult {
        self.areas.advance(self.now_us, &self.cluster.totals);
        let mut all = Tally::default();
        let mut functions: Vec<_> = self
            .tallies
            .iter()
            .zip(&self.workload.functions)
            .filter(|(tally, _)| tally.starts.total() > 0)
            .map(|(tally, f)| {
                all.end_to_end.merge(&tally.end_to_end);
                all.startup.merge(&tally.startup);
                FunctionResult {
                    name: f.name.clone(),
                    profile: profile.functions[f.profile as usize].name.clone(),
                    starts: tally.starts,
                    end_to_end: tally.end_to_end.summary(),
                    startup: tally.startup.summary(),
                }
            })
            .collect();
        functions.sort_by(|a, b| {
            b.starts.total().cmp(&a.starts.total()).then_with(|| a.name.cmp(&b.name))
        });
        let [mean_warm, mean_dedup, mean_base] = self.areas.means();
        SimulationResult {
            policy_name: self.policy.name().to_owned(),
            config: self.config.clone(),
            trace: TraceResult {
                path: trace.path.display().to_string(),
                functions: trace.functions.iter().filter(|f| f.arrivals > 0).count() as u64,
                length_s: 0.0,
                speed: 1.0,
                repairs: trace.repairs,
            },
            profile: profile.source.clone(),
            starts: self.counted,
            prewarmed: self.prewarmed,
            evicted_to_dedup: self.evicted[0],
            evicted: self.evicted[1],
            dedups: self.dedups,
            remote_restores: self.remote_restores,
            end_to_end: all.end_to_end.summary(),
            startup: all.startup.summary(),
            queueing: self.queueing.summary(),
            end_to_end_curve: all.end_to_end.curve(),
            startup_curve: all.startup.curve(),
            memory: MemoryResult {
                mean: mean_warm + mean_dedup + mean_base,
                peak: self.areas.peak,
                mean_warm,
                mean_dedup,
                mean_base,
            },
            functions,
            timeline: self.timeline,
            wall_s: 0.0,
        }
    }
}
