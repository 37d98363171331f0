//! A trace, whatever its format.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::counts::{MinuteCounts, Trigger};
use crate::error::TraceError;
use crate::sorter::Sorted;
use crate::table::Table;
use crate::{azure2019, events};

pub use crate::arrivals::{Arrival, Arrivals};

/// The formats that are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Azure Functions 2019: calls per function and minute.
    Azure2019,
    /// Azure Functions 2021: a log of calls, by their ends.
    Azure2021,
    /// A plain table of calls: `time_ms,function[,duration_ms]`.
    Plain,
}

/// What was wrong in a trace and was repaired, by kind. Each counts lines or functions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Repairs {
    /// A function had more than one line of invocations: their minutes were added up.
    pub duplicate_functions: u64,
    /// A function had more than one line of durations or memory: the first holds.
    pub duplicate_values: u64,
    /// Durations below 0, which the data sets have where clocks were set: taken as 0.
    pub negative_durations: u64,
    /// Percentiles that do not grow: sorted.
    pub unsorted_percentiles: u64,
    /// Lines earlier than the one before them: sorted by time.
    pub backwards: u64,
    /// Calls that began before the log: moved to its beginning.
    pub before_start: u64,
    /// Functions without durations: whoever replays them chooses.
    pub without_durations: u64,
    /// Functions without memory: likewise.
    pub without_memory: u64,
}

impl Repairs {
    /// Each kind that occurred, with a sentence on it.
    #[must_use]
    pub fn list(&self) -> Vec<(u64, &'static str)> {
        [
            (self.duplicate_functions, "lines of functions that had one already: minutes added up"),
            (self.duplicate_values, "lines of durations or memory that repeat: the first holds"),
            (self.negative_durations, "negative durations: taken as 0"),
            (self.unsorted_percentiles, "lines with percentiles that do not grow: sorted"),
            (self.backwards, "lines earlier than the one before: sorted by time"),
            (self.before_start, "calls that began before the log: moved to its beginning"),
            (self.without_durations, "functions without durations: the profile's are used"),
            (self.without_memory, "functions without memory: taken as average"),
        ]
        .into_iter()
        .filter(|(n, _)| *n > 0)
        .collect()
    }
}

/// A distribution known by some of its quantiles.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Quantiles(Vec<(f64, f64)>);

impl Quantiles {
    /// From pairs of share (0 to 1, growing) and value (not falling). `None` if there are none or
    /// they are out of order.
    #[must_use]
    pub fn new(points: Vec<(f64, f64)>) -> Option<Self> {
        let ordered = points.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1);
        let possible =
            points.iter().all(|(q, v)| (0.0..=1.0).contains(q) && *v >= 0.0 && v.is_finite());
        (!points.is_empty() && ordered && possible).then_some(Self(points))
    }

    /// Always the same value, which must be a finite number from 0 on.
    #[must_use]
    pub fn constant(value: f64) -> Self {
        Self(vec![(0.5, value)])
    }

    /// The value that the share `q` stays at or below, linear between what is known.
    #[must_use]
    pub fn at(&self, q: f64) -> f64 {
        let next = self.0.partition_point(|(share, _)| *share < q);
        match (next.checked_sub(1).map(|i| self.0[i]), self.0.get(next)) {
            (Some((q0, v0)), Some((q1, v1))) => v0 + (v1 - v0) * (q - q0) / (q1 - q0),
            (Some((_, v)), None) => v,
            (None, Some((_, v))) => *v,
            (None, None) => 0.0,
        }
    }

    /// The median.
    #[must_use]
    pub fn median(&self) -> f64 {
        self.at(0.5)
    }
}

/// One function of a trace.
#[derive(Clone, PartialEq, Debug)]
pub struct TraceFunction {
    /// Its name there.
    pub name: String,
    /// What calls it.
    pub trigger: Trigger,
    /// How often it is called in all.
    pub arrivals: u64,
    /// How long calls take, milliseconds, if the trace tells it per function.
    pub duration_ms: Option<Quantiles>,
    /// Memory, bytes, if the trace tells it.
    pub memory: Option<u64>,
}

/// How a trace is read.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TraceOptions {
    /// Where arrivals are placed inside a minute comes from this.
    pub seed: u64,
    /// How many times faster than in reality arrivals come; durations stay as they are.
    pub speed: f64,
    /// What is left out at the beginning, milliseconds of the trace's own time.
    pub skip_ms: u64,
    /// How much is read after that, milliseconds of the trace's own time.
    pub length_ms: Option<u64>,
}

impl Default for TraceOptions {
    fn default() -> Self {
        Self { seed: 1, speed: 1.0, skip_ms: 0, length_ms: None }
    }
}

/// Where arrivals come from.
pub(crate) enum Calls {
    /// Counts per minute, in the functions' order.
    Counted(Vec<MinuteCounts>),
    /// Single calls.
    Listed(Sorted),
}

/// A trace.
pub struct Trace {
    /// What it was read from.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its functions.
    pub functions: Vec<TraceFunction>,
    /// What was repaired.
    pub repairs: Repairs,
    /// Its length, milliseconds: to the end of its last minute, or to its last call.
    pub length_ms: u64,
    pub(crate) calls: Calls,
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trace")
            .field("path", &self.path)
            .field("format", &self.format)
            .field("functions", &self.functions.len())
            .finish_non_exhaustive()
    }
}

impl Trace {
    /// Opens a trace: a file of one of the formats, or a directory with the files of the Azure
    /// 2019 format. For a file of that format, durations and memory are looked for beside it.
    ///
    /// # Errors
    /// See [`TraceError`].
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let trace = if path.is_dir() {
            azure2019::open(path, None)?
        } else {
            match kind(&Table::open(path)?) {
                Kind::Invocations => {
                    azure2019::open(path.parent().unwrap_or(Path::new(".")), Some(path))?
                }
                Kind::Log => events::azure2021(path)?,
                Kind::Plain => events::plain(path)?,
                Kind::Durations | Kind::Memory | Kind::Other => {
                    return Err(TraceError::UnknownFormat { path: path.to_owned() });
                }
            }
        };
        if trace.functions.iter().all(|f| f.arrivals == 0) {
            return Err(TraceError::Empty { path: path.to_owned() });
        }
        Ok(trace)
    }

    /// All calls together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.functions.iter().map(|f| f.arrivals).sum()
    }

    /// The arrivals, by time.
    ///
    /// # Errors
    /// If a temporary file can't be read.
    pub fn arrivals(&self, options: TraceOptions) -> Result<Arrivals<'_>, TraceError> {
        Arrivals::new(self, options)
    }
}

/// What a table is, by its header.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Invocations,
    Durations,
    Memory,
    Log,
    Plain,
    Other,
}

pub(crate) fn kind(table: &Table) -> Kind {
    let has = |names: &[&str]| names.iter().all(|n| table.find(n).is_some());
    if has(&["HashFunction", "Trigger"]) {
        Kind::Invocations
    } else if has(&["HashFunction", "percentile_Average_50"]) {
        Kind::Durations
    } else if has(&["HashApp", "AverageAllocatedMb"]) {
        Kind::Memory
    } else if has(&["func", "end_timestamp"]) {
        Kind::Log
    } else if has(&["time_ms"]) {
        Kind::Plain
    } else {
        Kind::Other
    }
}
