//! Durations counted in buckets of equal ratio.

use serde::{Deserialize, Serialize};

/// Buckets per doubling: a percentile is at most a quarter off.
const PER_OCTAVE: usize = 4;
/// 2^36 us are 19 hours; what is longer is counted as that.
const OCTAVES: usize = 36;

/// A histogram of durations, microseconds, with buckets that grow by a quarter of an octave.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Histogram {
    /// Grown to the largest bucket in use.
    counts: Vec<u32>,
    total: u64,
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, us: u64) {
        let bucket = Self::bucket(us);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] = self.counts[bucket].saturating_add(1);
        self.total += 1;
    }

    /// How many durations were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The duration that a share `q` (0 to 1) of all stays at or below: the upper end of its
    /// bucket, microseconds. `None` if nothing was counted.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Option<u64> {
        if self.total == 0 {
            return None;
        }
        let rank = ((q.clamp(0.0, 1.0) * self.total as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= rank {
                return Some(Self::upper(bucket));
            }
        }
        Some(Self::upper(self.counts.len().saturating_sub(1)))
    }

    fn bucket(us: u64) -> usize {
        if us < 4 {
            return us as usize;
        }
        // The two bits below the leading one tell the quarter of the octave.
        let octave = us.ilog2() as usize;
        let quarter = ((us >> (octave - 2)) & 3) as usize;
        (octave - 1).min(OCTAVES) * PER_OCTAVE + quarter
    }

    fn upper(bucket: usize) -> u64 {
        if bucket < 4 {
            return bucket as u64;
        }
        let octave = bucket / PER_OCTAVE + 1;
        let quarter = (bucket % PER_OCTAVE) as u64;
        ((quarter + 5) << (octave - 2)) - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_duration_is_at_most_a_quarter_below_its_buckets_end(us in 0u64..1 << 36) {
            let upper = Histogram::upper(Histogram::bucket(us));
            prop_assert!(us <= upper && upper <= us + us / 4 + 1, "{us} {upper}");
        }

        #[test]
        fn quantiles_grow(values in prop::collection::vec(any::<u64>(), 1..50)) {
            let mut h = Histogram::default();
            values.iter().for_each(|v| h.record(*v));
            let q: Vec<_> = [0.0, 0.5, 0.9, 0.99, 1.0].iter().map(|q| h.quantile(*q)).collect();
            prop_assert!(q.is_sorted());
            prop_assert_eq!(h.count(), values.len() as u64);
        }
    }

    #[test]
    fn an_empty_one_has_no_quantile() {
        assert_eq!(Histogram::default().quantile(0.5), None);
    }
}
