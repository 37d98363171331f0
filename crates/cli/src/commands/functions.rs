//! `medes functions` and `medes rm`.

use clap::Args;
use medes_core::FunctionName;
use serde_json::{Value, json};

use super::{Global, function_name};
use crate::failure::{Failure, Outcome};
use crate::output::{Format, span, table};
use crate::wire::{FunctionView, Functions, ms};

/// List the functions, or show one of them in full.
#[derive(Debug, Args)]
pub struct FunctionsCommand {
    /// Show this function, as JSON.
    #[arg(value_parser = function_name)]
    name: Option<FunctionName>,
    #[command(flatten)]
    format: Format,
}

impl FunctionsCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the platform does not answer, or knows no such function.
    pub fn run(self, global: &Global) -> Outcome {
        let client = global.client()?;
        if let Some(name) = self.name {
            let value: Value = client.get(&format!("/v1/functions/{name}"))?;
            Format { json: true }.print(&value, String::new);
            return Ok(());
        }
        let value: Value = client.get("/v1/functions")?;
        let list: Functions = decode(&value)?;
        self.format.print(&value, || human(&list.functions));
        Ok(())
    }
}

fn human(functions: &[FunctionView]) -> String {
    if functions.is_empty() {
        return "no functions; `medes deploy --help` shows how to create one\n".to_owned();
    }
    table(
        &[
            "FUNCTION",
            "RUNTIME",
            "HANDLER",
            ">MEMORY",
            ">TIMEOUT",
            "LAYOUT",
            ">SANDBOXES",
            ">COLD",
            ">WARM",
            ">DEDUP",
            ">ERRORS",
        ],
        functions.iter().map(|f| {
            vec![
                f.name.to_string(),
                f.runtime.clone(),
                f.handler.clone(),
                format!("{} MiB", f.memory_mib),
                span(ms(f.timeout_ms)),
                format!("{:?}", f.layout).to_lowercase(),
                f.sandboxes.to_string(),
                f.counts.cold.to_string(),
                f.counts.warm.to_string(),
                f.counts.dedup.to_string(),
                f.counts.errors.to_string(),
            ]
        }),
    )
}

/// Delete functions, with their sandboxes.
#[derive(Debug, Args)]
pub struct RemoveCommand {
    /// The functions.
    #[arg(required = true, value_parser = function_name)]
    names: Vec<FunctionName>,
    #[command(flatten)]
    format: Format,
}

impl RemoveCommand {
    /// Runs the command. Every name is tried, even after a failure.
    ///
    /// # Errors
    /// If one of them could not be deleted.
    pub fn run(self, global: &Global) -> Outcome {
        let client = global.client()?;
        let mut removed = Vec::new();
        let mut failed = Vec::new();
        for name in &self.names {
            match client.delete(&format!("/v1/functions/{name}")) {
                Ok(()) => removed.push(name.to_string()),
                Err(e) => failed.push(e.to_string()),
            }
        }
        self.format.print(&json!({ "removed": removed }), || {
            removed.iter().map(|n| format!("removed {n}\n")).collect()
        });
        if failed.is_empty() { Ok(()) } else { Err(Failure::Platform(failed.join("\nmedes: "))) }
    }
}

/// Reads a typed form out of an answer that may also be shown as it came.
pub fn decode<T: serde::de::DeserializeOwned>(value: &Value) -> Result<T, Failure> {
    T::deserialize(value).map_err(|e| {
        Failure::Platform(format!("the platform's answer is not understood: {e}; another version?"))
    })
}
