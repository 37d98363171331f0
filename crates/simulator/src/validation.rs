//! A live run and its simulation, side by side.

use std::collections::BTreeMap;

use medes_core::StartKind;
use medes_trace::Quantiles;
use serde::{Deserialize, Serialize};

use crate::engine::{Observer, Outcome};
use crate::latency::{LatencyHistogram, LatencySummary};
use crate::profile::{FunctionProfile, Profile};
use crate::result::StartCounts;

/// Samples of a time from which its distribution is taken; with fewer what the profile says stays.
const ENOUGH: usize = 5;
/// The quantiles that a distribution is kept by.
const SHARES: [f64; 11] = [0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0];

/// One request of a live run that was answered. Times are microseconds.
#[derive(Clone, PartialEq, Debug)]
pub struct Served {
    /// Its number in the order of arrival.
    pub request: u64,
    /// Its function.
    pub function: String,
    /// The state in which it found its sandbox.
    pub start: StartKind,
    /// All that was not its execution.
    pub startup_us: u64,
    /// Its execution.
    pub execution_us: u64,
}

/// What is told of one side.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Side {
    /// Requests.
    pub starts: StartCounts,
    /// All that was not execution, of requests that found no sandbox.
    pub cold: LatencySummary,
    /// Of those that found a warm one.
    pub warm: LatencySummary,
    /// Of those that found a dedup one.
    pub dedup: LatencySummary,
    /// Executions.
    pub execution: LatencySummary,
    /// From arrival to answer.
    pub end_to_end: LatencySummary,
    /// The distribution of that: milliseconds, and the share at or below.
    pub end_to_end_curve: Vec<(f64, f64)>,
    /// By function.
    pub functions: BTreeMap<String, StartCounts>,
}

impl Side {
    /// The distributions, with what to call them.
    #[must_use]
    pub fn times(&self) -> [(&'static str, LatencySummary); 5] {
        [
            ("cold startup", self.cold),
            ("warm startup", self.warm),
            ("dedup startup", self.dedup),
            ("execution", self.execution),
            ("end to end", self.end_to_end),
        ]
    }
}

/// Both sides.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Validation {
    /// Where the live run comes from.
    pub origin: String,
    /// Whether the simulation's times are those of the live run, so that only scheduler and policy
    /// are compared.
    pub calibrated: bool,
    /// What happened.
    pub live: Side,
    /// What was simulated.
    pub simulated: Side,
    /// Requests that both sides answered.
    pub compared: u64,
    /// Of those, the share that found the same kind of sandbox.
    pub same_start: f64,
}

/// Adds up one side.
#[derive(Default)]
struct Tally {
    starts: StartCounts,
    startup: [LatencyHistogram; 3],
    execution: LatencyHistogram,
    end_to_end: LatencyHistogram,
    functions: BTreeMap<String, StartCounts>,
    /// By request: the kind of its start, or none.
    kinds: Vec<Option<StartKind>>,
}

impl Tally {
    fn add(
        &mut self,
        request: u64,
        function: &str,
        start: StartKind,
        startup_us: u64,
        execution_us: u64,
    ) {
        if !self.functions.contains_key(function) {
            self.functions.insert(function.to_owned(), StartCounts::default());
        }
        if let Some(own) = self.functions.get_mut(function) {
            own.count(start);
        }
        self.starts.count(start);
        self.startup[start as usize].record(startup_us);
        self.execution.record(execution_us);
        self.end_to_end.record(startup_us + execution_us);
        let at = request as usize;
        if self.kinds.len() <= at {
            self.kinds.resize(at + 1, None);
        }
        self.kinds[at] = Some(start);
    }

    fn side(&self) -> Side {
        let of = |kind: StartKind| self.startup[kind as usize].summary();
        Side {
            starts: self.starts,
            cold: of(StartKind::Cold),
            warm: of(StartKind::Warm),
            dedup: of(StartKind::Dedup),
            execution: self.execution.summary(),
            end_to_end: self.end_to_end.summary(),
            end_to_end_curve: self.end_to_end.curve(),
            functions: self.functions.clone(),
        }
    }
}

/// Times of one function of a live run, milliseconds.
#[derive(Default)]
struct Times {
    execution: Vec<f64>,
    startup: [Vec<f64>; 3],
}

/// A live run that a simulation is to be compared with. It is an [`Observer`] of that simulation.
#[derive(Default)]
pub struct Comparison {
    live: Tally,
    simulated: Tally,
    times: BTreeMap<String, Times>,
    /// The simulated functions, by their numbers.
    names: Vec<String>,
}

impl std::fmt::Debug for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Comparison").field("names", &self.names).finish_non_exhaustive()
    }
}

impl Comparison {
    /// Takes in one request of the live run.
    pub fn served(&mut self, s: &Served) {
        self.live.add(s.request, &s.function, s.start, s.startup_us, s.execution_us);
        let times = self.times.entry(s.function.clone()).or_default();
        times.execution.push(s.execution_us as f64 / 1e3);
        times.startup[s.start as usize].push(s.startup_us as f64 / 1e3);
    }

    /// The profile to simulate with: `functions` in this order, as `known` has them, and with the
    /// times of the live run if `calibrate`. The error is a function that nothing is known of.
    ///
    /// # Errors
    /// The name of that function.
    pub fn profile(
        &mut self,
        known: &Profile,
        functions: &[String],
        calibrate: bool,
    ) -> Result<Profile, String> {
        let mut list = Vec::new();
        for name in functions {
            let mut own = known.functions.iter().find(|f| f.name == *name).cloned();
            if calibrate {
                let own = own.get_or_insert_with(|| unknown(name));
                if let Some(times) = self.times.get(name) {
                    calibrated(own, times);
                }
            }
            list.push(own.ok_or_else(|| name.clone())?);
        }
        self.names = functions.to_vec();
        let source = if calibrate {
            format!("times as in the live run; sizes, and what it had too few of: {}", known.source)
        } else {
            known.source.clone()
        };
        Ok(Profile { source, functions: list })
    }

    /// Both sides, once the simulation is over.
    #[must_use]
    pub fn finish(self, origin: String, calibrated: bool) -> Validation {
        let both = self.live.kinds.iter().zip(&self.simulated.kinds);
        let both: Vec<_> = both.filter_map(|(a, b)| Some(((*a)?, (*b)?))).collect();
        let same = both.iter().filter(|(a, b)| a == b).count();
        Validation {
            origin,
            calibrated,
            live: self.live.side(),
            simulated: self.simulated.side(),
            compared: both.len() as u64,
            same_start: if both.is_empty() { 0.0 } else { same as f64 / both.len() as f64 },
        }
    }
}

impl Observer for Comparison {
    fn outcome(&mut self, o: &Outcome) {
        let name = self.names.get(o.function as usize).map_or("", String::as_str);
        self.simulated.add(o.request, name, o.start, o.queue_us + o.startup_us, o.execution_us);
    }
}

/// A small function, for one that no profile knows.
fn unknown(name: &str) -> FunctionProfile {
    let constant = Quantiles::constant;
    FunctionProfile {
        name: name.to_owned(),
        execution_ms: constant(1.0),
        cold_ms: constant(100.0),
        warm_ms: constant(1.0),
        restore_ms: constant(5.0),
        dedup_ms: constant(100.0),
        warm_bytes: 16_000_000,
        dedup_bytes: 1_000_000,
        base_bytes: 15_000_000,
        restore_bytes: 0,
    }
}

fn calibrated(profile: &mut FunctionProfile, times: &Times) {
    let [cold, warm, dedup] =
        [StartKind::Cold, StartKind::Warm, StartKind::Dedup].map(|k| &times.startup[k as usize]);
    for (place, samples) in [
        (&mut profile.execution_ms, &times.execution),
        (&mut profile.cold_ms, cold),
        (&mut profile.warm_ms, warm),
        (&mut profile.restore_ms, dedup),
    ] {
        if let Some(quantiles) = distribution(samples) {
            *place = quantiles;
        }
    }
}

fn distribution(samples: &[f64]) -> Option<Quantiles> {
    if samples.len() < ENOUGH {
        return None;
    }
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len() - 1;
    Quantiles::new(SHARES.map(|q| (q, sorted[(q * last as f64).round() as usize])).to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(request: u64, start: StartKind, startup_us: u64) -> Served {
        Served { request, function: "f".into(), start, startup_us, execution_us: 2_000 }
    }

    fn outcome(request: u64, start: StartKind) -> Outcome {
        Outcome {
            request,
            arrived_us: 0,
            function: 0,
            node: 0,
            start,
            queue_us: 500,
            startup_us: 500,
            execution_us: 2_000,
        }
    }

    #[test]
    fn requests_of_both_sides_are_matched_by_number() {
        let mut c = Comparison::default();
        c.served(&served(0, StartKind::Cold, 90_000));
        c.served(&served(1, StartKind::Warm, 1_000));
        c.served(&served(3, StartKind::Dedup, 4_000));
        c.profile(&Profile::measured(), &["f".into()], true).unwrap();
        for (request, start) in
            [(0, StartKind::Cold), (1, StartKind::Warm), (2, StartKind::Warm), (3, StartKind::Warm)]
        {
            c.outcome(&outcome(request, start));
        }
        let v = c.finish("x".into(), true);
        assert_eq!((v.compared, v.live.starts.total(), v.simulated.starts.total()), (3, 3, 4));
        assert!((v.same_start - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!(v.simulated.functions["f"].warm, 3);
        assert!(v.live.cold.p50_ms >= 90.0 && v.simulated.warm.p50_ms >= 1.0);
    }

    #[test]
    fn a_calibrated_profile_has_the_runs_times_where_there_are_enough() {
        let mut c = Comparison::default();
        for i in 0..9 {
            c.served(&served(i, StartKind::Warm, 3_000 + i));
        }
        c.served(&served(9, StartKind::Cold, 77_000));
        let names = ["f".to_owned(), "vanilla".to_owned()];
        let known = Profile::measured();
        assert_eq!(c.profile(&known, &names, false), Err("f".into()));
        let p = c.profile(&known, &names, true).unwrap();
        let ms = p.functions[0].warm_ms.median();
        assert!((3.0..3.1).contains(&ms), "{ms}");
        // One is not enough.
        assert!((p.functions[0].cold_ms.median() - 100.0).abs() < 1e-9);
        assert_eq!(p.functions[1], known.functions[0]);
    }
}
