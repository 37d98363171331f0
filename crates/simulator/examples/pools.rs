//! Simulates policies over pools and prints what came out:
//! `cargo run --release --example pools -- TRACE PROFILE NODES MIB_PER_NODE[,..] [trace]`.

use std::path::Path;

use medes_policy::{Adaptive, Form, Objective, PolicyConfig};
use medes_simulator::{Execution, Functions, Profile, Silent, SimulationConfig, simulate};
use medes_trace::{Trace, TraceOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let trace = Trace::open(Path::new(&args[1]))?;
    let profile = Profile::open(Path::new(&args[2]))?;
    let nodes: u32 = args[3].parse()?;
    let own = args.iter().any(|a| a == "trace");
    let speed = args.get(6).and_then(|s| s.parse().ok()).unwrap_or(1.0);
    let medes = |objective, form, keep_dedup: u64| PolicyConfig::Medes {
        objective,
        form,
        idle_ms: 60_000,
        keep_alive_ms: 600_000,
        keep_dedup_ms: keep_dedup * 60_000,
    };
    let latency = Objective::Latency { alpha: 2.5 };
    let memory = Objective::Memory { budget: 0 };
    let policies = [
        PolicyConfig::FixedKeepAlive { keep_alive_ms: 600_000 },
        PolicyConfig::Adaptive(Adaptive::default()),
        PolicyConfig::GreedyDual,
        PolicyConfig::default(),
        medes(latency, Form::Paper, 15),
        medes(memory, Form::Paper, 15),
        medes(latency, Form::Served, 60),
        medes(memory, Form::Served, 60),
    ];
    println!(
        "{:>7} {:20} {:>9} {:>9} {:>9} {:>7} {:>9} {:>9} {:>9} {:>8} {:>8} {:>8} {:>7} {:>6}",
        "MiB",
        "policy",
        "requests",
        "cold",
        "dedup",
        "cold%",
        "start ms",
        "p99.9",
        "queue99.9",
        "mean MB",
        "dedup MB",
        "base MB",
        "evict",
        "wall"
    );
    for mib in args[4].split(',') {
        let mib: u64 = mib.parse()?;
        for policy in policies {
            let config = SimulationConfig {
                nodes,
                node_memory: mib << 20,
                policy,
                functions: if own { Functions::Trace } else { Functions::Profile },
                execution: if args.iter().any(|a| a == "exec") {
                    Execution::Trace
                } else {
                    Execution::Profile
                },
                ..SimulationConfig::default()
            };
            let r = simulate(
                &trace,
                TraceOptions { speed, ..TraceOptions::default() },
                &profile,
                &config,
                &mut Silent,
            )?;
            println!(
                "{mib:>7} {:20} {:>9} {:>9} {:>9} {:>7.3} {:>9.2} {:>9.1} {:>9.1} {:>8.0} {:>8.0} {:>8.0} {:>7} {:>6.2}",
                r.policy_name,
                r.starts.total(),
                r.starts.cold,
                r.starts.dedup,
                r.starts.cold as f64 / r.starts.total() as f64 * 100.0,
                r.startup.mean_ms,
                r.end_to_end.p999_ms,
                r.queueing.p999_ms,
                r.memory.mean / 1e6,
                r.memory.mean_dedup / 1e6,
                r.memory.mean_base / 1e6,
                r.evicted,
                r.wall_s,
            );
        }
    }
    Ok(())
}
