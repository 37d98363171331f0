//! How long sandboxes stand idle before they are used again.
//!
//! The paper's model knows rates only. What decides whether a sandbox is worth its memory is how
//! likely a request is to want it soon, given how long it has stood idle: the hazard rate of the
//! gap between two uses. It covers both why sandboxes idle: a function that is called seldom, and
//! a function that has more sandboxes than it needs most of the time, for the last used one is
//! always taken first.

use serde::{Deserialize, Serialize};

/// Buckets of gaps; the bounds grow by a half.
const BUCKETS: usize = 28;
/// Reuses after which older ones count half, so that habits can change.
const FORGET_AT: f64 = 1_000.0;
/// Every bucket is taken for having been waited through this often without a request, so that one
/// lucky reuse does not make a sandbox precious.
const DOUBT: f64 = 0.25;
/// Before anything is known, a sandbox idle for a time is taken to be idle for twice that time on
/// average, and at least for twenty minutes; that belief weighs as much as this many reuses.
const PRIOR_REUSES: f64 = 0.3;
const PRIOR_LEAST_S: f64 = 600.0;
/// Purged sandboxes that are remembered in case that a request would have wanted them.
const GHOSTS: usize = 64;

/// Ends of the buckets, milliseconds: 1 s to 16 h.
const ENDS: [u64; BUCKETS] = {
    let mut ends = [1_000; BUCKETS];
    let mut i = 1;
    while i < BUCKETS {
        ends[i] = ends[i - 1] * 3 / 2;
        i += 1;
    }
    ends
};

fn bucket(gap_ms: u64) -> usize {
    if gap_ms < ENDS[0] {
        return 0;
    }
    ENDS.partition_point(|end| *end <= gap_ms).min(BUCKETS - 1)
}

fn start(bucket: usize) -> u64 {
    if bucket == 0 { 0 } else { ENDS[bucket - 1] }
}

/// The gaps of one function's sandboxes.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ReuseGaps {
    reuses: [f64; BUCKETS],
    /// Idle time spent at each age, seconds.
    waited: [f64; BUCKETS],
    total: f64,
    /// Purged sandboxes: when each was last used, and up to which idle time it is accounted for,
    /// milliseconds. The most recently used last.
    ghosts: Vec<(u64, u64)>,
}

/// What a policy expects if sandboxes of one function that have been idle for a time are let go.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Interval {
    /// The end of the interval of idle time, milliseconds.
    pub end_ms: u64,
    /// The share of idle periods that end with a request within the interval.
    pub reused: f64,
    /// The time that a sandbox is expected to spend idle within the interval, seconds.
    pub waited_s: f64,
}

impl ReuseGaps {
    /// A request took a sandbox that had been idle for `gap_ms`.
    pub fn reused(&mut self, gap_ms: u64) {
        self.wait(0, gap_ms);
        self.reuse(gap_ms);
    }

    /// A sandbox last used at `last_used_ms` was ended at `now_ms` without having been used again.
    pub fn purged(&mut self, now_ms: u64, last_used_ms: u64) {
        let gap = now_ms.saturating_sub(last_used_ms);
        self.wait(0, gap);
        let at = self.ghosts.partition_point(|(used, _)| *used <= last_used_ms);
        self.ghosts.insert(at, (last_used_ms, gap));
        if self.ghosts.len() > GHOSTS {
            self.ghosts.remove(0);
        }
    }

    /// A request found no sandbox. Had the last purged one been kept, it would have been used.
    pub fn missed(&mut self, now_ms: u64) {
        if let Some((used, accounted)) = self.ghosts.pop() {
            let gap = now_ms.saturating_sub(used);
            self.wait(accounted, gap);
            self.reuse(gap);
        }
    }

    /// How many reuses are known, older ones counted less.
    #[must_use]
    pub fn known(&self) -> f64 {
        self.total
    }

    /// The shortest idle time such that at most the share `share` of reuses comes after a longer
    /// one, milliseconds; `None` if too little is known to tell.
    #[must_use]
    pub fn quantile_ms(&self, share: f64) -> Option<u64> {
        const ENOUGH: f64 = 5.0;
        if self.total < ENOUGH {
            return None;
        }
        if share >= 1.0 {
            return Some(0);
        }
        let mut later = self.total;
        for (end, reuses) in ENDS.iter().zip(&self.reuses) {
            later -= reuses;
            if later <= share * self.total + 1e-9 {
                return Some(*end);
            }
        }
        None
    }

    /// Requests per second that want one sandbox which has been idle for `age_ms`, on average over
    /// the idle time still to come.
    #[must_use]
    pub fn hazard_from(&self, age_ms: u64) -> f64 {
        let from = bucket(age_ms);
        let (mut reuses, mut waited) = (0.0, 0.0);
        for b in from..BUCKETS {
            reuses += self.reuses[b];
            waited += self.waited[b];
        }
        let doubt = DOUBT * (ENDS[from] - start(from)) as f64 / 1e3;
        let believed = PRIOR_REUSES * 2.0 * (age_ms as f64 / 1e3).max(PRIOR_LEAST_S);
        (reuses + PRIOR_REUSES) / (waited + doubt + believed)
    }

    /// What becomes of an idle period, interval by interval.
    #[must_use]
    pub fn curve(&self) -> Vec<Interval> {
        let mut alive = 1.0;
        (0..BUCKETS)
            .map(|b| {
                let width = (ENDS[b] - start(b)) as f64 / 1e3;
                let hazard = self.reuses[b] / (self.waited[b] + DOUBT * width);
                let survives = (-hazard * width).exp();
                let reused = alive * (1.0 - survives);
                let waited_s = if hazard > 0.0 { reused / hazard } else { alive * width };
                alive *= survives;
                Interval { end_ms: ENDS[b], reused, waited_s }
            })
            .collect()
    }

    fn reuse(&mut self, gap_ms: u64) {
        self.reuses[bucket(gap_ms)] += 1.0;
        self.total += 1.0;
        if self.total > FORGET_AT {
            self.total /= 2.0;
            self.reuses.iter_mut().chain(&mut self.waited).for_each(|v| *v /= 2.0);
        }
    }

    /// Accounts for the idle time between two ages.
    fn wait(&mut self, from_ms: u64, to_ms: u64) {
        let (first, last) = (bucket(from_ms), bucket(to_ms));
        for (b, waited) in self.waited.iter_mut().enumerate().take(last + 1).skip(first) {
            // The last bucket has no end.
            let end = if b == last { to_ms } else { ENDS[b] };
            *waited += end.saturating_sub(start(b).max(from_ms)) as f64 / 1e3;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_function_called_every_five_minutes_is_worth_keeping_for_that_long() {
        let mut g = ReuseGaps::default();
        (0..20).for_each(|_| g.reused(300_000));
        let enough = g.quantile_ms(0.0).unwrap();
        assert!((300_000..450_000).contains(&enough), "{enough}");
        assert_eq!(g.quantile_ms(1.0), Some(0));
        // Hopeless after an hour, likely before.
        assert!(g.hazard_from(100_000) > 1.0 / 400.0);
        assert!(g.hazard_from(3_600_000) < 1.0 / 3_600.0);
    }

    #[test]
    fn spare_sandboxes_show_as_long_gaps() {
        let mut g = ReuseGaps::default();
        for i in 0..1_000 {
            g.reused(if i % 20 == 0 { 120_000 } else { 50 });
        }
        assert_eq!(g.quantile_ms(0.06), Some(1_000));
        assert!(g.quantile_ms(0.01).unwrap() > 100_000);
    }

    #[test]
    fn a_request_after_the_purge_counts_as_a_gap() {
        let mut g = ReuseGaps::default();
        for i in 0..10u64 {
            let used = i * 2_000_000;
            g.purged(used + 600_000, used);
            g.missed(used + 1_200_000);
        }
        assert!(g.quantile_ms(0.0).unwrap() >= 1_200_000);
        let reused: f64 = g.curve().iter().map(|i| i.reused).sum();
        assert!(reused > 0.5, "{reused}");
    }

    #[test]
    fn too_few_gaps_tell_nothing() {
        let mut g = ReuseGaps::default();
        g.reused(5);
        assert_eq!(g.quantile_ms(0.5), None);
    }

    proptest! {
        #[test]
        fn shares_are_shares(gaps in prop::collection::vec(0u64..100_000_000, 1..200)) {
            let mut g = ReuseGaps::default();
            gaps.iter().for_each(|gap| g.reused(*gap));
            let reused: f64 = g.curve().iter().map(|i| i.reused).sum();
            prop_assert!((0.0..=1.0 + 1e-9).contains(&reused));
            prop_assert!(g.curve().iter().all(|i| i.waited_s >= 0.0 && i.waited_s.is_finite()));
        }

        #[test]
        fn all_idle_time_is_accounted_for(gaps in prop::collection::vec(0u64..50_000_000, 1..50)) {
            let mut g = ReuseGaps::default();
            gaps.iter().for_each(|gap| g.reused(*gap));
            let waited: f64 = g.waited.iter().sum();
            let expected = gaps.iter().sum::<u64>() as f64 / 1e3;
            prop_assert!((waited - expected).abs() < 1e-3 * (1.0 + expected));
        }
    }
}
