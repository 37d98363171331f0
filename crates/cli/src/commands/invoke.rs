//! `medes invoke`: one request to a function.

use std::fmt::Write as _;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;

use clap::Args;
use medes_core::FunctionName;
use serde_json::{Value, json};

use super::{Global, function_name};
use crate::client::Answer;
use crate::failure::{Failure, Outcome};
use crate::output::{Format, milliseconds, print_bytes};

/// Send a request to a function and print its answer.
#[derive(Debug, Args)]
pub struct InvokeCommand {
    /// The function.
    #[arg(value_parser = function_name)]
    name: FunctionName,
    /// The payload; `-` reads it from standard input.
    #[arg(default_value = "{}", allow_hyphen_values = true)]
    payload: String,
    /// Read the payload from a file.
    #[arg(long, value_name = "FILE", conflicts_with = "payload")]
    file: Option<PathBuf>,
    /// Say on standard error how the request found its sandbox and where the time went.
    #[arg(long)]
    timing: bool,
    #[command(flatten)]
    format: Format,
}

impl InvokeCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the function answers with an error, or the platform gives no answer.
    pub fn run(self, global: &Global) -> Outcome {
        let payload = self.read_payload()?;
        let answer = global.client()?.invoke(&self.name, &payload)?;
        if self.timing {
            eprintln!("{}", timing_line(&answer));
        }
        if self.format.json {
            self.format.print(&document(&answer), String::new);
        } else {
            print_bytes(&answer.payload);
            if std::io::stdout().is_terminal() && !answer.payload.ends_with(b"\n") {
                print_bytes(b"\n");
            }
        }
        match &answer.error {
            None => Ok(()),
            Some(kind) => {
                eprintln!("medes: {} answered with an error: {kind}", self.name);
                Err(Failure::Function)
            }
        }
    }

    fn read_payload(&self) -> Result<Vec<u8>, Failure> {
        if let Some(file) = &self.file {
            return std::fs::read(file)
                .map_err(|e| Failure::Usage(format!("{}: {e}", file.display())));
        }
        if self.payload != "-" {
            return Ok(self.payload.clone().into_bytes());
        }
        let mut payload = Vec::new();
        std::io::stdin()
            .read_to_end(&mut payload)
            .map_err(|e| Failure::Usage(format!("standard input: {e}")))?;
        Ok(payload)
    }
}

fn timing_line(answer: &Answer) -> String {
    let t = answer.timing;
    let start = answer.start.map_or_else(|| "?".to_owned(), |s| s.to_string());
    let mut line = format!(
        "start {start}  queue {}  startup {}  execution {}  total {}",
        milliseconds(t.queue_us),
        milliseconds(t.startup_us),
        milliseconds(t.execution_us),
        milliseconds(t.total_us)
    );
    if let Some(m) = answer.memory {
        let _ = write!(
            line,
            "\npages put back before {} in {}, on demand {} for {} faults; thaw {}",
            m.pages_before,
            milliseconds(m.prefetch_us),
            m.pages_on_demand,
            m.faults,
            milliseconds(m.thaw_us)
        );
    }
    line
}

fn document(answer: &Answer) -> Value {
    let payload: Value = serde_json::from_slice(&answer.payload)
        .unwrap_or_else(|_| String::from_utf8_lossy(&answer.payload).into_owned().into());
    json!({
        "payload": payload,
        "error": answer.error,
        "request": answer.request.map(|r| r.to_string()),
        "sandbox": answer.sandbox.map(|s| s.to_string()),
        "start": answer.start,
        "timing": answer.timing,
        "memory": answer.memory,
    })
}
