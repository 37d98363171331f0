//! `medes demo`: a private platform, real functions, every state, every answer checked.

mod measure;
mod report;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use medes_bench::examples::{Example, Manifest};
use medes_bench::machine::Circumstances;
use serde_json::Value;

use crate::answers::all_cases;
use crate::examples::{SourceArgs, deployment};
use crate::failure::{Failure, Outcome};
use crate::output::print;
use crate::platform::{Platform, Settings};
use crate::progress::View;
use crate::units::Period;
use measure::{Cases, Measurement, Plan};
use report::{FunctionReport, Report};

/// Show it all: start a private platform, run example functions through cold, warm and dedup
/// states, check every answer, and print what it costs and saves. Needs root.
#[derive(Debug, Args)]
pub struct DemoCommand {
    /// All ten example functions, not just four small ones.
    #[arg(long, conflicts_with = "functions")]
    all: bool,
    /// Only these example functions.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    functions: Vec<String>,
    /// Sandboxes per function.
    #[arg(long, value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u16).range(1..=256))]
    sandboxes: u16,
    /// How many times they are deduplicated and called again.
    #[arg(long, value_name = "N", default_value_t = 12,
          value_parser = clap::value_parser!(u16).range(1..))]
    cycles: u16,
    /// The idle period after which sandboxes are deduplicated.
    #[arg(long, value_name = "DURATION", default_value = "2s")]
    idle: Period,
    /// Write the results as JSON too; `-` for standard output, instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Keep the platform's directory (logs, configuration) for a look at it.
    #[arg(long)]
    keep: bool,
    /// Where that directory is made [default: the system's temporary directory].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    source: SourceArgs,
}

impl DemoCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If an answer was wrong, a kind of start never happened, or the platform failed.
    pub fn run(self) -> Outcome {
        if !nix::unistd::geteuid().is_root() {
            let message = "the demo starts a platform, which needs root; run it with sudo";
            return Err(Failure::Platform(message.into()));
        }
        let report = self.measure()?;
        self.publish(&report)?;
        let problems = report.problems();
        for problem in &problems {
            eprintln!("medes: {problem}");
        }
        if report.wrong() > 0 {
            return Err(Failure::Function);
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Failure::Platform("the demo did not run as it should".into()))
    }

    fn measure(&self) -> Result<Report> {
        let view = View::new();
        let source = self.source.find(|what| view.say(what))?;
        let manifest = Manifest::read(&source.examples)?;
        let functions = manifest.choose(&self.functions, self.all)?;
        let deployments = functions
            .iter()
            .map(|f| deployment(&manifest, f, &source))
            .collect::<Result<Vec<_>>>()?;

        let plan = Plan {
            sandboxes: self.sandboxes.into(),
            cycles: self.cycles.into(),
            idle: self.idle.0,
        };
        let requests = plan.singles() + plan.concurrent();
        view.say(&format!("computing the right answers to {requests} requests per function"));
        let events = |f: &Example| {
            let mut events = f.plain_events(plan.singles());
            events.extend(f.mixed_events(plan.concurrent()));
            events
        };
        let cases: Vec<_> = all_cases(&functions, &source, events)?
            .into_iter()
            .map(|mut plain| {
                let mixed = plain.split_off(plan.singles());
                Cases { plain, mixed }
            })
            .collect();

        let circumstances = Circumstances::now();
        let mut platform = Platform::start(&Settings {
            parent: self.dir.as_deref(),
            runtimes: &source.runtimes,
            name: "demo",
            change: &|config| config.lifecycle.idle = self.idle,
            keep: self.keep,
        })?;
        let client = platform.client().clone();
        view.say(&format!(
            "platform at {}, {} sandboxes per function, deduplicated after {} idle",
            client.url(),
            self.sandboxes,
            self.idle
        ));
        for (function, deployment) in functions.iter().zip(&deployments) {
            client.put::<Value>(&format!("/v1/functions/{}", function.name), deployment)?;
        }
        let mut lines: Vec<_> =
            functions.iter().map(|f| view.line(f.name.as_str(), requests)).collect();
        let mut reports: Vec<FunctionReport> = Vec::new();
        for ((function, cases), line) in functions.iter().zip(&cases).zip(&mut lines) {
            let interrupted = || platform.interrupted();
            let measurement = Measurement::new(&client, function, cases, plan, line, &interrupted);
            reports.push(measurement.run());
            if platform.interrupted() || platform.has_ended() {
                break;
            }
        }
        if platform.interrupted() {
            drop(platform);
            anyhow::bail!("interrupted");
        }
        if platform.has_ended() {
            anyhow::bail!("the platform ended before the demo:\n{}", platform.log_tail());
        }
        let directory = platform.directory().to_owned();
        platform.stop()?;
        if self.keep {
            view.say(&format!("kept {}", directory.display()));
        }
        Ok(Report {
            functions: reports,
            sandboxes: plan.sandboxes,
            cycles: plan.cycles,
            circumstances: circumstances.until_now(),
        })
    }

    fn publish(&self, report: &Report) -> Result<()> {
        let text = serde_json::to_string_pretty(report)? + "\n";
        match &self.json {
            Some(file) if file.as_os_str() == "-" => print(&text),
            Some(file) => {
                std::fs::write(file, text).with_context(|| file.display().to_string())?;
                print(&format!("\n{}", report.table()));
            }
            None => print(&format!("\n{}", report.table())),
        }
        Ok(())
    }
}
