//! Memory and sandboxes over time.

use medes_simulator::{Run, Sample};

use super::pools;
use crate::chart::{Axes, stacked};
use crate::scale::{Scale, short};
use crate::svg::escape;

/// A layer of a stack: the class that colours it, and its height.
type Layer = (&'static str, fn(&Sample) -> f64);

fn panel(run: &Run, title: &str, most: f64, layers: &[Layer]) -> String {
    // More samples than pixels tell nothing.
    let every = (run.result.timeline.len() / 240).max(1);
    let samples: Vec<&Sample> = run.result.timeline.iter().step_by(every).collect();
    let at: Vec<f64> = samples.iter().map(|s| s.at_s / 3_600.0).collect();
    let layers: Vec<_> = layers
        .iter()
        .map(|(class, value)| (*class, samples.iter().map(|s| value(s)).collect()))
        .collect();
    let axes = Axes {
        title,
        x: "hours",
        y: "",
        x_scale: Scale::exact(0.0, at.last().copied().unwrap_or(1.0)),
        y_scale: Scale::linear(0.0, most),
        size: (480.0, 240.0),
        y_text: short,
    };
    format!("<div class=\"card\"><h3>{}</h3>{}</div>", escape(title), stacked(&axes, &at, &layers))
}

/// Memory and sandboxes by state, over time.
pub(super) fn over_time(runs: &[Run]) -> Option<String> {
    let pools = pools(runs, false);
    let mut out = String::from(
        "<section><h2>Memory over time</h2><p>What sandboxes use, in GB, and how many there are. With \
         dedup the same memory holds several times as many.</p><ul class=\"legend\">\
         <li style=\"--k:var(--fixed)\">warm and running</li><li style=\"--k:var(--p1)\">dedup</li>\
         <li style=\"--k:var(--greedy)\">base snapshots</li></ul>",
    );
    let bytes: [Layer; 3] = [
        ("s-fixed", |s| s.warm_bytes as f64 / 1e9),
        ("s-p1", |s| s.dedup_bytes as f64 / 1e9),
        ("s-base", |s| s.base_bytes as f64 / 1e9),
    ];
    let counts: [Layer; 2] =
        [("s-fixed", |s| f64::from(s.warm + s.running)), ("s-p1", |s| f64::from(s.dedup))];
    let mut any = false;
    for pool in pools.iter().filter(|p| matches!(p.pressure, "no limit" | "extreme pressure")) {
        let (Some(own), Some(fixed)) = (pool.ours(), pool.fixed()) else { continue };
        any = true;
        let most = |value: fn(&Sample) -> f64| {
            let all = own.result.timeline.iter().chain(&fixed.result.timeline);
            all.map(value).fold(0.0, f64::max)
        };
        let most_bytes = most(|s| (s.warm_bytes + s.dedup_bytes + s.base_bytes) as f64 / 1e9);
        let most_count = most(|s| f64::from(s.warm + s.running + s.dedup));
        out.push_str("<div class=\"grid\">");
        for run in [fixed, own] {
            let title = format!("GB, {}: {}", run.label, pool.title().to_lowercase());
            out.push_str(&panel(run, &title.replace("gb", "GB"), most_bytes, &bytes));
        }
        for run in [fixed, own] {
            let title = format!("Sandboxes, {}: {}", run.label, pool.title().to_lowercase());
            out.push_str(&panel(run, &title.replace("gb", "GB"), most_count, &counts));
        }
        out.push_str("</div>");
    }
    out.push_str("</section>");
    any.then_some(out)
}
