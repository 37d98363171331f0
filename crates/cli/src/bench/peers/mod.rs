//! `medes bench peers`: ways to keep an idle sandbox, side by side.
//!
//! Every way gets sandboxes of its own, on the same platform, with the same requests. It puts all
//! of them away, which says what memory they keep; then the one that was used last is brought back
//! for a request and put away again, many times.

mod ksm;
mod setting;
mod swap;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use medes_bench::examples::{Case, Example};
use medes_bench::machine::Circumstances;
use medes_core::{FunctionName, SandboxId};
use medes_sandbox::{Cgroup, CgroupRoot};
use serde::Serialize;

use super::{Bench, FrontArgs, PAUSE, conclude};
use crate::answers::{Checked, all_cases};
use crate::failure::Outcome;
use crate::latency::Percentiles;
use crate::output::table;
use crate::progress::Line;
use crate::wire::Info;

/// Requests before those that are measured, for each way alike: what has to be learned from the
/// first ones is known then.
const UNMEASURED: usize = 3;

/// How long a sandbox may take to freeze.
const FREEZE_LIMIT: Duration = Duration::from_secs(1);

/// Ways to keep idle sandboxes, side by side: what memory each keeps, and what a request then takes.
///
/// Keep warm; freeze and page out into zram, or into zswap; freeze and merge equal pages (KSM) at
/// the kernel's defaults and tuned; CRIU; Medes. Zram, zswap and KSM are the host's: they are set up
/// for as long as they are measured and set back afterwards, so let nothing else use them. A way
/// that can't be had on this host is shown with the reason.
#[derive(Debug, Args)]
pub struct PeersCommand {
    /// Only these example functions [default: all].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    functions: Vec<String>,
    /// Sandboxes of each function.
    #[arg(long, value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u16).range(1..=256))]
    sandboxes: u16,
    /// Only these ways: warm, zram, zswap, ksm, ksm-tuned, criu, medes [default: all].
    #[arg(long, value_name = "WAY,...", value_delimiter = ',',
          value_parser = clap::builder::PossibleValuesParser::new(PEERS), hide_possible_values = true)]
    peers: Vec<String>,
    /// Requests that are measured for each function and way.
    #[arg(long, value_name = "N", default_value_t = 30,
          value_parser = clap::value_parser!(u16).range(1..))]
    cycles: u16,
    #[command(flatten)]
    front: FrontArgs,
}

/// The whole document. Times are milliseconds, sizes bytes.
#[derive(Debug, Serialize)]
struct Report {
    functions: Vec<FunctionReport>,
    sandboxes: usize,
    cycles: usize,
    #[serde(flatten)]
    circumstances: Circumstances,
}

/// What was measured with one function.
#[derive(Debug, Serialize)]
struct FunctionReport {
    name: FunctionName,
    peers: Vec<PeerReport>,
    #[serde(flatten)]
    checked: Checked,
}

/// One way to keep a function's sandboxes.
#[derive(Debug, Serialize)]
struct PeerReport {
    peer: &'static str,
    /// Whether this host has it.
    available: bool,
    /// If not, why.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    figures: Option<Figures>,
}

/// What a way costs.
#[derive(Debug, Serialize)]
struct Figures {
    /// What exactly was done.
    note: String,
    /// Memory that one idle sandbox keeps: what it is charged for, and its share of what all of
    /// them keep elsewhere (the compressed store, base snapshots, KSM's records).
    kept_bytes: u64,
    /// The same once it is known what requests touch, and all have been put away with that: some of
    /// it may stay from then on.
    kept_bytes_after: u64,
    /// Putting the sandbox away.
    put_away_ms: Option<Percentiles>,
    /// From the beginning of bringing it back until it has answered.
    request_ms: Option<Percentiles>,
}

/// A sandbox of the platform, with the means to do something to it from outside.
struct Sandbox {
    id: SandboxId,
    cgroup: Cgroup,
}

/// A way to keep idle sandboxes. Dropping it sets back whatever it changed of the host.
trait Keeping {
    /// What exactly it does.
    fn note(&self) -> String;

    /// Makes a sandbox ready for it, once.
    fn prepare(&mut self, _sandbox: &Sandbox) -> Result<()> {
        Ok(())
    }

    /// Puts an idle sandbox away.
    fn put_away(&mut self, sandbox: &Sandbox) -> Result<()>;

    /// Puts a sandbox that is away away once more, if what requests were seen to touch since then makes
    /// a difference.
    fn put_away_anew(&mut self, _sandbox: &Sandbox) -> Result<()> {
        Ok(())
    }

    /// Waits for what happens to those that were put away; for the first time, or again.
    fn settle(&mut self, _first: bool) -> Result<()> {
        Ok(())
    }

    /// What has to be done before a sandbox can have a request.
    fn bring_back(&mut self, sandbox: &Sandbox) -> Result<()>;

    /// What is kept outside of the sandboxes, for all of them.
    fn store_bytes(&mut self) -> Result<u64>;
}

/// Left as it is.
struct Warm;

impl Keeping for Warm {
    fn note(&self) -> String {
        "left as it is".into()
    }

    fn put_away(&mut self, _sandbox: &Sandbox) -> Result<()> {
        Ok(())
    }

    fn bring_back(&mut self, _sandbox: &Sandbox) -> Result<()> {
        Ok(())
    }

    fn store_bytes(&mut self) -> Result<u64> {
        Ok(0)
    }
}

/// In the dedup state.
struct Medes<'a> {
    bench: &'a Bench,
    base_before: u64,
}

impl<'a> Medes<'a> {
    fn start(bench: &'a Bench) -> Result<Self> {
        Ok(Self { bench, base_before: base_bytes(bench)? })
    }
}

fn base_bytes(bench: &Bench) -> Result<u64> {
    Ok(bench.client.get::<Info>("/v1/info")?.node.memory.base)
}

impl Keeping for Medes<'_> {
    fn note(&self) -> String {
        "in the dedup state".into()
    }

    fn put_away(&mut self, sandbox: &Sandbox) -> Result<()> {
        self.bench.dedup(sandbox.id).map(|_| ())
    }

    fn put_away_anew(&mut self, sandbox: &Sandbox) -> Result<()> {
        let path = format!("/v1/sandboxes/{}/restore", sandbox.id);
        self.bench.client.post::<serde_json::Value>(&path)?;
        self.bench.pause();
        self.put_away(sandbox)
    }

    fn bring_back(&mut self, _sandbox: &Sandbox) -> Result<()> {
        // The platform does, as part of the request.
        Ok(())
    }

    fn store_bytes(&mut self) -> Result<u64> {
        Ok(base_bytes(self.bench)?.saturating_sub(self.base_before))
    }
}

/// CRIU keeps a process's memory in files, as large as it was; this tool only says whether it is
/// there.
fn criu() -> anyhow::Error {
    let version = std::process::Command::new("criu").arg("--version").output();
    match version {
        Err(_) => anyhow::anyhow!("criu is not installed"),
        Ok(output) => anyhow::anyhow!(
            "criu is installed ({}), but it can't restore a sandbox as the keeper's own child, \
             which the platform needs it to be",
            String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("?")
        ),
    }
}

/// The ways, in the order in which they are shown.
const PEERS: [&str; 7] = ["warm", "zram", "zswap", "ksm", "ksm-tuned", "criu", "medes"];

fn start<'a>(peer: &str, bench: &'a Bench) -> Result<Box<dyn Keeping + 'a>> {
    Ok(match peer {
        "zram" => Box::new(swap::Zram::start()?),
        "zswap" => Box::new(swap::Zswap::start(bench.platform.directory())?),
        "ksm" => Box::new(ksm::Ksm::start(false)?),
        "ksm-tuned" => Box::new(ksm::Ksm::start(true)?),
        "criu" => return Err(criu()),
        "medes" => Box::new(Medes::start(bench)?),
        _ => Box::new(Warm),
    })
}

impl PeersCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If an answer was wrong, or something could not be measured.
    pub fn run(self) -> Outcome {
        let (sandboxes, cycles) = (usize::from(self.sandboxes), usize::from(self.cycles));
        let bench = self.front.open("peers", &self.functions, &|_| {})?;
        let requests = 2 * sandboxes + UNMEASURED + cycles;
        let peers: Vec<_> = PEERS
            .into_iter()
            .filter(|p| self.peers.is_empty() || self.peers.iter().any(|chosen| chosen == p))
            .collect();
        bench.view.say(&format!("computing the right answers to {requests} requests per function"));
        let cases = all_cases(&bench.functions, &bench.source, |f| f.plain_events(requests))?;
        let circumstances = Circumstances::now();
        let of_line = requests * peers.iter().filter(|p| **p != "criu").count();
        let mut lines: Vec<_> =
            bench.functions.iter().map(|f| bench.view.line(f.name.as_str(), of_line)).collect();
        let mut functions = Vec::new();
        for ((function, cases), line) in bench.functions.iter().zip(&cases).zip(&mut lines) {
            let mut course = Course { bench: &bench, function, line, checked: Checked::default() };
            let peers = course.run(&peers, sandboxes, cases);
            let checked = course.checked;
            line.done(if checked.problem.is_none() { "done" } else { "failed" });
            functions.push(FunctionReport { name: function.name.clone(), peers, checked });
            if bench.platform.interrupted() {
                break;
            }
        }
        let circumstances = circumstances.until_now();
        bench.close()?;
        let report = Report { functions, sandboxes, cycles, circumstances };
        self.front.publish(&report, &report.circumstances, || report.human())?;
        conclude(report.functions.iter().map(|f| (f.name.as_str(), &f.checked)))
    }
}

/// One function's way through the measurement.
struct Course<'a> {
    bench: &'a Bench,
    function: &'a Example,
    line: &'a mut Line,
    checked: Checked,
}

impl Course<'_> {
    fn run(&mut self, peers: &[&'static str], sandboxes: usize, cases: &[Case]) -> Vec<PeerReport> {
        let mut reports = Vec::new();
        for &peer in peers {
            if self.bench.platform.interrupted() {
                break;
            }
            self.line.step(peer);
            let report = |reason, figures: Option<Figures>| PeerReport {
                peer,
                available: figures.is_some(),
                reason,
                figures,
            };
            let bench = self.bench;
            reports.push(match start(peer, bench) {
                Err(error) => report(Some(format!("{error:#}")), None),
                Ok(mut keeping) => match self.measure(&mut *keeping, sandboxes, cases) {
                    Ok(figures) => report(None, Some(figures)),
                    Err(error) => {
                        let reason = format!("{error:#}");
                        self.checked.problem.get_or_insert(format!("{peer}: {reason}"));
                        // What is left may be frozen; the next way begins with none.
                        let _ = bench.purge(self.function);
                        report(Some(reason), None)
                    }
                },
            });
        }
        reports
    }

    fn measure(&mut self, keeping: &mut dyn Keeping, n: usize, cases: &[Case]) -> Result<Figures> {
        let (first, cycled) = cases.split_at(2 * n);
        let mut all = Vec::with_capacity(n);
        for cases in first.chunks_exact(2) {
            let sandbox = self.start()?;
            keeping.prepare(&sandbox)?;
            for case in cases {
                self.call(&sandbox, case)?;
            }
            all.push(sandbox);
        }
        std::thread::sleep(PAUSE);
        for sandbox in &all {
            keeping.put_away(sandbox)?;
        }
        keeping.settle(true)?;
        let kept_bytes = self.kept(keeping, n)?;
        let last = all.last().context("no sandbox")?;
        let (mut put_away, mut request) = (Vec::new(), Vec::new());
        for (cycle, case) in cycled.iter().enumerate() {
            // Nobody gets its request with caches still warm from being put away.
            self.bench.pause();
            let start = Instant::now();
            keeping.bring_back(last)?;
            self.call(last, case)?;
            let request_ms = start.elapsed().as_secs_f64() * 1e3;
            self.bench.pause();
            let start = Instant::now();
            keeping.put_away(last)?;
            let put_away_ms = start.elapsed().as_secs_f64() * 1e3;
            keeping.settle(false)?;
            if cycle >= UNMEASURED {
                request.push(request_ms);
                put_away.push(put_away_ms);
            }
        }
        for sandbox in &all {
            keeping.put_away_anew(sandbox)?;
        }
        let kept_bytes_after = self.kept(keeping, n)?;
        // The dead need not thaw first.
        self.bench.purge(self.function)?;
        Ok(Figures {
            note: keeping.note(),
            kept_bytes,
            kept_bytes_after,
            put_away_ms: Percentiles::of(&put_away),
            request_ms: Percentiles::of(&request),
        })
    }

    /// A new sandbox, which is the one used last until another is.
    fn start(&mut self) -> Result<Sandbox> {
        let id = self.bench.start_sandbox(self.function)?;
        let root = CgroupRoot::new(self.bench.platform.cgroup())?;
        Ok(Sandbox { id, cgroup: root.get(&id.to_string())? })
    }

    fn call(&mut self, sandbox: &Sandbox, case: &Case) -> Result<()> {
        let (answer, _) = self.bench.call(self.function, case, &mut self.checked)?;
        self.line.answered(1);
        ensure!(answer.sandbox == Some(sandbox.id), "another sandbox answered");
        Ok(())
    }

    /// What each of `n` sandboxes keeps.
    fn kept(&self, keeping: &mut dyn Keeping, n: usize) -> Result<u64> {
        let sandboxes = self.bench.sandboxes(self.function)?;
        ensure!(sandboxes.len() == n, "{} sandboxes instead of {n}", sandboxes.len());
        let charged: u64 = sandboxes.iter().map(|s| s.memory_total).sum();
        Ok((charged + keeping.store_bytes()?) / n as u64)
    }
}

impl Report {
    fn human(&self) -> String {
        let header =
            ["FUNCTION", "KEPT BY", ">MB EACH", ">p50 ms", ">p90 ms", ">p99 ms", ">PUT AWAY ms"];
        let rows = self.functions.iter().flat_map(|f| {
            f.peers.iter().map(|peer| {
                let ms = |p: Option<Percentiles>, value: fn(&Percentiles) -> f64| {
                    p.as_ref().map_or_else(|| "-".into(), |p| format!("{:.2}", value(p)))
                };
                let figures = peer.figures.as_ref();
                let request = figures.and_then(|f| f.request_ms);
                vec![
                    f.name.to_string(),
                    peer.peer.to_owned(),
                    figures.map_or_else(
                        || "-".into(),
                        |f| format!("{:.2}", f.kept_bytes_after as f64 / 1e6),
                    ),
                    ms(request, |p| p.p50),
                    ms(request, |p| p.p90),
                    ms(request, |p| p.p99),
                    ms(figures.and_then(|f| f.put_away_ms), |p| p.p50),
                ]
            })
        });
        let mut out = table(&header, rows);
        out.push_str(&format!(
            "\nMB EACH: what one idle sandbox is charged for, and its share of what is kept for all {} \
             elsewhere,\nat the end. ms: whole requests, bringing the sandbox back included.\n\n",
            self.sandboxes
        ));
        for peer in self.functions.first().into_iter().flat_map(|f| &f.peers) {
            let note = peer.figures.as_ref().map(|f| f.note.as_str());
            let reason = peer.reason.as_deref().unwrap_or("?");
            let note = note.map_or_else(|| format!("not here: {reason}"), str::to_owned);
            out.push_str(&format!("{:10} {note}\n", peer.peer));
        }
        out
    }
}
