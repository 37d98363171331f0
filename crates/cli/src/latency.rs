//! Percentiles of latencies.

use serde::Serialize;

/// Percentiles of latencies, milliseconds.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Percentiles {
    /// Half of the requests took no longer.
    pub p50: f64,
    /// Nine tenths took no longer.
    pub p90: f64,
    /// 99 of a hundred took no longer.
    pub p99: f64,
    /// How many requests were measured.
    pub samples: usize,
}

impl Percentiles {
    /// Percentiles by nearest rank: each is a latency that was measured. `None` without any.
    pub fn of(latencies_ms: &[f64]) -> Option<Self> {
        let mut sorted = latencies_ms.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let rank = |q: f64| {
            let rank = (q * sorted.len() as f64).ceil() as usize;
            sorted[rank.saturating_sub(1).min(last)]
        };
        Some(Self { p50: rank(0.5), p90: rank(0.9), p99: rank(0.99), samples: sorted.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_latencies_that_were_measured() {
        assert_eq!(Percentiles::of(&[]), None);
        let one = Percentiles::of(&[3.0]).unwrap();
        assert_eq!((one.p50, one.p90, one.p99), (3.0, 3.0, 3.0));
        let hundred: Vec<_> = (1..=100).rev().map(f64::from).collect();
        let p = Percentiles::of(&hundred).unwrap();
        assert_eq!((p.p50, p.p90, p.p99, p.samples), (50.0, 90.0, 99.0, 100));
    }
}
