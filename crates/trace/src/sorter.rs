//! Sorting more arrivals than fit in memory.
//!
//! Logs are written when requests end, so their beginnings come in any order. Arrivals are
//! collected up to a limit, sorted, and written to an unnamed temporary file as one run; at the
//! end the runs are merged. Memory stays the same however long the log is.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};

/// Time and duration in microseconds, function.
pub(crate) type Item = (u64, u32, u32);

/// Items that are kept in memory: 16 MiB.
const RUN: usize = 1 << 20;
const ITEM_BYTES: usize = 16;

/// Takes arrivals in any order.
pub(crate) struct Sorter {
    limit: usize,
    items: Vec<Item>,
    runs: Vec<File>,
}

impl Sorter {
    pub(crate) fn new() -> Self {
        Self::with_limit(RUN)
    }

    fn with_limit(limit: usize) -> Self {
        Self { limit, items: Vec::new(), runs: Vec::new() }
    }

    pub(crate) fn push(&mut self, item: Item) -> io::Result<()> {
        self.items.push(item);
        if self.items.len() >= self.limit { self.spill() } else { Ok(()) }
    }

    fn spill(&mut self) -> io::Result<()> {
        self.items.sort_unstable();
        let mut out = BufWriter::with_capacity(1 << 18, tempfile::tempfile()?);
        for (time, function, duration) in self.items.drain(..) {
            out.write_all(&time.to_le_bytes())?;
            out.write_all(&function.to_le_bytes())?;
            out.write_all(&duration.to_le_bytes())?;
        }
        self.runs.push(out.into_inner().map_err(io::IntoInnerError::into_error)?);
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Sorted {
        self.items.sort_unstable();
        Sorted { items: self.items, runs: self.runs }
    }
}

/// Arrivals that can be read in order as often as wanted.
pub(crate) struct Sorted {
    items: Vec<Item>,
    runs: Vec<File>,
}

impl Sorted {
    pub(crate) fn read(&self) -> io::Result<Merge<'_>> {
        let mut sources = Vec::new();
        for file in &self.runs {
            // A descriptor of its own would share the position; positions are kept here instead.
            let mut file = file.try_clone()?;
            file.seek(SeekFrom::Start(0))?;
            sources.push(Source::File(BufReader::with_capacity(1 << 18, At { file, position: 0 })));
        }
        sources.push(Source::Memory(self.items.iter()));
        let mut merge = Merge { sources, heap: BinaryHeap::new() };
        for n in 0..merge.sources.len() {
            merge.refill(n)?;
        }
        Ok(merge)
    }
}

/// Reads a file at a position of its own.
struct At {
    file: File,
    position: u64,
}

impl Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = std::os::unix::fs::FileExt::read_at(&self.file, buffer, self.position)?;
        self.position += n as u64;
        Ok(n)
    }
}

enum Source<'a> {
    File(BufReader<At>),
    Memory(std::slice::Iter<'a, Item>),
}

/// Arrivals in order.
pub(crate) struct Merge<'a> {
    sources: Vec<Source<'a>>,
    heap: BinaryHeap<Reverse<(Item, usize)>>,
}

impl Merge<'_> {
    fn refill(&mut self, n: usize) -> io::Result<()> {
        let item = match &mut self.sources[n] {
            Source::Memory(items) => items.next().copied(),
            Source::File(file) => {
                let mut bytes = [0; ITEM_BYTES];
                match file.read_exact(&mut bytes) {
                    Ok(()) => {
                        let number = u128::from_le_bytes(bytes);
                        Some((number as u64, (number >> 64) as u32, (number >> 96) as u32))
                    }
                    Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => None,
                    Err(e) => return Err(e),
                }
            }
        };
        self.heap.extend(item.map(|item| Reverse((item, n))));
        Ok(())
    }

    pub(crate) fn next(&mut self) -> io::Result<Option<Item>> {
        let Some(Reverse((item, n))) = self.heap.pop() else { return Ok(None) };
        self.refill(n)?;
        Ok(Some(item))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn everything_comes_out_in_order_and_again(
            list in prop::collection::vec((0u64..1000, 0u32..5, any::<u32>()), 0..500),
            limit in 1usize..100,
        ) {
            let mut sorter = Sorter::with_limit(limit);
            for item in &list {
                sorter.push(*item).unwrap();
            }
            let sorted = sorter.finish();
            let mut expected = list.clone();
            expected.sort_unstable();
            for _ in 0..2 {
                let mut merge = sorted.read().unwrap();
                let got: Vec<_> = std::iter::from_fn(|| merge.next().unwrap()).collect();
                prop_assert_eq!(&got, &expected);
            }
        }
    }
}
