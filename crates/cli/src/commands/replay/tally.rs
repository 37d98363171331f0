//! What a replay adds up to.

use std::collections::BTreeMap;

use medes_core::{FunctionName, StartKind};
use medes_simulator::{LatencyHistogram, LatencySummary};
use serde_json::{Value, json};

use super::Fate;
use crate::client::ClientError;
use crate::output::table;

/// What is counted.
pub(super) struct Tally {
    /// Cold, warm and dedup starts by function.
    starts: Vec<[u64; 3]>,
    total: Vec<LatencyHistogram>,
    all: LatencyHistogram,
    startup: [LatencyHistogram; 3],
    late: LatencyHistogram,
    errors: BTreeMap<String, u64>,
}

impl Tally {
    pub(super) fn new(functions: usize) -> Self {
        Self {
            starts: vec![[0; 3]; functions],
            total: (0..functions).map(|_| LatencyHistogram::default()).collect(),
            all: LatencyHistogram::default(),
            startup: Default::default(),
            late: LatencyHistogram::default(),
            errors: BTreeMap::new(),
        }
    }

    pub(super) fn add(&mut self, fate: &Fate) {
        self.late.record(fate.late_us);
        let error = match &fate.answer {
            Ok(answer) => {
                if let Some(start) = answer.start {
                    self.starts[fate.due.function][start as usize] += 1;
                    let waited = answer.timing.queue_us + answer.timing.startup_us;
                    self.startup[start as usize].record(waited);
                }
                self.total[fate.due.function].record(fate.total_us);
                self.all.record(fate.total_us);
                answer.error.clone()
            }
            Err(ClientError::Refused { code, .. }) => Some(code.clone()),
            Err(ClientError::Unreachable { .. }) => Some("Unreachable".to_owned()),
            Err(e) => Some(e.to_string()),
        };
        if let Some(error) = error {
            *self.errors.entry(error).or_default() += 1;
        }
    }

    fn sum(&self) -> [u64; 3] {
        self.starts.iter().fold([0; 3], |a, b| std::array::from_fn(|i| a[i] + b[i]))
    }

    pub(super) fn short(&self) -> String {
        let [cold, warm, dedup] = self.sum();
        format!("cold {cold}, warm {warm}, dedup {dedup}")
    }

    pub(super) fn json(&self, names: &[FunctionName]) -> Value {
        let starts =
            |[cold, warm, dedup]: [u64; 3]| json!({"cold": cold, "warm": warm, "dedup": dedup});
        let by_kind = |kind: StartKind| self.startup[kind as usize].summary();
        json!({
            "starts": starts(self.sum()),
            "total": self.all.summary(),
            "startup": {
                "cold": by_kind(StartKind::Cold),
                "warm": by_kind(StartKind::Warm),
                "dedup": by_kind(StartKind::Dedup),
            },
            "late": self.late.summary(),
            "errors": self.errors,
            "functions": names.iter().enumerate().map(|(i, name)| json!({
                "name": name,
                "starts": starts(self.starts[i]),
                "total": self.total[i].summary(),
            })).collect::<Vec<_>>(),
        })
    }

    pub(super) fn human(&self, names: &[FunctionName]) -> String {
        let row = |name: String, [cold, warm, dedup]: [u64; 3], s: LatencySummary| {
            vec![
                name,
                (cold + warm + dedup).to_string(),
                cold.to_string(),
                dedup.to_string(),
                format!("{:.1}", s.p50_ms),
                format!("{:.1}", s.p99_ms),
                format!("{:.1}", s.p999_ms),
            ]
        };
        let mut rows: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(i, name)| row(name.to_string(), self.starts[i], self.total[i].summary()))
            .collect();
        rows.push(row("all".to_owned(), self.sum(), self.all.summary()));
        let header =
            ["FUNCTION", ">REQUESTS", ">COLD", ">DEDUP", ">p50 ms", ">p99 ms", ">p99.9 ms"];
        let mut text = table(&header, rows);
        let late = self.late.summary();
        text.push_str(&format!(
            "\nsent late by {:.1} ms at the median, {:.1} ms at p99\n",
            late.p50_ms, late.p99_ms
        ));
        for (error, n) in &self.errors {
            text.push_str(&format!("{n} errors: {error}\n"));
        }
        text
    }
}
