//! The Azure Functions data set of 2019: calls per function and minute, with durations and memory
//! in files of their own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::counts::{MinuteCounts, Trigger};
use crate::error::{TraceError, What};
use crate::table::Table;
use crate::trace::{Calls, Format, Kind, Quantiles, Repairs, Trace, TraceFunction, kind};

/// More calls of one function in one minute are taken for a mistake.
const MAX_COUNT: f64 = 1e9;
/// A year, milliseconds: what takes longer is taken for a mistake.
pub(crate) const MAX_DURATION_MS: f64 = 31_536_000_000.0;
/// More memory is taken for a mistake, MiB.
const MAX_MEMORY_MB: f64 = 1e7;

/// The minutes of a table's columns: the first column, and how many follow.
struct Minutes {
    column: usize,
    count: usize,
}

/// Reads the trace of a directory, or one file of invocations with what lies beside it. Several
/// files of invocations in a directory are days that follow each other in the order of their names.
pub(crate) fn open(dir: &Path, only: Option<&Path>) -> Result<Trace, TraceError> {
    let mut invocations: Vec<PathBuf> = only.map(Path::to_owned).into_iter().collect();
    let (mut durations, mut memory) = (Vec::new(), Vec::new());
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(TraceError::io(dir))? {
        let path = entry.map_err(TraceError::io(dir))?.path();
        if path.extension().is_some_and(|e| e == "csv") && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    for path in files {
        // Somebody else's file is no reason to refuse.
        let Ok(table) = Table::open(&path) else { continue };
        match kind(&table) {
            Kind::Invocations if only.is_none() => invocations.push(path),
            Kind::Durations => durations.push(path),
            Kind::Memory => memory.push(path),
            _ => {}
        }
    }
    if invocations.is_empty() {
        return Err(TraceError::UnknownFormat { path: dir.to_owned() });
    }

    let mut repairs = Repairs::default();
    let mut reader = Reader::default();
    for path in &invocations {
        reader.read(path, &mut repairs)?;
    }
    let Reader { mut functions, apps, counts, minutes, .. } = reader;
    let mut known = HashMap::new();
    for path in &durations {
        read_durations(path, &mut known, &mut repairs)?;
    }
    let mut sizes = HashMap::new();
    for path in &memory {
        read_memory(path, &mut sizes, &mut repairs)?;
    }
    for (f, app) in functions.iter_mut().zip(apps) {
        f.duration_ms = known.remove(&f.name);
        f.memory = sizes.get(&f.name).or_else(|| sizes.get(&app)).copied();
        repairs.without_durations += u64::from(f.duration_ms.is_none());
        repairs.without_memory += u64::from(f.memory.is_none());
    }
    Ok(Trace {
        path: only.unwrap_or(dir).to_owned(),
        format: Format::Azure2019,
        functions,
        repairs,
        length_ms: u64::from(minutes) * 60_000,
        calls: Calls::Counted(counts),
    })
}

#[derive(Default)]
struct Reader {
    names: HashMap<String, usize>,
    functions: Vec<TraceFunction>,
    apps: Vec<String>,
    counts: Vec<MinuteCounts>,
    /// Minutes of the files before this one.
    minutes: u32,
}

impl Reader {
    fn read(&mut self, path: &Path, repairs: &mut Repairs) -> Result<(), TraceError> {
        let mut table = Table::open(path)?;
        let function = table.column("HashFunction")?;
        let (app, trigger) = (table.find("HashApp"), table.column("Trigger")?);
        let minutes = minutes(&table)?;
        let mut seen = std::collections::HashSet::new();
        while let Some(row) = table.next()? {
            let name = row.name(function, "function")?;
            let index = *self.names.entry(name.to_owned()).or_insert_with(|| {
                self.functions.push(TraceFunction {
                    name: name.to_owned(),
                    trigger: Trigger::parse(row.get(trigger)),
                    arrivals: 0,
                    duration_ms: None,
                    memory: None,
                });
                self.apps.push(app.map_or(String::new(), |app| row.get(app).to_owned()));
                self.counts.push(MinuteCounts::default());
                self.counts.len() - 1
            });
            let mut list = Vec::with_capacity(minutes.count);
            for column in minutes.column..minutes.column + minutes.count {
                // Most are 0, and this is most of the work.
                let count = match row.get(column) {
                    "0" => 0.0,
                    _ => row.number(column, "a count of calls", 0.0, MAX_COUNT)?,
                };
                if count.fract() != 0.0 {
                    let text = row.get(column).to_owned();
                    return Err(row.error(column, What::NotANumber(text)));
                }
                list.push(count as u32);
            }
            let counts = &mut self.counts[index];
            if seen.insert(index) {
                while counts.minutes() < self.minutes {
                    counts.push(0);
                }
                list.iter().for_each(|c| counts.push(*c));
            } else {
                repairs.duplicate_functions += 1;
                let mut all = vec![0u32; counts.minutes() as usize];
                counts.iter().for_each(|(m, c)| all[m as usize] = c);
                let last_day = all.len() - list.len();
                for (sum, more) in all[last_day..].iter_mut().zip(&list) {
                    *sum = sum.saturating_add(*more);
                }
                *counts = MinuteCounts::default();
                all.iter().for_each(|c| counts.push(*c));
            }
            self.functions[index].arrivals = counts.total();
        }
        self.minutes += minutes.count as u32;
        Ok(())
    }
}

/// The minutes' columns are the numbers at the end of the header, one after the other.
fn minutes(table: &Table) -> Result<Minutes, TraceError> {
    let number = |h: &String| h.parse::<u32>().ok();
    let Some(column) = table.header.iter().position(|h| number(h).is_some()) else {
        return Err(table.header_error(0, What::NoColumn("1 (the first minute)".to_owned())));
    };
    let mut last = None;
    for (i, header) in table.header.iter().enumerate().skip(column) {
        let minute = number(header);
        if minute.is_none() || last.is_some_and(|l: u32| minute != l.checked_add(1)) {
            return Err(table.header_error(i + 1, What::Minutes(header.clone())));
        }
        last = minute;
    }
    Ok(Minutes { column, count: table.header.len() - column })
}

fn read_durations(
    path: &Path,
    known: &mut HashMap<String, Quantiles>,
    repairs: &mut Repairs,
) -> Result<(), TraceError> {
    let mut table = Table::open(path)?;
    let function = table.column("HashFunction")?;
    let columns = [
        (0.0, "0"),
        (0.01, "1"),
        (0.25, "25"),
        (0.5, "50"),
        (0.75, "75"),
        (0.99, "99"),
        (1.0, "100"),
    ]
    .map(|(q, p)| (q, format!("percentile_Average_{p}")));
    let mut points = Vec::new();
    for (q, name) in columns {
        points.push((q, table.column(&name)?));
    }
    while let Some(row) = table.next()? {
        let name = row.name(function, "function")?;
        let mut values = Vec::with_capacity(points.len());
        let mut negative = false;
        for (_, column) in &points {
            let ms = row.number(*column, "a duration in ms", -MAX_DURATION_MS, MAX_DURATION_MS)?;
            negative |= ms < 0.0;
            values.push(ms.max(0.0));
        }
        repairs.negative_durations += u64::from(negative);
        if !values.is_sorted() {
            repairs.unsorted_percentiles += 1;
            values.sort_by(f64::total_cmp);
        }
        let quantiles = points.iter().map(|(q, _)| *q).zip(values).collect();
        if let Some(quantiles) = Quantiles::new(quantiles) {
            match known.entry(name.to_owned()) {
                std::collections::hash_map::Entry::Vacant(e) => drop(e.insert(quantiles)),
                std::collections::hash_map::Entry::Occupied(_) => repairs.duplicate_values += 1,
            }
        }
    }
    Ok(())
}

/// Memory by function, or by application if the file tells no functions.
fn read_memory(
    path: &Path,
    sizes: &mut HashMap<String, u64>,
    repairs: &mut Repairs,
) -> Result<(), TraceError> {
    let mut table = Table::open(path)?;
    let key = match table.find("HashFunction") {
        Some(column) => column,
        None => table.column("HashApp")?,
    };
    let size = table.column("AverageAllocatedMb")?;
    while let Some(row) = table.next()? {
        let name = row.name(key, "function or application")?;
        let mb = row.number(size, "memory in MiB", 0.0, MAX_MEMORY_MB)?;
        let bytes = (mb * f64::from(1 << 20)) as u64;
        match sizes.entry(name.to_owned()) {
            std::collections::hash_map::Entry::Vacant(e) => drop(e.insert(bytes)),
            std::collections::hash_map::Entry::Occupied(_) => repairs.duplicate_values += 1,
        }
    }
    Ok(())
}
