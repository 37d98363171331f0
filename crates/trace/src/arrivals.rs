//! A trace's arrivals, one after the other.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::counts::{Cursor, MinuteCounts, place};
use crate::error::TraceError;
use crate::events::NO_DURATION;
use crate::random::Random;
use crate::sorter::Merge;
use crate::trace::{Calls, Trace, TraceOptions};

/// One call of a function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arrival {
    /// When, microseconds from the beginning of what is read, scaled.
    pub at_us: u64,
    /// The function, by its place in [`Trace::functions`].
    pub function: u32,
    /// How long the call takes, microseconds, if the trace tells it call by call.
    pub duration_us: Option<u32>,
}

enum Source<'a> {
    Counted(Minutes<'a>),
    Listed(Merge<'a>),
}

/// Arrivals by time. Memory is bounded by the calls of one minute.
pub struct Arrivals<'a> {
    trace: &'a Trace,
    options: TraceOptions,
    source: Source<'a>,
}

impl std::fmt::Debug for Arrivals<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrivals").field("trace", self.trace).finish_non_exhaustive()
    }
}

impl<'a> Arrivals<'a> {
    pub(crate) fn new(trace: &'a Trace, options: TraceOptions) -> Result<Self, TraceError> {
        let source = match &trace.calls {
            Calls::Counted(counts) => Source::Counted(Minutes::new(trace, counts, options.seed)),
            Calls::Listed(sorted) => {
                Source::Listed(sorted.read().map_err(TraceError::io(&trace.path))?)
            }
        };
        Ok(Self { trace, options, source })
    }

    /// How much of the trace is read, milliseconds of simulated (scaled) time.
    #[must_use]
    pub fn length_ms(&self) -> u64 {
        let left = self.trace.length_ms.saturating_sub(self.options.skip_ms);
        let length = self.options.length_ms.map_or(left, |l| l.min(left));
        (length as f64 / self.options.speed) as u64
    }

    /// The next arrival; `None` at the end.
    ///
    /// # Errors
    /// If a temporary file can't be read.
    #[allow(clippy::should_implement_trait)] // An iterator of results invites to drop the error.
    pub fn next(&mut self) -> Result<Option<Arrival>, TraceError> {
        let begin = self.options.skip_ms * 1_000;
        let end = self.options.length_ms.map_or(u64::MAX, |l| begin.saturating_add(l * 1_000));
        loop {
            let next = match &mut self.source {
                Source::Counted(minutes) => minutes.next(),
                Source::Listed(merge) => merge.next().map_err(TraceError::io(&self.trace.path))?,
            };
            let Some((at, function, duration)) = next else { return Ok(None) };
            if at >= end {
                return Ok(None);
            }
            if at >= begin {
                return Ok(Some(Arrival {
                    at_us: ((at - begin) as f64 / self.options.speed) as u64,
                    function,
                    duration_us: (duration != NO_DURATION).then_some(duration),
                }));
            }
        }
    }
}

/// Arrivals from counts per minute: all functions' calls of one minute at a time.
struct Minutes<'a> {
    trace: &'a Trace,
    counts: &'a [MinuteCounts],
    seed: u64,
    cursors: Vec<Cursor>,
    /// The next minute of each function that has one, with its count.
    next: BinaryHeap<Reverse<(u32, u32, u32)>>,
    /// The calls of the current minute, the last first.
    minute: Vec<(u64, u32)>,
}

impl<'a> Minutes<'a> {
    fn new(trace: &'a Trace, counts: &'a [MinuteCounts], seed: u64) -> Self {
        let mut cursors = vec![Cursor::default(); counts.len()];
        let next = cursors
            .iter_mut()
            .zip(counts)
            .enumerate()
            .filter_map(|(f, (cursor, counts))| {
                cursor.next(counts).map(|(minute, count)| Reverse((minute, f as u32, count)))
            })
            .collect();
        Self { trace, counts, seed, cursors, next, minute: Vec::new() }
    }

    fn next(&mut self) -> Option<(u64, u32, u32)> {
        while self.minute.is_empty() {
            let Reverse((minute, _, _)) = *self.next.peek()?;
            while let Some(Reverse((m, f, count))) = self.next.peek().copied() {
                if m != minute {
                    break;
                }
                self.next.pop();
                let function = f as usize;
                // Each function and minute has numbers of its own, so that leaving some out does
                // not move the others.
                let phase = Random::new(self.seed, u64::from(f)).bits();
                let mut random = Random::new(self.seed ^ phase, u64::from(minute) + 1);
                let trigger = self.trace.functions[function].trigger;
                let begin = u64::from(minute) * 60_000_000;
                self.minute.extend(
                    place(&mut random, trigger, phase, count).map(|offset| (begin + offset, f)),
                );
                if let Some((minute, count)) = self.cursors[function].next(&self.counts[function]) {
                    self.next.push(Reverse((minute, f, count)));
                }
            }
            self.minute.sort_unstable_by(|a, b| b.cmp(a));
        }
        self.minute.pop().map(|(at, f)| (at, f, NO_DURATION))
    }
}
