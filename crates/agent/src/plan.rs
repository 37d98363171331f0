//! What of a sandbox's memory can go: its processes, their mappings, the private pages in them.

use std::io;

use medes_memory::mappings::Mappings;
use medes_memory::obstacle::{Obstacle, ObstacleOptions, find_obstacles};
use medes_memory::pages::{PageClass, PageRun, PageScanner};

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
    /// A private file mapping, which a userfaultfd can't cover.
    pub file: bool,
    /// Runs of private pages that hold something, by address.
    pub runs: Vec<PageRun>,
}

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
            if !runs.is_empty() {
                let (start, end) = (mapping.start, mapping.end);
                mappings.push(MappingPlan { start, end, file: !mapping.is_anonymous(), runs });
            }
        }
        Ok(Self { pid, mappings })
    }
}
