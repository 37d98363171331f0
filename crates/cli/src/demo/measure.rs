//! One function's way through all states, with every answer checked.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use medes_bench::examples::{Case, Example};
use medes_core::{SandboxState, StartKind};
use serde_json::Value;

use super::report::FunctionReport;
use crate::answers::call;
use crate::client::{Answer, Client};
use crate::latency::Percentiles;
use crate::progress::Line;
use crate::wire::{Info, SandboxView, Sandboxes};

/// Cold starts that are measured, each after all sandboxes were purged.
const COLD_STARTS: usize = 5;
/// Warm requests in a row, short enough that the sandboxes not called do not reach their idle
/// period.
const WARM_RUN: usize = 4;
/// How long the sandboxes may take into the dedup state after the idle period.
const DEDUP_LIMIT: Duration = Duration::from_secs(30);

/// How much is to be measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Sandboxes of the function.
    pub sandboxes: usize,
    /// Times that they are deduplicated and called again.
    pub cycles: usize,
    /// The platform's idle period.
    pub idle: Duration,
}

impl Plan {
    fn warm_runs(self) -> usize {
        self.cycles.div_ceil(WARM_RUN).max(3)
    }

    /// Requests that are sent alone.
    pub fn singles(self) -> usize {
        COLD_STARTS + self.warm_runs() * WARM_RUN + self.cycles
    }

    /// Requests that are sent together with others.
    pub fn concurrent(self) -> usize {
        (1 + self.warm_runs() + self.cycles) * self.sandboxes
    }
}

/// The requests for a function and where in them the measurement is.
pub struct Cases {
    /// Requests of one size, sent alone and measured.
    pub plain: Vec<Case>,
    /// Requests of several sizes, sent together with others and checked only.
    pub mixed: Vec<Case>,
}

/// A measurement under way.
pub struct Measurement<'a> {
    client: &'a Client,
    example: &'a Example,
    plan: Plan,
    line: &'a mut Line,
    plain: std::iter::Cycle<std::slice::Iter<'a, Case>>,
    mixed: std::iter::Cycle<std::slice::Iter<'a, Case>>,
    report: FunctionReport,
    latencies: [Vec<f64>; 3],
    warm_bytes: Vec<u64>,
    dedup_bytes: Vec<u64>,
    interrupted: &'a dyn Fn() -> bool,
}

impl<'a> Measurement<'a> {
    /// A measurement of a deployed function.
    pub fn new(
        client: &'a Client,
        example: &'a Example,
        cases: &'a Cases,
        plan: Plan,
        line: &'a mut Line,
        interrupted: &'a dyn Fn() -> bool,
    ) -> Self {
        Self {
            client,
            example,
            plan,
            line,
            plain: cases.plain.iter().cycle(),
            mixed: cases.mixed.iter().cycle(),
            report: FunctionReport::new(example.name.clone(), plan.sandboxes),
            latencies: Default::default(),
            warm_bytes: Vec::new(),
            dedup_bytes: Vec::new(),
            interrupted,
        }
    }

    /// Takes the function through all states. What could not be measured is in the report's
    /// `problem`.
    pub fn run(mut self) -> FunctionReport {
        let base_before = self.base_bytes().unwrap_or(0);
        if let Err(e) = self.all_states() {
            self.report.checked.problem.get_or_insert(format!("{e:#}"));
        }
        let base = self.base_bytes().unwrap_or(0).saturating_sub(base_before);
        let mean = |list: &[u64]| list.iter().sum::<u64>() / (list.len() as u64).max(1);
        let (warm, dedup) = (mean(&self.warm_bytes), mean(&self.dedup_bytes));
        self.report.set_memory(warm, dedup, base);
        let [cold, warm, dedup] = &self.latencies;
        self.report.cold_ms = Percentiles::of(cold);
        self.report.warm_ms = Percentiles::of(warm);
        self.report.dedup_ms = Percentiles::of(dedup);
        self.line.done(if self.report.checked.problem.is_none() { "done" } else { "failed" });
        self.report
    }

    fn all_states(&mut self) -> Result<()> {
        self.line.step("cold starts");
        for _ in 0..COLD_STARTS {
            self.operate("purge")?;
            self.single()?;
        }
        self.scale_out()?;

        self.line.step("warm requests");
        for _ in 0..self.plan.warm_runs() {
            self.together()?;
            self.note_memory(SandboxState::Warm)?;
            for _ in 0..WARM_RUN {
                self.single()?;
            }
        }

        self.line.step("idle");
        self.wait_for_dedup(self.plan.idle + DEDUP_LIMIT)?;

        for cycle in 1..=self.plan.cycles {
            self.line.repeat("dedup and back", cycle, self.plan.cycles);
            self.operate("dedup")?;
            self.wait_for_dedup(DEDUP_LIMIT)?;
            self.single()?;
            self.together()?;
            self.note_memory(SandboxState::Warm)?;
        }
        self.line.step("idle");
        self.operate("dedup")?;
        self.wait_for_dedup(DEDUP_LIMIT)
    }

    /// One request, measured.
    fn single(&mut self) -> Result<()> {
        self.stop_if_interrupted()?;
        let case = self.plain.next().context("no requests")?;
        let (answer, ms) = call(self.client, &self.example.name, case)?;
        if let Some(kind) = answer.start {
            let list = match kind {
                StartKind::Cold => &mut self.latencies[0],
                StartKind::Warm => &mut self.latencies[1],
                StartKind::Dedup => &mut self.latencies[2],
            };
            list.push(ms);
        }
        self.check(case, &answer);
        Ok(())
    }

    /// As many requests at once as there are sandboxes; not measured, since they compete for the
    /// processors.
    fn together(&mut self) -> Result<()> {
        self.stop_if_interrupted()?;
        let cases: Vec<_> = self.mixed.by_ref().take(self.plan.sandboxes).collect();
        let (client, function) = (self.client, &self.example.name);
        let answers: Vec<_> = std::thread::scope(|scope| {
            let calls: Vec<_> = cases
                .iter()
                .map(|&case| scope.spawn(move || call(client, function, case)))
                .collect();
            calls.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
        });
        for (case, answer) in cases.into_iter().zip(answers) {
            let Ok(answer) = answer else { bail!("a request's thread panicked") };
            self.check(case, &answer?.0);
        }
        Ok(())
    }

    /// Makes sandboxes until there are as many as planned: requests at once need one each.
    fn scale_out(&mut self) -> Result<()> {
        let mut found = 0;
        for _ in 0..10 {
            self.together()?;
            found = self.sandboxes()?.len();
            if found >= self.plan.sandboxes {
                return Ok(());
            }
        }
        bail!("{} requests at once were served by {found} sandboxes", self.plan.sandboxes)
    }

    fn check(&mut self, case: &Case, answer: &Answer) {
        self.line.answered(1);
        if let Some(kind) = answer.start {
            self.report.starts.add(kind);
        }
        self.report.checked.check(case, answer);
    }

    fn operate(&self, verb: &str) -> Result<()> {
        self.stop_if_interrupted()?;
        self.client.post::<Value>(&format!("/v1/functions/{}/{verb}", self.example.name))?;
        Ok(())
    }

    fn sandboxes(&self) -> Result<Vec<SandboxView>> {
        let mut list = self.client.get::<Sandboxes>("/v1/sandboxes")?.sandboxes;
        list.retain(|s| s.function == self.example.name);
        Ok(list)
    }

    fn note_memory(&mut self, state: SandboxState) -> Result<Vec<SandboxView>> {
        let sandboxes = self.sandboxes()?;
        self.line.sandboxes(&sandboxes);
        for sandbox in sandboxes.iter().filter(|s| s.state == state && state == SandboxState::Dedup)
        {
            self.dedup_bytes.push(sandbox.memory_total);
            // As it was right before the dedup, with all its memory back.
            self.warm_bytes.push(sandbox.warm_bytes);
        }
        Ok(sandboxes)
    }

    /// Waits until all sandboxes are in the dedup state, and notes their memory.
    fn wait_for_dedup(&mut self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            self.stop_if_interrupted()?;
            let sandboxes = self.sandboxes()?;
            self.line.sandboxes(&sandboxes);
            if sandboxes.is_empty() {
                bail!("its sandboxes are gone; `medes logs` may say why");
            }
            if sandboxes.iter().all(|s| s.state == SandboxState::Dedup) {
                self.note_memory(SandboxState::Dedup)?;
                return Ok(());
            }
            if start.elapsed() > limit {
                bail!("not in the dedup state after {limit:?}: {}", stragglers(&sandboxes));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn base_bytes(&self) -> Result<u64> {
        Ok(self.client.get::<Info>("/v1/info")?.node.memory.base)
    }

    fn stop_if_interrupted(&self) -> Result<()> {
        if (self.interrupted)() {
            bail!("interrupted");
        }
        Ok(())
    }
}

fn stragglers(sandboxes: &[SandboxView]) -> String {
    let list: Vec<_> = sandboxes
        .iter()
        .filter(|s| s.state != SandboxState::Dedup)
        .map(|s| match &s.stays_warm {
            Some(reason) => format!("sandbox {} stays {}: {reason}", s.id, s.state),
            None => format!("sandbox {} is {}", s.id, s.state),
        })
        .collect();
    list.join("; ")
}
