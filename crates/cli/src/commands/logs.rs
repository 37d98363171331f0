//! `medes logs`: what a function wrote.

use std::io::{BufRead, BufReader};

use clap::Args;
use medes_core::FunctionName;
use serde_json::json;

use super::{Global, function_name};
use crate::failure::{Failure, Outcome};
use crate::output::{Format, print, print_bytes};

/// Show what a function wrote to its standard output and error.
#[derive(Debug, Args)]
pub struct LogsCommand {
    /// The function.
    #[arg(value_parser = function_name)]
    name: FunctionName,
    /// Go on showing what it writes, until interrupted.
    #[arg(short, long)]
    follow: bool,
    /// How many bytes of what there is already.
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    bytes: u64,
    #[command(flatten)]
    format: Format,
}

impl LogsCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the platform does not answer, or knows no such function.
    pub fn run(self, global: &Global) -> Outcome {
        let follow = if self.follow { "&follow=true" } else { "" };
        let path = format!("/v1/functions/{}/logs?bytes={}{follow}", self.name, self.bytes);
        let mut stream = BufReader::new(global.client()?.stream(&path)?);
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = stream
                .read_until(b'\n', &mut line)
                .map_err(|e| Failure::Platform(format!("the log ended early: {e}")))?;
            if n == 0 {
                return Ok(());
            }
            if self.format.json {
                let text = String::from_utf8_lossy(&line);
                print(&format!("{}\n", json!({ "line": text.trim_end_matches('\n') })));
            } else {
                print_bytes(&line);
            }
        }
    }
}
