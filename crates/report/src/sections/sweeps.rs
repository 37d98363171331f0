//! One setting varied.

use medes_simulator::{Experiment, Run, SimulationResult};

use super::summary::same_latency;
use super::{change, class, legend, less, ms};
use crate::chart::{Axes, Series, lines};
use crate::scale::{Scale, short};
use crate::svg::escape;

type Value = fn(&SimulationResult) -> f64;
/// A setting: its name in runs, its title, its unit, and what is drawn over it.
type Sweep<'a> = (&'a str, &'a str, &'a str, &'a [(&'a str, Value)]);

fn of<'a>(runs: &'a [Run], wanted: &'a str) -> impl Iterator<Item = (f64, &'a Run)> {
    runs.iter().filter_map(move |r| match &r.experiment {
        Experiment::Sweep { parameter, value, .. } if parameter == wanted => Some((*value, r)),
        _ => None,
    })
}

fn labels<'a>(runs: impl Iterator<Item = (f64, &'a Run)>) -> Vec<&'a str> {
    let mut labels: Vec<&str> = Vec::new();
    for (_, run) in runs {
        if !labels.contains(&run.label.as_str()) {
            labels.push(&run.label);
        }
    }
    labels
}

fn cold(r: &SimulationResult) -> f64 {
    r.starts.cold as f64
}

fn gigabytes(r: &SimulationResult) -> f64 {
    r.memory.mean / 1e9
}

fn startup(r: &SimulationResult) -> f64 {
    r.startup.mean_ms
}

fn tail(r: &SimulationResult) -> f64 {
    r.end_to_end.p999_ms
}

fn chart(runs: &[Run], parameter: &str, x: &str, y: &str, value: Value) -> String {
    let series: Vec<Series> = labels(of(runs, parameter))
        .into_iter()
        .map(|label| Series {
            label: label.to_owned(),
            class: class(label),
            points: of(runs, parameter)
                .filter(|(_, r)| r.label == label)
                .map(|(v, r)| (v, value(&r.result)))
                .collect(),
            dots: true,
            line: true,
        })
        .collect();
    let all = || series.iter().flat_map(|s| &s.points);
    let least = all().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let most = all().map(|p| p.0).fold(0.0, f64::max);
    let highest = all().map(|p| p.1).fold(0.0, f64::max);
    let lowest = all().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let y_scale = if lowest > 0.0 && highest / lowest > 30.0 {
        Scale::logarithmic(lowest, highest)
    } else {
        Scale::linear(0.0, highest)
    };
    let axes = Axes {
        title: &format!("{y} by {x}"),
        x,
        y,
        x_scale: Scale::logarithmic(least, most),
        y_scale,
        size: (400.0, 240.0),
        y_text: short,
    };
    lines(&axes, &series)
}

/// Each setting that was varied.
pub(super) fn all(runs: &[Run]) -> Option<String> {
    let sweeps: [Sweep<'_>; 5] = [
        (
            "pool",
            "Memory of the pool",
            "GB",
            &[("cold starts", cold), ("startup, mean ms", startup), ("99.9 %, ms", tail)],
        ),
        (
            "keep-alive",
            "Keep-alive period",
            "minutes",
            &[("cold starts", cold), ("startup, mean ms", startup), ("memory, GB", gigabytes)],
        ),
        (
            "keep-dedup",
            "Keep-dedup period",
            "minutes",
            &[("cold starts", cold), ("startup, mean ms", startup), ("memory, GB", gigabytes)],
        ),
        (
            "alpha",
            "Latency target",
            "\u{3b1}",
            &[("cold starts", cold), ("startup, mean ms", startup), ("memory, GB", gigabytes)],
        ),
        (
            "T",
            "Dedup sandboxes per base snapshot",
            "T",
            &[
                ("base snapshots, GB", |r| r.memory.mean_base / 1e9),
                ("restores from another node", |r| r.remote_restores as f64),
                ("startup, mean ms", startup),
            ],
        ),
    ];
    let mut out = String::from(
        "<section><h2>Settings</h2><p>One setting varied, the others as usual. Pools of 30 GB, but for \
         \u{3b1}, which has no limit.</p>",
    );
    let mut any = false;
    for (parameter, title, unit, values) in sweeps {
        let labels = labels(of(runs, parameter));
        if labels.is_empty() {
            continue;
        }
        any = true;
        out.push_str(&format!(
            "<h3 style=\"margin-top:26px\">{title}</h3>{}<div class=\"grid three\">",
            legend(labels)
        ));
        for (y, value) in values {
            out.push_str(&format!(
                "<div class=\"card\">{}</div>",
                chart(runs, parameter, unit, y, *value)
            ));
        }
        out.push_str("</div>");
    }
    out.push_str("</section>");
    any.then_some(out)
}

/// Memory against latency.
pub(super) fn trade_off(runs: &[Run]) -> Option<String> {
    let labels = labels(of(runs, "trade-off"));
    if labels.is_empty() {
        return None;
    }
    let series = |y: Value| -> Vec<Series> {
        labels
            .iter()
            .map(|label| {
                let mut points: Vec<_> = of(runs, "trade-off")
                    .filter(|(_, r)| r.label == **label)
                    .map(|(_, r)| (gigabytes(&r.result), y(&r.result)))
                    .collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                Series {
                    label: (*label).to_owned(),
                    class: class(label),
                    points,
                    dots: true,
                    line: label.starts_with("Fixed"),
                }
            })
            .collect()
    };
    let mut out = String::from(
        "<section><h2>What latency costs</h2><p>Each dot is one setting, on a pool without a limit: \
         down and left is better. ",
    );
    if let Some((own, fixed)) = same_latency(runs) {
        out.push_str(&format!(
            "Fixed keep-alive of ten minutes comes to a mean startup of {} with {} GB; {} comes to {} \
             with {} GB: {}.",
            ms(fixed.result.startup.mean_ms),
            short(gigabytes(&fixed.result)),
            escape(&own.label),
            ms(own.result.startup.mean_ms),
            short(gigabytes(&own.result)),
            change(less(own.result.memory.mean, fixed.result.memory.mean)),
        ));
    }
    out.push_str(&format!("</p>{}<div class=\"grid\">", legend(labels.iter().copied())));
    for (title, y, value) in [
        ("Mean startup", "startup, mean ms", startup as Value),
        ("Cold starts", "cold starts", cold as Value),
    ] {
        let series = series(value);
        let all = || series.iter().flat_map(|s| &s.points);
        let axes = Axes {
            title,
            x: "memory, mean GB",
            y,
            x_scale: Scale::linear(0.0, all().map(|p| p.0).fold(0.0, f64::max)),
            y_scale: Scale::linear(0.0, all().map(|p| p.1).fold(0.0, f64::max)),
            size: (480.0, 290.0),
            y_text: short,
        };
        out.push_str(&format!(
            "<div class=\"card\"><h3>{title}</h3>{}</div>",
            lines(&axes, &series)
        ));
    }
    out.push_str("</div></section>");
    Some(out)
}
