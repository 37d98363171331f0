//! Traces that list single calls: the Azure Functions log of 2021 and plain tables.

use std::collections::HashMap;
use std::path::Path;

use crate::azure2019::MAX_DURATION_MS;
use crate::counts::Trigger;
use crate::error::TraceError;
use crate::sorter::Sorter;
use crate::table::Table;
use crate::trace::{Calls, Format, Repairs, Trace, TraceFunction};

/// A hundred years, milliseconds: what comes later is taken for a mistake, or for seconds since
/// 1970 in the wrong unit.
const MAX_TIME_MS: f64 = 3.2e12;
/// Stands for a duration that is not known.
pub(crate) const NO_DURATION: u32 = u32::MAX;

/// Collects calls.
struct Collector {
    path: std::path::PathBuf,
    sorter: Sorter,
    names: HashMap<String, u32>,
    functions: Vec<TraceFunction>,
    repairs: Repairs,
    before_us: u64,
    last_us: u64,
}

impl Collector {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            sorter: Sorter::new(),
            names: HashMap::new(),
            functions: Vec::new(),
            repairs: Repairs::default(),
            before_us: 0,
            last_us: 0,
        }
    }

    /// `order_ms` is the time by which the file's lines should be sorted.
    fn add(
        &mut self,
        name: &str,
        order_ms: f64,
        start_ms: f64,
        duration_ms: Option<f64>,
    ) -> Result<(), TraceError> {
        let index = match self.names.get(name) {
            Some(index) => *index,
            None => {
                let index = self.functions.len() as u32;
                self.names.insert(name.to_owned(), index);
                self.functions.push(TraceFunction {
                    name: name.to_owned(),
                    trigger: Trigger::Other,
                    arrivals: 0,
                    duration_ms: None,
                    memory: None,
                });
                index
            }
        };
        let micros = |ms: f64| (ms * 1e3).round() as u64;
        self.repairs.before_start += u64::from(start_ms < 0.0);
        self.repairs.backwards += u64::from(micros(order_ms.max(0.0)) < self.before_us);
        self.before_us = micros(order_ms.max(0.0));
        let start = micros(start_ms.max(0.0));
        let duration = match duration_ms {
            None => NO_DURATION,
            Some(ms) => {
                self.repairs.negative_durations += u64::from(ms < 0.0);
                micros(ms.max(0.0)).min(u64::from(NO_DURATION) - 1) as u32
            }
        };
        self.last_us = self.last_us.max(start);
        self.functions[index as usize].arrivals += 1;
        self.sorter.push((start, index, duration)).map_err(TraceError::io(&self.path))
    }

    fn finish(mut self, format: Format, durations: bool) -> Trace {
        let functions = self.functions.len() as u64;
        self.repairs.without_durations = if durations { 0 } else { functions };
        self.repairs.without_memory = functions;
        Trace {
            path: self.path,
            format,
            functions: self.functions,
            repairs: self.repairs,
            length_ms: self.last_us.div_ceil(1_000),
            calls: Calls::Listed(self.sorter.finish()),
        }
    }
}

/// Reads `app,func,end_timestamp,duration`, both times in seconds. A call begins its duration
/// before its end.
pub(crate) fn azure2021(path: &Path) -> Result<Trace, TraceError> {
    let mut table = Table::open(path)?;
    let (app, func) = (table.column("app")?, table.column("func")?);
    let (end, duration) = (table.column("end_timestamp")?, table.column("duration")?);
    let mut collector = Collector::new(path);
    let mut name = String::new();
    while let Some(row) = table.next()? {
        name.clear();
        name.push_str(row.name(app, "app")?);
        name.push('/');
        name.push_str(row.name(func, "function")?);
        let end_ms = 1e3 * row.number(end, "the end in s", 0.0, MAX_TIME_MS / 1e3)?;
        let most = MAX_DURATION_MS / 1e3;
        let ms = 1e3 * row.number(duration, "a duration in s", -most, most)?;
        collector.add(&name, end_ms, end_ms - ms.max(0.0), Some(ms))?;
    }
    Ok(collector.finish(Format::Azure2021, true))
}

/// Reads `time_ms,function[,duration_ms]`.
pub(crate) fn plain(path: &Path) -> Result<Trace, TraceError> {
    let mut table = Table::open(path)?;
    let (time, function) = (table.column("time_ms")?, table.column("function")?);
    let duration = table.find("duration_ms");
    let mut collector = Collector::new(path);
    while let Some(row) = table.next()? {
        let at = row.number(time, "a time in ms", 0.0, MAX_TIME_MS)?;
        let name = row.name(function, "function")?;
        let ms = match duration {
            Some(c) => {
                Some(row.number(c, "a duration in ms", -MAX_DURATION_MS, MAX_DURATION_MS)?)
            }
            None => None,
        };
        collector.add(name, at, at, ms)?;
    }
    Ok(collector.finish(Format::Plain, duration.is_some()))
}
