//! Live runs beside their simulations.

use medes_simulator::{Experiment, LatencySummary, Run, Validation};

use super::ms;
use crate::svg::escape;

/// A table for each live run that was simulated.
pub(super) fn side_by_side(runs: &[Run]) -> Option<String> {
    let all: Vec<_> = runs
        .iter()
        .filter_map(|r| match &r.experiment {
            Experiment::Validation(v) => Some((r, v.as_ref())),
            _ => None,
        })
        .collect();
    if all.is_empty() {
        return None;
    }
    let mut out = String::from(
        "<section><h2>Live and simulated</h2><p>The same requests, sent to real functions on a \
         running platform and simulated on one node: which sandboxes they found, and how long they \
         took.</p>",
    );
    for (run, v) in all {
        out.push_str(&one(run, v));
    }
    out.push_str("</section>");
    Some(out)
}

fn one(run: &Run, v: &Validation) -> String {
    let mut out = format!(
        "<h3>{}, times {}</h3><div class=\"scroll\"><table><tr><th></th><th>live</th>\
         <th>simulated</th></tr>",
        escape(&run.label),
        if v.calibrated { "of the live run" } else { "of the profile" }
    );
    let mut row = |what: &str, live: String, simulated: String| {
        out.push_str(&format!("<tr><td>{what}</td><td>{live}</td><td>{simulated}</td></tr>"));
    };
    let (live, simulated) = (v.live.starts, v.simulated.starts);
    for (what, live, simulated) in [
        ("requests", live.total(), simulated.total()),
        ("cold starts", live.cold, simulated.cold),
        ("warm starts", live.warm, simulated.warm),
        ("dedup starts", live.dedup, simulated.dedup),
    ] {
        row(what, live.to_string(), simulated.to_string());
    }
    for ((what, live), (_, simulated)) in v.live.times().into_iter().zip(v.simulated.times()) {
        for ((share, live), (_, simulated)) in shares(&live).into_iter().zip(shares(&simulated)) {
            row(&format!("{what}, {share}"), live, simulated);
        }
    }
    out.push_str(&format!(
        "</table></div><p class=\"note\">{}. Of {} requests on both sides {:.1} % found the same \
         kind of sandbox. Startup is all that is not execution, the HTTP API included.</p>",
        escape(&v.origin),
        v.compared,
        v.same_start * 100.0
    ));
    out
}

fn shares(l: &LatencySummary) -> [(&'static str, String); 4] {
    [
        ("median", l.p50_ms),
        ("90th percentile", l.p90_ms),
        ("99th percentile", l.p99_ms),
        ("99.9th percentile", l.p999_ms),
    ]
    .map(|(share, at)| (share, if l.count == 0 { "\u{2013}".to_owned() } else { ms(at) }))
}
