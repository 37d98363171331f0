//! `medes replay`: a trace played on a running platform, with real requests.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use medes_core::{FunctionName, StartKind};
use medes_simulator::{LatencyHistogram, LatencySummary, Profile};
use medes_trace::{Arrival, Quantiles, Trace, TraceOptions, Traits, map_functions};
use serde_json::{Value, json};

use super::functions::decode;
use super::{Global, function_name};
use crate::client::{Answer, Client, ClientError};
use crate::failure::{Failure, Outcome};
use crate::output::{Format, table};
use crate::units::Period;
use crate::wire::Functions;

const HEADER: &str =
    "request,due_us,late_us,function,start,queue_us,startup_us,execution_us,total_us,error";

/// Play an arrival trace on a running platform, with real requests.
///
/// Requests are sent when they are due, whether or not earlier ones were answered. Each function
/// of the trace is played by the deployed one that is nearest by rank of duration and memory.
#[derive(Debug, Args)]
pub struct ReplayCommand {
    /// The trace: a file, or a directory with the files of the Azure 2019 format.
    #[arg(value_name = "TRACE")]
    trace: PathBuf,
    /// The deployed functions to play it on [default: all].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = function_name)]
    functions: Vec<FunctionName>,
    /// What is known of their times and sizes: `measured`, or a file as `medes simulate` takes.
    #[arg(long, value_name = "PROFILE", default_value = "measured")]
    profile: PathBuf,
    /// Where requests are placed inside a minute comes from this.
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
    /// The requests' payload; `{n}` in it stands for the request's number.
    #[arg(long, value_name = "JSON", default_value = r#"{"seed": {n}}"#)]
    payload: String,
    /// The most requests under way at once; what is due beyond that is sent late.
    #[arg(long, value_name = "N", default_value_t = 256,
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    in_flight: u16,
    /// Write each request's fate as CSV.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Go on where the CSV of an interrupted replay ends.
    #[arg(long, requires = "out")]
    resume: bool,
    #[command(flatten)]
    format: Format,
}

/// A request to be sent.
struct Due {
    number: u64,
    at: Instant,
    due_us: u64,
    function: usize,
}

/// What became of it.
struct Fate {
    due: Due,
    late_us: u64,
    total_us: u64,
    answer: Result<Answer, ClientError>,
}

impl ReplayCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the trace or the platform can't be used.
    pub fn run(self, global: &Global) -> Outcome {
        if !(self.speed > 0.0 && self.speed.is_finite()) {
            return Err(Failure::Usage("--speed must be above 0".to_owned()));
        }
        let platform = |e: &dyn std::fmt::Display| Failure::Platform(e.to_string());
        let client = global.client()?;
        let trace = Trace::open(&self.trace).map_err(|e| platform(&e))?;
        for (n, what) in trace.repairs.list() {
            eprintln!("medes: repaired in the trace: {n} {what}");
        }
        let profile = Profile::open(&self.profile).map_err(|e| platform(&e))?;
        let names = self.deployed(&client)?;
        let mapped = map(&trace, &names, &profile);
        let done = match (&self.out, self.resume) {
            (Some(path), true) => recorded(path).map_err(|e| platform(&e))?,
            _ => 0,
        };
        let log = self.open_log(done > 0).map_err(|e| platform(&e))?;
        let mut arrivals = trace.arrivals(self.options()).map_err(|e| platform(&e))?;
        let mut total = 0;
        while arrivals.next().map_err(|e| platform(&e))?.is_some() {
            total += 1;
        }
        let mut arrivals = trace.arrivals(self.options()).map_err(|e| platform(&e))?;
        let mut first = arrivals.next().map_err(|e| platform(&e))?;
        for _ in 0..done {
            first = arrivals.next().map_err(|e| platform(&e))?;
        }
        let Some(first) = first else {
            eprintln!("medes: all {total} requests have been played");
            return Ok(());
        };
        let mut next = Some(first);
        let mut number = done;
        let due = move || -> Option<(u64, Arrival)> {
            let arrival = next.take()?;
            next = arrivals.next().ok().flatten();
            number += 1;
            Some((number - 1, arrival))
        };
        let tally = self.play(&client, &names, &mapped, first.at_us, total - done, due, log)?;
        let value = tally.json(&names);
        self.format.print(&value, || tally.human(&names));
        Ok(())
    }

    fn options(&self) -> TraceOptions {
        TraceOptions {
            seed: self.seed,
            speed: self.speed,
            skip_ms: self.skip.millis(),
            length_ms: self.length.map(Period::millis),
        }
    }

    /// The functions to play on.
    fn deployed(&self, client: &Client) -> Result<Vec<FunctionName>, Failure> {
        let value: Value = client.get("/v1/functions")?;
        let list: Functions = decode(&value)?;
        let there: Vec<FunctionName> = list.functions.into_iter().map(|f| f.name).collect();
        if let Some(missing) = self.functions.iter().find(|f| !there.contains(f)) {
            return Err(Failure::Platform(format!(
                "there is no function {missing}; deploy it first"
            )));
        }
        let names = if self.functions.is_empty() { there } else { self.functions.clone() };
        if names.is_empty() {
            return Err(Failure::Platform(
                "no function is deployed; `medes deploy --help` shows how".to_owned(),
            ));
        }
        Ok(names)
    }

    fn open_log(&self, append: bool) -> std::io::Result<Option<BufWriter<File>>> {
        let Some(path) = &self.out else { return Ok(None) };
        if append {
            return Ok(Some(BufWriter::new(OpenOptions::new().append(true).open(path)?)));
        }
        let mut log = BufWriter::new(File::create(path)?);
        writeln!(log, "{HEADER}")?;
        Ok(Some(log))
    }

    /// Sends every request when it is due.
    #[allow(clippy::too_many_arguments)] // All of it is one replay.
    fn play(
        &self,
        client: &Client,
        names: &[FunctionName],
        mapped: &[usize],
        first_us: u64,
        count: u64,
        mut due: impl FnMut() -> Option<(u64, Arrival)> + Send,
        mut log: Option<BufWriter<File>>,
    ) -> Result<Tally, Failure> {
        let bar = ProgressBar::new(count);
        if !std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        if let Ok(style) = ProgressStyle::with_template("{pos}/{len} {wide_bar} {eta}  {msg}") {
            bar.set_style(style);
        }
        let mut tally = Tally::new(names.len());
        let (send, work) = mpsc::channel::<Due>();
        let work = Arc::new(Mutex::new(work));
        let (report, fates) = mpsc::channel::<Fate>();
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..self.in_flight.min(u16::try_from(count).unwrap_or(u16::MAX)) {
                let (work, report) = (work.clone(), report.clone());
                scope.spawn(move || self.worker(client, names, &work, &report));
            }
            drop(report);
            drop(work);
            scope.spawn(move || {
                while let Some((number, arrival)) = due() {
                    let due_us = arrival.at_us;
                    let at = began + Duration::from_micros(due_us - first_us);
                    std::thread::sleep(at.saturating_duration_since(Instant::now()));
                    let function = mapped[arrival.function as usize];
                    if send.send(Due { number, at, due_us, function }).is_err() {
                        return;
                    }
                }
            });
            for fate in fates {
                tally.add(&fate);
                bar.inc(1);
                bar.set_message(tally.short());
                if let Some(log) = &mut log {
                    write_fate(log, &fate, &names[fate.due.function])
                        .map_err(|e| Failure::Platform(format!("writing the CSV: {e}")))?;
                }
            }
            Ok::<_, Failure>(())
        })?;
        bar.finish_and_clear();
        if let Some(log) = &mut log {
            log.flush().map_err(|e| Failure::Platform(format!("writing the CSV: {e}")))?;
        }
        Ok(tally)
    }

    fn worker(
        &self,
        client: &Client,
        names: &[FunctionName],
        work: &Mutex<mpsc::Receiver<Due>>,
        report: &mpsc::Sender<Fate>,
    ) {
        loop {
            let due = match work.lock() {
                Ok(work) => work.recv(),
                Err(_) => return,
            };
            let Ok(due) = due else { return };
            let late_us = due.at.elapsed().as_micros() as u64;
            let payload = self.payload.replace("{n}", &due.number.to_string());
            let begun = Instant::now();
            let answer = client.invoke(&names[due.function], payload.as_bytes());
            let total_us = begun.elapsed().as_micros() as u64;
            if report.send(Fate { due, late_us, total_us, answer }).is_err() {
                return;
            }
        }
    }
}

/// For each function of the trace the deployed one that plays it.
fn map(trace: &Trace, names: &[FunctionName], profile: &Profile) -> Vec<usize> {
    let wanted: Vec<_> = trace
        .functions
        .iter()
        .map(|f| Traits {
            duration: f.duration_ms.as_ref().map(Quantiles::median),
            memory: f.memory.map(|m| m as f64),
        })
        .collect();
    let at_hand: Vec<_> = names
        .iter()
        .map(|name| {
            let known = profile.functions.iter().find(|f| f.name == name.as_str());
            Traits {
                duration: known.map(|f| f.execution_ms.median()),
                memory: known.map(|f| f.warm_bytes as f64),
            }
        })
        .collect();
    map_functions(&wanted, &at_hand)
}

/// How many requests a CSV has the fate of, counted from the first without a gap.
fn recorded(path: &Path) -> std::io::Result<u64> {
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        file => file?,
    };
    let mut seen = Vec::new();
    for line in BufReader::new(file).lines().skip(1) {
        if let Some(n) = line?.split(',').next().and_then(|n| n.parse::<u64>().ok()) {
            seen.push(n);
        }
    }
    seen.sort_unstable();
    Ok(seen.iter().zip(0..).take_while(|(n, i)| *n == i).count() as u64)
}

fn write_fate(log: &mut impl Write, fate: &Fate, name: &FunctionName) -> std::io::Result<()> {
    let Fate { due, late_us, total_us, answer } = fate;
    write!(log, "{},{},{late_us},{name},", due.number, due.due_us)?;
    match answer {
        Ok(a) => {
            let start = a.start.map_or_else(String::new, |s| s.to_string());
            let (t, error) = (a.timing, a.error.as_deref().unwrap_or_default());
            writeln!(
                log,
                "{start},{},{},{},{total_us},{error}",
                t.queue_us, t.startup_us, t.execution_us
            )
        }
        Err(e) => {
            let e = e.to_string().replace(['"', '\n'], "'");
            writeln!(log, ",,,,{total_us},\"{e}\"")
        }
    }
}

/// What is counted.
struct Tally {
    /// Cold, warm and dedup starts by function.
    starts: Vec<[u64; 3]>,
    total: Vec<LatencyHistogram>,
    all: LatencyHistogram,
    startup: [LatencyHistogram; 3],
    late: LatencyHistogram,
    errors: BTreeMap<String, u64>,
}

impl Tally {
    fn new(functions: usize) -> Self {
        Self {
            starts: vec![[0; 3]; functions],
            total: (0..functions).map(|_| LatencyHistogram::default()).collect(),
            all: LatencyHistogram::default(),
            startup: Default::default(),
            late: LatencyHistogram::default(),
            errors: BTreeMap::new(),
        }
    }

    fn add(&mut self, fate: &Fate) {
        self.late.record(fate.late_us);
        let error = match &fate.answer {
            Ok(answer) => {
                if let Some(start) = answer.start {
                    self.starts[fate.due.function][start as usize] += 1;
                    let waited = answer.timing.queue_us + answer.timing.startup_us;
                    self.startup[start as usize].record(waited);
                }
                self.total[fate.due.function].record(fate.total_us);
                self.all.record(fate.total_us);
                answer.error.clone()
            }
            Err(ClientError::Refused { code, .. }) => Some(code.clone()),
            Err(ClientError::Unreachable { .. }) => Some("Unreachable".to_owned()),
            Err(e) => Some(e.to_string()),
        };
        if let Some(error) = error {
            *self.errors.entry(error).or_default() += 1;
        }
    }

    fn sum(&self) -> [u64; 3] {
        self.starts.iter().fold([0; 3], |a, b| std::array::from_fn(|i| a[i] + b[i]))
    }

    fn short(&self) -> String {
        let [cold, warm, dedup] = self.sum();
        format!("cold {cold}, warm {warm}, dedup {dedup}")
    }

    fn json(&self, names: &[FunctionName]) -> Value {
        let starts =
            |[cold, warm, dedup]: [u64; 3]| json!({"cold": cold, "warm": warm, "dedup": dedup});
        let by_kind = |kind: StartKind| self.startup[kind as usize].summary();
        json!({
            "starts": starts(self.sum()),
            "total": self.all.summary(),
            "startup": {
                "cold": by_kind(StartKind::Cold),
                "warm": by_kind(StartKind::Warm),
                "dedup": by_kind(StartKind::Dedup),
            },
            "late": self.late.summary(),
            "errors": self.errors,
            "functions": names.iter().enumerate().map(|(i, name)| json!({
                "name": name,
                "starts": starts(self.starts[i]),
                "total": self.total[i].summary(),
            })).collect::<Vec<_>>(),
        })
    }

    fn human(&self, names: &[FunctionName]) -> String {
        let row = |name: String, [cold, warm, dedup]: [u64; 3], s: LatencySummary| {
            vec![
                name,
                (cold + warm + dedup).to_string(),
                cold.to_string(),
                dedup.to_string(),
                format!("{:.1}", s.p50_ms),
                format!("{:.1}", s.p99_ms),
                format!("{:.1}", s.p999_ms),
            ]
        };
        let mut rows: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(i, name)| row(name.to_string(), self.starts[i], self.total[i].summary()))
            .collect();
        rows.push(row("all".to_owned(), self.sum(), self.all.summary()));
        let header =
            ["FUNCTION", ">REQUESTS", ">COLD", ">DEDUP", ">p50 ms", ">p99 ms", ">p99.9 ms"];
        let mut text = table(&header, rows);
        let late = self.late.summary();
        text.push_str(&format!(
            "\nsent late by {:.1} ms at the median, {:.1} ms at p99\n",
            late.p50_ms, late.p99_ms
        ));
        for (error, n) in &self.errors {
            text.push_str(&format!("{n} errors: {error}\n"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_goes_on_at_the_first_request_without_a_fate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.csv");
        assert_eq!(recorded(&path).unwrap(), 0);
        std::fs::write(&path, format!("{HEADER}\n1,0,0,f\n0,0,0,f\n3,0,0,f\n")).unwrap();
        assert_eq!(recorded(&path).unwrap(), 2);
    }
}
