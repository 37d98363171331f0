//! The two kinds of chart. Colours are classes, so that the page's style can be light or dark.

use std::fmt::Write;

use super::escape;

/// Lines over chunk sizes, from 0 to 100 %.
pub(super) struct Lines<'a> {
    pub(super) name: &'a str,
    /// Each twice the one before.
    pub(super) x: &'a [usize],
    pub(super) series: Vec<Series<'a>>,
}

pub(super) struct Series<'a> {
    pub(super) name: &'a str,
    pub(super) values: Vec<f64>,
}

/// A square of shares.
pub(super) struct Heatmap<'a> {
    pub(super) names: &'a [&'a str],
    pub(super) rows: &'a [&'a [f64]],
}

/// Bytes as an axis shows them.
pub(super) fn size(bytes: usize) -> String {
    if bytes < 1024 { format!("{bytes} B") } else { format!("{} KiB", bytes / 1024) }
}

impl Lines<'_> {
    const WIDTH: f64 = 220.0;
    const HEIGHT: f64 = 130.0;
    const LEFT: f64 = 34.0;
    const RIGHT: f64 = 16.0;
    const TOP: f64 = 8.0;
    const BOTTOM: f64 = 22.0;

    fn at(&self, n: usize) -> f64 {
        let steps = (self.x.len() - 1).max(1) as f64;
        Self::LEFT + (Self::WIDTH - Self::LEFT - Self::RIGHT) * n as f64 / steps
    }

    fn height(share: f64) -> f64 {
        Self::TOP + (Self::HEIGHT - Self::TOP - Self::BOTTOM) * (1.0 - share)
    }

    pub(super) fn draw(&self) -> String {
        let (width, height) = (Self::WIDTH, Self::HEIGHT);
        let mut out = format!(
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">\n",
            escape(self.name)
        );
        for share in [0.0, 0.5, 1.0] {
            let y = Self::height(share);
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\"/>\
                 <text class=\"tick end\" x=\"{}\" y=\"{}\">{:.0}&#8201;%</text>",
                Self::LEFT,
                Self::WIDTH - Self::RIGHT,
                Self::LEFT - 5.0,
                y + 3.0,
                share * 100.0
            );
        }
        for (n, bytes) in self.x.iter().enumerate().step_by(2) {
            let _ = writeln!(
                out,
                "<text class=\"tick mid\" x=\"{:.1}\" y=\"{}\">{}</text>",
                self.at(n),
                Self::HEIGHT - 7.0,
                size(*bytes)
            );
        }
        for (number, series) in self.series.iter().enumerate() {
            let points: Vec<(f64, f64)> = series
                .values
                .iter()
                .enumerate()
                .map(|(n, share)| (self.at(n), Self::height(*share)))
                .collect();
            let line: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = writeln!(out, "<polyline class=\"s{number}\" points=\"{}\"/>", line.join(" "));
            for (((x, y), share), bytes) in points.iter().zip(&series.values).zip(self.x) {
                let _ = writeln!(
                    out,
                    "<circle class=\"s{number}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\"><title>{}, \
                     {}, {}: {:.1} %</title></circle>",
                    escape(self.name),
                    escape(series.name),
                    size(*bytes),
                    share * 100.0
                );
            }
        }
        out.push_str("</svg>\n");
        out
    }
}

impl Heatmap<'_> {
    const CELL: f64 = 34.0;
    const LEFT: f64 = 92.0;
    const TOP: f64 = 76.0;

    pub(super) fn draw(&self) -> String {
        let side = Self::CELL * self.names.len() as f64;
        let mut out = format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"redundancy by pair\">\n",
            Self::LEFT + side + 56.0,
            Self::TOP + side + 2.0
        );
        for (n, name) in self.names.iter().enumerate() {
            let middle = Self::CELL * (n as f64 + 0.5);
            let (x, y) = (Self::LEFT + middle, Self::TOP + middle + 3.5);
            let name = escape(name);
            let _ = writeln!(
                out,
                "<text class=\"name end\" x=\"{}\" y=\"{y}\">{name}</text>\
                 <text class=\"name\" transform=\"translate({x} {}) rotate(-45)\">{name}</text>",
                Self::LEFT - 6.0,
                Self::TOP - 6.0
            );
        }
        for (row, shares) in self.rows.iter().enumerate() {
            for (column, share) in shares.iter().enumerate() {
                let x = Self::LEFT + Self::CELL * column as f64;
                let y = Self::TOP + Self::CELL * row as f64;
                let (a, b) = (self.names[row], self.names[column]);
                let _ = writeln!(
                    out,
                    "<rect class=\"cell\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" \
                     fill-opacity=\"{:.3}\"><title>{} in {}: {:.1} %</title></rect>\
                     <text class=\"value mid{}\" x=\"{}\" y=\"{}\">{:.0}</text>",
                    x + 1.0,
                    y + 1.0,
                    Self::CELL - 2.0,
                    Self::CELL - 2.0,
                    0.04 + 0.96 * share * share,
                    escape(a),
                    escape(b),
                    share * 100.0,
                    if *share > 0.85 { " on" } else { "" },
                    x + Self::CELL / 2.0,
                    y + Self::CELL / 2.0 + 3.5,
                    share * 100.0
                );
            }
        }
        out.push_str("</svg>\n");
        out
    }
}
