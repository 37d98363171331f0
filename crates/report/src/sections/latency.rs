//! How long requests took.

use medes_simulator::Run;

use super::summary::tail_factors;
use super::{class, legend, ms, pools};
use crate::chart::{Axes, Series, lines};
use crate::scale::{Scale, short};
use crate::svg::escape;

/// The tail of a distribution is drawn by the number of nines.
fn nines(share: f64) -> f64 {
    -(1.0 - share).max(1e-7).log10()
}

fn nines_text(n: f64) -> String {
    let digits = (n.round() as usize).saturating_sub(2);
    format!("{:.digits$} %", (1.0 - 10f64.powf(-n)) * 100.0)
}

/// Distributions of latency on each pool.
pub(super) fn distributions(runs: &[Run]) -> Option<String> {
    let pools = pools(runs, false);
    let first = pools.first()?;
    let mut out = format!(
        "<section><h2>Latency</h2><p>The share of requests answered within a time, from arrival to \
         answer. The scale goes by nines, so that the slowest thousandth is as wide as the half \
         before it: where curves part, requests wait for starts.</p>{}<div class=\"grid\">",
        legend(first.runs.iter().map(|r| r.label.as_str()))
    );
    for pool in &pools {
        let series: Vec<Series> = pool
            .runs
            .iter()
            .map(|run| Series {
                label: run.label.clone(),
                class: class(&run.label),
                points: run
                    .result
                    .end_to_end_curve
                    .iter()
                    .filter(|(_, share)| *share >= 0.2)
                    .map(|(ms, share)| (*ms, nines(*share)))
                    .collect(),
                dots: false,
                line: true,
            })
            .collect();
        let all = || series.iter().flat_map(|s| &s.points);
        let least = all().map(|p| p.0).fold(f64::INFINITY, f64::min);
        let most = all().filter(|p| p.1 <= 5.0).map(|p| p.0).fold(1.0, f64::max);
        let axes = Axes {
            title: &format!("Latency, {}", pool.title()),
            x: "ms",
            y: "answered",
            x_scale: Scale::logarithmic(least, most),
            y_scale: Scale::exact(0.0, 5.0),
            size: (480.0, 280.0),
            y_text: nines_text,
        };
        out.push_str(&format!(
            "<div class=\"card\"><h3>{}</h3>{}</div>",
            escape(&pool.title()),
            lines(&axes, &series)
        ));
    }
    out.push_str("</div></section>");
    Some(out)
}

/// By how much each request was answered sooner than with fixed keep-alive.
pub(super) fn improvements(runs: &[Run]) -> Option<String> {
    let pools = pools(runs, false);
    if !pools.iter().any(|p| p.runs.iter().any(|r| r.improvement.is_some())) {
        return None;
    }
    let mut out = String::from(
        "<section><h2>Request by request</h2><p>The same requests with fixed keep-alive and with \
         another policy on the same pool: how many were answered at least a tenth sooner, how many \
         later, and by what factor the luckiest and unluckiest fared.</p><div class=\"scroll\">\
         <table><tr><th>pool</th><th style=\"text-align:left\">policy</th><th>sooner</th><th>later</th><th>worst 0.1 %</th>\
         <th>best 1 %</th><th>best 0.1 %</th><th>best 0.01 %</th></tr>",
    );
    for pool in pools.iter().filter(|p| p.bytes > 0 || pools.len() == 1) {
        let mut name = escape(&pool.title());
        for run in &pool.runs {
            let Some(i) = &run.improvement else { continue };
            let at = |q: f64| {
                let factor = i.quantiles.iter().find(|(share, _)| (share - q).abs() < 1e-9);
                factor.map_or("\u{2013}".to_owned(), |(_, f)| format!("{}\u{d7}", short(*f)))
            };
            out.push_str(&format!(
                "<tr><td>{name}</td><td style=\"text-align:left\">{}</td><td>{} %</td><td>{} %</td>\
                 <td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(&run.label),
                short(i.sooner * 100.0),
                short(i.later * 100.0),
                at(0.001),
                at(0.99),
                at(0.999),
                at(0.9999),
            ));
            name = String::new();
        }
    }
    out.push_str("</table></div></section>");
    Some(out)
}

/// The 99.9th percentile of single functions.
pub(super) fn tails(runs: &[Run]) -> Option<String> {
    let pools = pools(runs, false);
    let pool = pools.iter().filter(|p| p.bytes > 0).min_by_key(|p| p.bytes)?;
    let (own, fixed) = (pool.ours()?, pool.fixed()?);
    let list = tail_factors(own, fixed);
    if list.is_empty() {
        return None;
    }
    let mut out = format!(
        "<section><h2>The slowest thousandth</h2><p>99.9th percentiles from arrival to answer, {}: \
         the functions that gained most from {}, and those that gained least, of {} with at least a \
         thousand requests.</p><div class=\"scroll\"><table><tr><th>function</th><th>fixed \
         keep-alive</th><th>{}</th><th>factor</th></tr>",
        escape(&pool.title().to_lowercase().replace("gb", "GB")),
        escape(&own.label),
        list.len(),
        escape(&own.label)
    );
    let ends = 6.min(list.len() / 2).max(1);
    let shown =
        list.iter().take(ends).chain(list.iter().skip(list.len().saturating_sub(ends).max(ends)));
    for (name, factor, ours, theirs) in shown {
        let class = if *factor >= 1.05 {
            "good"
        } else if *factor < 0.95 {
            "bad"
        } else {
            ""
        };
        let profile = own.result.functions.iter().find(|f| f.name == *name);
        let profile = profile.map_or("", |f| f.profile.as_str());
        let short_name: String = name.chars().take(10).collect();
        out.push_str(&format!(
            "<tr><td>{} <span class=\"note\">{}</span></td><td>{}</td><td>{}</td><td class=\"{class}\">{factor:.2}\u{d7}</td></tr>",
            escape(&short_name),
            escape(profile),
            ms(*theirs),
            ms(*ours),
        ));
    }
    out.push_str("</table></div></section>");
    Some(out)
}
