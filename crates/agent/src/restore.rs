//! The restore operation: a dedup sandbox runs again, and its pages come back.
//!
//! Everything it needs is in the image and in the page store's memory file; nobody is asked.
//! [`HeldImage::revive`] puts back what must be there before the sandbox runs: the pages of private
//! file mappings, which a userfaultfd does not cover, and the working set. The rest stays away
//! until it is touched ([`AddressSpace::serve`]) or filled in ([`AddressSpace::fill`]).

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use medes_memory::ranges::{near, without};
use medes_memory::userfault::{Event, FaultKind, FillError, Filled, UserFault, UserFaultFeatures};
use medes_pages::PAGE_SIZE;
use medes_store::{Extent, View};

use crate::error::{ESRCH, RestoreError};
use crate::index::ImageIndex;
pub use crate::put_back::RestoreBuffers;
use crate::put_back::{PutBack, Watch, all_beforehand};
use crate::read_ahead::{ReadAhead, Step};
use crate::view::{AddressView, Belongs, SpaceView};
use crate::working_set::{Prefetch, PrefetchRange, WorkingSet};

const PAGE: u64 = PAGE_SIZE as u64;

/// The kernel's error number for "no memory".
const ENOMEM: i32 = 12;

/// A stretch of the heap of at least so many pages that the image has nothing in is given back to
/// the kernel before the sandbox runs: memory that is touched there for the first time, because the
/// heap had been trimmed, then costs an ordinary page fault and not a round trip to us. It cuts the
/// mapping in two for the kernel, and a program may not mremap two mappings at once; the heap,
/// which belongs to the C library, is not moved.
const HOLE_PAGES: u64 = 16;

/// An image that can be read, and whose base pages are all there.
pub struct OpenImage(Box<ImageIndex>);

impl OpenImage {
    /// Opens an image.
    ///
    /// # Errors
    /// [`RestoreError`] with what is wrong.
    pub fn open(view: Arc<View>, image: Extent) -> Result<Self, RestoreError> {
        ImageIndex::open(view, image).map(|index| Self(Box::new(index)))
    }

    /// Where it lies.
    #[must_use]
    pub fn extent(&self) -> Extent {
        self.0.extent()
    }

    /// Tells the working set how long the patches of its pages are.
    pub fn teach(&self, set: &mut WorkingSet) {
        for process in 0..self.0.table().processes.len() {
            set.encoded(process, self.0.patch_lengths(process));
        }
    }

    /// Takes charge of it. It stays open, for a restore that comes at once, until
    /// [`HeldImage::close`].
    ///
    /// # Errors
    /// [`RestoreError::Descriptors`].
    pub fn hold(self, userfaults: Vec<OwnedFd>) -> Result<HeldImage, RestoreError> {
        let Self(index) = self;
        let (descriptors, processes) = (userfaults.len(), index.table().processes.len());
        if descriptors != processes {
            return Err(RestoreError::Descriptors { descriptors, processes });
        }
        let (view, image) = (index.view(), index.extent());
        Ok(HeldImage { view, image, open: Some(index), userfaults, left: Vec::new() })
    }
}

/// What brings one dedup sandbox's memory back: its image and its userfaultfds.
pub struct HeldImage {
    view: Arc<View>,
    image: Extent,
    /// The image, as long as it is open: much larger than it is in the page store.
    open: Option<Box<ImageIndex>>,
    userfaults: Vec<OwnedFd>,
    /// For each process what lacks nothing.
    left: Vec<Vec<Range<u64>>>,
}

impl HeldImage {
    /// Takes charge of an image, after checking that it can be read and that all base pages it
    /// names are there.
    ///
    /// # Errors
    /// [`RestoreError`] with what is wrong.
    pub fn open(
        view: Arc<View>,
        image: Extent,
        userfaults: Vec<OwnedFd>,
    ) -> Result<Self, RestoreError> {
        let mut held = OpenImage::open(view, image)?.hold(userfaults)?;
        held.close();
        Ok(held)
    }

    /// Gives back the memory that an open image takes.
    pub fn close(&mut self) {
        self.open = None;
    }

    /// Notes what stays or was not dropped after all, for each process: it lacks nothing, and nothing
    /// of it comes from the image from here on.
    pub fn leave(&mut self, ranges: Vec<Vec<Range<u64>>>) {
        self.left.resize_with(self.left.len().max(ranges.len()), Vec::new);
        for (left, more) in self.left.iter_mut().zip(ranges) {
            left.extend(more);
            left.sort_unstable_by_key(|range| range.start);
        }
    }

    /// What [`HeldImage::leave`] was told, for each process and in order.
    #[must_use]
    pub fn left(&self) -> &[Vec<Range<u64>>] {
        &self.left
    }

    /// Where the image lies.
    #[must_use]
    pub fn image(&self) -> Extent {
        self.image
    }

    /// The userfaultfds, in the image's order of processes.
    #[must_use]
    pub fn userfaults(&self) -> &[OwnedFd] {
        &self.userfaults
    }

    /// Puts back what must be there before the sandbox runs: pages of private file mappings, and of
    /// the rest those in `working_set`. The sandbox must be frozen, or all its threads stopped. It may
    /// run if this succeeds, as long as the answer's address spaces are served; it must be killed if
    /// not.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn revive(
        self,
        working_set: &Prefetch,
        buffers: &mut RestoreBuffers,
    ) -> Result<Revived, RestoreError> {
        let index = match self.open {
            Some(index) => *index,
            None => ImageIndex::open_again(self.view, self.image)?,
        };
        let index = Arc::new(index);
        let mut spaces = Vec::with_capacity(self.userfaults.len());
        for (process, userfault) in self.userfaults.into_iter().enumerate() {
            let table = &index.table().processes[process];
            let registered: Vec<Range<u64>> =
                table.registered.iter().map(|(start, length)| *start..start + length).collect();
            let mut view = AddressView::new(&registered);
            let left = self.left.get(process).map_or(&[][..], Vec::as_slice);
            view.forget_all(left);
            let features = match index.table().tracks_writes {
                true => UserFaultFeatures::EVENTS.union(UserFaultFeatures::TRACK_WRITES),
                false => UserFaultFeatures::EVENTS,
            };
            let mut userfault = UserFault::from_parts(userfault, features, registered, None);
            let holes = index.holes(process, HOLE_PAGES * PAGE);
            let mut holes: Vec<_> = holes
                .into_iter()
                .flat_map(|hole| without(hole.clone(), near(left, &hole)))
                .collect();
            holes.retain(|hole| hole.end - hole.start >= HOLE_PAGES * PAGE);
            for hole in holes {
                // If it can't be split off, its faults come to us, as those of all others do.
                if userfault.unregister(hole.clone()).is_ok() {
                    view.forget(hole);
                }
            }
            let space = AddressSpace::new(&index, process, false, userfault, view);
            spaces.push(Arc::new(space));
        }
        let states: Vec<_> = spaces.iter().map(|space| space.lock()).collect();
        let targets = spaces.iter().zip(&states).map(|(space, state)| space.put_back(state));
        let pages = all_beforehand(&targets.collect::<Vec<_>>(), working_set, buffers)?;
        drop(states);
        Ok(Revived { spaces, pages })
    }
}

/// A sandbox whose memory is on its way back.
pub struct Revived {
    /// Its address spaces, in the image's order of processes. Each has to be served until it is
    /// filled.
    pub spaces: Vec<Arc<AddressSpace>>,
    /// Pages that were put back so far.
    pub pages: u64,
}

/// The memory of one process, partly restored.
///
/// When all of it is back, the userfaultfd of a process that the image knows stays as long as the
/// kernel tells through it which pages are written to: so the next dedup of the sandbox costs what
/// was written, not what there is.
pub struct AddressSpace {
    index: Arc<ImageIndex>,
    process: usize,
    /// Whether it is a forked child's, which no image knows.
    child: bool,
    state: Mutex<State>,
}

struct State {
    userfault: UserFault,
    view: AddressView,
    /// Filling has put back everything below this address, but for what moved there since.
    filled_to: u64,
    /// Ranges that moved, to be filled in when the rest is.
    moved: Vec<Range<u64>>,
    filling: Filling,
    /// Somebody else has the userfaultfd: nothing is served or filled in.
    suspended: bool,
    ahead: ReadAhead,
}

/// How far filling in is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filling {
    /// There is more to do.
    Going,
    /// All pages are back. Changes are still reported, and have to be read.
    Done,
    /// All pages are back, and the userfaultfd has been released: there is nothing left to serve.
    Released,
}

/// What comes unasked with a page that a thread waits for: a page costs 1.3 us in a batch and ten times
/// that when a thread has to wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unasked {
    /// Nothing.
    Nothing,
    /// The block of so many pages, a power of two, that it lies in.
    Block(u64),
    /// What lies ahead, if the thread reads one page after the other.
    Ahead,
}

/// What serving an address space once did.
#[derive(Default)]
pub struct Served {
    /// Faults answered.
    pub faults: u64,
    /// Pages put back for them.
    pub pages: u64,
    /// The pages, by their addresses in the image, that threads waited for, or came through as they
    /// read on.
    pub touched: Vec<u64>,
    /// What came with them unasked, by addresses in the image.
    pub unasked: Vec<Range<u64>>,
    /// Address spaces of children that were forked.
    pub children: Vec<Arc<AddressSpace>>,
}

impl AddressSpace {
    fn new(
        index: &Arc<ImageIndex>,
        process: usize,
        child: bool,
        userfault: UserFault,
        view: AddressView,
    ) -> Self {
        let filling = Filling::Going;
        let moved = Vec::new();
        let ahead = ReadAhead::default();
        let state =
            State { userfault, view, filled_to: 0, moved, filling, suspended: false, ahead };
        Self { index: Arc::clone(index), process, child, state: state.into() }
    }

    /// Where the image lies that it is restored from.
    #[must_use]
    pub fn image(&self) -> Extent {
        self.index.extent()
    }

    /// Whether it is a forked child's.
    #[must_use]
    pub fn is_child(&self) -> bool {
        self.child
    }

    /// How far filling in is.
    #[must_use]
    pub fn filling(&self) -> Filling {
        self.lock().filling
    }

    /// Which process of the image it belongs to; a forked child has its parent's.
    #[must_use]
    pub fn process(&self) -> usize {
        self.process
    }

    /// Follows what the process reports and answers its faults; does not wait for any.
    ///
    /// # Errors
    /// [`RestoreError`]. [`RestoreError::is_gone`] when the process has ended; after any other
    /// error it must be killed, for a thread may wait for ever.
    pub fn serve(
        &self,
        unasked: Unasked,
        buffers: &mut RestoreBuffers,
        served: &mut Served,
    ) -> Result<(), RestoreError> {
        let mut state = self.lock();
        self.serve_locked(&mut state, unasked, buffers, served)
    }

    fn serve_locked(
        &self,
        state: &mut State,
        unasked: Unasked,
        buffers: &mut RestoreBuffers,
        served: &mut Served,
    ) -> Result<(), RestoreError> {
        if state.suspended {
            return Ok(());
        }
        let mut events = std::mem::take(&mut buffers.events);
        let mut waiting: Vec<(u64, Watch)> = Vec::new();
        let result = loop {
            events.clear();
            match state.userfault.read_events(&mut events) {
                Ok(0) if waiting.is_empty() => break Ok(()),
                Ok(_) => {}
                Err(error) => break Err(RestoreError::Events(error)),
            }
            // Changes first: each one precedes, for the thread that made it, whatever it touches
            // afterwards, and a page may only be put where it belongs by now.
            for event in events.drain(..) {
                match event {
                    Event::Fault { address, kind, .. } => {
                        let watch = match kind {
                            FaultKind::MissingRead => Watch::Yes,
                            FaultKind::MissingWrite | FaultKind::WriteProtected => Watch::No,
                        };
                        waiting.push((address & !(PAGE - 1), watch));
                    }
                    Event::Remap { from, to, len } => {
                        state.view.remap(from, to, len);
                        // It may lie where filling has been already.
                        state.moved.push(to..to.saturating_add(len));
                    }
                    Event::Remove(range) => self.remove(state, range),
                    Event::Unmap(range) => state.view.unmap(range),
                    // The child of a process that has all its pages has them too: closing its
                    // userfaultfd releases it.
                    Event::Fork { .. } if state.filling == Filling::Done => {}
                    Event::Fork { child } => {
                        served.children.push(Arc::new(self.child(state, child)))
                    }
                }
            }
            match self.answer(state, &mut waiting, unasked, buffers, served) {
                Ok(()) => {}
                // It changes its mappings and waits for us to read of it.
                Err(RestoreError::Fill(FillError::Changing { .. })) => {}
                Err(error) => break Err(error),
            }
        };
        buffers.events = events;
        result
    }

    /// Answers the faults in `waiting`; those that could not be answered stay in it.
    fn answer(
        &self,
        state: &mut State,
        waiting: &mut Vec<(u64, Watch)>,
        unasked: Unasked,
        buffers: &mut RestoreBuffers,
        served: &mut Served,
    ) -> Result<(), RestoreError> {
        while let Some(&(address, watch)) = waiting.last() {
            match state.view.at(address) {
                Belongs::Image(origin) => {
                    let page = address..address + PAGE;
                    served.pages += self.put_back(state).pages(&page, watch, buffers)?;
                    self.answer_more(state, (address, origin), unasked, buffers, served)?;
                    served.touched.push(origin);
                    // A page that is in no run is zero.
                    self.zero(state, address)?;
                }
                Belongs::Zeros | Belongs::Nothing => self.zero(state, address)?,
            }
            served.faults += 1;
            waiting.pop();
        }
        Ok(())
    }

    /// Puts back what comes unasked with the page at an address, of which the second is the one in the
    /// image.
    fn answer_more(
        &self,
        state: &mut State,
        (address, origin): (u64, u64),
        unasked: Unasked,
        buffers: &mut RestoreBuffers,
        served: &mut Served,
    ) -> Result<(), RestoreError> {
        let of_image = |range: &Range<u64>, view: &AddressView| {
            let range = view.around(address, range.clone());
            let at = |at: u64| origin.wrapping_add(at.wrapping_sub(address));
            at(range.start)..at(range.end.max(range.start))
        };
        let behind = address + PAGE;
        let more = match unasked {
            Unasked::Nothing => return Ok(()),
            Unasked::Block(pages) => {
                let block = address & !(pages * PAGE - 1);
                let near = state.view.around(address, block..block + pages * PAGE);
                [near.start..address, behind..near.end]
            }
            Unasked::Ahead => {
                let Step { passed, ahead } = state.ahead.step(address);
                served.touched.extend(of_image(&passed, &state.view).step_by(PAGE_SIZE));
                [behind..behind, ahead]
            }
        };
        for range in more.into_iter().filter(|range| range.start < range.end) {
            served.unasked.push(of_image(&range, &state.view));
            let range = PrefetchRange { range, written: false };
            served.pages += self.put_back(state).beforehand(&range, buffers)?;
        }
        Ok(())
    }

    /// Makes sure that there is a page at `address`: of zeros, if there is none.
    fn zero(&self, state: &State, address: u64) -> Result<(), RestoreError> {
        match state.userfault.zeropage(address..address + PAGE, false) {
            Ok(filled) => {
                if filled.present > 0 {
                    // Somebody else was faster; whoever waits has not been told.
                    let _ = state.userfault.wake(address..address + PAGE);
                }
                Ok(())
            }
            // Unmapped since the fault: the thread faults again, and finds out by itself.
            Err(FillError::NotRegistered { .. }) => {
                let _ = state.userfault.wake(address..address + PAGE);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Puts pages back that will be needed, those that are not there yet. Returns how many there
    /// were. What the process is changing just then comes when it is needed.
    ///
    /// # Errors
    /// As [`AddressSpace::serve`].
    pub fn prefetch(
        &self,
        prefetch: &PrefetchRange,
        buffers: &mut RestoreBuffers,
    ) -> Result<u64, RestoreError> {
        let state = self.lock();
        match state.suspended {
            true => Ok(0),
            false => self.put_back(&state).beforehand(prefetch, buffers),
        }
    }

    fn put_back<'a>(&'a self, state: &'a State) -> PutBack<'a> {
        let State { userfault, view, .. } = state;
        PutBack { index: &self.index, process: self.process, userfault, view }
    }

    /// Puts back up to `pages` more pages, in the order of addresses. When all are back, the
    /// userfaultfd is released, or, with `keep`, stays if it tells of writes.
    ///
    /// # Errors
    /// As [`AddressSpace::serve`].
    pub fn fill(
        &self,
        pages: u64,
        keep: bool,
        buffers: &mut RestoreBuffers,
        served: &mut Served,
    ) -> Result<Filling, RestoreError> {
        let mut state = self.lock();
        self.serve_locked(&mut state, Unasked::Nothing, buffers, served)?;
        if state.suspended || state.filling == Filling::Released {
            return Ok(state.filling);
        }
        let from = state.filled_to;
        let mut ranges = state.view.ranges().filter(|(r, _)| r.end > from);
        let Some((range, origin)) = ranges.next() else {
            drop(ranges);
            if let Some(moved) = state.moved.pop() {
                self.fill_moved(&mut state, moved, pages, buffers)?;
                return Ok(Filling::Going);
            }
            state.filling = Filling::Done;
            if !(keep && !self.child && state.userfault.tracks_writes()) {
                self.release(&mut state)?;
            }
            return Ok(state.filling);
        };
        drop(ranges);
        let start = range.start.max(from);
        // Mappings may reserve gigabytes and hold little.
        let shift = range.start.wrapping_sub(origin);
        let next = self.index.next_page(self.process, start.wrapping_sub(shift));
        let start = next.map_or(range.end, |next| next.wrapping_add(shift).min(range.end));
        let end = range.end.min(start + pages * PAGE);
        match self.put_back(&state).pages(&(start..end), Watch::Yes, buffers) {
            Ok(_) => state.filled_to = end,
            // Tried again after reading what it does.
            Err(RestoreError::Fill(FillError::Changing { .. })) => {}
            Err(error) => return Err(error),
        }
        Ok(Filling::Going)
    }

    /// Puts back up to `pages` pages of a range that moved, and notes what is left of it.
    fn fill_moved(
        &self,
        state: &mut State,
        moved: Range<u64>,
        pages: u64,
        buffers: &mut RestoreBuffers,
    ) -> Result<(), RestoreError> {
        let end = moved.end.min(moved.start + pages * PAGE);
        for part in state.view.parts(moved.start..end) {
            match self.put_back(state).pages(&part, Watch::Yes, buffers) {
                Ok(_) => {}
                Err(RestoreError::Fill(FillError::Changing { .. })) => {
                    state.moved.push(moved);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        if end < moved.end {
            state.moved.push(end..moved.end);
        }
        Ok(())
    }

    fn release(&self, state: &mut State) -> Result<(), RestoreError> {
        if self.child {
            // Its end comes when its descriptor is closed, and there is but this one.
            state.filling = Filling::Released;
            return Ok(());
        }
        let pid = self.index.table().processes[self.process].pid;
        match state.userfault.unregister_process(pid) {
            Ok(()) => {}
            // The kernel's two ways of saying that the address space is gone.
            Err(error) if matches!(error.raw_os_error(), Some(ESRCH | ENOMEM)) => {
                if !is_gone(state) {
                    return Err(RestoreError::Release(error));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(RestoreError::Release(error)),
        }
        // Whoever was changing its mappings just then waits to be heard, for as long as somebody
        // else has the descriptor too.
        if !matches!(probe(state), Err(FillError::Changing { .. })) {
            state.filling = Filling::Released;
        }
        Ok(())
    }

    /// Stops serving, and says what belongs where. The process must be frozen. Changes that it
    /// reported before are followed first.
    ///
    /// # Errors
    /// As [`AddressSpace::serve`]; it is served on then.
    pub fn suspend(
        &self,
        buffers: &mut RestoreBuffers,
        served: &mut Served,
    ) -> Result<SpaceView, RestoreError> {
        let mut state = self.lock();
        self.serve_locked(&mut state, Unasked::Nothing, buffers, served)?;
        if is_gone(&state) {
            // The process may live on, with another program's memory (execve(2)).
            return Err(FillError::Gone.into());
        }
        state.suspended = true;
        Ok(state.view.export())
    }

    /// Serves again after [`AddressSpace::suspend`].
    pub fn resume(&self) {
        self.lock().suspended = false;
    }

    /// Whether writes are told from outside, so that [`AddressSpace::suspend`] is of use.
    #[must_use]
    pub fn tracks_writes(&self) -> bool {
        let state = self.lock();
        !self.child && state.filling != Filling::Released && state.userfault.tracks_writes()
    }

    /// Whether the process has ended, or runs another program: nothing is left to serve then, and
    /// no event tells of it.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        is_gone(&self.lock())
    }

    /// The process drops the pages of a range itself. In the heap, which the C library trims and
    /// fills again all the time, nothing of that needs us any more.
    fn remove(&self, state: &mut State, range: Range<u64>) {
        state.view.remove(range.clone());
        let table = &self.index.table().processes[self.process];
        let in_heap = table
            .heap
            .iter()
            .any(|(start, length)| *start <= range.start && range.end <= start + length);
        if in_heap
            && range.end - range.start >= HOLE_PAGES * PAGE
            && state.userfault.unregister(range.clone()).is_ok()
        {
            state.view.forget(range);
        }
    }

    fn child(&self, state: &State, userfault: OwnedFd) -> Self {
        let registered = state.userfault.registered().to_vec();
        let features = state.userfault.features();
        let userfault = UserFault::from_parts(userfault, features, registered, None);
        let view = state.view.clone();
        Self::new(&self.index, self.process, true, userfault, view)
    }

    /// Calls `then` with the descriptor to wait on.
    pub fn with_descriptor<R>(&self, then: impl FnOnce(BorrowedFd<'_>) -> R) -> R {
        then(self.lock().userfault.as_fd())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stops serving all address spaces of a sandbox, which must be frozen ([`AddressSpace::suspend`]), and
/// says what belongs where in each process of the image, in the image's order. `served` hears what
/// had to be done for a space before.
///
/// # Errors
/// Why that can't be said of all of it: there are processes more or less than the image has, or not
/// all tell what they write. It is served on then.
pub fn suspend(
    spaces: &mut [Arc<AddressSpace>],
    buffers: &mut RestoreBuffers,
    mut served: impl FnMut(&AddressSpace, Served),
) -> Result<Vec<SpaceView>, String> {
    spaces.sort_unstable_by_key(|space| space.process());
    let processes = spaces.first().map_or(0, |space| space.index.table().processes.len());
    let mut all = spaces.iter().enumerate();
    let are_known = all.all(|(n, space)| space.process() == n && space.tracks_writes());
    if !are_known || spaces.is_empty() || spaces.len() != processes {
        return Err("not all of its processes tell what they write".into());
    }
    let mut views = Vec::with_capacity(spaces.len());
    let mut failed = None;
    for space in &*spaces {
        let mut done = Served::default();
        match space.suspend(buffers, &mut done) {
            Ok(view) => views.push(view),
            Err(error) => failed = Some(error.to_string()),
        }
        if !done.children.is_empty() {
            failed = Some("it has just forked".to_owned());
        }
        served(space, done);
    }
    match failed {
        Some(why) => {
            spaces.iter().for_each(|space| space.resume());
            Err(why)
        }
        None => Ok(views),
    }
}

/// Asks for a page where nothing can be registered, right below everything that is. The answer
/// tells whether the process lives, and whether it is changing its mappings.
fn probe(state: &State) -> Result<Filled, FillError> {
    let lowest = state.view.ranges().next().map_or(LOW, |(range, _)| range.start - PAGE);
    state.userfault.zeropage(lowest..lowest + PAGE, true)
}

fn is_gone(state: &State) -> bool {
    matches!(probe(state), Err(FillError::Gone))
}

/// Lower than programs map anything, and not so low that the kernel forbids it.
const LOW: u64 = 64 << 10;
