//! The pages of a plan, cut into pieces that are read and encoded one at a time.

use std::hash::Hasher;

use medes_memory::pages::PageRun;
use medes_memory::reader::read_pages;
use medes_pages::{PAGE_SIZE, Page};
use xxhash_rust::xxh3::Xxh3;

use super::{DedupError, Hindrance};
use crate::plan::{MappingPlan, Plan};

/// Pages read and encoded at a time: 1 MiB, which stays in the second-level cache.
pub(super) const BATCH: u32 = 256;

/// Pages of one process that are read and encoded together.
pub(super) struct Batch {
    pid: i32,
    runs: Vec<PageRun>,
    /// Whether nobody but a look at the content tells if it changes.
    pub(super) hashed: bool,
}

impl Batch {
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
    for process in &plan.processes {
        let mut room = 0;
        for mapping in &process.mappings {
            let hashed = !watched(mapping);
            for run in &mapping.runs {
                let mut rest = *run;
                while rest.pages > 0 {
                    if room == 0 || batches.last().is_none_or(|b| b.hashed != hashed) {
                        batches.push(Batch { pid: process.pid, runs: Vec::new(), hashed });
                        room = BATCH;
                    }
                    let pages = rest.pages.min(room);
                    if let Some(batch) = batches.last_mut() {
                        batch.runs.push(PageRun { pages, ..rest });
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
