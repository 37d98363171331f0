//! The page's sections.

mod latency;
mod memory;
mod pools;
mod summary;
mod sweeps;
mod validation;

use medes_simulator::{Experiment, Run};

use crate::scale::short;

/// The policy that all others are compared with.
pub(crate) const FIXED: &str = "Fixed keep-alive";
/// The improved policies; the first that there are results for stands for Medes.
const OURS: [&str; 3] = ["Medes P2", "Medes P1", "Medes, fixed periods"];

/// All sections that there are results for.
pub(crate) fn all(runs: &[Run]) -> Vec<String> {
    [
        summary::tiles(runs),
        summary::beside_the_paper(runs),
        pools::cold_starts(runs),
        pools::by_function(runs),
        latency::distributions(runs),
        latency::improvements(runs),
        latency::tails(runs),
        memory::over_time(runs),
        sweeps::trade_off(runs),
        sweeps::all(runs),
        pools::paper_costs(runs),
        validation::side_by_side(runs),
        summary::method(runs),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What was simulated, in a sentence.
pub(crate) fn subtitle(runs: &[Run]) -> String {
    let simulations = || runs.iter().filter(|r| !matches!(r.experiment, Experiment::Validation(_)));
    let Some(run) = simulations().next().or(runs.first()) else {
        return "<p>There are no results.</p>".to_owned();
    };
    let r = &run.result;
    let mut nodes: Vec<u32> = simulations().map(|r| r.result.config.nodes).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let nodes: Vec<String> = nodes.iter().map(u32::to_string).collect();
    format!(
        "<p>{} requests to {} functions over {} hours, simulated on {} node{}, in {} runs.</p>",
        short(r.starts.total() as f64),
        r.trace.functions,
        short(r.trace.length_s / 3_600.0),
        nodes.join(", "),
        if nodes == ["1"] { "" } else { "s" },
        simulations().count()
    )
}

/// The class that colours a policy.
pub(crate) fn class(label: &str) -> &'static str {
    match label {
        "Fixed keep-alive" => "s-fixed",
        "Adaptive" => "s-adaptive",
        "Greedy-dual" => "s-greedy",
        "Medes P1, paper" => "s-p1p",
        "Medes P2, paper" => "s-p2p",
        "Medes P1" => "s-p1",
        "Medes P2" => "s-p2",
        _ => "s-other",
    }
}

/// A legend for policies.
pub(crate) fn legend<'a>(labels: impl IntoIterator<Item = &'a str>) -> String {
    let mut out = String::from("<ul class=\"legend\">");
    for label in labels {
        let colour = class(label).replace("s-", "--");
        out.push_str(&format!(
            "<li style=\"--k:var({colour})\">{}</li>",
            crate::svg::escape(label)
        ));
    }
    out.push_str("</ul>");
    out
}

/// The runs on one pool.
pub(crate) struct Pool<'a> {
    pub(crate) pressure: &'a str,
    pub(crate) bytes: u64,
    pub(crate) runs: Vec<&'a Run>,
}

impl<'a> Pool<'a> {
    pub(crate) fn of(&self, label: &str) -> Option<&'a Run> {
        self.runs.iter().copied().find(|r| r.label == label)
    }

    pub(crate) fn fixed(&self) -> Option<&'a Run> {
        self.of(FIXED)
    }

    pub(crate) fn ours(&self) -> Option<&'a Run> {
        OURS.iter().find_map(|label| self.of(label))
    }

    pub(crate) fn title(&self) -> String {
        if self.bytes == 0 {
            "No limit".to_owned()
        } else {
            let mut pressure = self.pressure.to_owned();
            if let Some(first) = pressure.get_mut(..1) {
                first.make_ascii_uppercase();
            }
            format!("{pressure}: {} GB", short(self.bytes as f64 / 1e9))
        }
    }
}

/// The pools, in the order of their runs; with `paper` those with the paper's costs.
pub(crate) fn pools(runs: &[Run], paper: bool) -> Vec<Pool<'_>> {
    let mut pools: Vec<Pool<'_>> = Vec::new();
    for run in runs {
        let (pressure, bytes) = match &run.experiment {
            Experiment::Pool { pressure, bytes } if !paper => (pressure, *bytes),
            Experiment::Paper { pressure, bytes } if paper => (pressure, *bytes),
            _ => continue,
        };
        match pools.iter_mut().find(|p| p.pressure == pressure && p.bytes == bytes) {
            Some(pool) => pool.runs.push(run),
            None => pools.push(Pool { pressure, bytes, runs: vec![run] }),
        }
    }
    pools
}

/// By how many percent `own` is less than `other`; negative if it is more.
pub(crate) fn less(own: f64, other: f64) -> f64 {
    if other > 0.0 { (1.0 - own / other) * 100.0 } else { 0.0 }
}

/// A change as text: `-45 %`.
pub(crate) fn change(less_percent: f64) -> String {
    if less_percent >= 0.0 {
        format!("\u{2212}{less_percent:.0} %")
    } else {
        format!("+{:.0} %", -less_percent)
    }
}

/// Milliseconds as text.
pub(crate) fn ms(value: f64) -> String {
    if value >= 1_000.0 {
        format!("{} s", short(value / 1e3))
    } else {
        format!("{} ms", short(value))
    }
}
