//! `medes dedup`, `medes restore` and `medes purge`: an operator's hand on sandboxes' states.

use clap::{ArgGroup, Args};
use medes_core::{FunctionName, SandboxId};
use serde_json::{Value, json};

use super::functions::decode;
use super::{Global, function_name};
use crate::client::{Client, ClientError};
use crate::failure::{Failure, Outcome};
use crate::output::{Format, megabytes, milliseconds, plain};
use crate::wire::{Done, Functions, ReportView, Results, Sandboxes};

/// What is to be done to the sandboxes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Deduplicate idle, warm sandboxes.
    Dedup {
        /// Make each a base snapshot too.
        base: bool,
    },
    /// Bring dedup sandboxes back to warm.
    Restore,
    /// End sandboxes; running ones only if they are named one by one.
    Purge,
}

impl Operation {
    fn verb(self) -> &'static str {
        match self {
            Self::Dedup { .. } => "dedup",
            Self::Restore => "restore",
            Self::Purge => "purge",
        }
    }
}

/// Which sandboxes.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["target", "all"]))]
pub struct Target {
    /// A sandbox, or a function: all its idle sandboxes.
    #[arg(value_name = "SANDBOX|FUNCTION", value_parser = function_name)]
    target: Option<FunctionName>,
    /// All idle sandboxes of all functions.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    format: Format,
}

/// Deduplicate idle, warm sandboxes now.
#[derive(Debug, Args)]
pub struct DedupCommand {
    #[command(flatten)]
    target: Target,
    /// Make the sandbox a base snapshot for its function too; needs a SANDBOX.
    #[arg(long, conflicts_with = "all")]
    base: bool,
}

impl DedupCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the platform does not answer, or one sandbox could not be deduplicated.
    pub fn run(self, global: &Global) -> Outcome {
        self.target.run(global, Operation::Dedup { base: self.base })
    }
}

impl Target {
    /// Does `operation` to the sandboxes that are meant, and says what came of each.
    ///
    /// # Errors
    /// If the platform does not answer, or one of them could not be done.
    pub fn run(self, global: &Global, operation: Operation) -> Outcome {
        let client = global.client()?;
        let results = self.results(&client, operation)?;
        let done: Results = decode(&json!({ "results": results }))?;
        self.format.print(&json!({ "results": results }), || human(&done.results, operation));
        let failed = done.results.iter().filter(|d| d.error_text().is_some()).count();
        if failed == 0 {
            return Ok(());
        }
        let verb = operation.verb();
        Err(Failure::Platform(format!("{verb}: {failed} of {} not done", done.results.len())))
    }

    fn results(&self, client: &Client, operation: Operation) -> Result<Vec<Value>, Failure> {
        let Some(target) = &self.target else {
            let list: Functions = client.get("/v1/functions")?;
            let mut all = Vec::new();
            for function in list.functions {
                all.extend(on_function(client, &function.name, operation)?);
            }
            return Ok(all);
        };
        // A function may have a name that looks like a sandbox's, so ask which one it is.
        if let Ok(id) = target.as_str().parse::<SandboxId>() {
            let list: Sandboxes = client.get("/v1/sandboxes")?;
            if list.sandboxes.iter().any(|s| s.id == target.as_str()) {
                return Ok(vec![on_sandbox(client, id, operation)?]);
            }
        }
        if operation == (Operation::Dedup { base: true }) {
            return Err(Failure::Usage(format!(
                "--base needs one sandbox, and there is no sandbox {target}; `medes ps` lists them"
            )));
        }
        Ok(on_function(client, target, operation)?)
    }
}

fn on_sandbox(client: &Client, id: SandboxId, operation: Operation) -> Result<Value, ClientError> {
    let path = format!("/v1/sandboxes/{id}");
    let result = match operation {
        Operation::Dedup { base: true } => client.post(&format!("{path}/dedup?base=true")),
        Operation::Dedup { base: false } => client.post(&format!("{path}/dedup")),
        Operation::Restore => client.post(&format!("{path}/restore")),
        Operation::Purge => {
            client.delete(&path).map(|()| json!({ "sandbox": id.to_string(), "report": null }))
        }
    };
    match result {
        // What the sandbox's state does not allow is a result; the rest is a failure.
        Err(ClientError::Refused { status: 409, code, message }) => {
            Ok(json!({ "sandbox": id.to_string(), "error": { "code": code, "message": message } }))
        }
        other => other,
    }
}

fn on_function(
    client: &Client,
    name: &FunctionName,
    operation: Operation,
) -> Result<Vec<Value>, ClientError> {
    let answer: Value = client.post(&format!("/v1/functions/{name}/{}", operation.verb()))?;
    Ok(answer["results"].as_array().cloned().unwrap_or_default())
}

fn human(results: &[Done], operation: Operation) -> String {
    if results.is_empty() {
        return format!("no sandbox to {}\n", operation.verb());
    }
    results.iter().map(|d| line(d, operation)).collect()
}

fn line(done: &Done, operation: Operation) -> String {
    let id = &done.sandbox;
    if let Some(error) = done.error_text() {
        return format!("{id}  {}\n", plain(&error));
    }
    let report: ReportView =
        done.report.clone().and_then(|r| serde_json::from_value(r).ok()).unwrap_or_default();
    let time = milliseconds(report.total_us);
    match (operation, report.before, report.after) {
        (Operation::Purge, ..) => format!("{id}  purged\n"),
        (Operation::Restore, ..) => format!("{id}  restored {} pages in {time}\n", report.pages),
        (Operation::Dedup { .. }, Some(before), Some(after)) => {
            let (before, after) = (megabytes(before.total()), megabytes(after.total()));
            let base = match report.base_bytes {
                0 => String::new(),
                n => format!(", base snapshot {}", megabytes(n)),
            };
            format!("{id}  {before} -> {after} in {time}{base}\n")
        }
        (Operation::Dedup { .. }, ..) => format!("{id}  deduplicated in {time}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sandbox_has_its_line() {
        let results: Results = serde_json::from_value(json!({"results": [
            {"sandbox": "0000000000000001", "report": {"pages": 4000, "total_us": 12_500, "base_bytes": 0,
                "before": {"private": 18_000_000, "kernel": 500_000, "store": 0, "metadata": 0},
                "after": {"private": 100_000, "kernel": 500_000, "store": 300_000, "metadata": 100_000}},
             "error": null},
            {"sandbox": "0000000000000002", "report": null, "error": "it is traced by process 7"}
        ]}))
        .unwrap();
        assert_eq!(
            human(&results.results, Operation::Dedup { base: false }),
            "0000000000000001  18.5 MB -> 1.0 MB in 12.50 ms\n\
             0000000000000002  it is traced by process 7\n"
        );
        assert_eq!(human(&[], Operation::Restore), "no sandbox to restore\n");
    }
}
