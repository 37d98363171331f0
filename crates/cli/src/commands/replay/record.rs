//! What a replay leaves behind: each request's fate as CSV, and beside it what was played how.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use medes_core::{FunctionName, StartKind};
use medes_policy::PolicySettings;
use serde::{Deserialize, Serialize};

use super::Fate;

const HEADER: &str = "request,due_us,late_us,function,node,start,queue_us,startup_us,execution_us,\
                      total_us,error";
/// How long rows may lie in memory: an interrupted replay goes on after the last one on disk.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// What was played, and how.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Recording {
    /// The trace.
    pub trace: PathBuf,
    /// Where the placement inside a minute comes from.
    pub seed: u64,
    /// How many times faster than recorded.
    pub speed: f64,
    /// What was left out at the beginning, milliseconds.
    pub skip_ms: u64,
    /// How much was played, milliseconds; `None`: all.
    pub length_ms: Option<u64>,
    /// The functions that it was played on, in this order.
    pub functions: Vec<FunctionName>,
    /// The platforms, in the order of the column `node`.
    pub nodes: Vec<String>,
    /// The policy in force on the first of them.
    pub policy: PolicySettings,
    /// Its memory budget, bytes.
    pub memory_budget: u64,
    /// How many dedup operations it runs at once.
    pub max_dedups: u32,
    /// Its version.
    pub version: String,
    /// When the replay began.
    pub began: String,
}

impl Recording {
    /// Whether `other` plays the same requests on the same functions.
    fn continues(&self, other: &Self) -> bool {
        let key = |r: &Self| (r.seed, r.speed.to_bits(), r.skip_ms, r.length_ms);
        key(self) == key(other) && self.trace == other.trace && self.functions == other.functions
    }
}

/// Where the recording of a CSV is.
fn beside(csv: &Path) -> PathBuf {
    let mut name = csv.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

/// What was played for a CSV.
///
/// # Errors
/// If the file beside it is missing or not understood.
pub fn recording(csv: &Path) -> io::Result<Recording> {
    let path = beside(csv);
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let text = std::fs::read(&path).map_err(named)?;
    serde_json::from_slice(&text).map_err(|e| named(e.into()))
}

/// The CSV as it is written.
pub(super) struct Log {
    out: BufWriter<File>,
    flushed: Instant,
}

impl Log {
    /// Begins a CSV, or goes on with one that holds the same replay's beginning.
    pub(super) fn open(path: &Path, recording: &Recording, append: bool) -> io::Result<Self> {
        if append {
            let before = self::recording(path)?;
            if !recording.continues(&before) {
                return Err(io::Error::other(format!(
                    "{}: another trace, other functions, or other options were played there; \
                     resume with the same, or leave out --resume",
                    path.display()
                )));
            }
        } else {
            let mut text = serde_json::to_vec_pretty(recording)?;
            text.push(b'\n');
            std::fs::write(beside(path), text)?;
        }
        let file = if append {
            OpenOptions::new().append(true).open(path)?
        } else {
            let mut file = File::create(path)?;
            writeln!(file, "{HEADER}")?;
            file
        };
        Ok(Self { out: BufWriter::new(file), flushed: Instant::now() })
    }

    /// Writes one request down.
    pub(super) fn add(&mut self, fate: &Fate, name: &FunctionName) -> io::Result<()> {
        write_fate(&mut self.out, fate, name)?;
        if self.flushed.elapsed() > FLUSH_EVERY {
            self.flushed = Instant::now();
            self.out.flush()?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// How many requests a CSV has the fate of, counted from the first without a gap. What comes after
/// a gap, or was not written to its end, is taken out of it: those requests are played again.
pub(super) fn recorded(path: &Path) -> io::Result<u64> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        file => file?,
    };
    let columns = HEADER.split(',').count();
    let number = |line: &str| {
        let whole = line.ends_with('\n') && line.split(',').count() >= columns;
        line.split(',').next().filter(|_| whole)?.parse::<u64>().ok()
    };
    let mut seen = Vec::new();
    each_line(&file, |line| {
        seen.extend(number(line));
        Ok(())
    })?;
    seen.sort_unstable();
    seen.dedup();
    let done = seen.iter().zip(0..).take_while(|(n, i)| *n == i).count() as u64;
    let mut kept = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
    {
        let mut out = BufWriter::new(&mut kept);
        writeln!(out, "{HEADER}")?;
        each_line(&File::open(path)?, |line| match number(line) {
            Some(n) if n < done => out.write_all(line.as_bytes()),
            _ => Ok(()),
        })?;
        out.flush()?;
    }
    kept.persist(path).map_err(|e| e.error)?;
    Ok(done)
}

/// Calls `f` with each line after the first, its end included.
fn each_line(file: &File, mut f: impl FnMut(&str) -> io::Result<()>) -> io::Result<()> {
    let mut input = BufReader::new(file);
    let mut line = String::new();
    input.read_line(&mut line)?;
    loop {
        line.clear();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        f(&line)?;
    }
}

/// One request of a CSV that was answered. Times are microseconds.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// Its number.
    pub request: u64,
    /// Its function.
    pub function: String,
    /// The state in which it found its sandbox.
    pub start: StartKind,
    /// Its execution.
    pub execution_us: u64,
    /// From sending it to its answer.
    pub total_us: u64,
}

impl Row {
    /// Reads a CSV row by row; those of requests without an answer are left out.
    ///
    /// # Errors
    /// If it can't be read or is not one of a replay; with its line.
    pub fn each(csv: &Path, mut f: impl FnMut(Self) -> io::Result<()>) -> io::Result<()> {
        let mut line = 1;
        each_line(&File::open(csv)?, |text| {
            line += 1;
            let bad = || {
                let message = format!("{}:{line}: no row of a replay", csv.display());
                io::Error::new(io::ErrorKind::InvalidData, message)
            };
            let fields: Vec<_> = text.trim_end().split(',').collect();
            let number = |i: usize| fields.get(i).and_then(|f| f.parse::<u64>().ok());
            let start = match fields.get(5).copied() {
                Some("cold") => StartKind::Cold,
                Some("warm") => StartKind::Warm,
                Some("dedup") => StartKind::Dedup,
                Some("") => return Ok(()),
                _ => return Err(bad()),
            };
            f(Self {
                request: number(0).ok_or_else(bad)?,
                function: fields[3].to_owned(),
                start,
                execution_us: number(8).ok_or_else(bad)?,
                total_us: number(9).ok_or_else(bad)?,
            })
        })
    }
}

fn write_fate(log: &mut impl Write, fate: &Fate, name: &FunctionName) -> io::Result<()> {
    let Fate { due, late_us, total_us, answer } = fate;
    write!(log, "{},{},{late_us},{name},{},", due.number, due.due_us, due.node)?;
    match answer {
        Ok(a) => {
            let start = a.start.map_or_else(String::new, |s| s.to_string());
            let (t, error) = (a.timing, a.error.as_deref().unwrap_or_default());
            writeln!(
                log,
                "{start},{},{},{},{total_us},{error}",
                t.queue_us, t.startup_us, t.execution_us
            )
        }
        Err(e) => {
            let e = e.to_string().replace(['"', '\n', ','], "'");
            writeln!(log, ",,,,{total_us},\"{e}\"")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_goes_on_at_the_first_request_without_a_fate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.csv");
        assert_eq!(recorded(&path).unwrap(), 0);
        let row = |n: u64| format!("{n},0,0,f,0,warm,1,2,3,6,\n");
        let text = format!("{HEADER}\n{}{}{}2,0,0,f,0,war", row(1), row(0), row(4));
        std::fs::write(&path, text).unwrap();
        assert_eq!(recorded(&path).unwrap(), 2);
        let left = std::fs::read_to_string(&path).unwrap();
        assert_eq!(left, format!("{HEADER}\n{}{}", row(1), row(0)));
    }

    #[test]
    fn rows_read_back_and_what_is_none_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.csv");
        let good = "7,5,0,f,0,dedup,1,2,3,9,\n8,5,0,f,0,,,,,9,\"gone\"\n";
        std::fs::write(&path, format!("{HEADER}\n{good}")).unwrap();
        let mut rows = Vec::new();
        let read = |rows: &mut Vec<Row>| {
            Row::each(&path, |row| {
                rows.push(row);
                Ok(())
            })
        };
        read(&mut rows).unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].request, rows[0].start, rows[0].total_us), (7, StartKind::Dedup, 9));
        std::fs::write(&path, format!("{HEADER}\n{good}x\n")).unwrap();
        assert!(read(&mut rows).unwrap_err().to_string().contains("r.csv:4"));
    }
}
