//! `medes replay`: a trace played on running platforms, with real requests.

mod private;
mod record;
mod tally;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use medes_controller::{PolicyOrigin, PolicyView};
use medes_core::FunctionName;
use medes_policy::{PolicyName, PolicySettings};
use medes_simulator::Profile;
use medes_trace::{Arrival, Quantiles, Trace, TraceOptions, Traits, map_functions};
use serde_json::{Map, Value, json};

use super::functions::decode;
use super::policy::SettingFlags;
use super::{Global, function_name, policy_names};
use crate::client::{Answer, Client, ClientError};
use crate::examples::SourceArgs;
use crate::failure::{Failure, Outcome};
use crate::output::Format;
use crate::units::Period;
use crate::wire::Functions;
use private::Private;
use record::{Log, Recording, recorded};
pub use record::{Row, recording};
use tally::Tally;

/// Play an arrival trace on running platforms, with real requests.
///
/// Requests are sent when they are due, whether or not earlier ones were answered. Each function
/// of the trace is played by the deployed one that is nearest by rank of duration and memory.
#[derive(Debug, Args)]
pub struct ReplayCommand {
    /// The trace: a file, or a directory with the files of the Azure 2019 format.
    #[arg(value_name = "TRACE")]
    trace: PathBuf,
    /// The platforms to play it on; each function of the trace on one of them [default: --url].
    #[arg(long, value_name = "URL,...", value_delimiter = ',')]
    nodes: Vec<String>,
    /// Play it on a platform of its own, with the example functions. Needs root.
    #[arg(long, conflicts_with = "nodes")]
    private: bool,
    /// The deployed functions to play it on [default: all].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = function_name)]
    functions: Vec<FunctionName>,
    /// Who decides over idle sandboxes meanwhile [default: as the platform has it].
    #[arg(long, value_name = "POLICY", value_parser = policy_names())]
    policy: Option<PolicyName>,
    #[command(flatten)]
    settings: SettingFlags,
    /// End the functions' idle sandboxes first.
    #[arg(long)]
    fresh: bool,
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
    /// Write each request's fate as CSV, and beside it (FILE.json) what was played how.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Go on where the CSV of an interrupted replay ends.
    #[arg(long, requires = "out")]
    resume: bool,
    #[command(flatten, next_help_heading = "The example functions of --private")]
    source: SourceArgs,
    #[command(flatten)]
    format: Format,
}

/// The platforms, and which of them each request goes to.
struct Target<'a> {
    clients: &'a [Client],
    names: &'a [FunctionName],
    /// For each function of the trace the deployed one that plays it.
    mapped: &'a [usize],
}

impl Target<'_> {
    /// A function lives on one node, as its sandboxes do.
    fn node(&self, function: usize) -> usize {
        function % self.clients.len()
    }
}

/// A request to be sent.
struct Due {
    number: u64,
    at: Instant,
    due_us: u64,
    function: usize,
    node: usize,
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
        let trace = Trace::open(&self.trace).map_err(platform)?;
        for (n, what) in trace.repairs.list() {
            eprintln!("medes: repaired in the trace: {n} {what}");
        }
        let own = self.private.then(|| Private::start(&self.source, &self.functions));
        let own = own.transpose()?;
        let clients = match &own {
            Some(own) => vec![own.client().clone()],
            None if self.nodes.is_empty() => vec![global.client()?],
            None => self.nodes.iter().map(|url| Client::new(url)).collect::<Result<_, _>>()?,
        };
        let played = self.play_on(&clients, &trace);
        if let Some(own) = own {
            own.stop()?;
        }
        played
    }

    fn play_on(&self, clients: &[Client], trace: &Trace) -> Outcome {
        let profile = Profile::open(&self.profile).map_err(platform)?;
        let names = self.deployed(clients)?;
        let mapped = map(trace, &names, &profile);
        let done = match (&self.out, self.resume) {
            (Some(path), true) => recorded(path).map_err(platform)?,
            _ => 0,
        };
        let mut arrivals = trace.arrivals(self.options()).map_err(platform)?;
        let mut total = 0;
        while arrivals.next().map_err(platform)?.is_some() {
            total += 1;
        }
        let mut arrivals = trace.arrivals(self.options()).map_err(platform)?;
        let mut first = arrivals.next().map_err(platform)?;
        for _ in 0..done {
            first = arrivals.next().map_err(platform)?;
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
        let before = self.set_policy(clients)?;
        let result = (|| {
            let log = self.open_log(clients, &names, done > 0)?;
            if self.fresh {
                self.purge(clients, &names)?;
            }
            let target = Target { clients, names: &names, mapped: &mapped };
            self.play(&target, first.at_us, total - done, due, log)
        })();
        restore_policy(clients, &before)?;
        let tally = result?;
        self.format.print(&tally.json(&names), || tally.human(&names));
        Ok(())
    }

    /// Sets the policy that was asked for; gives what was in force before.
    fn set_policy(&self, clients: &[Client]) -> Result<Vec<PolicyView>, Failure> {
        let mut change: Map<String, Value> = self.settings.given();
        change.extend(self.policy.map(|name| ("name".to_owned(), json!(name))));
        if change.is_empty() {
            return Ok(Vec::new());
        }
        let mut before = Vec::new();
        for client in clients {
            before.push(decode(&client.get::<Value>("/v1/policy")?)?);
            let _: Value = client.put("/v1/policy", &change)?;
        }
        Ok(before)
    }

    fn purge(&self, clients: &[Client], names: &[FunctionName]) -> Result<(), Failure> {
        for client in clients {
            for name in names {
                let _: Value = client.post(&format!("/v1/functions/{name}/purge"))?;
            }
        }
        Ok(())
    }

    fn open_log(
        &self,
        clients: &[Client],
        names: &[FunctionName],
        append: bool,
    ) -> Result<Option<Log>, Failure> {
        let Some(path) = &self.out else { return Ok(None) };
        let info: Value = clients[0].get("/v1/info")?;
        let policy: PolicySettings = decode(&info["config"]["policy"])?;
        let recording = Recording {
            trace: self.trace.clone(),
            seed: self.seed,
            speed: self.speed,
            skip_ms: self.skip.millis(),
            length_ms: self.length.map(Period::millis),
            functions: names.to_vec(),
            nodes: clients.iter().map(|c| c.url().to_owned()).collect(),
            policy,
            memory_budget: info["node"]["memory"]["budget"].as_u64().unwrap_or(0),
            max_dedups: info["config"]["max_dedups"].as_u64().unwrap_or(1) as u32,
            version: info["version"].as_str().unwrap_or_default().to_owned(),
            began: jiff::Timestamp::now().to_string(),
        };
        Log::open(path, &recording, append).map(Some).map_err(platform)
    }

    fn options(&self) -> TraceOptions {
        TraceOptions {
            seed: self.seed,
            speed: self.speed,
            skip_ms: self.skip.millis(),
            length_ms: self.length.map(Period::millis),
        }
    }

    /// The functions to play on: those that all platforms have.
    fn deployed(&self, clients: &[Client]) -> Result<Vec<FunctionName>, Failure> {
        let mut there: Option<Vec<FunctionName>> = None;
        for client in clients {
            let value: Value = client.get("/v1/functions")?;
            let list: Functions = decode(&value)?;
            let own: Vec<_> = list.functions.into_iter().map(|f| f.name).collect();
            match &mut there {
                None => there = Some(own),
                Some(there) => there.retain(|name| own.contains(name)),
            }
        }
        let there = there.unwrap_or_default();
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

    /// Sends every request when it is due.
    fn play(
        &self,
        target: &Target<'_>,
        first_us: u64,
        count: u64,
        mut due: impl FnMut() -> Option<(u64, Arrival)> + Send,
        mut log: Option<Log>,
    ) -> Result<Tally, Failure> {
        let bar = ProgressBar::new(count);
        if !std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        if let Ok(style) = ProgressStyle::with_template("{pos}/{len} {wide_bar} {eta}  {msg}") {
            bar.set_style(style);
        }
        let mut tally = Tally::new(target.names.len());
        let (send, work) = mpsc::channel::<Due>();
        let work = Arc::new(Mutex::new(work));
        let (report, fates) = mpsc::channel::<Fate>();
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..self.in_flight.min(u16::try_from(count).unwrap_or(u16::MAX)) {
                let (work, report) = (work.clone(), report.clone());
                scope.spawn(move || self.worker(target, &work, &report));
            }
            drop(report);
            drop(work);
            scope.spawn(move || {
                while let Some((number, arrival)) = due() {
                    let due_us = arrival.at_us;
                    let at = began + Duration::from_micros(due_us - first_us);
                    std::thread::sleep(at.saturating_duration_since(Instant::now()));
                    let function = target.mapped[arrival.function as usize];
                    let node = target.node(arrival.function as usize);
                    if send.send(Due { number, at, due_us, function, node }).is_err() {
                        return;
                    }
                }
            });
            for fate in fates {
                tally.add(&fate);
                bar.inc(1);
                bar.set_message(tally.short());
                if let Some(log) = &mut log {
                    log.add(&fate, &target.names[fate.due.function])
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
        target: &Target<'_>,
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
            let client = &target.clients[due.node];
            let answer = client.invoke(&target.names[due.function], payload.as_bytes());
            let total_us = begun.elapsed().as_micros() as u64;
            if report.send(Fate { due, late_us, total_us, answer }).is_err() {
                return;
            }
        }
    }
}

fn platform(e: impl std::fmt::Display) -> Failure {
    Failure::Platform(e.to_string())
}

/// Brings back the policies that were in force before.
fn restore_policy(clients: &[Client], before: &[PolicyView]) -> Result<(), Failure> {
    for (client, view) in clients.iter().zip(before) {
        match view.origin {
            PolicyOrigin::Configuration => client.delete("/v1/policy")?,
            PolicyOrigin::Live => drop(client.put::<Value>("/v1/policy", &view.policy)?),
        }
    }
    Ok(())
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
