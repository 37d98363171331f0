//! The dedup operation, on a live sandbox.
//!
//! Up to [`commit`](self) nothing of the sandbox is changed, and a request may cancel at any time.
//! Then, with every thread stopped: make and register userfaultfds, store the image, let the
//! [`Holder`] take hold of both, and only then drop the pages. Whatever fails before that leaves
//! the sandbox as it was; a failure while dropping leaves it to the holder to put the pages back.

use std::collections::HashMap;
use std::hash::Hasher;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use medes_core::{DomainId, FunctionId, PageRef, SnapshotId};
use medes_memory::pages::PageRun;
use medes_memory::reader::{ReadError, read_pages};
use medes_memory::session::{EvictError, Eviction, Freezer, Replacement, Session, SessionError};
use medes_memory::tracee::SeizeOptions;
use medes_memory::userfault::{
    CreateError, RegisterMode, UserFault, UserFaultFeatures, UserFaultOptions,
};
use medes_pages::{Fingerprint, FingerprintConfig, Fingerprinter, PAGE_SIZE, Page};
use medes_registry::{Near, Registry, RegistryError, Scope};
use medes_store::{ImageHandle, Snapshot, Store, StoreError};
use parking_lot::Mutex;
use xxhash_rust::xxh3::Xxh3;

use crate::encode::{Bases, EncodeError, PageEncoder, PageSource};
use crate::image::{PatchUse, ProcessTable, RunBuilder, SnapshotUse, Table};
use crate::plan::{MappingKind, Plan, PlanError};

/// Pages read and encoded at a time: 1 MiB, which stays in the second-level cache, and few enough
/// to be read and fingerprinted in less than a millisecond: a request that cancels waits for that,
/// or for one page to be encoded.
const BATCH: u32 = 256;

/// An image may take at most three quarters of the pages that it stands for.
const WORTH: (u64, u64) = (3, 4);

/// Whose sandbox it is, and which base pages it may use.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// Whose pages may be used.
    pub domain: DomainId,
    /// The sandbox's function.
    pub function: FunctionId,
    /// Which base pages are preferred.
    pub near: Near,
    /// Which functions' base pages may be used.
    pub scope: Scope,
}

/// How the operation works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How pages are sampled.
    pub fingerprints: FingerprintConfig,
    /// Threads that encode.
    pub workers: usize,
    /// Whether the sandbox's pages become a base snapshot.
    pub new_base: bool,
}

/// Who takes hold of a sandbox's image and userfaultfds before its pages are dropped, and outlives
/// this operation: the keeper.
pub trait Holder: Sync {
    /// Takes hold.
    ///
    /// # Errors
    /// Why not; nothing is dropped then.
    fn hold(&self, image: &ImageHandle, userfaults: &[BorrowedFd<'_>]) -> Result<(), String>;

    /// Lets go again: nothing was dropped after all.
    fn release(&self);

    /// Puts back what was dropped, after dropping failed half way.
    ///
    /// # Errors
    /// Why not; the sandbox must be killed then.
    fn put_back(&self) -> Result<(), String>;
}

/// A sandbox was not deduplicated.
#[derive(Debug, thiserror::Error)]
pub enum DedupError {
    /// A request wants the sandbox. It is as it was, and runs.
    #[error("cancelled: a request wants the sandbox")]
    Cancelled,
    /// Something stands in the way. The sandbox is as it was, and runs.
    #[error("{0}")]
    StaysWarm(#[from] Hindrance),
    /// The sandbox could not be left as it was: it must be killed, if it is not dead already.
    #[error("{0}")]
    Lost(String),
}

/// What stands in the way of a dedup operation.
#[derive(Debug, thiserror::Error)]
pub enum Hindrance {
    /// In the processes themselves.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The group of processes can't be frozen.
    #[error("freezing the sandbox: {0}")]
    Freeze(std::io::Error),
    /// A page can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Encoding failed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The page store has no room.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The registry refuses.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The processes can't be stopped.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A userfaultfd can't be made.
    #[error(transparent)]
    Userfault(#[from] CreateError),
    /// A thread that the freezer missed, or somebody else, wrote to the memory meanwhile.
    #[error("the sandbox's memory changed while it was read")]
    Changed,
    /// The keeper does not take hold.
    #[error("the keeper: {0}")]
    Holder(String),
    /// The sandbox would take nearly as much memory in the page store.
    #[error(
        "nothing to gain: of {bytes} bytes, {image} would have to be kept; the memory is neither \
         alike any base page nor compressible"
    )]
    NothingToGain {
        /// The size of the sandbox's private pages.
        bytes: u64,
        /// What would have to be kept so far.
        image: u64,
    },
    /// More base snapshots than an image can name.
    #[error("the image would refer to more than 65535 base snapshots")]
    ManySnapshots,
}

impl Hindrance {
    /// Whether another try can't go better.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        matches!(self, Self::Plan(PlanError::Obstacle(_)) | Self::Userfault(_))
    }
}

/// What an operation did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Private pages that were dropped.
    pub pages: u64,
    /// Of those, pages of zeros.
    pub zero: u64,
    /// Of those, pages equal to a base page.
    pub equal: u64,
    /// Of those, pages kept as a patch against a base page.
    pub patched: u64,
    /// Of those, pages kept without a base page.
    pub unique: u64,
    /// Pages whose base page belongs to another function.
    pub foreign: u64,
    /// Pages that stay in the sandbox because the kernel needs them there.
    pub kept: u64,
    /// Bytes of patches.
    pub patch_bytes: u64,
    /// Memory that the operation itself took at most, bytes: buffers, patches, page sources. It is
    /// bounded by 1 MiB and the encoder's tables for each worker, by one and a half times the
    /// sandbox's private pages for patches ([`Hindrance::NothingToGain`] comes before), and
    /// usually a tenth of that.
    pub overhead_bytes: u64,
    /// Reading and encoding, microseconds. A request can cancel in this time.
    pub encode_us: u64,
    /// Stopping, registering, dropping, microseconds. A request waits in this time.
    pub commit_us: u64,
}

/// A sandbox in the dedup state.
#[derive(Debug)]
pub struct Deduplicated {
    /// Its image.
    pub image: ImageHandle,
    /// Its userfaultfds, which the holder has as well: as long as they are held here, missing pages
    /// block rather than read as zeros, whatever becomes of the holder.
    pub userfaults: Vec<UserFault>,
    /// What was done.
    pub counts: Counts,
}

/// Puts a sandbox, given as a group of processes that can be frozen, into the dedup state. The
/// group stays frozen if this succeeds and runs if it is left as it was.
///
/// Call it on an OS thread that ends with it ([`medes_memory::session::on_tracer_thread`]).
///
/// # Errors
/// [`DedupError`] says in which state the sandbox is.
pub fn dedup<F: Freezer>(
    mut freezer: F,
    store: &Store,
    registry: &dyn Registry,
    subject: Subject,
    options: Options,
    holder: &dyn Holder,
    cancel: &AtomicBool,
) -> Result<Deduplicated, DedupError> {
    let operation = Operation { store, registry, subject, options, cancel };
    let result = operation.run(&mut freezer, holder);
    if !matches!(result, Ok(_) | Err(DedupError::Lost(_)))
        && let Err(error) = let_run(&mut freezer)
    {
        return Err(DedupError::Lost(format!("thawing after a failure: {error}")));
    }
    result
}

/// Lets a frozen group run as if nothing had happened. Thawing alone would end some waits, such as
/// `epoll_wait`, with EINTR; stopping and leaving the threads first lets them wait on.
fn let_run<F: Freezer>(freezer: &mut F) -> std::io::Result<()> {
    match Session::open(&mut *freezer, &SeizeOptions::default()) {
        Ok(session) => {
            if let Err(error) = session.close() {
                tracing::debug!(%error, "a wait may end early");
            }
        }
        Err(error) => tracing::debug!(%error, "a wait may end early"),
    }
    freezer.thaw()
}

/// What a dedup operation would come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Estimate {
    /// What would be done; `commit_us` is 0.
    pub counts: Counts,
    /// The size that the image would have in the page store, bytes: table and patches.
    pub image_bytes: u64,
}

/// Finds out what [`dedup`] would come to. The processes should be frozen; nothing of them is
/// changed, and nothing is stored unless `options` ask for a new base.
///
/// # Errors
/// [`DedupError`], as `dedup` would have it.
pub fn estimate(
    pids: &[i32],
    store: &Store,
    registry: &dyn Registry,
    subject: Subject,
    options: Options,
    cancel: &AtomicBool,
) -> Result<Estimate, DedupError> {
    let operation = Operation { store, registry, subject, options, cancel };
    let begin = Instant::now();
    let plan = Plan::of(pids).map_err(Hindrance::Plan)?;
    let encoded = operation.encode(&batches(&plan))?;
    let mut counts = operation.count(&encoded);
    counts.encode_us = micros(begin);
    let anonymous = |p: &crate::plan::ProcessPlan| {
        let all = p.mappings.iter().filter(|m| m.kind != MappingKind::File);
        all.map(|m| m.start..m.end).collect()
    };
    let registered = plan.processes.iter().map(anonymous).collect();
    let (table, _) = table(&plan, &encoded, registered)?;
    let image_bytes = table.encode().len() as u64 + encoded.patches.len() as u64;
    Ok(Estimate { counts, image_bytes })
}

#[derive(Clone, Copy)]
struct Operation<'a> {
    store: &'a Store,
    registry: &'a dyn Registry,
    subject: Subject,
    options: Options,
    cancel: &'a AtomicBool,
}

/// Where the pages of a plan come from, in the plan's order.
struct Encoded {
    sources: Vec<PageSource>,
    patches: Vec<u8>,
    /// A hash of the content of each batch, in order.
    hashes: Vec<u64>,
    /// Every snapshot that a source refers to; held so that none can go.
    held: HashMap<SnapshotId, Arc<Snapshot>>,
}

/// Pages of one process that are read and encoded together.
struct Batch {
    pid: i32,
    runs: Vec<PageRun>,
}

impl Operation<'_> {
    fn run<F: Freezer>(
        &self,
        freezer: &mut F,
        holder: &dyn Holder,
    ) -> Result<Deduplicated, DedupError> {
        let begin = Instant::now();
        freezer.freeze().map_err(Hindrance::Freeze)?;
        let pids = freezer.processes().map_err(Hindrance::Freeze)?;
        let plan = Plan::of(&pids).map_err(Hindrance::Plan)?;
        let batches = batches(&plan);
        let encoded = self.encode(&batches)?;
        let mut counts = self.count(&encoded);
        counts.encode_us = micros(begin);
        let begin = Instant::now();
        let mut done = self.commit(freezer, holder, &plan, &batches, encoded, counts)?;
        done.counts.commit_us = micros(begin);
        Ok(done)
    }

    fn check_cancelled(&self) -> Result<(), DedupError> {
        if self.cancel.load(Ordering::Acquire) { Err(DedupError::Cancelled) } else { Ok(()) }
    }

    /// Makes the sandbox's pages a base snapshot, to which all of them are then equal.
    fn encode_as_base(&self, batches: &[Batch]) -> Result<Encoded, DedupError> {
        let fingerprinter = Fingerprinter::new(self.options.fingerprints);
        let mut builder = self.store.begin_snapshot(self.subject.domain, self.subject.function);
        let id = builder.id();
        let mut sources = Vec::new();
        let mut hashes = Vec::with_capacity(batches.len());
        let mut fingerprints: Vec<(u32, Fingerprint)> = Vec::new();
        let mut buffer = page_buffer();
        for batch in batches {
            self.check_cancelled()?;
            let pages = read(batch, &mut buffer)?;
            hashes.push(hash(pages));
            for (address, page) in addresses(batch).zip(pages) {
                if medes_pages::is_zero(page) {
                    sources.push(PageSource::Zero);
                    continue;
                }
                let index = builder.push(address, page).map_err(Hindrance::Store)?;
                fingerprints.push((index, fingerprinter.fingerprint(page)));
                sources.push(PageSource::Base(PageRef { snapshot: id, page: index }));
            }
        }
        let snapshot = builder.finish().map_err(Hindrance::Store)?;
        let Subject { domain, function, .. } = self.subject;
        if let Err(error) = self.registry.insert(domain, function, id, &fingerprints) {
            // Still a base for its own function, found by address, if not for others.
            tracing::warn!(%error, snapshot = %id, "the registry took no fingerprints");
        }
        let held = HashMap::from([(id, snapshot)]);
        Ok(Encoded { sources, patches: Vec::new(), hashes, held })
    }

    fn encode(&self, batches: &[Batch]) -> Result<Encoded, DedupError> {
        if self.options.new_base {
            self.encode_as_base(batches)
        } else {
            self.encode_against_bases(batches)
        }
    }

    /// Encodes all batches against the bases there are, on as many threads as allowed.
    fn encode_against_bases(&self, batches: &[Batch]) -> Result<Encoded, DedupError> {
        let Subject { domain, function, near, scope } = self.subject;
        let mut own = match scope {
            Scope::Any | Scope::SameFunction => self.store.snapshots_of(domain, function),
            Scope::OtherFunctions => Vec::new(),
        };
        own.reverse();
        let bases =
            Bases { store: self.store, registry: self.registry, domain, near, scope, own: &own };
        let next = AtomicUsize::new(0);
        let all: u64 = batches.iter().map(Batch::bytes).sum();
        let kept = AtomicU64::new(0);
        let parts: Mutex<Vec<(usize, Part)>> = Mutex::new(Vec::with_capacity(batches.len()));
        let held: Mutex<HashMap<SnapshotId, Arc<Snapshot>>> = Mutex::default();
        let work = || -> Result<(), DedupError> {
            let fingerprinter = Fingerprinter::new(self.options.fingerprints);
            let mut encoder = PageEncoder::new(bases, fingerprinter).stop_on(self.cancel);
            let mut buffer = page_buffer();
            let mut places = Vec::with_capacity(BATCH as usize);
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let Some(batch) = batches.get(n) else { break };
                self.check_cancelled()?;
                let pages = read(batch, &mut buffer)?;
                places.clear();
                places.extend(addresses(batch));
                let mut part = Part { hash: hash(pages), ..Part::default() };
                let encoded = encoder.encode(&places, pages, &mut part.sources, &mut part.patches);
                encoded.map_err(|error| match error {
                    EncodeError::Stopped => DedupError::Cancelled,
                    error => Hindrance::Encode(error).into(),
                })?;
                let image = part.patches.len() as u64;
                let image = kept.fetch_add(image, Ordering::Relaxed) + image;
                if image > all / WORTH.1 * WORTH.0 {
                    return Err(Hindrance::NothingToGain { bytes: all, image }.into());
                }
                parts.lock().push((n, part));
            }
            held.lock().extend(encoder.held().map(|s| (s.id(), Arc::clone(s))));
            Ok(())
        };
        let workers = self.options.workers.clamp(1, batches.len().max(1));
        // On threads of their own, of low priority: requests to other sandboxes come first. The
        // calling thread keeps its priority for the part that a request may have to wait for.
        std::thread::scope(|scope| {
            let work = || {
                medes_memory::priority::lower_this_thread();
                work()
            };
            let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
        let mut parts = parts.into_inner();
        parts.sort_unstable_by_key(|(n, _)| *n);
        let mut encoded = Encoded {
            sources: Vec::new(),
            patches: Vec::new(),
            hashes: Vec::with_capacity(parts.len()),
            held: held.into_inner(),
        };
        for (_, part) in parts {
            encoded.sources.extend(part.sources);
            encoded.patches.extend(part.patches);
            encoded.hashes.push(part.hash);
        }
        Ok(encoded)
    }

    fn count(&self, encoded: &Encoded) -> Counts {
        let foreign = |at: &PageRef| {
            let snapshot = encoded.held.get(&at.snapshot);
            u64::from(snapshot.is_some_and(|s| s.function() != self.subject.function))
        };
        let buffers = self.options.workers.max(1) as u64 * u64::from(BATCH) * PAGE_SIZE as u64;
        let sources = encoded.sources.len() * size_of::<PageSource>();
        let mut counts = Counts {
            patch_bytes: encoded.patches.len() as u64,
            // Parts are joined into one piece, so patches and sources are there twice for a moment.
            overhead_bytes: buffers + 2 * (encoded.patches.len() + sources) as u64,
            ..Counts::default()
        };
        for source in &encoded.sources {
            counts.pages += 1;
            match source {
                PageSource::Zero => counts.zero += 1,
                PageSource::Base(at) => {
                    counts.equal += 1;
                    counts.foreign += foreign(at);
                }
                PageSource::Patch { base: Some(at), .. } => {
                    counts.patched += 1;
                    counts.foreign += foreign(at);
                }
                PageSource::Patch { base: None, .. } => counts.unique += 1,
            }
        }
        counts
    }

    fn commit<F: Freezer>(
        &self,
        freezer: &mut F,
        holder: &dyn Holder,
        plan: &Plan,
        batches: &[Batch],
        encoded: Encoded,
        mut counts: Counts,
    ) -> Result<Deduplicated, DedupError> {
        self.check_cancelled()?;
        let mut session =
            Session::open(&mut *freezer, &SeizeOptions::default()).map_err(Hindrance::Session)?;
        let prepared = self.prepare(&mut session, plan, batches, &encoded);
        let (mut userfaults, image) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                // Detached before thawing; registrations went with the descriptors.
                return match session.close() {
                    Ok(()) => Err(error),
                    Err(closing) => Err(DedupError::Lost(format!("{error}; then: {closing}"))),
                };
            }
        };
        let descriptors: Vec<BorrowedFd<'_>> = userfaults.iter().map(AsFd::as_fd).collect();
        let held = holder.hold(&image, &descriptors).map_err(Hindrance::Holder);
        let held = held
            .map_err(DedupError::from)
            .and_then(|()| self.check_cancelled().inspect_err(|_| holder.release()));
        if let Err(error) = held {
            let released = userfaults.iter_mut().try_for_each(UserFault::unregister_all);
            self.store.remove_image(image);
            let closed = session.close();
            return match (released, closed) {
                (Ok(()), Ok(())) => Err(error),
                (Err(also), _) => Err(DedupError::Lost(format!("{error}; then: {also}"))),
                (_, Err(also)) => Err(DedupError::Lost(format!("{error}; then: {also}"))),
            };
        }
        // From here on pages are missing.
        let dropped = drop_all(&mut session, plan, &mut userfaults, &mut counts);
        let closed = session.close();
        if let Err(error) = &dropped {
            tracing::warn!(%error, "dropping pages failed; they are put back");
            // The holder puts the pages back and thaws; those still there are left alone.
            let back = if closed.is_ok() { holder.put_back() } else { Err(String::new()) };
            if let Err(why) = back {
                return Err(DedupError::Lost(format!("{error}; then: {why}")));
            }
            self.store.remove_image(image);
            return Err(DedupError::StaysWarm(Hindrance::Holder(error.to_string())));
        }
        if let Err(error) = closed {
            return Err(DedupError::Lost(error.to_string()));
        }
        Ok(Deduplicated { image, userfaults, counts })
    }

    /// Everything but dropping: checks that the memory is as it was read, makes the userfaultfds,
    /// registers the mappings, stores the image.
    fn prepare<F: Freezer>(
        &self,
        session: &mut Session<F>,
        plan: &Plan,
        batches: &[Batch],
        encoded: &Encoded,
    ) -> Result<(Vec<UserFault>, ImageHandle), DedupError> {
        let mut pids: Vec<i32> = session.processes().iter().map(|p| p.pid()).collect();
        pids.sort_unstable();
        let planned = plan.processes.iter().map(|p| p.pid);
        if !pids.iter().copied().eq(planned) {
            return Err(Hindrance::Changed.into());
        }
        let mut buffer = page_buffer();
        for (batch, expected) in batches.iter().zip(&encoded.hashes) {
            self.check_cancelled()?;
            if hash(read(batch, &mut buffer)?) != *expected {
                return Err(Hindrance::Changed.into());
            }
        }
        let options = UserFaultOptions {
            features: UserFaultFeatures::EVENTS,
            keep_in_target: false,
            without_privilege: false,
        };
        let mut userfaults = Vec::with_capacity(plan.processes.len());
        let mut registered = Vec::with_capacity(plan.processes.len());
        for process in &plan.processes {
            let mut userfault =
                session.userfault(process.pid, &options).map_err(Hindrance::Userfault)?;
            let mut ranges = Vec::new();
            for mapping in &process.mappings {
                let range = mapping.start..mapping.end;
                match mapping.kind {
                    MappingKind::Anonymous => {}
                    // Registered when it has become anonymous.
                    MappingKind::Replaced(_) => {
                        ranges.push(range);
                        continue;
                    }
                    MappingKind::File => continue,
                }
                match userfault.register(range.clone(), RegisterMode::Missing) {
                    Ok(()) => ranges.push(range),
                    Err(error) => tracing::debug!(%error, "a mapping stays resident"),
                }
            }
            userfaults.push(userfault);
            registered.push(ranges);
        }
        let (table, patches) = table(plan, encoded, registered)?;
        let snapshots: Vec<SnapshotId> = table.snapshots.iter().map(|s| s.id).collect();
        let head = table.encode();
        let mut parts = vec![head.as_slice()];
        parts.extend(patches);
        let image = self.store.put_image(&parts, &snapshots).map_err(Hindrance::Store)?;
        Ok((userfaults, image))
    }
}

#[derive(Default)]
struct Part {
    sources: Vec<PageSource>,
    patches: Vec<u8>,
    hash: u64,
}

impl Batch {
    fn bytes(&self) -> u64 {
        self.runs.iter().map(PageRun::bytes).sum()
    }
}

/// Cuts a plan into batches.
fn batches(plan: &Plan) -> Vec<Batch> {
    let mut batches = Vec::new();
    for process in &plan.processes {
        let mut batch = Batch { pid: process.pid, runs: Vec::new() };
        let mut room = BATCH;
        for run in process.mappings.iter().flat_map(|m| &m.runs) {
            let mut rest = *run;
            while rest.pages > 0 {
                let pages = rest.pages.min(room);
                batch.runs.push(PageRun { pages, ..rest });
                rest.start += u64::from(pages) * PAGE_SIZE as u64;
                rest.pages -= pages;
                room -= pages;
                if room == 0 {
                    let full = Batch { pid: process.pid, runs: Vec::new() };
                    batches.push(std::mem::replace(&mut batch, full));
                    room = BATCH;
                }
            }
        }
        if !batch.runs.is_empty() {
            batches.push(batch);
        }
    }
    batches
}

fn page_buffer() -> Vec<Page> {
    vec![[0; PAGE_SIZE]; BATCH as usize]
}

fn read<'b>(batch: &Batch, buffer: &'b mut [Page]) -> Result<&'b [Page], DedupError> {
    let bytes = read_pages(batch.pid, &batch.runs, buffer.as_flattened_mut());
    let bytes = bytes.map_err(Hindrance::Read)?;
    Ok(&buffer[..bytes / PAGE_SIZE])
}

fn addresses(batch: &Batch) -> impl Iterator<Item = u64> + '_ {
    let page = PAGE_SIZE as u64;
    batch.runs.iter().flat_map(move |r| (0..u64::from(r.pages)).map(move |n| r.start + n * page))
}

fn hash(pages: &[Page]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.write(pages.as_flattened());
    hasher.finish()
}

/// The image's table, and the patches that it refers to, in order.
fn table<'e>(
    plan: &Plan,
    encoded: &'e Encoded,
    registered: Vec<Vec<Range<u64>>>,
) -> Result<(Table, Vec<&'e [u8]>), DedupError> {
    let mut names: HashMap<SnapshotId, u16> = HashMap::new();
    let mut table = Table::default();
    let mut patches = Vec::new();
    let mut sources = encoded.sources.iter();
    let mut rest = encoded.patches.as_slice();
    for (process, ranges) in plan.processes.iter().zip(registered) {
        let mut runs = RunBuilder::default();
        for mapping in &process.mappings {
            runs.border();
            let file = mapping.kind == MappingKind::File;
            let stays = !file && !ranges.iter().any(|r| r.start == mapping.start);
            for run in &mapping.runs {
                for n in 0..u64::from(run.pages) {
                    let address = run.start + n * PAGE_SIZE as u64;
                    let source = *sources.next().ok_or(Hindrance::Changed)?;
                    let patch = match source {
                        PageSource::Patch { length, .. } => {
                            let (patch, after) = rest.split_at(usize::from(length));
                            rest = after;
                            patch
                        }
                        _ => &[],
                    };
                    if stays {
                        continue;
                    }
                    let mut name = |at: PageRef| -> Result<(u16, u32), DedupError> {
                        let next = u16::try_from(table.snapshots.len());
                        let name = match names.entry(at.snapshot) {
                            std::collections::hash_map::Entry::Occupied(known) => *known.get(),
                            std::collections::hash_map::Entry::Vacant(new) => {
                                let held = encoded.held.get(&at.snapshot);
                                let record = held.ok_or(Hindrance::Changed)?.record();
                                let next = next.map_err(|_| Hindrance::ManySnapshots)?;
                                table.snapshots.push(SnapshotUse { id: at.snapshot, record });
                                *new.insert(next)
                            }
                        };
                        Ok((name, at.page))
                    };
                    match source {
                        // A private copy of file content can't come back by itself.
                        PageSource::Zero if file => {
                            runs.patch(address, true, PatchUse { length: 0, check: 0, base: None });
                        }
                        PageSource::Zero => {}
                        PageSource::Base(at) => {
                            let (snapshot, page) = name(at)?;
                            runs.base(address, file, snapshot, page);
                        }
                        PageSource::Patch { length, check, base } => {
                            let base = base.map(&mut name).transpose()?;
                            runs.patch(address, file, PatchUse { length, check, base });
                            patches.push(patch);
                        }
                    }
                }
            }
        }
        let is_heap = |range: &&Range<u64>| {
            process.mappings.iter().any(|mapping| mapping.heap && mapping.start == range.start)
        };
        let with_length = |range: &Range<u64>| (range.start, range.end - range.start);
        table.processes.push(ProcessTable {
            pid: process.pid,
            registered: ranges.iter().map(with_length).collect(),
            heap: ranges.iter().filter(is_heap).map(with_length).collect(),
            runs: runs.finish(),
        });
    }
    Ok((table, patches))
}

/// Drops every page that the image can bring back, but those that the kernel itself touches.
fn drop_all<F: Freezer>(
    session: &mut Session<F>,
    plan: &Plan,
    userfaults: &mut [UserFault],
    counts: &mut Counts,
) -> Result<(), EvictError> {
    for (process, userfault) in plan.processes.iter().zip(userfaults) {
        let kept = match session.process(process.pid) {
            Some(seized) => seized.rseq_areas().unwrap_or_default(),
            None => Vec::new(),
        };
        let mut kept: Vec<Range<u64>> = kept.iter().flat_map(|a| a.resident_pages()).collect();
        kept.sort_unstable_by_key(|r| r.start);
        counts.kept += kept.iter().map(|r| (r.end - r.start) / PAGE_SIZE as u64).sum::<u64>();
        let mut eviction = Eviction::default();
        for mapping in &process.mappings {
            let range = mapping.start..mapping.end;
            match mapping.kind {
                MappingKind::Anonymous => eviction.anonymous.extend(without(range, &kept)),
                MappingKind::Replaced(protection) => {
                    eviction.replace.push(Replacement { range, protection });
                }
                MappingKind::File => {
                    let runs = mapping.runs.iter().map(PageRun::range);
                    eviction.file.extend(runs.flat_map(|r| without(r, &kept)));
                }
            }
        }
        session.evict(process.pid, userfault, &eviction)?;
    }
    Ok(())
}

/// `range` without what of `holes` (sorted) lies in it.
fn without(range: Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    let mut at = range.start;
    for hole in holes.iter().filter(|h| h.start < range.end && h.end > range.start) {
        if hole.start > at {
            parts.push(at..hole.start);
        }
        at = at.max(hole.end);
    }
    if at < range.end {
        parts.push(at..range.end);
    }
    parts
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_left_out() {
        let holes = [0x1000..0x2000, 0x5000..0x6000, 0x5000..0x7000, 0x9000..0xa000];
        assert_eq!(without(0x0..0x8000, &holes), [0x0..0x1000, 0x2000..0x5000, 0x7000..0x8000]);
        assert_eq!(without(0x1000..0x2000, &holes), []);
        assert_eq!(without(0x9800..0xb000, &holes)[0], 0xa000..0xb000);
        assert_eq!(without(0xb000..0xc000, &holes)[0], 0xb000..0xc000);
    }
}
