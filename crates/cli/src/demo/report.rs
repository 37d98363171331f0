//! What the demo found out: the table and the JSON document.

use medes_bench::machine::Circumstances;
use medes_core::{FunctionName, StartKind};
use serde::Serialize;

use crate::answers::Checked;
use crate::latency::Percentiles;
use crate::output::{percent, table};

/// How many requests found their sandbox in which state.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Starts {
    /// None was free.
    pub cold: usize,
    /// All its memory was there.
    pub warm: usize,
    /// It was restored.
    pub dedup: usize,
}

impl Starts {
    /// Counts one.
    pub fn add(&mut self, kind: StartKind) {
        match kind {
            StartKind::Cold => self.cold += 1,
            StartKind::Warm => self.warm += 1,
            StartKind::Dedup => self.dedup += 1,
        }
    }
}

/// What was measured of one function.
#[derive(Clone, Debug, Serialize)]
pub struct FunctionReport {
    /// Its name.
    pub name: FunctionName,
    /// Whole requests that started a sandbox, as the client sees them, one at a time.
    pub cold_ms: Option<Percentiles>,
    /// Whole requests to a warm sandbox, likewise.
    pub warm_ms: Option<Percentiles>,
    /// Whole requests to a dedup sandbox, likewise.
    pub dedup_ms: Option<Percentiles>,
    /// Memory of a warm sandbox, mean.
    pub warm_bytes: u64,
    /// Memory that remains for a dedup sandbox, mean; base snapshots apart.
    pub dedup_bytes: u64,
    /// Base snapshots that the function added to the page store.
    pub base_bytes: u64,
    /// The share of a warm sandbox's memory that dedup saves.
    pub saved: f64,
    /// The same when the base snapshots are shared out among the function's sandboxes.
    pub saved_with_base: f64,
    /// The function's sandboxes.
    pub sandboxes: usize,
    /// All requests by the state in which they found their sandbox, concurrent ones too.
    pub starts: Starts,
    /// Whether the answers were right.
    #[serde(flatten)]
    pub checked: Checked,
}

impl FunctionReport {
    /// A report with nothing in it yet.
    pub fn new(name: FunctionName, sandboxes: usize) -> Self {
        Self {
            name,
            cold_ms: None,
            warm_ms: None,
            dedup_ms: None,
            warm_bytes: 0,
            dedup_bytes: 0,
            base_bytes: 0,
            saved: 0.0,
            saved_with_base: 0.0,
            sandboxes,
            starts: Starts::default(),
            checked: Checked::default(),
        }
    }

    /// Sets the memory figures.
    pub fn set_memory(&mut self, warm: u64, dedup: u64, base: u64) {
        self.warm_bytes = warm;
        self.dedup_bytes = dedup;
        self.base_bytes = base;
        if warm == 0 {
            return;
        }
        let share = base as f64 / self.sandboxes.max(1) as f64;
        self.saved = 1.0 - dedup as f64 / warm as f64;
        self.saved_with_base = 1.0 - (dedup as f64 + share) / warm as f64;
    }

    /// The kinds of start that were never measured.
    pub fn missing(&self) -> Vec<StartKind> {
        [
            (StartKind::Cold, self.cold_ms),
            (StartKind::Warm, self.warm_ms),
            (StartKind::Dedup, self.dedup_ms),
        ]
        .into_iter()
        .filter_map(|(kind, p)| p.is_none().then_some(kind))
        .collect()
    }
}

/// The whole document.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was measured of each function.
    pub functions: Vec<FunctionReport>,
    /// Sandboxes per function.
    pub sandboxes: usize,
    /// Times that they were deduplicated and called again.
    pub cycles: usize,
    /// Where and when, and with which version.
    #[serde(flatten)]
    pub circumstances: Circumstances,
}

impl Report {
    /// Wrong answers in all.
    pub fn wrong(&self) -> usize {
        self.functions.iter().map(|f| f.checked.answers_wrong).sum()
    }

    /// What went wrong, one line each.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for f in &self.functions {
            if let Some(problem) = &f.checked.problem {
                problems.push(format!("{}: {problem}", f.name));
            } else {
                problems.extend(
                    f.missing().iter().map(|kind| format!("{}: no {kind} start at all", f.name)),
                );
            }
        }
        problems
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let ms = |p: Option<Percentiles>| p.map_or_else(|| "-".into(), |p| format!("{:.1}", p.p50));
        let mb = |n: u64| format!("{:.1}", n as f64 / 1e6);
        let mut out = table(
            &[
                "FUNCTION",
                ">COLD ms",
                ">WARM ms",
                ">DEDUP ms",
                ">WARM MB",
                ">DEDUP MB",
                ">SAVED",
                ">BASE MB",
                ">SAVED+BASE",
                ">ANSWERS",
                ">WRONG",
            ],
            self.functions.iter().map(|f| {
                vec![
                    f.name.to_string(),
                    ms(f.cold_ms),
                    ms(f.warm_ms),
                    ms(f.dedup_ms),
                    mb(f.warm_bytes),
                    mb(f.dedup_bytes),
                    percent(f.saved),
                    mb(f.base_bytes),
                    percent(f.saved_with_base),
                    f.checked.answers_checked.to_string(),
                    f.checked.answers_wrong.to_string(),
                ]
            }),
        );
        out.push_str(&format!(
            "\nms: median of whole requests over HTTP, by the state in which they found their \
             sandbox.\nMB: memory charged to one sandbox (mean of {}). BASE: the function's base \
             snapshots, which all its\nsandboxes share; SAVED+BASE shares them out among {}.\n",
            self.sandboxes, self.sandboxes
        ));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn savings_count_the_base_once_for_all_sandboxes() {
        let mut f = FunctionReport::new("a".parse().unwrap(), 4);
        f.set_memory(20_000_000, 1_000_000, 16_000_000);
        assert!((f.saved - 0.95).abs() < 1e-9);
        assert!((f.saved_with_base - 0.75).abs() < 1e-9);
        f.set_memory(0, 0, 0);
        assert!(f.saved.is_finite());
    }

    #[test]
    fn a_kind_that_never_happened_is_a_problem() {
        let mut f = FunctionReport::new("a".parse().unwrap(), 1);
        f.cold_ms = Percentiles::of(&[1.0]);
        f.warm_ms = Percentiles::of(&[1.0]);
        let report = Report {
            functions: vec![f],
            sandboxes: 1,
            cycles: 1,
            circumstances: Circumstances::now(),
        };
        assert_eq!(report.problems(), ["a: no dedup start at all"]);
    }
}
