//! The experiments of an evaluation: which policies, on which pools, with which settings varied.

use medes_policy::{Adaptive, Form, Objective, PolicyConfig};
use medes_trace::{Trace, TraceOptions};
use serde::{Deserialize, Serialize};

use crate::compare::{Improvement, Latencies, improvement};
use crate::config::{Functions, SimulationConfig};
use crate::engine::{Observer, Outcome, SimulateError, simulate};
use crate::profile::Profile;
use crate::result::SimulationResult;
use crate::validation::Validation;

const MINUTE: u64 = 60_000;
const GB: u64 = 1_000_000_000;
/// What the pools are called, the largest first.
const PRESSURES: [&str; 4] = ["no limit", "no pressure", "medium pressure", "extreme pressure"];

/// What a run is part of.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "experiment", rename_all = "kebab-case")]
pub enum Experiment {
    /// All policies on one pool, compared.
    Pool {
        /// What the pool is called, such as `extreme pressure`.
        pressure: String,
        /// Memory of all nodes together, bytes; 0 if there is no limit.
        bytes: u64,
    },
    /// The same with the costs that the paper measured.
    Paper {
        /// As above.
        pressure: String,
        /// As above.
        bytes: u64,
    },
    /// One setting varied.
    Sweep {
        /// Which, as it is called in texts.
        parameter: String,
        /// Its unit.
        unit: String,
        /// Its value.
        value: f64,
    },
    /// A live run, simulated.
    Validation(Box<Validation>),
    /// A run by itself.
    Single,
}

/// One run and what it is part of.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// What it is part of.
    #[serde(flatten)]
    pub experiment: Experiment,
    /// The policy, as it is called in charts.
    pub label: String,
    /// What came out.
    pub result: SimulationResult,
    /// Against fixed keep-alive on the same pool, request by request.
    pub improvement: Option<Improvement>,
}

/// The policies that are compared, with what charts call them.
#[must_use]
pub fn policies() -> Vec<(&'static str, PolicyConfig)> {
    let latency = Objective::Latency { alpha: 2.5 };
    let memory = Objective::Memory { budget: 0 };
    vec![
        ("Fixed keep-alive", PolicyConfig::FixedKeepAlive { keep_alive_ms: 10 * MINUTE }),
        ("Adaptive", PolicyConfig::Adaptive(Adaptive::default())),
        ("Greedy-dual", PolicyConfig::GreedyDual),
        ("Medes P1, paper", medes(latency, Form::Paper, 10, 15)),
        ("Medes P2, paper", medes(memory, Form::Paper, 10, 15)),
        ("Medes P1", medes(latency, Form::Served, 10, 60)),
        ("Medes P2", medes(memory, Form::Served, 10, 60)),
    ]
}

fn medes(objective: Objective, form: Form, keep_alive: u64, keep_dedup: u64) -> PolicyConfig {
    PolicyConfig::Medes {
        objective,
        form,
        idle_ms: MINUTE,
        keep_alive_ms: keep_alive * MINUTE,
        keep_dedup_ms: keep_dedup * MINUTE,
    }
}

/// One run to be made.
#[derive(Clone, PartialEq, Debug)]
pub struct Planned {
    /// What it is part of.
    pub experiment: Experiment,
    /// The policy, as it is called in charts.
    pub label: String,
    /// What to simulate.
    pub config: SimulationConfig,
    /// Whether the costs are those of the paper.
    pub paper: bool,
}

/// The whole evaluation on 20 nodes: the paper's three pools, and one without a limit; the same
/// with the paper's costs; and the settings varied, on the medium pool.
#[must_use]
pub fn evaluation(seed: u64) -> Vec<Planned> {
    let nodes = 20;
    let config = |bytes: u64, policy| SimulationConfig {
        seed,
        nodes,
        node_memory: bytes / u64::from(nodes),
        policy,
        functions: Functions::Trace,
        ..SimulationConfig::default()
    };
    let mut plan = Vec::new();
    // The functions as the paper has them are larger, and run longer: these pools are to them what
    // the others are to the functions measured here.
    for (paper, pools) in [(false, [0, 40, 30, 20]), (true, [0, 88, 66, 44])] {
        for (pressure, gb) in PRESSURES.into_iter().zip(pools) {
            let (pressure, bytes) = (pressure.to_owned(), gb * GB);
            for (label, policy) in policies() {
                let experiment = if paper {
                    Experiment::Paper { pressure: pressure.clone(), bytes }
                } else {
                    Experiment::Pool { pressure: pressure.clone(), bytes }
                };
                let label = label.to_owned();
                plan.push(Planned { experiment, label, config: config(bytes, policy), paper });
            }
        }
    }
    let mut sweep = |parameter: &str, unit: &str, value: f64, label: &str, bytes, policy| {
        let experiment =
            Experiment::Sweep { parameter: parameter.to_owned(), unit: unit.to_owned(), value };
        let label = label.to_owned();
        plan.push(Planned { experiment, label, config: config(bytes, policy), paper: false });
    };
    let latency = Objective::Latency { alpha: 2.5 };
    let medium = 30 * GB;
    for minutes in [2, 5, 10, 20, 40] {
        let mut add =
            |label, policy| sweep("keep-alive", "min", minutes as f64, label, medium, policy);
        add("Fixed keep-alive", PolicyConfig::FixedKeepAlive { keep_alive_ms: minutes * MINUTE });
        add("Medes P1, paper", medes(latency, Form::Paper, minutes, 15));
        add("Medes P1", medes(latency, Form::Served, minutes, 60));
    }
    for minutes in [5, 15, 30, 60, 120, 240] {
        let mut add =
            |label, policy| sweep("keep-dedup", "min", minutes as f64, label, medium, policy);
        add("Medes P1, paper", medes(latency, Form::Paper, 10, minutes));
        add("Medes P1", medes(latency, Form::Served, 10, minutes));
    }
    for alpha in [1.1, 1.5, 2.5, 5.0, 10.0, 20.0] {
        let target = Objective::Latency { alpha };
        let mut add = |label, policy| sweep("alpha", "", alpha, label, 0, policy);
        add("Medes P1, paper", medes(target, Form::Paper, 10, 15));
        add("Medes P1", medes(target, Form::Served, 10, 60));
    }
    for gb in [10, 15, 20, 25, 30, 35, 40] {
        let shown = ["Fixed keep-alive", "Adaptive", "Medes P1, paper", "Medes P2"];
        for (label, policy) in policies().into_iter().filter(|(label, _)| shown.contains(label)) {
            sweep("pool", "GB", gb as f64, label, gb * GB, policy);
        }
    }
    for threshold in [2, 5, 10, 20, 40, 80] {
        let mut planned = config(medium, medes(latency, Form::Served, 10, 60));
        planned.base_threshold = threshold;
        plan.push(Planned {
            experiment: Experiment::Sweep {
                parameter: "T".to_owned(),
                unit: String::new(),
                value: f64::from(threshold),
            },
            label: "Medes P1".to_owned(),
            config: planned,
            paper: false,
        });
    }
    // The trade-off without a limit: what each period or target costs in memory.
    for minutes in [1, 2, 5, 10, 20, 40, 60] {
        let policy = PolicyConfig::FixedKeepAlive { keep_alive_ms: minutes * MINUTE };
        trade(&mut plan, "Fixed keep-alive", config(0, policy));
    }
    for (alpha, keep_alive, keep_dedup) in [
        (1.2, 20, 240),
        (1.5, 10, 240),
        (2.5, 10, 240),
        (2.5, 10, 60),
        (2.5, 5, 60),
        (4.0, 5, 120),
        (4.0, 5, 60),
        (8.0, 5, 60),
        (8.0, 3, 30),
        (20.0, 3, 30),
        (20.0, 2, 15),
    ] {
        let target = Objective::Latency { alpha };
        trade(
            &mut plan,
            "Medes P1",
            config(0, medes(target, Form::Served, keep_alive, keep_dedup)),
        );
    }
    for gb in [9, 12, 15, 18, 21, 24, 28] {
        let budget = Objective::Memory { budget: gb * GB };
        for idle_ms in [MINUTE, MINUTE / 3] {
            let policy = PolicyConfig::Medes {
                objective: budget,
                form: Form::Served,
                idle_ms,
                keep_alive_ms: 10 * MINUTE,
                keep_dedup_ms: 60 * MINUTE,
            };
            trade(&mut plan, "Medes P2", config(0, policy));
        }
    }
    for (idle, keep_dedup) in [(1, 15), (2, 15), (5, 15), (1, 60)] {
        let policy = PolicyConfig::Simple {
            idle_ms: idle * MINUTE,
            keep_alive_ms: 10 * MINUTE,
            keep_dedup_ms: keep_dedup * MINUTE,
        };
        trade(&mut plan, "Medes, fixed periods", config(0, policy));
    }
    plan
}

fn trade(plan: &mut Vec<Planned>, label: &str, config: SimulationConfig) {
    plan.push(Planned {
        experiment: Experiment::Sweep {
            parameter: "trade-off".to_owned(),
            unit: String::new(),
            value: plan.len() as f64,
        },
        label: label.to_owned(),
        config,
        paper: false,
    });
}

/// Passes on what happens, and keeps the latencies.
struct Recording<'a> {
    latencies: Latencies,
    observer: &'a mut dyn Observer,
}

impl Observer for Recording<'_> {
    fn outcome(&mut self, outcome: &Outcome) {
        self.latencies.outcome(outcome);
        self.observer.outcome(outcome);
    }

    fn progress(&mut self, now_ms: u64, requests: u64) {
        self.observer.progress(now_ms, requests);
    }
}

/// Makes the runs of a plan one after the other and hands each over as it is ready. On each pool
/// the first policy is what the others are compared with, request by request.
///
/// # Errors
/// If a simulation can't be made, or a temporary file not be written.
pub fn carry_out(
    plan: &[Planned],
    trace: &Trace,
    options: TraceOptions,
    profile: &Profile,
    observer: &mut dyn Observer,
    done: &mut dyn FnMut(Run) -> std::io::Result<()>,
) -> Result<(), SimulateError> {
    let paper = Profile::paper();
    let mut reference: Option<(Experiment, std::fs::File)> = None;
    for planned in plan {
        let profile = if planned.paper { &paper } else { profile };
        let compared =
            matches!(planned.experiment, Experiment::Pool { .. } | Experiment::Paper { .. });
        if !compared {
            let result = simulate(trace, options, profile, &planned.config, observer)?;
            hand_over(planned, result, None, done)?;
            continue;
        }
        let mut recording = Recording { latencies: Latencies::new()?, observer };
        let result = simulate(trace, options, profile, &planned.config, &mut recording)?;
        let latencies = recording.latencies.finish()?;
        let same = reference.as_ref().filter(|(e, _)| *e == planned.experiment);
        let compared = same.map(|(_, other)| improvement(&latencies, other)).transpose()?;
        if compared.is_none() {
            reference = Some((planned.experiment.clone(), latencies));
        }
        hand_over(planned, result, compared, done)?;
    }
    Ok(())
}

fn hand_over(
    planned: &Planned,
    mut result: SimulationResult,
    improvement: Option<Improvement>,
    done: &mut dyn FnMut(Run) -> std::io::Result<()>,
) -> Result<(), SimulateError> {
    let (experiment, label) = (planned.experiment.clone(), planned.label.clone());
    if matches!(experiment, Experiment::Sweep { .. }) {
        // Of these only totals are shown, and there are many.
        result.functions.clear();
        result.timeline.clear();
        result.end_to_end_curve.clear();
        result.startup_curve.clear();
    }
    done(Run { experiment, label, result, improvement })?;
    Ok(())
}
