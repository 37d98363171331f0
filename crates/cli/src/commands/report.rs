//! `medes report`: one page that shows what simulations found.

use std::path::PathBuf;

use clap::Args;
use medes_report::{Heading, page};
use medes_simulator::Run;

use crate::failure::{Failure, Outcome};
use crate::output::print;

/// Make one page of the results in a directory. It needs no network to be looked at.
#[derive(Debug, Args)]
pub struct ReportCommand {
    /// The directory that `medes simulate --out` wrote to.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// The page [default: report.html in the directory].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The page's title.
    #[arg(long, value_name = "TEXT", default_value = "Medes: evaluation")]
    title: String,
    /// A line for the page's foot, such as the command that made the results.
    #[arg(long, value_name = "TEXT")]
    origin: Vec<String>,
}

impl ReportCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If results can't be read or the page not be written.
    pub fn run(self) -> Outcome {
        let problem = |path: &std::path::Path, e: &dyn std::fmt::Display| {
            Failure::Platform(format!("{}: {e}", path.display()))
        };
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(|e| problem(&self.dir, &e))? {
            let path = entry.map_err(|e| problem(&self.dir, &e))?.path();
            if path.extension().is_some_and(|e| e == "json") {
                files.push(path);
            }
        }
        files.sort();
        if files.is_empty() {
            let what = "no results here; `medes simulate TRACE --out DIR` makes some";
            return Err(problem(&self.dir, &what));
        }
        let mut runs: Vec<Run> = Vec::new();
        for path in &files {
            let text = std::fs::read_to_string(path).map_err(|e| problem(path, &e))?;
            runs.push(serde_json::from_str(&text).map_err(|e| problem(path, &e))?);
        }
        let mut origin = self.origin;
        let machine = medes_bench::machine::Machine::this();
        origin.push(format!(
            "Made {} by medes {} on {} processors of {}, Linux {}.",
            jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC"),
            env!("CARGO_PKG_VERSION"),
            machine.cpus,
            machine.cpu,
            machine.kernel
        ));
        let html = page(&Heading { title: self.title, origin }, &runs);
        let out = self.out.unwrap_or_else(|| self.dir.join("report.html"));
        std::fs::write(&out, html).map_err(|e| problem(&out, &e))?;
        print(&format!("{}\n", out.display()));
        Ok(())
    }
}
