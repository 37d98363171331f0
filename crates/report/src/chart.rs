//! The kinds of charts.

use crate::scale::{Scale, short};
use crate::svg::{Anchor, Svg};

const LEFT: f64 = 52.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 38.0;

/// A line of a chart, or a set of dots.
pub(crate) struct Series {
    pub(crate) label: String,
    /// The class that colours it.
    pub(crate) class: &'static str,
    pub(crate) points: Vec<(f64, f64)>,
    /// Dots at the points.
    pub(crate) dots: bool,
    /// A line through them.
    pub(crate) line: bool,
}

/// What a chart has on its axes.
pub(crate) struct Axes<'a> {
    pub(crate) title: &'a str,
    pub(crate) x: &'a str,
    pub(crate) y: &'a str,
    pub(crate) x_scale: Scale,
    pub(crate) y_scale: Scale,
    pub(crate) size: (f64, f64),
    /// What stands at a mark of the y axis instead of its number.
    pub(crate) y_text: fn(f64) -> String,
}

impl Axes<'_> {
    /// Draws the axes, and gives back the drawing with both scales in place.
    fn begin(&self) -> (Svg, Scale, Scale) {
        let (width, height) = self.size;
        let mut svg = Svg::new(width, height, self.title);
        let x = self.x_scale.clone().on(LEFT, width - LEFT - RIGHT);
        let y = self.y_scale.clone().on(height - BOTTOM, -(height - TOP - BOTTOM));
        for value in y.ticks() {
            let at = y.at(value);
            svg.line("grid", (LEFT, at), (width - RIGHT, at));
            svg.text("tick", (LEFT - 6.0, at + 3.5), Anchor::End, &(self.y_text)(value));
        }
        for value in x.ticks() {
            let at = x.at(value);
            svg.line("mark", (at, height - BOTTOM), (at, height - BOTTOM + 4.0));
            svg.text("tick", (at, height - BOTTOM + 16.0), Anchor::Middle, &short(value));
        }
        svg.line("axis", (LEFT, height - BOTTOM), (width - RIGHT, height - BOTTOM));
        svg.text("axis-title", (width - RIGHT, height - 6.0), Anchor::End, self.x);
        svg.text("axis-title", (2.0, 9.0), Anchor::Start, self.y);
        (svg, x, y)
    }
}

/// Lines and dots.
pub(crate) fn lines(axes: &Axes<'_>, series: &[Series]) -> String {
    let (mut svg, x, y) = axes.begin();
    for s in series {
        let points: Vec<_> = s.points.iter().map(|(a, b)| (x.at(*a), y.at(*b))).collect();
        if s.line {
            svg.path(&format!("line {}", s.class), &points, &s.label);
        }
        if s.dots {
            for (place, (a, b)) in points.iter().zip(&s.points) {
                let title =
                    format!("{}: {} {}, {} {}", s.label, short(*a), axes.x, short(*b), axes.y);
                svg.dot(&format!("dot {}", s.class), *place, 3.5, &title);
            }
        }
    }
    svg.finish()
}

/// Areas on top of each other: for each a class and its heights at the places `x`.
pub(crate) fn stacked(axes: &Axes<'_>, at: &[f64], layers: &[(&'static str, Vec<f64>)]) -> String {
    let (mut svg, x, y) = axes.begin();
    let mut base = vec![0.0; at.len()];
    for (class, heights) in layers {
        let place = |values: &[f64]| -> Vec<_> {
            at.iter().zip(values).map(|(a, v)| (x.at(*a), y.at(*v))).collect()
        };
        let top: Vec<f64> = base.iter().zip(heights).map(|(a, b)| a + b).collect();
        svg.area(&format!("area {class}"), &place(&top), &place(&base));
        base = top;
    }
    svg.finish()
}

/// One bar of a bar chart.
pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) class: &'static str,
    pub(crate) value: f64,
    /// What stands at its end.
    pub(crate) text: String,
}

/// Lying bars, one below the other.
pub(crate) fn bars(title: &str, list: &[Bar], most: f64, width: f64) -> String {
    const ROW: f64 = 24.0;
    const NAME: f64 = 124.0;
    const TEXT: f64 = 96.0;
    let mut svg = Svg::new(width, ROW * list.len() as f64 + 4.0, title);
    let scale = Scale::exact(0.0, most).on(0.0, width - NAME - TEXT);
    for (i, bar) in list.iter().enumerate() {
        let top = i as f64 * ROW + 3.0;
        svg.text("bar-name", (NAME - 8.0, top + 13.0), Anchor::End, &bar.label);
        let length = scale.at(bar.value).max(1.5);
        let title = format!("{}: {}", bar.label, bar.text);
        svg.bar(&format!("bar {}", bar.class), (NAME, top), (length, ROW - 7.0), &title);
        svg.text("bar-text", (NAME + length + 6.0, top + 13.0), Anchor::Start, &bar.text);
    }
    svg.finish()
}
