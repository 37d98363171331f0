//! The `medes` command: the platform and everything an operator does with it.

#![forbid(unsafe_code)]

mod answers;
mod bench;
mod client;
mod commands;
mod config;
mod demo;
mod doctor;
mod examples;
mod failure;
mod latency;
mod output;
mod platform;
mod progress;
mod runtime_install;
mod serve;
mod units;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use commands::Global;
use medes_keeper::KeeperConfig;

use commands::state::{DedupCommand, Operation, Target};
use config::Log;
use failure::{EXIT_CODES, Outcome};

/// A serverless platform that deduplicates idle sandboxes in place.
#[derive(Debug, Parser)]
#[command(name = "medes", version, after_help = EXIT_CODES, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(ServeCommand),
    Config(commands::config::ConfigCommand),
    Deploy(commands::deploy::DeployCommand),
    Invoke(commands::invoke::InvokeCommand),
    #[command(visible_alias = "ls")]
    Functions(commands::functions::FunctionsCommand),
    Ps(commands::ps::PsCommand),
    Logs(commands::logs::LogsCommand),
    Rm(commands::functions::RemoveCommand),
    Dedup(DedupCommand),
    /// Bring dedup sandboxes back to warm now.
    Restore(Target),
    /// End sandboxes now; a running one only if it is named.
    Purge(Target),
    Policy(commands::policy::PolicyCommand),
    Attach(commands::attach::AttachCommand),
    Runtime(commands::runtime::RuntimeCommand),
    Doctor(doctor::DoctorCommand),
    Demo(demo::DemoCommand),
    Bench(commands::bench::BenchCommand),
    Analyze(commands::analyze::AnalyzeCommand),
    Trace(commands::trace::TraceCommand),
    Simulate(Box<commands::simulate::SimulateCommand>),
    Replay(Box<commands::replay::ReplayCommand>),
    Report(commands::report::ReportCommand),
    Version(commands::version::VersionCommand),
    #[command(name = serve::KEEPER_COMMAND, hide = true)]
    Keeper(KeeperCommand),
    #[command(name = commands::attach::HOLDER_COMMAND, hide = true)]
    AttachHolder(commands::attach::HolderCommand),
}

/// Run the platform: controller, node and HTTP API in one process.
///
/// SIGTERM and Ctrl-C end everything. SIGUSR2 ends the daemon only: its sandboxes go on, and the
/// next `medes serve` with the same configuration takes them over, as it does after a crash. That
/// is how a platform is upgraded.
#[derive(Debug, Args)]
struct ServeCommand {
    /// Let sandboxes go on at SIGTERM and Ctrl-C too ([lifecycle] keep_sandboxes).
    #[arg(long)]
    keep_sandboxes: bool,
}

/// Hold sandboxes for a daemon, which starts this by itself.
#[derive(Debug, Args)]
struct KeeperCommand {
    /// Where to make the socket.
    #[arg(long)]
    socket: PathBuf,
    /// The name of the instance's cgroups.
    #[arg(long)]
    cgroup: String,
    /// What to log.
    #[arg(long, default_value = "info")]
    log_level: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command, &cli.global) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(command: Command, global: &Global) -> Outcome {
    match command {
        Command::Serve(c) => serve(&c, global),
        Command::Config(c) => c.run(global),
        Command::Deploy(c) => c.run(global),
        Command::Invoke(c) => c.run(global),
        Command::Functions(c) => c.run(global),
        Command::Ps(c) => c.run(global),
        Command::Logs(c) => c.run(global),
        Command::Rm(c) => c.run(global),
        Command::Dedup(c) => c.run(global),
        Command::Restore(t) => t.run(global, Operation::Restore),
        Command::Purge(t) => t.run(global, Operation::Purge),
        Command::Policy(c) => c.run(global),
        Command::Attach(c) => c.run(),
        Command::AttachHolder(c) => c.run(),
        Command::Runtime(c) => c.run(global),
        Command::Doctor(c) => c.run(global),
        Command::Demo(c) => c.run(),
        Command::Bench(c) => c.run(),
        Command::Analyze(c) => c.run(),
        Command::Trace(c) => c.run(),
        Command::Simulate(c) => c.run(),
        Command::Replay(c) => c.run(global),
        Command::Report(c) => c.run(),
        Command::Version(c) => c.run(global),
        Command::Keeper(c) => {
            let config = KeeperConfig { socket: c.socket, cgroup: c.cgroup };
            let log = Log { level: c.log_level, ..Log::default() };
            Ok(serve::run_keeper(&config, &log)?)
        }
    }
}

fn serve(command: &ServeCommand, global: &Global) -> Outcome {
    let (mut config, _) = global.load_config()?;
    config.lifecycle.keep_sandboxes |= command.keep_sandboxes;
    match global.verbose {
        0 => {}
        1 => config.log.level = "debug".to_owned(),
        _ => config.log.level = "trace".to_owned(),
    }
    Ok(serve::run(config)?)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
