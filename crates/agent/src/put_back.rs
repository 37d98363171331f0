//! Putting pages of an image where they belong in a process.

use std::num::NonZero;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use medes_memory::pages::{PageClass, PageRun};
use medes_memory::priority::Thread;
use medes_memory::ranges::slices;
use medes_memory::userfault::{CopyMode, Event, FillError, UserFault};
use medes_memory::writer::write_pages;
use medes_pages::{Decoder, PAGE_SIZE, Page};
use parking_lot::Mutex;
use rayon_core::{ThreadPool, ThreadPoolBuilder};

use crate::error::RestoreError;
use crate::index::{ImageIndex, Piece};
use crate::view::{AddressView, Belongs};
use crate::working_set::{Prefetch, PrefetchRange};

const PAGE: u64 = PAGE_SIZE as u64;

/// Pages decoded before they are copied in one call: enough to make the call cheap, few enough to
/// stay in the processor's cache.
const BATCH: usize = 64;

/// The most threads that put one sandbox's working set back. The kernel takes longer to copy a page
/// than we to decode one, and lets several threads copy at once.
const THREADS: usize = 4;

/// Pages that are worth another thread, which takes about as long to wake as 30 take.
const PAGES_PER_THREAD: u64 = 100;

/// The most pages that a thread takes at a time: neighbours get into each other's way.
const LARGE_GROUP: u64 = 256;

/// The fewest. Towards the end threads take ever fewer, so that they end together.
const SMALL_GROUP: u64 = 32;

/// What a restore needs for working, worth keeping from one to the next: memory that was used
/// before is much faster than new memory.
pub struct RestoreBuffers {
    decoder: Decoder,
    pages: Vec<Page>,
    /// Those of further threads.
    helpers: Vec<RestoreBuffers>,
    pub(crate) events: Vec<Event>,
}

impl Default for RestoreBuffers {
    fn default() -> Self {
        let pages = vec![[0; PAGE_SIZE]; BATCH];
        Self { decoder: Decoder::new(), pages, helpers: Vec::new(), events: Vec::new() }
    }
}

/// How a page comes back: with its writers watched or not. A page that is about to be written to is
/// not worth watching, it costs the writer a fault.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watch {
    Yes,
    No,
}

/// Where pages are put back: one process of an image.
pub(crate) struct PutBack<'a> {
    pub(crate) index: &'a ImageIndex,
    pub(crate) process: usize,
    pub(crate) userfault: &'a UserFault,
    pub(crate) view: &'a AddressView,
}

/// A range of the process within one piece of its view.
struct Place {
    /// Its addresses in the image.
    of_image: Range<u64>,
    /// What is to be added to them.
    shift: u64,
}

impl PutBack<'_> {
    fn place(&self, range: &Range<u64>) -> Option<Place> {
        let Belongs::Image(origin) = self.view.at(range.start) else { return None };
        let of_image = origin..origin + (range.end - range.start);
        Some(Place { of_image, shift: range.start.wrapping_sub(origin) })
    }

    /// Puts back what the image has of `range`, which must lie within one piece of the view. Returns
    /// how many pages that were.
    pub(crate) fn pages(
        &self,
        range: &Range<u64>,
        watch: Watch,
        buffers: &mut RestoreBuffers,
    ) -> Result<u64, RestoreError> {
        match self.place(range) {
            Some(place) => self.pages_of(&place, watch, buffers),
            None => Ok(0),
        }
    }

    fn pages_of(
        &self,
        Place { of_image, shift }: &Place,
        watch: Watch,
        buffers: &mut RestoreBuffers,
    ) -> Result<u64, RestoreError> {
        let write_protect = watch == Watch::Yes && self.userfault.tracks_writes();
        let mode = CopyMode { write_protect, ..CopyMode::default() };
        let mut pages = 0;
        let range = of_image.clone();
        for_each_content(self.index, self.process, range, buffers, |address, file, content| {
            if !file {
                pages += (content.len() / PAGE_SIZE) as u64;
                let address = address.wrapping_add(*shift);
                copy_where_mapped(self.userfault, address, content, mode)?;
            }
            Ok(())
        })?;
        Ok(pages)
    }

    /// As [`PutBack::pages`], and zeros where the image has nothing: whoever touches such a page waits
    /// as long as for any other.
    fn pages_and_zeros(
        &self,
        range: &Range<u64>,
        watch: Watch,
        buffers: &mut RestoreBuffers,
    ) -> Result<u64, RestoreError> {
        let Some(place) = self.place(range) else { return Ok(0) };
        let pages = self.pages_of(&place, watch, buffers)?;
        for gap in self.index.gaps(self.process, place.of_image) {
            let gap = gap.start.wrapping_add(place.shift)..gap.end.wrapping_add(place.shift);
            match self.userfault.zeropage(gap, false) {
                Ok(_) | Err(FillError::NotRegistered { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(pages)
    }

    /// Puts pages back that will be needed, those that are not there yet. Returns how many there
    /// were. What the process is changing just then comes when it is needed.
    pub(crate) fn beforehand(
        &self,
        prefetch: &PrefetchRange,
        buffers: &mut RestoreBuffers,
    ) -> Result<u64, RestoreError> {
        let watch = if prefetch.written { Watch::No } else { Watch::Yes };
        let mut pages = 0;
        for part in self.view.parts(prefetch.range.clone()) {
            match self.pages_and_zeros(&part, watch, buffers) {
                Ok(more) => pages += more,
                Err(RestoreError::Fill(FillError::Changing { .. })) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(pages)
    }
}

/// Puts back what must be there before a sandbox runs, whose processes are `targets`, in the image's
/// order: pages of private file mappings, and the working set; if that is large, on several threads.
/// Returns how many pages there were.
pub(crate) fn all_beforehand(
    targets: &[PutBack<'_>],
    prefetch: &Prefetch,
    buffers: &mut RestoreBuffers,
) -> Result<u64, RestoreError> {
    let ranges = || {
        let of_processes = targets.iter().zip(&prefetch.ranges);
        of_processes.flat_map(|(target, ranges)| ranges.iter().map(move |range| (target, range)))
    };
    let pages: u64 = ranges().map(|(_, range)| page_count(range)).sum();
    let threads = (pages / PAGES_PER_THREAD).clamp(1, THREADS as u64) as usize;
    let helpers = if threads > 1 { Helpers::claim(threads - 1) } else { None };
    let Some(helpers) = helpers else {
        let pages = file_pages(targets, buffers)?;
        let more: Result<u64, _> =
            ranges().map(|(target, range)| target.beforehand(range, buffers)).sum();
        return Ok(pages + more?);
    };
    let pieces = ranges().flat_map(|(target, &PrefetchRange { ref range, written })| {
        let slices = slices(range.clone(), BATCH as u64 * PAGE);
        slices.map(move |range| (target, PrefetchRange { range, written }))
    });
    let pieces: Vec<(&PutBack<'_>, PrefetchRange)> = pieces.collect();
    let groups = groups(pieces.iter().map(|(_, piece)| page_count(piece)), 1 + helpers.threads);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = |buffers: &mut RestoreBuffers| -> Result<u64, RestoreError> {
        let mut pages = 0;
        while !failed.load(Ordering::Relaxed)
            && let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed))
        {
            for (target, range) in &pieces[group.clone()] {
                let more = target.beforehand(range, buffers);
                pages += more.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            }
        }
        Ok(pages)
    };
    let mut others = std::mem::take(&mut buffers.helpers);
    others.resize_with(others.len().max(helpers.threads), RestoreBuffers::default);
    let mut answers: Vec<_> = (0..helpers.threads).map(|_| Ok(0)).collect();
    helpers.pool.each.lock().iter().for_each(Thread::keep_elsewhere);
    let own = helpers.pool.threads.in_place_scope(|scope| {
        let work = &work;
        for (answer, buffers) in answers.iter_mut().zip(&mut others) {
            scope.spawn(move |_| *answer = work(buffers));
        }
        // It takes about as long as the others to begin.
        let pages = file_pages(targets, buffers);
        let pages = pages.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        Ok(pages + work(buffers)?)
    });
    buffers.helpers = others;
    answers.into_iter().fold(own, |pages, more| Ok(pages? + more?))
}

fn page_count(prefetch: &PrefetchRange) -> u64 {
    (prefetch.range.end - prefetch.range.start) / PAGE
}

/// Which pieces, given by how many pages they have, one of so many threads takes at a time.
fn groups(pieces: impl Iterator<Item = u64> + Clone, threads: usize) -> Vec<Range<usize>> {
    let mut rest: u64 = pieces.clone().sum();
    let mut groups: Vec<Range<usize>> = Vec::new();
    let mut room = 0;
    for (n, pages) in pieces.enumerate() {
        if room == 0 {
            // Half of an equal share of what is left.
            room = (rest / (2 * threads as u64)).clamp(SMALL_GROUP, LARGE_GROUP);
            groups.push(n..n);
        }
        if let Some(last) = groups.last_mut() {
            last.end = n + 1;
        }
        (room, rest) = (room.saturating_sub(pages), rest - pages);
    }
    groups
}

/// Threads that help putting pages back.
struct Pool {
    threads: ThreadPool,
    each: Arc<Mutex<Vec<Thread>>>,
    /// How many of them help nobody.
    free: AtomicUsize,
}

impl Pool {
    /// There is none where there is one processor.
    fn get() -> Option<&'static Self> {
        static POOL: OnceLock<Option<Pool>> = OnceLock::new();
        POOL.get_or_init(Self::start).as_ref()
    }

    fn start() -> Option<Self> {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let threads = processors.min(THREADS) - 1;
        if threads == 0 {
            return None;
        }
        let each = Arc::<Mutex<Vec<Thread>>>::default();
        let begun = Arc::clone(&each);
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("restore-{n}"))
            .start_handler(move |_| begun.lock().push(Thread::this()))
            .build();
        let pool = pool.inspect_err(|error| tracing::warn!(%error, "restoring on one thread"));
        Some(Self { threads: pool.ok()?, each, free: threads.into() })
    }
}

/// Some of the threads that help, as long as this is.
struct Helpers {
    pool: &'static Pool,
    threads: usize,
}

impl Helpers {
    /// Up to so many. Those that help somebody else are not waited for.
    fn claim(most: usize) -> Option<Self> {
        let pool = Pool::get()?;
        let claim = |free: usize| (free > 0).then(|| free - free.min(most));
        let before = pool.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim).ok()?;
        Some(Self { pool, threads: before.min(most) })
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.pool.free.fetch_add(self.threads, Ordering::Relaxed);
    }
}

/// Copies pages to where they belong, those that have a place: a child lacks the mappings that its
/// parent kept from it (`MADV_DONTFORK`).
fn copy_where_mapped(
    userfault: &UserFault,
    start: u64,
    content: &[u8],
    mode: CopyMode,
) -> Result<(), FillError> {
    match userfault.copy(start, content, mode) {
        Err(FillError::NotRegistered { .. }) if content.len() > PAGE_SIZE => {
            let mut pages = content.chunks(PAGE_SIZE).zip((start..).step_by(PAGE_SIZE));
            pages.try_for_each(|(page, at)| copy_where_mapped(userfault, at, page, mode))
        }
        Ok(_) | Err(FillError::NotRegistered { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Writes the pages of private file mappings, which userfaultfds do not cover, of all processes.
fn file_pages(targets: &[PutBack<'_>], buffers: &mut RestoreBuffers) -> Result<u64, RestoreError> {
    let of_process = |target: &PutBack<'_>| write_file_pages(target.index, target.process, buffers);
    targets.iter().map(of_process).sum()
}

/// Writes the pages of private file mappings of a process.
fn write_file_pages(
    index: &ImageIndex,
    process: usize,
    buffers: &mut RestoreBuffers,
) -> Result<u64, RestoreError> {
    let pid = index.table().processes[process].pid;
    let mut runs: Vec<PageRun> = Vec::new();
    let mut contents: Vec<u8> = Vec::new();
    let table = &index.table().processes[process];
    for run in table.runs.iter().filter(|run| run.file) {
        let range = run.address..run.end();
        for_each_content(index, process, range, buffers, |address, _, content| {
            let pages = (content.len() / PAGE_SIZE) as u32;
            runs.push(PageRun { start: address, pages, class: PageClass::FileCow });
            contents.extend_from_slice(content);
            Ok(())
        })?;
    }
    write_pages(pid, &runs, &contents)?;
    Ok((contents.len() / PAGE_SIZE) as u64)
}

/// Calls `found` with the content of the pages that the image has in a range, in pieces.
fn for_each_content(
    index: &ImageIndex,
    process: usize,
    range: Range<u64>,
    buffers: &mut RestoreBuffers,
    mut found: impl FnMut(u64, bool, &[u8]) -> Result<(), RestoreError>,
) -> Result<(), RestoreError> {
    let RestoreBuffers { decoder, pages, .. } = buffers;
    index.for_each(process, range, |address, file, piece| match piece {
        Piece::Stored(content) => found(address, file, content),
        Piece::Patched(list, mut patches) => {
            let mut address = address;
            for batch in list.chunks(BATCH) {
                for (patch, page) in batch.iter().zip(pages.iter_mut()) {
                    index.decode(patch, &mut patches, decoder, page)?;
                }
                let content = pages[..batch.len()].as_flattened();
                found(address, file, content)?;
                address += content.len() as u64;
            }
            Ok(())
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn groups_are_all_pieces_in_order(
            pieces in prop::collection::vec(0..=64u64, 0..60),
            threads in 1..=THREADS,
        ) {
            let groups = groups(pieces.iter().copied(), threads);
            let all: Vec<usize> = groups.iter().cloned().flatten().collect();
            prop_assert_eq!(all, (0..pieces.len()).collect::<Vec<_>>());
            for group in &groups {
                let pages: u64 = pieces[group.clone()].iter().sum();
                prop_assert!(pages < LARGE_GROUP + 64);
            }
            if let Some(last) = groups.last() {
                let pages: u64 = pieces[last.clone()].iter().sum();
                prop_assert!(pages < 2 * 64, "{pages}");
            }
        }
    }
}
