//! What of a sandbox's memory can go: its processes, their mappings, the private pages in them.

use std::io;
use std::ops::Range;
use std::thread::Scope;

use medes_memory::PAGE_SIZE;
use medes_memory::mappings::{Mapping, Mappings};
use medes_memory::obstacle::{Obstacle, ObstacleOptions, find_mapping_obstacles, find_obstacles};
use medes_memory::pages::{PageClass, PageRun, PageScanner, PrivatePages};
use medes_memory::priority::spawn_elsewhere;
use medes_memory::ranges::{near, overlap, within, without};
use medes_memory::reader::read_pages;

use crate::view::SpaceView;

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
    /// Its mappings that have private pages, here or in the earlier image, by address.
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
    /// The private pages that are there and may go, by address.
    pub there: Vec<Range<u64>>,
    /// The private pages that are there and stay, by address: no image has them.
    pub residents: Vec<Range<u64>>,
    /// Runs of pages that are read and encoded, by address.
    pub runs: Vec<PageRun>,
    /// The rest of what is kept in the image: pages that are as an earlier image has them.
    pub reused: Vec<Reused>,
    /// Everything that the earlier image has of it, also what was written to since; nothing that
    /// stays.
    pub known: Vec<Reused>,
}

/// Pages that an earlier image brings back as well as a new one could: nobody has written to them
/// since, or they are still away.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reused {
    /// Where they are.
    pub range: Range<u64>,
    /// The address of the first of them in the earlier image.
    pub origin: u64,
}

impl Reused {
    /// What is left without `holes`, which are in order.
    fn without(&self, holes: &[Range<u64>]) -> Vec<Self> {
        let Self { range, origin } = self;
        let part = |part: Range<u64>| {
            let origin = origin + (part.start - range.start);
            Self { range: part, origin }
        };
        without(range.clone(), near(holes, range)).into_iter().map(part).collect()
    }
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
    /// The process has made memory that the earlier image has something of unfit for being dropped.
    #[error("memory of process {pid} that is not all back may not be dropped any more: {reason}")]
    Stays {
        /// The process.
        pid: i32,
        /// Why it has to stay.
        reason: &'static str,
    },
    /// Processes have come or gone since the earlier image was made.
    #[error("the sandbox has other processes than its image")]
    OtherProcesses,
}

/// Whether to give up.
pub type Stop<'a> = &'a (dyn Fn() -> bool + Sync);

impl Plan {
    /// Looks for what makes processes unfit as a whole. Nothing of them is changed.
    ///
    /// # Errors
    /// [`PlanError`]: the first thing that stands in the way.
    pub fn check(pids: &[i32]) -> Result<(), PlanError> {
        let options = ObstacleOptions { peers: pids, kept_userfault: None };
        for pid in pids {
            let look = |source| PlanError::Look { pid: *pid, source };
            if let Some(first) = find_obstacles(*pid, &options).map_err(look)?.into_iter().next() {
                return Err(first.into());
            }
        }
        Ok(())
    }

    /// A plan for frozen processes that were not restored from an image. Nothing of them is changed.
    /// `stop` is asked again and again whether to give up.
    ///
    /// # Errors
    /// [`PlanError`]: the first thing that stands in the way.
    pub fn of(pids: &[i32], stop: Stop<'_>) -> Result<Self, PlanError> {
        std::thread::scope(|scope| {
            let flags = Flags::reading(scope, pids, stop);
            let look = Look::at(pids, None, &[], stop)?;
            look.plan(Some(&flags()?))
        })
    }

    /// How many pages are to be read and encoded.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let mappings = self.processes.iter().flat_map(|p| &p.mappings);
        mappings.flat_map(|m| &m.runs).map(|r| u64::from(r.pages)).sum()
    }

    /// For each process, what was written to of what an earlier image has.
    #[must_use]
    pub fn written(&self) -> Vec<Vec<Range<u64>>> {
        let of_mapping = |mapping: &MappingPlan| -> Vec<Range<u64>> {
            let known: Vec<_> = mapping.known.iter().map(|known| known.range.clone()).collect();
            mapping.runs.iter().flat_map(|run| within(&run.range(), &known)).collect()
        };
        let of_process = |process: &ProcessPlan| {
            process.mappings.iter().filter(|m| !m.known.is_empty()).flat_map(of_mapping).collect()
        };
        self.processes.iter().map(of_process).collect()
    }

    /// For each process, what stays.
    #[must_use]
    pub fn residents(&self) -> Vec<Vec<Range<u64>>> {
        let of_process = |process: &ProcessPlan| {
            process.mappings.iter().flat_map(|mapping| mapping.residents.iter().cloned()).collect()
        };
        self.processes.iter().map(of_process).collect()
    }

    /// Address space that an earlier image still speaks for, bytes.
    #[must_use]
    pub fn reused_bytes(&self) -> u64 {
        let mappings = self.processes.iter().flat_map(|p| &p.mappings);
        mappings.flat_map(|m| &m.reused).map(|r| r.range.end - r.range.start).sum()
    }
}

/// The kernel's flags of the mappings of processes. Reading them takes longer than a [`Look`].
pub struct Flags(Vec<(i32, Vec<Mapping>)>);

impl Flags {
    /// Reads the flags of frozen processes, on a thread of its own; what is returned waits for them.
    pub fn reading<'scope>(
        scope: &'scope Scope<'scope, '_>,
        pids: &'scope [i32],
        stop: Stop<'scope>,
    ) -> impl FnOnce() -> Result<Self, PlanError> + use<'scope> {
        let thread = spawn_elsewhere(scope, move || Self::read(pids, stop));
        move || match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(_) => Self::read(pids, stop),
        }
    }

    fn read(pids: &[i32], stop: Stop<'_>) -> Result<Self, PlanError> {
        let of_process = |pid: &i32| {
            let mappings = Mappings::read_with_flags(*pid, stop);
            mappings
                .map(|mappings| (*pid, mappings))
                .map_err(|source| PlanError::Look { pid: *pid, source })
        };
        pids.iter().map(of_process).collect::<Result<_, _>>().map(Self)
    }
}

/// What was found in the memory of frozen processes.
pub struct Look {
    /// By process id.
    processes: Vec<(i32, Vec<Scanned>)>,
}

impl Look {
    /// Looks at the memory of frozen processes. Nothing is changed. `spaces` says, of processes that were
    /// restored from an image and have been watched since, what of it is still theirs: one for
    /// each, by process id. `residents` says, for each process, what of it shall stay if it is there, in
    /// order. `stop` is asked again and again whether to give up.
    ///
    /// # Errors
    /// [`PlanError`]: the first thing that stands in the way.
    pub fn at(
        pids: &[i32],
        spaces: Option<&[SpaceView]>,
        residents: &[Vec<Range<u64>>],
        stop: Stop<'_>,
    ) -> Result<Self, PlanError> {
        let mut pids = pids.to_vec();
        pids.sort_unstable();
        if spaces.is_some_and(|spaces| spaces.len() != pids.len()) {
            return Err(PlanError::OtherProcesses);
        }
        let space = |n: usize| spaces.and_then(|spaces| spaces.get(n));
        let stay = |n: usize| residents.get(n).map_or(&[][..], Vec::as_slice);
        let of_process = |(n, pid): (usize, &i32)| Ok((*pid, scan(*pid, space(n), stay(n), stop)?));
        let processes = pids.iter().enumerate().map(of_process);
        let processes = processes.collect::<Result<Vec<_>, PlanError>>()?;
        if processes.is_empty() { Err(PlanError::Nothing) } else { Ok(Self { processes }) }
    }

    /// What becomes of it. Without the mappings' flags it is presumed that none of those is set that
    /// keeps memory from being dropped: with them the plan may be another.
    ///
    /// # Errors
    /// [`PlanError`]: the first thing that stands in the way.
    pub fn plan(&self, flags: Option<&Flags>) -> Result<Plan, PlanError> {
        let of_process = |(pid, scanned): &(i32, Vec<Scanned>)| {
            let flags = match flags {
                Some(Flags(all)) => {
                    let own = all.iter().find(|(of, _)| of == pid);
                    Some(own.ok_or(PlanError::OtherProcesses)?.1.as_slice())
                }
                None => None,
            };
            ProcessPlan::of(*pid, scanned, flags)
        };
        let processes = self.processes.iter().map(of_process);
        Ok(Plan { processes: processes.collect::<Result<_, _>>()? })
    }
}

impl ProcessPlan {
    fn of(pid: i32, scanned: &[Scanned], flags: Option<&[Mapping]>) -> Result<Self, PlanError> {
        let mut flagged = flags.map(<[Mapping]>::iter);
        let mut mappings = Vec::with_capacity(scanned.len());
        for Scanned { mapping, there, residents, runs, reused, known } in scanned {
            let mapping = match &mut flagged {
                // Both are in order, and a frozen process maps nothing.
                Some(flagged) => flagged.find(|flagged| flagged.range() == mapping.range()),
                None => Some(mapping),
            };
            let not_there = || PlanError::Look { pid, source: io::ErrorKind::NotFound.into() };
            let mapping = mapping.ok_or_else(not_there)?;
            if let Some(reason) = mapping.left_resident() {
                if !known.is_empty() {
                    return Err(PlanError::Stays { pid, reason });
                }
                continue;
            }
            let kind = kind_of(pid, mapping, runs);
            let runs = match kind {
                // Every page, also those that are still the file's.
                MappingKind::Replaced(_) => {
                    let pages = mapping.pages() as u32;
                    vec![PageRun { start: mapping.start, pages, class: PageClass::FileCow }]
                }
                _ => runs.clone(),
            };
            mappings.push(MappingPlan {
                start: mapping.start,
                end: mapping.end,
                kind,
                heap: mapping.kind == medes_memory::mappings::MappingKind::Heap,
                there: there.clone(),
                residents: residents.clone(),
                runs,
                reused: reused.clone(),
                known: known.clone(),
            });
        }
        Ok(Self { pid, mappings })
    }
}

/// What a look at one mapping's pages found.
struct Scanned {
    mapping: Mapping,
    there: Vec<Range<u64>>,
    residents: Vec<Range<u64>>,
    runs: Vec<PageRun>,
    reused: Vec<Reused>,
    known: Vec<Reused>,
}

/// Looks at the pages of all mappings that may be droppable, in order; those that have none are
/// left out.
fn scan(
    pid: i32,
    space: Option<&SpaceView>,
    residents: &[Range<u64>],
    stop: Stop<'_>,
) -> Result<Vec<Scanned>, PlanError> {
    let look = |source| PlanError::Look { pid, source };
    let all = Mappings::read(pid).map_err(look)?;
    if let Some(first) = find_mapping_obstacles(pid, &all).into_iter().next() {
        return Err(first.into());
    }
    let droppable: Vec<_> = all.iter().filter(|m| m.left_resident().is_none()).collect();
    let pages = PageScanner::open(pid).and_then(|mut s| s.scan_all(&droppable, stop));
    let mut scanned = Vec::new();
    for (mapping, PrivatePages { mut runs, written }) in droppable.iter().zip(pages.map_err(look)?)
    {
        let mut known = match space {
            Some(space) if mapping.is_anonymous() => space.of_image(&mapping.range()),
            _ => Vec::new(),
        };
        let residents = match mapping.is_anonymous() {
            true => runs.iter().flat_map(|run| within(&run.range(), residents)).collect(),
            false => Vec::new(),
        };
        if !residents.is_empty() {
            runs = runs.iter().flat_map(|run| cut(run, &residents)).collect();
            known = known.iter().flat_map(|known| known.without(&residents)).collect();
        }
        let there = runs.iter().map(PageRun::range).collect();
        // What was read but never written reads as zeros again all by itself, unless the image
        // would put something else there.
        let is_known = |run: &PageRun| known.iter().any(|k| overlap(&k.range, &run.range()));
        runs.retain(|run| run.class != PageClass::ZeroPage || is_known(run));
        if runs.is_empty() && known.is_empty() && residents.is_empty() {
            continue;
        }
        let reused = split_unwritten(&known, &written, &mut runs);
        let mapping = Mapping::clone(mapping);
        scanned.push(Scanned { mapping, there, residents, runs, reused, known });
    }
    Ok(scanned)
}

/// Takes the pages out of `runs` that have not been `written` to since the image put them back, and
/// returns all that the image still has right within `known`.
fn split_unwritten(
    known: &[Reused],
    written: &[Range<u64>],
    runs: &mut Vec<PageRun>,
) -> Vec<Reused> {
    if known.is_empty() {
        return Vec::new();
    }
    let unwritten = |known: &Reused| without(known.range.clone(), near(written, &known.range));
    let unwritten: Vec<_> = known.iter().flat_map(unwritten).collect();
    *runs = runs.iter().flat_map(|run| cut(run, &unwritten)).collect();
    let present: Vec<_> = runs.iter().map(PageRun::range).collect();
    let mut reused = Vec::new();
    for known in known {
        reused.extend(known.without(&present));
    }
    reused
}

/// A run without the pages of `holes`, which are in order.
fn cut(run: &PageRun, holes: &[Range<u64>]) -> Vec<PageRun> {
    without(run.range(), near(holes, &run.range()))
        .into_iter()
        .map(|part| PageRun {
            start: part.start,
            pages: ((part.end - part.start) / PAGE_SIZE) as u32,
            class: run.class,
        })
        .collect()
}

fn kind_of(pid: i32, mapping: &Mapping, runs: &[PageRun]) -> MappingKind {
    if mapping.is_anonymous() {
        return MappingKind::Anonymous;
    }
    let private: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
    let worth = mapping.pages() <= REPLACE_SMALL || private * REPLACE_SHARE >= mapping.pages();
    // Code that was written to stays: anonymous memory that can be executed is refused in places.
    // What is marked would lose its marks. Pages beyond the file's end can't be read.
    let flags = &mapping.flags;
    let marked = flags.locked || flags.dont_copy || flags.dont_dump || flags.sealed;
    let plain = !mapping.executable && !marked;
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
