//! Adaptive keep-alive: the hybrid histogram policy of *Serverless in the Wild* (Shahrad et al.,
//! ATC '20, section 4), for sandboxes.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::decision::{Action, Decision, FixedKeepAlive, IdleSandbox, Policy, Pressure};
use crate::eviction::{Eviction, Need};
use crate::forecast::forecast;
use crate::stats::FunctionStats;

/// Width of a bin, milliseconds.
const BIN_MS: u64 = 60_000;
/// Bins: four hours.
const BINS: usize = 240;
/// Idle times too long for the histogram that are kept for the forecast.
const SERIES: usize = 32;
/// Idle times before the histogram is believed at all. The publication leaves the number open.
const ENOUGH: u32 = 5;

/// A function's idle times: the time from the end of one request to the beginning of the next.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct IdleTimes {
    /// Empty until the first.
    bins: Vec<u32>,
    inside: u32,
    outside: u32,
    squares: u64,
    /// All idle times in minutes, the newest last; kept short.
    series: VecDeque<f32>,
}

impl IdleTimes {
    /// Takes in one idle time.
    pub fn record(&mut self, idle_ms: u64) {
        if self.series.len() == SERIES {
            self.series.pop_front();
        }
        self.series.push_back(idle_ms as f32 / BIN_MS as f32);
        let bin = (idle_ms / BIN_MS) as usize;
        if bin >= BINS {
            self.outside = self.outside.saturating_add(1);
            return;
        }
        if self.bins.is_empty() {
            self.bins.resize(BINS, 0);
        }
        // (n + 1)^2 - n^2
        self.squares += 2 * u64::from(self.bins[bin]) + 1;
        self.bins[bin] += 1;
        self.inside += 1;
    }

    /// The share of idle times that are longer than the histogram, 0 to 1.
    #[must_use]
    pub fn out_of_bounds(&self) -> f64 {
        let all = self.inside + self.outside;
        if all == 0 { 0.0 } else { f64::from(self.outside) / f64::from(all) }
    }

    /// The coefficient of variation of the bins' counts: high if few bins hold most.
    #[must_use]
    pub fn variation(&self) -> f64 {
        if self.inside == 0 {
            return 0.0;
        }
        let mean = f64::from(self.inside) / BINS as f64;
        let variance = self.squares as f64 / BINS as f64 - mean * mean;
        variance.max(0.0).sqrt() / mean
    }

    /// The bin that the share `q` of the idle times lies in or below.
    fn bin_at(&self, q: f64) -> usize {
        let rank = (q * f64::from(self.inside)).ceil().max(1.0) as u32;
        let mut seen = 0;
        for (bin, count) in self.bins.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return bin;
            }
        }
        BINS - 1
    }
}

/// When a function's sandbox should be there, counted from the end of its last request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Windows {
    /// How long there need be none, milliseconds. 0: keep the one that there is.
    pub prewarm_ms: u64,
    /// How long to keep one after that, milliseconds.
    pub keep_ms: u64,
    /// What they come from.
    pub source: WindowSource,
}

/// What [`Windows`] come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WindowSource {
    /// The histogram's head and tail.
    Histogram,
    /// The histogram tells nothing (yet): as long as the histogram reaches.
    Standard,
    /// Most idle times are longer than the histogram: a forecast.
    Forecast,
}

/// See the module.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Adaptive {
    /// The head's percentile, 0 to 1.
    pub head: f64,
    /// The tail's percentile, 0 to 1.
    pub tail: f64,
    /// By how much windows begin earlier and end later, as a share.
    pub margin: f64,
    /// The same for a forecast.
    pub forecast_margin: f64,
    /// The histogram is used from this coefficient of variation of its bins on.
    pub min_variation: f64,
    /// The forecast is used from this share of idle times longer than the histogram on.
    pub max_out_of_bounds: f64,
}

impl Default for Adaptive {
    /// The publication's: 5th and 99th percentile, 10 %, 15 %, 2, one half.
    fn default() -> Self {
        Self {
            head: 0.05,
            tail: 0.99,
            margin: 0.10,
            forecast_margin: 0.15,
            min_variation: 2.0,
            max_out_of_bounds: 0.5,
        }
    }
}

impl Adaptive {
    /// When the function's sandbox should be there.
    #[must_use]
    pub fn windows(&self, idle: &IdleTimes) -> Windows {
        let range = BINS as u64 * BIN_MS;
        let standard = Windows { prewarm_ms: 0, keep_ms: range, source: WindowSource::Standard };
        if idle.inside + idle.outside >= ENOUGH && idle.out_of_bounds() > self.max_out_of_bounds {
            let series: Vec<f64> = idle.series.iter().map(|m| f64::from(*m)).collect();
            let Some(next) = forecast(&series) else { return standard };
            let next = next * BIN_MS as f64;
            return Windows {
                prewarm_ms: (next * (1.0 - self.forecast_margin)) as u64,
                keep_ms: (next * 2.0 * self.forecast_margin) as u64,
                source: WindowSource::Forecast,
            };
        }
        if idle.inside < ENOUGH || idle.variation() < self.min_variation {
            return standard;
        }
        // The head is rounded down to a whole bin, the tail up.
        let head = idle.bin_at(self.head) as u64 * BIN_MS;
        let tail = (idle.bin_at(self.tail) as u64 + 1) * BIN_MS;
        let prewarm_ms = (head as f64 * (1.0 - self.margin)) as u64;
        let until = (tail as f64 * (1.0 + self.margin)) as u64;
        Windows { prewarm_ms, keep_ms: until - prewarm_ms, source: WindowSource::Histogram }
    }
}

impl Policy for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }

    fn dedups(&self) -> bool {
        false
    }

    fn decide(
        &self,
        now_ms: u64,
        sandbox: &IdleSandbox,
        stats: &FunctionStats,
        _pressure: Pressure,
    ) -> Decision {
        let windows = self.windows(stats.idle_times());
        let begin = sandbox.last_used_ms.saturating_add(windows.prewarm_ms);
        let end = begin.saturating_add(windows.keep_ms);
        // One that was made ahead of time has not been used since the request it follows.
        let made_ahead = sandbox.since_ms >= begin && windows.prewarm_ms > 0;
        if windows.prewarm_ms > 0 && !made_ahead && now_ms < begin {
            // The caller asks [`Policy::prewarm`] when the last one goes.
            return Decision { action: Action::Purge, ask_again_ms: now_ms };
        }
        if now_ms >= end {
            Decision { action: Action::Purge, ask_again_ms: now_ms }
        } else {
            Decision { action: Action::Keep, ask_again_ms: end }
        }
    }

    fn evict(&self, idle: &[IdleSandbox], need: Need) -> Vec<Eviction> {
        FixedKeepAlive { keep_alive_ms: 0 }.evict(idle, need)
    }

    fn prewarm(&self, now_ms: u64, last_used_ms: u64, stats: &FunctionStats) -> Option<u64> {
        let windows = self.windows(stats.idle_times());
        let at = last_used_ms.saturating_add(windows.prewarm_ms);
        (windows.prewarm_ms > 0 && at > now_ms).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use medes_core::{FunctionId, SandboxId, SandboxState};
    use proptest::prelude::*;

    use crate::decision::Dedupable;

    const MINUTE: u64 = BIN_MS;

    fn times(minutes: impl IntoIterator<Item = u64>) -> IdleTimes {
        let mut t = IdleTimes::default();
        minutes.into_iter().for_each(|m| t.record(m * MINUTE));
        t
    }

    #[test]
    fn a_timer_is_unloaded_and_brought_back_before_its_time() {
        let w = Adaptive::default().windows(&times([30; 20]));
        assert_eq!(w.source, WindowSource::Histogram);
        assert_eq!(w.prewarm_ms, 27 * MINUTE);
        assert_eq!(w.prewarm_ms + w.keep_ms, (31.0 * 1.1 * MINUTE as f64) as u64);
    }

    #[test]
    fn a_busy_function_is_kept_until_its_tail() {
        let w = Adaptive::default().windows(&times((0..200).map(|i| i % 3)));
        assert_eq!((w.prewarm_ms, w.source), (0, WindowSource::Histogram));
        assert_eq!(w.keep_ms, (3.0 * 1.1 * MINUTE as f64) as u64);
    }

    #[test]
    fn an_even_histogram_and_a_new_function_are_kept_for_its_whole_range() {
        for t in [times(0..240), times([3, 3])] {
            let w = Adaptive::default().windows(&t);
            assert_eq!(
                (w.prewarm_ms, w.keep_ms, w.source),
                (0, 240 * MINUTE, WindowSource::Standard)
            );
        }
    }

    #[test]
    fn rare_functions_are_forecast() {
        let w = Adaptive::default().windows(&times([300; 6]));
        assert_eq!(w.source, WindowSource::Forecast);
        assert_eq!((w.prewarm_ms / MINUTE, w.keep_ms / MINUTE), (255, 90));
    }

    #[test]
    fn a_sandbox_goes_at_once_and_one_made_ahead_stays_for_the_window() {
        let mut stats = FunctionStats::default();
        for i in 0..20 {
            stats.arrived(i * 30 * MINUTE);
        }
        let last = 19 * 30 * MINUTE;
        let policy = Adaptive::default();
        let mut s = IdleSandbox {
            id: SandboxId(1),
            function: FunctionId(1),
            state: SandboxState::Warm,
            since_ms: last,
            last_used_ms: last,
            dedupable: Dedupable::Never,
            memory: 1,
        };
        let none = Pressure::default();
        assert_eq!(policy.decide(last, &s, &stats, none).action, Action::Purge);
        let at = policy.prewarm(last, last, &stats).unwrap();
        assert_eq!(at, last + 27 * MINUTE);
        s.since_ms = at;
        let d = policy.decide(at, &s, &stats, none);
        assert_eq!(d.action, Action::Keep);
        assert!(d.ask_again_ms > last + 30 * MINUTE);
        assert_eq!(policy.decide(d.ask_again_ms, &s, &stats, none).action, Action::Purge);
        assert_eq!(policy.prewarm(d.ask_again_ms, last, &stats), None);
    }

    proptest! {
        #[test]
        fn windows_cover_the_middle_of_what_was_seen(
            list in prop::collection::vec(0u64..240, 5..300)
        ) {
            let t = times(list.iter().copied());
            let w = Adaptive::default().windows(&t);
            let inside = list.iter().filter(|m| {
                let at = *m * MINUTE;
                at >= w.prewarm_ms && at <= w.prewarm_ms + w.keep_ms
            }).count();
            prop_assert!(inside as f64 >= 0.90 * list.len() as f64, "{inside} of {}", list.len());
        }

        #[test]
        fn variation_is_that_of_the_bins(list in prop::collection::vec(0u64..240, 1..300)) {
            let t = times(list.iter().copied());
            let mean = list.len() as f64 / BINS as f64;
            let var = t.bins.iter().map(|c| (f64::from(*c) - mean).powi(2)).sum::<f64>()
                / BINS as f64;
            prop_assert!((t.variation() - var.sqrt() / mean).abs() < 1e-6);
        }
    }
}
