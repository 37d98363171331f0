//! Traces made up, with the distributions that were published for Azure Functions.
//!
//! *Serverless in the Wild* (Shahrad et al., ATC '20) gives: shares of functions by trigger
//! (figure 3); average rates that range over eight orders of magnitude, 45 % of functions with at
//! most one call an hour and 81 % with at most one a minute (figure 5); gaps between calls that
//! are constant for most timers, exponential for few and burstier for many (figure 6); execution
//! times that fit a log-normal with mean -0.38 and deviation 2.36 of the logarithm of seconds
//! (figure 7); memory that fits a Burr distribution with c = 11.652, k = 0.221 and a scale of
//! 107.083 MB (figure 8).

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::TraceError;
use crate::random::Random;

/// What trace to make.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Making {
    /// Everything random comes from this.
    pub seed: u64,
    /// How many functions.
    pub functions: u32,
    /// How many minutes.
    pub minutes: u32,
    /// About how many calls in all. The rates of the busiest fifth of functions are stretched to
    /// come to that; the rates below one a minute are as published.
    pub calls: u64,
}

/// The files that were written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MadeFiles {
    /// Calls per function and minute.
    pub invocations: PathBuf,
    /// Durations.
    pub durations: PathBuf,
    /// Memory.
    pub memory: PathBuf,
    /// How many calls there are.
    pub calls: u64,
}

/// The triggers, and the share of functions that has each.
const TRIGGERS: [(&str, f64); 7] = [
    ("http", 0.550),
    ("timer", 0.156),
    ("queue", 0.152),
    ("orchestration", 0.069),
    ("storage", 0.028),
    ("event", 0.022),
    ("others", 0.023),
];

/// Shares of functions by average rate: calls a minute.
const ONE_A_WEEK: f64 = 1.0 / 10_080.0;
const ONE_AN_HOUR: f64 = 1.0 / 60.0;
const AT_MOST_HOURLY: f64 = 0.45;
const AT_MOST_MINUTELY: f64 = 0.81;

/// How a function's calls are spread in time.
enum Pattern {
    /// Every so many minutes from a minute on, this many.
    Timer { period: u32, first: u32, count: u32 },
    /// Independent calls.
    Poisson { per_minute: f64 },
    /// Calls whose rate changes at random, with the shape of a gamma distribution that is drawn
    /// anew every so many minutes.
    Bursty { per_minute: f64, shape: f64, period: u32 },
}

/// Makes a trace in the Azure 2019 format in a directory.
///
/// # Errors
/// If a file can't be written.
pub fn make(dir: &Path, making: Making) -> Result<MadeFiles, TraceError> {
    std::fs::create_dir_all(dir).map_err(TraceError::io(dir))?;
    let path = |name: &str| dir.join(name);
    let mut files = MadeFiles {
        invocations: path("invocations.csv"),
        durations: path("durations.csv"),
        memory: path("memory.csv"),
        calls: 0,
    };
    let create = |path: &Path| {
        File::create(path)
            .map(|f| BufWriter::with_capacity(1 << 16, f))
            .map_err(TraceError::io(path))
    };
    let mut invocations = create(&files.invocations)?;
    let mut durations = create(&files.durations)?;
    let mut memory = create(&files.memory)?;
    write_all(&mut invocations, &mut durations, &mut memory, making, &mut files.calls)
        .map_err(TraceError::io(dir))?;
    Ok(files)
}

fn write_all(
    invocations: &mut impl Write,
    durations: &mut impl Write,
    memory: &mut impl Write,
    making: Making,
    calls: &mut u64,
) -> std::io::Result<()> {
    write!(invocations, "HashOwner,HashApp,HashFunction,Trigger")?;
    for minute in 1..=making.minutes {
        write!(invocations, ",{minute}")?;
    }
    writeln!(invocations)?;
    write!(durations, "HashOwner,HashApp,HashFunction,Average,Count,Minimum,Maximum")?;
    for p in [0, 1, 25, 50, 75, 99, 100] {
        write!(durations, ",percentile_Average_{p}")?;
    }
    writeln!(durations)?;
    writeln!(memory, "HashFunction,HashOwner,HashApp,SampleCount,AverageAllocatedMb")?;

    let top = busiest_rate(making);
    for f in 0..making.functions {
        let mut random = Random::new(making.seed, u64::from(f));
        let hash = |random: &mut Random| {
            format!(
                "{:016x}{:016x}{:016x}{:016x}",
                random.bits(),
                random.bits(),
                random.bits(),
                random.bits()
            )
        };
        let (owner, app, function) = (hash(&mut random), hash(&mut random), hash(&mut random));
        // Ranks are dealt out evenly, so that few functions have the published spread too.
        let rank = (f64::from(f) + random.unit()) / f64::from(making.functions);
        let rate = rate_at(rank, top);
        let trigger = trigger(&mut random);
        let pattern = pattern(&mut random, trigger, rate);
        write!(invocations, "{owner},{app},{function},{trigger}")?;
        let mut level = 1.0;
        for minute in 0..making.minutes {
            let count = pattern.count(&mut random, minute, &mut level);
            *calls += count;
            write!(invocations, ",{count}")?;
        }
        writeln!(invocations)?;

        // The published fit is of functions' averages; calls of one function differ less.
        let median = 1e3 * random.log_normal(-0.38, 2.36).clamp(0.001, 600.0);
        let spread = 0.2 + 0.6 * random.unit();
        let at = |z: f64| (median * (z * spread).exp()).round().max(1.0);
        let list = [-3.0, -2.326, -0.674, 0.0, 0.674, 2.326, 3.0].map(at);
        let average = (median * (spread * spread / 2.0).exp()).round();
        write!(durations, "{owner},{app},{function},{average},1,{},{}", list[0], list[6])?;
        list.iter().try_for_each(|ms| write!(durations, ",{ms}"))?;
        writeln!(durations)?;
        let mb = random.burr(11.652, 0.221, 107.083).clamp(10.0, 1_536.0);
        writeln!(memory, "{function},{owner},{app},1,{mb:.2}")?;
    }
    invocations.flush()?;
    durations.flush()?;
    memory.flush()
}

fn log_between(from: f64, to: f64, share: f64) -> f64 {
    from * (to / from).powf(share)
}

/// The average rate of the function at a rank from 0 to 1, calls a minute, if the busiest has
/// `top`.
fn rate_at(rank: f64, top: f64) -> f64 {
    if rank < AT_MOST_HOURLY {
        log_between(ONE_A_WEEK, ONE_AN_HOUR, rank / AT_MOST_HOURLY)
    } else if rank < AT_MOST_MINUTELY {
        let share = (rank - AT_MOST_HOURLY) / (AT_MOST_MINUTELY - AT_MOST_HOURLY);
        log_between(ONE_AN_HOUR, 1.0, share)
    } else {
        log_between(1.0, top, (rank - AT_MOST_MINUTELY) / (1.0 - AT_MOST_MINUTELY))
    }
}

/// The rate of the busiest function such that all together come to the calls that are wanted.
fn busiest_rate(making: Making) -> f64 {
    let wanted = making.calls as f64 / f64::from(making.minutes.max(1));
    let n = making.functions.max(1);
    let sum = |top: f64| -> f64 {
        (0..n).map(|f| rate_at((f64::from(f) + 0.5) / f64::from(n), top)).sum()
    };
    let (mut low, mut high) = (1.0_f64, 1e9_f64);
    for _ in 0..100 {
        let middle = (low * high).sqrt();
        if sum(middle) < wanted { low = middle } else { high = middle }
    }
    low
}

fn trigger(random: &mut Random) -> &'static str {
    let mut left = random.unit();
    for (name, share) in TRIGGERS {
        left -= share;
        if left < 0.0 {
            return name;
        }
    }
    TRIGGERS[0].0
}

fn pattern(random: &mut Random, trigger: &str, rate: f64) -> Pattern {
    if trigger == "timer" {
        let period = (1.0 / rate).round().clamp(1.0, 10_080.0) as u32;
        return Pattern::Timer {
            period,
            first: random.below(u64::from(period)) as u32,
            count: (rate * f64::from(period)).round().max(1.0) as u32,
        };
    }
    // Of the others about a third have gaps as independent calls would, the rest burstier ones.
    if random.unit() < 0.35 {
        return Pattern::Poisson { per_minute: rate };
    }
    Pattern::Bursty {
        per_minute: rate,
        shape: log_between(0.1, 2.0, random.unit()),
        period: 1 + random.below(30) as u32,
    }
}

impl Pattern {
    fn count(&self, random: &mut Random, minute: u32, level: &mut f64) -> u64 {
        match *self {
            Self::Timer { period, first, count } => {
                if minute % period == first {
                    u64::from(count)
                } else {
                    0
                }
            }
            Self::Poisson { per_minute } => random.poisson(per_minute),
            Self::Bursty { per_minute, shape, period } => {
                if minute.is_multiple_of(period) {
                    *level = random.gamma(shape);
                }
                random.poisson(per_minute * *level)
            }
        }
    }
}
