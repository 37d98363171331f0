//! What is measured of a function while it is used.

use std::collections::VecDeque;

use medes_core::StartKind;
use serde::{Deserialize, Serialize};

use crate::adaptive::IdleTimes;
use crate::gaps::ReuseGaps;
use crate::histogram::Histogram;
use crate::price::Keep;

/// The weight of the newest value in a moving average.
const WEIGHT: f64 = 0.1;
/// The length of one window of arrivals, milliseconds.
const WINDOW_MS: u64 = 60_000;
/// How many windows are kept.
const WINDOWS: usize = 60;

/// A duration measured again and again, microseconds.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    histogram: Histogram,
    average_us: f64,
}

impl Latency {
    /// Takes one measurement in.
    pub fn record(&mut self, us: u64) {
        let value = us as f64;
        self.average_us = if self.histogram.count() == 0 {
            value
        } else {
            self.average_us + WEIGHT * (value - self.average_us)
        };
        self.histogram.record(us);
    }

    /// The exponentially weighted moving average; `None` before the first measurement.
    #[must_use]
    pub fn average_us(&self) -> Option<u64> {
        (self.histogram.count() > 0).then_some(self.average_us as u64)
    }

    /// See [`Histogram::quantile`].
    #[must_use]
    pub fn quantile_us(&self, q: f64) -> Option<u64> {
        self.histogram.quantile(q)
    }
}

/// What is known of one function from its requests and its sandboxes.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct FunctionStats {
    /// Requests by the state in which they found their sandbox: cold, warm, dedup.
    starts: [u64; 3],
    /// Requests that ended in an error.
    pub errors: u64,
    execution: Latency,
    cold_start: Latency,
    restore: Latency,
    /// Arrivals per window, oldest first, with the number of the window.
    windows: VecDeque<(u64, u32)>,
    warm_bytes: f64,
    dedup_bytes: f64,
    restore_bytes: f64,
    warm_start: Latency,
    last_arrival_ms: Option<u64>,
    idle_times: IdleTimes,
    gaps: ReuseGaps,
    /// How many sandboxes there are; the caller keeps it up to date.
    pub population: Population,
    /// What the operator set for this function alone.
    pub settings: FunctionSettings,
    /// What the policy's last plan says of this function; see [`crate::Policy::plan`].
    pub directive: Directive,
}

/// How many sandboxes a function has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Population {
    /// Warm, those included that are running, starting, or being restored.
    pub warm: u32,
    /// Dedup, those included that are on their way there.
    pub dedup: u32,
}

/// What an operator can set for one function; where nothing is set, the policy's own value holds.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FunctionSettings {
    /// The latency target, as a multiple of a warm startup.
    pub alpha: Option<f64>,
    /// The memory budget, bytes.
    pub budget: Option<u64>,
    /// Warm without a request for this long: dedup, maybe. Milliseconds.
    pub idle_ms: Option<u64>,
    /// Warm without a request for this long: not any longer. Milliseconds.
    pub keep_alive_ms: Option<u64>,
    /// Dedup for this long: purge. Milliseconds.
    pub keep_dedup_ms: Option<u64>,
    /// How many times a usual function's latency counts when memory is short; 1 if not set.
    pub priority: Option<f64>,
}

/// What a policy's plan says of one function.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Directive {
    /// Its part of the memory budget, bytes.
    pub budget: Option<f64>,
    /// How long its sandboxes stay warm without a request, milliseconds.
    pub warm_ms: Option<u64>,
    /// How long after their last request its sandboxes are purged, milliseconds.
    pub purge_ms: Option<u64>,
}

impl Directive {
    pub(crate) fn keep(keep: Keep) -> Self {
        Self { budget: None, warm_ms: Some(keep.warm_ms), purge_ms: Some(keep.purge_ms) }
    }
}

/// [`FunctionStats`] in a form to be shown. Times are microseconds, sizes bytes; `None` where
/// nothing was measured yet.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct StatsSummary {
    /// Median execution time.
    pub execution_p50_us: Option<u64>,
    /// 99th percentile of the execution time.
    pub execution_p99_us: Option<u64>,
    /// Median cold start.
    pub cold_start_p50_us: Option<u64>,
    /// Median restore.
    pub restore_p50_us: Option<u64>,
    /// Requests that arrived in the last whole minutes, per minute.
    pub arrivals_per_minute: f64,
    /// The most requests in one minute of the last hour.
    pub peak_per_minute: u32,
    /// Memory of a warm sandbox.
    pub warm_bytes: Option<u64>,
    /// Memory of a dedup sandbox.
    pub dedup_bytes: Option<u64>,
}

impl FunctionStats {
    /// Counts a request that arrived at `now_ms`.
    pub fn arrived(&mut self, now_ms: u64) {
        if let Some(last) = self.last_arrival_ms {
            let busy = self.execution.average_us().unwrap_or(0) / 1_000;
            self.idle_times.record(now_ms.saturating_sub(last).saturating_sub(busy));
        }
        self.last_arrival_ms = Some(now_ms);
        let window = now_ms / WINDOW_MS;
        match self.windows.back_mut() {
            Some((last, count)) if *last == window => *count = count.saturating_add(1),
            _ => self.windows.push_back((window, 1)),
        }
        while self.windows.front().is_some_and(|(w, _)| w + (WINDOWS as u64) <= window) {
            self.windows.pop_front();
        }
    }

    /// Counts a request that was served.
    pub fn served(&mut self, start: StartKind, startup_us: u64, execution_us: u64, error: bool) {
        self.starts[start as usize] += 1;
        self.errors += u64::from(error);
        self.execution.record(execution_us);
        match start {
            StartKind::Cold => self.cold_start.record(startup_us),
            StartKind::Dedup => self.restore.record(startup_us),
            StartKind::Warm => self.warm_start.record(startup_us),
        }
    }

    /// The median of what requests took, microseconds; `None` if there were none.
    #[must_use]
    pub fn usual_execution_us(&self) -> Option<u64> {
        self.execution.quantile_us(0.5)
    }

    /// A request took a sandbox, warm or dedup, that had stood idle for `gap_ms`.
    pub fn reused(&mut self, gap_ms: u64) {
        self.gaps.reused(gap_ms);
    }

    /// A sandbox last used at `last_used_ms` was ended.
    pub fn purged(&mut self, now_ms: u64, last_used_ms: u64) {
        self.gaps.purged(now_ms, last_used_ms);
    }

    /// A request had to have a sandbox started.
    pub fn missed(&mut self, now_ms: u64) {
        self.gaps.missed(now_ms);
    }

    /// Takes in what one sandbox used while warm, bytes.
    pub fn warm_memory(&mut self, bytes: u64) {
        average(&mut self.warm_bytes, bytes);
    }

    /// Takes in what one sandbox used while dedup, bytes.
    pub fn dedup_memory(&mut self, bytes: u64) {
        average(&mut self.dedup_bytes, bytes);
    }

    /// Takes in what one restore needed in memory besides the dedup sandbox and the warm one that
    /// it became, bytes.
    pub fn restore_memory(&mut self, bytes: u64) {
        average(&mut self.restore_bytes, bytes);
    }

    /// How many requests found their sandbox in the state `start`.
    #[must_use]
    pub fn starts(&self, start: StartKind) -> u64 {
        self.starts[start as usize]
    }

    /// The memory that one more warm sandbox is expected to use; `None` before the first one.
    #[must_use]
    pub fn expected_warm_bytes(&self) -> Option<u64> {
        (self.warm_bytes > 0.0).then_some(self.warm_bytes as u64)
    }

    /// The memory that one more dedup sandbox is expected to use; `None` before the first one.
    #[must_use]
    pub fn expected_dedup_bytes(&self) -> Option<u64> {
        (self.dedup_bytes > 0.0).then_some(self.dedup_bytes as u64)
    }

    /// See [`FunctionStats::restore_memory`].
    #[must_use]
    pub fn expected_restore_bytes(&self) -> u64 {
        self.restore_bytes as u64
    }

    /// Average startup of requests that found a warm sandbox, microseconds.
    #[must_use]
    pub fn warm_startup_us(&self) -> Option<u64> {
        self.warm_start.average_us()
    }

    /// Times between requests, in the form that [`crate::Adaptive`] wants.
    #[must_use]
    pub fn idle_times(&self) -> &IdleTimes {
        &self.idle_times
    }

    /// Times that sandboxes stood idle.
    #[must_use]
    pub fn gaps(&self) -> &ReuseGaps {
        &self.gaps
    }

    /// When the last request arrived, milliseconds on the caller's clock.
    #[must_use]
    pub fn last_arrival_ms(&self) -> Option<u64> {
        self.last_arrival_ms
    }

    /// Requests of the last hour.
    #[must_use]
    pub fn recent_requests(&self, now_ms: u64) -> u64 {
        let window = now_ms / WINDOW_MS;
        let recent = self.windows.iter().filter(|(w, _)| w + (WINDOWS as u64) > window);
        recent.map(|(_, n)| u64::from(*n)).sum()
    }

    /// Execution times.
    #[must_use]
    pub fn execution(&self) -> &Latency {
        &self.execution
    }

    /// Startup times of one kind; `None` for warm starts, of which there is the average only:
    /// [`FunctionStats::warm_startup_us`].
    #[must_use]
    pub fn startup(&self, start: StartKind) -> Option<&Latency> {
        match start {
            StartKind::Cold => Some(&self.cold_start),
            StartKind::Dedup => Some(&self.restore),
            StartKind::Warm => None,
        }
    }

    /// Requests per minute over the last hour, or since the first request if that is shorter.
    #[must_use]
    pub fn arrivals_per_minute(&self, now_ms: u64) -> f64 {
        let window = now_ms / WINDOW_MS;
        let recent = || self.windows.iter().filter(|(w, _)| w + (WINDOWS as u64) > window);
        let Some((first, _)) = recent().next() else { return 0.0 };
        let count: u64 = recent().map(|(_, n)| u64::from(*n)).sum();
        count as f64 / (window.saturating_sub(*first) + 1) as f64
    }

    /// The most requests in one minute of the last hour.
    #[must_use]
    pub fn peak_per_minute(&self) -> u32 {
        self.windows.iter().map(|(_, n)| *n).max().unwrap_or(0)
    }

    /// In a form to be shown.
    #[must_use]
    pub fn summary(&self, now_ms: u64) -> StatsSummary {
        StatsSummary {
            execution_p50_us: self.execution.quantile_us(0.5),
            execution_p99_us: self.execution.quantile_us(0.99),
            cold_start_p50_us: self.cold_start.quantile_us(0.5),
            restore_p50_us: self.restore.quantile_us(0.5),
            arrivals_per_minute: self.arrivals_per_minute(now_ms),
            peak_per_minute: self.peak_per_minute(),
            warm_bytes: self.expected_warm_bytes(),
            dedup_bytes: self.expected_dedup_bytes(),
        }
    }
}

fn average(average: &mut f64, bytes: u64) {
    let value = bytes as f64;
    *average = if *average == 0.0 { value } else { *average + WEIGHT * (value - *average) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_kind() {
        let mut s = FunctionStats::default();
        s.served(StartKind::Cold, 80_000, 1_000, false);
        s.served(StartKind::Warm, 0, 1_000, true);
        s.served(StartKind::Dedup, 5_000, 1_000, false);
        assert_eq!(
            [StartKind::Cold, StartKind::Warm, StartKind::Dedup].map(|k| s.starts(k)),
            [1; 3]
        );
        assert_eq!(s.errors, 1);
        assert_eq!(s.execution().average_us(), Some(1_000));
        assert!(s.startup(StartKind::Dedup).unwrap().quantile_us(0.5) >= Some(5_000));
    }

    #[test]
    fn arrivals_older_than_an_hour_are_forgotten() {
        let mut s = FunctionStats::default();
        for minute in 0..120 {
            for _ in 0..3 {
                s.arrived(minute * WINDOW_MS);
            }
        }
        assert_eq!(s.windows.len(), WINDOWS);
        assert_eq!(s.peak_per_minute(), 3);
        assert!((s.arrivals_per_minute(119 * WINDOW_MS) - 3.0).abs() < 1e-9);
        assert_eq!(s.arrivals_per_minute(500 * WINDOW_MS), 0.0);
    }
}
