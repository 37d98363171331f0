//! From values to places on a drawing.

/// An axis.
#[derive(Clone, Debug)]
pub(crate) struct Scale {
    from: f64,
    to: f64,
    logarithmic: bool,
    start: f64,
    length: f64,
}

impl Scale {
    /// A linear axis from 0 (or below) to a round number at or above `most`.
    pub(crate) fn linear(least: f64, most: f64) -> Self {
        let step = step(most - least.min(0.0));
        let to = (most / step).ceil() * step;
        let from = if least < 0.0 { (least / step).floor() * step } else { 0.0 };
        Self {
            from,
            to: if to > from { to } else { from + 1.0 },
            logarithmic: false,
            start: 0.0,
            length: 1.0,
        }
    }

    /// A linear axis that ends where it is told to.
    pub(crate) fn exact(from: f64, to: f64) -> Self {
        let to = if to > from { to } else { from + 1.0 };
        Self { from, to, logarithmic: false, start: 0.0, length: 1.0 }
    }

    /// A logarithmic axis that holds both values.
    pub(crate) fn logarithmic(least: f64, most: f64) -> Self {
        let least = least.max(1e-9);
        let most = most.max(least * 1.01);
        Self { from: least, to: most, logarithmic: true, start: 0.0, length: 1.0 }
    }

    /// Where the axis lies on the drawing; a negative length goes up.
    pub(crate) fn on(mut self, start: f64, length: f64) -> Self {
        (self.start, self.length) = (start, length);
        self
    }

    /// Where a value lies.
    pub(crate) fn at(&self, value: f64) -> f64 {
        let share = if self.logarithmic {
            (value.max(1e-12) / self.from).ln() / (self.to / self.from).ln()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        self.start + self.length * share.clamp(0.0, 1.0)
    }

    /// Values worth a mark.
    pub(crate) fn ticks(&self) -> Vec<f64> {
        if self.logarithmic {
            let decades = (self.to / self.from).log10();
            let each: &[f64] = if decades > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let first = self.from.log10().floor() as i32;
            let last = self.to.log10().ceil() as i32;
            return (first..=last)
                .flat_map(|d| each.iter().map(move |m| m * 10f64.powi(d)))
                .filter(|v| *v >= self.from * 0.999 && *v <= self.to * 1.001)
                .collect();
        }
        let step = step(self.to - self.from);
        let first = (self.from / step).ceil() as i64;
        let last = (self.to / step + 1e-9).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }
}

/// A round distance between marks: about five of them.
fn step(span: f64) -> f64 {
    if span <= 0.0 || !span.is_finite() {
        return 1.0;
    }
    let rough = span / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|f| f * power >= rough * 0.999);
    factor.unwrap_or(10.0) * power
}

/// A number as short as it can be: `12`, `0.25`, `1.2k`, `3M`.
pub(crate) fn short(value: f64) -> String {
    let (value, unit) = match value.abs() {
        v if v >= 1e9 => (value / 1e9, "G"),
        v if v >= 1e6 => (value / 1e6, "M"),
        v if v >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let digits = match value.abs() {
        v if v >= 100.0 || v == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 0.1 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    };
    format!("{text}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_cover_the_axis() {
        assert_eq!(Scale::linear(0.0, 47.0).ticks(), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]);
        assert_eq!(
            Scale::logarithmic(1.0, 100.0).ticks(),
            [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
        );
        let s = Scale::linear(0.0, 10.0).on(100.0, -50.0);
        assert_eq!((s.at(0.0), s.at(10.0), s.at(99.0)), (100.0, 50.0, 50.0));
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (1234.0, "1234"),
            (12_345.0, "12.3k"),
            (2.5e6, "2.5M"),
            (0.25, "0.25"),
            (8.0, "8"),
        ] {
            assert_eq!(short(value), text);
        }
    }
}
