//! Measuring tools: the dedup engine's speed, what it saves, what memory has in common.
//!
//! All of them look at real functions: a [`testbed::Testbed`] runs example functions in sandboxes
//! of a private node, and [`dump::Dump`] takes their memory while they stand still. On that memory
//! [`engine`] times the engine's parts, [`savings`] deduplicates with every kind of base and
//! layout, and [`redundancy`] finds how much of one memory is in another. The last needs no
//! sandbox: it works on any process.

#![forbid(unsafe_code)]

pub mod analysis;
pub mod bank;
pub mod chart;
pub mod dump;
pub mod engine;
pub mod examples;
pub mod functions;
pub mod machine;
pub mod redundancy;
pub mod registry;
pub mod savings;
pub mod testbed;

/// A share as a number between 0 and 1 with four digits after the point; 0 of nothing.
#[must_use]
pub(crate) fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { round(part / whole, 4) } else { 0.0 }
}

/// A number with so many digits after the point.
#[must_use]
pub(crate) fn round(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

/// The mean; 0 of nothing.
#[must_use]
pub(crate) fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, n) = values.into_iter().fold((0.0, 0u32), |(sum, n), v| (sum + v, n + 1));
    if n == 0 { 0.0 } else { round(sum / f64::from(n), 4) }
}

/// The median; 0 of nothing.
#[must_use]
pub(crate) fn median(times: &[std::time::Duration]) -> std::time::Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
