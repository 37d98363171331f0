//! Whole simulations: what always holds, and what policies are there for.

use std::path::Path;

use medes_core::StartKind;
use medes_policy::{Adaptive, Form, Objective, PolicyConfig};
use medes_simulator::{
    Execution, Functions, Latencies, Observer, Outcome, Profile, Silent, SimulateError,
    SimulationConfig, SimulationResult, improvement, simulate,
};
use medes_trace::{Making, Trace, TraceOptions, make};
use proptest::prelude::*;

const MINUTE: u64 = 60_000;

fn medes(objective: Objective, form: Form) -> PolicyConfig {
    PolicyConfig::Medes {
        objective,
        form,
        idle_ms: MINUTE,
        keep_alive_ms: 10 * MINUTE,
        keep_dedup_ms: 60 * MINUTE,
    }
}

fn policies() -> Vec<PolicyConfig> {
    let mut list = vec![
        PolicyConfig::FixedKeepAlive { keep_alive_ms: 10 * MINUTE },
        PolicyConfig::Adaptive(Adaptive::default()),
        PolicyConfig::GreedyDual,
        PolicyConfig::default(),
    ];
    for form in [Form::Paper, Form::Served] {
        list.push(medes(Objective::Latency { alpha: 2.5 }, form));
        list.push(medes(Objective::Memory { budget: 0 }, form));
    }
    list
}

fn made(functions: u32, calls: u64, seed: u64) -> (tempfile::TempDir, Trace) {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), Making { seed, functions, minutes: 240, calls }).unwrap();
    let trace = Trace::open(dir.path()).unwrap();
    (dir, trace)
}

fn plain(text: &str) -> (tempfile::TempDir, Trace) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.csv");
    std::fs::write(&path, text).unwrap();
    let trace = Trace::open(&path).unwrap();
    (dir, trace)
}

fn run(trace: &Trace, config: &SimulationConfig, observer: &mut dyn Observer) -> SimulationResult {
    simulate(trace, TraceOptions::default(), &Profile::measured(), config, observer).unwrap()
}

/// Checks what is said of each request.
#[derive(Default)]
struct Checker {
    seen: Vec<bool>,
    starts: [u64; 3],
}

impl Observer for Checker {
    fn outcome(&mut self, o: &Outcome) {
        let at = o.request as usize;
        self.seen.resize(self.seen.len().max(at + 1), false);
        assert!(!std::mem::replace(&mut self.seen[at], true), "request {at} was served twice");
        self.starts[o.start as usize] += 1;
        assert!(o.startup_us > 0 || o.start == StartKind::Cold);
    }
}

#[test]
fn every_request_is_served_once_and_pools_are_kept() {
    let (_dir, trace) = made(60, 30_000, 5);
    for pool in [0u64, 1200 << 20, 500 << 20] {
        for policy in policies() {
            let config = SimulationConfig {
                nodes: 2,
                node_memory: pool / 2,
                policy,
                functions: Functions::Trace,
                ..SimulationConfig::default()
            };
            let mut checker = Checker::default();
            let r = run(&trace, &config, &mut checker);
            assert!(checker.seen.iter().all(|s| *s));
            assert_eq!(checker.seen.len() as u64, trace.total(), "{policy:?}");
            assert_eq!(r.starts.total(), trace.total());
            assert_eq!(checker.starts, [r.starts.cold, r.starts.warm, r.starts.dedup]);
            assert_eq!(r.functions.iter().map(|f| f.starts.total()).sum::<u64>(), trace.total());
            assert_eq!(r.end_to_end.count, trace.total());
            if pool > 0 {
                // A restore is never refused, so there may be a little more for a moment.
                assert!(r.memory.mean <= pool as f64, "{policy:?}: {:?}", r.memory);
            }
            assert!(r.timeline.len() >= 240);
        }
    }
}

#[test]
fn a_simulation_comes_out_the_same_every_time() {
    let (_dir, trace) = made(40, 20_000, 9);
    for policy in policies() {
        let config =
            SimulationConfig { nodes: 3, node_memory: 300 << 20, policy, ..Default::default() };
        let one = SimulationResult { wall_s: 0.0, ..run(&trace, &config, &mut Silent) };
        let two = SimulationResult { wall_s: 0.0, ..run(&trace, &config, &mut Silent) };
        assert!(one == two, "{policy:?}");
        let other = SimulationConfig { seed: 2, ..config };
        assert_ne!(run(&trace, &other, &mut Silent).end_to_end_curve, one.end_to_end_curve);
    }
}

#[test]
fn a_sandbox_goes_through_its_states_by_the_clock() {
    // One function: at 0 cold, then warm, after two minutes dedup, after two hours cold again.
    let (_dir, trace) = plain("time_ms,function\n0,f\n30000,f\n150000,f\n7500000,f\n");
    let mut starts = Vec::new();
    struct Starts<'a>(&'a mut Vec<StartKind>);
    impl Observer for Starts<'_> {
        fn outcome(&mut self, o: &Outcome) {
            self.0.push(o.start);
        }
    }
    let config = SimulationConfig { nodes: 1, ..Default::default() };
    let r = run(&trace, &config, &mut Starts(&mut starts));
    assert_eq!(starts, [StartKind::Cold, StartKind::Warm, StartKind::Dedup, StartKind::Cold]);
    assert_eq!(r.dedups, 2);
    let fixed = PolicyConfig::FixedKeepAlive { keep_alive_ms: MINUTE };
    starts.clear();
    run(&trace, &SimulationConfig { policy: fixed, ..config }, &mut Starts(&mut starts));
    assert_eq!(starts, [StartKind::Cold, StartKind::Warm, StartKind::Cold, StartKind::Cold]);
}

#[test]
fn requests_at_once_need_a_sandbox_each() {
    let (_dir, trace) = plain(
        "time_ms,function,duration_ms\n0,f,2000\n0,f,2000\n0,f,2000\n9000,f,2000\n9000,f,2000\n",
    );
    let config =
        SimulationConfig { nodes: 1, execution: Execution::Trace, ..SimulationConfig::default() };
    let r = run(&trace, &config, &mut Silent);
    assert_eq!((r.starts.cold, r.starts.warm), (3, 2));
    let limited = SimulationConfig { max_sandboxes_per_function: 1, ..config };
    let r = run(&trace, &limited, &mut Silent);
    assert_eq!((r.starts.cold, r.starts.warm), (1, 4));
    assert!(r.queueing.max_ms > 0.0);
}

#[test]
fn a_timer_is_started_ahead_of_its_time() {
    let rows: String = (0..24).map(|i| format!("{},f\n", i * 30 * MINUTE)).collect();
    let (_dir, trace) = plain(&format!("time_ms,function\n{rows}"));
    let config = SimulationConfig {
        nodes: 1,
        policy: PolicyConfig::Adaptive(Adaptive::default()),
        ..Default::default()
    };
    let r = run(&trace, &config, &mut Silent);
    assert!(r.prewarmed > 10, "{}", r.prewarmed);
    let kept = PolicyConfig::FixedKeepAlive { keep_alive_ms: 31 * MINUTE };
    let kept = run(&trace, &SimulationConfig { policy: kept, ..config }, &mut Silent);
    assert!(r.starts.cold <= kept.starts.cold + 1);
    assert!(r.memory.mean < kept.memory.mean / 2.0, "{:?} {:?}", r.memory, kept.memory);
}

#[test]
fn dedup_has_fewer_cold_starts_than_fixed_keep_alive_on_the_same_pool() {
    let (_dir, trace) = made(200, 100_000, 1);
    let config = |policy| SimulationConfig {
        nodes: 2,
        node_memory: 1_000 << 20,
        functions: Functions::Trace,
        policy,
        ..Default::default()
    };
    let mut latencies = Latencies::new().unwrap();
    let fixed = config(PolicyConfig::FixedKeepAlive { keep_alive_ms: 10 * MINUTE });
    let fixed = run(&trace, &fixed, &mut latencies);
    let reference = latencies.finish().unwrap();
    for form in [Form::Paper, Form::Served] {
        let mut latencies = Latencies::new().unwrap();
        let policy = medes(Objective::Memory { budget: 0 }, form);
        let own = run(&trace, &config(policy), &mut latencies);
        assert!(
            own.starts.cold * 2 < fixed.starts.cold,
            "{} {}",
            own.starts.cold,
            fixed.starts.cold
        );
        let i = improvement(&latencies.finish().unwrap(), &reference).unwrap();
        assert_eq!(i.requests, trace.total());
        assert!(i.sooner > 0.0 && i.quantiles.last().unwrap().1 > 1.5, "{i:?}");
    }
}

#[test]
fn executions_take_what_the_trace_says() {
    let (_dir, trace) = plain("time_ms,function,duration_ms\n0,f,5000\n60000,f,7000\n");
    let config =
        SimulationConfig { nodes: 1, execution: Execution::Trace, ..SimulationConfig::default() };
    let r = run(&trace, &config, &mut Silent);
    assert!(r.end_to_end.max_ms >= 7_000.0 && r.end_to_end.mean_ms >= 6_000.0);
    let short = SimulationConfig { timeout_ms: 100, ..config };
    assert!(run(&trace, &short, &mut Silent).end_to_end.max_ms < 1_000.0);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (_dir, trace) = plain("time_ms,function\n0,f\n");
    let try_it = |config: SimulationConfig| {
        simulate(&trace, TraceOptions::default(), &Profile::measured(), &config, &mut Silent)
    };
    let none = SimulationConfig { nodes: 0, ..Default::default() };
    assert!(matches!(try_it(none), Err(SimulateError::Nodes(0))));
    let small = SimulationConfig { node_memory: 1 << 20, ..Default::default() };
    assert!(matches!(try_it(small), Err(SimulateError::TooSmall { .. })));
    assert!(Profile::open(Path::new("/nonexistent")).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn whatever_comes_when_every_request_is_served(
        arrivals in prop::collection::vec((0u64..3_000_000, 0u8..4), 1..200),
        policy in 0usize..8,
        nodes in 1u32..4,
        mib in prop_oneof![Just(0u64), 120u64..400],
        limit in prop_oneof![Just(0u32), 1u32..3],
        max_dedups in 1u32..3,
    ) {
        let rows: String = arrivals.iter().map(|(t, f)| format!("{t},f{f}\n")).collect();
        let (_dir, trace) = plain(&format!("time_ms,function\n{rows}"));
        let config = SimulationConfig {
            nodes,
            node_memory: mib << 20,
            policy: policies()[policy],
            functions: Functions::Trace,
            max_sandboxes_per_function: limit,
            max_dedups,
            ..Default::default()
        };
        let mut checker = Checker::default();
        let r = run(&trace, &config, &mut checker);
        prop_assert_eq!(r.starts.total(), arrivals.len() as u64);
        prop_assert!(checker.seen.iter().all(|s| *s));
        prop_assert!(r.memory.mean_base >= 0.0 && r.memory.mean_dedup >= 0.0);
    }
}
