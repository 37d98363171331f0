//! Latency distributions in bounded memory.

use serde::{Deserialize, Serialize};

/// Buckets per doubling: a value is at most a thirty-second above the one that was recorded.
const PER_OCTAVE: u64 = 32;
const SHIFT: u32 = PER_OCTAVE.ilog2();

/// A histogram of latencies, microseconds, whose buckets grow with the value, as HDR histograms'
/// do: up to 2^40 us in at most 4.5 KiB.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LatencyHistogram {
    counts: Vec<u32>,
    total: u64,
    sum: u64,
    max: u64,
}

impl LatencyHistogram {
    /// Counts one latency.
    pub fn record(&mut self, us: u64) {
        let bucket = Self::bucket(us);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] = self.counts[bucket].saturating_add(1);
        self.total += 1;
        self.sum += us;
        self.max = self.max.max(us);
    }

    /// Adds what another one counted.
    pub fn merge(&mut self, other: &Self) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (sum, more) in self.counts.iter_mut().zip(&other.counts) {
            *sum = sum.saturating_add(*more);
        }
        self.total += other.total;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The latency that the share `q` (0 to 1) stays at or below, microseconds; 0 if there are
    /// none.
    #[must_use]
    pub fn quantile(&self, q: f64) -> u64 {
        let rank = ((q.clamp(0.0, 1.0) * self.total as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= rank {
                return Self::upper(bucket as u64).min(self.max);
            }
        }
        self.max
    }

    /// In a form to be written down.
    #[must_use]
    pub fn summary(&self) -> LatencySummary {
        let ms = |us: u64| us as f64 / 1e3;
        LatencySummary {
            count: self.total,
            mean_ms: if self.total == 0 { 0.0 } else { ms(self.sum) / self.total as f64 },
            p50_ms: ms(self.quantile(0.5)),
            p90_ms: ms(self.quantile(0.9)),
            p99_ms: ms(self.quantile(0.99)),
            p999_ms: ms(self.quantile(0.999)),
            max_ms: ms(self.max),
        }
    }

    /// The distribution as points (milliseconds, share at or below), one per bucket in use.
    #[must_use]
    pub fn curve(&self) -> Vec<(f64, f64)> {
        let mut seen = 0;
        self.counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
            .map(|(bucket, count)| {
                seen += u64::from(*count);
                let us = Self::upper(bucket as u64).min(self.max);
                (us as f64 / 1e3, seen as f64 / self.total as f64)
            })
            .collect()
    }

    fn bucket(us: u64) -> usize {
        if us < PER_OCTAVE {
            return us as usize;
        }
        let us = us.min((1 << 40) - 1);
        let octave = us.ilog2() - SHIFT;
        (u64::from(octave) * PER_OCTAVE + (us >> octave)) as usize
    }

    fn upper(bucket: u64) -> u64 {
        if bucket < 2 * PER_OCTAVE {
            return bucket;
        }
        let octave = bucket / PER_OCTAVE - 1;
        let mantissa = bucket - octave * PER_OCTAVE;
        ((mantissa + 1) << octave) - 1
    }
}

/// What is told of a latency distribution, milliseconds.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct LatencySummary {
    /// How many there were.
    pub count: u64,
    /// The mean.
    pub mean_ms: f64,
    /// The median.
    pub p50_ms: f64,
    /// The 90th percentile.
    pub p90_ms: f64,
    /// The 99th percentile.
    pub p99_ms: f64,
    /// The 99.9th percentile.
    pub p999_ms: f64,
    /// The greatest.
    pub max_ms: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_ends_at_most_a_thirty_second_above(us in 0u64..1 << 40) {
            let upper = LatencyHistogram::upper(LatencyHistogram::bucket(us) as u64);
            prop_assert!(us <= upper && upper <= us + us / 32, "{us} {upper}");
        }

        #[test]
        fn quantiles_are_near_those_of_the_list(mut list in prop::collection::vec(0u64..1 << 34, 1..300)) {
            let mut h = LatencyHistogram::default();
            list.iter().for_each(|us| h.record(*us));
            list.sort_unstable();
            for q in [0.0, 0.5, 0.99, 1.0] {
                let rank = ((q * list.len() as f64).ceil() as usize).max(1) - 1;
                let (exact, got) = (list[rank], h.quantile(q));
                prop_assert!(exact <= got && got <= exact + exact / 32, "{exact} {got}");
            }
            prop_assert!(h.curve().is_sorted_by(|a, b| a.1 <= b.1));
        }
    }
}
