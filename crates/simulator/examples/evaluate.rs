//! Makes all runs of the evaluation: `cargo run --release --example evaluate -- TRACE OUT.json [WANTED [HEADROOM]]`.

use std::io::Write;
use std::path::Path;

use medes_simulator::{Profile, Silent, carry_out, evaluation};
use medes_trace::{Trace, TraceOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let trace = Trace::open(Path::new(&args[1]))?;
    let mut out = std::io::BufWriter::new(std::fs::File::create(&args[2])?);
    let mut plan = evaluation(1);
    if let Some(wanted) = args.get(3) {
        plan.retain(|p| format!("{:?} {}", p.experiment, p.label).contains(wanted.as_str()));
    }
    if let Some(headroom) = args.get(4) {
        plan.iter_mut().for_each(|p| p.config.headroom = headroom.parse().unwrap_or(0.2));
    }
    let mut n = 0;
    carry_out(
        &plan,
        &trace,
        TraceOptions::default(),
        &Profile::measured(),
        &mut Silent,
        &mut |run| {
            n += 1;
            let r = &run.result;
            println!(
                "{n}/{} {:?} {}: cold {} dedup {} startup {:.2} ms p99.9 {:.0} ms memory {:.1} GB {:.1} s",
                plan.len(),
                run.experiment,
                run.label,
                r.starts.cold,
                r.starts.dedup,
                r.startup.mean_ms,
                r.end_to_end.p999_ms,
                r.memory.mean / 1e9,
                r.wall_s
            );
            serde_json::to_writer(&mut out, &run)?;
            writeln!(out)
        },
    )?;
    Ok(())
}
