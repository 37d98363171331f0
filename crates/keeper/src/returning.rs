//! Memory on its way back: who answers the faults of sandboxes that run without all their pages,
//! and who fills in the rest.
//!
//! A few threads wait on the userfaultfds of all such sandboxes at once. They do nothing but look
//! pages up, decode and copy them; nothing there waits for a network or a disk. One more thread, of
//! low priority, fills in what nobody has touched.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use crate::protocol::Returned;
use medes_agent::restore::{self, AddressSpace, Filling, RestoreBuffers, Revived, Served, Unasked};
use medes_agent::view::SpaceView;
use medes_agent::working_set::{Prefetch, PrefetchRange, WorkingSet};
use medes_memory::ranges::{slices, within};
use medes_pages::PAGE_SIZE;
use medes_store::Extent;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Threads that answer faults.
const SERVERS: usize = 2;

/// What is put back with each page that a thread waits for: what it is likely to need next, and is
/// known to need when it arrives behind it. Of whatever else came unasked nobody would learn whether
/// it is needed, and the next restore would have to wait for it again: with whole blocks of eight
/// pages the first restore of a function waits for a third of its pages, and it takes five to ten
/// restores until all of them are known.
const UNASKED: Unasked = Unasked::Ahead;

/// Bytes of the working set that are put back between two looks for faults, if the sandbox runs
/// already.
const SLICE: u64 = 64 << 12;

/// Pages filled in at a time, after which a fault gets its turn.
const FILL_PAGES: u64 = 64;

/// One sandbox's memory on its way back.
pub(crate) struct Returning {
    /// The restore's number; no two restores of a keeper have the same.
    number: u64,
    since: Instant,
    /// Whether the rest shall be filled in if it is used often.
    fill: AtomicBool,
    spaces: Mutex<Vec<Watch>>,
    touched: Mutex<Vec<Vec<u64>>>,
    /// What came unasked with what was touched, for each process.
    unasked: Mutex<Vec<Vec<Range<u64>>>>,
    /// Its working set, once that has been put back or is about to be.
    prefetch: OnceLock<Prefetch>,
    /// How many processes the image has.
    processes: usize,
    /// The address spaces while somebody else has them, in the image's order.
    suspended: Mutex<Vec<Arc<AddressSpace>>>,
    /// Requests that are over.
    requests: AtomicU64,
    /// No more filling: the sandbox is gone, or somebody else has its memory.
    stopped: AtomicBool,
    /// Held while pages are filled in.
    filling: Mutex<()>,
    /// Whether all is back.
    filled: AtomicBool,
    faults: AtomicU64,
    /// Pages put back because a thread waited for one of them.
    pages: AtomicU64,
    /// Pages put back because they belong to the working set.
    prefetched: AtomicU64,
    kill: Box<dyn Fn(&str) + Send + Sync>,
}

struct Watch {
    key: u64,
    space: Arc<AddressSpace>,
}

/// The threads, and what they watch.
pub(crate) struct Service {
    shared: Arc<Shared>,
    fills: mpsc::Sender<FillJob>,
}

struct Shared {
    epoll: Epoll,
    watched: Mutex<HashMap<u64, Watched>>,
    next: AtomicU64,
}

/// An address space, and the sandbox's memory that it is part of.
type Watched = (Arc<AddressSpace>, Arc<Returning>);

struct FillJob {
    memory: Arc<Returning>,
    filled: Box<dyn FnOnce() + Send>,
}

impl Service {
    pub(crate) fn start() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let shared = Arc::new(Shared { epoll, watched: Mutex::default(), next: AtomicU64::new(1) });
        for n in 0..SERVERS {
            let shared = Arc::clone(&shared);
            let name = format!("faults-{n}");
            std::thread::Builder::new().name(name).spawn(move || {
                medes_memory::priority::raise_this_thread();
                shared.answer_faults();
            })?;
        }
        let (fills, jobs) = mpsc::channel::<FillJob>();
        let filler = Arc::clone(&shared);
        std::thread::Builder::new().name("filler".into()).spawn(move || {
            medes_memory::priority::lower_this_thread();
            let mut buffers = RestoreBuffers::default();
            for FillJob { memory, filled } in jobs {
                if filler.fill(&memory, true, &mut buffers) {
                    filled();
                }
            }
        })?;
        Ok(Self { shared, fills })
    }

    /// Serves the faults of a sandbox from now on. `prefetch` is its working set, if that has been put
    /// back. `kill` is called with the reason if serving should become impossible.
    pub(crate) fn serve(
        &self,
        revived: Revived,
        prefetch: Option<Prefetch>,
        fill: bool,
        kill: Box<dyn Fn(&str) + Send + Sync>,
    ) -> io::Result<Arc<Returning>> {
        let number = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let memory = Returning::new(number, fill, revived.spaces.len(), prefetch, kill);
        memory.prefetched.store(revived.pages, Ordering::Relaxed);
        let memory = Arc::new(memory);
        for space in revived.spaces {
            if let Err(error) = self.shared.watch(&memory, space) {
                // Those that are watched already would be for ever.
                self.forget(&memory);
                return Err(error);
            }
        }
        Ok(memory)
    }

    /// Puts the working set back of a sandbox that runs already.
    pub(crate) fn prefetch(
        &self,
        memory: &Arc<Returning>,
        prefetch: Prefetch,
        buffers: &mut RestoreBuffers,
    ) {
        let prefetch = memory.prefetch.get_or_init(|| prefetch);
        for (process, ranges) in prefetch.ranges.iter().enumerate() {
            let of = |watch: &&Watch| watch.space.process() == process && !watch.space.is_child();
            let found = lock(&memory.spaces).iter().find(of).map(|w| (w.key, Arc::clone(&w.space)));
            let Some((key, space)) = found else { continue };
            for PrefetchRange { range, written } in ranges {
                for range in slices(range.clone(), SLICE) {
                    if memory.stopped.load(Ordering::Acquire) {
                        return;
                    }
                    match space.prefetch(&PrefetchRange { range, written: *written }, buffers) {
                        Ok(pages) => {
                            memory.prefetched.fetch_add(pages, Ordering::Relaxed);
                        }
                        Err(error) if error.is_gone() => return,
                        Err(error) => return (memory.kill)(&error.to_string()),
                    }
                    // Who waits for the space's lock may be kept from it by who has it all the time.
                    self.shared.serve(memory, &space, key, buffers);
                }
            }
        }
    }

    /// Fills in the rest at low priority; `filled` is called when everything is there.
    pub(crate) fn fill_later(
        &self,
        memory: &Arc<Returning>,
        filled: impl FnOnce() + Send + 'static,
    ) {
        let job = FillJob { memory: Arc::clone(memory), filled: Box::new(filled) };
        // The filler ends only with the process.
        let _ = self.fills.send(job);
    }

    /// Serves the sandbox no longer: it is gone.
    pub(crate) fn forget(&self, memory: &Returning) {
        memory.stopped.store(true, Ordering::Release);
        lock(&memory.suspended).clear();
        let keys: Vec<u64> = lock(&memory.spaces).iter().map(|watch| watch.key).collect();
        for key in keys {
            self.shared.unwatch(memory, key);
        }
    }

    /// Brings back at once what is still away, and lets go of the memory. False if the sandbox is
    /// gone.
    pub(crate) fn complete(&self, memory: &Arc<Returning>, buffers: &mut RestoreBuffers) -> bool {
        self.shared.fill(memory, false, buffers)
    }

    /// Stops serving and filling, and says what belongs where in each process of the image. The
    /// sandbox must be frozen.
    pub(crate) fn suspend(
        &self,
        memory: &Arc<Returning>,
        buffers: &mut RestoreBuffers,
    ) -> Result<Vec<SpaceView>, String> {
        memory.stopped.store(true, Ordering::Release);
        // What is being filled in now comes to its end first.
        drop(lock(&memory.filling));
        let result = self.shared.suspend(memory, buffers);
        if result.is_err() {
            memory.stopped.store(false, Ordering::Release);
        }
        result
    }

    /// Forgets children that have ended since they were forked: nobody says so.
    pub(crate) fn tidy(&self, memory: &Returning) {
        if lock(&memory.spaces).len() > memory.processes {
            self.shared.forget_ended_children(memory);
        }
    }

    /// Serves a suspended sandbox on.
    pub(crate) fn resume(&self, memory: &Arc<Returning>) -> io::Result<()> {
        memory.stopped.store(false, Ordering::Release);
        for space in std::mem::take(&mut *lock(&memory.suspended)) {
            space.resume();
            self.shared.watch(memory, space)?;
        }
        Ok(())
    }
}

impl Returning {
    fn new(
        number: u64,
        fill: bool,
        processes: usize,
        prefetch: Option<Prefetch>,
        kill: Box<dyn Fn(&str) + Send + Sync>,
    ) -> Self {
        Self {
            number,
            since: Instant::now(),
            fill: fill.into(),
            spaces: Mutex::default(),
            suspended: Mutex::default(),
            touched: Mutex::default(),
            unasked: Mutex::default(),
            prefetch: prefetch.map(OnceLock::from).unwrap_or_default(),
            processes,
            requests: 0.into(),
            stopped: false.into(),
            filling: Mutex::default(),
            filled: false.into(),
            faults: 0.into(),
            pages: 0.into(),
            prefetched: 0.into(),
            kill,
        }
    }

    /// A request is over: tells the working set what was touched since the last time. The first
    /// request since the restore concludes the trial of what was left out.
    pub(crate) fn teach(&self, set: &mut WorkingSet) {
        let touched = std::mem::take(&mut *lock(&self.touched));
        for (process, addresses) in touched.iter().enumerate() {
            set.touched(process, addresses);
        }
        if self.requests.fetch_add(1, Ordering::AcqRel) == 0
            && let Some(prefetch) = self.prefetch.get()
        {
            let mut needed = touched;
            // Nobody knows of those.
            for (process, unasked) in lock(&self.unasked).iter().enumerate() {
                of_process(&mut needed, process).extend(unasked.iter().flat_map(pages));
            }
            set.conclude(prefetch, &needed);
        }
    }

    /// Tells the function's working set what requests have written to, process by process.
    pub(crate) fn teach_written(&self, set: &mut WorkingSet, written: &[Vec<Range<u64>>]) {
        let Some(prefetch) = self.prefetch.get().filter(|_| self.requests() > 0) else { return };
        let unasked = std::mem::take(&mut *lock(&self.unasked));
        for (process, ranges) in written.iter().enumerate() {
            let came = unasked.get(process).into_iter().flatten();
            let needed = came.flat_map(|range| within(range, ranges));
            set.touched(process, &needed.flat_map(|range| pages(&range)).collect::<Vec<_>>());
            set.written(process, prefetch, ranges);
        }
    }

    /// Whether the working set is back, or on its way.
    pub(crate) fn has_prefetched(&self) -> bool {
        self.prefetch.get().is_some()
    }

    /// The restore's number.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// How long ago the restore was.
    pub(crate) fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// How many requests have come to their end since the restore.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Acquire)
    }

    /// Whether all is back.
    fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Whether the memory still tells of writes.
    pub(crate) fn tracks_writes(&self) -> bool {
        let spaces = lock(&self.spaces);
        !spaces.is_empty() && spaces.iter().all(|watch| watch.space.tracks_writes())
    }

    /// Where the image lies; `None` if all is back and nothing is watched.
    pub(crate) fn image(&self) -> Option<Extent> {
        self.all_spaces().first().map(|space| space.image())
    }

    /// The userfaultfds of the image's processes, in order; none if not all are watched.
    pub(crate) fn userfaults(&self) -> Vec<OwnedFd> {
        let mut spaces = self.all_spaces();
        spaces.retain(|space| !space.is_child());
        spaces.sort_unstable_by_key(|space| space.process());
        if spaces.len() != self.processes {
            return Vec::new();
        }
        let duplicates = spaces
            .iter()
            .map(|space| space.with_descriptor(|descriptor| descriptor.try_clone_to_owned()));
        duplicates.collect::<Result<_, _>>().unwrap_or_default()
    }

    fn all_spaces(&self) -> Vec<Arc<AddressSpace>> {
        let mut spaces: Vec<_> =
            lock(&self.spaces).iter().map(|watch| Arc::clone(&watch.space)).collect();
        spaces.extend(lock(&self.suspended).iter().map(Arc::clone));
        spaces
    }

    /// Whether filling in the rest was begun and stopped in the middle.
    pub(crate) fn is_half_filled(&self) -> bool {
        !self.is_filled() && !self.fill.load(Ordering::Acquire)
    }

    /// Whether filling in the rest is due; true once at most.
    pub(crate) fn take_fill_order(&self) -> bool {
        self.fill.swap(false, Ordering::AcqRel)
    }

    /// What was done so far.
    pub(crate) fn counts(&self) -> Returned {
        Returned {
            prefetched: self.prefetched.load(Ordering::Relaxed),
            faults: self.faults.load(Ordering::Relaxed),
            pages: self.pages.load(Ordering::Relaxed),
        }
    }

    fn record(&self, process: usize, served: &Served) {
        self.faults.fetch_add(served.faults, Ordering::Relaxed);
        self.pages.fetch_add(served.pages, Ordering::Relaxed);
        if !served.touched.is_empty() {
            of_process(&mut lock(&self.touched), process).extend_from_slice(&served.touched);
        }
        if !served.unasked.is_empty() {
            of_process(&mut lock(&self.unasked), process).extend_from_slice(&served.unasked);
        }
    }
}

/// The list of a process.
fn of_process<T>(lists: &mut Vec<Vec<T>>, process: usize) -> &mut Vec<T> {
    if lists.len() <= process {
        lists.resize_with(process + 1, Vec::new);
    }
    &mut lists[process]
}

/// The addresses of pages.
fn pages(range: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    range.clone().step_by(PAGE_SIZE)
}

impl Shared {
    fn watch(&self, memory: &Arc<Returning>, space: Arc<AddressSpace>) -> io::Result<()> {
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.watched).insert(key, (Arc::clone(&space), Arc::clone(memory)));
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, key);
        if let Err(error) = space.with_descriptor(|fd| self.epoll.add(fd, event)) {
            lock(&self.watched).remove(&key);
            return Err(error.into());
        }
        lock(&memory.spaces).push(Watch { key, space });
        Ok(())
    }

    fn unwatch(&self, memory: &Returning, key: u64) {
        lock(&self.watched).remove(&key);
        // The descriptor leaves the set when its last holder closes it; others may hold it longer.
        let mut spaces = lock(&memory.spaces);
        if let Some(at) = spaces.iter().position(|watch| watch.key == key) {
            let watch = spaces.swap_remove(at);
            drop(spaces);
            let _ = watch.space.with_descriptor(|fd| self.epoll.delete(fd));
        }
    }

    fn answer_faults(&self) {
        let mut buffers = RestoreBuffers::default();
        let mut ready = [EpollEvent::empty(); 16];
        loop {
            let count = match self.epoll.wait(&mut ready, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "waiting for faults");
                    return;
                }
            };
            for event in &ready[..count] {
                let key = event.data();
                let found = lock(&self.watched).get(&key).cloned();
                let Some((space, memory)) = found else { continue };
                self.serve(&memory, &space, key, &mut buffers);
            }
        }
    }

    /// Answers the faults of a space that there are, and waits for the next.
    fn serve(
        &self,
        memory: &Arc<Returning>,
        space: &AddressSpace,
        key: u64,
        buffers: &mut RestoreBuffers,
    ) {
        let mut served = Served::default();
        let result = space.serve(UNASKED, buffers, &mut served);
        memory.record(space.process(), &served);
        if !served.children.is_empty() {
            // A sandbox may fork for each request.
            self.forget_ended_children(memory);
        }
        for child in served.children.drain(..) {
            if let Err(error) = self.watch(memory, child) {
                (memory.kill)(&format!("a forked process can't be served: {error}"));
            }
        }
        match result {
            Ok(()) => {
                let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
                let mut event = EpollEvent::new(flags, key);
                // Fails only if it was taken out meanwhile.
                let _ = space.with_descriptor(|fd| self.epoll.modify(fd, &mut event));
            }
            Err(error) if error.is_gone() => self.unwatch(memory, key),
            Err(error) => {
                self.unwatch(memory, key);
                (memory.kill)(&error.to_string());
            }
        }
    }

    /// Fills in everything, and with `keep` leaves watched what tells of writes. False if it was
    /// stopped or the sandbox is gone.
    fn fill(&self, memory: &Arc<Returning>, keep: bool, buffers: &mut RestoreBuffers) -> bool {
        let due = |space: &AddressSpace| match space.filling() {
            Filling::Going => true,
            Filling::Done => !keep,
            Filling::Released => false,
        };
        loop {
            let next = {
                let spaces = lock(&memory.spaces);
                let next = spaces.iter().rev().find(|watch| due(&watch.space));
                next.map(|watch| (watch.key, Arc::clone(&watch.space)))
            };
            let Some((key, space)) = next else {
                memory.filled.store(true, Ordering::Release);
                return true;
            };
            let filling = lock(&memory.filling);
            if memory.stopped.load(Ordering::Acquire) {
                return false;
            }
            let mut served = Served::default();
            let result = space.fill(FILL_PAGES, keep, buffers, &mut served);
            drop(filling);
            memory.record(space.process(), &served);
            for child in served.children.drain(..) {
                if let Err(error) = self.watch(memory, child) {
                    (memory.kill)(&format!("a forked process can't be served: {error}"));
                    return false;
                }
            }
            match result {
                Ok(Filling::Going | Filling::Done) => {}
                Ok(Filling::Released) => self.unwatch(memory, key),
                Err(error) if error.is_gone() => self.unwatch(memory, key),
                Err(error) => {
                    self.unwatch(memory, key);
                    (memory.kill)(&error.to_string());
                    return false;
                }
            }
        }
    }

    fn suspend(
        &self,
        memory: &Arc<Returning>,
        buffers: &mut RestoreBuffers,
    ) -> Result<Vec<SpaceView>, String> {
        self.forget_ended_children(memory);
        let (keys, mut spaces): (Vec<u64>, Vec<Arc<AddressSpace>>) = {
            let spaces = lock(&memory.spaces);
            spaces.iter().map(|watch| (watch.key, Arc::clone(&watch.space))).unzip()
        };
        let views = restore::suspend(&mut spaces, buffers, |space, served| {
            memory.record(space.process(), &served);
            for child in served.children {
                if let Err(error) = self.watch(memory, child) {
                    (memory.kill)(&format!("a forked process can't be served: {error}"));
                }
            }
        })?;
        keys.into_iter().for_each(|key| self.unwatch(memory, key));
        lock(&memory.suspended).extend(spaces);
        Ok(views)
    }

    /// Children that have ended say nothing of it.
    fn forget_ended_children(&self, memory: &Returning) {
        let children: Vec<(u64, Arc<AddressSpace>)> = {
            let spaces = lock(&memory.spaces);
            let children = spaces.iter().filter(|watch| watch.space.is_child());
            children.map(|watch| (watch.key, Arc::clone(&watch.space))).collect()
        };
        for (key, space) in children {
            if space.has_ended() {
                self.unwatch(memory, key);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use medes_agent::image::{ProcessTable, Table};
    use medes_agent::restore::HeldImage;
    use medes_core::NodeId;
    use medes_store::{Store, View};

    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    #[test]
    fn what_comes_unasked_is_learned_if_it_is_written_to() {
        let at = |page: u64| (1 << 20) + page * PAGE;
        let mut set = WorkingSet::default();
        let memory = Returning::new(1, false, 1, Some(set.prefetch(None, &[])), Box::new(|_| {}));
        let unasked = vec![at(0)..at(3), at(4)..at(8)];
        let touched = vec![at(100), at(3)];
        memory.record(0, &Served { touched, unasked, ..Served::default() });
        memory.teach(&mut set);
        assert_eq!(set.pages(), 2);
        memory.teach_written(&mut set, &[vec![at(1)..at(2), at(3)..at(6), at(20)..at(22)]]);
        assert_eq!(set.pages(), 5);
        let known = set.prefetch(None, &[]).ranges.swap_remove(0);
        let known: Vec<_> = known.into_iter().map(|known| (known.range, known.written)).collect();
        assert_eq!(known, [(at(1)..at(2), true), (at(3)..at(6), true), (at(100)..at(101), false)]);
    }

    #[test]
    fn what_was_left_out_and_came_unasked_is_not_forgotten() {
        let mut set = WorkingSet::default();
        let all: Vec<u64> = (0..4096).map(|page| (1 << 24) + page * PAGE).collect();
        set.touched(0, &all);
        let trial = set.trial();
        let prefetch = set.prefetch(Some(trial), &[]);
        let back: u64 = prefetch.ranges[0].iter().map(|r| r.range.end - r.range.start).sum();
        assert!(back / PAGE < 4096, "some are left out");
        let memory = Returning::new(1, false, 1, Some(prefetch), Box::new(|_| {}));
        let unasked = vec![all[0]..all[9], all[9]..all[4095] + PAGE];
        memory.record(0, &Served { unasked, ..Served::default() });
        memory.teach(&mut set);
        assert_eq!(set.pages(), 4096);
    }

    #[test]
    fn what_cannot_be_served_whole_is_not_served_at_all() {
        let processes = vec![ProcessTable::default(), ProcessTable::default()];
        let table = Table { processes, ..Table::default() }.encode();
        let store = Store::create(NodeId(0), 1 << 20).expect("a store");
        let image = store.put_image(&[&table], &[]).expect("room");
        let memory = store.memory().descriptor().try_clone_to_owned().expect("a descriptor");
        let view = Arc::new(View::open(memory).expect("maps"));
        // The second can't be waited on.
        let (pipe, _end) = nix::unistd::pipe().expect("a pipe");
        let file = std::fs::File::open("/proc/self/exe").expect("a file");
        let held = HeldImage::open(view, image.extent(), vec![pipe, file.into()]);
        let revived = held
            .and_then(|held| held.revive(&Prefetch::default(), &mut RestoreBuffers::default()))
            .expect("nothing to put back");
        let spaces: Vec<_> = revived.spaces.iter().map(Arc::downgrade).collect();
        let service = Service::start().expect("threads");
        service.serve(revived, None, false, Box::new(|_| {})).err().expect("refused");
        assert!(lock(&service.shared.watched).is_empty());
        assert!(spaces.iter().all(|space| space.strong_count() == 0));
        store.remove_image(image);
    }
}
