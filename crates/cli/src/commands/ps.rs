//! `medes ps`: every sandbox, its state and its memory.

use std::time::Duration;

use clap::Args;
use medes_core::FunctionName;
use serde_json::{Value, json};

use super::functions::decode;
use super::{Global, function_name};
use crate::client::Client;
use crate::failure::{Failure, Outcome};
use crate::output::{Format, is_terminal, megabytes, percent, plain, print, span, table};
use crate::wire::{SandboxView, Sandboxes, ms};

/// List the sandboxes: state, age, memory, and what dedup saves.
#[derive(Debug, Args)]
pub struct PsCommand {
    /// Only this function's.
    #[arg(long, value_name = "NAME", value_parser = function_name)]
    function: Option<FunctionName>,
    /// Show them again every second until interrupted.
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    format: Format,
}

impl PsCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the platform does not answer.
    pub fn run(self, global: &Global) -> Outcome {
        let client = global.client()?;
        loop {
            let (value, sandboxes) = self.list(&client)?;
            if self.watch && !self.format.json && is_terminal() {
                // Home, then clear to the end: less flicker than clearing first.
                print(&format!("\x1b[H{}\x1b[J", human(&sandboxes).replace('\n', "\x1b[K\n")));
            } else if self.watch && self.format.json {
                print(&format!("{value}\n"));
            } else {
                self.format.print(&value, || human(&sandboxes));
            }
            if !self.watch {
                return Ok(());
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    fn list(&self, client: &Client) -> Result<(Value, Vec<SandboxView>), Failure> {
        let mut value: Value = client.get("/v1/sandboxes")?;
        if let (Some(name), Some(list)) = (&self.function, value["sandboxes"].as_array_mut()) {
            list.retain(|s| s["function"] == json!(name));
        }
        let list: Sandboxes = decode(&value)?;
        Ok((value, list.sandboxes))
    }
}

fn human(sandboxes: &[SandboxView]) -> String {
    let mut rows: Vec<_> = sandboxes.iter().collect();
    rows.sort_by(|a, b| (&a.function, b.age_ms, &a.id).cmp(&(&b.function, a.age_ms, &b.id)));
    let body = table(
        &[
            "FUNCTION",
            "SANDBOX",
            "STATE",
            ">AGE",
            ">IDLE",
            ">REQUESTS",
            ">MEMORY",
            ">SAVED",
            "STAYS WARM BECAUSE",
        ],
        rows.iter().map(|s| {
            vec![
                s.function.to_string(),
                s.id.clone(),
                s.state.to_string(),
                span(ms(s.age_ms)),
                s.idle_ms.map_or_else(|| "-".to_owned(), |t| span(ms(t))),
                s.requests.to_string(),
                megabytes(s.memory_total),
                s.saved.map_or_else(|| "-".to_owned(), percent),
                s.stays_warm.as_deref().map(plain).unwrap_or_default(),
            ]
        }),
    );
    let total = sandboxes.iter().map(|s| s.memory_total).sum();
    format!("{body}{} sandboxes, {}\n", sandboxes.len(), megabytes(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandboxes_are_shown_by_function_and_oldest_first() {
        let list: Sandboxes = serde_json::from_value(json!({"sandboxes": [
            {"id": "0000000000000003", "function": "b", "state": "warm", "age_ms": 5000, "idle_ms": 1000,
             "requests": 2, "memory_total": 20_000_000, "saved": null, "stays_warm": "it is traced"},
            {"id": "0000000000000001", "function": "a", "state": "running", "age_ms": 1000, "idle_ms": null,
             "requests": 1, "memory_total": 10_000_000, "saved": null, "stays_warm": null},
            {"id": "0000000000000002", "function": "a", "state": "dedup", "age_ms": 90_000, "idle_ms": 80_000,
             "requests": 7, "memory_total": 500_000, "saved": 0.95, "stays_warm": null}
        ]}))
        .unwrap();
        let text = human(&list.sandboxes);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("FUNCTION  SANDBOX           STATE"), "{text}");
        assert!(lines[1].contains("0000000000000002") && lines[1].contains("95 %"), "{text}");
        assert!(lines[2].contains("running"), "{text}");
        assert!(lines[3].ends_with("it is traced"), "{text}");
        assert_eq!(lines[4], "3 sandboxes, 30.5 MB");
    }
}
