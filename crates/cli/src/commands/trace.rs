//! `medes trace`: make arrival traces, and look at some.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use medes_trace::{Making, Trace, make};
use serde_json::json;

use crate::failure::{Failure, Outcome};
use crate::output::{Format, megabytes, print, span, table};
use crate::units::Period;

/// Make arrival traces, and look at some.
#[derive(Debug, Args)]
pub struct TraceCommand {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Make(MakeCommand),
    Info(InfoCommand),
}

/// Make a trace in the Azure Functions 2019 format, with the distributions published for it.
#[derive(Debug, Args)]
struct MakeCommand {
    /// The directory to write the three files to.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// How many functions.
    #[arg(long, value_name = "N", default_value_t = 500,
          value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    functions: u32,
    /// How long the trace is, in whole minutes.
    #[arg(long, value_name = "TIME", default_value = "8h")]
    length: Period,
    /// About how many requests.
    #[arg(long, value_name = "N", default_value_t = 3_000_000)]
    requests: u64,
    /// Everything random comes from this.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Say what is in a trace: functions, requests, what had to be repaired.
#[derive(Debug, Args)]
struct InfoCommand {
    /// A file, or a directory with the files of the Azure 2019 format.
    #[arg(value_name = "TRACE")]
    trace: PathBuf,
    /// How many functions to list, the most called first.
    #[arg(long, value_name = "N", default_value_t = 10)]
    top: usize,
    #[command(flatten)]
    format: Format,
}

impl TraceCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If a file can't be read or written.
    pub fn run(self) -> Outcome {
        match self.what {
            What::Make(c) => c.run(),
            What::Info(c) => c.run(),
        }
    }
}

impl MakeCommand {
    fn run(self) -> Outcome {
        let minutes = u32::try_from(self.length.millis().div_ceil(60_000)).unwrap_or(u32::MAX);
        if !(1..=1_000_000).contains(&minutes) {
            return Err(Failure::Usage("--length must be from 1m to about two years".to_owned()));
        }
        let Self { functions, requests, seed, .. } = self;
        let files = make(&self.dir, Making { seed, functions, minutes, calls: requests })
            .map_err(|e| Failure::Platform(e.to_string()))?;
        print(&format!("{} requests in {}\n", files.calls, self.dir.display()));
        Ok(())
    }
}

impl InfoCommand {
    fn run(self) -> Outcome {
        let trace = Trace::open(&self.trace).map_err(|e| Failure::Platform(e.to_string()))?;
        let mut functions: Vec<_> = trace.functions.iter().collect();
        functions.sort_by(|a, b| b.arrivals.cmp(&a.arrivals).then_with(|| a.name.cmp(&b.name)));
        let called = functions.iter().filter(|f| f.arrivals > 0).count();
        functions.truncate(self.top);
        let length = std::time::Duration::from_millis(trace.length_ms);
        let value = json!({
            "path": self.trace,
            "format": trace.format,
            "length_ms": trace.length_ms,
            "functions": trace.functions.len(),
            "functions_called": called,
            "requests": trace.total(),
            "repairs": trace.repairs,
            "top": functions.iter().map(|f| json!({
                "name": f.name,
                "trigger": f.trigger,
                "requests": f.arrivals,
                "duration_ms": f.duration_ms.as_ref().map(|d| d.median()),
                "memory": f.memory,
            })).collect::<Vec<_>>(),
        });
        self.format.print(&value, || {
            let mut text = format!(
                "{} requests to {called} of {} functions in {}\n",
                trace.total(),
                trace.functions.len(),
                span(length)
            );
            for (n, what) in trace.repairs.list() {
                text.push_str(&format!("repaired: {n} {what}\n"));
            }
            text.push('\n');
            let rows = functions.iter().map(|f| {
                vec![
                    f.name.chars().take(40).collect(),
                    f.arrivals.to_string(),
                    f.duration_ms.as_ref().map_or("-".into(), |d| format!("{:.0}", d.median())),
                    f.memory.map_or("-".into(), megabytes),
                ]
            });
            text.push_str(&table(&["FUNCTION", ">REQUESTS", ">MEDIAN ms", ">MEMORY"], rows));
            text
        });
        Ok(())
    }
}
