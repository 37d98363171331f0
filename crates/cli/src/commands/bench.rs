//! `medes bench`: what Medes costs and saves, measured on real functions.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use medes_bench::engine::{self, EngineReport};
use medes_bench::functions::{Function, choose};
use medes_bench::savings::{self, SavingsReport};
use medes_bench::testbed::{KeeperProgram, Testbed};
use medes_core::Layout;
use serde::Serialize;

use crate::bench::density::DensityCommand;
use crate::bench::lifecycle::LifecycleCommand;
use crate::bench::peers::PeersCommand;
use crate::examples::SourceArgs;
use crate::failure::{Failure, Outcome};
use crate::output::{print, table};
use crate::serve::KEEPER_COMMAND;

/// Measure what Medes costs and saves, on real functions. Needs root.
#[derive(Debug, Args)]
pub struct BenchCommand {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Engine(EngineCommand),
    Savings(SavingsCommand),
    Lifecycle(LifecycleCommand),
    Density(DensityCommand),
    Peers(PeersCommand),
}

/// How fast the engine's parts are on one core, over the memory of real functions.
#[derive(Debug, Args)]
struct EngineCommand {
    #[command(flatten)]
    run: Run,
    /// How often each piece of work is timed; the median counts.
    #[arg(long, value_name = "N", default_value_t = 9,
          value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Entries of the fingerprint registry that is timed.
    #[arg(long, value_name = "N", default_value_t = 10_000_000,
          value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    entries: u64,
    /// The sandboxes' address-space layout.
    #[arg(long, value_enum, default_value = "function")]
    layout: LayoutName,
}

/// What deduplication saves: every function, layout and choice of base pages.
#[derive(Debug, Args)]
struct SavingsCommand {
    #[command(flatten)]
    run: Run,
    /// Leave out other fingerprints (number of chunks, chunk size).
    #[arg(long)]
    quick: bool,
}

/// What every measurement on sandboxes needs.
#[derive(Debug, Args)]
pub struct Run {
    /// Only these example functions [default: all].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub functions: Vec<String>,
    /// Write the results as JSON too; `-` for standard output, instead of the table.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    source: SourceArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LayoutName {
    Function,
    Shared,
    Random,
}

impl From<LayoutName> for Layout {
    fn from(name: LayoutName) -> Self {
        match name {
            LayoutName::Function => Self::Function,
            LayoutName::Shared => Self::Shared,
            LayoutName::Random => Self::Random,
        }
    }
}

impl BenchCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If a sandbox does not do what it should, or the host can't do it.
    pub fn run(self) -> Outcome {
        match self.what {
            What::Engine(c) => {
                let (testbed, functions) = c.run.open()?;
                let plan = engine::Plan {
                    rounds: c.rounds.into(),
                    entries: c.entries,
                    layout: c.layout.into(),
                };
                let report = engine::measure(&testbed, &functions, plan, &say)?;
                c.run.publish(&report, || engine_table(&report))?;
            }
            What::Savings(c) => {
                let (testbed, functions) = c.run.open()?;
                let report = savings::measure(&testbed, &functions, !c.quick, &say)?;
                c.run.publish(&report, || savings_table(&report))?;
            }
            What::Lifecycle(c) => return c.run(),
            What::Density(c) => return c.run(),
            What::Peers(c) => return c.run(),
        }
        Ok(())
    }
}

/// Says on standard error what is going on.
pub fn say(what: &str) {
    eprintln!("medes: {what}");
}

impl Run {
    /// Starts a private node.
    ///
    /// # Errors
    /// A platform failure if this process is not root, or something that it takes is missing.
    pub fn open(&self) -> Result<(Testbed, Vec<Function>), Failure> {
        if !nix::unistd::geteuid().is_root() {
            let message = "this runs sandboxes and reads their memory, which needs root; run it \
                           with sudo";
            return Err(Failure::Platform(message.into()));
        }
        Ok(self.testbed()?)
    }

    fn testbed(&self) -> Result<(Testbed, Vec<Function>)> {
        let source = self.source.find(say)?;
        let functions = choose(&source, &self.functions)?;
        let keeper = KeeperProgram {
            program: std::env::current_exe().context("finding this program")?,
            command: KEEPER_COMMAND.to_owned(),
        };
        Ok((Testbed::open(&source, &keeper)?, functions))
    }

    /// Writes a report as JSON and prints what `human` makes of it, as asked for.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn publish(&self, report: &impl Serialize, human: impl FnOnce() -> String) -> Result<()> {
        let text = serde_json::to_string_pretty(report)? + "\n";
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

fn megabytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / 1e6)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn engine_table(report: &EngineReport) -> String {
    let row = |name: &str, s: &engine::Speeds| {
        let mut row = vec![name.to_owned()];
        let speeds = [
            s.memcpy_gbps,
            s.fingerprint_gbps,
            s.encode_gbps,
            s.encode_elsewhere_gbps,
            s.decode_gbps,
            s.decode_patches_gbps,
        ];
        row.extend(speeds.map(|gbps| format!("{gbps:.2}")));
        row
    };
    let header = [
        "GB/s, ONE CORE",
        ">MEMCPY",
        ">FINGERPRINT",
        ">ENCODE",
        ">ELSEWHERE",
        ">DECODE",
        ">PATCHES",
    ];
    let rows = report.functions.iter().map(|f| row(&f.name, &f.speeds));
    let mut out = table(&header, rows.chain([row("all", &report.speeds)]));
    let (r, d) = (&report.registry, &report.dedup);
    out.push_str(&format!(
        "\nof memcpy: fingerprint {}, encode {}, decode {}; memcpy in the cache {:.1} GB/s\n\
         registry: {} entries of {:.1} bytes, {:.1} million chunk lookups a second ({:.1} of \
         chunks not there)\n\
         a whole dedup of {} ({} MB): {:.0} ms, of which {:.0} ms encode and {:.1} ms pause \
         ({:.0} ms of processor time); {} saved\n\
         taking a sandbox back: {:.2} ms at most of {} before pages are dropped, {:.1} ms of {} \
         later; a restore until it runs: {:.1} ms\n",
        percent(report.fingerprint_to_memcpy),
        percent(report.encode_to_memcpy),
        percent(report.decode_to_memcpy),
        report.speeds.memcpy_cached_gbps,
        r.registry_entries,
        r.registry_bytes_per_entry,
        r.lookups_per_s / 1e6,
        r.lookups_missing_per_s / 1e6,
        d.function,
        megabytes(d.warm_bytes),
        d.total_ms,
        d.encode_ms,
        d.pause_ms,
        d.cpu_ms,
        percent(d.saved),
        d.cancel_ms,
        d.cancelled,
        d.late_ms,
        d.late,
        d.restore_ms,
    ));
    out
}

fn savings_table(report: &SavingsReport) -> String {
    let header = [
        "FUNCTION",
        ">WARM MB",
        ">DEDUP MB",
        ">SAVED",
        ">BASE MB",
        ">+BASE/5",
        ">+BASE/40",
        ">SHARED",
        ">OTHERS",
        ">ANY",
        ">FOREIGN",
        ">RANDOM",
    ];
    let mut out = table(
        &header,
        report.functions.iter().map(|f| {
            let (own, shared) = (&f.layouts["function"], &f.layouts["shared"]);
            vec![
                f.name.clone(),
                megabytes(f.warm_bytes),
                megabytes(f.dedup_bytes),
                percent(f.saved),
                megabytes(f.base_bytes),
                percent(own.saved_with_base[&5]),
                percent(own.saved_with_base[&40]),
                percent(shared.saved),
                percent(shared.other_functions.saved),
                percent(shared.any_function.saved),
                percent(shared.any_function.foreign_pages),
                percent(f.layouts["random"].saved),
            ]
        }),
    );
    out.push_str(&format!(
        "\nmean {}, worst {}; other functions' bases only, layout shared {}; layout random {}\n\
         SHARED, OTHERS, ANY: layout shared with bases of the same function, of others, of all; \
         FOREIGN: pages whose base is another function's.\n",
        percent(report.saved_mean),
        percent(report.saved_worst),
        percent(report.saved_other_shared_mean),
        percent(report.saved_random_mean),
    ));
    if !report.sensitivity.is_empty() {
        let header = ["LAYOUT", "BASES", ">CHUNKS", ">BYTES", ">SAVED", ">REGISTRY ENTRIES"];
        let rows = report.sensitivity.iter().map(|s| {
            vec![
                s.layout.to_owned(),
                s.bases.to_owned(),
                s.cardinality.to_string(),
                s.chunk_size.to_string(),
                percent(s.saved_mean),
                s.registry_entries.to_string(),
            ]
        });
        out.push('\n');
        out.push_str(&table(&header, rows));
    }
    out
}
