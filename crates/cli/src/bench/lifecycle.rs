//! `medes bench lifecycle`: what a request pays for finding its sandbox cold, warm or dedup.
//!
//! Every cycle takes one sandbox through the same steps: it is left alone, deduplicated, left alone
//! again, and called twice in a row (a dedup start and the request after it); it is left alone once
//! more and called twice in a row with the same two inputs, now warm, and once more and called with
//! the first input. So each dedup start has two warm ones beside it that had the same input, after the
//! same pause, a moment later, and what a dedup start adds is what it takes longer than their mean.
//! What the two differ by is the noise of that.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use medes_bench::examples::{Case, Example};
use medes_bench::machine::{Circumstances, ProcessorTime};
use medes_core::{FunctionName, SandboxId, StartKind};
use medes_node::DedupReport;
use nix::time::clock_getcpuclockid;
use serde::Serialize;

use super::{Bench, FrontArgs, conclude};
use crate::answers::{Checked, all_cases};
use crate::client::Answer;
use crate::failure::Outcome;
use crate::latency::Percentiles;
use crate::output::table;
use crate::progress::Line;

/// Inputs of one cycle: each is sent once after a restore and once warm, the first of them once more.
const INPUTS: usize = 2;
/// Requests to a sandbox that was just started: the cold one, one to settle, one after its first
/// dedup.
const FRESH: usize = 3;

/// What a request pays for finding its sandbox cold, warm or dedup, through the front door.
///
/// Deploys example functions on a private platform and, for each of them, starts sandboxes anew and
/// takes one through dedup and back many times. Each dedup start is compared with two warm requests of
/// the same input, after the same pause. Every answer is checked; a wrong one makes the command
/// fail. All ten functions take about ten minutes.
#[derive(Debug, Args)]
pub struct LifecycleCommand {
    /// Only these example functions [default: all].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    functions: Vec<String>,
    /// How many times each is deduplicated and called again.
    #[arg(long, value_name = "N", default_value_t = 50,
          value_parser = clap::value_parser!(u16).range(1..))]
    cycles: u16,
    /// Sandboxes that are started anew.
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u16).range(1..))]
    colds: u16,
    #[command(flatten)]
    front: FrontArgs,
}

/// The whole document. Times are milliseconds, sizes bytes.
#[derive(Debug, Serialize)]
struct Report {
    functions: Vec<FunctionReport>,
    cycles: usize,
    #[serde(flatten)]
    circumstances: Circumstances,
}

/// What was measured of one function.
#[derive(Debug, Serialize)]
struct FunctionReport {
    name: FunctionName,
    /// Whole requests as the client sees them, by the state in which they found their sandbox.
    cold_ms: Option<Percentiles>,
    /// After a pause.
    warm_ms: Option<Percentiles>,
    /// Right after another.
    warm_again_ms: Option<Percentiles>,
    dedup_ms: Option<Percentiles>,
    /// The request right after a dedup start.
    next_ms: Option<Percentiles>,
    /// What a dedup start takes longer than the mean of its two warm counterparts.
    added_ms: Option<Percentiles>,
    /// What the request after it takes longer than its warm counterpart.
    next_added_ms: Option<Percentiles>,
    /// What the second of those counterparts takes longer than the first: the noise of `added_ms`.
    noise_ms: Option<Percentiles>,
    /// The first dedup start of the function, when nothing is known of its working set.
    unknown_ms: Option<f64>,
    phases: Phases,
    /// Pages put back before the sandbox ran.
    pages_before: Option<Percentiles>,
    /// Pages put back while the request ran.
    pages_on_demand: Option<Percentiles>,
    /// Times that a thread waited for those.
    faults: Option<Percentiles>,
    dedup: Operations,
    /// Memory of the sandbox before and after its newest dedup.
    warm_bytes: u64,
    dedup_bytes: u64,
    /// [`Circumstances::stolen_percent`] while this was measured.
    stolen_percent: Option<f64>,
    #[serde(flatten)]
    checked: Checked,
}

/// Where what a dedup start adds is spent.
#[derive(Debug, Default, Serialize)]
struct Phases {
    /// Choosing the sandbox, and the way to the keeper and back.
    schedule_ms: Option<Percentiles>,
    /// Putting the working set back.
    prefetch_ms: Option<Percentiles>,
    /// Letting the sandbox run.
    thaw_ms: Option<Percentiles>,
    /// What the function itself takes longer than when warm: waiting for missing pages, and caches
    /// that have to fill again.
    faults_ms: Option<Percentiles>,
}

/// Dedup operations of a function by what they had to do.
#[derive(Debug, Default, Serialize)]
struct Operations {
    /// Those that also made a base snapshot.
    with_base: Option<Operation>,
    /// The first of a sandbox.
    first: Option<Operation>,
    /// The second of a sandbox, after one request.
    repeated: Option<Operation>,
    /// Those of the cycles, after five requests each.
    in_cycles: Option<Operation>,
}

/// Operations of one kind.
#[derive(Debug, Serialize)]
struct Operation {
    /// From asking for it to its end.
    time_ms: Percentiles,
    /// The part in which a request would have to wait.
    pause_ms: Percentiles,
    /// Processor time of daemon and keeper meanwhile.
    cpu_ms: Percentiles,
    /// Pages that were dropped, mean.
    pages: u64,
    /// Pages that stayed, mean.
    kept_pages: u64,
    /// Private memory by time: the mean of the operations.
    bytes_per_second: u64,
}

/// What is collected before it becomes percentiles.
#[derive(Default)]
struct Samples {
    cold: Vec<f64>,
    warm: Vec<f64>,
    warm_again: Vec<f64>,
    dedup: Vec<f64>,
    next: Vec<f64>,
    added: Vec<f64>,
    next_added: Vec<f64>,
    noise: Vec<f64>,
    unknown: Option<f64>,
    schedule: Vec<f64>,
    prefetch: Vec<f64>,
    thaw: Vec<f64>,
    running: Vec<f64>,
    pages_before: Vec<f64>,
    pages_on_demand: Vec<f64>,
    faults: Vec<f64>,
    with_base: Vec<Done>,
    first: Vec<Done>,
    repeated: Vec<Done>,
    in_cycles: Vec<Done>,
}

/// One dedup operation.
struct Done {
    ms: f64,
    cpu_ms: f64,
    report: DedupReport,
}

impl LifecycleCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If an answer was wrong, or something could not be measured.
    pub fn run(self) -> Outcome {
        let (cycles, colds) = (usize::from(self.cycles), usize::from(self.colds));
        let bench = self.front.open("lifecycle", &self.functions, &|_| {})?;
        let requests = colds * FRESH + cycles * INPUTS;
        bench.view.say(&format!("computing the right answers to {requests} requests per function"));
        let cases = all_cases(&bench.functions, &bench.source, |f| f.plain_events(requests))?;
        let circumstances = Circumstances::now();
        let of_line = requests + cycles * (INPUTS + 1);
        let mut lines: Vec<_> =
            bench.functions.iter().map(|f| bench.view.line(f.name.as_str(), of_line)).collect();
        let mut reports = Vec::new();
        for ((function, cases), line) in bench.functions.iter().zip(&cases).zip(&mut lines) {
            let (fresh, cycled) = cases.split_at(colds * FRESH);
            let mut course = Course {
                bench: &bench,
                function,
                line,
                samples: Samples::default(),
                checked: Checked::default(),
                began: ProcessorTime::now(),
            };
            if let Err(error) = course.run(fresh, cycled) {
                course.checked.problem.get_or_insert(format!("{error:#}"));
            }
            course.line.done(if course.checked.problem.is_none() { "done" } else { "failed" });
            reports.push(course.report());
            if bench.platform.interrupted() {
                break;
            }
        }
        let circumstances = circumstances.until_now();
        bench.close()?;
        let report = Report { functions: reports, cycles, circumstances };
        self.front.publish(&report, &report.circumstances, || report.human())?;
        conclude(report.functions.iter().map(|f| (f.name.as_str(), &f.checked)))
    }
}

/// One function's way through the measurement.
struct Course<'a> {
    bench: &'a Bench,
    function: &'a Example,
    line: &'a mut Line,
    samples: Samples,
    checked: Checked,
    began: ProcessorTime,
}

impl Course<'_> {
    fn run(&mut self, fresh: &[Case], cycled: &[Case]) -> Result<()> {
        let mut sandbox = None;
        let colds = fresh.len() / FRESH;
        for (n, cases) in fresh.chunks_exact(FRESH).enumerate() {
            self.line.repeat("cold start, dedup, dedup", n + 1, colds);
            sandbox = Some(self.start_anew(cases)?);
        }
        let sandbox = sandbox.context("no sandbox")?;
        let cycles = cycled.len() / INPUTS;
        for (n, cases) in cycled.chunks_exact(INPUTS).enumerate() {
            self.line.repeat("dedup and back", n + 1, cycles);
            self.cycle(sandbox, &cases[0], &cases[1])?;
        }
        self.bench.purge(self.function)
    }

    /// A new sandbox, its first dedup, and its second after one request.
    fn start_anew(&mut self, cases: &[Case]) -> Result<SandboxId> {
        self.bench.purge(self.function)?;
        let (cold, ms) = self.call(&cases[0], StartKind::Cold)?;
        self.samples.cold.push(ms);
        let sandbox = cold.sandbox.context("the answer names no sandbox")?;
        self.call(&cases[1], StartKind::Warm)?;
        let first = self.dedup(sandbox)?;
        let of_its_kind = match first.report.base_bytes {
            0 => &mut self.samples.first,
            _ => &mut self.samples.with_base,
        };
        of_its_kind.push(first);
        let (_, ms) = self.call(&cases[2], StartKind::Dedup)?;
        self.samples.unknown.get_or_insert(ms);
        let again = self.dedup(sandbox)?;
        if again.report.base_bytes == 0 {
            self.samples.repeated.push(again);
        }
        // Its working set is known to its function by now; it goes on, or is purged, from warm.
        self.bench.client.post::<serde_json::Value>(&format!("/v1/sandboxes/{sandbox}/restore"))?;
        Ok(sandbox)
    }

    fn cycle(&mut self, sandbox: SandboxId, first: &Case, second: &Case) -> Result<()> {
        let done = self.dedup(sandbox)?;
        self.samples.in_cycles.push(done);
        self.bench.pause();
        let (dedup, dedup_ms) = self.call(first, StartKind::Dedup)?;
        let (_, next_ms) = self.call(second, StartKind::Warm)?;
        self.bench.pause();
        let (warm, warm_ms) = self.call(first, StartKind::Warm)?;
        let (_, warm_again_ms) = self.call(second, StartKind::Warm)?;
        self.bench.pause();
        let (warm_too, warm_too_ms) = self.call(first, StartKind::Warm)?;
        let all = [&dedup, &warm, &warm_too].map(|answer| answer.sandbox);
        ensure!(all.iter().all(|s| *s == Some(sandbox)), "another sandbox answered");
        let s = &mut self.samples;
        s.dedup.push(dedup_ms);
        s.next.push(next_ms);
        s.warm.extend([warm_ms, warm_too_ms]);
        s.warm_again.push(warm_again_ms);
        s.added.push(dedup_ms - (warm_ms + warm_too_ms) / 2.0);
        s.next_added.push(next_ms - warm_again_ms);
        s.noise.push(warm_too_ms - warm_ms);
        s.note_phases(&dedup, [&warm, &warm_too]);
        Ok(())
    }

    fn call(&mut self, case: &Case, expected: StartKind) -> Result<(Answer, f64)> {
        let (answer, ms) = self.bench.call(self.function, case, &mut self.checked)?;
        self.line.answered(1);
        let start = answer.start.context("the answer does not say how it found its sandbox")?;
        ensure!(start == expected, "a {start} start where a {expected} one was expected");
        Ok((answer, ms))
    }

    /// Deduplicates the sandbox once it has been idle for a moment.
    fn dedup(&mut self, sandbox: SandboxId) -> Result<Done> {
        self.bench.pause();
        let (start, cpu) = (Instant::now(), self.cpu_time()?);
        let report = self.bench.dedup(sandbox)?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let cpu_ms = (self.cpu_time()? - cpu).as_secs_f64() * 1e3;
        Ok(Done { ms, cpu_ms, report })
    }

    /// Processor time that daemon and keeper have used.
    fn cpu_time(&self) -> Result<Duration> {
        let mut sum = Duration::ZERO;
        for process in self.bench.platform.processes()? {
            sum += Duration::from(clock_getcpuclockid(process)?.now()?);
        }
        Ok(sum)
    }

    fn report(self) -> FunctionReport {
        let s = self.samples;
        let of = |list: &[f64]| Percentiles::of(list);
        let newest = s.in_cycles.last().map(|d| d.report).unwrap_or_default();
        FunctionReport {
            name: self.function.name.clone(),
            cold_ms: of(&s.cold),
            warm_ms: of(&s.warm),
            warm_again_ms: of(&s.warm_again),
            dedup_ms: of(&s.dedup),
            next_ms: of(&s.next),
            added_ms: of(&s.added),
            next_added_ms: of(&s.next_added),
            noise_ms: of(&s.noise),
            unknown_ms: s.unknown,
            phases: Phases {
                schedule_ms: of(&s.schedule),
                prefetch_ms: of(&s.prefetch),
                thaw_ms: of(&s.thaw),
                faults_ms: of(&s.running),
            },
            pages_before: of(&s.pages_before),
            pages_on_demand: of(&s.pages_on_demand),
            faults: of(&s.faults),
            dedup: Operations {
                with_base: Operation::of(&s.with_base),
                first: Operation::of(&s.first),
                repeated: Operation::of(&s.repeated),
                in_cycles: Operation::of(&s.in_cycles),
            },
            warm_bytes: newest.before.total(),
            dedup_bytes: newest.after.total(),
            stolen_percent: self.began.stolen_percent(),
            checked: self.checked,
        }
    }
}

impl Samples {
    fn note_phases(&mut self, dedup: &Answer, warm: [&Answer; 2]) {
        let ms = |us: u64| us as f64 / 1e3;
        let memory = dedup.memory.unwrap_or_default();
        let before = dedup.timing.queue_us + dedup.timing.startup_us;
        let back = memory.prefetch_us + memory.thaw_us;
        self.schedule.push(ms(before.saturating_sub(back)));
        self.prefetch.push(ms(memory.prefetch_us));
        self.thaw.push(ms(memory.thaw_us));
        let of_warm: f64 = warm.iter().map(|warm| ms(warm.timing.execution_us)).sum();
        self.running.push(ms(dedup.timing.execution_us) - of_warm / 2.0);
        self.pages_before.push(memory.pages_before as f64);
        self.pages_on_demand.push(memory.pages_on_demand as f64);
        self.faults.push(memory.faults as f64);
    }
}

impl Operation {
    fn of(all: &[Done]) -> Option<Self> {
        let of =
            |value: fn(&Done) -> f64| Percentiles::of(&all.iter().map(value).collect::<Vec<_>>());
        let seconds: f64 = all.iter().map(|d| d.ms / 1e3).sum();
        let bytes: u64 = all.iter().map(|d| d.report.before.private).sum();
        let pages: u64 = all.iter().map(|d| d.report.pages).sum();
        let kept: u64 = all.iter().map(|d| d.report.kept_pages).sum();
        Some(Self {
            time_ms: of(|d| d.ms)?,
            pause_ms: of(|d| d.report.commit_us as f64 / 1e3)?,
            cpu_ms: of(|d| d.cpu_ms)?,
            pages: pages / all.len() as u64,
            kept_pages: kept / all.len() as u64,
            bytes_per_second: (bytes as f64 / seconds) as u64,
        })
    }
}

impl Report {
    fn human(&self) -> String {
        let mut out = self.requests();
        out.push_str(
            "\nms, medians unless said otherwise. NEW: the first dedup start of all, when nobody knows \
             yet what requests\ntouch. ADDED: a dedup start less the mean of two warm requests of the same \
             input; of it, choosing and\nreaching the sandbox, putting the working set back, letting \
             it run, and what the function itself takes\nlonger. NOISE: one of those warm requests \
             less the other. NEXT: the request after a dedup start, less its warm\ncounterpart.\n\n",
        );
        out.push_str(&self.operations());
        out.push_str(
            "\nDedup operations: the first of a sandbox, the second after one request, those of the \
             cycles. CPU: of the\nplatform's own processes. PAUSE: the part with threads stopped; a \
             request waits for a step of it. STAY: pages that\nstay, for a restore to be as fast \
             as it has to be, and the one or two that the kernel needs.\n",
        );
        out
    }

    fn requests(&self) -> String {
        let p50 =
            |p: &Option<Percentiles>| p.map_or_else(|| "-".into(), |p| format!("{:.2}", p.p50));
        let p99 =
            |p: &Option<Percentiles>| p.map_or_else(|| "-".into(), |p| format!("{:.2}", p.p99));
        let count =
            |p: &Option<Percentiles>| p.map_or_else(|| "-".into(), |p| format!("{:.0}", p.p50));
        table(
            &[
                "FUNCTION",
                ">COLD",
                ">WARM",
                ">NEW",
                ">DEDUP",
                ">ADDED",
                ">p99",
                ">NOISE p99",
                ">REACH",
                ">PREFETCH",
                ">THAW",
                ">FAULTS",
                ">PAGES",
                ">LATER",
                ">NEXT",
                ">WRONG",
            ],
            self.functions.iter().map(|f| {
                let next = match (f.next_added_ms, f.warm_again_ms) {
                    (Some(added), Some(warm)) => {
                        format!("{:+.0} %", added.p50 / warm.p50 * 100.0)
                    }
                    _ => "-".into(),
                };
                vec![
                    f.name.to_string(),
                    p50(&f.cold_ms),
                    p50(&f.warm_ms),
                    f.unknown_ms.map_or_else(|| "-".into(), |ms| format!("{ms:.2}")),
                    p50(&f.dedup_ms),
                    p50(&f.added_ms),
                    p99(&f.added_ms),
                    p99(&f.noise_ms),
                    p50(&f.phases.schedule_ms),
                    p50(&f.phases.prefetch_ms),
                    p50(&f.phases.thaw_ms),
                    p50(&f.phases.faults_ms),
                    count(&f.pages_before),
                    count(&f.pages_on_demand),
                    next,
                    f.checked.answers_wrong.to_string(),
                ]
            }),
        )
    }

    fn operations(&self) -> String {
        let ms = |o: &Option<Operation>| {
            o.as_ref().map_or_else(|| "-".into(), |o| format!("{:.1}", o.time_ms.p50))
        };
        table(
            &[
                "FUNCTION",
                ">FIRST ms",
                ">SECOND ms",
                ">CYCLES ms",
                ">CPU ms",
                ">PAUSE ms",
                ">MB/s",
                ">WARM MB",
                ">DEDUP MB",
                ">STAY",
            ],
            self.functions.iter().map(|f| {
                let in_cycles = f.dedup.in_cycles.as_ref();
                let first = f.dedup.first.as_ref().or(f.dedup.with_base.as_ref());
                let of = |value: fn(&Operation) -> f64, digits: usize| {
                    first.map_or_else(|| "-".into(), |o| format!("{:.digits$}", value(o)))
                };
                vec![
                    f.name.to_string(),
                    ms(&f.dedup.first),
                    ms(&f.dedup.repeated),
                    ms(&f.dedup.in_cycles),
                    of(|o| o.cpu_ms.p50, 1),
                    of(|o| o.pause_ms.p50, 1),
                    of(|o| o.bytes_per_second as f64 / 1e6, 0),
                    format!("{:.1}", f.warm_bytes as f64 / 1e6),
                    format!("{:.1}", f.dedup_bytes as f64 / 1e6),
                    in_cycles.map_or_else(|| "-".into(), |o| o.kept_pages.to_string()),
                ]
            }),
        )
    }
}
