//! `medes bench density`: how many sandboxes a machine holds, and how fast any of them answers.
//!
//! Sandboxes are started one after the other. Each answers a request, rests until its runtime has
//! tidied its heap, and is deduplicated before the next but one is started. When all are there, each
//! is brought back in a random order, answers again, and is deduplicated again.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use medes_bench::examples::{Case, Example};
use medes_bench::machine::Circumstances;
use medes_core::{FunctionName, MemoryUse, SandboxId, SandboxState, StartKind};
use serde::{Deserialize, Serialize};

use super::host::{HostMemory, private_memory};
use super::{Bench, FrontArgs, PAUSE, conclude};
use crate::answers::{Checked, all_cases};
use crate::failure::Outcome;
use crate::latency::Percentiles;
use crate::output::table;
use crate::progress::Line;
use crate::units::Period;

/// Different inputs; with more sandboxes they come around again.
const INPUTS: usize = 100;
/// Requests for which the platform chooses the sandbox, at most; no more than there are sandboxes.
const CHOSEN: usize = 100;

/// How much memory many dedup sandboxes take, and how fast any one of them answers.
///
/// Starts N sandboxes of one function on a private platform, one after the other; each answers a
/// request and is deduplicated. Then each is brought back in a random order and answers again. The
/// memory is the host's own figure (MemAvailable) before and after, so let nothing else run. Nothing
/// of a working set stays in memory, as if it were short.
#[derive(Debug, Args)]
pub struct DensityCommand {
    /// How many sandboxes.
    #[arg(long, value_name = "N", default_value_t = 100,
          value_parser = clap::value_parser!(u32).range(1..=20_000))]
    sandboxes: u32,
    /// The example function.
    #[arg(long, value_name = "NAME", default_value = "linalg")]
    function: String,
    /// Dedup sandboxes per base snapshot [default: the platform's].
    #[arg(long, value_name = "N")]
    base_threshold: Option<u32>,
    #[command(flatten)]
    front: FrontArgs,
}

/// The whole document. Times are milliseconds, sizes bytes.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    totals: Totals,
    functions: Vec<FunctionReport>,
    #[serde(flatten)]
    circumstances: Circumstances,
}

/// What the sandboxes take.
#[derive(Clone, Copy, Debug, Serialize)]
struct Totals {
    /// Sandboxes, all in the dedup state.
    sandboxes: usize,
    /// What the host has less since before the first one: everything that they cost, base
    /// snapshots included.
    bytes_total: i64,
    /// That, shared out.
    bytes_per_sandbox: i64,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct FunctionReport {
    name: FunctionName,
    #[serde(flatten)]
    totals: Totals,
    /// The parts that the platform accounts for, one by one: what is charged to the sandboxes, base
    /// snapshots, and the memory of daemon and keeper. Unlike the host's figure it does not depend
    /// on what else runs.
    bytes_accounted: u64,
    /// Where it is.
    split: Split,
    /// The host's figure once each has answered again and been deduplicated again.
    bytes_total_after: i64,
    /// Where it is then.
    split_after: Split,
    /// Starting one, from asking for it until it is warm.
    start_ms: Option<Percentiles>,
    /// Its first answer.
    warm_ms: Option<Percentiles>,
    /// Deduplicating one.
    dedup_ms: Option<Percentiles>,
    /// From asking for one, chosen at random, to come back until it has answered: two calls.
    answer_ms: Option<Percentiles>,
    /// A request for which the platform chooses the dedup sandbox, one call.
    request_ms: Option<Percentiles>,
    #[serde(flatten)]
    checked: Checked,
}

/// Where the memory is. Its parts overlap: the host's are counted by the kernel for everybody,
/// those of the sandboxes by their cgroups, those of the page store by the platform.
#[derive(Debug, Default, Serialize)]
struct Split {
    /// Counted by the kernel, for the whole host.
    host: HostMemory,
    /// Charged to the sandboxes: resident pages, kernel memory; their patches and tables.
    sandboxes: MemoryUse,
    /// Base snapshots.
    base: u64,
    /// The fingerprint registry.
    registry: u64,
    /// The daemon's own memory.
    daemon: u64,
    /// The keeper's own memory.
    keeper: u64,
}

/// `GET /v1/info`, as far as it is needed.
#[derive(Deserialize)]
struct Info {
    node: Node,
}

#[derive(Deserialize)]
struct Node {
    memory: medes_node::NodeMemory,
}

/// `GET /v1/sandboxes`, as far as it is needed.
#[derive(Deserialize)]
struct List {
    sandboxes: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    state: SandboxState,
    memory: MemoryUse,
}

#[derive(Default)]
struct Samples {
    start: Vec<f64>,
    warm: Vec<f64>,
    dedup: Vec<f64>,
    answer: Vec<f64>,
    request: Vec<f64>,
}

impl DensityCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If an answer was wrong, or not all sandboxes could be had.
    pub fn run(self) -> Outcome {
        let n = self.sandboxes as usize;
        let bench =
            self.front.open("density", std::slice::from_ref(&self.function), &|config| {
                let limit = &mut config.limits.max_sandboxes_per_function;
                *limit = (*limit).max(self.sandboxes + 1);
                // What counts here is how little they take.
                config.dedup.restore_target = Period::default();
                if let Some(threshold) = self.base_threshold {
                    config.dedup.base_threshold = threshold;
                }
            })?;
        let function = &bench.functions[0];
        let cases = all_cases(&bench.functions, &bench.source, |f| f.plain_events(INPUTS))?;
        let circumstances = Circumstances::now();
        let mut line = bench.view.line(function.name.as_str(), 2 * n + CHOSEN.min(n));
        let mut crowd = Crowd {
            bench: &bench,
            function,
            cases: cases[0].iter().cycle(),
            line: &mut line,
            samples: Samples::default(),
            checked: Checked::default(),
        };
        let measured = crowd.measure(n);
        crowd.line.done(if measured.is_ok() { "done" } else { "failed" });
        let mut report = match measured {
            Ok(report) => report,
            Err(error) => {
                let tail = bench.platform.log_tail();
                bench.close()?;
                return Err(error.context(format!("the platform's log ends with\n{tail}")).into());
            }
        };
        report.circumstances = circumstances.until_now();
        bench.close()?;
        self.front.publish(&report, &report.circumstances, || report.human())?;
        conclude(report.functions.iter().map(|f| (f.name.as_str(), &f.checked)))
    }
}

/// All sandboxes of the measurement.
struct Crowd<'a> {
    bench: &'a Bench,
    function: &'a Example,
    cases: std::iter::Cycle<std::slice::Iter<'a, Case>>,
    line: &'a mut Line,
    samples: Samples,
    checked: Checked,
}

impl Crowd<'_> {
    fn measure(&mut self, n: usize) -> Result<Report> {
        // What every sandbox needs once, such as the libraries' files in the page cache, is there
        // before the first reading.
        self.line.step("one to begin with");
        let one = self.start()?;
        self.answer(one, StartKind::Warm)?;
        self.bench.purge(self.function)?;
        self.rest();
        let before = self.reading()?;

        let all = self.fill(n)?;
        self.rest();
        let full = self.reading()?;
        self.bring_back_all(&all)?;
        self.requests(CHOSEN.min(n))?;
        self.rest();
        let after = self.reading()?;

        let (split, split_after) = (full.since(&before), after.since(&before));
        let total = split.host.available;
        let totals =
            Totals { sandboxes: n, bytes_total: total, bytes_per_sandbox: total / n as i64 };
        let s = &self.samples;
        let function = FunctionReport {
            name: self.function.name.clone(),
            totals,
            bytes_accounted: split.accounted(),
            split,
            bytes_total_after: split_after.host.available,
            split_after,
            start_ms: Percentiles::of(&s.start),
            warm_ms: Percentiles::of(&s.warm),
            dedup_ms: Percentiles::of(&s.dedup),
            answer_ms: Percentiles::of(&s.answer),
            request_ms: Percentiles::of(&s.request),
            checked: std::mem::take(&mut self.checked),
        };
        let circumstances = Circumstances::now();
        Ok(Report { totals, functions: vec![function], circumstances })
    }

    /// Starts all, deduplicating each while the next one starts.
    fn fill(&mut self, n: usize) -> Result<Vec<SandboxId>> {
        let mut all: Vec<SandboxId> = Vec::with_capacity(n);
        let mut idle_since = Instant::now();
        for number in 1..=n {
            self.line.repeat("starting and deduplicating", number, n);
            let next = self.start().with_context(|| format!("starting sandbox {number}"))?;
            if let Some(last) = all.last() {
                std::thread::sleep(PAUSE.saturating_sub(idle_since.elapsed()));
                self.dedup(*last)?;
            }
            let ms = self.answer(next, StartKind::Warm)?;
            self.samples.warm.push(ms);
            idle_since = Instant::now();
            all.push(next);
        }
        if let Some(last) = all.last() {
            self.rest();
            self.dedup(*last)?;
        }
        Ok(all)
    }

    /// Brings each back once, in a random order, and deduplicates it again.
    fn bring_back_all(&mut self, all: &[SandboxId]) -> Result<()> {
        for (number, index) in shuffled(all.len()).into_iter().enumerate() {
            self.line.repeat("back in random order", number + 1, all.len());
            let sandbox = all[index];
            let start = Instant::now();
            let restore = format!("/v1/sandboxes/{sandbox}/restore");
            self.bench.client.post::<serde_json::Value>(&restore)?;
            self.answer(sandbox, StartKind::Warm)?;
            self.samples.answer.push(start.elapsed().as_secs_f64() * 1e3);
            self.bench.pause();
            self.dedup(sandbox)?;
        }
        Ok(())
    }

    /// Requests that take whichever dedup sandbox the platform gives them.
    fn requests(&mut self, n: usize) -> Result<()> {
        self.line.step("requests");
        for _ in 0..n {
            let case = self.cases.next().context("no requests")?;
            let (answer, ms) = self.bench.call(self.function, case, &mut self.checked)?;
            self.line.answered(1);
            ensure!(answer.start == Some(StartKind::Dedup), "not a dedup start");
            self.samples.request.push(ms);
            self.bench.pause();
            self.dedup(answer.sandbox.context("the answer names no sandbox")?)?;
        }
        Ok(())
    }

    fn start(&mut self) -> Result<SandboxId> {
        let begin = Instant::now();
        let sandbox = self.bench.start_sandbox(self.function)?;
        self.samples.start.push(begin.elapsed().as_secs_f64() * 1e3);
        Ok(sandbox)
    }

    /// Has the only warm sandbox, which has to be `sandbox`, answer a request.
    fn answer(&mut self, sandbox: SandboxId, expected: StartKind) -> Result<f64> {
        let case = self.cases.next().context("no requests")?;
        let (answer, ms) = self.bench.call(self.function, case, &mut self.checked)?;
        self.line.answered(1);
        let right = answer.sandbox == Some(sandbox) && answer.start == Some(expected);
        ensure!(
            right,
            "{:?} answered ({:?}) where {sandbox} should have",
            answer.sandbox,
            answer.start
        );
        Ok(ms)
    }

    fn dedup(&mut self, sandbox: SandboxId) -> Result<()> {
        let begin = Instant::now();
        self.bench.dedup(sandbox)?;
        self.samples.dedup.push(begin.elapsed().as_secs_f64() * 1e3);
        Ok(())
    }

    /// Long enough for the kernel to free what is freed late.
    fn rest(&self) {
        std::thread::sleep(PAUSE * 10);
    }

    fn reading(&self) -> Result<Split> {
        let rows = self.bench.client.get::<List>("/v1/sandboxes")?.sandboxes;
        ensure!(
            rows.iter().all(|row| row.state == SandboxState::Dedup),
            "not all sandboxes are in the dedup state"
        );
        let mut sandboxes = MemoryUse::default();
        for row in rows {
            sandboxes.private += row.memory.private;
            sandboxes.kernel += row.memory.kernel;
            sandboxes.store += row.memory.store;
            sandboxes.metadata += row.memory.metadata;
        }
        let memory = self.bench.client.get::<Info>("/v1/info")?.node.memory;
        let [daemon, keeper] = self.bench.platform.processes()?;
        Ok(Split {
            host: HostMemory::now()?,
            sandboxes,
            base: memory.base,
            registry: memory.registry,
            daemon: private_memory(daemon)?,
            keeper: private_memory(keeper)?,
        })
    }
}

impl Split {
    fn accounted(&self) -> u64 {
        // The registry is part of the daemon's memory.
        self.sandboxes.total() + self.base + self.daemon + self.keeper
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            host: self.host.since(&before.host),
            sandboxes: self.sandboxes,
            base: self.base.saturating_sub(before.base),
            registry: self.registry.saturating_sub(before.registry),
            daemon: self.daemon.saturating_sub(before.daemon),
            keeper: self.keeper.saturating_sub(before.keeper),
        }
    }
}

/// The numbers below `n` in an order that looks random and is always the same (Fisher-Yates over a
/// linear congruential generator).
fn shuffled(n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut state = 0x5eed_u64;
    for last in (1..n).rev() {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(last, (state >> 33) as usize % (last + 1));
    }
    order
}

impl Report {
    fn human(&self) -> String {
        let mut out = String::new();
        for f in &self.functions {
            let n = self.totals.sandboxes as f64;
            let mb = |bytes: i64| format!("{:.1}", bytes as f64 / 1e6);
            let each = |bytes: i64| format!("{:.3}", bytes as f64 / 1e6 / n);
            let s = &f.split;
            let rows = [
                ("what the host has less", f.totals.bytes_total),
                ("accounted for", f.bytes_accounted as i64),
                ("sandboxes: resident pages", s.sandboxes.private as i64),
                ("sandboxes: kernel memory", s.sandboxes.kernel as i64),
                ("sandboxes: patches", s.sandboxes.store as i64),
                ("sandboxes: tables", s.sandboxes.metadata as i64),
                ("base snapshots", s.base as i64),
                ("daemon", s.daemon as i64),
                ("  its fingerprint registry", s.registry as i64),
                ("keeper", s.keeper as i64),
                ("host: page tables", s.host.page_tables),
                ("host: kernel stacks", s.host.kernel_stacks),
                ("host: kernel objects", s.host.slab),
                ("host: per processor", s.host.percpu),
                ("host: anonymous memory", s.host.anonymous),
                ("host: shared memory", s.host.shared),
                ("after each answered again, less", f.bytes_total_after),
                ("accounted for", f.split_after.accounted() as i64),
                ("sandboxes: resident pages", f.split_after.sandboxes.private as i64),
                ("sandboxes: kernel memory", f.split_after.sandboxes.kernel as i64),
                ("sandboxes: patches", f.split_after.sandboxes.store as i64),
            ];
            out.push_str(&format!("{} dedup sandboxes of {}\n\n", self.totals.sandboxes, f.name));
            out.push_str(&table(
                &["MEMORY", ">MB", ">MB EACH"],
                rows.map(|(what, bytes)| vec![what.to_owned(), mb(bytes), each(bytes)]),
            ));
            let latency = |what: &str, p: Option<Percentiles>| {
                let ms = |value: fn(&Percentiles) -> f64| {
                    p.as_ref().map_or_else(|| "-".into(), |p| format!("{:.1}", value(p)))
                };
                vec![what.to_owned(), ms(|p| p.p50), ms(|p| p.p90), ms(|p| p.p99)]
            };
            out.push('\n');
            out.push_str(&table(
                &["ms", ">p50", ">p90", ">p99"],
                [
                    latency("starting one", f.start_ms),
                    latency("its first answer", f.warm_ms),
                    latency("deduplicating one", f.dedup_ms),
                    latency("an answer from one at random", f.answer_ms),
                    latency("an answer from one of the platform's choice", f.request_ms),
                ],
            ));
            out.push_str(&format!(
                "\n{} answers checked, {} wrong\n",
                f.checked.answers_checked, f.checked.answers_wrong
            ));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sandbox_gets_its_turn_once() {
        let mut order = shuffled(1000);
        assert_ne!(order[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
        assert_eq!(shuffled(0), Vec::<usize>::new());
    }
}
