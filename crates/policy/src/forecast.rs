//! The next value of a short series.
//!
//! The hybrid histogram policy forecasts the next idle time of functions that are called less than
//! once in four hours, with ARIMA. Such a function has a handful of idle times a day; an order
//! can't be chosen, nor a model fitted, from so few in any way that means something. Holt's linear
//! method with fixed weights is the forecast of an ARIMA(0, 2, 2) whose two parameters are given
//! instead of fitted: a level and a trend, from two values on.

/// How much the newest value moves the level, and the newest change the trend.
const LEVEL: f64 = 0.5;
const TREND: f64 = 0.2;

/// The value expected after `series`, by Holt's linear method; never less than half the least and
/// never more than twice the greatest of the series, for a trend does not go on forever. `None`
/// for an empty series.
#[must_use]
pub fn forecast(series: &[f64]) -> Option<f64> {
    let (first, rest) = series.split_first()?;
    let (mut level, mut trend) = (*first, 0.0);
    for (i, value) in rest.iter().enumerate() {
        if i == 0 {
            trend = value - first;
        }
        let before = level;
        level = LEVEL * value + (1.0 - LEVEL) * (level + trend);
        trend = TREND * (level - before) + (1.0 - TREND) * trend;
    }
    let least = series.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = series.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    Some((level + trend).clamp(least / 2.0, greatest * 2.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn constant_and_growing_series_are_continued() {
        assert_eq!(forecast(&[]), None);
        assert_eq!(forecast(&[300.0]), Some(300.0));
        assert_eq!(forecast(&[300.0; 9]), Some(300.0));
        let next = forecast(&[100.0, 110.0, 120.0, 130.0]).unwrap();
        assert!((next - 140.0).abs() < 1.0, "{next}");
    }

    proptest! {
        #[test]
        fn a_forecast_stays_near_what_was_seen(s in prop::collection::vec(1.0f64..1e6, 1..30)) {
            let next = forecast(&s).unwrap();
            let least = s.iter().copied().fold(f64::INFINITY, f64::min);
            let most = s.iter().copied().fold(0.0, f64::max);
            prop_assert!((least / 2.0..=most * 2.0).contains(&next));
        }
    }
}
