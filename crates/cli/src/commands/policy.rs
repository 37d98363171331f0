//! `medes policy`: who decides over idle sandboxes, and why as it does.

use std::time::Duration;

use clap::{Args, Subcommand};
use medes_controller::{PolicyExplanation, PolicyOrigin, PolicyView};
use medes_core::FunctionName;
use medes_policy::{FunctionSettings, Model, PolicyName, PolicySettings, Target};
use serde_json::{Map, Value, json};

use super::functions::decode;
use super::{Global, function_name, policy_names};
use crate::failure::{Failure, Outcome};
use crate::output::{Format, megabytes, span, table};
use crate::units::{Period, Size};
use crate::wire::ms;

/// Show, change or explain the policy over idle sandboxes.
#[derive(Debug, Args)]
pub struct PolicyCommand {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Show(Show),
    Set(Box<Set>),
    Explain(Explain),
}

/// Show the policy in force, and the functions that have settings of their own.
#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    format: Format,
}

/// Change the policy, or what holds for one function, at once and over restarts.
///
/// What is not named stays as it is.
#[derive(Debug, Args)]
struct Set {
    /// Who decides from now on.
    #[arg(value_name = "POLICY", value_parser = policy_names(), conflicts_with = "function")]
    policy: Option<PolicyName>,
    /// Change what holds for this function alone.
    #[arg(long, value_name = "NAME", value_parser = function_name)]
    function: Option<FunctionName>,
    #[command(flatten)]
    settings: SettingFlags,
    /// The share of the memory that dedup keeps free ahead of time.
    #[arg(long, value_name = "PERCENT", conflicts_with = "function",
          value_parser = clap::value_parser!(u8).range(0..=50))]
    headroom: Option<u8>,
    /// Back to the configuration; with --function, nothing of its own any more.
    #[arg(long, conflicts_with_all = ["policy", "settings", "headroom"])]
    reset: bool,
    #[command(flatten)]
    format: Format,
}

/// Say what the policy decided for a function, from what numbers, and what another latency target
/// would cost.
#[derive(Debug, Args)]
struct Explain {
    /// The function.
    #[arg(value_parser = function_name)]
    function: FunctionName,
    #[command(flatten)]
    format: Format,
}

/// What can be set for all functions and for one alone.
#[derive(Clone, Debug, Default, Args)]
#[group(id = "settings", multiple = true)]
pub struct SettingFlags {
    /// Latency target: the multiple of a warm startup that the mean startup may be.
    #[arg(long, value_name = "X")]
    alpha: Option<f64>,
    /// Memory budget of the sandboxes.
    #[arg(long, value_name = "SIZE")]
    budget: Option<Size>,
    /// Warm without a request for this long: dedup, if the policy says so.
    #[arg(long, value_name = "TIME")]
    idle: Option<Period>,
    /// Warm without a request for this long: not any longer.
    #[arg(long, value_name = "TIME")]
    keep_alive: Option<Period>,
    /// Dedup for this long: purge.
    #[arg(long, value_name = "TIME")]
    keep_dedup: Option<Period>,
    /// How many times a usual function's waiting counts when memory is short; functions only.
    #[arg(long, value_name = "X")]
    priority: Option<f64>,
}

impl SettingFlags {
    /// The flags that were given, as the API takes them.
    pub fn given(&self) -> Map<String, Value> {
        let period = |p: Option<Period>| p.map(|p| json!(p.millis()));
        let all = [
            ("alpha", self.alpha.map(|x| json!(x))),
            ("budget", self.budget.map(|s| json!(s.0))),
            ("idle_ms", period(self.idle)),
            ("keep_alive_ms", period(self.keep_alive)),
            ("keep_dedup_ms", period(self.keep_dedup)),
            ("priority", self.priority.map(|x| json!(x))),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }
}

impl PolicyCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the platform does not answer, or does not take the change.
    pub fn run(self, global: &Global) -> Outcome {
        let client = global.client()?;
        match self.command {
            Command::Show(c) => {
                let value: Value = client.get("/v1/policy")?;
                let view: PolicyView = decode(&value)?;
                c.format.print(&value, || shown(&view));
            }
            Command::Set(c) => return c.run(global),
            Command::Explain(c) => {
                let value: Value = client.get(&format!("/v1/functions/{}/policy", c.function))?;
                let explanation: PolicyExplanation = decode(&value)?;
                c.format.print(&value, || explained(&explanation));
            }
        }
        Ok(())
    }
}

impl Set {
    fn run(self, global: &Global) -> Outcome {
        let client = global.client()?;
        let mut change = self.settings.given();
        if self.function.is_none() && self.settings.priority.is_some() {
            return Err(Failure::Usage("--priority is for one function: add --function".into()));
        }
        change.extend(self.policy.map(|name| ("name".to_owned(), json!(name))));
        change.extend(self.headroom.map(|n| ("headroom_percent".to_owned(), json!(n))));
        if change.is_empty() && !self.reset {
            return Err(Failure::Usage(
                "nothing to change; `medes policy set --help` shows what there is".into(),
            ));
        }
        let path = match &self.function {
            Some(name) => format!("/v1/functions/{name}/policy"),
            None => "/v1/policy".to_owned(),
        };
        if self.reset {
            client.delete(&path)?;
        } else {
            let _: Value = client.put(&path, &change)?;
        }
        let value: Value = client.get("/v1/policy")?;
        let view: PolicyView = decode(&value)?;
        self.format.print(&value, || shown(&view));
        Ok(())
    }
}

fn shown(view: &PolicyView) -> String {
    let p = &view.policy;
    let origin = match view.origin {
        PolicyOrigin::Configuration => "as configured".to_owned(),
        PolicyOrigin::Live => {
            format!("set live; the configuration says {}", view.configured.name)
        }
    };
    let mut out = format!("policy      {} ({origin})\n", p.name);
    for (what, value) in figures(p) {
        out.push_str(&format!("{what:<12}{value}\n"));
    }
    if view.functions.is_empty() {
        return out;
    }
    out.push('\n');
    let header =
        ["FUNCTION", ">ALPHA", ">BUDGET", ">IDLE", ">KEEP-ALIVE", ">KEEP-DEDUP", ">PRIORITY"];
    let rows = view.functions.iter().map(|f| {
        let FunctionSettings { alpha, budget, idle_ms, keep_alive_ms, keep_dedup_ms, priority } =
            f.settings;
        let number = |x: Option<f64>| x.map_or("-".to_owned(), |x| x.to_string());
        let period = |t: Option<u64>| t.map_or("-".to_owned(), time);
        vec![
            f.function.to_string(),
            number(alpha),
            budget.map_or("-".to_owned(), megabytes),
            period(idle_ms),
            period(keep_alive_ms),
            period(keep_dedup_ms),
            number(priority),
        ]
    });
    out.push_str(&table(&header, rows));
    out
}

/// The figures that the policy makes use of.
fn figures(p: &PolicySettings) -> Vec<(&'static str, String)> {
    let mut list = Vec::new();
    if matches!(p.name, PolicyName::Latency | PolicyName::LatencyPaper) {
        list.push(("alpha", p.alpha.to_string()));
    }
    if matches!(p.name, PolicyName::Memory | PolicyName::MemoryPaper) {
        let budget = if p.budget == 0 { "all there is".to_owned() } else { megabytes(p.budget) };
        list.push(("budget", budget));
    }
    if p.config().build().dedups() {
        list.push(("idle", time(p.idle_ms)));
        list.push(("keep-alive", time(p.keep_alive_ms)));
        list.push(("keep-dedup", time(p.keep_dedup_ms)));
        list.push(("headroom", format!("{} %", p.headroom_percent)));
    } else if p.name == PolicyName::Fixed {
        list.push(("keep-alive", time(p.keep_alive_ms)));
    }
    list
}

/// A period as it is set or decided: to the millisecond below ten seconds.
fn time(millis: u64) -> String {
    if millis < 10_000 && !millis.is_multiple_of(1_000) {
        format!("{millis}ms")
    } else {
        span(ms(millis))
    }
}

fn explained(e: &PolicyExplanation) -> String {
    let x = &e.explanation;
    let mut out = format!(
        "{}: {} warm and {} dedup sandboxes under policy {}\n\n",
        e.function, x.population.warm, x.population.dedup, e.policy.name
    );
    out.push_str(&decision(e));
    if let Some(o) = &x.outlook {
        out.push_str(&format!(
            "Expected: {} for idle sandboxes, {} of startup a request.\n",
            megabytes(o.bytes as u64),
            seconds(o.startup)
        ));
    }
    let Some(m) = &x.model else {
        out.push_str("No request was served yet: there are no numbers to decide from.\n");
        return out;
    };
    out.push_str("\nFrom these numbers:\n");
    for (what, value) in numbers(m, x.known_reuses) {
        out.push_str(&format!("  {what:<10}{value}\n"));
    }
    if x.targets.is_empty() {
        out.push_str("\nToo few requests found an idle sandbox to say what a target would cost.\n");
    } else {
        out.push_str("\nLatency targets (policy `latency`, --alpha) and what they would cost:\n");
        out.push_str(&targets(&x.targets));
    }
    out
}

/// What was decided, in words.
fn decision(e: &PolicyExplanation) -> String {
    let x = &e.explanation;
    let mut out = String::new();
    if let Some(w) = x.windows.filter(|w| w.prewarm_ms > 0) {
        out.push_str(&format!(
            "An idle sandbox is ended at once; a new one is made {} after the last request and \
             kept for {}.\n",
            time(w.prewarm_ms),
            time(w.keep_ms)
        ));
    } else if let Some(keep) = x.keep {
        let then = if keep.purge_ms > keep.warm_ms {
            format!("then dedup until {} after its last request", time(keep.purge_ms))
        } else {
            "then it is ended".to_owned()
        };
        out.push_str(&format!("An idle sandbox stays warm for {}, {then}.\n", time(keep.warm_ms)));
    } else if e.policy.name == PolicyName::GreedyDual {
        out.push_str("An idle sandbox stays until its memory is needed.\n");
    }
    if let Some(split) = x.by_rate {
        let why = if split.feasible { "" } else { " (the target can't be met)" };
        out.push_str(&format!(
            "The paper's equations want {} warm and {} dedup{why}.\n",
            split.warm, split.dedup
        ));
    }
    if let Some(budget) = x.budget {
        out.push_str(&format!("Its part of the budget is {}.\n", megabytes(budget as u64)));
    }
    out
}

fn numbers(m: &Model, reuses: f64) -> [(&'static str, String); 5] {
    [
        (
            "requests",
            format!("{:.1} a minute, at most {:.0} in one", m.rate * 60.0, m.peak_rate * 60.0),
        ),
        ("execution", seconds(m.execution)),
        (
            "startup",
            format!(
                "warm {}, dedup {}, cold {}",
                seconds(m.warm_startup),
                seconds(m.dedup_startup),
                seconds(m.cold_startup)
            ),
        ),
        (
            "memory",
            format!(
                "warm {}, dedup {}, a restore {} more",
                megabytes(m.warm_bytes as u64),
                megabytes(m.dedup_bytes as u64),
                megabytes(m.restore_bytes as u64)
            ),
        ),
        ("reuses", format!("{reuses:.0} of idle sandboxes known")),
    ]
}

fn targets(targets: &[Target]) -> String {
    let header = [">ALPHA", ">WARM FOR", ">GONE AFTER", ">IDLE MEMORY", ">STARTUP"];
    table(
        &header,
        targets.iter().map(|t| {
            vec![
                t.alpha.to_string(),
                time(t.keep.warm_ms),
                time(t.keep.purge_ms),
                megabytes(t.outlook.bytes as u64),
                seconds(t.outlook.startup),
            ]
        }),
    )
}

fn seconds(s: f64) -> String {
    let t = Duration::from_secs_f64(s.max(0.0));
    if s >= 10.0 { span(t) } else { format!("{:.1} ms", s * 1e3) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use medes_policy::{Expected, Explanation, Keep, Population};

    fn explanation() -> PolicyExplanation {
        let keep = Keep { warm_ms: 180_000, purge_ms: 1_080_000 };
        let outlook = Expected { bytes: 12.3e6, startup: 0.0021 };
        PolicyExplanation {
            function: "f".parse().unwrap(),
            policy: PolicySettings { name: PolicyName::Latency, ..PolicySettings::default() },
            settings: FunctionSettings::default(),
            explanation: Explanation {
                population: Population { warm: 2, dedup: 3 },
                model: Some(Model {
                    rate: 0.2,
                    peak_rate: 0.7,
                    warm_startup: 0.001,
                    dedup_startup: 0.0136,
                    cold_startup: 0.19,
                    execution: 0.0052,
                    warm_bytes: 16.6e6,
                    dedup_bytes: 0.8e6,
                    restore_bytes: 0.5e6,
                }),
                keep: Some(keep),
                known_reuses: 34.0,
                outlook: Some(outlook),
                targets: vec![Target { alpha: 2.5, keep, outlook }],
                ..Explanation::default()
            },
        }
    }

    #[test]
    fn an_explanation_reads_as_text() {
        let text = explained(&explanation());
        for part in [
            "f: 2 warm and 3 dedup sandboxes under policy latency",
            "stays warm for 3m, then dedup until 18m after its last request",
            "12.0 a minute, at most 42 in one",
            "warm 1.0 ms, dedup 13.6 ms, cold 190.0 ms",
            "  2.5        3m         18m      12.3 MB   2.1 ms\n",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
    }

    #[test]
    fn what_is_not_known_yet_is_said() {
        let mut e = explanation();
        e.explanation.model = None;
        e.explanation.outlook = None;
        assert!(explained(&e).contains("No request was served yet"));
    }

    #[test]
    fn only_figures_that_are_used_are_shown() {
        let of = |name| {
            let p = PolicySettings { name, ..PolicySettings::default() };
            figures(&p).into_iter().map(|(what, _)| what).collect::<Vec<_>>()
        };
        assert_eq!(of(PolicyName::Fixed), ["keep-alive"]);
        assert_eq!(of(PolicyName::GreedyDual), [""; 0]);
        assert!(of(PolicyName::Latency).contains(&"alpha"));
        assert!(of(PolicyName::MemoryPaper).contains(&"budget"));
    }
}
