//! Two simulations of the same requests, request by request.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};

use serde::{Deserialize, Serialize};

use crate::engine::{Observer, Outcome};

/// Writes down each request's end-to-end latency, in the order of arrival, in an unnamed temporary
/// file: 4 bytes a request on disk, and in memory only those whose fate is not known yet.
#[derive(Debug)]
pub struct Latencies {
    out: BufWriter<File>,
    first: u64,
    pending: VecDeque<Option<u32>>,
    failed: Option<io::Error>,
}

impl Latencies {
    /// An empty record.
    ///
    /// # Errors
    /// If there is no temporary file to be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            out: BufWriter::with_capacity(1 << 18, tempfile::tempfile()?),
            first: 0,
            pending: VecDeque::new(),
            failed: None,
        })
    }

    /// The record, to be read from its beginning.
    ///
    /// # Errors
    /// If it could not be written.
    pub fn finish(mut self) -> io::Result<File> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        let mut file = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        Ok(file)
    }
}

impl Observer for Latencies {
    fn outcome(&mut self, outcome: &Outcome) {
        let at = (outcome.request - self.first) as usize;
        if self.pending.len() <= at {
            self.pending.resize(at + 1, None);
        }
        self.pending[at] = Some(outcome.end_to_end_us().min(u64::from(u32::MAX)) as u32);
        while let Some(Some(us)) = self.pending.front() {
            if let Err(e) = self.out.write_all(&us.to_le_bytes()) {
                self.failed.get_or_insert(e);
            }
            self.pending.pop_front();
            self.first += 1;
        }
    }
}

/// By how much one run answered the same requests sooner than another.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Improvement {
    /// How many requests were compared.
    pub requests: u64,
    /// The share of requests that were answered at least a tenth sooner.
    pub sooner: f64,
    /// The share of requests that were answered at least a tenth later.
    pub later: f64,
    /// The distribution of the factors, other's latency / own latency: share and factor.
    pub quantiles: Vec<(f64, f64)>,
}

/// Compares two records.
///
/// # Errors
/// If one can't be read.
pub fn improvement(own: &File, other: &File) -> io::Result<Improvement> {
    const SHARES: [f64; 17] = [
        0.0, 0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999,
        0.9999, 1.0,
    ];
    // Buckets of equal ratio, a fiftieth of a decade each, from a millionth to a million.
    const PER_DECADE: f64 = 50.0;
    let mut counts = vec![0u64; 12 * PER_DECADE as usize + 1];
    let (mut sooner, mut later, mut requests) = (0u64, 0u64, 0u64);
    let open = |file: &File| -> io::Result<_> {
        let mut file = file.try_clone()?;
        file.seek(SeekFrom::Start(0))?;
        Ok(BufReader::with_capacity(1 << 18, file))
    };
    let (mut own, mut other) = (open(own)?, open(other)?);
    let next = |file: &mut BufReader<File>| -> io::Result<Option<u32>> {
        let mut bytes = [0; 4];
        match file.read_exact(&mut bytes) {
            Ok(()) => Ok(Some(u32::from_le_bytes(bytes))),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => Err(e),
        }
    };
    while let (Some(a), Some(b)) = (next(&mut own)?, next(&mut other)?) {
        let factor = f64::from(b.max(1)) / f64::from(a.max(1));
        let bucket = ((factor.log10() + 6.0) * PER_DECADE).round().max(0.0) as usize;
        let last = counts.len() - 1;
        counts[bucket.min(last)] += 1;
        sooner += u64::from(factor >= 1.0 / 0.9);
        later += u64::from(factor <= 0.9);
        requests += 1;
    }
    let share = |n: u64| if requests == 0 { 0.0 } else { n as f64 / requests as f64 };
    let quantile = |q: f64| {
        let rank = ((q * requests as f64).ceil() as u64).max(1);
        let mut seen = 0;
        let bucket = counts.iter().position(|n| {
            seen += n;
            seen >= rank
        });
        10f64.powf(bucket.unwrap_or(0) as f64 / PER_DECADE - 6.0)
    };
    let quantiles = if requests == 0 {
        Vec::new()
    } else {
        SHARES.iter().map(|q| (*q, quantile(*q))).collect()
    };
    Ok(Improvement { requests, sooner: share(sooner), later: share(later), quantiles })
}
