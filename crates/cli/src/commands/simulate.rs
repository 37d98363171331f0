//! `medes simulate`: a trace played on a simulated cluster.

use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use medes_policy::{PolicyName, PolicySettings};
use medes_simulator::{
    Bases, Comparison, Execution, Experiment, Functions, Observer, Outcome as RequestOutcome,
    Profile, Run, Served, SimulationConfig, Validation, carry_out, evaluation, simulate,
};
use medes_trace::{Trace, TraceOptions};
use serde_json::json;

use super::policy_names;
use super::replay::{Row, recording};
use crate::failure::{Failure, Outcome};
use crate::output::{Format, table};
use crate::units::{Period, Size};

/// Play an arrival trace on a simulated cluster, with the policies of a live one.
///
/// The trace is a file or directory of the Azure Functions data sets of 2019 or 2021, or a table
/// `time_ms,function[,duration_ms]`; `medes trace make` makes one.
#[derive(Debug, Args)]
pub struct SimulateCommand {
    /// The trace: a file, or a directory with the files of the Azure 2019 format.
    #[arg(value_name = "TRACE")]
    trace: PathBuf,
    /// Who decides over idle sandboxes; several are simulated one after the other.
    #[arg(
        long,
        value_parser = policy_names(),
        value_name = "POLICY",
        value_delimiter = ',',
        default_value = "fixed,adaptive,latency,memory"
    )]
    policy: Vec<PolicyName>,
    /// How many nodes.
    #[arg(long, value_name = "N", default_value_t = 20)]
    nodes: u32,
    /// Memory of all nodes together; 0 for no limit.
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pool: Size,
    /// What requests and sandboxes cost: `measured`, `paper`, or a file that says so.
    #[arg(long, value_name = "PROFILE", default_value = "measured")]
    profile: PathBuf,
    /// Which functions there are: the trace's own, or the profile's in their stead.
    #[arg(long, value_enum, default_value = "trace")]
    functions: FunctionsName,
    /// How long requests take: as the profile says, or as the trace says.
    #[arg(long, value_enum, default_value = "profile")]
    execution: ExecutionName,
    /// Latency target of `latency`: multiples of a warm startup.
    #[arg(long, value_name = "X", default_value_t = 2.5)]
    alpha: f64,
    /// Warm without a request for this long: dedup.
    #[arg(long, value_name = "TIME", default_value = "60s")]
    idle: Period,
    /// Warm without a request for this long: not any longer.
    #[arg(long, value_name = "TIME", default_value = "10m")]
    keep_alive: Period,
    /// Dedup for this long: purge [default: 60m; 15m for the paper's policies].
    #[arg(long, value_name = "TIME")]
    keep_dedup: Option<Period>,
    /// Dedup sandboxes per base snapshot before there is another (T).
    #[arg(long, value_name = "T", default_value_t = medes_policy::DEFAULT_BASE_THRESHOLD)]
    base_threshold: u32,
    /// Where base snapshots are used: on all nodes, or on their own only.
    #[arg(long, value_enum, default_value = "cluster")]
    bases: BasesName,
    /// Dedup operations at the same time on one node.
    #[arg(long, value_name = "N", default_value_t = 4)]
    max_dedups: u32,
    /// Share of a node's memory that is kept free by dedup, percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 10,
          value_parser = clap::value_parser!(u8).range(0..=50))]
    headroom: u8,
    /// Everything random comes from this.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// How many times faster than recorded requests arrive.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    speed: f64,
    /// What of the trace to leave out at its beginning.
    #[arg(long, value_name = "TIME", default_value = "0")]
    skip: Period,
    /// How much of the trace to play [default: all].
    #[arg(long, value_name = "TIME")]
    length: Option<Period>,
    /// Requests that arrive earlier are played but not counted.
    #[arg(long, value_name = "TIME", default_value = "0")]
    warmup: Period,
    /// Make the whole evaluation on 20 nodes: pools as in the paper, and each setting varied.
    /// Settings given here other than the seed and the trace's are not used.
    #[arg(long, requires = "out")]
    evaluation: bool,
    /// Simulate what `medes replay --out RUN` played, on one node, and show both side by side. The
    /// policy, the seed and what of the trace is played are those of the replay.
    #[arg(long, value_name = "RUN", conflicts_with_all = ["evaluation", "requests"])]
    compare: Option<PathBuf>,
    /// With --compare: take times from the replay instead of the profile, so that only scheduler
    /// and policy are compared.
    #[arg(long, requires = "compare")]
    calibrate: bool,
    /// Write each result into this directory, for `medes report`.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Write each request's fate as CSV; with several policies, the last one's.
    #[arg(long, value_name = "FILE", conflicts_with = "evaluation")]
    requests: Option<PathBuf>,
    #[command(flatten)]
    format: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FunctionsName {
    Trace,
    Profile,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ExecutionName {
    Trace,
    Profile,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum BasesName {
    Cluster,
    Node,
}

/// What charts call a policy.
fn label(name: PolicyName) -> &'static str {
    match name {
        PolicyName::Fixed => "Fixed keep-alive",
        PolicyName::Adaptive => "Adaptive",
        PolicyName::GreedyDual => "Greedy-dual",
        PolicyName::Periods => "Medes, fixed periods",
        PolicyName::Latency => "Medes P1",
        PolicyName::Memory => "Medes P2",
        PolicyName::LatencyPaper => "Medes P1, paper",
        PolicyName::MemoryPaper => "Medes P2, paper",
    }
}

impl SimulateCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the trace or the profile can't be used, or results can't be written.
    pub fn run(self) -> Outcome {
        if !(self.speed > 0.0 && self.speed.is_finite()) || self.alpha.is_nan() || self.alpha < 1.0
        {
            let what = "--speed must be above 0, and --alpha at least 1";
            return Err(Failure::Usage(what.to_owned()));
        }
        let platform = |e: &dyn std::fmt::Display| Failure::Platform(e.to_string());
        let profile = Profile::open(&self.profile).map_err(|e| platform(&e))?;
        let trace = Trace::open(&self.trace).map_err(|e| platform(&e))?;
        for (n, what) in trace.repairs.list() {
            eprintln!("medes: repaired in the trace: {n} {what}");
        }
        if let Some(dir) = &self.out {
            std::fs::create_dir_all(dir)
                .map_err(|e| platform(&format!("{}: {e}", dir.display())))?;
        }
        if let Some(csv) = &self.compare {
            let run = self.compare(csv, &trace, &profile)?;
            if let Some(dir) = &self.out {
                let number = std::fs::read_dir(dir).map_err(|e| platform(&e))?.count();
                write(dir, number, &run).map_err(|e| platform(&e))?;
            }
            let Experiment::Validation(validation) = &run.experiment else { return Ok(()) };
            let value = serde_json::to_value(validation).map_err(|e| platform(&e))?;
            self.format.print(&value, || side_by_side(validation));
            return Ok(());
        }
        let mut results = Vec::new();
        let mut watch = Watch::new(trace.total());
        let mut keep = |run: Run, out: Option<&Path>| -> std::io::Result<()> {
            if let Some(dir) = out {
                write(dir, results.len(), &run)?;
            }
            results.push(summary(&run));
            Ok(())
        };
        if self.evaluation {
            let plan = evaluation(self.seed);
            let out = self.out.as_deref();
            watch.runs(plan.len());
            let mut done = |run: Run| keep(run, out);
            carry_out(&plan, &trace, self.trace_options(), &profile, &mut watch, &mut done)
                .map_err(|e| platform(&e))?;
        } else {
            watch.runs(self.policy.len());
            for name in &self.policy {
                watch.log_to(self.requests.as_deref()).map_err(|e| platform(&e))?;
                let config = self.config(*name);
                let options = self.trace_options();
                let result = simulate(&trace, options, &profile, &config, &mut watch)
                    .map_err(|e| platform(&e))?;
                watch.close_log().map_err(|e| platform(&e))?;
                let run = Run {
                    experiment: match &self.out {
                        Some(_) => {
                            Experiment::Pool { pressure: "pool".to_owned(), bytes: self.pool.0 }
                        }
                        None => Experiment::Single,
                    },
                    label: label(*name).to_owned(),
                    result,
                    improvement: None,
                };
                keep(run, self.out.as_deref()).map_err(|e| platform(&e))?;
            }
        }
        watch.bar.finish_and_clear();
        let value = json!({ "runs": results.iter().map(|r| &r.0).collect::<Vec<_>>() });
        self.format.print(&value, || human(results.iter().map(|r| r.1.clone())));
        Ok(())
    }

    /// Simulates what was replayed.
    fn compare(&self, csv: &Path, trace: &Trace, profile: &Profile) -> Result<Run, Failure> {
        let platform = |e: &dyn std::fmt::Display| Failure::Platform(e.to_string());
        let recorded = recording(csv).map_err(|e| platform(&e))?;
        let mut comparison = Comparison::default();
        Row::each(csv, |row| {
            comparison.served(&Served {
                request: row.request,
                function: row.function,
                start: row.start,
                startup_us: row.total_us.saturating_sub(row.execution_us),
                execution_us: row.execution_us,
            });
            Ok(())
        })
        .map_err(|e| platform(&e))?;
        let names: Vec<String> = recorded.functions.iter().map(ToString::to_string).collect();
        let profile = comparison.profile(profile, &names, self.calibrate).map_err(|name| {
            Failure::Platform(format!(
                "nothing is known of function {name}: name a --profile that has it, or use \
                 --calibrate"
            ))
        })?;
        let config = SimulationConfig {
            seed: recorded.seed,
            nodes: recorded.nodes.len().max(1) as u32,
            node_memory: recorded.memory_budget,
            policy: recorded.policy.config(),
            functions: Functions::Profile,
            bases: Bases::Node,
            max_dedups: recorded.max_dedups,
            headroom: f64::from(recorded.policy.headroom_percent) / 100.0,
            base_threshold: self.base_threshold,
            ..SimulationConfig::default()
        };
        let options = TraceOptions {
            seed: recorded.seed,
            speed: recorded.speed,
            skip_ms: recorded.skip_ms,
            length_ms: recorded.length_ms,
        };
        let result = simulate(trace, options, &profile, &config, &mut comparison)
            .map_err(|e| platform(&e))?;
        let origin = format!("{}, replayed from {}", csv.display(), recorded.began);
        let validation = comparison.finish(origin, self.calibrate);
        Ok(Run {
            experiment: Experiment::Validation(Box::new(validation)),
            label: label(recorded.policy.name).to_owned(),
            result,
            improvement: None,
        })
    }

    fn trace_options(&self) -> TraceOptions {
        TraceOptions {
            seed: self.seed,
            speed: self.speed,
            skip_ms: self.skip.millis(),
            length_ms: self.length.map(Period::millis),
        }
    }

    fn config(&self, name: PolicyName) -> SimulationConfig {
        let minutes = match name {
            PolicyName::Latency | PolicyName::Memory => 60,
            _ => 15,
        };
        let settings = PolicySettings {
            name,
            alpha: self.alpha,
            idle_ms: self.idle.millis(),
            keep_alive_ms: self.keep_alive.millis(),
            keep_dedup_ms: self.keep_dedup.map_or(minutes * 60_000, Period::millis),
            ..PolicySettings::default()
        };
        SimulationConfig {
            seed: self.seed,
            nodes: self.nodes,
            node_memory: self.pool.0 / u64::from(self.nodes.max(1)),
            policy: settings.config(),
            functions: match self.functions {
                FunctionsName::Trace => Functions::Trace,
                FunctionsName::Profile => Functions::Profile,
            },
            execution: match self.execution {
                ExecutionName::Trace => Execution::Trace,
                ExecutionName::Profile => Execution::Profile,
            },
            bases: match self.bases {
                BasesName::Cluster => SimulationConfig::default().bases,
                BasesName::Node => Bases::Node,
            },
            base_threshold: self.base_threshold,
            max_dedups: self.max_dedups,
            headroom: f64::from(self.headroom) / 100.0,
            warmup_ms: self.warmup.millis(),
            ..SimulationConfig::default()
        }
    }
}

/// Writes a run as a file of its own.
fn write(dir: &Path, number: usize, run: &Run) -> std::io::Result<()> {
    let name: String = run
        .label
        .chars()
        .filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_ascii_alphanumeric() || c == '-' => Some(c.to_ascii_lowercase()),
            _ => None,
        })
        .collect();
    let mut out = BufWriter::new(File::create(dir.join(format!("{number:04}-{name}.json")))?);
    serde_json::to_writer(&mut out, run)?;
    out.flush()
}

/// What is printed of a run: as JSON, and as a row.
fn summary(run: &Run) -> (serde_json::Value, Vec<String>) {
    let r = &run.result;
    let value = json!({
        "label": run.label,
        "policy": r.policy_name,
        "starts": r.starts,
        "startup": r.startup,
        "end_to_end": r.end_to_end,
        "queueing": r.queueing,
        "memory": r.memory,
        "evicted": r.evicted,
        "evicted_to_dedup": r.evicted_to_dedup,
        "dedups": r.dedups,
        "prewarmed": r.prewarmed,
        "wall_s": r.wall_s,
    });
    let row = vec![
        run.label.clone(),
        r.starts.total().to_string(),
        r.starts.cold.to_string(),
        r.starts.dedup.to_string(),
        format!("{:.2}", r.startup.mean_ms),
        format!("{:.1}", r.end_to_end.p50_ms),
        format!("{:.0}", r.end_to_end.p999_ms),
        format!("{:.2}", r.memory.mean / 1e9),
        format!("{:.2}", r.memory.peak as f64 / 1e9),
        format!("{:.1}", r.wall_s),
    ];
    (value, row)
}

/// A live run and its simulation.
fn side_by_side(v: &Validation) -> String {
    let sides = [("live", &v.live), ("simulated", &v.simulated)];
    let header = ["", ">REQUESTS", ">COLD", ">WARM", ">DEDUP"];
    let mut text = table(
        &header,
        sides.iter().map(|(what, s)| {
            let n = [s.starts.total(), s.starts.cold, s.starts.warm, s.starts.dedup];
            std::iter::once((*what).to_owned()).chain(n.map(|n| n.to_string())).collect()
        }),
    );
    text.push_str(&format!(
        "\n{} requests on both sides, {:.1} % of them with the same kind of start\n\n",
        v.compared,
        v.same_start * 100.0
    ));
    let both = v.live.times().into_iter().zip(v.simulated.times());
    let rows = both.flat_map(|((what, live), (_, simulated))| {
        [("live", live), ("simulated", simulated)].map(|(side, l)| {
            let ms = [l.p50_ms, l.p90_ms, l.p99_ms, l.p999_ms];
            let named = [format!("{what}, {side}"), l.count.to_string()];
            named.into_iter().chain(ms.map(|ms| format!("{ms:.1}"))).collect()
        })
    });
    let header = ["TIME", ">COUNT", ">p50 ms", ">p90 ms", ">p99 ms", ">p99.9 ms"];
    text.push_str(&table(&header, rows));
    text
}

fn human(rows: impl Iterator<Item = Vec<String>>) -> String {
    let header = [
        "POLICY",
        ">REQUESTS",
        ">COLD",
        ">DEDUP",
        ">STARTUP ms",
        ">p50 ms",
        ">p99.9 ms",
        ">MEMORY GB",
        ">PEAK",
        ">TOOK s",
    ];
    table(&header, rows)
}

/// Shows how far it is, and writes requests down.
struct Watch {
    bar: ProgressBar,
    requests: u64,
    run: usize,
    runs: usize,
    log: Option<BufWriter<File>>,
    failed: Option<std::io::Error>,
}

impl Watch {
    fn new(requests: u64) -> Self {
        let bar = ProgressBar::new(requests);
        if !std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let style = ProgressStyle::with_template("{msg} {wide_bar} {percent} %  {eta}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar, requests, run: 0, runs: 0, log: None, failed: None }
    }

    fn runs(&mut self, runs: usize) {
        self.runs = runs;
        self.bar.set_length(self.requests * runs as u64);
    }

    fn log_to(&mut self, file: Option<&Path>) -> std::io::Result<()> {
        if let Some(path) = file {
            let mut log = BufWriter::new(File::create(path)?);
            writeln!(
                log,
                "request,arrived_us,function,node,start,queue_us,startup_us,execution_us"
            )?;
            self.log = Some(log);
        }
        Ok(())
    }

    fn close_log(&mut self) -> std::io::Result<()> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        self.log.take().map_or(Ok(()), |mut log| log.flush())
    }
}

impl Observer for Watch {
    fn outcome(&mut self, o: &RequestOutcome) {
        if let Some(log) = &mut self.log {
            let line = writeln!(
                log,
                "{},{},{},{},{},{},{},{}",
                o.request,
                o.arrived_us,
                o.function,
                o.node,
                o.start,
                o.queue_us,
                o.startup_us,
                o.execution_us
            );
            if let Err(e) = line {
                self.failed.get_or_insert(e);
            }
        }
    }

    fn progress(&mut self, _now_ms: u64, requests: u64) {
        if requests == 0 {
            self.run += 1;
            self.bar.set_message(format!("run {} of {}", self.run, self.runs));
        }
        self.bar.set_position(self.requests * (self.run as u64).saturating_sub(1) + requests);
    }
}
