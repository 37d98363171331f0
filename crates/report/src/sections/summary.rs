//! The figures that matter most, and how they were come by.

use medes_simulator::{Experiment, Run};

use super::{FIXED, Pool, change, less, pools};
use crate::paper;
use crate::scale::short;
use crate::svg::escape;

fn cold(run: &Run) -> f64 {
    run.result.starts.cold as f64
}

/// The factor by which a function's 99.9th percentile is better, with the function's name, the best
/// first. Functions with too few requests for such a percentile are left out.
pub(super) fn tail_factors(own: &Run, other: &Run) -> Vec<(String, f64, f64, f64)> {
    let mut list: Vec<_> = own
        .result
        .functions
        .iter()
        .filter(|f| f.starts.total() >= 1_000)
        .filter_map(|f| {
            let theirs = other.result.functions.iter().find(|o| o.name == f.name)?;
            let (a, b) = (f.end_to_end.p999_ms, theirs.end_to_end.p999_ms);
            (a > 0.0).then(|| (f.name.clone(), b / a, a, b))
        })
        .collect();
    list.sort_by(|a, b| b.1.total_cmp(&a.1));
    list
}

/// The least mean memory of a Medes run whose mean startup is no longer than that of fixed
/// keep-alive with its usual ten minutes, and that one's memory.
pub(super) fn same_latency(runs: &[Run]) -> Option<(&Run, &Run)> {
    let trade: Vec<_> = runs
        .iter()
        .filter(|r| matches!(&r.experiment, Experiment::Sweep { parameter, .. } if parameter == "trade-off"))
        .collect();
    let fixed = trade.iter().copied().find(|r| {
        r.label == FIXED
            && matches!(
                r.result.config.policy,
                medes_simulator::PolicyConfig::FixedKeepAlive { keep_alive_ms: 600_000 }
            )
    })?;
    let best = trade
        .into_iter()
        .filter(|r| r.label != FIXED && r.result.startup.mean_ms <= fixed.result.startup.mean_ms)
        .min_by(|a, b| a.result.memory.mean.total_cmp(&b.result.memory.mean))?;
    Some((best, fixed))
}

struct Row {
    what: String,
    paper: String,
    ours: String,
}

fn rows(runs: &[Run]) -> Vec<Row> {
    let pools = pools(runs, false);
    let mut rows = Vec::new();
    let find = |pressure: &str| pools.iter().find(|p| p.pressure == pressure);
    for (pressure, percent) in paper::COLD_AGAINST_FIXED {
        let Some(pool) = find(pressure) else { continue };
        let (Some(own), Some(fixed)) = (pool.ours(), pool.fixed()) else { continue };
        let l = less(cold(own), cold(fixed));
        rows.push(Row {
            what: format!("cold starts against fixed keep-alive, {pressure}"),
            paper: change(percent),
            ours: change(l),
        });
    }
    let against_adaptive = |pool: &Pool<'_>| {
        let (own, adaptive) = (pool.ours()?, pool.of("Adaptive")?);
        Some(less(cold(own), cold(adaptive)))
    };
    if let Some(l) = find("medium pressure").and_then(against_adaptive) {
        rows.push(Row {
            what: "cold starts against adaptive keep-alive, medium pressure".to_owned(),
            paper: change(paper::COLD_AGAINST_ADAPTIVE),
            ours: change(l),
        });
    }
    let tails = |pool: &Pool<'_>| Some(tail_factors(pool.ours()?, pool.fixed()?));
    if let Some((_, factor, ..)) =
        find("extreme pressure").and_then(tails).and_then(|l| l.into_iter().next())
    {
        rows.push(Row {
            what: "99.9th percentile end to end, best function, extreme pressure".to_owned(),
            paper: format!("{}\u{d7}", paper::TAIL_FACTOR),
            ours: format!("{factor:.1}\u{d7}"),
        });
    }
    if let Some((own, fixed)) = same_latency(runs) {
        let l = less(own.result.memory.mean, fixed.result.memory.mean);
        rows.push(Row {
            what: "memory at the same mean startup latency, against fixed keep-alive".to_owned(),
            paper: change(paper::MEMORY_SAVED),
            ours: change(l),
        });
    }
    rows
}

/// The figures that matter most.
pub(super) fn tiles(runs: &[Run]) -> Option<String> {
    let rows = rows(runs);
    if rows.is_empty() {
        return None;
    }
    let mut out = String::from("<div class=\"tiles\">");
    for row in rows {
        out.push_str(&format!(
            "<div class=\"tile\"><b>{}</b><span>{}</span><i>the paper: {}</i></div>",
            row.ours,
            escape(&row.what),
            row.paper
        ));
    }
    out.push_str("</div>");
    Some(out)
}

/// The same as a table.
pub(super) fn beside_the_paper(runs: &[Run]) -> Option<String> {
    let paper_runs = pools(runs, true);
    if paper_runs.is_empty() {
        return None;
    }
    let ours = pools(runs, false);
    let mut out = String::from(
        "<section><h2>Beside the paper</h2><p>Cold starts against fixed keep-alive of ten minutes. \
         First what the paper reports; then its policy and ours, simulated with the times and sizes \
         that it measured, and with those measured here.</p><div class=\"scroll\"><table><tr>\
         <th>pool</th><th>the paper</th><th>its policy,<br>its costs</th><th>our policy,<br>its \
         costs</th><th>its policy,<br>our costs</th><th>our policy,<br>our costs</th></tr>",
    );
    for (pressure, percent) in paper::COLD_AGAINST_FIXED {
        let cell = |pools: &[Pool<'_>], label: &str| {
            let found = pools
                .iter()
                .find(|p| p.pressure == pressure)
                .and_then(|p| Some(less(cold(p.of(label)?), cold(p.fixed()?))));
            found.map_or("<td>\u{2013}</td>".to_owned(), |l| {
                let class = if l >= percent {
                    "good"
                } else if l < 0.0 {
                    "bad"
                } else {
                    ""
                };
                format!("<td class=\"{class}\">{}</td>", change(l))
            })
        };
        out.push_str(&format!(
            "<tr><td>{pressure}</td><td>{}</td>{}{}{}{}</tr>",
            change(percent),
            cell(&paper_runs, "Medes P1, paper"),
            cell(&paper_runs, "Medes P2"),
            cell(&ours, "Medes P1, paper"),
            cell(&ours, "Medes P2"),
        ));
    }
    out.push_str(
        "</table></div><p class=\"note\">The paper played one-hour Azure traces on ten \
                  functions; the trace here is another, so the first column is for orientation.</p>\
                  </section>",
    );
    Some(out)
}

/// What the results stand on.
pub(super) fn method(runs: &[Run]) -> Option<String> {
    let run = runs.first()?;
    let r = &run.result;
    let c = &r.config;
    let requests: u64 = runs.iter().map(|r| r.result.starts.total()).sum();
    let wall: f64 = runs.iter().map(|r| r.result.wall_s).sum();
    let mut profiles: Vec<&str> = runs.iter().map(|r| r.result.profile.as_str()).collect();
    profiles.dedup();
    profiles.sort_unstable();
    profiles.dedup();
    let mut out = String::from("<section><h2>What this stands on</h2><p>");
    out.push_str(&format!(
        "Arrivals: {} (seed {}). The second inside a minute is drawn from the seed: uniform, and \
         evenly spread for timers. ",
        escape(&r.trace.path),
        c.seed
    ));
    out.push_str(
        "Every decision over a sandbox is made by the code that a live controller runs. \
                  Processors are not simulated: requests don't slow each other down.</p>",
    );
    for (n, what) in r.trace.repairs.list() {
        out.push_str(&format!("<p class=\"note\">Repaired in the trace: {n} {what}.</p>"));
    }
    for profile in profiles {
        out.push_str(&format!("<p class=\"note\">Times and sizes: {}.</p>", escape(profile)));
    }
    out.push_str(&format!(
        "<p class=\"note\">{} simulated requests in {} s of one processor: {} a second.</p></section>",
        short(requests as f64),
        short(wall),
        short(requests as f64 / wall.max(1e-9))
    ));
    Some(out)
}
