//! Measurements through the front door of a private platform: real functions, real requests, every
//! answer checked.

pub mod density;
mod host;
pub mod lifecycle;
pub mod peers;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use medes_bench::examples::{Case, Example, Manifest, Source};
use medes_bench::machine::Circumstances;
use medes_core::SandboxId;
use medes_node::DedupReport;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answers::{Checked, call};
use crate::client::{Answer, Client, ClientError};
use crate::config::Config;
use crate::examples::{SourceArgs, deployment};
use crate::failure::{Failure, Outcome};
use crate::output::print;
use crate::platform::{Platform, Settings};
use crate::progress::View;
use crate::units::Period;
use crate::wire::{SandboxView, Sandboxes};

/// How long a sandbox is left alone after a request before anything is done to it: its runtime
/// tidies its heap 0.1 s after the last one, and memory that was away comes back in that time.
pub const PAUSE: Duration = Duration::from_millis(150);

/// How often a dedup operation that something passing stood in the way of is tried.
const TRIES: u32 = 5;

/// What measurements through the front door have in common.
#[derive(Debug, Args)]
pub struct FrontArgs {
    /// Write the results as JSON too; `-` for standard output, instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Keep the platform's directory (logs, configuration) for a look at it.
    #[arg(long)]
    keep: bool,
    /// Where that directory is made [default: the system's temporary directory].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// How long bringing a sandbox back may take before some of its working set stays in memory; `0`
    /// for the least memory [default: the platform's; for `density` 0].
    #[arg(long, value_name = "PERIOD")]
    restore_target: Option<Period>,
    #[command(flatten)]
    source: SourceArgs,
}

/// A private platform with functions deployed, on which sandboxes change state only when told to.
pub struct Bench {
    /// The platform.
    pub platform: Platform,
    /// A client for it.
    pub client: Client,
    /// What was deployed.
    pub functions: Vec<Example>,
    /// Where they are.
    pub source: Source,
    /// Progress.
    pub view: View,
    keep: bool,
}

impl FrontArgs {
    /// Starts a platform and deploys the functions that are named, or all.
    ///
    /// # Errors
    /// A platform failure if this process is not root, or something that it takes is missing.
    pub fn open(
        &self,
        name: &str,
        functions: &[String],
        change: &dyn Fn(&mut Config),
    ) -> Result<Bench, Failure> {
        if !nix::unistd::geteuid().is_root() {
            let message = "this starts a platform, which needs root; run it with sudo";
            return Err(Failure::Platform(message.into()));
        }
        Ok(self.start(name, functions, change)?)
    }

    fn start(
        &self,
        name: &str,
        functions: &[String],
        change: &dyn Fn(&mut Config),
    ) -> Result<Bench> {
        let view = View::new();
        let source = self.source.find(|what| view.say(what))?;
        let manifest = Manifest::read(&source.examples)?;
        let functions = manifest.choose(functions, true)?;
        let deployments: Vec<_> =
            functions.iter().map(|f| deployment(&manifest, f, &source)).collect::<Result<_>>()?;
        let platform = Platform::start(&Settings {
            parent: self.dir.as_deref(),
            runtimes: &source.runtimes,
            name,
            change: &|config| {
                config.lifecycle.idle = Period::secs(7 * 86_400);
                config.lifecycle.keep_alive = Period::secs(8 * 86_400);
                config.lifecycle.keep_dedup = Period::secs(8 * 86_400);
                change(config);
                if let Some(target) = self.restore_target {
                    config.dedup.restore_target = target;
                }
            },
            keep: self.keep,
        })?;
        let client = platform.client().clone();
        view.say(&format!("platform at {}", client.url()));
        for (function, deployment) in functions.iter().zip(&deployments) {
            client.put::<Value>(&format!("/v1/functions/{}", function.name), deployment)?;
        }
        Ok(Bench { platform, client, functions, source, view, keep: self.keep })
    }

    /// Writes a report as JSON and prints what `human` makes of it, as asked for.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn publish(
        &self,
        report: &impl Serialize,
        circumstances: &Circumstances,
        human: impl FnOnce() -> String,
    ) -> Result<()> {
        let text = serde_json::to_string_pretty(report)? + "\n";
        let human = || format!("\n{}{}", human(), circumstances.note());
        match &self.json {
            Some(file) if file.as_os_str() == "-" => print(&text),
            Some(file) => {
                std::fs::write(file, text).with_context(|| file.display().to_string())?;
                print(&human());
            }
            None => print(&human()),
        }
        Ok(())
    }
}

impl Bench {
    /// Ends the platform in order.
    ///
    /// # Errors
    /// If it was interrupted, or did not run or end as it should.
    pub fn close(mut self) -> Result<()> {
        if self.platform.interrupted() {
            bail!("interrupted");
        }
        if self.platform.has_ended() {
            bail!("the platform ended by itself:\n{}", self.platform.log_tail());
        }
        let directory = self.platform.directory().to_owned();
        self.platform.stop()?;
        if self.keep {
            self.view.say(&format!("kept {}", directory.display()));
        }
        Ok(())
    }

    /// Gives up when the user wants that.
    ///
    /// # Errors
    /// If so.
    pub fn go_on(&self) -> Result<()> {
        ensure!(!self.platform.interrupted(), "interrupted");
        Ok(())
    }

    /// Leaves the sandboxes alone for a moment.
    pub fn pause(&self) {
        std::thread::sleep(PAUSE);
    }

    /// Sends a request and checks the answer.
    ///
    /// # Errors
    /// If the platform gives no answer, or the user wants to stop.
    pub fn call(
        &self,
        function: &Example,
        case: &Case,
        checked: &mut Checked,
    ) -> Result<(Answer, f64)> {
        self.go_on()?;
        let (answer, ms) = call(&self.client, &function.name, case)?;
        checked.check(case, &answer);
        Ok((answer, ms))
    }

    /// Starts a sandbox ahead of any request.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start_sandbox(&self, function: &Example) -> Result<SandboxId> {
        #[derive(Deserialize)]
        struct Started {
            sandbox: String,
        }
        self.go_on()?;
        let path = format!("/v1/functions/{}/start", function.name);
        Ok(self.client.post::<Started>(&path)?.sandbox.parse()?)
    }

    /// The sandboxes of a function.
    ///
    /// # Errors
    /// If the platform does not answer.
    pub fn sandboxes(&self, function: &Example) -> Result<Vec<SandboxView>> {
        let mut list = self.client.get::<Sandboxes>("/v1/sandboxes")?.sandboxes;
        list.retain(|s| s.function == function.name);
        Ok(list)
    }

    /// Ends all sandboxes of a function.
    ///
    /// # Errors
    /// If the platform does not.
    pub fn purge(&self, function: &Example) -> Result<()> {
        self.go_on()?;
        self.client.post::<Value>(&format!("/v1/functions/{}/purge", function.name))?;
        Ok(())
    }

    /// Deduplicates a sandbox.
    ///
    /// # Errors
    /// If it stays warm although it was tried several times.
    pub fn dedup(&self, sandbox: SandboxId) -> Result<DedupReport> {
        #[derive(Deserialize)]
        struct Done {
            report: DedupReport,
        }
        for tries in 1.. {
            self.go_on()?;
            match self.client.post::<Done>(&format!("/v1/sandboxes/{sandbox}/dedup")) {
                Ok(done) => return Ok(done.report),
                Err(ClientError::Refused { .. }) if tries < TRIES => self.pause(),
                Err(error) => return Err(error).context("deduplicating a sandbox"),
            }
        }
        bail!("never tried")
    }
}

/// Says what went wrong, if anything did, as the end of a command.
///
/// # Errors
/// If an answer was wrong, or something else.
pub fn conclude<'a>(all: impl IntoIterator<Item = (&'a str, &'a Checked)>) -> Outcome {
    let (mut wrong, mut problems) = (0, 0);
    for (name, checked) in all {
        wrong += checked.answers_wrong;
        if let Some(problem) = &checked.problem {
            problems += 1;
            eprintln!("medes: {name}: {problem}");
        }
    }
    match (wrong, problems) {
        (0, 0) => Ok(()),
        (0, _) => Err(Failure::Platform("not everything could be measured".into())),
        _ => Err(Failure::Function),
    }
}
