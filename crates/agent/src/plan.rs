//! What of a sandbox's memory can go: its processes, their mappings, the private pages in them.

use std::io;

use medes_memory::PAGE_SIZE;
use medes_memory::mappings::{Mapping, Mappings};
use medes_memory::obstacle::{Obstacle, ObstacleOptions, find_obstacles};
use medes_memory::pages::{PageClass, PageRun, PageScanner};
use medes_memory::reader::read_pages;

/// The private pages of a frozen sandbox.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Its processes, by process id.
    pub processes: Vec<ProcessPlan>,
}

/// The private pages of one process.
#[derive(Debug, PartialEq, Eq)]
pub struct ProcessPlan {
    /// The process.
    pub pid: i32,
    /// Its mappings that have private pages, by address.
    pub mappings: Vec<MappingPlan>,
}

/// The private pages of one mapping.
#[derive(Debug, PartialEq, Eq)]
pub struct MappingPlan {
    /// First address and the address after the last.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
    /// What becomes of it.
    pub kind: MappingKind,
    /// Whether it is the `brk` heap.
    pub heap: bool,
    /// Runs of pages that are kept in the image, by address.
    pub runs: Vec<PageRun>,
}

/// How a mapping's pages go and come back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MappingKind {
    /// Anonymous memory: a userfaultfd covers it.
    Anonymous,
    /// A private file mapping that becomes anonymous memory with this protection, all of it: data
    /// segments of programs and libraries, mostly written to. Its pages then come back one by one
    /// like all others, where those of [`MappingKind::File`] all have to be there before the
    /// process runs.
    Replaced(i32),
    /// A private file mapping that stays one: only its private pages go.
    File,
}

/// A private file mapping becomes anonymous memory if at least one page in so many is private: its
/// other pages, shared with other processes until then, become private too.
const REPLACE_SHARE: u64 = 4;

/// Small mappings are replaced whatever their share is, pages.
const REPLACE_SMALL: u64 = 32;

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Something stands in the way.
    #[error(transparent)]
    Obstacle(#[from] Obstacle),
    /// The kernel does not tell what is mapped.
    #[error("looking at process {pid}: {source}")]
    Look {
        /// The process.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no process.
    #[error("there is no process to deduplicate")]
    Nothing,
}

impl Plan {
    /// Looks at frozen processes. Nothing is changed.
    ///
    /// # Errors
    /// [`PlanError`]: the first thing that stands in the way.
    pub fn of(pids: &[i32]) -> Result<Self, PlanError> {
        let mut pids = pids.to_vec();
        pids.sort_unstable();
        let processes = pids.iter().map(|pid| ProcessPlan::of(*pid, &pids));
        let processes = processes.collect::<Result<Vec<_>, _>>()?;
        if processes.is_empty() { Err(PlanError::Nothing) } else { Ok(Self { processes }) }
    }

    /// How many private pages there are.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let mappings = self.processes.iter().flat_map(|p| &p.mappings);
        mappings.flat_map(|m| &m.runs).map(|r| u64::from(r.pages)).sum()
    }
}

impl ProcessPlan {
    fn of(pid: i32, peers: &[i32]) -> Result<Self, PlanError> {
        let look = |source| PlanError::Look { pid, source };
        let all = Mappings::read(pid).map_err(look)?;
        let options = ObstacleOptions { peers, kept_userfault: None };
        if let Some(first) = find_obstacles(pid, &all, &options).map_err(look)?.into_iter().next() {
            return Err(first.into());
        }
        let mut scanner = PageScanner::open(pid).map_err(look)?;
        let mut mappings = Vec::new();
        for mapping in all.iter().filter(|m| m.left_resident().is_none()) {
            let mut runs = Vec::new();
            scanner.scan(mapping, &mut runs).map_err(look)?;
            // What was read but never written reads as zeros again all by itself.
            runs.retain(|run| run.class != PageClass::ZeroPage);
            if runs.is_empty() {
                continue;
            }
            let kind = kind_of(pid, mapping, &runs);
            if let MappingKind::Replaced(_) = kind {
                // Every page, also those that are still the file's.
                let pages = mapping.pages() as u32;
                let class = PageClass::FileCow;
                runs = vec![PageRun { start: mapping.start, pages, class }];
            }
            let (start, end) = (mapping.start, mapping.end);
            let heap = mapping.kind == medes_memory::mappings::MappingKind::Heap;
            mappings.push(MappingPlan { start, end, kind, heap, runs });
        }
        Ok(Self { pid, mappings })
    }
}

fn kind_of(pid: i32, mapping: &Mapping, runs: &[PageRun]) -> MappingKind {
    if mapping.is_anonymous() {
        return MappingKind::Anonymous;
    }
    let private: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
    let worth = mapping.pages() <= REPLACE_SMALL || private * REPLACE_SHARE >= mapping.pages();
    // Code that was written to stays: anonymous memory that can be executed is refused in places.
    // What has special flags would lose them. Pages beyond the file's end can't be read.
    let plain = !mapping.executable && !mapping.flags_known;
    if worth && plain && mapping.pages() < u64::from(u32::MAX) && is_backed(pid, mapping) {
        MappingKind::Replaced(
            if mapping.readable { PROT_READ } else { 0 }
                | if mapping.writable { PROT_WRITE } else { 0 },
        )
    } else {
        MappingKind::File
    }
}

/// `PROT_READ` and `PROT_WRITE` of mmap(2).
const PROT_READ: i32 = 1;
const PROT_WRITE: i32 = 2;

/// Whether the file reaches to the mapping's end: beyond it there is nothing to read.
fn is_backed(pid: i32, mapping: &Mapping) -> bool {
    let last = PageRun { start: mapping.end - PAGE_SIZE, pages: 1, class: PageClass::FileCow };
    read_pages(pid, &[last], &mut [0; PAGE_SIZE as usize]).is_ok()
}
