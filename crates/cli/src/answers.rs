//! Requests to example functions, and whether their answers are right.

use std::time::Instant;

use anyhow::Result;
use medes_bench::examples::{Case, Example, Source};
use medes_core::FunctionName;
use serde::Serialize;
use serde_json::Value;

use crate::client::{Answer, Client};

/// Sends a request. Gives the answer and the time that the client waited for it, milliseconds.
///
/// # Errors
/// If the platform gives no answer.
pub fn call(client: &Client, function: &FunctionName, case: &Case) -> Result<(Answer, f64)> {
    let start = Instant::now();
    let answer = client.invoke(function, &case.payload)?;
    Ok((answer, start.elapsed().as_secs_f64() * 1e3))
}

/// How many answers were right.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Checked {
    /// Answers that were compared with the right ones.
    pub answers_checked: usize,
    /// Of those, answers that were not right.
    pub answers_wrong: usize,
    /// The first wrong answer, or what else went wrong.
    pub problem: Option<String>,
}

impl Checked {
    /// Compares an answer with the right one.
    pub fn check(&mut self, case: &Case, answer: &Answer) {
        self.answers_checked += 1;
        let got = serde_json::from_slice::<Value>(&answer.payload).ok();
        if answer.error.is_none() && got.as_ref() == Some(&case.expected) {
            return;
        }
        self.answers_wrong += 1;
        let short =
            |bytes: &[u8]| -> String { String::from_utf8_lossy(bytes).chars().take(300).collect() };
        self.problem.get_or_insert_with(|| {
            format!(
                "wrong answer from sandbox {} ({} start) to {}: {} instead of {}",
                answer.sandbox.map_or_else(|| "?".to_owned(), |s| s.to_string()),
                answer.start.map_or_else(|| "?".to_owned(), |s| s.to_string()),
                short(&case.payload),
                short(&answer.payload),
                short(case.expected.to_string().as_bytes()),
            )
        });
    }
}

/// For each function the requests that `events` names and the right answers to them, computed side
/// by side.
///
/// # Errors
/// If a function can't be run outside of the platform.
pub fn all_cases(
    functions: &[Example],
    source: &Source,
    events: impl Fn(&Example) -> Vec<Value> + Sync,
) -> Result<Vec<Vec<Case>>> {
    let events = &events;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            functions.iter().map(|f| scope.spawn(move || f.cases(source, &events(f)))).collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked"))))
            .collect()
    })
}
