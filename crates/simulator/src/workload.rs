//! What the trace's functions are in terms of the profile, and how long each request takes.

use medes_trace::{Arrival, Quantiles, Trace, Traits, map_functions};

use crate::config::{Execution, Functions, SimulationConfig};
use crate::profile::Profile;

/// Values of a distribution that are drawn by an index.
const DRAWS: usize = 1024;

/// A distribution to draw from, microseconds.
pub(crate) struct Draws(Vec<u32>);

impl Draws {
    pub(crate) fn new(ms: &Quantiles) -> Self {
        let value = |i: usize| ms.at((i as f64 + 0.5) / DRAWS as f64) * 1e3;
        Self((0..DRAWS).map(|i| value(i).round().min(f64::from(u32::MAX)) as u32).collect())
    }

    /// Draws with random bits.
    pub(crate) fn draw(&self, bits: u64) -> u64 {
        u64::from(self.0[bits as usize % DRAWS])
    }
}

/// What is drawn for one function of the profile.
pub(crate) struct Costs {
    pub(crate) cold: Draws,
    pub(crate) warm: Draws,
    pub(crate) restore: Draws,
    pub(crate) dedup: Draws,
    pub(crate) execution: Draws,
    pub(crate) warm_bytes: u64,
    pub(crate) dedup_bytes: u64,
    pub(crate) base_bytes: u64,
    pub(crate) restore_bytes: u64,
}

/// A simulated function.
pub(crate) struct Simulated {
    pub(crate) name: String,
    /// The profile's function.
    pub(crate) profile: u32,
}

/// The functions and their requests.
pub(crate) struct Workload {
    pub(crate) costs: Vec<Costs>,
    pub(crate) functions: Vec<Simulated>,
    /// For each function of the trace: the simulated one.
    function_of: Vec<u32>,
    /// For each function of the trace: its own durations, if they are used.
    durations: Vec<Option<Draws>>,
    trace_executes: bool,
    timeout_us: u64,
    seed: u64,
}

impl Workload {
    pub(crate) fn new(trace: &Trace, profile: &Profile, config: &SimulationConfig) -> Self {
        let traits: Vec<_> = trace
            .functions
            .iter()
            .map(|f| Traits {
                duration: f.duration_ms.as_ref().map(Quantiles::median),
                memory: f.memory.map(|m| m as f64),
            })
            .collect();
        let at_hand: Vec<_> = profile
            .functions
            .iter()
            .map(|f| Traits {
                duration: Some(f.execution_ms.median()),
                memory: Some(f.warm_bytes as f64),
            })
            .collect();
        let mapped: Vec<u32> =
            map_functions(&traits, &at_hand).into_iter().map(|p| p as u32).collect();
        let (functions, function_of) = match config.functions {
            Functions::Profile => {
                let simulated = profile
                    .functions
                    .iter()
                    .enumerate()
                    .map(|(i, f)| Simulated { name: f.name.clone(), profile: i as u32 });
                (simulated.collect(), mapped)
            }
            Functions::Trace => {
                let simulated = trace
                    .functions
                    .iter()
                    .zip(&mapped)
                    .map(|(f, p)| Simulated { name: f.name.clone(), profile: *p });
                (simulated.collect(), (0..trace.functions.len() as u32).collect())
            }
        };
        let trace_executes = config.execution == Execution::Trace;
        let durations = trace
            .functions
            .iter()
            .map(|f| f.duration_ms.as_ref().filter(|_| trace_executes).map(Draws::new))
            .collect();
        let costs = profile
            .functions
            .iter()
            .map(|f| Costs {
                cold: Draws::new(&f.cold_ms),
                warm: Draws::new(&f.warm_ms),
                restore: Draws::new(&f.restore_ms),
                dedup: Draws::new(&f.dedup_ms),
                execution: Draws::new(&f.execution_ms),
                warm_bytes: f.warm_bytes,
                dedup_bytes: f.dedup_bytes,
                base_bytes: f.base_bytes,
                restore_bytes: f.restore_bytes,
            })
            .collect();
        Self {
            costs,
            functions,
            function_of,
            durations,
            trace_executes,
            timeout_us: config.timeout_ms.saturating_mul(1_000),
            seed: config.seed,
        }
    }

    pub(crate) fn costs(&self, function: u32) -> &Costs {
        &self.costs[self.functions[function as usize].profile as usize]
    }

    pub(crate) fn function_of(&self, arrival: &Arrival) -> u32 {
        self.function_of[arrival.function as usize]
    }

    /// Random bits of a request: the same whatever the policy, so that two runs can be compared
    /// request by request.
    pub(crate) fn bits(&self, request: u64) -> u64 {
        let mut z = (request ^ self.seed.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// How long the request runs, microseconds.
    pub(crate) fn execution_us(&self, arrival: &Arrival, bits: u64) -> u64 {
        let own = match (self.trace_executes, arrival.duration_us) {
            (true, Some(us)) => Some(u64::from(us)),
            _ => self.durations[arrival.function as usize].as_ref().map(|d| d.draw(bits)),
        };
        let us = own.unwrap_or_else(|| {
            let function = self.function_of[arrival.function as usize];
            self.costs(function).execution.draw(bits)
        });
        us.min(self.timeout_us)
    }
}
