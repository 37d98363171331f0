//! The pages of a plan, cut into pieces that are read and encoded one at a time.

use std::hash::Hasher;
use std::ops::Range;

use medes_memory::pages::PageRun;
use medes_memory::reader::read_pages;
use medes_pages::{PAGE_SIZE, Page};
use xxhash_rust::xxh3::Xxh3;

use super::{DedupError, Hindrance};
use crate::plan::{MappingPlan, Plan, Reused};

/// Pages read and encoded at a time: 1 MiB, which stays in the second-level cache.
pub(super) const BATCH: u32 = 256;

/// Pages of one process that are read and encoded together.
pub(super) struct Batch {
    pid: i32,
    /// Which one of the plan's it is.
    pub(super) process: usize,
    runs: Vec<PageRun>,
    /// The pages that an earlier image has too, maybe with other content.
    pub(super) known: Vec<Known>,
    /// Whether nobody but a look at the content tells if it changes.
    pub(super) hashed: bool,
}

/// Pages of a batch, one after the other in memory and in an earlier image.
pub(super) struct Known {
    /// Which pages of the batch they are.
    pub(super) pages: Range<usize>,
    /// The address of the first in the image.
    pub(super) origin: u64,
}

impl Batch {
    fn new(process: usize, pid: i32, hashed: bool) -> Self {
        Self { pid, process, runs: Vec::new(), known: Vec::new(), hashed }
    }

    fn push(&mut self, run: PageRun, mapping: &MappingPlan) {
        let page = PAGE_SIZE as u64;
        let before = self.bytes() / page;
        for Reused { range, origin } in &mapping.known {
            let part = range.start.max(run.start)..range.end.min(run.end());
            if part.start < part.end {
                let nth = |address: u64| (before + (address - run.start) / page) as usize;
                let origin = origin + (part.start - range.start);
                self.known.push(Known { pages: nth(part.start)..nth(part.end), origin });
            }
        }
        self.runs.push(run);
    }

    /// Bytes of its pages.
    pub(super) fn bytes(&self) -> u64 {
        self.runs.iter().map(PageRun::bytes).sum()
    }

    /// Reads its pages into a [`page_buffer`].
    pub(super) fn read<'b>(&self, buffer: &'b mut [Page]) -> Result<&'b [Page], DedupError> {
        let bytes = read_pages(self.pid, &self.runs, buffer.as_flattened_mut());
        let bytes = bytes.map_err(Hindrance::Read)?;
        Ok(&buffer[..bytes / PAGE_SIZE])
    }

    /// The addresses of its pages.
    pub(super) fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        let page = PAGE_SIZE as u64;
        self.runs.iter().flat_map(move |r| (0..u64::from(r.pages)).map(move |n| r.start + n * page))
    }
}

/// Cuts the pages of a plan that are to be encoded into batches, in order. `watched` says of a
/// mapping whether the kernel tells of writes to it.
pub(super) fn batches(plan: &Plan, watched: impl Fn(&MappingPlan) -> bool) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    for (n, process) in plan.processes.iter().enumerate() {
        let mut room = 0;
        for mapping in &process.mappings {
            let hashed = !watched(mapping);
            for run in &mapping.runs {
                let mut rest = *run;
                while rest.pages > 0 {
                    if room == 0 || batches.last().is_none_or(|b| b.hashed != hashed) {
                        batches.push(Batch::new(n, process.pid, hashed));
                        room = BATCH;
                    }
                    let pages = rest.pages.min(room);
                    if let Some(batch) = batches.last_mut() {
                        batch.push(PageRun { pages, ..rest }, mapping);
                    }
                    rest.start += u64::from(pages) * PAGE_SIZE as u64;
                    rest.pages -= pages;
                    room -= pages;
                }
            }
        }
    }
    batches
}

/// Room for the pages of a batch.
pub(super) fn page_buffer() -> Vec<Page> {
    vec![[0; PAGE_SIZE]; BATCH as usize]
}

/// A hash of pages' content.
pub(super) fn hash(pages: &[Page]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.write(pages.as_flattened());
    hasher.finish()
}
