//! `medes attach`: dedup and restore of processes, cgroups and containers that somebody else
//! started.

use std::path::PathBuf;

use anyhow::Context;
use clap::{ArgGroup, Args, Subcommand};
use jiff::Timestamp;
use medes_attach::protocol::{Attached, Dedup, DedupReport, Event, RestoreReport, Which};
use medes_attach::{Client, ClientError, RUN_DIR, Target};
use medes_memory::features::KernelFeatures;
use serde_json::json;

use crate::config::Log;
use crate::failure::{Failure, Outcome};
use crate::output::{Format, megabytes, milliseconds, plain, print, table};
use crate::serve::log_to_stderr;

/// The hidden subcommand that makes this program a holder of attached memory.
pub const HOLDER_COMMAND: &str = "attach-holder";

/// Deduplicate processes, cgroups and containers that Medes has not started.
///
/// With or without a running platform: a small process in the background holds what brings the
/// memory back, as long as something is attached, and for ten minutes more, so that another dedup
/// takes less time. If it is killed, so are the processes that lack memory then.
#[derive(Debug, Args)]
pub struct AttachCommand {
    /// Where the socket of the process in the background is.
    #[arg(long, global = true, env = "MEDES_ATTACH_DIR", default_value = RUN_DIR, value_name = "DIR")]
    dir: PathBuf,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Freeze it and take its memory away.
    Dedup(DedupCommand),
    /// Let it run again; its memory follows as it is touched, and all of it in the background.
    Restore(RestoreCommand),
    /// What is attached.
    Status(StatusCommand),
}

/// What is meant.
#[derive(Clone, Debug, Args)]
#[command(group = ArgGroup::new("what").args(["pid", "cgroup", "container"]))]
struct TargetArguments {
    /// A process, with all that descend from it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// A cgroup, by its directory or its path below /sys/fs/cgroup.
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// A container of containerd, Docker, Podman, runc or crun.
    #[arg(long, value_name = "ID")]
    container: Option<String>,
}

impl TargetArguments {
    fn target(self) -> Option<Target> {
        let pid = self.pid.map(Target::Pid);
        pid.or(self.cgroup.map(Target::Cgroup)).or(self.container.map(Target::Container))
    }
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["pid", "cgroup", "container"]))]
struct DedupCommand {
    #[command(flatten)]
    target: TargetArguments,
    /// Share base pages with what is attached under the same name [default: with the same user's].
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
    /// Make its pages a base snapshot for others that run the same program.
    #[arg(long)]
    base: bool,
    /// Say what it would save; touch nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["id", "all", "pid", "cgroup", "container"]))]
struct RestoreCommand {
    /// An identifier that `medes attach status` shows.
    id: Option<String>,
    /// All that is attached.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    target: TargetArguments,
    /// Wait until all memory is back, not only until it runs.
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
struct StatusCommand {
    /// Show what happened lately, and go on with what happens until the process in the background ends.
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    format: Format,
}

/// Hold attached memory; started by `medes attach dedup` by itself.
#[derive(Debug, Args)]
pub struct HolderCommand {
    /// Where to make the socket.
    #[arg(long)]
    dir: PathBuf,
}

impl HolderCommand {
    /// Runs the holder.
    ///
    /// # Errors
    /// If it can't start.
    pub fn run(self) -> Outcome {
        log_to_stderr(&Log::default())?;
        Ok(medes_attach::holder::run(&self.dir).context("holding attached memory")?)
    }
}

/// A client of the holder with its socket in `directory`, which this program starts if need be.
///
/// # Errors
/// If this program can't be found.
pub fn local(directory: PathBuf) -> anyhow::Result<Client> {
    let program = std::env::current_exe().context("finding this program")?;
    Ok(Client::new(directory, program, vec![HOLDER_COMMAND.into()]))
}

impl AttachCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the host can't, or something stands in the way.
    pub fn run(self) -> Outcome {
        if !nix::unistd::geteuid().is_root() {
            return Err(Failure::Platform(
                "medes attach reads and changes other processes' memory: run it as root".into(),
            ));
        }
        let client = local(self.dir)?;
        match self.action {
            Action::Dedup(command) => command.run(&client),
            Action::Restore(command) => command.run(&client),
            Action::Status(command) => command.run(&client),
        }
    }
}

impl DedupCommand {
    fn run(self, client: &Client) -> Outcome {
        if let Err(missing) = KernelFeatures::probe().check() {
            return Err(Failure::Platform(format!(
                "this host can't deduplicate: it lacks {}; {}",
                missing.what, missing.remedy
            )));
        }
        let Self { target, domain, base, dry_run, format } = self;
        let Some(target) = target.target() else {
            return Err(Failure::Usage("what? --pid, --cgroup or --container says it".into()));
        };
        let name = target.to_string();
        let report = client.dedup(Dedup { target, domain, base, dry_run })?;
        format.print(&json!(report), || human(&name, &report));
        Ok(())
    }
}

fn human(name: &str, report: &DedupReport) -> String {
    let (before, after) = (megabytes(report.private_bytes), megabytes(report.image_bytes));
    let processes = match report.processes {
        1 => "1 process".to_owned(),
        n => format!("{n} processes"),
    };
    let base = match report.base_bytes {
        0 => String::new(),
        n => format!(", and a base snapshot of {} for others", megabytes(n)),
    };
    match &report.id {
        Some(id) => format!(
            "{id}  {}: {processes}, {before} -> {after}{base} in {}\n",
            plain(name),
            milliseconds(report.encode_us + report.commit_us)
        ),
        None => {
            format!("{}: {processes}, {before} -> {after} (nothing was touched)\n", plain(name))
        }
    }
}

impl RestoreCommand {
    fn run(self, client: &Client) -> Outcome {
        let which = match (self.id, self.target.target()) {
            (Some(id), _) => Which::Id(id),
            (None, Some(target)) => Which::Target(target),
            (None, None) => Which::All,
        };
        let reports = client.restore(which, self.wait)?;
        let line = |report: &RestoreReport| match &report.error {
            None => format!("{}  runs after {}\n", report.id, milliseconds(report.run_us)),
            Some(error) => format!("{}  killed: {}\n", report.id, plain(error)),
        };
        self.format.print(&json!({ "restored": reports }), || match reports.as_slice() {
            [] => "nothing is attached\n".to_owned(),
            all => all.iter().map(line).collect(),
        });
        match reports.iter().filter(|report| report.error.is_some()).count() {
            0 => Ok(()),
            n => Err(Failure::Platform(format!("{n} of {} could not go on", reports.len()))),
        }
    }
}

impl StatusCommand {
    fn run(self, client: &Client) -> Outcome {
        if self.watch {
            let json = self.format.json;
            return Ok(client.watch(|event| print(&event_line(event, json)))?);
        }
        let attached = client.status()?;
        self.format.print(&json!({ "attached": attached }), || list(&attached));
        Ok(())
    }
}

fn event_line(event: &Event, json: bool) -> String {
    if json {
        return format!("{}\n", json!(event));
    }
    let at = i64::try_from(event.at_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    let at = at.map_or_else(String::new, |at| format!("{at:.3}"));
    format!("{at}  {}  {:<8}  {}\n", event.id, event.what, plain(&event.detail))
}

fn list(attached: &[Attached]) -> String {
    if attached.is_empty() {
        return "nothing is attached\n".to_owned();
    }
    let header = ["ID", "STATE", "WHAT", "PROGRAM", ">PROCESSES", ">BEFORE", ">NOW", "DOMAIN"];
    let rows = attached.iter().map(|group| {
        vec![
            group.id.clone(),
            group.state.to_string(),
            plain(&group.target.to_string()).to_string(),
            plain(&group.program).to_string(),
            group.pids.len().to_string(),
            megabytes(group.private_bytes),
            megabytes(group.image_bytes),
            plain(&group.domain).to_string(),
        ]
    });
    table(&header, rows)
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Platform(format!("{error} ({})", error.code()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_told_in_a_line() {
        let report = DedupReport {
            id: Some("a1".into()),
            processes: 2,
            private_bytes: 18_500_000,
            image_bytes: 2_400_000,
            encode_us: 60_000,
            commit_us: 2_500,
            ..DedupReport::default()
        };
        let line = "a1  process 7: 2 processes, 18.5 MB -> 2.4 MB in 62.50 ms\n";
        assert_eq!(human("process 7", &report), line);
        let dry = DedupReport { id: None, processes: 1, ..report };
        let line = "process 7: 1 process, 18.5 MB -> 2.4 MB (nothing was touched)\n";
        assert_eq!(human("process 7", &dry), line);
    }
}
