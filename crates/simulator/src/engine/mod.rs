//! The simulation itself.

mod lifecycle;
mod memory;
mod requests;

use std::collections::BTreeSet;
use std::time::Instant;

use medes_core::StartKind;
use medes_policy::{FunctionStats, Policy, Pressure};
use medes_trace::{Trace, TraceError, TraceOptions};

use crate::cluster::{Areas, Cluster, Totals};
use crate::config::SimulationConfig;
use crate::event::Calendar;
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
