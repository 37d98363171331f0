//! The dedup operation, on a live sandbox.
//!
//! 1. The sandbox is frozen, and with every thread stopped for a moment each process makes a
//!    userfaultfd.
//! 2. What of it can go is planned; its memory is write-protected, so that the kernel remembers who
//!    writes to it; pages are read, encoded, and the image stored. This takes nearly all of the
//!    time, and a request that arrives meanwhile has the sandbox run again at once.
//! 3. With every thread stopped again: if nobody wrote to the memory, the [`Holder`] takes hold of
//!    image and userfaultfds, and only then the pages are dropped, in small steps. A request that
//!    arrives meanwhile stops the dropping, and the sandbox runs on; what is gone already comes back
//!    as it is touched.
//!
//! A sandbox that was restored before ([`Previous`]) has its userfaultfds, and only what it wrote
//! since is read and encoded: of the rest the new image has what the earlier one had.
//!
//! Whatever fails before pages are dropped leaves the sandbox as it was; a failure while dropping
//! leaves it to the holder to put the pages back.

mod batch;
mod cancel;
mod commit;
mod encoding;
mod standing;
mod table;

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use medes_core::{DomainId, FunctionId, SnapshotId};
use medes_memory::reader::ReadError;
use medes_memory::session::{Freezer, SessionError};
use medes_memory::userfault::{CreateError, RegisterError, UserFault};
use medes_pages::FingerprintConfig;
use medes_registry::{Near, Registry, RegistryError, Scope};
use medes_store::{ImageHandle, Store, StoreError, View};

use crate::encode::{EncodeError, PageSource};
use crate::index::ImageIndex;
use crate::plan::{Flags, Look, MappingKind, Plan, PlanError};
use crate::view::SpaceView;
use batch::{Batch, batches};
use commit::Registered;
pub use standing::let_run;
use standing::{Standing, Watched};

pub use cancel::Cancel;

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
    /// Looks whether the image can be read, while a request has the sandbox run at once: so
    /// [`Holder::hold`], during which it has to wait, need not.
    ///
    /// # Errors
    /// Why it can't be read.
    fn examine(&self, image: &ImageHandle) -> Result<(), String> {
        let _ = image;
        Ok(())
    }

    /// Takes hold.
    ///
    /// # Errors
    /// Why not; nothing is dropped then.
    fn hold(&self, handover: &Handover<'_>) -> Result<(), String>;

    /// Lets go again: nothing was dropped after all.
    fn release(&self);

    /// For each process, ranges that lack nothing, though the image has them: a request came before
    /// they were dropped, or the kernel does not let them be watched.
    ///
    /// # Errors
    /// Why that is not heeded; the sandbox must be killed then.
    fn left(&self, ranges: &[Vec<Range<u64>>]) -> Result<(), String>;

    /// Brings back what was dropped as it is needed, from now on: a request came while pages were
    /// being dropped, and the caller lets the sandbox run. `left` is what [`Holder::left`] says;
    /// `meanwhile` is to be called once, while others work if they do.
    ///
    /// # Errors
    /// Why not; the sandbox must be killed then.
    fn take_back(
        &self,
        left: &[Vec<Range<u64>>],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), String>;

    /// Puts all back that was dropped, after dropping failed half way, and thaws the sandbox. What
    /// was suspended stays so no longer: nothing is served or watched any more.
    ///
    /// # Errors
    /// Why not; the sandbox must be killed then.
    fn put_back(&self) -> Result<(), String>;

    /// Stops serving the memory of a sandbox that was restored before and is frozen now, and says
    /// what of the image is still its own, for each process of the image.
    ///
    /// # Errors
    /// Why that can't be said; it is served on then.
    fn suspend(&self) -> Result<Vec<SpaceView>, String>;

    /// Serves it on after [`Holder::suspend`].
    ///
    /// # Errors
    /// Why not; the sandbox must be killed then.
    fn resume(&self) -> Result<(), String>;
}

/// What a [`Holder`] takes hold of.
#[derive(Clone, Copy, Debug)]
pub struct Handover<'a> {
    /// The image.
    pub image: &'a ImageHandle,
    /// The userfaultfds, in the image's order of processes.
    pub userfaults: &'a [BorrowedFd<'a>],
    /// For each process, what was written to since the restore before of what that image has, if
    /// there was one.
    pub written: &'a [Vec<Range<u64>>],
    /// For each process, what stays and is not in the image ([`HeldImage::leave`]).
    ///
    /// [`HeldImage::leave`]: crate::restore::HeldImage::leave
    pub residents: &'a [Vec<Range<u64>>],
}

/// What is left of the dedup operation before, of a sandbox that was restored since.
pub struct Previous {
    /// Its image.
    pub image: ImageIndex,
    /// Its userfaultfds, one for each process of the image. They stay the caller's.
    pub userfaults: Vec<UserFault>,
}

impl Previous {
    /// What is left of an operation that made `image`, as long as something can be gained by it:
    /// `None` if the userfaultfds don't tell of writes, or a base snapshot is to be used no more.
    ///
    /// # Errors
    /// If the image can't be read, or a descriptor not be duplicated.
    pub fn of(
        store: &Store,
        view: Arc<View>,
        image: &ImageHandle,
        userfaults: &[UserFault],
    ) -> io::Result<Option<Self>> {
        let in_use = |id: &SnapshotId| store.snapshot(*id).is_some();
        if userfaults.is_empty()
            || !userfaults.iter().all(UserFault::tracks_writes)
            || !image.snapshots().iter().all(in_use)
        {
            return Ok(None);
        }
        let image = ImageIndex::open(view, image.extent()).map_err(io::Error::other)?;
        let userfaults = userfaults.iter().map(|userfault| userfault.duplicate(Vec::new()));
        Ok(Some(Self { image, userfaults: userfaults.collect::<io::Result<_>>()? }))
    }
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
    /// A mapping that lacks pages can't be registered again.
    #[error(transparent)]
    Register(RegisterError),
    /// The kernel does not tell of writes to the memory after all.
    #[error("write-protecting the sandbox's memory: {0}")]
    Protect(std::io::Error),
    /// The kernel does not say which pages were written to.
    #[error("looking for pages that were written to: {0}")]
    Look(std::io::Error),
    /// There is no thread to work on.
    #[error("starting a thread: {0}; is a limit of processes reached?")]
    Thread(std::io::Error),
    /// The kernel does not say which memory it touches itself.
    #[error("asking for the memory that the kernel writes to itself (rseq): {0}")]
    Rseq(std::io::Error),
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
    /// Pages taken over from the image before, because nobody has changed them since.
    pub reused: u64,
    /// Pages that stay in the sandbox: those that were to stay ([`Operation::residents`]), and those
    /// that the kernel needs there.
    pub kept: u64,
    /// Bytes of patches.
    pub patch_bytes: u64,
    /// Memory that the operation itself took at most, bytes: buffers, patches, page sources. It is
    /// bounded by 1 MiB and the encoder's tables for each worker, by one and a half times the
    /// sandbox's private pages for patches ([`Hindrance::NothingToGain`] comes before), and
    /// usually a tenth of that.
    pub overhead_bytes: u64,
    /// Reading and encoding, microseconds. A request has the sandbox run at once in this time.
    pub encode_us: u64,
    /// Stopping, handing over, dropping, microseconds. A request waits for one step of it.
    pub commit_us: u64,
}

/// A sandbox in the dedup state, or on its way back from there.
#[derive(Debug)]
pub struct Deduplicated {
    /// Its image.
    pub image: ImageHandle,
    /// Its userfaultfds, which the holder has as well: as long as they are held here, missing pages
    /// block rather than read as zeros, whatever becomes of the holder.
    pub userfaults: Vec<UserFault>,
    /// What was done.
    pub counts: Counts,
    /// Whether a request came while pages were being dropped: the sandbox runs, and the holder
    /// brings back what it lacks ([`Holder::take_back`]).
    pub taken_back: bool,
}

impl Counts {
    fn add(&mut self, source: &PageSource) {
        self.pages += 1;
        match source {
            PageSource::Zero => self.zero += 1,
            PageSource::Base(_) => self.equal += 1,
            PageSource::Patch { base: Some(_), .. } => self.patched += 1,
            PageSource::Patch { base: None, .. } => self.unique += 1,
        }
    }
}

/// What a dedup operation would come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Estimate {
    /// What would be done; `commit_us` is 0.
    pub counts: Counts,
    /// The size that the image would have in the page store, bytes: table and patches.
    pub image_bytes: u64,
}

/// All that a dedup operation works with but the sandbox itself.
#[derive(Clone, Copy)]
pub struct Operation<'a> {
    /// Where base snapshots and images are.
    pub store: &'a Store,
    /// Where base pages are found by fingerprint.
    pub registry: &'a dyn Registry,
    /// Whose sandbox it is.
    pub subject: Subject,
    /// How it works.
    pub options: Options,
    /// For each process, by process id, pages that stay where they are, in order: the next request
    /// would have to wait for them. Those among them that are away are kept as all others are.
    pub residents: &'a [Vec<Range<u64>>],
    /// Takes the sandbox back.
    pub cancel: &'a Cancel,
}

/// An image in the page store, and what was read for it.
struct Made {
    image: ImageHandle,
    batches: Vec<Batch>,
    hashes: Vec<Option<u64>>,
    counts: Counts,
}

impl Operation<'_> {
    /// Puts a sandbox, given as a group of processes that can be frozen, into the dedup state. The
    /// group stays frozen if this succeeds, unless a request has taken it back, and runs if it is
    /// left as it was.
    ///
    /// Call it on an OS thread that ends with it ([`medes_memory::session::on_tracer_thread`]).
    ///
    /// # Errors
    /// [`DedupError`] says in which state the sandbox is.
    pub fn dedup<F: Freezer + Send>(
        &self,
        freezer: F,
        holder: &dyn Holder,
        previous: Option<&Previous>,
    ) -> Result<Deduplicated, DedupError> {
        // The threads of the sandbox come first on the processor that they share with this one, so that
        // it does not spin while it waits for them; a request has this one hurry.
        medes_memory::priority::lower_this_thread();
        let _operating = self.cancel.operating();
        let mut standing = Standing::new(freezer, holder, self.cancel);
        match self.run(&mut standing, previous) {
            Ok((image, counts, taken_back)) => {
                Ok(Deduplicated { image, userfaults: standing.userfaults, counts, taken_back })
            }
            Err(error) => Err(standing.give_up(error)),
        }
    }

    fn run<F: Freezer + Send>(
        &self,
        standing: &mut Standing<'_, F>,
        previous: Option<&Previous>,
    ) -> Result<(ImageHandle, Counts, bool), DedupError> {
        let begin = Instant::now();
        standing.freeze()?;
        let spaces = match previous {
            Some(previous) => Some(standing.suspend(&previous.userfaults)?),
            None => None,
        };
        let mut pids = standing.freezer.processes().map_err(Hindrance::Freeze)?;
        pids.sort_unstable();
        Plan::check(&pids).map_err(Hindrance::Plan)?;
        self.check_cancelled()?;
        standing.prepare(&pids)?;
        self.check_cancelled()?;
        let old = previous.map(|previous| &previous.image);
        let mut userfaults = std::mem::take(&mut standing.userfaults);
        let (fresh, holder) = (standing.fresh, standing.holder);
        let stop = || self.cancel.is_requested();
        let work = || {
            let (plan, registered, made) = std::thread::scope(|scope| {
                let flags = Flags::reading(scope, &pids, &stop);
                let mut make = |plan: Result<Plan, PlanError>| {
                    self.check_cancelled()?;
                    let plan = plan.map_err(Hindrance::Plan)?;
                    let registered = self.register(&mut userfaults, fresh, &plan)?;
                    let made = self.make(&plan, &registered, old)?;
                    Ok::<_, DedupError>((plan, registered, made))
                };
                let look = Look::at(&pids, spaces.as_deref(), self.residents, &stop);
                self.check_cancelled()?;
                let look = look.map_err(Hindrance::Plan)?;
                if old.is_none() {
                    return make(flags().and_then(|flags| look.plan(Some(&flags))));
                }
                // What an image had before has no flag that matters, unless it got one since. That is
                // found out while it is encoded.
                let presumed = make(look.plan(None))?;
                let plan = flags().and_then(|flags| look.plan(Some(&flags)));
                if plan.as_ref().is_ok_and(|plan| *plan == presumed.0) {
                    return Ok(presumed);
                }
                self.store.remove_image(presumed.2.image);
                make(plan)
            })?;
            let mut examine = || {
                self.check_cancelled()?;
                if !fresh {
                    self.register_again(&mut userfaults, &plan)?;
                }
                Ok(holder.examine(&made.image).map_err(Hindrance::Holder)?)
            };
            match examine() {
                Ok(()) => Ok((plan, registered, made)),
                Err(error) => {
                    self.store.remove_image(made.image);
                    Err(error)
                }
            }
        };
        let worked: Watched<Result<_, DedupError>> = standing.watch(work)?;
        let (plan, registered, made) = match worked {
            Watched::Done(done) => {
                standing.userfaults = userfaults;
                done?
            }
            Watched::Cancelled(done) => {
                if fresh {
                    standing::release(userfaults);
                }
                if let Ok((.., made)) = done {
                    self.store.remove_image(made.image);
                }
                return Err(DedupError::Cancelled);
            }
        };
        let Made { image, batches, hashes, mut counts } = made;
        counts.encode_us = micros(begin);
        let begin = Instant::now();
        let read = (batches.as_slice(), hashes.as_slice());
        let done = self.commit(standing, &plan, &registered, read, &image, &mut counts);
        let taken_back = match done {
            Ok(taken_back) => taken_back,
            Err(error) => {
                // Who waits for the sandbox need not wait for what is put away here.
                let error = standing.give_up(error);
                self.store.remove_image(image);
                return Err(error);
            }
        };
        counts.commit_us = micros(begin);
        Ok((image, counts, taken_back))
    }

    /// Finds out what [`Operation::dedup`] would come to. The processes should be frozen; nothing
    /// of them is changed, and nothing is stored unless the options ask for a new base.
    ///
    /// # Errors
    /// [`DedupError`], as `dedup` would have it.
    pub fn estimate(&self, pids: &[i32]) -> Result<Estimate, DedupError> {
        let begin = Instant::now();
        Plan::check(pids).map_err(Hindrance::Plan)?;
        let plan = Plan::of(pids, &|| false).map_err(Hindrance::Plan)?;
        let encoded = self.encode(&batches(&plan, |_| true), 0, None)?;
        let mut counts = self.count(&encoded)?;
        counts.encode_us = micros(begin);
        let anonymous = |p: &crate::plan::ProcessPlan| {
            let all = p.mappings.iter().filter(|m| m.kind != MappingKind::File);
            all.map(|m| m.start..m.end).collect()
        };
        let ranges: Vec<_> = plan.processes.iter().map(anonymous).collect();
        let go_on = || self.check_cancelled();
        let (table, _) = table::table(&plan, &encoded, None, &ranges, false, &mut counts, &go_on)?;
        let image_bytes = table.encode().len() as u64 + encoded.patches.len() as u64;
        Ok(Estimate { counts, image_bytes })
    }

    /// Reads and encodes what the plan says, and stores the image.
    fn make(
        &self,
        plan: &Plan,
        registered: &Registered,
        old: Option<&ImageIndex>,
    ) -> Result<Made, DedupError> {
        let batches = batches(plan, |mapping| registered.watches(mapping));
        let encoded = self.encode(&batches, plan.reused_bytes(), old)?;
        let mut counts = self.count(&encoded)?;
        let Registered { ranges, tracks_writes, .. } = registered;
        let go_on = || self.check_cancelled();
        let (table, patches) =
            table::table(plan, &encoded, old, ranges, *tracks_writes, &mut counts, &go_on)?;
        let snapshots: Vec<SnapshotId> = table.snapshots.iter().map(|s| s.id).collect();
        let head = table.encode();
        let mut parts = vec![head.as_slice()];
        parts.extend(patches);
        let go_on = || !self.cancel.is_requested();
        let image = match self.store.put_image_while(&parts, &snapshots, go_on) {
            Err(StoreError::Stopped) => return Err(DedupError::Cancelled),
            image => image.map_err(Hindrance::Store)?,
        };
        Ok(Made { image, batches, hashes: encoded.hashes, counts })
    }

    fn check_cancelled(&self) -> Result<(), DedupError> {
        if self.cancel.is_requested() { Err(DedupError::Cancelled) } else { Ok(()) }
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
